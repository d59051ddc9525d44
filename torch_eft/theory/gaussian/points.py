"""Weighted points that represent N(0, K), over which three- and four-label expectations are summed.

* ``grid_points``: a product trapezoid rule in the eigenbasis of K, for at most four inputs and smooth sigma. The
  spacing in each direction resolves the wider of sigma (its distance to the nearest singularity) and the Gaussian, so
  that directions of small variance cost little; K may be singular.
* ``KinkedPoints``: for at most four inputs and a kink at zero: label after label, the Gaussian of z given the labels
  before, split where z = 0, a Gauss rule for each side (Golub & Welsch 1969).
* ``sample_points``: one common sample for all labels, whitened so that its covariance is K exactly, for many inputs.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torch_eft.theory.gaussian.activations import Activation
from torch_eft.theory.gaussian.quadrature import gauss_legendre

MOST_QUADRATURE_LABELS = 4
_MOST_NODES = 2**25
_HALF_RANGE = 8.0


class Points:
    """Points and weights.

    Args:
        z: (S, N).
        weights: (S,), adding up to 1; None means 1/S each.
    """

    def __init__(self, z: Tensor, weights: Tensor | None) -> None:
        self.z, self.weights, self.count = z, weights, len(z)

    def chunks(self, rows: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The points and their weights, at most ``rows`` at a time."""
        for start in range(0, self.count, rows):
            part = slice(start, start + rows)
            yield self.z[part], None if self.weights is None else self.weights[part]

    def given_zero(self, label: int, K: Tensor) -> "Points":
        """Points of N(0, K) given z_label = 0: the same ones, minus the part that z_label determines."""
        return Points(self.z - self.z[:, label, None] * (K[label] / K[label, label]).to(self.z.dtype), self.weights)


def square_root(K: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues > 0 and F with K = F F^T, columns sqrt(eigenvalue) eigenvector."""
    values, vectors = torch.linalg.eigh(K)
    kept = values > values[-1] * 1e-14 * len(K)
    return values[kept], vectors[:, kept] * values[kept].sqrt()


def sample_points(K: Tensor, num_samples: int, seed: int, dtype: torch.dtype = torch.float32) -> Points:
    """Draw a sample of N(0, K) whose mean is exactly 0 and whose covariance is exactly K.

    Args:
        K: (N, N).
        num_samples: S, more than twice the rank of K.
        seed: Seed of the sample; the global random state is left alone.
        dtype: Of the points; the rounding of float32 is far below the sampling error.

    Returns:
        The points, with equal weights.

    Raises:
        ValueError: If there are too few samples for the rank of K.
    """
    _, factor = square_root(K)
    rank = factor.shape[1]
    if num_samples <= 2 * rank:
        raise ValueError(
            f"num_samples: {num_samples} given per replica; {rank} independent inputs need more than {2 * rank}"
        )
    generator = torch.Generator(K.device).manual_seed(seed)
    u = torch.randn(num_samples, rank, generator=generator, dtype=torch.float64, device=K.device)
    u = u - u.mean(0)
    u = torch.linalg.solve_triangular(torch.linalg.cholesky(u.T @ u / num_samples), u.T, upper=False).T
    return Points((u @ factor.T).to(dtype), None)


class GridPoints:
    """A trapezoid rule for N(0, K), generated slice by slice: tens of millions of nodes are never held at once.

    Args:
        K: (N, N).
        spacings: In each eigendirection of K.
    """

    def __init__(self, K: Tensor, spacings: list[float]) -> None:
        _, self._factor = square_root(K)
        self._axes = []
        for spacing in spacings:
            reach = math.floor(_HALF_RANGE / spacing)
            self._axes.append(torch.arange(-reach, reach + 1, dtype=torch.float64, device=K.device) * spacing)
        self.count = round(nodes_of(spacings))

    def chunks(self, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The nodes within the ball |u| <= 8 and their weights, in slices of about ``rows`` or less."""
        axes, first = self._axes[1:], self._axes[0]
        rest = torch.cartesian_prod(*axes).reshape(-1, len(axes)) if axes else first.new_zeros(1, 0)
        radius = rest.square().sum(1)
        total = math.prod(float(torch.exp(-axis.square() / 2).sum()) for axis in self._axes)
        step = max(1, rows // len(rest))
        for some in first.split(step):
            u_0 = some.repeat_interleave(len(rest))
            inside = (radius.repeat(len(some)) + u_0.square()) <= _HALF_RANGE**2
            u = torch.cat([u_0[inside, None], rest.repeat(len(some), 1)[inside]], 1)
            for part in u.split(rows):
                yield part @ self._factor.T, torch.exp(-part.square().sum(1) / 2) / total


def quadrature_step(activation: Activation, K: Tensor, tolerance: float = 1e-10) -> float | None:
    """The coarsest step, in units of z, that integrates products of derivatives at one label to ``tolerance``.

    All labels share sigma's singularities, and the nearest one, seen from any direction, is as near as for the single
    label of the largest variance.

    Returns:
        The step; None if no step down to 1/64 suffices, as for powers that outgrow the range.
    """
    deviation = K.diagonal().max().sqrt()
    if not _HALF_RANGE * float(deviation) * 128 < _MOST_NODES:
        return None

    def means(step: float) -> Tensor:
        count = math.ceil(_HALF_RANGE * float(deviation) / step)
        z = torch.arange(-count, count + 1, dtype=torch.float64, device=K.device) * step
        weight = torch.exp(-(z / deviation).square() / 2)
        s = [activation(z, order) for order in range(4)]
        products = torch.stack([s[0] ** 4, s[1] ** 4, s[2] ** 2 * s[1] ** 2, s[3] * s[1] ** 3, s[2] * s[0] * s[1] ** 2])
        return products @ weight / weight.sum()

    exact = means(1 / 128)
    step = 1.0
    while step >= 1 / 64:
        if bool(((means(step) - exact).abs() <= tolerance * (1 + exact.abs())).all()):
            return step
        step *= 0.85
    return None


def quadrature_spacings(activation: Activation, K: Tensor) -> list[float] | None:
    """Spacings of the trapezoid rule in each eigendirection of K, or None if it needs too many nodes or labels."""
    if len(K) > MOST_QUADRATURE_LABELS:
        return None
    step = quadrature_step(activation, K)
    if step is None:
        return None
    spacings = [min(0.75, step / math.sqrt(value)) for value in square_root(K)[0].tolist()]
    return spacings if nodes_of(spacings) <= _MOST_NODES else None


def nodes_of(spacings: list[float]) -> float:
    """Return the number of nodes of spacing h_i in the ball of radius 8."""
    ball = math.pi ** (len(spacings) / 2) / math.gamma(len(spacings) / 2 + 1) * _HALF_RANGE ** len(spacings)
    return ball / math.prod(spacings)


class KinkedPoints(Points):
    """A rule for N(0, K) and functions that are smooth on either side of z = 0, label by label.

    Args:
        K: (N, N), N <= 4.
        count: Nodes per side and label; at most (2 count)^N in all.
    """

    def __init__(self, K: Tensor, count: int) -> None:
        order, factor = _pivoted_cholesky(K)
        u = K.new_zeros(1, 0)
        weights = K.new_ones(1)
        for depth in range(factor.shape[1]):
            edge = -(u @ factor[depth, :depth]) / factor[depth, depth]
            nodes, node_weights = _half_line_rules(edge, count)
            u = torch.cat([u.repeat_interleave(2 * count, 0), nodes.reshape(-1, 1)], 1)
            weights = (weights[:, None] * node_weights).reshape(-1)
            kept = weights > 1e-18
            u, weights = u[kept], weights[kept]
        z = torch.empty(len(u), len(K), dtype=K.dtype, device=K.device)
        z[:, order] = u @ factor.T
        super().__init__(z, weights)
        self._nodes = count

    def given_zero(self, label: int, K: Tensor) -> Points:
        """Points of N(0, K) given z_label = 0: a rule of its own, split at the other labels' kinks."""
        left = K - torch.outer(K[label], K[label]) / K[label, label]
        left[label] = 0.0
        left[:, label] = 0.0
        return KinkedPoints(left, self._nodes)


def _pivoted_cholesky(K: Tensor) -> tuple[Tensor, Tensor]:
    """An order of the labels, widest first, and L with K[order][:, order] = L L^T, (N, rank)."""
    left = K.clone()
    order: list[int] = []
    columns: list[Tensor] = []
    for _ in range(len(K)):
        variance = left.diagonal().clone()
        variance[order] = -1.0
        pivot = int(variance.argmax())
        if float(variance[pivot]) <= 1e-13 * float(K.diagonal().max()):
            break
        column = left[:, pivot] / left[pivot, pivot].sqrt()
        left = left - torch.outer(column, column)
        order.append(pivot)
        columns.append(column)
    order += [label for label in range(len(K)) if label not in order]
    index = torch.tensor(order, device=K.device)
    return index, torch.stack(columns, 1)[index]


def _half_line_rules(edge: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Gauss rules for exp(-u^2/2) / sqrt(2 pi) left and right of each edge.

    By Lanczos on a fine discretization of the weight and the eigenvectors of the Jacobi matrix (Golub & Welsch 1969).

    Returns:
        Nodes and weights, (M, 2 count) each.
    """
    bound = _HALF_RANGE + 0.5
    edge = edge.clamp(-bound, bound)
    base, base_weights = gauss_legendre(96, edge)
    parts = []
    for low, high in ((torch.full_like(edge, -bound), edge), (edge, torch.full_like(edge, bound))):
        half = ((high - low) / 2)[:, None]
        u = low[:, None] + half * (1 + base)
        measure = half * base_weights * torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)
        mass = measure.sum(1)
        safe = mass.clamp_min(1e-300)
        before, current, beta = torch.zeros_like(u), (measure / safe[:, None]).sqrt(), torch.zeros_like(mass)
        jacobi = u.new_zeros(len(u), count, count)
        for k in range(count):
            alpha = (current * u * current).sum(1)
            jacobi[:, k, k] = alpha
            if k + 1 == count:
                break
            following = (u - alpha[:, None]) * current - beta[:, None] * before
            beta = following.norm(dim=1)
            jacobi[:, k, k + 1] = jacobi[:, k + 1, k] = beta
            before, current = current, following / beta.clamp_min(1e-300)[:, None]
        nodes, vectors = torch.linalg.eigh(jacobi)
        parts.append((nodes, vectors[:, 0, :].square() * mass[:, None]))
    return torch.cat([parts[0][0], parts[1][0]], 1), torch.cat([parts[0][1], parts[1][1]], 1)
