"""Functions without parameters: activations, normalizations, poolings, and what forwards do between layers."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.fuzz.kinds import Op, block, side

ACTIVATIONS = [
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign, nn.Tanh),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.ReLU6, nn.RReLU, nn.Tanhshrink),
    *(nn.Softshrink, nn.Hardshrink, nn.Dropout, nn.AlphaDropout, nn.Identity, nn.PReLU),
]
for activation in ACTIVATIONS:
    # torch's own derivative of hardsigmoid has a sixth in float32.
    eps = 2.0**-24 if activation is nn.Hardsigmoid else 2.0**-52
    block(activation.__name__, "*", lambda r, s, activation=activation: activation(), eps=eps)
block("GELU by tanh", "*", lambda r, s: nn.GELU(approximate="tanh"))
block("Threshold", "*", lambda r, s: nn.Threshold(0.1, -0.2))
block("PReLU per channel", "fciv", lambda r, s: nn.PReLU(s[0]))

ELEMENTWISE = {
    "sine": torch.sin,
    "square": lambda x: 0.3 * x**2 + x,
    "cube": lambda x: x - x**3 / 8,
    "exponential": lambda x: torch.exp(-(x**2)),
    "rational": lambda x: x / (1 + x * x),
    "erf": torch.erf,
    "arctangent": torch.atan,
    "logarithm": lambda x: torch.log1p(x * x),
    "root": lambda x: torch.sqrt(1 + x * x),
    "arsinh": torch.asinh,
    "clamp": lambda x: x.clamp(-0.5, 0.8),
    "absolute value": torch.abs,
    "where": lambda x: torch.where(x > 0, x.sin(), 0.3 * x),
    "masked fill": lambda x: x.tanh().masked_fill(x < -0.3, 0.1),
    "maximum": lambda x: torch.maximum(x, 0.1 * x + 0.2),
    "power": lambda x: (x * x + 0.5).pow(1.3),
    "lerp": lambda x: torch.lerp(x, x.sin(), 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x.cos(), value=0.3),
    "complex": lambda x: (torch.complex(x, x.cos()) * torch.complex(x.sin(), x)).real,
    "polar": lambda x: torch.view_as_real(torch.polar(1 + x * x, x)).sum(-1),
    "in-place relu": lambda x: F.relu_(x * 1.0),
    "in-place arithmetic": lambda x: x.mul(1.5).add_(0.1).tanh_(),
    "augmented assignment": lambda x: _augmented(x),
    "float and back": lambda x: x.double().tanh().to(x.dtype),
    "nan to num": lambda x: torch.nan_to_num(x).tanh(),
    "logit": lambda x: torch.logit(torch.sigmoid(x), eps=1e-6),
    "special": lambda x: torch.special.expit(x) + torch.special.entr(torch.sigmoid(x)),
    "data-dependent mask": lambda x: x.tanh() * (x.detach() > 0),
    "mask by NumPy": lambda x: x * torch.as_tensor((x.detach().numpy() > -0.2) * 1.0),
    "one sample after another": lambda x: torch.stack([row.tanh() * 1.2 for row in x]),
    "chunks of the batch": lambda x: torch.cat([part.sin() for part in x.split(2)]),
    "route by sample": lambda x: torch.stack([row.sin() if bool(side(row.flatten())) else 0.5 * row**2 for row in x]),
    "route by indices": lambda x: _route(x),
    "flipped and flipped back": lambda x: (x.flip(0).tanh() + 0.1).flip(0),
    "sorted and restored": lambda x: _sorted(x),
    "loop until small": lambda x: _loop(x),
    "vmap inside": lambda x: torch.vmap(lambda row: row.tanh() * row.cos())(x),
}


def _augmented(x):
    z = x.clone()
    z += x.sin()
    z *= 0.7
    return z


def _route(x):
    positive = side(x.flatten(1))
    z = torch.zeros_like(x)
    z[positive] = x[positive].tanh()
    z[~positive] = 0.5 * x[~positive]
    return z


def _sorted(x):
    order = x.detach().flatten(1).sum(1).argsort(descending=True)
    return torch.tanh(x[order])[order.argsort()]


def _loop(x):
    rows = []
    for row in x:
        while float(row.detach().abs().max()) > 0.7:
            row = row.sin() * 0.8
        rows.append(row)
    return torch.stack(rows)


for name, function in ELEMENTWISE.items():
    block(name, "*", lambda r, s, function=function: Op(function))

FEATURES = {  # of (N, d) or (N, T, d), along the last axis
    "softmax": lambda x: x.softmax(-1),
    "log-softmax": lambda x: F.log_softmax(x, -1),
    "softmin": lambda x: F.softmin(2 * x, -1),
    "logsumexp": lambda x: torch.cat([x, x.logsumexp(-1, keepdim=True)], -1),
    "cumulative sum": lambda x: x.cumsum(-1),
    "cumulative logsumexp": lambda x: torch.logcumsumexp(x, -1),
    "cumulative product": lambda x: (1 + 0.3 * x).cumprod(-1),
    "product": lambda x: torch.cat([x, (1 + 0.3 * x).prod(-1, keepdim=True)], -1),
    "sorted features": lambda x: x.sort(-1).values,
    "top features": lambda x: x.topk(2, -1).values,
    "largest feature": lambda x: torch.cat([x, x.amax(-1, keepdim=True)], -1),
    "median": lambda x: x - x.median(-1, keepdim=True).values,
    "unit length": lambda x: F.normalize(x + 0.2, dim=-1),
    "variance": lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 0.3).sqrt(),
    "standard deviation": lambda x: x * x.std(-1, keepdim=True),
    "norm": lambda x: x * (1 + (x + 0.3).norm(dim=-1, keepdim=True)),
    "roll": lambda x: x + x.roll(1, -1).sin(),
    "flip": lambda x: x.flip(-1).tanh(),
    "pad": lambda x: F.pad(x, (1, 0), value=0.5),
    "gather": lambda x: x.gather(-1, torch.zeros_like(x, dtype=torch.long)) * x,
    "index select": lambda x: x[..., [1, 0, 1]].sin(),
    "scatter": lambda x: torch.zeros_like(x).scatter_add(-1, torch.arange(x.shape[-1]).flip(0).expand(x.shape), x),
    "outer product": lambda x: (x[..., :, None] * x[..., None, :2]).flatten(-2)[..., :4],
    "Gram matrix": lambda x: torch.einsum("...i,...j->...ij", x, x.sin()).triu().sum(-1),
    "cosine similarity": lambda x: x * F.cosine_similarity(x, x.roll(1, -1) + 0.3, dim=-1)[..., None],
    "Fourier transform": lambda x: torch.fft.rfft(x, dim=-1).abs().square(),
    "inverse Fourier transform": lambda x: torch.fft.irfft(torch.fft.rfft(x) * 1.5, n=x.shape[-1]),
    "glu": lambda x: F.glu(torch.cat([x, x.sin()], -1), -1),
    "maxout": lambda x: torch.stack([x, 0.5 * x.roll(1, -1)], -1).max(-1).values,
    "written into": lambda x: _written(x),
    "preallocated": lambda x: _preallocated(x),
    "unbind and stack": lambda x: torch.stack([part.sin() for part in x.unbind(-1)], -1),
    "interpolate features": lambda x: torch.lerp(x[..., :1], x[..., 1:], 0.3),
    "squash": lambda x: x * x.square().sum(-1, keepdim=True) / (1 + x.square().sum(-1, keepdim=True)),
    "differences": lambda x: torch.cat([x, x.diff(dim=-1)], -1)[..., :4],
    "einsum by hand": lambda x: torch.einsum("...i,i->...i", x, torch.linspace(0.5, 1.5, x.shape[-1]).double()),
}


def _written(x):
    z = x.clone()
    z[..., 0] = x[..., -1].sin()
    return z


def _preallocated(x):
    z = x.new_zeros(*x.shape[:-1], 3)
    for k in range(3):
        z[..., k] = x[..., k % x.shape[-1]] * (k + 1) / 2
    return z


for name, function in FEATURES.items():
    # torch's second derivative of logcumsumexp is NaN.
    notes = ["once"] if name == "cumulative logsumexp" else []
    block(name, "fs", lambda r, s, function=function: Op(function), notes=notes)

block("gelu gate", "s", lambda r, s: Op(lambda x: x * F.gelu(x.mean(1, keepdim=True))))
block("causal mean", "s", lambda r, s: Op(lambda x: x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None].double()))
block("tokens in place", "s", lambda r, s: Op(lambda x: torch.cat([x[:, :1].sin(), x[:, 1:]], 1)))
block("hop of tokens", "s", lambda r, s: Op(lambda x: x.flip(1).tanh()))

block("max pool 1", "c", lambda r, s: nn.MaxPool1d(2, 1))
block("average pool 1", "c", lambda r, s: nn.AvgPool1d(2, 1, padding=1))
block("adaptive pool 1", "c", lambda r, s: nn.AdaptiveAvgPool1d(2))
block("power pool 1", "c", lambda r, s: Op(lambda x: F.lp_pool1d(x + 2, 2.0, 2, 1)))
block("max pool 2", "i", lambda r, s: nn.MaxPool2d(2, 1))
block("max pool with indices", "i", lambda r, s: Op(lambda x: F.max_pool2d(x, 2, 1, return_indices=True)[0]))
block("average pool 2", "i", lambda r, s: nn.AvgPool2d(2, 1, ceil_mode=True, count_include_pad=False))
block("adaptive max pool 2", "i", lambda r, s: nn.AdaptiveMaxPool2d(2))
block("adaptive pool 2", "i", lambda r, s: nn.AdaptiveAvgPool2d((2, None)))
block("average pool 3", "v", lambda r, s: nn.AvgPool3d(2, 1))
block("max pool 3", "v", lambda r, s: nn.MaxPool3d(2, 1))
block("upsampling", "i", lambda r, s: Op(lambda x: F.interpolate(x[..., :2, :2], scale_factor=2)))
block("bilinear upsampling", "i", lambda r, s: Op(lambda x: F.interpolate(x, size=(3, 4), mode="bilinear")))
block("bicubic upsampling", "i", lambda r, s: Op(lambda x: F.interpolate(x, size=(4, 4), mode="bicubic")))
block("linear upsampling", "c", lambda r, s: Op(lambda x: F.interpolate(x, size=5, mode="linear")))
block("reflected", "i", lambda r, s: nn.ReflectionPad2d(1))
block("replicated", "c", lambda r, s: nn.ReplicationPad1d(1))
block("pixel shuffle", "i", lambda r, s: Op(lambda x: F.pixel_shuffle(torch.cat([x[:, :1]] * 4, 1)[..., :2, :2], 2)))
block("pixel unshuffle", "i", lambda r, s: Op(lambda x: F.pixel_unshuffle(x[:, :1, :2, :2], 2)))
block("channel shuffle", "i", lambda r, s: Op(lambda x: F.channel_shuffle(torch.cat([x, x.sin()], 1), 2)[:, :3]))
block("unfold", "i", lambda r, s: Op(lambda x: F.unfold(x, 2)[:, :4]), to="c")
block("local response", "i", lambda r, s: nn.LocalResponseNorm(2))
block("dropout of channels", "i", lambda r, s: nn.Dropout2d(0.3))
block("grid sample", "i", lambda r, s: Op(_sampled))
block("shifted windows", "i", lambda r, s: Op(lambda x: x.roll((1, 1), (2, 3)).sin()))


def _sampled(x):
    grid = F.affine_grid(
        torch.tensor([[[0.8, 0.1, 0.0], [-0.1, 0.9, 0.1]]]).double().expand(len(x), 2, 3), x.shape, align_corners=False
    )
    return F.grid_sample(x, grid.to(x.dtype), align_corners=False)


FOLDS = {  # from one kind to another
    "mean over tokens": ("s", lambda x: x.mean(1), "f"),
    "last token": ("s", lambda x: x[:, -1], "f"),
    "first token": ("s", lambda x: x[:, 0], "f"),
    "largest over tokens": ("s", lambda x: x.amax(1), "f"),
    "flattened tokens": ("s", lambda x: x.flatten(1), "f"),
    "tokens to channels": ("s", lambda x: x.transpose(1, 2), "c"),
    "channels to tokens": ("c", lambda x: x.transpose(1, 2), "s"),
    "mean over places 1": ("c", lambda x: x.mean(2), "f"),
    "flattened places": ("c", lambda x: x.flatten(1), "f"),
    "mean over places 2": ("i", lambda x: x.mean((2, 3)), "f"),
    "largest over places": ("i", lambda x: x.amax((2, 3)), "f"),
    "patches to tokens": ("i", lambda x: x.flatten(2).transpose(1, 2), "s"),
    "rows to channels": ("i", lambda x: x.flatten(2), "c"),
    "mean over places 3": ("v", lambda x: x.mean((2, 3, 4)), "f"),
    "slices": ("v", lambda x: x[:, :, 0], "i"),
    "feature tokens": ("f", lambda x: x[:, :, None] * torch.tensor([1.0, 0.5]).double(), "s"),
    "feature channels": ("f", lambda x: x[:, None, :].tanh(), "c"),
}
for name, (kinds, function, to) in FOLDS.items():
    block(name, kinds, lambda r, s, function=function: Op(function), to=to)
