"""A step of samsde.optim.SAM beside two steps of SGD, in CPU time: `python benchmarks/optim_speed.py [rounds]`.

Interleaved; a ratio is the median over the rounds, with its quartiles. Also beside are its operations written out
without options and checks, a SAM of sixty lines as people copy it, and pytorch_optimizer's where it is installed."""
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

from samsde import optim


class Copied(torch.optim.Optimizer):
    "SAM in the form of davda54/sam"
    def __init__(self, params, base_optimizer, rho=.05, **kwargs):
        super().__init__(params, dict(rho=rho, **kwargs))
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        scale = .05 / (torch.norm(torch.stack([p.grad.norm(p=2) for p in params]), p=2) + 1e-12)
        for p in params:
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad * scale)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None: p.data = self.state[p]["old_p"]
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        closure()
        self.first_step()
        closure()
        self.second_step()


class WrittenOut:
    "The operations of a step for these parameters alone, with one restored generator: no options, no checks, no way back"
    def __init__(self, params, base_optimizer, rho=.05, **kwargs):
        self.params, self.rho = list(params), rho
        self.copies = [torch.empty_like(p) for p in self.params]
        self.base = base_optimizer(self.params, **kwargs)
        self.zero_grad = self.base.zero_grad

    def step(self, closure):
        random = torch.get_rng_state()
        closure()
        with torch.no_grad():
            grads = [p.grad for p in self.params]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))).item()
            torch._foreach_copy_(self.copies, self.params)
            torch._foreach_add_(self.params, grads, alpha=self.rho / norm)
        torch.set_rng_state(random)
        closure()
        with torch.no_grad(): torch._foreach_copy_(self.params, self.copies)
        self.base.step()


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(100, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0., batch_first=True)
        self.layers, self.top = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 10)

    def forward(self, x): return self.top(self.layers(self.words(x)).mean(1))


def conv(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())


def network(name):
    "A network, its inputs and targets"
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "tiny MLP": net, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(16, 8, generator=generator)
        if name == "wide MLP": net, x = nn.Sequential(nn.Linear(64, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 4)), torch.randn(64, 64, generator=generator)
        if name == "transformer": net, x = Transformer(), torch.randint(100, (16, 16), generator=generator)
        if name == "conv net": net, x = nn.Sequential(conv(1, 16), conv(16, 32), nn.MaxPool2d(2), conv(32, 32), nn.Flatten(), nn.Linear(32 * 16, 4)), torch.randn(32, 1, 8, 8, generator=generator)
    return net, x, torch.randint(4, (len(x),), generator=generator)


def contestants(name):
    "What takes one step of SAM, or two of SGD, by name"
    found = {}

    def add(contestant, make, both):
        net, x, y = network(name)
        optimizer = make(net.parameters())

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        def twice():
            optimizer.step(closure)
            optimizer.step(closure)

        found[contestant] = twice if both else lambda: optimizer.step(closure)

    how = dict(lr=1e-3, momentum=.9)
    add("two steps of SGD", lambda params: torch.optim.SGD(params, **how), True)
    add("samsde", lambda params: optim.SAM(params, torch.optim.SGD, rho=.05, **how), False)
    add("written out", lambda params: WrittenOut(params, torch.optim.SGD, rho=.05, **how), False)
    add("copied", lambda params: Copied(params, torch.optim.SGD, rho=.05, **how), False)
    try: from pytorch_optimizer import SAM
    except ImportError: return found
    class WithBothPasses(SAM): # the pass at x is left to the loop there
        def step(self, closure):
            closure()
            super().step(closure)
    add("pytorch_optimizer", lambda params: WithBothPasses(params, torch.optim.SGD, rho=.05, **how), False)
    return found


def seconds(step, steps):
    start = time.process_time()
    for _ in range(steps): step()
    return (time.process_time() - start) / steps


def main(rounds=15):
    torch.set_num_threads(1)
    for name in ("tiny MLP", "wide MLP", "transformer", "conv net"):
        steps = contestants(name)
        count = max(3, round(.15 / seconds(steps["two steps of SGD"], 5)))
        for step in steps.values(): seconds(step, count)
        ratios = {contestant: [] for contestant in steps}
        for k in range(rounds):
            order = [*steps][k % len(steps):] + [*steps][:k % len(steps)]
            taken = {contestant: seconds(steps[contestant], count) for contestant in order}
            for contestant, t in taken.items(): ratios[contestant].append(t / taken["two steps of SGD"])
        for contestant, values in ratios.items():
            low, median, high = statistics.quantiles(values, n=4)
            if contestant != "two steps of SGD": print(f"{name:12} {contestant:18} {median:.3f} ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
