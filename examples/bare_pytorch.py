"""The same comparison in a plain PyTorch loop, without Lightning.

A critical tanh network on digits by full-batch gradient descent on squared error: what the theory covers. Run:

    python examples/bare_pytorch.py && tensorboard --logdir bare_pytorch_run
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from torch_eft.cli.demo import load_digits_split
from torch_eft.live import Observer, logarithmic


def main(steps: int = 300, width: int = 256, logdir: str = "bare_pytorch_run") -> Observer:
    torch.manual_seed(0)
    x, y, x_probe = load_digits_split()
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
        nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)

    observer = Observer(model, x_probe, optimizer, every=logarithmic(10), budget=None, logdir=logdir)
    observer.begin(total_steps=steps)  # theta_0
    for step in range(1, steps + 1):
        observer.observe_batch((x, y))  # these three let the theory see what kind of training this is
        loss = F.mse_loss(model(x), y)
        observer.observe_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        observer.before_step()
        optimizer.step()
        observer.measure(step)  # if it is due
    observer.finish()
    return observer


if __name__ == "__main__":
    observer = main()
    print(observer.validity)
    for step, scalars in observer.history.items():
        drift, output = scalars["eft/ntk_drift/measured"], scalars["eft/output_projection/measured"]
        theory = scalars["eft-theory/output_projection/order_0"]
        print(f"step {step:4}: NTK drift {drift:.3f}, output {output:.3f}, at infinite width {theory:.3f}")
