"""What the tests share: small trees of images, a small model, and the scripts as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import prefork
import pytest
import torch
import trees
from PIL import Image
from slurm_node import free_ports

import models
import train
from common import options, registry, runs
from common.cache import SHARED_MEMORY

ROOT = Path(__file__).parent.parent
# A program that holds the lock of a run folder until it is killed.
HOLD = (
    'import sys, time, pathlib; from common import runs; '
    'runs.claim(pathlib.Path(sys.argv[1])); print(1, flush=True); time.sleep(60)'
)
TINY = dict(label='Tiny', twist=dict(base_width=8, layers=(1, 2), twist_stages=(2,)))
FORKED_TORCHRUN = ROOT / 'tests' / 'forked_torchrun.py'
RUN_OPTIONS = ('--img_size', '32', '--batch_size', '8', '--epochs', '3', '--warmup_epochs', '1', '--amp', 'off')


# Under nohup, or in the background of a script, the programs tested would inherit that these are ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def write_image(path: Path, seed: int, size: int = 40) -> None:
    """Noise with a colour of its own, so that classes can be told apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 128, (size, size, 3)) + rng.integers(0, 128, 3)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def make_dtd(root: Path, classes: int = 3, per_subset: tuple[int, int, int] = (8, 4, 4)) -> Path:
    """A tree in the layout of DTD with two folds; the second has train and test swapped."""
    lists = {f'{subset}{fold}': [] for subset in ('train', 'val', 'test') for fold in (1, 2)}
    for label in range(classes):
        names = [f'class{label}/class{label}_{i:04d}.jpg' for i in range(sum(per_subset))]
        for i, name in enumerate(names):
            write_image(root / 'images' / name, 100 * label + i)
        a, b = per_subset[0], per_subset[0] + per_subset[1]
        parts = dict(train=names[:a], val=names[a:b], test=names[b:])
        for subset, other in (('train', 'test'), ('val', 'val'), ('test', 'train')):
            lists[f'{subset}1'] += parts[subset]
            lists[f'{subset}2'] += parts[other]
    (root / 'labels').mkdir()
    for name, lines in lists.items():
        (root / 'labels' / f'{name}.txt').write_text('\n'.join(lines) + '\n')
    return root


@pytest.fixture
def tree(tmp_path) -> Path:
    return make_dtd(tmp_path / 'tree')


@pytest.fixture
def tiny(monkeypatch) -> str:
    """The name of a TwistNet of two stages and width 8, registered for this test."""
    monkeypatch.setitem(models.MODELS, 'tiny', TINY)
    return 'tiny'


@pytest.fixture(scope='session', autouse=True)
def _no_images_left():
    """The images that tests put into --cache ram are of no use to anyone."""
    folder = SHARED_MEMORY / f'twistnet-{os.getuid()}'
    before = set(folder.glob('*'))
    yield
    for path in set(folder.glob('*')) - before:
        path.unlink(missing_ok=True)


@pytest.fixture
def no_fvcore(monkeypatch) -> None:
    """fvcore is not installed."""
    for name in ('fvcore', 'fvcore.nn'):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def small_benchmarks(monkeypatch) -> None:
    """The benchmarks have the sizes of the small trees of trees.py."""
    for key, (images, classes) in trees.SMALL_SIZE.items():
        facts = {k: v for k, v in registry.DATASETS[key].items() if k != 'sizes'}
        monkeypatch.setitem(registry.DATASETS, key, facts | dict(images=images, classes=classes))


@pytest.fixture
def one_thread():
    """As torchrun starts its processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def argv_of(tree: Path, run_dir: Path, *more: str, model: str = 'tiny') -> list[str]:
    """Arguments of a run of train.py that takes a second or two."""
    data = ('--data_dir', str(tree), '--dataset', 'dtd', '--model', model, '--run_dir', str(run_dir))
    return [*data, *RUN_OPTIONS, '--num_workers', '0', *more]


def run(tree: Path, run_dir: Path, *more: str, model: str = 'tiny') -> tuple[Path, dict]:
    """train.py in this process; returns the run folder and the results."""
    return train.train(options.parse_args(argv_of(tree, run_dir, *more, model=model)))


@pytest.fixture(scope='session')
def whole(tmp_path_factory) -> Path:
    """The folder of a run of the tiny TwistNet that nothing disturbed; `tree` lies beside it."""
    root = tmp_path_factory.mktemp('whole')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, 'tiny', TINY)
        return run(make_dtd(root / 'tree'), root)[0]


def start(script: str | Path, *arguments: str | Path, cwd: Path | None = None, **environment: str) -> prefork.Started:
    """A script of the project in a process group of its own."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', **environment}
    return prefork.Started(ROOT / script, [*map(str, arguments)], environment, str(cwd or os.getcwd()))


def run_ranks(count: int, script: str | Path, *arguments: str, **environment: str) -> tuple[list[int], str, str]:
    """The processes of one job, as srun starts them, in less time than torchrun: exit codes, stdout and stderr."""
    (port,) = free_ports(1)
    job = dict(WORLD_SIZE=str(count), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), **environment)
    ranks = [start(script, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **job) for rank in range(count)]
    try:
        codes, outs, errs = zip(*map(finish, ranks))
    finally:
        for rank in ranks:  # one that failed leaves the others waiting for it
            rank.kill_group()
    return [*codes], ''.join(outs), ''.join(errs)


def finish(process: subprocess.Popen | prefork.Started) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(path: Path, process: subprocess.Popen | prefork.Started) -> None:
    """Until the process has made the file; one that takes longer than two minutes is ended."""
    give_up = time.monotonic() + 120
    while not path.exists():
        if process.poll() is not None or time.monotonic() > give_up:
            process.terminate()
            pytest.fail(f'no {path}: {process.communicate(timeout=60)}')
        time.sleep(0.005)


def make_run(
    run_dir: Path, *, complete: bool = True, log: list[dict] | None = None, tree: str | None = None, **changes
) -> Path:
    """A run folder as train.py leaves it, without training: options and results by name. Older code knew no tree."""
    cell = dict(dataset='dtd', fold=1, model='resnet18', seed=42)
    defines = dict(**cell, img_size=224, epochs=100, lr=0.01, pretrained=None, split='images')
    defines |= {k: v for k, v in changes.items() if k in defines}
    defines['split'] = f'{defines["split"]} of {defines["dataset"]} {defines["fold"]}'
    folder = run_dir / runs.run_name(*(defines[key] for key in ('dataset', 'fold', 'model', 'seed')))
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = runs.digest(json.dumps(defines, sort_keys=True).encode())
    given = defines | dict(pretrained=bool(defines['pretrained']))  # the option, of which `defines` has a digest
    config = dict(options=given, defines=defines, fingerprint=fingerprint)
    runs.write_json(folder / 'config.json', config | (dict(tree=tree) if tree else {}))
    results = {key: defines[key] for key in cell} | dict(test_acc=50.0, n_train=60, n_val=20, n_test=40)
    results |= dict(params_M=11.2006, macs_G=1.8186, seconds=90.0, fingerprint=fingerprint)
    results |= {k: v for k, v in changes.items() if k in results or k in ('loaded', 'best_val_acc', 'caution')}
    if complete:
        runs.write_json(folder / 'results.json', results)
    if log is not None:
        runs.write_log(folder / 'log.jsonl', log)
    return folder


def write_tuned(run_dir: Path, chosen: dict[tuple[str, str], dict], tune: str = 'lr=0.001,0.1') -> None:
    """Let the runs of a folder say what --tune chose by (data set, model), of three settings of which one diverged."""
    for path in run_dir.glob('*/config.json'):
        config = runs.read_json(path)
        setting = chosen.get((config['defines']['dataset'], config['defines']['model']))
        config.setdefault('options', {})['tuned'] = setting and dict(
            tune=tune, fold=1, seed=0, options=setting, tried=3, diverged=1
        )
        runs.write_json(path, config)
