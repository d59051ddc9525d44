"""The path at infinite width against plain sums, where closed forms lose digits, and its continuous limit."""

import pytest
import torch

from torch_eft import Training
from torch_eft.theory.training.corrections.propagation import TimeGrid, panel_nodes, propagated_flow
from torch_eft.theory.training.infinite_width import InfiniteWidthPath
from torch_eft.theory.training.time_sums import moving_modes


def path_of(eigenvalues, rate=None, dynamics="gradient_descent", seed=0, steps=10**9, **options):
    generator = torch.Generator().manual_seed(seed)
    count = len(eigenvalues)
    U = torch.linalg.qr(torch.randn(count, count, dtype=torch.float64, generator=generator))[0]
    Theta = U * torch.tensor(eigenvalues, dtype=torch.float64) @ U.T
    root = torch.randn(count, count, dtype=torch.float64, generator=generator)
    y = torch.randn(count, 2, dtype=torch.float64, generator=generator)
    training = Training(learning_rate=rate, steps=steps, reduction="sum", dynamics=dynamics, **options)
    return InfiniteWidthPath(root @ root.T / count, (Theta + Theta.T) / 2, y, training)


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


def weighted(eigenvalues, weights, steps):
    """The same for an optimizer that moves a coefficient by the sum over s < t of weights[t][s] times its gradient."""
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    count = len(values)
    W = torch.zeros(steps + 1, steps + 1, dtype=torch.float64)
    for t in range(steps + 1):
        for s in range(t):
            W[t, s] = weights(t, s)
    eye = torch.eye(steps + 1, dtype=torch.float64)
    g = torch.stack([torch.linalg.solve(eye + value * W, torch.ones_like(W[0])) for value in values], 1)
    phi = W @ g
    psi = torch.einsum("ts,sc,sd->tcd", W, g, phi)
    f = torch.stack([torch.linalg.solve(eye + values[m] * W, W @ g) for m in range(count)], 1)
    rounding = 2.2e-16 * float(torch.linalg.cond(eye + values[-1] * W))
    return (g[steps], phi[steps], psi[steps], f[steps]), rounding


def heavy_ball(t, s, eta=0.1, m=0.9):
    return eta * (1 - m ** (t - s)) / (1 - m)


def nesterov(t, s, eta=0.1, m=0.6):
    return eta * (1 - m ** (t - s + 1)) / (1 - m)


def scheduled(t, s, m=0.8):
    return sum(0.1 / (1 + u) * m ** (u - s) for u in range(s, t))


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        (heavy_ball, dict(rate=0.1, momentum=0.9)),
        (nesterov, dict(rate=0.1, momentum=0.6, nesterov=True)),
        (scheduled, dict(schedule=lambda u: 0.1 / (1 + u), momentum=0.8)),
    ],
)
def test_momentum_and_schedules_are_sums_over_all_gradients_before(weights, options):
    """Against lower triangular systems in time, to their rounding."""
    path = path_of([1e-9, 0.3, 0.3 + 1e-13, 9.0], steps=60, **options)
    found = path.double(torch.tensor([60, 0, 7]))
    for index, step in ((0, 60), (1, 0), (2, 7)):
        expected, rounding = weighted(path.eigenvalues.tolist(), weights, step)
        for value, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(value[index], exact, rtol=0, atol=rounding * (1 + float(exact.abs().max())))
    for value, expected in zip(path.single(torch.tensor([60, 0, 7])), found, strict=False):
        assert torch.equal(value, expected)


def test_without_momentum_and_schedule_stepping_is_doubling():
    """A rate that changes only after the last step asked for is stepped through."""
    steps, eigenvalues = torch.tensor([0, 3, 60]), [1e-9, 0.3, 0.3 + 1e-13, 19.0]
    stepped = path_of(eigenvalues, steps=61, schedule=(0.1,) * 60 + (0.05,))
    plain = path_of(eigenvalues, steps=60, schedule=(0.1,) * 60)
    for value, expected in zip(stepped.double(steps), plain.double(steps), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-15)
    t, m = torch.tensor([60]), 0
    g, _, _, f = plain.double(t)
    values = plain.eigenvalues
    torch.testing.assert_close(f[0, m, 3], (g[0, 3] - g[0, m]) / (values[m] - values[3]), rtol=1e-12, atol=0)


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
    assert len(path.eigenvalues) == path.U.shape[0] - 1
    assert len(path.eigenvalues) == 2
    assert path.response(torch.tensor([5])).shape == (1, 3, 3)


def test_flow_is_driven_exactly():
    """A source exp(-mu s) on every point: z1 is gathered, (e^-mu t - e^-lambda t) / (lambda - mu), or there at once
    and unlearnt, also where stiff."""
    path = path_of([0.01, 0.6, 900.0], 1.0, "gradient_flow")
    steps, mu = torch.tensor([0.0, 0.4, 5.0, 60.0]), 0.3
    clock = TimeGrid(path, steps)
    source = torch.exp(-mu * clock.times)[:, None, None] * torch.ones(1, 3, 1, dtype=torch.float64)
    t, rates = steps[:, None].double(), path.eigenvalues
    gathered = (torch.exp(-mu * t) - torch.exp(-rates * t)) / (rates - mu)
    at_once = torch.exp(-mu * t) - rates * gathered
    ones = path.U.T @ torch.ones(3, 1, dtype=torch.float64)
    for sources, expected in (((source, 0 * source), gathered), ((0 * source, source), at_once)):
        found = path.U.T @ clock.propagated(*sources)
        torch.testing.assert_close(found, expected[..., None] * ones, rtol=0, atol=1e-10)
    assert panel_nodes(torch.tensor([0.0, 1.0])).shape == (1, 10)
    assert propagated_flow(path, torch.tensor([0.0]), source[:0].reshape(0, 10, 3, 1)).shape == (1, 3, 1)


def test_where_nothing_moves_it_is_said():
    with pytest.raises(ValueError, match=r"NTK on the training points is zero or not finite .*, so that nothing moves"):
        moving_modes(torch.zeros(2, 2, dtype=torch.float64))
