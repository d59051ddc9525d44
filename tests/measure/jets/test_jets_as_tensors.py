"""Jets as tensors: gradients, vmap, views, kinks; and the operations that have no rule."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.measure.jets.series import CONSTANT, DTYPE, INDEX, assert_series, full, line, normal, series_by_reverse_mode
from torch_eft.measure.jets.jet import NoJetRuleError, coefficients_of, jet, lift, watch_kinks


def test_gradients_of_directional_derivatives():
    """Reverse mode through the last coefficient: the gradient of f'v is the Hessian times v, and so on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5), nn.GELU(), nn.Linear(5, 1)).double()
    x = normal(3, 4)
    names, values = zip(*model.named_parameters(), strict=True)
    leaves = [value.detach().requires_grad_() for value in values]
    v = [normal(*value.shape) for value in values]

    def f(*parts):
        return functional_call(model, dict(zip(names, parts, strict=True)), (x,)).sum()

    current = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    for order in (1, 2, 3):
        along = sum((g * d).sum() for g, d in zip(current, v, strict=True)) / order
        expected = torch.autograd.grad(along, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        last = f(*[lift(leaf, d, order) for leaf, d in zip(leaves, v, strict=True)]).coefficients[order]
        found = torch.autograd.grad(last, leaves, allow_unused=True, materialize_grads=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        current = torch.autograd.grad(along, leaves, create_graph=True, allow_unused=True, materialize_grads=True)


def test_batched_directions_under_vmap():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)).double()
    params = {name: value.detach() for name, value in model.named_parameters()}
    x = normal(3, 4)
    v = {name: normal(6, *value.shape) for name, value in params.items()}

    def third(tangents):
        jets = {name: lift(value, tangents[name], 3) for name, value in params.items()}
        return functional_call(model, jets, (x,)).coefficients[3]

    found = torch.func.vmap(third)(v)
    for index in range(6):
        expected = third({name: value[index] for name, value in v.items()})
        torch.testing.assert_close(found[index], expected, rtol=1e-10, atol=1e-12)


def test_absent_coefficients_stay_absent():
    x = jet((normal(3, 4), None, normal(3, 4), None))
    found = (x @ CONSTANT.T).tanh().coefficients
    assert found[1] is None
    assert found[3] is None
    constant = jet((normal(3, 4), None, None))
    assert F.gelu(constant).coefficients[1:] == (None, None)
    assert torch.linalg.inv(CONSTANT @ CONSTANT.T).ndim == 2
    assert coefficients_of(CONSTANT, 2) == (CONSTANT, None, None)
    assert coefficients_of(constant, 1)[0] is constant.primal
    assert lift(CONSTANT, CONSTANT, 1).order == 1


def test_views_of_coefficients_that_lie_otherwise_in_memory():
    """The coefficient of a bias alone is expanded; that of a transposed summand is transposed."""
    x = F.linear(CONSTANT, CONSTANT, lift(normal(3), normal(3), 1))
    assert x.view(-1).unflatten(0, (3, 3)).coefficients[1].shape == (3, 3)
    y = torch.zeros(4, 3, dtype=DTYPE) + jet((torch.zeros(3, 4, dtype=DTYPE), CONSTANT)).T
    assert torch.equal(y.view(2, 6).coefficients[1], CONSTANT.T.reshape(2, 6))
    assert torch.equal(y.unflatten(0, (2, 2)).coefficients[1], CONSTANT.T.reshape(2, 2, 3))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return -g


class NewStyle(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.detach().cos()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g


class Numpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy() ** 2)

    @staticmethod
    def backward(ctx, g):
        return g


def without_gradients(x):
    with torch.no_grad():
        return x * 2


def written_into(x):
    buffer = torch.zeros(3, 4, dtype=DTYPE)
    buffer[0] = x[0]
    return buffer


REFUSED = {
    "no rule": (lambda x: torch.linalg.inv(x[:, :3]), "linalg.inv"),
    "custom function": (Doubled.apply, "gradients are off"),
    "custom identity": (Same.apply, "past the rules|gradients are off"),
    "custom function of the new style": (NewStyle.apply, "past the rules|gradients are off"),
    "custom function by numpy": (Numpy.apply, "past the rules|gradients are off|numpy"),
    "no_grad": (without_gradients, "gradients are off"),
    "item": (lambda x: x.sum().item(), "item"),
    "bool": (lambda x: bool(x.sum()), "bool"),
    "float": (lambda x: float(x.sum()), "float|item"),
    "numpy": (lambda x: x.numpy(), "numpy"),
    "tolist": (lambda x: x.tolist(), "tolist"),
    "setitem": (lambda x: x.__setitem__(0, 1.0), "setitem"),
    "setitem of a plain tensor": (written_into, "setitem"),
    "a view in place": (lambda x: x[0].add_(1), "views"),
    "a tensor with views in place": (lambda x: (x.T, x.relu_()), "views"),
    "a plain tensor in place": (lambda x: torch.ones(3, 4, dtype=DTYPE).add_(x), "plain tensor"),
    "out": (lambda x: torch.add(x, 1, out=torch.zeros(3, 4, dtype=DTYPE)), "out="),
    "dropout": (lambda x: F.dropout(x, 0.5), "dropout.*random"),
    "rounded quotient": (lambda x: torch.div(x, 2, rounding_mode="floor"), "div.*rounded"),
    "requires_grad_": (lambda x: x.requires_grad_(), "requires_grad_"),
    "backward": (lambda x: x.sum().backward(), "backward|past the rules"),
    "index": (lambda x: CONSTANT.index_select(0, x), "index_select"),
    "fft": (lambda x: torch.fft.fft(x), "fft"),
    "batch norm in training": (lambda x: F.batch_norm(x, x.new_zeros(4), x.new_ones(4), training=True), "batch_norm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_raises(name):
    function, message = REFUSED[name]
    with pytest.raises(NoJetRuleError, match=message):
        function(jet(full(3, 4)))


def test_orthogonal_parametrization_is_refused():
    model = nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)).double()
    jets = {name: lift(p.detach(), torch.ones_like(p), 1) for name, p in model.named_parameters()}
    with pytest.raises(NoJetRuleError):
        functional_call(model, jets, (normal(2, 3),))


def test_a_view_may_change_in_place_once_it_is_alone():
    x = jet(full(3, 4))
    y = (x * 2).T
    y += 1
    assert_series(y, series_by_reverse_mode(lambda s: (line(x.coefficients, s) * 2).T + 1, 3))


def test_kinks_are_collected_and_guards_are_none():
    x = jet(full(3, 4))
    with watch_kinks() as outer:
        with watch_kinks() as kinks:
            F.gelu(x).softmax(1)
            F.normalize(x)
            F.leaky_relu(jet((normal(3, 4), None)))
            assert kinks == []
            F.relu(F.relu(x))
            F.max_pool1d(x, 2)
            assert kinks == ["relu", "max_pool1d"]
        F.celu(F.elu(F.softsign(x)), 2.0)
        F.selu(x)
        torch.where(x > 0, x, 0.0)
    assert kinks == ["relu", "max_pool1d"]
    assert outer == ["relu", "max_pool1d", "selu", "gt"]


def test_bad_coefficients():
    for given in ((), (None, CONSTANT), (CONSTANT,) * 5):
        with pytest.raises(ValueError, match=r"^coefficients: \d given; give h_0 to h_k"):
            jet(given)
    with pytest.raises(ValueError, match=r"the shapes .* differ"):
        jet((CONSTANT, CONSTANT[0]))
    with pytest.raises(TypeError, match="floating point"):
        jet((INDEX,))
    with pytest.raises(TypeError, match="plain"):
        jet((lift(CONSTANT, None, 1),))
    with pytest.raises(ValueError, match=r"orders \[1, 2\] meet in"):
        lift(CONSTANT, CONSTANT, 1) + lift(CONSTANT, CONSTANT, 2)


def test_repr_and_hash():
    x = lift(CONSTANT, CONSTANT, 2)
    assert repr(x).startswith("Jet(order 2, tensor(")
    assert {x: 1}[x] == 1
