"""One-dimensional convolutional networks with kernels of two, really trained in mirrored pairs, written out."""

import torch


class Trained:
    """x -> conv -> tanh -> conv -> tanh -> flatten -> one output, (S, ..) at once.

    Args:
        x: (N, P, n_0), P positions.
        channels: n_1, n_2.
        options: C_b, C_W, lambda_b, lambda_W of every layer.
        count: Pairs; the second network of a pair has the read-out's sign changed.
        seed: Of the weights.
    """

    def __init__(self, x, channels, options, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.C_b, self.C_W, self.lambda_b, self.lambda_W = options
        self.x, self.n = x, channels
        self.fans = [2 * x.shape[2], 2 * channels[0], (x.shape[1] - 2) * channels[1]]
        rows = [*channels, 1]

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.W = [normal(count, row, fan) * (self.C_W / fan) ** 0.5 for row, fan in zip(rows, self.fans, strict=True)]
        self.b = [normal(count, row) * self.C_b**0.5 for row in rows]
        signs = (1, 1, -1)
        self.W, self.b = (
            [torch.cat([one, sign * one]) for one, sign in zip(some, signs, strict=True)] for some in (self.W, self.b)
        )

    def forward(self):
        """What enters the layers, the activations, and the outputs (2 S, N)."""
        h, inputs, hidden = self.x.expand(len(self.W[0]), -1, -1, -1), [], []
        for W, b in zip(self.W[:2], self.b[:2], strict=True):
            inputs.append(torch.cat([h[:, :, :-1], h[:, :, 1:]], -1))
            h = torch.tanh(torch.einsum("snpc,sic->snpi", inputs[-1], W) + b[:, None, None])
            hidden.append(h)
        inputs.append(h.flatten(2))
        return inputs, hidden, torch.einsum("snc,sc->sn", inputs[-1], self.W[2][:, 0]) + self.b[2]

    def backward(self, hidden):
        """Derivatives of the outputs with respect to the preactivations of both hidden layers."""
        n = self.n[0]
        last = self.W[2].unflatten(2, (-1, self.n[1])) * (1 - hidden[1] ** 2)
        q = torch.einsum("snpi,sic->snpc", last, self.W[1])
        first = torch.zeros_like(hidden[0])
        first[:, :, :-1] += q[..., :n]
        first[:, :, 1:] += q[..., n:]
        return first * (1 - hidden[0] ** 2), last

    def ntk(self):
        """(2 S, N, N)."""
        inputs, hidden, _ = self.forward()
        H = self.lambda_b + self.lambda_W / self.fans[2] * inputs[2] @ inputs[2].mT
        for signal, slope, fan in zip(inputs, self.backward(hidden), self.fans, strict=False):
            J = torch.einsum("snpi,snpc->snic", slope, signal).flatten(2)
            bias = slope.sum(2)
            H = H + self.lambda_W / fan * J @ J.mT + self.lambda_b * bias @ bias.mT
        return H

    def step(self, y, rate):
        """One step of gradient descent on (1/2) sum (z - y)^2."""
        inputs, hidden, z = self.forward()
        slopes, e = self.backward(hidden), rate * (z - y)
        changes = [
            (torch.einsum("sn,snpi,snpc->sic", e, d, p), torch.einsum("sn,snpi->si", e, d))
            for d, p in zip(slopes, inputs, strict=False)
        ]
        changes.append((torch.einsum("sn,snc->sc", e, inputs[2])[:, None], e.sum(1, keepdim=True)))
        for layer, (W, b) in enumerate(changes):
            self.W[layer] = self.W[layer] - self.lambda_W / self.fans[layer] * W
            self.b[layer] = self.b[layer] - self.lambda_b * b


def drift_and_output(x, channels, options, y, rate, steps, count, seed=0, batch=250):
    """Per pair: H(T) - H(0), (S, N, N), and z(T), (S, N)."""
    drifts, outputs = [], []
    for start in range(0, count, batch):
        networks = Trained(x, channels, options, batch, seed + start)
        before = networks.ntk()
        for _ in range(steps):
            networks.step(y, rate)
        drifts.append(torch.stack((networks.ntk() - before).chunk(2)).mean(0))
        outputs.append(torch.stack(networks.forward()[2].chunk(2)).mean(0))
    return torch.cat(drifts), torch.cat(outputs)
