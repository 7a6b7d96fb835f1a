"""pytest runs each notebook as one item, in a process of its own, and leaves out the cells that settings.ini's tst_flags name.
While the tests run, notebooks are run beside them, from the last to the first: two processes, of one thread each."""
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

ROOT = Path(__file__).parent
RUN = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
cfg = get_config()
sys.modules["pytest"] = None  # a reader may have the library alone
passed, _ = test_nb(Path(sys.argv[1]), skip_flags=cfg.tst_flags.split(), force_flags=sys.argv[2:], basepath=cfg.config_path)
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
    with ThreadPoolExecutor(1) as pool:
        if not session.config.option.collectonly:
            for item in reversed(notebooks): item.beside = pool.submit(item.execute)
        try: return (yield)
        finally:
            for item in notebooks: item.stop()


class NotebookFile(pytest.File):
    def collect(self):
        yield Notebook.from_parent(self, name="notebook")


class Notebook(pytest.Item):
    beside = process = None

    def execute(self):
        "The exit status, and all that was printed"
        flags = ["slow"] if self.config.getoption("slow") else []
        command = [sys.executable, "-c", RUN, str(self.path), *flags]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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
        return self.path, None, str(self.path.relative_to(ROOT))


class NotebookError(Exception):
    "A notebook that stopped, with the cell's number and its traceback."
