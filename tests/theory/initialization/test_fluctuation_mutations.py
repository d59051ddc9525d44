"""Would the tests see it? Every term of the recursions of the dNTK's covariance is dropped, and its sign changed.

The recursions from layer 2 to 3, with and without a mutation, are compared with triples of drawn neurons
(``tests.oracles.triples``), power by power of r and of lambda_W, along the direction in which the mutation changes a
tensor; and with the tensors' symmetries. ``pytest -m slow -s`` prints who rejects which mutant, and by how much.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch

from tests.oracles.pairs import TANH, Setting
from tests.oracles.triples import triples_of_layer_2
from torch_eft.theory import MLPEnsemble
from torch_eft.theory.initialization import estimators
from torch_eft.theory.initialization.estimators import vertex_replicas
from torch_eft.theory.initialization.evaluator import FLUCTUATIONS, Vertices, images
from torch_eft.theory.initialization.infinite_width import infinite_width
from torch_eft.theory.initialization.recursions import fluctuations

# Neither odd nor flat: products of the means of two composites, at most 5 % of GELU's tensors, are up to 20 % of these.
SOFTPLUS = Setting("softplus", (0.1, 0.1, 0.1), (1.0, 3.0, 1.0), (2.0,) * 3, (1.0,) * 3, seed=3)
SIGMAS = 4.0


class Adjustable(Vertices):
    """The product's evaluator with r and lambda_W of the last step set by hand."""

    ratio, rate = 1.0, 1.0

    def width_ratio(self, m: int) -> float:
        return self.ratio if m == 2 else super().width_ratio(m)

    def lambda_W(self, m: int) -> float:
        return self.rate if m == 2 else super().lambda_W(m)


def evaluator(setting: Setting) -> Adjustable:
    hyper = {name: getattr(setting, name)[:3] for name in ("C_b", "C_W", "lambda_b", "lambda_W")}
    ensemble = MLPEnsemble([3, 10, 10, 2], setting.activation, **hyper)
    sets = dict.fromkeys("abcdef", torch.arange(2))
    with patch.object(estimators, "Vertices", Adjustable):
        (found,) = vertex_replicas(ensemble, *infinite_width(ensemble, setting.x), sets, 100, 2, 0).members
    return found


def at_layer_3(v: Adjustable, name: str, labels: str = "abcdef") -> torch.Tensor:
    """By the recursion itself, from layer 2 as it is."""
    return getattr(fluctuations, name)(v, 3, labels).expand([2] * 6)


def parts(v: Adjustable, name: str) -> dict[tuple[int, int], torch.Tensor]:
    """Coefficients of r^i lambda_W^j of a tensor at layer 3."""
    rates = 1 + name.count("Q")
    values = torch.empty(3, rates, *[2] * 6, dtype=torch.float64)
    for i in range(3):
        for j in range(rates):
            v.ratio, v.rate = float(i), float(j)
            values[i, j] = at_layer_3(v, name)
    for axis, count in ((0, 3), (1, rates)):
        inverse = torch.linalg.inv(torch.vander(torch.arange(count).double(), increasing=True))
        values = torch.tensordot(inverse, values.movedim(axis, 0), 1).movedim(0, axis)
    return {(i, j): values[i, j] for i in range(3) for j in range(rates)}


def asymmetry(v: Adjustable, name: str) -> float:
    """Largest difference between images under the tensor's symmetries, relative to its largest entry."""
    v.ratio, v.rate = 1.0, 1.0
    values = [at_layer_3(v, name, image) for image in images(name, "abcdef")]
    return max(float((value - values[0]).abs().max() / values[0].abs().max()) for value in values)


# ---- mutations: everything that the recursions add up passes by here, and one of it is multiplied by 0 or -1


class Places:
    """Terms of the recursions, by the recursion that takes them and the calls that lead there.

    Attributes:
        seen: Those that came by while nothing was mutated.
        active: The one that is mutated, and its factor.
    """

    def __init__(self) -> None:
        self.seen: dict[tuple, None] = {}
        self.active: tuple[tuple, float] | None = None

    def weighted(self, place: tuple, value: torch.Tensor) -> torch.Tensor:
        place = (*_calls(), *place)
        if self.active is None:
            self.seen.setdefault(place)
        elif self.active[0] == place:
            return self.active[1] * value
        return value

    def terms_of(self, builder: str) -> Callable:
        whole = getattr(fluctuations, builder)

        def wrapped(v, m, labels):
            terms = whole(v, m, labels)
            return [(self.weighted((builder, i), term[0]), *term[1:]) for i, term in enumerate(terms)]

        return wrapped

    def sums(self) -> Callable:
        whole = fluctuations.weighted_sum

        def wrapped(v, terms):
            return whole(v, ((self.weighted(("term", i), value), weight) for i, (value, weight) in enumerate(terms)))

        return wrapped

    def leibniz(self) -> Callable:
        """Of a derivative of a product, those of its factors."""
        whole = fluctuations.mean

        def wrapped(v, m, word, *derivatives):
            value, summing = whole(v, m, word, *derivatives), sys._getframe(1).f_back
            if summing is None or summing.f_code is not whole.__code__:
                return value
            before = summing.f_locals["word"]
            slot = next(i for i, (old, new) in enumerate(zip(before, word, strict=True)) if old != new)
            return self.weighted(("slot", slot, len(derivatives)), value)

        return wrapped

    def reads(self, name: str) -> Callable:
        """Of the factors that recursions written out in full read."""
        method = getattr(Vertices, name)

        def wrapped(v, *args):
            value = method(v, *args)
            written_out = sys._getframe(1).f_code.co_name in ("X3a", "X3b", "of_P", "covariance")
            return self.weighted((name, *args[1:]), value) if written_out else value

        return wrapped

    @contextmanager
    def installed(self):
        with ExitStack() as stack:
            for builder in ("of_U", "of_Q", "of_P"):
                stack.enter_context(patch.object(fluctuations, builder, self.terms_of(builder)))
            stack.enter_context(patch.object(fluctuations, "weighted_sum", self.sums()))
            stack.enter_context(patch.object(fluctuations, "mean", self.leibniz()))
            for name in ("array", "moment", "M"):
                stack.enter_context(patch.object(Adjustable, name, self.reads(name), create=True))
            yield self


def _calls() -> tuple[str, tuple]:
    """The recursion, and functions and lines between it and here."""
    path, frame = [], sys._getframe(2)
    while frame is not None and frame.f_code.co_name not in FLUCTUATIONS:
        code = frame.f_code
        if code.co_filename == fluctuations.__file__ and code.co_name not in ("weighted_sum", "<genexpr>", "mean"):
            path.append((code.co_name, frame.f_lineno))
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_name, tuple(path)


@pytest.mark.slow
def test_every_term_of_the_dntks_covariance_is_seen():
    places, theories = Places(), [(evaluator(setting), triples_of_layer_2(setting)) for setting in (SOFTPLUS, TANH)]
    for v, _ in theories:
        for name in FLUCTUATIONS:
            parts(v, name)  # what layer 2 has is kept from here on, and not mutated
    with places.installed():
        intact = [{name: parts(v, name) for name in FLUCTUATIONS} for v, _ in theories]
        assert len(places.seen) > 250 and {place[0] for place in places.seen} == set(FLUCTUATIONS)
        unseen = []
        for place in places.seen:
            name = place[0]
            for factor in (0.0, -1.0):
                places.active = place, factor
                mutants, broken = [parts(v, name) for v, _ in theories], asymmetry(theories[0][0], name) > 1e-9
                places.active = None
                seen, allowed = 0.0, 0.0
                for found, whole, (_, drawn) in zip(mutants, intact, theories, strict=True):
                    for power, value in found.items():
                        change, measured = value - whole[name][power], drawn[(name, *power)]
                        if float(change.norm()) > 1e-9 * float(whole[name][power].norm()):
                            seen = max(seen, measured.deviation(value, change))
                            allowed = max(allowed, measured.deviation(whole[name][power], change))
                print(f"{seen:7.1f} {'*' if broken else ' '} {factor:g} times {place}")
                assert allowed < SIGMAS, f"the theory itself is off by {allowed:.1f} standard errors, by {place}"
                if seen < SIGMAS and not broken:
                    unseen.append((place, factor))
    assert not unseen, f"{len(unseen)} mutants go unseen: {unseen}"
