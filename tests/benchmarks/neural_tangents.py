"""Time of neural-tangents' empirical NTK on the workloads. Run by hand:

    python -m tests.benchmarks.neural_tangents --python <a python with jax and neural-tangents> [--workloads a,b,c,d,e]

neural-tangents 0.6.5 is from 2023: it runs unchanged with jax 0.4.23, and fails with 0.4.30 (``jax.interpreters.ad``
lost what it calls): pip install jax==0.4.23 jaxlib==0.4.23 "numpy<2" "scipy<1.13" neural-tangents==0.6.5.

This process writes parameters, inputs and our H; the other reads them, computes in jit the NTK of the same network,
and prints its deviation, compilation and process time, median [least..most], of the faster layout of weights. It has
no torch: this file serves as both. On d it deviates by 1e-4 in float32 and by 1e-15 in float64 (JAX_ENABLE_X64=1): its
rounding puts other units on the other side of a ReLU's kink. One implementation a process, so that one that does not
end can be given up.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMPLEMENTATIONS = ("JACOBIAN_CONTRACTION", "NTK_VECTOR_PRODUCTS", "STRUCTURED_DERIVATIVES")
SINGLE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def export(folder, key, rounds):
    """Write parameters, inputs and our NTK of a workload for the other process; milliseconds of our NTK."""
    import numpy
    import torch

    from tests.benchmarks.workloads import WORKLOADS
    from torch_eft import measure

    torch.set_num_threads(1)
    model, x = WORKLOADS[key].build()
    arrays = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    numpy.savez(folder / f"{key}.npz", **arrays, _x=x.numpy(), _H=measure.ntk(model, x).numpy())
    milliseconds = []
    for _ in range(rounds):
        begun = time.process_time()
        measure.ntk(model, x)
        milliseconds.append(1000 * (time.process_time() - begun))
    return milliseconds


def networks(transposed):
    """The networks of workloads.py once more, ``f(params, x)`` with torch's names of the parameters.

    STRUCTURED_DERIVATIVES sees the structure of x @ w and not that of x @ w.T (``transposed``, torch's layout of w);
    where there is none to gain from, the latter can be the faster one.
    """
    import jax
    from jax import lax
    from jax import numpy as jnp

    def times(x, w):
        return x @ w.T if transposed else x @ w

    def linear(p, name, x):
        return times(x, p[f"{name}.weight"]) + p[f"{name}.bias"]

    def mlp(p, x):
        names = sorted((name[:-7] for name in p if name.endswith(".weight")), key=int)
        for name in names[:-1]:
            x = jnp.tanh(linear(p, name, x))
        return linear(p, names[-1], x)

    def conv(p, name, x, stride=1):
        w = p[f"{name}.weight"]
        pad = w.shape[2] // 2
        y = lax.conv_general_dilated(x, w, (stride, stride), [(pad, pad)] * 2)
        return y + p[f"{name}.bias"][:, None, None] if f"{name}.bias" in p else y

    def gelu(x):
        return jax.nn.gelu(x, approximate=False)

    def cnn(p, x):
        for name, stride in (("0", 1), ("2", 1), ("4", 2), ("6", 1)):
            x = gelu(conv(p, name, x, stride))
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // 4, 4, w // 4, 4).mean((3, 5))
        return linear(p, "10", x.reshape(n, -1))

    def group_norm(p, name, x, groups=8):
        y = x.reshape(len(x), groups, -1)
        y = (y - y.mean(-1, keepdims=True)) * lax.rsqrt(y.var(-1, keepdims=True) + 1e-5)
        return y.reshape(x.shape) * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    def resnet(p, x):
        x = jax.nn.relu(group_norm(p, "norm", conv(p, "stem", x)))
        for index in range(8):
            name, stride = f"stages.{index}", 2 if index in (2, 4, 6) else 1
            y = jax.nn.relu(group_norm(p, f"{name}.norm1", conv(p, f"{name}.conv1", x, stride)))
            y = group_norm(p, f"{name}.norm2", conv(p, f"{name}.conv2", y))
            if f"{name}.shortcut.0.weight" in p:
                x = group_norm(p, f"{name}.shortcut.1", conv(p, f"{name}.shortcut.0", x, stride))
            x = jax.nn.relu(y + x)
        return linear(p, "head", x.mean((2, 3)))

    def layer_norm(p, name, x):
        x = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def attention(p, name, x, heads=4):
        n, t, d = x.shape
        qkv = times(x, p[f"{name}.in_proj_weight"]) + p[f"{name}.in_proj_bias"]
        q, k, v = (y.reshape(n, t, heads, -1).transpose(0, 2, 1, 3) for y in jnp.split(qkv, 3, -1))
        weights = jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / (d // heads) ** 0.5)
        return linear(p, f"{name}.out_proj", (weights @ v).transpose(0, 2, 1, 3).reshape(n, t, d))

    def transformer(p, x):
        x = jax.nn.one_hot(x, 256) @ p["embedding.weight"] + p["position"]
        for index in range(2):
            name = f"layers.{index}"
            x = x + attention(p, f"{name}.self_attn", layer_norm(p, f"{name}.norm1", x))
            y = gelu(linear(p, f"{name}.linear1", layer_norm(p, f"{name}.norm2", x)))
            x = x + linear(p, f"{name}.linear2", y)
        return linear(p, "head", layer_norm(p, "norm", x).mean(1))

    return {"a": mlp, "b": mlp, "c": cnn, "d": resnet, "e": transformer}


def measure_one(path, implementation, rounds):
    """In the process that has jax: one line of the table."""
    # XLA runs independent operations on as many threads as there are cores it may use.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import jax
    import neural_tangents
    import numpy

    arrays = dict(numpy.load(path))
    x, H = arrays.pop("_x"), arrays.pop("_H")
    best = min(
        (time_one(path.stem, layout, implementation, arrays, x, H, rounds) for layout in ("x @ w", "x @ w.T")),
        key=lambda found: statistics.median(found[0]),
    )
    seconds, first, deviation, layout = best
    median = statistics.median(seconds)
    print(
        f"| {path.stem} | {implementation}, {layout} | {median:.1f} [{min(seconds):.1f}..{max(seconds):.1f}] "
        f"| {max(0.0, first - median / 1000):.1f} | {deviation:.0e} "
        f"| neural-tangents {neural_tangents.__version__}, jax {jax.__version__} |",
        flush=True,
    )


def time_one(key, layout, implementation, arrays, x, H, rounds):
    """Milliseconds of every round, seconds of the first call, the deviation from H, and the layout."""
    import jax
    import neural_tangents
    import numpy

    f = networks(layout == "x @ w.T")[key]
    if layout == "x @ w":
        kept = ("embedding.weight", "position")
        arrays = {n: v.T.copy() if v.ndim == 2 and n not in kept else v for n, v in arrays.items()}
    kernel = neural_tangents.empirical_ntk_fn(
        f,
        trace_axes=(),
        vmap_axes=0,
        implementation=neural_tangents.NtkImplementation[implementation],
    )
    run = jax.jit(lambda inputs, params: kernel(inputs, None, params))
    x, params = jax.device_put(x), jax.device_put(arrays)

    def timed():
        begun = time.process_time()
        out = run(x, params).block_until_ready()
        return time.process_time() - begun, out

    first, out = timed()
    deviation = numpy.linalg.norm(numpy.asarray(out) - H) / numpy.linalg.norm(H)
    milliseconds = [1000 * timed()[0] for _ in range(rounds if first < 20 else min(rounds, 2))]
    return milliseconds, first, deviation, layout


def main():
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="an interpreter with jax and neural-tangents")
    parser.add_argument("--workloads", default="a,b,c,d,e")
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=300, help="seconds after which one is given up")
    options = parser.parse_args()
    environment = os.environ | {"XLA_FLAGS": SINGLE, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    heads = ("", "implementation", "ms", "compilation s", "deviation from ours", "versions")
    print(f"| {' | '.join(heads)} |\n|" + "---|" * len(heads), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for key in options.workloads.split(","):
            own = export(Path(folder), key, options.rounds)
            print(f"| {key} | ours | {statistics.median(own):.1f} [{min(own):.1f}..{max(own):.1f}] | | | |", flush=True)
            for name in options.implementations.split(","):
                command = [options.python, __file__, f"{folder}/{key}.npz", name, str(options.rounds)]
                try:
                    ended = subprocess.run(
                        command, env=environment, capture_output=True, text=True, timeout=options.limit
                    )
                    last = (ended.stderr.strip().splitlines() or ["?"])[-1]
                    print(ended.stdout.strip() or f"| {key} | {name} | failed: {last[:120]} |", flush=True)
                except subprocess.TimeoutExpired:
                    print(f"| {key} | {name} | given up after {options.limit:.0f} s |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1].endswith(".npz"):
        # A script's folder comes first on the path, and this file's name hides the library's.
        sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent.resolve()]
        measure_one(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    else:
        main()
