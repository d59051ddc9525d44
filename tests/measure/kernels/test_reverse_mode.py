"""H, dH, ddI, ddII of real modules against dense derivative tensors, and their role in a step of gradient descent."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.oracles.models import mlp
from torch_eft.measure.kernels.reverse_mode import differentials

DTYPE = torch.float64


class PlainLayerNorm(nn.LayerNorm):
    """By its definition."""

    def forward(self, x):
        centered = x - x.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


def layer_norm_net(norm=nn.LayerNorm):
    return nn.Sequential(nn.Linear(3, 4), norm(4), nn.GELU(), nn.Linear(4, 2))


def plain_layer_norm_net():
    return layer_norm_net(PlainLayerNorm)


def stacked(model, count):
    """Parameters of ``count`` random networks, the function of all, and a different lambda a parameter."""
    generator = torch.Generator().manual_seed(1)
    params = {
        name: torch.randn(count, *value.shape, dtype=DTYPE, generator=generator) / math.sqrt(max(1, value.shape[-1]))
        for name, value in model.named_parameters()
    }
    x = torch.randn(2, 3, dtype=DTYPE, generator=generator)
    lambdas = {name: 0.3 + 0.4 * index for index, name in enumerate(params)}
    return params, x, lambdas, vmap(lambda p: functional_call(model, p, (x,)))


def by_dense_derivatives(model, params, x, lambdas):
    """All derivatives with respect to all parameters at once, summed with lambda entry by entry."""
    sizes = {name: value.numel() for name, value in params.items()}
    weights = torch.cat([torch.full((size,), float(lambdas[name]), dtype=DTYPE) for name, size in sizes.items()])

    def network(theta):
        parts = dict(zip(sizes, theta.split(list(sizes.values())), strict=True))
        return functional_call(model, {name: part.reshape(params[name].shape) for name, part in parts.items()}, (x,)).T

    theta = torch.cat([value.flatten() for value in params.values()])
    J, J2, J3 = (derivative(theta) for derivative in (jacrev(network), jacrev(jacrev(network)), third(network)))
    v, e = J * weights, torch.einsum
    return {
        "H": e("iam,jbm->abij", J, v),
        "dH": e("iamn,jbm,kcn->abcijk", J2, v, v),
        "ddI": e("iamnr,jbm,kcn,ldr->abcdijkl", J3, v, v, v),
        "ddII": e("iamn,r,jbmr,m,kcn,ldr->abcdijkl", J2, torch.ones_like(weights), J2, weights, v, v),
    }


def third(function):
    return jacrev(jacrev(jacrev(function)))


@pytest.mark.parametrize(
    ("build", "reference"),
    [
        pytest.param(lambda: mlp((3, 3, 2, 2)), lambda: mlp((3, 3, 2, 2)), id="mlp"),
        pytest.param(layer_norm_net, plain_layer_norm_net, id="layer_norm", marks=pytest.mark.slow),
    ],
)
def test_dense_derivatives_agree_to_rounding(build, reference):
    """Dense derivatives of torch's own layer norm are wrong from second order on: it is written out for them."""
    model, plain = build().double(), reference().double()
    params, x, lambdas, f = stacked(model, 2)
    found = differentials(f, params, lambdas)
    torch.testing.assert_close(found.z, f(params), rtol=0, atol=1e-14)
    for s in range(2):
        expected = by_dense_derivatives(plain, {name: value[s] for name, value in params.items()}, x, lambdas)
        for name, value in expected.items():
            atol = 1e-10 * float(value.abs().max())
            torch.testing.assert_close(getattr(found, name)[s], value, rtol=0, atol=atol, msg=name)


class Unflattened(nn.Module):
    def forward(self, x):
        return x[:, None]


NORMALISED = {
    "layer norm": lambda: [nn.LayerNorm(4)],
    "layer norm without affine": lambda: [nn.LayerNorm((4,), elementwise_affine=False)],
    "layer norm of two axes": lambda: [Unflattened(), nn.LayerNorm((1, 4)), nn.Flatten()],
    "instance norm": lambda: [Unflattened(), nn.InstanceNorm1d(1, affine=True), nn.Flatten()],
    "batch norm": lambda: [nn.BatchNorm1d(4)],
    "batch norm of the batch": lambda: [nn.BatchNorm1d(4, track_running_stats=False)],
    "group norm": lambda: [nn.GroupNorm(1, 4)],
    "rms norm": lambda: [nn.RMSNorm(4)],
    "weight norm": lambda: [nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))],
    "transformer": lambda: [Unflattened(), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten()],
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", NORMALISED)
def test_finite_differences_of_first_derivatives(name):
    """dH and ddI along the gradient of one output, for each kind of fused operation; error of order h^4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), *NORMALISED[name](), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    x = torch.randn(5, 3, dtype=DTYPE)
    params = {key: (p.detach() + 0.3 * torch.randn_like(p))[None] for key, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    lambdas = dict.fromkeys(params, 1.0)

    def f(stacked_params):
        return vmap(lambda p: functional_call(model, {**p, **buffers}, (x,))[:2])(stacked_params)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            found = differentials(f, params, lambdas)
            v = torch.autograd.functional.vjp(
                lambda *values: f(dict(zip(params, values, strict=True)))[0, 0, 0], tuple(params.values())
            )[1]
            norm = math.sqrt(sum(float(part.square().sum()) for part in v))

            def slope(t):
                """d/dt of all outputs along v."""
                moved = tuple(p + t * part for p, part in zip(params.values(), v, strict=True))
                J = torch.autograd.functional.jacobian(lambda *values: f(dict(zip(params, values, strict=True))), moved)
                return sum((jacobian.flatten(3) * part.flatten()).sum(-1) for jacobian, part in zip(J, v, strict=True))

            h = 2e-3 / norm
            values = [slope(step * h) for step in (-2, -1, 0, 1, 2)]
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    second = sum(c * value for c, value in zip((1, -8, 0, 8, -1), values, strict=True)) / (12 * h)
    third_derivative = sum(c * value for c, value in zip((-1, 16, -30, 16, -1), values, strict=True)) / (12 * h * h)
    for value, expected in (
        (found.dH[:, :, 0, 0, :, 0, 0], second),
        (found.ddI[:, :, 0, 0, 0, :, 0, 0, 0], third_derivative),
    ):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_step_of_gradient_descent_is_their_series():
    """PDLT chapter infinity: z' = z - eta H e + eta^2/2 dH e e - eta^3/6 ddI e e e + O(eta^4), and so on for H, dH."""
    model = mlp((3, 4, 3, 2)).double()
    params, _, lambdas, f = stacked(model, 1)
    d = differentials(f, params, lambdas)
    error = d.z - torch.randn(d.z.shape, dtype=DTYPE, generator=torch.Generator().manual_seed(2))
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    gradients = torch.autograd.grad(((f(leaves) - d.z + error) ** 2).sum() / 2, list(leaves.values()))

    def remainders(eta):
        step = {n: p - eta * lambdas[n] * g for (n, p), g in zip(params.items(), gradients, strict=True)}
        new = differentials(f, step, lambdas, ("H", "dH"))
        e, einsum = error, torch.einsum
        mixed = d.ddI + einsum("sabcdijkl->sbacdjikl", d.ddI) + 2 * d.ddII
        drift = d.dH + einsum("sabcijk->sbacjik", d.dH)
        mixed_dH = d.ddI + d.ddII + einsum("sacbdikjl->sabcdijkl", d.ddII)
        z = d.z - eta * einsum("sabij,sbj->sai", d.H, e) + eta**2 / 2 * einsum("sabcijk,sbj,sck->sai", d.dH, e, e)
        z = z - eta**3 / 6 * einsum("sabcdijkl,sbj,sck,sdl->sai", d.ddI, e, e, e)
        H = d.H - eta * einsum("sabcijk,sck->sabij", drift, e)
        H = H + eta**2 / 2 * einsum("sabcdijkl,sck,sdl->sabij", mixed, e, e)
        dH = d.dH - eta * einsum("sabcdijkl,sdl->sabcijk", mixed_dH, e)
        return [float((a - b).abs().max()) for a, b in ((new.z, z), (new.H, H), (new.dH, dH))]

    for coarse, fine, order in zip(remainders(4e-3), remainders(2e-3), (4, 3, 2), strict=True):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_constant_parameters_and_missing_names():
    """lambda = 0 or no lambda holds a parameter; only what is asked for is computed."""
    model = mlp((3, 4, 2)).double()
    params, _, lambdas, f = stacked(model, 2)
    zero = differentials(f, params, lambdas | {"0.weight": 0.0}, ("H", "dH"))
    small = differentials(f, params, {k: v for k, v in lambdas.items() if k != "0.weight"}, ("H", "dH"))
    torch.testing.assert_close(zero.dH, small.dH, rtol=0, atol=0)
    assert zero.ddI is None
    assert zero.ddII is None
    entry = differentials(f, params, lambdas | {"0.weight": torch.zeros(4, 3, dtype=DTYPE)}, ("dH",))
    torch.testing.assert_close(entry.dH, zero.dH, rtol=0, atol=1e-14)
    nothing = differentials(f, params, {}, ("H", "dH", "ddI", "ddII"))
    assert not any(bool(getattr(nothing, name).any()) for name in ("H", "dH", "ddI", "ddII"))
    assert differentials(f, params, {}, ()).H is None


def test_a_linear_network_of_one_layer_has_no_differentials():
    model = nn.Linear(3, 2).double()
    params, _, lambdas, f = stacked(model, 2)
    found = differentials(f, params, lambdas)
    assert bool(found.H.any())
    assert not any(bool(value.any()) for value in (found.dH, found.ddI, found.ddII))


def test_an_operation_without_a_second_derivative_is_an_error():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient

    params = {"w": torch.randn(2, 3, dtype=DTYPE)}
    f = lambda p: torch.tanh(Once.apply(p["w"]))[:, None]  # noqa: E731
    assert differentials(f, params, {"w": 1.0}, ("H",)).H.shape == (2, 1, 1, 3, 3)
    with pytest.raises(RuntimeError, match="the backward of Once is marked once_differentiable"):
        differentials(f, params, {"w": 1.0}, ("dH",))
