"""What the theory does not cover is refused by name, with what to do instead."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_eft import theory


class Forward(nn.Module):
    """Two layers with a function of both in between."""

    def __init__(self, function, parameter=None):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.parameter = None if parameter is None else nn.Parameter(parameter)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self, x))


def conv(*layers):
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))


def trained(layer):
    nn.init.normal_(layer.weight)
    return layer


def zeroed(layer):
    nn.init.zeros_(layer.weight)
    return layer


def changed_through_a_view(h):
    h.view(2, 4).mul_(2.0)
    return h


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def without_gradients(m, x):
    with torch.no_grad():
        h = torch.tanh(m.first(x))
    return m.second(h)


def changed_behind_a_view(m, x):
    h = m.first(x)
    v = h.view(2, 4, 1)
    h.relu_()
    return v.flatten(1)


def eye(layer):
    nn.init.eye_(layer.weight)
    return layer


def copied(m, x):
    return m.second(m.first(x))


COPIED = Forward(copied)
COPIED.second.load_state_dict(COPIED.first.state_dict())


IMAGE, ROW = torch.zeros(2, 1, 4, 4), torch.zeros(2, 4)
TOKENS = torch.zeros(2, 3, 4)
CASES = {
    "BatchNorm in training": (conv(nn.BatchNorm2d(4)), IMAGE, r"BatchNorm in training mode .* model\.eval\(\), or use"),
    "max pooling": (conv(nn.MaxPool2d(2)), IMAGE, "max pooling is not covered: pool by average"),
    "depthwise": (conv(nn.Conv2d(4, 4, 3, groups=4)), IMAGE, r"depthwise convolutions .* use groups = 1"),
    "grouped": (conv(nn.Conv2d(4, 4, 3, groups=2)), IMAGE, r"grouped convolutions .* use groups = 1"),
    "gating": (Forward(lambda m, x: m.first(x) * m.second(x)), ROW, r"gating .* use seeds"),
    "glu": (Forward(lambda m, x: F.glu(torch.cat([m.first(x)] * 2, 1))), ROW, "concatenation is not covered"),
    "token mixing": (Forward(lambda m, x: m.second(m.first(x).mT)), torch.zeros(2, 4, 4), "token mixing"),
    "attention": (
        Forward(lambda m, x: F.scaled_dot_product_attention(m.first(x), m.first(x), m.second(x)).mean(1)),
        TOKENS,
        "used twice",
    ),
    "attention of its own": (
        Forward(lambda m, x: F.scaled_dot_product_attention(*[m.first(x)] * 3).mean(1)),
        TOKENS,
        "attention is not covered: use seeds",
    ),
    "raw skip": (Forward(lambda m, x: x + m.first(x)), ROW, "put a Linear or a convolution on the skip"),
    "broadcast": (Forward(lambda m, x: m.first(x) + m.second(x).mean(1, keepdim=True)), TOKENS, "broadcasting"),
    "parameter": (Forward(lambda m, x: m.first(x) + m.parameter, torch.ones(4)), ROW, "position embedding"),
    "LayerScale": (Forward(lambda m, x: m.first(x) * m.parameter, torch.ones(4)), ROW, "LayerScale"),
    "unknown": (
        Forward(lambda m, x: torch.fft.fft(m.first(x)).real),
        ROW,
        "the operation .* is not covered: use seeds",
    ),
    "no linear read-out": (nn.Sequential(nn.Linear(4, 3), nn.Tanh()), ROW, "End the network with a Linear"),
    "positions left": (nn.Conv1d(3, 2, 1), TOKENS, r"not \(N, C\): flatten or pool"),
    "a path by values": (Forward(lambda m, x: m.first(x) if x.sum() > 0 else m.second(x)), ROW, "cannot be traced"),
    "dropout": (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 1)), ROW, r"dropout .* model\.eval\(\)"),
    "gains trained": (conv(trained(nn.GroupNorm(1, 4))), IMAGE, r"gains of '1' are not equal \(trained\)"),
    "gains of 0": (conv(zeroed(nn.GroupNorm(1, 4))), IMAGE, "gains of '1' are 0"),
    "weights of 0": (nn.Sequential(nn.Linear(4, 4), zeroed(nn.Linear(4, 1))), ROW, "weights of '1' are all 0"),
    "InstanceNorm": (conv(nn.InstanceNorm2d(4)), IMAGE, "InstanceNorm .* use GroupNorm"),
    "heads": (Forward(lambda m, x: m.first(x).view(2, 2, 2).mT.flatten(1)), ROW, "splits channels"),
    "positions mixed": (
        Forward(lambda m, x: F.layer_norm(m.first(x).mT, (3,)).mT.mean(1)),
        TOKENS,
        "normalize over channels",
    ),
    "channel mean": (Forward(lambda m, x: m.first(x).mean(2)), torch.zeros(2, 4, 4), "average over positions alone"),
    "no gradients": (Forward(without_gradients), ROW, r"gradient of 'first\.weight' .*no_grad"),
    "a backward of its own": (Forward(lambda m, x: Reversed.apply(m.first(x))), ROW, "gradient of 'first"),
    "samples that mix": (Forward(lambda m, x: m.first(x - x.mean(0))), ROW, "outputs are not those of the operations"),
    "samples not first": (
        Forward(lambda m, x: m.first(x.transpose(0, 1)).mean(1)),
        torch.zeros(2, 2, 4),
        "outputs are not",
    ),
    "noise": (Forward(lambda m, x: m.first(x + torch.randn_like(x))), ROW, r"draws random numbers: model\.eval"),
    "dropout of inputs": (nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1)), ROW, r"random numbers: model\.eval"),
    "BatchNorm of inputs": (
        nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1)),
        ROW,
        "BatchNorm in training mode",
    ),
    "another threshold": (Forward(lambda m, x: F.softplus(m.first(x), 1.0, 0.5)), ROW, "use threshold = 20"),
    "rounding": (
        Forward(lambda m, x: torch.div(m.first(x), 0.1, rounding_mode="floor")),
        ROW,
        "division that rounds",
    ),
    "subtracted from a constant": (Forward(lambda m, x: 1.0 - m.first(x)), ROW, "leave the constant out"),
    "norm of positions": (
        nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(24, 1)),
        TOKENS,
        "GroupNorm whose second dimension is not the channels",
    ),
    "BatchNorm of positions": (
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(24, 1)).eval(),
        TOKENS,
        "BatchNorm whose second dimension is not the channels",
    ),
    "an identity": (nn.Sequential(nn.Linear(4, 4), eye(nn.Linear(4, 4)), nn.Linear(4, 1)), ROW, "weights of '1' are 0"),
    "a copied layer": (COPIED, ROW, r"'first\.weight' and 'second\.weight' have the same values"),
    "changed behind a view": (Forward(changed_behind_a_view), ROW, "changed in place"),
    "changed in place": (Forward(lambda m, x: changed_through_a_view(m.first(x))), ROW, "changed in place"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_refusal_names_what_and_says_what_to_do(case):
    model, x, text = CASES[case]
    with pytest.raises(theory.NotReadableError, match=text):
        theory.read_architecture(model, x)


def test_inputs_that_do_not_fit_are_refused():
    x = torch.ones(1, 4)
    architecture = theory.read_architecture(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), x)
    with pytest.raises(ValueError, match="was read as"):
        theory.architecture_statistics(architecture, torch.ones(1, 5))
    with pytest.raises(ValueError, match="num_samples: 2 given"):
        theory.architecture_statistics(architecture, x, num_samples=2)
    with pytest.raises(TypeError, match=r"give a torch\.nn\.Module"):
        theory.read_architecture("resnet", x)
