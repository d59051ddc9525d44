"""Gram matrices of a network's Jacobian and its derivatives along a direction: planned, verified, in blocks."""

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from torch_eft.measure.forward.checks import (
    MemoryLimitError,
    check_batch_independence,
    check_measurable,
    derivatives_are_trusted,
    derivatives_of_order,
    reach_of,
)
from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.forward.kinks import bounded_norms, cut_operations, kink_sides
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import Probe
from torch_eft.measure.jacobian.blocks import Estimate, GramBlocks, readable, seconds_of, summed_over_outputs
from torch_eft.measure.jacobian.factors import jacobian_factors
from torch_eft.measure.jacobian.fallback import reverse_factors
from torch_eft.measure.jacobian.gram import Factor, Orders
from torch_eft.measure.jacobian.layers import weighted
from torch_eft.measure.jacobian.plan import (
    ChangedUseError,
    JacobianPlan,
    Lambdas,
    checked_lambdas,
    make_plan,
    sample_count,
    slice_of,
)
from torch_eft.measure.jacobian.verification import Verification, untrusted
from torch_eft.measure.jets.jet import NoJetRuleError, watch_kinks

DEFAULT_MEMORY = 2**30
"""Bytes that kernels, factors and graph may take."""

_log = logging.getLogger("torch_eft")


@dataclass(frozen=True)
class _Known:
    """What is remembered of a network: plan, function of the output, and the derivatives that were compared."""

    plan: JacobianPlan
    output_fn: Any  # kept alive: its id is part of the key
    order: int = 0
    cut: tuple[str, ...] = ()


_plans: "WeakKeyDictionary[nn.Module, dict[Any, _Known]]" = WeakKeyDictionary()
"""Plans by module and kind of probe, to begin with: every computation finds out whether they still hold."""

_REMEMBERED = 16  # plans of one module

JETS = "jets"
Result = TypeVar("Result")


@dataclass(frozen=True)
class GramMatrices:
    """Gram matrices of the Jacobian's Taylor coefficients along a direction.

    Args:
        matrices: ``{(m, n): J_m lambda J_n^T}``, ``[a, b, i, j]``, (N, N', C, C) or, for a trace, (N, N').
        method: How the coefficients were computed: ``"jets"``, or ``"reverse mode"`` and why.
        cut: What the forward leaves out of its gradient, so that they are no coefficients of the Jacobian's own change.
    """

    matrices: dict[Orders, Tensor]
    method: str
    cut: tuple[str, ...] = ()

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
        lambdas: ``{parameter: lambda}``, those above 0: one number, or one for every number of the parameter.
        trainable: Their names.
        plan: How each parameter's Jacobian is computed.

    Raises:
        ValueError: If the network cannot be measured; the message says why.
    """

    def __init__(
        self,
        network: IsolatedModel,
        probe: Probe,
        lambdas: Lambdas = None,
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
        self._planned_on_all = False
        self._cut: tuple[str, ...] = ()
        self._kinked = True
        self._checked = -1  # the order up to which the plan at hand was compared with ordinary passes
        self._proven = 0  # the order up to which derivatives were compared with differences along some direction
        self._known = _plans.get(network.origin, {}).get(self._key())
        self.plan = self._planned(probe)
        self._like = network.params[self.trainable[0]] if self.trainable else next(iter(network.params.values()))

    @property
    def outputs(self) -> int:
        """C."""
        return self.plan.outputs

    # ---- planning

    def _key(self) -> Any:
        shapes = [(name, value.shape, value.dtype) for name, value in self.network.params.items()]
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(self.inputs) if isinstance(leaf, Tensor)]
        inputs = [(leaf.shape[1:], leaf.dtype) for leaf in leaves]
        return str((shapes, inputs, self.trainable, self.samples == 1, id(self.network.output_fn)))

    def _planned(self, probe: Probe) -> JacobianPlan:
        self._independent = self._known is None  # whether samples have been found not to see each other
        if self._known is not None:
            return self._known.plan
        check_measurable(self.network)
        with torch.no_grad():
            outputs = checked_output(self.network, probe)
        check_batch_independence(self.network, self.inputs, outputs)
        return make_plan(self.network, self.inputs, self.trainable, {})

    def _remember(self) -> None:
        plans = _plans.setdefault(self.network.origin, {})
        key = self._key()
        if key not in plans and len(plans) >= _REMEMBERED:
            del plans[next(iter(plans))]
        known = plans.get(key)
        order, cut = self._proven, self._cut
        if known is not None and known.plan is self.plan:
            order, cut = max(order, known.order), cut or known.cut
        plans[key] = _Known(self.plan, self.network.output_fn, order, cut)

    def _plan_anew(self, reasons: Mapping[str, str]) -> None:
        """Plan on all samples what was planned before; leave what even then does not hold to the fallback."""
        fallback = dict(reasons) | dict(self.plan.fallback) if self._planned_on_all else {}
        exhausted = reasons.keys() <= self.plan.fallback.keys()  # no recording is at fault
        if exhausted and self.plan.looped:
            raise ValueError(untrusted(*next(iter(reasons.items()))))
        plan = make_plan(self.network, self.inputs, self.trainable, fallback, self._samples_of_a_pass)
        self._planned_on_all, self._checked = True, -1
        self.plan = replace(plan, looped=exhausted or self.plan.looped)

    @property
    def _samples_of_a_pass(self) -> int:
        """The number of samples whose graph fits into the memory allowed, without factors."""
        return max(3, self.memory * (self.outputs + 1) // max(1, 2 * self.plan.sample_bytes))

    def checked(self) -> "JacobianGram":
        """Return itself with a plan that holds for all samples.

        Raises:
            ValueError: If none does.
        """
        if self._checked < 0 and self.trainable:
            self._settled(self._check)
        return self

    def checked_factors(self, inputs: Any) -> list[Factor]:
        """Return the factors of J_0 on some inputs, where the network is, compared with ordinary passes.

        Raises:
            ValueError: If they are wrong in all ways.
        """

        def compute() -> list[Factor]:
            verification = Verification(self.network, self.trainable, self.plan, inputs, 0)
            factors = self.factors(inputs)
            verification.add(slice(0, sample_count(inputs)), factors)
            self._verify(verification, None)
            return factors

        return self._settled(compute) if self.trainable else []

    def _check(self) -> None:
        verification = self._verification(0)
        for _ in self._blocks(self.estimate(outputs=1).block, 0, None, JETS, verification):
            pass
        self._verify(verification, None)

    def _settled(self, compute: Callable[[], Result]) -> Result:
        """Compute, with another plan as long as the one at hand does not hold."""
        while True:
            try:
                result = compute()
            except ChangedUseError as change:
                self._plan_anew(change.reasons)
            else:
                self._remember()
                return result

    def _verification(self, order: int, method: str = JETS) -> Verification | None:
        """Return what factors are to be compared with; None if that has been done, or there are no values."""
        known = self._known
        if derivatives_are_trusted() and known is not None and known.plan is self.plan and known.order >= order > 0:
            order, self._cut = 0, self._cut or known.cut
        if self._checked >= order or not self.trainable or self._like.device.type == "meta":
            return None
        plan = self.plan if method == JETS else JacobianPlan(outputs=self.outputs)
        return Verification(self.network, self.trainable, plan, self.inputs, order)

    def _verify(
        self,
        verification: Verification | None,
        direction: Mapping[str, Tensor] | None,
        kernels: Sequence[Tensor] = (),
    ) -> None:
        """Compare with ordinary passes: the Jacobian, and the kernels (N, N, C, C) that add up to H.

        Raises:
            ChangedUseError: If the Jacobian is another one.
            ValueError: If derivatives are wrong, or samples see each other.
        """
        if verification is None:
            return
        wrong, contradicts, outputs = verification.mismatches(self._samples_of_a_pass, kernels, self.lambdas)
        if wrong:
            with torch.no_grad():
                copied = self.network(self.network.params, verification.inputs)
            check_batch_independence(self.network, verification.inputs, copied)
            raise ChangedUseError(wrong)
        if contradicts:
            reason = "the kernel put together from its factors disagrees with ordinary backward passes"
            raise ChangedUseError(dict.fromkeys(self.trainable, reason))
        if not self._independent:
            check_batch_independence(self.network, verification.inputs, outputs)
            self._independent = True
        if verification.order:
            self._cut = self._cut or bounded_norms(self.network)
        for m in range(max(1, self._checked + 1), verification.order + 1):
            assert direction is not None
            verdict = verification.differs_from_differences(direction, m, self._samples_of_a_pass, self._kinked)
            if verdict is False:
                continue
            with derivatives_of_order(m + 1, self.network.origin):
                wrong = verification.higher_mismatches(direction, m)
            named = cut_operations(self.network, slice_of(self.inputs, 0, 1)) if wrong else ()
            if named:  # a gradient of its own: neither need be the derivative
                self._cut = self._cut or named
            elif wrong:
                name, sizes = next(iter(wrong.items()))
                raise ValueError(
                    f"model: derivatives of order {m + 1} cannot be trusted for {name!r}: u . J_{m} of random numbers "
                    f"u {sizes}; an operation of the forward has wrong higher derivatives"
                )
            if verdict:
                self._cut = self._cut or self._cut_parts(m)
        self._checked = max(self._checked, verification.order)
        moves = direction is not None and verification.order > 0 and reach_of(self.network.params, direction) < math.inf
        if moves:  # else nothing was compared
            self._proven = max(self._proven, verification.order)

    def _executes_kinks(self, inputs: Any) -> bool:
        try:
            return bool(kink_sides(self.network, self.network.params, Probe(slice_of(inputs, 0, 1))).names)
        except RuntimeError:  # sides of complex numbers, for one
            return True

    def _cut_parts(self, order: int) -> tuple[str, ...]:
        """Name what differences show to be cut from the gradient: across kinks they would differ in any case."""
        cut = cut_operations(self.network, slice_of(self.inputs, 0, 1))
        if self._kinked:
            return cut if order == 1 else ()
        return cut or ("an operation that is not seen",)

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

    def timed(self, estimate: Estimate) -> Estimate:
        """Return an estimate with the time that the NTK takes; the plan at hand is kept for it."""
        if not self.trainable or self._like.device.type == "meta":
            return estimate
        try:
            seconds = seconds_of(self.network, self.inputs, self.trainable, self.plan, estimate)
        except ChangedUseError:  # the plan does not hold, and another one will be made
            return estimate
        self._remember()
        return replace(estimate, seconds=seconds)

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
        parts, _ = self._computed([(0, 0)], None, trace, part_of, other)
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
        parts, method = self._computed(pairs, direction, trace, None, other)
        return GramMatrices(parts[""], method, self._cut)

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
        numbers = {name: 1.0 if isinstance(value, Tensor) else value for name, value in self.lambdas.items()}
        return GramBlocks(self._like, shape, pairs, numbers, labels, other is None)  # the rest is in the factors

    def _computed(
        self,
        pairs: Collection[Orders],
        direction: Mapping[str, Tensor] | None,
        trace: bool,
        part_of: Callable[[str], str] | None,
        other: "JacobianGram | None",
    ) -> tuple[dict[str, dict[Orders, Tensor]], str]:
        """Compute Gram matrices by group, and say by which method."""

        def by(method: str) -> dict[str, dict[Orders, Tensor]]:
            return planner._settled(lambda: assembled(method))

        def assembled(method: str) -> dict[str, dict[Orders, Tensor]]:
            for engine in (self, self if other is None else other):
                if engine.plan is not planner.plan:
                    engine.plan, engine._checked = planner.plan, -1
            return self._assembled(pairs, direction, method, trace, part_of, other)

        order = max(max(pair) for pair in pairs)
        # Rows and columns in one way: that of the one with more samples, whose axes show better.
        planner = self if other is None or other.samples <= self.samples else other
        try:
            return by(JETS), JETS
        except Exception as error:  # a checkpoint's second forward, for one, knows no jets
            if order == 0 or isinstance(error, ValueError | torch.OutOfMemoryError):
                raise
            known = isinstance(error, NoJetRuleError | CheckpointError)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            method = f"reverse mode ({reason.splitlines()[0]})"
        with derivatives_of_order(order + 1, self.network.origin):
            return by(method), method

    def _assembled(
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
        verification = self._verification(order, method)
        of_columns = None if other is None else columns._verification(order, method)
        for i, (row, first) in enumerate(self._blocks(estimate.block, order, direction, method, verification)):
            first = summed_over_outputs(first) if trace else first
            if other is None:
                sums.add(row, row, first, first)
            if other is not None or estimate.blocks > 1:
                start = (i + 1) if other is None else 0
                check = None if i else of_columns
                for column, second in columns._blocks(estimate.block, order, direction, method, check, start):
                    sums.add(row, column, first, summed_over_outputs(second) if trace else second)
                    del second
            del first
        result = sums.finished(self.outputs if trace else None)
        square = other is None and not trace and (0, 0) in pairs
        self._verify(verification, direction, [matrices[0, 0] for matrices in result.values()] if square else ())
        columns._verify(of_columns, direction)
        return result

    def _blocks(
        self,
        block: int,
        order: int,
        direction: Mapping[str, Tensor] | None,
        method: str,
        verification: Verification | None,
        start: int = 0,
    ) -> Iterator[tuple[slice, list[Factor]]]:
        """Samples and their factors, block by block from block number ``start``; they are added to a verification."""
        for begin in range(start * block, self.samples, block):
            inputs = slice_of(self.inputs, begin, block)
            if method == JETS:
                with watch_kinks() as kinks:
                    factors = self.factors(inputs, direction, order)
                self._kinked = bool(kinks)
            else:
                assert direction is not None
                self._kinked = self._executes_kinks(inputs)
                factors = reverse_factors(self.network, inputs, self.trainable, direction, order)
            rows = slice(begin, begin + sample_count(inputs))
            if verification is not None:
                verification.add(rows, factors)
            factors = self._weighted(factors, self.plan if method == JETS else JacobianPlan(outputs=self.outputs))
            yield rows, factors
            del factors

    def _weighted(self, factors: list[Factor], plan: JacobianPlan) -> list[Factor]:
        """Put lambdas that differ from number to number of a parameter into its factors."""
        elementwise = {name: value for name, value in self.lambdas.items() if isinstance(value, Tensor)}
        return weighted(factors, elementwise, plan.in_order) if elementwise else factors

    def factors(self, inputs: Any, direction: Mapping[str, Tensor] | None = None, order: int = 0) -> list[Factor]:
        """Return the factors of J_0 .. J_order on some inputs, where the network is."""
        try:
            return jacobian_factors(self.network, inputs, self.trainable, self.plan, direction, order)
        except CheckpointError as error:
            if order:
                raise
            reason = "a checkpoint runs its part of the forward again, unrecorded"
            raise ChangedUseError(dict.fromkeys(self.trainable, reason)) from error
