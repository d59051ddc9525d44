"""K and Theta at every layer against closed forms, exact results and sampled networks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_eft.theory import MLPEnsemble, initial_statistics, sample_ntk


def inputs(count: int, n_0: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, n_0, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


HYPERPARAMETERS = dict(C_b=[0.1, 0.2, 0.05], C_W=[1.3, 1.7, 0.9], lambda_b=[0.3, 0.0, 1.0], lambda_W=[1.0, 2.0, 0.5])


def test_deep_linear_networks_have_a_geometric_kernel():
    """sigma = z: K and Theta by hand, with per-layer hyperparameters and unequal widths."""
    x = inputs(4, 5)
    layers = initial_statistics(MLPEnsemble([5, 7, 9, 2], "linear", **HYPERPARAMETERS), x, statistics=("K", "Theta"))
    gram = x @ x.T / 5
    K = [0.1 + 1.3 * gram]
    K.append(0.2 + 1.7 * K[0])
    K.append(0.05 + 0.9 * K[1])
    # Each layer's share of the NTK is carried to the output by the product of the later C_W.
    Theta = (0.3 + 1.0 * gram) * 1.7 * 0.9 + (0.0 + 2.0 * K[0]) * 0.9 + (1.0 + 0.5 * K[1])
    torch.testing.assert_close(layers[2].K, K[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(layers[2].Theta, Theta, rtol=0, atol=1e-12)


def relu_pair(a, b, c):
    angle = math.acos(max(-1.0, min(1.0, c / math.sqrt(a * b))))
    value = math.sqrt(a * b) * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi)
    return value, (math.pi - angle) / (2 * math.pi)


def erf_pair(a, b, c):
    value = 2 / math.pi * math.asin(2 * c / math.sqrt((1 + 2 * a) * (1 + 2 * b)))
    return value, 4 / math.pi / math.sqrt((1 + 2 * a) * (1 + 2 * b) - 4 * c * c)


@pytest.mark.parametrize(("name", "pair"), [("relu", relu_pair), ("erf", erf_pair)])
def test_closed_forms_layer_by_layer(name, pair):
    """The recursion written out entry by entry, in plain Python, with textbook closed forms."""
    x = inputs(4, 5)
    layers = initial_statistics(MLPEnsemble([5, 64, 32, 2], name, **HYPERPARAMETERS), x, statistics=("K", "Theta"))
    gram = (x @ x.T / 5).tolist()
    h = HYPERPARAMETERS
    K = [[h["C_b"][0] + h["C_W"][0] * g for g in row] for row in gram]
    Theta = [[h["lambda_b"][0] + h["lambda_W"][0] * g for g in row] for row in gram]
    for layer in (1, 2):
        moments = [[pair(K[i][i], K[j][j], K[i][j]) for j in range(4)] for i in range(4)]
        Theta = [
            [
                h["lambda_b"][layer]
                + h["lambda_W"][layer] * moments[i][j][0]
                + h["C_W"][layer] * moments[i][j][1] * Theta[i][j]
                for j in range(4)
            ]
            for i in range(4)
        ]
        K = [[h["C_b"][layer] + h["C_W"][layer] * moments[i][j][0] for j in range(4)] for i in range(4)]
        torch.testing.assert_close(layers[layer].K, torch.tensor(K, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(layers[layer].Theta, torch.tensor(Theta, dtype=torch.float64), rtol=0, atol=1e-7)
        # acos near 1 has rounding sqrt(eps) on the diagonal; off it, the closed forms agree to 1e-12.
        off = ~torch.eye(4, dtype=torch.bool)
        torch.testing.assert_close(
            layers[layer].Theta[off], torch.tensor(Theta, dtype=torch.float64)[off], rtol=0, atol=1e-12
        )


def test_critical_relu_keeps_K_and_adds_one_share_a_layer_on_the_diagonal():
    """C_W = 2: K stays, and with lambda_b = 0 Theta grows by lambda_W K / 2 a layer (PDLT 9.2), exactly."""
    x = inputs(3, 6)
    layers = initial_statistics(
        MLPEnsemble([6, 10, 10, 10, 10, 1], "relu", C_W=2.0, lambda_b=0.0, lambda_W=2.0), x, statistics=("K", "Theta")
    )
    K_1 = layers[0].K.diagonal()
    for index, layer in enumerate(layers):
        torch.testing.assert_close(layer.K.diagonal(), K_1, rtol=1e-13, atol=0)
        torch.testing.assert_close(layer.Theta.diagonal(), (index + 1) * K_1, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["tanh", "gelu", "relu"])
def test_sampled_wide_networks_average_to_theta(name):
    """Mean of 40 networks of width 800 within 4 standard errors; its 1/n bias is a seventh of one."""
    ensemble = MLPEnsemble([5, 800, 800, 2], name, C_b=0.1, C_W=1.6, lambda_b=0.3)
    x = inputs(3, 5)
    H = torch.stack(list(sample_ntk(ensemble, x, num_networks=40, seed=1)))
    Theta = initial_statistics(ensemble, x, statistics=("K", "Theta"))[-1].Theta
    expected = torch.einsum("ab,ij->abij", Theta, torch.eye(2, dtype=torch.float64))
    error = H.std(0) / math.sqrt(len(H))
    assert float(((H.mean(0) - expected) / error).abs().max()) < 4.5  # the largest of 36 normal deviates
    assert float(error.max()) < 0.02 * float(Theta.max())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(["tanh", "relu", "gelu", "erf", "sin", "linear", "softplus"]),
    C_W=st.floats(0.2, 3.0),
    C_b=st.floats(0.0, 1.0),
)
def test_kernels_are_symmetric_semidefinite_and_equivariant(seed, name, C_W, C_b):
    x = inputs(5, 3, seed)
    ensemble = MLPEnsemble([3, 20, 30, 2], name, C_b=C_b, C_W=C_W)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    for layer, permuted in zip(
        initial_statistics(ensemble, x, statistics=("K", "Theta")),
        initial_statistics(ensemble, x[order], statistics=("K", "Theta")),
        strict=True,
    ):
        for kernel, other in ((layer.K, permuted.K), (layer.Theta, permuted.Theta)):
            scale = float(kernel.abs().max())
            torch.testing.assert_close(kernel, kernel.T, rtol=0, atol=1e-14 * scale)
            assert float(torch.linalg.eigvalsh(kernel)[0]) > -1e-11 * scale
            torch.testing.assert_close(kernel[order][:, order], other, rtol=0, atol=1e-11 * scale)


def test_statistics_live_where_the_inputs_live():
    """Nothing is created on the default device behind the caller's back."""
    x = inputs(3, 4)
    expected = initial_statistics(MLPEnsemble([4, 8, 8, 2], "tanh"), x, statistics=("K", "Theta"))[-1].Theta
    with torch.device("meta"):  # any tensor made without a device would now have no data
        torch.testing.assert_close(
            initial_statistics(MLPEnsemble([4, 8, 8, 2], "tanh"), x, statistics=("K", "Theta"))[-1].Theta, expected
        )


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3, 4), r"x: \(3, 4\) given; widths\[0\] = 5 asks for a tensor of shape \(N, 5\)"),
        (torch.ones(0, 5), r"x: \(0, 5\) given"),
        (torch.ones(5), r"x: \(5,\) given"),
        ([[1.0] * 5], r"x: list given"),
        (torch.full((2, 5), math.nan), r"x: contains NaN or infinite values"),
    ],
)
def test_unusable_inputs_are_named(x, message):
    with pytest.raises(ValueError, match=message):
        initial_statistics(MLPEnsemble([5, 8, 1], "tanh"), x, statistics=("K", "Theta"))
