"""Time and memory of the forecast at order 1/n on digits. Run by hand: python -m tests.benchmarks.trajectories [what]

``drift`` and ``mean``: 64 training images, 8 probes, ten outputs, 60 steps of gradient descent, tanh 64-128-128-10;
``wide``: the same with 100 outputs; ``many``: the NTK drift for 1,000 training images. Each in a process of its own, so
that the peak memory is its own.
"""

import resource
import subprocess
import sys
import time

import torch

from torch_eft import Training
from torch_eft.theory import MLPEnsemble, initial_statistics
from torch_eft.theory.training.corrections.finite_width import FiniteWidthTraining
from torch_eft.theory.training.infinite_width import FrozenTraining


def digits(train, outputs):
    from sklearn.datasets import load_digits

    table = load_digits()
    x = torch.tensor(table.data[: train + 8], dtype=torch.float64)
    x = x - x[:train].mean(0)
    x = x / x.norm(dim=1, keepdim=True) * 8
    y = torch.nn.functional.one_hot(torch.tensor(table.target[:train]), outputs).double()
    return x[train:], x[:train], y


def case(train, outputs, samples):
    x_probe, x_train, y = digits(train, outputs)
    ensemble = MLPEnsemble([64, 128, 128, outputs], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3)
    Theta = initial_statistics(ensemble, x_train, statistics=("K", "Theta"))[-1].Theta
    rate = 0.5 / float(torch.linalg.eigvalsh(Theta)[-1])
    training = Training(learning_rate=rate, steps=60, reduction="sum")
    return FiniteWidthTraining(FrozenTraining(ensemble, x_train, y, x_probe, training), num_samples=samples)


def report(name, train, outputs, samples, what):
    begun, spent = time.perf_counter(), time.process_time()
    finite = case(train, outputs, samples)
    value, error = what(finite)
    size = float(value.square().mean().sqrt())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{name}: {time.perf_counter() - begun:.1f} s, {time.process_time() - spent:.1f} s of CPU on "
        f"{torch.get_num_threads()} threads, peak {peak:.2f} GiB, samples {samples}, sampling error / rms "
        f"{error / size:.1e}",
        flush=True,
    )


def record(correction):
    return correction.value, correction.error


STEPS = torch.arange(61)
CASES = {
    "drift": lambda: report("NTK drift, 64 images", 64, 10, 4096, lambda f: record(f.ntk_change(STEPS))),
    "mean": lambda: report("mean output, 64 images", 64, 10, 4096, lambda f: record(f.mean_output(STEPS))),
    "wide": lambda: report("NTK drift, 100 outputs", 64, 100, 4096, lambda f: f.ntk_trace_drift(STEPS)),
    "many": lambda: report("NTK drift, 1,000 images", 1000, 10, 4096, lambda f: f.ntk_trace_drift(STEPS[::20])),
}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        CASES[sys.argv[1]]()
    else:
        for name in CASES:
            subprocess.run([sys.executable, "-m", "tests.benchmarks.trajectories", name], check=True)
