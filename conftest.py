"""pytest runs each notebook as one item, in a process of its own, and leaves out the cells that settings.ini's tst_flags name.
A notebook runs as a reader may run it: in an empty folder, with a copy of the library alone.
While the tests run, notebooks are run beside them, from the last to the first: two processes, of one thread each."""
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

ROOT = Path(__file__).parent
NEEDS_THE_REPOSITORY = {"bench": "times benchmarks/peers.py, and shows benchmarks/results.csv"}
RUN = """
import sys
from pathlib import Path
from nbdev.test import test_nb
path, absent, skipped, *forced = sys.argv[1:]
sys.modules |= dict.fromkeys(absent.split())  # they cannot be imported
passed, _ = test_nb(Path(path), skip_flags=skipped.split(), force_flags=forced)
sys.exit(not passed)
"""


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the notebooks' slow cells too")
    parser.addoption("--site", action="store_true", help="fail where the tests of the built site would be skipped")


def pytest_collect_file(file_path, parent):
    folders = file_path.relative_to(ROOT).parts if file_path.is_relative_to(ROOT) else ()
    if file_path.suffix == ".ipynb" and folders[:1] == ("nbs",) and not any(part[0] in "._" for part in folders):
        return NotebookFile.from_parent(parent, path=file_path)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: isinstance(item, Notebook))  # the tests first


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    notebooks = [item for item in session.items if isinstance(item, Notebook)]
    with TemporaryDirectory() as library, ThreadPoolExecutor(1) as pool:
        shutil.copytree(ROOT/"samsde", Path(library)/"samsde", ignore=shutil.ignore_patterns("__pycache__"))
        for item in notebooks: item.library = library
        if not session.config.option.collectonly:
            for item in reversed(notebooks): item.beside = pool.submit(item.execute)
        try: return (yield)
        finally:
            for item in notebooks: item.stop()


class NotebookFile(pytest.File):
    "A notebook that compares with another package runs without that one too."
    def collect(self):
        yield Notebook.from_parent(self, name="notebook")
        others = {*re.findall(r'find_spec\(\\"(\w+)\\"\)', self.path.read_text(encoding="utf-8"))}
        if others: yield Notebook.from_parent(self, name=f"without {' '.join(others)}", absent=others)


class Notebook(pytest.Item):
    beside = process = None

    def __init__(self, *, absent=(), **how):
        super().__init__(**how)
        self.absent = " ".join(["pytest", *absent])

    def execute(self):
        "The exit status, and all that was printed"
        settings = ConfigParser(delimiters=["="])
        settings.read(ROOT/"settings.ini", encoding="utf-8")
        flags = [settings["DEFAULT"]["tst_flags"], *["slow"] * self.config.getoption("slow")]
        if self.path.stem in NEEDS_THE_REPOSITORY: return self.run(self.path, ROOT, flags)
        with TemporaryDirectory() as folder:
            status, text = self.run(shutil.copy(self.path, folder), self.library, flags)
            left = {p.name for p in Path(folder).iterdir()} - {self.path.name}
            return (1, f"{text}\nit left {left} beside itself") if left else (status, text)

    def run(self, path, library, flags):
        command = [sys.executable, "-c", RUN, path, self.absent, *flags]
        self.process = subprocess.Popen(command, cwd=Path(path).parent, env=os.environ | dict(PYTHONPATH=str(library)),
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        text, _ = self.process.communicate()
        return self.process.returncode, text

    def runtest(self):
        here = self.beside is None or self.beside.cancel()  # nobody has begun with it
        status, text = self.execute() if here else self.beside.result()
        if status: raise NotebookError(text)

    def stop(self):
        if self.beside: self.beside.cancel()
        if self.process and self.process.poll() is None: self.process.kill()

    def repr_failure(self, excinfo, style=None):
        return str(excinfo.value) if excinfo.errisinstance(NotebookError) else super().repr_failure(excinfo, style)

    def reportinfo(self):
        return self.path, None, f"{self.path.relative_to(ROOT)}::{self.name}"


class NotebookError(Exception):
    "A notebook that stopped, with the cell's number and its traceback."
