"""Figures of the runs in one folder or several, each as PDF and as PNG; their paths are printed.

    python plot_results.py --run_dir runs/main --save_dir figures --plot all       # every figure that the runs allow
    python plot_results.py --run_dir runs/ablation --models twistnet18,twistnet18_no_ais --plot ablation
    python plot_results.py --log_file runs/main/dtd_fold1_twistnet18_seed42/log.jsonl --save_dir figures --plot gate
    python plot_results.py --checkpoint runs/main/dtd_fold1_twistnet18_seed42/best.pt \\
        --image data/dtd/images/banded/banded_0001.jpg --save_dir figures --plot interaction

bar, forest, radar, scatter and ablation are of complete runs; curves, gate and selection are of all, interrupted ones
too. Runs of different recipes are never pooled: each recipe has figures of its own, bar_1, bar_2 and so on; those whose
models were tuned by run_all.py --tune are of one recipe. What does not fit one page continues in curves_page2 and so
on. What is missing is named in the figure. interaction and tsne are of one model,
from its checkpoint; visualize.py draws them, and more of that kind.
"""

import argparse
import math
import statistics
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from common import options, runs
from common.drawing import (
    COLORS,
    DASHES,
    FULL,
    MARKERS,
    PAGE,
    Axes,
    Figure,
    Line2D,
    MaxNLocator,
    frame,
    line_style,
    make_panels,
    plt,
    save,
)
from common.errors import RunError, user_errors
from common.registry import MODELS, entry_of, model_label, plain_model
from common.results import (
    FoundRun,
    Row,
    Table,
    cell_of,
    initial_gate,
    loaded_note,
    make_tables,
    read_runs,
    recipe_of,
    source_of,
    title_of,
    tuned_note,
)


def chunks(items: list, size: int) -> list[list]:
    """Split a list into as few parts of at most `size` as possible, as even as possible."""
    size = math.ceil(len(items) / max(1, math.ceil(len(items) / size)))
    return [items[i : i + size] for i in range(0, len(items), size or 1)]


def draw_pages(items: list, size: int, title: str, draw: Callable[[list, str], Figure]) -> list[Figure]:
    """A figure for every `size` items, by draw(items, title)."""
    pages = chunks(items, size)
    of = [f' (page {i} of {len(pages)})' * (len(pages) > 1) for i in range(1, len(pages) + 1)]
    return [draw(page, title + which) for page, which in zip(pages, of)]


# ---------------------------------------------------------------------------------------------- reading

Log = dict[int, dict]  # the lines of log.jsonl by epoch
Logs = dict[tuple[str, str], dict[tuple[int, int], Log]]  # by (data set, model), then (fold, seed)


def read_log(path: Path) -> Log:
    return {line['epoch']: line for line in runs.read_log(path, ('epoch', 'train_loss'))}


def read_all(args: argparse.Namespace) -> list[tuple[Table, Logs]]:
    """A table and the logs of each recipe; what was left out is named on stderr. Raises RunError as read_runs."""
    found = read_runs(args, 'run')
    return [(table, logs_of(table, found)) for table in make_tables(found, args)]


def logs_of(table: Table, found: list[FoundRun]) -> Logs:
    """The logs of the runs of a table."""
    logs = defaultdict(dict)
    for run in (run for run in found if run.recipe == table.recipe):
        dataset, model, *cell = cell_of(run.config)
        copies = [read_log(path) for folder in run.folders if (path := folder / 'log.jsonl').exists()]
        logs[dataset, model][tuple(cell)] = max(copies, key=len, default={})
    return dict(logs)


def read_one(args: argparse.Namespace) -> list[tuple[Table, Logs]]:
    """A table without rows and the log of --log_file, with what the files beside it say of the run.

    Raises RunError if there is no such log, or no epoch in it.
    """
    path = args.log_file
    if not (log := read_log(path)):
        raise RunError(f'{path}: holds no complete epoch')
    config, results = (runs.read_json(path.with_name(name)) for name in ('config.json', 'results.json'))
    recipe, source, (dataset, model, *cell) = {}, None, ('', path.parent.name, 1, 0)
    if config:
        recipe, source, (dataset, model, *cell) = recipe_of(config), source_of(config), cell_of(config)
    gates = {model: initial_gate(model, config or {}, results)}
    row = Row(dataset, model, {tuple(cell): results})
    rows = {(dataset, model): row} if 'epochs_run' in (results or {}) else {}  # of a run that --patience ended
    table = Table(recipe, [dataset], [model], rows, labels=args.labels, sources={model: source}, gates=gates)
    return [(table, {(dataset, model): {tuple(cell): log}})]


# ---------------------------------------------------------------------------------------------- words


def shape_of(table: Table, dataset: str) -> str:
    """How many runs a model of a data set has: '5 folds x 2 seeds', or '10 runs' where none has them all."""
    rows = [row for (name, _), row in table.rows.items() if name == dataset]
    if whole := sorted({row.size for row in rows if not row.missing}):
        return ' or '.join(whole).replace(' x ', ' \N{MULTIPLICATION SIGN} ')
    return f'incomplete, of {len(rows[0].results) + len(rows[0].missing)} runs' if rows else 'no complete run'


def list_pairs(table: Table, what: str, pairs: Iterable[tuple[str, str]] | dict[tuple[str, str], str]) -> str:
    """'what: FMD: ResNet-18, w/o AIS; CUB-200: ..', with the values of a dictionary in brackets; '' without pairs."""
    by_dataset = defaultdict(list)
    for dataset, model in pairs:
        more = f' ({pairs[dataset, model]})' if isinstance(pairs, dict) else ''
        by_dataset[dataset].append(model_label(model) + more)
    listed = '; '.join(f'{table.label(name)}: {", ".join(models)}' for name, models in by_dataset.items() if name)
    return f'{what}: {listed}.' if listed else ''


def lacking(table: Table, has: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(data set, model) of a table that `has` lacks."""
    return [(d, m) for d in table.datasets for m in table.models if (d, m) not in has]


def drawn_of(table: Table) -> tuple[list[str], list[str]]:
    """The data sets and the models that have a complete run."""
    datasets, models = (set(names) for names in zip(*table.rows))
    return [name for name in table.datasets if name in datasets], [name for name in table.models if name in models]


def start_notes(table: Table) -> list[str]:
    """Notes that every figure ends with: what was tuned and what was loaded."""
    return [tuned_note(table), loaded_note(table)]


def missing_notes(table: Table) -> list[str]:
    """Notes of radar and scatter: where runs are missing, and of the start."""
    few = [key for key, row in table.rows.items() if row.missing and key[0] in table.datasets]
    missing = {'Fewer runs than others': few, 'No complete run': lacking(table, table.rows)}
    return [list_pairs(table, what, pairs) for what, pairs in missing.items()] + start_notes(table)


def sd_note(table: Table) -> str:
    return ' Whiskers: sample standard deviation over folds.' * any(row.sd is not None for row in table.rows.values())


# ---------------------------------------------------------------------------------------------- bar and ablation


def fill_color(model: str) -> str:
    """Dark for TwistNet-18, middle for the others with STCI and for its trunk, light for those without."""
    if model == FULL:
        return COLORS[0]
    return '#80BFE8' if {'twist', 'stci'} & entry_of(plain_model(model)).keys() else '#D0D0D0'


def draw_lists(
    table: Table, logs: Logs, models: list[str], beside: Callable[[Row], str]
) -> tuple[Figure, dict[str, Axes]]:
    """Panels of bar and ablation, one per data set, a line per model: fold means, spread and a text beside them.

    Without a complete run, a line says why there is none.
    """
    count = len(table.datasets)
    columns = {5: 3, 6: 3}.get(count, min(count, 4))
    line = min(0.24, max(0.16, 2.4 / len(models)))
    size = min(PAGE[0], 1.5 + 2.0 * columns), math.ceil(count / columns) * (line * len(models) + 0.62)
    figure, panels = make_panels(count, columns, size)
    for panel, (dataset, axes) in enumerate(zip(table.datasets, panels)):
        axes.set(ylim=(len(models) - 0.4, -0.6), yticks=range(len(models)), xlabel='test accuracy (%)')
        axes.set_title(f'{table.label(dataset)}\n{shape_of(table, dataset)}')
        axes.set_yticklabels([] if panel % columns else map(model_label, models))
        axes.tick_params(axis='y', length=0)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        for model, label in zip(models, axes.get_yticklabels()):
            label.set_fontweight('bold' if model == FULL else 'normal')
        at = dict(transform=axes.get_yaxis_transform(), va='center_baseline', fontsize=7)
        for place, model in enumerate(models):
            row = table.rows.get((dataset, model))
            if row is None:
                text = 'no complete run' if (dataset, model) in logs else 'no run'
                axes.text(0.03, place, text, style='italic', **at)
                continue
            means = list(row.folds.values())
            places = place + np.linspace(-0.27, 0.27, len(means) + 2)[1:-1]
            axes.plot(means, places, 'o', color='white', mec='black', mew=0.4, ms=2.2, zorder=4, label='folds')
            if row.sd is not None:
                axes.errorbar(row.mean, place, xerr=row.sd, color='black', linewidth=0.8, capsize=2.2, zorder=5)
            text = beside(row) + f' ({len(row.results)})' * bool(row.missing)
            axes.text(1.03, place, text, fontweight='bold' if model == FULL else 'normal', **at)
    return figure, dict(zip(table.datasets, panels))


def rows_at(table: Table, dataset: str, models: list[str]) -> tuple[dict[int, Row], list[float]]:
    """The rows of a panel by their place, and all numbers drawn of them: fold means and the ends of whiskers."""
    rows = {place: table.rows[dataset, m] for place, m in enumerate(models) if (dataset, m) in table.rows}
    ends = [row.mean + side * (row.sd or 0) for row in rows.values() for side in (-1, 1)]
    return rows, ends + [mean for row in rows.values() for mean in row.folds.values()]


def plot_bar(table: Table, logs: Logs, title: str) -> list[Figure]:
    """Mean test accuracy by data set and model, from 0."""
    figure, panels = draw_lists(table, logs, table.models, lambda row: f'{row.mean:.1f}')
    for dataset, axes in panels.items():
        rows, numbers = rows_at(table, dataset, table.models)
        for place, row in rows.items():
            style = dict(color=fill_color(row.model), edgecolor='black', hatch='/////' if row.missing else None)
            axes.barh(place, row.mean, 0.76, linewidth=0.5, **style)
        axes.set_xlim(0, 1.03 * max([1.0, *numbers]))
    notes = ['Bars and numbers: mean over folds, seeds averaged inside a fold. Points: folds.' + sd_note(table)]
    if any(row.missing for row in table.rows.values()):
        notes.append('Hatched, with the number of runs in brackets: incomplete, fewer runs than the panel says.')
    frame(figure, title, notes + start_notes(table))
    return [figure]


def difference(row: Row, full: Row | None) -> str:
    """Difference of means to the full model over the runs that both have, with its sign; '' if there are none."""
    shared = row.results.keys() & (full.results.keys() if full else set())
    if not shared:
        return ''
    own, other = (replace(r, results={cell: r.results[cell] for cell in shared}) for r in (row, full))
    text = f'{own.mean - other.mean:+.1f}'
    return '0.0' if float(text) == 0 else text.replace('-', '\N{MINUS SIGN}')


def plot_ablation(table: Table, logs: Logs, title: str) -> list[Figure]:
    """Mean test accuracy of TwistNet-18's variants by data set, and their difference to the full model."""
    models, loaded = [name for name in MODELS if name.startswith(FULL) and name in table.models], loaded_note(table)
    table = replace(table, rows={key: row for key, row in table.rows.items() if key[1] in models})
    if not any(model != FULL for _, model in table.rows):
        raise RunError(f'no complete run of a variant of {model_label(FULL)}; ablation.py makes them')

    def beside(row: Row) -> str:
        full = table.rows.get((row.dataset, FULL))
        return f'{row.mean:.1f} %' if row is full else difference(row, full)

    figure, panels = draw_lists(table, logs, models, beside)
    for dataset, axes in panels.items():
        rows, numbers = rows_at(table, dataset, models)
        for place, row in rows.items():
            color = 'white' if row.missing else fill_color(row.model)
            axes.plot(row.mean, place, 'D', color=color, mec='black', ms=5, mew=0.7, zorder=3, label='mean')
        if full := table.rows.get((dataset, FULL)):
            axes.axvline(full.mean, color=COLORS[0], linestyle='--', linewidth=0.9, zorder=1, label='full')
        low, high = min(numbers, default=0), max(numbers, default=100)
        pad = 0.06 * (high - low) or 1.0
        axes.set_xlim(max(0, low - pad), high + pad)
        axes.grid(axis='y', color='0.9', linewidth=0.5)
    notes = [
        'Diamonds: mean over folds, seeds averaged inside a fold. Points: folds.' + sd_note(table),
        f'Dashed: {model_label(FULL)}. Numbers: its mean; differences to it in points over the runs that both have.',
        'Open diamonds, with the number of runs in brackets: incomplete, fewer runs than the panel says.'
        * any(row.missing for row in table.rows.values()),
        tuned_note(replace(table, models=models)),
        loaded,
    ]
    frame(figure, title, notes)
    return [figure]


# ---------------------------------------------------------------------------------------------- forest


def plot_forest(table: Table, logs: Logs, title: str) -> list[Figure]:
    """Differences to the baseline with their 95 % intervals, a panel per data set."""
    rows = {key: row for key, row in table.rows.items() if row.difference}
    if not rows:
        raise RunError('no model is compared with a baseline')
    datasets, models = drawn_of(replace(table, rows=rows))
    count = len(datasets)
    columns, height = {5: 3, 6: 3}.get(count, min(count, 4)), 0.16 * len(models) + 0.62
    size = min(PAGE[0], 2.0 + 2.5 * columns), math.ceil(count / columns) * height
    figure, panels = make_panels(count, columns, size)
    for panel, (dataset, axes) in enumerate(zip(datasets, panels)):
        axes.axvline(0, color='0.5', linewidth=0.8, linestyle='--')
        for place, row in ((models.index(model), row) for (name, model), row in rows.items() if name == dataset):
            found, style = row.difference, line_style(row.model) | dict(linestyle='-', linewidth=1.3)
            if 'low' in found:
                axes.plot([found['low'], found['high']], [place, place], **style | dict(marker='|'))
            axes.plot(found['value'], place, **style | dict(markersize=5))
        axes.set(yticks=range(len(models)), ylim=(len(models) - 0.4, -0.6), title=table.label(dataset))
        axes.set_yticklabels([] if panel % columns else map(model_label, models))
        axes.set_xlabel('points')
        axes.margins(x=0.08)
    tested = ['low' in row.difference for row in rows.values()]
    notes = [
        f'Differences to {model_label(table.baseline)}.' + ' Lines: 95 % intervals, as in the tables.' * any(tested)
    ]
    notes += ['Without a line: one fold, or no spread.' * (not all(tested))]
    frame(figure, title, notes + start_notes(table))
    return [figure]


# ---------------------------------------------------------------------------------------------- radar


def plot_radar(table: Table, logs: Logs, title: str) -> list[Figure]:
    """Mean test accuracy with an axis per data set and a polygon per model, open where there is no run."""
    datasets, models = drawn_of(table)
    if len(datasets) < 3:
        raise RunError(f'a radar needs complete runs on at least 3 data sets; there are {len(datasets)}')
    full, others = [FULL] * (FULL in models), [name for name in models if name != FULL]
    groups = [full + group for group in chunks(others, 4)] or [full]  # more in a panel cannot be told apart
    columns = min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    size = (3.4, 5.6, PAGE[0])[columns - 1], (3.3, 2.9, 2.5)[columns - 1] * rows
    figure, panels = make_panels(len(groups), columns, size, subplot_kw=dict(projection='polar'))
    rings = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(0, max(row.mean for row in table.rows.values()))
    for axes, group in zip(panels, groups):
        _draw_polygons(axes, table, datasets, group, rings[1:])
    notes = ['Mean test accuracy in %, 0 at the centre; a polygon is open where a model has no complete run.']
    frame(figure, title, notes + missing_notes(table))
    return [figure]


def _draw_polygons(axes: Axes, table: Table, datasets: list[str], models: list[str], rings: Iterable[float]) -> None:
    axes.set_theta_zero_location('N')
    axes.set_theta_direction(-1)
    angles = np.arange(len(datasets) + 1) * 2 * math.pi / len(datasets)
    for model in models:
        rows = [table.rows.get((dataset, model)) for dataset in [*datasets, datasets[0]]]
        means = [row.mean if row else math.nan for row in rows]
        axes.plot(angles, means, label=model_label(model), **line_style(model))
    axes.set(ylim=(0, rings[-1]), xticks=angles[:-1], xticklabels=[], yticks=rings, yticklabels=[])
    for ring in rings:
        box = dict(boxstyle='square,pad=0.1', color='white', alpha=0.8)
        axes.text(angles[1] / 2, ring, f'{ring:g}', ha='center', va='center', fontsize=7, bbox=box, zorder=5)
    for angle, dataset in zip(angles, datasets):
        side, up = round(math.sin(angle), 3), round(math.cos(angle), 3)
        align = dict(ha='center' if not side else 'left' if side > 0 else 'right', va='bottom' if up > 0 else 'top')
        axes.text(angle, 1.05 * rings[-1], table.label(dataset), fontsize=7, **align)
    axes.grid(color='0.8', linewidth=0.5)
    axes.spines['polar'].set(color='0.8', linewidth=0.5)
    axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.14), borderaxespad=0)


# ---------------------------------------------------------------------------------------------- scatter

COSTS = {'params_M': 'parameters (M)', 'macs_G': 'multiply-adds of an image (G)'}


def plot_scatter(table: Table, logs: Logs, title: str) -> list[Figure]:
    """Mean test accuracy against parameters and against multiply-adds, a row of two panels per data set."""
    datasets, _ = drawn_of(table)
    height = min(3.4, max(2.0, 1.0 + 0.11 * len(table.models)))
    rows = int((PAGE[1] - 0.8) / height)
    return draw_pages(datasets, rows, title, lambda page, title: _scatter_page(table, page, height, title))


def _scatter_page(table: Table, datasets: list[str], height: float, title: str) -> Figure:
    table, count = replace(table, datasets=datasets), len(datasets)
    figure, panels = make_panels(2 * count, 2, (PAGE[0], height * count), sharey='row')
    styles = {model: line_style(model) | dict(linestyle='', markersize=5) for model in table.models}
    unknown = []  # (data set, model) without cost
    for dataset, pair in zip(datasets, zip(panels[::2], panels[1::2])):
        rows = [table.rows[dataset, model] for model in table.models if (dataset, model) in table.rows]
        for axes, (cost, label) in zip(pair, COSTS.items()):
            known = [row for row in rows if row.last(cost) is not None]
            unknown += [(dataset, row.model) for row in rows if row not in known]
            for row in known:
                bar = dict(elinewidth=0.7, capsize=1.5, mec='black', mew=0.4)
                axes.errorbar(row.last(cost), row.mean, yerr=row.sd, **bar, **styles[row.model])
            if not known:
                axes.text(0.5, 0.5, 'not in these results', transform=axes.transAxes, ha='center', style='italic')
                axes.set_xticks([])
            axes.margins(x=0.1, y=0.12)
            axes.set(xlabel=label, title=f'{table.label(dataset)}, {shape_of(table, dataset)}')
        pair[0].set_ylabel('test accuracy (%)')
    notes = ['Mean over folds, seeds averaged inside a fold.' + sd_note(table)]
    notes += [list_pairs(table, 'No MACs in the results', unknown), *missing_notes(table)]
    drawn = [model for model in table.models if any((dataset, model) in table.rows for dataset in datasets)]
    handles = [Line2D([], [], label=model_label(model), mec='black', mew=0.4, **styles[model]) for model in drawn]
    frame(figure, title, notes, handles)
    return figure


# ---------------------------------------------------------------------------------------------- curves and gates


def draw_runs(axes: Axes, series: list[dict[int, float]], **style) -> None:
    """Single runs as thin lines, and their mean over the epochs that all of them have as a strong one."""
    for one in series if len(series) > 1 else ():
        marker = '.' if len(one) == 1 else ''
        axes.plot(list(one), list(one.values()), color=style['color'], lw=0.4, alpha=0.3, marker=marker, zorder=2)
    epochs = sorted(set.intersection(*map(set, series)))
    step = max(1, len(epochs) // 5)
    style |= dict(markevery=(len(axes.lines) % step, step), zorder=3)  # markers of different lines apart
    axes.plot(epochs, [statistics.fmean(one[epoch] for one in series) for epoch in epochs], **style)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))


def plot_curves(table: Table, logs: Logs, title: str) -> list[Figure]:
    """Training loss and validation accuracy by epoch, a row a data set; interrupted runs too. Raises RunError."""
    datasets = [name for name in table.datasets if any(any(logs[key].values()) for key in logs if key[0] == name)]
    if not datasets:
        raise RunError('no run has finished an epoch yet')
    return draw_pages(datasets, 5, title, lambda page, title: _curves_page(table, page, logs, title))


def _curves_page(table: Table, datasets: list[str], logs: Logs, title: str) -> Figure:
    table, groups, count = replace(table, datasets=datasets), panel_groups(table.models), len(datasets)
    size = PAGE[0], max(2.2, 1.55 * count)
    figure, grid = plt.subplots(count, 2 * len(groups), figsize=size, squeeze=False, sharex='row', layout='constrained')
    drawn = {}
    for dataset, row in zip(datasets, grid):
        for model, pair in ((model, pair) for group, pair in zip(groups, row.reshape(-1, 2)) for model in group):
            if series := [log for log in logs.get((dataset, model), {}).values() if log]:
                drawn[dataset, model] = len(series)
                for axes, value in zip(pair, ('train_loss', 'val_acc')):
                    values = [{epoch: line[value] for epoch, line in log.items() if value in line} for log in series]
                    if values := [one for one in values if one]:  # without images of validation there is none
                        draw_runs(axes, values, label=model_label(model), **line_style(model))
        for place, axes in enumerate(row):
            if not axes.lines:
                axes.text(0.5, 0.5, 'no images of validation', transform=axes.transAxes, ha='center', style='italic')
            axes.set_title(table.label(dataset))
            axes.set_ylabel('val. accuracy (%)' if place % 2 else 'training loss')
            axes.set_xlabel('epoch' if dataset == datasets[-1] else '')
            alike = [other.get_ylim() for other in row[place % 2 :: 2]]
            axes.set_ylim(0 if place % 2 else min(low for low, _ in alike), max(high for _, high in alike))
    models = [model for model in table.models if any(model == key[1] for key in drawn)]
    handles = [Line2D([], [], label=model_label(model), **line_style(model)) for model in models]
    frame(figure, title, run_notes(table, logs, drawn), handles)
    return figure


def panel_groups(models: list[str]) -> list[list[str]]:
    """The models of a panel, two panels where they are too many for one; TwistNet-18 is in both."""
    if len(models) <= 9:
        return [models]
    others = [model for model in models if model != FULL]
    parts = [[model for model in others if model.startswith(FULL) == variant] for variant in (False, True)]
    parts = parts if all(parts) else chunks(others, len(others) // 2 + 1)
    return [[FULL] * (FULL in models) + part for part in parts]


def run_notes(table: Table, logs: Logs, drawn: dict[tuple[str, str], int]) -> list[str]:
    """Notes of curves and gate: what the lines are, which runs have not come to their end, and what is missing."""
    counts = sorted(set(drawn.values()))
    several = f'{counts[0]}-{counts[-1]}' if len(counts) > 1 else f'{counts[0]}'
    notes = [f'Thin: single runs, {several} a model. Strong: their mean, as far as all have come.'] * (counts[-1] > 1)
    begun = {key: {cell for cell, log in logs[key].items() if log} for key in drawn}
    short, fewer = {}, {}
    for key in drawn:
        cells = set().union(*(begun[other] for other in begun if other[0] == key[0]))
        if begun[key] < cells:
            fewer[key] = f'{len(begun[key])} of {len(cells)}'
        ended = table.rows[key].results if key in table.rows else {}  # some by --patience
        lasts = [max(log, default=0) for cell, log in logs[key].items() if cell not in ended]
        if behind := sum(last < table.recipe.get('epochs', 0) for last in lasts):
            short[key] = f'{behind} of {len(logs[key])}'
    idle = [key for key in logs if key[0] in table.datasets and not any(logs[key].values())]
    return notes + [
        list_pairs(table, 'Not of all folds and seeds that others have, so their means do not compare', fewer),
        list_pairs(table, 'Runs that have not come to their last epoch', short),
        list_pairs(table, 'No epoch yet', idle),
        list_pairs(table, 'No run', lacking(table, logs)),
        *start_notes(table),
    ]


def plot_gate(table: Table, logs: Logs, title: str) -> list[Figure]:
    """sigmoid(gate) of every block by epoch, a panel per data set and model; runs without gates are left out."""
    return draw_by_block(table, logs, title, 'gates', 'sigmoid(gate)')


def plot_ais_weights(table: Table, logs: Logs, title: str) -> list[Figure]:
    """AIS's mean weight in every block by epoch, over the validation images, as plot_gate."""
    return draw_by_block(table, logs, title, 'selection', 'mean AIS weight')


def draw_by_block(table: Table, logs: Logs, title: str, entry: str, label: str) -> list[Figure]:
    """An entry of the log's lines by block and epoch."""
    found = {}
    for key in ((dataset, model) for dataset in table.datasets for model in table.models):
        series = [{e: line[entry] for e, line in log.items() if line.get(entry)} for log in logs.get(key, {}).values()]
        if any(series):
            found[key] = [log for log in series if log]
    if not found:
        raise RunError(f'no {entry} in the log: only runs of models with STCI, with at least one epoch, have them')
    return draw_pages(
        [*found], 15, title, lambda page, title: _block_page(table, logs, {k: found[k] for k in page}, title, label)
    )


def _block_page(table: Table, logs: Logs, found: dict, title: str, label: str) -> Figure:
    columns = min(3, len(found))
    size = PAGE[0] if columns > 1 else 3.4, max(2.2, 1.6 * math.ceil(len(found) / columns))
    figure, panels = make_panels(len(found), columns, size)
    blocks = sorted({block for series in found.values() for log in series for line in log.values() for block in line})
    styles = {
        block: dict(color=COLORS[i % 6], linestyle=['-', *DASHES][i % 5], marker=['o', *MARKERS][i % 7])
        for i, block in enumerate(blocks)
    }
    starts = {model: table.gates[model] if label == 'sigmoid(gate)' else None for _, model in found}
    for place, (axes, ((dataset, model), series)) in enumerate(zip(panels, found.items())):
        for block in blocks:
            values = [{e: line[block] for e, line in log.items() if block in line} for log in series]
            if values := [one for one in values if one]:
                draw_runs(axes, values, label=block, **styles[block])
        low, high = axes.get_ylim()
        if (start := starts[model]) is not None:
            axes.axhline(start, color='black', linewidth=0.6, linestyle=(0, (1, 2)), zorder=1, label='start')
            low, high = min(low, start), max(high, start)
        pad = max(0, 0.0005 - (high - low)) / 2 + 0.05 * (high - low)  # rounding errors must not fill a panel
        axes.ticklabel_format(axis='y', useOffset=False)
        axes.set_ylim(low - pad, high + pad)
        name = ', '.join(filter(None, [table.label(dataset), model_label(model)]))
        axes.set_title(textwrap.fill(name, int(16 * size[0] / columns)))
        axes.set_ylabel(label if place % columns == 0 else '')
        axes.set_xlabel('epoch' if place + columns >= len(found) else '')
    handles = [Line2D([], [], label=block, **style) for block, style in styles.items()]
    notes = ['Dotted: sigmoid(gate) before training.'] * any(start is not None for start in starts.values())
    notes += run_notes(replace(table, datasets=[]), logs, {key: len(series) for key, series in found.items()})
    frame(figure, title, notes, handles)
    return figure


# ---------------------------------------------------------------------------------------------- command line

# To add a figure, add a function and its entry: it draws one recipe, a figure a page, or raises RunError.
PLOTS = {
    'bar': plot_bar,
    'forest': plot_forest,
    'radar': plot_radar,
    'scatter': plot_scatter,
    'ablation': plot_ablation,
    'curves': plot_curves,
    'gate': plot_gate,
    'selection': plot_ais_weights,
}
OF_LOGS = ('curves', 'gate', 'selection')  # what a single log can show
OF_MODELS = ('interaction', 'tsne')  # what a checkpoint shows


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Draw figures of the runs in one or more folders, as PDF and PNG.')
    options.add_run_args(parser)
    parser.add_argument(
        '--log_file', type=Path, help='log.jsonl of a single run, instead of --run_dir, for curves, gate and selection'
    )
    parser.add_argument('--save_dir', type=Path, default=Path('figures'), help='created if missing')
    parser.add_argument(
        '--plot', choices=(*PLOTS, *OF_MODELS, 'all'), default='all', help='all: every figure the runs allow'
    )
    options.add_inside_args(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    if args.plot in OF_MODELS:
        import visualize  # and with it torch, which the other figures do without

        return visualize.main(argparse.Namespace(**vars(args), view=args.plot, class_name=None))
    inside = argparse.ArgumentParser()
    options.add_inside_args(inside)
    if given := [f'--{name}' for name in vars(inside.parse_args([])) if getattr(args, name) is not None]:
        raise RunError(f'{", ".join(given)}: only for --plot {" and ".join(OF_MODELS)}; visualize.py draws more')
    possible = OF_LOGS if args.log_file else tuple(PLOTS)
    if args.plot != 'all' and args.plot not in possible:
        raise RunError(f'--plot {args.plot} is of several runs: it needs --run_dir instead of --log_file')
    groups = read_one(args) if args.log_file else read_all(args)
    recipes = [table.recipe for table, _ in groups]
    drawn, failures = 0, []
    for plot in possible if args.plot == 'all' else (args.plot,):
        for number, (table, logs) in enumerate(groups, start=1):
            name = f'{plot}_{number}' if len(groups) > 1 else plot
            title = title_of(table, recipes) if table.recipe else ''
            try:
                if not table.rows and plot not in OF_LOGS:
                    raise RunError('no run is complete')
                figures = PLOTS[plot](table, logs, title)
            except RunError as error:
                failures.append(f'{name}: {error}')
                continue
            for page, figure in enumerate(figures, start=1):
                for path in save(figure, args.save_dir, f'{name}_page{page}' if page > 1 else name):
                    print(path)
                drawn += 1
    if not drawn:
        raise RunError('; '.join(failures))
    for failure in failures:
        print(f'not drawn: {failure}', file=sys.stderr)


if __name__ == '__main__':
    with user_errors('plot_results.py'):
        main(get_args_parser().parse_args())
