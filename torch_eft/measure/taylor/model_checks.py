"""Checks that a Taylor model stands for the training of a network."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map_only

from torch_eft.measure.forward.checks import ROUNDING
from torch_eft.measure.taylor.series import TaylorSeries
from torch_eft.results.trajectory import Validity

CAUTION, LIMIT = 0.1, 0.3
"""Sizes of the second and third term relative to the first; beyond the limit, order 3 was seen worse than order 1."""

ENDED = 0.01
"""The remainder relative to the first term below which nothing is missing (a deep linear network)."""

SHRINKAGE = 0.1
"""The part of theta_0 that weight decay may take away; an expansion about theta_0 does not survive more."""


def check_modules(model: nn.Module, batch_statistics: bool = False) -> None:
    """Refuse modules of torch that compute something else in training than in evaluation.

    Args:
        model: The network.
        batch_statistics: Whether those of BatchNorm are part of the function that is expanded.

    Raises:
        ValueError: For dropout and batch statistics in training mode; the message names the module.
    """
    for name, module in model.named_modules():
        place = f"{name!r} ({type(module).__name__})" if name else type(module).__name__
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"model: {place} drops out, so that every step trains another network; a Taylor model stands for one "
                "function of the parameters. Set p = 0 in the real run, or train it with model.eval()"
            )
        if batch_statistics and isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats:
            raise ValueError(
                f"model: {place} normalizes with the statistics of the batch in training and with running ones in "
                "evaluation, which is not one function of the parameters to expand. Train it with running statistics, "
                "module.eval(), or use GroupNorm or LayerNorm"
            )


def check_same_function(
    network: nn.Module, theta_0: Mapping[str, Tensor], modes: list[bool], args: Any, kwargs: Any
) -> None:
    """Refuse networks whose function at theta_0 is random, or another one in the ``modes`` they are trained in.

    Two forwards, leaving the random state and the buffers as they are.

    Raises:
        ValueError: If it is; the message says how.
    """
    modules = list(network.modules())
    devices = {value.device.index or 0 for value in theta_0.values() if value.device.type == "cuda"}

    def run() -> tuple[list[Any], Any, bool]:
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        before = torch.get_rng_state()
        output = functional_call(network, {**theta_0, **buffers}, *tree_map_only(Tensor, torch.clone, (args, kwargs)))
        leaves, structure = tree_flatten(output)
        return leaves, structure, not torch.equal(before, torch.get_rng_state())

    with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices)):
        reference, structure, drawn = run()
        if drawn:
            raise ValueError(
                "model: its forward draws random numbers in evaluation, too, so that every step trains another "
                "network; a Taylor model stands for one function of the parameters"
            )
        if not any(modes):
            return
        try:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            values, other, _ = run()
        finally:
            for module in modules:
                module.training = False
    if other != structure or not all(_alike(a, b) for a, b in zip(values, reference, strict=True)):
        raise ValueError(
            "model: in training mode it computes something else than in evaluation (dropout, batch statistics, "
            "stochastic depth, another output?), but a Taylor model stands for one function of the parameters; "
            "train it with model.eval(), or without these"
        )


def _alike(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not a.is_floating_point():
        return not isinstance(a, Tensor) or torch.equal(a, b)
    scale = b.abs().max() if b.numel() else b.new_zeros(())
    return a.shape == b.shape and bool(((a - b).abs() <= ROUNDING * torch.finfo(b.dtype).eps * scale).all())


def judged(series: TaylorSeries, order: int, theta_0: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> Validity:
    """Judge a Taylor model of this order where its terms are those of ``series``.

    Args:
        series: To order 3, at theta.
        order: Order of the Taylor model, 1 or 3.
        theta_0: The point of expansion.
        theta: The present parameters.

    Returns:
        The verdict; the last of its reasons, and ``numbers``, give the sizes.
    """
    first, second, third, remainder = (_rms(term) for term in (*series.terms[1:], series.remainder))
    distance, shrinkage = displacement(theta_0, theta)
    ratio = max(second, third) / first if first > 0 else 0.0
    numbers = {"higher_terms": ratio, "distance": distance, "shrinkage": shrinkage}
    sizes = "nothing has moved yet"
    if first > 0:
        numbers |= {"second": second / first, "third": third / first, "remainder": remainder / first}
        sizes = (
            f"relative to f'd, |f''dd/2| is {second / first:.2g}, |f'''ddd/6| {third / first:.2g} and the network's "
            f"remainder there {remainder / first:.2g}; |theta - theta_0| / |theta_0| is {distance:.2g}"
        )
    kinks = f"the network has kinks ({', '.join(series.kinked)}), "

    def verdict(flag: Literal["valid", "caution", "invalid"], *reasons: str) -> Validity:
        return Validity(flag, (*reasons, sizes), numbers)

    if series.kinked and order == 3:
        return verdict(
            "invalid", kinks + "whose contribution no Taylor term contains, so that order 3 does not improve on order 1"
        )
    if order == 3 and remainder <= ENDED * first:
        return verdict("valid", "the series has all but ended with order 3")
    if shrinkage > SHRINKAGE:
        return verdict(
            "invalid",
            f"{100 * shrinkage:.0f} % of theta_0 is gone (weight decay?), and an expansion about it does not apply; "
            "decay less, or towards theta_0",
        )
    if not ratio <= LIMIT:
        return verdict(
            "invalid",
            f"the higher terms are {ratio:.2g} of the first, beyond {LIMIT}, where order 3 has been seen worse than "
            "order 1; a wider network or a shorter training has smaller ones",
        )
    if ratio > CAUTION:
        return verdict("caution", f"the higher terms are {ratio:.2g} of the first")
    if series.kinked:
        return verdict(
            "caution",
            kinks + "and no higher term says how much their crossings, which order 1 leaves out, contribute",
        )
    return verdict("valid")


def judged_correction(full: Validity, first: Tensor, correction: Tensor) -> Validity:
    """Judge the linearized correction by its size relative to f'd.

    Args:
        full: The verdict on order 3.
        first: f'd, the change of the Taylor model of order 1.
        correction: The correction.

    Returns:
        The stricter of the two verdicts, with the reasons of both.
    """
    size = _rms(first)
    ratio = _rms(correction) / size if size > 0 else 0.0
    numbers = {**full.numbers, "correction": ratio}
    reason = f"the correction is {ratio:.2g} of the change of the Taylor model of order 1"
    if not ratio <= LIMIT:
        return Validity("invalid", (f"{reason}, beyond {LIMIT}", *full.reasons), numbers)
    flag = "caution" if ratio > CAUTION and full.flag == "valid" else full.flag
    return Validity(flag, (*full.reasons, reason), numbers)


def _rms(value: Tensor) -> float:
    return float(value.double().square().mean().sqrt())


def displacement(theta_0: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> tuple[float, float]:
    """|theta - theta_0| / |theta_0|, and the part of theta_0 that is gone: 1 - theta . theta_0 / |theta_0|^2."""
    pairs = [(value.detach(), theta[name].detach()) for name, value in theta_0.items()]
    norm = sum(float(a.square().sum()) for a, _ in pairs)
    if norm == 0.0:
        return float("inf"), 0.0
    distance = sum(float((b - a).square().sum()) for a, b in pairs)
    overlap = sum(float((a * b).sum()) for a, b in pairs)
    return (distance / norm) ** 0.5, 1 - overlap / norm
