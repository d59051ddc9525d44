"""What the check against ordinary passes costs a visit: python -m tests.benchmarks.check [WORKLOAD ...]

CPU time of one NTK with and without it, and the difference in units of one forward and backward pass of the probe: the
check takes one, and half a forward for the samples' independence.
"""

import sys
import time
from unittest.mock import patch

import torch

from tests.benchmarks.workloads import WORKLOADS
from torch_eft import measure
from torch_eft.measure.jacobian.engine import JacobianGram


def seconds(action, rounds=5):
    """The least CPU time of a few rounds, after one that warms up."""
    action()
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        action()
        spent.append(time.process_time() - start)
    return min(spent)


def costs(model, x):
    """Seconds with the check, without it, and of one forward and backward pass."""

    def both_passes():
        torch.autograd.grad(model(x).sum(), list(model.parameters()))

    def ntk():
        measure.ntk(model, x)

    checked = seconds(ntk)
    with patch.object(JacobianGram, "_verification", lambda *arguments: None):
        bare = seconds(ntk)
    return checked, bare, seconds(both_passes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for key in sys.argv[1:] or WORKLOADS:
        checked, bare, passes = costs(*WORKLOADS[key].build())
        print(
            f"{WORKLOADS[key].title}: {1e3 * checked:.3g} ms with the check, {1e3 * bare:.3g} ms without: "
            f"{(checked - bare) / passes:.2g} forward and backward passes"
        )
