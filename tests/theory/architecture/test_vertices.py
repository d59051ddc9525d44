"""Vertices of convolutional networks: identity maps are an MLP, one layer by drawn channels, two by networks."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.oracles.drawn_networks import drawn, mean_and_error
from tests.theory.architecture.drawn_chains import Drawn, plane, shifts
from tests.theory.architecture.trained_chains import drift_and_output
from torch_eft.theory import (
    STATISTICS,
    Architecture,
    MLPEnsemble,
    architecture_vertices,
    get_activation,
    initial_statistics,
    predict_drift,
    predict_training,
    read_architecture,
)
from torch_eft.theory.architecture.chains.chain import chain_of
from torch_eft.theory.architecture.chains.vertices import chain_kernels, chain_vertices
from torch_eft.theory.architecture.label_maps import LabelMaps, convolution_axis, flatten_axis, identity_maps
from torch_eft.theory.architecture.nodes import Data, Elementwise, Pool, Weight

HYPERPARAMETERS = {"C_W": 1.4, "C_b": 0.1, "lambda_W": 0.8, "lambda_b": 0.3}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stack(maps, positions, channels, activation, **laws):
    nodes = [Data(channels[0], positions)]
    for number, (layer, n) in enumerate(zip(maps, channels[1:], strict=True)):
        if number:
            nodes.append(Elementwise((len(nodes) - 1,), get_activation(activation)))
        nodes.append(Weight((len(nodes) - 1,), n, maps=layer, **HYPERPARAMETERS, **laws))
    return Architecture(nodes)


@pytest.mark.parametrize("name", ["tanh", pytest.param("relu", marks=pytest.mark.slow)])
def test_identity_maps_and_a_flattened_read_out_are_an_mlp_at_every_position(name):
    """At the read-out the two labels of a delta are at one position, and averages over both positions are left."""
    same = identity_maps((2,))
    x = normal(1, 2, 3)
    found = architecture_vertices(
        stack([same, same, LabelMaps((flatten_axis(2),))], (2,), (3, 16, 24, 2), name), x, statistics=STATISTICS
    )
    mlp = initial_statistics(MLPEnsemble([3, 16, 24, 2], name, **HYPERPARAMETERS), x[0])[-1]

    def at_one_position(tensor, pairs):
        total = 0.0
        for p in range(2):
            for q in range(2):
                place = [0, 0, 0, 0]
                for pair, position in zip(pairs, (p, q), strict=True):
                    for slot in pair:
                        place[slot] = position
                total += tensor[tuple(place)] / 4
        return total

    for field in STATISTICS:
        value, tensor = getattr(found, field).flatten()[0], getattr(mlp, field)
        if tensor.ndim == 2:
            expected = tensor.diagonal().mean()
        else:
            expected = at_one_position(tensor, ((0, 3), (1, 2)) if field == "P" else ((0, 1), (2, 3)))
        torch.testing.assert_close(value, torch.as_tensor(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "samples"), [pytest.param("relu", 2, marks=pytest.mark.slow), ("tanh", 1)])
def test_one_position_a_pair_is_enough_for_a_flattened_read_out(name, samples):
    """The vertices on N^4 P^2 numbers are those on (N P)^4; strides, padding and uniform weights behind layer 1."""
    maps = [convolution_axis(4, 2, stride=2), convolution_axis(2, 3, padding=(1, 1)), flatten_axis(2)]
    network = stack([LabelMaps((axis,)) for axis in maps], (4,), (3, 8, 20, 1), name)
    nodes = [node if index < 3 or not isinstance(node, Weight) else replace(node, weight_law="uniform")
             for index, node in enumerate(network.nodes)]  # fmt: skip
    chain = chain_of(Architecture(nodes), normal(samples, 4, 3))
    assert chain.selects
    layers, names = chain_kernels(chain), [*STATISTICS[1:3], *STATISTICS[4:], "E_zzzz", "E_zzH", "E_HH", "E_ddI"]
    paired = next(chain_vertices(chain, layers, names, 0, 2, 0)[1])
    chain.__dict__["selects"] = False
    whole = next(chain_vertices(chain, layers, names, 0, 2, 0)[1])
    for field in names:
        scale = float(whole[field].abs().max())
        torch.testing.assert_close(paired[field], whole[field], rtol=0, atol=1e-9 * scale + 1e-14)


def test_a_module_is_read_as_the_chain_it_computes():
    """What the first layer's weights multiply, and the second's, are those of nn.Conv2d, pooling and Flatten."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2, stride=2, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(3, 4, (1, 2)), nn.Tanh(),
        nn.Flatten(), nn.Linear(8, 5)
    ).double()  # fmt: skip
    x = normal(2, 2, 6, 6)
    chain = chain_of(read_architecture(model, x), x)
    first = model[0](x).flatten(2)
    weight = model[0].weight.flatten(2).transpose(1, 2).flatten(1)  # offset, then channel
    torch.testing.assert_close(
        (chain.patches @ weight.T + model[0].bias).unflatten(0, (2, -1)).mT, first, rtol=0, atol=1e-12
    )
    moved = torch.einsum("kop,ncp->nkco", chain.layers[1].matrices, first.tanh())
    second = torch.einsum("dck,nkco->ndo", model[3].weight.flatten(2), moved) + model[3].bias[:, None]
    torch.testing.assert_close(second, model[3](model[2](model[1](model[0](x)))).flatten(2), rtol=0, atol=1e-12)
    last = torch.einsum("kop,ncp->nkco", chain.layers[2].matrices, second.tanh())
    weight = model[6].weight.unflatten(1, (4, -1))
    torch.testing.assert_close(torch.einsum("dck,nkco->nd", weight, last) + model[6].bias, model(x), rtol=0, atol=1e-12)


def test_one_convolution_is_exact_at_any_width():
    """K, Theta, V, A and B of conv, flatten, dense against drawn channels, biases uniform."""
    laws = {"bias_law": "uniform"}
    maps = [LabelMaps((convolution_axis(3, 2),)), LabelMaps((flatten_axis(2),))]
    network = stack(maps, (3,), (4, 16, 1), "tanh", **laws)
    x = normal(2, 3, 4, seed=2)
    found = architecture_vertices(network, x, statistics=("V", "A", "B"), num_samples=2**16)
    chain = chain_of(network, x)
    Theta = chain_kernels(chain)[1][0]
    generator = torch.Generator().manual_seed(0)
    count, C_W, lambda_W = 100_000, 1.4, 0.8
    W = drawn("gaussian", C_W / 8, (count, 8), generator)
    z = (W @ chain.patches.T + drawn("uniform", 0.1, (count, 1), generator)).unflatten(1, (2, 2))  # sample, position
    s, d = torch.tanh(z), 1 - torch.tanh(z) ** 2
    ss, dd = (torch.einsum("sap,sbp->sabp", value, value) for value in (s, d))
    G, T = ss.mean(3), Theta.unflatten(0, (2, 2)).unflatten(2, (2, 2))
    h = lambda_W * G + C_W * (dd * torch.einsum("apbp->abp", T)).mean(3)
    slope = torch.einsum("sap,sbq->sapbq", d, d) * T  # s'_1(p) s'_2(q) Theta(1p, 2q)
    for name, values, value in (
        ("K", 0.1 + C_W * G[:, 0, 1], found.K[0, 1]),
        ("Theta", 0.3 + h[:, 0, 1], found.Theta[0, 1]),
        ("V", C_W**2 * (G - G.mean(0))[:, 0, 1] * (G - G.mean(0))[:, 1, 1], found.V[0, 1, 1, 1]),
        ("A", (h - h.mean(0))[:, 0, 1] * (h - h.mean(0))[:, 0, 0], found.A[0, 1, 0, 0]),
        ("B", C_W**2 / 4 * (slope[:, 0, :, 1].square()).sum((1, 2)), found.B[0, 0, 1, 1]),
    ):
        measured, error = mean_and_error(values)
        assert abs(float(value) - measured) < 4 * (error + found.error.get(name, 0.0)), name


def test_what_is_no_chain_is_refused():
    x = normal(1, 2, 3)
    same, tanh = identity_maps((2,)), get_activation("tanh")
    flat = LabelMaps((flatten_axis(2),))
    with pytest.raises(ValueError, match="no activation stands in front of 'weight'"):
        architecture_vertices(Architecture([Data(3, (2,)), Weight((0,), 4, maps=same), Weight((1,), 1, maps=flat)]), x)
    pooled = [Data(3, (2,)), Weight((0,), 4, maps=same), Pool((1,), same), Elementwise((2,), tanh)]
    with pytest.raises(ValueError, match="'pool' pools in front of an activation"):
        architecture_vertices(Architecture([*pooled, Weight((3,), 1, maps=flat)]), x)
    with pytest.raises(ValueError, match="orthogonal weights of convolutions are not derived"):
        architecture_vertices(stack([same, flat], (2,), (3, 8, 1), "tanh", weight_law="orthogonal"), x)
    with pytest.raises(ValueError, match=r"have up to 200 labels \(sample, position\)"):
        architecture_vertices(stack([same, flat], (2,), (3, 8, 1), "tanh"), normal(100, 2, 3))


@pytest.mark.slow
def test_two_convolutions_extrapolated_in_width():
    """B and F, whose terms across neurons carry unequal channel ratios, from networks of two widths, a + b / n."""
    maps = [
        LabelMaps((convolution_axis(3, 3, padding=(1, 1)),) * 2),
        LabelMaps((convolution_axis(3, 3, stride=2, padding=(1, 1)),) * 2),
        LabelMaps((flatten_axis(2),) * 2),
    ]
    one, two = shifts(3, 3, 1, 1), shifts(3, 3, 2, 1)
    written = [plane(one, one), plane(two, two), torch.eye(4, dtype=torch.float64)[:, None]]
    x = normal(2, 3, 3, 2, seed=1)
    found = architecture_vertices(
        stack(maps, (3, 3), (2, 8, 16, 2), "tanh"), x, statistics=("B", "F"), num_samples=2**15, num_replicas=2
    )
    options = [HYPERPARAMETERS[name] for name in ("C_b", "C_W", "lambda_b", "lambda_W")]

    def measured(n, count):
        generator = torch.Generator().manual_seed(n)
        parts = []
        for _ in range(count // 25):
            network = Drawn(
                written, (2, n, 2 * n), options, get_activation("tanh"), x.reshape(2, 9, 2).mT, 25, generator
            )
            parts.append([value.mean(0) for value in network.parts()[2:]])
        return [torch.stack(some) for some in zip(*parts, strict=True)]

    for name, narrow, wide in zip("BF", measured(8, 1000), measured(16, 1000), strict=True):
        expected = getattr(found, name)

        def along(values, expected=expected):
            slopes = (values * expected).flatten(1).sum(1) / expected.square().sum()
            return float(slopes.mean()), float(slopes.std()) / len(slopes) ** 0.5

        (first, first_error), (second, second_error) = along(narrow), along(wide)
        error = (first_error**2 + 4 * second_error**2) ** 0.5
        print(f"{name}: {first:.3f}, {second:.3f}, extrapolated {2 * second - first:.4f}({error:.4f})")
        assert abs(2 * second - first - 1) < 4 * error + 0.02  # a + b / n leaves c / n^2


def trained_case(n):
    maps = [LabelMaps((convolution_axis(size, 2),)) for size in (4, 3)]
    network = stack([*maps, LabelMaps((flatten_axis(2),))], (4,), (2, n, 2 * n, 1), "tanh")
    return network, normal(2, 4, 2, seed=3), torch.tensor([[2.0], [-1.5]], dtype=torch.float64)


def test_training_of_a_chain():
    network, x, y = trained_case(24)
    options = {"learning_rate": 0.08, "steps": 4, "reduction": "sum"}
    forecast = predict_training(network, x, y, x[:1], num_samples=2**11, **options)
    plain = predict_training(network, x, y, x[:1], order=0, **options)
    last = architecture_vertices(network, torch.cat([x[:1], x]), statistics=("K", "Theta"))
    torch.testing.assert_close(plain.output_covariance[0, :, :, 0, 0], last.K[:1, :1])
    torch.testing.assert_close(plain.ntk_mean[0, :, :, 0, 0], last.Theta[:1, :1])
    assert float((forecast.ntk_change[-1] / plain.ntk_mean[-1]).abs().max()) > 0.001
    assert "channels 24-48-1, tanh" in forecast.provenance
    assert "n = 48 channels" in str(forecast.validity)
    kinked = stack([identity_maps((2,)), LabelMaps((flatten_axis(2),))], (2,), (3, 8, 1), "relu")
    with pytest.raises(ValueError, match="relu has a kink"):
        predict_training(kinked, normal(2, 2, 3), y, normal(1, 2, 3), **options)
    with pytest.raises(ValueError, match="takes the covariance of the dNTK, which is derived for MLPs"):
        predict_drift(network, x, y, x, **options)


@pytest.mark.slow
def test_drift_of_trained_chains():
    """P .. U with patch averages and unequal channels: 600 pairs of networks of two widths, extrapolated a + b / n."""
    measured = {}
    options = [HYPERPARAMETERS[name] for name in ("C_b", "C_W", "lambda_b", "lambda_W")]
    for n in (24, 48):
        network, x, y = trained_case(n)
        drift, output = drift_and_output(x, (n, 2 * n), options, y[:, 0], 0.08, 40, 600, batch=200)
        measured[n] = 2 * n * drift, 2 * n * output
    forecast, plain = (
        predict_training(
            network, x, y, x, learning_rate=0.08, steps=40, reduction="sum", at_steps=[40], order=order,
            num_samples=2**14,
        )
        for order in (1, 0)
    )  # fmt: skip
    mean = plain.output_mean[0, :, 0]
    for name, index, expected in (
        ("drift", 0, 96 * forecast.ntk_change[0, :, :, 0, 0]),
        ("mean output", 1, 96 * (forecast.output_mean[0, :, 0] - mean)),
    ):
        narrow, wide = (measured[n][index] - (2 * n * mean if index else 0.0) for n in (24, 48))
        found = 2 * wide.mean(0) - narrow.mean(0)
        error = (4 * wide.var(0) / len(wide) + narrow.var(0) / len(narrow)).sqrt()
        print(name, found.flatten().tolist(), error.flatten().tolist(), expected.flatten().tolist())
        # Halving 1/n leaves a quarter of the next order, a few per cent.
        assert bool(((found - expected).abs() < 4 * error + 0.05 * expected.abs().max()).all()), name
