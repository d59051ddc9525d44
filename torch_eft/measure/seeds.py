"""The statistics over initialisations, measured: one architecture drawn many times, with standard errors.

What ``theory.initial_statistics`` predicts to order 1/n is here estimated from drawn networks, whatever their
architecture: the kernels K, Theta and the vertices V, A, B, D, F (PDLT 4, 8), P, Q (PDLT 11) and R, S, T, U (chapter
infinity), each times the width that divides it in the theory.

With C >= 2 outputs the index structures are told apart by output patterns, i != j:

    V_(12)(34) / n = Cov(z_{i;1} z_{i;2}, z_{j;3} z_{j;4})      A_(12)(34) / n = Cov(H_{ii;12}, H_{jj;34})
    D_1234 / n     = Cov(z_{i;1} z_{i;2}, H_{jj;34})            B_1324 / n     = E[H_{ij;12} H_{ij;34}]
    F_1324 / n     = E[z_{i;1} z_{j;2} H_{ij;34}]               P_0123 / n     = E[dH_{ijj;012} z_{i;3}]
    Q_0123 / n     = E[dH_{iij;012} z_{j;3}]                    R_0123 / n     = E[ddI_{iijj;0123}]
    S_1234 / n     = E[ddII_{iijj;1234}]                        T_1324 / n     = E[ddII_{ijij;1234}]
    U_1423 / n     = E[ddII_{ijji;1234}]

averaged over all pairs of outputs. This takes outputs that are exchangeable and whose signs may be flipped one by one,
as those of a last linear layer with independent weights are. With one output only sums over the structures exist.
"""

import copy
import math
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.func import vmap

from torch_eft.measure.differentials import Differentials, differentials
from torch_eft.measure.engine import checked_lambdas
from torch_eft.measure.initialization import read_ensemble
from torch_eft.measure.isolation import IsolatedModel, isolated
from torch_eft.measure.output import checked_output
from torch_eft.measure.probe import OutputFn, Probe, as_probe
from torch_eft.theory.statistics import LayerStatistics

MEASURABLE = ("K", "V", "Theta", "A", "B", "D", "F", "P", "Q", "R", "S", "T", "U")
"""What ``seed_ensemble`` measures; G1 and Theta1 come out beside a theory, as what K and Theta differ by."""

TOTALS = {
    "V": "3V",
    **dict.fromkeys("AB", "A+2B"),
    **dict.fromkeys("DF", "D+2F"),
    **dict.fromkeys("PQ", "P+2Q"),
    "R": "3R",
    **dict.fromkeys("STU", "S+T+U"),
}
"""For one output: what stands for each vertex, summed over its index structures with labels in the order 1, 2, 3, 4."""

DEFAULT_MEMORY = 2**28
"""Bytes for the networks that are differentiated at once; more is no faster once caches overflow."""

_BLOCKS = 32
_NEEDS = {"H": "Theta A B D F", "dH": "P Q", "ddI": "R", "ddII": "S T U"}
_SUMMANDS = {
    "3V": (("V", "abcd"), ("V", "acbd"), ("V", "adbc")),
    "A+2B": (("A", "abcd"), ("B", "acbd"), ("B", "adbc")),
    "D+2F": (("D", "abcd"), ("F", "acbd"), ("F", "adbc")),
    "P+2Q": (("P", "abcd"), ("Q", "abcd"), ("Q", "acbd")),
    "3R": (("R", "abcd"), ("R", "acdb"), ("R", "adbc")),
    "S+T+U": (("S", "abcd"), ("T", "acbd"), ("U", "adbc")),
}


@dataclass(frozen=True)
class Comparison:
    """A measured statistic beside the predicted one.

    Args:
        measured: The estimate.
        error: Its standard error, entry by entry.
        predicted: The theory's value.
        ratio: <measured, predicted> / <predicted, predicted>, the projection on the prediction; NaN where that is 0.
        ratio_error: Its standard error.
    """

    measured: Tensor
    error: Tensor
    predicted: Tensor
    ratio: float
    ratio_error: float


@dataclass(frozen=True)
class SeedEnsemble:
    """Statistics measured over initialisations.

    Args:
        mean: ``{name: estimate}``, float64: K and Theta (N, N) with their 1/n corrections in them; the others
            (N, N, N, N), times ``width``, axes as ``theory.LayerStatistics`` has them (B, F, T: 1, 3, 2, 4; U: 1, 4,
            2, 3; the others in order). For one output the names are the values of ``TOTALS``, axes in order.
        error: Standard errors by the jackknife over blocks of networks.
        replicas: ``{name: (blocks, ...)}``, the estimates without one block each.
        seeds: Number of networks.
        outputs: C.
        width: What multiplies the vertices.
        width_source: Where ``width`` comes from, in words.
    """

    mean: dict[str, Tensor]
    error: dict[str, Tensor]
    replicas: dict[str, Tensor]
    seeds: int
    outputs: int
    width: float
    width_source: str

    def beside(self, theory: LayerStatistics) -> dict[str, Comparison]:
        """Every measured statistic that the theory has too; G1 and Theta1 from K and Theta.

        Args:
            theory: The last layer's, of the same inputs, from ``theory.initial_statistics``.

        Raises:
            ValueError: If the theory is one of other inputs.
        """
        measured = len(next(iter(self.mean.values())))
        if len(theory.K) != measured:
            raise ValueError(
                f"theory: it is one of {len(theory.K)} inputs, {measured} were measured; predict for the same inputs"
            )
        found = {}
        for name, replicas in self.replicas.items():
            predicted = _predicted(theory, name)
            if predicted is not None:
                found[name] = _compared(self.mean[name], replicas, predicted)
        for name, correction in (("K", theory.G1), ("Theta", theory.Theta1)):
            if name in found and correction is not None:
                leading = found[name].predicted
                found["G1" if name == "K" else "Theta1"] = _compared(
                    self.width * (self.mean[name] - leading.to(self.mean[name])),
                    self.width * (self.replicas[name] - leading.to(self.mean[name])),
                    correction,
                )
        return found


def seed_ensemble(
    model: nn.Module,
    x: Any,
    seeds: int,
    quantities: Collection[str] = ("K", "V", "Theta", "A", "B", "D", "F"),
    lambdas: Mapping[str, float] | float | None = None,
    initialize: Callable[[nn.Module], Any] | None = None,
    width: float | None = None,
    output_fn: OutputFn | None = None,
    seed: int = 0,
    memory: int = DEFAULT_MEMORY,
) -> SeedEnsemble:
    """Measure the statistics of ``model`` over ``seeds`` initialisations, in evaluation mode.

    The model and the global random state are left alone. With M = N C, a network takes M backward passes for the NTK
    sector, M^2 for P, Q, S, T, U and about M^3 / 4 for R: choose few inputs, and few outputs by ``output_fn``.

    Args:
        model: Any module whose parameters can be drawn anew.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        seeds: Number of networks, at least 3.
        quantities: Names out of ``MEASURABLE``.
        lambdas: The learning-rate tensor, as ``ntk`` takes it: one number, ``{parameter name: lambda}``, or None for 1.
        initialize: Draws the parameters of the module it is given, in place, from the global random state; None calls
            ``reset_parameters`` of every submodule.
        width: n_{L-1}, which multiplies the vertices; None reads it off an MLP, and is 1 for anything else.
        output_fn: Turns what the model returns into (N, C).
        seed: Seed of the first network; the others follow.
        memory: Bytes allowed for the networks that are differentiated at once.

    Returns:
        Estimates with standard errors.

    Raises:
        ValueError: If an argument is out of range, a parameter is not drawn anew, the forward rejects ``x``, or the
            network has no derivatives of the order asked for.
    """
    _check(seeds, quantities, width, memory)
    probe = as_probe(x)
    needed = [name for name, users in _NEEDS.items() if set(users.split()) & set(quantities)]
    with isolated(model, output_fn) as network:
        draw = _Draw(network, initialize, seed)
        outputs = checked_output(replace(network, params=draw.first, constants={}), probe)
        if width is None:
            width, source = _width_of(draw.module, probe, output_fn)
        else:
            source = "given"
        scales = checked_lambdas(network, lambdas) if needed else {}
        measure = _Measurement(network, probe, scales, needed)
        at_once = measure.networks_at_once(draw.first, outputs, memory)
        sums = []
        blocks = min(seeds, _BLOCKS)
        for index in range(blocks):
            size = (index + 1) * seeds // blocks - index * seeds // blocks
            parts = []
            for done in range(0, size, at_once):
                parts.append(_sums(measure(draw(min(at_once, size - done))), quantities))
            sums.append((size, _added(parts)))
    total = _added([part for _, part in sums])
    mean = _estimates(total, seeds, width)
    without = [
        _estimates({name: total[name] - part[name] for name in total}, seeds - count, width) for count, part in sums
    ]
    replicas = {name: torch.stack([found[name] for found in without]) for name in mean}
    if not all(bool(value.isfinite().all()) for value in mean.values()):
        raise ValueError("initialize: some networks' outputs or derivatives are not finite; draw smaller parameters")
    return SeedEnsemble(
        mean,
        {name: _jackknife(value) for name, value in replicas.items()},
        replicas,
        seeds,
        outputs.shape[1],
        width,
        source,
    )


def _check(seeds: int, quantities: Collection[str], width: float | None, memory: int) -> None:
    if isinstance(quantities, str) or not quantities:
        raise ValueError(f"quantities: {quantities!r} given; give a sequence of names out of {', '.join(MEASURABLE)}")
    unknown = sorted(set(quantities) - set(MEASURABLE))
    if unknown:
        hint = {"G1": "K", "Theta1": "Theta"}.get(unknown[0])
        advice = f"choose from {', '.join(MEASURABLE)}"
        if hint:
            advice = f"ask for {hint}, and beside(theory) gives {unknown[0]}"
        raise ValueError(f"quantities: {unknown[0]!r} cannot be measured by itself; {advice}")
    if seeds < 3:
        raise ValueError(f"seeds: {seeds} given; standard errors of covariances need at least 3 networks")
    if width is not None and not (math.isfinite(width) and width > 0):
        raise ValueError(f"width: {width:g} given; give the positive number of neurons that feed the last layer")
    if memory < 1:
        raise ValueError(f"memory: {memory} given; give a positive number of bytes")


class _Draw:
    """Networks drawn one after another, stacked: ``{name of parameter or buffer: (count, ...)}``."""

    def __init__(self, network: IsolatedModel, initialize: Callable[[nn.Module], Any] | None, seed: int) -> None:
        self.module = copy.deepcopy(network.shadow)
        self.initialize = initialize or _reset
        self.dtypes = {name: value.dtype for name, value in {**network.params, **network.constants}.items()}
        devices = {value.device for value in self.module.parameters() if value.device.type == "cuda"}
        if initialize is None:
            with torch.no_grad():
                for parameter in self.module.parameters():
                    parameter.fill_(math.nan)
        self.first = self._one(devices, seed)
        for name, parameter in self.module.named_parameters() if initialize is None else ():
            if bool(parameter.isnan().any()):
                owner = type(self.module.get_submodule(name.rpartition(".")[0])).__name__
                raise ValueError(
                    f"initialize: the parameter {name!r} of {owner} is drawn by no reset_parameters; "
                    "pass a function initialize(module) that draws every parameter in place"
                )
        _seed_everything(devices, seed)

    def _one(self, devices: set[torch.device], seed: int) -> dict[str, Tensor]:
        _seed_everything(devices, seed)
        return {name: value[0] for name, value in self(1).items()}

    def __call__(self, count: int) -> dict[str, Tensor]:
        stacked: dict[str, Tensor] = {}
        for index in range(count):
            with torch.no_grad():
                self.initialize(self.module)
            for name, value in [*self.module.named_parameters(), *self.module.named_buffers()]:
                if name not in stacked:
                    stacked[name] = value.new_empty(count, *value.shape, dtype=self.dtypes[name], requires_grad=False)
                stacked[name][index] = value.detach()
        return stacked


def _reset(module: nn.Module) -> None:
    for part in reversed(list(module.modules())):  # a parent's own initialisation has the last word
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if callable(reset):
            reset()


def _seed_everything(devices: set[torch.device], seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


class _Measurement:
    """The output and what is needed of H, dH, ddI, ddII, for a stack of networks."""

    def __init__(self, network: IsolatedModel, probe: Probe, lambdas: dict[str, float], needed: list[str]) -> None:
        self.network = replace(network, constants={})
        self.model = type(network.shadow).__name__
        self.inputs = network.place(probe)
        self.lambdas, self.needed = lambdas, needed
        self.batched = True

    def networks_at_once(self, one: dict[str, Tensor], outputs: Tensor, memory: int) -> int:
        """How many fit into ``memory``, by what the forward of one network saves; 1 where ``vmap`` has no rule."""
        saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel() * tensor.element_size()
            return tensor

        leaves = {name: value[None].clone() for name, value in one.items()}
        for name in self.lambdas:
            leaves[name].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            try:
                self._forward(leaves)
            except (RuntimeError, NotImplementedError):
                self.batched = False
                return 1
        parameters = sum(value.numel() * value.element_size() for value in one.values())
        columns = outputs.numel()
        graph = 2 * (saved + parameters)
        needed = graph + columns * parameters * bool(self.needed)
        if set(self.needed) & {"dH", "ddI", "ddII"}:
            needed += 3 * graph + columns * columns * parameters
        if "ddI" in self.needed:
            needed += 4 * columns * graph
        return max(1, memory // needed)

    def _forward(self, stacked: dict[str, Tensor]) -> Tensor:
        if self.batched:
            return vmap(lambda params: self.network(params, self.inputs))(stacked)
        return self.network({name: value[0] for name, value in stacked.items()}, self.inputs)[None]

    def __call__(self, stacked: dict[str, Tensor]) -> Differentials:
        try:
            found = differentials(self._forward, stacked, self.lambdas, self.needed)
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"quantities: {self.model} has no derivatives of the order that {', '.join(self.needed)} need: "
                f"{str(error).strip().splitlines()[0]}; ask for fewer quantities"
            ) from error
        values = {name: getattr(found, name) for name in ("z", *self.needed)}
        return Differentials(**{name: value.double() for name, value in values.items()})


def _width_of(module: nn.Module, probe: Probe, output_fn: OutputFn | None) -> tuple[float, str]:
    try:
        widths = read_ensemble(module, x=probe, output_fn=output_fn).ensemble.widths
    except ValueError as error:
        return 1.0, f"1, as there is no last hidden width to read off ({error})"
    return float(widths[-2]), "the fan-in of the MLP's last layer"


def _sums(found: Differentials, quantities: Collection[str]) -> dict[str, Tensor]:
    """Sums over networks of everything that is averaged; pairs of outputs are averaged already."""
    z, H, dH, ddI, ddII = found.z, found.H, found.dH, found.ddI, found.ddII
    C = z.shape[2]
    pairs = z.new_ones(1, 1) if C == 1 else (1 - torch.eye(C, dtype=z.dtype, device=z.device)) / (C * (C - 1))
    zz = torch.einsum("sai,sbi->siab", z, z)
    wanted = {name if C > 1 else TOTALS.get(name, name) for name in quantities}
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
    # What is not asked for by name serves the means of the covariances only.
    return sums | {name: sums[source].mean(0) for name, source in (("K", "zz"), ("Theta", "h")) if name in wanted}


def _added(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def _estimates(sums: dict[str, Tensor], count: int, width: float) -> dict[str, Tensor]:
    """Unbiased estimates out of sums over ``count`` networks."""
    means = {name: value / count for name, value in sums.items()}
    zz, h = means.pop("zz"), means.pop("h", None)
    pairs = zz.new_ones(1, 1)
    if len(zz) > 1:
        pairs = (1 - torch.eye(len(zz), dtype=zz.dtype, device=zz.device)) / (len(zz) * (len(zz) - 1))
    factors = {"V": (zz, zz), "3V": (zz, zz), "A": (h, h), "A+2B": (h, h), "D": (zz, h), "D+2F": (zz, h)}
    found = {}
    for name, mean in means.items():
        if name in ("K", "Theta"):
            found[name] = mean
            continue
        value = mean
        if name in factors:
            first, second = factors[name]
            value = count / (count - 1) * (mean - torch.einsum("iab,jcd,ij->abcd", first, second, pairs))
        if name == "3V":  # the other two Gaussian pairings, each an unbiased estimate of K K
            for pairing in ("ac,bd->abcd", "ad,bc->abcd"):
                value = value - (count * torch.einsum(pairing, zz[0], zz[0]) - mean) / (count - 1)
        found[name] = width * value
    return found


def _jackknife(replicas: Tensor) -> Tensor:
    return ((len(replicas) - 1) * replicas.var(0, unbiased=False)).sqrt()


def _predicted(theory: LayerStatistics, name: str) -> Tensor | None:
    if name not in _SUMMANDS:
        return getattr(theory, name)
    parts = [(getattr(theory, vertex), axes) for vertex, axes in _SUMMANDS[name]]
    if any(value is None for value, _ in parts):
        return None
    return torch.stack([torch.einsum(f"{axes}->abcd", value) for value, axes in parts]).sum(0)


def _compared(measured: Tensor, replicas: Tensor, predicted: Tensor) -> Comparison:
    predicted = predicted.to(measured)
    norm = predicted.square().sum()
    axes = tuple(range(1, replicas.ndim))
    ratios = (replicas * predicted).sum(axes) / norm
    ratio = float((measured * predicted).sum() / norm)
    return Comparison(measured, _jackknife(replicas), predicted, ratio, float(_jackknife(ratios)))
