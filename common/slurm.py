"""A grid as a SLURM job array, through submitit: run_all.py --launcher slurm.

Each task of the array makes one run. When SLURM preempts it, requeues it or signals that its time is up, train.py stops
and the task is queued again; train.py then resumes from the last complete epoch, bit-identically.
"""

import os
import shlex
import signal
import subprocess
from pathlib import Path

import submitit

from common import runs
from common.errors import BUSY, RunError

WARN_BEFORE = 120  # seconds before its time limit that a task is signalled; train.py needs a few


class Task:
    """Makes one run inside a job of SLURM; submitit asks for a class with `checkpoint`.

    Args:
        folder: the run folder.
        command: makes or resumes the run.
    """

    def __init__(self, folder: Path, command: list[str]):
        self.folder, self.command = folder, command

    def __call__(self) -> None:
        signals, child = [], None

        def stop(number: int, _) -> None:
            signals.append(number)
            if child:
                child.terminate()

        submitit_handler = signal.signal(signal.SIGUSR2, stop)
        signal.signal(signal.SIGTERM, stop)
        environment = {'OMP_NUM_THREADS': os.environ.get('SLURM_CPUS_PER_TASK', '1'), **os.environ}
        child = runs.start(self.folder, self.command, environment)
        if signals:  # before there was a child to stop
            child.terminate()
        code = child.wait()
        if code == BUSY:
            print(f'{self.folder}: being made elsewhere')
        elif code and signals:
            job = submitit.JobEnvironment().raw_job_id
            squeue = ['squeue', '--noheader', '--jobs', job, '--format', '%T']
            state = subprocess.run(squeue, capture_output=True, text=True).stdout.strip()
            if state in ('RUNNING', 'SIGNALING'):  # out of time, or preempted with grace: SLURM will not requeue it
                submitit_handler(signal.SIGUSR2, None)  # calls checkpoint, requeues the job and exits
            os._exit(128 + signal.SIGTERM)  # SLURM ends the job and requeues it: submitit must record no result
        elif code:
            raise subprocess.CalledProcessError(code, self.command)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """The task to submit after a time-out: the same one."""
        return submitit.helpers.DelayedSubmission(self)


def submit(tasks: list[tuple[Path, list[str]]], folder: Path, at_once: int, sbatch: dict[str, str | bool]) -> list[str]:
    """Submit an array of runs.

    Args:
        tasks: run folder and command of each.
        folder: for submitit's files and the output of the jobs.
        at_once: tasks that may run at the same time.
        sbatch: long options of sbatch by name, True for those without a value; `time` in minutes.

    Returns:
        the jobs' numbers.

    Raises:
        RunError: there is no sbatch, or it refuses.
    """
    options = {name.replace('-', '_'): value for name, value in sbatch.items()}
    minutes = str(options.pop('time', '60'))
    if not minutes.isdigit() or int(minutes) < 1:
        raise RunError(f'--slurm time={minutes}: must be a number of minutes')
    here = shlex.quote(str(Path(__file__).resolve().parent.parent))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # However often a run is interrupted, it resumes.
        executor = submitit.SlurmExecutor(folder=folder.resolve(), max_num_timeout=1_000_000)
        executor.update_parameters(
            job_name='twistnet',
            time=int(minutes),
            signal_delay_s=min(WARN_BEFORE, 20 * int(minutes)),
            array_parallelism=at_once,
            stderr_to_stdout=True,
            setup=[f'export PYTHONPATH={here}:$PYTHONPATH'],  # where the job finds this file
            additional_parameters=dict(requeue=True, **options),
        )
        with executor.batch():
            jobs = [executor.submit(Task(run.resolve(), command)) for run, command in tasks]
    except OSError as error:
        raise RunError(f'{error.filename or folder}: cannot be written ({error.strerror})') from error
    except (RuntimeError, submitit.core.utils.FailedJobError) as error:  # no sbatch; sbatch's refusal
        raise RunError(f'SLURM: {" ".join(str(error).split())}') from error
    return [job.job_id for job in jobs]
