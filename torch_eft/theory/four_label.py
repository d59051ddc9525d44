"""Gaussian expectations with three and four labels, <f(z_a) g(z_b) h(z_c) k(z_d)>, f .. k products of derivatives.

Both routes are a weighted set of points z and one matrix product a moment:

* ``quadrature_points``: a product trapezoid rule in the eigenbasis of K, for at most four inputs and smooth sigma.
  The spacing in each direction resolves the wider of sigma (its distance to the nearest singularity) and the
  Gaussian, so that directions of small variance cost little; K may be singular.
* ``sample_points``: one common sample of N(0, K) for all labels, whitened so that its covariance is K exactly, for
  many inputs. Pair features are taken about their exact means M_pq, so that only the connected part is
  sampled. Its error is estimated from independent replicas (see ``Vertices``).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.theory.activations import Activation
from torch_eft.theory.expectations import QuadratureError
from torch_eft.theory.pair_moments import PairMoments
from torch_eft.theory.two_slope import Orders

MOST_QUADRATURE_LABELS = 4
_MOST_NODES = 3_000_000
_CHUNK = 2**25
_HALF_RANGE = 8.0


@dataclass(frozen=True)
class Points:
    """Points and weights that stand for N(0, K).

    Args:
        z: (S, N).
        weights: (S,), adding up to 1; None means 1/S each.
    """

    z: Tensor
    weights: Tensor | None


class FourLabelMoments:
    """Moments with three or four different labels under one set of points.

    Args:
        activation: sigma.
        points: The points.
        pairs: The exact two-label moments, for the means.
    """

    def __init__(self, activation: Activation, points: Points, pairs: PairMoments) -> None:
        self.activation = activation
        self.points = points
        self.pairs = pairs
        self._features: dict[Orders, Tensor] = {}

    def moment(self, factors: list[tuple[Orders, Tensor]], connected: bool = False) -> Tensor:
        """<prod f>, one axis a factor.

        Args:
            factors: Three or four (orders, index of labels); each gives one axis. With three, the factor with two
                orders is split off.
            connected: Subtract the product of means <first two><last two> (four factors only).

        Returns:
            float64, (n_1, n_2, ...).
        """
        if len(factors) == 3:
            alone = max(range(3), key=lambda index: len(factors[index][0]))
            order = [alone, *(index for index in range(3) if index != alone)]
            left, right = [factors[order[0]]], [factors[order[1]], factors[order[2]]]
        else:
            order = [0, 1, 2, 3]
            left, right = factors[:2], factors[2:]
        mean_left, mean_right = self._mean(left), self._mean(right)
        total = self._covariance(left, right, mean_left, mean_right)
        if not connected:
            total = total + torch.outer(mean_left, mean_right)
        result = total.reshape([len(factors[index][1]) for index in order])
        return result.permute([order.index(axis) for axis in range(len(order))])

    def _covariance(self, left: list, right: list, mean_left: Tensor, mean_right: Tensor) -> Tensor:
        count = len(self.points.z)
        rows = max(1, _CHUNK // (len(mean_left) + len(mean_right)))
        total = mean_left.new_zeros(len(mean_left), len(mean_right))
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            first = self._group(left, part) - mean_left.to(self.points.z.dtype)
            second = self._group(right, part) - mean_right.to(self.points.z.dtype)
            if self.points.weights is not None:
                first = first * self.points.weights[part, None]
            total += (first.T @ second).double()
        return total if self.points.weights is not None else total / count

    def _group(self, factors: list, part: slice) -> Tensor:
        values = [self._feature(orders)[part][:, index] for orders, index in factors]
        if len(values) == 1:
            return values[0]
        return (values[0][:, :, None] * values[1][:, None, :]).flatten(1)

    def _feature(self, orders: Orders) -> Tensor:
        if orders not in self._features:
            factors = [self.activation(self.points.z, order) for order in orders]
            self._features[orders] = torch.stack(factors).prod(0)
        return self._features[orders]

    def _mean(self, factors: list) -> Tensor:
        if len(factors) == 1:
            orders, index = factors[0]
            return self.pairs.product(orders[:1], orders[1:]).diagonal()[index]
        (first, rows), (second, columns) = factors
        return self.pairs.product(first, second)[rows][:, columns].flatten()


def _factor(K: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues > 0 and F with K = F F^T, columns sqrt(eigenvalue) eigenvector."""
    values, vectors = torch.linalg.eigh(K)
    kept = values > values[-1] * 1e-14 * len(K)
    return values[kept], vectors[:, kept] * values[kept].sqrt()


def sample_points(K: Tensor, samples: int, seed: int, dtype: torch.dtype = torch.float32) -> Points:
    """A sample of N(0, K) with mean 0 and covariance K exactly.

    Args:
        K: (N, N).
        samples: S, more than the rank of K.
        seed: Seed of the sample; the global random state is left alone.
        dtype: Of the points; float32 is far below the sampling error.

    Raises:
        ValueError: If there are not more samples than the rank of K.
    """
    _, factor = _factor(K)
    rank = factor.shape[1]
    if samples <= 2 * rank:
        raise ValueError(f"samples: {samples} given; {rank} independent inputs ask for more than {2 * rank}")
    generator = torch.Generator(K.device).manual_seed(seed)
    u = torch.randn(samples, rank, generator=generator, dtype=torch.float64, device=K.device)
    u = u - u.mean(0)
    u = torch.linalg.solve_triangular(torch.linalg.cholesky(u.T @ u / samples), u.T, upper=False).T
    return Points((u @ factor.T).to(dtype), None)


def quadrature_step(activation: Activation, K: Tensor, tolerance: float = 1e-10) -> float:
    """The coarsest step, in units of z, that integrates products of derivatives at one label to ``tolerance``.

    All labels share sigma's singularities, and the nearest one, seen from any direction, is as near as for the single
    label of the largest variance.

    Raises:
        QuadratureError: If no step down to 1/16 will do.
    """
    deviation = K.diagonal().max().sqrt()

    def means(step: float) -> Tensor:
        count = math.ceil(_HALF_RANGE * float(deviation) / step)
        z = torch.arange(-count, count + 1, dtype=torch.float64, device=K.device) * step
        weight = torch.exp(-(z / deviation).square() / 2)
        s = [activation(z, order) for order in range(4)]
        products = torch.stack([s[0] ** 4, s[1] ** 4, s[2] ** 2 * s[1] ** 2, s[3] * s[1] ** 3, s[2] * s[0] * s[1] ** 2])
        return products @ weight / weight.sum()

    exact = means(1 / 32)
    step = 1.0
    while step >= 1 / 16:
        if bool(((means(step) - exact).abs() <= tolerance * (1 + exact.abs())).all()):
            return step
        step *= 0.85
    raise QuadratureError(f"{activation.name}: products of derivatives up to the third need a step below 1/16; sample")


def quadrature_spacings(activation: Activation, K: Tensor) -> list[float] | None:
    """Spacings of the rule in each eigendirection of K, or None if it would need too many nodes or labels.

    Raises:
        QuadratureError: If no step resolves the activation.
    """
    if len(K) > MOST_QUADRATURE_LABELS:
        return None
    step = quadrature_step(activation, K)
    spacings = [min(0.75, step / math.sqrt(value)) for value in _factor(K)[0].tolist()]
    ball = math.pi ** (len(spacings) / 2) / math.gamma(len(spacings) / 2 + 1) * _HALF_RANGE ** len(spacings)
    return spacings if ball / math.prod(spacings) <= _MOST_NODES else None


def quadrature_points(K: Tensor, spacings: list[float]) -> Points:
    """A trapezoid rule for N(0, K) with the given spacing in each eigendirection."""
    _, factor = _factor(K)
    axes = []
    for spacing in spacings:
        count = math.floor(_HALF_RANGE / spacing)
        axes.append(torch.arange(-count, count + 1, dtype=torch.float64, device=K.device) * spacing)
    rest = torch.cartesian_prod(*axes[1:]).reshape(-1, len(axes) - 1) if len(axes) > 1 else axes[0].new_zeros(1, 0)
    radius = rest.square().sum(1)
    slices = []
    for first in axes[0]:  # slice by slice: the ball fills a third of its cube in four dimensions
        inside = rest[radius <= _HALF_RANGE**2 - first**2]
        slices.append(torch.cat([first.expand(len(inside), 1), inside], 1))
    u = torch.cat(slices)
    weights = torch.exp(-u.square().sum(1) / 2)
    return Points(u @ factor.T, weights / weights.sum())
