"""Triples of neurons: the recursion of the dNTK's covariance from layer 2 to 3, power by power of r.

The sums over neurons of layer 2 in the covariance of layer 3 run over three, of which one, two or three are
different: n_2^p times means of order n_1^(1-p). Of networks n_0 -> n_1 -> J, three different neurons give the part of
r^2 alone, r = n_2 / n_1, two that of r and one that of r^0: patterns of the exact layer identities, as in ``pairs``,
and nothing of the theory at this order. What is of the next order in 1/n_1 is extrapolated.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tests.oracles.pairs import Setting, limit

NEURONS, FEW = 40, 8
e = torch.einsum

Key = tuple[str, int, int]
"""Tensor, power of r, power of lambda_W of layer 3."""


@dataclass(frozen=True)
class Neurons:
    """Neurons of layer 2 above n of layer 1, in single precision, far below the noise.

    Args:
        z: (S, J, 2).
        H: (S, J, J, 2, 2).
        W: Their weights, (S, J, n).
        curved: What dH of three neurons sums over layer 1 times three weights, (S, n, 2, 2, 2).
        tail: What dH_kkm has beyond that, by lambda_W, (S, m, 2, 2, 2).
    """

    z: Tensor
    H: Tensor
    W: Tensor
    curved: Tensor
    tail: Tensor


def neurons_of_layer_2(setting: Setting, n: int, count: int, generator) -> Neurons:
    T, root = limit(setting).Theta[0].float(), torch.linalg.cholesky(limit(setting).K[0]).float()

    def normal(*shape):
        return torch.randn(count, *shape, generator=generator)

    z = normal(n, 2) @ root.T
    s, s1, s2 = (setting.sigma(z, order) for order in range(3))
    W = normal(NEURONS, n) * math.sqrt(setting.C_W[1] / n)
    share = setting.lambda_W[1] / n
    through = W[:, :, :, None] * s1[:, None]  # (S, k, j, a)
    tied = setting.lambda_b[1] + share * s.mT @ s
    left = through.permute(0, 3, 1, 2)
    H = (left[:, :, None] @ left[:, None].mT).permute(0, 3, 4, 1, 2) * T
    H.diagonal(dim1=1, dim2=2).add_(tied[..., None])
    curved = e("sja,sjb,sjc->sjabc", s2, s1, s1) * T[:, :, None] * T[:, None, :]
    tail = share * e("sja,sjb,smjc,ac->smabc", s1, s, through, T)
    return Neurons(W @ s + normal(NEURONS, 1) * math.sqrt(setting.C_b[1]), H, W, curved, tail)


@cache
def triples(different: int) -> list[Tensor]:
    """Three neurons each, of which so many are different."""
    every = itertools.product(range(FEW), repeat=3)
    return list(torch.tensor([triple for triple in every if len(set(triple)) == different]).T)


def by_neurons(left: Tensor, right: Tensor) -> list[Tensor]:
    """Sum over m, k and k' of left_mk right_mk' by the number of different neurons, (S, X, Y) each."""
    own, own_2 = (part.diagonal(dim1=1, dim2=2).mT for part in (left, right))
    rest, rest_2 = left.sum(2) - own, right.sum(2) - own_2
    alone = own.mT @ own_2
    together = left.flatten(1, 2).mT @ right.flatten(1, 2) - alone
    return [alone, own.mT @ rest_2 + rest.mT @ own_2 + together, rest.mT @ rest_2 - together]


def three_pairs(setting: Setting, neurons: Neurons) -> Iterator[tuple[Key, Tensor]]:
    """X3a and X3b: sums over three neurons, of few."""
    z, W, n = neurons.z[:, :FEW], neurons.W[:, :FEW], neurons.W.shape[2]
    s1, s2 = (setting.sigma(z, order) for order in (1, 2))
    dH = e("skj,slj->sklj", W, W).flatten(1, 2) @ e("smj,sjabc->sjmabc", W, neurons.curved).flatten(2)
    dH = dH.reshape(len(z), FEW, FEW, FEW, 2, 2, 2)
    tail = neurons.tail[:, :FEW]
    dH.diagonal(dim1=1, dim2=2).add_(tail[..., None])
    dH.diagonal(dim1=1, dim2=3).add_(tail.transpose(3, 4)[..., None])
    A = dH * s1[:, :, None, None, :, None, None] * s1[:, None, :, None, None, :, None]
    A = A * s1[:, None, None, :, None, None, :]
    through = neurons.H[:, :FEW, :FEW] * s1[:, None, :, None, :]
    curved = s2[:, :, None, :, None] * through
    A = A + curved[:, :, :, None, :, :, None] * through[:, :, None, :, :, None, :]
    for power in range(3):
        head, one, two = triples(power + 1)
        whole, turned = A[:, head, one, two].flatten(2), A[:, one, head, two].flatten(2)
        scale = setting.C_W[2] ** 3 * n**power / math.perm(FEW, power + 1)
        yield ("X3a", power, 0), scale * (whole.mT @ whole).flatten(1)
        yield ("X3b", power, 0), scale * (whole.mT @ turned).flatten(1)


def one_pair(setting: Setting, neurons: Neurons) -> Iterator[tuple[Key, Tensor]]:
    """The others: what one neuron m takes part in with each other one k."""
    W, tail, C = neurons.W, neurons.tail, setting.C_W[2]
    s, s1, s2 = (setting.sigma(neurons.z, order) for order in range(3))
    through = neurons.H * s1[:, None, :, None, :]  # H_km s'_m
    bent = e("smj,sjabc->sjmabc", W, neurons.curved).flatten(2)
    kkm = ((W * W) @ bent).reshape(*W.shape[:2], NEURONS, 2, 2, 2)
    mkk = (W @ e("skj,sjabc->sjkabc", W * W, neurons.curved).flatten(2)).reshape(kkm.shape)
    kkm += tail[:, None]
    kkm.diagonal(dim1=1, dim2=2).add_(tail.transpose(3, 4).movedim(1, -1))
    mkk.diagonal(dim1=1, dim2=2).add_((tail + tail.transpose(3, 4)).movedim(1, -1))
    own = e("skkab->skab", neurons.H)
    of_Q = e("skmabc,ska,skb,smc->smkabc", kkm, s1, s1, s1) + e("ska,skb,skab,skmac->smkabc", s2, s1, own, through)
    of_P = e("smkabc,sma,skb,skc->smkabc", mkk, s1, s1, s1) + e("sma,smkab,smkac->smkabc", s2, through, through)
    weights = {
        ("U", 0): C * e("skx,ska,skmac->smkxac", s, s1, through),
        ("Q", 0): C * of_Q,
        ("Q", 1): e("skb,ska,skmac->smkabc", s, s1, through),
        ("P", 0): C * of_P,
    }
    found: dict[Key, Tensor] = {}
    for (first, i), (second, j) in itertools.product(weights, repeat=2):
        if first + second in ("QQ", "PQ", "PP", "UU", "UQ", "UP"):
            left, right = weights[first, i].flatten(3), weights[second, j].flatten(3)
            for power, value in enumerate(by_neurons(left, right)):
                scale = C * W.shape[2] ** power / math.perm(NEURONS, power + 1)
                key = f"X{first}{second}", power, i + j
                found[key] = found.get(key, 0.0) + scale * value.flatten(1)
    yield from found.items()


@dataclass(frozen=True)
class Drawn:
    """A tensor measured at widths n and 2n: means over some networks each, (M, 64)."""

    narrow: Tensor
    wide: Tensor

    def deviation(self, theory: Tensor, direction: Tensor) -> float:
        """Theory minus the value extrapolated in 1/n, along a direction, in standard errors beyond what may be left.

        With x = t (1 + a / n + b / n^2), b of order a^2, 2 (a / 2n)^2 of t is left.
        """
        t, d = theory.flatten(), direction.flatten() / direction.norm()
        (first, error), (second, error_2) = (_mean(part @ d) for part in (self.narrow, self.wide))
        value, change = 2 * self.wide.mean(0) - self.narrow.mean(0), self.wide.mean(0) - self.narrow.mean(0)
        left = 2 * float((change @ value / (value @ value)) ** 2 * value.norm())
        away = abs(float(t @ d) - 2 * second + first) - left
        return away / math.hypot(2 * error_2, error)


def _mean(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def drawn(setting: Setting, n: int, count: int, chunk: int) -> dict[Key, Tensor]:
    """Means over each chunk of networks, (count / chunk, 64)."""
    generator, means = torch.Generator().manual_seed(n), []
    for _ in range(count // chunk):
        neurons = neurons_of_layer_2(setting, n, chunk, generator)
        found = itertools.chain(three_pairs(setting, neurons), one_pair(setting, neurons))
        means.append({key: value.mean(0).double() for key, value in found})
    return {key: torch.stack([mean[key] for mean in means]) for key in means[0]}


@cache
def triples_of_layer_2(setting: Setting, scale: float = 1.0) -> dict[Key, Drawn]:
    """The parts of the recursion from layer 2 to 3. ``scale`` multiplies the numbers of networks."""
    narrow, wide = (drawn(setting, n, int(scale * count), 50) for n, count in ((32, 6000), (64, 12_000)))
    return {key: Drawn(value, wide[key]) for key, value in narrow.items()}
