"""The first step of sign descent and of Adam, against networks drawn and stepped by torch."""

import math

import pytest
import torch
from torch import nn

from torch_eft import theory

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PROBE = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
E = torch.randn(4, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
C_b, C_W = 0.3, 1.4


def ensemble(*hidden, activation="tanh"):
    widths = [3, *hidden, 2]
    return theory.MLPEnsemble(widths, activation, C_b=C_b, C_W=C_W, lambda_W=[float(n) for n in widths[:-1]])


def steps(hidden, count, activation=torch.tanh, adam=False, eta=1e-6):
    """Changes of the outputs on the probe over eta, (networks, N_p, n_L), by torch alone."""
    generator = torch.Generator().manual_seed(7)
    widths = [3, *hidden, 2]
    changes = []
    for _ in range(count):
        theta = []
        for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
            theta.append(torch.randn(n_out, n_in, generator=generator, dtype=torch.float64) * math.sqrt(C_W / n_in))
            theta.append(torch.randn(n_out, generator=generator, dtype=torch.float64) * math.sqrt(C_b))
        theta = [nn.Parameter(value) for value in theta]

        def outputs(x, theta=theta):
            for layer in range(len(widths) - 1):
                x = x if layer == 0 else activation(x)
                x = x @ theta[2 * layer].T + theta[2 * layer + 1]
            return x

        before = outputs(PROBE).detach()
        (outputs(X) * E).sum().backward()
        if adam:
            torch.optim.Adam(theta, lr=eta, eps=1e-16).step()
        else:
            with torch.no_grad():
                for p in theta:
                    p -= eta * p.grad.sign()
        changes.append((outputs(PROBE).detach() - before) / eta)
    return torch.stack(changes)


def agree(found, measured, sigmas=4.0):
    error = (measured.std(0).square() / len(measured) + found.error.square()).sqrt()
    assert bool(((measured.mean(0) - found.change).abs() < sigmas * error).all()), (
        measured.mean(0),
        found.change,
        error,
    )
    return float((error / found.change.abs()).median())


@pytest.mark.parametrize("hidden", [(), (48,), (48, 40)], ids=str)
def test_the_mean_step_of_drawn_networks(hidden):
    found = theory.predict_sign_step(ensemble(*hidden), X, E, PROBE, learning_rate=1.0)
    agree(found, steps(hidden, 40))
    torch.testing.assert_close(found.parts.sum(0), found.change)
    assert found.names == tuple(
        f"{kind} {layer}" for layer in range(1, len(hidden) + 2) for kind in ("weights", "biases")
    )
    assert found.width_exponent == {0: 0.0, 1: 1.0, 2: 1.5}[len(hidden)]
    few = {"learning_rate": 1.0, "num_samples": 64, "num_replicas": 2}
    other = [theory.predict_sign_step(ensemble(*hidden), X, factor * E, PROBE, **few).change for factor in (1, 8)]
    assert torch.equal(*other)  # the direction of the errors alone counts


def test_each_layer_grows_with_its_own_power_of_the_width():
    few = {"learning_rate": 1.0, "num_samples": 64, "num_replicas": 2}
    small, large = (theory.predict_sign_step(ensemble(n, n), X, E, PROBE, **few) for n in (100, 400))
    growth = dict(zip(small.names, (large.parts / small.parts).flatten(1).mean(1).log() / math.log(4), strict=True))
    expected = {"weights 1": 0.5, "biases 1": 0.5, "weights 2": 1.5, "biases 2": 0.5, "weights 3": 1.0, "biases 3": 0.0}
    assert growth == pytest.approx(expected)
    assert "eta must fall as n^-1.5" in small.validity.reason


@pytest.mark.slow
def test_adams_first_step_of_many_seeds():
    """n = 32 to 256; the change of single networks scatters as 1/sqrt(n)."""
    spreads = []
    for n in (32, 128, 256):
        found = theory.predict_sign_step(ensemble(n, n), X, E, PROBE, learning_rate=1.0, num_replicas=64)
        measured = steps((n, n), 150, adam=True)
        assert agree(found, measured, 4.5) < 0.1
        spreads.append(float(measured.std(0).norm() / measured.mean(0).norm()))
    assert spreads[0] / spreads[2] == pytest.approx(8**0.5, rel=0.35)
    relu = theory.predict_sign_step(ensemble(128, 128, 128, activation="relu"), X, E, PROBE, learning_rate=1.0)
    agree(relu, steps((128, 128, 128), 150, torch.relu), 4.5)


def test_wrong_arguments_are_answered_in_words(tmp_path):
    one = ensemble(8)
    found = theory.predict_sign_step(one, X, E, PROBE, learning_rate=1.0, num_samples=8)
    found.save(tmp_path / "step.npz")
    assert torch.equal(theory.SignStep.load(tmp_path / "step.npz").change, found.change)
    with pytest.raises(ValueError, match=r"errors: \(4, 1\) given; give dL/dz on the training inputs, \(4, 2\)"):
        theory.predict_sign_step(one, X, E[:, :1], PROBE, learning_rate=1.0)
    with pytest.raises(ValueError, match="errors: all 0"):
        theory.predict_sign_step(one, X, 0 * E, PROBE, learning_rate=1.0)
    uniform = theory.MLPEnsemble([3, 8, 2], "tanh", weight_law="uniform")
    with pytest.raises(ValueError, match="not Gaussian"):
        theory.predict_sign_step(uniform, X, E, PROBE, learning_rate=1.0)
    with pytest.raises(ValueError, match="num_replicas: 1 of"):
        theory.predict_sign_step(one, X, E, PROBE, learning_rate=1.0, num_replicas=1)
