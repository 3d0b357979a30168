"""The runs of a grid: the folder and the command of each, how far it has come, and the processes that make them.

No torch.
"""

import argparse
import functools
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common import options, runs
from common.errors import BUSY, ModelError, RunError
from common.machine import cores
from common.runs import counted
from common.weights import weights_identity

OTHER_CONFIG = 'another configuration'
DONE = ('complete', 'diverged')  # nothing is left to do
POLL = 0.2  # seconds between two checks of the children
SHOW = 1.0  # seconds between two checks of their logs
BUSY_POLL = 5.0  # seconds between two checks of runs that other processes make
STOP_AFTER = 60.0  # seconds that a run gets to stop before it is killed


class Run(NamedTuple):
    """One run of the grid: its folder and the command that makes it."""

    folder: Path
    command: list[str]
    options: dict  # of train.py, by name
    trial: bool = False  # of --tune: that it diverges is a result


def state_of(run: Run) -> str:
    """'complete', 'running' (by anyone), 'interrupted', 'new', or OTHER_CONFIG and what differs; a trial: 'diverged'.

    Diverged is a trial whose loss is not finite; training is deterministic, so that another start would end there too.
    """
    try:
        config, results = runs.read_json(run.folder / 'config.json'), runs.read_json(run.folder / 'results.json')
    except RunError:
        return 'new'  # train.py will report what is damaged
    begun = (run.folder / 'last.pt').exists()
    difference = difference_to(run.options, config or {}, results)
    if results is not None and results.get('fingerprint') != (config or {}).get('fingerprint'):
        difference += ', ' * bool(difference) + 'results.json is of another one'
    if difference and (begun or results is not None):
        return f'{OTHER_CONFIG}: {difference}'
    if results is not None:
        return 'complete'
    if runs.is_claimed(run.folder):
        return 'running'
    if run.trial and config and not difference and runs.has_diverged(run.folder):
        return 'diverged'
    return 'interrupted' if begun else 'new'


def difference_to(wanted: dict, config: dict, results: dict | None) -> str:
    """How the options of a run differ from those of the run in its folder; '' if they do not.

    What train.py resolves from the machine is compared by train.py, which is not started for a complete run; the images
    are compared by run_all.py (check_data). Of weights the content is compared, not the name.
    """
    had, unknown = options.NEUTRAL | config.get('options', {}), set(options.SYSTEM_OPTIONS)
    if wanted['amp'] == 'auto':
        unknown.add('amp')
    if wanted['pretrained'] and (digest := config.get('defines', {}).get('pretrained')):  # whatever they are called
        had, wanted = had | dict(pretrained=digest), wanted | dict(pretrained=weights_now(wanted, digest))
    elif isinstance(wanted['pretrained'], str) and isinstance(had.get('pretrained'), str):
        unknown.add('pretrained')
    if 'batch_size' not in wanted['given']:  # train.py brings it down to the training set and the processes
        if results is None:
            unknown.add('batch_size')
        else:
            processes = config.get('defines', {}).get('processes', 1)
            counts = [results.get(f'n_{subset}', 10**9) for subset in ('train', 'val', 'test')]
            batch_size = options.largest_batch(wanted, counts[0], sum(counts), processes)
            wanted = wanted | dict(batch_size=batch_size)
    known = wanted.keys() - unknown
    if wanted.get('imports') and (digest := config.get('defines', {}).get('imported')):
        from common.timm_models import import_digest  # here, because it imports torch; the model is of its file

        had, wanted = had | dict(imported=digest), wanted | dict(imported=import_digest(wanted['imports']))
        known = known | {'imported'}
    return runs.changes({key: had.get(key) for key in known}, {key: wanted[key] for key in known})


def weights_now(wanted: dict, recorded: str) -> str:
    """What a run that starts now would record of its weights; `recorded`, with a note, where they cannot be read."""
    try:
        return weights_identity(wanted['model'], wanted['pretrained'])
    except ModelError as error:
        say_once(f'note: {error}; what was made of them is not compared with it')
        return recorded


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
                if state_of(run) in DONE:
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
            environment.setdefault('OMP_NUM_THREADS', str(max(1, cores() // self.args.jobs)))
        if self.args.gpus:
            environment['CUDA_VISIBLE_DEVICES'] = self.args.gpus[slot % len(self.args.gpus)]
        return environment

    def collect(self) -> None:
        for slot, (run, child) in list(self.children.items()):
            if (code := child.poll()) is None:
                continue
            del self.children[slot]
            if code == 0 or (run.trial and state_of(run) == 'diverged'):
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
            what = 'trials' if run.trial else 'runs'
            say(f'{self.complete}/{self.total} {what} complete, {left} left: {run.folder.name}')

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


say_once = functools.cache(say)  # for what is found again at every run of a grid
