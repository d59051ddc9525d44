"""Guards the state of the process around a measurement, and sets what measurements need."""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as modules
from torch.nn.utils import parametrize
from torch.utils import checkpoint

from torch_eft.measure.forward.isolation.hooks import only_looks


@contextmanager
def process_state(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the random state, that of the devices of these tensors included, and the default dtype."""
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    default_dtype = torch.get_default_dtype()
    try:
        with torch.random.fork_rng(devices=sorted(device.index or 0 for device in devices)):
            yield
    finally:
        torch.set_default_dtype(default_dtype)
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)


@contextmanager
def differentiable() -> Iterator[None]:
    """Leave the surrounding grad, inference and autocast modes, and the search for anomalies, which prints."""
    with (
        torch.autograd.set_detect_anomaly(False),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


@contextmanager
def elementary_operations() -> Iterator[None]:
    """Attention in elementary operations, float32 products in full float32, and nothing compiled."""
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    products = torch.get_float32_matmul_precision()
    cudnn: Any = torch.backends.cudnn  # typed by hand: both have attributes that torch's annotations lack
    mkldnn: Any = torch.backends.mkldnn
    operations = ((cudnn, "conv"), (cudnn, "rnn"), (mkldnn, "matmul"), (mkldnn, "conv"), (mkldnn, "rnn"))
    backends: list[Any] = [torch.backends.cuda.matmul, *(getattr(library, name, None) for library, name in operations)]
    # Where torch has no newer switches, the older ones are all there are.
    backends = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    precisions = [backend.fp32_precision for backend in backends]
    try:
        convolutions: bool | None = cudnn.allow_tf32
    except RuntimeError:  # only the newer switches were set
        convolutions = None
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        # The older switches first: where only the newer ones are set, reading an older one is an error in torch.
        torch.set_float32_matmul_precision("highest")
        if convolutions is not None:
            cudnn.allow_tf32 = False
        for backend in backends:
            if backend.fp32_precision not in ("ieee", "none"):
                backend.fp32_precision = "ieee"
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and its import takes seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            cudnn.allow_tf32 = convolutions
        for backend, precision in zip(backends, precisions, strict=True):
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision
        torch.backends.mha.set_fastpath_enabled(fast_attention)


@contextmanager
def own_forwards() -> Iterator[None]:
    """Set aside what surrounds the forwards of a training.

    Cached parametrizations, which belong to other parameters; global hooks, of gradients or that only look; and
    checkpoints, which run parts of the forward again in a backward pass, when other parameters may be in place.
    """
    kept = [(parametrize, "_cache_enabled", 0), (parametrize, "_cache", {})]
    for name in ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl"):
        if hasattr(checkpoint, name):  # the second since torch 2.14
            kept.append((checkpoint, name, _nothing_recomputed))
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        hooks = getattr(modules, name)
        kept.append((modules, name, type(hooks)((key, hook) for key, hook in hooks.items() if not only_looks(hook))))
    for name in ("_global_backward_hooks", "_global_backward_pre_hooks"):
        kept.append((modules, name, type(getattr(modules, name))()))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in kept]
    try:
        for owner, name, value in kept:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _nothing_recomputed(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield
