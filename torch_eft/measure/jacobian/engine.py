"""Gram matrices of a network's Jacobian and its derivatives along a direction: planned, verified, in blocks."""

import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
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
from torch_eft.measure.jacobian.factors import jacobian_factors
from torch_eft.measure.jacobian.fallback import reverse_factors
from torch_eft.measure.jacobian.gram import Factor, Orders, OuterProductFactor, add_gram, mirror
from torch_eft.measure.jacobian.plan import Plan, make_plan, sample_count, slice_of
from torch_eft.measure.jacobian.verification import mismatches
from torch_eft.measure.jets.jet import NoJetRuleError

DEFAULT_MEMORY = 2**30
"""Bytes that kernels, factors and graph may take."""

_log = logging.getLogger("torch_eft")
_REMEMBERED = 16  # plans and methods of one module


class _Findings(WeakKeyDictionary[nn.Module, dict[Any, Any]]):
    """What was found out about modules, by probe shape and output function; the oldest are forgotten."""

    def get_or_make(self, network: IsolatedModel, key: Any, make: Callable[[], Any]) -> Any:
        known = self.setdefault(network.origin, {})
        if key not in known:
            value = make()
            if len(known) >= _REMEMBERED:
                del known[next(iter(known))]
            # The function is kept alive with it: its id is part of the key.
            known[key] = value, network.output_fn
        return known[key][0]


_plans, _methods = _Findings(), _Findings()

JETS = "jets"


@dataclass(frozen=True)
class Estimate:
    """What a measurement will take, in bytes.

    Args:
        sample: Factors and graph of one sample.
        kernels: The results.
        block: Samples in a block; all of them if they fit.
        blocks: Number of blocks; of b blocks, b (b + 1) / 2 pairs are computed.
        total: The peak, without the network itself.
    """

    sample: int
    kernels: int
    block: int
    blocks: int
    total: int

    def __str__(self) -> str:
        """In words."""
        return (
            f"{_size(self.total)} ({_size(self.kernels)} for the kernels, {_size(self.sample)} a sample, "
            f"{self.blocks} block{'s' if self.blocks > 1 else ''} of {self.block} samples)"
        )


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.2g} MiB"


class JacobianGram:
    """A network on a probe, with lambda.

    Args:
        network: The network, isolated.
        probe: The inputs.
        lambdas: As ``ntk`` takes them.
        memory: Bytes allowed.

    Attributes:
        samples: N.
        outputs: C.
        lambdas: ``{parameter: lambda}``, those above 0.
        plan: How each parameter's Jacobian is had.
        method: How its derivatives are: by ``"jets"``, or ``"reverse mode"`` and why.

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
        self.network = network
        self.lambdas = checked_lambdas(network, lambdas)
        self.moving = list(self.lambdas)
        self.memory = memory
        self.inputs = network.place(probe)
        self.samples = probe.size
        self.plan = self._planned(probe)
        self.outputs = self.plan.outputs
        self.method = JETS
        self._like = network.params[self.moving[0]] if self.moving else next(iter(network.params.values()))

    # ---- planning

    def _key(self) -> Any:
        shapes = [(name, value.shape, value.dtype) for name, value in self.network.params.items()]
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(self.inputs) if isinstance(leaf, Tensor)]
        inputs = [(leaf.shape[1:], leaf.dtype) for leaf in leaves]
        return str((shapes, inputs, self.moving, self.samples == 1, id(self.network.output_fn)))

    def _planned(self, probe: Probe) -> Plan:
        def make() -> Plan:
            check_measurable(self.network)
            with torch.no_grad():
                outputs = checked_output(self.network, probe)
            check_batch_independence(self.network, probe, outputs)
            few = slice_of(self.inputs, 0, min(3, self.samples))
            return self._verified(make_plan(self.network, self.inputs, self.moving, {}), few)

        return _plans.get_or_make(self.network, self._key(), make)

    def _verified(self, plan: Plan, few: Any) -> Plan:
        """The plan, with what does not agree with an ordinary backward pass left to the fallback."""
        for attempt in range(2):
            try:
                factors = jacobian_factors(self.network, few, self.moving, plan)
            except CheckpointError:
                reason = "a checkpoint runs its part of the forward again, unrecorded"
                plan = make_plan(self.network, self.inputs, self.moving, dict.fromkeys(self.moving, reason))
                factors = jacobian_factors(self.network, few, self.moving, plan)
            wrong = mismatches(self.network, few, factors, self.moving)
            if not wrong:
                return plan
            if attempt == 0:
                refused = {name: f"its factors disagree with backward: {found}" for name, found in wrong.items()}
                plan = make_plan(self.network, self.inputs, self.moving, {**plan.fallback, **refused})
        name, found = next(iter(wrong.items()))
        raise ValueError(
            f"model: the Jacobian of {name!r} cannot be trusted: |u . J| is {found}. The forward is no function of "
            "its parameters and of each sample alone (random operations, samples that see each other, state that "
            "changes); measure the part of it that is"
        )

    # ---- memory

    def estimate(
        self, orders: int = 1, kernels: int = 1, columns: int | None = None, outputs: int | None = None
    ) -> Estimate:
        """What Gram matrices take.

        Args:
            orders: Number of Taylor coefficients of the Jacobian.
            kernels: Number of results.
            columns: Number of samples of the columns, if others than the rows.
            outputs: C of the results; 1 for a trace.

        Raises:
            ValueError: If not even one sample fits, or the results do not.
        """
        count, channels = self.samples, self.outputs
        size = self._like.element_size()
        own = outputs or channels
        result = kernels * count * (columns or count) * own * own * size
        numels = {name: value.numel() for name, value in self.network.params.items()}
        fallback = channels * sum(numels[name] for name in self.plan.fallback) * size
        sample = orders * (self.plan.sample_bytes + 2 * fallback)
        if self.method != JETS:
            sample = (orders + 1) * channels * sum(numels[name] for name in self.moving) * size
        whole = result + count * sample
        if columns is None and whole <= self.memory:
            return Estimate(sample, result, count, 1, whole)
        block = min(count, (self.memory - result) // max(1, 2 * sample))
        if block < 1:
            raise MemoryLimitError(
                f"memory: {_size(self.memory)} allowed, {_size(result + 2 * sample)} needed at least: {_size(result)} "
                f"for the kernels of {count} samples and {own} output{'s' if own > 1 else ''}, {_size(2 * sample)} for "
                "the factors of two samples. Allow more, or take fewer samples, fewer outputs (output_fn) or trace=True"
            )
        blocks = math.ceil(count / block)
        return Estimate(sample, result, block, blocks, result + 2 * block * sample)

    # ---- computing

    def gram(
        self,
        pairs: Collection[Orders] = ((0, 0),),
        direction: Mapping[str, Tensor] | None = None,
        trace: bool = False,
        group: Callable[[str], str] | None = None,
        other: "JacobianGram | None" = None,
    ) -> dict[str, dict[Orders, Tensor]]:
        """J_m lambda J_n^T for every pair of orders (m, n).

        Args:
            pairs: Orders of rows and columns.
            direction: What J is differentiated along, ``{parameter: tensor}``; needed above order 0.
            trace: Average over outputs.
            group: From parameter to the name of a part of the result; None is the whole, named "".
            other: The columns' network and probe; None for those of the rows.

        Returns:
            ``{group: {(m, n): [a, b, i, j]}}``, (N, N', C, C) or, for a trace, (N, N').
        """
        order = max(max(pair) for pair in pairs)
        if order:
            assert direction is not None
            self.method = self._verified_method(order, direction)
        labels = {name: "" if group is None else group(name) for name in self.moving}
        groups = sorted(set(labels.values())) or [""]
        channels = 1 if trace else self.outputs
        columns = self if other is None else other
        N, M = self.samples, columns.samples
        estimate = self.estimate(order + 1, len(pairs) * len(groups), None if other is None else M, channels)
        _log.info("torch_eft: %s", estimate)
        results = {g: {pair: self._like.new_zeros(channels, N, channels, M) for pair in pairs} for g in groups}
        parts = self._blocks(estimate.block, order, direction, trace)
        for i, (row, first) in enumerate(parts):
            others: Iterable[tuple[slice, list[Factor]]] = [(row, first)] if other is None else []
            if other is not None or estimate.blocks > 1:
                later = columns._blocks(estimate.block, order, direction, trace, (i + 1) if other is None else 0)
                others = itertools.chain(others, later)
            for column, second in others:
                same = other is None and column == row
                self._add_block(results, (row, column), (first, second), labels, same, other is None)
        scale = 1 / self.outputs if trace else 1.0
        return {
            g: {pair: _finished(value, scale, trace) for pair, value in found.items()} for g, found in results.items()
        }

    def _blocks(
        self, block: int, order: int, direction: Mapping[str, Tensor] | None, trace: bool, start: int = 0
    ) -> Iterator[tuple[slice, list[Factor]]]:
        """Samples and their factors, block by block from block number ``start``."""
        for begin in range(start * block, self.samples, block):
            inputs = slice_of(self.inputs, begin, block)
            factors = self._factors(inputs, direction, order)
            samples = slice(begin, begin + sample_count(inputs))
            yield samples, [part for factor in factors for part in factor.traced()] if trace else factors

    def _add_block(
        self,
        results: Mapping[str, Mapping[Orders, Tensor]],
        samples: tuple[slice, slice],
        factors: tuple[list[Factor], list[Factor]],
        labels: Mapping[str, str],
        same: bool,
        symmetric: bool,
    ) -> None:
        """One block of every result, and with it the block that is its mirror image."""
        rows, columns = samples
        pairs = list(next(iter(results.values())))
        wanted = pairs if same or not symmetric else list(dict.fromkeys([*pairs, *((n, m) for m, n in pairs)]))
        whole = next(iter(next(iter(results.values())).values()))
        shape = (len(whole), rows.stop - rows.start, len(whole), columns.stop - columns.start)
        direct = shape == whole.shape
        blocks = results if direct else {g: {pair: whole.new_zeros(shape) for pair in wanted} for g in results}
        for first, second in zip(*factors, strict=True):
            for a, b in _by_group(first, second, labels):
                add_gram(blocks[labels[a.weight]], a, b, self.lambdas, same)
        for g, found in blocks.items():
            for pair, value in found.items():
                if same and pair[0] == pair[1]:
                    mirror(value)
                if direct:
                    continue
                if pair in results[g]:
                    results[g][pair][:, rows, :, columns] = value
                if symmetric and not same and pair[::-1] in results[g]:
                    results[g][pair[::-1]][:, columns, :, rows] = value.permute(2, 3, 0, 1)

    def _factors(self, inputs: Any, direction: Mapping[str, Tensor] | None, order: int) -> list[Factor]:
        if order == 0 or direction is None or self.method == JETS:
            return jacobian_factors(self.network, inputs, self.moving, self.plan, direction, order)
        return reverse_factors(self.network, inputs, self.moving, direction, order)

    def _verified_method(self, order: int, direction: Mapping[str, Tensor]) -> str:
        """At first use: u . J_m along the direction against reverse mode of reverse mode."""

        def make() -> str:
            few = slice_of(self.inputs, 0, min(3, self.samples))
            method = JETS
            try:
                factors = jacobian_factors(self.network, few, self.moving, self.plan, direction, order)
            except (NoJetRuleError, CheckpointError) as error:  # a checkpoint's second forward knows no jets
                method = f"reverse mode ({str(error).splitlines()[0]})"
                with derivatives_of_order(order + 1, self.network.origin):
                    factors = reverse_factors(self.network, few, self.moving, direction, order)
            for m in range(1, order + 1):
                with derivatives_of_order(m + 1, self.network.origin):
                    wrong = mismatches(self.network, few, factors, self.moving, direction, m)
                if wrong:
                    name, found = next(iter(wrong.items()))
                    raise ValueError(
                        f"model: derivatives of order {m + 1} cannot be trusted for {name!r}: |u . J_{m}| is {found}; "
                        "an operation of the forward has wrong higher derivatives"
                    )
            return method

        return _methods.get_or_make(self.network, (self._key(), order), make)


def _by_group(first: Factor, second: Factor, labels: Mapping[str, str]) -> list[tuple[Factor, Factor]]:
    """A weight and its bias apart where they belong to different parts of the result."""
    if not (isinstance(first, OuterProductFactor) and isinstance(second, OuterProductFactor)) or first.bias is None:
        return [(first, second)]
    if labels.get(first.weight) != labels.get(first.bias):
        return [(replace(first, bias=None), replace(second, bias=None)), (first.of_bias(), second.of_bias())]
    return [(first, second)]


def _finished(value: Tensor, scale: float, trace: bool) -> Tensor:
    """(C, N, C, N') as (N, N', C, C), or (N, N') of a trace."""
    return value[0, :, 0] * scale if trace else value.permute(1, 3, 0, 2)


def checked_lambdas(network: IsolatedModel, lambdas: Mapping[str, float] | float | None) -> dict[str, float]:
    """Lambda of every trainable parameter with lambda > 0.

    Raises:
        ValueError: If there is no trainable parameter, or ``lambdas`` names others, or gives negative values.
    """
    names = set(network.params)
    if not names:
        raise ValueError("model: it has no trainable parameter, so its NTK is empty; set requires_grad on some")
    if isinstance(lambdas, Mapping):
        if set(lambdas) != names:
            wrong = sorted(set(lambdas) ^ names)
            raise ValueError(
                f"lambdas: {wrong[0]!r} is {'missing' if wrong[0] in names else 'no trainable parameter'}; "
                "name every trainable parameter once"
            )
        values = {name: float(value) for name, value in lambdas.items()}
    else:
        values = dict.fromkeys(network.params, 1.0 if lambdas is None else float(lambdas))
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"lambdas: {value:g} given for {name!r}; it must be finite and >= 0")
    return {name: values[name] for name in network.params if values[name] > 0}
