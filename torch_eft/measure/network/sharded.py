"""Snapshots taken by several processes together, each with its rows of the probe.

With N samples and W ranks each rank runs N/W of them through the network and back, the factors of the Jacobian
(``gram.py``) are exchanged, and each rank computes 1/W of the blocks of the symmetric kernel. Where the factors of all
samples do not fit into memory, they are not exchanged but recomputed block by block, and only the kernel is divided.

It pays where a sample's passes are expensive (convolutions, attention); for a perceptron the exchange takes longer than
it saves. ``python -m tests.benchmarks.sharded`` times both.

Running statistics differ between the ranks of a DistributedDataParallel: those of rank 0 are used by all, in copies.
"""

import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torch_eft.measure.forward.checks import check_finite
from torch_eft.measure.forward.isolation import IsolatedModel, Model, isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.measure.jacobian.blocks import summed_over_outputs
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY, JacobianGram
from torch_eft.measure.jacobian.gram import Factor
from torch_eft.measure.kernels.random_outputs import projected
from torch_eft.measure.network.batch_norm import with_batch_statistics
from torch_eft.measure.network.ranks import Ranks
from torch_eft.measure.network.snapshot import Plan, Snapshot, take_snapshot
from torch_eft.measure.representations.hidden_kernels import hidden_kernels


def sharded_snapshot(
    model: Model,
    x: Any,
    plan: Plan,
    *,
    lambdas: Mapping[str, float] | float | None = None,
    output_fn: OutputFn | None = None,
    group: dist.ProcessGroup | None = None,
    memory: int = DEFAULT_MEMORY,
    norms: Collection[str] = (),
) -> Snapshot:
    """Take a snapshot by all ranks of a process group together; all must call, with equal arguments.

    Outputs and NTK are divided among the ranks; hidden kernels, which take a forward only, are not. A model that cannot
    be measured, is not the same on all ranks or has sharded parameters (FSDP, see ``full_copy``) raises a
    ``ValueError``; the failure of another rank a ``PeerError``.

    Args:
        model: The module that every rank holds (of a DistributedDataParallel, its ``.module``).
        x: All the samples, on every rank.
        plan: What to measure.
        lambdas: See ``ntk``.
        output_fn: See ``ntk``.
        group: The process group; None for the default one.
        memory: Bytes allowed on each rank.
        norms: BatchNorm layers that take the statistics of ``x`` in the place of running ones.

    Returns:
        The whole snapshot, on every rank.
    """
    probe, ranks = as_probe(x), Ranks(group)
    if ranks.size == 1:
        with isolated(model, output_fn) as network:
            normed = with_batch_statistics(network, probe, norms)
            return take_snapshot(normed, probe, plan, lambdas=lambdas, memory=memory)
    with ExitStack() as stack:
        network = ranks.together(lambda: stack.enter_context(isolated(model, output_fn)))
        ranks.check_equal(_fingerprint(network, probe))
        _equal_buffers(network, ranks)
        network = ranks.together(lambda: with_batch_statistics(network, probe, norms))
        output = _outputs(network, probe, ranks)
        ntk = None
        if plan.ntk:
            ntk = _kernel(projected(network, plan.outputs), probe, lambdas, plan.ntk_trace, memory, ranks)
        hidden = ranks.together(lambda: hidden_kernels(network, probe, layers=plan.layers) if plan.hidden else {})
    return Snapshot(output, ntk, hidden)


def sharded_ntk(
    model: Model,
    x: Any,
    *,
    lambdas: Mapping[str, float] | float | None = None,
    trace: bool = False,
    output_fn: OutputFn | None = None,
    group: dist.ProcessGroup | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Tensor:
    """Compute the NTK by all ranks of a process group together; see ``ntk`` and ``sharded_snapshot``."""
    plan = Plan(ntk=True, ntk_trace=trace)
    H = sharded_snapshot(model, x, plan, lambdas=lambdas, output_fn=output_fn, group=group, memory=memory).ntk
    assert H is not None
    return H


def full_copy(model: nn.Module, unsharded_model: nn.Module) -> nn.Module:
    """Gather the sharded parameters and buffers of ``model`` (FSDP2, DTensor) into a plain module.

    A collective: every rank must call it. The copy can then be measured by every rank, alone or together. Names or
    shapes that differ raise a ``ValueError`` before anything is gathered, a ``PeerError`` on the other ranks.

    Args:
        model: The module whose tensors may be sharded.
        unsharded_model: The same architecture, built plainly, with real tensors.

    Returns:
        ``unsharded_model``, with the values of ``model``.
    """
    source, target = _tensors_of(model), _tensors_of(unsharded_model)
    if dist.is_available() and dist.is_initialized():
        Ranks().together(lambda: _check_same_tensors(source, target))
    else:
        _check_same_tensors(source, target)
    with torch.no_grad():
        for name, value in source.items():
            gather = getattr(value, "full_tensor", None)
            target[name].copy_(value if gather is None else gather())
    for name, parameter in model.named_parameters():
        unsharded_model.get_parameter(name).requires_grad_(parameter.requires_grad)
    return unsharded_model


def _check_same_tensors(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    wrong = sorted(set(source) ^ set(target))
    wrong = wrong or [name for name in source if source[name].shape != target[name].shape]
    if wrong:
        name = wrong[0]
        sides = [tuple(side[name].shape) if name in side else "missing" for side in (source, target)]
        raise ValueError(
            f"unsharded_model: {name!r} is {sides[0]} in the model and {sides[1]} in the unsharded one; build it as "
            "the model was built before it was sharded"
        )


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _fingerprint(network: IsolatedModel, probe: Probe) -> dict[str, Tensor]:
    """Return numbers that are equal where the ranks hold the same."""
    values = {f"the parameter {name!r} (its norm)": value.double().norm() for name, value in network.params.items()}
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(probe.inputs) if isinstance(leaf, Tensor)]
    numbers = {f"input {i} of the probe (its norm)": leaf.double().norm() for i, leaf in enumerate(leaves)}
    return {**values, **numbers, "the number of samples": torch.tensor(probe.size)}


def _equal_buffers(network: IsolatedModel, ranks: Ranks) -> None:
    """Put rank 0's buffers on all ranks into the network's constants, which are copies; frozen parameters stay."""
    names = [name for name, _ in network.shadow.named_buffers()]
    values = ranks.from_first([network.constants[name] for name in names])
    network.constants.update(zip(names, values, strict=True))


def _own_rows(samples: int, ranks: Ranks, device: torch.device) -> Tensor:
    """Return the indices of this rank's samples; equally many on all, the last ones repeated."""
    each = -(-samples // ranks.size)
    return (torch.arange(each, device=device) + ranks.rank * each).clamp_max(samples - 1)


def _outputs(network: IsolatedModel, probe: Probe, ranks: Ranks) -> Tensor:
    def own() -> Tensor:
        inputs = network.place(probe)
        device = next(leaf.device for leaf in torch.utils._pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
        rows = _own_rows(probe.size, ranks, device)
        with torch.no_grad():
            return checked_output(network, Probe(tree_map_only(Tensor, lambda tensor: tensor[rows], inputs)))

    output = ranks.together(own)
    return torch.cat([part for (part,) in ranks.gather([output])])[: probe.size]


def _kernel(
    network: IsolatedModel,
    probe: Probe,
    lambdas: Mapping[str, float] | float | None,
    trace: bool,
    memory: int,
    ranks: Ranks,
) -> Tensor:
    def prepared() -> tuple[JacobianGram, bool]:
        engine = JacobianGram(network, probe, lambdas, memory)
        return engine, engine.estimate(outputs=1 if trace else None).blocks == 1

    engine, fits = ranks.together(prepared)
    H = _by_exchange(engine, trace, ranks) if fits else _by_recomputation(engine, probe, lambdas, trace, memory, ranks)
    check_finite(network, [H], "the NTK is")  # the same H on all ranks: all raise
    return H


def _by_exchange(engine: JacobianGram, trace: bool, ranks: Ranks) -> Tensor:
    """Gather the factors of every rank's own rows, then share out the pairs of blocks."""
    N = engine.samples
    each = -(-N // ranks.size)

    def own_factors() -> list[Factor]:
        rows = _own_rows(N, ranks, next(iter(engine.network.params.values())).device)
        factors = engine.checked_factors(tree_map_only(Tensor, lambda tensor: tensor[rows], engine.inputs))
        return sorted(factors, key=lambda factor: factor.weight)  # fallbacks come in no certain order

    own = ranks.together(own_factors)
    kinds = [(factor.names, [(part.shape, part.dtype) for part in factor.tensors]) for factor in own]
    ranks.check_equal({"how its Jacobian is computed": torch.tensor(zlib.crc32(repr(kinds).encode()))})
    gathered = ranks.gather([tensor for factor in own for tensor in factor.tensors]) if own else [[]] * ranks.size
    blocks = [_with_tensors(own, tensors) for tensors in gathered]

    def rows_of(samples: slice) -> list[Factor]:
        number = samples.start // each
        inside = slice(samples.start - number * each, samples.stop - number * each)
        factors = [factor.rows(inside) for factor in blocks[number]]
        return summed_over_outputs(factors) if trace else factors

    def own_share() -> Tensor:
        """Return the whole kernel, zero outside the own blocks."""
        sums = engine.gram_blocks(trace=trace)
        for rows, columns in _share(ranks.rank, ranks.size, each, N):
            first = rows_of(rows)
            sums.add(rows, columns, first, first if rows == columns else rows_of(columns))
        return sums.finished(engine.outputs if trace else None)[""][0, 0].contiguous()

    return ranks.sum(ranks.together(own_share))


def _with_tensors(factors: Sequence[Factor], tensors: Sequence[Tensor]) -> list[Factor]:
    remaining = iter(tensors)
    return [factor.with_tensors([next(remaining) for _ in factor.tensors]) for factor in factors]


def _share(rank: int, size: int, each: int, samples: int) -> Iterator[tuple[slice, slice]]:
    """Yield a rank's blocks (rows, columns) of the kernel, without the samples that are only repeated."""
    for row, column in _pairs(rank, size, each):
        rows, columns = (slice(s.start, min(s.stop, samples)) for s in (row, column))
        if rows.start < rows.stop and columns.start < columns.stop:
            yield rows, columns


def _pairs(rank: int, size: int, each: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks (rows, columns) on and beside the diagonal, so that every pair of samples is one rank's, once.

    Rank r takes the blocks (r, r + d) with d up to W/2, cyclically; of d = W/2, which two ranks could take, one takes
    the first half of the rows and the other the rest.
    """
    whole = [slice(number * each, (number + 1) * each) for number in range(size)]
    yield whole[rank], whole[rank]
    for distance in range(1, (size - 1) // 2 + 1):
        yield whole[rank], whole[(rank + distance) % size]
    if size % 2 == 0:
        other = (rank + size // 2) % size
        first, second = sorted((rank, other))
        start, middle, stop = whole[first].start, whole[first].start + each // 2, whole[first].stop
        yield (slice(start, middle) if rank == first else slice(middle, stop)), whole[second]


def _by_recomputation(
    engine: JacobianGram,
    probe: Probe,
    lambdas: Mapping[str, float] | float | None,
    trace: bool,
    memory: int,
    ranks: Ranks,
) -> Tensor:
    """Compute the own rows of H, (own, N), block by block within ``memory``, and gather them."""
    N = engine.samples

    def own_rows() -> Tensor:
        rows = _own_rows(N, ranks, torch.device("cpu")).unique()
        wanted = rows[rows >= ranks.rank * -(-N // ranks.size)]  # a rank with repeated samples only has none
        H = next(iter(engine.network.params.values())).new_zeros(*(N, N) if trace else (N, N, *2 * (engine.outputs,)))
        if len(wanted):
            inputs = tree_map_only(Tensor, lambda tensor: tensor[wanted.to(tensor.device)], probe.inputs)
            own = JacobianGram(engine.network, Probe(inputs), lambdas, memory)
            H[wanted.to(H.device)] = own.ntk(trace=trace, other=engine)
        return H

    H = ranks.sum(ranks.together(own_rows))
    return (H + (H.T if trace else H.permute(1, 0, 3, 2))) / 2  # rounding only: H is symmetric
