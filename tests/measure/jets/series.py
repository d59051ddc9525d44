"""Taylor series along a line by repeated reverse mode, to compare jets with."""

import math

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_eft.measure.jets.jet import Jet, coefficients_of, jet

DTYPE = torch.float64
TOLERANCE = 1e-10


def series_by_reverse_mode(function, order):
    """Taylor coefficients at s = 0 of tensors s -> (...), entry by entry and order by order."""
    s = torch.zeros((), dtype=DTYPE, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have a first derivative only
        value = function(s)
    found = [value.detach()]
    pattern = torch.zeros_like(value, requires_grad=True)
    current = value
    for degree in range(1, order + 1):
        # d/ds of every entry at once: the derivative of the pulled back pattern with respect to the pattern.
        if not current.requires_grad:
            return [*found, *[torch.zeros_like(value)] * (order + 1 - degree)]
        (pulled,) = torch.autograd.grad(
            (current * pattern).sum(), s, create_graph=True, allow_unused=True, materialize_grads=True
        )
        if not pulled.requires_grad:
            return [*found, *[torch.zeros_like(value)] * (order + 1 - degree)]
        (current,) = torch.autograd.grad(pulled, pattern, create_graph=True, allow_unused=True, materialize_grads=True)
        found.append(current.detach() / math.factorial(degree))
    return found


def line(coefficients, s):
    return sum((part * s**m for m, part in enumerate(coefficients) if m and part is not None), coefficients[0])


def assert_series(found, expected, name=""):
    for order, value in enumerate(expected):
        part = coefficients_of(found, order)[order]
        part = torch.zeros_like(value) if part is None else part
        scale = max(1e-3, float(expected[0].abs().max()), float(value.abs().max()))
        torch.testing.assert_close(
            part, value, rtol=0, atol=TOLERANCE * scale, msg=lambda text: f"{name}, order {order}: {text}"
        )


def check(function, series, reference=None, orders=(1, 2, 3)):
    """``function`` of several jets with the given coefficients, some of them None, against ``reference``."""
    for order in orders:
        given = [jet(parts[: order + 1]) for parts in series]
        found = tree_flat(function(*given))
        for index, output in enumerate(found):
            expected = series_by_reverse_mode(
                lambda s: tree_flat((reference or function)(*[line(parts[: order + 1], s) for parts in series]))[index],
                order,
            )
            assert isinstance(output, Jet)
            assert_series(output, expected)


def tree_flat(value):
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def normal(*shape):
    return torch.randn(shape, dtype=DTYPE)


def full(*shape):
    return (normal(*shape), normal(*shape), normal(*shape), normal(*shape))


def between(low, high, *shape):
    return (low + (high - low) * torch.rand(shape, dtype=DTYPE), normal(*shape), normal(*shape), normal(*shape))


def straight(*shape):
    return (normal(*shape), normal(*shape), None, None)


INDEX = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1], [1, 0, 0, 2]])
MASK = torch.tensor([[True, False, True, False]] * 3)
GRID = torch.linspace(-0.9, 0.7, 12, dtype=DTYPE).reshape(1, 3, 2, 2)
CONSTANT = torch.linspace(0.3, 2.0, 12, dtype=DTYPE).reshape(3, 4)
