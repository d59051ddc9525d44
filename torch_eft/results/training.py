"""One description of a training, taken by every forecast: loss, optimizer, batches, number of steps."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from torch_eft.results.choices import check_choice, nearest, one_line

Batches = Sequence[Sequence[int] | Tensor]
Dynamics = Literal["gradient_descent", "gradient_flow"]
LossFunction = Callable[[Tensor, Tensor], Tensor]
Reduction = Literal["sum", "mean"]
Schedule = Sequence[float] | Callable[[int], float]


class UnstableError(ValueError):
    """A learning rate beyond the linear stability bound.

    Args:
        rate: What was given.
        bound: The bound, in the same unit.
        found: Where the bound comes from.
        unit: By which both were multiplied for the loss: the optimizer's are divided by it again.

    Example:
        >>> from torch_eft.results.training import UnstableError
        >>> print(UnstableError(4.0, 0.5, "2 / lambda_max", unit=2.0))
        learning_rate: 2 given, beyond the linear stability bound 0.25 (2 / lambda_max); give a smaller one
    """

    def __init__(self, rate: float, bound: float, found: str, unit: float = 1.0) -> None:
        super().__init__(
            f"learning_rate: {rate / unit:g} given, beyond the linear stability bound {bound / unit:.4g} ({found}); "
            "give a smaller one"
        )
        self.rate, self.bound, self.found = rate, bound, found


@contextmanager
def stability_in_unit(unit: float) -> Iterator[None]:
    """Say in the optimizer's unit that a learning rate is beyond the stability bound.

    Args:
        unit: eta of the theory over the optimizer's learning rate, as the loss has it.

    Raises:
        UnstableError: The same in that unit.

    Example:
        >>> from torch_eft.results.training import UnstableError, stability_in_unit
        >>> try:
        ...     with stability_in_unit(2.0):
        ...         raise UnstableError(4.0, 0.5, "2 / lambda_max")
        ... except UnstableError as error:
        ...     print(error)
        learning_rate: 2 given, beyond the linear stability bound 0.25 (2 / lambda_max); give a smaller one
    """
    try:
        yield
    except UnstableError as error:
        raise UnstableError(error.rate, error.bound, error.found, unit) from None


@dataclass(frozen=True, repr=False)
class Training:
    """Gradient descent as ``torch.optim.SGD`` does it, without weight decay, or gradient flow.

    These are the optimizers whose updates are linear in the gradients, as an expansion about the start needs. Adam
    and its kin divide by gradients, and weight decay moves parameters by a part of themselves:
    ``measure.TaylorModel`` follows one network under those.

    Args:
        loss: ``"mse"``, ``"cross_entropy"``, or a differentiable function of outputs (m, C) and targets to a number.
        reduction: For the named losses: ``"mean"`` is torch's, ``"sum"`` is (1/2) sum (z - y)^2 (PDLT) and the sum of
            cross-entropies.
        learning_rate: eta > 0, multiplying the learning-rate tensor lambda.
        steps: Number T >= 0 of optimizer steps. At one learning rate on full batches also ``math.inf``, the end of
            training; for gradient flow any time in units of the learning rate.
        momentum: m of the heavy ball, in [0, 1).
        nesterov: Nesterov's momentum, which needs momentum > 0 and dampening 0.
        dampening: Damps the gradient from the second step on, in [0, 1).
        schedule: The learning rate of each step in place of ``learning_rate``: a sequence or a function of the step.
        batches: The sample indices of each step's minibatch; repeated from the first if fewer than ``steps``; None is
            the full batch.
        dynamics: ``"gradient_descent"``, or ``"gradient_flow"`` (time t = step, in units of the learning rate), which
            is for the squared error on full batches, without momentum and schedule.

    Raises:
        ValueError: If a value is out of its range, or two do not go together.

    Example:
        >>> from torch_eft import Training
        >>> Training(learning_rate=0.1, steps=100, momentum=0.9)
        full-batch gradient descent with momentum 0.9, learning rate 0.1, 100 steps, mean squared error
        >>> Training(schedule=lambda step: 0.1 / (1 + step), steps=2).learning_rates
        (0.1, 0.05)
    """

    _: KW_ONLY
    loss: str | LossFunction = "mse"
    reduction: Reduction = "mean"
    learning_rate: float | None = None
    steps: float
    momentum: float = 0.0
    nesterov: bool = False
    dampening: float = 0.0
    schedule: Schedule | None = None
    batches: Batches | None = None
    dynamics: Dynamics = "gradient_descent"

    def __new__(cls, *arguments: Any, **keywords: Any) -> "Training":
        """Answer arguments that it does not have, as people write them."""
        if arguments:
            raise TypeError("Training: its parts go by keyword, Training(learning_rate=0.1, steps=100)")
        check_keywords(keywords)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.loss, type):
            raise ValueError(f"loss: the class {self.loss.__name__} given; give an instance, {self.loss.__name__}()")
        if not callable(self.loss):
            check_choice("loss", self.loss, ("mse", "cross_entropy"), "a function of (outputs, targets)")
        check_choice("reduction", self.reduction, get_args(Reduction))
        check_choice("dynamics", self.dynamics, get_args(Dynamics))
        for name in ("momentum", "dampening"):
            _check_number(name, getattr(self, name), lambda value: 0 <= value < 1, "it must lie in [0, 1)")
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "nesterov", bool(self.nesterov))
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov: needs momentum > 0 and dampening 0, as in torch.optim.SGD")
        if self.flows and (self.loss != "mse" or self.momentum or self.schedule is not None or not self.is_full_batch):
            raise ValueError(
                "dynamics: 'gradient_flow' is in closed form, for the squared error on full batches without momentum "
                "and schedule; give none of those, or 'gradient_descent' with a small learning rate"
            )
        _check_number("steps", self.steps, lambda value: value >= 0, "give a whole number >= 0")
        steps = float(self.steps)
        object.__setattr__(self, "steps", int(self.steps) if steps.is_integer() else steps)
        endless = self.steps == math.inf and self.schedule is None and self.is_plain
        if not (self.flows or endless or float(self.steps).is_integer()):
            raise ValueError(f"steps: {self.steps} given; give a whole number >= 0")
        self._check_rates()
        if self.batches is not None:
            if isinstance(self.batches, str) or not hasattr(self.batches, "__len__"):
                raise ValueError(f"batches: {self.batches!r} given; give one list of sample indices per step")
            object.__setattr__(self, "batches", tuple(_indices(batch) for batch in self.batches))
            if not self.batches:
                raise ValueError(
                    "batches: none given; give at least one set of sample indices, or None for the full batch"
                )

    def _check_rates(self) -> None:
        if self.schedule is None:
            if self.learning_rate is None:
                raise ValueError("learning_rate: none given; give learning_rate, or schedule for one rate per step")
            _check_number(
                "learning_rate",
                self.learning_rate,
                lambda value: 0 < value < math.inf,
                "it must be positive and finite",
            )
            object.__setattr__(self, "learning_rate", float(self.learning_rate))
            return
        if self.learning_rate is not None:
            raise ValueError("learning_rate: given beside schedule, which takes its place; give one of them")
        if not callable(self.schedule):
            if isinstance(self.schedule, str) or not hasattr(self.schedule, "__len__"):
                raise ValueError(
                    f"schedule: {self.schedule!r} given; give a sequence of rates or a function of the step"
                )
            if len(self.schedule) < self.steps:
                raise ValueError(
                    f"schedule: {len(self.schedule)} learning rates given for {self.steps} steps; give one per step"
                )
            for rate in self.schedule:
                _check_number("schedule", rate, lambda value: True, "give one number per step")
            object.__setattr__(self, "schedule", tuple(map(float, self.schedule)))
        for rate in self.learning_rates:
            _check_number("schedule", rate, lambda value: 0 <= value < math.inf, "all rates must be finite and >= 0")

    @cached_property
    def learning_rates(self) -> tuple[float, ...]:
        """The learning rate of each step, (T,)."""
        if self.schedule is None:
            return (float(self.learning_rate or 0.0),) * int(self.steps)
        if callable(self.schedule):
            return tuple(float(self.schedule(step)) for step in range(int(self.steps)))
        return tuple(map(float, self.schedule[: int(self.steps)]))

    def rate(self, step: int) -> float:
        """The learning rate of one step."""
        return self.learning_rate if self.learning_rate is not None else self.learning_rates[step]

    @property
    def flows(self) -> bool:
        """True for gradient flow."""
        return self.dynamics == "gradient_flow"

    @property
    def is_full_batch(self) -> bool:
        """True if each step takes all training samples."""
        return self.batches is None

    @property
    def is_plain(self) -> bool:
        """True for full batches at one learning rate without momentum: any number of steps has a closed form."""
        one_rate = self.schedule is None or len(set(self.learning_rates)) <= 1
        return self.momentum == 0 and self.is_full_batch and one_rate

    @property
    def largest_stable(self) -> float:
        """The largest stable eta times an eigenvalue of the loss's Hessian: 2, 2 (1 + m), or less for Nesterov.

        From |roots| < 1 of x^2 - (1 + m - h) x + m, heavy ball, or x^2 - (1 + m) (1 - h) x + m (1 - h), Nesterov.
        """
        m = self.momentum
        undamped = 1 - self.dampening if m else 1.0  # without momentum torch damps nothing
        return 2 * (1 + m) / (1 + 2 * m) if self.nesterov else 2 * (1 + m) / undamped

    def batch(self, step: int) -> Tensor | None:
        """The sample indices of a step, or None for all."""
        # Made anew each time: a tensor made and kept inside a torch.func transform would outlive the transform.
        return None if self.batches is None else torch.tensor(self.batches[step % len(self.batches)], device="cpu")

    def different_batches(self) -> list[Tensor | None]:
        """Each minibatch that some step takes, once; ``[None]`` for full batches."""
        batches = [None] if self.batches is None else self.batches[: int(min(self.steps, len(self.batches)))]
        return [None if batch is None else torch.tensor(batch, device="cpu") for batch in dict.fromkeys(batches)]

    def check_batches(self, num_samples: int) -> None:
        """Raise if a minibatch names a sample that is not there.

        Args:
            num_samples: Number N of training samples.

        Raises:
            ValueError: With the minibatch.
        """
        for batch in self.batches or ():
            if max(batch) >= num_samples:
                raise ValueError(
                    f"batches: {list(batch)} given; each is a list of sample indices, 0 .. {num_samples - 1}"
                )

    def summed(self, outputs: int) -> "Training":
        """Return the same training on full batches of the squared error with ``reduction="sum"``, the rates scaled.

        Args:
            outputs: Number of training outputs, N C: what a mean is over.
        """
        if self.reduction == "sum":
            return self
        scale = 2.0 / outputs
        rate = None if self.learning_rate is None else scale * self.learning_rate
        schedule = None if self.schedule is None else tuple(scale * each for each in self.learning_rates)
        return replace(self, reduction="sum", learning_rate=rate, schedule=schedule)

    def times(self, at_steps: Sequence[float] | None = None, device: torch.device | str = "cpu") -> Tensor:
        """The steps at which a forecast is wanted.

        Args:
            at_steps: Steps between 0 and T; None means 0, 1, .. T.
            device: Of the result.

        Returns:
            (R,), whole numbers as integers, else float64.

        Raises:
            ValueError: If one is out of range, or not whole for gradient descent.
        """
        if at_steps is None and math.isfinite(self.steps):
            return torch.arange(int(self.steps) + 1, device=device)
        if at_steps is None:
            raise ValueError(f"at_steps: none given; with steps = {self.steps:g} name the times that are wanted")
        wanted = [float(step) for step in at_steps]
        kind = "times" if self.flows else "whole steps"
        if not wanted or not all(0 <= step <= self.steps for step in wanted):
            raise ValueError(f"at_steps: {list(at_steps)} given; give {kind} between 0 and steps = {self.steps:g}")
        if all(step.is_integer() for step in wanted):
            return torch.tensor(wanted, dtype=torch.float64, device=device).long()
        if not self.flows and any(math.isfinite(step) and not step.is_integer() for step in wanted):
            raise ValueError(f"at_steps: {list(at_steps)} given; give {kind} between 0 and steps = {self.steps:g}")
        return torch.tensor(wanted, dtype=torch.float64, device=device)

    def check_stable(self, sharpness: float, where: str) -> None:
        """Raise if a learning rate is beyond the linear stability bound.

        Args:
            sharpness: The largest eigenvalue of the loss's Hessian in parameter space, lambda included.
            where: For the message: where the Hessian was taken.

        Raises:
            UnstableError: With the bound: 2 / lambda_max, 2 (1 + m) / lambda_max for the heavy ball and
                2 (1 + m) / ((1 + 2 m) lambda_max) for Nesterov's momentum.
        """
        rate = self.learning_rate if self.schedule is None else max(self.learning_rates, default=0.0)
        if self.flows or rate is None or rate * sharpness < self.largest_stable:
            return
        m, formula = self.momentum, "2 / lambda_max"
        if m:
            formula = "2 (1 + m) / ((1 + 2 m) lambda_max)" if self.nesterov else "2 (1 + m) / lambda_max"
            if self.dampening:
                formula = f"2 (1 + m) / ((1 - {self.dampening:g}) lambda_max)"
            formula += f", {'Nesterov ' * self.nesterov}momentum m = {m:g}"
        bound = self.largest_stable / sharpness
        found = f"{formula}, lambda_max = {sharpness:.4g} of the loss's Hessian {where}"
        raise UnstableError(rate, bound, found)

    def describe(self) -> str:
        """Describe the training in one line."""
        name = ("full-batch " if self.is_full_batch else "fixed-minibatch ") + self.dynamics.replace("_", " ")
        if self.momentum:
            name += f" with {'Nesterov ' * self.nesterov}momentum {self.momentum:g}"
            name += f" and dampening {self.dampening:g}" * bool(self.dampening)
        rates = self.learning_rates if self.schedule is not None else (self.learning_rate or 0.0,)
        low, high = min(rates, default=0.0), max(rates, default=0.0)
        rate = f"learning rate {low:g}" if low == high else f"learning rates {low:g} to {high:g}"
        if callable(self.loss):
            loss = f"loss {getattr(self.loss, '__name__', type(self.loss).__name__)}"
        else:
            loss = {"mean": "mean", "sum": "summed"}[self.reduction]
            loss += {"mse": " squared error", "cross_entropy": " cross-entropy"}[self.loss]
        steps = f"{self.steps:g}" if isinstance(self.steps, float) else str(self.steps)
        return f"{name}, {rate}, {steps} step{'s' * (self.steps != 1)}, {loss}"

    __repr__ = describe


def check_keywords(keywords: Iterable[str]) -> None:
    """Raise unless all are fields of a training.

    Raises:
        TypeError: With the nearest one, and what to do about optimizers that it does not describe.
    """
    known = [field.name for field in fields(Training)]
    unknown = next((name for name in keywords if name not in known), None)
    if unknown is not None:
        hint = _MEANT.get(unknown) or nearest(unknown, known)
        raise TypeError(
            f"{unknown}: no such argument{hint}; a training is given by {', '.join(known)}. Adam, weight decay and the "
            "like are not linear in the gradients: measure.TaylorModel follows one network under them"
        )


_MEANT = {
    "lr": " (did you mean 'learning_rate'?)",
    "epochs": " (did you mean 'steps'? A full batch an epoch is one step)",
    "batch_size": " (did you mean 'batches'? It holds the sample indices of each step)",
    "optimizer": " (its learning_rate, momentum, ... are given one by one)",
}


def as_training(training: Training | None, **keywords: Any) -> Training:
    """Return the training that a forecast was given, either whole or by keywords.

    Args:
        training: A ``Training``, or None.
        **keywords: Fields of a ``Training``, None for a learning rate or steps that were not given.

    Raises:
        TypeError: If a keyword is not a field of ``Training``.
        ValueError: If both or none were given.

    Example:
        >>> from torch_eft.results.training import as_training
        >>> as_training(None, learning_rate=0.1, steps=3, reduction="sum")
        full-batch gradient descent, learning rate 0.1, 3 steps, summed squared error
    """
    check_keywords(keywords)
    if training is None:
        if keywords.get("steps") is None:
            raise ValueError("steps: none given; give learning_rate= and steps=, or training=Training(...)")
        return Training(**keywords)
    if not isinstance(training, Training):
        raise ValueError(
            f"training: {training!r} given; give a torch_eft.Training, or learning_rate=, steps= and so on by keyword"
        )
    beside = [name for name, value in keywords.items() if value is not None]
    if beside:
        raise ValueError(
            f"{', '.join(beside)}: given beside training; give a Training, or its parts by keyword, not both"
        )
    return training


def _check_number(name: str, value: Any, allowed: Callable[[float], bool], expected: str) -> None:
    if isinstance(value, str | bool) or not hasattr(value, "__float__"):
        raise ValueError(f"{name}: {one_line(value)} given, where a number belongs; {expected}")
    if not allowed(float(value)):
        raise ValueError(f"{name}: {value} given; {expected}")


def _indices(batch: Sequence[int] | Tensor) -> tuple[int, ...]:
    rows = batch.tolist() if hasattr(batch, "tolist") else batch
    whole = isinstance(rows, Sequence) and all(
        hasattr(row, "__index__") and not isinstance(row, bool) and row >= 0 for row in rows
    )
    if isinstance(rows, str) or not whole or not len(rows):
        raise ValueError(f"batches: {rows!r} given; each is a list of sample indices, 0 .. N - 1")
    return tuple(int(row) for row in rows)
