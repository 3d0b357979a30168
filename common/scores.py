"""Scores of predictions, of each run and over folds; evaluate.py prints them. No torch."""

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from sklearn.metrics import confusion_matrix, roc_auc_score, top_k_accuracy_score

from common import runs
from common.errors import RunError
from common.images import SYNTHETIC
from common.own_data import root_of
from common.predictions import Predictions, read_predictions
from common.registry import dataset_label, model_label
from common.results import cell_of, differing_keys, read_run, recipe_of, start_of
from common.runs import counted
from common.statistics import calibrate, calibration_error, mcnemar

# Columns of scores: their keys in the CSV, and their titles.
OVERALL = dict(accuracy='Accuracy', balanced_accuracy='Balanced accuracy', macro_f1='Macro F1', ece='ECE')
OVERALL |= dict(ece_calibrated='ECE at T', top5='Top-5', macro_auc='Macro AUC')
OF_CLASS = dict(precision='Precision', recall='Recall', f1='F1', auc='AUC')
SHARES = np.arange(100, 4, -1)  # percent of the images, the most certain ones, for EvaluatedRun.kept


@dataclass(eq=False)
class EvaluatedRun:
    """A model, its predictions of some images, and their scores in percent."""

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
    temperature: float | None = None  # of the calibrated probabilities
    recipe: dict = field(default_factory=dict)  # of results.recipe_of; {} where none is recorded
    told: str = ''  # of the recipe, see grouped

    @property
    def data(self) -> str:
        """The data set, the subset where it is not test, and what is told of the recipe."""
        subset, recipe = f' {self.subset}' * (self.subset != 'test'), f' ({self.told})' * bool(self.told)
        return dataset_label(self.dataset, {}) + subset + recipe

    @cached_property
    def confusion(self) -> np.ndarray:
        """(K, K) images by true class and prediction."""
        return confusion_matrix(self.found.labels, self.found.predicted, labels=range(len(self.found.classes)))

    @cached_property
    def of_class(self) -> np.ndarray:
        """(K, 4), the columns OF_CLASS; AUC of one class against the others. NaN where nothing can be computed."""
        right, counts, predicted = self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)
        auc, given = np.full(len(counts), np.nan), not np.isnan(self.found.probabilities).any()
        for k in np.flatnonzero((counts > 0) & (counts < counts.sum()) & given):
            auc[k] = roc_auc_score(self.found.labels == k, self.found.probabilities[:, k])
        with np.errstate(invalid='ignore'):  # NaN, which versions of scikit-learn define differently
            return 100 * np.stack([right / predicted, right / counts, 2 * right / (counts + predicted), auc], 1)

    @cached_property
    def overall(self) -> np.ndarray:
        """(7,), the columns OVERALL, means over classes that have images; NaN where what it takes is not there.

        That are probabilities for the last four, a temperature for the ECE at it, and eleven classes for top-5.
        """
        values, top5, after = self.found.probabilities, np.nan, np.nan
        right = self.found.predicted == self.found.labels
        _, recall, f1, auc = self.of_class[self.confusion.sum(1) > 0].mean(0)
        if len(self.found.classes) > 10 and not np.isnan(values).any():
            top5 = 100 * top_k_accuracy_score(self.found.labels, values, k=5, labels=range(values.shape[1]))
        if self.temperature is not None:
            after = 100 * calibration_error(self.calibrated.max(1), right)
        ece = 100 * calibration_error(values.max(1), right)
        return np.array([100 * right.sum() / len(right), recall, f1, ece, after, top5, auc])

    @cached_property
    def calibrated(self) -> np.ndarray:
        """(N, K) probabilities at the temperature; as they are without one."""
        return calibrate(self.found.probabilities, self.temperature)

    @cached_property
    def kept(self) -> np.ndarray:
        """(len(SHARES), 2), in percent: accuracy of the most certain images of each share, and the lowest probability.

        That is the calibrated one of the prediction. Images as certain as the last are among them, as with `predict.py
        --reject` at that probability. NaN without probabilities.
        """
        certain, right = self.calibrated.max(1), self.found.predicted == self.found.labels
        lowest = np.sort(certain)[-(len(certain) * SHARES) // 100]
        kept = certain >= lowest[:, None]  # (S, N)
        with np.errstate(invalid='ignore'):
            return 100 * np.stack([(kept & right).sum(1) / kept.sum(1), lowest], 1)


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
    facts = root, caution, results.get('temperature'), recipe_of(config)
    return EvaluatedRun(str(folder), model, dataset, 'test', fold, seed, key, found, *facts)


def group_key(config: dict, classes: list[str]) -> tuple:
    """What runs that differ by fold and seed alone share, from their config.json: model, images and recipe."""
    dataset, model, *_ = cell_of(config)
    return model, dataset, config.get('tree'), *classes, runs.fingerprint(recipe_of(config) | start_of(config))


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


def grouped(evaluated: list[EvaluatedRun]) -> list[list[EvaluatedRun]]:
    """Runs of one model that differ by fold and seed, together.

    Fills in `told`: what of a recipe is not the same in all, and always that it trained on train and val.
    """
    recipes, groups = [one.recipe for one in evaluated if one.recipe], defaultdict(list)
    for one in evaluated:
        keys = differing_keys(one.recipe, recipes) | {'train_on'} & one.recipe.keys()
        one.told = ', '.join(f'{key} {one.recipe[key]}' for key in sorted(keys))
        groups[one.key].append(one)
    return [*groups.values()]


def title_of(group: list[EvaluatedRun]) -> str:
    first = group[0]
    where = [f'{key} {value}' for key, value in dict(fold=first.fold, seed=first.seed).items() if value is not None]
    if len(group) > 1:
        where = [counted(len({one.fold for one in group}), 'fold'), f'{len(group)} runs']
    return ', '.join([f'{model_label(first.model)} on {first.data}', *where, *filter(None, [first.caution])])


# ---------------------------------------------------------------------------------------------- scores


def over_folds(group: list[EvaluatedRun], scores: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean over folds and sample standard deviation, seeds averaged inside a fold first; NaN of a single fold.

    Args:
        scores: 'overall', 'of_class' or 'kept'.
    """
    by_fold = defaultdict(list)
    for one in group:
        by_fold[one.fold].append(getattr(one, scores))
    folds = np.ma.stack([np.ma.masked_invalid(np.stack(seeds)).mean(0) for seeds in by_fold.values()])
    mean = folds.mean(0).filled(np.nan)
    return mean, folds.std(0, ddof=1).filled(np.nan) if len(folds) > 1 else np.full_like(mean, np.nan)


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


def mistakes(group: list[EvaluatedRun]) -> list[tuple[str, str, str, float]]:
    """Path, true class, predicted class and its probability of each image that a run of a group got wrong, once each.

    The most confident come first; the probability is NaN where the model gives none.
    """
    worst = {}
    for one in group:
        classes, paths, labels, predicted, _ = one.found
        for i in np.flatnonzero(predicted != labels):
            path = paths[i] if paths[i].startswith(SYNTHETIC) else str(Path(one.root or '', paths[i]))
            wrong = path, classes[labels[i]], classes[predicted[i]], float(one.calibrated[i].max())
            worst[path] = max(worst.get(path, wrong), wrong, key=lambda row: row[-1])
    return sorted(worst.values(), key=lambda row: (-np.nan_to_num(row[-1]), row[0]))
