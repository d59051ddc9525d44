"""Random networks of building blocks, by number."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.fuzz import functions, hazards, layers  # noqa: F401 (all fill BLOCKS)
from tests.fuzz.kinds import BLOCKS, randn

WITHOUT_PARAMETERS = {
    name
    for name, made in BLOCKS.items()
    if made.make.__module__ == functions.__name__
    or (made.kinds == "fsciv" and made.make.__module__ == hazards.__name__)
}
FORMS = ["tensor"] * 4 + ["tuple", "list", "dict", "mask", "task", "settings", "nested", "none"]
OUTPUTS = ["tensor"] * 5 + ["dict", "tuple", "squeezed", "tokens"]


class Net(nn.Module):
    """Blocks one after another, a head, and what forwards take and return besides tensors."""

    def __init__(self, stages, head, tasks, wrap):
        super().__init__()
        self.stages, self.head, self.wrap = nn.ModuleList(stages), head, wrap
        self.tasks = nn.ParameterList(tasks)

    def forward(self, x, mask=None, task=None, scale=None, flag=False, names=()):
        if isinstance(x, dict):
            x = x["value"] + 0 * x["value"] if x["other"] is None else x["value"]
        for stage in self.stages:
            x = stage(x)
        z = self.head(x)
        if mask is not None:
            z = torch.where(mask[:, None], z, z.sin())
        if task is not None:
            z = z + torch.stack([row.flatten()[:1] * self.tasks[int(k)] for row, k in zip(x, task, strict=True)])
        if flag:
            z = z * scale
        return self.wrap(z)


@dataclass
class Case:
    """A network and what to measure it on.

    Args:
        seed: Its number.
        blocks: Names of its blocks.
        notes: Of its blocks.
        eps: Its coarsest rounding.
        net: The module.
        x: Inputs.
        others: Inputs of another number of samples.
        output_fn: For ``measure``.
    """

    seed: int
    blocks: list
    notes: set
    eps: float
    net: nn.Module
    x: Any
    others: Any
    output_fn: Callable | None

    def __str__(self):
        return f"{self.seed}: {' > '.join(self.blocks)}"


def compose(seed: int, only: str | None = None) -> Case:
    """Make the case of this number; of one block alone if ``only`` names it.

    The random state and default dtype are put back.
    """
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.random.fork_rng():
            for attempt in range(30):
                r = random.Random(1000 * seed + attempt)
                torch.manual_seed(1000 * seed + attempt)
                case = _attempt(r, seed, only)
                if case is not None:
                    return case
    finally:
        torch.set_default_dtype(before)
    raise AssertionError(f"no network was found for {seed}, {only}")


def _inputs(r, kind, count):
    if kind == "t":
        return torch.randint(0, 6, (count, r))
    return torch.randn(count, *r)


def _shape(r, kind):
    if kind == "t":
        return r.choice([2, 3, 4])
    sizes = {
        "f": [(2, 4)],
        "s": [(2, 4), (2, 4)],
        "c": [(1, 3), (4, 6)],
        "i": [(1, 2), (3, 4), (3, 4)],
        "v": [(1, 2)] + 3 * [(2, 3)],
    }
    return tuple(r.randint(*size) for size in sizes[kind])


def _attempt(r, seed, only):
    kind = r.choice("ffssscciiivtt") if only is None else r.choice(BLOCKS[only].kinds)
    size = _shape(r, kind)
    count = r.randint(2, 6)
    x, others = _inputs(size, kind, count), _inputs(size, kind, r.randint(1, 4))
    stages, names = [], []
    wanted = r.randint(2, 5)
    z = x
    if only is not None and kind != "t":
        stages, names = [_first(kind, size)], ["first"]
        z = stages[0](z).detach()
    while len(names) < wanted or kind == "t":
        if only is not None and only in names:
            break
        fitting = [name for name, block in BLOCKS.items() if kind in block.kinds]
        if only is not None:
            fitting = [only]
        elif len(names) % 2 == 0 and kind != "t":  # parameters in at least every second block
            fitting = [name for name in fitting if name not in WITHOUT_PARAMETERS]
        name = r.choice(fitting)
        if "once" in BLOCKS[name].notes and only is None and r.random() < 0.8:
            continue  # refusals stay few
        made = BLOCKS[name]
        try:
            stage = made.make(r, tuple(z.shape[1:]))
            with torch.no_grad():
                stage.eval()(z[:1])
                following = stage(z)
        except (RuntimeError, ValueError, AssertionError, IndexError):  # too small for this block
            if only is not None:
                return None
            continue
        if following.numel() > 60 * len(z) or following.numel() == 0:
            if only is not None:
                return None
            continue
        stages.append(stage)
        names.append(name)
        z, kind = following, made.to or kind
    outputs = 1 if (form := r.choice(OUTPUTS)) == "squeezed" else r.randint(1, 3 if form == "tokens" else 4)
    head, given = _head(r, z, 2 * outputs if form == "tokens" else outputs)
    wrap, output_fn = _outputs(form)
    asked = r.choice(FORMS)
    tasks = [randn(given) for _ in range(3)] if asked == "task" else []
    net = Net(stages, head, tasks, wrap)
    x, others = _form(asked, x), _form(asked, others)
    chosen = [BLOCKS[name] for name in names if name in BLOCKS]
    trainable = [p for p in net.parameters() if p.requires_grad]
    if not trainable:
        return None
    if len(trainable) > 1 and r.random() < 0.15:
        r.choice(trainable).requires_grad_(False)
    case = Case(
        seed,
        [*names, asked, form],
        set().union(*(b.notes for b in chosen)),
        max([2.0**-52, *(b.eps for b in chosen)]),
        net,
        x,
        others,
        output_fn,
    )
    with torch.no_grad():
        z = called(case.net.eval(), case.x, case.output_fn)
        if not bool(z.isfinite().all()) or float(z.abs().max()) > 100:
            return None
    net.train(r.random() < 0.5)
    r.choice(list(net.modules())).train(r.random() < 0.5)
    return case


def _first(kind, size):
    linear = {"f": lambda: nn.Linear(size[-1], size[-1]), "s": lambda: nn.Linear(size[-1], size[-1])}
    convolutions = {"c": nn.Conv1d, "i": nn.Conv2d, "v": nn.Conv3d}
    return linear[kind]() if kind in linear else convolutions[kind](size[0], max(2, size[0]), 1)


def _head(r, z, outputs):
    flat = z.flatten(1).shape[1]
    if flat <= 4 and r.random() < 0.3:
        return nn.Flatten(), flat
    return nn.Sequential(nn.Flatten(), nn.Linear(flat, outputs, bias=r.random() < 0.7)), outputs


def _outputs(form):
    if form == "dict":
        return (lambda z: {"logits": z, "loss": None}), (lambda out: out["logits"])
    if form == "tuple":
        return (lambda z: (None, z)), (lambda out: out[1])
    if form == "squeezed":
        return (lambda z: z[:, 0]), (lambda z: z[:, None])
    if form == "tokens":
        return (lambda z: z[..., None]), (lambda z: z.flatten(1))
    return (lambda z: z), None


def _form(form, x):
    count = len(x)
    index = torch.arange(count)
    return {
        "tensor": lambda: x,
        "tuple": lambda: (x,),
        "list": lambda: [x],
        "dict": lambda: {"x": x},
        "mask": lambda: (x, index % 2 == 0),
        "task": lambda: {
            "x": x,
            "task": (index**2) % 3 if count < 4 else torch.where(index == count - 1, 2, index % 2),
        },
        "settings": lambda: {"x": x, "scale": 1.5, "flag": True, "names": ["a", "b"]},
        "nested": lambda: ({"value": x, "other": None},),
        "none": lambda: (x, None, None, None),
    }[form]()


def called(net, x, output_fn):
    """The output (N, C)."""
    out = net(**x) if isinstance(x, dict) else net(*x) if isinstance(x, tuple | list) else net(x)
    return out if output_fn is None else output_fn(out)
