"""What presets add to 2,000 minibatch steps of small networks, in processor time: python -m tests.benchmarks.minibatch

    --networks tiny,mlp  --presets light,standard  --rounds 7  --steps 2000

tiny is 8-16-1 in batches of 32, mlp is 64-256-256-10 in batches of 64, of 512 random samples; SGD, one thread. In each
round all train once, in turn; the monitor's own clock is the processor's, too. The beginning is theta_0 and the
diagnosis of the network; it falls once, whatever the length of the training.
"""

import argparse
import contextlib
import io
import statistics
import time
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from tests.benchmarks.machine import keep, line, machine, summary
from torch_eft.live.observer import Observer

NETWORKS = {"tiny": ([8, 16, 1], 32, F.mse_loss), "mlp": ([64, 256, 256, 10], 64, F.cross_entropy)}


def network(widths):
    layers = [layer for sizes in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(*sizes), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def train(key, preset, steps):
    """Seconds of the training, of them those of the beginning, and the number of measurements."""
    widths, batch, loss_of = NETWORKS[key]
    torch.manual_seed(0)
    model, x = network(widths), torch.randn(512, widths[0])
    y = torch.randint(widths[-1], (512,)) if loss_of is F.cross_entropy else torch.randn(512, 1)
    optimizer, generator = torch.optim.SGD(model.parameters(), lr=0.05), torch.Generator().manual_seed(1)
    begun = time.process_time()
    observer = None
    if preset is not None:
        observer = Observer(model, x[:16], optimizer, preset=preset)
        observer.budget.clock = time.process_time
        observer.begin(total_steps=steps)
    beginning = time.process_time() - begun
    for step in range(1, steps + 1):
        chosen = torch.randint(512, (batch,), generator=generator)
        inputs, targets = x[chosen], y[chosen]
        if observer is not None:
            observer.observe_batch((inputs, targets))
        optimizer.zero_grad()
        loss = loss_of(model(inputs), targets)
        if observer is not None:
            observer.observe_loss(loss)
        loss.backward()
        if observer is not None:
            observer.before_step()
        optimizer.step()
        if observer is not None:
            observer.measure(step)
    if observer is not None:
        observer.finish()
    return time.process_time() - begun, beginning, 0 if observer is None else len(observer.history)


def main(networks, presets, rounds, steps):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    found = machine()
    print(f"{line(found)}\n{steps} steps, medians of {rounds} rounds [least..most], seconds of the processor\n")
    numbers = {}
    for key in networks:
        contenders = [None, *presets]
        times = {preset: [] for preset in contenders}
        beginnings = {preset: [] for preset in contenders}
        points = {}
        for index in range(rounds + 1):  # the first loads what is loaded at first use
            for preset in contenders:
                with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                    whole, beginning, points[preset] = train(key, preset, steps if index else 100)
                if index:
                    times[preset].append(whole)
                    beginnings[preset].append(beginning)
        bare = statistics.median(times[None])
        numbers[key] = {str(preset): summary(values) for preset, values in times.items()}
        print(f"{key}: bare {bare:.3f} [{min(times[None]):.3f}..{max(times[None]):.3f}]")
        for preset in presets:
            whole, beginning = statistics.median(times[preset]), statistics.median(beginnings[preset])
            print(
                f"  {preset}: {100 * (whole - bare) / bare:+.1f} %, of it {100 * beginning / bare:.1f} % the beginning"
                f"; {whole:.3f} [{min(times[preset]):.3f}..{max(times[preset]):.3f}], {points[preset]} measurements",
                flush=True,
            )
            numbers[key][preset]["beginning"] = beginning
    keep("minibatch", found, numbers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="tiny,mlp", type=lambda text: text.split(","))
    parser.add_argument("--presets", default="light,standard", type=lambda text: text.split(","))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2000)
    main(**vars(parser.parse_args()))
