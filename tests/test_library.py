"""What runs through all modules: kinds of tensors, threads, progress, objectives of a user's own, the command line."""

import copy
import itertools
import math
import subprocess
import sys

import pytest
import torch

from samsde.algorithm import DNSAM, SAM, SGD, USAM, Algorithm, Chain, Linear
from samsde.ensemble import simulate
from samsde.experiments.examples import SignSAM
from samsde.hessian_noise import cross_covariance, noise_covariance, sgd_covariance
from samsde.implicit_regularizer import drift, regularized_loss
from samsde.objective import (
    Additive,
    FiniteSum,
    Gaussian,
    Minibatches,
    NoisyLoss,
    Objective,
    Quadratic,
    Support,
)
from samsde.sde import SDE

KINDS = [SGD(), USAM(0.1), DNSAM(0.1), SAM(0.1), SignSAM(0.1)]


def objectives(dtype, device):
    generator = torch.Generator().manual_seed(0)
    A, y, H = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for shape in [(6, 3), (6,), (3, 3)]
    )
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1)).to(
        device, dtype
    )
    return {
        "quadratic": Quadratic(H @ H.T, 0.2),
        "quadratic with a covariance": Quadratic(H @ H.T, cov=H.T @ H),
        "noisy": NoisyLoss(lambda x: torch.log1p(x.square().sum()) + x[0] * x[1], 3, 0.2),
        "sum": FiniteSum(lambda x: torch.log1p(torch.exp(-y * (A @ x))), 6, 3),
        "sum, B=2": FiniteSum(lambda x: (A @ x - y) ** 2, 6, 3, 2, False),
        "module": FiniteSum.from_module(net, torch.nn.MSELoss(), A, y[:, None], batch_size=2),
    }


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", objectives(torch.float32, "cpu"))
def test_in_kind(name, dtype, device):
    """Tensors come back in the dtype and on the device of the point, with its leading axes, from every function."""
    objective = objectives(dtype, device)[name]
    x = torch.randn(4, 2, objective.dim, generator=torch.Generator().manual_seed(1)).to(
        device, dtype
    )
    for algorithm in KINDS:
        sde = SDE(algorithm, objective, 0.1, draws=16)
        xi = torch.ones(4, 2, sde.noise_dim, dtype=dtype, device=device)
        points = [
            drift(algorithm, objective, x, draws=16),
            drift(algorithm, objective, x, "exact", draws=16),
            sde.diffusion(x, xi),
            sde.step(x, xi, 0.05),
        ]
        matrices = [
            sgd_covariance(objective, x),
            cross_covariance(algorithm, objective, x, draws=16),
            noise_covariance(algorithm, objective, x, draws=16),
        ]
        numbers = [objective.loss(x)] + (
            []
            if isinstance(algorithm, DNSAM)
            else [regularized_loss(algorithm, objective, x, draws=16)]
        )
        for group, shape in [
            (points, x.shape),
            (matrices, (*x.shape, objective.dim)),
            (numbers, x.shape[:-1]),
        ]:
            for t in group:
                assert (t.shape, t.dtype, t.device.type) == (
                    shape,
                    dtype,
                    device,
                ) and torch.isfinite(t).all()
    end = simulate(Chain(SAM(0.1), objective, 0.1), x[0, 0], 0.5, 6).final
    assert (end.shape, end.dtype, end.device.type) == ((6, objective.dim), dtype, device)


def test_sweeps_are_their_members():
    """rho and eta as tensors over the paths give what they give one by one."""
    rho, eta = (
        torch.tensor([0.05, 0.1, 0.3], dtype=torch.float64),
        torch.tensor([[0.1], [0.05]], dtype=torch.float64),
    )
    for objective in objectives(torch.float64, "cpu").values():
        x = torch.ones(2, 3, objective.dim, dtype=torch.float64)
        for kind in (USAM, DNSAM, SAM, SignSAM):
            whole = SDE(kind(rho), objective, eta, draws=8)
            xi = whole.draw((2, 3), torch.Generator().manual_seed(0), dtype=torch.float64)
            steps, covariances = whole.step(x, xi, 0.05), whole.covariance(x)
            for i in range(2):
                for j in range(3):
                    one = SDE(kind(rho[j].item()), objective, eta[i].item(), draws=8)
                    torch.testing.assert_close(
                        one.step(x[i, j], xi[i, j], 0.05), steps[i, j], rtol=1e-9, atol=1e-11
                    )
                    torch.testing.assert_close(
                        one.covariance(x[i, j]), covariances[i, j], rtol=1e-9, atol=1e-11
                    )


class Twice(USAM):
    def perturbation(self, objective, x, gamma):
        return 2 * objective.sample_grad(x, gamma)


class TwiceSAM(SAM):
    def perturbation(self, objective, x, gamma):
        return 2 * super().perturbation(objective, x, gamma)


@pytest.mark.parametrize("name", ["noisy", "sum"])
@pytest.mark.parametrize("kind", ["first", "exact"])
def test_subclass_has_its_own_drift(name, kind):
    """A subclass that replaces the perturbation does not inherit its parent's drift: twice the perturbation is twice the radius."""
    objective, x = (
        objectives(torch.float64, "cpu")[name],
        torch.tensor([0.5, 0.3, -0.2], dtype=torch.float64),
    )
    for twice, once in ((Twice, USAM), (TwiceSAM, SAM)):
        b, sem = drift(twice(0.1), objective, x, kind, draws=4_000, return_sem=True)
        of = lambda rho: drift(once(rho), objective, x, kind, draws=4_000, seed=1, return_sem=True)
        within = lambda other: (
            (b - other[0]).abs() <= 4.5 * (sem**2 + other[1] ** 2).sqrt() + 1e-12
        ).all()
        assert within(of(0.2)) and not within(of(0.1))


def test_threads_share_a_module_safely():
    """A module's parameters are swapped while it runs; two threads must not see each other's."""
    objective = objectives(torch.float64, "cpu")["module"]
    run = lambda threads: (
        simulate(
            Chain(SAM(0.1), objective, 0.1), objective.x0, 2.0, 4_000, chunk=100, threads=threads
        ).final
    )
    assert run(2).equal(run(1))


def test_progress_changes_nothing(capsys):
    chain, x0 = Chain(SAM(0.1), Quadratic(torch.eye(2), 0.1), 0.1), torch.ones(2)
    assert simulate(chain, x0, 1.0, 10, progress=True).final.equal(
        simulate(chain, x0, 1.0, 10).final
    )
    assert "100%" in capsys.readouterr().err


class Rademacher(Minibatches):
    """A law of a user's own: Z = ±1, by a draw of one of two sample numbers."""

    def __init__(self):
        super().__init__(2)


class Tilted(Objective):
    """f_γ(x) = ½|x|² ± x₀ x₁: neither additive noise nor a FiniteSum"""

    dim, law = 2, Rademacher()

    def loss(self, x):
        return (x * x).sum(-1) / 2

    def sample_loss(self, x, gamma):
        return self.loss(x) + (2 * gamma[..., 0] - 1) * x[..., 0] * x[..., 1]


def test_objective_of_ones_own():
    """A law and a sample loss are enough: here ∇f_± = x ± Jx and ∇²f_± = I ± J with J the exchange, so E‖g‖² = 2‖x‖², E[Hg] = 2x."""
    objective, x = Tilted(), torch.tensor([0.5, -2.0], dtype=torch.float64)
    Jx = x.flip(-1)
    torch.testing.assert_close(drift(USAM(0.1), objective, x), -1.2 * x)
    torch.testing.assert_close(drift(DNSAM(0.1), objective, x), -(1 + 0.2 / x.norm()) * x)
    torch.testing.assert_close(sgd_covariance(objective, x), torch.outer(Jx, Jx))
    torch.testing.assert_close(cross_covariance(USAM(0.1), objective, x), 2 * torch.outer(Jx, Jx))
    torch.testing.assert_close(
        noise_covariance(USAM(0.1), objective, x), 1.44 * torch.outer(Jx, Jx)
    )
    assert (
        abs(regularized_loss(USAM(0.1), objective, x).item() - objective.loss(x).item() * 1.2)
        < 1e-12
    )
    sde = SDE(USAM(0.1), objective, 0.1)
    step = sde.step(x, torch.tensor([1.0, -1.0], dtype=torch.float64), 0.05)
    torch.testing.assert_close(
        step, x - 0.05 * 1.2 * x + math.sqrt(0.1 * 0.05) * math.sqrt(2) * 1.2 * Jx
    )


class Law:
    """One standard normal number, of which no law of the library knows"""

    noiseless = False

    def draw(self, shape, generator=None, *, dtype=None, device=None):
        return torch.randn(*shape, 1, generator=generator, dtype=dtype, device=device)

    def support(self, draws, generator=None, *, dtype=None, device=None):
        return Support(self.draw((draws,), generator, dtype=dtype, device=device), False)

    def size(self, draws):
        return draws


class Stretched(Objective):
    """f_γ(x) = |x|² (1 + γ/2)"""

    dim, law = 2, Law()

    def loss(self, x):
        return (x * x).sum(-1)

    def sample_loss(self, x, gamma):
        return (x * x).sum(-1) * (1 + gamma[..., 0] / 2)


def test_a_law_of_ones_own():
    """It has the four names that a law needs, and no batch size."""
    chain = Chain(USAM(0.1), Stretched(), 0.01)
    x = torch.ones(2, dtype=torch.float64)
    gamma = torch.tensor([0.4], dtype=torch.float64)
    h = 2 * 1.2
    torch.testing.assert_close(chain.step(x, gamma), x - 0.01 * h * (1 + 0.1 * h) * x)
    assert simulate(chain, x, 0.05, 3).final.isfinite().all()
    b, sem = drift(USAM(0.1), Stretched(), x, draws=4000, return_sem=True)
    assert ((b + 2 * x + 0.1 * 4 * 1.25 * x).abs() < 5 * sem).all()


class NoMean(Stretched):
    def loss(self, x):
        return 2 * (x * x).sum(-1)


class Lawless(Stretched):
    law = None


class Turning(Additive):
    """A field that is the gradient of no loss"""

    def grad(self, x):
        return torch.stack([x[..., 1], -x[..., 0]], -1)


class PathMean(Algorithm):
    def potential(self, g):
        return (g - g.mean(0)).square().sum(-1) if g.ndim > 1 else g.square().sum(-1)


class NumberOfPath(Linear):
    """c without an axis for the coordinates: with as many paths as coordinates it fits, and is wrong"""

    def scale(self, grad):
        return 1 / (1 + (grad * grad).sum(-1))


class Constant(Algorithm):
    def potential(self, g):
        return 1.0


class Raised(Quadratic):
    """A quartic that is no longer ½ xᵀHx, on which what goes by H is wrong"""

    def loss(self, x):
        return (x * (x @ self.H)).sum(-1) / 2 + (x**4).sum(-1)

    def grad(self, x):
        return x @ self.H + 4 * x**3

    def hvp(self, x, v):
        return v @ self.H + 12 * x**2 * v

    def add_grad_(self, y, x, a):
        return y + a * self.grad(x)

    def add_hvp_(self, y, x, v, a):
        return y + a * self.hvp(x, v)


class RaisedThroughout(Raised):
    """Right in itself, but no Quadratic"""

    hessian, third = Objective.hessian, Objective.third


class HeavyTails(Quadratic):
    def draw(self, shape, generator=None, *, dtype=None, device=None):
        return super().draw(shape, generator, dtype=dtype, device=device) ** 3


class Lazy(Minibatches):
    def draw(self, shape, generator=None, *, dtype=None, device=None):
        return torch.zeros(*shape, self.batch_size, dtype=torch.long, device=device)


class Multiplied(Additive):
    """Its noise is a factor, not a term"""

    def loss(self, x):
        return x.square().sum(-1)

    def sample_loss(self, x, gamma):
        return self.loss(x) * (1 + gamma[..., 0])

    def sample_grad(self, x, gamma):
        return 2 * x * (1 + gamma[..., :1])

    def sample_hvp(self, x, gamma, v):
        return 2 * v * (1 + gamma[..., :1])

    def grads(self, x, gamma):
        return self.sample_grad(x, gamma), self.grad(x)


def lazy_sum():
    A = torch.eye(3, dtype=torch.float64)
    objective = FiniteSum(lambda x: (A @ x - 1).square(), 3, 3)
    objective.law = Lazy(3, 1)
    return objective


NOISY = NoisyLoss, (lambda x: (x**4).sum(), 2, 0.1)


def wrong(method):
    """A loss with one method that returns twice what it should"""

    def twice(self, *args):
        found = getattr(super(kind, self), method)(*args)
        return tuple(2 * v for v in found) if isinstance(found, tuple) else 2 * found

    base, args = (FiniteSum, (lambda x: x**4, 2, 2)) if method == "grads" else NOISY
    kind = type("Wrong", (base,), {method: twice})
    return kind(*args)


class Further(SAM):
    def ascent(self, objective, x, gamma):
        return 2 * super().ascent(objective, x, gamma)


bowls = [Quadratic(torch.eye(d, dtype=torch.float64), 0.1) for d in (2, 3)]
MISTAKES = {
    "a loss that is no mean": (USAM(0.1), NoMean(), "its loss is not the mean of sample_loss"),
    "no law": (USAM(0.1), Lawless(), "Lawless must have a `law`, an object that draws γ, got None"),
    "a field": (USAM(0.1), Turning(2, 0.1), "its grad is the gradient of no loss"),
    "paths together": (PathMean(0.1), bowls[0], "one path after another"),
    "a scale": (NumberOfPath(0.1), bowls[1], r"shape \(\.\.\., 1\), got \(3,\)"),
    "a number": (Constant(0.1), bowls[0], "must be a tensor, got float"),
    "no quadratic": (USAM(0.1), Raised(bowls[0].H), "hessian is not that of hvp"),
    "another": (USAM(0.1), RaisedThroughout(bowls[0].H), "hvp is not the product with H"),
    "draws": (SAM(0.1), HeavyTails(bowls[0].H, 0.1), "overrides `draw`"),
    "a law": (SAM(0.1), lazy_sum(), "whose law is known, but has the law Lazy"),
    "no term": (SAM(0.1), Multiplied(2, 0.1), "sample_grad is not grad plus gamma"),
    "grads": (DNSAM(0.1), wrong("grads"), "grads are not sample_grad and grad"),
    "sample_hvp": (SAM(0.1), wrong("sample_hvp"), "sample_hvp is not the derivative"),
    "add_grad_": (USAM(0.1), wrong("add_grad_"), "add_grad_ does not add grad"),
    "add_hvp_": (USAM(0.1), wrong("add_hvp_"), "add_hvp_ does not add hvp"),
    "third": (USAM(0.1), wrong("third"), "third is not the derivative of hvp"),
    "ascent": (Further(0.1), bowls[0], "overrides `ascent`, of which formulas know"),
}


DERIVED = {  # method -> words
    "hvp": "its hvp is not the derivative of grad",
    "hessian": "its hessian is not that of hvp",
    "third": "its third is not the derivative of hvp",
    "add_grad_": "its add_grad_ does not add grad",
    "add_hvp_": "its add_hvp_ does not add hvp",
    "sample_loss": "its (sample_grad is not the gradient of sample_loss|third is not)",
    "sample_hvp": "its sample_hvp is not the derivative of sample_grad",
    "sample_third": "its (sample_)?third is not the derivative of (sample_)?hvp",
    "draw": "overrides `draw`, of which formulas know nothing: write an Objective",
}


@pytest.mark.parametrize("base", [NoisyLoss, FiniteSum])
@pytest.mark.parametrize("method", DERIVED)
def test_one_method_of_ones_own(base, method):
    """Twice what the others say. The control is the class with the method as it is."""
    A = torch.eye(2, dtype=torch.float64) + 0.1

    def make(factor):
        def changed(self, *args, **kwargs):
            return factor * getattr(base, method)(self, *args, **kwargs)

        kind = type("Mine", (base,), {} if method == "draw" and factor == 1 else {method: changed})
        if base is NoisyLoss:
            return kind(lambda x: (A @ x).sin().sum(), 2, sigma=0.1)
        return kind(lambda x: (A @ x).sin(), 2, 2)

    Chain(USAM(0.1), make(1), 0.1)
    with pytest.raises(ValueError, match=DERIVED[method]):
        Chain(USAM(0.1), make(2), 0.1)


class Often(Minibatches):
    """The first samples alone, of which τ and κ know nothing"""

    def draw(self, shape, generator=None, **kind):
        return super().draw(shape, generator, **kind).clamp(max=1)


class Heavy(Gaussian):
    """Which the chain would take for a normal number"""

    def draw(self, shape, generator=None, **kind):
        return super().draw(shape, generator, **kind) ** 3


@pytest.mark.parametrize("law", [Often(4, 2), Heavy(2, 0.1), Law()])
def test_another_law_of_minibatches_or_noise(law):
    A = torch.eye(4, dtype=torch.float64)[:, :2] + 0.1
    sums, noisy = FiniteSum(lambda x: (A @ x).sin(), 4, 2, 2), NoisyLoss(lambda x: x.sum(), 2)
    for objective in (sums, noisy):
        Chain(USAM(0.1), copy.copy(objective), 0.1)
        objective.law = law
        with pytest.raises(ValueError, match="whose law is known, but has the law"):
            drift(USAM(0.1), objective, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("method", ["ascent", "mean_over_cuts", "cuts", "of_gradient", "draw"])
def test_machinery_of_an_algorithm(method):
    """A method that formulas pass by: the drift to first order of a doubled `ascent` was that of a single one."""
    kind = type("Mine", (USAM,), {method: lambda self, *args, **kwargs: None})
    with pytest.raises(ValueError, match=f"Mine overrides `{method}`, of which formulas know"):
        Chain(kind(0.1), bowls[0], 0.1)


def test_a_perturbation_from_that_of_its_base():
    """Half of DNSAM's, by super(): the scale of the base is asked, as its class has no potential."""

    class Half(DNSAM):
        def perturbation(self, objective, x, gamma):
            return super().perturbation(objective, x, gamma) / 2

    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    halved, plain = drift(Half(0.2), bowls[0], x), drift(DNSAM(0.1), bowls[0], x)
    torch.testing.assert_close(halved, plain)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_classes_of_ones_own(name):
    algorithm, objective, words = MISTAKES[name]
    x = torch.ones(objective.dim, dtype=objective.dtype or torch.float64)
    with pytest.raises((ValueError, TypeError), match=words):
        drift(algorithm, objective, x)


def test_command_line_as_a_module(tmp_path):
    command = [
        sys.executable,
        "-m",
        "samsde",
        "reproduce",
        "--quick",
        "--problem",
        "quadratic",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "The error of SGD's SDE is" in done.stdout, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {
        "error_vs_rho.csv",
        "error_vs_rho.png",
        "error_vs_rho.txt",
    }


@pytest.mark.parametrize(
    "n, B, replace",
    [
        (1, 1, True),
        (1, 1, False),
        (2, 1, True),
        (2, 2, False),
        (5, 1, False),
        (5, 2, True),
        (5, 3, False),
        (5, 4, True),
        (5, 5, False),
    ],
)
def test_moments_by_enumeration(n, B, replace):
    """Drift and covariances of random quadratic samples against plain sums over all minibatches; another batch size is the control."""
    generator = torch.Generator().manual_seed(n)
    g, H = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in [(n, 3), (n, 3, 3)]
    )
    H = H + H.mT
    objective = lambda B: FiniteSum(lambda x: g @ x + (H @ x @ x) / 2, n, 3, B, replace)
    batches = torch.tensor(
        list(
            itertools.product(range(n), repeat=B)
            if replace
            else itertools.combinations(range(n), B)
        )
    )
    gB, HB, x = g[batches].mean(1), H[batches].mean(1), torch.zeros(3, dtype=torch.float64)
    cov = lambda a, b: (a - a.mean(0)).T @ (b - b.mean(0)) / len(a)
    for algorithm, u in {
        USAM(0.3): gB,
        DNSAM(0.3): gB / g.mean(0).norm(),
        SAM(0.3): gB / gB.norm(dim=-1, keepdim=True),
    }.items():
        Hu = (HB @ u[..., None])[..., 0]

        def ours(o):
            return [
                -drift(algorithm, o, x),
                -drift(algorithm, o, x, "exact"),
                sgd_covariance(o, x),
                cross_covariance(algorithm, o, x),
                noise_covariance(algorithm, o, x, "exact"),
            ]

        G = gB + 0.3 * Hu
        expected = [G.mean(0), G.mean(0), cov(gB, gB), cov(gB, Hu), cov(G, G)]
        for a, b in zip(ours(objective(B)), expected):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        if n == 5:
            assert not any(
                torch.allclose(a, b, rtol=1e-3)
                for a, b in zip(ours(objective(B % 5 + 1))[2:], expected[2:])
            )


def test_few_draws_in_pairs_are_unbiased():
    """The covariance from a few drawn pairs ±Z has the mean of that from many; divided as if all were independent, it would not."""
    cubic, x = (
        NoisyLoss(lambda x: (x**3).sum() / 6 + x.sum(), 2, sigma=1.0),
        torch.ones(2, dtype=torch.float64),
    )
    few = torch.stack(
        [noise_covariance(USAM(0.3), cubic, x, "exact", draws=8, seed=s) for s in range(1_000)]
    )
    many, sem = (
        noise_covariance(USAM(0.3), cubic, x, "exact", draws=100_000),
        few.std(0) / len(few) ** 0.5,
    )
    assert ((few.mean(0) - many).abs() < 4.5 * sem).all() and (
        (few.mean(0) * 8 / 7 - many).abs() > 4.5 * sem
    ).diag().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [SAM, DNSAM])
def test_a_normalised_perturbation_of_any_size(kind, dtype):
    """u has norm 1 where the squares of float32 overflow or vanish, and where the norm is no number of float16. The control: u of a gradient that is 0."""
    half = dtype is torch.float16
    for size in (1e-4, 6e4) if half else (1e-30, 1e-24, 1.0, 1e24, 1e30):
        x = torch.full((3, 4), size, dtype=dtype)
        u = kind(0.1).perturbation(Quadratic(torch.eye(4, dtype=dtype)), x, torch.zeros_like(x))
        torch.testing.assert_close(u, torch.full_like(x, 0.5), rtol=1e-2, atol=0)
        gradient = torch.func.grad(SAM(0.1).potential)(x[0])
        torch.testing.assert_close(gradient, torch.full_like(gradient, 0.5), rtol=1e-2, atol=0)
    bowl = Quadratic(torch.eye(4, dtype=dtype))
    assert not SAM(0.1).perturbation(bowl, 0 * x, 0 * x).any()


@pytest.mark.parametrize("kind", [SGD, USAM, DNSAM, SAM])
@pytest.mark.parametrize("name", ["sum", "sum, B=2"])
def test_a_direction_of_its_own_is_the_exact_one(name, kind):
    """Clipped gradients, as a subclass of each algorithm: means and covariances over all minibatches."""

    class Clipped(kind):
        def direction(self, objective, x, gamma):
            return super().direction(objective, x, gamma).clamp(-0.1, 0.1)

    objective = objectives(torch.float64, "cpu")[name]
    algorithm, plain = (c() if kind is SGD else c(0.1) for c in (Clipped, kind))
    x = torch.tensor([0.4, -0.7, 0.2], dtype=torch.float64)
    every = objective.law.support(100).gammas
    G = algorithm.direction(objective, x.expand(len(every), 3), every)
    torch.testing.assert_close(drift(algorithm, objective, x, "exact"), -G.mean(0))
    covariance = torch.cov(G.T, correction=0)
    found = noise_covariance(algorithm, objective, x, "exact")
    torch.testing.assert_close(found, covariance, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(noise_covariance(plain, objective, x, "exact"), covariance, rtol=0.1)


def test_a_sweep_in_another_dtype():
    """What comes back has the dtype of the points, whatever that of the radii."""
    objective = objectives(torch.float32, "cpu")["noisy"]
    rho, x = torch.tensor([0.1, 0.3], dtype=torch.float64), torch.ones(2, 3)
    for function in (regularized_loss, drift):
        found = function(SAM(rho), objective, x, return_sem=True)
        alone = function(SAM(0.3), objective, x[1])
        assert all(t.dtype == torch.float32 for t in found)
        torch.testing.assert_close(found[0][1], alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_pieces_in_half_precision(dtype):
    """A sum over thousands of pieces does not stand still: a bound on memory changes no number."""
    n = 400
    rows = torch.linspace(0.5, 1.5, 2 * n, dtype=torch.float64).view(n, 2).to(dtype)

    def select(x, i):
        return (rows[i] @ x).square() / 2

    def functions(chunk):
        sums = [
            FiniteSum(lambda x: (rows @ x).square() / 2, n, 2, B, select=select, chunk=chunk)
            for B in (1, 2, n)
        ]
        x = torch.ones(2, dtype=dtype)
        batch = torch.arange(n)
        return [
            sums[0].grad(x),
            sums[0].hvp(x, x),
            sums[2].sample_grad(x, batch),
            *(drift(kind(0.5), o, x, draws=1024) for kind in (USAM, SAM) for o in sums[:2]),
            drift(SAM(0.5), sums[1], x, "exact"),
            regularized_loss(SAM(0.5), sums[1], x),
        ]

    for ours, known in zip(functions(1), functions(None)):
        torch.testing.assert_close(ours, known, rtol=0.02, atol=0)


def test_the_error_of_random_signs():
    """The radius decides the signs: over many, the errors that are told are those that are made."""
    objective = objectives(torch.float64, "cpu")["sum, B=2"]
    x = torch.tensor([0.4, -0.7, 0.2], dtype=torch.float64)
    far = []
    for rho in torch.linspace(0.1, 0.5, 200).tolist():
        exact, none = drift(USAM(rho), objective, x, return_sem=True)
        objective.method = "signs"
        found, sem = drift(USAM(rho), objective, x, return_sem=True)
        objective.method = None
        assert not none.any()
        far.append((found - exact) / sem)
    square = torch.stack(far).square().mean()  # of Student's t with 7 degrees of freedom: 7/5
    assert 0.5 < square < 4


def test_what_is_changed_after_the_first_use_is_checked_again():
    """Another law, or one with other numbers, another matrix, another function: each was taken as it was checked first"""
    f64, x = dict(dtype=torch.float64), torch.ones(2, dtype=torch.float64)

    def used(objective=None):
        objective = objective or Quadratic(torch.eye(2, **f64), 0.1)
        drift(SAM(0.1), objective, x)
        return objective

    class Uniform(Gaussian):
        def draw(self, shape, generator=None, *, dtype=None, device=None):
            return torch.rand(*shape, 2, generator=generator, dtype=dtype, device=device)

    def law(objective):
        objective.law = Gaussian(3, 0.1)

    def foreign(objective):
        objective.law = Uniform(2, 0.1)

    def sigma(objective):
        objective.law.sigma = -1.0

    def matrix(objective):
        objective.H = torch.tensor([[1.0, 5.0], [0.0, 1.0]], **f64)

    def entry(objective):
        objective.H[0, 1] = 5.0

    changes = {
        law: "must have dim=2, got a Gaussian with dim=3",
        foreign: "has the law Uniform",
        sigma: "sigma must be non-negative",
        matrix: "H must be symmetric",
        entry: "H must be symmetric",
    }
    for change, words in changes.items():
        objective = used()
        change(objective)
        with pytest.raises(ValueError, match=words):
            drift(SAM(0.1), objective, x)

    A = torch.arange(12.0, **f64).reshape(6, 2)
    for name, value, words in [
        ("batch_size", 9, "batch_size must be at most n"),
        ("n", 4, "law of FiniteSum must have n=6"),
    ]:
        objective = used(FiniteSum(lambda x: (A @ x) ** 2, 6, 2, batch_size=2, replace=False))
        setattr(objective.law, name, value)
        with pytest.raises(ValueError, match=words):
            drift(SAM(0.1), objective, x)
    algorithm = SAM(0.1)
    algorithm.rho = math.nan
    with pytest.raises(ValueError, match="rho must be finite"):
        drift(algorithm, used(), x)


def test_a_function_that_vmap_cannot_do_in_place_of_one_that_it_can():
    objective = NoisyLoss(lambda x: (x**4).sum(), 2, 0.1)
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64)
    drift(SAM(0.1), objective, x)
    objective.fn = lambda x: x[0] * x[1] if x.sum().item() > 0 else x[0] ** 2
    new = NoisyLoss(objective.fn, 2, 0.1)
    assert drift(SAM(0.1), objective, x).equal(drift(SAM(0.1), new, x))
