"""Training on 2 processes: a monitor leaves the weights as they are, logs once, and fails without harm.

DistributedDataParallel, measured by rank 0 or by both ranks together; FSDP2, measured through a plain twin.
"""

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
LIMIT = 300  # seconds, after which a training that hangs is ended
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
        def __init__(self, rank):
            self.rank = rank

        def on_train_batch_end(self, trainer, *_):
            switch.thrown = trainer.global_rank == self.rank and trainer.global_step >= 3
            switch.slow = switch.slow and self.rank == 0

    found = {}
    for case, callbacks_of, distributed in (
        ("without", lambda monitor: [], "rank_zero"),
        ("with", lambda monitor: [monitor], "rank_zero"),
        ("failing", lambda monitor: [Throws(0), monitor], "rank_zero"),
        ("probe's statistics", lambda monitor: [monitor], "rank_zero"),
        ("sharded", lambda monitor: [monitor], "sharded"),
        ("rank 1 fails", lambda monitor: [Throws(1), monitor], "sharded"),
        ("thinned", lambda monitor: [monitor], "sharded"),
    ):
        switch = Switch()
        budget, every = (1e-9, 1) if case == "thinned" else (None, "epoch")
        monitor = EFTMonitor(probe, every=every, budget=budget, output_fn=switch, distributed=distributed)
        logger = TensorBoardLogger(directory, name="", version=case)
        callbacks = callbacks_of(monitor)
        if case == "probe's statistics":
            monitor.observer.observe_batch = lambda batch: None
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
            "skipped": monitor.skipped,
            "drift": [scalars.get("eft/ntk_drift/measured") for _, scalars in sorted(monitor.history.items())],
        }
    return found


def sharded_parameters():
    """The same of a training by FSDP2, without a monitor and measured through a twin, by one rank or both."""
    import torch
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    from tests.callbacks.trainings import dataset, plain_sgd, simple_mlp
    from tests.reliability.runs import Watched, train
    from torch_eft.callbacks import EFTMonitor
    from torch_eft.measure import ntk

    class Sharded(Watched):
        def configure_model(self):
            for layer in (*(each for each in self.net if isinstance(each, torch.nn.Linear)), self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def seeded():
        torch.manual_seed(0)
        return simple_mlp()

    probe, found = dataset()[:5][0], {}
    for case in ("without", "rank_zero", "sharded", "no twin"):
        distributed = "sharded" if case == "sharded" else "rank_zero"
        twin = None if case in ("without", "no twin") else seeded()
        monitor = EFTMonitor(probe, every=2, budget=None, module="net", distributed=distributed, unsharded_model=twin)
        options = {"kind": Sharded, "net": seeded, "optimizer": plain_sgd, "strategy": ModelParallelStrategy(2, 1)}
        try:
            _, module = train([] if case == "without" else [monitor], devices=2, **options)
        except ValueError as error:
            found[case] = str(error)
            continue
        whole = [p.full_tensor() for p in module.net.parameters()]
        first, last = seeded(), seeded()
        for p, value in zip(last.parameters(), whole, strict=True):
            p.data.copy_(value)
        H_0, H = ntk(first, probe), ntk(last, probe)
        found[case] = {
            "parameters": [p.double().sum().item() for p in whole],
            "seen": module.seen,
            "random": torch.get_rng_state().sum().item(),
            "drift": monitor.history.get(6, {}).get("eft/ntk_drift/measured"),
            "measured": sorted(monitor.history),
            "expected": ((H - H_0).norm() / H_0.norm()).item(),
            "skipped": monitor.skipped,
            "validity": str(monitor.validity),
        }
    return found


def bare_loop(directory):
    """A loop without Lightning, which calls the observer on every rank."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from tests.callbacks.trainings import dataset, simple_mlp
    from torch_eft.live import Observer

    x, y = dataset().tensors
    found = {}
    for case in ("without", "rank_zero", "sharded"):
        torch.manual_seed(0)
        net = simple_mlp()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        logdir, distributed = directory / f"bare {case}", "sharded" if case == "sharded" else "rank_zero"
        options = {"every": 2, "budget": None, "logdir": logdir, "distributed": distributed}
        observer = None if case == "without" else Observer(net, x[:5], optimizer, **options)
        trained = DistributedDataParallel(net)
        if observer is not None:
            observer.begin(total_steps=6)
        for step in range(1, 7):
            rows = torch.randperm(24)[torch.distributed.get_rank() :: 2]
            loss = torch.nn.functional.mse_loss(trained(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if observer is not None:
                observer.measure(step)
        if observer is not None:
            observer.finish()
        found[case] = {
            "parameters": [p.detach().double().sum().item() for p in net.parameters()],
            "drift": {} if observer is None else {k: v["eft/ntk_drift/measured"] for k, v in observer.history.items()},
            "skipped": [] if observer is None else observer.skipped,
        }
    return found


def each_its_own():
    """Steps measured where every process trains a network of its own, beside a process group of something else."""
    from tests.callbacks.trainings import dataset, plain_sgd, simple_mlp
    from tests.reliability.runs import train
    from torch_eft.callbacks import NTKMonitor

    monitor = NTKMonitor(dataset()[:5][0], every="epoch", budget=None, distributed="sharded")
    train([monitor], net=simple_mlp, optimizer=plain_sgd, devices=1, strategy="auto")
    return sorted(monitor.history)


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


def test_both_ranks_measure_together(ranks):
    _, found = ranks
    for rank in found:
        for case in ("sharded", "thinned"):
            assert rank[case]["left behind"] == rank["without"]["left behind"]
            assert rank[case]["skipped"] == []
    assert found[0]["sharded"]["measured"] == STEPS and found[1]["sharded"]["measured"] == []
    # Normalized with the statistics of the probe: the ranks see different batches. Measured in float32, in another
    # order: a relative drift is off by some units of 1.2e-7.
    assert found[0]["sharded"]["drift"] == pytest.approx(found[0]["probe's statistics"]["drift"], abs=8 * 1.2e-7)
    assert min(found[0]["sharded"]["drift"][1:]) > 1e-2
    # Due at every step, and so few are made at any budget, on both ranks.
    assert found[0]["thinned"]["measured"] == list(range(STEPS[-1] + 1))


def test_rank_1_fails_in_a_measurement_of_both(ranks):
    _, found = ranks
    for rank in found:
        assert rank["rank 1 fails"]["left behind"] == rank["without"]["left behind"]
        assert rank["rank 1 fails"]["steps"] == STEPS[-1]
    first, second = ([text for _, text in rank["rank 1 fails"]["skipped"]] for rank in found)
    assert first and all("rank 1 failed" in text for text in first)
    assert second and all("thrown" in text for text in second)
    assert found[0]["rank 1 fails"]["measured"] == STEPS[:2]


def test_sharded_parameters_are_measured_through_a_twin(ranks):
    _, (first, second) = ranks
    for distributed in ("rank_zero", "sharded"):
        for rank in (first, second):
            found, without = rank["FSDP2"][distributed], rank["FSDP2"]["without"]
            assert [found[what] for what in ("parameters", "seen", "random")] == [
                without[what] for what in ("parameters", "seen", "random")
            ]
            assert found["skipped"] == []
        found = first["FSDP2"][distributed]
        assert found["measured"] == STEPS and second["FSDP2"][distributed]["measured"] == []
        assert found["drift"] == pytest.approx(found["expected"], abs=8 * 1.2e-7) and found["drift"] > 1e-3
        assert "2 processes share the batch" in found["validity"]


def test_sharded_parameters_without_a_twin_are_refused_before_training(ranks):
    _, found = ranks
    for rank in found:
        assert "sharded" in rank["FSDP2"]["no twin"] and "unsharded_model=" in rank["FSDP2"]["no twin"]


def test_a_bare_loop_calls_the_observer_on_every_rank(ranks):
    directory, found = ranks
    for rank, here in enumerate(found):
        for case in ("rank_zero", "sharded"):
            assert here["bare"][case]["parameters"] == here["bare"]["without"]["parameters"]
            assert here["bare"][case]["skipped"] == []
            assert list(here["bare"][case]["drift"]) == (["0", "2", "4", "6"] if rank == 0 else [])
    alone, together = (list(found[0]["bare"][case]["drift"].values()) for case in ("rank_zero", "sharded"))
    assert together == pytest.approx(alone, abs=8 * 1.2e-7) and min(alone[1:]) > 1e-3
    for case in ("rank_zero", "sharded"):
        assert len(list((directory / f"bare {case}").glob("events*"))) == 1


def test_processes_that_train_each_its_own_network_measure_each_its_own(ranks):
    _, found = ranks
    assert [rank["each its own"] for rank in found] == [[0, 3, 6, 9]] * 2


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
        steps = [event.step for event in events.Scalars(name) if event.step > 0]
        assert len(set(steps)) == len(steps), name  # theta_0 is measured anew with the first training batches


if __name__ == "__main__":
    place = Path(sys.argv[1])
    results = {**trainings(place), "FSDP2": sharded_parameters(), "bare": bare_loop(place)}
    results["each its own"] = each_its_own()
    (place / f"{os.environ['RANK']}.json").write_text(json.dumps(results))
