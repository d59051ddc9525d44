"""The empirical neural tangent kernel of one network.

``H_{ij;ab} = sum_mu lambda_mu (dz_{i;a} / dtheta_mu) (dz_{j;b} / dtheta_mu)`` (PDLT 8.0), i, j outputs, a, b samples.

One forward records what every layer sees, one backward for all outputs what comes back (``capture.py``); the kernel
follows layer by layer, without forming the Jacobian where that is cheaper (``gram.py``). Parameters whose use is not
recognized have their Jacobian formed sample by sample. Which is which is ``coverage``; that both are right is checked
at first use (``verification.py``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

from torch import Tensor

from torch_eft.measure.forward.checks import MemoryLimitError
from torch_eft.measure.forward.isolation import Model, isolated
from torch_eft.measure.forward.probe import OutputFn, as_probe
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY, Estimate, JacobianGram, check_finite
from torch_eft.results.choices import check_choice

Per = Literal["parameter", "layer"]


@overload
def ntk(
    model: Model,
    x: Any,
    *,
    lambdas: Mapping[str, float] | float | None = ...,
    trace: bool = ...,
    output_fn: OutputFn | None = ...,
    memory: int = ...,
    per: None = ...,
    other: Any = ...,
) -> Tensor: ...


@overload
def ntk(
    model: Model,
    x: Any,
    *,
    lambdas: Mapping[str, float] | float | None = ...,
    trace: bool = ...,
    output_fn: OutputFn | None = ...,
    memory: int = ...,
    per: Per,
    other: Any = ...,
) -> dict[str, Tensor]: ...


def ntk(
    model: Model,
    x: Any,
    *,
    lambdas: Mapping[str, float] | float | None = None,
    trace: bool = False,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
    per: Per | None = None,
    other: Any = None,
) -> Tensor | dict[str, Tensor]:
    """The NTK of ``model`` on ``x``, in evaluation mode.

    Args:
        model: Any module. Frozen parameters do not contribute; tied ones count once.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        lambdas: The learning-rate tensor: one number, or ``{parameter name: lambda}`` for every
            trainable parameter; None means 1.
        trace: Average over outputs, (1/C) sum_i H_{ii;ab}.
        output_fn: Turns what the model returns into (N, C).
        memory: Bytes allowed for kernels, factors and graph; less means more recomputation. ``ntk_estimate``
            tells what a measurement takes.
        per: ``"parameter"`` or ``"layer"`` (the module that holds the parameter): the parts of the NTK, by name, which
            sum up to it.
        other: Other inputs, like ``x``: the cross kernel H(x, other).

    Returns:
        ``[a, b, i, j] = H_{ij;ab}``, (N, N, C, C), or (N, N) with ``trace``; (N, N', ...) with ``other``; in the dtype
        of the parameters (at least float32), on their device. A dict of such tensors with ``per``.

    Raises:
        ValueError: If the forward rejects ``x``, the output is not (N, C), ``lambdas`` does not name
            the trainable parameters or is negative, there are none, the result or the factors of one sample do not
            fit into ``memory``, the kernel is not finite, or the forward is no function of each sample.
    """
    if per is not None:
        check_choice("per", per, ("parameter", "layer"), "None for the whole kernel")
    part_of = None if per is None else (str if per == "parameter" else layer_of)
    with isolated(model, output_fn) as network:
        rows = JacobianGram(network, as_probe(x), lambdas, memory)
        columns = None if other is None else JacobianGram(network, as_probe(other), lambdas, memory)
        parts = rows.ntk_parts(part_of, trace=trace, other=columns)
        check_finite(network, parts.values(), "the NTK is")
    return parts[""] if per is None else parts


def layer_of(name: str) -> str:
    """The module that holds a parameter; the parameter itself at the top level."""
    return name.rpartition(".")[0] or name


def ntk_estimate(
    model: Model,
    x: Any,
    *,
    lambdas: Mapping[str, float] | float | None = None,
    trace: bool = False,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Estimate:
    """What ``ntk`` will take, in bytes, without computing it; arguments and errors as there."""
    with isolated(model, output_fn) as network:
        engine = JacobianGram(network, as_probe(x), lambdas, memory)
        return engine.estimate(outputs=1 if trace else None)


def too_large(
    model: Model, x: Any, *, trace: bool = False, output_fn: OutputFn | None = None, memory: int = DEFAULT_MEMORY
) -> str | None:
    """Why the NTK does not fit into ``memory`` bytes, or None if it does."""
    try:
        ntk_estimate(model, x, lambdas=None, trace=trace, output_fn=output_fn, memory=memory)
    except MemoryLimitError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Coverage:
    """How each trainable parameter enters the NTK.

    Args:
        structured: ``{parameter: kind of operation}``, by its layer's factors.
        fallback: ``{parameter: why}``, by its Jacobian, formed sample by sample.
        constant: Parameters with lambda = 0.
    """

    structured: dict[str, str]
    fallback: dict[str, str]
    constant: tuple[str, ...]

    def __str__(self) -> str:
        """A line a parameter."""
        lines = [f"{name}: {kind}" for name, kind in self.structured.items()]
        lines += [f"{name}: fallback, {why}" for name, why in self.fallback.items()]
        return "\n".join(lines + [f"{name}: constant (lambda = 0)" for name in self.constant])


def coverage(
    model: Model,
    x: Any,
    *,
    lambdas: Mapping[str, float] | float | None = None,
    output_fn: OutputFn | None = None,
) -> Coverage:
    """How ``ntk`` has each trainable parameter; arguments and errors as there."""
    with isolated(model, output_fn) as network:
        engine = JacobianGram(network, as_probe(x), lambdas)
        plan = engine.plan
        structured = {
            name: plan.kinds[name] for name in engine.trainable if name in plan.kinds and name not in plan.fallback
        }
        fallback = {name: plan.fallback[name] for name in engine.trainable if name in plan.fallback}
        return Coverage(structured, fallback, tuple(name for name in network.params if name not in engine.lambdas))
