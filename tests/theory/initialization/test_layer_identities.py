"""The exact layer identities of H, dH, ddI, ddII against automatic differentiation of whole networks."""

import math

import pytest
import torch
from torch.func import jacfwd, jacrev

from tests.oracles.differentials import first_layer, step
from torch_eft.theory import get_activation

WIDTHS, SAMPLES = (3, 4, 3, 2), 2
C_B, C_W, LAMBDA_B, LAMBDA_W = (0.2, 0.1, 0.3), (1.1, 1.4, 0.8), (0.5, 1.0, 0.2), (1.0, 0.7, 2.0)


def by_autodiff(sigma, x, weights):
    """H, dH, ddI, ddII of the output from derivatives with respect to all parameters, whitened by lambda."""
    scale = []
    for (W, b), lambda_b, lambda_W in zip(weights, LAMBDA_B, LAMBDA_W, strict=True):
        scale += [(W[0], math.sqrt(lambda_W / W.shape[-1])), (b[0], math.sqrt(lambda_b))]
    theta = torch.cat([value.flatten() / factor for value, factor in scale])

    def network(omega):
        signal, start = x.T, 0
        for index in range(0, len(scale), 2):
            parts = []
            for value, factor in scale[index : index + 2]:
                parts.append(omega[start : start + value.numel()].reshape(value.shape) * factor)
                start += value.numel()
            z = parts[0] @ signal + parts[1]
            signal = torch.tanh(z) if sigma.name == "tanh" else sigma.function(z)
        return z

    J, J2 = jacrev(network)(theta), jacfwd(jacrev(network))(theta)
    outputs, samples = J.shape[:2]
    directions = J.flatten(0, 1)

    def along_gradients(shift):
        return network(theta + shift @ directions)

    # Third derivatives along the gradients alone: few numbers, where the whole tensor has the cube of the parameters.
    J3 = jacfwd(jacfwd(jacrev(along_gradients)))(theta.new_zeros(len(directions)))
    e = torch.einsum
    H = e("iam,jbm->ijab", J, J)
    dH = e("iamn,jbm,kcn->ijkabc", J2, J, J)
    ddI = e("iajbkcld->ijklabcd", J3.reshape([outputs, samples] * 4))
    ddII = e("iamn,jbmr,kcn,ldr->ijklabcd", J2, J2, J, J)
    return H, dH, ddI, ddII


@pytest.mark.parametrize("name", ["tanh", "gelu", "softplus"])
def test_identities_hold_to_rounding(name):
    sigma = get_activation(name)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, WIDTHS[0], dtype=torch.float64, generator=generator)
    layer, weights = first_layer(x, WIDTHS[1], C_B[0], C_W[0], LAMBDA_B[0], LAMBDA_W[0], 1, generator)
    collected = [weights]
    for index in (1, 2):
        layer, weights = step(
            layer, sigma, WIDTHS[index + 1], C_B[index], C_W[index], LAMBDA_B[index], LAMBDA_W[index], generator
        )
        collected.append(weights)
    H, dH, ddI, ddII = by_autodiff(sigma, x, collected)
    torch.testing.assert_close(layer.H[0], H, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.dH[0], dH, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.ddI[0], ddI, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.ddII[0], ddII, rtol=0, atol=1e-12)
