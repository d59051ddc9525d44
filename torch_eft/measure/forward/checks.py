"""Refuses networks that cannot be measured, with the reason and its remedy, instead of returning a wrong number.

``structure.check_structure`` looks at modules and parameters first. ``check_measurable`` reads all parameters once and
``check_batch_independence`` runs the forward on half of the probe; each waits for the device once. On the device "meta"
there are no values, and none are checked.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.forward.structure import all_finite, check_structure, has_values, place

ROUNDING = 1e3
"""Units of rounding by which a sample's output may depend on the size of the batch: kernels differ with the shape."""

_log = logging.getLogger("torch_eft")
_ONCE = torch.autograd.function.once_differentiable(lambda context: None).__code__


class MemoryLimitError(ValueError):
    """The result does not fit into the memory allowed; the message says how much it needs.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> try:
        ...     measure.ntk(torch.nn.Linear(3, 2), torch.eye(3), memory=100)
        ... except measure.MemoryLimitError as error:
        ...     print(str(error)[:15])
        memory: 9.5e-05
    """


class NotFiniteError(ValueError):
    """Parameters, outputs or derivatives are NaN or infinite, as where a training diverges.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Linear(1, 1)
        >>> _ = model.bias.data.fill_(torch.inf)
        >>> try:
        ...     measure.ntk(model, torch.ones(1, 1))
        ... except measure.NotFiniteError as error:
        ...     print(str(error)[:44])
        model: the parameter 'bias' is not finite, 1
    """


def check_measurable(network: nn.Module | IsolatedModel) -> None:
    """Refuse networks whose outputs are not finite functions of each sample, as far as this shows without a forward.

    Raises:
        ValueError: As ``check_structure``; for batch statistics in evaluation.
        NotFiniteError: For parameters that are not finite.
    """
    module = network if isinstance(network, nn.Module) else network.shadow
    check_structure(module)
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and (
            part.running_mean is None or part.running_var is None
        ):
            raise ValueError(
                f"model: {place(name, part)} normalizes with the statistics of the batch in evaluation, too "
                "(track_running_stats=False), so that a sample's output depends on the others; track running "
                "statistics, or use GroupNorm or LayerNorm"
            )
    parameters = dict(module.named_parameters())
    if all_finite(*parameters.values()):
        return
    wrong = next(name for name, value in parameters.items() if not all_finite(value))
    value = parameters[wrong].detach()
    raise NotFiniteError(
        f"model: the parameter {wrong!r} is not finite, {int((~value.isfinite()).sum())} of its {value.numel()} "
        "numbers are NaN or infinite (a training that diverged?); measure an earlier state"
    )


def check_finite(network: IsolatedModel, tensors: Collection[Tensor], name: str) -> None:
    """Refuse kernels that are not finite.

    Args:
        network: The network.
        tensors: What was computed.
        name: What it is, for the message.

    Raises:
        NotFiniteError: If one of them is not finite; the message names the parameter that is to blame, if one is.
    """
    # The least and the largest number: NaN if one is, and unlike a sum they do not overflow; nothing is copied.
    ends = [end for tensor in tensors if tensor.numel() for end in torch.aminmax(tensor.detach())]
    if not all_finite(*([torch.stack(ends)] if ends else [])):
        check_measurable(network)  # names the parameter
        raise NotFiniteError(f"model: {name} not finite though the parameters are; outputs or derivatives overflow")


def check_batch_independence(network: IsolatedModel, inputs: Any, outputs: Tensor) -> None:
    """Refuse forwards that are not differentiable functions of each sample.

    Every second sample is run once more, from the last to the first and with gradients: half a forward.

    Args:
        network: Isolated.
        inputs: N samples, where the network is.
        outputs: (N, C), as ``checked_output`` gives them.

    Raises:
        ValueError: For outputs that depend on chance or on the other samples, and for reentrant checkpointing,
            through which there are no such derivatives as are needed here.
        NotFiniteError: For outputs that are not finite.
    """
    count = len(outputs)
    order = torch.arange(count - 1, -1, -2, device=outputs.device)
    part = tree_map_only(Tensor, lambda tensor: tensor[order], inputs)
    again = _of_fewer(network, part, inputs)
    _check_graph(again)
    _check_gradients_are_on(network, part)
    if not has_values(outputs):
        return
    outputs = outputs.detach()
    finite = outputs.isfinite().all(1)
    if bool(finite.all() & _alike(again.detach(), outputs[order])):
        return
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise NotFiniteError(
            f"model: the output for sample {first} of the probe is NaN or infinite ({int((~finite).sum())} of "
            f"{count} samples); look at that input, or measure in float64"
        )
    with torch.no_grad():
        _check_repeated(network(network.params, inputs), outputs)
    difference = (again.detach() - outputs[order]).abs()
    if float(difference.max()) <= ROUNDING * torch.finfo(outputs.dtype).eps * _summed(again, int(difference.argmax())):
        return  # large terms whose sum is small leave rounding that is large beside it
    raise ValueError(
        f"model: a sample's output depends on the other samples of the batch: with half of them it differs by "
        f"{float(difference.max()):.3g}; normalize over features or with running statistics, "
        "and use no sample's place in the batch"
    )


def check_differentiable_function(network: IsolatedModel, inputs: Any) -> None:
    """Refuse forwards that are not differentiable functions of the whole batch; samples may see each other.

    The forward is run twice: without, and with gradients.

    Raises ``ValueError`` for outputs that depend on chance, and for reentrant checkpointing.

    Args:
        network: Isolated.
        inputs: Where the network is.
    """
    with torch.no_grad():
        outputs = network(network.params, tree_map_only(Tensor, torch.clone, inputs))
    again = _run_with_gradients(network, inputs)
    _check_graph(again)
    if has_values(outputs):
        _check_repeated(again.detach(), outputs)


def check_twice_differentiable(z: Tensor) -> None:
    """Refuse graphs with once differentiable functions: ``torch.autograd.grad`` takes their second derivative as zero.

    Raises:
        RuntimeError: Naming the function.
    """
    for node in _nodes(z):
        owner = getattr(node, "_forward_cls", None)
        if owner is not None and getattr(owner.backward, "__code__", None) is _ONCE:
            raise RuntimeError(f"the backward of {owner.__name__} is marked once_differentiable")


def differs_from_differences(
    found: Sequence[Tensor],
    order: int,
    function: Callable[[float], Sequence[Tensor]],
    reach: float,
    eps: float,
    kinked: bool,
) -> bool | None:
    """Compare a Taylor coefficient with central differences, in which no derivative of that order is taken.

    Args:
        found: The coefficient of s^order of the values of ``function``, in float64.
        order: 1, 2 or 3.
        function: Takes s to some tensors in float64.
        reach: The s at which the arguments have moved by their own length.
        eps: Rounding with which ``found`` was computed.
        kinked: Whether ``function`` is known to have kinks, which the first step shall not cross.

    Returns:
        Whether they differ; None if the differences do not settle, or ``function`` cannot be computed in float64.
    """
    before, settled = None, False
    for step in _STEPS[order if kinked or order > 1 else 0]:
        try:
            if before is None:
                # Over steps that are far too wide all differences are small, and seem to have settled. The widest
                # step, 1e-2 of the reach, is a tenth of this length: its central differences are right to 1 %.
                reach = min(reach, 10 * _own_length(found, order, function(0.0)))
            h = step * reach
            values = [(weight, function(multiple * h)) for multiple, weight in _STENCILS[order].items()]
        except (RuntimeError, TypeError, NotImplementedError) as error:
            _log.info("torch_eft: no differences in float64 (%s: %s)", type(error).__name__, error)
            return None
        terms = zip(*([weight * part for part in parts] for weight, parts in values), strict=True)
        difference = [torch.stack(parts).sum(0) / h**order for parts in terms]
        sizes = torch.stack([part.norm() for part in difference])
        size = torch.stack([part.norm() for part in values[0][1]]).max()
        rounding = 1e3 * (torch.finfo(torch.float64).eps / step**order + eps) * size / reach**order
        off = torch.stack([(a - b).norm() for a, b in zip(found, difference, strict=True)])
        # A wrong rule, or a part cut from the gradient, is off by much more than a thousandth.
        wrong = ~(off <= max(1e-3, eps**0.4) * sizes + 1e3 * eps * sizes.max() + rounding)
        if not bool(wrong.any()):
            return False
        if before is not None:
            moved = torch.stack([(a - b).norm() for a, b in zip(before, difference, strict=True)])
            settled |= bool((moved < 0.1 * off)[wrong].all())
        before = difference
    return True if settled else None


def _own_length(found: Sequence[Tensor], order: int, values: Sequence[Tensor]) -> float:
    """Return the s over which the term of s^order grows as large as the values: deep in chaos far below |theta|."""
    size, value = (torch.stack([part.norm() for part in parts]).max() for parts in (found, values))
    return float(torch.where((size > 0) & (value > 0), value / size, torch.inf)) ** (1 / order)


_STENCILS = {1: {1: 0.5, -1: -0.5}, 2: {1: 0.5, 0: -1.0, -1: 0.5}, 3: {2: 1 / 12, 1: -1 / 6, -1: 1 / 6, -2: -1 / 12}}
_STEPS = {0: (1e-5, 1e-3), 1: (1e-7, 1e-5, 1e-3), 2: (1e-4, 1e-3, 1e-2), 3: (1e-3, 3e-3, 1e-2)}
"""h / reach by order (0: of order 1 without kinks): where rounding leaves the first in doubt, the others decide."""


def reach_of(theta: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> float:
    """Return |theta| / |v| over the parameters of a direction; infinity where it does not move."""
    own, v = (torch.stack([part.double().norm() for part in parts]).norm() for parts in _pairs(theta, direction))
    return float(torch.where(own > 0, own, 1.0) / v)


def _pairs(theta: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return [theta[name] for name in direction], list(direction.values())


_trusting = False


@contextmanager
def trusting_derivatives(trusted: bool = True) -> Iterator[None]:
    """Compare higher derivatives with differences only at their first use, for every network and kind of inputs.

    A comparison takes five times as long as the derivatives themselves. The Jacobian is compared with ordinary passes
    at every use in any case.

    Args:
        trusted: False: compare at every use, as without this.

    Yields:
        Nothing.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> from torch_eft.measure.forward.checks import trusting_derivatives
        >>> net, x = torch.nn.Linear(3, 2), torch.eye(3)
        >>> with trusting_derivatives():
        ...     measure.dntk(net, x, torch.ones(3, 2)).norm()
        tensor(0.)
    """
    global _trusting
    before, _trusting = _trusting, trusted
    try:
        yield
    finally:
        _trusting = before


def derivatives_are_trusted() -> bool:
    """Return whether ``trusting_derivatives`` is in force."""
    return _trusting


@contextmanager
def derivatives_of_order(order: int, module: nn.Module) -> Iterator[None]:
    """Turn torch's error about a missing derivative into one that names the network and a remedy.

    Args:
        order: Order of the derivatives that are taken inside.
        module: The network.

    Yields:
        Nothing.

    Raises:
        RuntimeError: If memory runs out, as torch has it.
        ValueError: If an operation has no derivative of that order.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"model: an operation of {type(module).__name__} has no derivative of order {order} "
            f"({str(error).splitlines()[0]}); ask for a lower order, or write it in elementary operations (an "
            "embedding bag as a sum over an embedding, cdist as norms of differences)"
        ) from error


def _check_gradients_are_on(network: IsolatedModel, inputs: Any) -> None:
    """Refuse forwards that switch gradients off for what is trained."""

    def used(mode: bool) -> tuple[Tensor, set[str], set[str]]:
        leaves = {name: value.detach().requires_grad_() for name, value in network.params.items()}
        # In training mode buffers may be updated.
        own = replace(network, constants={name: value.clone() for name, value in network.constants.items()})
        network.isolation.without_gradient.clear()
        with network.isolation.training_as([mode for _ in network.module.modules()]):
            z = own(leaves, tree_map_only(Tensor, torch.clone, inputs))
        ends = {id(getattr(node, "variable", None)) for node in _nodes(z)} if z.requires_grad else set()
        without = network.isolation.without_gradient
        reached = {name for name, leaf in leaves.items() if id(leaf) in ends}
        return z, reached, {name for name, leaf in leaves.items() if id(leaf) in without} - reached

    if not network.isolation.without_gradient:
        return
    z, _, cut = used(False)
    if cut and z.requires_grad:
        try:
            cut &= used(True)[1]
        except Exception:  # its training takes something else
            return
    if cut:
        remedy = "let it have them, without self.training, or measure the submodule that is trained"
        when = "in evaluation mode" if z.requires_grad else "(torch.no_grad), so that its output has none"
        raise ValueError(f"model: its forward uses {min(cut)!r}, which is trained, with gradients off {when}; {remedy}")


def _check_repeated(repeated: Tensor, outputs: Tensor) -> None:
    if not bool(_alike(repeated, outputs)):
        raise ValueError(
            f"model: a sample's output depends on chance: the same inputs twice gave outputs that differ by "
            f"{float((repeated - outputs).abs().max()):.3g}, in evaluation mode; use nn.Dropout, or "
            "F.dropout(x, p, training=self.training), and draw nothing in the forward"
        )


def _alike(values: Tensor, reference: Tensor) -> Tensor:
    scale = reference.abs().max().clamp_min(torch.finfo(reference.dtype).tiny)
    return ((values - reference).abs() <= ROUNDING * torch.finfo(reference.dtype).eps * scale).all()


def _summed(values: Tensor, index: int) -> float:
    """Size of what is added up to one of the values: sum |df / dtheta theta|, that of a read-out's terms for one."""
    output = values.flatten()[index]
    leaves = [node.variable for node in _nodes(output) if hasattr(node, "variable")]
    slopes = torch.autograd.grad(output, leaves, allow_unused=True)
    return sum(
        float((slope * leaf.detach()).abs().sum())
        for slope, leaf in zip(slopes, leaves, strict=True)
        if slope is not None
    )


def _of_fewer(network: IsolatedModel, part: Any, inputs: Any) -> Tensor:
    """Run on a part of the samples; a forward that only takes all of them is refused."""
    try:
        return _run_with_gradients(network, part)
    except (RuntimeError, IndexError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        _run_with_gradients(network, inputs)  # raises what has nothing to do with their number
        raise ValueError(
            f"model: the forward takes all samples of the probe, but not half of them ({error}); their number is "
            "written into the model: take it from the inputs, as in x.view(len(x), -1)"
        ) from error


def _run_with_gradients(network: IsolatedModel, inputs: Any) -> Tensor:
    """Run with gradients of the inputs as well: otherwise a reentrant checkpoint is not a node of the graph."""
    leaves = {name: value.detach().requires_grad_() for name, value in network.params.items()}
    network.isolation.without_gradient.clear()

    def with_gradient(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_().clone() if tensor.is_floating_point() else tensor

    return network(leaves, tree_map_only(Tensor, with_gradient, inputs))


def _check_graph(value: Tensor) -> None:
    if any(node.name() == "CheckpointFunctionBackward" for node in _nodes(value)):
        raise ValueError(
            "model: its forward uses reentrant checkpointing, which has no derivatives by torch.autograd.grad (and "
            "loses those of a block whose inputs have none); pass use_reentrant=False to torch.utils.checkpoint, or "
            "checkpoint in training mode only"
        )


def _nodes(value: Tensor) -> Iterator[Any]:
    pending, seen = [value.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending += [previous for previous, _ in node.next_functions]
