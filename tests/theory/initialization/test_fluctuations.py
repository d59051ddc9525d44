"""The covariance of the dNTK with itself, against drawn networks: autograd at layer 2, exact last layers at layer 3.

Layer 2 has no remainder at any width, so that two hidden neurons will do; layer 3 is extrapolated in 1/n.
"""

import itertools
import math

import pytest
import torch
from torch.func import jacrev, jvp, vmap

from torch_eft import theory
from torch_eft.theory.initialization.estimators import RECURSIONS, vertex_replicas
from torch_eft.theory.initialization.evaluator import FLUCTUATIONS, images
from torch_eft.theory.initialization.infinite_width import infinite_width
from torch_eft.theory.initialization.recursions import fluctuations

C_B, C_W = (0.1, 0.05, 0.15), (1.4, 1.2, 1.5)
LAMBDA_B, LAMBDA_W = (0.3, 0.2, 0.25), (1.0, 0.8, 1.1)


def ensemble_of(name, widths):
    layers = len(widths) - 1
    hyper = {"C_b": C_B, "C_W": C_W, "lambda_b": LAMBDA_B, "lambda_W": LAMBDA_W}
    return theory.MLPEnsemble(widths, name, **{key: value[:layers] for key, value in hyper.items()})


def inputs(count=2):
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def tensors(name, widths, x):
    return theory.initial_statistics(ensemble_of(name, widths), x, statistics=FLUCTUATIONS, check_validity=False)


# ---- layer 2, by autograd of whole networks


def by_autograd(name, n, networks, seed):
    """z (S, i, a), H (S, i, j, a, b) and dH (S, i, j, k, a, b, c) of three outputs at two inputs."""
    x, sigma = inputs(), theory.get_activation(name).function
    generator = torch.Generator().manual_seed(seed)
    shapes = [((n, 3), C_W[0] / 3, LAMBDA_W[0] / 3), ((n,), C_B[0], LAMBDA_B[0])]
    shapes += [((3, n), C_W[1] / n, LAMBDA_W[1] / n), ((3,), C_B[1], LAMBDA_B[1])]
    # In units of sqrt(lambda) every sum over parameters with lambda is a plain one.
    units = [rate**0.5 for _, _, rate in shapes]
    theta = torch.cat(
        [
            torch.randn(networks, math.prod(shape), dtype=x.dtype, generator=generator) * variance**0.5 / unit
            for (shape, variance, _), unit in zip(shapes, units, strict=True)
        ],
        1,
    )

    def outputs(flat):
        parts = flat.split([math.prod(shape) for shape, _, _ in shapes])
        W, b, V, c = (
            part.reshape(shape) * unit for part, (shape, _, _), unit in zip(parts, shapes, units, strict=True)
        )
        return (sigma(x @ W.T + b) @ V.T + c).T.flatten()

    def one(flat):
        J = jacrev(outputs)(flat)
        along = vmap(lambda direction: jvp(jacrev(outputs), (flat,), (direction,))[1])(J)  # (k, i, parameter)
        return outputs(flat), J @ J.T, torch.einsum("kip,jp->ijk", along, J)

    z, H, dH = vmap(one, chunk_size=2000)(theta)
    z, H = z.reshape(-1, 3, 2), H.reshape(-1, 3, 2, 3, 2).permute(0, 1, 3, 2, 4)
    return z, H, dH.reshape(-1, *[3, 2] * 3).permute(0, 1, 3, 5, 2, 4, 6)


def products(z, H, dH, n):
    """{tensor: (S, 64)}: n^2 times the product that estimates it, averaged over different outputs a, b, c."""

    def dd(first, second):
        return torch.einsum("sabc,sdef->sabcdef", dH[(slice(None), *first)], dH[(slice(None), *second)])

    def U(a, c):
        return torch.einsum("sx,sab->sxab", z[:, a], H[:, a, c])

    def with_U(a, c, other):
        return torch.einsum("sxab,sdef->sxabdef", U(a, c), other)

    found = dict.fromkeys(FLUCTUATIONS, 0.0)
    for a, b, c in itertools.permutations(range(3)):
        values = {
            "X3a": dd((a, b, c), (a, b, c)),
            "X3b": dd((a, b, c), (b, a, c)),
            "XQQ": dd((a, a, c), (b, b, c)),
            "XPQ": dd((c, a, a), (b, b, c)),
            "XPP": dd((c, a, a), (c, b, b)),
            "XUU": with_U(a, c, U(b, c)),
            "XUQ": with_U(a, c, dH[:, b, b, c]),
            "XUP": with_U(a, c, dH[:, c, b, b]),
        }
        for key, value in values.items():
            found[key] = found[key] + n**2 * value.flatten(1) / 6
    return found


def deviations(samples, predicted):
    """Entry by entry, in standard errors."""
    samples = samples.double()
    return (samples.mean(0) - predicted.flatten()).abs() / (samples.std(0) / math.sqrt(len(samples)))


def slope(samples, predicted):
    """Measured over predicted, and its standard error."""
    weights = predicted.flatten() / predicted.square().sum()
    values = samples.double() @ weights
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


# ---- any layer, averaged over the weights of the last one


def hidden_1(name, n, networks, generator):
    """z, H and dH of layer 1: its NTK is constant. Single precision, far below the noise."""
    x = inputs().float()
    z = torch.randn(networks, n, 3, dtype=x.dtype, generator=generator) @ x.T * math.sqrt(C_W[0] / 3)
    z = z + torch.randn(networks, n, 1, dtype=x.dtype, generator=generator) * math.sqrt(C_B[0])
    T = LAMBDA_B[0] + LAMBDA_W[0] * x @ x.T / 3
    H = torch.einsum("km,ab->kmab", torch.eye(n, dtype=x.dtype), T).expand(networks, -1, -1, -1, -1)
    return z, H, x.new_zeros(networks, n, n, n, 2, 2, 2)


def hidden_2(name, widths, networks, generator):
    """z, H and dH of layer 2 by the layer identities."""
    n, width = widths
    z, H, _ = hidden_1(name, n, networks, generator)
    T, sigma, e = H[0, 0, 0], theory.get_activation(name), torch.einsum
    s, s1, s2 = (sigma(z, order) for order in range(3))
    W = torch.randn(networks, width, n, dtype=z.dtype, generator=generator) * math.sqrt(C_W[1] / n)
    share, eye = LAMBDA_W[1] / n, torch.eye(width, dtype=z.dtype)
    V = e("skj,sja->skja", W, s1)
    tied = LAMBDA_B[1] + share * e("sja,sjb->sab", s, s)
    pushed = e("skja,sljb->sklab", V, V) * T
    H = pushed + e("kl,sab->sklab", eye, tied)
    weight = e("sja,sjb,sjc->sjabc", s2, s1, s1) * T[:, :, None] * T[:, None, :]
    two, one = e("skj,slj->sklj", W, W).flatten(1, 2), e("smj,sjabc->sjmabc", W, weight).flatten(2)
    dH = (two @ one).reshape(networks, *[width] * 3, 2, 2, 2)
    tail = share * e("sjb,sja,smjc,ac->smabc", s, s1, V, T)
    dH.diagonal(dim1=1, dim2=2).add_(tail[..., None])
    dH.diagonal(dim1=1, dim2=3).add_(tail.transpose(3, 4)[..., None])
    bias = torch.randn(networks, width, 1, dtype=z.dtype, generator=generator) * math.sqrt(C_B[1])
    return W @ s + bias, H, dH


def last_layer(name, z, H, dH, level):
    """{tensor: (S, 64)}: n^2 times the covariances of the next layer, given all neurons of this one."""
    sigma, e, n = theory.get_activation(name), torch.einsum, z.shape[1]
    s, s1, s2 = (sigma(z, order) for order in range(3))
    C, rate = C_W[level], LAMBDA_W[level]
    # dH' of three different outputs contracts their weights with A.
    through = H * s1[:, None, :, None, :]
    A = dH.mul_(s1[:, :, None, None, :, None, None])
    A.mul_(s1[:, None, :, None, None, :, None] * s1[:, None, None, :, None, None, :])
    curved = s2[:, :, None, :, None] * through
    A.addcmul_(curved[:, :, :, None, :, :, None], through[:, :, None, :, :, None, :])
    of_U = C * e("skx,ska,skmac->smxac", s, s1, through)
    of_Q = C * e("skkmabc->smabc", A) + rate * e("skb,ska,skmac->smabc", s, s1, through)
    of_P = C * e("skmmabc->skabc", A)

    def cross(first, second):
        return C / n * e("smx,smy->sxy", first.flatten(2), second.flatten(2)).flatten(1)

    whole, turned = A.flatten(1, 3).flatten(2), A.transpose(1, 2).flatten(1, 3).flatten(2)
    return {
        "X3a": C**3 / n * (whole.mT @ whole).flatten(1),
        "X3b": C**3 / n * (whole.mT @ turned).flatten(1),
        "XQQ": cross(of_Q, of_Q),
        "XPQ": cross(of_P, of_Q),
        "XPP": cross(of_P, of_P),
        "XUU": cross(of_U, of_U),
        "XUQ": cross(of_U, of_Q),
        "XUP": cross(of_U, of_P),
    }


def drawn(name, widths, networks, chunk, seed=0):
    generator, parts = torch.Generator().manual_seed(seed), []
    for _ in range(networks // chunk):
        hidden = (
            hidden_1(name, *widths, chunk, generator) if len(widths) == 1 else hidden_2(name, widths, chunk, generator)
        )
        parts.append(last_layer(name, *hidden, len(widths)))
    return {key: torch.cat([part[key] for part in parts]) for key in FLUCTUATIONS}


@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_layer_2_is_exact_at_any_width(name):
    predicted = tensors(name, [3, 4, 3], inputs())[-1]
    for key, values in drawn(name, (4,), 10_000, 2000).items():
        ratio, error = slope(values, getattr(predicted, key))
        assert abs(ratio - 1) < 4 * error < 0.1, f"{key}: {ratio:.4f} +- {error:.4f}"
        worst = float(deviations(values, getattr(predicted, key)).max())
        assert worst < 5, f"{key}: an entry is off by {worst:.1f} standard errors"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_layer_2_against_derivatives_of_whole_networks(name):
    predicted = tensors(name, [3, 4, 3], inputs())[-1]
    for key, values in products(*by_autograd(name, 4, 20_000, seed=3), 4).items():
        ratio, error = slope(values, getattr(predicted, key))
        assert abs(ratio - 1) < 4 * error < 0.5, f"{key}: {ratio:.3f} +- {error:.3f}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_layer_3_tends_to_theory(name):
    """Widths m (12, 16), extrapolated from m = 2 and 3 in 1/m: what is left is of second order."""
    predicted, found = tensors(name, [3, 12, 16, 3], inputs())[-1], []
    for m, networks in ((2, 700), (3, 400)):
        samples = drawn(name, (12 * m, 16 * m), networks, 10)
        found.append({key: slope(values, getattr(predicted, key)) for key, values in samples.items()})
    for key in FLUCTUATIONS:
        (r, e), (r2, e2) = (part[key] for part in found)
        value, error, left = 3 * r2 - 2 * r, math.hypot(2 * e, 3 * e2), (r - 1) ** 2
        print(f"{name} {key}: {r:.3f}({e:.3f}) {r2:.3f}({e2:.3f}) -> {value:.3f} +- {error:.3f}")
        assert abs(value - 1) < 4 * error + left, f"{key}: {value:.3f} +- {error:.3f} (second order {left:.3f})"


# ---- structure


def test_recursions_have_the_symmetries_of_their_tensors_before_any_is_used():
    """The evaluator reduces letters by these symmetries; here each recursion is asked for the images themselves."""
    x = inputs()
    sets = dict.fromkeys("abcdef", torch.arange(2))
    infinite = infinite_width(ensemble_of("gelu", [3, 12, 16, 3]), x)
    replicas = vertex_replicas(ensemble_of("gelu", [3, 12, 16, 3]), *infinite, sets, 100, 2, 0)
    (evaluator,) = replicas.members
    for name in FLUCTUATIONS:
        values = [RECURSIONS[name](evaluator, 3, image).expand([2] * 6) for image in images(name, "abcdef")]
        assert len(values) == {"X3a": 4, "XPP": 8, "XUQ": 1}.get(name, 2)
        for value in values:
            torch.testing.assert_close(value, values[0], rtol=1e-9, atol=1e-12)


def test_output_and_dntk_have_a_covariance():
    """All z and dH at two outputs and two inputs, out of all pairings of K, P, Q and X: no negative eigenvalue."""
    names = ("P", "Q", *FLUCTUATIONS)
    last = theory.initial_statistics(ensemble_of("gelu", [3, 12, 16, 2]), inputs(), statistics=names)[-1]
    slots = [(i, a) for i in range(2) for a in range(2)]
    fields = [*((slot,) for slot in slots), *itertools.product(slots, repeat=3)]

    def entry(first, second):
        if len(first) > len(second):
            first, second = second, first
        outputs, labels = zip(*first, *second, strict=True)
        if len(first) == len(second) == 1:
            return float(last.K[labels]) * (outputs[0] == outputs[1])
        total = 0.0
        if len(first) == 1:
            (k, i0, i1, i2), (u, a, b, c) = outputs, labels
            total += float(last.P[a, b, c, u]) * (k == i0 and i1 == i2)
            total += float(last.Q[a, b, c, u]) * (i0 == i1 and i2 == k)
            return total + float(last.Q[a, c, b, u]) * (i0 == i2 and i1 == k)
        for pairing, (name, order) in PAIRINGS.items():
            if all(outputs[one] == outputs[other] for one, other in pairing):
                total += float(getattr(last, name)[tuple(labels[slot] for slot in order)])
        return total

    covariance = torch.tensor([[entry(one, other) for other in fields] for one in fields], dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(covariance)
    assert eigenvalues[0] > -1e-10 * eigenvalues[-1]

    assert len(PAIRINGS) == 15


def _pairings():
    """The 15 pairings of six slots, each with the tensor and the order of its labels, found by exchanging tails."""
    found = {}
    kinds = {
        "X3a": ((0, 3), (1, 4), (2, 5)),
        "X3b": ((0, 4), (1, 3), (2, 5)),
        "XQQ": ((0, 1), (3, 4), (2, 5)),
        "XPQ": ((1, 2), (0, 5), (3, 4)),
        "XPP": ((1, 2), (4, 5), (0, 3)),
    }
    for name, pairing in kinds.items():
        for first, second in itertools.product(((0, 1, 2), (0, 2, 1)), repeat=2):
            for order in ((*first, *(3 + slot for slot in second)), (*(3 + slot for slot in second), *first)):
                image = frozenset(frozenset((order[i], order[j])) for i, j in pairing)
                found.setdefault(tuple(sorted(tuple(sorted(pair)) for pair in image)), (name, order))
    return found


PAIRINGS = _pairings()


def test_tiles_and_blocks_are_parts_of_the_tensor():
    x, ensemble = inputs(), ensemble_of("tanh", [3, 12, 1])
    whole = theory.initial_statistics(ensemble, x, statistics=["XPQ"])[-1].XPQ
    for tile in theory.vertex_tiles(ensemble, x, name="XPQ", tile=1):
        torch.testing.assert_close(tile.value, whole[tile.rows, tile.columns], rtol=1e-8, atol=1e-10)
    assert tile.rows == tile.columns == slice(1, 2)
    sets = {"x": torch.tensor([1]), "c": torch.arange(2), "d": torch.arange(2)}
    block = theory.vertex_block(ensemble, x, name="XPQ", labels="xxcxxd", label_sets=sets)
    torch.testing.assert_close(block.value[0], whole[1, 1, :, 1, 1, :], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["XUQ"])
def test_samples_agree_with_integration_within_their_error(name):
    """Layer 3, where composites carry sampled moments: three of five inputs, and those three alone."""
    x, ensemble = inputs(3), ensemble_of("tanh", [3, 12, 16, 1])
    sets = {letter: torch.tensor([index]) for index, letter in enumerate("xyc")}
    exact = theory.vertex_block(ensemble, x, name=name, labels="xycyxc", label_sets=sets)
    more = {"num_samples": 20_000, "num_replicas": 4}
    five = torch.cat([x, torch.eye(2, 3, dtype=x.dtype)])
    sampled = theory.vertex_block(ensemble, five, name=name, labels="xycyxc", label_sets=sets, **more)
    assert exact.error == 0 < sampled.error < 0.05 * float(exact.value.abs())
    assert float((sampled.value - exact.value).abs()) < 6 * sampled.error


def test_linear_networks_have_the_covariance_of_their_weights():
    """z = V W x: at n_2 = 1, dH_aac of one hidden layer is a polynomial of weights, whose moments Isserlis gives."""
    x = torch.eye(2, 3, dtype=torch.float64)
    last = theory.initial_statistics(
        theory.MLPEnsemble([3, 7, 2], "linear", C_W=3.0, lambda_W=3.0, lambda_b=0.0), x, statistics=FLUCTUATIONS
    )[-1]
    assert not any(bool(getattr(last, name).any()) for name in ("X3a", "X3b", "XPP", "XPQ", "XUP"))
    # A = lambda_W T_02 sum_k z_1 V_ck over n: its covariance is C_W lambda_W^2 T_02 T_35 K_14, K = T = x.x here.
    expected = 3 * 9 * torch.einsum("ac,df,be->abcdef", x @ x.T, x @ x.T, x @ x.T)
    torch.testing.assert_close(last.XQQ, expected)


def test_a_kink_is_refused_by_name():
    x = inputs()
    last = theory.initial_statistics(ensemble_of("relu", [3, 12, 1]), x, statistics=("X3a", "XPP", "XUP"))[-1]
    assert not last.X3a.any() and not last.XPP.any() and not last.XUP.any()
    for name, kinks, statistic in (
        ("relu", "autograd", "XQQ"),
        ("elu", "autograd", "X3a"),
        ("relu", "distributional", "X3b"),
    ):
        with pytest.raises(ValueError, match=rf"{statistic} of {name} given, which has a kink.*gelu"):
            theory.initial_statistics(ensemble_of(name, [3, 12, 1]), x, statistics=[statistic], kinks=kinks)


def test_six_labels_need_memory():
    with pytest.raises(ValueError, match=r"20 inputs need about .* GiB.*theory.vertex_block"):
        theory.initial_statistics(ensemble_of("tanh", [3, 12, 1]), inputs(20), statistics=["X3a"])


# ---- would these tests see a term dropped?


@pytest.mark.parametrize("builder", ["of_U", "of_Q", "of_P"])
def test_a_dropped_term_of_a_neuron_is_seen_at_layer_2(builder, monkeypatch):
    """The terms without composites, all that layer 2 has."""
    whole = getattr(fluctuations, builder)
    samples = {key: value for key, value in drawn("gelu", (4,), 4000, 2000, seed=5).items() if builder[-1] in key}
    count = {"of_U": 1, "of_Q": 2, "of_P": 1}[builder]
    for dropped in range(count):

        def mutant(v, m, labels, dropped=dropped):
            terms = whole(v, m, labels)
            plain = [term for term in terms if term[2] is None][dropped]
            return [term for term in terms if term is not plain]

        monkeypatch.setattr(fluctuations, builder, mutant)
        predicted = tensors("gelu", [3, 4, 3], inputs())[-1]
        worst = max(float(deviations(value, getattr(predicted, key)).max()) for key, value in samples.items())
        assert worst > 8, f"{builder} without its term {dropped} goes unseen: {worst:.1f} standard errors"
