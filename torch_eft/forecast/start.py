"""Measurements at theta_0 from which one network is forecast: outputs, NTK, and differentials along the frozen path.

All on probe points, then training points, with one index (sample, output): M outputs, the first K on probe points, the
last B on training points.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import Probe
from torch_eft.measure.jacobian.engine import JacobianGram
from torch_eft.measure.jets.jet import watch_kinks
from torch_eft.measure.kernels.metrics import as_matrix
from torch_eft.measure.network.along_path import DirectionPair, along_path
from torch_eft.results.progress.bar import counted
from torch_eft.results.progress.work import worked
from torch_eft.results.training import Training
from torch_eft.theory.hierarchy.contractions import PathTensors, check_memory, path_basis
from torch_eft.theory.hierarchy.evolution import FirstOrder, first_order, frozen_path
from torch_eft.theory.hierarchy.gradient_flow import eigenmodes, first_order_flow, frozen_flow
from torch_eft.theory.training.optimizer import Loss, checked_targets


@dataclass(frozen=True)
class ForecastOrders:
    """The forecast of one network, order by order.

    Args:
        z0: (T+1, M), outputs with the NTK frozen.
        first: The first order; None if it was not computed.
        directions: Number r of directions along which dNTK and ddNTK were measured.
        left_out: Share of the path outside these directions.
        kinks: The kinked operations that the derivatives met.
    """

    z0: Tensor
    first: FirstOrder | None = None
    directions: int = 0
    left_out: float = 0.0
    kinks: tuple[str, ...] = ()


class StartingDerivatives:
    """Outputs and NTK at theta_0, with dNTK and ddNTK along the path that training takes from there.

    Args:
        network: The network, isolated, in float64.
        everything: Probe inputs, then training inputs.
        x_train: Training inputs.
        y_train: Targets.
        training: The training.
        lambdas: The learning-rate tensor, see ``measure.ntk``.
        memory: Bytes allowed for the NTK's differentials, and for one Gram matrix with its factors.

    Raises:
        ValueError: If targets or batches do not fit, ``memory`` is too small, or the network cannot be measured.
    """

    def __init__(
        self,
        network: IsolatedModel,
        everything: Probe,
        x_train: Probe,
        y_train: Tensor,
        training: Training,
        lambdas: Mapping[str, float] | float | None,
        memory: int,
    ) -> None:
        self._network, self._everything, self._x_train = network, everything, x_train
        self._lambdas, self._memory, self._training = lambdas, memory, training
        training.check_batches(x_train.size)
        with torch.no_grad():
            self.z = checked_output(network, everything).detach()
        points, self.C = self.z.shape
        targets = checked_targets(y_train.detach().to(self.z.device), training.loss, x_train.size, self.C)
        self.loss = Loss(training.loss, targets, training.reduction)
        self.M, self.B = points * self.C, x_train.size * self.C
        self.K = self.M - self.B
        self.train = torch.arange(self.K, self.M, device=self.z.device)
        check_memory(self.M, 8 * 3 * self.M**2, memory)
        self.whole_H = as_matrix(JacobianGram(network, everything, lambdas, memory).ntk())
        self.H = self.whole_H[:, self.train]

    @property
    def train_outputs(self) -> Tensor:
        """Outputs on the training points, (N, C)."""
        return self.z.flatten()[self.train].unflatten(0, (-1, self.C))

    def forecast(self, order: int, num_modes: int | None, tolerance: float) -> ForecastOrders:
        """Integrate the training.

        Args:
            order: 0, or 1 with the response to dNTK and ddNTK.
            num_modes: Largest number of directions for dNTK and ddNTK, or None.
            tolerance: Share of the path below which directions are left out.

        Returns:
            The outputs and, at order 1, the change of the NTK.
        """
        training, loss, steps = self._training, self.loss, int(self._training.steps)
        if not training.flows:
            path = frozen_path(self.z, self.H, self.train, loss, training)
            if order == 0:
                return ForecastOrders(path.z)
            basis = path_basis(path.p, self.H[self.train], tolerance, num_modes)
            tensors, kinks = self._measured(basis.basis, basis.dual, steps)
            first = first_order(path, self.H, self.train, tensors, loss, training, self.C)
            return ForecastOrders(path.z, first, len(basis.basis), basis.left_out, kinks)
        z, targets = self.z.flatten(), loss.targets.flatten()
        step = (training.learning_rate or 0.0) * loss.scale(self.B)
        modes = eigenmodes(self.H[self.train], z[self.train] - targets, step * steps, tolerance, num_modes)
        times = step * torch.arange(steps + 1, dtype=z.dtype, device=z.device)
        z0 = frozen_flow(z, self.H, self.train, targets, modes, times)
        if order == 0:
            return ForecastOrders(z0)
        tensors, kinks = self._measured(modes.basis, modes.dual, steps)
        first = first_order_flow(z, self.H, self.train, targets, tensors, modes, step, steps)
        return ForecastOrders(z0, first, len(modes.basis), modes.left_out, kinks)

    def _measured(self, basis: Tensor, dual: Tensor, steps: int) -> tuple[PathTensors, tuple[str, ...]]:
        """Measure dNTK and ddNTK along a basis; also return the kinked operations met."""
        r, M, K = len(basis), self.M, self.K
        parameters = sum(value.numel() for value in self._network.params.values())
        held = 3 * M**2 * (r + 1) + M * (2 * r**2 + 4 * r**3) + K**2 * (r + 2 * r**2) + 2 * r * parameters
        check_memory(M, 8 * (held + steps * (M + K**2 + r**2)), self._memory)
        collected = _PathTensorsFromPairs(basis, dual, M, K, self.train)
        network, points = self._network, self._everything
        with watch_kinks() as kinks:
            parts = along_path(network, points, self._x_train, basis, self._lambdas, self._memory)
            for part in counted("measuring dNTK and ddNTK along the path", parts, r * (r + 1) // 2 + r**2):
                collected.add(part)
                worked(M**2)
        return collected.tensors(), tuple(dict.fromkeys(kinks))


class _PathTensorsFromPairs:
    """Collects ``PathTensors`` from the matrices of one pair of directions after another."""

    def __init__(self, basis: Tensor, dual: Tensor, M: int, K: int, train: Tensor) -> None:
        r, self._K, self._train, self._basis = len(basis), K, train, basis
        new = basis.new_zeros
        self._tensors = PathTensors(
            basis,
            dual,
            dH_first=new(M, r, r),
            dH_second=new(M, r, r),
            ddI_first=new(M, r, r, r),
            ddI_second=new(M, r, r, r),
            X_first=new(M, r, r, r),
            X_second=new(M, r, r, r),
            ntk_p=new(K, K, r),
            ntk_q=new(K, K, r, r),
            ntk_pp=new(K, K, r, r),
        )

    def add(self, part: DirectionPair) -> None:
        """Add the matrices of one pair."""
        c, d, tensors = part.c, part.d, self._tensors
        if part.dH is not None:
            tensors.dH_first[:, :, c], tensors.dH_second[:, :, c] = self._contracted(part.dH)
            tensors.ntk_p[:, :, c] = self._symmetric(part.dH)
        if part.ddI is not None and part.ddII is not None:
            first, second = self._contracted(part.ddI)
            squares = self._symmetric(part.ddI) / 2 + part.ddII[: self._K, : self._K]
            for i, j in ((c, d), (d, c)):
                tensors.ddI_first[:, :, i, j], tensors.ddI_second[:, :, i, j] = first, second
                tensors.ntk_pp[:, :, i, j] = squares
        if part.X is not None:
            tensors.X_first[:, :, c, d], tensors.X_second[:, :, c, d] = self._contracted(part.X)
            tensors.ntk_q[:, :, c, d] = self._symmetric(part.X)

    def _contracted(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return (self._basis @ value[self._train]).T, value[:, self._train] @ self._basis.T

    def _symmetric(self, value: Tensor) -> Tensor:
        part = value[: self._K, : self._K]
        return part + part.T

    def tensors(self) -> PathTensors:
        """Return all contractions.

        Raises:
            ValueError: If X_abcd = X_cdab fails: its two sides are differentiated by Taylor series and by reverse mode.
        """
        X = torch.einsum("bB,Bacd->bacd", self._basis, self._tensors.X_second[self._train])
        asymmetry, size = float((X - X.permute(2, 3, 0, 1)).norm()), float(X.norm())
        if not asymmetry <= torch.finfo(X.dtype).eps ** 0.5 * size:
            raise ValueError(
                "model: its second derivatives cannot be trusted: Taylor series and reverse mode disagree by "
                f"{asymmetry / size:.3g} of ddII along the path"
            )
        return self._tensors
