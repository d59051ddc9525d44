"""The forecast of order 1/n against networks really trained on digits: python -m tests.benchmarks.trained_digits

64 images, 8 probes, eta = 0.5 / lambda_max, t = 10, 30, 60; see ``tests.theory.trained.digits_ensembles``. Prints
the slope of the measured correction on the predicted one, with its standard error over pairs of networks, and the
cosine between them, corrected for noise. Widths and numbers of pairs may be given: ``n=pairs``.

Measured (5088 pairs at n = 128, 225 s of one core; 928 at n = 256, 60 s; the forecast's own sampling error is 0.5 % of
the drift and 1.5 % of the mean, in rms of the entries):

                      n = 128: t = 10     30        60        n = 256: t = 10     30        60
    mean, probe            .968(4)   .970(4)   .980(4)             .978(9)   .985(9)   .989(10)
    mean, train            .970(2)   .969(2)   .974(2)             .980(6)   .979(4)   .984(4)
    drift, trace           .970(4)   .931(3)   .898(2)             .980(8)   .955(6)   .936(6)
    drift, traceless       .93(7)    .86(4)    .86(3)              1.10(17)  .92(9)    .90(7)
"""

import sys
import time

from tests.theory.trained.digits_ensembles import DigitsForecast, slopes

DEFAULT = {128: 5088, 256: 928}
STEPS = (10, 30, 60)


def main(cases):
    begun = time.perf_counter()
    forecast = DigitsForecast(64, 8, STEPS, 4096)
    print(f"forecast: {time.perf_counter() - begun:.0f} s; standard error / rms of its entries")
    for name, errors in forecast.sampling_errors().items():
        print(f"  {name:16}" + "".join(f" {float(error):24.3f}" for error in errors))
    for n, pairs in cases.items():
        begun, spent = time.perf_counter(), time.process_time()
        found = slopes(forecast, n, pairs, 4096 // n, seed=n)
        took = f"{time.perf_counter() - begun:.0f} s, {time.process_time() - spent:.0f} s of CPU"
        print(f"n = {n}, {pairs} pairs ({took})" + "".join(f" {'t = ' + str(t):>24}" for t in STEPS))
        for name, values in found.items():
            cells = [f"{float(a):.3f} +- {float(e):.3f}, cos {float(c):.3f}" for a, e, c in zip(*values, strict=True)]
            print(f"  {name:16}" + "".join(f" {cell:>24}" for cell in cells), flush=True)


if __name__ == "__main__":
    main({int(n): int(pairs) for n, pairs in (given.split("=") for given in sys.argv[1:])} or DEFAULT)
