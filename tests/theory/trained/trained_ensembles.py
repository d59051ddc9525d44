"""Ensembles of really trained networks in mirrored pairs, and the corrections of order 1/n measured on them.

A pair is a network and the one with the sign of its last layer changed: z(0) and all that is odd in it cancel. Control
variates, whose means the theory of initialization knows: the linear response of the mean output to H(0) (its mean is
that to Theta1 / n), and the order-0 propagation of z(0) z(0)^T (its mean is that of K + G1 / n).
"""

import math

import torch

from tests.oracles.ensembles import draw
from torch_eft.theory import get_activation


def stacked_pair(layers):
    """The networks and their mirror images, twice as many."""
    weight, bias = layers[-1]
    last = (torch.cat([weight, -weight]), torch.cat([bias, -bias]))
    return [*((torch.cat([w, w]), torch.cat([b, b])) for w, b in layers[:-1]), last]


class Networks:
    """Many networks as batched matrices: outputs, gradients on (1/2) sum (z - y)^2 and NTK in closed form."""

    def __init__(self, layers, sigma, lambda_b, lambda_W):
        self.weights = [w.clone() for w, _ in layers]
        self.biases = [b.clone() for _, b in layers]
        self.sigma, self.lambda_b, self.lambda_W = sigma, lambda_b, lambda_W
        self.velocities = {}

    def forward(self, x):
        signals, slopes = [x.expand(len(self.weights[0]), -1, -1)], []
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            z = torch.baddbmm(bias[:, None, :], signals[-1], weight.mT)
            signals.append(self.sigma(z))
            slopes.append(self.sigma(z, 1))
        return torch.baddbmm(self.biases[-1][:, None, :], signals[-1], self.weights[-1].mT), signals, slopes

    def step(self, x, y, rate, error=torch.sub, momentum=0.0):
        """One step along gradients of a loss with dLoss/dz = error(z, y), of ``torch.optim.SGD`` with momentum."""
        z, signals, slopes = self.forward(x)
        backward = error(z, y)
        for layer in reversed(range(len(self.weights))):
            before = None if layer == 0 else (backward @ self.weights[layer]) * slopes[layer - 1]
            weight, n = self.weights[layer], self.weights[layer].shape[-1]
            if momentum:
                velocity, push = self.velocities.setdefault(
                    layer, (torch.zeros_like(weight), torch.zeros_like(self.biases[layer]))
                )
                velocity.mul_(momentum).baddbmm_(backward.mT, signals[layer], alpha=self.lambda_W / n)
                push.mul_(momentum).add_(backward.sum(1), alpha=self.lambda_b)
                weight.sub_(velocity, alpha=rate)
                self.biases[layer].sub_(push, alpha=rate)
            else:
                weight.baddbmm_(backward.mT, signals[layer], alpha=-rate * self.lambda_W / n)
                self.biases[layer] -= rate * self.lambda_b * backward.sum(1)
            backward = before

    def ntk(self, x):
        """(S, N, N, n_L, n_L)."""
        z, signals, slopes = self.forward(x)
        S, N, outputs = z.shape
        B = torch.eye(outputs, dtype=z.dtype).expand(S, N, outputs, outputs)
        total = 0.0
        for layer in reversed(range(len(self.weights))):
            n = signals[layer].shape[-1]
            share = self.lambda_b + self.lambda_W * signals[layer] @ signals[layer].mT / n
            flat = B.reshape(S, N * outputs, -1)
            gram = (flat @ flat.mT).reshape(S, N, outputs, N, outputs).permute(0, 1, 3, 2, 4)
            total = total + share[..., None, None] * gram
            if layer:
                B = (flat @ self.weights[layer]).reshape(S, N, outputs, -1) * slopes[layer - 1][:, :, None, :]
        return total


def measured(ensemble, x, y, probes, rate, steps, networks, path, G1, Theta1, seed, batch, dtype=torch.float32):
    """Per pair, at some steps: (S, T, ..) samples of n times the corrections, control variates subtracted.

    Returns:
        ``{"mean": (S, T, N_all, n_L), "covariance": (S, T, N_p, N_p, n_L, n_L), "ntk": likewise}``; and ``"response"``,
        n times the linear response of the mean output to H(0) - Theta - Theta1 / n, which was subtracted.
    """
    n, outputs = ensemble.widths[-2], ensemble.widths[-1]
    sigma = get_activation(ensemble.activation)
    generator = torch.Generator().manual_seed(seed)
    x32, target = x.to(dtype), y.to(dtype)
    at = torch.tensor(steps)
    J, infinite_width = path.response(at), path.mean_output(at)
    eye = torch.eye(outputs, dtype=torch.float64)
    initial = ((J @ (G1 / n) @ J.mT)[:, :probes, :probes, None, None] * eye).expand(-1, -1, -1, outputs, outputs)
    found = {"mean": [], "covariance": [], "ntk": [], "response": []}
    for _ in range(math.ceil(networks / batch)):
        layers = draw(ensemble.widths, ensemble.C_b[0], ensemble.C_W[0], batch, generator, dtype)
        nets = Networks(stacked_pair(layers), sigma, ensemble.lambda_b[0], ensemble.lambda_W[0])
        z0 = nets.forward(x32)[0].double()
        H0 = nets.ntk(x32)[:batch].double()
        response = linear_response(path, H0 - (path.Theta + Theta1 / n)[..., None, None] * eye, y, rate, steps)
        means, products, drifts, done = [], [], [], 0
        for index, step in enumerate(steps):
            for _ in range(step - done):
                nets.step(x32[probes:], target, rate)
            done = step
            z, H = nets.forward(x32)[0].double(), nets.ntk(x32[:probes]).double()
            means.append((z[:batch] + z[batch:]) / 2 - infinite_width[index])
            centered = z[:, :probes] - infinite_width[index, :probes]
            frozen = (J[index] @ z0)[:, :probes]
            product = torch.einsum("sxi,syj->sxyij", centered, centered) - torch.einsum(
                "sxi,syj->sxyij", frozen, frozen
            )
            products.append((product[:batch] + product[batch:]) / 2 + initial[index])
            drifts.append((H[:batch] + H[batch:]) / 2 - H0[:, :probes, :probes])
        found["mean"].append(n * (torch.stack(means, 1) - response))
        found["covariance"].append(n * torch.stack(products, 1))
        found["ntk"].append(n * torch.stack(drifts, 1))
        found["response"].append(n * response)
    return {key: torch.cat(parts) for key, parts in found.items()}


def linear_response(path, deviation, y, rate, steps):
    """First-order response of z(t), z(0) = 0, to a change of H, (S, T, N_all, n_L).

    z1 <- z1 - rate (Theta z1 + dH e), with e the error at infinite width.
    """
    train = len(path.K) - len(y)
    change = torch.zeros(len(deviation), len(path.K), y.shape[1], dtype=torch.float64)
    Theta = path.Theta[:, train:]
    errors = path.mean_output(torch.arange(steps[-1] + 1))[:, train:] - y
    found = []
    for step, error in enumerate(errors):
        if step in steps:
            found.append(change)
        source = torch.einsum("sxaij,aj->sxi", deviation[:, :, train:], error)
        change = change - rate * (Theta @ change[:, train:] + source)
    return torch.stack(found, 1)


def projection(samples, theory):
    """Slope of the measured mean on the theory, and its standard error over the samples."""
    weights = theory / theory.square().sum()
    slopes = (samples * weights).flatten(1).sum(1)
    return float(slopes.mean()), float(slopes.std()) / math.sqrt(len(slopes))
