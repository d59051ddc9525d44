"""Measures how far hidden representations have moved."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_eft.measure.forward.isolation import Model, Parameters, check_parameters, isolated
from torch_eft.measure.forward.probe import OutputFn
from torch_eft.measure.kernels.metrics import relative_change
from torch_eft.measure.representations.alignment import centered, effective_rank, is_constant, linear_cka
from torch_eft.measure.representations.hidden_kernels import Representation, representation
from torch_eft.results.trajectory import Validity


def movement(now: Representation, reference: Representation) -> dict[str, Tensor]:
    """Compute the movement of single neurons, (1 / n) sum_j ds_{j;a} ds_{j;b}, of every hidden layer.

    At order 1/n the theory predicts this beside the change of K: the movement of a neuron is of order 1/sqrt(n),
    and most of it cancels in the kernel, which changes by order 1/n.

    Args:
        now: The representation with its activations, ``representation(..., keep=True)``.
        reference: That of the same layers and inputs before.

    Returns:
        ``{layer: (N, N)}``.

    Raises:
        ValueError: If activations were not kept, or layers are not the same.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> now = measure.representation(model, torch.eye(3), keep=True)
        >>> {name: float(value.norm()) for name, value in measure.movement(now, now).items()}
        {'1': 0.0}
    """
    if now.activations is None or reference.activations is None:
        raise ValueError("movement: needs the activations; call representation(..., keep=True), then and now")
    _check_same(now.activations, reference.activations)
    moved = {}
    for name, value in now.activations.items():
        change = value - reference.activations[name].to(value)
        moved[name] = change @ change.T / change.shape[1]
    return moved


@dataclass(frozen=True)
class LayerChange:
    """The change of one hidden layer.

    Args:
        relative_change: ||K - K_0|| / ||K_0||.
        cka_distance: 1 - linear CKA(K, K_0).
        debiased_cka_distance: Likewise, debiased; NaN below four samples.
        effective_rank: Before and after, the participation ratio of the centered kernel, from 1 to N - 1.
        alignment: With the targets, before and after; NaN without targets.
        movement: rms over neurons and samples of s - s_0, over that of s_0; NaN if activations were not kept.

    Example:
        >>> from torch_eft.measure import LayerChange
        >>> LayerChange(0.1, 0.02, 0.03, (2.0, 1.8), (0.5, 0.6), 0.3).effective_rank[1]
        1.8
    """

    relative_change: float
    cka_distance: float
    debiased_cka_distance: float
    effective_rank: tuple[float, float]
    alignment: tuple[float, float]
    movement: float


@dataclass(frozen=True, repr=False)
class RepresentationChange:
    """The change of the hidden layers; ``str`` and ``repr`` give a table.

    Args:
        layers: ``{layer: its change}``.
        validity: Caution where CKA is biased or a number is not defined.

    Example:
        >>> from torch_eft import Validity
        >>> from torch_eft.measure import LayerChange, RepresentationChange
        >>> change = LayerChange(0.1, 0.02, 0.03, (2.0, 1.8), (0.5, 0.6), 0.3)
        >>> print(RepresentationChange({"1": change}, Validity("valid", ())))
        layer  |dK|/|K|  1-CKA  debiased  rank      alignment   |ds|/|s|
        1      0.1       0.02   0.03      2 -> 1.8  0.5 -> 0.6  0.3
    """

    layers: dict[str, LayerChange]
    validity: Validity

    def __str__(self) -> str:
        heads = ["layer", "|dK|/|K|", "1-CKA", "debiased", "rank", "alignment", "|ds|/|s|"]
        rows = [heads]
        for name, change in self.layers.items():
            numbers = (change.relative_change, change.cka_distance, change.debiased_cka_distance)
            pairs = (" -> ".join(_short(value) for value in pair) for pair in (change.effective_rank, change.alignment))
            rows.append([name, *(_short(value) for value in numbers), *pairs, _short(change.movement)])
        sizes = [max(len(row[column]) for row in rows) for column in range(len(heads))]
        table = ["  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip() for row in rows]
        return "\n".join([*table, *self.validity.reasons])

    __repr__ = __str__


def representation_change(
    model: Model,
    x: Any,
    theta_0: Parameters,
    theta: Parameters,
    *,
    targets: Tensor | None = None,
    layers: Sequence[str] | None = None,
    output_fn: OutputFn | None = None,
) -> RepresentationChange:
    """Measure the change of every hidden layer from theta_0 to theta, in evaluation mode.

    Raises ``ValueError`` as ``measure.representation``; if a name is not that of a trainable parameter, or a shape
    differs.

    Args:
        model: Any module; its own parameters are used only where theta_0 or theta leaves one out.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        theta_0: Parameters before, ``{name: tensor}`` or a module that holds them.
        theta: Parameters after, likewise.
        targets: See ``measure.representation``.
        layers: See ``measure.representation``.
        output_fn: Turns what the model returns into (N, C).

    Returns:
        The change, with the movement of single neurons.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> theta = {"0.bias": torch.ones(4)}
        >>> change = measure.representation_change(model, torch.eye(3), model, theta).layers["1"]
        >>> change.relative_change > 0, change.movement > 0
        (True, True)
    """
    check_parameters(theta_0=theta_0, theta=theta)
    options: dict[str, Any] = {"targets": targets, "layers": layers, "keep": True}
    with isolated(model, output_fn) as network:
        reference = representation(network.at(theta_0, "theta_0"), x, **options)
        return compare_representations(representation(network.at(theta), x, **options), reference)


def compare_representations(now: Representation, reference: Representation) -> RepresentationChange:
    """Compare every hidden layer with that of an earlier measurement; waits for the device once.

    Raises ``ValueError`` if the layers or the numbers of samples are not the same.

    Args:
        now: The representation; its targets, or else those of ``reference``, are used.
        reference: That of the same layers and inputs before.

    Returns:
        The change; with the movement of single neurons if both have kept their activations.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> before = measure.representation(model, torch.eye(3))
        >>> now = measure.representation(model, torch.eye(3))
        >>> measure.compare_representations(now, before).layers["1"].relative_change
        0.0
    """
    _check_same(now.K, reference.K)
    moved = now.activations is not None and reference.activations is not None
    movements = movement(now, reference) if moved else {}
    target = reference.target_kernel if now.target_kernel is None else now.target_kernel
    rows = []
    for name, K in now.K.items():
        K_0 = reference.K[name].to(K)
        nan = K.new_full((), math.nan)
        y = None if target is None else target.to(K)
        rows += [
            relative_change(K, K_0),
            1 - linear_cka(K, K_0),
            1 - linear_cka(K, K_0, debiased=True),
            *(_rank_of_differences(kernel) for kernel in (K_0, K)),
            *(nan if y is None else linear_cka(kernel, y) for kernel in (K_0, K)),
            (movements[name].trace() / K_0.trace()).sqrt() if moved else nan,
        ]
    values = iter(torch.stack(rows).tolist() if rows else [])
    layers = {}
    for name in now.K:
        change, distance, debiased, rank_0, rank, alignment_0, alignment, motion = (next(values) for _ in range(8))
        layers[name] = LayerChange(change, distance, debiased, (rank_0, rank), (alignment_0, alignment), motion)
    return RepresentationChange(layers, _validity(now, layers))


def block_drift(blocks: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute ||H - H_0|| / ||H_0|| of the layers' parts of the NTK; waits for the device once.

    Raises ``ValueError`` if the layers are not the same, or their parts have other shapes.

    Args:
        blocks: ``{layer: H}``, as ``ntk(..., per="layer")`` gives them.
        reference: ``{layer: H_0}``.

    Returns:
        ``{layer: relative change}``: 0 where a part was and is zero, infinite where it only was.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> measure.block_drift({"first": 2 * torch.eye(2)}, {"first": torch.eye(2)})
        {'first': 1.0}
    """
    _check_same(blocks, reference)
    values = []
    for name, H in blocks.items():
        H_0 = reference[name].to(H)
        values.append(torch.where((H == H_0).all(), 0.0, relative_change(H, H_0)))
    return dict(zip(blocks, torch.stack(values).tolist() if values else [], strict=True))


def _rank_of_differences(K: Tensor) -> Tensor:
    return torch.where(is_constant(K), math.nan, effective_rank(centered(K)))


def _check_same(now: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
    odd = sorted(set(now) ^ set(reference))
    if odd:
        raise ValueError(f"reference: the layer {odd[0]!r} is in one of the two only; measure the same layers")
    for name, value in now.items():
        if value.shape != reference[name].shape:
            raise ValueError(
                f"reference: the layer {name!r} has shape {tuple(value.shape)} now, {tuple(reference[name].shape)} in "
                "the reference; measure the same probe"
            )


def _validity(now: Representation, layers: Mapping[str, LayerChange]) -> Validity:
    samples = len(next(iter(now.K.values()))) if now.K else 0
    reasons = []
    wide = [name for name in layers if now.widths[name] >= samples]
    if wide:
        reasons.append(
            f"CKA: {samples} samples, fewer than the features of {len(wide)} of {len(layers)} layers: biased towards 1 "
            + ("(its distance towards 0); see the debiased one" if samples > 3 else "; debiasing it takes four samples")
        )
    if any(math.isfinite(change.movement) for change in layers.values()):
        reasons.append(
            "|ds|/|s| is the movement of single neurons, of order 1/sqrt(n) at large width n; in kernels, of order "
            "1/n, most of it cancels"
        )
    undefined = [name for name, change in layers.items() if math.isnan(change.cka_distance)]
    if undefined:
        reasons.append("nan: one sample only, or a representation that is the same for all samples, to rounding")
    numbers = {"samples": float(samples), "biased_layers": float(len(wide)), "undefined_layers": float(len(undefined))}
    return Validity("caution" if wide or undefined else "valid", reasons, numbers)


def _short(value: float) -> str:
    return f"{value:.3g}"
