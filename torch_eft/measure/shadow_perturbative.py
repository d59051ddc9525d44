"""The shadow's first correction in 1/n, linearised: it cannot diverge.

With eps in front of the terms that are O(1/n),

    z_eps(theta) = f_1(theta) + eps g(theta),  f_1 = f + f' d,  g = f'' d d / 2 + f''' d d d / 6,  d = theta - theta_0,

training gives theta_eps = theta_1 + eps delta + O(eps^2): theta_1 is the k = 1 shadow, and the outputs to first order
are f_1(theta_1) + [f' delta + g(theta_1)], the second part being O(1/n). f_1 is affine in theta, so that with the
loss's derivatives e = L' and h = L'' (f' delta + g) at the outputs f_1(theta_1), the gradients are

    of L along the k = 1 shadow:     G = f'^T e
    their derivative in eps:         f'^T h + g'^T e.

An optimizer that is linear in gradients, parameters and momenta moves delta by the latter as it moves theta_1 by the
former. The equation for delta is linear and its source the k = 1 shadow: where k = 3 diverges, delta only grows, and
|f' delta + g| / |f' d| says so.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from torch_eft.measure.jets import MAX_ORDER, Jet
from torch_eft.measure.probe import OutputFn
from torch_eft.measure.shadow import ShadowModel, as_call
from torch_eft.measure.shadow_checks import judged_correction
from torch_eft.measure.shadow_optimizer import twin_optimizer
from torch_eft.trajectory import Validity


class PerturbativeShadow(ShadowModel):
    """The k = 1 shadow of a network and the first-order effect of the terms that are O(1/n).

    ``shadow(x)`` gives f_1(theta_1) + f' delta + g(theta_1). Train it by ``step`` alone, with the optimizer that
    ``optimizer_like`` makes of the real run's SGD (momentum, Nesterov, weight decay included).

    Args:
        model: As for ``ShadowModel``.
        output_fn: Turns what the model returns into one tensor of outputs, if it is not one.

    Raises:
        ValueError: As ``ShadowModel``.
    """

    def __init__(self, model: nn.Module, output_fn: OutputFn | None = None) -> None:
        super().__init__(model, 3, output_fn)
        self._delta = nn.ParameterList(torch.zeros_like(value) for value in self.theta.values())

    @property
    def delta(self) -> dict[str, Tensor]:
        """D theta / d eps, by the network's names."""
        return dict(zip(self.theta, self._delta, strict=True))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """f_1 + f' delta + g, one tensor."""
        leading, higher = self._leading_and_higher(args, kwargs)
        return leading + higher + self._response(args, kwargs)

    def step(self, inputs: Any, loss_fn: Callable[[Any], Tensor], optimizer: Optimizer) -> Tensor:
        """One training step of theta_1 and delta.

        Args:
            inputs: As for ``ShadowModel.step``.
            loss_fn: Of the outputs, twice differentiable.
            optimizer: Made by ``optimizer_like``.

        Returns:
            The loss of the k = 1 shadow before the step, detached.
        """
        _check_linear(optimizer)
        args, kwargs = as_call(inputs)
        theta, delta = list(self.theta.values()), list(self._delta)
        with self._random_state_kept(), torch.enable_grad():
            leading, higher = self._leading_and_higher(args, kwargs)
            with torch.no_grad():
                change = self._response(args, kwargs) + higher
            loss, e, h = _loss_and_derivatives(loss_fn, leading, change)
            first = torch.autograd.grad(leading, theta, e, retain_graph=True, allow_unused=True)
            second = torch.autograd.grad((leading, higher), theta, (h, e), allow_unused=True)
            for leaf, gradient in zip((*theta, *delta), (*first, *second), strict=True):
                leaf.grad = gradient
            optimizer.step()
        return loss

    def optimizer_like(self, optimizer: Optimizer) -> Optimizer:
        """The real run's SGD for theta_1 and delta.

        Raises:
            ValueError: As for ``ShadowModel``; for optimizers that are not linear in the gradient.
        """
        _check_linear(optimizer)
        delta = self.delta
        leaves = {name: [value, delta[name]] for name, value in self.theta.items()}
        return twin_optimizer(optimizer, leaves, self._live, self.theta_0)

    def validity(self, inputs: Any) -> Validity:
        """Whether the correction is small on ``inputs``, as an expansion about the k = 1 shadow needs."""
        args, kwargs = as_call(inputs)
        with torch.no_grad():
            _, first, second, third = self._terms(args, kwargs)
            correction = second + third + self._response(args, kwargs)
        return judged_correction(super().validity(inputs), first, correction)

    def _terms(self, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
        """The terms f, f' d, f'' d d / 2 and f''' d d d / 6 at theta_1."""
        theta_0 = self.theta_0
        d = {name: value - theta_0[name] for name, value in self.theta.items()}
        return _filled(self._along(d, MAX_ORDER, args, kwargs))

    def _leading_and_higher(self, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        """f_1 and g at theta_1."""
        value, first, second, third = self._terms(args, kwargs)
        return value + first, second + third

    def _response(self, args: Any, kwargs: Any) -> Tensor:
        """F' delta."""
        return _filled(self._along(self.delta, 1, args, kwargs))[1]


def _filled(value: Any) -> tuple[Tensor, ...]:
    if not isinstance(value, Jet):
        raise ValueError(
            f"output_fn: the outputs are {type(value).__name__}, not a tensor that depends on trainable parameters; "
            "pick one, for example output_fn=lambda out: out[0]"
        )
    return tuple(torch.zeros_like(value.primal) if part is None else part for part in value.coefficients)


def _loss_and_derivatives(
    loss_fn: Callable[[Tensor], Tensor], outputs: Tensor, change: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """L, e = L' and h = L'' change at the outputs."""
    z = outputs.detach().requires_grad_()
    loss = loss_fn(z)
    (e,) = torch.autograd.grad(loss, z, create_graph=True)
    if not e.requires_grad:  # a loss that is linear in the outputs
        return loss.detach(), e, torch.zeros_like(z)
    (h,) = torch.autograd.grad(e, z, change, allow_unused=True, materialize_grads=True)
    return loss.detach(), e.detach(), h


def _check_linear(optimizer: Optimizer) -> None:
    kind = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper
    if not isinstance(kind, SGD) or type(kind).step is not SGD.step:
        raise ValueError(
            f"optimizer: {type(kind).__name__} given; the linearised correction is derived for updates that are linear "
            "in the gradient: torch.optim.SGD with or without momentum, Nesterov and weight decay. For others train "
            "ShadowModel(model, order=3)"
        )
