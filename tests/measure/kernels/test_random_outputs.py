"""Random directions of the outputs: projections of H, estimates without bias, error bars that cover the truth."""

import math

import pytest
import torch
from torch import nn

from torch_eft import measure
from torch_eft.measure.jacobian import engine
from torch_eft.measure.kernels.random_outputs import RandomOutputs, estimates

K = 16


def network(outputs=40):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, outputs))


def project(H, R):
    return torch.einsum("ki,abij,lj->abkl", R.to(H), H, R.to(H))


def test_the_kernel_is_that_of_the_projected_outputs():
    model, x, other = network(), torch.randn(5, 8), torch.randn(3, 8)
    R = RandomOutputs(K).directions(40)
    assert R.shape == (K, 40) and bool((R.abs() * 40**0.5 - 1).abs().max() < 1e-6)
    state = torch.get_rng_state()
    H = measure.ntk(model, x, outputs="probes:16")
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(H, project(measure.ntk(model, x), R), rtol=1e-4, atol=1e-5)
    crossed = measure.ntk(model, x, other=other, outputs="probes:16")
    torch.testing.assert_close(crossed, project(measure.ntk(model, x, other=other), R), rtol=1e-4, atol=1e-5)
    trace = measure.ntk(model, x, outputs="probes:16", trace=True)
    torch.testing.assert_close(trace, measure.as_trace(H), rtol=1e-5, atol=1e-5)
    with measure.Network(model, x, outputs="probes:16") as bound:
        assert torch.equal(bound.ntk(), H) and torch.equal(
            bound.snapshot(measure.Plan(ntk=True)).output, bound.output()
        )
        assert bound.output().shape == (5, 40) and bound.estimate().kernels == H.numel() * 4
        moved = {name: p + 0.1 for name, p in model.named_parameters()}
        assert bound.at(moved).ntk().shape == H.shape and bound.on(other).ntk(other=x).shape == (3, 5, K, K)
        direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        torch.testing.assert_close(
            bound.dntk(direction), project(measure.dntk(model, x, direction), R), rtol=1e-3, atol=1e-4
        )


def test_what_is_kept_of_a_network_is_found_again(monkeypatch):
    """With an output function of one's own: its plan is made once."""
    model, x, calls = network(), torch.randn(4, 8), []
    made = engine.make_plan
    monkeypatch.setattr(engine, "make_plan", lambda *given, **more: calls.append(1) or made(*given, **more))

    def own(z):
        return 2 * z

    estimate = measure.ntk_estimate(model, x, output_fn=own, outputs="probes:4", seconds=True)
    for _ in range(3):
        measure.ntk(model, x, output_fn=own, outputs="probes:4")
    assert len(calls) == 1
    assert estimate.seconds > 0 and f" in {estimate.seconds:.2g} s (" in str(estimate)


def kernels(outputs, steps=10):
    """H_0 and H of a network trained for a few steps."""
    torch.manual_seed(0)
    width = 32
    model = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs))
    x, y = torch.randn(64, 8), torch.randint(0, outputs, (64,))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    H_0 = measure.ntk(model, x[:6])
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return H_0, measure.ntk(model, x[:6])


@pytest.mark.parametrize("outputs", [10, 100])
def test_error_bars_cover_the_truth(outputs):
    """68 and 95 % of intervals, against all outputs, over other directions than those of the package."""
    H_0, H = kernels(outputs)
    truth = {
        "ntk_trace": measure.ntk_trace(H),
        "norm": H.norm() / outputs,
        "relative_change": measure.relative_change(H, H_0),
        "kernel_distance": measure.kernel_distance(H, H_0),
    }
    repetitions = 300
    generator = torch.Generator().manual_seed(1)
    inside = {(name, level): 0 for name in truth for level in (0.68, 0.95)}
    values = {name: [] for name in truth}
    for _ in range(repetitions):
        R = (2.0 * torch.randint(0, 2, (K, outputs), generator=generator) - 1) / outputs**0.5
        found = estimates(project(H, R), project(H_0, R))
        for name, true in truth.items():
            number = getattr(found, name)
            values[name].append(number.value)
            for level in (0.68, 0.95):
                low, high = number.interval(level)
                inside[name, level] += low <= float(true) <= high
    for (name, level), count in inside.items():
        assert count / repetitions > level - 3 * math.sqrt(level * (1 - level) / repetitions), (name, level, count)
    for name, true in truth.items():
        mean, spread = torch.tensor(values[name]).mean(), torch.tensor(values[name]).std()
        next_order = 0 if name == "ntk_trace" else spread / K**0.5  # roots and ratios of what has no bias
        assert abs(mean - true) < 3 * spread / repetitions**0.5 + next_order, name


def test_directions_made_in_inference_mode_serve_later():
    model, x = network(47), torch.randn(4, 8)
    with torch.inference_mode():
        RandomOutputs(K)(model(x))
    assert measure.ntk(model, x, outputs="probes:16").shape == (4, 4, K, K)


def test_small_changes_do_not_drown_in_rounding():
    H_0, H = kernels(50)
    R = RandomOutputs(K).directions(50)
    H_0, H = project(H_0, R), project(H_0 + 1e-4 * (H - H_0), R)
    found = estimates(H, H_0)
    in_double = estimates(H.double(), H_0.double())
    for name in ("relative_change", "kernel_distance"):
        assert getattr(found, name).value == pytest.approx(getattr(in_double, name).value, rel=0.02)
    at_rest = estimates(H, H)
    assert at_rest.relative_change.value == at_rest.relative_change.error == at_rest.kernel_distance.value == 0


def test_outputs_by_position():
    z = torch.randn(3, 5, 4)

    class Output:
        logits = z

    for returned in (z, {"logits": z}, (z, "cache"), Output()):
        assert torch.equal(measure.last_token(returned), z[:, -1])
    assert torch.equal(measure.mean_over_tokens(z), z.mean(1))
    assert torch.equal(measure.Tokens((0, -1))(z), torch.cat([z[:, 0], z[:, -1]], 1))
    with pytest.raises(ValueError, match=r"output_fn: the model returns a tensor \(3, 5\), not outputs by position"):
        measure.last_token(z[..., 0])
    with pytest.raises(ValueError, match="returns list, not"):
        measure.last_token([])


def test_wrong_arguments_are_answered_in_words():
    model, x = network(3), torch.randn(2, 8)
    for wrong in ("probes", "probes:0", "trace", 16):
        with pytest.raises(ValueError, match="give 'probes:16' for 16 random directions"):
            measure.ntk(model, x, outputs=wrong)
    with pytest.raises(ValueError, match="an error bar takes 3 directions at least"):
        measure.Network(model, x, outputs="probes:2")
    with pytest.raises(ValueError, match=r"give kernels \(N, N, K, K\) with K >= 3"):
        measure.random_output_estimates(torch.ones(2, 2))
    with pytest.raises(ValueError, match="which the forward of Sequential"):  # not hidden by the projection
        measure.ntk(model, torch.randn(2, 7), outputs="probes:4")
    with pytest.raises(ValueError, match=r"the output for 2 samples is a tensor \(2,\)"):
        measure.ntk(model, x, output_fn=lambda z: z[:, 0], outputs="probes:4")
