"""Models of torchvision, timm, transformers, diffusers and torch_geometric: right, and trained to the same bits.

Kernels and derivatives are compared with loops of ``torch.autograd.grad``, one sample and one output at a time, and
with differences of them (``tests.fuzz``); five steps of training with an observer leave the bits of one without.
"""

import random

import pytest
import torch
from torch.utils._pytree import tree_map_only

from tests.fuzz.compose import Case, called
from tests.fuzz.judge import Examined, ask
from tests.models.zoo import MODELS, build, torchvision_schema
from torch_eft.live import Observer

pytestmark = [
    pytest.mark.models,
    pytest.mark.filterwarnings("ignore"),  # of the libraries
]
FIRST = ("output", "ntk", "parts", "cross", "product", "eigenpairs", "change")


@pytest.fixture(params=MODELS)
def name(request):
    torchvision_schema()
    pytest.importorskip(MODELS[request.param].library)
    return request.param


def case_of(name, dtype):
    module, x = build(name, dtype)
    _, others = build(name, dtype, count=2)
    x, others = (
        tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, v) for v in (x, others)
    )
    coarse = dtype == torch.float32 or MODELS[name].coarse
    eps = torch.finfo(torch.float32 if coarse else dtype).eps
    return Case(0, [name], {"coarse"} if coarse else set(), eps, module, x, others, MODELS[name].output_fn)


def test_float64(name):
    case = case_of(name, torch.float64)
    at = Examined(case, random.Random(0))
    asked = FIRST
    if at.P > 10**6:  # a Jacobian of half a gigabyte
        asked = ("ntk", "product")
    elif not MODELS[name].coarse:
        asked += ("derivatives", "taylor", "displacement")
    fine = ("right", "undecided") if MODELS[name].kinked else ("right",)
    wrong = [answer for answer in (ask(at, question) for question in asked) if answer.outcome not in fine]
    assert not wrong, "\n".join(map(str, wrong))


def test_float32(name):
    at = Examined(case_of(name, torch.float32), random.Random(0))
    wrong = [answer for answer in (ask(at, question) for question in ("ntk", "product")) if answer.outcome != "right"]
    assert not wrong, "\n".join(map(str, wrong))


def test_five_steps_leave_the_same_bits(name):
    """On four samples: statistics of two single places, such as ResNet-18 has on two, amplify rounding."""

    def trained(observed):
        module, x = build(name, torch.float32)
        _, probe = build(name, torch.float32, count=4)
        fn = MODELS[name].output_fn
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        torch.manual_seed(3)
        observer = None
        if observed:
            observer = Observer(
                module, probe, optimizer, output_fn=fn, preset="standard", every=1, budget=None, on_error="raise"
            )
            observer.begin()
        for step in range(1, 6):
            if observer is not None:
                observer.observe_batch(x)
            loss = called(module, x, fn).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if observer is not None:
                observer.before_step()
            optimizer.step()
            if observer is not None:
                observer.measure(step)
        if observer is not None:
            observer.finish()
            assert sorted(observer.history) == list(range(6))
        state = {key: value.clone() for key, value in module.state_dict().items()}
        return state, torch.get_rng_state(), [module.training for module in module.modules()]

    (plain, chance, modes), (watched, its_chance, its_modes) = trained(False), trained(True)
    assert [key for key in plain if not torch.equal(plain[key].nan_to_num(7), watched[key].nan_to_num(7))] == []
    assert torch.equal(chance, its_chance) and modes == its_modes
