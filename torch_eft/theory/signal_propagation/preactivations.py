"""One neuron's preactivation at infinite width, for one input at a time, whatever the law of weights and biases.

z = b + u, where u, the sum over the layer's weights, is N(0, g), and b is one number that keeps its law: Gaussian, it
adds C_b to the variance; else expectations are averages over its nodes. In layer 1 the sum runs over the inputs, and
u keeps a fourth cumulant, k4 C_W^2 sum_k x_k^4 / n_0^2 with k4 the weights' excess kurtosis; there

    <f>_u = <f>_g + (kappa / 24) <d^4 f>_g = <f (1 + kappa He_4(u / sqrt g) / (24 g^2))>_g.

Derivatives with respect to the kernel are with respect to g, d<f>/dg = <f (u^2 - g)> / (2 g^2) given b: a change of
the layer below reaches u only. For activations with two slopes symmetric laws leave everything but <s^4> unchanged.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.activations import Activation
from torch_eft.theory.gaussian.laws import EXCESS_KURTOSIS, bias_nodes
from torch_eft.theory.gaussian.quadrature import expectation
from torch_eft.theory.signal_propagation.susceptibility import (
    curvature_of_variance,
    mean_power,
    power_mean,
    slope_of_variance,
    slope_squared,
)


@dataclass(frozen=True)
class Preactivations:
    """The law of one neuron of a layer, for each input by itself.

    Args:
        activation: s.
        K: (N,), its variance.
        g: (N,), the part of it that comes from the layer below.
        nodes: Values of the bias and their probabilities; None where it is Gaussian, or 0.
        cumulant: (N,), the fourth cumulant of u; None where u is Gaussian.
        bias_cumulant: Fourth cumulant of the bias, the same for all inputs.
    """

    activation: Activation
    K: Tensor
    g: Tensor
    nodes: tuple[Tensor, Tensor] | None
    cumulant: Tensor | None
    bias_cumulant: float

    @property
    def gaussian(self) -> bool:
        """True if it is a Gaussian law."""
        return self.nodes is None and self.cumulant is None

    @cached_property
    def variance(self) -> Tensor:
        """<s^2>."""
        s = self.activation
        if self.gaussian or s.slopes is not None:
            return power_mean(s, self.K, 2)
        return self.mean(lambda z: s(z).square())

    def fourth_power(self) -> Tensor:
        """<s^4>."""
        s = self.activation
        if self.gaussian:
            return power_mean(s, self.K, 4)
        if s.slopes is not None:
            excess = self.bias_cumulant if self.cumulant is None else self.bias_cumulant + self.cumulant
            return mean_power(s.slopes, 4) * (3 * self.K**2 + excess)
        return self.mean(lambda z: s(z) ** 4)

    def slope_power(self, p: int) -> Tensor:
        """<s'^p>, p = 2 or 4."""
        s = self.activation
        if self.gaussian and p == 2:
            return slope_squared(s, self.K)
        if s.slopes is not None:
            return torch.full_like(self.K, mean_power(s.slopes, p))
        return self.mean(lambda z: s(z, 1) ** p)

    def joint(self) -> Tensor:
        """<s^2 s'^2>."""
        s = self.activation
        if s.slopes is not None:
            return mean_power(s.slopes, 4) * self.K
        return self.mean(lambda z: (s(z) * s(z, 1)).square())

    def response(self) -> Tensor:
        """d<s^2>/dg."""
        s = self.activation
        if self.gaussian:
            return slope_of_variance(s, self.K)
        if s.slopes is not None:
            return torch.full_like(self.K, mean_power(s.slopes, 2))
        return self.mean(lambda z: s(z).square(), 1)

    def slope_response(self) -> Tensor:
        """d<s'^2>/dg; its limit for g -> 0 is not needed, as what it multiplies then vanishes, too."""
        s = self.activation
        return torch.zeros_like(self.K) if s.slopes is not None else self.mean(lambda z: s(z, 1).square(), 1)

    def curvature(self) -> Tensor:
        """d^2<s^2>/dg^2; 0 where g = 0, as above."""
        s = self.activation
        if s.slopes is not None:
            return torch.zeros_like(self.K)
        if self.gaussian:
            safe = torch.where(self.K > 0, self.K, 1.0)
            return torch.where(self.K > 0, curvature_of_variance(s, safe), 0.0)
        return self.mean(lambda z: s(z).square(), 2)

    def mean(self, function: Callable[[Tensor], Tensor], order: int = 0) -> Tensor:
        """d^order <f> / dg^order, elementwise in the inputs.

        Args:
            function: f(z), elementwise, smooth but for the kinks of the activation.
            order: 0, 1 or 2.

        Returns:
            (N,).
        """
        total = torch.zeros_like(self.g)
        for shift, probability, inputs, kinks in self._pieces():
            g = self.g[inputs].expand(len(probability), -1)
            # A constant adds nothing to derivatives, but its rounding would.
            center = function(shift.reshape(-1, 1)) if order else 0.0
            weight = _tilt(g, self.cumulant, inputs) if order == 0 else _hermite(g, order)

            def integrand(u: Tensor, center: Tensor | float = center, weight: _Weight = weight) -> Tensor:
                return (function(u + shift.reshape(-1, 1)) - center) * weight(u)  # noqa: B023 - called at once

            total[inputs] += probability @ expectation(integrand, g, kinks)
        return total

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor, slice, tuple[float, ...]]]:
        """Values of the bias (nodes, inputs), their probabilities (nodes,), the inputs, the kinks seen from there."""
        kinks, count = self.activation.kinks, len(self.g)
        if self.nodes is None:
            yield self.g.new_zeros(1, count), self.g.new_ones(1), slice(0, count), kinks
            return
        values, probability = self.nodes
        if kinks:
            for value, one in zip(values, probability, strict=True):
                shifted = tuple(kink - float(value) for kink in kinks)
                yield value.expand(1, count), one[None], slice(0, count), shifted
            return
        for start in range(0, count, _AT_ONCE):
            inputs = slice(start, min(start + _AT_ONCE, count))
            yield values[:, None].expand(-1, inputs.stop - start), probability, inputs, ()


_Weight = Callable[[Tensor], Tensor]

_AT_ONCE = 64
"""Inputs integrated together where each has its nodes."""


def _tilt(g: Tensor, cumulant: Tensor | None, inputs: slice) -> _Weight:
    """The weight of a fourth cumulant, as a function of u (rows, points)."""
    if cumulant is None:
        return torch.ones_like
    rows = g.reshape(-1, 1)
    safe = torch.where(rows > 0, rows, 1.0)
    size = torch.where(rows > 0, cumulant[inputs].expand_as(g).reshape(-1, 1) / (24 * safe**2), 0.0)

    def weight(u: Tensor) -> Tensor:
        square = u.square() / safe
        return 1 + size * (square**2 - 6 * square + 3)

    return weight


def _hermite(g: Tensor, order: int) -> _Weight:
    """The weight that takes the derivative with respect to g; 0 where g = 0."""
    rows = g.reshape(-1, 1)
    safe, alive = torch.where(rows > 0, rows, 1.0), (rows > 0).to(g.dtype)

    def weight(u: Tensor) -> Tensor:
        square = u.square() / safe
        if order == 1:
            return alive * (square - 1) / (2 * safe)
        return alive * (square**2 - 6 * square + 3) / (4 * safe**2)

    return weight


def first_preactivations(ensemble: MLPEnsemble, size: Tensor, quartic: Tensor) -> Preactivations:
    """The law of layer 1.

    Args:
        ensemble: The ensemble.
        size: (N,), |x|^2 / n_0.
        quartic: (N,), sum_k x_k^4 / n_0^2.

    Returns:
        The law.
    """
    excess = EXCESS_KURTOSIS[ensemble.weight_law[0]]
    cumulant = excess * ensemble.C_W[0] ** 2 * quartic if excess else None
    return _layer(ensemble, 0, ensemble.C_W[0] * size, cumulant)


def next_preactivations(ensemble: MLPEnsemble, before: Preactivations, layer: int) -> Preactivations:
    """The law of a layer, from that of the layer before.

    Args:
        ensemble: The ensemble.
        before: Of layer ``layer - 1``.
        layer: 2 .. L.

    Returns:
        The law.
    """
    return _layer(ensemble, layer - 1, ensemble.C_W[layer - 1] * before.variance, None)


def input_moments(ensemble: MLPEnsemble, x: Tensor | None) -> tuple[Tensor, Tensor]:
    """|x|^2 / n_0 and sum_k x_k^4 / n_0^2 of every input, (N,) each; without inputs those of (1, 1, ..)."""
    n_0 = ensemble.widths[0]
    if x is None:
        one = torch.ones(1, dtype=torch.float64, device="cpu")
        return one, one / n_0
    x = x.to(torch.float64)
    return x.square().sum(1) / n_0, x.pow(4).sum(1) / n_0**2


def haar_share(ensemble: MLPEnsemble, layer: int) -> float:
    """Zeta of an orthogonal layer, n_in / max(n_in, n_out); 0 for independent weights.

    Args:
        ensemble: The ensemble.
        layer: 1 .. L.

    Returns:
        0 .. 1.
    """
    n_in, n_out = ensemble.widths[layer - 1 : layer + 1]
    return n_in / max(n_in, n_out) if ensemble.weight_law[layer - 1] == "orthogonal" else 0.0


def _layer(ensemble: MLPEnsemble, index: int, g: Tensor, cumulant: Tensor | None) -> Preactivations:
    law, C_b = ensemble.bias_law[index], ensemble.C_b[index]
    return Preactivations(
        activation=ensemble.activation,
        K=C_b + g,
        g=g if law != "gaussian" and C_b > 0 else C_b + g,
        nodes=bias_nodes(law, C_b, g, smooth=not ensemble.activation.kinked),
        cumulant=cumulant,
        bias_cumulant=EXCESS_KURTOSIS[law] * C_b**2,
    )
