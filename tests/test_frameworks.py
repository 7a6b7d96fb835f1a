"""The recipes of the page "SAM in your framework", run with the real packages (`make frameworks`) against a loop in plain torch."""

import functools
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from samsde.optim import SAM

ROOT = Path(__file__).parent.parent
AdamW, SGD = torch.optim.AdamW, torch.optim.SGD
X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
y = torch.randint(3, (24,), generator=torch.Generator().manual_seed(1))
data = torch.utils.data.TensorDataset(X, y)
BATCHES = list(zip(X.split(6), y.split(6)))


def recipe(*names):
    "The cells of the page that carry these names, one after the other"
    cells = [
        "".join(c["source"])
        for c in json.loads((ROOT / "nbs" / "08d_frameworks.ipynb").read_text(encoding="utf-8"))[
            "cells"
        ]
    ]
    found = dict(torch=torch, F=F, SAM=SAM)
    for name in names:
        [code] = [c for c in cells if re.search(rf"# recipe: {name}\b", c)]
        exec(code, found)
    return found


def needs(package):
    return pytest.importorskip(package, reason=f"{package} is not installed: make frameworks")


def make(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def near(a, b, atol=2e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def loss_of(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def by_hand(batches, base, rho, clip=None, net=None, own=1, precision=None):
    "SAM in plain torch; `own` parts of each batch have perturbations of their own"
    net = make() if net is None else net
    params = list(net.parameters())
    base = base(params)

    def grads(batch):
        with torch.autocast("cpu", precision, enabled=precision is not None):
            loss = loss_of(net, batch)
        return torch.autograd.grad(loss, params)

    for batch in batches:
        parts = list(zip(*(t.chunk(own) for t in batch)))
        total, old = [torch.zeros_like(p) for p in params], [p.detach().clone() for p in params]
        for part in parts:
            first = grads(part)
            size = torch.cat([g.flatten() for g in first]).norm()
            with torch.no_grad():
                for p, g in zip(params, first):
                    p.add_(rho * g / size)
            total = [t + g / len(parts) for t, g in zip(total, grads(part))]
            with torch.no_grad():
                for p, o in zip(params, old):
                    p.copy_(o)
        for p, g in zip(params, total):
            p.grad = g
        if clip:
            torch.nn.utils.clip_grad_norm_(params, clip)
        base.step()
    return flat(net)


sgd = functools.partial(SGD, lr=0.2, momentum=0.9)
adamw = functools.partial(AdamW, lr=0.02)


# --- Lightning ---


def fit(module, epochs=2, batch_size=6, loader=None, **settings):
    L = needs("lightning")
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = dict(
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
    )
    trainer = L.Trainer(max_epochs=epochs, **{"enable_checkpointing": False} | quiet | settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader or torch.utils.data.DataLoader(data, batch_size))
    return trainer


@pytest.mark.parametrize(
    "base, plain, settings", [(SGD, sgd, dict(lr=0.2, momentum=0.9)), (AdamW, adamw, dict(lr=0.02))]
)
def test_lightning_automatic(base, plain, settings):
    needs("lightning")
    net = make()
    trainer = fit(recipe("lightning_automatic")["Automatic"](net, base, rho=0.1, **settings))
    near(flat(net), by_hand(BATCHES * 2, plain, 0.1))
    assert (
        trainer.global_step == 8
        and (flat(net) - by_hand(BATCHES * 2, plain, 0.0)).abs().max() > 1e-4
    )


def test_lightning_clips_the_step():
    needs("lightning")
    net = make()
    fit(
        recipe("lightning_automatic")["Automatic"](net, rho=0.1, lr=0.2, momentum=0.9),
        gradient_clip_val=0.05,
    )
    near(flat(net), by_hand(BATCHES * 2, sgd, 0.1, clip=0.05))


def test_lightning_in_bfloat16():
    needs("lightning")
    net = make()
    fit(
        recipe("lightning_automatic")["Automatic"](net, rho=0.1, lr=0.2, momentum=0.9),
        precision="bf16-mixed",
    )
    near(flat(net), by_hand(BATCHES * 2, sgd, 0.1, precision=torch.bfloat16))
    assert (flat(net) - by_hand(BATCHES * 2, sgd, 0.1)).abs().max() > 1e-5


def test_lightning_resumes(tmp_path):
    needs("lightning")
    Automatic = recipe("lightning_automatic")["Automatic"]
    half, rest = make(), make(seed=7)
    trainer = fit(Automatic(half, AdamW, rho=0.1, lr=0.02), epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    module, L = Automatic(rest, AdamW, rho=0.5, lr=0.5), needs("lightning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        L.Trainer(
            max_epochs=2,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            accelerator="cpu",
        ).fit(module, torch.utils.data.DataLoader(data, 6), ckpt_path=tmp_path / "half.ckpt")
    near(flat(rest), by_hand(BATCHES * 2, adamw, 0.1))


@pytest.mark.parametrize("parts", [2, 4])
def test_lightning_accumulation_is_refused(parts):
    needs("lightning")
    net = make()
    with pytest.raises(
        RuntimeError,
        match=rf"(?s)accumulate_grad_batches={parts} hands the optimizer .*first_step.*second_step",
    ):
        fit(
            recipe("lightning_automatic")["Automatic"](net, rho=0.1, lr=0.2),
            accumulate_grad_batches=parts,
        )
    near(flat(net), flat(make()), 0)


@pytest.mark.parametrize("parts, clip", [(1, None), (3, None), (3, 0.05)])
def test_lightning_manual(parts, clip):
    needs("lightning")
    net = make()
    module = recipe("lightning_automatic", "lightning_manual")["Manual"](
        net, rho=0.1, lr=0.2, momentum=0.9
    )
    module.parts, module.clip = parts, clip
    trainer = fit(module)
    near(flat(net), by_hand(BATCHES * 2, sgd, 0.1, clip=clip))
    assert trainer.global_step == 8


def test_lightning_manual_with_a_plain_step_is_refused():
    needs("lightning")
    Manual = recipe("lightning_automatic", "lightning_manual")["Manual"]

    class Forgets(Manual):
        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss(batch))
            self.optimizers().step()

    with pytest.raises(ValueError, match="the closure computes none"):
        fit(Forgets(make(), rho=0.1, lr=0.2))


# --- transformers ---


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make()

    def forward(self, inputs, labels):
        logits = self.net(inputs)
        return dict(loss=F.cross_entropy(logits, labels), logits=logits)


def train(
    Kind,
    tmp_path,
    accumulate=1,
    clip=0.0,
    batch_size=6,
    optimizer=None,
    epochs=2,
    resume=False,
    **settings,
):
    from transformers import TrainingArguments

    model = Classifier()
    rows = [dict(inputs=a, labels=t) for a, t in data]
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=clip,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        lr_scheduler_type="constant",
        **{"save_strategy": "no"} | settings,
    )
    optimizer = optimizer or SAM(model.parameters(), AdamW, rho=0.1, lr=0.02)

    class Ordered(Kind):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(rows)

    trainer = Ordered(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume)
    return model.net, trainer


@pytest.mark.parametrize("accumulate, clip", [(1, 0.0), (1, 0.05), (3, 0.0), (3, 0.05)])
def test_transformers(tmp_path, accumulate, clip):
    needs("transformers")
    net, trainer = train(
        recipe("transformers")["SAMTrainer"], tmp_path, accumulate, clip, batch_size=6 // accumulate
    )
    near(flat(net), by_hand(BATCHES * 2, adamw, 0.1, clip=clip or None))
    assert trainer.state.global_step == 8
    own = by_hand(BATCHES * 2, adamw, 0.1, clip=clip or None, own=3)
    assert accumulate == 1 or (flat(net) - own).abs().max() > 1e-4


def test_transformers_by_hand(tmp_path):
    needs("transformers")
    net, _ = train(recipe("transformers", "transformers_by_hand")["ThreeLines"], tmp_path)
    near(flat(net), by_hand(BATCHES * 2, adamw, 0.1))


def test_transformers_resumes(tmp_path):
    needs("transformers")
    SAMTrainer = recipe("transformers")["SAMTrainer"]
    train(SAMTrainer, tmp_path, epochs=1, save_strategy="epoch")
    net, _ = train(SAMTrainer, tmp_path, resume=True, save_strategy="epoch")
    near(flat(net), by_hand(BATCHES * 2, adamw, 0.1))


def test_transformers_without_the_class_is_refused(tmp_path):
    transformers = needs("transformers")
    with pytest.raises(ValueError, match="step needs a closure"):
        train(transformers.Trainer, tmp_path)
    with pytest.raises(TypeError, match="needs a SAM, USAM or DNSAM as optimizer, got AdamW"):
        train(recipe("transformers")["SAMTrainer"], tmp_path, optimizer=AdamW(make().parameters()))


def test_transformers_failing_in_the_second_pass_is_back_at_x():
    from samsde.integrations.hf import SharpnessAware

    class Failing:
        calls = 0

        def training_step(self, model, inputs, n):
            Failing.calls += 1
            if Failing.calls == 4:
                raise MemoryError
            loss_of(model, inputs).backward()

    class Both(SharpnessAware, Failing):
        pass

    import types

    net, both = make(), Both()
    both.optimizer = SGD(net.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="needs a SAM, USAM or DNSAM as optimizer, got SGD"):
        both.training_step(net, BATCHES[0])
    both.optimizer = SAM(net.parameters(), SGD, lr=0.1)
    both.accelerator = types.SimpleNamespace(
        sync_gradients=False, scaler=None, no_sync=lambda model: warnings.catch_warnings()
    )
    both.training_step(net, BATCHES[0])
    both.accelerator.sync_gradients = True
    with pytest.raises(MemoryError):
        both.training_step(net, BATCHES[1])
    assert (
        flat(net).equal(flat(make())) and not both.optimizer.is_perturbed and not both.micro_batches
    )


# --- accelerate ---


def accelerated(base=AdamW, **settings):
    accelerate = needs("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, **settings)
    net = make()
    return accelerator, *accelerator.prepare(net, SAM(net.parameters(), base, rho=0.1, lr=0.02))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()


@pytest.mark.parametrize("clip", [None, 0.05])
def test_accelerate(clip):
    needs("accelerate")
    step = recipe("accelerate")["accelerated_step"]
    accelerator, net, optimizer = accelerated()
    for batch in BATCHES:
        step(accelerator, optimizer, net, batch, clip)
    near(flat(net), by_hand(BATCHES, adamw, 0.1, clip=clip))


def closure_of(accelerator, optimizer, net, batch):
    def closure():
        optimizer.zero_grad()
        accelerator.backward(loss_of(net, batch))

    return closure


def test_accelerate_with_a_closure():
    accelerator, net, optimizer = accelerated()
    for batch in BATCHES:
        optimizer.step(closure_of(accelerator, optimizer, net, batch))
    near(flat(net), by_hand(BATCHES, adamw, 0.1))


def test_accelerate_accumulation_is_refused():
    accelerator, net, optimizer = accelerated(gradient_accumulation_steps=2)
    with pytest.raises(
        RuntimeError,
        match=r"(?s)gradient_accumulation_steps=2 calls the optimizer .*step\(closures=",
    ):
        for batch in BATCHES:
            with accelerator.accumulate(net):
                optimizer.step(closure_of(accelerator, optimizer, net, batch))
    near(flat(net), flat(make()), 0)
    plain = make()  # an optimizer that accelerate does not call is none of its business
    other = SAM(plain.parameters(), AdamW, rho=0.1, lr=0.02)

    def closure():
        other.zero_grad()
        loss_of(plain, BATCHES[0]).backward()

    other.step(closure)
    near(flat(plain), by_hand(BATCHES[:1], adamw, 0.1))


@pytest.mark.parametrize("own", [False, True])
def test_accelerate_micro_batches(own):
    needs("accelerate")
    step = recipe("accelerate_micro_batches")["accumulated_step"]
    accelerator, net, optimizer = accelerated()
    for batch in BATCHES:
        step(
            accelerator,
            optimizer,
            net,
            list(zip(*(t.split(2) for t in batch))),
            "own" if own else "joined",
        )
    near(flat(net), by_hand(BATCHES, adamw, 0.1, own=3 if own else 1))


# --- timm ---


def test_timm_as_it_is():
    needs("timm")
    import timm
    import timm.optim
    from timm.optim import param_groups_weight_decay
    from timm.scheduler import CosineLRScheduler

    pictures, labels = (
        torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 1, 2, 0]),
    )

    def network():
        torch.manual_seed(0)
        return timm.create_model("test_resnet", num_classes=3, drop_rate=0.0)

    def run(sam):
        net = network()
        groups = param_groups_weight_decay(net, 0.05)
        base = functools.partial(timm.optim.Lamb, lr=0.01)
        optimizer = SAM(groups, base, rho=0.05) if sam else base(groups)
        schedule = CosineLRScheduler(optimizer, t_initial=4, warmup_t=1, warmup_lr_init=1e-3)
        params = [p for g in optimizer.param_groups for p in g["params"]]

        def closure():
            optimizer.zero_grad()
            F.cross_entropy(net(pictures), labels).backward()

        for k in range(4):
            if sam:
                optimizer.step(closure)
            else:
                grads = torch.autograd.grad(F.cross_entropy(net(pictures), labels), params)
                size, old = (
                    torch.cat([g.flatten() for g in grads]).norm(),
                    [p.detach().clone() for p in params],
                )
                with torch.no_grad():
                    for p, g in zip(params, grads):
                        p.add_(0.05 * g / size)
                closure()
                with torch.no_grad():
                    for p, o in zip(params, old):
                        p.copy_(o)
                optimizer.step()
            schedule.step(k + 1)
        return flat(net), [g["lr"] for g in optimizer.param_groups]

    (ours, lr), (plain, plain_lr) = run(True), run(False)
    near(ours, plain, 2e-4)
    assert lr == plain_lr and (ours - flat(network())).norm() > 0.1


@pytest.mark.parametrize("clip", [None, 0.05])
def test_timm_scaler(clip):
    needs("timm")
    from timm.utils import NativeScaler

    step, net = recipe("timm")["timm_step"], make()
    optimizer, scaler = SAM(net.parameters(), AdamW, rho=0.1, lr=0.02), NativeScaler(device="cpu")
    for batch in BATCHES:
        step(scaler, optimizer, net, batch, clip)
    near(flat(net), by_hand(BATCHES, adamw, 0.1, clip=clip), 2e-5)
    before = flat(net)
    step(scaler, optimizer, net, (X * torch.inf, y), clip)  # not finite: skipped
    assert flat(net).equal(before) and not optimizer.is_perturbed


# --- torch ---


@pytest.mark.parametrize("clip", [None, 0.05])
def test_grad_scaler(clip):
    step, net = recipe("grad_scaler")["scaled_step"], make()
    optimizer, scaler = (
        SAM(net.parameters(), SGD, rho=0.1, lr=0.2, momentum=0.9),
        torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=4),
    )
    for batch in BATCHES * 2:
        step(scaler, optimizer, net, batch, clip)
    near(flat(net), by_hand(BATCHES * 2, sgd, 0.1, clip=clip, precision=torch.bfloat16), 3e-3)
    assert scaler.get_scale() == 2.0**10
    before = flat(net)
    step(scaler, optimizer, net, (1e38 * X, y), clip)
    assert flat(net).equal(before) and not optimizer.is_perturbed and scaler.get_scale() == 2.0**9


WORKER = """
import os, sys, json
import torch, torch.distributed as dist, torch.nn.functional as F
from samsde.optim import SAM
rank, folder = int(sys.argv[1]), sys.argv[2]
X, y, net, code = torch.load(f"{folder}/data.pt", weights_only=False)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
exec(code)
optimizer = sharded(net, rho=.1, lr=.02)
for x, t in zip(X.split(6), y.split(6)):
    def closure():
        optimizer.zero_grad()
        F.cross_entropy(net(x[rank::2]), t[rank::2]).backward()
    optimizer.step(closure)
end = torch.cat([p.full_tensor().detach().flatten() for p in net.parameters()])
if rank == 0: torch.save(end, f"{folder}/end.pt")
dist.barrier()
dist.destroy_process_group()
os._exit(0)
"""


def test_fsdp2(tmp_path):
    [code] = [
        c
        for c in (
            "".join(c["source"])
            for c in json.loads(
                (ROOT / "nbs" / "08d_frameworks.ipynb").read_text(encoding="utf-8")
            )["cells"]
        )
        if "# recipe: fsdp2" in c
    ]
    code = code.replace("for layer in net:", "for layer in (net[0], net[2]):")
    torch.save([X, y, make(), code], tmp_path / "data.pt")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path)], stderr=subprocess.PIPE
        )
        for rank in (0, 1)
    ]
    errors = [w.communicate(timeout=200)[1].decode() for w in workers]
    assert not any(w.returncode for w in workers), errors
    near(torch.load(tmp_path / "end.pt", weights_only=True), by_hand(BATCHES, adamw, 0.1), 1e-5)
