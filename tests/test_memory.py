"Memory: of a network in chunks, of a simulation with many records, and of a diagnosis beside training."
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a program's peak from /proc")

MEASURE = """
import sys
import torch
from samsde.algorithm import SAM
from samsde.implicit_regularizer import drift
from samsde.objective import FiniteSum
from samsde.sde import SDE

torch.set_num_threads(1)
chunk = int(sys.argv[1]) or None
X, y = torch.randn(8000, 88), torch.randint(10, (8000,))
net = torch.nn.Sequential(torch.nn.Linear(88, 1000), torch.nn.Tanh(), torch.nn.Linear(1000, 10))
small = FiniteSum.from_module(torch.nn.Linear(88, 10), torch.nn.CrossEntropyLoss(), X[:60], y[:60])
drift(SAM(.1), small, small.x0)  # what torch and the library load at their first use
def peak():  # of this program alone, while ru_maxrss begins at that of the one that started it
    with open("/proc/self/status") as f: words = next(line for line in f if line.startswith("VmHWM")).split()
    return int(words[1]) / 1024
before = peak()
objective = FiniteSum.from_module(net, torch.nn.CrossEntropyLoss(), X, y, batch_size=100, chunk=chunk)
assert objective.dim == 99_010
made = peak() - before
drift(SAM(.1), objective, objective.x0, draws=8)
objective.grad(objective.x0)
objective.sample_hvp(objective.x0, torch.arange(100)[None], objective.x0)
print(made, peak() - before)
"""


def grown(chunk):
    "MiB beyond the start: after construction, and after a drift with drawn minibatches, a gradient and a product"
    done = subprocess.run([sys.executable, "-c", MEASURE, str(chunk)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


def test_memory_of_a_network_in_chunks():
    """8,000 samples and 99,010 parameters: under 250 MiB with chunk=50. The control has no chunk."""
    made, used = grown(50)
    assert used < 250 and made < 250 < grown(0)[1]


RECORDS = """
import sys
import torch
from samsde.algorithm import SAM, Chain
from samsde.ensemble import simulate
from samsde.objective import Quadratic

torch.set_num_threads(1)
chain, start = Chain(SAM(.1), Quadratic(torch.diag(torch.linspace(.5, 1.5, 20)), .1), .01), torch.ones(20)
def peak():  # of this program alone, while ru_maxrss begins at that of the one that started it
    with open("/proc/self/status") as f: words = next(line for line in f if line.startswith("VmHWM")).split()
    return int(words[1]) / 1024
simulate(chain, start, 3., 3_000)  # what is loaded at the first use, and a record of the step
before = peak()
simulate(chain, start, 10., 3_000, keep=sys.argv[1] == "keep")
print(peak() - before)
"""


def test_memory_of_records():
    """The point of 3,000 paths at each of 1,000 steps, 240 MB of numbers: under 40 MiB beyond a run of 300 steps.
    The control keeps the numbers."""
    def grown(what):
        done = subprocess.run([sys.executable, "-c", RECORDS, what], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)
    assert grown("moments") < 40 and grown("keep") > 150


DIAGNOSIS = """
import sys
import torch
import torch.nn.functional as F
from torch import nn
from samsde import diagnosis, optim

torch.set_num_threads(1)
class Block(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        first = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()
        self.path = nn.Sequential(*first, nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b))
        short = nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b)
        self.short = nn.Identity() if a == b else nn.Sequential(*short)
    def forward(self, x): return F.relu(self.path(x) + self.short(x))
def resnet18():
    layers, a = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()], 64
    for b in (64, 128, 256, 512):
        layers += [Block(a, b, 1 if a == b else 2), Block(b, b, 1)]
        a = b
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
def data(n): return torch.randn(n, 3, 16, 16), torch.arange(n) % 10
def step(net, optimizer, X, y):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(X), y)
        loss.backward()
        return loss
    return optimizer.step(closure)
def sam(net): return optim.SAM(net.parameters(), torch.optim.SGD, rho=.05, lr=.05, momentum=.9)
def peak():  # of this program alone, while ru_maxrss begins at that of the one that started it
    with open("/proc/self/status") as f: words = next(line for line in f if line.startswith("VmHWM")).split()
    return int(words[1]) / 1024
def look(net, optimizer, data, size):
    return diagnosis.diagnose_training(net, F.cross_entropy, data, optimizer, batch_size=size, budget_s=600, effort=50, progress=False)
small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(784, 10))
look(small, sam(small), data(16), 4)  # what torch and the library load at their first use
before = peak()
net = resnet18()
assert sum(p.numel() for p in net.parameters()) == 11_173_962
X, y = data(256)
optimizer = sam(net)
for k in range(3): step(net, optimizer, X[64 * k:64 * k + 64], y[64 * k:64 * k + 64])
training = peak() - before
if sys.argv[1] == "whole": diagnosis.LARGE = 10**9  # all vectors at their length, in double precision
look(net, optimizer, (X, y), 64)
print((peak() - before) / training)
"""


def test_memory_of_a_diagnosis(request):
    """A ResNet-18 with batch norm in training mode, in minibatches of 64 pictures of 16 × 16: at most 4 times what training by SAM with
    momentum takes. The control keeps the vectors whose sketches are enough."""
    if not request.config.getoption("slow"): pytest.skip("a minute; run with --slow")
    def times(what):
        done = subprocess.run([sys.executable, "-c", DIAGNOSIS, what], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)
    ours, whole = times("sketches"), times("whole")
    assert ours < 4 < whole
