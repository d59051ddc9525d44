"""How far hidden representations have moved."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.measure.kernels.metrics import relative_change
from torch_eft.measure.representations.alignment import centered, effective_rank, is_constant, linear_cka
from torch_eft.measure.representations.hidden_kernels import Representation


def movement(now: Representation, reference: Representation) -> dict[str, Tensor]:
    """``{layer: (1 / n) sum_j ds_{j;a} ds_{j;b}}``, (N, N): how far single neurons have moved.

    At order 1/n the theory predicts this beside the change of K: the movement of a neuron is of order 1/sqrt(n),
    and most of it cancels in the kernel, which changes by order 1/n.

    Raises:
        ValueError: If activations were not kept, or layers are not the same.
    """
    if now.activations is None or reference.activations is None:
        raise ValueError("movement: needs the activations; call representation(..., keep=True), then and now")
    _check_same(now.activations, reference.activations)
    found = {}
    for name, value in now.activations.items():
        change = value - reference.activations[name].to(value)
        found[name] = change @ change.T / change.shape[1]
    return found


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
    """

    relative_change: float
    cka_distance: float
    debiased_cka_distance: float
    effective_rank: tuple[float, float]
    alignment: tuple[float, float]
    movement: float


@dataclass(frozen=True)
class RepresentationChange:
    """The change of the hidden layers; ``str`` gives a table.

    Args:
        layers: ``{layer: its change}``.
        validity: What the numbers do not say, in words.
    """

    layers: dict[str, LayerChange]
    validity: tuple[str, ...]

    def __str__(self) -> str:
        heads = ["layer", "|dK|/|K|", "1-CKA", "debiased", "rank", "alignment", "|ds|/|s|"]
        rows = [heads]
        for name, change in self.layers.items():
            numbers = (change.relative_change, change.cka_distance, change.debiased_cka_distance)
            pairs = (" -> ".join(_short(value) for value in pair) for pair in (change.effective_rank, change.alignment))
            rows.append([name, *(_short(value) for value in numbers), *pairs, _short(change.movement)])
        sizes = [max(len(row[column]) for row in rows) for column in range(len(heads))]
        table = ["  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip() for row in rows]
        return "\n".join([*table, *self.validity])


def representation_change(now: Representation, reference: Representation) -> RepresentationChange:
    """The change of every hidden layer since ``reference``; waits for the device once.

    The targets are those of ``now``, or else of ``reference``.

    Raises:
        ValueError: If the layers or the numbers of samples are not the same.
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
        change, distance, debiased, rank_0, rank, alignment_0, alignment, moving = (next(values) for _ in range(8))
        layers[name] = LayerChange(change, distance, debiased, (rank_0, rank), (alignment_0, alignment), moving)
    return RepresentationChange(layers, _validity(now, layers))


def block_drift(blocks: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    """``{layer: ||H - H_0|| / ||H_0||}`` of the layers' parts of the NTK, as ``ntk(..., per="layer")`` gives them.

    0 where a part was and is zero, infinite where it only was. Waits for the device once.

    Raises:
        ValueError: If the layers are not the same, or their parts have other shapes.
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


def _validity(now: Representation, layers: Mapping[str, LayerChange]) -> tuple[str, ...]:
    samples = len(next(iter(now.K.values()))) if now.K else 0
    words = []
    wide = [name for name in layers if now.widths[name] >= samples]
    if wide:
        words.append(
            f"CKA: {samples} samples, fewer than the features of {len(wide)} of {len(layers)} layers: biased towards 1 "
            + ("(its distance towards 0); see the debiased one" if samples > 3 else "; debiasing it takes four samples")
        )
    if any(math.isfinite(change.movement) for change in layers.values()):
        words.append(
            "|ds|/|s| is the movement of single neurons, of order 1/sqrt(n) at large width n; in kernels, of order "
            "1/n, most of it cancels"
        )
    if any(math.isnan(change.cka_distance) for change in layers.values()):
        words.append("nan: one sample only, or a representation that is the same for all samples, to rounding")
    return tuple(words)


def _short(value: float) -> str:
    return f"{value:.3g}"
