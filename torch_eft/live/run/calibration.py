"""The statistics with which BatchNorm layers are measured: of the training's first batches, at any parameters.

The batches are copied as the loop shows them, so that nothing is read that training does not read. The first four are
complete only a few steps after theta_0, whose parameters are kept that long, to measure it anew with the same batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

from torch_eft.live.instruments.common import too_many
from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.forward.probe import Probe
from torch_eft.measure.network.batch_norm import statistics_of, with_batch_statistics

COUNT = 4
"""Batches whose statistics are taken: with 4 a residual network's drift is within a few per cent of that with 22."""

LARGEST = 2**23
"""Bytes of a batch that are kept: they lie beside the network, in checkpoints too."""


class Calibration:
    """Chooses the inputs whose statistics BatchNorm layers take, the same at theta_0 and later.

    Attributes:
        norms: Names of the layers; none: there is nothing to calibrate.
        kept: Inputs of the first batches, as the network takes them; none: the probe's statistics are taken.
        refusal: Why no more batches are kept; None: more are wanted.
        statistics: Those at theta_0, by buffer.
        step: Optimizer steps at theta_0.
    """

    def __init__(self) -> None:
        self.norms: tuple[str, ...] = ()
        self.forget()

    def forget(self) -> None:
        """Start a new run."""
        self.kept: list[Any] = []
        self.refusal: str | None = None
        self.statistics: dict[str, Tensor] = {}
        self.step = 0
        self._theta_0: dict[str, Tensor] | None = None
        self._buffers: dict[str, Tensor] = {}
        self._used = 0  # batches with which theta_0 was measured
        self._running: list[tuple[Tensor, ...]] = []
        self._checked = False

    def refuse(self, reason: str) -> None:
        """Take the probe's statistics from now on, and say why."""
        self.kept, self.refusal = [], reason

    # ---- batches

    @property
    def wanted(self) -> bool:
        """Whether more batches are kept: there are such layers, and theta_0 can be measured anew."""
        return bool(self.norms) and self.refusal is None and len(self.kept) < COUNT and self._theta_0 is not None

    def see(self, batch: Any, probe: Probe, network: nn.Module) -> None:
        """Keep the batch, if the network can be fed it.

        Args:
            batch: What the loop shows.
            probe: What the network is fed in measurements.
            network: The live network, whose running statistics tell later whether it is fed this very batch.
        """
        inputs = _inputs_like(batch, probe.inputs)
        if inputs is None:
            self.refuse("the batches that the loop shows are not like the probe")
            return
        self.note(network)
        row = sum(leaf[:1].numel() * leaf.element_size() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
        rows = slice(0, max(2, LARGEST // max(1, row)))
        self.kept.append(tree_map(lambda x: x[rows].detach().clone() if isinstance(x, Tensor) else x, inputs))

    def note(self, network: nn.Module) -> None:
        """Note the running statistics when the first batch is shown, and once more when training has seen it."""
        if self.wanted and not self._checked and len(self._running) < 2:
            layer = network.get_submodule(self.norms[0])
            values = [getattr(layer, name) for name in ("running_mean", "running_var", "num_batches_tracked")]
            self._running.append(tuple(value.detach().clone() for value in values if value is not None))

    def _check(self, network: IsolatedModel) -> None:
        """Refuse batches that are not what training feeds the network: transformed, or inputs of another module.

        The first batch's mean and variance at theta_0 are compared with what the running statistics took in: roughly,
        as dropout or reduced precision may have a part in it. Of several forwards, as in gradient accumulation, all
        may have been of other samples, whose means and variances differ by their own fluctuations.
        """
        before, after, self._running = *self._running, []
        self._checked = True  # once: later batches are others, at other parameters
        if not len(before) == len(after) == 3:
            return
        (mean_0, variance_0, count_0), (mean_1, variance_1, count_1) = before, after
        name = self.norms[0]
        momentum: Any = network.shadow.get_submodule(name).momentum
        forwards = float(count_1 - count_0)
        share = forwards / max(1.0, float(count_1)) if momentum is None else 1 - (1 - momentum) ** forwards
        if not 0 < share <= 1:
            return
        own = statistics_of(with_batch_statistics(network, [Probe(self.kept[0])], [name]), [name])
        mean, variance = own.values()  # in the order of STATISTICS
        took_mean = (mean_1.to(mean) - (1 - share) * mean_0.to(mean)) / share
        took_variance = (variance_1.to(mean) - (1 - share) * variance_0.to(mean)) / share
        eps = torch.finfo(mean.dtype).eps
        rows = next(len(leaf) for leaf in tree_leaves(self.kept[0]) if isinstance(leaf, Tensor))
        noise = 0.0 if forwards == 1 else 2 * (forwards / rows) ** 0.5
        off = float(((took_mean - mean).square() / (variance + eps)).mean().sqrt())
        ratio = float((took_variance.mean() + eps) / (variance.mean() + eps))
        allowed = 2 * (1 + noise)
        if off > 0.5 + noise or not 1 / allowed < ratio < allowed:
            self.refuse(
                "the batches that the loop shows are not what training feeds the network: the running mean and "
                f"variance of {name!r} took in others ({off:.2g} standard deviations, {ratio:.2g} times)"
            )

    # ---- measurements

    def normed(self, network: IsolatedModel, probe: Probe) -> IsolatedModel:
        """The network with BatchNorm's statistics of the batches, or of the probe, at its parameters.

        Args:
            network: Isolated.
            probe: What it is fed in measurements.

        Returns:
            The network.

        Raises:
            ValueError: If it cannot be run on a batch, after theta_0 was measured with it.
        """
        if self.kept:
            try:
                if len(self._running) == 2:
                    self._check(self._at_theta_0(network))
                if self.kept:
                    return with_batch_statistics(network, [Probe(inputs) for inputs in self.kept], self.norms)
            except ValueError as error:
                if self._theta_0 is None:  # measured with the batches
                    raise
                self.refuse(f"the network cannot be run on a training batch ({error})")
        return with_batch_statistics(network, probe, self.norms)

    def take(self, network: IsolatedModel, step: int, theta_0: Mapping[str, Tensor] | None) -> None:
        """Theta_0 is measured: keep its statistics, and itself, as long as more batches may come.

        Args:
            network: As it is measured.
            step: Optimizer steps taken.
            theta_0: Its trainable parameters, where others keep a copy of them already.
        """
        if not self.norms:
            return
        self.statistics, self.step = statistics_of(network, self.norms), step
        copied = theta_0 is None
        if self.refusal is None and copied and (reason := too_many(network.module)) is not None:
            self.refuse(reason)
        if self.refusal is None:
            self._theta_0 = {name: p.clone() for name, p in network.params.items()} if copied else dict(theta_0 or {})
            own = {name: network.constants[name].clone() for name in network.isolation.buffers}
            self._buffers = {name: value for name, value in own.items() if name not in self.statistics}

    def theta_0_anew(self, network: IsolatedModel, probe: Probe) -> IsolatedModel | None:
        """Theta_0 with the batches that have come since it was measured; None where none have.

        Args:
            network: Isolated, at any parameters.
            probe: What it is fed in measurements.

        Returns:
            The network at theta_0; ``statistics`` are its own from now on.
        """
        theta_0 = None
        if self._theta_0 is not None and len(self.kept) != self._used:
            theta_0 = self.normed(self._at_theta_0(network), probe)
            self.statistics, self._used = statistics_of(theta_0, self.norms), len(self.kept)
        if self._theta_0 is not None and not self.wanted:
            self._theta_0, self._buffers = None, {}
        return theta_0

    def _at_theta_0(self, network: IsolatedModel) -> IsolatedModel:
        assert self._theta_0 is not None
        buffers = {name: value.to(network.constants[name]) for name, value in self._buffers.items()}
        return replace(network.at(self._theta_0), constants=network.constants | buffers)

    def sentence(self, samples: int) -> str:
        """Say with which statistics BatchNorm is measured.

        Args:
            samples: Those of the probe.

        Returns:
            The sentence.
        """
        start = "BatchNorm in evaluation mode, calibrated: at every measurement, and at theta_0, it normalizes with"
        if self.kept:
            rows = sum(next(len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor)) for inputs in self.kept)
            return (
                f"{start} the statistics of the same {len(self.kept)} training batches ({rows} samples), the first of "
                "the training, at the parameters of the moment."
            )
        why = "no training batch has been shown yet" if self.refusal is None else self.refusal
        return f"{start} the statistics of the {samples} inputs of the probe at the parameters of the moment: {why}."

    # ---- checkpoints

    def state(self, parameters: bool = True) -> dict[str, Any]:
        """Plain types and tensors; without the parameters of theta_0, only the batches that it was measured with."""
        names = ("kept", "refusal", "statistics", "step", "_theta_0", "_buffers", "_used")
        state = {name.strip("_"): getattr(self, name) for name in names}
        if parameters or self._theta_0 is None:
            return state
        alone = "no training batch had been shown before the checkpoint, which does not hold theta_0"
        return state | {
            "theta_0": None,
            "kept": self.kept[: self._used],
            "refusal": self.refusal if self.refusal or self._used else alone,
        }

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Restore what ``state`` returned; None: theta_0 was measured with the probe's statistics."""
        self.forget()
        if state is None:
            self.refusal = "so theta_0 was measured before the resume"
            return
        self.kept, self.refusal, self.statistics = list(state["kept"]), state["refusal"], dict(state["statistics"])
        self._theta_0, self._buffers = state["theta_0"], dict(state["buffers"])
        self.step, self._used = state["step"], state["used"]
        self._checked = bool(self.kept)  # what training did with the first one is not known any more


def _inputs_like(batch: Any, like: Any) -> Any:
    """The part of a batch that has the structure of the probe's inputs; None if none has."""
    if isinstance(batch, Mapping):
        if isinstance(like, dict):
            candidates: list[Any] = [{name: batch[name] for name in like if name in batch}]
        else:
            candidates = [value for value in batch.values() if _alike(value, like)]
            candidates = candidates if len(candidates) == 1 else []
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        candidates = [*batch[:1], batch]
        if isinstance(like, tuple | list):
            candidates.append(type(like)(batch[: len(like)]))
    else:
        candidates = [batch]
    return next((each for each in candidates if _alike(each, like)), None)


def _alike(inputs: Any, like: Any) -> bool:
    if tree_structure(inputs) != tree_structure(like):
        return False
    return all(
        a.ndim == b.ndim and a.shape[1:2] == b.shape[1:2] and a.is_floating_point() == b.is_floating_point()
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else type(a) is type(b)
        for a, b in zip(tree_leaves(inputs), tree_leaves(like), strict=True)
    )
