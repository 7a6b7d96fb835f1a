"""torch's default device is that of tensors that a user makes, not of what a point on the CPU meets within the library. A default of "meta", whose tensors have no values, stands for any other device here."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from samsde import optim
from samsde.algorithm import DNSAM, SAM, USAM, Chain
from samsde.diagnosis import diagnose, diagnose_training
from samsde.ensemble import simulate
from samsde.hessian_noise import noise_covariance, noise_dim, noise_sample
from samsde.implicit_regularizer import drift, gaussian_direction, regularized_loss
from samsde.objective import FiniteSum, MinibatchLoss, NoisyLoss, Quadratic
from samsde.sample_sums import square_norms
from samsde.sde import SDE
from samsde.epochs import quadratic_moments
from samsde.stability import mean_square_radius, stability_number
from samsde.stationarity import closed_covariance, suboptimality
from samsde.sweep import sweep
from samsde.weak_errors import (
    circle_error,
    circle_problem,
    linear_moments,
    stationary_covariance,
    weak_error,
)

on_cpu = dict(dtype=torch.float64, device="cpu")
H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], **on_cpu)
A = torch.tensor(
    [[1.0, 0.5], [-0.3, 1.2], [0.7, -0.8], [0.1, 0.4], [2.0, 0.2], [-1.0, 0.6]], **on_cpu
)
x = torch.tensor([[0.3, -0.2], [1.0, 0.5]], **on_cpu)


def network():
    net = nn.Sequential(nn.Linear(2, 2, **on_cpu), nn.Tanh(), nn.Linear(2, 1, **on_cpu))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.arange(p.numel(), **on_cpu).view_as(p).sin() / 3)
    return net


def objectives():
    net, loss, y = network(), nn.MSELoss(), A[:, :1].sin()
    yield Quadratic(H, sigma=0.1)
    yield NoisyLoss(lambda x: (x**4).sum() + x.square().sum(), 2, cov=0.1 * H)
    yield FiniteSum(lambda x: (A @ x).cos(), 6, 2, 2, "epochs")
    yield FiniteSum.from_module(net, loss, A, y)
    yield MinibatchLoss.from_module(net, loss, (A, y), 2, replace=False)


def of_objective(f):
    """Tensors and numbers"""
    one = getattr(f, "x0", x[0])
    at, how = one.expand(2, -1), dict(draws=16)
    for algorithm in (
        USAM(0.1),
        DNSAM(0.1),
        SAM(0.1),
        SAM(torch.tensor([0.1, 0.2], **on_cpu), source="independent"),
    ):
        yield drift(algorithm, f, at, **how)
        yield drift(algorithm, f, at, "exact", **how)
        yield noise_covariance(algorithm, f, at, "exact", **how)
        xi = torch.ones(noise_dim(f, algorithm, **how), **on_cpu)
        yield noise_sample(algorithm, f, at, xi, **how)
        for process in (
            Chain(algorithm, f, 0.1, schedule=lambda t: 1 / (1 + t)),
            SDE(algorithm, f, 0.1, draws=8, seed=None),
        ):
            yield simulate(process, one, 0.3, 4).mean["x"]
    yield regularized_loss(SAM(0.1), f, at, **how)
    yield diagnose(SAM(0.1), f, one, 0.1, draws=8, progress=False).terms["neglected in η"]
    chain, sde = Chain(SAM(0.1), f, 0.1), SDE(SAM(0.1), f, 0.1, draws=8)
    yield weak_error(chain, sde, one, 0.3, lambda x: x.sum(-1), 4).difference
    yield sweep([SAM(0.1)], [f], [0.1], t_end=0.2, n_paths=4, x0=one)["mean"].tolist()
    if getattr(f, "network", None) is not None and isinstance(f, FiniteSum):
        yield square_norms(f, at)
        other = copy.copy(f)
        other.method = "signs"
        yield drift(USAM(0.1), other, at)


def of_formulas():
    bowl = Quadratic(H, sigma=0.1)
    yield gaussian_direction(x, 0.1).mean
    yield from linear_moments(SDE(USAM(0.1), bowl, 0.1), x[0], 0.3)
    yield from linear_moments(Chain(USAM(0.1), bowl, 0.1, momentum=0.5), x[0], 0.6)
    yield stationary_covariance(SDE(USAM(0.1), bowl, 0.1))
    yield closed_covariance(SDE(SAM(0.1), bowl, 0.1))
    yield suboptimality(SDE(SAM(0.1), bowl, 0.1))
    waves = circle_problem([1.0, 0.5], [1.0, 2.0], [1, 2], [1, 1])
    yield circle_error(USAM(0.1), waves, 0.1, 0.3, np.cos)
    yield mean_square_radius(USAM(0.1), H[None].expand(6, 2, 2), 0.1, 2)
    yield from quadratic_moments(H[None].expand(3, 2, 2), A[:3], 0.1, replace=True)
    yield stability_number(SAM(0.1), 0.1, 2.0, grad_norm=1.0, sigma=0.1, dim=3)
    net = network()
    optimizer = optim.SAM(net.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    found = diagnose_training(
        net, nn.MSELoss(), (A, A[:, :1]), optimizer, batch_size=2, progress=False
    )
    yield found.terms["gradient"]


@pytest.mark.parametrize("what", [*range(5), "formulas"])
def test_a_default_device(what):
    def found():
        return [*of_formulas()] if what == "formulas" else [*of_objective([*objectives()][what])]

    known = found()
    with torch.device("meta"):
        again = found()
    for a, b in zip(known, again, strict=True):
        assert type(a) is type(b)
        assert a.equal(b) and b.device.type == "cpu" if isinstance(a, torch.Tensor) else a == b
