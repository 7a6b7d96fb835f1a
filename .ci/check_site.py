"Read every page of the built site: no dead link, no raw markup; in Chromium, no console message and all equations rendered."
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT/"_docs"
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
RAW = {"a cross-reference": r"@(thm|lem|cor|prp|def|eq|fig|tbl|sec)-", "a citation": r"\[-?@", "an attribute": r"\{[#.][a-z]",
       "a div": r":::", "a table": r"\|[-—:]+\|", "a directive": r"#\|", "display maths": r"\$\$|\\begin\{", "inline maths": r"(?<!\$)\$[^$\s][^$\n]*\$", "emphasis": r"\*\*",
       "a heading": r"^#+ ", "a link": r"\]\("}


class Page(HTMLParser):
    "The ids, the links and the prose (all text that is neither code nor maths) of a page."
    def __init__(self, html):
        super().__init__()
        self.ids, self.links, self.prose, self.open, self.maths = set(), [], [], [], 0
        self.placeholder = re.search(r".{0,40}example\.org", html)
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        classes = (attrs.get("class") or "").split()
        self.maths += "math" in classes
        self.ids |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        self.links += [attrs[key] for key in ("href", "src") if attrs.get(key)]
        if tag not in VOID: self.open.append((tag, tag in {"pre", "code", "script", "style", "title"} or "math" in classes))

    def handle_endtag(self, tag):
        while any(name == tag for name, _ in self.open) and self.open.pop()[0] != tag: pass

    def handle_data(self, text):
        if not any(verbatim for _, verbatim in self.open): self.prose.append(text)


def sources():
    "The faults of the notebooks' own text: markup that the site would render, but no notebook viewer and no code host."
    for path in sorted((ROOT/"nbs").rglob("*.ipynb")):
        for n, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] != "markdown": continue
            text = re.sub(r"(?s)```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$", "", "".join(cell["source"]))
            for what in ("a cross-reference", "a citation", "an attribute", "a div"):
                if re.search(RAW[what], text): yield f"{path.relative_to(ROOT)}: cell {n}: {what} is Quarto's alone"


def read(pages):
    "The faults that can be seen in the files of the site."
    for name, page in pages.items():
        prose = "\n".join(page.prose)
        for what, pattern in RAW.items():
            for m in re.finditer(pattern, prose, re.M):
                yield f"{name}: {what} is not rendered: …{prose[max(0, m.start() - 30):m.end() + 30]!r}…"
        if page.placeholder: yield f"{name}: an address that does not exist: {page.placeholder[0]}"
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc: continue
            path = SITE/name if not url.path else SITE/unquote(url.path[1:]) if url.path[0] == "/" else (SITE/name).parent/unquote(url.path)
            target = path.resolve().relative_to(SITE).as_posix() if path.exists() and path.resolve().is_relative_to(SITE) else None
            if target is None or url.path.startswith("/"): yield f"{name}: a dead link: {link}"
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids:
                yield f"{name}: a dead anchor: {link}"


def browse(chromium, name):
    "The page as Chromium shows it from the disk: its HTML, what its console said."
    with TemporaryDirectory() as profile:
        done = subprocess.run(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", "--enable-logging=stderr",
             "--virtual-time-budget=20000", "--dump-dom", (SITE/name).as_uri()],
            capture_output=True, text=True, timeout=180)
    return done.stdout, re.findall(r"CONSOLE:\d+\] (.*)", done.stderr)


def look(pages, chromium):
    "The faults that only a browser sees."
    total = 0
    with ThreadPoolExecutor(2) as pool:
        for name, (html, console) in zip(pages, pool.map(lambda name: browse(chromium, name), pages)):
            shown = html.count('class="katex"')
            # KaTeX shows a formula that it cannot read in red with its complaint, and a command that it doesn't know in the same red
            bad = re.findall(r'class="katex-error" title="([^"]*)"[^>]*>|style="color:\s*(?:#cc0000|rgb\(204, 0, 0\));?">([^<]+)', html)
            total += shown
            for line in console: yield f"{name}: the console says {line}"
            for words in bad: yield f"{name}: an equation is not rendered: {''.join(words)}"
            if shown + len(bad) < pages[name].maths: yield f"{name}: {shown} of {pages[name].maths} equations are rendered"
            if "</html>" not in html: yield f"{name}: Chromium did not show the page"
    if not total: yield "no page shows an equation"
    print(f"{total} equations rendered in Chromium")


if __name__ == "__main__":
    pages = {p.relative_to(SITE).as_posix(): Page(p.read_text(encoding="utf-8")) for p in sorted(SITE.rglob("*.html"))}
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    faults = [*sources(), *read(pages), *(look(pages, chromium) if chromium else ["Chromium is not here, so no page was opened"])]
    sys.exit("\n".join([*faults, f"{len(faults)} faults in {len(pages)} pages"]) if faults else print(f"{len(pages)} pages are sound"))
