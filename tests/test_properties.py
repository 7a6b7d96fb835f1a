"""Properties that hold whatever the shape, dtype, memory layout, radius or spectrum, tried on examples that hypothesis draws (SAMSDE_EXAMPLES=500: more, and new ones)."""

import itertools
import math
import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from samsde import optim
from samsde.algorithm import DNSAM, SAM, SGD, USAM, Algorithm, Chain, Linear
from samsde.diagnosis import largest_eigenvalue, top_eigenvectors
from samsde.ensemble import simulate
from samsde.hessian_noise import noise_covariance, noise_dim, noise_sample, sgd_covariance
from samsde.implicit_regularizer import drift, regularized_loss
from samsde.objective import FiniteSum, NoisyLoss, Quadratic
from samsde.saddle_attraction import arrival_time, basin_radius, flow, latest_arrival
from samsde.sde import SDE
from samsde.stationarity import closed_covariance, suboptimality
from samsde.weak_errors import linear_moments, stationary_covariance

MORE = int(os.environ.get("SAMSDE_EXAMPLES", 0))


def examples(n):
    return settings(
        max_examples=MORE or n,
        derandomize=not MORE,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
)
on_devices = pytest.mark.parametrize("device", ["cpu", CUDA])
F64 = torch.float64


class Quartic(Algorithm):
    """A variant of a user's own, with a potential that is neither quadratic nor a norm"""

    def potential(self, g):
        return g.square().sum(-1).square() / 4


KINDS = (USAM, DNSAM, SAM, Quartic)
radii = st.sampled_from([0.0, 1e-9, 0.1, 3.0])
kinds = st.sampled_from(KINDS)
dtypes = st.sampled_from([torch.float32, F64])
leads = st.sampled_from([(), (1,), (3,), (2, 3), (0,)])
seeds = st.integers(0, 2**16)
spectra = st.lists(
    st.sampled_from([0.0, 1.0, 1.0, -0.5, 2.5, 1e-6, 1e6]), min_size=1, max_size=4
)  # zeros, repeated, negative and huge ones
sums = st.tuples(st.integers(1, 4), st.integers(1, 4), st.booleans()).filter(
    lambda s: s[2] or s[1] <= s[0]
)  # N, B, replace


def rotated(lam, seed, dtype=F64, device="cpu"):
    """A symmetric matrix with these eigenvalues"""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(lam), len(lam), generator=g, dtype=F64))[0]
    H = (Q * torch.tensor(lam, dtype=F64)) @ Q.T
    return ((H + H.T) / 2).to(device, dtype)


def normal(seed, *shape, dtype=F64, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(
        device, dtype
    )


def finite_sum(seed, d, n, batch_size, replace, dtype=F64, device="cpu"):
    """Logistic losses of random data"""
    A, y = (
        normal(seed, n, d, dtype=dtype, device=device),
        normal(seed + 1, n, dtype=dtype, device=device),
    )
    return FiniteSum(
        lambda x: torch.nn.functional.softplus(y * (A @ x) + y), n, d, batch_size, replace
    )


@st.composite
def objectives(draw, dtypes=dtypes, spectra=spectra, device="cpu"):
    """An objective and its dtype"""
    dtype, lam, seed = draw(dtypes), draw(spectra), draw(seeds)
    d, kind = len(lam), draw(st.sampled_from(["quadratic", "covariance", "silent", "noisy", "sum"]))
    H = rotated(lam, seed, dtype, device)
    if kind == "quadratic":
        return Quadratic(H, 0.5), dtype
    if kind == "silent":
        return Quadratic(H), dtype
    if kind == "covariance":  # of rank 1
        v = normal(seed + 2, d, 1, dtype=dtype, device=device)
        return Quadratic(H, cov=v @ v.T), dtype
    if kind == "noisy":
        return NoisyLoss(lambda x: torch.log1p(x.square().sum()) + x.sum().sin(), d, 0.5), dtype
    return finite_sum(seed, d, *draw(sums), dtype, device), dtype


def size_of(objective):
    return objective.H.abs().max().item() if isinstance(objective, Quadratic) else 2.0


def moves(algorithm, objective, x):
    """Is DNSAM defined here, and are there digits enough? E[ζ u] from drawn noise loses a factor of ‖∇f‖/σ of them."""
    drawn = (
        not isinstance(objective, FiniteSum)
        and not isinstance(algorithm, Linear)
        and not (isinstance(algorithm, SAM) and objective.law.cov is None)
    )
    if (
        drawn
        and not objective.law.noiseless
        and x.dtype == torch.float32
        and size_of(objective) > 1e3
    ):
        return False
    return (
        not isinstance(algorithm, DNSAM)
        or algorithm.unperturbed
        or not x.numel()
        or (torch.linalg.vector_norm(objective.grad(x), dim=-1) > 0).all()
    )


def close(a, b, x, k=300.0):
    """Equal up to k d roundings of the largest number in the results or the points"""
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    if not a.numel():
        return
    noise = (
        torch.finfo(x.dtype).eps * k * x.shape[-1] * max(t.abs().amax().item() for t in (a, b, x))
    )
    assert ((a - b).abs() <= noise).all(), (
        f"off by {(a - b).abs().max().item() / noise:.3g} times what is allowed"
    )


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_close_tells_apart(dtype):
    """The control of the properties below: an error of a thousandth of the largest number is seen."""
    x = normal(0, 3, 2, dtype=dtype)
    with pytest.raises(AssertionError, match="times what is allowed"):
        close(x, x + 1e-3 * x.abs().max(), x)


def layouts(x):
    """The same numbers in other layouts of memory"""
    if not x.numel():
        return [x.clone()]
    strided = torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]
    parts = torch.cat([torch.full_like(x, math.nan), x], -1)[..., x.shape[-1] :]
    turned = x.movedim(-1, 0).contiguous().movedim(0, -1)
    return [strided, parts, turned]


@on_devices
@examples(60)
@given(data=st.data())
def test_memory_layout_and_leading_axes_change_nothing(device, data):
    """Strided, sliced and transposed points give what contiguous copies give; an expanded point gives the same at each path."""
    objective, dtype = data.draw(objectives(device=device))
    algorithm, lead, seed = data.draw(kinds)(data.draw(radii)), data.draw(leads), data.draw(seeds)
    x = normal(seed, *lead, objective.dim, dtype=dtype, device=device)
    assume(moves(algorithm, objective, x))
    sde = SDE(algorithm, objective, 0.1, draws=8)
    xi = normal(seed + 1, *lead, sde.noise_dim, dtype=dtype, device=device)
    gamma = objective.draw(
        lead, torch.Generator(device).manual_seed(seed), dtype=dtype, device=device
    )

    def everything(x, xi, gamma):
        return [
            drift(algorithm, objective, x, draws=8),
            sde.diffusion(x, xi),
            sde.step(x, xi, 0.05),
            algorithm.step(objective, x, 0.1, gamma),
            noise_covariance(algorithm, objective, x, draws=8),
            objective.loss(x),
            objective.grad(x),
            objective.hvp(x, x),
        ]

    here = everything(x, xi, gamma)
    for a in here:
        assert a.dtype == dtype and a.device.type == device and a.shape[: len(lead)] == lead
    for other in layouts(x):
        for a, b in zip(here, everything(other, layouts(xi)[0], gamma)):
            close(a, b, x)
    if lead == ():
        for a, b in zip(here, everything(x.expand(3, -1), xi.expand(3, -1), gamma.expand(3, -1))):
            close(a.expand(3, *a.shape), b, x)


@examples(40)
@given(objectives(), kinds, radii, seeds, st.permutations(range(5)))
def test_permuted_paths(pair, kind, rho, seed, order):
    """A path's result does not depend on its neighbours."""
    (objective, dtype), algorithm = pair, kind(rho)
    x = normal(seed, 5, objective.dim, dtype=dtype)
    assume(moves(algorithm, objective, x))
    sde = SDE(algorithm, objective, 0.1, draws=8)
    xi, gamma = (
        normal(seed + 1, 5, sde.noise_dim, dtype=dtype),
        objective.draw((5,), torch.Generator().manual_seed(seed), dtype=dtype),
    )
    for f in (
        lambda p: sde.step(x[p], xi[p], 0.05),
        lambda p: algorithm.step(objective, x[p], 0.1, gamma[p]),
        lambda p: drift(algorithm, objective, x[p], draws=8),
    ):
        close(f(slice(None))[order], f(order), x)


@examples(40)
@given(objectives(), kinds, radii, seeds, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_not_finite_stays_where_it_is(pair, kind, rho, seed, bad):
    """NaN or infinity in one path makes that path's result not finite, and leaves the others alone."""
    (objective, dtype), algorithm = pair, kind(rho)
    x = normal(seed, 3, objective.dim, dtype=dtype)
    assume(moves(algorithm, objective, x))
    sde = SDE(algorithm, objective, 0.1, draws=8)
    xi, gamma = (
        normal(seed + 1, 3, sde.noise_dim, dtype=dtype),
        objective.draw((3,), torch.Generator().manual_seed(seed), dtype=dtype),
    )
    hurt = x.clone()
    hurt[1] = bad
    for f in (lambda x: sde.step(x, xi, 0.05), lambda x: algorithm.step(objective, x, 0.1, gamma)):
        close(f(hurt)[[0, 2]], f(x)[[0, 2]], x)
        assert not torch.isfinite(f(hurt)[1]).all()


@examples(60)
@given(
    objectives(st.just(F64)),
    kinds,
    radii,
    st.sampled_from(["factor", "exact", "sgd", "none", "truncated"]),
    seeds,
)
def test_covariance_is_its_columns(pair, kind, rho, form, seed):
    """noise_covariance is symmetric, positive semidefinite, and B Bᵀ with the columns that noise_sample gives; noise_sample is linear in ξ."""
    (objective, dtype), algorithm = pair, kind(rho)
    x = normal(seed, 2, objective.dim)
    assume(moves(algorithm, objective, x))
    settings = dict(form=form, draws=8)
    try:
        a = noise_covariance(algorithm, objective, x, **settings)
    except ValueError as error:
        assert form == "truncated" and "positive semidefinite" in str(error)
        return
    m = noise_dim(objective, algorithm, form, 8)
    B = noise_sample(
        algorithm, objective, x, torch.eye(m, dtype=dtype)[:, None], **settings
    )  # (m, 2, d)
    scale = a.diagonal(dim1=-2, dim2=-1).sum(-1).amax().item() + 1e-300
    big = (size_of(objective) * (1 + rho * size_of(objective))) ** 2 * (
        rho > 0
    )  # what cancels in Cov(G) of nearly equal G
    if form == "truncated":
        big = 1e6 * scale  # its root magnifies the rounding of an eigenvalue that is nearly 0
    within = 1e-9 * scale + 1e-15 * big
    assert (a - a.mT).abs().max() <= within
    assert (torch.einsum("kpi,kpj->pij", B, B) - a).abs().max() <= within
    assert torch.linalg.eigvalsh(a).min() >= -within
    xi = normal(seed + 1, 2, 2, m)
    both = noise_sample(algorithm, objective, x, 3 * xi[0] - 2 * xi[1], **settings)
    one, two = (noise_sample(algorithm, objective, x, xi[i], **settings) for i in range(2))
    assert (both - 3 * one + 2 * two).abs().max() <= 1e-9 * scale**0.5 * m + 1e-7 * big**0.5 * 1e-6


@examples(40)
@given(objectives(), st.sampled_from([USAM, DNSAM, SAM, Quartic]), seeds)
def test_without_radius_all_are_sgd(pair, kind, seed):
    """ρ = 0 gives SGD's numbers to the last bit, as a number and as a tensor, for chain, drift, noise and SDE."""
    objective, dtype = pair
    x = normal(seed, 3, objective.dim, dtype=dtype)
    xi, gamma = (
        normal(seed + 1, 3, SDE(SGD(), objective, 0.1).noise_dim, dtype=dtype),
        objective.draw((3,), torch.Generator().manual_seed(seed), dtype=dtype),
    )

    def results(algorithm):
        sde = SDE(algorithm, objective, 0.1, draws=8)
        return [
            algorithm.step(objective, x, 0.1, gamma),
            drift(algorithm, objective, x),
            sde.step(x, xi, 0.05),
            sde.diffusion(x, xi),
            sde.covariance(x),
        ]

    for a, b in zip(results(SGD()), results(kind(0.0))):
        assert a.equal(b)
    if moves(kind(1.0), objective, x):
        assert results(SGD())[0].equal(kind(torch.zeros(3)).step(objective, x, 0.1, gamma))


@examples(25)
@given(
    sums, st.integers(1, 3), st.sampled_from([USAM, DNSAM, SAM]), st.sampled_from([0.1, 3.0]), seeds
)
def test_minibatch_moments_by_enumeration(s, d, kind, rho, seed):
    """Drift, exact drift and exact noise of logistic losses against Hessians by autograd, summed over every minibatch; N = 1, B = N and d = 1 are among them."""
    n, B, replace = s
    objective, algorithm, x = finite_sum(seed, d, n, B, replace), kind(rho), normal(seed + 2, d)
    batches = torch.tensor(
        list(
            itertools.product(range(n), repeat=B)
            if replace
            else itertools.combinations(range(n), B)
        )
    )

    def grads(x):
        return torch.func.jacrev(objective.sample_losses)(x)[batches].mean(1)  # (batches, d)

    g, H = grads(x), torch.func.jacrev(grads)(x)
    full = torch.func.jacrev(objective.sample_losses)(x).mean(0)
    u = g / {USAM: 1, DNSAM: full.norm(), SAM: g.norm(dim=1, keepdim=True)}[kind]
    G = torch.stack(
        [
            torch.func.jacrev(objective.sample_losses)(x + rho * v)[b].mean(0)
            for v, b in zip(u, batches)
        ]
    )

    def agree(a, b):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

    agree(drift(algorithm, objective, x), -(g + rho * (H @ u[..., None])[..., 0]).mean(0))
    agree(drift(algorithm, objective, x, "exact"), -G.mean(0))
    agree(
        noise_covariance(algorithm, objective, x, "exact"),
        (G - G.mean(0)).T @ (G - G.mean(0)) / len(G),
    )
    agree(sgd_covariance(objective, x), (g - g.mean(0)).T @ (g - g.mean(0)) / len(g))
    if kind is SAM or B == 1 or n == 1:
        c = g + rho * (H @ u[..., None])[..., 0]
        agree(
            noise_covariance(algorithm, objective, x), (c - c.mean(0)).T @ (c - c.mean(0)) / len(c)
        )


@examples(40)
@given(
    objectives(
        st.just(F64), st.lists(st.sampled_from([0.0, 1.0, 1.0, -0.5, 2.5]), min_size=1, max_size=4)
    ),
    st.sampled_from([USAM, DNSAM, SAM]),
    st.sampled_from([0.1, 3.0]),
    seeds,
)
def test_drift_is_the_gradient_of_the_regularised_loss(pair, kind, rho, seed):
    """−b = ∇f̃ by autograd wherever f̃ exists; DNSAM's holds ‖∇f‖ alone under constant noise."""
    (objective, _), algorithm = pair, kind(rho)
    x = normal(seed, 2, objective.dim)
    assume(kind is not DNSAM or not isinstance(objective, FiniteSum) or objective.law.noiseless)
    assume((torch.linalg.vector_norm(objective.grad(x), dim=-1) > 0.05).all())
    z = x.clone().requires_grad_()
    slope = torch.autograd.grad(regularized_loss(algorithm, objective, z, draws=8).sum(), z)[0]
    law = objective.law
    sampled = (
        kind is SAM
        and law.size(8) != law.size(1024)
        and (isinstance(objective, FiniteSum) or law.cov is not None)
    )
    torch.testing.assert_close(
        -drift(algorithm, objective, x, draws=8), slope, rtol=2e-6, atol=1e-8
    )
    if not sampled:
        torch.testing.assert_close(drift(algorithm, objective, x), -slope, rtol=2e-6, atol=1e-8)


@examples(15)
@given(
    objectives(
        st.just(F64), st.lists(st.sampled_from([0.0, 1.0, 1.0, 0.5, 2.5]), min_size=1, max_size=3)
    ),
    st.sampled_from([USAM, SAM, Quartic]),
    st.booleans(),
    seeds,
)
def test_a_sweep_is_its_runs(pair, kind, model, seed):
    """The members of a sweep over ρ that share their noise are single runs with the same seed."""
    objective, _ = pair
    rhos, x0 = torch.tensor([0.0, 0.05, 0.2], dtype=F64), normal(seed, objective.dim) / 2

    def process(rho):
        return (
            SDE(kind(rho), objective, 0.1, draws=8) if model else Chain(kind(rho), objective, 0.1)
        )

    whole = simulate(process(rhos), x0, 0.5, 6, seed=seed, share=True)
    for j, rho in enumerate(rhos.tolist()):
        if model and rho == 0 and not issubclass(kind, Linear):
            continue  # SGD's noise, of the same law but from other numbers
        one = simulate(process(rho), x0, 0.5, 6, seed=seed)
        torch.testing.assert_close(whole.final[:, j], one.final, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(whole.mean["x"][:, j], one.mean["x"], rtol=1e-10, atol=1e-12)


@examples(10)
@given(
    objectives(
        spectra=st.lists(st.sampled_from([0.0, 1.0, 1.0, 0.5, 2.5]), min_size=1, max_size=3)
    ),
    st.sampled_from([SGD(), USAM(0.1), SAM(0.1)]),
    st.booleans(),
    st.integers(1, 9_000),
    st.integers(2, 3),
    seeds,
)
def test_threads_and_chunks_change_nothing(pair, algorithm, model, chunk, threads, seed):
    """Bit for bit the same paths and statistics, however they are cut into pieces."""
    objective, dtype = pair
    process = SDE(algorithm, objective, 0.1, draws=8) if model else Chain(algorithm, objective, 0.1)
    how = dict(x0=normal(seed, objective.dim, dtype=dtype), t_end=0.2, n_paths=9_001, seed=seed)
    one, other = (
        simulate(process, threads=1, **how),
        simulate(process, threads=threads, chunk=chunk, **how),
    )
    assert one.final.equal(other.final)
    for kind in ("mean", "std", "sem"):
        assert getattr(one, kind)["x"].equal(getattr(other, kind)["x"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("algorithm", [SGD(), USAM(0.1), DNSAM(0.1), SAM(0.1)])
def test_half_precision(algorithm, dtype):
    """Chain and SDE run in half precision, in kind, and one step is right to its few digits."""
    H, x = rotated([2.0, 0.5, -0.3], 0), normal(1, 4, 3)
    half, full = Quadratic(H.to(dtype), 0.1), Quadratic(H.to(dtype).double(), 0.1)
    xi = normal(2, 4, 3).to(dtype)
    a, b = (
        SDE(algorithm, o, 0.1).step(x.to(dtype).to(o.dtype), xi.to(o.dtype), 0.05)
        for o in (half, full)
    )
    assert (
        a.dtype == dtype
        and ((a.double() - b).abs() <= 8 * torch.finfo(dtype).eps * (1 + b.abs())).all()
    )
    end = simulate(Chain(algorithm, half, 0.1), x[0].to(dtype), 0.5, 8)
    assert (
        end.final.dtype == dtype
        and end.mean["x"].dtype == F64
        and torch.isfinite(end.mean["x"]).all()
    )


def test_eigenvectors_of_zero():
    values, vectors = top_eigenvectors(Quadratic(torch.zeros(2, 2)), torch.ones(2), 1)
    assert values.tolist() == [0.0] and abs(vectors.norm().item() - 1) < 1e-6


def test_largest_eigenvalue_below_zero():
    assert largest_eigenvalue(
        Quadratic(-0.5 * torch.eye(2)).hvp, torch.ones(2)
    ).item() == pytest.approx(-0.5, rel=1e-6)


# --- spectra, saddles, moments, optimizers ---


@examples(40)
@given(spectra, st.integers(1, 4), dtypes, seeds)
def test_eigenvalues_of_any_spectrum(lam, k, dtype, seed):
    """The largest eigenvalues and their eigenvectors, with zeros, repeated and huge ones; Lanczos stays below the top and finds it with d steps."""
    d, eps, size = len(lam), torch.finfo(dtype).eps, max(map(abs, lam))
    H, x, k = rotated(lam, seed, dtype), normal(seed, 3, d, dtype=dtype), min(k, d)
    assume(any(lam) or k > d / 2)  # bug 31
    values, vectors = top_eigenvectors(Quadratic(H), x[0], k)
    assert values.dtype == dtype and values.shape == (k,) and vectors.shape == (k, d)
    loose = 1e-5 if dtype == F64 else 1e-2  # where ARPACK stops
    assert (
        values.double() - torch.tensor(sorted(lam, reverse=True)[:k], dtype=F64)
    ).abs().max() <= loose * size
    assert (vectors @ H - values[:, None] * vectors).abs().max() <= loose * size and (
        vectors @ vectors.T - torch.eye(k)
    ).abs().max() <= loose
    top = largest_eigenvalue(Quadratic(H).hvp, x)
    if max(lam) < 0:
        return  # bug 32
    assert top.shape == (3,) and (top - max(lam)).abs().max() <= 100 * d * eps * size


saddles = st.lists(
    st.sampled_from([0.0, 1.0, 1.0, -0.5, -0.5, 2.0, -0.1]), min_size=1, max_size=4
).filter(any)


@examples(20)
@given(
    saddles,
    st.sampled_from([SGD(), USAM(0.3), DNSAM(0.3), SAM(0.3), SAM(3.0)]),
    st.sampled_from([1e-3, 0.1, 1.0]),
    st.sampled_from([1e-3, 7.0]),
    seeds,
)
def test_flows_turn_and_stretch_with_their_starts(lam, algorithm, size, stretch, seed):
    """A rotation of H and x₀ rotates the flow; a stretch of x₀ and ρ (SAM, DNSAM) or of x₀ alone (SGD, USAM) stretches it; no arrival comes after the latest one."""
    d, x0 = len(lam), size * normal(seed, 2, len(lam))
    Q, H = torch.linalg.qr(normal(seed + 1, d, d))[0], rotated(lam, seed)
    times, points = flow(algorithm, H, x0, 2.0, steps=6)
    again = flow(algorithm, (lambda M: (M + M.T) / 2)(Q @ H @ Q.T), x0 @ Q.T, 2.0, steps=6)
    longer = flow(
        type(algorithm)(stretch * algorithm.rho)
        if isinstance(algorithm, (SAM, DNSAM))
        else algorithm,
        H,
        stretch * x0,
        2.0,
        steps=6,
    )
    for (t, x), c, R in ((again, 1.0, Q), (longer, stretch, torch.eye(d, dtype=F64))):
        torch.testing.assert_close(t, times, rtol=1e-6, atol=1e-7)
        assert (x - c * points @ R.T).abs().max() <= 1e-6 * c * (points.abs().max() + algorithm.rho)
    r0 = torch.linalg.vector_norm(x0 @ H, dim=-1)
    for r, arrival in zip(r0.tolist(), arrival_time(algorithm, H, x0).tolist()):
        assert arrival <= latest_arrival(algorithm, H, r) * (1 + 1e-7) + 1e-9 and (
            arrival < math.inf
            or r >= basin_radius(algorithm, H) * (1 - 1e-9)
            or not isinstance(algorithm, (SAM, DNSAM))
        )


@examples(30)
@given(
    st.lists(st.sampled_from([0.0, 0.5, 0.5, 2.0, -0.3]), min_size=1, max_size=4),
    st.sampled_from([SGD(), USAM(0.3)]),
    st.booleans(),
    st.integers(1, 9),
    seeds,
)
def test_exact_moments_compose(lam, algorithm, model, steps, seed):
    """Mean and covariance of n steps are those of n single steps (of time η for an SDE), and a covariance."""
    d, v = len(lam), normal(seed + 1, len(lam), 1)
    o, x0 = Quadratic(rotated(lam, seed), cov=v @ v.T), normal(seed, d)
    process = (SDE if model else Chain)(algorithm, o, 0.1)
    mean, cov = linear_moments(process, x0, 0.1 * steps)
    F = torch.stack([linear_moments(process, e, 0.1)[0] for e in torch.eye(d, dtype=F64)], 1)
    C, m, V = linear_moments(process, x0, 0.1)[1], x0, torch.zeros(d, d, dtype=F64)
    for _ in range(steps):
        m, V = F @ m, F @ V @ F.T + C
    torch.testing.assert_close(mean, m, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(cov, V, rtol=1e-10, atol=1e-12)
    assert torch.linalg.eigvalsh(cov).min() >= -1e-12 * (1 + cov.abs().max())


@examples(30)
@given(
    st.lists(st.sampled_from([0.1, 0.5, 0.5, 2.0, 7.0]), min_size=1, max_size=4),
    st.sampled_from([SGD(), USAM(0.1)]),
    st.booleans(),
    seeds,
)
def test_closure_is_lyapunov_where_it_is_exact(lam, algorithm, model, seed):
    """For SGD and USAM the closure's covariance is that of Lyapunov's equation, and the level is ½ tr HC; noise of rank 1 and repeated eigenvalues are among them."""
    v = normal(seed + 1, len(lam), 1)
    o = Quadratic(rotated(lam, seed), cov=v @ v.T)
    process = (SDE if model else Chain)(algorithm, o, 0.1)
    C = stationary_covariance(process)
    torch.testing.assert_close(closed_covariance(process), C, rtol=1e-8, atol=1e-10)
    assert abs(suboptimality(process) - (o.H @ C).trace().item() / 2) <= 1e-8 * (
        1 + C.abs().max().item()
    )


@examples(40)
@given(
    st.lists(st.sampled_from([(1,), (3,), (2, 2), (1, 3, 1)]), min_size=1, max_size=3),
    st.sampled_from([(optim.USAM, USAM), (optim.SAM, SAM), (optim.DNSAM, DNSAM)]),
    st.sampled_from([0.0, 0.1, 3.0]),
    st.sampled_from([torch.bfloat16, torch.float32, F64]),
    st.booleans(),
    seeds,
)
def test_optimizer_is_the_algorithm(shapes, kinds, rho, dtype, groups, seed):
    """One step of the optimizer with SGD on a full-batch quadratic is x − η ∇f(x + ρu), whatever the shapes, groups and layout of the parameters; x is restored before the base's step."""
    (kind, algorithm), sizes = kinds, [math.prod(s) for s in shapes]
    H, x = (
        rotated([1.0, -0.5, 2.0, 0.1, 3.0, 1.0] * 3, seed)[: sum(sizes), : sum(sizes)].to(dtype),
        normal(seed, sum(sizes)).to(dtype),
    )
    params = [
        torch.nn.Parameter(p.clone().reshape(s).transpose(0, -1))
        for p, s in zip(x.split(sizes), shapes)
    ]  # not contiguous, some of them
    flat = lambda: torch.cat([p.transpose(0, -1).reshape(-1) for p in params])
    more = (
        dict(full_grad_norm=lambda: (flat().double() @ H.double()).norm().item())
        if kind is optim.DNSAM
        else {}
    )
    optimizer = kind(
        [{"params": [p]} for p in params] if groups else params,
        torch.optim.SGD,
        rho=rho,
        lr=0.1,
        **more,
    )

    def closure():
        optimizer.zero_grad()
        loss = flat() @ H @ flat() / 2
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    exact = algorithm(rho).step(
        Quadratic(H.double()), x.double(), 0.1, torch.zeros(len(x), dtype=F64)
    )
    size = (1 + rho * 3) * (1 + x.double().norm().item()) * 3
    assert (
        (flat().double() - exact).abs().max() <= 40 * torch.finfo(dtype).eps * size
        and loss.dtype == dtype
        and all(p.dtype == dtype for p in params)
    )
