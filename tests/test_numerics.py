"""Rounding: single against double precision for every formula, extreme radii, gradients and dimensions, and limits. A tolerance is a machine epsilon times a condition number."""

import copy
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch

from samsde import optim
from samsde.algorithm import DNSAM, SAM, SGD, USAM, Algorithm, Chain, Linear
from samsde.diagnosis import largest_eigenvalue, top_eigenvectors
from samsde.ensemble import simulate
from samsde.hessian_noise import (
    cross_covariance,
    noise_covariance,
    noise_dim,
    noise_sample,
    sgd_covariance,
)
from samsde.implicit_regularizer import drift, gaussian_direction, regularized_loss
from samsde.machinery.long_vectors import lanczos
from samsde.objective import FiniteSum, NoisyLoss, Quadratic
from samsde.random_direction import kappa
from samsde.saddle_attraction import (
    arrival_time,
    basin_radius,
    escape_time,
    flow,
    hover_radius,
    is_attracting,
    latest_arrival,
)
from samsde.sde import SDE
from samsde.stability import mean_square_radius
from samsde.stationarity import closed_covariance, suboptimality
from samsde.weak_errors import (
    circle_error,
    linear_moments,
    periodic_examples,
    stationary_covariance,
    weak_error,
)

F32, F64 = torch.float32, torch.float64
EPS32, EPS64 = torch.finfo(F32).eps, torch.finfo(F64).eps
ALL = [SGD(), USAM(0.1), DNSAM(0.1), SAM(0.1)]


class Cube(Algorithm):
    """A variant of a user's own"""

    def potential(self, g):
        return torch.linalg.vector_norm(g, dim=-1) ** 3 / 3


# --- single against double precision ---


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def data(seed=0):
    """Numbers that both precisions hold exactly: a matrix for H, a root of a covariance, samples, targets, points, and noise"""
    shapes = dict(R=(3, 3), root=(3, 3), A=(5, 3), y=(5,), x=(4, 3), xi=(4, 5), gamma=(4, 3))
    return {
        name: normal(seed + k, *shape).float().double()
        for k, (name, shape) in enumerate(shapes.items())
    }


def objective(name, t):
    H = t["R"] + t["R"].T
    if name == "quadratic":
        return Quadratic(H, 0.5)
    if name == "silent":
        return Quadratic(H)
    if name == "covariance":
        return Quadratic(H, cov=t["root"] @ t["root"].T)
    if name == "noisy":
        return NoisyLoss(
            lambda x: torch.log1p((x * (H @ x)).square().sum()) + x.sum().sin(), 3, 0.5
        )
    if name == "sum":
        return FiniteSum(lambda x: torch.nn.functional.softplus(t["y"] * (t["A"] @ x)), 5, 3)
    if name == "sum, B=2":
        return FiniteSum(
            lambda x: torch.nn.functional.softplus(t["y"] * (t["A"] @ x)), 5, 3, 2, False
        )
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1).to(t["x"].dtype)
    with torch.no_grad():
        net.weight.copy_(t["R"][:1]), net.bias.copy_(t["y"][:1])
    return FiniteSum.from_module(
        net, lambda out, y: (out - y).cosh().log().mean(), t["A"], t["y"][:, None]
    )


def formulas(name, algorithm, t):
    """Every formula of drift and noise at the points, as far as no drawn numbers are in it (they differ between precisions)"""
    o, x = (
        objective(name, t),
        t["x"] if name != "module" else torch.cat([t["x"], t["xi"][:, :1]], -1),
    )
    drawn = (
        name == "covariance"
        and not isinstance(algorithm, Linear)
        or name == "noisy"
        and not isinstance(algorithm, Linear)
        and type(algorithm) is not SAM
    )
    additive = name in ("quadratic", "silent", "covariance", "noisy")
    gamma = t["gamma"] if additive else torch.tensor([[0, 1], [2, 3], [1, 4], [3, 0]])
    out = {
        "loss": o.loss(x),
        "gradient": o.grad(x),
        "Hessian": o.hessian(x),
        "Hv": o.hvp(x, x.flip(0)),
        "step": algorithm.step(o, x, 0.1, gamma),
        "sample gradient": o.sample_grad(x, gamma),
        "Σ": sgd_covariance(o, x),
    }
    if drawn or name == "quadratic" and isinstance(algorithm, Cube):
        return out
    out |= {"drift": drift(algorithm, o, x), "a": noise_covariance(algorithm, o, x)}
    if name != "silent" or isinstance(algorithm, Linear):
        out["S"] = cross_covariance(algorithm, o, x)
    if name in ("quadratic", "covariance") or not additive:
        out["exact drift"] = (
            drift(algorithm, o, x, "exact")
            if isinstance(algorithm, Linear) or not additive
            else out["drift"]
        )
    if not isinstance(algorithm, DNSAM) or additive:
        out["f̃"] = regularized_loss(algorithm, o, x)
    if not additive:
        out["exact a"] = noise_covariance(algorithm, o, x, "exact")
    sde = SDE(algorithm, o, 0.1)
    if sde.noise_dim <= 5:
        xi = t["xi"][:, : sde.noise_dim]
        out |= {
            "noise": noise_sample(algorithm, o, x, xi),
            "Euler step": sde.step(x, xi, 0.05),
            "η a": sde.covariance(x),
        }
    return out


def perturbed(t, k):  # by relative errors of EPS32
    g = torch.Generator().manual_seed(100 + k)
    return {
        name: v * (1 + EPS32 * (2 * torch.randint(2, v.shape, generator=g, dtype=F64) - 1))
        for name, v in t.items()
    }


def condition(f, t, trials=6):
    """How far a rounding of the data moves each result, the largest over signs of the rounding errors: eps × condition number"""
    here = f(t)
    moved = [f(perturbed(t, k)) for k in range(trials)]
    return here, {
        name: max((m[name] - v).abs().max().item() for m in moved) for name, v in here.items()
    }


@pytest.mark.parametrize(
    "name", ["quadratic", "silent", "covariance", "noisy", "sum", "sum, B=2", "module"]
)
@pytest.mark.parametrize("algorithm", [*ALL, Cube(0.1)], ids=lambda a: type(a).__name__)
def test_single_against_double(name, algorithm):
    """Single precision is off by no more than 16 roundings of the data, for every formula; a thousandth is the control."""
    t = data()
    here, moved = condition(lambda t: formulas(name, algorithm, t), t)
    single = formulas(name, algorithm, {k: v.float() for k, v in t.items()})
    for what, value in here.items():
        allowed = 16 * (moved[what] + EPS32 * value.abs().max().item())
        off = (single[what].double() - value).abs().max().item()
        assert single[what].dtype == F32 and off <= allowed, (
            f"{what}: off by {off:.3g}, {off / allowed:.2g} of what is allowed"
        )
        if value.abs().max() > 0:
            assert allowed < 1e-3 * value.abs().max(), f"{what}: the test would see nothing"


@pytest.mark.parametrize("algorithm", [SAM(0.1), Cube(0.1)], ids=lambda a: type(a).__name__)
def test_no_noise_has_no_covariance_with_anything(algorithm):
    t = data()
    S = cross_covariance(algorithm, objective("silent", t), t["x"])
    assert S.shape == (4, 3, 3) and not S.any()


@pytest.mark.parametrize("algorithm", [SAM(0.1), Cube(0.1)], ids=lambda a: type(a).__name__)
def test_drawn_moments_in_single_precision(algorithm):
    """Where moments are drawn, both precisions agree within their standard errors."""
    t = data()
    b, sem = zip(
        *[
            drift(
                algorithm,
                objective("covariance", {k: v.to(dtype) for k, v in t.items()}),
                t["x"].to(dtype),
                draws=4000,
                return_sem=True,
            )
            for dtype in (F32, F64)
        ]
    )
    assert ((b[0].double() - b[1]).abs() <= 4.5 * (sem[0].double() ** 2 + sem[1] ** 2).sqrt()).all()


def saddle_numbers(H, x0):
    out = {
        "basin": basin_radius(SAM(0.1), H),
        "latest": latest_arrival(SAM(0.1), H, 0.01),
        "escape": escape_time(USAM(0.1), H, 0.1, 0.2, 1.0),
        "noisy escape": escape_time(SAM(0.02), H, 0.1, 0.2, 0.1),
        "hover": hover_radius(SAM(0.1), torch.linalg.matrix_exp(H), 0.1),
    }
    out = {name: torch.tensor(value, dtype=F64) for name, value in out.items()}
    for a in ALL:
        times, points = flow(a, H, x0, 1.0, steps=5)
        out |= {
            f"flow {a}": points,
            f"times {a}": times,
            f"arrival {a}": arrival_time(a, H, x0 / 100),
        }
    return out


def test_saddles_in_single_precision():
    """The flows, basins and times of a float32 matrix are those of the same matrix in double precision, within the rounding of its entries."""
    Q = torch.linalg.qr(normal(1, 3, 3))[0]
    H = (Q * torch.tensor([1.0, 0.4, -0.5], dtype=F64)) @ Q.T
    H, x0 = ((H + H.T) / 2).float().double(), normal(2, 4, 3).float().double()
    here, moved = condition(
        lambda t: {
            k: v.nan_to_num(posinf=0)
            for k, v in saddle_numbers((t["H"] + t["H"].T) / 2, t["x0"]).items()
        },
        dict(H=H, x0=x0),
    )
    single = saddle_numbers(H.float(), x0.float())
    double = saddle_numbers(H, x0)
    for what, value in here.items():
        assert (double[what] == math.inf).equal(single[what] == math.inf), what  # who arrives
        off = (single[what].double().nan_to_num(posinf=0) - value).abs().max().item()
        assert off <= 16 * (moved[what] + EPS32 * value.abs().max().item()), f"{what}: {off:.3g}"
    assert all(
        is_attracting(a, H).attracting == is_attracting(a, H.float()).attracting for a in ALL
    )


def test_stationarity_and_moments_in_single_precision():
    """Covariances at stationarity and exact moments of a float32 process."""
    t = dict(
        R=normal(3, 3, 3).float().double() / 2,
        root=normal(4, 3, 3).float().double(),
        x0=normal(5, 3).float().double(),
    )

    def numbers(t):
        H = t["R"] @ t["R"].T + 0.5 * torch.eye(3, dtype=t["R"].dtype)
        o, plain, out = (
            Quadratic((H + H.T) / 2, cov=t["root"] @ t["root"].T),
            Quadratic((H + H.T) / 2, 0.3),
            {},
        )
        for build in (Chain, SDE):
            out |= {
                f"closed {build.__name__} {a}": closed_covariance(build(a, plain, 0.1)) for a in ALL
            }
            out |= {
                f"level {build.__name__} {a}": torch.tensor(
                    suboptimality(build(a, plain, 0.1)), dtype=F64
                )
                for a in ALL
            }
            for a in ALL[:2]:
                mean, cov = linear_moments(build(a, o, 0.1), t["x0"], 2.0)
                out |= {
                    f"mean {build.__name__} {a}": mean,
                    f"cov {build.__name__} {a}": cov,
                    f"stationary {build.__name__} {a}": stationary_covariance(build(a, o, 0.1)),
                }
        return out

    here, moved = condition(numbers, t)
    single = numbers({k: v.float() for k, v in t.items()})
    for what, value in here.items():
        off = (single[what].double() - value).abs().max().item()
        closure = 1e-9 * value.abs().max().item()  # where its iteration stops
        assert off <= 16 * (moved[what] + EPS32 * value.abs().max().item() + closure), (
            f"{what}: off by {off:.3g}, {moved[what]:.3g}"
        )


def test_closure_and_exact_covariance_agree():
    """For SGD and USAM under every noise and expansion. SAM's noise "second" is its "exact", as a quadratic has no third derivatives; the control: "factor" is less. An SDE of order 2 is refused."""
    H = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=F64)
    bowl = Quadratic(H, cov=torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=F64))
    for form in ("factor", "truncated", "second", "exact", "sgd"):
        for kind in (SGD(), USAM(0.1)):
            sde = SDE(kind, bowl, 0.3, "exact", form)
            assert (stationary_covariance(sde) - closed_covariance(sde)).abs().max() < 1e-14
            late = SDE(kind, bowl, 0.3, "exact", form, order=2)
            assert (stationary_covariance(late) - closed_covariance(sde)).abs().max() > 1e-3
            with pytest.raises(
                ValueError, match="the closure is of an SDE of order 1, got order=2"
            ):
                closed_covariance(late)
    factor, second, exact = (
        closed_covariance(SDE(SAM(0.5), bowl, 0.3, noise=form))
        for form in ("factor", "second", "exact")
    )
    assert second.equal(exact) and torch.linalg.eigvalsh(exact - factor).min() > 1e-6


@pytest.mark.parametrize("source", ["own", "full", "independent", "previous"])
def test_mean_square_of_one_sample(source):
    """Without replacement, too, where two samples of a batch have no covariance."""
    H, eta, rho = torch.tensor([[[1.5]]], dtype=F64), 0.2, 0.3
    found = [mean_square_radius(USAM(rho, source=source), H, eta, 1, r) for r in (True, False)]
    step = np.array([[1 - eta * 1.5, -eta * rho * 1.5], [1.5, 0]])  # of x and the gradient before
    known = 1 - eta * 1.5 * (1 + rho * 1.5)
    if source == "previous":
        known = abs(np.linalg.eigvals(step)).max()
    assert abs(np.array(found) - known**2).max() < 1e-12


def test_eigenvalues_in_single_precision():
    o = objective("quadratic", data())
    x, lam = data()["x"], torch.linalg.eigvalsh(o.H)
    single = Quadratic(o.H.float(), 0.5)
    for k in (1, 3):
        assert (
            top_eigenvectors(single, x[0].float(), k)[0].double() - lam.flip(0)[:k]
        ).abs().max() <= (2e-3 if k == 1 else 16 * EPS32) * lam.abs().max()
    assert (
        largest_eigenvalue(single.hvp, x.float()).double() - lam[-1]
    ).abs().max() <= 64 * EPS32 * lam.abs().max()


# --- SAM's Gaussian factors ---


def by_kummer(r, d):
    """A, A_∥ and E‖g+Z‖ for σ = 1, from Kummer's function with forty digits"""
    with mpmath.workdps(40):
        r, b = mpmath.mpf(r), mpmath.mpf(d) / 2 + 1
        k = mpmath.sqrt(2) * mpmath.exp(mpmath.loggamma(b - 0.5) - mpmath.loggamma(b - 1)) / d
        A = k * mpmath.hyp1f1(0.5, b, -(r**2) / 2)
        along = A - k * r**2 / (2 * b) * mpmath.hyp1f1(1.5, b + 1, -(r**2) / 2)
        return float(A), float(along), float(A * r**2 + (d - 1) * A + along)


def factors(rs, sigma, d, dtype=F64):
    """A and A_∥, the norm and the mean's length, as gaussian_direction has them for ḡ along the first axis"""
    g = torch.zeros(len(rs), d, dtype=dtype)
    g[:, 0] = torch.as_tensor(rs, dtype=dtype)
    out = gaussian_direction(g, sigma)
    assert (
        all(t.dtype == dtype and torch.isfinite(t).all() for t in out) and not out.mean[:, 1:].any()
    )
    return [
        t.double().numpy()
        for t in (out.across / sigma**2, out.along / sigma**2, out.norm, out.mean[:, 0])
    ]


@pytest.mark.parametrize("d", [1, 2, 3, 10, 1000, 10**6])
def test_gaussian_factors(d):
    """From ‖ḡ‖ = 0 to 10⁶ σ and from 1 to 10⁶ dimensions: cos^d θ costs d/2 roundings, the rest a hundred; in float32 four of float32's."""
    rs = (
        np.array([0.0, 1e-6, 1e-3, 0.5, 1.0, 3.0, 30.0, 1e3, 1e6])[:: 1 if d < 10**6 else 4]
        .astype(np.float32)
        .astype(float)
    )
    A, along, norm = np.array([by_kummer(r, d) for r in rs]).T
    for dtype, sigmas, tol in (
        (F64, (2.0**-20, 1.0, 2.0**17), EPS64 * (200 + d)),
        (F32, (1.0,), 8 * EPS32),
    ):
        for s in sigmas:
            a, b, n, m = factors(rs * s, s, d, dtype)
            assert (
                (abs(a * s - A) <= tol * A).all()
                and (abs(m - A * rs) <= tol * A * rs).all()
                and (abs(n / s - norm) <= tol * norm).all()
            )
            assert (
                abs(b * s - along) <= 5 * tol * along + tol * 1e-2 * A
            ).all()  # e^{−z} in one dimension: small against A


def test_gaussian_factors_near_their_limits():
    """‖Eu‖ ≤ 1 throughout, A(0) = A_∥(0) = κ/σ, and without noise the direction itself."""
    for d in (1, 3, 100):
        A, along, *_ = factors([0.0], 0.5, d)
        assert abs(A[0] * 0.5 - kappa(d)) <= 1e3 * EPS64 * kappa(d) and abs(
            along[0] * 0.5 - kappa(d)
        ) <= 1e3 * EPS64 * kappa(d)
        _, along, _, mean = factors(torch.logspace(-300, 150, 200, dtype=F64), 1.0, d)
        assert (mean <= 1 + 1e3 * EPS64).all() and (along >= 0).all()
    g = normal(0, 5, 3)
    assert (
        gaussian_direction(g, 0.0).mean - g / g.norm(dim=-1, keepdim=True)
    ).abs().max() <= 4 * EPS64
    assert (
        gaussian_direction(g, 1e-9).mean - gaussian_direction(g, 0.0).mean
    ).abs().max() <= 100 * EPS64  # (d−1)/2 (σ/r)² is below


# --- SAM near zero gradients ---


@pytest.mark.parametrize("dtype", [F32, F64])
def test_sam_near_a_zero_gradient(dtype):
    """u has length 1 down to gradients whose squares can still be told from 0, is 0 at 0, and never longer than 1, infinite or NaN."""
    info = torch.finfo(dtype)
    least = (
        info.tiny / info.eps
    ) ** 0.5  # below, squares lose digits: 3e-16 in single precision, 1e-146 in double
    bowl = Quadratic(torch.eye(3, dtype=dtype))
    x = torch.logspace(math.log10(least), 10, 50, dtype=F64).to(dtype)[:, None] * torch.tensor(
        [[1.0, -2.0, 3.0]], dtype=dtype
    )
    zero = torch.zeros(3, dtype=dtype)
    u = SAM(0.1).perturbation(bowl, x, zero)
    assert ((u.norm(dim=-1) - 1).abs() <= 8 * info.eps).all()
    for tiny in (0.0, info.tiny * info.eps, info.tiny, least / 10):
        u = SAM(0.1).perturbation(bowl, tiny * x[:1] / x[:1].abs().max(), zero)
        assert torch.isfinite(u).all() and u.norm() <= 1 + 8 * info.eps
    assert not SAM(0.1).perturbation(bowl, zero, zero).any()
    for form in ("factor", "sgd"):
        assert torch.isfinite(
            noise_covariance(SAM(0.1), Quadratic(torch.eye(3, dtype=dtype), 0.1), zero, form)
        ).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size, sigma", [(300.0, 1.0), (300.0, 100.0), (2e4, 1.0), (1e-4, 1e-5)])
def test_sam_with_noise_in_half_precision(dtype, size, sigma):
    """Where the square of a gradient is no number of float16: the mean of a unit vector, its answer to noise, and the loss."""
    direction = torch.tensor([0.6, -0.8], dtype=F64)

    def numbers(dtype):
        flat = Quadratic(torch.zeros(2, 2, dtype=dtype), sigma)
        x, H = (size * direction).to(torch.bfloat16).to(dtype), torch.eye(2, dtype=dtype)
        found = gaussian_direction(x, sigma)
        bowl = Quadratic(H, sigma)
        return [
            *found,
            drift(SAM(0.5 * size), bowl, x) / size,
            noise_sample(SAM(0.5 * size), bowl, x, torch.ones(2, dtype=dtype)) / sigma,
            regularized_loss(SAM(1.0), flat, torch.zeros(2, dtype=dtype)) / sigma,
        ]

    for half, full in zip(numbers(dtype), numbers(F64)):
        assert half.dtype == dtype
        off, info = (half.double() - full).abs().max(), torch.finfo(dtype)
        assert off <= 16 * info.eps * (full.abs().max() + info.tiny)


def test_sam_with_noise_is_usam_near_a_zero_gradient():
    """Where ‖∇f‖ ≪ σ, SAM's drift, noise and loss are USAM's with radius ρκ/σ, up to (‖∇f‖/σ)² relative to the terms with ρ; at ‖∇f‖ = σ they are not."""
    d, s, rho = 3, 0.5, 0.1
    o, k = Quadratic(torch.diag(torch.tensor([2.0, 1.0, -0.5], dtype=F64)), s), kappa(3) / 0.5

    def gap(r):
        x = r * torch.ones(d, dtype=F64)
        b = [drift(a, o, x) + o.grad(x) for a in (SAM(rho), USAM(rho * k))]
        a = [noise_covariance(a, o, x) for a in (SAM(rho), USAM(rho * k))]
        f = [regularized_loss(a, o, x) - o.loss(x) for a in (SAM(rho), USAM(rho * k))]
        return max(
            ((b[0] - b[1]).norm() / b[1].norm()).item(), ((a[0] - a[1]).norm() / a[1].norm()).item()
        ), (f[0] - f[1]).item()

    gaps = [gap(r) for r in (1e-2, 1e-4, 1e-150)]
    assert (
        gaps[0][0] <= (2 * 3**0.5 * 1e-2 / s) ** 2
        and gaps[1][0] <= (2 * 3**0.5 * 1e-4 / s) ** 2 + 1e-13
        and gaps[2][0] <= 1e-13
    )
    assert max(abs(f - gaps[2][1]) for _, f in gaps) <= 1e-4 * abs(
        gaps[2][1]
    )  # the two losses differ by a constant
    assert gap(s)[0] > 0.05


# --- ρ = 0 ---


def test_without_radius_everything_is_sgd():
    """Runs, closures, flows and weak errors of USAM(0), DNSAM(0) and SAM(0) are SGD's to the last bit."""
    t = data()
    H, x0 = (t["R"] @ t["R"].T + torch.eye(3, dtype=F64)) / 4, t["x"][0]
    o, circle = Quadratic((H + H.T) / 2, 0.3), periodic_examples(1)[USAM]

    def numbers(a):
        out = [
            simulate(build(a, p, 0.1), x0, 1.0, 20).final
            for build in (Chain, SDE)
            for p in (o, objective("sum, B=2", t), objective("noisy", t))
        ]
        out += [
            flow(a, o.H, x0, 1.0)[1],
            closed_covariance(Chain(a, o, 0.1)),
            closed_covariance(SDE(a, o, 0.1)),
            torch.tensor(circle_error(a, circle, 0.1, 1.0, np.sin)),
        ]
        return out + [
            torch.tensor(
                [basin_radius(a, o.H), hover_radius(a, o.H, 0.1), suboptimality(Chain(a, o, 0.1))]
            )
        ]

    expected = numbers(SGD())
    for kind in (USAM, DNSAM, SAM):
        for a, b in zip(numbers(kind(0.0)), expected):
            assert a.equal(b)


@pytest.mark.parametrize("kind", [optim.USAM, optim.DNSAM, optim.SAM])
def test_optimizers_without_radius_are_their_base(kind):
    torch.manual_seed(0)
    one = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    other, X, y = copy.deepcopy(one), torch.randn(8, 3), torch.randn(8, 1)
    more = dict(full_grad_norm=lambda: 2.0) if kind is optim.DNSAM else {}
    a, b = (
        kind(one.parameters(), torch.optim.Adam, rho=0.0, lr=0.01, **more),
        torch.optim.Adam(other.parameters(), lr=0.01),
    )
    for _ in range(5):
        for net, opt in ((one, a), (other, b)):

            def closure():
                opt.zero_grad()
                loss = torch.nn.functional.mse_loss(net(X), y)
                loss.backward()
                return loss

            opt.step(closure)
    for p, q in zip(one.parameters(), other.parameters()):
        assert p.equal(q)


# --- η → 0 ---


def slope(values, factor):
    return [math.log(abs(a / b)) / math.log(factor) for a, b in zip(values, values[1:])]


@pytest.mark.parametrize("algorithm", [SGD(), USAM(0.3)], ids=lambda a: type(a).__name__)
def test_moments_as_eta_vanishes(algorithm):
    """At a fixed time the mean goes to the flow's end, the covariance to 0, and stationary covariances over η to Lyapunov's, each with an error of order η."""
    t = data()
    H = (t["R"] @ t["R"].T + torch.eye(3, dtype=F64)) / 4
    o, x0 = Quadratic((H + H.T) / 2, cov=t["root"] @ t["root"].T), t["x"][0]
    end = flow(algorithm, o.H, x0, 2.0)[1][-1]
    limit = stationary_covariance(SDE(algorithm, o, 1.0))

    def gaps(eta):
        mean, cov = linear_moments(Chain(algorithm, o, eta), x0, 2.0)
        return (
            (mean - end).norm().item(),
            cov.norm().item(),
            (stationary_covariance(Chain(algorithm, o, eta)) / eta - limit).norm().item(),
        )

    for values in zip(*[gaps(2.0**-k) for k in (7, 8, 9, 10)]):
        assert all(abs(s - 1) < 0.05 for s in slope(values, 2)), values
    a, b = (stationary_covariance(SDE(algorithm, o, eta)) / eta for eta in (1e-8, 1.0))
    assert (a - b).abs().max() <= 100 * EPS64 * b.abs().max() * torch.linalg.cond(o.H)


@pytest.mark.parametrize(
    "algorithm", [USAM(0.3), SAM(0.3), DNSAM(0.3)], ids=lambda a: type(a).__name__
)
def test_full_batch_runs_follow_the_flow(algorithm):
    """|x_k − x(kη)| is of order η while the gradient is away from 0."""
    H, x0 = (
        torch.diag(torch.tensor([1.0, 0.5, -0.3], dtype=F64)),
        torch.tensor([1.0, -1.0, 0.5], dtype=F64),
    )
    end = flow(algorithm, H, x0, 0.5)[1][-1]
    gaps = [
        (simulate(Chain(algorithm, Quadratic(H), 2.0**-k), x0, 0.5, 2, every=10**6).final[0] - end)
        .norm()
        .item()
        for k in (7, 8, 9, 10)
    ]
    assert all(abs(s - 1) < 0.05 for s in slope(gaps, 2)), gaps


@pytest.mark.parametrize("algorithm", ALL[1:], ids=lambda a: type(a).__name__)
def test_levels_and_steps_as_eta_vanishes(algorithm):
    """The algorithm's level over its SDE's (with the exact noise) goes to 1 with an error of order η, DNSAM's of a lower order, as its noise grows near the minimum;
    and an Euler step of length h moves by b h and √h times the noise."""
    o = Quadratic(torch.diag(torch.tensor([2.0, 1.0, 0.5, 0.7], dtype=F64)), 0.5)
    ratio = [
        suboptimality(Chain(algorithm, o, eta))
        / suboptimality(SDE(algorithm, o, eta, noise="exact"))
        - 1
        for eta in (0.02, 0.01, 0.005)
    ]
    low, high = (0.6, 0.9) if isinstance(algorithm, DNSAM) else (0.95, 1.05)
    assert all(low < s < high for s in slope(ratio, 2)), ratio
    x, xi = normal(0, 5, 4), normal(1, 5, 4)
    for eta in (1e-3, 1e-9, 1e-15):
        sde = SDE(algorithm, o, eta)
        moved, h = sde.step(x, xi, eta) - x, eta
        assert (
            moved - h * drift(algorithm, o, x) - h**0.5 * sde.diffusion(x, xi)
        ).abs().max() <= 8 * EPS64 * (x.abs().max() + 1)
        assert (
            sde.covariance(x) / eta - noise_covariance(algorithm, o, x)
        ).abs().max() <= 8 * EPS64 * noise_covariance(algorithm, o, x).abs().max()


def test_weak_errors_as_eta_vanishes():
    """On the circle the exact weak error of each SDE at ρ = ½√η falls with order 1 down to 2⁻¹²; below, rounding is all that could be left, and it isn't yet."""
    for kind, problem in periodic_examples(1).items():
        errors = [
            circle_error(kind(0.5 * 2 ** (-k / 2)), problem, 2.0**-k, 1.0, np.sin)
            for k in (10, 11, 12)
        ]
        assert all(abs(s - 1) < 0.1 for s in slope(errors, 2)), (kind, errors)


def test_intervals_of_few_paths():
    """The interval of a weak error has the known difference in 95 of 100 cases, from three paths too; 1.96 standard errors have it in 78 of 100."""
    o, x0 = Quadratic(torch.eye(1, dtype=F64), sigma=1.0), torch.ones(1, dtype=F64)
    chain, sde = Chain(USAM(0.5), o, 0.5), SDE(SGD(), o, 0.5)
    known = (linear_moments(chain, x0, 2.0)[0] - linear_moments(sde, x0, 2.0)[0]).item()
    found = [weak_error(chain, sde, x0, 2.0, lambda x: x[..., 0], 3, seed) for seed in range(200)]
    hits = sum(e.ci_low <= known <= e.ci_high for e in found)
    narrow = sum(abs(e.difference - known) <= 1.96 * e.sem for e in found)
    assert narrow < 170 < 180 < hits < 199, (narrow, hits)


# --- order, threads, blocks ---


def test_the_order_of_paths_does_not_matter():
    """Without noise, permuted starts give permuted ends, and the same statistics up to rounding of a sum over n paths; threads and chunks give the same to the last bit."""
    n, o = 40_000, NoisyLoss(lambda x: (x**4).sum() / 4 + x[0] * x[1], 2)
    x0, order = normal(0, n, 2) / 4, torch.randperm(n, generator=torch.Generator().manual_seed(1))
    for process in (Chain(SAM(0.1), o, 0.05), SDE(USAM(0.1), o, 0.05)):
        runs = [
            simulate(process, x, 0.2, n, threads=threads, chunk=chunk)
            for x, threads, chunk in ((x0, 1, None), (x0[order], 2, 30_000), (x0, 2, 7))
        ]
        assert (runs[1].final - runs[0].final[order]).abs().max() <= 64 * EPS64 * runs[
            0
        ].final.abs().max() and runs[2].final.equal(runs[0].final)
        for kind in ("mean", "std", "sem"):
            a, b, c = (getattr(r, kind)["x"] for r in runs)
            assert (a - b).abs().max() <= EPS64 * n**0.5 * x0.abs().max() and a.equal(c)


def test_statistics_far_from_zero():
    """Mean and deviation of numbers near 10⁸ with deviation 1: no cancellation, as sums of squares would have; in single precision, the rounding of the points is all."""
    still = Chain(SGD(), Quadratic(torch.zeros(1, 1, dtype=F64)), 0.1)
    for shift in (0.0, 1e8):
        x0 = normal(0, 20_000, 1) + shift
        run = simulate(still, x0, 0.1, len(x0))
        assert (
            abs(run.std["x"][-1].item() - x0.std().item()) <= 1e-7 * (shift > 0) + 1e-13
            and abs(run.mean["x"][-1].item() - x0.mean().item()) <= EPS64 * max(shift, 1) * 4
        )
    single = simulate(Chain(SGD(), Quadratic(torch.zeros(1, 1)), 0.1), x0.float(), 0.1, len(x0))
    assert (
        abs(single.mean["x"][-1].item() - x0.float().double().mean().item())
        <= 1e-7 * EPS32 * 1e8 + 1e-7
    )


@pytest.mark.parametrize("steep, far", [(1e20, 1.0), (1e-20, 1e-20), (1e-150, 1e-20), (1e100, 1e20)])
def test_saddles_in_other_units(steep, far):
    """Curvatures times a factor are slower or faster, distances times a factor larger: nothing else"""
    H, x = torch.tensor([[0.9, 0.4], [0.4, -0.6]], dtype=F64), torch.tensor([[0.2, -0.1], [0.5, 0.3]], dtype=F64)
    t, points = flow(SAM(0.3), H, x, 1.0, steps=5)
    times, there = flow(SAM(0.3 * far), H * steep, x * far, 1.0 / steep, steps=5)
    torch.testing.assert_close(times * steep, t, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(there / far, points, rtol=1e-8, atol=1e-10)
    arrival = arrival_time(SAM(0.3 * far), H * steep, x * far) * steep
    torch.testing.assert_close(arrival, arrival_time(SAM(0.3), H, x), rtol=1e-8, atol=0)
    escape = escape_time(SAM(0.3 * far), H * steep, 0.1 / steep, 0.2 * steep * far, 0.1 * far) * steep
    assert abs(escape / escape_time(SAM(0.3), H, 0.1, 0.2, 0.1) - 1) < 1e-9


@pytest.mark.parametrize("rho, x", [(0.3, 1e-12), (1e-8, 1e6), (1e-3, 1e12)])
def test_arrivals_from_very_near_and_far(rho, x):
    """In one dimension the time is log(1 + |x|/ρ)/λ"""
    found = arrival_time(SAM(rho), torch.tensor([[2.0]], dtype=F64), torch.tensor([x], dtype=F64))
    assert abs(found.item() / (math.log1p(x / rho) / 2) - 1) < 1e-8


def test_times_and_distances_beyond_a_double():
    """They are refused, or computed without the squares that overflow"""
    H = -torch.eye(1, dtype=F64)
    assert abs(escape_time(SGD(), H, 0.1, 1e-200, 1e-199) / escape_time(SGD(), H, 0.1, 1.0, 10.0) - 1) < 1e-9
    with pytest.raises(ValueError, match="too far apart for a double"):
        escape_time(SGD(), H, 0.1, 1e-200, 1.0)
    with pytest.raises(ValueError, match="rho must not be that small beside x0"):
        arrival_time(SAM(1e-200), H, torch.ones(1, dtype=F64))


def in_units(kind, s, dtype):
    """A loss and its noise times s, and a point"""
    H, B = normal(0, 6, 3, 3), normal(1, 6, 3)
    H, B = ((s * t).to(dtype) for t in (H @ H.mT, B))
    x = torch.tensor([0.3, -0.2, 0.5], dtype=dtype)

    def losses(x):
        return torch.einsum("nij,i,j->n", H, x, x) / 2 + B @ x

    if kind == "quadratic":
        return Quadratic(H[0], sigma=0.5 * s), x
    if kind == "noisy":
        return NoisyLoss(lambda x: losses(x.sin())[0], 3, sigma=0.5 * s), x
    batch_size = int(kind[-1])
    if kind.startswith("samples"):
        return FiniteSum(losses, 6, 3, batch_size=batch_size, replace=False), x
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).to(dtype)
    X, y = (normal(k, 6, k).to(dtype) for k in (3, 1))
    objective = FiniteSum.from_module(
        net, lambda out, y: s * (out - y).square().mean(), X, y, batch_size, replace=False
    )
    return objective, objective.x0


@pytest.mark.parametrize("s", [1e25, 1e-25])
@pytest.mark.parametrize("kind", ["quadratic", "noisy", "samples 1", "samples 2", "network 1", "network 2"])
@pytest.mark.parametrize("algorithm", [DNSAM(0.1), SAM(0.1)])
def test_losses_in_other_units(algorithm, kind, s):
    """In single precision, whose squares overflow or vanish there, all is what it is in double precision"""

    def numbers(dtype):
        objective, x = in_units(kind, s, dtype)
        found = [drift(algorithm, objective, x, expansion) for expansion in ("first", "second")]
        xi = torch.arange(noise_dim(objective, algorithm), dtype=dtype) / 3 - 1
        found.append(noise_sample(algorithm, objective, x, xi))
        if kind in ("quadratic", "noisy") or isinstance(algorithm, SAM):
            found.append(regularized_loss(algorithm, objective, x))
        return found

    for single, double in zip(numbers(F32), numbers(F64)):
        gap = (single.double() - double).abs().max() / double.abs().max()
        assert gap <= 32 * EPS32


def test_an_inverse_that_half_precision_cannot_hold():
    """DNSAM divides by ‖∇f‖; in float16, 1/‖∇f‖ is infinite below 1.5e-5"""
    x = torch.ones(2, dtype=torch.float16)
    for size in (1e-4, 1e-6):
        objective = Quadratic(size * torch.eye(2, dtype=torch.float16))
        if size == 1e-4:
            assert drift(DNSAM(0.1), objective, x).isfinite().all()
            continue
        with pytest.raises(ValueError, match="whose inverse torch.float16 cannot hold"):
            drift(DNSAM(0.1), objective, x)
        with pytest.raises(ValueError, match="whose inverse torch.float16 cannot hold"):
            DNSAM(0.1).perturbation(objective, x, torch.zeros_like(x))


@pytest.mark.parametrize("size, sigma", [(1.0, 1e-160), (1e200, 0.0), (1e200, 1.0), (1.0, 5e-324)])
def test_directions_whose_squares_overflow(size, sigma):
    """The mean direction was 0 there"""
    with pytest.raises(ValueError, match="must have a finite square"):
        gaussian_direction(torch.full((3,), size, dtype=F64), sigma)
    found = gaussian_direction(torch.full((3,), min(size, 1e150), dtype=F64), sigma and max(sigma, 1e-150))
    torch.testing.assert_close(found.mean, torch.full((3,), 3**-0.5, dtype=F64))


@pytest.mark.parametrize("s", [1e-30, 1e-20, 1.0, 1e20])
def test_curvatures_in_other_units(s):
    """The norm of a Hessian-vector product vanished or overflowed in single precision, and Lanczos' method ended at once"""
    R = normal(0, 12, 12)
    M = R @ R.T
    values = torch.linalg.eigvalsh(M)
    H, start = (s * M).float(), normal(1, 12).float()
    found, _, _, smallest = lanczos(lambda v: H @ v, start, 12, 2)
    torch.testing.assert_close(found.double() / s, values[-2:].flip(0), rtol=1e-5, atol=0)
    assert abs(smallest / s - values[0]) < 1e-5 * values[-1]
    largest = largest_eigenvalue(lambda x, v: v @ H, start)
    assert abs(largest.double() / s / values[-1] - 1) < 1e-5 and largest.dtype == F32


@pytest.mark.parametrize("kind", [Fraction, np.float32, np.float64])
def test_numbers_of_other_kinds(kind):
    """A radius or a rate that is a fraction, or a number of numpy"""
    bowl, x = Quadratic(torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64), 0.1), torch.ones(2, dtype=F64)
    eighth = kind(1) / kind(8)

    def ends(v):
        how = dict(n_paths=4, t_end=8 * v)
        yield simulate(Chain(SAM(v), bowl, v), x, **how).final
        yield simulate(SDE(DNSAM(v), bowl, v, weight_decay=v), x, dt=v / 2, **how).final
        yield SDE(SAM(v), bowl, v).step(x, x, v)
        yield regularized_loss(SAM(v), bowl, x)

    assert all(a.equal(b) for a, b in zip(ends(eighth), ends(0.125)))
