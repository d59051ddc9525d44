"""The command ``torch-eft``: a demonstration on real data, the diagnosis of an architecture, a report of runs."""

import argparse
import json
import sys
from collections.abc import Sequence

from torch_eft.diagnosis import diagnose
from torch_eft.theory.activations import available_activations
from torch_eft.theory.ensemble import MLPEnsemble


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after the command; None takes the process's.

    Returns:
        The exit status: 0, or 2 for unusable arguments.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.command == "demo":
            return _demo(options)
        if options.command == "report":
            return _report(options)
        return _diagnose(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"torch-eft {options.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="torch-eft", description="The effective theory of deep learning at work.")
    commands = parser.add_subparsers(dest="command", required=True)
    names = ", ".join(available_activations())

    demo = commands.add_parser("demo", help="train an MLP on digits, measured against the theory")
    demo.add_argument("--width", type=int, default=128, help="hidden width n (default %(default)s)")
    demo.add_argument("--depth", type=int, default=3, help="L, number of weight matrices (default %(default)s)")
    demo.add_argument("--activation", default="tanh", help=f"one of {names} (default %(default)s)")
    demo.add_argument("--steps", type=int, default=300, help="full-batch gradient steps (default %(default)s)")
    demo.add_argument("--logdir", default="torch_eft_demo", help="where TensorBoard files go (default %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the initialisation (default %(default)s)")

    check = commands.add_parser(
        "diagnose",
        help="criticality, depth-to-width ratio and learning rates of an MLP",
        description="Diagnose an MLP trained by torch.optim.SGD with one learning rate eta for all parameters.",
    )
    check.add_argument("--widths", type=int, nargs="+", required=True, help="n_0 n_1 ... n_L")
    check.add_argument("--activation", default="tanh", help=f"one of {names} (default %(default)s)")
    check.add_argument("--C_b", type=float, nargs="+", default=[0.0], help="bias variance, one value or one a layer")
    check.add_argument("--C_W", type=float, nargs="+", default=[1.0], help="n_in * weight variance, one or one a layer")
    check.add_argument("--json", action="store_true", help="print JSON")

    report = commands.add_parser("report", help="one HTML file of measured against theory, from the runs' eft.jsonl")
    report.add_argument(
        "runs", nargs="+", metavar="RUN", help="a log directory, searched for eft.jsonl, or such a file"
    )
    report.add_argument("--out", default="report.html", help="the file to write (default %(default)s)")
    return parser


def _demo(options: argparse.Namespace) -> int:
    from torch_eft.demo import run_demo

    run_demo(
        width=options.width,
        depth=options.depth,
        activation=options.activation,
        steps=options.steps,
        logdir=options.logdir,
        seed=options.seed,
    )
    return 0


def _report(options: argparse.Namespace) -> int:
    from torch_eft.report import write_report

    print(write_report(options.runs, options.out))
    return 0


def _diagnose(options: argparse.Namespace) -> int:
    ensemble = MLPEnsemble(
        options.widths,
        options.activation,
        C_b=options.C_b if len(options.C_b) > 1 else options.C_b[0],
        C_W=options.C_W if len(options.C_W) > 1 else options.C_W[0],
        lambda_W=options.widths[:-1],
    )
    diagnosis = diagnose(ensemble)
    print(json.dumps(diagnosis.to_dict(), indent=2) if options.json else diagnosis)
    return 0
