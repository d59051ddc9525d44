"""The network that an observer looks at, on its probe, and what is to be measured of it at every visit."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from torch_eft.live.instrument import Instrument, MeasurementWarning
from torch_eft.live.run.calibration import Calibration
from torch_eft.live.run.ranks import RankProtocol
from torch_eft.measure.ensembles.learning_rates import read_learning_rates
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.probe import OutputFn, Probe
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY
from torch_eft.measure.kernels.ntk import too_large
from torch_eft.measure.network.batch_norm import batch_norms
from torch_eft.measure.network.network import Network
from torch_eft.measure.network.sharded import full_copy, sharded_snapshot
from torch_eft.measure.network.snapshot import Plan, Snapshot

Distributed = Literal["rank_zero", "sharded"]


@dataclass(frozen=True)
class Given:
    """What is to be measured, as a user said it.

    Args:
        model: The network that is trained; None: training brings it.
        probe: The inputs; None: they wait for a data set.
        optimizers: Those of the training.
        output_fn: Converts the model's output to (N, C).
        memory: Bytes allowed for the NTK.
        distributed: Who measures: rank 0, or all ranks together.
        unsharded_model: A plain network of the same architecture, where the model's parameters are sharded (FSDP).
    """

    model: nn.Module | None
    probe: Probe | None
    optimizers: Sequence[Optimizer] = ()
    output_fn: OutputFn | None = None
    memory: int = DEFAULT_MEMORY
    distributed: Distributed = "rank_zero"
    unsharded_model: nn.Module | None = None

    @property
    def collective(self) -> bool:
        """True if a snapshot takes every rank of a distributed training."""
        return self.distributed == "sharded" or self.unsharded_model is not None


@dataclass(frozen=True)
class MeasuredNetwork:
    """A network on its probe that can be measured.

    Args:
        model: The network that is trained.
        probe: The inputs.
        plan: What is measured at every visit.
        shape: [N, C].
        ranks: The ranks of the training.
        optimizers: Those of the training.
        output_fn: Converts the model's output to (N, C).
        memory: Bytes allowed for the NTK.
        distributed: Who measures: rank 0, or all ranks together.
        unsharded_model: A plain network of the same architecture, where the model's parameters are sharded (FSDP): they
            are copied into it for every snapshot, which takes all ranks.
        norms: BatchNorm layers that are measured with the statistics of given inputs, at every visit anew: running
            ones start at 0 and 1, and change where no parameter moves.
        calibration: Chooses these inputs.
    """

    model: nn.Module
    probe: Probe
    plan: Plan
    shape: tuple[int, int]
    ranks: RankProtocol
    optimizers: Sequence[Optimizer] = ()
    output_fn: OutputFn | None = None
    memory: int = DEFAULT_MEMORY
    distributed: Distributed = "rank_zero"
    unsharded_model: nn.Module | None = None
    norms: tuple[str, ...] = ()
    calibration: Calibration = field(default_factory=Calibration)

    @property
    def network(self) -> nn.Module:
        """The module that is measured: the model, or its unsharded counterpart."""
        return self.model if self.unsharded_model is None else self.unsharded_model

    def learning_rates(self) -> dict[str, float]:
        """The learning-rate tensor lambda; 1 where there is no optimizer."""
        if not self.optimizers:
            return {name: 1.0 for name, p in self.model.named_parameters() if p.requires_grad}
        return read_learning_rates(self.model, self.optimizers).lambdas

    def without_rates(self) -> "MeasuredNetwork":
        """The same without the NTK, which takes the learning rates."""
        return replace(self, optimizers=(), plan=replace(self.plan, ntk=False))

    @contextmanager
    def isolated(self, lambdas: dict[str, float], collective: bool) -> Iterator[tuple[Network, Snapshot | None]]:
        """Isolate the network once, for one visit.

        Args:
            lambdas: The learning rates with which the NTK is measured.
            collective: Whether other ranks, where there are any, take part; once inside each ``ranks.awaited()``.

        Yields:
            The network on its probe, and the snapshot if all ranks took it together.
        """
        snapshot = None
        if collective:
            self.ranks.announce((self.plan, lambdas))
            snapshot = self._together(self.plan, lambdas)
        with isolated(self.network, self.output_fn) as own:
            normed = partial(self.calibration.normed, probe=self.probe)
            options: dict[str, Any] = {"memory": self.memory, "prepare": normed, "outputs": self.plan.outputs}
            with Network(normed(own), self.probe, lambdas=lambdas, **options) as network:
                yield network, snapshot

    def follow(self) -> None:
        """Wait for rank 0, and take part in the snapshot if there is one: all that other ranks ever do."""
        announced = self.ranks.wait()
        if announced is not None:
            self._together(*announced)

    def _together(self, plan: Plan, lambdas: dict[str, float]) -> Snapshot | None:
        """Do what takes all ranks: gather sharded parameters, and take the snapshot if it is shared."""
        if self.unsharded_model is not None:
            full_copy(self.model, self.unsharded_model)
        if not (self.ranks.several and self.distributed == "sharded"):
            return None
        # Isolated by itself, so that a failure on one rank is a failure on all, and none waits for another.
        inputs, norms = (self.network, self.probe, plan), self.norms
        return sharded_snapshot(*inputs, lambdas=lambdas, output_fn=self.output_fn, memory=self.memory, norms=norms)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside ``DataParallel`` and ``DistributedDataParallel``, whose forwards take all devices or ranks."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def checked_network(given: Given, instruments: Sequence[Instrument], name: str, ranks: RankProtocol) -> MeasuredNetwork:
    """Check that a model can be measured on a probe, and join the instruments' plans.

    An NTK that does not fit into memory is left out, with a warning.

    Args:
        given: The model, its probe, and how it is measured.
        instruments: What will look at it.
        name: Name of the observer, for warnings.
        ranks: The ranks of the training.

    Returns:
        The network, with the plan of what is measured at every visit.

    Raises:
        ValueError: If the model cannot be measured on the probe, or an instrument's arguments do not fit it.
    """
    model, probe, unsharded_model, memory = given.model, given.probe, given.unsharded_model, given.memory
    if model is None or probe is None:
        raise ValueError(f"{'model' if model is None else 'probe'}: None given; an observer needs one")
    model = unwrapped(model)
    module = model if unsharded_model is None else unsharded_model
    with Network(module, probe, output_fn=given.output_fn, memory=memory) as network:
        samples, outputs = network.output().shape
        for instrument in instruments:
            instrument.check(network)
        plans = [instrument.plan(outputs, samples) for instrument in instruments]
        outputs_of = next((plan.outputs for plan in plans if plan.outputs is not None), None)
        ntk, trace = any(plan.ntk for plan in plans), any(plan.ntk_trace for plan in plans)
        refusal = (
            too_large(network.current, network.probe, trace=trace, memory=memory, outputs=outputs_of) if ntk else None
        )
    if refusal is not None:
        warnings.warn(f"{name} will not measure the NTK: {refusal}", MeasurementWarning, stacklevel=3)
    plan = Plan(
        ntk=ntk and refusal is None,
        ntk_trace=trace,
        hidden=any(plan.hidden for plan in plans),
        layers=next((plan.layers for plan in plans if plan.layers is not None), None),
        outputs=outputs_of,
    )
    return MeasuredNetwork(
        model,
        probe,
        plan,
        (samples, outputs),
        ranks,
        optimizers=given.optimizers,
        output_fn=given.output_fn,
        memory=memory,
        distributed=given.distributed,
        unsharded_model=unsharded_model,
        norms=batch_norms(module),
    )
