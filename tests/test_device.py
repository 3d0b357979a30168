"""The promise of --device: every path of a machine with CUDA devices is gone, on the devices of cuda_stand_in.py."""

import multiprocessing
import os
import re

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, argv_of, run
from cuda_stand_in import CudaStandIn
from slurm_node import free_ports
from test_pretrain_imagenet import ONE_EPOCH
from test_pretrain_imagenet import run as run_pretraining

import analysis
import benchmark
import models
import train
import visualize
from common import distributed, options, runs
from common.checkpoint import read_checkpoint
from interpret import information, questions
from training import trained

JOB = dict(RANK='0', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='29500')


@pytest.fixture(autouse=True)
def _no_job(monkeypatch, one_thread):
    """Tests start from an environment without a launcher."""
    for name in (*JOB, 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'TORCHELASTIC_RUN_ID', 'SLURM_LOCALID'):
        monkeypatch.delenv(name, raising=False)


def results_of(tree, run_dir, *more: str) -> tuple:
    """All that a run gives, but for its times and what it is called."""
    folder, results = run(tree, run_dir, '--epochs', '2', *more)
    best = read_checkpoint(folder / 'best.pt')['state_dict']
    log = [{k: v for k, v in line.items() if 'second' not in k} for line in runs.read_log(folder / 'log.jsonl')]
    return [t.numpy().tobytes() for t in best.values()], log, results['test_acc'], results['test_loss']


# ------------------------------------------------------------------------------------------ which device


@pytest.mark.parametrize(
    ('devices', 'name', 'environment', 'expected'),
    [
        (0, 'auto', {}, 'cpu'),
        (1, 'auto', {}, 'cuda:0'),
        (1, 'cuda', {}, 'cuda:0'),
        (2, 'cuda:1', {}, 'cuda:1'),
        (2, 'cpu', {}, 'cpu'),
        (2, 'auto', dict(JOB, LOCAL_RANK='1'), 'cuda:1'),
        # srun: tasks are numbered, and may each be shown their own device alone
        (2, 'cuda', dict(JOB, SLURM_LOCALID='1'), 'cuda:1'),
        (1, 'cuda', dict(JOB, SLURM_LOCALID='1'), 'cuda:0'),
    ],
)
def test_the_device_has_an_index_and_is_the_current_one(monkeypatch, devices, name, environment, expected):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    joined = []
    monkeypatch.setattr(distributed, 'join', joined.append)
    with CudaStandIn(monkeypatch, devices) as cuda:
        assert distributed.setup(name, 1) == torch.device(expected)
    assert cuda.current == int(expected.partition(':')[2] or 0)
    several = environment.get('WORLD_SIZE') == '2'
    assert joined == ['gloo' if expected == 'cpu' else 'nccl'] * several


@pytest.mark.parametrize(
    ('devices', 'name', 'environment', 'words'),
    [
        (0, 'cuda', {}, '--device cuda: needs device 0, and torch finds 0 CUDA devices'),
        (1, 'cuda:1', {}, '--device cuda:1: needs device 1, and torch finds 1 CUDA device'),
        (2, 'cuda:-1', {}, "--device 'cuda:-1' must be auto, cpu, cuda or cuda:N"),
        (2, 'cuda:1', dict(JOB, LOCAL_RANK='0'), '--device cuda:1: each of several processes has a device of its own'),
        (2, 'auto', dict(JOB, LOCAL_RANK='none'), 'LOCAL_RANK does not say which of the 2 CUDA devices'),
        (1, 'cuda', dict(JOB, LOCAL_RANK='1'), '--device cuda: needs device 1, and torch finds 1 CUDA device'),
    ],
)
def test_a_device_that_cannot_be_is_one_line(
    tree, tmp_path, tiny, monkeypatch, capfd, devices, name, environment, words
):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with CudaStandIn(monkeypatch, devices), pytest.raises(SystemExit):
        train.cli(argv_of(tree, tmp_path / 'runs', '--device', name))
    message = capfd.readouterr().err
    assert words in message
    assert message.count('\n') == 1
    assert not (tmp_path / 'runs').exists()


# ------------------------------------------------------------------------------------------ the scripts


@pytest.mark.slow
def test_a_run_on_a_device_interrupted_gives_what_the_cpu_gives(tree, tmp_path, tiny, monkeypatch):
    expected = results_of(tree, tmp_path / 'cpu')
    with CudaStandIn(monkeypatch) as cuda:
        with monkeypatch.context() as patch:
            patch.setattr(train.runs, 'write_log', lambda *_: 1 / 0)  # after the checkpoints of the first epoch
            with pytest.raises(ZeroDivisionError):
                run(tree, tmp_path / 'cuda', '--epochs', '2', '--device', 'auto')
        assert results_of(tree, tmp_path / 'cuda', '--device', 'cuda', '--num_workers', '1') == expected
    assert cuda.seen['pinned'] > 0
    config = runs.read_json(tmp_path / 'cuda' / 'dtd_fold1_tiny_seed42' / 'config.json')
    assert (config['options']['device'], config['environment']['device']) == ('cuda', 'Stand-in 0')


@pytest.mark.parametrize(('bf16', 'dtype'), [(True, torch.bfloat16), (False, torch.float16)])
def test_the_precision_of_auto_trains(tree, tmp_path, tiny, monkeypatch, bf16, dtype):
    with CudaStandIn(monkeypatch, 2, bf16) as cuda:
        run(tree, tmp_path, *ONE_EPOCH, '--device', 'cuda:1', '--amp', 'auto')
    assert cuda.seen[dtype] > 0
    assert cuda.current == 1


@pytest.mark.slow
def test_pretraining_on_a_device_gives_what_the_cpu_gives(tree, tmp_path, tiny, monkeypatch):
    root = tmp_path / 'imagenet'
    root.mkdir()
    for subset in ('train', 'val'):
        (root / subset).symlink_to(tree / 'images')
    more = (*ONE_EPOCH, '--batch_size', '8', '--accumulate', '2', '--ema', '--ema_decay', '0.5')

    def pretrain(folder, *device):
        target = run_pretraining(root, tmp_path / folder, *more, *device)
        return [t.numpy().tobytes() for t in read_checkpoint(target)['state_dict'].values()]

    expected = pretrain('cpu', '--device', 'cpu')
    with CudaStandIn(monkeypatch) as cuda:
        assert pretrain('cuda') == expected
        pretrain('cuda', '--resume', 'auto')
        pretrain('fp16', '--amp', 'fp16')
    assert cuda.seen['pinned'] > 0
    assert cuda.seen[torch.float16] > 0


def test_a_trained_model_is_looked_into_on_a_device(tree, tmp_path, tiny, monkeypatch):
    folder, _ = run(tree, tmp_path, *ONE_EPOCH)
    argv = ['--checkpoint', str(folder / 'best.pt'), '--save_dir', str(tmp_path / 'out')]
    parse = analysis.get_args_parser().parse_args
    sums = []  # what the estimators are given, in their place: they know no device
    monkeypatch.setattr(questions, 'MIN_IMAGES', 4)
    monkeypatch.setattr(questions, 'probe', lambda values, *_: [float(values.sum()), 0.0])
    monkeypatch.setattr(information, 'bias_at_independence', lambda *_: 0.0)
    monkeypatch.setattr(information, 'information_of', lambda z, *_: sums.append(z.sum()) or dict(shared={}))

    def answers(*more):
        args = parse([*argv, *more])
        return analysis.answer(args, *analysis.prepare(args))['questions']

    expected = answers('--device', 'cpu')
    with CudaStandIn(monkeypatch) as cuda:
        assert str(answers()) == str(expected)
        assert sums[: len(sums) // 2] == sums[len(sums) // 2 :]
        assert next(trained.load(folder / 'best.pt').model.parameters()).device.type == 'cpu'
        visualize.main(visualize.get_args_parser().parse_args([*argv, '--view', 'selection']))
    assert 'set_device' in cuda.calls


def test_the_speed_is_measured_on_a_device(tiny, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, 'resnet18', models.MODELS['tiny'])
    monkeypatch.setattr('benchmark.MIN_SECONDS', 0)
    monkeypatch.setitem(benchmark.MATRIX_SIDE, 'cuda', 64)
    argv = ('models', '--img_size', '32', '--batch_size', '2', '--rounds', '1', '--models', 'tiny')
    with CudaStandIn(monkeypatch, 2, bf16=False) as cuda:
        benchmark.main(benchmark.get_args_parser().parse_args([*argv, '--device', 'cuda:1']))
    assert 'float16, Stand-in 1' in capsys.readouterr().out
    assert {'synchronize', 'get_device_name'} <= cuda.calls
    assert cuda.seen['pinned'] > 0


# ------------------------------------------------------------------------------------------ two processes


def one_of_two(rank: int, environment: dict, argv: list[str]) -> None:
    os.environ.update(environment, RANK=str(rank))
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, CudaStandIn(patch, 2) as cuda:
        train.main(options.parse_args(argv))
        assert cuda.backends == ['nccl']
        assert cuda.current == rank
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_on_a_device_each(tree, tmp_path, tiny, capfd, one_thread):
    (port,) = free_ports(1)
    argv = argv_of(tree, tmp_path, *ONE_EPOCH, '--device', 'cuda')
    fork = multiprocessing.get_context('fork')  # as srun starts them: each says its number
    both = []
    for rank in range(2):
        job = dict(JOB, MASTER_PORT=str(port), SLURM_LOCALID=str(rank))
        both.append(fork.Process(target=one_of_two, args=(rank, job, argv)))
        both[-1].start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0], capfd.readouterr().err
    config = runs.read_json(tmp_path / 'dtd_fold1_tiny_seed42' / 'config.json')
    assert config['defines']['processes'] == 2
    assert capfd.readouterr().out.count('test accuracy') == 1


# ------------------------------------------------------------------------------------------ nothing is left out


def test_the_stand_in_has_every_function_of_torch_cuda_that_is_called():
    folders = ('', 'common', 'training', 'interpret')
    sources = [path.read_text() for folder in folders for path in (ROOT / folder).glob('*.py')]
    called = {name for source in sources for name in re.findall(r'torch\.cuda\.(\w+)\(', source)}
    assert called == {function.__name__ for function in CudaStandIn.OF_TORCH_CUDA}
    assert not re.search(r'(from|import) torch\.cuda', '\n'.join(sources)), 'a way that is not looked for'


def test_the_stand_in_refuses_what_a_device_refuses(monkeypatch):
    with CudaStandIn(monkeypatch, 2):
        here, there, other = torch.ones(3), torch.ones(3, device='cuda:0'), torch.ones(3).to('cuda:1')
        for refused, error, words in (
            (lambda: torch.cuda.set_device('cuda'), ValueError, 'with a specified index'),
            (lambda: torch.cuda.set_device('cpu'), ValueError, 'Expected a cuda device'),
            (lambda: torch.cuda.set_device(2), RuntimeError, 'invalid device ordinal'),
            (lambda: here.to('cuda:2'), RuntimeError, 'invalid device ordinal'),
            (lambda: here + there, RuntimeError, 'at least two devices'),
            (lambda: there + other, RuntimeError, 'at least two devices'),
            (lambda: torch.nn.Linear(3, 3)(there), RuntimeError, 'at least two devices'),
            (lambda: there.numpy(), TypeError, r'Use Tensor\.cpu'),
        ):
            with pytest.raises(error, match=words):
                refused()
        assert [t.device for t in (here, there, other)] == [torch.device(x) for x in ('cpu', 'cuda:0', 'cuda:1')]
        assert (there + torch.tensor(1)).device == torch.device('cuda:0'), 'a number of the CPU goes with all'
        torch.nn.Linear(3, 3).to('cuda:0')(there).sum().backward()
        assert there.cpu().numpy().sum() == 3
