"""Two-label moments of one neuron of a layer, for any law of weights and biases.

z_a = b + u_a on every input a: u, the sum over the layer's weights, is N(0, g), and b is one number, the same for all
inputs, that keeps its law at infinite width. Where it is not Gaussian,

    <f(z_a) g(z_b)> = sum_k p_k <f(u_a + b_k) g(u_b + b_k)>_g,

b_k and p_k the nodes of its law: the moments of sigma moved by b_k. Responses to a change of the layer below are
derivatives with respect to g, and so the same sums of moments of derivatives. In layer 1 the sum over weights runs
over the inputs, and u keeps the fourth cumulant kappa_abcd = c sum_k x_ak x_bk x_ck x_dk, c = k4 C_W^2 / n_0^2, counted
to first order: <f> + (1/24) kappa <d^4 f>.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.activations import Activation
from torch_eft.theory.gaussian.laws import EXCESS_KURTOSIS, bias_nodes
from torch_eft.theory.gaussian.scale_invariant import Orders
from torch_eft.theory.gaussian.two_point_moments import Kinks, SmoothPairs, TwoPointMoments, two_point_moments
from torch_eft.theory.initialization.neuron.two_slopes import TwoSlopePairs


@dataclass(frozen=True)
class Piece:
    """The neurons with one value of the bias.

    Args:
        probability: Of the value, and of its opposite where sigma is odd or even.
        activation: sigma moved by it.
        pairs: Two-label moments of that under N(0, g).
    """

    probability: float
    activation: Activation
    pairs: SmoothPairs


@dataclass(frozen=True)
class Quartic:
    """The fourth cumulant of u in layer 1.

    Args:
        coefficient: c.
        x: (N, n_0).
    """

    coefficient: float
    x: Tensor


class MixedPairs:
    """Two-label moments of a smooth sigma; the interface of ``two_point_moments.TwoPointMoments``.

    Args:
        g: (N, N), the covariance of u.
        pieces: The neurons, by the value of the bias.
        quartic: Fourth cumulant of u; None where u is Gaussian.
        parity: 1 or -1 if opposite biases share a piece, of an even or odd sigma; else None.
    """

    def __init__(self, g: Tensor, pieces: list[Piece], quartic: Quartic | None, parity: int | None) -> None:
        self.g, self.pieces, self.quartic, self.parity = g, pieces, quartic, parity
        self._moments: dict[tuple[Orders, Orders], Tensor] = {}

    def single(self, orders: Orders) -> Tensor:
        """<prod sigma^(p)_a>, (N,)."""
        half = len(orders) // 2
        return self.explicit(orders[:half], orders[half:]).diagonal()

    def explicit(self, first: Orders, second: Orders) -> Tensor:
        """<prod sigma^(p)_a prod sigma^(q)_b>, (N, N), p over ``first`` and q over ``second``."""
        key = (tuple(sorted(first)), tuple(sorted(second)))
        if key not in self._moments:
            mirror = self._moments.get((key[1], key[0]))
            self._moments[key] = self.computed(*key) if mirror is None else mirror.T
        return self._moments[key]

    def response(self, p: int, q: int, i: int, j: int) -> Tensor:
        """<d_a^i d_b^j sigma^(p)_a sigma^(q)_b>, (N, N)."""
        return self.explicit((p + i,), (q + j,))

    def computed(self, first: Orders, second: Orders) -> Tensor:
        """As ``explicit``, and not kept."""
        total = torch.zeros_like(self.g)
        if self.odd((*first, *second)):
            return total
        for piece in self.pieces:
            moment = piece.pairs.computed(first, second)
            if self.quartic is not None:
                moment = moment + self.quartic.coefficient * piece.pairs.fourth_order(first, second, self.quartic.x)
            total = total + piece.probability * moment
        return total

    def odd(self, orders: Orders) -> bool:
        """Whether opposite biases cancel in a product of derivatives; each piece stands for both."""
        return self.parity is not None and self.parity ** len(orders) * (-1) ** sum(orders) < 0


def neuron_pairs(ensemble: MLPEnsemble, index: int, g: Tensor, x: Tensor, kinks: Kinks = "autograd") -> TwoPointMoments:
    """The two-label moments of one neuron of layer ``index + 1``.

    Args:
        ensemble: The ensemble.
        index: 0 .. L - 2.
        g: (N, N), the covariance of the sum over weights.
        x: (N, n_0).
        kinks: The meaning of explicit derivatives at a kink.

    Returns:
        The moments; those of a Gaussian neuron where weights and biases are Gaussian, and for an activation with a
        kink that is not made of two slopes.
    """
    activation, law, C_b = ensemble.activation, ensemble.bias_law[index], ensemble.C_b[index]
    quartic = first_quartic(ensemble, x) if index == 0 else None
    plain = (law == "gaussian" or C_b == 0) and quartic is None
    if activation.slopes is not None and activation.kinked and not plain:
        first = None if quartic is None else (quartic.coefficient, quartic.x)
        return TwoSlopePairs(activation.slopes, C_b + g, kinks, law, C_b, first)
    if plain or activation.kinked:
        return two_point_moments(activation, C_b + g, kinks)
    parity, nodes = parity_of(activation), bias_nodes(law, C_b, g)
    if nodes is None:
        pieces = [Piece(1.0, activation, SmoothPairs(activation, C_b + g))]
        return MixedPairs(C_b + g, pieces, quartic, None)
    pieces = []
    for value, probability in zip(*(part.tolist() for part in nodes), strict=True):
        if parity is not None and value < 0:
            continue
        moved = _moved(activation, value)
        weight = probability * (2 if parity is not None and value > 0 else 1)
        pieces.append(Piece(weight, moved, SmoothPairs(moved, g)))
    return MixedPairs(g, pieces, quartic, parity)


def first_quartic(ensemble: MLPEnsemble, x: Tensor) -> Quartic | None:
    """The fourth cumulant of the first layer's sum over weights; None where they are Gaussian or orthogonal."""
    k4 = EXCESS_KURTOSIS[ensemble.weight_law[0]]
    return Quartic(k4 * (ensemble.C_W[0] / ensemble.widths[0]) ** 2, x) if k4 else None


def as_gaussian(pairs: TwoPointMoments) -> TwoPointMoments:
    """Moments under the Gaussian with the same kernel, for those of two slopes; others as they are.

    Four-label moments of two slopes are known for Gaussian neurons, and must not be mixed with other two-label ones.

    Args:
        pairs: Of a layer.

    Returns:
        The moments.
    """
    return pairs.gaussian if isinstance(pairs, TwoSlopePairs) else pairs


@functools.lru_cache
def parity_of(activation: Activation) -> int | None:
    """1 for an even sigma, -1 for an odd one, None for others."""
    z = torch.linspace(0.05, 5.0, 100, dtype=torch.float64, device="cpu")
    right, left = activation(z), activation(-z)
    tolerance = 1e-14 * float(right.abs().max() + left.abs().max())
    for parity in (1, -1):
        if float((left - parity * right).abs().max()) <= tolerance:
            return parity
    return None


def _moved(activation: Activation, by: float) -> Activation:
    """Sigma(z + by); its name is that of no closed form."""
    if by == 0:
        return activation
    return dataclasses.replace(
        activation,
        name=f"{activation.name}(z {'+' if by > 0 else '-'} {abs(by):.3g})",
        function=functools.partial(_evaluated, activation.function, by),
        slopes=None,
        derivative=activation.derivative and functools.partial(_evaluated, activation.derivative, by),
    )


def _evaluated(function: object, by: float, z: Tensor, *order: int) -> Tensor:
    return cast(Tensor, function(z + by, *order))  # type: ignore[operator]
