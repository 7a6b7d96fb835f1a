"Build the site into _docs, with Quarto where it is on the PATH and with smalldocs where it isn't."
import json
import logging
import re
import shutil
import subprocess
import sys
import unicodedata
from html import escape, unescape
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import nbdev.quarto
import nbdev.showdoc
import yaml
from fontTools import subset
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from samsde.machinery.style import shrink
from showdoc import Renderer

nbdev.showdoc.BasicMarkdownRenderer = Renderer  # here, and so in the processes that nbdev starts too
HERE = Path(__file__).parent
KATEX = "katex@0.16.11"  # laid into the site, so that equations can be read offline
CDN = re.compile(r'https://[^"\s]*/katex@[\d.]+/dist')


def rename(proc):
    "Name the pages as nbdev's links do: 00_objective.ipynb becomes objective.html."
    notebooks = list(proc.rglob("*.ipynb"))
    names = {p.name: _nbpath2html(p).with_suffix(".ipynb").name for p in notebooks}
    old = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    for path, place in [(p, r"(\]\((?:[\w.-]+/)*)") for p in notebooks] + [(proc/"sidebar.yml", r"((?:^|[\s/]))")]:
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(f"{place}({old})", lambda m: m[1] + names[m[2]], text), encoding="utf-8")
    for p in notebooks: p.rename(p.with_name(names[p.name]))


def leaves(group):
    "The pages of a group of nbs/navigation.yml and of the groups in it, in order, and their names in the sidebar."
    for name, entry in group.items():
        if isinstance(entry, dict): yield from leaves(entry)
        else: yield name, entry


def navigation(cfg): return yaml.safe_load((cfg.nbs_path/"navigation.yml").read_text(encoding="utf-8"))


def write_sidebar(proc, cfg):
    "The groups of nbs/navigation.yml; and the version at the foot of every page."
    def contents(group):
        return [dict(section=name, contents=contents(entry)) if isinstance(entry, dict) else dict(text=entry, href=name) for name, entry in group.items()]
    foot = dict(left=f"samsde {cfg.version}", right="[Changes](/changelog.md)")
    website = dict(sidebar=dict(contents=["index.ipynb", *contents(navigation(cfg))])) | {"page-footer": foot}
    (proc/"sidebar.yml").write_text(yaml.safe_dump(dict(website=website), allow_unicode=True, sort_keys=False), encoding="utf-8")


def add_pages(proc, cfg):
    "CHANGELOG.md and CONTRIBUTING.md as pages of the site, and its icon."
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        text = (cfg.config_path/name).read_text(encoding="utf-8")
        text = re.sub(r"(\]\()nbs/", r"\1", text)
        (proc/name.lower()).write_text(text, encoding="utf-8")
    for p in proc.rglob("*.ipynb"):
        text = p.read_text(encoding="utf-8")
        new = re.sub(r"(\]\((?:\.\./)*)\.\./(CHANGELOG|CONTRIBUTING)\.md", lambda m: m[1] + m[2].lower() + ".md", text)
        if new != text: p.write_text(new, encoding="utf-8")
    shutil.copy(HERE/"site"/"favicon.svg", proc)


def each_cell(notebooks, change):
    "Let `change` edit the cells of notebooks, which it is given with the path."
    for p in notebooks:
        nb = json.loads(p.read_text(encoding="utf-8"))
        change(p, nb["cells"])
        p.write_text(json.dumps(nb), encoding="utf-8")


def show_claims(proc, cfg):
    "The line `> claim` of a notebook, which nbdev puts second to `- description`, is what its page says first."
    def change(path, cells):
        first = "".join(json.loads((cfg.nbs_path/path.relative_to(proc)).read_text(encoding="utf-8"))["cells"][0]["source"])
        head = yaml.safe_load("".join(cells[0]["source"]).strip().strip("-"))
        head.pop("output-file", None)  # nbdev's way of naming a page, which only Quarto reads: see rename
        head["description"] = re.search(r"^> (.*)", first, re.M)[1]
        cells[0]["source"] = "---\n" + yaml.safe_dump(head, allow_unicode=True) + "---\n"
    each_cell(proc.rglob("*.ipynb"), change)


CHECK = re.compile(r"(?:^|:)[ \t]*(?:assert\b|with\b[^\n]*\braises\(|(?:torch|np|pd)\.testing\.assert_)", re.M)


SHOWN = re.compile(r"^#\| *(?:export|exports|echo|include|code-fold)\b", re.M)


def fold_code(proc, cfg):
    """Cells that show nothing and assert something are folded. On pages that are read for what they show, which are neither the guides nor the
    reference, so is the code that draws a figure, that checks a result which it shows, or that sets up more than a few lines; what it shows is not. Exported source of more than a few lines is folded there, too."""
    guides = {Path(path).as_posix() for group in ("Use", "Reference") for path, _ in leaves(navigation(cfg)[group]) if "/" not in path} | {"index.ipynb"}

    def summary(cell, guide):
        text, shown = "".join(cell["source"]), cell["outputs"]
        if SHOWN.search(text) or (guide and (shown or not CHECK.search(text))): return None
        if any("image/svg+xml" in out.get("data", {}) or 'class="frames"' in "".join(out.get("data", {}).get("text/html", "")) for out in shown): return "drawn by"
        if CHECK.search(text): return "checked by"
        return "set up by" if not shown and text.count("\n") > 8 else None

    def change(path, cells):
        guide = path.relative_to(proc).as_posix() in guides
        for cell in cells:
            words = summary(cell, guide) if cell["cell_type"] == "code" else None
            source = "".join(cell["source"])
            if not guide and "code-fold: show" in source and source.count("\n") > 15: cell["source"] = source.replace("code-fold: show", "code-fold: true", 1)
            if words: cell["source"] = f'#| code-fold: true\n#| code-summary: "{words}"\n' + "".join(cell["source"])
    each_cell(proc.rglob("*.ipynb"), change)


def leave_out_widgets(proc):
    "A slider needs a kernel: without one its output is a line of text."
    def change(path, cells):
        for cell in cells:
            if "outputs" in cell:
                cell["outputs"] = [out for out in cell["outputs"] if "application/vnd.jupyter.widget-view+json" not in out.get("data", {})]
    each_cell(proc.rglob("*.ipynb"), change)


def modules(cfg):
    "The exported file of each page that has one."
    for p in cfg.nbs_path.rglob("*.ipynb"):
        name = re.search(r"#\| default_exp ([\w.]+)", p.read_text(encoding="utf-8"))
        if name: yield _nbpath2html(p.relative_to(cfg.nbs_path)).as_posix(), cfg.lib_path/f"{name[1].replace('.', '/')}.py"


SOURCE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<script>const chosen = localStorage.getItem("smalldocs-scheme");
if (chosen ? chosen === "alternate" : matchMedia("(prefers-color-scheme: dark)").matches) document.documentElement.className = "dark";</script>
<style>body {{ margin: 1rem; font: 16px/1.5 sans-serif; background: #fff; color: #222; }} .highlight {{ overflow-x: auto; font-size: .85em; }}
.highlight :target {{ background: #ff08; }} a {{ color: inherit; }} .highlight .linenos {{ opacity: .7; padding-right: 1em; }}
{light} html.dark body {{ background: #222; color: #eee; }} {dark}
.highlight span.linenos {{ background: none; color: inherit; }} .highlight a {{ text-decoration: none; }}</style></head>
<body><p><a href="{page}">{back}</a> / <b>{title}</b></p>{code}</body></html>
"""


def write_sources(site, cfg):
    "A page for each exported file, with numbered lines; the address of every function and class, by page and name."
    light, dark = (HtmlFormatter(style=style, lineanchors="L", anchorlinenos=True, linenos="inline") for style in ("default", "github-dark"))
    places = {}
    for page, path in modules(cfg):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(cfg.config_path).with_suffix(".html").as_posix()
        target = site/"source"/name
        target.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (name.count("/") + 1)
        styles = dict(light=light.get_style_defs(".highlight"), dark=dark.get_style_defs("html.dark .highlight"))
        html = SOURCE.format(title=name[:-5] + ".py", page=up + page, back=page[:-5], code=highlight(text, PythonLexer(), light), **styles)
        target.write_text(html, encoding="utf-8")
        for n, line in enumerate(text.splitlines(), 1):
            if m := re.match(r"\s*(?:def|class) (\w+)", line): places.setdefault((page, m[1]), f"source/{name}#L-{n}")
    return places


PICTURE = re.compile(r'(?s)(?:<\?xml[^>]*\?>\s*)?(?:<!DOCTYPE svg[^>]*>\s*)?(<svg [^>]*\bwidth="([\d.]+)pt".*?</svg>)')  # as matplotlib writes them


GROUP = re.compile(r"<g((?: [\w-]+=\"[^\"]*\")*)>((?:<(?:use|path) [^>]*/>){2,})</g>")


def lighter(svg):
    "The same picture in fewer bytes: what all parts of a group say, the group says for them; no group that says nothing, no comment, no zero at the end of a number."
    svg = re.sub(r"(?s)<!--.*?-->", "", shrink(svg))
    svg = re.sub(r'(?<= d=")[^"]*|(?<= [xy]=")[^"]*', lambda m: re.sub(r"(\.\d*?)0+(?!\d)", lambda n: n[1].rstrip("."), m[0]), svg)

    def share(m):
        head, parts = m[1] or "", m[2]
        for said in dict.fromkeys(re.findall(r' (?:style|clip-path)="[^"]*"', parts)):
            name = said.partition("=")[0]
            own = re.search('[";](?:opacity|stroke-line)', said)  # means another thing for a group; matplotlib's style sheet gives it to every part
            if own or name in head or parts.count(said) < parts.count("/>"): continue
            head, parts = head + said, parts.replace(said, "")
        return f"<g{head}>{parts}</g>"

    svg, more = re.sub(r'\s+(?=")', "", GROUP.sub(share, svg)), True
    while more: svg, more = re.subn(r"(?s)<g>((?:(?!</?g[ >]).)*)</g>", r"\1", svg)
    return svg


def write_pictures(site, name, html):
    "Pictures as files of their own, 100 pixels to an inch, with their caption as alternative text, and a link to see them alone."
    count = 0

    def show(m):
        nonlocal count
        count += 1
        caption = re.match(r"(?s)[^<]*(?:</p>\s*)?<figcaption[^>]*>(.*?)</figcaption>", html[m.end():])
        alt = escape(unescape(re.sub(r"<[^>]+>", "", caption[1])).strip()) if caption else ""
        picture = f"pictures/{name[:-5].replace('/', '_')}-{count}.svg"
        (site/picture).parent.mkdir(exist_ok=True)
        (site/picture).write_text(lighter(m[1]), encoding="utf-8")
        place = "../" * name.count("/") + picture
        later = ' loading="lazy"' if html[:m.start()].endswith("<figure hidden>") else ""  # a frame that a slider may ask for
        sides = re.search(r'\bheight="([\d.]+)pt"', m[1])[1], m[2]
        height, width = (round(float(side) / .72) for side in sides)  # kept free until the picture is there
        return f'<a href="{place}"><img src="{place}" alt="{alt}" width="{width}" height="{height}" class="img-fluid"{later}></a>'

    return PICTURE.sub(show, html)


GREEK = "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau phi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega"
SIGNS = {"nabla": "∇", "infty": "∞", "approx": "≈", "le": "≤", "ge": "≥", "to": "→", "sum": "Σ", "int": "∫", "cdot": "·", "times": "×", "sqrt": "√", "pm": "±", "partial": "∂",
         "lVert": "‖", "rVert": "‖", "varphi": "φ", "mid": "|", "lvert": "|", "rvert": "|", "dots": "…", "log": "log ", "ln": "ln ", "exp": "exp ", "top": "ᵀ", "in": "∈", "sim": "∼"}
SIGNS |= {name: unicodedata.lookup(f"GREEK {'CAPITAL' if name[0].isupper() else 'SMALL'} LETTER {name.upper().replace('LAMBDA', 'LAMDA')}") for name in GREEK.split()}


def plain_maths(text):
    "TeX as a line of text, for the results of a search"
    text = re.sub(r"\\(?:t?frac|dfrac)\s*(?:\{([^{}]*)\}|(\w))\s*(?:\{([^{}]*)\}|(\w))", lambda m: f"{m[1] or m[2]}/{m[3] or m[4]}", text)
    text = re.sub(r"\\tag\{([^{}]*)\}", r" (\1)", text)
    text = re.sub(r"\\([A-Za-z]+)(?: +(?![A-Za-z]{2}|[0-9(]))?", lambda m: SIGNS.get(m[1], ""), text)  # a word after a formula is apart from it
    return re.sub(r"\\.|[{}&]", "", text)


WEIGHTS = {"Use": 1.3, "Learn": 1.2, "Reference": .5, "Experiments": .7, "Machinery": .4}


def search_offline(site, cfg):
    """Let the search read its index from a script, since a browser fetches no file from the disk, and rank as .ci/site/search.js does:
    by whole words, pages of the first groups of the sidebar before others, and text before the tables of functions."""
    js, index = site/"site_libs"/"smalldocs.js", site/"search.json"
    text = js.read_text(encoding="utf-8")
    changes = {'const r = await fetch(offset + "search.json");\n      index = await r.json();': """await new Promise((done, failed) => document.head.append(
        Object.assign(document.createElement("script"), { src: offset + "search.js", onload: done, onerror: failed })));
      index = window.searchIndex;""", "const hits = fuse ?": "const hits = window.findSections ? window.findSections(index, q, limit) : fuse ?"}
    for old, new in changes.items():
        if old not in text: sys.exit("smalldocs has another search than the one that is known here: see search_offline")
        text = text.replace(old, new)
    js.write_text(text, encoding="utf-8")
    pages = {_nbpath2html(Path(path)).as_posix(): (top, name) for top, entries in navigation(cfg).items() for path, name in leaves(entries)}
    entries = []
    for e in json.loads(index.read_text(encoding="utf-8")):
        page = e["href"].partition("#")[0]
        group, name = pages.get(page, ("", ""))
        weight = WEIGHTS.get("Machinery" if page.startswith("machinery/") else group, 1)
        if e["text"].startswith(e["section"] + "("): weight *= .6  # a function and the table of its parameters
        entries.append(dict(href=e["href"], title=e["title"], name=name, section=plain_maths(e["section"]), text=" ".join(plain_maths(e["text"]).split()), weight=round(weight, 2)))
    ranking = (HERE/"site"/"search.js").read_text(encoding="utf-8")
    (site/"search.js").write_text(f"{ranking}window.searchIndex = {json.dumps(entries, ensure_ascii=False)};\n", encoding="utf-8")
    index.unlink()
    shutil.rmtree(site/"site_libs"/"fuse")


def keep_used(css, used):
    "The rules of a style sheet whose classes are all in use."
    licence = re.match(r"(?s)(@charset[^;]*;)?(/\*!.*?\*/\s*)*", css)[0]

    def rule(m):
        kept = [s for s in re.split(r",(?![^(]*\))", m[1]) if set(re.findall(r"\.(-?[A-Za-z_][\w-]*)", s)) <= used]
        return f"{','.join(kept)}{{{m[2]}}}" if kept else ""

    rules = re.sub(r"([^{}@;]+)\{([^{}]*)\}", rule, re.sub(r"(?s)/\*.*?\*/", "", css[len(licence):]))
    return licence + re.sub(r"@media[^{}]*\{\}", "", rules)


def lighten(site):
    "Ask for no font that is not there, and keep the rules and the icons that are used: on some page, or by a script."
    libs = site/"site_libs"
    used = {word for p in site.rglob("*.html") for names in re.findall(r'class="([^"]*)"', p.read_text(encoding="utf-8")) for word in names.split()}
    icons = libs/"bootstrap-icons"/"bootstrap-icons.min.css"
    text = keep_used(icons.read_text(encoding="utf-8"), used)
    icons.write_text(re.sub(r"src:[^;}]*", 'src:url("fonts/bootstrap-icons.woff") format("woff")', text), encoding="utf-8")
    for p in libs.rglob("*.js"): used |= set(re.findall(r"[\w-]+", p.read_text(encoding="utf-8")))
    for css in (*(libs/"themes").glob("*.css"), libs/"smalldocs.css"):
        text = keep_used(css.read_text(encoding="utf-8"), used)
        text = re.sub(r"""@import\s*(?:url\()?["']?https://fonts\.[^"')]*["']?\)?;""", "", text)
        css.write_text(re.sub(r"""(?:"Source Sans Pro"|"?\bLato\b"?)\s*,\s*""", "", text), encoding="utf-8")
    shown = {int(code, 16) for css in libs.rglob("*.css") for code in re.findall(r'content:\s*"\\(f[0-9a-f]{3})"', css.read_text(encoding="utf-8"))}
    keep_icons(icons.parent/"fonts"/"bootstrap-icons.woff", shown)
    (icons.parent/"fonts"/"bootstrap-icons.woff2").unlink()


def keep_icons(path, codes):
    "Leave these characters alone in a font."
    options = subset.Options(flavor="woff")
    logging.getLogger("fontTools").setLevel("ERROR")  # the font of the icons has two bytes too many
    font, subsetter = subset.load_font(path, options), subset.Subsetter(options)
    subsetter.populate(unicodes=codes)
    subsetter.subset(font)
    subset.save_font(font, path, options)


def fetch_katex():
    "The folder with KaTeX, once got through npm; None without npm or network."
    store = Path(sys.prefix)/"share"/KATEX
    if not store.exists():
        with TemporaryDirectory() as tmp:
            npm = shutil.which("npm")
            if not npm or subprocess.run([npm, "pack", "--silent", KATEX], cwd=tmp, stdout=subprocess.DEVNULL).returncode: return None
            shutil.unpack_archive(next(Path(tmp).glob("*.tgz")), tmp)
            dist = Path(tmp)/"package"/"dist"
            for pattern in ("katex.min.*", "contrib/auto-render.min.js", "fonts/*.woff2", "../LICENSE"):
                for source in dist.glob(pattern):
                    place = store/(source.name if ".." in pattern else source.relative_to(dist))
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(source, place)
    return store


BUTTON = re.compile(r'(?s)<a (class="sidebar-item-t[^"]*"[^>]*?) role="navigation"([^>]*)>(.*?)</a>')


def name_parts(html):
    "What a screen reader and a keyboard need: a link to the text, names of the parts of a page, buttons that are buttons, headings of tables."
    for old, new in {'<nav class="quarto-secondary-nav"': '<nav class="quarto-secondary-nav" aria-label="menu"', '<nav id="quarto-sidebar"': '<nav id="quarto-sidebar" aria-label="all pages"',
                     '<nav id="TOC"': '<nav id="TOC" aria-label="on this page"', '<nav class="page-navigation"': '<nav class="page-navigation" aria-label="the pages before and after"',
                     '<button title="Copy to Clipboard"': '<button type="button" aria-label="Copy" title="Copy to Clipboard"', "<!doctype html>": "<!DOCTYPE html>",
                     'name="viewport" content="width=device-width, initial-scale=1.0, user-scalable=yes"': 'name="viewport" content="width=device-width, initial-scale=1"'}.items():
        html = html.replace(old, new)
    html = re.sub(r"(<body[^>]*>)", r'\1<a class="skip-link" href="#quarto-document-content">Skip to the text</a>', html, count=1)
    html = html.replace('<main class="content"', '<main tabindex="-1" class="content"')
    html = BUTTON.sub(r'<button type="button" \1\2>\3</button>', html)
    html = re.sub(r'(?s)<a class="quarto-color-scheme-toggle([^"]*)" href="" title="[^"]*" onclick="[^"]*">(.*?)</a>',
                  r'<button type="button" class="quarto-color-scheme-toggle\1" aria-label="dark or light" title="dark or light" onclick="window.smalldocsToggleScheme()">\2</button>', html)
    html = re.sub(r'<script src="[^"]*fuse\.min\.js"></script>', "", html)
    def scoped(m): return re.sub(r"<th(?=[ >])(?![^>]*scope)", f'<th scope="{"col" if m[1] == "thead" else "row"}"', m[0])
    return re.sub(r"(?s)<(thead|tbody)>.*?</\1>", scoped, html)


STACKED = "parameter method name claim task framework symbol instrument argument setting how".split() + ["it holds that", "you want", "you have"]  # the first heads of tables of sentences
UNSAID = {"type", "meaning", "what it does", "what it is"}


def stack_tables(html):
    "Mark tables of sentences, whose cells a phone shows below each other, and write to the cells what they are."
    def row(m, heads):
        left = iter(heads)

        def cell(_):
            head = next(left, "")
            return "<td" if head in (heads[0], *UNSAID, "") else f'<td data-head="{head}{"" if head[-1] == "." else ":"}"'

        return re.sub(r"<td\b", cell, m[0])

    def table(m):
        heads = [unescape(re.sub(r"<[^>]+>", "", head)).strip() for head in re.findall(r"(?s)<th\b[^>]*>(.*?)</th>", m[0].partition("</thead>")[0])]
        if not heads or heads[0] not in STACKED: return m[0]
        rows = re.sub(r"(?s)<tr\b.*?</tr>", lambda found: row(found, heads), m[0])
        rows = re.sub(r"(?<=\d) (?=[±%])|(?<=±) (?=\d)", "\u00a0", rows)  # a number stays with its error and its unit
        rows = re.sub(r"(?<=[\w*]) (=|&lt;|&gt;|≤|≥) (?=\d)", "\u00a0\\1\u00a0", rows)  # and with its letter
        return re.sub(r"<table[^>]*>", f'<table class="caption-top table stacked {heads[0].split()[0]}s">', rows, count=1)

    return re.sub(r"(?s)<table\b.*?</table>", table, html)


def keep_signs(html):
    "A comma, a full stop or a bracket stays on the line of the formula beside it."
    return re.sub(r'([(“]*)(<span class="math inline">[^<]*</span>)([,.;:?!)”’]*)', lambda m: f'<span class="keep">{m[0]}</span>' if m[1] or m[3] else m[0], html)


UNFOLD = """<button type="button" class="unfold" aria-pressed="false" onclick="const open = this.getAttribute('aria-pressed') === 'false';
this.setAttribute('aria-pressed', open); this.textContent = open ? 'Fold the code' : 'Show all code';
document.querySelectorAll('main details.code-fold').forEach((e) => { e.open = open; })">Show all code</button>"""


def tidy_tables(html):
    "pandas writes a style sheet and attributes of old into each table: nbs/styles.css has what they say."
    html = re.sub(r"(?s)<style scoped>.*?</style>\s*", "", html)
    return re.sub(r'<(table|t[rhd])\b[^>]*>', lambda m: re.sub(r' (?:border|valign|halign)="[^"]*"', "", m[0]), html)


def add_unfold(html):
    "A page that folds its code has a button that shows all of it."
    return html.replace("</header><!--", f"{UNFOLD}</header><!--", 1) if html.count('<details class="code-fold">') > 2 else html


def finish(site, cfg):
    "Make the pages stand alone: relative links between them, no link to an address that doesn't exist, KaTeX beside them."
    docs = f"{cfg.doc_host}{cfg.doc_baseurl}/"
    pages = {p.relative_to(site).as_posix(): p.read_text(encoding="utf-8") for p in site.rglob("*.html")}
    ids = {name: set(re.findall(r'\bid="([^"]+)"', html)) for name, html in pages.items()}
    katex = fetch_katex() if any(map(CDN.search, pages.values())) else None
    if katex: shutil.copytree(katex, site/"site_libs"/"katex", dirs_exist_ok=True)
    places = write_sources(site, cfg)
    for name, html in pages.items():
        up = "../"*name.count("/")

        def local(m):
            page, anchor, text = m[1], m[2], m[3]
            while anchor and anchor not in ids.get(page, set()) | ids[name]: anchor = anchor.rpartition(".")[0]  # a method without a heading: its class
            if anchor in ids[name]: return f'<a href="#{anchor}">{text}</a>'
            folder, here = page.rpartition("/")[0], name.rpartition("/")[0]
            others = [other for other in ids if other != page and other.rpartition("/")[0] == folder and anchor in ids[other]]
            meant = not folder or (folder == here and not others)  # else a word that happens to be a helper's name
            return f'<a href="{up}{page}#{anchor}">{text}</a>' if anchor and meant else text

        def source(m):
            place = places.get((name, m[2].rpartition(".")[2]))
            return f'<a href="{up}{place}" class="source-link">source</a>' if place else ""

        html = re.sub(rf'<a [^>]*href="{re.escape(cfg.git_url)}(/([\w.]+)")?[^>]*>.*?</a>', lambda m: source(m) if m[2] else "", html)
        html = re.sub(r'(<div class="sidebar-title[^>]*><a href=")[./]*"', rf'\1{up}index.html"', html)  # a folder is no page on a disk
        html = re.sub(rf'(?s)<a href="{re.escape(docs)}([^"#]*)#?([^"]*)"[^>]*>(.*?)</a>', local, html)
        html = re.sub(r"(?s)<td.*?</td>", lambda m: re.sub(r"<code>[^<]*", lambda code: re.sub(r"(_|(?<!\d)\.)(?=\w)", r"\1<wbr>", code[0]), m[0]), html)  # a phone breaks long names there
        html = write_pictures(site, name, keep_signs(stack_tables(add_unfold(tidy_tables(name_parts(html))))))
        if katex: html = CDN.sub(f"{up}site_libs/katex", html)
        (site/name).write_text(html, encoding="utf-8")
    if not katex: print("without npm, the pages load KaTeX from its usual address")


def build():
    nbdev.quarto._ensure_quarto = lambda: None  # else nbdev would install it
    cfg = get_config()
    shutil.rmtree(cfg.config_path/"_proc", ignore_errors=True)
    try: proc, cfg, _ = nbdev.quarto._pre_docs()
    except Exception as fault:
        sys.exit(f"{fault}\n\nThe cell above is executed for the site because it imports: give the imports a cell of their own.")
    show_claims(proc, cfg)
    fold_code(proc, cfg)
    add_pages(proc, cfg)
    write_sidebar(proc, cfg)
    rename(proc)
    quarto = shutil.which("quarto")
    if not quarto: leave_out_widgets(proc)
    if not quarto and not find_spec("smalldocs"): sys.exit("the site needs Quarto or smalldocs, and smalldocs needs Python 3.11")
    command = [quarto, "render", "--no-cache", "-M", "html-math-method:katex"] if quarto else [sys.executable, "-m", "smalldocs.cli", "render"]
    if subprocess.run(command, cwd=proc).returncode: sys.exit("the site was not built: see the lines above")
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(proc/cfg.doc_path.name, cfg.doc_path)
    finish(cfg.doc_path, cfg)
    if not quarto:
        search_offline(cfg.doc_path, cfg)
        lighten(cfg.doc_path)


if __name__ == "__main__":  # nbdev starts processes that import this file
    build()
