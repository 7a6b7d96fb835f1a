"""The optimizers where frameworks and users have met trouble with SAM: against a plain loop, written with torch alone, and with a control each."""

import copy
import functools
import math
import pickle
import random
import signal
import textwrap
import time
import traceback
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import samsde.algorithm
from samsde import optim
from samsde.optim import DNSAM, SAM, USAM, LinearRho, frozen_statistics, full_gradient_norm

SGD = torch.optim.SGD
X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
y = torch.randint(3, (12,), generator=torch.Generator().manual_seed(1))


def make(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
        ).double()


def flat(params):
    return torch.cat([p.detach().flatten() for p in params])


def loss_of(net):
    return F.cross_entropy(net(X), y)


def closure_of(net, optimizer, loss=loss_of):
    def closure():
        optimizer.zero_grad()
        value = loss(net)
        value.backward()
        return value

    return closure


def plain_sam(net, base, rho, steps, normalise=True, loss=loss_of, sign=1):
    "SAM by torch alone: a loop over parameters"
    params = list(net.parameters())
    for _ in range(steps):
        grads = torch.autograd.grad(loss(net), params)
        size = (
            math.sqrt(sum(g.abs().double().square().sum().item() for g in grads))
            if normalise
            else 1
        )
        old = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, g in zip(params, grads):
                p.add_(sign * rho * g / size)
        second = torch.autograd.grad(loss(net), params)
        with torch.no_grad():
            for p, o in zip(params, old):
                p.copy_(o)
        for p, g in zip(params, second):
            p.grad = g
        base.step()
    return flat(net.parameters())


def ours(kind, base, rho=0.1, steps=3, loss=loss_of, net=None, **settings):
    net = make() if net is None else net
    optimizer = kind(net.parameters(), base, rho=rho, **settings)
    for _ in range(steps):
        optimizer.step(closure_of(net, optimizer, loss))
    return flat(net.parameters())


def near(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# --- options of the base optimizer ---


def test_adadelta_keeps_its_own_rho():
    net = make()
    near(
        ours(SAM, torch.optim.Adadelta, lr=1.0),
        plain_sam(net, torch.optim.Adadelta(net.parameters(), lr=1.0), 0.1, 3),
    )
    other = make()
    assert (
        flat(net.parameters())
        - plain_sam(other, torch.optim.Adadelta(other.parameters(), lr=1.0, rho=0.1), 0.1, 3)
    ).abs().max() > 1e-4
    optimizer = SAM(
        net.parameters(), functools.partial(torch.optim.Adadelta, rho=0.7), rho=0.2, lr=1.0
    )
    assert optimizer.param_groups[0]["rho"] == 0.7 and optimizer.param_groups[0]["sam_rho"] == 0.2
    optimizer.add_param_group(dict(params=[torch.nn.Parameter(torch.ones(1))], rho=0.3))
    assert optimizer.param_groups[1]["rho"] == 0.7 and optimizer.param_groups[1]["sam_rho"] == 0.3
    LinearRho(optimizer, 0.5, 1, 2)
    assert optimizer.param_groups[0]["sam_rho"] == 0.1 and optimizer.param_groups[0]["rho"] == 0.7


@pytest.mark.parametrize("kind", [SAM, USAM])
def test_maximize_is_sam_on_minus_the_loss(kind):
    near(
        ours(kind, SGD, lr=0.1, maximize=True),
        ours(kind, SGD, lr=0.1, loss=lambda net: -loss_of(net)),
    )
    net = make()
    wrong = plain_sam(
        net, SGD(net.parameters(), lr=0.1, maximize=True), 0.1, 3, kind is SAM
    )  # climbs, perturbed downhill
    assert (ours(kind, SGD, lr=0.1, maximize=True) - wrong).abs().max() > 1e-4


@pytest.mark.parametrize("rho", [np.float32(0.1), np.float64(0.1), np.int64(1), 1])
def test_radius_may_be_a_scalar_of_numpy(rho):
    near(ours(SAM, SGD, rho=rho, lr=0.1), ours(SAM, SGD, rho=float(rho), lr=0.1))
    with pytest.raises(TypeError, match="got bool"):
        SAM(make().parameters(), SGD, rho=np.bool_(True), lr=0.1)


# --- sizes and dtypes ---


@pytest.mark.parametrize(
    "dtype, sizes",
    [
        (torch.float32, (1e-40, 1e-30, 1e-25, 1.0, 1e20, 1e25, 1e30, 1e37)),
        (torch.float64, (1e-300, 1e-200, 1e200, 1e300)),
        (torch.bfloat16, (1e-30, 1e30)),
        (torch.float16, (6e-5, 6e4)),
        (torch.complex64, (1e-25, 1e30)),
    ],
)
def test_perturbation_has_length_rho_at_any_size_of_the_gradient(dtype, sizes):
    for size in sizes:
        params = [
            torch.nn.Parameter(torch.zeros(3, dtype=dtype)),
            torch.nn.Parameter(torch.zeros(2, 2, dtype=dtype)),
        ]
        for p in params:
            p.grad = torch.full_like(p, size)
        SAM(params, SGD, rho=0.5, lr=0.1).first_step()
        moved = math.hypot(*(p.detach().abs().double().norm().item() for p in params))
        assert moved == pytest.approx(
            0.5, rel=max(1e-6, 2 * torch.finfo(dtype).eps) if size > 1e-39 else 1e-3
        ), size


def test_usam_of_a_huge_scale_is_exact():
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.full_like(p, 1e-37)
    USAM([p], SGD, rho=1e36, lr=0.1).first_step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.1))


@pytest.mark.parametrize("adaptive", [False, True])
def test_parameters_of_several_dtypes(adaptive):
    generator = torch.Generator().manual_seed(0)
    dtypes = torch.float64, torch.float32, torch.complex64, torch.complex128, torch.bfloat16
    params = [
        torch.nn.Parameter(
            torch.randn(
                4, dtype=torch.float32 if d is torch.bfloat16 else d, generator=generator
            ).to(d)
        )
        for d in dtypes
    ]
    for p in params:
        p.grad = torch.randn(
            4, dtype=torch.float32 if p.dtype is torch.bfloat16 else p.dtype, generator=generator
        ).to(p.dtype)
    wide = [p.detach().clone().to(torch.complex128) for p in params]
    grads = [p.grad.to(torch.complex128) for p in params]
    sizes = [w.abs() if adaptive else torch.ones(4, dtype=torch.float64) for w in wide]
    n = torch.cat([s * g for s, g in zip(sizes, grads)]).norm()
    optimizer = SAM(params, SGD, rho=0.3, adaptive=adaptive, lr=0.1)
    optimizer.first_step()
    for p, w, s, g in zip(params, wide, sizes, grads):
        torch.testing.assert_close(
            p.detach().to(torch.complex128),
            w + 0.3 * s * s * g / n,
            rtol=0,
            atol=6 * torch.finfo(torch.bfloat16 if adaptive else p.dtype).eps,
        )
    optimizer.restore()
    for p, w in zip(params, wide):
        assert p.detach().to(torch.complex128).equal(w)


def test_a_complex_network_is_the_plain_loop():
    def net():
        w = torch.nn.ParameterList(
            [torch.nn.Parameter(torch.tensor([1 + 2j, 0.5 - 1j]).to(torch.complex128))]
        )
        w.append(torch.nn.Parameter(torch.tensor([0.3], dtype=torch.float64)))
        return w

    def loss(w):
        return ((w[0] * (2 - 1j)).abs() ** 2 * w[1]).sum() + w[0].real.pow(4).sum()

    one, two = net(), net()
    optimizer = SAM(one.parameters(), SGD, rho=0.1, lr=0.01)
    for _ in range(3):
        optimizer.step(closure_of(one, optimizer, loss))
    plain_sam_of_parts(two, loss, 0.1, 0.01, 3)
    for p, q in zip(one, two):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def plain_sam_of_parts(net, loss, rho, eta, steps):
    params = list(net.parameters())
    for _ in range(steps):
        grads = torch.autograd.grad(loss(net), params)
        size = math.hypot(*(g.norm().item() for g in grads))
        with torch.no_grad():
            old = [p.clone() for p in params]
            for p, g in zip(params, grads):
                p += rho * g / size
        second = torch.autograd.grad(loss(net), params)
        with torch.no_grad():
            for p, o, g in zip(params, old, second):
                p.copy_(o - eta * g)


def test_a_step_in_low_precision_leaves_nothing_behind():
    "As many steps after net.float() as without the step before it."
    nets = [make().bfloat16() for _ in range(2)]
    optimizers = [SAM(net.parameters(), SGD, lr=1e-3) for net in nets]

    def loss(net):
        return F.cross_entropy(net(X.to(net[0].weight.dtype)), y)

    for k, (net, optimizer) in enumerate(zip(nets, optimizers)):
        if k == 0:
            optimizer.step(closure_of(net, optimizer, loss))
            net.load_state_dict(nets[1].state_dict())
        net.float()
        for _ in range(50):
            optimizer.step(closure_of(net, optimizer, loss))
    near(flat(nets[0].parameters()), flat(nets[1].parameters()), 0)
    assert (flat(nets[0].parameters()) - flat(make().bfloat16().float().parameters())).norm() > 1e-3


# --- interrupts, records ---


class Alarm(Exception):
    pass


def test_no_weight_stays_displaced_where_a_step_is_interrupted():
    "At 200 random moments of steps of five million parameters: x, or a full step from it."
    p = torch.nn.Parameter(torch.randn(5_000_000, generator=torch.Generator().manual_seed(0)))
    q = torch.nn.Parameter(torch.ones(3))
    optimizer, draw = SAM([p, q], SGD, rho=0.5, lr=0.0), random.Random(0)
    before, seen = p.detach().clone(), []

    def closure():
        optimizer.zero_grad()
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        seen.append(p.detach()[0].item() != before[0].item())

    def ring(*_):
        raise Alarm

    old = signal.signal(signal.SIGALRM, ring)
    try:
        duration, interrupted, tries = 0.1, 0, 0
        while interrupted < 200 and tries < 2000:
            tries += 1
            try:
                start = time.perf_counter()
                signal.setitimer(signal.ITIMER_REAL, duration * draw.uniform(0.02, 1.1))
                optimizer.step(closure)
                signal.setitimer(signal.ITIMER_REAL, 0)
                duration = time.perf_counter() - start
            except Alarm:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert p.equal(before) and q.equal(torch.ones(3))
            assert not optimizer.is_perturbed and torch.is_grad_enabled()
    finally:
        signal.signal(signal.SIGALRM, old)
        torch.set_grad_enabled(True)
    assert interrupted == 200 and any(seen)


def test_first_step_that_fails_has_not_moved():
    net = make()
    loss_of(net).backward()
    for scale in (lambda terms: 1 / 0, lambda terms: "x"):
        optimizer = SAM(net.parameters(), SGD, lr=0.1)
        optimizer.scale = scale
        with pytest.raises((ZeroDivisionError, TypeError)):
            optimizer.first_step()
        near(flat(net.parameters()), flat(make().parameters()), 0)
        assert not optimizer.is_perturbed


def test_an_outer_object_built_anew_finds_what_has_moved():
    net = make()
    base = SGD(net.parameters(), lr=0.1)
    one = SAM(net.parameters(), lambda groups: base)
    loss_of(net).backward()
    one.first_step(zero_grad=True)
    two = SAM(net.parameters(), lambda groups: base)
    assert two.is_perturbed
    loss_of(net).backward()
    two.second_step()
    other = make()
    near(flat(net.parameters()), plain_sam(other, SGD(other.parameters(), lr=0.1), 0.05, 1))


def test_a_copy_in_the_middle_of_a_step_can_finish_it():
    net = make()
    optimizer = SAM(net.parameters(), SGD, lr=0.1, momentum=0.9)
    loss_of(net).backward()
    optimizer.first_step(zero_grad=True)
    for twin, copied in (
        copy.deepcopy((net, optimizer)),
        pickle.loads(pickle.dumps((net, optimizer))),
    ):
        assert copied.is_perturbed
        loss_of(twin).backward()
        copied.second_step()
        near(flat(twin.parameters()), ours(SAM, SGD, rho=0.05, steps=1, lr=0.1, momentum=0.9))
    assert optimizer.is_perturbed


def test_memory_of_copies_is_released():
    net = make()
    optimizer = SAM(net.parameters(), SGD, lr=0.1)
    optimizer.step(closure_of(net, optimizer))
    held = [weakref.ref(c) for c in optimizer.displacement.copies]
    assert len(held) == 4
    optimizer.param_groups[0]["params"] = list(net[2].parameters())  # the first layer leaves
    optimizer.zero_grad()
    optimizer.step(closure_of(net, optimizer))
    assert [ref() is not None for ref in held] == [False, False, True, True]
    optimizer.release()
    assert not any(ref() for ref in held)
    loss_of(net).backward()
    optimizer.first_step()
    with pytest.raises(ValueError, match="until second_step or restore"):
        optimizer.release()


def test_the_copy_of_dnsam_reads_the_copied_network():
    net = make()
    optimizer = DNSAM(
        net.parameters(), SGD, full_grad_norm=full_gradient_norm(net, F.cross_entropy, X, y), lr=0.1
    )
    twin, copied = copy.deepcopy((net, optimizer))
    with torch.no_grad():
        net[0].weight.mul_(3)
    assert (
        copied.full_grad_norm()
        == full_gradient_norm(make(), F.cross_entropy, X, y)()
        != optimizer.full_grad_norm()
    )
    with pytest.raises(TypeError, match="norm of the old network"):
        copy.deepcopy(DNSAM(net.parameters(), SGD, full_grad_norm=lambda: 1.0, lr=0.1))


# --- checkpoints, hooks, torch.compile ---


@pytest.mark.parametrize("base", [SGD, torch.optim.AdamW])
def test_a_checkpoint_of_the_plain_optimizer_continues(base):
    settings = dict(lr=0.05) | (dict(momentum=0.9) if base is SGD else {})
    net = make()
    plain = base(net.parameters(), **settings)
    for _ in range(3):
        plain.step(closure_of(net, plain))
    saved = copy.deepcopy(plain.state_dict())
    twin = copy.deepcopy(net)
    optimizer = SAM(net.parameters(), base, rho=0.3, adaptive=False, lr=7.0)
    optimizer.load_state_dict(copy.deepcopy(saved))
    optimizer.step(closure_of(net, optimizer))
    other = base(twin.parameters(), **settings)
    other.load_state_dict(copy.deepcopy(saved))
    near(flat(net.parameters()), plain_sam(twin, other, 0.3, 1))
    assert optimizer.param_groups[0]["rho"] == 0.3 and optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("flatten", [False, True])
def test_state_dicts_of_distributed_checkpoints(flatten):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    net = make()
    optimizer = SAM(net.parameters(), torch.optim.AdamW, rho=0.3, lr=0.05)
    before = flat(net.parameters())
    get_optimizer_state_dict(
        net, optimizer, options=options
    )  # of a fresh one: torch steps with zero gradients
    near(flat(net.parameters()), before, 0)
    for _ in range(2):
        optimizer.step(closure_of(net, optimizer))
    saved = copy.deepcopy(
        (net.state_dict(), get_optimizer_state_dict(net, optimizer, options=options))
    )
    twin = make(seed=3)
    twin.load_state_dict(saved[0])
    other = SAM(twin.parameters(), torch.optim.AdamW, rho=0.1, lr=0.9)
    set_optimizer_state_dict(twin, other, saved[1], options=options)
    for n, o in ((net, optimizer), (twin, other)):
        o.step(closure_of(n, o))
    near(flat(net.parameters()), flat(twin.parameters()), 0)
    assert other.param_groups[0]["rho"] == 0.3


def test_hooks_are_called_once_a_step():
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    net, calls = make(), []
    optimizer = SAM(net.parameters(), SGD, lr=0.1)
    handles = [
        optimizer.register_step_pre_hook(lambda o, a, k: calls.append("pre")),
        optimizer.register_step_post_hook(lambda o, a, k: calls.append("post")),
        optimizer.base_optimizer.register_step_pre_hook(lambda o, a, k: calls.append("base pre")),
        register_optimizer_step_pre_hook(lambda o, a, k: calls.append("all pre")),
        register_optimizer_step_post_hook(lambda o, a, k: calls.append("all post")),
    ]
    once = ["all post", "all pre", "base pre", "post", "pre"]
    optimizer.step(closure_of(net, optimizer))
    assert sorted(calls) == once and calls[0] == "pre" and calls[-1] == "post"
    calls.clear()
    loss_of(net).backward()
    optimizer.first_step(zero_grad=True)
    assert not calls
    loss_of(net).backward()
    optimizer.second_step()
    assert sorted(calls) == once
    for handle in handles:
        handle.remove()


def test_a_pre_hook_may_replace_the_closure():
    net = make()
    optimizer = SAM(net.parameters(), SGD, rho=0.1, lr=0.1)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, closure_of(net, o)), kwargs))
    for _ in range(3):
        optimizer.step(lambda: 1 / 0)
    near(flat(net.parameters()), ours(SAM, SGD, lr=0.1))


def test_schedulers_see_the_step():
    import warnings

    for inner in (False, True):
        net = make()
        optimizer = SAM(net.parameters(), SGD, lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(
            optimizer.base_optimizer if inner else optimizer, 1, 0.5
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
            optimizer.step(closure_of(net, optimizer))
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("form", ["closure", "phases"])
def test_inside_of_a_compiled_function(form):
    net = make()
    optimizer = SAM(net.parameters(), SGD, rho=0.1, lr=0.1, momentum=0.9)

    def step():
        if form == "closure":
            return optimizer.step(closure_of(net, optimizer))
        loss_of(net).backward()
        optimizer.first_step(zero_grad=True)
        loss_of(net).backward()
        optimizer.second_step(zero_grad=True)

    compiled = torch.compile(step, backend="eager")
    for _ in range(4):
        compiled()
    near(flat(net.parameters()), ours(SAM, SGD, steps=4, lr=0.1, momentum=0.9))
    assert not optimizer.is_perturbed


def test_a_compiled_network():
    net = make()
    compiled = torch.compile(net, backend="aot_eager")
    optimizer = SAM(net.parameters(), SGD, rho=0.1, lr=0.1)
    for _ in range(3):
        optimizer.step(closure_of(compiled, optimizer))
    near(flat(net.parameters()), ours(SAM, SGD, lr=0.1))


# --- randomness, wrappers ---


def test_same_randomness_needs_both_phases():
    net = make()
    optimizer = SAM(net.parameters(), SGD, lr=0.1)

    def phase(step, inside):
        for _ in range(inside):
            with optimizer.same_randomness():
                (loss_of(net) / max(inside, 1)).backward()
        if not inside:
            loss_of(net).backward()
        step(zero_grad=True)

    for first, second in ((1, 0), (0, 1), (2, 1)):
        phase(optimizer.first_step, first)
        with pytest.raises(ValueError, match="as often in both"):
            phase(optimizer.second_step, second)
        optimizer.restore()
        optimizer.zero_grad()
        near(flat(net.parameters()), flat(make().parameters()), 0)
    phase(optimizer.first_step, 2)
    phase(optimizer.second_step, 2)
    near(flat(net.parameters()), ours(SAM, SGD, rho=0.05, steps=1, lr=0.1))


def test_micro_batches_with_dropout_see_the_same_masks():
    net = torch.nn.Sequential(make(), torch.nn.Dropout(0.5))
    masks = []
    net[1].register_forward_hook(lambda module, args, out: masks.append(out.detach() == 0))
    optimizer = SAM(net.parameters(), SGD, lr=0.1)
    closures = [
        functools.partial(lambda a, t: F.cross_entropy(net(a), t).backward(), a, t)
        for a, t in zip(X.split(4), y.split(4))
    ]
    for perturbation, pairs in (
        ("joined", [(0, 3), (1, 4), (2, 5)]),
        ("own", [(0, 1), (2, 3), (4, 5)]),
    ):
        masks.clear()
        optimizer.step(closures=closures, perturbation=perturbation)
        assert all(masks[a].equal(masks[b]) for a, b in pairs) and not masks[0].equal(
            masks[pairs[1][0]]
        )


def test_a_wrapper_that_steps_with_an_empty_closure_finishes_the_step():
    "As Lightning's does in manual optimization: the wrapper's class inherits ours, and its attributes are its own."

    class Wrapper:
        def __init__(self, optimizer):
            self.wrapped = optimizer
            self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

        def step(self, closure=None):
            return self.wrapped.step(closure or (lambda: None))

        def __getattr__(self, name):
            return getattr(self.wrapped, name)

    net = make()
    optimizer = Wrapper(SAM(net.parameters(), SGD, rho=0.1, lr=0.1))
    for _ in range(3):
        loss_of(net).backward()
        optimizer.first_step(True)
        loss_of(net).backward()
        optimizer.second_step(True)
    near(flat(net.parameters()), ours(SAM, SGD, lr=0.1))


def test_a_closure_that_sets_gradients_to_zero_in_place():
    net = make()
    optimizer = SAM(net.parameters(), SGD, rho=0.1, lr=0.1)

    def closure():
        optimizer.zero_grad(set_to_none=False)
        for part in (slice(0, 6), slice(6, 12)):
            (F.cross_entropy(net(X[part]), y[part]) / 2).backward()

    loss_of(make(1)).backward()
    for _ in range(3):
        (3 * loss_of(net)).backward()  # of no concern to the step
        optimizer.step(closure)
    near(flat(net.parameters()), ours(SAM, SGD, lr=0.1))


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("cleared", ["nowhere", "in one layer", "in place", "everywhere"])
def test_first_gradients_that_were_left(cleared, parts):
    """Gradients at x are never added to those at x + rho u, in however many parts these come."""
    net, other = make(), make()
    optimizer = SAM(net.parameters(), SGD, rho=0.1, lr=0.1)
    loss_of(net).backward()
    optimizer.first_step()
    if cleared == "in one layer":
        net[0].zero_grad()
    elif cleared != "nowhere":
        optimizer.zero_grad(set_to_none=cleared == "everywhere")
    for _ in range(parts):
        (loss_of(net) / parts).backward()
    if cleared in ("in place", "everywhere"):
        optimizer.second_step()
        near(flat(net.parameters()), plain_sam(other, SGD(other.parameters(), lr=0.1), 0.1, 1))
    else:
        with pytest.raises(RuntimeError, match="the gradients at x were not cleared"):
            optimizer.second_step()
        assert flat(net.parameters()).equal(flat(other.parameters()))
    assert not net[0].weight._post_accumulate_grad_hooks


@pytest.mark.parametrize("second", ["again", "skipped"])
def test_interval_in_two_phases(second):
    "In a step that does not perturb, the second pass is at x, and may be left out."
    net = make()
    optimizer = SAM(net.parameters(), SGD, rho=0.1, lr=0.1, interval=2)
    for _ in range(4):
        loss_of(net).backward()
        perturbs = optimizer.perturbs
        again = perturbs or second == "again"
        optimizer.first_step(zero_grad=again)
        if again:
            loss_of(net).backward()
        optimizer.second_step(zero_grad=True)
    near(flat(net.parameters()), ours(SAM, SGD, steps=4, lr=0.1, interval=2))
    assert (flat(net.parameters()) - ours(SAM, SGD, steps=4, lr=0.1)).abs().max() > 1e-5


# --- several processes ---

WORKER = """
import copy, os, warnings
import torch, torch.distributed as dist, torch.nn.functional as F
from samsde.optim import SAM, USAM
X, y, net = torch.load(f"{folder}/data.pt", weights_only=False)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
def closure_of(net, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(X[rank::2]), y[rank::2])
        loss.backward()
        return loss
    return closure
out = None
BODY
if rank == 0: torch.save(out, f"{folder}/out.pt")
dist.barrier()
dist.destroy_process_group()
os._exit(0)
"""


def work(code, rank, folder):
    try:
        exec(code, dict(rank=rank, folder=folder))
    except Exception:
        (folder / f"error{rank}.txt").write_text(traceback.format_exc())
        raise


@pytest.fixture
def two_processes(processes, tmp_path):
    "Runs some lines in two processes, and returns what they call `out` in the first"

    def run(body):
        torch.save([X, y, make()], tmp_path / "data.pt")
        code = WORKER.replace("BODY", textwrap.dedent(body))
        workers = [processes.Process(target=work, args=(code, rank, tmp_path)) for rank in (0, 1)]
        for w in workers:
            w.start()
        for w in workers:
            w.join(200)
        ended = [w.exitcode for w in workers]
        for w in workers:
            w.kill()
        assert ended == [0, 0], [p.read_text() for p in tmp_path.glob("error*.txt")]
        return torch.load(tmp_path / "out.pt", weights_only=False)

    return run


fsdp2 = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6),
    reason="torch.distributed.fsdp.fully_shard came with torch 2.6",
)


@fsdp2
@pytest.mark.parametrize("kind", ["SAM", "USAM"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_fsdp2_is_one_process(two_processes, kind, adaptive):
    length, end = two_processes(f"""
        from torch.distributed.fsdp import fully_shard
        fully_shard(net[0]); fully_shard(net)
        whole = lambda: torch.cat([p.full_tensor().detach().flatten() for p in net.parameters()])
        optimizer = {kind}(net.parameters(), torch.optim.SGD, rho=.2, adaptive={adaptive}, lr=.3, momentum=.9)
        before = whole()
        closure_of(net, optimizer)()
        optimizer.first_step(zero_grad=True)
        length = (whole() - before).norm().item()
        optimizer.restore()
        assert whole().equal(before)
        for _ in range(4): optimizer.step(closure_of(net, optimizer))
        out = length, whole()
        """)
    assert adaptive or kind == "USAM" or abs(length - 0.2) < 1e-12
    near(
        end,
        ours(
            SAM if kind == "SAM" else USAM,
            SGD,
            rho=0.2,
            steps=4,
            adaptive=adaptive,
            lr=0.3,
            momentum=0.9,
        ),
    )


@fsdp2
def test_fsdp2_continues_from_a_distributed_checkpoint(two_processes):
    end = two_processes("""
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
        def build(net, **settings):
            fully_shard(net[0]); fully_shard(net)
            return net, SAM(net.parameters(), torch.optim.AdamW, **settings)
        fresh = copy.deepcopy(net)
        net, optimizer = build(net, rho=.2, lr=.05)
        for _ in range(2): optimizer.step(closure_of(net, optimizer))
        saved = copy.deepcopy(get_state_dict(net, optimizer))
        net, optimizer = build(fresh, rho=.9, lr=.9)
        set_state_dict(net, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1])
        for _ in range(2): optimizer.step(closure_of(net, optimizer))
        out = torch.cat([p.full_tensor().detach().flatten() for p in net.parameters()])
        """)
    near(end, ours(SAM, torch.optim.AdamW, rho=0.2, steps=4, lr=0.05))


@fsdp2
def test_fsdp2_with_a_parameter_that_is_not_sharded(two_processes):
    "A plain parameter is the same in every process, and counts once."
    length = two_processes("""
        from torch.distributed.fsdp import fully_shard
        fully_shard(net[0])
        params = [*net[0].parameters(), *net[2].parameters()]
        whole = lambda: torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten() for p in params])
        before = whole()
        for p in params: p.grad = torch.ones_like(p)
        SAM(params, torch.optim.SGD, rho=.2, lr=.3).first_step()
        out = (whole() - before).norm().item()
        """)
    assert abs(length - 0.2) < 1e-12


@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_is_refused(two_processes, original):
    words = two_processes(f"""
        warnings.simplefilter("ignore")
        from torch.distributed.fsdp import FullyShardedDataParallel
        early = SAM(net.parameters(), torch.optim.SGD, lr=.1)
        net = FullyShardedDataParallel(net, use_orig_params={original}, device_id=torch.device("cpu"))
        out = []
        try: SAM(net.parameters(), torch.optim.SGD, lr=.1)
        except RuntimeError as e: out.append(str(e))
        if {original}:
            try: early.step(closure_of(net, early))
            except RuntimeError as e: out.append(str(e))
        """)
    assert len(words) == 1 + original and all("fully_shard (FSDP2)" in w for w in words)


def test_ddp_with_buckets_as_gradients(two_processes):
    end = two_processes("""
        from torch.nn.parallel import DistributedDataParallel
        net = DistributedDataParallel(net, gradient_as_bucket_view=True)
        optimizer = SAM(net.parameters(), torch.optim.SGD, rho=.1, lr=.1)
        for _ in range(3): optimizer.step(closure_of(net, optimizer))
        out = torch.cat([p.detach().flatten() for p in net.module.parameters()])
        """)
    near(end, ours(SAM, SGD, lr=0.1))


# --- the norm of the whole gradient ---


def test_norm_from_a_loader_with_its_own_generator():
    data = torch.utils.data.TensorDataset(X, y)
    loader = torch.utils.data.DataLoader(
        data, 5, shuffle=True, generator=torch.Generator().manual_seed(3)
    )
    weight = torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64)
    loss = torch.nn.CrossEntropyLoss(weight=weight)
    net = make()
    whole = flat(torch.autograd.grad(loss(net(X), y), list(net.parameters()))).norm().item()
    state = loader.generator.get_state()
    assert full_gradient_norm(net, loss, loader)() == pytest.approx(whole, abs=1e-12)
    assert loader.generator.get_state().equal(state)
    parts = [
        torch.autograd.grad(loss(net(a), t) * len(a) / 12, list(net.parameters()))
        for a, t in zip(X.split(5), y.split(5))
    ]
    assert (
        abs(flat([sum(g) for g in zip(*parts)]).norm().item() - whole) > 1e-3
    )  # the control: the mean over parts

    class Other(torch.utils.data.Sampler):
        rounds = 0

        def __len__(self):
            return 12

        def __iter__(self):
            Other.rounds += 1
            return iter(range(12) if Other.rounds % 2 else range(11, -1, -1))

    with pytest.raises(ValueError, match="the same batches"):
        full_gradient_norm(net, loss, torch.utils.data.DataLoader(data, 5, sampler=Other()))()


def test_the_norm_of_an_adaptive_step():
    """DNSAM divides by the norm of |w|∇f in the groups that are adaptive, as the chain does."""
    net = make()
    norm = full_gradient_norm(net, F.cross_entropy, X, y)
    groups = [
        dict(params=net[0].parameters(), adaptive=True),
        dict(params=net[2].parameters(), adaptive=False),
    ]
    optimizer = DNSAM(groups, SGD, rho=0.1, lr=0.2, full_grad_norm=norm)

    def part(net):
        return F.cross_entropy(net(X[:5]), y[:5])

    params, units = [*net.parameters()], [p.detach().abs() for p in net.parameters()]
    units[2:] = [torch.ones_like(p) for p in params[2:]]
    full, g = (torch.autograd.grad(f(net), params) for f in (loss_of, part))
    ends = []
    for size in (flat([a * t for a, t in zip(full, units)]).norm(), flat(full).norm()):
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for p, a, t in zip(moved.parameters(), g, units):
                p.add_(0.1 / size * t * t * a)
        slope = torch.autograd.grad(part(moved), [*moved.parameters()])
        ends.append(flat(params) - 0.2 * flat(slope))
    optimizer.step(closure_of(net, optimizer, part))
    torch.testing.assert_close(flat(net.parameters()), ends[0], rtol=0, atol=1e-14)
    assert (ends[1] - ends[0]).abs().max() > 1e-4  # the control: the norm of ∇f


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_norm_without_a_group_that_does_not_move(adaptive):
    """On the whole batch DNSAM is SAM; the control: in the norm of all parameters it would move less."""
    moved = []
    for kind in (SAM, DNSAM):
        net = make()
        before = flat(net.parameters())
        groups = [
            dict(params=net[0].parameters()),
            dict(params=net[2].parameters(), perturb=False),
        ]
        norm = full_gradient_norm(net, F.cross_entropy, X, y)
        how = dict(full_grad_norm=norm) if kind is DNSAM else {}
        optimizer = kind(groups, SGD, rho=0.1, adaptive=adaptive, lr=0.1, **how)
        loss_of(net).backward()
        optimizer.first_step(True)
        moved.append(flat(net.parameters()) - before)
        optimizer.restore()
    near(*moved)
    assert norm.in_units_of([], list(net[2].parameters())) < 0.99 * norm()


def test_a_group_that_comes_later_has_a_schedule_too():
    net = make()
    optimizer = SAM(net[0].parameters(), SGD, rho=0.1, lr=0.1)
    scheduler = LinearRho(optimizer, 1.0, 0.0, 10)
    for k in range(7):
        if k == 5:
            optimizer.add_param_group(dict(params=net[2].parameters(), rho=0.4))
        optimizer.step(closure_of(net, optimizer))
        scheduler.step()
    assert [g["rho"] for g in optimizer.param_groups] == pytest.approx([0.03, 0.12])


def test_norm_with_a_loss_that_reads_the_parameters():
    net = make()

    def loss(out, t):
        return F.cross_entropy(out, t, reduction="sum").sqrt() + sum(
            p.square().sum() for p in net.parameters()
        )

    whole = flat(torch.autograd.grad(loss(net(X), y), list(net.parameters()))).norm().item()
    assert full_gradient_norm(net, loss, X, y, 5)() == pytest.approx(whole, abs=1e-12)


def test_frozen_statistics_of_shared_and_constant_buffers():
    net = torch.nn.Sequential(
        torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)
    ).double()
    net[2] = net[0]  # one norm, used twice
    net.register_buffer("table", torch.ones(2), persistent=False)
    net[1].eval()
    net[1].register_buffer("count", torch.zeros(1))
    mean, table, count = net[0].running_mean, net.table, net[1].count
    frozen = frozen_statistics(net)
    with pytest.raises(ZeroDivisionError):
        with frozen:
            net(X)
            assert (
                net.table is table
                and net[1].count is count
                and net[0].running_mean is not mean
                and net[0].num_batches_tracked == 2
            )
            1 / 0
    assert (
        net[0].running_mean is mean
        and mean.equal(torch.zeros(4, dtype=torch.float64))
        and net[0].num_batches_tracked == 0
    )


def test_the_algorithm_and_the_optimizer_of_one_name():
    net, theory = make(), samsde.algorithm
    for name in ("SAM", "USAM", "DNSAM"):
        for params in (net.parameters(), [*net.parameters()]):
            with pytest.raises(TypeError, match="which take parameters, are those of samsde.optim"):
                getattr(theory, name)(params)
        more = {"full_grad_norm": lambda: 1.0} if name == "DNSAM" else {}
        for args in ((0.1,), (0.1, SGD)):
            with pytest.raises(TypeError, match=f"a radius alone is samsde.algorithm.{name}"):
                getattr(optim, name)(*args, **more)
        with pytest.raises(
            TypeError, match="base_optimizer must be a class such as torch.optim.SGD"
        ):
            getattr(optim, name)(net.parameters(), **more)
