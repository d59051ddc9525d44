"""Every kind of layer by its factors, at orders one to three, against reverse mode of reverse mode."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.measure.zoo import ZOO, Lambda, build, randn
from torch_eft import measure
from torch_eft.measure.forward.decompositions import Decomposed
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.probe import as_probe
from torch_eft.measure.jacobian import capture, factors, gram
from torch_eft.measure.jacobian.engine import JacobianGram
from torch_eft.measure.jets.jet import lift

PAIRS = [(0, 0), (1, 0), (2, 0), (1, 1)]
FALLBACK = {
    "weight norm": {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"},
    "cross attention": {"attention.in_proj_bias"},
    "raw": {"power"},
    "stretched": {"shuffled"},
    "twice": {"a.weight", "b.weight"},
}


def directions(network, names):
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(network.params[n].shape, dtype=torch.float64, generator=generator) for n in names}


def jacobians(network, inputs, v, names):
    """J_0, J_1, J_2 along v, (N C, P) each; fused operations, wrong at third order, written out."""
    leaves = [network.params[name].detach().requires_grad_() for name in names]
    with Decomposed():
        z = network({**network.params, **dict(zip(names, leaves, strict=True))}, inputs)
    rows = [[], [], []]
    for value in z.flatten():
        for order in range(3):
            if value.requires_grad:
                g = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
            else:
                g = [torch.zeros_like(leaf) for leaf in leaves]
            rows[order].append(torch.cat([part.detach().flatten() for part in g]) / max(1, order))
            value = sum((part * v[name]).sum() for part, name in zip(g, names, strict=True))
    return [torch.stack(row) for row in rows], z.shape


@pytest.mark.parametrize("name", ZOO)
def test_gram_matrices_of_all_orders(name):
    model, x, output_fn = build(name)
    with isolated(model, output_fn) as network:
        engine = JacobianGram(network, as_probe(x), {n: 0.5 + 0.1 * i for i, n in enumerate(network.params)})
        v = directions(network, engine.trainable)
        found, trace = engine.gram(PAIRS, v), engine.gram(PAIRS, v, trace=True)
        J, (N, C) = jacobians(network, engine.inputs, v, engine.trainable)
        scale = torch.cat(
            [torch.full((network.params[n].numel(),), engine.lambdas[n], dtype=torch.float64) for n in engine.trainable]
        )
    for m, n in PAIRS:
        expected = ((J[m] * scale) @ J[n].T).view(N, C, N, C).permute(0, 2, 1, 3)
        atol = 1e-12 * float(expected.abs().max())
        torch.testing.assert_close(found[m, n], expected, rtol=0, atol=atol)
        torch.testing.assert_close(trace[m, n], measure.as_trace(expected), rtol=0, atol=atol)
    assert set(engine.plan.fallback) == FALLBACK.get(name, set())
    assert found.method == trace.method == "jets"


@pytest.mark.parametrize("name", ["conv2d", "transposed", "transformer", "lstm", "flattened"])
def test_the_explicit_and_the_mixed_form_agree(name, monkeypatch):
    model, x, _ = build(name)
    with isolated(model) as network:
        engine = JacobianGram(network, as_probe(x))
        v = directions(network, engine.trainable)
        kernels = []
        for weight in (0.0, 1e9):  # mixed where it is possible; explicit where it is possible
            monkeypatch.setattr(gram.outer, "_MIXED", weight)
            kernels.append(engine.gram(PAIRS, v))
    for pair in PAIRS:
        atol = 1e-13 * float(kernels[0][pair].abs().max())
        torch.testing.assert_close(kernels[0][pair], kernels[1][pair], rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["mlp", "conv1d", "layer norm", "transformer"])
def test_blocks_and_crossings_of_every_order(name, monkeypatch):
    """Small blocks of rows, of samples and of columns; rows and columns of different inputs."""
    model, x, _ = build(name)
    with isolated(model) as network:
        engine = JacobianGram(network, as_probe(x))
        v = directions(network, engine.trainable)
        whole = engine.gram(PAIRS, v)
        few = JacobianGram(network, as_probe(x[:1]))
        crossed = few.gram(PAIRS, v, other=engine)
        monkeypatch.setattr(gram.products, "ROWS", 1)
        monkeypatch.setattr(gram.forms, "FORMED", 1)
        monkeypatch.setattr(gram.forms, "BLOCK_BYTES", 1)
        engine.memory = engine.estimate(3, 4).kernels + 2 * engine.estimate(3, 4).sample
        assert engine.estimate(3, 4).block == 1
        blocks = engine.gram(PAIRS, v)
    for pair in PAIRS:
        atol = 1e-13 * float(whole[pair].abs().max())
        torch.testing.assert_close(blocks[pair], whole[pair], rtol=0, atol=atol)
        torch.testing.assert_close(crossed[pair], whole[pair][:1], rtol=0, atol=atol)


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3, stride=2), nn.AdaptiveAvgPool2d(2)],
        [nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Tanh(), nn.Conv2d(6, 6, 5, 2, 1, groups=6), nn.MaxPool2d(4)],
        [nn.Conv2d(3, 16, 8, 8), nn.Tanh(), nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=4)],
    ],
    ids=["narrow", "depthwise", "grouped"],
)
def test_single_precision_takes_other_ways_to_the_same_kernel(layers, onednn, monkeypatch):
    """Outputs side by side, groups in one product or one convolution, products by oneDNN where it is asked for."""
    monkeypatch.setattr(gram.products, "onednn_is_faster", lambda: onednn)
    monkeypatch.setattr(gram.products, "_LEAST", 1)
    torch.manual_seed(0)
    model, x = nn.Sequential(*copy.deepcopy(layers), nn.Flatten(), nn.LazyLinear(3)), torch.randn(2, 3, 24, 24)
    model(x)
    found = measure.ntk(model, x), measure.dntk(model, x, direction=torch.ones(2, 3))
    model, x = model.double(), x.double()
    expected = measure.ntk(model, x), measure.dntk(model, x, direction=x.new_ones(2, 3))
    for value, exact in zip(found, expected, strict=True):
        assert float((value - exact).norm() / exact.norm()) < 2e-6


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "norm",
    [
        lambda affine: nn.GroupNorm(2, 6, affine=affine),
        lambda affine: nn.BatchNorm2d(6, affine=affine).eval(),
        lambda affine: nn.InstanceNorm2d(6, affine=affine),
        lambda affine: nn.LayerNorm([5, 5], elementwise_affine=affine),
        lambda affine: nn.RMSNorm([5, 5], elementwise_affine=affine),
    ],
    ids=["group", "batch", "instance", "layer", "rms"],
)
def test_what_is_recorded_has_the_numbers_of_the_forward(norm, affine):
    """To the last bit: else units behind a normalization stand on another side of their kinks in a large network."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3), norm(affine), nn.ReLU()), torch.randn(16, 3, 7, 7)
    if isinstance(model[1], nn.BatchNorm2d):
        model[1].running_mean, model[1].running_var = torch.randn(6), torch.rand(6)
    params = {name: value.detach() for name, value in model.named_parameters()}
    expected = functional_call(model, params, (x,))
    for given in (
        {name: value.requires_grad_() for name, value in params.items()},
        {name: lift(value.requires_grad_(), torch.randn(value.shape), 1) for name, value in params.items()},
    ):
        with capture.Capture(given):
            found = functional_call(model, given, (x,))
        assert torch.equal(getattr(found, "primal", found), expected)


@pytest.mark.parametrize("name", ["mlp", "conv1d"])
@pytest.mark.parametrize("looped", [False, True])
def test_activations_that_keep_their_slope(name, looped, monkeypatch):
    model, x, _ = build(name)
    expected = measure.ntk(model, x)
    monkeypatch.setattr(capture.rules, "_MANY", 1)
    if looped:
        monkeypatch.setattr(factors, "_SMALL", 0)
    torch.testing.assert_close(measure.ntk(model, x), expected, rtol=0, atol=1e-13 * float(expected.abs().max()))
    assert measure.coverage(model, x).fallback == {}


def test_crossed_derivatives_of_a_network_that_takes_reverse_mode():
    """Rows and columns are computed in one way, which the rows choose."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), Lambda(torch.special.i0), nn.Linear(4, 2)).double(), randn(3, 3)
    with isolated(model) as network:
        rows, columns = JacobianGram(network, as_probe(x[:1])), JacobianGram(network, as_probe(x))
        v = directions(network, rows.trainable)
        whole, crossed = columns.gram(PAIRS, v), rows.gram(PAIRS, v, other=columns)
        assert crossed.method == whole.method and crossed.method.startswith("reverse mode (")
        torch.testing.assert_close(rows.ntk(other=columns), crossed[0, 0], rtol=0, atol=1e-12)
    for pair in PAIRS:
        torch.testing.assert_close(crossed[pair], whole[pair][:1], rtol=0, atol=1e-12)


def test_the_type_error_of_a_rule_is_not_taken_for_an_unknown_call(monkeypatch):
    def wrong(recorder, func, input, weight, bias=None):
        return len(3)

    monkeypatch.setitem(capture.RULES, F.linear, wrong)
    model, x = nn.Linear(3, 2).double(), randn(3, 3)
    assert "TypeError: object of type 'int' has no len()" in measure.coverage(model, x).fallback["weight"]


def test_a_handler_that_is_wrong_is_found_out_and_replaced(monkeypatch):
    """The check at first use sees a dropped bias; the parameter falls back and the kernel is right."""
    right = capture.RULES[F.linear]

    def forgetful(recorder, func, input, weight, bias=None):
        output = right(recorder, func, input, weight, bias)
        if output is not None and len(recorder.calls) == 2:  # the second layer's bias gets half its gradient
            call = recorder.calls[-1]
            recorder.calls[-1] = type(call)(
                call.kind, call.weight, call.bias, (0.5 * call.inputs[0],), call.edges, call.shape, call.options
            )
        return output

    model, x, _ = build("mlp")
    expected = measure.ntk(model, x)
    monkeypatch.setitem(capture.RULES, F.linear, forgetful)
    model, x, _ = build("mlp")  # another instance: nothing is remembered of it
    torch.testing.assert_close(measure.ntk(model, x), expected, rtol=0, atol=1e-12)
    assert "differs by" in measure.coverage(model, x).fallback["2.weight"]


def test_what_no_way_gets_right_is_refused():
    calls = itertools.count(1)  # cannot be put back

    class Memory(nn.Module):
        """Adds what its forward has seen."""

        def __init__(self, count):
            super().__init__()
            self.layer, self.calls, self.count = nn.Linear(3, 2), 0, count

        def forward(self, x):
            self.calls += 1
            return self.layer(x) * self.count(self)

    x = randn(3, 3)
    with pytest.raises(ValueError, match="depends on chance"):
        measure.ntk(Memory(lambda module: next(calls)).double(), x)
    model = Memory(lambda module: module.calls).double()
    model(x)
    model(x)  # the next one is the third
    torch.testing.assert_close(measure.ntk(model, x), 9 * measure.ntk(model.layer, x), rtol=0, atol=1e-12)


def test_coverage_says_how_each_parameter_is_had():
    model, x, _ = build("raw")
    lambdas = {name: float(name != "b") for name, _ in model.named_parameters()}
    found = measure.coverage(model, x, lambdas=lambdas)
    assert found.structured == {"w": "linear", "scale": "scale", "v": "linear"}
    assert found.fallback == {"power": "a use that is not recognized"}
    assert found.constant == ("b",)
    assert str(found).splitlines()[-2:] == [
        "power: fallback, a use that is not recognized",
        "b: constant (lambda = 0)",
    ]


def test_a_recording_that_breaks_falls_back_with_its_reason():
    class Picky(nn.Module):
        """Refuses to be recorded, beyond what watches every measurement."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            if len(torch.overrides._get_current_function_mode_stack()) > 1:
                raise RuntimeError("not while you look")
            return torch.tanh(self.layer(x))

    torch.manual_seed(0)
    model, x = Picky().double(), randn(3, 3)
    assert "not while you look" in measure.coverage(model, x).fallback["layer.weight"]
    plain = nn.Sequential(model.layer, nn.Tanh())
    torch.testing.assert_close(measure.ntk(model, x), measure.ntk(plain, x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["mlp", "conv2d", "transformer, time first", "raw"])
def test_one_or_two_samples(name, count):
    model, x, _ = build(name)
    H = measure.ntk(model, x)
    torch.testing.assert_close(measure.ntk(model, x[:count]), H[:count, :count], rtol=0, atol=1e-12)


def test_many_outputs_and_places_go_the_other_way_through_the_backward():
    """Large layers take outputs one after the other, small ones all at once."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GELU(), Lambda(lambda z: z.mean((2, 3))), nn.Linear(8, 3)).double()
    x = randn(30, 1, 50, 50)
    H = measure.ntk(net, x)
    torch.testing.assert_close(H[:2, :2], measure.ntk(net, x[:2]), rtol=0, atol=1e-12)


def test_what_is_remembered_of_a_module_is_bounded():
    from torch_eft.measure.jacobian import engine

    model, x, _ = build("mlp")
    expected = measure.ntk(model, x)
    for scale in range(1, 40):  # functions that are made anew each time, and differ
        found = measure.ntk(model, x, output_fn=lambda z, scale=scale: scale * z)
        torch.testing.assert_close(found, scale**2 * expected, rtol=1e-12, atol=0)
    assert len(engine._plans[model]) == engine._REMEMBERED


def test_a_table_that_is_a_matrix_elsewhere_has_one_factor():
    """With lambda for every number, padding, parts, blocks and other inputs."""
    model, x, output_fn = build("tied embedding")
    x = x.clone()
    x[:, 0] = 0
    model.embed.padding_idx = 0
    lambdas = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    options = {"output_fn": output_fn, "lambdas": lambdas}
    assert measure.coverage(model, x, **options).structured["embed.weight"] == "embedding and linear"
    with isolated(model, output_fn) as network:
        names = list(network.params)
        (J, *_), (N, C) = jacobians(
            network, x, {name: torch.zeros_like(p) for name, p in network.params.items()}, names
        )
        flat = torch.cat([lambdas[name].flatten() for name in names])
    H = ((J * flat) @ J.T).view(N, C, N, C).permute(0, 2, 1, 3)
    limit = measure.ntk_estimate(model, x, **options).total - 1
    for found in (
        measure.ntk(model, x, **options),
        measure.ntk(model, x, memory=limit, **options),
        measure.ntk(model, x, other=x, **options),
        sum(measure.ntk(model, x, per="parameter", **options).values()),
    ):
        torch.testing.assert_close(found, H, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        measure.ntk(model, x, trace=True, **options), measure.as_trace(H), rtol=1e-10, atol=1e-10
    )
