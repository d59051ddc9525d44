"""Taylor series through every operation against repeated reverse mode along the line."""

import functools

import pytest
import torch
from torch.nn import functional as F

from tests.measure.jets.series import (
    CONSTANT,
    DTYPE,
    GRID,
    INDEX,
    MASK,
    assert_series,
    between,
    check,
    full,
    normal,
    straight,
)
from torch_eft.measure.jets.jet import NoJetRuleError, jet

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
    """torch has no second derivative of these to compare with."""
    torch.manual_seed(0)
    x = jet(full(3, 4))
    bag = F.embedding_bag(INDEX, x, mode="mean")
    assert_series(bag, [F.embedding(INDEX, part).mean(1) for part in x.coefficients])
    with pytest.raises(NoJetRuleError, match="sums and means"):
        F.embedding_bag(INDEX, x, mode="max")
    assert_series(F.hardsigmoid(x), (x / 6 + 0.5).clamp(0, 1).coefficients)


def test_samples_on_a_grid():
    """Against the matrix of this linear map, as not every version of torch has a second derivative of it."""
    torch.manual_seed(0)
    sample = lambda x: F.grid_sample(x[None, None], GRID, align_corners=False)  # noqa: E731
    matrix = torch.autograd.functional.jacobian(sample, CONSTANT)
    check(sample, [full(3, 4)], lambda x: torch.tensordot(matrix, x, 2))


@pytest.mark.parametrize("name", POSITIVE)
def test_operations_on_positive_numbers(name):
    torch.manual_seed(0)
    check(POSITIVE[name], [between(0.5, 1.5, 3, 4)])


@pytest.mark.parametrize("name", SEVERAL)
def test_operations_of_several(name):
    torch.manual_seed(0)
    function, series = SEVERAL[name]
    check(function, series)
