"""Writes recurrent layers out over time in linear maps and elementwise operations.

The fused ones have a first derivative only. Here every linear map is one call of ``F.linear`` with the layer's own
weights: the map of the inputs for all times at once, that of the hidden state for each time step.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

State: TypeAlias = tuple[Tensor, ...]
Cell: TypeAlias = Callable[[Tensor, State, "_Weights"], State]
"""(input map of one time, state) -> the next state, whose first entry is the output."""


class _Weights:
    """The weights of one layer in one direction, in torch's order: w_ih, w_hh, then b_ih, b_hh, then w_hr."""

    def __init__(self, flat: Sequence[Any], has_biases: bool) -> None:
        self.w_ih, self.w_hh = flat[0], flat[1]
        self.b_ih: Tensor | None = flat[2] if has_biases else None
        self.b_hh: Tensor | None = flat[3] if has_biases else None
        rest = flat[4:] if has_biases else flat[2:]
        self.w_hr = rest[0] if rest else None


def lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool | None = None,
) -> tuple[Tensor, ...] | None:
    """As ``torch.lstm``; None for packed sequences and with dropout."""
    if isinstance(hx, Tensor) or batch_first is None:
        return None
    return _unrolled(
        _lstm_cell, input, tuple(hx), params, has_biases, num_layers, dropout, train, bidirectional, batch_first
    )


def gru(input: Tensor, hx: Tensor, params: Sequence[Tensor], *options: Any) -> tuple[Tensor, ...] | None:
    """As ``torch.gru``; None for packed sequences and with dropout."""
    return _of_one_state(_gru_cell, input, hx, params, *options)


def rnn_tanh(input: Tensor, hx: Tensor, params: Sequence[Tensor], *options: Any) -> tuple[Tensor, ...] | None:
    """As ``torch.rnn_tanh``; None for packed sequences and with dropout."""
    return _of_one_state(_rnn_cell(torch.tanh), input, hx, params, *options)


def rnn_relu(input: Tensor, hx: Tensor, params: Sequence[Tensor], *options: Any) -> tuple[Tensor, ...] | None:
    """As ``torch.rnn_relu``; None for packed sequences and with dropout."""
    return _of_one_state(_rnn_cell(torch.relu), input, hx, params, *options)


def _of_one_state(
    cell: Cell, input: Tensor, hx: Tensor, params: Sequence[Tensor], *options: Any
) -> tuple[Tensor, ...] | None:
    if isinstance(params, Tensor):  # packed: (data, batch_sizes, hx, params, ...)
        return None
    return _unrolled(cell, input, (hx,), params, *options)


def _unrolled(
    cell: Cell,
    x: Tensor,
    states: State,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...] | None:
    """Return (outputs, last states ...), the states (layers x directions, N, size) as torch has them."""
    if train and dropout > 0 and num_layers > 1:
        return None
    if batch_first:
        x = x.transpose(0, 1)
    directions = 2 if bidirectional else 1
    size = len(params) // (num_layers * directions)
    last = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            weights = _Weights(params[index * size : (index + 1) * size], has_biases)
            values, state = _over_time(
                cell, x, tuple(state[index] for state in states), weights, backwards=bool(direction)
            )
            outputs.append(values)
            last.append(state)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
    if batch_first:
        x = x.transpose(0, 1)
    return (x, *[torch.stack(parts) for parts in zip(*last, strict=True)])


def _over_time(cell: Cell, x: Tensor, state: State, weights: _Weights, backwards: bool) -> tuple[Tensor, State]:
    mapped = F.linear(x, weights.w_ih, weights.b_ih).unbind(0)
    values = []
    for entry in reversed(mapped) if backwards else mapped:
        state = cell(entry, state, weights)
        values.append(state[0])
    return torch.stack(values[::-1] if backwards else values), state


def _lstm_cell(mapped: Tensor, state: State, weights: _Weights) -> State:
    h, c = state
    i, f, g, o = (mapped + F.linear(h, weights.w_hh, weights.b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if weights.w_hr is None else F.linear(h, weights.w_hr)), c


def _gru_cell(mapped: Tensor, state: State, weights: _Weights) -> State:
    (h,) = state
    r, z, n = mapped.chunk(3, -1)
    r_h, z_h, n_h = F.linear(h, weights.w_hh, weights.b_hh).chunk(3, -1)
    new = (n + (r + r_h).sigmoid() * n_h).tanh()
    return (new + (z + z_h).sigmoid() * (h - new),)


def _rnn_cell(activation: Callable[[Tensor], Tensor]) -> Cell:
    def step(mapped: Tensor, state: State, weights: _Weights) -> State:
        return (activation(mapped + F.linear(state[0], weights.w_hh, weights.b_hh)),)

    return step


def _single(cell: Cell) -> Callable[..., Any]:
    def step(
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        weights = _Weights([w_ih, w_hh, b_ih, b_hh], has_biases=True)
        new = cell(F.linear(input, w_ih, b_ih), state, weights)
        return new[0] if isinstance(hx, Tensor) else new

    return step


CELLS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm_cell: _single(_lstm_cell),
    torch.gru_cell: _single(_gru_cell),
    torch.rnn_tanh_cell: _single(_rnn_cell(torch.tanh)),
    torch.rnn_relu_cell: _single(_rnn_cell(torch.relu)),
}
"""One step of one layer."""
