"""Some processes of one process group (gloo), for tests; what they return, or where they failed."""

import datetime
import os
import tempfile
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _enter(rank, size, store, seconds, work, arguments, results):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=seconds),
        )
        results.put((rank, work(rank, *arguments), None))
        dist.barrier()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def spread(size, work, *arguments, seconds=180):
    """``[work(rank, *arguments), ...]`` of ``size`` processes; plain types and numpy arrays only.

    ``seconds`` is how long one waits for another: on a busy machine their imports alone take a minute.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        store = os.path.join(directory, "store")
        processes = [
            context.Process(target=_enter, args=(rank, size, store, seconds, work, arguments, results))
            for rank in range(size)
        ]
        for rank, process in enumerate(processes):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PYTHONHASHSEED", str(rank + 1))  # sets in another order on each rank
                process.start()
        found = {}
        try:
            for _ in processes:
                # A process that was killed says nothing.
                rank, value, error = results.get(timeout=2 * seconds)
                assert error is None, f"rank {rank}: {error}"
                found[rank] = value
        finally:
            for process in processes:
                process.join(seconds if len(found) == size else 1)
                process.kill()
    return [found[rank] for rank in range(size)]
