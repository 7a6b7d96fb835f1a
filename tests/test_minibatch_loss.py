"""MinibatchLoss against torch called by hand, for losses that are no sums, and through every function of the library."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, TensorDataset

from samsde import optim
from samsde.algorithm import DNSAM, SAM, SGD, USAM, Chain
from samsde.diagnosis import diagnose, diagnose_training
from samsde.ensemble import simulate
from samsde.hessian_noise import cross_covariance, noise_covariance, sgd_covariance
from samsde.implicit_regularizer import drift, regularized_loss
from samsde.objective import FiniteSum, MinibatchLoss
from samsde.sde import SDE
from samsde.sweep import sweep

F64 = torch.float64
generator = torch.Generator().manual_seed(0)
X = torch.randn(12, 3, generator=generator, dtype=F64)
y = torch.randint(3, (12,), generator=generator)
weights = torch.tensor([1.0, 3.0, 8.0], dtype=F64)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def plain_net():
    return seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))


def batch_norm():
    return seeded(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    )


def dropout():
    return seeded(
        lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    )


def spectral():
    return seeded(
        lambda: nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)
        )
    ).eval()


def old_spectral():
    return seeded(
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))
    ).eval()


class Tuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = plain_net()

    def forward(self, x):
        return self.net(x), self.net[0].weight.square().sum()


def contrastive(output, target):
    z = F.normalize(output, dim=1)
    near = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return F.cross_entropy(near, torch.arange(len(z)).roll(1))


def dice(output, target):
    p, t = output.softmax(1), F.one_hot(target, 3)
    return 1 - 2 * (p * t).sum() / (p.square().sum() + t.sum())


CASES = {
    "mean": (plain_net, nn.CrossEntropyLoss()),
    "class weights": (plain_net, nn.CrossEntropyLoss(weight=weights)),
    "ignored targets": (plain_net, nn.CrossEntropyLoss(ignore_index=2)),
    "a sum": (plain_net, nn.CrossEntropyLoss(reduction="sum")),
    "RMSE": (
        plain_net,
        lambda output, target: (output - F.one_hot(target, 3)).square().mean().sqrt(),
    ),
    "contrastive": (plain_net, contrastive),
    "Dice": (plain_net, dice),
    "batch norm": (batch_norm, nn.CrossEntropyLoss()),
    "dropout": (dropout, nn.CrossEntropyLoss()),
    "spectral norm": (spectral, nn.CrossEntropyLoss()),
    "old spectral norm": (old_spectral, nn.CrossEntropyLoss()),
    "a tuple": (
        Tuple,
        lambda output, target: F.cross_entropy(output[0], target) + 0.01 * output[1],
    ),
}


def hand(make, loss, x, gamma, v):
    "f, its gradient and its Hessian times v at parameters x, by plain torch on a fresh module"
    net = make()
    params = [p for p in net.parameters() if p.requires_grad]
    nn.utils.vector_to_parameters(x, params)
    rows = gamma[:-1]
    with torch.random.fork_rng():
        torch.manual_seed(int(gamma[-1]))
        f = loss(net(X[rows]), y[rows])
    g = torch.cat([t.flatten() for t in torch.autograd.grad(f, params, create_graph=True)])
    Hv = torch.cat([t.flatten() for t in torch.autograd.grad(g @ v, params)])
    return f.detach(), g.detach(), Hv


def objective(name, batch_size=4, **how):
    make, loss = CASES[name]
    return MinibatchLoss.from_module(make(), loss, (X, y), batch_size, **how)


def with_targets(o, shape, seed=1):
    "Drawn γ that have a target that is not ignored"
    drawn = o.draw((64,), torch.Generator().manual_seed(seed))
    good = drawn[(y[drawn[:, :-1]] != 2).any(1)]
    return good[: int(np.prod(shape))].reshape(*shape, -1)


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_by_hand(name, replace):
    o = objective(name, replace=replace)
    gen = torch.Generator().manual_seed(2)
    x = o.x0 + 0.1 * torch.randn(2, o.dim, generator=gen, dtype=F64)
    v = torch.randn(2, o.dim, generator=gen, dtype=F64)
    gamma = with_targets(o, (2,))
    for k in range(2):
        f, g, Hv = hand(*CASES[name], x[k], gamma[k], v[k])
        assert_close(o.sample_loss(x, gamma)[k], f, rtol=1e-10, atol=1e-12)
        assert_close(o.sample_grad(x, gamma)[k], g, rtol=1e-10, atol=1e-12)
        assert_close(o.sample_hvp(x, gamma, v)[k], Hv, rtol=1e-9, atol=1e-11)
        h = 1e-5
        up, down = (o.sample_grad(x[k] + s * h * v[k], gamma[k]) for s in (1, -1))
        assert_close(Hv, (up - down) / (2 * h), rtol=1e-4, atol=1e-4 * Hv.abs().max().item())
    other = gamma.clone()
    other[:, -1] += 1
    changed = not torch.allclose(o.sample_grad(x, other), o.sample_grad(x, gamma))
    assert changed == (name == "dropout") == o.law.random


@pytest.mark.parametrize(
    "name, wrong",
    [("class weights", "mean"), ("batch norm", None), ("dropout", None), ("a sum", "mean")],
)
def test_full_by_hand(name, wrong):
    "Where f is drawn, it is the mean of many γ within what it says, and a sum over samples is not"
    o = objective(name, replace=False, full_batches=300)
    assert o.full == "drawn"
    gammas = o.draw((1000,), torch.Generator().manual_seed(5))
    values, slopes = o.sample_loss(o.x0, gammas), o.sample_grad(o.x0, gammas)
    f_error, g_error = o.full_error(o.x0)
    assert abs(o.loss(o.x0) - values.mean()) < 4 * (f_error**2 + values.var() / 1000) ** 0.5
    spread = (slopes.var(0).sum() / 1000) ** 0.5
    gap = (o.grad(o.x0) - slopes.mean(0)).norm()
    assert gap < 3 * (g_error**2 + spread**2) ** 0.5
    if wrong:
        assert (objective(wrong).grad(o.x0) - slopes.mean(0)).norm() > 5 * g_error
    v = torch.ones_like(o.x0)
    up, down = (o.grad(o.x0 + s * 1e-5 * v) for s in (1, -1))
    assert_close(o.hvp(o.x0, v), (up - down) / 2e-5, rtol=1e-4, atol=1e-5)


def test_full_is_exact_where_it_can_be():
    sums = objective("mean")
    finite = FiniteSum.from_module(plain_net(), nn.CrossEntropyLoss(), X, y, 4)
    assert sums.full == "samples" and sums.full_error(sums.x0) == (0, 0)
    for name in ("loss", "grad"):
        assert_close(
            getattr(sums, name)(sums.x0), getattr(finite, name)(sums.x0), rtol=1e-10, atol=1e-12
        )
    single = objective("a sum", batch_size=1)
    assert single.full == "enumerated" and len(single.batches()) == 12
    assert_close(single.grad(single.x0), finite.grad(single.x0), rtol=1e-10, atol=1e-12)
    whole = objective("class weights", batch_size=12, replace=False)
    assert whole.full == "enumerated" and whole.law.noiseless
    known = hand(*CASES["class weights"], whole.x0, torch.arange(13), whole.x0)
    assert_close(whole.grad(whole.x0), known[1], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(whole.grad(whole.x0), finite.grad(whole.x0), rtol=0.05)
    assert objective("mean", batch_size=12, replace=False).full == "enumerated"


@pytest.mark.parametrize("kind", [USAM, DNSAM, SAM])
def test_drift_and_noise_are_those_of_the_finite_sum(kind):
    "The same f_γ, in both ways: same γ, same numbers"
    ours = objective("mean", batch_size=2)
    finite = FiniteSum.from_module(plain_net(), nn.CrossEntropyLoss(), X, y, 2)
    gammas = torch.cat(
        [
            torch.cartesian_prod(torch.arange(12), torch.arange(12)),
            torch.zeros(144, 1, dtype=torch.long),
        ],
        1,
    )
    from samsde.moments import GammaMoments, Support

    a = kind(0.1)
    exact = GammaMoments(a, ours, ours.x0, seed=Support(gammas, True))
    exact.size = 144
    assert_close(-exact.combine(1.0, None, 0.1), drift(a, finite, ours.x0), rtol=1e-8, atol=1e-10)
    assert_close(exact.cross()[0], cross_covariance(a, finite, ours.x0), rtol=1e-7, atol=1e-10)
    G = exact.columns(0.0)
    assert_close(G.T @ G, sgd_covariance(finite, ours.x0), rtol=1e-7, atol=1e-10)
    assert not torch.allclose(drift(SGD(), finite, ours.x0), drift(a, finite, ours.x0), rtol=0.01)
    drawn, sem = drift(a, ours, ours.x0, draws=400, return_sem=True)
    assert ((drawn - drift(a, finite, ours.x0)).abs() < 5 * sem + 1e-9).all()


@pytest.mark.parametrize("name", ["batch norm", "dropout", "class weights"])
@pytest.mark.parametrize("kind", ["SAM", "USAM"])
def test_step_is_the_optimizers(name, kind):
    "One step of the Chain is samsde.optim's, with the same randomness in both passes"
    make, loss = CASES[name]
    o, net = objective(name), make()
    gamma = o.draw((), torch.Generator().manual_seed(3))
    sam = getattr(optim, kind)(net.parameters(), torch.optim.SGD, rho=0.3, lr=0.2)

    def closure():
        sam.zero_grad()
        torch.manual_seed(int(gamma[-1]))
        f = loss(net(X[gamma[:-1]]), y[gamma[:-1]])
        f.backward()
        return f

    sam.step(closure)
    ends = Chain(dict(SAM=SAM, USAM=USAM)[kind](0.3), o, 0.2).step(o.x0, gamma)
    assert_close(
        ends, nn.utils.parameters_to_vector(net.parameters()).detach(), rtol=1e-10, atol=1e-12
    )
    assert not torch.allclose(ends, Chain(SGD(), o, 0.2).step(o.x0, gamma), rtol=1e-3)


def test_everything_takes_it():
    o = objective("batch norm", full_batches=8)
    a = SAM(0.05)
    for process in (Chain(a, o, 0.1), SDE(a, o, 0.1, draws=4), SDE(a, o, 0.1, draws=4, seed=None)):
        runs = [simulate(process, o.x0, 0.3, 4, observe={"loss": o.loss}, seed=1) for _ in range(2)]
        assert runs[0].final.equal(runs[1].final) and runs[0].n_diverged == 0
        assert torch.isfinite(runs[0].mean["loss"]).all() and runs[0].std["loss"][-1] > 0
    assert torch.isfinite(noise_covariance(a, o, o.x0, draws=8)).all()
    value, sem = regularized_loss(a, o, o.x0, draws=16, return_sem=True)
    assert value > o.loss(o.x0) and sem > 0
    found = diagnose(a, o, o.x0, 0.1, top=1, directions=1, draws=8)
    assert np.isfinite(found.directions.to_numpy(float)).all()
    second = SDE(a, o, 0.1, expansion="exact", order=2, draws=4)
    h = 1e-5
    field = SDE(a, o, 0.1, expansion="exact", draws=4).drift
    b = field(o.x0)
    slope = (field(o.x0 + h * b) - field(o.x0 - h * b)) / (2 * h)
    assert_close(second.drift(o.x0), b - 0.05 * slope, rtol=1e-3, atol=3e-5)
    assert not torch.allclose(second.drift(o.x0), b, rtol=1e-3, atol=3e-5)


def test_sweep_takes_it():
    o = objective("dropout", full_batches=4)
    table = sweep([SAM(0.1)], {"net": o}, [0.1], t_end=0.2, n_paths=3)
    assert len(table)


def test_one_path_after_another_and_threads_give_the_same():
    o = objective("dropout")
    chain = Chain(SAM(0.1), o, 0.1)
    many = simulate(chain, o.x0, 0.2, 6, seed=2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert simulate(chain, o.x0, 0.2, 6, seed=2).final.equal(many.final)
    finally:
        torch.set_num_threads(threads)


class Pictures(Dataset):
    "Read one by one, with a crop that is drawn"

    def __init__(self, augment=False):
        self.augment, self.read = augment, []

    def __len__(self):
        return 12

    def __getitem__(self, i):
        self.read.append(i)
        noise = torch.from_numpy(np.random.randn(3)) if self.augment else 0
        return X[i] + noise, y[i]


def test_data_sets_are_read_lazily():
    data = Pictures()
    o = MinibatchLoss.from_module(plain_net(), nn.CrossEntropyLoss(), data, 4)
    data.read.clear()
    gamma = torch.tensor([1, 5, 5, 7, 0])
    assert_close(o.sample_grad(o.x0, gamma), objective("mean").sample_grad(o.x0, gamma))
    assert set(data.read) == {1, 5, 7}
    random = MinibatchLoss.from_module(
        plain_net(), nn.CrossEntropyLoss(), Pictures(augment=True), 4
    )
    assert random.law.random and random.full == "drawn"
    state = np.random.get_state()[1].copy()
    once, twice = (random.sample_grad(o.x0, gamma) for _ in range(2))
    assert once.equal(twice) and not torch.allclose(once, o.sample_grad(o.x0, gamma))
    np.random.seed(0)
    moved = X[gamma[:-1]] + torch.from_numpy(np.stack([np.random.randn(3) for _ in range(4)]))
    by_hand = nn.functional.cross_entropy(plain_net()(moved), y[gamma[:-1]])
    np.random.set_state(("MT19937", state, *np.random.get_state()[2:]))
    assert_close(random.sample_loss(o.x0, gamma), by_hand.detach())


def test_loader():
    loader = DataLoader(Pictures(), 4, shuffle=True)
    o = MinibatchLoss.from_module(plain_net(), nn.CrossEntropyLoss(), loader)
    assert (o.law.batch_size, o.law.replace, o.law.n) == (4, False, 12)
    with pytest.raises(ValueError, match="its own batch_size"):
        MinibatchLoss.from_module(plain_net(), nn.CrossEntropyLoss(), loader, 4)


@pytest.mark.parametrize("how", [dict(shuffle=True), dict(), dict(sampler=RandomSampler(Pictures(), True, 5))])
def test_loader_with_more_in_a_batch_than_there_are(how):
    """An epoch is one batch of all that the sampler gives; with drop_last it has none"""
    loader = DataLoader(Pictures(), 100, **how)
    net, few = plain_net(), "sampler" in how
    o = MinibatchLoss.from_module(net, nn.CrossEntropyLoss(), loader)
    assert (o.law.batch_size, o.law.replace) == ((5, True) if few else (12, False))
    assert len(next(iter(loader))[0]) == o.law.batch_size
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    found = diagnose_training(net, nn.CrossEntropyLoss(), loader, optimizer, budget_s=1, progress=False)
    assert (found.terms["noise"] > 0) == few and not any("last batch" in said for said in found.coarse)
    if how == dict(shuffle=True):
        assert MinibatchLoss.from_module(net, nn.CrossEntropyLoss(), loader, replace="epochs").law.steps == 1
    with pytest.raises(ValueError, match="in batches of 100 with drop_last=True"):
        MinibatchLoss.from_module(net, nn.CrossEntropyLoss(), DataLoader(Pictures(), 100, drop_last=True, **how))


def test_leaves_the_module_alone():
    net = batch_norm()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    o = MinibatchLoss.from_module(net, nn.CrossEntropyLoss(), (X, y), 4)
    o.grad(o.x0 + 1)
    after = net.state_dict()
    assert all(before[k].equal(after[k]) for k in before) and net.training
    assert all(p.grad is None for p in net.parameters()) and state.equal(torch.get_rng_state())
    twin = pickle.loads(
        pickle.dumps(MinibatchLoss.from_module(net, nn.CrossEntropyLoss(), (X, y), 4))
    )
    gamma = o.draw((), torch.Generator().manual_seed(0))
    assert twin.sample_grad(o.x0, gamma).equal(o.sample_grad(o.x0, gamma))


def test_draws_follow_their_law():
    o = objective("class weights", batch_size=3, replace=False)
    drawn = o.draw((6000,), torch.Generator().manual_seed(0))[:, :-1]
    assert all(len(set(row)) == 3 for row in drawn.tolist())
    firsts = torch.bincount(drawn[:, 0], minlength=12) / 6000
    assert (firsts - 1 / 12).abs().max() < 5 * (1 / 12 / 6000) ** 0.5
    assert o.law.count == 12 * 11 * 10
    every = o.law.support(2000).gammas
    assert sorted(map(tuple, every[:, :-1].tolist())) == sorted(
        itertools.permutations(range(12), 3)
    )


def test_the_gradient_is_computed_once_per_point():
    calls = []

    class Counting(nn.CrossEntropyLoss):
        def forward(self, output, target):
            calls.append(len(target))
            return super().forward(output, target)

    o = MinibatchLoss.from_module(plain_net(), Counting(), (X, y), 4)
    o.grad(o.x0)
    calls.clear()
    o.grad(o.x0), o.loss(o.x0), DNSAM(0.1).perturbation(o, o.x0, torch.tensor([0, 1, 2, 3, 0]))
    glances = [2, 2, 2]  # a look at two samples: is the loss still the same?
    assert sorted(calls) == [*glances, 4]
    o.network.data[0].mul_(1.0)  # written to: the gradient is another one
    o.grad(o.x0)
    assert sorted(calls) == [*glances, 2, 4, 4, 4, 4]


@pytest.mark.parametrize("change", ["global", "autocast"])
def test_a_mean_whose_loss_has_changed(change, monkeypatch):
    """At the point where it was computed last: by a global, and by an autocast that is over."""
    net = plain_net().float()

    def make():
        return MinibatchLoss.from_module(net, warmed, (X.float(), y), 4)

    monkeypatch.setitem(WARMTH, "beta", 1.0)
    objective, fresh = make(), make()
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        before = objective.grad(objective.x0)
    WARMTH["beta"] = 2.0 if change == "global" else 1.0
    assert objective.grad(objective.x0).equal(fresh.grad(fresh.x0))
    assert not before.equal(fresh.grad(fresh.x0))


WARMTH = {"beta": 1.0}


def warmed(output, target):
    return WARMTH["beta"] * F.cross_entropy(output, target)


def test_minibatches_of_another_size_are_drawn_as_often():
    """Where the number of minibatches of f was given."""
    objective = MinibatchLoss.from_module(dropout(), F.cross_entropy, (X, y), 4, full_batches=100)
    chain = Chain(SAM(0.1, micro_batch=2), objective, 0.1)
    assert len(chain.objective.single.batches()) == len(objective.batches()) == 100


def test_a_loss_that_is_a_mean_at_x0_alone():
    """Its batches add up at x0, where a penalty on their spread is off, and not further on."""
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1).double()
    X, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 1, dtype=torch.float64)

    def loss(output, target):
        spread = (output - output.mean()).square().mean()
        return (output - target).square().mean() + (spread - 20.0).clamp(min=0)

    def plain(output, target):
        return (output - target).square().mean()

    kinds = [
        MinibatchLoss.from_module(net, f, (X, y), 4, replace=False).full for f in (loss, plain)
    ]
    assert kinds == ["drawn", "samples"]


@pytest.mark.parametrize("source", ["own", "full", "independent", "previous"])
@pytest.mark.parametrize("kind", [SAM, USAM])
def test_micro_batches_of_a_sum(kind, source):
    """Of a loss that is a sum, everything is that of the finite sum; that of whole batches must differ."""
    rows, replace = slice(0, 4), False
    few, sum_ = (
        cls.from_module(plain_net(), nn.CrossEntropyLoss(), *data, batch_size=2, replace=replace)
        for cls, data in ((MinibatchLoss, ((X[rows], y[rows]),)), (FiniteSum, (X[rows], y[rows])))
    )
    a, whole, how = (
        kind(0.3, micro_batch=1, source=source),
        kind(0.3, source=source),
        dict(draws=200),
    )
    for expansion in ("first", "exact"):
        found, known, other = (
            drift(*pair, few.x0, expansion, **how) for pair in ((a, few), (a, sum_), (whole, sum_))
        )
        assert_close(found, known, rtol=1e-9, atol=1e-12)
        if source == "own":
            assert not torch.allclose(found, other, rtol=1e-3)
    for form in ("factor", "exact"):
        if source in ("own", "independent") and form == "factor":
            continue  # of a finite sum the columns are those of batches of m
        found, known = (
            noise_covariance(a, objective, few.x0, form, **how) for objective in (few, sum_)
        )
        assert_close(found, known, rtol=1e-8, atol=1e-12)
    if source == "own":
        found, known, other = (
            regularized_loss(*pair, few.x0) for pair in ((a, few), (a, sum_), (whole, sum_))
        )
        assert_close(found, known) and abs(found - other) > 1e-3


@pytest.mark.parametrize("B", [4, 5])
def test_micro_batches_that_are_normalised_alone(B):
    """Batch normalisation by micro-batch: a step, drift and noise by hand over all orders; whole batches must differ."""
    net, loss, rho, data = batch_norm(), nn.CrossEntropyLoss(), 0.2, (X[:B], y[:B])
    B -= B % 2  # B = N = 4, or 4 out of 5
    objective = MinibatchLoss.from_module(net, loss, data, B, replace=False)
    a, x = SAM(rho, micro_batch=2), objective.x0

    def grad(z, rows):
        z, parts, i = z.clone().requires_grad_(), {}, 0
        for name, p in net.named_parameters():
            parts[name], i = z[i : i + p.numel()].view_as(p), i + p.numel()
        f = loss(torch.func.functional_call(net, parts, (data[0][rows],)), data[1][rows])
        return torch.autograd.grad(f, z)[0]

    def direction(rows):
        every = []
        for part in (rows[:2], rows[2:]):
            g = grad(x, part)
            every.append(grad(x + rho * g / g.norm(), part))
        return torch.stack(every).mean(0)

    chain = Chain(a, objective, 0.1)
    gamma = chain.draw((), torch.Generator().manual_seed(0))
    assert_close(
        chain.step(x, gamma), x - 0.1 * direction(gamma[:-1].tolist()), rtol=1e-9, atol=1e-12
    )
    G = torch.stack([direction([*rows]) for rows in itertools.permutations(range(len(data[0])), B)])
    sde = SDE(a, objective, 0.1, "exact", "exact", draws=200)
    assert_close(sde.drift(x), -G.mean(0), rtol=1e-9, atol=1e-12)
    assert_close(sde.covariance(x), 0.1 * torch.cov(G.T, correction=0), rtol=1e-9, atol=1e-12)
    assert (drift(SAM(rho), objective, x, "exact", draws=200) + G.mean(0)).abs().max() > 0.01
    f = (
        torch.stack(
            [
                loss(net(data[0][list(rows)]), data[1][list(rows)])
                for rows in itertools.permutations(range(len(data[0])), 2)
            ]
        )
        .mean()
        .item()
    )
    single = chain.objective.single  # f is a mean over drawn micro-batches
    assert abs(chain.objective.loss(x).item() - f) < 4 * single.full_error(x)[0]
    runs = [simulate(chain, x, 0.3, 4, chunk=chunk).final for chunk in (None, 3)]
    assert runs[0].equal(runs[1]) and runs[0].std(0).max() > 0


def test_micro_batches_have_masks_of_their_own():
    """Of one row twice, dropout's masks differ in two micro-batches, and are the same in both gradients of a step."""
    objective = MinibatchLoss.from_module(dropout(), nn.CrossEntropyLoss(), (X, y), 2, replace=True)
    chain = Chain(SAM(1e-9, micro_batch=1), objective, 1.0)
    gamma = torch.tensor([3, 3, 17])
    parts = chain.objective.law.cut(gamma, 1)
    single = torch.stack([objective.sample_grad(objective.x0, part) for part in parts])
    assert not torch.allclose(single[0], single[1], rtol=1e-2)
    assert_close(
        objective.x0 - chain.step(objective.x0, gamma), single.mean(0), rtol=1e-5, atol=1e-7
    )


def test_a_micro_batch_that_does_not_fit():
    objective = MinibatchLoss.from_module(plain_net(), nn.CrossEntropyLoss(), (X, y), 4)
    for use in (
        lambda a: Chain(a, objective, 0.1),
        lambda a: drift(a, objective, objective.x0),
        lambda a: SDE(a, objective, 0.1),
    ):
        with pytest.raises(ValueError, match="micro_batch must divide batch_size=4, got 3"):
            use(SAM(0.1, micro_batch=3))


@pytest.mark.parametrize("ignored", [*itertools.combinations(range(6), 2)])
def test_ignored_targets_that_are_spread_evenly(ignored):
    """The batches of one pass may add up though their law does not: a NaN half, or equal halves."""
    targets = torch.tensor([0, 1, 2, 1, 0, 2])
    targets[[*ignored]] = -100
    net = seeded(lambda: nn.Linear(3, 3))
    loss = nn.CrossEntropyLoss()
    o = MinibatchLoss.from_module(net, loss, (X[:6], targets), 4, replace=False)
    assert o.full == "drawn"
    batches = [list(rows) for rows in itertools.combinations(range(6), 4)]
    mean = sum(loss(net(X[rows]), targets[rows]) for rows in batches) / len(batches)
    assert abs(o.loss(o.x0) - mean) < 5 * o.full_error(o.x0)[0]


DATA = {
    "tensors": lambda X, y: (X, y),
    "nested": lambda X, y: ((X,), y),
    "data set": TensorDataset,
    "its part": lambda X, y: Subset(TensorDataset(X, y), range(8)),
    "list": lambda X, y: [*zip(X, y)],
}


@pytest.mark.parametrize("kind", DATA)
def test_data_that_are_written_to(kind):
    data = X.clone()
    o = MinibatchLoss.from_module(plain_net(), nn.CrossEntropyLoss(), DATA[kind](data, y), 4)
    before = o.loss(o.x0)
    data.mul_(3)
    fresh = MinibatchLoss.from_module(plain_net(), nn.CrossEntropyLoss(), DATA[kind](data, y), 4)
    assert_close(o.loss(o.x0), fresh.loss(o.x0))
    assert not torch.isclose(before, fresh.loss(o.x0), rtol=1e-3)  # the control


class Held(torch.utils.data.Dataset):
    "Its samples depend on what is no tensor"

    def __init__(self):
        self.array = X.numpy().copy()
        self.factor, self.kept, self.transform = 1.0, {"by": [np.ones(1)]}, torch.clone

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        row = torch.from_numpy(self.array[i] * self.factor * self.kept["by"][0])
        return self.transform(row), y[i]


WRITES = {
    "an array": lambda data: data.array.__imul__(3),
    "a number": lambda data: setattr(data, "factor", 3.0),
    "deep inside": lambda data: data.kept["by"][0].__imul__(3),
    "a function": lambda data: setattr(data, "transform", lambda row: 3 * row),
}


@pytest.mark.parametrize("write", WRITES)
def test_data_of_ones_own_that_are_written_to(write):
    data = Held()
    o = MinibatchLoss.from_module(plain_net(), nn.CrossEntropyLoss(), data, 4)
    before = o.loss(o.x0)
    WRITES[write](data)
    known = MinibatchLoss.from_module(plain_net(), nn.CrossEntropyLoss(), (3 * X, y), 4)
    assert_close(o.loss(o.x0), known.loss(o.x0))
    assert not torch.isclose(before, known.loss(o.x0), rtol=1e-3)  # the control


def test_arrays_of_numpy_are_no_two_samples():
    """As many features as targets have columns: X and y would be stacked to a batch of two."""
    arrays = X.numpy(), 2 * X.numpy()
    net = seeded(lambda: nn.Linear(3, 3))
    with pytest.raises(TypeError, match="arrays of numpy"):
        MinibatchLoss.from_module(net, nn.MSELoss(), arrays, 1)


class DrawsForTheLast(nn.Linear):
    def forward(self, x):
        factor = torch.rand(1, dtype=F64) if (x == X[-1]).all(-1).any() else 1.0
        return super().forward(x) * factor


def test_random_numbers_that_the_first_batch_does_not_draw():
    net = seeded(lambda: DrawsForTheLast(3, 3))
    o = MinibatchLoss.from_module(net, nn.CrossEntropyLoss(), (X, y), 2)
    first, last = torch.tensor([0, 1, 0]), torch.tensor([0, 11, 0])
    o.along(o.x0, first, lambda g: g)
    for found in (lambda: o.grad(o.x0), lambda: o.along(o.x0, last, lambda g: g)):
        with pytest.raises(ValueError, match="drew random numbers for one batch"):
            found()


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("kind", [USAM, DNSAM, SAM])
@pytest.mark.parametrize("source", ["independent", "previous"])
def test_a_second_batch_beside_the_first(source, kind, drop):
    """A fresh objective, in which nothing was found before; f and its batches are those of one."""
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(drop), nn.Linear(2, 3)))

    def fresh():
        return MinibatchLoss.from_module(net, nn.CrossEntropyLoss(), (X[:4], y[:4]), 1)

    x, algorithm = fresh().x0, kind(0.1, source=source)
    settings = dict(draws=8) if drop else dict(draws=16)
    for expansion in ("first", "exact"):
        b = drift(algorithm, fresh(), x, expansion, **settings)
        if drop:
            continue
        f = FiniteSum.from_module(net, nn.CrossEntropyLoss(), X[:4], y[:4])
        assert_close(b, drift(algorithm, f, x, expansion))
    a = noise_covariance(algorithm, fresh(), x, **settings)
    if not drop:
        assert_close(a, noise_covariance(algorithm, f, x))
    simulate(SDE(algorithm, fresh(), 0.1, draws=8), x, 0.2, 2)


class Counting(nn.Linear):
    """Its output depends on how often it was called, from the 12th time on."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1.0 + (self.calls >= 12))


def test_what_a_layer_counts_for_itself():
    net = seeded(lambda: Counting(3, 3))
    net.calls = 5
    o = MinibatchLoss.from_module(net, nn.CrossEntropyLoss(), (X, y), 2)
    gamma = torch.tensor([[3, 4, 0]] * 20)
    found = o.sample_grad(o.x0, gamma)
    assert found.equal(found[:1].expand(20, -1)) and net.calls == 5
    loss = nn.CrossEntropyLoss()(net(X[3:5]), y[3:5])
    known = torch.autograd.grad(loss, [*net.parameters()])
    assert_close(found[0], torch.cat([g.flatten() for g in known]))


def flooded(out, t):
    return (F.mse_loss(out, t) - 1.5).abs() + 1.5


def bounded(out, t):
    return F.mse_loss(out, t).clamp(min=1.5)


@pytest.mark.parametrize("loss", [flooded, bounded])
def test_a_sum_only_where_losses_are_large(loss):
    """At a start high above, each batch is the mean of its samples; further down it is not. It is refused as a finite sum, and f is no sum over the samples; the control: without a floor it is both."""
    net, t = seeded(lambda: nn.Linear(3, 1)), torch.linspace(-2, 2, 12, dtype=F64)[:, None]
    net.bias.data += 30
    with pytest.raises(ValueError, match="must be the mean of the losses of its samples"):
        FiniteSum.from_module(net, loss, X, t, batch_size=3)
    FiniteSum.from_module(net, F.mse_loss, X, t, batch_size=3)
    objective = MinibatchLoss.from_module(net, loss, (X, t), batch_size=3, replace=False)
    assert objective.full == "drawn"
    plain = MinibatchLoss.from_module(net, F.mse_loss, (X, t), batch_size=3, replace=False)
    assert plain.full == "samples"
    low = objective.x0.clone()
    low[3] -= 30
    batches = [list(rows) for rows in itertools.combinations(range(12), 3)]
    known = sum(loss((X[rows] @ low[:3] + low[3])[:, None], t[rows]) for rows in batches)
    sem = objective.full_error(low)[0]
    assert 0 < sem and (objective.loss(low) - known / len(batches)).abs() < 4 * sem


def test_one_autocast_around_many_calls():
    """Each gradient is that of its own point: torch keeps parameters in low precision for as long as the context lasts. The control is what it kept before."""
    net = plain_net().float()
    objective = MinibatchLoss.from_module(net, F.cross_entropy, (X.float(), y), 4)
    far = objective.x0 + 0.5
    known, before = objective.grad(far), objective.grad(objective.x0)
    with torch.autocast("cpu", torch.bfloat16):
        objective.grad(objective.x0)
        found = objective.grad(far)
    assert (found - known).norm() < 0.05 * known.norm() < 0.2 * (found - before).norm()
