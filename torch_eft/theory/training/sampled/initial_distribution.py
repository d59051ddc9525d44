"""Draws of the start of training: z(0) ~ N(0, K), and the fluctuations of kernel and NTK."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from torch_eft.theory.gaussian.points import square_root
from torch_eft.theory.initialization.estimators import RECURSIONS, VertexReplicas
from torch_eft.theory.initialization.evaluator import FLUCTUATIONS, SINGLE_NEURON, VertexSource, full_tensor
from torch_eft.theory.initialization.vertex_tiles import with_single_neurons
from torch_eft.theory.training.sampled.dynamics import Fluctuation

_ROUNDING = 1e-12


def draw_outputs(K: Tensor, outputs: int, count: int, generator: torch.Generator) -> Tensor:
    """Draws of N(0, K) for every output, in pairs z, -z, with their covariance exact.

    Args:
        K: (N, N).
        outputs: C.
        count: S, even, more than twice the rank of all draws.
        generator: Of random numbers.

    Returns:
        (S, N, C).

    Raises:
        ValueError: If there are too few draws.
    """
    _, factor = square_root(K)
    rank = factor.shape[1]
    if count <= 2 * rank * outputs:
        raise ValueError(
            f"num_draws: {count} per batch given; {rank} independent inputs of {outputs} outputs ask for more than "
            f"{2 * rank * outputs}"
        )
    u = torch.randn(count // 2, rank * outputs, generator=generator, dtype=K.dtype, device=K.device)
    u = torch.linalg.solve_triangular(torch.linalg.cholesky(u.T @ u / len(u)), u.T, upper=False).T
    z = torch.einsum("xr,sri->sxi", factor, u.unflatten(1, (rank, outputs)))
    return torch.cat([z, -z])


def all_vertices(vertices: VertexReplicas, points: Tensor, single: bool) -> tuple[dict[str, Tensor], float]:
    """Every vertex of the output over all points.

    Args:
        vertices: The evaluators.
        points: Index of all points.
        single: Whether what read-out weights that are not Gaussian add to cumulants of a single output is to be in V,
            D, A, P, R and S: they then describe a network with one output.

    Returns:
        ``{name: (N,) * 2 or (N,) * 4}``, labels as printed, and the largest standard error (rms) relative to the
        vertex (rms).
    """
    count, sets = len(points), dict.fromkeys("abcd", points)

    left = {*FLUCTUATIONS, *(() if single else SINGLE_NEURON)}

    def read(source: VertexSource) -> Iterator[tuple[str, Tensor]]:
        for name in [name for name in RECURSIONS if name not in left]:
            yield name, full_tensor(source, name, vertices.depth, count).double()

    results = vertices.replicas(sets).combined(read)
    worst = max(error / max(float(value.square().mean().sqrt()), 1e-300) for value, error in results.values())
    tensors = {name: value for name, (value, _) in results.items()}
    return with_single_neurons(tensors) if single else tensors, worst


class Fluctuations:
    """Draws of (DG, X delta_ij + Y_ij): with (DG, X) of covariance ((V, D), (D, A)), Y of covariance B.

    Where vertices are sampled, small eigenvalues may come out negative: they are drawn apart, to count negatively.

    Args:
        tensors: Vertices over all points, over n.
        outputs: C.
        train: Index of the first training point.
    """

    def __init__(self, tensors: Mapping[str, Tensor], outputs: int, train: int) -> None:
        V, D, A, B = (tensors[name] for name in "VDAB")
        self._count, self._outputs, self._train = len(V), outputs, train
        pairs = self._count**2
        V, D, A = (value.reshape(pairs, pairs) for value in (V, D, A))
        joint = torch.cat([torch.cat([V, D], 1), torch.cat([D.T, A], 1)])
        self._factors = list(zip(_roots(joint), _roots(B.transpose(1, 2).reshape(pairs, pairs)), strict=True))

    def draw(self, count: int, generator: torch.Generator) -> Iterator[Fluctuation]:
        """The positive part, and the negative one if there is any."""
        N, C, t = self._count, self._outputs, self._train
        for sign, (common, apart) in zip((1.0, -1.0), self._factors, strict=True):
            if common.shape[1] + apart.shape[1] == 0:
                continue

            def normal(*shape: int, like: Tensor = common) -> Tensor:
                return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)

            DG, X = (normal(count, common.shape[1]) @ common.T).unflatten(1, (2, N, N)).unbind(1)
            Z = (normal(count, C, C, apart.shape[1]) @ apart.T).unflatten(3, (N, N)).permute(0, 3, 1, 4, 2)
            DH = (Z + Z.permute(0, 3, 4, 1, 2)) / 2**0.5
            DH = DH + torch.einsum("sxy,ij->sxiyj", X, torch.eye(C, dtype=X.dtype, device=X.device))
            yield Fluctuation(DG, DH[:, :, :, t:], sign)


def _roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Factors f of the positive and of the negative part, f f^T each."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    least = _ROUNDING * values.abs().max()
    scaled = vectors * values.abs().sqrt()
    return scaled[:, values > least], scaled[:, values < -least]
