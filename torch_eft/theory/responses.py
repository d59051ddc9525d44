"""How expectations answer to changes of the covariance: the building blocks of the recursions at order 1/n.

With f = sigma^(p)_1 sigma^(q)_2 and a change X_bb' of the covariance (PDLT 4.3 and 8.2, in the form in which K is never
inverted; derived by d<f>/dK_bb' = (1/2) <d_b d_b' f> summed over the two labels that f depends on):

    Rsp_pq[X](12)  = 1/2 M_{p+2,q} X_11 + M_{p+1,q+1} X_12 + 1/2 M_{p,q+2} X_22
    RspO[X](12)    = lambda_W Rsp_00[X](12) + C_W Theta_12 Rsp_11[X](12)
    Qrt_pq[V](12)  = the connected quartic part, sum over label quadruples of V <d^4 f> / 8
    CF[f, g]       = two neurons, functions of (z_h, z_x) and (z_h', z_x'), joined by F
"""

from collections.abc import Callable

from torch import Tensor

from torch_eft.theory.vertices import Vertices


def response(v: Vertices, m: int, p: int, q: int, a: str, b: str, X: Callable[[str, str], Tensor]) -> Tensor:
    """Rsp_pq[X](ab) at layer m."""
    return (
        v.M(m, p + 2, q, a, b) * X(a, a) / 2
        + v.M(m, p + 1, q + 1, a, b) * X(a, b)
        + v.M(m, p, q + 2, a, b) * X(b, b) / 2
    )


def ntk_response(v: Vertices, m: int, a: str, b: str, X: Callable[[str, str], Tensor]) -> Tensor:
    """RspO[X](ab): the response of O_ab = lambda_W s_a s_b + C_W Theta_ab s'_a s'_b."""
    weight, slope = response(v, m, 0, 0, a, b, X), response(v, m, 1, 1, a, b, X)
    return v.lambda_W(m) * weight + v.C_W(m) * v.Theta(m, a, b) * slope


def ntk_source(v: Vertices, m: int, a: str, b: str) -> Tensor:
    """<O_ab> = lambda_W M_00 + C_W Theta M_11."""
    return v.lambda_W(m) * v.M(m, 0, 0, a, b) + v.C_W(m) * v.Theta(m, a, b) * v.M(m, 1, 1, a, b)


def quartic_response(v: Vertices, m: int, p: int, q: int, a: str, b: str) -> Tensor:
    """Qrt_pq[V](ab)."""

    def V(*letters: str) -> Tensor:
        return v.array("V", m, "".join(letters))

    return (
        v.M(m, p + 4, q, a, b) * V(a, a, a, a)
        + 4 * v.M(m, p + 3, q + 1, a, b) * V(a, a, a, b)
        + v.M(m, p + 2, q + 2, a, b) * (2 * V(a, a, b, b) + 4 * V(a, b, a, b))
        + 4 * v.M(m, p + 1, q + 3, a, b) * V(b, b, a, b)
        + v.M(m, p, q + 4, a, b) * V(b, b, b, b)
    ) / 8


def contraction(v: Vertices, m: int, f: int, g: int, h: str, x: str, h2: str, x2: str) -> Tensor:
    """CF[f, g](h, x; h', x'), f and g the derivative on the NTK leg: 1 for s'_h s_x, 2 for s''_h s'_x."""
    f_h, f_x = v.M(m, f + 1, f - 1, h, x), v.M(m, f, f, h, x)
    g_h, g_x = v.M(m, g + 1, g - 1, h2, x2), v.M(m, g, g, h2, x2)

    def F(*letters: str) -> Tensor:
        return v.array("F", m, "".join(letters))

    return (
        f_h * g_h * F(h, h, h2, h2)
        + f_h * g_x * F(h, h, x2, h2)
        + f_x * g_h * F(x, h, h2, h2)
        + f_x * g_x * F(x, h, x2, h2)
    )
