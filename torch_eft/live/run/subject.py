"""What an observer looks at: the network, the probe, the optimizers; and how the ranks of a training look together.

In a distributed training rank 0 alone keeps the history and decides when to measure. With ``"sharded"`` the others wait
for its word wherever a measurement may fall, and take their share of the snapshot. A network whose parameters are
sharded themselves (FSDP) is copied whole into a plain twin first, which takes all ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from torch_eft.live.part import Instrument
from torch_eft.live.run.planning import plan_of
from torch_eft.measure.ensembles.learning_rates import read_learning_rates
from torch_eft.measure.forward.probe import OutputFn, Probe
from torch_eft.measure.network.ranks import Ranks
from torch_eft.measure.network.sharded import full_copy, sharded_snapshot
from torch_eft.measure.network.snapshot import Plan, Snapshot, take_snapshot

Distributed = Literal["rank_zero", "sharded"]


class MeasuredNetwork:
    """The network on its probe.

    Args:
        model: The network that is trained.
        probe: The inputs.
        optimizers: Those of the training.
        output_fn: Turns what the model returns into (N, C).
        distributed: Who measures: rank 0, or all ranks together.
        twin: A plain network of the same architecture, where the model's parameters are sharded.

    Attributes:
        probe_shape: [N, C], once it is checked.
        place: (rank, number of ranks) of this process in the training, where a trainer knows it; None: in torch's
            default process group.

    Raises:
        ValueError: If ``distributed`` is something else.
    """

    def __init__(
        self,
        model: nn.Module | None,
        probe: Probe | None,
        optimizers: Sequence[Optimizer],
        output_fn: OutputFn | None,
        distributed: Distributed,
        twin: nn.Module | None,
    ) -> None:
        if distributed not in ("rank_zero", "sharded"):
            raise ValueError(f"distributed: {distributed!r} given; give 'rank_zero' or 'sharded'")
        self.model, self.probe, self.optimizers = model, probe, list(optimizers)
        self.output_fn = output_fn
        self.distributed, self.twin = distributed, twin
        self.probe_shape: list[int] = []
        self.place: tuple[int, int] | None = None
        self._plan: Plan | None = None
        self._told = True

    @property
    def network(self) -> nn.Module:
        """What is measured: the model or its twin."""
        found = self.model if self.twin is None else self.twin
        assert found is not None
        return found

    @property
    def inputs(self) -> Probe:
        """The probe, which is there once it is checked."""
        assert self.probe is not None
        return self.probe

    @property
    def checked(self) -> bool:
        """Whether it is known what to measure."""
        return self._plan is not None

    def check(self, parts: Sequence[Instrument], name: str) -> None:
        """See that it can be measured, and what all parts together want to know of it.

        Raises:
            ValueError: If it cannot, with the reason.
        """
        if self.model is None or self.probe is None:
            raise ValueError(f"{'model' if self.model is None else 'probe'}: None given; an observer needs one")
        self._plan, self.probe_shape = plan_of(parts, self.network, self.probe, self.output_fn, name)

    def learning_rates(self) -> dict[str, float]:
        """The learning-rate tensor lambda; 1 where there is no optimizer."""
        assert self.model is not None
        if not self.optimizers:
            return {name: 1.0 for name, p in self.model.named_parameters() if p.requires_grad}
        return read_learning_rates(self.model, self.optimizers).lambdas

    # ---- the ranks

    @property
    def _place(self) -> tuple[int, int]:
        if self.place is not None:
            return self.place
        grouped = dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)

    @property
    def leads(self) -> bool:
        """Whether this process decides and records: rank 0, or the only one."""
        return self._place[0] == 0

    @property
    def shared(self) -> bool:
        """Whether other ranks than 0 have something to do."""
        return self.distributed == "sharded" or self.twin is not None

    @property
    def _ranks(self) -> Ranks | None:
        """All ranks, where it takes all of them; else None."""
        return Ranks() if self.shared and self._place[1] > 1 else None

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """The others wait: they are told of a snapshot inside, or at the end that there was none."""
        ranks = self._ranks
        self._told = ranks is None
        try:
            yield
        finally:
            if not self._told and ranks is not None:
                self._told = True
                ranks.tell(None)

    def follow(self) -> None:
        """Wait for rank 0, and take part in the snapshot if there is one; all that other ranks ever do.

        Raises:
            Exception: Of any kind, if it cannot be taken.
        """
        ranks = self._ranks
        if ranks is None:
            return
        wanted = ranks.tell(None)
        if wanted is not None:
            self._take(ranks, *wanted)

    def take(self, lambdas: dict[str, float]) -> Snapshot:
        """A snapshot, with these learning rates; where it takes all ranks, one inside each ``awaited``.

        Raises:
            Exception: Of any kind, if it cannot be taken.
        """
        assert self._plan is not None
        ranks = self._ranks
        if ranks is not None:
            if self._told:
                raise RuntimeError("the other ranks do not wait for a snapshot here")
            self._told = True
            ranks.tell((self._plan, lambdas))
        return self._take(ranks, self._plan, lambdas)

    def _take(self, ranks: Ranks | None, plan: Plan, lambdas: dict[str, float]) -> Snapshot:
        if self.twin is not None:
            assert self.model is not None
            full_copy(self.model, self.twin)
        network, probe = self.network, self.inputs
        if ranks is not None and self.distributed == "sharded":
            return sharded_snapshot(network, probe, plan, lambdas=lambdas, output_fn=self.output_fn)
        return take_snapshot(network, probe, plan, lambdas=lambdas, output_fn=self.output_fn)
