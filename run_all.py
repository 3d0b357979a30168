"""A grid of runs: every model on every fold with every seed, a train.py each.

    python run_all.py --data_dir data/dtd --dataset dtd --models resnet18,twistnet18 --folds 1-10 --seeds 42,43,44 \\
        --epochs 100 --run_dir runs/main                       # other options go to train.py
    python run_all.py .. --dry_run                             # print the plan, in 0.3 s
    python run_all.py .. --jobs 4 --gpus 0,1                   # four at once, two on each GPU
    python run_all.py .. --tune "lr=0.003,0.01,0.03"           # each model with the lr that validates best
    python run_all.py .. --launcher slurm --slurm partition=gpu,time=600,gres=gpu:1 --jobs 20

Complete runs are skipped and interrupted ones resumed, so the same command finishes a grid however it was stopped.
Several run_all.py, here or on other machines that share the file system, may work on one grid: each run is made once.
"""

import argparse
import functools
import json
import shlex
import sys
from collections import Counter
from pathlib import Path

from common import grid, options, runs
from common.errors import RunError, user_errors
from common.grid import DONE, OTHER, TRIAL_SEED, Run, Search, State, say, state_of
from common.registry import DATASETS, nameable
from common.runs import counted

TRAIN = Path(__file__).resolve().parent / 'train.py'


# ---------------------------------------------------------------------------------------------- plan


def available_folds(dataset: str, folds: list[int]) -> list[int]:
    """Without those that are often asked for and do not exist (registry: no_fold), which are noted."""
    missing = DATASETS[dataset].get('no_fold', {})
    for fold in sorted(missing.keys() & set(folds)):
        say(f'note: {dataset} has {missing[fold]}; fold {fold} is left out')
    folds = [fold for fold in folds if fold not in missing]
    if not folds:
        raise RunError('--folds: no fold is left')
    return folds


def base_of(args: argparse.Namespace, passed: list[str]) -> list[str]:
    """The arguments of train.py that all runs share: those of run_all.py's options, and those passed on."""
    base = ['--dataset', args.dataset, *(['--data_dir', args.data_dir] if args.data_dir else [])]
    base += options.split_words(options.split_options(vars(args)))
    return [*base, '--run_dir', str(args.run_dir), *passed]


def make_grid(
    args: argparse.Namespace, passed: list[str], chosen: dict[str, list[str]] | None = None, **instead
) -> list[Run]:
    """The runs, fold by fold, so that an unfinished grid can be compared on the folds that it has.

    `passed` are arguments of train.py, and `chosen` those by model that --tune chose; other models wait for it.
    `instead` are values for others of `args`. Options that no run can have are refused.
    """
    args = argparse.Namespace(**vars(args) | instead)
    base, made = base_of(args, passed), []
    words = {model: base + (chosen or {}).get(model, []) for model in args.models}
    parsed = {model: vars(options.parse_args(words[model])) for model in words}
    for seed in dict.fromkeys(args.seeds):
        for fold in dict.fromkeys(args.folds):
            for model in words:
                cell = dict(model=model, fold=fold, seed=seed)
                options.check(values := argparse.Namespace(**parsed[model] | cell))
                folder = args.run_dir / runs.run_name(values.name or args.dataset, fold, model, seed)
                more = [word for key, value in cell.items() for word in (f'--{key}', str(value))]
                command = [sys.executable, str(TRAIN), *words[model], *more]
                made.append(Run(folder, command, vars(values), waits=chosen is not None and model not in chosen))
    return made if args.dry_run else with_images(args, made)


def with_images(args: argparse.Namespace, made: list[Run]) -> list[Run]:
    """Runs with the digest of their images, so that state_of compares them with those of the runs in the folders."""
    from common.splits import split_digest  # here, because numpy and the data sets slow --dry_run down
    from datasets import tree_digest

    custom = options.split_options(vars(args))
    splits = {fold: load_fold(args.dataset, args.data_dir, fold, custom) for fold in args.folds}
    to_make = [run.folder for run in made if args.force or not (run.folder / 'results.json').exists()]
    if to_make and nameable(args.dataset):
        runs.check_neighbours(to_make, made[0].options, tree_digest(splits[args.folds[0]]))
    digests = {fold: split_digest(splits[fold]) for fold in splits}
    return [run._replace(split=digests[run.options['fold']]) for run in made]


@functools.cache
def load_fold(*args):
    """datasets.load_splits; --tune asks for the same fold several times."""
    from datasets import load_splits

    return load_splits(*args)


# ---------------------------------------------------------------------------------------------- tuning


def tune(args: argparse.Namespace, passed: list[str], parsed: argparse.Namespace) -> dict[str, list[str]]:
    """The arguments of train.py that --tune chose, by model, after the trials that tuned.json does not have yet.

    Models whose trials are not complete yet (--dry_run, SLURM) are left out. `parsed` has train.py's options of all.
    """
    if parsed.train_on == 'trainval':
        raise RunError('--tune chooses by validation accuracy, and --train_on trainval leaves no image to validate')
    search = grid.plan_search(args, parsed)
    if given := search.values.keys() & {*parsed.given}:
        raise RunError(f'--{min(given)} is given, and --tune searches it too; leave one of the two out')
    if search.seed in args.seeds:
        say(f'note: seed {search.seed} is of the grid and of the trials, so that counted runs are among those compared')
    again = args.models if args.force else []
    _, choices = grid.read_choices(search, again)
    left = [model for model in args.models if model not in choices]
    if left:
        if not args.force:
            check_folders(args, passed, search, left)
        trials = []
        for setting in search.settings:
            folder = args.run_dir / grid.FOLDER / grid.text_of(setting, ',', '=')
            cells = dict(models=left, folds=[search.fold], seeds=[search.seed], run_dir=folder)
            made = make_grid(args, passed + grid.words_of(setting), **cells)
            trials += [run._replace(tries=setting) for run in made]
        if not args.dry_run:  # now, so that an interrupted search resumes without --force
            if args.force:
                discard(make_grid(args, passed))
            grid.add_choices(search, {}, again)
        work_on(args, trials, 'trial')
        if not (args.force and args.dry_run):
            choices |= choose(args, search, trials)
    tuned = {model: json.dumps(grid.tuning_of(search, choice)) for model, choice in choices.items()}
    return {model: ['--tuned', tuned[model], *grid.words_of(choices[model]['chosen'])] for model in choices}


def check_folders(args: argparse.Namespace, passed: list[str], search: Search, models: list[str]) -> None:
    """Refuse, before trials are made, a run folder that fits the grid of no setting."""
    grids = [make_grid(args, passed + grid.words_of(setting), models=models) for setting in search.settings]
    for alike in zip(*grids):
        states = [state_of(run) for run in alike]
        if all(state in OTHER for state, _ in states):
            raise refusal(alike[0], *states[0], ', and fits no setting of --tune')


def choose(args: argparse.Namespace, search: Search, trials: list[Run]) -> dict[str, dict]:
    """What grid.choose says of the models whose trials are all complete; tuned.json gets it."""
    choices = {}
    for model in dict.fromkeys(run.options['model'] for run in trials):
        made = [run for run in trials if run.options['model'] == model]
        if not all(state_of(run)[0] in DONE for run in made):
            continue
        choices[model] = choice = grid.choose(model, made)
        what = f'{model} on {args.dataset}: {grid.text_of(choice["chosen"])}'
        say(f'{what}, validation accuracy {choice["val_acc"]:.2f} %, the best of {len(made)} settings')
        for note in grid.edge_notes(choice['chosen'], search.values):
            say(f'note: {model} on {args.dataset}: {note}')
    if choices and not args.dry_run:
        grid.add_choices(search, choices)
    return choices


# ---------------------------------------------------------------------------------------------- work


def work_on(args: argparse.Namespace, made: list[Run], noun: str = 'run') -> None:
    """Report the states of runs and make those that are left, or with --dry_run print them."""
    if args.force and not args.dry_run:
        discard(made)
    states = [(run, *state_of(run)) for run in made]
    if args.dry_run:
        for run, state, _ in states:
            print(f'{state.value:12} {shlex.join(run.command)}')
    counts = ', '.join(f'{n} {state.value}' for state, n in Counter(state for _, state, _ in states).items())
    where = args.run_dir / grid.FOLDER if noun == 'trial' else args.run_dir
    say(f'{counted(len(states), noun)} in {where}: {counts}')
    others = [found for found in states if found[1] in OTHER]
    if others and not (args.force and args.dry_run):
        raise refusal(*others[0], f' (and {counted(len(others) - 1, "other")})' if others[1:] else '')
    if args.dry_run:
        return
    for run, state, _ in states:
        if state in (State.COMPLETE, State.INTERRUPTED):
            grid.record_tuning(run)
    todo = [run for run, state, _ in states if state not in (*DONE, State.NOT_TUNED)]
    if todo and args.launcher == 'slurm':
        submit(args, todo, noun)
    elif todo:
        make_here(args, todo, len(made), noun)


def refusal(run: Run, state: State, difference: str, more: str) -> RunError:
    """The error for a folder that holds another run, with the way out."""
    way_out = 'take another --run_dir, or --force to discard them'
    if state is State.OTHER_IMAGES and nameable(run.options['dataset']):
        way_out = f'{runs.NAME_THEM}, {way_out}'
    what = f'{state.value}: {difference}' if difference else f'a run of {state.value}'
    return RunError(f'{run.folder} holds {what}{more}; {way_out}')


def make_here(args: argparse.Namespace, todo: list[Run], total: int, noun: str) -> None:
    """Make the runs that are left of a grid of `total` on this machine, and report on them."""
    from common.cache import open_cache  # here, because numpy slows --dry_run down

    open_cache(todo[0].options['cache'])  # so that runs find the images that others have decoded
    local = grid.Local(todo, total, args.jobs, args.gpus)
    local.run()
    for run in local.failed:
        print(f'\nfailed: {run.folder / runs.LOG}', *runs.log_tail(run.folder), sep='\n    ', file=sys.stderr)
    if local.signals:
        again = 'the same command without --force' if args.force else 'the same command'
        say(f'stopped with {local.complete} of {total} {noun}s complete; {again} resumes')
        sys.exit(128 + local.signals[0])
    if local.failed:
        raise RunError(f'{len(local.failed)} of {total} {noun}s failed; the same command tries them again')
    table = f'; `python summarize_runs.py --run_dir {args.run_dir}` makes a table of them' if noun == 'run' else ''
    say(f'{total} {noun}s complete{table}')


def submit(args: argparse.Namespace, todo: list[Run], noun: str) -> None:
    jobs = grid.submit(todo, args.run_dir / 'slurm', args.jobs, args.slurm)
    print(*jobs, sep='\n')
    then = ', and without it goes on when they are complete' if noun == 'trial' else ''
    say(f'{counted(len(jobs), noun)} submitted; the same command with --dry_run shows their states{then}')


def discard(made: list[Run]) -> None:
    """Discard all runs once, before anything starts, so that a run interrupted later is resumed."""
    for run in made:
        if run.folder.is_dir():
            runs.claim(run.folder)
            runs.discard(run.folder)
            runs.release(run.folder)


# ---------------------------------------------------------------------------------------------- command line


def add_grid_args(parser: argparse.ArgumentParser) -> None:
    """The options of a grid but for its models: shared with ablation.py."""
    options.add_dataset_args(parser)
    parser.add_argument('--folds', **options.LIST, type=options.parse_numbers, default='1', help='e.g. 1-10 or 1,3')
    parser.add_argument('--seeds', **options.LIST, type=options.parse_numbers, default='42', help='e.g. 42,43,44')
    parser.add_argument('--run_dir', type=Path, default=Path('runs'), help='folder in which run folders are created')
    parser.add_argument('--dry_run', action='store_true', help='print the plan and stop')
    parser.add_argument('--jobs', type=int, help='simultaneous runs; by default one, or one per entry of --gpus')
    parser.add_argument('--gpus', **options.LIST, type=options.parse_gpus, help='as in CUDA_VISIBLE_DEVICES, e.g. 0,1')
    parser.add_argument(
        '--launcher', choices=('local', 'slurm'), default='local', help='slurm: at most --jobs tasks at once'
    )
    pairs = dict(metavar='NAME=VALUE,..')
    text = 'long options of sbatch, e.g. partition=gpu,gres=gpu:1,cpus-per-task=4,time=600 (in minutes)'
    parser.add_argument('--slurm', **options.LIST, **pairs, type=options.parse_sbatch, default={}, help=text)
    parser.add_argument('--force', action='store_true', help='discard the runs of this grid and start again')
    text = (
        'first try all combinations of these values for each model, e.g. "lr=0.003,0.01,0.03 weight_decay=1e-4,1e-3"; '
        'the best by validation accuracy is saved in RUN_DIR/tuned.json and used in the grid'
    )
    parser.add_argument('--tune', nargs='+', **pairs, help=text)
    parser.add_argument('--tune_fold', type=int, help='fold of the trials; by default the first of --folds')
    parser.add_argument('--tune_seed', type=int, help=f'seed of the trials; by default {TRIAL_SEED}')


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        'run_all.py', 'Run a grid of models, folds and seeds. Options not listed here are passed to train.py.'
    )
    parser.add_argument('--models', **options.LIST, type=options.parse_names, required=True, help='e.g. a,b')
    add_grid_args(parser)
    return parser


def main(args: argparse.Namespace, passed: list[str]) -> None:
    args.jobs = len(args.gpus or '1') if args.jobs is None else args.jobs
    options.check_bounds(args, jobs=(1, 10_000))
    named, own = args.dataset or args.lists, options.split_options(vars(args))
    args.dataset = options.choose_dataset(args.dataset, args.data_dir, own)
    if named is None:
        where = '' if args.data_dir is None else f': the layout of {args.data_dir}'
        say(f'note: --dataset is {args.dataset}{where}; --dataset can name another')
    args.folds = available_folds(args.dataset, args.folds)
    parsed = options.parse_args(base_of(args, passed))
    if single := {'model', 'fold', 'seed'} & {*parsed.given}:
        raise RunError(f"--{min(single)} is train.py's; here it is --{min(single)}s")
    for line in options.lowered_defaults(parsed, options.RECIPES[parsed.recipe]):
        say(line)
    chosen = tune(args, passed, parsed) if args.tune else None
    work_on(args, make_grid(args, passed, chosen))


def cli(argv: list[str] | None = None) -> None:
    with user_errors('run_all.py'):
        main(*get_args_parser().parse_known_args(argv))


if __name__ == '__main__':
    cli()
