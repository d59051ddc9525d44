"""Sampled finite-width NTKs: the layer form against autograd, and the spread's 1/n law."""

import math

import torch

from torch_eft.theory import MLPEnsemble, ntk_trace_spread, sample_ntk


def test_layer_form_of_the_ntk_equals_autograd():
    """One network, drawn again from the same generator: H summed over parameters, one gradient at a time."""
    widths, C_b, C_W = [3, 6, 5, 2], [0.2, 0.1, 0.3], [1.1, 1.4, 0.8]
    lambda_b, lambda_W = [0.5, 1.0, 0.2], [1.0, 0.7, 2.0]
    ensemble = MLPEnsemble(widths, "tanh", C_b=C_b, C_W=C_W, lambda_b=lambda_b, lambda_W=lambda_W)
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (H,) = sample_ntk(ensemble, x, num_networks=1, seed=5)
    generator = torch.Generator().manual_seed(5)
    parameters, rates = [], []
    for layer, (n_in, n_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        weight = torch.randn(n_out, n_in, generator=generator, dtype=torch.float64) * math.sqrt(C_W[layer] / n_in)
        bias = torch.randn(n_out, generator=generator, dtype=torch.float64) * math.sqrt(C_b[layer])
        parameters += [weight.requires_grad_(), bias.requires_grad_()]
        rates += [lambda_W[layer] / n_in, lambda_b[layer]]
    signal = x
    for layer in range(3):
        signal = signal @ parameters[2 * layer].T + parameters[2 * layer + 1]
        signal = torch.tanh(signal) if layer < 2 else signal
    rows = []
    for a in range(4):
        for i in range(2):
            gradients = torch.autograd.grad(signal[a, i], parameters, retain_graph=True)
            rows.append(torch.cat([math.sqrt(r) * g.flatten() for r, g in zip(rates, gradients, strict=True)]))
    J = torch.stack(rows)
    torch.testing.assert_close(H, (J @ J.T).reshape(4, 2, 4, 2).permute(0, 2, 1, 3), rtol=0, atol=1e-12)


def test_spread_of_the_trace_falls_as_one_over_sqrt_n():
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spread = []
    for width in (32, 128):
        traces = torch.stack(
            [H.diagonal().sum() for H in sample_ntk(MLPEnsemble([3, width, width, 1], "tanh"), x, num_networks=600)]
        )
        spread.append(float(traces.std()))
    # Each standard deviation has relative error 1/sqrt(1200) = 3 %; a factor sqrt(4) = 2 within 4 errors and O(1/n).
    assert abs(spread[0] / spread[1] - 2) < 4 * 2 * math.sqrt(2 / 1200) + 2 / 32


def test_wide_spreads_from_narrow_samples():
    """Width 400-200 sampled directly and scaled down from 100-50, with 600 networks each."""
    ensemble = MLPEnsemble([3, 400, 200, 2], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3)
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direct, scaled = (ntk_trace_spread(ensemble, x, num_networks=600, widest=widest) for widest in (400, 100))
    # Independent draws with relative error 1/sqrt(1200) each, and the 1/n correction of a few over 100.
    assert abs(scaled / direct - 1) < 4 * math.sqrt(2 / 1200) + 3 / 100
    assert ntk_trace_spread(MLPEnsemble([3, 2], "tanh"), x) == 0


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    list(sample_ntk(MLPEnsemble([3, 8, 1], "relu"), torch.ones(2, 3), num_networks=2))
    assert torch.equal(before, torch.get_rng_state())
