"""A gradient that belongs to no loss: behind something detached, rounded or reversed, or changed by a hook."""

import pytest
import torch
import torch.nn.functional as F
from samsde.algorithm import USAM
from samsde.diagnosis import diagnose_training
from samsde.implicit_regularizer import drift
from samsde.objective import Additive, FiniteSum, MinibatchLoss, NoisyLoss
from samsde.optim import SAM
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
y = torch.arange(40) % 3
NO_LOSS = "this gradient belongs to no loss"


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


class Layer(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


def reversed_(x):
    return Reversal.apply(x)


def rounded(x):
    return x + (x.round() - x).detach()


def detached(x):
    return x * x.detach().cos()


def doubled(x):
    x = x * 1
    if x.requires_grad:
        x.register_hook(lambda g: 2 * g)
    return x


def kinked(x):
    return F.relu(x).detach() * 0 + F.relu(x) + x.abs().clamp(max=1)


def network(fn, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(8, 16), nn.Tanh(), Layer(fn), nn.Linear(16, 3)
    return nn.Sequential(*layers).to(dtype)


def whole(net, X=X):
    return FiniteSum.from_module(net, F.cross_entropy, X, y)


def batches(net, X=X):
    return MinibatchLoss.from_module(net, F.cross_entropy, (X, y), batch_size=8)


def diagnosis(net):
    loader = DataLoader(TensorDataset(X, y), batch_size=8)
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    return diagnose_training(net, F.cross_entropy, loader, optimizer, progress=False)


@pytest.mark.parametrize("fn", [reversed_, rounded, detached, doubled])
@pytest.mark.parametrize("use", [whole, batches, diagnosis])
def test_modules_are_refused(use, fn):
    with pytest.raises(ValueError, match=NO_LOSS):
        use(network(fn))


@pytest.mark.parametrize("fn", [torch.sin, kinked])
def test_modules_with_a_loss_pass(fn):
    """Kinks and what is multiplied by 0 are no contradiction, in either precision."""
    for dtype in (torch.float32, torch.float64):
        for use in (whole, batches):
            use(network(fn, dtype), X.to(dtype))
    assert diagnosis(network(fn)) is not None


def test_what_was_wrong():
    """ρ E[Hu] of a reversal is that of another field: by differences, and as autograd has it."""
    net = network(reversed_, torch.float64)
    params = [*net.parameters()]

    def field(x, i):
        torch.nn.utils.vector_to_parameters(x, params)
        loss = F.cross_entropy(net(X[i : i + 1].double()), y[i : i + 1])
        g = torch.autograd.grad(loss, params, create_graph=True)
        return torch.cat([t.flatten() for t in g])

    x = torch.nn.utils.parameters_to_vector(params).detach()
    u = field(x, 0).detach()
    change = (field(x + 1e-5 * u, 0) - field(x - 1e-5 * u, 0)).detach() / 2e-5
    torch.nn.utils.vector_to_parameters(x, params)
    Hu = torch.autograd.grad(field(x, 0) @ u, params)
    Hu = torch.cat([t.flatten() for t in Hu])
    assert (Hu - change).norm() > 0.5 * change.norm()


def test_a_hook_for_what_is_accumulated_is_refused():
    net = network(torch.sin)
    net[0].weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2) and None)
    for use in (whole, batches, diagnosis):
        with pytest.raises(ValueError, match="'0.weight' has a hook for its accumulated gradient"):
            use(net)


NORMS = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "old weight norm": nn.utils.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "old spectral norm": nn.utils.spectral_norm,
}


def normed(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = NORMS[name](nn.Linear(8, 16)), nn.Tanh(), nn.Linear(16, 3)
    return nn.Sequential(*layers).double()


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("use", [whole, batches])
def test_hessians_of_normed_weights(use, name):
    """By differences of the gradient. Torch has a second derivative of the weight norm that is 10 % off."""
    o = use(normed(name).eval(), X.double())
    v = torch.randn(o.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    known = (o.grad(o.x0 + 1e-5 * v) - o.grad(o.x0 - 1e-5 * v)) / 2e-5
    assert (o.hvp(o.x0, v) - known).norm() < 1e-5 * known.norm()
    if "weight" not in name:
        return
    net = normed(name)
    params = [p for p in net.parameters()]
    g = torch.autograd.grad(F.cross_entropy(net(X.double()), y), params, create_graph=True)
    g = torch.cat([t.flatten() for t in g])
    torchs = torch.cat([t.flatten() for t in torch.autograd.grad(g @ v, params)])
    if use is whole:
        assert (torchs - known).norm() > 0.1 * known.norm()


@pytest.mark.parametrize("name", ["spectral norm", "old spectral norm"])
def test_power_iterations_are_refused(name):
    net = normed(name)
    with torch.no_grad():  # far from what the iterations so far have seen
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(p))
    with pytest.raises(ValueError, match="or is spectral norm in training mode"):
        batches(net, X.double())


def half_detached(x):
    return (x * x.detach().sin()).sum()


def test_functions_are_refused():
    class Own(Additive):
        def loss(self, x):
            return (x * x.detach().sin()).sum(-1)

    data = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))

    def losses(x):
        return (data.to(x) @ x) * (data.to(x) @ x).detach()

    for objective in (NoisyLoss(half_detached, 3, sigma=0.1), Own(3, 0.1), FiniteSum(losses, 5, 3)):
        with pytest.raises(ValueError, match=NO_LOSS):
            drift(USAM(0.1), objective, torch.ones(3))


def test_functions_with_a_loss_pass():
    def bumpy(x):
        return torch.log1p(x.square().sum()) + F.relu(x).sum() + x.abs().max()

    def single_precision(x):
        return (torch.ones(2, 3) @ x.float()).square().sum()

    def elsewhere(x):  # NaN at half of the points
        return x.sqrt().sum()

    for fn in (bumpy, single_precision, elsewhere):
        objective = NoisyLoss(fn, 3, sigma=0.1)
        assert drift(USAM(0.1), objective, torch.ones(3)).isfinite().all()


class Inside(nn.Module):
    def __init__(self, net, half):
        super().__init__()
        self.net, self.half = net, half

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            return self.net(x).float()


def test_single_precision_at_the_end_of_a_module():
    """It has no twin in double precision, and is compared as it is; half precision inside is too coarse for that."""
    net = network(torch.sin)
    plain, found = whole(net), whole(Inside(net, half=False))
    assert (plain.grad(plain.x0) - found.grad(found.x0)).abs().max() < 1e-6
    with pytest.raises(ValueError, match="rounded"):
        whole(Inside(net, half=True))
