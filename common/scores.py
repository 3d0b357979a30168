"""Scores of predictions, of each run and over folds; evaluate.py prints them. No torch."""

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
from common.registry import dataset_label, model_label
from common.results import cell_of, read_run, recipe_of, start_of
from common.runs import counted
from common.statistics import calibration_error, mcnemar


class EvaluatedRun(NamedTuple):
    """A model and its predictions of some images."""

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


def read_evaluated(folder: Path, data_dir: str | None = None) -> EvaluatedRun:
    """A complete run and its predictions of its test images, in `data_dir` where its data set has moved there.

    Raises RunError: it is not complete, a file is missing or damaged, or the predictions are not those of its results.
    """
    if not (folder / 'config.json').is_file():
        raise RunError(f'{folder}: is no run folder of train.py')
    config, results = read_run(folder)
    if results is None:
        raise RunError(f'{folder}: not complete; the command that began it finishes it')
    path = folder / runs.PREDICTIONS
    found = read_predictions(path)
    # Probabilities may tie where the logits of the results did not: one image is allowed to differ.
    count, right = len(found.labels), np.sum(found.predicted == found.labels)
    if count != results['n_test'] or abs(right - results['test_acc'] * count / 100) > 1.005:
        raise RunError(f'{path}: is not of this run, whose results.json says {results["test_acc"]:.2f} %')
    made = config.get('options', {})
    root = data_dir or made.get('data_dir')
    root = str(root_of(root, made['lists'])) if made.get('lists') else root
    dataset, model, fold, seed = cell_of(config)
    key, caution = group_key(config, found.classes), results.get('caution') or ''
    return EvaluatedRun(str(folder), model, dataset, 'test', fold, seed, key, found, root, caution)


def group_key(config: dict, classes: list[str]) -> tuple:
    """What runs that differ by fold and seed alone share, from their config.json: model, images and recipe."""
    dataset, model, *_ = cell_of(config)
    recipe = recipe_of(config) | start_of(config)
    return (model, dataset, config.get('tree'), *classes, *sorted((k, str(v)) for k, v in recipe.items()))


def read_all(run_dirs: list[Path], data_dir: str | None = None) -> list[EvaluatedRun]:
    """The runs that --run_dir names, each once; of a folder of runs, those that cannot be used are named on stderr.

    Raises RunError if a run that is named cannot be used, or a folder holds none that can.
    """
    evaluated = {}
    for given in run_dirs:
        named, usable = (given / 'config.json').is_file() or not given.is_dir(), False
        for folder in [given] if named else runs.find_runs(given):
            try:
                one = read_evaluated(folder, data_dir)
            except RunError as error:
                if named:
                    raise
                print(f'left out: {error}', file=sys.stderr)
                continue
            if evaluated.setdefault((one.key, one.fold, one.seed), one) is not one:
                print(f'counted once, made twice: {folder}', file=sys.stderr)
            usable = True
        if not usable:
            raise RunError(f'{given}: no run in it can be evaluated')
    return list(evaluated.values())


def data_label(one: EvaluatedRun) -> str:
    """The data set, and the subset where it is not test."""
    return dataset_label(one.dataset, {}) + f' {one.subset}' * (one.subset != 'test')


def title_of(group: list[EvaluatedRun]) -> str:
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
    right, counts, predicted = table.diagonal(), table.sum(1), table.sum(0)
    with np.errstate(invalid='ignore'):  # NaN, which versions of scikit-learn define differently
        classes = 100 * np.stack([right / predicted, right / counts, 2 * right / (counts + predicted)], 1)
    ece = 100 * calibration_error(found.probabilities.max(1), found.predicted == found.labels)
    _, recall, f1 = classes[counts > 0].mean(0)
    return Scores(np.array([100 * right.sum() / counts.sum(), recall, f1, ece]), classes, counts)


def over_folds(group: list[EvaluatedRun], values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean over folds and sample standard deviation, seeds averaged inside a fold first; no deviation of one fold."""
    by_fold = defaultdict(list)
    for one, value in zip(group, values):
        by_fold[one.fold].append(value)
    folds = np.ma.stack([np.ma.masked_invalid(np.stack(seeds)).mean(0) for seeds in by_fold.values()])
    deviation = folds.std(0, ddof=1).filled(np.nan) if len(folds) > 1 else None
    return folds.mean(0).filled(np.nan), deviation


def compare(evaluated: list[EvaluatedRun]) -> dict | None:
    """McNemar's test of two runs on the same images; None for other numbers of runs and for other images."""
    if len(evaluated) != 2:
        return None
    first, second = (one.found for one in evaluated)
    if first.classes != second.classes or first.paths != second.paths or (first.labels != second.labels).any():
        if evaluated[0].key != evaluated[1].key:
            print('note: not compared, because the two runs were not evaluated on the same images', file=sys.stderr)
        return None
    return mcnemar(first.predicted == first.labels, second.predicted == second.labels)


# ---------------------------------------------------------------------------------------------- mistakes


def confusions(group: list[EvaluatedRun]) -> np.ndarray:
    """(K, K) images of all runs of a group, by true class and prediction."""
    classes = range(len(group[0].found.classes))
    return sum(confusion_matrix(one.found.labels, one.found.predicted, labels=classes) for one in group)


def mistakes(group: list[EvaluatedRun]) -> list[tuple[str, str, str, float]]:
    """Path, true class, predicted class and its probability of each image that a run of a group got wrong, once each.

    The most confident come first; the probability is NaN where the model gives none.
    """
    worst = {}
    for one in group:
        classes, paths, labels, predicted, probabilities = one.found
        for i in np.flatnonzero(predicted != labels):
            path = paths[i] if paths[i].startswith(SYNTHETIC) else str(Path(one.root or '', paths[i]))
            wrong = path, classes[labels[i]], classes[predicted[i]], float(probabilities[i].max())
            worst[path] = max(worst.get(path, wrong), wrong, key=lambda row: row[-1])
    return sorted(worst.values(), key=lambda row: (-np.nan_to_num(row[-1]), row[0]))
