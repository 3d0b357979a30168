"""Is a measured difference one? Tests as dictionaries: value, 95 % interval (low, high) and two-sided p.

correct adds p_holm, Holm's correction over all tests of a question; findings.py says in words what they found.
"""

import math
import statistics

import numpy as np
from scipy import stats


def a_test(value: float, error: float, df: float) -> dict:
    """A measured difference with its 95 % interval and p of Student's t; no p where it has no spread."""
    if not error > 0:
        return dict(value=float(value), low=float(value), high=float(value), p=None)
    reach = error * stats.t.ppf(0.975, df)
    return dict(
        value=float(value),
        low=float(value - reach),
        high=float(value + reach),
        p=float(2 * stats.t.sf(abs(value / error), df)),
    )


def correct(tests: list[dict]) -> None:
    """Add p_holm to the tests of one question."""
    for test, p in zip(tests, holm([math.nan if test['p'] is None else test['p'] for test in tests])):
        test['p_holm'] = None if math.isnan(p) else p


def paired(differences: np.ndarray) -> dict:
    """Is the mean of differences, one an image, zero? Paired t-test."""
    return a_test(differences.mean(), differences.std(ddof=1) / math.sqrt(len(differences)), len(differences) - 1)


def mcnemar(before: np.ndarray, after: np.ndarray) -> dict:
    """Change of accuracy on the same images, in points, with McNemar's exact p.

    The 95 % interval is that of Agresti and Min (Statistics in Medicine 24, 2005): half an image added to each of the
    four cells, so that it has a width where no image changed sides.

    Args:
        before, after: (N,) bool, which images are right.
    """
    lost, gained, count = int((before & ~after).sum()), int((after & ~before).sum()), len(before)
    middle = (gained - lost) / (count + 2)
    reach = stats.norm.ppf(0.975) * math.sqrt((lost + gained + 1) / (count + 2) - middle**2) / math.sqrt(count + 2)
    p = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    return dict(
        value=100 * (gained - lost) / count,
        low=float(100 * (middle - reach)),
        high=float(100 * (middle + reach)),
        p=float(p),
        lost=lost,
        gained=gained,
    )


LEVEL = 0.05  # of significance, after Holm's correction


def corrected_t_test(differences: list[float], test_to_train: float) -> tuple[float, float, float, float]:
    """Corrected resampled t-test: is the mean of paired differences over resamplings of one data set zero?

    Training sets of different folds overlap, so the variance of the mean is (1 / J + n_test / n_train) s^2 instead of
    s^2 / J, with J - 1 degrees of freedom. Source: Nadeau and Bengio, "Inference for the Generalization Error",
    Machine Learning 52 (2003), section 3.2.

    Args:
        differences: J of them, one a fold.
        test_to_train: n_test / n_train.

    Returns:
        mean, lower and upper end of its 95 % interval, two-sided p. Without spread or with a single fold there is no
        test: the last three are NaN.
    """
    count, mean = len(differences), statistics.fmean(differences)
    spread = statistics.stdev(differences) if count > 1 else 0.0
    if spread < 1e-12:
        return mean, math.nan, math.nan, math.nan
    error = spread * math.sqrt(1 / count + test_to_train)
    reach = error * stats.t.ppf(0.975, count - 1)
    return mean, mean - reach, mean + reach, float(2 * stats.t.sf(abs(mean / error), count - 1))


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjustment (1979), in the order given; NaN, where there was no test, stays NaN."""
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = highest
    return adjusted


def p_text(p: float) -> str:
    if math.isnan(p):
        return '-'
    return '<0.001' if p < 0.001 else f'{p:.3f}'
