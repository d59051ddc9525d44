"""Taylor series through every operation and many modules against repeated reverse mode along the line."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from torch_eft.measure.jets import Jet, NoJetRuleError, coefficients_of, jet, lift, watch_kinks

DTYPE = torch.float64
TOLERANCE = 1e-10


def series_by_reverse_mode(function, order):
    """Taylor coefficients at s = 0 of tensors s -> (...), entry by entry and order by order."""
    s = torch.zeros((), dtype=DTYPE, requires_grad=True)
    value = function(s)
    found = [value.detach()]
    pattern = torch.zeros_like(value, requires_grad=True)
    current = value
    for degree in range(1, order + 1):
        # d/ds of every entry at once: the derivative of the pulled back pattern with respect to the pattern.
        if not current.requires_grad:
            return [*found, *[torch.zeros_like(value)] * (order + 1 - degree)]
        (pulled,) = torch.autograd.grad(
            (current * pattern).sum(), s, create_graph=True, allow_unused=True, materialize_grads=True
        )
        if not pulled.requires_grad:
            return [*found, *[torch.zeros_like(value)] * (order + 1 - degree)]
        (current,) = torch.autograd.grad(pulled, pattern, create_graph=True, allow_unused=True, materialize_grads=True)
        found.append(current.detach() / math.factorial(degree))
    return found


def line(coefficients, s):
    return sum((part * s**m for m, part in enumerate(coefficients) if m and part is not None), coefficients[0])


def assert_series(found, expected, name=""):
    for order, value in enumerate(expected):
        part = coefficients_of(found, order)[order]
        part = torch.zeros_like(value) if part is None else part
        scale = max(1e-3, float(expected[0].abs().max()), float(value.abs().max()))
        torch.testing.assert_close(
            part, value, rtol=0, atol=TOLERANCE * scale, msg=lambda text: f"{name}, order {order}: {text}"
        )


def check(function, series, reference=None, orders=(1, 2, 3)):
    """``function`` of several jets with the given coefficients, some of them None, against ``reference``."""
    for order in orders:
        given = [jet(parts[: order + 1]) for parts in series]
        found = tree_flat(function(*given))
        for index, output in enumerate(found):
            expected = series_by_reverse_mode(
                lambda s: tree_flat((reference or function)(*[line(parts[: order + 1], s) for parts in series]))[index],
                order,
            )
            assert isinstance(output, Jet)
            assert_series(output, expected)


def tree_flat(value):
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def normal(*shape):
    return torch.randn(shape, dtype=DTYPE)


def full(*shape):
    return (normal(*shape), normal(*shape), normal(*shape), normal(*shape))


def between(low, high, *shape):
    return (low + (high - low) * torch.rand(shape, dtype=DTYPE), normal(*shape), normal(*shape), normal(*shape))


def straight(*shape):
    return (normal(*shape), normal(*shape), None, None)


INDEX = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1], [1, 0, 0, 2]])
MASK = torch.tensor([[True, False, True, False]] * 3)
GRID = torch.linspace(-0.9, 0.7, 12, dtype=DTYPE).reshape(1, 3, 2, 2)
CONSTANT = torch.linspace(0.3, 2.0, 12, dtype=DTYPE).reshape(3, 4)

UNARY = {
    "reshape": lambda x: x.reshape(4, 3),
    "view": lambda x: x.view(2, -1),
    "flatten": lambda x: x.flatten(),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "transpose": lambda x: x.transpose(0, 1) + x.T.mT.mT + x.mT + x.t(),
    "permute": lambda x: torch.permute(x, (1, 0)) + x.movedim(0, 1),
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1) + x[None].squeeze(0),
    "expand": lambda x: x[:, :1].expand(3, 4) + x[0].expand_as(x) + x[:1].broadcast_to(2, 3, 4),
    "repeat": lambda x: x.repeat(2, 3) + x.repeat_interleave(3, 1).tile(2, 1),
    "chunk": lambda x: x.chunk(2, 1)[1] + x.split(2, 1)[0] + torch.split(x, [1, 2, 1], 1)[1],
    "unbind": lambda x: x.unbind(1)[2] + next(iter(x.T)),
    "iterate": lambda x: sum(x) * len(x),
    "getitem": lambda x: x[1] + x[..., 0, :] + x[torch.tensor([True, False, True])].sum(0) + x[[0, 2], 1:2],
    "select": lambda x: x.select(0, 1) + x.narrow(0, 1, 1)[0] + x.diagonal().sum(),
    "cat": lambda x: torch.cat([x, CONSTANT, 2 * x], 1) + torch.hstack([x, x, x]),
    "stack": lambda x: torch.stack([x, CONSTANT]) + torch.stack((x[0], x[1]), 1).T[:, None],
    "sum": lambda x: x.sum() + x.sum(0) + torch.sum(x, 1, keepdim=True) + torch.sum(input=x, dim=(0, 1)),
    "mean": lambda x: x.mean() + x.mean((0,), True) + x.mean(-1, keepdim=True),
    "cumsum": lambda x: x.cumsum(1),
    "pad": lambda x: F.pad(x, (1, 2), value=3.0) + F.pad(x, (1, 2, 0, 0)),
    "pad by reflection": lambda x: F.pad(x, (1, 2), mode="reflect") + F.pad(x[None], (1, 2), mode="circular")[0],
    "roll": lambda x: x.roll(1, 0) + x.flip(1) + torch.rot90(x, 2),
    "tril": lambda x: x.tril() + x.triu(1),
    "where": lambda x: torch.where(MASK, x, 2 * x) + torch.where(MASK, x, 1.0) + torch.where(MASK, CONSTANT, x),
    "masked_fill": lambda x: x.masked_fill(MASK, 3.0) + CONSTANT.masked_fill(MASK, x.sum()),
    "neg": lambda x: -x + x.neg() + +x,
    "copies": lambda x: x.contiguous() + x.clone() + x.to(DTYPE) + x.to("cpu") + x.type_as(x) + x.float().double() * 0,
    "gather": lambda x: x.gather(0, INDEX) + torch.gather(x, 1, INDEX),
    "index_select": lambda x: x.index_select(1, torch.tensor([0, 2])) + torch.take_along_dim(x, INDEX[:, :2], 1),
    "index_add": lambda x: x.index_add(0, torch.tensor([1, 1]), CONSTANT[:2]) + CONSTANT.scatter_add(0, INDEX, x),
    "masked_select": lambda x: x[MASK] + x.masked_select(MASK),
    "other names": lambda x: x.ravel().reshape_as(x) + x.swapaxes(0, 1).moveaxis(0, 1) + x.fliplr().flipud().negative(),
    "rounding": lambda x: x.round() * x + x.floor() + x.ceil() * x + x.trunc() + x.clip(-0.3) * x.clamp_max(0.4),
    "stacks": lambda x: torch.vstack([x, CONSTANT])[:3] + torch.dstack([x, CONSTANT]).sum(2) + torch.kron(x, x)[:3, :4],
    "splits": lambda x: x.tensor_split(2)[1].sum() + x.split_with_sizes([1, 3], 1)[0] + torch.take(x, INDEX),
    "pool in three axes": lambda x: F.avg_pool3d(x[None, None], (1, 2, 2)) + F.adaptive_avg_pool3d(x[None, None], 1),
    "maxima in three axes": lambda x: F.adaptive_max_pool3d(x[None, None], (1, 2, 2)).sum() * x,
    "pads": lambda x: F.pad(x[None], (1, 1, 1, 1), mode="replicate") + F.pad(x[None], (1, 1, 1, 1), mode="reflect"),
    "interpolate to the nearest": lambda x: (
        F.interpolate(x[None], 8, mode="nearest-exact")[0]
        + F.interpolate(x[None], 8)[0]
        + F.interpolate(x[None, None], (3, 8), mode="bilinear", antialias=True)[0, 0]
    ),
    "grid_sample": lambda x: F.grid_sample(x[None, None], GRID, align_corners=False),
    "channel_shuffle": lambda x: F.channel_shuffle(x.T.reshape(1, 4, 3, 1), 2),
    "diff": lambda x: x.diff() + torch.diff(x.T.reshape(3, 4), dim=1),
    "diag": lambda x: torch.diag(x[0]) + torch.diag_embed(x[1]) + x[:3, :3].trace(),
    "pool": lambda x: F.avg_pool1d(x[None], 2)[0] + F.adaptive_avg_pool1d(x[None], 2)[0],
    "pool in two axes": lambda x: F.avg_pool2d(x[None], 2, 1) + F.adaptive_avg_pool2d(x[None], (2, 3)),
    "interpolate": lambda x: F.interpolate(x[None], scale_factor=2, mode="linear")[0],
    "interpolate in two axes": lambda x: (
        F.interpolate(x[None, None], 8, mode="bilinear")
        + F.interpolate(x[None, None], 8)
        + F.interpolate(x[None, None], (8, 8), mode="area")
        + F.interpolate(x[None, None], (8, 8), mode="bicubic")
    ),
    "pixel_shuffle": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x.T[:, None, :], 2), 2),
    "unfold": lambda x: F.unfold(x[None, None], 2)[0] @ x.unfold(1, 2, 1).reshape(9, 2)[:6],
    "fold": lambda x: F.fold(x.reshape(1, 4, 3), (2, 4), 2),
    "embedding": lambda x: F.embedding(INDEX, x),
    "constants": lambda x: x + 1 + CONSTANT + (2 - x) + (CONSTANT - x) * 3 + 2 * x / 4 + x.add(CONSTANT, alpha=2),
    "numbers": lambda x: torch.rsub(x, 3) + x.sub(CONSTANT, alpha=3) + torch.add(CONSTANT, x, alpha=-2) + CONSTANT * x,
    "float32 constant": lambda x: x * torch.tensor(2.0) + torch.ones(3, 4),
    "matmul": lambda x: (x @ CONSTANT.T) @ (CONSTANT @ x.T) + torch.mm(x, x.T) + x.mv(CONSTANT[0])[:, None],
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x) + torch.einsum("ij,kj,lj->ik", x, CONSTANT, x),
    "dot": lambda x: x[0].dot(x[1]) + torch.outer(x[0], x[1]) + torch.inner(x, x)[0, 1] + torch.tensordot(x, x, 2),
    "exp": lambda x: x.exp() + torch.expm1(x) + torch.exp2(x),
    "sin": lambda x: x.sin() * x.cos() + x.sinh() + x.cosh() + (0.3 * x).tan(),
    "atan": lambda x: x.atan() + x.asinh() + torch.erf(x) - torch.erfc(x) ** 2,
    "tanh": torch.tanh,
    "sigmoid": lambda x: x.sigmoid() + F.sigmoid(x),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": functools.partial(F.gelu, approximate="tanh"),
    "softplus": lambda x: F.softplus(x) + F.softplus(x, 2.0, 1.5),
    "mish": F.mish,
    "logsigmoid": F.logsigmoid,
    "softmax": lambda x: x.softmax(1) + torch.softmax(x, 0) + F.softmin(x, -1),
    "log_softmax": lambda x: x.log_softmax(1) + F.log_softmax(x, 0),
    "logsumexp": lambda x: x.logsumexp(1, keepdim=True) + torch.logsumexp(x, (0, 1)) + x.logsumexp(0),
    "square": lambda x: x.square() + x**2 + x**3 + x**1 + x**0,
    "rpow": lambda x: 2**x + CONSTANT**x,
    "glu": lambda x: F.glu(x) + F.glu(x.T, 0).T[:, :2].repeat(1, 1),
    "layer_norm": lambda x: F.rms_norm(x, (4,)) + F.group_norm(x, 2),
    "variance": lambda x: (
        x.var() + x.var(1, keepdim=True) + x.std(0, False) + torch.var_mean(x, 1, correction=0)[0][:, None]
    ),
    "norm": lambda x: x.norm() + x.norm(dim=1, keepdim=True) + torch.linalg.vector_norm(x, 3, 0) + x.norm(1, 0),
    "normalize": lambda x: F.normalize(x) + F.cosine_similarity(x, CONSTANT)[:, None],
    "prod": lambda x: x.prod(1, keepdim=True) * x.prod() + x.prod(0),
    "addmm": lambda x: (
        torch.addmm(x[:, :3], x, CONSTANT.T, beta=0.5, alpha=2) + torch.baddbmm(x[None, :, :3], x[None], x.mT[None])[0]
    ),
    "addcmul": lambda x: torch.addcmul(x, x, CONSTANT, value=2).addcdiv(x, CONSTANT).lerp(CONSTANT, 0.3),
    "dropout": lambda x: F.dropout(x, 0.5, training=False) + F.dropout(x, 0.0) + F.alpha_dropout(x, 0.1),
    "relu": lambda x: F.relu(x) + x.relu() + torch.relu(x) * x,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2) ** 2 + F.rrelu(x) + F.relu6(3 * x) + F.hardtanh(x, -0.5, 2) * x,
    "hardswish": lambda x: F.hardswish(2 * x) * F.hardtanh(x) + F.softshrink(x) + F.hardshrink(x) * x,
    "elu": lambda x: F.elu(x, 1.3) + F.selu(x) + F.celu(x, 0.5),
    "softsign": lambda x: F.softsign(x) + F.tanhshrink(x) + F.threshold(x, 0.2, 3.0) * x,
    "abs": lambda x: x.abs() * x + abs(x) + x.sign() * x,
    "clamp": lambda x: x.clamp(-0.5, 0.6) ** 2 + x.clamp_min(0.1) + x.clamp(max=CONSTANT) * x,
    "maximum": lambda x: torch.maximum(x, CONSTANT) * x + torch.minimum(x, x.T.reshape(3, 4)) + x.max(x**2),
    "max": lambda x: x.max() * x.max(1)[0] + x.max(1, True).values.sum() + x.min(dim=1)[0] + x.amax((0, 1)) * x.amin(1),
    "sort": lambda x: x.sort(1)[0][:, :2] * x.topk(2, 1)[0],
    "max_pool": lambda x: F.max_pool1d(x[None], 2)[0] * F.adaptive_max_pool1d(x[None], 2)[0],
    "max_pool in two axes": lambda x: F.max_pool2d(x[None], 2, 1) * F.max_pool2d(x[None, None], 2, 1)[0],
    "max_pool with indices": lambda x: F.max_pool2d(x[None], 2, 1, return_indices=True)[0],
    "adaptive max_pool": lambda x: F.adaptive_max_pool2d(x[None], 2) + F.max_pool3d(x[None, None], (1, 2, 2), 1).sum(),
    "in place": lambda x: F.relu((x * 2).add_(CONSTANT).mul_(x), inplace=True) * x,
    "in place operators": lambda x: augmented(x),
    "detach": lambda x: x.detach() * x + x.data,
    "comparison": lambda x: (
        x * (3 * x).int() + x * x.long() + torch.where(x > 0, x.exp(), x.sin()) + (x.detach() < 0.3) * x
    ),
    "new tensors": lambda x: x * x.new_ones(4) + torch.zeros_like(x) + x.new_full((1,), 2.0),
    "metadata": lambda x: x * (x.shape[0] + x.size(1) + x.dim() + x.ndim + x.numel() + x.stride(0) + len(x)),
}
POSITIVE = {
    "log": lambda x: x.log() + torch.log1p(x) + x.log2() + x.log10(),
    "sqrt": lambda x: x.sqrt() + x.rsqrt() + x.reciprocal() + 1 / x + x**0.7 + x**-2,
    "pow": lambda x: x**x + x ** torch.tensor(1.5, dtype=DTYPE) + CONSTANT / x + x / (x + x.T.reshape(3, 4)),
    "asin": lambda x: (x / 2).asin() + (x / 2).acos() + (x / 2).atanh() + (1 + x).acosh(),
}
SEVERAL = {
    "add": (lambda a, b: a + b - 2 * b + a.sub(b, alpha=2), [full(3, 4), full(4)]),
    "mul": (lambda a, b: a * b + b * a.T.reshape(3, 4), [full(3, 4), straight(3, 1)]),
    "div": (lambda a, b: (a / (b * b + 1)) / 3, [full(3, 4), full(3, 4)]),
    "matmul": (torch.matmul, [full(2, 3, 4), full(4, 5)]),
    "vectors": (lambda a, b: a @ b, [full(4), full(2, 4, 3)]),
    "bmm": (torch.bmm, [full(2, 3, 4), straight(2, 4, 5)]),
    "linear": (F.linear, [full(2, 3, 4), straight(5, 4), straight(5)]),
    "linear, constant input": (lambda w, b: F.linear(CONSTANT, w, b), [straight(5, 4), straight(5)]),
    "linear, constant weight": (lambda x, b: F.linear(x, CONSTANT, b), [full(5, 4), straight(3)]),
    "linear, only the bias moves": (lambda b: F.linear(CONSTANT, CONSTANT, b), [straight(3)]),
    "conv1d": (functools.partial(F.conv1d, stride=2, padding=1), [full(2, 4, 9), straight(6, 4, 3), straight(6)]),
    "conv2d": (
        functools.partial(F.conv2d, padding=2, dilation=2, groups=2),
        [full(2, 4, 5, 6), straight(6, 2, 3, 2), straight(6)],
    ),
    "conv2d, only the bias moves": (
        lambda b: F.conv2d(CONSTANT[None, None], CONSTANT[None, None, :2, :2], b),
        [straight(1)],
    ),
    "conv3d": (F.conv3d, [full(1, 2, 3, 4, 3), straight(2, 2, 2, 2, 2)]),
    "conv_transpose1d": (F.conv_transpose1d, [full(2, 4, 5), straight(4, 3, 3), straight(3)]),
    "conv_transpose3d": (F.conv_transpose3d, [full(1, 2, 3, 2, 2), straight(2, 2, 2, 2, 1), straight(2)]),
    "conv_transpose2d": (
        functools.partial(F.conv_transpose2d, stride=2, padding=1),
        [full(2, 4, 3, 4), straight(4, 3, 2, 3), straight(3)],
    ),
    "bilinear": (F.bilinear, [full(3, 2), full(3, 4), straight(5, 2, 4), straight(5)]),
    "einsum": (lambda a, b, c: torch.einsum("ij,jk,ik->i", a, b, c), [full(3, 4), full(4, 2), full(3, 2)]),
    "prelu": (F.prelu, [full(3, 4, 2), straight(4)]),
    "prelu of one slope": (F.prelu, [full(3, 4), straight(1)]),
    "pow": (lambda a, b: a**b, [between(0.5, 2, 3, 4), full(3, 4)]),
    "maximum": (lambda a, b: torch.maximum(a, b) * torch.fmin(a, b), [full(3, 4), full(3, 4)]),
    "clamp": (lambda a, b: a.clamp(min=b), [full(3, 4), full(4)]),
    "lerp": (torch.lerp, [full(3, 4), full(3, 4), full(3, 4)]),
    "cat": (lambda a, b: torch.cat([a, b]), [full(3, 4), straight(2, 4)]),
    "index_add": (lambda a, b: a.index_add(0, torch.tensor([2, 1]), b), [full(3, 4), straight(2, 4)]),
    "attention": (F.scaled_dot_product_attention, [full(2, 3, 4), full(2, 5, 4), full(2, 5, 4)]),
    "causal attention": (
        functools.partial(F.scaled_dot_product_attention, is_causal=True),
        [full(2, 3, 4), full(2, 3, 4), full(2, 3, 4)],
    ),
}


def augmented(x):
    y = x * 1.0
    y += x
    y *= x
    y -= 1
    y /= 3
    return y


@pytest.mark.parametrize("name", UNARY)
def test_operations(name):
    torch.manual_seed(0)
    check(UNARY[name], [full(3, 4)])
    check(UNARY[name], [(normal(3, 4), None, normal(3, 4), None)], orders=(3,))


def test_embedding_bags_and_hard_sigmoid():
    """Of these torch has no second derivative to compare with."""
    torch.manual_seed(0)
    x = jet(full(3, 4))
    bag = F.embedding_bag(INDEX, x, mode="mean")
    assert_series(bag, [F.embedding(INDEX, part).mean(1) for part in x.coefficients])
    with pytest.raises(NoJetRuleError, match="sums and means"):
        F.embedding_bag(INDEX, x, mode="max")
    assert_series(F.hardsigmoid(x), (x / 6 + 0.5).clamp(0, 1).coefficients)


@pytest.mark.parametrize("name", POSITIVE)
def test_operations_on_positive_numbers(name):
    torch.manual_seed(0)
    check(POSITIVE[name], [between(0.5, 1.5, 3, 4)])


@pytest.mark.parametrize("name", SEVERAL)
def test_operations_of_several(name):
    torch.manual_seed(0)
    function, series = SEVERAL[name]
    check(function, series)


class PlainLayerNorm(nn.LayerNorm):
    """By its definition: torch's own third derivative is wrong."""

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


class PlainInstanceNorm(nn.InstanceNorm1d):
    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        value = centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return value * self.weight[:, None] + self.bias[:, None]


class PlainAttention(nn.Module):
    """One layer of the transformer encoder, written plainly on the parameters of torch's own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        for name in ("norm1", "norm2"):
            getattr(layer, name).__class__ = PlainLayerNorm

    def forward(self, x):
        if self.layer.norm_first:
            x = x + self.attention(self.layer.norm1(x))
            return x + self.feedforward(self.layer.norm2(x))
        x = self.layer.norm1(x + self.attention(x))
        return self.layer.norm2(x + self.feedforward(x))

    def feedforward(self, x):
        return self.layer.linear2(self.layer.activation(self.layer.linear1(x)))

    def attention(self, x):
        module, heads = self.layer.self_attn, self.layer.self_attn.num_heads
        q, k, v = (x @ module.in_proj_weight.T + module.in_proj_bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        return module.out_proj((weights @ v).transpose(1, 2).flatten(2))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.RMSNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        x += 0.5 * self.second(F.gelu(self.first(self.norm(x * 1))))
        return {"logits": x, "others": (x.sum(-1), None)}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.second(torch.tanh(self.first(x))).sin())


class Inputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.left(x) * torch.tanh(self.right(x)), [self.left(x).sum()]


class Attending(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x.flip(0) * 2, x)


class PlainWeightNorm(nn.Module):
    """By its definition: torch's own second derivative is wrong."""

    def __init__(self, *names):
        super().__init__()
        self.given = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
        if names:
            self.given = old_weight_norm(nn.Linear(4, 3))
        self.names = names or ("parametrizations.weight.original0", "parametrizations.weight.original1")

    def forward(self, x):
        g, v = (functools.reduce(getattr, name.split("."), self.given) for name in self.names)
        return x @ (g * v / (v * v).sum(1, keepdim=True).sqrt()).T + self.given.bias


class Last(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)


def encoder(**options):
    return nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, **options)


def plain_encoder(**options):
    return PlainAttention(encoder(**options))


MODULES = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), None),
    "mlp with in-place relu": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)), None),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 4, 3, padding="same", padding_mode="circular"),
            nn.BatchNorm1d(4),
            nn.SiLU(),
            nn.MaxPool1d(2),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(8, 2),
        ),
        None,
    ),
    "group norm": (lambda: nn.Sequential(nn.Conv1d(3, 4, 1), nn.GroupNorm(2, 4), nn.Tanh()), None),
    "layer norm": (lambda: nn.LayerNorm(4), lambda: PlainLayerNorm(4)),
    "rms norm": (lambda: nn.RMSNorm(4), None),
    "instance norm": (lambda: nn.InstanceNorm1d(3, affine=True), lambda: PlainInstanceNorm(3, affine=True)),
    "transposed conv": (lambda: nn.ConvTranspose1d(3, 2, 3, 2), None),
    "glu": (lambda: nn.Sequential(nn.Linear(4, 6), nn.GLU()), None),
    "prelu": (lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.PReLU(3)), None),
    "attention": (lambda: Attending(4, 2, batch_first=True), None),
    "attention, batch second": (lambda: Attending(4, 2, bias=False, add_zero_attn=True), None),
    "encoder": (lambda: encoder(activation="gelu"), lambda: plain_encoder(activation="gelu")),
    "encoder, pre": (
        lambda: encoder(activation="gelu", norm_first=True),
        lambda: plain_encoder(activation="gelu", norm_first=True),
    ),
    "residual": (Residual, None),
    "tied and frozen": (Tied, None),
    "tuples": (Inputs, None),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), PlainWeightNorm),
    "old weight norm": (lambda: old_weight_norm(nn.Linear(4, 3)), lambda: PlainWeightNorm("weight_g", "weight_v")),
    "lstm": (lambda: Last(nn.LSTM(4, 3, 2, bidirectional=True, batch_first=True)), None),
    "gru": (lambda: Last(nn.GRU(4, 3, batch_first=True)), None),
    "rnn": (lambda: Last(nn.RNN(4, 3, 2)), None),
    "lstm cell": (lambda: Last(CellOf(nn.LSTMCell(4, 3))), None),
    "gru cell": (lambda: Last(CellOf(nn.GRUCell(4, 3))), None),
}


class CellOf(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        return self.cell(x[:, 0])


def old_weight_norm(module):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(module)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("moving_input", [False, True])
def test_modules(name, moving_input):
    torch.manual_seed(0)
    build, plain = MODULES[name]
    model = build().double().eval()
    torch.manual_seed(0)
    reference = (plain or build)().double().eval()
    prefix = {PlainAttention: "layer.", PlainWeightNorm: "given."}.get(type(reference), "")
    params = {key: value.detach() for key, value in model.named_parameters() if value.requires_grad}
    tangents = {key: normal(*value.shape) for key, value in params.items()}
    x = full(2, 3, 4) if moving_input else (normal(2, 3, 4),)

    def reference_at(s):
        moved = {prefix + key: value + s * tangents[key] for key, value in params.items()}
        return tree_flat(functional_call(reference, moved, (line(x, s) * 1,)))

    for order in (1, 2, 3):
        jets = {key: lift(value, tangents[key], order) for key, value in params.items()}
        given = jet(x[: order + 1]) * 1 if moving_input else x[0].clone()
        if name == "residual" and not moving_input:
            with pytest.raises(NoJetRuleError, match="plain tensor"):
                functional_call(model, jets, (given,))
            return
        found = tree_flat(functional_call(model, jets, (given,)))
        for index, output in enumerate(found):
            assert_series(output, series_by_reverse_mode(lambda s: reference_at(s)[index], order), name)


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
    """Of a bias alone the coefficient is expanded; of a transposed summand it is transposed."""
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
