"""The covariance of the dNTK with itself, of order 1/n^2: what the spread of one network's NTK drift is made of.

In no book, derived here by the layer identities of ``differentials``. Of the 15 ways to pair the six neurons of
E[dH_{i0 i1 i2;012} dH_{i3 i4 i5;345}] five are different functions, each times 1/n_{l-1}^2:

    X3a  d_03 d_14 d_25  three cross pairs, head with head    X3b  d_04 d_13 d_25  each head with a tail of the other
    XQQ  d_01 d_34 d_25    XPQ  d_12 d_34 d_05    XPP  d_12 d_45 d_03              the two kinds of pairs of Q and P

The recursion closes with three more, of U_c(x, 0, 2) = z_{a;x} H_{ac;02} summed over neurons a != c,

    XUU(x02y35) = E[U_c(x,0,2) U_c(y,3,5)]_conn   XUQ(x35;012) = E[U_c(x,3,5) dH_bbc;012]_conn   XUP with dH_cbb.

With one cross pair, one neuron carries z and sums over the other neurons that are jointly Gaussian with z at leading
order (``Composite``): h[f;02] = sum_k f(z_k) H_kc;02, q(012) = sum_k s'_0 s'_1 dH_kkc, p(012) = sum_k s'_1 s'_2 dH_ckk.
What the next layer's weights contract are products of derivatives of sigma with at most one composite; their means are
taken by Stein's identity, E[f g] = sum_n <d_n f> Cov(g, z_n), twice for two composites.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torch_eft.theory.initialization.evaluator import Vertices

Word = tuple[tuple[str, int], ...]
"""A product of derivatives of sigma: (label, order) for each factor."""


@dataclass(frozen=True)
class Composite:
    """A sum over the other neurons of a layer, seen by one neuron.

    Args:
        kind: h, q or p.
        labels: ``"02"`` of h, ``"012"`` of q and p.
        word: f of h.
    """

    kind: Literal["h", "q", "p"]
    labels: str
    word: Word = ()


Term = tuple[Tensor, Word, Composite | None]
"""Weight, derivatives of sigma, composite."""


def X3a(v: Vertices, layer: int, labels: str) -> Tensor:
    """(03)(14)(25): E[dH dH] with head at head and tails at tails."""
    if not v.curved:
        return v.zero()
    a, b, c, d, e, f = labels
    m, r = layer - 1, v.width_ratio(layer - 1)
    M_14, M_25 = v.M(m, 1, 1, b, e), v.M(m, 1, 1, c, f)
    T_01, T_02, T_34, T_35 = v.Theta(m, a, b), v.Theta(m, a, c), v.Theta(m, d, e), v.Theta(m, d, f)
    B_0314, B_0325 = v.array("B", m, a + d + b + e), v.array("B", m, a + d + c + f)
    total = v.moment(m, (2, 1, 1, 2, 1, 1), labels) * T_01 * T_02 * T_34 * T_35
    total = total + r * v.moment(m, (2, 1, 2, 1), a + b + d + e) * T_01 * T_34 * M_25 * B_0325
    total = total + r * v.moment(m, (2, 1, 2, 1), a + c + d + f) * T_02 * T_35 * M_14 * B_0314
    inner = v.M(m, 2, 2, a, d) * B_0314 * B_0325 + v.M(m, 1, 1, a, d) * v.array("X3a", m, labels)
    return v.C_W(m) ** 3 * (total + r**2 * M_14 * M_25 * inner)


def X3b(v: Vertices, layer: int, labels: str) -> Tensor:
    """(04)(13)(25): E[dH dH] with each head at a tail of the other."""
    if not v.curved:
        return v.zero()
    a, b, c, d, e, f = labels
    m, r, M_25 = layer - 1, v.width_ratio(layer - 1), v.M(layer - 1, 1, 1, c, f)
    T_01, T_02, T_34, T_35 = v.Theta(m, a, b), v.Theta(m, a, c), v.Theta(m, d, e), v.Theta(m, d, f)
    total = v.moment(m, (2, 1, 1, 2, 1, 1), labels) * T_01 * T_02 * T_34 * T_35
    slopes = v.moment(m, (2, 1, 2, 1), a + b + d + e) * T_01 * T_34
    total = total + r * slopes * M_25 * v.array("B", m, a + d + c + f)
    inner = v.M(m, 1, 1, a, e) * v.M(m, 1, 1, b, d) * M_25 * v.array("X3b", m, labels)
    return v.C_W(m) ** 3 * (total + r**2 * inner)


def XQQ(v: Vertices, layer: int, labels: str) -> Tensor:
    """(01)(34)(25): E[dH_aac dH_bbc]."""
    m = layer - 1
    return v.C_W(m) * mean_product(v, m, of_Q(v, m, labels[:3]), of_Q(v, m, labels[3:]))


def XPQ(v: Vertices, layer: int, labels: str) -> Tensor:
    """(12)(34)(05): E[dH_caa dH_bbc]."""
    m = layer - 1
    return v.C_W(m) * mean_product(v, m, of_P(v, m, labels[:3]), of_Q(v, m, labels[3:])) if v.curved else v.zero()


def XPP(v: Vertices, layer: int, labels: str) -> Tensor:
    """(12)(45)(03): E[dH_caa dH_cbb]."""
    m = layer - 1
    return v.C_W(m) * mean_product(v, m, of_P(v, m, labels[:3]), of_P(v, m, labels[3:])) if v.curved else v.zero()


def XUU(v: Vertices, layer: int, labels: str) -> Tensor:
    """E[z_a;x H_ac;02 z_b;y H_bc;35], labels in the order x, 0, 2, y, 3, 5."""
    m = layer - 1
    return v.C_W(m) * mean_product(v, m, of_U(v, m, labels[:3]), of_U(v, m, labels[3:]))


def XUQ(v: Vertices, layer: int, labels: str) -> Tensor:
    """E[z_a;x H_ac;35 dH_bbc;012], labels in the order x, 3, 5, 0, 1, 2."""
    m = layer - 1
    return v.C_W(m) * mean_product(v, m, of_U(v, m, labels[:3]), of_Q(v, m, labels[3:]))


def XUP(v: Vertices, layer: int, labels: str) -> Tensor:
    """E[z_a;x H_ac;35 dH_cbb;012], labels in the order x, 3, 5, 0, 1, 2."""
    m = layer - 1
    return v.C_W(m) * mean_product(v, m, of_U(v, m, labels[:3]), of_P(v, m, labels[3:])) if v.curved else v.zero()


# ---- what one neuron of layer m contributes to U, Q and P of layer m + 1


def of_U(v: Vertices, m: int, labels: str) -> list[Term]:
    """Terms of U(x, 0, 2)."""
    x, a, c = labels
    word, weight = ((x, 0), (a, 1)), v.zero() + v.C_W(m)
    return [
        (weight * v.Theta(m, a, c), (*word, (c, 1)), None),
        (weight, ((c, 1),), Composite("h", a + c, word)),
    ]


def of_Q(v: Vertices, m: int, labels: str) -> list[Term]:
    """Terms of dH_aac, labels 0, 1, 2."""
    a, b, c = labels
    C_W, lambda_W = v.zero() + v.C_W(m), v.zero() + v.lambda_W(m)
    T_01, T_02 = v.Theta(m, a, b), v.Theta(m, a, c)
    weight, slope = ((a, 1), (b, 0)), ((a, 2), (b, 1))
    terms: list[Term] = [
        (lambda_W * T_02, (*weight, (c, 1)), None),
        (lambda_W, ((c, 1),), Composite("h", a + c, weight)),
        (C_W, ((c, 1),), Composite("q", labels)),
    ]
    if v.curved:
        terms += [
            (C_W * T_01 * T_02, (*slope, (c, 1)), None),
            (C_W * T_01, ((c, 1),), Composite("h", a + c, slope)),
        ]
    return terms


def of_P(v: Vertices, m: int, labels: str) -> list[Term]:
    """Terms of dH_caa, labels 0, 1, 2, of a curved sigma."""
    a, b, c = labels
    C_W, paired = v.C_W(m), v.width_ratio(m) * v.M(m, 1, 1, b, c) * v.array("B", m, a + a + b + c)
    return [
        (C_W * v.Theta(m, a, b) * v.Theta(m, a, c), ((a, 2), (b, 1), (c, 1)), None),
        (C_W * paired, ((a, 2),), None),
        (v.zero() + C_W, ((a, 1),), Composite("p", labels)),
    ]


# ---- their means


def mean_product(v: Vertices, m: int, first: Sequence[Term], second: Sequence[Term]) -> Tensor:
    """E of the product of two sums of terms, by Stein's identity."""
    return weighted_sum(
        v,
        (
            (weight * other_weight, stein(v, m, (*word, *other_word), [part for part in (one, other) if part]))
            for weight, word, one in first
            for other_weight, other_word, other in second
        ),
    )


def stein(v: Vertices, m: int, word: Word, composites: Sequence[Composite]) -> Tensor:
    """E[f g g'] of at most two composites."""
    if not composites:
        return mean(v, m, word)
    letters = letters_of(word)
    to_z = [{u: with_preactivation(v, m, g, u) for u in letters} for g in composites]
    if len(composites) == 1:
        return weighted_sum(v, ((mean(v, m, word, u), to_z[0][u]) for u in letters))
    inner = {u: weighted_sum(v, ((mean(v, m, word, u, w), to_z[1][w]) for w in letters)) for u in letters}
    together = mean(v, m, word) * covariance(v, m, *composites)
    return together + weighted_sum(v, ((inner[u], to_z[0][u]) for u in letters))


def weighted_sum(v: Vertices, parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of products."""
    total = v.zero()
    for value, weight in parts:
        total = torch.addcmul(total, value, weight)
    return total


def mean(v: Vertices, m: int, word: Word, *derivatives: str) -> Tensor:
    """<d_u .. f>, f a product of derivatives of sigma."""
    if derivatives:
        u, *rest = derivatives
        raised = (
            (*word[:slot], (u, word[slot][1] + 1), *word[slot + 1 :]) for slot in range(len(word)) if word[slot][0] == u
        )
        return sum((mean(v, m, image, *rest) for image in raised), v.zero())
    return v.moment(m, tuple(order for _, order in word), "".join(label for label, _ in word))


def letters_of(word: Word) -> list[str]:
    """The different labels of a product."""
    return list(dict.fromkeys(label for label, _ in word))


def slopes_of(v: Vertices, m: int, g: Composite) -> Tensor:
    """M_11 of the two labels that the neurons summed over in q or p share."""
    return v.M(m, 1, 1, *(g.labels[:2] if g.kind == "q" else g.labels[1:]))


def with_preactivation(v: Vertices, m: int, g: Composite, u: str) -> Tensor:
    """n_m Cov(g, z_u)."""
    if g.kind == "h":
        start, end = g.labels
        parts = ((mean(v, m, g.word, b), v.array("F", m, b + start + u + end)) for b in letters_of(g.word))
        return v.width_ratio(m) * weighted_sum(v, parts)
    return v.width_ratio(m) * slopes_of(v, m, g) * v.array(g.kind.upper(), m, g.labels + u)


def covariance(v: Vertices, m: int, g: Composite, other: Composite) -> Tensor:
    """n_m^2 Cov(g, g'), the product of their means with z left out."""
    if "hpq".index(g.kind) > "hpq".index(other.kind):
        g, other = other, g
    r = v.width_ratio(m)
    if g.kind != "h":
        name = f"X{g.kind}{other.kind}".upper()
        return r**2 * slopes_of(v, m, g) * slopes_of(v, m, other) * v.array(name, m, g.labels + other.labels)
    if other.kind != "h":
        name = f"XU{other.kind}".upper()
        parts = ((mean(v, m, g.word, b), v.array(name, m, b + g.labels + other.labels)) for b in letters_of(g.word))
        return r**2 * slopes_of(v, m, other) * weighted_sum(v, parts)
    (a, c), (d, f) = g.labels, other.labels
    parts = (
        (mean(v, m, g.word, b) * mean(v, m, other.word, e), v.array("XUU", m, b + g.labels + e + other.labels))
        for b in letters_of(g.word)
        for e in letters_of(other.word)
    )
    same = mean(v, m, (*g.word, *other.word)) * v.array("B", m, a + d + c + f)
    return r * same + r**2 * weighted_sum(v, parts)
