"""Paths that diverge are counted, told by time and index, and leave the statistics of the others as they were."""

import itertools
import math
import warnings

import pandas as pd
import pytest
import torch

from samsde.algorithm import DNSAM, SAM, SGD, USAM, Chain
from samsde.ensemble import DivergenceError, Ensemble, simulate
from samsde.objective import FiniteSum, NoisyLoss, Quadratic
from samsde.sde import SDE
from samsde.weak_approximation import validity_map, weak_error

f64 = dict(dtype=torch.float64)
STEEP = NoisyLoss(lambda x: (x**4).sum() / 4, 2, 0.01)  # a step is too long where |x| > 4
A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], **f64)
STEEP_SUM = FiniteSum(lambda x: (A @ x) ** 4 / 4, 3, 2, batch_size=2)
FAR, BAD, GOOD = 40.0, [1, 3, 6], [0, 2, 4, 5, 7]
PROCESSES = [
    Chain(USAM(0.01), STEEP, 0.1),
    Chain(DNSAM(0.01), STEEP, 0.1),
    Chain(SAM(0.01), STEEP_SUM, 0.1),
    SDE(SAM(0.01), STEEP, 0.1),
    SDE(USAM(0.01), STEEP_SUM, 0.1),
    SDE(SGD(), STEEP, 0.1),
    Chain(SAM(torch.tensor([0.01, 0.02], **f64)), STEEP, 0.1),
]
names = lambda p: f"{type(p).__name__} {p.algorithm}"


def starts(far=FAR, paths=BAD):
    x0 = 0.5 + 0.05 * torch.arange(16, **f64).reshape(8, 2)
    x0[paths] *= far
    return x0


def quiet(process, x0, t_end=2.0, **how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return simulate(process, x0, t_end, len(x0), every=2, **how)


@pytest.mark.parametrize("process", PROCESSES, ids=names)
def test_the_others_are_as_if_alone(process):
    """Means, deviations, errors and ends are those of the paths that stayed, bit for bit the same paths as in a run where none was sent away."""
    run, calm = quiet(process, starts(), keep=True), quiet(process, starts(1.0), keep=True)
    batch = run.alive.shape[1:]
    assert (
        not run.alive[BAD].any()
        and run.alive[GOOD].all()
        and (torch.as_tensor(run.n_diverged) == len(BAD)).all()
        and (torch.as_tensor(calm.n_diverged) == 0).all()
    )
    assert run.final[GOOD].equal(calm.final[GOOD]) and run.final[BAD].isnan().all()
    x = calm.paths["x"][:, GOOD]
    for kind, value in {"mean": x.mean(1), "std": x.std(1)}.items():
        torch.testing.assert_close(getattr(run, kind)["x"], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run.sem["x"], x.std(1) / len(GOOD) ** 0.5, rtol=1e-7, atol=1e-12)
    assert run.mean["x"].shape[1:-1] == batch and not torch.allclose(
        calm.mean["x"], run.mean["x"], rtol=1e-3
    )  # the control


def test_standard_errors_are_in_double_precision():
    run = quiet(PROCESSES[0], starts())
    torch.testing.assert_close(run.sem["x"], run.std["x"] / 5**0.5, rtol=1e-15, atol=0)


@pytest.mark.parametrize("process", PROCESSES[:2], ids=names)
def test_they_are_counted(process):
    with pytest.warns(UserWarning, match="3 of 8 paths diverged"):
        run = simulate(process, starts(), 2.0, 8)
    assert "8 paths, 3 diverged" in repr(run) and run.frame()["mean"].notna().all()


@pytest.mark.parametrize("process", PROCESSES, ids=names)
def test_when_all_diverge_there_is_no_number(process, tmp_path):
    with pytest.raises(DivergenceError, match="all .* paths diverged.*lower eta or rho"):
        quiet(process, starts(paths=range(8)) * 10)
    with pytest.raises(DivergenceError):
        quiet(process, starts(paths=range(8)) * 10, checkpoint=tmp_path / "run.npz")
    with pytest.raises(DivergenceError):
        quiet(process, starts(paths=range(8)) * 10, checkpoint=tmp_path / "run.npz")  # resumed


def test_one_member_of_a_sweep_diverges():
    """Its statistics are missing (NaN, and no row in the table); those of the other member are a single run's."""
    bowl, rhos, x0 = (
        Quadratic(torch.eye(2, **f64), 0.1),
        torch.tensor([0.1, 1e9], **f64),
        torch.ones(6, 2, **f64),
    )
    run, one = (
        quiet(Chain(USAM(rhos), bowl, 0.1), x0[:, None].expand(6, 2, 2), 10.0, share=True),
        quiet(Chain(USAM(0.1), bowl, 0.1), x0, 10.0),
    )
    assert (
        run.n_diverged.tolist() == [0, 6]
        and run.mean["x"][:, 1].isnan().all()
        and run.std["x"][:, 1].isnan().all()
    )
    torch.testing.assert_close(run.mean["x"][:, 0], one.mean["x"], rtol=1e-12, atol=1e-14)
    table = run.frame()
    assert len(table) == 2 * len(run.times) and set(table["component"]) == {"0,0", "0,1"}


def test_an_observable_that_is_not_finite_takes_its_path_out():
    """One infinite logarithm, at one time, and the path is left out of all statistics."""
    frozen, x0 = (
        Chain(SGD(), Quadratic(torch.zeros(1, 1, **f64)), 0.1),
        torch.tensor([[1.0], [0.0], [2.0]], **f64),
    )
    run = quiet(frozen, x0, 0.4, observe={"log": lambda x: x[..., 0].log(), "x": lambda x: x})
    assert (
        run.alive.tolist() == [True, False, True]
        and (run.mean["x"] == 1.5).all()
        and (run.mean["log"] - math.log(2) / 2).abs().max() < 1e-15
    )


def test_huge_is_not_infinite():
    """Finite paths count, however large; a deviation that no double can hold is infinite and not NaN."""
    frozen, x0 = (
        Chain(SGD(), Quadratic(torch.zeros(1, 1, **f64)), 0.1),
        torch.tensor([[1e200], [-1e200], [0.0]], **f64),
    )
    run = simulate(frozen, x0, 0.4, 3)
    assert run.n_diverged == 0 and (run.mean["x"] == 0).all() and run.std["x"].isposinf().all()


def test_weak_errors_leave_them_out():
    """The two processes of a pair go out together, the number is told; where all go, the map says infinite."""
    chain, sde, test = (
        Chain(USAM(0.01), STEEP, 0.1),
        SDE(USAM(0.01), STEEP, 0.1),
        lambda x: x.square().sum(-1),
    )
    with pytest.raises(DivergenceError):
        weak_error(chain, sde, torch.full((2,), 100.0, **f64), 1.0, test, 10)
    far = validity_map(USAM, STEEP, [0.1], [0.01], 1.0, test, torch.full((2,), 100.0, **f64), 10)
    assert far["error"].tolist() == [math.inf] and far["n_diverged"].tolist() == [10]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        noisy = NoisyLoss(lambda x: (x**4).sum() / 4, 1, 15.0)
        edge = weak_error(
            Chain(SGD(), noisy, 0.1),
            SDE(SGD(), noisy, 0.1),
            torch.ones(1, **f64),
            2.0,
            lambda x: x[..., 0].tanh(),
            400,
        )
    assert (
        0 < edge.n_diverged < 400
        and math.isfinite(edge.difference)
        and math.isfinite(edge.sem)
        and edge.curve.notna().all(axis=None)
    )


@pytest.mark.parametrize("process", PROCESSES, ids=names)
def test_time_and_index(process, tmp_path):
    """diverged_at is the first recorded time at which a path was not finite, found here by hand; the first is named in the warning, and it survives a checkpoint."""
    with pytest.warns(UserWarning, match=r"the first, path [136].*, by t=0\.\d"):
        run = simulate(
            process, starts(), 2.0, 8, every=2, keep=True, checkpoint=tmp_path / "run.npz"
        )
    finite = torch.isfinite(run.paths["x"]).all(-1)
    by_hand = torch.where(finite.all(0), math.inf, run.times[(~finite).int().argmax(0)])
    assert run.diverged_at.equal(by_hand) and run.alive.equal(run.diverged_at == math.inf)
    assert quiet(process, starts(), keep=True, checkpoint=tmp_path / "run.npz").diverged_at.equal(
        by_hand
    )


def test_all_by_time_and_index():
    with pytest.raises(
        DivergenceError, match=r"all 8 paths diverged, the first, path \d, by t=0\.\d"
    ):
        quiet(PROCESSES[0], starts(paths=range(8)) * 10)


def by_hand(run):
    """The table, a row at a time"""
    rows = []
    for name, mean in run.mean.items():
        for k, t in enumerate(run.times.tolist()):
            for index in itertools.product(*map(range, mean.shape[1:])):
                rows.append(
                    (
                        name,
                        t,
                        ",".join(map(str, index)),
                        *(s[name][(k, *index)].item() for s in (run.mean, run.std, run.sem)),
                    )
                )
    return pd.DataFrame(
        rows, columns=["observable", "time", "component", "mean", "std", "sem"]
    ).dropna(subset="mean")


def test_a_table_by_columns():
    """The same rows, columns, order and types as row by row, where all of a member diverge, some, or none."""
    bowl, x0, rhos = (
        Quadratic(torch.eye(2, **f64), 0.1),
        torch.ones(6, 2, **f64),
        torch.tensor([0.1, 1e9], **f64),
    )
    seen = {
        "x": lambda x: x,
        "f": bowl.loss,
        "right": lambda x: x[..., 0] > 0,
        "all": lambda x: x[..., None] * torch.ones(3, **f64),
    }
    for run in (
        quiet(Chain(USAM(rhos), bowl, 0.1), x0, 10.0, observe=seen),
        quiet(Chain(SGD(), bowl, 0.1), x0, observe=seen),
        quiet(PROCESSES[0], starts()),
    ):
        table = run.frame()
        pd.testing.assert_frame_equal(table, by_hand(run), check_exact=True)
        assert table.index.equals(by_hand(run).index) and len(table)


def test_a_table_of_a_million_rows():
    """With many times and with many components"""
    for shape in ((1000, 1000), (10**6,), (1, 1000, 1000)):
        t, alive = torch.zeros(shape, **f64), torch.ones(2, dtype=torch.bool)
        run = Ensemble(
            torch.arange(shape[0], **f64),
            {"x": t},
            {"x": t},
            {"x": t},
            torch.zeros(2, 1, **f64),
            alive,
            alive.double(),
        )
        table = run.frame()
        assert len(table) == 10**6 and table["component"].iloc[-1] == ",".join(
            str(n - 1) for n in shape[1:]
        )


def test_more_than_can_be_counted():
    """A learning rate, a step or a number of paths beyond all sense is refused in words."""
    bowl, x0 = Quadratic(torch.eye(2, **f64), 0.1), torch.ones(2, **f64)
    for kind, eta, how, words in (
        (Chain, 1e-320, dict(n_paths=4), "t_end must be at most 2.53 eta"),
        (SDE, 0.1, dict(n_paths=4, dt=1e-320), "dt must be at least eta/10.6"),
        (
            Chain,
            0.1,
            dict(n_paths=10**30),
            "n_paths must be at most 2.53, got 1000000000000000000000000000000",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            simulate(kind(SGD(), bowl, eta), x0, 1.0, **how)
