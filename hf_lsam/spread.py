"""What several figures come to, of runs over seeds for example: their mean, and how far they lie apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) of at least one number.

    The deviation is 0 for one number, otherwise NaN where not all are finite.
    """
    if len(values) == 1:
        return float(values[0]), 0.0
    if not all(map(math.isfinite, values)):  # stdev takes none of these, and fmean no two infinities
        return sum(values) / len(values), math.nan
    return fmean(values), stdev(values)
