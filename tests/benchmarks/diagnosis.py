"""The diagnosis against drawn and trained networks. Run by hand: python -m tests.benchmarks.diagnosis [what] [quick]

Depth 2 .. 40, width 8 .. 256, tanh, ReLU and GELU, torch's default and critical initialization, 16 inputs.

``numbers``: spread, kurtosis and size of the outputs, spread of the NTK, from 400 networks each, beside those printed:
none is off by more than 25 % and three standard errors where it is called valid. ``training``: 500 steps of full-batch
gradient descent on 32 inputs with three learning rates, ten seeds each (four from width 256 on): a network trains as
well as its counterpart with one hidden layer if its mean final loss (1 at most, the variance of the targets) is at most
0.05 higher at the best rate, and does not train if it is above one half. "gradients vanish" or "too deep" is wrong of
the former, and missing if it is not said of the latter.
"""

import itertools
import math
import sys
import time

import torch

import torch_eft as eft
from tests.oracles.drawn_networks import excess_kurtosis, mean_and_error, networks, relative_variance
from torch_eft.theory import MLPEnsemble, criticality

INPUTS, POINTS = 16, 32
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": torch.nn.functional.gelu}
INITIALIZATIONS = ("default", "critical")
SHAPES = [
    (depth, width)
    for width, depths in (
        (8, (2, 4, 8, 16, 40)),
        (32, (2, 4, 8, 16, 40)),
        (64, (2, 4, 8, 16, 40)),
        (256, (2, 4, 8, 20)),
    )
    for depth in depths
]
SUB_GRID = [(2, 8), (4, 32), (8, 32), (12, 16)]


def ensemble_of(activation, initialization, depth, width, outputs):
    """The ensemble of nn.Linear as torch draws it, or at criticality."""
    widths = [INPUTS, *[width] * (depth - 1), outputs]
    if initialization == "critical":
        point = criticality(activation)
        return MLPEnsemble(widths, activation, C_b=point.C_b, C_W=point.C_W, lambda_W=widths[:-1])
    C_b = [1 / (3 * n) for n in widths[:-1]]
    laws = {"weight_law": "uniform", "bias_law": "uniform"}
    return MLPEnsemble(widths, activation, C_b=C_b, C_W=1 / 3, lambda_W=widths[:-1], **laws)


# ---- numbers


def drawn_numbers(ensemble, x, seeds):
    """``{name: (value, standard error)}`` of networks drawn."""
    at_once = max(1, int(2e7 / sum(a * b for a, b in itertools.pairwise(ensemble.widths))))
    parts = []
    for start in range(0, seeds, at_once):
        parts.append(networks(ensemble, x, min(at_once, seeds - start), seed=start))
    z, G, H = (torch.cat(values) for values in zip(*parts, strict=True))
    diagonal = H.diagonal(dim1=1, dim2=2)

    def root(found):
        value, error = found
        return math.sqrt(max(value, 0.0)), error / (2 * math.sqrt(max(value, 1e-300)))

    outputs, (mean, error) = ensemble.widths[-1], mean_and_error(diagonal.mean(1))
    return {
        "output": root(mean_and_error(z.square().mean(1))),
        "kurtosis": excess_kurtosis(z),
        "G": root(relative_variance(G)),
        "NTK": root(relative_variance(diagonal[:, 0])),
        "NTK, mean": root(relative_variance(diagonal.mean(1))),
        "lr": (outputs / mean, outputs / mean**2 * error),
    }


def printed_numbers(ensemble, x):
    """``{name: value}`` of the diagnosis, and its flag."""
    diagnosis = eft.diagnose(ensemble, x[None])
    spread, own = diagnosis.spread, diagnosis.variants[0]
    return {
        "output": spread.output,
        "kurtosis": spread.output_kurtosis,
        "G": own.output_spread,
        "NTK": spread.ntk,
        "NTK, mean": spread.ntk_trace,
        "lr": diagnosis.largest_learning_rate,
    }, spread.validity.flag


def compare_numbers(shapes=SHAPES, activations=tuple(ACTIVATIONS), seeds=400, show=print):
    """Return what is off where it is called valid: ``[(case, name, printed, drawn, error)]``."""
    x = torch.randn(INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * (math.sqrt(INPUTS) / x.norm())
    wrong = []
    for (depth, width), name, initialization in itertools.product(shapes, activations, INITIALIZATIONS):
        ensemble = ensemble_of(name, initialization, depth, width, 3)
        printed, flag = printed_numbers(ensemble, x)
        drawn = drawn_numbers(ensemble, x, seeds)
        line, off = [], []
        for key, value in printed.items():
            measured, error = drawn[key]
            size = abs(measured) + (0.1 if key == "kurtosis" else 0.0)  # a kurtosis of 0.02 is as good as none
            bad = abs(value - measured) > 0.25 * size + 3 * error
            line.append(f"{key} {value:.3g} | {measured:.3g}({error:.1g}){' <--' if bad else ''}")
            if bad:
                off.append((f"{name} {initialization} {depth} x {width}", key, value, measured, error))
        wrong += off if flag == "valid" else []
        show(f"{name:5} {initialization:8} L {depth:2} n {width:3} {flag:8} {'; '.join(line)}")
    return wrong


# ---- training


def task():
    """Isotropic inputs with |x|^2 = n_0, targets linear and quadratic in them, of mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(POINTS, INPUTS, generator=generator)
    x = x * (math.sqrt(INPUTS) / x.norm(dim=1, keepdim=True))
    a, b = torch.randn(2, INPUTS, generator=generator)
    y = x @ a / math.sqrt(INPUTS) + 0.5 * ((x @ b).square() / INPUTS - 1)
    y = y - y.mean()
    return x, (y / y.std(unbiased=False))[:, None]


def draws(name, initialization, depth, width, seeds):
    """Weights and biases of all seeds, layer by layer."""
    generator = torch.Generator().manual_seed(1)
    ensemble = ensemble_of(name, initialization, depth, width, 1)
    parameters = []
    for index, (n_in, n_out) in enumerate(itertools.pairwise(ensemble.widths)):
        weight, bias = ensemble.C_W[index] / n_in, ensemble.C_b[index]
        for shape, size in (((seeds, n_out, n_in), weight), ((seeds, 1, n_out), bias)):
            if initialization == "default":
                values = (2 * torch.rand(shape, generator=generator) - 1) * math.sqrt(3 * size)
            else:
                values = torch.randn(shape, generator=generator) * math.sqrt(size)
            parameters.append(values)
    return parameters


def forward(parameters, function, x):
    """Outputs, preactivations and signals of all seeds."""
    signal = x.expand(len(parameters[0]), -1, -1)
    preactivations, signals = [], [signal]
    for index in range(0, len(parameters), 2):
        z = torch.baddbmm(parameters[index + 1], signal, parameters[index].mT)
        preactivations.append(z)
        if index + 2 < len(parameters):
            signal = function(z)
            signals.append(signal)
    return z, preactivations, signals


def largest_stable(parameters, function, x):
    """N / lambda_max of the NTK, the median of the seeds: the edge for the mean squared error."""
    leaves = [p.clone().requires_grad_() for p in parameters]
    z, preactivations, signals = forward(leaves, function, x)
    gradients = torch.autograd.grad(z.sum(), preactivations)
    pairs = zip(signals, gradients, strict=True)
    H = sum((1 + (s @ s.mT)) * (g @ g.mT) for s, g in pairs).detach().double()
    return float((len(x) / torch.linalg.eigvalsh(H)[:, -1]).median())


def final_loss(name, initialization, depth, width, steps=500, seeds=10, fractions=(0.25, 0.5, 1.0)):
    """Mean over seeds of the final loss, 1 at most, at the best of some fractions of the largest stable rate."""
    (x, y), function = task(), ACTIVATIONS[name]
    start = draws(name, initialization, depth, width, seeds)
    edge, best = largest_stable(start, function, x), 1.0
    for fraction in fractions:
        parameters = [p.clone().requires_grad_() for p in start]
        for _ in range(steps):
            loss = (forward(parameters, function, x)[0] - y).square().mean((1, 2))
            if not bool((loss < 1e4).any()):
                break
            for p, gradient in zip(parameters, torch.autograd.grad(loss.sum(), parameters), strict=True):
                p.data.sub_(gradient, alpha=fraction * edge)
        with torch.no_grad():
            loss = (forward(parameters, function, x)[0] - y).square().mean((1, 2))
        best = min(best, float(torch.where(loss.isfinite(), loss, 1.0).clamp_max(1.0).mean()))
    return best


def compare_training(shapes=SHAPES, activations=tuple(ACTIVATIONS), show=print, **options):
    """Return what is said wrongly or not said: ``[(case, codes, loss, loss of the shallow one)]``."""
    wrong, shallow, x = [], {}, task()[0].double()
    for (depth, width), name, initialization in itertools.product(shapes, activations, INITIALIZATIONS):
        few = {"seeds": 4, "fractions": (0.25, 0.5)} if width >= 256 else {}
        begun = time.perf_counter()
        loss = final_loss(name, initialization, depth, width, **{**few, **options})
        key = name, initialization, width
        if key not in shallow:
            shallow[key] = loss if depth == 2 else final_loss(name, initialization, 2, width, **{**few, **options})
        ensemble = ensemble_of(name, initialization, depth, width, 1)
        found = []
        for inputs in (None, x):
            diagnosis = eft.diagnose(ensemble, inputs)
            codes = {finding.code for finding in diagnosis.warnings} & {"gradients vanish", "too deep"}
            as_well, fails = loss <= shallow[key] + 0.05, loss > 0.5
            if (as_well and codes) or (fails and not codes):
                wrong.append((f"{name} {initialization} {depth} x {width}", codes, loss, shallow[key]))
            found.append(", ".join(sorted(codes)) or "-")
        words = "as well" if as_well else "does not train" if fails else "worse"
        case = f"{name:5} {initialization:8} L {depth:2} n {width:3}"
        said = f"said: {found[0]} | with the data: {found[1]} ({time.perf_counter() - begun:.0f} s)"
        show(f"{case} loss {loss:.2g} ({shallow[key]:.2g}) {words:15} kappa {diagnosis.plateau:.2g} {said}")
    return wrong


def main(arguments):
    torch.set_flush_denormal(True)  # gradients that vanish would cost ten times as much
    quick = "quick" in arguments
    shapes = SUB_GRID if quick else SHAPES
    chosen = [word for word in arguments if word != "quick"] or ["numbers", "training"]

    def show(line):
        print(line, flush=True)

    for name in chosen:
        wrong = {"numbers": compare_numbers, "training": compare_training}[name](shapes, show=show)
        print(f"{name}: {len(wrong)} wrong", *wrong, sep="\n  ", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
