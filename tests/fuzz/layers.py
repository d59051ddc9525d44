"""Layers and blocks with parameters: torch's own, weights used by hand, parametrized, tied, frozen and mixed."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from tests.fuzz.kinds import Op, block, last_axis, randn, side, width


def conv(make, **options):
    """A convolution from s[0] to a few channels."""

    def build(r, s):
        groups = s[0] if options.get("groups") == "all" else options.get("groups", 1)
        out = s[0] * r.choice([1, 2]) if groups > 1 else width(r)
        if s[0] % groups:
            return nn.Identity()
        return make(s[0], out, **{**options, "groups": groups}, bias=r.random() < 0.7)

    return build


block("linear", "fs", lambda r, s: nn.Linear(s[-1], width(r)))
block("linear without bias", "fs", lambda r, s: nn.Linear(s[-1], width(r), bias=False))
block(
    "linear over channels", "civ", lambda r, s: Op(lambda x, m: m(x.movedim(1, -1)).movedim(-1, 1), nn.Linear(s[0], 3))
)
block("linear over tokens", "s", lambda r, s: Op(lambda x, m: m(x.mT).mT, nn.Linear(s[0], 3)))
block(
    "linear over a flattened batch",
    "s",
    lambda r, s: Op(lambda x, m: m(x.flatten(0, 1)).unflatten(0, x.shape[:2]), nn.Linear(s[1], 3)),
)
block("bilinear", "f", lambda r, s: Op(lambda x, m: m(x, x.tanh()), nn.Bilinear(s[0], s[0], 3)))
block("convolution 1", "c", conv(nn.Conv1d, kernel_size=2))
block("strided and dilated 1", "c", conv(nn.Conv1d, kernel_size=2, stride=2, dilation=2, padding=2))
block("depthwise 1", "c", conv(nn.Conv1d, kernel_size=2, groups="all"))
block("grouped 1", "c", conv(nn.Conv1d, kernel_size=2, groups=2))
block("circular 1", "c", conv(nn.Conv1d, kernel_size=2, padding=1, padding_mode="circular"))
block("causal 1", "c", lambda r, s: Op(lambda x, m: m(F.pad(x, (1, 0))), nn.Conv1d(s[0], 3, 2)))
block("transposed 1", "c", lambda r, s: nn.ConvTranspose1d(s[0], 2, 2, stride=2, output_padding=1), notes=["once"])
block("transposed and grouped 1", "c", lambda r, s: nn.ConvTranspose1d(s[0], 2 * s[0], 2, groups=s[0], bias=False))
block("convolution 2", "i", conv(nn.Conv2d, kernel_size=2))
block("convolution of one place", "i", conv(nn.Conv2d, kernel_size=1))
block("same padding", "i", conv(nn.Conv2d, kernel_size=(3, 2), padding="same"))
block("reflected convolution", "i", conv(nn.Conv2d, kernel_size=2, padding=1, padding_mode="reflect"))
block("depthwise 2", "i", conv(nn.Conv2d, kernel_size=2, padding=1, groups="all"))
block("transposed 2", "i", lambda r, s: nn.ConvTranspose2d(s[0], 2, 2, padding=1, stride=2))
block("convolution 3", "v", conv(nn.Conv3d, kernel_size=2))
block("transposed 3", "v", lambda r, s: nn.ConvTranspose3d(s[0], 2, 2, padding=1))
block(
    "convolution by hand",
    "i",
    lambda r, s: Op(lambda x, w, b: F.conv2d(x, w, b, padding=1), w=randn(2, s[0], 2, 2), b=randn(2)),
)
block("unfolded product", "i", lambda r, s: Op(lambda x, w: F.unfold(x, 2).mT @ w, w=randn(4 * s[0], 3)), to="s")
block(
    "standardized weights",
    "i",
    lambda r, s: Op(
        lambda x, w: F.conv2d(x, (w - w.mean((1, 2, 3), True)) / (w.std((1, 2, 3), keepdim=True) + 0.1)),
        w=randn(2, s[0], 2, 2),
    ),
)
block(
    "separable",
    "i",
    lambda r, s: nn.Sequential(nn.Conv2d(s[0], s[0], 2, groups=s[0]), nn.SiLU(), nn.Conv2d(s[0], 2, 1)),
)
block(
    "residual convolution",
    "i",
    lambda r, s: Op(lambda x, a, b: x + b(F.gelu(a(x))), nn.Conv2d(s[0], 2, 3, padding=1), nn.Conv2d(2, s[0], 1)),
)
block(
    "squeeze and excite",
    "i",
    lambda r, s: Op(lambda x, m: x * m(x.mean((2, 3))).sigmoid()[:, :, None, None], nn.Linear(s[0], s[0])),
)
block("shared convolution", "c", lambda r, s: Op(lambda x, m: m(m(x).tanh()), nn.Conv1d(s[0], s[0], 3, padding=1)))
block("spatial transformer", "i", lambda r, s: Op(_transformed, nn.Linear(s[0], 6)))
block("patch embedding", "i", lambda r, s: Op(lambda x, m: m(x).flatten(2).mT, nn.Conv2d(s[0], 3, 2, stride=2)), to="s")


def _transformed(x, m):
    theta = (0.2 * m(x.mean((2, 3)))).view(-1, 2, 3) + torch.eye(2, 3).to(x)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)


def trained(norm):
    """Running statistics as after some training."""
    if norm.running_mean is not None:
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.5, 2)
    return moved(norm)


def moved(module):
    """Scales and shifts as after some training."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


block("layer norm", "fs", lambda r, s: moved(nn.LayerNorm(s[-1], eps=0.1)))
block("layer norm of all", "sciv", lambda r, s: moved(nn.LayerNorm(s, eps=0.1)))
block("layer norm without scale", "fs", lambda r, s: nn.LayerNorm(s[-1], eps=0.1, elementwise_affine=False))
block("rms norm", "fs", lambda r, s: moved(nn.RMSNorm(s[-1], eps=0.1)))
block("group norm", "fci", lambda r, s: moved(nn.GroupNorm(1, s[0], eps=0.1)))
block("group norm of channels", "ci", lambda r, s: moved(nn.GroupNorm(s[0], s[0], eps=0.1)))
block(
    "instance norm",
    "ci",
    lambda r, s: moved((nn.InstanceNorm1d if len(s) == 2 else nn.InstanceNorm2d)(s[0], eps=0.1, affine=True)),
)
block("batch norm", "fci", lambda r, s: trained((nn.BatchNorm1d if len(s) < 3 else nn.BatchNorm2d)(s[0])))
block("batch norm without scale", "fc", lambda r, s: trained(nn.BatchNorm1d(s[0], affine=False)))
block(
    "channel norm",
    "i",
    lambda r, s: Op(lambda x, m: m(x.movedim(1, -1)).movedim(-1, 1), moved(nn.LayerNorm(s[0], eps=0.1))),
)

block("embedding", "t", lambda r, s: nn.Embedding(6, width(r)), to="s")
block("embedding with padding", "t", lambda r, s: nn.Embedding(6, 3, padding_idx=0), to="s", notes=["cut"])
block("sparse embedding", "t", lambda r, s: nn.Embedding(6, 3, sparse=True), to="s")
block("embedding by hand", "t", lambda r, s: Op(lambda x, w: w[x], w=randn(6, 3)), to="s")
block("one-hot product", "t", lambda r, s: Op(lambda x, w: F.one_hot(x, 6).to(w) @ w, w=randn(6, 3)), to="s")
block(
    "positions", "t", lambda r, s: Op(lambda x, e, p: e(x) + p[: x.shape[1]], nn.Embedding(6, 3), p=randn(8, 3)), to="s"
)
block(
    "embedded positions",
    "t",
    lambda r, s: Op(lambda x, e, p: e(x) + p(torch.arange(x.shape[1])), nn.Embedding(6, 3), nn.Embedding(8, 3)),
    to="s",
)
block("sum of a bag", "t", lambda r, s: nn.EmbeddingBag(6, 3, mode="sum"), to="f", notes=["once"])
block("mean of a bag", "t", lambda r, s: nn.EmbeddingBag(6, 3), to="f", notes=["once"])
block("tied embedding", "t", lambda r, s: Op(lambda x, e: e(x) @ e.weight.T, nn.Embedding(6, 3)), to="s")
block("sum of embeddings", "t", lambda r, s: Op(lambda x, e: e(x).sum(1), nn.Embedding(6, 3)), to="f")


def even(s):
    return 4 if s[-1] == 4 else 2 if s[-1] == 2 else 1


block(
    "self-attention",
    "s",
    lambda r, s: Op(lambda x, m: m(x, x, x)[0], nn.MultiheadAttention(s[1], even(s), batch_first=True)),
)
block(
    "attention without weights",
    "s",
    lambda r, s: Op(
        lambda x, m: m(x, x, x, need_weights=False)[0], nn.MultiheadAttention(s[1], even(s), batch_first=True)
    ),
)
block(
    "time-first attention",
    "s",
    lambda r, s: Op(
        lambda x, m: m(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0].transpose(0, 1),
        nn.MultiheadAttention(s[1], even(s)),
    ),
)
block(
    "causal attention",
    "s",
    lambda r, s: Op(
        lambda x, m: m(x, x, x, attn_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype))[0],
        nn.MultiheadAttention(s[1], 1, batch_first=True),
    ),
)
block(
    "learned queries",
    "s",
    lambda r, s: Op(
        lambda x, m, q: m(q.expand(len(x), -1, -1), x, x)[0],
        nn.MultiheadAttention(s[1], 1, batch_first=True),
        q=randn(1, 2, s[1]),
    ),
)
block(
    "attention with keys of its own",
    "s",
    lambda r, s: Op(
        lambda x, m: m(x, x, x)[0],
        nn.MultiheadAttention(s[1], 1, batch_first=True, add_bias_kv=True, add_zero_attn=True),
    ),
)
block(
    "attention to masked tokens",
    "s",
    lambda r, s: Op(
        lambda x, m: m(x, x, x, key_padding_mask=F.pad(x[:, 1:, 0] > 0.3, (1, 0)))[0],
        nn.MultiheadAttention(s[1], 1, batch_first=True),
    ),
)
block(
    "scaled dot products",
    "s",
    lambda r, s: Op(
        lambda x, m: F.scaled_dot_product_attention(*m(x).unflatten(2, (3, 2)).unbind(2)), nn.Linear(s[1], 6)
    ),
)
block(
    "attention by einsum",
    "s",
    lambda r, s: Op(
        lambda x, q, k: torch.einsum("nij,njd->nid", torch.einsum("nie,ed,njd->nij", x, q, x @ k).softmax(-1), x),
        q=randn(s[1], 3),
        k=randn(s[1], 3),
    ),
)
block(
    "linear attention",
    "s",
    lambda r, s: Op(lambda x, m: (F.elu(m(x)) + 1) @ ((F.elu(x) + 1).mT @ x), nn.Linear(s[1], s[1])),
)
block(
    "relative positions",
    "s",
    lambda r, s: Op(
        lambda x, b: (
            (x @ x.mT + b[(torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs()]).softmax(-1) @ x
        ),
        b=randn(8),
    ),
)
block(
    "encoder layer",
    "s",
    lambda r, s: nn.TransformerEncoderLayer(
        s[1],
        even(s),
        3,
        0.1,
        r.choice(["relu", "gelu"]),
        layer_norm_eps=0.1,
        batch_first=True,
        norm_first=r.random() < 0.5,
    ),
)
block(
    "encoder",
    "s",
    lambda r, s: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(s[1], 1, 3, 0.0, F.silu, 0.1, True), 1, enable_nested_tensor=False
    ),
)
block(
    "decoder layer",
    "s",
    lambda r, s: Op(
        lambda x, m: m(x, x.tanh()), nn.TransformerDecoderLayer(s[1], 1, 3, 0.1, "gelu", 0.1, batch_first=True)
    ),
)
block(
    "pooling by attention",
    "s",
    lambda r, s: Op(lambda x, q: ((x @ q).softmax(1)[..., None] * x).sum(1), q=randn(s[1])),
    to="f",
)
block(
    "mixer",
    "s",
    lambda r, s: Op(
        lambda x, a, b: (lambda z: z + b(z).tanh())(x + a(x.mT).mT.tanh()), nn.Linear(s[0], s[0]), nn.Linear(s[1], s[1])
    ),
)

for cell in (nn.RNN, nn.GRU, nn.LSTM):
    block(
        cell.__name__,
        "s",
        lambda r, s, cell=cell: Op(lambda x, m: m(x)[0], cell(s[1], 3, batch_first=True, bias=r.random() < 0.7)),
    )
    block(
        f"last state of {cell.__name__}",
        "s",
        lambda r, s, cell=cell: Op(lambda x, m: _state(m(x)[1])[-1], cell(s[1], 2, batch_first=True)),
        to="f",
    )
    block(
        f"{cell.__name__} cell",
        "s",
        lambda r, s, cell=cell: Op(_cells, getattr(nn, f"{cell.__name__}Cell")(s[1], 3)),
        to="f",
    )
block(
    "recurrent both ways",
    "s",
    lambda r, s: Op(lambda x, m: m(x)[0], nn.GRU(s[1], 2, 2, bidirectional=True, batch_first=True)),
)
block("time-first recurrent", "s", lambda r, s: Op(lambda x, m: m(x.transpose(0, 1))[0][-1], nn.LSTM(s[1], 2)), to="f")
block("projected LSTM", "s", lambda r, s: Op(lambda x, m: m(x)[0], nn.LSTM(s[1], 3, proj_size=2, batch_first=True)))
block(
    "initial state",
    "s",
    lambda r, s: Op(
        lambda x, m, h: m(x, h.expand(1, len(x), 3).contiguous())[0],
        nn.GRU(s[1], 3, batch_first=True),
        h=randn(1, 1, 3),
    ),
)
block("scan", "s", lambda r, s: Op(_scan, a=randn(s[1]), b=randn(s[1], s[1])))


def _state(h):
    return h[0] if isinstance(h, tuple) else h


def _cells(x, cell):
    h = None
    for t in range(x.shape[1]):
        h = cell(x[:, t], h)
    return _state(h)


def _scan(x, a, b):
    h, states = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.sigmoid(a) * h + x[:, t] @ b
        states.append(h)
    return torch.stack(states, 1)


WEIGHTS = {  # a product with a weight that is an expression of parameters, for the width d of the last axis
    "product with a weight": lambda d: (lambda x, w: x @ w, dict(w=randn(d, 3))),
    "transposed product": lambda d: (lambda x, w: x @ w.T, dict(w=randn(3, d))),
    "functional linear": lambda d: (lambda x, w, b: F.linear(x, w, b), dict(w=randn(3, d), b=randn(3))),
    "einsum": lambda d: (lambda x, w: torch.einsum("...i,io->...o", x, w), dict(w=randn(d, 3))),
    "product from the left": lambda d: (lambda x, w: (w @ x[..., None]).squeeze(-1), dict(w=randn(3, d))),
    "used twice": lambda d: (lambda x, w: torch.tanh(x @ w) @ w.T, dict(w=randn(d, 3))),
    "used twice, square": lambda d: (lambda x, w: torch.tanh(x @ w) @ w, dict(w=randn(d, d))),
    "used straight and transposed": lambda d: (lambda x, w: x @ w + F.linear(x.sin(), w), dict(w=randn(d, d))),
    "low rank": lambda d: (lambda x, a, b: x @ a @ b + x[..., :1], dict(a=randn(d, 1), b=randn(1, 3))),
    "adapter": lambda d: (
        lambda x, w, a, b: F.linear(x, w + 0.5 * b @ a),
        dict(w=frozen(randn(3, d)), a=randn(1, d), b=torch.zeros(3, 1).double()),
    ),
    "positive weights": lambda d: (lambda x, w: F.linear(x, F.softplus(w)), dict(w=randn(3, d))),
    "normalized weights": lambda d: (
        lambda x, w, g: F.linear(x, F.normalize(w, dim=1) * g),
        dict(w=randn(3, d), g=randn(3, 1) + 1),
    ),
    "symmetric weights": lambda d: (lambda x, w: x @ (w + w.T), dict(w=randn(d, d))),
    "masked weights": lambda d: (lambda x, w: x @ w.tril(), dict(w=randn(d, d))),
    "circulant weights": lambda d: (lambda x, w: x @ torch.stack([w.roll(k) for k in range(d)]), dict(w=randn(d))),
    "matrix exponential": lambda d: (lambda x, w: x @ torch.matrix_exp(w - w.T), dict(w=randn(d, d))),
    "Cayley transform": lambda d: (
        lambda x, w: x @ torch.linalg.solve(torch.eye(d).double() + w - w.T, torch.eye(d).double() - w + w.T),
        dict(w=0.5 * randn(d, d)),
    ),
    "solved": lambda d: (
        lambda x, w: torch.linalg.solve(2 * torch.eye(d).double() + 0.3 * w, x[..., None]).squeeze(-1),
        dict(w=randn(d, d)),
    ),
    "reflection": lambda d: (lambda x, v: x - 2 * (x @ v)[..., None] * v / (v @ v + 0.5), dict(v=randn(d))),
    "weights of the sample": lambda d: (
        lambda x, w: torch.einsum("...i,...io->...o", x, torch.einsum("...j,jio->...io", x, w)),
        dict(w=randn(d, d, 2)),
    ),
    "prototypes": lambda d: (lambda x, c: torch.exp(-(x[..., None, :] - c).square().sum(-1)), dict(c=randn(3, d))),
    "distances": lambda d: (
        lambda x, c: (x[..., None, :] - c).square().sum(-1).add(0.1).sqrt(),
        dict(c=randn(3, d) + 2),
    ),
    "Fourier features": lambda d: (lambda x, w: torch.cat([(x @ w).sin(), (x @ w).cos()], -1), dict(w=randn(d, 2))),
    "polynomials": lambda d: (lambda x, c: sum(x.tanh() ** k @ c[k] for k in range(3)), dict(c=randn(3, d, 3))),
    "highway": lambda d: (
        lambda x, w, g: (x @ g).sigmoid() * (x @ w).tanh() + (1 - (x @ g).sigmoid()) * x,
        dict(w=randn(d, d), g=randn(d, d)),
    ),
    "gated unit": lambda d: (
        lambda x, w, v, o: (F.silu(x @ w) * (x @ v)) @ o,
        dict(w=randn(d, 3), v=randn(d, 3), o=randn(3, 2)),
    ),
    "residual block": lambda d: (lambda x, w, v: x + F.gelu(x @ w) @ v, dict(w=randn(d, 3), v=randn(3, d))),
    "zero gate": lambda d: (lambda x, w, g: x + g * (x @ w).tanh(), dict(w=randn(d, d), g=torch.zeros(1).double())),
    "layer scale": lambda d: (
        lambda x, w, g: x + g * (x @ w).tanh(),
        dict(w=randn(d, d), g=0.1 * torch.ones(d).double()),
    ),
    "temperature": lambda d: (lambda x, t: (x * t).softmax(-1), dict(t=torch.tensor(1.3).double())),
    "scalar and shift": lambda d: (
        lambda x, t, b: (x * t + b).tanh(),
        dict(t=torch.tensor(0.8).double(), b=torch.tensor(0.1).double()),
    ),
    "learned slope": lambda d: (lambda x, b: x * torch.sigmoid(b * x), dict(b=torch.ones(d).double())),
    "learned power": lambda d: (lambda x, p: (x * x + 0.5) ** p, dict(p=torch.rand(1).double() + 0.5)),
    "learned bounds": lambda d: (
        lambda x, a, b: x.clamp(a, b),
        dict(a=-torch.rand(d).double(), b=torch.rand(d).double()),
    ),
    "added and unused": lambda d: (lambda x, b, u: x + b, dict(b=randn(d), u=randn(2, 2))),
    "concatenated": lambda d: (lambda x, w: torch.cat([x, (x @ w).tanh()], -1)[..., -4:], dict(w=randn(d, 3))),
    "learned token": lambda d: (lambda x, c: torch.where(x > 0, x, c), dict(c=randn(d))),
    "soft mixture of experts": lambda d: (
        lambda x, g, w: torch.einsum("...e,...i,eio->...o", (x @ g).softmax(-1), x, w),
        dict(g=randn(d, 2), w=randn(2, d, 3)),
    ),
    "hard mixture of experts": lambda d: (
        lambda x, w: torch.where(side(x)[..., None], x @ w[0], (x @ w[1]).tanh()),
        dict(w=randn(2, d, 3)),
    ),
    "indexed experts": lambda d: (
        lambda x, w: torch.einsum("...i,...io->...o", x, w[side(x).long()]),
        dict(w=randn(2, d, 3)),
    ),
    "dispatched experts": lambda d: (_dispatched, dict(a=randn(d, 3), b=randn(d, 3))),
    "best expert": lambda d: (_best, dict(g=randn(d, 3), w=randn(3, d, 2))),
    "expert for few": lambda d: (
        lambda x, w, v: torch.stack([row @ v if float(row.detach().flatten()[0]) > 0.8 else row @ w for row in x]),
        dict(w=randn(d, 2), v=randn(d, 2)),
    ),
    "unrolled fixed point": lambda d: (_unrolled, dict(w=0.5 * randn(d, d))),
    "Euler steps": lambda d: (lambda x, w, v: _euler(x, w, v), dict(w=randn(d, 3), v=randn(3, d))),
    "batched product": lambda d: (
        lambda x, w: torch.bmm(x.reshape(1, -1, d), w[None]).reshape(*x.shape[:-1], 3),
        dict(w=randn(d, 3)),
    ),
    "addmm": lambda d: (
        lambda x, w, b: torch.addmm(b, x.reshape(-1, d), w, beta=0.5).reshape(*x.shape[:-1], 3),
        dict(w=randn(d, 3), b=randn(3)),
    ),
    "tensordot": lambda d: (lambda x, w: torch.tensordot(x, w, dims=([-1], [1])), dict(w=randn(3, d))),
    "outer with a parameter": lambda d: (lambda x, w: (x[..., :, None] * w).flatten(-2)[..., :4], dict(w=randn(2))),
    "frozen product": lambda d: (lambda x, w, b: x @ w + b, dict(w=frozen(randn(d, 3)), b=randn(3))),
    "frozen bias": lambda d: (lambda x, w, b: x @ w + b, dict(w=randn(d, 3), b=frozen(randn(3)))),
    "energy": lambda d: (_energy, dict(w=randn(d, 3))),
    "log-determinant": lambda d: (
        lambda x, w: x * torch.logdet(torch.eye(d).double() + 0.3 * w @ w.T),
        dict(w=randn(d, d)),
    ),
    "Sinkhorn": lambda d: (lambda x, w: x @ _doubly_stochastic(w), dict(w=randn(d, d))),
    "weights by the trigonometric recursion": lambda d: (lambda x, t: _rotated(x, t), dict(t=randn(1))),
}


def frozen(value):
    return nn.Parameter(value, requires_grad=False)


def _dispatched(x, a, b):
    first = side(x.flatten(1))
    z = x.new_zeros(*x.shape[:-1], 3)
    z = z.index_add(0, first.nonzero()[:, 0], (x[first] @ a).tanh())
    return z.index_add(0, (~first).nonzero()[:, 0], x[~first] @ b)


def _best(x, g, w):
    gate, index = (x @ g).softmax(-1).max(-1)
    return gate[..., None] * torch.einsum("...i,...io->...o", x, w[index])


def _unrolled(x, w):
    z = torch.zeros_like(x)
    for _ in range(3):
        z = torch.tanh(z @ w + x)
    return z


def _euler(x, w, v):
    for _ in range(2):
        x = x + 0.5 * torch.tanh(x @ w) @ v
    return x


def _energy(x, w):
    with torch.enable_grad():
        y = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad((y @ w).tanh().square().sum(), y, create_graph=True)[0]


def _doubly_stochastic(w):
    p = w.exp()
    for _ in range(2):
        p = p / p.sum(0, keepdim=True)
        p = p / p.sum(1, keepdim=True)
    return p


def _rotated(x, t):
    a, b = x[..., :1], x[..., 1:2]
    return torch.cat([a * t.cos() - b * t.sin(), a * t.sin() + b * t.cos()], -1)


for name, make in WEIGHTS.items():
    block(name, "fs", lambda r, s, make=make: (lambda made: Op(made[0], **made[1]))(make(s[-1])))


def parametrized(change, kinds="fs"):
    """A layer whose weight is computed from others."""

    def build(r, s):
        layer = nn.Linear(s[-1], 3) if last_axis(kinds) else nn.Conv1d(s[0], 3, 2)
        return change(layer)

    return build


class Positive(nn.Module):
    def forward(self, w):
        return F.softplus(w)

    def right_inverse(self, w):
        return torch.log(torch.expm1(w.abs() + 0.1))


class Offset(nn.Module):
    def __init__(self, like):
        super().__init__()
        self.offset = nn.Parameter(0.1 * torch.randn_like(like))

    def forward(self, w):
        return w + self.offset


def registered(make):
    def change(layer):
        parametrize.register_parametrization(layer, "weight", make(layer.weight))
        return layer

    return change


def several(layer):
    parametrize.register_parametrization(layer, "weight", Offset(layer.weight))
    parametrize.register_parametrization(layer, "weight", Positive())
    return layer


def power_iterated(layer):
    """Spectral norm, of a matrix whose vectors have converged as after some training."""
    parametrizations.spectral_norm(layer, n_power_iterations=30)
    return layer


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.4)


block("weight norm", "fs", parametrized(parametrizations.weight_norm))
block("weight norm of a convolution", "c", parametrized(parametrizations.weight_norm, "c"))
block("weight norm by hook", "fs", parametrized(lambda layer: nn.utils.weight_norm(layer)))
block("spectral norm", "fs", parametrized(power_iterated))
block("spectral norm by hook", "fs", parametrized(lambda layer: nn.utils.spectral_norm(layer)))
block(
    "orthogonal",
    "fs",
    lambda r, s: parametrizations.orthogonal(
        nn.Linear(s[-1], s[-1]), orthogonal_map=r.choice(["matrix_exp", "cayley"])
    ),
)
block(
    "Householder",
    "fs",
    lambda r, s: parametrizations.orthogonal(nn.Linear(s[-1], s[-1]), orthogonal_map="householder"),
    notes=["coarse"],  # torch makes integers of a diagonal of ones, so that no difference converges here
)
block("positive by parametrization", "fs", parametrized(registered(lambda w: Positive())))
block("offset by parametrization", "c", parametrized(registered(Offset), "c"))
block("two parametrizations", "fs", parametrized(several))
block("pruned", "fs", parametrized(pruned))
block(
    "learned scale of a layer",
    "c",
    lambda r, s: Op(lambda x, m, g: m(x) * g[:, None], nn.Conv1d(s[0], 3, 1), g=randn(3) / math.sqrt(2)),
)
