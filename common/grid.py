"""The runs of a grid: how far each has come, who makes them, and the search of --tune. No torch.

RUN_DIR/
    tuned.json         the search, and for each data set and model every setting's validation accuracy and the choice
    tune/SETTING/      the runs that were compared: ordinary run folders, which no table of RUN_DIR counts
    slurm/             the output of SLURM jobs
"""

import argparse
import functools
import itertools
import math
import os
import queue
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common import options, runs
from common.errors import BUSY, DIVERGED, RunError, UserError
from common.machine import cores
from common.runs import counted
from common.weights import weights_identity

SHOW = 1.0  # seconds between two looks at the logs
BUSY_POLL = 5.0  # seconds between two looks at a run that another process makes
WARN_BEFORE = 120  # seconds before its time limit that a SLURM job is signalled; train.py needs a few
FILE, FOLDER = 'tuned.json', 'tune'
TRIAL_SEED = 0  # if not given: not the grid's, so that no counted run is one of those that were compared


def say(message: str) -> None:
    """A line on stderr, above the progress bar."""
    tqdm.write(message, file=sys.stderr)


say_once = functools.cache(say)  # for what is found again at every look


# ---------------------------------------------------------------------------------------------- states


class State(Enum):
    """How far a run has come, as --dry_run prints it."""

    NEW = 'new'
    RUNNING = 'running'  # in any process
    INTERRUPTED = 'interrupted'
    COMPLETE = 'complete'
    DIVERGED = 'diverged'  # a trial whose loss is not finite, which is a result: another start would end there, too
    NOT_TUNED = 'not tuned'  # --tune has still to choose its options
    OTHER_OPTIONS = 'another configuration'
    OTHER_IMAGES = 'other images, labels or folds'


DONE = (State.COMPLETE, State.DIVERGED)
OTHER = (State.OTHER_OPTIONS, State.OTHER_IMAGES)


class Run(NamedTuple):
    """One run of the grid: its folder and the command that makes it."""

    folder: Path
    command: list[str]
    options: dict  # of train.py, by name
    split: str | None = None  # the digest of its images; None where they are not looked at
    tries: dict | None = None  # the setting that it tries for --tune
    waits: bool = False  # for --tune to choose its options


def state_of(run: Run) -> tuple[State, str]:
    """How far a run has come and, for OTHER_OPTIONS, what differs in its folder."""
    if run.waits:
        return State.NOT_TUNED, ''
    config, results = (runs.read_json(run.folder / name) or {} for name in ('config.json', 'results.json'))
    difference = difference_to(run.options, config) if config or results else ''
    split = config.get('defines', {}).get('split')
    other_images = None not in (run.split, split) and run.split != split
    begun = bool(results) or (run.folder / 'last.pt').exists()
    if difference or other_images:
        other = State.OTHER_OPTIONS if difference else State.OTHER_IMAGES
        return (other if begun else State.NEW), difference  # train.py replaces what has no checkpoint
    if results:
        return State.COMPLETE, ''
    if runs.is_claimed(run.folder):
        return State.RUNNING, ''
    if run.tries is not None and (run.folder / runs.DIVERGED_MARK).exists():
        return State.DIVERGED, ''
    return (State.INTERRUPTED if begun else State.NEW), ''


def difference_to(wanted: dict, config: dict) -> str:
    """How the options of a run differ from those of the run with this config.json; '' if they do not.

    Of weights and of the file of --import the content is compared, not the name. What train.py takes from the machine
    and the images it compares by itself, but it is not started for a complete run.
    """
    had, old, new = config.get('defines', {}), config.get('options', {}), options.defining(wanted)
    new['pretrained'] = weights_identity(wanted['model'], wanted['pretrained'])
    if wanted['imports']:
        from common.timm_models import import_digest  # here, because it imports torch; the model is of its file

        new['imported'] = import_digest(wanted['imports'])
    unknown = ['processes', 'split', 'preprocessing']
    if wanted['amp'] == 'auto':
        unknown.append('amp')
    if 'batch_size' not in (*wanted['given'], *old.get('given', ())) and old.get('recipe') == wanted['recipe']:
        unknown.append('batch_size')  # train.py brings the default down to the training set and the processes
    return runs.changes(had, new | {key: had[key] for key in unknown if key in had})


def fraction_done(run: Run) -> float:
    """The part of its epochs that a run has made."""
    log = run.folder / 'log.jsonl'
    return min(1.0, log.read_bytes().count(b'\n') / run.options['epochs']) if log.exists() else 0.0


# ---------------------------------------------------------------------------------------------- runs on this machine


class Local:
    """Makes runs, `jobs` at once, each by a train.py in a session of its own, so that Ctrl-C reaches run_all.py alone.

    Afterwards `complete` counts the runs of the grid, `failed` lists runs, and `signals` has what stopped it, if any.
    """

    def __init__(self, todo: list[Run], total: int, jobs: int, gpus: list[str] | None):
        self.todo, self.total, self.jobs = todo, total, jobs
        self.complete = total - len(todo)
        self.failed: list[Run] = []
        self.signals: list[int] = []
        self.children: set[subprocess.Popen] = set()
        self.environments: queue.SimpleQueue[dict] = queue.SimpleQueue()  # one for each job, of those that are free
        for job in range(jobs):
            environment = dict(os.environ)
            if jobs > 1:  # a share of the cores, unless the user has set it
                environment.setdefault('OMP_NUM_THREADS', str(max(1, cores() // jobs)))
            if gpus:
                environment['CUDA_VISIBLE_DEVICES'] = gpus[job % len(gpus)]
            self.environments.put(environment)

    def run(self) -> None:
        """Make all runs, or as many as a signal allows; no child outlives it."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets SIGHUP
                signal.signal(number, self.stop)
        # Where the bar starts: epochs of an earlier start must not count for the speed of this one.
        started, initial = time.monotonic(), self.complete + sum(map(fraction_done, self.todo))
        bar = tqdm(
            total=self.total,
            initial=initial,
            smoothing=0,  # mean speed, because runs differ
            disable=None,  # off where stderr is no terminal
            **runs.terminal(),
            bar_format='{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}',
        )
        with bar, ThreadPoolExecutor(self.jobs) as pool:
            pending = {pool.submit(self.make, run): run for run in self.todo}
            while pending:
                ended = wait(pending, timeout=SHOW, return_when=FIRST_COMPLETED).done
                codes = [(pending.pop(future), future.result()) for future in ended]
                for run, code in codes:
                    if code == BUSY and not self.signals:
                        say_once(f'another process makes {run.folder}, which is looked at again after the others')
                        pending[pool.submit(self.make, run)] = run
                    else:
                        self.count(run, code)
                bar.n = self.complete + len(self.failed) + sum(map(fraction_done, pending.values()))
                bar.set_description_str(
                    f'{self.complete}/{self.total} runs, {len(self.children)} at work, {len(self.failed)} failed'
                )
                names = [run.folder.name for run, code in codes if code == 0]
                if bar.disable and names:
                    made, seconds = bar.n - initial, time.monotonic() - started
                    left = tqdm.format_interval((self.total - bar.n) * seconds / made) if made else '?'
                    say(f'{self.complete}/{self.total} complete, {left} left: {", ".join(names)}')

    def make(self, run: Run) -> int:
        """Make a run unless it is made already; returns train.py's exit code, BUSY where another process makes it."""
        environment = self.environments.get()
        try:
            if state_of(run)[0] in DONE:
                return 0
            if self.signals:
                return BUSY
            if runs.is_claimed(run.folder):
                time.sleep(BUSY_POLL)
                return BUSY
            child = runs.start(run.folder, run.command, environment, start_new_session=True)
            self.children.add(child)
            if self.signals:  # they came before there was a child to stop
                child.terminate()
            code = runs.finish(run.folder, child)
            self.children.remove(child)
            return 0 if run.tries is not None and code == DIVERGED else code
        except UserError as error:
            say(f'{run.folder.name}: {error}')
            return error.exit_code
        finally:
            self.environments.put(environment)

    def count(self, run: Run, code: int) -> None:
        """Count a run by the exit code of its train.py; one that a signal stopped is left out."""
        if code == 0:
            self.complete += 1
        elif not self.signals:
            self.failed.append(run)
            cause = f'exit code {code}' if code > 0 else f'killed by {signal.Signals(-code).name}'
            say(f'failed: {run.folder.name} ({cause}), see {run.folder / runs.LOG}')

    def stop(self, number: int, *_) -> None:
        """Ask the children to stop; kill them when asked again."""
        self.signals.append(number)
        children = list(self.children)
        if len(self.signals) == 1:
            say(f'stopping {counted(len(children), "run")}; a second signal kills them')
            for child in children:
                child.terminate()
            return
        for child in children:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


# ---------------------------------------------------------------------------------------------- SLURM


class Task:
    """Makes one run inside a job of SLURM; submitit asks for a class with `checkpoint`.

    When SLURM preempts it, requeues it or signals that its time is up, train.py stops and the task is queued again;
    train.py then resumes.
    """

    def __init__(self, run: Run):
        self.run = run._replace(folder=run.folder.resolve())

    def __call__(self) -> None:
        import submitit

        os.environ.setdefault('OMP_NUM_THREADS', os.environ.get('SLURM_CPUS_PER_TASK', '1'))
        local = Local([self.run], total=1, jobs=1, gpus=None)
        requeue = signal.signal(signal.SIGUSR2, local.stop)  # submitit's: calls checkpoint, requeues the job and exits
        local.run()
        if local.signals:
            squeue = ['squeue', '--noheader', '--jobs', submitit.JobEnvironment().raw_job_id, '--format', '%T']
            state = subprocess.run(squeue, capture_output=True, text=True).stdout.strip()
            if state in ('RUNNING', 'SIGNALING'):  # out of time, or preempted with grace: SLURM will not requeue it
                requeue(signal.SIGUSR2, None)
            sys.exit(128 + local.signals[0])  # SLURM ends the job and requeues it
        if local.failed:
            sys.exit(1)

    def checkpoint(self):
        """The task to submit after a time-out: the same one."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit(todo: list[Run], folder: Path, at_once: int, sbatch: dict[str, str | bool]) -> list[str]:
    """Submit runs to SLURM as an array of which `at_once` may run at a time; returns the numbers of the jobs.

    `folder` is for their output; `sbatch` has long options of sbatch by name, `time` in minutes, True for no value.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise RunError(f'--launcher slurm needs {error.name}: pip install {error.name}') from error
    more = {name.replace('-', '_'): value for name, value in sbatch.items()}
    minutes = str(more.pop('time', '60'))
    if not minutes.isdigit() or int(minutes) < 1:
        raise RunError(f'--slurm time={minutes}: must be a number of minutes')
    here = shlex.quote(str(Path(__file__).resolve().parent.parent))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # However often a run is interrupted, it resumes.
        executor = submitit.SlurmExecutor(folder=folder.resolve(), max_num_timeout=1_000_000)
        executor.update_parameters(
            job_name='twistnet',
            time=int(minutes),
            signal_delay_s=min(WARN_BEFORE, 20 * int(minutes)),
            array_parallelism=at_once,
            stderr_to_stdout=True,
            setup=[f'export PYTHONPATH={here}:$PYTHONPATH'],  # where the job finds this file
            additional_parameters=dict(requeue=True, **more),
        )
        with executor.batch():
            jobs = [executor.submit(Task(run)) for run in todo]
    except (RuntimeError, submitit.core.utils.FailedJobError) as error:  # no sbatch; sbatch's refusal
        raise RunError(f'SLURM: {" ".join(str(error).split())}') from error
    return [job.job_id for job in jobs]


# ---------------------------------------------------------------------------------------------- the search of --tune


class Search(NamedTuple):
    """What is tried for each model on a data set: all combinations of some options' values, on one fold and seed."""

    run_dir: Path
    dataset: str  # or its --name
    options: dict  # of train.py, those that all trials share with the grid
    values: dict[str, list]  # by option, in the order given
    fold: int
    seed: int

    @property
    def settings(self) -> list[dict]:
        """The options of every combination, in the order given."""
        return [dict(zip(self.values, each)) for each in itertools.product(*self.values.values())]

    @property
    def record(self) -> dict:
        """What tuned.json says of the search."""
        tune = ' '.join(f'{name}={",".join(map(value_text, values))}' for name, values in self.values.items())
        return dict(tune=tune, fold=self.fold, seed=self.seed)


def plan_search(args: argparse.Namespace, parsed: argparse.Namespace) -> Search:
    """The search that run_all's options ask for; a fold or seed not named is that of tuned.json, else the default.

    `parsed` are the options of train.py.
    """
    old, values = dict(fold=args.folds[0], seed=TRIAL_SEED) | read_record(args.run_dir), parse_tune(args.tune)
    left_out = {'dataset', 'fold', 'model', 'seed', *options.SYSTEM_OPTIONS, *values}
    common = {key: value for key, value in vars(parsed).items() if key not in left_out}
    common['pretrained'] = bool(parsed.pretrained)
    fold = old['fold'] if args.tune_fold is None else args.tune_fold
    seed = old['seed'] if args.tune_seed is None else args.tune_seed
    return Search(args.run_dir, parsed.name or parsed.dataset, common, values, fold, seed)


def parse_tune(words: list[str]) -> dict[str, list]:
    """The values of each option, as train.py's parser reads them: ['lr=0.1,.2 ema=on'] is {'lr': [0.1, 0.2], ..}.

    What can be searched is how a model is trained: data, model, length and machine are those of the grid.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for add in (options.add_optimisation_args, options.add_optimizer_args, options.add_augmentation_args):
        add(parser)
    options.add_view_args(parser)
    defaults = vars(parser.parse_args([]))
    known = defaults.keys() - {'epochs', 'crop_scale', 'patience', 'freeze', 'train_on', *options.OWN_DATA}
    values: dict[str, list] = {}
    for word in ' '.join(words).split():
        name, _, texts = word.removeprefix('--').partition('=')
        if name not in known or not texts.strip(','):
            raise RunError(f"--tune: '{word}' is not NAME=VALUE,.. with a NAME among {', '.join(sorted(known))}")
        if name in values:
            raise RunError(f'--tune: {name} is given twice; give all its values at once')
        values[name] = []
        for text in filter(None, texts.split(',')):
            switch = dict(on=f'--{name}', off=f'--no-{name}') if isinstance(defaults[name], bool) else {}
            try:
                value = getattr(parser.parse_args([switch.get(text, f'--{name}={text}')]), name)
            except argparse.ArgumentError as error:
                hint = '; a switch is on or off' if switch else ''
                raise RunError(f'--tune: {name}={text}: {error}{hint}') from error
            if value not in values[name]:
                values[name].append(value)
    if not values:
        raise RunError('--tune: names no option')
    return values


def value_text(value: bool | float | str) -> str:
    return ('on' if value else 'off') if isinstance(value, bool) else str(value)


def text_of(setting: dict, between: str = ', ', equals: str = ' ') -> str:
    """{'lr': 0.1, 'ema': False} is 'lr 0.1, ema off'."""
    return between.join(f'{name}{equals}{value_text(value)}' for name, value in setting.items())


def words_of(setting: dict) -> list[str]:
    """Arguments of train.py: {'lr': 0.1, 'ema': False} is ['--lr', '0.1', '--no-ema']."""
    words = []
    for name, value in setting.items():
        words += [f'--{name}' if value else f'--no-{name}'] if isinstance(value, bool) else [f'--{name}', str(value)]
    return words


def choose(model: str, trials: list[Run]) -> dict:
    """What tuned.json says of a model: the setting with the best validation accuracy, the first on ties, and all."""
    listed = []
    for run in trials:
        results = runs.read_json(run.folder / 'results.json')  # None: it has diverged
        listed.append(dict(options=run.tries, val_acc=results and results['best_val_acc']))
    finite = [trial for trial in listed if trial['val_acc'] is not None]
    if not finite:
        raise RunError(f'--tune: {model} diverges with every setting; try other values, or leave it out of --models')
    best = max(finite, key=lambda trial: trial['val_acc'])
    return dict(chosen=best['options'], val_acc=best['val_acc'], trials=listed)


def edge_notes(chosen: dict, values: dict[str, list]) -> list[str]:
    """A note for each number that was chosen at the edge of those tried, beyond which others are allowed."""
    notes = []
    for name, tried in values.items():
        numbers = [value for value in tried if isinstance(value, int | float) and not isinstance(value, bool)]
        low, high = options.BOUNDS.get(name, (-math.inf, math.inf))
        for edge, bound, word, more in ((min, low, 'lowest', 'lower'), (max, high, 'highest', 'higher')):
            if len(numbers) > 1 and chosen[name] == edge(numbers) != bound:
                notes.append(f'{name} {chosen[name]} is the {word} that was tried; a {more} one may be better')
    return notes


# ---------------------------------------------------------------------------------------------- tuned.json


def read_record(run_dir: Path) -> dict:
    """The contents of tuned.json; {} where there is none."""
    try:
        return runs.read_json(run_dir / FILE) or {}
    except RunError as error:
        raise RunError(
            f'{run_dir / FILE}: damaged; delete it, and the same run_all.py --tune makes it again from the trials'
        ) from error


def read_choices(search: Search, again: Iterable[str] = ()) -> tuple[dict, dict[str, dict]]:
    """The contents of tuned.json, and the part of them that is of the models of the search's data set.

    What was chosen there must be of the same search. Models of `again` are left out.
    """
    record = read_record(search.run_dir) or dict(datasets={})
    for model in again:
        record['datasets'].get(search.dataset, dict(models={}))['models'].pop(model, None)
    if not any(entry['models'] for entry in record['datasets'].values()):  # nothing that could contradict
        record = search.record | dict(datasets={})
    entry = record['datasets'].setdefault(search.dataset, dict(models={}))
    if not entry['models']:
        entry['options'] = search.options
    new = search.record | search.options
    old = options.NEUTRAL | record | entry['options']  # an option that came later had this value
    if difference := runs.changes({key: old.get(key) for key in new}, new):
        raise RunError(
            f'{search.run_dir / FILE} is of another search ({difference}); give its options, take another --run_dir, '
            'or delete it (trials that fit are kept)'
        )
    return record, entry['models']


def add_choices(search: Search, chosen: dict[str, dict], again: Iterable[str] = ()) -> None:
    """Write what `choose` returned for some models into tuned.json, to which other run_all.py may add, too."""
    runs.claim(search.run_dir / FOLDER, patience=60)
    try:
        record, models = read_choices(search, again)
        models.update(chosen)
        runs.write_json(search.run_dir / FILE, record)
    finally:
        runs.release(search.run_dir / FOLDER)


def tuning_of(search: Search, choice: dict) -> dict:
    """What config.json records of a run whose options were chosen, as train.py's option `tuned`."""
    diverged = sum(trial['val_acc'] is None for trial in choice['trials'])
    return search.record | dict(options=choice['chosen'], tried=len(choice['trials']), diverged=diverged)


def record_tuning(run: Run) -> None:
    """Let config.json say how a run was tuned that was made before the search, or before another one."""
    config, tuned = runs.read_json(run.folder / 'config.json'), run.options['tuned']
    if tuned and config['options'].get('tuned') != tuned:
        runs.write_json(run.folder / 'config.json', config | dict(options=config['options'] | dict(tuned=tuned)))
