"""A thousand measurements in one run: memory, open files and threads are what they were after the first hundred.

The run has a process of its own: in one that has done other work before, the allocator's pools grow at any time.
"""

import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
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


def run(directory):
    """What the process holds after each hundred measurements, before the run and at its end; and what was recorded."""
    torch.set_num_threads(1)
    before = threading.active_count()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observer, held = observed_training(directory, "standard", MEASUREMENTS)
    numbers = sum(map(len, observer.history.values()))
    return {
        "steps": len(observer.history),
        "numbers": numbers,
        "held": list(held.items()),
        "threads": [before, threading.active_count()],
    }


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_thousand_measurements_leave_nothing_behind(tmp_path):
    command = [sys.executable, "-m", "tests.reliability.test_soak", str(tmp_path)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    found = json.loads(printed.stdout.splitlines()[-1])
    assert found["steps"] == MEASUREMENTS + 1
    for step, (memory, files, threads, tasks) in found["held"]:
        print(f"{step:5d} measurements: {memory:7.1f} MiB resident, {files} files, {threads} threads, {tasks} tasks")
    late = [held for step, held in found["held"] if step >= WARM]
    assert len({tuple(held[1:]) for held in late}) == 1, late
    # The history is what may grow: 100 bytes a number (float, its place in a dictionary, some copies in parts). Memory
    # pools grow in steps of up to some MiB, once; what is not given back shows in every hundred.
    allowed = found["numbers"] / MEASUREMENTS * 100 * 100 / 2**20
    memory = [held[0] for held in late]
    hundred = statistics.median(later - earlier for earlier, later in itertools.pairwise(memory))
    assert hundred <= allowed, late
    assert memory[-1] - memory[0] <= 16.0, late
    before, after = found["threads"]
    assert after <= before + 1  # the writer's, until the process ends


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]))))
