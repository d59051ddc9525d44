"""Activations: derivatives against finite differences, the registry, error messages."""

import pytest
import torch

from torch_eft.theory import (
    Activation,
    MLPEnsemble,
    available_activations,
    get_activation,
    initial_statistics,
    leaky_relu,
    register_activation,
)


@pytest.mark.parametrize("name", [n for n in available_activations() if n not in ("relu", "leaky_relu")])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_derivatives_agree_with_central_differences(name, order):
    sigma = get_activation(name)
    z = torch.linspace(-2.3, 2.4, 9, dtype=torch.float64)
    h = 1e-4
    slope = (sigma(z + h, order - 1) - sigma(z - h, order - 1)) / (2 * h)
    # Truncation h^2 f'''/6 and rounding 1e-16/h, for derivatives of order-one size.
    torch.testing.assert_close(sigma(z, order), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_derivatives_in_closed_form_are_those_of_automatic_differentiation(name):
    sigma = get_activation(name)
    z = torch.linspace(-7, 7, 57, dtype=torch.float64)
    for order in range(1, 7):
        exact = Activation("the same", sigma.function)(z, order)
        torch.testing.assert_close(sigma(z, order), exact, rtol=0, atol=1e-14 * float(exact.abs().max()))


@pytest.mark.parametrize("negative_slope", [0.0, 0.01, 0.3])
def test_kinked_activations_have_their_slopes_on_either_side(negative_slope):
    sigma = leaky_relu(negative_slope)
    z = torch.tensor([-2.0, -0.1, 0.1, 2.0])
    torch.testing.assert_close(sigma(z, 1), torch.tensor([negative_slope, negative_slope, 1.0, 1.0]))
    assert not sigma(z, 2).any()
    assert sigma.kinked
    assert not get_activation("linear").kinked


def test_derivatives_work_under_no_grad_and_inference_mode():
    z = torch.linspace(-1, 1, 5)
    expected = get_activation("tanh")(z, 1)
    with torch.no_grad():
        torch.testing.assert_close(get_activation("tanh")(z, 1), expected)
    with torch.inference_mode():
        torch.testing.assert_close(get_activation("tanh")(torch.linspace(-1, 1, 5), 1), expected)


def test_registered_names_are_known_everywhere():
    register_activation(Activation("cubic_for_test", lambda z: z**3))
    ensemble = MLPEnsemble([2, 8, 1], "cubic_for_test")
    x = torch.tensor([[1.0, 1.0]])
    # <z^6>_{K=1} = 15
    assert float(initial_statistics(ensemble, x, statistics=("K", "Theta"))[-1].K) == pytest.approx(15.0, rel=1e-11)
    with pytest.raises(ValueError, match=r"cubic_for_test.*taken"):
        register_activation(Activation("cubic_for_test", torch.tanh))


@pytest.mark.parametrize(
    ("given", "name"), [("Tanh", "tanh"), ("ReLU", "relu"), ("LeakyReLU", "leaky_relu"), ("GELU", "gelu")]
)
def test_names_are_known_in_any_case(given, name):
    assert get_activation(given) is get_activation(name)


def test_unknown_activation_lists_what_there_is():
    with pytest.raises(ValueError, match=r"activation: 'tahn' given \(did you mean 'tanh'\?\); give one of .*tanh"):
        get_activation("tahn")
    with pytest.raises(TypeError, match="activation: expected a name or an elementwise function, got int"):
        get_activation(3)
