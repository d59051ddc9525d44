"""What corrections of order 1/n cost, counted before they are made.

The constants are least-squares fits to process times on one thread, which ``python -m tests.benchmarks.forecast_work``
repeats; the counts are those of the loops: entries of tensors with four labels, each the product of two features over
a sample; and their contraction at every step.
"""

import math

from torch_eft.theory.training.corrections.mean_output import points_at_once


def corrections_work(
    train: int,
    probe: int,
    outputs: int,
    depth: int,
    *,
    times: int,
    steps: int,
    momentum: bool,
    gaussian: bool = True,
) -> dict[str, float]:
    """Count the work of the corrections of order 1/n to an ensemble's training, for a smooth activation.

    Args:
        train: N.
        probe: N_p.
        outputs: n_L.
        depth: L.
        times: Number of times at which they are computed.
        steps: Number T of optimizer steps.
        momentum: True with momentum, whose sums over time are made step by step.
        gaussian: False where the read-out's weights are not, which takes a pass over its sources for every output.

    Returns:
        Seconds of one core of the parts ``"ntk"``, ``"hidden"``, ``"mean"`` and ``"covariance"``.
    """
    layers, points = depth - 1, train + probe
    pairs, triples = (probe * train) ** 2, points * train**3  # entries of the largest tensors
    tiles = math.ceil(points / points_at_once(points, train))
    in_time = steps * triples
    each = 8e-5 if momentum else 3.2e-5
    summed = steps * (4e-5 + 2e-8 * train**2) if momentum else 0.0
    passes = 2 * tiles  # over all times, with two samples, besides those of order 0 and of the validity
    zeroth = 0.004 + 0.0065 * layers
    ntk = layers * (0.11 + 9.0e-7 * pairs + 2.4e-4 * probe * train) + times * pairs * (1.6e-8 + 1e-9 * outputs)
    hidden = layers * (0.17 + 2e-6 * pairs + 2.8e-4 * train**2) + times * (2e-4 + 4e-7 * train**2)
    mean = layers * (0.15 * tiles + 2.2e-6 * triples) + 7e-9 * in_time + 2.7e-7 * steps * train**2
    between = (1 + outputs**2) * (6e-9 * in_time + steps * (1.35e-8 * points**2 * train + each))
    covariance = mean + layers * (0.05 * tiles + 9e-7 * (points * train) ** 2) + 2.5e-9 * in_time + between
    ntk, mean, covariance = ntk + 5 * summed, mean + (passes + 6) * summed, covariance + (passes + 14) * summed
    work = {"ntk": zeroth + ntk, "hidden": zeroth + hidden, "mean": zeroth + mean, "covariance": zeroth + covariance}
    if gaussian:
        return work
    alone = corrections_work(train, probe, 1, 2, times=times, steps=steps, momentum=momentum)
    return work | {name: work[name] + _ALONE * outputs * alone[name] for name in ("ntk", "mean", "covariance")}


_ALONE = 0.8
"""Of the work for one hidden layer and one output, fitted likewise."""
