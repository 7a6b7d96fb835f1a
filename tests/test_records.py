"A record of steps is an optimisation that no result depends on: what Python holds, what torch's modes are, what changes while a simulation runs."

import itertools
import warnings

import numpy as np
import pytest
import torch

from samsde.algorithm import SAM, SGD, USAM, Chain
from samsde.ensemble import simulate
from samsde.hessian_noise import sgd_covariance
from samsde.machinery import record
from samsde.machinery.record import Recorder, RecordError, recording
from samsde.objective import FiniteSum, Quadratic
from samsde.sde import SDE

X, y = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MSE = torch.nn.MSELoss()


def network(loss=MSE, layer=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(3, 4), layer or torch.nn.Tanh(), torch.nn.Linear(4, 3)
        )
    return FiniteSum.from_module(net.double(), loss, X, y)


def run(objective, steps=300, observe=None, process=Chain, **settings):
    "Means of a simulation of four paths, one block on one thread"
    settings = dict(n_paths=4, seed=1, threads=1, every=10) | settings
    return simulate(
        process(SAM(0.1), objective, 0.01),
        objective.x0,
        0.01 * steps,
        observe=observe or {"f": objective.loss},
        **settings,
    )


def same(a, b):
    return all(a.mean[name].equal(b.mean[name]) for name in a.mean) and a.final.equal(b.final)


@pytest.mark.parametrize("process", [Chain, SDE])
def test_with_and_without(process):
    objective = network()
    assert same(run(objective, process=process), run(objective, process=process, record=False))
    assert not same(run(objective, process=process), run(objective, process=process, seed=2))


class Counting(torch.nn.Module):
    "A loss that triples after so many calls"

    def __init__(self, calls):
        super().__init__()
        self.calls, self.until = 0, calls

    def forward(self, output, target):
        self.calls += 1
        return MSE(output, target) * (1 if self.calls <= self.until else 3)


def test_a_counter_in_a_loss():
    """Its calls are counted as without records; that the loss changes at all is seen in the result."""
    ends = {}
    for recorded in (True, False):
        objective = network(Counting(500))
        calls = objective.network.loss.calls
        ends[recorded] = run(objective, record=recorded)
        ends[recorded].calls = objective.network.loss.calls - calls
    assert same(ends[True], ends[False]) and ends[True].calls == ends[False].calls
    assert not same(ends[True], run(network(Counting(10**9))))


scale = 1.0


def scaled(output, target):
    return scale * MSE(output, target)


@pytest.mark.parametrize("where", ["global", "closure", "list", "attribute"])
def test_a_schedule_in_a_loss(where):
    """A number that a loss reads is changed by an observable, at the 15th record: the steps from there on see it."""
    global scale
    box, holder = [1.0], torch.nn.Module()
    holder.scale, cell = 1.0, 1.0

    def through_closure(output, target):
        return cell * MSE(output, target)

    def through_list(output, target):
        return box[0] * MSE(output, target)

    def through_attribute(output, target):
        return holder.scale * MSE(output, target)

    loss = {
        "global": scaled,
        "closure": through_closure,
        "list": through_list,
        "attribute": through_attribute,
    }[where]

    def ending(record, new):
        global scale
        nonlocal cell
        scale = cell = box[0] = holder.scale = 1.0
        objective, seen = network(loss), itertools.count()

        def watching(x):
            global scale
            nonlocal cell
            if next(seen) == 15:
                scale = cell = box[0] = holder.scale = new
            return x.sum(-1)

        return run(objective, observe={"sum": watching}, record=record)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(ending(True, 3.0), ending(False, 3.0))
        assert not same(ending(True, 3.0), ending(True, 1.0))


def test_a_record_that_is_wrong(monkeypatch):
    """What nobody watches is found out at a comparison, and the simulation starts again, with a warning."""
    global scale
    scale = 1.0
    objective, right = network(scaled), run(network(scaled), record=False)
    monkeypatch.setattr(record, "compiled", lambda fn, tensors: lambda *t: fn(*t) + 1e-6)
    with pytest.warns(
        UserWarning,
        match="the record of .* gives other numbers than the function itself.*starts again without",
    ):
        assert same(run(objective), right)
    monkeypatch.setattr(
        Recorder, "compare", lambda self, entry, name, fn, tensors: entry.record(*tensors)
    )
    assert not same(run(objective), right)


def test_a_record_that_is_wrong_spoils_no_checkpoint(monkeypatch, tmp_path):
    objective, right = network(), run(network(), record=False)
    monkeypatch.setattr(record, "compiled", lambda fn, tensors: lambda *t: fn(*t) + 1e-6)
    monkeypatch.setattr("samsde.machinery.store.RunState.pause", 0.0)
    path = tmp_path / "run.npz"
    with pytest.warns(UserWarning, match="starts again"):
        assert same(run(objective, checkpoint=path), right)
    monkeypatch.undo()
    assert same(run(objective, checkpoint=path), right)


def test_outside_of_a_simulation_nothing_is_recorded():
    """A hundred gradients, then another number in the loss: the new gradient, at once."""
    global scale
    scale = 1.0
    objective = network(scaled)
    old = torch.stack([objective.grad(objective.x0) for _ in range(100)])
    scale = 3.0
    assert old[-1].equal(old[0]) and objective.grad(objective.x0).allclose(3 * old[0])


def test_autocast_decides():
    """What was recorded inside of autocast is not used outside."""
    recorder = Recorder()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    objective = FiniteSum.from_module(net, MSE, X.float(), y.float())

    def gradient():
        return objective.sample_grad(objective.x0, torch.arange(3)[:, None])

    plain = gradient()
    with recording(recorder):
        with torch.autocast("cpu", torch.bfloat16):
            inside = [gradient() for _ in range(70)][-1]
        assert gradient().equal(plain) and not inside.equal(plain)


def test_another_algorithm_for_the_same_model():
    """Form and noise of an SDE follow its algorithm and objective, which may be replaced."""
    H, x = Quadratic(torch.diag(torch.tensor([1.0, 3.0])), sigma=0.2), torch.ones(2)
    model = SDE(SGD(), H, 0.3)
    simulate(model, x, 60.0, 8)
    for algorithm in (SAM(0.1), USAM(0.1), SGD()):
        model.algorithm = algorithm
        fresh = SDE(algorithm, H, 0.3)
        assert (model.method, model.noise_dim) == (fresh.method, fresh.noise_dim)
        assert simulate(model, x, 60.0, 8).final.equal(simulate(fresh, x, 60.0, 8).final)
    model.objective = FiniteSum(lambda z: (z - torch.ones(3, 2)).square().sum(-1), 3, 2)
    assert model.noise_dim == SDE(SGD(), model.objective, 0.3).noise_dim == 3


def test_a_matrix_changed_in_place():
    """A quadratic whose matrix is doubled while a simulation runs."""

    def ending(record, factor):
        bowl, seen = Quadratic(torch.diag(torch.tensor([1.0, 3.0])), sigma=0.2), itertools.count()

        def watching(x):
            if next(seen) == 15:
                bowl.H.mul_(factor)
            return x.sum(-1)

        return simulate(
            SDE(SAM(0.1), bowl, 0.01),
            torch.ones(2),
            3.0,
            8,
            every=10,
            threads=1,
            observe={"sum": watching},
            record=record,
        )

    assert same(ending(True, 2), ending(False, 2)) and not same(ending(True, 2), ending(True, 1))


def test_a_covariance_that_is_written_to():
    """In place, by numpy, and by `.data`, which torch does not count: the noise is that of now."""
    for write in (
        lambda C: C.mul_(4),
        lambda C: C.data.mul_(4),
        lambda C: np.multiply(C.numpy(), 4, out=C.numpy()),
    ):
        C, x = torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        bowl = Quadratic(torch.eye(2, dtype=torch.float64), cov=C)
        process = Chain(SAM(0.1), bowl, 0.1)
        before = simulate(process, 0 * x, 0.1, 1000).std["x"][-1]
        write(C)
        assert sgd_covariance(bowl, x).equal(4 * torch.eye(2, dtype=torch.float64))
        after = simulate(process, 0 * x, 0.1, 1000).std["x"][-1]
        assert (after / before > 1.9).all()


def test_a_record_error_among_threads():
    """It is that error which is told, not that the other threads gave up."""

    class Wrong(Chain):
        def advance(self, x, draw, steps):
            if x.mean() < 0.5:
                raise RecordError(
                    "the record of a step gives other numbers than the function itself"
                )
            return super().advance(x, draw, steps)

    with pytest.warns(UserWarning, match="the record of a step"), pytest.raises(RecordError):
        simulate(
            Wrong(SGD(), Quadratic(torch.eye(2)), 0.1),
            torch.ones(2),
            5.0,
            4_000,
            chunk=100,
            threads=4,
        )
