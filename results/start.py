"""The start of the last BatchNorm apart from the branch: the 2 x 2 design of D, from the runs that are kept.

    python -m results.start results/flowers --pilots results/pilot_flowers_0.1 results/pilot_flowers_0.2

The first table has each model's test accuracy in % at the chosen epoch, by seed; then their mean, and the means of the
validation accuracy that chose, and of the test accuracy after the last epoch. The second has the effects in points,
each with two 95 % intervals: over other test images (paired bootstrap, seeds averaged for each image) and over other
seeds (t interval of the seeds' differences). The third has medians over epochs and seeds: the norm of all gradients
before clipping, the training loss and the validation accuracy. Two have, by block and at the chosen epoch, the root
mean square of the last BatchNorm's weights, beside what weight decay alone leaves of a weight of one, and the spreads
of AIS's weights (see results/keep.py). The last has the pilots' validation accuracy (test accuracy) in %, its mean
and the effects on it in points.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import runs, tables
from common.errors import RunError, user_errors
from common.statistics import correct, p_text, t_test
from results.gates import left_by_decay
from results.keep import RIGHT, SCALES, SELECTION

ONE, ZERO, TWIST, TWIST_ZERO = 'resnet18', 'resnet18_zero_init', 'twistnet18', 'twistnet18_zero_init'
NO_SPIRAL, NO_PRODUCTS = f'{TWIST_ZERO}_no_spiral', f'{TWIST_ZERO}_no_products'
PAIR = 'published pair: TwistNet-18 at one - ResNet-18 at zero'
# Each effect as the weights of the models' accuracies; the two main effects are the primary comparisons.
EFFECTS = {
    'start (one - zero), mean over both': {ONE: 0.5, ZERO: -0.5, TWIST: 0.5, TWIST_ZERO: -0.5},
    'branch (with - without), mean over both': {ONE: -0.5, ZERO: -0.5, TWIST: 0.5, TWIST_ZERO: 0.5},
    'interaction: branch at zero - branch at one': {ONE: 1, ZERO: -1, TWIST: -1, TWIST_ZERO: 1},
    'start without the branch': {ONE: 1, ZERO: -1},
    'start with the branch': {TWIST: 1, TWIST_ZERO: -1},
    'branch at one': {TWIST: 1, ONE: -1},
    'branch at zero': {TWIST_ZERO: 1, ZERO: -1},
    PAIR: {TWIST: 1, ZERO: -1},
    'spiral at zero': {TWIST_ZERO: 1, NO_SPIRAL: -1},
    'products at zero': {TWIST_ZERO: 1, NO_PRODUCTS: -1},
    'branch without products at zero': {NO_PRODUCTS: 1, ZERO: -1},
}
PRIMARY = list(EFFECTS)[:2]
RESAMPLES = 10_000
SPANS = ((1, 10), (11, 30), (31, 60), (61, 100))  # epochs


class Model(NamedTuple):
    """The complete runs of one model, in the order of their seeds."""

    seeds: list[int]
    options: list[dict]
    results: list[dict]
    logs: list[list[dict]]
    right: np.ndarray  # (seeds, images) bool
    selection: list[dict]  # by block; empty without AIS
    scales: list[dict]  # by block


def read_models(folder: Path) -> dict[str, Model]:
    """The models of a folder of kept runs, of one fold, with equal seeds and images.

    Raises:
        RunError: a run is of other images, or its bits are not those of its test accuracy.
    """
    found, split = {}, None
    for run in runs.find_runs(folder):
        results, config = runs.read_json(run / 'results.json'), runs.read_json(run / 'config.json')
        if results is None:
            continue
        bits = (run / RIGHT).read_text().strip()
        right = np.array([bit == '1' for bit in bits])
        if len(right) != results['n_test'] or abs(100 * right.mean() - results['test_acc']) > 1e-9:
            raise RunError(f'{run / RIGHT}: is not of the test accuracy in results.json')
        split = split or config['defines']['split']
        if config['defines']['split'] != split:
            raise RunError(f'{run}: is of other images than the runs before')
        of_weights = runs.read_json(run / SELECTION), runs.read_json(run / SCALES)
        row = results['seed'], config['options'], results, runs.read_log(run / 'log.jsonl'), right, *of_weights
        found.setdefault(results['model'], []).append(row)
    models = {}
    for name in dict.fromkeys(name for weights in EFFECTS.values() for name in weights):
        if name in found:
            seeds, options, results, logs, right, *of_weights = zip(*sorted(found[name], key=lambda row: row[0]))
            records = ([record for record in some if record] for some in of_weights)
            models[name] = Model([*seeds], [*options], [*results], [*logs], np.stack(right), *records)
    return models


def contrast(models: dict[str, Model], weights: dict[str, float], of: Callable[[Model], np.ndarray]) -> np.ndarray:
    """The weighted sum of what `of` gives for each model."""
    return sum(weight * np.asarray(of(models[name]), float) for name, weight in weights.items())


def effects(models: dict[str, Model]) -> dict[str, dict]:
    """Those of EFFECTS whose models are there with equal seeds: contrasts of test accuracies in points.

    Returns:
        a t-test over seeds; `images`, the bootstrap interval over images; and `last`, the value after the last epoch.
    """
    found = {}
    for name, weights in EFFECTS.items():
        if weights.keys() <= models.keys() and len({tuple(models[model].seeds) for model in weights}) == 1:
            by_seed = contrast(models, weights, lambda model: [each['test_acc'] for each in model.results])
            error = by_seed.std(ddof=1) / len(by_seed) ** 0.5 if len(by_seed) > 1 else 0.0
            last = contrast(models, weights, lambda model: [each['test_acc_last'] for each in model.results])
            found[name] = t_test(by_seed.mean(), error, len(by_seed) - 1) | dict(last=last.mean())
    images = np.stack([100 * contrast(models, EFFECTS[name], lambda model: model.right.mean(0)) for name in found], 1)
    rng, count = np.random.default_rng(0), len(images)
    counts = (rng.multinomial(count, np.full(count, 1 / count), RESAMPLES // 20) for _ in range(20))
    low, high = np.percentile(np.concatenate([some @ images for some in counts]) / count, [2.5, 97.5], axis=0)
    for test, *interval in zip(found.values(), low, high):
        test['images'] = interval
    correct([found[name] for name in PRIMARY if name in found])
    return found


def print_models(models: dict[str, Model]) -> None:
    rows = []
    for name, model in models.items():
        tested = ', '.join(f'{each["test_acc"]:.1f}' for each in model.results)
        keys = 'test_acc', 'best_val_acc', 'test_acc_last'
        means = [f'{statistics.fmean(each[key] for each in model.results):.2f}' for key in keys]
        ends = [log[-1]['gates'] for log in model.logs]
        gates = ' '.join(f'{statistics.fmean(end[block] for end in ends):.3f}' for block in ends[0])
        rows.append([name, ', '.join(map(str, model.seeds)), tested, *means, gates or '-'])
    head = ['model', 'seeds', 'test', 'mean', 'validation', 'last epoch', 'gates at the end']
    tables.print_text('lrrrrrr', head, rows)


def print_effects(models: dict[str, Model]) -> None:
    rows = []
    for name, test in effects(models).items():
        images, seeds = (f'{low:+.2f} to {high:+.2f}' for low, high in (test['images'], (test['low'], test['high'])))
        intervals, p = [images, '-' if test['p'] is None else seeds], p_text(test['p'])
        p += f' ({p_text(test["p_holm"])})' if test.get('p_holm') is not None else ''
        rows.append([name, f'{test["value"]:+.2f}', *intervals, p, f'{test["last"]:+.2f}'])
    head = ['effect, points', 'value', '95 % by images', '95 % by seeds', 'p by seeds (Holm)', 'last epoch']
    tables.print_text('lrrrrr', head, rows)


def print_epochs(models: dict[str, Model]) -> None:
    rows = []
    for name, model in models.items():
        for key in ('grad_norm', 'train_loss', 'val_acc'):
            spans = [[line[key] for log in model.logs for line in log if a <= line['epoch'] <= b] for a, b in SPANS]
            rows.append([name, key, *(f'{statistics.median(values):.2f}' if values else '-' for values in spans)])
    tables.print_text('llrrrr', ['model', 'median of', *(f'epochs {a} to {b}' for a, b in SPANS)], rows)


def print_scales(models: dict[str, Model]) -> None:
    scaled = {name: model for name, model in models.items() if model.scales}
    blocks, rows = list(next(iter(scaled.values())).scales[0]) if scaled else [], []
    for name, model in scaled.items():
        left = left_by_decay(1.0, model.options[0], model.logs[0], model.results[0]['n_train'])
        means = [statistics.fmean(run[block] for run in model.scales) for block in blocks]
        rows.append([name, *(f'{value:.3f}' for value in (*means, left))])
    head = ['RMS of the last BatchNorm', *blocks, 'one by decay']
    tables.print_text('l' + 'r' * (len(blocks) + 1), head, rows)


def print_selection(models: dict[str, Model]) -> None:
    keys, rows = ('mean', 'low', 'high', 'over_images', 'over_classes', 'over_channels'), []
    for name, model in models.items():
        for block in model.selection[0] if model.selection else ():
            values = [statistics.fmean(each[block][key] for each in model.selection) for key in keys]
            rows.append([name, block, *(f'{value:.4f}' for value in values)])
    head = ['model', 'block', 'mean weight', 'lowest', 'highest', *(f'SD {key.replace("_", " ")}' for key in keys[3:])]
    tables.print_text('llrrrrrr', head, rows)


def print_pilots(pilots: list[dict[str, Model]]) -> None:
    names, effects = [ONE, ZERO, TWIST, TWIST_ZERO], [*list(EFFECTS)[:3], PAIR]
    best = {}
    for models in pilots:
        for name, model in models.items():
            if model.options[0]['clip_grad'] and validation(model) > validation(best.get(name)):
                best[name] = model
    rows = []
    for models in (*pilots, best):
        rates = {f'{model.options[0]["lr"]:g}' for model in models.values()}
        clips = {f'{model.options[0]["clip_grad"]:g}' for model in models.values()}
        cells = [
            f'{validation(models[name]):.1f} ({statistics.fmean(run["test_acc"] for run in models[name].results):.1f})'
            if name in models
            else '-'
            for name in names
        ]
        whole = models.keys() >= {*names}
        mean = f'{statistics.fmean(validation(models[name]) for name in names):.1f}' if whole else '-'
        changes = [f'{contrast(models, EFFECTS[name], validation):+.1f}' if whole else '-' for name in effects]
        rows.append(['own best' if models is best else ', '.join(rates), ', '.join(clips), *cells, mean, *changes])
    head = ['learning rate', 'clip_grad', *names, 'mean', 'start', 'branch', 'interaction', 'published pair']
    tables.print_text('r' * len(head), head, rows)


def validation(model: Model | None) -> float:
    """Mean validation accuracy in % at the chosen epochs."""
    return statistics.fmean(run['best_val_acc'] for run in model.results) if model else 0.0


def main(args: argparse.Namespace) -> None:
    models = read_models(args.folder)
    for number, show in enumerate((print_models, print_effects, print_epochs, print_scales, print_selection)):
        print(end='\n' * (number > 0))
        show(models)
    if args.pilots:
        print()
        print_pilots([read_models(folder) for folder in args.pilots])


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='The 2 x 2 design of start and branch.')
    parser.add_argument('folder', type=Path, help='a folder of kept runs')
    parser.add_argument('--pilots', nargs='+', type=Path, default=[], help='folders of kept runs at other rates')
    return parser


if __name__ == '__main__':
    with user_errors('results/start.py'):
        main(get_args_parser().parse_args())
