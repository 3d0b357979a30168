"""What models said of images, and how right it is: scores of runs, and means over folds. No torch.

evaluate.py prints them.
"""

import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.metrics import confusion_matrix

from common import runs
from common.errors import RunError
from common.images import SYNTHETIC
from common.own_data import root_of
from common.predictions import Predictions, read_predictions
from common.registry import UNSURE, dataset_label, model_label
from common.results import read_run, recipe_of, start_of
from common.runs import counted
from common.statistics import calibration_error, mcnemar


class Judged(NamedTuple):
    """A model and what it said of some images."""

    name: str  # the run folder, or the checkpoint
    model: str
    dataset: str
    subset: str  # 'test', ..
    fold: int | None
    seed: int | None
    key: tuple  # the same in runs that differ by fold and seed alone
    found: Predictions
    root: str | None  # where relative paths start
    caution: str  # '', or where images may have trained the model


def read_judged(folder: Path, data_dir: str | None = None) -> Judged:
    """A complete run and its predictions of its test images.

    Args:
        folder: of the run.
        data_dir: the root of its data set, where that has moved.

    Raises:
        RunError: it is not complete, a file is missing or damaged, or the predictions are not those of its results.
    """
    if not (folder / 'config.json').is_file():
        raise RunError(f'{folder}: is no run folder of train.py')
    config, results = read_run(folder)
    if results is None:
        raise RunError(f'{folder}: not complete; the command that began it finishes it')
    path = folder / runs.PREDICTIONS
    if not path.exists():
        best = folder / 'best.pt'
        raise RunError(f'{folder}: has no {path.name}, being of older code; --checkpoint {best} evaluates it')
    found, defines = read_predictions(path), config['defines']
    if defines['model'].partition('+')[2].partition('_')[0] in UNSURE:  # older code wrote 0 and 1
        found = found._replace(probabilities=np.full_like(found.probabilities, np.nan))
    accuracy = 100 * np.mean(found.predicted == found.labels)
    if not (np.isfinite(found.probabilities).all() or np.isnan(found.probabilities).all()):
        raise RunError(f'{path}: damaged, a probability is not a finite number')
    # Probabilities may tie where the logits of the results did not: one image is allowed to differ.
    if len(found.labels) != results['n_test'] or abs(accuracy - results['test_acc']) > 100.5 / len(found.labels):
        raise RunError(f'{path}: is not of this run, whose results.json says {results["test_acc"]:.2f} %')
    cell = [defines[key] for key in ('model', 'dataset', 'fold', 'seed')]
    made, caution = config.get('options', {}), results.get('caution') or ''
    root = data_dir or made.get('data_dir')
    if made.get('lists'):
        root = str(root_of(root, made['lists']))
    return Judged(str(folder), *cell[:2], 'test', *cell[2:], group_key(config, found.classes), found, root, caution)


def group_key(config: dict, classes: list[str]) -> tuple:
    """What runs that differ by fold and seed alone share, from their config.json: model, images and recipe."""
    defines = config['defines']
    recipe = recipe_of(config) | start_of(config)
    images = (defines['dataset'], config.get('tree'), *classes)
    return (defines['model'], *images, *sorted((k, str(v)) for k, v in recipe.items()))


def read_all(run_dirs: list[Path], data_dir: str | None = None) -> list[Judged]:
    """The runs that --run_dir names, each once; of a folder of runs, those that cannot be used are named on stderr.

    Raises:
        RunError: a run that is named cannot be used, or a folder holds none that can.
    """
    judged = {}
    for given in run_dirs:
        named, usable = (given / 'config.json').is_file() or not given.is_dir(), False
        for folder in [given] if named else runs.find_runs(given):
            try:
                one = read_judged(folder, data_dir)
            except RunError as error:
                if named:
                    raise
                print(f'left out: {error}', file=sys.stderr)
                continue
            if judged.setdefault((one.key, one.fold, one.seed), one) is not one:
                print(f'made twice, taken once: {folder}', file=sys.stderr)
            usable = True
        if not usable:
            raise RunError(f'{given}: no run in it can be evaluated')
    return list(judged.values())


def data_label(one: Judged) -> str:
    """The data set, and the subset where it is not test."""
    return dataset_label(one.dataset, {}) + f' {one.subset}' * (one.subset != 'test')


def title_of(group: list[Judged]) -> str:
    first = group[0]
    where = [f'{key} {value}' for key, value in dict(fold=first.fold, seed=first.seed).items() if value is not None]
    if len(group) > 1:
        where = [counted(len({one.fold for one in group}), 'fold'), f'{len(group)} runs']
    return ', '.join([f'{model_label(first.model)} on {data_label(first)}', *where, *filter(None, [first.caution])])


# ---------------------------------------------------------------------------------------------- scores


class Scores(NamedTuple):
    """Of one run, in percent."""

    overall: np.ndarray  # (4,), the columns OVERALL; NaN for the ECE of a model without probabilities
    classes: np.ndarray  # (K, 3), the columns OF_CLASS; NaN where there is nothing to divide by
    counts: np.ndarray  # (K,) images


# Their keys in the CSV, and their titles.
OVERALL = dict(accuracy='Accuracy', balanced_accuracy='Balanced accuracy', macro_f1='Macro F1', ece='ECE')
OF_CLASS = dict(precision='Precision', recall='Recall', f1='F1')


def scores_of(found: Predictions) -> Scores:
    """Scores of all images and of each class; the means over classes leave out those without images."""
    table = confusion_matrix(found.labels, found.predicted, labels=range(len(found.classes)))
    right, counts, said = table.diagonal(), table.sum(1), table.sum(0)
    with np.errstate(invalid='ignore'):  # NaN, whatever the version of scikit-learn makes of it
        classes = 100 * np.stack([right / said, right / counts, 2 * right / (counts + said)], 1)
    ece = 100 * calibration_error(found.probabilities.max(1), found.predicted == found.labels)
    _, recall, f1 = classes[counts > 0].mean(0)
    return Scores(np.array([100 * right.sum() / counts.sum(), recall, f1, ece]), classes, counts)


def over_folds(group: list[Judged], values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean over folds and sample standard deviation, seeds averaged inside a fold first; no deviation of one fold."""
    by_fold = defaultdict(list)
    for one, value in zip(group, values):
        by_fold[one.fold].append(value)
    folds = np.ma.stack([np.ma.masked_invalid(np.stack(seeds)).mean(0) for seeds in by_fold.values()])
    deviation = folds.std(0, ddof=1).filled(np.nan) if len(folds) > 1 else None
    return folds.mean(0).filled(np.nan), deviation


def compare(judged: list[Judged]) -> dict | None:
    """McNemar's test of two runs on the same images; None for other numbers of runs and for other images."""
    if len(judged) != 2:
        return None
    first, second = (one.found for one in judged)
    if first.classes != second.classes or first.paths != second.paths or (first.labels != second.labels).any():
        if judged[0].key != judged[1].key:
            print('note: not compared, because the two runs were not evaluated on the same images', file=sys.stderr)
        return None
    return mcnemar(first.predicted == first.labels, second.predicted == second.labels)


# ---------------------------------------------------------------------------------------------- mistakes


def confusions(group: list[Judged]) -> np.ndarray:
    """(K, K) images of all runs of a group, by true class and prediction."""
    classes = range(len(group[0].found.classes))
    return sum(confusion_matrix(one.found.labels, one.found.predicted, labels=classes) for one in group)


def mistakes(group: list[Judged]) -> list[tuple[str, str, str, float]]:
    """Path, true class, prediction and its probability of each image that a run of a group got wrong, each image once.

    The most confident come first; the probability is NaN where the model gives none.
    """
    found = {}
    for one in group:
        _, paths, labels, predicted, probabilities = one.found
        for i in np.flatnonzero(predicted != labels):
            path = paths[i] if paths[i].startswith(SYNTHETIC) else str(Path(one.root or '', paths[i]))
            names = (one.found.classes[labels[i]], one.found.classes[predicted[i]])
            found.setdefault(path, []).append((path, *names, float(probabilities[i].max())))
    worst = [max(said, key=lambda row: row[-1]) for said in found.values()]
    return sorted(worst, key=lambda row: (-np.nan_to_num(row[-1]), row[0]))
