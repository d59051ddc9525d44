"""The mean output at order 1/n: what drives it at every step, and the linear dynamics that carries it on.

    E z_{i;x}(t) = order 0 + (1/n) sum_s propagated source,    source_{i;x}(s) = eta sum_c M[x,c](s) y_ic

with c a mode of training and M the same for every output, n = n_{L-1}. M has four parts, from Theta1; from A and B
(two fluctuations of the NTK); from P and Q; from R, S, T and U. G1, V, D and F do not enter: z(0) is odd and H even
under a change of sign of the last layer. Derived from the GD hierarchy of dNTK and ddNTK (PDLT chapter infinity) by
Wick contraction of z(0), in the terms of ``order_zero_path``; labels are in the order in which vertices are printed.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from torch_eft.theory.expectations import gauss_legendre
from torch_eft.theory.order_zero_path import OrderZeroPath
from torch_eft.theory.vertex_tiles import VertexSource, expanded

_BUDGET = 2**25
_NODES = 10


class OutputSource:
    """M[x, c](s) on one tile of points x, for any s: the vertices, rotated to modes and contracted once.

    Args:
        source: The vertices, with letters x (the tile) and a, b, c (training points).
        path: The order-0 path.
        depth: L.
        points: Number of points in the tile.
    """

    def __init__(self, source: VertexSource, path: OrderZeroPath, depth: int, points: int) -> None:
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
        # Of every structure in time: its coefficient, and what its weights multiply.
        self._structures = [(weight, self._grams(taus)) for weight, taus in _time_structures(v, path.step)]

    def _grams(self, taus: Sequence[Tensor]) -> list[Tensor]:
        """For each label: its tau times G plus the others times K on the pair of other labels, in modes."""
        rotated = [_rotated(tau, self.path.U) for tau in taus]
        total, found = rotated[0] + rotated[1] + rotated[2], []
        for free, own in enumerate(rotated):
            shape = [1, *own.shape[1:]]
            shape[1 + free] = 1
            found.append(
                own * (self.path.error_gram - self.path.K_modes).reshape(shape)
                + total * self.path.K_modes.reshape(shape)
            )
        return found

    def matrix(self, steps: Tensor) -> Iterator[Tensor]:
        """M at the given steps, in order, in chunks (T, points, modes)."""
        modes = len(self.path.eigenvalues)
        for some in steps.split(max(1, _BUDGET // (8 * modes**2 * max(4, len(self.Theta1))))):
            yield self._chunk(some)

    def _chunk(self, steps: Tensor) -> Tensor:
        g, phi, psi, f = self.path.double(steps)
        step = self.path.step
        total = self.Theta1 * g[:, None, :]
        total = total - torch.einsum("xcm,tmc->txc", self.C2, f)
        first, second = torch.einsum("tm,tc->tcm", g, phi), torch.einsum("tm,tc->tcm", phi, g)
        both = first + second + step * torch.einsum("tm,tc->tcm", g, g)
        for tensor, weight in ((self.Pi, both), (self.L1, first), (self.L2, second)):
            total = total - torch.einsum("xcm,tcm->txc", tensor, weight)
        for kind, (weight, (on_a, on_b, on_c)) in enumerate(self._structures):
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


def propagated_descent(path: OrderZeroPath, source: Tensor) -> Tensor:
    """Gradient descent of z1 under Theta and a source: z1(s+1) = z1 - eta Theta_xA z1_A + eta source(s).

    Args:
        path: The order-0 path.
        source: At s = 0 .. T-1, over all points, (T, N_all, columns).

    Returns:
        z1 at s = 0 .. T, (T + 1, N_all, columns).
    """
    train = len(path.K) - len(path.U)
    value = source.new_zeros(source.shape[1:])
    values = [value]
    for driven in source:
        modes = path.U.T @ value[train:]
        value = value + path.rate * (driven - path.coupling @ modes)
        values.append(value)
    return torch.stack(values)


def flow_panels(path: OrderZeroPath, steps: Tensor) -> Tensor:
    """Ends of time panels, (P + 1,), from 0: every wanted time, and no panel longer than all the time before it."""
    ends = {0.0, *(float(t) * path.rate for t in steps)}
    last, shortest = max(ends), 0.5 / float(path.eigenvalues.max())
    grown = shortest
    while grown < last:
        ends.add(grown)
        grown *= 1.5
    return path.K.new_tensor(sorted(ends))


def panel_nodes(panels: Tensor) -> Tensor:
    """Gauss nodes of every panel, (P, nodes)."""
    nodes, _ = gauss_legendre(_NODES, panels)
    return panels[:-1, None] + (1 + nodes) / 2 * panels.diff()[:, None]


def propagated_flow(path: OrderZeroPath, panels: Tensor, source: Tensor) -> Tensor:
    """Gradient flow of z1 under Theta and a source: d z1 / dt = source - Theta_xA z1_A, exact in stiff modes.

    The source is a polynomial on each panel; its products with the exponentials are integrated on nodes that
    accumulate at the panel's end.

    Args:
        path: The order-0 path.
        panels: Ends of panels, (P + 1,).
        source: At ``panel_nodes``, over all points, (P, nodes, N_all, columns).

    Returns:
        z1 at the ends of panels, (P + 1, N_all, columns).
    """
    train, rates = len(path.K) - len(path.U), path.eigenvalues
    nodes, _ = gauss_legendre(_NODES, panels)
    fine, weights, basis = _graded(nodes)
    mode = source.new_zeros(len(rates), source.shape[-1])
    value = source.new_zeros(source.shape[2:])
    values = [value]
    for length, driven in zip(panels.diff(), source, strict=True):
        left = length * (1 - fine) / 2  # from each fine node to the end
        decay = torch.exp(-rates[:, None] * left)
        kernel = (decay * weights * length / 2) @ basis  # (modes, nodes)
        integral = (-torch.expm1(-rates[:, None] * left) / rates[:, None] * weights * length / 2) @ basis
        in_modes = path.U.T @ driven[:, train:]  # (nodes, modes, columns)
        moved = -torch.expm1(-rates * length)[:, None] / rates[:, None] * mode
        moved = moved + torch.einsum("mp,pmc->mc", integral, in_modes)
        whole = (weights * length / 2) @ basis
        value = value + torch.einsum("p,pxc->xc", whole, driven) - path.coupling @ moved
        mode = torch.exp(-rates * length)[:, None] * mode + torch.einsum("mp,pmc->mc", kernel, in_modes)
        values.append(value)
    return torch.stack(values)


def _graded(nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A rule on [-1, 1] with panels halving towards 1, and the Lagrange polynomials of ``nodes`` at its points."""
    base, base_weights = gauss_legendre(_NODES, nodes)
    edges = [-1.0, *(1 - 2.0**-k for k in range(40)), 1.0]
    points, weights = [], []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        points.append(low + (1 + base) / 2 * (high - low))
        weights.append(base_weights * (high - low) / 2)
    fine = torch.cat(points)
    basis = torch.ones(len(fine), len(nodes), dtype=nodes.dtype, device=nodes.device)
    for p in range(len(nodes)):
        for q in range(len(nodes)):
            if p != q:
                basis[:, p] *= (fine - nodes[q]) / (nodes[p] - nodes[q])
    return fine, torch.cat(weights), basis
