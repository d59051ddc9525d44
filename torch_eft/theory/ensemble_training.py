"""Training of an ensemble at order 1/n: mean output and its covariance, and the drift of the NTK.

Which vertex contributes to which observable follows from one symmetry: changing the sign of the last layer changes
that of z and dH and leaves H, ddI and ddII alone. For squared error, where an output depends on z(0) linearly at order
0:

    E z(t)            Theta1; A, B; P, Q; R, S, T, U           [not G1, V, D, F]
    Cov z(t)          all of them but V
    E H(t) - E H(0)   P, Q; R, S, T, U

The average over z(0) is then exact by Wick contraction, outputs reduce to n_L as a number and to the Gram matrix of
the targets, and nothing grows with n_L. Full-batch gradient descent and gradient flow; momentum, minibatches and
cross-entropy are outside this derivation.
"""

import torch
from torch import Tensor

from torch_eft.theory.blocks import Combined
from torch_eft.theory.mean_output import (
    OutputSource,
    flow_panels,
    panel_nodes,
    propagated_descent,
    propagated_flow,
)
from torch_eft.theory.order_zero_path import OrderZeroPath
from torch_eft.theory.vertex_tiles import VertexTiles

_ARRAYS = 110
_BUDGET = 3 * 2**28
"""Bytes for the four-label arrays that are alive at once, about a hundred in single precision."""


def output_sources(
    vertices: VertexTiles, path: OrderZeroPath, steps: Tensor, columns: Tensor, tile: int | None = None
) -> tuple[list[Tensor], bool]:
    """The source of the mean output at given steps, run by run: M[x, c](s) contracted with columns.

    Args:
        vertices: The vertices over all points.
        path: The order-0 path.
        steps: (T,).
        columns: (modes, C), e.g. the targets in modes, or the identity.
        tile: Points x that are evaluated at once.

    Returns:
        (T, N_all, C) for each run, and whether the runs are refinements rather than samples.
    """
    points, train = torch.arange(len(path.K), device=path.K.device), path.train
    if tile is None:
        tile = max(1, min(len(points), _BUDGET // (4 * _ARRAYS * len(train) ** 3)))
    found: list[list[Tensor]] = []
    for some in points.split(tile):
        sets = {"x": some, "a": train, "b": train, "c": train}
        for run, source in enumerate(vertices.runs(sets)):
            if run == len(found):
                found.append([])
            matrix = OutputSource(source, path, vertices.depth, len(some)).matrix(steps)
            found[run].append(torch.cat([part @ columns for part in matrix]))
    return [torch.cat(parts, 1) for parts in found], vertices.refined


def mean_output(
    vertices: VertexTiles, path: OrderZeroPath, steps: Tensor, tile: int | None = None
) -> tuple[Tensor, float]:
    """n_{L-1} times the correction of the mean output over all points.

    Args:
        vertices: The vertices over all points.
        path: The order-0 path.
        steps: (T,), whole numbers for gradient descent.
        tile: Points that are evaluated at once.

    Returns:
        (T, N_all, n_L), and the standard error of its entries (rms), 0 where moments are integrated.
    """
    clock = Clock(path, steps)
    sources, refined = output_sources(vertices, path, clock.times, path.y, tile)
    combined = Combined(refined)
    for source in sources:
        combined.add(clock.propagated(source))
    return combined.result()


class Clock:
    """The times at which sources are needed, and their propagation to the times that are wanted.

    Args:
        path: The order-0 path.
        steps: Wanted, (T,).
    """

    def __init__(self, path: OrderZeroPath, steps: Tensor) -> None:
        self._path = path
        if path.step:
            self._wanted = torch.round(steps).long()
            self.times = torch.arange(int(self._wanted.max()), device=path.K.device)
            return
        self._panels = flow_panels(path, steps)
        self._wanted = torch.searchsorted(self._panels, path.rate * steps.to(self._panels)).clamp_max(
            len(self._panels) - 1
        )
        self.times = panel_nodes(self._panels).flatten() / path.rate

    def propagated(self, source: Tensor) -> Tensor:
        """z1 at the wanted times for a source at ``times``, (T, N_all, C)."""
        if len(self.times) == 0:
            return source.new_zeros(len(self._wanted), *source.shape[1:])
        if self._path.step:
            return propagated_descent(self._path, source)[self._wanted]
        panels = len(self._panels) - 1
        by_panel = source.reshape(panels, -1, *source.shape[1:])
        return propagated_flow(self._path, self._panels, by_panel)[self._wanted]
