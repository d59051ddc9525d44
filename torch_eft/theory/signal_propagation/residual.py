"""Residual MLPs: the four-point vertex of one input, order 1/n, with correlations that the skip connection keeps.

    z^(1) ~ N(0, K^(1)) independent neurons,    z^(l+1) = gamma z^(l) + Delta,    Delta = b + W s(z^(l)),

all widths n, 0 <= gamma < 1. Given z^(l) the Delta_i are independent N(0, G), G = C_b + (C_W/n) sum_j s(z_j)^2, so

    K' = gamma^2 K + C_b + C_W <s^2>,    chi = gamma^2 + C_W d<s^2>/dK    (PDLT app. B for the setting).

In a plain MLP the neurons of a layer depend on one another through G alone. Here z_i itself lives on and, through its
own share of G, is correlated with all later neurons; odd modes then matter, e.g. E[z_i z_j^2] = O(1/n) for ReLU, and
a closure in terms of the quartic vertex alone is wrong for every s that is not odd or even.

Derivation. Let h_a be the orthonormal Hermite polynomials of u = z / sqrt(K), s_a = <s^2 h_a>, and
c_ab = n Cov(h_a(z_i), h_b(z_j)), i != j. With rho = gamma sqrt(K/K') and dG = G - <G>, Mehler's formula and
d/dG = (1/2) d^2/dz^2 give

    E[h_a(z'_i) | z] = rho^a h_a(z_i) + (sqrt(a (a-1)) / (2 K')) rho^(a-2) h_(a-2)(z_i) dG + O(dG^2),

and z'_i, z'_j are independent given z. dG is O(n^-1/2), so that a product of it with h_(a-2)(z_i) h_b(z_j) counts at
order 1/n only where a = 2: with w_a = C_W s_a / (sqrt(2) K') and n E[h_a(z_i) dG] = C_W (s_a + sum_m s_m c_am),

    c'_ab = rho^(a+b) c_ab + delta_b2 rho^a (w_a + sum_m w_m c_am) + delta_a2 rho^b (w_b + sum_m w_m c_bm)
            + delta_a2 delta_b2 (sum_m w_m^2 + sum_mk w_m w_k c_mk).

Starting from 0, only c_a2 = c_2a is ever different from 0. With u_a = c_a2 (a != 2) and c = c_22 the tower is

    u'_a = rho^a [ (rho^2 + w_2) u_a + w_a ],
    c'   = (rho^2 + w_2)^2 c + 2 rho^2 w_2 + sum_a w_a^2 + 2 (rho^2 + w_2) sum_(a != 2) w_a u_a,

V = 2 K^2 c, rho^2 + w_2 = chi K/K'; sum_a w_a^2 is Var(s^2) C_W^2 / (2 K'^2), exactly. gamma = 0 is the plain MLP.
At a critical K* (chi = 1) V/K^2 grows per layer by

    nu = (C_W/K)^2 sum_(b >= 1) s_b^2 (1 + gamma^b) / (1 - gamma^b),

the Green-Kubo sum over layers k = -inf .. inf of Cov(s^2(z_0), s^2(z_k)), whose correlation is gamma^|k|.
"""

import math

import torch
from torch import Tensor

from torch_eft.theory.gaussian.activations import Activation, ActivationLike, get_activation
from torch_eft.theory.gaussian.quadrature import QuadratureError, panel_grid
from torch_eft.theory.signal_propagation.susceptibility import check_residual, mean_power, power_mean

_TAIL = 1e-8
"""Largest relative contribution to nu allowed for the modes left out."""


def vertex_growth(activation: ActivationLike, C_W: float, K: float, residual: float = 0.0) -> float:
    """Compute nu, the growth of V/K^2 per layer at a fixed point with chi_par = 1.

    Raises ``ValueError`` if ``residual`` is out of range.

    Args:
        activation: A name, an ``Activation`` or an elementwise function.
        C_W: Critical rescaled weight variance, of the residual MLP.
        K: The fixed point > 0.
        residual: gamma in [0, 1).

    Returns:
        The Green-Kubo sum; what is left out is bounded by 1e-8 of it.

    Raises:
        QuadratureError: If the sum does not settle.
    """
    activation, gamma = get_activation(activation), check_residual(residual)
    _, variance = variance_of_square(activation, K)
    if gamma == 0:
        return C_W**2 * variance / K**2
    for count in (64, 256, 1024, 2048):
        squares = hermite_modes(activation, K, count)[1:].square()
        decay = gamma ** torch.arange(1, count + 2, dtype=torch.float64, device="cpu")
        memory = 2 * decay / (1 - decay)
        total = variance + float(memory[:-1] @ squares)
        if float(memory[-1]) * max(variance - float(squares.sum()), 0.0) <= _TAIL * total:
            return C_W**2 * total / K**2
    raise QuadratureError(
        f"activation: the sum over Hermite modes of {activation.name} does not settle to {_TAIL:g} at "
        f"residual = {gamma:g}; give a smaller residual or a smoother activation"
    )


def hermite_modes(activation: Activation, K: float, count: int) -> Tensor:
    """The modes s_a = <s^2 h_a>_K, a = 0 .. ``count``, h_a the orthonormal Hermite polynomials of z / sqrt(K).

    For slopes (s_-, s_+), s^2 = K [A_2 u^2 + B u |u|], B = (s_+^2 - s_-^2)/2; integrating by parts,
    <u |u| h_1> = sqrt(8/pi), and s_(a+2) = -s_a (a-2) / sqrt((a+1)(a+2)) for odd a.

    Returns:
        (count + 1,), float64.

    Raises:
        QuadratureError: If the activation is not smooth between its ``kinks``.
    """
    if activation.slopes is not None:
        modes = torch.zeros(max(count, 2) + 1, dtype=torch.float64, device="cpu")
        modes[0] = mean_power(activation.slopes, 2)
        modes[2] = math.sqrt(2) * modes[0]
        order = torch.arange(1, count - 1, 2).to(modes)
        ratios = (2 - order) / ((order + 1) * (order + 2)).sqrt()
        odd = torch.cat([torch.ones_like(modes[:1]), ratios.cumprod(0)])
        odd *= math.sqrt(8 / math.pi) * (activation.slopes[1] ** 2 - activation.slopes[0] ** 2) / 2
        modes[1::2] = odd[: len(modes[1::2])]
        return K * modes[: count + 1]
    deviation = torch.tensor([math.sqrt(K)], dtype=torch.float64, device="cpu")
    before = None
    for pieces in (16, 32, 64):
        u, weight = panel_grid(deviation, activation.kinks, pieces)
        values = activation(deviation * u).square() * weight
        previous, polynomial, rows = torch.zeros_like(u), torch.ones_like(u), []
        for a in range(count + 1):
            rows.append(polynomial @ values)
            previous, polynomial = polynomial, (u * polynomial - math.sqrt(a) * previous) / math.sqrt(a + 1)
        modes = torch.stack(rows)
        if before is not None and bool(((modes - before).abs() <= 1e-12 * values.sum()).all()):
            return modes
        before = modes
    raise QuadratureError(
        f"activation: the Hermite modes of {activation.name} at K = {K:g} do not settle; it must be smooth between "
        "its kinks: declare them, Activation(name, function, kinks=(...))"
    )


def variance_of_square(activation: Activation, K: float) -> tuple[float, float]:
    """<s^2> and Var(s^2) at one K."""
    place = torch.tensor(float(K), dtype=torch.float64, device="cpu")
    mean = float(power_mean(activation, place, 2))
    return mean, float(power_mean(activation, place, 4)) - mean**2
