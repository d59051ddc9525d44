"""dH, ddI and ddII between all outputs, contracted with the few directions in which a training stays.

For directions v_c = lambda grad (b_c . z) of r combinations of training outputs, and u_cd = d2(b_c . z) v_d,

    dH_xyc = d2z_x[J_y, v_c],  ddI_xycd = d3z_x[J_y, v_c, v_d],  ddII_xycd = d2z_x v_c . d2z_y v_d,
    X_xycd = d2z_x J_y . u_cd.

All are Gram matrices of Taylor coefficients of the Jacobian along v_c, v_c + v_d (polarisation; this gives the part of
ddII that is symmetric in c and d) and lambda u_cd, so that no tensor with more than two indices of outputs is formed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.measure.forward.checks import check_twice_differentiable
from torch_eft.measure.forward.decompositions import Decomposed
from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.forward.probe import Probe
from torch_eft.measure.forward.reverse_mode import pull_back
from torch_eft.measure.jacobian.engine import JacobianGram
from torch_eft.measure.jacobian.gram import Orders
from torch_eft.measure.kernels.dntk import no_derivatives
from torch_eft.measure.kernels.metrics import as_matrix


@dataclass(frozen=True)
class DirectionPair:
    """Matrices (M, M) of one pair of directions, index (sample, output).

    Args:
        c: First direction.
        d: Second one.
        dH: ``dH_xyc``, with c = d only.
        ddI: ``ddI_xycd``, with c <= d only.
        ddII: ``(ddII_xycd + ddII_xydc) / 2``, with c <= d only.
        X: ``X_xycd``.
    """

    c: int
    d: int
    dH: Tensor | None = None
    ddI: Tensor | None = None
    ddII: Tensor | None = None
    X: Tensor | None = None


def along_path(
    network: IsolatedModel,
    probe: Probe,
    train: Probe,
    basis: Tensor,
    lambdas: Mapping[str, float] | float | None,
    memory: int,
) -> Iterator[DirectionPair]:
    """Yield the matrices of every pair of directions, one pair after another.

    Raises a ``ValueError`` if derivatives are wrong, or not those of the network's own change.

    Args:
        network: Isolated.
        probe: All points.
        train: The training points.
        basis: b, (r, N C), on the training outputs, index (sample, output).
        lambdas: See ``ntk``.
        memory: Bytes allowed for one Gram matrix and its factors.

    Yields:
        r (r + 1) / 2 parts with dH, ddI and ddII, then r^2 parts with X.
    """
    engine = JacobianGram(network, probe, lambdas, memory)
    curvature = _Curvature(network, train, basis, engine.lambdas)
    directions, r = curvature.directions, len(basis)

    def gram(direction: list[Tensor], pairs: list[Orders]) -> dict[Orders, Tensor]:
        found = engine.gram(pairs, dict(zip(engine.trainable, direction, strict=True)))
        if found.cut:
            raise ValueError(f"model: {no_derivatives(found.cut)}")
        return {pair: as_matrix(value) for pair, value in found.matrices.items()}

    squares: list[dict[Orders, Tensor]] = []
    for c in range(r):
        squares.append(gram(directions[c], [(1, 0), (2, 0), (1, 1)]))
        yield DirectionPair(c, c, squares[c].pop((1, 0)), 2 * squares[c][2, 0], squares[c][1, 1])
    for c in range(r):
        for d in range(c + 1, r):
            both = gram([a + b for a, b in zip(directions[c], directions[d], strict=True)], [(2, 0), (1, 1)])
            halves = {pair: (both[pair] - squares[c][pair] - squares[d][pair]) / 2 for pair in both}
            yield DirectionPair(c, d, ddI=2 * halves[2, 0], ddII=halves[1, 1])
    for c in range(r):
        for d, direction in enumerate(curvature.rows(c)):
            yield DirectionPair(c, d, X=gram(direction, [(1, 0)])[1, 0])


class _Curvature:
    """v_c and lambda u_cd, by reverse mode on the training points."""

    def __init__(
        self, network: IsolatedModel, train: Probe, basis: Tensor, lambdas: Mapping[str, float | Tensor]
    ) -> None:
        self.basis, self.scales = basis, list(lambdas.values())
        self.leaves = [network.params[name].detach().requires_grad_() for name in lambdas]
        params = {**network.params, **dict(zip(lambdas, self.leaves, strict=True))}
        with torch.enable_grad(), Decomposed():
            self.z = network(params, network.place(train)).flatten()
        check_twice_differentiable(self.z)
        self.directions = [
            [scale * part.detach() for scale, part in zip(self.scales, self._gradient(c, keep=False), strict=True)]
            for c in range(len(basis))
        ]

    def _gradient(self, c: int, keep: bool) -> tuple[Tensor, ...]:
        return pull_back([self.z], [self.basis[c].to(self.z)], self.leaves, keep)

    def rows(self, c: int) -> Iterator[list[Tensor]]:
        """Yield lambda u_cd for every d."""
        gradient = self._gradient(c, keep=True)
        for direction in self.directions:
            u = pull_back(gradient, direction, self.leaves)
            yield [scale * part for scale, part in zip(self.scales, u, strict=True)]
