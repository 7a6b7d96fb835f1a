"""pytest runs each notebook as one item, in a process of its own, and leaves out the cells that settings.ini's tst_flags name.
`make test` has as many processes as cores, of one thread each, through pytest-xdist; `pytest` alone has one."""
import multiprocessing
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

ROOT = Path(__file__).parent
# A new process is a copy of one that has imported what is slow to import, where the system has such copies.
PROCESSES = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
PROCESSES.set_forkserver_preload([
    "pytest", "nbdev.test", "sympy", "matplotlib.pyplot", "seaborn", "sklearn.datasets", "samsde.sweep", "samsde.experiments.networks",
    "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.fx.experimental.symbolic_shapes"])  # torch's: what it imports late


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the notebooks' slow cells too")
    parser.addoption("--site", action="store_true", help="fail where the tests of the built site would be skipped")


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
    if file_path.suffix == ".ipynb" and folders[:1] == ("nbs",) and not any(part[0] in "._" for part in folders):
        return NotebookFile.from_parent(parent, path=file_path)


def run(path, flags, log):
    "What a notebook's process does: all that is printed goes to the file `log`"
    file = os.open(log, os.O_WRONLY)
    for stream in (1, 2): os.dup2(file, stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, encoding="utf-8", closefd=False) for stream in (1, 2))
    os.chdir(ROOT)
    from nbdev.config import get_config
    from nbdev.test import test_nb
    cfg = get_config()
    sys.modules["pytest"] = None  # a reader may have the library alone
    passed, _ = test_nb(path, skip_flags=cfg.tst_flags.split(), force_flags=flags, basepath=cfg.config_path)
    sys.exit(not passed)


class NotebookFile(pytest.File):
    def collect(self):
        yield Notebook.from_parent(self, name="notebook")


class Notebook(pytest.Item):
    def runtest(self):
        with TemporaryDirectory() as folder:
            log = Path(folder)/"log"
            log.touch()
            flags = ["slow"] if self.config.getoption("slow") else []
            process = PROCESSES.Process(target=run, args=(self.path, flags, log))
            process.start()
            try: process.join()
            finally: process.kill()  # where it is interrupted
            if process.exitcode: raise NotebookError(log.read_text(encoding="utf-8", errors="replace") or f"exit status {process.exitcode}")

    def repr_failure(self, excinfo, style=None):
        return str(excinfo.value) if excinfo.errisinstance(NotebookError) else super().repr_failure(excinfo, style)

    def reportinfo(self):
        return self.path, None, str(self.path.relative_to(ROOT))


class NotebookError(Exception):
    "A notebook that stopped, with the cell's number and its traceback."
