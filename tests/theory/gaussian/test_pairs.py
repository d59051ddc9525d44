"""The propagated terms of every recursion against Monte Carlo of pairs of neurons (tests.oracles.pairs)."""

import math

import pytest
import torch

from tests.oracles.differentials import first_layer, last_layer_means, patterns_of, push, second_layer_patterns
from tests.oracles.pairs import (
    FLAT,
    GELU,
    STEEP,
    TANH,
    Setting,
    derivatives,
    limit,
    pair_patterns,
    pairs_of_layer_2,
    pairs_of_layer_3,
)
from torch_eft.theory import MLPEnsemble
from torch_eft.theory.initialization.statistics import initial_statistics

KERNEL, ABOVE = ("V", "D", "A", "G1", "Theta1"), ("B", "F", "P", "Q", "R", "S", "T", "U")


def propagated(setting: Setting, level: int, names):
    """{(vertex, power of the output's lambda_W): coefficient of r} of the product's recursions, level -> level + 1."""
    found = {}
    for lambda_W in (0.0, 1.0, 2.0):
        at_r = []
        for ratio in (1, 2):
            depth = level + 1
            ensemble = MLPEnsemble(
                [3, *[10] * (level - 1), 10 * ratio, 2],
                setting.activation,
                C_b=setting.C_b[:depth],
                C_W=setting.C_W[:depth],
                lambda_b=setting.lambda_b[:depth],
                lambda_W=(*setting.lambda_W[:level], lambda_W),
            )
            at_r.append(initial_statistics(ensemble, setting.x, statistics=names)[-1])
        found[lambda_W] = {name: getattr(at_r[1], name) - getattr(at_r[0], name) for name in names}
    parts = {}
    for name in names:
        zero, one, two = (found[lambda_W][name] for lambda_W in (0.0, 1.0, 2.0))
        second = (two - 2 * one + zero) / 2
        parts[name, 0], parts[name, 1], parts[name, 2] = zero, one - zero - second, second
    return parts


def agrees(measured, theory):
    for key, found in measured.items():
        sigmas = found.deviation(theory[key])
        assert sigmas < 4, f"{key}: {sigmas:.1f} standard errors off (second order {found.left:.2g})"
    # What was measured is all there is: other powers of lambda_W are absent.
    for key, value in theory.items():
        if key not in measured:
            assert float(value.abs().max()) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("setting", [TANH, GELU, STEEP, FLAT], ids=["tanh", "gelu", "steep", "flat"])
def test_pairs_of_layer_2(setting):
    """All thirteen recursions, one factor of r each, with errors of one or two per cent of the largest entry."""
    measured = pairs_of_layer_2(setting)
    agrees(measured, propagated(setting, 2, KERNEL + ABOVE))
    for key, found in measured.items():
        assert float(found.error.max() / found.value.abs().max()) < 0.05, key


@pytest.mark.slow
@pytest.mark.parametrize("setting", [TANH, GELU], ids=["tanh", "gelu"])
def test_pairs_of_layer_3(setting):
    """The z and NTK sector one layer up: here G1 and Theta1 propagate, too."""
    agrees(pairs_of_layer_3(setting), propagated(setting, 3, KERNEL))


def two_layers(setting, widths, count, seed=0):
    """A layer 2 known in full, from the identities that are held to automatic differentiation."""
    generator = torch.Generator().manual_seed(seed)
    hyper = list(zip(setting.C_b, setting.C_W, setting.lambda_b, setting.lambda_W, strict=True))
    layer, _ = first_layer(setting.x, widths[0], *hyper[0], count, generator)
    W = torch.randn(count, widths[1], widths[0], dtype=torch.float64, generator=generator)
    b = torch.randn(count, widths[1], 1, dtype=torch.float64, generator=generator)
    W, b = W * math.sqrt(setting.C_W[1] / widths[0]), b * math.sqrt(setting.C_b[1])
    return layer, W, b, push(layer, setting.sigma, W, b, *hyper[1][2:])


@pytest.mark.parametrize("setting", [TANH, GELU], ids=["tanh", "gelu"])
def test_patterns_of_pairs_are_those_of_the_layer_identities(setting):
    """Two groups of three neurons: sums over pairs between them, from the layer's full tensors."""
    layer, W, b, above = two_layers(setting, (5, 6), 2)
    values = derivatives(setting.sigma, layer.z)
    groups = (W[:, :3], b[:, :3]), (W[:, 3:], b[:, 3:])
    there = pair_patterns(setting, values, *groups[0], *groups[1])
    back = pair_patterns(setting, values, *groups[1], *groups[0])
    between = torch.zeros(6, 6, dtype=torch.float64)
    between[:3, 3:] = between[3:, :3] = 1
    for C_W, lambda_W in ((1.3, 0.0), (1.3, 0.7)):
        means = last_layer_means(patterns_of(above), setting.sigma, 0.1, C_W, 0.2, lambda_W, between, 0.0)[2]
        for name, value in means.items():
            found = 0
            for power in range(3):
                if (name, power) in there:
                    part = 9 * (there[name, power] + back[name, power]) / 36
                    found = found + C_W ** (2 - power) * lambda_W**power * part
            torch.testing.assert_close(found, value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("setting", [TANH, GELU], ids=["tanh", "gelu"])
def test_closed_patterns_of_layer_2_are_those_of_the_layer_identities(setting):
    """The n^2 numbers of ``second_layer_patterns`` by their means over many draws of the same weights' law."""
    widths, hyper = (3, 2), (setting.C_b, setting.C_W, setting.lambda_b, setting.lambda_W)
    generator = torch.Generator().manual_seed(0)
    closed = second_layer_patterns(setting.x, setting.sigma, widths, *hyper, 5, generator)
    generator.manual_seed(0)
    # The draws of second_layer_patterns, in its order.
    x = setting.x

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    z = normal(5, widths[0], 3) @ x.T * math.sqrt(setting.C_W[0] / 3)
    z = z + normal(5, widths[0], 1) * math.sqrt(setting.C_b[0])
    W = normal(5, widths[1], widths[0]) * math.sqrt(setting.C_W[1] / widths[0])
    b = normal(5, widths[1], 1) * math.sqrt(setting.C_b[1])
    layer, _ = first_layer(x, widths[0], *(part[0] for part in hyper), 5, generator)
    layer.z = z
    full = patterns_of(push(layer, setting.sigma, W, b, setting.lambda_b[1], setting.lambda_W[1]))
    for name, value in vars(closed).items():
        torch.testing.assert_close(value, getattr(full, name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("setting", [TANH, GELU], ids=["tanh", "gelu"])
def test_means_given_the_layer_below_are_those_of_drawn_neurons(setting):
    """``conditional_means`` against a million neurons above one layer 1 of three neurons."""
    from tests.oracles.pairs import conditional_means

    generator = torch.Generator().manual_seed(0)
    T, n, count = limit(setting).Theta[0], 3, 1_000_000
    s, s1 = setting.sigma(z := torch.randn(n, 2, dtype=torch.float64, generator=generator)), setting.sigma(z, 1)
    C, share = setting.C_W[1] / n, setting.lambda_W[1] / n
    W = torch.randn(count, n, dtype=torch.float64, generator=generator) * math.sqrt(C)
    b = torch.randn(count, 1, dtype=torch.float64, generator=generator) * math.sqrt(setting.C_b[1])
    above = W @ s + b
    h = torch.einsum("ia,ib,ab->iab", s1, s1, T)
    constant = setting.lambda_b[1] + share * s.T @ s
    H = constant + torch.einsum("ki,iab->kab", W * W, h)
    f = torch.einsum("ka,kb->kab", setting.sigma(above), setting.sigma(above))
    g = torch.einsum("ka,kb,kab->kab", setting.sigma(above, 1), setting.sigma(above, 1), H)
    G = setting.C_b[1] + C * s.T @ s
    X = C**2 * torch.einsum("ic,id,iab->cdab", s, s, h)
    exact = conditional_means(setting.sigma, G[None], (constant + C * h.sum(0))[None], X[None])
    for drawn, expected in zip((f, g), exact, strict=True):
        error = drawn.std(0) / math.sqrt(count)
        assert float(((drawn.mean(0) - expected[0]).abs() / error).max()) < 4


@pytest.mark.slow
@pytest.mark.parametrize("setting", [TANH, GELU], ids=["tanh", "gelu"])
def test_patterns_that_the_recursions_drop_are_of_higher_order(setting):
    """Three H_km, and H_km times dH_kkm or dH_kmm: n times their mean falls off as 1/n, next to parts that do not."""
    hyper, group, at = (setting.C_b, setting.C_W, setting.lambda_b, setting.lambda_W), 12, {}
    different = 1 - torch.eye(group, dtype=torch.float64)
    for n in (16, 32):
        generator, parts = torch.Generator().manual_seed(5), []
        for _ in range(40):
            patterns = second_layer_patterns(setting.x, setting.sigma, (n, group), *hyper, 50, generator)
            with_, without = (
                last_layer_means(patterns, setting.sigma, *(part[2] for part in hyper), different, dropped)[2]
                for dropped in (1.0, 0.0)
            )
            parts.append({name: n * (with_[name] - without[name]) * group / (group - 1) for name in "RSU"})
        at[n] = {name: torch.cat([part[name] for part in parts]) for name in "RSU"}
    theory = propagated(setting, 2, ("R", "S", "U"))
    for name in "RSU":
        (first, e_1), (second, e_2) = ((v.mean(0), v.std(0) / math.sqrt(len(v))) for v in (at[16][name], at[32][name]))
        limit_, error = 2 * second - first, (4 * e_2.square() + e_1.square()).sqrt()
        scale = sum(setting.lambda_W[2] ** power * theory[name, power] for power in range(3)).abs().max()
        # a / n + b / n^2 leaves b / (2 n^2), a quarter of x(n) - x(2n) even for b = 4 a.
        left = float((first - second).norm()) / 4
        assert float(((limit_.abs() - left) / error).max()) < 4, name
        assert 4 * float(error.max() / scale) + left / scale < 0.1, name  # a tenth would be seen
