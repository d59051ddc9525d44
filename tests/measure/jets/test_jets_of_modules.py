"""Taylor series through many modules against repeated reverse mode along the line."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.measure.jets.series import (
    assert_series,
    full,
    line,
    normal,
    series_by_reverse_mode,
    tree_flat,
)
from torch_eft.measure.jets.jet import NoJetRuleError, jet, lift


class PlainLayerNorm(nn.LayerNorm):
    """By its definition: torch's own third derivative is wrong."""

    def forward(self, x):
        centered = x - x.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


class PlainInstanceNorm(nn.InstanceNorm1d):
    def forward(self, x):
        centered = x - x.mean(-1, keepdim=True)
        value = centered / (centered.square().mean(-1, keepdim=True) + self.eps).sqrt()
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
