"""Monitors of one concern each: ``EFTMonitor`` with one instrument."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from torch_eft.callbacks.monitor import EFTMonitor
from torch_eft.live.config.probes import ProbeLike
from torch_eft.live.instruments.forecasts.theory import TheoryInstrument
from torch_eft.live.instruments.ntk import NTKInstrument
from torch_eft.live.instruments.representation import RepresentationInstrument
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.activations import ActivationLike

_OWN = ("preset", "instruments", "ensemble", "activation", "forecast_seconds", "outputs")
"""Arguments of ``EFTMonitor`` that a monitor of one concern does not have, unless it names them."""

Init = TypeVar("Init", bound=Callable[..., None])


def _with_shared_arguments(init: Init) -> Init:
    """Show the arguments behind ``**shared`` in the signature; refuse those that would have no effect."""
    own = inspect.signature(init)
    names = [name for name, parameter in own.parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    every = inspect.signature(EFTMonitor.__init__).parameters
    shared = [parameter for name, parameter in every.items() if name not in (*names, *_OWN)]

    @functools.wraps(init)
    def checked(self: EFTMonitor, *arguments: Any, **keywords: Any) -> None:
        unused = [name for name in _OWN if name in keywords and name not in names]
        if unused:
            raise TypeError(
                f"{type(self).__name__}: {unused[0]} given, which a monitor of one concern does not have; give it to "
                "EFTMonitor"
            )
        init(self, *arguments, **keywords)

    parameters = [own.parameters[name] for name in names] + shared
    checked.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return cast(Init, checked)


class NTKMonitor(EFTMonitor):
    """Measures how far the neural tangent kernel has moved.

    Logs ``ntk_drift``, ``ntk_kernel_distance``, ``ntk_top_eigenvalue``, ``ntk_trace`` and the spectrum, on the probe,
    with H_0 the NTK at theta_0 and the optimizer's relative learning rates as lambda.

    Args:
        probe: As for ``EFTMonitor``.
        outputs: ``"full"``, ``"trace"`` (average over outputs), ``"auto"``, or ``"probes:16"``; as for ``EFTMonitor``.
        **shared: As for ``EFTMonitor``: ``every``, ``budget``, ``extra``, ``output_fn``, ``module``, ``jsonl``,
            ``on_error``, ``name``, ``distributed``, ``unsharded_model``, ``keep_theta_0``.

    Raises:
        ValueError: As for ``EFTMonitor``.

    Example:
        >>> import torch
        >>> from torch_eft.callbacks import NTKMonitor
        >>> NTKMonitor(torch.zeros(4, 3), every=10, outputs="trace").observer.every
        10
    """

    @_with_shared_arguments
    def __init__(self, probe: ProbeLike, *, outputs: str = "auto", **shared: Any) -> None:
        super().__init__(probe, instruments=[NTKInstrument(outputs)], **shared)


class RepresentationMonitor(EFTMonitor):
    """Measures how far the hidden representations have moved.

    Logs ``representation_change`` and ``representation_cka_distance``, on the probe, with K_0 a layer's kernel
    (1/n) sum_j s_j s_j at theta_0: the mean over layers, and with ``per_layer`` each as
    ``eft-layers/<quantity>/<layer>``.

    Args:
        probe: As for ``EFTMonitor``.
        layers: Names of the submodules to watch; None chooses the activations, or the layers with weights.
        per_layer: Log each layer.
        **shared: As for ``NTKMonitor``.

    Raises:
        ValueError: As for ``EFTMonitor``.

    Example:
        >>> import torch
        >>> from torch_eft.callbacks import RepresentationMonitor
        >>> monitor = RepresentationMonitor(torch.zeros(4, 3), per_layer=True)
        >>> [instrument.name for instrument in monitor.observer.instruments]
        ['representation']
    """

    @_with_shared_arguments
    def __init__(
        self, probe: ProbeLike, *, layers: Sequence[str] | None = None, per_layer: bool = False, **shared: Any
    ) -> None:
        super().__init__(probe, instruments=[RepresentationInstrument(layers=layers, per_layer=per_layer)], **shared)


class TheoryComparison(EFTMonitor):
    """Compares a training with the theory of its ensemble, infinite width and order 1/n, predicted before it starts.

    The ensemble (widths, activation, C_b, C_W) is read off the network at theta_0, lambda and the learning
    rate off the optimizer, data and loss off the first batch; its value and gradient must be those of squared
    error. Where the theory does not cover the training (other networks than MLPs, mini-batches, another loss or
    optimizer), the log and the page ``eft/validity`` say why, and there are measurements only.

    Logs measured and theory, with the band of one standard deviation over initializations, of ``ntk_trace``,
    ``output_projection`` and ``output_chi_squared``, with the bands of 68 and 90 % of networks ``ntk_drift``, and
    without a band ``ntk_mean_drift``; and the page ``eft/diagnosis``. Order 1/n (smooth activations, up to 64 training
    points) is computed as far as ``forecast_seconds`` go; the page ``eft/validity`` says what is at which order.

    Args:
        probe: As for ``EFTMonitor``; a tensor (N, ...).
        ensemble: As for ``EFTMonitor``.
        activation: As for ``EFTMonitor``.
        forecast_seconds: As for ``EFTMonitor``.
        **shared: As for ``NTKMonitor``.

    Raises:
        ValueError: As for ``EFTMonitor``.

    Example:
        >>> import torch
        >>> from torch_eft.callbacks import TheoryComparison
        >>> TheoryComparison(torch.zeros(4, 3)).validity is None  # before the first step
        True
    """

    @_with_shared_arguments
    def __init__(
        self,
        probe: ProbeLike,
        *,
        ensemble: MLPEnsemble | None = None,
        activation: ActivationLike | None = None,
        forecast_seconds: float = 10.0,
        **shared: Any,
    ) -> None:
        instrument = TheoryInstrument(ensemble, activation, seconds=forecast_seconds)
        super().__init__(probe, instruments=[instrument], **shared)
