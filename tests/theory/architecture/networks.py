"""Networks whose kernels and spread the theory is compared with, in torch."""

from torch import nn


class Branch(nn.Module):
    """A residual block with norms in front of its layers."""

    def __init__(self, n, norm=lambda n: nn.GroupNorm(1, n), activation=nn.GELU):
        super().__init__()
        self.norms = nn.ModuleList([norm(n), norm(n)])
        self.layers = nn.ModuleList([nn.Conv1d(n, n, 3, padding=1), nn.Conv1d(n, n, 3, padding=1)])
        self.activation = activation()

    def forward(self, x):
        h = x
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = layer(self.activation(norm(h)))
        return x + h


def residual(n, activation=nn.GELU):
    """Norms in front: every activation reads what is Gaussian."""
    first = nn.Conv1d(3, n, 3, padding=1), Branch(n), nn.Conv1d(n, n, 3, stride=2, padding=1)
    last = nn.GroupNorm(1, n), activation(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(n, 2)
    return nn.Sequential(*first, *last).double()


class BasicBlock(nn.Module):
    """That of ResNet-18 with GroupNorm: its last activation reads the sum, which is not Gaussian."""

    def __init__(self, before, n, activation, stride, conv, groups=1):
        super().__init__()
        self.conv1, self.norm1 = conv(before, n, 3, stride, 1, bias=False), nn.GroupNorm(groups, n)
        self.conv2, self.norm2 = conv(n, n, 3, 1, 1, bias=False), nn.GroupNorm(groups, n)
        self.activation, self.skip = activation(), nn.Identity()
        if stride > 1 or before != n:
            self.skip = nn.Sequential(conv(before, n, 1, stride, bias=False), nn.GroupNorm(groups, n))

    def forward(self, x):
        h = self.activation(self.norm1(self.conv1(x)))
        return self.activation(self.norm2(self.conv2(h)) + self.skip(x))


def resnet(n, activation=nn.ReLU, stages=2, blocks=1, dims=1, outputs=3, pool=False):
    """ResNet with GroupNorm(1) behind its layers, torchvision's initialization, without max pooling."""
    conv = (nn.Conv1d, nn.Conv2d)[dims - 1]
    layers = [conv(3, n, 3, padding=1, bias=False), nn.GroupNorm(1, n), activation()]
    layers += [(nn.AvgPool1d, nn.AvgPool2d)[dims - 1](2)] if pool else []
    for stage in range(stages):
        for block in range(blocks):
            before = n * 2 ** max(stage - (block == 0), 0)
            stride = 2 if stage and not block else 1
            layers.append(BasicBlock(before, n * 2**stage, activation, stride, conv))
    last = n * 2 ** (stages - 1)
    average = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[dims - 1](1)
    model = nn.Sequential(*layers, average, nn.Flatten(), nn.Linear(last, outputs)).double()
    for layer in model.modules():
        if isinstance(layer, conv):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return model
