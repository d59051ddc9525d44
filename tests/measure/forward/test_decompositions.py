"""Operations written out against torch's own: values, first derivatives, and second ones by finite differences."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode

from torch_eft.measure.forward.decompositions import WRITTEN_OUT, Decomposed, without_dispatch

DTYPE = torch.float64


def normal(*shape):
    return torch.randn(shape, dtype=DTYPE)


def positive(*shape):
    return torch.rand(shape, dtype=DTYPE) + 0.5


CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()
BLIND = CAUSAL.clone().index_fill_(0, torch.tensor([2]), False)
sdpa = F.scaled_dot_product_attention
OPERATIONS = {
    "layer norm": (lambda x, w, b: F.layer_norm(x, (4, 5), w, b), [(3, 4, 5), (4, 5), (4, 5)]),
    "layer norm without affine": (lambda x: F.layer_norm(x, (5,)), [(3, 5)]),
    "rms norm": (lambda x, w: F.rms_norm(x, (5,), w), [(3, 4, 5), (5,)]),
    "rms norm of given eps": (lambda x: F.rms_norm(x, (4, 5), eps=0.1), [(3, 4, 5)]),
    "group norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [(3, 4, 5, 2), (4,), (4,)]),
    "instance norm": (lambda x, w, b: F.instance_norm(x, None, None, w, b), [(3, 4, 5), (4,), (4,)]),
    "instance norm of running statistics": (
        lambda x, w: F.instance_norm(x, torch.ones(4, dtype=DTYPE), torch.full((4,), 2.0, dtype=DTYPE), w, None, False),
        [(3, 4, 5), (4,)],
    ),
    "batch norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), [(3, 4, 5), (4,), (4,)]),
    "batch norm of running statistics": (
        lambda x, w, b: F.batch_norm(x, torch.ones(4, dtype=DTYPE), torch.full((4,), 2.0, dtype=DTYPE), w, b),
        [(3, 4, 5), (4,), (4,)],
    ),
    "batch norm without affine": (
        lambda x: F.batch_norm(x, torch.ones(4, dtype=DTYPE), torch.full((4,), 2.0, dtype=DTYPE)),
        [(3, 4)],
    ),
    "weight norm of rows": (lambda v, g: torch._weight_norm(v, g, 0), [(3, 4, 2), (3, 1, 1)]),
    "weight norm of columns": (lambda v, g: torch._weight_norm(v, g, 1), [(3, 4), (1, 4)]),
    "weight norm of all": (lambda v, g: torch._weight_norm(v, g, -1), [(3, 4), ()]),
    "glu": (F.glu, [(3, 6)]),
    "glu of an axis": (lambda x: F.glu(x, 1), [(3, 4, 5)]),
    "attention": (sdpa, [(2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7)]),
    "attention, scaled": (lambda q, k, v: sdpa(q, k, v, scale=0.3), [(2, 5, 4), (2, 5, 4), (2, 5, 4)]),
    "attention, causal": (lambda q, k, v: sdpa(q, k, v, is_causal=True), [(2, 5, 4), (2, 6, 4), (2, 6, 4)]),
    "attention, boolean mask": (lambda q, k, v: sdpa(q, k, v, CAUSAL), [(2, 3, 5, 4)] * 3),
    "attention, blind row": (lambda q, k, v: sdpa(q, k, v, BLIND), [(2, 3, 5, 4)] * 3),
    "attention, added mask": (lambda q, k, v, mask: sdpa(q, k, v, mask), [(2, 3, 5, 4)] * 3 + [(5, 5)]),
    "attention, added infinities": (
        lambda q, k, v: sdpa(q, k, v, torch.where(CAUSAL, 0.0, -math.inf).to(DTYPE)),
        [(2, 3, 5, 4)] * 3,
    ),
    "attention, grouped": (
        lambda q, k, v: sdpa(q, k, v, enable_gqa=True),
        [(2, 6, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)],
    ),
}


def of_module(module, *shapes):
    """A module as a function of its inputs and its parameters."""
    names, parameters = zip(*module.double().eval().named_parameters(), strict=True)

    def f(*values):
        inputs, params = values[: len(shapes)], values[len(shapes) :]
        output = torch.func.functional_call(module, dict(zip(names, params, strict=True)), inputs)
        leaves = torch.utils._pytree.tree_leaves(output)
        return torch.cat([leaf.flatten() for leaf in leaves if leaf is not None])

    return f, [*shapes, *[tuple(p.shape) for p in parameters]]


class Attending(nn.MultiheadAttention):
    """With inputs that are the same tensor, or not, and masks."""

    def __init__(self, cross=False, **options):
        self.masks = {key: options.pop(key) for key in ("attn_mask", "key_padding_mask") if key in options}
        self.cross, self.weighed = cross, options.pop("need_weights", False)
        super().__init__(4, 2, **options)

    def forward(self, x, y=None):
        query, key = x, y if self.cross else x
        return super().forward(query, key, key, need_weights=self.weighed, **self.masks)


class Recurrent(nn.Module):
    """With or without an initial state."""

    def __init__(self, kind, with_state=False, **options):
        super().__init__()
        self.rnn = kind(3, 4, **options)
        self.with_state = with_state

    def forward(self, x, *state):
        if not state:
            return self.rnn(x)
        return self.rnn(x, tuple(state) if isinstance(self.rnn, nn.LSTM) else state[0])


PADDED = torch.tensor([[False] * 5, [False, False, False, True, True], [False] * 5])
MODULES = {
    "self-attention": lambda: of_module(Attending(), (5, 3, 4)),
    "self-attention, batch first": lambda: of_module(Attending(batch_first=True), (3, 5, 4)),
    "self-attention, one sample": lambda: of_module(Attending(), (5, 4)),
    "self-attention, causal": lambda: of_module(Attending(batch_first=True, attn_mask=~CAUSAL), (3, 5, 4)),
    "self-attention, padded": lambda: of_module(Attending(batch_first=True, key_padding_mask=PADDED), (3, 5, 4)),
    "self-attention, weights": lambda: of_module(Attending(need_weights=True, key_padding_mask=PADDED), (5, 3, 4)),
    "self-attention, bias_kv": lambda: of_module(Attending(add_bias_kv=True, add_zero_attn=True), (5, 3, 4)),
    "cross-attention": lambda: of_module(Attending(cross=True), (5, 3, 4), (2, 3, 4)),
    "cross-attention, batch first": lambda: of_module(Attending(True, batch_first=True), (3, 5, 4), (3, 2, 4)),
    "cross-attention, other sizes": lambda: of_module(Attending(True, kdim=6, vdim=6), (5, 3, 4), (2, 3, 6)),
    "encoder layer": lambda: of_module(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), (3, 5, 4)),
    "encoder layer, pre": lambda: of_module(nn.TransformerEncoderLayer(4, 2, 6, 0, "gelu", norm_first=True), (3, 5, 4)),
    "decoder layer": lambda: of_module(nn.TransformerDecoderLayer(4, 2, 6, batch_first=True), (3, 5, 4), (3, 2, 4)),
}
for _kind in (nn.LSTM, nn.GRU, nn.RNN, functools.partial(nn.RNN, nonlinearity="relu")):
    _name = "relu" if isinstance(_kind, functools.partial) else _kind.__name__
    MODULES |= {
        _name: lambda kind=_kind: of_module(Recurrent(kind), (5, 2, 3)),
        f"{_name}, both ways": lambda kind=_kind: of_module(
            Recurrent(kind, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5), (2, 5, 3)
        ),
        f"{_name}, no bias": lambda kind=_kind: of_module(Recurrent(kind, bias=False, batch_first=True), (2, 5, 3)),
        f"{_name}, given state": lambda kind=_kind: of_module(
            Recurrent(kind, num_layers=2), (5, 2, 3), *[(2, 2, 4)] * (2 if kind is nn.LSTM else 1)
        ),
        f"{_name}, one sample": lambda kind=_kind: of_module(Recurrent(kind), (5, 3)),
    }
MODULES |= {
    kind.__name__: lambda kind=kind: of_module(kind(3, 4), (2, 3)) for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
}
MODULES["RNNCell by relu"] = lambda: of_module(nn.RNNCell(3, 4, bias=False, nonlinearity="relu"), (2, 3))
MODULES["LSTM, projected"] = lambda: of_module(
    Recurrent(nn.LSTM, num_layers=2, bidirectional=True, proj_size=2), (5, 2, 3)
)
MODULES["LSTM, projected, no bias"] = lambda: of_module(Recurrent(nn.LSTM, proj_size=2, bias=False), (5, 2, 3))


def case(name):
    torch.manual_seed(0)
    f, shapes = OPERATIONS[name] if name in OPERATIONS else MODULES[name]()
    return f, [0.7 * normal(*shape) for shape in shapes]


def gradients(f, inputs, pattern):
    leaves = [value.detach().requires_grad_() for value in inputs]
    return torch.autograd.grad((f(*leaves) * pattern).sum(), leaves, create_graph=True)


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop", "ignore:enable_nested_tensor", "ignore:dropout option"
)
@pytest.mark.parametrize("name", [*OPERATIONS, *MODULES])
def test_values_and_derivatives(name):
    f, inputs = case(name)
    with torch.no_grad(), Decomposed():
        found = f(*inputs)
    with torch.no_grad():
        expected = f(*inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    pattern = normal(*expected.shape)
    # The fast path has no derivative, nor has the fused attention a second one.
    with sdpa_kernel(SDPBackend.MATH):
        own = gradients(f, inputs, pattern)
        directions = [normal(*value.shape) for value in inputs]
        h = 1e-3 / math.sqrt(sum(float(v.square().sum()) for v in directions))
        moved = [
            gradients(f, [x + step * h * v for x, v in zip(inputs, directions, strict=True)], pattern)
            for step in (-2, -1, 1, 2)
        ]
    with Decomposed():
        first = gradients(f, inputs, pattern)
    for a, b in zip(first, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    leaves = [value.detach().requires_grad_() for value in inputs]
    with Decomposed():
        first = torch.autograd.grad((f(*leaves) * pattern).sum(), leaves, create_graph=True)
    along = sum((g * v).sum() for g, v in zip(first, directions, strict=True))
    if not along.requires_grad:  # piecewise linear
        return
    second = torch.autograd.grad(along, leaves, materialize_grads=True)
    for entry, found in enumerate(second):
        values = [step[entry] for step in moved]
        expected = sum(c * value for c, value in zip((1, -8, 8, -1), values, strict=True)) / (12 * h)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


class Listening(TorchFunctionMode):
    """Lists the builtin operations, and what functions they were written out into."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        body = WRITTEN_OUT.get(func) or without_dispatch(func)
        if body is not None:
            with self:
                return body(*args, **(kwargs or {}))
        self.heard.append((func, args))
        return func(*args, **(kwargs or {}))

    def weights_of(self, func):
        return [args[1] for heard, args in self.heard if heard is func]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_mode_that_reenters_itself_sees_every_linear_map_with_its_weights():
    """Those in attention as views of the packed weights where query and key differ; no fast path is taken."""
    x = torch.randn(2, 5, 4)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 2).eval()
    with Listening() as mode, torch.no_grad():
        encoder(x, src_key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    seen = {id(weight) for weight in mode.weights_of(F.linear)}
    assert seen == {id(p) for name, p in encoder.named_parameters() if p.ndim == 2}
    attention = nn.MultiheadAttention(4, 2)
    with Listening() as mode:
        attention(x, x[:, :3].repeat(1, 2, 1)[:, :5], x)
    assert len(mode.weights_of(F.linear)) == 4
    lstm = nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
    with Listening() as mode:
        lstm(torch.randn(7, 2, 3))
    weights = mode.weights_of(F.linear)
    for name, parameter in lstm.named_parameters():
        if name.startswith("weight"):
            assert sum(weight is parameter for weight in weights) == (1 if "_ih_" in name else 7)


def test_undispatched_functions_keep_their_defaults_and_choices():
    assert without_dispatch(torch.add) is None
    assert without_dispatch(lambda x: x) is None
    x = torch.randn(2, 3, 8, 8)
    assert without_dispatch(F.max_pool2d) is without_dispatch(F.max_pool2d)
    values, indices = without_dispatch(F.max_pool2d)(x, 2, return_indices=True)
    torch.testing.assert_close(values, F.max_pool2d(x, 2))
    assert indices.dtype == torch.int64
    torch.testing.assert_close(
        without_dispatch(F.gelu if isinstance(F.gelu, type(case)) else F.silu)(x[0]), F.silu(x[0])
    )
    torch.testing.assert_close(without_dispatch(F.normalize)(x), F.normalize(x))
    torch.testing.assert_close(without_dispatch(torch.einsum)("ncij->nc", x), x.sum((2, 3)))
    assert F.max_pool2d(x, 2).shape == without_dispatch(F.adaptive_max_pool2d)(x, 4).shape


def test_what_cannot_be_written_out_is_left_to_torch():
    x = torch.randn(4, 2, 3)
    packed = pack_padded_sequence(x, torch.tensor([4, 2]))
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        rnn = kind(3, 4)
        with Decomposed():
            found = rnn(packed)[0].data
        torch.testing.assert_close(found, rnn(packed)[0].data)
    norm = nn.BatchNorm1d(3)
    with Decomposed():
        norm(x[0])
    assert norm.num_batches_tracked == 1
    assert bool(norm.running_mean.any())
    torch.manual_seed(1)
    with Decomposed():
        found = sdpa(x, x, x, dropout_p=0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(found, sdpa(x, x, x, dropout_p=0.5))
    dropping = nn.LSTM(3, 4, 2, dropout=0.5)
    torch.manual_seed(1)
    with Decomposed():
        found = dropping(x)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(found, dropping(x)[0])
