"""Exact Gaussian expectations of monomials times signs, <prod_i z_i^{k_i} prod_{i in A} sgn z_i>, up to four labels.

Sufficient for a scale-invariant activation, s = z (o + e sgn z), s' = o + e sgn z. Powers are removed by Stein's
identity (integration by parts),

    <z_i g> = sum_j K_ij <d_j g>,      d_j sgn z_j = 2 delta(z_j),

and a delta function by conditioning on z_j = 0 (Schur complement). Means of signs remain: (2/pi) asin rho for
two (Sheppard 1899), and for four the integral of Plackett's identity (Plackett 1954) along K(t), in which the
correlations between two pairs are multiplied by t:

    d<s_1 s_2 s_3 s_4>/dt = (4/pi^2) sum_{i in pair 1, j in pair 2} rho_ij asin(rho_kl|ij) / sqrt(1 - t^2 rho_ij^2),

a smooth integrand in one dimension. Labels may coincide: where z_j = 0 determines other labels, the sign of one counts
as sgn 0 = 0 and the signs of two as <delta sgn^2> / <delta> = 1/3, the limit of smooth signs, d sgn^3/dz = 2 delta.
"""

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor

Covariance = tuple[tuple[Tensor, ...], ...]
"""K_ij between the labels, arrays that broadcast against one another."""

_ROUNDING = 64 * torch.finfo(torch.float64).eps


class SignedMoments:
    """Expectations under one covariance, elementwise in its entries.

    Args:
        K: Up to four labels; float64.
        like: Gives dtype and device where there is no label.
        determined: For each label, where it vanishes by the condition under which K is the covariance.
    """

    def __init__(self, K: Covariance, like: Tensor | None = None, determined: tuple[Tensor, ...] = ()) -> None:
        self.K = K
        self._determined = determined
        self._like = K[0][0] if like is None else like
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}
        self._conditioned: dict[int, SignedMoments] = {}

    def __call__(self, powers: tuple[int, ...], signs: tuple[int, ...]) -> Tensor:
        """<prod_i z_i^powers[i] prod_{i in signs} sgn z_i>, broadcast over the entries of K."""
        key = (powers, signs)
        if key not in self._known:
            total = self._moment(powers, signs)
            for i, j in itertools.combinations(signs if self._determined else (), 2):
                both = self._determined[i] & self._determined[j]
                if bool(both.any()):
                    rest = tuple(label for label in signs if label not in (i, j))
                    total = torch.where(both, self(powers, rest) / 3, total)
            self._known[key] = total
        return self._known[key]

    def density(self, label: int) -> Tensor:
        """<delta(z_label)>, 0 where the variance vanishes."""
        variance = self.K[label][label]
        return torch.where(variance > 0, 1.0 / (2 * math.pi * torch.where(variance > 0, variance, 1.0)).sqrt(), 0.0)

    def given_zero(self, label: int) -> "SignedMoments":
        """The expectations of the other labels, in their order, given z_label = 0."""
        if label not in self._conditioned:
            others = [index for index in range(len(self.K)) if index != label]
            variance = self.K[label][label]
            inverse = torch.where(variance > 0, 1.0 / torch.where(variance > 0, variance, 1.0), 0.0)
            left = {i: self.K[i][i] - self.K[i][label].square() * inverse for i in others}
            # A label that z_label determines has no variance left, only rounding.
            alive = {i: left[i] > _ROUNDING * self.K[i][i] for i in others}
            rows = []
            for i in others:
                row = []
                for j in others:
                    value = left[i] if i == j else self.K[i][j] - self.K[i][label] * self.K[label][j] * inverse
                    row.append(torch.where(alive[i] & alive[j], value, 0.0))
                rows.append(tuple(row))
            determined = tuple((self.K[i][i] > 0) & ~alive[i] for i in others)
            self._conditioned[label] = SignedMoments(tuple(rows), self._like, determined)
        return self._conditioned[label]

    def only(self, labels: list[int]) -> "SignedMoments":
        """The expectations of a part of the labels."""
        return SignedMoments(tuple(tuple(self.K[i][j] for j in labels) for i in labels), self._like)

    def vanishing(self, labels: tuple[int, ...]) -> Tensor:
        """Mask of the entries where exactly these labels have no variance."""
        mask = self._like.new_ones((), dtype=torch.bool)
        for index in range(len(self.K)):
            mask = mask & ((self.K[index][index] == 0) == (index in labels))
        return mask

    def _moment(self, powers: tuple[int, ...], signs: tuple[int, ...]) -> Tensor:
        if (sum(powers) + len(signs)) % 2:
            return self._like.new_zeros(())
        if not any(powers):
            return self._mean_of_signs(signs)
        i = next(index for index, power in enumerate(powers) if power)
        rest = tuple(power - (index == i) for index, power in enumerate(powers))
        total = self._like.new_zeros(())
        for j, power in enumerate(rest):
            if power:
                fewer = tuple(p - (index == j) for index, p in enumerate(rest))
                total = total + power * self.K[i][j] * self(fewer, signs)
            elif j in signs:
                others = [index for index in range(len(powers)) if index != j]
                inner = self.given_zero(j)(
                    tuple(rest[index] for index in others),
                    tuple(position for position, index in enumerate(others) if index in signs),
                )
                total = total + self.K[i][j] * 2 * self.density(j) * inner
        return total

    def _mean_of_signs(self, signs: tuple[int, ...]) -> Tensor:
        if not signs:
            return self._like.new_ones(())
        if len(signs) == 2:
            return (2 / math.pi) * self._correlation(*signs).asin()
        a, b, c, d = signs
        return mean_of_four_signs(
            *(self._correlation(*pair) for pair in ((a, b), (a, c), (a, d), (b, c), (b, d), (c, d)))
        )

    def _correlation(self, i: int, j: int) -> Tensor:
        scale = (self.K[i][i] * self.K[j][j]).sqrt()
        rho = torch.where(scale > 0, self.K[i][j] / torch.where(scale > 0, scale, 1.0), 0.0).clamp(-1.0, 1.0)
        # asin is steep at 1: the correlation of labels that coincide must be 1 to the last digit.
        return torch.where(1 - rho.abs() < _ROUNDING, rho.sign(), rho)


def mean_of_four_signs(r12: Tensor, r13: Tensor, r14: Tensor, r23: Tensor, r24: Tensor, r34: Tensor) -> Tensor:
    """<sgn z_1 sgn z_2 sgn z_3 sgn z_4> from the six correlations, elementwise.

    The most correlated pair of labels is kept together: the integrand is steepest where two labels of different
    pairs nearly coincide.

    Returns:
        The broadcast shape of the correlations.
    """
    shape = torch.broadcast_shapes(*(r.shape for r in (r12, r13, r14, r23, r24, r34)))
    r12, r13, r14, r23, r24, r34 = (r.expand(shape).reshape(-1) for r in (r12, r13, r14, r23, r24, r34))
    # Rows: the two correlations within pairs, then the four between them (13, 14, 23, 24 of that pairing).
    pairings = (
        torch.stack([r12, r34, r13, r14, r23, r24]),
        torch.stack([r13, r24, r12, r14, r23, r34]),
        torch.stack([r14, r23, r12, r13, r24, r34]),
    )
    strength = torch.stack([pairing[2:].abs().amax(0) for pairing in pairings])
    best = strength.argmin(0)
    chosen = torch.where(best == 0, pairings[0], torch.where(best == 1, pairings[1], pairings[2]))
    result = torch.empty_like(r12)
    steep = strength.amin(0) > 0.9
    for part, step in ((~steep, 1 / 8), (steep, 1 / 16)):
        for chunk in part.nonzero().flatten().split(2**18):
            result[chunk] = _plackett(chosen[:, chunk], step)
    # Labels that coincide multiply to one; of three that do, two are a pair of any pairing.
    for pair, other in ((0, 1), (1, 0)):
        same = (1 - chosen[pair].abs()) < _ROUNDING
        result = torch.where(same, chosen[pair].sign() * (2 / math.pi) * chosen[other].asin(), result)
    return result.reshape(shape)


def _plackett(correlations: Tensor, step: float) -> Tensor:
    p, q, r13, r14, r23, r24 = correlations
    total = (4 / math.pi**2) * p.asin() * q.asin()
    # Each term: the delta functions sit at i and j; k and l are their partners within the pairs.
    cross = ((r13, r14, r23, r24), (r14, r13, r24, r23), (r23, r24, r13, r14), (r24, r23, r14, r13))
    for t, rest, weight in _double_exponential_nodes(step):
        for ij, il, kj, kl in cross:
            # 1 - t^2 rho^2 without cancellation: rest = 1 - t.
            determinant = (1 - ij) * (1 + ij) + rest * (1 + t) * ij.square()
            root = determinant.clamp_min(torch.finfo(p.dtype).tiny).sqrt()
            # Residuals of k and l after regression on i and j, times the determinant.
            variance_k = determinant - p.square() - (t * kj).square() + 2 * t * t * ij * p * kj
            variance_l = determinant - q.square() - (t * il).square() + 2 * t * t * ij * q * il
            covariance = t * (kl * determinant - p * il - q * kj + ij * (p * q + t * t * kj * il))
            scale = (variance_k.clamp_min(0.0) * variance_l.clamp_min(0.0)).sqrt()
            partial = torch.where(scale > 0, covariance / torch.where(scale > 0, scale, 1.0), 0.0).clamp(-1.0, 1.0)
            total = total + (4 / math.pi**2) * weight * ij * partial.asin() / root
    return total


@lru_cache
def _double_exponential_nodes(step: float, reach: float = 3.5) -> tuple[tuple[float, float, float], ...]:
    """(t, 1 - t, weight) of the tanh-sinh rule on [0, 1] (Takahasi & Mori 1974), which tolerates steep ends."""
    nodes = []
    for index in range(-round(reach / step), round(reach / step) + 1):
        u = index * step
        a = math.pi / 2 * math.sinh(u)
        weight = step * math.pi / 4 * math.cosh(u) / math.cosh(a) ** 2
        nodes.append((1 / (1 + math.exp(-2 * a)), 1 / (1 + math.exp(2 * a)), weight))
    return tuple(nodes)
