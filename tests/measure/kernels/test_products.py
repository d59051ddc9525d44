"""The NTK without its matrix: products and eigenpairs against the matrix."""

import pytest
import torch
from torch import nn

from tests.measure.zoo import build, randn
from torch_eft import measure


@pytest.mark.parametrize("name", ["mlp", "conv2d", "transformer", "lstm", "dictionaries", "frozen"])
def test_products_and_eigenpairs(name):
    model, x, output_fn = build(name)
    lambdas = {n: 0.5 + 0.1 * i for i, (n, p) in enumerate(model.named_parameters()) if p.requires_grad}
    H = measure.ntk(model, x, lambdas=lambdas, output_fn=output_fn)
    matrix = measure.as_matrix(H)
    N, C = len(H), H.shape[2]
    v = randn(N, C, seed=5)
    product = measure.ntk_vector_product(model, x, v, lambdas=lambdas, output_fn=output_fn)
    torch.testing.assert_close(product, torch.einsum("abij,bj->ai", H, v), rtol=0, atol=1e-12 * float(matrix.norm()))
    values = torch.linalg.eigvalsh(matrix).flip(0)
    found = measure.ntk_eigenpairs(model, x, N * C, lambdas=lambdas, output_fn=output_fn, tolerance=1e-12)
    torch.testing.assert_close(found.values, values, rtol=0, atol=1e-12 * float(values[0]))
    Q = found.vectors.flatten(1)
    torch.testing.assert_close(Q @ Q.T, torch.eye(N * C, dtype=Q.dtype), rtol=0, atol=1e-10)
    few = measure.ntk_eigenpairs(model, x, 2, lambdas=lambdas, output_fn=output_fn, tolerance=1e-8)
    assert float(few.residuals.max()) <= 1e-8 * float(values[0])
    # An eigenvalue lies within the residual; the leading ones are separated by more.
    torch.testing.assert_close(few.values, values[:2], rtol=0, atol=2 * float(few.residuals.max()) + 1e-12)


def test_the_pulled_back_direction_is_the_gradient():
    model, x, _ = build("mlp")
    e = randn(3, 2, seed=2)
    found = measure.ntk_vjp(model, x, e, lambdas=0.25)
    gradients = torch.autograd.grad((model(x) * e).sum(), list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(found[name], 0.25 * gradient, rtol=0, atol=1e-14)


def test_a_kernel_of_low_rank():
    """Fewer parameters than outputs: Lanczos meets an invariant subspace and goes on."""
    torch.manual_seed(0)
    model, x = nn.Linear(1, 1).double(), randn(5, 1)
    found = measure.ntk_eigenpairs(model, x, 5)
    values = torch.linalg.eigvalsh(measure.as_matrix(measure.ntk(model, x))).flip(0)
    torch.testing.assert_close(found.values, values, rtol=0, atol=1e-12)
    assert float(found.values[2:].abs().max()) < 1e-12


def test_unusable_arguments_are_named():
    model, x, _ = build("mlp")
    with pytest.raises(ValueError, match=r"num_eigenpairs: 7 given; H has 6 eigenvalues, give 1 .. 6"):
        measure.ntk_eigenpairs(model, x, 7)
    with pytest.raises(ValueError, match=r"direction: \(3,\) given; give a tensor \(3, 2\)"):
        measure.ntk_vector_product(model, x, torch.ones(3))
