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
import shlex
import sys
from collections import Counter, defaultdict
from pathlib import Path

from common import options, runs, tuning
from common.errors import DataError, RunError, user_errors
from common.grid import DONE, OTHER_CONFIG, Grid, Run, say, state_of
from common.registry import DATASETS, nameable
from common.runs import counted

TRAIN = Path(__file__).resolve().parent / 'train.py'
OTHER_FOLDER = 'take another --run_dir, or --force to discard them'


# ---------------------------------------------------------------------------------------------- plan


def available_folds(dataset: str, folds: list[int], option: str = '--folds') -> list[int]:
    """The folds that exist; those that are often asked for and do not (registry: no_fold) are left out.

    Raises:
        RunError: a fold that no data set of this name has.
    """
    entry = DATASETS[dataset]
    number, missing = entry.get('folds'), entry.get('no_fold', {})
    for fold in sorted(missing.keys() & set(folds)):
        say(f'note: {dataset} has {missing[fold]}; fold {fold} is left out')
    folds = [fold for fold in folds if fold not in missing]
    wrong = [fold for fold in folds if not 1 <= fold <= (number or fold)]
    if wrong and not entry.get('lists'):  # another tree in a layout with lists may have more; train.py counts them
        raise RunError(f'{option}: {dataset} has folds 1 to {number}, not {wrong[0]}')
    if not folds:
        raise RunError(f'{option}: no fold is left')
    return folds


def base_of(args: argparse.Namespace, passed: list[str]) -> list[str]:
    """The arguments of train.py that all runs of a grid share.

    Args:
        args: run_all's own options.
        passed: the options of train.py.

    Raises:
        RunError: an option of a single run.
    """
    for single in ('--model', '--fold', '--seed'):
        if any(word == single or word.startswith(f'{single}=') for word in passed):
            raise RunError(f"{single} is train.py's; here it is {single}s")
    base = ['--dataset', args.dataset, *(['--data_dir', args.data_dir] if args.data_dir else [])]
    base += options.split_words(options.split_options(vars(args)))
    return [*base, '--run_dir', str(args.run_dir), *passed]


def make_grid(args: argparse.Namespace, passed: list[str], own: dict[str, list[str]] | None = None) -> list[Run]:
    """The runs, fold by fold, so that an unfinished grid can be compared on the folds that it has.

    Args:
        args, passed: as base_of.
        own: more options of train.py, by model.

    Raises:
        RunError: a value that no run can have.
    """
    base, grid = base_of(args, passed), []
    words = {model: base + (own or {}).get(model, []) for model in dict.fromkeys(args.models)}
    parsed = {model: vars(options.parse_args(words[model])) for model in words}  # raises, before anything starts
    for seed in dict.fromkeys(args.seeds):
        for fold in dict.fromkeys(args.folds):
            for model in words:
                cell = dict(model=model, fold=fold, seed=seed)
                options.check(chosen := argparse.Namespace(**parsed[model] | cell))
                folder = args.run_dir / runs.run_name(chosen.name or args.dataset, fold, model, seed)
                more = [word for key, value in cell.items() for word in (f'--{key}', str(value))]
                grid.append(Run(folder, [sys.executable, str(TRAIN), *words[model], *more], vars(chosen)))
    return grid


# ---------------------------------------------------------------------------------------------- tuning


def tune(args: argparse.Namespace, passed: list[str], parsed: argparse.Namespace) -> dict[str, dict]:
    """The options that --tune chose for each model, after the trials of those for which tuned.json has none yet.

    Args:
        args, passed: as base_of.
        parsed: train.py's options, without the searched ones.

    Returns:
        the options by model, without the models whose trials are not complete yet (--dry_run, SLURM).
    """
    search = tuning.plan_search(args.run_dir, args.tune, args.tune_fold, args.tune_seed, args.folds[0])
    if given := search.values.keys() & {*parsed.given}:
        raise RunError(f'--{min(given)} is given, and --tune searches it too; leave one of the two out')
    available_folds(args.dataset, [search.fold], '--tune_fold')
    if search.seed in args.seeds:
        say(f'note: seed {search.seed} is of the grid and of the trials, so that counted runs are among those compared')
    again = args.models if args.force else []
    tuned = tuning.tuned_models(args.run_dir, search, parsed, again)
    left = argparse.Namespace(**vars(args) | dict(models=[model for model in args.models if model not in tuned]))
    if not args.force:
        check_folders([make_grid(left, passed + tuning.words_of(setting)) for setting in search.settings])
    cell = argparse.Namespace(**vars(args) | dict(folds=[search.fold], seeds=[search.seed]))
    trials = defaultdict(list)  # by model: (setting, run)
    for setting in search.settings:
        cell.run_dir = tuning.folder_of(args.run_dir, setting)
        for run in make_grid(cell, passed + tuning.words_of(setting)):
            trials[run.options['model']].append((setting, run._replace(trial=True)))
    if not args.dry_run:
        check_data(args, [run for made in trials.values() for _, run in made], needed=bool(left.models))
    trials = {model: trials[model] for model in left.models}
    if trials:
        left.run_dir = args.run_dir / tuning.FOLDER
        if args.force and not args.dry_run:
            discard(make_grid(args, passed))  # now, so that an interrupted search resumes without --force
        if not args.dry_run:
            tuning.add_models(args.run_dir, search, parsed, {}, again)
        work_on(left, [run for made in zip(*trials.values()) for _, run in made], 'trial')
    chosen = {}
    for model, made in trials.items():
        if all(state_of(run) in DONE for _, run in made) and not (args.force and args.dry_run):
            accuracies = [(setting, tuning.accuracy_of(run.folder)) for setting, run in made]
            chosen[model] = tuning.choose(model, accuracies)
            what = f'{model} on {args.dataset}: {tuning.text_of(chosen[model]["chosen"])}'
            say(f'{what}, validation accuracy {chosen[model]["val_acc"]:.2f} %, the best of {len(made)} settings')
            for note in tuning.edge_notes(chosen[model]['chosen'], search.values):
                say(f'note: {model} on {args.dataset}: {note}')
    if chosen and not args.dry_run:
        tuning.add_models(args.run_dir, search, parsed, chosen, [])
    return {model: entry['chosen'] for model, entry in (tuned | chosen).items()}


def check_folders(grids: list[list[Run]]) -> None:
    """Raise RunError, before trials are made, for a run folder that fits the grid of no setting."""
    for alike in zip(*grids):
        states = [state_of(run) for run in alike]
        if all(state.startswith(OTHER_CONFIG) for state in states):
            raise RunError(
                f'{alike[0].folder} holds {states[0]}, and fits no setting of --tune; take another --run_dir, or '
                '--force to discard it'
            )


# ---------------------------------------------------------------------------------------------- command line


def add_grid_args(parser: argparse.ArgumentParser) -> None:
    """The options of a grid but for its models: shared with ablation.py."""
    options.add_dataset_args(parser)
    parser.add_argument('--folds', **options.LIST, type=options.parse_numbers, default='1', help='such as 1-10 or 1,3')
    parser.add_argument('--seeds', **options.LIST, type=options.parse_numbers, default='42', help='such as 42,43,44')
    parser.add_argument('--run_dir', type=Path, default=Path('runs'), help='where run folders are made')
    parser.add_argument('--dry_run', action='store_true', help='print the plan and stop')
    parser.add_argument('--jobs', type=int, help='runs at once; by default one, or one for each of --gpus')
    parser.add_argument('--gpus', **options.LIST, type=options.parse_gpus, help='as CUDA_VISIBLE_DEVICES: 0,1')
    parser.add_argument('--launcher', choices=('local', 'slurm'), default='local', help='slurm: --jobs tasks at once')
    parser.add_argument(
        '--slurm',
        **options.LIST,
        type=options.parse_sbatch,
        default={},
        metavar='NAME=VALUE,..',
        help='long options of sbatch, such as partition=gpu,gres=gpu:1,cpus-per-task=4,time=600 (in minutes)',
    )
    parser.add_argument('--force', action='store_true', help='discard the runs of this grid and start again')
    parser.add_argument(
        '--tune',
        nargs='+',
        metavar='NAME=VALUE,..',
        help='first try all combinations of these for each model, as in "lr=0.003,0.01,0.03 weight_decay=1e-4,1e-3"; '
        'the choice by validation accuracy goes into RUN_DIR/tuned.json, and the grid runs each model with its own',
    )
    parser.add_argument('--tune_fold', type=int, help='the fold of the trials; by default the first of --folds')
    parser.add_argument('--tune_seed', type=int, help=f'the seed of the trials; by default {tuning.SEED}')


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='A grid of runs. Options that are not listed here go to train.py.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('--models', **options.LIST, type=options.parse_names, required=True, help='such as a,b')
    add_grid_args(parser)
    return parser


def main(args: argparse.Namespace, passed: list[str]) -> None:
    args.jobs = len(args.gpus or '1') if args.jobs is None else args.jobs
    if args.jobs < 1:
        raise RunError(f'--jobs {args.jobs} must be at least 1')
    named, own = args.dataset or args.lists, options.split_options(vars(args))
    args.dataset = options.choose_dataset(args.dataset, args.data_dir, own)
    if named is None:
        where = '' if args.data_dir is None else f': the layout of {args.data_dir}'
        say(f'note: --dataset is {args.dataset}{where}; --dataset can name another')
    args.folds = available_folds(args.dataset, args.folds)
    parsed = options.parse_args(base_of(args, passed))
    for line in options.lowered_defaults(parsed, options.RECIPES[parsed.recipe]):
        say(line)
    grid = make_grid(args, passed)
    if not args.tune and (args.tune_fold is not None or args.tune_seed is not None):
        raise RunError('--tune_fold and --tune_seed are of --tune, which is not given')
    if not args.dry_run:
        if not args.force and not args.tune:  # options before images, which they may divide otherwise
            refuse_others({run.folder: state_of(run) for run in grid})
        check_data(args, grid, needed=any(is_unmade(args, run) for run in grid))
    if not args.tune:
        return work_on(args, grid)
    chosen = tune(args, passed, parsed)
    tuned = argparse.Namespace(**vars(args) | dict(models=[model for model in args.models if model in chosen]))
    untuned = argparse.Namespace(**vars(args) | dict(models=[model for model in args.models if model not in chosen]))
    own = {model: tuning.words_of(setting) for model, setting in chosen.items()}
    work_on(tuned, make_grid(tuned, passed, own), later=make_grid(untuned, passed))


def work_on(args: argparse.Namespace, grid: list[Run], noun: str = 'run', later: list[Run] = ()) -> None:
    """Report the states of runs and make those that are left, or with --dry_run print them.

    Args:
        args: run_all's options.
        grid: the runs.
        noun: what to call one.
        later: those whose options --tune has still to choose: reported, not made.

    Raises:
        RunError: a folder holds another run, or a run fails.
    """
    if args.force and not args.dry_run:
        discard(grid)
    states = {run.folder: state_of(run) for run in grid} | {run.folder: 'not tuned' for run in later}
    if args.dry_run:
        for run in (*grid, *later):
            print(f'{states[run.folder]:12} {shlex.join(run.command)}')
    counts = ', '.join(f'{n} {state}' for state, n in Counter(s.partition(':')[0] for s in states.values()).items())
    say(f'{counted(len(states), noun)} in {args.run_dir}: {counts}')
    if args.force and args.dry_run:
        return
    refuse_others(states)
    todo = [run for run in grid if states[run.folder] not in DONE]
    if todo and not args.dry_run:
        make_runs(args, todo, len(grid), noun)


def refuse_others(states: dict[Path, str]) -> None:
    """Raise RunError where a folder holds another configuration, by the states of the runs."""
    if others := [folder for folder, state in states.items() if state.startswith(OTHER_CONFIG)]:
        raise RunError(f'{others[0]} holds {states[others[0]]}{and_more(others)}; {OTHER_FOLDER}')


def and_more(others: list[Path]) -> str:
    return f' (and {counted(len(others) - 1, "other")})' if others[1:] else ''


def is_unmade(args: argparse.Namespace, run: Run) -> bool:
    return args.force or not (run.folder / 'results.json').exists()


def check_data(args: argparse.Namespace, grid: list[Run], needed: bool) -> None:
    """Refuse, before anything is made or discarded, images that are incomplete or not those of the runs in the folders.

    They are the same if classes, names and, but for the test set, sizes are.

    Args:
        args: run_all's options.
        grid: runs; those that have begun are compared unless --force discards them.
        needed: some of them are to be made; if not, images that cannot be loaded are a note.

    Raises:
        DataError: the images of a fold cannot be loaded.
        RunError: runs of the grid, or complete ones beside it that are called the same, are of other images.
    """
    from common.splits import split_digest  # here, because numpy and the data sets slow --dry_run down
    from datasets import load_splits, tree_digest

    begun, others = defaultdict(list), []
    for run in grid:
        unfinished = (run.folder / 'last.pt').exists() or (run.trial and runs.has_diverged(run.folder))
        if not args.force and (unfinished or not is_unmade(args, run)):
            begun[run.options['fold']].append(run.folder)
    for fold in dict.fromkeys(run.options['fold'] for run in grid) if needed else begun:
        try:
            splits = load_splits(args.dataset, args.data_dir, fold, options.split_options(vars(args)))
            digest = split_digest(splits) if begun[fold] else None
        except (DataError, OSError) as error:
            if needed:
                raise
            say(f'note: fold {fold}: {error}; its runs, which are complete, are not compared with it')
            continue
        others += [folder for folder in begun[fold] if runs.split_of(folder) not in (None, digest)]
    if others:
        way_out = f'{runs.NAME_THEM}, {OTHER_FOLDER}' if nameable(args.dataset) else OTHER_FOLDER
        raise RunError(f'{others[0]} holds a run of other images, labels or folds{and_more(others)}; {way_out}')
    if needed and (unmade := [run.folder for run in grid if is_unmade(args, run)]):
        runs.check_neighbours(unmade, grid[0].options, tree_digest(args.dataset, args.data_dir, splits))


def make_runs(args: argparse.Namespace, todo: list[Run], total: int, noun: str) -> None:
    """Make the runs that are left of a grid of `total`, here or through SLURM, and report on them."""
    if args.launcher == 'slurm':
        return submit(args, todo, noun)
    work = Grid(todo, total - len(todo), args)
    work.run()
    for run in work.failed:
        print(f'\nfailed: {run.folder / runs.LOG}', *runs.log_tail(run.folder), sep='\n    ', file=sys.stderr)
    if work.signals:
        again = 'the same command without --force' if args.force else 'the same command'
        say(f'stopped with {work.complete} of {work.total} {noun}s complete; {again} resumes')
        sys.exit(128 + work.signals[0])
    if work.failed:
        raise RunError(f'{len(work.failed)} of {work.total} {noun}s failed; the same command tries them again')
    table = f'; `python summarize_runs.py --run_dir {args.run_dir}` makes a table of them' if noun == 'run' else ''
    say(f'{work.total} {noun}s complete{table}')


def discard(grid: list[Run]) -> None:
    """Discard all runs once, before anything starts, so that a run interrupted later is resumed."""
    for run in grid:
        if run.folder.is_dir():
            runs.claim(run.folder)
            runs.discard(run.folder)
            runs.release(run.folder)


def submit(args: argparse.Namespace, todo: list[Run], noun: str) -> None:
    """Submit the runs to SLURM and return."""
    try:
        from common import slurm  # needs submitit, which nothing else does
    except ModuleNotFoundError as error:
        raise RunError(f'--launcher slurm needs {error.name}: pip install {error.name}') from error
    jobs = slurm.submit([(run.folder, run.command) for run in todo], args.run_dir / 'slurm', args.jobs, args.slurm)
    print(*jobs, sep='\n')
    then = ', and without it goes on when they are complete' if noun == 'trial' else ''
    say(f'{counted(len(jobs), noun)} submitted; the same command with --dry_run shows their states{then}')


def cli(argv: list[str] | None = None) -> None:
    with user_errors('run_all.py'):
        main(*get_args_parser().parse_known_args(argv))


if __name__ == '__main__':
    cli()
