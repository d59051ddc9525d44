"""What a kernel's check against ordinary passes costs: python -m tests.benchmarks.verification

Every NTK is compared with one ordinary forward and one backward pass of all samples. Processor time, one thread; each
round times in turn the two passes by themselves, a visit (the kernel of an isolated network) and the same visit without
its check. Medians over rounds; the cost of the check in units of the two passes, with its interquartile range.
"""

import argparse
import statistics
import time
from unittest import mock

import torch

from tests.benchmarks.workloads import WORKLOADS
from torch_eft import measure
from torch_eft.measure.jacobian.engine import JacobianGram


def passes(model, x):
    z = model(x)
    torch.autograd.grad((z * torch.randn_like(z)).sum(), list(model.parameters()))


def seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workloads", default="".join(WORKLOADS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':36} {'two passes':>11} {'visit':>9} {'unchecked':>10}  check / two passes")
    for key in options.workloads:
        model, x = WORKLOADS[key].build()
        measure.ntk(model, x)  # the plan is made
        rounds = []
        for _ in range(options.rounds):
            ordinary, visit = seconds(lambda: passes(model, x)), seconds(lambda: measure.ntk(model, x))
            with mock.patch.object(JacobianGram, "_verification", return_value=None):
                unchecked = seconds(lambda: measure.ntk(model, x))
            rounds.append((ordinary, visit, unchecked, (visit - unchecked) / ordinary))
        columns = list(zip(*rounds, strict=True))
        ordinary, visit, unchecked, cost = map(statistics.median, columns)
        low, _, high = statistics.quantiles(columns[3], n=4)
        title = WORKLOADS[key].title
        print(f"{title:36} {ordinary:9.3f} s {visit:7.3f} s {unchecked:8.3f} s  {cost:.2f} ({low:.2f} .. {high:.2f})")


if __name__ == "__main__":
    main()
