"""Depth over width decides: three regimes, r -> 0, 0 < r << 1 and r ~ 1, predicted before anything is drawn.

Critical networks of many depths and widths are drawn again and again, and their NTK on one input is measured. What the
diagnosis of the architecture alone predicts for its spread from seed to seed is drawn beside it: exactly at any width
for ReLU, to order 1/n for tanh. On the right, the NTKs of single networks, one regime a color: all alike, alike within
some percent, and different by orders of magnitude.

Run: python examples/depth_to_width.py [--networks 300] [--figure depth_to_width.png]
"""

import argparse
import itertools
import math

import torch
from matplotlib import pyplot
from torch import nn

import torch_eft as eft

SHAPES = ((2, 1200), (2, 300), (3, 128), (4, 64), (6, 48), (8, 32), (12, 24), (16, 16))
CRITICAL = {"relu": (nn.ReLU, 2.0), "tanh": (nn.Tanh, 1.0)}
COLOURS = {"relu": "#d55e00", "tanh": "#0072b2"}
REGIMES = (("r → 0", "#009e73"), ("0 < r ≪ 1", "#0072b2"), ("r ~ 1", "#d55e00"))
INPUT = torch.ones(1, 8, dtype=torch.float64)


def build(widths, activation):
    layers = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out, dtype=torch.float64), activation()]
    return nn.Sequential(*layers[:-1])


def draw(model, C_W):
    """Weights from N(0, C_W / n_in), biases 0."""
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=math.sqrt(C_W / layer.in_features))
        nn.init.zeros_(layer.bias)


def measure(name, depth, width, networks):
    """H_11 of the first output of many networks, and what was predicted for them."""
    activation, C_W = CRITICAL[name]
    widths = [8, *[width] * (depth - 1), 1]
    diagnosis = eft.diagnose(eft.theory.MLPEnsemble(widths, name, C_W=C_W, lambda_W=widths[:-1]), INPUT)
    torch.manual_seed(0)
    model, found = build(widths, activation), []
    for _ in range(networks):
        draw(model, C_W)
        found.append(eft.measure.ntk(model, INPUT)[0, 0, 0, 0])
    return torch.stack(found), diagnosis


def spread(H):
    """Relative standard deviation and its standard error, from the fourth moment."""
    squares = (H / H.mean() - 1).square()
    value = float(squares.mean().sqrt())
    return value, float(squares.std()) / math.sqrt(len(squares)) / (2 * value)


def regime(ratio):
    """0, 1 or 2, by the larger of r and epsilon; between 0.2 and 1 is the edge of the middle one."""
    size = max(ratio.r, ratio.epsilon)
    return 0 if size < 0.01 else 1 if size < 1 else 2


def main(networks: int = 300, shapes=SHAPES, figure: str | None = "depth_to_width.png"):
    """Print the table, draw the figure, return ``{(activation, depth, width): (measured, error, diagnosis)}``."""
    found, samples = {}, {}
    print("activation   L     n      r   epsilon   NTK spread: predicted   measured           regime")
    for name, (depth, width) in itertools.product(CRITICAL, shapes):
        H, diagnosis = measure(name, depth, width, networks)
        ratio, (value, error) = diagnosis.aspect_ratio, spread(H)
        found[name, depth, width] = value, error, diagnosis
        samples[name, depth, width] = H
        print(
            f"{name:10} {depth:3} {width:5} {ratio.r:6.3f} {ratio.epsilon:9.4f} {diagnosis.spread.ntk:23.4f} "
            f"{value:10.4f} +- {error:.4f}  {REGIMES[regime(ratio)][0]}"
        )
    if figure:
        draw_figure(found, samples, figure)
    return found


def draw_figure(found, samples, figure):
    """Spread against r with the predictions; and the NTKs of single ReLU networks, the shallowest to the deepest."""
    canvas, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for name, color in COLOURS.items():
        rows = sorted(
            (d.aspect_ratio.r, d.spread.ntk, v, e) for (kind, _, _), (v, e, d) in found.items() if kind == name
        )
        r, predicted, value, error = zip(*rows, strict=True)
        how = "exact" if name == "relu" else "order 1/n"
        left.plot(r, predicted, color=color, label=f"{name}: predicted ({how})")
        left.errorbar(r, value, error, fmt="o" if name == "relu" else "s", color=color, mfc="white", ms=7, capsize=3,
                      label=f"{name}: measured")  # fmt: skip
    left.set(xscale="log", yscale="log")
    left.set_xlabel("depth over width, r = L / n", fontsize=13)
    left.set_title("NTK from seed to seed, relative standard deviation", fontsize=13)
    left.legend(fontsize=11)
    left.grid(alpha=0.3)
    deep = {(L, n): d.aspect_ratio for (name, L, n), (_, _, d) in found.items() if name == "relu"}
    first, last = next(iter(deep)), list(deep)[-1]
    middle = min(deep, key=lambda shape: abs(math.log(deep[shape].epsilon / 0.1)))
    for shape, (label, color) in zip((first, middle, last), REGIMES, strict=True):
        values = (samples["relu", shape[0], shape[1]] / samples["relu", shape[0], shape[1]].mean()).log10()
        right.hist(
            values.clamp_min(-3), bins=torch.linspace(-3, 1.5, 46), density=True, color=color, alpha=0.7,
            label=f"{label}: L = {shape[0]}, n = {shape[1]}, r = {deep[shape].r:.2g}",
        )  # fmt: skip
    right.set_yscale("log")
    right.set_xlabel("log₁₀ of one network's NTK over the mean", fontsize=13)
    right.set_title("single ReLU networks, one input", fontsize=13)
    right.set_ylim(top=40)
    right.legend(fontsize=11, loc="upper left")
    for axes in (left, right):
        axes.tick_params(labelsize=11)
    canvas.savefig(figure, dpi=110)
    print(f"picture: {figure}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=300)
    parser.add_argument("--figure", default="depth_to_width.png")
    main(**vars(parser.parse_args()))
