"""Small networks of every kind of layer, and inputs for them; float64."""

import torch
from torch import nn
from torch.nn import functional as F


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tokens(*shape, below=7, seed=0):
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def pooled(*layers, channels, axes=(2,)):
    """Convolutions or sequences, averaged and read out."""
    return nn.Sequential(*layers, Lambda(lambda z: z.mean(axes)), nn.Linear(channels, 2))


class Block(nn.Module):
    """A residual block of convolutions and group norm."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.second(torch.tanh(self.norm(self.first(x))))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True, **options)
        width = options.get("proj_size") or 4
        self.head = nn.Linear(width * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Language(nn.Module):
    """Token and position embeddings, pre-LN transformer layers, mean over tokens."""

    def __init__(self, batch_first=True, layers=1, activation="gelu"):
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.position = nn.Parameter(torch.randn(5, 4) / 3)
        layer = nn.TransformerEncoderLayer(4, 2, 6, 0.1, activation, batch_first=batch_first, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(4, 2)

    def forward(self, idx):
        z = self.embed(idx) + self.position
        z = self.body(z) if self.batch_first else self.body(z.transpose(0, 1)).transpose(0, 1)
        return self.head(z.mean(1))


class TiedLanguage(nn.Module):
    """The embedding is the read-out as well."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, idx):
        return self.head(torch.tanh(self.mix(self.embed(idx))).mean(1))


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, a pre-LN layer with layer scale, the class token read out."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, stride=2)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 5, 4) / 2)
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.scale, self.head = nn.Parameter(torch.rand(4)), nn.Linear(4, 2)

    def forward(self, x):
        z = self.patches(x).flatten(2).transpose(1, 2)
        z = torch.cat([self.token.expand(len(x), -1, -1), z], 1) + self.position
        y = self.norm(z)
        z = z + self.scale * self.attention(y, y, y, need_weights=False)[0]
        return self.head(z[:, 0])


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, kdim=3, vdim=3)
        self.queries = nn.Parameter(torch.randn(1, 2, 4))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        queries = self.queries.expand(len(x), -1, -1)
        return self.head(self.attention(queries, x, x, need_weights=False)[0].flatten(1))


class Attention(nn.Module):
    """Scaled dot products by hand, causal."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(3, 12)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (1, 12)).transpose(1, 2).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0, -1])


class Flattened(nn.Module):
    """A linear layer that sees samples and places on one axis."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        z = torch.tanh(self.inner(x.reshape(-1, 3)))
        return self.head(z.reshape(len(x), -1, 4).mean(1))


class Raw(nn.Module):
    """Parameters used by hand."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
        self.scale, self.power = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.rand(1))
        self.v = nn.Parameter(torch.randn(4, 2))

    def forward(self, x):
        z = torch.tanh(x @ self.w + self.b) * self.scale
        return (z * z + 1) ** self.power @ self.v


class Stretched(nn.Module):
    """Gains and shifts of channels in the shapes of what they meet; one of them in another order."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv1d(2, 4, 2), nn.Linear(4, 2)
        self.gain, self.shift, self.shuffled = (nn.Parameter(torch.randn(4)) for _ in range(3))

    def forward(self, x):
        z = torch.tanh(self.layer(x) * self.gain.reshape(1, -1, 1) + self.shift[:, None])
        return self.head((z + self.shuffled[[2, 0, 3, 1]].unsqueeze(1)).square().mean(2))


class Twice(nn.Module):
    """One layer used twice, once inside a product of weights."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return F.linear(torch.tanh(self.a(torch.tanh(self.a(x)))), self.b.weight @ self.a.weight, self.b.bias)


class Dictionaries(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, left, right):
        return {"logits": self.head(torch.tanh(self.left(left)) * torch.sin(self.right(right)))}


def frozen():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    return model


def trained_batch_norm():
    model = pooled(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), channels=4, axes=(2, 3))
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    return model


ZOO = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)),
        lambda: randn(3, 3),
    ),
    "one output": (
        lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 1)),
        lambda: randn(3, 3),
    ),
    "stretched": (Stretched, lambda: randn(3, 2, 5)),
    "conv1d": (
        lambda: pooled(
            nn.Conv1d(2, 4, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv1d(4, 4, 2, dilation=2, groups=2),
            nn.SiLU(),
            channels=4,
        ),
        lambda: randn(3, 2, 9),
    ),
    "conv2d": (
        lambda: pooled(
            nn.Conv2d(2, 4, (3, 2), padding="same", bias=False),
            nn.Tanh(),
            nn.Conv2d(4, 3, 3, stride=(2, 1), padding_mode="circular", padding=1),
            nn.Softplus(),
            channels=3,
            axes=(2, 3),
        ),
        lambda: randn(3, 2, 5, 4),
    ),
    "conv3d": (lambda: pooled(nn.Conv3d(1, 2, 2), nn.Tanh(), channels=2, axes=(2, 3, 4)), lambda: randn(2, 1, 3, 3, 3)),
    "depthwise": (
        lambda: pooled(nn.Conv2d(3, 3, 3, groups=3), nn.Mish(), nn.Conv2d(3, 4, 1), nn.ELU(), channels=4, axes=(2, 3)),
        lambda: randn(3, 3, 4, 4),
    ),
    "transposed": (
        lambda: pooled(
            nn.ConvTranspose1d(2, 4, 3, stride=2, padding=1, output_padding=1),
            nn.Tanh(),
            nn.ConvTranspose1d(4, 2, 2, groups=2, dilation=2, bias=False),
            nn.Tanh(),
            channels=2,
        ),
        lambda: randn(3, 2, 4),
    ),
    "transposed2d": (
        lambda: pooled(nn.ConvTranspose2d(2, 3, (2, 3), stride=2), nn.Tanh(), channels=3, axes=(2, 3)),
        lambda: randn(2, 2, 3, 3),
    ),
    "resnet": (
        lambda: pooled(nn.Conv2d(2, 4, 3), Block(4), nn.AvgPool2d(2), channels=4, axes=(2, 3)),
        lambda: randn(3, 2, 6, 6),
    ),
    "batch norm": (trained_batch_norm, lambda: randn(3, 2, 5, 5)),
    "instance norm": (
        lambda: pooled(nn.Conv1d(2, 3, 3), nn.InstanceNorm1d(3, affine=True), nn.Tanh(), channels=3),
        lambda: randn(3, 2, 7),
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(approximate="tanh"), nn.Linear(4, 2)),
        lambda: randn(3, 3),
    ),
    "rms norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.SiLU(), nn.Linear(4, 2)),
        lambda: randn(3, 3),
    ),
    "glu": (lambda: nn.Sequential(nn.Linear(3, 8), nn.GLU(), nn.Linear(4, 2)), lambda: randn(3, 3)),
    "prelu": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 2)),
        lambda: randn(3, 3),
    ),
    "max pool": (
        lambda: pooled(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), channels=3, axes=(2, 3)),
        lambda: randn(3, 1, 6, 6),
    ),
    "adaptive pool": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)),
        lambda: randn(3, 1, 4, 4),
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
        lambda: randn(3, 3),
    ),
    "transformer": (Language, lambda: tokens(3, 5)),
    "transformer, time first": (lambda: Language(batch_first=False), lambda: tokens(4, 5)),
    "transformer, as many tokens as samples": (lambda: Language(batch_first=False), lambda: tokens(5, 5)),
    "tied embedding": (TiedLanguage, lambda: tokens(3, 4)),
    "vision transformer": (VisionTransformer, lambda: randn(3, 1, 4, 4)),
    "cross attention": (CrossAttention, lambda: randn(3, 4, 3)),
    "attention": (Attention, lambda: randn(3, 4, 3)),
    "lstm": (Recurrent, lambda: randn(3, 4, 3)),
    "lstm, two ways": (lambda: Recurrent(bidirectional=True, num_layers=2, bias=False), lambda: randn(2, 3, 3)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: randn(3, 4, 3)),
    "rnn": (lambda: Recurrent(nn.RNN), lambda: randn(3, 4, 3)),
    "flattened": (Flattened, lambda: randn(3, 4, 3)),
    "raw": (Raw, lambda: randn(3, 3)),
    "twice": (Twice, lambda: randn(3, 3)),
    "frozen": (frozen, lambda: randn(3, 3)),
    "dictionaries": (Dictionaries, lambda: {"left": randn(3, 3), "right": randn(3, 2, seed=1)}),
}
"""Name: (makes the module, makes inputs)."""


def build(name):
    """Module (float64, evaluation mode), inputs, output_fn."""
    torch.manual_seed(0)
    make, inputs = ZOO[name]
    output_fn = (lambda out: out["logits"]) if name == "dictionaries" else None
    return make().double().eval(), inputs(), output_fn
