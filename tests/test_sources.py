"""Which samples perturb: micro-batches, sources and a metric, on every objective and through every function."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from samsde import optim
from samsde.algorithm import DNSAM, SAM, USAM, Algorithm, Chain
from samsde.ensemble import simulate
from samsde.hessian_noise import cross_covariance, noise_covariance, sgd_covariance
from samsde.implicit_regularizer import drift, regularized_loss
from samsde.moments import product
from samsde.objective import FiniteSum, NoisyLoss, Quadratic
from samsde.sde import SDE

F64 = torch.float64


class SignSAM(Algorithm):
    def potential(self, g):
        return g.abs().sum(-1)


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
            assert end.shape == (4, objective.dim) and end.dtype == dtype and end.isfinite().all(), a


@pytest.mark.parametrize("name", objectives())
def test_a_step_is_drift_and_noise(name):
    """And the noise is that of the covariance; the control is a noise of the other sign."""
    objective, generator = objectives()[name], torch.Generator().manual_seed(2)
    x = torch.randn(2, objective.dim, generator=generator, dtype=F64)
    for kind in KINDS:
        for a in variants(kind, objective):
            for settings in (dict(), dict(noise="sgd"), dict(expansion="exact", noise="exact")):
                if a.source == "previous" and "expansion" in settings:
                    continue  # has no exact form
                sde = SDE(a, objective, 0.1, draws=12, **settings)
                xi = sde.draw((2,), generator, dtype=F64)
                both = x + 0.05 * sde.drift(x) + 0.05**0.5 * sde.diffusion(x, xi)
                assert_close(sde.step(x, xi, 0.05), both, rtol=1e-9, atol=1e-11)
                assert not torch.allclose(sde.step(x, -xi, 0.05), both, rtol=1e-3)
                units = torch.eye(sde.noise_dim, dtype=F64)
                columns = torch.stack([sde.diffusion(x, e.expand(2, -1)) for e in units])
                assert_close(product(columns, columns), sde.covariance(x), rtol=1e-8, atol=1e-10)


def ordered(n, B, replace):
    """Every batch, in every order"""
    sets = itertools.product(range(n), repeat=B) if replace else itertools.permutations(range(n), B)
    return torch.tensor(list(sets))


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_by_enumeration(kind, m, replace):
    """Theorem of micro-batches, N = 6, d = 3, B = 4: mean and S to rounding, over all batches."""
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
    assert_close(-drift(a, objective, x, **how) - objective.grad(x), 0.1 * Hu.mean(0), rtol=1e-9, atol=1e-11)
    assert_close(cross_covariance(a, objective, x, **how), S, rtol=1e-9, atol=1e-11)
    part = drift(kind(0.1), objective.with_batch(m), x, "exact", **how)
    assert_close(drift(a, objective, x, "exact", **how), part, rtol=1e-9, atol=1e-11)
    if m < 4:  # the control
        whole = kind(0.1)
        assert not torch.allclose(drift(whole, objective, x, "exact", **how), part, rtol=1e-4)
        assert not torch.allclose(cross_covariance(whole, objective, x, **how), S, rtol=1e-2)
    if replace or m in (1, 4):
        G = a.direction(objective, x, batches)
        C = (G - G.mean(0)).T @ (G - G.mean(0)) / len(G)
        assert_close(noise_covariance(a, objective, x, "exact", **how), C, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_sources_by_enumeration(kind):
    """B = 2 out of 6: the mean and S of every source, from all pairs of batches."""
    objective = FiniteSum(objectives()["sum"].sample_losses, 6, 3, 2, False)
    x = torch.tensor([0.4, -0.7, 0.2], dtype=F64)
    every = torch.combinations(torch.arange(6), 2)
    u, g = kind(0.1).perturbation(objective, x, every), objective.sample_grad(x, every)
    H = torch.stack([objective.sample_hvp(x, every, e.expand(15, 3)) for e in torch.eye(3, dtype=F64)], -1)
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


@pytest.mark.parametrize("source", SOURCES)
def test_records_chunks_and_files_change_nothing(source, tmp_path):
    """A run with and without records, in chunks, and from a file gives the same bits."""
    objective = objectives()["module, B=2"]
    for process in (Chain(SAM(0.1, source=source), objective, 0.1), SDE(SAM(0.1, source=source), objective, 0.1, draws=8)):
        x0, how = objective.x0, dict(t_end=30.0, n_paths=8, every=50)
        known = simulate(process, x0, **how).final
        assert simulate(process, x0, record=False, **how).final.equal(known)
        assert simulate(process, x0, chunk=3, threads=2, **how).final.equal(known)
        file = tmp_path / f"{source}{type(process).__name__}.npz"
        first = simulate(process, x0, checkpoint=file, **how).final
        assert first.equal(known) and simulate(process, x0, checkpoint=file, **how).final.equal(known)


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
    assert_close(torch.cat([p.detach().flatten() for p in net.parameters()]), x, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("source", SOURCES)
def test_a_loss_where_the_drift_descends_one(source):
    """By autograd, on every objective; where there is none, ValueError."""
    for name, objective in objectives().items():
        x = torch.full((objective.dim,), 0.3, dtype=F64).requires_grad_()
        for kind in (USAM, SAM):
            a = kind(0.1, source=source)
            drawn = isinstance(objective, FiniteSum) and objective.law.batch_size > 1
            if kind is SAM and source in ("independent", "previous") and isinstance(objective, FiniteSum):
                with pytest.raises(ValueError, match="its drift is not a gradient"):
                    regularized_loss(a, objective, x)
                continue
            if name == "covariance" and kind is SAM and source != "full":
                continue  # drawn, in two ways
            value = regularized_loss(a, objective, x, draws=2000)
            slope = torch.autograd.grad(value, x)[0]
            found = -drift(a, objective, x.detach(), draws=2000)
            assert_close(found, slope, rtol=1e-6 if drawn else 1e-9, atol=1e-9)
