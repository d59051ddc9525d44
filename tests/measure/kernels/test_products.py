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


@pytest.mark.parametrize("spread", [0.0, 1e-9, 1e-4])
def test_degenerate_and_nearly_degenerate_eigenvalues_are_all_found(spread):
    """A linear model: every eigenvalue of the inputs' Gram matrix three times, or split by the outputs' scales."""
    torch.manual_seed(0)
    model, x = nn.Linear(8, 3).double(), randn(12, 8)
    scales = torch.tensor([1.0, 1.0 + spread, 1.0 - spread], dtype=torch.float64)
    gram = torch.linalg.eigvalsh(x @ x.T + 1)
    values = (gram[:, None] * scales.square()).flatten().sort(descending=True).values
    for count in (1, 2, 4, 7):
        found = measure.ntk_eigenpairs(model, x, count, output_fn=lambda z: z * scales, tolerance=1e-10)
        torch.testing.assert_close(found.values, values[:count], rtol=0, atol=1e-9 * float(values[0]))
        Q = found.vectors.flatten(1)
        torch.testing.assert_close(Q @ Q.T, torch.eye(count, dtype=Q.dtype), rtol=0, atol=1e-12)


def test_a_kernel_that_is_zero_has_eigenpairs():
    class Nothing(nn.Linear):
        def forward(self, x):
            return 0 * super().forward(x)

    found = measure.ntk_eigenpairs(Nothing(3, 2).double(), randn(4, 3), 3)
    assert found.values.tolist() == found.residuals.tolist() == [0.0, 0.0, 0.0]
    Q = found.vectors.flatten(1)
    torch.testing.assert_close(Q @ Q.T, torch.eye(3, dtype=Q.dtype), rtol=0, atol=1e-14)


def test_products_and_eigenpairs_refuse_what_the_kernel_refuses():
    class Mixing(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    class Chance(nn.Linear):
        def forward(self, x):
            return super().forward(x) * torch.rand((), dtype=x.dtype)

    class Diverged(nn.Linear):
        def forward(self, x):
            return super().forward(x * 1e200) * 1e200

    x = randn(4, 3)
    for kind, words in (
        (Mixing, "depends on the other samples"),
        (Chance, "depends on chance"),
        (Diverged, "NaN or infinite"),
    ):
        for action in (
            lambda model: measure.ntk(model, x),
            lambda model: measure.ntk_eigenpairs(model, x, 1),
            lambda model: measure.ntk_vector_product(model, x, torch.ones(4, 2)),
            lambda model: measure.ntk_vjp(model, x, torch.ones(4, 2)),
        ):
            torch.manual_seed(0)
            with pytest.raises(ValueError, match=words):
                action(kind(3, 2).double())
