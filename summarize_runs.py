"""Tables of the complete runs in one folder or several: means, their spread, and what differs from a baseline.

    python summarize_runs.py --run_dir runs/main                                        # text
    python summarize_runs.py --run_dir runs/main --latex > tables/main_results.tex      # also --markdown, --csv
    python summarize_runs.py --run_dir runs/main runs/more --models resnet18,twistnet18 --published

Seeds are averaged inside a fold first; the mean and the sample standard deviation are over folds. Models are compared
with the baseline fold by fold, by the corrected resampled t-test of Nadeau and Bengio (2003) with Holm's correction
over the models of a data set, and only where all of them have the same folds and seeds. Runs of different recipes are
never pooled: each recipe has a table of its own.
"""

import argparse
import csv
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from scipy import stats

import options
import runs
from registry import DATASETS, MODELS
from runs import RunError, counted

LABELS: dict[str, str] = {}  # of data sets, where --labels gives another than the registry's
LEVEL = 0.05  # of significance, after Holm's correction
BASELINES = ('resnet18', 'twistnet18')  # without --baseline: the first of them that has runs
NEEDED = ('dataset', 'fold', 'seed', 'model', 'test_acc', 'n_train', 'n_test', 'params_M', 'fingerprint')
OPTIONAL = dict(macs_G=(0, math.inf), loaded=(0, 1))  # absent or null where a run did not record them
# Not part of a recipe: what tells the runs of one table apart.
CELL = ('dataset', 'model', 'fold', 'seed', 'split', 'pretrained')

# The paper's figures, test accuracy in % and its standard deviation: arXiv 2602.07262, from scratch, 200 epochs.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    'resnet18': dict(dtd=(39.4, 1.2), fmd=(42.6, 3.1), cub200=(54.6, 0.5), flowers102=(43.6, 0.5)),
    'seresnet18': dict(dtd=(36.7, 1.2), fmd=(40.8, 2.8), cub200=(52.0, 0.8), flowers102=(40.5, 0.7)),
    'convnextv2_nano': dict(dtd=(29.1, 1.3), fmd=(29.7, 2.5), cub200=(31.7, 4.0), flowers102=(46.1, 0.6)),
    'fastvit_sa12': dict(dtd=(42.7, 1.4), fmd=(45.0, 3.6), cub200=(49.9, 0.6), flowers102=(59.9, 0.6)),
    'repvit_m1_5': dict(dtd=(39.2, 1.5), fmd=(36.6, 2.2), cub200=(59.7, 0.6), flowers102=(51.6, 0.7)),
    'convnext_tiny': dict(dtd=(11.1, 0.8), fmd=(24.3, 2.7), cub200=(3.2, 1.4), flowers102=(7.5, 0.3)),
    'swin_tiny': dict(dtd=(32.2, 1.2), fmd=(35.9, 3.2), cub200=(33.0, 1.0), flowers102=(48.8, 0.3)),
    'twistnet18': dict(dtd=(45.8, 1.4), fmd=(43.5, 3.8), cub200=(61.8, 0.5), flowers102=(58.5, 0.7)),
    'twistnet18_no_spiral': dict(dtd=(45.6, 1.5)),
    'twistnet18_no_ais': dict(dtd=(44.1, 1.8)),
    'twistnet18_first_order': dict(dtd=(39.4, 1.2)),
}
PUBLISHED_NOTE = (
    'Published: the figures of arXiv 2602.07262 (from scratch, 200 epochs), not measured here; protocols may differ.'
)


# ---------------------------------------------------------------------------------------------- statistics


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


# ---------------------------------------------------------------------------------------------- reading


@dataclass
class Row:
    """One model on one data set under one recipe."""

    dataset: str
    model: str
    accuracies: dict[tuple[int, int], float] = field(default_factory=dict)  # test accuracy in % by (fold, seed)
    missing: list[tuple[int, int]] = field(default_factory=list)  # cells that other models or seeds have
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (n_train, n_test) of each run
    params_M: float = math.nan
    macs_G: float = math.nan  # NaN where a run did not count them
    loaded: set[float] = field(default_factory=set)  # share of the parameters that each run took from given weights
    best: int = 0  # 1 for the highest mean of its data set, 2 for the second; 0 elsewhere and where cells differ
    # Against the baseline: mean difference, ends of its 95 % interval, p and Holm's p.
    difference: tuple[float, float, float, float, float] | None = None

    @property
    def folds(self) -> dict[int, float]:
        """Mean over seeds by fold."""
        by_fold = defaultdict(list)
        for (fold, _), accuracy in sorted(self.accuracies.items()):
            by_fold[fold].append(accuracy)
        return {fold: statistics.fmean(values) for fold, values in by_fold.items()}

    @property
    def mean(self) -> float:
        return statistics.fmean(self.folds.values())

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over folds; None for one fold."""
        return statistics.stdev(self.folds.values()) if len(self.folds) > 1 else None

    @property
    def size(self) -> str:
        """'5 folds x 3 seeds'."""
        counts = {[f for f, _ in self.accuracies].count(fold) for fold in self.folds}
        low, high = min(counts), max(counts)
        return f'{counted(len(self.folds), "fold")} x ' + f'{low}-' * (low < high) + counted(high, 'seed')


@dataclass
class Table:
    """All rows of one recipe; `rows` has a key (data set, model) where at least one run is complete."""

    recipe: dict
    datasets: list[str]
    models: list[str]
    rows: dict[tuple[str, str], Row]
    baseline: str | None  # that the other models are compared with
    notes: list[str]  # what is missing or cannot be compared


def load(run_dirs: list[Path], wanted: list[str] | None = None) -> tuple[list[tuple[dict, dict]], list[str]]:
    """(config, results) of every run of the wanted models, with results None where it is not complete; and notes.

    Raises:
        RunError: no run in a folder, or two runs of one data set that saw different trees of images, or of one fold
            that saw different images.
    """
    found: dict[tuple, tuple[dict, dict | None]] = {}
    bare = [path for run_dir in run_dirs for path in run_dir.glob('*/results.json')]
    notes = [f'left out: {p.parent}: has no config.json' for p in bare if not p.with_name('config.json').exists()]
    seen: dict[tuple, tuple[str, Path]] = {}  # digests of trees by data set, and of splits by data set and fold
    for folder in (folder for run_dir in run_dirs for folder in runs.find_runs(run_dir)):
        try:
            config, results = runs.read_json(folder / 'config.json'), runs.read_json(folder / 'results.json')
            check_run(folder, config, results)
        except RunError as error:
            notes.append(f'left out: {error}')
            continue
        defines = config['defines']
        cell = tuple(defines[key] for key in ('dataset', 'model', 'fold', 'seed'))
        if wanted and defines['model'] not in wanted:
            continue
        if results is None:
            notes.append(f'not complete: {folder}')
        for key, value, what in (
            ((defines['dataset'],), config.get('tree'), 'trees of images'),  # runs of older code did not record it
            ((defines['dataset'], defines['fold']), defines['split'], 'images'),
        ):
            if value is not None and (other := seen.setdefault(key, (value, folder)))[0] != value:
                raise RunError(
                    f'{other[1]} and {folder} are of different {what}, which no table pools; move the runs of each '
                    'into a folder of their own and give one of these to --run_dir'
                )
        key = (config['fingerprint'], *cell)
        if key in found and results is not None and found[key][1] is not None:
            notes.append(f'made twice, taken once: {folder}')
        if key not in found or found[key][1] is None:
            found[key] = config, results
    return list(found.values()), notes


def check_run(folder: Path, config: dict, results: dict | None) -> None:
    """Refuse files that hold something else than train.py writes.

    Raises:
        RunError: naming the file and what is wrong with it.
    """
    path, defines = folder / 'config.json', config.get('defines')
    kinds = dict(dataset=str, model=str, fold=int, seed=int, split=str)
    if not isinstance(defines, dict) or 'fingerprint' not in config:
        raise RunError(f'{path}: has no defines or no fingerprint')
    if wrong := [key for key, kind in kinds.items() if not isinstance(defines.get(key), kind)]:
        raise RunError(f'{path}: {wrong[0]} is {defines.get(wrong[0])!r}')
    if defines['dataset'] not in DATASETS:
        raise RunError(f"{path}: unknown data set '{defines['dataset']}'")
    if results is None:
        return
    path = folder / 'results.json'
    if lacking := [key for key in NEEDED if key not in results]:
        raise RunError(f'{path}: has no {lacking[0]}')
    if results['fingerprint'] != config['fingerprint']:
        raise RunError(f'{path}: is of another configuration')
    bounds = dict(test_acc=(0, 100), n_train=(1, math.inf), n_test=(1, math.inf), params_M=(0, math.inf))
    bounds |= {key: most for key, most in OPTIONAL.items() if results.get(key) is not None}
    for key, (low, high) in bounds.items():
        value = results[key]
        if not isinstance(value, int | float) or not low <= value <= high:
            raise RunError(f'{path}: {key} is {value!r}')


def recipe_of(config: dict) -> dict:
    """What all runs of a table share: the options that define a run, without what tells its cells apart."""
    defines = config['defines']
    return {k: v for k, v in defines.items() if k not in CELL} | dict(pretrained=bool(defines.get('pretrained')))


def make_tables(
    found: list[tuple[dict, dict | None]], baseline: str | None = None, order: list[str] | None = None
) -> list[Table]:
    """A table for each recipe, the one with most runs first.

    Args:
        found: as `load` gives it.
        baseline: the model that others are compared with; by default the first of BASELINES that a table has.
        order: of the models; by default the registry's.

    Raises:
        RunError: runs of one model that started from different weights.
    """
    by_recipe = defaultdict(list)
    for config, results in found:
        by_recipe[tuple(sorted((k, str(v)) for k, v in recipe_of(config).items()))].append((config, results))
    tables = [_make_table(group, baseline, order) for group in by_recipe.values()]
    return sorted(tables, key=lambda table: -sum(len(row.accuracies) for row in table.rows.values()))


def _make_table(group: list[tuple[dict, dict | None]], baseline: str | None, order: list[str] | None) -> Table:
    rows: dict[tuple[str, str], Row] = {}
    cells = defaultdict(set)  # (fold, seed) of every run of a data set, complete or not
    weights = {}
    present = set()
    for config, results in group:
        defines = config['defines']
        key, cell = (defines['dataset'], defines['model']), (defines['fold'], defines['seed'])
        present.add(key)
        cells[key[0]].add(cell)
        if weights.setdefault(key[1], defines.get('pretrained')) != defines.get('pretrained'):
            raise RunError(
                f'runs of {key[1]} start from different weights ({weights[key[1]]} and {defines.get("pretrained")}); '
                'put them into folders of their own'
            )
        if results is not None:
            row = rows.setdefault(key, Row(*key))
            row.accuracies[cell] = results['test_acc']
            row.sizes.append((results['n_train'], results['n_test']))
            row.params_M = results['params_M']
            if results.get('macs_G') is not None:
                row.macs_G = results['macs_G']
            if results.get('loaded') is not None:
                row.loaded.add(results['loaded'])
    datasets = [name for name in DATASETS if name in cells]
    known = list(order or MODELS)
    models = sorted({model for _, model in present}, key=lambda m: (known.index(m) if m in known else len(known), m))
    default = next((name for name in BASELINES if name in models), BASELINES[0])
    table = Table(recipe_of(group[0][0]), datasets, models, rows, baseline or default, [])
    for dataset in datasets:
        _compare(table, dataset, cells[dataset], asked=baseline is not None)
    return table


def _compare(table: Table, dataset: str, cells: set[tuple[int, int]], asked: bool) -> None:
    """Fill in what is missing, the ranks and the differences to the baseline, as far as the cells allow.

    asked: the user named the baseline, so that its absence is said even where there is nothing to compare.
    """
    label = dataset_label(dataset)
    expected = {(fold, seed) for fold, _ in cells for _, seed in cells}
    rows = [table.rows[dataset, model] for model in table.models if (dataset, model) in table.rows]
    for model in table.models:
        if (dataset, model) not in table.rows:
            table.notes.append(f'{label}: no complete run of {model_label(model)}')
    lacking = defaultdict(list)
    for row in rows:
        row.missing = sorted(expected - row.accuracies.keys())
        lacking[', '.join(f'fold {fold} seed {seed}' for fold, seed in row.missing)].append(model_label(row.model))
    for cells, names in lacking.items():
        if cells:
            table.notes.append(f'{label}: {", ".join(names)} {"lack" if names[1:] else "lacks"} {cells}')
    base = table.rows.get((dataset, table.baseline))
    if base is None and (asked or len(rows) > 1):
        table.notes.append(f'{label}: no run of the baseline {model_label(table.baseline)}, so none is compared')
    if len({frozenset(row.accuracies) for row in rows}) > 1:
        table.notes.append(f'{label}: the models have different folds or seeds, so none is ranked or compared')
        return
    means = sorted({round(row.mean, 9) for row in rows}, reverse=True)
    for row in rows:
        row.best = means.index(round(row.mean, 9)) + 1 if len(rows) > 1 and row.mean >= means[:2][-1] - 1e-9 else 0
    if base is None:
        return
    others = [row for row in rows if row is not base]
    tests = []
    for row in others:
        ratio = statistics.fmean(n_test / n_train for n_train, n_test in row.sizes)
        tests.append(corrected_t_test([row.folds[fold] - base.folds[fold] for fold in base.folds], ratio))
    for row, test, adjusted in zip(others, tests, holm([p for *_, p in tests])):
        row.difference = *test, adjusted


# ---------------------------------------------------------------------------------------------- words


def dataset_label(dataset: str) -> str:
    return LABELS.get(dataset) or DATASETS[dataset]['label']


def model_label(model: str) -> str:
    return MODELS[model]['label'] if model in MODELS else model


def describe(table: Table, among: list[dict]) -> str:
    """The title of a table: its recipe's length and size, how its models start, and what tells it from other recipes.

    Args:
        table: the table.
        among: the recipes of all tables.
    """
    recipe, shares = table.recipe, loaded_percent(table)
    differing = {k for other in among for k in recipe if other.get(k) != recipe.get(k)}
    words = [counted(recipe.get('epochs'), 'epoch'), f'{recipe.get("img_size")} px']
    words += ['from ImageNet weights' if recipe['pretrained'] else 'from scratch']
    if any(
        len({p for (name, _), known in shares.items() if name == dataset for p in known}) > 1
        for dataset in table.datasets
    ):
        words += [f'{span(p for known in shares.values() for p in known)} of the parameters loaded']
    return ', '.join(words + [f'{k} {recipe[k]}' for k in sorted(differing - {'epochs', 'img_size', 'pretrained'})])


def loaded_percent(table: Table) -> dict[tuple[str, str], set[int]]:
    """By row of a table from ImageNet weights: the share of the parameters loaded, in whole percent; {} elsewhere."""
    rows = table.rows if table.recipe.get('pretrained') else {}
    return {key: {round(100 * share) for share in row.loaded} for key, row in rows.items()}


def loaded_note(table: Table) -> str:
    """How much of each model of a table from ImageNet weights was loaded; '' elsewhere."""
    shares = loaded_percent(table)
    words = {}
    for model in [name for name in table.models if any(name == model for _, model in shares)]:
        known = {p for (_, name), percent in shares.items() if name == model for p in percent}
        words[model_label(model)] = span(known) if known else 'share not recorded'
    if len(set(words.values())) == 1:
        words = {'': words.popitem()[1]}
    listed = ', '.join(f'{model} {share}'.lstrip() for model, share in words.items())
    return f'Parameters loaded from ImageNet weights: {listed}.' * bool(words)


def span(percent: Iterable[int]) -> str:
    """'6-100 %', or '6 %'."""
    low, *_, high = sorted([*percent] * 2)
    return f'{low}-' * (low < high) + f'{high} %'


def number(value: float, digits: int, unit: str = '') -> str:
    return '-' if math.isnan(value) else f'{value:.{digits}f}{unit}'


def p_text(p: float) -> str:
    if math.isnan(p):
        return '-'
    return '<0.001' if p < 0.001 else f'{p:.3f}'


def explain(table: Table, published: bool, stars: bool = False) -> list[str]:
    """The notes under a table: what its numbers are, what was compared, and what is missing."""
    sizes = defaultdict(list)
    for dataset in table.datasets:
        for size in dict.fromkeys(table.rows[dataset, m].size for m in table.models if (dataset, m) in table.rows):
            sizes[size].append(dataset_label(dataset))
    shape = '; '.join(f'{size} on {", ".join(names)}' for size, names in sizes.items())
    rows = table.rows.values()
    what = 'mean ± sample standard deviation' if any(row.sd is not None for row in rows) else 'mean'
    notes = [f'Test accuracy in %, {what} over folds, seeds averaged inside a fold: {shape}.']
    if differences := [row.difference for row in rows if row.difference]:
        note = f'Differences to {model_label(table.baseline)} in points, paired by fold'
        if not all(math.isnan(p) for *_, p in differences):
            note += f'; * marks p < {LEVEL:g} of' if stars else '; in brackets p of'
            note += (
                " the corrected resampled t-test (Nadeau and Bengio, 2003) after Holm's correction over the models of"
            )
            note += ' a data set'
        notes.append(f'{note}.')
    if shared := [dataset_label(name) for name in table.datasets if DATASETS[name].get('shared_test')]:
        notes.append(f'All folds of {", ".join(shared)} share one test set: spread and p say nothing of other images.')
    notes += filter(None, [loaded_note(table)])
    notes += [f'{note}.' for note in table.notes]
    if any(row.missing for row in table.rows.values()):
        notes.append('† some of its runs are missing.')
    return notes + ([f'{"‡ " * stars}{PUBLISHED_NOTE}'] if published and published_rows(table) else [])


def published_rows(table: Table) -> list[str]:
    """The models whose published figures stand in a table: on its data sets; a variant only beside our own runs."""
    return [
        model
        for model, figures in PUBLISHED.items()
        if figures.keys() & set(table.datasets) and (model in table.models or not model.startswith('twistnet18_'))
    ]


# ---------------------------------------------------------------------------------------------- formats

# How a format writes: the accuracy of a rank, the spread and the p value behind a number, and its signs.
_MARKDOWN_RANK = {1: '**{}**', 2: '<u>{}</u>'}
_LATEX_RANK = {1: r'\textbf{{{}}}', 2: r'\underline{{{}}}'}
TEXT = dict(rank={}, sd=' ± {}', p=' ({})', minus='-', empty='-', missing=' †', published=' (published)')
MARKDOWN = TEXT | dict(rank=_MARKDOWN_RANK)
LATEX = dict(
    rank=_LATEX_RANK, sd=r'\,{{\tiny$\pm${}}}', p=r' {{\tiny({})}}', minus='$-$', empty='--', missing=r'$^\dagger$',
    published=r'$^\ddagger$',
)  # fmt: skip
WIDE = 3  # data sets; a LaTeX table with more has no room for p values and marks the significant ones


def cells_of(table: Table, style: dict, published: bool) -> list[tuple[str, list[list[str]]]]:
    """Sections of a table, (title, rows of cells): the measured rows, the differences, the published rows."""

    def name(model: str) -> str:
        return escape(model_label(model)) if style is LATEX else model_label(model)

    def measured(row: Row | None) -> str:
        if row is None:
            return style['empty']
        text = style['rank'].get(row.best, '{}').format(f'{row.mean:.1f}')
        text += style['sd'].format(f'{row.sd:.1f}') if row.sd is not None else ''
        return text + (style['missing'] if row.missing else '')

    def difference(row: Row | None) -> str:
        if row is None or row.difference is None:
            return ''
        text, adjusted = f'{row.difference[0]:+.1f}'.replace('-', style['minus']), row.difference[4]
        if style is LATEX and len(table.datasets) > WIDE:
            return text + ('$^*$' if adjusted < LEVEL else '')
        return text if math.isnan(adjusted) else text + style['p'].format(p_text(adjusted))

    def given(figures: dict, dataset: str) -> str:
        if dataset not in figures:
            return style['empty']
        mean, sd = figures[dataset]
        return f'{mean:.1f}' + style['sd'].format(sd)

    first, second, third = [], [], []
    for model in table.models:
        rows = [table.rows.get((dataset, model)) for dataset in table.datasets]
        known = [(row.params_M, row.macs_G) for row in rows if row]
        costs = (next((cost for cost in values if not math.isnan(cost)), math.nan) for values in zip(*known))
        size = [number(cost, 2, unit) for cost, unit in zip(costs, 'MG')] or ['-', '-']
        size = [style['empty'] if text == '-' else text for text in size]
        first.append([name(model), *size, *map(measured, rows)])
        if any(row and row.difference for row in rows):
            second.append([name(model), '', '', *map(difference, rows)])
    for model in published_rows(table) if published else ():
        line = [name(model) + style['published'], '', '']
        third.append(line + [given(PUBLISHED[model], dataset) for dataset in table.datasets])
    sections = [('', first), (f'Difference to {model_label(table.baseline)}', second), ('Published', third)]
    return [(title, lines) for title, lines in sections if lines]


def header(table: Table) -> list[str]:
    return ['Model', 'Params', 'FLOPs', *map(dataset_label, table.datasets)]


def print_text(table: Table, title: str, published: bool) -> None:
    print(title)
    sections = cells_of(table, TEXT, published)
    lines = [header(table)] + [line for _, section in sections for line in section]
    widths = [max(map(len, column)) for column in zip(*lines)]

    def show(line: list[str]) -> None:  # names to the left, numbers to the right
        print('  '.join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip())

    show(header(table))
    for name, section in sections:
        if name:
            print(f'{name}:')
        for line in section:
            show(line)
    for note in explain(table, published):
        print(note)


def print_markdown(table: Table, title: str, published: bool) -> None:
    print(f'**{title}**\n')
    print('| ' + ' | '.join(header(table)) + ' |')
    print('|---' + '|---:' * (len(header(table)) - 1) + '|')
    for name, section in cells_of(table, MARKDOWN, published):
        if name:
            print(f'| *{name}* |' + ' |' * (len(header(table)) - 1))
        for line in section:
            print('| ' + ' | '.join(line) + ' |')
    print()
    for note in explain(table, published):
        print(note + '  ')


LATEX_ESCAPES = {c: f'\\{c}' for c in '&%$#_{}'} | {'~': r'\textasciitilde{}', '^': r'\textasciicircum{}'}
LATEX_ESCAPES |= {
    '\\': r'\textbackslash{}',
    '±': r'$\pm$',
    '<': '$<$',
    '*': '$^*$',
    '†': r'$^\dagger$',
    '‡': r'$^\ddagger$',
}


def escape(text: str) -> str:
    """For LaTeX."""
    return ''.join(LATEX_ESCAPES.get(c, c) for c in text)


def print_latex(table: Table, title: str, published: bool) -> None:
    columns = len(table.datasets)
    font = r'\small' if columns <= WIDE else r'\scriptsize'
    notes = explain(table, published, stars=columns > WIDE)
    print('% By summarize_runs.py. Needs \\usepackage{booktabs}.')
    print(rf'\begin{{table*}}[t]{font}\centering\setlength{{\tabcolsep}}{{2pt}}')
    print(rf'\caption{{Test accuracy ({escape(title)}).}}')
    print(r'\begin{tabular}{@{}lrr' + 'c' * columns + '@{}}')
    print(r'\toprule')
    print(' & '.join(map(escape, header(table))) + r' \\')
    for name, section in cells_of(table, LATEX, published):
        print(r'\midrule')
        if name:
            print(rf'\multicolumn{{{columns + 3}}}{{@{{}}l}}{{\emph{{{escape(name)}}}}} \\')
        for line in section:
            print(' & '.join([line[0], *(cell.replace('<', '$<$') for cell in line[1:])]) + r' \\')
    print(r'\bottomrule')
    print(r'\end{tabular}' + '\n\n' + r'\smallskip')
    print(r'\parbox{\linewidth}{\raggedright ' + '\n'.join(map(escape, notes)) + '}')
    print(r'\end{table*}')


CSV_COLUMNS = (
    'source', 'recipe', 'dataset', 'model', 'folds', 'runs', 'mean', 'sd', 'params_M', 'macs_G', 'missing', 'baseline',
    'difference', 'low95', 'high95', 'p', 'p_holm', 'loaded',
)  # fmt: skip


def print_csv(tables: list[tuple[Table, str]], published: bool) -> None:
    """A line for each data set and model, with every digit; empty where there is no number."""
    writer = csv.writer(sys.stdout, lineterminator='\n')
    writer.writerow(CSV_COLUMNS)
    for table, title in tables:
        for note in table.notes:
            print(note, file=sys.stderr)
        for row in table.rows.values():
            missing = ' '.join(f'fold{fold}_seed{seed}' for fold, seed in row.missing)
            line = ['measured', title, row.dataset, row.model, len(row.folds), len(row.accuracies), row.mean, row.sd]
            line += [row.params_M, row.macs_G, missing, table.baseline if row.difference else None]
            line += row.difference or [None] * 5
            line += [' '.join(map(str, sorted(row.loaded)))]
            writer.writerow(['' if isinstance(v, float) and math.isnan(v) else v for v in line])
    for model, figures in PUBLISHED.items() if published else ():
        for dataset, (mean, sd) in figures.items():
            if any(dataset in table.datasets for table, _ in tables):
                line = ['published', '', dataset, model, '', '', mean, sd]
                writer.writerow(line + [''] * (len(CSV_COLUMNS) - len(line)))


# ---------------------------------------------------------------------------------------------- command line


def add_run_args(parser: argparse.ArgumentParser) -> None:
    """Which runs: shared with plot_results.py."""
    parser.add_argument('--run_dir', type=Path, nargs='+', default=[Path('runs')], help='one folder or several')
    parser.add_argument('--models', type=lambda text: text.split(','), help='only these, in this order: a,b')
    parser.add_argument(
        '--labels',
        type=options.labels,
        default={},
        metavar='KEY=NAME,..',
        help="other names for data sets, for a tree of one's own in DTD's layout, say",
    )
    parser.add_argument(
        '--baseline', help=f'the model that the others are compared with (default: {", else ".join(BASELINES)})'
    )


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Tables of the complete runs in one folder or several.')
    add_run_args(parser)
    style = parser.add_mutually_exclusive_group()
    style.add_argument('--latex', action='store_true', help='tables for booktabs, nothing else on stdout')
    style.add_argument('--markdown', action='store_true')
    style.add_argument('--csv', action='store_true', help='every digit, with intervals and both p values')
    parser.add_argument('--published', action='store_true', help="the paper's figures too, marked as such")
    return parser


def check_names(args: argparse.Namespace) -> None:
    """Take the labels of data sets; refuse a model or a data set that the registry does not have.

    Raises:
        RunError: naming it.
    """
    for option, names in (('models', args.models or ()), ('baseline', [args.baseline] if args.baseline else [])):
        _need_known(option, names, MODELS)
    take_labels(args.labels)


def take_labels(labels: dict[str, str]) -> None:
    """The names of data sets that --labels gives. Raises RunError for one that the registry does not have."""
    _need_known('labels', labels, DATASETS)
    LABELS.update(labels)


def _need_known(option: str, names: Iterable[str], known: dict) -> None:
    if unknown := [name for name in names if name not in known]:
        raise RunError(f"--{option}: unknown '{unknown[0]}'; there are: {', '.join(known)}")


def read_runs(args: argparse.Namespace, what: str) -> list[tuple[dict, dict | None]]:
    """The runs that the options ask for, as `load` gives them; what was left out is named on stderr.

    Args:
        args: those of add_run_args.
        what: 'run' for any, 'complete run' where one at least must be.

    Raises:
        RunError: there is no such run, or a name is not known.
    """
    check_names(args)
    found, notes = load(args.run_dir, args.models)
    for note in notes:
        print(note, file=sys.stderr)
    if not any(results or what == 'run' for _, results in found):
        of = f' of {", ".join(args.models)}' if args.models else ' that can be read'
        raise RunError(f'{", ".join(map(str, args.run_dir))}: no {what}{of}')
    return found


def read_tables(args: argparse.Namespace) -> list[Table]:
    """The tables that the options ask for."""
    found = read_runs(args, 'complete run')
    return [table for table in make_tables(found, args.baseline, args.models) if table.rows]


def main(args: argparse.Namespace) -> None:
    tables = read_tables(args)
    recipes = [table.recipe for table in tables]
    titled = [(table, describe(table, recipes)) for table in tables]
    if len(tables) > 1:
        print(f'note: {len(tables)} recipes, a table each', file=sys.stderr)
    if args.published and not any(map(published_rows, tables)):
        print('note: --published: the paper has no figures for these data sets', file=sys.stderr)
    if args.csv:
        return print_csv(titled, args.published)
    show = print_latex if args.latex else print_markdown if args.markdown else print_text
    for index, (table, title) in enumerate(titled):
        print('\n' * (index > 0), end='')
        show(table, title, args.published)


if __name__ == '__main__':
    with runs.user_errors('summarize_runs.py'):
        main(get_args_parser().parse_args())
