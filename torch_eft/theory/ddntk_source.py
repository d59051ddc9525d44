"""What R, S, T and U contribute to the source of the mean output, and to that of covariances between outputs.

M_dd[x, c](s) is a sum over four structures in time, of weights w_abc(s) = g_a psi_bc, g_a phi_b phi_c, g_a g_b phi_c
and g_a g_b g_c, each with three tensors tau_a, tau_b, tau_c: tau_a multiplies "x shares its output with a, b with c".
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from torch_eft.theory.order_zero_path import OrderZeroPath

TimeFunctions = tuple[Tensor, Tensor, Tensor, Tensor]
"""g, phi, (T, modes), psi and f, (T, modes, modes), as from ``OrderZeroPath.double``."""


class DdntkSource:
    """M_dd on one tile of points.

    Args:
        v: ``v(name, letters)``: vertices on (x, a, b, c), a, b, c training points.
        path: The order-0 path.
        cross: Whether ``crossed`` will be asked for: keeps the tensors that it needs.
    """

    def __init__(self, v: Callable[[str, str], Tensor], path: OrderZeroPath, cross: bool = False) -> None:
        self._path = path
        self._weights: list[float] = []
        self._grams: list[Sequence[Tensor]] = []
        self._taus: list[Sequence[Tensor]] = []
        for weight, taus in _time_structures(v, path.step):
            rotated = [_rotated(tau, path.U) for tau in taus]
            self._weights.append(weight)
            self._grams.append(self._summed(rotated))
            if cross:
                self._taus.append(rotated)

    def at(self, functions: TimeFunctions) -> Tensor:
        """M_dd, (T, points, modes)."""
        return self._contracted(functions, self._grams)

    def crossed(self, functions: TimeFunctions, i: int, j: int) -> Tensor:
        """As ``at`` for the part of Cov(z_i, z_j) that pairs the targets of i and j, (T, points, modes)."""
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
        total, found = taus[0] + taus[1] + taus[2], []
        for free, own in enumerate(taus):
            shape = _pair_shape(own, free)
            found.append(own * targets_only.reshape(shape) + total * K.reshape(shape))
        return found

    def _contracted(self, functions: TimeFunctions, structures: Sequence[Sequence[Tensor]]) -> Tensor:
        g, phi, psi, _ = functions
        total = torch.zeros_like(g)[:, None, :]
        for kind, (weight, (on_a, on_b, on_c)) in enumerate(zip(self._weights, structures, strict=True)):
            if kind == 0:
                total = total + weight * g[:, None, :] * _against_pairs(on_a, psi)
                total = total + weight * (_first_contracted(on_b, g) * psi[:, None]).sum(3)
                total = total + weight * (_first_contracted(on_c, g) * psi[:, None]).sum(2)
                continue
            u, v, w = ((g, phi, phi), (g, g, phi), (g, g, g))[kind - 1]
            total = total + weight * u[:, None, :] * _against_pairs(on_a, v[:, :, None] * w[:, None, :])
            total = total + weight * v[:, None, :] * (_first_contracted(on_b, u) @ w[:, None, :, None])[..., 0]
            total = total + weight * w[:, None, :] * (v[:, None, None, :] @ _first_contracted(on_c, u))[..., 0, :]
        return total


def _pair_shape(tensor: Tensor, free: int) -> list[int]:
    """The shape in which a matrix lies along the two training labels that are not free."""
    shape = [1, *tensor.shape[1:]]
    shape[1 + free] = 1
    return shape


def _time_structures(v: Callable[[str, str], Tensor], step: float) -> Iterator[tuple[float, tuple[Tensor, ...]]]:
    """(coefficient, (tau_a, tau_b, tau_c)): tau_a multiplies "x shares its output with a, b with c".

    With weights g_a psi_bc, g_a phi_b phi_c, g_a g_b phi_c and g_a g_b g_c; gradient flow has the first two.
    """
    yield (
        1.0,
        (
            v("T", "xabc") + v("T", "axbc"),
            v("S", "xbac") + v("U", "acbx"),
            v("U", "xcba") + v("S", "abxc"),
        ),
    )
    yield (
        1.0,
        (
            v("R", "xabc") / 2 + v("R", "axbc") / 2 + v("S", "xabc"),
            v("R", "xbca") / 2 + v("R", "acxb") / 2 + v("T", "xbac"),
            v("R", "xcab") / 2 + v("R", "abcx") / 2 + v("U", "xcab"),
        ),
    )
    if step == 0:
        return
    yield (
        step / 2,
        (
            v("R", "xabc") + v("S", "xabc") + v("T", "xabc"),
            v("R", "xbca") + v("T", "xbac") + v("S", "xbac"),
            v("R", "xcab") + v("U", "xcab") + v("U", "xcba"),
        ),
    )
    yield step**2 / 6, (v("R", "xabc"), v("R", "xbca"), v("R", "xcab"))


def _rotated(tensor: Tensor, U: Tensor) -> Tensor:
    """All three training labels to modes."""
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
