"""Taylor terms along a displacement: exact cases, orders of the remainder, brute force, and refusals."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from tests.oracles.models import ConvNet, Recurrent, Tied, TwoInputs, mlp
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.probe import as_probe
from torch_eft.measure.jets import jet as jets
from torch_eft.measure.jets.reverse import projected_series_by_reverse_mode, series_by_reverse_mode
from torch_eft.measure.taylor import series as taylor
from torch_eft.measure.taylor.series import taylor_series, taylor_sizes, taylor_terms

DTYPE = torch.float64


def displaced(model, size=0.1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    params0 = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    d = {name: size * torch.randn(p.shape, generator=generator, dtype=DTYPE).to(p) for name, p in params0.items()}
    return params0, {name: p + d[name] for name, p in params0.items()}


def seeded(build, seed=0):
    torch.manual_seed(seed)
    return build().double()


def by_polynomial_fit(f, order, degree=24, radius=1.0):
    """Taylor coefficients of s -> f(s) from values alone: interpolation at Chebyshev points, no derivatives."""
    nodes = radius * torch.cos(math.pi * (torch.arange(degree + 1, dtype=DTYPE) + 0.5) / (degree + 1))
    values = torch.stack([f(s) for s in nodes])
    powers = (nodes / radius)[:, None] ** torch.arange(degree + 1, dtype=DTYPE)
    coefficients = torch.linalg.solve(powers, values.flatten(1)).unflatten(1, values.shape[1:])
    return torch.stack([coefficients[m] / radius**m for m in range(order + 1)])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_deep_linear_network_is_exact_at_its_depth(depth):
    model = seeded(lambda: nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(depth)]))
    params0, params = displaced(model, 1.0)
    x = torch.randn(5, 4, dtype=DTYPE)
    series = taylor_series(model, x, params0, params)
    assert float(series.remainder.abs().max()) < 1e-13 * float(series.value.abs().max())
    assert not bool(series.terms[depth + 1 :].any())
    expected = x
    for name in params:
        expected = expected @ params[name].T
    torch.testing.assert_close(series.value, expected)
    torch.testing.assert_close(series.terms.sum(0), expected)
    assert (series.method, series.kinked, series.remarks) == ("jets", (), ())
    if depth > 1:
        assert bool(taylor_series(model, x, params0, params, taylor_order=depth - 1).remainder.any())


MODELS = {
    "mlp": (lambda: mlp((4, 7, 5, 3), nn.GELU), (5, 4)),
    "conv": (ConvNet, (3, 1, 8, 8)),
    "tied": (Tied, (5, 4)),
    "recurrent": (Recurrent, (3, 4, 3)),
    "transformer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, activation="gelu"), nn.Flatten()),
        (3, 2, 4),
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.SiLU(), nn.Linear(6, 2)), (5, 4)),
}


@pytest.mark.filterwarnings("ignore:dropout option")
@pytest.mark.parametrize("name", MODELS)
def test_values_alone_give_the_same_terms_and_the_remainder_is_of_fourth_order(name):
    build, shape = MODELS[name]
    model = seeded(build)
    params0, params = displaced(model, 0.05)
    x = torch.randn(shape, dtype=DTYPE)
    reference = seeded(build).eval()

    def f(s):
        moved = {key: p + s * (params[key] - p) for key, p in params0.items()}
        with torch.no_grad():
            return functional_call(reference, moved, (x,))

    found = taylor_series(model, x, params0, params)
    assert found.method == "jets"
    for term, expected in zip(found.terms, by_polynomial_fit(f, 3), strict=True):
        torch.testing.assert_close(term, expected, rtol=0, atol=1e-9 * float(found.value.abs().max()))
    steps = [0.5, 0.25]
    for order in (1, 3):
        remainders = []
        for step in steps:
            at = {key: p + step * (params[key] - p) for key, p in params0.items()}
            remainders.append(float(taylor_series(model, x, params0, at, taylor_order=order).remainder.norm()))
        assert math.log2(remainders[0] / remainders[1]) == pytest.approx(order + 1, abs=0.35)


def test_lower_orders_and_other_outputs():
    model = seeded(TwoInputs)
    params0, params = displaced(model)
    x = {"a": torch.randn(3, 3, dtype=DTYPE), "b": torch.randn(3, 4, dtype=DTYPE)}
    pick = lambda out: out["logits"]  # noqa: E731
    terms = taylor_terms(model, x, params0, params, output_fn=pick)
    assert terms.shape == (4, 3, 2)
    for order in range(3):
        torch.testing.assert_close(
            taylor_terms(model, x, params0, params, taylor_order=order, output_fn=pick), terms[: order + 1]
        )
    torch.testing.assert_close(terms[0], model(**x)["logits"].detach())
    single = model.float()
    params0, params = displaced(single)
    found = taylor_terms(single, x, params0, {k: p.double() for k, p in params.items()}, output_fn=pick)
    assert found.dtype == torch.float32


def test_frozen_parameters_do_not_move():
    model = seeded(lambda: mlp((4, 5, 2)))
    model[0].requires_grad_(False)
    params0, params = displaced(model)
    assert set(params0) == {"2.weight", "2.bias"}
    series = taylor_series(model, torch.randn(3, 4, dtype=DTYPE), params0, params)
    assert float(series.remainder.abs().max()) < 1e-15
    assert not bool(series.terms[2:].any())


class Packed(nn.Module):
    """Sequences of different lengths."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        packed = pack_padded_sequence(x, torch.tensor([4, 3, 1]), batch_first=True)
        return self.head(self.rnn(packed)[1][0][0])


class Solving(nn.Module):
    """An operation with derivatives of every order but no rule for jets."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        w = self.linear.weight
        return torch.linalg.solve(torch.eye(4, dtype=w.dtype) * 3 + w, self.linear(x).T).T.add(9).relu()


class Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        value = x.exp()
        ctx.save_for_backward(value)
        return value

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return Exponential.apply(self.linear(x))


@pytest.mark.parametrize(
    ("build", "shape", "reason"),
    [(Packed, (3, 4, 3), "lstm"), (Solving, (5, 4), "solve"), (Custom, (5, 4), "gradients are off")],
)
def test_without_a_rule_reverse_mode_steps_in(build, shape, reason):
    model = seeded(build)
    params0, params = displaced(model, 0.02)
    x = torch.randn(shape, dtype=DTYPE)
    series = taylor_series(model, x, params0, params)
    assert series.method == "reverse-over-reverse"
    assert any(reason in remark and "reverse-over-reverse" in remark for remark in series.remarks)
    assert series.kinked == (("relu",) if build is Solving else ())

    def f(s):
        moved = {key: p + s * (params[key] - p) for key, p in params0.items()}
        with torch.no_grad():
            return functional_call(model, moved, (x,))

    for term, expected in zip(series.terms, by_polynomial_fit(f, 3), strict=True):
        torch.testing.assert_close(term, expected, rtol=0, atol=1e-9 * float(series.value.abs().max()))


def test_kinks_are_said_and_order_two_alone_is_warned_of():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    params0, params = displaced(model)
    x = torch.randn(5, 4, dtype=DTYPE)
    series = taylor_series(model, x, params0, params)
    assert series.kinked == ("relu",)
    assert len(series.remarks) == 1 and series.remarks[0].startswith("almost everywhere: the network has kinks (relu)")
    assert taylor_series(model, x, params0, params, taylor_order=1).remarks == ()
    smooth = seeded(lambda: mlp((4, 6, 2)))
    params0, params = displaced(smooth)
    assert (
        taylor_series(smooth, x, params0, params, taylor_order=2)
        .remarks[0]
        .startswith("order 2 alone is not a consistent")
    )


def test_jumps_are_said_where_reverse_mode_steps_in():
    """An orthogonal weight is made with signs that are read off as integers: a parameter that moves may lose them."""
    model = seeded(lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 3)), nn.Tanh()))
    params0, params = displaced(model, 0.01)
    series = taylor_series(model, torch.randn(5, 4, dtype=DTYPE), params0, params)
    assert series.method == "reverse-over-reverse"
    assert series.kinked == ("int",)
    assert series.remarks[0].startswith("almost everywhere")


def test_the_cost_is_in_forward_passes():
    model = mlp((64, 256, 256, 10))
    params0, params = displaced(model)
    x = torch.randn(256, 64)
    taylor_series(model, x, params0, params)
    cost = sorted(taylor_series(model, x, params0, params).cost for _ in range(9))[4]
    assert 1 < cost < 40  # 7 products of matrices and the elementwise work of the activations


def test_a_wrong_rule_is_refused(monkeypatch):
    model = seeded(lambda: mlp((4, 6, 2)))
    params0, params = displaced(model)
    x = torch.randn(5, 4, dtype=DTYPE)
    right = jets._RULES[torch.tanh]
    calls = []
    by_reverse_mode = taylor.projected_series_by_reverse_mode
    monkeypatch.setattr(
        taylor, "projected_series_by_reverse_mode", lambda *args: calls.append(1) or by_reverse_mode(*args)
    )
    wrong = lambda h: type(h)([*right(h)[:3], None if right(h)[3] is None else 0.5 * right(h)[3]])  # noqa: E731
    monkeypatch.setitem(jets._RULES, torch.tanh, wrong)
    with pytest.raises(ValueError, match=r"^model: the Taylor term of order 3 is .* by jets and .* by reverse mode"):
        taylor_terms(model, x, params0, params)
    wrong_terms = taylor_terms(model, x, params0, params, check=False)
    monkeypatch.setitem(jets._RULES, torch.tanh, right)
    assert len(calls) == 1  # differences had found it out before
    right_terms = taylor_terms(model, x, params0, params)
    assert len(calls) == 1
    torch.testing.assert_close(wrong_terms[:3], right_terms[:3])
    assert not torch.allclose(wrong_terms[3], right_terms[3])


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g


class OnceDifferentiable(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return Once.apply(self.linear(x))


class Bagged(nn.Module):
    """A rule for jets, but no second derivative to check it with."""

    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.bag(x)))


def test_what_cannot_be_checked_or_derived_is_said():
    model = seeded(OnceDifferentiable)
    params0, params = displaced(model)
    x = torch.randn(5, 4, dtype=DTYPE)
    with pytest.raises(ValueError, match=r"^model: an operation of OnceDifferentiable has no derivative of order 2"):
        taylor_terms(model, x, params0, params, taylor_order=2)
    model = seeded(Bagged)
    params0, params = displaced(model)
    series = taylor_series(model, torch.arange(12).reshape(4, 3) % 7, params0, params)
    assert series.method == "jets"
    assert series.remarks == series.cut == ()  # differences need no derivative


class Weighted(nn.Module):
    """Weights activations by their own squares, held fixed."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.head(h * h.square().detach())


def test_terms_of_a_forward_that_is_cut_from_its_gradient():
    model = seeded(Weighted)
    params0, params = displaced(model)
    x = torch.randn(5, 4, dtype=DTYPE)
    series = taylor_series(model, x, params0, params)
    assert series.cut == ("detach in the forward",)
    assert series.remarks[0].startswith("no derivatives: a part of the forward is cut from the gradient")
    torch.testing.assert_close(series.value, series.terms.sum(0) + series.remainder)
    for action in (taylor_terms, taylor_sizes):
        with pytest.raises(ValueError, match=r"^model: no derivatives: .* \(detach in the forward\)"):
            action(model, x, params0, params)


def test_the_model_and_the_random_state_are_left_alone():
    model = seeded(ConvNet)
    params0, params = displaced(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = taylor_terms(model, torch.ones(2, 1, 8, 8, dtype=DTYPE), params0, params)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        second = taylor_terms(model, torch.ones(2, 1, 8, 8, dtype=DTYPE), params0, params)
    assert torch.equal(first, second)
    assert not first.requires_grad


def test_parameters_may_be_given_as_modules():
    """Frozen copies of the network included: whether they train is the model's matter."""
    model = seeded(lambda: mlp((4, 6, 2)))
    params0, params = displaced(model)
    x = torch.randn(5, 4, dtype=DTYPE)
    modules = [copy.deepcopy(model).requires_grad_(False) for _ in range(2)]
    for module, values in zip(modules, (params0, params), strict=True):
        module.load_state_dict(values)
    assert torch.equal(taylor_terms(model, x, *modules), taylor_terms(model, x, params0, params))


def test_bad_input():
    model = seeded(lambda: mlp((4, 6, 2)))
    params0, params = displaced(model)
    x = torch.randn(5, 4, dtype=DTYPE)
    for order in (4, -1, 1.5, True):
        with pytest.raises(ValueError, match=r"^taylor_order: .* given; it must be 0, 1, 2 or 3"):
            taylor_terms(model, x, params0, params, taylor_order=order)
    with pytest.raises(ValueError, match=r"^theta_0: '0.bias' is missing; name every"):
        taylor_terms(model, x, {k: p for k, p in params0.items() if k != "0.bias"}, params)
    with pytest.raises(ValueError, match=r"^theta: 'extra' is not a trainable parameter"):
        taylor_terms(model, x, params0, params | {"extra": x})
    with pytest.raises(ValueError, match=r"^theta: '0.bias' has shape \(5, 4\), the parameter \(6,\)"):
        taylor_terms(model, x, params0, params | {"0.bias": x})
    with pytest.raises(ValueError, match=r"^theta: float for '0.bias' given; give"):
        taylor_terms(model, x, params0, params | {"0.bias": 1.0})
    with pytest.raises(ValueError, match=r"^theta_0: a list given; give"):
        taylor_terms(model, x, list(params0), params)
    with pytest.raises(ValueError, match=r"^theta: the output there is not finite"):
        taylor_terms(model, x, params0, params | {"2.bias": params["2.bias"] * math.inf})
    with pytest.raises(ValueError, match=r"^theta: a tensor \(5, 4\) given; .* \(model, x, theta_0, theta\)"):
        taylor_terms(model, params0, params, x)
    with pytest.raises(ValueError, match=r"^theta_0: '0.weight' is missing"):
        taylor_terms(model, x, nn.Linear(4, 2), params)
    with pytest.raises(ValueError, match=r"^probe: "):
        taylor_terms(model, x[:, :3], params0, params)
    with pytest.raises(ValueError, match=r"^model: it has no trainable parameter"):
        taylor_terms(nn.Tanh(), x, {}, {})
    roots = seeded(lambda: nn.Sequential(nn.Linear(4, 2, bias=False), Root()))
    params0, params = displaced(roots)
    with pytest.raises(ValueError, match=r"^theta_0: the Taylor term of order 1 is not finite"):
        taylor_terms(roots, torch.zeros(5, 4, dtype=DTYPE), params0, params)


class Root(nn.Module):
    def forward(self, x):
        return F.softplus(x).sub(math.log(2)).clamp_min(0).sqrt()


def test_reverse_mode_takes_samples_in_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(48, 2)).double()
    x, pattern = torch.randn(5, 1, 6, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    with isolated(model, None) as base:
        direction = {name: 0.1 * torch.randn_like(value) for name, value in base.params.items()}
        arguments = base, direction, as_probe(x), 3, pattern
        whole = series_by_reverse_mode(*arguments)
        for memory in (1, 2 * 18 * 3000, 2**30):
            assert torch.allclose(projected_series_by_reverse_mode(*arguments, memory), whole, rtol=1e-12)
