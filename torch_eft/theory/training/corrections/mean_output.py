"""The mean output at order 1/n: its source at every step, and the linear dynamics under this source.

    E z_{i;x}(t) = infinite width + (1/n) propagated sources,    source_{i;x}(s) = sum_c M[x,c](s) y_ic

with c a mode of training and M the same for every output, n = n_{L-1}; one source is of gradients, the other direct
(``propagation``), so that one derivation holds for every optimizer that is linear in gradients. M has four parts, from
Theta1; from A and B (two fluctuations of the NTK); from P and Q; from R, S, T and U. G1, V, D and F do not enter: z(0)
is odd and H even under a change of sign of the last layer. Derived from the GD hierarchy of dNTK and ddNTK (PDLT
chapter infinity) by Wick contraction of z(0), in the terms of ``time_sums``; labels are in the order in which vertices
are printed.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from torch_eft.theory.initialization.estimators import ReplicaKind, ReplicaMean, VertexReplicas
from torch_eft.theory.initialization.evaluator import VertexSource
from torch_eft.theory.initialization.vertex_tiles import expanded
from torch_eft.theory.training.corrections.ddntk_source import DdntkSource, Sources
from torch_eft.theory.training.corrections.propagation import TimeGrid
from torch_eft.theory.training.infinite_width import InfiniteWidthPath
from torch_eft.theory.training.time_sums import Sums

_BUDGET = 2**25
_ARRAYS, _MEMORY = 110, 3 * 2**28
"""Four-label arrays alive at once, in single precision, and the bytes allowed for them."""


class OutputSource:
    """M[x, c](s) on one tile of points x, for any s: the vertices, rotated to modes and contracted once.

    Args:
        source: The vertices, with letters x (the tile) and a, b, c (training points).
        path: The path at infinite width.
        depth: L.
        points: Number of points in the tile.
        cross: Prepare the source of covariances between outputs too.
    """

    def __init__(
        self, source: VertexSource, path: InfiniteWidthPath, depth: int, points: int, cross: bool = False
    ) -> None:
        self.path = path
        train = len(path.U)
        sizes = (points, train, train, train)
        outputs, U = path.outputs, path.U

        def v(name: str, letters: str) -> Tensor:
            return expanded(source, name, depth, letters, sizes)

        # Two training labels contracted with the same mode m, the free one rotated to c: (x, c, m).
        def paired(tensor: Tensor) -> Tensor:
            half = torch.einsum("xabm,bm->xam", tensor @ U, U)
            return torch.einsum("xam,ac->xcm", half, U)

        # Theta1 is a function of two labels only.
        Theta1 = source.array("Theta1", depth, "xa").double()
        self.Theta1 = Theta1.expand(points, train, 1, 1).reshape(points, train) @ U
        self.C2 = paired(v("A", "xbca") + v("B", "xcba") + outputs * v("B", "xabc"))
        self.Pi = paired(v("P", "xbac") + v("Q", "xbac") + outputs * v("Q", "xabc"))
        self.L1 = paired(outputs * v("P", "bxac") + v("Q", "bxac") + v("Q", "baxc"))
        self.L2 = paired(v("P", "axbc") + outputs * v("Q", "axbc") + v("Q", "abxc"))
        self.ddntk = DdntkSource(v, path, cross)

    def matrix(self, steps: Tensor) -> Iterator[Sources]:
        """M at the given steps, in order, in chunks (T, points, modes)."""
        for some in steps.split(time_chunk(len(self.path.eigenvalues), len(self.Theta1))):
            yield self.at(self.path.double(some))

    def at(self, functions: Sums) -> Sources:
        """M at the times of the functions, (T, points, modes) each."""
        g, phi, _, f = functions
        gradient, direct = self.ddntk.at(functions)
        gradient = gradient + self.Theta1 * g[:, None, :] - torch.einsum("xcm,tmc->txc", self.C2, f)
        gradient = gradient - _over_modes(self.L1, g) * phi[:, None, :] - _over_modes(self.L2, phi) * g[:, None, :]
        return gradient, direct - _over_modes(self.Pi, phi) * phi[:, None, :]


def _over_modes(tensor: Tensor, weight: Tensor) -> Tensor:
    """sum_m tensor[x,c,m] weight[t,m], (T, x, c)."""
    return torch.einsum("xcm,tm->txc", tensor, weight)


def time_chunk(modes: int, points: int) -> int:
    """Number of times that are contracted at once."""
    return max(1, _BUDGET // (8 * modes**2 * max(4, points)))


def output_sources(
    vertices: VertexReplicas,
    path: InfiniteWidthPath,
    steps: Tensor,
    columns: Tensor,
    tile: int | None = None,
) -> tuple[list[Sources], ReplicaKind]:
    """The sources of the mean output at given steps, run by run: M[x, c](s) contracted with columns.

    Args:
        vertices: The vertices over all points.
        path: The path at infinite width.
        steps: (T,).
        columns: (modes, C), e.g. the targets in modes, or the identity.
        tile: Points x that are evaluated at once.

    Returns:
        (T, N_all, C) twice for each run, and how the runs are related.
    """
    points, train = torch.arange(len(path.K), device=path.K.device), path.train
    if tile is None:
        tile = points_at_once(len(path.K), len(train))
    runs: list[tuple[list[Tensor], list[Tensor]]] = []
    for some in points.split(tile):
        sets = {"x": some, "a": train, "b": train, "c": train}
        for run, source in enumerate(vertices.replicas(sets).members):
            if run == len(runs):
                runs.append(([], []))
            chunks = list(OutputSource(source, path, vertices.depth, len(some)).matrix(steps))
            for kind, parts in enumerate(runs[run]):
                parts.append(torch.cat([chunk[kind] @ columns for chunk in chunks]))
    return [(torch.cat(gradient, 1), torch.cat(direct, 1)) for gradient, direct in runs], vertices.kind


def points_at_once(points: int, train: int) -> int:
    """Number of points x, of all of them, in a tile whose four-label arrays fit into the budget."""
    return max(1, min(points, _MEMORY // (4 * _ARRAYS * train**3)))


def mean_output(
    vertices: VertexReplicas, path: InfiniteWidthPath, steps: Tensor, tile: int | None = None
) -> tuple[Tensor, float]:
    """n_{L-1} times the correction of the mean output over all points.

    Args:
        vertices: The vertices over all points.
        path: The path at infinite width.
        steps: (T,), whole numbers for gradient descent.
        tile: Points that are evaluated at once.

    Returns:
        (T, N_all, n_L), and the standard error of its entries (rms), 0 where moments are integrated.
    """
    grid = TimeGrid(path, steps)
    sources, kind = output_sources(vertices, path, grid.times, path.y, tile)
    mean = ReplicaMean(kind)
    for gradient, direct in sources:
        mean.add(grid.propagated(gradient, direct))
    return mean.result()
