"""Start scripts from a process that has imported torch, torchvision and timm, which takes most of a start: 6 s here.

A script that is started runs in a process and a process group of its own, forked before anything of this project is
imported, as `python SCRIPT` would: as __main__, with its own arguments, environment, output and exit code.
"""

import atexit
import gc
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path


class Started:
    """A started script, with those parts of subprocess.Popen that the tests use."""

    def __init__(self, server: 'Server', command: list[str], pid: int, out: int, err: int):
        self.server, self.args, self.pid = server, command, pid
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        self.server.collect(0)
        return self.server.codes.get(self.pid)

    def wait(self, timeout: float) -> int:
        give_up = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > give_up:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.server.collect(0.05)
        return code

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """stdout and stderr, once the script has ended; one that does not end is killed, with what it started."""
        try:
            with ThreadPoolExecutor(2) as pool:
                texts = [pool.submit(file.read) for file in (self.stdout, self.stderr)]
                try:
                    out, err = (text.result(timeout) for text in texts)
                except TimeoutError:
                    self.kill_group()  # or its readers would wait for ever
                    raise
            self.wait(timeout)
        finally:
            self.kill_group()
        self.stdout.close()
        self.stderr.close()
        return out, err

    def kill_group(self) -> None:
        if self.poll() is None:
            os.killpg(self.pid, 9)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(15)

    def kill(self) -> None:
        self.send_signal(9)


class Server:
    """The process that forks, and the exit codes of its children."""

    def __init__(self):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno())]
        environment = {**os.environ, 'OMP_NUM_THREADS': '1'}  # read when torch is imported
        subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self.codes: dict[int, int] = {}
        self.started: list[int] = []
        atexit.register(self.socket.close)  # which ends the process

    def collect(self, seconds: float) -> None:
        """Read what the process says, until it says nothing for some seconds."""
        while select.select([self.socket], [], [], seconds)[0]:
            message = json.loads(self.socket.recv(1024))
            if 'code' in message:
                self.codes[message['pid']] = message['code']
            else:
                self.started.append(message['pid'])

    def start(self, script: Path, arguments: list[str], environment: dict[str, str], cwd: str) -> Started:
        (out, theirs_out), (err, theirs_err) = os.pipe(), os.pipe()
        argv = [str(script), *arguments]
        request = json.dumps(dict(argv=argv, environment=environment, cwd=cwd)).encode()
        socket.send_fds(self.socket, [request], [theirs_out, theirs_err])
        os.close(theirs_out)
        os.close(theirs_err)
        while not self.started:
            self.collect(0.01)
        pid = self.started.pop()
        self.codes.pop(pid, None)  # of an older process with this number
        return Started(self, [sys.executable, *argv], pid, out, err)


def serve(client: socket.socket) -> tuple[dict, list[int]]:
    """Fork for each request; returns in the child, with the request and its stdout and stderr. Ends with the client."""
    while True:
        if select.select([client], [], [], 0.02)[0]:
            data, fds, *_ = socket.recv_fds(client, 1 << 20, 2)
            if not data:
                os._exit(0)
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, 0)
                return json.loads(data), fds
            os.setpgid(pid, pid)
            for fd in fds:
                os.close(fd)
            client.send(json.dumps(dict(pid=pid)).encode())
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            continue
        if pid:
            client.send(json.dumps(dict(pid=pid, code=os.waitstatus_to_exitcode(status))).encode())


if __name__ == '__main__':
    del sys.path[0]  # tests/
    import timm  # noqa: F401
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    gc.collect()
    gc.freeze()  # or each child looks through all of torch when it ends, for a second
    connection = socket.socket(fileno=int(sys.argv[1]))
    asked, streams = serve(connection)
    connection.close()
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout = sys.__stdout__ = os.fdopen(1, 'w', closefd=False)  # as a new process has them, of this pipe
    sys.stderr = sys.__stderr__ = os.fdopen(2, 'w', 1, errors='backslashreplace', closefd=False)
    os.environ.clear()
    os.environ.update(asked['environment'])
    os.chdir(asked['cwd'])
    sys.argv = asked['argv']
    sys.path.insert(0, str(Path(asked['argv'][0]).parent))
    runpy.run_path(asked['argv'][0], run_name='__main__')
