"""Networks that cannot be measured are refused by name, with a remedy; others are not."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.oracles.models import ConvNet, Recurrent, Tied, mlp
from torch_eft import measure
from torch_eft.measure.forward.checks import check_batch_independence, check_measurable
from torch_eft.measure.forward.isolation import IsolatedModel, isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.structure import all_finite, check_structure


class Two(nn.Module):
    """Two linear layers with a function before or between them."""

    def __init__(self, before=None, between=torch.tanh):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.before, self.between = before or (lambda x: x), between

    def forward(self, x):
        return self.second(self.between(self.first(self.before(x))))


class Checkpointed(Two):
    def __init__(self, use_reentrant, before=None):
        super().__init__(before)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return self.second(checkpoint(lambda x: self.first(x).tanh(), self.before(x), use_reentrant=self.use_reentrant))


def check(model, x):
    probe = measure.Probe(x)
    with isolated(model) as network:
        check_measurable(network)
        check_batch_independence(network, network.place(probe), checked_output(network, probe))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (mlp(), torch.randn(7, 5)),
        (mlp(), torch.randn(1, 5)),
        (ConvNet(), torch.randn(4, 1, 8, 8)),
        (Recurrent(), torch.randn(3, 4, 3)),
        (Tied(), torch.randn(2, 4)),
        (Checkpointed(False), torch.randn(3, 3)),
        (Two(between=nn.ReLU(inplace=True)), torch.randn(3, 3)),
        (nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)), torch.tensor([[0, 1], [2, 4], [1, 1]])),
        (nn.Sequential(nn.Linear(3, 5), nn.InstanceNorm1d(2)), torch.randn(3, 2, 3)),
        (nn.Linear(3, 2).bfloat16(), torch.randn(3, 3)),
        (mlp().requires_grad_(False), torch.randn(3, 5)),
    ],
)
def test_functions_of_each_sample_pass(model, x):
    probe = measure.Probe(x)
    flat = lambda z: z.flatten(1)  # noqa: E731
    with isolated(model, flat) as network:
        check_measurable(network)
        check_batch_independence(network, network.place(probe), checked_output(network, probe))
    check_measurable(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Two(between=lambda z: F.dropout(z, 0.5, training=True)), r"depends on chance: .*training=self.training"),
        (Two(before=lambda x: x + torch.rand(len(x), 1)), r"depends on chance"),
        (Two(before=lambda x: x - x.mean(0)), r"depends on the other samples of the batch: with half of them"),
        (Two(before=lambda x: x - x[:1]), r"depends on the other samples of the batch"),
        (Two(before=lambda x: x - x[-1:]), r"depends on the other samples of the batch"),
        (Two(before=lambda x: x.cumsum(0)), r"depends on the other samples of the batch"),
        (Two(before=lambda x: x + torch.arange(len(x))[:, None]), r"depends on the other samples .*place in the batch"),
        (Two(between=lambda z: F.batch_norm(z, None, None, training=True)), r"depends on the other samples"),
        (
            Two(before=lambda x: x.view(5, 3)),
            r"all samples of the probe, but not half of them .*written into the model",
        ),
        (Checkpointed(True), r"reentrant checkpointing, .*use_reentrant=False"),
        (Two(between=lambda z: z / (z.sum(1, keepdim=True) != math.inf).float().cumsum(0).sub(2)), r"sample 1 of the"),
    ],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_is_no_function_of_each_sample_is_refused(model, message):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        check(model, torch.randn(5, 3))


@pytest.mark.parametrize("seed", range(3))
def test_rounding_of_large_terms_whose_sum_is_small_is_no_dependence(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 1))
    x = torch.randn(3).expand(4, 3) + torch.finfo(torch.float32).eps * torch.randn(4, 3)
    with torch.no_grad():
        model[-1].bias -= model(x)[0]  # what is left is rounding, which depends on the size of the batch
    check(model, x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_later_reentrant_checkpoint_is_found_too():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="reentrant"):
        check(nn.Sequential(nn.Embedding(5, 3), Checkpointed(True)), torch.tensor([1, 2]))


def test_the_check_costs_half_a_forward(monkeypatch):
    samples, forward = [], IsolatedModel.__call__

    def counted(network, params, inputs):
        samples.append(len(inputs))
        return forward(network, params, inputs)

    probe = measure.Probe(torch.randn(10, 3))
    with isolated(Two()) as network:
        outputs = checked_output(network, probe)
        monkeypatch.setattr(IsolatedModel, "__call__", counted)
        check_batch_independence(network, network.place(probe), outputs)
    assert samples == [5]


def test_batch_statistics_in_evaluation_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"model: '1' \(BatchNorm1d\) normalizes with the statistics of the batch"):
        check_measurable(model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("frozen", [False, True])
def test_non_finite_parameters_are_named(value, frozen):
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, :3] = value
    model[2].weight.requires_grad_(not frozen)
    with pytest.raises(ValueError, match=r"the parameter '2.weight' is not finite, 3 of its 108 numbers"):
        check_measurable(model)
    with isolated(model) as network, pytest.raises(ValueError, match=r"'2.weight'"):
        check_measurable(network)


def test_infinite_buffers_are_not_refused():
    model = mlp()
    model.register_buffer("mask", torch.full((3,), -math.inf))
    check_measurable(model)


class DTensor(torch.Tensor):
    """Has the name only of a sharded tensor; real ones need a process group."""


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (nn.Parameter(torch.ones(2, dtype=torch.complex64)), r"'extra' is complex; .*view_as_real"),
        (nn.UninitializedParameter(), r"'extra' is not initialized yet \(a lazy module\)"),
        (nn.Parameter(torch.ones(2, device="meta")), r"'0.weight' is on cpu, 'extra' on meta; bring all to one device"),
        (nn.Parameter(torch.ones(2).as_subclass(DTensor)), r"'extra' is sharded .*full_copy"),
    ],
)
def test_parameters_that_cannot_be_measured_are_named(parameter, message):
    model = mlp()
    model.append(nn.Identity())
    model[-1].register_parameter("extra", parameter)
    for refuse in (check_structure, check_measurable, lambda model: measure.output(model, torch.ones(2, 5))):
        with pytest.raises(ValueError, match=message.replace("'extra'", "'5.extra'")):
            refuse(model)


class FullyShardedDataParallel(nn.Sequential):
    """Has the name only; in it, sharded parameters look like any others."""


def test_sharded_modules_are_named():
    with pytest.raises(ValueError, match=r"model: '1' \(FullyShardedDataParallel\) is sharded .*summon_full_params"):
        measure.output(nn.Sequential(nn.Linear(5, 5), FullyShardedDataParallel(nn.Linear(5, 3))), torch.ones(2, 5))


def test_complex_constants_are_fine():
    model = mlp()
    model.register_buffer("phases", torch.ones(2, dtype=torch.complex64))
    model[0].register_parameter("frozen", nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False))
    assert measure.output(model, torch.ones(2, 5)).shape == (2, 3)


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (nn.Linear(3, 2), torch.ones(2, 4, 3), r"more than one axis .*lambda z: z.flatten\(1\).* one position"),
        (nn.Flatten(), torch.ones(2, 0), r"no output \(C = 0\) to measure"),
        (nn.Flatten(0), torch.ones(2, 1), r"output_fn=lambda z: z\[:, None\]"),
        (
            nn.Sequential(nn.Linear(3, 2), nn.Flatten(0), nn.Unflatten(0, (1, 4))),
            torch.ones(2, 3),
            r"first axis is not",
        ),
        (Recurrent().rnn, torch.ones(2, 4, 3), r"is tuple, .*lambda out: out\[0\]"),
    ],
)
def test_outputs_of_other_shapes_come_with_a_remedy(model, x, message):
    with pytest.raises(ValueError, match=message):
        measure.output(model, x)


def test_a_forward_that_changes_its_inputs_is_refused_and_leaves_the_probe_alone():
    x = torch.randn(2, 3)
    probe = measure.Probe(x.clone())
    with pytest.raises(ValueError, match=r"changes its inputs in place, .*x.clone\(\)"):
        measure.output(Two(before=lambda x: x.mul_(2)), probe)
    assert torch.equal(probe.inputs, x)


def test_a_probe_on_the_wrong_device_is_named():
    model, x = mlp(), torch.ones(2, 5)
    with pytest.raises(ValueError, match=r"probe: a tensor is on meta, the model on cpu; move one of them"):
        measure.output(model, x.to("meta"))
    with pytest.raises(ValueError, match=r"probe: its tensors are on cpu, meta; bring all to one device"):
        measure.Probe((x, x.to("meta")))
    assert measure.output(model.to("meta"), x).device.type == "meta"  # from the CPU the probe goes to the model


def test_finiteness_of_several_tensors():
    assert all_finite() and all_finite(torch.ones(2), torch.tensor([1, 2]))
    assert not all_finite(torch.ones(2), torch.tensor([1.0, math.nan]))
    assert not all_finite(torch.tensor([1.0, complex(0, math.inf)]))
    assert all_finite(torch.empty(2, device="meta"))
