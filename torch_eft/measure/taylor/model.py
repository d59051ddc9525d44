"""The Taylor model of a network about theta_0, trained as the network itself is.

With d = theta - theta_0, the Taylor model of order k computes

    f_k(x; theta) = sum_{j <= k} f^(j)(x; theta_0) d^j / j!

and is trained in theta by the real run's optimizer, batches and loss. k = 1 is the network at infinite width (its NTK
frozen at theta_0); the terms of order 2 and 3 are both O(1/n), so that k = 3, whose error is O(1/n^2), is the next
consistent order. k = 2 is not consistent by itself: beside k = 3 it tells how far that one can be trusted.

Jets give f_k, and reverse mode through their higher coefficients its gradient. Activations of order 0 belong to the
constant theta_0 and enter no graph: a linear layer takes 2 k + 1 products forward and 3 k - 1 backward.
"""

import copy
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from torch_eft.measure.forward.checks import NotFiniteError
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.probe import OutputFn
from torch_eft.measure.jets.jet import Jet
from torch_eft.measure.jets.series import Series, total
from torch_eft.measure.taylor.fused.normalization import BatchStatistics
from torch_eft.measure.taylor.fused.operations import Fused
from torch_eft.measure.taylor.model_checks import check_modules, check_same_function, judged
from torch_eft.measure.taylor.optimizer import optimizer_copy
from torch_eft.measure.taylor.series import TaylorSeries, taylor_series
from torch_eft.results.trajectory import Validity

Curve: TypeAlias = dict[str, tuple[Tensor | None, ...]]
"""The Taylor coefficients of order 1, 2, ... of every parameter."""

_HALF = (torch.float16, torch.bfloat16)


class TaylorModel(nn.Module):
    """The Taylor model of order 1, 2 or 3 of a network about its present parameters, ready to be trained.

    It is called as the network is and returns f_k; its ``parameters()`` are the leaves theta, at first theta_0, for any
    optimizer of torch. The network is copied: nothing is ever written into it.

    A Taylor model is one function, in training and in evaluation: that of the network in evaluation mode. A network
    that computes another one while it is trained (dropout, batch statistics) is refused, at the latest with the first
    batch. Clipped gradients and changing learning rates have to be passed on to its optimizer.

    Args:
        model: Any module, in the mode in which it is trained. Half precision is widened to float32.
        taylor_order: k, 1 or 3; or 2, for comparison with 3.
        output_fn: Turns what the model returns into (N, C): the Taylor model is then that of these outputs.
        as_trained: Expand the network in the modes in which it is: BatchNorm's statistics are those of the batch, and a
            part of the function. No running ones are taken or kept.

    Raises:
        ValueError: If the order is none of these, or the model has no trainable parameter, cannot be measured, drops
            out or takes batch statistics.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> model, x = measure.TaylorModel(network, taylor_order=1), torch.eye(3)
        >>> torch.allclose(model(x), network(x))  # before training
        True
        >>> optimizer = model.optimizer_like(torch.optim.SGD(network.parameters(), lr=0.1))
        >>> loss = model.step(x, lambda z: z.square().mean(), optimizer)
        >>> bool(model(x).square().mean() < loss)
        True
        >>> model.check(x).flag
        'valid'
    """

    def __init__(
        self, model: nn.Module, *, taylor_order: int = 3, output_fn: OutputFn | None = None, as_trained: bool = False
    ) -> None:
        super().__init__()
        _check_order(taylor_order)
        check_modules(model, as_trained)
        self.taylor_order, self.output_fn, self.as_trained = taylor_order, output_fn, as_trained
        self._modes: list[bool] | None = [module.training for module in model.modules()]
        self._half = any(p.dtype in _HALF for p in model.parameters())
        with isolated(model) as network:
            self.network = copy.deepcopy(network.shadow)  # that of ``isolated`` shares its parameters with the model
        if self._half:
            self.network.float()
        if as_trained:
            modes = {name: module.training for name, module in model.named_modules()}
            for name, module in self.network.named_modules():
                module.training = modes.get(name, model.training)
            self._modes = []  # no other modes to compare with
        self._originals = [(name, weakref.ref(p)) for name, p in model.named_parameters() if p.requires_grad]
        if not self._originals:
            raise ValueError("model: it has no trainable parameter to expand in; set requires_grad on some")
        self._lead()
        self.origin = nn.Module()
        for name, value in self._theta.items():
            self.origin.register_buffer(_without_dots(name), value.detach().clone())

    def of_order(self, taylor_order: int) -> "TaylorModel":
        """Return the Taylor model of another order about the same theta_0, which both share; at theta_0 itself.

        Raises ``ValueError`` if the order is not 1, 2 or 3.

        Args:
            taylor_order: k.

        Returns:
            The other one, with parameters of its own.
        """
        _check_order(taylor_order)
        other = copy.copy(self)
        other._modules = dict(self._modules) | {"network": copy.deepcopy(self.network)}
        other.taylor_order, other._modes = taylor_order, None  # this one looks whether the network is one function
        other._lead()
        theta_0 = other.theta_0
        with torch.no_grad():
            for name, leaf in other._theta.items():
                leaf.copy_(theta_0[name])
                leaf.grad = None
        return other

    def _lead(self) -> None:
        """Take the parameters of the copied network as leaves."""
        self._theta: dict[str, Tensor] = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self._tied = len(list(self.network.parameters())) != len(
            list(self.network.named_parameters(remove_duplicate=False))
        )

    @property
    def theta(self) -> dict[str, Tensor]:
        """The leaves, by the network's names."""
        return dict(self._theta)

    @property
    def theta_0(self) -> dict[str, Tensor]:
        """The point of expansion, by the network's names."""
        return dict(zip(self._theta, self.origin._buffers.values(), strict=True))  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> "TaylorModel":
        """Set the flag ``training`` alone: the function stays the same."""
        self.training = mode
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """f_k, in the structure that the network (or ``output_fn``) returns.

        Raises ``NoJetRuleError`` if an operation has no rule for Taylor series. Raises ``ValueError`` with the first
        batch, if the network computes something else in the mode it was given in.

        Args:
            *args: As the network takes them.
            **kwargs: Likewise.

        Returns:
            The outputs of the Taylor model.
        """
        return _mapped(Jet, self._combined, self._along(self._curve(), args, kwargs))

    def step(self, inputs: Any, loss_fn: Callable[[Any], Tensor], optimizer: Optimizer) -> Tensor:
        """Take one training step; gradients of other parameters in the loss and torch's random state are left alone.

        Raises ``ValueError`` if the optimizer holds other parameters as well.

        Args:
            inputs: A tensor, a tuple of arguments or a dict of keyword arguments of the network.
            loss_fn: The loss as a function of the outputs, e.g. ``lambda z: F.cross_entropy(z, y)``.
            optimizer: One that holds the parameters of this Taylor model.

        Returns:
            The loss before the step, detached.
        """
        return self.step_on([(inputs, loss_fn)], optimizer)

    def step_on(self, batches: Sequence[tuple[Any, Callable[[Any], Tensor]]], optimizer: Optimizer) -> Tensor:
        """Take one step on the sum of the losses of several batches, as a loop that accumulates gradients does.

        Raises ``ValueError`` as ``step``.

        Args:
            batches: Inputs and the loss of their outputs, for every batch.
            optimizer: One that holds the parameters of this Taylor model.

        Returns:
            The sum before the step, detached.
        """
        self._check_own(optimizer)
        leaves, losses = self._leaves(), list[Tensor]()
        with self._random_state_kept(), torch.enable_grad():
            for leaf in leaves:
                leaf.grad = None  # their memory serves the new ones
            for inputs, loss_fn in batches:
                args, kwargs = as_call(inputs)
                loss = loss_fn(self(*args, **kwargs))
                for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True):
                    if leaf.grad is None or gradient is None:
                        leaf.grad = gradient if leaf.grad is None else leaf.grad
                    else:
                        leaf.grad += gradient
                losses.append(loss.detach())
            optimizer.step()
        return torch.stack(losses).sum()

    def step_along(self, gradients: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        """Take a step with given gradients: at theta_0 those of the network itself, whatever the order.

        Raises ``ValueError`` as ``step``.

        Args:
            gradients: ``{parameter: gradient}``; a parameter without one is left alone.
            optimizer: One that holds the parameters of this Taylor model.
        """
        self._check_own(optimizer)
        for name, leaf in self._theta.items():
            given = gradients.get(name)
            leaf.grad = None if given is None else given.detach().to(leaf, copy=True)
        with self._random_state_kept():
            optimizer.step()

    def outputs_beside(self, context: Any, inputs: Any, theta: Mapping[str, Tensor] | None = None) -> Any:
        """Compute the outputs of inputs where BatchNorm takes the statistics of a batch beside them, and not their own.

        Args:
            context: The batch.
            inputs: As the batch.
            theta: Those of the network itself at these parameters; None: of the Taylor model.

        Returns:
            The outputs of ``inputs``, (N, C).

        Raises:
            ValueError: If the inputs cannot be appended to the batch.
        """
        rows = next(len(leaf) for leaf in tree_leaves(context) if isinstance(leaf, Tensor))
        try:
            joined = tree_map(lambda a, b: torch.cat([a, b.to(a)]) if isinstance(a, Tensor) else a, context, inputs)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"probe: it cannot be appended to a training batch, whose statistics BatchNorm takes ({error}); give "
                "inputs of the shape of the training's"
            ) from None
        args, kwargs = as_call(joined)
        if theta is None:
            output = _mapped(Jet, self._combined, self._along(self._curve(), args, kwargs, rows))
        else:
            with self._one_function(rows), torch.no_grad():
                values = {name: theta[name].to(own) for name, own in self.theta_0.items()}
                output = functional_call(self.network, values, args, kwargs, tie_weights=self._tied)
                output = output if self.output_fn is None else self.output_fn(output)
        return output[rows:]

    def optimizer_like(self, optimizer: Optimizer) -> Optimizer:
        """Make the real run's optimizer for this Taylor model: the same type, parameter groups and, if any, state.

        Raises ``ValueError`` if it holds trainable parameters of something else, or has a state (momentum) while the
        network is no longer at theta_0.

        Args:
            optimizer: The optimizer of the network.

        Returns:
            A new optimizer of the parameters of this Taylor model.
        """
        return optimizer_copy(optimizer, {name: [p] for name, p in self.theta.items()}, self._originals, self.theta_0)

    def taylor_series(self, inputs: Any) -> TaylorSeries:
        """Compute the Taylor terms up to order 3 at the present theta, and the network's remainder there.

        Raises ``ValueError`` as ``torch_eft.measure.taylor_series``.

        Args:
            inputs: A tensor, a tuple of arguments or a dict of keyword arguments of the network.

        Returns:
            The terms and the remainder.
        """
        theta = {name: value.detach() for name, value in self.theta.items()}
        return taylor_series(self.network, inputs, self.theta_0, theta, output_fn=self.output_fn)

    def check(self, inputs: Any) -> Validity:
        """Check if this order applies at the present theta, by the sizes of the terms on ``inputs``.

        Raises ``ValueError`` if the network cannot be evaluated on ``inputs``.

        Args:
            inputs: A tensor, a tuple of arguments or a dict of keyword arguments of the network.

        Returns:
            "invalid" with kinks (ReLU ...), where a large part of theta_0 is gone (weight decay), where higher terms
            are not small, and where the training has diverged; "caution" in between. ``numbers`` are the sizes.
            Order 2 is "invalid" by itself.
        """
        if self.taylor_order == 2:
            return Validity(
                "invalid",
                "order 2 is not consistent by itself: the terms of order 2 and 3 are both O(1/n), and 2 alone can be "
                "worse than 1; the difference of 3 and 2 is a measure of what 3 leaves out",
            )
        try:
            series = self.taylor_series(inputs)
        except NotFiniteError as error:  # the Taylor model has diverged
            return Validity("invalid", str(error))
        return judged(series, self.taylor_order, self.theta_0, self.theta)

    def _leaves(self) -> list[Tensor]:
        return list(self._theta.values())

    def _check_own(self, optimizer: Optimizer) -> None:
        own = {id(p) for p in self._leaves()}
        if not all(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "optimizer: it holds parameters other than this Taylor model's, and would train them; give one made by "
                "its optimizer_like(optimizer)"
            )

    def _combined(self, value: Jet) -> Tensor:
        return total([part for part in value.coefficients if part is not None])  # type: ignore[return-value]

    def _curve(self) -> Curve:
        """The coefficients of order 1 to k of every parameter."""
        theta_0 = self.theta_0
        return {name: (p - theta_0[name], None, None)[: self.taylor_order] for name, p in self._theta.items()}

    def _along(self, curve: Curve, args: Any, kwargs: Any, rows: int | None = None) -> Any:
        """The network's Taylor series along a curve through theta_0."""
        graph = torch.is_grad_enabled()
        args = tuple(_mapped(Tensor, self._own, value) for value in args)
        kwargs = {name: _mapped(Tensor, self._own, value) for name, value in kwargs.items()}
        with self._one_function(rows):
            if self._modes is not None:
                check_same_function(self.network, self.theta_0, self._modes, args, kwargs)
                self._modes = None
            jets: dict[str, Tensor] = {
                name: Jet(Series((value, *(p if p is None or graph else p.detach() for p in curve[name]))))
                for name, value in self.theta_0.items()
            }
            with Fused():
                output = functional_call(self.network, jets, args, kwargs, tie_weights=self._tied)
                return output if self.output_fn is None else self.output_fn(output)

    def _own(self, tensor: Tensor) -> Tensor:
        """A copy, which a forward may change in place."""
        return tensor.float() if self._half and tensor.dtype in _HALF else tensor.clone()

    @contextmanager
    def _one_function(self, rows: int | None = None) -> Iterator[None]:
        """Switch gradients on, which jets need, and autocast and compilation off."""
        with ExitStack() as stack:
            if self.as_trained:
                stack.enter_context(BatchStatistics(rows))
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            if not torch.is_grad_enabled():
                stack.enter_context(torch.enable_grad())
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            if "torch._dynamo" in sys.modules:  # compiled modules run as they are written
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def _random_state_kept(self) -> Any:
        devices = {value.device.index or 0 for value in self._theta.values() if value.device.type == "cuda"}
        return torch.random.fork_rng(devices=sorted(devices))


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments of the forward."""
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def _mapped(kind: type, function: Callable[[Any], Any], value: Any) -> Any:
    """Apply ``function`` to every ``kind`` inside ``value``; most often ``value`` is one itself."""
    return function(value) if isinstance(value, kind) else tree_map_only(kind, function, value)


def _without_dots(name: str) -> str:
    """A name for a buffer that no attribute of a module can have."""
    return "/" + name.replace(".", "/")


def _check_order(order: int) -> None:
    if isinstance(order, bool) or order not in (1, 2, 3):
        raise ValueError(
            f"taylor_order: {order!r} given; it must be 1 (infinite width) or 3 (the first correction in 1/n), or 2 to "
            "compare 3 with"
        )
