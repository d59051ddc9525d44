"""K and Theta of networks composed at random, theory against networks drawn. Run by hand:

    python -m tests.benchmarks.random_architectures [--networks 200] [--seeds 200] [--width 256]

One line a network: the largest |z| of its entries of K and Theta. Four entries each and 200 networks: |z| = 4 is the
largest to expect of the right theory.
"""

import argparse
import time

from tests.theory.architecture.random_networks import z_scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--width", type=int, default=256)
    given = parser.parse_args()
    largest = 0.0
    for seed in range(given.networks):
        begun = time.perf_counter()
        scores, found = z_scores(seed, given.seeds, given.width)
        largest = max(largest, *scores.values())
        kind = "drawn" if "Theta" in found.error else "closed"
        line = ", ".join(f"{name} {score:.2f}" for name, score in scores.items())
        print(f"{seed:4d} {kind:6s} |z|: {line}; {time.perf_counter() - begun:.1f} s", flush=True)
    print(f"largest |z| of {given.networks} networks: {largest:.2f}")


if __name__ == "__main__":
    main()
