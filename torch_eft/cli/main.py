"""The command ``torch-eft``: a demonstration on real data, and the diagnosis of an architecture.

A command is a function that adds its arguments to the parser, and one that runs it and returns the exit status.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_eft import __version__
from torch_eft.diagnosis import ArchitectureDiagnosis, Diagnosis, MeasuredDiagnosis, diagnose
from torch_eft.diagnosis.text import plain
from torch_eft.measure.ensembles.read import NotAnMLPError
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.activations import available_activations

Run = Callable[[argparse.Namespace], int]

_INPUTS = 8
"""Standard normal inputs that --input-shape draws."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after the command; None takes the process's.

    Returns:
        The exit status: 0, 1 where a diagnosis warns, or 2 for unusable arguments.
    """
    options = _parser().parse_args(arguments)
    run: Run = options.run
    try:
        return run(options)
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"torch-eft {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


class _Help(argparse.HelpFormatter):
    """Wraps descriptions, and leaves lines of examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)


def _examples(*lines: str) -> dict[str, Any]:
    """The arguments of a parser that shows examples."""
    return {"epilog": "\n".join(["examples:", *(f"  {line}" for line in lines)]), "formatter_class": _Help}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torch-eft",
        description="The effective theory of deep learning next to a real training run. 'python -m torch_eft' is the "
        "same command; --help after a command has its arguments and examples.",
        **_examples(
            "torch-eft demo",
            "torch-eft diagnose --widths 784 512 512 10 --activation relu --C_W 2",
            "torch-eft report lightning_logs",
        ),
    )
    parser.add_argument("--version", action="version", version=f"torch-eft {__version__}, torch {torch.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_demo, _add_diagnose, _add_report):
        add(commands)
    return parser


def _activation(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(available_activations())
    parser.add_argument("--activation", default="tanh", help=f"one of {names} (default %(default)s)")


# ---- demo


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train an MLP on digits, measured against the theory",
        description="Train a critical MLP on 16 of scikit-learn's digits, with what the theory predicted before the "
        "first step beside it: a table, a picture and TensorBoard's files.",
        **_examples("torch-eft demo", "torch-eft demo --width 64 --depth 6 --steps 300 --logdir runs"),
    )
    demo.add_argument("--width", type=int, default=256, help="hidden width n (default %(default)s)")
    demo.add_argument("--depth", type=int, default=3, help="L, number of weight matrices (default %(default)s)")
    _activation(demo)
    demo.add_argument("--steps", type=int, default=100, help="full-batch gradient steps (default %(default)s)")
    demo.add_argument("--logdir", default="torch_eft_demo", help="where TensorBoard files go (default %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the initialization (default %(default)s)")
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from torch_eft.cli.demo import run_demo

    run_demo(
        width=options.width,
        depth=options.depth,
        activation=options.activation,
        steps=options.steps,
        logdir=options.logdir,
        seed=options.seed,
    )
    return 0


# ---- diagnose


def _add_diagnose(commands: Any) -> None:
    check = commands.add_parser(
        "diagnose",
        help="criticality, depth against width, spread, drift and learning rates of a network before training",
        description="Diagnose a network trained by torch.optim.SGD with one learning rate eta for all parameters: an "
        "MLP, or a graph of convolutions, skips and norms, by theory, from --widths or --model; any other --model by "
        "measurement. Exit status 0: fine, 1: warnings, "
        "2: unusable.",
        **_examples(
            "torch-eft diagnose --widths 784 512 512 10 --activation relu --C_W 2",
            "torch-eft diagnose --widths 64 128 128 10 --lr 0.1 --momentum 0.9 --verbose",
            "torch-eft diagnose --model torchvision.models:resnet18 --input-shape 3 64 64 --num-networks 0",
            "torch-eft diagnose --widths 64 128 128 10 --picture where.png",
        ),
    )
    source = check.add_mutually_exclusive_group(required=True)
    source.add_argument("--widths", type=int, nargs="+", help="n_0 n_1 ... n_L of an MLP")
    source.add_argument(
        "--model",
        help="package.module:factory, importable from the working directory: a module, or a function without "
        "arguments that returns one, or a pair (module, inputs)",
    )
    _activation(check)
    check.add_argument("--C_b", type=float, nargs="+", help="bias variance, one value or one per layer (default 0)")
    check.add_argument("--C_W", type=float, nargs="+", help="n_in * weight variance, likewise (default 1)")
    check.add_argument(
        "--input-shape", type=int, nargs="+", help=f"of one input of --model: {_INPUTS} standard normal ones are drawn"
    )
    check.add_argument(
        "--num-networks",
        type=int,
        help="networks to draw where it is measured (default 16; 0: this one alone); if given, any --model but an MLP "
        "is measured",
    )
    check.add_argument(
        "--lr", type=float, help="learning rate of SGD to judge; without it the largest stable one is printed"
    )
    check.add_argument("--momentum", type=float, default=0.0, help="of SGD (default 0)")
    check.add_argument(
        "--reduction", choices=("mean", "sum"), default="mean", help="of nn.MSELoss, for learning rates (default mean)"
    )
    check.add_argument(
        "--verbose",
        "-v",
        action="store_true",
        help="print everything, not the verdict and some numbers; of a graph of layers also what 16 networks measure",
    )
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument("--picture", metavar="FILE", help="draw where the network stands: .png, .svg or .pdf")
    check.set_defaults(run=_diagnose)


def _diagnose(options: argparse.Namespace) -> int:
    if options.model is None:
        if options.input_shape is not None:
            raise ValueError("--input-shape: given with --widths, which have it; leave it out")
        subject: nn.Module | MLPEnsemble = _ensemble(options)
        x = None
    else:
        if options.C_W is not None or options.C_b is not None:
            raise ValueError("--C_b, --C_W: given with --model, they are read off its weights; leave them out")
        subject, x = _model(options.model)
        if options.input_shape is not None:
            x = _inputs(options.input_shape)
    try:
        diagnosis = diagnose(
            subject,
            x,
            optimizer=_optimizer(options, subject),
            reduction=options.reduction,
            num_networks=options.num_networks,
            beside=options.verbose,
        )
    except NotAnMLPError as error:
        raise ValueError(f"--model {options.model}: {error} (--input-shape, or a pair (module, inputs))") from error
    if options.picture is not None:
        _save(options.picture, diagnosis)
    if options.json:
        print(json.dumps(diagnosis.to_dict(), indent=2))
    elif options.verbose:
        print(plain(diagnosis.details))
    else:
        print(str(diagnosis).replace("print(diagnosis.details), diagnosis.plot()", "--verbose, --picture FILE"))
    return diagnosis.status


def _optimizer(options: argparse.Namespace, subject: nn.Module | MLPEnsemble) -> torch.optim.Optimizer | None:
    """SGD as asked for; None if nothing was asked."""
    if options.lr is None and not options.momentum:
        return None
    if options.lr is None:
        raise ValueError("--momentum: give --lr, too")
    parameters = subject.parameters() if isinstance(subject, nn.Module) else [nn.Parameter(torch.zeros(1))]
    return torch.optim.SGD(parameters, lr=options.lr, momentum=options.momentum)


def _ensemble(options: argparse.Namespace) -> MLPEnsemble:
    return MLPEnsemble(
        options.widths,
        options.activation,
        C_b=_per_layer(options.C_b, 0.0),
        C_W=_per_layer(options.C_W, 1.0),
        lambda_W=options.widths[:-1],
    )


def _per_layer(values: list[float] | None, default: float) -> float | list[float]:
    """Return one value for all layers, or one per layer."""
    if values is None:
        return default
    return values if len(values) > 1 else values[0]


def _inputs(shape: Sequence[int]) -> Tensor:
    if any(size < 1 for size in shape):
        raise ValueError(f"--input-shape {' '.join(map(str, shape))}: give positive sizes, without the batch")
    return torch.randn(_INPUTS, *shape, generator=torch.Generator().manual_seed(0))


def _model(reference: str) -> tuple[nn.Module, Any]:
    """Return the module and the inputs that ``package.module:factory`` names; nothing else is imported.

    Raises:
        ValueError: If it names no module with inputs; the message says what it names.
    """
    place, separator, name = reference.partition(":")
    if not (place and separator and name):
        raise ValueError(f"--model {reference}: give package.module:factory")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(place)
    except Exception as error:
        raise ValueError(
            f"--model {reference}: importing {place} failed ({type(error).__name__}: {error}); it must be importable "
            f"from {folder}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"--model {reference}: {place} has no {name!r}")
        found = getattr(found, part)
    if callable(found) and not isinstance(found, nn.Module):
        try:
            found = found()
        except Exception as error:
            raise ValueError(
                f"--model {reference}: calling {name}() failed ({type(error).__name__}: {error}); it must take no "
                "arguments"
            ) from error
    model, x = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {reference}: gives {type(model).__name__}, not a torch.nn.Module")
    return model, x


def _save(path: str, diagnosis: Diagnosis | ArchitectureDiagnosis | MeasuredDiagnosis) -> None:
    try:
        drawing = diagnosis.plot()
    except ImportError as error:
        raise ImportError("--picture needs matplotlib: pip install 'torch-eft[demo]'") from error
    try:
        drawing.savefig(path, dpi=100)
    except (ValueError, OSError) as error:
        raise ValueError(f"--picture {path}: {error}") from error


# ---- report


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="one HTML file of measured against theory, from the runs' eft.jsonl",
        description="Write the tab EFT of one or more runs as one HTML file, which asks nothing of the network.",
        **_examples("torch-eft report lightning_logs", "torch-eft report runs/narrow runs/wide --out widths.html"),
    )
    report.add_argument(
        "runs", nargs="+", metavar="RUN", help="a log directory, searched for eft.jsonl, or such a file"
    )
    report.add_argument("--out", default="report.html", help="the file to write (default %(default)s)")
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from torch_eft.tensorboard.report import write_report

    print(write_report(options.runs, options.out))
    return 0
