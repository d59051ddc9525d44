"""The network's output on the probe, and the checks that make a network measurable."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_eft.measure.forward.isolation import IsolatedModel, Model, isolated
from torch_eft.measure.forward.isolation.operations import RefusedForwardError
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe


def output(model: Model, x: Any, *, output_fn: OutputFn | None = None) -> Tensor:
    """Compute the network's output on ``x`` in evaluation mode.

    Raises ``ValueError`` if the forward rejects ``x`` or changes it in place, or what it returns is not (N, C).

    Args:
        model: Any module.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        output_fn: Turns what the model returns into (N, C).

    Returns:
        (N, C).

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5))
        >>> measure.output(model, torch.eye(3)).shape  # without dropout
        torch.Size([3, 2])
    """
    probe = as_probe(x)
    with isolated(model, output_fn) as network, torch.no_grad():
        return checked_output(network, probe)


def last_token(returned: Any) -> Tensor:
    """Return the outputs at the last position of a sequence: an ``output_fn`` for language models.

    Those of transformers need not compute the other positions, with ``"logits_to_keep": 1`` among the inputs.

    Args:
        returned: What the model returns: (N, T, C), or an object, a dict or a tuple that holds it as ``logits``, or
            first. Sequences padded at the end have no token there: cut them to one length, or pad at the start.

    Returns:
        (N, C).

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> measure.last_token({"logits": torch.zeros(4, 128, 50257)}).shape
        torch.Size([4, 50257])
    """
    return _by_position(returned)[:, -1]


def mean_over_tokens(returned: Any) -> Tensor:
    """Return the outputs averaged over the positions of a sequence, padded ones too; see ``last_token``.

    Args:
        returned: As for ``last_token``.

    Returns:
        (N, C).

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> measure.mean_over_tokens(torch.ones(4, 128, 7)).shape
        torch.Size([4, 7])
    """
    return _by_position(returned).mean(1)


@dataclass(frozen=True)
class Tokens:
    """The outputs at chosen positions of a sequence, side by side: an ``output_fn``; see ``last_token``.

    Args:
        positions: Numbers from 0 on, or negative ones from the end on.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> measure.Tokens((0, 63, -1))(torch.zeros(4, 128, 50257)).shape  # H on random directions of them, say
        torch.Size([4, 150771])
    """

    positions: tuple[int, ...]

    def __call__(self, returned: Any) -> Tensor:
        """Return (N, number of positions times C)."""
        z = _by_position(returned)
        return torch.cat([z[:, position] for position in self.positions], 1)


def _by_position(returned: Any) -> Tensor:
    """The tensor (N, T, C) in what a model returns."""
    found = getattr(returned, "logits", None)
    if found is None and isinstance(returned, Mapping):
        found = returned.get("logits")
    if found is None and isinstance(returned, tuple | list) and returned:
        found = returned[0]
    found = returned if found is None else found
    if not isinstance(found, Tensor) or found.ndim != 3:
        given = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"output_fn: the model returns {given}, not outputs by position, (N, T, C); give an output_fn of your own, "
            "such as lambda out: out.last_hidden_state[:, -1]"
        )
    return found


def checked_output(network: IsolatedModel, probe: Probe, params: dict[str, Tensor] | None = None) -> Tensor:
    """Compute the output of an isolated network.

    Args:
        network: The network.
        probe: N samples.
        params: Parameters in the place of its own.

    Returns:
        (N, C).

    Raises:
        ValueError: As ``output``.
        RefusedForwardError: If the forward does what cannot be measured.
    """
    inputs = tree_map_only(Tensor, torch.clone, network.place(probe))
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    versions = [tensor._version for tensor in tensors]
    params = network.params if params is None else params
    try:
        result = network(params, inputs)
    except RefusedForwardError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"probe: {probe.description} given, which the forward of {type(network.shadow).__name__} (or output_fn) "
            f"rejects: {reason}. {_tried(network, params, inputs) or _AS_IT_TAKES_THEM}"
        ) from error
    if [tensor._version for tensor in tensors] != versions:
        raise ValueError(
            f"model: the forward of {type(network.shadow).__name__} changes its inputs in place, and would change the "
            "probe from one measurement to the next; let it work on a copy, x = x.clone(), or without inplace=True"
        )
    if not isinstance(result, Tensor) or result.ndim != 2 or len(result) != probe.size or result.shape[1] == 0:
        given = f"a tensor {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        if isinstance(inputs, Tensor) and inputs.ndim in (1, 3) and _fits(network, params, inputs[None], 1):
            raise ValueError(f"probe: {probe.description} given, one sample without its batch axis; {_ONE_SAMPLE}")
        raise ValueError(
            f"output_fn: the output for {probe.size} samples is {given}, not a tensor ({probe.size}, C) with C >= 1; "
            f"{_remedy(result, probe.size)}"
        )
    if not result.is_floating_point():
        kind = str(result.dtype).removeprefix("torch.")
        remedy = "lambda z: torch.view_as_real(z).flatten(1)" if result.is_complex() else "that returns the logits"
        raise ValueError(
            f"output_fn: the output is {kind}, and the measurements are for real outputs; give an output_fn {remedy}"
        )
    return result


_AS_IT_TAKES_THEM = "Give inputs as the forward takes them, or name the submodule to measure"
_ONE_SAMPLE = "give x[None], or better a few samples, x[:16]"
_TARGETS = ("labels", "label", "label_ids", "targets", "target", "y")
"""Names under which batches hold what is no input."""


def _tried(network: IsolatedModel, params: Mapping[str, Tensor], inputs: Any) -> str:
    """What to give instead of inputs that the forward rejects, found by trying; empty if nothing was."""
    for instead, sentence in _alternatives(inputs, next(iter(params.values())).dtype):
        if _fits(network, params, instead):
            return sentence
    return ""


def _alternatives(inputs: Any, dtype: torch.dtype) -> Iterator[tuple[Any, str]]:
    if isinstance(inputs, tuple | list) and len(inputs) > 1:
        yield inputs[0], "This looks like a batch (inputs, targets): give its inputs alone, batch[0]"
    if isinstance(inputs, dict):
        targets = [name for name in inputs if name in _TARGETS]
        rest = {name: value for name, value in inputs.items() if name not in targets}
        if targets and rest:
            yield rest, f"This looks like a batch with its targets: leave out {', '.join(map(repr, targets))}"
            if len(rest) == 1:
                ((name, x),) = rest.items()
                yield x, f"This looks like a batch with its targets: give its inputs alone, batch[{name!r}]"
    if isinstance(inputs, Tensor):
        yield inputs[None], f"This looks like one sample without its batch axis: {_ONE_SAMPLE}"
        if not inputs.is_floating_point():
            yield (
                inputs.to(dtype),
                "Integers are given where the forward takes numbers of its parameters' kind: x.float()",
            )
        else:
            yield inputs.long(), "Numbers are given where the forward takes indices: x.long()"
        if inputs.ndim > 2:
            yield inputs.flatten(1), "The forward takes rows: give x.flatten(1), or begin the network with nn.Flatten()"
        yield inputs[:, None], "The forward takes a channel axis: give x[:, None]"


def _fits(network: IsolatedModel, params: Mapping[str, Tensor], inputs: Any, samples: int | None = None) -> bool:
    """Whether the forward takes these inputs, and returns a row for each of ``samples``, if that is asked."""
    try:
        result = network(dict(params), tree_map_only(Tensor, torch.clone, inputs))
    except Exception:  # the forward's own errors are of many kinds
        return False
    return samples is None or (isinstance(result, Tensor) and result.ndim == 2 and len(result) == samples)


def _remedy(result: Any, samples: int) -> str:
    if isinstance(result, dict) and result:
        return f"pick one, for example output_fn=lambda out: out[{next(iter(result))!r}]"
    if isinstance(result, tuple | list) and result:
        return "pick one, for example output_fn=lambda out: out[0]"
    if not isinstance(result, Tensor):
        return "give an output_fn that turns it into one"
    if 0 in result.shape:
        return "there is no output (C = 0) to measure; is the last layer's width 0, or a selection empty?"
    if result.ndim == 0:
        return "the forward returns one number, perhaps the loss; give the submodule, or an output_fn, with the outputs"
    if len(result) != samples:
        return "its first axis is not the samples; give an output_fn that brings them to the front"
    if result.ndim == 1:
        return "give output_fn=lambda z: z[:, None]"
    return (
        "it has more than one axis besides the samples; give output_fn=lambda z: z.flatten(1) for all of it, or take "
        "one position, for example output_fn=lambda z: z[:, -1]"
    )
