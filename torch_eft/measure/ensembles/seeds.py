"""Measures statistics over initializations: one architecture drawn many times, with standard errors.

What ``theory.initial_statistics`` predicts to order 1/n is estimated from drawn networks of any architecture: the
kernels K, Theta and the vertices V, A, B, D, F (PDLT 4, 8), P, Q (PDLT 11) and R, S, T, U (chapter
infinity), each times the width that divides it in the theory.

With C >= 2 outputs the index structures are separated by output patterns, i != j:

    V_(12)(34) / n = Cov(z_{i;1} z_{i;2}, z_{j;3} z_{j;4})      A_(12)(34) / n = Cov(H_{ii;12}, H_{jj;34})
    D_1234 / n     = Cov(z_{i;1} z_{i;2}, H_{jj;34})            B_1324 / n     = E[H_{ij;12} H_{ij;34}]
    F_1324 / n     = E[z_{i;1} z_{j;2} H_{ij;34}]               P_0123 / n     = E[dH_{ijj;012} z_{i;3}]
    Q_0123 / n     = E[dH_{iij;012} z_{j;3}]                    R_0123 / n     = E[ddI_{iijj;0123}]
    S_1234 / n     = E[ddII_{iijj;1234}]                        T_1324 / n     = E[ddII_{ijij;1234}]
    U_1423 / n     = E[ddII_{ijji;1234}]

averaged over all pairs of outputs. This takes outputs that are exchangeable and whose signs may be flipped one by one,
as those of a last linear layer with independent weights are. With one output only sums over the structures exist.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_eft.measure.ensembles.draws import Draw
from torch_eft.measure.ensembles.measurement import Measurement
from torch_eft.measure.ensembles.read import read_ensemble
from torch_eft.measure.ensembles.statistics import (
    TheoryAgreement,
    added,
    agreement,
    estimates,
    jackknife,
    predicted_by,
    sums_of,
)
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.measure.jacobian.plan import checked_lambdas
from torch_eft.results.presentation.result import Result
from torch_eft.results.progress.bar import counted
from torch_eft.theory.initialization.statistics import LayerStatistics

MEASURABLE = ("K", "V", "Theta", "A", "B", "D", "F", "P", "Q", "R", "S", "T", "U")
"""Names that ``statistics_over_seeds`` measures; comparing with a theory adds its corrections G1 and Theta1."""

DEFAULT_MEMORY = 2**28
"""Bytes for the networks that are differentiated at once; more is no faster once caches overflow."""

_BLOCKS = 32
_NEEDS = {"H": "Theta A B D F", "dH": "P Q", "ddI": "R", "ddII": "S T U"}


@dataclass(frozen=True, repr=False)
class SeedStatistics(Result):
    """Statistics measured over initializations, with standard errors.

    Args:
        mean: ``{name: estimate}``, float64: K and Theta (N, N) with their 1/n corrections in them; the others
            (N, N, N, N), times ``width``, axes as ``theory.LayerStatistics`` has them (B, F, T: 1, 3, 2, 4; U: 1, 4,
            2, 3; the others in order). For one output the names are the values of ``TOTALS``, axes in order.
        error: ``{name: standard error}``, by the jackknife over blocks of networks.
        replicas: ``{name: (blocks, ...)}``, the estimates that leave out one block each.
        num_networks: Number of networks.
        outputs: C.
        width: The factor of the vertices.
        width_source: A sentence that says where ``width`` comes from.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_eft import measure
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> measured = measure.statistics_over_seeds(model, torch.ones(1, 3), num_networks=4)
        >>> measured.num_networks, measured.outputs, measured.width
        (4, 2, 8.0)
    """

    mean: dict[str, Tensor]
    error: dict[str, Tensor]
    replicas: dict[str, Tensor]
    num_networks: int
    outputs: int
    width: float
    width_source: str

    def compare(self, theory: LayerStatistics) -> dict[str, TheoryAgreement]:
        """Compare every measured statistic that the theory has too; K and Theta also give G1 and Theta1.

        Args:
            theory: The last layer's, of the same inputs, from ``theory.initial_statistics``.

        Returns:
            ``{name: measured and predicted value}``.

        Raises:
            TypeError: If it is no layer's statistics.
            ValueError: If the theory is one of other inputs.
        """
        if not isinstance(theory, LayerStatistics):
            raise TypeError(
                f"theory: {type(theory).__name__} given; give the last layer of theory.initial_statistics(ensemble, x)"
            )
        measured = len(next(iter(self.mean.values())))
        if len(theory.K) != measured:
            raise ValueError(
                f"theory: it is one of {len(theory.K)} inputs, {measured} were measured; predict for the same inputs"
            )
        rows = {}
        for name, replicas in self.replicas.items():
            predicted = predicted_by(theory, name)
            if predicted is not None:
                rows[name] = agreement(self.mean[name], replicas, predicted)
        for name, key, correction in (("K", "G1", theory.G1), ("Theta", "Theta1", theory.Theta1)):
            if name in rows and correction is not None:
                leading = rows[name].predicted.to(self.mean[name])
                value = self.width * (self.mean[name] - leading)
                rows[key] = agreement(value, self.width * (self.replicas[name] - leading), correction)
        return rows


def statistics_over_seeds(
    model: nn.Module,
    x: Any,
    *,
    num_networks: int,
    statistics: Collection[str] = ("K", "V", "Theta", "A", "B", "D", "F"),
    lambdas: Mapping[str, float] | float | None = None,
    initialize: Callable[[nn.Module], Any] | None = None,
    width: float | None = None,
    output_fn: OutputFn | None = None,
    seed: int = 0,
    memory: int = DEFAULT_MEMORY,
) -> SeedStatistics:
    """Measure the statistics of ``model`` over ``num_networks`` initializations, in evaluation mode.

    The model and the global random state are left alone. With M = N C, a network takes M backward passes for the NTK
    sector, M^2 for P, Q, S, T, U and about M^3 / 4 for R: choose few inputs, and few outputs by ``output_fn``.

    Args:
        model: Any module whose parameters can be drawn anew.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        num_networks: Number of networks, at least 3.
        statistics: Names among ``MEASURABLE``.
        lambdas: The learning-rate tensor, see ``measure.ntk``.
        initialize: Draws the parameters of the module it is given, in place, from the global random state; None uses
            ``reset_parameters`` of every submodule, or also the module's ``_init_weights`` or ``init_weights``, if the
            network given could be one of its draws: constants equal, random parameters of the same mean and scale.
        width: n_{L-1}, the factor of the vertices; None reads it off an MLP, and is 1 for anything else.
        output_fn: Turns what the model returns into (N, C).
        seed: Seed of the first network; the others follow.
        memory: Bytes allowed for the networks that are differentiated at once.

    Returns:
        Estimates with standard errors.

    Raises:
        ValueError: If an argument is out of range, ``initialize`` is missing and the network was drawn in another way,
            the forward rejects ``x``, or the network has no derivatives of the order asked for.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_eft import measure
        >>> model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
        >>> measured = measure.statistics_over_seeds(model, torch.eye(3), num_networks=8, statistics=("K", "V"))
        >>> measured.mean["V"].shape, measured.error["K"].shape
        (torch.Size([3, 3, 3, 3]), torch.Size([3, 3]))
    """
    _check(num_networks, statistics, width, memory)
    probe = as_probe(x)
    needed = [name for name, users in _NEEDS.items() if set(users.split()) & set(statistics)]
    with isolated(model, output_fn) as network:
        draw = Draw(network, initialize, seed)
        outputs = checked_output(replace(network, params=draw.first, constants={}), probe)
        if width is None:
            width, source = _width_of(draw.module, probe, output_fn)
        else:
            source = "given"
        scales = checked_lambdas(network, lambdas) if needed else {}
        measure = Measurement(network, probe, scales, needed)
        at_once = measure.networks_at_once(draw.first, outputs, memory)
        sums = []
        blocks = min(num_networks, _BLOCKS)
        for index in counted("measuring networks of other seeds", range(blocks), blocks):
            size = (index + 1) * num_networks // blocks - index * num_networks // blocks
            parts = []
            for done in range(0, size, at_once):
                parts.append(sums_of(measure(draw(min(at_once, size - done))), statistics))
            sums.append((size, added(parts)))
    total = added([part for _, part in sums])
    mean = estimates(total, num_networks, width)
    without = [
        estimates({name: total[name] - part[name] for name in total}, num_networks - count, width)
        for count, part in sums
    ]
    replicas = {name: torch.stack([estimate[name] for estimate in without]) for name in mean}
    if not all(bool(value.isfinite().all()) for value in mean.values()):
        raise ValueError("initialize: some networks' outputs or derivatives are not finite; draw smaller parameters")
    return SeedStatistics(
        mean,
        {name: jackknife(value) for name, value in replicas.items()},
        replicas,
        num_networks,
        outputs.shape[1],
        width,
        source,
    )


def _check(num_networks: int, statistics: Collection[str], width: float | None, memory: int) -> None:
    if isinstance(statistics, str) or not statistics:
        raise ValueError(f"statistics: {statistics!r} given; give a sequence of names out of {', '.join(MEASURABLE)}")
    unknown = sorted(set(statistics) - set(MEASURABLE))
    if unknown:
        hint = {"G1": "K", "Theta1": "Theta"}.get(unknown[0])
        advice = f"choose from {', '.join(MEASURABLE)}"
        if hint:
            advice = f"ask for {hint}, and compare(theory) gives {unknown[0]}"
        raise ValueError(f"statistics: {unknown[0]!r} cannot be measured by itself; {advice}")
    if num_networks < 3:
        raise ValueError(f"num_networks: {num_networks} given; standard errors of covariances need at least 3 networks")
    if width is not None and not (math.isfinite(width) and width > 0):
        raise ValueError(f"width: {width:g} given; give the positive number of neurons that feed the last layer")
    if memory < 1:
        raise ValueError(f"memory: {memory} given; give a positive number of bytes")


def _width_of(module: nn.Module, probe: Probe, output_fn: OutputFn | None) -> tuple[float, str]:
    try:
        widths = read_ensemble(module, probe, output_fn=output_fn).widths
    except ValueError as error:
        return 1.0, f"1, as there is no last hidden width to read off ({error})"
    return float(widths[-2]), "the fan-in of the MLP's last layer"
