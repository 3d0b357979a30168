"""A grid of runs: every model on every fold with every seed, a train.py each.

    python run_all.py --data_dir data/dtd --dataset dtd --models resnet18,twistnet18 --folds 1-10 --seeds 42,43,44 \\
        --epochs 100 --run_dir runs/main                       # other options go to train.py
    python run_all.py .. --dry_run                             # print the plan, in 0.3 s
    python run_all.py .. --jobs 4 --gpus 0,1                   # four at once, two on each GPU
    python run_all.py .. --launcher slurm --slurm partition=gpu,time=600,gres=gpu:1 --jobs 20

Complete runs are skipped and interrupted ones resumed, so the same command finishes a grid however it was stopped.
Several run_all.py, here or on other machines that share the file system, may work on one grid: each run is made once.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common import options, runs
from common.errors import BUSY, RunError, user_errors
from common.registry import DATASETS
from common.runs import counted

TRAIN = Path(__file__).resolve().parent / 'train.py'
OTHER_CONFIG = 'another configuration'
POLL = 0.2  # seconds between two checks of the children
SHOW = 1.0  # seconds between two checks of their logs
BUSY_POLL = 5.0  # seconds between two checks of runs that other processes make
STOP_AFTER = 60.0  # seconds that a run gets to stop before it is killed


class Run(NamedTuple):
    """One run of the grid: its folder and the command that makes it."""

    folder: Path
    command: list[str]
    options: dict  # of train.py, by name


# ---------------------------------------------------------------------------------------------- plan


def available_folds(dataset: str, folds: list[int]) -> list[int]:
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
        raise RunError(f'--folds: {dataset} has folds 1 to {number}, not {wrong[0]}')
    if not folds:
        raise RunError('--folds: no fold is left')
    return folds


def make_grid(args: argparse.Namespace, passed: list[str]) -> list[Run]:
    """The runs, fold by fold, so that an unfinished grid can be compared on the folds that it has.

    Args:
        args: run_all's own options.
        passed: the options of train.py.

    Raises:
        RunError: a value that no run can have.
    """
    for single in ('--model', '--fold', '--seed'):
        if any(word == single or word.startswith(f'{single}=') for word in passed):
            raise RunError(f"{single} is train.py's; here it is {single}s")
    common = ['--dataset', args.dataset, *(['--data_dir', args.data_dir] if args.data_dir else [])]
    common += ['--run_dir', str(args.run_dir), *passed]
    parsed = vars(options.parse_args(common))  # raises for a wrong option, before anything starts
    for line in options.shrunk(argparse.Namespace(**parsed), options.RECIPES[parsed['recipe']]):
        say(line)
    grid = []
    for seed in dict.fromkeys(args.seeds):
        for fold in dict.fromkeys(args.folds):
            for model in dict.fromkeys(args.models):
                cell = dict(model=model, fold=fold, seed=seed)
                options.check(argparse.Namespace(**parsed | cell))
                folder = args.run_dir / runs.run_name(args.dataset, fold, model, seed)
                words = [word for key, value in cell.items() for word in (f'--{key}', str(value))]
                grid.append(Run(folder, [sys.executable, str(TRAIN), *common, *words], parsed | cell))
    return grid


def state_of(run: Run) -> str:
    """'complete', 'running' (by anyone), 'interrupted', 'new', or OTHER_CONFIG and what differs."""
    try:
        config, results = runs.read_json(run.folder / 'config.json'), runs.read_json(run.folder / 'results.json')
    except RunError:
        return 'new'  # train.py will report what is damaged
    if results is None and not (run.folder / 'last.pt').exists():
        return 'running' if runs.is_claimed(run.folder) else 'new'
    difference = difference_to(run.options, config or {}, results)
    if results is not None and results.get('fingerprint') != (config or {}).get('fingerprint'):
        difference += ', ' * bool(difference) + 'results.json is of another one'
    if difference:
        return f'{OTHER_CONFIG}: {difference}'
    if results is not None:
        return 'complete'
    return 'running' if runs.is_claimed(run.folder) else 'interrupted'


def difference_to(wanted: dict, config: dict, results: dict | None) -> str:
    """How the options of a run differ from those of the run in its folder; '' if they do not.

    What train.py resolves from the machine or from a file's content is compared by train.py.
    """
    had, unknown = options.NEUTRAL | config.get('options', {}), set(options.SYSTEM_OPTIONS)
    if wanted['amp'] == 'auto':
        unknown.add('amp')
    if isinstance(wanted['pretrained'], str) and isinstance(had.get('pretrained'), str):
        unknown.add('pretrained')
    if 'batch_size' not in wanted['given']:  # train.py brings it down to the training set and the processes
        if results is None:
            unknown.add('batch_size')
        else:
            processes = config.get('defines', {}).get('processes', 1)
            counts = [results.get(f'n_{subset}', 10**9) for subset in ('train', 'val', 'test')]
            batch_size = options.largest_batch(wanted['batch_size'], counts[0], sum(counts), processes)
            wanted = wanted | dict(batch_size=batch_size)
    known = wanted.keys() - unknown
    return runs.changes({key: had.get(key) for key in known}, {key: wanted[key] for key in known})


def epochs_done(run: Run) -> int:
    try:
        with open(run.folder / 'log.jsonl', 'rb') as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


# ---------------------------------------------------------------------------------------------- runs on this machine


class Grid:
    """The runs by state: waiting, being made here (children) or elsewhere, complete, failed."""

    def __init__(self, todo: list[Run], complete: int, args: argparse.Namespace):
        self.waiting, self.elsewhere = deque(todo), deque()
        self.failed: list[Run] = []
        self.complete, self.total = complete, complete + len(todo)
        # Where the bar starts: epochs of an earlier start must not count for the speed of this one.
        self.initial = complete + sum(epochs_done(run) / run.options['epochs'] for run in todo)
        self.children: dict[int, tuple[Run, subprocess.Popen]] = {}  # by slot
        self.signals: list[int] = []
        self.args = args
        self.bar = tqdm(
            total=self.total,
            initial=self.initial,
            smoothing=0,  # mean speed, because runs differ
            disable=None,  # off where stderr is no terminal
            **runs.terminal(),
            bar_format='{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}',
        )
        self.started, self.shown, self.told = time.monotonic(), 0.0, False

    def run(self) -> None:
        """Make all runs, or as many as a signal allows; no child outlives it."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets SIGHUP
                signal.signal(number, lambda number, _: self.signals.append(number))
        looked = 0.0
        try:
            while (self.waiting or self.elsewhere or self.children) and not self.signals:
                if self.elsewhere and time.monotonic() - looked > BUSY_POLL:
                    self.waiting += self.elsewhere
                    self.elsewhere.clear()
                    looked = time.monotonic()
                self.fill_slots()
                self.collect()
                self.show()
                time.sleep(POLL)
        finally:
            self.stop()
            self.bar.close()

    def fill_slots(self) -> None:
        for slot in range(self.args.jobs):
            while slot not in self.children and self.waiting:
                run = self.waiting.popleft()
                if state_of(run) == 'complete':
                    self.done(run)  # made elsewhere in the meantime
                elif runs.is_claimed(run.folder):
                    self.elsewhere.append(run)
                else:
                    self.start(run, slot)

    def start(self, run: Run, slot: int) -> None:
        """Start train.py in its own session, so that Ctrl-C reaches run_all.py alone."""
        try:
            child = runs.start(run.folder, run.command, self.environment(slot), start_new_session=True)
        except RunError as error:
            self.failed.append(run)
            say(f'failed: {run.folder.name} ({error})')
        else:
            self.children[slot] = run, child

    def environment(self, slot: int) -> dict[str, str]:
        """The environment of a child: its share of the cores, unless the user has set it, and its GPU."""
        environment = dict(os.environ)
        if self.args.jobs > 1:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
            environment.setdefault('OMP_NUM_THREADS', str(max(1, cores // self.args.jobs)))
        if self.args.gpus:
            environment['CUDA_VISIBLE_DEVICES'] = self.args.gpus[slot % len(self.args.gpus)]
        return environment

    def collect(self) -> None:
        for slot, (run, child) in list(self.children.items()):
            if (code := child.poll()) is None:
                continue
            del self.children[slot]
            if code == 0:
                self.done(run)
            elif code == BUSY:
                self.elsewhere.append(run)
            else:
                self.failed.append(run)
                cause = f'exit code {code}' if code >= 0 else f'killed by {signal.Signals(-code).name}'
                say(f'failed: {run.folder.name} ({cause}), see {run.folder / runs.LOG}')

    def done(self, run: Run) -> None:
        self.complete += 1
        if self.bar.disable:
            finished = self.progress()
            speed = (finished - self.initial) / (time.monotonic() - self.started)
            left = tqdm.format_interval((self.total - finished) / speed) if speed > 0 else '?'
            say(f'{self.complete}/{self.total} runs complete, {left} left: {run.folder.name}')

    def progress(self) -> float:
        """Number of runs that have ended, and the finished fractions of the others."""
        others = (*(run for run, _ in self.children.values()), *self.waiting, *self.elsewhere)
        partly = sum(min(1.0, epochs_done(run) / run.options['epochs']) for run in others)
        return min(self.total, self.complete + len(self.failed) + partly)

    def show(self) -> None:
        if time.monotonic() - self.shown < SHOW:
            return
        self.shown = time.monotonic()
        if self.elsewhere and not self.children and not self.waiting and not self.told:
            self.told = True
            others = counted(len(self.elsewhere), 'run')
            say(f'waiting for {others} that other processes make, the first: {self.elsewhere[0].folder}')
        self.bar.n = self.progress()
        text = f'{self.complete}/{self.total} runs, {len(self.children)} at work'
        text += f', {len(self.elsewhere)} elsewhere' if self.elsewhere else ''
        text += f', {len(self.failed)} failed' if self.failed else ''
        self.bar.set_description_str(text, refresh=False)
        self.bar.refresh()

    def stop(self) -> None:
        """Ask the children to stop; kill those that do not within a minute, or at once when asked again."""
        if self.children and self.signals:
            say(f'stopping {counted(len(self.children), "run")}; a second signal kills them')
        for _, child in self.children.values():
            child.terminate()
        asked, give_up = len(self.signals), time.monotonic() + STOP_AFTER
        while alive := [child for _, child in self.children.values() if child.poll() is None]:
            if time.monotonic() > give_up or len(self.signals) > asked:
                for child in alive:
                    os.killpg(child.pid, signal.SIGKILL)
            time.sleep(POLL)


def say(message: str) -> None:
    """Progress: a line on stderr, above the progress bar."""
    tqdm.write(message, file=sys.stderr)


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
    named, args.dataset = args.dataset, options.choose_dataset(args.dataset, args.data_dir)
    if named is None:
        where = '' if args.data_dir is None else f': the layout of {args.data_dir}'
        say(f'note: --dataset is {args.dataset}{where}; --dataset can name another')
    args.folds = available_folds(args.dataset, args.folds)
    grid = make_grid(args, passed)
    if args.force and not args.dry_run:
        discard(grid)
    states = {run.folder: state_of(run) for run in grid}
    if args.dry_run:
        for run in grid:
            print(f'{states[run.folder]:12} {shlex.join(run.command)}')
    counts = Counter(state.partition(':')[0] for state in states.values())
    say(f'{counted(len(grid), "run")} in {args.run_dir}: {", ".join(f"{n} {state}" for state, n in counts.items())}')
    if args.force and args.dry_run:
        return
    if others := [folder for folder, state in states.items() if state.startswith(OTHER_CONFIG)]:
        more = f', and {len(others) - 1} others do too' if others[1:] else ''
        raise RunError(
            f'{others[0]} holds {states[others[0]]}{more}; take another --run_dir, or --force to discard them'
        )
    todo = [run for run in grid if states[run.folder] != 'complete']
    if todo and not args.dry_run:
        make_runs(args, todo, len(grid))


def make_runs(args: argparse.Namespace, todo: list[Run], total: int) -> None:
    """Make the runs that are left of a grid of `total`, here or through SLURM, and report on them."""
    from common.cache import open_cache  # here, because numpy and the data sets slow --dry_run down
    from datasets import load_splits

    for fold in args.folds:  # raises once here, and not in every run
        load_splits(args.dataset, args.data_dir, fold)
    if args.launcher == 'slurm':
        return submit(args, todo)
    open_cache(todo[0].options['cache'])  # so that runs find the images that others have decoded
    work = Grid(todo, total - len(todo), args)
    work.run()
    for run in work.failed:
        print(f'\nfailed: {run.folder / runs.LOG}', *runs.log_tail(run.folder), sep='\n    ', file=sys.stderr)
    if work.signals:
        again = 'the same command without --force' if args.force else 'the same command'
        say(f'stopped with {work.complete} of {work.total} runs complete; {again} resumes')
        sys.exit(128 + work.signals[0])
    if work.failed:
        raise RunError(f'{len(work.failed)} of {work.total} runs failed; the same command tries them again')
    say(f'{work.total} runs complete; `python summarize_runs.py --run_dir {args.run_dir}` makes a table of them')


def discard(grid: list[Run]) -> None:
    """Discard all runs once, before anything starts, so that a run interrupted later is resumed."""
    for run in grid:
        if run.folder.is_dir():
            runs.claim(run.folder)
            runs.discard(run.folder)
            runs.release(run.folder)


def submit(args: argparse.Namespace, todo: list[Run]) -> None:
    """Submit the runs to SLURM and return."""
    try:
        from common import slurm  # needs submitit, which nothing else does
    except ModuleNotFoundError as error:
        raise RunError(f'--launcher slurm needs {error.name}: pip install {error.name}') from error
    jobs = slurm.submit([(run.folder, run.command) for run in todo], args.run_dir / 'slurm', args.jobs, args.slurm)
    print(*jobs, sep='\n')
    say(f'{counted(len(jobs), "run")} submitted; the same command with --dry_run shows their states')


def cli(argv: list[str] | None = None) -> None:
    with user_errors('run_all.py'):
        main(*get_args_parser().parse_known_args(argv))


if __name__ == '__main__':
    cli()
