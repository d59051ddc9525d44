"""The monitors: everything at once, or one concern each."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from torch_eft.callbacks.monitor import Monitor
from torch_eft.live.config.presets import Options, Preset, parts_of
from torch_eft.live.config.probes import ProbeLike
from torch_eft.live.config.schedule import Every
from torch_eft.live.parts.forecasts.ensemble import EnsemblePart
from torch_eft.live.parts.ntk import NTKPart
from torch_eft.live.parts.representation import RepresentationPart
from torch_eft.live.run.subject import Distributed
from torch_eft.live.run.theta_file import KeepTheta
from torch_eft.measure.forward.probe import OutputFn
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.activations import ActivationLike


class EFTMonitor(Monitor):
    """NTK drift, representation change and the theory beside them, in one callback: ``EFTMonitor(probe=x[:16])``.

    What is logged, with formula, unit and source: ``torch_eft.tensorboard.QUANTITIES``. The network is visited once for
    everything.

    Args:
        probe: Fixed inputs: a tensor (N, ...), a tuple of arguments or a dict of keyword arguments of the forward; the
            path of a file that holds one (``torch.save``); or ``"first_batch:N"``, the first N samples of the training
            data set.
        preset: ``"light"``: NTK and hidden kernels; ``"standard"``: the theory beside them; ``"full"``: everything.
        every: When to measure besides the first and the last weights: ``"epoch"``, a number of optimizer steps,
            ``"log:10"`` (10 a decade of steps), or a function of the step.
        budget: Time that measuring may take, as a share of the training's own. The schedule is thinned to stay within,
            and the end says how much was left out. None: no limit.
        also: Names of parts beyond the preset's.
        ensemble: C_b and C_W, if known (lambda is the optimizer's in any case); None estimates them.
        activation: The activation, where it is none of the registered ones.
        forecast_seconds: Time that each forecast of the theory may take before the first step, at any budget; what is
            dearer is left out, in words.
        output_fn: Turns what the model returns into (N, C).
        module: Name of the submodule to measure; empty means the LightningModule itself.
        jsonl: Write every measurement to ``eft.jsonl`` too, next to the first logger's files.
        on_error: ``"warn"`` or ``"raise"``.
        name: Tells several monitors of this class apart in checkpoints.
        distributed: In a training on several devices: ``"rank_zero"``: rank 0 measures, the others wait for it in their
            next collective; ``"sharded"``: every rank takes its share of the samples (outputs and NTK), wherever
            ``every``, which must be the same on all ranks, may ask for it; it pays where a sample's passes are dear
            (convolutions, attention).
        twin: For a model whose parameters are sharded (FSDP2): the same architecture built plainly. The parameters are
            gathered into it for every measurement, and it needs that much memory on every rank; batches and gradients
            are not looked at, so that there are measurements only.
        keep_theta_0: Where the parameters of theta_0 are kept for a resumed training, if something needs them (Taylor
            terms do): ``"checkpoint"``; ``"file"``, ``eft-theta_0.pt`` next to ``eft.jsonl``, to which checkpoints
            point; ``"none"``.

    Raises:
        ValueError: Here, in ``setup`` or at the start of training, if an argument or the model is not usable.
    """

    def __init__(
        self,
        probe: ProbeLike,
        preset: Preset = "standard",
        every: Every = "epoch",
        budget: float | None = 0.05,
        also: Sequence[str] = (),
        ensemble: MLPEnsemble | None = None,
        activation: ActivationLike | None = None,
        forecast_seconds: float = 3.0,
        output_fn: OutputFn | None = None,
        module: str = "",
        jsonl: bool = True,
        on_error: Literal["warn", "raise"] = "warn",
        name: str = "",
        distributed: Distributed = "rank_zero",
        twin: nn.Module | None = None,
        keep_theta_0: KeepTheta = "checkpoint",
    ) -> None:
        parts = parts_of(preset, also, Options(ensemble, activation, output_fn, forecast_seconds))
        super().__init__(
            probe, parts, every, budget, output_fn, module, jsonl, on_error, name, distributed, twin, keep_theta_0
        )


class NTKMonitor(Monitor):
    """Measure how far the neural tangent kernel has moved.

    Logs ``ntk_drift``, ``ntk_kernel_distance``, ``ntk_top_eigenvalue``, ``ntk_trace`` and the spectrum, on the probe,
    with H_0 the NTK at theta_0 and the optimizer's relative learning rates as lambda.

    Args:
        probe: As ``EFTMonitor``.
        every: As ``EFTMonitor``.
        budget: As ``EFTMonitor``.
        outputs: ``"full"``, ``"trace"`` (average over outputs) or ``"auto"``.
        output_fn: Turns what the model returns into (N, C).
        module: Name of the submodule to measure; empty means the LightningModule itself.
        jsonl: As ``EFTMonitor``.
        on_error: ``"warn"`` or ``"raise"``.
        name: Tells several monitors of this class apart in checkpoints.
        distributed: As ``EFTMonitor``.
        twin: As ``EFTMonitor``.

    Raises:
        ValueError: As ``EFTMonitor``.
    """

    def __init__(
        self,
        probe: ProbeLike,
        every: Every = "epoch",
        budget: float | None = 0.05,
        outputs: Literal["auto", "full", "trace"] = "auto",
        output_fn: OutputFn | None = None,
        module: str = "",
        jsonl: bool = True,
        on_error: Literal["warn", "raise"] = "warn",
        name: str = "",
        distributed: Distributed = "rank_zero",
        twin: nn.Module | None = None,
    ) -> None:
        super().__init__(
            probe, [NTKPart(outputs)], every, budget, output_fn, module, jsonl, on_error, name, distributed, twin
        )


class RepresentationMonitor(Monitor):
    """Measure how far the hidden representations have moved.

    Logs ``representation_change`` and ``representation_cka_distance``, on the probe, with K_0 a layer's kernel
    (1/n) sum_j s_j s_j at theta_0: the mean over layers, and with ``per_layer`` each as
    ``eft-layers/<quantity>/<layer>``.

    Args:
        probe: As ``EFTMonitor``.
        every: As ``EFTMonitor``.
        budget: As ``EFTMonitor``.
        layers: Names of the submodules to watch; None picks the activations, or the layers with weights.
        per_layer: Log each layer.
        output_fn: Turns what the model returns into (N, C).
        module: Name of the submodule to measure; empty means the LightningModule itself.
        jsonl: As ``EFTMonitor``.
        on_error: ``"warn"`` or ``"raise"``.
        name: Tells several monitors of this class apart in checkpoints.
        distributed: As ``EFTMonitor``.
        twin: As ``EFTMonitor``.

    Raises:
        ValueError: As ``EFTMonitor``.
    """

    def __init__(
        self,
        probe: ProbeLike,
        every: Every = "epoch",
        budget: float | None = 0.05,
        layers: Sequence[str] | None = None,
        per_layer: bool = False,
        output_fn: OutputFn | None = None,
        module: str = "",
        jsonl: bool = True,
        on_error: Literal["warn", "raise"] = "warn",
        name: str = "",
        distributed: Distributed = "rank_zero",
        twin: nn.Module | None = None,
    ) -> None:
        parts = [RepresentationPart(layers, per_layer, output_fn)]
        super().__init__(probe, parts, every, budget, output_fn, module, jsonl, on_error, name, distributed, twin)


class TheoryComparison(Monitor):
    """Compare a training with the theory of its ensemble, infinite width and order 1/n, predicted before it starts.

    The ensemble (widths, activation, C_b, C_W) is read off the network at theta_0, lambda and the learning
    rate off the optimizer, data and loss off the first batch; its value and gradient must be those of squared
    error. Where the training is not what the theory covers (no MLP, mini-batches, another loss or optimizer), it
    says so in words, in the log and on the page ``eft/validity``, and logs measurements only.

    Logs measured and theory, with the band of one standard deviation over initializations, of ``ntk_trace``,
    ``output_projection`` and ``output_chi_squared``, and without a band ``ntk_drift`` and ``ntk_mean_drift``; and the
    page ``eft/diagnosis``. Order 1/n (smooth activations, up to 64 training points) is computed as far as a few seconds
    go; the page ``eft/validity`` says what is at which order.

    Args:
        probe: As ``EFTMonitor``; a tensor (N, ...).
        every: As ``EFTMonitor``.
        budget: As ``EFTMonitor``.
        ensemble: C_b and C_W, if known (lambda is the optimizer's in any case); None estimates them.
        activation: The activation, where it is none of the registered ones.
        output_fn: Turns what the model returns into (N, C).
        module: Name of the submodule to measure; empty means the LightningModule itself.
        jsonl: As ``EFTMonitor``.
        on_error: ``"warn"`` or ``"raise"``.
        name: Tells several monitors of this class apart in checkpoints.
        distributed: As ``EFTMonitor``.
        twin: As ``EFTMonitor``.

    Raises:
        ValueError: As ``EFTMonitor``.
    """

    def __init__(
        self,
        probe: ProbeLike,
        every: Every = "epoch",
        budget: float | None = 0.05,
        ensemble: MLPEnsemble | None = None,
        activation: ActivationLike | None = None,
        output_fn: OutputFn | None = None,
        module: str = "",
        jsonl: bool = True,
        on_error: Literal["warn", "raise"] = "warn",
        name: str = "",
        distributed: Distributed = "rank_zero",
        twin: nn.Module | None = None,
    ) -> None:
        parts = [EnsemblePart(ensemble, activation, output_fn)]
        super().__init__(probe, parts, every, budget, output_fn, module, jsonl, on_error, name, distributed, twin)
