"""Trains networks of one architecture, drawn anew, by copies of one optimizer on the batches of the real training."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from torch_eft.measure.ensembles.draws import Draw
from torch_eft.measure.forward.isolation import IsolatedModel, isolated
from torch_eft.measure.forward.probe import OutputFn, as_probe
from torch_eft.measure.network.batch_norm import batch_norms
from torch_eft.measure.taylor.optimizer import optimizer_copy, same_options

LossOfOutputs = Callable[[Tensor], Tensor]


class TrainedSeeds:
    """Networks of one architecture, each trained as the real one is.

    Frozen parameters and buffers are those of the real network, in whose modes the forwards run; BatchNorm takes the
    statistics of the batch. Half precision is widened to float32, and there is no autocast.

    Args:
        model: The real network, before the first step of ``optimizer``; nothing is written into it.
        optimizer: Its optimizer.
        num_networks: M >= 1.
        initialize: Draws the parameters of the module it is given, in place; None: see ``draws.Draw``.
        output_fn: Turns what the model returns into (N, C).
        seed: Of the first network.

    Attributes:
        theta_0: Of every network, ``{name: value}``.
        theta: Of every network, now.

    Raises:
        ValueError: If the network given is no draw, or the optimizer cannot be copied.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> model, x, y = torch.nn.Linear(2, 1), torch.eye(2), torch.ones(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> seeds = TrainedSeeds(model, optimizer, num_networks=3)
        >>> seeds.step([(x, lambda z: F.mse_loss(z, y))], optimizer)
        >>> len(seeds.theta), bool((seeds.theta[0]["weight"] != seeds.theta_0[0]["weight"]).any())
        (3, True)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        num_networks: int,
        initialize: Callable[[nn.Module], Any] | None = None,
        output_fn: OutputFn | None = None,
        seed: int = 0,
    ) -> None:
        self._model, self._output_fn = model, output_fn
        self._originals = [(name, weakref.ref(p)) for name, p in model.named_parameters() if p.requires_grad]
        with isolated(model, output_fn) as network:
            own = {name: value.clone() for name, value in network.params.items()}
            draw = Draw(network, initialize, seed)
            self.theta_0 = [{name: draw_[name][0] for name in own} for draw_ in (draw(1) for _ in range(num_networks))]
        self._networks = [self._copy(optimizer, theta, own) for theta in self.theta_0]
        self._control: tuple[dict[str, Tensor], Optimizer] | None = None
        self._before: dict[str, Tensor] = {}

    @property
    def theta(self) -> list[dict[str, Tensor]]:
        """``{name: value}`` of every network, now; not copied."""
        return [{name: leaf.detach() for name, leaf in leaves.items()} for leaves, _ in self._networks]

    def step(
        self, batches: Sequence[tuple[Any, LossOfOutputs]], optimizer: Optimizer, *, controlled: bool = False
    ) -> None:
        """Let every network take the step that the real one is about to take.

        Args:
            batches: Inputs and the loss of their outputs (N, C), for every batch whose gradients are added up.
            optimizer: The real one; learning rates and other options are taken over.
            controlled: Let a copy of the real network take it too, for ``deviation``.

        Raises:
            ValueError: If the forward updates buffers other than the statistics of BatchNorm: every network would need
                its own.
        """
        networks = list(self._networks)
        with isolated(self._model, self._output_fn) as network, network.as_trained():
            if controlled:
                own = network.params
                self._before = {name: value.clone() for name, value in own.items()}
                self._control = self._copy(optimizer, self._before, own)
                networks.append(self._control)
            placed = [(network.place(as_probe(inputs)), loss_fn) for inputs, loss_fn in batches]
            for leaves, own_optimizer in networks:
                for leaf in leaves.values():
                    leaf.grad = None
                for batch, loss_fn in placed:
                    self._accumulate(network, leaves, batch, loss_fn)
                same_options(own_optimizer, optimizer)
                own_optimizer.step()

    def deviation(self) -> float | None:
        """Compare the real network with the copy that took the step with it; None if none did.

        Returns:
            The size of the difference in units of the step.
        """
        if self._control is None:
            return None
        (leaves, _), before, self._control, self._before = self._control, self._before, None, {}
        now = {name: p.detach() for name, ref in self._originals if (p := ref()) is not None}
        sizes = []
        for name, leaf in leaves.items():
            moved, real = leaf.detach() - before[name], now[name].to(leaf.dtype) - before[name]
            rounding = torch.finfo(now[name].dtype).eps * before[name].norm()
            sizes.append(torch.stack([(moved - real).norm(), moved.norm(), rounding]))
        error, length, rounding = torch.stack(sizes).norm(dim=0).tolist()
        return max(0.0, error - 4 * rounding) / length if length > 0 else float(error > 4 * rounding)

    def _copy(
        self, optimizer: Optimizer, theta: Mapping[str, Tensor], own: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Optimizer]:
        leaves = {name: value.detach().clone().requires_grad_() for name, value in theta.items()}
        return leaves, optimizer_copy(optimizer, {name: [leaf] for name, leaf in leaves.items()}, self._originals, own)

    @staticmethod
    def _accumulate(network: IsolatedModel, leaves: dict[str, Tensor], batch: Any, loss_fn: LossOfOutputs) -> None:
        z = network(leaves, tree_map_only(Tensor, torch.clone, batch))
        written = network.isolation.updated(network.constants)
        norms = batch_norms(network.module) if written else ()
        other = [name for name in written if name.rpartition(".")[0] not in norms]
        if other:
            raise ValueError(
                f"model: its forward updates the buffer {other[0]!r} in training, of which every network would need "
                "its own"
            )
        gradients = torch.autograd.grad(loss_fn(z), list(leaves.values()), allow_unused=True)
        for leaf, gradient in zip(leaves.values(), gradients, strict=True):
            leaf.grad = gradient if leaf.grad is None else leaf.grad if gradient is None else leaf.grad + gradient
