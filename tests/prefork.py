"""Scripts in processes forked from one that has imported torch, timm and torchvision, most of a start: 6 s here.

As `python SCRIPT` would, a script runs as __main__, with its own arguments, environment, output and exit code; nothing
of this project is imported before.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from unittest import mock

FORKSERVER = multiprocessing.get_context('forkserver')
FORKSERVER.set_forkserver_preload(['torch', 'timm', 'torchvision'])


class Started:
    """A started script in a process group of its own, with those parts of subprocess.Popen that the tests use."""

    def __init__(self, script: Path, arguments: list[str], environment: dict[str, str], cwd: str):
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [Path(self.folder.name) / name for name in ('stdout', 'stderr')]
        for path in self.outputs:
            path.touch()
        self.args = [str(script), *arguments]
        self.process = FORKSERVER.Process(target=run, args=(self.args, environment, cwd, self.outputs))
        with mock.patch.dict(os.environ, OMP_NUM_THREADS='1'):  # read when torch is imported
            self.process.start()
        self.pid, self.terminate, self.kill = self.process.pid, self.process.terminate, self.process.kill

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """stdout and stderr, once the script has ended; one that does not end is killed, with what it started."""
        self.process.join(timeout)
        if self.poll() is None:
            self.kill_group()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return tuple(path.read_text() for path in self.outputs)

    def kill_group(self) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, 9)
            self.kill()  # where it has no group yet


def run(argv: list[str], environment: dict[str, str], cwd: str, outputs: list[Path]) -> None:
    """What a forked process does."""
    multiprocessing.set_start_method(None, force=True)  # Python's default again, for the loaders of the script
    os.setsid()
    for number, path in enumerate(outputs, start=1):
        with open(path, 'wb') as file:
            os.dup2(file.fileno(), number)
    sys.stdout = sys.__stdout__ = os.fdopen(1, 'w', closefd=False)  # as a new process has them, of these files
    sys.stderr = sys.__stderr__ = os.fdopen(2, 'w', 1, errors='backslashreplace', closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
    runpy.run_path(argv[0], run_name='__main__')
