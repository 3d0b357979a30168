"""Run folders: their name, their files and how these are written. No torch: the scripts that only read runs are quick.

RUN_DIR/{dataset}_fold{fold}_{model}_seed{seed}/
    config.json    options, environment and fingerprint
    log.jsonl      an object an epoch
    last.pt        where an interrupted run goes on; deleted when the run is complete
    best.pt        the weights with the best validation accuracy
    results.json   written last: its presence means that the run is complete
    .lock          locked while a process makes the run
    train.log      what train.py said, where run_all.py started it
"""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from locks import fcntl

BUSY = 75  # exit code of train.py where another process makes this run (EX_TEMPFAIL of sysexits.h)
LOG = 'train.log'
HEADER = '--- '  # begins the line before each start in LOG
RUN_FILES = ('config.json', 'log.jsonl', 'last.pt', 'best.pt', 'results.json')


class RunError(RuntimeError):
    """A run cannot go on or cannot be read; the message is one line that says why and what is left."""


@contextlib.contextmanager
def user_errors(script: str) -> Iterator[None]:
    """The body of a script: what a user can mend ends it with one line on stderr, and a reader that left, quietly."""
    sys.stdout.reconfigure(errors='replace')  # a terminal without a sign gets '?'
    try:
        yield
        sys.stdout.flush()
    except RunError as error:
        sys.exit(f'{script}: error: {error}')
    except KeyboardInterrupt:
        print(f'\n{script}: stopped', file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more at its end
        sys.exit(f'{script}: error: {error.filename or "stdout"}: {error.strerror}')


class RunBusy(RunError):
    """Another process is making this run."""


def counted(number: int, noun: str) -> str:
    """'1 epoch', '2 epochs', '3 classes'."""
    return f'{number} {noun}' + ('es' if noun.endswith('s') else 's') * (number != 1)


def run_name(dataset: str, fold: int, model: str, seed: int) -> str:
    return f'{dataset}_fold{fold}_{model}_seed{seed}'


def write_atomic(path: Path, data: bytes) -> None:
    """Write to a temporary name, flush to disk and move into place: `path` is whole at any moment.

    Raises:
        RunError: the file cannot be written (a full disk, say); what stood there before is untouched.
    """
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
            f'{path}: cannot be written ({error.strerror}); what was saved before is intact, and the run can go on '
            'from there'
        ) from error


def write_json(path: Path, value: dict) -> None:
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + '\n').encode())


def write_log(path: Path, lines: list[dict]) -> None:
    write_atomic(path, ''.join(json.dumps(line, allow_nan=False) + '\n' for line in lines).encode())


def read_json(path: Path) -> dict | None:
    """The object in a JSON file; None where there is no file.

    Raises:
        RunError: the file is damaged.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f'{path}: damaged ({error}); train.py --force makes this run again') from error
    if not isinstance(value, dict):
        raise RunError(f'{path}: damaged (no object); train.py --force makes this run again')
    return value


def read_log(path: Path) -> list[dict]:
    """The objects of log.jsonl, an epoch each.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError as error:
        raise RunError(f'{path}: no such log') from error
    except ValueError as error:
        raise RunError(f'{path}: damaged ({error})') from error


def find_runs(run_dir: Path) -> list[Path]:
    """The run folders in run_dir, complete or not, by name.

    Raises:
        RunError: there is no such folder, or no run in it.
    """
    folders = sorted(path.parent for path in run_dir.glob('*/config.json'))
    if not folders:
        raise RunError(f'{run_dir}: holds no run; train.py --run_dir {run_dir} makes one')
    return folders


_claims = {}  # the lock files of this process, open and so locked until it ends


def claim(folder: Path, patience: float = 0.5) -> None:
    """Make a run folder this process's own until it ends, however it ends: the kernel frees the lock.

    The lock is POSIX's (fcntl), so it holds among machines too where the shared file system has locks: NFS 4, Lustre
    mounted with flock, GPFS.

    Args:
        folder: the run folder; made if missing.
        patience: seconds to try; is_claimed of another process holds the lock for an instant.

    Raises:
        RunBusy: another process makes this run. RunError: the folder cannot be made or has no locks.
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
    """Give up a claim."""
    _claims.pop(folder.resolve()).close()


def discard(folder: Path) -> None:
    """Remove the run in a folder; its log of starts stays."""
    for name in reversed(RUN_FILES):  # results.json first: what is left of a run is never taken for complete
        (folder / name).unlink(missing_ok=True)


def is_claimed(folder: Path) -> bool:
    """True while another process makes the run in this folder. A process that has claimed it must not ask."""
    try:
        with open(folder / '.lock', 'r+') as file:
            return not _try_lock(file)
    except OSError:  # no such run, or not ours to write
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
    """Start a command that makes the run in a folder; what it says is appended to the folder's LOG.

    Raises:
        RunError: the folder or the log cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOG, 'a', encoding='utf-8', errors='backslashreplace') as log:
            log.write(f'{HEADER}{time.strftime("%Y-%m-%d %H:%M:%S")} {shlex.join(command)}\n')
            log.flush()
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, **popen)
    except OSError as error:
        raise RunError(f'{error.filename or folder}: cannot be written ({error.strerror})') from error


def last_words(folder: Path, lines: int = 3) -> list[str]:
    """The last lines of a folder's LOG, since its last start."""
    try:
        said = (folder / LOG).read_text(encoding='utf-8', errors='replace').replace('\r', '\n').splitlines()
    except OSError as error:
        return [f'{folder / LOG}: cannot be read ({error.strerror})']
    begin = max((i for i, line in enumerate(said) if line.startswith(HEADER)), default=-1)
    return [line for line in said[begin + 1 :] if line.strip()][-lines:]


def terminal() -> dict[str, int]:
    """Its size, for tqdm, which draws nothing where a terminal says that it has no columns and no rows."""
    size = shutil.get_terminal_size()  # 80 x 24 there
    return dict(ncols=size.columns, nrows=size.lines)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def git_commit() -> str | None:
    """The commit of this code, with '-dirty' where files differ from it; None outside a git checkout of its own.

    A repository that this folder only happens to lie in is somebody else's: this very file must be one of its files, at
    its top level.
    """
    # Within a hook of another repository these would lead there.
    environment = {name: value for name, value in os.environ.items() if not name.startswith('GIT_')}

    def git(*command: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(
            ['git', '-C', str(here), *command], capture_output=True, text=True, env=environment
        ).stdout.strip()

    try:
        if git('ls-files', '--full-name', Path(__file__).name) != Path(__file__).name:
            return None
        return git('describe', '--always', '--dirty', '--abbrev=40', '--exclude=*') or None
    except FileNotFoundError:
        return None


def open_run(folder: Path, config: dict, force: bool) -> tuple[dict | None, str]:
    """Make a run folder, or check that the one there is of this configuration.

    Args:
        folder: the run folder.
        config: what config.json holds; 'fingerprint' decides whether two runs are the same, 'defines' says why not.
        force: discard what is there.

    Returns:
        the results if the run is complete, and a note on what changed since it was begun ('' for nothing).

    Raises:
        RunError: the folder holds a run of another configuration, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if force:
            discard(folder)
    except OSError as error:
        raise RunError(f'{folder}: cannot be made or emptied ({error.strerror})') from error
    old, results = read_json(folder / 'config.json'), read_json(folder / 'results.json')
    if results is None and not (folder / 'last.pt').exists():  # nothing to lose, whatever began here
        write_json(folder / 'config.json', config)
        return None, ''
    old = old or {}
    changed = ''
    if old.get('fingerprint') != config['fingerprint']:
        changed = changes(old.get('defines', {}), config['defines'])
    elif results is not None and results.get('fingerprint') != config['fingerprint']:
        changed = 'results.json is of another one'
    if changed:
        raise RunError(
            f'{folder} holds a run of another configuration ({changed}); take another --run_dir, or --force to '
            'discard it'
        )
    if results is None and old.get('tree') != config.get('tree'):  # a damaged test image has been replaced, say
        write_json(folder / 'config.json', old | dict(tree=config.get('tree')))
    if results is not None or old.get('environment') == config['environment']:
        return results, ''
    return None, f'begun in another environment ({changes(old.get("environment", {}), config["environment"])})'


def changes(old: dict, new: dict) -> str:
    """'key old -> new' for every value that differs."""
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return ', '.join(f'{key} {old.get(key)} -> {new.get(key)}' for key in keys)
