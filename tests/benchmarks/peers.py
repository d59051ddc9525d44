"""Other ways to the dense NTK, all (N, N, C, C) of it, as well as we know how to run them.

A peer is a function ``(model, x) -> H``; ``prepare`` returns it ready to be timed, or why it cannot be.
nngeometry is not a dependency: ``pip install --no-deps --target <temporary directory>/peers nngeometry==0.4``, or
anywhere on the path.
"""

import importlib.util
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

BUDGET = 2**30
"""Bytes of Jacobian at a time."""

_ELSEWHERE = Path(tempfile.gettempdir()) / "peers"
if _ELSEWHERE.is_dir():
    sys.path.append(str(_ELSEWHERE))


def add_gram(H, J):
    """H += J J^T on and below the diagonal, in blocks of about 160 rows: more is slower, less wastes the symmetry."""
    parts = max(1, len(J) // 160)
    edges = [len(J) * i // parts for i in range(parts + 1)]
    for first, last in zip(edges, edges[1:], strict=False):
        H[first:last, :last].addmm_(J[first:last], J[:last].T)


def mirrored(H):
    return H.tril() + H.tril(-1).T


def torch_func(model, x, chunk=None, budget=BUDGET):
    """vmap(jacrev), then a product of matrices a parameter; the parameters in groups whose Jacobian fits ``budget``.

    Args:
        model: A module with outputs (N, C).
        x: Its inputs.
        chunk: Outputs differentiated at a time; None for all.
        budget: Bytes of Jacobian at a time. 64 MB and 256 MB were slower or equal on every workload.
    """
    with torch.no_grad():
        count, channels = model(x).shape
    rows = count * channels
    params = {name: p.detach() for name, p in model.named_parameters()}
    H = torch.zeros(rows, rows, dtype=next(iter(params.values())).dtype, device=x.device)

    def one_sample(group, sample):
        return functional_call(model, {**params, **group}, (sample[None],))[0]

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no batching rule and is slower under vmap
        for group in _groups(params, rows, budget):
            jacobian = vmap(jacrev(one_sample, chunk_size=chunk), (None, 0))(group, x)
            for name in group:
                add_gram(H, jacobian.pop(name).flatten(2).flatten(0, 1))
    return mirrored(H).view(count, channels, count, channels).permute(0, 2, 1, 3)


def _groups(params, rows, budget):
    groups, size = [{}], 0
    for name, p in params.items():
        more = rows * p.numel() * p.element_size()
        if groups[-1] and size + more > budget:
            groups.append({})
            size = 0
        groups[-1][name] = p
        size += more
    return groups


def torch_func_by_output(model, x):
    return torch_func(model, x, chunk=1)


def nngeometry_gram(model, x):
    from nngeometry import GramMatrix

    G = GramMatrix(model, [x.clone()]).to_torch()  # [i, a, j, b]; clone, because it sets requires_grad
    return G.detach().permute(1, 3, 0, 2)


def nngeometry_jacobian(model, x):
    from nngeometry import Jacobian

    J = Jacobian(model, [x.clone()]).to_torch().detach()  # [i, a, parameter]
    channels, count, _ = J.shape
    H = J.new_zeros(channels * count, channels * count)
    add_gram(H, J.flatten(0, 1))
    return mirrored(H).view(channels, count, channels, count).permute(1, 3, 0, 2)


def _prepare_torch_func(model, x):
    return _faster(model, x, torch_func, torch_func_by_output)


def _prepare_nngeometry(model, x):
    if importlib.util.find_spec("nngeometry") is None:
        return "not installed: pip install nngeometry"
    layers = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    if all(type(m) is nn.Linear for m in layers) and x.ndim == 2:
        return nngeometry_gram
    if isinstance(x, torch.LongTensor) or any(isinstance(m, nn.MultiheadAttention) for m in model.modules()):
        return "no embedding, attention or sequences"
    # The Gram form repeats two per-sample gradients C^2 times a layer where the layer is not Linear.
    return nngeometry_jacobian


def _faster(model, x, *candidates):
    """The candidate that needs less CPU time at its second call."""

    def seconds(candidate):
        candidate(model, x)
        begun = time.process_time()
        candidate(model, x)
        return time.process_time() - begun

    channels = model(x[:1]).shape[1]
    return min(candidates, key=seconds) if channels > 1 else candidates[0]


PEERS = {"torch.func": _prepare_torch_func, "nngeometry": _prepare_nngeometry}


def prepare(peer, model, x):
    """The function to time, or a reason in words."""
    return PEERS[peer](model, x)
