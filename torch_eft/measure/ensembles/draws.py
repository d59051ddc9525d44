"""Draws networks of one architecture, one after another, and leaves the original module as it is."""

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from torch_eft.measure.forward.isolation import IsolatedModel


class Draw:
    """Networks drawn one after another, stacked: ``{name of parameter or buffer: (count, ...)}``.

    Args:
        network: The architecture, isolated: the random state is restored when the isolation ends.
        initialize: Draws the parameters of the module it is given, in place, from the global random state; None calls
            ``reset_parameters`` of every submodule.
        seed: Of the first network.

    Raises:
        ValueError: If nothing draws a parameter.
    """

    def __init__(self, network: IsolatedModel, initialize: Callable[[nn.Module], Any] | None, seed: int) -> None:
        self.module = copy.deepcopy(network.shadow)
        self.initialize = initialize or _reset
        self.dtypes = {name: value.dtype for name, value in {**network.params, **network.constants}.items()}
        devices = {value.device for value in self.module.parameters() if value.device.type == "cuda"}
        if initialize is None:
            with torch.no_grad():
                for parameter in self.module.parameters():
                    parameter.fill_(math.nan)
        self.first = self._one(devices, seed)
        for name, parameter in self.module.named_parameters() if initialize is None else ():
            if bool(parameter.isnan().any()):
                owner = type(self.module.get_submodule(name.rpartition(".")[0])).__name__
                raise ValueError(
                    f"initialize: the parameter {name!r} of {owner} is drawn by no reset_parameters; "
                    "pass a function initialize(module) that draws every parameter in place"
                )
        _seed_everything(devices, seed)

    def _one(self, devices: set[torch.device], seed: int) -> dict[str, Tensor]:
        _seed_everything(devices, seed)
        return {name: value[0] for name, value in self(1).items()}

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


def _reset(module: nn.Module) -> None:
    for part in reversed(list(module.modules())):  # a parent's own initialization has the last word
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if callable(reset):
            reset()


def _seed_everything(devices: set[torch.device], seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
