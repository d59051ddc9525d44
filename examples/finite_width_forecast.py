"""Before training: where will this network go? Frozen NTK, and dNTK and ddNTK added, against networks really trained.

At every width some tanh networks are drawn. Each is asked, before a single step, for its whole training: once with its
NTK frozen (infinite width), once with the response to its dNTK and ddNTK (order 1/n). Then it is trained. The error of
the first falls as 1/n, that of the second as 1/n^2, in the outputs and in the NTK itself.

Run: python examples/finite_width_forecast.py [--networks 6] [--steps 200] [--figure forecast.png]
"""

import argparse
import math
import statistics

import torch
from matplotlib import pyplot
from torch import nn

import torch_eft as eft

WIDTHS = (64, 128, 256, 512)
ETA = 0.1
TETRAHEDRON = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).double()
PROBES = torch.tensor([[1.5, 0.5, 0], [0, -1, 1.2]]).double()


def draw(width, seed):
    """A critical tanh network 3-n-n-1, W ~ N(0, 1/n_in), without biases at the start; and its lambda = 1/n_in."""
    torch.manual_seed(seed)
    sizes = (3, width, width, 1)
    layers, lambdas = [], {}
    for n_in, n_out in zip(sizes, sizes[1:], strict=False):
        linear = nn.Linear(n_in, n_out, dtype=torch.float64)
        nn.init.normal_(linear.weight, std=1 / math.sqrt(n_in))
        nn.init.zeros_(linear.bias)
        lambdas |= {f"{len(layers)}.weight": 1 / n_in, f"{len(layers)}.bias": 1.0}
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1]), lambdas


def train(model, lambdas, x, y, x_probe, steps):
    """Outputs on the probe after every step, and the NTK after the last."""
    groups = [dict(params=[p], lr=ETA * lambdas[name]) for name, p in model.named_parameters()]
    optimizer = torch.optim.SGD(groups)
    outputs = []
    for _ in range(steps):
        outputs.append(model(x_probe).detach())
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().sum()).backward()
        optimizer.step()
    return torch.stack([*outputs, model(x_probe).detach()]), eft.measure.ntk(model, x_probe, lambdas=lambdas)


def errors(width, seed, steps):
    """Largest error of the outputs over the steps, and of the last NTK, relative to the largest movement of each."""
    x, y, x_probe = TETRAHEDRON, torch.tensor([[1.0], [-0.5], [0.5], [-1.0]]).double(), PROBES
    model, lambdas = draw(width, seed)
    training = eft.Training(learning_rate=ETA, steps=steps, reduction="sum")
    forecasts = [
        eft.predict_from_network(model, x, y, x_probe, training, lambdas=lambdas, order=order) for order in (0, 1)
    ]
    outputs, H = train(model, lambdas, x, y, x_probe, steps)
    moved = float((outputs - outputs[0]).abs().max())
    found = []
    for forecast in forecasts:
        z = float((forecast.output_mean - outputs).abs().max()) / moved
        found.append((z, float((forecast.ntk_mean[-1] - H).norm() / H.norm())))
    return found, forecasts[1].validity.flag


def slope(widths, values):
    """Slope of log value against log width, by least squares."""
    x = torch.log(torch.tensor(widths, dtype=torch.float64))
    y = torch.log(torch.tensor(values, dtype=torch.float64))
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def main(networks: int = 6, steps: int = 200, widths=WIDTHS, figure: str | None = "finite_width_forecast.png"):
    """Print the table, draw the figure, return the slopes ``{(order, quantity): slope}``."""
    medians = {}
    print(f"median over {networks} networks of the relative error (frozen NTK -> with dNTK and ddNTK)")
    for width in widths:
        runs = [errors(width, seed, steps) for seed in range(networks)]
        for order in (0, 1):
            for index, quantity in enumerate(("outputs", "NTK")):
                value = statistics.median(found[order][index] for found, _ in runs)
                medians.setdefault((order, quantity), []).append(value)
        shown = ", ".join(
            f"{quantity} {medians[0, quantity][-1]:.4f} -> {medians[1, quantity][-1]:.5f}"
            for quantity in ("outputs", "NTK")
        )
        flags = [flag for _, flag in runs]
        print(f"n = {width:4d}: {shown}   ({', '.join(f'{flags.count(f)} {f}' for f in sorted(set(flags)))})")
    slopes = {key: slope(widths, values) for key, values in medians.items()}
    for (order, quantity), value in slopes.items():
        print(f"order {order}, {quantity}: error ~ n^{value:.2f}")
    if figure:
        draw_errors(widths, medians, slopes, figure)
    return slopes


def draw_errors(widths, medians, slopes, figure):
    """Error against width, log-log, a panel for outputs and one for the NTK."""
    canvas, axes = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    styles = {0: ("#d55e00", "o--", "frozen NTK (order 0)"), 1: ("#0072b2", "s-", "with dNTK and ddNTK (order 1)")}
    for axis, quantity in zip(axes, ("outputs", "NTK"), strict=True):
        for order, (color, style, label) in styles.items():
            axis.loglog(
                widths,
                medians[order, quantity],
                style,
                color=color,
                label=f"{label}: n^{slopes[order, quantity]:.1f}",
            )
        axis.set(title=f"{quantity} on the probe", xlabel="width n")
        axis.set_xticks(widths, [str(width) for width in widths])
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    axes[0].set_ylabel("error of the forecast, relative")
    canvas.suptitle("Forecast before training against networks really trained")
    canvas.savefig(figure, dpi=120)
    print(f"picture: {figure}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--figure", default="finite_width_forecast.png")
    main(**vars(parser.parse_args()))
