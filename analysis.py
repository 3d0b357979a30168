"""What a trained TwistNet makes of channels and directions: numbers, tests and figures that can say no.

    python analysis.py --checkpoint runs/dtd_fold1_twistnet18_seed42/best.pt --save_dir analysis
    python analysis.py --checkpoint best.pt --data_dir data/dtd --dataset dtd --fold 1 --question spiral

information  how much the channels of a head share, in one place, a step away and elsewhere in an image
features     a linear probe on the head's displaced products, the Gram matrix and bilinear pooling
directions   do classes differ in the directions they respond to
spiral       the same weights without twists, with heads permuted, on turned images
gates        where the gates end, and what closing them costs

Data set, fold and folder are those of the run (config.json beside the checkpoint) unless given. Only images that did
not train are read: spiral and gates take the test set, the others validation and test together. save_dir gets
report.md, whose sentences are made from report.json, and a figure a question; the same seed gives the same bytes.
p values are two-sided and Holm-corrected over all tests of a question.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.spatial import KDTree
from scipy.special import digamma
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import RepeatedStratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.random_projection import SparseRandomProjection
from torch import nn

import inside
import runs
import train
from datasets import DataError, ImageList, load_splits
from drawing import COLORS, PAGE, Figure, Line2D, frame, plt, save
from inside import Block, Subject
from models import DIRECTIONS, ModelError, TwistNet
from plot_results import initial_gate
from runs import RunError
from summarize_runs import LEVEL, corrected_t_test, holm, p_text
from transforms import eval_transform, normalize

ANGLES = ('0°', '45°', '90°', '135°')  # of models.DIRECTIONS
IN_PLACE = 'in place'
PAIRS = DIFFERENT, SAME = 'different channels', 'the same channel'  # whose information is measured
NEIGHBOURS = 3  # of the estimator of mutual information
MAX_IMAGES = 256  # for mutual information, whose time grows with the square
MIN_IMAGES = 40
DRAWS = 2  # positions an image, each a sample of its own: positions of one image depend on each other
HALVES = 20  # random halves of the images, for the standard error of mutual information
DIMENSION = 64  # of every kind of feature under the probe
SKETCH = 1024  # dimension to which longer features are projected at random before that
FOLDS, REPEATS = 5, 2  # of the probe's cross-validation
PERMUTATIONS = 9999
MAX_ROWS = 50  # classes in a figure


class Held(NamedTuple):
    """The images of a fold that did not train, the test set first."""

    images: torch.Tensor  # (N, 3, img_size, img_size) uint8
    labels: np.ndarray  # (N,), class indices
    n_test: int

    @property
    def test(self) -> 'Held':
        return Held(self.images[: self.n_test], self.labels[: self.n_test], self.n_test)


# ---------------------------------------------------------------------------------------------- reading


def settings_of(args: argparse.Namespace) -> dict:
    """dataset, data_dir and fold from the options or else from the run, and `defines` of the run's config.json.

    Raises:
        RunError: neither says it, or the fold is not the one whose images the checkpoint has not seen.
    """
    config = runs.read_json(args.checkpoint.parent / 'config.json') or {}
    made = config.get('options', {})
    given = {key: getattr(args, key) for key in ('dataset', 'data_dir', 'fold')}
    same = given['dataset'] in (None, made.get('dataset'))
    found = {key: made.get(key) if value is None and same else value for key, value in given.items()}
    if missing := [key for key in ('dataset', 'fold') if found[key] is None]:
        raise RunError(f'{args.checkpoint}: no config.json beside it says the {missing[0]}; give --{missing[0]}')
    if made and same and found['fold'] != made['fold']:
        raise RunError(
            f'--fold {found["fold"]}: {args.checkpoint} was trained on fold {made["fold"]}, so images of another fold '
            'may have trained it'
        )
    return found | dict(defines=config.get('defines', {}))


def read_images(subject: Subject, settings: dict, with_val: bool) -> Held:
    """The test images of the fold, and those of validation behind them.

    Raises:
        RunError: the data set has other classes, or with_val and a class has a single image.
        DataError: the data set or an image cannot be read.
    """
    splits = load_splits(settings['dataset'], settings['data_dir'], settings['fold'])
    if splits.classes != subject.classes:
        raise RunError(
            f'{subject.path}: was trained on the {len(subject.classes)} classes {subject.classes[0]}, .., '
            f'{subject.classes[-1]}; the data set has {len(splits.classes)}: {splits.classes[0]}, .., '
            f'{splits.classes[-1]}'
        )
    items = splits.test + (splits.val if with_val else [])
    labels = np.array([label for _, label in items])
    counts = np.bincount(labels, minlength=len(splits.classes))
    if with_val and counts.min() < 2:
        name, has = splits.classes[counts.argmin()], ('no image', 'one image')[counts.min()]
        raise RunError(
            f"class '{name}' has {has} in validation and test together, and comparing classes takes two of each; "
            'add images, or ask --question spiral or gates'
        )
    data = ImageList(items, eval_transform(subject.img_size))
    return Held(torch.stack([data[i][0] for i in range(len(data))]), labels, len(splits.test))


def batches(model: TwistNet, images: torch.Tensor) -> Iterator[torch.Tensor]:
    device = next(model.parameters()).device
    for batch in images.split(train.EVAL_BATCH):
        yield normalize(batch.to(device))


def collect(subject: Subject, images: torch.Tensor, take: Callable[[str, Block], dict]) -> dict[str, dict]:
    """take(name, block) of every TwistBlock, a dictionary of tensors (B, ..), over all images: arrays by block."""
    parts: dict[str, list[dict]] = {}
    for batch in batches(subject.model, images):
        for name, block in inside.observe(subject.model, batch).blocks.items():
            parts.setdefault(name, []).append({key: value.cpu().numpy() for key, value in take(name, block).items()})
    return {name: {key: np.concatenate([p[key] for p in found]) for key in found[0]} for name, found in parts.items()}


# ---------------------------------------------------------------------------------------------- tests


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


def shown(test: dict) -> bool:
    return test['p_holm'] is not None and test['p_holm'] < LEVEL


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


# ---------------------------------------------------------------------------------------------- information


def normal_scores(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ranks as quantiles of the normal distribution, along the first axis; equal values are ranked at random.

    Neither step changes mutual information: the noise that orders equal values is independent of all else (the
    distributional transform), and the rest is monotone. So the zeros of a ReLU, which have a probability of their own,
    do no harm to an estimator that needs continuous variables.
    """
    order = np.lexsort((rng.random(values.shape), values), axis=0)
    return stats.norm.ppf((order.argsort(axis=0) + 0.5) / len(values))


def mutual_information(x: np.ndarray, y: np.ndarray, k: int = NEIGHBOURS) -> float:
    """Mutual information of two continuous variables in nats: the first estimator of Kraskov et al.

    Distances to k-th neighbours, in which the biases of the entropies cancel; what it gives for independent variables
    is close to zero and may be negative (scikit-learn's mutual_info_regression cuts it off at zero, and then its mean
    is not). Source: Kraskov, Stögbauer and Grassberger, "Estimating mutual information", Phys. Rev. E 69 (2004), eq. 8.

    Args:
        x, y: (N,) without ties.
    """
    points = np.stack([x, y], 1)
    radius = KDTree(points).query(points, k=[k + 1], p=np.inf)[0][:, 0]

    def within(values: np.ndarray) -> np.ndarray:  # how many others are nearer than the radius
        ordered = np.sort(values)
        # The radius is a difference of the values themselves: a hair less keeps rounding from counting its end.
        reach = radius * (1 - 1e-12)
        return np.searchsorted(ordered, values + reach) - np.searchsorted(ordered, values - reach) - 1

    return float(digamma(k) + digamma(len(x)) - (digamma(within(x) + 1) + digamma(within(y) + 1)).mean())


def bias_at_independence(count: int, rng: np.random.Generator, repeats: int = 1000) -> float:
    """What mutual_information gives on average for independent variables: for normal scores a function of N alone."""
    scores = stats.norm.ppf((np.arange(count) + 0.5) / count)
    return float(np.mean([mutual_information(scores, rng.permutation(scores)) for _ in range(repeats)]))


def places(condition: str, height: int, width: int) -> np.ndarray:
    """Pairs of positions (p, q) in a map, as flat indices: (M, 2); none where the map is too small."""
    y, x = (axis.ravel() for axis in np.mgrid[:height, :width])
    dy, dx = y - y[:, None], x - x[:, None]  # (p, q)
    if condition in ANGLES:
        step = DIRECTIONS[ANGLES.index(condition)]
        return np.argwhere((dy == step[0]) & (dx == step[1]))
    if condition == 'elsewhere':
        return np.argwhere(np.maximum(abs(dy), abs(dx)) >= 2)
    # In place. The same place of another image shows what borders and position do alone.
    return np.argwhere((dy == 0) & (dx == 0))


def block_information(z: np.ndarray, rng: np.random.Generator) -> dict[tuple[str, int], np.ndarray]:
    """Mean mutual information of channel pairs i <= j of a head, z_i at p and z_j at q, each image giving one (p, q).

    Args:
        z: (N, heads, c_red, H, W).

    Returns:
        by condition and head (2, 1 + HALVES): pairs of different channels and of a channel with itself; of all images,
        then of random halves. In one place a channel shares with itself all it has: NaN.
    """
    count, heads, c_red, height, width = z.shape
    flat, rows = z.reshape(count, heads, c_red, -1), np.arange(count)
    subsets = [rows, *(np.sort(rng.permutation(count)[: count // 2]) for _ in range(HALVES))]
    different, same = list(zip(*np.triu_indices(c_red, 1))), [(i, i) for i in range(c_red)]  # in the order of PAIRS
    found = {}
    for condition in (IN_PLACE, *ANGLES, 'elsewhere', 'other image'):
        pairs = places(condition, height, width)
        if not len(pairs):
            continue
        total = np.zeros((heads, 2, 1 + HALVES))
        for _ in range(DRAWS):
            p, q = pairs[rng.integers(len(pairs), size=count)].T
            partner = np.roll(rows, 1) if condition == 'other image' else rows
            x = normal_scores(flat[rows, :, :, p], rng)  # (N, heads, c_red)
            y = normal_scores(flat[partner, :, :, q], rng)
            for head in range(heads):
                total[head, 0] += [pair_mean(x[s, head], y[s, head], different) for s in subsets]
                if condition != IN_PLACE:
                    total[head, 1] += [pair_mean(x[s, head], y[s, head], same) for s in subsets]
        if condition == IN_PLACE:
            total[:, 1] = math.nan
        found |= {(condition, head): total[head] / DRAWS for head in range(heads)}
    return found


def pair_mean(x: np.ndarray, y: np.ndarray, pairs: list[tuple[int, int]]) -> float:
    return float(np.mean([mutual_information(x[:, i], y[:, j]) for i, j in pairs])) if pairs else math.nan


def by_halves(values: np.ndarray, null: float = 0.0) -> dict:
    """Is a statistic equal to `null`? (1 + HALVES,): of all images, then of random halves of them.

    The estimates of halves scatter about that of all images as that one does about the truth (delete-d jackknife with
    d = N / 2: Shao and Wu, Annals of Statistics 17, 1989). Neighbour distances of an image depend on the other images,
    so a t-test over images would be too bold; a delete-one jackknife needs a smoother statistic.
    """
    return a_test(values[0] - null, values[1:].std(ddof=1), HALVES - 1)


def measure_information(subject: Subject, held: Held, settings: dict) -> dict:
    rng = np.random.default_rng([settings['seed'], 1])
    chosen = rng.permutation(len(held.images))[:MAX_IMAGES]
    if len(chosen) < MIN_IMAGES:
        raise RunError(f'{len(chosen)} images are too few for mutual information; it takes at least {MIN_IMAGES}')
    modules = inside.blocks_of(subject.model)

    def take(name: str, block: Block) -> dict:  # before the L2 norm, which ties the channels of a head
        stci = modules[name].stci
        with torch.inference_mode():
            return dict(z=F.relu(stci.reduce(block.h)).unflatten(1, (stci.num_heads, stci.c_red)))

    blocks, bias = {}, bias_at_independence(len(chosen), rng)
    for name, arrays in collect(subject, held.images[chosen], take).items():
        print(f'information: {name}', file=sys.stderr)
        blocks[name] = information_of(arrays['z'], bias, rng)
    shared = [test for block in blocks.values() for kind in block['shared'].values() for test in kind.values()]
    correct(shared + [test for block in blocks.values() for key in ('local', 'own') for test in block[key].values()])
    return dict(images=len(chosen), draws=DRAWS, neighbours=NEIGHBOURS, bias=bias, blocks=blocks)


def information_of(z: np.ndarray, bias: float, rng: np.random.Generator) -> dict:
    """The answers for one block, before Holm's correction, from z of all images: (N, heads, c_red, H, W).

    By kind of pair, `shared` has a test against independence for each condition, `local` compares a step away with
    elsewhere in the image, and `own` a head's direction with the other three. What the map is too small for is left
    out.
    """
    heads, c_red = z.shape[1:3]
    found = block_information(z, rng)
    conditions = list(dict.fromkeys(condition for condition, _ in found))
    mean = {c: np.mean([found[c, head] for head in range(heads)], 0) for c in conditions}  # (2, 1 + HALVES)
    steps = [c for c in ANGLES if c in conditions]
    shared, local, own = {}, {}, {}
    for which, kind in list(enumerate(PAIRS))[c_red == 1 :]:  # a single channel has no other
        shared[kind] = {c: by_halves(mean[c][which], bias) for c in conditions if (kind, c) != (SAME, IN_PLACE)}
        if steps and 'elsewhere' in conditions:
            local[kind] = by_halves(np.mean([mean[c][which] for c in steps], 0) - mean['elsewhere'][which])
        if len(steps) == len(ANGLES):
            others = [np.mean([found[c, h][which] for c in steps if c != ANGLES[h]], 0) for h in range(heads)]
            own[kind] = by_halves(np.mean([found[ANGLES[h], h][which] - others[h] for h in range(heads)], 0))
    return dict(map=list(z.shape[3:]), zeros=float((z == 0).mean()), shared=shared, local=local, own=own)


# ---------------------------------------------------------------------------------------------- features

DISPLACED = 'displaced products'
KINDS = (DISPLACED, 'products in place', 'Gram matrix', 'bilinear pooling', 'mean of h')


def features_of(block: Block) -> dict[str, torch.Tensor]:
    """One vector an image of each kind: (B, dimension of the kind).

    'displaced products' are the means over positions of z_i(p) t_j(p), 'products in place' of z_i(p) z_j(p), both
    within a head; 'Gram matrix' those of h_i(p) h_j(p) over all channels that the branch reads; 'bilinear pooling'
    their signed square roots, L2-normalised (Lin, RoyChowdhury and Maji, ICCV 2015).
    """
    z = block.interactions[:, :, : block.c_red].flatten(3)  # (B, heads, c_red, HW)
    upper = torch.triu_indices(block.c_red, block.c_red)
    in_place = (z @ z.transpose(2, 3) / z.shape[3])[:, :, upper[0], upper[1]]
    h = block.h.flatten(2)  # (B, C, HW)
    upper = torch.triu_indices(h.shape[1], h.shape[1], device=h.device)
    gram = (h @ h.transpose(1, 2) / h.shape[2])[:, upper[0], upper[1]]
    return {
        DISPLACED: block.interactions[:, :, block.c_red :].mean((3, 4)).flatten(1),
        'products in place': in_place.flatten(1),
        'Gram matrix': gram,
        'bilinear pooling': F.normalize(gram.sign() * gram.abs().sqrt()),
        'mean of h': h.mean(2),
    }


def sketched(features: torch.Tensor, seed: int, cache: dict) -> torch.Tensor:
    """Long features through a sparse random projection to SKETCH dimensions, which depends on seed and length alone."""
    length = features.shape[1]
    if length <= SKETCH:
        return features
    if length not in cache:
        projection = SparseRandomProjection(SKETCH, random_state=seed, dense_output=True)
        cache[length] = projection.fit(np.zeros((1, length), np.float32))
    return torch.from_numpy(cache[length].transform(features.cpu().numpy()).astype(np.float32))


def probe(features: np.ndarray, labels: np.ndarray, dimension: int, folds: int, seed: int) -> list[float]:
    """Accuracies in % of a linear probe, one a fold and repeat of stratified cross-validation, the same for all kinds.

    Scaling, PCA to `dimension` and the ridge penalty are all fitted to the training part of each fold.
    """
    accuracies = []
    for fit, test in RepeatedStratifiedKFold(n_splits=folds, n_repeats=REPEATS, random_state=seed).split(
        features, labels
    ):
        model = make_pipeline(
            StandardScaler(), PCA(dimension, random_state=seed), RidgeClassifierCV(np.logspace(-2, 5, 15))
        )
        accuracies.append(100 * model.fit(features[fit], labels[fit]).score(features[test], labels[test]))
    return accuracies


def measure_features(subject: Subject, held: Held, settings: dict) -> dict:
    seed, stci = settings['seed'], next(iter(inside.blocks_of(subject.model).values())).stci
    if not stci.use_products:
        raise RunError(f'{subject.name} has no products to compare')
    kinds = KINDS if not isinstance(stci.twist, nn.Identity) else tuple(k for k in KINDS if k != 'products in place')
    cache: dict = {}

    def take(_: str, block: Block) -> dict:
        return {kind: sketched(features, seed, cache) for kind, features in features_of(block).items()}

    folds = min(FOLDS, int(np.bincount(held.labels).min()))
    arrays = collect(subject, held.images, take)
    shortest = min(array.shape[1] for kept in arrays.values() for array in kept.values())
    dimension = min(DIMENSION, shortest, len(held.labels) - math.ceil(len(held.labels) / folds) - 1)
    blocks, tests = {}, []
    for name, kept in arrays.items():
        print(f'features: {name}', file=sys.stderr)
        accuracies = {kind: probe(kept[kind], held.labels, dimension, folds, seed) for kind in kinds}
        against = {}
        for kind in kinds[1:]:
            differences = np.subtract(accuracies[DISPLACED], accuracies[kind]).tolist()
            value, low, high, p = corrected_t_test(differences, 1 / (folds - 1))
            spread = dict(low=low, high=high, p=p) if not math.isnan(p) else dict(low=value, high=value, p=None)
            against[kind] = dict(value=value) | spread
        tests += against.values()
        blocks[name] = dict(accuracies=accuracies, against=against)
    correct(tests)
    chance = 100 * float(np.bincount(held.labels).max()) / len(held.labels)
    return dict(
        images=len(held.labels), folds=folds, repeats=REPEATS, dimension=dimension, chance=chance, blocks=blocks
    )


# ---------------------------------------------------------------------------------------------- directions


def class_test(values: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> dict:
    """Do classes differ in several measurements at once? Permutation test of the variance between classes.

    The statistic is the share R^2 of the total sum of squares that lies between classes, which orders permutations as
    the pseudo-F of Anderson (Austral Ecology 26, 2001) does. `effect` is R^2 less what unrelated labels would give
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
    values = values.astype(float)
    spread = values.std(0)
    return (values - values.mean(0)) / np.where(spread > 1e-9, spread, np.inf)


def displaced_cosines(z: torch.Tensor) -> torch.Tensor:
    """Mean cosine of z(p) and z(p + d) over heads and positions, for each d: (B, heads, c_red, H, W) -> (B, 4)."""
    _, _, _, height, width = z.shape
    flat = z.flatten(3)
    cosines = []
    for condition in ANGLES:
        p, q = places(condition, height, width).T
        cosines.append((flat[..., p] * flat[..., q]).sum(2).mean((1, 2)))
    return torch.stack(cosines, 1)


def measure_directions(subject: Subject, held: Held, settings: dict) -> dict:
    stci = next(iter(inside.blocks_of(subject.model).values())).stci
    if not stci.use_products or isinstance(stci.twist, nn.Identity) or stci.num_heads < 2:
        raise RunError(f'{subject.name} has no two heads with directions to compare')
    rng = np.random.default_rng([settings['seed'], 3])

    def take(_: str, block: Block) -> dict:
        if min(block.h.shape[2:]) < 2:  # no cell has a neighbour in every direction
            return {}
        return dict(heads=block.mean_response, steps=displaced_cosines(block.interactions[:, :, : block.c_red]))

    arrays = {name: kept for name, kept in collect(subject, held.images, take).items() if kept}
    if not arrays:
        raise RunError(f'no block of {subject.name} has a map of 2 x 2 or more at {subject.img_size} px')
    result: dict = dict(images=len(held.labels), permutations=PERMUTATIONS, classes=subject.classes)
    tests = []
    for view in ('heads', 'steps'):
        # Against the mean over directions: some textures repeat more than others whichever way one looks.
        kept = {n: a[view] - a[view].mean(1, keepdims=True) for n, a in arrays.items()}
        values = standardised(np.concatenate(list(kept.values()), 1))
        names = [f'{name} {ANGLES[i]}' for name, array in kept.items() for i in range(array.shape[1])]
        overall, single = class_test(values, held.labels, rng), {}
        for column, name in zip(values.T, names):
            groups = [column[held.labels == label] for label in np.unique(held.labels)]
            if np.ptp(column) > 0:
                statistic, p = stats.kruskal(*groups)
                single[name] = dict(value=float(statistic / (len(column) - 1)), p=float(p))  # epsilon squared
        tests += [overall, *single.values()]
        profile = [values[held.labels == label].mean(0).tolist() for label in range(len(subject.classes))]
        result[view] = dict(overall=overall, single=single, names=names, profile=profile)
    correct(tests)
    return result


# ---------------------------------------------------------------------------------------------- spiral and gates


@torch.inference_mode()
def outcome(model: TwistNet, held: Held, turns: int = 0) -> dict[str, np.ndarray]:
    """What a model says of each image: whether it is right, the cross-entropy in nats, the class.

    Args:
        turns: quarter turns of the images.
    """
    logits = [model(batch.rot90(turns, (2, 3))).double().cpu() for batch in batches(model, held.images)]
    log_p = F.log_softmax(torch.cat(logits), 1).numpy()
    guess = log_p.argmax(1)
    return dict(right=guess == held.labels, loss=-log_p[np.arange(len(guess)), held.labels], guess=guess)


def compare(before: dict, after: dict) -> dict:
    """The same images before and after a change: accuracy, loss and how many answers are other ones."""
    return dict(
        accuracy=float(100 * after['right'].mean()),
        accuracy_change=mcnemar(before['right'], after['right']),
        loss_change=paired(after['loss'] - before['loss']),
        other_answers=float(100 * (after['guess'] != before['guess']).mean()),
    )


def compare_all(model: TwistNet, held: Held, changed: dict[str, tuple[TwistNet, int]]) -> dict:
    """The test set as it is and under each change: (model, quarter turns) by name."""
    before = outcome(model, held)
    changes = {name: compare(before, outcome(other, held, turns)) for name, (other, turns) in changed.items()}
    tests = [change[key] for change in changes.values() for key in ('accuracy_change', 'loss_change')]
    correct(tests)
    # The fewest images, all lost or all gained, that the exact test could tell from chance under this correction.
    least = next(n for n in range(1, 200) if len(tests) * 2 * 0.5**n < LEVEL)
    accuracy, loss = float(100 * before['right'].mean()), float(before['loss'].mean())
    return dict(images=len(held.labels), accuracy=accuracy, loss=loss, tests=len(tests), least=least, changes=changes)


def edited(model: TwistNet, edit: Callable[[str, nn.Module], None], only: str | None = None) -> TwistNet:
    """A copy of a model with edit(name, block) done to every TwistBlock, or to one."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, block in inside.blocks_of(model).items():
            if only in (None, name):
                edit(name, block)
    return model


def without_twist(_: str, block: nn.Module) -> None:
    """t = z, as in the variant no_spiral."""
    block.stci.twist = nn.Identity()


def rolled_heads(by: int) -> Callable[[str, nn.Module], None]:
    """Head k gets the twist, kernels and scale, of head k - by."""

    def edit(_: str, block: nn.Module) -> None:
        twist = block.stci.twist
        twist.dwconv.weight.copy_(twist.dwconv.weight.roll(by * twist.c_red, 0))
        twist.scale.copy_(twist.scale.roll(by * twist.c_red, 1))

    return edit


def closed(_: str, block: nn.Module) -> None:
    block.gate.fill_(-math.inf)


def measure_spiral(subject: Subject, held: Held, settings: dict) -> dict:
    model, stci = subject.model, next(iter(inside.blocks_of(subject.model).values())).stci
    if isinstance(stci.twist, nn.Identity):
        raise RunError(f'{subject.name} has no twists to take away')
    changed = {'twists replaced by identity': (edited(model, without_twist), 0)}
    for by in range(1, stci.num_heads):
        changed[f'heads permuted by {by}'] = edited(model, rolled_heads(by)), 0
    return compare_all(model, held.test, changed | {'images rotated by 90°': (model, 1)})


def measure_gates(subject: Subject, held: Held, settings: dict) -> dict:
    names, test = list(inside.blocks_of(subject.model)), held.test
    changed = {f'{name} closed': (edited(subject.model, closed, name), 0) for name in names}
    if len(names) > 1:
        changed['all closed'] = edited(subject.model, closed), 0

    def take(_: str, block: Block) -> dict:  # mean squares an image of what the gate lets through and of the output
        added = block.gate * block.branch
        return dict(added=added.square().mean((1, 2, 3)), out=block.out.square().mean((1, 2, 3)))

    squares = collect(subject, test.images, take)
    defines, gates = settings['defines'], subject.model.gates()
    blocks = {
        name: dict(gate=gates[name], share=math.sqrt(squares[name]['added'].mean() / squares[name]['out'].mean()))
        for name in names
    }
    start = initial_gate(subject.name, defines) if defines else None
    return dict(start=start, blocks=blocks) | compare_all(subject.model, test, changed)


# ---------------------------------------------------------------------------------------------- words


NATS, POINTS = '{:+.3f} nats', '{:+.1f} points'
Told = tuple[list[str], list[str]]  # sentences, and the tables behind them


def p_words(p: float | None) -> str:
    if p is None:
        return 'no test, for want of spread'
    text = p_text(p)
    return f'p < {text[1:]}' if text[0] == '<' else f'p = {text}'


def outcomes(tests: dict[str, dict], above: str, below: str, form: str, none: str = 'no difference was shown') -> str:
    """What a set of tests found: 'above in 2 of 4 (a, b: +0.1 to +0.2 nats, p < 0.001); no difference was shown in ..'.

    Args:
        tests: by what distinguishes them.
        above, below: what a positive and a negative difference mean.
        form: of a value, with its unit: '{:+.1f} points'.
        none: what a test says that finds nothing.
    """
    parts = []
    for word, sign in ((above, 1), (below, -1)):
        if found := {name: test for name, test in tests.items() if shown(test) and sign * test['value'] > 0}:
            low, high = (form.format(end(test['value'] for test in found.values())) for end in (min, max))
            values = low if low == high else f'{low.split()[0]} to {high}'
            largest = p_words(max(test['p_holm'] for test in found.values()))
            largest = largest.replace('=', '≤') if len(found) > 1 else largest
            where = f'{", ".join(found)}: ' if len(found) <= 6 else ''
            parts.append(f'{word} in {len(found)} of {len(tests)} ({where}{values}, {largest})')
    if rest := [name for name, test in tests.items() if not shown(test)]:
        known = [tests[name]['p_holm'] for name in rest if tests[name]['p_holm'] is not None]
        least = p_words(min(known, default=None))
        everywhere = len(rest) == len(tests) > 1
        where = f'any of {len(rest)}' if everywhere else ', '.join(rest) if len(rest) <= 6 else f'the other {len(rest)}'
        parts.append(f'{none} in {where} ({"smallest " * (len(rest) > 1 and least[0] == "p")}{least})')
    return '; '.join(parts)


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ['---', *['---:'] * (len(head) - 1)], *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def p_cell(test: dict) -> str:
    return '-' if test['p_holm'] is None else p_text(test['p_holm'])


def cell(test: dict | None, digits: int) -> str:
    return '-' if test is None else f'{test["value"]:.{digits}f}{" *" * shown(test)}'


def tell_information(result: dict) -> Told:
    blocks = result['blocks']

    words = {angle: f'One step along {angle}' for angle in ANGLES}
    words |= {
        IN_PLACE: 'At zero displacement',
        'elsewhere': 'Two steps or more apart',
        'other image': 'At one place of two images',
    }
    lines, rows = [], []
    for condition in (IN_PLACE, *ANGLES, 'elsewhere', 'other image'):
        for kind in PAIRS:
            found = {name: block['shared'].get(kind, {}).get(condition) for name, block in blocks.items()}
            if tests := {name: test for name, test in found.items() if test}:
                said = outcomes(
                    tests,
                    'shared information',
                    'less than independent channels give',
                    NATS,
                    'no shared information was shown',
                )
                lines.append(f'{words[condition]}, {kind}: {said}.')
                rows.append([f'{kind}, {condition}', *(cell(test, 3) for test in found.values())])
    for key, what in (
        ('local', 'One step away against two or more'),
        ('own', "A head's own direction against the other three"),
    ):
        for kind in PAIRS:
            if tests := {name: block[key][kind] for name, block in blocks.items() if kind in block[key]}:
                lines.append(f'{what}, {kind}: {outcomes(tests, "more information", "less information", NATS)}.')
        if not any(block[key] for block in blocks.values()):
            lines.append(f'{what}: the maps of {", ".join(blocks)} are too small to say.')
    maps = ', '.join(
        f'{name} {b["map"][0]} x {b["map"][1]}, {100 * b["zeros"]:.0f} % of z zero' for name, b in blocks.items()
    )
    note = (
        f'Nats a pair, less the {result["bias"]:.4f} that independent variables give; {result["images"]} images, '
        f'{result["draws"]} positions of each, {result["neighbours"]} neighbours; * p < {LEVEL:g}. Maps: {maps}.'
    )
    return lines, [markdown_table(['', *blocks], rows), note]


def tell_features(result: dict) -> Told:
    blocks = result['blocks']
    kinds = list(next(iter(blocks.values()))['accuracies'])
    mean = {kind: np.mean([block['accuracies'][kind] for block in blocks.values()]) for kind in kinds}
    lines = [
        f'In {result["dimension"]} dimensions, over {len(blocks)} blocks: '
        + ', '.join(f'{kind} {mean[kind]:.1f} %' for kind in kinds)
        + f'; the most frequent class {result["chance"]:.1f} %.'
    ]
    for kind in kinds[1:]:
        tests = {name: block['against'][kind] for name, block in blocks.items()}
        lines.append(f'Displaced products against {kind}: {outcomes(tests, "better", "worse", POINTS)}.')
    rows = [[kind, *(f'{np.mean(b["accuracies"][kind]):.1f}' for b in blocks.values())] for kind in kinds]
    note = (
        f'Accuracy in % of a linear probe on {result["images"]} images that did not train the network; '
        f'{result["repeats"]} x {result["folds"]} folds, corrected resampled t-test.'
    )
    return lines, [markdown_table(['', *blocks], rows), note]


def tell_directions(result: dict) -> Told:
    lines = []
    for view, words in (
        ('heads', "the heads' responses, relative to their mean"),
        ('steps', 'the displacements at which the same channels repeat'),
    ):
        found, names = result[view], result[view]['names']
        overall = found['overall']
        yes = 'classes differ' if shown(overall) else 'no difference between classes was shown'
        lines.append(
            f'In {words}: {yes} (epsilon squared {overall["value"]:.3f}, {p_words(overall["p_holm"])}, '
            f'{result["images"]} images, {result["permutations"]} permutations).'
        )
        lines.append(
            f'One by one (Kruskal-Wallis): {outcomes(found["single"], "classes differ", "", "{:.2f} epsilon squared")}.'
        )
        if shown(overall):
            profile, tops = np.array(found['profile']), []
            for angle in ANGLES:
                columns = [i for i, name in enumerate(names) if name.endswith(f' {angle}')]
                if columns:
                    means = profile[:, columns].mean(1)
                    tops.append(f'{angle} {result["classes"][means.argmax()]} ({means.max():+.2f})')
            lines.append(f'Most inclined to each direction, in standard deviations: {", ".join(tops)}.')
    return lines, []


def tell_changes(result: dict) -> Told:
    changes = result['changes']
    lines = []
    for key, what, form in (('accuracy_change', 'Accuracy', POINTS), ('loss_change', 'Cross-entropy', NATS)):
        tests = {name: change[key] for name, change in changes.items()}
        lines.append(f'{what} on the {result["images"]} test images: {outcomes(tests, "higher", "lower", form)}.')
    lines.append(
        f'With {result["images"]} images and {result["tests"]} tests, a change of fewer than {result["least"]} images, '
        'all one way, could not have been shown.'
    )
    head = ['', 'accuracy', 'change', '95 %', 'lost', 'gained', 'p', 'loss change', 'p', 'other answers']
    rows = [['as trained', f'{result["accuracy"]:.1f}', *[''] * 8]]
    for name, change in changes.items():
        accuracy, loss = change['accuracy_change'], change['loss_change']
        rows.append([
            name, f'{change["accuracy"]:.1f}', f'{accuracy["value"]:+.1f}',
            f'{accuracy["low"]:+.1f} to {accuracy["high"]:+.1f}', str(accuracy['lost']), str(accuracy['gained']),
            p_cell(accuracy), f'{loss["value"]:+.3f}', p_cell(loss),
            f'{change["other_answers"]:.0f} %',
        ])  # fmt: skip
    return lines, [markdown_table(head, rows)]


def tell_gates(result: dict) -> Told:
    start, (lines, details) = result['start'], tell_changes(result)
    ends = ', '.join(
        f'{name} {block["gate"]:.4f}' + (f' ({block["gate"] - start:+.4f})' if start is not None else '')
        for name, block in result['blocks'].items()
    )
    shares = ', '.join(f'{name} {100 * block["share"]:.1f} %' for name, block in result['blocks'].items())
    began = f', from {start:.4f} before training' if start is not None else ''
    first = [
        f'sigmoid(gate) ends at {ends}{began}.',
        f"Root mean square of what the gates let through, of the block's output: {shares}.",
    ]
    return first + lines, details


# ---------------------------------------------------------------------------------------------- figures

FILLED = f"Filled: p < {LEVEL:g} after Holm's correction. Bars: 95 % intervals."


def points(axes: plt.Axes, at: list[float], tests: list[dict], across: bool = False, **style) -> None:
    """Values with their intervals, filled where a difference is shown; across: values along x."""
    style = dict(color=COLORS[0], marker='o') | style
    for place, test in zip(at, tests):
        reach = [[test['value'] - test['low']], [test['high'] - test['value']]]
        where = (test['value'], place) if across else (place, test['value'])
        face = style['color'] if shown(test) else 'white'
        bar = {'xerr' if across else 'yerr': reach}
        axes.errorbar(*where, **bar, linestyle='none', elinewidth=0.8, markerfacecolor=face, **style)


def panels(count: int, width: float, height: float, **kwargs) -> tuple[Figure, list[plt.Axes]]:
    columns = min(count, 4)
    rows = math.ceil(count / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(width, height * rows), squeeze=False, layout='constrained', **kwargs
    )
    for axes in grid.flat[count:]:
        axes.remove()
    return figure, list(grid.flat[:count])


def draw_information(result: dict, title: str) -> Figure:
    blocks = result['blocks']
    conditions = list(dict.fromkeys(c for b in blocks.values() for kind in b['shared'].values() for c in kind))
    conditions.sort(key=[IN_PLACE, *ANGLES, 'elsewhere', 'other image'].index)
    styles = {DIFFERENT: dict(color=COLORS[0], marker='o'), SAME: dict(color=COLORS[1], marker='s')}
    figure, grid = panels(len(blocks), PAGE[0], 2.1, sharey=True)
    for place, (axes, (name, block)) in enumerate(zip(grid, blocks.items())):
        axes.axhline(0, color='0.6', linewidth=0.6, zorder=0)
        for shift, (kind, style) in zip((-0.12, 0.12), styles.items()):
            found = block['shared'].get(kind, {})
            points(axes, [conditions.index(c) + shift for c in found], list(found.values()), **style)
        axes.set_xticks(range(len(conditions)), conditions, rotation=90)
        axes.set(title=f'{name}, {block["map"][0]} x {block["map"][1]}', ylabel='' if place % 4 else 'shared, nats')
    handles = [Line2D([], [], label=kind, linestyle='none', **style) for kind, style in styles.items()]
    notes = [f'0: independent channels. Degrees: one step in this direction. {result["images"]} images.', FILLED]
    frame(figure, f'Information that two channels of a head share: {title}', notes, handles)
    return figure


def draw_features(result: dict, title: str) -> Figure:
    blocks = result['blocks']
    kinds = list(next(iter(blocks.values()))['accuracies'])
    figure, grid = panels(len(blocks), PAGE[0], 1.6, sharex=True, sharey=True)
    for axes, (name, block) in zip(grid, blocks.items()):
        for row, kind in enumerate(kinds):
            values = block['accuracies'][kind]
            axes.plot(values, [row] * len(values), '|', color='0.55', markersize=5, zorder=1)
            other = row and shown(block['against'][kind])
            face = COLORS[0] if row == 0 or other else 'white'
            axes.plot(np.mean(values), row, 'o', color=COLORS[0], markerfacecolor=face, markersize=5)
        axes.axvline(result['chance'], color='0.4', linestyle=(0, (1, 2)), linewidth=0.8, zorder=0)
        axes.set(title=name, xlabel='accuracy, %', ylim=(len(kinds) - 0.5, -0.5))
        axes.set_yticks(range(len(kinds)), kinds)
    notes = [
        f'{result["dimension"]} dimensions each. Ticks: {result["repeats"]} x {result["folds"]} folds; circles: means, '
        f"filled where they differ from the displaced products (p < {LEVEL:g} after Holm's correction). "
        'Dotted: the most frequent class.'
    ]
    frame(figure, f'Linear probe on frozen features: {title}', notes)
    return figure


def draw_directions(result: dict, title: str) -> Figure:
    views = ('heads', 'steps')
    strongest = np.max([np.abs(result[view]['profile']).max(1) for view in views], 0)  # (classes,)
    rows = np.sort(np.argsort(-strongest, kind='stable')[:MAX_ROWS])
    height = 0.7 + 0.14 * len(rows)
    figure, grid = plt.subplots(
        1, len(views), figsize=(PAGE[0], height), squeeze=False, layout='constrained', sharey=True
    )
    limit = max(float(strongest.max()), 1e-9)
    for axes, view in zip(grid[0], views):
        names = result[view]['names']
        image = axes.imshow(
            np.array(result[view]['profile'])[rows], cmap='cividis', vmin=-limit, vmax=limit, aspect='auto'
        )
        blocks = [name.split()[0] for name in names]
        for edge in [i for i in range(1, len(names)) if blocks[i] != blocks[i - 1]]:
            axes.axvline(edge - 0.5, color='white', linewidth=2)
        for block in dict.fromkeys(blocks):
            middle = np.mean([i for i, other in enumerate(blocks) if other == block])
            axes.text(middle, -0.8, block, ha='center', va='bottom', fontsize=7)
        axes.set_xticks(range(len(names)), [name.split()[1] for name in names], rotation=90)
        axes.set_yticks(range(len(rows)), [result['classes'][row] for row in rows])
        overall = result[view]['overall']
        what = 'heads' if view == 'heads' else 'displacements, same channels'
        axes.set_title(f'{what}: {p_words(overall["p_holm"])}', pad=14)
    figure.colorbar(image, ax=grid[0], label='standard deviations', fraction=0.03, pad=0.01)
    notes = [
        'Class means of the cosine in each direction, less the mean over directions, in standard deviations of '
        f'{result["images"]} images.'
    ]
    if len(rows) < len(result['classes']):
        notes.append(f'The {len(rows)} classes of {len(result["classes"])} that depart most.')
    frame(figure, f'Directions that classes respond to: {title}', notes)
    return figure


def draw_changes(result: dict, title: str, before: int = 0) -> tuple[Figure, list[plt.Axes]]:
    """Changes of accuracy and loss, a row each, behind panels that the caller fills."""
    changes = result['changes']
    height = 0.6 + 0.2 * len(changes)
    figure, grid = plt.subplots(1, 2 + before, figsize=(PAGE[0], height), layout='constrained', squeeze=False)
    for axes, key, label in zip(
        grid[0][before:],
        ('accuracy_change', 'loss_change'),
        ('change of accuracy,\npoints', 'change of\ncross-entropy, nats'),
    ):
        axes.axvline(0, color='0.6', linewidth=0.6, zorder=0)
        points(axes, list(range(len(changes))), [change[key] for change in changes.values()], across=True)
        axes.set_yticks(range(len(changes)), list(changes) if key == 'accuracy_change' else [''] * len(changes))
        axes.set(xlabel=label, ylim=(len(changes) - 0.5, -0.5))
    frame(figure, title, [f'{result["images"]} test images, {result["accuracy"]:.1f} % right as trained. {FILLED}'])
    return figure, list(grid[0])


def draw_spiral(result: dict, title: str) -> Figure:
    return draw_changes(result, f'The same weights with the spiral changed: {title}')[0]


def draw_gates(result: dict, title: str) -> Figure:
    figure, grid = draw_changes(result, f'Gates, and what closing them costs: {title}', before=2)
    blocks, start = result['blocks'], result['start']
    for axes, values, label in (
        (grid[0], [block['gate'] for block in blocks.values()], 'sigmoid(gate)'),
        (grid[1], [100 * block['share'] for block in blocks.values()], '% of output (RMS)'),
    ):
        axes.barh(range(len(blocks)), values, height=0.6, color='0.75', edgecolor='black', linewidth=0.5)
        for row, value in enumerate(values):
            axes.text(value, row, f' {value:.4f}' if axes is grid[0] else f' {value:.1f}', va='center', fontsize=7)
        axes.set(xlabel=label, ylim=(len(result['changes']) - 0.5, -0.5), xlim=(0, 1.35 * max(values)))
        axes.set_yticks(range(len(blocks)), list(blocks) if axes is grid[0] else [''] * len(blocks))
    if start is not None:
        grid[0].axvline(start, color='black', linestyle=(0, (1, 2)), linewidth=0.8)
        grid[0].set_title(f'dotted: {start:.3f} at the start')
    return figure


# ---------------------------------------------------------------------------------------------- command line

# What each question is called, what measures it, what tells it and what draws it.
QUESTIONS: dict[str, tuple] = {
    'information': ('Information', measure_information, tell_information, draw_information),
    'features': ('Features', measure_features, tell_features, draw_features),
    'directions': ('Directions', measure_directions, tell_directions, draw_directions),
    'spiral': ('Spiral', measure_spiral, tell_changes, draw_spiral),
    'gates': ('Gates', measure_gates, tell_gates, draw_gates),
}
OF_TEST = ('spiral', 'gates')  # questions that read the test images alone


def report_text(report: dict) -> str:
    """The report in Markdown; every sentence is made from the numbers of report.json."""
    lines = [
        f'# {report["model"]} on {report["dataset"]}, fold {report["fold"]}',
        f'`{report["checkpoint"]}`, epoch {report["epoch"]}, validation accuracy {report["val_acc"]:.1f} %, '
        f'{report["img_size"]} px; {report["n_test"]} test images and {report["n_val"]} of validation, '
        f'{report["classes"]} classes; seed {report["seed"]}.',
    ]
    for key, result in report['questions'].items():
        name, _, tell, _ = QUESTIONS[key]
        sentences, details = tell(result)
        lines += [f'## {name}', *sentences, *details, f'![{name}]({key}.png)']
    for key, reason in report['not_answered'].items():
        lines += [f'## {QUESTIONS[key][0]}', f'Not answered: {reason}.']
    return '\n\n'.join(lines) + '\n'


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='What a trained TwistNet makes of channels and directions.')
    parser.add_argument('--checkpoint', type=Path, required=True, help='best.pt of a TwistNet')
    parser.add_argument('--dataset', help="if not given, the run's")
    parser.add_argument('--data_dir', help="root of the data set; if not given, the run's")
    parser.add_argument('--fold', type=int, help="if not given, the run's")
    parser.add_argument('--save_dir', type=Path, default=Path('analysis'), help='made if missing')
    parser.add_argument('--question', choices=(*QUESTIONS, 'all'), default='all')
    parser.add_argument('--seed', type=int, default=42, help='of all that is drawn at random')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ..')
    return parser


def answer(args: argparse.Namespace) -> dict:
    """What report.json holds: the questions that the options ask and their answers.

    Raises:
        RunError: the options do not fit the checkpoint or the data set; one question was asked that the model cannot
            answer. ModelError, DataError: the checkpoint, or the data set or an image of it, cannot be read.
    """
    if args.seed < 0:
        raise RunError(f'--seed {args.seed} must not be negative')
    subject = inside.load(args.checkpoint)
    settings = settings_of(args) | dict(seed=args.seed)
    asked = tuple(QUESTIONS) if args.question == 'all' else (args.question,)
    subject.model.to(train.setup(args.device, args.seed))
    held = read_images(subject, settings, with_val=not set(asked) <= set(OF_TEST))
    answers, not_answered = {}, {}
    for key in asked:
        print(f'{key} ..', file=sys.stderr)
        try:
            answers[key] = QUESTIONS[key][1](subject, held, settings)
        except RunError as error:  # a model without twists, say
            if args.question != 'all':
                raise
            not_answered[key] = str(error)
    return dict(
        checkpoint=str(args.checkpoint),
        model=subject.name,
        dataset=settings['dataset'],
        fold=settings['fold'],
        seed=args.seed,
        epoch=subject.epoch,
        val_acc=subject.val_acc,
        img_size=subject.img_size,
        n_test=held.n_test,
        n_val=len(held.labels) - held.n_test,
        classes=len(subject.classes),
        questions=answers,
        not_answered=not_answered,
    )


def main(args: argparse.Namespace) -> None:
    args.save_dir.mkdir(parents=True, exist_ok=True)  # before the minutes that the answers take
    try:
        report = answer(args)
    except (DataError, ModelError) as error:
        raise RunError(str(error)) from error
    runs.write_json(args.save_dir / 'report.json', report)
    runs.write_atomic(args.save_dir / 'report.md', report_text(report).encode())
    title = f'{report["model"]} on {report["dataset"]}, fold {report["fold"]}'
    for key, result in report['questions'].items():
        name, _, tell, draw = QUESTIONS[key]
        print(f'{name}:', *tell(result)[0], sep='\n  ')
        save(draw(result, title), args.save_dir, key)
    for key, reason in report['not_answered'].items():
        print(f'{QUESTIONS[key][0]}: not answered: {reason}')
    print(args.save_dir / 'report.md')


if __name__ == '__main__':
    with runs.user_errors('analysis.py'):
        main(get_args_parser().parse_args())
