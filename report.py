"""Write one HTML page of the runs in one folder or several, for whoever would rather look than read.

    python report.py --run_dir runs/main --out report.html
    python report.py --run_dir runs/main --every 60       # again each minute, until all are complete

The page has the tables of summarize_runs.py, the figures of plot_results.py, the scores and mistakes of evaluate.py,
and the state of each run; of a single model, what it gets right and wrong comes first. Nothing lies outside the file:
it can be sent, printed and read on a phone. With --every, a browser that shows it loads it again by itself.
"""

import argparse
import base64
import contextlib
import io
import re
import shlex
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup, escape
from PIL import Image

import evaluate
import plot_results
import summarize_runs
from common import grid, options, runs, scores
from common.drawing import Figure, plt, thumbnail
from common.errors import DataError, RunError, user_errors
from common.images import open_image
from common.registry import dataset_label, model_label
from common.results import FoundRun, Table, cell_of, make_tables, read_runs, title_of

TEMPLATE = Path(__file__).with_name('report.html.jinja')
FIGURES = {'Differences': 'forest', 'Learning curves': 'curves', 'Gates': 'gate', 'Selection': 'selection'}
QUIET = 60  # seconds in which no run begins or goes on: a grid is over, which does not say how many it has
PICTURES, SIDE = 180, 160  # at most: more than 15 models show fewer mistakes each; and their pixels, for 7 kB each
COUNTS = '{n_train} to train, {n_val} to validate, {n_test} to test'  # of results.json
OTHERWISE = ('model', 'fold', 'seed', 'force', 'tuned')  # options that a command shows at its front, or not at all
NONE = '\N{EN DASH}'  # for a number that there is not
HTML = summarize_runs.TEXT | dict(escape=lambda text: str(escape(text)), rank={1: '<b>{}</b>', 2: '<u>{}</u>'})
HTML |= dict(sd=' <small>± {}</small>', p=' <small>({})</small>', minus='\N{MINUS SIGN}', empty=NONE)


def svg_of(figure: Figure) -> Markup:
    """A figure as SVG inside a page: text is text, black is the colour of the page's text, nothing points elsewhere."""
    text = io.StringIO()
    with plt.rc_context({'svg.fonttype': 'none'}):
        figure.savefig(text, format='svg', transparent=True, dpi=150)  # of the cells of confusions
    plt.close(figure)
    head = r'^.*?(?=<svg )|<metadata>.*?</metadata>|<style.*?</style>| xmlns(:xlink)?="[^"]*"| id="[A-Za-z.]+(2d)?_\d+"'
    svg = re.sub(head, '', text.getvalue(), flags=re.DOTALL)
    svg = re.sub('width="[^"]*" height="[^"]*"', f'style="--width: {7.5 * figure.get_figwidth():.1f}rem"', svg, count=1)
    return Markup(re.sub('(fill|stroke): #000000', r'\1: currentColor', svg))


def show_table(table: Table, logs: plot_results.Logs, title: str) -> dict:
    """The table of summarize_runs.py --intervals, with its notes and the figures that its runs allow."""
    table.asked = ('intervals',) if any(row.sd for row in table.rows.values()) else ()
    (align, head), figures = summarize_runs.head_of(table), []
    sections = [(name, [map(Markup, row) for row in rows]) for name, rows in summarize_runs.sections_of(table, HTML)]
    notes = summarize_runs.notes_of(table) if table.rows else ['No run is complete yet.']
    for heading, plot in FIGURES.items():
        with contextlib.suppress(RunError):  # nothing to compare, no epoch yet, no gates
            figures += [(heading, svg_of(figure)) for figure in plot_results.PLOTS[plot](table, logs, title)]
    return dict(title=title, align=align, head=head, sections=sections, notes=notes, figures=figures)


def show_group(group: list[scores.EvaluatedRun], most: int) -> dict:
    """What a model gets right and wrong: scores, classes, confusions and at most `most` mistakes."""
    overall = zip(scores.OVERALL.values(), evaluate.texts(*scores.over_folds(group, 'overall')))
    (mistakes, bits, worst), pictures, lost = evaluate.worst_of(group, most), [], []
    confusion = sum(one.confusion for one in group)
    for path, words in worst:
        jpeg = io.BytesIO()
        try:
            Image.fromarray(thumbnail(open_image(path, bits), SIDE)).save(jpeg, 'JPEG', quality=75)
        except DataError:
            lost.append(path)
        pictures.append((base64.b64encode(jpeg.getvalue()).decode(), words))
    return dict(
        title=scores.title_of(group),
        right=f'{confusion.trace()} of {confusion.sum()} {"predictions for " * (len(group) > 1)}test images are right.',
        overall=', '.join(f'{name} {text}' for name, text in overall if text != '-'),
        classes=evaluate.classes_of(group),
        confusion=svg_of(evaluate.draw_confusion(group)),
        mistakes=mistakes,
        pictures=pictures,
        lost=lost,
    )


def state_of(run: FoundRun) -> grid.State:
    if run.results is not None:
        return grid.State.COMPLETE
    if any(map(runs.is_claimed, run.folders)):
        return grid.State.RUNNING
    return grid.State.DIVERGED if any(map(has_ended, run.folders)) else grid.State.INTERRUPTED


def has_ended(folder: Path) -> bool:
    """Whether a run is complete or has diverged, and its process is gone."""
    marked = (folder / 'results.json').exists() or (folder / runs.DIVERGED_MARK).exists()
    return marked and not runs.is_claimed(folder)


def show_run(run: FoundRun, log: plot_results.Log) -> list[str]:
    """A row of the table of runs: folder, state, epoch, seconds, accuracies."""
    results, epochs = run.results or {}, run.config['defines'].get('epochs')  # of probe.py there are none
    epoch = f'{max(log, default=0)}/{epochs}' if epochs else NONE
    seconds = results.get('seconds', sum(line.get('seconds', 0) for line in log.values()))
    found = map(results.get, ('best_val_acc', 'test_acc'))
    accuracies = [NONE if value is None else f'{value:.2f}' for value in found]
    return [run.folders[0].name, state_of(run).value, epoch, f'{seconds:.0f}', *accuracies]


def show_commands(found: list[FoundRun]) -> list[str]:
    """The commands that make the runs, one for all that differ by model, fold and seed alone."""
    kinds, lines = defaultdict(list), []
    for run in found:
        made, words = run.config.get('options', {}), []
        for key in (key for key in made.get('given', ()) if key not in OTHERWISE):
            name, value = 'import' if key == 'imports' else key, made[key]
            words += [f'--{name}', *map(str, value)] if isinstance(value, list) else grid.words_of({name: value})
        kinds[tuple(words) if 'given' in made else None].append(run.config['defines'])
    for words, cells in kinds.items():
        many, command = 's' * (len(cells) > 1), ['python', 'run_all.py' if len(cells) > 1 else 'train.py']
        for key in ('model', 'fold', 'seed'):
            command += [f'--{key}{many}', ','.join(dict.fromkeys(str(cell[key]) for cell in cells))]
        unknown = f'# the command of {runs.counted(len(cells), "run")} is not recorded'
        lines.append(unknown if words is None else shlex.join([*command, *words]))
    return lines


def show_facts(found: list[FoundRun], labels: dict[str, str]) -> dict[str, list[str]]:
    """What was trained on what, on which machine and commit, and when, each with the number of its runs."""
    facts, dates = defaultdict(Counter), []
    for run in found:
        made, environment = (run.config.get(key, {}) for key in ('options', 'environment'))
        where, name = made.get('lists') or made.get('data_dir'), dataset_label(cell_of(run.config)[0], labels)
        counts = COUNTS.format(**run.results) if run.results else 'not counted yet'
        facts['Images'][f'{name}{f" in {where}" * bool(where)}: {counts}'] += 1
        facts['Runs'][state_of(run).value] += 1
        facts['Machine'][', '.join(f'{k} {v}' for k, v in environment.items() if k != 'commit') or 'not recorded'] += 1
        facts['Commit'][environment.get('commit') or 'not recorded'] += 1
        files = [folder / name for folder in run.folders for name in ('config.json', 'log.jsonl', 'results.json')]
        dates += [path.stat().st_mtime for path in files if path.exists()]
    first, last = (time.strftime('%Y-%m-%d %H:%M', time.localtime(pick(dates))) for pick in (min, max))
    facts['Files dated'][f'{first} to {last}'] = len(found)
    return {key: [f'{text} ({runs.counted(n, "run")})' for text, n in each.items()] for key, each in facts.items()}


def make_page(args: argparse.Namespace, said: io.StringIO, live: bool) -> str:
    """The page; `said` gets what reading the runs prints on stderr, and `live` lets browsers load it again."""
    found = read_runs(args, 'run' if args.every else 'complete run')
    tables, evaluated, parts = make_tables(found, args), [], []
    for run in (run for run in found if run.results is not None):
        folder = next(folder for folder in run.folders if (folder / 'results.json').exists())
        try:
            evaluated.append(scores.read_evaluated(folder, args.data_dir))
        except RunError as error:
            print(f'left out: {error}', file=sys.stderr)
    groups = scores.grouped(evaluated)
    most = min(evaluate.MISTAKES, max(1, PICTURES // max(1, len(groups))))
    for table in tables:
        logs, rows, shown = plot_results.logs_of(table, found), [], []
        for run in (run for run in found if run.recipe == table.recipe):
            dataset, model, *cell = cell_of(run.config)
            rows.append(show_run(run, logs[dataset, model][tuple(cell)]))
            shown += [group for group in groups if group[0].name in map(str, run.folders)]
        shown.sort(key=lambda group: table.models.index(group[0].model))
        part = show_table(table, logs, title_of(table, [table.recipe for table in tables]))
        parts.append(part | dict(groups=[show_group(group, most) for group in shown], runs=rows))
    models = dict.fromkeys(model_label(model) for table in tables for model in table.models)
    datasets = dict.fromkeys(table.label(name) for table in tables for name in table.datasets)
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    return template.render(
        title=f'{", ".join(models) if len(models) < 5 else f"{len(models)} models"} on {", ".join(datasets)}',
        facts=show_facts(found, args.labels),
        commands=show_commands(found),
        parts=parts,
        alone=len(models) == len(datasets) == len(parts) == 1,  # nothing to compare
        every=args.every if live else None,
        left_out=said.getvalue().splitlines(),
        written=time.strftime('%Y-%m-%d %H:%M:%S'),
    )


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Write one HTML page of the runs in one or more folders.')
    options.add_run_args(parser)
    parser.add_argument('--out', type=Path, default=Path('report.html'), help='the page; its folder is made if missing')
    text = 'write the page again after so many seconds, until all runs have been complete for a minute'
    parser.add_argument('--every', type=int, metavar='SECONDS', help=text)
    text = 'root of the data set, for pictures of mistakes where it has moved; if not given, that of the run'
    parser.add_argument('--data_dir', help=text)
    return parser


def main(args: argparse.Namespace) -> None:
    options.check_bounds(args, every=(1, 86_400))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    before, changed, live = None, 0, True
    while live:
        first = before is None
        begun = {p.parent for top in args.run_dir for p in top.glob('*/*') if p.name in ('config.json', runs.LOG)}
        if begun != before or not all(map(has_ended, begun)):
            before, changed = begun, time.monotonic()
        live = args.every is not None and time.monotonic() < changed + QUIET
        try:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                page = make_page(args, said, live)
        finally:  # the page names them each time
            sys.stderr.write(said.getvalue() if first else '')
        runs.write_atomic(args.out, page.encode(errors='replace'))
        if first:
            print(args.out, flush=True)
        if first and len(page) > 8e6:
            print(f'note: {len(page) / 1e6:.0f} MB, much for an e-mail; --models takes fewer', file=sys.stderr)
        time.sleep(args.every if live else 0)


if __name__ == '__main__':
    with user_errors('report.py'):
        main(get_args_parser().parse_args())
