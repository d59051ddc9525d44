"""Default PyTorch MLPs: epsilon and the NTK's spread from seed to seed as predicted, beside drawn networks.

    python -m tests.benchmarks.default_initialization [--networks 2000] [--width 16 --width 64] [--depth 2 ..]

One line for a cell: relative deviations of the predicted variance and of the predicted standard deviation of the NTK,
the standard errors of what is drawn, and what the theory says of its own validity.
"""

import argparse
import math

import torch

from tests.oracles.drawn_networks import networks, relative_variance
from torch_eft.theory import MLPEnsemble, seed_spread

DEPTHS, WIDTHS, ACTIVATIONS = (2, 3, 4, 6, 8, 10, 14, 20), (16, 64, 256), ("tanh", "relu", "gelu")
INPUTS, OUTPUTS = 16, 2


def default(depth, width, activation):
    """As a stack of ``nn.Linear`` draws its weights and biases, with one learning rate for all parameters."""
    widths = [INPUTS, *[width] * (depth - 1), OUTPUTS]
    options = {"C_b": [1 / (3 * n) for n in widths[:-1]], "C_W": 1 / 3, "lambda_W": widths[:-1]}
    return MLPEnsemble(widths, activation, weight_law="uniform", bias_law="uniform", **options)


def drawn_spread(ensemble, x, count):
    """Relative variances of G and of H_ii with their standard errors."""
    chunk = max(20, min(count, 2 * 10**7 // (max(ensemble.widths) ** 2 * ensemble.depth)))
    G, H = [], []
    for start in range(0, count, chunk):
        _, some, kernel = networks(ensemble, x, min(chunk, count - start), seed=start)
        G.append(some)
        H.append(kernel[:, 0, 0])
    return relative_variance(torch.cat(G)), relative_variance(torch.cat(H))


def cell(depth, width, activation, count):
    """What is predicted over what is drawn, less 1: of epsilon and of the NTK's standard deviation; their errors."""
    ensemble = default(depth, width, activation)
    x = torch.randn(INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (epsilon, epsilon_error), (ntk, ntk_error) = drawn_spread(ensemble, x, count)
    spread = seed_spread(ensemble, x[None])
    off = spread.output_variance**2 / epsilon - 1, spread.ntk / math.sqrt(ntk) - 1
    return off, (epsilon_error / epsilon, ntk_error / ntk / 2), spread.validity.flag


def main():
    """Print the grid and its worst valid cells."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", type=int, default=2000)
    parser.add_argument("--width", type=int, action="append")
    parser.add_argument("--depth", type=int, action="append")
    arguments = parser.parse_args()
    beyond = []
    for width in arguments.width or WIDTHS:
        for depth in arguments.depth or DEPTHS:
            for activation in ACTIVATIONS:
                off, errors, flag = cell(depth, width, activation, arguments.networks)
                line = f"n = {width:3d}  L = {depth:2d}  {activation:4s}  {flag:8s}" + "".join(
                    f"  {name} {100 * value:+6.1f} % (s.e. {100 * error:.1f})"
                    for name, value, error in zip(("epsilon", "NTK sd"), off, errors, strict=True)
                )
                print(line, flush=True)
                over = any(abs(value) > 0.1 + 2 * error for value, error in zip(off, errors, strict=True))
                if flag == "valid" and over:
                    beyond.append(line)
    print(f"{len(beyond)} valid cells beyond 10 % and two standard errors", *beyond, sep="\n")


if __name__ == "__main__":
    main()
