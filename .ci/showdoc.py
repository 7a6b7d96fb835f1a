"How the site shows a function or a class: its signature, its docstring, a table of its parameters, a table of its methods."
import inspect
import re
from dataclasses import is_dataclass
from importlib import import_module
from textwrap import wrap

from fastcore.docments import ShowDocRenderer, docments, empty
from nbdev.config import get_config

from samsde import _modidx

OWN = ("self", "cls")  # not given by a caller


def plain(text):
    "The text with nothing that Markdown takes for markup but `names` in backticks"
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()).replace("->", "→"))
    return "".join(part if part[:1] == "`" else re.sub(r"([\\*_\[\]|$#~^])", r"\\\1", part).replace("<", "&lt;") for part in parts)


def value(default, annotation=empty):
    text = getattr(default, "__name__", None) or repr(default)
    return {dict: "{}", list: "[]"}.get(annotation, "…") if text == "<factory>" else text


def kind(annotation):
    "A type in words, each name of which can become a link"
    if annotation in (empty, None, type(None)): return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"^Optional\[(.*)\]$", r"\1|None", re.sub(r"\b(?:\w+\.)+(?=\w)", "", text))
    return " or ".join(f"`{name.strip()}`" for name in text.split("|"))


def call(name, signature, types):
    "The signature in lines of at most 80 characters, with the types where no table tells them"
    bare = {} if types else dict(annotation=empty)
    params = [p.replace(**bare, **({} if p.default is empty else dict(default=Shown(p.default, p.annotation))))
              for p in signature.parameters.values() if p.name not in OWN]
    kept = types and signature.return_annotation is not None  # a class returns no None
    text = str(signature.replace(parameters=params, **({} if kept else dict(return_annotation=empty))))
    text = re.sub(r"\b(?:torch|typing|pathlib|__main__|samsde(?:\.\w+)*|pandas(?:\.\w+)*)\.(?=[A-Za-z])", "", text)
    if len(name + text) <= 80: return name + text
    lines = wrap(re.sub(r"^\(", "", text), 76, break_long_words=False, break_on_hyphens=False)
    return "\n".join([f"{name}({lines[0]}", *(" " * 4 + line for line in lines[1:])])


def fields(named):
    "What docments tells of other classes: the fields of a named tuple with their types, defaults and comments"
    source = inspect.getsource(named)
    comment = lambda name: (re.search(rf"^\s+{name}\s*:[^#\n]*#\s*(.*)", source, re.M) or ["", ""])[1]
    return {name: dict(anno=p.annotation, default=p.default, docment=comment(name)) for name, p in inspect.signature(named).parameters.items()}


def home(sym):
    "The module that exports a class: two may export one of the same name, with other bases"
    names = [base.__name__ for base in sym.__mro__]
    for path in _modidx.d["syms"]:
        module = import_module(path)
        there = getattr(module, sym.__name__, None)
        if inspect.isclass(there) and [base.__name__ for base in there.__mro__] == names and sym.__name__ in module.__all__: return module


class Shown:
    "A default that prints as it was written"
    def __init__(self, default, annotation): self.default, self.annotation = default, annotation
    def __repr__(self): return value(self.default, self.annotation)


def table(head, rows): return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)])


class Renderer(ShowDocRenderer):
    def parameters(self):
        "Rows of the table of parameters; none where there is nothing to say but a name"
        sym = self.sym
        if is_dataclass(sym) or hasattr(sym, "_fields"):  # the comments are found in the module alone, not in a notebook's cell
            sym = getattr(home(sym), self.nm)
        try: found = fields(sym) if hasattr(sym, "_fields") else docments(sym, full=True, args_kwargs=True)
        except (TypeError, OSError): return []
        if not any(p.get("docment") for p in found.values()): return []
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        rows = []
        for name, p in found.items():
            if name in OWN: continue
            default, meaning, type_ = p.get("default", empty), plain(p.get("docment") or ""), kind(p.get("anno", empty))
            if name == "return":
                if type_ or meaning: rows.append(["*returns*", type_, meaning])
            else:
                star = stars.get(p.get("kind"))
                shown = f"`{star}{name}`" if star else f"**{plain(name)}**"
                rows.append([shown, type_ + ("" if default is empty else f" = `{value(default, p.get('anno'))}`"), meaning])
        return rows

    def bases(self):
        "A class and those of its bases that have no table of their own, and the name of the base that has one"
        if not inspect.isclass(self.sym): return [], None
        public = home(self.sym).__all__
        ours = [base for base in self.sym.__mro__[1:] if base.__module__ == self.sym.__module__]
        shown = next((base for base in ours if base.__name__ in public), None)
        there = shown.__mro__ if shown else ()
        return [self.sym, *(base for base in ours if base not in there)], shown and shown.__name__

    def methods(self):
        "Rows of the table of a class's methods and properties that have a docstring: its own, and those of bases that are no public name"
        bases, _ = self.bases()
        found = {}
        for kind in reversed(bases): found |= vars(kind)
        for name, member in found.items():
            fn = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if name[0] == "_" or not inspect.isfunction(fn) or not fn.__doc__: continue
            names = [] if isinstance(member, property) else [p for p in inspect.signature(fn).parameters if p not in OWN]
            yield [f"**{plain(name)}**" + ("" if isinstance(member, property) else f"({plain(', '.join(names))})"), plain(fn.__doc__)]

    def _repr_markdown_(self):
        rows, methods = self.parameters(), list(self.methods())
        source = f"[source]({get_config().git_url}/{self.nm}){{.source-link}}"  # docs.py knows the page, and so the file and the line
        parts = ["---", source, "#" * self.title_level + f" {self.nm}"]
        if self.sig is not None: parts.append(f"```python\n{call(self.nm, self.sig, types=not rows)}\n```")
        if self.docs and self.sym.__doc__: parts.append(plain(self.docs))
        if rows: parts.append(table(["parameter", "type", "meaning"], rows))
        if methods: parts.append(table(["method", "what it does"], methods))
        _, base = self.bases()
        if base: parts.append(f"It has the methods of `{base}`" + (" too." if methods else "."))
        return "\n\n".join(part for part in parts if part)
