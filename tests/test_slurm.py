"""The promise of run_all.py --launcher slurm: a preempted run resumes.

A real SLURM, started by slurm_node.py; Debian's packages slurm-wlm and munge, and root, are needed (.ci/run).
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from slurm_node import slurm_node
from test_run_all import grid, lines_of, starts_of, wait_for

FIRST = 'synthetic_fold1_resnet18_seed42'


@pytest.mark.skipif(not shutil.which('slurmctld'), reason='needs slurm-wlm and munge: .ci/run installs them')
@pytest.mark.slow
def test_a_preempted_array_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    argv = (tmp_path, '--models', 'resnet18', '--epochs', '200', '--jobs', '2', '--launcher', 'slurm', '--slurm')
    # The path of a socket must be short.
    with tempfile.TemporaryDirectory() as folder, slurm_node(Path(folder)) as environment:
        for name in ('PATH', 'SLURM_CONF'):
            monkeypatch.setenv(name, environment[name])
        code, _, err = grid(*argv, 'partition=none')
        assert (code, err.splitlines()[-1].startswith('run_all.py: error: SLURM: ')) == (1, True)
        assert 'invalid partition' in err
        code, out, err = grid(*argv, 'cpus-per-task=1,time=30')
        assert code == 0, err
        first, second = out.split()
        assert (first.partition('_')[2], second.partition('_')[2]) == ('0', '1'), 'one array'

        def goes_on(starts: int) -> bool:
            """Whether the first run has begun so often, and made an epoch since."""
            made = len(lines_of(tmp_path, 'log.jsonl').get(FIRST, []))
            begun = lines_of(tmp_path, 'starts').get(FIRST, [])
            epochs.append(made)
            return len(begun) == starts and made > epochs[0] + 1

        # Preempted, and told that its time is up, as SLURM tells it with --signal.
        for starts, command in ((1, ['scontrol', 'requeue', first]), (2, ['scancel', '--signal=USR2', first])):
            epochs = []
            wait_for(lambda starts=starts: goes_on(starts))
            subprocess.run(command, check=True)
        wait_for(lambda: len(lines_of(tmp_path, 'results.json')) == 2)
        wait_for(lambda: not subprocess.check_output(['squeue', '--noheader']))
    assert [len(lines) for lines in lines_of(tmp_path, 'starts').values()] == [3, 1]
    assert [len(lines) for lines in lines_of(tmp_path, 'log.jsonl').values()] == [200, 200]
    assert {start['OMP_NUM_THREADS'] for start in starts_of(tmp_path)} == {'1'}
    assert grid(*argv, 'time=30') == (0, '', f'2 runs in {tmp_path}: 2 complete\n')


def test_without_slurm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', os.path.dirname(sys.executable))
    code, _, err = grid(tmp_path, '--launcher', 'slurm')
    assert (code, err.splitlines()[-1].startswith('run_all.py: error: SLURM: ')) == (1, True)
    code, _, err = grid(tmp_path, '--launcher', 'slurm', '--slurm', 'time=1:00:00')
    assert (code, '--slurm time=1:00:00: must be a number of minutes' in err) == (1, True)
