"""Bad input gets a ValueError or TypeError that says what was given and what is expected, and leaves no file behind: a table for each module."""
import functools
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import samsde
from samsde import cli, optim
from samsde.algorithm import DNSAM, SAM, SGD, USAM, Algorithm, Chain, Linear
from samsde.diagnosis import diagnose, diagnose_training, largest_eigenvalue, top_eigenvectors
from samsde.ensemble import simulate
from samsde.epochs import epoch_noise, epoch_terms, quadratic_moments
from samsde.experiments import error_vs_rho, escape, experiment, flat_minima, micro_batches, networks, problems, saddles, scaling, suboptimality as levels, training
from samsde.hessian_noise import cross_covariance, noise_covariance, noise_dim, noise_sample, sgd_covariance
from samsde.implicit_regularizer import drift, gaussian_direction, regularized_loss
from samsde.machinery.batches import BatchNetwork, LossOfOutput
from samsde.machinery.style import Frames
from samsde.monitor import Monitor
from samsde.objective import FiniteSum, Gaussian, MinibatchLoss, Minibatches, Noiseless, NoisyLoss, Quadratic
from samsde.random_direction import kappa
from samsde.saddle_attraction import arrival_time, basin_radius, escape_time, exit_time, flow, hover_radius, is_attracting, latest_arrival
from samsde.stability import edge_of_stability, mean_square_radius, stability_number
from samsde.sample_sums import HALF_SQUARE, signed_products, square_norms, product_method
from samsde.sde import SDE, KineticSDE
from samsde.stationarity import closed_covariance, suboptimality
from samsde.weak_approximation import plot_validity, validity_map, weak_order
from samsde.weak_errors import (TrigonometricSum, chain_operator, circle_error, circle_problem, exact_difference, exact_error, generator, linear_moments,
                                periodic_examples, stationary_covariance, torus_error, torus_problem, weak_error)

f64 = dict(dtype=torch.float64)
eye, nan, inf = torch.eye(2, **f64), math.nan, math.inf
bowl, x = Quadratic(eye, sigma=.1), torch.ones(2, **f64)
noisy = NoisyLoss(lambda x: (x**4).sum(), 2, .1)
three, whole_numbers = torch.ones(3, **f64), torch.ones(2, dtype=torch.long)
A = torch.tensor([[1., 2.], [3., 4.], [5., 6.]], **f64)
H = torch.diag(torch.tensor([1., -.5], **f64))
SWEEP = torch.tensor([.1, .2], **f64)
def data(batch_size=1, replace=True, n=3): return FiniteSum(lambda x: (A @ x)**2, n, 2, batch_size, replace)
def network(module=None, X=A, y=A[:, 0], loss=torch.nn.MSELoss(), method=None):
    y = y[:, None] if isinstance(y, torch.Tensor) and y.ndim == 1 else y
    objective = FiniteSum.from_module(torch.nn.Linear(2, 1).double() if module is None else module, loss, X, y)
    objective.method = method
    return objective
def by_method(objective, method):
    objective.method = method
    return objective
FOLDER = [None] # where run writes checkpoints
def run(process=None, x0=x, t_end=1., n_paths=4, **how):
    return simulate(process or Chain(SAM(.1), bowl, .1), x0, t_end, n_paths, **{"checkpoint": FOLDER[0] and FOLDER[0]/"run.npz"} | how)
def total(x): return x.sum(-1)
class NoWay(Algorithm): pass
class OwnWay(SAM):
    def direction(self, objective, x, gamma): return x
class Turns(Algorithm):
    def direction(self, objective, x, gamma): return objective.sample_grad(x, gamma)
class Jumps(Algorithm):
    def step(self, objective, x, eta, gamma): return -x
chain, sde, lines = Chain(SAM(.1), bowl, .1), SDE(SAM(.1), bowl, .1), Chain(USAM(.1), bowl, .1)
circle = circle_problem([.3, -.2, -.1], [.9, .6, .5], [1, 2, 1], [.2, 1.1, 2.3])
on_circle = Chain(USAM(.1), circle, .1), SDE(USAM(.1), circle, .1)
def weak(chain=chain, sde=sde, x0=x, t_end=1., test=total, n_paths=10, **how): return weak_error(chain, sde, x0, t_end, test, n_paths, **how)
def around(problem=circle, eta=.1, t_end=1., test=np.sin, algorithm=USAM(.1), **how): return circle_error(algorithm, problem, eta, t_end, test, **how)
def map_of(algorithm=USAM, objective=circle, etas=(.1,), rhos=(.1,), t_end=1., test=np.sin, *more, **how): return validity_map(algorithm, objective, etas, rhos, t_end, test, *more, **how)
def look(algorithm=SAM(.1), objective=bowl, x=x, eta=.1, **how): return diagnose(algorithm, objective, x, eta, **dict(top=1) | how)
def optimizer(kind=optim.SAM, params=None, base=torch.optim.SGD, **how):
    return kind([torch.nn.Parameter(torch.ones(2))] if params is None else params, base, **dict(lr=.1) | how)
def stepped(kind, **how):
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer(kind, [p], **how).first_step()
def measured_norm(module=None, X=A, y=A[:, :1], chunk=1024):
    return optim.full_gradient_norm(torch.nn.Linear(2, 1).double() if module is None else module, torch.nn.MSELoss(), X, y, chunk)()

TABLE = {
    "negative rho": (lambda: SAM(-.1), ValueError, "rho must be non-negative and finite, got -0.1"),
    "rho is NaN": (lambda: USAM(nan), ValueError, "rho must be non-negative and finite, got nan"),
    "one rho of several is negative": (lambda: DNSAM(torch.tensor([.1, -.2])), ValueError, "rho must be non-negative"),
    "rho is text": (lambda: SAM("0.1"), TypeError, "rho must be a number or a tensor, got str"),
    "eta is 0": (lambda: Chain(SGD(), bowl, 0), ValueError, "eta must be positive and finite, got 0"),
    "eta is negative": (lambda: SDE(SGD(), bowl, -.1), ValueError, "eta must be positive and finite, got -0.1"),
    "eta is infinite": (lambda: SDE(SGD(), bowl, float("inf")), ValueError, "eta must be positive and finite, got inf"),
    "dt > eta": (lambda: run(SDE(SAM(.1), bowl, .1), dt=.2), ValueError, "dt must be at most eta=0.1, got 0.2"),
    "dt > eta in one step": (lambda: SDE(SAM(.1), bowl, .1).step(x, x, .2), ValueError, "dt must be at most eta=0.1, got 0.2"),
    "dt with minibatches": (lambda: run(Chain(SAM(.1), data(), .1), dt=.05), ValueError, "minibatches has no time step below eta=0.1"),
    "t_end between two steps": (lambda: run(t_end=.15), ValueError, "whole number of steps eta=0.1, got 0.15"),
    "H not symmetric": (lambda: Quadratic(torch.tensor([[1., 2.], [0., 1.]])), ValueError, "H must be symmetric"),
    "H not finite": (lambda: Quadratic(torch.tensor([[nan, 0.], [0., 1.]])), ValueError, "H must be finite"),
    "H not square": (lambda: Quadratic(torch.ones(2, 3)), ValueError, r"H must be a square matrix .* got shape \(2, 3\)"),
    "H of whole numbers": (lambda: Quadratic(torch.ones(2, 2, dtype=torch.long)), TypeError, "H must be a floating-point tensor, got torch.int64"),
    "H a list": (lambda: Quadratic([[1., 0.], [0., 1.]]), TypeError, "H must be a floating-point tensor, got list"),
    "covariance not PSD": (lambda: Quadratic(eye, cov=torch.diag(torch.tensor([1., -.5], **f64))), ValueError, "positive semidefinite, got an eigenvalue of -0.5"),
    "covariance of the wrong size": (lambda: Quadratic(eye, cov=torch.eye(3, **f64)), ValueError, r"cov must have shape \(2, 2\), got \(3, 3\)"),
    "sigma and cov": (lambda: Quadratic(eye, .1, eye), ValueError, "sigma or cov, not both"),
    "negative sigma": (lambda: Quadratic(eye, -.1), ValueError, "sigma must be non-negative"),
    "batch size 0": (lambda: data(0), ValueError, "batch_size must be at least 1, got 0"),
    "batch size > N without replacement": (lambda: data(4, replace=False), ValueError, "at most n without replacement, got batch_size=4 and n=3"),
    "batch size 1.5": (lambda: data(1.5), TypeError, "batch_size must be a whole number, got float"),
    "no data": (lambda: data(n=0), ValueError, "n must be at least 1, got 0"),
    "no rows": (lambda: network(X=A[:0], y=A[:0, 0]), ValueError, "non-empty and equally long, got 0 and 0 rows"),
    "rows without targets": (lambda: network(y=A[:2, 0]), ValueError, "equally long, got 3 and 2 rows"),
    "too few sample losses": (lambda: data(n=5).loss(x), ValueError, r"one loss for each sample, shape \(5,\), got \(3,\)"),
    "x0 of the wrong length": (lambda: run(x0=torch.ones(3, **f64)), ValueError, r"x0 must have shape \(..., 2\), got \(3,\)"),
    "x0 for too few paths": (lambda: run(x0=torch.ones(3, 2, **f64)), ValueError, r"x0 must have shape \(2,\) or \(4, ..., 2\), got \(3, 2\)"),
    "x0 not finite": (lambda: run(x0=torch.tensor([nan, 0.], **f64)), ValueError, "x0 must be finite"),
    "x0 a list": (lambda: run(x0=[1., 1.]), TypeError, "x0 must be a floating-point tensor, got list"),
    "x of whole numbers": (lambda: bowl.grad(torch.ones(2, dtype=torch.long)), TypeError, "x must be a floating-point tensor, got torch.int64"),
    "x a number": (lambda: bowl.grad(torch.tensor(1., **f64)), ValueError, r"x must have shape \(..., 2\), got \(\)"),
    "float32 point, float64 data": (lambda: bowl.grad(torch.ones(2)), TypeError, "x is torch.float32, but the data it meets are torch.float64"),
    "float32 noise, float64 point": (lambda: NoisyLoss(torch.sum, 2).sample_grad(x, torch.ones(2)), TypeError, "gamma is torch.float32"),
    "float32 H, float64 covariance": (lambda: Quadratic(torch.eye(2), cov=eye), TypeError, "cov is torch.float64, but H is torch.float32"),
    "float32 network, float64 data": (lambda: network(torch.nn.Linear(2, 1)), TypeError, "must be of one dtype, as are inputs, got"),
    "module without parameters": (lambda: network(torch.nn.Sigmoid()), ValueError, "trainable parameters, got none in Sigmoid"),
    "module in training mode": (lambda: network(torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Dropout()).double()), ValueError, "layer '1' .Dropout."),
    "loss of a module is a vector": (lambda: network(loss=torch.nn.MSELoss(reduction="none")), ValueError, "the loss of a batch must be a scalar"),
    "loss is a vector": (lambda: NoisyLoss(lambda x: x, 2).loss(x), ValueError, r"must be a scalar, got shape \(2,\)"),
    "loss is no function": (lambda: NoisyLoss(3., 2), TypeError, "fn must be a function of one point, got float"),
    "DNSAM at a zero gradient": (lambda: DNSAM(.1).step(bowl, torch.zeros(2, **f64), .1, x), ValueError, "exactly zero"),
    "DNSAM's drift at a zero gradient": (lambda: drift(DNSAM(.1), bowl, torch.zeros(2, **f64)), ValueError, "exactly zero"),
    "DNSAM's loss with minibatches": (lambda: regularized_loss(DNSAM(.1), data(), x), ValueError, "no regularised loss"),
    "algorithm without a perturbation": (lambda: NoWay(.1).step(bowl, x, .1, x), TypeError, "NoWay has no potential"),
    "algorithm is a number": (lambda: drift(.1, bowl, x), TypeError, "algorithm must be an Algorithm, such as SAM.0.05., got 0.1"),
    "objective is a function": (lambda: Chain(SAM(.1), torch.sum, .1), TypeError, "objective must be an Objective"),
    "unknown expansion": (lambda: SDE(SAM(.1), bowl, .1, expansion="third"), ValueError, "expansion must be 'first', 'second' or 'exact', got 'third'"),
    "unknown noise": (lambda: SDE(SAM(.1), bowl, .1, noise="full"), ValueError, "one of factor, truncated, second, exact, sgd, none, got 'full'"),
    "order 2 of the first expansion": (lambda: SDE(SAM(.1), bowl, .1, order=2), ValueError, "order=2 needs expansion='second' or 'exact', got 'first'"),
    "truncated and indefinite": (lambda: noise_covariance(USAM(9.), data(), torch.ones(2, **f64) / 9, "truncated"), ValueError, "got an eigenvalue of -"),
    "xi of the wrong length": (lambda: noise_sample(SAM(.1), bowl, x, torch.ones(3, **f64)), ValueError, r"xi must have shape \(..., 2\), got \(3,\)"),
    "too few draws": (lambda: cross_covariance(SAM(.1), data(2), x, draws=3), ValueError, "draws must be at least 4, got 3"),
    "noise of a negative size": (lambda: gaussian_direction(x, -1.), ValueError, "sigma must be non-negative"),
    "one path": (lambda: run(n_paths=1), ValueError, "n_paths must be at least 2, got 1"),
    "every 0": (lambda: run(every=0), ValueError, "every must be at least 1, got 0"),
    "chunk of 0": (lambda: run(chunk=0), ValueError, "chunk must be at least 1, got 0"),
    "several eta in one run": (lambda: run(Chain(SGD(), bowl, torch.tensor([.1, .2]))), ValueError, "different eta share no time grid"),
    "negative seed": (lambda: run(seed=-1), ValueError, "seed must be at least 0, got -1"),
    "algorithm for a process": (lambda: run(SAM(.1)), TypeError, "process must be a Chain, an SDE, or another Process, got SAM without 'time_step'"),
    "observable that is a number": (lambda: run(observe={"m": 3.}), TypeError, "observable 'm' must be a function of points, got float"),
    "observable that mixes paths": (lambda: run(observe={"m": lambda x: x.mean()}), ValueError, r"observable 'm' must keep the leading axes \([41],\), got shape \(\)"),
}


TABLE |= { # objective, and the arguments that all share
    "rho is true": (lambda: SAM(True), TypeError, "rho must be a number or a tensor, got bool"),
    "rho is None": (lambda: SAM(None), TypeError, "rho must be a number or a tensor, got NoneType"),
    "rho a list": (lambda: Algorithm([.1, .2]), TypeError, "rho must be a number or a tensor, got list"),
    "rho is complex": (lambda: SAM(torch.tensor(1j)), TypeError, "rho must .*complex"),
    "rho of truth values": (lambda: Linear(torch.tensor([True])), TypeError, "rho must .*bool"),
    "eta is None": (lambda: Chain(SAM(.1), bowl, None), TypeError, "eta must be a number or a tensor, got NoneType"),
    "eta is text": (lambda: Chain(SAM(.1), bowl, "a"), TypeError, "eta must be a number or a tensor, got str"),
    "eta is empty": (lambda: Chain(SAM(.1), bowl, torch.ones(0)), ValueError, r"eta must .* \(0,\)"),
    "rho and eta of shapes that do not fit": (lambda: Chain(SAM(torch.ones(3)), bowl, SWEEP), ValueError, r"\(3,\).*\(2,\)"),
    "rho of a shape that does not fit the points": (lambda: SDE(SAM(torch.ones(3)), bowl, .1).drift(torch.ones(2, 2, **f64)), ValueError, r"\(3,\)"),
    "H empty": (lambda: Quadratic(torch.ones(0, 0)), ValueError, r"H must be a square matrix .* got shape \(0, 0\)"),
    "H complex": (lambda: Quadratic(torch.ones(2, 2, dtype=torch.complex64)), TypeError, "H must be a floating-point tensor, got torch.complex64"),
    "H a numpy array": (lambda: Quadratic(np.eye(2)), TypeError, "H must be a floating-point tensor, got float64"),
    "H several matrices": (lambda: Quadratic(torch.ones(2, 2, 2)), ValueError, r"got shape \(2, 2, 2\)"),
    "H infinite": (lambda: Quadratic(torch.diag(torch.tensor([inf, 1.]))), ValueError, "H must be finite, got infinite or NaN"),
    "sigma for each coordinate": (lambda: Quadratic(eye, SWEEP), ValueError, r"sigma must be one number, got shape \(2,\)"),
    "sigma is text": (lambda: Quadratic(eye, "x"), TypeError, "sigma must be a number or a tensor, got str"),
    "sigma is NaN": (lambda: Quadratic(eye, nan), ValueError, "sigma must be non-negative and finite, got nan"),
    "sigma is infinite": (lambda: Gaussian(2, inf), ValueError, "sigma must be non-negative and finite, got inf"),
    "covariance a list": (lambda: Gaussian(2, cov=[[1, 0], [0, 1]]), TypeError, "cov must be a floating-point tensor, got list"),
    "covariance not symmetric": (lambda: Quadratic(eye, cov=torch.tensor([[1., 1.], [0., 1.]], **f64)), ValueError, "cov must be symmetric, .* by up to 1"),
    "covariance not finite": (lambda: Quadratic(eye, cov=nan * eye), ValueError, "cov must be finite"),
    "covariance of whole numbers": (lambda: NoisyLoss(torch.sum, 2, cov=torch.eye(2, dtype=torch.long)), TypeError, "cov must be a floating-point tensor, got torch.int64"),
    "no dimension": (lambda: NoisyLoss(torch.sum, 0), ValueError, "dim must be at least 1, got 0"),
    "dimension 1.5": (lambda: NoisyLoss(torch.sum, 1.5), TypeError, "dim must be a whole number, got float"),
    "dimension is true": (lambda: Gaussian(True), TypeError, "dim must be a whole number, got bool"),
    "loss is complex": (lambda: NoisyLoss(lambda x: x.sum() * 1j, 2).loss(x), TypeError, "its loss is torch.complex128"),
    "loss in another precision": (lambda: NoisyLoss(lambda x: x.sum().float(), 2).loss(x), TypeError, "x is torch.float64, but its loss is torch.float32"),
    "loss is no tensor": (lambda: NoisyLoss(lambda x: 3., 2).loss(x), (TypeError, ValueError), "got type <class 'float'>|got float"),
    "loss is None": (lambda: NoisyLoss(lambda x: None, 2).loss(x), (TypeError, ValueError), "NoneType"),
    "x too long for a loss": (lambda: noisy.loss(torch.ones(3)), ValueError, r"x must have shape \(..., 2\), got \(3,\)"),
    "x a list": (lambda: noisy.loss([1., 2.]), TypeError, "x must be a floating-point tensor, got list"),
    "x complex": (lambda: bowl.grad(torch.ones(2, dtype=torch.complex128)), TypeError, "x must be a floating-point tensor, got torch.complex128"),
    "x a numpy array": (lambda: bowl.hessian(np.ones(2)), TypeError, "x must be a floating-point tensor, got float64"),
    "x is None": (lambda: bowl.loss(None), TypeError, "x must be a floating-point tensor, got NoneType"),
    "x without coordinates": (lambda: bowl.grad(torch.ones(2, 0, **f64)), ValueError, r"got \(2, 0\)"),
    "v of the wrong length": (lambda: bowl.hvp(x, three), ValueError, r"v must have shape \(..., 2\), got \(3,\)"),
    "v in another precision": (lambda: bowl.hvp(x, x.float()), TypeError, "v is torch.float32, but the data it meets are torch.float64"),
    "v a list": (lambda: data().hvp(x, [1., 2.]), TypeError, "v must be a floating-point tensor, got list"),
    "x and v of shapes that do not fit": (lambda: noisy.hvp(torch.ones(3, 2), torch.ones(4, 2)), ValueError, r"\(3.*\(4"),
    "x and gamma of shapes that do not fit": (lambda: bowl.sample_grad(torch.ones(3, 2, **f64), torch.ones(4, 2, **f64)), ValueError, r"\(3.*\(4"),
    "gamma of the wrong length": (lambda: chain.step(x, three), ValueError, r"gamma must have shape \(..., 2\), got \(3,\)"),
    "gamma of floats for a sum": (lambda: data().sample_grad(x, torch.ones(1)), TypeError, "gamma must be .* torch.float32"),
    "gamma a list": (lambda: data().sample_grad(x, [0, 1]), TypeError, "gamma must be sample numbers, got list"),
    "gamma a mask": (lambda: data().sample_grad(x, torch.tensor([True])), TypeError, "gamma must be sample numbers, got torch.bool"),
    "gamma of bytes, which torch takes for a mask": (lambda: data().sample_grad(x, torch.tensor([1, 0], dtype=torch.uint8)), TypeError, "gamma must be sample numbers, got torch.uint8: give a tensor of int64"),
    "gamma below 0": (lambda: data().sample_grad(x, torch.tensor([[0], [-1]])), ValueError, "sample numbers of gamma must be from 0 to [0-9]+, got -1"),
    "gamma beyond the data": (lambda: data().sample_hvp(x, torch.tensor([data().n]), x), ValueError, "sample numbers of gamma must be from 0 to"),
    "gamma one number": (lambda: data().sample_hvp(x, torch.tensor(1), x), ValueError, r"gamma must have sample numbers along its last axis, got shape \(\)"),
    "gamma of no samples": (lambda: data().sample_loss(x, torch.arange(0)), ValueError, r"along its last axis, got shape \(0,\)"),
    "minibatches between the steps": (lambda: Chain(SAM(.1), data(), .1).advance(x, lambda: torch.tensor([0]), [.05, .05]), ValueError, "no time step below eta=0.1, got dt=0.05"),
    "sample losses no function": (lambda: FiniteSum(None, 3, 2), TypeError, "sample_losses must be a function of one point, got NoneType"),
    "n is text": (lambda: FiniteSum(torch.sum, "3", 2), TypeError, "n must be a whole number, got str"),
    "n is 2.5": (lambda: Minibatches(2.5), TypeError, "n must be a whole number, got float"),
    "batch size negative": (lambda: data(-1), ValueError, "batch_size must be at least 1, got -1"),
    "batch size is text": (lambda: Minibatches(3, "2"), TypeError, "batch_size must be a whole number, got str"),
    "replace is text": (lambda: Minibatches(3, 2, "no"), TypeError, "replace must be .* 'no'"),
    "chunk without select": (lambda: FiniteSum(torch.sum, 3, 2, chunk=2), ValueError, "chunk needs select, .* got none"),
    "chunk 0": (lambda: FiniteSum(torch.sum, 3, 2, chunk=0), ValueError, "chunk must be at least 1, got 0"),
    "chunk 1.5": (lambda: FiniteSum(torch.sum, 3, 2, select=torch.sum, chunk=1.5), TypeError, "chunk must be a whole number, got float"),
    "select no function": (lambda: FiniteSum(torch.sum, 3, 2, select=3), TypeError, "select must be a function .* got int"),
    "one loss for all samples": (lambda: FiniteSum(lambda x: x.sum(), 3, 2).loss(x), ValueError, r"one loss for each sample, shape \(3,\), got \(\)"),
    "sample losses in another precision": (lambda: FiniteSum(lambda x: ((A @ x)**2).float(), 3, 2).grad(x), TypeError, "its loss is torch.float32"),
    "sample losses of more samples in the first step": (lambda: run(Chain(SGD(), FiniteSum(lambda x: A @ x, 2, 2), .1)), ValueError, r"shape \(2,\), got \(3,\)"),
    "select that differs, with a chunk": (lambda: FiniteSum(lambda x: A @ x, 3, 2, select=lambda x, i: 2 * A[i] @ x, chunk=3).sample_grad(x, torch.tensor([0])), ValueError, "select must return the losses of the samples"),
    "a loss that writes to its point": (lambda: NoisyLoss(lambda x: x.mul_(2.).sum(), 2).loss(x), ValueError, "a loss must not write to the point that it is given"),
    "a loss without third derivatives": (lambda: drift(USAM(.1), NoisyLoss(lambda x: x.logcumsumexp(0).sum(), 2), x, "second"), ValueError, "torch has no third derivative of this loss, only NaN: use expansion='exact'"),
    "a module in inference mode": (lambda: torch.inference_mode()(network)(), ValueError, r"torch.inference_mode\(\) has no gradients"),
    "too many weights": (lambda: data().weighted_grad(x, torch.ones(5, **f64)), ValueError, r"w must have shape \(..., 3\), got \(5,\)"),
    "too few weights": (lambda: data().weighted_hvp(x, torch.ones(1, **f64), x), ValueError, r"w must have shape \(..., 3\), got \(1,\)"),
    "no module": (lambda: FiniteSum.from_module(None, torch.nn.MSELoss(), A, A), TypeError, "module must be a torch.nn.Module, got NoneType"),
    "a function for a module": (lambda: network(lambda x: x), TypeError, "module must be a torch.nn.Module, got function"),
    "loss of a module is None": (lambda: network(loss=None), TypeError, "loss must be a function .* got NoneType"),
    "inputs a list": (lambda: network(X=[1, 2, 3]), TypeError, "X must be a tensor, got list"),
    "targets a numpy array": (lambda: network(y=np.ones(3)), TypeError, "y must be a tensor, got ndarray"),
    "inputs a number": (lambda: network(X=torch.tensor(1., **f64)), ValueError, "X must hold"),
    "inputs of the wrong width": (lambda: network(X=torch.ones(3, 5, **f64)), ValueError, "mat1 and mat2 shapes cannot be multiplied"),
    "labels out of range": (lambda: FiniteSum.from_module(torch.nn.Linear(2, 2).double(), torch.nn.CrossEntropyLoss(), A, torch.tensor([0, 1, 9])), ValueError, "9 is out of bounds"),
    "inputs with NaN": (lambda: network(X=A * nan), ValueError, "X must be finite"),
    "targets infinite": (lambda: network(y=A[:, 0] * inf), ValueError, "y must be finite"),
    "module with frozen parameters": (lambda: network(torch.nn.Linear(2, 1).double().requires_grad_(False)), ValueError, "trainable parameters, got none in Linear"),
    "batch norm in training mode": (lambda: network(torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1)).double()), ValueError, "layer '1' .BatchNorm1d. in training mode"),
}

TABLE |= { # sums over samples, drift, noise, SDE
    "unknown method": (lambda: drift(USAM(.1), network(method="magic"), torch.ones(3, **f64)), ValueError, "objective.method must be one of norms, samples, signs, got 'magic'"),
    "norms without a module": (lambda: product_method(HALF_SQUARE, by_method(data(), "norms")), ValueError, "the algorithm cannot go by norms: the objective was not made from a module"),
    "signs for SAM": (lambda: drift(SAM(.1), by_method(data(), "signs"), x), ValueError, "random signs need a perturbation u = c g, which this algorithm has not"),
    "norms of a sum without a module": (lambda: square_norms(data(), x), ValueError, "square_norms needs an objective from a module, got FiniteSum"),
    "norms of a quadratic": (lambda: square_norms(bowl, x), ValueError, "needs an objective from a module, got Quadratic"),
    "norms at a point of the wrong length": (lambda: square_norms(network(), torch.ones(5, **f64)), ValueError, r"x must have shape \(..., 3\), got \(5,\)"),
    "one draw of signs": (lambda: signed_products(data(), x, three, 1), ValueError, "draws must be at least 2, got 1"),
    "signs with too many weights": (lambda: signed_products(data(), x, torch.ones(4, **f64)), ValueError, r"w must have shape \(..., 3\), got \(4,\)"),
    "expansion is None": (lambda: drift(SAM(.1), bowl, x, None), ValueError, "expansion must be 'first', 'second' or 'exact', got None"),
    "edge of a number": (lambda: edge_of_stability(.1, .1), TypeError, "algorithm must be SGD, USAM, DNSAM or SAM, got 0.1"),
    "edge of SAM without a norm": (lambda: edge_of_stability(SAM(.1), .1), ValueError, "SAM needs grad_norm, the norm of the full gradient"),
    "edge of SAM with noise in no dimension": (lambda: edge_of_stability(SAM(.1), .1, grad_norm=1., sigma=.1), ValueError, "SAM with noise needs dim"),
    "edge with a momentum of 1": (lambda: edge_of_stability(USAM(.1), .1, momentum=1.), ValueError, "momentum must be below 1, got 1"),
    "edge of micro-batches": (lambda: edge_of_stability(USAM(.1, micro_batch=2), .1), ValueError, r"this edge is for micro_batch=None, source='own' and no metric, got USAM\(rho=0.1, micro_batch=2\)"),
    "stability without curvature": (lambda: stability_number(USAM(.1), .1, 0.), ValueError, "largest_eigenvalue must be positive and finite, got 0.0"),
    "mean square of SAM": (lambda: mean_square_radius(SAM(.1), torch.ones(3, 1, 1, **f64), .1, 2), TypeError, "algorithm must be SGD or USAM, whose step is linear, got SAM"),
    "mean square of ASAM": (lambda: mean_square_radius(USAM(.1, adaptive=True), torch.ones(3, 1, 1, **f64), .1, 2), TypeError, "algorithm must be SGD or USAM, whose step is linear, got USAM.*adaptive=True"),
    "mean square of a matrix": (lambda: mean_square_radius(USAM(.1), torch.ones(1, 1, **f64), .1, 2), ValueError, r"hessians must have shape \(n, d, d\), got \(1, 1\)"),
    "mean square of too many batches": (lambda: mean_square_radius(USAM(.1), torch.ones(99, 1, 1, **f64), .1, 8), ValueError, "batches must be at most 20000, to be enumerated"),
    "a source that is none": (lambda: SAM(.1, source="mine"), ValueError, "source must be one of own, full, independent, previous, got 'mine'"),
    "momentum of 1": (lambda: Chain(SAM(.1), bowl, .1, momentum=1.), ValueError, "momentum must be below 1, got 1"),
    "dampening below 0": (lambda: SDE(SAM(.1), bowl, .1, dampening=-.1), ValueError, "dampening must be non-negative and finite"),
    "nesterov without momentum": (lambda: Chain(SAM(.1), bowl, .1, nesterov=True), ValueError, "nesterov needs momentum and no dampening"),
    "nesterov by a word": (lambda: Chain(SAM(.1), bowl, .1, momentum=.5, nesterov="yes"), TypeError, "nesterov must be True or False, got 'yes'"),
    "a schedule that is a list": (lambda: Chain(SAM(.1), bowl, .1, schedule=[.1]), TypeError, r"schedule must be a function of time, or a tensor \(steps,\), got list"),
    "a schedule that ends early": (lambda: run(Chain(SAM(.1), bowl, .1, schedule=torch.ones(3) / 10), t_end=1.), ValueError, "schedule has 3 rates, but step 3 is to be taken"),
    "one schedule for two eta": (lambda: SDE(SAM(.1), bowl, torch.tensor([.1, .2]), schedule=torch.cos).factor(1), ValueError, "schedule is a function of time, which paths with different eta do not share"),
    "a schedule below 0": (lambda: run(SDE(SAM(.1), bowl, .1, schedule=lambda t: -t - 1)), ValueError, "schedule must be finite and not negative, got -1 at step 0"),
    "a radius schedule that is a list": (lambda: Chain(SAM(.1), bowl, .1, rho_schedule=[.1]), TypeError, r"rho_schedule must be a function of time, or a tensor \(steps,\), got list"),
    "a radius schedule that ends early": (lambda: run(Chain(SAM(.1), bowl, .1, rho_schedule=torch.ones(3) / 10), t_end=1.), ValueError, "rho_schedule has 3 radii, but step 3 is to be taken"),
    "a radius schedule below 0": (lambda: run(SDE(SAM(.1), bowl, .1, rho_schedule=lambda t: -t - 1)), ValueError, "rho_schedule must be finite and not negative, got -1 at step 0"),
    "a radius schedule of SGD": (lambda: Chain(SGD(), bowl, .1, rho_schedule=lambda t: t), ValueError, "rho_schedule multiplies rho, which must not be 0"),
    "radii for a sweep": (lambda: Chain(SAM(SWEEP), bowl, .1, rho_schedule=torch.ones(3)), ValueError, "rho_schedule must be a function of time in a sweep, got a tensor"),
    "order 2 with a radius schedule": (lambda: SDE(SAM(.1), bowl, .1, "exact", order=2, rho_schedule=lambda t: 1.), ValueError, "order=2 is for steps that are the same at all times, got a schedule"),
    "exact operators of weight decay": (lambda: exact_error(Chain(USAM(.1), circle, .1, weight_decay=.1), SDE(USAM(.1), circle, .1), 1., np.sin), ValueError, "steps that are the same after a turn of the circle, got .* weight_decay=0.1"),
    "the generator of weight decay": (lambda: generator(SDE(USAM(.1), circle, .1, weight_decay=.1), 16), ValueError, "steps that are the same after a turn of the circle"),
    "exact operators of ASAM": (lambda: around(algorithm=SAM(.1, adaptive=True)), ValueError, "steps that are the same after a turn of the circle, got SAM.*adaptive=True"),
    "exact operators of epochs": (lambda: chain_operator(Chain(USAM(.1), circle_problem([.3, -.2], [.9, .6], [1, 2], [.2, 1.1], replace="epochs"), .1), 16), ValueError, "drawn independently, got replace=.epochs."),
    "exact operators of too many states": (lambda: chain_operator(Chain(USAM(.1), circle, .1, momentum=.5), 96, 96), ValueError, r"room for 8192 states, got 9216, of 96 nodes an axis and 96 for each remembered number \(v\)"),
    "one node for a velocity": (lambda: chain_operator(Chain(USAM(.1), circle, .1, momentum=.5), 16, 1), ValueError, "memory_nodes must be at least 2, got 1"),
    "a chain and a kinetic SDE with two eta": (lambda: exact_error(Chain(USAM(.1), circle, .01, momentum=.5), SDE(USAM(.1), circle, .04, momentum=.5, kinetic=True), 1., np.sin), ValueError, "chain and a kinetic sde must have the same eta, got 0.01 and 0.04"),
    "kinetic by a number": (lambda: SDE(SAM(.1), bowl, .1, momentum=.5, kinetic=1), TypeError, "kinetic must be True or False, got 1"),
    "kinetic of order 2": (lambda: SDE(SAM(.1), bowl, .1, "exact", order=2, momentum=.5, kinetic=True), ValueError, "a kinetic model is of order 1 in √η"),
    "a step of a kinetic model": (lambda: SDE(SAM(.1), bowl, .1, momentum=.5, kinetic=True).step(x, x, .1), ValueError, "a kinetic model steps from a point and a velocity"),
    "a loss of second order": (lambda: regularized_loss(SAM(.1), bowl, x, "second"), ValueError, "expansion='second' has no regularised loss"),
    "noise of second order of the previous batch": (lambda: SDE(SAM(.1, source="previous"), bowl, .1, noise="second"), ValueError, "source='previous' has no noise of second order"),
    "momentum of a step of one's own": (lambda: Chain(Jumps(.1), bowl, .1, momentum=.5), ValueError, "Jumps overrides `step`, so what training adds belongs there"),
    "a kinetic model without momentum": (lambda: KineticSDE(SAM(.1), bowl, .1), ValueError, "a kinetic model needs momentum, got 0"),
    "a kinetic model with dampening": (lambda: KineticSDE(SAM(.1), bowl, .1, momentum=.5, dampening=.1), ValueError, "a kinetic model has no dampening"),
    "stationary under a schedule": (lambda: stationary_covariance(Chain(USAM(.1), bowl, .1, schedule=lambda t: 1.)), ValueError, "nothing is stationary under a schedule"),
    "adaptive by a number": (lambda: SAM(.1, adaptive=1), TypeError, "adaptive must be True or False, got 1"),
    "a loss of ASAM": (lambda: regularized_loss(SAM(.1, adaptive=True), bowl, x), ValueError, "SAM with a metric has no regularised loss"),
    "edge of ASAM": (lambda: edge_of_stability(USAM(.1, adaptive=True), .1), ValueError, "this edge is for micro_batch=None, source='own' and no metric"),
    "half a micro-batch": (lambda: SAM(.1, micro_batch=.5), TypeError, "micro_batch must be a whole number, got float"),
    "micro-batches that do not fit": (lambda: Chain(SAM(.1, micro_batch=2), data(3), .1), ValueError, "micro_batch must divide batch_size=3, got 2"),
    "micro-batches of additive noise": (lambda: SDE(SAM(.1, micro_batch=2), bowl, .1), ValueError, "micro_batch needs a FiniteSum or a MinibatchLoss, whose batches can be cut, got Quadratic"),
    "a source for a direction of one's own": (lambda: Chain(Turns(.1, source="full"), bowl, .1), ValueError, "Turns overrides `direction` and so has no micro_batch, no source and no metric"),
    "the previous batch without a state": (lambda: SAM(.1, source="previous").step(bowl, x, .1, x), ValueError, "source='previous' needs the step before"),
    "a second order of the previous batch": (lambda: SDE(USAM(.1, source="previous"), data(), .1, "second", order=2), ValueError, "order=2 with source='previous' needs expansion='exact' and no momentum, got 'second' and momentum=0"),
    "a second order of the previous batch with momentum": (lambda: SDE(USAM(.1, source="previous"), data(), .1, "exact", order=2, momentum=.5), ValueError, "needs expansion='exact' and no momentum, got 'exact' and momentum=0.5"),
    "a loss of an independent batch": (lambda: regularized_loss(SAM(.1, source="independent"), data(), x), ValueError, "has no regularised loss for SAM: its drift is not a gradient"),
    "saddle of micro-batches": (lambda: flow(USAM(.1, source="full"), H, x, 1.), ValueError, "this formula is for micro_batch=None, source='own' and no metric"),
    "a batch size of 0": (lambda: data().with_batch(0), ValueError, "batch_size must be at least 1, got 0"),
    "noiseless nothing": (lambda: Noiseless(3), TypeError, "objective must be an Objective"),
    "moments of a step of one's own": (lambda: Jumps(.1).moments(bowl, x), ValueError, "Jumps overrides `step` and so has no first-order moments"),
    "moments of a direction of one's own": (lambda: Turns(.1).moments(bowl, x), ValueError, "Turns overrides `direction` and so has no first-order moments: use exact=True"),
    "no draws": (lambda: drift(SAM(.1), noisy, x, "exact", draws=0), ValueError, "draws must be at least 4, got 0"),
    "draws 10.5": (lambda: drift(SAM(.1), noisy, x, "exact", draws=10.5), TypeError, "draws must be a whole number, got float"),
    "seed of draws is text": (lambda: drift(SAM(.1), noisy, x, "exact", seed="a"), TypeError, "seed must be a whole number, got str"),
    "seed of draws is negative": (lambda: drift(SAM(.1), noisy, x, "exact", seed=-1), ValueError, "seed must be at least 0, got -1"),
    "drift at whole numbers": (lambda: drift(SAM(.1), bowl, whole_numbers), TypeError, "x must be a floating-point tensor, got torch.int64"),
    "drift of a direction of one's own": (lambda: drift(OwnWay(.1), bowl, x), ValueError, "OwnWay overrides `direction`"),
    "loss of an algorithm without a potential": (lambda: regularized_loss(NoWay(.1), bowl, x), TypeError, "NoWay has no potential"),
    "loss of a name": (lambda: regularized_loss("SAM", bowl, x), TypeError, "algorithm must be an Algorithm, such as SAM.0.05., got 'SAM'"),
    "regularised loss of no objective": (lambda: regularized_loss(SAM(.1), None, x), TypeError, "objective must be an Objective, .* got NoneType"),
    "direction of a list": (lambda: gaussian_direction([1., 2.], .1), TypeError, "list"),
    "direction of whole numbers": (lambda: gaussian_direction(whole_numbers, .1), TypeError, "g must be a floating-point tensor, got torch.int64"),
    "direction of a number": (lambda: gaussian_direction(torch.tensor(1.), .1), ValueError, r"g must have shape .* \(\)"),
    "direction without coordinates": (lambda: gaussian_direction(torch.ones(0), .1), ValueError, r"g must have shape .* \(0,\)"),
    "direction with two sigmas": (lambda: gaussian_direction(x, SWEEP), ValueError, r"sigma must be one number, got shape \(2,\)"),
    "direction with sigma NaN": (lambda: gaussian_direction(x, nan), ValueError, "sigma must be non-negative and finite, got nan"),
    "direction with sigma as text": (lambda: gaussian_direction(x, "a"), TypeError, "sigma must be a number or a tensor, got str"),
    "kappa in 0 dimensions": (lambda: kappa(0), ValueError, "d must be at least 1, got 0"),
    "kappa in 1.5 dimensions": (lambda: kappa(1.5), TypeError, "d must be a whole number, got float"),
    "covariance of nothing": (lambda: sgd_covariance(None, x), TypeError, "objective must be an Objective, .* got NoneType"),
    "covariance at a point too long": (lambda: sgd_covariance(data(), three), ValueError, r"x must have shape \(..., 2\), got \(3,\)"),
    "cross covariance of nothing": (lambda: cross_covariance(None, data(), x), TypeError, "algorithm must be an Algorithm, .* got None"),
    "form in capitals": (lambda: noise_covariance(SAM(.1), bowl, x, "Factor"), ValueError, "form must be one of factor, truncated, second, exact, sgd, none, got 'Factor'"),
    "form is None": (lambda: noise_covariance(SAM(.1), bowl, x, None), ValueError, "form must be one of .* got None"),
    "noise of a number": (lambda: noise_covariance(SAM(.1), 3, x), TypeError, "objective must be an Objective, .* got int"),
    "DNSAM's noise at a zero gradient": (lambda: noise_covariance(DNSAM(.1), bowl, 0 * x), ValueError, "exactly zero at a given point"),
    "factor of a direction of one's own": (lambda: noise_covariance(OwnWay(.1), bowl, x), ValueError, "has no factor form: use form='exact'"),
    "length of the noise of nothing": (lambda: noise_dim(None), TypeError, "objective must be an Objective, .* got NoneType"),
    "length of the noise of a number": (lambda: noise_dim(bowl, 3), TypeError, "algorithm must be an Algorithm, .* got 3"),
    "length of an unknown noise": (lambda: noise_dim(bowl, SAM(.1), "all"), ValueError, "form must be one of .* got 'all'"),
    "xi a list": (lambda: noise_sample(SAM(.1), bowl, x, [1., 2.]), TypeError, "xi must be a floating-point tensor, got list"),
    "xi of whole numbers": (lambda: noise_sample(SAM(.1), bowl, x, whole_numbers), TypeError, "xi must be a floating-point tensor, got torch.int64"),
    "xi in another precision": (lambda: noise_sample(SAM(.1), data(), x, torch.ones(3)), TypeError, "xi is torch.float32, but the data it meets are torch.float64"),
    "xi a number": (lambda: noise_sample(SAM(.1), bowl, x, torch.tensor(1., **f64)), ValueError, r"xi must have shape \(..., 2\), got \(\)"),
    "x and xi of shapes that do not fit": (lambda: noise_sample(SAM(.1), bowl, torch.ones(3, 2, **f64), torch.ones(4, 2, **f64)), ValueError, r"\(3.*\(4"),
    "order 3": (lambda: SDE(SAM(.1), bowl, .1, order=3), ValueError, "order must be 1 or 2, got 3"),
    "an SDE without draws": (lambda: SDE(SAM(.1), bowl, .1, draws=0), ValueError, "draws must be at least"),
    "draws a float": (lambda: SDE(SAM(.1), bowl, .1, draws=10.), TypeError, "draws must be a whole number, got float"),
    "an SDE's seed is text": (lambda: SDE(SAM(.1), data(2), .1, seed="a"), TypeError, "seed must be a whole number, got str"),
    "an SDE's seed is negative": (lambda: SDE(SAM(.1), data(2), .1, seed=-1), ValueError, "seed must be at least 0, got -1"),
    "an SDE of nothing": (lambda: SDE(SAM(.1), None, .1), TypeError, "objective must be an Objective, .* got NoneType"),
    "an SDE of a class": (lambda: SDE(SAM, bowl, .1), TypeError, "algorithm must be an Algorithm, .* got <class"),
    "an SDE of a direction of one's own": (lambda: SDE(OwnWay(.1), bowl, .1), ValueError, "has no factor form: use form='exact'"),
    "an SDE's drift at a point too long": (lambda: sde.drift(three), ValueError, r"x must have shape \(..., 2\), got \(3,\)"),
    "an SDE's noise of the wrong length": (lambda: sde.diffusion(x, three), ValueError, r"xi must have shape \(..., 2\), got \(3,\)"),
    "a step with xi as a list": (lambda: sde.step(x, [1., 1.], .1), TypeError, "xi must be a floating-point tensor, got list"),
    "a step with xi in another precision": (lambda: sde.step(x, torch.ones(2), .1), TypeError, "xi is torch.float32"),
    "a step of no time": (lambda: sde.step(x, x, 0.), ValueError, "dt must be positive and finite, got 0.0"),
    "a step backwards": (lambda: sde.step(x, x, -.1), ValueError, "dt must be positive and finite, got -0.1"),
    "a step of NaN": (lambda: sde.step(x, x, nan), ValueError, "dt must be positive and finite, got nan"),
    "torchsde's points too long": (lambda: sde.to_torchsde().f(0, torch.ones(2, 3, **f64)), ValueError, r"x must have shape \(..., 2\), got \(2, 3\)"),
}

TABLE |= { # simulate
    "no process": (lambda: simulate(None, x, 1., 4), TypeError, "process must be a Chain, .* got NoneType without 'time_step'"),
    "no x0": (lambda: run(x0=None), TypeError, "x0 must be a floating-point tensor, got NoneType"),
    "x0 infinite": (lambda: run(x0=x * inf), ValueError, "x0 must be finite"),
    "x0 in another precision": (lambda: run(x0=x.float()), TypeError, "x0 is torch.float32, but the data it meets are torch.float64"),
    "x0 a number": (lambda: run(x0=torch.tensor(1., **f64)), ValueError, r"x0 must have shape \(..., 2\), got \(\)"),
    "x0 for another sweep": (lambda: run(Chain(SAM(SWEEP), bowl, .1), x0=torch.ones(4, 3, 2, **f64)), ValueError, r"\(3.*\(2"),
    "no time": (lambda: run(t_end=0), ValueError, "t_end must be positive and finite, got 0"),
    "time runs backwards": (lambda: run(t_end=-1.), ValueError, "t_end must be positive and finite, got -1.0"),
    "t_end is NaN": (lambda: run(t_end=nan), ValueError, "t_end must be positive and finite, got nan"),
    "t_end is infinite": (lambda: run(t_end=inf), ValueError, "t_end must be positive and finite, got inf"),
    "t_end is text": (lambda: run(t_end="a"), TypeError, "t_end must be a number or a tensor, got str"),
    "n_paths a float": (lambda: run(n_paths=4.), TypeError, "n_paths must be a whole number, got float"),
    "n_paths is text": (lambda: run(n_paths="4"), TypeError, "n_paths must be a whole number, got str"),
    "n_paths negative": (lambda: run(n_paths=-5), ValueError, "n_paths must be at least 2, got -5"),
    "dt is 0": (lambda: run(sde, dt=0), ValueError, "dt must be positive and finite, got 0"),
    "dt is negative": (lambda: run(sde, dt=-.1), ValueError, "dt must be positive and finite, got -0.1"),
    "dt is NaN": (lambda: run(sde, dt=nan), ValueError, "dt must be positive and finite, got nan"),
    "dt is text": (lambda: run(sde, dt="a"), TypeError, "dt must be a number or a tensor, got str"),
    "seed 1.5": (lambda: run(seed=1.5), TypeError, "seed must be a whole number, got float"),
    "seed is None": (lambda: run(seed=None), TypeError, "seed must be a whole number, got NoneType"),
    "seed is true": (lambda: run(seed=True), TypeError, "seed must be a whole number, got bool"),
    "every 1.5": (lambda: run(every=1.5), TypeError, "every must be a whole number, got float"),
    "chunk of 1.5 paths": (lambda: run(chunk=1.5), TypeError, "chunk must be a whole number, got float"),
    "no threads": (lambda: run(threads=0), ValueError, "threads must be at least 1, got 0"),
    "threads 1.5": (lambda: run(threads=1.5), TypeError, "threads must be a whole number, got float"),
    "observe a number": (lambda: run(observe=3), TypeError, "observable 'observable' must be a function of points, got int"),
    "observe a list": (lambda: run(observe=[total]), TypeError, "must be a function of points, got list"),
    "observe nothing": (lambda: run(observe={}), ValueError, "observe must .* none"),
    "an observable of None": (lambda: run(observe={"a": lambda x: None}), TypeError, "observable 'a' must .* NoneType"),
    "an observable named by a number": (lambda: run(observe={3: total}), TypeError, "observable.* 3"),
    "an observable that is complex": (lambda: run(observe={"a": lambda x: x * 1j}), TypeError, "observable 'a' must be real, got torch.complex128"),
    "an observable that fails in the middle": (lambda: run(observe={"a": lambda x: x[:2]}, every=5), ValueError, r"must keep the leading axes \(4,\), got shape \(2, 2\)"),
    "more times than memory": (lambda: run(Chain(SAM(.1), bowl, 1e-9)), ValueError, "every must be"),
    "checkpoint in no folder": (lambda: run(checkpoint="/nonexistent/a.npz"), ValueError, "checkpoint must be a file in a folder that exists, got /nonexistent"),
    "checkpoint a folder": (lambda: run(checkpoint=FOLDER[0]), ValueError, "checkpoint must be a file"),
    "checkpoint a number": (lambda: run(checkpoint=3), TypeError, "checkpoint must be .* int"),
}

TABLE |= { # weak errors and weak approximation
    "one point for an order": (lambda: weak_order([.1], [1.]), ValueError, r"at least 2, got shapes \(1,\) and \(1,\)"),
    "etas and errors of two lengths": (lambda: weak_order([.1, .2], [1.]), ValueError, r"same length, at least 2, got shapes \(2,\) and \(1,\)"),
    "tables for an order": (lambda: weak_order([[.1, .2]], [[1., 2.]]), ValueError, r"got shapes \(1, 2\)"),
    "an order at a negative eta": (lambda: weak_order([-.1, .2], [1., 2.]), ValueError, r"etas must be positive, .* got \[-0.1, 0.2\]"),
    "an order at one eta": (lambda: weak_order([.1, .1], [1., 2.]), ValueError, "not all equal"),
    "an order of no error": (lambda: weak_order([.1, .2], [0., 2.]), ValueError, r"errors must be finite and other than 0 .* got \[0.0, 2.0\]"),
    "an order of NaN": (lambda: weak_order([.1, .2], [nan, 2.]), ValueError, r"errors must be finite .* got \[nan, 2.0\]"),
    "a negative standard error": (lambda: weak_order([.1, .2], [1., 2.], [-1, 1]), ValueError, "sem must be 2 positive numbers"),
    "too few standard errors": (lambda: weak_order([.1, .2], [1., 2.], [1]), ValueError, "sem must be 2 positive numbers, got"),
    "a map of a number": (lambda: map_of(.1), TypeError, "algorithm must be a function of rho, such as the class SAM, got 0.1"),
    "a map without a start": (lambda: map_of(objective=bowl), ValueError, "x0 and n_paths are needed"),
    "a map without paths": (lambda: map_of(SAM, bowl, (.1,), (.1,), 1., total, x), ValueError, "x0 and n_paths are needed"),
    "a map at a negative eta": (lambda: map_of(etas=[-.1]), ValueError, "eta must be positive and finite, got -0.1"),
    "a map at a negative rho": (lambda: map_of(rhos=[-.1]), ValueError, "rho must be non-negative and finite, got -0.1"),
    "a map of unknown noise": (lambda: map_of(noise="x"), ValueError, "form must be one of .* got 'x'"),
    "a map with an unknown setting": (lambda: map_of(colour=3), TypeError, "unexpected keyword argument 'colour'"),
    "a circle of lists of two lengths": (lambda: circle_problem([1, 2], [1], [1, 2], [0, 0]), ValueError, r"A must be a list of 2 numbers, one each, got shape \(1,\)"),
    "a wave without a frequency": (lambda: circle_problem([1.], [1.], [0], [0]), ValueError, "other than 0"),
    "half a wave": (lambda: circle_problem([1.], [1.], [1.5], [0]), ValueError, r"m must hold whole numbers, .* got \[\[\[1.5"),
    "a circle of NaN": (lambda: circle_problem([nan], [1.], [1], [0]), ValueError, "c, a, m and p must be finite"),
    "a circle without samples": (lambda: circle_problem([], [], [], []), ValueError, "n must be at least 1, got 0"),
    "a circle with empty minibatches": (lambda: circle_problem([1.], [1.], [1], [0], batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
    "a torus in one dimension": (lambda: torus_problem([[1.]], [[1.]], [[[1]]], [[0.]]), ValueError, r"c must have shape \(n, 2\), got \(1, 1\)"),
    "a torus of shapes that do not fit": (lambda: torus_problem([[1., 1.]], [[1., 2.]], [[[1, 0]]], [[0.]]), ValueError, r"a must have shape \(1, 1\) .* got \(1, 2\)"),
    "tilts in a row": (lambda: TrigonometricSum([1.], [[1.]], [[[1]]], [[0.]]), ValueError, r"c must have shape \(n, d\) .* got \(1,\)"),
    "examples in three dimensions": (lambda: periodic_examples(3), ValueError, "dim must be 1 or 2, got 3"),
    "a circle's error on a quadratic": (lambda: around(bowl), TypeError, "problem must be a circle_problem, got Quadratic"),
    "a torus' error on a circle": (lambda: torus_error(SAM(.1), circle, .1, 1., lambda a, b: a), TypeError, "problem must be a torus_problem, got TrigonometricSum"),
    "nodes odd": (lambda: around(nodes=95), ValueError, "nodes must be even, got 95"),
    "two nodes": (lambda: around(nodes=2), ValueError, "nodes must be at least 4, got 2"),
    "no nodes": (lambda: exact_error(*on_circle, 1., np.sin, nodes=0), ValueError, "nodes must be at least 4, got 0"),
    "nodes a float": (lambda: around(nodes=96.), TypeError, "nodes must be a whole number, got float"),
    "an exact error between two steps": (lambda: around(t_end=1.05), ValueError, "whole number of steps eta=0.1, got 1.05"),
    "an exact error without eta": (lambda: around(eta=0), ValueError, "eta must be positive and finite, got 0"),
    "an exact error of nothing": (lambda: around(algorithm=None), TypeError, "algorithm must be an Algorithm, .* got None"),
    "a test that is constant": (lambda: around(test=lambda x: 1.), ValueError, r"one number for each of 96 nodes, got shape \(\)"),
    "a test that is NaN": (lambda: around(test=lambda x: x * nan), ValueError, "test must be finite at every node"),
    "order 2 of the first expansion, exactly": (lambda: around(order=2), ValueError, "order=2 needs expansion='second' or 'exact', got 'first'"),
    "the operator of a quadratic": (lambda: chain_operator(chain, 16), TypeError, "need a circle_problem or torus_problem, got Quadratic"),
    "the generator of a quadratic": (lambda: generator(sde, 16), TypeError, "need a circle_problem or torus_problem, got Quadratic"),
    "a chain and an SDE with two eta": (lambda: exact_difference(on_circle[0], SDE(USAM(.1), circle, .2), 1., np.sin), ValueError, "stand for the same time .*got 0.1 and 0.2"),
    "an SDE for a chain, exactly": (lambda: exact_difference(*on_circle[::-1], 1., np.sin), TypeError, "chain must be a Chain, got SDE"),
    "an exact error of a sweep": (lambda: exact_error(Chain(USAM(SWEEP), circle, .1), on_circle[1], 1., np.sin), ValueError, r"one eta and one rho at a time, got sweeps of shape \(2,\)"),
    "moments of SAM": (lambda: linear_moments(chain, x, 1.), TypeError, "moments are exact for SGD or USAM on a Quadratic, got SAM"),
    "moments of ASAM": (lambda: linear_moments(Chain(USAM(.1, adaptive=True), bowl, .1), x, 1.), TypeError, "moments are exact for SGD or USAM on a Quadratic, got USAM.*adaptive=True"),
    "a stationary covariance of ASAM": (lambda: stationary_covariance(SDE(USAM(.1, adaptive=True), bowl, .1)), TypeError, "moments are exact for SGD or USAM on a Quadratic, got USAM.*adaptive=True"),
    "moments of a number": (lambda: linear_moments(3, x, 1.), TypeError, "process must be a Chain or an SDE, got int"),
    "moments on a sum": (lambda: linear_moments(Chain(USAM(.1), data(), .1), x, 1.), TypeError, "on FiniteSum"),
    "moments of a sweep": (lambda: linear_moments(Chain(USAM(SWEEP), bowl, .1), x, 1.), ValueError, r"got a sweep of shape \(2,\)"),
    "moments from a start too long": (lambda: linear_moments(lines, three, 1.), ValueError, r"x0 must have shape \(..., 2\), got \(3,\)"),
    "moments from several starts": (lambda: linear_moments(lines, torch.ones(3, 2, **f64), 1.), ValueError, r"x0 must have shape \(2,\), got \(3, 2\)"),
    "moments from NaN": (lambda: linear_moments(lines, x * nan, 1.), ValueError, "x0 must be finite"),
    "moments between two steps": (lambda: linear_moments(lines, x, 1.05), ValueError, "whole number of steps eta=0.1, got 1.05"),
    "moments before the start": (lambda: linear_moments(SDE(USAM(.1), bowl, .1), x, -1.), ValueError, "t_end must be positive and finite, got -1.0"),
    "stationary and unstable": (lambda: stationary_covariance(Chain(USAM(.1), Quadratic(-eye, .1), .1)), ValueError, "got a multiplier of 1.09"),
    "stationary nothing": (lambda: stationary_covariance(None), TypeError, "process must be a Chain or an SDE, got NoneType"),
    "weak error of an SDE and a chain": (lambda: weak(sde, chain), TypeError, "chain must be a Chain, got SDE"),
    "weak error of two dimensions": (lambda: weak(sde=SDE(SAM(.1), Quadratic(torch.eye(3, **f64)), .1)), ValueError, "same dimension, got 2 and 3"),
    "weak error from several starts": (lambda: weak(x0=torch.ones(3, 2, **f64)), ValueError, r"x0 must have shape \(2,\), got \(3, 2\)"),
    "weak error from NaN": (lambda: weak(x0=x * nan), ValueError, "x0 must be finite"),
    "weak error of points": (lambda: weak(test=lambda x: x), ValueError, r"one number for each path, shape \(10,\), got \(10, 2\)"),
    "weak error of one path": (lambda: weak(n_paths=1), ValueError, "n_paths must be at least 2, got 1"),
    "three substeps": (lambda: weak(substeps=3), ValueError, "substeps must be even, got 3"),
    "no substeps": (lambda: weak(substeps=0), ValueError, "substeps must be at least 2, got 0"),
    "weak error recorded never": (lambda: weak(every=0), ValueError, "every must be at least 1, got 0"),
    "weak error with a negative seed": (lambda: weak(seed=-1), ValueError, "seed must be at least 0, got -1"),
    "an interval of no width": (lambda: weak().paths_for(0), ValueError, "half_width must be positive and finite, got 0"),
}

def line(): return torch.nn.Linear(2, 1).double()
def batches(module=None, loss=torch.nn.MSELoss(), data=(A, A[:, :1]), batch_size=2, **how):
    return MinibatchLoss.from_module(line() if module is None else module, loss, data, batch_size, **how)
def two_columns(): return BatchNetwork(line(), LossOfOutput(torch.nn.MSELoss()), (A, A[:, :1]))
def run_of(net=None, kind=torch.optim.SGD, data=(A, A[:, :1]), **how):
    net = net or line()
    return diagnose_training(net, torch.nn.MSELoss(), data, kind(net.parameters(), lr=.1), **dict(batch_size=2, progress=False) | how)

TABLE |= { # any training loss, and a run
    "minibatches of a text": (lambda: batches("net"), TypeError, "module must be a torch.nn.Module, got str"),
    "minibatches without parameters": (lambda: batches(torch.nn.Sigmoid()), ValueError, "trainable parameters, got none in Sigmoid"),
    "minibatches of one tensor": (lambda: batches(data=A), TypeError, "data must be a tuple such as .X, y., or a Dataset, got a tensor alone"),
    "minibatches of unequal rows": (lambda: batches(data=(A, A[:2])), ValueError, r"equally long, got \[2, 3\] rows"),
    "minibatches without a size": (lambda: batches(batch_size=None), TypeError, "batch_size must be given"),
    "minibatches of half a row": (lambda: MinibatchLoss(two_columns(), 1.5), TypeError, "batch_size must be a whole number, got float"),
    "minibatches of too many rows": (lambda: batches(batch_size=4, replace=False), ValueError, "at most n without replacement, got batch_size=4 and n=3"),
    "one minibatch for f": (lambda: batches(full_batches=1), ValueError, "full_batches must be at least 2, got 1"),
    "minibatches by a number": (lambda: batches(loss=3), TypeError, "loss must be a function of .output, target., got int"),
    "two losses": (lambda: batches(batch_loss=lambda module, batch: 0), ValueError, "give loss or batch_loss, not both"),
    "a loss that is a vector": (lambda: batches(loss=torch.nn.MSELoss(reduction="none")), ValueError, r"floating-point scalar, got \(2, 1\)"),
    "minibatches in float32": (lambda: batches().grad(torch.ones(3)), TypeError, "x is torch.float32, but the data it meets are torch.float64"),
    "minibatches at another dim": (lambda: batches().loss(x), ValueError, r"x must have shape \(..., 3\), got \(2,\)"),
    "a sample number below 0": (lambda: batches().sample_grad(three, torch.tensor([-1, 0, 7])), ValueError, "sample numbers of gamma must be from 0 to [0-9]+, got -1"),
    "gamma of real numbers": (lambda: batches().sample_grad(three, three), TypeError, "gamma must be sample numbers and a seed, got torch.float64"),
    "error at two points": (lambda: batches().full_error(torch.ones(2, 3, **f64)), ValueError, r"one point of shape \(3,\), got \(2, 3\)"),
    "micro-batches of any loss": (lambda: Chain(SAM(.1, micro_batch=3), batches(), .1), ValueError, "micro_batch must divide batch_size="),
    "a run by Adam": (lambda: run_of(kind=torch.optim.Adam), TypeError, "must be that of torch.optim.SGD.* got Adam"),
    "a run in no time": (lambda: run_of(budget_s=0), ValueError, "budget_s must be positive and finite, got 0"),
    "a run with a negative radius": (lambda: run_of(rho=-1.), ValueError, "rho must be non-negative and finite, got -1"),
    "a run along no directions": (lambda: run_of(top=0), ValueError, "top must be at least 1, got 0"),
    "a run without a batch size": (lambda: run_of(batch_size=None), TypeError, "batch_size must be given"),
    "watching every 0 steps": (lambda: Monitor(line(), None, (A, A), None, every=0), ValueError, "every must be at least 1, got 0"),
    "watching for free": (lambda: Monitor(line(), None, (A, A), None, overhead=0), ValueError, "overhead must be positive and finite, got 0"),
}

TABLE |= { # saddles, stationarity, diagnosis
    "hovering of a variant": (lambda: hover_radius(NoWay(.1), H, .1), TypeError, "algorithm must be SGD, USAM, DNSAM or SAM, got NoWay"),
    "hovering without eta": (lambda: hover_radius(SAM(.1), H, 0), ValueError, "eta must be positive and finite, got 0"),
    "hovering at several eta": (lambda: hover_radius(SAM(.1), H, SWEEP), ValueError, r"eta must be one number, got shape \(2,\)"),
    "attraction of nothing": (lambda: is_attracting(SAM(.1), 0 * H), ValueError, "eigenvalue other than 0, got the zero matrix"),
    "attraction of a list": (lambda: is_attracting(SAM(.1), [[1.]]), TypeError, "H must be a floating-point tensor, got list"),
    "attraction with negative noise": (lambda: is_attracting(SAM(.1), H, .1, -1.), ValueError, "sigma must be non-negative and finite, got -1.0"),
    "attraction with negative eta": (lambda: is_attracting(SAM(.1), H, -.1), ValueError, "eta must be positive and finite, got -0.1"),
    "attraction of a sweep": (lambda: is_attracting(SAM(SWEEP), H), ValueError, r"rho must be one number, got shape \(2,\)"),
    "exit without noise": (lambda: exit_time(1., 0., 1, 1.), ValueError, "D must be positive"),
    "exit with negative noise": (lambda: exit_time(1., -1., 1, 1.), ValueError, "D must be positive and finite, got -1.0"),
    "exit in 0 dimensions": (lambda: exit_time(1., 1., 0, 1.), ValueError, "m must be at least 1, got 0"),
    "exit to a negative distance": (lambda: exit_time(1., 1., 1, -1.), ValueError, "L must be positive and finite, got -1.0"),
    "exit at a rate of NaN": (lambda: exit_time(nan, 1., 1, 1.), ValueError, "rate must be finite, got nan"),
    "escape from a minimum": (lambda: escape_time(SGD(), eye, .1, .1, .1), ValueError, "H must have a negative eigenvalue to escape along, got 1"),
    "escape of DNSAM": (lambda: escape_time(DNSAM(.1), H, .1, .1, .1), ValueError, "DNSAM has no such escape time"),
    "escape without noise": (lambda: escape_time(SGD(), H, .1, 0., .1), ValueError, "sigma must be positive and finite, got 0.0"),
    "escape to a negative radius": (lambda: escape_time(SGD(), H, .1, .1, -1), ValueError, "radius must be positive and finite, got -1"),
    "escape too far": (lambda: escape_time(SAM(.1), H, .1, .1, 100.), ValueError, "radius must be at most .* got 100"),
    "flow from a start too long": (lambda: flow(SAM(.1), H, three, 1.), ValueError, r"x0 must have shape \(..., 2\), got \(3,\)"),
    "flow from NaN": (lambda: flow(SAM(.1), H, x * nan, 1.), ValueError, "x0 must be finite"),
    "flow in another precision": (lambda: flow(SAM(.1), H, x.float(), 1.), TypeError, "x0 is torch.float32"),
    "flow for no time": (lambda: flow(SAM(.1), H, x, 0), ValueError, "t_end must be positive and finite, got 0"),
    "flow that overflows": (lambda: flow(SGD(), H, x, 1e5), ValueError, "t_end must be at most 1200 for numbers not to overflow, got 100000"),
    "flow in one step": (lambda: flow(SAM(.1), H, x, 1., steps=1), ValueError, "steps must be at least 2, got 1"),
    "basin of a name": (lambda: basin_radius("SAM", H), TypeError, "algorithm must be SGD, USAM, DNSAM or SAM, got 'SAM'"),
    "basin of no square": (lambda: basin_radius(SAM(.1), torch.ones(2, 3)), ValueError, r"H must be a square matrix .* got shape \(2, 3\)"),
    "arrival from a negative distance": (lambda: latest_arrival(SAM(.1), H, -1.), ValueError, "r0 must be non-negative and finite, got -1.0"),
    "arrival from NaN": (lambda: latest_arrival(SAM(.1), H, nan), ValueError, "r0 must be non-negative and finite, got nan"),
    "arrival from a list": (lambda: arrival_time(SAM(.1), H, [1., 2.]), TypeError, "x0 must be a floating-point tensor, got list"),
    "arrival from infinity": (lambda: arrival_time(SAM(.1), H, x * inf), ValueError, "x0 must be finite"),
    "closure of a network": (lambda: closed_covariance(Chain(SAM(.1), noisy, .1)), TypeError, "SGD, USAM, DNSAM or SAM on a Quadratic, got SAM.* on NoisyLoss"),
    "closure of nothing": (lambda: closed_covariance(None), TypeError, "process must be a Chain or an SDE, got NoneType"),
    "closure of an algorithm": (lambda: closed_covariance(SAM(.1)), TypeError, "process must be a Chain or an SDE, got SAM"),
    "closure of DNSAM on a plane": (lambda: suboptimality(Chain(DNSAM(.1), bowl, .1)), ValueError, "three dimensions or more only, got 2"),
    "closure of what diverges": (lambda: suboptimality(Chain(SAM(.1), Quadratic(30 * eye, .1), .1)), ValueError, "positive eigenvalues below 2/η, got 30 to 30"),
    "closure at a saddle": (lambda: suboptimality(Chain(SGD(), Quadratic(H, .1), .1)), ValueError, "got -0.5 to 1"),
    "closure of a sweep": (lambda: suboptimality(Chain(USAM(SWEEP), bowl, .1)), ValueError, r"got a sweep of shape \(2,\)"),
    "closure without noise": (lambda: suboptimality(Chain(SAM(.1), Quadratic(eye), .1)), ValueError, "noise"),
    "more eigenvectors than dimensions": (lambda: top_eigenvectors(bowl, x, 3), ValueError, "k must be at most the dimension 2, got 3"),
    "no eigenvectors": (lambda: top_eigenvectors(bowl, x, 0), ValueError, "k must be at least 1, got 0"),
    "eigenvectors at several points": (lambda: top_eigenvectors(bowl, torch.ones(3, 2, **f64), 1), ValueError, r"x must be one point of shape \(2,\), got \(3, 2\)"),
    "eigenvectors at NaN": (lambda: top_eigenvectors(NoisyLoss(total, 5), torch.full((5,), nan), 1), ValueError, "x must be finite"),
    "eigenvectors of nothing": (lambda: top_eigenvectors(None, x, 1), TypeError, "objective must be an Objective, .* got NoneType"),
    "no products for an eigenvalue": (lambda: largest_eigenvalue(bowl.hvp, x, 0), ValueError, "steps must be at least 1, got 0"),
    "eigenvalue at a list": (lambda: largest_eigenvalue(bowl.hvp, [1., 2.]), TypeError, "x must be a floating-point tensor, got list"),
    "diagnosis at several points": (lambda: look(x=torch.ones(3, 2, **f64)), ValueError, r"x must be one point of shape \(2,\), got \(3, 2\)"),
    "diagnosis of a sweep": (lambda: look(SAM(SWEEP)), ValueError, r"one radius, got shape \(2,\)"),
    "diagnosis without eta": (lambda: look(eta=0), ValueError, "eta must be positive and finite, got 0"),
    "diagnosis at several eta": (lambda: look(eta=SWEEP), ValueError, r"eta must be one number, got shape \(2,\)"),
    "diagnosis along too many": (lambda: look(top=9), ValueError, "k must be at most the dimension 2, got 9"),
    "diagnosis from two draws": (lambda: look(draws=2), ValueError, "draws must be at least 4, got 2"),
    "diagnosis along -1 directions": (lambda: look(directions=-1), ValueError, "directions must be at least 0, got -1"),
    "diagnosis with negative tolerance": (lambda: look(tolerance=-1), ValueError, "tolerance must be positive and finite, got -1"),
    "diagnosis with a negative seed": (lambda: look(seed=-1), ValueError, "seed must be at least 0, got -1"),
    "diagnosis at a minimum": (lambda: look(x=0 * x), ValueError, "the drift is exactly zero at x"),
    "diagnosis at NaN": (lambda: look(x=nan * x), ValueError, "x must be finite"),
}

TABLE |= { # epochs
    "epochs of batches too large": (lambda: data(4, "epochs"), ValueError, "batch_size must be at most n without replacement, got batch_size=4 and n=3"),
    "moments of one Hessian": (lambda: quadratic_moments(eye, A, .1), ValueError, r"hessians must have shape \(n, d, d\), got \(2, 2\)"),
    "moments of a skew Hessian": (lambda: quadratic_moments(torch.tensor([[[1., 2.], [0., 1.]]] * 3, **f64), A, .1), ValueError, "symmetric"),
    "moments of too few minima": (lambda: quadratic_moments(torch.stack([eye] * 3), A[:2], .1), ValueError, r"minima must have shape \(3, 2\), got \(2, 2\)"),
    "moments of steps that diverge": (lambda: quadratic_moments(torch.stack([eye] * 3), A, 2.1), ValueError, "steps that shrink second moments .* got a factor of"),
    "moments of a million orders": (lambda: quadratic_moments(torch.stack([eye] * 20), torch.ones(20, 2, **f64), .1), ValueError, "minibatches must be at most 50000, got 10485760"),
    "moments of no sampling": (lambda: quadratic_moments(torch.stack([eye] * 3), A, .1, replace="epoch"), TypeError, "replace must be True, False or 'epochs', got 'epoch'"),
    "noise of steps that diverge": (lambda: epoch_noise(2., 10), ValueError, "eta_lambda must be below 2, or steps diverge, got 2"),
    "noise of a negative curvature": (lambda: epoch_noise(-.1, 10), ValueError, "eta_lambda must be positive and finite, got -0.1"),
    "noise of the full batch": (lambda: epoch_noise(.1, 10, 10), ValueError, "batch_size must be below n, got 10 and 10"),
    "epochs without eta": (lambda: epoch_terms(data(1, "epochs").law, 0, 1.), ValueError, "eta must be positive and finite, got 0"),
}

TABLE |= { # optimizers
    "base optimizer a number": (lambda: optimizer(base=3), TypeError, "base_optimizer must be a class such as torch.optim.SGD, got 3"),
    "no base optimizer": (lambda: optimizer(base=None), TypeError, "base_optimizer must be a class such as torch.optim.SGD, got None"),
    "base optimizer needs a closure": (lambda: optimizer(base=torch.optim.LBFGS), TypeError, "must step without a closure, got LBFGS"),
    "optimizer's rho negative": (lambda: optimizer(optim.USAM, rho=-1.), ValueError, "rho must be non-negative and finite, got -1.0"),
    "optimizer's rho NaN": (lambda: optimizer(rho=nan), ValueError, "rho must be non-negative and finite, got nan"),
    "optimizer's rho text": (lambda: optimizer(rho="a"), TypeError, "rho must be a number, got str"),
    "optimizer's rho true": (lambda: optimizer(rho=True), TypeError, "rho must be a number, got bool"),
    "optimizer's rho a tensor": (lambda: optimizer(rho=torch.tensor(.1)), TypeError, "rho must be a number, got Tensor"),
    "a group's rho negative": (lambda: optimizer(params=[{"params": [torch.nn.Parameter(torch.ones(1))], "rho": -1}]), ValueError, "rho must be non-negative and finite, got -1"),
    "an added group's rho negative": (lambda: optimizer().add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "rho": -2}), ValueError, "rho must be non-negative and finite, got -2"),
    "no parameters": (lambda: optimizer(params=[]), ValueError, "empty parameter list"),
    "a tensor for parameters": (lambda: optimizer(params=torch.ones(2)), TypeError, "should be an iterable of Tensors"),
    "numbers for parameters": (lambda: optimizer(params=[1.]), TypeError, "one of the params is float"),
    "parameters that were computed": (lambda: optimizer(params=[torch.nn.Parameter(torch.ones(1)) * 2]), ValueError, "non-leaf Tensor"),
    "negative lr": (lambda: optimizer(lr=-1.), ValueError, "Invalid learning rate: -1.0"),
    "an option that the base optimizer lacks": (lambda: optimizer(colour=3), TypeError, "unexpected keyword argument 'colour'"),
    "DNSAM without a norm": (lambda: optimizer(optim.DNSAM), ValueError, "DNSAM needs full_grad_norm"),
    "DNSAM's norm a number": (lambda: optimizer(optim.DNSAM, full_grad_norm=3.), ValueError, "full_grad_norm, a function"),
    "DNSAM's norm zero": (lambda: stepped(optim.DNSAM, full_grad_norm=lambda: 0.), ValueError, "must be positive and finite, got 0.0"),
    "DNSAM's norm NaN": (lambda: stepped(optim.DNSAM, full_grad_norm=lambda: nan), ValueError, "must be positive and finite, got nan"),
    "a step without a closure": (lambda: optimizer().step(), ValueError, "step needs a closure, or first_step before it"),
    "the second step first": (lambda: optimizer().second_step(), ValueError, "step needs a closure, or first_step before it"),
    "grad_scale 0": (lambda: optimizer().first_step(grad_scale=0.), ValueError, "grad_scale must be positive and finite, got 0.0"),
    "grad_scale NaN": (lambda: optimizer().first_step(grad_scale=nan), ValueError, "grad_scale must be positive and finite, got nan"),
    "grad_scale negative": (lambda: optimizer().first_step(grad_scale=-2.), ValueError, "grad_scale must be positive and finite, got -2.0"),
    "two first steps": (lambda: [o.first_step() for o in [optimizer()] * 2], ValueError, "first_step was called twice"),
    "an optimizer for an algorithm": (lambda: look(optimizer()), TypeError, "got the optimizer samsde.optim.SAM: write samsde.algorithm.SAM.rho.; an optimizer is for diagnose_training"),
    "an algorithm for an optimizer": (lambda: diagnose_training(torch.nn.Linear(2, 1), torch.nn.MSELoss(), (torch.ones(4, 2), torch.ones(4, 1)), SAM(.1), batch_size=2),
                                      TypeError, "optimizer must be samsde.optim.SAM or torch.optim.SGD, got samsde.algorithm.SAM: write samsde.optim.SAM"),
    "a slider without values": (lambda: Frames(None, {"rho": []}), ValueError, "each slider at least one value"),
    "an optimizer without a scale": (lambda: stepped(optim.Perturbed), TypeError, "Perturbed must define `scale`"),
    "base optimizer needs a closure, partly given": (lambda: optimizer(base=functools.partial(torch.optim.LBFGS, max_iter=2)), TypeError, "must step without a closure, got LBFGS"),
    "base optimizer is SAM": (lambda: optimizer(base=functools.partial(optim.SAM, base_optimizer=torch.optim.SGD)), TypeError, "optimizer of torch's, such as SGD, got SAM"),
    "base optimizer makes none": (lambda: optimizer(base=lambda params, lr: 3), TypeError, "optimizer of torch's, such as SGD, got int"),
    "interval 0": (lambda: optimizer(interval=0), ValueError, "interval must be at least 1, got 0"),
    "interval 1.5": (lambda: optimizer(interval=1.5), TypeError, "interval must be a whole number, got float"),
    "adaptive a number": (lambda: optimizer(adaptive=1), TypeError, "adaptive must be True or False, got 1"),
    "perturb text": (lambda: optimizer(params=[dict(params=[torch.nn.Parameter(torch.ones(1))], perturb="no")]), TypeError, "perturb must be True or False, got 'no'"),
    "preserve_rng_state a number": (lambda: optimizer(preserve_rng_state=0), TypeError, "preserve_rng_state must be True or False, got 0"),
    "optimizer's rho complex": (lambda: optimizer(rho=1j), TypeError, "rho must be a number, got complex"),
    "a base's checkpoint of other groups": (lambda: optimizer().load_state_dict(dict(state={}, param_groups=[])), ValueError, "different number of parameter groups"),
    "no closures": (lambda: optimizer().step(closures=[]), TypeError, "closures must be functions, one for each micro-batch"),
    "closures that are losses": (lambda: optimizer().step(closures=[1.]), TypeError, "closures must be functions"),
    "closure and closures": (lambda: optimizer().step(empty, closures=[empty]), ValueError, "got two of them"),
    "perturbation unknown": (lambda: optimizer().step(closures=[empty], perturbation="each"), ValueError, "perturbation must be 'joined' or 'own', got 'each'"),
    "too few weights of micro-batches": (lambda: optimizer().step(closures=[empty] * 2, weights=[1]), ValueError, "one for each of 2 micro-batches"),
    "negative weight of a micro-batch": (lambda: optimizer().step(closures=[empty], weights=[-1]), ValueError, "weights must be positive"),
    "radius of a plain optimizer": (lambda: optim.LambdaRho(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), len), TypeError, "optimizer must be a SAM, USAM or DNSAM, got SGD"),
    "radius by no function": (lambda: optim.LambdaRho(optimizer(), .5), TypeError, "factor must be a function of the step, got 0.5"),
    "radius that becomes infinite": (lambda: optim.LambdaRho(optimizer(), lambda step: inf), ValueError, "rho must be non-negative and finite, got inf"),
    "radius along a line to below 0": (lambda: optim.LinearRho(optimizer(), 1, -1, 5), ValueError, "rho must be non-negative and finite, got -1"),
    "radius along a line without steps": (lambda: optim.LinearRho(optimizer(), 1, 0, 0), ValueError, "total_iters must be at least 1, got 0"),
    "norm of no data": (lambda: optim.full_gradient_norm(torch.nn.Linear(2, 1), torch.nn.MSELoss(), []) (), ValueError, "at least one pair, got none"),
    "norm of an iterator": (lambda: optim.full_gradient_norm(torch.nn.Linear(2, 1), torch.nn.MSELoss(), iter([])), TypeError, "X must be a tensor, got list_iterator"),
    "norm of batches that are no pairs": (lambda: optim.full_gradient_norm(torch.nn.Linear(2, 1), torch.nn.MSELoss(), [A])(), TypeError, "pairs of tensors .inputs, targets., got Tensor"),
    "norm of no module": (lambda: optim.full_gradient_norm(None, torch.nn.MSELoss(), A, A), TypeError, "module must be a torch.nn.Module, got NoneType"),
    "norm of rows without targets": (lambda: measured_norm(y=A[:2, :1], chunk=1), ValueError, "equally long, got 3 and 2 rows"),
    "norm of no rows": (lambda: measured_norm(X=A[:0], y=A[:0, :1]), ValueError, "non-empty and equally long, got 0 and 0 rows"),
    "norm of a list": (lambda: measured_norm(X=[1.]), TypeError, "X must be a tensor, got list"),
    "norm in chunks of 0": (lambda: measured_norm(chunk=0), ValueError, "chunk must be at least 1, got 0"),
    "statistics of no module": (lambda: optim.frozen_statistics(None).__enter__(), TypeError, "module must be a torch.nn.Module, got NoneType"),
}

TABLE |= { # experiments
    "a saddle of a list": (lambda: escape.Saddle([1., 2.]), TypeError, "lam must be a floating-point tensor .* got list"),
    "a saddle that is infinite": (lambda: escape.Saddle(torch.tensor([inf, 1.])), ValueError, "lam must be finite"),
    "a saddle with negative walls": (lambda: escape.Saddle(torch.ones(2), -1.), ValueError, "quartic must be non-negative and finite, got -1.0"),
    "an unknown saddle": (lambda: escape.saddle(spectrum="d = 3"), ValueError, "spectrum must be one of .* got 'd = 3'"),
    "an autoencoder without units": (lambda: escape.Autoencoder(eye, 0), ValueError, "hidden must be at least 1, got 0"),
    "an autoencoder of a list": (lambda: escape.Autoencoder([[1.]], 1), TypeError, "C must be a floating-point tensor, got list"),
    "an autoencoder of no square": (lambda: escape.Autoencoder(torch.ones(2, 3), 1), ValueError, "C must be a square matrix"),
    "an autoencoder that starts nowhere": (lambda: escape.autoencoder(radius=nan), ValueError, "radius must be positive and finite, got nan"),
    "no mildest eigenvalue": (lambda: escape.mildest(torch.ones(2)), ValueError, "negative"),
    "a verdict that is none": (lambda: experiment.Verdict("c", "maybe", "1"), ValueError, "verdict must be one of .* got 'maybe'"),
    "a condition that is not named": (lambda: experiment.Verdict("c", "holds with a condition", "1"), ValueError, "with a condition must name it: c"),
    "a jackknife of one run": (lambda: experiment.jackknife(lambda m: m.max(), torch.ones(3, 1)), ValueError, "at least 2"),
    "an unknown problem": (lambda: error_vs_rho.measure(problems=["mnist"]), ValueError, "problem.* must be .* 'mnist'"),
    "an unknown algorithm": (lambda: error_vs_rho.measure(quick=True, problems=["quadratic"], algorithms=["Adam"]), ValueError, "algorithm.* must be .* 'Adam'"),
    "no problems": (lambda: error_vs_rho.measure(problems=[]), ValueError, "problem"),
    "an experiment at negative eta": (lambda: error_vs_rho.measure(quick=True, problems=["quadratic"], eta=-.1), ValueError, "eta must be positive and finite, got -0.1"),
    "an experiment at a long eta": (lambda: error_vs_rho.measure(quick=True, problems=["quadratic"], eta=9.), ValueError, "eta must be at most the time of a run, .* got 9"),
    "an experiment at negative rho": (lambda: error_vs_rho.measure(quick=True, problems=["quadratic"], rhos=[-1.]), ValueError, "rho must be non-negative and finite, got -1.0"),
    "an experiment without rho": (lambda: error_vs_rho.measure(quick=True, problems=["quadratic"], rhos=[]), ValueError, r"rhos must be different radii, at least one, got \[\]"),
    "an experiment of one run": (lambda: error_vs_rho.measure(quick=True, problems=["quadratic"], runs=1), ValueError, "runs must be at least 3, got 1"),
    "an experiment with a negative seed": (lambda: error_vs_rho.measure(quick=True, problems=["quadratic"], seed=-1), ValueError, "seed must be at least 0, got -1"),
    "saddles with a negative seed": (lambda: saddles.measure(quick=True, seed=-1), ValueError, "seed must be at least 0, got -1"),
    "scaling with a negative seed": (lambda: scaling.measure(quick=True, seed=-1), ValueError, "seed must be at least 0, got -1"),
    "levels with a negative seed": (lambda: levels.measure(quick=True, seed=-1), ValueError, "seed must be at least 0, got -1"),
    "flat minima with a negative seed": (lambda: flat_minima.measure(quick=True, seed=-1), ValueError, "seed must be at least 0, got -1"),
    "networks with a negative seed": (lambda: networks.measure(quick=True, seed=-1), ValueError, "seed must be at least 0, got -1"),
    "training in epochs of half a batch": (lambda: training.Task("half", torch.nn.Linear(3, 2), (A, A, A, A), 0., (.1,), 1, batch_size=2), ValueError, "batch_size must divide 3 samples, got 2"),
    "training with a negative seed": (lambda: training.measure(quick=True, seed=-1), ValueError, "seed must be at least 0, got -1"),
    "micro-batches with a negative seed": (lambda: micro_batches.measure(quick=True, seed=-1), ValueError, "seed must be at least 0, got -1"),
    "unknown data": (lambda: problems.classification("mnist"), ValueError, "data must be .* 'mnist'"),
    "a quadratic in 0 dimensions": (lambda: problems.quadratic(d=0), ValueError, r"square matrix .* \(0, 0\)"),
    "a problem with negative noise": (lambda: problems.teacher_student(sigma=-1), ValueError, "sigma must be non-negative and finite, got -1"),
    "a network without units": (lambda: problems.deep_linear(hidden=0), ValueError, "hidden must be at least 1, got 0"),
    "an experiment that is none": (lambda: cli.chosen(["nothing"]), ValueError, "NAME must be one of error_vs_rho, .* got 'nothing'"),
}

COMMANDS = { # words after `samsde` -> what it says, with exit status 2, or 1 where marked
    "": "arguments are required: command", "fly": "invalid choice: 'fly'", "reproduce nothing": "1: NAME must be one of .* got 'nothing'",
    "reproduce --seed -1": "seed must be a whole number of at least 0, got -1", "reproduce --seed x": "seed must be a whole number of at least 0, got x",
    "reproduce --device tpu0": "device must be one that torch sees here, such as cpu, got 'tpu0'", "reproduce --dtype float16": "invalid choice: 'float16'",
    "reproduce --problem mnist": "invalid choice: 'mnist'", "reproduce --algorithm Adam": "invalid choice: 'Adam'", "reproduce --eta 0": "eta must be positive and finite, got 0",
    "reproduce --eta nan": "eta must be positive and finite, got nan", "reproduce --eta x": "eta must be a number, got 'x'", "reproduce --rho .1 -1": "rho must be non-negative and finite, got -1",
    "reproduce --runs 2": "runs must be a whole number of at least 3, got 2", "reproduce --runs x": "runs must be a whole number of at least 3, got x",
    "reproduce scaling --eta .1": "1: scaling takes no --eta", "reproduce networks --runs 5": "1: networks takes no --runs", "reproduce saddles --problem quadratic": "1: saddles takes no --problem",
    "reproduce error_vs_rho nothing": "1: NAME must be one of", "reproduce --quick --out FILE": "1: .*FILE", "reproduce --quick --problem quadratic --eta 5": "1: eta must be at most the time of a run",
    "reproduce error_vs_rho scaling --quick --problem quadratic": "1: scaling takes no --problem",
}

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder in which the case runs, and where `run` keeps checkpoints"""
    monkeypatch.chdir(tmp_path)
    FOLDER[0] = tmp_path
    yield tmp_path
    FOLDER[0] = None

def empty(folder): return not any(p.is_file() for p in folder.rglob("*"))

@pytest.mark.parametrize("case", TABLE)
def test_bad_input(case, folder):
    call, error, message = TABLE[case]
    with pytest.raises(error, match=message): call()
    assert empty(folder)

@pytest.mark.parametrize("words", COMMANDS)
def test_bad_command(words, folder, capsys):
    message, taken = COMMANDS[words], folder.parent/"FILE"
    taken.write_text("")
    arguments = [str(taken) if word == "FILE" else word for word in words.split()]
    if message.startswith("1: "): assert cli.main(arguments) == 1
    else:
        with pytest.raises(SystemExit, match="2"): cli.main(arguments)
    assert re.search(message.removeprefix("1: "), capsys.readouterr().err) and empty(folder)

def test_at_least_a_hundred():
    """Distinct inputs, and distinct answers."""
    assert len(TABLE) + len(COMMANDS) >= 300 and len({message for _, _, message in TABLE.values()}) >= 200
    assert all(re.search("[a-z]", message) or "(" in message for _, _, message in TABLE.values())

def test_every_public_name_has_a_bad_input():
    """What the modules export is called by the tests of bad input, here or in a file of its own, or has nothing to refuse."""
    import importlib
    text, missing = "".join(p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("test_*.py")), []
    results = "Wrapped SecondMoments TaylorMoments FullSampleMoments FullAdditiveMoments FullExactMoments IndependentAdditiveMoments PreviousMoments ExactPreviousMoments MicroBatchMoments Model Potential StepMoments StationaryMoments GammaMoments ExactMoments MinibatchMoments SampleMoments LinearSampleMoments AdditiveMoments LinearAdditiveMoments UnitAdditiveMoments Unperturbed Process Support GaussianDirection Ensemble Attraction WeakOrder WeakError Diagnosis Objective Additive DivergenceError".split() # returned, or bases of what is in the tables
    fine = "theme use_theme Perturbed from_module expectation plot_validity parser own_options reproduce main".split() # tested through others, or with nothing to refuse
    for name in sorted(p.stem for p in Path(samsde.__file__).parent.glob("[a-z]*.py")):
        module = importlib.import_module(f"samsde.{name}")
        for public in getattr(module, "__all__", []):
            if callable(getattr(module, public)) and public not in results + fine and not re.search(rf"\b{public}\(", text): missing.append(f"{name}.{public}")
    assert not missing

@pytest.mark.parametrize("harm", ["another run's", "cut short", "a pickle", "empty", "text"])
def test_a_file_that_is_no_checkpoint_of_this_run_stays(tmp_path, harm):
    """It is refused with words, and not a byte of it changes."""
    path = tmp_path/"run.npz"
    run(checkpoint=path, seed=1)
    whole = path.read_bytes()
    path.write_bytes({"another run's": whole, "cut short": whole[:len(whole) // 2], "a pickle": pickle.dumps({"final": 3}), "empty": b"", "text": b"hello"}[harm])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="belongs to a run with other settings" if harm == "another run's" else "is no file of samsde"): run(checkpoint=path, seed=2)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["run.npz"]

def test_good_input_beside_it():
    """The controls: the same calls with good values raise nothing."""
    for process in (Chain(SAM(.1), bowl, .1), SDE(SAM(.1), data(2), .1), Chain(DNSAM(.1), data(3, False), .1)): assert run(process).n_diverged == 0
    assert run(Chain(SAM(.1), network(), .01), x0=network().x0).final.dtype == torch.float64
    assert weak(n_paths=4).n_diverged == 0 and around() > 0 and len(map_of()) == 1 and look() is not None and measured_norm() > 0
    assert weak_order([.1, .2], [1., 2.]).slope > 0 and drift(USAM(.1), by_method(data(), "signs"), x).shape == (2,)
    stepped(optim.SAM), stepped(optim.DNSAM, full_grad_norm=lambda: 1.)
