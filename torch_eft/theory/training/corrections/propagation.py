"""Propagation of corrections under the infinite-width NTK: z1 is driven by sources of order 1/n."""

import torch
from torch import Tensor

from torch_eft.results.progress.work import worked
from torch_eft.theory.gaussian.quadrature import gauss_legendre
from torch_eft.theory.training.infinite_width import InfiniteWidthPath
from torch_eft.theory.training.optimizer import SGDState

_NODES = 10


class TimeGrid:
    """The times at which sources are needed, and their propagation to the times that are wanted.

    z1 is driven in two ways: the optimizer gathers a gradient source S like all gradients, and a direct one D acts at
    once. With u = W (S - Theta_xA z1_A), z1 = D + u, u itself evolves as under a source S - Theta_xA D_A.

    Args:
        path: The path at infinite width.
        steps: Wanted, (T,).
    """

    def __init__(self, path: InfiniteWidthPath, steps: Tensor) -> None:
        self._path = path
        if not path.training.flows:
            self._wanted = torch.round(steps).long()
            self.times = torch.arange(int(self._wanted.max()) + 1, device=path.K.device)
            return
        self._panels = flow_panels(path, steps)
        self._wanted = torch.searchsorted(self._panels, path.propagator.rate * steps.to(self._panels)).clamp_max(
            len(self._panels) - 1
        )
        self.times = torch.cat([panel_nodes(self._panels).flatten(), self._panels]) / path.propagator.rate

    def propagated(self, gradient: Tensor, direct: Tensor) -> Tensor:
        """z1 at the wanted times for sources at ``times``, (T, N_all, C) each."""
        path = self._path
        driven = gradient - path.coupling @ (path.U.T @ direct[:, path.probes :])
        if not path.training.flows:
            return (direct + propagated_descent(path, driven[:-1]))[self._wanted]
        panels = len(self._panels) - 1
        nodes = len(self.times) - panels - 1
        by_panel = driven[:nodes].reshape(panels, -1, *driven.shape[1:])
        return (direct[nodes:] + propagated_flow(path, self._panels, by_panel))[self._wanted]


def propagated_descent(path: InfiniteWidthPath, source: Tensor) -> Tensor:
    """Solve u = W (source - Theta_xA u_A) step by step.

    Args:
        path: The path at infinite width.
        source: At s = 0 .. T-1, over all points, (T, N_all, columns).

    Returns:
        u at s = 0 .. T, (T + 1, N_all, columns).
    """
    coefficients = SGDState(path.training, source.new_zeros(source.shape[1:]))
    values = [coefficients.values[0]]
    for driven in source:
        coefficients.update(path.coupling @ (path.U.T @ values[-1][path.probes :]) - driven)
        values.append(coefficients.values[0])
        worked(2 * driven.numel() * len(path.U))
    return torch.stack(values)


def flow_panels(path: InfiniteWidthPath, steps: Tensor) -> Tensor:
    """Ends of time panels, (P + 1,), from 0: every wanted time, and no panel longer than all the time before it."""
    ends = {0.0, *(float(t) * path.propagator.rate for t in steps)}
    last, shortest = max(ends), 0.5 / float(path.eigenvalues.max())
    grown = shortest
    while grown < last:
        ends.add(grown)
        grown *= 1.5
    return path.K.new_tensor(sorted(ends))


def panel_nodes(panels: Tensor) -> Tensor:
    """Gauss nodes of each panel, (P, nodes)."""
    nodes, _ = gauss_legendre(_NODES, panels)
    return panels[:-1, None] + (1 + nodes) / 2 * panels.diff()[:, None]


def propagated_flow(path: InfiniteWidthPath, panels: Tensor, source: Tensor) -> Tensor:
    """Gradient flow of z1 under Theta and a source, d z1 / dt = source - Theta_xA z1_A, exact in stiff modes.

    The source is a polynomial on each panel; its products with the exponentials are integrated on nodes that
    accumulate at the panel's end.

    Args:
        path: The path at infinite width.
        panels: Ends of panels, (P + 1,).
        source: At ``panel_nodes``, over all points, (P, nodes, N_all, columns).

    Returns:
        z1 at the ends of panels, (P + 1, N_all, columns).
    """
    rates = path.eigenvalues
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
        in_modes = path.U.T @ driven[:, path.probes :]  # (nodes, modes, columns)
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
