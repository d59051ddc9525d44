"""Hidden representations of one network on the probe, and how far they have moved.

The kernel of a hidden layer is ``(1 / n) sum_j s_{j;a} s_{j;b}`` over its n features s (PDLT 4.1, there
with the activations as features; preactivations if their layers are named).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_eft.measure.isolation import IsolatedModel, isolated
from torch_eft.measure.metrics import relative_change
from torch_eft.measure.output import checked_output
from torch_eft.measure.probe import OutputFn, Probe, as_probe
from torch_eft.measure.refusals import all_finite

_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.rnn.RNNBase, nn.MultiheadAttention)


@dataclass(frozen=True)
class Representation:
    """The hidden layers of one network on N samples.

    Args:
        K: ``{layer: (N, N)}``, the kernels, in the order of execution.
        widths: ``{layer: n}``, the numbers of features (channels times places).
        target_kernel: y y^T of the targets, (N, N), or None if none were given.
        activations: ``{layer: (N, n)}`` if they were to be kept, else empty.
    """

    K: dict[str, Tensor]
    widths: dict[str, int]
    target_kernel: Tensor | None = None
    activations: dict[str, Tensor] | None = None


def representation(
    model: nn.Module,
    x: Any,
    targets: Tensor | None = None,
    layers: Sequence[str] | None = None,
    output_fn: OutputFn | None = None,
    keep: bool = False,
) -> Representation:
    """The hidden layers of ``model`` on ``x``, in evaluation mode.

    Args:
        model: Any module.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        targets: (N, C) or (N,), or class numbers (N,), taken as one-hot.
        layers: Names of submodules whose outputs are the features; None picks them as ``hidden_kernels`` does.
        output_fn: Turns what the model returns into (N, C).
        keep: Keep the activations, which ``movement`` needs: N n numbers a layer.

    Raises:
        ValueError: If a name is no submodule, the forward rejects ``x``, a kernel is not finite, or the targets are
            not N.
    """
    probe = as_probe(x)
    kernels: dict[str, Tensor] = {}
    widths: dict[str, int] = {}
    kept: dict[str, Tensor] = {}
    with isolated(model, output_fn) as network:
        for name, features in _features(network, probe, layers, keep).items():
            kernels[name], widths[name] = features.kernel, features.width
            if features.values is not None:
                kept[name] = features.values
    if not all_finite(*kernels.values()):
        wrong = next(name for name, K in kernels.items() if not all_finite(K))
        first = int((~kernels[wrong].diagonal().isfinite()).nonzero()[0])
        raise ValueError(
            f"model: the activations of layer {wrong!r} on sample {first} of the probe are NaN or infinite, or their "
            "squares are; look at that input and the parameters, or measure in float64"
        )
    return Representation(kernels, widths, _target_kernel(targets, probe.size), kept if keep else None)


def hidden_kernels(
    model: nn.Module, x: Any, layers: Sequence[str] | None = None, output_fn: OutputFn | None = None
) -> dict[str, Tensor]:
    """The kernels of hidden layers on ``x``, in evaluation mode.

    Args:
        model: Any module.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        layers: Names of submodules whose outputs are the features. None picks the activation modules
            (``nn.Tanh``, ``nn.ReLU`` ...), or, where there is none, every layer with weights but the last.
        output_fn: Turns what the model returns into (N, C).

    Returns:
        ``{name: (N, N)}`` in the order of execution; a module called several times appears as
        ``name``, ``name:2``, ... Layers whose output is not a tensor with N rows are left out.

    Raises:
        ValueError: If a name is no submodule, or the forward rejects ``x``.
    """
    with isolated(model, output_fn) as network:
        return isolated_hidden_kernels(network, as_probe(x), layers)


def isolated_hidden_kernels(
    network: IsolatedModel, probe: Probe, layers: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """As ``hidden_kernels``, for a network that is already isolated."""
    return {name: features.kernel for name, features in _features(network, probe, layers).items()}


@dataclass(frozen=True)
class _Features:
    kernel: Tensor
    width: int
    values: Tensor | None


def _features(
    network: IsolatedModel, probe: Probe, layers: Sequence[str] | None, keep: bool = False
) -> dict[str, _Features]:
    modules = dict(network.shadow.named_modules())
    if layers is not None:
        unknown = [name for name in layers if name not in modules]
        if unknown:
            raise ValueError(f"layers: {unknown[0]!r} is no submodule; there are {', '.join(n for n in modules if n)}")
        watched = list(layers)
    else:
        watched = [name for name, module in modules.items() if _is_activation(module)]
    weighted = layers is None and not watched
    if weighted:
        watched = [name for name, module in modules.items() if isinstance(module, _WEIGHTED)]
    found: dict[str, _Features] = {}
    calls: dict[str, int] = {}

    def record(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, Tensor) and value.ndim >= 2 and len(value) == probe.size and value.is_floating_point():
            calls[name] = calls.get(name, 0) + 1
            features = value.detach().flatten(1)
            key = name if calls[name] == 1 else f"{name}:{calls[name]}"
            # A clone: a later operation may change the output in place.
            values = features.clone() if keep else None
            found[key] = _Features(features @ features.T / features.shape[1], features.shape[1], values)

    handles = [
        modules[name].register_forward_hook(lambda module, args, value, name=name: record(name, value))
        for name in watched
    ]
    try:
        with torch.no_grad():
            checked_output(network, probe)
    finally:
        for handle in handles:
            handle.remove()
    if weighted and len(found) > 1:
        found.popitem()  # the last one is the output
    return found


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, nn.MultiheadAttention)


def linear_cka(K: Tensor, reference: Tensor, debiased: bool = False) -> Tensor:
    """Linear centred kernel alignment of two kernels (Kornblith et al. 2019), in [0, 1]; a 0-d tensor.

    <K_c, L_c> / (||K_c|| ||L_c||) with K_c = C K C, C = 1 - (1/N) 1 1^T. NaN for one sample, or for a
    representation that is the same for all samples, to rounding.

    With fewer samples than features it is biased towards 1: even independent representations are alike. ``debiased``
    puts U-statistics, HSIC_1 of Song et al. 2012 (eq. 4), in place of the three products, as Nguyen et al. 2021 do:
    0 in the mean for independent representations, at most 1, NaN below four samples.
    """
    first, second = centred(K), centred(reference)
    if debiased:
        first, second = _u_centred(K), _u_centred(reference)
    value = (first * second).sum() / (first.norm() * second.norm())
    return torch.where(_is_constant(K) | _is_constant(reference), math.nan, value)


def centred(K: Tensor) -> Tensor:
    """C K C with C = 1 - (1/N) 1 1^T: the kernel of the features less their means over the samples, (N, N)."""
    return K - K.mean(0, keepdim=True) - K.mean(1, keepdim=True) + K.mean()


def _u_centred(K: Tensor) -> Tensor:
    """(N, N), whose scalar products are N (N - 3) HSIC_1 (Szekely and Rizzo 2014, section 3); NaN for N < 4."""
    count = len(K)
    if count < 4:
        return torch.full_like(K, math.nan)
    K = K - torch.diag(K.diagonal())
    rows = K.sum(0, keepdim=True) / (count - 2)
    K = K - rows - rows.T + K.sum() / ((count - 1) * (count - 2))
    return K - torch.diag(K.diagonal())


def _is_constant(K: Tensor) -> Tensor:
    """Whether what is left after centring is rounding; a 0-d tensor."""
    return centred(K).norm() <= 32 * torch.finfo(K.dtype).eps * K.norm()


def effective_rank(K: Tensor, entropy: bool = False) -> Tensor:
    """How many directions a kernel has, from 1 to N; a 0-d tensor, NaN for K = 0.

    With p its eigenvalues divided by their sum, the participation ratio 1 / sum p^2 = (tr K)^2 / tr K^2 (Gao and
    Ganguli 2015), which needs no eigenvalues, or exp(- sum p log p) (Roy and Vetterli 2007), which small ones weigh
    more in. Both are n for n equal eigenvalues.

    Args:
        K: (N, N), symmetric, positive semidefinite; ``centred(K)`` leaves out the mean over the samples, which
            dominates the kernels of positive activations.
        entropy: Take the second.
    """
    if not entropy:
        return K.trace().square() / K.square().sum()
    p = torch.linalg.eigvalsh(K).clamp_min(0)
    return torch.special.entr(p / p.sum()).sum().exp()


def target_alignment(K: Tensor, targets: Tensor) -> Tensor:
    """Centred alignment of a kernel with y y^T (Cristianini et al. 2001; centred: Cortes et al. 2012); a 0-d tensor.

    NaN for one sample, targets that are all equal, or a representation that is the same for all samples.

    Args:
        K: (N, N).
        targets: y, (N, C) or (N,), or class numbers (N,), taken as one-hot.
    """
    kernel = _target_kernel(targets, len(K))
    assert kernel is not None
    return linear_cka(K, kernel.to(K))


def _target_kernel(targets: Tensor | None, samples: int) -> Tensor | None:
    if targets is None:
        return None
    if targets.ndim not in (1, 2) or len(targets) != samples:
        raise ValueError(
            f"targets: {tuple(targets.shape)} given for {samples} samples; give ({samples}, C), or ({samples},)"
        )
    if targets.ndim == 1 and not targets.is_floating_point():
        # Scalar products of one-hot vectors, whatever the number of classes.
        return (targets[:, None] == targets).to(torch.get_default_dtype())
    y = targets.reshape(samples, -1)
    y = y if y.is_floating_point() else y.to(torch.get_default_dtype())
    return y @ y.T


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
        effective_rank: Before and after, the participation ratio of the centred kernel, from 1 to N - 1.
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
    return torch.where(_is_constant(K), math.nan, effective_rank(centred(K)))


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
