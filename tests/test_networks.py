"""Networks and losses from the outside: every number is a plain loop's, or refused by name.

The loop takes one sample at a time, with torch's own autograd: no vmap, no functional_call, no
fused kernel. It knows nothing of how samsde finds its numbers. With SAMSDE_EXAMPLES=1000 that many
random networks are drawn in place of 20; with SAMSDE_FULL=1 all quantities are compared for every
number of paths.
"""

import contextlib
import copy
import os
import pickle
import re
import threading
from collections import OrderedDict, defaultdict
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune

from samsde.algorithm import DNSAM, SAM, SGD, USAM, Chain
from samsde.ensemble import simulate
from samsde.hessian_noise import cross_covariance
from samsde.implicit_regularizer import drift, regularized_loss
from samsde.machinery.coverage import BASES, LAYERS, LOSSES
from samsde.machinery.paths import WRONG_TWICE, Rewritten
from samsde.objective import FiniteSum, Quadratic
from samsde.sample_sums import square_norms
from samsde.sde import SDE

pytestmark = pytest.mark.filterwarnings("ignore")
F64 = torch.float64
RHO, ETA, DT = 0.3, 0.1, 0.05
KINDS = (USAM, DNSAM, SAM)
EXAMPLES = int(os.environ.get("SAMSDE_EXAMPLES", 8))
FULL = bool(os.environ.get("SAMSDE_FULL"))

# --- the plain loop ---


@contextlib.contextmanager
def plainly():
    """Gradients on, and attention and weight norms by their formulas (see test_fields.py)"""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        formulas = Rewritten(WRONG_TWICE)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), formulas:
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
    parts = torch.autograd.grad(
        value, params, create_graph=graph, retain_graph=True, allow_unused=True
    )
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
                value = loss(net(X[i : i + 1]), y[i : i + 1])
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
        found = [derivative(loss(net(X[i : i + 1]), y[i : i + 1]), trainable(net)) for i in rows]
    return torch.stack(found).mean(0)


def factor(kind, g, full):
    """u = factor · g"""
    if kind is USAM:
        return 1.0
    norm = (full if kind is DNSAM else g).norm().item()
    return 1 / norm if norm else 0.0


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Setting:
    """Points near and far, minibatches, directions and noise, for n samples in d dimensions"""

    def __init__(self, n, x0):
        d = len(x0)
        scales = torch.tensor([0.1, 1.0, 0.3, 1.0, 0.1], dtype=F64)[:, None]
        self.n, self.points = n, x0.double() + scales * normal(3, 5, d)
        self.one = torch.randint(n, (5, 1), generator=torch.Generator().manual_seed(4))
        self.two = torch.randint(n, (5, 2), generator=torch.Generator().manual_seed(5))
        self.v, self.w, self.xi = normal(6, 5, d), normal(7, 5, n), normal(8, 5, n)
        self.xi_of_pairs = normal(9, 5, n * n)


def truth(make, loss, X, y, s):
    """What the loop says: name -> a value for each point; of algorithms, at the first three"""
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
            for name, value in of_algorithm(
                kind, scratch, loss, X, y, x, k, s, g, products
            ).items():
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
    if kind is SAM:  # the noise of its minibatches
        both = noise_weights(s.xi_of_pairs[k]) @ torch.stack(pairs)
    else:  # Eq. (2d.5), for B = 2
        cross = (products.mean(0) + products.mean(1)) / 2  # H̄ g_i and H_i ḡ
        own = products.diagonal().T / 2
        columns = g + RHO * factor(kind, full, full) * (own + cross)
        both = (weights - DT / n) / 2**0.5 @ columns + DT * torch.stack(pairs).mean(0)
    return {
        "drift, B=2": -torch.stack(pairs).mean(0),
        "exact drift, B=1": -torch.stack(exact).mean(0),
        "step of the chain, B=2": x - ETA * gradient_at(net, loss, X, y, up, s.two[k].tolist()),
        "step of the SDE, B=1": x - weights @ pushed,
        "step of the SDE, B=2": x - both,
    }


def noise_weights(xi):
    """dt/K + √(η dt/K) (ξ − ξ̄)"""
    return DT / len(xi) + (ETA * DT / len(xi)) ** 0.5 * (xi - xi.mean())


# --- what samsde says, and where it differs ---


def quantities(single, pair, s, rows):
    """name -> a function of nothing, at the points `rows`; `single` has B = 1 and `pair` B = 2"""
    x, v, w, xi, xi_of_pairs = (
        t[rows].to(single.x0.dtype) for t in (s.points, s.v, s.w, s.xi, s.xi_of_pairs)
    )
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
        yield f"step of the SDE, B=1, {name}", lambda: step(SDE(a, single, ETA), x, xi)
        yield f"step of the SDE, B=2, {name}", lambda: step(SDE(a, pair, ETA), x, noise)


def step(sde, x, xi):
    """One sample alone has no noise, and the length of xi does not matter"""
    return sde.step(x, xi.expand(*xi.shape[:-1], sde.noise_dim) if xi.shape[-1] == 1 else xi, DT)


PATHS = {
    "one path": 0,
    "one path far off": 1,
    "three paths": slice(3),
    "as many paths as samples": slice(5),
}


def differences(single, pair, s, known, rtol=1e-6, atol=1e-9, rounding=None):
    """Sentences, one for each number that differs from the loop's, or cannot be had

    rounding: name -> how far the loop itself may be off, at each point
    """
    wrong = []
    for paths, rows in PATHS.items():
        for name, value in quantities(single, pair, s, rows):
            want = known[name][rows]
            if "DNSAM" in name and not known["gradient"][rows].norm(dim=-1).all():
                continue  # has no value where the gradient is zero
            try:
                got = value().double()
            except Exception as error:
                wrong.append(f"{name}, {paths}: {type(error).__name__}: {str(error)[:150]}")
                continue
            if got.shape != want.shape:
                wrong.append(
                    f"{name}, {paths}: shape {tuple(got.shape)}, the loop {tuple(want.shape)}"
                )
                continue
            allowed = atol * max(1, want.abs().max()) + rtol * want.abs()
            if rounding is not None:
                allowed = allowed + rounding[name][rows]
            if not ((got - want).abs() <= allowed).all():
                gap = (got - want).norm() / want.norm()
                at = (got - want).abs().nan_to_num(torch.inf).argmax()
                wrong.append(
                    f"{name}, {paths}: {got.flatten()[at]:.6g}, the loop {want.flatten()[at]:.6g} "
                    f"(relative error {gap:.2g})"
                )
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
    pair = single.with_batch(2)
    x0 = flat(trainable(make()))
    assert single.x0.equal(x0), "x0 is not the trainable parameters, in their order"
    s = Setting(len(X), x0)
    try:
        known = truth(make, loss, X, y, s)
    except RuntimeError as error:
        return "", [f"accepted, though the loop has no second derivative: {str(error)[:100]}"]
    wrong = differences(single, pair, s, known, rtol, atol)
    if wrong:
        off = rounding_of_the_loop(make, loss, X, y, s, known)
        wrong = differences(single, pair, s, known, rtol, atol, off)
    return "", wrong


def rounding_of_the_loop(make, loss, X, y, s, known, moves=3):
    """name -> ten times the largest change of the loop where its points move by a rounding"""
    change = {name: torch.zeros_like(value) for name, value in known.items()}
    for seed in range(moves):
        moved = copy.copy(s)
        moved.points = s.points * (1 + torch.finfo(F64).eps * normal(90 + seed, *s.points.shape))
        for name, value in truth(make, loss, X, y, moved).items():
            gap = (value - known[name]).abs()
            largest = gap.amax(-1, keepdim=True) if gap.ndim > 1 else gap
            change[name] = change[name].maximum(10 * largest)
    return change


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
PLAIN = (
    r"mixes|depend on the other samples|random|second derivative|differentiated twice|training mode"
    r"|tuple|dict|complex|one dtype|scalar|buffer|no gradient|trainable|max_norm|sparse|frequency"
    r"|first axis|forward|changes its|mean of the losses|not its mean|weights|ignored|a sum"
)


def assert_refused(words, pattern=PLAIN, name=None):
    assert isinstance(words, str) and words, "accepted"
    assert re.search(pattern, words, re.I) or (name and name in words), (
        f"refused in other words: {words}"
    )


def assert_right_or_refused(make, loss, X, y, pattern=PLAIN, name=None, **settings):
    words, wrong = judged(make, loss, X, y, **settings)
    if words:
        assert_refused(words, pattern, name)
    assert not wrong, told(wrong)


# --- the judge itself ---


def mixed_network():
    """Layers that were wrong once, and an activation that is bent, on words"""
    return nn.Sequential(
        nn.Embedding(7, 2, padding_idx=0),
        nn.Flatten(),
        nn.Linear(8, 4),
        nn.LayerNorm(4),
        nn.PReLU(),
        nn.Linear(4, 3),
    )


def test_the_loop_by_finite_differences():
    """Its gradients are slopes of its losses, its products slopes of its gradients"""
    X, y = inputs("padded"), torch.arange(5) % 3
    make, loss, h = seeded(mixed_network), nn.CrossEntropyLoss(), 1e-6
    x = flat(trainable(make()))
    x, v = x + 0.3 * normal(3, len(x)), normal(4, len(x))
    v[:2] = 0  # the padding word is held fixed, whatever its slope
    up, down, at = (Plain(make(), loss, X, y, x + t * v) for t in (h, -h, 0))
    torch.testing.assert_close((up.f - down.f) / (2 * h), at.g @ v, rtol=1e-6, atol=1e-8)
    products = torch.stack([at.hvp(i, v) for i in range(5)])
    torch.testing.assert_close((up.g - down.g) / (2 * h), products, rtol=1e-6, atol=1e-7)
    assert not at.g[:, :2].any() and not products[:, :2].any() and (X == 0).any()


def test_the_judge_sees_a_wrong_number():
    """Every quantity is told from that of a loss that is 1 % larger"""
    X, y, loss = inputs("real"), normal(2, 5, 3), nn.MSELoss()
    single, pair = (made(classifier, loss, X, y, batch_size=size) for size in (1, 2))
    s = Setting(5, single.x0)
    assert not differences(single, pair, s, truth(classifier, loss, X, y, s))
    larger = truth(classifier, lambda out, y: 1.01 * loss(out, y), X, y, s)
    seen = {sentence.split(": ")[0] for sentence in differences(single, pair, s, larger)}
    for paths, rows in PATHS.items():
        assert seen >= {f"{name}, {paths}" for name, _ in quantities(single, pair, s, rows)}


def test_rounding_excuses_a_number_that_the_loop_does_not_know_itself():
    """Four layers that multiply: far off, the loop's exact drift changes with the last bit of x"""
    net = seeded(random_network, False, BENT, seed=19)
    X, y, loss = inputs("real"), torch.arange(5) % 3, RANDOM_LOSSES["smoothed"][0]
    s = Setting(5, flat(trainable(net())))
    known = truth(net, loss, X, y, s)
    off = rounding_of_the_loop(net, loss, X, y, s, known)
    relative = {name: off[name] / known[name].norm(dim=-1, keepdim=True) for name in off}
    near, far = relative["exact drift, B=1, USAM"][[0, 1]]
    assert near.max() < 1e-12 and far.max() > 0.1
    assert relative["sample product"].max() < 1e-11  # nothing else is excused


# --- every class of torch.nn ---


def classes():
    return {
        name
        for name, cls in nn.__dict__.items()
        if isinstance(cls, type) and issubclass(cls, nn.Module)
    }


def test_table_has_every_class_of_torch():
    """A new version may add one: give it a row in nbs/machinery/coverage.ipynb"""
    table = {row.cls for row in LAYERS} | {row.cls for row in LOSSES} | {*BASES}
    assert not classes() - table


@pytest.mark.parametrize("row", LAYERS, ids=lambda row: row.name)
def test_layer(row):
    if not hasattr(nn, row.cls):
        pytest.skip(f"this torch has no {row.cls}")
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

KIND_OF_LOSS = {
    "weights": "weight|ignor",
    "sum": r"\bsum",
    "mixes": "mix|other samples",
    "smooth": PLAIN + "|CTCLoss|loss",
}


def batch_gap(row):
    """How far a minibatch's loss is from the mean of its samples', over all sizes"""
    (X, y), net, gap = row.data(), row.network(), 0.0
    write(net, flat(trainable(net)) + normal(9, sum(p.numel() for p in trainable(net))))
    for size in range(1, len(X) + 1):
        rows = torch.randint(len(X), (size,), generator=torch.Generator().manual_seed(size))
        single = torch.stack([row.loss(net(X[i : i + 1]), y[i : i + 1]) for i in rows]).mean()
        off = (row.loss(net(X[rows]), y[rows]) - single).abs() / (single.abs() + 1e-6)
        gap = max(gap, off.nan_to_num(torch.inf).item())
    return gap


@pytest.mark.parametrize("row", LOSSES, ids=lambda row: row.name)
def test_loss(row):
    if row.cls and not hasattr(nn, row.cls):
        pytest.skip(f"this torch has no {row.cls}")
    X, y = row.data()
    assert (batch_gap(row) < 1e-9) == (row.refused in ("", "smooth")), "the table is wrong"
    if not row.refused:
        assert_right(row.network, row.loss, X, y)
    else:
        words, wrong = judged(row.network, row.loss, X, y)
        assert words, f"accepted, and off by {batch_gap(row):.2g} as a loss of batches: {wrong[:2]}"
        assert_refused(words, KIND_OF_LOSS[row.refused])


def few(labels, loss, X=None, make=None):
    """words or what is wrong, for a small classifier of X"""
    X = normal(1, len(labels), 3) if X is None else X
    return judged(make or classifier, loss, X, torch.tensor(labels))


def seeded(build, *args, dtype=F64, train=False, seed=0):
    """A function that makes the same network each time"""

    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(*args).to(dtype).train(train)

    return make


def small_classifier():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


classifier = seeded(small_classifier)


def flat_start():
    """At x0 all logits are 0, so that weighted and plain means agree"""
    net = small_classifier()
    nn.init.zeros_(net[2].weight)
    nn.init.zeros_(net[2].bias)
    return net


HEAVY = torch.tensor([1.0, 3.0, 8.0], dtype=F64)


def test_one_sample_alone_is_its_mean():
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(HEAVY)):
        words, wrong = few([2], loss)
        assert not wrong and (not words or re.search("weight", words)), (words, told(wrong))
    assert not few([2], nn.CrossEntropyLoss())[0]


def test_samples_that_occur_twice():
    X = normal(1, 3, 3)[[0, 1, 0, 0, 2]]
    assert few([0, 1, 0, 0, 2], nn.CrossEntropyLoss(), X) == ("", [])


def test_equal_classes():
    """The weighted mean is the mean then: right, or refused since weights are there"""
    words, wrong = few([1, 1, 1, 1, 1], nn.CrossEntropyLoss(HEAVY))
    assert not wrong and (not words or re.search("weight", words)), (words, told(wrong))
    assert few([1, 1, 1, 1, 1], nn.CrossEntropyLoss()) == ("", [])


def test_weights_that_cannot_be_seen_at_the_start():
    make = seeded(flat_start)
    X, y = normal(1, 5, 3), torch.tensor([0, 1, 2, 0, 1])
    single = torch.stack(
        [nn.CrossEntropyLoss(HEAVY)(make()(X[i : i + 1]), y[i : i + 1]) for i in range(5)]
    )
    torch.testing.assert_close(
        single.mean(), nn.CrossEntropyLoss(HEAVY)(make()(X), y)
    )  # nothing to see in the values
    assert_refused(few([0, 1, 2, 0, 1], nn.CrossEntropyLoss(HEAVY), make=make)[0], "weight")
    assert few([0, 1, 2, 0, 1], nn.CrossEntropyLoss(), make=make) == ("", [])


def test_ignored_targets_of_the_last_samples_alone():
    labels = [0, 1, 2, 0, 1, 2, 0, -100]
    assert_refused(few(labels, nn.CrossEntropyLoss())[0], "ignor|weight|finite|NaN")
    assert few(labels[:-1], nn.CrossEntropyLoss()) == ("", [])


def test_weight_decay_in_the_loss():
    """It reads the parameters of the network given: they move with x, or it is refused"""

    def penalised(net):
        return lambda out, y: (
            F.mse_loss(out, y) + 0.1 * sum(p.square().sum() for p in net.parameters())
        )

    net, X, y = classifier(), normal(1, 5, 3), normal(2, 5, 3)
    objective = made(lambda: net, penalised(net), X, y)
    if isinstance(objective, str):
        return assert_refused(objective, PLAIN + "|parameters")
    x = objective.x0 + 0.1 * normal(3, objective.dim)
    moved = classifier()
    want = Plain(moved, penalised(moved), X, y, x).g.mean(0)
    torch.testing.assert_close(objective.grad(x), want)
    assert not torch.allclose(Plain(classifier(), nn.MSELoss(), X, y, x).g.mean(0), want, rtol=1e-3)


# --- layers used in other than the plain way ---


class Around(nn.Module):
    """A hidden layer, and whatever a function of the module makes of it"""

    def __init__(self, forward, width=4, out=1, **parts):
        super().__init__()
        self.hidden, self.last = nn.Linear(3, width), nn.Linear(width, out)
        for name, part in parts.items():
            setattr(self, name, part)
        self.way = forward

    def forward(self, x):
        return self.way(self, x)


class LoRA(nn.Linear):
    """A frozen layer plus a low-rank product that starts at 0"""

    def __init__(self, *sizes, frozen=True):
        super().__init__(*sizes)
        self.A, self.B = (
            nn.Parameter(torch.randn(2, sizes[0])),
            nn.Parameter(torch.zeros(sizes[1], 2)),
        )
        self.weight.requires_grad_(not frozen)

    def forward(self, x):
        return super().forward(x) + x @ self.A.T @ self.B.T


class OwnNorm(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x).tanh()


class OwnWords(nn.Embedding):
    def forward(self, i):
        return super().forward(i).cumsum(-2)


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


def one_layer(layer):
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 1))


def hooked(kind):
    net = one_layer(nn.Linear(3, 4))
    if kind == "output":
        net[0].register_forward_hook(lambda layer, args, out: out.sin() * 2)
    if kind == "input":
        net[0].register_forward_pre_hook(lambda layer, args: (args[0].cos(),))
    if kind == "gradient":
        net[0].register_full_backward_hook(lambda layer, given, out: (given[0],))
    return net


def pruned(kind):
    layer = nn.Linear(3, 4)
    if kind == "l1":
        prune.l1_unstructured(layer, "weight", 0.4)
    else:
        prune.custom_from_mask(layer, "weight", torch.arange(12).view(4, 3) % 2)
    return one_layer(layer)


def tied():
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1)
    )
    net[4].weight = net[2].weight
    return net


def twice():
    return Around(
        lambda m, x: m.last(m.again(m.again(m.hidden(x).tanh()).tanh())), again=nn.Linear(4, 4)
    )


def frozen():
    net = small_one()
    net[0].weight.requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return net


def small_one():
    return one_layer(nn.Linear(3, 4))


def unused():
    return Around(lambda m, x: m.last(m.hidden(x).tanh()), nothing=nn.Linear(2, 2))


def same_module_twice():
    layer = nn.Linear(4, 4)
    return Around(lambda m, x: m.last(m.a(m.b(m.hidden(x)).tanh())), a=layer, b=layer)


def outside(m, x):
    return m.last(m.hidden(x).tanh()) + (x @ m.hidden.weight.T).square().sum(1, True)


def outside_some_rows(m, x):
    extra = (x @ m.hidden.weight.T).square().sum(1, True)
    return m.last(m.hidden(x).tanh()) + torch.where(x[:, :1] > 0, extra, 0.0)


def outside_far_off(m, x):
    extra = (m.hidden.weight.square().sum() - 6.0).relu()
    return m.last(m.hidden(x).tanh()) + extra * x[:, :1]


def two_layers_by_sign(m, x):
    return m.last(torch.where(x[:, :1] > 0, m.hidden(x), m.other(x)).tanh())


def by_keyword(m, x):
    return m.last(input=m.hidden(input=x).tanh())


def squeezed(m, x):
    return m.last(m.hidden(x).tanh()).squeeze()


def attention(m, x):
    h = m.hidden(x).view(-1, 2, 2)
    return m.last(F.scaled_dot_product_attention(h, h.sin(), h.cos()).flatten(1))


def functional_norm(m, x):
    return m.last(F.layer_norm(m.hidden(x), (4,), m.w, m.b))


def functional_instance_norm(m, x):
    return m.last(
        F.instance_norm(m.hidden(x).view(-1, 2, 2), weight=m.w[:2], bias=m.b[:2]).flatten(1)
    )


def functional_prelu(m, x):
    return m.last(F.prelu(m.hidden(x), m.w))


def functional_words(m, x):
    return m.last(F.embedding(x, m.w, padding_idx=0).mean(1))


def norm_weights(**more):
    return dict(w=nn.Parameter(torch.rand(4) + 0.5), b=nn.Parameter(torch.randn(4)), **more)


def temperature(m, x):
    return m.last((m.hidden(x) * m.scale).tanh())


def through_checkpoint(m, x):
    return m.last(torch.utils.checkpoint.checkpoint(m.hidden, x, use_reentrant=False).tanh())


def with_own_function(m, x):
    return m.last(Tripled.apply(m.hidden(x)))


def buffered(m, x):
    return m.last(m.hidden(x) * m.mask)


def masked_buffer():
    net = Around(buffered)
    net.register_buffer("mask", torch.tensor([1.0, 0.0, 2.0, 1.0]), persistent=False)
    return net


def in_place(m, x):
    h = m.hidden(x)
    h[:, 0] *= 2
    h.mul_(1.5).add_(m.hidden.bias)
    return m.last(h.tanh())


def integers(m, x):
    return m.last(m.hidden(x.double()).tanh())


def mean_of_words(layer):
    return Around(lambda m, x: m.last(m.words(x).mean(1)), 3, words=layer)


def complex_one():
    net = Around(lambda m, x: (m.hidden(x).to(m.turn.dtype) @ m.turn).abs())
    net.turn = nn.Parameter(torch.randn(4, 1, dtype=torch.complex128))
    return net


PLAIN_USES = {
    "spectral_norm, old": (lambda: one_layer(nn.utils.spectral_norm(nn.Linear(3, 4))), "real"),
    "weight_norm": (lambda: one_layer(parametrizations.weight_norm(nn.Linear(3, 4))), "real"),
    "spectral_norm": (lambda: one_layer(parametrizations.spectral_norm(nn.Linear(3, 4))), "real"),
    "orthogonal": (lambda: one_layer(parametrizations.orthogonal(nn.Linear(3, 4))), "real"),
    "LoRA": (lambda: one_layer(LoRA(3, 4)), "real"),
    "LoRA on a trainable layer": (lambda: one_layer(LoRA(3, 4, frozen=False)), "real"),
    "tied weights": (tied, "real"),
    "a layer used twice": (twice, "real"),
    "a module under two names": (same_module_twice, "real"),
    "weight outside its layer": (lambda: Around(outside), "real"),
    "weight outside for the last rows": (lambda: Around(outside_some_rows), "sorted"),
    "weight outside far from x0": (lambda: Around(outside_far_off), "real"),
    "a layer for each sign": (lambda: Around(two_layers_by_sign, other=nn.Linear(3, 4)), "sorted"),
    "frozen parameters": (frozen, "real"),
    "unused parameters": (unused, "real"),
    "hook on the output": (lambda: hooked("output"), "real"),
    "hook on the input": (lambda: hooked("input"), "real"),
    "called by keyword": (lambda: Around(by_keyword), "real"),
    "attention in functions": (lambda: Around(attention), "real"),
    "layer_norm as a function": (lambda: Around(functional_norm, **norm_weights()), "real"),
    "instance_norm as a function": (
        lambda: Around(functional_instance_norm, **norm_weights()),
        "real",
    ),
    "prelu as a function": (lambda: Around(functional_prelu, **norm_weights()), "real"),
    "embedding as a function": (
        lambda: Around(functional_words, w=nn.Parameter(torch.randn(7, 4))),
        "words",
    ),
    "a subclass of LayerNorm": (
        lambda: Around(lambda m, x: m.last(m.norm(m.hidden(x))), norm=OwnNorm(4)),
        "real",
    ),
    "a subclass of Embedding": (lambda: mean_of_words(OwnWords(7, 3, padding_idx=0)), "padded"),
    "padding word": (lambda: mean_of_words(nn.Embedding(7, 3, padding_idx=0)), "padded"),
    "padding word, counted from the end": (
        lambda: mean_of_words(nn.Embedding(7, 3, padding_idx=-7)),
        "padded",
    ),
    "a parameter that is one number": (
        lambda: Around(temperature, scale=nn.Parameter(torch.tensor(0.7))),
        "real",
    ),
    "a buffer": (masked_buffer, "real"),
    "operations in place": (lambda: Around(in_place), "real"),
    "integers as inputs": (lambda: Around(integers), "counts"),
    "inputs with strides": (small_one, "strided"),
    "inputs that are all one": (small_one, "expanded"),
    "inputs with gradients": (small_one, "tracked"),
    **{
        f"Conv2d, {mode}, empty borders": (
            lambda mode=mode: nn.Sequential(
                nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode),
                nn.Tanh(),
                nn.Flatten(),
                nn.Linear(32, 1),
            ),
            "pictures",
        )
        for mode in ("reflect", "replicate", "circular")
    },
    **{
        f"Conv1d, {mode}, empty borders": (
            lambda mode=mode: nn.Sequential(
                nn.Flatten(2),
                nn.Conv1d(1, 2, 3, padding=1, padding_mode=mode),
                nn.Flatten(),
                nn.Linear(32, 1),
            ),
            "pictures",
        )
        for mode in ("reflect", "replicate", "circular")
    },
}


def inputs(kind, n=5):
    """Inputs by kind. The last row alone has what a check of the first four would miss."""
    x = normal(1, n, 3)
    if kind == "sorted":
        x[:-1, 0] = -x[:-1, 0].abs()
        x[-1, 0] = 1.0
    if kind == "words":
        return torch.randint(7, (n, 4), generator=torch.Generator().manual_seed(1))
    if kind == "padded":
        return torch.tensor([[1, 2, 3, 4], [5, 6, 1, 2], [3, 3, 5, 6], [4, 1, 2, 6], [1, 0, 0, 0]])[
            :n
        ]
    if kind == "counts":
        return torch.randint(-3, 4, (n, 3), generator=torch.Generator().manual_seed(1))
    if kind == "strided":
        return normal(1, 6, 2 * n).T[::2, ::2]
    if kind == "expanded":
        return x[:1].expand(n, 3)
    if kind == "tracked":
        return x.requires_grad_()
    if kind == "pictures":
        pictures = normal(1, n, 1, 4, 4)
        pictures[:-1, :, [0, -1]] = 0
        pictures[:-1, :, :, [0, -1]] = 0
        return pictures
    return x


@pytest.mark.parametrize("name", PLAIN_USES)
def test_use(name):
    build, kind = PLAIN_USES[name]
    assert_right(seeded(build), nn.MSELoss(), inputs(kind), normal(2, 5, 1))


# --- right or refused, as it comes ---


def control_flow(m, x):
    return m.last(m.hidden(x).tanh() if x.sum() > 0 else m.hidden(x).sin())


def mixes_far_off(m, x):
    h = m.hidden(x)
    return m.last(h) + (h.mean(0) - 1.0).relu().square().sum()


def counted(m, x):
    m.calls += 1
    return m.last(m.hidden(x).tanh())


def counting(way):
    net = Around(way)
    net.register_buffer("calls", torch.zeros(()))
    return net


def logits(out, y):
    return F.mse_loss(
        (
            out["logits"]
            if isinstance(out, dict)
            else getattr(out, "logits", out[0] if isinstance(out, tuple) else out)
        ),
        y,
    )


EITHER = {
    "weight_norm, old": (lambda: one_layer(nn.utils.weight_norm(nn.Linear(3, 4))), "real"),
    "pruned by size": (lambda: pruned("l1"), "real"),
    "pruned by a mask": (lambda: pruned("mask"), "real"),
    "control flow by the data": (lambda: Around(control_flow), "real"),
    "samples mix far from x0": (lambda: Around(mixes_far_off), "real"),
    "a counter": (lambda: counting(counted), "real"),
    "squeezed outputs": (lambda: Around(squeezed), "real"),
    "hook on the gradient": (lambda: hooked("gradient"), "real"),
    "checkpointed": (lambda: Around(through_checkpoint), "real"),
    "an autograd function": (lambda: Around(with_own_function), "real"),
    "scripted": (lambda: torch.jit.script(small_one()), "real"),
}


@pytest.mark.parametrize("name", EITHER)
def test_right_or_refused(name):
    build, kind = EITHER[name]
    X = inputs(kind)
    y = normal(2, len(X)) if name == "squeezed outputs" else normal(2, len(X), 1)
    assert_right_or_refused(
        seeded(build),
        nn.MSELoss(),
        X,
        y,
        PLAIN + "|Around|hook|control flow|cannot be copied|torch.jit|deepcopy|[Jj]it|[Ss]cript",
    )


OUTPUTS = {
    "a tuple": lambda m, x: (m.last(m.hidden(x).tanh()), m.hidden(x)),
    "a dict": lambda m, x: OrderedDict(logits=m.last(m.hidden(x).tanh()), hidden=m.hidden(x)),
    "a dataclass": lambda m, x: Output(m.last(m.hidden(x).tanh()), m.hidden(x)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_are_no_tensor(name):
    """Refused by name; with a loss that reads them, right or refused"""
    make, X, y = seeded(Around, OUTPUTS[name]), inputs("real"), normal(2, 5, 1)
    assert_refused(made(make, nn.MSELoss(), X, y), "tuple|dict|Output|tensor")
    assert_right_or_refused(make, logits, X, y, "tuple|dict|Output|tensor")


# --- what has no sample losses, or none that stay ---


def accumulated(m, x):
    return m.last(m.hidden(x).tanh().cumsum(0))


def less_their_mean(m, x):
    h = m.hidden(x)
    return m.last(h - h.mean(0))


def with_the_next(m, x):
    h = m.hidden(x)
    return m.last(h + h.roll(-1, 0))


def over_their_number(m, x):
    return m.last(m.hidden(x).tanh()) / len(x)


def normed_as_batch(m, x):
    return m.last(F.batch_norm(m.hidden(x), None, None, training=True))


def with_noise(m, x):
    return m.last(m.hidden(x) + 0.1 * torch.randn_like(m.hidden(x)))


def dropped(m, x):
    return m.last(F.dropout(m.hidden(x), 0.5, training=True))


def moving(m, x):
    h = m.hidden(x)
    m.calls += 0.1
    return m.last(h * (1 + m.calls))


def moving_weight(m, x):
    with torch.no_grad():
        m.hidden.weight.mul_(1.1)
    return m.last(m.hidden(x))


def constant(m, x):
    return m.last(m.hidden(x)).detach()


def logarithm(m, x):
    return m.last(m.hidden(x)).log() - 20.0


REFUSED = {
    "cumulative sums over samples": (lambda: Around(accumulated), "mix|other samples"),
    "outputs less their mean": (lambda: Around(less_their_mean), "mix|other samples"),
    "each sample with the next": (lambda: Around(with_the_next), "mix|other samples"),
    "divided by their number": (lambda: Around(over_their_number), "mix|other samples|a sum|mean"),
    "batch_norm as a function": (
        lambda: Around(normed_as_batch),
        "mix|other samples|take the data|more than 1 value",
    ),
    "noise": (lambda: Around(with_noise), "random|one call to the next|differ"),
    "dropout as a function": (lambda: Around(dropped), "random|one call to the next|differ"),
    "a buffer that moves": (lambda: counting(moving), "buffer|one call to the next|calls|changes"),
    "a weight that moves": (
        lambda: Around(moving_weight),
        "one call to the next|weight|changes|in.?place",
    ),
    "complex parameters": (complex_one, "complex|real|one dtype"),
    "no gradient": (lambda: Around(constant), "gradient|depend"),
    "a loss that is NaN": (lambda: Around(logarithm), "finite|NaN"),
    "no trainable parameters": (lambda: small_one().requires_grad_(False), "trainable"),
    "lazy layer, never called": (lambda: nn.Sequential(nn.LazyLinear(1)), "Lazy|initiali[sz]ed"),
    "two dtypes": (lambda: one_layer(nn.Linear(3, 4)).to(torch.float32), "dtype"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    build, pattern = REFUSED[name]
    make = seeded(build)
    if name == "two dtypes":
        make = seeded(build, dtype=torch.float32)
    if name == "complex parameters":
        make = build
    assert_refused(made(make, nn.MSELoss(), inputs("real"), normal(2, 5, 1)), pattern)


TRAINING = {
    "BatchNorm1d": nn.BatchNorm1d(4),
    "Dropout": nn.Dropout(0.5),
    "RReLU": nn.RReLU(),
    "AlphaDropout": nn.AlphaDropout(0.5),
    "InstanceNorm1d": nn.InstanceNorm1d(2, track_running_stats=True),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_mode_with_a_layer_that_minds(name):
    def forward(m, x):
        h = m.hidden(x)
        return m.last(m.layer(h.view(-1, 2, 2) if name == "InstanceNorm1d" else h).flatten(1))

    make = seeded(lambda: Around(forward, layer=copy.deepcopy(TRAINING[name])), train=True)
    assert_refused(made(make, nn.MSELoss(), inputs("real"), normal(2, 5, 1)), PLAIN, name)


def test_training_mode_without_such_a_layer():
    make = seeded(
        lambda: one_layer(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Dropout(0.0))),
        train=True,
    )
    assert_right(make, nn.MSELoss(), inputs("real"), normal(2, 5, 1))


@pytest.mark.parametrize(
    "cls, arguments", [("RNN", (3, 2)), ("LSTM", (3, 2)), ("GRU", (3, 2)), ("LSTMCell", (3, 2))]
)
def test_recurrent_layer_whose_tuple_is_not_opened(cls, arguments):
    X = normal(1, 5, 3) if cls.endswith("Cell") else normal(1, 5, 4, 3)
    words = made(seeded(getattr(nn, cls), *arguments), nn.MSELoss(), X, normal(2, 5, 2))
    assert_refused(words, "tuple|" + cls)


def test_single_precision():
    """Within its precision of the loop in double precision, at the same point"""
    make, X, y = (
        seeded(
            lambda: one_layer(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))), dtype=torch.float32
        ),
        normal(1, 5, 3),
        normal(2, 5, 1),
    )
    single = FiniteSum.from_module(make(), nn.MSELoss(), X.float(), y.float())
    pair = FiniteSum.from_module(make(), nn.MSELoss(), X.float(), y.float(), batch_size=2)
    s = Setting(5, single.x0)
    s.points = s.points.float().double()
    known = truth(lambda: make().double(), nn.MSELoss(), X.float().double(), y.float().double(), s)
    wrong = differences(single, pair, s, known, rtol=1e-4, atol=1e-4)
    assert not wrong, told(wrong)
    assert single.grad(single.x0).dtype == torch.float32


@pytest.mark.parametrize("name", ["Embedding, padding", "LayerNorm", "PReLU", "Conv1d"])
def test_in_chunks(name):
    """Samples, times paths, a few at a time"""
    row = next(row for row in LAYERS if row.name == name)
    assert_right(row.network, nn.MSELoss(), *row.data(), chunk=3)


def without_extra(m, x):
    return m.last(m.hidden(x).tanh())


def without_mixing(m, x):
    return m.last(m.hidden(x))


@pytest.mark.parametrize(
    "way, plain", [(outside_far_off, without_extra), (mixes_far_off, without_mixing)]
)
def test_what_is_special_far_off_is_so(way, plain):
    """These networks are plain ones at x0, and others at some of the points"""
    X, nets = inputs("real"), [seeded(Around, forward)() for forward in (way, plain)]
    assert nets[0](X).equal(nets[1](X))
    gaps = []
    for x in Setting(5, flat(trainable(nets[0]))).points:
        for net in nets:
            write(net, x)
        gaps.append((nets[0](X) - nets[1](X)).abs().max().item())
    assert max(gaps) > 0.1


LONG = {
    "LayerNorm": "LayerNorm",
    "Embedding, padding": "Embedding, padding",
    "PReLU": "PReLU",
    "Conv2d": "Conv2d, reflect",
}


@pytest.mark.parametrize("name", LONG)
def test_after_many_calls(name):
    """A run calls a function thousands of times: the last call is as right as the first"""
    row = next(row for row in LAYERS if row.name == LONG[name])
    X, y = row.data()
    single, pair = (made(row.network, nn.MSELoss(), X, y, batch_size=size) for size in (1, 2))
    s = Setting(5, flat(trainable(row.network())))
    known = truth(row.network, nn.MSELoss(), X, y, s)
    chosen = (
        "gradient",
        "sample gradient, B=2",
        "step of the chain, B=2, SAM",
        "step of the SDE, B=1, USAM",
    )
    for quantity, value in quantities(single, pair, s, slice(3)):
        if quantity in chosen:
            for _ in range(70):
                last = value()
            torch.testing.assert_close(last, known[quantity][:3], rtol=1e-6, atol=1e-9)


class Warming(nn.Linear):
    """Its output depends on how often it was called, from the 300th time on"""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1.0 + (self.calls >= 300))


@pytest.mark.parametrize("recorded", [True, False])
def test_what_a_layer_counts_for_itself(recorded):
    X, y = normal(1, 6, 3), normal(2, 6, 1)
    objective = FiniteSum.from_module(Warming(3, 1).double(), nn.MSELoss(), X, y)
    first = objective.grad(objective.x0)
    for _ in range(300):
        last = objective.grad(objective.x0)
    assert last.equal(first)
    ends = [
        simulate(Chain(SGD(), o, 0.01), objective.x0, 4.0, 2, threads=1, record=recorded).final
        for o in (objective, FiniteSum(lambda x: (X @ x[:3] + x[3] - y[:, 0]) ** 2, 6, 4))
    ]
    torch.testing.assert_close(*ends, rtol=1e-9, atol=0)


# --- cases that were wrong once ---
# Each has a control: what a wrong way would give is seen to differ.


def near(objective, paths=3, scale=0.3):
    return objective.x0 + scale * normal(11, paths, objective.dim).to(objective.x0.dtype)


def words_with_padding(n=8):
    """Only from the fifth text on is there any padding"""
    X = torch.randint(1, 7, (n, 4), generator=torch.Generator().manual_seed(1))
    X[4:, 2:] = 0
    return X, torch.arange(n) % 3


def word_classifier(padding):
    return Around(
        lambda m, x: m.last(m.words(x).mean(1)), 3, 3, words=nn.Embedding(7, 3, padding_idx=padding)
    )


def test_a1_padding_that_the_first_samples_do_not_have():
    X, y = words_with_padding()
    objective = made(seeded(word_classifier, 0), nn.CrossEntropyLoss(), X, y)
    at = Plain(seeded(word_classifier, 0)(), nn.CrossEntropyLoss(), X, y, objective.x0)
    torch.testing.assert_close(square_norms(objective, objective.x0), at.g.square().sum(1))
    unpadded = Plain(seeded(word_classifier, None)(), nn.CrossEntropyLoss(), X, y, objective.x0)
    assert not torch.allclose(unpadded.g.square().sum(1), at.g.square().sum(1), rtol=1e-3)


def test_a2_the_padding_word_stays_where_it_is():
    def build(padding):
        return nn.Sequential(nn.Embedding(3, 1, padding_idx=padding), nn.Flatten(), nn.Linear(2, 1))

    X, y = torch.tensor([[1, 2], [1, 0], [2, 0]]), normal(2, 3, 1)
    spread = {}
    for padding in (0, None):
        objective = FiniteSum.from_module(seeded(build, padding)(), nn.MSELoss(), X, y)
        final = simulate(Chain(SGD(), objective, 0.1), objective.x0, 5.0, 64).final
        spread[padding] = (final[:, 0] - objective.x0[0]).abs().max()
    assert spread[0] == 0 and spread[None] > 0.05


@pytest.mark.parametrize("width", [2, 6])
def test_a3_layer_norm_within_a_step(width):
    """A step is drift and diffusion, and both are the loop's"""

    def build():
        return nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 3))

    X, y = normal(1, 6, 3), torch.arange(6) % 3
    assert_right(seeded(build), nn.CrossEntropyLoss(), X, y)
    objective = FiniteSum.from_module(seeded(build)(), nn.CrossEntropyLoss(), X, y, batch_size=2)
    sde, x = SDE(SAM(RHO), objective, ETA), near(objective)
    xi = normal(12, 3, sde.noise_dim)
    parts = x + DT * sde.drift(x) + DT**0.5 * sde.diffusion(x, xi)
    torch.testing.assert_close(sde.step(x, xi, DT), parts)
    assert not torch.allclose(sde.step(x, 0 * xi, DT), parts)


def test_a8_a_loss_that_is_not_finite():
    """It is refused where it stands, not blamed on eta and rho in a run"""
    X, y = normal(1, 8, 3), torch.tensor([0, 1, 2, 0, -100, 2, 1, 0])
    loss = nn.CrossEntropyLoss()
    assert loss(classifier()(X), y).isfinite() and loss(classifier()(X[4:5]), y[4:5]).isnan()
    assert_refused(made(classifier, loss, X, y), "ignor|finite|NaN")
    infinite = X.clone()
    infinite[2, 1] = torch.inf
    assert_refused(made(classifier, loss, infinite, y.clamp(min=0)), "finite")


class Scaled(nn.Module):
    """All that a network may read: a frozen weight, a buffer, an attribute"""

    def __init__(self):
        super().__init__()
        self.frozen, self.last = nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 3)
        self.register_buffer("shift", torch.ones(4))
        self.slope = 1.0

    def forward(self, x):
        return self.last((self.slope * self.frozen(x) + self.shift).tanh())


def numbers(objective):
    """What a user may ask for, at three points"""
    x, gamma = near(objective), torch.tensor([[0], [3], [4]])
    xi = normal(13, 3, objective.n).to(x.dtype)
    return torch.cat(
        [
            objective.loss(x)[:, None],
            objective.grad(x),
            objective.sample_grad(x, gamma),
            square_norms(objective, x),
            Chain(SAM(0.1), objective, 0.1).step(x, gamma),
            SDE(USAM(0.1), objective, 0.1).step(x, xi, 0.1),
        ],
        -1,
    )


class Weighted(nn.Module):
    """A loss with a state of its own"""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(3, dtype=F64))
        self.power = 2

    def forward(self, out, y):
        return (self.scale * (out - F.one_hot(y, 3)).abs() ** self.power).mean()


def data_of_three_classes(n=6):
    return normal(1, n, 3), torch.arange(n) % 3


def change_frozen(net, loss, X, y):
    with torch.no_grad():
        net.frozen.weight.mul_(3)


def change_frozen_again(net, loss, X, y):
    net.frozen.weight = nn.Parameter(3 * net.frozen.weight, requires_grad=False)


def change_buffer(net, loss, X, y):
    net.shift.add_(1)


def change_attribute(net, loss, X, y):
    net.slope = 3.0


def change_weights(net, loss, X, y):
    with torch.no_grad():
        net.last.weight.add_(1)


def change_layer(net, loss, X, y):
    net.last = nn.Linear(4, 3).double()


def change_hook(net, loss, X, y):
    net.last.register_forward_hook(lambda layer, args, out: 2 * out)


def change_inputs(net, loss, X, y):
    X.mul_(2)


def change_targets(net, loss, X, y):
    y.copy_((y + 1) % 3)


def change_buffer_of_loss(net, loss, X, y):
    loss.scale.mul_(torch.tensor([1.0, 2.0, 4.0], dtype=F64))


def change_attribute_of_loss(net, loss, X, y):
    loss.power = 3


def change_requirement(net, loss, X, y):
    net.frozen.requires_grad_(True)
    net.last.weight.requires_grad_(False)


CHANGES = [
    change_frozen,
    change_frozen_again,
    change_buffer,
    change_attribute,
    change_weights,
    change_layer,
    change_hook,
    change_inputs,
    change_targets,
    change_buffer_of_loss,
    change_attribute_of_loss,
    change_requirement,
]


@pytest.mark.parametrize("calls", [0, 1, 70])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a9_an_objective_stays_what_it_was(change, calls):
    """Whatever is done later to what was given; here, in a copy, in another thread"""
    net, loss, (X, y) = seeded(Scaled)(), Weighted(), data_of_three_classes()
    objective = FiniteSum.from_module(net, loss, X, y)
    reference = numbers(
        FiniteSum.from_module(seeded(Scaled)(), Weighted(), *data_of_three_classes())
    )
    x = near(objective)
    for _ in range(calls):
        objective.grad(x)
    change(net, loss, X, y)
    torch.testing.assert_close(numbers(objective), reference, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(numbers(copy.deepcopy(objective)), reference, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        in_thread(lambda: numbers(objective)), reference, rtol=1e-9, atol=1e-12
    )
    if change not in (
        change_requirement,
        change_weights,
        change_layer,
    ):  # these change x0, or what is trained
        changed = FiniteSum.from_module(net, loss, X, y)
        assert not torch.allclose(changed.grad(x), objective.grad(x), rtol=1e-3)  # the control


def in_thread(fn):
    found = []

    def work():
        try:
            found.append(fn())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def test_a9_a_pickled_copy_sees_the_same_numbers():
    net, (X, y) = seeded(Scaled)(), data_of_three_classes()
    objective = FiniteSum.from_module(net, Weighted(), X, y)
    before = numbers(objective)
    change_frozen(net, None, X, y)
    torch.testing.assert_close(
        numbers(pickle.loads(pickle.dumps(objective))), before, rtol=1e-9, atol=1e-12
    )


def test_a9_the_module_given_is_left_alone():
    """Neither the objective nor its use changes it"""
    net, (X, y) = seeded(Scaled)(), data_of_three_classes()
    before, out = pickle.dumps(net.state_dict()), net(X)
    objective = FiniteSum.from_module(net, Weighted(), X, y)
    numbers(objective)
    assert pickle.dumps(net.state_dict()) == before and net(X).equal(out) and not net.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert all(p.grad is None for p in net.parameters()) and not net.frozen.weight.requires_grad


FACTOR = 1.0


def times_a_global(out, y):
    return FACTOR * F.cross_entropy(out, y)


@pytest.mark.parametrize("calls", [1, 100])
def test_a9_a_function_that_reads_a_global_sees_its_new_value(calls, monkeypatch):
    X, y = data_of_three_classes()
    objective = FiniteSum.from_module(classifier(), times_a_global, X, y)
    x, gamma = near(objective), torch.tensor([[0], [1], [2]])
    for _ in range(calls):
        before, single, products = (
            objective.grad(x),
            objective.sample_grad(x, gamma),
            objective.hvp(x, x),
        )
    monkeypatch.setattr(
        "test_networks.FACTOR" if __name__ == "test_networks" else __name__ + ".FACTOR", 3.0
    )
    torch.testing.assert_close(objective.grad(x), 3 * before)
    torch.testing.assert_close(objective.sample_grad(x, gamma), 3 * single)
    torch.testing.assert_close(objective.hvp(x, x), 3 * products)


def test_a10_autocast_leaves_nothing_behind():
    X, y = data_of_three_classes()
    objective = FiniteSum.from_module(
        seeded(small_classifier, dtype=torch.float32)(), nn.CrossEntropyLoss(), X.float(), y
    )
    fresh = FiniteSum.from_module(
        seeded(small_classifier, dtype=torch.float32)(), nn.CrossEntropyLoss(), X.float(), y
    )
    x, gamma = near(objective), torch.tensor([[0], [1], [2]])
    with torch.autocast("cpu", torch.bfloat16):
        net = seeded(small_classifier, dtype=torch.float32)()
        assert not torch.allclose(
            net(X.float()).float(), seeded(small_classifier)()(X).float(), rtol=1e-4
        )  # it does something
        for _ in range(70):
            with contextlib.suppress(
                ValueError, TypeError, RuntimeError
            ):  # it may say that it does not work there
                objective.sample_grad(x, gamma)
                objective.grad(x)
    torch.testing.assert_close(objective.sample_grad(x, gamma), fresh.sample_grad(x, gamma))
    torch.testing.assert_close(objective.grad(x), fresh.grad(x))


@pytest.mark.parametrize("what", ["algorithm", "eta", "objective"])
def test_a11_a_process_whose_parts_are_replaced(what):
    H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
    first, second = Quadratic(H, 0.4), Quadratic(2 * H, 0.4)
    new = {"algorithm": USAM(0.1), "eta": 0.2, "objective": second}[what]
    start = torch.tensor([1.0, -2.0], dtype=F64)
    for process in (SDE, Chain):
        given = dict(algorithm=SAM(0.1), objective=first, eta=0.3)
        changed = process(**given)
        before = simulate(changed, start, 30.0, 8).final  # a hundred steps
        setattr(changed, what, new)
        fresh = process(**{**given, what: new})
        after = simulate(changed, start, 30.0, 8).final
        torch.testing.assert_close(after, simulate(fresh, start, 30.0, 8).final, rtol=0, atol=0)
        assert not torch.allclose(after, before, rtol=1e-3)


@pytest.mark.parametrize("calls", [0, 70])
@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad], ids=["inference_mode", "no_grad"]
)
def test_a12_without_gradients_around(mode, calls):
    """Right, or an error that says why; never 0"""
    X, y = data_of_three_classes()
    objective = FiniteSum.from_module(classifier(), nn.CrossEntropyLoss(), X, y)
    x, gamma = near(objective), torch.tensor([[0, 1], [3, 2], [4, 4]])
    ask = {
        "grad": lambda: objective.grad(x),
        "sample_grad": lambda: objective.sample_grad(x, gamma),
        "hvp": lambda: objective.hvp(x, x),
        "norms": lambda: square_norms(objective, x),
        "drift": lambda: drift(SAM(0.1), objective, x),
        "step": lambda: Chain(SAM(0.1), objective, 0.1).step(x, gamma),
        "sde": lambda: SDE(USAM(0.1), objective, 0.1).step(x, normal(14, 3, 6), 0.1),
    }
    for name, value in ask.items():
        for _ in range(calls):
            value()
        want = value()
        assert want.abs().max() > 1e-3
        with mode():
            try:
                got = value()
            except (RuntimeError, ValueError) as error:
                assert mode is torch.inference_mode and "inference" in str(error), (name, error)
                continue
        torch.testing.assert_close(got, want, msg=f"{name} differs inside")


def test_a13_training_goes_on_after_the_objective_was_made():
    """Batch normalisation and dropout in eval mode; then training, before the first run"""
    net = seeded(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    )()
    X, y = data_of_three_classes(8)
    objective = FiniteSum.from_module(net, nn.CrossEntropyLoss(), X, y)
    x0, before = objective.x0.clone(), objective.loss(objective.x0)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    for _ in range(5):
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(net(X), y).backward()
        optimizer.step()
    assert objective.x0.equal(x0)
    run = simulate(Chain(SAM(0.05), objective, 0.1), objective.x0, 0.3, 4)
    torch.testing.assert_close(
        run.mean["loss"][0].to(F64) if "loss" in run.mean else objective.loss(x0), before
    )
    torch.testing.assert_close(in_thread(lambda: objective.loss(x0)), before)
    assert not torch.allclose(
        FiniteSum.from_module(net.eval(), nn.CrossEntropyLoss(), X, y).loss(x0), before, rtol=1e-3
    )


class MicroBatches(USAM):
    """Each sample of a minibatch has a perturbation of its own"""

    def direction(self, objective, x, gamma):
        single = [
            objective.sample_grad(x + self.rho * objective.sample_grad(x, i), i)
            for i in gamma.split(1, -1)
        ]
        return torch.stack(single).mean(0)


FS_G = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, -3.0]], dtype=F64)
FS_H = torch.tensor(
    [[[1.0, 0.0], [0.0, 2.0]], [[3.0, 1.0], [1.0, 0.0]], [[0.0, -1.0], [-1.0, 1.0]]], dtype=F64
)


def test_a14_a_direction_of_its_own():
    """S and f̃ of the micro-batches, or a refusal; the whole minibatch's are others"""
    objective = FiniteSum(lambda x: FS_G @ x + (FS_H @ x @ x) / 2, 3, 2, batch_size=2)
    x, algorithm = torch.zeros(2, dtype=F64), MicroBatches(0.1)
    whole = cross_covariance(USAM(0.1), objective, x)
    assert abs(whole[0, 0].item() - 0.694444) < 1e-6
    try:
        S = cross_covariance(algorithm, objective, x)
        assert abs(S[0, 0].item() - 2 / 3) < 1e-9
    except (ValueError, TypeError) as error:
        assert "direction" in str(error)
    try:
        value = regularized_loss(algorithm, objective, x)
        torch.testing.assert_close(value, 0.05 * FS_G.square().sum(1).mean())  # f(0) = 0
    except (ValueError, TypeError) as error:
        assert "direction" in str(error)
    assert (
        abs(
            regularized_loss(USAM(0.1), objective, x).item()
            - 0.05 * FS_G.square().sum(1).mean().item()
        )
        > 0.01
    )


# --- random networks ---

DEEP = {
    "linear": lambda a: nn.Linear(4, 4, bias=a > 0),
    "tanh": lambda a: nn.Tanh(),
    "gelu": lambda a: nn.GELU(),
    "softplus": lambda a: nn.Softplus(1.0 + a),
    "prelu": lambda a: nn.PReLU(4 if a else 1),
    "layer norm": lambda a: nn.LayerNorm(4, bias=a > 0, eps=0.1),
    "rms norm": lambda a: nn.RMSNorm(4, eps=0.1),
    "group norm": lambda a: nn.GroupNorm(2 if a else 1, 4, eps=0.1),
    "batch norm": lambda a: nn.BatchNorm1d(4, affine=a > 0),
    "instance norm": lambda a: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, affine=True, eps=0.1), nn.Flatten()
    ),
    "conv": lambda a: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 2, 3, padding=1, groups=1 + a % 2), nn.Flatten()
    ),
    "circular conv": lambda a: nn.Sequential(
        nn.Unflatten(1, (1, 4)),
        nn.Conv1d(1, 1, 3, padding=1, padding_mode="replicate" if a else "circular"),
        nn.Flatten(),
    ),
    "transposed conv": lambda a: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.ConvTranspose1d(2, 2, 1, bias=a > 0), nn.Flatten()
    ),
    "attention": lambda a: nn.Sequential(
        nn.Unflatten(1, (2, 2)), SelfAttention(1 + a % 2), nn.Flatten()
    ),
    "weight norm": lambda a: parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral norm": lambda a: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "LoRA": lambda a: LoRA(4, 4, frozen=a > 0),
    "frozen": lambda a: nn.Linear(4, 4).requires_grad_(False),
    "residual": lambda a: Residual(nn.Linear(4, 4), 1 + a),
    "pool": lambda a: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.MaxPool1d(3, 1, 1) if a else nn.AvgPool1d(3, 1, 1), nn.Flatten()
    ),
    "bilinear": lambda a: Squared(nn.Bilinear(4, 4, 4)),
}


class SelfAttention(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.inside = nn.MultiheadAttention(2, heads, batch_first=True)

    def forward(self, x):
        return self.inside(x, x, x)[0]


class Residual(nn.Module):
    """A layer that is used several times"""

    def __init__(self, layer, times):
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x):
        for _ in range(self.times):
            x = x + self.layer(x).tanh()
        return x


class Squared(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x.sin())


RANDOM_LOSSES = {
    "mean square": (nn.MSELoss(), False),
    "cross entropy": (nn.CrossEntropyLoss(), True),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), True),
    "huber": (nn.HuberLoss(), False),
}


BENT = [("spectral norm", 1), ("bilinear", 1), ("bilinear", 1), ("bilinear", 1)]


def random_network(words, layers):
    first = (
        nn.Sequential(nn.Embedding(7, 1, padding_idx=0), nn.Flatten()) if words else nn.Linear(3, 4)
    )
    return nn.Sequential(first, *(DEEP[name](a) for name, a in layers), nn.Linear(4, 3))


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # no search for a smaller example, which takes minutes
@given(
    words=st.booleans(),
    layers=st.lists(st.tuples(st.sampled_from([*DEEP]), st.integers(0, 2)), min_size=1, max_size=4),
    loss=st.sampled_from([*RANDOM_LOSSES]),
    seed=st.integers(0, 99),
)
@example(words=False, layers=BENT, loss="smoothed", seed=19)  # beyond what doubles can tell
def test_random_networks(words, layers, loss, seed):
    make = seeded(random_network, words, layers, seed=seed)
    criterion, classes = RANDOM_LOSSES[loss]
    X = inputs("padded" if words else "real")
    assert_right(make, criterion, X, torch.arange(5) % 3 if classes else normal(seed, 5, 3))
