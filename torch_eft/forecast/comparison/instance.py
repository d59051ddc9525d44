"""The forecast of one network, from its own NTK, dNTK and ddNTK at theta_0, beside its real training.

Full batch, any architecture and loss, gradient descent with or without momentum. With z_0, H_0 the NTK frozen (order 0)
and z_1, H_1 the first order in dNTK and ddNTK, the compared quantities, on the probe at a step t > 0, are

* ``instance_output``: <z - z(0), u> / sqrt(N C), u the direction of z_0(t) - z(0): rms motion of the outputs along
  their frozen forecast. Order 0: its size; order 1: <z_0 + z_1 - z(0), u> / sqrt(N C).
* ``instance_output_error``: |z - forecast| / max_{s <= t} |z_0(s) - z(0)| of order 0 and order 1.
* ``ntk_drift``: |H - H_0| / |H_0|. Order 0: 0; order 1: |H_1| / |H_0|.
* ``instance_ntk_error``: |H - forecast| / |H_0| of order 0 and order 1.

Truncation is g^2 times order 0, with g the forecast's own expansion parameter up to t. A network with kinks has none:
nothing estimates what their crossings add.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_eft.forecast.comparison.compared import Compared, component
from torch_eft.forecast.comparison.operations import OperationCount
from torch_eft.forecast.comparison.work import Allowance, shown
from torch_eft.forecast.network import predict_from_network
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.kinks import kinked_operations
from torch_eft.measure.forward.probe import OutputFn, as_probe
from torch_eft.measure.kernels.metrics import as_trace
from torch_eft.results.training import Training
from torch_eft.results.trajectory import Trajectory, Validity

FIRST_HORIZON = 256
"""Steps to forecast at first where the length of the training is unknown."""

ORDER_1 = "dNTK and ddNTK"
"""Name of what order 1 adds."""

_EXTENSION = 4
_LARGEST_INTEGRATION = 4e9
"""Multiplications of the frozen path, T M^2, up to which it is integrated in one piece."""

_FEWEST_DIRECTIONS, _MOST_DIRECTIONS = 3, 24
_LONGEST_AT_ONCE = 2000


class InstanceComparison:
    """The forecast of one network, and its real training beside it.

    Args:
        model: The network, at theta_0; it is copied.
        x_train: Training inputs.
        y_train: Targets, as the loss takes them.
        x_probe: Probe inputs.
        training: The training, full batch; steps beyond its number extend the forecast.
        lambdas: The learning-rate tensor.
        output_fn: Converts the model's return value to (N, C).
        allowance: Work that order 1 may take; None: 10 s of one core.
        largest: Largest number of outputs M = N C over training and probe points.
        earlier: The ``state`` of the same forecast, to make it again from the theta_0 in there.

    Raises:
        ValueError: If M is too large, or there is no forecast of this training; the message says why.
    """

    def __init__(
        self,
        model: nn.Module,
        x_train: Any,
        y_train: Tensor,
        x_probe: Any,
        training: Training,
        *,
        lambdas: Mapping[str, float],
        output_fn: OutputFn | None = None,
        allowance: Allowance | None = None,
        largest: int = 512,
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        with isolated(model) as network:
            self._model = copy.deepcopy(network.shadow)
        if earlier is not None:
            restored(self._model, earlier["theta_0"])
        for parameter in self._model.parameters():
            parameter.grad = None
        self._x_train, self._y_train, self._x_probe = x_train, y_train, as_probe(x_probe).inputs
        self._training, self._lambdas, self._output_fn = training, dict(lambdas), output_fn
        self._allowance = Allowance(10.0) if allowance is None else allowance
        self._counted: tuple[float, float] | None = None
        self._modes: int | None = None if earlier is None else earlier["modes"]
        with isolated(self._model, output_fn) as network, torch.no_grad():
            channels = network(network.params, network.place(as_probe(x_probe))).shape[1]
        self._train_outputs = as_probe(x_train).size * channels
        self.outputs = self._train_outputs + as_probe(x_probe).size * channels
        if self.outputs > largest:
            raise ValueError(
                f"{self.outputs} outputs on training and probe points; one network's forecast is made for up to "
                f"{largest}"
            )
        self.description = ""
        self._kinked = kinked_operations(self._model, as_probe(x_probe), output_fn=output_fn) != ()
        self._forecast(int(min(training.steps, _LONGEST_AT_ONCE) if earlier is None else earlier["steps"]))

    # ---- theta_0 in a checkpoint

    def state(self) -> dict[str, Any]:
        """Return the values at theta_0, the number of directions and the last step; plain types and tensors."""
        return {
            "theta_0": {name: value.detach() for name, value in values_of(self._model).items()},
            "modes": self._modes,
            "steps": self.steps,
        }

    # ---- the forecast

    @property
    def model(self) -> nn.Module:
        """The network at theta_0; a copy."""
        return self._model

    @property
    def steps(self) -> int:
        """The last step T of the forecast."""
        return len(self.order_0.steps) - 1

    @property
    def validity(self) -> Validity:
        """Where the highest order holds."""
        return self.order_0.validity if self.order_1 is None else self.order_1.validity

    @property
    def level(self) -> str:
        """Level and order of the theory."""
        return f"instance, order {0 if self.order_1 is None else 1}"

    @property
    def provenance(self) -> str:
        """Provenance of the highest order."""
        return self.order_0.provenance if self.order_1 is None else self.order_1.provenance

    def _forecast(self, steps: int) -> None:
        steps = max(1, min(steps, int(_LARGEST_INTEGRATION / self.outputs**2)))
        self.order_0: Trajectory = self._predicted(steps, 0)
        self.order_1: Trajectory | None = None
        modes = self._affordable(steps)
        if modes is not None:
            pairs = modes * (modes + 1) / 2 + modes**2
            with self._allowance.working(ORDER_1, pairs * self.outputs**2):
                self.order_1 = self._predicted(steps, 1, modes)
        z = self.order_0.output_mean
        self._moved = (z - z[0]).flatten(1).norm(dim=1)
        self._largest_moved = self._moved.cummax(0)[0]
        self._H_0 = self.order_0.ntk_mean[0]

    def _affordable(self, steps: int) -> int | None:
        """Return how many directions the allowance covers, or None if too few; ``description`` says so."""
        if self._modes is None:
            counts = range(_MOST_DIRECTIONS, _FEWEST_DIRECTIONS - 1, -1)
            affordable = (modes for modes in counts if self._work(steps, modes) <= self._allowance.seconds)
            self._modes = next(affordable, 0)
        work = self._work(steps, max(self._modes, _FEWEST_DIRECTIONS))
        self._allowance.plan({ORDER_1: work})
        if self._modes < _FEWEST_DIRECTIONS:
            self.description = (
                f"order 0 only: {ORDER_1} in {_FEWEST_DIRECTIONS} directions takes {self._allowance.refusal(ORDER_1)}"
            )
            return None
        self.description = (
            f"dNTK and ddNTK along up to {self._modes} directions: about {shown(work)} of work of one core, "
            f"{self._allowance.seconds:g} s are allowed"
        )
        return self._modes

    def _work(self, steps: int, modes: int) -> float:
        """Count the work of order 1 along some directions, by what one and two of them take on three steps."""
        if self._counted is None:
            counts = []
            for directions in (1, 2):
                with OperationCount() as count:
                    self._predicted(3, 1, directions)
                counts.append(count.seconds)
            # r directions take about 3/2 r^2 + r Gram matrices of derivatives.
            self._counted = counts[0], (counts[1] - counts[0]) / 5.5
        single, gram = self._counted
        columns = 2 * modes**2 + 4 * modes**3
        observed = self.outputs - self._train_outputs
        each_step = 2e-4 + 1e-9 * self.outputs * columns + 1e-9 * observed**2 * (modes + 2 * modes**2)
        return single + gram * (1.5 * modes**2 + modes - 2.5) + steps * each_step

    def _predicted(self, steps: int, order: int, modes: int | None = None) -> Trajectory:
        return predict_from_network(
            self._model,
            self._x_train,
            self._y_train,
            self._x_probe,
            replace(self._training, steps=steps),
            order=order,
            lambdas=self._lambdas,
            output_fn=self._output_fn,
            num_modes=modes,
        )

    def reaches(self, step: int) -> bool:
        """Return True if the forecast covers a step, extending it as far as the allowance covers the work for it."""
        if step > self.steps:
            for longer in (max(step, _EXTENSION * self.steps), step):
                if self.order_1 is None or self._work(longer, self._modes or 0) <= self._allowance.seconds:
                    self._forecast(longer)
                    break
        return step <= self.steps

    # ---- the comparison

    def expansion_parameter(self, step: int) -> float | None:
        """Return the size of order 1 relative to order 0 up to a step; None without order 1."""
        if self.order_1 is None or self.order_1.ntk_truncation is None:
            return None
        at = min(step, self.steps)
        scale = float(self._H_0.square().mean().sqrt())
        return math.sqrt(max(0.0, float(self.order_1.ntk_truncation[at].flatten()[0]) / scale))

    def compare(self, step: int, output: Tensor, ntk: Tensor | None, ntk_0: Tensor | None) -> dict[str, Compared]:
        """Compare forecast and measurement at a step after the first.

        Args:
            step: Optimizer steps taken since theta_0, covered by the forecast.
            output: Measured outputs on the probe, (N_p, C).
            ntk: Measured NTK, (N_p, N_p, C, C) or (N_p, N_p), with the same lambda; None leaves its numbers out.
            ntk_0: The same at theta_0.

        Returns:
            ``{quantity: Compared}``.
        """
        if step == 0 or not float(self._moved[step]) > 0:
            return {}
        z_0 = self.order_0.output_mean
        z, start, frozen = output.to(z_0), z_0[0], z_0[step]
        count, largest = math.sqrt(z.numel()), self._largest_moved[step]
        u = frozen - start
        order_1 = error_1 = truncation = None
        g = self.expansion_parameter(step)
        if self.order_1 is not None and g is not None:
            predicted = self.order_1.output_mean[step]
            order_1 = float(component(predicted - start, u)) / count
            error_1 = float((z - predicted).norm() / largest)
            if not self._kinked:
                truncation = g**2 * float(largest) / count + 1e-6 * float(start.norm()) / count
        compared = {
            "instance_output": Compared(
                float(component(z - start, u)) / count, float(u.norm()) / count, order_1, None, truncation
            ),
            "instance_output_error": Compared(None, float((z - frozen).norm() / largest), error_1),
        }
        if ntk is not None and ntk_0 is not None:
            compared |= self._ntks(step, ntk, ntk_0, g)
        return compared

    def _ntks(self, step: int, ntk: Tensor, ntk_0: Tensor, g: float | None) -> dict[str, Compared]:
        H, H_0 = ntk.to(self._H_0), ntk_0.to(self._H_0)
        change, scale = H - H_0, H_0.norm()
        drifted = float(change.norm() / scale)
        if self.order_1 is None or g is None:
            return {"ntk_drift": Compared(drifted, 0.0), "instance_ntk_error": Compared(None, drifted)}
        D = self.order_1.ntk_change[step]
        D = as_trace(D) if ntk.ndim == 2 else D
        return {
            "ntk_drift": Compared(drifted, 0.0, float(D.norm() / scale), None, None if self._kinked else g**2 + 1e-6),
            "instance_ntk_error": Compared(None, drifted, float((change - D).norm() / scale)),
        }


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def restored(model: nn.Module, theta_0: Mapping[str, Tensor]) -> None:
    """Write values at theta_0 into a network.

    Args:
        model: A copy.
        theta_0: Parameters and buffers by name.

    Raises:
        ValueError: If names or shapes differ.
    """
    own = values_of(model)
    if set(own) != set(theta_0):
        raise ValueError(f"parameters and buffers differ from those at theta_0: {sorted(set(own) ^ set(theta_0))[:2]}")
    with torch.no_grad():
        for name, value in own.items():
            if value.shape != theta_0[name].shape:
                raise ValueError(f"{name}: {tuple(value.shape)}, at theta_0 {tuple(theta_0[name].shape)}")
            value.copy_(theta_0[name])
