"""Bad input gets a ValueError or TypeError that says what was given and what is expected: one table."""
import pytest
import torch

from samsde.algorithm import DNSAM, SAM, SGD, USAM, Algorithm, Chain
from samsde.ensemble import simulate
from samsde.hessian_noise import cross_covariance, noise_covariance, noise_sample
from samsde.implicit_regularizer import drift, gaussian_direction, regularized_loss
from samsde.objective import FiniteSum, NoisyLoss, Quadratic
from samsde.sde import SDE

f64 = dict(dtype=torch.float64)
eye, nan = torch.eye(2, **f64), float("nan")
bowl, x = Quadratic(eye, sigma=.1), torch.ones(2, **f64)
A = torch.tensor([[1., 2.], [3., 4.], [5., 6.]], **f64)
def data(batch_size=1, replace=True, n=3): return FiniteSum(lambda x: (A @ x)**2, n, 2, batch_size, replace)
def network(module=None, X=A, y=A[:, 0], loss=torch.nn.MSELoss()):
    return FiniteSum.from_module(torch.nn.Linear(2, 1).double() if module is None else module, loss, X, y[:, None])
def run(process=None, x0=x, t_end=1., n_paths=4, **how): return simulate(process or Chain(SAM(.1), bowl, .1), x0, t_end, n_paths, **how)
class NoWay(Algorithm): pass

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
    "float32 network, float64 data": (lambda: network(torch.nn.Linear(2, 1)), TypeError, "must share one dtype"),
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
    "unknown expansion": (lambda: SDE(SAM(.1), bowl, .1, expansion="second"), ValueError, "expansion must be 'first' or 'exact', got 'second'"),
    "unknown noise": (lambda: SDE(SAM(.1), bowl, .1, noise="full"), ValueError, "one of factor, truncated, exact, sgd, none, got 'full'"),
    "order 2 of the first expansion": (lambda: SDE(SAM(.1), bowl, .1, order=2), ValueError, "order=2 needs expansion='exact', got 'first'"),
    "truncated and indefinite": (lambda: noise_covariance(USAM(9.), data(), torch.ones(2, **f64) / 9, "truncated"), ValueError, "got an eigenvalue of -"),
    "xi of the wrong length": (lambda: noise_sample(SAM(.1), bowl, x, torch.ones(3, **f64)), ValueError, r"xi must have shape \(..., 2\), got \(3,\)"),
    "too few draws": (lambda: cross_covariance(SAM(.1), data(2), x, draws=3), ValueError, "draws must be at least 4, got 3"),
    "noise of a negative size": (lambda: gaussian_direction(x, -1.), ValueError, "sigma must be non-negative"),
    "one path": (lambda: run(n_paths=1), ValueError, "n_paths must be at least 2, got 1"),
    "every 0": (lambda: run(every=0), ValueError, "every must be at least 1, got 0"),
    "chunk of 0": (lambda: run(chunk=0), ValueError, "chunk must be at least 1, got 0"),
    "several eta in one run": (lambda: run(Chain(SGD(), bowl, torch.tensor([.1, .2]))), ValueError, "different eta share no time grid"),
    "negative seed": (lambda: run(seed=-1), ValueError, "seed must be at least 0, got -1"),
    "algorithm for a process": (lambda: run(SAM(.1)), TypeError, "process must be a Chain, an SDE, or alike, got SAM without 'eta'"),
    "observable that is a number": (lambda: run(observe={"m": 3.}), TypeError, "observable 'm' must be a function of points, got float"),
    "observable that mixes paths": (lambda: run(observe={"m": lambda x: x.mean()}), ValueError, r"observable 'm' must keep the leading axes \(4,\), got shape \(\)"),
}

@pytest.mark.parametrize("case", TABLE)
def test_bad_input(case):
    call, error, message = TABLE[case]
    with pytest.raises(error, match=message): call()

def test_good_input_beside_it():
    """The controls: the same calls with good values raise nothing."""
    for process in (Chain(SAM(.1), bowl, .1), SDE(SAM(.1), data(2), .1), Chain(DNSAM(.1), data(3, False), .1)): assert run(process).n_diverged == 0
    assert run(Chain(SAM(.1), network(), .01), x0=network().x0).final.dtype == torch.float64
