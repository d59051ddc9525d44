"""Label maps are what torch's layers do to positions, and kernels through them what the layers do to pairs."""

import math

import pytest
import torch
from torch import nn

from torch_eft.theory.architecture.label_maps import (
    LabelMaps,
    adaptive_axis,
    convolution_axis,
    flatten_axis,
    window_axis,
)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "circular"),
    [(1, 0, 1, False), (2, 1, 1, False), (1, 2, 2, True), (2, 1, 1, True), (1, 2, 2, False)],
)
def test_a_convolution(dims, stride, padding, dilation, circular):
    mode = "circular" if circular else "zeros"
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    torch.manual_seed(0)
    layer = kind(2, 3, 3, stride, padding, dilation, bias=False, padding_mode=mode).double()
    sizes = (7, 6, 5)[:dims]
    maps = LabelMaps(
        tuple(
            convolution_axis(n, 3, stride=stride, padding=(padding,) * 2, dilation=dilation, circular=circular)
            for n in sizes
        )
    )
    x = torch.randn(4, 2, *sizes, dtype=torch.float64)
    moved = maps.on_labels(x.flatten(2))  # (k, N, channels, P')
    z = torch.einsum("ijd,dnjp->nip", layer.weight.flatten(2), moved)
    truth = layer(x).detach()
    assert maps.outputs == tuple(truth.shape[2:])
    assert (z - truth.flatten(2)).abs().max() < 1e-12
    X = torch.randn(2, math.prod(sizes), math.prod(sizes), dtype=torch.float64)
    dense = maps.on_labels(torch.eye(X.shape[-1], dtype=torch.float64)).mT  # (k, P', P)
    average = torch.einsum("dop,npq,drq->nor", dense, X, dense) / maps.count
    assert (maps.average(X) - average).abs().max() < 1e-12
    G = torch.randn_like(average)
    assert abs(float((maps.average(X) * G).sum() - (X * maps.average_adjoint(G)).sum())) < 1e-10


@pytest.mark.parametrize(
    "layer",
    [
        nn.AvgPool1d(3, 2, padding=1),
        nn.AvgPool1d(3, 2, padding=1, count_include_pad=False),
        nn.AvgPool1d(2, 2, ceil_mode=True),
        nn.AvgPool1d(3, 2, padding=1, ceil_mode=True),
        nn.AdaptiveAvgPool1d(3),
    ],
    ids=str,
)
def test_pooling_by_average(layer):
    x = torch.randn(1, 1, 8, dtype=torch.float64)
    if isinstance(layer, nn.AdaptiveAvgPool1d):
        axis = adaptive_axis(8, 3)
    else:
        axis = window_axis(
            8,
            layer.kernel_size[0],
            stride=layer.stride[0],
            padding=layer.padding[0],
            count_padding=layer.count_include_pad,
            ceil=layer.ceil_mode,
        )
    maps = LabelMaps((axis,))
    assert (maps.on_labels(x)[0] - layer(x)).abs().max() < 1e-12
    g = torch.randn(2, *maps.outputs, dtype=torch.float64)
    adjoint = maps.adjoint_on_labels(g)
    assert (torch.einsum("np,p->n", adjoint, x[0, 0]) - g @ layer(x)[0, 0]).abs().max() < 1e-12


def test_a_flattened_axis_has_a_weight_for_every_position():
    maps = LabelMaps((flatten_axis(5),))
    X = torch.randn(5, 5, dtype=torch.float64)
    assert maps.count == 5
    assert (maps.average(X) - X.diagonal().mean()).abs().max() < 1e-15
    assert torch.equal(maps.average_adjoint(torch.ones(1, 1)), torch.eye(5) / 5)
