"""The step after a measurement, taken apart, in trainings as they are: clipping, accumulation, 16 bits; H_P's drift."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.live.instruments.loop import Pages
from torch_eft import measure
from torch_eft.live import Observer
from torch_eft.results.tags import layer_tag, tag

SHARES = [layer_tag("step_shares", part) for part in ("fresh", "momentum", "decay")]


def trained(
    make,
    *,
    steps=4,
    accumulate=1,
    scaled=False,
    clip=None,
    observed=True,
    spoil=None,
    classes=3,
    instrument="one_step",
    **more,
):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, classes))
    x, y = torch.randn(32, 6), torch.randint(0, classes, (32,))
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
    pages, observer, states = Pages(), None, []
    if observed:
        observer = Observer(
            *(model, x[:5], optimizer),
            instruments=["ntk", instrument],
            budget=None,
            every=1,
            sinks=[pages],
            on_error="raise",
            **more,
        )
        observer.begin(total_steps=steps)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for part in range(accumulate):
            samples = torch.arange(8) + 8 * ((step + part) % 4)
            with torch.autocast("cpu", torch.bfloat16, enabled=scaled):
                loss = F.cross_entropy(model(x[samples]), y[samples]) / accumulate
            scaler.scale(loss).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        if observed:
            observer.before_step()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if spoil:
            spoil(step, model)
        scaler.step(optimizer)
        scaler.update()
        states.append((before, {name: p.detach().clone() for name, p in model.named_parameters()}))
        if observed:
            observer.measure(step)
    if observed:
        observer.finish()
    return observer, pages.pages, model, states, x[:5]


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2}, {"clip": 0.05}, {"scaled": True}],
    ids=["plain", "accumulation", "clipping", "16-bit with GradScaler"],
)
def test_the_next_step_of_any_loop_is_taken_apart(options):
    observer, pages, model, states, x = trained(lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1), **options)
    for step, (before, after) in enumerate(states):
        logged = observer.history[step]
        shares = [logged[name] for name in SHARES]
        assert sum(shares) == pytest.approx(1, abs=1e-4) and (shares[1] == 0) is (step == 0)
        with measure.Network(model, x) as network:
            change = network.at(after).output() - network.at(before).output()
        assert logged[tag("step_output")] == pytest.approx(float(change.square().mean().sqrt()), rel=1e-2)
        assert logged[tag("step_output_error")] < 0.1
    assert tag("step_output") not in observer.history[len(states)]
    assert "the shares add up to 1" in pages["one_step"][0][1] and len(pages["one_step"]) == 1
    alone = trained(lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1), observed=False, **options)[2]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


def test_what_is_no_step_of_the_optimizer_is_left_out_in_words():
    def spoil(step, model):
        if step == 2:  # a hook that moves parameters by itself
            with torch.no_grad():
                model[0].weight.add_(0.1)

    observer, pages, *_ = trained(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), spoil=spoil)
    assert [tag("step_output") in observer.history[step] for step in range(4)] == [True, False, True, True]
    assert "the step after step 1 is not the one that SGD takes" in pages["one_step"][1][1]
    observer, pages, *_ = trained(lambda p: torch.optim.Rprop(p))
    assert not any(tag("step_output") in scalars for scalars in observer.history.values())
    assert "No step of this run is taken apart: " in pages["one_step"][-1][1]


@pytest.mark.parametrize("outputs", ["full", "trace", "probes:3"])
def test_drift_of_the_preconditioned_kernel_beside_that_of_the_ntk(outputs):
    optimizers = []

    def make(parameters):
        optimizers.append(torch.optim.Adam(parameters, lr=1e-3))
        return optimizers[0]

    def spoil(step, model):
        if step == 2:
            known.append((dict(copy.deepcopy(model).named_parameters()), measure.preconditioner(model, optimizers[0])))
            known[0][1].update({name: value.clone() for name, value in known[0][1].items()})

    known = []
    options = {
        "instrument": "preconditioned",
        "outputs": outputs,
        "spoil": spoil,
        "classes": 3 + (outputs == "probes:3"),
    }
    observer, pages, model, _, x = trained(make, **options)
    assert [tag("ntk_preconditioned_drift") in observer.history[step] for step in range(5)] == [False, False] + 3 * [
        True
    ]
    (theta, P_0), P = known[0], measure.preconditioner(model, optimizers[0])
    expected = measure.preconditioned_drift(
        model, x, theta, model, P_0, P, trace=outputs == "trace", outputs=outputs if "probes" in outputs else None
    )
    last = observer.history[4]
    assert last[tag("ntk_preconditioned_drift")] == pytest.approx(expected.drift, rel=1e-4)
    for part, share in expected.shares.items():
        assert last[layer_tag("ntk_preconditioned_shares", part)] == pytest.approx(share, rel=1e-3)
    assert "The NTK drift is that of H = J lambda J^T" in pages["preconditioned"][0][1]


def test_a_state_from_the_beginning_is_waited_for():
    """Adagrad's: its P is known after the first step, as that of others."""
    observer, pages, *_ = trained(lambda p: torch.optim.Adagrad(p, lr=1e-2), instrument="preconditioned")
    drawn = [tag("ntk_preconditioned_drift") in observer.history[step] for step in range(5)]
    assert drawn == [False, False, True, True, True] and len(pages["preconditioned"]) == 1


@pytest.mark.parametrize("keep", ["checkpoint", "none"])
def test_the_drift_of_a_resumed_training_is_counted_from_the_same_step(keep):
    optimizers = []

    def make(parameters):
        optimizers.append(torch.optim.Adam(parameters, lr=1e-2))
        return optimizers[-1]

    first, _, model, _, x = trained(make, instrument="preconditioned", keep_theta_0=keep)
    pages = Pages()
    second = Observer(
        *(model, x, optimizers[0]), instruments=["ntk", "preconditioned"], budget=None, every=1, sinks=[pages]
    )
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.begin(step=4)
    second.measure(5)  # at the same parameters
    name = tag("ntk_preconditioned_drift")
    if keep == "checkpoint":
        assert second.history[5][name] == pytest.approx(first.history[4][name], rel=1e-5)
    else:
        assert name not in second.history[5] and "counted from step 1" in pages.pages["preconditioned"][-1][1]
