"""Reshuffled epochs: the same bits however a run is cut, stopped, recorded and shared; and what refuses them."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from samsde.algorithm import SAM, SGD, USAM, Chain
from samsde.diagnosis import diagnose
from samsde.ensemble import simulate
from samsde.epochs import epoch_noise
from samsde.hessian_noise import noise_covariance
from samsde.implicit_regularizer import drift
from samsde.machinery.sampling import LAST
from samsde.machinery.store import RunState
from samsde.objective import FiniteSum, MinibatchLoss, Minibatches
from samsde.sweep import sweep

A = torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X0 = torch.ones(2, dtype=torch.float64)


def data(replace="epochs", batch_size=4, dtype=torch.float64):
    rows = A.to(dtype)
    return FiniteSum(lambda x: (rows @ x - 1) ** 2 / 4, 12, 2, batch_size, replace)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Dropout(0.3), nn.Linear(3, 2)).double()


def batches(data, batch_size=None, **how):
    return MinibatchLoss.from_module(net(), nn.CrossEntropyLoss(), data, batch_size, **how)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 3, 4, 10])
def test_goes_on_from_a_file(tmp_path, monkeypatch, stop):
    """A run that is stopped in the midst of an epoch, or at its end, goes on to the same bits."""
    monkeypatch.setattr(RunState, "pause", 0.0)
    chain, file = Chain(SAM(0.1), data(), 0.1, momentum=0.5), tmp_path / "run.npz"
    whole = simulate(chain, X0, 11 * chain.time_step, 20, seed=5)
    note = RunState.note

    def stopping(self, lo, block):
        found = note(self, lo, block)
        if block.step == stop + 1:
            raise Stopped
        return found

    monkeypatch.setattr(RunState, "note", stopping)
    with pytest.raises(Stopped):
        simulate(chain, X0, 11 * chain.time_step, 20, seed=5, checkpoint=file)
    monkeypatch.setattr(RunState, "note", note)
    LAST.key = LAST.order = None
    again = simulate(chain, X0, 11 * chain.time_step, 20, seed=5, checkpoint=file)
    assert again.final.equal(whole.final)
    assert not again.final.equal(simulate(chain, X0, 11 * chain.time_step, 20, seed=6).final)
    for other in (data(False), data(True), data(batch_size=3)):
        with pytest.raises(ValueError, match="belongs to a run with other settings|differs"):
            simulate(
                Chain(SAM(0.1), other, 0.1, momentum=0.5),
                X0,
                11 * chain.time_step,
                20,
                seed=5,
                checkpoint=file,
            )


@pytest.mark.parametrize("source", ["own", "full", "independent", "previous"])
def test_cut_in_any_way(source):
    """Chunks, threads and records change no bit, with each source of the perturbation."""
    chain = Chain(USAM(0.1, source=source), data(), 0.1)
    runs = [
        simulate(chain, X0, 1.0, 5000, seed=2, **how).final
        for how in ({}, dict(chunk=100, threads=2), dict(record=False), dict(chunk=5000, threads=1))
    ]
    assert all(run.equal(runs[0]) for run in runs)


def test_members_of_a_sweep():
    """Members with shared noise see one order; each is the run that it is alone."""
    rhos = torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)
    together = simulate(Chain(SAM(rhos), data(), 0.1), X0, 1.0, 30, seed=1, share=True).final
    for j, rho in enumerate(rhos.tolist()):
        alone = simulate(Chain(SAM(rho), data(), 0.1), X0, 1.0, 30, seed=1).final
        torch.testing.assert_close(together[:, j], alone)
    apart = simulate(Chain(SAM(rhos * 0), data(), 0.1), X0, 1.0, 30, seed=1).final
    assert not torch.allclose(apart[:, 0], apart[:, 1])


def test_in_sweep(tmp_path):
    """`sweep` tells reshuffled minibatches from others, by the step that they take."""
    ask = dict(etas=[0.1], t_end=0.6, n_paths=10, x0=X0, folder=tmp_path)
    first = sweep({"sgd": SGD()}, {"sum": data()}, **ask)
    assert first.equals(sweep({"sgd": SGD()}, {"sum": data()}, **ask))
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        sweep({"sgd": SGD()}, {"sum": data(False)}, **ask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_in_any_dtype(dtype):
    """The order is that of double precision: a state holds the key without rounding."""

    def orders(dtype):
        chain, generator, seen = (
            Chain(SGD(), data(dtype=dtype), 0.1),
            torch.Generator().manual_seed(3),
            [],
        )
        state = chain.start(X0.to(dtype).expand(4, 2))
        for _ in range(9):
            state, gamma = chain.next_batch(state, chain.draw((4,), generator))
            seen.append(gamma)
        return torch.cat(seen, -1)

    assert orders(dtype).equal(orders(torch.float64))
    assert orders(dtype).reshape(4, 3, 12).sort(-1).values.equal(torch.arange(12).expand(4, 3, 12))


@pytest.mark.parametrize("B", [2, 4, 5])
def test_one_step(B):
    """Drift and noise of one step are those of sampling without replacement, and not with."""
    for fn in (drift, noise_covariance):
        values = [fn(SAM(0.1), data(r, B), X0) for r in ("epochs", False, True)]
        assert values[0].equal(values[1]) and not torch.allclose(values[0], values[2], rtol=1e-5)


def test_left_out():
    """Batches of five out of twelve: two an epoch, and no sample twice in it."""
    chain, generator = Chain(SGD(), data(batch_size=5), 0.1), torch.Generator().manual_seed(0)
    state, left = chain.start(X0.expand(2000, 2)), torch.zeros(12)
    for _ in range(4):
        numbers = []
        for _ in range(2):
            state, gamma = chain.next_batch(state, chain.draw((2000,), generator))
            numbers.append(gamma)
        sorted_ = torch.cat(numbers, -1).sort(-1).values
        assert (sorted_.diff(dim=-1) > 0).all()
        left += 2000 - sorted_.flatten().bincount(minlength=12)
    assert (left - 8000 / 6).abs().max() < 5 * (8000 * 5 / 36) ** 0.5


def test_of_a_loader():
    """MinibatchLoss takes a DataLoader that reshuffles; dropout has new seeds, and each sample comes once."""
    rows = TensorDataset(A, torch.arange(12) % 2)
    o = batches(DataLoader(rows, 4, shuffle=True), replace="epochs")
    assert (o.law.epochs, o.law.steps, o.law.replace, o.law.random) == (True, 3, False, True)
    chain, generator = Chain(USAM(0.05), o, 0.1), torch.Generator().manual_seed(0)
    state, seen = chain.start(o.x0.expand(2, -1)), []
    for _ in range(3):
        state, gamma = chain.next_batch(state, chain.draw((2,), generator))
        seen.append(gamma)
    assert (
        torch.cat([g[..., :-1] for g in seen], -1)
        .sort(-1)
        .values.equal(torch.arange(12).expand(2, 12))
    )
    assert len({int(s) for g in seen for s in g[..., -1]}) == 6
    assert batches(DataLoader(rows, 4, shuffle=True)).law.steps == 1
    ends = [simulate(chain, o.x0, 0.5, 3, seed=1, threads=n).final for n in (1, 2)]
    assert ends[0].equal(ends[1])
    for how, words in [
        (dict(batch_size=5, shuffle=True), "batches of one size"),
        (dict(batch_size=4), "shuffle=True"),
    ]:
        with pytest.raises(ValueError, match=words):
            batches(DataLoader(rows, **how), replace="epochs")


def test_constructs_at_once():
    """Nothing of the size of the data is made before it is drawn."""
    for n, B in [(10**12, 10**11), (10**9, 2), (2**62, 3)]:
        for replace in (True, False, "epochs"):
            law = Minibatches(n, B, replace)
            assert law.count >= 10**9 and law.tau > 0 and law.size(1024) == 1024


def test_draws_few():
    """A few distinct numbers out of many, and the same from the same seed."""
    law = Minibatches(10**9, 64, False)
    draws = [law.draw((50,), torch.Generator().manual_seed(0)) for _ in range(2)]
    assert draws[0].equal(draws[1]) and (draws[0].sort(-1).values.diff(dim=-1) > 0).all()


def test_diagnosis_says_it():
    """A diagnosis has the variance of reshuffled minibatches as a part of its SDE's, and is silent for others."""
    found = diagnose(USAM(0.1), data(), X0, 0.1, top=1, directions=1, draws=16)
    lam = found.terms["largest eigenvalue"]
    relative = epoch_noise(0.1 * lam * (1 + 0.1 * lam), 12, 4)
    assert (
        found.terms["variance at epoch ends"] == pytest.approx(relative[-1]) and relative[-1] < 0.5
    )
    assert found.terms["variance, mean over an epoch"] == pytest.approx(relative.mean())
    other = diagnose(USAM(0.1), data(False), X0, 0.1, top=1, directions=1, draws=16)
    assert other.terms == {
        name: value for name, value in found.terms.items() if name in other.terms
    }
    assert not any("epoch" in name for name in other.terms)
