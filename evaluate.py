"""What a trained model gets right and wrong: scores, scores of each class, confusions, and its worst mistakes.

    python evaluate.py --run_dir runs/main/fmd_fold1_resnet18_seed42                # from its test_predictions.csv
    python evaluate.py --run_dir runs/main --latex > tables/classes.tex             # every complete run; also --csv
    python evaluate.py --checkpoint best.pt --dataset folder --data_dir new --subset all --other_images

--run_dir takes runs, or folders of runs, and computes nothing anew; --checkpoint runs a model over a subset that did
not train it. Runs of one model that differ by fold and seed are a group: its scores are means, seeds averaged inside a
fold first, with the sample standard deviation over folds, and its confusions are added up. Beside the data set stands
what tells a recipe from the others, such as train_on trainval. Two runs on the same images are compared by McNemar's
exact test.

All scores are percentages. Balanced accuracy, macro F1 and macro AUC are the means of recall, F1 and AUC over the
classes that have images. AUC is the area under the ROC curve of a class against all others; top-5 is for more than ten
classes. ECE is the expected calibration error over 15 bins (Guo et al., ICML 2017) of the network's probabilities, and
ECE at T that of calibrated ones, at the temperature that train.py fits to the validation images. - means that a model
has no probabilities, or no temperature. A table and a curve show the accuracy on the most certain images, and the
probability at which `predict.py --reject` keeps them. Figures go to --save_dir; their paths, and all that was left
out, to stderr.
"""

import argparse
import sys
from collections.abc import Iterable
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np

from common import options, scores, tables
from common.drawing import Figure, frame, line_style, make_panels, plot_confusion, plot_thumbnails, save, thumbnail
from common.errors import DataError, RunError, user_errors
from common.images import image_bits, open_image
from common.predictions import Predictions
from common.registry import model_label
from common.results import recipe_of
from common.runs import counted
from common.scores import OF_CLASS, OVERALL, SHARES, EvaluatedRun, over_folds, title_of
from common.statistics import p_text

MISTAKES = 12  # in the picture
HEAD = ['Model', 'Data', 'Fold', 'Seed', 'n']
FIRST = 4  # columns of OVERALL in the first table, empty or not; the others follow in a second one
KEPT = [100, 95, 90, 80, 70, 60, 50]  # of SHARES, printed
COUNTS = dict(right='Right', predicted='Predicted')  # images of a class, and as a class
# The first columns of the CSV, in the order that they had before others came.
CSV = ('class', 'n', *[*OVERALL][:FIRST], *[*OF_CLASS][:3], 'difference', 'low95', 'high95', 'p', 'temperature')
OF_CHECKPOINT = ('dataset', 'fold', 'other_images', 'subset')  # options that runs do not take


# ---------------------------------------------------------------------------------------------- what is evaluated


def run_models(args: argparse.Namespace) -> list[EvaluatedRun]:
    """The models of --checkpoint and their predictions of a subset that did not train them.

    Raises ModelError, RunError and DataError as trained.load and trained.data_of, and where an image cannot be read.
    """
    from common import distributed
    from common.splits import SUBSETS
    from training import trained  # and torch, which the predictions of runs do without

    evaluated, subset = [], args.subset or 'test'
    for path in dict.fromkeys(args.checkpoint):
        subject = trained.load(path, args.imports)
        data = trained.data_of(args, subject, subset)
        splits, caution = data.splits, data.caution or ''
        if subset in ('train', 'all') and not caution:
            caution = trained.OTHER
            print(f'note: {path}: --subset {subset} holds images that trained it', file=sys.stderr)
        elif subset == 'val':
            print(f'note: {path}: images of validation chose its epoch and its temperature', file=sys.stderr)
        items = [item for name in (SUBSETS if subset == 'all' else [subset]) for item in getattr(splits, name)]
        device = distributed.setup(args.device, 0)
        read, paths = partial(open_image, bits=data.bits), [path for path, _ in items]
        plain = subject._replace(temperature=None)
        probabilities, errors = trained.predict([plain], paths, read, args, device, f'{subset} images')
        if errors:
            raise DataError(
                f'{counted(len(errors), "image")} of {len(items)} cannot be read, so no score is of the set'
            )
        labels = np.array([label for _, label in items])
        found = Predictions(splits.classes, paths, labels, probabilities.argmax(1), probabilities)
        defines = subject.config.get('defines', {})
        # Not known to be of one data set and recipe, or not of the images held out by each: none is pooled.
        key = scores.group_key(subject.config, splits.classes) if defines and not caution else (path,)
        recipe = recipe_of(subject.config) if defines else {}
        cell = (subject.name, data.name, subset, splits.fold, defines.get('seed'))
        evaluated.append(EvaluatedRun(str(path), *cell, key, found, None, caution, subject.temperature, recipe))
    return evaluated


# ---------------------------------------------------------------------------------------------- tables


def texts(means: np.ndarray, deviations: Iterable[float] = repeat(np.nan)) -> list[str]:
    """The cells of a row: '75.0 ± 3.1', without the spread where there is none, or '-'."""
    cells = []
    for value, spread in zip(means, deviations):
        text = f'{value:.1f}' if np.isnan(spread) else f'{value:.1f} \N{PLUS-MINUS SIGN} {spread:.1f}'
        cells.append('-' if np.isnan(value) else text)
    return cells


def show(title: str, align: str, head: list[str], rows: list[list[str]], latex: bool) -> None:
    """Print a table with its title; in LaTeX, one for each 45 rows."""
    if not latex:
        print(title)
        tables.print_text(align, head, rows)
        return
    letters = sum(max(map(len, cells)) for cells in zip(head, *rows))  # of a line
    font, gap = (r'\tiny', 2) if letters > 75 else (r'\scriptsize', 4)
    for start in range(0, len(rows), 45):
        print(rf'\begin{{table}}[t]{font}\centering\setlength{{\tabcolsep}}{{{gap}pt}}')
        print(rf'\caption{{{tables.escape(title)}{" (continued)" * (start > 0)}.}}')
        lines = [[tables.escape(cell) for cell in row] for row in rows[start : start + 45]]
        tables.print_latex(f'@{{}}{align}@{{}}', [' & '.join(map(tables.escape, head)) + r' \\'], lines)
        print(r'\end{table}')


def print_tables(groups: list[list[EvaluatedRun]], latex: bool) -> None:
    """Print the tables of runs, McNemar's test of two, and per group a table of classes and one of shares kept."""
    rows, evaluated = [], [one for group in groups for one in group]
    for group in groups:
        for one in group:
            cell = ['-' if value is None else str(value) for value in (one.fold, one.seed, len(one.found.labels))]
            rows.append([model_label(one.model), one.data, *cell, *texts(one.overall)])
        if len(group) > 1:
            folds = counted(len({one.fold for one in group}), 'fold')
            rows.append([*rows[-1][:2], folds, 'mean', '', *texts(*over_folds(group, 'overall'))])
    head, first = [*HEAD, *OVERALL.values()], len(HEAD) + FIRST
    show('Scores in %', 'llrrr' + 'r' * FIRST, head[:first], [row[:first] for row in rows], latex)
    if more := [i for i in range(first, len(head)) if {row[i] for row in rows} != {'-'}]:
        print()
        more = [*range(len(HEAD)), *more]
        lines = [[row[i] for i in more] for row in rows]
        show('Calibration and ranks in %', 'll' + 'r' * (len(more) - 2), [head[i] for i in more], lines, latex)
    if test := scores.compare(evaluated):
        text = (
            f'McNemar: {title_of(evaluated[1:])} against {title_of(evaluated[:1])}: {test["value"]:+.1f} points (95 % '
            f'interval {test["low"]:+.1f} to {test["high"]:+.1f}), p {p_text(test["p"])}; images gained: '
            f'{test["gained"]}, lost: {test["lost"]}.'
        )
        print(f'\n{tables.escape(text) if latex else text}')
    for group in groups:
        print()
        head, lines = classes_of(group)
        show(f'{title_of(group)}, in %; right and predicted: images', 'l' + 'r' * (len(head) - 1), head, lines, latex)
        kept = zip(SHARES.tolist(), *over_folds(group, 'kept'))
        # The probability is rounded down: as --reject it keeps at least these images.
        lines = [
            [str(share), *texts([mean[0], np.floor(10 * mean[1]) / 10], sd)]
            for share, mean, sd in kept
            if share in KEPT
        ]
        if lines[0][1] != '-':
            print()
            head = ['Images kept', 'Accuracy', 'Probability from']
            show(f'{title_of(group)}, kept by {probability_of(group)}, in %', 'rrr', head, lines, latex)


def classes_of(group: list[EvaluatedRun]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a group's table of classes."""
    counts = counts_of(sum(one.confusion for one in group))
    known = zip(group[0].found.classes, counts, *over_folds(group, 'of_class'))
    rows = [[name, n, *texts(*values), *counts] for name, (n, *counts), *values in known]
    return ['Class', 'n', *OF_CLASS.values(), *COUNTS.values()], rows


def counts_of(confusion: np.ndarray) -> list[list[str]]:
    """By class: its images, those that are right, and the images predicted as it."""
    return np.stack([confusion.sum(1), confusion.diagonal(), confusion.sum(0)], 1).astype(str).tolist()


def probability_of(group: list[EvaluatedRun]) -> str:
    """Which probability a group has, in words."""
    known = [one.temperature for one in group if one.temperature is not None]
    if len(known) < len(group):
        return 'probability' + ', calibrated where a run has a temperature' * bool(known)
    texts = dict.fromkeys(f'{value:.2f}' for value in (min(known), max(known)))
    return f'calibrated probability (temperature {" to ".join(texts)})'


def print_csv(evaluated: list[EvaluatedRun]) -> None:
    """Print a row for each run, where `class` is empty, and rows of its classes; McNemar's test with the second run."""
    cell = ('run', 'model', 'dataset', 'subset', 'fold', 'seed')
    kept = [f'{what}_kept_{share}' for share in KEPT[1:] for what in ('accuracy', 'probability')]
    blank = dict.fromkeys([*cell, *CSV, *OVERALL, *OF_CLASS, *COUNTS, *kept, 'recipe'])
    rows, test = [], scores.compare(evaluated)
    for one in evaluated:
        known = blank | dict(zip(cell, (one.name, one.model, one.dataset, one.subset, one.fold, one.seed)))
        rows.append(known | dict(n=len(one.found.labels), temperature=one.temperature, recipe=one.told))
        rows[-1] |= dict(zip(OVERALL, one.overall.tolist()))
        rows[-1] |= zip(kept, one.kept[np.isin(SHARES, KEPT[1:])].ravel().tolist())
        if test and one is evaluated[1]:
            rows[-1] |= dict(difference=test['value'], low95=test['low'], high95=test['high'], p=test['p'])
        for name, counts, values in zip(one.found.classes, counts_of(one.confusion), one.of_class.tolist()):
            rows.append(known | {'class': name} | dict(zip(['n', *COUNTS], counts)) | dict(zip(OF_CLASS, values)))
    tables.print_csv([{key: None if value != value else value for key, value in row.items()} for row in rows])  # NaN


# ---------------------------------------------------------------------------------------------- figures


def draw_confusion(group: list[EvaluatedRun]) -> Figure:
    """The confusion matrix of a group, with its most frequent confusions below."""
    counts, classes = sum(one.confusion for one in group), group[0].found.classes
    wrong = np.where(np.eye(len(classes), dtype=bool), 0, counts)
    most = [divmod(int(i), len(classes)) for i in np.argsort(-wrong.ravel(), kind='stable')[:5]]
    words = [f'{classes[i]} as {classes[j]}, {wrong[i, j]} of {counts[i].sum()}' for i, j in most if wrong[i, j]]
    notes = [f'Most frequent confusions: {"; ".join(words)}.'] if words else []
    return plot_confusion(counts, classes, title_of(group), notes)


def worst_of(group: list[EvaluatedRun], most: int = MISTAKES) -> tuple[str, int | None, list[tuple[str, list[str]]]]:
    """The most confident mistakes of a group, if any: a title, bits for open_image, and of each its path and words."""
    found, worst = scores.mistakes(group), []
    bits, _ = image_bits(path for path, *_ in found)  # so that they are as bright as one another
    for path, truth, predicted, probability in found[:most]:
        share = '-' if np.isnan(probability) else f'{100 * probability:.0f} %'
        words = [f'truth: {truth}', f'predicted: {predicted}', f'probability {share}', Path(path).name]
        worst.append((path, words))
    order = '' if not found or np.isnan(found[0][-1]) else ' most confident'
    return f'The {len(worst)}{order} of {counted(len(found), "mistake")}: {title_of(group)}', bits, worst


def draw_mistakes(group: list[EvaluatedRun]) -> Figure:
    """The most confident mistakes of a group. Raises DataError: there is none, or an image cannot be read."""
    title, bits, worst = worst_of(group)
    if not worst:
        raise DataError('there is no mistake')
    panels = [(thumbnail(open_image(path, bits)), words) for path, words in worst]
    return plot_thumbnails(title, panels, columns=4)


def draw_kept(group: list[EvaluatedRun]) -> Figure:
    """Accuracy against the share of images that is kept, the most certain ones: of each run, and the mean."""
    accuracy = over_folds(group, 'kept')[0][:, 0]
    if np.isnan(accuracy).any():
        raise DataError('there are no probabilities')
    figure, (axes,) = make_panels(1, 1, (3.5, 2.6))
    for one in group[: len(group) * (len(group) > 1)]:
        axes.plot(SHARES, one.kept[:, 0], color='0.8', linewidth=0.6)
    axes.plot(SHARES, accuracy, **line_style(group[0].model) | dict(marker='', linestyle='-'))
    axes.set(xlabel='images kept in %, the most certain ones', ylabel='accuracy in %', xlim=(SHARES[-1], SHARES[0]))
    notes = [f'By {probability_of(group)}.'] + ['Grey: the runs.'] * (len(group) > 1)
    frame(figure, title_of(group), notes)
    return figure


def draw(groups: list[list[EvaluatedRun]], save_dir: Path) -> None:
    """Write the figures; one that cannot be drawn is named on stderr."""
    for number, group in enumerate(groups, start=1):
        name = f'_{number}_{group[0].model}' if len(groups) > 1 else ''
        for kind, make in (('confusion', draw_confusion), ('mistakes', draw_mistakes), ('kept', draw_kept)):
            try:
                figure = make(group)
            except DataError as error:
                print(f'not drawn: {kind}{name}: {error}', file=sys.stderr)
                continue
            print(*save(figure, save_dir, kind + name), sep='\n', file=sys.stderr)


# ---------------------------------------------------------------------------------------------- command line


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Report what a trained model gets right and wrong.', allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        '--run_dir', type=Path, nargs='+', metavar='RUN', help='run folders, or folders that contain them'
    )
    what.add_argument('--checkpoint', type=Path, nargs='+', metavar='BEST.PT', help='models to evaluate on a subset')
    options.add_data_of_run_args(parser)
    text = (
        'part of the data set; test if not given. train and all need --other_images, as they include training images; '
    )
    text += 'all takes a whole folder or list of other photographs, however few per class'
    parser.add_argument('--subset', choices=('test', 'val', 'train', 'all'), help=text)
    parser.add_argument(
        '--save_dir', type=Path, default=Path('evaluation'), help='folder for the figures; created if missing'
    )
    parser.add_argument('--figures', action=argparse.BooleanOptionalAction, default=True, help='draw figures')
    style = parser.add_mutually_exclusive_group()
    style.add_argument('--latex', action='store_true', help='print only tables for booktabs')
    style.add_argument('--csv', action='store_true', help='full precision: one row per run, and one per run and class')
    options.add_inference_args(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked. Raises RunError."""
    args = get_args_parser().parse_args(argv)
    options.check_bounds(args, batch_size=(1, 100_000))
    if args.run_dir and (given := [name for name in OF_CHECKPOINT if getattr(args, name) is not None]):
        raise RunError(f'--{given[0]} needs --checkpoint; --run_dir evaluates runs on their own test images')
    if args.subset in ('train', 'all') and not args.other_images:
        raise RunError(
            f'--subset {args.subset}: holds images that train a model of this split; --other_images takes them'
        )
    return args


def main(args: argparse.Namespace) -> None:
    evaluated = scores.read_all(args.run_dir, args.data_dir) if args.run_dir else run_models(args)
    groups = scores.grouped(evaluated)
    if args.csv:
        print_csv(evaluated)
    else:
        print_tables(groups, args.latex)
    if args.figures:
        draw(groups, args.save_dir)


if __name__ == '__main__':
    with user_errors('evaluate.py'):
        main(parse_args())
