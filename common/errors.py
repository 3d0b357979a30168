"""User errors, and the one place that turns them into a line on stderr."""

import contextlib
import os
import sys
from collections.abc import Iterator

BUSY = 75  # exit code of train.py where another process makes this run (EX_TEMPFAIL of sysexits.h)
DIVERGED = 76  # exit code of train.py where a loss is not finite
LFS = b'version https://git-lfs'  # begins a pointer


class UserError(Exception):
    """An error of input, options or machine; the message is one line that names it and what to do."""

    exit_code = 1


class DataError(UserError):
    """A data set, an archive or an image cannot be used."""


class ModelError(UserError):
    """A model name, a keyword, a checkpoint or a weights file cannot be used."""


class UnsafeCheckpoint(ModelError):
    """A checkpoint would run code when loaded."""


class RunError(UserError):
    """An option, a run folder or the machine does not allow the command."""


class RunBusy(RunError):
    """Another process is making this run."""

    exit_code = BUSY


class Diverged(RunError):
    """A loss is not finite."""

    exit_code = DIVERGED

    def __init__(self, loss: str):
        super().__init__(f'{loss}; the checkpoints of the epochs before are kept; try a lower --lr or --amp off')


class ProcessError(RunError):
    """One process among several fails alone, and reports it itself."""


class CacheError(UserError):
    """The cache of decoded images cannot be used on this machine."""


def lfs_pointer(path: str | os.PathLike) -> str:
    """What a file is that a clone without git-lfs left in place of the real one; '' for any other file."""
    with contextlib.suppress(OSError), open(path, 'rb') as file:
        if file.read(len(LFS)) == LFS:
            return 'it is a pointer of git-lfs, not the file itself; `git lfs pull` fetches that'
    return ''


@contextlib.contextmanager
def user_errors(script: str, stopped: str = 'stopped', errors: str = 'replace') -> Iterator[None]:
    """Run the body of a script: a user error ends it with one line on stderr, a closed pipe without one.

    `stopped` is the line after Ctrl-C; `errors` says how stdout writes characters that the terminal lacks.
    """
    if hasattr(sys.stdout, 'reconfigure'):  # a notebook's has not
        sys.stdout.reconfigure(errors=errors)
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        print(f'{script}: error: {error}', file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f'\n{script}: {stopped}', file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader has ended: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes again at exit
        sys.exit(f'{script}: error: {error.filename or "stdout"}: {error.strerror}')
