"""Small runs on disk, as the callbacks write them, with numbers that a test can foretell."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from torch_eft.live import TensorBoardSink
from torch_eft.tensorboard.run_info import JSONL_NAME, dump_json, write_run_info

STEPS = (0, 1, 2, 5, 10, 20)


def drift(step: int, scale: float) -> dict[str, float]:
    """Measured is one sigma above order 1, everywhere: z = 1."""
    order_1 = scale * step
    return {
        "eft/ntk_drift/measured": order_1 + 0.5,
        "eft-theory/ntk_drift/order_0": 0.0,
        "eft-theory/ntk_drift/order_1": order_1,
        "eft-theory/ntk_drift/minus_sigma": order_1 - 0.5,
        "eft-theory/ntk_drift/plus_sigma": order_1 + 0.5,
        "eft/ntk_top_eigenvalue/measured": 300.0 + step,
        "eft-theory/replay_output_error/order_1": 1.5,
        "eft-theory/replay_output_error/order_3": 0.02,
        "eft-layers/taylor_terms/order_2": 0.01 * step,
    }


def run_info(**changes):
    """A run info; ``changes`` replace its entries."""
    return {
        "network": "MLP 64-128-128-10, tanh",
        "depth": 3,
        "width": 128.0,
        "r": 0.0234375,
        "epsilon": 0.0095,
        "regime": "0 < r << 1",
        "criticality": "critical",
        "parameters": 26122,
        "probe": [16, 10],
        "optimizer": "SGD",
        "level": "ensemble, order 1",
        "validity": {"flag": "valid", "reason": "the terms of order 1/n are small"},
        "diagnosis": "### An MLP\n\n- **critical**\n\n| layer | C_W |\n|---|---|\n| 1 | 1 |\n",
        "quantities": {
            "ntk_drift": {
                "title": "NTK drift",
                "formula": "||H - H_0|| / ||H_0||",
                "unit": "1",
                "source": "PDLT 11.2",
                "at_infinite_width": "0: the NTK is frozen",
            }
        },
        "events": [{"step": 5, "quantity": "ntk_drift", "text": "it left its band"}],
        "skipped": [],
        **changes,
    }


def write_run(directory: Path, scale: float = 0.1, info: dict | None = None, steps=STEPS) -> SummaryWriter:
    """Event files and ``eft.jsonl`` of a run; returns the open writer, flushed."""
    writer = SummaryWriter(str(directory))
    with open(directory / JSONL_NAME, "a", encoding="utf-8") as lines:
        if info is not None:
            write_run_info(writer, info)
            lines.write(dump_json({"kind": "run", "schema": 1, **info}) + "\n")
        for step in steps:
            scalars = drift(step, scale)
            TensorBoardSink(writer).scalars(step, scalars)
            lines.write(
                dump_json({"kind": "measurement", "step": step, "epoch": 0, "time": 0.0, "scalars": scalars}) + "\n"
            )
    writer.flush()
    return writer


def write_scalars(directory: Path, scalars, info: dict, steps=range(5)) -> None:
    """``eft.jsonl`` of a run whose ``scalars(step)`` are given."""
    directory.mkdir()
    lines = [{"kind": "run", "schema": 1, **info}]
    lines += [{"kind": "measurement", "step": step, "scalars": scalars(step)} for step in steps]
    (directory / JSONL_NAME).write_text("".join(dump_json(line) + "\n" for line in lines))
