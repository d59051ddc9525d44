"""Everything is computed where the model is, in its precision, and without waiting for the device more than is said.

Without an accelerator: the model on "meta" while everything else is on the CPU finds stray CPU tensors and reads of
values; ``torch.device("meta")`` around a measurement finds tensors made without a device; waits are counted.
"""

import pytest
import torch
from torch import nn

from tests.measure.devices import poisoned, waits
from tests.oracles.models import ConvNet, mlp
from torch_eft import measure
from torch_eft.measure.forward.checks import check_batch_independence, check_measurable
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.kinks import kinked_operations
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.kernels import random_outputs
from torch_eft.measure.representations.alignment import effective_rank, target_alignment
from torch_eft.measure.representations.change import block_drift, compare_representations
from torch_eft.measure.representations.hidden_kernels import representation
from torch_eft.measure.taylor.secant import ntk_finite_difference


def directions(model):
    generator = torch.Generator().manual_seed(0)
    draw = lambda p: torch.randn(p.shape, generator=generator, device="cpu").bfloat16().to(p)  # noqa: E731
    return {name: draw(p) for name, p in model.named_parameters()}


def checked(model, x):
    probe = measure.Probe(x)
    with isolated(model) as network:
        check_measurable(network)
        outputs = checked_output(network, probe)
        check_batch_independence(network, network.place(probe), outputs)
    return outputs.detach()


def change(model, x):
    labels = torch.arange(len(x), device="cpu") % 2
    found = representation(model, x, targets=labels, keep=True)
    return compare_representations(found, found)


def taylor(model, x):
    wide = lambda tensor: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))  # noqa: E731
    params = {name: wide(p) for name, p in model.named_parameters()}
    d = directions(model)
    return measure.taylor_terms(
        model, x, params, {name: p + 0.125 * wide(d[name]) for name, p in params.items()}, taylor_order=2
    )


def one_step(model, x):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return measure.output_step(model, x, measure.optimizer_step(model, optimizer, directions(model))).predicted


def preconditioned_drift(model, x):
    P = {name: value.abs() for name, value in directions(model).items()}
    later = {name: 2 * value for name, value in P.items()}
    return measure.preconditioned_drift(model, x, model, model, P, later).change


def on_directions(model, x):
    random_outputs._directions.cache_clear()
    return vars(measure.random_output_estimates(measure.ntk(model, x, outputs="probes:4")).ntk_trace)


MEASUREMENTS = {
    "output": measure.output,
    "checks": checked,
    "hidden kernels": measure.hidden_kernels,
    "representation": lambda model, x: (
        representation(model, x, targets=torch.arange(len(x), device="cpu") % 2, keep=True).K
    ),
    "kinked operations": lambda model, x: len(kinked_operations(model, x)),
    "ntk": measure.ntk,
    "dntk": lambda model, x: measure.ntk_derivatives(model, x, directions(model)).dH,
    "secant": lambda model, x: ntk_finite_difference(model, x, directions(model), distance=0.1).value,
    "change": lambda model, x: [layer.effective_rank[0] for layer in change(model, x).layers.values()],
    "taylor": taylor,
    "random outputs": on_directions,
    "one step": one_step,
    "noise": lambda model, x: measure.gradient_noise(model, x, x, lambda z: z.square().mean(), 2, 0.1).covariance,
    "preconditioned drift": preconditioned_drift,
}
BOUNDS = {
    "output": 1,  # the probe's finiteness
    "checks": 3,  # the probe, the parameters, the comparison
    "hidden kernels": 1,
    "representation": 2,  # and the kernels' finiteness
    "kinked operations": 1,
    "change": 2,  # and one transfer of all the numbers
}
"""Waits of each measurement at most, whatever the number of samples and layers."""

VALUE_FREE = ["output", "checks", "hidden kernels", "representation", "kinked operations"]
"""Measurements that compute nothing from values on the host; the rest reads finiteness or the final numbers."""


def relu_mlp(widths=(5, 12, 9, 3)):
    torch.manual_seed(0)
    return mlp(widths, nn.ReLU)


@pytest.mark.parametrize("name", VALUE_FREE)
@pytest.mark.parametrize("make", [relu_mlp, ConvNet])
def test_a_model_on_meta_is_measured_there(name, make):
    model = make()
    x = torch.randn(4, 5) if make is relu_mlp else torch.randn(4, 1, 8, 8)
    found = MEASUREMENTS[name](model.to("meta"), x)
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert tensors or isinstance(found, int)


def test_metrics_stay_on_the_device_of_the_kernels():
    K, L = torch.empty(5, 5, device="meta"), torch.empty(5, 5, device="meta")
    labels = torch.arange(5)
    for value in (
        measure.linear_cka(K, L),
        measure.linear_cka(K, L, debiased=True),
        effective_rank(K),
        effective_rank(K, entropy=True),
        target_alignment(K, labels),
    ):
        assert value.device.type == "meta" and value.ndim == 0


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_no_tensor_is_made_on_the_default_device(name):
    models, x = (relu_mlp(), relu_mlp()), torch.randn(4, 5)  # two: what is found out about one is remembered
    expected = MEASUREMENTS[name](models[0], x)
    with poisoned():
        torch.testing.assert_close(MEASUREMENTS[name](models[1], x), expected)


def test_drift_of_blocks_is_computed_on_their_device():
    blocks = {"a": torch.eye(2), "b": torch.ones(2, 2)}
    with poisoned():
        assert block_drift(blocks, blocks) == {"a": 0.0, "b": 0.0}


@pytest.mark.parametrize("name", BOUNDS)
def test_waits_for_the_device_are_few_and_do_not_grow(name):
    counts = []
    for samples, depth in ((3, 1), (12, 1), (3, 6)):
        model, x = relu_mlp((5, *[8] * depth, 3)), torch.randn(samples, 5)
        counts.append(waits(lambda: MEASUREMENTS[name](model, x)))
    assert counts[0] == counts[1] == counts[2] <= BOUNDS[name]


@pytest.mark.parametrize("name", ["ntk", "secant"])
def test_waits_of_the_ntk_do_not_grow(name):
    counts = []
    for samples, depth in ((3, 1), (12, 1), (3, 6)):
        model, x = relu_mlp((5, *[8] * depth, 3)), torch.randn(samples, 5)
        counts.append(waits(lambda: MEASUREMENTS[name](model, x)))
    assert max(counts) <= 24 and max(counts) - min(counts) <= 1


def test_waits_are_seen():
    x = torch.arange(4.0)
    assert waits(lambda: x + 1) == 0
    assert waits(lambda: (float(x.sum()), bool(x[0] > 0), x[x > 1])) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["output", "checks", "hidden kernels", "representation", "ntk", "secant", "taylor"])
def test_models_of_every_precision_with_a_float32_probe(name, dtype):
    model, x = relu_mlp().to(dtype), torch.randn(4, 5)
    found = MEASUREMENTS[name](model, x)
    reference = MEASUREMENTS[name](relu_mlp().to(dtype).double(), x)
    expected = torch.promote_types(dtype, torch.float32)
    for value, wide in zip(*map(torch.utils._pytree.tree_leaves, (found, reference)), strict=True):
        assert value.dtype == expected
        torch.testing.assert_close(value.double(), wide, rtol=1e-3, atol=1e-3 * float(wide.abs().max()))
