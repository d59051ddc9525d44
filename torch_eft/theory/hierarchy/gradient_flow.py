"""Gradient flow on the squared error in closed form, to first order in dNTK and ddNTK, at any time.

In eigenmodes of the training NTK, with eigenvalues l and errors E_b = z_b - y_b at the start, errors at order 0 are
E_b exp(-l_b t), and all coefficients of ``evolution`` are iterated integrals of exponentials,

    I(b)     = int_0^t exp(-l_b s) ds,    I(b, c) = int_0^t exp(-l_b s) I(c; s) ds,    I(b, c, d) likewise:
    p_b = -E_b I(b),  q_bc = E_b E_c I(b, c),  s_bcd = -E_b E_c E_d I(b, c, d),
    r_bcd = -E_b E_c E_d (I(b, c, d) + I(b, d, c)) / 2,

as I(b) I(c) = I(b, c) + I(c, b), and I(b) I(c, d) is the sum over the three ways to put b among c, d. Collected by
symmetry, all of Y is two contractions,

    Y_a = C2_abc E_b E_c I(b, c) - C3_abcd E_b E_c E_d I(b, c, d),
    C2_abc = dH_bac + dH_abc,    C3_abcd = ddI_bcda + ddI_abcd + X_bacd + X_abcd + X_acbd + X_adbc.

The correction z1' = -l z1 + Y' on training modes replaces the outermost integral of I by one with exp(-l_m (t - s)),
and p1 = -int z1 adds one more. Each of these is an entry of the exponential of a matrix with the rates
(l_b + l_c + l_d, l_b + l_c, l_b, l_m, 0) on its diagonal and ones below it (a divided difference of the exponential,
which needs no case distinction where rates coincide or vanish).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.theory.hierarchy.contractions import PathTensors, ntk_change, whitened_change
from torch_eft.theory.hierarchy.evolution import FirstOrder


@dataclass(frozen=True)
class Eigenmodes:
    """The modes of the training NTK in which a network moves.

    Args:
        values: (B,), all eigenvalues, ascending, clamped at 0.
        vectors: (B, B), in columns.
        rates: (r,), the eigenvalues of the r modes.
        basis: (r, B), u / sqrt(l).
        dual: (r, B), u sqrt(l).
        left_out: Share of the path in parameter space that lies in other modes, at the last time.
    """

    values: Tensor
    vectors: Tensor
    rates: Tensor
    basis: Tensor
    dual: Tensor
    left_out: float


def eigenmodes(H: Tensor, error: Tensor, time: float, tolerance: float = 0.0, modes: int | None = None) -> Eigenmodes:
    """Select modes by how far they carry the parameters, sqrt(l) |E| (1 - exp(-l t)) / l.

    Args:
        H: (B, B), the training NTK.
        error: (B,), z - y at the start.
        time: The last time, in units in which z' = -H (z - y).
        tolerance: Modes that carry less than this share of the largest are left out.
        modes: Largest number of modes.

    Returns:
        All eigenvalues and vectors, and the basis of the selected modes.
    """
    values, vectors = torch.linalg.eigh(H)
    values = values.clamp_min(0.0)
    root = values.sqrt()
    # sqrt(l) (1 - exp(-l t)) / l, which vanishes for l = 0
    carried = (vectors.T @ error).abs() * torch.where(root > 0, -torch.expm1(-values * time) / root, 0.0)
    order = carried.argsort(descending=True)
    kept = order[carried[order] > tolerance * carried.max()][:modes]
    basis, scale = vectors.T[kept], root[kept][:, None]
    total = carried.norm()
    rest = (total.square() - carried[kept].square().sum()).clamp_min(0.0).sqrt()
    left_out = float(rest / total) if float(total) > 0 else 0.0
    return Eigenmodes(values, vectors, values[kept], basis / scale, basis * scale, left_out)


def frozen_flow(z: Tensor, H: Tensor, train: Tensor, targets: Tensor, modes: Eigenmodes, times: Tensor) -> Tensor:
    """Compute order 0, z(t) = z - H U ((1 - exp(-l t)) / l) U^T E.

    Args:
        z: (M,), outputs at the start.
        H: (M, B).
        train: (B,), training indices among M.
        targets: (B,).
        modes: Of the training NTK.
        times: (T,), in the units of ``eigenmodes``; they may be infinite.

    Returns:
        The outputs, (T, M).
    """
    E = modes.vectors.T @ (z[train] - targets)
    positive = modes.values > 0
    safe = torch.where(positive, modes.values, 1.0)
    phi = torch.where(positive, -torch.expm1(-safe * times[:, None]) / safe, torch.where(E == 0, 0.0, times[:, None]))
    return z - torch.where(E == 0, 0.0, phi * E) @ (H @ modes.vectors).T


def first_order_flow(
    z: Tensor,
    H: Tensor,
    train: Tensor,
    targets: Tensor,
    tensors: PathTensors,
    modes: Eigenmodes,
    step: float,
    steps: int,
) -> FirstOrder:
    """Compute z1 and H1 at times 0, step, .. steps * step.

    Args:
        z: (M,), outputs at the start.
        H: (M, B).
        train: (B,), training indices among M.
        targets: (B,).
        tensors: In the basis of ``modes``.
        modes: Of the training NTK.
        step: Time between two results, in the units of ``eigenmodes``.
        steps: T.

    Returns:
        The first order, exact at each of the times.
    """
    E, pairs, triples = _couplings(tensors, modes, z[train] - targets)
    chain_1, chain_2, chain_3 = _chains(modes.rates)
    # A chain that ends with rate 0 accumulates the integral I of the exponentials below it.
    zero = E.new_zeros(())
    own = [_propagator([*chain, zero], step) for chain in (chain_1, chain_2, chain_3)]
    states = [E.new_zeros(*propagator.shape[:-1]) for propagator in own]
    for state in states:
        state[..., 0] = 1.0
    to_modes = modes.vectors.T
    feeds = [
        _feed(to_modes @ value[train].flatten(1), chain, modes.values, step)
        for value, chain in ((pairs, chain_2), (triples, chain_3))
    ]
    last = _propagator([modes.values, zero], step)  # propagates (z1_m, integral of z1_m)
    back = H @ modes.vectors
    driven = torch.zeros(len(modes.values), 2, dtype=E.dtype, device=E.device)
    zs, ps, qs = [], [], []
    for t in range(steps + 1):
        I1, I2, I3 = (state[..., -1] for state in states)
        Y = pairs.flatten(1) @ I2.flatten() + triples.flatten(1) @ I3.flatten()
        z1 = Y - back @ driven[:, 1]
        z1[train] = modes.vectors @ driven[:, 0]
        zs.append(z1)
        ps.append(-E * I1)
        qs.append(torch.outer(E, E) * I2)
        if t < steps:
            sources = [state[..., :-1].flatten() for state in states[1:]]
            added = sum(feed @ source for feed, source in zip(feeds, sources, strict=True))
            driven = torch.einsum("mij,mj->mi", last, driven) + added
            states = [torch.einsum("...ij,...j->...i", p, s) for p, s in zip(own, states, strict=True)]
    p, q = torch.stack(ps), torch.stack(qs)
    return FirstOrder(torch.stack(zs), ntk_change(tensors, p, q), whitened_change(tensors, train, p, q))


def _couplings(tensors: PathTensors, modes: Eigenmodes, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return E in the modes, C2 E E (M, r, r) and -C3 E E E (M, r, r, r)."""
    E = modes.dual @ error
    X = tensors.X_second
    orders = X + X.transpose(1, 2) + X.permute(0, 2, 3, 1)
    C3 = tensors.ddI_first + tensors.ddI_second + tensors.X_first + orders
    pairs = (tensors.dH_first + tensors.dH_second) * E[:, None] * E
    return E, pairs, -C3 * E[:, None, None] * E[:, None] * E


def _chains(rates: Tensor) -> Sequence[list[Tensor]]:
    """Return the rates of I(b), I(b, c) and I(b, c, d), innermost first."""
    first = rates[:, None]
    two = first + rates
    three = first[:, None] + two
    second, outermost = two[:, :, None].expand_as(three), first[:, None].expand_as(three)
    return [rates], [two, first.expand_as(two)], [three, second, outermost]


def _propagator(rates: Sequence[Tensor], step: float) -> Tensor:
    """Return exp(step A) of y_0' = -x_0 y_0, y_j' = -x_j y_j + y_{j-1}, (..., J, J); the rates x broadcast."""
    x = torch.stack(torch.broadcast_tensors(*rates), -1)
    A = torch.diag_embed(-x * step) + torch.diag_embed(torch.full_like(x[..., 1:], step), offset=-1)
    return torch.linalg.matrix_exp(A)


def _feed(couplings: Tensor, chain: Sequence[Tensor], values: Tensor, step: float) -> Tensor:
    """Return how a chain's exponentials drive z1_m and its integral over one step, (B, 2, size of the chain)."""
    driving = []
    for coupling, value in zip(couplings, values, strict=True):  # mode by mode, to bound memory
        rows = _propagator([*chain, value, value.new_zeros(())], step)[..., -2:, :-2]
        weighted = rows.flatten(0, -3) * coupling[:, None, None]
        driving.append(weighted.transpose(0, 1).flatten(1))
    return torch.stack(driving)
