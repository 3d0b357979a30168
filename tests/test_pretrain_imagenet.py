"""The promises of pretrain_imagenet.py: nothing is lost, nothing depends on how it is run, and bad data is survived."""

import contextlib
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import mini_imagenet
import numpy as np
import pytest
import torch
from conftest import FORKED_TORCHRUN, TINY, finish, run_ranks, start, wait_for, write_image
from prefork import Started
from slurm_node import free_ports

import models
import pretrain_imagenet
from common import options, registry, runs
from common.checkpoint import read_checkpoint
from common.errors import DataError, RunError
from common.images import open_image
from common.options import parse_pretraining_args as parse_args
from common.trees import read_index
from pretrain_imagenet import pretrain
from training import engine
from training.loader import ForgivingImages

DRIVER = Path(__file__).parent / 'pretrain_driver.py'
SIZE = ('--img_size', '32', '--batch_size', '16', '--epochs', '2', '--warmup_epochs', '1', '--amp', 'off')


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory) -> Path:
    """Three classes of 80 images to train on, enough for 15 steps of 16, and 21 to validate."""
    return mini_imagenet.make(tmp_path_factory.mktemp('imagenet'), 80, 7, classes=3)


def argv_of(root: Path, folder: Path, *more: str) -> list[str]:
    argv = ['--data_dir', str(root), '--model', 'tiny', *SIZE, '--num_workers', '0']
    return [*argv, '--checkpoint_dir', str(folder / 'checkpoints'), '--weights_dir', str(folder / 'weights'), *more]


def run(root: Path, folder: Path, *more: str) -> Path:
    """In this process."""
    return pretrain(parse_args(argv_of(root, folder, *more)))


def drive(root: Path, folder: Path, *more: str, torchrun: tuple[str, ...] = (), **environment: str) -> Started:
    """The driver in the background, through torchrun where its options are given."""
    scripts = (FORKED_TORCHRUN, *torchrun, DRIVER) if torchrun else (DRIVER,)
    return start(*scripts, *argv_of(root, folder, *more), **environment)


def outcome(folder: Path) -> tuple:
    """Everything that must be the same to the bit; times are not."""
    last = read_checkpoint(folder / 'checkpoints' / 'latest.pt')
    tensors = [t.numpy().tobytes() for t in last['state_dict'].values()]
    tensors += [state['momentum_buffer'].numpy().tobytes() for state in last['optimizer']['state'].values()]
    tensors += [t.numpy().tobytes() for t in (last['average'] or {}).values()]
    history = [{k: v for k, v in line.items() if 'second' not in k} for line in last['progress']['history']]
    best = read_checkpoint(next((folder / 'weights').glob('*.pt')))
    return tensors, history, best['epoch'], [t.numpy().tobytes() for t in best['state_dict'].values()]


# ------------------------------------------------------------------------------------------ how it is run


@pytest.mark.slow
def test_losses_do_not_depend_on_processes_or_parts(imagenet, tmp_path):
    # Without BatchNorm, whose statistics are of a process's own part of a step.
    losses, ends = [], []
    for processes, batch, parts in ((1, 16, 1), (2, 4, 2)):
        folder = tmp_path / f'{processes}_{batch}_{parts}'
        codes, _, err = run_ranks(
            processes, DRIVER,
            *argv_of(imagenet, folder, '--batch_size', str(batch), '--accumulate', str(parts), '--lr', '0.02'),
            DRIVER_NORM='group', DRIVER_LOSSES=str(tmp_path / 'losses.json'),
        )  # fmt: skip
        assert not any(codes), err
        losses.append(json.loads((tmp_path / 'losses.json').read_text()))
        ends.append(runs.read_log(folder / 'checkpoints' / 'log.jsonl')[0])
        assert 'learning rate 0.0003125 for a global batch of 16' in err
    assert len(losses[0]) == 30
    for other, end in zip(losses[1:], ends[1:]):
        assert other[:20] == pytest.approx(losses[0][:20], rel=1e-6)
        assert end['train_loss'] == pytest.approx(ends[0]['train_loss'], rel=1e-6)
        assert end['val_loss'] == pytest.approx(ends[0]['val_loss'], rel=1e-5), 'every image counts once'


@pytest.mark.parametrize('model', ['tiny', 'fastvit_sa12'])  # the latter has BatchNorms of timm's, with an activation
def test_synchronised_batchnorm_keeps_the_names_and_the_function(tiny, model):
    args = parse_args(['--data_dir', 'x', '--model', model, '--img_size', '32', '--sync_bn', '--amp', 'off'])
    states = []
    for args.sync_bn in (False, True):
        torch.manual_seed(0)
        states.append(engine.build_state(args, 3, torch.device('cpu'), None, 2))
    plain, synchronised = (state.model for state in states)
    assert list(plain.state_dict()) == list(synchronised.state_dict())
    kinds = {type(module) for module in synchronised.modules()}
    assert not any(issubclass(kind, torch.nn.BatchNorm2d) for kind in kinds)
    assert any(issubclass(kind, torch.nn.SyncBatchNorm) for kind in kinds)
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(plain.eval()(x), synchronised.eval()(x), atol=1e-5)


@pytest.mark.slow
def test_no_option_but_the_folder_is_needed(imagenet, tmp_path, tiny, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options, 'IMAGENET', {**options.IMAGENET, 'epochs': 6, 'batch_size': 120, 'img_size': 32})
    monkeypatch.setitem(registry.MODELS, 'twistnet18', registry.MODELS['tiny'])
    pretrain_imagenet.cli(['--data_dir', str(imagenet)])
    assert (tmp_path / 'weights' / 'twistnet18_imagenet.pt').exists()
    out, err = capfd.readouterr()
    assert out.startswith('weights/twistnet18_imagenet.pt: twistnet18, epoch ')
    assert f'{imagenet}, images: 240 to train, 21 to validate; classes: 3; model: twistnet18, weights: from scr' in err


def test_a_default_warm_up_makes_room_for_few_epochs():
    args = parse_args(['--data_dir', 'x', '--epochs', '3'])
    assert (args.warmup_epochs, options.lowered_defaults(args, options.IMAGENET)) == (
        2, ['note: --warmup_epochs is 2, not its default 5, to fit --epochs 3']
    )  # fmt: skip
    with pytest.raises(RunError, match='--epochs 3 must be greater than --warmup_epochs 3'):
        pretrain(parse_args(['--data_dir', 'x', '--epochs', '3', '--warmup_epochs', '3']))


@pytest.mark.slow
def test_learning_rate_scales_with_the_global_batch(imagenet, tmp_path, tiny, capfd):
    run(imagenet, tmp_path / 'a', '--lr', '0.4', '--min_lr', '0')
    run(imagenet, tmp_path / 'b', '--lr', '0.4', '--no-scale_lr')
    scaled, kept = (read_checkpoint(tmp_path / name / 'checkpoints' / 'latest.pt') for name in 'ab')
    assert scaled['config']['defines']['lr'] == 0.4 * 16 / 1024
    assert kept['config']['defines']['lr'] == 0.4
    args = parse_args(['--data_dir', 'x'])
    assert (args.epochs, args.batch_size, args.lr, args.model, args.checkpoint_dir) == (
        600, 256, 0.1, 'twistnet18', 'checkpoints'
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ stopping and going on


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_in_the_same_bits(imagenet, tmp_path, tiny, one_thread, monkeypatch):
    monkeypatch.setattr(pretrain_imagenet, 'CHECK_EVERY', 4)
    more = ('--epochs', '3', '--ema', '--ema_decay', '0.9', '--save_minutes', '0')
    run(imagenet, tmp_path / 'whole', *more)
    # Cut at every kind of moment: within an epoch, between the two files of a checkpoint, before and after validation.
    rng = random.Random(0)
    folder = tmp_path / 'cut'
    for workers in ('0', '1', '0', '0', '1', '0', '0', '0'):
        with contextlib.suppress(ZeroDivisionError), monkeypatch.context() as patch:
            countdown = [rng.randrange(1, 60)]

            def sometimes(real, countdown=countdown):
                def wrapped(*args, **kwargs):
                    countdown[0] -= 1
                    if countdown[0] == 0:
                        raise ZeroDivisionError  # nothing of ours catches it: as good as a kill
                    return real(*args, **kwargs)

                return wrapped

            patch.setattr(os, 'replace', sometimes(os.replace))
            patch.setattr(pretrain_imagenet, 'evaluate', sometimes(pretrain_imagenet.evaluate))
            patch.setattr(engine, 'mix', sometimes(engine.mix))
            run(imagenet, folder, *more, '--resume', 'auto', '--num_workers', workers)
    run(imagenet, folder, *more, '--resume', 'auto')
    assert outcome(folder) == outcome(tmp_path / 'whole')
    assert (folder / 'checkpoints' / 'log.jsonl').read_text().count('\n') == 3


TWO_RANKS = ('--epochs', '3', '--save_minutes', '0', '--batch_size', '8', '--num_workers', '1')


@pytest.fixture(scope='module')
def whole_of_two(imagenet, tmp_path_factory) -> tuple:
    """What two processes end with when nothing disturbs them."""
    folder = tmp_path_factory.mktemp('whole')
    codes, out, err = run_ranks(2, DRIVER, *argv_of(imagenet, folder, *TWO_RANKS))
    assert not any(codes), err
    assert out.count('validation accuracy') == 1
    return outcome(folder)


@pytest.mark.slow
def test_a_rank_that_is_killed_is_started_again_by_torchrun(imagenet, tmp_path, whole_of_two):
    torchrun = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=3')
    process = start(DRIVER, *argv_of(imagenet, tmp_path, *TWO_RANKS), launcher=torchrun)
    wait_for(tmp_path / 'checkpoints' / 'latest.pt', process)
    owner = (tmp_path / 'checkpoints' / '.lock').read_text().split()[1]
    os.kill(int(owner), signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, err
    assert 'resuming in epoch' in err
    assert out.count('validation accuracy') == 1
    assert outcome(tmp_path) == whole_of_two


@pytest.mark.slow
def test_two_machines_meet_and_meet_again_when_a_rank_of_one_is_killed(imagenet, tmp_path, whole_of_two):
    # As on two machines: an agent each, one process an agent.
    (port,) = free_ports(1)
    rendezvous = ('--nnodes=2', '--rdzv-backend=c10d', f'--rdzv-endpoint=127.0.0.1:{port}', '--rdzv-id=7')
    torchrun = ('--nproc_per_node=1', '--max-restarts=3', *rendezvous)
    agents = [drive(imagenet, tmp_path, *TWO_RANKS, torchrun=torchrun) for _ in range(2)]
    try:
        wait_for(tmp_path / 'checkpoints' / 'latest.pt', agents[0])
        owner = (tmp_path / 'checkpoints' / '.lock').read_text().split()[1]
        ranks = [Path(f'/proc/{agent.pid}/task/{agent.pid}/children').read_text().split() for agent in agents]
        (other,) = (pid for (pid,) in ranks if pid != owner)  # not the main process: its machine has nothing to count
        os.kill(int(other), signal.SIGKILL)
        ends = [finish(agent) for agent in agents]
    finally:
        for agent in agents:  # one that failed leaves the other waiting for it
            agent.kill_group()
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert sum(out.count('validation accuracy') for _, out, _ in ends) == 1, 'one process speaks'
    assert any('resuming in epoch' in err for _, _, err in ends)
    assert outcome(tmp_path) == whole_of_two


@pytest.mark.slow
def test_a_signal_saves_and_stops(imagenet, tmp_path):
    process = drive(imagenet, tmp_path, '--epochs', '40', '--num_workers', '1', '--save_minutes', '1000')
    wait_for(tmp_path / 'checkpoints' / 'log.jsonl', process)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGUSR1)  # to the loader's processes as well, as SLURM does
    code, out, err = finish(process)
    assert (code, out) == (128 + signal.SIGUSR1, ''), err
    saved = f'{tmp_path}/checkpoints/latest.pt is saved; --resume auto continues from there'
    assert err.splitlines()[-2:] == [saved, 'stopped']
    progress = read_checkpoint(tmp_path / 'checkpoints' / 'latest.pt')['progress']
    assert 0 < progress['epoch'] + progress['step'] / 15 < 40


@pytest.mark.slow
def test_three_processes_stopped_through_torchrun_go_on_in_the_same_bits(imagenet, tmp_path):
    # Of three gradients the order matters, which DistributedDataParallel changes after its first backward pass.
    more = ('--epochs', '3', '--batch_size', '5', '--save_minutes', '1000')
    codes, _, err = run_ranks(3, DRIVER, *argv_of(imagenet, tmp_path / 'whole', *more), DRIVER_LOOK='2')
    assert not any(codes), err
    again = (*more, '--resume', 'auto', '--num_workers', '1')
    torchrun = ('--standalone', '--nproc_per_node=3')
    process = drive(imagenet, tmp_path / 'cut', *again, torchrun=torchrun, DRIVER_LOOK='2')
    wait_for(tmp_path / 'cut' / 'checkpoints' / 'latest.pt', process)
    process.terminate()
    stopped, _, first = finish(process)
    assert stopped != 0, first
    assert 'is saved; --resume auto continues' in first
    process = drive(imagenet, tmp_path / 'cut', *again, torchrun=torchrun, DRIVER_LOOK='2')
    code, _, second = finish(process)
    assert code == 0, second
    assert re.search(r'resuming in epoch \d, after ([2-9]|1\d) steps', second), second
    assert outcome(tmp_path / 'cut') == outcome(tmp_path / 'whole')


ONE_EPOCH = ('--epochs', '1', '--warmup_epochs', '0')


def resume_alone(imagenet, tmp_path, *more: str) -> dict:
    """The seed's third command: the data and the checkpoint, and no option of the run; what defines what goes on."""
    paths = ('--checkpoint_dir', str(tmp_path / 'checkpoints'), '--weights_dir', str(tmp_path / 'weights'))
    latest = tmp_path / 'checkpoints' / 'latest.pt'
    argv = ['--data_dir', str(imagenet), '--resume', str(latest), *paths, '--num_workers', '0', *more]
    pretrain(parse_args(argv))
    return read_checkpoint(latest)['config']


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 4])
def test_a_resume_takes_its_options_from_the_run_and_keeps_the_global_batch(
    imagenet, tmp_path, tiny, monkeypatch, capfd, processes
):
    with monkeypatch.context() as patch:  # the main one of as many processes, killed after its first checkpoint
        patch.setattr(pretrain_imagenet, 'world_size', lambda: processes)
        patch.setattr(pretrain_imagenet, 'save_state', saved_and_killed(pretrain_imagenet.save_state))
        with pytest.raises(ZeroDivisionError):
            run(imagenet, tmp_path, *ONE_EPOCH, '--batch_size', '8', '--lr', '0.2', '--mixup', '0.1', '--seed', '7')
    begun = read_checkpoint(tmp_path / 'checkpoints' / 'latest.pt')['config']
    capfd.readouterr()
    config = resume_alone(imagenet, tmp_path)
    assert config['defines'] == begun['defines']
    assert config['defines']['lr'] == 0.2 * 8 * processes / 1024
    assert config['environment']['accumulate'] == processes
    err = capfd.readouterr().err
    assert 'mixup 0.1' in err
    assert ('was made in another environment (accumulate 1 -> 4, processes 4 -> 1)' in err) == (processes > 1)
    kept = f'the global batch stays {8 * processes} images: --batch_size 8 in 1 process, --accumulate {processes}'
    assert (kept in err) == (processes > 1)


def saved_and_killed(save_state):
    def wrapped(*arguments):
        save_state(*arguments)
        raise ZeroDivisionError  # nothing of ours catches it: as good as a kill

    return wrapped


@pytest.mark.parametrize(
    ('whole', 'was', 'given', 'world', 'expected'),
    [
        (1024, (4, 1), {}, 1, (256, 4)),
        (1024, (4, 1), {}, 2, (256, 2)),
        (1024, (4, 1), {}, 8, (128, 1)),
        (1024, (1, 4), {}, 4, (256, 1)),
        (512, (4, 1), {}, 1, (128, 4)),
        (1024, (4, 1), dict(batch_size=64), 1, (64, 16)),
        (1024, (4, 1), dict(batch_size=512, accumulate=2), 1, (512, 2)),
        (1024, (4, 1), dict(batch_size=64, accumulate=1), 1, None),
        (1024, (4, 1), {}, 3, None),
        (1024, (4, 1), dict(batch_size=100), 1, None),
        (1024, (4, 1), dict(batch_size=2048), 1, None),
        (1024, (4, 1), dict(accumulate=3), 1, None),
        (2, (1, 1), {}, 4, None),
    ],
)
def test_the_global_batch_is_kept_or_one_line_says_that_it_cannot_be(monkeypatch, whole, was, given, world, expected):
    monkeypatch.setattr(pretrain_imagenet, 'world_size', lambda: world)
    args = parse_args(['--data_dir', 'x', *(str(w) for k, v in given.items() for w in (f'--{k}', v))])
    config = dict(defines=dict(global_batch=whole, lr=0.7), environment=dict(processes=was[0], accumulate=was[1]))
    if expected is None:
        with pytest.raises(RunError, match=f'its global batch of {whole} images cannot be kept by {world} processes'):
            pretrain_imagenet.resume_options(args, Path('latest.pt'), config)
    else:
        pretrain_imagenet.resume_options(args, Path('latest.pt'), config)
        assert (args.batch_size, args.accumulate, args.lr) == (*expected, 0.7)


@pytest.mark.slow
def test_a_torn_checkpoint_falls_back_to_the_one_before(imagenet, tmp_path, tiny, capfd):
    run(imagenet, tmp_path / 'whole')
    run(imagenet, tmp_path / 'torn')
    latest = tmp_path / 'torn' / 'checkpoints' / 'latest.pt'
    whole = latest.read_bytes()
    for content, resume in ((whole[: len(whole) // 2], 'auto'), (b'', str(latest))):
        latest.write_bytes(content)
        capfd.readouterr()
        run(imagenet, tmp_path / 'torn', '--resume', resume)
        err = capfd.readouterr().err
        assert 'latest.pt: damaged' in err
        assert 'previous.pt' in err
        assert 'resuming in epoch' in err
        assert outcome(tmp_path / 'torn') == outcome(tmp_path / 'whole')
    latest.unlink()  # killed between the two moves
    run(imagenet, tmp_path / 'torn', '--resume', str(latest))
    assert outcome(tmp_path / 'torn') == outcome(tmp_path / 'whole')


@pytest.mark.slow
def test_what_cannot_be_resumed_is_refused(imagenet, tmp_path, tiny):
    with pytest.raises(RunError, match=r'--resume missing\.pt: no such file'):
        run(imagenet, tmp_path, '--resume', 'missing.pt')
    run(imagenet, tmp_path, '--resume', 'auto')  # there is none yet: it begins
    with pytest.raises(RunError, match=r'holds a run; --resume auto continues'):
        run(imagenet, tmp_path)
    with pytest.raises(RunError, match=r'latest\.pt holds a run of another.* \(lr 0\.0015625 -> 0\.003125\)'):
        run(imagenet, tmp_path, '--resume', 'auto', '--lr', '0.2')
    torch.save({'a': 1}, tmp_path / 'foreign.pt')
    with pytest.raises(RunError, match=r'foreign\.pt is no checkpoint'):
        run(imagenet, tmp_path, '--resume', str(tmp_path / 'foreign.pt'))
    for name in ('latest.pt', 'previous.pt'):
        (tmp_path / 'checkpoints' / name).write_bytes(b'torn')
    for _ in range(2):  # the second start must not begin anew either
        with pytest.raises(RunError, match='every checkpoint is damaged'):
            run(imagenet, tmp_path, '--resume', 'auto')


@pytest.mark.slow
def test_a_copy_of_a_checkpoint_goes_on_elsewhere_with_its_best_weights(imagenet, tmp_path, tiny, monkeypatch):
    accuracies = iter([60.0, 50.0, 40.0, 40.0, 40.0])
    monkeypatch.setattr(pretrain_imagenet, 'evaluate', lambda *_: (1.0, next(accuracies)))
    run(imagenet, tmp_path / 'a', '--epochs', '3')
    copy = tmp_path / 'copy.pt'
    (tmp_path / 'a' / 'checkpoints' / 'previous.pt').rename(copy)  # before the last validation
    run(imagenet, tmp_path / 'b', '--epochs', '3', '--resume', str(copy))
    best, again = (read_checkpoint(tmp_path / x / 'weights' / 'tiny_imagenet.pt') for x in 'ab')
    assert best['epoch'] == again['epoch'] == 1
    assert all(again['state_dict'][k].equal(v) for k, v in best['state_dict'].items())
    assert not best['state_dict']['stem.1.bias'].equal(
        read_checkpoint(tmp_path / 'b' / 'checkpoints' / 'latest.pt')['state_dict']['stem.1.bias']
    )
    with pytest.raises(RunError, match=r'copy\.pt holds a run of another configuration \(seed 42 -> 7\)'):
        run(imagenet, tmp_path / 'b', '--epochs', '3', '--seed', '7', '--resume', str(copy))
    run(imagenet, tmp_path / 'c', '--epochs', '1', '--warmup_epochs', '0')
    with pytest.raises(RunError, match=r'latest\.pt holds a run of another configuration \(epochs 1 -> 3'):
        run(imagenet, tmp_path / 'c', '--epochs', '3', '--resume', str(copy))


@pytest.mark.slow
def test_torchrun_s_restart_before_the_first_checkpoint_keeps_the_one_given(
    imagenet, tmp_path, tiny, monkeypatch, capfd
):
    run(imagenet, tmp_path / 'a')
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    latest = tmp_path / 'a' / 'checkpoints' / 'latest.pt'
    run(imagenet, tmp_path / 'b', '--resume', str(latest))
    assert 'resuming in epoch 3' in capfd.readouterr().err
    with pytest.raises(RunError, match='no such file'):
        run(imagenet, tmp_path / 'c', '--resume', 'missing.pt')
    run(imagenet, tmp_path / 'a')  # without --resume: a restart


@pytest.mark.slow
def test_a_full_disk_loses_nothing(imagenet, tmp_path, tiny, monkeypatch):
    run(imagenet, tmp_path / 'whole')
    real, calls = os.fsync, [0]

    def full(number: int) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(28, 'No space left on device')
        real(number)

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(RunError, match=r'cannot be written \(No space left on device\); what was saved before'):
        run(imagenet, tmp_path / 'cut')
    latest = tmp_path / 'cut' / 'checkpoints' / 'latest.pt'
    run(imagenet, tmp_path / 'cut', '--resume', str(latest))
    assert outcome(tmp_path / 'cut') == outcome(tmp_path / 'whole')


# ------------------------------------------------------------------------------------------ what comes out


@pytest.mark.slow
def test_the_weights_are_found_and_loaded_whole(imagenet, tmp_path, monkeypatch, capfd):
    target = run(imagenet, tmp_path, '--model', 'twistnet18', '--epochs', '1', '--warmup_epochs', '0', '--ema')
    assert target == tmp_path / 'weights' / 'twistnet18_imagenet.pt'
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    model = models.build_model('twistnet18', num_classes=47, pretrained=True)
    stored = torch.load(target, weights_only=True)
    own = model.state_dict()
    for name, tensor in stored['state_dict'].items():
        assert name.startswith('fc.') or own[name].equal(tensor), name
    assert any('.ais.' in name for name in own)
    assert 'loaded 204 of 206 tensors' in model.pretrained
    assert 'left as initialised: fc' in model.pretrained
    assert (stored['model'], stored['num_classes'], stored['averaged'], stored['epochs']) == ('twistnet18', 3, True, 1)
    assert '(weights of twistnet18)' in models.build_model('twistnet18_no_ais', 47, pretrained=True).pretrained


@pytest.mark.slow
def test_weights_that_are_there_are_not_replaced_unasked(imagenet, tmp_path, tiny):
    target = tmp_path / 'weights' / 'tiny_imagenet.pt'
    target.parent.mkdir()
    target.write_bytes(b'precious')
    with pytest.raises(RunError, match='exists; --overwrite replaces it'):
        run(imagenet, tmp_path)
    assert not (tmp_path / 'checkpoints' / 'latest.pt').exists(), 'said before four days, not after'
    run(imagenet, tmp_path, '--overwrite')
    assert read_checkpoint(target)['model'] == 'tiny'
    run(imagenet, tmp_path, '--resume', 'auto')  # complete: its own weights may be written again
    (tmp_path / 'file').touch()
    with pytest.raises(RunError, match=r'--weights_dir .*file: cannot be made'):
        run(imagenet, tmp_path / 'a', '--weights_dir', str(tmp_path / 'file'))


def test_weights_that_came_during_the_run_are_not_replaced(imagenet, tmp_path, tiny, monkeypatch):
    target = tmp_path / 'weights' / 'tiny_imagenet.pt'
    monkeypatch.setattr(pretrain_imagenet, 'evaluate', lambda *_: (target.write_bytes(b'precious'), 1.0)[::-1])
    with pytest.raises(RunError, match='exists; --overwrite replaces it'):
        run(imagenet, tmp_path, '--epochs', '1', '--warmup_epochs', '0')
    assert target.read_bytes() == b'precious'


@pytest.mark.slow
def test_the_best_epoch_is_kept_and_the_average_evaluated(imagenet, tmp_path, tiny, monkeypatch):
    accuracies = iter([50.0, 70.0, 70.0, 60.0])
    seen = []

    def evaluate(model, *_):
        seen.append([p.detach().clone() for p in model.parameters()])
        return 1.0, next(accuracies)

    monkeypatch.setattr(pretrain_imagenet, 'evaluate', evaluate)
    target = run(imagenet, tmp_path, '--epochs', '4', '--ema', '--ema_decay', '0.5')
    assert read_checkpoint(target)['epoch'] == 3, 'the later on ties'
    own = read_checkpoint(tmp_path / 'checkpoints' / 'latest.pt')['state_dict']
    assert not seen[-1][0].equal(own['stem.0.weight']), 'the average is what was evaluated'


@pytest.mark.slow
def test_the_average_of_a_short_run_follows_its_weights_and_is_what_is_loaded(imagenet, tmp_path, tiny):
    run(imagenet, tmp_path, *ONE_EPOCH, '--ema', '--lr', '5')
    latest = tmp_path / 'checkpoints' / 'latest.pt'
    last = read_checkpoint(latest)
    average, own = (last[key]['stem.1.weight'] for key in ('average', 'state_dict'))
    assert (average - own).abs().max() < (own - 1).abs().max() / 2, 'it began at one'
    loaded = models.build_model('tiny', 3, pretrained=str(latest)).state_dict()
    assert loaded['stem.1.weight'].equal(average)


# ------------------------------------------------------------------------------------------ bad data, bad numbers


@pytest.mark.slow
def test_bad_images_are_named_counted_and_replaced(imagenet, tmp_path, tiny, capfd):
    root = tmp_path / 'tree'
    for subset in ('train', 'val'):
        for folder in (imagenet / subset).iterdir():
            (root / subset / folder.name).mkdir(parents=True)
            for path in folder.iterdir():
                (root / subset / folder.name / path.name).write_bytes(path.read_bytes())
    broken = sorted((root / 'train' / 'n00000001').iterdir())[:3]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    run(root, tmp_path / 'a', '--num_workers', '2')
    err = capfd.readouterr().err
    assert all(f'bad image, another one takes its place: {path}' in err for path in broken)
    assert err.count('bad image') == 3
    assert runs.read_log(tmp_path / 'a' / 'checkpoints' / 'log.jsonl')[-1]['bad_images'] == 3
    run(root, tmp_path / 'b')
    assert outcome(tmp_path / 'a') == outcome(tmp_path / 'b'), 'whatever the number of workers'
    with pytest.raises(RunError, match='3 images cannot be read, more than --max_bad_images 2'):
        run(root, tmp_path / 'c', '--max_bad_images', '2')
    broken_val = next((root / 'val' / 'n00000001').iterdir())
    whole = broken_val.read_bytes()
    broken_val.write_bytes(b'')
    with pytest.raises(DataError, match='cannot be read as an image'):
        run(root, tmp_path / 'd')
    broken_val.write_bytes(whole)
    run(root, tmp_path / 'd', '--resume', 'auto')  # the training of the epoch is not lost
    assert 'resuming in epoch 1, after 15 steps' in capfd.readouterr().err
    assert outcome(tmp_path / 'd') == outcome(tmp_path / 'a')


def test_the_replacement_depends_on_the_image_alone(imagenet, tmp_path):
    index = read_index(imagenet / 'train')
    items = [index[i] for i in range(len(index))]
    items[7] = (str(tmp_path / 'missing.jpg'), 0)
    images = ForgivingImages(items, lambda image, key: (image.tobytes()[:30], key))
    first, again = images[5, 2, 7], images[5, 2, 7]
    assert first == again
    assert first[2] == 7
    assert images[5, 3, 7][0][1] != first[0][1], 'another epoch, another image'
    assert images[5, 2, 8][2] == -1


def test_gradients_that_are_not_finite_stop_the_run_and_keep_the_last_good_checkpoint(
    imagenet, tmp_path, tiny, monkeypatch
):
    real, calls = engine.mix, [0]

    def mix(images, *rest):
        calls[0] += 1
        images, targets = real(images, *rest)
        return images * (float('nan') if calls[0] == 18 else 1), targets  # in the second epoch

    monkeypatch.setattr(engine, 'mix', mix)
    with pytest.raises(RunError, match=r'the gradients near step 29 were not finite; .*latest\.pt; try a lower --lr'):
        run(imagenet, tmp_path)
    last = read_checkpoint(tmp_path / 'checkpoints' / 'latest.pt')
    assert last['progress']['epoch'] == 1
    assert all(t.isfinite().all() for t in last['state_dict'].values())


@pytest.mark.slow
def test_fp16_skips_the_steps_that_find_its_scale(imagenet, tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(registry.MODELS, 'tiny', TINY | dict(twist=dict(base_width=8)))  # gradients grow with the depth
    run(imagenet, tmp_path, '--amp', 'fp16', '--epochs', '1', '--warmup_epochs', '0')
    line = runs.read_log(tmp_path / 'checkpoints' / 'log.jsonl')[0]
    assert 0 < line['dropped_steps'] < 5, 'a scale of 65536 overflows at first'
    assert np.isfinite([line['train_loss'], line['val_loss']]).all()
    with pytest.raises(RunError, match='the gradients near step 14 were not finite'):
        run(imagenet, tmp_path / 'b', '--amp', 'fp16', *ONE_EPOCH, '--max_skipped', '1')


@pytest.mark.slow
def test_a_validation_that_is_not_finite_keeps_the_last_good_checkpoint(imagenet, tmp_path, tiny, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_imagenet, 'evaluate', lambda *_: (float('nan'), 1.0))
        with pytest.raises(RunError, match=r'the validation loss is nan after epoch 1; .*latest\.pt'):
            run(imagenet, tmp_path)
    run(imagenet, tmp_path, '--resume', 'auto')


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ('more', 'words'),
    [
        (('--data_dir', 'nowhere'), 'nowhere/train: no such folder'),
        (('--batch_size', '500'), '--batch_size 500 must be'),
        (('--batch_size', '1'), '--batch_size 1 must be'),
        (('--model', 'resnet19'), "unknown model 'resnet19'"),
        (('--lr', '-1'), '--lr -1.0 must be'),
        (('--lr', '0.001', '--min_lr', '0.0009'), '--min_lr 0.0009 must not exceed --lr 1.5625e-05'),
        (('--accumulate', '0'), '--accumulate 0 must be from 1'),
        (('--max_skipped', '0'), '--max_skipped 0 must be from 1'),
        (('--ema_decay', '2'), '--ema_decay 2.0 must be from 0 to 1'),
        (('--sync_bn', '--device', 'cpu'), '--sync_bn needs CUDA devices'),
    ],
)
def test_bad_options_are_one_line(imagenet, tmp_path, tiny, capfd, more, words):
    with pytest.raises(SystemExit) as caught:
        pretrain_imagenet.cli(argv_of(imagenet, tmp_path, *more))
    assert caught.value.code == 1
    captured = capfd.readouterr()
    assert captured.out == ''
    assert words in captured.err.splitlines()[-1]
    assert captured.err.splitlines()[-1].startswith('pretrain_imagenet.py: error: ')
    assert 'Traceback' not in captured.err


def test_classes_of_train_and_val_must_agree(imagenet, tmp_path, tiny):
    for name in ('train/a', 'train/b', 'train/c', 'val/a', 'val/b', 'val/d'):
        write_image(tmp_path / 'tree' / name / '1.JPEG', 1)
    with pytest.raises(DataError, match=r'class c is not in both train/ and val/'):
        run(tmp_path / 'tree', tmp_path, '--batch_size', '2')


def test_deep_images_are_scaled_by_the_bits_of_the_whole_tree(imagenet, tmp_path, tiny, monkeypatch, capfd):
    bits = []
    monkeypatch.setattr(pretrain_imagenet, 'image_bits', lambda paths: (len(list(paths)) and 12, ['12 bits are taken']))
    monkeypatch.setattr(pretrain_imagenet, 'open_image', lambda path, **given: bits.append(given) or open_image(path))
    run(imagenet, tmp_path, *ONE_EPOCH)
    assert set(map(str, bits)) == {"{'bits': 12}"}
    assert 'note: 12 bits are taken' in capfd.readouterr().err


@pytest.mark.slow
def test_a_default_min_lr_shrinks_to_the_scaled_rate(imagenet, tmp_path, tiny, capfd):
    run(imagenet, tmp_path, *ONE_EPOCH, '--batch_size', '2', '--lr', '1e-4')
    assert 'note: --min_lr is 1.95313e-07, not its default 1e-06' in capfd.readouterr().err
