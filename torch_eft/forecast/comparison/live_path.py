"""The frozen NTK with the learning rates and the weight decay that a training really has, followed as it goes.

With the Jacobian J of theta_0, and theta - theta_0 = sum_g (J_g^T p_g + a_g theta_{0,g}) over the optimizer's parameter
groups g, gradient descent on L + (wd_g / 2) |theta_g|^2 is a recursion of coefficients, closed in them:

    v_g = m v_g + e + wd_g p_g,     p_g -= lr_g v_g,     u_g = m u_g + wd_g (1 + a_g),     a_g -= lr_g u_g,
    z = z_0 + sum_g (J_g J_g^T p_g + a_g J_g theta_{0,g}),     e = dL/dz on the training points.

Order 0 only: where learning rates become known step by step, there is no path along which dNTK and ddNTK could be
measured before.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_eft.forecast.comparison.compared import Compared, component
from torch_eft.forecast.comparison.instance import restored, values_of
from torch_eft.forecast.network import joined_inputs
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY, JacobianGram
from torch_eft.measure.kernels.metrics import as_matrix
from torch_eft.measure.kernels.products import NTKOperator
from torch_eft.results.training import Training
from torch_eft.results.trajectory import Validity
from torch_eft.theory.training.optimizer import Loss, checked_targets


@dataclass(frozen=True)
class Group:
    """A parameter group of ``torch.optim.SGD``.

    Args:
        names: Its parameters.
        weight_decay: wd.
    """

    names: frozenset[str]
    weight_decay: float


class LivePath:
    """Order 0 of one network, and its real training beside it, by the learning rates that were taken.

    Args:
        model: The network, at theta_0; it is copied.
        x_train: Training inputs.
        y_train: Targets, as the loss takes them.
        x_probe: Probe inputs.
        training: Loss, reduction and momentum; its learning rate is not used.
        groups: The optimizer's.
        factor: What multiplies the loss.
        output_fn: Converts the model's return value to (N, C).
        largest: Largest number of outputs M = N C over training and probe points.
        theta_0: Values to begin from, in place of the model's own.

    Attributes:
        rates: Learning rates of every group, step by step, as far as they are known.

    Raises:
        ValueError: If M is too large, or the network cannot be measured.
    """

    level = "instance, order 0"

    def __init__(
        self,
        model: nn.Module,
        x_train: Any,
        y_train: Tensor,
        x_probe: Any,
        training: Training,
        groups: Sequence[Group],
        *,
        factor: float = 1.0,
        output_fn: OutputFn | None = None,
        largest: int = 512,
        theta_0: Mapping[str, Tensor] | None = None,
    ) -> None:
        with isolated(model) as network:
            self._model = copy.deepcopy(network.shadow)
        if theta_0 is not None:
            restored(self._model, theta_0)
        train, probe = as_probe(x_train), as_probe(x_probe)
        everything = Probe(joined_inputs(probe.inputs, train.inputs))
        self._training, self._groups, self._factor = training, tuple(groups), factor
        self.rates: list[list[float]] = []
        with isolated(self._model, output_fn, torch.float64) as network:
            with torch.no_grad():
                z = checked_output(network, everything)
            self._channels = z.shape[1]
            if z.numel() > largest:
                raise ValueError(
                    f"{z.numel()} outputs on training and probe points; one network's forecast is made for up to "
                    f"{largest}"
                )
            self._start = z.flatten()
            self._count = len(self._start) - train.size * self._channels
            targets = checked_targets(y_train.detach().to(z.device), training.loss, train.size, self._channels)
            self._loss = Loss(training.loss, targets, training.reduction)
            zero = {name: torch.zeros_like(value) for name, value in network.params.items()}
            self._kernels, self._decayed = [], []
            for group in self._groups:
                lambdas = {name: float(name in group.names) for name in zero}
                kernel = as_matrix(JacobianGram(network, everything, lambdas, DEFAULT_MEMORY).ntk())
                self._kernels.append(kernel[:, self._count :])
                own = {name: value if name in group.names else zero[name] for name, value in network.params.items()}
                along = NTKOperator(network, everything, None).jvp(own) if group.weight_decay else z
                self._decayed.append(along.detach().flatten())
        self._restart()

    def _restart(self) -> None:
        trained = len(self._start) - self._count
        self._p, self._v = (self._start.new_zeros(len(self._groups), trained) for _ in range(2))
        self._a, self._u = (self._start.new_zeros(len(self._groups)) for _ in range(2))
        self._taken, self._largest = 0, self._start.new_zeros(())

    # ---- what a comparison has

    @property
    def steps(self) -> int:
        """The last step that it reaches: the latest one whose learning rate is known."""
        return len(self.rates)

    @property
    def validity(self) -> Validity:
        """It is order 0."""
        return Validity("caution", "order 0: the NTK is taken as frozen, and nothing shows how far that holds")

    @property
    def provenance(self) -> str:
        """What it is."""
        momentum = f" with momentum {self._training.momentum:g}" if self._training.momentum else ""
        decays = sorted({group.weight_decay for group in self._groups})
        decay = f", weight decay {', '.join(f'{value:g}' for value in decays)}" if decays != [0.0] else ""
        return f"order 0 of this network's NTK hierarchy; full-batch gradient descent{momentum}{decay}"

    description = "the learning rate of every step is the one that was taken"

    def expansion_parameter(self, step: int) -> float | None:
        """None: there is no order 1."""
        return None

    def state(self) -> dict[str, Any]:
        """Return the values at theta_0 and the learning rates; plain types and tensors."""
        theta_0 = {name: value.detach() for name, value in values_of(self._model).items()}
        return {"theta_0": theta_0, "rates": [list(rates) for rates in self.rates]}

    def reaches(self, step: int) -> bool:
        """Return whether the learning rates of all steps up to this one are known."""
        return step <= self.steps

    # ---- the forecast

    def _at(self, step: int) -> Tensor:
        """The outputs on the probe at a step."""
        if step < self._taken:
            self._restart()
        training, decay = self._training, [group.weight_decay for group in self._groups]
        wd = self._start.new_tensor(decay)
        while self._taken < step:
            z = self._now()
            e = self._factor * self._loss.error(z[self._count :].unflatten(0, (-1, self._channels))).flatten()
            gradient, shrink = e + wd[:, None] * self._p, wd * (1 + self._a)
            kept = 1.0 if self._taken == 0 else 1 - training.dampening
            self._v = training.momentum * self._v + kept * gradient
            self._u = training.momentum * self._u + kept * shrink
            along, shrinking = self._v, self._u
            if training.nesterov:
                along, shrinking = gradient + training.momentum * along, shrink + training.momentum * shrinking
            rates = self._start.new_tensor(self.rates[self._taken])
            self._p, self._a = self._p - rates[:, None] * along, self._a - rates * shrinking
            self._taken += 1
            moved = (self._now() - self._start)[: self._count].norm()
            self._largest = torch.maximum(self._largest, moved)
        return self._now()[: self._count]

    def _now(self) -> Tensor:
        z = self._start
        for kernel, p, a, along, group in zip(
            self._kernels, self._p, self._a, self._decayed, self._groups, strict=True
        ):
            z = z + kernel @ p
            z = z + a * along if group.weight_decay else z
        return z

    def compare(self, step: int, output: Tensor, ntk: Tensor | None, ntk_0: Tensor | None) -> dict[str, Compared]:
        """Compare forecast and measurement; as ``InstanceComparison.compare``."""
        start = self._start[: self._count].unflatten(0, (-1, self._channels))
        u = self._at(step).view_as(start) - start
        size = float(u.norm())
        if not 0 < size < math.inf:
            return {}
        z = output.to(start)
        count = math.sqrt(z.numel())
        compared = {
            "instance_output": Compared(float(component(z - start, u)) / count, size / count),
            "instance_output_error": Compared(None, float((z - start - u).norm()) / float(self._largest)),
        }
        if ntk is not None and ntk_0 is not None:
            drifted = float((ntk - ntk_0.to(ntk)).norm() / ntk_0.norm())
            compared["ntk_drift"] = Compared(drifted, 0.0)
            compared["instance_ntk_error"] = Compared(None, drifted)
        return compared
