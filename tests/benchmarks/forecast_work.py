"""Counted work of forecasts beside what they take. Run by hand: python -m tests.benchmarks.forecast_work [options]

One process, one thread; process time, which a busy machine lengthens less than the time that passes.
The constants of ``torch_eft.forecast.comparison.work``, ``drift`` and ``operations`` were fitted to such tables, by
least squares of relative errors with positive coefficients: on another machine all ratios change by one factor.

Options: --corrections 40   random sizes of the corrections of order 1/n (N = 4 .. 64, N_p = 2 .. 16, n_L, L, steps)
         --law 12           random sizes of the law of the drift
         --networks 12      networks of several kinds, with several numbers of directions
         --most 20          counted seconds beyond which a case is left out
         --seed 0
"""

import argparse
import random
import statistics
import time
from dataclasses import replace

import torch
from torch import nn

from torch_eft.forecast.comparison import InstanceComparison
from torch_eft.forecast.comparison.drift import DriftComparison, law_work
from torch_eft.forecast.comparison.finite_width import Problem, time_grid
from torch_eft.forecast.comparison.work import Allowance
from torch_eft.results.training import Training
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.training.corrections.work import corrections_work

INPUTS = 12


def process_seconds(action):
    begun = time.process_time()
    action()
    return time.process_time() - begun


def case(chance):
    """A training of random size: an ensemble, data and a training."""
    train, probe = round(4 * 16 ** chance.random()), round(2 * 8 ** chance.random())
    outputs, depth = chance.choice([1, 1, 2, 3, 5, 10]), chance.choice([2, 3, 3, 4, 5])
    steps, momentum = chance.choice([30, 100, 300, 1000]), chance.choice([0.0, 0.0, 0.0, 0.9])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(train + probe, INPUTS, dtype=torch.float64, generator=generator)
    x *= INPUTS**0.5 / x.norm(dim=1, keepdim=True)
    y = torch.randn(train, outputs, dtype=torch.float64, generator=generator)
    ensemble = MLPEnsemble([INPUTS, *[200] * (depth - 1), outputs], "tanh", C_b=0.0, C_W=1.0)
    training = Training(learning_rate=1e-3, steps=steps, reduction="sum", momentum=momentum)
    return Problem(ensemble, x[:train], y, x[train:], training)


def described(problem):
    sizes = len(problem.x_train), len(problem.x_probe), problem.y_train.shape[1], problem.ensemble.depth
    momentum = f", momentum {problem.training.momentum}" if problem.training.momentum else ""
    return "N = {}, N_p = {}, n_L = {}, L = {}".format(*sizes) + f", {problem.training.steps} steps{momentum}"


def corrections(count, most, chance):
    """``{part: [(counted, measured, case)]}`` of the corrections of order 1/n."""
    found = {}
    for _ in range(count):
        problem = case(chance)
        grid = time_grid(problem.training.steps, problem.training.momentum)
        sizes = len(problem.x_train), len(problem.x_probe), problem.y_train.shape[1], problem.ensemble.depth
        momentum = bool(problem.training.momentum)
        work = corrections_work(*sizes, times=len(grid), steps=grid[-1], momentum=momentum)
        for name, counted in work.items():
            if counted > most or (name == "hidden" and momentum):
                continue

            def made(problem=problem, grid=grid, name=name):
                if name == "hidden":
                    return problem.hidden_layers(grid)
                return problem.outputs(grid, 1, corrections=(name,))

            found.setdefault(name, []).append((counted, process_seconds(made), described(problem)))
    return found


def law(count, most, chance):
    """The same of the law of the drift, with as many joint points as a random allowance covers."""
    rows = []
    for _ in range(count):
        problem, allowed = case(chance), most ** chance.random()
        sizes = problem.ensemble, len(problem.x_train), len(problem.x_probe)
        counted = law_work(*sizes, allowed)
        if counted > allowed:
            continue
        training = replace(problem.training, steps=min(100, problem.training.steps))
        data = problem.x_train, problem.y_train, problem.x_probe
        z = torch.zeros_like(problem.y_train)
        measured = process_seconds(lambda: DriftComparison(sizes[0], *data, training, z, seconds=allowed))
        rows.append((counted, measured, described(problem)))
    return {"law": rows}


def perceptron(width, outputs):
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs))


def convolutional(width, outputs):
    layers = nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width, 3, padding=1), nn.GELU()
    return nn.Sequential(
        *layers, nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(64 * width, outputs)
    )


class Attention(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x):
        return self.head(self.layer(self.embed(x.unflatten(1, (8, 8)))).mean(1))


def networks(count, most, chance):
    """The same of order 1 of one network's forecast."""
    rows = []
    for index in range(count):
        make, widths = [(perceptron, (32, 128, 512)), (convolutional, (8, 32)), (Attention, (16, 64))][index % 3]
        width, outputs, train, probe = chance.choice(widths), chance.choice([1, 3, 10]), chance.choice([4, 16, 24]), 6
        torch.manual_seed(0)
        model = make(width, outputs)
        x, y = torch.randn(train + probe, 64), torch.randn(train, outputs)
        steps = chance.choice([50, 500])
        allowance = Allowance(most ** chance.random())
        training = Training(learning_rate=0.003, steps=steps)
        lambdas = dict.fromkeys(dict(model.named_parameters()), 1.0)
        made = InstanceComparison(model, x[:train], y, x[train:], training, lambdas=lambdas, allowance=allowance)
        if made.order_1 is None:
            continue
        directions = int(made.provenance.split("along ")[1].split(" ")[0])
        counted = made._work(steps, directions)
        measured = process_seconds(lambda made=made, steps=steps: made._predicted(steps, 1, made._modes))
        text = f"{make.__name__} {width}, N = {train}, n_L = {outputs}, {steps} steps, {directions} directions"
        rows.append((counted, measured, text))
    return {"network": rows}


def main():
    parser = argparse.ArgumentParser()
    for name, value in (("corrections", 40), ("law", 12), ("networks", 12), ("most", 20.0), ("seed", 0)):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    given = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(given.seed)
    process_seconds(lambda: case(random.Random(0)).outputs([0, 1], 1, corrections=("ntk",)))  # loads lazily
    for action, count in ((corrections, given.corrections), (law, given.law), (networks, given.networks)):
        for part, rows in action(count, given.most, chance).items():
            ratios = sorted((counted / measured, counted, measured, text) for counted, measured, text in rows)
            if not ratios:
                continue
            middle = statistics.median(ratio for ratio, *_ in ratios)
            spread = f"{ratios[0][0]:.2f} .. {middle:.2f} .. {ratios[-1][0]:.2f}"
            print(f"{part}: {len(ratios)} cases, counted over measured {spread}")
            for ratio, counted, measured, text in (ratios[0], ratios[-1]):
                print(f"    {ratio:.2f}: {counted:.2f} s counted, {measured:.2f} s measured; {text}", flush=True)


if __name__ == "__main__":
    main()
