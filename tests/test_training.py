"""Momentum, weight decay and schedules through the whole library: simulate, files, sweeps, weak errors."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from samsde import optim
from samsde.algorithm import SAM, SGD, USAM, Chain
from samsde.ensemble import simulate
from samsde.experiments.examples import line, plane
from samsde.objective import FiniteSum, Quadratic
from samsde.sde import SDE, KineticSDE
from samsde.stationarity import closed_covariance, suboptimality
from samsde.sweep import sweep
from samsde.weak_approximation import weak_error
from samsde.weak_errors import exact_error, linear_moments, periodic_examples, rate_system, stationary_covariance

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
    yield Chain(SAM(0.1), objective, 0.1, rho_schedule=lambda t: 1 / (1 + t))
    yield SDE(SAM(0.1), objective, 0.1, **training, draws=8, rho_schedule=lambda t: 1 / (1 + t))


@pytest.mark.parametrize("number", range(10))
def test_records_chunks_and_files_change_nothing(number, tmp_path):
    process = [*processes(network())][number]
    plain = isinstance(process, Chain) or number == 4  # the others are never recorded
    steps = 260 if plain else 24
    t_end, x0 = steps * float(process.time_step), process.objective.x0
    how = dict(t_end=t_end, n_paths=6, every=steps // 4)
    known = simulate(process, x0, **how).final
    assert known.shape == (6, len(x0)) and known.isfinite().all()
    assert simulate(process, x0, record=False, **how).final.equal(known)
    file = tmp_path / "run.npz"
    first = simulate(process, x0, chunk=2, threads=2, checkpoint=file, **how).final
    assert first.equal(known)
    assert simulate(process, x0, checkpoint=file, **how).final.equal(known)


@pytest.mark.parametrize("name, value", [("momentum", 0.6), ("weight_decay", 0.2)])
def test_a_file_of_another_training_is_refused(name, value, tmp_path):
    how, training = dict(t_end=2.0, n_paths=4), dict(momentum=0.5, weight_decay=0.1)
    simulate(Chain(SAM(0.1), line, 0.1, **training), one, checkpoint=tmp_path / "a.npz", **how)
    training[name] = value
    other = Chain(SAM(0.1), line, 0.08 if name == "momentum" else 0.1, **training)
    with pytest.raises(ValueError, match="other settings"):
        simulate(other, one, checkpoint=tmp_path / "a.npz", **how)


def test_a_file_of_another_schedule_is_refused(tmp_path):
    """Also where the first step is the same."""
    for name in ("schedule", "rho_schedule"):
        how, file = dict(t_end=2.0, n_paths=4), tmp_path / f"{name}.npz"
        simulate(Chain(SAM(0.1), line, 0.1, **{name: lambda t: 1.0}), one, checkpoint=file, **how)
        other = Chain(SAM(0.1), line, 0.1, **{name: lambda t: 1 / (1 + t)})
        with pytest.raises(ValueError, match="other settings"):
            simulate(other, one, checkpoint=file, **how)


@pytest.mark.parametrize("name", ["schedule", "rho_schedule"])
@pytest.mark.parametrize("model", [Chain, SDE])
def test_a_schedule_that_differs_in_a_single_step(name, model, tmp_path):
    """A checkpoint and a sweep's folder are refused; the same schedule goes on."""
    rates = torch.full((100,), 0.1, dtype=torch.float64)
    other = rates.clone()
    other[31] = 0.09
    file, folder = tmp_path / "run.npz", tmp_path / "jobs"

    def run(schedule):
        process = model(SAM(0.1), line, 0.1, **{name: schedule})
        return simulate(process, one, 10.0, 4, checkpoint=file).final

    def table(schedule):
        makes = {"run": lambda *args: model(*args, **{name: schedule})}
        how = dict(t_end=10.0, n_paths=4, x0=one, processes=makes, folder=folder)
        return sweep([SAM(0.1)], [line], [0.1], **how)

    for job in (run, table):
        known = job(rates)
        with pytest.raises(ValueError, match=r"other settings \(the schedules\)"):
            job(other)
        assert job(rates).equals(known) if job is table else job(rates).equal(known)


@pytest.mark.parametrize("model", [Chain, SDE])
def test_steps_that_a_dtype_cannot_count(model):
    """bfloat16 counts to 256: a schedule would stand still from there on."""

    def end(dtype, steps):
        process = model(SGD(), Quadratic(torch.eye(1, dtype=dtype)), 1 / 128, schedule=late)
        return simulate(process, torch.ones(1, dtype=dtype), steps / 128, 2).final

    def late(t):
        return float(t < 2.5)

    assert end(torch.bfloat16, 256).isfinite().all()
    with pytest.raises(ValueError, match="step 256 cannot be counted in torch.bfloat16"):
        end(torch.bfloat16, 257)
    assert end(torch.float16, 400).equal(end(torch.float16, 320))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("decoupled", [False, True])
def test_linear_moments_are_those_of_simulate(momentum, decoupled):
    """Within four standard errors, of the chain and of the SDE with small steps."""
    training = dict(momentum=momentum, weight_decay=0.3, decoupled=decoupled)
    for process in (
        Chain(USAM(0.2), plane, 0.02, **training),
        SDE(USAM(0.2), plane, 0.02, **training),
    ):
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
            chain, sde = (
                Chain(USAM(0.2), line, eta, **how),
                SDE(USAM(0.2), line, eta, **how | forget),
            )
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


RADII = 0.3 * torch.linspace(1, 0.1, 50, dtype=F64)  # one for each step


@pytest.mark.parametrize("kind", [USAM, SAM])
@pytest.mark.parametrize("momentum, decay, scheduled", [(0.0, 0.0, False), (0.9, 0.01, True)])
def test_a_schedule_of_the_radius_is_that_of_the_optimizer(kind, momentum, decay, scheduled):
    """50 steps with rho set by hand, from values and from a function; the control is a fixed one."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    ).double()
    X, y, loss = torch.randn(9, 3, dtype=F64), torch.arange(9) % 2, torch.nn.CrossEntropyLoss()
    objective = FiniteSum.from_module(net, loss, X, y, batch_size=3)
    batches = list(objective.draw((50,), torch.Generator().manual_seed(1)))
    rates = (
        0.2 * torch.linspace(1, 0.5, 50, dtype=F64)
        if scheduled
        else torch.full((50,), 0.2, dtype=F64)
    )
    training = dict(momentum=momentum, weight_decay=decay)

    model = copy.deepcopy(net)
    optimizer = getattr(optim, kind.__name__)(
        model.parameters(), torch.optim.SGD, rho=0.3, lr=0.2, **training
    )
    for i, rho, rate in zip(batches, RADII.tolist(), rates.tolist()):

        def closure():
            optimizer.zero_grad()
            value = loss(model(X[i]), y[i])
            value.backward()
            return value

        optimizer.param_groups[0].update(rho=rho, lr=rate)
        optimizer.step(closure)
    known = torch.cat([p.detach().flatten() for p in model.parameters()])

    def end(rho_schedule):
        more = dict(schedule=rates) if scheduled else {}
        chain = Chain(kind(0.3), objective, 0.2, rho_schedule=rho_schedule, **training, **more)
        state = chain.start(objective.x0)
        for i in batches:
            state = chain.step(state, i)
        return chain.position(state)

    def share(t):  # of the first radius, at time t = k η_e
        return 1 - 0.9 * t / (49 * 0.2 / (1 - momentum))

    assert_close(end(RADII), known, rtol=0, atol=1e-12)
    assert_close(end(share), known, rtol=0, atol=1e-12)
    assert (end(None) - known).abs().max() > 1e-3


def linear_run(process, steps, substeps):
    """Mean and variance on the line, from 1, by advancing means and basis vectors"""

    def advance(x, xi, k):
        state = torch.cat([x, torch.full_like(x, k)], -1) if process.memory else x
        noise = iter(xi)
        h = process.time_step / substeps
        return process.position(process.advance(state, noise.__next__, [h] * substeps))

    mean, variance, silent = 1.0, 0.0, torch.zeros(substeps, 1, 1, dtype=F64)
    for k in range(steps):
        F = advance(torch.ones(1, 1, dtype=F64), silent, k).item()
        units = torch.eye(substeps, dtype=F64)[:, :, None]  # the draws, one path for each
        B = advance(torch.zeros(substeps, 1, dtype=F64), units, k)
        mean, variance = F * mean, F**2 * variance + B.square().sum().item()
    return mean, variance


def moments_by_hand(
    steps,
    eta,
    *,
    rate=lambda t: 1.0,
    radius=lambda t: 1.0,
    mu=0.0,
    damped=0.0,
    decay=0.0,
    first=1.0,
):
    """Mean and variance on the line, from 1, of torch's SGD fed by USAM at ρ = 0.3; `first` is the share of the first gradient in the buffer"""
    mean, cov = np.array([1.0, 0.0]), np.zeros((2, 2))
    for k in range(steps):
        t = k * eta * (1 - damped) / (1 - mu)
        lift, w = 1 + 0.3 * radius(t) * 1.3, first if k == 0 else 1 - damped
        a, s = w * (1.3 * lift + decay), w * 0.7 * lift
        F = np.array([[1 - eta * rate(t) * a, -eta * rate(t) * mu], [a, mu]])
        b = np.array([-eta * rate(t) * s, s])
        mean, cov = F @ mean, F @ cov @ F.T + np.outer(b, b)
    return mean[0], cov[0, 0]


@pytest.mark.parametrize(
    "how", [dict(), dict(mu=0.9, damped=0.9), dict(mu=0.5, damped=0.3, decay=0.2)]
)
@pytest.mark.parametrize("scheduled", [False, True])
def test_exact_moments_of_a_chain_that_counts_its_steps(how, scheduled):
    """Under schedules, and with a first buffer that is not dampened, by a recursion by hand. The controls forget either."""
    factors = dict(rate=lambda t: 1 / (1 + t), radius=lambda t: 0.5 + t / 4) if scheduled else {}
    names = dict(
        zip(
            ("momentum", "dampening", "weight_decay"),
            (how.get(k, 0.0) for k in ("mu", "damped", "decay")),
        )
    )
    chain = Chain(
        USAM(0.3),
        line,
        0.1,
        **names,
        schedule=factors.get("rate"),
        rho_schedule=factors.get("radius"),
    )
    mean, cov = linear_moments(chain, one, 7 * float(chain.time_step))
    known = moments_by_hand(7, 0.1, **how, **factors)
    assert_close((mean.item(), cov.item()), known, rtol=1e-11, atol=0)
    if scheduled:
        assert abs(moments_by_hand(7, 0.1, **how)[0] / known[0] - 1) > 1e-2
    if "damped" in how:
        assert (
            abs(
                moments_by_hand(7, 0.1, **how, **factors, first=1 - how["damped"])[0] / known[0] - 1
            )
            > 1e-2
        )


def test_stationary_with_dampening():
    """E3's number; the controls are momentum without dampening, and none."""
    found = stationary_covariance(Chain(USAM(0.3), line, 0.1, momentum=0.9, dampening=0.9)).item()
    assert abs(found - 0.026321318643) < 1e-11
    assert (
        abs(stationary_covariance(Chain(USAM(0.3), line, 0.1, momentum=0.9)).item() - found) > 0.2
    )
    assert abs(stationary_covariance(Chain(USAM(0.3), line, 0.1)).item() - found) > 1e-3


def test_a_schedule_of_the_radius_on_a_quadratic():
    """Mean and variance of the SDE by hand: of Euler's method to rounding, and of the SDE to O(h);
    those of a chain to rounding. The control is the radius without its schedule."""
    eta, s, lam, steps = 0.05, 0.7, 1.3, 20

    def share(t):
        return 1 / (1 + t)

    def rate(t):  # A and the factor of the noise
        return lam * (1 + 0.3 * share(t) * lam), s * (1 + 0.3 * share(t) * lam)

    def by_hand(substeps):
        mean, variance, h = 1.0, 0.0, eta / substeps
        for j in range(steps * substeps):
            A, b = rate(j * h)
            mean, variance = (1 - h * A) * mean, (1 - h * A) ** 2 * variance + eta * h * b**2
        return mean, variance

    sde, plain = (SDE(USAM(0.3), line, eta, rho_schedule=f) for f in (share, None))
    for substeps in (1, 4):
        assert linear_run(sde, steps, substeps) == pytest.approx(by_hand(substeps), rel=1e-12)
        wrong = linear_run(plain, steps, substeps)
        assert abs(wrong[0] / by_hand(substeps)[0] - 1) > 0.05
        assert abs(wrong[1] / by_hand(substeps)[1] - 1) > 0.05
    # the integral of A to time 1 is λ + 0.3 λ² ln 2
    exact = math.exp(-lam - 0.3 * lam**2 * math.log(2))
    assert abs(by_hand(64)[0] / exact - 1) < 2e-3 < abs(linear_run(plain, steps, 64)[0] / exact - 1)

    found = linear_run(Chain(USAM(0.3), line, eta, rho_schedule=share), steps, 1)
    assert found == pytest.approx(by_hand(1), rel=1e-12)  # its step is Euler's


def test_schedules_of_rates_and_radii_together():
    """The kinetic model and the chain with both: one step by hand, at its own radius and rate."""
    half, third = (torch.tensor([1.0, r], dtype=F64) for r in (0.5, 1 / 3))
    chain = Chain(USAM(0.3), line, 0.1, schedule=0.1 * half, rho_schedule=0.3 * third)
    x = chain.step(chain.start(one), torch.zeros(1, dtype=F64))
    y = chain.step(x, torch.zeros(1, dtype=F64))
    assert_close(y[:1], x[:1] * (1 - 0.05 * 1.3 * (1 + 0.1 * 1.3)))

    quiet = Quadratic(torch.tensor([[1.3]], dtype=F64))
    sde = SDE(USAM(0.3), quiet, 0.01, momentum=0.9, kinetic=True, rho_schedule=0.3 * third)
    state = torch.tensor([1.0, 0.0, 1.0], dtype=F64)  # x, P and the number of steps
    after = sde.advance(state, lambda: torch.zeros(1, dtype=F64), [0.1])
    small = KineticSDE(USAM(0.1), quiet, 0.01, momentum=0.9)
    known = small.advance(state[:2], lambda: torch.zeros(1, dtype=F64), [0.1])
    assert_close(after, torch.cat([known, torch.full((1,), 2.0, dtype=F64)]))


def test_weak_error_with_a_schedule_of_the_radius():
    """The difference of means on common noise is that by hand; without the schedule it is not."""

    def share(t):
        return 1 / (1 + t)

    def point(x):
        return x[..., 0]

    chain, sde, plain = (
        cls(USAM(0.3), line, 0.05, rho_schedule=f)
        for cls, f in [(Chain, share), (SDE, share), (SDE, None)]
    )
    found = weak_error(chain, sde, one, 1.0, point, 2000)
    exact = linear_run(chain, 20, 1)[0] - linear_run(sde, 20, 64)[0]
    assert abs(found.difference - exact) < 4 * found.sem + 1e-4
    wrong = weak_error(chain, plain, one, 1.0, point, 2000)
    assert abs(wrong.difference - exact) > 8 * wrong.sem


def test_kinetic_is_the_class():
    """SDE(..., kinetic=True) is KineticSDE in all but its name; the control is the plain SDE."""
    how = dict(momentum=0.9, weight_decay=0.1)
    a, b = (
        cls(USAM(0.2), plane, 0.01, **how, **more)
        for cls, more in [(SDE, dict(kinetic=True)), (KineticSDE, {})]
    )
    assert a.time_step == b.time_step == 0.1 and a.memory == b.memory == ("v",)
    assert_close(stationary_covariance(a), stationary_covariance(b), rtol=0, atol=0)
    ends = [simulate(p, two, 1.0, 50).final for p in (a, b)]
    assert ends[0].equal(ends[1])
    plain = SDE(USAM(0.2), plane, 0.01, **how)
    assert not torch.allclose(stationary_covariance(plain), stationary_covariance(a), rtol=0.01)


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
        {"SAM": SAM(0.1)},
        {"line": line},
        [0.1],
        t_end=2.0,
        n_paths=50,
        x0=one,
        processes={"trained": trained},
        observe={"f": loss},
        interval=0.4,
    )
    assert table["time"].tolist() == pytest.approx([0.0, 0.4, 0.8, 1.2, 1.6, 2.0])
    chain = trained(SAM(0.1), line, 0.1)
    ends = [
        simulate(chain, one, 2.0, 4000, observe=line.loss, seed=s).mean["loss"][-1] for s in (0, 1)
    ]
    assert abs(table["mean"].iloc[-1] - ends[0].item()) < 5 * table["sem"].iloc[-1]
    assert len(table) == 6 and table["mean"].notna().all()


def test_formulas_for_plain_steps_refuse_trained_ones():
    for process in (
        Chain(USAM(0.1), plane, 0.1, momentum=0.5),
        SDE(USAM(0.1), plane, 0.1, weight_decay=0.1),
    ):
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


SCHEDULES = {
    "function": dict(schedule=lambda t: 1 - t / 2),
    "jump": dict(schedule=lambda t: 1.0 if t < 0.5 else 0.1),
    "rates": dict(schedule=torch.linspace(1, 0.1, 4, dtype=F64)),  # times η
    "radii": dict(rho_schedule=lambda t: 1 - t / 2),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kinetic", [False, True])
def test_moments_of_an_sde_under_a_schedule(name, kinetic):
    """Against small steps of their equations, extrapolated; without the schedule it must fail."""
    eta, training = (1 / 16, dict(momentum=0.75, kinetic=True)) if kinetic else (1 / 4, {})
    how = SCHEDULES[name]
    if name == "rates":
        how = dict(schedule=eta * how["schedule"])
    sde, plain = (SDE(USAM(0.3), plane, eta, **training, **more) for more in (how, {}))
    assert sde.time_step == 1 / 4
    found = linear_moments(sde, two, 1.0)

    def by_steps(n):  # of the midpoint rule
        m = sde.width - 1
        mean, V = sde.start(two)[:m].double(), torch.zeros(m, m, dtype=F64)
        for i in range(n):
            F, C = map(torch.from_numpy, rate_system(sde, (i + 0.5) / n / float(sde.time_step)))
            half = mean + F @ mean / n / 2, V + (F @ V + V @ F.T + C) / n / 2
            mean, V = mean + F @ half[0] / n, V + (F @ half[1] + half[1] @ F.T + C) / n
        return mean[:2], V[:2, :2]

    for ours, fine, coarse in zip(found, by_steps(800), by_steps(400)):
        assert_close(ours, (4 * fine - coarse) / 3, rtol=0, atol=3e-6)
    assert (linear_moments(plain, two, 1.0)[0] - found[0]).abs().max() > 1e-3


def test_a_weak_error_of_a_kinetic_model():
    """Its time is √η a step, the chain's η/(1 − μ); SGD's kinetic model must fail."""
    eta = 2.0**-6
    mu = 1 - 0.5 * eta**0.5
    chain, sde = (
        Chain(USAM(0.3), line, eta, momentum=mu),
        KineticSDE(USAM(0.3), line, eta, momentum=mu),
    )
    end = round(2 / eta**0.5) * chain.time_step
    truth = (linear_moments(chain, one, end)[0] - linear_moments(sde, one, 2.0)[0]).item()
    found = weak_error(chain, sde, one, 2.0, lambda x: x[..., 0], 2000)
    assert (
        found.paired
        and abs(found.difference - truth) < 4 * found.sem
        and found.curve.time.iloc[-1] == 2.0
    )
    other = weak_error(
        chain, KineticSDE(SGD(), line, eta, momentum=mu), one, 2.0, lambda x: x[..., 0], 2000
    )
    assert abs(other.difference - truth) > 10 * other.sem


@pytest.mark.parametrize("name", ["schedule", "rho_schedule"])
def test_a_function_of_time_is_another_schedule_in_a_kinetic_model(name):
    """At the same step the times differ, by 1 - mu. Rates of each step are the same in both."""

    def falling(t):
        return 1 / (1 + t)

    def pair(eta, schedule):
        how = {"momentum": 1 - 0.8 * eta**0.5, name: schedule}
        return Chain(USAM(0.3), line, eta, **how), KineticSDE(USAM(0.3), line, eta, **how)

    def gap(eta, chain, sde):
        n = round(2 / eta**0.5)
        ends = [linear_moments(p, one, n * float(p.time_step))[0] for p in (chain, sde)]
        return (ends[0] - ends[1]).abs().item()

    chain, sde = pair(2.0**-6, falling)
    with pytest.raises(ValueError, match=f"{name} is a function of time, which runs by √η"):
        weak_error(chain, sde, one, 2.0, lambda x: x[..., 0], 100)
    gaps = dict(rates=[], function=[])
    for eta in (2.0**-10, 2.0**-12, 2.0**-14):
        steps = torch.arange(round(2 / eta**0.5), dtype=F64) * eta**0.5
        value = eta if name == "schedule" else 0.3
        gaps["rates"].append(gap(eta, *pair(eta, value * falling(steps))))
        gaps["function"].append(gap(eta, *pair(eta, falling)))
    assert gaps["rates"][2] < 0.6 * gaps["rates"][1] < 0.36 * gaps["rates"][0]
    assert gaps["function"][2] > 0.6 * gaps["function"][1]  # the control


def test_what_exact_numbers_do_not_follow_from_is_refused():
    """A step, a draw or a diffusion of one's own says nothing to the exact operators, nor a step to a simulation."""
    circle, bowl = periodic_examples(1)[USAM], Quadratic(torch.eye(1, dtype=F64), sigma=0.1)
    x = torch.ones(1, dtype=F64)

    def of(base, name):
        method = lambda self, *args, **how: getattr(base, name)(self, *args, **how)
        return type("Own", (base,), {name: method})

    for base, names in ((Chain, ("draw", "advance")), (SDE, ("draw", "advance", "step", "moments", "diffusion"))):
        for name in names:
            pair = [of(cls, name) if cls is base else cls for cls in (Chain, SDE)]
            chain, sde = (cls(USAM(0.1), circle, 0.1) for cls in pair)
            with pytest.raises(ValueError, match=f"Own overrides {name}, but exact numbers follow"):
                exact_error(chain, sde, 1.0, np.sin)
    for name in ("step", "moments", "covariance"):
        for how in ({}, dict(momentum=0.5, kinetic=True), dict(schedule=lambda t: 1.0)):
            with pytest.raises(ValueError, match=f"Own overrides {name}, but a simulation goes by"):
                simulate(of(SDE, name)(USAM(0.1), bowl, 0.1, **how), x, 10 * 0.1**0.5 if "kinetic" in how else 1.0, 4)

    class Loud(Chain):
        def draw(self, *args, **how):
            return 2 * super().draw(*args, **how)

    def square(x):
        return x.square().sum(-1)

    found = weak_error(Loud(SGD(), bowl, 0.1), SDE(SGD(), bowl, 0.1), x, 1.0, square, 4000)
    moments = [linear_moments(cls(SGD(), bowl, 0.1), x, 1.0) for cls in (Chain, SDE)]
    (mean, V), (other, W) = moments
    gap = (mean**2 + 4 * V - other**2 - W).item()
    assert not found.paired and abs(found.difference - gap) < 4 * found.sem < abs(gap)


def test_exact_moments_of_classes_of_ones_own():
    """A drift that is not linear, or a diffusion without its covariance, is refused; a linear one is taken."""
    o, x = Quadratic(torch.eye(2, dtype=F64), sigma=0.1), torch.ones(2, dtype=F64)

    class Wind(SDE):
        def drift(self, x, seed=None):
            return super().drift(x, seed) + 1

    class Still(SDE):
        def diffusion(self, x, xi, seed=None):
            return 0 * xi

    class Slow(SDE):
        def drift(self, x, seed=None):
            return super().drift(x, seed) / 2

    class Bent(Quadratic):
        def loss(self, x):
            return super().loss(x) + (x**4).sum(-1)

        def grad(self, x):
            return super().grad(x) + 4 * x**3

    with pytest.raises(ValueError, match="Wind on Quadratic is not linear"):
        linear_moments(Wind(USAM(0.1), o, 0.1), x, 1.0)
    with pytest.raises(ValueError, match="Still overrides diffusion, but exact numbers"):
        linear_moments(Still(USAM(0.1), o, 0.1), x, 1.0)
    with pytest.raises(ValueError, match="Bent contradicts itself"):
        linear_moments(Chain(SGD(), Bent(o.H, sigma=0.1), 0.1), x, 1.0)

    class Pushed(Chain):
        def step(self, state, gamma):
            return super().step(state, gamma) + 0.1

    with pytest.raises(ValueError, match="Pushed on Quadratic is not linear"):
        linear_moments(Pushed(SGD(), o, 0.1), x, 1.0)

    class Clipped(Chain):
        def step(self, state, gamma):
            return super().step(state, gamma.clamp(-0.1, 0.1))

    class Wider(SDE):
        def covariance(self, x):
            return super().covariance(x) * (1 + x[..., :1, None] ** 2)

    class Elsewhere(SDE):
        def position(self, state):
            return super().position(state) + 1

    for process in (Clipped, Wider, Elsewhere):
        with pytest.raises(ValueError, match=f"{process.__name__} on Quadratic is not linear"):
            stationary_covariance(process(SGD(), o, 0.1))
    with pytest.raises(TypeError, match="the closure is of a Chain or an SDE itself, got Wider"):
        suboptimality(Wider(SGD(), o, 0.1))
    mean = linear_moments(Slow(SGD(), o, 0.1), x, 1.0)[0]
    assert_close(mean, x * math.exp(-0.5))
    ensemble = simulate(Wind(SGD(), o, 0.1), x, 1.0, 400)
    known = x * 0.9**10 + (1 - 0.9**10)
    assert ((ensemble.mean["x"][-1] - known).abs() < 4 * ensemble.sem["x"][-1]).all()


def test_rates_and_a_function_of_the_radius_together():
    """The moments of an SDE ask for the rates of the steps that it takes alone; as many were too few."""
    bowl, x = Quadratic(torch.tensor([[1.2, 0.3], [0.3, 0.7]], dtype=F64)), torch.tensor([1.0, -2.0], dtype=F64)
    rates = torch.tensor([0.1, 0.02, 0.06, 0.03], dtype=F64)
    sde = SDE(USAM(0.4), bowl, 0.1, schedule=rates, rho_schedule=lambda t: 1 / (1 + t))
    found = linear_moments(sde, x, 0.4)[0]
    coarse, fine = (simulate(sde, x, 0.4, 2, dt=0.1 / n).final[0] for n in (128, 256))
    assert_close(found, 2 * fine - coarse, rtol=0, atol=1e-6)
    assert (found - fine).abs().max() > 1e-5
