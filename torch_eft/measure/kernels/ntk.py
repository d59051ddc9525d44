"""The empirical neural tangent kernel of one network.

``H_{ij;ab} = sum_mu lambda_mu (dz_{i;a} / dtheta_mu) (dz_{j;b} / dtheta_mu)`` (PDLT 8.0), i, j outputs, a, b samples.

One forward records what every layer sees, one backward for all outputs what comes back (``capture.py``); the kernel
follows layer by layer, without forming the Jacobian where that is cheaper (``gram.py``). Parameters whose use is not
recognized have their Jacobian formed sample by sample. ``coverage`` says which is which; that both are right is
checked at first use (``verification.py``).
"""

from dataclasses import dataclass
from typing import Any, Literal, overload

from torch import Tensor
from torch.optim import Optimizer

from torch_eft.measure.forward.checks import MemoryLimitError, check_finite
from torch_eft.measure.forward.isolation import Model, isolated
from torch_eft.measure.forward.probe import OutputFn, as_probe
from torch_eft.measure.jacobian.blocks import Estimate
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY, JacobianGram
from torch_eft.measure.jacobian.plan import Lambdas
from torch_eft.measure.kernels.preconditioner import lambdas_of
from torch_eft.measure.kernels.random_outputs import projected
from torch_eft.results.choices import check_choice

Per = Literal["parameter", "layer"]


@overload
def ntk(
    model: Model,
    x: Any,
    *,
    lambdas: Lambdas = ...,
    trace: bool = ...,
    output_fn: OutputFn | None = ...,
    memory: int = ...,
    per: None = ...,
    other: Any = ...,
    preconditioner: Optimizer | None = ...,
    outputs: str | None = ...,
) -> Tensor: ...


@overload
def ntk(
    model: Model,
    x: Any,
    *,
    lambdas: Lambdas = ...,
    trace: bool = ...,
    output_fn: OutputFn | None = ...,
    memory: int = ...,
    per: Per,
    other: Any = ...,
    preconditioner: Optimizer | None = ...,
    outputs: str | None = ...,
) -> dict[str, Tensor]: ...


def ntk(
    model: Model,
    x: Any,
    *,
    lambdas: Lambdas = None,
    trace: bool = False,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
    per: Per | None = None,
    other: Any = None,
    preconditioner: Optimizer | None = None,
    outputs: str | None = None,
) -> Tensor | dict[str, Tensor]:
    """Compute the NTK of ``model`` on ``x``, in evaluation mode.

    What cannot be measured raises a ``ValueError`` that names it: a forward that rejects ``x``, outputs that are not
    (N, C), depend on chance or on the other samples, kernels that are not finite; ``MemoryLimitError`` if the result or
    the factors of one sample do not fit.

    Args:
        model: Any module. Frozen parameters do not contribute; tied ones count once.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        lambdas: The learning-rate tensor: one number, or ``{parameter name: lambda}`` for every trainable parameter,
            a number or a tensor of its shape; None means 1.
        trace: Average over outputs, (1/C) sum_i H_{ii;ab}.
        output_fn: Turns what the model returns into (N, C).
        memory: Bytes allowed for kernels, factors and graph; less means more recomputation. See ``ntk_estimate``.
        per: ``"parameter"`` or ``"layer"`` (the module that holds the parameter): the parts of the NTK, by name, which
            sum up to it.
        other: Other inputs, like ``x``: the cross kernel H(x, other).
        preconditioner: An optimizer of the model, in place of ``lambdas``: the kernel H_P = J lambda P J^T by which its
            latest step moved the outputs, per unit of eta; see ``preconditioner``.
        outputs: ``"probes:16"``: the kernel on 16 fixed random directions r_k of the outputs, r_k^T H_{ab} r_l, for
            networks of many outputs; ``as_trace`` and ``ntk_trace`` of it estimate those of the whole kernel, and
            ``random_output_estimates`` norms and changes too, with error bars. None: all outputs.

    Returns:
        ``[a, b, i, j] = H_{ij;ab}``, (N, N, C, C), or (N, N) with ``trace``; (N, N', ...) with ``other``; in the dtype
        of the parameters (at least float32), on their device. A dict of such tensors with ``per``.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> net = torch.nn.Linear(3, 2)  # z = W x + b: H_{ij;ab} = delta_ij (x_a . x_b + 1)
        >>> H = measure.ntk(net, torch.eye(3))
        >>> H.shape, H[:, :, 0, 0].tolist()
        (torch.Size([3, 3, 2, 2]), [[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]])
        >>> measure.ntk(net, torch.eye(3), trace=True, per="parameter")["bias"][0].tolist()
        [1.0, 1.0, 1.0]
    """
    if per is not None:
        check_choice("per", per, ("parameter", "layer"), "None for the whole kernel")
    part_of = None if per is None else (str if per == "parameter" else layer_of)
    with isolated(model, output_fn) as network:
        lambdas = lambdas_of(network.origin, lambdas, preconditioner)
        network = projected(network, outputs)
        rows = JacobianGram(network, as_probe(x), lambdas, memory)
        columns = None if other is None else JacobianGram(network, as_probe(other), lambdas, memory)
        parts = rows.ntk_parts(part_of, trace=trace, other=columns)
        check_finite(network, parts.values(), "the NTK is")
    return parts[""] if per is None else parts


def layer_of(name: str) -> str:
    """Return the module that holds a parameter; the parameter itself at the top level."""
    return name.rpartition(".")[0] or name


def ntk_estimate(
    model: Model,
    x: Any,
    *,
    lambdas: Lambdas = None,
    trace: bool = False,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
    outputs: str | None = None,
    seconds: bool = False,
) -> Estimate:
    """Estimate the memory that ``ntk`` will take, without computing it; arguments and errors as there.

    Args:
        model: See ``ntk``.
        x: See ``ntk``.
        lambdas: See ``ntk``.
        trace: See ``ntk``.
        output_fn: See ``ntk``.
        memory: See ``ntk``.
        outputs: See ``ntk``.
        seconds: Estimate the time too, by a forward and a backward pass of one sample. What is found out about the
            network is kept, so that ``ntk`` need not find it out again.

    Returns:
        Bytes of the result, of one sample and of all, and the blocks in which it will be computed.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> estimate = measure.ntk_estimate(torch.nn.Linear(3, 2), torch.eye(3))
        >>> estimate.kernels, estimate.blocks  # (3 * 3 * 2 * 2) numbers of four bytes
        (144, 1)
    """
    with isolated(model, output_fn) as network:
        engine = JacobianGram(projected(network, outputs), as_probe(x), lambdas, memory)
        estimate = engine.estimate(outputs=1 if trace else None)
        return engine.timed(estimate) if seconds else estimate


def too_large(
    model: Model,
    x: Any,
    *,
    trace: bool = False,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
    outputs: str | None = None,
) -> str | None:
    """Return why the NTK does not fit into ``memory`` bytes, or None if it does; arguments as for ``ntk``."""
    try:
        ntk_estimate(model, x, trace=trace, output_fn=output_fn, memory=memory, outputs=outputs)
    except MemoryLimitError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Coverage:
    """The way in which each trainable parameter enters the NTK.

    Args:
        structured: ``{parameter: kind of operation}``, by its layer's factors.
        fallback: ``{parameter: why}``, by its Jacobian, formed sample by sample.
        constant: Parameters with lambda = 0.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> measure.coverage(torch.nn.Linear(3, 2), torch.eye(3)).fallback
        {}
    """

    structured: dict[str, str]
    fallback: dict[str, str]
    constant: tuple[str, ...]

    def __str__(self) -> str:
        """Return one line per parameter."""
        lines = [f"{name}: {kind}" for name, kind in self.structured.items()]
        lines += [f"{name}: fallback, {why}" for name, why in self.fallback.items()]
        return "\n".join(lines + [f"{name}: constant (lambda = 0)" for name in self.constant])


def coverage(
    model: Model,
    x: Any,
    *,
    lambdas: Lambdas = None,
    output_fn: OutputFn | None = None,
) -> Coverage:
    """Return how ``ntk`` computes the Jacobian of each trainable parameter; arguments and errors as there.

    Args:
        model: See ``ntk``.
        x: See ``ntk``.
        lambdas: See ``ntk``.
        output_fn: See ``ntk``.

    Returns:
        Which parameters have layer factors, which fall back and why, and which are constant.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> print(measure.coverage(torch.nn.Linear(3, 2), torch.eye(3), lambdas={"weight": 1.0, "bias": 0.0}))
        weight: linear
        bias: constant (lambda = 0)
    """
    with isolated(model, output_fn) as network:
        engine = JacobianGram(network, as_probe(x), lambdas).checked()
        plan = engine.plan
        structured = {
            name: plan.kinds[name] for name in engine.trainable if name in plan.kinds and name not in plan.fallback
        }
        fallback = {name: plan.fallback[name] for name in engine.trainable if name in plan.fallback}
        return Coverage(structured, fallback, tuple(name for name in network.params if name not in engine.lambdas))
