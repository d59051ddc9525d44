"""Is the law of the drift ever confident and wrong? A grid of trained ensembles, a quarter of an hour on one core.

python -m tests.benchmarks.drift_validity [share]
"""

import itertools
import sys
from collections import Counter

import torch

from tests.theory.hierarchy.drift_grid import Laws


def main(share: float) -> None:
    torch.set_num_threads(1)
    counts, worst = Counter[str](), []
    settings = list(itertools.product(("tanh", "gelu"), (2, 3, 4), (None, 0.3, 0.1)))
    for name, depth, close in settings:
        laws = Laws(name, depth, close)
        for scale, n in itertools.product((0.3, 1.0, 3.0), (4, 8, 16, 32, 64)):
            networks = int(share * (2000 if n < 32 else 1000))
            for step, found in laws.compared(scale, n, networks).items():
                counts[found.flag] += 1
                if found.flag == "invalid":
                    continue
                counts["false confidence"] += found.beyond >= 1
                case = f"{name}, L = {depth}, inputs {close or 'unrelated'}, targets {scale:g}, n = {n}, t = {step}"
                worst.append((found.beyond, case, found))
        print(f"{name}, L = {depth}, inputs {close or 'unrelated'}: {dict(counts)}", flush=True)
    for beyond, case, found in sorted(worst, key=lambda each: -each[0])[:20]:
        print(
            f"{beyond:.2f} of what is stated: {case}: rms {found.measured:.3g} +- {found.error:.1g}, the law "
            f"{found.predicted:.3g}, said to be {found.flag} and neglects {found.neglected:.2g}"
        )
    print(f"{counts.total() - counts['false confidence']} cases: {dict(counts)}")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
