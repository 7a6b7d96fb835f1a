"Memory: of a network in chunks, and of a simulation with many records."
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from samsde.algorithm import SAM, Chain
from samsde.ensemble import simulate
from samsde.implicit_regularizer import drift
from samsde.objective import FiniteSum, Quadratic

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a program's peak from /proc")


@pytest.fixture
def alone(processes):
    "What a function returns in a new process, of one thread"
    def run(function, *arguments):
        with ProcessPoolExecutor(1, processes, torch.set_num_threads, (1,)) as pool: return pool.submit(function, *arguments).result()
    return run


def peak():
    "MiB, of this process alone, while ru_maxrss begins at that of the one that started it"
    with open("/proc/self/status") as f: words = next(line for line in f if line.startswith("VmHWM")).split()
    return int(words[1]) / 1024


def network(chunk):
    "MiB beyond the start: after construction, and after a drift with drawn minibatches, a gradient and a product"
    X, y = torch.randn(8000, 88), torch.randint(10, (8000,))
    net = torch.nn.Sequential(torch.nn.Linear(88, 1000), torch.nn.Tanh(), torch.nn.Linear(1000, 10))
    small = FiniteSum.from_module(torch.nn.Linear(88, 10), torch.nn.CrossEntropyLoss(), X[:60], y[:60])
    drift(SAM(.1), small, small.x0)  # what torch and the library load at their first use
    before = peak()
    objective = FiniteSum.from_module(net, torch.nn.CrossEntropyLoss(), X, y, batch_size=100, chunk=chunk)
    assert objective.dim == 99_010
    made = peak() - before
    drift(SAM(.1), objective, objective.x0, draws=8)
    objective.grad(objective.x0)
    objective.sample_hvp(objective.x0, torch.arange(100)[None], objective.x0)
    return made, peak() - before


def test_memory_of_a_network_in_chunks(alone):
    """8,000 samples and 99,010 parameters: under 250 MiB with chunk=50. The control has no chunk."""
    made, used = alone(network, 50)
    assert used < 250 and made < 250 < alone(network, None)[1]


def records(keep):
    "MiB beyond a run of 300 steps"
    chain, start = Chain(SAM(.1), Quadratic(torch.diag(torch.linspace(.5, 1.5, 20)), .1), .01), torch.ones(20)
    simulate(chain, start, 3., 3_000)  # what is loaded at the first use, and a record of the step
    before = peak()
    simulate(chain, start, 10., 3_000, keep=keep)
    return peak() - before


def test_memory_of_records(alone):
    """The point of 3,000 paths at each of 1,000 steps, 240 MB of numbers: under 40 MiB beyond a run of 300 steps.
    The control keeps the numbers."""
    assert alone(records, False) < 40 and alone(records, True) > 150
