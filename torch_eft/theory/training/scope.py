"""What the forecast of an ensemble's training covers, and where else to look for what it does not."""

from collections.abc import Sequence

from torch import Tensor

from torch_eft.theory.training.optimizer import Descent, Schedule, descent
from torch_eft.theory.training.time_sums import Dynamics


def covered_descent(
    learning_rate: float,
    steps: int,
    dynamics: Dynamics,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    schedule: Schedule | None = None,
    optimizer: str = "sgd",
    weight_decay: float = 0.0,
    batches: Sequence[Sequence[int] | Tensor] | None = None,
    closed_form: bool = True,
    samples: int | None = None,
) -> Descent:
    """The optimizer, if the derivation covers it; arguments as ``prediction.predict_training`` takes them.

    With ``closed_form`` it is for the squared error on full batches; ``samples`` is the number of training samples.

    Returns:
        In closed form without learning rates if it is plain gradient descent or flow.

    Raises:
        ValueError: In words, with the alternative, if it does not.
    """
    if dynamics not in ("gradient_descent", "gradient_flow"):
        raise ValueError(f"dynamics: {dynamics!r} given; give 'gradient_descent' or 'gradient_flow'")
    if optimizer.lower() != "sgd":
        raise ValueError(
            f"optimizer: {optimizer!r} given; only SGD (momentum, Nesterov, schedules) is linear in the gradients, as "
            "the derivation needs: Adam and its kin divide by them. measure.TaylorModel trains one network's Taylor "
            "model with any optimizer"
        )
    if weight_decay != 0:
        raise ValueError(
            f"weight_decay: {weight_decay:g} given; it moves all parameters by a part of themselves, out of reach of "
            "an expansion about the start. Give 0; for weak decay measure.TaylorModel follows one network"
        )
    if dynamics == "gradient_flow" and (momentum or schedule is not None):
        raise ValueError("dynamics: 'gradient_flow' has no momentum and no schedule; give 'gradient_descent'")
    if dynamics == "gradient_flow" and not closed_form:
        raise ValueError(
            "dynamics: 'gradient_flow' is in closed form for the squared error on full batches alone; give "
            "'gradient_descent' with a small learning rate"
        )
    plain = closed_form and schedule is None and momentum == 0
    return descent(learning_rate, 0 if plain else steps, momentum, dampening, nesterov, schedule, batches, samples)


def check_stable(learning_rate: float, scale: float, largest: float, optimizer: Descent) -> None:
    """Refuse learning rates beyond the linear stability bound.

    Args:
        learning_rate: eta, if the optimizer has no rates of its own.
        scale: Of the loss, relative to L = (1/2) sum (z - y)^2.
        largest: lambda_max of Theta on the training points.
        optimizer: The optimizer.

    Raises:
        ValueError: With the bound: 2 / lambda_max, 2 (1 + m) / lambda_max for the heavy ball and
            2 (1 + m) / ((1 + 2 m) lambda_max) for Nesterov's momentum, lambda_max of the loss's Hessian.
    """
    rate, sharpness = max(optimizer.learning_rates, default=learning_rate), scale * largest
    if rate * sharpness < optimizer.largest_stable:
        return
    m, formula = optimizer.momentum, "2 / lambda_max"
    if m:
        formula = "2 (1 + m) / ((1 + 2 m) lambda_max)" if optimizer.nesterov else "2 (1 + m) / lambda_max"
        if optimizer.dampening:
            formula = f"2 (1 + m) / ((1 - {optimizer.dampening:g}) lambda_max)"
        formula += f", m = {m:g}"
    raise ValueError(
        f"learning_rate: {rate:g} given, beyond the linear stability bound {optimizer.largest_stable / sharpness:.4g} "
        f"({formula}, lambda_max = {sharpness:.4g} of the loss's Hessian at infinite width); give a smaller one"
    )
