"""Hidden kernels against features computed by hand; CKA, effective rank and alignment by their definitions."""

import math
from itertools import permutations

import pytest
import torch
from torch import nn

from tests.oracles.models import ConvNet, mlp
from torch_eft import measure
from torch_eft.measure.representations.alignment import effective_rank, target_alignment
from torch_eft.measure.representations.change import (
    block_drift,
    compare_representations,
    movement,
    representation_change,
)
from torch_eft.measure.representations.hidden_kernels import representation


def test_kernels_of_the_activations_of_an_mlp():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(4, 5)
    kernels = measure.hidden_kernels(model, x)
    assert list(kernels) == ["1", "3"]
    with torch.no_grad():
        for name, depth in (("1", 2), ("3", 4)):
            features = model[:depth](x)
            torch.testing.assert_close(kernels[name], features @ features.T / features.shape[1])


def test_without_activation_modules_weighted_layers_but_the_last():
    torch.manual_seed(0)
    model, x = ConvNet().eval(), torch.randn(3, 1, 8, 8)
    kernels = measure.hidden_kernels(model, x)
    assert list(kernels) == ["conv"]
    features = model.conv(x).detach().flatten(1)
    torch.testing.assert_close(kernels["conv"], features @ features.T / features.shape[1])
    assert list(measure.hidden_kernels(model, x, layers=["norm", "head"])) == ["norm", "head"]


class Reusing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(3, 6), nn.Linear(6, 2), nn.Tanh()

    def forward(self, x):
        return self.act(self.second(self.act(self.first(x))))


def test_a_module_called_twice_is_recorded_twice():
    torch.manual_seed(0)
    model, x = Reusing(), torch.randn(4, 3)
    kernels = measure.hidden_kernels(model, x, layers=["act"])
    assert list(kernels) == ["act", "act:2"]
    features = torch.tanh(model.first(x)).detach()
    torch.testing.assert_close(kernels["act"], features @ features.T / 6)


@pytest.mark.parametrize("output_fn", [None, lambda z: z[None].squeeze(0)])
def test_the_activation_of_the_output_is_no_hidden_layer(output_fn):
    torch.manual_seed(0)
    model, x = nn.Sequential(*mlp(), nn.Sigmoid()), torch.randn(4, 5)
    assert list(measure.hidden_kernels(model, x, output_fn=output_fn)) == ["1", "3"]
    assert list(measure.hidden_kernels(model, x, layers=["5"])) == ["5"]
    assert list(measure.hidden_kernels(Reusing(), torch.randn(4, 3))) == ["act"]


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.rnn(x.transpose(0, 1))[0][-1])


@pytest.mark.parametrize(("samples", "times"), [(4, 4), (4, 3), (1, 2), (2, 1)])
def test_samples_may_be_on_another_axis(samples, times):
    torch.manual_seed(0)
    model, x = TimeFirst().double(), torch.randn(samples, times, 3, dtype=torch.float64)
    kernels = measure.hidden_kernels(model, x)
    assert list(kernels) == ["rnn"]
    features = model.rnn(x.transpose(0, 1))[0].transpose(0, 1).detach().flatten(1)
    torch.testing.assert_close(kernels["rnn"], features @ features.T / features.shape[1])


def test_unknown_layers_are_named():
    with pytest.raises(ValueError, match=r"layers: 'nope' given; give one of '0', '1', '2'"):
        measure.hidden_kernels(mlp(), torch.ones(2, 5), layers=["nope"])


def test_cka_of_features_is_invariant_under_rotation_scale_and_shift():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator))[0]
    moved = 3 * features @ rotation + 7
    K, L = features @ features.T, moved @ moved.T
    assert float(measure.linear_cka(L, K)) == pytest.approx(1, abs=1e-12)
    other = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    # By its definition: ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) of centered features (Kornblith et al., eq. 2).
    X, Y = features - features.mean(0), other - other.mean(0)
    expected = (Y.T @ X).norm() ** 2 / ((X.T @ X).norm() * (Y.T @ Y).norm())
    assert float(measure.linear_cka(other @ other.T, K)) == pytest.approx(float(expected), abs=1e-12)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hsic_by_tuples(K, L):
    """U-statistic over all quadruples of different samples (Song et al. 2012, after eq. 4)."""
    terms = [K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q]) for i, j, q, r in permutations(range(len(K)), 4)]
    return float(torch.stack(terms).mean())


def hsic_1(K, L):
    """Song et al. 2012, eq. 4."""
    m = len(K)
    K, L = K - torch.diag(K.diagonal()), L - torch.diag(L.diagonal())
    one = torch.ones(m, dtype=K.dtype)
    value = (
        (K @ L).trace() + (one @ K @ one) * (one @ L @ one) / ((m - 1) * (m - 2)) - 2 / (m - 2) * (one @ K @ L @ one)
    )
    return float(value / (m * (m - 3)))


@pytest.mark.parametrize("samples", [4, 6])
def test_debiased_cka_by_two_other_formulas(samples):
    X, Y = randn(samples, 3), randn(samples, 5, seed=1)
    K, L = X @ X.T, Y @ Y.T
    for hsic in (hsic_by_tuples, hsic_1):
        expected = hsic(K, L) / math.sqrt(hsic(K, K) * hsic(L, L))
        assert float(measure.linear_cka(K, L, debiased=True)) == pytest.approx(expected, abs=1e-12)
    assert float(measure.linear_cka(2 * K + 3, K, debiased=True)) == pytest.approx(1, abs=1e-12)


def test_cka_of_independent_features_is_biased_and_the_debiased_one_is_not():
    """10 samples, 100 features each, 200 draws: a standard error of about 0.15 / sqrt(200)."""
    found = {True: [], False: []}
    for seed in range(200):
        X, Y = randn(10, 100, seed=seed), randn(10, 100, seed=1000 + seed)
        for debiased in found:
            found[debiased].append(float(measure.linear_cka(X @ X.T, Y @ Y.T, debiased=debiased)))
    means = {debiased: sum(values) / len(values) for debiased, values in found.items()}
    assert means[False] > 0.8
    assert abs(means[True]) < 0.05


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_that_is_not_defined_is_nan(debiased):
    one = torch.ones(1, 1)
    assert math.isnan(measure.linear_cka(one, one, debiased=debiased))
    X = randn(6, 3).float()
    K = X @ X.T
    same = torch.full((6, 4), 0.1) * torch.tensor([1.0, 3.0, 0.7, 0.2])  # centered, this is rounding and not 0
    for constant in (same @ same.T, torch.zeros(6, 6), torch.full((6, 6), 1 / 3)):
        assert math.isnan(measure.linear_cka(K, constant, debiased=debiased))
        assert math.isnan(measure.linear_cka(constant, K, debiased=debiased))
    small = 100 + 1e-2 * X  # constant but for a part that can still be told from rounding in float64
    small = (small.double() @ small.double().T, K.double())
    assert not math.isnan(measure.linear_cka(*small, debiased=debiased))


def test_debiased_cka_needs_four_samples():
    X = randn(3, 2)
    assert math.isnan(measure.linear_cka(X @ X.T, X @ X.T, debiased=True))
    assert float(measure.linear_cka(X @ X.T, X @ X.T)) == pytest.approx(1)


def test_effective_ranks_of_spectra_known_by_hand():
    rotation = torch.linalg.qr(randn(5, 5))[0]

    def kernel(*spectrum):
        return rotation @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ rotation.T

    for entropy in (False, True):
        assert float(effective_rank(kernel(2, 2, 2, 0, 0), entropy=entropy)) == pytest.approx(3)
        assert float(effective_rank(kernel(7, 0, 0, 0, 0), entropy=entropy)) == pytest.approx(1)
        assert math.isnan(effective_rank(torch.zeros(3, 3), entropy=entropy))
        assert float(effective_rank(torch.ones(1, 1), entropy=entropy)) == pytest.approx(1)
    assert float(effective_rank(kernel(3, 1, 0, 0, 0))) == pytest.approx(16 / 10)
    assert float(effective_rank(kernel(3, 1, 0, 0, 0), entropy=True)) == pytest.approx(
        4 / 3**0.75
    )  # H = 2 log 2 - (3/4) log 3


def test_target_alignment_by_its_definition():
    X, y = randn(7, 3), randn(7, 2, seed=1)
    K = X @ X.T
    centering = torch.eye(7, dtype=torch.float64) - 1 / 7
    first, second = centering @ K @ centering, centering @ y @ y.T @ centering
    expected = (first * second).sum() / (first.norm() * second.norm())
    assert float(target_alignment(K, y)) == pytest.approx(float(expected), abs=1e-12)
    assert float(target_alignment(y @ y.T, 3 * y + 1)) == pytest.approx(1)
    assert float(target_alignment(K, y[:, 0])) == pytest.approx(float(target_alignment(K, y[:, :1])))


def test_class_numbers_are_taken_as_one_hot():
    X, labels = randn(7, 3), torch.tensor([0, 2, 5, 2, 0, 0, 5])
    one_hot = nn.functional.one_hot(labels).double()
    expected = float(target_alignment(X @ X.T, one_hot))
    assert float(target_alignment(X @ X.T, labels)) == pytest.approx(expected, abs=1e-12)
    assert float(target_alignment(X @ X.T, labels.int())) == pytest.approx(expected, abs=1e-12)
    assert float(target_alignment(one_hot @ one_hot.T, labels)) == pytest.approx(1)


def test_target_alignment_that_is_not_defined():
    K = randn(4, 3) @ randn(4, 3).T
    assert math.isnan(target_alignment(K, torch.zeros(4, dtype=torch.long)))
    assert math.isnan(target_alignment(torch.ones(4, 4), torch.tensor([0, 1, 0, 1])))
    assert math.isnan(target_alignment(torch.ones(1, 1), torch.tensor([1])))
    for wrong in (torch.zeros(3, 2), torch.zeros(4, 2, 2), torch.tensor(1)):
        with pytest.raises(ValueError, match=r"targets: .* given for 4 samples"):
            target_alignment(K, wrong)


def trained(steps, width=12, inputs=6, activation=nn.Tanh, seed=0):
    torch.manual_seed(seed)
    model, x, y = mlp((5, width, width, 2), activation).double(), randn(inputs, 5), randn(inputs, 2, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model, x, y


def test_representation_holds_kernels_widths_and_activations():
    model, x, y = trained(0)
    found = representation(model, x, targets=y, keep=True)
    assert found.widths == {"1": 12, "3": 12}
    with torch.no_grad():
        torch.testing.assert_close(found.activations["3"], model[:4](x))
    torch.testing.assert_close(found.K, measure.hidden_kernels(model, x))
    torch.testing.assert_close(found.target_kernel, y @ y.T)
    plain = representation(model, x, layers=["2"])
    assert plain.activations is None and plain.target_kernel is None and list(plain.K) == ["2"]


def test_activations_survive_operations_in_place():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    x = torch.randn(3, 5)
    found = representation(model, x, layers=["0"], keep=True)
    with torch.no_grad():
        torch.testing.assert_close(found.activations["0"], model[0](x))


def test_the_change_of_a_trained_network_layer_by_layer():
    (old, x, y), (new, _, _) = trained(0), trained(30)
    before, now = (representation(model, x, targets=y, keep=True) for model in (old, new))
    change = compare_representations(now, before)
    assert str(representation_change(new, x, old, new, targets=y)) == str(change)
    moves = movement(now, before)
    for depth, name in ((2, "1"), (4, "3")):
        with torch.no_grad():
            s_0, s = old[:depth](x), new[:depth](x)
        K_0, K, found = s_0 @ s_0.T / 12, s @ s.T / 12, change.layers[name]
        torch.testing.assert_close(moves[name], torch.einsum("aj,bj->ab", s - s_0, s - s_0) / 12)
        assert found.relative_change == pytest.approx(float((K - K_0).norm() / K_0.norm()))
        assert found.cka_distance == pytest.approx(1 - float(measure.linear_cka(K, K_0)))
        assert found.debiased_cka_distance == pytest.approx(1 - float(measure.linear_cka(K, K_0, debiased=True)))
        centered = [s - s.mean(0) for s in (s_0, s)]
        ranks = [float(effective_rank(s @ s.T)) for s in centered]
        assert found.effective_rank == pytest.approx(tuple(ranks))
        assert found.alignment == pytest.approx((float(target_alignment(K_0, y)), float(target_alignment(K, y))))
        assert found.movement == pytest.approx(float((s - s_0).norm() / s_0.norm()))
        assert found.alignment[1] > found.alignment[0]  # it has learned something
    lines = str(change).splitlines()
    assert lines[0].split()[:2] == ["layer", "|dK|/|K|"] and len(lines) == 5
    assert "6 samples, fewer than the features of 2 of 2 layers" in lines[3]
    assert "of order 1/sqrt(n)" in lines[4]


def test_no_change_and_nothing_kept():
    model, x, _ = trained(0, width=3)
    found = representation(model, x)
    change = compare_representations(found, found)
    for layer in change.layers.values():
        assert layer.relative_change == 0
        assert layer.cka_distance == pytest.approx(0, abs=1e-12)
        assert math.isnan(layer.movement) and math.isnan(layer.alignment[0])
    assert change.validity.flag == "valid" and change.validity.reasons == ()
    with pytest.raises(ValueError, match=r"needs the activations; .*keep=True"):
        movement(found, found)


def test_a_single_sample_is_said_to_be_one():
    model, x, _ = trained(0, inputs=1)
    found = representation(model, x)
    change = compare_representations(found, found)
    assert math.isnan(change.layers["1"].cka_distance) and math.isnan(change.layers["1"].effective_rank[0])
    assert any("one sample only" in words for words in change.validity.reasons)
    assert any("debiasing it takes four samples" in words for words in change.validity.reasons)


def test_neurons_move_by_one_over_root_n_and_kernels_by_one_over_n():
    """In the parametrization of the theory (rates lambda_W / n); rms over 60 networks, widths 32 and 512."""
    x, y = randn(3, 4), randn(3, 1, seed=1)
    sizes = {}
    for n in (32, 512):
        moved, changed = [], []
        for seed in range(60):
            torch.manual_seed(seed)
            model = mlp((4, n, n, 1)).double()
            for layer in model[::2]:
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)
            before = representation(model, x, keep=True)
            for _ in range(5):
                gradients = torch.autograd.grad((model(x) - y).square().sum() / 2, list(model.parameters()))
                with torch.no_grad():
                    for p, g in zip(model.parameters(), gradients, strict=True):
                        p -= 0.2 * g / (p.shape[1] if p.ndim == 2 else 1)
            now = representation(model, x, keep=True)
            moved.append(movement(now, before)["3"].trace())
            changed.append((now.K["3"] - before.K["3"]).square().sum())
        sizes[n] = [float(torch.stack(squares).mean().sqrt()) for squares in (moved, changed)]
    movement_exponent, kernel_exponent = (math.log(sizes[512][i] / sizes[32][i]) / math.log(16) for i in (0, 1))
    assert movement_exponent == pytest.approx(-0.5, abs=0.1)
    assert kernel_exponent == pytest.approx(-1, abs=0.2)


def test_different_layers_or_probes_are_named():
    model, x, _ = trained(0)
    found = representation(model, x)
    with pytest.raises(ValueError, match=r"reference: the layer '3' is in one of the two only"):
        compare_representations(found, representation(model, x, layers=["1"]))
    with pytest.raises(ValueError, match=r"reference: the layer '1' has shape \(6, 6\) now, \(5, 5\)"):
        compare_representations(found, representation(model, x[:5]))


def test_activations_that_are_not_finite_are_named():
    model, x, _ = trained(0)
    with torch.no_grad():
        model[2].weight[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"the activations of layer '3' on sample 0 of the probe are NaN"):
        representation(model, x)


def test_drift_of_blocks_made_by_hand():
    reference = {"a": torch.eye(2), "b": torch.zeros(2, 2), "c": torch.zeros(2, 2), "d": torch.ones(2, 2, 3, 3)}
    blocks = {"d": 1.5 * torch.ones(2, 2, 3, 3), "a": torch.diag(torch.tensor([1.0, 2.0])), "b": torch.zeros(2, 2)}
    blocks["c"] = torch.ones(2, 2)
    drift = block_drift(blocks, reference)
    assert drift == pytest.approx({"d": 0.5, "a": 2**-0.5, "b": 0.0, "c": math.inf})
    assert list(drift) == ["d", "a", "b", "c"]
    assert block_drift({}, {}) == {}
    with pytest.raises(ValueError, match=r"the layer 'a' is in one of the two only"):
        block_drift({}, {"a": torch.eye(2)})
    with pytest.raises(ValueError, match=r"the layer 'a' has shape \(3, 3\) now, \(2, 2\)"):
        block_drift({"a": torch.eye(3)}, {"a": torch.eye(2)})
