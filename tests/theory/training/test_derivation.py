"""The table of contributions: against the closed forms with one vertex taken out, and against the operator itself."""

import math

import numpy
import pytest
import torch
from torch.func import jvp, vmap

from tests.oracles.naive_operator import simulate
from tests.theory.training.test_finite_width import KnownTensors, random_case
from torch_eft import Training
from torch_eft.theory import MLPEnsemble
from torch_eft.theory.hidden_layers.predict import predict_representation
from torch_eft.theory.hidden_layers.statistics import HiddenStatistics
from torch_eft.theory.initialization.evaluator import SYMMETRIES, Vertices
from torch_eft.theory.training.corrections.mean_output import mean_output
from torch_eft.theory.training.corrections.ntk_change import ntk_change
from torch_eft.theory.training.corrections.output_covariance import output_covariance
from torch_eft.theory.training.derivation import CONTRIBUTIONS
from torch_eft.theory.training.infinite_width import InfiniteWidthPath

F64 = torch.float64
VERTICES = tuple(SYMMETRIES)
STEPS = torch.tensor([3, 6])


def test_the_table_names_the_vertices():
    assert set(VERTICES) == {"G1", "Theta1", *"VABDFPQRSTU"}
    assert {name for row in CONTRIBUTIONS.values() for name in row} == set(VERTICES)
    assert all(len(set(row)) == len(row) for row in CONTRIBUTIONS.values())


@pytest.mark.parametrize("observable", ["mean output", "covariance", "NTK drift"])
def test_closed_forms_change_with_exactly_these_vertices(observable):
    """Random tensors with the symmetries alone, 1 probe and 2 training points, 2 outputs: each vertex is set to 0."""
    K, Theta, tensors = random_case()
    y = torch.randn(2, 2, dtype=F64, generator=torch.Generator().manual_seed(8))
    path = InfiniteWidthPath(K, Theta, y, Training(learning_rate=0.08, steps=6, reduction="sum"))

    def found(tensors):
        vertices = KnownTensors(tensors)
        if observable == "mean output":
            return mean_output(vertices, path, STEPS)[0].flatten()
        function = ntk_change if observable == "NTK drift" else output_covariance
        return function(vertices, path, 1, STEPS)[0].flatten()

    whole = found(tensors)
    changes = {
        name: float((found({**tensors, name: torch.zeros_like(tensors[name])}) - whole).norm() / whole.norm())
        for name in VERTICES
    }
    for name, change in changes.items():
        assert change > 1e-4 if name in CONTRIBUTIONS[observable] else change < 1e-13, (name, change)


# ---- one training point, one output: all tensors are numbers, and the operator of the page is a few derivatives

K, THETA, Y, RATE, T = 0.8, 1.3, 0.6, 0.2, 3
ENTERS = {  # (factor, derivatives) of each vertex in 0 z, 1 H, 2 dH, 3 ddI, 4 ddII; factors count equal structures
    "G1": (1 / 2, (0, 0)),
    "Theta1": (1, (1,)),
    "A": (1 / 2, (1, 1)),
    "B": (2 / 2, (1, 1)),
    "D": (1 / 2, (0, 0, 1)),
    "F": (2 / 2, (0, 0, 1)),
    "P": (1, (0, 2)),
    "Q": (2, (0, 2)),
    "R": (3, (3,)),
    "S": (1, (4,)),
    "T": (1, (4,)),
    "U": (1, (4,)),
    "V": (3 / 24, (0, 0, 0, 0)),
}


def trained(*point):
    """Output and NTK of the trained network as a function of its tensors, () each."""
    shaped = [value.reshape([1] * order) for value, order in zip(point, (1, 2, 3, 4, 4), strict=True)]
    z, H = simulate(*shaped, lambda now, step: now - Y, Training(learning_rate=RATE, steps=T), [T])
    return z.flatten()[0], H.flatten()[0]


def derivative(function, index):
    def differentiated(*point):
        tangents = tuple(torch.ones_like(v) if k == index else torch.zeros_like(v) for k, v in enumerate(point))
        return jvp(function, point, tangents)[1]

    return differentiated


def averaged(function):
    """Over z ~ N(0, K), exact to degree 9; nothing here is of a degree beyond 6."""
    nodes, weights = numpy.polynomial.hermite_e.hermegauss(5)
    z, shares = math.sqrt(K) * torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    zero = torch.zeros_like(z)
    return torch.tensordot(shares, vmap(function)(z, zero + THETA, zero, zero, zero), 1)


def test_the_operator_agrees_with_the_table():
    """Its terms one by one. Cumulants are of deviations from the mean m at order 0, whose own shift is of first order
    and drops out of the second and the fourth: kappa_4 changes by d<(z-m)^4> - 6 <(z-m)^2> d<(z-m)^2>."""
    m = float(averaged(lambda *point: trained(*point)[0]))

    def observables(*point):
        z, H = trained(*point)
        return torch.stack([z - m, (z - m) ** 2, (z - m) ** 4, H - point[1]])

    variance = float(averaged(observables)[1])
    assert float(averaged(observables)[2]) == pytest.approx(3 * variance**2)  # Gaussian at order 0
    averages = {}
    for name, (factor, indices) in ENTERS.items():
        if indices not in averages:
            term = observables
            for index in indices:
                term = derivative(term, index)
            averages[indices] = averaged(term)
        mean, second, fourth, drift = (factor * averages[indices]).tolist()
        changes = {
            "mean output": mean,
            "covariance": second,
            "fourth cumulant": fourth - 6 * variance * second,
            "NTK drift": drift,
        }
        for observable, change in changes.items():
            there = abs(change) > 1e-4 if name in CONTRIBUTIONS[observable] else abs(change) < 1e-13
            assert there, (name, observable, change)


# ---- hidden layers


def hidden():
    ensemble = MLPEnsemble([3, 20, 30, 2], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3, lambda_W=1.0)
    x = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(5))
    y = torch.tensor([[0.5, -1.0]], dtype=F64)
    return predict_representation(ensemble, x[1:], y, x[:1], learning_rate=0.05, steps=4, reduction="sum", ntk=False)


def test_hidden_kernels_take_no_vertex_of_the_last_layer(monkeypatch):
    asked = set()
    array = Vertices.array

    def watched(self, name, layer, letters):
        asked.add((name, layer))
        return array(self, name, layer, letters)

    monkeypatch.setattr(Vertices, "array", watched)
    hidden()
    assert CONTRIBUTIONS["hidden kernels"] == ()
    assert {layer for _, layer in asked} == {1, 2}  # of three
    assert {name for name, layer in asked if layer == 2} >= {"B", "F", "P", "Q"}


def test_hidden_kernels_take_three_statistics_and_movement_one(monkeypatch):
    whole = hidden().layers
    array = HiddenStatistics.array
    for name, moved in (("Xi", "kernel_change"), ("Y", "kernel_change"), ("C", "kernel_change"), ("Mv", "movement")):

        def without(self, wanted, layer, m, letters, name=name):
            value = array(self, wanted, layer, m, letters)
            return torch.zeros_like(value) if wanted == name and m == 3 else value

        monkeypatch.setattr(HiddenStatistics, "array", without)
        for before, after in zip(whole, hidden().layers, strict=True):
            for observable in ("kernel_change", "movement"):
                same = torch.equal(getattr(before, observable), getattr(after, observable))
                assert same != (observable == moved), (name, observable)
