"""Gradient flow on the squared error in closed form, to first order in dNTK and ddNTK, at any time and in the limit.

In eigenmodes of the training NTK, with eigenvalues l and errors E_b = z_b - y_b at the start, errors at order 0 are
E_b exp(-l_b t), and all coefficients of ``hierarchy.py`` are iterated integrals of exponentials,

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
which needs no case distinction where rates coincide or vanish). For t to infinity, I(b, c) = 1 / (l_b (l_b + l_c)),
I(b, c, d) = 1 / (l_b (l_b + l_c) (l_b + l_c + l_d)), z1 = 0 on training points, and p1 = -Y / l.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.theory.hierarchy.contractions import PathTensors, ntk_change, whitened_change
from torch_eft.theory.hierarchy.evolution import FirstOrder


@dataclass(frozen=True)
class Eigenmodes:
    """Those modes of the training NTK in which a network moves.

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
    """Modes by how far they carry the parameters, sqrt(l) |E| (1 - exp(-l t)) / l.

    Args:
        H: (B, B), the training NTK.
        error: (B,), z - y at the start.
        time: The last time, in units in which z' = -H (z - y).
        tolerance: Modes that carry less than this share of the largest are left out.
        modes: At most so many.
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
    """Order 0: z(t) = z - H U ((1 - exp(-l t)) / l) U^T E.

    Args:
        z: (M,), outputs at the start.
        H: (M, B).
        train: (B,), training indices among M.
        targets: (B,).
        modes: Of the training NTK.
        times: (T,), as in ``eigenmodes``; may be infinite.

    Returns:
        (T, M).
    """
    E = modes.vectors.T @ (z[train] - targets)
    positive = modes.values > 0
    safe = torch.where(positive, modes.values, 1.0)
    phi = torch.where(positive, -torch.expm1(-safe * times[:, None]) / safe, torch.where(E == 0, 0.0, times[:, None]))
    return z - torch.where(E == 0, 0.0, phi * E) @ (H @ modes.vectors).T


def flow(
    z: Tensor,
    H: Tensor,
    train: Tensor,
    targets: Tensor,
    tensors: PathTensors,
    modes: Eigenmodes,
    step: float,
    steps: int,
) -> FirstOrder:
    """z1 and H1 at times 0, step, .. steps * step.

    Args:
        z: (M,), outputs at the start.
        H: (M, B).
        train: (B,), training indices among M.
        targets: (B,).
        tensors: In the basis of ``modes``.
        modes: Of the training NTK.
        step: Time between two results, as in ``eigenmodes``.
        steps: T.

    Returns:
        ``FirstOrder``, exact at each of the times.
    """
    E, pairs, triples = _couplings(tensors, modes, z[train] - targets)
    chain_1, chain_2, chain_3 = _chains(modes.rates)
    # Own states: exponentials, and on top of each chain the integral I, a chain that ends with rate 0.
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
    last = _propagator([modes.values, zero], step)  # of (z1_m, its integral)
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
    return _first_order(torch.stack(zs), tensors, train, torch.stack(ps), torch.stack(qs))


def flow_limit(
    z: Tensor, H: Tensor, train: Tensor, targets: Tensor, tensors: PathTensors, modes: Eigenmodes
) -> FirstOrder:
    """z1 (1, M) and H1 (1, K, K) at t = infinity; arguments as ``flow``.

    Raises:
        ValueError: If the training NTK is singular: the limit then need not exist.
    """
    smallest, largest = float(modes.values[0]), float(modes.values[-1])
    if smallest <= len(modes.values) * torch.finfo(z.dtype).eps * largest:
        raise ValueError(
            f"H: the smallest eigenvalue on the training points is {smallest:.3g} of {largest:.3g} at most; training "
            "has no limit that the NTK determines. Remove duplicate training points, or give a finite time"
        )
    E, pairs, triples = _couplings(tensors, modes, z[train] - targets)
    rates = modes.rates
    two = rates[:, None] + rates
    I2 = 1 / (rates[:, None] * two)
    I3 = I2[:, :, None] / (two[:, :, None] + rates)
    Y = pairs.flatten(1) @ I2.flatten() + triples.flatten(1) @ I3.flatten()
    z1 = Y - H @ (modes.vectors @ ((modes.vectors.T @ Y[train]) / modes.values))
    return _first_order(z1[None], tensors, train, (-E / rates)[None], (torch.outer(E, E) * I2)[None])


def _first_order(z1: Tensor, tensors: PathTensors, train: Tensor, p: Tensor, q: Tensor) -> FirstOrder:
    return FirstOrder(z1, ntk_change(tensors, p, q), whitened_change(tensors, train, p, q))


def _couplings(tensors: PathTensors, modes: Eigenmodes, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E in the modes, C2 E E (M, r, r) and -C3 E E E (M, r, r, r)."""
    E = modes.dual @ error
    X = tensors.X_second
    orders = X + X.transpose(1, 2) + X.permute(0, 2, 3, 1)
    C3 = tensors.ddI_first + tensors.ddI_second + tensors.X_first + orders
    pairs = (tensors.dH_first + tensors.dH_second) * E[:, None] * E
    return E, pairs, -C3 * E[:, None, None] * E[:, None] * E


def _chains(rates: Tensor) -> Sequence[list[Tensor]]:
    """Rates of I(b), I(b, c) and I(b, c, d), innermost first."""
    first = rates[:, None]
    two = first + rates
    three = first[:, None] + two
    second, outermost = two[:, :, None].expand_as(three), first[:, None].expand_as(three)
    return [rates], [two, first.expand_as(two)], [three, second, outermost]


def _propagator(rates: Sequence[Tensor], step: float) -> Tensor:
    """exp(step A) of y_0' = -x_0 y_0, y_j' = -x_j y_j + y_{j-1}: (..., J, J), for rates x of broadcastable shapes."""
    x = torch.stack(torch.broadcast_tensors(*rates), -1)
    A = torch.diag_embed(-x * step) + torch.diag_embed(torch.full_like(x[..., 1:], step), offset=-1)
    return torch.linalg.matrix_exp(A)


def _feed(couplings: Tensor, chain: Sequence[Tensor], values: Tensor, step: float) -> Tensor:
    """What the exponentials of a chain add in one step to z1_m and to its integral: (B, 2, numbers of the chain)."""
    found = []
    for coupling, value in zip(couplings, values, strict=True):  # one mode at a time, for memory
        rows = _propagator([*chain, value, value.new_zeros(())], step)[..., -2:, :-2]
        weighted = rows.flatten(0, -3) * coupling[:, None, None]
        found.append(weighted.transpose(0, 1).flatten(1))
    return torch.stack(found)
