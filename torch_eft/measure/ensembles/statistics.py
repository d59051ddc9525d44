"""Estimates of kernels and vertices from sums over drawn networks, and their standard errors.

The estimators are those of ``seeds``, each unbiased. Only sums over networks are kept of what is averaged, so that the
jackknife leaves out a block of networks by subtracting its sums.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.measure.kernels.reverse_mode import Differentials
from torch_eft.results.presentation.repr import short_repr
from torch_eft.theory.initialization.statistics import LayerStatistics

TOTALS = {
    "V": "3V",
    **dict.fromkeys("AB", "A+2B"),
    **dict.fromkeys("DF", "D+2F"),
    **dict.fromkeys("PQ", "P+2Q"),
    "R": "3R",
    **dict.fromkeys("STU", "S+T+U"),
}
"""With one output: the sum that replaces each vertex, over its index structures with labels in the order 1, 2, 3, 4."""

_SUMMANDS = {
    "3V": (("V", "abcd"), ("V", "acbd"), ("V", "adbc")),
    "A+2B": (("A", "abcd"), ("B", "acbd"), ("B", "adbc")),
    "D+2F": (("D", "abcd"), ("F", "acbd"), ("F", "adbc")),
    "P+2Q": (("P", "abcd"), ("Q", "abcd"), ("Q", "acbd")),
    "3R": (("R", "abcd"), ("R", "acdb"), ("R", "adbc")),
    "S+T+U": (("S", "abcd"), ("T", "acbd"), ("U", "adbc")),
}


@dataclass(frozen=True, repr=False)
class TheoryAgreement:
    """One statistic, measured and predicted.

    Args:
        measured: The estimate.
        error: Its standard error, entry by entry.
        predicted: The theory's value.
        ratio: <measured, predicted> / <predicted, predicted>, the projection on the prediction; NaN where that is 0.
        ratio_error: Its standard error.

    Example:
        >>> import torch
        >>> from torch_eft.measure import TheoryAgreement
        >>> one = torch.ones(2, 2)
        >>> TheoryAgreement(measured=1.1 * one, error=0.1 * one, predicted=one, ratio=1.1, ratio_error=0.1)
        TheoryAgreement(
          measured: (2, 2) float32
          error: (2, 2) float32
          predicted: (2, 2) float32
          ratio: 1.1
          ratio_error: 0.1
        )
    """

    measured: Tensor
    error: Tensor
    predicted: Tensor
    ratio: float
    ratio_error: float

    def __repr__(self) -> str:
        return short_repr(self)


def sums_of(measured: Differentials, statistics: Collection[str]) -> dict[str, Tensor]:
    """Sums over networks of everything that is averaged; pairs of outputs are averaged already."""
    z, H, dH, ddI, ddII = measured.z, measured.H, measured.dH, measured.ddI, measured.ddII
    C = z.shape[2]
    pairs = z.new_ones(1, 1) if C == 1 else (1 - torch.eye(C, dtype=z.dtype, device=z.device)) / (C * (C - 1))
    zz = torch.einsum("sai,sbi->siab", z, z)
    wanted = {name if C > 1 else TOTALS.get(name, name) for name in statistics}
    sums = {"zz": zz.sum(0)}

    def add(name: str, pattern: str, *factors: Tensor | None) -> None:
        if name in wanted:
            sums[name] = torch.einsum(pattern, *[factor for factor in factors if factor is not None], pairs)

    for name in ("V", "3V"):
        add(name, "siab,sjcd,ij->abcd", zz, zz)
    if H is not None:
        h = torch.einsum("sabii->siab", H)
        sums["h"] = h.sum(0)
        for name in ("A", "A+2B"):
            add(name, "siab,sjcd,ij->abcd", h, h)
        for name in ("D", "D+2F"):
            add(name, "siab,sjcd,ij->abcd", zz, h)
    add("B", "sabij,scdij,ij->acbd", H, H)
    add("F", "sai,sbj,scdij,ij->acbd", z, z, H)
    add("P", "sabcijj,sdi,ij->abcd", dH, z)
    for name in ("Q", "P+2Q"):
        add(name, "sabciij,sdj,ij->abcd", dH, z)
    for name in ("R", "3R"):
        add(name, "sabcdiijj,ij->abcd", ddI)
    for name in ("S", "S+T+U"):
        add(name, "sabcdiijj,ij->abcd", ddII)
    add("T", "sabcdijij,ij->acbd", ddII)
    add("U", "sabcdijji,ij->adbc", ddII)
    # K and Theta that are not asked for are needed all the same: covariances subtract their products.
    return sums | {name: sums[source].mean(0) for name, source in (("K", "zz"), ("Theta", "h")) if name in wanted}


def added(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of several sums, name by name."""
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def estimates(sums: dict[str, Tensor], count: int, width: float) -> dict[str, Tensor]:
    """Unbiased estimates from sums over ``count`` networks."""
    means = {name: value / count for name, value in sums.items()}
    zz, h = means.pop("zz"), means.pop("h", None)
    pairs = zz.new_ones(1, 1)
    if len(zz) > 1:
        pairs = (1 - torch.eye(len(zz), dtype=zz.dtype, device=zz.device)) / (len(zz) * (len(zz) - 1))
    factors = {"V": (zz, zz), "3V": (zz, zz), "A": (h, h), "A+2B": (h, h), "D": (zz, h), "D+2F": (zz, h)}
    values = {}
    for name, mean in means.items():
        if name in ("K", "Theta"):
            values[name] = mean
            continue
        value = mean
        if name in factors:
            first, second = factors[name]
            value = count / (count - 1) * (mean - torch.einsum("iab,jcd,ij->abcd", first, second, pairs))
        if name == "3V":  # the other two Gaussian pairings, each an unbiased estimate of K K
            for pairing in ("ac,bd->abcd", "ad,bc->abcd"):
                value = value - (count * torch.einsum(pairing, zz[0], zz[0]) - mean) / (count - 1)
        values[name] = width * value
    return values


def jackknife(replicas: Tensor) -> Tensor:
    """The standard error, from estimates that leave out one block each."""
    return ((len(replicas) - 1) * replicas.var(0, unbiased=False)).sqrt()


def predicted_by(theory: LayerStatistics, name: str) -> Tensor | None:
    """The theory's value of the statistic that is called ``name`` here; None if it lacks a part."""
    if name not in _SUMMANDS:
        return getattr(theory, name)
    parts = [(getattr(theory, vertex), axes) for vertex, axes in _SUMMANDS[name]]
    if any(value is None for value, _ in parts):
        return None
    return torch.stack([torch.einsum(f"{axes}->abcd", value) for value, axes in parts]).sum(0)


def agreement(measured: Tensor, replicas: Tensor, predicted: Tensor) -> TheoryAgreement:
    """An estimate and its prediction; ``replicas`` are the estimates that leave out one block each."""
    predicted = predicted.to(measured)
    norm = predicted.square().sum()
    axes = tuple(range(1, replicas.ndim))
    ratios = (replicas * predicted).sum(axes) / norm
    ratio = float((measured * predicted).sum() / norm)
    return TheoryAgreement(measured, jackknife(replicas), predicted, ratio, float(jackknife(ratios)))
