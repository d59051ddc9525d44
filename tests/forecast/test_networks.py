"""predict_from_networks and averages: against single forecasts, against the theory of the ensemble, and on a CNN."""

import math
import random

import numpy
import pytest
import torch
from torch import nn

import torch_eft as eft
from tests.measure.devices import poisoned
from torch_eft.forecast.network import predict_from_network
from torch_eft.results.trajectory import Trajectory, Validity

F64 = torch.float64
X = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([[1.0], [-0.5], [0.3]], dtype=F64)
C_W, C_B, LAMBDA_W, LAMBDA_B = 1.5, 0.1, 1.0, 0.3


def drawn(n, activation=nn.Tanh):
    """A factory of networks [3, n, n, 1] in the conventions of PDLT."""

    def make():
        layers = []
        for n_in, n_out in ((3, n), (n, n), (n, 1)):
            linear = nn.Linear(n_in, n_out, dtype=F64)
            with torch.no_grad():
                linear.weight.normal_(0, math.sqrt(C_W / n_in))
                linear.bias.normal_(0, math.sqrt(C_B))
            layers += [linear, activation()]
        return nn.Sequential(*layers[:-1])

    return make


FIXED = drawn(8)()


def lambdas_of(n):
    fan_in = {"0": 3, "2": n, "4": n}
    return {f"{k}.weight": LAMBDA_W / v for k, v in fan_in.items()} | {f"{k}.bias": LAMBDA_B for k in fan_in}


def forecast(n, networks, order=1, steps=10, seed=0, **options):
    return eft.predict_from_networks(
        drawn(n),
        X[1:],
        Y,
        X[:1],
        learning_rate=0.08,
        steps=steps,
        num_networks=networks,
        seed=seed,
        order=order,
        lambdas=lambdas_of(n),
        reduction="sum",
        **options,
    )


@pytest.mark.parametrize("order", [0, 1])
def test_is_the_mean_of_the_single_forecasts(order):
    """Of networks drawn by hand with the same seeds: means, covariance between networks, errors of the means."""
    found = forecast(16, 4, order, seed=7)
    singles = []
    for seed in range(7, 11):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = drawn(16)()
        options = dict(learning_rate=0.08, steps=10, lambdas=lambdas_of(16), reduction="sum", order=order)
        singles.append(predict_from_network(model, X[1:], Y, X[:1], **options))
    for name, error in (("output_mean", "output_error"), ("ntk_mean", "ntk_error"), ("ntk_change", "ntk_change_error")):
        values = torch.stack([getattr(single, name) for single in singles])
        torch.testing.assert_close(getattr(found, name), values.mean(0), rtol=0, atol=1e-13)
        torch.testing.assert_close(getattr(found, error), values.std(0) / 2, rtol=1e-10, atol=1e-13)
    z = torch.stack([single.output_mean for single in singles])
    torch.testing.assert_close(found.output_covariance[..., 0, 0, 0, 0], z.var(0)[..., 0, 0], rtol=1e-10, atol=1e-13)
    trained = torch.stack([single.train_output_mean for single in singles])
    torch.testing.assert_close(found.train_output_mean, trained.mean(0), rtol=0, atol=1e-13)
    assert (found.output_truncation is None) == (order == 0)
    assert found.provenance.startswith(f"mean over 4 networks: order {order} of each")


def test_nothing_global_is_touched_and_seeds_decide():
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    first = forecast(8, 2, 0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()
    torch.randn(3)
    assert torch.equal(forecast(8, 2, 0).output_mean, first.output_mean)
    assert not torch.equal(forecast(8, 2, 0, seed=5).output_mean, first.output_mean)


@pytest.mark.slow
def test_agrees_with_the_theory_of_the_ensemble():
    """Mean output, covariance and NTK drift of tanh MLPs beside those of the recursions, within 4 standard errors and
    what both leave out: the 1/n term of the theory, relative to order 0, times itself, a few (three) times over."""
    networks, steps = 60, 20
    for n in (64, 128):
        found = forecast(n, networks, steps=steps)
        ensemble = eft.theory.MLPEnsemble([3, n, n, 1], "tanh", C_b=C_B, C_W=C_W, lambda_b=LAMBDA_B, lambda_W=LAMBDA_W)
        zeroth, theory = (
            eft.theory.predict_training(
                ensemble, X[1:], Y, X[:1], learning_rate=0.08, steps=steps, reduction="sum", order=order
            )
            for order in (0, 1)
        )
        # The next order of single networks is the ensemble's, too: fluctuations that cancel in the mean of order 1 do
        # not in its square. It is what the networks' own truncations say.
        for name, error, left in (
            ("output_mean", found.output_error, found.output_truncation),
            ("ntk_change", found.ntk_change_error, found.ntk_truncation),
        ):
            off = (getattr(found, name)[-1] - getattr(theory, name)[-1]).abs()
            allowed = 4 * error[-1] + left[-1]
            print(n, name, float(off), float(error[-1]), float(left[-1]))
            assert bool((off <= allowed).all()), (n, name, off, allowed)
        # A variance from S normal numbers has a relative error of sqrt(2 / (S - 1)).
        variance, expected = found.output_covariance[-1].flatten(), theory.output_covariance[-1].flatten()
        order_0 = zeroth.output_covariance[-1].flatten()
        left = (expected - order_0).abs() ** 2 / order_0
        print(n, "variance", float(variance), float(expected))
        assert bool(((variance - expected).abs() <= 4 * expected * math.sqrt(2 / (networks - 1)) + 3 * left).all())


class SmallCNN(nn.Module):
    def __init__(self, activation=nn.Tanh):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3), activation(), nn.Conv2d(6, 6, 3), activation(), nn.Flatten(), nn.Linear(24, 2)
        )

    def forward(self, x):
        return self.body(x)


IMAGES = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(1))
CLASSES = torch.tensor([0, 1, 1])


def test_a_small_cnn_on_cross_entropy_with_minibatches():
    """Shapes, what it says of itself, and that the module's own precision and device are taken as they are."""
    batches = [[0, 1], [2, 0]]
    found = eft.predict_from_networks(
        SmallCNN,
        IMAGES[2:],
        CLASSES,
        IMAGES[:2],
        eft.Training(learning_rate=0.05, steps=8, loss="cross_entropy", batches=batches),
        num_networks=3,
        num_modes=2,
    )
    assert found.output_mean.shape == found.output_error.shape == (9, 2, 2)
    assert found.output_covariance.shape == found.ntk_mean.shape == found.ntk_change.shape == (9, 2, 2, 2, 2)
    assert found.train_output_mean.shape == (9, 3, 2)
    assert bool((found.output_error > 0).all()) and not bool(found.ntk_change_error[0].any())
    assert "SmallCNN" in found.provenance and "fixed-minibatch" in found.provenance
    assert "of 3 networks outside" in found.validity.reason and "standard errors: mean output" in found.validity.reason


def test_averages_make_nothing_on_the_default_device():
    singles = [predict_from_network(drawn(8)(), X[1:], Y, X[:1], learning_rate=0.02, steps=3) for _ in range(3)]
    expected = eft.average_trajectories(singles, "three")
    with poisoned():
        found = eft.average_trajectories(singles, "three")
    for name in ("output_mean", "output_covariance", "ntk_change", "output_error", "train_output_mean"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.validity == expected.validity


def test_kinks_are_told_for_every_network():
    found = eft.predict_from_networks(
        lambda: SmallCNN(nn.ReLU),
        IMAGES[2:],
        CLASSES,
        IMAGES[:1],
        eft.Training(learning_rate=0.05, steps=2, loss="cross_entropy"),
        num_networks=2,
        num_modes=1,
    )
    assert found.validity.flag == "invalid"
    assert "2 of 2 networks outside" in found.validity.reason and "relu" in found.validity.reason


def single(value, flag="valid", truncation=0.01):
    z = torch.tensor([0.0, value], dtype=F64).view(2, 1, 1)
    return Trajectory(
        torch.arange(2), z, None, None, None, "hand made", Validity(flag, f"{flag} {value}"), truncation + 0 * z
    )


def test_verdicts_are_shared_out():
    """By hand: the share outside, the worst, and when an average of mostly good networks is only cautioned."""
    few = eft.average_trajectories([single(1.0), single(2.0, "caution"), single(3.0, "invalid", 0.5)], "numbers")
    assert few.validity.flag == "caution"
    assert "1 of 3 networks outside, 1 to be read with caution; the worst: invalid 3.0" in few.validity.reason
    most = eft.average_trajectories([single(1.0), single(2.0, "invalid"), single(3.0, "invalid")], "numbers")
    assert most.validity.flag == "invalid"
    far = eft.average_trajectories([single(1.0), single(2.0), single(3.0, "invalid", 90.0)], "numbers")
    assert far.validity.flag == "invalid"  # the average itself has no small next order
    assert eft.average_trajectories([single(1.0), single(2.0)], "numbers").validity.flag == "valid"
    assert few.ntk_mean is None and few.ntk_change is None and few.ntk_error is None
    assert few.provenance == "mean over 3 networks: numbers"
    assert float(few.output_covariance[1]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_networks=1), r"num_networks: 1 given"),
        (dict(make_model=lambda: 3), r"make_model: it returned int"),
        (dict(make_model=lambda: FIXED), r"make_model: it returned the same network twice"),
        (dict(learning_rate=50.0), r"learning_rate: 50 given.*\(network 0 of 2, drawn with seed 3\)"),
        (dict(order=2), r"order: 2 given"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = dict(
        make_model=drawn(8),
        x_train=X[1:],
        y_train=Y,
        x_probe=X[:1],
        learning_rate=0.02,
        steps=2,
        num_networks=2,
        seed=3,
    )
    with pytest.raises(ValueError, match=message):
        eft.predict_from_networks(**{**arguments, "order": 0, **change})


def test_different_runs_are_not_averaged():
    other = Trajectory(torch.arange(3), torch.zeros(3, 1, 1), None, None, None, "", Validity("valid", ""))
    with pytest.raises(ValueError, match="number 1 is at other steps"):
        eft.average_trajectories([single(1.0), other], "numbers")
    with pytest.raises(ValueError, match="1 given; an average with its error needs at least 2"):
        eft.average_trajectories([single(1.0)], "numbers")


def test_linear_networks_differ_by_their_outputs_alone():
    """All have one NTK."""
    found = eft.predict_from_networks(
        lambda: nn.Linear(3, 1, dtype=F64), X[1:], Y, X[:1], learning_rate=0.05, steps=3, num_networks=3
    )
    assert bool((found.output_error > 0).all()) and not bool(found.ntk_error.any())
