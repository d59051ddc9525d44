"""What an optimizer's step is made of: fresh gradient, momentum and decay, and the preconditioner P between them.

An adaptive optimizer follows no NTK H = J lambda J^T, but

    dtheta = -eta lambda P c g + (momentum) + (decay),      dz = -eta c H_P e + ...,      H_P = J lambda P J^T

with P diagonal, e the gradient of the loss in the outputs, g = J^T e, and c the share of the gradient in the update (1
for gradient descent, (1 - b1)/(1 - b1^t) for Adam). The parts are those of torch's own update rules (torch.optim), and
of Chen et al. 2023 (Lion, arXiv:2302.06675); that they add up to the step taken is tested for every one. P of the
coming step is known with its gradient only; without it, P is that of the step just taken.

The optimizer is read, never written.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import NAdam, Optimizer, RMSprop
from torch.optim.adagrad import Adagrad
from torch.optim.adam import Adam
from torch.optim.adamax import Adamax
from torch.optim.adamw import AdamW
from torch.optim.sgd import SGD

from torch_eft.measure.jacobian.plan import Lambdas, wrong_name
from torch_eft.measure.kernels.optimizers import plain_optimizer
from torch_eft.results.presentation.repr import short_repr

Preconditioner = dict[str, float | Tensor]
"""lambda P by parameter: one number, or one for every number of the parameter."""


class UnknownYetError(ValueError):
    """P is known after the first step only."""


@dataclass(frozen=True, repr=False)
class OptimizerStep:
    """The parts of one step, which add up to it.

    Args:
        learning_rate: eta, of the first parameter group that has one above 0.
        preconditioner: ``{parameter: lambda P}``, lambda being the parameter's learning rate over eta.
        share: ``{parameter: c}``, the share of the gradient in the update; fresh = -eta lambda P c g.
        fresh: ``{parameter: its change by the gradient of this step}``.
        momentum: By gradients of earlier steps.
        decay: By weight decay, coupled or decoupled.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Linear(2, 1)
        >>> gradients = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        >>> step = measure.optimizer_step(model, torch.optim.SGD(model.parameters(), lr=0.5), gradients)
        >>> step.fresh["bias"].tolist(), step.preconditioner["bias"]
        ([-0.5], 1.0)
    """

    learning_rate: float
    preconditioner: Preconditioner
    share: dict[str, float]
    fresh: dict[str, Tensor]
    momentum: dict[str, Tensor]
    decay: dict[str, Tensor]

    __repr__ = short_repr

    @property
    def total(self) -> dict[str, Tensor]:
        """The whole step, theta after it minus theta before it."""
        return {name: self.fresh[name] + self.momentum[name] + self.decay[name] for name in self.fresh}


@dataclass
class _Parts:
    """One parameter's.

    Args:
        rate: Learning rate.
        P: None is 1.
        share: c.
        momentum: Its change by momentum, None where there is none.
        decay: Its change by weight decay, likewise.
    """

    rate: float
    P: Tensor | None = None
    share: float = 1.0
    momentum: Tensor | None = None
    decay: Tensor | None = None


def preconditioner(
    model: nn.Module, optimizer: Optimizer, gradients: Mapping[str, Tensor] | None = None
) -> Preconditioner:
    """Read lambda P off an optimizer: what ``lambdas`` of the NTK is for H_P.

    Args:
        model: The network that it trains.
        optimizer: SGD, RMSprop, Adagrad, Adam, AdamW, NAdam or Adamax of torch.optim, in all their variants, or a Lion.
        gradients: Those of the coming step, ``{parameter: gradient}``, unscaled: P of that step. None: P of the latest
            step.

    Returns:
        ``{parameter: a number, or a tensor of its shape}``, 0 for those that it does not hold or that never had a
        gradient.

    Raises:
        ValueError: If P of this optimizer is not known, or not yet: it has taken no step, or depends on the gradient.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.1, eps=0.0)
        >>> model(torch.tensor([[1.0, -4.0]])).sum().backward()
        >>> optimizer.step()
        >>> measure.preconditioner(model, optimizer)["weight"].tolist()  # 1 / |g|
        [[1.0, 0.25]]
        >>> measure.ntk(model, torch.eye(2), preconditioner=optimizer, trace=True).diagonal().tolist()
        [1.0, 0.25]
    """
    rates, rule, entries = _entries(model, optimizer)
    _check_names(model, gradients)
    found: Preconditioner = dict.fromkeys(rates, 0.0)
    eta = _first(rates)
    states = {name: plain_optimizer(optimizer).state.get(parameter, {}) for name, (_, parameter) in entries.items()}
    for name, (group, parameter) in entries.items():
        g = None if gradients is None else _gradient(gradients, name, parameter)
        if gradients is not None and g is None:
            continue
        if g is None and rule is not _sgd and not _moved(states[name]) and any(map(_moved, states.values())):
            continue  # it never had a gradient
        parts = rule(group, states[name], parameter.detach(), g)
        scale = parts.rate / eta
        found[name] = scale if parts.P is None else scale * parts.P
    return found


def optimizer_step(
    model: nn.Module,
    optimizer: Optimizer,
    gradients: Mapping[str, Tensor],
    *,
    theta: Mapping[str, Tensor] | None = None,
) -> OptimizerStep:
    """Take apart the step that an optimizer is about to take, without taking it.

    Args:
        model: The network that it trains.
        optimizer: See ``preconditioner``.
        gradients: ``{parameter: gradient}``, unscaled; a parameter without one does not move.
        theta: The parameters before the step, ``{name: tensor}``; None: those of the model.

    Returns:
        Its parts, exact to rounding.

    Raises:
        ValueError: If the update rule is not known.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> gradients = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        >>> round(float(measure.optimizer_step(model, optimizer, gradients).fresh["bias"]), 3)
        -0.1
    """
    rates, rule, entries = _entries(model, optimizer)
    _check_names(model, gradients)
    eta = _first(rates)
    result = OptimizerStep(eta, dict.fromkeys(rates, 0.0), {}, {}, {}, {})
    for name, (group, parameter) in entries.items():
        g = _gradient(gradients, name, parameter)
        if g is None:
            continue
        value = parameter.detach() if theta is None or name not in theta else theta[name].to(parameter)
        parts = rule(group, plain_optimizer(optimizer).state.get(parameter, {}), value, g)
        scale, zero = parts.rate / eta, torch.zeros_like(value)
        result.preconditioner[name] = scale if parts.P is None else scale * parts.P
        result.share[name] = parts.share
        result.fresh[name] = -parts.rate * parts.share * (g if parts.P is None else parts.P * g)
        if group.get("maximize"):
            result.fresh[name] = -result.fresh[name]
        result.momentum[name] = zero if parts.momentum is None else parts.momentum
        result.decay[name] = zero if parts.decay is None else parts.decay
    return result


def lambdas_of(model: nn.Module, lambdas: Lambdas, optimizer: Optimizer | None) -> Lambdas:
    """Return lambda P of an optimizer, or ``lambdas`` where there is none."""
    if optimizer is None:
        return lambdas
    if lambdas is not None:
        raise ValueError("preconditioner: lambdas are given too, which it stands for; give one of the two")
    found = preconditioner(model, optimizer)
    for name, value in found.items():
        if isinstance(value, Tensor) and not bool(value.isfinite().all()):
            raise ValueError(
                f"preconditioner: P of {name!r} is not finite in {str(value.dtype).removeprefix('torch.')}: it is 1 "
                "over the sizes of gradients, some of which are 0; give the optimizer a larger eps"
            )
    return found


Rule = Callable[[Mapping[str, Any], Mapping[str, Any], Tensor, Tensor | None], _Parts]
"""Options of the group, state, theta, and the gradient of the coming step or None for P of the latest one."""


def _entries(
    model: nn.Module, optimizer: Optimizer
) -> tuple[dict[str, float], Rule, dict[str, tuple[Mapping[str, Any], Tensor]]]:
    """Learning rates by parameter, the update rule, and group and parameter by name."""
    optimizer = plain_optimizer(optimizer)
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    entries: dict[str, tuple[Mapping[str, Any], Tensor]] = {
        names[id(p)]: (group, p) for group in optimizer.param_groups for p in group["params"] if id(p) in names
    }
    if not entries:
        raise ValueError(
            f"optimizer: it holds none of the trainable parameters of this {type(model).__name__}; give the network "
            "that it trains"
        )
    rates = {name: float(entries[name][0]["lr"]) if name in entries else 0.0 for name in names.values()}
    return rates, _rule_of(optimizer), entries


def _first(rates: Mapping[str, float]) -> float:
    return next((rate for rate in rates.values() if rate > 0), 1.0)


def _rule_of(optimizer: Optimizer) -> Rule:
    kind = type(optimizer)
    for known, rule in _RULES.items():
        if isinstance(optimizer, known) and _plain(kind, known):
            return rule
    if kind.__name__ == "Lion" and all({"lr", "betas"} <= group.keys() for group in optimizer.param_groups):
        return _lion
    raise ValueError(
        f"optimizer: the preconditioner of {kind.__module__}.{kind.__name__} is not known; those of "
        f"{', '.join(known.__name__ for known in _RULES)} of torch.optim and of Lion are"
    )


def _plain(kind: type[Optimizer], known: type[Optimizer]) -> bool:
    """Whether the step is that of torch: not overridden in a class of the user's."""
    # Optimizers write a wrapped ``step`` into the class of the first instance, so that it may not be inherited.
    return kind.step.__module__ == known.step.__module__


def _check_names(model: nn.Module, gradients: Mapping[str, Tensor] | None) -> None:
    if gradients is not None and not isinstance(gradients, Mapping):
        raise TypeError(f"gradients: {type(gradients).__name__} given; give {{parameter name: gradient}}")
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if unknown := set(gradients or ()) - names:
        raise ValueError(f"gradients: {wrong_name(unknown, names)}")


def _gradient(gradients: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor | None:
    g = gradients.get(name)
    if g is None:
        return None
    if g.layout != torch.strided or g.shape != parameter.shape:
        raise ValueError(
            f"gradients: {name!r} has a {str(g.layout).removeprefix('torch.')} gradient {tuple(g.shape)}; give a dense "
            f"one of the shape of the parameter, {tuple(parameter.shape)}"
        )
    return g.detach().to(parameter)


def _moved(state: Mapping[str, Any]) -> bool:
    return bool(state) and _number(state, "step", 1.0) > 0


def _number(state: Mapping[str, Any], key: str, default: float = 0.0) -> float:
    return float(state.get(key, default))


def _coupled(group: Mapping[str, Any], theta: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradient that the rule sees, and what weight decay adds to it."""
    added = group["weight_decay"] * theta if group.get("weight_decay") else None
    g = -g if group.get("maximize") else g
    return (g if added is None else g + added), added


def _taken(state: Mapping[str, Any], key: str, optimizer: str) -> Tensor:
    value = state.get(key)
    if value is None:
        raise UnknownYetError(
            f"preconditioner: {optimizer} has taken no step, so that its P is not known yet; give gradients= for that "
            "of the coming step"
        )
    return torch.as_tensor(value).detach()


def _sgd(group: Mapping[str, Any], state: Mapping[str, Any], theta: Tensor, g: Tensor | None) -> _Parts:
    rate, mu = float(group["lr"]), float(group["momentum"])
    if g is None:
        return _Parts(rate)
    buffer = state.get("momentum_buffer")
    share, kept = 1.0, None
    if mu:
        share = 1.0 if buffer is None else 1 - float(group["dampening"])
        kept = None if buffer is None else mu * buffer.detach()
        if group["nesterov"]:
            share, kept = 1 + mu * share, None if kept is None else mu * kept
    _, added = _coupled(group, theta, g)
    return _Parts(
        rate, None, share, None if kept is None else -rate * kept, None if added is None else -rate * share * added
    )


def _rmsprop(group: Mapping[str, Any], state: Mapping[str, Any], theta: Tensor, g: Tensor | None) -> _Parts:
    rate, alpha, mu = float(group["lr"]), float(group["alpha"]), float(group["momentum"])
    added = None
    if g is None:
        square = _taken(state, "square_avg", "RMSprop")
        mean = state.get("grad_avg")
    else:
        g, added = _coupled(group, theta, g)
        square = alpha * state.get("square_avg", torch.zeros_like(theta)) + (1 - alpha) * g.square()
        mean = alpha * state.get("grad_avg", torch.zeros_like(theta)) + (1 - alpha) * g if group["centered"] else None
    if group["centered"] and mean is not None:
        square = square - mean.square()
    P = 1 / (square.sqrt() + group["eps"])
    buffer = state.get("momentum_buffer")
    kept = -rate * mu * buffer.detach() if mu and buffer is not None else None
    return _Parts(rate, P, 1.0, kept, None if added is None else -rate * P * added)


def _adagrad(group: Mapping[str, Any], state: Mapping[str, Any], theta: Tensor, g: Tensor | None) -> _Parts:
    steps, total, added = _number(state, "step"), _taken(state, "sum", "Adagrad"), None
    if g is None:
        if not steps:
            _taken({}, "sum", "Adagrad")
    else:
        g, added = _coupled(group, theta, g)
        steps, total = steps + 1, total + g.square()
    rate = float(group["lr"]) / (1 + (steps - 1) * group["lr_decay"])
    P = 1 / (total.sqrt() + group["eps"])
    return _Parts(rate, P, 1.0, None, None if added is None else -rate * P * added)


def _averages(
    group: Mapping[str, Any], state: Mapping[str, Any], theta: Tensor, g: Tensor | None, kind: str
) -> tuple[float, Tensor, Tensor, Tensor | None]:
    """The number of steps, P of Adam and its kin, b1 m of before, and what coupled decay adds to the gradient."""
    b2 = float(group["betas"][1])
    steps, added = _number(state, "step"), None
    if g is None:
        v = _taken(state, "exp_avg_sq", kind)
    else:
        if not group.get("decoupled_weight_decay"):
            g, added = _coupled(group, theta, g)
        steps += 1
        v = b2 * state.get("exp_avg_sq", torch.zeros_like(theta)) + (1 - b2) * g.square()
    if group.get("amsgrad"):
        v = torch.maximum(state.get("max_exp_avg_sq", torch.zeros_like(theta)), v)
    P = 1 / ((v / (1 - b2**steps)).sqrt() + float(group["eps"]))
    m = float(group["betas"][0]) * state.get("exp_avg", torch.zeros_like(theta))
    return steps, P, m, added


def _decay(group: Mapping[str, Any], theta: Tensor, coupled: Tensor | None, scale: Tensor) -> Tensor | None:
    """The change by weight decay: decoupled, or through the gradient, of which ``scale`` is what it is taken times."""
    if coupled is not None:
        return scale * coupled
    if group.get("decoupled_weight_decay") and group.get("weight_decay"):
        return -float(group["lr"]) * group["weight_decay"] * theta
    return None


def _adam(group: Mapping[str, Any], state: Mapping[str, Any], theta: Tensor, g: Tensor | None) -> _Parts:
    b1, rate = float(group["betas"][0]), float(group["lr"])
    steps, P, m, added = _averages(group, state, theta, g, "Adam")
    share = (1 - b1) / (1 - b1**steps)
    kept = -rate / (1 - b1**steps) * P * m
    return _Parts(rate, P, share, kept, _decay(group, theta, added, -rate * share * P))


def _adamw(group: Mapping[str, Any], state: Mapping[str, Any], theta: Tensor, g: Tensor | None) -> _Parts:
    return _adam({**group, "decoupled_weight_decay": True}, state, theta, g)


def _nadam(group: Mapping[str, Any], state: Mapping[str, Any], theta: Tensor, g: Tensor | None) -> _Parts:
    b1, rate = float(group["betas"][0]), float(group["lr"])
    steps, P, m, added = _averages(group, state, theta, g, "NAdam")
    mu, coming = (b1 * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"])) for t in (steps, steps + 1))
    product = _number(state, "mu_product", 1.0) * (mu if g is not None else 1.0)
    of_average = coming / (1 - product * coming)
    share = (1 - mu) / (1 - product) + of_average * (1 - b1)
    return _Parts(rate, P, share, -rate * of_average * P * m, _decay(group, theta, added, -rate * share * P))


def _adamax(group: Mapping[str, Any], state: Mapping[str, Any], theta: Tensor, g: Tensor | None) -> _Parts:
    (b1, b2), rate = map(float, group["betas"]), float(group["lr"])
    steps, added = _number(state, "step"), None
    if g is None:
        norm = _taken(state, "exp_inf", "Adamax")
    else:
        g, added = _coupled(group, theta, g)
        steps += 1
        norm = torch.maximum(b2 * state.get("exp_inf", torch.zeros_like(theta)), g.abs() + group["eps"])
    P, correction = 1 / norm, 1 - b1**steps
    share = (1 - b1) / correction
    m = b1 * state.get("exp_avg", torch.zeros_like(theta))
    return _Parts(rate, P, share, -rate / correction * P * m, _decay(group, theta, added, -rate * share * P))


def _lion(group: Mapping[str, Any], state: Mapping[str, Any], theta: Tensor, g: Tensor | None) -> _Parts:
    """sign(u) = P u with P = 1/|u|, u = b1 m + (1 - b1) g; where u is 0, nothing moves."""
    if g is None:
        raise ValueError(
            "preconditioner: Lion takes the sign of the coming update, so that its P depends on the coming gradient; "
            "give gradients="
        )
    b1, rate = float(group["betas"][0]), float(group["lr"])
    m = b1 * state.get("exp_avg", torch.zeros_like(theta))
    u = m + (1 - b1) * g
    P = torch.where(u == 0, 0.0, 1 / u.abs())
    own = group | {"decoupled_weight_decay": True} if isinstance(group, dict) else group
    return _Parts(rate, P, 1 - b1, -rate * P * m, _decay(own, theta, None, P))


_RULES: dict[type[Optimizer], Rule] = {
    SGD: _sgd,
    RMSprop: _rmsprop,
    Adagrad: _adagrad,
    AdamW: _adamw,
    Adam: _adam,
    NAdam: _nadam,
    Adamax: _adamax,
}
"""By class, derived ones before those that they derive from."""


def stability_bound(optimizer: Optimizer) -> float:
    """Return the eigenvalue of the preconditioned curvature above which a quadratic loss is not descended.

    2 (1 + b1) / (eta (1 - b1)) for Adam and its kin, 2 (1 + mu) / eta for heavy ball, 2 / eta without momentum: heavy
    ball on one eigenvector with P frozen (Cohen et al. 2022, arXiv:2207.14484).

    Args:
        optimizer: See ``preconditioner``; not Nesterov, NAdam or Lion, whose bounds are others.

    Returns:
        The bound, for the learning rate of the first group that has one above 0.

    Raises:
        ValueError: If it has no such bound.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> round(measure.stability_bound(torch.optim.Adam([torch.zeros(2, requires_grad=True)], lr=1e-3)))
        38000
    """
    optimizer = plain_optimizer(optimizer)
    rule = _rule_of(optimizer)
    group = next((group for group in optimizer.param_groups if float(group["lr"]) > 0), None)
    if group is None:
        return math.inf
    rate = float(group["lr"])
    if rule in (_adam, _adamw, _adamax):
        b1 = float(group["betas"][0])
        return 2 * (1 + b1) / (rate * (1 - b1))
    if rule in (_nadam, _lion) or group.get("nesterov"):
        raise ValueError(f"optimizer: no stability bound is derived for {type(optimizer).__name__} of this kind")
    mu, dampening = float(group.get("momentum", 0.0)), float(group.get("dampening", 0.0))
    return 2 * (1 + mu) / (rate * (1 - dampening))
