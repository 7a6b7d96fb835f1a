"""Known numbers of the sources of a perturbation, of micro-batches and of momentum, each beside the wrong variant that misses it."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from samsde.algorithm import DNSAM, SAM, SGD, USAM, Algorithm, Chain
from samsde.experiments.examples import g_i, line, three
from samsde.hessian_noise import cross_covariance, noise_covariance
from samsde.implicit_regularizer import drift
from samsde.objective import FiniteSum, Quadratic
from samsde.random_direction import gaussian_direction
from samsde.sde import SDE
from samsde.weak_errors import (
    exact_error,
    mean_after,
    periodic_examples,
    stationary_covariance,
    torus_nodes,
)

F64 = torch.float64
origin = torch.zeros(2, dtype=F64)
SECOND = dict(expansion="exact", noise="factor", order=2)
EXACT = SECOND | dict(noise="exact")


def close(found, known, rel=1e-9):
    assert_close(
        torch.as_tensor(found, dtype=F64), torch.tensor(known, dtype=F64), rtol=rel, atol=rel
    )


def mean_Hu(algorithm, objective):
    return (-drift(algorithm, objective, origin) - objective.grad(origin)) / algorithm.rho


def phi(x):
    return np.sin(x) + 0.5 * np.cos(2 * x)


def phi2(x, y):
    return np.sin(x) + 0.5 * np.cos(x - y)


def order(errors):
    return np.log2(errors[0] / errors[1])


def mixed(algorithm, other, problem, eta, of_drift, of_noise, **settings):
    """The SDE whose drift and noise are each that of one of two algorithms, "own" or "other"."""
    kinds = {"own": algorithm, "other": other}
    moving, shaking = (SDE(kinds[name], problem, eta, **settings) for name in (of_drift, of_noise))

    class Mixed(SDE):
        def drift(self, x, seed=None):
            return moving.drift(x)

        def covariance(self, x):
            return shaking.covariance(x)

    return Mixed(algorithm, problem, eta, **settings)


# --- micro-batches

MICRO = {  # kind, replace, m: E[Hu] and S, at B = 2
    (USAM, True, 1): ((11 / 3, -1 / 3), [[2 / 3, 5 / 6], [8 / 9, 31 / 18]]),
    (USAM, False, 1): ((11 / 3, -1 / 3), [[1 / 3, 5 / 12], [4 / 9, 31 / 36]]),
    (USAM, True, 2): ((2.5, -0.5), [[25 / 36, 35 / 36], [41 / 36, 71 / 36]]),
    (USAM, False, 2): ((23 / 12, -7 / 12), [[0.375, 0.625], [59 / 72, 89 / 72]]),
    (SAM, True, 1): (
        (1.7101650562, -0.0351909363),
        [[0.3550825281, 0.3157378652], [0.5918042135, 0.6373408864]],
    ),
    (SAM, False, 1): (
        (1.7101650562, -0.0351909363),
        [[0.1775412640, 0.1578689326], [0.2959021067, 0.3186704432]],
    ),
    (SAM, True, 2): (
        (1.4030763927, -0.2659798245),
        [[0.3948355684, 0.4740150485], [0.7317496738, 0.9488489923]],
    ),
}


@pytest.mark.parametrize("case", MICRO, ids=lambda c: f"{c[0].__name__}, {c[1]}, m = {c[2]}")
def test_micro_batches_of_two(case):
    """Whole batches, m = 2, are the wrong variant of m = 1, and the other way round."""
    kind, replace, m = case
    algorithm, objective = kind(0.1, micro_batch=m), three(2, replace)
    mean, S = MICRO[case]
    close(mean_Hu(algorithm, objective), mean, 2e-9)
    close(cross_covariance(algorithm, objective, origin), S, 2e-9)
    other = kind(0.1, micro_batch=3 - m)
    assert (mean_Hu(other, objective) - torch.tensor(mean, dtype=F64)).abs().max() > 0.1
    assert (
        cross_covariance(other, objective, origin) - torch.tensor(S, dtype=F64)
    ).abs().max() > 0.02


def test_micro_batches_of_constant_noise():
    """The noise of a micro-batch is s√K in the direction, and s in front of its covariance with the batch's."""
    s, K = 0.5, 4
    found = gaussian_direction(torch.tensor([1.0, 0.0], dtype=F64), s * K**0.5)
    close(found.norm, 1.548572460551, 1e-11)
    close(found.mean.norm(), 0.557179468382, 1e-11)
    close([v.item() / K for v in found[2:]], [0.108553380947, 0.139294867096], 1e-11)
    close(found[2], 0.434213523787, 1e-11)  # s√K in front
    assert (
        abs(gaussian_direction(torch.tensor([1.0, 0.0], dtype=F64), s).norm - 1.548572460551) > 0.1
    )


@pytest.mark.parametrize(
    "replace, known", [(True, (3.2829033e-3, 6.13844e-6)), (False, (4.8806567e-3, 9.37770e-6))]
)
def test_whole_batches_for_micro_batches_on_the_circle(replace, known):
    """Their drift has order ½, their noise in the second-order SDE, Cov(g + ρHu), 3/2."""

    class ByBatch(USAM):  # with columns by batch, not by sample
        def perturbation(self, objective, x, gamma):
            return objective.sample_grad(x, gamma)

    problem, errors = periodic_examples(1, batch_size=2, replace=replace)[USAM], []
    for eta in (2.0**-8, 2.0**-9):
        micro, whole = USAM(0.5 * eta**0.5, micro_batch=1), ByBatch(0.5 * eta**0.5)
        models = (
            mixed(micro, whole, problem, eta, "other", "own"),
            mixed(micro, whole, problem, eta, "own", "other", **SECOND),
        )
        errors.append([exact_error(Chain(micro, problem, eta), model, 1, phi) for model in models])
    assert errors[0] == pytest.approx(known, rel=2e-6)
    assert order(np.array(errors)) == pytest.approx([0.5, 1.5], abs=0.1)


def test_whole_batches_for_micro_batches_on_the_torus():
    problem, errors = periodic_examples(2, batch_size=2, replace=False)[USAM], []
    for eta in (2.0**-7, 2.0**-8):
        micro, whole = USAM(0.3 * eta**0.5, micro_batch=1), USAM(0.3 * eta**0.5)
        models = SDE(whole, problem, eta), mixed(micro, whole, problem, eta, "other", "own")
        errors.append([exact_error(Chain(micro, problem, eta), model, 1, phi2) for model in models])
    known = [[2.443953e-3, 2.4443389e-3], [1.696755e-3, 1.6968928e-3]]
    assert np.array(errors) == pytest.approx(np.array(known), rel=1e-6)
    assert order(np.array(errors)) == pytest.approx([0.53, 0.53], abs=0.01)


# --- sources


class NoiseOnly(Algorithm):
    """u = g − ∇f"""

    def perturbation(self, objective, x, gamma):
        return objective.sample_grad(x, gamma) - objective.grad(x)


class GSAM(SAM):
    """SAM with α = 0.4 times the part of Hu across g once more"""

    def direction(self, objective, x, gamma):
        g, G = objective.sample_grad(x, gamma), super().direction(objective, x, gamma)
        along = g / torch.linalg.vector_norm(g, dim=-1, keepdim=True)
        gap = G - g
        return G + 0.4 * (gap - (gap * along).sum(-1, keepdim=True) * along)


class ESAM(SAM):
    """SAM with each coordinate of u kept with probability ½, and doubled; the mask is that of the sample number"""

    def perturbation(self, objective, x, gamma):
        u, number = (
            super().perturbation(objective, x, gamma),
            torch.div(gamma, 3, rounding_mode="floor"),
        )
        return 2 * u * torch.cat([number % 2, number // 2], -1)


FIRST = {  # E[Hu] and S at B = 1
    USAM(0.1, source="full"): ((4 / 3, -2 / 3), [[5 / 9, 8 / 9], [1, 14 / 9]]),
    USAM(0.1, source="independent"): ((4 / 3, -2 / 3), [[5 / 9, 8 / 9], [1, 14 / 9]]),
    USAM(0.1, source="previous"): ((4 / 3, -2 / 3), [[13 / 9, 20 / 9], [25 / 9, 40 / 9]]),
    NoiseOnly(0.1): ((7 / 3, 1 / 3), [[7 / 9, 7 / 9], [7 / 9, 17 / 9]]),
    SAM(0.1, source="independent"): (
        (0.8419676404, -0.1842621348),
        [[0.5086343071, 0.4824045318], [0.9471046442, 0.9033883521]],
    ),
}


@pytest.mark.parametrize("algorithm", FIRST, ids=repr)
def test_sources_of_single_samples(algorithm):
    """The own batch is the wrong variant."""
    mean, S = FIRST[algorithm]
    close(mean_Hu(algorithm, three()), mean)
    close(cross_covariance(algorithm, three(), origin), S, 1e-9)
    own = (SAM if isinstance(algorithm, SAM) else USAM)(0.1)
    assert (mean_Hu(own, three()) - mean_Hu(algorithm, three())).abs().max() > 0.1
    assert (cross_covariance(own, three(), origin) - torch.tensor(S, dtype=F64)).abs().max() > 0.1


@pytest.mark.parametrize(
    "source, known",
    [
        ("full", (0.7829629630, 1.5307407407, 3.2140740741)),
        ("independent", (0.8511111111, 1.5455555556, 3.2577777778)),
    ],
)
def test_covariance_of_a_step(source, known):
    a, b, c = known
    close(noise_covariance(USAM(0.1, source=source), three(), origin, "exact"), [[a, b], [b, c]])
    other = "independent" if source == "full" else "full"
    assert abs(noise_covariance(USAM(0.1, source=other), three(), origin, "exact")[0, 0] - a) > 0.05


def test_variants_of_sam():
    """GSAM from its exact moments, of which ρ² is taken off; ESAM's mask adds a noise, and nothing to the mean."""
    mean = lambda a: -drift(a, three(), origin, "exact") - g_i.mean(0)  # noqa: E731
    close(mean(GSAM(0.1)) / 0.1, (1.8792754772, -0.1067451116))
    none, once, twice = (
        noise_covariance(GSAM(rho), three(), origin, "exact") for rho in (1e-9, 0.1, 0.2)
    )
    S = torch.tensor([[0.6126088105, 0.5599215551], [0.9321257953, 1.1554248140]], dtype=F64)
    plain = torch.cov(g_i.T, correction=0)
    assert_close((4 * once - twice - 3 * plain) / 0.2, S + S.T, rtol=1e-8, atol=1e-8)
    assert_close(none, plain, rtol=1e-7, atol=1e-7)
    assert (mean(SAM(0.1)) - mean(GSAM(0.1))).abs().max() > 1e-3
    masked = FiniteSum(lambda x: three().sample_losses(x).repeat(4), 12, 2)
    C = noise_covariance(ESAM(0.1), masked, origin, "exact")
    close(C, [[0.8501196994, 1.5261102388], [1.5261102388, 3.1558128594]])
    close(noise_covariance(SAM(0.1), three(), origin, "exact")[0, 0], 0.8187863660)
    assert_close(
        drift(ESAM(0.1), masked, origin, "exact"), drift(SAM(0.1), three(), origin, "exact")
    )


def test_sources_on_the_line():
    """Stationary variances: of noise alone, of SGD, and the one-step covariance in place of the long-run one."""
    one, zero = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    a, b = (NoiseOnly(0.3).step(line, x, 0.1, z).item() for x, z in ((one, zero), (zero, one)))
    close(b**2 * 0.7**2 / (1 - a**2), 0.038944014809, 1e-11)
    close(stationary_covariance(Chain(SGD(), line, 0.1)).item(), 0.020156314274, 1e-11)
    previous = SDE(USAM(0.3, source="previous"), line, 0.001)
    rate = -previous.drift(one).item()
    alone = {
        source: SDE(USAM(0.3, source=source), line, 0.001).covariance(zero).item()
        for source in ("full", "independent")
    }
    close(alone["full"] / (2 * rate) / 0.001, 0.1355838406)  # Σ only
    close(alone["independent"] / (2 * rate) / 0.001, 0.1562061428)  # factor form
    close(stationary_covariance(previous).item() / 0.001, 0.2619615385)


OTHERS = {  # source, B, replace: first order with the own batch's drift; second order with its noise, factor and exact
    ("full", 2, False): (1.5252216e-3, 1.38175e-5, 1.3948330e-5),
    ("independent", 1, True): (6.2994384e-3, 3.28869e-5, 3.4984936e-5),
}


@pytest.mark.parametrize("case", OTHERS, ids=lambda c: c[0])
def test_own_batches_for_other_sources_on_the_circle(case):
    source, B, replace = case
    problem, errors = periodic_examples(1, batch_size=B, replace=replace)[USAM], []
    for eta in (2.0**-8, 2.0**-9):
        a, own = USAM(0.5 * eta**0.5, source=source), USAM(0.5 * eta**0.5)
        models = [
            mixed(a, own, problem, eta, "other", "own"),
            *(mixed(a, own, problem, eta, "own", "other", **form) for form in (SECOND, EXACT)),
        ]
        errors.append([exact_error(Chain(a, problem, eta), model, 1, phi) for model in models])
    assert errors[0] == pytest.approx(OTHERS[case], rel=5e-6)
    assert order(np.array(errors)) == pytest.approx([0.5, 1.5, 1.5], abs=0.15)


def test_noise_of_an_independent_batch():
    """First order on the circle: the factor form, and the exact covariance."""
    problem, a = periodic_examples(1)[USAM], USAM(0.5 * 2.0**-4, source="independent")
    chain = Chain(a, problem, 2.0**-8)
    for noise, known in (("factor", 2.9605345e-4), ("exact", 2.9605173e-4)):
        assert exact_error(chain, SDE(a, problem, 2.0**-8, noise=noise), 1, phi) == pytest.approx(
            known, rel=2e-8
        )


# --- momentum


def test_the_first_step_of_momentum():
    """The lag of step k has the factor 1 − μᵏ: without it the first step is of order 1 only."""

    class SteadyLag(SDE):
        def position(self, state):
            y, k = self.split(state)
            return super().position(torch.cat([y, torch.full_like(k, 1e9)], -1))

    problem, x = periodic_examples(1)[USAM], torus_nodes(64, 1)[1]
    known = {SDE: (6.268e-6, 1.567e-6, 3.919e-7), SteadyLag: (8.431e-4, 4.232e-4, 2.120e-4)}
    for model, numbers in known.items():
        for eta_e, number in zip((2.0**-8, 2.0**-9, 2.0**-10), numbers):
            pair = (
                Chain(USAM(0.3), problem, eta_e / 2, momentum=0.5),
                model(USAM(0.3), problem, eta_e / 2, momentum=0.5, **EXACT),
            )
            ours, its = (mean_after(process, 1, phi, x, 64, 13)[0] for process in pair)
            assert abs(ours - its).max() == pytest.approx(number, rel=2e-4)


HOW = {
    "plain": dict(momentum=0.5),
    "Nesterov": dict(momentum=0.5, nesterov=True),
    "dampened": dict(momentum=0.7, dampening=0.3),
}


@pytest.mark.parametrize("name", HOW)
def test_the_first_steps_of_momentum_are_of_order_2(name):
    """And the start is x₀ up to η². Torch does not dampen its first buffer: without its part of the lag the order is 1."""

    class Dampened(SDE):
        def position(self, state):
            y, k = self.split(state)
            lag = self.rate * self.momentum / (1 - self.momentum) * (1 - self.momentum**k)
            return y + lag * self.mean_gradient(y)

    problem, x, how = periodic_examples(1)[USAM], torus_nodes(48, 1)[1], HOW[name]

    def errors(model, steps):
        found = []
        for eta in (2.0**-8, 2.0**-9):
            pair = (
                cls(USAM(0.3), problem, eta, **how, **more)
                for cls, more in ((Chain, {}), (model, EXACT))
            )
            ours, its = (mean_after(process, steps, phi, x, 48, 13)[0] for process in pair)
            found.append(abs(ours - its).max())
        return found

    for steps in (0, 1, 2, 5):
        own = errors(SDE, steps)
        assert own[0] < 1e-13 or abs(order(own) - 2) < 0.03
        if name == "dampened" and steps < 3:  # μᵏ is small soon
            assert abs(order(errors(Dampened, steps)) - 1) < 0.1


def test_torchs_first_buffer():
    """It is not dampened: from x₀ itself the second-order SDE is of order 1."""

    class FromStart(SDE):
        def start(self, x):
            return torch.cat([x, torch.zeros_like(x)], -1)

    problem, found = periodic_examples(1)[USAM], {}
    how = dict(momentum=0.5, dampening=0.5)
    for model in (SDE, FromStart):
        found[model] = [
            exact_error(
                Chain(USAM(0.3), problem, eta, **how),
                model(USAM(0.3), problem, eta, **how, **EXACT),
                1,
                phi,
                64,
                13,
            )
            for eta in (2.0**-9, 2.0**-10)
        ]
    assert abs(order(found[SDE]) - 2) < 0.02 and abs(order(found[FromStart]) - 1) < 0.02


def test_noise_without_the_perturbation_under_momentum():
    """With additive noise the full gradient's perturbation leaves the noise Σ."""
    chain = Chain(USAM(0.3, source="full"), line, 0.1, momentum=0.9)
    close(stationary_covariance(chain).item(), 0.142353105395, 1e-11)
    own = Chain(USAM(0.3), line, 0.1, momentum=0.9)
    assert stationary_covariance(own).item() > 0.27


def test_noise_of_momentum_as_the_perturbation():
    """MSAM on the circle: the long-run noise, in two forms; the opposite sign must miss."""

    class AtVelocity(Chain):  # the gradient at x − ρv
        def trained_step(self, state, gamma):
            x, v = self.split(state)
            v = self.momentum * v + self.objective.sample_grad(x - self.algorithm.rho * v, gamma)
            return torch.cat([x - self.eta * v, v], -1)

    problem, eta_e = periodic_examples(1)[USAM], 2.0**-8
    chain = AtVelocity(USAM(0.5 * eta_e**0.5), problem, eta_e / 2, momentum=0.5)

    def error(sign, noise):
        algorithm = USAM(1.0, source="previous")
        algorithm.rho = sign * chain.algorithm.rho / (1 - chain.momentum)  # may be negative here
        return exact_error(
            chain, SDE(algorithm, problem, eta_e / 2, noise=noise, momentum=0.5), 1, phi, 48, 13
        )

    for noise, known in (("factor", 2.090737e-3), ("truncated", 2.091189e-3)):
        assert error(-1, noise) == pytest.approx(known, rel=2e-6) and error(1, noise) > 5 * known


# --- the second order in the radius


def test_first_form_with_the_exact_noise():
    """At ρ = ½ η^⅓ one more order in ρ restores order 1; without it the order is 0.65."""
    problem = periodic_examples(1)[USAM]

    def errors(expansion):
        pairs = [(USAM(0.5 * eta ** (1 / 3)), problem, eta) for eta in (2.0**-9, 2.0**-10)]
        return [exact_error(Chain(*pair), SDE(*pair, expansion, "exact"), 1, phi) for pair in pairs]

    second, first = errors("second"), errors("first")
    assert second == pytest.approx([1.685394e-4, 8.326247e-5], rel=2e-6)
    assert first == pytest.approx([1.016080e-3, 6.457347e-4], rel=2e-6)
    assert order(second) == pytest.approx(1.02, abs=0.01) and order(first) == pytest.approx(
        0.65, abs=0.01
    )


def test_the_previous_gradient_is_not_perturbed_itself():
    """The stationary variance on the line with g of the step before, and with its perturbed gradient in place of it."""
    known = stationary_covariance(Chain(USAM(0.3, source="previous"), line, 0.1)).item()
    close(known, 0.028095223748, 1e-11)
    lam, rho, eta, s = 1.3, 0.3, 0.1, 0.7
    gradient, noise = np.array([lam, lam * rho]), s  # G = λ(x + ρ G_before) + s ξ
    F = np.array([[1, 0], [0, 0]]) + np.outer([-eta, 1], gradient)
    B = np.array([-eta, 1]) * noise
    V = np.linalg.solve(np.eye(4) - np.kron(F, F), np.outer(B, B).ravel())
    close(V[0], 0.032410954341, 1e-11)
    assert abs(V[0] - known) > 0.004


# --- SAM on the three samples and at a maximum


def test_sam_on_single_samples():
    """DNSAM's numbers are USAM's over ‖ḡ‖, and SAM's are not."""
    S = [[0.7101650562, 0.6314757303], [1.1836084269, 1.2746817728]]
    close(mean_Hu(SAM(0.1), three()), (1.7101650562, -0.0351909363))
    close(cross_covariance(SAM(0.1), three(), origin), S)
    scale = 3 / 13**0.5
    assert_close(mean_Hu(DNSAM(0.1), three()), scale * mean_Hu(USAM(0.1), three()))
    assert_close(
        cross_covariance(DNSAM(0.1), three(), origin),
        scale * cross_covariance(USAM(0.1), three(), origin),
    )
    assert not torch.allclose(
        cross_covariance(DNSAM(0.1), three(), origin), torch.tensor(S, dtype=F64), rtol=0.05
    )


def test_two_covariances_at_a_maximum():
    """Of g + ρHu it is that of a step, here exactly; the linear response of u has another term in ρ²."""
    top, x, draws = Quadratic(-torch.eye(1, dtype=F64), 0.2), torch.zeros(1, dtype=F64), 100_000
    close(noise_covariance(SAM(0.1), top, x).item(), 0.01445, 1e-5)
    step = noise_covariance(SAM(0.1), top, x, "exact", draws=draws).item()
    assert abs(step / 0.01808 - 1) < 4 * (2 / draws) ** 0.5 < abs(step / 0.01445 - 1)
