"""Regression with the kernels of infinite width: Bayes with the NNGP, and the end of training with the NTK.

With A the training points and a ridge s, the posterior of a Gaussian process with covariance K is

    mean K_xA (K_AA + s)^-1 y,      covariance K_xx - K_xA (K_AA + s)^-1 K_Ax

(Neal 1996; Lee et al. 2018): only the last layer learns. Training all layers to the end by gradient descent gives, over
initializations z(0) ~ N(0, K),

    mean Theta_xA (Theta_AA + s)^-1 y,      covariance J K J^T,      J = (1, -Theta_xA (Theta_AA + s)^-1)

(Lee et al. 2019; PDLT 10.2 at s = 0), s > 0 where |theta - theta_0|^2 s / 2 is added to the loss
(1/2) sum (z - y)^2 and outputs start at zero; the covariance is that of predictors that are linear in y - z(0).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torch_eft.results.choices import check_choice
from torch_eft.results.presentation.result import Result
from torch_eft.results.trajectory import Validity
from torch_eft.theory.architecture.kernels import architecture_kernels
from torch_eft.theory.architecture.nodes import Architecture
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.initialization.infinite_width import check_inputs, infinite_width
from torch_eft.theory.signal_propagation.regimes import infinite_width_validity
from torch_eft.theory.training.infinite_width import architecture_validity, check_points, checked_targets
from torch_eft.theory.training.time_sums import moving_modes


@dataclass(frozen=True, repr=False)
class KernelRegression(Result):
    """Predictions on test points, without a training.

    Args:
        mean: (N_test, n_L).
        covariance: Of one output, (N_test, N_test); outputs are independent and alike.
        kernel: ``"nngp"`` or ``"ntk"``.
        provenance: How it was computed.
        validity: Where infinite width describes this network.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> x = torch.eye(3, dtype=torch.float64)
        >>> ensemble = theory.MLPEnsemble([3, 100, 2], "tanh")
        >>> found = theory.predict_kernel_regression(ensemble, x[:2], torch.ones(2, 2), x)
        >>> found.mean.shape, found.covariance.shape
        (torch.Size([3, 2]), torch.Size([3, 3]))
        >>> bool(found.standard_deviation[2] > 0.1)  # of the input that was not trained on
        True
    """

    mean: Tensor
    covariance: Tensor
    kernel: str
    provenance: str
    validity: Validity

    @property
    def standard_deviation(self) -> Tensor:
        """Of every test output, (N_test,)."""
        return self.covariance.diagonal().clamp_min(0.0).sqrt()


def predict_kernel_regression(
    network: MLPEnsemble | Architecture,
    x_train: Tensor,
    y_train: Tensor,
    x_test: Tensor,
    *,
    kernel: Literal["nngp", "ntk"] = "ntk",
    ridge: float = 0.0,
    memory: int = 4 * 2**30,
) -> KernelRegression:
    """Predict test points with the kernel of an infinitely wide network.

    Args:
        network: An ensemble of MLPs, or an architecture as ``read_architecture`` returns it.
        x_train: Training inputs, (N, ...).
        y_train: Targets, (N, n_L).
        x_test: Test inputs, (N_test, ...).
        kernel: ``"ntk"``: all layers trained to the end, mean and spread over seeds. ``"nngp"``: the posterior of Bayes
            with the network as prior.
        ridge: Added to the kernel's diagonal: the noise's variance for ``"nngp"``.
        memory: Bytes allowed for kernel matrices over all points.

    Returns:
        Mean and covariance. Null modes of the kernel, of inputs that are one, are left out without a ridge.

    Raises:
        ValueError: If shapes do not fit, the architecture has no closed form, or an argument is out of range.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> ensemble = theory.MLPEnsemble([3, 100, 1], "erf")
        >>> x = torch.eye(3, dtype=torch.float64)
        >>> found = theory.predict_kernel_regression(ensemble, x, x.sum(1, keepdim=True), x, kernel="nngp")
        >>> found.mean.flatten().round(decimals=6), found.standard_deviation.max() < 1e-6
        (tensor([1., 1., 1.], dtype=torch.float64), tensor(True))
    """
    check_choice("kernel", kernel, ("nngp", "ntk"))
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge: {ridge} given; it must be finite and >= 0")
    if isinstance(network, Architecture):
        y = checked_targets(y_train, len(x_train), network.output)
        check_points(len(x_train), len(x_test), memory)
        x = torch.cat([x_test.to(x_train), x_train])
        K, Theta = architecture_kernels(network, x)
        validity = architecture_validity(network, x)
    else:
        x = torch.cat([check_inputs("x_test", x_test, network), check_inputs("x_train", x_train, network)])
        y = checked_targets(y_train, len(x_train), network.widths[-1])
        check_points(len(x_train), len(x_test), memory)
        K, Theta = (of_layers[-1] for of_layers in infinite_width(network, x)[:2])
        validity = infinite_width_validity(network, x)
    tests = len(x_test)
    used = K if kernel == "nngp" else Theta
    weights = used[:tests, tests:] @ _inverse(used[tests:, tests:], ridge)
    J = torch.cat([torch.eye(tests, dtype=K.dtype, device=K.device), -weights], 1)
    # For the NNGP, J K J^T + ridge |weights|^2 is the posterior's covariance, positive to rounding.
    covariance = J @ K @ J.mT + (ridge * weights @ weights.mT if kernel == "nngp" else 0.0)
    name = "NNGP posterior" if kernel == "nngp" else "NTK, trained to the end"
    return KernelRegression(
        mean=weights @ y.to(weights),
        covariance=covariance,
        kernel=kernel,
        provenance=f"order 0 (infinite width), {network}; {name}, {len(x_train)} points, ridge {ridge:g}",
        validity=validity,
    )


def _inverse(matrix: Tensor, ridge: float) -> Tensor:
    values, vectors = moving_modes(matrix)
    return (vectors / (values + ridge)) @ vectors.mT
