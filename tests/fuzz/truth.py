"""What is right: loops of ``torch.autograd.grad`` on the live module, and differences of first derivatives on a line.

Differences are taken at three distances and extrapolated (Richardson); the last two extrapolations differ by the
error that is allowed. Distances are shrunk until they agree, so that kinks are not crossed.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.fuzz.compose import called


def samples(x):
    return next(len(leaf) for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor))


def one(x, a):
    return tree_map_only(torch.Tensor, lambda tensor: tensor[a : a + 1], x)


@contextmanager
def evaluated(case):
    """The live module in evaluation mode; its modes, values and random state are put back."""
    modules = list(case.net.modules())
    modes = [module.training for module in modules]
    values = [(value, value.detach().clone()) for value in (*case.net.parameters(), *case.net.buffers())]
    case.net.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        put(values)


def put(values):
    with torch.no_grad():
        for value, copied in values:
            if not torch.equal(value, copied):
                value.copy_(copied)


def trainable(case):
    return {name: p for name, p in case.net.named_parameters() if p.requires_grad}


def flat_gradient(value, params, **options):
    if not value.requires_grad:
        return torch.cat([torch.zeros(p.numel(), dtype=torch.float64) for p in params])
    gradients = torch.autograd.grad(value, params, allow_unused=True, **options)
    return torch.cat(
        [
            torch.zeros(p.numel(), dtype=torch.float64)
            if g is None
            else (g.to_dense() if g.is_sparse else g).detach().flatten().double()
            for g, p in zip(gradients, params, strict=True)
        ]
    )


def jacobian(case, x):
    """z (N, C) and J (N, C, P), one sample and one output at a time."""
    params = list(trainable(case).values())
    values, rows = [], []
    for a in range(samples(x)):
        z = called(case.net, one(x, a), case.output_fn)
        rows.append(torch.stack([flat_gradient(z[0, i], params, retain_graph=True) for i in range(z.shape[1])]))
        values.append(z.detach()[0])
    return torch.stack(values).double(), torch.stack(rows)


def agrees_with_the_batch(case, J, weights):
    """Whether one backward pass through all samples gives what the samples give one by one.

    Where it does not, torch itself is wrong (instance norm of a single image whose gradient is channels-last).
    """
    z = called(case.net, case.x, case.output_fn)
    together = flat_gradient((weights.to(z) * z).sum(), list(trainable(case).values()))
    apart = torch.einsum("ai,aip->p", weights, J)
    return float((together - apart).abs().max()) <= 1e6 * case.eps * float(J.abs().max() + 1e-9)


def flattened(case, values):
    return torch.cat([values[name].detach().flatten().double() for name in trainable(case)])


def unflattened(case, vector):
    parts = vector.split([p.numel() for p in trainable(case).values()])
    return {name: part.view_as(p).to(p.dtype) for (name, p), part in zip(trainable(case).items(), parts, strict=True)}


@contextmanager
def displaced(case, v, distance):
    """The live module at theta + distance v."""
    params = list(trainable(case).values())
    before = [(p, p.detach().clone()) for p in params]
    put([(p, p.detach() + distance * d) for p, d in zip(params, unflattened(case, v).values(), strict=True)])
    try:
        yield
    finally:
        put(before)


@dataclass
class Line:
    """Derivatives along theta + s v of the gradients of w . z, (W, P) each, and the norms of their errors, (W,)."""

    first: torch.Tensor
    second: torch.Tensor
    first_error: torch.Tensor
    second_error: torch.Tensor


def along(case, v, weights, distances=(0.1, 0.02, 4e-3, 8e-4, 1.6e-4)):
    """Difference the gradients along v. ``weights``: (W, N, C)."""

    def gradients(s):
        params = list(trainable(case).values())
        with displaced(case, v, s):
            z = called(case.net, case.x, case.output_fn)
            return torch.stack([flat_gradient((w.to(z) * z).sum(), params, retain_graph=True) for w in weights])

    middle = gradients(0.0)
    tries: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for h in distances:
        ends = {k: gradients(k * h) for k in (1, -1, 2, -2, 4, -4)}
        firsts = [(ends[k] - ends[-k]) / (2 * k * h) for k in (1, 2, 4)]
        seconds = [(ends[k] - 2 * middle + ends[-k]) / (k * h) ** 2 for k in (1, 2, 4)]
        # Roundings of the gradients themselves, of a network of some tens of operations.
        rounding = 100 * case.eps * middle.norm(dim=1)
        tries.append([_extrapolated(firsts, rounding / h), _extrapolated(seconds, 4 * rounding / h**2)])
        if all(bool((error <= 1e-5 * value.norm(dim=1) + 1e-9).all()) for value, error in tries[-1]):
            return Line(tries[-1][0][0], tries[-1][1][0], tries[-1][0][1], tries[-1][1][1])
    # Near a kink two extrapolations may agree by chance: the best try is as good as the next best one says.
    chosen = []
    for found in zip(*tries, strict=True):
        (best, error), (second, other) = sorted(found, key=lambda pair: float(pair[1].max()))[:2]
        chosen.append((best, torch.maximum(error, (best - second).norm(dim=1).clamp_max(other.max()))))
    return Line(chosen[0][0], chosen[1][0], chosen[0][1], chosen[1][1])


def _extrapolated(values, rounding):
    near, far = (4 * values[0] - values[1]) / 3, (4 * values[1] - values[2]) / 3
    last = (16 * near - far) / 15
    return last, (last - near).norm(dim=1) + rounding


def polynomial(case, v):
    """The Taylor terms of the function itself along v, (4, N, C), through nine points, and the error of each.

    Another distance, and two points less, say how large it is.
    """

    def through(reach, h):
        values = []
        for k in range(-reach, reach + 1):
            with displaced(case, v, k * h), torch.no_grad():
                values.append(called(case.net, case.x, case.output_fn).double())
        points = torch.arange(-reach, reach + 1, dtype=torch.float64)
        powers = torch.linalg.vander(points)
        terms = torch.linalg.solve(powers, torch.stack(values).flatten(1))[:4]
        return (terms / h ** torch.arange(4, dtype=torch.float64)[:, None]).view(4, *values[0].shape)

    best = through(4, 0.02)
    rounding = 1e3 * case.eps * best[0].abs().max() / 0.02 ** torch.arange(4)
    others = [(best - other).abs().amax((1, 2)) for other in (through(3, 0.02), through(4, 0.03))]
    return best, torch.maximum(*others) + rounding
