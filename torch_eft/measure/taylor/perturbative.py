"""The first correction in 1/n to the Taylor model of order 1: linear equations, which cannot diverge.

With d = theta - theta_0 count f'' as kappa and f''' as kappa^2,

    z_kappa(d) = f + f' d + kappa f'' d d / 2 + kappa^2 f''' d d d / 6,

since at large width f'' J has norm^2 O(1/n) (ddNTK II), as has f''' J J J (ddNTK I), while J f'' J (dNTK) is O(1/n) by
its random signs. Two orders in kappa are therefore one in 1/n; the first alone is not (it lacks ddNTK II). Training
makes d a series too, d + kappa delta + kappa^2 xi, where d is that of order 1. As kappa z_kappa(d) is f along the
curve theta_0 + kappa d + kappa^2 delta + kappa^3 xi, one jet of the network has all outputs as its coefficients,

    c_1 = f' d,   c_2 = f' delta + f'' d d / 2,   c_3 = f' xi + f'' d delta + f''' d d d / 6,

and z = f + c_1 + c_2 + c_3. With the loss's series e + kappa h_1 + kappa^2 h_2 = L'(f + c_1 + kappa c_2 + kappa^2 c_3)
the gradients come out of one backward pass of e c_3 + h_1 c_2 + h_2 c_1, in reverse order: that in xi is f'^T e, which
moves d; that in delta is f'^T h_1 + (f'' d)^T e, which moves delta; and that in d moves xi. An optimizer that is linear
in gradients, parameters and momenta moves all three alike. Where the Taylor model of order 3 diverges, delta and
xi only grow, and their size relative to f' d says so.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from torch_eft.measure.forward.probe import OutputFn
from torch_eft.measure.jets.jet import Jet
from torch_eft.measure.kernels.optimizers import plain_optimizer
from torch_eft.measure.taylor.model import Curve, TaylorModel, as_call
from torch_eft.measure.taylor.model_checks import judged_correction
from torch_eft.measure.taylor.optimizer import optimizer_copy
from torch_eft.results.trajectory import Validity


class PerturbativeTaylorModel(TaylorModel):
    """The Taylor model of order 1 with its first correction in 1/n, by perturbation about it.

    Called with inputs it returns f + c_1 + c_2 + c_3. Train it by ``step`` alone, with the optimizer that
    ``optimizer_like`` makes of the real run's SGD (momentum, Nesterov and weight decay included).

    Args:
        model: As for ``TaylorModel``.
        output_fn: Turns what the model returns into one tensor of outputs, if it is not one.

    Raises:
        ValueError: As ``TaylorModel``.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> model = measure.PerturbativeTaylorModel(network)
        >>> optimizer = model.optimizer_like(torch.optim.SGD(network.parameters(), lr=0.1))
        >>> _ = model.step(torch.eye(3), lambda z: z.square().mean(), optimizer)
        >>> [term.shape for term in model.terms(torch.eye(3))[:2]]
        [torch.Size([3, 2]), torch.Size([3, 2])]
    """

    def __init__(self, model: nn.Module, *, output_fn: OutputFn | None = None) -> None:
        super().__init__(model, taylor_order=3, output_fn=output_fn)
        self._delta, self._xi = (nn.ParameterList(map(torch.zeros_like, self._theta.values())) for _ in range(2))

    @property
    def delta(self) -> dict[str, Tensor]:
        """The first derivative of theta in kappa, by the network's names."""
        return dict(zip(self._theta, self._delta, strict=True))

    @property
    def xi(self) -> dict[str, Tensor]:
        """Half the second derivative of theta in kappa, by the network's names."""
        return dict(zip(self._theta, self._xi, strict=True))

    def terms(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the network at theta_0, the change c_1 of order 1 and the corrections c_2 and c_3.

        Args:
            *args: As the network takes them.
            **kwargs: Likewise.

        Returns:
            Four tensors of outputs.

        Raises:
            ValueError: If the outputs are not one tensor that depends on trainable parameters.
        """
        value = self._along(self._curve(), args, kwargs)
        if not isinstance(value, Jet):
            raise ValueError(
                f"output_fn: the outputs are {type(value).__name__}, not a tensor that depends on trainable parameters;"
                " pick one, for example output_fn=lambda out: out[0]"
            )
        zero = torch.zeros_like(value.primal)
        first, second, third = (zero if part is None else part for part in value.coefficients[1:])
        return value.primal, first, second, third

    def step(self, inputs: Any, loss_fn: Callable[[Any], Tensor], optimizer: Optimizer) -> Tensor:
        """Take one training step of theta, delta and xi.

        Args:
            inputs: As for ``TaylorModel.step``.
            loss_fn: The loss as a function of the outputs, three times differentiable.
            optimizer: Made by ``optimizer_like``.

        Returns:
            The loss of order 1 before the step, detached.
        """
        _check_linear(optimizer)
        self._check_own(optimizer)
        args, kwargs = as_call(inputs)
        leaves = self._leaves()
        with self._random_state_kept(), torch.enable_grad():
            value, first, second, third = self.terms(*args, **kwargs)
            loss, e, h_1, h_2 = _loss_series(loss_fn, value + first.detach(), second.detach(), third.detach())
            gradients = torch.autograd.grad((first, second, third), leaves, (h_2, h_1, e), allow_unused=True)
            count = len(self._xi)
            # The gradient in xi moves theta, that in delta moves delta, that in theta moves xi: see the top.
            reverse = (*gradients[2 * count :], *gradients[count : 2 * count], *gradients[:count])
            for leaf, gradient in zip(leaves, reverse, strict=True):
                leaf.grad = gradient
            optimizer.step()
        return loss

    def optimizer_like(self, optimizer: Optimizer) -> Optimizer:
        """Make the real run's SGD for theta, delta and xi.

        Raises ``ValueError`` as for ``TaylorModel``; for optimizers that are not linear in the gradient.

        Args:
            optimizer: The SGD of the network.

        Returns:
            A new optimizer of theta, delta and xi.
        """
        _check_linear(optimizer)
        delta, xi = self.delta, self.xi
        leaves = {name: [value, delta[name], xi[name]] for name, value in self.theta.items()}
        return optimizer_copy(optimizer, leaves, self._originals, self.theta_0)

    def check(self, inputs: Any) -> Validity:
        """Check if the correction is small on ``inputs``, as an expansion about order 1 needs; see ``TaylorModel``."""
        args, kwargs = as_call(inputs)
        with torch.no_grad():
            _, first, second, third = self.terms(*args, **kwargs)
        return judged_correction(super().check(inputs), first, second + third)

    def _leaves(self) -> list[Tensor]:
        return [*self._theta.values(), *self._delta, *self._xi]

    def _curve(self) -> Curve:
        delta, xi = self.delta, self.xi
        return {name: (line[0], delta[name], xi[name]) for name, line in super()._curve().items()}


def _loss_series(
    loss_fn: Callable[[Tensor], Tensor], outputs: Tensor, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L, L', L'' first and L'' second + L''' first first / 2 at the outputs."""
    z = outputs.detach().requires_grad_()
    loss = loss_fn(z)
    e = _derivative(loss, z, None)
    h_1 = _derivative(e, z, first)
    h_2 = _derivative(e, z, second) + 0.5 * _derivative(h_1, z, first)
    return loss.detach(), e.detach(), h_1.detach(), h_2.detach()


def _derivative(value: Tensor, z: Tensor, direction: Tensor | None) -> Tensor:
    """The derivative of a scalar, or of a gradient along a direction; 0 where nothing depends on z any more."""
    if direction is not None and not value.requires_grad:
        return torch.zeros_like(z)
    options: dict[str, bool] = {} if direction is None else {"allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(value, z, direction, create_graph=True, **options)[0]


def _check_linear(optimizer: Optimizer) -> None:
    kind = plain_optimizer(optimizer)
    if not isinstance(kind, SGD):
        raise ValueError(
            f"optimizer: {type(kind).__name__} given; the perturbative correction is derived for updates linear in the "
            "gradient: torch.optim.SGD, with or without momentum, Nesterov and weight decay. For others train "
            "TaylorModel(model, taylor_order=3)"
        )
