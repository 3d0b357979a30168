"""A grid of runs: every model on every fold with every seed, a train.py each.

    python run_all.py --data_dir data/dtd --dataset dtd --models resnet18,twistnet18 --folds 1-10 --seeds 42,43,44 \\
        --epochs 100 --run_dir runs/main                       # what run_all does not know goes to train.py
    python run_all.py .. --dry_run                             # the plan alone, in a blink
    python run_all.py .. --jobs 4 --gpus 0,1                   # four at once, two on each GPU
    python run_all.py .. --launcher slurm --slurm partition=gpu,time=600,gres=gpu:1 --jobs 20

Complete runs are left alone and interrupted ones go on, so the same command finishes a grid however it was stopped.
Several run_all, here or on other machines that share the file system, may work on one grid: each run is made once.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import options
import runs
from registry import DATASETS
from runs import RunError, counted

TRAIN = Path(__file__).resolve().parent / 'train.py'
FOREIGN = 'another configuration'
POLL = 0.2  # seconds between two looks at the children
SHOW = 1.0  # seconds between two looks at their logs
BUSY_POLL = 5.0  # seconds between two looks at runs that other processes make
STOP_AFTER = 60.0  # seconds that a run gets to stop before it is killed


class Listed(argparse.Action):
    """Values with commas, with spaces, or with both between them: '--seeds 42 43' is '--seeds 42,43'."""

    def __call__(self, parser, namespace, values, option_string=None):
        parts = iter(values)  # each a list or a dictionary, as `type` made it of a word
        joined = next(parts)
        for part in parts:
            joined = joined | part if isinstance(part, dict) else joined + part
        setattr(namespace, self.dest, joined)


class Run(NamedTuple):
    """One run of the grid: its folder and the command that makes it."""

    folder: Path
    command: list[str]
    options: dict  # of train.py, by name


# ---------------------------------------------------------------------------------------------- plan


def parse_numbers(text: str) -> list[int]:
    """'1-3,7' is [1, 2, 3, 7], in this order, each once; a comma at an end is none.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    numbers: list[int] = []
    for part in text.strip(' ,').split(','):
        if not (match := re.fullmatch(r'(\d+)(?:-(\d+))?', part.strip())):
            raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers such as 1-10 or 42,43,44")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first > 10_000:
            raise argparse.ArgumentTypeError(f"'{part}' is no range of numbers such as 1-10")
        numbers += range(first, last + 1)
    return list(dict.fromkeys(numbers))


def parse_names(text: str) -> list[str]:
    """'a,b' is ['a', 'b'], each once."""
    names = [name.strip() for name in text.split(',') if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError('names nothing')
    return list(dict.fromkeys(names))


def parse_gpus(text: str) -> list[str]:
    """'0,0,1' is ['0', '0', '1']: two runs share the first device."""
    return [name.strip() for name in text.split(',') if name.strip()]


def parse_sbatch(text: str) -> dict[str, str | bool]:
    """'partition=gpu,exclusive' is {'partition': 'gpu', 'exclusive': True}."""
    pairs = [pair.strip().removeprefix('--').partition('=') for pair in text.strip(' ,').split(',')]
    if not all(name for name, _, _ in pairs):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of NAME=VALUE or NAME")
    return {name: value if equals else True for name, equals, value in pairs}


def honest_folds(dataset: str, folds: list[int]) -> list[int]:
    """The folds that there are. KTH-TIPS2-b has four physical samples, so a fifth fold, often asked for, is left out.

    Raises:
        RunError: a fold that no data set of this name has.
    """
    number = DATASETS[dataset].get('folds')
    if dataset == 'kth_tips2' and 5 in folds:
        print('note: kth_tips2 has four physical samples and so four folds; fold 5 is left out', file=sys.stderr)
        folds = [fold for fold in folds if fold != 5]
    wrong = [fold for fold in folds if not 1 <= fold <= (number or fold)]
    if wrong and dataset != 'dtd':  # another tree in DTD's layout may have more lists; train.py counts them
        raise RunError(f'--folds: {dataset} has folds 1 to {number}, not {wrong[0]}')
    if not folds:
        raise RunError('--folds: no fold is left')
    return folds


def make_grid(args: argparse.Namespace, passed: list[str]) -> list[Run]:
    """The runs, fold by fold, so that a grid that is cut short can be compared as far as it got.

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
    parsed = vars(options.parse_args(common))  # a wrong option ends here, before anything has started
    for line in options.shrunk(argparse.Namespace(**parsed), options.RECIPES[parsed['recipe']]):
        say(line)
    grid = []
    for seed in dict.fromkeys(args.seeds):
        for fold in dict.fromkeys(args.folds):
            for model in dict.fromkeys(args.models):
                own = dict(model=model, fold=fold, seed=seed)
                options.check(argparse.Namespace(**parsed | own))
                folder = args.run_dir / runs.run_name(args.dataset, fold, model, seed)
                words = [word for key, value in own.items() for word in (f'--{key}', str(value))]
                grid.append(Run(folder, [sys.executable, str(TRAIN), *common, *words], parsed | own))
    return grid


def state_of(run: Run) -> str:
    """'complete', 'running' (by anyone), 'interrupted', 'new', or FOREIGN and what differs, which stops the plan."""
    try:
        config, results = runs.read_json(run.folder / 'config.json'), runs.read_json(run.folder / 'results.json')
    except RunError:
        return 'new'  # train.py will say what is damaged
    if results is None and not (run.folder / 'last.pt').exists():
        return 'running' if runs.is_claimed(run.folder) else 'new'
    config = config or {}
    had, unknown = config.get('options', {}), set(options.SYSTEM_OPTIONS)
    # What train.py resolves by the machine, or by the bytes of a file, is its to compare; the rest is known here.
    if run.options['amp'] == 'auto':
        unknown.add('amp')
    if isinstance(run.options['pretrained'], str) and isinstance(had.get('pretrained'), str):
        unknown.add('pretrained')
    wanted = dict(run.options)
    if 'batch_size' not in wanted['given']:  # train.py brings it down to the training set and the processes
        if results is None:
            unknown.add('batch_size')
        else:
            processes = config.get('defines', {}).get('processes', 1)
            n_train, n_val, n_test = (results.get(key, 10**9) for key in ('n_train', 'n_val', 'n_test'))
            n_images = n_train + n_val + n_test
            wanted['batch_size'] = options.largest_batch(wanted['batch_size'], n_train, n_images, processes)
    changes = [f'{k} {had.get(k)} -> {v}' for k, v in wanted.items() if k not in unknown and had.get(k) != v]
    if results is not None and results.get('fingerprint') != config.get('fingerprint'):
        changes.append('results.json is of another one')
    if changes:
        return f'{FOREIGN}: {", ".join(changes)}'
    if results is not None:
        return 'complete'
    return 'running' if runs.is_claimed(run.folder) else 'interrupted'


def epochs_done(run: Run) -> int:
    try:
        with open(run.folder / 'log.jsonl', 'rb') as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


# ---------------------------------------------------------------------------------------------- here


class Grid:
    """The runs on their way: which wait, which are being made here or elsewhere, which are complete or failed."""

    def __init__(self, todo: list[Run], complete: int, args: argparse.Namespace):
        self.waiting, self.elsewhere = deque(todo), deque()
        self.failed: list[Run] = []
        self.complete, self.total = complete, complete + len(todo)
        # Epochs of an earlier start say nothing of this one's speed.
        self.initial = complete + sum(epochs_done(run) / run.options['epochs'] for run in todo)
        self.children: dict[int, tuple[Run, subprocess.Popen]] = {}  # by slot
        self.signals: list[int] = []
        self.args = args
        self.bar = tqdm(
            total=self.total,
            initial=self.initial,
            smoothing=0,  # the mean speed: runs differ
            disable=None,  # off where stderr is no terminal
            **runs.terminal(),
            bar_format='{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}',
        )
        self.started, self.shown, self.told = time.monotonic(), 0.0, False

    def run(self) -> None:
        """Make all runs, or as many as a signal allows; no child outlives it."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, and means it
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
        """train.py in a session of its own, so that Ctrl-C reaches us alone."""
        try:
            child = runs.start(run.folder, run.command, self.environment(slot), start_new_session=True)
        except RunError as error:
            self.failed.append(run)
            say(f'failed: {run.folder.name} ({error})')
        else:
            self.children[slot] = run, child

    def environment(self, slot: int) -> dict[str, str]:
        """That of a child: its share of the cores, unless the user has said how many, and its GPU."""
        environment = dict(os.environ)
        if self.args.jobs > 1:
            environment.setdefault('OMP_NUM_THREADS', str(max(1, cores() // self.args.jobs)))
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
            elif code == runs.BUSY:
                self.elsewhere.append(run)
            else:
                self.failed.append(run)
                say(f'failed: {run.folder.name} ({describe_exit(code)}), see {run.folder / runs.LOG}')

    def done(self, run: Run) -> None:
        self.complete += 1
        if self.bar.disable:
            finished = self.progress()
            speed = (finished - self.initial) / (time.monotonic() - self.started)
            left = tqdm.format_interval((self.total - finished) / speed) if speed > 0 else '?'
            say(f'{self.complete}/{self.total} runs complete, {left} left: {run.folder.name}')

    def progress(self) -> float:
        """Runs that have ended, and how far those on the way have come."""
        waiting = (*(run for run, _ in self.children.values()), *self.waiting, *self.elsewhere)
        partly = sum(min(1.0, epochs_done(run) / run.options['epochs']) for run in waiting)
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
        while any(child.poll() is None for _, child in self.children.values()):
            if time.monotonic() > give_up or len(self.signals) > asked:
                for _, child in self.children.values():
                    if child.poll() is None:
                        os.killpg(child.pid, signal.SIGKILL)
            time.sleep(POLL)


def describe_exit(code: int) -> str:
    return f'exit code {code}' if code >= 0 else f'killed by {signal.Signals(-code).name}'


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def say(message: str) -> None:
    """Progress: a line on stderr, above the progress bar."""
    tqdm.write(message, file=sys.stderr)


# ---------------------------------------------------------------------------------------------- command line


def add_grid_args(parser: argparse.ArgumentParser) -> None:
    """What a grid is made of and how it is made: shared with ablation.py, which names the models itself."""
    options.add_dataset_args(parser)
    several = dict(nargs='+', action=Listed)
    parser.add_argument('--folds', **several, type=parse_numbers, default='1', help='such as 1-10 or 1,3')
    parser.add_argument('--seeds', **several, type=parse_numbers, default='42', help='such as 42,43,44')
    parser.add_argument('--run_dir', type=Path, default=Path('runs'), help='where run folders are made')
    parser.add_argument('--dry_run', action='store_true', help='print the plan and stop')
    parser.add_argument('--jobs', type=int, help='runs at once; by default one, or one for each of --gpus')
    parser.add_argument(
        '--gpus', **several, type=parse_gpus, help='devices to share, such as 0,1 (as in CUDA_VISIBLE_DEVICES)'
    )
    parser.add_argument('--launcher', choices=('local', 'slurm'), default='local', help='slurm: --jobs tasks at once')
    parser.add_argument(
        '--slurm',
        **several,
        type=parse_sbatch,
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
    parser.add_argument(
        '--models',
        nargs='+',
        action=Listed,
        type=parse_names,
        required=True,
        help='names, with commas or spaces between',
    )
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
    args.folds = honest_folds(args.dataset, args.folds)
    grid = make_grid(args, passed)
    if args.force and not args.dry_run:
        discard(grid)
    states = {run.folder.name: state_of(run) for run in grid}
    if args.dry_run:
        for run in grid:
            print(f'{states[run.folder.name]:12} {shlex.join(run.command)}')
    counts = Counter(state.partition(':')[0] for state in states.values())
    say(f'{counted(len(grid), "run")} in {args.run_dir}: {", ".join(f"{n} {state}" for state, n in counts.items())}')
    if args.force and args.dry_run:
        return
    if foreign := [name for name, state in states.items() if state.startswith(FOREIGN)]:
        raise RunError(
            f'{args.run_dir / foreign[0]} holds {states[foreign[0]]}'
            + (f', and {len(foreign) - 1} others do too' if foreign[1:] else '')
            + '; take another --run_dir, or --force to discard them'
        )
    todo = [run for run in grid if states[run.folder.name] != 'complete']
    if args.dry_run or not todo:
        return
    check_data(args)
    if args.launcher == 'slurm':
        return submit(args, todo)
    from cache import open_cache  # not for --dry_run: numpy takes as long to import as all else here

    open_cache(todo[0].options['cache'])  # what one run decodes, the next one finds
    work = Grid(todo, len(grid) - len(todo), args)
    work.run()
    for run in work.failed:
        print(f'\nfailed: {run.folder / runs.LOG}', *runs.last_words(run.folder), sep='\n    ', file=sys.stderr)
    if work.signals:
        again = 'the same command without --force' if args.force else 'the same command'
        say(f'stopped with {work.complete} of {work.total} runs complete; {again} goes on')
        sys.exit(128 + work.signals[0])
    if work.failed:
        raise RunError(f'{len(work.failed)} of {work.total} runs failed; the same command tries them again')
    say(f'{work.total} runs complete; `python summarize_runs.py --run_dir {args.run_dir}` makes a table of them')


def discard(grid: list[Run]) -> None:
    """Once, before anything starts: a run that is interrupted later goes on and is not discarded again."""
    for run in grid:
        if run.folder.is_dir():
            runs.claim(run.folder)
            runs.discard(run.folder)
            runs.release(run.folder)


def submit(args: argparse.Namespace, todo: list[Run]) -> None:
    """Hand the grid to SLURM, and leave."""
    try:
        import slurm  # needs submitit, which nothing else does
    except ModuleNotFoundError as error:
        raise RunError(f'--launcher slurm needs {error.name}: pip install {error.name}') from error
    jobs = slurm.submit([(run.folder, run.command) for run in todo], args.run_dir / 'slurm', args.jobs, args.slurm)
    print(*jobs, sep='\n')
    say(f'{counted(len(jobs), "run")} submitted; the same command with --dry_run shows how far they are')


def check_data(args: argparse.Namespace) -> None:
    """Look for the data set once, before every run does."""
    from datasets import DataError, load_splits  # not for --dry_run: takes a third of a second

    try:
        for fold in args.folds:
            load_splits(args.dataset, args.data_dir, fold)
    except DataError as error:
        raise RunError(str(error)) from error


def cli(argv: list[str] | None = None) -> None:
    with runs.user_errors('run_all.py'):
        main(*get_args_parser().parse_known_args(argv))


if __name__ == '__main__':
    cli()
