"""Propagation of corrections under the frozen NTK: z1 is driven by a source of order 1/n at every step."""

import torch
from torch import Tensor

from torch_eft.theory.expectations import gauss_legendre
from torch_eft.theory.order_zero_path import OrderZeroPath

_NODES = 10


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
