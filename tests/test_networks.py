"""Networks and losses from the outside: every number against a plain loop, one sample at a time, or a refusal by name.

The loop is torch's own autograd without vmap, functional_call or a fused kernel. It knows nothing of how samsde finds its numbers.
SAMSDE_EXAMPLES=1000 draws that many random networks in place of 20; SAMSDE_FULL=1 compares all quantities for every number of paths.
"""
import contextlib
import copy
import math
import os
import pickle
import re
import threading
import warnings
from collections import OrderedDict, defaultdict
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, prune

from samsde.algorithm import DNSAM, SAM, SGD, USAM, Algorithm, Chain
from samsde.ensemble import simulate
from samsde.hessian_noise import cross_covariance
from samsde.implicit_regularizer import drift, regularized_loss
from samsde.machinery.coverage import BASES, LAYERS, LOSSES
from samsde.objective import FiniteSum, Quadratic
from samsde.sample_sums import square_norms
from samsde.sde import SDE

pytestmark = pytest.mark.filterwarnings("ignore")
F64 = torch.float64
RHO, ETA, DT = .3, .1, .05
KINDS = (USAM, DNSAM, SAM)
EXAMPLES = int(os.environ.get("SAMSDE_EXAMPLES", 20))
FULL = bool(os.environ.get("SAMSDE_FULL"))

# --- the plain loop ---


@contextlib.contextmanager
def plainly():
    """Gradients on, and attention by its formula"""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def trainable(net):
    return [p for _, p in net.named_parameters() if p.requires_grad]


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def write(net, x):
    """Put the flat point x into the parameters of net"""
    params = trainable(net)
    with torch.no_grad():
        for p, part in zip(params, x.split([p.numel() for p in params])):
            p.copy_(part.view(p.shape))


def derivative(value, params, graph=False):
    """Flat, and 0 where torch gives none"""
    if not value.requires_grad:
        return torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype)
    parts = torch.autograd.grad(value, params, create_graph=graph, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, params)]
    return torch.cat([g.to_dense().flatten() for g in parts])


class Plain:
    """f_i, ∇f_i and products with ∇²f_i at one point, by a loop over the samples"""

    def __init__(self, net, loss, X, y, x):
        write(net, x)
        self.params = trainable(net)
        self.live, values = [], []
        for i in range(len(X)):
            with plainly():
                value = loss(net(X[i:i + 1]), y[i:i + 1])
                self.live.append(derivative(value, self.params, graph=True))
            values.append(value.detach())
        self.f = torch.stack(values)
        self.g = torch.stack(self.live).detach()

    def hvp(self, i, v):
        with plainly():
            return derivative(self.live[i] @ v, self.params).detach()


def gradient_at(net, loss, X, y, x, rows):
    """The mean of ∇f_i over rows, at x"""
    write(net, x)
    with plainly():
        found = [derivative(loss(net(X[i:i + 1]), y[i:i + 1]), trainable(net)) for i in rows]
    return torch.stack(found).mean(0)


def factor(kind, g, full):
    """u = factor · g"""
    if kind is USAM:
        return 1.
    norm = (full if kind is DNSAM else g).norm().item()
    return 1 / norm if norm else 0.


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Setting:
    """Points near and far, minibatches, directions and noise, for n samples in d dimensions"""

    def __init__(self, n, x0):
        d = len(x0)
        scales = torch.tensor([.1, 1., .3, 1., .1], dtype=F64)[:, None]
        self.n, self.points = n, x0.double() + scales * normal(3, 5, d)
        self.one = torch.randint(n, (5, 1), generator=torch.Generator().manual_seed(4))
        self.two = torch.randint(n, (5, 2), generator=torch.Generator().manual_seed(5))
        self.v, self.w, self.xi = normal(6, 5, d), normal(7, 5, n), normal(8, 5, n)
        self.xi_of_pairs = normal(9, 5, n * n)


def truth(make, loss, X, y, s):
    """What the loop says: name -> a value for each point. Algorithms at the first three points alone."""
    out, n, scratch = defaultdict(list), s.n, make()
    for k, x in enumerate(s.points):
        at = Plain(make(), loss, X, y, x)
        g, full = at.g, at.g.mean(0)
        Hv = torch.stack([at.hvp(i, s.v[k]) for i in range(n)])
        out["loss"].append(at.f.mean())
        out["gradient"].append(full)
        out["norms"].append(g.square().sum(1))
        out["sample gradient, B=1"].append(g[s.one[k]].mean(0))
        out["sample gradient, B=2"].append(g[s.two[k]].mean(0))
        out["sample product"].append(Hv[s.two[k]].mean(0))
        out["weighted product"].append(s.w[k] @ Hv)
        if k > 2 and not FULL:
            continue
        products = torch.stack([torch.stack([at.hvp(i, g[j]) for j in range(n)]) for i in range(n)])
        for kind in KINDS:
            for name, value in of_algorithm(kind, scratch, loss, X, y, x, k, s, g, products).items():
                out[f"{name}, {kind.__name__}"].append(value)
    return {name: torch.stack(values) for name, values in out.items()}


def of_algorithm(kind, net, loss, X, y, x, k, s, g, products):
    """Drifts and steps of one algorithm at one point; products[i, j] = H_i g_j"""
    n, full, pushed, exact, pairs = s.n, g.mean(0), [], [], []
    for i in range(n):
        c = factor(kind, g[i], full)
        pushed.append(g[i] + RHO * c * products[i, i])
        exact.append(gradient_at(net, loss, X, y, x + RHO * c * g[i], [i]))
        for j in range(n):
            mean = (g[i] + g[j]) / 2
            Hg = (products[i, i] + products[i, j] + products[j, i] + products[j, j]) / 4
            pairs.append(mean + RHO * factor(kind, mean, full) * Hg)
    pushed = torch.stack(pushed)
    mean = g[s.two[k]].mean(0)
    up = x + RHO * factor(kind, mean, full) * mean
    weights = noise_weights(s.xi[k])
    if kind is SAM: # the noise of its minibatches
        both = noise_weights(s.xi_of_pairs[k]) @ torch.stack(pairs)
    else: # Eq. (2) of the notebook on noise, for B = 2
        cross = (products.mean(0) + products.mean(1)) / 2 # H̄ g_i and H_i ḡ
        own = products.diagonal().T / 2
        columns = g + RHO * factor(kind, full, full) * (own + cross)
        both = (weights - DT / n) / 2**.5 @ columns + DT * torch.stack(pairs).mean(0)
    return {"drift, B=2": -torch.stack(pairs).mean(0),
            "exact drift, B=1": -torch.stack(exact).mean(0),
            "step of the chain, B=2": x - ETA * gradient_at(net, loss, X, y, up, s.two[k].tolist()),
            "step of the SDE, B=1": x - weights @ pushed,
            "step of the SDE, B=2": x - both}


def noise_weights(xi):
    """dt/K + √(η dt/K) (ξ − ξ̄)"""
    return DT / len(xi) + (ETA * DT / len(xi))**.5 * (xi - xi.mean())


# --- what samsde says, and where it differs ---


def quantities(single, pair, s, rows):
    """name -> a function of nothing, at the points `rows`; `single` has B = 1 and `pair` B = 2"""
    x, v, w, xi, xi_of_pairs = (t[rows].to(single.x0.dtype) for t in (s.points, s.v, s.w, s.xi, s.xi_of_pairs))
    one, two = s.one[rows], s.two[rows]
    yield "loss", lambda: single.loss(x)
    yield "gradient", lambda: single.grad(x)
    yield "norms", lambda: square_norms(single, x)
    yield "sample gradient, B=1", lambda: single.sample_grad(x, one)
    yield "sample gradient, B=2", lambda: pair.sample_grad(x, two)
    yield "sample product", lambda: pair.sample_hvp(x, two, v)
    yield "weighted product", lambda: single.weighted_hvp(x, w, v)
    if rows != slice(3) and not FULL:
        return
    for kind in KINDS:
        a, name = kind(RHO), kind.__name__
        yield f"drift, B=2, {name}", lambda: drift(a, pair, x)
        yield f"exact drift, B=1, {name}", lambda: drift(a, single, x, "exact")
        yield f"step of the chain, B=2, {name}", lambda: Chain(a, pair, ETA).step(x, two)
        noise = xi_of_pairs if kind is SAM else xi
        yield f"step of the SDE, B=1, {name}", lambda: SDE(a, single, ETA).step(x, xi, DT)
        yield f"step of the SDE, B=2, {name}", lambda: SDE(a, pair, ETA).step(x, noise, DT)


PATHS = {"one path": 0, "one path far off": 1, "three paths": slice(3), "as many paths as samples": slice(5)}


def differences(single, pair, s, known, rtol=1e-6, atol=1e-9):
    """Sentences, one for each number that differs from the loop's, or cannot be had"""
    wrong = []
    for paths, rows in PATHS.items():
        for name, value in quantities(single, pair, s, rows):
            want = known[name][rows]
            if "DNSAM" in name and not known["gradient"][rows].norm(dim=-1).all():
                continue # has no value where the gradient is zero
            try:
                got = value().double()
            except Exception as error:
                wrong.append(f"{name}, {paths}: {type(error).__name__}: {str(error)[:150]}")
                continue
            if got.shape != want.shape:
                wrong.append(f"{name}, {paths}: shape {tuple(got.shape)}, the loop {tuple(want.shape)}")
            elif not torch.allclose(got, want, rtol=rtol, atol=atol * max(1, want.abs().max())):
                gap = (got - want).norm() / want.norm()
                at = (got - want).abs().nan_to_num(torch.inf).argmax()
                wrong.append(f"{name}, {paths}: {got.flatten()[at]:.6g}, the loop {want.flatten()[at]:.6g} "
                             f"(relative error {gap:.2g})")
    return wrong


def made(make, loss, X, y, **settings):
    """The objective, or the words that refuse it"""
    try:
        return FiniteSum.from_module(make(), loss, X, y, **settings)
    except (ValueError, TypeError) as error:
        return str(error)


def judged(make, loss, X, y, rtol=1e-6, atol=1e-9, **settings):
    """(words, []) if refused; ("", sentences) if not: right where there are none"""
    single = made(make, loss, X, y, **settings)
    if isinstance(single, str):
        return single, []
    pair = made(make, loss, X, y, batch_size=2, **settings)
    x0 = flat(trainable(make()))
    assert single.x0.equal(x0), "x0 is not the trainable parameters, in their order"
    s = Setting(len(X), x0)
    try:
        known = truth(make, loss, X, y, s)
    except RuntimeError as error:
        return "", [f"accepted, though the loop has no second derivative: {str(error)[:100]}"]
    return "", differences(single, pair, s, known, rtol, atol)


def loop_does_it(make, loss, X, y):
    """Has the plain loop a second derivative?"""
    try:
        truth(make, loss, X, y, Setting(len(X), flat(trainable(make()))))
        return True
    except RuntimeError:
        return False


def told(wrong):
    return "\n".join([*wrong[:6], f"and {len(wrong) - 6} more"] if len(wrong) > 6 else wrong)


def assert_right(make, loss, X, y, name=None, **settings):
    """Right; or refused, if the loop itself has no second derivative"""
    words, wrong = judged(make, loss, X, y, **settings)
    if words:
        assert not loop_does_it(make, loss, X, y), f"refused, though the loop does it: {words}"
        assert_refused(words, name=name)
    assert not wrong, told(wrong)


# reasons that a reader understands without knowing the library
PLAIN = (r"mixes|depend on the other samples|random|second derivative|differentiated twice|training mode|tuple|dict|complex"
         r"|one dtype|scalar|buffer|no gradient|trainable|max_norm|sparse|frequency|first axis|forward|changes its"
         r"|mean of the losses|not its mean|weights|ignored|a sum")


def assert_refused(words, pattern=PLAIN, name=None):
    assert words, "accepted"
    assert re.search(pattern, words, re.I) or (name and name in words), f"refused in other words: {words}"
    assert "vmap" not in words and "functorch" not in words, f"words of the implementation: {words}"


def assert_right_or_refused(make, loss, X, y, pattern=PLAIN, name=None, **settings):
    words, wrong = judged(make, loss, X, y, **settings)
    if words:
        assert_refused(words, pattern, name)
    assert not wrong, told(wrong)


# --- every class of torch.nn ---


def classes():
    return {name for name, cls in nn.__dict__.items() if isinstance(cls, type) and issubclass(cls, nn.Module)}


def test_table_has_every_class_of_torch():
    """A new version may add one: give it a row in nbs/machinery/coverage.ipynb"""
    table = {row.cls for row in LAYERS} | {row.cls for row in LOSSES} | {*BASES}
    assert not classes() - table


@pytest.mark.parametrize("row", LAYERS, ids=lambda row: row.name)
def test_layer(row):
    X, y = row.data()
    if row.refused:
        assert_right_or_refused(row.network, nn.MSELoss(), X, y, name=row.cls)
    else:
        assert_right(row.network, nn.MSELoss(), X, y, name=row.cls)


@pytest.mark.parametrize("cls", BASES)
def test_base_class_has_no_forward_pass(cls):
    arguments = {"RNNBase": ("LSTM", 3, 2), "RNNCellBase": (3, 2, True, 4)}.get(cls, ())

    def make():
        base = getattr(nn, cls)(*arguments)
        base.extra = nn.Linear(3, 1)
        return base.double()
    words = made(make, nn.MSELoss(), normal(1, 5, 3), normal(2, 5, 1))
    assert isinstance(words, str)
    assert_refused(words, name=cls)


# --- losses ---

KIND_OF_LOSS = {"weights": "weight|ignor", "sum": r"\bsum", "mixes": "mix|other samples", "smooth": PLAIN + "|CTCLoss|loss"}


def batch_gap(row):
    """How far the loss of a minibatch is from the mean of its samples' losses, over minibatches of every size"""
    (X, y), net, gap = row.data(), row.network(), 0.
    write(net, flat(trainable(net)) + normal(9, sum(p.numel() for p in trainable(net))))
    for size in range(1, len(X) + 1):
        rows = torch.randint(len(X), (size,), generator=torch.Generator().manual_seed(size))
        single = torch.stack([row.loss(net(X[i:i + 1]), y[i:i + 1]) for i in rows]).mean()
        off = (row.loss(net(X[rows]), y[rows]) - single).abs() / (single.abs() + 1e-6)
        gap = max(gap, off.nan_to_num(torch.inf).item())
    return gap


@pytest.mark.parametrize("row", LOSSES, ids=lambda row: row.name)
def test_loss(row):
    X, y = row.data()
    assert (batch_gap(row) < 1e-9) == (row.refused in ("", "smooth")), "the table is wrong"
    if not row.refused:
        assert_right(row.network, row.loss, X, y)
    else:
        words, wrong = judged(row.network, row.loss, X, y)
        assert words, f"accepted, and off by {batch_gap(row):.2g} as a loss of batches: {wrong[:2]}"
        assert_refused(words, KIND_OF_LOSS[row.refused])
