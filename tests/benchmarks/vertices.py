"""Cost of the 1/n statistics on digits. Run by hand: python -m tests.benchmarks.vertices [scaling.png]

One vertex over (8 probe, 8 probe, 64, 64) labels, one over all 64^4 in tiles, and all fifteen statistics at N = 8;
tanh 64-128-128-10, medians of three. With a file name, the time of one vertex against N, L and the sample size
is drawn as well.
"""

import resource
import statistics
import sys
import time

import torch

from torch_eft.cli.demo import load_digits_split
from torch_eft.theory import STATISTICS, MLPEnsemble, initial_statistics, vertex_block, vertex_tiles


def median_seconds(action, rounds=3):
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        action()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def main():
    x_train, _, x_probe = load_digits_split(64, 8)
    x = torch.cat([x_probe, x_train]).double()
    ensemble = MLPEnsemble([64, 128, 128, 10], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3)
    probe, train = torch.arange(8), torch.arange(8, 72)
    sets = {"x": probe, "y": probe, "g": train, "d": train}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, samples = 4096 in two replicas")
    for name in ("V", "A", "B", "D", "F", "P", "Q", "R", "S", "T", "U"):
        block = vertex_block(ensemble, x, name=name, labels="xygd", label_sets=sets)
        seconds = median_seconds(lambda name=name: vertex_block(ensemble, x, name=name, labels="xygd", label_sets=sets))
        relative = block.error / float(block.value.square().mean().sqrt())
        print(f"{name} on (8, 8, 64, 64): {seconds:.2f} s, relative standard error {relative:.1e}")
    seconds = median_seconds(lambda: initial_statistics(ensemble, x[:8], statistics=STATISTICS))
    print(f"all fifteen at N = 8, samples = 16384: {seconds:.2f} s")
    begun = time.perf_counter()
    count = sum(1 for _ in vertex_tiles(ensemble, x[8:], name="T"))
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"T over 64^4 labels in {count} tiles: {seconds:.0f} s, peak memory of the process {peak:.2f} GiB")
    if len(sys.argv) > 1:
        draw_scaling(x, sys.argv[1])


def draw_scaling(x, path):
    """Seconds of R on (8, 8, N, N) labels against N, L and S, and its relative error against S."""
    from matplotlib import pyplot

    def cost(count, depth, samples):
        ensemble = MLPEnsemble([64, *[128] * (depth - 1), 10], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3)
        probe, train = torch.arange(8), torch.arange(8, 8 + count)
        sets = {"x": probe, "y": probe, "g": train, "d": train}
        block = vertex_block(ensemble, x, name="R", labels="xygd", label_sets=sets, num_samples=samples)
        seconds = median_seconds(
            lambda: vertex_block(ensemble, x, name="R", labels="xygd", label_sets=sets, num_samples=samples)
        )
        return seconds, block.error / float(block.value.square().mean().sqrt())

    sweeps = {
        "N, training inputs": ([8, 16, 32, 64], lambda v: (v, 3, 2048)),
        "L, layers": ([2, 3, 4, 6], lambda v: (16, v, 2048)),
        "S, samples": ([512, 2048, 8192, 32768], lambda v: (16, 3, v)),
    }
    figure, axes = pyplot.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    for axis, (name, (values, arguments)) in zip(axes, sweeps.items(), strict=False):
        found = [cost(*arguments(value)) for value in values]
        axis.loglog(values, [seconds for seconds, _ in found], "o-")
        axis.set(xlabel=name, ylabel="seconds", title="R on (8, 8, N, N) labels")
        axis.set_xticks(values, [str(value) for value in values])
        axis.xaxis.minorticks_off()
        print(name, ", ".join(f"{v}: {t:.2f} s, error {e:.1e}" for v, (t, e) in zip(values, found, strict=True)))
    axes[3].loglog(values, [error for _, error in found], "o-")
    axes[3].set(xlabel="S, samples", ylabel="relative standard error", title="error of R")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
