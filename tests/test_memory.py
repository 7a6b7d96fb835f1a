"Memory: of a network in chunks, of a simulation with many records, and of a diagnosis beside training."

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from samsde import diagnosis, optim
from samsde.algorithm import SAM, Chain
from samsde.ensemble import simulate
from samsde.implicit_regularizer import drift
from samsde.machinery import long_vectors
from samsde.objective import FiniteSum, Quadratic

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads a program's peak from /proc"
)


@pytest.fixture
def alone(processes):
    "What a function returns in a new process, of one thread"

    def run(function, *arguments):
        with ProcessPoolExecutor(1, processes, torch.set_num_threads, (1,)) as pool:
            return pool.submit(function, *arguments).result()

    return run


def peak():
    "MiB, of this process alone, while ru_maxrss begins at that of the one that started it"
    with open("/proc/self/status") as f:
        words = next(line for line in f if line.startswith("VmHWM")).split()
    return int(words[1]) / 1024


def network(chunk):
    "MiB beyond the start: after construction, and after a drift with drawn minibatches, a gradient and a product"
    X, y = torch.randn(8000, 88), torch.randint(10, (8000,))
    net = torch.nn.Sequential(torch.nn.Linear(88, 1000), torch.nn.Tanh(), torch.nn.Linear(1000, 10))
    small = FiniteSum.from_module(
        torch.nn.Linear(88, 10), torch.nn.CrossEntropyLoss(), X[:60], y[:60]
    )
    drift(SAM(0.1), small, small.x0)  # what torch and the library load at their first use
    before = peak()
    objective = FiniteSum.from_module(
        net, torch.nn.CrossEntropyLoss(), X, y, batch_size=100, chunk=chunk
    )
    assert objective.dim == 99_010
    made = peak() - before
    drift(SAM(0.1), objective, objective.x0, draws=8)
    objective.grad(objective.x0)
    objective.sample_hvp(objective.x0, torch.arange(100)[None], objective.x0)
    return made, peak() - before


def test_memory_of_a_network_in_chunks(alone):
    """8,000 samples and 99,010 parameters: under 250 MiB with chunk=50. The control has no chunk."""
    made, used = alone(network, 50)
    assert used < 250 and made < 250 < alone(network, None)[1]


def records(keep):
    "MiB beyond a run of 300 steps"
    chain, start = (
        Chain(SAM(0.1), Quadratic(torch.diag(torch.linspace(0.5, 1.5, 20)), 0.1), 0.01),
        torch.ones(20),
    )
    simulate(chain, start, 3.0, 3_000)  # what is loaded at the first use, and a record of the step
    before = peak()
    simulate(chain, start, 10.0, 3_000, keep=keep)
    return peak() - before


def test_memory_of_records(alone):
    """The point of 3,000 paths at each of 1,000 steps, 240 MB of numbers: under 40 MiB beyond a run of 300 steps.
    The control keeps the numbers."""
    assert alone(records, False) < 40 and alone(records, True) > 150


class Block(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        first = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()
        self.path = nn.Sequential(*first, nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b))
        short = nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b)
        self.short = nn.Identity() if a == b else nn.Sequential(*short)

    def forward(self, x):
        return F.relu(self.path(x) + self.short(x))


def resnet18():
    layers, a = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()], 64
    for b in (64, 128, 256, 512):
        layers += [Block(a, b, 1 if a == b else 2), Block(b, b, 1)]
        a = b
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def pictures(n):
    return torch.randn(n, 3, 16, 16), torch.arange(n) % 10


def sam(net):
    return optim.SAM(net.parameters(), torch.optim.SGD, rho=0.05, lr=0.05, momentum=0.9)


def times_of_training(whole):
    "The peak of a diagnosis over that of three steps of SAM"

    def look(net, optimizer, data, size):
        how = dict(batch_size=size, budget_s=600, effort=50, progress=False)
        return diagnosis.diagnose_training(net, F.cross_entropy, data, optimizer, **how)

    small = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(784, 10)
    )
    look(small, sam(small), pictures(16), 4)  # what torch and the library load at their first use
    before = peak()
    net = resnet18()
    assert sum(p.numel() for p in net.parameters()) == 11_173_962
    X, y = pictures(256)
    optimizer = sam(net)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(X[:64]), y[:64])
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    training = peak() - before
    if whole:
        long_vectors.LARGE = 10**9  # all vectors at their length, in double precision
    look(net, optimizer, (X, y), 64)
    return (peak() - before) / training


@pytest.mark.slow
def test_memory_of_a_diagnosis(alone):
    """A ResNet-18 with batch norm in training mode, in minibatches of 64 pictures of 16 × 16: at most 4 times what training by SAM with
    momentum takes. The control keeps the vectors whose sketches are enough."""
    assert alone(times_of_training, False) < 4 < alone(times_of_training, True)
