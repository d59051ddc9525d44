"""The trajectory of a network or of its Taylor model, recorded while it trains, for comparison with forecasts."""

import torch

from torch_eft import measure
from torch_eft.results.trajectory import Validity, trajectory_from_records


def recorded(model, step, every, count, x_probe, x_train=None, lambdas=None, with_ntk=True):
    """Takes ``count`` steps; records before the first and after every ``every``-th."""
    steps, outputs, trained, ntks = [], [], [], []
    for t in range(count + 1):
        if t % every == 0:
            steps.append(t)
            outputs.append(output(model, x_probe))
            trained += [] if x_train is None else [output(model, x_train)]
            ntks += [ntk(model, x_probe, lambdas)] if with_ntk else []
        if t < count:
            step()
    return trajectory_from_records(
        steps, outputs, "recorded", Validity("valid", "measured"), ntks or None, trained or None
    )


def output(model, x):
    if not isinstance(model, measure.TaylorModel):
        return measure.output(model, x)
    with torch.no_grad():
        return model(x)


def ntk(model, x, lambdas):
    """That of a Taylor model at its theta by one backward pass per output."""
    if not isinstance(model, measure.TaylorModel):
        return measure.ntk(model, x, lambdas=lambdas)
    z = model(x)
    rows = []
    for value in z.flatten():
        gradients = torch.autograd.grad(value, list(model.theta.values()), retain_graph=True)
        scaled = zip(model.theta, gradients, strict=True)
        rows.append(torch.cat([lambdas[name] ** 0.5 * part.flatten() for name, part in scaled]))
    J = torch.stack(rows)
    return (J @ J.T).unflatten(0, z.shape).unflatten(2, z.shape).transpose(1, 2).detach()
