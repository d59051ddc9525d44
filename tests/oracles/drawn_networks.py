"""Many networks of one ensemble drawn with torch's generators and evaluated on one input, exactly at their width."""

import math

import torch


def drawn(law, variance, shape, generator):
    """Numbers of a law with the variance given, written apart from the package's."""
    size = math.sqrt(variance)
    if law == "uniform":
        return (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5) * (math.sqrt(12.0) * size)
    if law == "truncated normal":  # by rejection
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        while bool((outside := numbers.abs() > 2).any()):
            numbers[outside] = torch.randn(int(outside.sum()), generator=generator, dtype=torch.float64)
        return numbers * (size / 0.8796256610342398)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    if law == "orthogonal":
        u, _, v = torch.linalg.svd(numbers, full_matrices=False)  # the polar factor of a Gaussian matrix is Haar
        return u @ v * (math.sqrt(max(shape[-2:])) * size)
    return numbers * size


def networks(ensemble, x, count, seed=0):
    """Outputs z (count, C), E[z^2 | last hidden layer] G (count,) and the NTK H_ij (count, C, C) of input x (n_0,)."""
    generator = torch.Generator().manual_seed(seed)
    signal = x.double().expand(count, -1)
    weights, slopes, shares = [], [], []
    for index in range(ensemble.depth):
        n_in, n_out = ensemble.widths[index : index + 2]
        C_b, C_W = ensemble.C_b[index], ensemble.C_W[index]
        square = signal.square().mean(1)
        shares.append(ensemble.lambda_b[index] + ensemble.lambda_W[index] * square)
        W = drawn(ensemble.weight_law[index], C_W / n_in, (count, n_out, n_in), generator)
        b = drawn(ensemble.bias_law[index], C_b, (count, n_out), generator)
        G = C_b + C_W * square
        z = (W @ signal[:, :, None])[:, :, 0] + b
        weights.append(W)
        slopes.append(ensemble.activation(z, 1))
        signal = ensemble.activation(z)
    B = torch.eye(ensemble.widths[-1], dtype=torch.float64).expand(count, -1, -1)
    H = torch.zeros(count, ensemble.widths[-1], ensemble.widths[-1], dtype=torch.float64)
    for index in reversed(range(ensemble.depth)):
        H += shares[index][:, None, None] * (B @ B.mT)
        if index:
            B = (B @ weights[index]) * slopes[index - 1][:, None, :]
    return z, G, H


def mean_and_error(values):
    """Mean of independent values with its standard error."""
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def relative_variance(values, blocks=50):
    """Var / mean^2 with its standard error, by leaving out one block after the other."""
    parts = values[: len(values) // blocks * blocks].reshape(blocks, -1)
    one, two = parts.mean(1), parts.square().mean(1)
    whole = two.mean() / one.mean() ** 2 - 1
    left = (two.sum() - two) / (blocks - 1) / ((one.sum() - one) / (blocks - 1)) ** 2 - 1
    return float(whole), float(((blocks - 1) * left.var(unbiased=False)).sqrt())


def excess_kurtosis(values, blocks=50):
    """Of values with mean 0 (networks, outputs), with its standard error, likewise."""
    parts = values[: len(values) // blocks * blocks].reshape(blocks, -1)
    two, four = parts.square().mean(1), parts.pow(4).mean(1)
    whole = four.mean() / two.mean() ** 2 - 3
    left = (four.sum() - four) / (blocks - 1) / ((two.sum() - two) / (blocks - 1)) ** 2 - 3
    return float(whole), float(((blocks - 1) * left.var(unbiased=False)).sqrt())
