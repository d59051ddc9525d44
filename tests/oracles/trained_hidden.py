"""Hidden layers of really trained networks, in mirrored pairs, many at once: plain tensors and autograd."""

import torch

from tests.oracles.ensembles import draw


def hidden(layers, x, sigma):
    """Preactivations of layers 1 .. L, (S, N, n_l) each."""
    signal, found = x.expand(len(layers[0][0]), -1, -1), []
    for weight, bias in layers:
        found.append(torch.baddbmm(bias[:, None, :], signal, weight.mT))
        signal = sigma(found[-1])
    return found


def observed(layers, x, sigma, start=None, hyper=None):
    """{(observable, layer): (S, N, N)}: kernels, movement since ``start`` (preactivations), NTK of layer 2."""
    z = hidden(layers, x, sigma)[:-1]
    found = {}
    for layer, value in enumerate(z, 1):
        s = sigma(value)
        found["activations", layer] = s @ s.mT / s.shape[-1]
        found["preactivations", layer] = value @ value.mT / value.shape[-1]
        if start is not None:
            dz, ds = value - start[layer - 1], s - sigma(start[layer - 1])
            found["dz", layer] = dz @ dz.mT / dz.shape[-1]
            found["ds", layer] = ds @ ds.mT / ds.shape[-1]
    if hyper is not None and len(z) > 1:
        lambda_b, lambda_W = hyper
        point = z[0].detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(sigma(point).sum(), point)
        column = (
            layers[1][0].square().mean(1)[:, None, :] * slope
        )  # mean over j of W_ji^2, the NTK of layer 1 is diagonal
        first = lambda_b + lambda_W * x @ x.T / x.shape[1]
        found["ntk", 2] = lambda_b + lambda_W * found["activations", 1] + first * (column @ slope.mT)
    return found


def trained_changes(widths, sigma, x, y, x_probe, rate, steps, C_b, C_W, lambda_b, lambda_W, pairs, chunk, seed):
    """Gradient descent on (1/2) sum (z - y)^2: ({key: (T, N, N)} means over networks, {key: (pairs, T, N, N)}).

    Mirrored pairs, theta_L and - theta_L: what is odd in the outputs averages out.
    """
    generator = torch.Generator().manual_seed(seed)
    everything = {}
    for _ in range(pairs // chunk):
        half = draw(widths, C_b, C_W, chunk, generator, x.dtype)
        layers = [(torch.cat([w, w]), torch.cat([b, b])) for w, b in half[:-1]]
        (weight, bias) = half[-1]
        layers.append((torch.cat([weight, -weight]), torch.cat([bias, -bias])))
        leaves = [tensor.requires_grad_() for layer in layers for tensor in layer]
        with torch.no_grad():
            start = hidden(layers, x_probe, sigma)
            before = observed(layers, x_probe, sigma, start, (lambda_b, lambda_W))
        for step in range(max(steps)):
            loss = (hidden(layers, x, sigma)[-1] - y).square().sum() / 2
            gradients = torch.autograd.grad(loss, leaves)
            with torch.no_grad():
                for index, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
                    leaf -= rate * (lambda_W / leaf.shape[-1] if index % 2 == 0 else lambda_b) * gradient
                if step + 1 in steps:
                    now = observed(layers, x_probe, sigma, start, (lambda_b, lambda_W))
                    for key, value in now.items():
                        change = value - before[key]
                        pair = (change[:chunk] + change[chunk:]) / 2
                        everything.setdefault((*key, step + 1), []).append(pair.double())
    return {key: torch.cat(value) for key, value in everything.items()}


def projected(change, theory):
    """(ratio, standard error) of the mean change (pairs, N, N) on the theory's (N, N)."""
    along = (change * theory).sum((1, 2)) / theory.square().sum()
    return float(along.mean()), float(along.std() / len(along) ** 0.5)


def angle(change, theory):
    """|mean - theory| / |theory|."""
    return float((change.mean(0) - theory).norm() / theory.norm())
