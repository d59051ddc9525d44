"""Statistics of hidden layers: against vertices, automatic differentiation of drawn networks and naive sums."""

import dataclasses
import math

import pytest
import torch

from torch_eft.theory import MLPEnsemble, initial_statistics
from torch_eft.theory.hidden_layers.moments import TrainingMoments
from torch_eft.theory.hidden_layers.predict import predict_representation
from torch_eft.theory.hidden_layers.statistics import DistinctInputs, representation_statistics

C_B, C_W = (0.2, 0.1, 0.3, 0.1), (1.3, 1.5, 1.2, 1.4)
LAMBDA_B, LAMBDA_W = (0.5, 1.0, 0.2, 0.3), (1.0, 0.7, 1.2, 0.8)


def ensemble_of(name, widths, last_lambda=None):
    depth = len(widths) - 1
    lambda_W = list(LAMBDA_W[:depth])
    if last_lambda is not None:
        lambda_W[-1] = last_lambda
    return MLPEnsemble(widths, name, C_b=C_B[:depth], C_W=C_W[:depth], lambda_b=LAMBDA_B[:depth], lambda_W=lambda_W)


def inputs(count, seed=7):
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def symmetric(tensor):
    return tensor + tensor.transpose(0, 1)


@pytest.mark.parametrize("name", ["tanh", "gelu"])
@pytest.mark.parametrize("hidden", [(16,), (16, 24), (16, 24, 20)])
def test_the_last_hidden_layer_is_the_lambda_W_part_of_the_output(name, hidden):
    """lambda_W g is part of the output's NTK, so that Q, R + S and T contain Xi, C and Y of its last hidden layer."""
    x = inputs(2)
    lam, C = LAMBDA_W[len(hidden)], C_W[len(hidden)]
    whole, without = (
        initial_statistics(ensemble_of(name, [3, *hidden, 2], value), x, statistics=("Q", "R", "S", "T"))[-1]
        for value in (None, 0.0)
    )
    found = representation_statistics(ensemble_of(name, [3, *hidden, 2]), x, x)[-1]
    assert found.divisor == hidden[-1]

    def part(key):
        return symmetric(getattr(whole, key) - getattr(without, key))

    def both(tensor):
        return tensor + tensor.transpose(2, 3)

    def close(first, second, *names):
        size = sum(float(getattr(whole, name).abs().max()) for name in names)  # of what is subtracted
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12 * size)

    close(lam * found.Xi, part("Q"), "Q")
    close(lam * found.C, part("R") + part("S"), "R", "S")
    # T_1324 has the part of g in 1, 3 and that in 2, 4: linear in lambda_W, and both at once.
    linear = both(found.Y - lam * found.Xi / C)
    close(lam**2 * both(found.Xi) / C + lam * (linear + torch.einsum("cdab->abcd", linear)), both(part("T")), "T")


def test_hidden_ntks_contain_the_kernel_below():
    """H^(l+1)_jj = lambda_b + lambda_W g^(l) + .., seen from the output, two layers above; Y needs Theta on the way."""
    x, widths = inputs(2), [3, 16, 24, 20, 2]
    whole, without = (
        MLPEnsemble(widths, "tanh", C_b=C_B, C_W=C_W, lambda_b=LAMBDA_B, lambda_W=[LAMBDA_W[0], value, *LAMBDA_W[2:]])
        for value in (LAMBDA_W[1], 0.0)
    )
    kernel = representation_statistics(whole, x, x, observable="activations")
    ntk, rest = (representation_statistics(ensemble, x, x, observable="ntk") for ensemble in (whole, without))
    assert [layer.divisor for layer in kernel] == [16, 24, 20]
    assert [layer.divisor for layer in ntk] == [3, 16, 24]
    assert not ntk[0].Xi.any() and not ntk[0].Y.any() and not ntk[0].C.any()  # the NTK of layer 1 is constant
    for key in ("Xi", "C"):
        part, expected = getattr(ntk[1], key) - getattr(rest[1], key), LAMBDA_W[1] * getattr(kernel[0], key)
        size = sum(float(getattr(found[1], key).abs().max()) for found in (ntk, rest))  # of what is subtracted
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-12 * size)


def network(widths, sigma, x, top):
    """Functions of the whitened parameters of one network: g and f of hidden layer l, z of layer ``top``."""
    shapes = [(n_out, n_in) for n_in, n_out in zip(widths[:-1], widths[1:], strict=True)][:top]
    scales, rates = [], []
    for index, (n_out, n_in) in enumerate(shapes):
        for count, variance, rate in (
            (n_out * n_in, C_W[index] / n_in, LAMBDA_W[index] / n_in),
            (n_out, C_B[index], LAMBDA_B[index]),
        ):
            scales.append(torch.full((count,), math.sqrt(variance / rate), dtype=x.dtype))
            rates.append(torch.full((count,), math.sqrt(rate), dtype=x.dtype))
    scale, rate = torch.cat(scales), torch.cat(rates)

    def run(omega):
        theta, start, signal, found = rate * omega, 0, x, []
        for n_out, n_in in shapes:
            weight = theta[start : start + n_out * n_in].reshape(n_out, n_in)
            bias = theta[start + n_out * n_in : start + n_out * (n_in + 1)]
            start += n_out * (n_in + 1)
            found.append(signal @ weight.T + bias)
            signal = sigma(found[-1])
        return found

    return scale, run


OBSERVABLES = ("activations", "preactivations")


def measured(widths, sigma, x, layers, top, networks, chunk, seed=0):
    """{(layer, observable): {statistic: (networks, N, N, N, N)}}, times n_l, by automatic differentiation.

    Means over the outputs k, whose derivatives are taken once for all hidden layers.
    """
    scale, run = network(widths, sigma, x, top)
    outputs, count = widths[top], len(x)
    shapes = {"activations": sigma, "preactivations": lambda z: z}

    def single(omega):
        z, J = run(omega)[-1], torch.func.jacrev(lambda w: run(w)[-1])(omega)  # (N, k, P)

        def bends(function):
            """Second derivatives along every row of J: d, k' of the direction first."""

            def bend(direction):
                return torch.func.jvp(torch.func.jacrev(function), (omega,), (direction,))[1]

            bent = torch.func.vmap(bend)(J.reshape(-1, J.shape[-1]))
            return bent.reshape(count, outputs, *bent.shape[1:])

        dJ, found = bends(lambda w: run(w)[-1]), {}  # then c, k
        for layer in layers:
            for observable, shape in shapes.items():

                def features(w, layer=layer, shape=shape):
                    return shape(run(w)[layer - 1])

                def kernel(w, features=features, hidden=widths[layer]):
                    return features(w) @ features(w).T / hidden

                dg, df = torch.func.jacrev(kernel)(omega), torch.func.jacrev(features)(omega)  # df: (N, n, P)
                moved = torch.einsum("ajp,ckp->jakc", df, J)
                found[layer, observable] = {
                    "Xi": torch.einsum("abp,ckp,dk->abcd", dg, J, z),
                    "Y": torch.einsum("abp,dkckp->abcd", dg, dJ),
                    "C": torch.einsum("dkabp,ckp->abcd", bends(kernel), J),
                    "Mv": torch.einsum("jakc,jbkd->abcd", moved, moved) / widths[layer],
                }
        return found

    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(networks // chunk):
        omega = torch.randn(chunk, len(scale), dtype=x.dtype, generator=generator) * scale
        parts.append(torch.func.vmap(single)(omega))
    return {
        (layer, observable): {
            key: torch.cat([part[layer, observable][key] for part in parts]) * widths[layer] / outputs for key in values
        }
        for (layer, observable), values in parts[0].items()
    }


def ratios(name, widths, layers, top, networks, chunk, seed=0):
    """{(layer, observable, statistic): (measured / theory on the theory's direction, standard error)}."""
    x = inputs(2)
    sigma = {"tanh": torch.tanh, "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))}[name]
    theory = {
        observable: representation_statistics(ensemble_of(name, widths), x, x, observable=observable, top=top)
        for observable in OBSERVABLES
    }
    result = {}
    for (layer, observable), found in measured(widths, sigma, x, layers, top, networks, chunk, seed).items():
        for key, value in found.items():
            expected = getattr(theory[observable][layer - 1], key)
            along = (value * expected).sum((1, 2, 3, 4)) / expected.square().sum()
            result[layer, observable, key] = float(along.mean()), float(along.std()) / math.sqrt(networks)
    return result


@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_the_first_hidden_layer_seen_from_the_second_is_exact_at_any_width(name):
    """No remainder at l = 1, m = 2: 4 standard errors."""
    for key, (ratio, error) in ratios(name, [3, 5, 4, 1], (1,), 2, networks=3000, chunk=1000).items():
        assert abs(ratio - 1) < 4 * error, f"{key}: {ratio:.4f} +- {error:.4f}"
        assert error < (0.12 if "Xi" in key else 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_the_third_layer_sees_what_theory_says_in_the_limit(name):
    """Unequal widths (n, 3n/2), n = 8 and 16, 2 r(2n) - r(n): what is left is about the square of the remainder."""
    narrow = ratios(name, [3, 8, 12, 4, 1], (1, 2), 3, networks=3000, chunk=100, seed=1)
    wide = ratios(name, [3, 16, 24, 4, 1], (1, 2), 3, networks=2000, chunk=50, seed=2)
    for key, (r, e) in narrow.items():
        r2, e2 = wide[key]
        value, error, left = 2 * r2 - r, math.hypot(e, 2 * e2), max(abs(r - 1), abs(r2 - 1)) ** 2
        assert abs(value - 1) < 4 * error + left, f"{key}: {value:.3f} +- {error:.3f}, {r:.3f} {r2:.3f}"


def stepped(Theta, S, rate, steps):
    """Phi, sum_k q_kk and Phi S Phi by stepping."""
    G, Phi, q = torch.eye(len(Theta), dtype=Theta.dtype), torch.zeros_like(Theta), torch.zeros_like(Theta)
    for _ in range(steps):
        q = q + rate * G @ S @ Phi
        Phi = Phi + rate * G
        G = G - rate * Theta @ G
    return Phi, q, Phi @ S @ Phi


def matrices(count=4, seed=3):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, count, count, dtype=torch.float64, generator=generator)
    return first @ first.T / count, second @ second.T


def test_moments_of_the_path_against_stepping_and_closed_forms():
    Theta, S = matrices()
    rate = 1.9 / float(torch.linalg.eigvalsh(Theta)[-1])  # the fastest mode alternates
    moments = TrainingMoments(Theta, S, rate, "gradient_descent")
    times = [0, 1, 2, 3, 17, 100]
    found = moments.at(torch.tensor(times, dtype=torch.float64))
    for index, steps in enumerate(times):
        for value, expected in zip(found, stepped(Theta, S, rate, steps), strict=True):
            torch.testing.assert_close(value[index], expected, rtol=0, atol=1e-12 * (1 + float(expected.abs().max())))
    eigenvalues, U = torch.linalg.eigh(Theta)
    first, second = eigenvalues[:, None], eigenvalues[None, :]
    for dynamics, eta in (("gradient_descent", rate), ("gradient_flow", 0.0)):
        last = TrainingMoments(Theta, S, rate, dynamics).at(torch.tensor([math.inf], dtype=torch.float64))
        psi = (1 - eta * first) / (first * (first + second - eta * first * second))
        q = U @ (psi * (U.T @ S @ U)) @ U.T
        inverse = torch.linalg.inv(Theta)
        for value, expected in zip(last, (inverse, q, inverse @ S @ inverse), strict=True):
            torch.testing.assert_close(value[0], expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_gradient_flow_is_the_limit_of_small_steps():
    """Any finite time, linearly in the rate: a tenth of the rate, a tenth of the difference."""
    Theta, S = matrices()
    flow = TrainingMoments(Theta, S, 1.0, "gradient_flow").at(torch.tensor([3.7], dtype=torch.float64))
    differences = []
    for steps in (1000, 10_000):
        descent = TrainingMoments(Theta, S, 3.7 / steps, "gradient_descent")
        found = descent.at(torch.tensor([float(steps)], dtype=torch.float64))
        differences.append([float((a - b).norm() / b.norm()) for a, b in zip(found, flow, strict=True)])
    for coarse, fine in zip(*differences, strict=True):
        assert fine < 1e-3 and fine == pytest.approx(coarse / 10, rel=0.02)


def test_the_trained_network_by_flow_and_by_ever_smaller_steps():
    """At infinite time too, linearly in the rate; long descent is descent at infinite time."""
    x, y, probe = training()
    ensemble = ensemble_of("tanh", [3, 16, 24, 1])

    def trained(rate, steps=math.inf, **kwargs):
        spec = dict(learning_rate=rate, steps=steps, at_steps=[steps], reduction="sum", ntk=False)
        return predict_representation(ensemble, x, y, probe, **spec, **kwargs).layers[1].kernel_change[0]

    flow = trained(1.0, dynamics="gradient_flow")
    coarse, fine = trained(1e-2), trained(1e-3)
    assert float((fine - flow).norm()) == pytest.approx(float((coarse - flow).norm()) / 10, rel=0.02)
    torch.testing.assert_close(trained(1e-2, 1e5), coarse, rtol=1e-9, atol=0)


def test_modes_that_do_not_move_are_left_out_and_slow_ones_are_accurate():
    """A repeated input moves nothing by itself; a mode of 1e-9 is not lost to rounding."""
    S = torch.ones(3, 3, dtype=torch.float64) + torch.eye(3, dtype=torch.float64)
    slow = TrainingMoments(torch.diag(torch.tensor([1e-9, 1e-6, 1.0], dtype=torch.float64)), S, 0.5, "gradient_descent")
    _, q, _ = slow.at(torch.tensor([50.0], dtype=torch.float64))
    # sum_{s<50} eta g^s phi(s) with all rates tiny: eta^2 t (t - 1) / 2.
    assert float(q[0, 0, 0]) == pytest.approx(2 * 0.25 * 50 * 49 / 2, rel=1e-7)
    x = inputs(3)
    repeated = DistinctInputs.of(ensemble_of("tanh", [3, 8, 1]), x[[0, 1, 1]], x[:1])
    Theta = torch.tensor([[2.0, 0.5, 0.5], [0.5, 1.0, 1.0], [0.5, 1.0, 1.0]], dtype=torch.float64)
    double = TrainingMoments(Theta, S, 0.3, "gradient_flow", repeated)
    assert len(double.eigenvalues) == 2
    assert all(bool(value.isfinite().all()) for value in double.at(torch.tensor([math.inf], dtype=torch.float64)))


SPEC = dict(learning_rate=0.08, steps=30, reduction="sum", at_steps=[0, 10, 30])


def training(outputs=1, scale=1.0):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    y = torch.randn(2, outputs, dtype=torch.float64, generator=generator) * scale
    return x[:2], y, x


def test_nothing_has_moved_at_the_start_and_widths_only_divide():
    x, y, probe = training()
    narrow, wide = (
        predict_representation(ensemble_of("tanh", [3, 2 * n, 3 * n, 1]), x, y, probe, **SPEC) for n in (16, 64)
    )
    assert [layer.width for layer in narrow.layers] == [32, 48]
    for first, second in zip(narrow.layers, wide.layers, strict=True):
        for name in ("kernel_change", "movement", "ntk_change"):
            value = getattr(first, name)
            assert not value[0].any()
            torch.testing.assert_close(value, 4 * getattr(second, name), rtol=1e-12, atol=0)
            torch.testing.assert_close(value, value.mT, rtol=0, atol=1e-14)
        assert float(torch.linalg.eigvalsh(first.movement).min()) > -1e-15
        torch.testing.assert_close(first.kernel_infinite_width, second.kernel_infinite_width)
    statistics = initial_statistics(ensemble_of("tanh", [3, 32, 48, 1]), probe, statistics=("G1", "Theta1"))
    ntk = statistics[1].Theta + statistics[1].Theta1 / 32
    torch.testing.assert_close(narrow.layers[1].ntk_mean, ntk)
    mean = narrow.layers[1].kernel_mean  # K^(3) + G1^(3) / n_2 = C_b + C_W E[g^(2)]
    torch.testing.assert_close(C_B[2] + C_W[2] * mean, statistics[2].K + statistics[2].G1 / 48)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_two_outputs_against_a_sum_over_combined_indices(reduction):
    """Index b = (output, input): p = P e and q = Q e e stepped as tensors, deltas written out."""
    x, y, probe = training(outputs=2)
    ensemble = ensemble_of("tanh", [3, 16, 24, 2])
    rate, steps = 0.08 * (1.0 if reduction == "sum" else 2 / 4), 9
    spec = dict(learning_rate=0.08, steps=steps, reduction=reduction, at_steps=[steps])
    forecast = predict_representation(ensemble, x, y, probe, **spec)
    last = initial_statistics(ensemble, x, statistics=())[-1]
    one = torch.eye(2, dtype=torch.float64)
    H, K = (torch.kron(one, matrix) for matrix in (last.Theta, last.K))
    target = y.T.reshape(-1)
    second_moment = K + torch.outer(target, target)  # E e e
    M = len(target)
    e, P, Q = torch.eye(M, dtype=torch.float64), torch.zeros(M, M), torch.zeros(M, M, M, M)
    P, Q = P.double(), Q.double()
    for _ in range(steps):  # e, p linear in e(0), q bilinear
        Q = Q - rate * torch.einsum("bi,cj->bcij", e, P)
        P = P - rate * e
        e = e - rate * H @ e
    pp = P @ second_moment @ P.T
    q = torch.einsum("bcij,ij->bc", Q, second_moment)

    def combined(tensor):
        return torch.einsum("ij,abcd->abicjd", one, tensor).reshape(len(probe), len(probe), M, M)

    for name, observable in (("kernel_change", "activations"), ("ntk_change", "ntk")):
        for layer, found in zip(
            forecast.layers, representation_statistics(ensemble, x, probe, observable=observable), strict=True
        ):
            expected = torch.einsum("abcd,cd->ab", combined(found.Xi), P)
            expected = expected + torch.einsum("abcd,cd->ab", combined(found.Y), q)
            expected = (expected + torch.einsum("abcd,cd->ab", combined(found.C), pp) / 2) / found.divisor
            torch.testing.assert_close(getattr(layer, name)[0], expected, rtol=0, atol=1e-13)
            if observable == "activations":
                moved = torch.einsum("abcd,cd->ab", combined(found.Mv), pp) / found.divisor
                torch.testing.assert_close(layer.movement[0], moved, rtol=0, atol=1e-13)


def test_repeated_inputs_are_as_nearly_repeated_ones():
    x, y, probe = training()
    ensemble = ensemble_of("tanh", [3, 16, 24, 1])
    again, nearly = (
        predict_representation(
            ensemble, torch.cat([x[:1], extra]), torch.cat([y[:1], y[:1]]), probe[[2, 2]], **SPEC, ntk=False
        )
        .layers[1]
        .kernel_change
        for extra in (x[:1], x[:1] + 1e-5)
    )
    torch.testing.assert_close(again, nearly, rtol=1e-3, atol=0)
    assert torch.equal(again[:, 0, 0], again[:, 0, 1])


@pytest.mark.slow
def test_sampled_moments_agree_with_integrated_ones_and_tiles_fit():
    """Five inputs, sampled; three of them, integrated; and the same sample tile by tile."""
    x = inputs(5)
    ensemble = ensemble_of("tanh", [3, 16, 24, 1])
    sampled = representation_statistics(ensemble, x[2:], x[:2], num_samples=2**12)
    exact = representation_statistics(ensemble, x[2:4], x[:1])
    for found, expected in zip(sampled, exact, strict=True):
        for key in ("Xi", "Y", "C", "Mv"):
            rms = float((getattr(found, key)[:1, :1, :2, :2] - getattr(expected, key)).square().mean().sqrt())
            # 4 entries, correlated, about as good as 2 normal deviates, and the error is from 4 replicas.
            assert rms < 4 * found.error[key], f"{key}: {rms:.2g}, estimated {found.error[key]:.2g}"
    y = torch.ones(3, 1, dtype=torch.float64)
    whole, tiled = (
        predict_representation(ensemble, x[2:], y, x[:3], **SPEC, num_samples=1024, num_replicas=2, memory=memory)
        for memory in (2**30, 8 * 64 * 3 * 9)
    )
    for first, second in zip(whole.layers, tiled.layers, strict=True):
        torch.testing.assert_close(first.kernel_change, second.kernel_change, rtol=0, atol=first.error["kernel_change"])
        torch.testing.assert_close(first.ntk_mean, second.ntk_mean)


def test_it_says_where_it_holds():
    x, y, probe = training()
    calm = predict_representation(ensemble_of("tanh", [3, 256, 256, 1]), x, y, probe, **SPEC, ntk=False)
    assert calm.validity.flag == "valid"
    large = predict_representation(ensemble_of("tanh", [3, 256, 256, 1]), x, 30 * y, probe, **SPEC, ntk=False)
    assert large.validity.flag == "invalid" and "smaller targets" in large.validity.reason
    twins = torch.stack([x[0], x[0] + 0.1 * x[1]])  # the terms of the drift nearly cancel
    near = predict_representation(ensemble_of("tanh", [3, 256, 256, 1]), twins, y, twins, **SPEC, ntk=False)
    assert max(layer.uncertainty for layer in near.layers) > max(layer.uncertainty for layer in calm.layers)
    assert "cancel" in near.validity.reason
    assert near.validity.numbers["cancellation"] == max(layer.uncertainty for layer in near.layers)
    deep = predict_representation(ensemble_of("tanh", [3, 2, 2, 1]), x, y, probe, **SPEC, ntk=False)
    assert deep.validity.flag == "invalid" and "r = L/n" in deep.validity.reason
    assert dataclasses.replace(calm, layers=()).layers == ()


def test_a_kink():
    """Kernels move by the delta functions, which automatic differentiation does not see; their NTKs have no drift."""
    x, y, probe = training()
    ensemble = ensemble_of("relu", [3, 64, 64, 1])
    forecast = predict_representation(ensemble, x, y, probe, **SPEC)
    blind = predict_representation(ensemble, x, y, probe, **SPEC, kinks="autograd")
    assert all(layer.ntk_change is None for layer in forecast.layers) and "no drift" in forecast.validity.reason
    assert blind.validity.flag == "caution" and "delta functions" in blind.validity.reason
    for seen, unseen in zip(forecast.layers, blind.layers, strict=True):
        assert bool(seen.kernel_change.isfinite().all()) and unseen.ntk_change is not None
        hidden = (seen.kernel_change - unseen.kernel_change)[-1]
        assert float(hidden.norm()) > 0.01 * float(seen.kernel_change[-1].norm())
        torch.testing.assert_close(seen.movement, unseen.movement)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(observable="weights"), "observable: 'weights'"),
        (dict(at_steps=[]), "at_steps"),
        (dict(at_steps=[40]), "at_steps"),
        (dict(at_steps=[2.5]), "whole steps"),
        (dict(steps=math.inf, at_steps=None), "at_steps"),
        (dict(momentum=0.9), "without momentum"),
        (dict(learning_rate=50.0), "learning_rate: 50"),
        (dict(memory=100), "memory allows"),
    ],
)
def test_it_refuses_in_words(change, words):
    x, y, probe = training()
    with pytest.raises(ValueError, match=words):
        predict_representation(ensemble_of("tanh", [3, 8, 1]), x, y, probe, **(SPEC | change))


def test_without_hidden_layers_there_is_nothing():
    x, y, probe = training()
    assert predict_representation(ensemble_of("tanh", [3, 1]), x, y, probe, **SPEC).layers == ()
    assert representation_statistics(ensemble_of("tanh", [3, 1]), x, probe) == []
