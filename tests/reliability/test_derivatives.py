"""What is measured, at orders one to three, against reverse mode applied repeatedly to the module itself in float64.

Order 1 is the NTK and the first Taylor term; order 2 the dNTK, whole and contracted, and the second term; order 3 the
contracted ddNTKs and the third term. ``REFUSED`` and ``REVERSE`` say for every operation that is not measured by jets
at all orders whether it is refused, in which words, or measured by reverse mode.

Where torch's fused operations have wrong higher derivatives (pytorch issues 196699, 196700) the reference runs with
``PLAIN``, forwards by the definitions, whose values and first derivatives are compared with the fused ones.
"""

import copy
import functools
import types

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _WeightNorm
from torch.utils._pytree import tree_map_only

from tests.reliability.operations import OPERATIONS, OUTPUT_FN, Apply
from torch_eft import measure

OWN_DTYPE = ("float16", "bfloat16", "float32")
NO_DERIVATIVE = "has no derivative of order"
REFUSED = {
    # a first derivative only
    "EmbeddingBag, max": (2, NO_DERIVATIVE),
    "cdist": (2, NO_DERIVATIVE),
    "autograd.Function, once differentiable": (2, NO_DERIVATIVE),
    # none
    "checkpoint, reentrant": (1, "reentrant checkpointing"),
    "checkpoint, reentrant, of the inputs": (1, "reentrant checkpointing"),
    "dropout while evaluating": (1, "depends on chance"),
    "lazy module": (1, "not initialized yet"),
    "BatchNorm1d without running statistics": (1, "statistics of the batch"),
}
"""Operation: (the first order that is refused, why)."""

WHOLE_REFUSED = ("EmbeddingBag, sum", "EmbeddingBag, mean")
"""Jets, held against differences, know their derivatives; torch does not, of which whole dNTKs are made."""

REVERSE = {
    "orthogonal",
    "linalg.inv",
    "autograd.Function with jvp",
    "autograd.Function of the old style",
    ".item() branch",
}
"""Measured above order 1 by reverse mode of reverse mode: jets have no rule for them."""

TAYLOR_REFUSED = {
    # jets know the bag, and samples may see each other
    "EmbeddingBag, sum": 4,
    "EmbeddingBag, mean": 4,
    "BatchNorm1d without running statistics": 4,
    # without jets, even the first term takes two backward passes (for all outputs at once)
    "EmbeddingBag, max": 1,
    "cdist": 1,
    "autograd.Function, once differentiable": 1,
}
"""The first order whose Taylor term is refused, where it is another."""


def has_second_derivative(function, *shape):
    """Whether this version of torch has one; newer ones have every derivative of cdist and of grid_sample."""
    x = torch.ones(shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    try:
        torch.autograd.grad(gradient.sum(), x)
    except RuntimeError:
        return False
    return True


if has_second_derivative(lambda x: torch.cdist(x, 2 * x), 2, 2):
    del REFUSED["cdist"], TAYLOR_REFUSED["cdist"]
    REVERSE.add("cdist")


def plain_layer_norm(self, x):
    centered = x - x.mean(-1, keepdim=True)
    return centered / ((centered**2).mean(-1, keepdim=True) + self.eps) ** 0.5 * self.weight + self.bias


def plain_norm(self, x):
    """Instance norm and batch norm, by running statistics or those at hand."""
    axes = (0, *range(2, x.ndim)) if isinstance(self, nn.modules.batchnorm._BatchNorm) else tuple(range(2, x.ndim))
    shape = (-1, *[1] * (x.ndim - 2))
    if self.running_mean is None:
        mean = x.mean(axes, keepdim=True)
        variance = ((x - mean) ** 2).mean(axes, keepdim=True)
    else:
        mean, variance = self.running_mean.view(shape), self.running_var.view(shape)
    return (x - mean) / (variance + self.eps) ** 0.5 * self.weight.view(shape) + self.bias.view(shape)


def plain_weight_norm(self, g, v):
    return v * g / (v**2).sum(1, keepdim=True) ** 0.5


def plain_bag(self, x):
    rows = self.weight[x]
    return rows.amax(1) if self.mode == "max" else rows.sum(1) / (rows.shape[1] if self.mode == "mean" else 1)


PLAIN = {
    nn.LayerNorm: plain_layer_norm,
    nn.InstanceNorm1d: plain_norm,
    nn.InstanceNorm2d: plain_norm,
    nn.BatchNorm1d: plain_norm,
    nn.EmbeddingBag: plain_bag,
    _WeightNorm: plain_weight_norm,
}


def build(name):
    """Model in evaluation mode, inputs, output_fn."""
    torch.manual_seed(0)
    make, inputs = OPERATIONS[name]
    model, x = make(), inputs()
    if name in OWN_DTYPE:
        return model.eval(), x.to(next(model.parameters()).dtype), None
    model = model.double().eval()
    if name != "lazy module" and any(isinstance(module, nn.LazyLinear) for module in model.modules()):
        model(x)
    return model, x, OUTPUT_FN.get(name)


def parameters(model):
    return {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}


class Reference:
    """The rows of J_0, J_1, J_2, (N C, P) each, by ``torch.autograd.grad`` of ``torch.autograd.grad``."""

    def __init__(self, name, plain=True):
        model, x, self.output_fn = build(name)
        self.model = copy.deepcopy(model).double()
        self.inputs = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, x)
        self.params = parameters(self.model)
        for module in self.model.modules():
            if plain and type(module) in PLAIN:
                module.forward = types.MethodType(PLAIN[type(module)], module)

    def outputs(self, params):
        inputs = self.inputs
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        found = functional_call(self.model, params, args if isinstance(args, tuple) else (args,), kwargs)
        return found if self.output_fn is None else self.output_fn(found)

    def jacobians(self, v=None, orders=1):
        """J_{m+1} = d (J_m . v) / (m + 1) for v {name: tensor}; of z the shape, too."""
        leaves = [p.clone().requires_grad_() for p in self.params.values()]
        with sdpa_kernel(SDPBackend.MATH):
            z = self.outputs(dict(zip(self.params, leaves, strict=True)))
            rows = [self._row(value, leaves, v, orders) for value in z.flatten()]
        return [torch.stack(parts) for parts in zip(*rows, strict=True)], z.detach()

    def _row(self, value, leaves, v, orders):
        found = []
        for m in range(orders):
            if value.requires_grad:
                g = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
            else:
                g = [torch.zeros_like(leaf) for leaf in leaves]
            found.append(torch.cat([part.detach().flatten() for part in g]))
            if m + 1 < orders:
                value = sum((a * b).sum() for a, b in zip(g, v.values(), strict=True)) / (m + 1)
        return found

    def split(self, flat):
        parts = flat.split([p.numel() for p in self.params.values()])
        return {name: part.view_as(p) for (name, p), part in zip(self.params.items(), parts, strict=True)}


@functools.cache
def reference(name):
    return Reference(name)


def error_of(z):
    """A direction in the space of outputs."""
    return torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) / 3


def by_index(rows, z):
    """(N C, N C, ...) as (N, N, ..., C, C, ...)."""
    rows = rows.reshape(*z.shape * rows.ndim)
    return rows.permute(*range(0, rows.ndim, 2), *range(1, rows.ndim, 2))


def rounding(model, order):
    """Of an inner product of two rows of Jacobians, in units of the product of their norms.

    Either side adds up P products, with an error of at most P eps |a| |b| (Higham, Accuracy and Stability of Numerical
    Algorithms, 3.1); an entry of a row at order m has itself come through m + 1 chains of sums, of no more terms than
    there are parameters in these networks.
    """
    count = sum(p.numel() for p in model.parameters())
    return 2 * (order + 1) * count * torch.finfo(measured_dtype(model)).eps


def measured_dtype(model):
    """Half precision is widened."""
    return torch.promote_types(next(model.parameters()).dtype, torch.float32)


def assert_gram(found, rows, columns, z, allowed):
    expected = by_index(rows @ columns.T, z)
    sizes = by_index(torch.outer(rows.norm(dim=1), columns.norm(dim=1)), z)
    assert found.shape == expected.shape
    off = (found.double() - expected).abs()
    assert bool((off <= allowed * sizes).all()), f"off by {float(off.max()):.3g} of {float(sizes.max()):.3g}"


def check_kernels(name, order):
    model, x, output_fn = build(name)
    own, allowed = reference(name), rounding(model, order)
    (J,), z = own.jacobians()
    e = error_of(z)
    J = own.jacobians(own.split(J.T @ e.flatten()), order)[0]
    if order == 1:
        assert_gram(measure.ntk(model, x, output_fn=output_fn), J[0], J[0], z, allowed)
        return
    found = measure.ntk_derivatives(model, x, e, derivatives=order - 1, output_fn=output_fn)
    assert found.method.startswith("reverse mode" if name in REVERSE else "jets")
    if order == 3:
        assert_gram(found.ddI, 2 * J[2], J[0], z, allowed)
        assert_gram(found.ddII, J[1], J[1], z, allowed)
        return
    assert_gram(found.dH, J[1], J[0], z, allowed)
    if name in WHOLE_REFUSED:
        with pytest.raises(ValueError, match=NO_DERIVATIVE):
            measure.dntk(model, x, output_fn=output_fn)
        return
    whole = measure.dntk(model, x, output_fn=output_fn)
    for sample, output in ((0, 1), (2, 0)):  # of z_k;c: dH_{ijk;abc} is J_1 J_0^T along its gradient
        row = J[0][sample * e.shape[1] + output]
        J1 = own.jacobians(own.split(row), 2)[0][1]
        assert_gram(whole[:, :, sample, ..., output], J1, J[0], z, allowed)


def check_taylor_term(name, order):
    """The term of this order is d^k z / k! = J_{k-1} . d / k."""
    model, x, output_fn = build(name)
    own = reference(name)
    (J,), z = own.jacobians()
    steps = own.split(J.T @ error_of(z).flatten())
    start = parameters(model)
    end = {key: (value + steps[key]).to(measured_dtype(model)) for key, value in start.items()}
    d = {key: end[key].double() - start[key] for key in start}
    J = own.jacobians(d, order)[0][-1]
    d = torch.cat([step.flatten() for step in d.values()])
    found = measure.taylor_terms(model, x, start, end, taylor_order=order, output_fn=output_fn)[order].double()
    off = (found.flatten() - J @ d / order).abs()
    assert bool((off <= rounding(model, order) * J.norm(dim=1) * d.norm()).all()), f"off by {float(off.max()):.3g}"


def refused(name, order):
    """The measurements of this order."""
    model, x, output_fn = build(name)
    if order == 1:
        yield lambda: measure.ntk(model, x, output_fn=output_fn)
        return
    e = error_of(torch.zeros(3, 2))
    yield lambda: measure.ntk_derivatives(model, x, e, derivatives=order - 1, output_fn=output_fn)
    yield lambda: (measure.dntk if order == 2 else measure.ddntk)(model, x, output_fn=output_fn)


@pytest.mark.filterwarnings("ignore::torch_eft.measure.AlmostEverywhereWarning", "ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("name", "order"),
    [  # every operation in the fast suite, at first order and at one of the others
        pytest.param(name, order, marks=[pytest.mark.slow] * (order > 1 and (index + order) % 2 == 1))
        for index, name in enumerate(OPERATIONS)
        for order in (1, 2, 3)
    ],
)
def test_derivatives(name, order):
    first, why = REFUSED.get(name, (4, None))
    if order < first:
        check_kernels(name, order)
    else:
        for measurement in refused(name, order):
            with pytest.raises(ValueError, match=why):
                measurement()
    if order < TAYLOR_REFUSED.get(name, first):
        check_taylor_term(name, order)
    else:
        model, x, output_fn = build(name)
        start = dict(model.named_parameters())
        with pytest.raises(ValueError, match=why):
            measure.taylor_terms(model, x, start, start, taylor_order=order, output_fn=output_fn)


def sampled_on_a_grid(z):
    grid = torch.linspace(-0.9, 0.7, 12, dtype=z.dtype).reshape(1, 3, 2, 2).expand(len(z), -1, -1, -1)
    return F.grid_sample(z.reshape(-1, 1, 2, 2), grid, align_corners=False).flatten(1)


def test_samples_on_a_grid_are_measured_as_the_linear_map_that_they_are():
    """In older versions of torch, too, where the fused operation has no second derivative."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.Tanh(), Apply(sampled_on_a_grid), nn.Tanh(), nn.Linear(6, 2)
    model, x, e = nn.Sequential(*layers).double(), torch.randn(3, 3).double(), torch.randn(3, 2).double()
    matrix = sampled_on_a_grid(torch.eye(4).double())
    plain = nn.Sequential(*layers[:2], Apply(lambda z: z @ matrix), *layers[3:])
    torch.testing.assert_close(measure.ntk(model, x), measure.ntk(plain, x))
    found, expected = measure.ntk_derivatives(model, x, e), measure.ntk_derivatives(plain, x, e)
    for name in ("dH", "ddI", "ddII"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize(
    "name",
    [
        *("EmbeddingBag, sum", "EmbeddingBag, mean", "EmbeddingBag, max", "BatchNorm1d without running statistics"),
        *("BatchNorm1d", "LayerNorm", "InstanceNorm2d", "InstanceNorm1d, running", "weight_norm"),
    ],
)
def test_plain_forwards_have_the_values_and_gradients_of_the_fused_ones(name):
    (plain,), z = Reference(name).jacobians()
    (fused,), value = Reference(name, plain=False).jacobians()
    allowed = rounding(build(name)[0], 1)
    torch.testing.assert_close(z, value, rtol=0, atol=allowed * float(value.abs().max()))
    torch.testing.assert_close(plain, fused, rtol=0, atol=allowed * float(fused.abs().max()))
