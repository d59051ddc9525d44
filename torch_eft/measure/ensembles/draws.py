"""Draws networks of one architecture, one after another, and leaves the original module as it is.

Without a function that draws, a module's own ``reset_parameters`` and the usual hooks (``_init_weights`` and its like)
are tried in turn. One is used only if the network given could be one of its draws, parameter by parameter: constructors
often initialize by themselves, and a network redrawn at another scale is another network.
"""

import copy
import functools
import inspect
import math
import random
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from torch_eft.measure.forward.isolation import IsolatedModel

HOOKS = ("_init_weights", "init_weights", "_initialize_weights", "initialize_weights")
"""Methods, of the module or of its parts, that initialize where ``reset_parameters`` alone does not."""

_REDRAWS = 8
_FEW = 8
"""Values of a parameter below which only their largest one is compared."""
_ENOUGH = 2**18
"""Values of a parameter that its mean and mean square are taken of: they tell scales apart that differ by 2 %."""
_ROUNDING = 1e-5
_SIGMAS = 6.0
"""Distance of a mean or a mean square from that of the redraws, in standard errors, that is another distribution."""


class Draw:
    """Networks drawn one after another, stacked: ``{name of parameter or buffer: (count, ...)}``.

    Args:
        network: The architecture, isolated: the random state is restored when the isolation ends.
        initialize: Draws the parameters of the module it is given, in place, from the global random state; None finds
            out which of ``reset_parameters`` and the ``HOOKS`` drew the network given.
        seed: Of the first network.

    Raises:
        ValueError: If nothing draws a parameter, or the network given was drawn in another way.
    """

    def __init__(self, network: IsolatedModel, initialize: Callable[[nn.Module], Any] | None, seed: int) -> None:
        self.module = copy.deepcopy(network.shadow)
        given = {**network.params, **network.constants}
        self.dtypes = {name: value.dtype for name, value in given.items()}
        self._devices = {value.device for value in self.module.parameters() if value.device.type == "cuda"}
        self.initialize = initialize or self._found(given, seed)
        _seed_everything(self._devices, seed)
        self.first = {name: value[0] for name, value in self(1).items()}
        _seed_everything(self._devices, seed)

    def __call__(self, count: int) -> dict[str, Tensor]:
        """Draw the next ``count`` networks."""
        stacked: dict[str, Tensor] = {}
        for index in range(count):
            with torch.no_grad():
                self.initialize(self.module)
            for name, value in [*self.module.named_parameters(), *self.module.named_buffers()]:
                if name not in stacked:
                    stacked[name] = value.new_empty(count, *value.shape, dtype=self.dtypes[name], requires_grad=False)
                stacked[name][index] = value.detach()
        return stacked

    def _found(self, given: dict[str, Tensor], seed: int) -> Callable[[nn.Module], Any]:
        """What draws networks like the one given."""
        hooks = [hook for hook in HOOKS if any(callable(getattr(m, hook, None)) for m in self.module.modules())]
        refusal = ""
        for hook in (None, *hooks):
            self.initialize = functools.partial(_initialize, hook=hook)
            _seed_everything(self._devices, seed)
            try:
                other = self._disagreement(given)
            except Exception as error:  # a hook is the user's code, and may be meant for other arguments
                other = f"{hook or 'reset_parameters'} fails with {type(error).__name__}: {error}"
            if other is None:
                return self.initialize
            refusal = refusal or other
        tried = f" (nor does {' or '.join(hooks)})" if hooks else ""
        raise ValueError(
            f"initialize: {refusal}{tried}; pass a function initialize(module) that draws every parameter in place, as "
            "the network's constructor does"
        )

    def _disagreement(self, given: dict[str, Tensor]) -> str | None:
        """Why the network given is no draw; None if it may be one."""
        owners = {
            name: self.module.get_submodule(name.rpartition(".")[0]) for name, _ in self.module.named_parameters()
        }
        with torch.no_grad():
            for parameter in self.module.parameters():
                if parameter.is_floating_point():
                    parameter.fill_(math.nan)
        draws: dict[str, _Redraws] = {}
        for _ in range(_REDRAWS):
            drawn = self(1)
            for name in owners:
                draws.setdefault(name, _Redraws(drawn[name][0])).add(drawn[name][0])
        for name, redraws in draws.items():
            place = f"the parameter {name!r} of {type(owners[name]).__name__}"
            if bool(redraws.first.isnan().any()):
                return f"{place} is drawn by no reset_parameters"
            if not redraws.may_include(given[name]):
                return (
                    f"{place} was not drawn by reset_parameters: {_described(given[name])} in the network given, "
                    f"{_described(redraws.first)} redrawn"
                )
        return None


class _Redraws:
    """One parameter drawn several times.

    Args:
        first: Its first value.
    """

    def __init__(self, first: Tensor) -> None:
        self.first, self.constant = first, True
        self.moments: list[Tensor] = []

    def add(self, value: Tensor) -> None:
        """Add a draw."""
        self.constant = self.constant and torch.equal(value, self.first)
        self.moments.append(_moments(value))

    def may_include(self, given: Tensor) -> bool:
        """Return whether a value may be a draw: the same if all are the same, else of the same mean and mean square."""
        if self.constant:
            size = float(self.first.abs().max()) if self.first.numel() else 0.0
            return torch.allclose(self.first, given, rtol=0.0, atol=_ROUNDING * size)
        if bool((given == given.flatten()[0]).all()) and (given.numel() > 1 or not bool(given.any())):
            return False
        if given.numel() < _FEW:  # the mean square of so few values says little; it may be next to nothing
            return (
                float(given.abs().max()) <= 3 * max(float(of[1]) for of in self.moments) ** 0.5 * given.numel() ** 0.5
            )
        moments = torch.stack(self.moments)
        m1, m2, m4 = moments.mean(0)
        independent = torch.stack([m2 - m1.square(), m4 - m2.square()]) / min(given.numel(), _ENOUGH)
        variance = torch.maximum(independent, moments[:, :2].var(0)) * (1 + 1 / len(moments))
        return bool(((_moments(given) - moments.mean(0))[:2].square() <= _SIGMAS**2 * variance).all())


def _moments(value: Tensor) -> Tensor:
    flat = value.detach().flatten()
    some = flat[:: flat.numel() // _ENOUGH | 1].double()  # an odd step, so as not to stay in one column of a matrix
    squares = some.square()
    return torch.stack([some.mean(), squares.mean(), squares.square().mean()])


def _described(value: Tensor) -> str:
    flat = value.detach().double().flatten()
    if bool((flat == flat[0]).all()):
        return f"all {float(flat[0]):.3g}"
    return f"mean {float(flat.mean()):.2g}, standard deviation {float(flat.std()):.3g}"


def _initialize(module: nn.Module, hook: str | None) -> None:
    """Reset every part, then call the hook of every part that has it; with each of its parts if it takes a module."""
    parts = list(reversed(list(module.modules())))  # a parent's own initialization has the last word
    for part in parts:
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if callable(reset):
            reset()
    for part in parts if hook else ():
        call = getattr(part, str(hook), None)
        if callable(call):
            arguments = inspect.signature(call).parameters.values()
            takes = any(
                a.default is a.empty and a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD) for a in arguments
            )
            part.apply(call) if takes else call()


def _seed_everything(devices: set[torch.device], seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
