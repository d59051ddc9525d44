"""Order-1/n corrections of training: the reduced formulas against the naive operator, limits and cost."""

import pytest
import torch

from tests.theory.naive_operator import first_order
from torch_eft.theory import MLPEnsemble, initial_statistics
from torch_eft.theory.drift import ntk_drift
from torch_eft.theory.mean_output import mean_output
from torch_eft.theory.order_zero_path import OrderZeroPath
from torch_eft.theory.output_covariance import output_covariance
from torch_eft.theory.vertices import SYMMETRIES

PROBES, TRAIN, OUTPUTS = 1, 2, 2
STEPS = torch.tensor([1, 4, 8])
RATE = 0.08


class KnownTensors:
    """Vertices given as tensors over all points, in the place of the evaluators."""

    depth, refined = 3, True

    def __init__(self, tensors):
        self.tensors = tensors

    def runs(self, sets):
        return [KnownOnSets(self.tensors, sets)]


class KnownOnSets:
    def __init__(self, tensors, sets):
        self.tensors, self.sets, self.axes = tensors, sets, list(sets)

    def array(self, name, layer, letters):
        index = []
        for letter in letters:
            shape = [1] * len(self.axes)
            shape[self.axes.index(letter)] = -1
            index.append(self.sets[letter].reshape(shape))
        return self.tensors[name][tuple(index)]


def symmetrised(tensor, generators):
    """The mean over the group that the generators span."""
    identity = tuple(range(tensor.ndim))
    group, new = {identity}, [identity]
    while new:
        word = new.pop()
        for generator in generators:
            image = tuple(word[slot] for slot in generator)
            if image not in group:
                group.add(image)
                new.append(image)
    return torch.stack([tensor.permute(word) for word in group]).mean(0)


def exact_case():
    """Vertices of a tanh ensemble of unequal widths on 1 probe and 2 training points."""
    ensemble = MLPEnsemble([3, 20, 30, 2], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3, lambda_W=1.0)
    x = torch.randn(PROBES + TRAIN, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    last = initial_statistics(ensemble, x)[-1]
    return last.K, last.Theta, {name: getattr(last, name) for name in SYMMETRIES}


def random_case():
    """Nothing but the symmetries."""
    generator = torch.Generator().manual_seed(6)
    count = PROBES + TRAIN

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    K, Theta = (root @ root.T / count for root in (normal(count, count), normal(count, count)))
    tensors = {}
    for name, generators in SYMMETRIES.items():
        order = 2 if name in ("G1", "Theta1") else 4
        tensors[name] = symmetrised(normal(*[count] * order), generators)
    return K, Theta + 0.3 * torch.eye(count, dtype=torch.float64), tensors


@pytest.fixture(scope="module", params=[exact_case, random_case])
def case(request):
    K, Theta, tensors = request.param()
    y = torch.randn(TRAIN, OUTPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    naive = first_order(K, Theta, tensors, y, PROBES, OUTPUTS, RATE, int(STEPS.max()), STEPS.tolist())
    path = OrderZeroPath(K, Theta, y, RATE, "gradient_descent")
    return KnownTensors(tensors), path, naive


def test_mean_output_is_that_of_the_naive_operator(case):
    vertices, path, naive = case
    found, error = mean_output(vertices, path, STEPS, tile=2)
    expected = naive["z"].reshape(len(STEPS), PROBES + TRAIN, OUTPUTS)
    assert error == 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    order_0 = naive["z0"].reshape(len(STEPS), PROBES + TRAIN, OUTPUTS)
    torch.testing.assert_close(path.mean_output(STEPS), order_0, rtol=0, atol=1e-12)


def test_drift_is_that_of_the_naive_operator(case):
    """All points stand as probes, so that x = y, probe and train are all there; tiles of one training label."""
    vertices, path, naive = case
    count = PROBES + TRAIN
    mean, off, _ = ntk_drift(vertices, path, count, STEPS, tile=1)
    found = off + torch.einsum("txy,ij->txyij", mean, torch.eye(OUTPUTS, dtype=torch.float64))
    expected = naive["H"].reshape(len(STEPS), count, OUTPUTS, count, OUTPUTS).permute(0, 1, 3, 2, 4)
    Theta1 = vertices.tensors["Theta1"]  # there before training
    expected = expected - torch.einsum("xy,ij->xyij", Theta1, torch.eye(OUTPUTS, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    trace, nothing, _ = ntk_drift(vertices, path, count, STEPS, trace=True)
    assert nothing is None
    mean_trace = expected.diagonal(dim1=3, dim2=4).mean(3)
    torch.testing.assert_close(trace, mean_trace, rtol=0, atol=1e-10 * float(expected.abs().max()))


def test_covariance_is_that_of_the_naive_operator(case):
    """Cov = E zz - E z E z, its part of order 1/n; all points as probes, in tiles of two."""
    vertices, path, naive = case
    count = PROBES + TRAIN
    mean, off, _ = output_covariance(vertices, path, count, STEPS, tile=2)
    found = off + torch.einsum("txy,ij->txyij", mean, torch.eye(OUTPUTS, dtype=torch.float64))
    cross = torch.einsum("ta,tb->tab", naive["z"], naive["z0"])
    expected = (naive["zz"] - cross - cross.mT).reshape(len(STEPS), count, OUTPUTS, count, OUTPUTS)
    expected = expected.permute(0, 1, 3, 2, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
