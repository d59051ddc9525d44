"""The diagnosis of a network before training: does it train, how much do seeds differ, how deep is it for its width.

For an MLP it is derived from the architecture (``derived``), and so it is for convolutions, skips and norms that can be
read (``architecture``); any other module is measured (``measured``). All print as one kind of report.
"""

from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.diagnosis.architecture.diagnose import architecture_diagnosis
from torch_eft.diagnosis.architecture.report import ArchitectureDiagnosis, Population
from torch_eft.diagnosis.derived.diagnose import derived_diagnosis
from torch_eft.diagnosis.derived.rates import Reduction, read_step
from torch_eft.diagnosis.derived.report import Diagnosis, LayerDiagnosis
from torch_eft.diagnosis.derived.variants import Variant
from torch_eft.diagnosis.findings import Finding
from torch_eft.diagnosis.measured.diagnose import measured_diagnosis
from torch_eft.diagnosis.measured.report import MeasuredDiagnosis
from torch_eft.measure.ensembles.read import NotAnMLPError, read_ensemble, read_isolated_architecture
from torch_eft.measure.forward.probe import OutputFn, Probe
from torch_eft.measure.network.batch_norm import batch_norms
from torch_eft.results.choices import check_choice
from torch_eft.results.progress.bar import working
from torch_eft.theory.architecture.nodes import Architecture
from torch_eft.theory.architecture.reading.graph import NotReadableError
from torch_eft.theory.ensemble import MLPEnsemble

__all__ = [
    "ArchitectureDiagnosis",
    "Diagnosis",
    "Finding",
    "LayerDiagnosis",
    "MeasuredDiagnosis",
    "Population",
    "Variant",
    "diagnose",
]


def diagnose(
    model_or_ensemble: nn.Module | MLPEnsemble,
    x: Any = None,
    *,
    optimizer: Optimizer | None = None,
    reduction: Reduction = "mean",
    output_fn: OutputFn | None = None,
    num_networks: int | None = None,
    initialize: Callable[[nn.Module], Any] | None = None,
    beside: bool = False,
) -> Diagnosis | ArchitectureDiagnosis | MeasuredDiagnosis:
    """Diagnose a network before training.

    Args:
        model_or_ensemble: An ``MLPEnsemble`` (``measure.read_ensemble`` returns one), or a freshly initialized module.
            An MLP has its C_b and C_W and the laws of its weights and biases read off, and so has a graph of
            convolutions, skips and norms (``theory.read_architecture``); any other module is measured.
        x: Inputs, (N, ...) or whatever the module takes; without them, one input with |x|^2 = n_0. A module that is
            no MLP needs some.
        optimizer: Gives the learning rates, relative ones of its parameter groups included, and momentum; None is plain
            SGD with one learning rate.
        reduction: Of the squared error for which learning rates are given, ``"mean"`` or ``"sum"`` as ``nn.MSELoss``
            has them.
        output_fn: Turns what the module returns into (N, C).
        num_networks: Networks to draw where it is measured, 16 if None; given, any network but an MLP is measured. 0
            measures this one alone, and so does a network that was drawn in another way than its
            ``reset_parameters`` or ``_init_weights`` do.
        initialize: Draws the parameters of a module in place, as ``measure.statistics_over_seeds`` takes it; given, any
            network but an MLP is measured.
        beside: Also measure networks drawn where all is derived from a graph of layers: ``.measured``, and beside the
            derived numbers in ``.details``.

    Returns:
        A ``Diagnosis`` for an MLP, an ``ArchitectureDiagnosis`` for a graph of layers, else a ``MeasuredDiagnosis``:
        ``print`` shows the verdict, warnings with advice and five numbers, ``.details`` is all of it as Markdown,
        ``.plot()`` a picture, ``to_dict()`` ready for JSON, ``.warnings`` what to change, ``.status`` 0 without and 1
        with warnings.

    Raises:
        NotAnMLPError: If the module is no MLP and there is no ``x`` to measure it on, with the reason.
        TypeError: If the first argument is neither.
        ValueError: If ``x`` does not fit or the signal leaves float64.

    Example:
        >>> import torch_eft as eft
        >>> report = eft.diagnose(eft.theory.MLPEnsemble([10, 100, 100, 1], "relu", C_W=2.0))
        >>> report.phase, round(report.aspect_ratio.r, 3)
        ('critical', 0.03)
        >>> print(report.verdict)
        trains: near criticality, seeds differ little (32 %)
    """
    if not isinstance(model_or_ensemble, nn.Module | MLPEnsemble):
        raise TypeError(
            f"model_or_ensemble: {type(model_or_ensemble).__name__} given; give the network first, a torch.nn.Module "
            "or a theory.MLPEnsemble, then its inputs: diagnose(model, x)"
        )
    x = torch.tensor(x) if isinstance(x, numpy.ndarray) else x
    check_choice("reduction", reduction, ("mean", "sum"))
    step = read_step(optimizer, reduction)
    inputs = x.inputs if isinstance(x, Probe) else x
    if isinstance(model_or_ensemble, nn.Module):
        try:
            read = read_ensemble(model_or_ensemble, x=x, optimizer=optimizer, output_fn=output_fn)
        except NotAnMLPError as error:
            if x is None:
                raise NotAnMLPError(f"{error}. To derive or measure it all the same, give inputs x") from error
            networks = 16 if num_networks is None else num_networks

            def measured(reason: str) -> MeasuredDiagnosis:
                return measured_diagnosis(model_or_ensemble, x, reason, output_fn, networks, initialize, step)

            if num_networks is not None or initialize is not None:
                return measured(f"{error}. Without num_networks and initialize its layers are read, where they can be")
            try:
                architecture = _read(model_or_ensemble, inputs, optimizer, output_fn)
                with working("diagnosing the network"):
                    beside_it = (lambda: measured("asked for beside what is derived")) if beside else None
                    return architecture_diagnosis(model_or_ensemble, architecture, inputs, step, beside_it)
            except ValueError as refusal:  # not readable, or out of what the moments resolve
                return measured(f"{error}; nor is it a graph of layers that is read: {refusal}")
        with working("diagnosing the network"):
            return derived_diagnosis(read, inputs, step)
    if inputs is not None and not isinstance(inputs, Tensor):
        raise ValueError(f"x: {type(inputs).__name__} given; an MLP takes one tensor, (N, n_0)")
    with working("diagnosing the network"):
        return derived_diagnosis(model_or_ensemble, inputs, step)


def _read(model: nn.Module, x: Any, optimizer: Optimizer | None, output_fn: OutputFn | None) -> Architecture:
    if output_fn is not None:
        raise NotReadableError("an output_fn follows its forward")
    if batch_norms(model) or batch_norms(model, unused=True):
        raise NotReadableError("BatchNorm in training depends on the whole batch")
    return read_isolated_architecture(model, x, optimizer=optimizer)
