"""Networks drawn from an ensemble: the finite-width spread of the NTK at initialization, by Monte Carlo.

At infinite width the NTK does not fluctuate; at width n it does, with a relative standard
deviation of order sqrt(L/n) (PDLT 8.3).
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.laws import draw
from torch_eft.theory.initialization.infinite_width import check_inputs


def sample_ntk(ensemble: MLPEnsemble, x: Tensor, *, num_networks: int, seed: int = 0) -> Iterator[Tensor]:
    """NTKs of independently drawn networks, exactly at their finite width.

    The layer-to-layer form of the NTK (PDLT 8.1): with B^(l)_{ij;a} = dz^(L)_i / dz^(l)_j,
    ``H_{ij;ab} = sum_l (lambda_b + lambda_W s^(l-1)_a . s^(l-1)_b / n_{l-1}) sum_k B^(l)_{ik;a} B^(l)_{jk;b}``.
    It uses its own generator and leaves the global random state alone.

    Args:
        ensemble: The ensemble.
        x: Inputs, (N, n_0).
        num_networks: How many to draw.
        seed: Seed of the generator.

    Yields:
        (N, N, n_L, n_L), ``[a, b, i, j] = H_{ij;ab}``, float64, on the device of ``x``.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> ensemble = theory.MLPEnsemble([3, 8, 2], "tanh")
        >>> [H.shape for H in theory.sample_ntk(ensemble, torch.eye(3), num_networks=1)]
        [torch.Size([3, 3, 2, 2])]
    """
    x = check_inputs("x", x, ensemble)
    generator = torch.Generator(x.device).manual_seed(seed)
    for _ in range(num_networks):
        yield _ntk_of_one_network(ensemble, x, generator)


def ntk_trace_spread(ensemble: MLPEnsemble, x: Tensor, *, num_networks: int = 64, widest: int = 256) -> float:
    """Standard deviation over initializations of the NTK's mean diagonal, (1/N n_L) sum_{a,i} H_{ii;aa}.

    To leading order its variance is 1/n at fixed ratios of the widths (PDLT 8.3), so wide networks are sampled
    scaled down to ``widest`` and the result scaled back: an error of relative order 1/widest, at bounded cost.

    Args:
        ensemble: The ensemble.
        x: Inputs, (N, n_0).
        num_networks: How many to draw; the relative standard error of the result is 1 / sqrt(2 num_networks).
        widest: Largest hidden width to sample at.

    Returns:
        The standard deviation; 0 without a hidden layer.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> theory.ntk_trace_spread(theory.MLPEnsemble([3, 2], "tanh"), torch.eye(3))
        0.0
    """
    if not ensemble.hidden_widths:
        return 0.0
    shrink = min(1.0, widest / max(ensemble.hidden_widths))
    hidden = [max(1, round(shrink * n)) for n in ensemble.hidden_widths]
    small = replace(ensemble, widths=(ensemble.widths[0], *hidden, ensemble.widths[-1]))
    traces = [
        H.diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1).mean()
        for H in sample_ntk(small, x, num_networks=num_networks)
    ]
    return float(torch.stack(traces).std()) * math.sqrt(shrink)


def _ntk_of_one_network(ensemble: MLPEnsemble, x: Tensor, generator: torch.Generator) -> Tensor:
    signal, weights, slopes, shares = x, [], [], []
    for index, (n_in, n_out) in enumerate(zip(ensemble.widths[:-1], ensemble.widths[1:], strict=True)):
        shares.append(ensemble.lambda_b[index] + ensemble.lambda_W[index] * (signal @ signal.T) / n_in)
        weight = draw(ensemble.weight_law[index], ensemble.C_W[index] / n_in, (n_out, n_in), generator, x)
        z = signal @ weight.T + draw(ensemble.bias_law[index], ensemble.C_b[index], (n_out,), generator, x)
        weights.append(weight)
        slopes.append(ensemble.activation(z, 1))
        signal = ensemble.activation(z)
    count, outputs = len(x), ensemble.widths[-1]
    B = torch.eye(outputs, dtype=x.dtype, device=x.device).expand(count, -1, -1)
    H = x.new_zeros(count, count, outputs, outputs)
    for index in reversed(range(ensemble.depth)):
        flat = B.reshape(count * outputs, -1)
        gram = (flat @ flat.T).reshape(count, outputs, count, outputs).permute(0, 2, 1, 3)
        H += shares[index][:, :, None, None] * gram
        if index > 0:
            B = (B @ weights[index]) * slopes[index - 1][:, None, :]
    return H
