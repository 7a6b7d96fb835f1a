"The experiments' committed results: there, readable, and judged the same as the site says."

import ast
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from samsde.cli import EXPERIMENTS
from samsde.experiments import flat_minima, micro_batches, training
from samsde.experiments.experiment import VERDICTS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_results_are_judged(name):
    """Every experiment has a table of its full setting, whose verdicts name numbers and nothing that is none."""
    verdicts = EXPERIMENTS[name].verdicts(EXPERIMENTS[name].measured())
    assert len(verdicts) and all(v.verdict in VERDICTS for v in verdicts)
    for v in verdicts:
        assert "nan" not in v.measured.split() and any(c.isdigit() for c in v.measured), v
        assert "nan" not in v.condition.split(), v
    assert "with a condition" not in str(verdicts).lower() + verdicts._repr_markdown_()


def shown(page):
    "The tables that a notebook shows"
    cells = json.loads((ROOT / "nbs" / page).read_text(encoding="utf-8"))["cells"]
    outputs = [o.get("data", {}) for c in cells for o in c.get("outputs", [])]
    return "".join(line for data in outputs for line in data.get("text/markdown", []))


def test_conditions_are_in_words():
    """A verdict's condition is on the page of its experiment, and `what holds` says it in the same words. The control, the claims without conditions, is not there."""
    sentences, bare = set(), set()
    for name, experiment in EXPERIMENTS.items():
        page = shown(f"experiments/{name}.ipynb").replace("\\*", "*")
        for v in experiment.verdicts(experiment.measured()):
            if v.conditional:
                assert f"| {v.claim} | **holds** {v.condition} |" in page, v
                sentences.add(v.sentence)
                bare.add(v.claim)
    rows = shown("what_holds.ipynb").replace("\\*", "*").splitlines()
    rows = [row for row in rows if "[measured]" in row and "under the condition" in row]
    said = {row.removeprefix("| ").split(" | ")[0] for row in rows}
    assert len(said) > 10 and sentences >= said and not bare & said


def test_the_site_says_so():
    """The page `what holds` shows what its cells make of the tables."""
    cells = [
        c
        for c in json.loads((ROOT / "nbs" / "what_holds.ipynb").read_text(encoding="utf-8"))[
            "cells"
        ]
        if c["cell_type"] == "code"
    ]
    names, shown = {}, 0
    for cell in cells[1:]:
        *body, last = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(body, []), "what_holds", "exec"), names)
        if not cell["outputs"]:
            exec(compile(ast.Module([last], []), "what_holds", "exec"), names)
            continue
        found = eval(compile(ast.Expression(last.value), "what_holds", "eval"), names).data
        for said, measured in zip(
            "".join(cell["outputs"][0]["data"]["text/markdown"]).splitlines(),
            found.splitlines(),
            strict=True,
        ):
            assert said == measured
        shown += found.count("\n") - 1
    assert shown > 35


def test_no_result_without_an_experiment():
    assert {p.stem for p in (ROOT / "samsde" / "experiments" / "measured").glob("*.csv")} == set(
        EXPERIMENTS
    )


def shorten(monkeypatch, module, **changes):
    "What `module` calls by these names gets other arguments than it gives, where it gives any."

    def with_changes(function, changed):
        return lambda *args, **given: function(*args, **given | changed)

    for name, changed in changes.items():
        monkeypatch.setattr(module, name, with_changes(getattr(module, name), changed))


def test_flat_minima_in_short(monkeypatch):
    """Its SDEs with a radius for each path: a table without holes, and radii that differ. The training is a sixth of the quick one."""
    shorten(monkeypatch, flat_minima, Study=dict(t_end=3.0), valleys=dict(points=151))
    table = flat_minima.measure(quick=True)
    own = table[
        (table.part == "network")
        & (table.algorithm == "USAM")
        & (table.quantity == "trace")
        & (table.model == flat_minima.OWN)
    ]
    assert own.rho.nunique() > 1 and own.value.nunique() == len(own)


SMALLER = {
    training: dict(cancer=dict(n=64, hidden=2), diagnose_training=dict(effort=20)),
    micro_batches: dict(cancer=dict(n=64, hidden=2)),
}


@pytest.mark.parametrize("module", SMALLER, ids=["training", "micro_batches"])
def test_networks_in_short(module, monkeypatch):
    """The quick setting, smaller: finite numbers, every model at every time, and verdicts and a picture from it."""
    shorten(monkeypatch, module, **SMALLER[module])
    table = module.measure(quick=True)
    assert table["value"].map(math.isfinite).all() and not table.diverged.any()
    keys = [
        name
        for name in ("part", "network", "model", "statistic", "rho", "m", "epoch", "step")
        if name in table
    ]
    assert not table.duplicated(keys).any()
    assert all(v.verdict in VERDICTS for v in module.verdicts(table))
    assert (
        len(module.plot(table, "cancer" if module is micro_batches else "cancer, forgetting").axes)
        > 4
    )
    plt.close("all")


def test_training_goes_on_from_its_checkpoints(tmp_path):
    """Stopped after the third ensemble, the next call reads what there is and ends with the same numbers. The control is another seed."""
    task = training.cancer(hidden=2, n=64, radii=(0.1,), epochs=2)

    def rows(seed, folder, tick=lambda: None):
        return training.modelled_rows(task, 3, seed, 1, folder, tick)

    def stop():
        if len(list(tmp_path.iterdir())) == 3:
            raise KeyboardInterrupt

    undisturbed = rows(0, None)
    with pytest.raises(KeyboardInterrupt):
        rows(0, tmp_path, stop)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(before) == 3 and rows(0, tmp_path) == undisturbed != rows(1, None)
    assert len(list(tmp_path.iterdir())) == 9
