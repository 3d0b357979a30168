"""Mutual information of the channels of a head, in one place, a step away and elsewhere in an image.

    z                                                    # (N images, heads, c_red, H, W): channels before the L2 norm
    information_of(z, bias_at_independence(len(z), rng), rng)['shared'][DIFFERENT]['45°']   # a test, see statistics

Takes arrays and returns the tests of one block; questions.py chooses images and network.
"""

import math

import numpy as np
from scipy import stats
from scipy.spatial import KDTree
from scipy.special import digamma

from common.statistics import t_test
from models import DIRECTIONS

STEPS = ('0°', '45°', '90°', '135°')  # conditions: one step along each of models.DIRECTIONS
IN_PLACE = 'in place'
PAIRS = DIFFERENT, SAME = 'different channels', 'the same channel'  # pairs whose information is measured
NEIGHBOURS = 3  # of the estimator of mutual information
DRAWS = 2  # positions an image, each in a sample of its own, as positions of one image are dependent
HALVES = 20  # random halves of the images, for the standard error of mutual information


def normal_scores(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ranks along the first axis as quantiles of the normal distribution; ties are ranked at random.

    Neither step changes mutual information: the noise that orders ties is independent of everything else (the
    distributional transform), and the rest is monotone. An estimator that needs continuous variables can therefore be
    applied to the output of a ReLU, with its many zeros.
    """
    order = np.lexsort((rng.random(values.shape), values), axis=0)
    return stats.norm.ppf((order.argsort(axis=0) + 0.5) / len(values))


def mutual_information(x: np.ndarray, y: np.ndarray, k: int = NEIGHBOURS) -> float:
    """Mutual information of two continuous variables (N,) without ties, in nats: the first estimator of Kraskov et al.

    Uses distances to k-th neighbours, so that the biases of the entropies cancel. For independent variables the
    estimate is close to zero and may be negative (scikit-learn's mutual_info_regression clips it at zero, so that its
    mean is biased). Source: Kraskov, Stögbauer and Grassberger, "Estimating mutual information", Phys. Rev. E 69
    (2004), eq. 8.
    """
    points = np.stack([x, y], 1)
    radius = KDTree(points).query(points, k=[k + 1], p=np.inf)[0][:, 0]

    def within(values: np.ndarray) -> np.ndarray:  # number of others nearer than the radius
        ordered = np.sort(values)
        # The radius is a difference of two of the values: slightly less, so that rounding does not count its end.
        reach = radius * (1 - 1e-12)
        return np.searchsorted(ordered, values + reach) - np.searchsorted(ordered, values - reach) - 1

    return float(digamma(k) + digamma(len(x)) - (digamma(within(x) + 1) + digamma(within(y) + 1)).mean())


def bias_at_independence(count: int, rng: np.random.Generator, repeats: int = 1000) -> float:
    """Mean of mutual_information for independent variables: for normal scores a function of N alone."""
    scores = stats.norm.ppf((np.arange(count) + 0.5) / count)
    return float(np.mean([mutual_information(scores, rng.permutation(scores)) for _ in range(repeats)]))


def places(condition: str, height: int, width: int) -> np.ndarray:
    """Pairs of positions (p, q) in a map, as flat indices: (M, 2); none where the map is too small."""
    y, x = (axis.ravel() for axis in np.mgrid[:height, :width])
    dy, dx = y - y[:, None], x - x[:, None]  # (p, q)
    if condition in STEPS:
        step = DIRECTIONS[STEPS.index(condition)]
        return np.argwhere((dy == step[0]) & (dx == step[1]))
    if condition == 'elsewhere':
        return np.argwhere(np.maximum(abs(dy), abs(dx)) >= 2)
    # In place; and the same place of another image, which shows the effect of borders and position alone.
    return np.argwhere((dy == 0) & (dx == 0))


def block_information(z: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Mean mutual information of channel pairs i <= j of a head, z_i at p and z_j at q, one (p, q) per image.

    z is (N, heads, c_red, H, W). By condition (heads, 2, 1 + HALVES): pairs of different channels and of a channel with
    itself; of all images, then of random halves. NaN for a channel with itself in one place.
    """
    count, heads, c_red, height, width = z.shape
    flat, rows = z.reshape(count, heads, c_red, -1), np.arange(count)
    subsets = [rows, *(np.sort(rng.permutation(count)[: count // 2]) for _ in range(HALVES))]
    different, same = list(zip(*np.triu_indices(c_red, 1))), [(i, i) for i in range(c_red)]  # in the order of PAIRS
    found = {}
    for condition in (IN_PLACE, *STEPS, 'elsewhere', 'other image'):
        pairs = places(condition, height, width)
        if not len(pairs):
            continue
        kinds = different, [] if condition == IN_PLACE else same
        total = np.zeros((heads, 2, 1 + HALVES))
        for _ in range(DRAWS):
            p, q = pairs[rng.integers(len(pairs), size=count)].T
            partner = np.roll(rows, 1) if condition == 'other image' else rows
            x = normal_scores(flat[rows, :, :, p], rng)  # (N, heads, c_red)
            y = normal_scores(flat[partner, :, :, q], rng)
            for head, which in np.ndindex(heads, 2):
                total[head, which] += [pair_mean(x[s, head], y[s, head], kinds[which]) for s in subsets]
        found[condition] = total / DRAWS
    return found


def pair_mean(x: np.ndarray, y: np.ndarray, pairs: list[tuple[int, int]]) -> float:
    return float(np.mean([mutual_information(x[:, i], y[:, j]) for i, j in pairs])) if pairs else math.nan


def by_halves(values: np.ndarray, null: float = 0.0) -> dict:
    """Test whether a statistic equals `null`, from its values over all images and over random halves: (1 + HALVES,).

    The estimates of halves scatter about that of all images as the latter does about the truth (delete-d jackknife with
    d = N / 2: Shao and Wu, Annals of Statistics 17, 1989). Neighbour distances of an image depend on the other images,
    so that a t-test over images would be anticonservative; a delete-one jackknife needs a smoother statistic.
    """
    return t_test(values[0] - null, values[1:].std(ddof=1), HALVES - 1)


def information_of(z: np.ndarray, bias: float, rng: np.random.Generator, directional: bool = True) -> dict:
    """The tests of one block, before Holm's correction, from z of all images: (N, heads, c_red, H, W).

    By kind of pair, `shared` has a test against independence for each condition, `local` compares a step away with
    elsewhere in the image, and `own` a head's direction with the one at right angles, whose step has the same length.
    Conditions that need a larger map are left out, and so is `own` without directional twists.
    """
    heads, c_red = z.shape[1:3]
    found = block_information(z, rng)
    mean = {condition: values.mean(0) for condition, values in found.items()}  # (2, 1 + HALVES)
    steps = [condition for condition in STEPS if condition in found]
    shared, local, own = {}, {}, {}
    for which, kind in list(enumerate(PAIRS))[c_red == 1 :]:  # a single channel has no other
        shared[kind] = {c: by_halves(mean[c][which], bias) for c in mean if (kind, c) != (SAME, IN_PLACE)}
        if steps and 'elsewhere' in found:
            local[kind] = by_halves(np.mean([mean[c][which] for c in steps], 0) - mean['elsewhere'][which])
        if len(steps) == len(STEPS):
            across = [*STEPS[2:], *STEPS[:2]]
            gains = [found[STEPS[h]][h, which] - found[across[h]][h, which] for h in range(heads)]
            own[kind] = by_halves(np.mean(gains, 0))
    result = dict(map=list(z.shape[3:]), zeros=float((z == 0).mean()), shared=shared, local=local)
    return result | dict(own=own) if directional else result
