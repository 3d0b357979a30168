"""A real SLURM of one node (munged, slurmctld, slurmd) in a folder, for tests; it stops on exit.

It needs root and Debian's packages slurm-wlm and munge, and writes only in the folder, whose path must be short.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

START_LIMIT_S = 30
KILL_WAIT_S = 5  # from SIGTERM to SIGKILL, for a job requeued, cancelled or out of time

# cred_expire is also what a requeued job waits before it starts again: 120 s by default, 5 at least.
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
JobRequeue=1
KillWait={kill_wait}
NodeName=node NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory={memory}
PartitionName=main Nodes=node Default=YES MaxTime=INFINITE
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(('127.0.0.1', 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def output(command: list[str], env: dict[str, str]) -> str:
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30).stdout.strip()


def wait_for(what: str, ready: Callable[[], bool], folder: Path) -> None:
    limit = time.monotonic() + START_LIMIT_S
    while not ready():
        if time.monotonic() > limit:
            logs = [f'--- {log}\n{log.read_text(errors="replace")[-2000:]}' for log in folder.glob('*.log')]
            raise RuntimeError('\n'.join([f'SLURM did not start: no {what} in {START_LIMIT_S} s', *logs]))
        time.sleep(0.1)


def kill_leftovers(conf: Path) -> None:
    """Kill whatever still has our SLURM_CONF in its environment: slurmstepds and jobs' orphans."""
    mark = f'SLURM_CONF={conf}'.encode()
    for entry in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if int(entry.name) != os.getpid() and mark in (entry / 'environ').read_bytes().split(b'\0'):
                os.kill(int(entry.name), signal.SIGKILL)


@contextlib.contextmanager
def slurm_node(folder: Path) -> Iterator[dict[str, str]]:
    """A running node of 2 CPUs; yields the whole environment to run sbatch, squeue, scontrol... in."""
    folder, path = folder.resolve(), os.environ.get('PATH', '') + ':/usr/sbin:/usr/bin'
    for made in (folder, folder / 'state', folder / 'spool'):
        made.mkdir(mode=0o755, parents=True, exist_ok=True)
    (folder / 'munge.key-file').touch(mode=0o600)
    (folder / 'munge.key-file').write_bytes(os.urandom(128))
    conf, host = folder / 'slurm.conf', socket.gethostname().split('.')[0]
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2**20
    values = {'host': host, 'ports': free_ports(2), 'memory': memory, 'kill_wait': KILL_WAIT_S}
    conf.write_text(CONF.format(folder=folder, **values))
    others = ('SLURM', 'SBATCH', 'SRUN', 'SQUEUE', 'SINFO', 'SCANCEL')  # another cluster's, or an outer job's
    env = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    env |= {'SLURM_CONF': str(conf), 'PATH': path}
    daemons: list[subprocess.Popen] = []

    def start(*command: str) -> None:
        with (folder / f'{command[0]}.log').open('ab') as log:  # its own session: Ctrl-C must not reach it
            streams = {'stdin': subprocess.DEVNULL, 'stdout': log, 'stderr': log}
            daemons.append(subprocess.Popen(command, env=env, start_new_session=True, **streams))

    try:
        options = [f'--{x}={folder}/munge.{x}' for x in ('socket', 'key-file', 'pid-file', 'seed-file')]
        start('munged', '--foreground', '--force', *options)  # --force: else it refuses pytest's 0700 folders
        wait_for("munged's socket", (folder / 'munge.socket').exists, folder)
        start('slurmctld', '-D', '-c', '-i', '-f', str(conf))
        start('slurmd', '-D', '-f', str(conf))
        wait_for('idle node', lambda: output(['sinfo', '-ho%T'], env) == 'idle', folder)
        yield env
    finally:
        for daemon in reversed(daemons):
            daemon.kill()
            daemon.wait()
        kill_leftovers(conf)
