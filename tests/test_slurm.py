"""The promise of run_all.py --launcher slurm: a preempted run resumes, and the results are those of the local launcher.

A real SLURM, started by slurm_node.py; Debian's packages slurm-wlm and munge, and root, are needed (.ci/run).
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT
from slurm_node import slurm_node

from common import runs
from common.checkpoint import read_checkpoint

pytestmark = pytest.mark.skipif(
    not shutil.which('slurmctld'), reason='needs slurm-wlm and munge: .ci/run installs them'
)
GRID = ('--dataset', 'dtd', '--models', 'resnet18', '--folds', '1-2', '--jobs', '2', '--img_size', '32')
GRID += ('--batch_size', '8', '--epochs', '16', '--warmup_epochs', '1', '--num_workers', '0')


def run_all(environment, *argv) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / 'run_all.py'), *GRID, *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def wait_for(condition, limit: float = 180) -> None:
    give_up = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < give_up, 'took too long'
        time.sleep(0.1)


@pytest.mark.slow
def test_a_preempted_array_ends_in_the_results_of_the_local_launcher(tree, tmp_path):
    here = {**os.environ, 'OMP_NUM_THREADS': '1'}
    local = run_all(here, '--data_dir', str(tree), '--run_dir', str(tmp_path / 'local'))
    assert local.returncode == 0, local.stderr
    names = ['dtd_fold1_resnet18_seed42', 'dtd_fold2_resnet18_seed42']
    # The path of a socket must be short.
    with tempfile.TemporaryDirectory() as folder, slurm_node(Path(folder)) as environment:
        argv = ('--data_dir', str(tree), '--run_dir', str(tmp_path / 'runs'), '--launcher', 'slurm')
        refused = run_all(environment, *argv, '--slurm', 'partition=none')
        assert refused.returncode == 1
        assert refused.stderr.splitlines()[-1].startswith('run_all.py: error: SLURM: ')
        assert 'invalid partition' in refused.stderr
        submitted = run_all(environment, *argv, '--slurm', 'cpus-per-task=1,time=30')
        assert submitted.returncode == 0, submitted.stderr
        first, second = submitted.stdout.split()
        assert (first.partition('_')[2], second.partition('_')[2]) == ('0', '1'), 'one array'
        log, said = tmp_path / 'runs' / names[0] / 'log.jsonl', (tmp_path / 'runs' / names[0] / runs.LOG).read_text
        wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 2)
        subprocess.run(['scontrol', 'requeue', first], env=environment, check=True)
        # Told that its time is up, as SLURM tells it with --signal.
        wait_for(lambda: said().count(runs.HEADER) == 2 and 'train loss' in said().rpartition(runs.HEADER)[2])
        subprocess.run(['scancel', '--signal=USR2', first], env=environment, check=True)
        wait_for(lambda: all((tmp_path / 'runs' / name / 'results.json').exists() for name in names))
        wait_for(lambda: not subprocess.check_output(['squeue', '--noheader'], env=environment))
        again = run_all(environment, *argv)
        assert (again.returncode, again.stdout) == (0, ''), 'complete: nothing is submitted'
    assert said().count(runs.HEADER) == 3, 'it was interrupted twice and went on'
    assert said().count('resuming after epoch') == 2
    for name in names:
        results = [runs.read_json(tmp_path / place / name / 'results.json') for place in ('local', 'runs')]
        assert results[0] | dict(seconds=0) == results[1] | dict(seconds=0)
        best = [read_checkpoint(tmp_path / place / name / 'best.pt')['state_dict'] for place in ('local', 'runs')]
        assert all(a.equal(b) for a, b in zip(best[0].values(), best[1].values(), strict=True))


def test_without_slurm_it_says_so(tree, tmp_path):
    environment = {**os.environ, 'PATH': os.path.dirname(sys.executable)}
    result = run_all(environment, '--data_dir', str(tree), '--run_dir', str(tmp_path), '--launcher', 'slurm')
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith('run_all.py: error: SLURM: ')
    assert 'Traceback' not in result.stderr
