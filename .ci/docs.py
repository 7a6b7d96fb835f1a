"Build the site into _docs, with Quarto where it is on the PATH and with smalldocs where it isn't."
import json
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import nbdev.quarto
import nbdev.showdoc
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from showdoc import Renderer

nbdev.showdoc.BasicMarkdownRenderer = Renderer  # here, and so in the processes that nbdev starts too
KATEX = "katex@0.16.11"  # laid into the site, so that equations can be read offline
CDN = re.compile(r'https://[^"\s]*/katex@[\d.]+/dist')


def rename(proc):
    "Name the pages as nbdev's links do: 00_objective.ipynb becomes objective.html."
    notebooks = list(proc.rglob("*.ipynb"))
    names = {p.name: _nbpath2html(p).with_suffix(".ipynb").name for p in notebooks}
    old = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    for path, place in [(p, r"(\]\((?:[\w.-]+/)*)") for p in notebooks] + [(proc/"sidebar.yml", r"((?:^|[\s/]))")]:
        text = path.read_text(encoding="utf-8")
        text = re.sub(r'"output-file: [^"]*",?', "", text)  # nbdev's way of saying the same, which only Quarto reads
        path.write_text(re.sub(f"{place}({old})", lambda m: m[1] + names[m[2]], text), encoding="utf-8")
    for p in notebooks: p.rename(p.with_name(names[p.name]))


def sort_sidebar(proc):
    "List the pages in the order of the table on the first page, which nbdev lists by name."
    cells = json.loads((proc/"index.ipynb").read_text(encoding="utf-8"))["cells"]
    table = "\n".join("".join(c["source"]) for c in cells).partition("\n## The notebooks")[2]
    rank = {name: n for n, name in enumerate(["index.ipynb", *re.findall(r"\]\(([\w/]+\.ipynb)\)", table)])}
    place = lambda line: rank.get(line.strip(" -"), len(rank))
    path, lines = proc/"sidebar.yml", []
    for items, group in groupby(path.read_text(encoding="utf-8").splitlines(), key=lambda line: line.endswith(".ipynb")):
        lines += sorted(group, key=place) if items else group
    path.write_text("\n".join(lines).replace("section: experiments", "section: Experiments").replace("section: machinery", "section: Machinery") + "\n", encoding="utf-8")


def leave_out_widgets(proc):
    "A slider needs a kernel: without one its output is a line of text, and the figure beside it says the same."
    for p in proc.rglob("*.ipynb"):
        nb = json.loads(p.read_text(encoding="utf-8"))
        for cell in nb["cells"]:
            if "outputs" in cell:
                cell["outputs"] = [out for out in cell["outputs"] if "application/vnd.jupyter.widget-view+json" not in out.get("data", {})]
        p.write_text(json.dumps(nb), encoding="utf-8")


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
.highlight :target {{ background: #ff08; }} a {{ color: inherit; }} .highlight .linenos {{ opacity: .5; padding-right: 1em; }}
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
        (site/picture).write_text(m[1], encoding="utf-8")
        place = "../" * name.count("/") + picture
        return f'<a href="{place}"><img src="{place}" alt="{alt}" width="{round(float(m[2]) / .72)}" class="img-fluid"></a>'

    return PICTURE.sub(show, html)


def search_offline(site):
    "Let the search read its index from a script, since a browser fetches no file from the disk; and load no fonts from elsewhere."
    js, index = site/"site_libs"/"smalldocs.js", site/"search.json"
    fetching = 'const r = await fetch(offset + "search.json");\n      index = await r.json();'
    loading = """await new Promise((done, failed) => document.head.append(
        Object.assign(document.createElement("script"), { src: offset + "search.js", onload: done, onerror: failed })));
      index = window.searchIndex;"""
    text = js.read_text(encoding="utf-8")
    if fetching not in text: sys.exit("smalldocs has another search than the one that is known here: see search_offline")
    js.write_text(text.replace(fetching, loading), encoding="utf-8")
    index.with_suffix(".js").write_text(f"window.searchIndex = {index.read_text(encoding='utf-8')};", encoding="utf-8")
    for css in site.rglob("*.css"):
        text = css.read_text(encoding="utf-8")
        css.write_text(re.sub(r"""@import\s*(?:url\()?["']?https://fonts\.[^"')]*["']?\)?;""", "", text), encoding="utf-8")


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
            page, anchor = m[1], m[2]
            while anchor and anchor not in ids.get(page, ()): anchor = anchor.rpartition(".")[0]  # a method without a heading: its class
            return f'href="{up}{page}{"#" + anchor if anchor else ""}"'

        def source(m):
            place = places.get((name, m[2].rpartition(".")[2]))
            return f'<a href="{up}{place}" class="source-link">source</a>' if place else ""

        html = re.sub(rf'<a [^>]*href="{re.escape(cfg.git_url)}(/([\w.]+)")?[^>]*>.*?</a>', lambda m: source(m) if m[2] else "", html)
        html = re.sub(r'(<div class="sidebar-title[^>]*><a href=")[./]*"', rf'\1{up}index.html"', html)  # a folder is no page on a disk
        html = re.sub(rf'href="{re.escape(docs)}([^"#]*)#?([^"]*)"', local, html)
        html = re.sub(r"(?s)<td.*?</td>", lambda m: re.sub(r"<code>[^<]*", lambda code: re.sub(r"([_.])(?=\w)", r"\1<wbr>", code[0]), m[0]), html)  # a phone breaks long names there
        html = write_pictures(site, name, html)
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
    sort_sidebar(proc)
    rename(proc)
    quarto = shutil.which("quarto")
    if not quarto: leave_out_widgets(proc)
    if not quarto and not find_spec("smalldocs"): sys.exit("the site needs Quarto or smalldocs, and smalldocs needs Python 3.11")
    command = [quarto, "render", "--no-cache", "-M", "html-math-method:katex"] if quarto else [sys.executable, "-m", "smalldocs.cli", "render"]
    if subprocess.run(command, cwd=proc).returncode: sys.exit("the site was not built: see the lines above")
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(proc/cfg.doc_path.name, cfg.doc_path)
    finish(cfg.doc_path, cfg)
    if not quarto: search_offline(cfg.doc_path)


if __name__ == "__main__":  # nbdev starts processes that import this file
    build()
