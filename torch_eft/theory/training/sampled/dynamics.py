"""Training of an ensemble under any loss, by sampling z(0): infinite width, and order 1/n as the mean of responses.

At infinite width, e = dLoss/dz is not linear in z, but the NTK is delta_ij Theta and frozen: z(t) is integrated for
each draw of z(0) ~ N(0, K). To order 1/n, the trained quantity F(z, H, dH, ddI, ddII) is averaged over initializations
by (cumulants at the start; labels as printed, repeated indices summed; derived here, as for squared error in
``corrections``)

    < [ 1 + G1_ab d_a d_b / 2 + Theta1 d_H + A d_H d_H / 2 + B .. + D d d d_H / 2 + F .. + (P, Q) d d_dH
          + (R) d_ddI + (S, T, U) d_ddII + V d d d d / 8 ] F >    at  z ~ N(0, K), H = Theta, dH = ddI = ddII = 0.

Integrated by parts with zeta = K^-1 z, this is one second derivative along a random curve and one first derivative:

* V, D and A are the covariance of (DG, X), Gaussian: of the kernel that the last hidden layer gives, and of the part of
  the NTK common to all outputs; B is that of Y_ij. What they contribute is the mean of d^2/ds^2 / 2 of what is trained
  at infinite width, on the curve
      z(s) = z + (s/2) DG zeta - (s^2/8) DG K^-1 DG zeta ~ N(0, K + s DG),    H(s) = Theta + s (X delta_ij + Y_ij).
* The rest is the linear response to the means given z(0),
      dz = G1 zeta / 2,    E H_ij;xb = delta_ij Theta1_xb + F_wxvb (zeta_iw zeta_jv - delta_ij K^-1_wv),
      E dH_ijk;abc = delta_jk P_abcw zeta_iw + delta_ij Q_abcw zeta_kw + delta_ik Q_acbw zeta_jw,    E ddI,    E ddII,
  as in ``hierarchy``, with p, q, r, s at infinite width, r and s summed over the outputs that a vertex pairs.

Both together are one correction c of order 1/n to each draw, whose e_c is the second Taylor coefficient of e along
z + s z' + s^2 c.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vmap

from torch_eft.results.training import Training
from torch_eft.theory.training.optimizer import Loss, SGDState


@dataclass(frozen=True)
class Moments:
    """Means over draws at R steps, on all points (probe before train).

    Args:
        z: (R, N_all, C).
        zz: (R, N_all, C, N_all, C).
        z1: As ``z``, of the correction.
        zz1: As ``zz``.
        H1: (R, N_all, N_all, C, C), of the change of the NTK since the start.
        pp: (R, N, N), sum over outputs of p p.
    """

    z: Tensor
    zz: Tensor
    z1: Tensor
    zz1: Tensor
    H1: Tensor
    pp: Tensor


@dataclass(frozen=True)
class Fluctuation:
    """Directions of the second derivative, one per draw.

    Args:
        DG: (S, N_all, N_all).
        DH: (S, N_all, C, N, C).
        sign: -1 for the part of the covariance that sampling made negative.
    """

    DG: Tensor
    DH: Tensor
    sign: float = 1.0


class SampledTraining:
    """Infinite width and order 1/n of training, draw by draw.

    Args:
        K: (N_all, N_all), probe before train.
        Theta: Likewise.
        loss: The loss on the training points.
        training: The optimizer.
        tensors: Vertices over all points, divided by n: ``G1``, ``Theta1``, ``F``, ``P`` .. ``U``; None at infinite
            width.
        inverse: In place of K^-1, for a caller that gives zeta itself.
    """

    def __init__(
        self,
        K: Tensor,
        Theta: Tensor,
        loss: Loss,
        training: Training,
        tensors: Mapping[str, Tensor] | None = None,
        inverse: Tensor | None = None,
    ) -> None:
        self._train = len(K) - len(loss.targets)
        self._Theta, self._loss, self._training = Theta[:, self._train :], loss, training
        self._inverse, self._means = torch.zeros_like(K), None
        if tensors is not None:
            self._inverse = torch.linalg.inv(K) if inverse is None else inverse
            self._means = _Means(tensors, self._train, self._inverse)

    def moments(
        self,
        z: Tensor,
        weights: Tensor,
        steps: Sequence[int],
        fluctuation: Fluctuation | None = None,
        means: bool = True,
    ) -> Moments:
        """Return weighted sums over draws.

        Args:
            z: (S, N_all, C), z(0).
            weights: (S,).
            steps: R of them, ascending.
            fluctuation: For order 1.
            means: Include the response to the conditional means in the correction.
        """
        zeta = torch.einsum("xy,syi->sxi", self._inverse, z)
        response, sign = self._means if means else None, 1.0 if fluctuation is None else fluctuation.sign
        moments = [
            self._recorded(now, sign, weights, zeta, p, q, response)
            for now, p, q in self._walk(z, zeta, steps, fluctuation, response)
        ]
        return Moments(*(torch.stack(parts) for parts in zip(*moments, strict=True)))

    def response(self, z: Tensor, zeta: Tensor, steps: Sequence[int]) -> Tensor:
        """The response to the means given z(0), for given zeta, draw by draw: c at R steps, (R, S, N_all, C)."""
        return torch.stack([now[2] for now, _, _ in self._walk(z, zeta, steps, None, self._means)])

    def _walk(
        self,
        z: Tensor,
        zeta: Tensor,
        steps: Sequence[int],
        fluctuation: Fluctuation | None,
        response: "_Means | None",
    ) -> Iterator[tuple[list[Tensor], Tensor, Tensor | None]]:
        """At the wanted steps: z(t), with z' and c at order 1; p; and q if there is a response to means."""
        S, points, C = z.shape
        N, sign = points - self._train, 1.0 if fluctuation is None else fluctuation.sign
        new = z.new_zeros
        start = _starts(z, zeta, self._inverse, fluctuation, response)
        small = [new(S, N, C) for _ in range(1 if start is None else 3)]
        large = [] if response is None else [new(S, N, C, N, C), *(new(S, N, N, N, C) for _ in range(5))]
        coefficients = SGDState(self._training, *small, *large)
        for step in range(steps[-1] + 1):
            p, *others = coefficients.values
            q = others[2] if response is not None else None
            now = [z + self._driven(p)]
            if start is not None:
                moved, corrected = others[:2]
                first = start[0] + self._driven(moved)
                second = start[1] + self._driven(corrected)
                if fluctuation is not None:
                    first = first + torch.einsum("sxibj,sbj->sxi", fluctuation.DH, p)
                    second = second + sign * torch.einsum("sxibj,sbj->sxi", fluctuation.DH, moved)
                if response is not None:
                    second = second + response.output(zeta, p, others[2:])
                now += [first, second]
            if step in steps:
                yield now, p, q
            if step < steps[-1]:
                e = self._errors([value[:, self._train :] for value in now], sign, step)
                grown = [] if q is None else _gradients(e[0], p, q)
                coefficients.update(*e, *grown)

    def _driven(self, p: Tensor) -> Tensor:
        return torch.einsum("xb,sbi->sxi", self._Theta, p)

    def _errors(self, z: Sequence[Tensor], sign: float, step: int) -> list[Tensor]:
        """Returns e at z, and its coefficients of s and s^2 along z + s z' + s^2 c, the latter with the sign."""
        batch = self._training.batch(step)
        errors = vmap(lambda rows: self._loss.error(rows, batch))
        if len(z) == 1:
            return [errors(z[0])]
        at, moved, corrected = z

        def slope(point: Tensor) -> tuple[Tensor, Tensor]:
            value, change = jvp(errors, (point,), (moved,))[:2]
            return value, change

        (e, first), (_, curved) = jvp(slope, (at,), (moved,))[:2]
        return [e, first, jvp(errors, (at,), (corrected,))[1] + sign / 2 * curved]

    def _recorded(
        self,
        now: Sequence[Tensor],
        sign: float,
        weights: Tensor,
        zeta: Tensor,
        p: Tensor,
        q: Tensor | None,
        response: "_Means | None",
    ) -> Sequence[Tensor]:
        def mean(first: Tensor, second: Tensor) -> Tensor:
            product = (weights[:, None] * first.flatten(1)).T @ second.flatten(1)
            return product.reshape(*first.shape[1:], *second.shape[1:])

        z = now[0]
        result = [torch.einsum("s,sxi->xi", weights, z), mean(z, z)]
        points, C = z.shape[1:]
        H1 = z.new_zeros(points, points, C, C)
        pp = mean(p, p)
        if len(now) == 1:
            return [*result, torch.zeros_like(result[0]), torch.zeros_like(result[1]), H1, _traced(pp)]
        cross = mean(now[2], z)
        squares = cross + cross.permute(2, 3, 0, 1) + sign * mean(now[1], now[1])
        if response is not None and q is not None:
            H1 = response.ntk(mean(zeta, p), torch.einsum("s,sbidj->bidj", weights, q), pp)
        return [*result, torch.einsum("s,sxi->xi", weights, now[2]), squares, H1, _traced(pp)]


def _starts(
    z: Tensor, zeta: Tensor, inverse: Tensor, fluctuation: Fluctuation | None, response: "_Means | None"
) -> tuple[Tensor, Tensor] | None:
    """Returns z' and c at step 0; None at infinite width."""
    if fluctuation is None and response is None:
        return None
    first, second = torch.zeros_like(z), torch.zeros_like(z)
    if fluctuation is not None:
        moved = torch.einsum("sxy,syi->sxi", fluctuation.DG, zeta)
        again = torch.einsum("sxy,yw,swi->sxi", fluctuation.DG, inverse, moved)
        first, second = moved / 2, -fluctuation.sign / 8 * again
    if response is not None:
        second = second + torch.einsum("xy,syi->sxi", response.G1, zeta) / 2
    return first, second


def _gradients(e: Tensor, p: Tensor, q: Tensor) -> list[Tensor]:
    """Gradients of q_bk,dl, and of r and s with two of three outputs summed: which of b, c, d shares the result's."""
    ep, pp = torch.einsum("sbk,sck->sbc", e, p), torch.einsum("sbk,sck->sbc", p, p)
    return [
        torch.einsum("sbk,sdl->sbkdl", e, p),
        torch.einsum("sbc,sdl->sbcdl", ep, p) / 2,
        torch.einsum("sbl,scd->sbcdl", e, pp) / 2,
        torch.einsum("sbk,sckdl->sbcdl", e, q),
        torch.einsum("sbk,scldk->sbcdl", e, q),
        torch.einsum("sbl,sckdk->sbcdl", e, q),
    ]


def _traced(pp: Tensor) -> Tensor:
    return pp.diagonal(dim1=1, dim2=3).sum(2)


class _Means:
    """The linear response to means given z(0): Y of ``hierarchy`` and the change of the NTK.

    Args:
        tensors: Vertices over all points, over n, in printed order of labels.
        train: Index of the first training point.
        inverse: K^-1.
    """

    def __init__(self, tensors: Mapping[str, Tensor], train: int, inverse: Tensor) -> None:
        self.G1 = tensors["G1"]
        a, t = slice(None), slice(train, None)

        def of(name: str, *labels: slice) -> Tensor:
            return tensors[name][labels]

        F = of("F", a, a, a, t)  # F_wxvb
        self._F = F
        self._H = of("Theta1", a, t) - torch.einsum("wxvb,wv->xb", F, inverse)
        P, Q, R, S, T, U = "PQRSTU"
        # Named by where the output x stands among b, c, d (training) and w (any).
        self._P_bxcw, self._Q_bxcw, self._Q_bcxw = of(P, t, a, t, a), of(Q, t, a, t, a), of(Q, t, t, a, a)
        self._P_xbcw, self._Q_xbcw = of(P, a, t, t, a), of(Q, a, t, t, a)
        self._R_bcdx, self._R_bxcd, self._R_xbcd = of(R, t, t, t, a), of(R, t, a, t, t), of(R, a, t, t, t)
        self._S_bcxd, self._T_bxcd, self._U_bdcx = of(S, t, t, a, t), of(T, t, a, t, t), of(U, t, t, t, a)
        self._S_xcbd, self._T_xbcd, self._U_xdcb = of(S, a, t, t, t), of(T, a, t, t, t), of(U, a, t, t, t)
        # Between two outputs x and y.
        self._pairs = {
            name: of(name[0], *(a if letter in "xyw" else t for letter in name[2:]))
            for name in (
                *("P_xycw", "Q_xycw", "Q_xcyw", "S_xcyd", "T_xycd", "U_xdcy"),
                *("R_xycd", "R_xcdy", "R_xdyc", "S_xycd", "T_xcyd", "U_xdyc"),
            )
        }

    def output(self, zeta: Tensor, p: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
        """Y, (S, N_all, C)."""
        q, r_pairs, r_alone, s_bc, s_bd, s_cd = coefficients
        pp, zp = torch.einsum("sbk,sck->sbc", p, p), torch.einsum("swk,sbk->swb", zeta, p)
        qq = q.diagonal(dim1=2, dim2=4).sum(3)
        terms = (
            # H, F
            ("xb,sbl->sxl", self._H, p),
            ("wxvb,swvbl->sxl", self._F, torch.einsum("swl,svb->swvbl", zeta, zp)),
            # P, Q: gradients e_b p_c, and p_b p_c / 2
            ("bxcw,sbcwl->sxl", self._P_bxcw, torch.einsum("swk,sbkcl->sbcwl", zeta, q)),
            ("bxcw,sbcwl->sxl", self._Q_bxcw, torch.einsum("swm,sblcm->sbcwl", zeta, q)),
            ("bcxw,sbcwl->sxl", self._Q_bcxw, torch.einsum("swl,sbc->sbcwl", zeta, qq)),
            ("xbcw,sbcwl->sxl", self._P_xbcw, torch.einsum("swl,sbc->sbcwl", zeta, pp) / 2),
            ("xbcw,sbcwl->sxl", self._Q_xbcw, torch.einsum("sbl,swc->sbcwl", p, zp)),
            # ddI: e_b p_c p_d / 2, p_b p_c p_d / 6
            ("bcdx,sbcdl->sxl", self._R_bcdx, 2 * r_pairs),
            ("bxcd,sbcdl->sxl", self._R_bxcd, r_alone),
            ("xbcd,sbcdl->sxl", self._R_xbcd, torch.einsum("sbl,scd->sbcdl", p, pp) / 2),
            # ddII: e_b q_cd, p_b q_cd
            ("bcxd,sbcdl->sxl", self._S_bcxd, s_bc),
            ("bdcx,sbcdl->sxl", self._U_bdcx, s_bd),
            ("bxcd,sbcdl->sxl", self._T_bxcd, s_cd),
            ("xcbd,sbcdl->sxl", self._S_xcbd, torch.einsum("sbk,scldk->sbcdl", p, q)),
            ("xbcd,sbcdl->sxl", self._T_xbcd, torch.einsum("sbl,scd->sbcdl", p, qq)),
            ("xdcb,sbcdl->sxl", self._U_xdcb, torch.einsum("sbk,sckdl->sbcdl", p, q)),
        )
        total = torch.zeros_like(zeta)
        for indices, vertex, weight in terms:
            total = total + torch.einsum(indices, vertex, weight)
        return total

    def ntk(self, zp: Tensor, q: Tensor, pp: Tensor) -> Tensor:
        """H(t) - H(0), (N_all, N_all, C, C), from the means of zeta p, q and p p."""
        v, C = self._pairs, zp.shape[1]
        zp_0, q_0, pp_0 = (value.diagonal(dim1=1, dim2=3).sum(2) for value in (zp, q, pp))
        same = torch.einsum("xycw,wc->xy", v["Q_xycw"], zp_0) + torch.einsum("xycd,cd->xy", v["T_xycd"], q_0)
        same = same + torch.einsum("xycd,cd->xy", v["R_xycd"], pp_0) / 2
        half = torch.einsum("xycw,wicj->xyij", v["P_xycw"], zp) + torch.einsum("xcyw,wjci->xyij", v["Q_xcyw"], zp)
        half = half + torch.einsum("xcyd,cidj->xyij", v["S_xcyd"], q) + torch.einsum("xdcy,cjdi->xyij", v["U_xdcy"], q)
        half = half + torch.einsum("xcdy,cidj->xyij", v["R_xcdy"], pp) / 2
        half = half + torch.einsum("xdyc,cjdi->xyij", v["R_xdyc"], pp) / 2
        half = half + torch.einsum("xy,ij->xyij", same, torch.eye(C, dtype=zp.dtype, device=zp.device))
        alone = torch.einsum("xcyd,cidj->xyij", v["T_xcyd"], pp) + torch.einsum("xdyc,cjdi->xyij", v["U_xdyc"], pp)
        equal = torch.einsum("xycd,cd->xy", v["S_xycd"], pp_0)
        alone = alone + torch.einsum("xy,ij->xyij", equal, torch.eye(C, dtype=zp.dtype, device=zp.device))
        return half + half.permute(1, 0, 3, 2) + alone
