"""What forwards do that may trip a measurement up: aliases, patches, hooks, state, stopped gradients, dtypes."""

import threading
import types
from collections import OrderedDict, namedtuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.fuzz.kinds import Op, block, randn

OUTSIDE: list = []
"""What hooks and closures of the blocks count and keep outside of the module."""


class Aliased(nn.Module):
    """Reads its registered weights from a container that modules do not know."""

    def __init__(self, d, container):
        super().__init__()
        self.a, self.b = nn.Linear(d, 3), nn.Linear(3, 2)
        kept = [self.a.weight, self.b.weight]
        self.kept = {list: list, tuple: tuple, dict: lambda w: dict(enumerate(w))}[container](kept)

    def forward(self, x):
        return F.linear(F.linear(x, self.kept[0], self.a.bias).tanh(), self.kept[1], self.b.bias)


class Hidden(nn.Module):
    """Submodules in a list that modules do not know, their parameters registered by hand."""

    def __init__(self, d):
        super().__init__()
        self.layers = [nn.Linear(d, 3), nn.Linear(3, 2)]
        for number, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters():
                self.register_parameter(f"{name}_{number}", parameter)

    def forward(self, x):
        return self.layers[1](self.layers[0](x).tanh())


def closure(r, s):
    a = nn.Linear(s[-1], 3)
    return Op(lambda x, _: F.linear(x, a.weight, a.bias), a)


def patched(r, s):
    layer = nn.Linear(s[-1], 3)
    old = layer.forward
    layer.forward = lambda x: old(x) * 1.5
    return nn.Sequential(layer)


def bound(r, s):
    layer = nn.Linear(s[-1], 3)
    layer.forward = types.MethodType(lambda self, x: F.linear(x, self.weight * 1.2, self.bias).tanh(), layer)
    return nn.Sequential(layer)


def scaled_by_hook(r, s):
    layer = nn.Linear(s[-1], 3)
    layer.register_forward_hook(lambda module, inputs, output: output * 1.5)
    return layer


def shifted_by_prehook(r, s):
    layer = nn.Linear(s[-1], 3)
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.3,))
    return layer


def adapted_by_hook(r, s):
    """The adapter is a child; the hook's closure reaches the original."""
    layer = nn.Sequential(OrderedDict(base=nn.Linear(s[-1], 3), adapter=nn.Linear(s[-1], 3)))
    base, adapter = layer.base, layer.adapter
    base.register_forward_hook(lambda module, inputs, output: output + adapter(inputs[0]).tanh())
    return Op(lambda x, m: m.base(x), layer)


def watched(r, s):
    layer = nn.Linear(s[-1], 3)
    layer.register_forward_hook(lambda module, inputs, output: OUTSIDE.append(float(output.detach().sum())))
    return layer


def gradient_hook(r, s):
    return Op(_hooked, nn.Linear(s[-1], 3))


def _hooked(x, m):
    z = m(x)
    if z.requires_grad:
        z.register_hook(lambda g: 2 * g)
    return z


class Counting(nn.Module):
    """Counts its calls in a buffer and in an attribute, and keeps an activation and a mask."""

    def __init__(self, d):
        super().__init__()
        self.layer, self.calls, self.masks = nn.Linear(d, 3), 0, {}
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        self.count += 1
        z = self.layer(x)
        mask = self.masks.setdefault(z.shape[-1], torch.ones(z.shape[-1]))
        self.last = torch.tanh(z * mask.to(z))
        return self.last


class Attributes(nn.Module):
    """Holds what cannot be copied, data and itself."""

    def __init__(self, d):
        super().__init__()
        self.layer, self.lock, self.data = nn.Linear(d, 3), threading.Lock(), torch.randn(50, d)
        self.__dict__["parent"], self.generator = self, (k for k in range(3))

    def forward(self, x):
        with self.lock:
            return self.parent.layer(x)


class Shared(nn.Module):
    """One module under two names, called twice, once with keywords."""

    def __init__(self, d):
        super().__init__()
        self.first = nn.Linear(d, d)
        self.second = self.first

    def forward(self, x):
        return self.second(input=self.first(x).tanh())


class Tuples(nn.Module):
    """Named tuples and dicts between its parts."""

    Pair = namedtuple("Pair", "value gate")

    def __init__(self, d):
        super().__init__()
        self.parts = nn.ModuleDict({"value": nn.Linear(d, 3), "gate": nn.Linear(d, 3)})

    def forward(self, x):
        pair = self.Pair(**{name: part(x) for name, part in self.parts.items()})
        return pair.value * pair.gate.sigmoid()


class Buffered(nn.Module):
    """Weights in buffers, and a parameter that is a view at every call."""

    def __init__(self, d):
        super().__init__()
        self.register_buffer("w", randn(d, 3))
        self.flat = nn.Parameter(randn(9 + 3))

    def forward(self, x):
        w, b = self.flat.split([9, 3])
        return (x @ self.w).tanh() @ w.view(3, 3) + b


class Seeded(nn.Module):
    """Fixed random features, drawn anew at every call; the global seed is set on the way."""

    def __init__(self, d):
        super().__init__()
        self.layer = nn.Linear(d, 3)

    def forward(self, x):
        torch.manual_seed(7)
        w = torch.randn(x.shape[-1], x.shape[-1], dtype=torch.float64)
        return self.layer((x @ w.to(x)).tanh())


block("weights in a list", "fs", lambda r, s: Aliased(s[-1], list))
block("weights in a tuple", "fs", lambda r, s: Aliased(s[-1], tuple))
block("weights in a dict", "fs", lambda r, s: Aliased(s[-1], dict))
block("layers in a list", "fs", lambda r, s: Hidden(s[-1]))
block("weights in a closure", "fs", closure)
block("patched forward", "fs", patched)
block("bound forward", "fs", bound)
block("scaled by a hook", "fs", scaled_by_hook)
block("shifted by a hook", "fs", shifted_by_prehook)
block("adapted by a hook", "fs", adapted_by_hook)
block("watched by a hook", "fs", watched)
block("counting", "fs", lambda r, s: Counting(s[-1]))
block("uncopyable attributes", "fs", lambda r, s: Attributes(s[-1]))
block("one module, two names", "fs", lambda r, s: Shared(s[-1]))
block("named tuples", "fs", lambda r, s: Tuples(s[-1]))
block("views of a flat parameter", "fs", lambda r, s: Buffered(s[-1]))
block("seeded inside", "fs", lambda r, s: Seeded(s[-1]))
block("scripted", "f", lambda r, s: torch.jit.script(nn.Sequential(nn.Linear(s[-1], 3), nn.Tanh())))
block(
    "functional call inside",
    "fs",
    lambda r, s: Op(lambda x, m: torch.func.functional_call(m, {"weight": m.weight * 1.1}, (x,)), nn.Linear(s[-1], 3)),
)
block("no keyword left", "fs", lambda r, s: Op(lambda x, m: m(input=x), nn.Linear(s[-1], 3)))

block(
    "checkpointed",
    "fs",
    lambda r, s: Op(lambda x, m: checkpoint(m, x, use_reentrant=False), nn.Sequential(nn.Linear(s[-1], 3), nn.Tanh())),
)
block(
    "checkpointed closure",
    "fs",
    lambda r, s: Op(lambda x, m: checkpoint(lambda z: m(z.sin()), x, use_reentrant=False), nn.Linear(s[-1], 3)),
)
block(
    "checkpointed sequence",
    "fs",
    lambda r, s: Op(
        lambda x, m: checkpoint_sequential(m, 2, x, use_reentrant=False),
        nn.Sequential(nn.Linear(s[-1], 3), nn.Tanh(), nn.Linear(3, 3), nn.GELU()),
    ),
)


class Sine(torch.autograd.Function):
    """Old style, differentiable again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class NewSine(torch.autograd.Function):
    """New style, with vmap and jvp of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, t):
        return t * ctx.saved_tensors[0].cos()


class DetachedTanh(torch.autograd.Function):
    """Its backward stops the gradient of its own derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].detach().tanh() ** 2)


class OnceSine(Sine):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -0.5 * g


def without_gradient(x):
    with torch.no_grad():
        gate = torch.sigmoid(x)
    return gate * x.tanh()


block("function of one's own", "*", lambda r, s: Op(Sine.apply))
block("new function of one's own", "*", lambda r, s: Op(NewSine.apply))
block("detached backward", "*", lambda r, s: Op(DetachedTanh.apply), notes=["cut"])
block("once differentiable", "*", lambda r, s: Op(OnceSine.apply), notes=["once"])
block("reversed gradient", "*", lambda r, s: Op(Reversed.apply), notes=["cut"])
block("gradient doubled by a hook", "fs", gradient_hook, notes=["cut"])
block("detached gate", "*", lambda r, s: Op(lambda x: x.sigmoid().detach() * x.tanh()), notes=["cut"])
block("gate without gradient", "*", lambda r, s: Op(without_gradient), notes=["cut"])
block(
    "straight-through rounding",
    "*",
    lambda r, s: Op(lambda x: x + (torch.round(2 * x) / 2 - x).detach()),
    notes=["cut"],
)
block(
    "straight-through sign",
    "*",
    lambda r, s: Op(lambda x: x.clamp(-1, 1) + (x.sign() - x.clamp(-1, 1)).detach()),
    notes=["cut"],
)
block(
    "detached norm", "fs", lambda r, s: Op(lambda x: x / (x.detach().norm(dim=-1, keepdim=True) + 0.5)), notes=["cut"]
)
block(
    "detached weights",
    "fs",
    lambda r, s: Op(lambda x, w: (x @ w).tanh() @ w.detach().T, w=randn(s[-1], 3)),
    notes=["cut"],
)
block("nearest code", "f", lambda r, s: Op(_quantized, c=randn(3, s[0])), notes=["cut"])


def _quantized(x, c):
    nearest = c[torch.cdist(x.detach(), c.detach()).argmin(-1)]
    return x + (nearest - x).detach() + 0.1 * nearest


def _half(x, m, dtype):
    with torch.autocast("cpu", dtype=dtype):
        z = m(x.float())
    return z.to(x.dtype)


def _island(x, m):
    return (x.float() * x.float().pow(2).mean(-1, keepdim=True).add(0.1).rsqrt()).to(x.dtype) * m(x)


block("float32 island", "fs", lambda r, s: Op(_island, nn.Linear(s[-1], s[-1])), notes=["coarse"], eps=2.0**-23)
block(
    "float32 softmax",
    "fs",
    lambda r, s: Op(lambda x: x.softmax(-1, dtype=torch.float32).to(x.dtype)),
    notes=["coarse"],
    eps=2.0**-23,
)
block(
    "float32 activation", "*", lambda r, s: Op(lambda x: x.float().tanh().to(x.dtype)), notes=["coarse"], eps=2.0**-23
)
block(
    "bfloat16 activation",
    "*",
    lambda r, s: Op(lambda x: x.bfloat16().tanh().to(x.dtype)),
    notes=["coarse"],
    eps=2.0**-8,
)
block("half activation", "*", lambda r, s: Op(lambda x: x.half().to(x.dtype)), notes=["coarse"], eps=2.0**-10)
block(
    "autocast inside",
    "fs",
    lambda r, s: Op(lambda x, m: _half(x, m, torch.bfloat16), nn.Linear(s[-1], 3).float()),
    notes=["coarse", "float32"],
    eps=2.0**-8,
)
block(
    "float32 layer",
    "fs",
    lambda r, s: Op(lambda x, m: m(x.float()).to(x.dtype), nn.Linear(s[-1], 3).float()),
    notes=["coarse", "float32"],
    eps=2.0**-23,
)


class Clamped(nn.Module):
    """Writes its weight before it uses it."""

    def __init__(self, d):
        super().__init__()
        self.layer = nn.Linear(d, 3)

    def forward(self, x):
        with torch.no_grad():
            self.layer.weight.clamp_(-0.3, 0.3)
        return self.layer(x)


block("embedding of bounded norm", "t", lambda r, s: nn.Embedding(6, 3, max_norm=0.6), to="s", notes=["cut"])
block(
    "bag of bounded norm",
    "t",
    lambda r, s: nn.EmbeddingBag(6, 3, max_norm=0.6, mode="sum"),
    to="f",
    notes=["cut", "once"],
)
block("clamped weights", "fs", lambda r, s: Clamped(s[-1]), notes=["cut"])
