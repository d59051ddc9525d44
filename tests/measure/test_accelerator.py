"""The same numbers on an accelerator as on the processor. Run there: python -m pytest -m device"""

import pytest
import torch
from torch import nn

from torch_eft import measure
from torch_eft.live.observer import Observer

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]

NETWORKS = {
    "MLP": (lambda: nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5)), (8,)),
    "wide CNN": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 32, 3), nn.GroupNorm(4, 32), nn.GELU(), nn.Conv2d(32, 64, 3, 2), nn.SiLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
        ),
        (3, 32, 32),
    ),
    "grouped": (
        lambda: nn.Sequential(
            *(nn.Conv2d(4, 16, 3, groups=4), nn.BatchNorm2d(16), nn.Tanh(), nn.Conv2d(16, 16, 5, padding=2, groups=16)),
            *(nn.Tanh(), nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(8 * 14 * 14, 3)),
        ),
        (4, 16, 16),
    ),
    "transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True), nn.Flatten(), nn.Linear(16 * 12, 4)
        ),
        (12, 16),
    ),
}


def built(name, samples=12):
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    return build().eval(), torch.randn(samples, *shape)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_are_those_of_the_processor(name, dtype):
    model, x = built(name)
    exact, inputs = model.double(), x.double()
    direction = torch.randn(exact(inputs).shape, dtype=torch.float64)
    expected = {
        "ntk": measure.ntk(exact, inputs),
        "trace": measure.ntk(exact, inputs, trace=True),
        "dntk": measure.dntk(exact, inputs, direction=direction),
        "output": measure.output(exact, inputs),
    }
    model, x, direction = model.to("cuda", dtype), x.to("cuda", dtype), direction.to("cuda", dtype)
    found = {
        "ntk": measure.ntk(model, x),
        "trace": measure.ntk(model, x, trace=True),
        "dntk": measure.dntk(model, x, direction=direction),
        "output": measure.output(model, x),
    }
    bound = 1e-5 if dtype == torch.float32 else 1e-11  # sums of up to 1e4 products, in any order
    for key, value in found.items():
        assert value.device.type == "cuda"
        assert float((value.cpu().double() - expected[key]).norm() / expected[key].norm()) < bound, key


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_is_left_as_it_is(name):
    def weights(observed):
        model, x = built(name, 8)
        model, x = model.cuda().train(), x.cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        observer = Observer(model, x, optimizer, preset="light", every=1, budget=None) if observed else None
        if observer is not None:
            observer.begin(total_steps=5)
        for step in range(1, 6):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if observer is not None:
                observer.measure(step)
        if observer is not None:
            assert len(observer.history) == 6
        return [parameter.detach().cpu() for parameter in model.parameters()]

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert all(torch.equal(a, b) for a, b in zip(weights(False), weights(True), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
