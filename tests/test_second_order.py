"""expansion="second" through the whole library: every algorithm, source, objective and layer."""

import warnings

import pytest
import torch
from test_sources import F64, KINDS, objectives, variants
from torch.testing import assert_close

from samsde.algorithm import DNSAM, SAM, SGD, USAM
from samsde.ensemble import simulate
from samsde.implicit_regularizer import drift
from samsde.machinery.coverage import LAYERS, Between
from samsde.objective import FiniteSum, MinibatchLoss, NoisyLoss, Quadratic
from samsde.sde import SDE
from samsde.weak_errors import periodic_examples


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", objectives())
def test_a_step_is_drift_and_noise(name, dtype):
    """In kind, for all forms of the noise; the control is a noise of the other sign."""
    objective, generator = objectives(dtype)[name], torch.Generator().manual_seed(2)
    x = torch.randn(2, objective.dim, generator=generator, dtype=F64).to(dtype)
    slack = dict(rtol=1e-9, atol=1e-11) if dtype is F64 else dict(rtol=1e-4, atol=1e-5)
    for kind in KINDS:
        for a in variants(kind, objective):
            for settings in (dict(), dict(noise="sgd"), dict(noise="second")):
                if a.source == "previous" and settings.get("noise") == "second":
                    continue  # has none
                sde = SDE(a, objective, 0.1, "second", draws=12, **settings)
                xi = sde.draw((2,), generator, dtype=dtype)
                both = x + 0.05 * sde.drift(x) + 0.05**0.5 * sde.diffusion(x, xi)
                found = sde.step(x, xi, 0.05)
                assert found.dtype == dtype and found.isfinite().all()
                assert_close(found, both, **slack)
                assert not torch.allclose(sde.step(x, -xi, 0.05), both, rtol=1e-3)


@pytest.mark.parametrize("name", ["noisy", "sum", "sum, B=4", "module, B=2"])
def test_an_eighth_is_left_where_the_radius_is_halved(name):
    """Of the exact drift, where both are enumerated; the first order leaves a quarter."""
    objective = objectives()[name]
    if name == "noisy":
        objective = NoisyLoss(objective.fn, 3)  # without noise
    x = 0.3 * torch.randn(objective.dim, generator=torch.Generator().manual_seed(3), dtype=F64)
    for kind in (USAM, SAM, *KINDS[-1:]):
        for a in variants(kind, objective):
            if a.source == "previous" or a.source == "independent" and name != "sum":
                continue  # no exact form, or too many pairs

            def left(expansion, rho):
                a.rho = rho
                exact = drift(a, objective, x, "exact", draws=2000)
                return (exact - drift(a, objective, x, expansion, draws=2000)).norm()

            assert 7 < left("second", 0.01) / left("second", 0.005) < 9, a
            assert 3.5 < left("first", 0.01) / left("first", 0.005) < 4.5, a


def test_a_quadratic_has_no_second_order():
    H = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=F64)
    bowl, x = Quadratic(H, 0.5), torch.tensor([0.4, -0.3], dtype=F64)
    for kind in (SGD, lambda: USAM(0.3), lambda: DNSAM(0.3), lambda: SAM(0.3)):
        assert drift(kind(), bowl, x, "second").equal(drift(kind(), bowl, x))


@pytest.mark.parametrize("seed", [0, None])
def test_drawn_expectations_of_a_run(seed):
    """A run is reproduced by its seed, in chunks, with records and without."""
    objective = objectives()["module, B=2"]
    for a in (SAM(0.3), DNSAM(0.3), SAM(0.3, source="previous")):
        sde = SDE(a, objective, 0.1, "second", draws=8, seed=seed)
        how = dict(t_end=2.0, n_paths=6, every=20)
        known = simulate(sde, objective.x0, **how).final
        assert simulate(sde, objective.x0, record=False, **how).final.equal(known)
        assert simulate(sde, objective.x0, chunk=2, **how).final.equal(known)
        other = SDE(a, objective, 0.1, draws=8, seed=seed)
        assert not simulate(other, objective.x0, **how).final.equal(known)


def test_what_drawing_leaves_is_told():
    """Two sets of draws agree within four of the standard errors that they report."""
    objective = FiniteSum(objectives()["sum"].sample_losses, 6, 3, 4)  # 1,296 minibatches
    x = torch.tensor([0.4, -0.7, 0.2], dtype=F64)
    known = drift(SAM(0.5), objective, x, "second", draws=2000)
    for seed in range(3):
        found, sem = drift(SAM(0.5), objective, x, "second", draws=200, seed=seed, return_sem=True)
        assert (sem > 0).all() and ((found - known).abs() < 4 * sem).all()
    assert (drift(SAM(0.5), objective, x, draws=2000) - known).norm() > 4 * sem.norm()


def test_with_all_that_training_adds():
    """b of a trained SDE is that of its plain one; of second order, to ρ³ that of the exact one."""
    circle = periodic_examples(1)[USAM]
    x = torch.linspace(0, 6, 7, dtype=F64)[:, None]
    plain = SDE(USAM(0.3), circle, 0.1, "second").drift(x)
    training = dict(momentum=0.5, weight_decay=0.1)
    for more in (
        dict(),
        dict(schedule=torch.cos),
        dict(rho_schedule=torch.cos),
        dict(kinetic=True),
    ):
        sde = SDE(USAM(0.3), circle, 0.1, "second", **training, **more)
        assert_close(sde.drift(x), plain - 0.1 * x)

    def left(rho, expansion):
        exact, found = (
            SDE(USAM(rho), circle, 0.1, e, "second", 2, **training) for e in ("exact", expansion)
        )
        state = torch.cat([x, torch.full_like(x, 3)], -1)  # k = 3: the lag
        lag = (exact.position(state) - found.position(state)).norm()
        return (exact.drift(x) - found.drift(x)).norm(), lag

    for far, near in zip(left(0.02, "second"), left(0.01, "second")):
        assert 7.5 < far / near < 8.5


def test_trained_runs_with_their_schedules():
    objective = objectives()["sum"]
    x0 = torch.tensor([0.4, -0.7, 0.2], dtype=F64)
    training = dict(momentum=0.5, weight_decay=0.1)

    def halving(t):
        return 1 / (1 + t)

    for more in (dict(), dict(schedule=halving, rho_schedule=halving), dict(kinetic=True)):
        sde = SDE(SAM(0.3), objective, 0.1, "second", **training, **more)
        run = simulate(sde, x0, 10 * sde.time_step, 8, every=10)
        assert run.final.isfinite().all() and run.n_diverged == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", LAYERS, ids=lambda row: row.name)
def test_third_derivatives_of_layers(row):
    """T[v, v] is the slope of ∇²f v along v, for every layer that the library takes."""
    torch.manual_seed(1)
    try:
        net = Between(row.layer(), row.shape, row.call).double().eval()
        X = torch.randn(4, 3, dtype=F64) if row.shape else torch.randint(1, 4, (4, 4))
        objective = FiniteSum.from_module(net, torch.nn.MSELoss(), X, torch.randn(4, 1, dtype=F64))
    except (ValueError, TypeError, RuntimeError):
        return  # refused, which another test looks at
    x = objective.x0 + 0.3 * torch.randn(2, len(objective.x0), dtype=F64)
    v, gamma, h = torch.randn_like(x), torch.tensor([[0, 1], [2, 3]]), 1e-5
    if "padding" in row.note:
        v[:, : objective.x0.numel()] *= objective.x0 != 0  # the padding word is held fixed
    up, down = (objective.sample_hvp(x + s * h * v, gamma, v) for s in (1, -1))
    try:
        found = objective.sample_third(x, gamma, v)
    except RuntimeError as error:
        assert "not supported" in str(error)  # torch says so itself
        return
    assert_close(
        found, (up - down) / (2 * h), rtol=1e-4, atol=1e-4 * (1 + found.abs().max().item())
    )


def test_a_minibatch_loss_refuses():
    net = torch.nn.Linear(3, 1).double()
    data = torch.randn(6, 3, dtype=F64), torch.randn(6, 1, dtype=F64)
    loss = MinibatchLoss.from_module(net, torch.nn.MSELoss(), data, batch_size=2)
    for a in (USAM(0.1), SAM(0.1, source="full")):
        with warnings.catch_warnings(), pytest.raises(ValueError, match="no third derivatives"):
            drift(a, loss, loss.x0, "second", draws=4)


def test_the_second_order_without_gradients():
    """Inference mode has no derivative of the drift, which was left out there; a point from it is as any other."""
    bowl, x = Quadratic(torch.tensor([[1.2, 0.3], [0.3, 0.7]], dtype=F64), sigma=0.5), torch.ones(2, dtype=F64)
    sde = SDE(USAM(0.3), bowl, 0.1, "exact", order=2)
    known = sde.drift(x)
    with torch.no_grad():
        assert_close(sde.drift(x), known)
    with torch.inference_mode():
        point = torch.ones(2, dtype=F64)
        with pytest.raises(ValueError, match="inference_mode.. has no gradients"):
            sde.drift(x)
    assert_close(sde.drift(point), known)
    assert (known - SDE(USAM(0.3), bowl, 0.1, "exact").drift(x)).abs().max() > 0.01
