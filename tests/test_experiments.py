"The experiments' committed results: there, readable, and judged the same as the site says."
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


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_site_says_so(name):
    """The notebook and README.md carry the verdicts that the table gives."""
    readme = (MEASURED.parent.parent.parent/"README.md").read_text(encoding="utf-8")
    for v in EXPERIMENTS[name].verdicts(pd.read_csv(MEASURED/f"{name}.csv")):
        assert f"| {v.claim} | [{name}](nbs/experiments/{name}.ipynb) | {v.verdict} |" in readme, v.claim


def test_no_result_without_an_experiment():
    assert {p.stem for p in MEASURED.glob("*.csv")} == set(EXPERIMENTS)


def test_flat_minima_in_short():
    """Its SDEs with a radius for each path: a table without holes, and radii that differ."""
    table = flat_minima.measure(quick=True)
    own = table[(table.part == "network") & (table.algorithm == "USAM") & (table.quantity == "trace") & (table.model == flat_minima.OWN)]
    assert own.rho.nunique() > 1 and own.value.nunique() == len(own)
