"""Layer-wise learning rates against sampled networks' gradients; the step bound against actual trainings."""

import math

import pytest
import torch

import torch_eft as eft
from tests.oracles.models import mlp
from torch_eft.theory import MLPEnsemble, get_activation, initial_statistics
from torch_eft.theory.estimates.learning_rates import (
    equivalence_learning_rates,
    largest_learning_rate,
    layer_gains,
    layer_shares,
)
from torch_eft.theory.gaussian.quadrature import RELATIVE_ERROR

X = torch.tensor([[1.0, -0.5, 0.7], [0.2, 0.1, 2.0], [-1.0, 0.3, 0.4]], dtype=torch.float64)
ENSEMBLES = {
    "relu": MLPEnsemble([3, 40, 20, 30, 2], "relu", C_b=0.0, C_W=2.0),
    "tanh": MLPEnsemble([3, 20, 30, 10, 1], "tanh", C_b=[0.1, 0.0, 0.2, 0.3], C_W=[1.0, 1.4, 0.8, 2.0]),
    "gelu": MLPEnsemble([3, 30, 30, 30, 30, 30, 1], "gelu", C_b=0.17, C_W=1.98),
    "linear, one layer": MLPEnsemble([3, 2], "linear"),
}


@pytest.mark.parametrize("name", list(ENSEMBLES))
@pytest.mark.parametrize("count", [1, 3])
def test_equal_shares_sum_to_theta(name, count):
    """The recursion of the NTK (PDLT 8.2), run with these rates, gives T_b + T_W, in equal parts.

    A smooth activation enters each layer with two moments, each of them integrated to RELATIVE_ERROR.
    """
    x, depth = X[:count], ENSEMBLES[name].depth
    closed_form = ENSEMBLES[name].activation.slopes is not None
    rates = equivalence_learning_rates(ENSEMBLES[name], x, total_b=0.7, total_W=2.5)
    Theta = initial_statistics(rates.ensemble, x, statistics=("K", "Theta"))[-1].Theta.diagonal().mean()
    assert float(Theta) == pytest.approx(3.2, rel=1e-13 if closed_form else 2 * depth * RELATIVE_ERROR)
    assert rates.Theta == pytest.approx(3.2)
    biases, weights = layer_shares(rates.ensemble, x)
    torch.testing.assert_close(biases, torch.full((depth,), 0.7 / depth, dtype=torch.float64), rtol=1e-13, atol=0)
    torch.testing.assert_close(weights, torch.full((depth,), 2.5 / depth, dtype=torch.float64), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", list(ENSEMBLES))
def test_shares_of_any_rates_sum_to_theta(name):
    given = ENSEMBLES[name]
    depth = given.depth
    ensemble = MLPEnsemble(
        given.widths,
        given.activation,
        C_b=given.C_b,
        C_W=given.C_W,
        lambda_b=[0.5 + index for index in range(depth)],
        lambda_W=[2.0 / (1 + index) for index in range(depth)],
    )
    Theta = initial_statistics(ensemble, X, statistics=("K", "Theta"))[-1].Theta.diagonal().mean()
    assert float(sum(part.sum() for part in layer_shares(ensemble, X))) == pytest.approx(
        float(Theta), rel=2 * depth * RELATIVE_ERROR
    )


def _sampled_shares(rates, x, networks, seed=0):
    """lr_b |dz_1/db|^2 and lr_W |dz_1/dW|^2 by autograd, (L, networks) each; gradients meet the torch rates alone."""
    ensemble, generator = rates.ensemble, torch.Generator().manual_seed(seed)
    parameters, signal = [], x.expand(networks, 1, -1)
    for index in range(ensemble.depth):
        n_in, n_out = ensemble.widths[index : index + 2]
        normal = {"dtype": torch.float64, "generator": generator}
        W = torch.randn(networks, n_in, n_out, **normal) * math.sqrt(ensemble.C_W[index] / n_in)
        b = torch.randn(networks, 1, n_out, **normal) * math.sqrt(ensemble.C_b[index])
        parameters += [b.requires_grad_(), W.requires_grad_()]
        signal = torch.baddbmm(b, signal if index == 0 else ensemble.activation.function(signal), W)
    gradients = torch.autograd.grad(signal[:, 0, 0].sum(), parameters)
    squares = [gradient.square().sum((1, 2)) for gradient in gradients]
    return (
        torch.stack([lr * square for lr, square in zip(rates.lr_b, squares[::2], strict=True)]),
        torch.stack([lr * square for lr, square in zip(rates.lr_W, squares[1::2], strict=True)]),
    )


def test_every_layer_of_sampled_relu_networks_contributes_equally():
    """Without biases the mean NTK of one input has no 1/n correction, so narrow networks are no excuse."""
    rates = equivalence_learning_rates(ENSEMBLES["relu"], X[:1], total_b=4.0, total_W=8.0)
    for share, expected in zip(_sampled_shares(rates, X[:1], 4000), (1.0, 2.0), strict=True):
        error = share.std(1) / math.sqrt(share.shape[1])
        assert bool(((share.mean(1) - expected).abs() <= 4 * error + 1e-12).all())
        assert float(error.max()) < 0.03 * expected


@pytest.mark.slow
def test_every_layer_of_sampled_tanh_networks_contributes_equally():
    """Shares have corrections of order 1/n: two widths, extrapolated."""
    means, errors = [], []
    for width, networks in ((24, 8000), (48, 8000)):
        ensemble = MLPEnsemble([3, width, width, width, 1], "tanh", C_b=0.1, C_W=1.3)
        rates = equivalence_learning_rates(ensemble, X[:1], total_b=4.0, total_W=4.0)
        share = torch.cat(_sampled_shares(rates, X[:1], networks, seed=width))
        means.append(share.mean(1))
        errors.append(share.std(1) / math.sqrt(networks))
    error = (2 * errors[1]).hypot(errors[0])
    assert bool(((2 * means[1] - means[0] - 1).abs() <= 4 * error + 1e-12).all())
    assert float(error.max()) < 0.03


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "linear", "abs"])
def test_scale_invariant_rates_are_one_over_depth(name):
    """At criticality J = 1 and C_W g = K (PDLT 9.4): lambda_b = T_b / L, lambda_W = T_W C_W / (L K)."""
    A_2 = sum(slope**2 for slope in get_activation(name).slopes) / 2
    ensemble = MLPEnsemble([2, *[10] * 19, 1], name, C_W=1 / A_2)
    rates = equivalence_learning_rates(ensemble)
    K = 1 / A_2
    assert rates.lambda_b == pytest.approx([1 / 20] * 20, rel=1e-12)
    assert rates.lambda_W == pytest.approx([1 / 20] + [1 / A_2 / K / 20] * 19, rel=1e-12)
    assert rates.lr_W == pytest.approx([1 / 40] + [1 / 200] * 19, rel=1e-12)


def test_tanh_rates_fall_as_one_over_layer():
    """K* = 0 (PDLT 9.4) with p_perp = b_1 / a_1 = 1: J_l ~ l / L and g ~ 1 / (2 l), so lambda_b -> T_b / l and
    lambda_W -> 2 T_W. Both hold up to log(l) / l, from K = 1 / (2 l + O(log l))."""
    L = 1500
    rates = equivalence_learning_rates(MLPEnsemble([1, *[4] * (L - 1), 1], "tanh"))
    for layer in (300, 600, 1200):
        drift = 3 * math.log(layer) / layer
        assert rates.lambda_b[layer - 1] * layer == pytest.approx(1, rel=drift)
        assert rates.lambda_W[layer - 1] == pytest.approx(2, rel=2 * drift)
    slope = math.log(rates.lambda_b[1199] / rates.lambda_b[299]) / math.log(4)
    assert slope == pytest.approx(-1, abs=0.02)


def test_gains_of_relu_by_hand():
    """C_W = 1: K halves each layer, and chi_perp = 1/2."""
    gains = layer_gains(MLPEnsemble([1, 5, 5, 5, 1], "relu", C_W=1.0), torch.tensor([[2.0]]))
    assert gains.K.flatten().tolist() == pytest.approx([4, 2, 1, 0.5])
    assert gains.g.flatten().tolist() == pytest.approx([4, 2, 1, 0.5])
    assert gains.J.flatten().tolist() == pytest.approx([1 / 8, 1 / 4, 1 / 2, 1])


def test_no_rates_for_layers_that_nothing_reaches():
    with pytest.raises(ValueError, match=r"signal times gradient at layer 1 .* is 0"):
        equivalence_learning_rates(MLPEnsemble([3, 5, 1], "tanh", C_b=0.1), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"gradient at layer 1 .* is 0"):
        equivalence_learning_rates(MLPEnsemble([3, *[5] * 600, 1], "relu", C_b=0.1, C_W=0.5))
    with pytest.raises(ValueError, match="total_b: -1 given"):
        equivalence_learning_rates(MLPEnsemble([3, 5, 1], "tanh"), total_b=-1)


def _losses(model, x, y, eta, steps, reduction):
    """Plain torch training; (1/2) sum for "sum", MSELoss for "mean"."""
    optimizer = torch.optim.SGD(model.parameters(), lr=eta)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        error = model(x) - y
        loss = error.square().sum() / 2 if reduction == "sum" else torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_bound_of_a_linear_model_is_sharp(reduction):
    """z = b + W x is its own linearization at any width: the top mode contracts below the bound and grows above it.

    Targets along the top eigenvector: the loss is multiplied by (1 - 2 eta / bound)^2 each step.
    """
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ensemble = MLPEnsemble([3, 2], "linear", lambda_b=1.0, lambda_W=[3.0])
    bound = largest_learning_rate(ensemble, x, reduction=reduction)
    top = torch.linalg.eigh(x @ x.T + 1)[1][:, -1:]
    for factor in (0.5, 0.95, 1.05):
        model = torch.nn.Linear(3, 2).double()
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        losses = _losses(model, x, top.expand(6, 2), factor * bound, 10, reduction)
        gain = (1 - 2 * factor) ** 2
        assert losses[-1] / losses[0] == pytest.approx(gain**9, rel=1e-9, abs=1e-25)


def test_bound_is_that_of_a_wide_networks_ntk():
    """Measured lambda_max of a network of width n against infinite width: relative fluctuation of order n^(-1/2).

    The bound of the measured kernel, taken over all outputs, is the linear stability limit of that very network:
    its loss, aimed at the top eigenvector, falls just below it and rises just above.
    """
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    width = 1024
    model = mlp((4, width, width, 2), torch.nn.Tanh).double()
    for layer in model[::2]:
        torch.nn.init.normal_(layer.weight, std=math.sqrt(1.5 / layer.in_features))
        torch.nn.init.normal_(layer.bias, std=math.sqrt(0.1))
    widths = [4, width, width, 2]
    bound = largest_learning_rate(
        MLPEnsemble(widths, "tanh", C_b=0.1, C_W=1.5, lambda_b=1.0, lambda_W=widths[:-1]), x, reduction="mean"
    )
    H = eft.measure.as_matrix(eft.measure.ntk(model, x))
    measured = largest_learning_rate(H, reduction="mean", outputs=1)
    assert measured == pytest.approx(bound, rel=4 / math.sqrt(width))
    assert measured == pytest.approx(10 / float(eft.measure.top_eigenvalue(H)), rel=1e-12)
    top = torch.linalg.eigh(H.double())[1][:, -1].reshape(5, 2)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for factor, falls in ((0.9, True), (1.1, False)):
        model.load_state_dict(start)
        # A small error keeps the network in its linear regime.
        losses = _losses(model, x, model(x).detach() + 1e-3 * top, factor * measured, 6, "mean")
        assert losses[-1] / losses[0] == pytest.approx((1 - 2 * factor) ** 10, rel=0.05)
        assert (losses[-1] < losses[0]) is falls


def test_bound_without_inputs_is_safe_for_any_number():
    """lambda_max <= trace: N inputs on the sphere |x|^2 = n_0 allow at least what one of them does, under the mean."""
    ensemble = MLPEnsemble([3, 50, 50, 2], "tanh", C_b=0.0, C_W=1.0, lambda_b=1.0, lambda_W=[3, 50, 50])
    x = torch.nn.functional.normalize(torch.randn(20, 3, generator=torch.Generator().manual_seed(0))) * math.sqrt(3)
    single = largest_learning_rate(ensemble, reduction="mean")
    assert single <= largest_learning_rate(ensemble, x, reduction="mean")
    assert single == pytest.approx(largest_learning_rate(ensemble, x[:1].repeat(7, 1), reduction="mean"), rel=1e-6)


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_bound_of_one_input_is_two_over_theta(name):
    """Without inputs Theta is summed over layers; with one of |x|^2 = n_0 it comes from the recursion."""
    ensemble = ENSEMBLES[name]
    Theta = float(initial_statistics(ensemble, torch.ones(1, 3), statistics=("K", "Theta"))[-1].Theta)
    assert largest_learning_rate(ensemble, reduction="sum") == pytest.approx(2 / Theta, rel=1e-11)
    assert largest_learning_rate(ensemble) == pytest.approx(ensemble.widths[-1] / Theta, rel=1e-11)


def test_bound_of_nothing_that_trains_is_infinite():
    assert largest_learning_rate(MLPEnsemble([3, 5, 1], "tanh", lambda_b=0.0, lambda_W=0.0)) == math.inf


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.eye(2),), dict(reduction="median"), "reduction: 'median' given"),
        ((torch.eye(2),), {}, "outputs: None given"),
        ((torch.eye(2), torch.zeros(2, 3)), {}, "x: given together with a kernel"),
        ((torch.zeros(2, 3),), {}, r"Theta: shape \(2, 3\) given"),
        ((torch.full((1, 1), math.nan),), dict(reduction="sum"), "NaN or infinite"),
        ((ENSEMBLES["tanh"],), dict(outputs=3), "outputs: 3 given with an ensemble of 1"),
        ((ENSEMBLES["tanh"], torch.zeros(2, 4)), {}, r"x: \(2, 4\) given"),
    ],
)
def test_unusable_arguments_of_the_bound(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        largest_learning_rate(*arguments, **options)
