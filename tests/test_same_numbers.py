"Speed changes no result: what a seed gave before the steps were fused, tabulated anew and recorded, it gives still, up to rounding."

import pytest
import torch
from sklearn.datasets import load_breast_cancer

from samsde.algorithm import DNSAM, SAM, SGD, USAM, Chain
from samsde.ensemble import simulate
from samsde.objective import FiniteSum, Quadratic
from samsde.sde import SDE


def quadratic(process, kind, dtype):
    objective = Quadratic(torch.diag(torch.linspace(0.5, 1.5, 6, dtype=dtype)), sigma=0.3)
    algorithm = kind() if kind is SGD else kind(0.2)
    return simulate(
        process(algorithm, objective, 0.1),
        torch.ones(6, dtype=dtype),
        5.0,
        300,
        seed=3,
        observe={"f": objective.loss},
    )


def network(process, kind, dtype):
    X, y = load_breast_cancer(return_X_y=True)
    X, y = torch.from_numpy((X - X.mean(0)) / X.std(0)).to(dtype)[:80], torch.from_numpy(y)[:80]
    net = torch.nn.Sequential(torch.nn.Linear(30, 4), torch.nn.Sigmoid(), torch.nn.Linear(4, 2)).to(
        dtype
    )
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.copy_(torch.linspace(-1, 1, p.numel(), dtype=dtype).add(k / 3).sin().view_as(p) / 3)
    objective = FiniteSum.from_module(net, torch.nn.CrossEntropyLoss(), X, y)
    algorithm = kind() if kind is SGD else kind(0.1)
    return simulate(
        process(algorithm, objective, 0.1),
        objective.x0,
        10.0,
        4,
        seed=3,
        observe={"f": objective.loss},
        every=100,
    )


BEFORE = {  # case: the mean of f, and the sum of squares of all coordinates, at the end
    "quadratic Chain SGD float32": (0.0154621135273, 11.3971821211),
    "quadratic Chain SGD float64": (0.0155409212695, 11.524558223),
    "quadratic Chain USAM float32": (0.0174218571295, 12.1169041005),
    "quadratic Chain USAM float64": (0.0178166857326, 12.4036125914),
    "quadratic Chain DNSAM float32": (0.0293275082965, 18.5690854673),
    "quadratic Chain DNSAM float64": (0.0315079899507, 19.7028581722),
    "quadratic Chain SAM float32": (0.0183045882514, 12.584457095),
    "quadratic Chain SAM float64": (0.0187724751719, 12.9328000308),
    "quadratic SDE SGD float32": (0.015462111452, 11.3971806062),
    "quadratic SDE SGD float64": (0.0155409212695, 11.524558223),
    "quadratic SDE USAM float32": (0.0174218546436, 12.1169024832),
    "quadratic SDE USAM float64": (0.0178166857326, 12.4036125914),
    "quadratic SDE DNSAM float32": (0.0293275044874, 18.5690829713),
    "quadratic SDE DNSAM float64": (0.0315079899507, 19.7028581722),
    "quadratic SDE SAM float32": (0.018087548872, 12.4772200524),
    "quadratic SDE SAM float64": (0.0185888970171, 12.8170684647),
    "network Chain SGD float32": (0.193856351078, 36.7686661659),
    "network Chain SGD float64": (0.193856348703, 36.7686683636),
    "network Chain USAM float32": (0.19439965114, 37.4911974649),
    "network Chain USAM float64": (0.194399668027, 37.4911966819),
    "network Chain DNSAM float32": (0.193403523415, 41.8194138251),
    "network Chain DNSAM float64": (0.193403519329, 41.8194140391),
    "network Chain SAM float32": (0.180265761912, 40.0348890698),
    "network Chain SAM float64": (0.180265763391, 40.0348889166),
    "network SDE SGD float32": (0.187329690903, 35.9351120176),
    "network SDE SGD float64": (0.197640957638, 33.8412172904),
    "network SDE USAM float32": (0.19608277455, 36.6369013848),
    "network SDE USAM float64": (0.207249172373, 34.2964794292),
    "network SDE DNSAM float32": (0.202416658401, 42.5508742849),
    "network SDE DNSAM float64": (0.189696617742, 39.1379471474),
    "network SDE SAM float32": (0.176718208939, 38.7680834861),
    "network SDE SAM float64": (0.186921048953, 36.1767182565),
}


@pytest.mark.parametrize("case", BEFORE, ids=" ".join)
def test_same_seed_same_numbers(case):
    where, process, kind, dtype = case.split()
    found = {"quadratic": quadratic, "network": network}[where](
        {"Chain": Chain, "SDE": SDE}[process],
        {k.__name__: k for k in (SGD, USAM, DNSAM, SAM)}[kind],
        getattr(torch, dtype),
    )
    values = found.mean["f"][-1].item(), found.final.double().square().sum().item()
    assert values == pytest.approx(BEFORE[case], rel=1e-9 if dtype == "float64" else 2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_moments_as_they_come(dtype):
    """Means and deviations, taken record by record and block by block, are those of all paths at once, up to rounding; the control leaves a path out."""
    chain = Chain(
        SAM(0.1), Quadratic(torch.diag(torch.linspace(0.5, 1.5, 20, dtype=dtype)), 0.3), 0.1
    )
    run = simulate(
        chain,
        torch.ones(20, dtype=dtype),
        1.0,
        9_000,
        observe={"x": lambda x: x, "right": lambda x: x[..., 0] > 0.5},
        keep=True,
    )
    for name, paths in run.paths.items():
        x = paths.double()
        torch.testing.assert_close(run.mean[name], x.mean(1), rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(run.std[name], x.std(1), rtol=1e-8, atol=1e-10)
        assert name == "right" or not torch.allclose(
            run.mean[name], x[:, 1:].mean(1), rtol=1e-13, atol=1e-14
        )
