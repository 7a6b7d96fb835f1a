"""Momentum, weight decay and schedules through the whole library: simulate, files, sweeps, weak errors."""

import math

import pytest
import torch
from torch.testing import assert_close

from samsde.algorithm import SAM, SGD, USAM, Chain
from samsde.ensemble import simulate
from samsde.experiments.examples import line, plane
from samsde.objective import FiniteSum, Quadratic
from samsde.sde import SDE, KineticSDE
from samsde.stationarity import closed_covariance
from samsde.sweep import sweep
from samsde.weak_approximation import weak_error
from samsde.weak_errors import linear_moments, stationary_covariance

F64 = torch.float64
one, two = torch.ones(1, dtype=F64), torch.ones(2, dtype=F64)


def network():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    X, y = torch.randn(9, 3, dtype=F64), torch.arange(9) % 2
    return FiniteSum.from_module(net.double(), torch.nn.CrossEntropyLoss(), X, y, batch_size=3)


def processes(objective):
    training = dict(momentum=0.5, weight_decay=0.1)
    yield Chain(SAM(0.1), objective, 0.1, **training)
    yield Chain(SAM(0.1), objective, 0.1, **training, dampening=0.3, schedule=lambda t: 1 / (1 + t))
    yield Chain(SAM(0.1, source="previous"), objective, 0.1, **training, nesterov=True)
    yield Chain(SAM(0.1), objective, 0.1, weight_decay=0.1, decoupled=True)
    yield SDE(SAM(0.1), objective, 0.1, **training, draws=8)
    yield SDE(SAM(0.1), objective, 0.1, **training, draws=8, schedule=lambda t: 1 / (1 + t))
    yield SDE(USAM(0.1), objective, 0.1, "exact", "factor", 2, **training, draws=8)
    yield KineticSDE(SAM(0.1), objective, 0.1, **training, draws=8)


@pytest.mark.parametrize("number", range(8))
def test_records_chunks_and_files_change_nothing(number, tmp_path):
    process = [*processes(network())][number]
    plain = isinstance(process, Chain) or number == 4  # the others are never recorded
    steps = 280 if plain else 40
    t_end, x0 = steps * float(process.time_step), process.objective.x0
    how = dict(t_end=t_end, n_paths=6, every=steps // 4)
    known = simulate(process, x0, **how).final
    assert known.shape == (6, len(x0)) and known.isfinite().all()
    assert simulate(process, x0, record=False, **how).final.equal(known)
    assert simulate(process, x0, chunk=2, threads=2, **how).final.equal(known)
    file = tmp_path / "run.npz"
    assert simulate(process, x0, checkpoint=file, **how).final.equal(known)
    assert simulate(process, x0, checkpoint=file, **how).final.equal(known)


@pytest.mark.parametrize("name, value", [("momentum", 0.6), ("weight_decay", 0.2)])
def test_a_file_of_another_training_is_refused(name, value, tmp_path):
    how, training = dict(t_end=2.0, n_paths=4), dict(momentum=0.5, weight_decay=0.1)
    simulate(Chain(SAM(0.1), line, 0.1, **training), one, checkpoint=tmp_path / "a.npz", **how)
    training[name] = value
    other = Chain(SAM(0.1), line, 0.08 if name == "momentum" else 0.1, **training)
    with pytest.raises(ValueError, match="other settings"):
        simulate(other, one, checkpoint=tmp_path / "a.npz", **how)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("decoupled", [False, True])
def test_linear_moments_are_those_of_simulate(momentum, decoupled):
    """Within four standard errors, of the chain and of the SDE with small steps."""
    training = dict(momentum=momentum, weight_decay=0.3, decoupled=decoupled)
    for process in (Chain(USAM(0.2), plane, 0.02, **training), SDE(USAM(0.2), plane, 0.02, **training)):
        steps = 20
        t_end = steps * process.time_step
        dt = {} if isinstance(process, Chain) else dict(dt=process.time_step / 8)
        run = simulate(process, two, t_end, 4000, every=steps, **dt)
        mean, C = linear_moments(process, two, t_end)
        slack = 0.0 if isinstance(process, Chain) else 0.01
        assert ((run.mean["x"][-1] - mean).abs() < 4 * run.sem["x"][-1] + slack).all()
        variance = run.std["x"][-1] ** 2
        assert ((variance / C.diag() - 1).abs() < 4 * (2 / 4000) ** 0.5 + 3 * slack).all()


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_weight_decay_in_the_model(momentum):
    """Both kinds: the difference of the means from the algorithm halves with η; without decay in
    the model it does not."""
    for decoupled in (False, True):
        decay = 0.5 / (1 - momentum) if decoupled else 0.5  # alike in the model
        how = dict(momentum=momentum, weight_decay=decay, decoupled=decoupled)

        def gap(eta, **forget):
            eta = eta * (1 - momentum)
            chain, sde = Chain(USAM(0.2), line, eta, **how), SDE(USAM(0.2), line, eta, **how | forget)
            return abs(linear_moments(chain, one, 1.0)[0] - linear_moments(sde, one, 1.0)[0]).item()

        assert 1.7 < gap(1 / 256) / gap(1 / 512) < 2.3
        assert gap(1 / 512, weight_decay=0.0) > 4 * gap(1 / 512)


def test_a_schedule_is_another_clock():
    """Without noise dX = s(t) b dt, so X at t is the unscheduled one at ∫ s: order 1 in η."""
    quiet = Quadratic(torch.tensor([[1.3]], dtype=F64))

    def end(cls, eta, **how):
        process = cls(SGD(), quiet, eta, **how)
        return simulate(process, one, 2.0, 2).final[0].item()

    def halving(t):
        return 1 / (1 + t)

    clock = math.exp(-1.3 * math.log(3.0))  # ∫ of 1/(1 + t) to 2 is ln 3
    far, near = (abs(end(Chain, eta, schedule=halving) - clock) for eta in (0.01, 0.005))
    assert 1.8 < far / near < 2.2 and far < 0.01
    assert abs(end(SDE, 0.005, schedule=halving) - clock) < 0.01 < abs(end(SDE, 0.005) - clock)


def test_a_schedule_of_rates_is_that_of_torch():
    rates = torch.tensor([0.1, 0.05, 0.025], dtype=F64)
    chain = Chain(SGD(), Quadratic(torch.eye(1, dtype=F64)), 0.1, schedule=rates)
    end = simulate(chain, one, 0.3, 2).final
    assert_close(end, torch.full((2, 1), 0.9 * 0.95 * 0.975, dtype=F64))


def test_weak_error_with_momentum():
    """The difference of means on common noise is the exact one, within its interval."""
    chain, sde = (cls(USAM(0.3), line, 0.05, momentum=0.5) for cls in (Chain, SDE))

    def point(x):
        return x[..., 0]

    found = weak_error(chain, sde, one, 2.0, point, 2000)
    exact = linear_moments(chain, one, 2.0)[0] - linear_moments(sde, one, 2.0)[0]
    assert found.ci_low - 2e-3 < exact.item() < found.ci_high + 2e-3
    assert (found.ci_high - found.ci_low) < 0.05


def test_a_sweep_has_the_times_of_its_processes():
    """A table of a process with momentum has its own time, and the numbers of simulate."""

    def trained(algorithm, objective, eta):
        return Chain(algorithm, objective, eta, momentum=0.5)

    def loss(objective, x):
        return objective.loss(x)

    table = sweep(
        {"SAM": SAM(0.1)}, {"line": line}, [0.1], t_end=2.0, n_paths=50, x0=one,
        processes={"trained": trained}, observe={"f": loss}, interval=0.4,
    )
    assert table["time"].tolist() == pytest.approx([0.0, 0.4, 0.8, 1.2, 1.6, 2.0])
    chain = trained(SAM(0.1), line, 0.1)
    ends = [simulate(chain, one, 2.0, 4000, observe=line.loss, seed=s).mean["loss"][-1] for s in (0, 1)]
    assert abs(table["mean"].iloc[-1] - ends[0].item()) < 5 * table["sem"].iloc[-1]
    assert len(table) == 6 and table["mean"].notna().all()


def test_formulas_for_plain_steps_refuse_trained_ones():
    for process in (Chain(USAM(0.1), plane, 0.1, momentum=0.5), SDE(USAM(0.1), plane, 0.1, weight_decay=0.1)):
        with pytest.raises(ValueError, match="is for momentum=0, weight_decay=0 and no schedule"):
            closed_covariance(process)
    with pytest.raises(ValueError, match="whose state is its point, got v besides"):
        KineticSDE(USAM(0.1), plane, 0.1, momentum=0.5).to_torchsde()
    closed_covariance(Chain(USAM(0.1), plane, 0.1))


def test_kinetic_stationary_covariance():
    """The kinetic SDE's C solves X's equation of a damped oscillator: η^{1/2} a/(2c H A) in one dimension."""
    eta, mu = 1e-4, 0.98
    process = KineticSDE(USAM(0.3), line, eta, momentum=mu)
    c, A = (1 - mu) / eta**0.5, 1.3 * (1 + 0.3 * 1.3)
    a = 0.49 * (1 + 0.3 * 1.3) ** 2
    assert_close(stationary_covariance(process).item(), eta**0.5 * a / (2 * c * A))
    chain = stationary_covariance(Chain(USAM(0.3), line, eta, momentum=mu)).item()
    assert abs(chain / stationary_covariance(process).item() - 1) < 0.02
