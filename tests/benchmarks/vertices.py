"""Cost of the 1/n statistics on digits. Run by hand: python -m tests.benchmarks.vertices

One vertex over (8 probe, 8 probe, 64, 64) labels, one over all 64^4 in tiles, and all fifteen statistics at N = 8;
tanh 64-128-128-10, medians of three.
"""

import resource
import statistics
import time

import torch

from torch_eft.demo import load_digits_split
from torch_eft.theory import QUANTITIES, MLPEnsemble, block, initial_statistics, tiles


def median_seconds(action, rounds=3):
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        action()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def main():
    x_train, _, x_probe = load_digits_split()
    x = torch.cat([x_probe[:8], x_train]).double()
    ensemble = MLPEnsemble([64, 128, 128, 10], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3)
    probe, train = torch.arange(8), torch.arange(8, 72)
    sets = {"x": probe, "y": probe, "g": train, "d": train}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, samples = 4096 in two replicas")
    for name in ("V", "A", "B", "D", "F", "P", "Q", "R", "S", "T", "U"):
        value, error = block(ensemble, x, name, "xygd", sets)
        seconds = median_seconds(lambda name=name: block(ensemble, x, name, "xygd", sets))
        relative = error / float(value.square().mean().sqrt())
        print(f"{name} on (8, 8, 64, 64): {seconds:.2f} s, relative standard error {relative:.1e}")
    seconds = median_seconds(lambda: initial_statistics(ensemble, x[:8], QUANTITIES))
    print(f"all fifteen at N = 8, samples = 16384: {seconds:.2f} s")
    begun = time.perf_counter()
    count = sum(1 for _ in tiles(ensemble, x[8:], "T"))
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"T over 64^4 labels in {count} tiles: {seconds:.0f} s, peak memory of the process {peak:.2f} GiB")


if __name__ == "__main__":
    main()
