"""Small trainings that go wrong if a measurement leaves the least trace: one table, each row a training of its own."""

import hashlib
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from torch_eft.live import Observer

WORDS = torch.randint(0, 7, (24, 4), generator=torch.Generator().manual_seed(3))
INPUTS = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randn(24, 2, generator=torch.Generator().manual_seed(2))


class Noisy(Dataset):
    """Transforms that draw from Python and NumPy; it remembers in which order it was read."""

    def __init__(self, inputs):
        self.inputs, self.read = inputs, []

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        self.read.append(index)
        x = self.inputs[index]
        if x.is_floating_point():
            x = x + 1e-2 * (random.random() + numpy.random.rand())
        return x, TARGETS[index]


@dataclass
class Run:
    """A training under way; ``memory`` is whatever its hooks and closures keep."""

    net: nn.Module
    optimizers: list[torch.optim.Optimizer]
    observer: Observer | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    step: int = 0

    def loss(self, x, y):
        value = F.mse_loss(self.net(x), y.to(next(self.net.parameters()).dtype))
        if self.observer is not None:
            self.observer.observe_loss(value)
        return value

    def shown(self, optimizer=None):
        if self.observer is not None:
            self.observer.before_step(optimizer)


def plain(run, x, y):
    (optimizer,) = run.optimizers
    optimizer.zero_grad()
    run.loss(x, y).backward()
    run.shown()
    optimizer.step()


def mlp(*between, width=6):
    return nn.Sequential(nn.Linear(5, width), *between, nn.Tanh(), nn.Linear(width, 2))


def sgd(net):
    return [torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05, momentum=0.9)]


# ---- steps


def sharpness_aware(run, x, y):
    (optimizer,) = run.optimizers
    optimizer.zero_grad()
    run.loss(x, y).backward()
    parameters = list(run.net.parameters())
    with torch.no_grad():
        up = [0.05 * p.grad for p in parameters]
        torch._foreach_add_(parameters, up)
    optimizer.zero_grad()
    run.loss(x, y).backward()
    with torch.no_grad():
        torch._foreach_sub_(parameters, up)
    run.shown()
    optimizer.step()


def in_turn(run, x, y):
    optimizer = run.optimizers[run.step % 2]
    for each in run.optimizers:
        each.zero_grad()
    run.loss(x, y).backward()
    run.shown(optimizer)
    optimizer.step()


def with_closure(run, x, y):
    def closure():
        run.memory["calls"] = run.memory.get("calls", 0) + 1
        run.optimizers[0].zero_grad()
        loss = run.loss(x, y)
        loss.backward()
        return loss

    run.optimizers[0].step(closure)


def accumulated(run, x, y):
    (run.loss(x, y) / 3).backward()
    if run.step % 3 == 2:
        run.shown()
        run.optimizers[0].step()
        run.optimizers[0].zero_grad()


def averaged(run, x, y):
    plain(run, x, y)
    average = run.memory.setdefault("average", torch.optim.swa_utils.AveragedModel(run.net))
    average.update_parameters(run.net)


def mixed(run, x, y):
    with torch.autocast("cpu", torch.bfloat16):
        run.optimizers[0].zero_grad()
        loss = run.loss(x, y)
    loss.backward()
    run.shown()
    run.optimizers[0].step()


def clipped_and_scheduled(run, x, y):
    schedule = run.memory.setdefault("schedule", torch.optim.lr_scheduler.OneCycleLR(run.optimizers[0], 0.1, 20))
    run.optimizers[0].zero_grad()
    run.loss(x, y).backward()
    run.shown()
    nn.utils.clip_grad_norm_(run.net.parameters(), 0.1)
    run.optimizers[0].step()
    schedule.step()


def searching_for_anomalies(run, x, y):
    with torch.autograd.set_detect_anomaly(True):
        plain(run, x, y)


def unfreezing(run, x, y):
    if run.step == 0:
        run.net[0].requires_grad_(False)
    elif run.step == 5:
        run.net[0].requires_grad_(True)
    plain(run, x, y)


def growing(run, x, y):
    if run.step == 4:
        run.net.append(nn.Linear(2, 2))
        run.optimizers[0].add_param_group({"params": list(run.net[-1].parameters())})
    plain(run, x, y)


def adversarial(run, x, y):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(run.loss(x, y), x)
    plain(run, (x + 0.1 * slope.sign()).detach(), y)


def penalized(run, x, y):
    run.optimizers[0].zero_grad()
    loss = run.loss(x, y)
    slopes = torch.autograd.grad(loss, list(run.net.parameters()), create_graph=True)
    (loss + 0.1 * sum(g.square().sum() for g in slopes)).backward()
    run.shown()
    run.optimizers[0].step()


def projected(run, x, y):
    plain(run, x, y)
    with torch.no_grad():
        for p in run.net.parameters():
            p.clamp_(-0.4, 0.4)


def by_hand(run, x, y):
    run.net.zero_grad()
    run.loss(x, y).backward()
    for p in run.net.parameters():
        p.data -= 0.05 * p.grad


def with_activity_penalty(run, x, y):
    """A hook appends activations to a list, which the step reads and empties."""
    if not run.memory:
        run.memory["kept"] = []
        run.net[0].register_forward_hook(lambda module, inputs, output: run.memory["kept"].append(output))
    run.optimizers[0].zero_grad()
    loss = run.loss(x, y) + sum(kept.abs().mean() for kept in run.memory["kept"])
    run.memory["kept"].clear()
    loss.backward()
    run.shown()
    run.optimizers[0].step()


def with_counting_hooks(run, x, y):
    if not run.memory:
        run.memory |= {"forward": 0, "gradient": 0, "backward": 0}

        def count(what, returned=None):
            def hook(*unused):
                run.memory[what] += 1
                return returned

            return hook

        run.net[0].register_forward_pre_hook(count("forward"))
        run.net[0].register_full_backward_hook(count("backward"))
        run.net[2].weight.register_hook(count("gradient"))
    plain(run, x, y)


# ---- networks


class Clamping(nn.Module):
    """Writes to its weights in the forward."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        with torch.no_grad():
            self.net[0].weight.clamp_(-0.3, 0.3)
        return self.net(x)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.net, self.reentrant = mlp(nn.Dropout(0.2)), reentrant

    def forward(self, x):
        return self.net[-1](checkpoint(self.net[:-1], x, use_reentrant=self.reentrant))


class StochasticDepth(nn.Module):
    """Branches that are left out by Python's, NumPy's, torch's and a generator of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.blocks = nn.Linear(5, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head, self.own = nn.Linear(6, 2), torch.Generator().manual_seed(5)

    def forward(self, x):
        draws = random.random(), numpy.random.rand(), float(torch.rand(())), float(torch.rand((), generator=self.own))
        z = self.inner(x)
        for block, draw in zip(self.blocks, draws, strict=True):
            z = z + torch.tanh(block(z)) * (draw < 0.7 if self.training else 0.7)
        return self.head(z)


class Switching(nn.Module):
    """Counts its calls, and takes another way after the fifth."""

    def __init__(self):
        super().__init__()
        self.net, self.other, self.calls, self.trace = mlp(), nn.Linear(5, 2), 0, []
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.trace.append(self.calls)
        self.total += x.mean()
        return self.net(x) + (self.other(x) if self.calls > 5 else 0)


class Remembering(nn.Module):
    """Its state goes from batch to batch, as in truncated backpropagation through time."""

    def __init__(self):
        super().__init__()
        self.cell, self.head, self.state = nn.GRUCell(5, 6), nn.Linear(6, 2), None

    def forward(self, x):
        state = x.new_zeros(len(x), 6) if self.state is None or not self.training else self.state.detach()
        self.state = self.cell(x, state)
        return self.head(self.state)


class Words(nn.Module):
    """Embedded words, by a layer that renormalizes its rows when it reads them, or has sparse gradients."""

    def __init__(self, kind, **options):
        super().__init__()
        self.embed, self.head = kind(7, 3, **options), nn.Linear(3, 2)

    def forward(self, x):
        z = self.embed(x)
        return self.head(torch.tanh(z if z.ndim == 2 else z.mean(1)))


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


class Binary(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.tanh(F.linear(x, Straight.apply(self.inner.weight), self.inner.bias)))


class Cached(nn.Module):
    """Weights that are computed once for many uses."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(parametrizations.orthogonal(nn.Linear(5, 5)), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, x):
        with parametrize.cached():
            return self.net(torch.tanh(self.net[0](x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]), nn.Linear(5, 2)
        self.layers[1].weight = self.layers[0].weight
        self.me = [self]  # a circle

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def patched():
    net = mlp()
    forward = net.forward
    net.forward = lambda x: forward(x) * net[0].weight.norm()
    return net


def pruned():
    net = mlp()
    prune.l1_unstructured(net[0], "weight", 0.5)
    return net


def old_norms():
    with_norms = mlp()
    nn.utils.spectral_norm(with_norms[0])
    return with_norms


def compiled():
    net = mlp()
    net.compile(backend="eager")
    return net


def split(net):
    first, *rest = net.children()
    return [
        torch.optim.SGD(first.parameters(), lr=0.05),
        torch.optim.Adam(itertools.chain(*(module.parameters() for module in rest)), lr=0.01),
    ]


def sparse(net):
    """One of sparse and one of dense gradients."""
    return [torch.optim.SGD(net.parameters(), lr=0.05)]


NASTY = {
    "sharpness-aware, two passes a step": (mlp, sgd, sharpness_aware),
    "two optimizers in turn": (mlp, split, in_turn),
    "LBFGS, a closure that counts": (mlp, lambda net: [torch.optim.LBFGS(net.parameters(), max_iter=3)], with_closure),
    "accumulation over 3 batches": (mlp, sgd, accumulated),
    "an average of the weights and of the running statistics": (lambda: mlp(nn.BatchNorm1d(6)), sgd, averaged),
    "bfloat16 by autocast": (mlp, sgd, mixed),
    "bfloat16 throughout": (lambda: mlp().bfloat16(), sgd, plain),
    "float64 throughout": (lambda: mlp().double(), sgd, plain),
    "clipping, a schedule by steps": (mlp, sgd, clipped_and_scheduled),
    "detect_anomaly": (mlp, sgd, searching_for_anomalies),
    "a layer unfrozen later": (mlp, sgd, unfreezing),
    "a layer added later": (mlp, sgd, growing),
    "adversarial inputs": (mlp, sgd, adversarial),
    "a gradient penalty": (mlp, sgd, penalized),
    "weights projected after the step": (mlp, sgd, projected),
    "steps by hand on .data": (mlp, sgd, by_hand),
    "a hook that keeps activations for the loss": (mlp, sgd, with_activity_penalty),
    "hooks that count": (mlp, sgd, with_counting_hooks),
    "a forward that clamps its weights": (Clamping, sgd, plain),
    "checkpoint": (lambda: Checkpointed(False), sgd, plain),
    "checkpoint, reentrant": (lambda: Checkpointed(True), sgd, plain),
    "BatchNorm, cumulative": (lambda: mlp(nn.BatchNorm1d(6, momentum=None)), sgd, plain),
    "dropout": (lambda: mlp(nn.Dropout(0.3), nn.AlphaDropout(0.1)), sgd, plain),
    "stochastic depth by four generators": (StochasticDepth, sgd, plain),
    "another way after five calls": (Switching, sgd, plain),
    "state from batch to batch": (Remembering, sgd, plain),
    "Embedding, max_norm": (lambda: Words(nn.Embedding, max_norm=0.5), sgd, plain),
    "EmbeddingBag, max_norm": (lambda: Words(nn.EmbeddingBag, max_norm=0.5), sgd, plain),
    "Embedding, sparse gradients": (lambda: Words(nn.Embedding, sparse=True), sparse, plain),
    "straight-through signs": (Binary, sgd, plain),
    "spectral norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 2)),
        sgd,
        plain,
    ),
    "spectral norm by hooks": (old_norms, sgd, plain),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 2)),
        sgd,
        plain,
    ),
    "cached parametrizations": (Cached, sgd, plain),
    "pruned": (pruned, sgd, plain),
    "tied weights, a circle": (Tied, sgd, plain),
    "a forward put in its place": (patched, sgd, plain),
    "compiled, eager": (compiled, sgd, plain),
    "fused Adam": (mlp, lambda net: [torch.optim.Adam(net.parameters(), lr=0.01, fused=True)], plain),
    "a lazy layer": (lambda: nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 2)), sgd, plain),
}
"""Name: (makes the network, its optimizers, and takes a step)."""

REFUSED = {"checkpoint, reentrant"}
"""Rows of which nothing is measured."""


LOOKING = ["ntk", "representation", "interval", "expansion", "taylor"]
MORE = {
    name: [*LOOKING, "instance", "dntk"]
    for name in ("dropout", "a forward that clamps its weights", "two optimizers in turn")
}
"""Instruments; some rows are looked at by those that take longer, too."""


def train(name: str, watched: bool, careless: Callable[[nn.Module], None] | None = None, steps: int = 8):
    """Train a row from one seed; after every step ``careless`` is done to the network.

    Returns:
        SHA-256 of all that it leaves behind, and the observer.
    """
    make, make_optimizers, take = NASTY[name]
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(0)
    net = make()
    dataset = Noisy(WORDS if isinstance(net, Words) else INPUTS)
    run, losses = Run(net, make_optimizers(net)), []
    net.register_forward_hook(lambda module, inputs, output: losses.append(output.detach().clone()))
    if watched:
        probe = dataset.inputs[:3]
        run.observer = Observer(net, probe, run.optimizers, instruments=MORE.get(name, LOOKING), every=3, budget=None)
        run.observer.begin(total_steps=steps)
    batches = itertools.chain.from_iterable(DataLoader(dataset, batch_size=6, shuffle=True) for _ in itertools.count())
    for run.step in range(steps):
        x, y = next(batches)
        x = x.to(next(net.parameters()).dtype) if x.is_floating_point() else x
        if run.observer is not None:
            run.observer.observe_batch((x, y))
        take(run, x, y)
        if careless is not None:
            careless(net)
        if run.observer is not None:
            run.observer.measure(run.step + 1)
    if run.observer is not None:
        run.observer.finish()
    total = hashlib.sha256()
    _add(total, [net.state_dict(), [optimizer.state_dict() for optimizer in run.optimizers]])
    _add(total, [[p.grad, p.requires_grad, p._version] for p in net.parameters()])
    _add(total, [[m.training, len(m._forward_hooks), _plain(m)] for m in net.modules()])
    _add(total, [run.memory, losses, dataset.read, torch.get_rng_state(), random.getstate(), numpy.random.get_state()])
    _add(total, [torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_anomaly_enabled()])
    _add(total, [torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")])
    return total.hexdigest(), run.observer


def _plain(module):
    """What a module keeps besides parameters, buffers and submodules."""
    kinds = int, float, bool, str, torch.Tensor, torch.Generator, type(None)
    kept = {key: value for key, value in vars(module).items() if isinstance(value, kinds) or key == "trace"}
    return {key: value.get_state() if isinstance(value, torch.Generator) else value for key, value in kept.items()}


def _add(total, value):
    if isinstance(value, torch.Tensor):
        value = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        total.update(str(value.dtype).encode() + value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, numpy.ndarray):
        total.update(value.tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            _add(total, [str(key), value[key]])
    elif isinstance(value, list | tuple):
        for item in value:
            _add(total, item)
    elif hasattr(value, "state_dict"):
        _add(total, value.state_dict())
    else:
        total.update(repr(value).encode())
