"""Time and memory of the dense NTK beside other libraries. Run by hand: python -m tests.benchmarks.ntk [options]

One process, one thread, float32. In every round each contender runs once, so that a busy machine slows all alike;
what is given is process time, median [least..most]. "step" is one forward and backward on the same batch. "first" is
the first call, which plans, verifies and loads lazily. A peer's H is compared with ours before it is timed.

Peak memory is the growth of the resident set during one call, in a process of its own: the kernel's high-water mark is
reset just before (/proc/self/clear_refs), after a call on two samples has loaded what is lazily loaded and the free
heap was returned.

On an accelerator (--device cuda) seconds are the wall clock's, waited for, memory is what its allocator held at most,
and the share is of the products' rate there. Every run keeps a JSON outside of the repository.

Options: --workloads a,b,c,d,e  --device cpu  --rounds 7  --peers torch.func,nngeometry (or none)
         --scaling file.png     N, C, width and depth around workload a
         --profile a            where the time goes, by function and by operation
"""

import argparse
import cProfile
import ctypes
import multiprocessing
import pstats
import random
import re
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from tests.benchmarks import peers
from tests.benchmarks.machine import keep, line, machine, summary
from tests.benchmarks.machine import seconds as seconds_of
from tests.benchmarks.workloads import WORKLOADS, perceptron
from torch_eft import measure

SLOW = 2.0
"""Seconds beyond which a contender sits out all but two rounds."""

_device = "cpu"


def ours(model, x):
    return measure.ntk(model, x)


def step(model, x):
    model(x).square().mean().backward()
    model.zero_grad(set_to_none=True)


def timed(action):
    return seconds_of(action, _device)


def built(key):
    """A workload's network and inputs, on the device."""
    model, x = WORKLOADS[key].build()
    return model.to(_device), x.to(_device)


def interleaved(actions, rounds):
    """Seconds of every round of every named action, in turn; after one call of each that is not counted."""
    first = {name: timed(action) for name, action in actions.items()}
    seconds = {name: [] for name in actions}
    for index in range(rounds):
        # In another order each time: a contender pays for the cache and the heap that the one before it leaves.
        for name in random.Random(index).sample(list(actions), len(actions)):
            if index < 2 or first[name] < SLOW:
                seconds[name].append(timed(actions[name]))
    return seconds, first


def spread(seconds):
    ms = sorted(1000 * value for value in seconds)
    return f"{_three(statistics.median(ms))} [{_three(ms[0])}..{_three(ms[-1])}]"


def _three(value):
    """Three significant digits, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def gemm_peak(size=2048, rounds=8):
    """FLOP/s of a square float32 product, the best of a few."""
    a, b, out = (torch.randn(size, size, device=_device) for _ in range(3))
    return 2 * size**3 / min(timed(lambda: torch.mm(a, b, out=out)) for _ in range(rounds + 1))


def minimum_flops(widths, count):
    """FLOPs of products that an exact dense NTK of an MLP cannot do without, a symmetric Gram counted half.

    2 N sum_l n_l n_{l+1} for the forward; C times as much for the backwards, without the first layer, whose inputs
    need no gradient; N^2 n_l a layer for a a^T; (N C)^2 n_{l+1} for g g^T, without the last layer, whose g is one-hot.
    """
    channels = widths[-1]
    products = [n_in * n_out for n_in, n_out in zip(widths, widths[1:], strict=False)]
    forward = 2 * count * sum(products)
    backward = 2 * count * channels * sum(products[1:])
    return forward + backward + count**2 * sum(widths[:-1]) + (count * channels) ** 2 * sum(widths[1:-1])


def peak_bytes(workload, contender):
    """Growth of the resident set in one call of ``ours`` or of a function of peers.py; run in a fresh process.

    None where Linux does not tell.
    """
    _quiet()
    model, x = WORKLOADS[workload].build()
    action = ours if contender == "ours" else getattr(peers, contender)
    action(model, x[:2])
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    before = _status("VmRSS")
    action(model, x)
    return _status("VmHWM") - before


def _status(field):
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def peak_megabytes(workload, contender):
    if torch.device(_device).type == "cuda":
        return _peak_on_device(workload, contender) / 2**20
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        peak = pool.submit(peak_bytes, workload, contender).result()
    return None if peak is None else peak / 2**20


def _peak_on_device(workload, contender):
    model, x = built(workload)
    action = ours if contender == "ours" else getattr(peers, contender)
    action(model, x[:2])
    torch.cuda.synchronize(_device)
    torch.cuda.reset_peak_memory_stats(_device)
    before = torch.cuda.memory_allocated(_device)
    action(model, x)
    torch.cuda.synchronize(_device)
    return torch.cuda.max_memory_allocated(_device) - before


DIFFERENTIALS = {"dH": ("dntk", {}), "H, dH": ("contracted", {"order": 1}), "H, dH, ddI, ddII": ("contracted", {})}
"""What is contracted with a direction: the function of ``measure`` and its arguments."""


def ntk_derivatives(model, x):
    """Those of ``DIFFERENTIALS`` that ``measure`` has, along a random e (N, C)."""
    with torch.no_grad():
        e = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(1)).to(x.device)
    return {
        title: partial(getattr(measure, name), model, x, direction=e, **options)
        for title, (name, options) in DIFFERENTIALS.items()
        if hasattr(measure, name)
    }


def row(key, rounds, names, peak, numbers):
    """One line of the table, and one of the table of differentials or None."""
    workload = WORKLOADS[key]
    model, x = built(key)
    first = timed(lambda: ours(model, x))
    H = ours(model, x)
    actions, deviations, absent, variant = (
        {"ours": lambda: ours(model, x), "step": lambda: step(model, x)},
        [],
        {},
        "torch_func",
    )
    for name in names:
        action = peers.prepare(name, model, x)
        if isinstance(action, str):
            absent[name] = action
            continue
        deviations.append(f"{float((action(model, x) - H).norm() / H.norm()):.0e}")
        actions[name] = lambda action=action: action(model, x)
        if name == "torch.func":
            variant = action.__name__
    seconds, _ = interleaved(actions, rounds)
    numbers[key] = {name: summary(values) for name, values in seconds.items()} | {"first": first}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rivals = {name: median[name] for name in names if name in median}
    best = min(rivals, key=rivals.get) if rivals else None
    memory = [peak_megabytes(key, name) for name in ("ours", variant)]
    line = [key, workload.title, spread(seconds["ours"]), _three(1000 * first), spread(seconds["step"])]
    line += [spread(seconds[name]) if name in seconds else absent[name] for name in names]
    line.append(f"**{rivals[best] / median['ours']:.2f}** ({best})" if rivals else "-")
    line.append(" / ".join("-" if value is None else f"{value:.0f}" for value in memory))
    line.append("-" if None in memory else f"{memory[0] / memory[1]:.2f}")
    line.append(", ".join(deviations) or "-")
    if workload.widths is None:
        line.append("-")
    else:
        flops = minimum_flops(workload.widths, len(x))
        line.append(f"{flops / 1e9:.2f} GF, {flops / median['ours'] / peak:.0%}")
    return line


def differentials_row(key, rounds, numbers):
    """Cost of the differentials along one direction in units of an NTK, or None where the library has none."""
    model, x = built(key)
    found = ntk_derivatives(model, x)
    if not found:
        return None
    seconds, _ = interleaved({"ntk": lambda: ours(model, x), **found}, rounds)
    numbers[f"{key}, along a direction"] = {name: summary(values) for name, values in seconds.items()}
    unit = statistics.median(seconds.pop("ntk"))
    cells = [f"{spread(times)} = **{statistics.median(times) / unit:.2f}x**" for times in seconds.values()]
    return [key, _three(1000 * unit), *cells]


def show(head, lines):
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for cells in lines:
        print("| " + " | ".join(cells) + " |", flush=True)


def header(found, peak):
    clock = "process time" if _device == "cpu" else "the wall clock"
    print(f"{line(found)}; float32 GEMM {peak / 1e9:.0f} GF/s; ms of {clock}\n")


def draw_scaling(path, peak, rounds):
    """NTK ms against N, C, width and depth, one at a time, with the time that the minimum of FLOPs would take."""
    from matplotlib import pyplot

    def network(count=64, outputs=10, width=512, hidden=3):
        return perceptron(count, [784, *[width] * hidden, outputs])

    sweeps = {
        "N, samples": ("count", [8, 16, 32, 64, 128, 256]),
        "C, outputs": ("outputs", [1, 3, 10, 30, 100]),
        "width": ("width", [64, 128, 256, 512, 1024, 2048]),
        "hidden layers": ("hidden", [1, 2, 4, 8, 16, 32]),
    }
    figure, axes = pyplot.subplots(1, 4, figsize=(17, 4.6), layout="constrained", sharey=True)
    for axis, (label, (argument, values)) in zip(axes, sweeps.items(), strict=True):
        milliseconds, bounds = [], []
        for value in values:
            workload = network(**{argument: value})
            model, x = (each.to(_device) for each in workload.build())
            seconds, _ = interleaved({"ours": lambda: ours(model, x)}, rounds)
            milliseconds.append(1000 * statistics.median(seconds["ours"]))
            bounds.append(1000 * minimum_flops(workload.widths, len(x)) / peak)
            print(f"{label} {value}: {spread(seconds['ours'])} ms, {bounds[-1] / milliseconds[-1]:.0%} of GEMM peak")
        axis.loglog(values, milliseconds, "o-", label="measure.ntk")
        axis.loglog(values, bounds, "--", color="gray", label="least FLOPs at GEMM peak")
        for value, ms, bound in zip(values, milliseconds, bounds, strict=True):
            axis.annotate(
                f"{bound / ms:.0%}", (value, ms), (0, 9), textcoords="offset points", ha="center", fontsize=12
            )
        axis.set_xlabel(label, fontsize=14)
        axis.set_xticks(values, [str(value) for value in values])
        axis.xaxis.minorticks_off()
        axis.tick_params(labelsize=12)
        axis.grid(alpha=0.3)
        axis.margins(x=0.1, y=0.12)
    axes[0].set_ylabel("ms, one thread", fontsize=14)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=13, loc="outside lower center", ncols=2)
    figure.suptitle(
        f"Dense NTK of MLP 784-512x3-10, N=64, one size varied; labels: share of the {peak / 1e9:.0f} GF/s GEMM peak",
        fontsize=15,
    )
    figure.savefig(path, dpi=110)


def profile(key, calls=5):
    """The functions and the operations that take the most time."""
    model, x = built(key)
    ours(model, x)
    recorder = cProfile.Profile()
    recorder.runcall(lambda: [ours(model, x) for _ in range(calls)])
    print(f"{calls} calls on workload {key}")
    pstats.Stats(recorder).sort_stats("tottime").print_stats(25)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as operations:
        for _ in range(calls):
            ours(model, x)
    print(operations.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=50))


def _quiet():
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # has no derivative under torch.func
    warnings.filterwarnings("ignore")


def main():
    global _device
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", default=",".join(peers.PEERS))
    parser.add_argument("--scaling", metavar="FILE")
    parser.add_argument("--profile", choices=WORKLOADS)
    options = parser.parse_args()
    _device = options.device
    _quiet()
    if options.profile:
        profile(options.profile)
        return
    found, numbers = machine(_device, ("nngeometry",)), {}
    peak = gemm_peak()
    header(found, peak)
    if options.scaling:
        draw_scaling(options.scaling, peak, options.rounds)
        return
    names = [name for name in options.peers.split(",") if name in peers.PEERS]
    keys = options.workloads.split(",")
    columns = ["", "workload", "ours ms", "first", "step ms", *(f"{name} ms" for name in names)]
    columns += ["best peer / ours", "peak MB ours / torch.func", "ratio", "deviation", "least FLOPs, of GEMM peak"]
    show(columns, (row(key, options.rounds, names, peak, numbers) for key in keys))
    rows = [line for line in (differentials_row(key, options.rounds, numbers) for key in keys) if line]
    if rows:
        print("\nContracted with one direction in the space of outputs: ms, and in units of one NTK\n")
        show(["", "H", *DIFFERENTIALS], rows)
    else:
        print("\nmeasure has no contracted differentials")
    keep("ntk", found, numbers | {"GEMM": peak})


if __name__ == "__main__":
    main()
