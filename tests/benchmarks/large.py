"""The NTK of networks of other people's packages beside C plain backward passes: python -m tests.benchmarks.large

    --networks mobilenet_v3_small,convnext_atto,efficientnet_b0,resnet18   of torchvision, else of timm
    --samples 8  --pixels 64  --rounds 7  --device cpu

Random weights, ten outputs, float32, evaluation mode. A plain pass is one backward pass of one output, of all samples,
with respect to all parameters; the forward is run once for all of them. Each round runs both.
"""

import argparse
import importlib
import warnings

import torch

from tests.benchmarks.machine import keep, line, machine, seconds, summary
from torch_eft import measure

OUTPUTS = 10


def network(name):
    models = importlib.import_module("torchvision.models")
    if hasattr(models, name):
        return getattr(models, name)(num_classes=OUTPUTS)
    return importlib.import_module("timm").create_model(name, num_classes=OUTPUTS)


def backward_passes(model, x):
    z, parameters = model(x), list(model.parameters())
    for i in range(z.shape[1]):
        torch.autograd.grad(z[:, i].sum(), parameters, retain_graph=i < z.shape[1] - 1)


def main(networks, samples, pixels, rounds, device):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    found = machine(device, ("torchvision", "timm"))
    given = f"{samples} samples of {pixels} pixels, {OUTPUTS} outputs"
    print(f"{line(found)}\n{given}, medians of {rounds} rounds [least..most]\n")
    numbers = {}
    for name in networks:
        torch.manual_seed(0)
        model, x = network(name).eval().to(device), torch.randn(samples, 3, pixels, pixels, device=device)
        first = seconds(lambda: measure.ntk(model, x), device)
        backward_passes(model, x)
        times = {"ntk": [], "passes": []}
        for _ in range(rounds):
            times["ntk"].append(seconds(lambda: measure.ntk(model, x), device))
            times["passes"].append(seconds(lambda: backward_passes(model, x), device))
        own, plain = summary(times["ntk"]), summary(times["passes"])
        numbers[name] = {"first": first, "ntk": own, "passes": plain}
        print(
            f"{name}: NTK {own['median']:.3f} s [{own['least']:.3f}..{own['most']:.3f}] (first {first:.2f}), "
            f"passes {plain['median']:.3f} s [{plain['least']:.3f}..{plain['most']:.3f}]: "
            f"x{own['median'] / plain['median']:.2f}",
            flush=True,
        )
    keep("large", found, numbers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "mobilenet_v3_small,convnext_atto,efficientnet_b0,resnet18"
    parser.add_argument("--networks", default=default, type=lambda text: text.split(","))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    main(**vars(parser.parse_args()))
