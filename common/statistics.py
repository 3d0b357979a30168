"""Is a measured difference one? A test is a dictionary: value, 95 % interval (low, high) and two-sided p.

`correct` adds p_holm, Holm's correction over all tests of a question.
"""

import math
import statistics

import numpy as np
from scipy import stats

LEVEL = 0.05  # of significance, after Holm's correction
PERMUTATIONS = 9999


def t_test(value: float, error: float, df: float) -> dict:
    """A measured difference with its 95 % interval and p of Student's t; no p where it has no spread."""
    value = float(value)
    if not error > 0:
        return dict(value=value, low=value, high=value, p=None)
    reach = float(error * stats.t.ppf(0.975, df))
    return dict(value=value, low=value - reach, high=value + reach, p=float(2 * stats.t.sf(abs(value / error), df)))


def paired(differences: np.ndarray) -> dict:
    """Paired t-test: is the mean of differences, one an image, zero?"""
    return t_test(differences.mean(), differences.std(ddof=1) / math.sqrt(len(differences)), len(differences) - 1)


def corrected_t_test(differences: list[float], test_to_train: float) -> dict:
    """Corrected resampled t-test: is the mean of paired differences over resamplings of one data set zero?

    Training sets of different folds overlap, so the variance of the mean is (1 / J + n_test / n_train) s^2 instead of
    s^2 / J, with J - 1 degrees of freedom. Source: Nadeau and Bengio, "Inference for the Generalization Error",
    Machine Learning 52 (2003), section 3.2.

    Args:
        differences: J of them, one a fold.
        test_to_train: n_test / n_train.

    Returns:
        value, low, high and p, as t_test; p is None with a single fold or without spread.
    """
    count = len(differences)
    spread = statistics.stdev(differences) if count > 1 else 0.0
    error = spread * math.sqrt(1 / count + test_to_train) if spread >= 1e-12 else 0.0
    return t_test(statistics.fmean(differences), error, count - 1)


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
    p = float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    low, high = float(100 * (middle - reach)), float(100 * (middle + reach))
    return dict(value=100 * (gained - lost) / count, low=low, high=high, p=p, lost=lost, gained=gained)


def class_test(values: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> dict:
    """Permutation test of the variance between classes: do classes differ in several measurements at once?

    The statistic is the share R^2 of the total sum of squares that lies between classes, which orders permutations as
    the pseudo-F of Anderson (Austral Ecology 26, 2001) does. `value` is R^2 less what unrelated labels would give
    (epsilon squared); 0 is none.

    Args:
        values: (N, Q), standardised.
        labels: (N,).
    """
    count, classes = len(labels), np.unique(labels)
    total = (values**2).sum()

    def between(order: np.ndarray) -> float:
        sums = members @ values[order]
        return float(((sums**2).sum(1) / members.sum(1)).sum())

    members = (labels == classes[:, None]).astype(float)  # (classes, N)
    observed = between(np.arange(count))
    exceeding = sum(between(rng.permutation(count)) >= observed - 1e-9 * total for _ in range(PERMUTATIONS))
    share = observed / total if total else 0.0
    effect = 1 - (1 - share) * (count - 1) / (count - len(classes))
    return dict(value=effect, share=share, p=(1 + exceeding) / (1 + PERMUTATIONS))


def standardised(values: np.ndarray) -> np.ndarray:
    """The columns of (N, Q) with mean 0 and standard deviation 1; a constant one with 0."""
    values = values.astype(float)
    spread = values.std(0)
    return (values - values.mean(0)) / np.where(spread > 1e-9, spread, np.inf)


def kruskal(values: np.ndarray, labels: np.ndarray) -> dict:
    """Kruskal-Wallis test: do classes differ in one measurement? The value is epsilon squared, as in class_test.

    Source: Tomczak and Tomczak, "The need to report effect size estimates revisited", Trends Sport Sci. 21 (2014),
    where (H - k + 1) / (n - k) is called eta squared.

    Args:
        values: (N,), not all equal.
        labels: (N,).
    """
    groups = [values[labels == label] for label in np.unique(labels)]
    statistic, p = stats.kruskal(*groups)
    return dict(value=float((statistic - len(groups) + 1) / (len(values) - len(groups))), p=float(p))


def holm(p_values: list[float | None]) -> list[float | None]:
    """Holm's step-down adjustment (1979), in the order given; None, where there was no test, stays None."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted, highest = [None] * len(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = highest
    return adjusted


def correct(tests: list[dict]) -> None:
    """Add p_holm to the tests of one question."""
    for test, p in zip(tests, holm([test['p'] for test in tests])):
        test['p_holm'] = p


def p_text(p: float | None) -> str:
    """A p value in three digits; '-' where there was no test."""
    if p is None:
        return '-'
    return '<0.001' if p < 0.001 else f'{p:.3f}'
