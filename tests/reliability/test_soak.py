"""A thousand measurements in one run: memory, open files and threads are what they were after the first hundred."""

import gc
import itertools
import os
import statistics
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_eft.live import Observer

WARM, MEASUREMENTS = 200, 1000


def resident():
    """Resident memory in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def state_of_the_process():
    gc.collect()
    return resident(), len(os.listdir("/proc/self/fd")), threading.active_count(), len(os.listdir("/proc/self/task"))


def observed_training(tmp_path, preset, steps):
    """What the process holds after each hundred measurements, one a step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    observer = Observer(net, x[:3], optimizer, preset=preset, every=1, budget=None, logdir=tmp_path, on_error="raise")
    observer.begin(total_steps=steps)
    held = {}
    for step in range(1, steps + 1):
        loss = F.mse_loss(net(x), y)
        observer.observe_batch((x, y))
        observer.observe_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        observer.before_step()
        optimizer.step()
        observer.measure(step)
        if step % 100 == 0:
            held[step] = state_of_the_process()
    observer.finish()
    return observer, held


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_thousand_measurements_leave_nothing_behind(tmp_path):
    before = threading.active_count()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observer, held = observed_training(tmp_path, "standard", MEASUREMENTS)
    assert len(observer.history) == MEASUREMENTS + 1
    for step, (memory, files, threads, tasks) in held.items():
        print(f"{step:5d} measurements: {memory:7.1f} MiB resident, {files} files, {threads} threads, {tasks} tasks")
    late = {step: found for step, found in held.items() if step >= WARM}
    assert len({found[1:] for found in late.values()}) == 1, held
    # The history is what may grow: 100 bytes a number (float, its place in a dictionary, some copies in parts). Memory
    # pools grow in steps of up to some MiB, once; what is not given back shows in every hundred.
    numbers = sum(map(len, observer.history.values())) * 100 / MEASUREMENTS
    memory = [found[0] for found in late.values()]
    hundred = statistics.median(later - earlier for earlier, later in itertools.pairwise(memory))
    assert hundred <= 100 * numbers / 2**20, held
    assert memory[-1] - memory[0] <= 16.0, held
    assert threading.active_count() <= before + 1  # the writer's, until the process ends
