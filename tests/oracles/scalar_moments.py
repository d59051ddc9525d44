"""The activations once more, in numpy, and their Gaussian integrals by scipy: the oracles of criticality."""

import math

import numpy
from scipy import integrate, special

ALPHA, SCALE = 1.6732632423543772, 1.0507009873554805  # Klambauer et al. 2017


def _mish_slope(z):
    t = numpy.tanh(numpy.logaddexp(0, z))
    return t + z * (1 - t * t) * special.expit(z)


ORACLES = {
    "tanh": (numpy.tanh, lambda z: 1 / numpy.cosh(z) ** 2, ()),
    "arctan": (numpy.arctan, lambda z: 1 / (1 + z * z), ()),
    "erf": (special.erf, lambda z: 2 / math.sqrt(math.pi) * numpy.exp(-z * z), ()),
    "sin": (numpy.sin, numpy.cos, ()),
    "gelu": (
        lambda z: z * special.ndtr(z),
        lambda z: special.ndtr(z) + z * numpy.exp(-z * z / 2) / math.sqrt(2 * math.pi),
        (),
    ),
    "silu": (lambda z: z * special.expit(z), lambda z: special.expit(z) * (1 + z * special.expit(-z)), ()),
    "mish": (lambda z: z * numpy.tanh(numpy.logaddexp(0, z)), _mish_slope, ()),
    "hardswish": (
        lambda z: z * numpy.clip(z + 3, 0, 6) / 6,
        lambda z: numpy.where(z < -3, 0, numpy.where(z > 3, 1, (2 * z + 3) / 6)),
        (-3, 3),
    ),
    "elu": (lambda z: numpy.where(z > 0, z, numpy.expm1(z)), lambda z: numpy.where(z > 0, 1, numpy.exp(z)), (0,)),
    "softsign": (lambda z: z / (1 + abs(z)), lambda z: 1 / (1 + abs(z)) ** 2, (0,)),
    "selu": (
        lambda z: SCALE * numpy.where(z > 0, z, ALPHA * numpy.expm1(numpy.minimum(z, 0))),
        lambda z: SCALE * numpy.where(z > 0, 1, ALPHA * numpy.exp(numpy.minimum(z, 0))),
        (0,),
    ),
}


def gauss(function, K, kinks):
    """<f> by adaptive integration, relative error 1e-12."""
    root = math.sqrt(K)
    edges = [-13.0, *(k / root for k in kinks if abs(k) < 13 * root), 13.0]
    edges = sorted({*edges, *numpy.arange(-12, 13, 3.0)})
    return sum(
        integrate.quad(
            lambda u: function(root * u) * math.exp(-u * u / 2) / math.sqrt(2 * math.pi), low, high, epsabs=1e-15
        )[0]
        for low, high in zip(edges, edges[1:], strict=False)
    )


def oracle_moments(name, K):
    """<s^2>, <s'^2>, d<s^2>/dK = <s s' z>/K; the last by parts, so that no s'' and no delta function enters."""
    s, slope, kinks = ORACLES[name]
    return (
        gauss(lambda z: s(z) ** 2, K, kinks),
        gauss(lambda z: slope(z) ** 2, K, kinks),
        gauss(lambda z: s(z) * slope(z) * z, K, kinks) / K,
    )


def within(value, printed):
    """Agreement to the digits printed: half a unit of the last one."""
    mantissa, _, exponent = printed.partition("e")
    digits = len(mantissa.partition(".")[2]) - int(exponent or 0)
    return abs(value - float(printed)) <= 0.5000001 * 10.0**-digits
