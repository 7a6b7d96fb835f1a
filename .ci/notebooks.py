"Execute notebooks in place, each in a process of its own: `notebooks.py [NOTEBOOK…]`, all of them by default."
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIP = re.compile(r"^#\|\s*(eval:\s*false|notest)", re.M)  # such cells keep the outputs that they have


def joined(outputs):
    "A text is one output, however many pieces it came in."
    kept = []
    for out in outputs:
        if kept and "name" in out and out["name"] == kept[-1].get("name"): kept[-1]["text"] += out["text"]
        else: kept.append(out)
    return kept


def execute(path):
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell

    nb, shell = read_nb(path), CaptureShell(path)

    def skip(cell):
        if cell.cell_type != "code" or SKIP.search(cell.source): return True
        cell.outputs = []

    os.chdir(path.parent)
    try: shell.run_all(nb, exc_stop=True, preproc=skip)
    except Exception: sys.exit(shell.prettytb(path.name))
    for cell in nb.cells:  # a progress bar shows the clock; some are drawn whatever TQDM_DISABLE says
        if "outputs" in cell: cell.outputs = joined(out for out in cell.outputs if out.get("name") != "stderr" or "%|" not in str(out))
    write_nb(nb, path)
    for n, cell in enumerate(nb.cells):
        if str(ROOT) in str(cell.get("outputs")): sys.exit(f"{path.name}: cell {n} prints a path of this machine (a warning?)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]: sys.exit(execute(Path(sys.argv[2])))
    import matplotlib.pyplot  # builds its cache of fonts here, and not in a notebook's output
    # nothing in the outputs may depend on the terminal, the locale, the clock or the order of a set
    env = os.environ | dict(PYTHONHASHSEED="0", TQDM_DISABLE="1", COLUMNS="100", LC_ALL="C.UTF-8", TZ="UTC", IN_TEST="1")
    chosen = [Path(name).resolve() for name in sys.argv[1:]] or sorted(
        p for p in (ROOT/"nbs").rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(ROOT).parts))
    for path in chosen:
        print(path.relative_to(ROOT), flush=True)
        if subprocess.run([sys.executable, __file__, "--one", path], env=env).returncode: sys.exit(1)
