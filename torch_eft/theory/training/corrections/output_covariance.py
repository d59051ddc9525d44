"""The covariance of the outputs at order 1/n.

    Cov(z_{i;x}(t), z_{j;y}(t)) = delta_ij (J K J^T)_xy + (1/n) { delta_ij Dg_xy + off^ij_xy },   J = dz(t) / dz(0)
    Dg = J G1 J^T + D + D^T + Bil,    off^ij = O^ij + (O^ji)^T + Bil^ij

D, and O between outputs, pair the correction z1(t) with the infinite-width output of the same network: the propagated
source M of the mean output and one of D, F, P and Q with z(0). Bil pairs two NTK fluctuations, A and B, at two times.
All vertices but V enter. Derived by Wick contraction of z(0); n = n_{L-1}, labels in the order of print.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_eft.results.progress.work import worked
from torch_eft.theory.initialization.estimators import ReplicaMean, VertexReplicas
from torch_eft.theory.initialization.evaluator import VertexSource
from torch_eft.theory.initialization.vertex_tiles import expanded
from torch_eft.theory.training.corrections.correction import with_outputs
from torch_eft.theory.training.corrections.ddntk_source import Sources
from torch_eft.theory.training.corrections.mean_output import OutputSource, points_at_once, time_chunk
from torch_eft.theory.training.corrections.propagation import TimeGrid
from torch_eft.theory.training.infinite_width import InfiniteWidthPath
from torch_eft.theory.training.time_sums import Sums


class _PairSource:
    """Vertices between a tile of points x, all points w and two training labels a, b, rotated to modes.

    Args:
        source: The vertices, with letters x, w, a, b.
        path: The path at infinite width.
        depth: L.
        points: Number of points x.
    """

    def __init__(self, source: VertexSource, path: InfiniteWidthPath, depth: int, points: int) -> None:
        self._path = path
        sizes = (points, len(path.K), len(path.U), len(path.U))

        def v(name: str, letters: str) -> Tensor:
            return path.U.T @ expanded(source, name, depth, letters, sizes) @ path.U

        K, G = path.K_modes, path.error_gram
        P_xabw, Q_xabw, Q_xbaw = v("P", "xabw"), v("Q", "xabw"), v("Q", "xbaw")
        P_axbw, Q_axbw, Q_abxw = v("P", "axbw"), v("Q", "axbw"), v("Q", "abxw")
        fluctuation = v("D", "bwxa") + v("F", "bxwa") + path.outputs * v("F", "bawx")
        self._fluctuation = fluctuation.diagonal(dim1=2, dim2=3)
        self._moved = (P_xabw * G + (Q_xabw + Q_xbaw) * K) / 2
        self._driven = (P_axbw + Q_axbw) * K + Q_abxw * G
        self._between = Q_xabw, Q_axbw, P_axbw
        self.B_xwab = v("B", "xwab")
        self.A, self.B = v("A", "xawb"), v("B", "xbaw")

    def at(self, functions: Sums) -> Sources:
        """The sources of covariances with z(0) of the same output, (T, points, N_all)."""
        g, phi = functions[:2]
        gradient = _weighted(self._driven, g, phi) - torch.einsum("xwm,tm->txw", self._fluctuation, g)
        return gradient, _weighted(self._moved, phi, phi)

    def crossed(self, functions: Sums, i: int, j: int) -> Sources:
        """The same between outputs i and j."""
        g, phi = functions[:2]
        y_i, y_j = self._path.y[:, i], self._path.y[:, j]
        Q_xabw, Q_axbw, P_axbw = self._between
        gradient = _weighted(Q_axbw, g * y_i, phi * y_j) + _weighted(P_axbw, g * y_j, phi * y_i)
        return gradient, _weighted(Q_xabw, phi * y_i, phi * y_j)

    def bilinear(self, i: int | None = None, j: int | None = None) -> Tensor:
        """The kernel of two NTK fluctuations, (points, N_all, modes, modes): of one output, or between two."""
        if i is None or j is None:
            return (self.A + self.B) * self._path.K_modes + self.B_xwab * self._path.error_gram
        targets = torch.outer(self._path.y[:, i], self._path.y[:, j])
        return self.A * targets + self.B * targets.T


def _weighted(tensor: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """sum_ab tensor[x,w,a,b] first[t,a] second[t,b], (T, x, w)."""
    weight = (first[:, :, None] * second[:, None, :]).flatten(1)
    return (weight @ tensor.flatten(0, 1).flatten(1).T).reshape(-1, *tensor.shape[:2])


_Key = tuple[int, int] | None
"""None for the part with delta_ij, and (i, j) for the part between outputs."""


class _Parts:
    """One run: sources over all points at the times of a grid, and half-contracted kernels of Bil, by key."""

    def __init__(self, path: InfiniteWidthPath, keys: Sequence[_Key]) -> None:
        self._path, self._keys = path, keys
        self._modes: dict[_Key, list[Sources]] = {key: [] for key in keys}
        self._points: dict[_Key, list[Sources]] = {key: [] for key in keys}
        self._half: dict[_Key, Tensor] = {}

    def add(self, times: Tensor, output: OutputSource, pair: _PairSource, tile: Tensor, carried: Tensor) -> None:
        """Add the next tile of points."""
        sources: dict[_Key, tuple[list[Sources], list[Sources]]] = {key: ([], []) for key in self._keys}
        for some in times.split(time_chunk(len(self._path.eigenvalues), len(tile))):
            functions = self._path.double(some)
            for key, (modes, points) in sources.items():
                modes.append(output.at(functions) if key is None else output.ddntk.crossed(functions, *key))
                points.append(pair.at(functions) if key is None else pair.crossed(functions, *key))
        for key, (modes, points) in sources.items():
            self._modes[key].append(_joined(modes, 0))
            self._points[key].append(_joined(points, 0))
            kernel = pair.bilinear(*(key or ()))
            half = torch.einsum("tXxm,xwmk->tXwk", carried[:, :, tile], kernel)
            self._half[key] = self._half.get(key, 0.0) + half
            worked(half.shape[0] * half.shape[1] * kernel.numel())

    def covariance(self, grid: TimeGrid, carried: Tensor, J: Tensor) -> dict[_Key, tuple[Tensor, Tensor]]:
        """The pairing of z1 with z0, and Bil, (T, N_p, N_p) each, by key."""
        path, probes = self._path, J.shape[1]
        with_modes = path.U.T @ path.K[-len(path.U) :] @ J.mT  # Cov(e_m(0), z_y(t)), (T, modes, N_p)
        result = {}
        for key in self._keys:
            modes = grid.propagated(*_joined(self._modes[key], 1))[:, :probes]
            points = grid.propagated(*_joined(self._points[key], 1))[:, :probes]
            paired = points @ J.mT - modes @ with_modes
            result[key] = paired, torch.einsum("tYwk,tXwk->tXY", carried, self._half[key])
        return result


def _joined(sources: Sequence[Sources], axis: int) -> Sources:
    gradient, direct = zip(*sources, strict=True)
    return torch.cat(gradient, axis), torch.cat(direct, axis)


def carried_kernel(path: InfiniteWidthPath, probes: int, steps: Tensor) -> Tensor:
    """A source g_m(s) at point x, propagated to the probe X: (T, N_p, N_all, modes)."""
    _, phi, _, f = path.double(steps)
    lagged = (phi[:, None, :] - f) / path.eigenvalues[:, None]  # (T, k, m)
    result = path.K.new_zeros(len(steps), probes, len(path.K), len(path.eigenvalues))
    for point in range(probes):
        result[:, point, point] = phi
    result[:, :, path.probes :] -= torch.einsum("Xk,xk,tkm->tXxm", path.coupling[:probes], path.U, lagged)
    return result


def output_covariance(
    vertices: VertexReplicas,
    path: InfiniteWidthPath,
    probes: int,
    steps: Tensor,
    tile: int | None = None,
) -> tuple[Tensor, float]:
    """n_{L-1} times the correction of the covariance of the outputs on the first ``probes`` points.

    Args:
        vertices: The vertices over all points.
        path: The path at infinite width.
        probes: N_p.
        steps: (T,), whole numbers for gradient descent.
        tile: Points that are evaluated at once.

    Returns:
        The correction, (T, N_p, N_p, n_L, n_L), and the standard error of its entries (rms), 0 where moments are
        integrated.
    """
    points, train = torch.arange(len(path.K), device=path.K.device), path.train
    grid, outputs = TimeGrid(path, steps), path.outputs
    keys: list[_Key] = [None, *((i, j) for i in range(outputs) for j in range(outputs))]
    carried, J = carried_kernel(path, probes, steps), path.response(steps, probes)
    runs: list[_Parts] = []
    G1: list[list[Tensor]] = []
    for some in points.split(tile or points_at_once(len(path.K), len(path.U))):
        to_train = {"x": some, "a": train, "b": train, "c": train}
        to_all = {"x": some, "w": points, "a": train, "b": train}
        both = zip(vertices.replicas(to_train).members, vertices.replicas(to_all).members, strict=True)
        for run, (first, second) in enumerate(both):
            if run == len(runs):
                runs.append(_Parts(path, keys))
                G1.append([])
            output = OutputSource(first, path, vertices.depth, len(some), cross=True)
            pair = _PairSource(second, path, vertices.depth, len(some))
            runs[run].add(grid.times, output, pair, some, carried)
            array = second.array("G1", vertices.depth, "xw").double().expand(len(some), len(points), 1, 1)
            G1[run].append(array.reshape(len(some), len(points)))
    correction = ReplicaMean(vertices.kind)
    for parts, kernel in zip(runs, G1, strict=True):
        terms = parts.covariance(grid, carried, J)
        paired, bilinear = terms.pop(None)
        mean = J @ torch.cat(kernel) @ J.mT + paired + paired.mT + bilinear
        between = bilinear.new_empty(*bilinear.shape, outputs, outputs)
        for i in range(outputs):
            for j in range(outputs):
                between[..., i, j] = terms[i, j][0] + terms[j, i][0].mT + terms[i, j][1]
        correction.add(with_outputs(mean, between))
    return correction.result()
