"""Trajectories of networks and of their shadows, recorded while they train."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.output import output
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.measure.jacobian.engine import checked_lambdas
from torch_eft.measure.kernels.ntk import ntk
from torch_eft.measure.taylor.model import TaylorModel, as_call
from torch_eft.measure.taylor.perturbative import PerturbativeTaylorModel
from torch_eft.results.trajectory import Trajectory, Validity, trajectory_from_records

_LEVELS = ("valid", "caution", "invalid")


class TrajectoryRecorder:
    """Records a network, or a shadow, while it trains, and makes the ``Trajectory`` that forecasts are laid beside.

    Call ``record(step)`` in the training loop at steps of your choice, step 0 first for the NTK's drift::

        recorder = TrajectoryRecorder(model, x_probe)
        for step, (x, y) in enumerate(batches):
            recorder.record(step)
            ...
        measured = recorder.trajectory()

    Args:
        model: The network; or a ``TaylorModel``, whose NTK is that of the Taylor model at its theta; or a
            ``PerturbativeTaylorModel``, whose NTK is not one matrix and stays None.
        x_probe: Probe inputs: a tensor (N_p, ...), a tuple of arguments or a dict of keyword arguments.
        x_train: Training inputs to record outputs on, too, if any.
        lambdas: The learning-rate tensor, one number or ``{parameter name: lambda}``; None means 1.
        record_ntk: Whether to record the NTK, too: one backward pass an output.
        output_fn: Turns what the network returns into (N, C); a shadow has its own.

    Raises:
        ValueError: If a shadow is given an ``output_fn``.
    """

    def __init__(
        self,
        model: nn.Module,
        x_probe: Any,
        x_train: Any = None,
        lambdas: Mapping[str, float] | float | None = None,
        record_ntk: bool = True,
        output_fn: OutputFn | None = None,
    ) -> None:
        if isinstance(model, TaylorModel) and output_fn is not None:
            raise ValueError("output_fn: given for a shadow, which has its own; pass it to the shadow when making it")
        self.model, self.lambdas, self.output_fn = model, lambdas, output_fn
        self.x_probe = as_probe(x_probe)
        self.x_train = None if x_train is None else as_probe(x_train)
        self._steps: list[int] = []
        self._outputs: list[Tensor] = []
        self._trained: list[Tensor] = []
        self._ntks: list[Tensor] | None = [] if record_ntk and not isinstance(model, PerturbativeTaylorModel) else None
        self._validity: Validity | None = None

    def record(self, step: int) -> None:
        """Record the model as it is now.

        Args:
            step: Number of optimizer steps it has taken.

        Raises:
            ValueError: If the steps do not increase, or the model cannot be measured.
        """
        if self._steps and step <= self._steps[-1]:
            raise ValueError(f"step: {step} given after {self._steps[-1]}; records are taken at increasing steps")
        outputs = self._output(self.x_probe)
        trained = None if self.x_train is None else self._output(self.x_train)
        if self._ntks is not None:
            self._ntks.append(self._ntk())
        if isinstance(self.model, TaylorModel):
            found = self.model.validity(self._placed(self.model, self.x_probe))
            if self._validity is None or _LEVELS.index(found.flag) >= _LEVELS.index(self._validity.flag):
                self._validity = Validity(found.flag, f"at step {step}: {found.reason}")
        self._steps.append(step)
        self._outputs.append(outputs)
        if trained is not None:
            self._trained.append(trained)

    def trajectory(self) -> Trajectory:
        """What was recorded; of a shadow, with the worst of its verdicts.

        Raises:
            ValueError: If there is no record.
        """
        model = self.model
        if isinstance(model, TaylorModel):
            kind = (
                "perturbative shadow"
                if isinstance(model, PerturbativeTaylorModel)
                else f"shadow of order {model.order}"
            )
            provenance = f"{kind} of {type(model.network).__name__}, trained"
        else:
            provenance = f"measured: {type(model).__name__}, trained"
        dtype = str(self._outputs[0].dtype).removeprefix("torch.") if self._outputs else ""
        return trajectory_from_records(
            self._steps,
            self._outputs,
            provenance,
            self._validity or Validity("valid", f"measured on the network itself in {dtype}: no expansion in it"),
            self._ntks,
            self._trained if self.x_train is not None else None,
        )

    def _output(self, probe: Probe) -> Tensor:
        if not isinstance(self.model, TaylorModel):
            return output(self.model, probe, self.output_fn).detach()
        args, kwargs = as_call(self._placed(self.model, probe))
        with torch.no_grad():
            return _as_outputs(self.model(*args, **kwargs))

    def _ntk(self) -> Tensor:
        model = self.model
        if not isinstance(model, TaylorModel):
            return ntk(model, self.x_probe, lambdas=self.lambdas, output_fn=self.output_fn).detach()
        with isolated(model.network) as network:
            scales = checked_lambdas(network, self.lambdas)
        args, kwargs = as_call(self._placed(model, self.x_probe))
        theta = {name: value for name, value in model.theta.items() if scales.get(name, 0.0) > 0}
        with torch.enable_grad():
            z = _as_outputs(model(*args, **kwargs))
            rows = []
            for value in z.flatten():
                found = torch.autograd.grad(
                    value, list(theta.values()), retain_graph=True, allow_unused=True, materialize_grads=True
                )
                gradients = [scales[name] ** 0.5 * part.flatten() for name, part in zip(theta, found, strict=True)]
                rows.append(torch.cat(gradients))
        J = torch.stack(rows)
        return (J @ J.T).unflatten(0, z.shape).unflatten(2, z.shape).transpose(1, 2).detach()

    @staticmethod
    def _placed(shadow: TaylorModel, probe: Probe) -> Any:
        with isolated(shadow.network) as network:
            return network.place(probe)


def _as_outputs(value: Any) -> Tensor:
    """(N, C).

    Raises:
        ValueError: If it is something else.
    """
    if not isinstance(value, Tensor) or value.ndim != 2:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"output_fn: the shadow returns {shape}, not (N, C); make the shadow with an output_fn that does"
        )
    return value
