"""The NTK without its matrix: products H v, parameter-space directions lambda J^T e, leading eigenpairs.

By reverse mode alone: J^T u is one backward pass, and J w is the derivative of w . (J^T u) with respect to u, which
needs no forward rule of any operation. Where an operation has no second derivative, not even that one, H is formed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_eft.measure.forward.checks import check_batch_independence, check_finite, check_measurable
from torch_eft.measure.forward.decompositions import Decomposed
from torch_eft.measure.forward.isolation import IsolatedModel, Model, isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.measure.forward.reverse_mode import pull_back
from torch_eft.measure.jacobian.engine import JacobianGram
from torch_eft.measure.jacobian.plan import JacobianPlan, Lambdas, checked_lambdas
from torch_eft.measure.jacobian.verification import DIGITS, Verification, untrusted
from torch_eft.results.presentation.repr import short_repr


class NTKOperator:
    """H = J lambda J^T of an isolated network on a probe, as a map of (N, C) to (N, C).

    Args:
        network: The network.
        probe: The inputs.
        lambdas: See ``ntk``.
    """

    def __init__(self, network: IsolatedModel, probe: Probe, lambdas: Lambdas = None) -> None:
        self.lambdas = checked_lambdas(network, lambdas)
        own = {name: network.params[name].detach() for name in self.lambdas}
        if not network.isolation.plain:  # another forward may write to them before this one's backward pass
            own = {name: value.clone() for name, value in own.items()}
        self.leaves = {name: value.requires_grad_() for name, value in own.items()}
        self.network, self.inputs = network, network.place(probe)
        with Decomposed():
            self.outputs = checked_output(network, probe, {**network.params, **self.leaves})
        self._probe, self._given = probe, lambdas
        self._H: Tensor | None = None  # where products by second derivatives are not possible
        self._linear: tuple[Tensor, Sequence[Tensor]] | None = None

    def checked(self) -> "NTKOperator":
        """Return itself, if the network can be measured.

        Raises:
            ValueError: As ``ntk``.
        """
        check_measurable(self.network)
        samples, channels = self.outputs.shape
        check = Verification(self.network, list(self.leaves), JacobianPlan(outputs=channels), self.inputs, 0)
        gradients = pull_back([self.outputs], [check.u.T], list(self.leaves.values()))
        check.add_gradients(dict(zip(self.leaves, gradients, strict=True)))
        check_batch_independence(self.network, self.inputs, self.outputs)
        wrong, _, _ = check.mismatches(samples)
        if wrong:
            raise ValueError(untrusted(*next(iter(wrong.items()))))
        if not self._transposes(check.u.T, gradients):
            self._H = JacobianGram(self.network, self._probe, self._given).ntk()
        return self

    def _transposes(self, u: Tensor, gradients: Sequence[Tensor]) -> bool:
        """Return whether u . (J w) = (J^T u) . w for the w = J^T u: not where an operation has no second derivative."""
        try:
            image = self.jvp(dict(zip(self.leaves, gradients, strict=True)))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False
        square = torch.stack([g.square().sum() for g in gradients]).sum()
        return bool(((u * image).sum() - square).abs() <= torch.finfo(u.dtype).eps ** DIGITS * square)

    def _map(self) -> tuple[Tensor, Sequence[Tensor]]:
        """Return a vector u and J^T u, which is linear in it; made when first asked for."""
        if self._linear is None:
            u = torch.zeros_like(self.outputs).requires_grad_()
            self._linear = u, pull_back([self.outputs], [u], list(self.leaves.values()), keep=True)
        return self._linear

    def ntk_vjp(self, e: Tensor) -> dict[str, Tensor]:
        """Return lambda J^T e of e (N, C), by parameter."""
        gradients = pull_back([self.outputs], [e.to(self.outputs)], list(self.leaves.values()))
        return {name: g * self.lambdas[name] for name, g in zip(self.leaves, gradients, strict=True)}

    def jvp(self, direction: Mapping[str, Tensor]) -> Tensor:
        """Return J v, (N, C), of v by parameter: the derivative of (J^T u) . v in u, which needs no forward rule."""
        u, image = self._map()
        return pull_back(image, [direction[name] for name in self.leaves], [u])[0]

    def __call__(self, v: Tensor) -> Tensor:
        """Return H v = J (lambda J^T v) of v (N, C)."""
        if self._H is not None:
            return torch.einsum("abij,bj->ai", self._H, v.to(self.outputs))
        return self.jvp(self.ntk_vjp(v))


def ntk_vector_product(
    model: Model,
    x: Any,
    direction: Tensor,
    *,
    lambdas: Mapping[str, float] | float | None = None,
    output_fn: OutputFn | None = None,
) -> Tensor:
    """Compute ``sum_{b,j} H_{ij;ab} v_{bj}`` in two backward passes, without H; errors as ``ntk``.

    Args:
        model: Any module.
        x: See ``ntk``.
        direction: v, (N, C).
        lambdas: See ``ntk``.
        output_fn: See ``ntk``.

    Returns:
        H v, (N, C).

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> net = torch.nn.Linear(3, 1, bias=False)  # H_{ab} = x_a . x_b
        >>> measure.ntk_vector_product(net, torch.eye(3), torch.ones(3, 1)).flatten().tolist()
        [1.0, 1.0, 1.0]
    """
    with isolated(model, output_fn) as network:
        operator = NTKOperator(network, as_probe(x), lambdas=lambdas).checked()
        product = operator(checked_direction(direction, operator))
        check_finite(network, [product], "its product with the NTK is")
        return product


def ntk_vjp(
    model: Model,
    x: Any,
    direction: Tensor,
    *,
    lambdas: Mapping[str, float] | float | None = None,
    output_fn: OutputFn | None = None,
) -> dict[str, Tensor]:
    """Compute the direction ``lambda J^T e`` in parameter space; errors as ``ntk``.

    A step of gradient descent is -eta times that of e = dL/dz.

    Args:
        model: Any module.
        x: See ``ntk``.
        direction: e, (N, C): the training error, an eigenvector of H, or any other.
        lambdas: See ``ntk``.
        output_fn: See ``ntk``.

    Returns:
        ``{parameter: tensor}``, 0 where lambda is 0.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> net = torch.nn.Linear(3, 1)  # J^T e = sum_a e_a (x_a, 1)
        >>> v = measure.ntk_vjp(net, torch.eye(3), torch.ones(3, 1), lambdas={"weight": 1.0, "bias": 0.5})
        >>> v["weight"].tolist(), v["bias"].tolist()
        ([[1.0, 1.0, 1.0]], [1.5])
    """
    with isolated(model, output_fn) as network:
        operator = NTKOperator(network, as_probe(x), lambdas=lambdas).checked()
        gradients = operator.ntk_vjp(checked_direction(direction, operator))
        return {name: gradients.get(name, torch.zeros_like(value)) for name, value in network.params.items()}


def checked_direction(direction: Any, operator: NTKOperator, instead: str = "") -> Tensor:
    """Return a direction in output space in the dtype and on the device of the outputs.

    Args:
        direction: What was given.
        operator: Whose outputs it belongs to.
        instead: What else may be given, for the message.

    Returns:
        The direction, (N, C).

    Raises:
        ValueError: If it is not (N, C).
    """
    expected = tuple(operator.outputs.shape)
    if not isinstance(direction, Tensor) or tuple(direction.shape) != expected:
        given = tuple(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
        raise ValueError(
            f"direction: {given} given; give a tensor {expected}, a number for every sample and output{instead}"
        )
    return direction.to(operator.outputs)


@dataclass(frozen=True, repr=False)
class Eigenpairs:
    """Leading eigenpairs of H.

    Args:
        values: (k,), descending.
        vectors: (k, N, C), orthonormal.
        residuals: (k,), |H v - l v|: an eigenvalue lies within this distance of each value.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> measure.Eigenpairs(torch.ones(2), torch.zeros(2, 3, 1), torch.zeros(2))
        Eigenpairs(
          values: (2,) float32
          vectors: (2, 3, 1) float32
          residuals: (2,) float32
        )
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor

    __repr__ = short_repr


def ntk_eigenpairs(
    model: Model,
    x: Any,
    num_eigenpairs: int,
    *,
    lambdas: Mapping[str, float] | float | None = None,
    output_fn: OutputFn | None = None,
    tolerance: float = 1e-5,
    num_matvecs: int | None = None,
) -> Eigenpairs:
    """Compute the largest eigenvalues of H and their eigenvectors by block Lanczos iteration, without H.

    Blocks have k vectors, so that eigenvalues are found as often as they are there.

    Args:
        model: Any module.
        x: See ``ntk``.
        num_eigenpairs: k.
        lambdas: See ``ntk``.
        output_fn: See ``ntk``.
        tolerance: Residuals to reach, relative to the largest eigenvalue.
        num_matvecs: Products with H at most, at least k; None means min(N C, 20 + 20 k).

    Returns:
        Eigenpairs with their residuals, which may exceed the tolerance if ``num_matvecs`` ran out.

    Raises:
        ValueError: As ``ntk``, or if ``num_eigenpairs`` is not in 1 .. N C.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> net, x = torch.nn.Linear(2, 1, bias=False), torch.diag(torch.tensor([3.0, 1.0]))  # H = diag(9, 1)
        >>> pairs = measure.ntk_eigenpairs(net, x, 2)
        >>> [round(value, 4) for value in pairs.values.tolist()]
        [9.0, 1.0]
    """
    with isolated(model, output_fn) as network:
        operator = NTKOperator(network, as_probe(x), lambdas=lambdas).checked()
        size = operator.outputs.numel()
        if not 1 <= num_eigenpairs <= size:
            raise ValueError(f"num_eigenpairs: {num_eigenpairs} given; H has {size} eigenvalues, give 1 .. {size}")
        return _block_lanczos(operator, num_eigenpairs, tolerance, num_matvecs or 20 + 20 * num_eigenpairs)


def _block_lanczos(operator: NTKOperator, count: int, tolerance: float, steps: int) -> Eigenpairs:
    """Iterate with full reorthogonalization (Golub & Van Loan, chapter 10): exact in at most N C steps.

    A Krylov space holds of every eigenspace at most as many directions as there are vectors in a block; what a block
    loses where the space is invariant is replaced at random.

    Returns:
        The leading eigenpairs.
    """
    shape, size = operator.outputs.shape, operator.outputs.numel()
    generator = torch.Generator(device="cpu").manual_seed(0)

    def random(number: int) -> Tensor:
        return torch.randn(number, size, generator=generator, device="cpu").to(operator.outputs)

    Q, W = operator.outputs.new_zeros(2, 0, size)
    block = random(count)
    while True:
        block = _orthonormal(block, Q, random)
        Q = torch.cat([Q, block])
        W = torch.cat([W, torch.stack([operator(row.view(shape)).flatten() for row in block])])
        check_finite(operator.network, [W], "its products with the NTK are")
        T = Q @ W.T
        values, rotation = torch.linalg.eigh((T + T.T) / 2)
        top = rotation[:, -count:].flip(1).T
        vectors, largest = top @ Q, values[-count:].flip(0)
        residuals = (top @ W - largest[:, None] * vectors).norm(dim=1)
        left = min(size, steps) - len(Q)
        if left <= 0 or bool((residuals <= tolerance * largest[0].abs()).all()):
            return Eigenpairs(largest, vectors.unflatten(1, shape), residuals)
        block = W[-len(block) :][:left]


def _orthonormal(block: Tensor, Q: Tensor, random: Callable[[int], Tensor]) -> Tensor:
    """Return as many unit vectors, orthogonal to each other and to ``Q``: random ones for those that depend on it."""
    found = Q
    for row in block:
        rest = row
        for attempt in range(3):
            size = rest.norm()
            for _ in range(2):  # once more than in exact arithmetic
                rest = rest - found.T @ (found @ rest)
            if attempt == 2 or bool(rest.norm() > 1e-6 * size):
                break
            rest = random(1)[0]
        found = torch.cat([found, (rest / rest.norm())[None]])
    return found[len(Q) :]
