"""Measures outputs, NTKs and their differentials of stacks of networks, as many at once as fit into memory."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.func import vmap

from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.forward.probe import Probe
from torch_eft.measure.kernels.reverse_mode import Differentials, differentials


class Measurement:
    """The output and those of H, dH, ddI, ddII that are needed, for a stack of networks."""

    def __init__(
        self, network: IsolatedModel, probe: Probe, lambdas: dict[str, float | Tensor], needed: list[str]
    ) -> None:
        self.network = replace(network, constants={})
        self.model = type(network.shadow).__name__
        self.inputs = network.place(probe)
        self.lambdas, self.needed = lambdas, needed
        self.batched = True

    def networks_at_once(self, one: dict[str, Tensor], outputs: Tensor, memory: int) -> int:
        """The number that fits into ``memory``, by what one forward saves; 1 where ``vmap`` has no rule."""
        saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel() * tensor.element_size()
            return tensor

        leaves = {name: value[None].clone() for name, value in one.items()}
        for name in self.lambdas:
            leaves[name].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            try:
                self._forward(leaves)
            except (RuntimeError, NotImplementedError):
                self.batched = False
                return 1
        parameters = sum(value.numel() * value.element_size() for value in one.values())
        columns = outputs.numel()
        graph = 2 * (saved + parameters)
        needed = graph + columns * parameters * bool(self.needed)
        if set(self.needed) & {"dH", "ddI", "ddII"}:
            needed += 3 * graph + columns * columns * parameters
        if "ddI" in self.needed:
            needed += 4 * columns * graph
        return max(1, memory // needed)

    def _forward(self, stacked: dict[str, Tensor]) -> Tensor:
        if self.batched:
            return vmap(lambda params: self.network(params, self.inputs))(stacked)
        return self.network({name: value[0] for name, value in stacked.items()}, self.inputs)[None]

    def __call__(self, stacked: dict[str, Tensor]) -> Differentials:
        """Measure a stack of networks, float64.

        Args:
            stacked: ``{name of parameter or buffer: (networks, ...)}``.

        Returns:
            The output and what is needed.

        Raises:
            ValueError: If the network has no derivatives of the order that is needed.
        """
        try:
            measured = differentials(self._forward, stacked, self.lambdas, self.needed)
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"statistics: {self.model} has no derivatives of the order that {', '.join(self.needed)} need: "
                f"{str(error).strip().splitlines()[0]}; ask for fewer statistics"
            ) from error
        values = {name: getattr(measured, name) for name in ("z", *self.needed)}
        return Differentials(**{name: value.double() for name, value in values.items()})
