"""Pairs of neurons at high statistical power: the propagated terms of every recursion, measured alone.

A recursion has a joint part (one neuron of layer l) and a part proportional to r = n_l / n_{l-1}, which comes from
pairs of different neurons j != k of layer l, independent but for corrections of order 1/n_{l-1}. Here that second part
is measured alone: networks n_0 -> n -> pairs, patterns of the exact layer identities summed over j != k only, times n.
Nothing of the theory at order 1/n enters. Noise is reduced by averages that are exact for each network,

* ``kernel_sector`` integrates the layer's neurons out (given the layer below, (z, W) is Gaussian), and
* ``differential_sector`` draws two groups of neurons and uses every pair between them,

and by control variates: averages over the neurons of layer 1 about their means, which are Gaussian integrals.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tests.oracles.differentials import derivatives
from torch_eft.theory import get_activation

e = torch.einsum


@dataclass(frozen=True)
class Setting:
    """Hyperparameters of layers 1, 2, 3, ...; inputs are drawn from the seed. The last C_W is the output layer's."""

    activation: str
    C_b: tuple[float, ...]
    C_W: tuple[float, ...]
    lambda_b: tuple[float, ...]
    lambda_W: tuple[float, ...]
    seed: int = 7

    @property
    def sigma(self):
        return get_activation(self.activation)

    @property
    def x(self) -> Tensor:
        return torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed))


# ---- Gaussian integrals over two labels, independent of the product's


@cache
def nodes(step: float, radius: float = 5.8) -> tuple[Tensor, Tensor]:
    """Trapezoid rule for two independent normal variables: (Q, 2) and weights."""
    count = int(radius / step)
    axis = torch.arange(-count, count + 1, dtype=torch.float64) * step
    u = torch.cartesian_prod(axis, axis)
    u = u[u.square().sum(1) < radius**2]
    weight = torch.exp(-u.square().sum(1) / 2)
    return u, weight / weight.sum()


def triangle(G: Tensor) -> Tensor:
    """Lower L with L L^T = G, (S, 2, 2)."""
    first = G[:, 0, 0].sqrt()
    below = G[:, 0, 1] / first
    second = (G[:, 1, 1] - below.square()).clamp(min=1e-14).sqrt()
    return torch.stack([first, torch.zeros_like(first), below, second], 1).reshape(-1, 2, 2)


# For each network: products of two derivatives; and of their errors (1e-6) only the change with K matters.
COARSE = 0.42
# For means of control variates: products of four derivatives, whose poles at i pi / 2 are of tenth order.
FINE = 0.1


def conditional_means(sigma, G: Tensor, trace: Tensor, X: Tensor, step: float = COARSE) -> tuple[Tensor, Tensor]:
    """<s_a s_b> and <s'_a s'_b H_kk;ab> of a neuron, given the layer below it.

    z = b + W t and H_kk;ab = lambda.. + sum_ij W_i W_j h_ij;ab are functions of one Gaussian vector (b, W). By Gaussian
    conditioning E[H_kk;ab | z] = trace_ab + sum_cd (G^-1 (z z^T - G) G^-1)_cd X_cd;ab, X_cd;ab = (C_W / n)^2
    sum_ij t_ic t_jd h_ij;ab: exact for each network. In whitened coordinates z = L u.

    Args:
        sigma: The activation.
        G: Covariance of z, (S, 2, 2).
        trace: Mean of H_kk;ab, (S, 2, 2).
        X: (S, c, d, a, b).
        step: Of the rule.
    """
    u, weight = nodes(step)
    L = triangle(G)
    z = e("qa,sba->sqb", u, L)
    s, s1 = sigma(z), sigma(z, 1)
    products = e("sqa,sqb->sqab", s1, s1) * weight[:, None, None]
    plain = e("sqab->sab", products)
    curved = e("sqab,qcd->scdab", products, e("qc,qd->qcd", u, u) - torch.eye(2, dtype=u.dtype))
    inverse = torch.linalg.inv(L)
    white = e("sef,sfgab,shg->sehab", inverse, X, inverse)
    m_00 = e("sqa,sqb,q->sab", s, s, weight)
    return m_00, plain * trace + e("sehab,sehab->sab", curved, white)


@dataclass(frozen=True)
class Limit:
    """K, Theta of layers 1, 2, .. at infinite width, and <s s>, <s' s'> there by the rule used for each network."""

    K: list[Tensor]
    Theta: list[Tensor]
    m_00: list[Tensor]
    m_11: list[Tensor]


@cache
def limit(setting: Setting) -> Limit:
    x, known = setting.x, Limit([], [], [], [])
    gram = x @ x.T / 3
    known.K.append(setting.C_b[0] + setting.C_W[0] * gram)
    known.Theta.append(setting.lambda_b[0] + setting.lambda_W[0] * gram)
    one, zero = torch.ones(1, 2, 2, dtype=x.dtype), x.new_zeros(1, 2, 2, 2, 2)
    for index in range(1, 4):
        fine, coarse = (conditional_means(setting.sigma, known.K[-1][None], one, zero, step) for step in (FINE, COARSE))
        known.m_00.append(coarse[0][0])
        known.m_11.append(coarse[1][0])
        m_00, m_11 = fine[0][0], fine[1][0]
        if index < len(setting.C_b):
            known.K.append(setting.C_b[index] + setting.C_W[index] * m_00)
            known.Theta.append(
                setting.lambda_b[index] + setting.lambda_W[index] * m_00 + setting.C_W[index] * m_11 * known.Theta[-1]
            )
    return known


# ---- layer 1 and its control variates

# Functions of one neuron whose averages over layer 1 the higher layers depend on: orders of sigma's derivatives.
CONTROLS = ((0, 0), (1, 1), (0, 0, 0, 0), (0, 0, 1, 1), (1, 1, 1, 1), (2, 1, 1, 0), (3, 1, 1, 1), (2, 2, 1, 1))


@cache
def monomials(families=CONTROLS) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Products over (order, label), each once."""
    keys = {}
    for orders in families:
        for labels in itertools.product(range(2), repeat=len(orders)):
            keys[tuple(sorted(zip(orders, labels, strict=True)))] = None
    return tuple(keys)


def features(values: list[Tensor], families=CONTROLS) -> Tensor:
    """The monomials of sigma and its derivatives (.., 2) at each neuron: (.., monomials)."""
    return torch.stack([math.prod(values[p][..., a] for p, a in word) for word in monomials(families)], -1)


def first_layer(setting: Setting, n: int, count: int, generator) -> list[Tensor]:
    """sigma .. sigma''' at the neurons of layer 1, (S, n, 2) each."""
    L = triangle(limit(setting).K[0][None])[0]
    z = torch.randn(count, n, 2, dtype=L.dtype, generator=generator) @ L.T
    return derivatives(setting.sigma, z)


@cache
def feature_means(setting: Setting, families=CONTROLS) -> Tensor:
    u, weight = nodes(FINE, 8.0)
    z = u @ triangle(limit(setting).K[0][None])[0].T
    return weight @ features(derivatives(setting.sigma, z), families)


def controlled(values: Tensor, controls: Tensor) -> tuple[Tensor, Tensor]:
    """Means over networks and standard errors of ``values`` (S, ..), given ``controls`` (S, c) of mean zero."""
    flat = values.flatten(1)
    kept = controls[:, controls.std(0) > 1e-12]
    design = torch.cat([torch.ones_like(flat[:, :1]), kept / kept.std(0)], 1)
    inverse = torch.linalg.pinv(design.T @ design, hermitian=True, rtol=1e-11)
    solution = inverse @ (design.T @ flat)
    residual = flat - design @ solution
    variance = residual.square().sum(0) / (len(flat) - design.shape[1]) * inverse[0, 0]
    return solution[0].reshape(values.shape[1:]), variance.sqrt().reshape(values.shape[1:])


# ---- z and NTK sector: V, D, A and the next-to-leading means


def squares(c: Tensor) -> Tensor:
    """c_i c_j, i <= j, of (.., c)."""
    rows, columns = torch.triu_indices(c.shape[-1], c.shape[-1])
    return c[..., rows] * c[..., columns]


LOW = ((0, 0), (1, 1))


def layer_1_controls(setting: Setting, values: list[Tensor]) -> Tensor:
    """Averages over layer 1 about their means, and products of the lowest about theirs: mean zero."""
    n = values[0].shape[1]
    means = feature_means(setting)
    c = features(values).mean(1) - means
    names = monomials()
    low = [names.index(word) for word in monomials(LOW)]
    rows, columns = torch.triu_indices(len(low), len(low))
    joint = [
        means[names.index(tuple(sorted(names[low[i]] + names[low[j]])))] - means[low[i]] * means[low[j]]
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    return torch.cat([c, squares(c[:, low]) - torch.stack(joint) / n], 1)


def kernel_networks(setting: Setting, widths: tuple[int, ...], count: int, generator):
    """Conditional means of a neuron above ``widths`` hidden layers, and controls; (S, 2, 2) twice, (S, c)."""
    n, T = widths[0], limit(setting).Theta[0]
    values = first_layer(setting, n, count, generator)
    s, s1 = values[:2]
    C, share, C_b = setting.C_W[1] / n, setting.lambda_W[1] / n, setting.C_b[1]
    same, slopes = e("sia,sib->sab", s, s), e("sia,sib->sab", s1, s1)
    G = C_b + C * same
    trace = setting.lambda_b[1] + share * same + C * slopes * T
    X = C**2 * e("sic,sid,sia,sib,ab->scdab", s, s, s1, s1, T)
    means = conditional_means(setting.sigma, G, trace, X)
    controls = layer_1_controls(setting, values)
    if len(widths) == 1:
        return *means, controls
    n_2 = widths[1]
    W = torch.randn(count, n_2, n, dtype=s.dtype, generator=generator) * math.sqrt(C)
    z = W @ s + math.sqrt(C_b) * torch.randn(count, n_2, 1, dtype=s.dtype, generator=generator)
    H = (W[:, None] * (e("sia,sib,ab->sabi", s1, s1, T)).flatten(1, 2)[:, :, None]) @ W[:, None].mT
    diagonal = setting.lambda_b[1] + share * same
    H = H.reshape(count, 2, 2, n_2, n_2) + diagonal[..., None, None] * torch.eye(n_2, dtype=s.dtype)
    t, t1 = setting.sigma(z), setting.sigma(z, 1)
    f = e("ska,skb->skab", t, t)
    g = e("ska,skb,sabkk->skab", t1, t1, H)
    C, share = setting.C_W[2] / n_2, setting.lambda_W[2] / n_2
    G = setting.C_b[2] + C * f.sum(1)
    trace = setting.lambda_b[2] + share * f.sum(1) + C * g.sum(1)
    left = e("skc,ska->sakc", t, t1)
    X = C**2 * e("sakc,sabkd->scdab", left, H @ left[:, None])
    X = (X + e("scdab->sdcab", X)) / 2
    # Given layer 1 the neurons of layer 2 are independent: averages about their conditional means, and products of
    # different neurons' (a sum over k != l).
    chosen = [0, 1, 3]
    a = torch.cat([(f - means[0][:, None]).flatten(2)[..., chosen], (g - means[1][:, None]).flatten(2)[..., chosen]], 2)
    average, c = a.mean(1), controls[:, : len(monomials(LOW))]
    products = squares(average) - squares(a).mean(1) / n_2
    mixed = e("si,sj->sij", average, c).flatten(1)
    return *conditional_means(setting.sigma, G, trace, X), torch.cat([controls, average, products, mixed], 1)


def by_chunks(draw, count: int, chunk: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    parts = [draw(min(chunk, count - start), generator) for start in range(0, count, chunk)]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


Key = tuple[str, int]
Estimates = dict[Key, tuple[Tensor, Tensor]]


def kernel_sector(setting: Setting, widths: tuple[int, ...], count: int, seed: int = 0, chunk: int = 1000) -> Estimates:
    """{(vertex, power of the output layer's lambda_W): (n times the pair statistic, standard error)}."""
    m_f, m_g, controls = by_chunks(lambda c, g: kernel_networks(setting, widths, c, g), count, chunk, seed)
    n, level, known = widths[-1], len(widths), limit(setting)
    C = setting.C_W[level + 1]
    f, g = m_f - known.m_00[level], m_g - known.m_11[level] * known.Theta[level]
    mean_f, mean_g = controlled(f, controls), controlled(g, controls)

    def covariance(a, b, mean_a, mean_b):
        value, error = controlled(e("sab,scd->sabcd", a, b), controls)
        return value - e("ab,cd->abcd", mean_a[0], mean_b[0]), error

    ff, fg = covariance(f, f, mean_f, mean_f), covariance(f, g, mean_f, mean_g)
    gg = covariance(g, g, mean_g, mean_g)
    crossed = controlled(e("sab,scd->sabcd", f, g) + e("sab,scd->sabcd", g, f), controls)
    crossed = (fg[0] + e("abcd->cdab", fg[0]), crossed[1])
    scaled = {
        ("V", 0): (ff, C**2),
        ("D", 0): (fg, C**2),
        ("D", 1): (ff, C),
        ("A", 0): (gg, C**2),
        ("A", 1): (crossed, C),
        ("A", 2): (ff, 1.0),
        ("G1", 0): (mean_f, C),
        ("Theta1", 0): (mean_g, C),
        ("Theta1", 1): (mean_f, 1.0),
    }
    return {key: (n * factor * value, n * factor * error) for key, ((value, error), factor) in scaled.items()}


# ---- dNTK and ddNTK sector: B, F, P, Q, R, S, T, U


QUADRATIC_GROUP = 48


def neurons(setting: Setting, W: Tensor, b: Tensor, values: list[Tensor]) -> dict[str, Tensor]:
    """sigma .. sigma''' and H_kk at the neurons of layer 2 with weights W (S, J, n), biases b (S, J, 1)."""
    s, s1 = values[:2]
    values_of = dict(zip("0123", derivatives(setting.sigma, W @ s + b), strict=True))
    T = limit(setting).Theta[0]
    H = (W * W) @ e("sia,sib,ab->siab", s1, s1, T).flatten(2)
    same = setting.lambda_W[1] / s.shape[1] * e("sia,sib->sab", s, s)
    values_of["H"] = H.unflatten(2, (2, 2)) + (setting.lambda_b[1] + same)[:, None]
    return values_of


def pair_patterns(setting: Setting, values: list[Tensor], A: Tensor, b_A: Tensor, B: Tensor, b_B: Tensor):
    """{(vertex, power of lambda_W): mean over k in group A, m in group B of its pattern}, printed order of labels.

    The k != m terms of the exact identities (``differentials.last_layer_means``), without those the recursions
    drop as O(1 / n^2): three H_km, and H_km times dH_kkm.
    """
    s, s1, s2, s3 = values
    T, n = limit(setting).Theta[0], s.shape[1]
    share = setting.lambda_W[1] / n
    k, m = neurons(setting, A, b_A, values), neurons(setting, B, b_B, values)
    labels = {"s": "0", "p": "1", "q": "2", "t": "3"}  # s, s', s'', s'''
    powers = {("k", 1): A, ("k", 2): A * A, ("m", 1): B, ("m", 2): B * B}

    known: dict[tuple, Tensor] = {}

    def product(group, word, power=None):
        """Mean over the group of e.g. "pa qb Hab" [times W_i^power]: (S, labels in order of appearance [, i])."""
        letters = list(dict.fromkeys(letter for factor in word.split() for letter in factor[1:]))
        # The same product under other names of its labels is computed once.
        plain = " ".join(f[0] + "".join("abcd"[letters.index(x)] for x in f[1:]) for f in word.split())
        if (group, plain) not in known:
            source = k if group == "k" else m
            operands = [source[labels.get(factor[0], factor[0])] for factor in plain.split()]
            subscripts = ",".join("sz" + factor[1:] for factor in plain.split())
            known[group, plain] = e(f"{subscripts}->s{'abcd'[: len(letters)]}z", *operands).flatten(1, -2)
        block, sizes = known[group, plain], (2,) * len(letters)
        if power is None:
            return block.unflatten(1, sizes), letters
        if (group, plain, power) not in known:
            weights = powers[group, power] if power else None
            known[group, plain, power] = block.mean(2) if weights is None else block @ weights / block.shape[2]
        return known[group, plain, power].unflatten(1, sizes), letters

    def link(left, p, right, q, kernel, indices, out="abcd"):
        """sum_i E_k[left W_ki^p] E_m[right W_mi^q] kernel_i;indices."""
        (x, x_letters), (y, y_letters) = product("k", left, p), product("m", right, q)
        x_index = "s" + "".join(x_letters) + ("i" if p else "")
        y_index = "s" + "".join(y_letters) + ("i" if q else "")
        # Few labels first: the two groups' factors are small, the kernel carries up to four labels.
        return e(f"{x_index},si{indices},{y_index}->s{out}", x, kernel, y)

    h = e("sia,sib,ab->siab", s1, s1, T)
    curve = e("sia,sib,sic,ab,ac->siabc", s2, s1, s1, T, T)
    tie_1 = share * e("sib,sia,sic,ac->siabc", s, s1, s1, T)  # legs 0 and 1 in one neuron's weights
    tie_2 = share * e("sic,sia,sib,ab->siabc", s, s1, s1, T)

    # H_km H_km for the three label pairs 00, 01, 11, summed against s'_m s'_m.
    few = min(QUADRATIC_GROUP, A.shape[1])  # its noise is small, its cost the square of the group
    H = A[:, None, :few] * h[..., [0, 0, 1], [0, 1, 1]].mT[:, :, None]
    H = H @ B[:, None, :few].mT
    rows, columns = torch.triu_indices(3, 3)
    slopes = m["1"][:, :few]
    spread = (H[:, rows] * H[:, columns]) @ (e("sza,szb->szab", slopes, slopes).flatten(2)[:, None] / few)
    number = torch.tensor([[0, 1], [1, 2]])
    both = torch.zeros(3, 3, dtype=torch.long)
    both[rows, columns] = both[columns, rows] = torch.arange(6)
    spread = spread[:, both[number[:, :, None, None], number]].unflatten(-1, (2, 2))  # (S, a, b, c, d, k, e, f)

    def quadratic(left, legs, right, out="abcd"):
        """E_km[left_k H_km;legs H_km;legs s'_m s'_m;right]."""
        factor, letters = product("k", left)
        return e(f"s{''.join(letters)}z,s{legs}z{right}->s{out}", factor[..., :few], spread) / few

    patterns = {}
    patterns["B", 0] = quadratic("pa pc", "abcd", "bd", "acbd")
    patterns["F", 0] = link("sa pc", 1, "sb pd", 1, h, "cd", "acbd")
    patterns["P", 0] = quadratic("sd qa", "abac", "bc") + link("sd pa", 1, "pb pc", 2, curve, "abc")

    d_kkm = [("pb pa", 2, "pc sd", 1, curve), ("pb pa", 0, "pc sd", 1, tie_1)]
    patterns["Q", 0] = link("pb qa Hab", 1, "pc sd", 1, h, "ac")
    patterns["Q", 0] = patterns["Q", 0] + sum(link(f, p, g, q, kernel, "abc") for f, p, g, q, kernel in d_kkm)
    patterns["Q", 1] = link("sb pa", 1, "pc sd", 1, h, "ac")

    patterns["R", 0] = quadratic("pb ta Hab", "acad", "cd") + link("pb qa Hab", 1, "pc pd", 2, curve, "acd")
    core = e("sia,sib,sic,sid,ab,ac,ad->siabcd", s3, s1, s1, s1, T, T, T)
    tied = share * e("sib,sia,sic,sid,ac,ad->siabcd", s, s2, s1, s1, T, T)
    patterns["R", 0] = (
        patterns["R", 0] + link("pb pa", 2, "pc pd", 2, core, "abcd") + link("pb pa", 0, "pc pd", 2, tied, "abcd")
    )
    patterns["R", 1] = quadratic("sb qa", "acad", "cd") + link("sb pa", 1, "pc pd", 2, curve, "acd")

    core = e("sia,sib,sic,sid,ab,ac,bd->siabcd", s2, s2, s1, s1, T, T, T)
    t12 = share * e("sia,sib,sic,sid,ac,bd->siabcd", s1, s1, s1, s1, T, T)
    t13 = share * e("sic,sia,sid,sib,ab,bd->siabcd", s, s1, s1, s2, T, T)
    t24 = share * e("sid,sib,sic,sia,ab,ac->siabcd", s, s1, s1, s2, T, T)
    at_both = share**2 * e("sic,sia,sid,sib,ab->sabcd", s, s1, s, s1, T)
    patterns["S", 0] = quadratic("qa qb Hab", "acbd", "cd")
    patterns["S", 0] = (
        patterns["S", 0] + link("pa pb", 2, "pc pd", 2, core, "abcd") + link("pa pb", 0, "pc pd", 2, t12, "abcd")
    )
    patterns["S", 1] = quadratic("pa pb", "acbd", "cd")

    ends = product("k", "pc pa", 0)[0], product("m", "pd pb", 0)[0]
    patterns["T", 0] = (
        link("pc qa Hac", 1, "pd qb Hbd", 1, h, "ab", "acbd")
        + link("pc qa Hac", 1, "pd pb", 2, curve, "bad", "acbd")
        + link("pc qa Hac", 1, "pd pb", 0, tie_2, "bad", "acbd")
        + link("pc pa", 2, "pd qb Hbd", 1, curve, "abc", "acbd")
        + link("pc pa", 0, "pd qb Hbd", 1, tie_2, "abc", "acbd")
        + link("pc pa", 2, "pd pb", 2, core, "abcd", "acbd")
        + link("pc pa", 0, "pd pb", 2, t13, "abcd", "acbd")
        + link("pc pa", 2, "pd pb", 0, t24, "abcd", "acbd")
        + e("sca,sdb,sabcd->sacbd", *ends, at_both)
    )
    patterns["T", 1] = (
        link("sc pa", 1, "pd qb Hbd", 1, h, "ab", "acbd")
        + link("sc pa", 1, "pd pb", 2, curve, "bad", "acbd")
        + link("sc pa", 1, "pd pb", 0, tie_2, "bad", "acbd")
        + link("pc qa Hac", 1, "sd pb", 1, h, "ab", "acbd")
        + link("pc pa", 2, "sd pb", 1, curve, "abc", "acbd")
        + link("pc pa", 0, "sd pb", 1, tie_2, "abc", "acbd")
    )
    patterns["T", 2] = link("sc pa", 1, "sd pb", 1, h, "ab", "acbd")
    patterns["U", 0] = link("pd pa", 2, "pc pb", 2, core, "abcd", "adbc")
    return patterns


def differential_sector(
    setting: Setting, n: int, neurons_each: int, count: int, seed: int = 0, chunk: int = 50
) -> Estimates:
    """As ``kernel_sector``, with two groups of ``neurons_each`` neurons drawn above one hidden layer of width n."""

    def draw(size, generator):
        values = first_layer(setting, n, size, generator)

        def normal(*shape):
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        weights = [normal(size, neurons_each, n) * math.sqrt(setting.C_W[1] / n) for _ in range(2)]
        biases = [normal(size, neurons_each, 1) * math.sqrt(setting.C_b[1]) for _ in range(2)]
        patterns = pair_patterns(setting, values, weights[0], biases[0], weights[1], biases[1])
        keys[:] = patterns
        return torch.stack(list(patterns.values()), 1), layer_1_controls(setting, values)

    keys: list[tuple[str, int]] = []
    patterns, controls = by_chunks(draw, count, chunk, seed)
    value, error = controlled(patterns, controls)
    C = setting.C_W[2]
    return {
        key: (n * C ** (2 - key[1]) * value[index], n * C ** (2 - key[1]) * error[index])
        for index, key in enumerate(keys)
    }


# ---- comparisons


@dataclass(frozen=True)
class Measured:
    """A tensor, its standard error, and how much of it may be of the next order that was not extrapolated."""

    value: Tensor
    error: Tensor
    left: float

    def deviation(self, theory: Tensor) -> float:
        """Largest entry, in standard errors beyond what is left."""
        beyond = ((self.value - theory).abs() - self.left) / self.error.clamp(min=1e-12 * float(self.value.abs().max()))
        return float(beyond.max())


def extrapolated(narrow: Estimates, wide: Estimates) -> dict[Key, Measured]:
    """2 x(2n) - x(n). With x = t (1 + a / n + b / n^2), b of order a^2, what is left is 2 (a / 2n)^2 of the scale."""
    measured = {}
    for key, (first, error_1) in narrow.items():
        second, error_2 = wide[key]
        value, error = 2 * second - first, (4 * error_2.square() + error_1.square()).sqrt()
        shift = float((second - first).norm() / value.norm())
        measured[key] = Measured(value, error, 2 * shift**2 * float(value.abs().max()))
    return measured


TANH = Setting("tanh", (0.2, 0.1, 0.3, 0.1), (1.3, 1.5, 1.2, 1.4), (0.5, 1.0, 0.2, 0.3), (1.0, 0.7, 1.2, 0.8))
GELU = Setting("gelu", (0.2, 0.1, 0.3, 0.1), (1.3, 1.5, 1.2, 1.4), (0.5, 1.0, 0.2, 0.3), (1.0, 0.7, 1.2, 0.8))
# The weights' share of the NTK large, and small against the biases'.
STEEP = Setting("tanh", (0.1, 0.3, 0.2, 0.1), (1.0, 1.1, 1.3, 1.2), (0.2, 0.1, 0.3, 0.2), (1.5, 3.0, 0.6, 1.0), seed=3)
FLAT = Setting("gelu", (0.3, 0.2, 0.1, 0.2), (1.0, 1.2, 1.4, 1.1), (1.0, 1.5, 0.5, 0.4), (0.4, 0.2, 2.0, 1.0), seed=3)


@cache
def pairs_of_layer_2(setting: Setting, scale: float = 1.0) -> dict[Key, Measured]:
    """The required r-parts of the recursions from layer 2 to 3. ``scale`` multiplies the numbers of networks."""
    kernels = [kernel_sector(setting, (n,), int(12000 * scale)) for n in (24, 48)]
    above = [differential_sector(setting, n, 256, int(count * scale)) for n, count in ((24, 4000), (48, 8000))]
    return extrapolated(kernels[0] | above[0], kernels[1] | above[1])


@cache
def pairs_of_layer_3(setting: Setting, scale: float = 1.0) -> dict[Key, Measured]:
    """The z and NTK sector at layer 3, whose G1 and Theta1 are not zero: r-parts of the recursions from 3 to 4."""
    counts = ((24, 20000), (48, 10000))
    return extrapolated(*(kernel_sector(setting, (n, n), int(count * scale), chunk=500) for n, count in counts))
