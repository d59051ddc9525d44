"""Contributions of R, S, T and U to the source of the mean output, and to that of covariances between outputs.

M_dd[x, c](s) is a sum over structures in time: as a source of gradients, of weights w_abc(s) = g_a psi_bc (from
ddII_abxc e_a q_bc) and g_a phi_b phi_c (ddI_abcx e_a p_b p_c / 2); as a direct one, phi_a psi_bc (ddII_xbac p_a q_bc)
and phi_a phi_b phi_c (ddI_xabc p_a p_b p_c / 6). Each has three tensors tau_a, tau_b, tau_c: tau_a multiplies
"x shares its output with a, b with c".
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from torch_eft.results.progress.work import worked
from torch_eft.theory.training.infinite_width import InfiniteWidthPath
from torch_eft.theory.training.time_sums import Sums

Sources = tuple[Tensor, Tensor]
"""A source of gradients and a direct one, as ``propagation.TimeGrid`` takes them."""


class DdntkSource:
    """M_dd on one tile of points.

    Args:
        v: ``v(name, letters)``: vertices on (x, a, b, c), a, b, c training points.
        path: The path at infinite width.
        cross: Keep the tensors that ``crossed`` needs.
    """

    def __init__(self, v: Callable[[str, str], Tensor], path: InfiniteWidthPath, cross: bool = False) -> None:
        self._path = path
        self._weights: list[float] = []
        self._grams: list[Sequence[Tensor]] = []
        self._taus: list[Sequence[Tensor]] = []
        for weight, taus in _time_structures(v):
            rotated = [_rotated(tau, path.U) for tau in taus]
            self._weights.append(weight)
            self._grams.append(self._summed(rotated))
            if cross:
                self._taus.append(rotated)

    def at(self, functions: Sums) -> Sources:
        """M_dd, (T, points, modes) each."""
        return self._contracted(functions, self._grams)

    def crossed(self, functions: Sums, i: int, j: int) -> Sources:
        """The same for the part of Cov(z_i, z_j) that pairs the targets of i and j."""
        targets = torch.outer(self._path.y[:, i], self._path.y[:, j])
        structures = []
        for taus in self._taus:
            on = []
            for free in range(3):
                p, q = (slot for slot in range(3) if slot != free)
                shape = _pair_shape(taus[free], free)
                on.append(taus[p] * targets.reshape(shape) + taus[q] * targets.T.reshape(shape))
            structures.append(on)
        return self._contracted(functions, structures)

    def _summed(self, taus: Sequence[Tensor]) -> list[Tensor]:
        """For each label: its tau times G plus the others times K on the pair of other labels."""
        K, targets_only = self._path.K_modes, self._path.error_gram - self._path.K_modes
        total, grams = taus[0] + taus[1] + taus[2], []
        for free, own in enumerate(taus):
            shape = _pair_shape(own, free)
            grams.append(own * targets_only.reshape(shape) + total * K.reshape(shape))
        return grams

    def _contracted(self, functions: Sums, structures: Sequence[Sequence[Tensor]]) -> Sources:
        g, phi, psi, _ = functions
        moved = phi[:, :, None] * phi[:, None, :]
        timed = zip(self._weights, structures, ((g, psi), (g, moved), (phi, psi), (phi, moved)), strict=True)
        parts = []
        for weight, on, (single, pair) in timed:
            parts.append(weight * _against(on, single, pair))
            worked(3 * len(g) * on[0].numel())
        return parts[0] + parts[1], parts[2] + parts[3]


def _pair_shape(tensor: Tensor, free: int) -> list[int]:
    """The shape in which a matrix lies along the two training labels that are not free."""
    shape = [1, *tensor.shape[1:]]
    shape[1 + free] = 1
    return shape


def _time_structures(v: Callable[[str, str], Tensor]) -> Iterator[tuple[float, tuple[Tensor, ...]]]:
    """(coefficient, (tau_a, tau_b, tau_c)) for g_a psi_bc, g_a phi_b phi_c, phi_a psi_bc and phi_a phi_b phi_c."""
    yield 1.0, (v("T", "axbc"), v("U", "acbx"), v("S", "abxc"))
    yield 0.5, (v("R", "axbc"), v("R", "acxb"), v("R", "abcx"))
    yield 1.0, (v("T", "xabc"), v("S", "xbac"), v("U", "xcba"))
    yield 1 / 6, (v("R", "xabc"), v("R", "xbca"), v("R", "xcab"))


def _against(tensors: Sequence[Tensor], single: Tensor, pair: Tensor) -> Tensor:
    """The weights single_a pair_bc on tensors with a, b or c free, (T, x, modes)."""
    on_a, on_b, on_c = tensors
    total = single[:, None, :] * _against_pairs(on_a, pair)
    total = total + (_first_contracted(on_b, single) * pair[:, None]).sum(3)
    return total + (_first_contracted(on_c, single) * pair[:, None]).sum(2)


def _rotated(tensor: Tensor, U: Tensor) -> Tensor:
    """Rotates all three training labels to modes."""
    for axis in (1, 2, 3):
        tensor = (tensor.movedim(axis, -1) @ U).movedim(-1, axis)
    return tensor


def _against_pairs(tensor: Tensor, weight: Tensor) -> Tensor:
    """sum_bc tensor[x,a,b,c] weight[t,b,c], (T, x, a)."""
    points, modes = tensor.shape[:2]
    return (weight.flatten(1) @ tensor.reshape(points * modes, -1).T).reshape(-1, points, modes)


def _first_contracted(tensor: Tensor, weight: Tensor) -> Tensor:
    """sum_a tensor[x,a,b,c] weight[t,a], (T, x, b, c)."""
    points, modes = tensor.shape[:2]
    flat = tensor.movedim(1, 0).reshape(modes, -1)
    return (weight @ flat).reshape(-1, points, modes, modes)
