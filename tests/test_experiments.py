"The experiments' committed results: there, readable, and judged the same as the site says."
import ast
import json
from pathlib import Path

import pandas as pd
import pytest

from samsde.cli import EXPERIMENTS
from samsde.experiments import flat_minima
from samsde.experiments.experiment import VERDICTS

MEASURED = Path(__file__).parent.parent/"nbs"/"experiments"/"measured"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_results_are_judged(name):
    """Every experiment has a table of its full setting, whose verdicts name numbers and nothing that is none."""
    verdicts = EXPERIMENTS[name].verdicts(pd.read_csv(MEASURED/f"{name}.csv"))
    assert len(verdicts) and all(v.verdict in VERDICTS for v in verdicts)
    for v in verdicts: assert "nan" not in v.measured.split() and any(c.isdigit() for c in v.measured), v


def test_the_site_says_so(monkeypatch):
    """The page `what holds` shows what its cells make of the tables."""
    nbs = MEASURED.parent.parent
    monkeypatch.chdir(nbs)
    cells = [c for c in json.loads((nbs/"what_holds.ipynb").read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    names, shown = {}, 0
    for cell in cells[1:]:
        *body, last = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(body, []), "what_holds", "exec"), names)
        if not cell["outputs"]:
            exec(compile(ast.Module([last], []), "what_holds", "exec"), names)
            continue
        found = eval(compile(ast.Expression(last.value), "what_holds", "eval"), names).data
        for said, measured in zip("".join(cell["outputs"][0]["data"]["text/markdown"]).splitlines(), found.splitlines(), strict=True): assert said == measured
        shown += found.count("\n") - 1
    assert shown > 35


def test_no_result_without_an_experiment():
    assert {p.stem for p in MEASURED.glob("*.csv")} == set(EXPERIMENTS)


def test_flat_minima_in_short():
    """Its SDEs with a radius for each path: a table without holes, and radii that differ."""
    table = flat_minima.measure(quick=True)
    own = table[(table.part == "network") & (table.algorithm == "USAM") & (table.quantity == "trace") & (table.model == flat_minima.OWN)]
    assert own.rho.nunique() > 1 and own.value.nunique() == len(own)
