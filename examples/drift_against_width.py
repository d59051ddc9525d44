"""Before training: how far will the NTK of one network drift? Median and band of networks, against networks trained.

At every width some tanh networks are trained by gradient descent on a few digits. What the theory says of their NTK's
drift, ||H - H_0|| / ||H_0|| at the end, was computed from widths, data and learning rate alone: its median over
networks, and the band that holds 90 % of them. Both fall as 1/n: infinitely wide networks have a frozen NTK.

Run: python examples/drift_against_width.py [--networks 8] [--steps 50] [--figure drift_against_width.png]
"""

import argparse
import math

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import nn

import torch_eft as eft

WIDTHS = (64, 128, 256, 512)
POINTS, PROBES = 12, 4


def digits():
    """Training images, one-hot targets and probe images, centered, |x|^2 = n_0."""
    source = load_digits()
    x = torch.tensor(source.data[: POINTS + PROBES], dtype=torch.float32)
    x = x - x[:POINTS].mean(0)
    x = x / x.norm(dim=1, keepdim=True) * math.sqrt(x.shape[1])
    y = nn.functional.one_hot(torch.tensor(source.target[:POINTS]), 10).float()
    return x[:POINTS], y, x[POINTS:]


def ensemble_of(width):
    """Critical tanh networks 64-n-n-10, lambda_b = lambda_W = 1: every layer moves by as much at any width."""
    return eft.theory.MLPEnsemble((64, width, width, 10), "tanh")


def draw(ensemble, seed):
    """One network of the ensemble, and its learning-rate tensor: lambda_b, and lambda_W / n_in."""
    torch.manual_seed(seed)
    layers, lambdas = [], {}
    for n_in, n_out in zip(ensemble.widths, ensemble.widths[1:], strict=False):
        linear = nn.Linear(n_in, n_out)
        nn.init.normal_(linear.weight, std=1 / math.sqrt(n_in))
        nn.init.zeros_(linear.bias)
        lambdas |= {f"{len(layers)}.weight": 1 / n_in, f"{len(layers)}.bias": 1.0}
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1]), lambdas


def trained_drift(model, lambdas, x, y, x_probe, learning_rate, steps):
    """||H - H_0|| / ||H_0|| after training, H averaged over outputs."""
    H_0 = eft.measure.ntk(model, x_probe, lambdas=lambdas, trace=True)
    groups = [dict(params=[p], lr=learning_rate * lambdas[name]) for name, p in model.named_parameters()]
    optimizer = torch.optim.SGD(groups)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().sum()).backward()
        optimizer.step()
    return float((eft.measure.ntk(model, x_probe, lambdas=lambdas, trace=True) - H_0).norm() / H_0.norm())


def main(networks: int = 8, steps: int = 50, widths=WIDTHS, figure: str | None = "drift_against_width.png"):
    """Print the table, draw the figure; return ``{width: (drifts, (low, median, high))}``."""
    x, y, x_probe = digits()
    found = {}
    for width in widths:
        ensemble = ensemble_of(width)
        Theta = eft.theory.initial_statistics(ensemble, x, statistics=("K", "Theta"))[-1].Theta
        learning_rate = 0.5 / float(torch.linalg.eigvalsh(Theta)[-1])
        training = eft.Training(learning_rate=learning_rate, steps=steps, reduction="sum")
        forecast = eft.theory.predict_drift(ensemble, x, y, x_probe, training, at_steps=[steps], hidden_ntk=False)
        band = forecast.quantiles(torch.tensor([0.05, 0.5, 0.95])).ntk[0].tolist()
        drawn = [draw(ensemble, seed) for seed in range(networks)]
        drifts = [trained_drift(*network, x, y, x_probe, learning_rate, steps) for network in drawn]
        found[width] = drifts, band
        inside = sum(band[0] <= drift <= band[2] for drift in drifts)
        print(
            f"n = {width:4d}: predicted {band[1]:.4f} ({band[0]:.4f} .. {band[2]:.4f} holds 90 %), "
            f"trained {min(drifts):.4f} .. {max(drifts):.4f}, {inside} of {networks} inside "
            f"({forecast.validity.flag})"
        )
    if figure:
        draw_drifts(found, figure)
    return found


def draw_drifts(found, figure):
    """Drift against width, log-log."""
    widths = list(found)
    low, median, high = zip(*(band for _, band in found.values()), strict=True)
    canvas, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axis.fill_between(widths, low, high, color="#0072b2", alpha=0.2, label="90 % of networks, predicted")
    axis.loglog(widths, median, color="#0072b2", label="median, predicted: falls as 1/n")
    for width, (drifts, _) in found.items():
        label = "networks really trained" if width == widths[0] else None
        axis.plot([width] * len(drifts), drifts, "o", color="#d55e00", markersize=4, label=label)
    axis.set_xticks(widths, [str(width) for width in widths])
    axis.xaxis.minorticks_off()
    axis.set(xlabel="width n", ylabel="NTK drift over training", title="tanh networks 64-n-n-10, twelve digits")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    canvas.savefig(figure, dpi=120)
    print(f"picture: {figure}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--figure", default="drift_against_width.png")
    main(**vars(parser.parse_args()))
