"""Ensembles of really trained networks, many at once: plain tensors and autograd, no library code."""

import math

import torch


def draw(widths, C_b, C_W, count, generator, dtype=torch.float64):
    """``count`` networks: a list of (weights (S, n_out, n_in), biases (S, n_out)) per layer."""
    layers = []
    for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
        weight = torch.randn(count, n_out, n_in, generator=generator, dtype=dtype) * math.sqrt(C_W / n_in)
        bias = torch.randn(count, n_out, generator=generator, dtype=dtype) * math.sqrt(C_b)
        layers.append((weight, bias))
    return layers


def forward(layers, x, sigma):
    """(S, N, n_L)."""
    signal = x.expand(len(layers[0][0]), -1, -1)
    for index, (weight, bias) in enumerate(layers):
        signal = torch.baddbmm(bias[:, None, :], signal, weight.mT)
        if index < len(layers) - 1:
            signal = sigma(signal)
    return signal


def train(layers, x, y, x_probe, sigma, learning_rate, steps, lambda_b, lambda_W, record):
    """Full-batch gradient descent on (1/2) sum (z - y)^2; the probe outputs at the recorded steps."""
    leaves = [tensor.requires_grad_() for layer in layers for tensor in layer]
    outputs = {}
    for step in range(steps + 1):
        if step in record:
            with torch.no_grad():
                outputs[step] = forward(layers, x_probe, sigma)
        if step == steps:
            break
        loss = (forward(layers, x, sigma) - y).square().sum() / 2
        gradients = torch.autograd.grad(loss, leaves)
        with torch.no_grad():
            for index, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
                rate = lambda_W / leaf.shape[-1] if index % 2 == 0 else lambda_b
                leaf -= learning_rate * rate * gradient
    return outputs
