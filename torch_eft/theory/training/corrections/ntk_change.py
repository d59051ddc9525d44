"""The mean drift of the NTK at order 1/n, in closed form at any time.

    E[H_{ij;xy}(t) - H_{ij;xy}(0)] = (1/n) { delta_ij Dg_xy + off^{ij}_xy }

out of the vertices P, Q, R, S, T, U on (x, y, g, d), x and y probe and g and d training points, n = n_{L-1}. With
G = E sum_k e_k e_k^T the Gram matrix of the initial error, K the kernel, both in modes, and phi, psi of
``time_sums``,

    Dg = sum_mk { -PQ_mm phi_m + phi_m phi_k (Cpp G + Cij K)_mk + psi_mk (Cqq G + (Sij + Sji) K)_mk }
    off^ij = sum_mk { Cij_mk phi_m phi_k y_mi y_kj + Sij_mk psi_mk y_mi y_kj + Sji_mk psi_mk y_mj y_ki }

(derived from the GD hierarchy of dNTK and ddNTK, PDLT chapter infinity, by Wick contraction of z(0)). Only (P, Q) and
(R, S, T, U) enter: z(0) is odd and H even under a change of sign of the last layer. The norm of one network's drift is
not determined by these vertices: it needs Cov(dH, dH).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torch_eft.results.progress.work import worked
from torch_eft.theory.initialization.estimators import ReplicaMean, VertexReplicas
from torch_eft.theory.initialization.evaluator import LabelSets, VertexSource
from torch_eft.theory.initialization.vertex_tiles import expanded
from torch_eft.theory.training.corrections.correction import with_outputs
from torch_eft.theory.training.infinite_width import InfiniteWidthPath

_TERMS = 6
_BUDGET = 2**29
_CHUNK = 2**26


def drift_combinations(source: VertexSource, depth: int, outputs: int, sizes: Sequence[int]) -> list[Tensor]:
    """PQ, Cpp, Cqq, Cij, Sij, Sji, each (x, y, g, d)."""

    def v(name: str, letters: str) -> Tensor:
        return expanded(source, name, depth, letters, sizes)

    PQ = v("P", "xygd") + outputs * v("Q", "xygd") + v("Q", "xgyd")
    PQ = PQ + v("P", "yxgd") + outputs * v("Q", "yxgd") + v("Q", "ygxd")
    Cpp = v("R", "xygd") / 2 + v("R", "yxgd") / 2 + v("S", "xygd")
    Cqq = v("T", "xygd") + v("T", "yxgd")
    Cij = v("R", "xgyd") + v("R", "ydxg") + v("T", "xgyd") + v("U", "xgyd")
    return [PQ, Cpp, Cqq, Cij, v("S", "xgyd") + v("U", "ydgx"), v("U", "xdgy") + v("S", "ygxd")]


def contracted_drift(
    path: InfiniteWidthPath, combinations: Sequence[Tensor], steps: Tensor, trace: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The two parts of n times the drift from combinations in modes.

    Args:
        path: The path at infinite width.
        combinations: As from ``drift_combinations`` with g and d rotated to modes, (x, y, modes, modes).
        steps: (T,).
        trace: Compute only the mean over outputs i = j, at a cost that does not grow with n_L.

    Returns:
        Dg, (T, x, y), and off, (T, x, y, n_L, n_L); with ``trace`` the mean of both over i = j, and None.
    """
    PQ, Cpp, Cqq, Cij, Sij, Sji = combinations
    shape, modes = PQ.shape[:2], PQ.shape[2]
    K, G = path.K_modes, path.error_gram
    on_phi, on_psi = Cpp * G + Cij * K, Cqq * G + (Sij + Sji) * K
    if trace:
        on_phi = on_phi + Cij * path.target_gram / path.outputs
        on_psi = on_psi + (Sij + Sji) * path.target_gram / path.outputs
    on_phi, on_psi = on_phi.reshape(-1, modes**2).T, on_psi.reshape(-1, modes**2).T
    diagonal = PQ.diagonal(dim1=2, dim2=3).reshape(-1, modes).T
    means, offs = [], []
    for some in steps.split(max(1, _CHUNK // (8 * modes**2))):
        _, phi, psi, _ = path.double(some)
        total = (phi[:, :, None] * phi[:, None, :]).flatten(1) @ on_phi + psi.flatten(1) @ on_psi - phi @ diagonal
        means.append(total.reshape(-1, *shape))
        worked(2 * len(some) * PQ.numel())
        for k in range(0 if trace else len(some)):
            offs.append(_off_outputs(path.y, Cij, Sij, Sji, phi[k], psi[k]))
            worked(3 * PQ.numel() * path.outputs)
    return torch.cat(means), None if trace else torch.stack(offs)


def _off_outputs(y: Tensor, Cij: Tensor, Sij: Tensor, Sji: Tensor, phi: Tensor, psi: Tensor) -> Tensor:
    """off^ij at one time, (x, y, n_L, n_L)."""
    moved = phi[:, None] * y
    first = torch.einsum("mi,xymj->xyij", moved, Cij @ moved)
    first = first + torch.einsum("mi,xymj->xyij", y, (Sij * psi) @ y)
    return first + torch.einsum("mj,xymi->xyij", y, (Sji * psi) @ y)


def ntk_change(
    vertices: VertexReplicas,
    path: InfiniteWidthPath,
    probes: int,
    steps: Tensor,
    trace: bool = False,
    tile: int = 128,
) -> tuple[Tensor, float]:
    """n_{L-1} times the mean drift of the NTK on the first ``probes`` points.

    Args:
        vertices: The vertices over all points.
        path: The path at infinite width.
        probes: N_p.
        steps: (T,).
        trace: As for ``contracted_drift``.
        tile: Training labels on each side that are evaluated at once.

    Returns:
        The drift, (T, N_p, N_p, n_L, n_L), or with ``trace`` its mean over i = j, (T, N_p, N_p); and the standard error
        of its entries (rms), 0 where moments are integrated. Dg and off come from one sample: their errors are not
        independent, so that it is their sum of which the error is estimated.
    """
    rows = probe_rows(probes, len(path.U))
    blocks = torch.arange(probes, device=path.K.device).split(rows)
    parts: list[_Assembled] = []
    for i, first in enumerate(blocks):
        for second in blocks[i:]:
            runs = rotated_combinations(vertices, path, first, second, tile)
            for run, combinations in enumerate(runs):
                if run == len(parts):
                    parts.append(_Assembled(probes))
                parts[run].put(first, second, *contracted_drift(path, combinations, steps, trace))
    drift = ReplicaMean(vertices.kind)
    for part in parts:
        drift.add(part.mean if trace else with_outputs(part.mean, part.off))
    return drift.result()


def probe_rows(probes: int, count: int) -> int:
    """Number of probes on each side of a tile whose combinations stay within the budget."""
    pairs = max(1, _BUDGET // (8 * _TERMS * count**2))
    return max(1, min(probes, int(pairs**0.5)))


def rotated_combinations(
    vertices: VertexReplicas, path: InfiniteWidthPath, first: Tensor, second: Tensor, tile: int
) -> Iterator[list[Tensor]]:
    """The combinations of one tile of probe pairs with training labels rotated to modes, run by run."""
    train = path.train.split(tile)
    shape = (len(first), len(second), len(path.U), len(path.U))
    totals: list[list[Tensor]] = []
    for g, rows in enumerate(train):
        for d in range(g, len(train)):
            columns = train[d]
            sets: LabelSets = {"x": first, "y": second, "g": rows, "d": columns}
            at, to = slice(g * tile, g * tile + len(rows)), slice(d * tile, d * tile + len(columns))
            for run, source in enumerate(vertices.replicas(sets).members):
                if run == len(totals):
                    totals.append([path.K.new_zeros(shape) for _ in range(_TERMS)])
                sizes = [len(index) for index in sets.values()]
                values = drift_combinations(source, vertices.depth, path.outputs, sizes)
                for total, value in zip(totals[run], values, strict=True):
                    total[:, :, at, to] = value
                if d > g:
                    swapped = drift_combinations(_Swapped(source), vertices.depth, path.outputs, sizes)
                    for total, value in zip(totals[run], swapped, strict=True):
                        total[:, :, to, at] = value.mT
    while totals:
        combinations = totals.pop(0)
        yield [path.U.T @ combinations.pop(0) @ path.U for _ in range(_TERMS)]  # one at a time: memory


class _Swapped:
    """The same vertices with the letters g and d exchanged."""

    def __init__(self, source: VertexSource) -> None:
        self._source = source

    def array(self, name: str, layer: int, letters: str) -> Tensor:
        """The vertex for exchanged letters."""
        return self._source.array(name, layer, letters.translate(_EXCHANGE))


_EXCHANGE = str.maketrans("gd", "dg")


class _Assembled:
    """The drift over all probe pairs, out of blocks on and above the diagonal: E H_ij;xy = E H_ji;yx."""

    def __init__(self, probes: int) -> None:
        self._probes = probes
        self.mean = torch.empty(0)
        self.off = torch.empty(0)

    def put(self, first: Tensor, second: Tensor, mean: Tensor, off: Tensor | None) -> None:
        """Put a block and its mirror image."""
        if len(self.mean) == 0:
            self.mean = mean.new_zeros(len(mean), self._probes, self._probes)
            if off is not None:
                self.off = off.new_zeros(*self.mean.shape, *off.shape[3:])
        rows, columns = first[:, None], second[None, :]
        self.mean[:, rows, columns] = mean
        self.mean[:, columns.T, rows.T] = mean.mT
        if off is not None:
            self.off[:, rows, columns] = off
            self.off[:, columns.T, rows.T] = off.permute(0, 2, 1, 4, 3)
