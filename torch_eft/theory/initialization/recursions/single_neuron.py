"""What weights that are not Gaussian add to cumulants of one and the same neuron of a layer, E, times 1/n_{l-1}.

With the excess kurtosis k4 of one weight, four equal neuron indices get a term beside the three pairings,

    E[zzzz] E_zzzz    E[z z DH] E_zzH    E[DH DH] E_HH    E[dH z] E_dHz    E[ddI] E_ddI    E[ddII] E_ddII,

each the k4 of the layer times the source of a vertex. Between neurons, and so in the next layer's vertices, k4 enters
at order 1/n^2 only; the mean of one neuron's function sees E_zzzz and E_zzH (``responses``, ``kernels.Theta1``).
"""

from torch import Tensor

from torch_eft.theory.initialization.evaluator import Vertices


def E_zzzz(v: Vertices, layer: int, labels: str) -> Tensor:
    """E[z z z z], connected."""
    return _source(v, layer, labels, (0, 0, 0, 0), ())


def E_zzH(v: Vertices, layer: int, labels: str) -> Tensor:
    """E[z_1 z_2 DH_34]."""
    return _source(v, layer, labels, (0, 0, 1, 1), ((2, 3),))


def E_HH(v: Vertices, layer: int, labels: str) -> Tensor:
    """E[DH_12 DH_34]."""
    return _source(v, layer, labels, (1, 1, 1, 1), ((0, 1), (2, 3)))


def E_dHz(v: Vertices, layer: int, labels: str) -> Tensor:
    """E[dH_012 z_3]."""
    return _source(v, layer, labels, (2, 1, 1, 0), ((0, 1), (0, 2)))


def E_ddI(v: Vertices, layer: int, labels: str) -> Tensor:
    """E[ddI_0123]."""
    return _source(v, layer, labels, (3, 1, 1, 1), ((0, 1), (0, 2), (0, 3)))


def E_ddII(v: Vertices, layer: int, labels: str) -> Tensor:
    """E[ddII_1234]."""
    return _source(v, layer, labels, (2, 2, 1, 1), ((0, 1), (0, 2), (1, 3)))


def _source(
    v: Vertices, layer: int, labels: str, orders: tuple[int, ...], kernels: tuple[tuple[int, int], ...]
) -> Tensor:
    """k4 C_W^2 <prod sigma^(p)> prod Theta."""
    m = layer - 1
    k4 = v.excess_kurtosis(m)
    if k4 == 0 or (max(orders) > 1 and not v.curved):
        return v.zero()
    value = k4 * v.C_W(m) ** 2 * v.moment(m, orders, labels)
    for first, second in kernels:
        value = value * v.Theta(m, labels[first], labels[second])
    return value
