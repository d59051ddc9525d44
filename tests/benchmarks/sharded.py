"""A kernel by one process and by several together. Run by hand: python -m tests.benchmarks.sharded [--processes 2]

Every process has one thread. Wall-clock seconds and processor seconds of the busiest process, medians of the rounds,
the two ways in turn; on a machine that others use, only the processor's count.
"""

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from torch import nn

from tests.reliability.processes import spread
from torch_eft import measure
from torch_eft.measure.network.sharded import sharded_ntk


def workload(name, samples):
    torch.manual_seed(0)
    if name == "convolutional":
        net = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 64, 10),
        )  # fmt: skip
        return net, torch.randn(samples // 4, 3, 16, 16)
    widths = (784, 1024, 1024, 10)
    layers = [part for n, m in zip(widths, widths[1:], strict=False) for part in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1]), torch.randn(samples, 784)


def timed(action):
    dist.barrier()
    wall, own = time.perf_counter(), time.process_time()
    action()
    own = time.process_time() - own
    dist.barrier()
    return time.perf_counter() - wall, own


def work(rank, name, samples, rounds):
    net, x = workload(name, samples)
    ways = {"together": lambda: sharded_ntk(net, x), "alone": lambda: measure.ntk(net, x) if rank == 0 else None}
    for action in ways.values():
        action()
    found = {way: [] for way in ways}
    for _ in range(rounds):
        for way, action in ways.items():
            found[way].append(timed(action))
    return {way: [statistics.median(column) for column in zip(*times, strict=True)] for way, times in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=256, help="of the perceptron; the other has a quarter")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    for name in ("perceptron", "convolutional"):
        ranks = spread(given.processes, work, name, given.samples, given.rounds)
        alone, together = ranks[0]["alone"], [max(rank["together"][i] for rank in ranks) for i in (0, 1)]
        print(
            f"{name}: alone {alone[0]:.3f} s ({alone[1]:.3f} s of processor), {given.processes} together "
            f"{together[0]:.3f} s ({together[1]:.3f} s each): {alone[0] / together[0]:.2f} times faster "
            f"({alone[1] / together[1]:.2f} by processor time)"
        )
