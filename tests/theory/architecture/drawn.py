"""NTKs of many networks drawn anew, all at once by vmap, as the yardstick of the theory of architectures."""

import torch
from torch.func import functional_call, jacrev, stack_module_state, vmap

from torch_eft import theory

CHUNK = 50


def drawn_ntks(make, x, number, seed=10_000):
    """NTKs of one output and of the mean over outputs, (S, N, N) each."""
    one, mean = [], []
    for start in range(0, number, CHUNK):
        networks = []
        for index in range(start, min(number, start + CHUNK)):
            torch.manual_seed(seed + index)
            networks.append(make())
        parameters, buffers = stack_module_state(networks)
        buffers = {name: value[0] for name, value in buffers.items()}

        def output(parameters, sample, network=networks[0], buffers=buffers):
            return functional_call(network, {**parameters, **buffers}, (sample[None],))[0]

        J = vmap(lambda p, f=output: vmap(lambda sample: jacrev(f)(p, sample))(x))(parameters)
        J = torch.cat([part.flatten(3) for part in J.values()], -1).detach()
        H = torch.einsum("snip,smip->snmi", J, J).double()
        one.append(H[..., 0])
        mean.append(H.mean(-1))
    return torch.cat(one), torch.cat(mean)


def compared(architecture, x, one, mean, kernel=0.025, spread=0.04, num_samples=2**15):
    """True if mean NTK and spread agree: to ``kernel`` and ``spread``, relative, beside four standard errors."""
    found = theory.architecture_statistics(architecture, x, num_samples=num_samples)
    S, average = len(one), one.mean(0)
    squares = (one - average).square()
    sd = squares.mean(0).sqrt() / average
    error = squares.std(0) / S**0.5 / (2 * squares.mean(0)) * sd + found.error["ntk_relative_sd"]
    off = (average / found.Theta - 1).abs() - kernel - 4 * one.std(0) / S**0.5 / average
    assert bool((off < 0).all()), (average / found.Theta).tolist()
    off = (sd / found.ntk_relative_sd - 1).abs() - spread - 4 * error / found.ntk_relative_sd
    assert bool((off < 0).all()), (sd / found.ntk_relative_sd).tolist()
    trace = mean.diagonal(dim1=1, dim2=2).mean(1)
    ratio = float(trace.std() / trace.mean()) / found.ntk_trace_relative_sd
    assert abs(ratio - 1) < spread + 4 * 0.8 / S**0.5, ratio
    return True
