"""The law of one network's drift: seconds and memory for images of digits, each case in a process of its own.

python -m tests.benchmarks.drift [16 | 64 | 1000]
"""

import resource
import subprocess
import sys
import time

import torch

from tests.benchmarks.trajectories import digits
from torch_eft import Training, theory

CASES = {"16": (8, 2.0, 2.0, 2**31), "64": (8, 6.0, 2.0, 2**31), "1000": (2, 300.0, 3.0, 2**30)}
"""Probe images, seconds and GiB that are the bar, bytes allowed, by the number of training images."""


def measure(train: int, probes: int, seconds: float, memory: float, allowed: int) -> None:
    torch.set_num_threads(1)
    x_probe, x_train, y = digits(train, 10)
    ensemble = theory.MLPEnsemble([64, 256, 256, 10], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3)
    Theta = theory.initial_statistics(ensemble, x_train, statistics=("K", "Theta"))[-1].Theta
    rate = 0.5 / float(torch.linalg.eigvalsh(Theta)[-1])
    training = Training(learning_rate=rate, steps=60, reduction="sum")
    begun, spent = time.perf_counter(), time.process_time()
    at = {"at_steps": [0, 10, 30, 60], "hidden_ntk": False, "memory": allowed}
    law = theory.predict_drift(ensemble, x_train, y, x_probe[:probes], training, **at)
    took, spent = time.perf_counter() - begun, time.process_time() - spent
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"N = {train}, N_p = {probes}: {took:.1f} s, {spent:.1f} s of a core (bar {seconds:g} s), peak {peak:.2f} "
        f"GiB (bar {memory:g} GiB), rms drift {float(law.ntk.relative_rms[-1]):.3g} +- {100 * law.error['ntk']:.1g} %",
        flush=True,
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]), *CASES[sys.argv[1]])
    else:
        for name in CASES:
            subprocess.run([sys.executable, "-m", "tests.benchmarks.drift", name], check=True)
