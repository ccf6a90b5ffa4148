"""Mean and spread of several figures, for example of runs with different seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) of one or more numbers.

    The deviation is 0 for a single number, and NaN if several are not all finite.
    """
    if len(values) == 1:
        return float(values[0]), 0.0
    if not all(map(math.isfinite, values)):  # stdev accepts no such value, and fmean not both infinities
        return sum(values) / len(values), math.nan
    return fmean(values), stdev(values)
