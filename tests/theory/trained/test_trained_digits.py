"""The forecast of order 1/n against networks trained on digits: 32 images; 64 and more pairs in ``benchmarks``.

The slope of the measured correction on the predicted one is 1 + O(1/n): between 0.9 and 1.05 at n = 128, and closer to
1 than at n = 64; beside three standard errors, of the trained networks and of the forecast's sampled moments.
"""

import pytest
import torch

from tests.theory.trained.digits_ensembles import DigitsForecast, slopes

pytestmark = pytest.mark.slow


def test_corrections_on_digits():
    steps = (10, 30, 60)
    forecast = DigitsForecast(32, 8, steps, 4096)
    sampled = forecast.sampling_errors()
    narrow, wide = (slopes(forecast, n, pairs, 4096 // n, seed=n) for n, pairs in ((64, 1024), (128, 1024)))
    for name, (slope, error, cosine) in wide.items():
        before, its_error, _ = narrow[name]
        for index, step in enumerate(steps):
            one, other = float(slope[index]), float(before[index])
            of_one = float(torch.hypot(error[index], sampled[name][index]))
            of_both = float(torch.hypot(error[index], its_error[index]))  # of the same forecast
            sentence = f"{name}, t = {step}: {other:.3f} at n = 64, {one:.3f} +- {of_one:.3f} at n = 128"
            print(f"{sentence}, cosine {float(cosine[index]):.3f}")
            assert 0.9 - 3 * of_one < one < 1.05 + 3 * of_one, sentence
            assert abs(one - 1) < abs(other - 1) + 3 * of_both, sentence
