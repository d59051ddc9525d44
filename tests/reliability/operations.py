"""Small networks, each around one operation, for the checks of derivatives; float64, three samples, two outputs."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tokens(*shape):
    return torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(0))


class Apply(nn.Module):
    """A function of the inputs as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def between(*operations, width=4, out=None):
    """Linear, the operations, linear: their first derivatives meet moving inputs."""
    return nn.Sequential(nn.Linear(3, width), *operations, nn.Linear(width if out is None else out, 2))


def function(f, **sizes):
    return between(Apply(f), **sizes)


def places(*layers, channels, axes=(2,)):
    """Layers over positions, averaged and read out."""
    return nn.Sequential(*layers, Apply(lambda z: z.tanh().mean(axes)), nn.Linear(channels, 2))


def images(*operations, channels=2):
    """A convolution, the operations on its image (3, 2, 4, 4), flattened; read out."""
    return nn.Sequential(nn.Conv2d(1, 2, 2), *operations, nn.Flatten(), nn.LazyLinear(2))


class Last(nn.Module):
    """A recurrent layer whose last output is read out."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.hidden_size, 2)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner, self.head, self.options = nn.Linear(3, 12), nn.Linear(4, 2), options

    def forward(self, x):
        q, k, v = self.inner(x).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.head(z.transpose(1, 2).flatten(2).mean(1))


class MultiHead(nn.Module):
    """Of x with itself, or of learned queries with x."""

    def __init__(self, cross=False):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.query = nn.Parameter(torch.randn(1, 2, 4)) if cross else None

    def forward(self, x):
        z = self.inner(x)
        q = z if self.query is None else self.query.expand(len(x), -1, -1)
        return self.head(self.attention(q, z, z)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, 0.1, batch_first=True, **options)

    def forward(self, x):
        return self.head(self.layer(self.inner(x)).mean(1))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.layer = nn.TransformerDecoderLayer(4, 1, 3, 0.1, "gelu", batch_first=True)

    def forward(self, x):
        z = self.inner(x)
        return self.head(self.layer(z[:, :2], z).mean(1))


class Tied(nn.Module):
    """The embedding is the read-out as well."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.embed(x))).mean(1))[:, :2]


class Twice(nn.Module):
    """One layer applied twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.layer = nn.Linear(3, 3), nn.Bilinear(3, 3, 2)

    def forward(self, x):
        z = torch.tanh(self.inner(x))
        return self.layer(z, x)


class Raw(nn.Module):
    """Parameters used by hand, frozen ones among them."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 2))
        self.power = nn.Parameter(torch.rand(1))
        self.shift = nn.Parameter(torch.rand(4), requires_grad=False)

    def forward(self, x):
        return torch.einsum("ni,ij->nj", ((x @ self.w + self.shift) ** 2 + 1) ** self.power, self.v)


class Cosine(torch.autograd.Function):
    """New style, with vmap and jvp of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.cos()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return -g * ctx.saved_tensors[0].sin()

    @staticmethod
    def jvp(ctx, t):
        return -t * ctx.saved_tensors[0].sin()


class OldSine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class OnceSine(OldSine):
    """Its backward has no derivative."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class Checkpointed(nn.Module):
    """In evaluation, too."""

    def __init__(self, reentrant, operation=nn.Tanh, first=False):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(2, 2)
        self.block = nn.Sequential(nn.Linear(3 if first else 4, 4), operation(), nn.Linear(4, 2))
        self.reentrant, self.first = reentrant, first

    def forward(self, x):
        z = x if self.first else torch.tanh(self.inner(x))
        return self.head(checkpoint(self.block, z, use_reentrant=self.reentrant))


class Remembering(nn.Module):
    """Keeps an activation and counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = torch.tanh(self.inner(x))
        return self.head(self.last)


class Branching(nn.Module):
    """One of two ways, by a value."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        z = self.inner(x)
        return self.head(torch.tanh(z) if self.inner.weight.norm().item() > 0 else torch.sin(z))


class Structured(nn.Module):
    """Arguments by name, or several, and outputs in a dict or a tuple."""

    def __init__(self, kind):
        super().__init__()
        self.left, self.right, self.head, self.kind = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2), kind

    def forward(self, left, right):
        z = self.head(torch.tanh(self.left(left)) * torch.sin(self.right(right)))
        return {"logits": z, "loss": None} if self.kind is dict else (z, left)


class Bag(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(5, 3, mode=mode), between(nn.Tanh())

    def forward(self, x):
        return self.head(self.bag(x))


def running_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return model


vector = lambda: randn(3, 3)  # noqa: E731
sequence = lambda: randn(3, 4, 3)  # noqa: E731
signal = lambda: randn(3, 2, 5)  # noqa: E731
image = lambda: randn(3, 1, 5, 5)  # noqa: E731
words = lambda: tokens(3, 4)  # noqa: E731
by_name = lambda: {"left": randn(3, 3), "right": randn(3, 2, seed=1)}  # noqa: E731

OPERATIONS = {
    # maps
    "Linear": (lambda: between(nn.Tanh()), vector),
    "Bilinear": (Bilinear, vector),
    "Conv1d": (lambda: places(nn.Conv1d(2, 3, 3, 2, 1), nn.Tanh(), nn.Conv1d(3, 2, 2), channels=2), signal),
    "Conv1d, groups": (lambda: places(nn.Conv1d(2, 4, 2, dilation=2, groups=2), channels=4), signal),
    "Conv2d": (lambda: images(nn.Tanh(), nn.Conv2d(2, 2, 2, stride=2), nn.Tanh()), image),
    "Conv3d": (lambda: places(nn.Conv3d(1, 2, 2), channels=2, axes=(2, 3, 4)), lambda: randn(3, 1, 3, 3, 3)),
    "ConvTranspose1d": (lambda: places(nn.ConvTranspose1d(2, 3, 3, 2, 1, 1), channels=3), signal),
    "ConvTranspose2d": (lambda: images(nn.Tanh(), nn.ConvTranspose2d(2, 1, 2, stride=2), nn.Tanh()), image),
    "Embedding": (lambda: places(nn.Embedding(5, 3, padding_idx=0), channels=3, axes=(1,)), words),
    "EmbeddingBag, sum": (lambda: Bag("sum"), words),
    "EmbeddingBag, mean": (lambda: Bag("mean"), words),
    "EmbeddingBag, max": (lambda: Bag("max"), words),
    "tied weights": (Tied, words),
    "a layer used twice": (Twice, vector),
    "parameters by hand, frozen": (Raw, vector),
    # reparametrized
    "weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), between(width=4)[1:]), vector),
    "spectral_norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
        vector,
    ),
    "orthogonal": (lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), between(nn.Tanh())), vector),
    # normalized
    "BatchNorm1d": (lambda: running_statistics(between(nn.BatchNorm1d(4), nn.Tanh())), vector),
    "BatchNorm2d": (lambda: running_statistics(images(nn.BatchNorm2d(2), nn.Tanh())), image),
    "GroupNorm": (lambda: between(nn.GroupNorm(2, 4), nn.Tanh()), vector),
    "LayerNorm": (lambda: between(nn.LayerNorm(4), nn.Tanh()), vector),
    "RMSNorm": (lambda: between(nn.RMSNorm(4), nn.Tanh()), vector),
    "InstanceNorm2d": (lambda: images(nn.InstanceNorm2d(2, affine=True), nn.Tanh()), image),
    "InstanceNorm1d, running": (
        lambda: running_statistics(
            places(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True, track_running_stats=True), channels=3)
        ),
        signal,
    ),
    "LocalResponseNorm": (lambda: images(nn.LocalResponseNorm(2), nn.Tanh()), image),
    "normalize": (lambda: function(lambda z: F.normalize(z, dim=1)), vector),
    # pooled, padded, resized
    "MaxPool2d": (lambda: images(nn.Tanh(), nn.MaxPool2d(2)), image),
    "AvgPool2d": (lambda: images(nn.Tanh(), nn.AvgPool2d(2)), image),
    "AdaptiveAvgPool2d": (lambda: images(nn.Tanh(), nn.AdaptiveAvgPool2d(3)), image),
    "AdaptiveMaxPool2d": (lambda: images(nn.Tanh(), nn.AdaptiveMaxPool2d(3)), image),
    "Upsample": (lambda: images(nn.Tanh(), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Tanh()), image),
    "ReflectionPad2d": (lambda: images(nn.Tanh(), nn.ReflectionPad2d(1), nn.Conv2d(2, 1, 3), nn.Tanh()), image),
    "PixelShuffle": (lambda: images(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.PixelShuffle(2)), image),
    # attention, recurrence
    "scaled_dot_product_attention": (Attention, sequence),
    "causal attention": (lambda: Attention(is_causal=True), sequence),
    "MultiheadAttention": (MultiHead, sequence),
    "MultiheadAttention, cross": (lambda: MultiHead(cross=True), sequence),
    "TransformerEncoderLayer": (lambda: Encoder(activation="gelu"), sequence),
    "TransformerEncoderLayer, norm first": (lambda: Encoder(norm_first=True), sequence),
    "TransformerDecoderLayer": (Decoder, sequence),
    "LSTM": (lambda: Last(nn.LSTM(3, 3, batch_first=True)), sequence),
    "GRU": (lambda: Last(nn.GRU(3, 3, batch_first=True)), sequence),
    "RNN, tanh": (lambda: Last(nn.RNN(3, 3, batch_first=True)), sequence),
    "RNN, relu": (lambda: Last(nn.RNN(3, 3, nonlinearity="relu", batch_first=True)), sequence),
    # pointwise
    **{
        kind.__name__: (lambda kind=kind: between(kind()), vector)
        for kind in (
            *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
            *(nn.Sigmoid, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink, nn.Hardswish, nn.Hardtanh, nn.ReLU6),
        )
    },
    "ReLU in place": (lambda: between(nn.ReLU(inplace=True)), vector),
    "GELU, tanh": (lambda: between(nn.GELU(approximate="tanh")), vector),
    "GLU": (lambda: between(nn.GLU(), out=2), vector),
    "Softmax": (lambda: between(nn.Softmax(1)), vector),
    "LogSoftmax": (lambda: between(nn.LogSoftmax(1)), vector),
    "Dropout": (lambda: between(nn.Dropout(0.5), nn.Tanh(), nn.AlphaDropout(0.2)), vector),
    # functions
    "sin, exp, pow": (lambda: function(lambda z: z.sin() * (z / 3).exp() + z**3 / 9), vector),
    "logsumexp": (lambda: function(lambda z: z[:, :, None].mul(z[:, None]).logsumexp(2)), vector),
    "cumsum, sort": (lambda: function(lambda z: z.tanh().cumsum(1).sort(1).values), vector),
    "cdist": (lambda: function(lambda z: torch.cdist(z[:, None], z[:, :, None] * z[:, None])[:, 0]), vector),
    "linalg.inv": (
        lambda: function(lambda z: torch.linalg.inv(z.unflatten(1, (2, 2)).sin() + torch.eye(2) * 2).flatten(1)),
        vector,
    ),
    "autograd.Function with jvp": (lambda: function(Cosine.apply), vector),
    "autograd.Function of the old style": (lambda: function(OldSine.apply), vector),
    "autograd.Function, once differentiable": (lambda: function(OnceSine.apply), vector),
    # ways of running
    "checkpoint": (lambda: Checkpointed(False), vector),
    "checkpoint of a norm": (lambda: Checkpointed(False, lambda: nn.LayerNorm(4)), vector),
    "checkpoint, reentrant": (lambda: Checkpointed(True), vector),
    "checkpoint, reentrant, of the inputs": (lambda: Checkpointed(True, first=True), vector),
    ".item() branch": (Branching, vector),
    "activation kept, buffer counted": (Remembering, vector),
    "dict in, dict out": (lambda: Structured(dict), by_name),
    "tuple in, tuple out": (lambda: Structured(tuple), lambda: tuple(by_name().values())),
    "float16": (lambda: between(nn.Tanh()).half(), vector),
    "bfloat16": (lambda: between(nn.LayerNorm(4), nn.Tanh()).bfloat16(), vector),
    "float32": (lambda: between(nn.GELU()).float(), vector),
    # no functions of the parameters and of each sample
    "dropout while evaluating": (lambda: function(lambda z: F.dropout(z, 0.5, training=True)), vector),
    "BatchNorm1d without running statistics": (lambda: between(nn.BatchNorm1d(4, track_running_stats=False)), vector),
    "lazy module": (lambda: nn.Sequential(nn.LazyLinear(2)), vector),
}
"""Name: (makes the network, makes its inputs)."""

OUTPUT_FN = {"dict in, dict out": lambda found: found["logits"], "tuple in, tuple out": lambda found: found[0]}
