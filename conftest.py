"pytest runs each notebook as one item, in a process of its own, and leaves out the cells that settings.ini's tst_flags name."
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
RUN = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
cfg = get_config()
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


class NotebookFile(pytest.File):
    def collect(self):
        yield Notebook.from_parent(self, name="notebook")


class Notebook(pytest.Item):
    def runtest(self):
        flags = ["slow"] if self.config.getoption("slow") else []
        done = subprocess.run([sys.executable, "-c", RUN, str(self.path), *flags], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise NotebookError(done.stdout + done.stderr)

    def repr_failure(self, excinfo, style=None):
        return str(excinfo.value) if excinfo.errisinstance(NotebookError) else super().repr_failure(excinfo, style)

    def reportinfo(self):
        return self.path, None, str(self.path.relative_to(ROOT))


class NotebookError(Exception):
    "A notebook that stopped, with the cell's number and its traceback."
