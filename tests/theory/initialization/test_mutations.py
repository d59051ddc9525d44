"""Would the tests see it? Every additive term of every recursion is dropped in turn, and some Monte Carlo must object.

The theory with a term dropped is compared, entry by entry, with estimates of really drawn networks, made once: layer 2
(exact at any width), whole networks at layers 3 and 4, pairs of neurons below them (tests.oracles.pairs), and with
the symmetries that each tensor has by definition. ``pytest -m slow -s`` prints who rejects which mutant.
"""

import math
from collections import defaultdict
from functools import cache

import pytest
import torch

from tests.oracles.differentials import (
    Patterns,
    first_layer,
    kernels_only,
    last_layer_means,
    ntk_sector_means,
    second_layer_patterns,
)
from tests.oracles.mutations import Mutator
from tests.oracles.pairs import (
    FLAT,
    GELU,
    STEEP,
    TANH,
    Measured,
    Setting,
    extrapolated,
    limit,
    pairs_of_layer_2,
    pairs_of_layer_3,
)
from torch_eft.theory import MLPEnsemble
from torch_eft.theory.initialization.statistics import initial_statistics

SETTINGS = {"tanh": TANH, "gelu": GELU, "steep": STEEP, "flat": FLAT}
SYMMETRIES = {
    "V": ["bacd", "cdab"],
    "A": ["bacd", "cdab"],
    "D": ["bacd", "abdc"],
    "B": ["badc", "cdab"],
    "F": ["cdab"],
    "P": ["acbd"],
    "R": ["abdc"],
    "S": ["badc"],
    "T": ["cdab"],
    "U": ["cdab"],
    "G1": ["ba"],
    "Theta1": ["ba"],
}
ALL = ("V", "A", "B", "D", "F", "P", "Q", "R", "S", "T", "U", "G1", "Theta1")
SIGMAS = 4.0


# ---- Monte Carlo of whole networks


def estimates(G, h, means, n, K, Theta):
    """{vertex: (estimate, standard error)} from each network's conditional means."""

    def mean(values):
        return values.mean(0), values.std(0) / math.sqrt(len(values))

    def covariance(a, b):
        return mean(n * torch.einsum("sab,scd->sabcd", a - a.mean(0), b - b.mean(0)))

    found = {"V": covariance(G, G), "A": covariance(h, h), "D": covariance(G, h), "K": mean(G), "Theta": mean(h)}
    found |= {key: mean(n * value) for key, value in means.items()}
    return found | {"G1": mean(n * (G - K)), "Theta1": mean(n * (h - Theta))}


def hyperparameters(setting, layer):
    return setting.C_b[layer], setting.C_W[layer], setting.lambda_b[layer], setting.lambda_W[layer]


@cache
def layer_1(setting: Setting) -> dict[str, Measured]:
    """z z of drawn neurons; the NTK is the same for all."""
    layer, _ = first_layer(setting.x, 1, *hyperparameters(setting, 0), 200_000, torch.Generator().manual_seed(4))
    products, constant = torch.einsum("ska,skb->sab", layer.z, layer.z), layer.H[0, 0, 0]
    drawn = Measured(products.mean(0), products.std(0) / math.sqrt(len(products)), 0.0)
    return {"K": drawn, "Theta": Measured(constant, 1e-12 * constant.abs(), 0.0)}


@cache
def layer_2(setting: Setting) -> dict[str, Measured]:
    """One hidden neuron will do: nothing is left out at any width."""
    count, x, T = 200_000, setting.x, limit(setting).Theta[0]
    layer, _ = first_layer(x, 1, *hyperparameters(setting, 0), count, torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer.H[0, 0, 0], T)
    nothing = [x.new_zeros(1, *[1] * (labels + 2)) for labels in (3, 3, 3, 4, 4, 4, 4)]
    patterns = Patterns(layer.z, layer.H, *(part.expand(count, 1, 1, *[2] * (part.ndim - 3)) for part in nothing))
    G, h, means = last_layer_means(patterns, setting.sigma, *hyperparameters(setting, 1))
    found = estimates(G, h, means, 1, limit(setting).K[1], limit(setting).Theta[1])
    return {key: Measured(value, error, 0.0) for key, (value, error) in found.items()}


@cache
def layer_3(setting: Setting) -> dict[str, Measured]:
    found = []
    for widths, count, chunk in (((16, 24), 2000, 50), ((32, 48), 1200, 20)):
        generator, parts = torch.Generator().manual_seed(2), []
        hyper = setting.C_b, setting.C_W, setting.lambda_b, setting.lambda_W
        for _ in range(count // chunk):
            patterns = second_layer_patterns(setting.x, setting.sigma, widths, *hyper, chunk, generator)
            parts.append(last_layer_means(patterns, setting.sigma, *hyperparameters(setting, 2)))
        found.append(joined(parts, setting, widths))
    return extrapolated(*found)


@cache
def layer_4(setting: Setting) -> dict[str, Measured]:
    found = []
    for widths, count, chunk in (((16, 24, 16), 20_000, 500), ((32, 48, 32), 10_000, 250)):
        generator, parts = torch.Generator().manual_seed(3), []
        hyper = setting.C_b, setting.C_W, setting.lambda_b, setting.lambda_W
        for _ in range(count // chunk):
            z, H = kernels_only(setting.x, setting.sigma, widths, *hyper, chunk, generator)
            parts.append(ntk_sector_means(z, H, setting.sigma, *hyperparameters(setting, 3)))
        found.append(joined(parts, setting, widths))
    return extrapolated(*found)


def joined(parts, setting, widths):
    level = len(widths)
    G, h = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    means = {key: torch.cat([part[2][key] for part in parts]) for key in parts[0][2]}
    return estimates(G, h, means, widths[-1], limit(setting).K[level], limit(setting).Theta[level])


# ---- the theory, with or without a mutation


class Theory:
    """What the (mutated) recursions predict for each check of one setting; moments are computed once for all."""

    def __init__(self, mutator: Mutator, setting: Setting) -> None:
        self.mutator, self.setting = mutator, setting
        self._evaluators = {}
        self._known = {}

    def forget(self, names) -> None:
        """Drop what depends on a mutation that changes: the tensors ``names``, and no moments."""
        self._known = {}
        for evaluator in self._evaluators.values():
            for key in list(evaluator._memo):
                assert key[0] in ALL  # the memory is kept by (name, ...)
                if key[0] in names:
                    del evaluator._memo[key]

    def evaluator(self, widths, lambda_W=None):
        if (widths, lambda_W) not in self._evaluators:
            setting, depth = self.setting, len(widths) + 1
            output = setting.lambda_W[depth - 1] if lambda_W is None else lambda_W
            ensemble = MLPEnsemble(
                [3, *(10 * width for width in widths), 2],
                setting.activation,
                C_b=setting.C_b[:depth],
                C_W=setting.C_W[:depth],
                lambda_b=setting.lambda_b[:depth],
                lambda_W=(*setting.lambda_W[: depth - 1], output),
            )
            self._evaluators[widths, lambda_W] = self.mutator.evaluator(ensemble, setting.x)
        return self._evaluators[widths, lambda_W]

    def tensor(self, name, layer, widths, lambda_W=None):
        count = labels(name)
        array = self.evaluator(widths, lambda_W).array(name, layer, "abcd"[:count])
        return array.expand([2] * count + [1] * (array.ndim - count)).reshape([2] * count)

    def whole(self, name, layer):
        """At widths (2n, 3n, 2n)."""
        return self.tensor(name, layer, (2, 3, 2))

    def propagated(self, key, level):
        """Coefficient of r and of a power of the output's lambda_W in the recursion from ``level`` on."""
        name, power = key
        if (name, level) not in self._known:
            at = []
            for lambda_W in (0.0, 1.0, 2.0):
                one, two = ((*[1] * (level - 1), ratio) for ratio in (1, 2))
                at.append(self.tensor(name, level + 1, two, lambda_W) - self.tensor(name, level + 1, one, lambda_W))
            second = (at[2] - 2 * at[1] + at[0]) / 2
            self._known[name, level] = (at[0], at[1] - at[0] - second, second)
        return self._known[name, level][power]

    def asymmetry(self, name):
        """Largest violation of the symmetries at layer 3, relative to the largest entry."""
        evaluator = self.evaluator((2, 3, 2))
        letters = "abcd"[: labels(name)]
        value = self.mutator.recursions[name](evaluator, 3, letters)
        images = [self.mutator.recursions[name](evaluator, 3, image) for image in SYMMETRIES.get(name, [])]
        return max((float((value - image).abs().max() / value.abs().max()) for image in images), default=0.0)


def labels(name):
    return 2 if name in ("G1", "Theta1") else 4


def verdicts(theories, affected):
    """{check: largest deviation in standard errors} of the theory in its present state, for the tensors named."""
    found = defaultdict(float)

    def judge(check, measured, prediction):
        found[check] = max(found[check], measured.deviation(prediction))

    for theory in theories.values():
        setting = theory.setting
        for name, measured in layer_2(setting).items():
            if name in affected and labels(name) == 4:
                judge("layer 2", measured, theory.whole(name, 2))
        for key, measured in pairs_of_layer_2(setting).items():
            if key[0] in affected:
                judge("pairs 2", measured, theory.propagated(key, 2))
        if setting in (TANH, GELU):
            for key, measured in pairs_of_layer_3(setting).items():
                if key[0] in affected:
                    judge("pairs 3", measured, theory.propagated(key, 3))
            for check, layer, measurements in (("layer 3", 3, layer_3(setting)), ("layer 4", 4, layer_4(setting))):
                for name, measured in measurements.items():
                    if name in affected:
                        judge(check, measured, theory.whole(name, layer))
    first = theories["tanh"]
    # In units of 1e-9 / 4, so that rounding is far below the threshold and a missing twin far above it.
    found["symmetry"] = max((first.asymmetry(name) for name in affected), default=0.0) / 1e-9 * SIGMAS
    return dict(found)


def limits(mutator):
    """The same for K and Theta at infinite width."""
    found = defaultdict(float)
    for setting in SETTINGS.values():
        first = {name: values[:3] for name, values in hypers(setting).items()}
        ensemble = MLPEnsemble([3, 10, 10, 2], setting.activation, **first)
        K, Theta = mutator.limit(ensemble, setting.x)
        judged = {"layer 1": layer_1(setting), "layer 2": layer_2(setting)}
        if setting in (TANH, GELU):
            judged["layer 3"] = layer_3(setting)
        for level, (check, measured) in enumerate(judged.items()):
            for name, part in (("K", K), ("Theta", Theta)):
                found[check] = max(found[check], measured[name].deviation(part[level]))
    return dict(found)


def hypers(setting):
    return {name: getattr(setting, name) for name in ("C_b", "C_W", "lambda_b", "lambda_W")}


CHECKS = ("layer 1", "layer 2", "layer 3", "layer 4", "pairs 2", "pairs 3", "symmetry")


def test_the_mutator_alone_changes_nothing_and_a_mutant_changes_its_own_recursion_only():
    mutator = Mutator()
    theory = Theory(mutator, GELU)
    ensemble = MLPEnsemble([3, 20, 30, 20, 2], "gelu", **hypers(GELU))
    product = initial_statistics(ensemble, GELU.x, statistics=ALL)
    for name in ALL:
        for layer in (2, 3, 4):
            assert torch.equal(theory.whole(name, layer), getattr(product[layer - 1], name)), (name, layer)
    mutator.active = next(mutant for mutant in mutator.seen if mutant.inside == "F" and mutant.path)
    theory.forget(ALL)
    changed = {name for name in ALL if not torch.equal(theory.whole(name, 3), getattr(product[2], name))}
    assert changed == {"F"}
    changed = {name for name in ALL if not torch.equal(theory.whole(name, 4), getattr(product[3], name))}
    assert changed == mutator.affected("F")


def test_recursions_have_the_symmetries_of_their_tensors_before_any_is_used():
    """The evaluator reduces letters by these symmetries; here each recursion is asked for the images themselves."""
    theory = Theory(Mutator(), TANH)
    for name in ALL:
        assert theory.asymmetry(name) < 1e-9, name


@pytest.mark.slow
def test_every_term_of_every_recursion_is_seen():
    mutator = Mutator()
    theories = {key: Theory(mutator, setting) for key, setting in SETTINGS.items()}
    intact = verdicts(theories, set(ALL))
    for check, sigmas in (intact | limits(mutator)).items():
        assert sigmas < SIGMAS, f"{check} rejects the theory itself by {sigmas:.1f} standard errors"
    mutants = list(mutator.seen)
    assert {mutant.inside for mutant in mutants} == {*ALL, "K"}
    rows, survivors = [], []
    for mutant in mutants:
        affected = mutator.affected(mutant.inside)
        mutator.active = mutant
        for theory in theories.values():
            theory.forget(affected)
        found = limits(mutator) if mutant.inside == "K" else verdicts(theories, affected)
        for theory in theories.values():
            theory.forget(affected)
        killers = [check for check in CHECKS if found.get(check, 0.0) > SIGMAS]
        rows.append((mutant, found, killers))
        if not killers:
            survivors.append(mutant)
    mutator.active = None
    report(rows, mutator)
    assert not survivors, f"{len(survivors)} dropped terms go unseen: {'; '.join(map(str, survivors))}"


def report(rows, mutator):
    print(f"\n{len(rows)} terms; sums of tensors not evaluated (other kinds of sigma): {mutator.other_sums()}")
    print(" ".join(f"{check:>9s}" for check in CHECKS) + "   (standard errors; * rejects)")
    for mutant, found, killers in rows:
        cells = []
        for check in CHECKS:
            if check not in found:
                cells.append(f"{'':9s}")
            elif check == "symmetry":
                cells.append(f"{'*' if check in killers else '':>9s}")
            else:
                cells.append(f"{min(found[check], 99999):8.1f}{'*' if check in killers else ' '}")
        print(" ".join(cells) + f"   {mutant}")
    pairs = {"pairs 2", "pairs 3"}
    only = [mutant for mutant, _, killers in rows if killers and set(killers) <= pairs]
    print(f"decided by pairs of neurons only ({len(only)}):", *only, sep="\n  ")
    twins = [mutant for mutant, _, killers in rows if "symmetry" in killers and set(killers) <= pairs | {"symmetry"}]
    print(f"by pairs, and by the symmetry that one of two twins breaks ({len(twins)}):", *twins, sep="\n  ")
    print(f"nobody objects ({sum(not k for _, _, k in rows)}):", *(m for m, _, k in rows if not k), sep="\n  ")
    for check in CHECKS:
        print(f"{check}: rejects {sum(check in killers for _, _, killers in rows)}")
