"""Is a measured difference one? A test is a dictionary: value, 95 % interval (low, high) and two-sided p.

`correct` adds p_holm, Holm's correction over all tests of a question.
"""

import math
import statistics

import numpy as np

LEVEL = 0.05  # of significance, after Holm's correction


def t_test(value: float, error: float, df: float) -> dict:
    """A measured difference with its 95 % interval and p of Student's t; no p where it has no spread."""
    value = float(value)
    if not error > 0:
        return dict(value=value, low=value, high=value, p=None)
    from scipy import stats  # slow to import, here and below

    reach = float(error * stats.t.ppf(0.975, df))
    return dict(value=value, low=value - reach, high=value + reach, p=float(2 * stats.t.sf(abs(value / error), df)))


def paired(differences: np.ndarray) -> dict:
    """Paired t-test: is the mean of differences, one per image, zero?"""
    return t_test(differences.mean(), differences.std(ddof=1) / math.sqrt(len(differences)), len(differences) - 1)


def corrected_t_test(differences: list[float], test_to_train: float) -> dict:
    """Corrected resampled t-test: is the mean of paired differences over resamplings of one data set zero?

    Training sets of different folds overlap, so the variance of the mean is (1 / J + n_test / n_train) s^2 instead of
    s^2 / J, with J - 1 degrees of freedom. Source: Nadeau and Bengio, "Inference for the Generalization Error",
    Machine Learning 52 (2003), section 3.2.

    Args:
        differences: J of them, one per fold; as in t_test, p is None with a single one or without spread.
        test_to_train: n_test / n_train.
    """
    count = len(differences)
    spread = statistics.stdev(differences) if count > 1 else 0.0
    error = spread * math.sqrt(1 / count + test_to_train) if spread >= 1e-12 else 0.0
    return t_test(statistics.fmean(differences), error, count - 1)


def detectable(test: dict, df: int, tests: int = 1, power: float = 0.8) -> float:
    """The true difference that would be found with this power at the strictest step of Holm's correction.

    Args:
        test: with low and high, as t_test; the spread is taken to be the one that was measured.
        df: its degrees of freedom.
        tests: how many there are of this question, so that p must be below LEVEL / tests.
    """
    from scipy import optimize, stats

    edge = stats.t.ppf(1 - LEVEL / tests / 2, df)

    def lacking(shift: float) -> float:  # in standard errors; findings of the wrong sign are too rare to count
        return power - stats.nct.sf(edge, df, shift)

    error = (test['high'] - test['low']) / (2 * stats.t.ppf(0.975, df))
    return float(error * optimize.brentq(lacking, edge / 2, 3 * edge))


def mcnemar(before: np.ndarray, after: np.ndarray) -> dict:
    """Change of accuracy on the same images, in points, with McNemar's exact p.

    The 95 % interval is that of Agresti and Min (Statistics in Medicine 24, 2005): half an image added to each of the
    four cells, so that it has a width where no image changed sides.

    Args:
        before, after: (N,) bool, which images are right.
    """
    from scipy import stats

    lost, gained, count = int((before & ~after).sum()), int((after & ~before).sum()), len(before)
    middle = (gained - lost) / (count + 2)
    reach = stats.norm.ppf(0.975) * math.sqrt((lost + gained + 1) / (count + 2) - middle**2) / math.sqrt(count + 2)
    p = float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    low, high = float(100 * (middle - reach)), float(100 * (middle + reach))
    return dict(value=100 * (gained - lost) / count, low=low, high=high, p=p, lost=lost, gained=gained)


def correct(tests: list[dict]) -> None:
    """Add p_holm, Holm's step-down adjustment (1979), to the tests of one question; None where there was no test."""
    tested = sorted((test for test in tests if test['p'] is not None), key=lambda test: test['p'])
    highest = 0.0
    for test in tests:
        test['p_holm'] = None
    for rank, test in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * test['p']))
        test['p_holm'] = highest


def p_text(p: float | None) -> str:
    """A p value in three digits; '-' where there was no test."""
    return '-' if p is None else '<0.001' if p < 0.001 else f'{p:.3f}'


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error in [0, 1]: how far the confidence of a prediction is from its accuracy, on average.

    Images fall into bins of equal width by the probability of the predicted class; the differences of mean confidence
    and accuracy are weighted by the images of a bin. Source: Guo, Pleiss, Sun and Weinberger, "On Calibration of
    Modern Neural Networks", ICML 2017, equation 3 (M = 15 in its tables).

    Args:
        confidence: (N,) in (0, 1]; NaN gives NaN.
        right: (N,) bool.
        bins: how many; each includes its upper edge.
    """
    if np.isnan(confidence).any():
        return float('nan')
    number = np.clip(np.ceil(confidence.astype(np.float64) * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(number, right - confidence.astype(np.float64), minlength=bins)  # n times the gap of each bin
    return float(np.abs(gaps).sum() / len(confidence))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """The temperature T at which softmax(logits / T) has the lowest cross-entropy: Guo et al., section 4.2.

    None where even T = 1000 is too low, as for a few images of which half are wrong: they tell nothing of certainty.
    Where all images are right, the lower T the better, down to certainty. Then one of n + 2 images counts as wrong,
    which is Laplace's rule of succession.

    Args:
        logits: (n, K) of images that did not train the model.
        labels: (n,) class indices.
    """
    from scipy import optimize, special

    (count, classes), logits = logits.shape, logits.astype(np.float64)
    targets = np.eye(classes)[labels]
    if (logits.argmax(1) == labels).all():
        wrong = 1 / (count + 2)
        targets = (1 - wrong) * targets + wrong / (classes - 1) * (1 - targets)

    def loss(log_t: float) -> float:  # convex in 1 / T: one minimum
        return -(targets * special.log_softmax(logits / np.exp(log_t), axis=1)).sum()

    temperature = float(np.exp(optimize.minimize_scalar(loss, bounds=(-7, 7), method='bounded').x))
    return temperature if temperature < 1000 else None


def calibrate(probabilities: np.ndarray, temperature: float | None) -> np.ndarray:
    """Probabilities (N, K) of a network at a temperature, float64; None leaves them as they are."""
    if temperature is None:
        return probabilities
    from scipy import special

    with np.errstate(divide='ignore'):  # one too small for float32 stays zero
        return special.softmax(np.log(probabilities.astype(np.float64)) / temperature, axis=1)
