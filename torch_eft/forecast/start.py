"""What a forecast starts from: one network's outputs and NTK, and its differentials along the frozen path.

All on probe points, then training points, with one index (sample, output): M outputs, the first K on probe points, the
last B on training points.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import Probe
from torch_eft.measure.jacobian.engine import JacobianGram
from torch_eft.measure.jets.jet import watch_kinks
from torch_eft.measure.kernels.along_path import Part, along_path
from torch_eft.measure.kernels.metrics import as_matrix
from torch_eft.theory.hierarchy.contractions import PathTensors, check_memory, path_basis
from torch_eft.theory.hierarchy.evolution import FirstOrder, first_order, frozen_path
from torch_eft.theory.hierarchy.gradient_flow import eigenmodes, flow, frozen_flow
from torch_eft.theory.training.optimizer import Descent, Loss, LossFunction, Reduction


class Start:
    """The measured start: outputs and NTK on probe points, then training points, index (sample, output)."""

    def __init__(
        self,
        network: IsolatedModel,
        everything: Probe,
        train_probe: Probe,
        y_train: Tensor,
        loss: str | LossFunction,
        reduction: Reduction,
        lambdas: Mapping[str, float] | float | None,
        memory: int,
        probes: int,
    ) -> None:
        self.network, self.everything, self.train_probe = network, everything, train_probe
        self.lambdas, self.memory, self.probes = lambdas, memory, probes
        with torch.no_grad():
            self.z = checked_output(network, everything).detach()
        points, self.C = self.z.shape
        self.loss = Loss(loss, self._targets(y_train, loss), reduction)
        self.loss_name = f"{loss} ({reduction})" if isinstance(loss, str) else "a function of the outputs"
        self.M, self.K = points * self.C, probes * self.C
        self.B = self.M - self.K
        self.train = torch.arange(self.K, self.M, device=self.z.device)
        check_memory(self.M, 8 * 3 * self.M**2, memory)
        self.whole_H = as_matrix(JacobianGram(network, everything, lambdas, memory).ntk())
        self.H = self.whole_H[:, self.train]

    def _targets(self, y: Tensor, loss: str | LossFunction) -> Tensor:
        y = y.detach().to(self.z.device, self.z.dtype if y.is_floating_point() else None)
        N, C = len(self.z) - self.probes, self.C
        classes = loss == "cross_entropy" and not y.is_floating_point()
        if classes and tuple(y.shape) == (N,) and 0 <= int(y.min()) <= int(y.max()) < C:
            return y
        if (isinstance(loss, str) and tuple(y.shape) != (N, C)) or len(y) != N or classes:
            wanted = f"({N}, {C})" + (f", or ({N},) classes below {C}" if loss == "cross_entropy" else "")
            raise ValueError(f"y_train: shape {tuple(y.shape)} given; x_train and the outputs ask for {wanted}")
        return y.to(self.z.dtype) if isinstance(loss, str) else y

    def descend(
        self, optimizer: Descent, order: int, modes: int | None, tolerance: float
    ) -> tuple[Tensor, FirstOrder | None, str, tuple[str, ...]]:
        """Outputs at order 0 (T+1, M), the first order, a remark, and the kinks met."""
        path = frozen_path(self.z, self.H, self.train, self.loss, optimizer)
        if order == 0:
            return path.z, None, "", ()
        found = path_basis(path.p, self.H[self.train], tolerance, modes)
        tensors, kinks = self._measured(found.basis, found.dual, optimizer.steps)
        first = first_order(path, self.H, self.train, tensors, self.loss, optimizer, self.C)
        return path.z, first, self._note(len(found.basis), found.left_out), kinks

    def flow(
        self, learning_rate: float, steps: int, order: int, modes: int | None, tolerance: float
    ) -> tuple[Tensor, FirstOrder | None, str, tuple[str, ...]]:
        """As ``descend``."""
        z, targets = self.z.flatten(), self.loss.targets.flatten()
        step = learning_rate * self.loss.scale(self.B)
        found = eigenmodes(self.H[self.train], z[self.train] - targets, step * steps, tolerance, modes)
        times = step * torch.arange(steps + 1, dtype=z.dtype, device=z.device)
        zs = frozen_flow(z, self.H, self.train, targets, found, times)
        if order == 0:
            return zs, None, "", ()
        tensors, kinks = self._measured(found.basis, found.dual, steps)
        first = flow(z, self.H, self.train, targets, tensors, found, step, steps)
        return zs, first, self._note(len(found.basis), found.left_out), kinks

    def _note(self, kept: int, left_out: float) -> str:
        rest = f", {left_out:.1g} of the path left out" if left_out > 0 else ""
        return f" (dNTK and ddNTK along {kept} directions of the path{rest})"

    def _measured(self, basis: Tensor, dual: Tensor, steps: int) -> tuple[PathTensors, tuple[str, ...]]:
        r, M, K = len(basis), self.M, self.K
        parameters = sum(value.numel() for value in self.network.params.values())
        held = 3 * M**2 * (r + 1) + M * (2 * r**2 + 4 * r**3) + K**2 * (r + 2 * r**2) + 2 * r * parameters
        check_memory(M, 8 * (held + steps * (M + K**2 + r**2)), self.memory)
        collected = Collected(basis, dual, M, K, self.train)
        with watch_kinks() as kinks:
            for part in along_path(self.network, self.everything, self.train_probe, basis, self.lambdas, self.memory):
                collected.add(part)
        return collected.tensors(), tuple(dict.fromkeys(kinks))


class Collected:
    """``PathTensors`` out of matrices that come one pair of directions after another."""

    def __init__(self, basis: Tensor, dual: Tensor, M: int, K: int, train: Tensor) -> None:
        r, self.K, self.train, self.basis = len(basis), K, train, basis
        new = basis.new_zeros
        self.found = PathTensors(
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

    def add(self, part: Part) -> None:
        """Take in one pair."""
        c, d, found = part.c, part.d, self.found
        if part.dH is not None:
            found.dH_first[:, :, c], found.dH_second[:, :, c] = self._contracted(part.dH)
            found.ntk_p[:, :, c] = self._both(part.dH)
        if part.ddI is not None and part.ddII is not None:
            first, second = self._contracted(part.ddI)
            squares = self._both(part.ddI) / 2 + part.ddII[: self.K, : self.K]
            for i, j in ((c, d), (d, c)):
                found.ddI_first[:, :, i, j], found.ddI_second[:, :, i, j] = first, second
                found.ntk_pp[:, :, i, j] = squares
        if part.X is not None:
            found.X_first[:, :, c, d], found.X_second[:, :, c, d] = self._contracted(part.X)
            found.ntk_q[:, :, c, d] = self._both(part.X)

    def _contracted(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return (self.basis @ value[self.train]).T, value[:, self.train] @ self.basis.T

    def _both(self, value: Tensor) -> Tensor:
        part = value[: self.K, : self.K]
        return part + part.T

    def tensors(self) -> PathTensors:
        """All of it, if X_abcd = X_cdab: its sides were differentiated by Taylor series and by reverse mode."""
        X = torch.einsum("bB,Bacd->bacd", self.basis, self.found.X_second[self.train])
        allowed = torch.finfo(X.dtype).eps ** 0.5 * float(X.norm())
        if not float((X - X.permute(2, 3, 0, 1)).norm()) <= allowed:
            raise ValueError(
                "model: its second derivatives cannot be trusted: Taylor series and reverse mode disagree by "
                f"{float((X - X.permute(2, 3, 0, 1)).norm() / X.norm()):.3g} of ddII along the path"
            )
        return self.found
