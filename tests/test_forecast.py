"""predict_from_network: against whole tensors of other code, and against networks really trained."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.trained import F64, network
from torch_eft import measure
from torch_eft.forecast import predict_from_network
from torch_eft.theory.dynamics import Loss, descent
from torch_eft.theory.hierarchy import train_hierarchy


def small(activation=nn.Tanh, points=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model, lambdas = network([3, 8, 7, 2], generator, activation, C_b=0.1, lambda_b=0.5)
    x = torch.randn(points, 3, dtype=F64, generator=generator)
    y = torch.randn(points - 2, 2, dtype=F64, generator=generator)
    return model, lambdas, x[2:], y, x[:2]


CASES = {
    "gradient descent, mean": dict(),
    "heavy ball, sum": dict(momentum=0.8, reduction="sum", learning_rate=0.01),
    "Nesterov, schedule": dict(momentum=0.8, nesterov=True, schedule=lambda step: 0.05 / (1 + step)),
    "cross-entropy, minibatches": dict(loss="cross_entropy", batches=[[0, 1], [2], [2, 0]]),
    "any loss": dict(loss=functional.smooth_l1_loss, momentum=0.5, dampening=0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_hierarchy_of_whole_tensors(name):
    """Whole dNTK and ddNTK by reverse mode of reverse mode, against Gram matrices along the path; the directions left
    out are a part in 1e6 of the path, and the correction is at most cubic in it: a few parts in 1e6."""
    options = dict(learning_rate=0.05, steps=30) | CASES[name]
    model, lambdas, x, y, x_probe = small()
    if options.get("loss") == "cross_entropy":
        y = torch.tensor([1, 0, 1])
    found = predict_from_network(model, x, y, x_probe, lambdas=lambdas, **options)
    everything = torch.cat([x_probe, x])
    ddI, ddII = measure.ddntk(model, everything, lambdas)
    loss = Loss(options.get("loss", "mse"), y, options.get("reduction", "mean"))
    names = ("learning_rate", "steps", "momentum", "dampening", "nesterov", "schedule", "batches")
    expected = train_hierarchy(
        measure.output(model, everything).detach(),
        measure.ntk(model, everything, lambdas),
        measure.dntk(model, everything, lambdas),
        ddI,
        ddII,
        [2, 3, 4],
        loss,
        descent(**{key: options[key] for key in names if key in options}),
    )
    z0, z1 = expected.z0, expected.z1
    frozen = predict_from_network(model, x, y, x_probe, lambdas=lambdas, order=0, **options)
    torch.testing.assert_close(frozen.output_mean, z0[:, :2], rtol=0, atol=1e-12)
    torch.testing.assert_close(frozen.train_output_mean, z0[:, 2:], rtol=0, atol=1e-12)
    size = float(z1.abs().max())
    assert size > 1e-3
    torch.testing.assert_close(found.output_mean, (z0 + z1)[:, :2], rtol=0, atol=1e-5 * size)
    torch.testing.assert_close(found.train_output_mean, (z0 + z1)[:, 2:], rtol=0, atol=1e-5 * size)
    H1 = expected.H1[:, :2, :2]
    torch.testing.assert_close(found.ntk_drift, H1, rtol=0, atol=1e-5 * float(H1.abs().max()))
    torch.testing.assert_close(found.ntk_mean - found.ntk_drift, expected.H0[:2, :2].expand_as(H1))
    assert not found.output_covariance.any()
    assert "directions of the path" in found.provenance


def test_gradient_flow_is_the_limit_of_small_steps():
    """First order in eta: halved steps, halved error; outputs and NTK."""
    model, lambdas, x, y, x_probe = small()
    flow = predict_from_network(model, x, y, x_probe, 0.1, 10, lambdas, dynamics="gradient_flow")
    errors = []
    for parts in (16, 32):
        found = predict_from_network(model, x, y, x_probe, 0.1 / parts, 10 * parts, lambdas)
        errors.append(
            [
                float((found.output_mean[::parts] - flow.output_mean).abs().max()),
                float((found.ntk_mean[::parts] - flow.ntk_mean).abs().max()),
            ]
        )
    for coarse, fine in zip(*errors, strict=True):
        assert coarse / fine == pytest.approx(2, rel=0.1)


def test_few_directions_hold_the_path_of_many_points():
    """24 training outputs move along 24 exponentials of different rates, which 6 directions hold to a part in 1e6. With
    fewer, what is missing of the correction (of degree 2 and 3 in the path) is a few times what is left of the path."""
    model, lambdas, x, y, x_probe = small(points=14)
    arguments = (model, x, y, x_probe, 0.2, 60, lambdas)
    frozen, whole = (predict_from_network(*arguments, order=order) for order in (0, 1))
    assert int(re.search(r"along (\d+) directions", whole.provenance)[1]) < 10
    for modes in (2, 3, 4):
        found = predict_from_network(*arguments, modes=modes)
        left_out = float(re.search(r"directions of the path, (\S+) of", found.provenance)[1])
        size = (whole.output_mean - frozen.output_mean).norm()
        assert float((found.output_mean - whole.output_mean).norm() / size) < 10 * left_out < 0.3


def test_inputs_as_dicts_and_the_model_is_left_alone():
    class Named(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, a, b):
            return {"z": self.body(a + b)}

    model, lambdas, x, y, x_probe = small()
    named = Named(model).float().train()
    before = [p.clone() for p in named.parameters()]
    scales = {f"body.{key}": value for key, value in lambdas.items()}
    found = predict_from_network(
        named,
        dict(a=x.float(), b=torch.zeros(3, 3)),
        y.float(),
        dict(a=x_probe.float(), b=torch.zeros(2, 3)),
        0.05,
        10,
        scales,
        output_fn=lambda out: out["z"],
    )
    assert named.training and next(named.parameters()).dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(before, named.parameters(), strict=True))
    expected = predict_from_network(model.double(), x.float(), y.float(), x_probe.float(), 0.05, 10, lambdas)
    torch.testing.assert_close(found.output_mean, expected.output_mean)
    assert found.output_mean.dtype == F64


def test_kinks_are_declared():
    model, lambdas, x, y, x_probe = small(nn.ReLU)
    found = predict_from_network(model, x, y, x_probe, 0.05, 5, lambdas)
    assert found.validity.flag == "invalid"
    assert "almost everywhere" in found.validity.reason and "relu" in found.validity.reason
    assert predict_from_network(model, x, y, x_probe, 0.05, 5, lambdas, order=0).validity.flag == "caution"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(learning_rate=10.0), r"learning_rate: 10 given, beyond the linear stability bound .*2 / lambda_max"),
        (dict(learning_rate=10.0, momentum=0.9), r"with momentum 0.9"),
        (dict(learning_rate=0.0), r"learning_rate: 0 given; it must be positive"),
        (dict(order=2), r"order: 2 given"),
        (dict(loss="hinge"), r"loss: 'hinge' given"),
        (dict(memory=10_000), r"memory: .* allowed"),
        (dict(dynamics="adam"), r"dynamics: 'adam' given"),
        (dict(dynamics="gradient_flow", momentum=0.9), r"dynamics: 'gradient_flow' is in closed form"),
        (dict(y_train=torch.zeros(3, 1)), r"y_train: shape \(3, 1\) given; x_train and the outputs ask for \(3, 2\)"),
        (dict(loss="cross_entropy", y_train=torch.tensor([0, 1, 2])), r"classes below 2"),
        (dict(x_probe=torch.zeros(2, 4)), r"x_probe: \(2, 4\) float32 given, x_train"),
        (dict(batches=[[7]]), r"batches: \[7\] given"),
    ],
)
def test_unusable_arguments_are_named(change, message):
    model, lambdas, x, y, x_probe = small()
    arguments = dict(x_train=x, y_train=y, x_probe=x_probe, learning_rate=0.05, steps=5, lambdas=lambdas) | change
    with pytest.raises(ValueError, match=message):
        predict_from_network(model, **arguments)


def test_duplicates_with_conflicting_targets_are_refused_and_consistent_ones_are_not():
    model, lambdas, x, y, x_probe = small()
    twice, same = torch.cat([x, x[:1]]), torch.cat([y, y[:1]])
    found = predict_from_network(model, twice, same, x_probe, 0.05, 10, lambdas)
    assert found.output_mean.isfinite().all()
    with pytest.raises(ValueError, match=r"x_train: 2 of 8 eigenvalues of the NTK on the training points vanish"):
        predict_from_network(model, twice, torch.cat([y, -y[:1]]), x_probe, 0.05, 10, lambdas)
