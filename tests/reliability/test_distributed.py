"""DistributedDataParallel on 2 processes: a monitor leaves the weights as they are, logs once, and fails alone."""

import json
import os
import socket
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest

pytestmark = [pytest.mark.reliability, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
LIMIT = 100  # seconds, after which a training that hangs is ended
TIMEOUT = 24  # seconds, that of the process group
STEPS = [0, 2, 4, 6]  # 24 samples in batches of 8, on 2 ranks: 2 steps an epoch


class Switch:
    """An output function that fails once it is thrown."""

    thrown, slow = False, True

    def __call__(self, outputs):
        if self.thrown:
            time.sleep(TIMEOUT / 4 + 0.2 if self.slow else 0)
            self.slow = False
            raise RuntimeError("thrown")
        return outputs


def trainings(directory):
    """What one rank is left with after each training; run by ``python -m`` in every process."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.strategies import DDPStrategy

    from tests.callbacks.trainings import dataset
    from tests.reliability.runs import left_behind, train
    from torch_eft.callbacks import EFTMonitor

    torch.set_num_threads(1)
    probe = dataset()[:6][0]

    class Throws(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            switch.thrown = trainer.is_global_zero and trainer.global_step >= 3

    found = {}
    for case in ("without", "with", "failing"):
        switch = Switch()
        monitor = EFTMonitor(probe, budget=None, output_fn=switch)
        logger = TensorBoardLogger(directory, name="", version=case)
        callbacks = {"without": [], "with": [monitor], "failing": [Throws(), monitor]}[case]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            strategy = DDPStrategy(timeout=timedelta(seconds=TIMEOUT))
            trainer, module = train(callbacks, strategy=strategy, devices=2, logger=logger)
        found[case] = {
            "left behind": left_behind(trainer, module),
            "parameters": [p.detach().double().sum().item() for p in module.parameters()],
            "of the timeout": sum("a quarter of the 24 s" in str(each.message) for each in told),
            "steps": trainer.global_step,
            "measured": sorted(monitor.history),
            "skipped": [step for step, _ in monitor.skipped],
        }
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.reliability.test_distributed", str(directory)]
    processes = []
    try:
        for rank in ("0", "1"):
            with (directory / f"log{rank}").open("w") as log:
                environment = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}
                processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
        for rank, process in enumerate(processes):
            assert process.wait(LIMIT) == 0, (directory / f"log{rank}").read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return directory, [json.loads((directory / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_bits_of_a_training_with_a_monitor(ranks):
    _, found = ranks
    for rank in found:
        assert rank["with"]["left behind"] == rank["without"]["left behind"]
        assert rank["with"]["steps"] == STEPS[-1]
    assert found[0]["with"]["parameters"] == found[1]["with"]["parameters"]
    # The ranks saw other data, so that the hashes can tell runs apart.
    assert found[0]["with"]["left behind"] != found[1]["with"]["left behind"]


def test_failing_measurement_of_one_rank(ranks):
    _, found = ranks
    for rank in found:
        assert rank["failing"]["left behind"] == rank["without"]["left behind"]
        assert rank["failing"]["steps"] == STEPS[-1]
    assert found[0]["failing"]["skipped"] and not found[1]["failing"]["skipped"]
    assert found[0]["failing"]["measured"] == STEPS[:2]


def test_warning_of_the_timeout(ranks):
    _, found = ranks
    assert [rank["failing"]["of the timeout"] for rank in found] == [1, 0]
    assert [rank["with"]["of the timeout"] for rank in found] == [0, 0]


def test_logged_once(ranks):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory, found = ranks
    assert found[0]["with"]["measured"] == STEPS and found[1]["with"]["measured"] == []
    assert len(list(directory.rglob("with/eft*.jsonl"))) == 1
    events = EventAccumulator(str(directory / "with"), size_guidance={"scalars": 0}).Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("eft")]
    assert names
    for name in names:
        steps = [event.step for event in events.Scalars(name)]
        assert len(set(steps)) == len(steps), name


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / f"{os.environ['RANK']}.json").write_text(json.dumps(trainings(place)))
