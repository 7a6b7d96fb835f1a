"Write README.md from nbs/index.ipynb; its figures go to README_files."
import os
import re
import shutil
from pathlib import Path

import nbformat
from execnb.nbio import nb2str
from nbconvert import MarkdownExporter
from nbdev import processors
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html
from nbdev.process import NBProcessor
from traitlets.config import Config

STEPS = "populate_language strip_ansi hide_line filter_stream_ rm_header_dash rm_export clean_magics hide_ add_links".split()
cfg = get_config()
nbs, figures = cfg.nbs_path, cfg.config_path/"README_files"
site = f"{cfg.doc_host}{cfg.doc_baseurl}/"
captions = []  # of the figures, in order
notebooks = {_nbpath2html(p.relative_to(nbs)).as_posix(): p.relative_to(nbs).as_posix() for p in nbs.rglob("*.ipynb")}


def target(link):
    "A notebook's links start from nbs/ and its links to names lead to the site; README.md's start from the top and lead to notebooks."
    if link.startswith(site): link = notebooks[link.removeprefix(site).partition("#")[0]]
    elif re.match(r"[a-z]+:|#|README_files/", link): return link
    return os.path.normpath(os.path.join(nbs.name, link))


def clean(cell):
    "nbdev has dealt with its own directives; Quarto's are left."
    options = re.findall(r"^#\|\s*([\w-]+):\s*(.*?)\s*$", cell.source, re.M)
    if cell.cell_type == "code":
        captions.extend(value.strip('"') for key, value in options if key == "fig-cap")
        if {("echo", "false"), ("include", "false")} & set(options): cell.metadata["tags"] = ["remove_input"]
        if {("output", "false"), ("include", "false")} & set(options): cell.outputs = []
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        for out in cell.outputs:  # a code host shows a table's style sheet as text
            if "text/html" in out.get("data", {}):
                out["data"]["text/html"] = re.sub(r"(?s)<style.*?</style>\s*", "", "".join(out["data"]["text/html"]))


if __name__ == "__main__":
    nb = NBProcessor(nbs/cfg.readme_nb, procs=[getattr(processors, name) for name in STEPS], process=True).nb
    nb.cells = [cell for cell in nb.cells if cell.get("source") is not None]
    head = nb.cells[0]
    head.source = re.sub(r"^- [\w-]+:.*\n?", "", head.source, flags=re.M)  # front matter
    for cell in nb.cells: clean(cell)
    nb.metadata["language_info"] = {"name": "python"}
    exporter = MarkdownExporter(config=Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags={"remove_input"})))
    text, resources = exporter.from_notebook_node(nbformat.reads(nb2str(nb), as_version=4), {"output_files_dir": figures.name})
    text = re.sub(r"\s*!\[(?:png|svg)\]", lambda m: f"\n\n![{captions.pop(0)}]", text)
    text = re.sub(r"(\]\()([^)\s]+)", lambda m: m[1] + target(m[2]), text)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    (cfg.config_path/"README.md").write_text(f"<!-- made from nbs/{cfg.readme_nb} by `make readme` -->\n\n{text}\n", encoding="utf-8")
    shutil.rmtree(figures, ignore_errors=True)
    for name, data in (resources.get("outputs") or {}).items():
        path = cfg.config_path/name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
