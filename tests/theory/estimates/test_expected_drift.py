"""The expected drift of the NTK: against the general theory of training, and against networks really trained."""

import math

import pytest
import torch
from torch.func import grad, jacrev, vmap

from torch_eft.theory import MLPEnsemble, initial_statistics, predict_training
from torch_eft.theory.estimates.expected_drift import DEEPEST, expected_drift


@pytest.mark.parametrize("name", ["tanh", "gelu"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_it_is_the_one_mode_case_of_the_general_theory(name, outputs):
    ensemble = MLPEnsemble([6, 20, 35, outputs], name, C_b=0.1, C_W=[1.3, 0.9, 1.8], lambda_b=0.7, lambda_W=[6, 2, 3])
    x = torch.linspace(-1, 2, 6, dtype=torch.float64)[None]
    found = expected_drift(ensemble, x)
    drifts = []
    for y in (0.0, 1.0):
        trained = predict_training(
            ensemble,
            x,
            torch.full((1, outputs), y),
            x,
            learning_rate=1e-3,
            steps=10**6,
            reduction="sum",
            dynamics="gradient_flow",
            at_steps=[10**6],
        )
        drift = trained.ntk_change[-1, 0, 0].diagonal().mean()
        drifts.append(float(drift / initial(ensemble, x)))
    assert found.at_rest == pytest.approx(drifts[0], rel=1e-6)
    assert found.unit_targets == pytest.approx(drifts[1], rel=1e-6)
    assert found.per_loss == pytest.approx((drifts[1] - drifts[0]) / (outputs / 2), rel=1e-5)
    assert found.size == abs(found.unit_targets)


def initial(ensemble, x):
    return float(initial_statistics(ensemble, x, statistics=("Theta",))[-1].Theta)


def trained_drift(name, C_W, depth, width, seeds):
    """Relative drift of tr H of ``seeds`` networks fitted to one input, y = 1, in small steps of gradient descent."""
    widths = [10, *[width] * (depth - 1), 2]
    ensemble = MLPEnsemble(widths, name, C_W=C_W)
    x, sigma = torch.ones(10, dtype=torch.float64), ensemble.activation.function

    def network(parameters):
        s = x
        for index in range(depth):
            z = parameters[2 * index] @ s / math.sqrt(widths[index]) + parameters[2 * index + 1]
            s = sigma(z)
        return z

    def trace(parameters):
        return sum(part.square().sum() for part in jacrev(network)(parameters)) / 2

    generator = torch.Generator().manual_seed(0)
    parameters = []
    for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
        weight = torch.randn(seeds, n_out, n_in, generator=generator, dtype=torch.float64)
        parameters += [weight * math.sqrt(C_W), torch.zeros(seeds, n_out, dtype=torch.float64)]
    parameters = tuple(parameters)
    before = vmap(trace)(parameters)
    step = vmap(grad(lambda p: (network(p) - 1).square().sum() / 2))
    for _ in range(60):
        slopes = step(parameters)
        parameters = tuple(p - 0.15 / before.mean() * g for p, g in zip(parameters, slopes, strict=True))
    return (vmap(trace)(parameters) - before) / before.mean(), expected_drift(ensemble, x[None])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "C_W"), [("tanh", 1.0), ("gelu", 2.0)])
def test_trained_networks_drift_by_it(name, C_W):
    """The mean over 150 networks, within three standard errors and a next order of relative size r + motion."""
    drift, found = trained_drift(name, C_W, depth=4, width=64, seeds=150)
    error = float(drift.std()) / math.sqrt(len(drift))
    next_order = float(drift.square().mean().sqrt()) * (4 / 64 + found.motion)
    assert abs(float(drift.mean()) - found.unit_targets) < 3 * error + next_order


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "width"), [(2, 64), (5, 50)])
def test_a_kink_gives_the_order_of_magnitude(depth, width):
    drift, found = trained_drift("relu", 2.0, depth, width, seeds=40)
    assert found.per_loss is None
    assert "kink" in found.validity.reason
    assert 1 / 3 < float(drift.square().mean().sqrt()) / found.size < 3


def test_where_there_is_nothing_to_say():
    assert expected_drift(MLPEnsemble([4, 20, 2], "tanh", lambda_b=0.0, lambda_W=0.0)).size is None
    assert expected_drift(MLPEnsemble([4, 2], "tanh")).size == 0
    deep = expected_drift(MLPEnsemble([4, *[2000] * DEEPEST, 2], "tanh"))
    assert deep.size is None
    assert f"beyond {DEEPEST} layers" in deep.validity.reason
    assert "for kernels beyond" in expected_drift(MLPEnsemble([4, 20, 20, 20, 2], lambda z: z**3)).validity.reason
    assert "preactivations vanish" in expected_drift(MLPEnsemble([4, 20, 2], "tanh"), torch.zeros(1, 4)).validity.reason
    with pytest.raises(ValueError, match="2 inputs given"):
        expected_drift(MLPEnsemble([4, 20, 2], "tanh"), torch.randn(2, 4))
    assert expected_drift(MLPEnsemble([4, *[3] * 4, 2], "tanh")).validity.flag == "invalid"
