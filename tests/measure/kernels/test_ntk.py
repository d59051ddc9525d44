"""The empirical NTK against a brute-force double loop of gradients, and its metrics."""

import math

import pytest
import torch
from torch import nn

from tests.oracles.models import ConvNet, Recurrent, Tied, TwoInputs, mlp
from torch_eft import measure
from torch_eft.theory import MLPEnsemble, initial_statistics


def brute_force(model, x, lambdas=None, call=None):
    """H_{ij;ab}, one scalar product of two gradients at a time."""
    model.eval()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scale = [1.0 if lambdas is None else lambdas[name] for name, _ in named]
    z = call(model, x) if call else model(x)
    count, channels = z.shape
    gradients = [
        [torch.autograd.grad(z[a, i], [p for _, p in named], retain_graph=True) for i in range(channels)]
        for a in range(count)
    ]
    H = torch.zeros(count, count, channels, channels, dtype=z.dtype)
    for a in range(count):
        for b in range(count):
            for i in range(channels):
                for j in range(channels):
                    pairs = zip(scale, gradients[a][i], gradients[b][j], strict=True)
                    H[a, b, i, j] = sum(s * (g * h).sum() for s, g, h in pairs)
    return H


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


CASES = {
    "mlp": (mlp, lambda: randn(4, 5)),
    "relu mlp": (lambda: mlp(activation=nn.ReLU), lambda: randn(4, 5)),
    "conv, batch norm, dropout": (ConvNet, lambda: randn(3, 1, 8, 8)),
    "gru": (Recurrent, lambda: randn(3, 4, 3)),
    "tied weights": (Tied, lambda: randn(4, 4)),
    "one output": (lambda: mlp((5, 8, 1)), lambda: randn(4, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_ntk_equals_the_brute_force_double_loop(case):
    torch.manual_seed(0)
    make, inputs = CASES[case]
    model, x = make().double(), inputs()
    expected = brute_force(model, x)
    torch.testing.assert_close(measure.ntk(model, x), expected, rtol=0, atol=1e-10)
    trace = expected.diagonal(dim1=2, dim2=3).mean(-1)
    torch.testing.assert_close(measure.ntk(model, x, trace=True), trace, rtol=0, atol=1e-10)
    torch.testing.assert_close(measure.as_trace(expected), trace, rtol=0, atol=0)


def test_lambda_weighs_each_parameter_and_frozen_ones_drop_out():
    torch.manual_seed(0)
    model, x = mlp().double(), randn(3, 5)
    lambdas = {name: 0.3 + index for index, (name, _) in enumerate(model.named_parameters())}
    lambdas["2.bias"] = 0.0
    torch.testing.assert_close(
        measure.ntk(model, x, lambdas=lambdas), brute_force(model, x, lambdas), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(measure.ntk(model, x, lambdas=2.5), 2.5 * brute_force(model, x), rtol=0, atol=1e-10)
    model[0].weight.requires_grad_(False)
    torch.testing.assert_close(measure.ntk(model, x), brute_force(model, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("case", ["mlp", "conv, batch norm, dropout"])
def test_a_small_memory_budget_gives_the_same_kernel_in_blocks(case, samples):
    torch.manual_seed(0)
    make, _ = CASES[case]
    model, x = make().double(), randn(5, 5) if case == "mlp" else randn(5, 1, 8, 8)
    whole, roomy = measure.ntk(model, x), measure.ntk_estimate(model, x)
    assert (roomy.blocks, roomy.block) == (1, 5)
    memory = roomy.kernels + 2 * samples * roomy.sample
    assert measure.ntk_estimate(model, x, memory=memory).block == samples
    torch.testing.assert_close(measure.ntk(model, x, memory=memory), whole, rtol=0, atol=1e-12)
    trace = measure.ntk(model, x, trace=True, memory=memory)
    torch.testing.assert_close(trace, measure.as_trace(whole), rtol=0, atol=1e-12)
    parts = measure.ntk(model, x, memory=memory * 3, per="layer")
    torch.testing.assert_close(sum(parts.values()), whole, rtol=0, atol=1e-12)


def test_several_inputs_and_structured_outputs():
    torch.manual_seed(0)
    model = TwoInputs().double()
    a, b = randn(3, 3), randn(3, 4)
    logits = lambda out: out["logits"]  # noqa: E731
    expected = brute_force(model, None, call=lambda m, _: m(a, b)["logits"])
    torch.testing.assert_close(measure.ntk(model, (a, b), output_fn=logits), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(measure.ntk(model, {"a": a, "b": b}, output_fn=logits), expected, rtol=0, atol=1e-10)


def test_half_precision_models_are_measured_in_float32():
    torch.manual_seed(0)
    model, x = mlp(), randn(3, 5).float()
    reference = measure.ntk(model.to(torch.bfloat16).float(), x)  # the same rounded weights
    half = measure.ntk(model.to(torch.bfloat16), x)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, reference, rtol=1e-5, atol=1e-5)


def test_wide_network_at_initialization_agrees_with_theta():
    """Eight networks of width 2048: the mean NTK within its Monte-Carlo error of Theta.

    The 1/n bias of the mean is of order 1/2048 of Theta; the standard error of the mean is about
    sqrt(1/2048/8), fifteen times as large.
    """
    x = randn(3, 6)
    kernels = []
    for seed in range(8):
        torch.manual_seed(seed)
        model = mlp((6, 2048, 2048, 1)).double()
        for layer in model[::2]:
            nn.init.normal_(layer.weight, std=math.sqrt(1.5 / layer.in_features))
            nn.init.normal_(layer.bias, std=math.sqrt(0.1))
        lambdas = {
            f"{i}.{kind}": 0.3 if kind == "bias" else 1 / model[i].in_features
            for i in (0, 2, 4)
            for kind in ("weight", "bias")
        }
        kernels.append(measure.ntk(model, x, lambdas=lambdas, trace=True))
    H = torch.stack(kernels)
    Theta = initial_statistics(
        MLPEnsemble([6, 2048, 2048, 1], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3, lambda_W=1.0),
        x,
        statistics=("K", "Theta"),
    )[-1].Theta
    error = H.std(0) / math.sqrt(8)
    # Student's t with 7 degrees of freedom, six distinct entries: beyond 6.5 in two of a thousand cases.
    assert float(((H.mean(0) - Theta) / error).abs().max()) < 6.5
    assert float(error.max() / Theta.max()) < 0.02  # so a wrong term of 10 % would be seen


def test_the_kernel_lives_where_the_model_lives():
    model, x = mlp().double(), randn(3, 5)
    expected = measure.ntk(model, x)
    with torch.device("meta"):  # any tensor made without a device would now have no data
        torch.testing.assert_close(measure.ntk(model, x), expected, rtol=0, atol=1e-12)


def test_metrics_on_kernels_known_by_hand():
    H_0 = torch.diag(torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64))
    H = torch.diag(torch.tensor([3.0, 0.0, 1.0], dtype=torch.float64))
    assert float(measure.relative_change(H, H_0)) == pytest.approx(math.sqrt(2 / 10))
    assert float(measure.kernel_distance(H, H_0)) == pytest.approx(1 - 9 / 10)
    assert float(measure.kernel_distance(5 * H_0, H_0)) == pytest.approx(0, abs=1e-30)
    assert float(measure.top_eigenvalue(H)) == pytest.approx(3)
    assert float(measure.ntk_trace(H)) == pytest.approx(4 / 3)


def test_small_kernel_distances_do_not_drown_in_rounding():
    H_0 = torch.eye(10)
    H = H_0.clone()
    H[0, 1] = H[1, 0] = 1e-4  # cos = 1 / sqrt(1 + 2e-9), so the distance is 1e-9
    assert float(measure.kernel_distance(H, H_0)) == pytest.approx(1e-9, rel=1e-2)


def test_matrix_form_pairs_samples_and_outputs():
    torch.manual_seed(0)
    H = measure.ntk(mlp().double(), randn(3, 5))
    matrix = measure.as_matrix(H)
    assert float(matrix[1 * 3 + 2, 2 * 3 + 0]) == float(H[1, 2, 2, 0])
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-13)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-12


def test_nothing_moves_at_zero_learning_rate():
    H = measure.ntk(mlp().double(), randn(3, 5), lambdas=0.0)
    assert H.shape == (3, 3, 3, 3)
    assert not bool(H.any())


def test_parts_of_the_kernel_and_cross_kernels():
    torch.manual_seed(0)
    model, x = mlp().double(), randn(4, 5)
    H = measure.ntk(model, x)
    layers, parameters = measure.ntk(model, x, per="layer"), measure.ntk(model, x, per="parameter")
    assert list(layers) == ["0", "2", "4"]
    for name in layers:
        torch.testing.assert_close(
            layers[name], parameters[f"{name}.weight"] + parameters[f"{name}.bias"], rtol=0, atol=1e-13
        )
    torch.testing.assert_close(sum(layers.values()), H, rtol=0, atol=1e-13)
    only = measure.ntk(model, x, lambdas={name: float(name == "2.bias") for name, _ in model.named_parameters()})
    torch.testing.assert_close(parameters["2.bias"], only, rtol=0, atol=1e-13)
    for trace in (False, True):
        cross = measure.ntk(model, x[:1], other=x[1:], trace=trace)
        whole = measure.as_trace(H) if trace else H
        torch.testing.assert_close(cross, whole[:1, 1:], rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="per: 'neuron' given; give one of 'parameter', 'layer', or None"):
        measure.ntk(model, x, per="neuron")


class BatchCoupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x - x.mean(0))


@pytest.mark.parametrize(
    ("model", "x", "options", "message"),
    [
        (mlp(), torch.ones(3, 5), dict(lambdas={"0.weight": 1.0}), r"lambdas: '0.bias' is missing"),
        (mlp(), torch.ones(3, 5), dict(lambdas=-1.0), r"lambdas: -1 given for '0.weight'; it must be finite and >= 0"),
        (mlp(), torch.ones(3, 5), dict(lambdas="layer"), r"lambdas: 'layer' given; give a number, or \{parameter name"),
        (mlp().requires_grad_(False), torch.ones(3, 5), {}, r"model: it has no trainable parameter"),
        (mlp(), torch.ones(3, 4), {}, r"probe: \(3, 4\) float32 given, which the forward of Sequential"),
        (mlp(), torch.ones(3, 5, dtype=torch.long), {}, r"probe: \(3, 5\) int64 given, which the forward"),
        (
            TwoInputs(),
            (torch.ones(2, 3), torch.ones(2, 4)),
            {},
            r"output_fn: the output for 2 samples is dict, not a tensor",
        ),
        (nn.Conv2d(1, 2, 3), torch.ones(2, 1, 5, 5), {}, r"output_fn: .* a tensor \(2, 2, 3, 3\)"),
        (nn.LazyLinear(3), torch.ones(2, 5), {}, r"model: the parameter 'weight' is not initialized yet"),
        (
            mlp(),
            torch.ones(3, 5),
            dict(memory=100),
            r"memory: 9.5e-05 MiB allowed, .* for the kernels of 3 samples and 3",
        ),
        (BatchCoupled(), torch.arange(6.0).reshape(2, 3), {}, r"depends on the other samples"),
    ],
)
def test_what_cannot_be_measured_is_named(model, x, options, message):
    with pytest.raises(ValueError, match=message):
        measure.ntk(model, x, **options)


def test_a_memory_limit_is_an_error_of_its_own():
    with pytest.raises(measure.MemoryLimitError, match="needed at least"):
        measure.ntk(mlp(), torch.ones(3, 5), memory=100)
    with pytest.raises(measure.MemoryLimitError, match="needed for the whole dH"):
        measure.dntk(mlp(), torch.ones(3, 5), memory=2**12)


def test_large_entries_whose_sum_overflows_are_finite():
    H = measure.ntk(nn.Linear(2, 1, bias=False), torch.full((4, 2), 1e19))
    assert bool(torch.isfinite(H).all()) and bool(H.sum().isinf())


def test_non_finite_parameters_are_named():
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"model: the parameter '0.weight' is not finite, 1 of its"):
        measure.ntk(model, torch.ones(2, 5))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(0, 5), ValueError, r"probe: 0 samples given"),
        (torch.tensor(1.0), ValueError, r"probe: needs at least one tensor"),
        ([], ValueError, r"probe: needs at least one tensor"),
        ((torch.ones(2, 3), torch.ones(3, 3)), ValueError, r"probe: tensors of \[2, 3\] samples given"),
        ("digits", TypeError, r"probe: str given; give a tensor"),
        (torch.full((2, 5), math.inf), ValueError, r"probe: contains NaN or infinite"),
        (torch.ones(2, 5, dtype=torch.complex64), ValueError, r"probe: complex inputs"),
    ],
)
def test_unusable_probes_are_named(x, error, message):
    with pytest.raises(error, match=message):
        measure.Probe(x)
