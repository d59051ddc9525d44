"""A network that is too deep, diagnosed before training and repaired as the diagnosis says.

Twenty layers of sixteen tanh neurons, torch's default initialization, on scikit-learn's digits: it does not train. Its
diagnosis says why: gradients vanish, as the weights are too small. With critical weights it trains, and the diagnosis
finds that networks of different seeds differ by order one, as L / n > 1. Each remedy is applied in turn, and every
network is trained from a few seeds at half the step size that the diagnosis gives.

Run: python examples/too_deep.py [--steps 400] [--seeds 5] [--figure too_deep.png]
"""

import argparse
import itertools
import math

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import torch_eft as eft

DEPTH, WIDTH, IMAGES = 20, 16, 200
COLOURS = ("#d55e00", "#e69f00", "#0072b2")


def data():
    """Inputs with |x|^2 = n_0 and one-hot targets."""
    digits = load_digits()
    x = torch.tensor(digits.data[:IMAGES], dtype=torch.float32)
    x = x - x.mean(0)
    x = x / x.norm(dim=1, keepdim=True) * math.sqrt(x.shape[1])
    return x, F.one_hot(torch.tensor(digits.target[:IMAGES]), 10).float()


def build(depth, width, initialization=None):
    """A tanh MLP; ``initialization`` is (C_b, C_W), None leaves torch's."""
    layers = []
    for n_in, n_out in itertools.pairwise([64, *[width] * (depth - 1), 10]):
        layer = nn.Linear(n_in, n_out)
        if initialization is not None:
            C_b, C_W = initialization
            nn.init.normal_(layer.weight, std=math.sqrt(C_W / n_in))
            nn.init.normal_(layer.bias, std=math.sqrt(C_b))
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def train(model, x, y, learning_rate, steps):
    """Mean squared error after every step of full-batch gradient descent."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=learning_rate), []
    for _ in range(steps):
        loss = F.mse_loss(model(x), y)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def diagnosed_and_trained(name, depth, width, initialization, x, y, steps, seeds):
    """The diagnosis of the first seed's network, on some of the images, and the losses of all."""
    curves = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = build(depth, width, initialization)
        if seed == 0:
            diagnosis = eft.diagnose(model, x[:16])
        curves.append(train(model, x, y, 0.5 * diagnosis.largest_learning_rate, steps))
    ends = [curve[-1] for curve in curves]
    codes = ", ".join(finding.code for finding in diagnosis.warnings) or "no warnings"
    print(
        f"{name:18} n = {width:3}, r = {diagnosis.aspect_ratio.r:.2f}: loss {curves[0][0]:.3f} -> "
        f"{sum(ends) / len(ends):.4f} (seeds: {min(ends):.4f} .. {max(ends):.4f}); diagnosis: {codes}"
    )
    return diagnosis, curves


def main(steps: int = 400, seeds: int = 5, depth: int = DEPTH, figure: str | None = "too_deep.png"):
    """Diagnose, repair, train; return ``{stage: (diagnosis, [losses of every seed])}``."""
    x, y = data()
    results = {}

    def stage(name, width, initialization):
        results[name] = diagnosed_and_trained(name, depth, width, initialization, x, y, steps, seeds)
        return results[name][0]

    found = stage("as it was", WIDTH, None)
    print(f"\n{found}\n")
    critical = stage("critical weights", WIDTH, found.recommended).aspect_ratio
    widened = math.ceil(WIDTH * max(critical.r / 0.19, critical.epsilon / 0.18))  # both below 0.2
    stage("critical and wide", widened, found.recommended)
    if figure:
        draw_figure(results, depth, y, figure)
    return results


def draw_figure(results, depth, y, figure):
    """Loss against steps, a line a seed."""
    canvas, axes = pyplot.subplots(figsize=(7.5, 5.4), layout="constrained")
    for (name, (diagnosis, curves)), color in zip(results.items(), COLOURS, strict=True):
        width = diagnosis.aspect_ratio.width
        codes = ", ".join(finding.code for finding in diagnosis.warnings) or "no warnings"
        for index, curve in enumerate(curves):
            label = f"{name} (n = {width:g}): {codes}" if index == 0 else None
            axes.semilogy(curve, color=color, lw=1.8, alpha=0.85, label=label)
    axes.axhline(float(y.var(0, unbiased=False).mean()), color="black", ls=":", lw=1.5)
    axes.text(0.99, 0.97, "dotted: constant output", fontsize=11, va="top", ha="right", transform=axes.transAxes)
    axes.set_xlabel("full-batch gradient steps", fontsize=13)
    axes.set_ylabel("mean squared error", fontsize=13)
    axes.set_title(f"{depth} tanh layers on digits, a line a seed", fontsize=13)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    canvas.legend(fontsize=11, loc="outside lower center")
    canvas.savefig(figure, dpi=110)
    print(f"picture: {figure}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--figure", default="too_deep.png")
    main(**vars(parser.parse_args()))
