"""What samsde is measured against: each contestant is a function that does the whole job once.

`python benchmarks/peers.py ENV` serves the contestants of an environment: a line `{"name": ..., "size": ...}` on standard input is one run, and the
answer is a line `{"seconds": ...}`. What is compiled or built is so before the first run. ENV is "torch" (torchsde, pytorch_optimizer, plain torch) or "jax".
"""
import json
import sys
import time

SIZES = {"full": dict(d=20, paths=10_000, steps=1_000, replicas=100, chain=2_000, train=200),
         "small": dict(d=20, paths=200, steps=20, replicas=4, chain=4, train=4)}
ETA, RHO, SIGMA = .01, .1, .1


def spectrum(d): return [.5 + i / d for i in range(d)]


def torch_contestants(size):
    import numpy as np
    import pytorch_optimizer
    import torch
    import torch.nn.functional as F
    import torchsde
    from sklearn.datasets import load_breast_cancer
    torch.manual_seed(0)
    d, paths, steps, replicas = size["d"], size["paths"], size["steps"], size["replicas"]
    times = torch.linspace(0, steps * ETA, 2)

    class Usam(torch.nn.Module):
        "USAM's SDE on a quadratic with additive noise, as a user of torchsde would write it"
        noise_type, sde_type = "general", "ito"

        def __init__(self, dtype):
            super().__init__()
            self.H = torch.diag(torch.tensor(spectrum(d), dtype=dtype))
            self.B = ETA**.5 * SIGMA * (torch.eye(d, dtype=dtype) + RHO * self.H)

        def f(self, t, y):
            g = y @ self.H
            return -(g + RHO * g @ self.H)

        def g_prod(self, t, y, v): return v @ self.B

        def g(self, t, y): return self.B.expand(len(y), d, d)

    class Increments:
        "Independent Gaussian increments"
        def __init__(self, like): self.like, self.shape, self.levy_area_approximation, self.dtype, self.device = like, like.shape, "none", like.dtype, like.device

        def __call__(self, ta, tb=None, return_U=False, return_A=False): return torch.randn_like(self.like) * (tb - ta)**.5

    def ensemble(dtype, own):
        sde, y0 = Usam(dtype), torch.ones(paths, d, dtype=dtype)
        def run():
            with torch.no_grad(): torchsde.sdeint(sde, y0, times.to(dtype), dt=ETA, method="euler", bm=Increments(y0) if own else None)
        return run

    def limit(dtype):
        "The normals, on two threads with a generator each, and two products: what no simulation can do without"
        from concurrent.futures import ThreadPoolExecutor
        H = torch.diag(torch.tensor(spectrum(d), dtype=dtype))
        def half(seed):
            torch.set_num_threads(1)
            g, n = torch.Generator().manual_seed(seed), paths // 2
            x, xi, a, b = (torch.ones(n, d, dtype=dtype) for _ in range(4))
            for _ in range(steps):
                xi.normal_(generator=g)
                torch.mm(x, H, out=a)
                torch.mm(xi, H, out=b)
        def run():
            threads = torch.get_num_threads()
            with ThreadPoolExecutor(2) as pool: list(pool.map(half, (0, 1)))
            torch.set_num_threads(threads)
        return run

    X, y = load_breast_cancer(return_X_y=True)
    X = torch.from_numpy((X - X.mean(0)) / X.std(0)).float()
    y = torch.from_numpy(2. * y - 1).float()
    def network(): return torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Sigmoid(), torch.nn.Linear(20, 1))
    def loss(out, target): return F.softplus(-target * out[..., 0]).mean()

    def replica_loop(batch):
        "Discrete SAM, one replica after the other, with pytorch_optimizer: a tenth of them, since each takes as long as the others"
        some = max(1, replicas // 10)
        def run():
            for seed in range(some):
                net, g = network(), torch.Generator().manual_seed(seed)
                optimizer = pytorch_optimizer.SAM(net.parameters(), base_optimizer=torch.optim.SGD, rho=.05, lr=.1)
                for _ in range(size["chain"]):
                    i = torch.randint(len(X), (batch,), generator=g)
                    def closure():
                        value = loss(net(X[i]), y[i])
                        value.backward()
                        return value
                    loss(net(X[i]), y[i]).backward()
                    optimizer.step(closure)
                    optimizer.zero_grad()
        run.share = some / replicas
        return run

    def replica_vmap(batch):
        "Discrete SAM, all replicas by torch.func.vmap"
        from torch.func import functional_call, grad, stack_module_state, vmap
        net = network().to("meta")
        def value(params, x, t): return loss(functional_call(net, params, (x,)), t)
        def step(params, x, t):
            g = grad(value)(params, x, t)
            norm = sum(v.square().sum() for v in g.values()).sqrt()
            moved = {k: params[k] + .05 * v / norm for k, v in g.items()}
            return {k: params[k] - .1 * v for k, v in grad(value)(moved, x, t).items()}
        every = vmap(step)
        def run():
            params, _ = stack_module_state([network() for _ in range(replicas)])
            params = {k: v.detach() for k, v in params.items()}
            for _ in range(size["chain"]):
                i = torch.randint(len(X), (replicas, batch))
                params = every(params, X[i], y[i])
        return run

    class Davda54(torch.optim.Optimizer):
        "SAM as github.com/davda54/sam has it (David Samuel, MIT), without its adaptive form"
        def __init__(self, params, base_optimizer, rho, **kwargs):
            super().__init__(params, dict(rho=rho, **kwargs))
            self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
            self.param_groups = self.base_optimizer.param_groups

        @torch.no_grad()
        def first_step(self, zero_grad=False):
            norm = torch.norm(torch.stack([p.grad.norm(p=2) for group in self.param_groups for p in group["params"] if p.grad is not None]), p=2)
            for group in self.param_groups:
                scale = group["rho"] / (norm + 1e-12)
                for p in group["params"]:
                    if p.grad is None: continue
                    self.state[p]["old_p"] = p.data.clone()
                    p.add_(p.grad * scale.to(p))
            if zero_grad: self.zero_grad()

        @torch.no_grad()
        def second_step(self, zero_grad=False):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None: p.data = self.state[p]["old_p"]
            self.base_optimizer.step()
            if zero_grad: self.zero_grad()

    def optimizer_steps(kind, large):
        "Training steps of a convolutional network with a million parameters, or of a tiny network"
        if large: net, x, t = torch.nn.Sequential(torch.nn.Conv2d(1, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(2048, 500), torch.nn.ReLU(),
                                                  torch.nn.Linear(500, 10)), torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
        else: net, x, t = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)), torch.randn(32, 8), torch.randint(4, (32,))
        if kind == "samsde":
            from samsde.optim import SAM
            optimizer = SAM(net.parameters(), torch.optim.SGD, rho=.05, lr=.01, momentum=.9)
        elif kind == "davda54": optimizer = Davda54(net.parameters(), torch.optim.SGD, rho=.05, lr=.01, momentum=.9)
        elif kind.startswith("pytorch_optimizer"):
            optimizer = pytorch_optimizer.SAM(net.parameters(), base_optimizer=torch.optim.SGD, rho=.05, foreach="foreach" in kind, lr=.01, momentum=.9)
        else: optimizer = torch.optim.SGD(net.parameters(), lr=.01, momentum=.9)
        def closure():
            optimizer.zero_grad()
            value = F.cross_entropy(net(x), t)
            value.backward()
            return value
        def run():
            for _ in range(max(1, size["train"] // (10 if large else 1))):
                if kind == "samsde": optimizer.step(closure)
                elif kind.startswith("pytorch_optimizer"):
                    closure()
                    optimizer.step(closure)
                elif kind == "davda54":
                    closure()
                    optimizer.first_step(zero_grad=True)
                    closure()
                    optimizer.second_step(zero_grad=True)
                else:
                    for _ in range(2):
                        closure()
                        optimizer.step()
        return run

    names = {"float32": torch.float32, "float64": torch.float64}
    contestants = {f"torchsde, iid, {n}": lambda t=t: ensemble(t, True) for n, t in names.items()}
    contestants |= {f"limit, {n}": lambda t=t: limit(t) for n, t in names.items()} | {"torchsde, default, float32": lambda: ensemble(torch.float32, False)}
    contestants |= {f"replica loop, B = {b}": lambda b=b: replica_loop(b) for b in (1, 32)} | {f"replica vmap, B = {b}": lambda b=b: replica_vmap(b) for b in (1, 32)}
    contestants |= {f"{kind}, {'large' if large else 'tiny'}": lambda kind=kind, large=large: optimizer_steps(kind, large)
                    for kind in ("samsde", "two steps of SGD", "pytorch_optimizer", "pytorch_optimizer foreach", "davda54") for large in (True, False)}
    return contestants


def jax_contestants(size):
    import diffrax
    import jax
    import jax.numpy as jnp
    d, paths, steps = size["d"], size["paths"], size["steps"]
    H = jnp.diag(jnp.array(spectrum(d), dtype=jnp.float32))
    B = ETA**.5 * SIGMA * (jnp.eye(d) + RHO * H)
    y0 = jnp.ones((paths, d), dtype=jnp.float32)
    def field(t, y, args):
        g = y @ H
        return -(g + RHO * g @ H)

    def by_diffrax(key):
        def one(key, y):
            path = diffrax.UnsafeBrownianPath(shape=(d,), key=key)
            terms = diffrax.MultiTerm(diffrax.ODETerm(field), diffrax.ControlTerm(lambda t, y, args: B, path))
            return diffrax.diffeqsolve(terms, diffrax.Euler(), 0., steps * ETA, ETA, y, adjoint=diffrax.ForwardMode(), max_steps=None,
                                       stepsize_controller=diffrax.ConstantStepSize()).ys[-1]
        return jax.vmap(one)(jax.random.split(key, paths), y0)

    def by_scan(key):
        def step(y, key): return y + ETA * field(0, y, None) + ETA**.5 * jax.random.normal(key, y.shape) @ B, None
        return jax.lax.scan(step, y0, jax.random.split(key, steps))[0]

    def compiled(f):
        run, key = jax.jit(f), jax.random.key(0)
        run(key).block_until_ready()
        return lambda: run(key).block_until_ready()
    return {"diffrax, float32": lambda: compiled(by_diffrax), "jax scan, float32": lambda: compiled(by_scan)}


def main(env):
    built = {}
    for line in sys.stdin:
        order = json.loads(line)
        key = order["name"], order["size"]
        try:
            if key not in built:
                contestants = {"torch": torch_contestants, "jax": jax_contestants}[env](SIZES[order["size"]])
                built[key] = contestants[order["name"]]()
            start = time.perf_counter()
            built[key]()
            seconds = (time.perf_counter() - start) / getattr(built[key], "share", 1)
            print(json.dumps({"seconds": seconds}), flush=True)
        except Exception as error: print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)


if __name__ == "__main__": main(sys.argv[1])
