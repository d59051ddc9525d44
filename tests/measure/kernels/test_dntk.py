"""dNTK and ddNTK: whole against contracted, against finite differences of Jacobians, and an exactly solved network."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

from tests.measure.zoo import Block, Language, Recurrent, build, pooled, randn, tokens
from torch_eft import measure
from torch_eft.measure.jets import jet as jets
from torch_eft.measure.kernels.dntk import AlmostEverywhereWarning

NETWORKS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 2)),
        lambda: randn(3, 3),
    ),
    "cnn with group norm": (
        lambda: pooled(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 2), nn.Tanh(), channels=4, axes=(2, 3)
        ),
        lambda: randn(2, 1, 6, 6),
    ),
    "resnet": (
        lambda: pooled(nn.Conv2d(2, 4, 3), Block(4), nn.Tanh(), Block(4), channels=4, axes=(2, 3)),
        lambda: randn(2, 2, 6, 6),
    ),
    "transformer": (lambda: Language(layers=2), lambda: tokens(2, 5)),
    "lstm": (Recurrent, lambda: randn(3, 4, 3)),
}


def network(name):
    torch.manual_seed(0)
    make, inputs = NETWORKS[name]
    model, x = make().double().eval(), inputs()
    lambdas = {key: 0.5 + 0.1 * index for index, (key, _) in enumerate(model.named_parameters())}
    return model, x, lambdas


def jacobian(model, x, params):
    """(N C, P) by one reverse pass a number."""
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    z = functional_call(model, leaves, (x,))
    rows = [torch.autograd.grad(value, list(leaves.values()), retain_graph=True) for value in z.flatten()]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def paired(J, scale, K, shape):
    N, C = shape
    return ((J * scale) @ K.T).view(N, C, N, C).permute(0, 2, 1, 3)


@pytest.fixture(autouse=True)
def no_fast_attention():
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("name", NETWORKS)
def test_finite_differences_of_jacobians_converge_to_the_contractions(name):
    """Reverse mode at theta +- h v only: no nested differentiation anywhere. Five points, error of order h^4."""
    model, x, lambdas = network(name)
    params = dict(model.named_parameters())
    shape = (len(x), 2)
    e = randn(*shape, seed=3)
    v = measure.ntk_vjp(model, x, e, lambdas=lambdas)
    found = measure.ntk_derivatives(model, x, e, lambdas=lambdas)
    scale = torch.cat([torch.full((p.numel(),), lambdas[n], dtype=torch.float64) for n, p in params.items()])
    size = math.sqrt(sum(float(part.square().sum()) for part in v.values()))
    J = jacobian(model, x, params)

    def derivatives(h):
        moved = [jacobian(model, x, {n: p + k * h * v[n] for n, p in params.items()}) for k in (-2, -1, 1, 2)]
        first = (moved[0] - 8 * moved[1] + 8 * moved[2] - moved[3]) / (12 * h)
        second = (-moved[0] + 16 * moved[1] - 30 * J + 16 * moved[2] - moved[3]) / (12 * h * h)
        return paired(first, scale, J, shape), paired(second, scale, J, shape), paired(first, scale, first, shape)

    errors = []
    for h in (0.1 / size, 0.05 / size):
        values = derivatives(h)
        measured = (found.dH, found.ddI, found.ddII)
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(values, measured, strict=True)])
    for coarse, fine in zip(*errors, strict=True):
        # Sixteenfold at each halving, until rounding (1e-16 / h^2 of the second derivative) is reached.
        assert fine < 1e-8 or math.log2(coarse / fine) == pytest.approx(4, abs=0.5)
        assert fine < 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_tensors_contract_to_the_directional_ones(name):
    """Reverse mode of reverse mode on one side, Taylor series on the other, below 1e-8."""
    model, x, lambdas = network(name)
    dH = measure.dntk(model, x, lambdas=lambdas)
    ddI, ddII = measure.ddntk(model, x, lambdas=lambdas)
    e = randn(len(x), 2, seed=4)
    found = measure.ntk_derivatives(model, x, e, lambdas=lambdas)
    for value, expected in (
        (found.H, measure.ntk(model, x, lambdas=lambdas)),
        (found.dH, torch.einsum("abcijk,ck->abij", dH, e)),
        (found.ddI, torch.einsum("abcdijkl,ck,dl->abij", ddI, e, e)),
        (found.ddII, torch.einsum("abcdijkl,ck,dl->abij", ddII, e, e)),
        (measure.dntk(model, x, lambdas=lambdas, direction=e), found.dH),
        (measure.ddntk(model, x, lambdas=lambdas, direction=e).ddII, found.ddII),
        (measure.ntk_derivatives(model, x, e, lambdas=lambdas, trace=True).ddI, measure.as_trace(found.ddI)),
    ):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    # Symmetries of the definitions: dH in its last two pairs, ddI in its last three, ddII under (1,3) <-> (2,4).
    torch.testing.assert_close(dH, dH.permute(0, 2, 1, 3, 5, 4), rtol=0, atol=1e-12 * float(dH.abs().max()))
    torch.testing.assert_close(ddI, ddI.permute(0, 3, 1, 2, 4, 7, 5, 6), rtol=0, atol=1e-10 * float(ddI.abs().max()))
    torch.testing.assert_close(ddII, ddII.permute(1, 0, 3, 2, 5, 4, 7, 6), rtol=0, atol=1e-10 * float(ddII.abs().max()))


def test_directions_of_other_inputs_and_in_parameter_space():
    model, x, lambdas = network("mlp")
    train = randn(5, 3, seed=8)
    e = randn(5, 2, seed=9)
    v = measure.ntk_vjp(model, train, e, lambdas=lambdas)
    both = torch.cat([x, train])
    whole = measure.ntk_derivatives(model, both, torch.cat([torch.zeros(3, 2).double(), e]), lambdas=lambdas)
    found = measure.ntk_derivatives(model, x, v, lambdas=lambdas, derivatives=1)
    torch.testing.assert_close(found.dH, whole.dH[:3, :3], rtol=0, atol=1e-12)
    assert found.ddI is None


class TwoLayers(nn.Module):
    """f = u . v x / sqrt(n), without biases."""

    def __init__(self, n):
        super().__init__()
        self.first, self.second = nn.Linear(1, n, bias=False), nn.Linear(n, 1, bias=False)
        nn.init.normal_(self.first.weight)
        nn.init.normal_(self.second.weight)

    def forward(self, x):
        return self.second(self.first(x)) / math.sqrt(self.second.in_features)


@pytest.mark.parametrize("eta", [0.3, 2.6])  # 2 / H < eta < 4 / H: the catapult
def test_the_two_layer_linear_map(eta):
    """x = 1, y = 0: f' = f (1 - eta H + eta^2 f^2 / n), H' = H + (eta f^2 / n) (eta H - 4) (Lewkowycz et al. 2020).

    This pins dH and ddH: with e = f the step's series in eta has dH f f = 2 f^3 / n at second order of z, and of H
    2 dH f = 4 f^2 / n at first and (ddI + ddII) f f = f^2 H / n at second order.
    """
    torch.manual_seed(3)
    n, x = 40, torch.ones(1, 1, dtype=torch.float64)
    model = TwoLayers(n).double()
    eta = eta / float(measure.ntk(model, x))
    for _ in range(20):
        f, H = float(model(x)), float(measure.ntk(model, x))
        e = torch.full((1, 1), f, dtype=torch.float64)
        found = measure.ntk_derivatives(model, x, e)
        size = f * f / n
        # f is a sum of n products, up to |u| |v| / sqrt(n) <= sqrt(n) H / 2, and at the end close to 0 by cancellation.
        rounding = 1e-15 * math.sqrt(n) * H
        assert float(found.dH) == pytest.approx(2 * size, rel=1e-12, abs=4 * abs(f) * rounding / n)
        assert float(found.ddI) == pytest.approx(0, abs=1e-12 * size * H)
        assert float(found.ddII) == pytest.approx(size * H, rel=1e-12, abs=4 * abs(f) * rounding * H / n)
        dH, (ddI, ddII) = measure.dntk(model, x), measure.ddntk(model, x)
        assert float(dH) * f == pytest.approx(2 * size, rel=1e-12, abs=4 * abs(f) * rounding / n)
        assert float(ddI) == pytest.approx(0, abs=1e-12 * H)
        assert float(ddII) * f * f == pytest.approx(size * H, rel=1e-12)
        expected = f * (1 - eta * H + eta**2 * size), H + eta * size * (eta * H - 4)
        step = -eta * f
        gradients = torch.autograd.grad(model(x).sum(), list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter += step * gradient
        assert float(model(x)) == pytest.approx(expected[0], rel=1e-12, abs=10 * rounding)
        assert float(measure.ntk(model, x)) == pytest.approx(expected[1], rel=1e-12)


def test_networks_with_kinks_are_labeled():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double(), randn(3, 3)
    e = randn(3, 2, seed=1)
    found = measure.ntk_derivatives(model, x, e)
    assert found.kinked == ("relu",)
    assert found.validity.flag == "caution" and found.validity.reason.startswith(
        "almost everywhere: the network has kinks (relu), whose crossings contribute"
    )
    for action in (
        lambda: measure.dntk(model, x),
        lambda: measure.dntk(model, x, direction=e),
        lambda: measure.ddntk(model, x, direction=e),
    ):
        with pytest.warns(AlmostEverywhereWarning, match="use the realized change of H, or a secant"):
            action()
    model[1] = nn.Tanh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure.dntk(model, x)
    assert measure.ntk_derivatives(model, x, e).validity.reason == "the derivatives of a smooth network"


class Distances(nn.Module):
    """An operation that has no rule for Taylor series."""

    def __init__(self):
        super().__init__()
        self.centers, self.head = nn.Parameter(torch.randn(4, 3)), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.linalg.solve(torch.eye(4).to(x) * 3, torch.tanh(x @ self.centers.T).T).T)


def test_operations_without_a_series_take_reverse_mode():
    torch.manual_seed(0)
    model, x = Distances().double(), randn(3, 3)
    e = randn(3, 2, seed=1)
    found = measure.ntk_derivatives(model, x, e)
    assert found.method.startswith("reverse mode (")
    dH = measure.dntk(model, x)
    torch.testing.assert_close(found.dH, torch.einsum("abcijk,ck->abij", dH, e), rtol=0, atol=1e-13)


def test_a_wrong_derivative_is_refused(monkeypatch):
    """A series of tanh that is off by one percent at first order: caught at first use."""
    right = jets._RULES[torch.tanh]

    def wrong(*args, **kwargs):
        found = right(*args, **kwargs)
        first, second, *others = found
        return type(found)([first, 1.01 * second, *others])

    monkeypatch.setitem(jets._RULES, torch.tanh, wrong)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), randn(3, 3)
    with pytest.raises(ValueError, match=r"derivatives of order 2 cannot be trusted for '\d.(weight|bias)'"):
        measure.ntk_derivatives(model, x, randn(3, 2, seed=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(direction=torch.ones(2, 2)),
            r"direction: \(2, 2\) given; give a tensor \(3, 2\), a number",
        ),
        (dict(direction={"0.weight": torch.ones(4, 3)}), r"direction: '0.bias' is missing"),
        (
            dict(
                direction={
                    "0.weight": torch.ones(3, 4),
                    "0.bias": torch.ones(4),
                    "2.weight": torch.ones(2, 4),
                    "2.bias": torch.ones(2),
                }
            ),
            r"direction: '0.weight' has shape \(3, 4\), the parameter \(4, 3\)",
        ),
        (dict(memory=1000), r"memory: .* GiB needed for the whole dH of 3 samples and 2 outputs"),
    ],
)
def test_unusable_arguments_are_named(options, message):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=message):
        measure.dntk(model, torch.ones(3, 3), **options)


def test_order_is_checked():
    model, x, _ = build("mlp")
    with pytest.raises(ValueError, match="derivatives: 3 given; 1 is dH, 2 is dH, ddI and ddII"):
        measure.ntk_derivatives(model, x, randn(3, 2), derivatives=3)


class Straight(torch.autograd.Function):
    """tanh, whose backward is differentiable but forgets that its slope depends on x."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 - ctx.saved_tensors[0].detach().square())


class Cut(nn.Module):
    """Two layers, and between them a part of the function that the gradient does not see."""

    def __init__(self, how):
        super().__init__()
        self.body, self.gate, self.head = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.how = how

    def forward(self, x):
        h = torch.tanh(self.body(x))
        if self.how == "detach":
            return self.head(h * torch.sigmoid(self.gate(h)).detach())
        if self.how == "no_grad":
            with torch.no_grad():
                scale = torch.sigmoid(self.gate(h))
            return self.head(h * scale)
        if self.how == "kinked":
            return self.head(torch.relu(h) * torch.sigmoid(self.gate(h)).detach())
        return self.head(Straight.apply(self.gate(h)))


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("detach", "detach in the forward"),
        ("no_grad", "no_grad in 'gate'"),
        ("own", "the backward of Straight"),
        ("kinked", "detach in the forward"),
    ],
)
def test_a_forward_that_is_cut_from_its_gradient(how, part):
    """H is right, and what autodiff calls its derivative is not: the rate by differences of loops is another one."""
    torch.manual_seed(0)
    model, x, e = Cut(how).double(), randn(3, 3), randn(3, 2, seed=1)
    params = dict(model.named_parameters())
    v = measure.ntk_vjp(model, x, e)
    found = measure.ntk_derivatives(model, x, e)

    def kernel(s):
        leaves = {n: (p + s * v[n]).detach().requires_grad_() for n, p in params.items()}
        z = functional_call(model, leaves, (x,)).flatten()
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        rows = [torch.cat([g.flatten() for g in torch.autograd.grad(a, list(leaves.values()), **options)]) for a in z]
        J = torch.stack(rows)
        return (J @ J.T).view(3, 2, 3, 2).permute(0, 2, 1, 3)

    torch.testing.assert_close(found.H, kernel(0.0), rtol=0, atol=1e-12)
    rate = (kernel(1e-5) - kernel(-1e-5)) / 2e-5
    claimed = found.dH + found.dH.permute(1, 0, 3, 2)
    assert float((claimed - rate).norm()) > 1e-3 * float(rate.norm())
    assert found.validity.flag == "invalid" and part in found.validity.reason
    for action in (measure.dntk, measure.ddntk):
        with pytest.raises(ValueError, match="model: no derivatives: a part of the forward is cut"):
            action(model, x, e)
        with pytest.raises(ValueError, match="model: no derivatives: a part of the forward is cut"):
            action(model, x)


def test_a_harmless_detach_in_float32_is_none():
    """What is only looked at, or constant, does not make derivatives wrong; nor does rounding."""

    class Watched(nn.Sequential):
        def forward(self, x):
            z = super().forward(x)
            self.size = z.detach().norm()
            return z / x.shape[1]

    torch.manual_seed(0)
    model = Watched(nn.Linear(3, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 2))
    x = torch.eye(3)
    found = measure.ntk_derivatives(model, x, torch.ones(3, 2))
    assert found.validity.flag == "valid" and found.cut == ()


def test_rows_at_their_bound_and_padding_make_no_derivatives():
    """Both are held outside of the gradient: at the bound J jumps, and a padding row moves the output all the same."""
    torch.manual_seed(0)
    tokens = torch.tensor([[0, 1], [2, 3], [1, 0]])
    for options, named in (({"max_norm": 0.5}, "max_norm of '0'"), ({"padding_idx": 0}, "padding_idx of an embedding")):
        table = nn.Embedding(5, 3, **options)
        model = nn.Sequential(table, nn.Flatten(), nn.Tanh(), nn.Linear(6, 2)).double()
        nn.init.normal_(table.weight)
        direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        found = measure.ntk_derivatives(model, tokens, direction)
        assert found.validity.flag == "invalid" and named in str(found.validity), str(found.validity)
    along = measure.ntk_vjp(model, tokens, torch.ones(3, 2).double())  # as training moves it: the padding stays
    assert measure.ntk_derivatives(model, tokens, along).validity.flag == "valid"
