"""Checks of a Jacobian, whenever one is computed, against ordinary passes through the network itself.

For random numbers u, new at every check, u . J put together from the very factors that a kernel is made of must be the
gradient of u . z that one forward and one backward pass of all samples give: number by number, parameter by parameter.
Along a direction v, u . J_1 and u . J_2 must be first and second differences of that gradient between theta - h v and
theta + h v. Where the forward takes something out of its gradient (detach, no_grad), they are not, though all ways of
differentiating it agree.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torch_eft.measure.forward.checks import differs_from_differences, reach_of
from torch_eft.measure.forward.decompositions import Decomposed
from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.forward.reverse_mode import gradients_along, ordinary_gradients
from torch_eft.measure.jacobian.gram import Factor
from torch_eft.measure.jacobian.plan import JacobianPlan, sample_count

DIGITS = 0.4
"""Share of the dtype's digits in which u . J must agree."""

_log = logging.getLogger("torch_eft")
_counts: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()
_generator = torch.Generator(device="cpu").manual_seed(0)  # its own: the training's random numbers stay as they are


def untrusted(name: str, reason: str) -> str:
    """Return the message about a Jacobian that no way of computing it gets right."""
    return (
        f"model: the Jacobian of {name!r} cannot be trusted: {reason}. The forward does not depend on its parameters "
        "and each sample alone (random operations, samples that see each other, state that changes, weights of other "
        "modules); measure the part of it that does"
    )


class Verification:
    """u . J_0 .. u . J_order, added up block by block from factors.

    Args:
        network: The network.
        trainable: Names of the parameters that count.
        plan: How their Jacobians are computed.
        inputs: The samples, where the network is.
        order: Of the last coefficient.
    """

    def __init__(
        self, network: IsolatedModel, trainable: Sequence[str], plan: JacobianPlan, inputs: Any, order: int
    ) -> None:
        self.network, self.trainable, self.plan = network, trainable, plan
        self.inputs, self.order = inputs, order
        u = torch.randn(plan.outputs, sample_count(inputs), generator=_generator, device="cpu")
        self.u = u.to(network.params[trainable[0]])
        self._sums: list[dict[str, Tensor]] = [{} for _ in range(order + 1)]
        self._groups = dict.fromkeys(trainable, 1)

    def add(self, rows: slice, factors: Sequence[Factor]) -> None:
        """Add the factors of some samples."""
        for order, sums in enumerate(self._sums):
            parts: dict[str, list[Tensor]] = {}
            for factor in factors:
                for name, value in factor.vjp(self.u[:, rows], order).items():
                    parts.setdefault(name, []).append(value.flatten())
            for name, values in parts.items():
                self._groups[name] = len(values)
                value = torch.cat(values) if len(values) > 1 else values[0]
                sums[name] = value + sums[name] if name in sums else value

    def add_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Add u . J_0 of all samples itself."""
        self._sums[0] = {name: gradient.flatten() for name, gradient in gradients.items()}

    def mismatches(
        self, block: int, kernels: Sequence[Tensor] = (), lambdas: Mapping[str, float | Tensor] | None = None
    ) -> tuple[dict[str, str], bool, Tensor]:
        """Compare u . J_0 with ordinary passes, and u . H u with the sum of lambda |u . J_0|^2.

        Args:
            block: The number of samples that one pass may take.
            kernels: (N, N, C, C), which add up to H; none: H is not compared.
            lambdas: Of every parameter.

        Returns:
            ``{parameter: by how much they differ}`` of those that do; whether H does; and the outputs (N, C).
        """
        outputs, gradients, live = ordinary_gradients(self.network, self.inputs, self.u, self.trainable, block)
        _counts[self.network.origin] = count = _counts.get(self.network.origin, 0) + 1
        ran = "the module" if live else "its copy"
        _log.info("torch_eft: u . J compared with ordinary passes through %s, %d times so far", ran, count)
        wrong, contradicts = self._differing(gradients, 0, kernels, lambdas or {})
        return {name: f"u . J of random numbers u {sizes}" for name, sizes in wrong.items()}, contradicts, outputs

    def _contradict(self, kernels: Sequence[Tensor], expected: Tensor) -> Tensor:
        """Return whether u . H u is something else than expected, on its device."""
        u = self.u.flatten()
        matrices = [H.permute(2, 0, 3, 1).reshape(len(u), len(u)) for H in kernels]
        found = torch.stack([u @ (H @ u) for H in matrices]).sum()
        size = torch.stack([H.norm() for H in matrices]).sum() * u.square().sum()
        eps = torch.finfo(found.dtype).eps
        return (found - expected).abs() > eps**DIGITS * expected + 1e3 * eps * size

    def differs_from_differences(
        self, direction: Mapping[str, Tensor], order: int, block: int, kinked: bool
    ) -> bool | None:
        """Return whether u . J_order is no coefficient of the gradient's change along a direction; None if unknown."""
        reach = reach_of(self.network.params, direction)
        if not reach < math.inf:
            return False
        wide = self.network.bound(None, torch.float64)
        inputs = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, self.inputs)

        def gradient(s: float) -> list[Tensor]:
            moved = {name: wide.params[name] + s * direction[name].double() for name in self.trainable}
            at = replace(wide, params={**wide.params, **moved})
            _, gradients, _ = ordinary_gradients(at, inputs, self.u.double(), self.trainable, block)
            return [self._in_order(gradients[name], name) for name in self.trainable]

        sums = self._sums[order]
        like = {name: self.network.params[name] for name in self.trainable}
        found = [sums.get(name, torch.zeros_like(value).flatten()).double() for name, value in like.items()]
        return differs_from_differences(found, order, gradient, reach, torch.finfo(self.u.dtype).eps, kinked)

    def higher_mismatches(self, direction: Mapping[str, Tensor], order: int) -> dict[str, str]:
        """Compare u . J_order with reverse mode of reverse mode."""
        leaves = {name: self.network.params[name].detach().requires_grad_() for name in self.trainable}
        # A checkpoint runs its part of the forward again, and must find it written out as before.
        with Decomposed():
            value = (self.network({**self.network.params, **leaves}, self.inputs) * self.u.T).sum()
            along = [direction[name] for name in self.trainable]
            gradients = gradients_along(value, list(leaves.values()), along, order)[order]
        return self._differing(dict(zip(self.trainable, gradients, strict=True)), order)[0]

    def _differing(
        self,
        gradients: Mapping[str, Tensor],
        order: int,
        kernels: Sequence[Tensor] = (),
        lambdas: Mapping[str, float | Tensor] | None = None,
    ) -> tuple[dict[str, str], bool]:
        """Return what differs by more than ``DIGITS`` of its size and a thousand roundings of the largest one's.

        And whether u . H u is not sum lambda |gradient|^2, where kernels are given: read in one wait for the device.
        """
        expected = [self._in_order(gradients[name].detach(), name) for name in self.trainable]
        pairs = zip(map(self._sums[order].get, self.trainable), expected, strict=True)
        rest = [value if sums is None or sums.shape != value.shape else sums - value for sums, value in pairs]
        off, sizes = (torch.stack(torch._foreach_norm(values)) for values in (rest, expected))
        eps = torch.finfo(sizes.dtype).eps
        wrong = ~(off <= eps**DIGITS * sizes + 1e3 * eps * sizes.max())
        contradict = wrong.new_zeros(())
        if kernels and lambdas:
            given = [lambdas[name] for name in self.trainable]
            numbers = [0.0 if isinstance(value, Tensor) else value for value in given]
            weights = torch.tensor(numbers, dtype=sizes.dtype, device="cpu").to(sizes.device, non_blocking=True)
            total = sizes.square() @ weights
            for name, gradient in gradients.items():
                scale = lambdas.get(name)
                if isinstance(scale, Tensor):
                    total = total + (gradient.detach().square() * scale.to(gradient)).sum()
            contradict = self._contradict(kernels, total)
        *flags, other = torch.cat([wrong, contradict[None]]).tolist()  # the one host sync
        return {
            name: f"differs by {float(off[index]):.3g} from the {float(sizes[index]):.3g} of ordinary backward passes"
            for index, name in enumerate(self.trainable)
            if flags[index]
        }, other

    def _in_order(self, gradient: Tensor, name: str) -> Tensor:
        return self.plan.in_order(gradient, name, self._groups[name])
