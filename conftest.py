"""pytest runs each notebook as one item, in a process of its own, and leaves out the cells that settings.ini's tst_flags name.
A notebook runs as a reader may run it: in an empty folder.
`make test` has as many processes as cores, of one thread each, through pytest-xdist; `pytest` alone has one."""

import multiprocessing
import os
import re
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

ROOT = Path(__file__).parent
NEEDS_THE_REPOSITORY = {"bench": "times benchmarks/peers.py, and shows benchmarks/results.csv"}
# A new process is a copy of one that has imported what is slow to import, where the system has such copies.
PROCESSES = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
PROCESSES.set_forkserver_preload(
    [
        "pytest",
        "nbdev.test",
        "sympy",
        "matplotlib.pyplot",
        "seaborn",
        "sklearn.datasets",
        "samsde.sweep",
        "samsde.experiments.networks",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "torch.fx.experimental.symbolic_shapes",
    ]
)  # torch's: what it imports late


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run slow tests and cells too")
    parser.addoption(
        "--site",
        action="store_true",
        help="fail where the tests of the built site would be skipped",
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(scope="session")
def processes():
    "As the module multiprocessing, but with quick starts."
    return PROCESSES


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    "The cores that this program may use; a process takes up to a gigabyte."
    from joblib import cpu_count

    return min(cpu_count(), 8)


def pytest_collect_file(file_path, parent):
    folders = file_path.relative_to(ROOT).parts if file_path.is_relative_to(ROOT) else ()
    if (
        file_path.suffix == ".ipynb"
        and folders[:1] == ("nbs",)
        and not any(part[0] in "._" for part in folders)
    ):
        return NotebookFile.from_parent(parent, path=file_path)


def run(path, absent, skipped, forced, log):
    "What a notebook's process does: all that is printed goes to the file `log`"
    file = os.open(log, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (
        open(stream, "w", buffering=1, encoding="utf-8", closefd=False) for stream in (1, 2)
    )
    os.chdir(path.parent)
    from nbdev.test import test_nb

    sys.modules |= dict.fromkeys(absent)  # they cannot be imported
    passed, _ = test_nb(path, skip_flags=skipped, force_flags=forced, basepath=ROOT)
    sys.exit(not passed)


class NotebookFile(pytest.File):
    "A notebook that compares with another package runs without that one too."

    def collect(self):
        yield Notebook.from_parent(self, name="notebook")
        others = {*re.findall(r'find_spec\(\\"(\w+)\\"\)', self.path.read_text(encoding="utf-8"))}
        if others:
            yield Notebook.from_parent(self, name=f"without {' '.join(others)}", absent=others)


class Notebook(pytest.Item):
    def __init__(self, *, absent=(), **how):
        super().__init__(**how)
        self.absent = ["pytest", *absent]  # a reader may have the library alone

    def runtest(self):
        settings = ConfigParser(delimiters=["="])
        settings.read(ROOT / "settings.ini", encoding="utf-8")
        skipped, forced = (
            settings["DEFAULT"]["tst_flags"].split(),
            ["slow"] * self.config.getoption("slow"),
        )
        with TemporaryDirectory() as folder, TemporaryDirectory() as empty:
            log = Path(folder) / "log"
            log.touch()
            path = (
                self.path
                if self.path.stem in NEEDS_THE_REPOSITORY
                else Path(shutil.copy(self.path, empty))
            )
            process = PROCESSES.Process(target=run, args=(path, self.absent, skipped, forced, log))
            process.start()
            try:
                process.join()
            finally:
                process.kill()  # where it is interrupted
            if process.exitcode:
                raise NotebookError(
                    log.read_text(encoding="utf-8", errors="replace")
                    or f"exit status {process.exitcode}"
                )
            left = {p.name for p in Path(empty).iterdir()} - {path.name}
            if left:
                raise NotebookError(f"it left {left} beside itself")

    def repr_failure(self, excinfo, style=None):
        return (
            str(excinfo.value)
            if excinfo.errisinstance(NotebookError)
            else super().repr_failure(excinfo, style)
        )

    def reportinfo(self):
        return self.path, None, f"{self.path.relative_to(ROOT)}::{self.name}"


class NotebookError(Exception):
    "A notebook that stopped, with the cell's number and its traceback."
