"""Networks really trained, with ``torch.optim.SGD``, and what they did: outputs at every step, the NTK at some."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

F64 = torch.float64


def network(widths, generator, activation=nn.Tanh, C_W=1.0, C_b=0.0, lambda_W=1.0, lambda_b=1.0):
    """W ~ N(0, C_W / n_in), b ~ N(0, C_b), float64; its lambdas are lambda_W / n_in and lambda_b."""
    layers, lambdas = [], {}
    for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
        linear = nn.Linear(n_in, n_out, dtype=F64)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(n_out, n_in, dtype=F64, generator=generator) * math.sqrt(C_W / n_in))
            linear.bias.copy_(torch.randn(n_out, dtype=F64, generator=generator) * math.sqrt(C_b))
        lambdas |= {f"{len(layers)}.weight": lambda_W / n_in, f"{len(layers)}.bias": lambda_b}
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1]), lambdas


@dataclass
class Trained:
    """Outputs (T+1, N, C) on all points and NTKs {step: (N_p, N_p, C, C)} on probe points."""

    outputs: torch.Tensor
    ntks: dict


def train(model, lambdas, x, loss_function, x_probe, learning_rate, steps, record=(), batches=None, **options):
    """Outputs are on probe points, then training points; ``loss_function(z, samples)`` is given training outputs."""
    groups = [dict(params=[p], lr=learning_rate * lambdas[name]) for name, p in model.named_parameters()]
    optimizer = torch.optim.SGD(groups, **options)
    everything, probes = torch.cat([x_probe, x]), len(x_probe)
    everyone = torch.arange(len(x))
    outputs, ntks = [], {}
    for step in range(steps + 1):
        z = model(everything)
        outputs.append(z.detach())
        if step in record:
            ntks[step] = ntk(model, lambdas, x_probe)
        if step == steps:
            break
        samples = everyone if batches is None else torch.as_tensor(batches[step % len(batches)])
        optimizer.zero_grad()
        loss_function(z[probes:][samples], samples).backward()
        optimizer.step()
    return Trained(torch.stack(outputs), ntks)


def ntk(model, lambdas, x):
    """By one backward pass a number."""
    leaves = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
    z = functional_call(model, leaves, (x,))
    rows = []
    for value in z.flatten():
        gradient = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
        rows.append(torch.cat([math.sqrt(lambdas[n]) * g.flatten() for n, g in zip(leaves, gradient, strict=True)]))
    J = torch.stack(rows)
    return (J @ J.T).unflatten(0, z.shape).unflatten(2, z.shape).transpose(1, 2)


def slope(widths, errors):
    """Of log error on log width, by least squares."""
    a = torch.tensor([math.log(width) for width in widths], dtype=F64)
    b = torch.tensor([math.log(error) for error in errors], dtype=F64)
    a = a - a.mean()
    return float((a * b).sum() / a.square().sum())
