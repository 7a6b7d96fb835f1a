"""Which samples perturb: micro-batches, sources and a metric, on every objective and through every function."""

import itertools

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from samsde import optim
from samsde.algorithm import DNSAM, SAM, USAM, Algorithm, Chain
from samsde.ensemble import simulate
from samsde.experiments.examples import SignSAM
from samsde.hessian_noise import cross_covariance, noise_covariance, sgd_covariance
from samsde.implicit_regularizer import drift, regularized_loss
from samsde.moments import product
from samsde.objective import FiniteSum, NoisyLoss, Quadratic
from samsde.sde import SDE, SecondOrderScheme
from samsde.weak_errors import (
    chain_operator,
    circle_problem,
    exact_error,
    mean_after,
    periodic_examples,
)

F64 = torch.float64


class Tanh(Algorithm):
    """No potential"""

    def perturbation(self, objective, x, gamma):
        return objective.sample_grad(x, gamma).tanh()


KINDS = [USAM, DNSAM, SAM, SignSAM, Tanh]
SOURCES = ["own", "full", "independent", "previous"]


def objectives(dtype=F64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

    A, y, H = normal(6, 3), normal(6), normal(3, 3)
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
    module = FiniteSum.from_module(net.to(dtype), torch.nn.MSELoss(), A, y[:, None], batch_size=2)

    def losses(x):
        return torch.log1p(torch.exp(-y * torch.tanh(A @ x)))

    return {
        "quadratic": Quadratic(H @ H.T, 0.2),
        "covariance": Quadratic(H @ H.T, cov=H.T @ H),
        "noisy": NoisyLoss(lambda x: torch.log1p(x.square().sum()) + x[0] * x[1], 3, 0.2),
        "sum": FiniteSum(losses, 6, 3),
        "sum, B=4": FiniteSum(losses, 6, 3, 4, False),
        "module, B=2": module,
    }


def variants(kind, objective, rho=0.1):
    """All that makes sense for an objective"""
    out = [kind(rho, source=source) for source in SOURCES]
    if isinstance(objective, FiniteSum):
        out.append(kind(rho, micro_batch=1))
        if objective.law.batch_size == 4:
            out += [kind(rho, micro_batch=2), kind(rho, micro_batch=2, source="independent")]
    if kind in (USAM, DNSAM, SAM):
        out.append(kind(rho, adaptive=True))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", objectives())
def test_in_kind(name, dtype):
    objective = objectives(dtype)[name]
    x = torch.randn(4, 2, objective.dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    for kind in KINDS:
        for a in variants(kind, objective):
            sde = SDE(a, objective, 0.1, draws=16)
            xi = torch.ones(4, 2, sde.noise_dim, dtype=dtype)
            points = [drift(a, objective, x, draws=16), sde.diffusion(x, xi), sde.step(x, xi, 0.05)]
            matrices = [f(a, objective, x, draws=16) for f in (cross_covariance, noise_covariance)]
            for t in points:
                assert t.shape == x.shape and t.dtype == dtype and t.isfinite().all(), a
            for t in matrices:
                assert t.shape == (*x.shape, objective.dim) and t.dtype == dtype, a
                assert t.isfinite().all(), a
            end = simulate(Chain(a, objective, 0.1), x[0, 0], 0.3, 4).final
            assert (
                end.shape == (4, objective.dim) and end.dtype == dtype and end.isfinite().all()
            ), a


@pytest.mark.parametrize("name", objectives())
def test_a_step_is_drift_and_noise(name):
    """And the noise is that of the covariance; the control is a noise of the other sign."""
    objective, generator = objectives()[name], torch.Generator().manual_seed(2)
    x = torch.randn(2, objective.dim, generator=generator, dtype=F64)
    for kind in KINDS:
        for a in variants(kind, objective):
            for settings in (dict(), dict(noise="sgd"), dict(expansion="exact", noise="exact")):
                exact_noise = "expansion" in settings
                if a.source == "previous" and exact_noise and isinstance(objective, FiniteSum):
                    continue  # needs all pairs: test_micro_batches_of_the_batch_before
                sde = SDE(a, objective, 0.1, draws=12, **settings)
                xi = sde.draw((2,), generator, dtype=F64)
                both = x + 0.05 * sde.drift(x) + 0.05**0.5 * sde.diffusion(x, xi)
                assert_close(sde.step(x, xi, 0.05), both, rtol=1e-9, atol=1e-11)
                assert not torch.allclose(sde.step(x, -xi, 0.05), both, rtol=1e-3)
                units = torch.eye(sde.noise_dim, dtype=F64)
                columns = torch.stack([sde.diffusion(x, e.expand(2, -1)) for e in units])
                assert_close(product(columns, columns), sde.covariance(x), rtol=1e-8, atol=1e-10)


def covariance(G, other=None):
    other = G if other is None else other
    return (G - G.mean(0)).T @ (other - other.mean(0)) / len(G)


def ordered(n, B, replace):
    """Every batch, in every order"""
    sets = itertools.product(range(n), repeat=B) if replace else itertools.permutations(range(n), B)
    return torch.tensor(list(sets))


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_by_enumeration(kind, m, replace):
    """Theorem 6c.2, N = 6, d = 3, B = 4: mean and S to rounding, over all batches."""
    objective = FiniteSum(objectives()["sum"].sample_losses, 6, 3, 4, replace)
    x = torch.tensor([0.4, -0.7, 0.2], dtype=F64)
    batches = ordered(6, 4, replace)
    cuts = batches.unflatten(-1, (4 // m, m)).movedim(1, 0)
    u = kind(0.1).perturbation(objective, x, cuts)
    Hu = objective.sample_hvp(x, cuts, u).mean(0)
    g = objective.sample_grad(x, batches)
    S = (g - g.mean(0)).T @ (Hu - Hu.mean(0)) / len(g)
    a = kind(0.1, micro_batch=m)
    how = dict(draws=2000)
    assert_close(
        -drift(a, objective, x, **how) - objective.grad(x), 0.1 * Hu.mean(0), rtol=1e-9, atol=1e-11
    )
    assert_close(cross_covariance(a, objective, x, **how), S, rtol=1e-9, atol=1e-11)
    part = drift(kind(0.1), objective.with_batch(m), x, "exact", **how)
    assert_close(drift(a, objective, x, "exact", **how), part, rtol=1e-9, atol=1e-11)
    if m < 4:  # the control
        whole = kind(0.1)
        assert not torch.allclose(drift(whole, objective, x, "exact", **how), part, rtol=1e-4)
        assert not torch.allclose(cross_covariance(whole, objective, x, **how), S, rtol=1e-2)
    G = a.direction(objective, x, batches)
    assert_close(
        noise_covariance(a, objective, x, "exact", **how), covariance(G), rtol=1e-9, atol=1e-11
    )
    assert_close(drift(a, objective, x, "exact", **how), -G.mean(0), rtol=1e-9, atol=1e-11)


def first_samples(n, B):
    losses = objectives()["sum"].sample_losses
    return FiniteSum(lambda x: losses(x)[:n], n, 3, B, replace=False)


@pytest.mark.parametrize("B", [4, 5])
@pytest.mark.parametrize("m", [1, 2, 4, 5])
def test_exact_micro_batches_without_replacement(m, B):
    """All pairs of ordered batches out of five. Micro-batches of an independent source are no θ-th part of one."""
    if B % m:
        pytest.skip("m divides B")
    objective = first_samples(5, B)
    x = torch.tensor([0.4, -0.7, 0.2], dtype=F64)
    batches = ordered(5, B, False)
    pairs = torch.cat([batches.repeat_interleave(120, 0), batches.repeat(120, 1)], -1)
    for source, gammas in [("own", batches), ("independent", pairs), ("full", batches)]:
        a = SAM(0.3, micro_batch=m, source=source)
        G = a.direction(objective, x.expand(len(gammas), 3), gammas)
        how = dict(draws=20_000)
        assert_close(
            noise_covariance(a, objective, x, "exact", **how), covariance(G), rtol=1e-9, atol=1e-12
        )
        assert_close(drift(a, objective, x, "exact", **how), -G.mean(0), rtol=1e-9, atol=1e-12)
        if m < B < 5 and source != "full":
            whole = SAM(0.3, source=source)
            assert not torch.allclose(
                noise_covariance(whole, objective, x, "exact", **how), covariance(G), rtol=0.05
            )


def test_all_samples_are_cut_at_random():
    """A batch of all samples has micro-batches all the same, in another order for each path and step."""
    objective = FiniteSum(objectives()["sum"].sample_losses, 6, 3, 6, False)
    gen = torch.Generator().manual_seed(0)
    drawn = SAM(0.1, micro_batch=2).draw(objective, (6_000,), gen)
    assert drawn.sort(-1).values.equal(torch.arange(6).expand(6_000, 6))
    together = (drawn[:, :2].sort(-1).values == torch.tensor([0, 1])).all(-1).double()
    assert abs(together.mean() - 1 / 15) < 4 * (14 / 225 / 6_000) ** 0.5
    assert SAM(0.1).draw(objective, (2,), gen).equal(torch.arange(6).expand(2, 6))


@pytest.mark.parametrize("m", [None, 1, 2])
def test_micro_batches_of_the_batch_before(m):
    """Each micro-batch is perturbed by the one in its place in the batch before: the chain against the
    drift, and the long-run covariance of all triples of batches against the columns."""
    objective = first_samples(4, 2)
    x, how = torch.tensor([0.4, -0.7, 0.2], dtype=F64), dict(draws=200)
    a, other = (SAM(0.3, micro_batch=m, source=source) for source in ("previous", "independent"))
    batches = ordered(4, 2, False)
    n = len(batches)
    pairs = torch.cat([batches.repeat_interleave(n, 0), batches.repeat(n, 1)], -1)
    G = other.direction(objective, x.expand(len(pairs), 3), pairs).unflatten(
        0, (n, n)
    )  # new, before
    chain = Chain(a, objective, 1e-3)
    start = chain.step(
        chain.start(x.expand(n, 3)), batches
    )  # is at another x, but remembers u at x
    start[..., :3] = x
    moved = chain.position(chain.step(start.repeat_interleave(n, 0), batches.repeat(n, 1)))
    assert_close((x - moved) / 1e-3, G.transpose(0, 1).flatten(0, 1), rtol=1e-8, atol=1e-9)
    assert_close(drift(a, objective, x, "exact", **how), -G.mean((0, 1)), rtol=1e-9, atol=1e-12)
    G = G - G.mean((0, 1))
    single = torch.einsum("ija,ijb->ab", G, G) / n**2
    following = torch.einsum("ija,kib->ab", G, G) / n**3
    known = single + following + following.T
    sde = SDE(a, objective, 0.1, expansion="exact", noise="exact", draws=200)
    assert_close(sde.covariance(x), 0.1 * known, rtol=1e-9, atol=1e-12)
    columns = sde.diffusion(x.expand(sde.noise_dim, 3), torch.eye(sde.noise_dim, dtype=F64))
    assert_close(columns.T @ columns, 0.1 * known, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(single, known, rtol=0.05)
    with pytest.raises(ValueError, match="needs all pairs of minibatches: draws must be at least"):
        noise_covariance(a, objective, x, "exact", draws=8)


def test_the_exact_operator_cuts_in_all_ways():
    """B = N = 4 on the circle, m = 2: E v(x − ηG) over all orders, against one order of them."""
    a, m, p = (0.9, 0.6, 0.5, 0.3), (1, 2, 1, 2), (0.2, 1.1, 2.3, 0.7)
    problem = circle_problem((0.5, -0.2, 0.1, 0.4), a, m, p, batch_size=4, replace=False)
    chain = Chain(USAM(0.4, micro_batch=2), problem, 0.3)
    nodes = 2 * np.pi * np.arange(32) / 32
    x = torch.from_numpy(nodes)[:, None]
    every = ordered(4, 4, False)
    ends = torch.stack([chain.step(x, order.expand(32, 4))[:, 0] for order in every])
    found = chain_operator(chain, 32) @ np.sin(nodes)
    assert_close(torch.from_numpy(found), ends.sin().mean(0), rtol=1e-10, atol=1e-12)
    assert (ends.sin().mean(0) - ends[0].sin()).abs().max() > 1e-4


REMEMBERS = {
    "previous": dict(source="previous"),
    "previous, micro-batches": dict(source="previous", micro_batch=1),
    "momentum": dict(momentum=0.5),
    "torch's first buffer": dict(momentum=0.5, dampening=0.4),
    "Nesterov": dict(momentum=0.5, nesterov=True),
    "schedules": dict(
        momentum=0.5, schedule=lambda t: 1 / (1 + t), rho_schedule=lambda t: 1 - t / 2
    ),
}


@pytest.mark.parametrize("name", REMEMBERS)
@pytest.mark.parametrize("replace", [True, False])
def test_exact_operators_that_remember(name, replace):
    """Three steps on the circle: E φ over all γ, against the operators; two steps must differ."""
    how = REMEMBERS[name]
    training = {k: v for k, v in how.items() if k not in ("source", "micro_batch")}
    algorithm = USAM(0.4, **{k: v for k, v in how.items() if k not in training})
    problem = periodic_examples(1, batch_size=2, replace=replace)[USAM]
    chain = Chain(algorithm, problem, 0.2, **training)
    x = torch.tensor([[0.3], [2.0], [5.0]], dtype=F64)
    every = ordered(3, 2, replace)
    states = chain.start(x)
    for _ in range(3):
        states = torch.cat([chain.step(states, gamma.expand(len(states), 2)) for gamma in every])
    known = torch.sin(chain.position(states)[:, 0]).reshape(-1, 3).mean(0)
    nodes = (24, 11) if "micro" in name else (48, 17)
    found, other = (mean_after(chain, steps, np.sin, x, *nodes)[0] for steps in (3, 2))
    assert_close(torch.from_numpy(found), known, rtol=0, atol=2e-7)
    assert abs(other - found).max() > 1e-2


@pytest.mark.parametrize("how", [{}, dict(micro_batch=1)], ids=["whole", "micro-batches"])
def test_the_second_order_of_the_previous_batch(how):
    """Order 2 on the circle; without the correction of Eq. (6c.1) the order is 1."""

    class Plain(SDE):
        scheme = property(SecondOrderScheme)

    problem = periodic_examples(1, batch_size=2, replace=False)[USAM]
    second = dict(expansion="exact", noise="exact", order=2)

    def errors(model, etas=(2.0**-5, 2.0**-6)):
        a = USAM(0.3, source="previous", **how)
        pairs = [(Chain(a, problem, eta), model(a, problem, eta, **second)) for eta in etas]
        return [exact_error(*pair, 1, np.sin, 32, 9) for pair in pairs]

    own, plain = errors(SDE), errors(Plain)
    assert abs(np.log2(own[0] / own[1]) - 2) < 0.1
    assert abs(np.log2(plain[0] / plain[1]) - 1) < 0.1 and plain[1] > 5 * own[1]


@pytest.mark.parametrize("kind", KINDS)
def test_sources_by_enumeration(kind):
    """B = 2 out of 6: the mean and S of every source, from all pairs of batches."""
    objective = FiniteSum(objectives()["sum"].sample_losses, 6, 3, 2, False)
    x = torch.tensor([0.4, -0.7, 0.2], dtype=F64)
    every = torch.combinations(torch.arange(6), 2)
    u, g = kind(0.1).perturbation(objective, x, every), objective.sample_grad(x, every)
    H = torch.stack(
        [objective.sample_hvp(x, every, e.expand(15, 3)) for e in torch.eye(3, dtype=F64)], -1
    )
    full = kind(0.1, source="full").ascent(objective, x, x)
    pairs = torch.einsum("kab,lb->kla", H, u)  # H of one batch, u of another
    mean = H.mean(0) @ u.mean(0)
    centred = (g - g.mean(0)) / len(g)
    known = {
        "full": (H.mean(0) @ full, centred.T @ (H @ full)),
        "independent": (mean, centred.T @ pairs.mean(1)),
        "previous": (mean, centred.T @ (pairs.mean(1) + u @ H.mean(0).T)),
    }
    for source, (Hv, S) in known.items():
        a = kind(0.1, source=source)
        assert_close(-drift(a, objective, x) - objective.grad(x), 0.1 * Hv, rtol=1e-9, atol=1e-11)
        assert_close(cross_covariance(a, objective, x), S, rtol=1e-9, atol=1e-11)
        assert not torch.allclose(cross_covariance(kind(0.1), objective, x), S, rtol=1e-2)
    assert_close(sgd_covariance(objective, x), centred.T @ (g - g.mean(0)))


def test_a_sweep_over_the_radius_is_its_members():
    rho, objective = torch.tensor([0.05, 0.1, 0.3], dtype=F64), objectives()["sum, B=4"]
    x = torch.ones(3, objective.dim, dtype=F64)
    for kind in (USAM, SAM):
        for whole, *members in zip(*(variants(kind, objective, r) for r in [rho, *rho.tolist()])):
            sde = SDE(whole, objective, 0.1, draws=8)
            xi = sde.draw((3,), torch.Generator().manual_seed(0), dtype=F64)
            steps = sde.step(x, xi, 0.05)
            for j, a in enumerate(members):
                one = SDE(a, objective, 0.1, draws=8)
                assert_close(one.step(x[j], xi[j], 0.05), steps[j], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "source", [pytest.param(s, marks=pytest.mark.slow) if s == "full" else s for s in SOURCES]
)
def test_records_chunks_and_files_change_nothing(source, tmp_path):
    """A run with and without records, in chunks, and from a file gives the same bits."""
    objective = objectives()["module, B=2"]
    for process in (
        Chain(SAM(0.1, source=source), objective, 0.1),
        SDE(SAM(0.1, source=source), objective, 0.1, draws=8),
    ):
        x0, how = objective.x0, dict(t_end=26.0, n_paths=8, every=50)
        known = simulate(process, x0, **how).final
        assert simulate(process, x0, record=False, **how).final.equal(known)
        file = tmp_path / f"{source}{type(process).__name__}.npz"
        first = simulate(process, x0, chunk=3, threads=2, checkpoint=file, **how).final
        assert first.equal(known)
        assert simulate(process, x0, checkpoint=file, **how).final.equal(known)


@pytest.mark.parametrize("kind", [USAM, SAM, DNSAM])
def test_adaptive_is_the_step_of_the_optimizer(kind):
    """Full batch, ten steps on a module: samsde.optim and the chain, to rounding."""
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2).double()
    X, y = torch.randn(5, 3, dtype=F64), torch.arange(5) % 2
    loss = torch.nn.CrossEntropyLoss()
    objective = FiniteSum.from_module(net, loss, X, y, batch_size=5, replace=False)
    norm = {}
    if kind is DNSAM:

        def scaled_norm():
            with torch.enable_grad():
                grads = torch.autograd.grad(loss(net(X), y), list(net.parameters()))
            parts = [p.detach().abs() * g for p, g in zip(net.parameters(), grads)]
            return torch.cat([t.flatten() for t in parts]).norm()

        norm = dict(full_grad_norm=scaled_norm)
    optimizer = getattr(optim, kind.__name__)(
        net.parameters(), torch.optim.SGD, rho=0.1, adaptive=True, lr=0.2, **norm
    )

    def closure():
        optimizer.zero_grad()
        value = loss(net(X), y)
        value.backward()
        return value

    x, chain = objective.x0, Chain(kind(0.1, adaptive=True), objective, 0.2)
    for _ in range(10):
        optimizer.step(closure)
        x = chain.step(x, torch.arange(5))
    assert_close(
        torch.cat([p.detach().flatten() for p in net.parameters()]), x, rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("source", SOURCES)
def test_a_loss_where_the_drift_descends_one(source):
    """By autograd, on every objective; where there is none, ValueError."""
    for name, objective in objectives().items():
        x = torch.full((objective.dim,), 0.3, dtype=F64).requires_grad_()
        for kind in (USAM, SAM):
            a = kind(0.1, source=source)
            drawn = isinstance(objective, FiniteSum) and objective.law.batch_size > 1
            if (
                kind is SAM
                and source in ("independent", "previous")
                and isinstance(objective, FiniteSum)
            ):
                with pytest.raises(ValueError, match="its drift is not a gradient"):
                    regularized_loss(a, objective, x)
                continue
            if name == "covariance" and kind is SAM and source != "full":
                continue  # drawn, in two ways
            value = regularized_loss(a, objective, x, draws=2000)
            slope = torch.autograd.grad(value, x)[0]
            found = -drift(a, objective, x.detach(), draws=2000)
            assert_close(found, slope, rtol=1e-6 if drawn else 1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [USAM, DNSAM])
def test_an_independent_draw_on_a_quadratic_is_known_exactly(kind):
    """G = H(x + ρc(Hx + Z')) + Z is affine in both draws, so nothing has to be drawn for its moments."""
    H = torch.tensor([[1.3, 0.4], [0.4, 0.7]], dtype=F64)
    cov = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
    x = torch.tensor([1.0, -0.5], dtype=F64)
    objective, algorithm = Quadratic(H, cov=cov), kind(0.3, source="independent")
    rho = 0.3 / (H @ x).norm() if kind is DNSAM else 0.3
    known = cov + rho**2 * H @ cov @ H
    assert_close(noise_covariance(algorithm, objective, x, "exact"), known, rtol=1e-12, atol=0)
    drawn = noise_covariance(algorithm, NoisyLoss(objective.loss, 2, cov=cov), x, "exact")
    assert 1e-3 < (drawn - known).abs().max() < 0.1  # the control, from 1024 draws
