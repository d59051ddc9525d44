"""What a benchmark ran on, its clock, and the record of its numbers: a JSON a run, outside of the repository."""

import json
import os
import platform
import statistics
import tempfile
import time
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

FOLDER = Path(tempfile.gettempdir()) / "torch_eft_benchmarks"


def machine(device="cpu", packages=()):
    """Processor or accelerator, its load, threads and versions, as plain types."""
    found = {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "device_GiB": round(properties.total_memory / 2**30, 1)}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def line(found):
    """The machine in one line."""
    versions = {name: value for name, value in found.items() if name not in _SAID}
    text = ", ".join(f"{name} {value or 'not installed'}" for name, value in versions.items())
    device = f"{found['device']} ({found['device_GiB']} GiB), " if "device" in found else ""
    return (
        f"{device}{found['processor']} ({found['instructions']}), {found['threads']} of {found['cores']} cores used, "
        f"load {found['load']}; {text}"
    )


_SAID = ("processor", "instructions", "cores", "threads", "load", "device", "device_GiB")


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((each.split(":")[1].strip() for each in lines if each.startswith("model name")), platform.machine())


def seconds(action, device="cpu"):
    """Seconds that an action takes: the process's on a processor, the wall clock's on a device, which is waited for."""
    if torch.device(device).type == "cpu":
        begun = time.process_time()
        action()
        return time.process_time() - begun
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    action()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def summary(times):
    """Median, least, most and number of some seconds."""
    return {"median": statistics.median(times), "least": min(times), "most": max(times), "rounds": len(times)}


def keep(name, found, numbers, folder=FOLDER):
    """Write machine and numbers of a run into a file of its own, and say where."""
    now = datetime.now()
    path = Path(folder) / f"{name}-{now:%Y%m%d-%H%M%S}-{os.getpid()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, "at": now.isoformat(timespec="seconds"), "machine": found, "numbers": numbers}
    path.write_text(json.dumps(content, indent=1))
    print(f"\nnumbers of this run: {path}")
    return path
