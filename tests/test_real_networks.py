"""Real networks with their own losses (`make frameworks`): f_γ, its gradient and Hessian against torch by hand, a step, a diagnosis."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from samsde import optim
from samsde.algorithm import SAM, SGD, Chain
from samsde.diagnosis import diagnose_training
from samsde.experiments.examples import digits_data
from samsde.monitor import Monitor, lightning_callback, transformers_callback
from samsde.objective import MinibatchLoss


def needs(package):
    return pytest.importorskip(package, reason=f"{package} is not installed: make frameworks")


def pictures(n=24, size=32):
    digits, labels = digits_data(torch.float32)
    large = F.interpolate(digits[:n], size=size, mode="bilinear")
    return large.expand(-1, 3, -1, -1).contiguous(), labels[:n]


def tokens(n=12, length=9, vocabulary=50, seed=0):
    words = torch.randint(1, vocabulary, (n, length), generator=torch.Generator().manual_seed(seed))
    lengths = 3 + torch.arange(n) % (length - 2)
    mask = torch.arange(length) < lengths[:, None]
    return torch.where(mask, words, 0), mask.long(), lengths


def resnet():
    net = needs("torchvision").models.resnet18(num_classes=10)
    return net, F.cross_entropy, pictures(), None


def gpt2():
    t = needs("transformers")
    net = t.GPT2LMHeadModel(
        t.GPT2Config(
            vocab_size=50,
            n_positions=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=1,
            eos_token_id=1,
        )
    )
    words, mask, _ = tokens()
    rows = [
        dict(input_ids=w, attention_mask=m, labels=torch.where(m == 1, w, -100))
        for w, m in zip(words, mask)
    ]
    return net, None, rows, None


def bert():
    t = needs("transformers")
    config = t.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    words, mask, _ = tokens(seed=1)
    hidden = torch.rand(words.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    hidden[:, 0] = True
    labels = torch.where(hidden & (mask == 1), words, -100)
    return (
        t.BertForMaskedLM(config),
        None,
        dict(input_ids=words, attention_mask=mask, labels=labels),
        None,
    )


def vit():
    timm = needs("timm")
    net = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=2,
        num_classes=10,
        drop_rate=0.1,
    )
    return net, F.cross_entropy, pictures(), None


class Texts(nn.Module):
    "An LSTM over packed sequences"

    def __init__(self):
        super().__init__()
        self.words, self.lstm, self.top = (
            nn.Embedding(50, 6, padding_idx=0),
            nn.LSTM(6, 8, batch_first=True),
            nn.Linear(8, 3),
        )

    def forward(self, words, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(
            self.words(words), lengths, batch_first=True, enforce_sorted=False
        )
        return self.top(self.lstm(packed)[1][0][0])


def lstm():
    words, _, lengths = tokens()
    return (
        Texts(),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])),
        ((words, lengths), torch.arange(12) % 3),
        None,
    )


NETWORKS = dict(resnet18=resnet, gpt2=gpt2, bert=bert, vit=vit, lstm=lstm)


def made(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, loss, data, _ = NETWORKS[name]()
    net = net.double().train()
    if isinstance(loss, nn.Module):
        loss = loss.double()

    def double(t):
        return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    return net, loss, tuple(map(double, data)) if isinstance(data, tuple) else data


def by_torch(net, loss, data, numbers):
    "The loss of a batch, written out for each kind of data"
    if isinstance(data, list):
        return net(**{k: torch.stack([data[i][k] for i in numbers]) for k in data[0]}).loss
    if isinstance(data, dict):
        return net(**{k: v[numbers] for k, v in data.items()}).loss
    inputs, target = data
    if isinstance(inputs, tuple):
        return loss(net(*(t[numbers] for t in inputs)), target[numbers])
    return loss(net(inputs[numbers]), target[numbers])


@pytest.mark.parametrize("name", NETWORKS)
def test_by_hand(name):
    net, loss, data = made(name)
    o = MinibatchLoss.from_module(net, loss, data, 4)
    gamma = o.draw((), torch.Generator().manual_seed(1))
    v = torch.randn(o.dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    before = copy.deepcopy(net.state_dict())
    f, g, Hv = o.sample_loss(o.x0, gamma), o.sample_grad(o.x0, gamma), o.sample_hvp(o.x0, gamma, v)
    assert all(before[k].equal(t) for k, t in net.state_dict().items())
    params = [p for p in net.parameters() if p.requires_grad]
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(int(gamma[-1]))
        known = by_torch(net, loss, data, gamma[:-1])
    first = torch.autograd.grad(
        known, params, create_graph=True, allow_unused=True, materialize_grads=True
    )
    slope = torch.cat([t.flatten() for t in first])
    product = torch.autograd.grad(slope @ v, params, allow_unused=True, materialize_grads=True)
    assert_close(f, known.detach().double(), rtol=1e-10, atol=1e-12)
    assert_close(g, slope.detach(), rtol=1e-9, atol=1e-10 * slope.abs().max().item())
    product = torch.cat([t.flatten() for t in product])
    assert_close(Hv, product, rtol=1e-8, atol=1e-9 * product.abs().max().item())
    h = 1e-6
    up, down = (o.sample_grad(o.x0 + s * h * v / v.norm(), gamma) for s in (1, -1))
    slopes = (up - down) / (2 * h) * v.norm()
    rough = name in ("resnet18", "gpt2")  # the one has kinks, the other a loss in single precision
    if not rough:
        assert (Hv - slopes).norm() < 1e-4 * slopes.norm()
    other = o.draw((), torch.Generator().manual_seed(7))
    assert not torch.allclose(o.sample_grad(o.x0, other), g, rtol=1e-2)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step(name):
    net, loss, data = made(name)
    o = MinibatchLoss.from_module(net, loss, data, 4)
    gamma = o.draw((), torch.Generator().manual_seed(1))
    sam = optim.SAM(net.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)

    def closure():
        sam.zero_grad()
        torch.manual_seed(int(gamma[-1]))
        f = by_torch(net, loss, data, gamma[:-1])
        f.backward()
        return f

    sam.step(closure)
    ends = nn.utils.parameters_to_vector([p for p in net.parameters() if p.requires_grad]).detach()
    moved = (ends - o.x0).norm()
    assert (Chain(SAM(0.1), o, 0.1).step(o.x0, gamma) - ends).norm() < 1e-7 * moved
    assert (Chain(SGD(), o, 0.1).step(o.x0, gamma) - ends).norm() > 1e-3 * moved


@pytest.mark.parametrize("name", NETWORKS)
def test_a_diagnosis(name):
    net, loss, data = made(name)
    sam = optim.SAM(net.parameters(), torch.optim.SGD, rho=0.05, lr=0.05, momentum=0.9)
    found = diagnose_training(
        net, loss, data, sam, batch_size=4, budget_s=5, effort=10, progress=False
    )
    assert all(math.isfinite(v) for k, v in found.terms.items() if k != "model")
    assert found.terms["noise"] > 0 and found.settings["algorithm"] == "SAM" and found.coarse


# --- callbacks in the real trainers ---


def fit_quietly(module, loader, **how):
    "By Lightning's Trainer, which writes and shows nothing"
    quiet = dict(
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
        devices=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        needs("lightning").Trainer(**how, **quiet).fit(module, loader)


def test_lightning():
    L = needs("lightning")

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return optim.SAM(self.net.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)

    X, y = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), 8)

    def fit(callbacks):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = Module()
        fit_quietly(module, loader, max_epochs=2, callbacks=callbacks, gradient_clip_val=5.0)
        return module

    watch = lightning_callback(
        lambda module, batch: F.cross_entropy(module.net(batch[0]), batch[1]),
        every=4,
        budget_s=1,
        effort=5,
    )
    watched, plain = fit([watch]), fit([])
    assert all(
        a.equal(b) for a, b in zip(watched.state_dict().values(), plain.state_dict().values())
    )
    assert [*watch.monitor.history.index] == [4, 8] and (watch.monitor.history["ρ"] == 0.1).all()
    assert (watch.monitor.history["clipped"] == 0).all()


def test_lightning_joins_batches():
    """A step of two batches has half the noise: the Trainer's DataLoader says it of one, and is refused; one with such batches is taken."""
    L = needs("lightning")

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    X, y = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
    rows = torch.utils.data.TensorDataset(X, y)

    def fit(**how):
        watch = lightning_callback(
            lambda module, batch: F.cross_entropy(module.net(batch[0]), batch[1]),
            every=2,
            budget_s=1,
            effort=5,
            **how,
        )
        loader = torch.utils.data.DataLoader(rows, 4)
        fit_quietly(Module(), loader, max_epochs=1, callbacks=[watch], accumulate_grad_batches=2)
        return watch.monitor.history

    with pytest.raises(ValueError, match="a step takes 2 batches of the Trainer's DataLoader"):
        fit()
    assert len(fit(data=torch.utils.data.DataLoader(rows, 8)))


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_transformers(tmp_path, clip):
    t = needs("transformers")
    from samsde.integrations.hf import SharpnessAware

    class SAMTrainer(SharpnessAware, t.Trainer):
        pass

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, _, rows, _ = gpt2()
    arguments = t.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        max_grad_norm=clip,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        lr_scheduler_type="constant",
    )
    watch = transformers_callback(every=2, budget_s=2, effort=5)
    sam = optim.SAM(net.parameters(), torch.optim.SGD, rho=0.05, lr=0.05)
    trainer = SAMTrainer(
        model=net, args=arguments, train_dataset=rows, optimizers=(sam, None), callbacks=[watch]
    )
    trainer.train()
    assert [*watch.monitor.history.index] == [2, 4]
    logged = [r for r in trainer.state.log_history if "samsde/stability number" in r]
    assert [r["step"] for r in logged] == [2, 4] and logged[0]["samsde/ρ"] == 0.05
    assert [r.get("samsde/clipped", 0) for r in logged] == [clip > 0] * 2


def test_overhead():
    net = nn.Sequential(nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 10))
    X, y = torch.randn(640, 200), torch.randint(10, (640,))
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    monitor = Monitor(net, F.cross_entropy, (X, y), sgd, batch_size=64, overhead=0.2, effort=5)
    for k in range(1500):
        sgd.zero_grad()
        F.cross_entropy(net(X[:64]), y[:64]).backward()
        sgd.step()
        monitor()
    assert len(monitor.history) >= 1
    assert monitor.watched <= 0.2 * monitor.trained + monitor.cost
