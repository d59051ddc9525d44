"""The fourth cumulant of outputs in training: against the naive operator, its start and trained networks."""

import pytest
import torch

from tests.oracles.naive_operator import first_order
from tests.theory.training.test_finite_width import random_case
from tests.theory.training.test_sampled_training import gauss_hermite
from torch_eft import Training
from torch_eft.theory import MLPEnsemble, initial_statistics
from torch_eft.theory.training.infinite_width import InfiniteWidthPath
from torch_eft.theory.training.outputs.fourth_cumulant import fourth_cumulant, predict_fourth_cumulant


def inputs(count):
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("probes", "outputs", "momentum"), [(1, 1, 0.4), (0, 2, 0.0)])
def test_it_is_that_of_the_naive_operator(probes, outputs, momentum):
    """All points as probes; targets and, of two, the other output drop out. Polynomials of degree 8: exact on 8
    Gauss-Hermite nodes a dimension."""
    K, Theta, t = random_case()
    K, Theta = K + 0.2 * torch.eye(3, dtype=torch.float64), Theta / 2
    some = slice(0, 2 if outputs == 1 else 1)
    K, Theta = K[some, some], Theta[some, some]
    t = {name: value[(some,) * value.ndim] for name, value in t.items()}
    count = len(K)
    y = torch.randn(count - probes, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    training, steps = Training(learning_rate=0.3, steps=3, momentum=momentum, reduction="sum"), [0, 1, 3]
    naive = first_order(
        K, Theta, t, y, probes, outputs, training, steps, lambda z, _: (z - y).square().sum() / 2, gauss_hermite(8)
    )
    m1, d1 = naive["z0"], naive["z"]
    m2, d2 = (naive[name].diagonal(dim1=1, dim2=2) for name in ("zz0", "zz"))
    m3, d3, d4 = naive["zzz0"], naive["zzz"], naive["zzzz"]
    # kappa_4 = m4 - 4 m1 m3 - 3 m2^2 + 12 m1^2 m2 - 6 m1^4
    expected = d4 - 4 * (d1 * m3 + m1 * d3) - 6 * m2 * d2
    expected = expected + 12 * (2 * m1 * d1 * m2 + m1.square() * d2) - 24 * m1.pow(3) * d1
    path = InfiniteWidthPath(K, Theta, y, training)
    found = fourth_cumulant(path, t, count, torch.tensor(steps))
    found = found[:, :, None].expand(-1, -1, outputs).flatten(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


def test_before_training_it_is_that_of_the_start():
    x = inputs(3)
    ensemble = MLPEnsemble([3, 40, 50, 1], "erf", C_b=0.1, C_W=1.5, lambda_b=0.3)
    found = predict_fourth_cumulant(
        ensemble, x[1:], x[:1], learning_rate=0.2, steps=20, reduction="sum", at_steps=[20, 0, 5]
    )
    last = initial_statistics(ensemble, x[:1], statistics=("K", "Theta", "V"))[-1]
    V, K = float(last.V[0, 0, 0, 0]), float(last.K[0, 0])
    assert float(found.value[1, 0]) == pytest.approx(3 * V / 50, rel=1e-6)
    assert float(found.excess[1, 0]) == pytest.approx(3 * V / 50 / K**2, rel=1e-6)
    assert float((found.value[0] - found.value[1]).abs()) > 0.01 * float(found.value[1].abs())
    assert "any targets" in found.provenance
    with pytest.raises(ValueError, match=r"at_steps: \[6\] given; give whole steps between 0 and steps = 5"):
        predict_fourth_cumulant(ensemble, x[1:], x[:1], learning_rate=0.2, steps=5, at_steps=[6])
