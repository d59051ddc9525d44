"""Gram matrices of a network's Jacobian and its derivatives along a direction: planned, verified, in blocks."""

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from torch_eft.measure.forward.checks import (
    MemoryLimitError,
    check_batch_independence,
    check_measurable,
    derivatives_of_order,
)
from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import Probe
from torch_eft.measure.forward.structure import all_finite
from torch_eft.measure.jacobian.blocks import Estimate, GramBlocks, readable, summed_over_outputs
from torch_eft.measure.jacobian.factors import jacobian_factors
from torch_eft.measure.jacobian.fallback import reverse_factors
from torch_eft.measure.jacobian.gram import Factor, Orders
from torch_eft.measure.jacobian.plan import JacobianPlan, make_plan, sample_count, slice_of
from torch_eft.measure.jacobian.verification import mismatches
from torch_eft.measure.jets.jet import NoJetRuleError
from torch_eft.results.choices import nearest

DEFAULT_MEMORY = 2**30
"""Bytes that kernels, factors and graph may take."""

_log = logging.getLogger("torch_eft")
_REMEMBERED = 16  # plans and methods of one module


class _Remembered(WeakKeyDictionary[nn.Module, dict[Any, Any]]):
    """Plans and methods by module, probe shape and output function; the oldest are forgotten."""

    def get_or_make(self, network: IsolatedModel, key: Any, make: Callable[[], Any]) -> Any:
        known = self.setdefault(network.origin, {})
        if key not in known:
            value = make()
            if len(known) >= _REMEMBERED:
                del known[next(iter(known))]
            # The function is kept alive with it: its id is part of the key.
            known[key] = value, network.output_fn
        return known[key][0]


_plans, _methods = _Remembered(), _Remembered()

JETS = "jets"


@dataclass(frozen=True)
class GramMatrices:
    """Gram matrices of the Jacobian's Taylor coefficients along a direction.

    Args:
        matrices: ``{(m, n): J_m lambda J_n^T}``, ``[a, b, i, j]``, (N, N', C, C) or, for a trace, (N, N').
        method: How the coefficients were computed: ``"jets"``, or ``"reverse mode"`` and why.
    """

    matrices: dict[Orders, Tensor]
    method: str

    def __getitem__(self, orders: Orders) -> Tensor:
        """Return one of the matrices."""
        return self.matrices[orders]


class JacobianGram:
    """Gram matrices of the Jacobian of a network on a probe, weighted with lambda.

    Args:
        network: The network, isolated.
        probe: The inputs.
        lambdas: As ``ntk`` takes them.
        memory: Bytes allowed.

    Attributes:
        samples: N.
        outputs: C.
        lambdas: ``{parameter: lambda}``, those above 0.
        trainable: Their names.
        plan: How each parameter's Jacobian is computed.

    Raises:
        ValueError: If the network cannot be measured; the message says why.
    """

    def __init__(
        self,
        network: IsolatedModel,
        probe: Probe,
        lambdas: Mapping[str, float] | float | None = None,
        memory: int = DEFAULT_MEMORY,
    ) -> None:
        if isinstance(memory, str) or not hasattr(memory, "__index__"):
            raise ValueError(f"memory: {memory!r} given; give a whole number of bytes, such as 2**30")
        self.network = network
        self.lambdas = checked_lambdas(network, lambdas)
        self.trainable = list(self.lambdas)
        self.memory = memory
        self.inputs = network.place(probe)
        self.samples = probe.size
        self.plan = self._planned(probe)
        self.outputs = self.plan.outputs
        self._like = network.params[self.trainable[0]] if self.trainable else next(iter(network.params.values()))

    # ---- planning

    def _key(self) -> Any:
        shapes = [(name, value.shape, value.dtype) for name, value in self.network.params.items()]
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(self.inputs) if isinstance(leaf, Tensor)]
        inputs = [(leaf.shape[1:], leaf.dtype) for leaf in leaves]
        return str((shapes, inputs, self.trainable, self.samples == 1, id(self.network.output_fn)))

    def _planned(self, probe: Probe) -> JacobianPlan:
        def make() -> JacobianPlan:
            check_measurable(self.network)
            with torch.no_grad():
                outputs = checked_output(self.network, probe)
            check_batch_independence(self.network, probe, outputs)
            few = slice_of(self.inputs, 0, min(3, self.samples))
            return self._verified(make_plan(self.network, self.inputs, self.trainable, {}), few)

        return _plans.get_or_make(self.network, self._key(), make)

    def _verified(self, plan: JacobianPlan, few: Any) -> JacobianPlan:
        """Leave what does not agree with an ordinary backward pass to the fallback."""
        for attempt in range(2):
            try:
                factors = jacobian_factors(self.network, few, self.trainable, plan)
            except CheckpointError:
                reason = "a checkpoint runs its part of the forward again, unrecorded"
                plan = make_plan(self.network, self.inputs, self.trainable, dict.fromkeys(self.trainable, reason))
                factors = jacobian_factors(self.network, few, self.trainable, plan)
            wrong = mismatches(self.network, few, factors, self.trainable)
            if not wrong:
                return plan
            if attempt == 0:
                refused = {name: f"its factors disagree with backward: {sizes}" for name, sizes in wrong.items()}
                plan = make_plan(self.network, self.inputs, self.trainable, {**plan.fallback, **refused})
        name, sizes = next(iter(wrong.items()))
        raise ValueError(
            f"model: the Jacobian of {name!r} cannot be trusted: |u . J| is {sizes}. The forward does not depend on "
            "its parameters and each sample alone (random operations, samples that see each other, state that "
            "changes); measure the part of it that does"
        )

    # ---- memory

    def estimate(
        self,
        orders: int = 1,
        kernels: int = 1,
        columns: int | None = None,
        outputs: int | None = None,
        method: str = JETS,
    ) -> Estimate:
        """Estimate the memory of Gram matrices.

        Args:
            orders: Number of Taylor coefficients of the Jacobian.
            kernels: Number of results.
            columns: Number of samples of the columns, if others than the rows.
            outputs: C of the results; 1 for a trace.
            method: See ``GramMatrices``.

        Returns:
            The estimate, with blocks as large as fit.

        Raises:
            MemoryLimitError: If not even one sample fits, or the results do not.
        """
        count, channels = self.samples, self.outputs
        size = self._like.element_size()
        own = outputs or channels
        result = kernels * count * (columns or count) * own * own * size
        numels = {name: value.numel() for name, value in self.network.params.items()}
        fallback = channels * sum(numels[name] for name in self.plan.fallback) * size
        sample = orders * (self.plan.sample_bytes + 2 * fallback)
        if method != JETS:
            sample = (orders + 1) * channels * sum(numels[name] for name in self.trainable) * size
        whole = result + count * sample
        if columns is None and whole <= self.memory:
            return Estimate(sample, result, count, 1, whole)
        block = min(count, (self.memory - result) // max(1, 2 * sample))
        if block < 1:
            raise MemoryLimitError(
                f"memory: {readable(self.memory)} allowed, {readable(result + 2 * sample)} needed at least: "
                f"{readable(result)} for the kernels of {count} samples and {own} output{'s' if own > 1 else ''}, "
                f"{readable(2 * sample)} for the factors of two samples. Allow more, or take fewer samples, fewer "
                "outputs (output_fn) or trace=True"
            )
        blocks = math.ceil(count / block)
        return Estimate(sample, result, block, blocks, result + 2 * block * sample)

    # ---- computing

    def ntk(self, *, trace: bool = False, other: "JacobianGram | None" = None) -> Tensor:
        """Return J lambda J^T.

        Args:
            trace: Average over outputs.
            other: The columns' network and probe; None for those of the rows.

        Returns:
            ``[a, b, i, j]``, (N, N', C, C) or, for a trace, (N, N').
        """
        return self.ntk_parts(None, trace=trace, other=other)[""]

    def ntk_parts(
        self, part_of: Callable[[str], str] | None, *, trace: bool = False, other: "JacobianGram | None" = None
    ) -> dict[str, Tensor]:
        """Return J lambda J^T by groups of parameters.

        Args:
            part_of: From parameter to the name of its group; None for one group named "".
            trace: See ``ntk``.
            other: See ``ntk``.

        Returns:
            ``{group: (N, N', C, C) or (N, N')}``, which add up to the whole.
        """
        parts = self._computed([(0, 0)], None, JETS, trace, part_of, other)
        return {name: matrices[0, 0] for name, matrices in parts.items()}

    def gram(
        self,
        pairs: Collection[Orders],
        direction: Mapping[str, Tensor],
        *,
        trace: bool = False,
        other: "JacobianGram | None" = None,
    ) -> GramMatrices:
        """Return J_m lambda J_n^T for every pair of orders (m, n), J = J_0 + s J_1 + .. along a direction.

        Args:
            pairs: Orders of rows and columns.
            direction: ``{parameter: tensor}`` for every parameter of ``trainable``.
            trace: See ``ntk``.
            other: See ``ntk``.
        """
        order = max(max(pair) for pair in pairs)
        method = self._method(order, direction) if order else JETS
        return GramMatrices(self._computed(pairs, direction, method, trace, None, other)[""], method)

    def gram_blocks(
        self,
        pairs: Collection[Orders] = ((0, 0),),
        *,
        trace: bool = False,
        part_of: Callable[[str], str] | None = None,
        other: "JacobianGram | None" = None,
    ) -> GramBlocks:
        """Return the sums to which blocks are added, zero at first; arguments as for ``gram`` and ``ntk_parts``."""
        C = 1 if trace else self.outputs
        shape = (C, self.samples, C, self.samples if other is None else other.samples)
        labels = {name: "" if part_of is None else part_of(name) for name in self.trainable}
        return GramBlocks(self._like, shape, pairs, self.lambdas, labels, other is None)

    def _computed(
        self,
        pairs: Collection[Orders],
        direction: Mapping[str, Tensor] | None,
        method: str,
        trace: bool,
        part_of: Callable[[str], str] | None,
        other: "JacobianGram | None",
    ) -> dict[str, dict[Orders, Tensor]]:
        order = max(max(pair) for pair in pairs)
        columns = self if other is None else other
        sums = self.gram_blocks(pairs, trace=trace, part_of=part_of, other=other)
        kernels = len(pairs) * len(sums.parts)
        estimate = self.estimate(
            order + 1, kernels, None if other is None else other.samples, 1 if trace else None, method
        )
        _log.info("torch_eft: %s", estimate)
        blocks = self._blocks(estimate.block, order, direction, method, trace)
        for i, (row, first) in enumerate(blocks):
            if other is None:
                sums.add(row, row, first, first)
            if other is not None or estimate.blocks > 1:
                start = (i + 1) if other is None else 0
                for column, second in columns._blocks(estimate.block, order, direction, method, trace, start):
                    sums.add(row, column, first, second)
        return sums.finished(self.outputs if trace else None)

    def _blocks(
        self,
        block: int,
        order: int,
        direction: Mapping[str, Tensor] | None,
        method: str,
        trace: bool,
        start: int = 0,
    ) -> Iterator[tuple[slice, list[Factor]]]:
        """Samples and their factors, block by block from block number ``start``."""
        for begin in range(start * block, self.samples, block):
            inputs = slice_of(self.inputs, begin, block)
            if method == JETS:
                factors = self.factors(inputs, direction, order)
            else:
                assert direction is not None
                factors = reverse_factors(self.network, inputs, self.trainable, direction, order)
            yield slice(begin, begin + sample_count(inputs)), summed_over_outputs(factors) if trace else factors

    def factors(self, inputs: Any, direction: Mapping[str, Tensor] | None = None, order: int = 0) -> list[Factor]:
        """Return the factors of J_0 .. J_order on some inputs, where the network is."""
        return jacobian_factors(self.network, inputs, self.trainable, self.plan, direction, order)

    def _method(self, order: int, direction: Mapping[str, Tensor]) -> str:
        """Choose jets or reverse mode; at first use u . J_m is compared with reverse mode of reverse mode."""

        def make() -> str:
            few = slice_of(self.inputs, 0, min(3, self.samples))
            method = JETS
            try:
                factors = self.factors(few, direction, order)
            except (NoJetRuleError, CheckpointError) as error:  # a checkpoint's second forward knows no jets
                method = f"reverse mode ({str(error).splitlines()[0]})"
                with derivatives_of_order(order + 1, self.network.origin):
                    factors = reverse_factors(self.network, few, self.trainable, direction, order)
            for m in range(1, order + 1):
                with derivatives_of_order(m + 1, self.network.origin):
                    wrong = mismatches(self.network, few, factors, self.trainable, direction, m)
                if wrong:
                    name, sizes = next(iter(wrong.items()))
                    raise ValueError(
                        f"model: derivatives of order {m + 1} cannot be trusted for {name!r}: |u . J_{m}| is {sizes}; "
                        "an operation of the forward has wrong higher derivatives"
                    )
            return method

        return _methods.get_or_make(self.network, (self._key(), order), make)


def check_finite(network: IsolatedModel, tensors: Collection[Tensor], name: str) -> None:
    """Refuse kernels that are not finite.

    Args:
        network: The network.
        tensors: What was computed.
        name: What it is, for the message.

    Raises:
        ValueError: If one of them is not finite; the message names the parameter that is to blame, if one is.
    """
    # The least and the largest number: NaN if one is, and unlike a sum they do not overflow; nothing is copied.
    ends = [end for tensor in tensors if tensor.numel() for end in torch.aminmax(tensor.detach())]
    if not all_finite(*([torch.stack(ends)] if ends else [])):
        check_measurable(network)  # names the parameter
        raise ValueError(f"model: {name} not finite though the parameters are; outputs or derivatives overflow")


def checked_lambdas(network: IsolatedModel, lambdas: Mapping[str, float] | float | None) -> dict[str, float]:
    """Return lambda of every trainable parameter with lambda > 0.

    Args:
        network: The network.
        lambdas: See ``ntk``.

    Raises:
        ValueError: If there is no trainable parameter, ``lambdas`` is neither a number nor such a mapping, names other
            parameters, or gives negative values.
    """
    names = set(network.params)
    if not names:
        raise ValueError("model: it has no trainable parameter, so its NTK is empty; set requires_grad on some")
    if isinstance(lambdas, Mapping):
        if set(lambdas) != names:
            raise ValueError(f"lambdas: {wrong_name(lambdas, names)}; name every trainable parameter once")
        values = {name: _number(value, f" for {name!r}") for name, value in lambdas.items()}
    else:
        values = dict.fromkeys(network.params, 1.0 if lambdas is None else _number(lambdas))
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"lambdas: {value:g} given for {name!r}; it must be finite and >= 0")
    return {name: values[name] for name in network.params if values[name] > 0}


def wrong_name(given: Iterable[str], names: Iterable[str]) -> str:
    """Name a parameter that is not there, with the nearest one that is, or else one that is missing."""
    given, names = set(given), set(names)
    if unknown := sorted(given - names):
        return f"{unknown[0]!r} is not a trainable parameter{nearest(unknown[0], sorted(names))}"
    return f"{min(names - given)!r} is missing"


def _number(value: Any, place: str = "") -> float:
    """Return a lambda as a float, refusing strings and tensors of several numbers."""
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise ValueError(f"lambdas: {value!r} given{place}; give a number, or {{parameter name: number}}")
    return float(value)
