"""Run folders: their name, their files and how these are written. No torch, so that scripts that read runs start fast.

RUN_DIR/{dataset or --name}_fold{fold}_{model}_seed{seed}/
    config.json    options, environment and fingerprint
    split.csv      its images as a list, where --lists, --groups or --folds_total divide them
    log.jsonl      an object an epoch
    last.pt        where an interrupted run resumes; deleted when the run is complete
    best.pt        the weights with the best validation accuracy
    test_predictions.csv   the probabilities of each test image
    results.json   written last: its presence means that the run is complete
    .lock          locked while a process makes the run
    train.log      the output of train.py, if run_all.py started it
    diverged       empty: run_all.py saw train.py end because a loss was not finite
"""

import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import DIVERGED, RunBusy, RunError
from common.registry import nameable

try:
    import fcntl
except ModuleNotFoundError:  # on Windows; one line instead of a traceback
    sys.exit(f'{Path(sys.argv[0]).name}: error: needs Linux or macOS (file locks); on Windows, run it in WSL')

LOG = 'train.log'
HEADER = '--- '  # begins the line before each start in LOG
NAME_THEM = '--name NAME gives these images a name of their own'
PREDICTIONS, SPLIT, DIVERGED_MARK = 'test_predictions.csv', 'split.csv', 'diverged'
RUN_FILES = ('config.json', SPLIT, 'log.jsonl', 'last.pt', 'best.pt', PREDICTIONS, DIVERGED_MARK, 'results.json')
EVENTS = 'events.out.tfevents.*'  # of --tensorboard, beside the log


def counted(number: int, noun: str) -> str:
    """'1 epoch', '2 epochs', '3 classes'."""
    return f'{number} {noun}' + ('es' if noun.endswith('s') else 's') * (number != 1)


def run_name(dataset: str, fold: int, model: str, seed: int) -> str:
    return f'{dataset}_fold{fold}_{model}_seed{seed}'


def write_atomic(path: Path, data: bytes) -> None:
    """Write to a temporary name, flush to disk and move into place, so that `path` is complete at any moment."""
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(
            f'{path}: cannot be written ({error.strerror}); what was saved before is intact, and the same '
            'command can be repeated'
        ) from error


def write_json(path: Path, value: dict) -> None:
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + '\n').encode())


def write_log(path: Path, lines: list[dict]) -> None:
    write_atomic(path, ''.join(json.dumps(line, allow_nan=False) + '\n' for line in lines).encode())


def read_json(path: Path) -> dict | None:
    """The object in a JSON file; None where there is no file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f'{path}: damaged ({error}); train.py --force makes this run again') from error


def read_log(path: Path, numbers: tuple[str, ...] = ('epoch',)) -> list[dict]:
    """The epochs of log.jsonl; a line without these finite numbers is named on stderr and left out."""
    if not path.is_file():
        raise RunError(f'{path}: no such log')
    epochs = []
    for place, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line = json.loads(text)
            if not all(math.isfinite(line[key]) for key in numbers):
                raise ValueError
            epochs.append(line)
        except (ValueError, KeyError, TypeError):
            print(f'left out: {path} line {place}: no complete epoch', file=sys.stderr)
    return epochs


def find_runs(run_dir: Path) -> list[Path]:
    """The run folders in run_dir, complete or not, by name."""
    folders = sorted(path.parent for path in run_dir.glob('*/config.json'))
    if not folders:
        raise RunError(f'{run_dir}: holds no run; train.py --run_dir {run_dir} makes one')
    return folders


_claims = {}  # the lock files of this process, open and so locked until it ends


def claim(folder: Path, patience: float = 0.5) -> None:
    """Make and lock a run folder until this process ends, however it ends: the kernel frees the lock.

    The lock is POSIX's (fcntl), so it works between machines too if the shared file system has locks: NFS 4, Lustre
    mounted with flock, GPFS. `patience` is in seconds: is_claimed in another process holds the lock for an instant.

    Raises:
        RunBusy: another process makes this run.
    """
    if folder.resolve() in _claims:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / '.lock', 'a+')  # noqa: SIM115
    except OSError as error:
        raise RunError(f'{folder}: cannot be made or written ({error.strerror})') from error
    give_up = time.monotonic() + patience
    while not _try_lock(file):
        if time.monotonic() > give_up:
            file.seek(0)
            owner = file.read().strip()
            file.close()
            raise RunBusy(f'{folder}: being made by another process ({owner or "unknown"}); wait for it or stop it')
        time.sleep(0.05)
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    _claims[folder.resolve()] = file


def release(folder: Path) -> None:
    """Unlock a folder."""
    _claims.pop(folder.resolve()).close()


def discard(folder: Path) -> None:
    """Remove the files of a run; train.log stays."""
    for name in reversed(RUN_FILES):  # results.json first: a partly removed run is never complete
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob(EVENTS):
        path.unlink()


def is_claimed(folder: Path) -> bool:
    """True while another process makes the run in this folder. Must not be called by the process that claimed it."""
    try:
        with open(folder / '.lock', 'r+') as file:
            return not _try_lock(file)
    except OSError:  # no such run, or no permission to write
        return False


def _try_lock(file) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either for a lock that another process holds
        return False
    except OSError as error:
        raise RunError(f'{file.name}: this file system has no locks ({error.strerror}); take another one') from error
    return True


def start(folder: Path, command: list[str], environment: dict[str, str], **popen) -> subprocess.Popen:
    """Start a command that makes the run in a folder; its output is appended to the folder's LOG."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DIVERGED_MARK).unlink(missing_ok=True)
        with open(folder / LOG, 'a', encoding='utf-8', errors='backslashreplace') as log:
            log.write(f'{HEADER}{time.strftime("%Y-%m-%d %H:%M:%S")} {shlex.join(command)}\n')
            log.flush()
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, **popen)
    except OSError as error:
        raise RunError(f'{error.filename or folder}: cannot be written ({error.strerror})') from error


def finish(folder: Path, child: subprocess.Popen) -> int:
    """Wait for what `start` started; returns its exit code and, of DIVERGED, leaves a mark in the folder."""
    code = child.wait()
    if code == DIVERGED:
        (folder / DIVERGED_MARK).touch()
    return code


def log_tail(folder: Path, lines: int = 3) -> list[str]:
    """The last lines of a folder's LOG, after its last start."""
    try:
        log = (folder / LOG).read_text(encoding='utf-8', errors='replace').replace('\r', '\n').splitlines()
    except OSError as error:
        return [f'{folder / LOG}: cannot be read ({error.strerror})']
    start = max((i for i, line in enumerate(log) if line.startswith(HEADER)), default=-1)
    return [line for line in log[start + 1 :] if line.strip()][-lines:]


def terminal() -> dict[str, int]:
    """The terminal's size as arguments of tqdm, which draws nothing if a terminal reports 0 columns."""
    size = shutil.get_terminal_size()  # 80 x 24 then
    return dict(ncols=size.columns, nrows=size.lines)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def git_commit(say: Callable = lambda line: print(line, file=sys.stderr)) -> str | None:
    """The commit of this code, with '-dirty' if files differ from it; None outside a git checkout of its own.

    The folder may lie in a checkout of another repository: this file must be tracked, as common/runs.py. In a checkout
    of this code whose commit git does not tell, `say` gets a note with the reason.
    """
    here = Path(__file__).resolve()
    root, own = here.parent.parent, f'{here.parent.name}/{here.name}'
    # A hook of another repository sets GIT_DIR and the like.
    environment = {name: value for name, value in os.environ.items() if not name.startswith('GIT_')}

    def git(*command: str) -> str:
        # git refuses a folder that another user owns, as in a container; this code runs from it all the same.
        command = ['git', '-C', str(root), '-c', f'safe.directory={root}', *command]
        return subprocess.run(command, capture_output=True, check=True, text=True, env=environment).stdout.strip()

    try:
        if git('ls-files', '--full-name', own) != own:
            return None
        return git('describe', '--always', '--dirty', '--abbrev=40', '--exclude=*')
    except (OSError, subprocess.CalledProcessError) as error:
        if (root / '.git').exists():
            why = getattr(error, 'stderr', None) or str(error)
            say(f'note: config.json records no commit: {why.strip().splitlines()[0]}')
        return None


def open_run(folder: Path, config: dict, force: bool) -> tuple[dict | None, str]:
    """Begin a run in its folder, or check that the one there is of this configuration.

    Args:
        folder: the run folder.
        config: what config.json holds; 'fingerprint' decides whether two runs are the same, 'defines' says why not.
        force: discard what is there.

    Returns:
        the results if the run is complete, and a note on what changed since it was begun ('' for nothing).
    """
    if force or not (folder / 'results.json').exists():
        check_neighbours([folder], config['defines'], config.get('tree'))
    if force:
        discard(folder)
    old, results = read_json(folder / 'config.json'), read_json(folder / 'results.json')
    if results is None and not (folder / 'last.pt').exists():  # nothing to lose, whatever began here
        write_json(folder / 'config.json', config)
        return None, ''
    old, way_out = old or {}, 'take another --run_dir, or --force to discard it'
    if old.get('tree') != config.get('tree') and nameable(config['defines'].get('dataset')):
        way_out = f'{NAME_THEM}, {way_out}'
    if old.get('fingerprint') != config['fingerprint']:
        raise other_configuration(folder, changes(old.get('defines', {}), config['defines']), way_out)
    if results is None and old.get('tree') != config.get('tree'):  # a damaged test image has been replaced, say
        write_json(folder / 'config.json', old | dict(tree=config.get('tree')))
    if results is not None or old.get('environment') == config['environment']:
        return results, ''
    return None, f'begun in another environment ({changes(old.get("environment", {}), config["environment"])})'


def check_neighbours(folders: Sequence[Path], defines: dict, tree: str | None) -> None:
    """Refuse runs where complete ones beside them are called the same and are of other images or other folds.

    `defines` has dataset and name; only images that --name can name are checked. `tree` is of tree_digest.
    """
    dataset = defines.get('dataset')
    if not nameable(dataset):
        return
    name = defines.get('name') or dataset
    for path in sorted(folders[0].parent.glob(f'{name}_fold[0-9]*/results.json')):
        other = None
        with contextlib.suppress(RunError):  # a damaged one is named by whoever reads it
            other = (read_json(path.with_name('config.json')) or {}).get('tree')
        if path.parent not in folders and other not in (None, tree):
            raise RunError(
                f"{path.parent} is of other images or other folds, and both are called '{name}'; {NAME_THEM}, or take "
                'another --run_dir'
            )


def other_configuration(where: Path, difference: str, way_out: str) -> RunError:
    """The error for a folder or checkpoint whose run is not the one asked for."""
    return RunError(f'{where} holds a run of another configuration ({difference}); {way_out}')


def fingerprint(defines: dict) -> str:
    """A digest of the values that define the result of a run."""
    return digest(json.dumps(defines, sort_keys=True).encode())


def opening(
    args, data: str, images: dict[str, int], classes: int, weights: str | None, environment: dict, world: int
) -> str:
    """The first line of a run: what is trained on what, and how it is computed.

    Args:
        data: the data set in words.
        images: how many to 'train', 'validate', ..
        weights: what was loaded, in words; None for nothing.
        environment: as distributed.environment_of gives it.
        world: the number of processes.
    """
    counts = ', '.join(f'{count} to {what}' for what, count in images.items())
    several = f' ({world} processes)' if world > 1 else ''
    return (
        f'{data}, images: {counts}; classes: {classes}; model: {args.model}, '
        f'weights: {weights or "from scratch"}; '
        f'device: {environment["device"]}{several}, precision: {"float32" if args.amp == "off" else args.amp}, '
        f'threads: {environment["threads"]}'
    )


def changes(old: dict, new: dict) -> str:
    """'key old -> new' for every value that differs."""
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return ', '.join(f'{key} {old.get(key)} -> {new.get(key)}' for key in keys)
