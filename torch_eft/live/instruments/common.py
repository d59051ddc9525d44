"""Shared by instruments: comparisons as scalars, and copies of parameters, which stay on their device."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from torch_eft.forecast.comparison.compared import Banded, Compared
from torch_eft.results.tags import BAND, BAND_68, BAND_90, GIVEN_START, GIVEN_START_BAND, MEASURED, QUANTILE, tag

LARGEST = 50_000_000
"""Trainable parameters up to which an instrument keeps copies of them."""


def compared_scalars(compared: Mapping[str, Compared]) -> dict[str, float]:
    """``{tag: value}`` of comparisons, ``{quantity: Compared}``, without what is not finite."""
    scalars: dict[str, float] = {}
    for quantity, values in compared.items():
        theory, sigma = values.theory, values.sigma
        series = {
            MEASURED: values.measured,
            "order_0": values.order_0,
            "order_1": values.order_1,
            "truncation": values.truncation,
        }
        if theory is not None and sigma is not None:
            series |= {BAND[0]: theory - sigma, BAND[1]: theory + sigma}
        scalars |= {
            tag(quantity, name): value for name, value in series.items() if value is not None and math.isfinite(value)
        }
    return scalars


def banded_scalars(name: Callable[[str], str], compared: Banded) -> dict[str, float]:
    """``{tag: value}`` of a law over seeds; ``name`` gives the tag of a series."""
    series: dict[str, float] = {"order_1": compared.median}
    if compared.quantile is not None:
        series[QUANTILE] = compared.quantile
    if compared.given is not None:
        series[GIVEN_START] = compared.given
    bands = (BAND_68, compared.band_68), (BAND_90, compared.band_90), (GIVEN_START_BAND, compared.given_90)
    for names, band in bands:
        if band is not None:
            series |= dict(zip(names, band, strict=True))
    return {name(key): value for key, value in series.items() if math.isfinite(value)}


@contextmanager
def one_thread() -> Iterator[None]:
    """Run many small operations on one thread: threads that wait for each other cost more than they do.

    (Measured beside other jobs on two cores: a forecast of 30 s took 200 s of processor time on two threads.)
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def copied(network: nn.Module) -> dict[str, Tensor]:
    """``{name: value}`` of the trainable parameters, now."""
    return {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}


def current(network: nn.Module) -> dict[str, Tensor]:
    """``{name: value}`` of the trainable parameters, not copied."""
    return {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}


def reason_of(error: Exception) -> str:
    """Why something ends, of a refusal in words or of any other failure."""
    in_words = isinstance(error, ValueError | NotImplementedError) and str(error)
    return str(error) if in_words else f"{type(error).__name__}: {error}"


def memory(network: nn.Module, copies: int) -> str:
    """A phrase saying how much memory copies take."""
    values = [p for p in network.parameters() if p.requires_grad]
    size = copies * sum(p.numel() * p.element_size() for p in values) / 2**20
    of = "a copy" if copies == 1 else f"{copies} copies"
    return f"{of} of the trainable parameters, {size:.3g} MiB on {values[0].device if values else 'no device'}"


def too_many(network: nn.Module, largest: int = LARGEST) -> str | None:
    """The reason why no copies are kept; None if they are."""
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    if count > largest:
        return f"{count / 1e6:.3g} million parameters; copies of them are kept for up to {largest / 1e6:.3g} million"
    return None
