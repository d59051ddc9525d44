"""Kernels of graphs of nodes against the recursion of MLPs, and against networks drawn."""

import pytest
import torch

from torch_eft import theory
from torch_eft.theory.architecture.moments import ActivationPairs
from torch_eft.theory.architecture.nodes import Architecture, Data, Elementwise, Weight

WIDTHS = [3, 32, 64, 48, 2]


def mlp(activation, C_W=1.5, C_b=0.1):
    nodes = [Data(3)]
    for n, after in zip(WIDTHS, WIDTHS[1:], strict=False):
        if len(nodes) > 1:
            nodes.append(Elementwise((len(nodes) - 1,), theory.get_activation(activation)))
        nodes.append(Weight((len(nodes) - 1,), after, C_W=C_W, C_b=C_b, lambda_W=n, name=f"W{len(nodes)}"))
    ensemble = theory.MLPEnsemble(WIDTHS, activation, C_b=C_b, C_W=C_W, lambda_W=[float(n) for n in WIDTHS[:-1]])
    return Architecture(nodes), ensemble


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_an_mlp_has_the_kernels_of_the_recursion(activation):
    architecture, ensemble = mlp(activation)
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = theory.architecture_statistics(architecture, x, num_samples=8)
    last = theory.initial_statistics(ensemble, x, statistics=["K", "Theta"])[-1]
    assert (found.Theta / last.Theta - 1).abs().max() < 1e-12
    assert (found.K["output"] / last.K - 1).abs().max() < 1e-12


@pytest.mark.parametrize("activation", ["tanh", pytest.param("relu", marks=pytest.mark.slow)])
def test_an_mlp_has_the_spread_of_its_vertices(activation):
    """Within five standard errors of 16,384 neurons; Cov(H_11, H_22) over outputs by the trace of one input."""
    architecture, ensemble = mlp(activation)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = theory.architecture_statistics(architecture, x, num_samples=2**14)
    last = theory.initial_statistics(ensemble, x, statistics=["V", "A", "B"])[-1]
    for a, b in ((0, 0), (0, 1), (1, 1)):
        variance = (last.A[a, b, a, b] + last.B[a, a, b, b] + last.B[a, b, b, a]) / 48
        z = (found.ntk_relative_sd[a, b] - variance.sqrt() / found.Theta[a, b]) / found.error["ntk_relative_sd"][a, b]
        assert abs(z) < 5, (a, b)
    K = found.K["output"].diagonal()
    V = torch.stack([last.V[a, a, a, a] for a in range(2)]) / 48
    assert abs(found.epsilon - float((V / K.square()).mean())) < 5 * float(found.error["epsilon"])
    one = theory.architecture_statistics(architecture, x[:1], num_samples=2**14)
    alone = theory.initial_statistics(ensemble, x[:1], statistics=["A", "B"])[-1]
    variance = float(alone.A + alone.B) / 48  # A + 2 B / C, two outputs
    assert abs(one.ntk_trace_relative_sd - variance**0.5 / float(one.Theta)) < 5 * float(
        one.error["ntk_trace_relative_sd"]
    )
    assert abs(sum(found.shares.values()) - 1) < 1e-12


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("factor", ["value", "slope", "gain"])
def test_moments_of_blocks_respond_as_finite_differences_say(activation, factor):
    pairs = ActivationPairs(theory.get_activation(activation))
    A = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    K = A @ A.T / 9
    block, rows, columns = K[None, :2, 2:].clone(), K.diagonal()[None, :2].clone(), K.diagonal()[None, 2:].clone()
    inputs = [each.requires_grad_() for each in (block, rows, columns)]
    assert torch.autograd.gradcheck(lambda *z: pairs.moment(factor, *z), inputs, atol=1e-5, nondet_tol=1e-6)
