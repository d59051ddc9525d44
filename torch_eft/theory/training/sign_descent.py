"""The first step of sign descent, and of Adam, at infinite width: its mean over networks.

Adam's first step is that of sign descent, dtheta = -eta sign(g), g the gradient of the loss; without a kernel, as it is
not linear in the errors e = dL/dz: their direction alone counts. At infinite width neurons i of a layer and k of the
one before are independent, and with g_i = sqrt(n_l) dz/dz_i^(l), s_k = sigma(z_k^(l-1)) a layer's weights move the
output of a point b by

    -eta n_{l-1} sqrt(n_l) E[ sign(sum_a e_a g_{i;a} s_{k;a}) g_{i;b} s_{k;b} ],

its biases by -eta sqrt(n_l) E[ sign(e.g) g_b ], those of the read-out by -eta n_{L-1} E[ sign(e.s) s_b ] and
-eta sign(sum_a e_a), those of the first layer by the sum over inputs of -eta sqrt(n_1) E[ sign(sum_a e_a g_a x_{j;a})
g_b ] x_{j;b} [derived here]. z^(l) ~ N(0, K^(l)), and g = sigma'(z) u with u ~ N(0, B^(l)) independent of it,
B^(L-1) = C_W, B^(l) = C_W E[g g] of the layer after.

Between hidden layers the change grows as n^{3/2} at one learning rate for all parameters: eta must fall as n^{-3/2}.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.results.presentation.result import Result
from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.initialization.infinite_width import check_inputs, infinite_width

EXPONENTS = {"first": 0.5, "hidden": 1.5, "last": 1.0}
"""Power of the width with which a layer's weights move the outputs, at one learning rate for all parameters."""


@dataclass(frozen=True, repr=False)
class SignStep(Result):
    """The mean over networks of the change of the outputs by the first step.

    Args:
        change: (N_p, n_L).
        error: Standard error of the sampling, likewise.
        parts: The change by each of ``names``, (parts, N_p, n_L), which add up to it.
        names: ``"weights l"`` and ``"biases l"``, of the layers l = 1 .. L.
        width_exponent: The change grows as this power of the width, at one learning rate for all parameters.
        validity: Where it holds.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> step = theory.predict_sign_step(
        ...     theory.MLPEnsemble([2, 8, 8, 1], "tanh", lambda_W=[2.0, 8.0, 8.0]),
        ...     torch.eye(2), torch.tensor([[1.0], [-1.0]]), torch.eye(2), learning_rate=1e-3,
        ... )
        >>> step.width_exponent, step.names[:2], bool(step.change[0, 0] < 0 < step.change[1, 0])
        (1.5, ('weights 1', 'biases 1'), True)
    """

    change: Tensor
    error: Tensor
    parts: Tensor
    names: tuple[str, ...]
    width_exponent: float
    validity: Validity


def predict_sign_step(
    ensemble: MLPEnsemble,
    x_train: Tensor,
    errors: Tensor,
    x_probe: Tensor,
    *,
    learning_rate: float,
    num_samples: int = 1024,
    num_replicas: int = 16,
    seed: int = 0,
) -> SignStep:
    """Predict the first step of sign descent, or of Adam and its kin, at infinite width.

    Args:
        ensemble: The ensemble; its learning-rate tensor times ``learning_rate`` is what every parameter moves by:
            ``lambda_b = 1`` and ``lambda_W = n_{l-1}`` for one torch learning rate, 0 for what does not exist.
        x_train: Training inputs, (N, n_0).
        errors: dL/dz on them, (N, n_L); their scale does not count.
        x_probe: Probe inputs, (N_p, n_0).
        learning_rate: eta.
        num_samples: Neurons drawn in each layer.
        num_replicas: How often, at least 2, from whose scatter the error is estimated.
        seed: Seed of the samples; the global random state is left alone.

    Returns:
        The change, to first order in eta.

    Raises:
        ValueError: If shapes do not fit, all errors are 0, or weights or biases are not Gaussian.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> ensemble = theory.MLPEnsemble([2, 1], "tanh", lambda_b=0.0, lambda_W=2.0)  # no hidden layer
        >>> x = torch.tensor([[1.0, -2.0]])
        >>> theory.predict_sign_step(ensemble, x, torch.ones(1, 1), x, learning_rate=0.1).change.tolist()  # -eta |x|_1
        [[-0.30000000000000004]]
    """
    x_train, x_probe = check_inputs("x_train", x_train, ensemble), check_inputs("x_probe", x_probe, ensemble)
    shape = len(x_train), ensemble.widths[-1]
    if not isinstance(errors, Tensor) or errors.shape != shape:
        given = tuple(errors.shape) if isinstance(errors, Tensor) else type(errors).__name__
        raise ValueError(f"errors: {given} given; give dL/dz on the training inputs, {shape}")
    if not bool(errors.any()) or not bool(errors.isfinite().all()):
        raise ValueError("errors: all 0, or not finite; they are the gradient that the first step follows")
    if not ensemble.gaussian:
        raise ValueError("ensemble: weights or biases are not Gaussian, as which neurons are drawn here")
    if num_replicas < 2 or num_samples < 1:
        raise ValueError(f"num_replicas: {num_replicas} of {num_samples} samples given; give at least 2 of 1")
    x = torch.cat([x_probe, x_train]).double()
    neurons = _Neurons(ensemble, x, torch.Generator(x.device).manual_seed(seed), num_samples)
    drawn = [list(_parts(ensemble, x, errors.to(x), neurons)) for _ in range(num_replicas)]
    values = torch.stack([torch.stack([value for _, value in parts]) for parts in drawn])  # (replicas, parts, N_p, n_L)
    values = -learning_rate * values
    hidden = len(ensemble.hidden_widths)
    exponent = EXPONENTS["hidden"] if hidden > 1 else EXPONENTS["last"] if hidden else 0.0
    reasons = [
        "infinite width: single networks scatter around it by about 1/sqrt(n)",
        "to first order in eta, as long as gradients are far above the eps of Adam",
    ]
    if exponent:
        reasons.append(f"at one learning rate it grows as n^{exponent:g}: eta must fall as n^-{exponent:g}")
    return SignStep(
        values.sum(1).mean(0),
        values.sum(1).std(0) / num_replicas**0.5,
        values.mean(0),
        tuple(name for name, _ in drawn[0]),
        exponent,
        Validity("caution", tuple(reasons), {"width_exponent": exponent}),
    )


class _Neurons:
    """Draws of single neurons at infinite width, at all points."""

    def __init__(self, ensemble: MLPEnsemble, x: Tensor, generator: torch.Generator, count: int) -> None:
        self._activation, self._generator = ensemble.activation, generator
        self._shape, self._outputs = (count, len(x)), ensemble.widths[-1]
        K, _, pairs = infinite_width(ensemble, x)
        B = [torch.full_like(K[0], ensemble.C_W[-1])]  # of the last hidden layer, then those before it
        for layer in range(ensemble.depth - 2, 0, -1):
            B.append(ensemble.C_W[layer] * pairs[layer].explicit((1,), (1,)) * B[-1])
        self._roots = [_root(value) for value in K[:-1]]
        self._backward = [_root(value) for value in reversed(B)] if ensemble.depth > 1 else []

    def _normal(self, *shape: int) -> Tensor:
        root = self._roots[0]
        return torch.randn(*shape, generator=self._generator, dtype=root.dtype, device=root.device)

    def values(self, layer: int) -> Tensor:
        """Return s of hidden layer 1 .., (samples, points)."""
        return self._activation(self._normal(*self._shape) @ self._roots[layer - 1].T)

    def gradients(self, layer: int) -> Tensor:
        """Return sqrt(n) dz/dz_i of hidden layer 1 .., (samples, outputs, points)."""
        count, points = self._shape
        slopes = self._activation(self._normal(count, points) @ self._roots[layer - 1].T, 1)
        u = self._normal(count, self._outputs, points) @ self._backward[layer - 1].T
        return slopes[:, None] * u


def _root(K: Tensor) -> Tensor:
    """R with R R^T = K, which may be singular."""
    values, vectors = torch.linalg.eigh(K)
    return vectors * values.clamp_min(0).sqrt()


def _parts(ensemble: MLPEnsemble, x: Tensor, e: Tensor, neurons: _Neurons) -> Iterator[tuple[str, Tensor]]:
    """The change of the outputs by each layer's weights and biases over -eta, (N_p, n_L)."""
    widths, last = ensemble.widths, ensemble.depth
    probes = len(x) - len(e)
    for layer in range(1, last + 1):
        of_weights, of_biases = ensemble.lambda_W[layer - 1] / widths[layer - 1], ensemble.lambda_b[layer - 1]
        s = x.T if layer == 1 else neurons.values(layer - 1)  # inputs are all there: they are no sample
        fan_in = 1.0 if layer == 1 else widths[layer - 1] / len(s)
        before, train = s[:, :probes], s[:, probes:]
        if layer == last:
            weights = fan_in * (before.T @ (train @ e).sign())  # (N_p, n_L)
            biases = e.sum(0).sign().expand(probes, -1)
        else:
            g = neurons.gradients(layer)  # (samples, n_L, points)
            own = torch.einsum("ac,ica->ia", e, g[..., probes:])
            scale = widths[layer] ** 0.5 / len(g)
            moved = (own @ train.T).sign() @ before  # (samples, N_p)
            weights = scale * fan_in * torch.einsum("ib,icb->bc", moved, g[..., :probes])
            biases = scale * torch.einsum("i,icb->bc", own.sum(1).sign(), g[..., :probes])
        yield f"weights {layer}", of_weights * weights
        yield f"biases {layer}", of_biases * biases
