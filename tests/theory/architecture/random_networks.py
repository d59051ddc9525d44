"""Networks composed at random of what the theory reads: dense and convolutional, skips, norms, pooling."""

import random
from dataclasses import replace

import torch
from torch import nn
from torch.func import functional_call, jacrev, stack_module_state, vmap

from torch_eft import theory
from torch_eft.theory.architecture.nodes import Weight

POSITIONS = 4
ACTIVATIONS = (nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, lambda: nn.LeakyReLU(0.2))


class Skip(nn.Module):
    """x + branch(x), and an activation behind it or none."""

    def __init__(self, branch, after):
        super().__init__()
        self.branch, self.after = branch, after

    def forward(self, x):
        return self.after(x + self.branch(x))


class OverChannels(nn.Module):
    """A norm over channels of (N, C, positions), which in torch are its last dimension."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.mT).mT if x.ndim == 3 else self.norm(x)


def random_network(seed, n=256, outputs=32):
    """A function that draws a network, and its input's shape."""

    def make():
        choose = random.Random(seed)
        dense = choose.random() < 0.3
        activation = choose.choice(ACTIVATIONS)
        norms = (
            lambda: nn.GroupNorm(1, n),
            lambda: OverChannels(nn.LayerNorm(n)),
            lambda: OverChannels(nn.RMSNorm(n, eps=1e-6)),
        )
        norm = choose.choice(norms)

        def layer():
            if dense:
                return nn.Linear(n, n)
            mode = choose.choice(("zeros", "circular"))
            return nn.Conv1d(n, n, 3, padding=1, padding_mode=mode) if choose.random() < 0.7 else nn.Conv1d(n, n, 1)

        def piece():
            kind = choose.choice(("plain", "normed", "pre", "post", "pre-norm", "post-norm"))
            if kind == "plain":
                return [activation(), layer()]
            if kind == "normed":
                return [norm(), activation(), layer()]
            before = [norm()] if "norm" in kind else []
            if kind.startswith("pre"):
                branch = [*before, activation(), layer()]
                return [
                    Skip(nn.Sequential(*branch, *([activation(), layer()] * (choose.random() < 0.5))), nn.Identity())
                ]
            return [activation(), Skip(nn.Sequential(layer(), *before), activation()), layer()]

        first = nn.Linear(5, n) if dense else nn.Conv1d(5, n, 3, padding=1)
        pieces = [part for _ in range(choose.randint(1, 3)) for part in piece()]
        pool = [nn.AvgPool1d(2)] if not dense and choose.random() < 0.3 else []
        positions = POSITIONS // 2 if pool else POSITIONS
        if dense:
            last = [nn.Linear(n, outputs)]
        elif choose.random() < 0.5:
            last = [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(n, outputs)]
        else:
            last = [nn.Flatten(), nn.Linear(n * positions, outputs)]
        model = nn.Sequential(first, *pieces, activation(), *pool, *last).double()
        make.gain = gain = choose.uniform(1.0, 2.0)
        for each in model.modules():
            if isinstance(each, nn.Linear | nn.Conv1d):
                nn.init.normal_(each.weight, std=(gain / each.weight[0].numel()) ** 0.5)
                nn.init.normal_(each.bias, std=0.3)
        return model

    torch.manual_seed(0)
    return make, ((5,) if isinstance(make()[0], nn.Linear) else (5, POSITIONS))


def z_scores(seed, number, n=256):
    """Largest |z| of K and Theta of one random network, theory against networks drawn; and the theory's validity."""
    make, shape = random_network(seed, n)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.manual_seed(1)
    read = theory.read_architecture(make(), x)
    laws = {"C_W": make.gain, "C_b": 0.09}  # not those of one network, good to some per cent
    architecture = theory.Architecture(
        [replace(node, **laws) if isinstance(node, Weight) else node for node in read.nodes]
    )
    found = theory.architecture_statistics(architecture, x, num_samples=4096, seed=seed)
    Ks, Hs = [], []
    for start in range(0, number, 10):
        networks = []
        for index in range(start, min(number, start + 10)):
            torch.manual_seed(5000 + index)
            networks.append(make())
        parameters, _ = stack_module_state(networks)

        def output(p, sample, network=networks[0]):
            z = functional_call(network, p, (sample[None],))[0]
            return z[0], z

        def jacobian(p, sample, f=output):
            return jacrev(lambda q: f(q, sample), has_aux=True)(p)

        J, z = vmap(lambda p, f=jacobian: vmap(lambda sample: f(p, sample))(x))(parameters)
        J = torch.cat([part.flatten(2) for part in J.values()], -1).detach()
        Hs.append(J @ J.mT)
        Ks.append((z @ z.mT / z.shape[-1]).detach())
    scores = {}
    for name, values, truth in (("K", torch.cat(Ks), found.K["output"]), ("Theta", torch.cat(Hs), found.Theta)):
        error = (values.var(0) / number + found.error.get(name, torch.zeros(1)).double().square()).sqrt()
        scores[name] = float(((values.mean(0) - truth) / error).abs().max())
    return scores, found
