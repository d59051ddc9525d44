"""Kernels of eight networks at infinite width by neural-tangents, to be frozen in ``test_stax.py``. Run by hand:

    JAX_ENABLE_X64=1 python -m tests.theory.architecture.stax_networks

with jax==0.4.23 jaxlib==0.4.23 "numpy<2" "scipy<1.13" neural-tangents==0.6.5 (2023; it fails with later jax). Prints
``{name: (K, Theta)}``, the entries (0, 0), (0, 1), (1, 1) of one output.
"""

import numpy


def images(count=2, size=6, channels=2):
    """Inputs (N, height, width, channels), the same everywhere."""
    place = numpy.arange(count * size * size * channels, dtype=float).reshape(count, size, size, channels)
    return numpy.sin(1.7 * place + 0.1 * place**1.5) + 0.3 * numpy.cos(place / 7)


def networks():
    """Layers of stax by name; widths do not matter."""
    from neural_tangents import stax

    def conv(size=3, stride=1, padding="SAME", W=1.3, b=0.2):
        return stax.Conv(1, (size, size), (stride, stride), padding, W_std=W, b_std=b)

    def dense(W=1.2, b=0.1):
        return stax.Dense(1, W_std=W, b_std=b)

    def block(act, norm=None):
        norms = [norm()] if norm else []
        branch = stax.serial(*norms, act(), conv(), *norms, act(), conv(W=0.9))
        return stax.serial(stax.FanOut(2), stax.parallel(branch, stax.Identity()), stax.FanInSum())

    def projection(act):
        branch = stax.serial(act(), conv(stride=2), act(), conv())
        return stax.serial(stax.FanOut(2), stax.parallel(branch, conv(1, 2, W=1.0)), stax.FanInSum())

    def norm():
        return stax.LayerNorm(axis=(1, 2, 3), batch_axis=0, eps=1e-5)

    gap, flat = stax.GlobalAvgPool, stax.Flatten
    pool = stax.AvgPool
    return {
        "dense erf": stax.serial(flat(), dense(), stax.Erf(), dense(), stax.Erf(), dense()),
        "conv same relu flatten": stax.serial(conv(), stax.Relu(), conv(), stax.Relu(), flat(), dense()),
        "conv circular gelu gap": stax.serial(
            conv(padding="CIRCULAR"), stax.Gelu(), conv(padding="CIRCULAR"), stax.Gelu(), gap(), dense()
        ),
        "conv stride pool relu": stax.serial(
            conv(padding="VALID"),
            stax.Relu(),
            pool((2, 2), (2, 2)),
            conv(2, padding="VALID"),
            stax.Relu(),
            flat(),
            dense(),
        ),
        "residual relu gap": stax.serial(conv(), block(stax.Relu), stax.Relu(), gap(), dense()),
        "layer norm gelu gap": stax.serial(conv(), norm(), stax.Gelu(), conv(), norm(), stax.Gelu(), gap(), dense()),
        "pool leaky flatten": stax.serial(
            conv(),
            stax.LeakyRelu(0.2),
            pool((3, 3), (1, 1), "SAME"),
            conv(stride=2),
            stax.LeakyRelu(0.2),
            flat(),
            dense(),
        ),
        "wide resnet erf": stax.serial(conv(), block(stax.Erf, norm), projection(stax.Erf), stax.Erf(), gap(), dense()),
    }


if __name__ == "__main__":
    x = images()
    for name, (_, _, kernel_fn) in networks().items():
        kernels = kernel_fn(x, x, ("nngp", "ntk"))
        K, Theta = (numpy.asarray(each)[[0, 0, 1], [0, 1, 1]].tolist() for each in (kernels.nngp, kernels.ntk))
        print(f"    {name!r}: ({K}, {Theta}),", flush=True)
