"""A diagnosis of a training run: what it reads, what it leaves alone, and its numbers against formulas."""

import copy
import itertools
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from samsde import diagnosis, optim
from samsde.algorithm import DNSAM, SAM, SGD, USAM, Algorithm, Chain
from samsde.diagnosis import (
    change_in_a_step,
    curvatures,
    diagnose,
    directions_at,
    diagnose_training,
    drift_of,
    largest_eigenvalue,
    momentum_terms,
    noise_in_regulariser,
    noise_in_run,
    products_at,
    products_of,
    read_optimizer,
    top_eigenvectors,
)
from samsde.drawn_steps import drawn, step_parts
from samsde.implicit_regularizer import drift
from samsde.epochs import epoch_noise
from samsde.experiments.examples import plane, three
from samsde.machinery.long_vectors import Sketch, lanczos
from samsde.monitor import Monitor
from samsde.moments import hessian_perturbation
from samsde.objective import FiniteSum, MinibatchLoss, NoisyLoss, Quadratic
from samsde.sde import SDE
from samsde.stability import stability_number
from samsde.weak_errors import step_system

F64 = torch.float64
generator = torch.Generator().manual_seed(0)
X = torch.randn(60, 5, generator=generator, dtype=F64)
y = torch.randint(3, (60,), generator=generator)


def make(dropout=0.2, norm=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        middle = nn.BatchNorm1d(6) if norm else nn.Identity()
        return nn.Sequential(
            nn.Linear(5, 6), middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)
        ).double()


def of(net, kind=optim.SAM, rho=0.1, **how):
    return kind(net.parameters(), torch.optim.SGD, rho=rho, **dict(lr=0.1) | how)


def look(net, optimizer, loss=F.cross_entropy, data=(X, y), **how):
    return diagnose_training(
        net, loss, data, optimizer, **dict(batch_size=10, progress=False, budget_s=3) | how
    )


def everything(net, optimizer):
    "Every bit of a run's state"
    tensors = {f"state {k}": v.clone() for k, v in net.state_dict().items()}
    tensors |= {
        f"grad {k}": p.grad.clone() for k, p in net.named_parameters() if p.grad is not None
    }
    for i, state in enumerate(optimizer.state.values()):
        tensors |= {
            f"optimizer {i} {k}": v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)
        }
    tensors["random"] = torch.get_rng_state()
    others = [
        [m.training for m in net.modules()],
        [p.requires_grad for p in net.parameters()],
        copy.deepcopy(
            [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        ),
        np.random.get_state()[1].tolist(),
        torch.is_grad_enabled(),
        list(net.state_dict()),
    ]
    return tensors, others


@pytest.mark.parametrize("kind", [optim.SAM, optim.USAM])
def test_changes_nothing(kind):
    net = make()
    optimizer = of(net, kind, momentum=0.9, weight_decay=1e-3)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(X[:10]), y[:10])
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    net[3].eval()
    before, modes = everything(net, optimizer)
    versions = [p._version for p in net.parameters()]
    look(net, optimizer)
    after, modes_after = everything(net, optimizer)
    assert before.keys() == after.keys() and modes == modes_after
    assert all(before[k].equal(after[k]) for k in before)
    assert versions == [p._version for p in net.parameters()]
    optimizer.step(closure)
    assert not all(before[k].equal(v) for k, v in everything(net, optimizer)[0].items())


def test_reads_the_optimizer():
    net = make()
    groups = [
        dict(params=net[0].parameters(), weight_decay=0.1),
        dict(params=[*net[1].parameters(), *net[4].parameters()]),
    ]
    algorithm, settings, decay = read_optimizer(
        net, optim.USAM(groups, torch.optim.SGD, rho=0.3, lr=0.2, momentum=0.5, dampening=0.1)
    )
    assert isinstance(algorithm, USAM) and algorithm.rho == 0.3
    assert (settings["η"], settings["momentum"], settings["dampening"]) == (0.2, 0.5, 0.1)
    assert decay.sum() == pytest.approx(0.1 * 36) and (decay[:36] == 0.1).all()
    plain = torch.optim.SGD(net.parameters(), lr=0.1)
    assert isinstance(read_optimizer(net, plain)[0], SGD) and isinstance(
        read_optimizer(net, plain, 0.2)[0], SAM
    )
    wrapper = type("Wrapped", (), dict(optimizer=plain))()
    assert read_optimizer(net, wrapper)[1]["η"] == 0.1


class OwnStep(torch.optim.SGD):
    def step(self, closure=None):
        pass


class OwnScale(optim.SAM):
    def scale(self, terms):
        return 2.0


class Another(torch.optim.Optimizer):
    "Of another package, by its looks"

    def __init__(self, params, base_optimizer, rho):
        super().__init__(params, dict(rho=rho))
        self.base_optimizer = base_optimizer(self.param_groups, lr=0.1)

    def step(self, closure=None):
        self.base_optimizer.step()


BAD = {
    "a step of its own": (lambda n: OwnStep(n.parameters(), lr=0.1), TypeError, "got OwnStep"),
    "a scale of its own": (
        lambda n: OwnScale(n.parameters(), torch.optim.SGD, lr=0.1),
        TypeError,
        "got OwnScale: how it perturbs is not known",
    ),
    "another package's": (
        lambda n: Another(n.parameters(), torch.optim.SGD, 0.1),
        TypeError,
        "got Another: how it perturbs is not known",
    ),
    "momentum 1": (
        lambda n: torch.optim.SGD(n.parameters(), lr=0.1, momentum=1.0),
        ValueError,
        "momentum must be below 1, got 1",
    ),
    "dampening 1": (
        lambda n: torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.5, dampening=1.0),
        ValueError,
        "dampening must be below 1, got 1",
    ),
    "an algorithm": (
        lambda n: SAM(0.1),
        TypeError,
        r"got samsde.algorithm.SAM: write samsde.optim.SAM\(",
    ),
    "a class": (lambda n: optim.SAM, TypeError, "got the class SAM"),
    "Adam": (
        lambda n: optim.SAM(n.parameters(), torch.optim.AdamW, lr=0.1),
        TypeError,
        "got AdamW",
    ),
    "two rates": (
        lambda n: torch.optim.SGD(
            [
                dict(params=n[0].parameters(), lr=0.2),
                dict(params=[*n[1].parameters(), *n[4].parameters()]),
            ],
            lr=0.1,
        ),
        ValueError,
        "one lr, got",
    ),
    "another model's": (
        lambda n: torch.optim.SGD(make().parameters(), lr=0.1),
        ValueError,
        "of which 0 are the model's",
    ),
    "every second step": (lambda n: of(n, interval=2), ValueError, "interval=2"),
    "other masks in the second pass": (
        lambda n: of(n, preserve_rng_state=False),
        ValueError,
        "preserve_rng_state=False",
    ),
    "no rate": (
        lambda n: torch.optim.SGD(n.parameters(), lr=0.0),
        ValueError,
        "lr must be positive",
    ),
    "no optimizer": (lambda n: 3, TypeError, "got int"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name):
    net = make()
    optimizer, error, message = BAD[name]
    with pytest.raises(error, match=message):
        look(net, optimizer(net))


def test_an_optimizer_is_no_algorithm():
    net = make(norm=False).eval()
    finite = FiniteSum.from_module(net, nn.CrossEntropyLoss(), X, y, 10)
    with pytest.raises(
        TypeError, match=r"got the optimizer samsde.optim.SAM: write samsde.algorithm.SAM\(rho\)"
    ):
        diagnose(of(net), finite, finite.x0, 0.1)
    assert diagnose(SAM(0.1), finite, finite.x0, 0.1, draws=8).terms["gradient"] > 0


def test_one_of_another_package():
    "Taken for SAM where its radius is given"
    net = make()
    algorithm, settings, _ = read_optimizer(
        net, Another(net.parameters(), torch.optim.SGD, 0.3), rho=0.2
    )
    assert isinstance(algorithm, SAM) and settings["ρ"] == 0.2


def test_frozen_parameters():
    "The optimizer may have them; the gradient is that of the others"
    net = make(0.0, norm=False)
    net[0].requires_grad_(False)
    found = look(net, of(net))
    known = torch.autograd.grad(F.cross_entropy(net(X), y), [*net[4].parameters()])
    assert found.terms["gradient"] == pytest.approx(
        torch.cat([g.flatten() for g in known]).norm().item(), rel=1e-9
    )


SETTINGS = {
    "half precision": (
        lambda: look(n := make().half(), of(n)),
        TypeError,
        "of float32 or float64, got torch.float16",
    ),
    "a state outside": (
        lambda: look(n := Counting(), of(n)),
        ValueError,
        "change from one call to the next",
    ),
}


class Counting(nn.Module):
    "Another function at each call, which no copy of its tensors tells"

    def __init__(self):
        super().__init__()
        self.net, self.calls = make(0.0, norm=False), []

    def forward(self, z):
        self.calls.append(z)
        return self.net(z) * len(self.calls)


@pytest.mark.parametrize("name", SETTINGS)
def test_refuses_a_model(name):
    call, error, message = SETTINGS[name]
    with pytest.raises(error, match=message):
        call()


def test_autocast():
    "Inside of it sums of gradients would be inexact; in the loss of a batch it may be"
    net = make(0.0, norm=False).float()
    data = X.float(), y

    def loss(module, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(module(batch[0]), batch[1])

    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="inside of torch.autocast: give batch_loss"),
    ):
        look(net, of(net), data=data)
    low, full = (
        look(net, of(net), loss=None, batch_loss=loss, data=data),
        look(net, of(net), data=data),
    )
    assert (
        low.terms["gradient"] == pytest.approx(full.terms["gradient"], rel=0.02)
        and low.terms["gradient"] != full.terms["gradient"]
    )


@pytest.mark.parametrize("dim", [1, 2])
def test_few_dimensions(dim):
    """By default there are as many eigenvectors as dimensions, if these are fewer than three."""
    table = diagnose(
        SAM(0.1), NoisyLoss(lambda x: (x**4).sum(), dim, 0.1), torch.ones(dim, dtype=F64), 0.05
    ).directions
    assert sum(name.startswith("eigenvector") for name in table.index) == dim


def test_says_how_a_loader_differs():
    data = torch.utils.data.TensorDataset(X, y)
    net = make()

    def said(**how):
        return " ".join(
            look(
                net,
                of(net),
                data=torch.utils.data.DataLoader(data, **how),
                batch_size=None,
                budget_s=1,
            ).coarse
        )

    assert "does not shuffle" in said(batch_size=10) and "does not shuffle" not in said(
        batch_size=10, shuffle=True
    )
    assert "last batch of an epoch has 12 samples" in said(batch_size=16, shuffle=True)
    assert "last batch" not in said(batch_size=16, shuffle=True, drop_last=True)


def test_says_what_reshuffling_leaves_of_the_noise():
    """By the formula at the step's curvature; nothing without shuffling, nor with momentum. Each batch's curvature is like that of all."""
    data, net = torch.utils.data.TensorDataset(X, y), make(0.0, norm=False)

    def look_at(momentum=0.0, **how):
        optimizer = optim.SAM(
            net.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=momentum
        )
        return look(
            net,
            optimizer,
            data=torch.utils.data.DataLoader(data, batch_size=10, **how),
            batch_size=None,
            budget_s=1,
        ).terms

    terms = look_at(shuffle=True)
    A = terms["largest eigenvalue"] * (1 + 0.05 * terms["c"] * terms["largest eigenvalue"])
    assert (
        terms["variance at epoch ends"]
        == pytest.approx(epoch_noise(0.1 * A, len(X), 10)[-1], rel=1e-9)
        and terms["variance at epoch ends"] < 0.1
    )
    assert not any(
        "epoch" in name
        for how in (dict(), dict(shuffle=True, momentum=0.9))
        for name in look_at(**how)
    )


def test_weight_decay_and_reshuffling():
    """Of samples of one curvature h, x⁺ = (1 − η(h + w))x + ηhc_i: the variance at epoch ends over
    all orders of four, over that with independent samples. Without the decay it is another."""
    h, w, eta = 0.4, 0.6, 0.3
    c = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=F64)
    o = FiniteSum(lambda x: h * (x - c).square() / 2, 4, 1, 1, "epochs")
    a = 1 - eta * (h + w)
    orders = itertools.permutations((eta * h * c).tolist())
    ends = np.var([sum(p * a ** (3 - k) for k, p in enumerate(order)) for order in orders])
    known = ends / (1 - a**8) / (np.var(eta * h * c.numpy()) / (1 - a**2))
    at = torch.tensor([0.7], dtype=F64)
    found = diagnose(SGD(), o, at, eta, weight_decay=w, draws=8, directions=0).terms
    assert found["variance at epoch ends"] == pytest.approx(known, rel=1e-9)
    without = diagnose(SGD(), o, at, eta, draws=8, directions=0).terms
    assert abs(without["variance at epoch ends"] / known - 1) > 0.3
    net = nn.Linear(1, 1, bias=False).double()
    data = torch.utils.data.TensorDataset(torch.full((4, 1), h**0.5, dtype=F64), c[:, None])
    run = look(
        net,
        torch.optim.SGD(net.parameters(), lr=eta, weight_decay=w),
        lambda out, target: (out - h**0.5 * target).square().mean() / 2,
        torch.utils.data.DataLoader(data, 1, shuffle=True),
        batch_size=None,
    )
    assert run.terms["variance at epoch ends"] == pytest.approx(known, rel=1e-6)


def test_refuses_in_the_middle_of_a_step():
    net = make()
    optimizer = of(net)
    F.cross_entropy(net(X[:10]), y[:10]).backward()
    optimizer.first_step()
    with pytest.raises(ValueError, match="between its two steps"):
        look(net, optimizer)


def test_is_that_of_the_finite_sum():
    "Without batch norm and dropout the same terms follow from `diagnose` of the finite sum"
    net = make(0.0, norm=False)
    found = look(net, of(net), budget_s=20)
    finite = FiniteSum.from_module(net, nn.CrossEntropyLoss(), X, y, 10, replace=False)
    known = diagnose(SAM(0.1), finite, finite.x0, 0.1, draws=2000, directions=0, top=1)
    assert found.terms["gradient"] == pytest.approx(known.terms["gradient"], rel=1e-8)
    assert not any("gradient" in words for words in found.coarse)
    for name in ("regulariser", "noise", "noise, SGD"):
        assert found.terms[name] == pytest.approx(known.terms[name], rel=0.25)
    assert found.terms["neglected in ρ"] == pytest.approx(
        known.terms["neglected in ρ"], abs=4 * found.terms["error of that"]
    )
    assert found.terms["neglected in η"] == pytest.approx(known.terms["neglected in η"], rel=0.3)
    assert (
        abs(found.terms["c"] - known.terms["c"])
        < 5 * (found.terms["error of c"] ** 2 + 1e-6) ** 0.5
    )
    assert found.terms["noise"] > 1.05 * found.terms["noise, SGD"]


def longest(net, rho):
    "The longer of g and G for each sample, by plain torch"
    params = [*net.parameters()]
    x = nn.utils.parameters_to_vector(params).detach()

    def gradient(i, at):
        nn.utils.vector_to_parameters(at, params)
        loss = F.cross_entropy(net(X[i : i + 1]), y[i : i + 1])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])

    found = []
    for i in range(len(X)):
        g = gradient(i, x)
        found.append(max(g.norm(), gradient(i, x + rho * g / g.norm()).norm()))
    nn.utils.vector_to_parameters(x, params)
    return torch.stack(found)


def test_steps_that_are_clipped():
    "Their share is that of the samples whose gradients are longer; SAM's are longer than SGD's"
    net = make(0.0, norm=False)
    sizes = longest(net, 0.5)
    clip = sizes.quantile(0.75).item()
    share = (sizes > clip).double().mean().item()
    how = dict(batch_size=1, budget_s=20, tolerance=10.0)
    found = look(net, of(net, rho=0.5), clip=clip, **how)
    draws = 50  # at least
    assert abs(found.terms["clipped"] - share) < 4 * (share * (1 - share) / draws) ** 0.5
    assert (longest(net, 1e-9) > clip).double().mean() < 0.6 * share
    strict = look(net, of(net, rho=0.5), clip=clip, **how | dict(tolerance=0.1))
    assert not strict and "of the steps clipped" in strict.reason
    assert look(net, of(net, rho=0.5), clip=1e6, **how).terms["clipped"] == 0
    assert "clipped" not in look(net, of(net, rho=0.5), **how).terms
    with pytest.raises(ValueError, match="clip"):
        look(net, of(net), clip=-1.0)


class Bowl(nn.Module):
    def __init__(self, H):
        super().__init__()
        self.x, self.H = nn.Parameter(torch.tensor([1.0, -1.0, 2.0], dtype=F64)), H

    def forward(self, z):
        return self.x @ self.H @ self.x / 2 + (z @ self.x).mean()


@pytest.mark.parametrize(
    "momentum, dampening, nesterov",
    [(0.0, 0.0, False), (0.5, 0.0, False), (0.5, 0.5, False), (0.5, 0.0, True)],
)
def test_on_a_quadratic_by_hand(momentum, dampening, nesterov):
    H = torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=F64))
    Z = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    Z = Z - Z.mean(0)
    net = Bowl(H)
    rho, eta, decay = 0.2, 0.05, 0.1
    optimizer = of(
        net,
        optim.USAM,
        rho,
        lr=eta,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        weight_decay=decay,
    )
    found = look(net, optimizer, None, (Z, torch.zeros(40)), budget_s=20, batch_size=4)
    x, A = net.x.detach(), H + rho * H @ H + decay * torch.eye(3, dtype=F64)
    effective = eta * (1 - dampening) / (1 - momentum)
    lag = (1 - momentum + 2 * momentum**2 if nesterov else 1 + momentum) / (1 - momentum)
    assert found.terms["gradient"] == pytest.approx((H @ x).norm().item(), rel=1e-9)
    off = 4 * found.terms["error of the regulariser"] / found.terms["of the drift, gradient"]
    assert found.terms["regulariser"] == pytest.approx(
        (rho * (H @ H @ x).norm() / (H @ x).norm()).item(), abs=off
    )
    assert found.terms["neglected in ρ"] < 1e-9
    known = lag * effective / 2 * ((A @ A @ x).norm() / (A @ x).norm()).item()
    assert found.terms["neglected in η"] == pytest.approx(known, rel=0.1)
    edge = 2 * (1 + momentum) / (1 + 2 * momentum if nesterov else 1)
    assert found.terms["largest eigenvalue"] == pytest.approx(2, rel=1e-8)
    number = eta * (1 - dampening) * (2 * (1 + rho * 2) + decay) / edge
    assert found.terms["stability number"] == pytest.approx(number, rel=1e-6)
    if not (decay + dampening) and not nesterov:
        assert number == pytest.approx(stability_number(USAM(rho), eta, 2.0, momentum=momentum))
    assert found.terms["of the drift, weight decay"] == pytest.approx(
        (decay * x.norm() / (A @ x).norm()).item(), rel=0.1
    )


def errors_of_models(A, eta, mu):
    "The largest error of each model's mean on ½Ax², over steps of torch's SGD from 1 at rest: by formula"
    effective = eta / (1 - mu)
    steps = np.arange(1, int(8 / (effective * A)) + 20)
    x, v, path = 1.0, 0.0, []
    for _ in steps:
        v = mu * v + A * x
        x = x - eta * v
        path.append(x)
    path, tau = np.array(path), effective * steps
    rate = A * (1 + effective * (1 + mu) / (1 - mu) * A / 2)
    seen = 1 + effective * mu / (1 - mu) * (1 - mu**steps) * A
    kinetic = np.array([[0.0, 1.0], [-A, -(1 - mu) / eta**0.5]])
    values, S = np.linalg.eig(kinetic)
    swing = (
        (S[0] * np.linalg.solve(S, [1.0, 0.0]) * np.exp(np.outer(eta**0.5 * steps, values)))
        .sum(1)
        .real
    )
    models = {"order 1": np.exp(-A * tau), "order 2": seen * np.exp(-rate * tau), "kinetic": swing}
    return {name: abs(path - values).max() for name, values in models.items()}


def verdict(A, eta, mu, tolerance=0.1):
    effective = eta / (1 - mu)
    in_eta = (1 + mu) / (1 - mu) * effective * A / 2
    return momentum_terms(mu, effective, A, in_eta, tolerance)["model"]


@pytest.mark.parametrize("mu", [0.5, 0.9, 0.97])
def test_the_model_changes_where_its_error_does(mu):
    "The one that is named is right to the tolerance; one that is no longer named is off by a third of it or more"
    A, order = 1.807, ["order 1", "order 2", "kinetic"]
    rates = np.geomspace(0.01, 200, 80) * 2 * (1 - mu) ** 2 / (1 + mu) / A
    rates = [eta for eta in rates if eta * A < 2 * (1 + mu)]
    named = [verdict(A, eta, mu) for eta in rates]
    assert (
        named[0] == "order 1"
        and named[-1] == "none"
        and {"order 1", "order 2", "none"} <= set(named)
    )
    for eta, name in zip(rates, named):
        errors = errors_of_models(A, eta, mu)
        if name != "none":
            assert errors[name] <= 0.1, (eta, name, errors)
        passed_over = order if name == "none" else order[: order.index(name)]
        assert all(errors[n] > 0.033 for n in passed_over), (eta, name, errors)


def test_the_model_of_the_kinetic_limit():
    "Where the momentum notebook measures 0.004 for the kinetic model and 0.48 for the first order"
    eta = 2.0**-12
    mu = 1 - 0.5 * eta**0.5
    A = 1.3 * (1 + 0.3 * 1.3)
    errors = errors_of_models(A, eta, mu)
    assert verdict(A, eta, mu) == "kinetic" and errors["kinetic"] < 0.02 < 0.3 < errors["order 1"]


@pytest.mark.parametrize(
    "momentum, dampening, nesterov",
    [(0, 0, 0), (0, 0.5, 0), (0.5, 0, 0), (0.5, 0.5, 0), (0.5, 0, 1)],
)
@pytest.mark.parametrize("decoupled", [False, True])
def test_the_edge_with_all_that_training_adds(momentum, dampening, nesterov, decoupled):
    """Where the stability number is 1, the step on a parabola has the multiplier -1, and training with torch's SGD the same number."""
    how = dict(momentum=momentum, dampening=dampening, nesterov=bool(nesterov), weight_decay=0.7)
    line = Quadratic(torch.tensor([[2.0]], dtype=F64))
    x = torch.ones(1, dtype=F64)

    def number(eta):
        found = diagnose(USAM(0.1), line, x, eta, draws=4, directions=0, decoupled=decoupled, **how)
        return found.terms["stability number"]

    edge = 1 / number(1.0)
    step, _ = step_system(Chain(USAM(0.1), line, edge, decoupled=decoupled, **how))
    assert abs(number(edge) - 1) < 1e-12 and abs(np.linalg.eigvals(step) + 1).min() < 1e-7
    if decoupled:
        return
    net = Bowl(torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=F64)))
    optimizer = of(net, optim.USAM, 0.1, lr=edge, **how)
    data = (torch.zeros(8, 3, dtype=F64), torch.zeros(8))
    found = look(net, optimizer, None, data, batch_size=4).terms["stability number"]
    assert abs(found - 1) < 1e-6


def test_the_edge_of_a_real_iteration():
    "Above 1 the mean step of torch's SGD with momentum grows, below it shrinks"
    H = torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=F64))
    for nesterov in (False, True):
        for times, grows in ((0.98, False), (1.02, True)):
            net = Bowl(H)
            lr = times * 2 * 1.5 / (1 + 1.0 * nesterov) / (2 * 1.4)
            optimizer = of(net, optim.USAM, 0.2, lr=lr, momentum=0.5, nesterov=nesterov)
            data = (torch.zeros(8, 3, dtype=F64), torch.zeros(8))
            found = look(net, optimizer, None, data, batch_size=4, tolerance=1e6)
            assert bool(found) is not grows and ("beyond the edge" in found.reason) is grows

            def closure():
                optimizer.zero_grad()
                loss = net(data[0])
                loss.backward()
                return loss

            for _ in range(400):
                optimizer.step(closure)
            assert (net.x.norm() > 10) is torch.tensor(grows).item() or (
                net.x.norm() > 10
            ).item() == grows


def test_lanczos():
    small = FiniteSum.from_module(make(0.0, norm=False), nn.CrossEntropyLoss(), X, y, 10)
    values, vectors = top_eigenvectors(small, small.x0, 2)
    start = torch.randn(small.dim, generator=generator, dtype=F64)
    lam, V, error, _ = lanczos(lambda v: small.hvp(small.x0, v), start, 25, 2)
    torch.testing.assert_close(lam, values, rtol=1e-4, atol=0)
    assert (V @ vectors.T).diag().abs().min() > 0.99
    few, _, bound, _ = lanczos(lambda v: small.hvp(small.x0, v), start, 4, 1)
    assert few[0] < values[0] and bound[0] > error[0]


@pytest.mark.parametrize("kind", [SAM, USAM, DNSAM])
@pytest.mark.parametrize("name", ["finite sum", "noisy", "minibatches"])
def test_parts_of_a_step_by_definition(kind, name):
    "g, u, g + ρHu and G from one graph are those of the algorithm, and b from them is the drift"
    net = make(0.0, norm=False)
    o = {
        "finite sum": lambda: FiniteSum.from_module(net, nn.CrossEntropyLoss(), X, y, 10),
        "noisy": lambda: NoisyLoss(lambda x: (x**4).sum() + x[0] * x[1], 3, sigma=0.3),
        "minibatches": lambda: MinibatchLoss.from_module(net, nn.CrossEntropyLoss(), (X, y), 10),
    }[name]()
    x = torch.tensor([1.0, -0.5, 0.2], dtype=F64) if name == "noisy" else o.x0
    a, k = kind(0.2), 1 if name == "minibatches" else 3
    gammas = a.draw(o, (k,), torch.Generator().manual_seed(1), dtype=F64)
    g, u, c, G = step_parts(a, o, x, gammas, o.grad(x))
    points = x.expand(k, -1)
    for found, known in (
        (g, o.sample_grad(points, gammas)),
        (u, a.perturbation(o, points, gammas)),
        (c, g + 0.2 * hessian_perturbation(a, o, points, gammas)),
        (G, a.direction(o, points, gammas)),
    ):
        torch.testing.assert_close(found, known, rtol=1e-9, atol=1e-11)
    others = a.draw(o, (k,), torch.Generator().manual_seed(2), dtype=F64)
    assert not torch.allclose(step_parts(a, o, x, others, o.grad(x))[2], c, rtol=1e-2)
    step = drawn(a, o, x, o.grad(x), x[None], 8, 0)
    if name != "minibatches":
        torch.testing.assert_close(
            drift_of(a, o, x, o.grad(x), step, 0),
            drift(a, o, x, draws=8, seed=0),
            rtol=1e-9,
            atol=1e-11,
        )
    v = torch.randn(o.dim, generator=torch.Generator().manual_seed(3), dtype=F64)
    torch.testing.assert_close(products_of(o, x)(v), o.hvp(x, v), rtol=1e-9, atol=1e-11)


def test_curvature_leaves_the_loss_as_it_was():
    "f is that of all batches again, after the Hessian of one"
    o = MinibatchLoss.from_module(make(), nn.CrossEntropyLoss(), (X, y), 10)
    before, v = o.grad(o.x0).clone(), torch.ones(o.dim, dtype=F64)
    with products_at(o, o.x0, 1) as product:
        found = product(v)
    o.known = []
    assert o.grad(o.x0).equal(before)
    with products_at(o, o.x0, 2) as product:
        assert not torch.allclose(product(v), found)


def test_curvature_of_all_batches_is_that_of_the_loss():
    "Where batches do not divide the data, drawn ones leave samples out"
    net = make(0.0, norm=False)
    o = MinibatchLoss.from_module(net, nn.CrossEntropyLoss(), (X[:11], y[:11]), 4, replace=False)
    v = torch.randn(o.dim, generator=torch.Generator().manual_seed(3), dtype=F64)
    known = FiniteSum.from_module(net, nn.CrossEntropyLoss(), X[:11], y[:11]).hvp(o.x0, v)
    with products_at(o, o.x0, 3) as product:
        torch.testing.assert_close(product(v), known)
    with products_at(o, o.x0, 2) as product:
        assert not torch.allclose(product(v), known, rtol=0.01)


def test_stays_within_its_time():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(5, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 3)
        ).double()
    big = X.repeat(400, 1), y.repeat(400)
    start = time.process_time()  # what others do on the machine does not count
    short = look(net, of(net), data=big, budget_s=2)
    assert time.process_time() - start < 4
    assert "of 2400 batches, error" in short.coarse[0] and short.terms["error of the gradient"] > 0
    again = look(net, of(net), data=big, budget_s=2)
    exact = FiniteSum.from_module(net, nn.CrossEntropyLoss(), X, y, 10).grad(
        torch.cat([p.detach().flatten() for p in net.parameters()])
    )
    for found in (short, again):
        assert (
            abs(found.terms["gradient"] - exact.norm()) < 4 * found.terms["error of the gradient"]
        )


def test_says_that_the_time_was_too_short():
    "With next to no time two minibatches are drawn, and the report says that, and what it took; with enough it does not"
    net = make()
    short, enough = look(net, of(net), budget_s=1e-3), look(net, of(net), budget_s=20)
    assert (
        short.coarse[-2] == "2 drawn minibatches" and "and not budget_s=0.001" in short.coarse[-1]
    )
    assert not any("budget_s" in words for words in enough.coarse)
    assert (short.directions.pop("se of variance") == np.inf).all() and np.isfinite(
        short.directions.to_numpy(float)
    ).all()
    assert np.isfinite(enough.directions.to_numpy(float)).all()


def test_table_and_plot():
    import matplotlib.pyplot as plt

    net = make()
    found = look(net, of(net))
    assert {"algorithm", "η", "stability number", "fair", "model"} <= set(found.table.index)
    assert found.table.loc["algorithm", "value"] == "SAM"
    assert len(found.plot(plt.figure().gca()).lines) > 1
    plt.close("all")
    assert np.isfinite(found.directions.to_numpy(float)).all()


def test_loader_and_own_loss():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), 10, shuffle=True)
    net = make()
    found = look(net, of(net), data=loader, batch_size=None)
    both = look(
        net,
        of(net),
        loss=None,
        batch_loss=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]),
    )
    assert found.terms["gradient"] == pytest.approx(both.terms["gradient"], rel=1e-9)


@pytest.mark.parametrize("how", [{}, dict(micro_batch=1)], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("kind", [USAM, SAM])
def test_the_previous_batch(kind, how):
    """Variances of the long run; those of single steps, and an own batch's drift, must miss."""
    x, eta, a = torch.tensor([0.3, 0.2], dtype=F64), 0.1, kind(0.2, source="previous", **how)
    objective = three(2, False)
    found = diagnose(a, objective, x, eta, draws=4000, top=2, directions=0)
    V = top_eigenvectors(objective, x, 2)[1]

    def variances(source, form):
        C = SDE(kind(0.2, source=source, **how), objective, eta, "exact", form).covariance(x)
        return eta * torch.einsum("ki,ij,kj->k", V, C, V).numpy()

    table, relative = found.directions, 4 * (2 / 4000) ** 0.5
    for name, form in (("variance, SDE", "factor"), ("variance, sampled", "exact")):
        gap, wrong = (
            abs(table[name] / variances(source, form) - 1) for source in ("previous", "full")
        )
        assert gap.max() < relative < wrong.max()
    b = SDE(a, objective, eta, "exact").drift(x)
    gaps = abs(table["mean, sampled"] - eta * (V @ b).numpy())
    assert (gaps < 4 * table["se of mean"] + 1e-12).all()
    other = SDE(kind(0.2, **how), objective, eta, "exact").drift(x)
    assert (abs(eta * V @ (other - b)).numpy() > 4 * table["se of mean"]).any()
    assert found.terms["of the drift, noise in it"] < (1e-12 if kind is USAM else 0.1)


def test_momentum_says_which_model():
    """Steps of the same reach: without momentum order 1 is fair, close to 1 the kinetic model; by the same terms as a run's."""
    x = torch.tensor([1.0, -0.5], dtype=F64)
    words = {
        mu: diagnose(USAM(0.1), plane, x, 0.01 * (1 - mu), momentum=mu, tolerance=0.05).terms[
            "model"
        ]
        for mu in (0.0, 0.99)
    }
    assert words == {0.0: "order 1", 0.99: "kinetic"}
    net = make(0.0, norm=False)
    optimizer = of(net, optim.USAM, momentum=0.9, nesterov=True, weight_decay=0.01, lr=0.02)
    run = look(net, optimizer, batch_size=60).terms
    objective = FiniteSum.from_module(
        net, nn.CrossEntropyLoss(), X, y, batch_size=60, replace=False
    )
    ours = diagnose(
        USAM(0.1),
        objective,
        objective.x0,
        0.02,
        momentum=0.9,
        nesterov=True,
        weight_decay=0.01,
        draws=4,
    ).terms
    for name in (
        "neglected in η",
        "stability number",
        "momentum number",
        "of the drift, weight decay",
        "neglected, kinetic",
    ):
        assert run[name] == pytest.approx(ours[name], rel=2e-2), name
    assert run["model"] == ours["model"]
    with pytest.raises(
        TypeError, match="training takes momentum, .*, got schedule: a point of a scheduled run"
    ):
        diagnose(USAM(0.1), plane, x, 0.1, schedule=lambda t: 1.0)


@pytest.mark.parametrize("kind", [SAM, USAM, DNSAM])
def test_noise_in_the_regulariser(kind):
    """‖ρE[Hu] less ρHu of the full gradient‖ from drawn minibatches is that of the finite sum, which is exact for USAM and DNSAM,
    within its error. The control is the norm of the mean of few, which noise has made too long."""
    net = make(0.0, norm=False)
    a, o = (
        kind(0.1),
        MinibatchLoss.from_module(net, nn.CrossEntropyLoss(), (X, y), 10, replace=False),
    )
    finite = FiniteSum.from_module(net, nn.CrossEntropyLoss(), X, y, 10, replace=False)
    grad, gammas = finite.grad(o.x0), o.draw((600,), torch.Generator().manual_seed(0))
    b, sem = drift(a, finite, o.x0, draws=20_000, return_sem=True)
    known = noise_in_regulariser(a, finite, o.x0, grad, -b - grad).norm().item()
    found, error = noise_in_run(a, o, o.x0, grad, gammas)
    assert abs(found - known) < 3 * (error**2 + sem.norm().item() ** 2) ** 0.5 and found > 3 * error
    few, wide = noise_in_run(a, o, o.x0, grad, gammas[:4])
    assert abs(few - known) < 3 * wide and (few**2 + wide**2) ** 0.5 - known > 6 * error


def test_noise_in_the_regulariser_of_a_run():
    """That term and its error beside those of `diagnose`. Of a batch of all data it is none, and of SGD exactly none."""
    net = make(0.0, norm=False)
    finite = FiniteSum.from_module(net, nn.CrossEntropyLoss(), X, y, 10, replace=False)
    terms = look(net, of(net, optim.USAM), budget_s=20).terms
    known = diagnose(USAM(0.1), finite, finite.x0, 0.1, draws=8, directions=0, top=1).terms[
        "of the drift, noise in it"
    ]
    assert (
        abs(terms["of the drift, noise in it"] - known)
        < 3 * terms["error of the noise in it"]
        < 6 * known
    )
    every = look(net, of(net, optim.USAM), batch_size=60).terms
    assert (
        every["of the drift, noise in it"] < 1e-9
        and every["error of the noise in it"] < 1e-9 < 0.01 < every["of the drift, regulariser"]
    )
    assert (
        diagnose(USAM(0.1, source="full"), finite, finite.x0, 0.1, draws=8, top=1).terms[
            "of the drift, noise in it"
        ]
        < 1e-12
    )
    plain = look(net, torch.optim.SGD(net.parameters(), lr=0.1)).terms
    assert plain["of the drift, noise in it"] == plain["error of the noise in it"] == 0


@pytest.mark.parametrize("basis", [5, 8])
def test_lanczos_with_few_vectors(basis):
    """Restarted it has the same eigenvalues and vectors to their bounds, which hold; on the way too. The control has no restart."""
    small = FiniteSum.from_module(make(0.0, norm=False), nn.CrossEntropyLoss(), X, y, 10)
    known = torch.linalg.eigvalsh(small.hessian(small.x0))
    start = torch.randn(small.dim, generator=torch.Generator().manual_seed(4), dtype=F64)
    for steps in (6, 12, 30, 60):
        lam, V, bound, lowest = lanczos(
            lambda v: small.hvp(small.x0, v), start, steps, 3, basis=basis
        )
        torch.testing.assert_close(V @ V.T, torch.eye(3, dtype=F64), rtol=0, atol=1e-10)
        residual = (small.hvp(small.x0, V) - lam[:, None] * V).norm(dim=1)
        torch.testing.assert_close(residual, bound, rtol=1e-6, atol=1e-10)
        assert ((known[:, None] - lam).abs().min(0).values <= bound + 1e-10).all()
        assert known[0] - 1e-10 <= lowest < known.median()
    torch.testing.assert_close(lam, known.flip(0)[:3], rtol=1e-3, atol=0)
    short = lanczos(lambda v: small.hvp(small.x0, v), start, basis, 3)[0]
    assert (short[1:] / known.flip(0)[1:3] - 1).abs().max() > 0.005


def test_a_sketch_in_place_of_long_vectors():
    """Squared norms of a step's parts and of its change are the same within four times √(2/buckets), the mean of ρHu exactly.
    The control has 251 buckets."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, wide = SAM(0.3), nn.Sequential(nn.Linear(5, 900), nn.Tanh(), nn.Linear(900, 3)).double()
    o = MinibatchLoss.from_module(wide, nn.CrossEntropyLoss(), (X, y), 10, replace=False)
    grad = o.grad(o.x0)
    V = grad[None] / grad.norm()

    def numbers(sketch):
        step = drawn(a, o, o.x0, grad, V, 12, 0, sketch=sketch)
        here = -(grad + step.mean_regulariser)
        changes = change_in_a_step(
            a, o, o.x0, 0.1, here, step, torch.full((1,), 0.1, dtype=F64), sketch=sketch
        )
        noise = noise_in_run(a, o, o.x0, grad, step.gammas, sketch=sketch)
        powers = [s.power for s in step.sums.values()] + [
            changes.power,
            changes.mean.norm() ** 2,
            noise[0] ** 2,
            noise[1] ** 2,
        ]
        return torch.tensor(powers), step

    exact, step = numbers(None)
    found, other = numbers(Sketch(o.x0, 4099))
    assert other.sums["g"].first.shape == (4099,) and other.kept[0].shape == (1, 4099)
    torch.testing.assert_close(other.mean_regulariser, step.mean_regulariser, rtol=1e-9, atol=1e-12)
    off = (found / exact - 1).abs().max()
    coarse = (numbers(Sketch(o.x0, 251))[0] / exact - 1).abs().max()
    assert off < 4 * (2 / 4099) ** 0.5 < coarse


class Slow(nn.Linear):
    def forward(self, z):
        time.sleep(0.01)
        return super().forward(z)


@pytest.fixture
def shown(monkeypatch):
    "What bars say that are shown"
    said = []

    class Noted(diagnosis.tqdm):
        def __init__(self, *args, **how):
            super().__init__(*args, **how)
            if not self.disable:
                said.append(self.desc)

    monkeypatch.setattr(diagnosis, "tqdm", Noted)
    return said


def test_says_how_long_it_takes(shown):
    """Before it starts: as long as it then takes, to a factor of two. Without being asked only where that is more than three seconds."""

    def seconds(net, draws, **how):
        o = MinibatchLoss.from_module(net, nn.CrossEntropyLoss(), (X, y), 30, replace=False)
        o.loss(o.x0)
        start = time.monotonic()
        diagnose(SAM(0.1), o, o.x0, 0.1, draws=draws, top=1, directions=0, **how)
        return time.monotonic() - start

    quick, slow = make(0.0, norm=False), Slow(5, 3).double()
    seconds(quick, 8)
    assert not shown
    seconds(quick, 8, progress=True), seconds(slow, 8, progress=False)
    assert len(shown) == 1
    took = seconds(slow, 128)
    number = float(shown[1].removeprefix("diagnosis, about ").removesuffix(" s"))
    assert took / 2 < number < 2 * took and number > 3 and len(shown) == 2
    (
        look(quick, of(quick), progress=None, budget_s=1),
        look(quick, of(quick), progress=True, budget_s=1),
    )
    assert len(shown) == 3


def test_curvature_along_directions():
    "That of products with the Hessian, without those along the eigenvectors"
    small = FiniteSum.from_module(make(0.0, norm=False), nn.CrossEntropyLoss(), X, y, 10)
    lam, V, _ = directions_at(small, small.x0, 2, 3, 0)
    known = (V * small.hvp(small.x0, V)).sum(1)
    torch.testing.assert_close(curvatures(small, small.x0, lam, V), known, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(curvatures(small, small.x0, lam, V.roll(1, 0)), known, rtol=1e-2)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("values", [[1.0] * 40, [2.0] * 20 + [1.0] * 20, [3.0] + [0.0] * 39])
def test_the_largest_of_few_eigenvalues(values, dtype):
    """Where Krylov's space is exhausted before the steps are, what is left of a product is rounding.
    Normalised, it made eigenvalues of thousands. The control is a spectrum that takes all steps."""
    seeded = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(40, 40, generator=seeded, dtype=F64))[0]

    def largest(values, steps):
        H = (Q * torch.tensor(values, dtype=F64)) @ Q.T
        bowl = Quadratic(((H + H.T) / 2).to(dtype))
        return largest_eigenvalue(bowl.hvp, torch.ones(2, 40, dtype=dtype), steps).double()

    for steps in (12, 40):
        assert (largest(values, steps) - max(values)).abs().max() < 100 * torch.finfo(dtype).eps
    full = [k / 40 for k in range(1, 41)]
    assert (largest(full, 6) < 0.99).all() and (largest(full, 40) > 1 - 1e-5).all()


@pytest.mark.parametrize(
    "loss, at, words",
    [
        (lambda z: z.abs().sqrt().sum(), [0.0, 1.0, 2.0], "the gradient at x must be finite"),
        (lambda z: (z.abs() ** 1.5).sum(), [0.0, 1.0, 2.0], "the Hessian at x must be finite"),
        (lambda z: (z.abs() ** 1.5).sum(), [0.0] + [1.0] * 9, "the Hessian at x must be finite"),
        (
            lambda z: z.exp().sum(),
            [0.0, 1.0, 600.0],
            "terms at x must be finite, got regulariser: inf",
        ),
    ],
)
def test_what_is_not_finite(loss, at, words):
    "No term is infinite or NaN"
    at = torch.tensor(at, dtype=F64)
    with pytest.raises(ValueError, match=words):
        diagnose(USAM(0.1), NoisyLoss(loss, len(at), 0.1), at, 0.1)


def test_kinds_of_points_and_seeds():
    "A parameter, a seed of numpy; half a precision is refused"
    o = NoisyLoss(lambda z: (z**4).sum(), 3, 0.1)
    x = torch.tensor([1.0, -0.5, 0.2], dtype=F64)
    known = diagnose(SAM(0.1), o, x, 0.1, seed=3, draws=8).terms
    assert diagnose(SAM(0.1), o, nn.Parameter(x), 0.1, seed=np.int64(3), draws=8).terms == known
    assert diagnose(SGD(), o, x, 0.1, draws=8).terms["c"] == 0
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(TypeError, match=f"x must be of float32 or float64, got {dtype}"):
            diagnose(SAM(0.1), o, x.to(dtype), 0.1)


def test_a_run_without_curvature():
    "A linear loss, whose largest eigenvalue 0 is known to 0 %; with a seed of numpy"
    net = nn.Linear(5, 3).double()
    found = look(net, of(net), lambda out, y: out.gather(1, y[:, None]).mean(), seed=np.int64(2))
    assert "largest eigenvalue within 0.0% of theirs" in " ".join(found.coarse)
    assert found.terms["largest eigenvalue"] == 0 and found.terms["neglected in ρ"] == 0


@pytest.mark.parametrize("source", ["own", "full", "independent", "previous"])
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_c_of_every_source(source, micro_batch):
    "c = E u·ḡ/‖ḡ‖² by enumeration, where u is normalised: of the full gradient it is 1/‖ḡ‖"
    o, x = three(2, False), torch.tensor([0.3, 0.2], dtype=F64)
    found = diagnose(SAM(0.2, source=source, micro_batch=micro_batch), o, x, 0.1, draws=800)
    grad = o.grad(x)
    size = micro_batch or 2
    gammas = (
        torch.combinations(torch.arange(3), size) if source != "full" else torch.arange(3)[None]
    )
    g = o.sample_grad(x.expand(len(gammas), -1), gammas)
    known = ((g / g.norm(dim=1, keepdim=True)).mean(0) @ grad / grad.norm() ** 2).item()
    assert abs(found.terms["c"] - known) < (1e-9 if source == "full" else 0.1 * known)


class ByLosses(Algorithm):
    "A perturbation that asks the objective for more than gradients"

    def perturbation(self, objective, x, gamma):
        scale = objective.losses(x).mean(-1, keepdim=True) / objective.n
        return scale * objective.sample_grad(x, gamma)


def test_a_perturbation_that_asks_for_losses():
    "Its objective has all that a finite sum has; by enumeration. The control is USAM's"
    o, x = three(2, False), torch.tensor([0.3, 0.2], dtype=F64)
    gammas = torch.combinations(torch.arange(3), 2)
    points = x.expand(3, -1)
    u = o.loss(x) / 3 * o.sample_grad(points, gammas)
    known = 0.1 * o.sample_hvp(points, gammas, u).mean(0).norm() / o.grad(x).norm()
    found, usam = (diagnose(kind(0.1), o, x, 0.1, draws=8).terms for kind in (ByLosses, USAM))
    assert found["regulariser"] == pytest.approx(known.item(), rel=1e-9)
    assert abs(usam["regulariser"] / known.item() - 1) > 0.3


def test_time_of_what_is_refused():
    "A monitor whose diagnoses fail has watched as long as they took"
    net = make()
    monitor = Monitor(net, F.cross_entropy, (X, y), torch.optim.Adam(net.parameters()), every=1)
    with pytest.raises(TypeError, match="no SDE here describes another"):
        monitor()
    assert monitor.watched == monitor.cost > 0


def test_what_too_few_draws_say():
    """Where noise is many times the gradient, a few draws often find nothing neglected, as noise is
    taken off the square. With an error beyond the tolerance that is not called fair."""
    net = make(0.0, norm=False)
    o = FiniteSum.from_module(net, nn.CrossEntropyLoss(), X, y, 1)
    x = o.x0
    for _ in range(300):
        x = x - 0.5 * o.grad(x)
    how = dict(directions=0, top=1)
    few = [diagnose(SAM(1.0), o, x, 0.001, draws=4, seed=s, **how) for s in range(12)]
    assert min(report.terms["neglected in ρ"] for report in few) == 0
    assert all(report.terms["error of that"] > 0.1 and not report for report in few)
    assert any("neglected in ρ: 0 ± " in report.reason for report in few)
    assert diagnose(SAM(1e-4), o, x, 0.001, draws=200, **how)


@pytest.mark.parametrize("factor, grows", [(1.02, True), (0.98, False)])
def test_the_edge_at_a_saddle(factor, grows):
    """Along a steep negative curvature −m, ρcm² − m may be beyond the edge where the largest
    eigenvalue is far from it: a step of USAM turns and grows, and one of its SDE shrinks."""
    m, rho = 2.0, 2.0
    A = rho * m**2 - m
    eta = factor * 2 / A
    saddle = Quadratic(torch.diag(torch.tensor([0.1, -m], dtype=F64)))
    x = torch.tensor([1.0, 1e-3], dtype=F64)
    run = x
    for _ in range(200):
        run = USAM(rho).step(saddle, run, eta, torch.zeros(2, dtype=F64))
    assert (abs(run[1]) > abs(x[1])).item() == grows
    assert SDE(USAM(rho), saddle, eta).drift(x)[1] < 0
    found = diagnose(USAM(rho), saddle, x, eta, tolerance=10.0)
    assert found.stable == (not grows) == bool(found)
    assert found.terms["stability number"] == pytest.approx(factor, rel=1e-9)
    assert found.terms["smallest eigenvalue"] == pytest.approx(-m, rel=1e-9)

    class Plane(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(x.clone())

        def forward(self, z):
            return self.x @ saddle.H @ self.x / 2 + 0 * z.sum()

    net = Plane()
    data = (torch.ones(8, 1, dtype=F64), torch.zeros(8))
    optimizer = of(net, optim.USAM, rho, lr=eta)
    seen = look(net, optimizer, lambda out, _: out, data, batch_size=4, tolerance=10.0)
    assert seen.stable == (not grows)
    assert seen.terms["stability number"] == pytest.approx(factor, rel=1e-6)


def test_numbers_beside_the_terms():
    "They have names of their own; that of a term, or of the step, is no place for another number"
    net = make(0.0, norm=False)
    how = dict(every=1, batch_size=10, budget_s=0.1)
    monitor = Monitor(net, F.cross_entropy, (X, y), of(net), **how)
    monitor(loss=2.5)
    assert monitor.history.loc[1, "loss"] == 2.5 and "noise" in monitor.history
    for name in ("step", "noise"):
        with pytest.raises(ValueError, match=f"names of their own, got {name}"):
            monitor(**{name: 7})
