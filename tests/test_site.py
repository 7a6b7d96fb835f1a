"""The built site, as files and in Chromium: markup, links, equations, search, themes, a phone's width, a keyboard, paper. Each check finds a broken page."""

import ast
import builtins
import json
import os
import re
import select
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urlsplit

import pytest

import samsde

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_docs"
VOID = {
    "area",
    "base",
    "br",
    "col",
    "embed",
    "hr",
    "img",
    "input",
    "link",
    "meta",
    "source",
    "track",
    "wbr",
}
RAW = {
    "a cross-reference": r"@(thm|lem|cor|prp|def|eq|fig|tbl|sec)-",
    "a citation": r"\[-?@",
    "an attribute": r"\{[#.][a-z]",
    "a div": r":::",
    "a table": r"\|[-—:]+\|",
    "a directive": r"#\|",
    "display maths": r"\$\$|\\begin\{",
    "inline maths": r"(?<!\$)\$[^$\s][^$\n]*\$",
    "emphasis": r"\*\*",
    "a heading": r"^#+ ",
    "a link": r"\]\(",
}


# --- read as files ---


class Page(HTMLParser):
    "The ids, the links, the pictures and the prose (all text that is neither code nor maths) of a page."

    def __init__(self, html):
        super().__init__()
        self.html, self.ids, self.links, self.alts, self.prose, self.open = (
            html,
            set(),
            [],
            [],
            [],
            [],
        )
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        self.links += [attrs[key] for key in ("href", "src") if attrs.get(key)]
        if tag == "img":
            self.alts.append((attrs.get("src", "")[:80], attrs.get("alt", "")))
        verbatim = (
            tag in {"pre", "code", "script", "style", "title"}
            or "math" in (attrs.get("class") or "").split()
        )
        if tag not in VOID:
            self.open.append((tag, verbatim))

    def handle_endtag(self, tag):
        while any(name == tag for name, _ in self.open) and self.open.pop()[0] != tag:
            pass

    def handle_data(self, text):
        if not any(verbatim for _, verbatim in self.open):
            self.prose.append(text)


def markup(page, pages):
    prose = "\n".join(page.prose)
    for what, pattern in RAW.items():
        for m in re.finditer(pattern, prose, re.M):
            yield f"{what} is not rendered: …{prose[max(0, m.start() - 30) : m.end() + 30]!r}…"


def widgets(page, pages):
    yield from re.findall(
        r"(?:interactive|[HV]Box|\w+Slider)\(children=.{0,40}|\w+Slider\(value=.{0,40}", page.html
    )


def links(page, pages):
    "Dead links and anchors, and addresses that do not exist."
    yield from re.findall(r".{0,40}example\.org", page.html)
    for link in page.links:
        url = urlsplit(link)
        if url.scheme or url.netloc:
            continue
        path = SITE / page.name if not url.path else (SITE / page.name).parent / unquote(url.path)
        inside = path.resolve().is_file() and path.resolve().is_relative_to(
            SITE
        )  # a folder is no page on a disk
        target = pages.get(path.resolve().relative_to(SITE).as_posix()) if inside else None
        if not inside or url.path.startswith("/"):
            yield f"a dead link: {link}"
        elif url.fragment and target and unquote(url.fragment) not in target.ids:
            yield f"a dead anchor: {link}"


def sources(page, pages):
    "Links from a function's or a class's heading to a line that is not where it is defined."
    for link, rest in re.findall(
        r'href="([^"]*source/[^"]*)" class="source-link">source</a>(.{0,400})', page.html, re.S
    ):
        name = re.search(r"<h\d[^>]*>(?:\w+\.)?(\w+)", rest)[1]
        path, _, line = link.rpartition("#L-")
        code = re.sub(
            r"<[^>]+>", "", pages[os.path.normpath((Path(page.name).parent / path).as_posix())].html
        ).splitlines()
        if not any(re.match(rf"\s*{line}\s*(def|class) {name}\b", text) for text in code):
            yield f"{name} is not at {link}"


def words(page, pages):
    "Words in code that lead to a page and to nothing on it: helpers that happen to have that name."
    yield from re.findall(r'<a href="[^"#]*\.html"><code>\w+</code></a>', page.html)


def alternatives(page, pages):
    "Pictures without alternative text."
    yield from (
        f"no alternative text, for want of `#| fig-cap`: {source}"
        for source, alt in page.alts
        if not alt.strip()
    )


def vectors(page, pages):
    "Figures that are not vector images, or that a notebook's page holds in itself."
    outputs = "".join(
        re.findall(r'(?s)<div class="cell-output cell-output-display">.*?</div>', page.html)
    )
    yield from (
        f"no vector image: {figure[:80]}"
        for figure in re.findall(r"<img[^>]*>|<svg", outputs)
        if not re.search(r'src="[^":]*\.svg"', figure)
    )


def junk(page, pages):
    "Progress bars, warnings and addresses in memory among the outputs."
    outputs = "".join(re.findall(r'(?s)<div class="cell-output.*?</div>', page.html))
    yield from re.findall(r".*(?:\d%\||it/s|s/it|\d s left|Warning\b| object at 0x).*", outputs)


def validity(page, pages):
    "What an HTML validator finds: styles in the text, attributes of old, an id twice, a level of headings left out."
    body = page.html.partition("</head>")[2]
    if page.name.startswith("source/"):
        return
    yield from re.findall(r"<style.{0,60}", body)
    yield from re.findall(r"<t(?:able|r|h|d)\b[^>]*\b(?:border|valign|align|bgcolor)=[^>]*>", body)
    names = re.findall(r'<[^>]*\sid="([^"]+)"', re.sub(r"(?s)<script.*?</script>", "", body))
    yield from (f"an id twice: {name}" for name in {*names} if names.count(name) > 1)
    levels = [*map(int, re.findall(r"<h([1-6])\b", body.partition("<main")[2]))]
    yield from (f"h{low} after h{high}" for high, low in zip(levels, levels[1:]) if low > high + 1)


FILES = {
    check.__name__: check
    for check in (markup, widgets, links, sources, words, alternatives, vectors, junk, validity)
}


# --- seen in a browser ---


class Browser:
    "A tab of headless Chromium, driven by the DevTools protocol over a pipe."

    def __init__(self, command, profile):
        orders, self.orders = os.pipe()
        self.answers, answers = os.pipe()
        self.process = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec "$@" 3<&{orders} 4>&{answers}',
                "bash",
                command,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--hide-scrollbars",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={profile}",
                "--remote-debugging-pipe",
            ],
            pass_fds=(orders, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(orders), os.close(answers)
        self.buffer, self.count, self.events, self.session = b"", 0, [], None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def receive(self):
        while b"\0" not in self.buffer:
            if not select.select([self.answers], [], [], 60)[0]:
                raise TimeoutError("Chromium has said nothing for a minute")
            self.buffer += os.read(self.answers, 2**20) or pytest.fail("Chromium has stopped")
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def __call__(self, method, **params):
        self.count += 1
        order = {"id": self.count, "method": method, "params": params} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.orders, json.dumps(order).encode() + b"\0")
        while (message := self.receive()).get("id") != self.count:
            self.events.append(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def js(self, expression):
        done = self(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"])
        return done["result"].get("value")

    def resize(self, width):
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )

    def prefer(self, dark, media=""):
        "Ask for dark pages or light ones, on a screen or on paper."
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def press(self, key, code):
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def open(self, path, width=1400, dark=False, media=""):
        "The messages of the console, and the addresses elsewhere that the page wanted."
        self.resize(width)
        self.prefer(dark, media)
        self.events = []
        self("Page.navigate", url=path.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self.receive())
        self.js("document.fonts.ready.then(() => new Promise(requestAnimationFrame)).then(() => 0)")
        of = lambda method: [e["params"] for e in self.events if e.get("method") == method]
        said = [
            *of("Runtime.exceptionThrown"),
            *of("Runtime.consoleAPICalled"),
            *(p["entry"]["text"] for p in of("Log.entryAdded")),
        ]
        wanted = [p["request"]["url"] for p in of("Network.requestWillBeSent")]
        return [str(s)[:300] for s in said], [url for url in wanted if url.startswith("http")]

    def close(self):
        try:
            self("Browser.close")
        finally:
            self.process.wait(20)


# a sign at the beginning of a line that belongs to the formula at the end of the line before
PARTED = r"""
  const parted = all("main .katex").map((e) => {
    const text = document.createTreeWalker(e.closest("p, li, td, blockquote") || e.parentElement, NodeFilter.SHOW_TEXT);
    while (text.nextNode() && (e.contains(text.currentNode) || !(e.compareDocumentPosition(text.currentNode) & 4)));
    if (e.contains(text.currentNode) || !/^[,.;:?!)”’]/.test(text.currentNode.data)) return "";
    const sign = document.createRange(), formula = e.querySelector(".base:last-of-type");
    sign.setStart(text.currentNode, 0), sign.setEnd(text.currentNode, 1);
    return formula && sign.getBoundingClientRect().right <= formula.getBoundingClientRect().left ? e.closest("p, li, td, blockquote").textContent.slice(0, 60) : "";
  }).filter((e) => e);
"""


LOOK = r"""(() => {
  const all = (selector) => [...document.querySelectorAll(selector)], width = innerWidth;
  const scrolls = (e) => /auto|scroll/.test(getComputedStyle(e).overflowX); // what is clipped is lost
  const boxed = (e) => e && e !== document.body && (scrolls(e) || boxed(e.parentElement));
  const red = (e) => /(#cc0000|rgb\(204, 0, 0\))/.test(e.getAttribute("style")); // what KaTeX does not know
  const named = (e) => (e.getAttribute("aria-label") || e.textContent || "").trim();
  @PARTED
  return {
    parted,
    empty: all("main section").filter((e) => e.textContent.trim() === (e.querySelector("h2, h3, h4") || e).textContent.trim()).map((e) => e.textContent.trim().slice(0, 60)),
    nameless: [...all("nav").filter((e) => !e.getAttribute("aria-label")), ...all("button, a[href], input").filter((e) => !named(e) && !e.querySelector("img[alt], i"))].map((e) => e.outerHTML.slice(0, 120))
      .concat(all("button").filter((e) => !named(e)).map((e) => e.outerHTML.slice(0, 120)), all("th").filter((e) => !e.scope && e.textContent.trim()).map((e) => "no scope: " + e.textContent)),
    cut: all("main .katex-display").filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent.slice(0, 60)), // by a phone's edge
    maths: all(".math").length, shown: all(".katex").length,
    bad: [...all(".katex-error"), ...all(".katex [style]").filter(red)].map((e) => e.title || e.textContent),
    broken: all("img").filter((e) => !e.naturalWidth && !e.closest("[hidden]")).map((e) => e.getAttribute("src").slice(0, 80)),
    small: all("main img").filter((e) => e.getBoundingClientRect().width < .57 * e.naturalWidth).map((e) => e.getAttribute("src").slice(0, 80)), // 10 points in the figure are then under 8 pixels
    cramped: all("main td").filter((e) => e.textContent.length > 40 && e.clientWidth < width / 2 && e.clientHeight > 1.5 * e.clientWidth).map((e) => e.textContent.slice(0, 50)),
    page: document.scrollingElement.scrollWidth,
    wide: all("main *, body > *").filter((e) => (e.getBoundingClientRect().right > width + 1 && e.getBoundingClientRect().width > 1) || (/^H[1-4]$/.test(e.tagName) && e.scrollWidth > e.clientWidth + 1))
      .filter((e) => !e.closest(".katex-mathml, .katex svg") && !boxed(e.parentElement))
      .map((e) => e.tagName + " " + (e.textContent || e.getAttribute("class") || "").slice(0, 50)),
  };
})()""".replace("@PARTED", PARTED)


# on a wide screen: code, tables and equations that are wider than their column, and parts of an equation that do not stand on one line
WIDE = r"""(() => {
  const all = (selector) => [...document.querySelectorAll(selector)], cut = (e) => e.scrollWidth > e.clientWidth + 1;
  all("details").forEach((e) => { e.open = true; });
  const baseline = (base) => {
    const mark = document.createElement("span");
    mark.style = "display: inline-block; width: 0; height: 0";
    base.append(mark);
    const y = mark.getBoundingClientRect().bottom;
    mark.remove();
    return y;
  };
  const uneven = (e) => { const ys = [...e.querySelectorAll(":scope > .base")].map(baseline); return Math.max(...ys) - Math.min(...ys) > 1; };
  const pen = document.createElement("canvas").getContext("2d");
  const long = (e) => {
    const { paddingLeft, paddingRight } = getComputedStyle(e.parentElement);
    pen.font = getComputedStyle(e).font;
    const width = e.parentElement.clientWidth - parseFloat(paddingLeft) - parseFloat(paddingRight);
    return e.textContent.split("\n").filter((line) => pen.measureText(line).width > width + 1);
  };
  const right = document.querySelector("main").getBoundingClientRect().right;
  @PARTED
  return {
    apart: parted,
    long: all("main pre.cell-code > code").flatMap(long).map((line) => line.trim().slice(0, 60)),
    broad: all("main table").filter((e) => e.getBoundingClientRect().right > right + 1).map((e) => e.textContent.trim().replace(/\s+/g, " ").slice(0, 60)),
    askew: all(".quarto-figure-center img").filter((e) => {
      const own = e.getBoundingClientRect(), column = e.closest(".quarto-figure").getBoundingClientRect();
      return Math.abs(own.left + own.right - column.left - column.right) > 4;
    }).map((e) => e.alt.slice(0, 60)),
    code: all("main pre").filter(cut).map((e) => e.textContent.slice(0, 60)),
    formulas: all(".katex-display").filter(cut).map((e) => "cut: " + e.textContent.slice(0, 60))
      .concat(all(".katex-display > .katex > .katex-html").filter(uneven).map((e) => "uneven: " + e.textContent.slice(0, 60))),
  };
})()""".replace("@PARTED", PARTED)


# text, also of what is folded, whose contrast with its ground is below 4.5, with the colours of both
FAINT = r"""((dark) => {
  const rgba = (text) => { const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = (top, low) => [0, 1, 2].map((i) => top[i] * top[3] + low[i] * (1 - top[3])).concat(1);
  const light = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = (c) => 0.2126 * light(c[0]) + 0.7152 * light(c[1]) + 0.0722 * light(c[2]);
  const line = (e) => (e ? [e, ...line(e.parentElement)] : []);
  const ground = (parents) => parents.map((e) => rgba(getComputedStyle(e).backgroundColor)).reduceRight((low, top) => over(top, low), [255, 255, 255, 1]);
  document.querySelectorAll("details").forEach((e) => { e.open = true; });
  if ((luminance(ground([document.body])) < 0.2) !== dark) return [dark ? "the page is not dark" : "the page is not light"];
  const found = new Map(), text = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (text.nextNode()) {
    const e = text.currentNode.parentElement, said = text.currentNode.data.trim();
    if (!said || e.closest("script, style, .katex-mathml") || !e.getClientRects().length) continue;
    const parents = line(e), opacity = parents.reduce((o, p) => o * getComputedStyle(p).opacity, 1), low = ground(parents), own = rgba(getComputedStyle(e).color);
    const [a, b] = [over([...own.slice(0, 3), own[3] * opacity], low), low].map(luminance).sort().reverse();
    const contrast = (a + 0.05) / (b + 0.05), what = `${getComputedStyle(e).color} on ${low.slice(0, 3).map(Math.round)} in ${dark ? "dark" : "light"}`;
    if (contrast < 4.5 && !found.has(what)) found.set(what, `${what}, ${contrast.toFixed(1)}: ${said.slice(0, 40)}`);
  }
  return [...found.values()];
})"""


def faint(browser, path, dark):
    "Text of the open page that can hardly be read, by day or at night. A source's page, which asks at loading alone, is told; others follow in 50 ms."
    browser.prefer(dark)
    wanted = str(dark).lower()
    if path.is_relative_to(SITE / "source"):
        browser.js(f"document.documentElement.classList.toggle('dark', {wanted})")
    else:
        browser.js(
            f"""new Promise((done) => {{
              const seen = () => document.documentElement.classList.contains("quarto-dark") === {wanted};
              const wait = (n) => (n && !seen() ? setTimeout(wait, 10, n - 1) : done(0));
              wait(200);
            }})"""
        )
    return browser.js(f"{FAINT}({wanted})")


def look(browser, path):
    "The faults of a page on a phone's screen and on a wide one, by kind."
    console, elsewhere = browser.open(path, width=400)
    found = browser.js(LOOK)
    contrast = [fault for dark in (True, False) for fault in faint(browser, path, dark)]
    browser.resize(1400)
    found |= (
        browser.js(WIDE)
        if not path.is_relative_to(SITE / "source")
        else {"code": [], "formulas": [], "long": [], "broad": [], "apart": [], "askew": []}
    )
    few = found["shown"] + len(found["bad"]) < found["maths"]
    return {
        "console": console,
        "elsewhere": elsewhere,
        "pictures": found["broken"],
        "figures": found["askew"],
        "phone": found["cut"],
        "letters": found["small"],
        "tables": found["cramped"],
        "columns": found["broad"],
        "lines": found["long"],
        "signs": found["parted"] + found["apart"],
        "sections": found["empty"],
        "names": found["nameless"],
        "contrast": contrast,
        "code": found["code"],
        "formulas": found["formulas"],
        "equations": found["bad"] + [f"{found['shown']} of {found['maths']} are rendered"] * few,
        "overflow": found["wide"]
        + [f"the page is {found['page']} pixels wide"] * (found["page"] > 400),
    }, found["shown"]


KINDS = (
    "console",
    "elsewhere",
    "pictures",
    "figures",
    "phone",
    "letters",
    "tables",
    "columns",
    "lines",
    "signs",
    "sections",
    "equations",
    "overflow",
    "names",
    "contrast",
    "code",
    "formulas",
)


# --- what is there to look at ---


def absent(request, why):
    (pytest.fail if request.config.getoption("--site") else pytest.skip)(why)


@pytest.fixture(scope="session")
def pages(request):
    "Name -> Page, if the site is built and not older than what it is made from."
    if not (SITE / "index.html").exists():
        absent(request, "the site is not built: make docs")
    made = (SITE / "index.html").stat().st_mtime
    for path in [
        *(ROOT / "nbs").rglob("*.ipynb"),
        ROOT / "nbs" / "styles.css",
        ROOT / "nbs" / "navigation.yml",
        *(ROOT / ".ci").rglob("*.*"),
        *ROOT.glob("*.md"),
    ]:
        if path.parent.name == "__pycache__":
            continue
        if path.stat().st_mtime > made:
            absent(request, f"the site is older than {path.relative_to(ROOT)}: make docs")
    pages = {
        p.relative_to(SITE).as_posix(): Page(p.read_text(encoding="utf-8"))
        for p in sorted(SITE.rglob("*.html"))
    }
    for name, page in pages.items():
        page.name = name
    return pages


@pytest.fixture(scope="session")
def browser(request, pages):
    command = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if not command:
        absent(request, "Chromium is not here")
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(command, profile)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def looks(browser, pages):
    return {name: look(browser, SITE / name) for name in pages}


@pytest.fixture
def smalldocs(pages):
    if not (SITE / "site_libs" / "smalldocs.js").exists():
        pytest.skip("the site was built by Quarto, which has a search and themes of its own")


# --- the tests ---


def test_text_of_notebooks():
    "No markup that the site would render, but no notebook viewer and no code host."
    found = []
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        for n, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] != "markdown":
                continue
            text = re.sub(
                r"(?s)```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$", "", "".join(cell["source"])
            )
            found += [
                f"{path.relative_to(ROOT)}: cell {n}: {what} is Quarto's alone"
                for what in ("a cross-reference", "a citation", "an attribute", "a div")
                if re.search(RAW[what], text)
            ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("check", FILES)
def test_files(check, pages):
    found = [
        f"{name}: {fault}" for name, page in pages.items() for fault in FILES[check](page, pages)
    ]
    assert not found, "\n".join(found)


def number(name):
    return re.sub(r"^\d+[a-z]?_", "", name)


def page_of(path):
    return (
        (path.relative_to(ROOT / "nbs").parent / number(path.stem)).with_suffix(".html").as_posix()
    )


def notebooks():
    return [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if p.parent.name[0] != "."]


def test_every_notebook_has_a_page(pages):
    assert set(map(page_of, notebooks())) | {"changelog.html", "contributing.html"} <= pages.keys()


def test_pages_say_their_claim_first(pages):
    for path in notebooks():
        claim = re.search(
            r"^> (.*)",
            "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]),
            re.M,
        )[1]
        shown = unescape(
            re.sub(
                r"<[^>]+>",
                "",
                re.search(r'(?s)<div class="description">(.*?)</div>', pages[page_of(path)].html)[
                    1
                ],
            )
        )
        plain = lambda text: re.sub(r"[`'’\s]", "", text)
        assert plain(shown) == plain(claim), path


def test_sidebar_is_the_navigation(pages):
    "Four groups, in the order of the file, machinery last."
    order = re.findall(r'<a href="([^"]+)" class="sidebar-item-text', pages["index.html"].html)
    assert (
        order[:3] == ["index.html", "how_to.html", "optim.html"]
        and order[-1] == "machinery/style.html"
        and "experiments/bench.html" in order
    ), order
    assert (
        order.index("implicit_regularizer.html")
        < order.index("hessian_noise.html")
        < order.index("weak_approximation.html")
        < order.index("saddle_attraction.html")
    )
    groups = re.findall(
        r'<button[^>]*sidebar-link[^>]*><span class="menu-text">([^<]+)', pages["index.html"].html
    )
    assert [g for g in groups if g in ("Use", "Learn", "Experiments", "Reference")] == [
        "Use",
        "Learn",
        "Experiments",
        "Reference",
    ]


def test_checks_are_folded(pages):
    "Cells that assert something; what an example shows is open."
    html = pages["weak_errors.html"].html
    folded = re.findall(
        r"(?s)<details class=\"code-fold\">\s*<summary>checked by</summary>(.*?)</details>", html
    )
    assert len(folded) > 5 and all(
        "assert" in re.sub(r"<[^>]+>", "", code) or "raises" in code for code in folded
    )
    outside = re.sub(r"(?s)<details.*?</details>", "", html)
    cells = re.findall(r'(?s)<div class="cell">(.*?)(?=<div class="cell">|</main>)', outside)
    assert (
        sum(
            "cell-output" not in c and re.search(r"(?m)^<span[^>]*>assert", c) is not None
            for c in cells
        )
        == 0
    )


def test_code_is_folded_where_the_result_is_read(pages):
    "A theorem's page shows its figures and folds what draws them; a guide's code is open."
    folded = r'(?s)<details class="code-fold">\s*<summary>drawn by</summary>.*?</details>(.*?)(?=<details|<section|</main>)'
    drawn = re.findall(folded, pages["saddle_attraction.html"].html)
    assert len(drawn) > 5 and all("<img" in shown for shown in drawn)
    before = pages["saddle_attraction.html"].html.partition('<div class="frames">')[0]
    assert (
        "drawn by"
        in re.search(
            r"(?s)<summary>([^<]*)(?:(?!<summary>).)*</details>\s*(?:<div[^>]*>\s*)*$", before
        )[1]
    )
    assert (
        "drawn by" in pages["experiments/bench.html"].html
    )  # among the pages to look things up in
    assert not re.findall(folded, pages["diagnosis.html"].html)


def unbound(code):
    "Names that the code uses and nowhere defines."
    used, bound = set(), set(dir(builtins))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)):
            bound.add(node.name)
    return used - bound


@pytest.mark.parametrize("name, control", [("index", "optim"), ("how_to", "torch")])
def test_guides_show_what_they_use(name, control):
    "Who copies the code that a guide shows has all names; the control is a line of imports less."
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [
        "".join(c["source"])
        for c in cells
        if c["cell_type"] == "code" and not c["source"][0].startswith(("#| hide", "#| echo: false"))
    ]
    code = "\n".join(code)
    assert not unbound(code)
    fewer = re.sub(rf"(?m)^(?:import|from \w+ import) {control}$", "", code)
    assert unbound(fewer) == {control}


def test_all_code_at_once(browser, smalldocs):
    "A button shows what is folded, and folds it again."
    browser.open(SITE / "saddle_attraction.html")
    count = "document.querySelectorAll('main details.code-fold[open]').length"
    seen = [browser.js(count)]
    for _ in range(2):
        browser.js("document.querySelector('button.unfold').click()")
        seen.append(browser.js(count))
    assert seen[1] > 20 and seen[0] == seen[2] == 0, seen


def test_equations_have_one_size(browser, smalldocs):
    "Those of a theorem are as large as others, and as the letters of the text; a phone's are smaller."
    sizes = "[...document.querySelectorAll('main .katex-display > .katex')].map((e) => [e.closest('blockquote') !== null, getComputedStyle(e).fontSize])"
    found = {}
    for width in (1400, 400):
        browser.open(SITE / "implicit_regularizer.html", width=width)
        shown = browser.js(sizes)
        assert {inside for inside, _ in shown} == {True, False}
        found[width] = {float(size.removesuffix("px")) for _, size in shown}
    (wide,), (phone,) = found[1400], found[400]
    assert phone < wide, (phone, wide)


def test_version_and_icon(pages):
    for name, page in pages.items():
        if name.startswith("source/"):
            continue
        assert (
            f"samsde {samsde.__version__}" in page.html
            and "favicon.svg" in page.html
            and "changelog.html" in page.html
        ), name


def test_letters_of_pictures_are_in_every_font(pages):
    "Sliders' figures hold text, which the reader's fonts show: no letter beyond the usual ones, such as mathbb's E."
    pictures = [p.read_text(encoding="utf-8") for p in (SITE / "pictures").glob("*.svg")]
    rare = lambda svg: [
        c for c in "".join(re.findall(r"(?s)<text.*?</text>", svg)) if ord(c) > 0xFFFF
    ]
    assert sum("<text" in svg for svg in pictures) > 10
    assert not any(map(rare, pictures)) and rare("<text>\U0001d53c</text>")


def test_real_networks_are_all_there(pages):
    "The notebook leaves out what is not installed; the one that is read has all of them."
    path = ROOT / "nbs" / "08e_real_networks.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = next(s for c in cells if "\nNETWORKS = dict(" in (s := "".join(c["source"])))
    names = re.findall(r"(\w+)=\(", text.partition("\nNETWORKS = dict")[2])
    rows = re.findall(r"<th[^>]*>(\w+)</th>", pages["real_networks.html"].html)
    assert len(names) == 5 and all(rows.count(name) == 2 for name in names), (names, rows)


def weight(page):
    "The bytes of a page and of its pictures"
    pictures = {
        (SITE / page.name).parent / unquote(link)
        for link in page.links
        if link.endswith((".svg", ".png"))
    }
    return len(page.html.encode()) + sum(p.stat().st_size for p in pictures if p.is_file())


def test_pages_are_light(pages):
    heavy = {name: size for name, page in pages.items() if (size := weight(page)) > 1e6}
    assert not heavy and weight(pages["experiments/error_vs_rho.html"]) > 2 * len(
        pages["experiments/error_vs_rho.html"].html
    ), heavy
    assert (SITE / "search.js").stat().st_size < 1e6 and not (SITE / "search.json").exists()


def test_what_every_page_loads_is_light(smalldocs):
    "Both themes, since the one that is not seen holds up no page; the icons."
    themes = [p.stat().st_size for p in (SITE / "site_libs" / "themes").glob("*.css")]
    assert len(themes) == 2 and sum(themes) < 1e5
    assert (
        sum(
            p.stat().st_size
            for p in (SITE / "site_libs" / "bootstrap-icons").rglob("*.*")
            if p.is_file()
        )
        < 1e4
    )


def test_icons_are_seen(browser, smalldocs):
    "The font has the icons that the style sheet asks for; the control is a character that it has not."
    browser.open(SITE / "sde.html", width=400)
    browser.js("document.fonts.load('16px bootstrap-icons', '\\uf461').then(() => 0)")
    wide = "(c) => { const g = document.createElement('canvas').getContext('2d'); g.font = '100px bootstrap-icons'; const a = g.measureText(c); return [a.width, a.actualBoundingBoxAscent]; }"
    asked = re.findall(
        r'content:"\\(f[0-9a-f]{3})"',
        (SITE / "site_libs" / "bootstrap-icons" / "bootstrap-icons.min.css").read_text(
            encoding="utf-8"
        ),
    )
    seen = [browser.js(f"({wide})(String.fromCharCode(0x{code}))") for code in asked]
    absent = browser.js(f"({wide})(String.fromCharCode(0xf001))")
    assert (
        len(asked) > 3
        and all(abs(width - 100) < 0.01 for width, _ in seen)
        and abs(absent[0] - 100) > 1
    ), (seen, absent)


@pytest.mark.parametrize(
    "page, name, words",
    [
        ("sde.html", "sde", "learning rate η"),
        ("ensemble.html", "simulate", "number of paths"),
        ("ensemble.html", "ensemble", "standard error of the mean"),
        ("objective.html", "support", "values along the first axis"),
        ("objective.html", "objective", "Hessian-vector products"),
    ],
)
def test_tables_of_parameters_and_methods(page, name, words, pages):
    "A class, a function, a dataclass, a named tuple, and the methods of a class; the heading has a link to the source."
    before, after = re.split(rf'<h3 id="{name}"', pages[page].html)
    assert (
        'class="source-link"' in before[-200:]
        and "<table" in after
        and words in after.partition("<h3")[0]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_browser(kind, looks):
    found = [f"{name}: {fault}" for name, (faults, _) in looks.items() for fault in faults[kind]]
    assert not found, "\n".join(found)
    assert sum(shown for _, shown in looks.values()) > 100


BREAKS = {
    "validity": "<div><style scoped>p {}</style></div>",
    "markup": "<p>**bold**</p>",
    "widgets": "<pre>interactive(children=(FloatSlider(value=0.1</pre>",
    "sources": None,
    "words": '<a href="sweep.html"><code>loss</code></a>',
    "alternatives": '<img src="pictures/index-1.svg">',
    "vectors": '<div class="cell-output cell-output-display"><img src="data:image/png;base64,iVBORw0KGgo=" alt="x"></div>',
    "links": '<a href="nowhere.html">x</a>',
    "console": "<script>console.error('broken')</script>",
    "elsewhere": '<img src="http://127.0.0.1:9/x.png" alt="x">',
    "pictures": '<img src="nowhere.png" alt="x">',
    "figures": '<div class="quarto-figure quarto-figure-center" style="text-align: left"><figure class="figure"><img src="pictures/index-1.svg" alt="x" width="90"></figure></div>',
    "phone": f"<p><span class='math display'>\\[{'x+' * 40}x\\]</span></p>",
    "letters": '<img style="width: 100%" alt="x" src="data:image/svg+xml,%3Csvg xmlns=%22http://www.w3.org/2000/svg%22 width=%22900%22 height=%229%22/%3E">',
    "tables": f"<table><tr><td style='max-width: 40px'>{'word ' * 20}</td></tr></table>",
    "columns": f"<table><tr><td style='white-space: nowrap'>{'word ' * 60}</td></tr></table>",
    "lines": f"<pre class='cell-code'><code>{'word ' * 60}</code></pre>",
    "signs": "".join(
        f"<p style='width: {w}px'>word <span class='math inline'>\\(\\gamma\\)</span>, word</p>"
        for w in range(40, 90)
    ),
    "sections": "<section><h2>Nothing</h2></section>",
    "junk": "<div class='cell-output cell-output-stderr'>100%|███| 3/3 [00:01, 2.1it/s]</div>".replace(
        "'", '"'
    ),
    "names": "<nav>x</nav>",
    "contrast": "<p style='color: #999'>word</p>",
    "code": f"<pre>{'x' * 300}</pre>",
    "formulas": f"<div>\\[{'x+' * 99}x\\]</div>",
    "equations": '<span class="math inline">\\(\\nosuchcommand\\)</span>',
    "overflow": '<p style="width: 900px">wide</p>',
}


@pytest.mark.parametrize("kind", BREAKS)
def test_a_broken_page_is_found(kind, pages, request, tmp_path):
    "The control of every check: the first page (or one with a source link) with one fault more."
    old = pages["sde.html" if kind == "sources" else "index.html"]
    html = (
        re.sub(r"#L-\d+", "#L-1", old.html)
        if kind == "sources"
        else old.html.replace("</main>", BREAKS[kind] + "</main>")
    )
    assert html != old.html
    if kind in FILES:
        new = Page(html)
        new.name = old.name
        assert not [*FILES[kind](old, pages)] and [*FILES[kind](new, pages)]
        return
    browser, path = request.getfixturevalue("browser"), tmp_path / "broken.html"
    path.write_text(
        html.replace("<head>", f'<head><base href="{SITE.as_uri()}/">'), encoding="utf-8"
    )
    sound, broken = look(browser, SITE / old.name)[0], look(browser, path)[0]
    assert not sound[kind] and broken[kind]


ASK = """(words) => {
  const input = document.querySelector(".smalldocs-search input"), box = document.querySelector(".smalldocs-search-results");
  box.classList.remove("show");
  input.value = words;
  input.dispatchEvent(new Event("input"));
  return new Promise((done) => {
    const wait = (n) => {
      if (n && !box.classList.contains("show")) setTimeout(wait, 50, n - 1);
      else done(n ? [...box.querySelectorAll("a")].map((a) => a.href) : ["no answer"]);
    };
    wait(100);
  });
}"""


def search(browser, words):
    "The pages of the results, best first, without repetition."
    hits = browser.js(f"({ASK})({json.dumps(words)})")
    return list(
        dict.fromkeys(
            Path(unquote(urlsplit(hit).path)).relative_to(SITE).as_posix()
            if hit.startswith("file")
            else hit
            for hit in hits
        )
    )


@pytest.mark.parametrize("start", ["index.html", "experiments/scaling.html"])
@pytest.mark.parametrize(
    "words, first",
    [
        ("saddle", {"saddle_attraction.html", "saddle_flow.html"}),
        ("momentum", {"momentum.html"}),
        ("DataLoader", {"how_to.html"}),
        ("ResNet", {"how_to.html", "real_networks.html"}),
        ("batch norm", {"optim.html", "how_to.html", "objective.html"}),
        ("Lyapunov", {"hessian_noise.html", "stationarity.html", "saddle_attraction.html"}),
        ("m-SAM", {"which_samples.html"}),
        ("Lightning", {"frameworks.html"}),
        ("simulate", {"ensemble.html"}),
        ("zzqxj", set()),
    ],
)
def test_search(words, first, start, browser, smalldocs):
    "From the first page and from one in a folder; the control is a word that is nowhere."
    browser.open(SITE / start)
    found = search(browser, words)
    assert set(found[:1]) <= first and bool(found) == bool(first), found
    shown = browser.js("document.querySelector('.smalldocs-search-results').innerText")
    assert not re.search(r"\\[a-z]{2,}|\{|\}", shown), shown


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_results_of_a_search_are_seen(width, dark, browser, smalldocs):
    "All over the page, within the screen, and below the field."
    browser.open(SITE / "experiments" / "bench.html", width=width, dark=dark)
    if width < 992:
        browser.js("document.querySelector('.quarto-btn-toggle').click()")
        browser.js("new Promise((done) => setTimeout(done, 500))")
    search(browser, "saddle")
    seen = """[...document.querySelectorAll('.smalldocs-search-results a')].map((e) => {
      const { left, right, top, bottom } = e.getBoundingClientRect(), x = right - 20, y = (top + bottom) / 2;
      const above = document.elementFromPoint(x, y);
      return [left >= 0 && right <= innerWidth, y < innerHeight, above !== null && e.contains(above)];
    })"""
    found = browser.js(seen)
    assert len(found) > 3 and all(all(link) for link in found[:4]), found
    below = "document.querySelector('.smalldocs-search-results').getBoundingClientRect().top - document.querySelector('.smalldocs-search input').getBoundingClientRect().bottom"
    assert 0 <= browser.js(below) < 40
    assert not faint(browser, SITE / "experiments" / "bench.html", dark)


def test_what_a_search_shows_has_its_spaces(smalldocs):
    "A formula and the word after it are apart; the control is a word that follows one in the text."
    text = (SITE / "search.js").read_text(encoding="utf-8")
    joined = "[ηρλμγΣ‖](?:is|of|and|for|the|in|at|to|with|over)"
    assert not re.findall(rf".{{9}}{joined}\b.{{9}}", text) and re.search(r"ρ and", text)


def test_search_leads_to_a_page(browser, smalldocs):
    browser.open(SITE / "index.html")
    search(browser, "saddle")
    browser.events = []
    browser.js("document.querySelector('.smalldocs-search-results a').click()")
    while not any(e.get("method") == "Page.loadEventFired" for e in browser.events):
        browser.events.append(browser.receive())
    assert "addle" in browser.js("document.querySelector('h1').textContent")


def test_theme(browser, smalldocs):
    "The toggle changes the ground and the text of a page, a reload keeps it; a reader who prefers dark pages gets them."
    seen = (
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    try:
        browser.open(SITE / "index.html")
        light = browser.js(seen)
        assert browser.js(seen) == light  # nothing changes by itself
        browser.js("document.querySelector('.quarto-color-scheme-toggle').click()")
        dark = browser.js(seen)
        browser.open(SITE / "sde.html")
        assert browser.js(seen) == dark and all(a != b for a, b in zip(light, dark))
    finally:
        browser.js("localStorage.clear()")
    for page in ("index.html", "source/samsde/sde.html"):
        browser.open(SITE / page, dark=True)
        assert browser.js(seen)[0] == dark[0], page


# --- reading without a mouse, at night, on a phone, on paper ---


def test_keyboard(browser, smalldocs):
    "The first stop leads past the menu to the text; the menu's groups fold by Enter."
    browser.open(SITE / "weak_approximation.html")
    browser.press("Tab", 9)
    assert (
        browser.js("document.activeElement.className") == "skip-link"
        and browser.js("document.activeElement.getBoundingClientRect().left") >= 0
    )
    browser(
        "Input.dispatchKeyEvent",
        type="keyDown",
        key="Enter",
        code="Enter",
        windowsVirtualKeyCode=13,
        text="\r",
    )
    browser.press("Tab", 9)
    assert browser.js("document.querySelector('main').contains(document.activeElement)")
    assert browser.js(
        "[...document.querySelectorAll('.sidebar-item-section button')].every((e) => e.tabIndex === 0)"
    )


@pytest.mark.parametrize("dark", [False, True])
def test_statements_stand_out(dark, browser, smalldocs):
    "A theorem is the darkest text of a light page and the lightest of a dark one, and so is the claim; the search field has the page's ground."
    browser.open(SITE / "saddle_attraction.html", dark=dark)
    colour = lambda selector, what="color": browser.js(
        f"getComputedStyle(document.querySelector({selector!r})).{what}"
    )
    strongest = "rgb(255, 255, 255)" if dark else "rgb(0, 0, 0)"
    assert colour("main blockquote") == colour("#title-block-header .description") == strongest
    ground = [
        int(v) for v in re.findall(r"\d+", colour(".smalldocs-search input", "backgroundColor"))[:3]
    ]
    assert (max(ground) < 100) == dark


def test_tables_of_one_kind_are_one(browser, smalldocs):
    "On a wide screen a table that goes on in the next cell has one head; one after a sentence has its own."
    browser.open(SITE / "what_holds.html")
    seen = """[...document.querySelectorAll('main table.its')].map((e) =>
      [e.closest('.cell').previousElementSibling.querySelector('table') !== null, e.tHead.offsetHeight > 0])"""
    found = browser.js(seen)
    assert {follows for follows, _ in found} == {False, True}
    assert all(headed != follows for follows, headed in found), found


def test_menu_on_a_phone(browser, smalldocs):
    "The open menu begins below the bar, and its first line can be seen."
    browser.open(SITE / "saddle_attraction.html", width=400)
    browser.js("document.querySelector('.quarto-btn-toggle').click()")
    browser.js("new Promise((done) => setTimeout(done, 400))")
    box = browser.js(
        "(({left, top, bottom}) => [left, top, bottom])(document.querySelector('#quarto-sidebar .sidebar-title a').getBoundingClientRect())"
    )
    bar = browser.js("document.querySelector('#quarto-header').getBoundingClientRect().bottom")
    assert box[0] >= 0 and box[1] >= bar, (box, bar)
    assert browser.js(
        f"document.elementFromPoint({box[0] + 3}, {(box[1] + box[2]) / 2}).closest('#quarto-sidebar') !== null"
    )


def test_paper(browser, smalldocs):
    "No bar, no menu, and no code that is cut."
    browser.open(SITE / "weak_approximation.html", width=700, media="print")
    hidden = "['#quarto-header', '#quarto-sidebar', '#quarto-margin-sidebar'].every((s) => getComputedStyle(document.querySelector(s)).display === 'none')"
    cut = "[...document.querySelectorAll('main pre')].filter((e) => e.scrollWidth > e.clientWidth + 1).length"
    assert browser.js(hidden) and browser.js(cut) == 0
    browser.open(SITE / "weak_approximation.html", width=700)
    assert not browser.js(hidden) and browser.js(cut) > 0  # the control is the screen


@pytest.mark.parametrize(
    "page", ["weak_approximation", "diagnosis", "experiments/training", "what_holds"]
)
def test_paper_is_wide_enough(page, browser, smalldocs):
    "A line of code is a line of A4 paper, and no table is wider; what is a list of cells on a phone is a table."
    browser.open(SITE / f"{page}.html", width=718, media="print")
    found = browser.js(WIDE)
    assert not found["long"] and not found["broad"], found
    heads = "[...document.querySelectorAll('table.stacked thead')].filter((e) => getComputedStyle(e).display === 'none').length"
    assert browser.js(heads) == 0
    browser.open(SITE / f"{page}.html", width=718)  # the control is a screen of that width
    assert browser.js(heads) > 0 and (page == "what_holds" or browser.js(WIDE)["long"])


def test_asks_for_no_font_that_is_not_there():
    for css in SITE.rglob("*.css"):
        assert not re.search(
            r"Source Sans|\bLato\b|fonts\.googleapis", css.read_text(encoding="utf-8")
        ), css


def test_sliders_choose_a_figure(browser, smalldocs):
    "Without a kernel and from a file: one figure is seen, another one when the slider is moved, and it is there."
    browser.open(SITE / "saddle_attraction.html")
    seen = "[...document.querySelectorAll('.frames figure')].filter((e) => e.offsetHeight > 100).map((e) => e.innerText.trim())"
    first = browser.js(seen)
    browser.js(
        "(() => { const s = document.querySelectorAll('.frames input')[1]; s.scrollIntoView(); s.value = s.max; s.dispatchEvent(new Event('input')); })()"
    )
    browser.js("new Promise((done) => setTimeout(done, 500))")
    second = browser.js(seen)
    assert len(first) == len(second) == 1 and first != second, (first, second)
    assert browser.js(
        "[...document.querySelectorAll('.frames figure:not([hidden]) img')].every((e) => e.naturalWidth > 0 && e.alt)"
    )
