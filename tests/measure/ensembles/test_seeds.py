"""Statistics over drawn networks: against the theory, on any architecture, and without a trace."""

import copy
import functools
import itertools
import math
import random
import re

import numpy
import pytest
import torch
from torch import nn

from tests.oracles.models import ConvNet, Recurrent, mlp
from torch_eft.measure.ensembles.seeds import MEASURABLE, statistics_over_seeds
from torch_eft.measure.ensembles.statistics import TOTALS, estimates, sums_of
from torch_eft.measure.kernels.reverse_mode import Differentials
from torch_eft.theory import MLPEnsemble, initial_statistics
from torch_eft.theory.initialization.statistics import STATISTICS

C_B, C_W = (0.2, 0.1, 0.3, 0.1), (1.3, 1.5, 1.2, 1.4)
LAMBDA_B, LAMBDA_W = (0.5, 1.0, 0.2, 0.3), (1.0, 0.7, 1.2, 0.8)
FOUR = ("V", "A", "B", "D", "F", "P", "Q", "R", "S", "T", "U")
ACTIVATIONS = {"tanh": nn.Tanh, "gelu": nn.GELU}


def inputs():
    return torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def gaussian(module):
    """C_b and C_W above."""
    for index, layer in enumerate(part for part in module if isinstance(part, nn.Linear)):
        layer.weight.normal_(0, math.sqrt(C_W[index] / layer.in_features))
        layer.bias.normal_(0, math.sqrt(C_B[index]))


@functools.cache
def theory(name, widths):
    layers = len(widths) - 1
    ensemble = MLPEnsemble(
        widths, name, C_b=C_B[:layers], C_W=C_W[:layers], lambda_b=LAMBDA_B[:layers], lambda_W=LAMBDA_W[:layers]
    )
    return initial_statistics(ensemble, inputs(), statistics=STATISTICS)[-1]


def compared(name, widths, seeds, statistics=MEASURABLE, seed=0, dtype=torch.float64):
    model = mlp(widths, ACTIVATIONS[name]).to(dtype)
    lambdas = {}
    for index, n_in in enumerate(widths[:-1]):
        lambdas |= {f"{2 * index}.weight": LAMBDA_W[index] / n_in, f"{2 * index}.bias": LAMBDA_B[index]}
    found = statistics_over_seeds(
        model, inputs(), num_networks=seeds, statistics=statistics, lambdas=lambdas, initialize=gaussian, seed=seed
    )
    assert found.width == widths[-2]
    assert found.width_source == "the fan-in of the MLP's last layer"
    return found, found.compare(theory(name, widths))


@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_layer_2_agrees_with_theory_in_every_vertex(name):
    """Layer 2 is exact at any width: all eleven vertices and the next-to-leading means, 4 standard errors."""
    found, rows = compared(name, (3, 10, 2), 3000)
    assert set(rows) == {*MEASURABLE, "G1", "Theta1"}
    for key, row in rows.items():
        if key in ("G1", "Theta1"):
            assert not row.predicted.any()
            assert float((row.measured / row.error).abs().max()) < 4
            continue
        assert abs(row.ratio - 1) < 4 * row.ratio_error, f"{key}: {row.ratio:.3f} +- {row.ratio_error:.3f}"
        worst = float(((row.measured - row.predicted) / row.error).abs().max())
        assert worst < 5, f"{key}: an entry deviates by {worst:.1f} standard errors"  # of up to 16
        if key in "BPQRSTU":
            assert row.ratio_error < 0.1
    assert found.outputs == 2


@pytest.mark.slow
def test_more_outputs_are_averaged_over_pairs():
    """Three outputs: six ordered pairs."""
    _, two = compared("tanh", (3, 10, 2), 300)
    _, three = compared("tanh", (3, 10, 3), 300)
    for key in FOUR:
        assert abs(three[key].ratio - 1) < 4 * three[key].ratio_error
    assert sum(three[key].ratio_error < two[key].ratio_error for key in FOUR) > len(FOUR) / 2


def test_one_output_gives_sums_over_structures():
    found, rows = compared("tanh", (3, 10, 1), 4000)
    assert set(rows) == {"K", "Theta", "G1", "Theta1", *TOTALS.values()}
    assert found.outputs == 1
    for key in TOTALS.values():
        row = rows[key]
        assert abs(row.ratio - 1) < 4 * row.ratio_error, f"{key}: {row.ratio:.3f} +- {row.ratio_error:.3f}"
    for axes in ((1, 0, 2, 3), (0, 2, 1, 3), (3, 1, 2, 0)):  # all pairings: symmetric in all labels
        torch.testing.assert_close(found.mean["3V"].permute(axes), found.mean["3V"])


@pytest.mark.slow
def test_standard_errors_are_right():
    """60 repetitions: the scatter of the estimates is what the jackknife says."""
    runs = [compared("tanh", (3, 6, 2), 64, ("K", "Theta", "A", "B", "P"), seed)[1] for seed in range(60)]
    for key in ("K", "Theta", "A", "B", "P"):
        scatter = float(torch.tensor([run[key].ratio for run in runs]).var())
        claimed = torch.tensor([run[key].ratio_error for run in runs]).square()
        # Relative errors: of a variance from 60 numbers whose excess kurtosis is below 2, and of the mean claim.
        error = math.hypot(math.sqrt(4 / 59), float(claimed.std() / claimed.mean()) / math.sqrt(60))
        assert abs(scatter / float(claimed.mean()) - 1) < 4 * error, key


@pytest.mark.parametrize("outputs", [1, 3])
def test_estimators_are_unbiased(outputs):
    """Exactly: the mean over all subsets of 4 out of 7 networks is the estimate from all 7."""
    generator = torch.Generator().manual_seed(0)
    z = 1 + torch.randn(7, 2, outputs, dtype=torch.float64, generator=generator)
    H = 1 + torch.randn(7, 2, 2, outputs, outputs, dtype=torch.float64, generator=generator)
    names = ("K", "V", "Theta", "A", "B", "D", "F")

    def estimate(chosen):
        chosen = list(chosen)
        return estimates(sums_of(Differentials(z[chosen], H[chosen]), names), len(chosen), 5.0)

    everything = estimate(range(7))
    subsets = [estimate(chosen) for chosen in itertools.combinations(range(7), 4)]
    for name, value in everything.items():
        torch.testing.assert_close(torch.stack([found[name] for found in subsets]).mean(0), value, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_layer_4_tends_to_theory_in_every_vertex():
    """Three hidden layers, widths (16, 24, 16) and twice that, 2 r(2n) - r(n): the rest is of second order."""
    narrow, wide = (
        compared("tanh", (3, *hidden, 2), 16_000, dtype=torch.float32)[1] for hidden in ((16, 24, 16), (32, 48, 32))
    )
    for key in FOUR:
        r, r2 = narrow[key].ratio, wide[key].ratio
        value = 2 * r2 - r
        error = math.hypot(narrow[key].ratio_error, 2 * wide[key].ratio_error)
        left = max(abs(r - 1), abs(r2 - 1)) ** 2
        print(f"{key}: {r:.3f}, {r2:.3f} -> {value:.3f} +- {error:.3f} (second order {left:.3f})")
        assert abs(value - 1) < 4 * error + left, f"{key}: {value:.3f} +- {error:.3f} (second order {left:.3f})"
        if key in "BPQRSTU":
            assert error < 0.07, f"{key}: the standard error {error:.3f} is too large to tell anything"


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0, activation="gelu")
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.encoder(x)[:, 0])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("model", "x"),
    [(ConvNet(), torch.randn(2, 1, 8, 8)), (Recurrent(), torch.randn(2, 4, 3)), (Attention(), torch.randn(2, 3, 4))],
    ids=["conv", "gru", "attention"],
)
def test_any_architecture(model, x):
    """A GRU has no batching rule and goes one network at a time."""
    fast = torch.backends.mha.get_fastpath_enabled()
    found = statistics_over_seeds(model, x, num_networks=4, statistics=MEASURABLE)
    assert found.width == 1
    assert found.width_source.startswith("1, as there is no last hidden width to read off (not an MLP: the parameter")
    assert found.mean["Theta"].shape == (2, 2)
    for name in FOUR:
        assert found.mean[name].shape == found.error[name].shape == (2, 2, 2, 2)
        assert found.mean[name].dtype == torch.float64
    assert bool((found.mean["Theta"].diagonal() > 0).all())
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_the_ntk_is_that_of_the_networks():
    """Against measure.ntk of the same networks, drawn by hand."""
    from torch_eft import measure

    model, x = ConvNet(), torch.randn(2, 1, 8, 8)
    found = statistics_over_seeds(model, x, num_networks=3, statistics=("K", "Theta", "B"), lambdas=0.5, seed=3)
    twin = copy.deepcopy(model)
    kernels, outputs = [], []
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for _ in range(3):
            for part in reversed(list(twin.modules())):
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
            kernels.append(measure.ntk(twin, x, lambdas=0.5).double())
            outputs.append(measure.output(twin, x).double())
    H, z = torch.stack(kernels), torch.stack(outputs)
    torch.testing.assert_close(found.mean["Theta"], H.diagonal(dim1=3, dim2=4).mean((0, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean["K"], torch.einsum("sai,sbi->ab", z, z) / 9, rtol=1e-5, atol=1e-6)
    off = [H[..., i, j] for i in range(3) for j in range(3) if i != j]
    B = sum(torch.einsum("sab,scd->acbd", h, h) for h in off) / 18
    torch.testing.assert_close(found.mean["B"], B, rtol=1e-4, atol=1e-6)


def test_nothing_is_touched():
    model = ConvNet().train()
    model.norm.eval()
    x = torch.randn(3, 1, 8, 8)
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    first = statistics_over_seeds(model, x, num_networks=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [part.training for part in (model, model.norm, model.dropout)] == [True, False, True]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()
    torch.manual_seed(123)
    torch.randn(7)
    again = statistics_over_seeds(model, x, num_networks=4)
    other = statistics_over_seeds(model, x, num_networks=4, seed=1)
    for name in first.mean:
        assert torch.equal(first.mean[name], again.mean[name])
        assert not torch.equal(first.mean[name], other.mean[name])


def test_nothing_is_made_on_the_default_device():
    model, x = mlp((3, 8, 2)).double(), inputs()
    expected = statistics_over_seeds(model, x, num_networks=4, statistics=MEASURABLE)
    with torch.device("meta"):  # any tensor made without a device would now have no data
        found = statistics_over_seeds(model, x, num_networks=4, statistics=MEASURABLE)
    for name in MEASURABLE:
        assert torch.equal(found.mean[name], expected.mean[name])


def test_memory_changes_the_batches_only():
    model, x = mlp((3, 8, 2)).double(), inputs()
    whole = statistics_over_seeds(model, x, num_networks=40, statistics=MEASURABLE)
    single = statistics_over_seeds(model, x, num_networks=40, statistics=MEASURABLE, memory=1)
    for name in MEASURABLE:
        torch.testing.assert_close(single.mean[name], whole.mean[name], rtol=0, atol=1e-12)


def test_frozen_parameters_and_half_precision():
    """A frozen layer is drawn anew too, but does not learn; bfloat16 is computed in float32."""
    model = mlp((3, 8, 2)).bfloat16()
    model[0].requires_grad_(False)
    found = statistics_over_seeds(model, inputs(), num_networks=20, statistics=("K", "Theta"), width=5.0)
    assert found.width == 5
    assert found.width_source == "given"
    full = statistics_over_seeds(mlp((3, 8, 2)).bfloat16(), inputs(), num_networks=20, statistics=("K", "Theta"))
    assert torch.equal(found.mean["K"], full.mean["K"])
    assert float(found.mean["Theta"].diagonal().sum()) < float(full.mean["Theta"].diagonal().sum())


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(x * self.scale))


def test_parameters_that_nothing_draws_are_named():
    with pytest.raises(ValueError, match=r"initialize: the parameter 'scale' of Own is drawn by no reset_parameters"):
        statistics_over_seeds(Own(), inputs(), num_networks=4)
    assert (
        statistics_over_seeds(
            Own(), inputs(), num_networks=4, initialize=lambda module: module.head.reset_parameters()
        ).num_networks
        == 4
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_networks": 2}, "num_networks: 2 given; standard errors of covariances need at least 3 networks"),
        ({"statistics": ("K", "W")}, "statistics: 'W' cannot be measured by itself; choose from K, V, Theta"),
        (
            {"statistics": ("G1",)},
            "statistics: 'G1' cannot be measured by itself; ask for K, and compare(theory) gives G1",
        ),
        ({"statistics": ()}, "statistics: () given; give a sequence of names"),
        ({"statistics": "KV"}, "statistics: 'KV' given; give a sequence of names"),
        ({"width": 0}, "width: 0 given"),
        ({"memory": 0}, "memory: 0 given"),
        ({"lambdas": {"0.weight": 1.0}}, "lambdas: '0.bias' is missing"),
        ({"lambdas": -1.0}, "lambdas: -1 given"),
        ({"x": torch.randn(2, 4)}, "probe: (2, 4) float32 given, which the forward of Sequential"),
        ({"initialize": lambda module: module[0].weight.fill_(math.inf)}, "initialize: some networks' outputs or"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        statistics_over_seeds(mlp((3, 8, 2)), **{"x": inputs(), "num_networks": 4, **arguments})


def test_a_missing_derivative_is_an_error_in_words():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient

    class Custom(nn.Linear):
        def forward(self, x):
            return torch.tanh(Once.apply(super().forward(x)))

    assert bool(
        statistics_over_seeds(Custom(3, 2), inputs(), num_networks=3, statistics=("Theta",)).mean["Theta"].any()
    )
    with pytest.raises(ValueError, match=r"statistics: Custom has no derivatives of the order that dH need"):
        statistics_over_seeds(Custom(3, 2), inputs(), num_networks=3, statistics=("P",))


def test_a_theory_of_other_inputs_is_refused():
    found = statistics_over_seeds(mlp((3, 8, 2)), inputs(), num_networks=4, statistics=("K", "V"))
    with pytest.raises(ValueError, match=r"theory: it is one of 1 inputs, 2 were measured"):
        found.compare(initial_statistics(MLPEnsemble((3, 8, 2), "tanh"), inputs()[:1])[-1])
