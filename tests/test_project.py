"What holds for the package as a whole."

import ast
import json
import pkgutil
import re
import subprocess
import sys
import warnings
from configparser import ConfigParser
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import pytest

import samsde

ROOT = Path(__file__).parent.parent
IMPORT_ALL = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"nbdev", "fastcore", "execnb"}: raise ImportError(f"{name} is a tool for developers")

def stop(name): raise

sys.meta_path.insert(0, Blocked())
import samsde
for module in pkgutil.walk_packages(samsde.__path__, "samsde.", onerror=stop):
    if not module.name.endswith("__main__"): importlib.import_module(module.name)
"""


def test_imports_without_the_tools_of_developers():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_ships_its_types():
    assert files(samsde).joinpath("py.typed").is_file()
    assert '"py.typed"' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_one_version():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    cited = re.search(
        r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M
    )[1]
    assert samsde.__version__ == settings["DEFAULT"]["version"] == cited


def test_compiles_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a TeX command in a docstring that isn't raw, say
        for path in (ROOT / "samsde").rglob("*.py"):
            compile(path.read_text(encoding="utf-8"), path, "exec")


def test_names_of_the_weak_error_where_scripts_look_for_them():
    names = {}
    exec("from samsde.weak_approximation import *", names)
    public = "weak_error weak_order circle_problem circle_error torus_problem torus_error linear_moments stationary_covariance"
    assert (
        set(public.split()) <= names.keys() and names["weak_error"] is samsde.weak_errors.weak_error
    )


def notebooks():
    return [
        p
        for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
        if not any(part[0] in "._" for part in p.relative_to(ROOT).parts)
    ]


def test_kernels_have_the_usual_name():
    for path in notebooks():
        assert (
            json.loads(path.read_text(encoding="utf-8"))["metadata"]["kernelspec"]["name"]
            == "python3"
        ), path


def leaves(group):
    for name, entry in group.items():
        if isinstance(entry, dict):
            yield from leaves(entry)
        else:
            yield name


def test_navigation_lists_every_notebook_once():
    yaml = pytest.importorskip("yaml", reason="a tool for developers")
    listed = list(
        leaves(yaml.safe_load((ROOT / "nbs" / "navigation.yml").read_text(encoding="utf-8")))
    )
    there = {p.relative_to(ROOT / "nbs").as_posix() for p in notebooks()} - {"index.ipynb"}
    there |= {f"{name.lower()}.md" for name in ("CHANGELOG", "CONTRIBUTING")}
    missing, gone, twice = (
        there - set(listed),
        set(listed) - there,
        {name for name in listed if listed.count(name) > 1},
    )
    assert not missing, f"give these a line in nbs/navigation.yml: {sorted(missing)}"
    assert not gone, f"nbs/navigation.yml lists what is not there: {sorted(gone)}"
    assert not twice, f"nbs/navigation.yml lists these twice: {sorted(twice)}"


def test_first_page_is_short():
    words = len((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert words <= 900, f"README.md has {words} words"


def outputs(path):
    return "".join(
        "".join(out.get("data", {}).get("text/markdown", ""))
        for c in cells_of(path)
        for out in c.get("outputs", [])
    )


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_reference_lists_every_public_name():
    "Those of the library's own modules; experiments and machinery have none."
    page, missing = outputs(ROOT / "nbs" / "api.ipynb"), []
    for info in pkgutil.walk_packages(samsde.__path__, "samsde."):
        if info.name.startswith(("samsde.experiments", "samsde.machinery")) or info.name.endswith(
            ("__main__", "_modidx")
        ):
            continue
        module = import_module(info.name)
        missing += [
            f"{info.name}.{name}"
            for name in getattr(module, "__all__", ())
            if callable(value := getattr(module, name))
            and getattr(value, "__module__", None) == info.name
            and f"[{name}](" not in page
        ]
    assert not missing, f"execute nbs/api.ipynb again: {missing}"


def test_changes_begin_with_this_version_or_what_is_to_come():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)", text, re.M)[:2] in (
        ["Unreleased", samsde.__version__],
        [samsde.__version__],
    )


def test_outputs_hold_no_warning_and_no_address():
    for path in notebooks():
        for cell in cells_of(path):
            for out in cell.get("outputs", []):
                said = "".join([*out.get("text", ()), *out.get("data", {}).get("text/plain", ())])
                rich = {"text/html", "text/markdown", "image/svg+xml", "image/png"} & out.get(
                    "data", {}
                ).keys()
                assert not re.search(
                    r"Warning:|/tmp/|/home/"
                    if rich
                    else r"Warning:|/tmp/|/home/|<matplotlib| at 0x",
                    said,
                ), (path.name, cell["id"], said)


INSTALL = """#| hide
# where the package is missing, on Colab say, it is installed
try: import samsde
except ImportError:
    %pip install -q samsde"""


def test_second_cell_installs_the_package_where_it_is_missing():
    for path in notebooks():
        first, second, *_ = [
            "".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
        ]
        assert re.match(r"# \S.*\n\n> \S", first) and second == INSTALL, path


def label(path):
    "What the numbers of a notebook's equations and theorems begin with: its own number, or its name."
    number = re.match(r"0*(\d+[a-z]?)_", path.name)
    return number[1] if number else path.stem.replace("_", "-")


def sources(path, kind=""):
    return ["".join(c["source"]) for c in cells_of(path) if c["cell_type"].startswith(kind)]


def test_equations_and_theorems_are_numbered_once():
    stated, cited = set(), []
    for path in notebooks():
        for source in sources(path):
            found = re.findall(r"\\tag\{(.*?)\}", source) + [
                f"Theorem {n}"
                for n in re.findall(r"^> \*\*Theorem (\S+?)(?= \(|\.\*\*)", source, re.M)
            ]
            for name in found:
                assert name.removeprefix("Theorem ").startswith(label(path) + "."), (
                    f"{path.name}: {name}"
                )
                assert name not in stated, f"{path.name}: {name} is there already"
                stated.add(name)
            for list_ in re.findall(
                r"(?:Eqs?\.|Equations?)\s+((?:\([\w.-]*\d\)(?:, | and | to )?)+)", source
            ):
                cited += [(path.name, name) for name in re.findall(r"\(([\w.-]+)\)", list_)]
            cited += [
                (path.name, f"Theorem {n}")
                for n in re.findall(r"Theorem (\d\w*(?:\.\d+)?)", source)
            ]
    missing = [f"{where} cites {name}" for where, name in cited if name not in stated]
    assert not missing, missing


WITH_THE_LIBRARY = {"samsde", "IPython", "sympy", *sys.stdlib_module_names}  # torch needs sympy


def imported(statement):
    if isinstance(statement, ast.Import):
        return [alias.name.partition(".")[0] for alias in statement.names]
    return [statement.module.partition(".")[0]] if isinstance(statement, ast.ImportFrom) else []


def strangers(source, requirements):
    "What a cell imports at its top level that does not come with the library, unless it does without (`if find_spec(…)`)."
    return (
        {name for statement in ast.parse(source).body for name in imported(statement)}
        - WITH_THE_LIBRARY
        - requirements
    )


def test_notebooks_import_what_comes_with_the_library():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    requirements = {
        name.replace("scikit-learn", "sklearn")
        for name in re.findall(r"([\w-]+)>=", settings["DEFAULT"]["requirements"])
    }
    assert strangers("import torch, pytest", requirements) == {"pytest"}
    for path in notebooks():
        cells = [
            source
            for source in sources(path, "code")
            if source != INSTALL and "#| eval: false" not in source
        ]
        found = {name for source in cells for name in strangers(source, requirements)}
        assert not found, f"{path.name} imports {found}"
