"""H, dH, ddI, ddII of real networks, layer by layer: the exact identities at finite width, for batches of networks.

Axes: network S, then neurons, then samples. ``step`` carries all of them through one layer, with nothing averaged and
nothing dropped; ``last_layer_means`` averages over the output layer's weights in closed form, so that Monte
Carlo over networks has only the hidden layers' noise left.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Layer:
    """Preactivations (S, n, N) and their differentials (S, n.., N..), lambda included."""

    z: Tensor
    H: Tensor
    dH: Tensor
    ddI: Tensor
    ddII: Tensor


@dataclass
class Patterns:
    """The part of the last hidden layer that the output layer's statistics need: coinciding neurons k, m only."""

    z: Tensor
    H: Tensor
    dH_kmm: Tensor
    dH_kkm: Tensor
    dH_mkm: Tensor
    ddI_kkmm: Tensor
    ddII_kkmm: Tensor
    ddII_kmkm: Tensor
    ddII_kmmk: Tensor


def patterns_of(layer):
    """The patterns of a layer known in full."""
    e = torch.einsum
    return Patterns(
        layer.z,
        layer.H,
        e("skmmabc->skmabc", layer.dH),
        e("skkmabc->skmabc", layer.dH),
        e("smkmabc->smkabc", layer.dH),
        e("skkmmabcd->skmabcd", layer.ddI),
        e("skkmmabcd->skmabcd", layer.ddII),
        e("skmkmabcd->skmabcd", layer.ddII),
        e("skmmkabcd->skmabcd", layer.ddII),
    )


def second_layer_patterns(x, sigma, widths, C_b, C_W, lambda_b, lambda_W, count, generator):
    """The patterns of layer 2, whose layer 1 has a constant NTK: closed forms, n^2 numbers instead of n^4."""
    samples, n_0 = x.shape
    n, width = widths

    def normal(*shape):
        return torch.randn(*shape, dtype=x.dtype, generator=generator)

    z_1 = normal(count, n, n_0) @ x.T * math.sqrt(C_W[0] / n_0) + normal(count, n, 1) * math.sqrt(C_b[0])
    T = lambda_b[0] + lambda_W[0] * x @ x.T / n_0
    W = normal(count, width, n) * math.sqrt(C_W[1] / n)
    s, s1, s2, s3 = derivatives(sigma, z_1)
    share = lambda_W[1] / n
    eye = torch.eye(width, dtype=x.dtype)
    e = torch.einsum

    def pair(left, right, kernel, labels):
        """sum_j left_kj right_mj kernel_j;labels -> (S, k, m, labels)."""
        flat = kernel.flatten(2)
        product = e("skj,smj,sjx->skmx", left, right, flat)
        return product.reshape(*product.shape[:3], *[samples] * labels)

    def diagonal(weight, kernel, labels):
        """delta_km sum_j weight_kj kernel_j."""
        flat = e("skj,sjx->skx", weight, kernel.flatten(2))
        return e("km,skx->skmx", eye, flat).reshape(count, width, width, *[samples] * labels)

    W2, one = W * W, torch.ones_like(W)
    H = pair(W, W, e("sja,sjb,ab->sjab", s1, s1, T), 2)
    H = H + e("km,sab->skmab", eye, lambda_b[1] + share * e("sja,sjb->sab", s, s))
    curve = e("sja,sjb,sjc,ab,ac->sjabc", s2, s1, s1, T, T)
    tie_1 = share * e("sjb,sja,sjc,ac->sjabc", s, s1, s1, T)  # legs 0 and 1 tied, leg 2 free
    tie_2 = share * e("sjc,sja,sjb,ab->sjabc", s, s1, s1, T)
    dH_kmm = pair(W, W2, curve, 3) + diagonal(W, tie_1 + tie_2, 3)
    dH_kkm = pair(W2, W, curve, 3) + pair(one, W, tie_1, 3) + diagonal(W, tie_2, 3)
    dH_mkm = pair(W2, W, curve, 3) + pair(one, W, tie_2, 3) + diagonal(W, tie_1, 3)
    ddI = pair(W2, W2, e("sja,sjb,sjc,sjd,ab,ac,ad->sjabcd", s3, s1, s1, s1, T, T, T), 4)
    ddI = ddI + pair(one, W2, share * e("sjb,sja,sjc,sjd,ac,ad->sjabcd", s, s2, s1, s1, T, T), 4)
    crossed = e("sjc,sja,sjb,sjd,ab,ad->sjabcd", s, s2, s1, s1, T, T)
    crossed = crossed + e("sjd,sja,sjb,sjc,ab,ac->sjabcd", s, s2, s1, s1, T, T)
    ddI = ddI + diagonal(W2, share * crossed, 4)
    core = e("sja,sjb,sjc,sjd,ab,ac,bd->sjabcd", s2, s2, s1, s1, T, T, T)
    t12 = share * e("sja,sjb,sjc,sjd,ac,bd->sjabcd", s1, s1, s1, s1, T, T)
    t13 = share * e("sjc,sja,sjd,sjb,ab,bd->sjabcd", s, s1, s1, s2, T, T)
    t24 = share * e("sjd,sjb,sjc,sja,ab,ac->sjabcd", s, s1, s1, s2, T, T)
    both = share**2 * e("sjc,sja,sjd,sjb,ab->sabcd", s, s1, s, s1, T)
    everywhere = both[:, None, None].expand(count, width, width, *both.shape[1:])
    on_diagonal = e("km,sabcd->skmabcd", eye, both)
    ddII_kkmm = pair(W2, W2, core, 4) + pair(one, W2, t12, 4) + diagonal(W2, t13 + t24, 4) + on_diagonal
    ddII_kmkm = (
        pair(W2, W2, core, 4) + diagonal(W2, t12, 4) + pair(one, W2, t13, 4) + pair(W2, one, t24, 4) + everywhere
    )
    ddII_kmmk = pair(W2, W2, core, 4) + diagonal(W2, t12 + t13 + t24, 4) + on_diagonal
    z_2 = W @ s + normal(count, width, 1) * math.sqrt(C_b[1])
    return Patterns(z_2, H, dH_kmm, dH_kkm, dH_mkm, ddI, ddII_kkmm, ddII_kmkm, ddII_kmmk)


def first_layer(x, width, C_b, C_W, lambda_b, lambda_W, count, generator):
    """z^(1) and its NTK, which is constant; higher differentials vanish."""
    samples, n_0 = x.shape
    W = torch.randn(count, width, n_0, dtype=x.dtype, generator=generator) * math.sqrt(C_W / n_0)
    b = torch.randn(count, width, 1, dtype=x.dtype, generator=generator) * math.sqrt(C_b)
    eye = torch.eye(width, dtype=x.dtype)
    H = torch.einsum("ij,ab->ijab", eye, lambda_b + lambda_W * x @ x.T / n_0).expand(count, -1, -1, -1, -1)
    shape = [count] + [width] * 3 + [samples] * 3
    quartic = [count] + [width] * 4 + [samples] * 4
    return Layer(W @ x.T + b, H, x.new_zeros(shape), x.new_zeros(quartic), x.new_zeros(quartic)), (W, b)


def derivatives(sigma, z):
    """sigma, sigma', sigma'', sigma''' at z."""
    return [sigma(z, order) for order in range(4)]


def step(layer, sigma, width, C_b, C_W, lambda_b, lambda_W, generator):
    """The next layer of the same networks, and its weights."""
    count, n, _ = layer.z.shape
    W = torch.randn(count, width, n, dtype=layer.z.dtype, generator=generator) * math.sqrt(C_W / n)
    b = torch.randn(count, width, 1, dtype=layer.z.dtype, generator=generator) * math.sqrt(C_b)
    return push(layer, sigma, W, b, lambda_b, lambda_W), (W, b)


def push(layer, sigma, W, b, lambda_b, lambda_W):
    """The exact layer identities (PDLT 8.1, 11.2; conventions of the recursions)."""
    s, s1, s2, s3 = derivatives(sigma, layer.z)
    H, dH, ddI, ddII = layer.H, layer.dH, layer.ddI, layer.ddII
    share = lambda_W / layer.z.shape[1]
    e = torch.einsum
    eye = torch.eye(W.shape[1], dtype=W.dtype)
    V = e("sik,ska->sika", W, s1)  # W_ik s'_k;a
    z = e("sik,ska->sia", W, s) + b
    H_new = e("ij,sab->sijab", eye, lambda_b + share * e("ska,skb->sab", s, s)) + e("sika,sjlb,sklab->sijab", V, V, H)
    # One leg pushed through: Y_kj;ab = H_kl;ab W_jl s'_l;b
    Y = e("sklab,sjlb->skjab", H, V)
    # dH: legs 1, 2 pushed through
    dY = e("sklmabc,sjlb,simc->skjiabc", dH, V, V)
    dH_new = e("sik,ska,skjab,sklac->sijlabc", W, s2, Y, Y) + e("sika,skjlabc->sijlabc", V, dY)
    tie = share * e("skb,ska,sklac->slabc", s, s1, Y)
    dH_new = dH_new + e("ij,slabc->sijlabc", eye, tie) + e("il,sjacb->sijlabc", eye, tie)
    # ddI
    ddY = e("sklmnabcd,sjlb,simc,sond->skjioabcd", ddI, V, V, V)
    inner = e("ska,skjab,skiac,skoad->skjioabcd", s3, Y, Y, Y)
    inner = inner + e("ska,skjab,skioacd->skjioabcd", s2, Y, dY)
    inner = inner + e("ska,skiac,skjoabd->skjioabcd", s2, Y, dY)
    inner = inner + e("ska,skoad,skjiabc->skjioabcd", s2, Y, dY)
    ddI_new = e("spk,skjioabcd->spjioabcd", W, inner) + e("spka,skjioabcd->spjioabcd", V, ddY)
    tie = share * (e("skb,ska,skiac,skoad->sioabcd", s, s2, Y, Y) + e("skb,ska,skioacd->sioabcd", s, s1, dY))
    ddI_new = ddI_new + e("pj,sioabcd->spjioabcd", eye, tie)
    ddI_new = ddI_new + e("pi,sjoacbd->spjioabcd", eye, tie)
    ddI_new = ddI_new + e("po,sjiadbc->spjioabcd", eye, tie)
    # ddII_{1234}: mu shared by 1, 2; nu by 1, 3; rho by 2, 4. Legs 3, 4 pushed through.
    dZ = e("sklmabc,simc->skliabc".replace(" ", ""), dH, V)  # dH_{k l i; a b c}, last leg pushed through
    ddZ = e("sklmnabcd,simc,sjnd->sklijabcd", ddII, V, V)
    core = e("ska,slb,sklab,skiac,sljbd->sklijabcd", s2, s2, H, Y, Y)
    core = core + e("ska,slb,skiac,slkjbad->sklijabcd", s2, s1, Y, dZ)
    core = core + e("ska,slb,sljbd,skliabc->sklijabcd", s1, s2, Y, dZ)
    core = core + e("ska,slb,sklijabcd->sklijabcd", s1, s1, ddZ)
    ddII_new = e("spk,sql,sklijabcd->spqijabcd", W, W, core)
    same = share * e("ska,skb,skiac,skjbd->sijabcd", s1, s1, Y, Y)
    ddII_new = ddII_new + e("pq,sijabcd->spqijabcd", eye, same)
    left = share * (
        e("skc,ska,slb,sql,sklab,sljbd->sqjabcd", s, s1, s2, W, H, Y)
        + e("skc,ska,slb,sql,slkjbad->sqjabcd", s, s1, s1, W, dZ)
    )
    ddII_new = ddII_new + e("pi,sqjabcd->spqijabcd", eye, left)
    right = share * (
        e("skd,skb,sla,spl,slkab,sliac->spiabcd", s, s1, s2, W, H, Y)
        + e("skd,skb,sla,spl,slkiabc->spiabcd", s, s1, s1, W, dZ)
    )
    ddII_new = ddII_new + e("qj,spiabcd->spqijabcd", eye, right)
    both = share**2 * e("skc,ska,sld,slb,sklab->sabcd", s, s1, s, s1, H)
    ddII_new = ddII_new + e("pi,qj,sabcd->spqijabcd", eye, eye, both)
    return Layer(z, H_new, dH_new, ddI_new, ddII_new)


def kernels_only(x, sigma, widths, C_b, C_W, lambda_b, lambda_W, count, generator):
    """z and H of the last hidden layer of networks of any depth, without the higher differentials."""
    e = torch.einsum

    def normal(*shape):
        return torch.randn(*shape, dtype=x.dtype, generator=generator)

    n_0 = x.shape[1]
    z = normal(count, widths[0], n_0) @ x.T * math.sqrt(C_W[0] / n_0) + normal(count, widths[0], 1) * math.sqrt(C_b[0])
    T = lambda_b[0] + lambda_W[0] * x @ x.T / n_0
    H = e("km,ab->abkm", torch.eye(widths[0], dtype=x.dtype), T).expand(count, -1, -1, -1, -1)
    for index, width in enumerate(widths[1:], 1):
        n = widths[index - 1]
        s, s1 = sigma(z), sigma(z, 1)
        W = normal(count, width, n) * math.sqrt(C_W[index] / n)
        V = e("skj,sja->sakj", W, s1)
        share = lambda_b[index] + lambda_W[index] / n * e("sja,sjb->sab", s, s)
        H = V[:, :, None] @ H @ V[:, None].mT + torch.eye(width, dtype=x.dtype) * share[..., None, None]
        z = W @ s + normal(count, width, 1) * math.sqrt(C_b[index])
    return z, H.permute(0, 3, 4, 1, 2)


def ntk_sector_means(z, H, sigma, C_b, C_W, lambda_b, lambda_W):
    """As ``last_layer_means``, for G, h, B and F only."""
    s, s1 = sigma(z), sigma(z, 1)
    n, e = z.shape[1], torch.einsum
    G = C_b + C_W / n * e("ska,skb->sab", s, s)
    h = lambda_b + lambda_W / n * e("ska,skb->sab", s, s) + C_W / n * e("ska,skb,skkab->sab", s1, s1, H)
    X, Y = e("ska,smb,skmab->sabkm", s1, s1, H), e("ska,smb->sabkm", s, s)
    c = (C_W / n) ** 2
    return G, h, {"B": c * e("sabkm,scdkm->sacbd", X, X), "F": c * e("sabkm,scdkm->sacbd", Y, X)}


def last_layer_means(hidden, sigma, C_b, C_W, lambda_b, lambda_W, pairs=None, dropped=1.0):
    """Per network, averaged over the output layer: what estimates each statistic of that layer.

    Returns G (S, N, N) and h (S, N, N), the conditional means of z z and of the diagonal H, and a dictionary of the
    statistics times 1/n that are means (B, F, P, Q, R, S, T, U), in printed axis order.

    Args:
        hidden: ``Patterns`` of the last hidden layer.
        sigma: The activation.
        C_b: Of the output layer, as C_W, lambda_b, lambda_W.
        pairs: (n, n), symmetric: weight of every pair of neurons in B .. U; None means 1.
        dropped: Factor of the patterns whose k != m part the recursions drop as O(1 / n^2).
    """
    s, s1, s2, s3 = derivatives(sigma, hidden.z)
    n = hidden.z.shape[1]
    e = torch.einsum
    H, d_kmm, d_kkm, d_mkm = hidden.H, hidden.dH_kmm, hidden.dH_kkm, hidden.dH_mkm
    ddI, ddII_kkmm, ddII_kmkm, ddII_kmmk = hidden.ddI_kkmm, hidden.ddII_kkmm, hidden.ddII_kmkm, hidden.ddII_kmmk
    Hd = e("skkab->skab", H)
    G = C_b + C_W / n * e("ska,skb->sab", s, s)
    h = lambda_b + lambda_W / n * e("ska,skb->sab", s, s) + C_W / n * e("ska,skb,skab->sab", s1, s1, Hd)
    if pairs is not None:  # every pattern below is linear in one of these (or quadratic in H): 0/1 weights select pairs
        H, d_kmm, d_kkm, d_mkm, ddI, ddII_kkmm, ddII_kmkm, ddII_kmmk = (
            e("km,skm...->skm...", pairs, part)
            for part in (H, d_kmm, d_kkm, d_mkm, ddI, ddII_kkmm, ddII_kmkm, ddII_kmmk)
        )
    c, t, w = (C_W / n) ** 2, C_W * lambda_W / n**2, (lambda_W / n) ** 2
    means = {}
    # printed 1324 -> axes a c b d for labels 1=a, 2=b, 3=c, 4=d
    means["B"] = c * e("ska,smb,skmab,skc,smd,skmcd->sacbd", s1, s1, H, s1, s1, H)
    means["F"] = c * e("ska,smb,skc,smd,skmcd->sacbd", s, s, s1, s1, H)
    # labels 0=a, 1=b, 2=c, 3=d
    means["P"] = c * (
        e("skd,smb,smc,ska,skmab,skmac->sabcd", s, s1, s1, s2, H, H)
        + e("skd,smb,smc,ska,skmabc->sabcd", s, s1, s1, s1, d_kmm)
    )
    means["Q"] = c * (
        e("skb,smc,smd,ska,skab,skmac->sabcd", s1, s1, s, s2, Hd, H)
        + e("skb,smc,smd,ska,skmabc->sabcd", s1, s1, s, s1, d_kkm)
    ) + t * e("skb,ska,smc,skmac,smd->sabcd", s, s1, s1, H, s)
    means["R"] = c * (
        e("skb,smc,smd,ska,skab,skmac,skmad->sabcd", s1, s1, s1, s3, Hd, H, H)
        + e("skb,smc,smd,ska,skab,skmacd->sabcd", s1, s1, s1, s2, Hd, d_kmm)
        + dropped * e("skb,smc,smd,ska,skmac,skmabd->sabcd", s1, s1, s1, s2, H, d_kkm)
        + dropped * e("skb,smc,smd,ska,skmad,skmabc->sabcd", s1, s1, s1, s2, H, d_kkm)
        + e("skb,smc,smd,ska,skmabcd->sabcd", s1, s1, s1, s1, ddI)
    ) + t * (
        e("skb,smc,smd,ska,skmac,skmad->sabcd", s, s1, s1, s2, H, H)
        + e("skb,smc,smd,ska,skmacd->sabcd", s, s1, s1, s1, d_kmm)
    )
    # labels 1=a, 2=b, 3=c, 4=d
    means["S"] = c * (
        e("smc,smd,ska,skb,skab,skmac,skmbd->sabcd", s1, s1, s2, s2, Hd, H, H)
        + dropped * e("smc,smd,ska,skb,skmac,skmbad->sabcd", s1, s1, s2, s1, H, d_kkm)
        + dropped * e("smc,smd,ska,skb,skmbd,skmabc->sabcd", s1, s1, s1, s2, H, d_kkm)
        + e("smc,smd,ska,skb,skmabcd->sabcd", s1, s1, s1, s1, ddII_kkmm)
    ) + t * e("ska,skb,skmac,skmbd,smc,smd->sabcd", s1, s1, H, H, s1, s1)
    means["T"] = (
        c
        * (
            e("skc,smd,ska,smb,skmab,skac,smbd->sacbd", s1, s1, s2, s2, H, Hd, Hd)
            + e("skc,smd,ska,smb,skac,smkbad->sacbd", s1, s1, s2, s1, Hd, d_mkm)
            + e("skc,smd,ska,smb,smbd,skmabc->sacbd", s1, s1, s1, s2, Hd, d_mkm)
            + e("skc,smd,ska,smb,skmabcd->sacbd", s1, s1, s1, s1, ddII_kmkm)
        )
        + t
        * (
            e("skc,ska,smd,smb,skmab,smbd->sacbd", s, s1, s1, s2, H, Hd)
            + e("skc,ska,smd,smb,smkbad->sacbd", s, s1, s1, s1, d_mkm)
            + e("skd,skb,sjc,sja,sjkab,sjac->sacbd", s, s1, s1, s2, H, Hd)
            + e("skd,skb,sjc,sja,sjkabc->sacbd", s, s1, s1, s1, d_mkm)
        )
        + w * e("skc,ska,smd,smb,skmab->sacbd", s, s1, s, s1, H)
    )
    # printed 1423: axes a d b c
    means["U"] = c * (
        dropped * e("smc,skd,ska,smb,skmab,skmac,smkbd->sadbc", s1, s1, s2, s2, H, H, H)
        + dropped * e("smc,skd,ska,smb,skmac,smkbad->sadbc", s1, s1, s2, s1, H, d_kmm)
        + dropped * e("smc,skd,ska,smb,smkbd,skmabc->sadbc", s1, s1, s1, s2, H, d_kmm)
        + e("smc,skd,ska,smb,skmabcd->sadbc", s1, s1, s1, s1, ddII_kmmk)
    )
    return G, h, means
