"""The order-0 path against plain sums, in the corners where closed forms lose digits, and its continuous limit."""

import pytest
import torch

from torch_eft.theory.order_zero_path import OrderZeroPath
from torch_eft.theory.propagation import Clock, panel_nodes, propagated_flow


def path_of(eigenvalues, rate, dynamics="gradient_descent", seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = len(eigenvalues)
    U = torch.linalg.qr(torch.randn(count, count, dtype=torch.float64, generator=generator))[0]
    Theta = U * torch.tensor(eigenvalues, dtype=torch.float64) @ U.T
    root = torch.randn(count, count, dtype=torch.float64, generator=generator)
    y = torch.randn(count, 2, dtype=torch.float64, generator=generator)
    return OrderZeroPath(root @ root.T / count, (Theta + Theta.T) / 2, y, rate, dynamics)


def summed(eigenvalues, rate, steps):
    """g, phi, psi, f by their definitions, in exact fractions of float64 inputs."""
    from fractions import Fraction

    values, eta = [Fraction(v) for v in eigenvalues], Fraction(rate)
    count = len(values)
    powers = [[(1 - eta * v) ** s for s in range(steps + 1)] for v in values]
    phi = [[eta * sum(power[:s], Fraction(0)) for s in range(steps + 1)] for power in powers]
    pairs = [(c, d) for c in range(count) for d in range(count)]
    psi = {(c, d): eta * sum(powers[c][s] * phi[d][s] for s in range(steps)) for c, d in pairs}
    f = {(m, c): eta * sum(powers[m][steps - 1 - u] * powers[c][u] for u in range(steps)) for m, c in pairs}
    as_matrix = lambda table: torch.tensor(  # noqa: E731
        [[float(table[a, b]) for b in range(count)] for a in range(count)], dtype=torch.float64
    )
    g = torch.tensor([float(power[steps]) for power in powers], dtype=torch.float64)
    return g, torch.tensor([float(p[steps]) for p in phi], dtype=torch.float64), as_matrix(psi), as_matrix(f)


@pytest.mark.parametrize("eigenvalues", [[1e-9, 1e-9, 1.0], [0.3, 0.3 + 1e-13, 2.0], [0.5, 1.7, 19.0]])
def test_sums_over_time_to_rounding(eigenvalues):
    """Tiny and equal modes, and one beyond the critical rate (1 - eta lambda < 0). A step rounds g by 1e-16."""
    path, steps = path_of(eigenvalues, 0.1), torch.tensor([1, 7, 60])
    found = path.double(steps)
    for index, step in enumerate(steps.tolist()):
        expected = summed(path.eigenvalues.tolist(), 0.1, step)
        for value, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(value[index], exact, rtol=4e-16 * step + 1e-15, atol=1e-18)
    g, phi = path.single(steps)
    torch.testing.assert_close(g, found[0])
    torch.testing.assert_close(phi, found[1])


def test_nothing_has_moved_at_step_zero():
    for value, expected in zip(path_of([0.5, 1.0], 0.1).double(torch.tensor([0])), (1, 0, 0, 0), strict=True):
        assert bool((value == expected).all())


@pytest.mark.parametrize("eigenvalues", [[1e-9, 1e-9, 1.0], [0.3, 0.3 + 1e-13, 2.0], [0.5, 1.7, 19.0]])
def test_flow_is_the_limit_of_small_steps(eigenvalues):
    """Richardson over step sizes rate / 2^12 and rate / 2^13: what is left is of second order."""
    flow = path_of(eigenvalues, 0.1, "gradient_flow").double(torch.tensor([3.0]))
    fine, finer = (path_of(eigenvalues, 0.1 / parts).double(torch.tensor([3 * parts])) for parts in (2**12, 2**13))
    for value, first, second in zip(flow, fine, finer, strict=True):
        left = float(((second - first) ** 2 / second.abs().clamp_min(1e-12)).abs().max())
        torch.testing.assert_close(2 * second - first, value, rtol=1e-7, atol=4 * left)


def test_null_modes_are_dropped():
    path = path_of([0.0, 0.7, 1.2], 0.1)
    assert path.dropped == 1
    assert len(path.eigenvalues) == 2
    assert path.response(torch.tensor([5])).shape == (1, 3, 3)


def test_flow_is_driven_exactly():
    """A source exp(-mu s) on every point: the modes of z1 are (e^-mu t - e^-lambda t) / (lambda - mu), also stiff."""
    path = path_of([0.01, 0.6, 900.0], 1.0, "gradient_flow")
    steps, mu = torch.tensor([0.0, 0.4, 5.0, 60.0]), 0.3
    clock = Clock(path, steps)
    source = torch.exp(-mu * clock.times)[:, None, None] * torch.ones(1, 3, 1, dtype=torch.float64)
    found = path.U.T @ clock.propagated(source)
    t, rates = steps[:, None].double(), path.eigenvalues
    decayed = (torch.exp(-mu * t) - torch.exp(-rates * t)) / (rates - mu)
    expected = decayed[..., None] * (path.U.T @ torch.ones(3, 1, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert panel_nodes(torch.tensor([0.0, 1.0])).shape == (1, 10)
    assert propagated_flow(path, torch.tensor([0.0]), source[:0].reshape(0, 10, 3, 1)).shape == (1, 3, 1)
