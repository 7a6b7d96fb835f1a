"Build the site into _docs, with Quarto where it is on the PATH and with smalldocs where it isn't."
import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import nbdev.quarto
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html

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
        text = re.sub(r'"def ([A-Z])', r'"class \1', text)  # show_doc's heading of a class
        path.write_text(re.sub(f"{place}({old})", lambda m: m[1] + names[m[2]], text), encoding="utf-8")
    for p in notebooks: p.rename(p.with_name(names[p.name]))


def picture_widths(proc):
    "The width at which each picture is to be shown: a notebook stores it at twice that, for sharp screens."
    for p in proc.rglob("*.ipynb"):
        for cell in json.loads(p.read_text(encoding="utf-8"))["cells"]:
            for out in cell.get("outputs", []):
                if width := out.get("metadata", {}).get("image/png", {}).get("width"):
                    yield "".join(out["data"]["image/png"]).strip(), int(width)


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


def finish(site, widths, cfg):
    "Make the pages stand alone: relative links between them, no link to an address that doesn't exist, KaTeX beside them."
    docs = f"{cfg.doc_host}{cfg.doc_baseurl}/"
    pages = {p.relative_to(site).as_posix(): p.read_text(encoding="utf-8") for p in site.rglob("*.html")}
    ids = {name: set(re.findall(r'\bid="([^"]+)"', html)) for name, html in pages.items()}
    katex = fetch_katex() if any(map(CDN.search, pages.values())) else None
    if katex: shutil.copytree(katex, site/"site_libs"/"katex", dirs_exist_ok=True)
    for name, html in pages.items():
        up = "../"*name.count("/")

        def local(m):
            page, anchor = m[1], m[2]
            while anchor and anchor not in ids.get(page, ()): anchor = anchor.rpartition(".")[0]  # a method without a heading: its class
            return f'href="{up}{page}{"#" + anchor if anchor else ""}"'

        html = re.sub(rf'<a [^>]*href="{re.escape(cfg.git_url)}[^>]*>.*?</a>', "", html)
        html = re.sub(rf'href="{re.escape(docs)}([^"#]*)#?([^"]*)"', local, html)
        for data, width in widths: html = html.replace(f'base64,{data}"', f'base64,{data}" width="{width}"')
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
    rename(proc)
    quarto = shutil.which("quarto")
    if not quarto and not find_spec("smalldocs"): sys.exit("the site needs Quarto or smalldocs, and smalldocs needs Python 3.11")
    command = [quarto, "render", "--no-cache", "-M", "html-math-method:katex"] if quarto else [sys.executable, "-m", "smalldocs.cli", "render"]
    if subprocess.run(command, cwd=proc).returncode: sys.exit("the site was not built: see the lines above")
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(proc/cfg.doc_path.name, cfg.doc_path)
    finish(cfg.doc_path, [] if quarto else list(picture_widths(proc)), cfg)


if __name__ == "__main__":  # nbdev starts processes that import this file
    build()
