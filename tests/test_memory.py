"Memory: of a network in chunks, and of a simulation with many records."
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
