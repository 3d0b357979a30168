"""Tables of the complete runs in one folder or several: means, their spread, and what differs from a baseline.

    python summarize_runs.py --run_dir runs/main                                        # text
    python summarize_runs.py --run_dir runs/main --latex > tables/main_results.tex      # also --markdown, --csv
    python summarize_runs.py --run_dir runs/main runs/more --models resnet18,twistnet18 --published
    python summarize_runs.py --run_dir runs/main --val                                  # validation accuracy too
    python summarize_runs.py --run_dir runs/main --intervals                            # and 95 % intervals

Seeds are averaged inside a fold first; the mean and the sample standard deviation are over folds. Models are compared
with the baseline fold by fold, by the corrected resampled t-test of Nadeau and Bengio (2003) with Holm's correction
over the models of a data set, and only where all of them have the same folds and seeds. Runs of different recipes are
never pooled: each recipe has a table of its own. Options that run_all.py --tune chose for each model are the exception:
they make one table, whose notes say what was tried and what was chosen.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from common import grid, options, tables
from common.errors import user_errors
from common.registry import DATASETS, model_label
from common.results import Row, Table, loaded_note, make_tables, read_runs, title_of, tuned_note
from common.statistics import LEVEL, p_text
from common.tables import escape

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


# ---------------------------------------------------------------------------------------------- words


def notes_of(table: Table, stars: bool = False) -> list[str]:
    """The notes under a table: what its numbers are, what was compared, and what is missing."""
    sizes = defaultdict(list)
    for dataset in table.datasets:
        for size in dict.fromkeys(table.rows[dataset, m].size for m in table.models if (dataset, m) in table.rows):
            sizes[size].append(table.label(dataset))
    shape = '; '.join(f'{size} on {", ".join(names)}' for size, names in sizes.items())
    rows = table.rows.values()
    what = 'mean ± sample standard deviation' if any(row.sd is not None for row in rows) else 'mean'
    notes = [f'Test accuracy in %, {what} over folds, seeds averaged inside a fold: {shape}.']
    if any(row.difference for row in rows):
        note = f'Differences to {model_label(table.baseline)} in points, paired by fold'
        if any('p' in row.difference for row in rows):
            note += f'; * marks p < {LEVEL:g} of' if stars else '; in brackets p of'
            note += (
                " the corrected resampled t-test (Nadeau and Bengio, 2003) after Holm's correction over the models of"
                ' a data set'
            )
        notes.append(f'{note}.')
    notes += interval_notes(table) if 'intervals' in table.asked else []
    if shared := [table.label(name) for name in table.datasets if DATASETS.get(name, {}).get('shared_test')]:
        notes.append(
            f'All folds of {", ".join(shared)} share one test set: spread, intervals and p say nothing of other images.'
        )
    if table.recipe.get('train_on') == 'trainval' and 'probe' not in table.recipe:
        notes.append('Trained on the images of train and val; the last epoch is tested.')
    elif 'val' in table.asked:
        notes.append('val.: validation accuracy in %, which chose the epoch, averaged alike.')
    notes += filter(None, [tuned_note(table), loaded_note(table)])
    notes += [f'{note}.' for note in table.notes]
    if any(row.missing for row in rows):
        notes.append('† some of its runs are missing.')
    if published_rows(table):
        figures = 'Published: the figures of arXiv 2602.07262 (from scratch, 200 epochs), not measured here'
        notes.append(f'{"‡ " * stars}{figures}; protocols may differ.')
    return notes


def interval_notes(table: Table) -> list[str]:
    """What --intervals adds: what its columns are, and how large a difference must be to be found."""
    notes = [
        'from, to: 95 % intervals of the means and differences, widened for training images that folds share, not by '
        "Holm's correction; there is none of a single fold or without spread."
    ]
    for name in table.datasets:
        rows = [row for row in table.rows.values() if row.dataset == name and 'p' in row.difference]
        if sizes := ', '.join(f'{row.detectable:.1f} ({model_label(row.model)})' for row in rows):
            notes.append(
                f'True differences that 80 % of such studies would find on {table.label(name)}, at the strictest step '
                f"of Holm's correction and if the spread is as measured: {sizes} points."
            )
    return notes


def published_rows(table: Table) -> list[str]:
    """The models whose published figures a table shows: on its data sets; a variant only beside our own runs."""
    return [
        model
        for model, figures in PUBLISHED.items()
        if 'published' in table.asked
        and figures.keys() & set(table.datasets)
        and (model in table.models or not model.startswith('twistnet18_'))
    ]


# ---------------------------------------------------------------------------------------------- cells

# How a format writes: plain text, the accuracy of a rank, the spread and the p value behind a number, and its signs.
TEXT = dict(escape=str, rank={}, sd=' ± {}', p=' ({})', minus='-', empty='-', missing=' †', published=' (published)')
MARKDOWN = TEXT | dict(rank={1: '**{}**', 2: '<u>{}</u>'})
LATEX = dict(
    escape=escape, rank={1: r'\textbf{{{}}}', 2: r'\underline{{{}}}'}, sd=r'\,{{\tiny$\pm${}}}', p=r' {{\tiny({})}}',
    minus='$-$', empty='--', missing=r'$^\dagger$', published=r'$^\ddagger$',
)  # fmt: skip
WIDE = 3  # data sets; a LaTeX table with more has no room for p values and marks the significant ones


def accuracy_text(row: Row, style: dict) -> str:
    text = style['rank'].get(row.best, '{}').format(f'{row.mean:.1f}')
    text += style['sd'].format(f'{row.sd:.1f}') if row.sd is not None else ''
    return text + (style['missing'] if row.missing else '')


@dataclass(frozen=True)
class Column:
    """A column of the tables."""

    name: str  # its header in the CSV
    value: Callable[[Row], Any]  # what it shows of a row, with every digit; None where that is not known
    title: str | None = None  # its header in text, Markdown and LaTeX, {} the data set; None leaves it to the CSV
    text: str | Callable[[Row, dict], str] = '{}'  # what these write: a format of the value, or a function of the style
    align: str = 'r'  # or 'l'
    difference: str | None = None  # what it shows of a row's difference to the baseline: a key of it
    each: bool = False  # a column for each data set, after the others; else the first data set whose value is known
    asked: str | None = None  # the option that shows it; None for always


# To add a column, add an entry. The first with a title is the model's name. With `each`, the title holds {} for the
# data set's name; columns without it stand left of those of the data sets.
COLUMNS = (
    Column('dataset', lambda row: row.dataset),
    Column('model', lambda row: row.model, 'Model', align='l'),
    Column('folds', lambda row: len(row.folds)),
    Column('runs', lambda row: len(row.results)),
    Column('mean', lambda row: row.mean, '{}', accuracy_text, difference='value', each=True),
    Column('mean_low95', lambda row: row.interval[0], 'from', '{:.1f}', difference='low', each=True, asked='intervals'),
    Column('mean_high95', lambda row: row.interval[1], 'to', '{:.1f}', difference='high', each=True, asked='intervals'),
    Column('sd', lambda row: row.sd),
    Column('val_acc', lambda row: row.mean_of('best_val_acc'), 'val.', '{:.1f}', each=True, asked='val'),
    Column('params_M', lambda row: row.last('params_M'), 'Params', '{:.2f}M'),
    Column('macs_G', lambda row: row.last('macs_G'), 'FLOPs', '{:.2f}G'),
    Column('missing', lambda row: ' '.join(f'fold{fold}_seed{seed}' for fold, seed in row.missing)),
    Column('baseline', lambda row: row.baseline),
    Column('difference', lambda row: row.difference.get('value')),
    Column('low95', lambda row: row.difference.get('low')),
    Column('high95', lambda row: row.difference.get('high')),
    Column('detectable', lambda row: row.detectable),
    Column('p', lambda row: row.difference.get('p')),
    Column('p_holm', lambda row: row.difference.get('p_holm')),
    Column('last_acc', lambda row: row.mean_of('test_acc_last')),
    Column('seconds', lambda row: statistics.median(row.recorded('seconds')) if row.recorded('seconds') else None),
    Column('loaded', lambda row: ' '.join(map(str, sorted(set(row.recorded('loaded')))))),
    Column('tuned', lambda row: row.tuned and grid.text_of(row.tuned['options'])),
    Column('tuned_settings', lambda row: row.tuned and row.tuned['tried']),
    Column('tuned_among', lambda row: row.tuned and row.tuned['tune']),
    Column('tuned_on', lambda row: row.tuned and 'validation fold{fold}_seed{seed}'.format(**row.tuned)),
)


def columns_of(table: Table) -> list[Column]:
    return [column for column in COLUMNS if column.asked is None or column.asked in table.asked]


def slots_of(table: Table) -> list[tuple[Column, str | None]]:
    """The columns of a table that is not a CSV, with the data set of those that have one."""
    shown = [column for column in columns_of(table) if column.title is not None]
    slots = [(column, None) for column in shown if not column.each]
    return slots + [(column, dataset) for dataset in table.datasets for column in shown if column.each]


def head_of(table: Table) -> tuple[str, list[str]]:
    """The alignment and the header of each column."""
    slots = slots_of(table)
    header = [column.title.format(dataset and table.label(dataset)) for column, dataset in slots]
    return ''.join(column.align for column, _ in slots), header


def sections_of(table: Table, style: dict) -> list[tuple[str, list[list[str]]]]:
    """Sections of a table, (title, lines of cells): the measured rows, the differences, the published rows."""
    slots = slots_of(table)[1:]

    def measured(model: str, column: Column, dataset: str | None) -> str:
        rows = [table.rows.get((name, model)) for name in ([dataset] if dataset else table.datasets)]
        row = next((row for row in rows if row and column.value(row) is not None), None)
        if row is None:
            return style['empty']
        text = column.text
        if callable(text):
            return text(row, style)
        return style['escape'](text.format(column.value(row))).replace('-', style['minus'])

    def difference(model: str, column: Column, dataset: str | None) -> str:
        row = table.rows.get((dataset, model))
        value = row.difference.get(column.difference) if row else None
        if value is None:
            return ''
        text, p = f'{value:+.1f}'.replace('-', style['minus']), row.difference.get('p_holm')
        if p is None or column.name != 'mean':
            return text
        if style is LATEX and len(table.datasets) > WIDE:
            return text + '$^*$' * (p < LEVEL)
        return text + style['p'].format(style['escape'](p_text(p)))

    def given(model: str, column: Column, dataset: str | None) -> str:
        if column.name != 'mean':
            return ''
        mean, sd = PUBLISHED[model].get(dataset, (None, None))
        return style['empty'] if mean is None else f'{mean:.1f}' + style['sd'].format(sd)

    def lines(models: list[str], cell: Callable[[str, Column, str | None], str], mark: str = '') -> list[list[str]]:
        return [
            [style['escape'](model_label(model)) + mark, *(cell(model, *slot) for slot in slots)] for model in models
        ]

    compared = [m for m in table.models if any(row.difference for row in table.rows.values() if row.model == m)]
    sections = {
        '': lines(table.models, measured),
        f'Difference to {model_label(table.baseline)}': lines(compared, difference),
        'Published': lines(published_rows(table), given, style['published']),
    }
    return [(title, section) for title, section in sections.items() if section]


# ---------------------------------------------------------------------------------------------- formats


def print_text(table: Table, title: str, markdown: bool = False) -> None:
    style, section_title = (MARKDOWN, '*{}*') if markdown else (TEXT, '{}:')
    lines = []
    for name, section in sections_of(table, style):
        lines += [[section_title.format(name)]] * bool(name) + section
    print(f'**{title}**\n' if markdown else title)
    tables.print_text(*head_of(table), lines, 'pipe' if markdown else 'plain')
    print('\n' * markdown + '\n'.join(note + '  ' * markdown for note in notes_of(table)))


def print_latex(table: Table, title: str) -> None:
    many, (align, header), lines = len(table.datasets) > WIDE, head_of(table), []
    for name, section in sections_of(table, LATEX):
        if name:
            lines += [r'\midrule', rf'\multicolumn{{{len(align)}}}{{@{{}}l}}{{\emph{{{escape(name)}}}}} \\']
        lines += section
    size = len(align)  # large with --val or --intervals
    font = r'\tiny' if size > 10 else r'\scriptsize' if many or size > 8 else r'\small'
    gap = '1.5pt' if size > 14 else '2pt'
    print('% By summarize_runs.py. Needs \\usepackage{booktabs}.')
    print(rf'\begin{{table*}}[t]{font}\centering\setlength{{\tabcolsep}}{{{gap}}}')
    print(rf'\caption{{Test accuracy ({escape(title)}).}}')
    tables.print_latex(f'@{{}}{align}@{{}}', [' & '.join(map(escape, header)) + r' \\'], lines)
    notes = '\n'.join(map(escape, notes_of(table, stars=many)))
    print('\n\\smallskip', rf'\parbox{{\linewidth}}{{\raggedright {notes}}}', r'\end{table*}', sep='\n')


def print_csv(titled: list[tuple[Table, str]]) -> None:
    """A line for each data set and model, with every digit; empty where there is no number."""
    lines = []
    for table, title in titled:
        for note in table.notes:
            print(note, file=sys.stderr)
        for row in table.rows.values():
            lines.append(dict(source='measured', recipe=title) | {c.name: c.value(row) for c in columns_of(table)})
    datasets = {name for table, _ in titled if 'published' in table.asked for name in table.datasets}
    for model, figures in PUBLISHED.items():
        for dataset in (name for name in figures if name in datasets):
            mean, sd = figures[dataset]
            known = dict(source='published', dataset=dataset, model=model, mean=mean, sd=sd)
            lines.append({name: known.get(name) for name in lines[0]})
    tables.print_csv(lines)


# ---------------------------------------------------------------------------------------------- command line


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Print tables of the complete runs in one or more folders.')
    options.add_run_args(parser)
    style = parser.add_mutually_exclusive_group()
    style.add_argument('--latex', action='store_true', help='print only tables for booktabs')
    style.add_argument('--markdown', action='store_true', help='Markdown tables')
    style.add_argument(
        '--csv',
        action='store_true',
        help='full precision, with intervals of differences and p values before and after correction',
    )
    parser.add_argument('--val', action='store_true', help='also show validation accuracy')
    parser.add_argument('--intervals', action='store_true', help='also show 95 %% intervals and detectable differences')
    parser.add_argument('--published', action='store_true', help="also show the paper's results, marked as such")
    return parser


def read_tables(args: argparse.Namespace) -> list[Table]:
    """The tables that the options ask for."""
    asked = tuple(name for name in ('val', 'intervals', 'published') if getattr(args, name))
    found = make_tables(read_runs(args, 'complete run'), args)
    return [replace(table, asked=asked) for table in found if table.rows]


def main(args: argparse.Namespace) -> None:
    found = read_tables(args)
    recipes = [table.recipe for table in found]
    titled = [(table, title_of(table, recipes)) for table in found]
    if len(found) > 1:
        print(f'note: {len(found)} recipes, a table each', file=sys.stderr)
    if args.published and not any(map(published_rows, found)):
        print('note: --published: the paper has no figures for these data sets', file=sys.stderr)
    if args.csv:
        return print_csv(titled)
    for index, (table, title) in enumerate(titled):
        print('\n' * (index > 0), end='')
        if args.latex:
            print_latex(table, title)
        else:
            print_text(table, title, args.markdown)


if __name__ == '__main__':
    with user_errors('summarize_runs.py'):
        main(get_args_parser().parse_args())
