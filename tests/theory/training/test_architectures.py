"""Infinite-width training of convolutions, skips and norms: against MLPs, closed forms, and trained networks."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from tests.theory.architecture.networks import residual
from tests.theory.architecture.test_closed import mlp
from torch_eft import Training, theory
from torch_eft.theory.architecture.closed import ClosedKernels, Samples
from torch_eft.theory.architecture.statistics import prepare


def points(count, shape=(3,), seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "training",
    [
        Training(learning_rate=0.01, steps=20, reduction="sum", momentum=0.5),
        Training(learning_rate=0.1, steps=5, dynamics="gradient_flow"),
    ],
    ids=str,
)
def test_an_mlp_trains_alike_as_a_graph(training):
    architecture, ensemble = mlp("tanh")
    data = points(4), points(4, (2,), 1), points(3, seed=2)
    graph, recursion = (
        theory.predict_training(network, *data, training, order=0) for network in (architecture, ensemble)
    )
    for name in ("output_mean", "output_covariance", "ntk_mean"):
        assert (getattr(graph, name) - getattr(recursion, name)).abs().max() < 1e-11, name
    assert "order 0 (infinite width), Architecture(4 weights" in graph.provenance
    assert graph.validity.flag == "valid"
    epsilon = recursion.validity.numbers["epsilon"]
    assert graph.validity.numbers["epsilon"] == pytest.approx(epsilon, rel=0.25)  # of the first two points, sampled


def test_regression_is_bayes_and_the_end_of_training():
    architecture, ensemble = mlp("relu")
    x, y, x_test = points(4), points(4, (2,), 1), points(3, seed=2)
    for kernel in ("nngp", "ntk"):
        found, other = (
            theory.predict_kernel_regression(network, x, y, x_test, kernel=kernel, ridge=0.1)
            for network in (architecture, ensemble)
        )
        assert (found.mean - other.mean).abs().max() < 1e-11
        assert (found.covariance - other.covariance).abs().max() < 1e-11
    K, Theta = theory.architecture_kernels(architecture, torch.cat([x_test, x]))
    noisy = K[3:, 3:] + 0.1 * torch.eye(4, dtype=K.dtype)
    bayes = theory.predict_kernel_regression(architecture, x, y, x_test, kernel="nngp", ridge=0.1)
    assert (bayes.mean - K[:3, 3:] @ torch.linalg.solve(noisy, y)).abs().max() < 1e-11
    posterior = K[:3, :3] - K[:3, 3:] @ torch.linalg.solve(noisy, K[3:, :3])
    assert (bayes.covariance - posterior).abs().max() < 1e-11
    trained = theory.predict_training(
        architecture, x, y, x_test, learning_rate=0.01, steps=math.inf, order=0, at_steps=[math.inf]
    )
    end = theory.predict_kernel_regression(architecture, x, y, x_test)
    assert (end.mean - trained.output_mean[0]).abs().max() < 1e-10
    assert (end.covariance - trained.output_covariance[0, :, :, 0, 0]).abs().max() < 1e-10
    assert (end.mean - Theta[:3, 3:] @ torch.linalg.solve(Theta[3:, 3:], y)).abs().max() < 1e-10


def test_kernels_do_not_depend_on_how_pairs_are_tiled():
    x = points(3, (3, 6))
    architecture = theory.read_architecture(residual(8, nn.ReLU), x)
    with torch.no_grad():
        together = ClosedKernels(architecture, prepare(architecture, x), Samples.all_pairs(3))
        Theta_pairs = together.ntk()
    for memory in (1, 2**20):
        K, Theta = theory.architecture_kernels(architecture, x, memory=memory)
        rows, columns = together.samples.rows, together.samples.columns
        assert (Theta[columns, rows] / Theta_pairs - 1).abs().max() < 1e-12
        assert (K[columns, rows] / together.output_kernel - 1).abs().max() < 1e-12


def test_what_is_not_derived_is_refused():
    architecture, _ = mlp("tanh")
    x, y = points(4), points(4, (2,), 1)

    def predict(network=architecture, targets=y, probe=x, order=0, **keywords):
        return theory.predict_training(network, x, targets, probe, learning_rate=0.01, steps=2, order=order, **keywords)

    with pytest.raises(ValueError, match=r"order 1/n are derived for chains of convolutions and dense layers"):
        signals = points(2, (3, 6))
        network = theory.read_architecture(residual(8), signals)
        theory.predict_training(network, signals, y[:2], signals, learning_rate=0.01, steps=2, order=1)
    with pytest.raises(ValueError, match=r"squared error on full batches\. predict_from_networks takes other losses"):
        predict(batches=[[0, 1]])
    with pytest.raises(ValueError, match="y_train: shape"):
        predict(targets=y[:, 0])
    with pytest.raises(ValueError, match=r"x_probe: \(4, 2\) given"):
        predict(probe=x[:, :2])
    with pytest.raises(ValueError, match="beyond the linear stability bound"):
        theory.predict_training(architecture, x, y, x, learning_rate=1e3, steps=2, order=0)
    with pytest.raises(ValueError, match="ridge: -1 given"):
        theory.predict_kernel_regression(architecture, x, y, x, ridge=-1)


class Skip(nn.Module):
    """A convolution with a way around it."""

    def __init__(self, n):
        super().__init__()
        self.layer = nn.Conv1d(n, n, 3, padding=1)

    def forward(self, x):
        return x + self.layer(x.relu())


def wide(n):
    last = nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(n, 1)
    return nn.Sequential(nn.Conv1d(2, n, 3, padding=1), Skip(n), *last)


STEPS = (0, 4, 20)


def trained_outputs(n, seeds, x, y, probe, rate):
    """Outputs of networks drawn and trained by full-batch gradient descent, at ``STEPS``, (T, seeds, probes)."""
    networks = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        networks.append(wide(n))
    theta, _ = stack_module_state(networks)
    theta = {name: value.detach() for name, value in theta.items()}
    gradient = vmap(grad(lambda p: (functional_call(networks[0], p, (x,)) - y).square().sum() / 2))
    output = vmap(lambda p: functional_call(networks[0], p, (probe,))[:, 0])
    seen = [output(theta)]
    for t in range(1, STEPS[-1] + 1):
        g = gradient(theta)
        theta = {name: value - rate * g[name] for name, value in theta.items()}
        if t in STEPS:
            seen.append(output(theta))
    return torch.stack(seen).double()


@pytest.mark.slow
def test_order_0_against_an_ensemble_of_trained_networks():
    """Means and variances of the outputs of 300 wide networks, before and in training, within four standard errors.

    Beside the next order: 3 / n of the mean's size, and 3 / n of K + |y|^2 in the variance, which an NTK that differs
    from seed to seed leaves where order 0 has none any more. Targets are small: networks leave the kernel regime with
    their square.
    """
    n, seeds = 100, 300
    x, y = points(4, (2, 6)).float(), 0.3 * torch.tensor([[1.0], [-1], [1], [-1]])
    probe = torch.cat([points(3, (2, 6), 5).float(), x[:1]])
    architecture = theory.read_architecture(wide(n), x)
    rate = 0.5 / float(torch.linalg.eigvalsh(theory.architecture_kernels(architecture, x)[1])[-1])
    training = Training(learning_rate=rate, steps=STEPS[-1], reduction="sum")
    found = theory.predict_training(architecture, x, y, probe, training, order=0, at_steps=STEPS)
    z = trained_outputs(n, seeds, x, y, probe, rate)
    mean, variance = found.output_mean[..., 0], found.output_covariance[..., 0, 0].diagonal(dim1=1, dim2=2)
    off = (z.mean(1) - mean).abs() - 4 * z.std(1) / seeds**0.5 - 3 / n * mean.abs().max()
    assert bool((off < 0).all()), (z.mean(1), mean)
    squares = (z - z.mean(1, keepdim=True)).square()
    off = (z.var(1) - variance).abs() - 4 * squares.std(1) / seeds**0.5 - 3 / n * (variance[0].max() + 0.09)
    assert bool((off < 0).all()), (z.var(1), variance)
