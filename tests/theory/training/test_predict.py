"""The trained distribution at infinite width: against plain steps, kernel regression and trained networks."""

import math
import sys

import pytest
import torch

from tests.oracles.ensembles import draw, train
from torch_eft import Training
from torch_eft.theory import FrozenTraining, MLPEnsemble, initial_statistics, predict_training
from torch_eft.theory.initialization.infinite_width import infinite_width

ENSEMBLE = MLPEnsemble([3, 64, 64, 2], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3, lambda_W=1.0)


def data(train_points=4, probe_points=2):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(train_points + probe_points, 3, dtype=torch.float64, generator=generator)
    y = torch.randn(train_points, 2, dtype=torch.float64, generator=generator)
    return x[:train_points], y, x[train_points:]


def step_by_step(x, y, x_probe, rate, steps):
    """z <- z - rate Theta (z - y), applied to the mean and to a square root of the covariance."""
    last = initial_statistics(ENSEMBLE, torch.cat([x_probe, x]), statistics=("K", "Theta"))[-1]
    probe, total = len(x_probe), len(x_probe) + len(x)
    mean, response = torch.zeros(total, 2, dtype=torch.float64), torch.eye(total, dtype=torch.float64)
    means, covariances = [], []
    for _ in range(steps + 1):
        means.append(mean[:probe])
        covariances.append((response @ last.K @ response.T)[:probe, :probe])
        mean = mean - rate * last.Theta[:, probe:] @ (mean[probe:] - y)
        response = response - rate * last.Theta[:, probe:] @ response[probe:]
    return torch.stack(means), torch.stack(covariances)


@pytest.mark.parametrize(("reduction", "factor"), [("sum", 1.0), ("mean", 2 / 8)])
def test_closed_form_equals_step_by_step_integration(reduction, factor):
    x, y, x_probe = data()
    training = Training(learning_rate=0.15, steps=40, reduction=reduction)
    prediction = predict_training(ENSEMBLE, x, y, x_probe, training, order=0)
    means, covariances = step_by_step(x, y, x_probe, 0.15 * factor, 40)
    torch.testing.assert_close(prediction.output_mean, means, rtol=0, atol=1e-12)
    torch.testing.assert_close(prediction.output_covariance[..., 0, 0], covariances, rtol=0, atol=1e-12)
    torch.testing.assert_close(prediction.output_covariance[..., 1, 1], covariances, rtol=0, atol=1e-12)
    assert not prediction.output_covariance[..., 0, 1].any()


def test_long_training_tends_to_kernel_regression():
    """t -> infinity: mean Theta_PA Theta_AA^-1 y, covariance that of z_P - Theta_PA Theta_AA^-1 z_A (PDLT 10.2)."""
    x, y, x_probe = data()
    last = initial_statistics(ENSEMBLE, torch.cat([x_probe, x]), statistics=("K", "Theta"))[-1]
    regression = torch.linalg.solve(last.Theta[2:, 2:], last.Theta[2:, :2]).T
    smallest = float(torch.linalg.eigvalsh(last.Theta[2:, 2:])[0])
    steps = int(40 / (0.15 * smallest))  # e^-40 is left
    training = Training(learning_rate=0.15, steps=steps, reduction="sum")
    prediction = predict_training(ENSEMBLE, x, y, x_probe, training, at_steps=[steps], order=0)
    J = torch.cat([torch.eye(2, dtype=torch.float64), -regression], 1)
    torch.testing.assert_close(prediction.output_mean[0], regression @ y, rtol=0, atol=1e-10)
    torch.testing.assert_close(prediction.output_covariance[0, ..., 0, 0], J @ last.K @ J.T, rtol=0, atol=1e-10)


def test_small_step_descent_tends_to_gradient_flow_linearly():
    x, y, x_probe = data()

    def at_time_20(parts=1, dynamics="gradient_descent"):
        training = Training(learning_rate=0.1 / parts, steps=20 * parts, reduction="sum", dynamics=dynamics)
        return predict_training(ENSEMBLE, x, y, x_probe, training, at_steps=[20 * parts], order=0).output_mean

    flow = at_time_20(dynamics="gradient_flow")
    errors = [float((at_time_20(parts) - flow).norm()) for parts in (2**4, 2**5)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)  # the next order is a part in 2^4 of the first


def test_conflicting_training_points_are_fitted_in_the_mean():
    """Twice the same input with two targets: a null mode of Theta, no division by it."""
    x, y, _ = data()
    x = torch.cat([x, x[:1]])
    y = torch.cat([y, -y[:1]])
    training = Training(learning_rate=0.1, steps=50_000, reduction="sum")
    prediction = predict_training(ENSEMBLE, x, y, x[:1], training, at_steps=[50_000], order=0)
    torch.testing.assert_close(prediction.output_mean[0], torch.zeros(1, 2, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        dict(order=0),
        dict(order=1),
        dict(loss="cross_entropy", num_draws=256, order=0),
        dict(loss="cross_entropy", num_draws=256, order=1),
    ],
    ids=str,
)
def test_the_kernels_at_infinite_width_are_computed_once(options):
    x, y, x_probe = data(2, 1)
    calls = []

    def count(frame, event, argument):
        if event == "call" and frame.f_code is infinite_width.__code__:
            calls.append(frame.f_back.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        predict_training(ENSEMBLE, x, y.softmax(1), x_probe, learning_rate=0.1, steps=2, **options)
    finally:
        sys.setprofile(before)
    assert len(calls) == 1, calls


@pytest.mark.parametrize("order", [0, 1])
def test_null_modes_of_a_linear_network_move_nothing(order):
    """Four inputs of two features: with X = Q R, Q (4, 2) of orthonormal columns, (1/2) |X W - y|^2 is, up to a
    constant, (1/2) |R W - Q^T y|^2, so that every network trains as on the two inputs in R."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(4, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    x_probe = torch.randn(2, 2, dtype=torch.float64, generator=generator)
    Q, R = torch.linalg.qr(x)
    ensemble = MLPEnsemble([2, 30, 40, 2], "linear", C_b=0.0, C_W=1.0, lambda_b=0.0, lambda_W=1.0)
    training = Training(learning_rate=0.1, steps=10**5, reduction="sum")
    frozen = FrozenTraining(ensemble, x, y, x_probe, training)
    assert len(frozen.eigenvalues) == 2
    options = dict(order=order, at_steps=[0, 3, 60] if order else [0, 3, 10**5])
    degenerate = predict_training(ensemble, x, y, x_probe, training, **options)
    regular = predict_training(ensemble, R, Q.T @ y, x_probe, training, **options)
    for name in ("output_mean", "output_covariance", "ntk_mean", "ntk_change"):
        expected = getattr(regular, name)
        torch.testing.assert_close(getattr(degenerate, name), expected, rtol=1e-11, atol=1e-12, msg=name)
    fitted = torch.linalg.lstsq(x, y).solution
    end = frozen.output(torch.tensor([math.inf]))[0][0]
    torch.testing.assert_close(end, x_probe @ fitted, rtol=1e-10, atol=1e-12)


def test_the_slow_mode_of_near_duplicates_moves():
    """Inputs at distance d have a mode of lambda ~ d^2 that probes feel by d: while it is linear, by d t."""
    ensemble = MLPEnsemble([2, 100, 100, 1], "tanh")
    y, probe = torch.tensor([[1.0], [-1.0], [0.5]]).double(), torch.tensor([[0.2, -1.4]]).double()

    def motion(distance, steps):
        x = torch.tensor([[1.0, 0.3], [1.0, 0.3 + distance], [-0.5, 1.0]]).double()
        training = Training(learning_rate=0.2, steps=steps, reduction="sum")
        mean = predict_training(ensemble, x, y, probe, training, order=0, at_steps=[2000, steps]).output_mean
        return float(mean[1, 0, 0] - mean[0, 0, 0])

    assert motion(1e-6, 10**6) == pytest.approx(motion(1e-5, 10**5), rel=0.05)
    assert motion(1e-6, 10**6) == pytest.approx(motion(1e-6, 10**5) * 10, rel=0.05)


def test_no_steps_are_steps():
    """The number of steps says how far a forecast goes, not how a frozen training moves."""
    frozen = FrozenTraining(
        MLPEnsemble([2, 30, 1], "tanh"),
        torch.eye(2).double(),
        torch.ones(2, 1).double(),
        torch.eye(2).double(),
        Training(learning_rate=0.5, steps=0, reduction="sum"),
    )
    assert frozen.output(torch.tensor([10**6]))[0].flatten().tolist() == pytest.approx([1, 1])


def test_result_holds_what_it_says():
    x, y, x_probe = data()
    prediction = predict_training(ENSEMBLE, x, y, x_probe, learning_rate=0.1, steps=5, order=0)
    assert prediction.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert prediction.output_mean.shape == (6, 2, 2)
    assert prediction.output_covariance.shape == (6, 2, 2, 2, 2)
    assert prediction.ntk_mean.shape == (6, 2, 2, 2, 2)
    Theta = initial_statistics(ENSEMBLE, x_probe, statistics=("K", "Theta"))[-1].Theta
    # Two sets of inputs, so Mehler's series may stop at different terms: each is within 1e-12 of its scale.
    torch.testing.assert_close(prediction.ntk_mean[3, :, :, 1, 1], Theta, rtol=1e-11, atol=0)
    assert not prediction.ntk_change.any()
    assert prediction.validity.flag == "valid"
    assert "r = L/n = 0.0469" in prediction.validity.reason
    assert "order 0" in prediction.provenance


def test_too_deep_a_network_is_declared_invalid():
    x, y, x_probe = data()
    deep = MLPEnsemble([3, *[8] * 20, 2], "relu", C_W=2.0)
    validity = predict_training(deep, x, y, x_probe, learning_rate=0.01, steps=1, reduction="sum", order=0).validity
    assert validity.flag == "invalid"
    assert "Use fewer or wider layers" in validity.reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(learning_rate=-1), r"learning_rate: -1 given; it must be positive"),
        (dict(learning_rate=1e3), r"learning_rate: 1000 given, beyond the linear stability bound"),
        (dict(reduction="max"), r"reduction: 'max' given; give one of 'sum', 'mean'"),
        (dict(dynamics="adam"), r"dynamics: 'adam' given"),
        (dict(batches=[[0, 9]]), r"batches: \[0, 9\] given; each is a list of sample indices"),
        (
            dict(dynamics="gradient_flow", momentum=0.5),
            r"dynamics: 'gradient_flow' is in closed form, for the squared error on full batches without mom",
        ),
        (dict(momentum=1.0), r"momentum: 1.0 given; it must lie in"),
        (dict(nesterov=True), r"nesterov: needs momentum > 0"),
        (dict(schedule=[0.1, 0.2], learning_rate=None), r"schedule: 2 learning rates given for 5 steps"),
        (dict(order=2), r"order: 2 given; give 0 \(infinite width\) or 1"),
        (dict(corrections=("ntk", "spread")), r"corrections: 'spread' given; give one of 'mean', 'covariance', 'ntk'"),
        (dict(corrections=()), r"corrections: none given"),
        (dict(order=1, num_replicas=1), r"num_replicas: 1 given; at least 2"),
        (dict(order=1, memory=1000), r"x_train: 4 points need about 0.0 GiB for vertices .* corrections=\(.ntk.,\)"),
        (dict(y_train=torch.ones(4, 3)), r"y_train: shape \(4, 3\) given; x_train and widths ask for \(4, 2\)"),
        (dict(x_probe=torch.ones(2, 4)), r"x_probe: \(2, 4\) given; widths\[0\] = 3"),
        (dict(at_steps=[7]), r"at_steps: \[7\] given; give whole steps between 0 and steps = 5"),
        (dict(steps=-1), r"steps: -1"),
    ],
)
def test_unusable_arguments_are_named(arguments, message):
    x, y, x_probe = data()
    defaults = dict(x_train=x, y_train=y, x_probe=x_probe, learning_rate=0.1, steps=5, order=0)
    with pytest.raises(ValueError, match=message):
        predict_training(ENSEMBLE, **defaults | arguments)


def test_the_stability_bound_is_where_descent_starts_to_grow():
    x, y, x_probe = data()
    largest = float(torch.linalg.eigvalsh(initial_statistics(ENSEMBLE, x, statistics=("K", "Theta"))[-1].Theta)[-1])
    below, above = (Training(learning_rate=rate / largest, steps=1, reduction="sum") for rate in (1.999, 2.001))
    FrozenTraining(ENSEMBLE, x, y, x_probe, below)
    with pytest.raises(ValueError, match="stability bound"):
        FrozenTraining(ENSEMBLE, x, y, x_probe, above)


@pytest.mark.parametrize(
    ("nesterov", "bound", "formula"),
    [
        (False, 2 * 1.9, r"2 \(1 \+ m\) / lambda_max, momentum m = 0.9"),
        (True, 2 * 1.9 / 2.8, r"2 \(1 \+ m\) / \(\(1 \+ 2 m\) "),
    ],
)
def test_the_stability_bound_with_momentum(nesterov, bound, formula):
    """Beyond it the refusal names it; just below, 3000 steps converge."""
    x, y, x_probe = data()
    largest = float(torch.linalg.eigvalsh(initial_statistics(ENSEMBLE, x, statistics=("K", "Theta"))[-1].Theta)[-1])
    options = dict(steps=3000, reduction="sum", momentum=0.9, nesterov=nesterov)
    training = Training(learning_rate=0.99 * bound / largest, **options)
    last = predict_training(ENSEMBLE, x, y, x_probe, training, at_steps=[2999, 3000], order=0).output_mean
    assert float((last[1] - last[0]).norm() / last[1].norm()) < 1e-3
    with pytest.raises(ValueError, match=rf"beyond the linear stability bound {bound / largest:.4g} \({formula}"):
        predict_training(ENSEMBLE, x, y, x_probe, learning_rate=1.001 * bound / largest, **options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (dict(learning_rate=0.1, momentum=0.8), "gradient descent with momentum 0.8"),
        (dict(learning_rate=0.1, momentum=0.8, nesterov=True), "gradient descent with Nesterov momentum 0.8"),
        (dict(schedule=lambda t: 0.1 / (1 + t)), "learning rates 0.005 to 0.1"),
    ],
)
def test_momentum_and_schedules_move_the_mean_as_torch_does(options, name):
    """The mean output is that of a linear model with kernel Theta on torch.optim.SGD: z = J theta, J J^T = Theta."""
    x, y, x_probe = data()
    prediction = predict_training(ENSEMBLE, x, y, x_probe, steps=20, order=0, **options)
    Theta = initial_statistics(ENSEMBLE, torch.cat([x_probe, x]), statistics=("K", "Theta"))[-1].Theta
    J = torch.linalg.cholesky(Theta)
    theta = torch.zeros(len(J), 2, dtype=torch.float64, requires_grad=True)
    schedule = options.get("schedule", lambda t: 0.1)
    sgd = torch.optim.SGD([theta], 0.1, options.get("momentum", 0), nesterov=options.get("nesterov", False))
    for step in range(21):
        z = J @ theta
        torch.testing.assert_close(prediction.output_mean[step], z[:2].detach(), rtol=0, atol=1e-12)
        sgd.zero_grad()
        torch.nn.functional.mse_loss(z[2:], y).backward()
        sgd.param_groups[0]["lr"] = schedule(step)
        sgd.step()
    assert name in prediction.provenance


def test_too_many_points_say_what_they_would_need():
    x, y, x_probe = data()
    with pytest.raises(ValueError, match=r"x_train: 4 points need about 0.0 GiB, memory allows 0.0 GiB; give fewer"):
        FrozenTraining(ENSEMBLE, x, y, x_probe, Training(learning_rate=0.1, steps=1), memory=1000)


def test_prediction_lives_where_the_data_live():
    x, y, x_probe = data()
    options = dict(learning_rate=0.1, steps=5, order=0)
    expected = predict_training(ENSEMBLE, x, y, x_probe, **options).output_mean
    with torch.device("meta"):
        actual = predict_training(ENSEMBLE, x, y, x_probe, at_steps=[5], **options).output_mean
    torch.testing.assert_close(actual[0], expected[-1])


def _against_trained_networks(width, networks, batch, steps, record):
    """z-scores of mean and covariance against networks really trained; standard errors from the networks."""
    widths = [3, width, width, 2]
    ensemble = MLPEnsemble(widths, "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3, lambda_W=1.0)
    x, y, x_probe = data()
    largest = float(torch.linalg.eigvalsh(initial_statistics(ensemble, x, statistics=("K", "Theta"))[-1].Theta)[-1])
    rate = 0.5 / largest
    training = Training(learning_rate=rate, steps=steps, reduction="sum")
    prediction = predict_training(ensemble, x, y, x_probe, training, at_steps=record, order=0)
    generator = torch.Generator().manual_seed(11)
    collected = {step: [] for step in record}
    single = [tensor.float() for tensor in (x, y, x_probe)]
    for _ in range(networks // batch):
        layers = draw(widths, 0.1, 1.5, batch, generator, torch.float32)
        outputs = train(layers, *single, torch.tanh, rate, steps, 0.3, 1.0, record)
        for step in record:
            collected[step].append(outputs[step].double())
    worst = {}
    for index, step in enumerate(record):
        z = torch.cat(collected[step])
        mean_error = z.std(0) / math.sqrt(networks)
        mean_deviation = (z.mean(0) - prediction.output_mean[index]).abs() / mean_error
        centered = z - prediction.output_mean[index]
        products = torch.einsum("sai,sbj->sabij", centered, centered)
        covariance_error = products.std(0) / math.sqrt(networks)
        covariance_deviation = (products.mean(0) - prediction.output_covariance[index]).abs() / covariance_error
        worst[step] = (float(mean_deviation.max()), float(covariance_deviation.max()))
    return worst


@pytest.mark.slow
def test_trained_networks_follow_mean_and_covariance():
    """600 networks of width 512. The 1/n shift of the mean, about 1/512 of the output, is a twentieth of a
    standard error 1/sqrt(600); 4 + 16 numbers at each of three steps: the largest deviate stays below 4."""
    worst = _against_trained_networks(width=512, networks=600, batch=20, steps=40, record=[0, 5, 40])
    for step, (mean, covariance) in worst.items():
        assert mean < 4, f"step {step}: the mean is off by {mean:.1f} standard errors"
        assert covariance < 4, f"step {step}: the covariance is off by {covariance:.1f} standard errors"
