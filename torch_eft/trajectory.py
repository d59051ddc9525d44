"""The one result type of every forecast, shared by the theory, the measurement and the drawing."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Validity:
    """How far a number can be trusted, in a word and a sentence.

    Args:
        flag: ``"valid"``, ``"caution"`` (corrections of order one in some quantities) or
            ``"invalid"`` (outside the regime or outside the derivation).
        reason: What decided it, with its size, and what would make it better.
    """

    flag: Literal["valid", "caution", "invalid"]
    reason: str

    def __str__(self) -> str:
        return f"{self.flag}: {self.reason}"


@dataclass(frozen=True)
class Trajectory:
    """Outputs and NTK on N_p probe points with C outputs, at T+1 times.

    Args:
        steps: (T+1,) optimizer steps; for gradient flow, flow time / learning rate.
        output_mean: (T+1, N_p, C), mean over initialisations; of one network, its output.
        output_covariance: (T+1, N_p, N_p, C, C), ``[t, a, b, i, j] = Cov(z_{i;a}(t), z_{j;b}(t))``; 0 for one network.
        ntk_mean: (T+1, N_p, N_p, C, C), ``[t, a, b, i, j] = E H_{ij;ab}(t)``.
        ntk_drift: Same shape, ``ntk_mean`` minus its value at step 0.
        provenance: Which level and order of the theory, for which ensemble.
        validity: Where it holds.
        output_truncation: (T+1, N_p, C), the size of what the next order would add to the output, estimated; None where
            nothing estimates it.
        ntk_truncation: (T+1, N_p, N_p, C, C), the same for the NTK.
        train_output_mean: (T+1, N, C), as ``output_mean``, on the training points.
    """

    steps: Tensor
    output_mean: Tensor
    output_covariance: Tensor
    ntk_mean: Tensor
    ntk_drift: Tensor
    provenance: str
    validity: Validity
    output_truncation: Tensor | None = None
    ntk_truncation: Tensor | None = None
    train_output_mean: Tensor | None = None
