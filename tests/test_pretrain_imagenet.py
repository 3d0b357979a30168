"""The promises of pretrain_imagenet.py: nothing is lost, nothing depends on how it is run, and bad data is survived."""

import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import mini_imagenet
import numpy as np
import pytest
import torch
from conftest import FORKED_TORCHRUN, ROOT, TINY, finish, run_ranks, start, write_image
from scipy.io import savemat
from slurm_node import free_ports

import models
import pretrain_imagenet
from common import options, registry, runs
from common.checkpoint import read_checkpoint
from common.errors import DataError, Diverged, RunError, UserError
from common.imagenet import read_val
from common.images import open_image
from common.options import parse_pretraining_args as parse_args
from common.trees import read_index
from pretrain_imagenet import prepare, pretrain, score
from training import engine
from training.loader import ForgivingImages
from transforms import eval_settings

SCRIPT = 'pretrain_imagenet.py'
SIZE = ('--img_size', '32', '--batch_size', '16', '--epochs', '2', '--warmup_epochs', '1', '--amp', 'off')
ONE_EPOCH = ('--epochs', '1', '--warmup_epochs', '0')
CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory) -> Path:
    """Three classes of 48 images to train on, enough for 9 steps of 16, and 9 to validate."""
    return mini_imagenet.make(tmp_path_factory.mktemp('imagenet'), 48, 3, classes=3)


def argv_of(root: Path, folder: Path, *more: str) -> list[str]:
    argv = ['--data_dir', str(root), '--model', 'tiny', *SIZE, '--num_workers', '0']
    return [*argv, '--checkpoint_dir', str(folder / 'checkpoints'), '--weights_dir', str(folder / 'weights'), *more]


def run(root: Path, folder: Path, *more: str) -> Path:
    """In this process."""
    return pretrain(parse_args(argv_of(root, folder, *more)))


@pytest.fixture(scope='module')
def complete(imagenet, tmp_path_factory) -> Path:
    """The folder of a complete run, to be copied."""
    folder = tmp_path_factory.mktemp('complete')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, 'tiny', TINY)
        run(imagenet, folder)
    return folder


def outcome(folder: Path) -> tuple:
    """Everything that must be the same to the bit; times are not."""
    last = read_checkpoint(folder / 'checkpoints' / 'latest.pt')
    tensors = [t.numpy().tobytes() for t in last['state_dict'].values()]
    tensors += [t.numpy().tobytes() for state in last['optimizer']['state'].values() for t in state.values()]
    tensors += [t.numpy().tobytes() for t in (last['average'] or {}).values()]
    history = [{k: v for k, v in line.items() if 'second' not in k} for line in last['progress']['history']]
    best = read_checkpoint(next((folder / 'weights').glob('*.pt')))
    return tensors, history, best['epoch'], [t.numpy().tobytes() for t in best['state_dict'].values()]


def until(condition) -> None:
    give_up = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < give_up, 'took too long'
        time.sleep(0.005)


# ------------------------------------------------------------------------------------------ how it is run


@pytest.mark.slow
def test_no_option_but_the_folder_is_needed(imagenet, tmp_path, tiny, monkeypatch, capfd):
    args = parse_args(['--data_dir', 'x'])
    assert (args.epochs, args.batch_size, args.lr, args.checkpoint_dir) == (600, 256, 0.1, 'checkpoints')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options, 'IMAGENET', {**options.IMAGENET, 'epochs': 6, 'batch_size': 72, 'img_size': 32})
    monkeypatch.setattr(pretrain_imagenet, 'PROJECT_AFTER', 4)
    monkeypatch.setitem(registry.MODELS, 'twistnet18', TINY)
    pretrain_imagenet.cli(['--data_dir', str(imagenet)])
    assert (tmp_path / 'weights' / 'twistnet18_imagenet.pt').exists()
    out, err = capfd.readouterr()
    assert out.startswith('weights/twistnet18_imagenet.pt: twistnet18, epoch ')
    assert f'{imagenet}, images: 144 to train, 9 to validate; classes: 3; model: twistnet18, weights: from scr' in err
    assert err.count('the rest will take about 0:00:') == 1


@pytest.mark.slow
def test_losses_do_not_depend_on_processes_or_parts(imagenet, tmp_path):
    more = ('--model', 'test_convnext', '--lr', '0.02')  # no BatchNorm: its statistics are of a part of a step
    run(imagenet, tmp_path / 'one', *more)
    parts = ('--batch_size', '4', '--accumulate', '2')
    codes, _, err = run_ranks(2, SCRIPT, *argv_of(imagenet, tmp_path / 'two', *more, *parts))
    assert not any(codes), err
    assert 'learning rate 0.0003125 for a global batch of 16' in err
    logs = [runs.read_log(tmp_path / name / 'checkpoints' / 'log.jsonl') for name in ('one', 'two')]
    for one, two in zip(*logs):
        assert [two['train_loss'], two['val_loss']] == pytest.approx([one['train_loss'], one['val_loss']], rel=1e-6)


@pytest.mark.parametrize('model', ['tiny', 'test_efficientnet'])  # the latter's BatchNorms have an activation
def test_synchronised_batchnorm_keeps_the_names_and_the_function(tiny, model):
    args = parse_args(['--data_dir', 'x', '--model', model, '--img_size', '32', '--sync_bn', '--amp', 'off'])
    states = []
    for args.sync_bn in (False, True):
        torch.manual_seed(0)
        states.append(engine.build_state(args, 3, CPU, None, 2))
    plain, synchronised = (state.model for state in states)
    assert list(plain.state_dict()) == list(synchronised.state_dict())
    kinds = {type(module) for module in synchronised.modules()}
    assert not any(issubclass(kind, torch.nn.BatchNorm2d) for kind in kinds)
    assert any(issubclass(kind, torch.nn.SyncBatchNorm) for kind in kinds)
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(plain.eval()(x), synchronised.eval()(x), atol=1e-5)


@pytest.mark.parametrize(
    ('more', 'lr', 'min_lr'),
    [
        (('--lr', '0.4', '--accumulate', '2'), 0.4 * 32 / 1024, 1e-6),
        (('--lr', '0.4', '--no-scale_lr'), 0.4, 1e-6),
        (('--lr', '1e-4', '--batch_size', '2'), 1e-4 * 2 / 1024, 1e-4 * 2 / 1024),
    ],
)
def test_the_learning_rate_scales_with_the_global_batch(imagenet, tmp_path, tiny, capfd, more, lr, min_lr):
    defines = prepare(parse_args(argv_of(imagenet, tmp_path, *more)), CPU)[3]['defines']
    assert (defines['lr'], defines['min_lr']) == (lr, min_lr)
    lowered = 'note: --min_lr is 1.95313e-07, not its default 1e-06' in capfd.readouterr().err
    assert lowered == (min_lr == lr)


# ------------------------------------------------------------------------------------------ stopping and going on


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_in_the_same_bits(imagenet, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(pretrain_imagenet, 'CHECK_EVERY', 4)
    more = ('--epochs', '3', '--ema', '--ema_decay', '0.9', '--save_minutes', '0')
    run(imagenet, tmp_path / 'whole', *more)
    # Cut at every kind of moment: within an epoch, between the two files of a checkpoint, before and after validation.
    rng = random.Random(0)
    folder = tmp_path / 'cut'
    for workers in ('0', '1', '0', '0', '0', '0'):
        with contextlib.suppress(ZeroDivisionError), monkeypatch.context() as patch:
            countdown = [rng.randrange(1, 40)]

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


def test_a_recipe_of_transformers_resumes_in_the_same_bits(imagenet, tmp_path, monkeypatch):
    more = ('--model', 'test_convnext', '--opt', 'adamw', '--layer_decay', '0.5', '--drop_path', '0.4', '--epochs', '3')
    run(imagenet, tmp_path / 'whole', *more)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_imagenet, 'evaluate', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(imagenet, tmp_path / 'cut', *more)
    rest = ('--model', 'test_convnext', '--epochs', '3', '--resume', 'auto')  # the other options are the run's
    run(imagenet, tmp_path / 'cut', *rest)
    assert outcome(tmp_path / 'cut') == outcome(tmp_path / 'whole')
    args = parse_args(argv_of(imagenet, tmp_path, *more))
    state = engine.build_state(args, 3, CPU, None, 2, fused=True)
    assert {type(state.optimizer)} == {torch.optim.AdamW}
    assert max(getattr(module, 'drop_prob', 0) for module in state.model.modules()) == pytest.approx(0.4)
    assert len({group['lr_scale'] for group in state.optimizer.param_groups}) > 2
    rates = [line['lr'] for line in runs.read_log(tmp_path / 'whole' / 'checkpoints' / 'log.jsonl')]
    scaled = prepare(parse_args(argv_of(imagenet, tmp_path, *more)), CPU)[0]
    assert rates == [engine.lr_at(9 * epoch - 1, scaled, 9) for epoch in (1, 2, 3)], 'warm-up and cosine, unscaled'


@contextlib.contextmanager
def two_machines(*argv: str):
    """An agent of torchrun on each, with one process and with two."""
    (port,) = free_ports(1)
    rendezvous = ('--nnodes=2', '--rdzv-backend=c10d', f'--rdzv-endpoint=127.0.0.1:{port}', '--rdzv-id=7')
    torchrun = (FORKED_TORCHRUN, '--max-restarts=3', *rendezvous)
    agents = [start(*torchrun, f'--nproc_per_node={count}', ROOT / SCRIPT, *argv) for count in (1, 2)]
    try:
        yield agents
    finally:
        for agent in agents:  # one that failed leaves the other waiting for it
            agent.kill_group()


@pytest.mark.slow
def test_three_processes_of_two_machines_killed_and_stopped_end_in_the_same_bits(imagenet, tmp_path):
    # Of three gradients the order matters, which DistributedDataParallel changes after its first backward pass.
    more = ('--model', 'test_resnet', '--batch_size', '2', '--epochs', '3', '--save_minutes', '0')
    codes, out, err = run_ranks(3, SCRIPT, *argv_of(imagenet, tmp_path / 'whole', *more))
    assert not any(codes), err
    assert out.count('validation accuracy') == 1
    argv = argv_of(imagenet, tmp_path / 'cut', *more, '--num_workers', '1')
    latest = tmp_path / 'cut' / 'checkpoints' / 'latest.pt'
    with two_machines(*argv) as agents:

        def resumed() -> int:
            assert [agent.poll() for agent in agents] == [None, None], [finish(agent) for agent in agents]
            return sum(agent.outputs[1].read_text().count('resuming in epoch') for agent in agents)

        until(lambda: resumed() or latest.exists())
        for count, kill_main in enumerate((False, True), start=1):  # the machine of the main one has nothing to count
            main = (latest.parent / '.lock').read_text().split()[1]
            ranks = [Path(f'/proc/{agent.pid}/task/{agent.pid}/children').read_text().split() for agent in agents]
            others = [pid for machine in ranks if main not in machine for pid in machine]
            os.kill(int(main if kill_main else others[0]), signal.SIGKILL)
            until(lambda count=count: resumed() == count)
        written = latest.stat().st_mtime_ns
        until(lambda: resumed() and latest.stat().st_mtime_ns != written)
        for agent in agents:
            agent.terminate()
        codes, _, errs = zip(*map(finish, agents))
        assert all(codes)
        assert 'is saved; --resume auto continues' in ''.join(errs)
    with two_machines(*argv, '--resume', 'auto') as agents:
        codes, outs, errs = zip(*map(finish, agents))
    assert not any(codes), errs
    assert re.search(r'resuming in epoch \d, after 2\d steps', ''.join(errs)), errs
    assert ''.join(outs).count('validation accuracy') == 1, 'one process speaks'
    assert outcome(tmp_path / 'cut') == outcome(tmp_path / 'whole')


@pytest.mark.slow
def test_a_signal_saves_and_stops(imagenet, tmp_path):
    more = ('--model', 'test_resnet', '--epochs', '400', '--num_workers', '1', '--save_minutes', '1000')
    process = start(SCRIPT, *argv_of(imagenet, tmp_path, *more))
    until(lambda: (tmp_path / 'checkpoints' / 'log.jsonl').exists() or process.poll() is not None)
    for number in (signal.SIGUSR1, signal.SIGTERM):  # to the loader's processes as well, as SLURM does
        os.killpg(process.pid, number)
    code, out, err = finish(process)
    assert (code, out) == (128 + signal.SIGUSR1, ''), err
    saved = f'{tmp_path}/checkpoints/latest.pt is saved; --resume auto continues from there'
    assert err.splitlines()[-2:] == [saved, 'stopped']
    assert 0 < read_checkpoint(tmp_path / 'checkpoints' / 'latest.pt')['progress']['epoch'] < 400


@pytest.mark.slow
def test_a_resume_takes_its_options_from_the_run_and_keeps_the_global_batch(
    imagenet, tmp_path, tiny, monkeypatch, capfd
):
    real = pretrain_imagenet.save_state

    def saved_and_killed(*arguments):
        real(*arguments)
        raise ZeroDivisionError

    with monkeypatch.context() as patch:  # the main one of four processes, killed after its first checkpoint
        patch.setattr(pretrain_imagenet, 'world_size', lambda: 4)
        patch.setattr(pretrain_imagenet, 'save_state', saved_and_killed)
        with pytest.raises(ZeroDivisionError):
            run(imagenet, tmp_path, *ONE_EPOCH, '--batch_size', '8', '--lr', '0.2', '--mixup', '0.1', '--seed', '7')
    latest = tmp_path / 'checkpoints' / 'latest.pt'
    begun = read_checkpoint(latest)['config']
    capfd.readouterr()
    # The seed's third command: the data and the checkpoint, and no option of the run.
    paths = ('--checkpoint_dir', str(latest.parent), '--weights_dir', str(tmp_path / 'weights'))
    pretrain(parse_args(['--data_dir', str(imagenet), '--resume', str(latest), *paths, '--num_workers', '0']))
    config = read_checkpoint(latest)['config']
    assert config['defines'] == begun['defines']
    assert config['defines']['lr'] == 0.2 * 8 * 4 / 1024
    assert config['environment']['accumulate'] == 4
    err = capfd.readouterr().err
    assert 'mixup 0.1' in err
    assert 'was made in another environment (accumulate 1 -> 4, processes 4 -> 1)' in err
    assert 'the global batch stays 32 images: --batch_size 8 times --accumulate 4 times processes (1)' in err


@pytest.mark.parametrize(
    ('whole', 'was', 'given', 'world', 'expected'),
    [
        (1024, (4, 1), {}, 1, (256, 4)),
        (1024, (4, 1), {}, 8, (128, 1)),
        (1024, (1, 4), {}, 4, (256, 1)),
        (1024, (4, 1), dict(batch_size=64), 1, (64, 16)),
        (1024, (4, 1), dict(batch_size=64, accumulate=1), 1, None),
        (1024, (4, 1), {}, 3, None),
        (2, (1, 1), {}, 4, None),
    ],
)
def test_the_global_batch_is_kept_or_one_line_says_that_it_cannot_be(monkeypatch, whole, was, given, world, expected):
    monkeypatch.setattr(pretrain_imagenet, 'world_size', lambda: world)
    args = parse_args(['--data_dir', 'x', *(str(w) for k, v in given.items() for w in (f'--{k}', v))])
    config = dict(defines=dict(global_batch=whole, lr=0.7), environment=dict(processes=was[0], accumulate=was[1]))
    if expected is None:
        with pytest.raises(RunError, match=f'global batch of {whole} images cannot be kept: .* processes .{world}.'):
            pretrain_imagenet.resume_options(args, Path('latest.pt'), config)
    else:
        pretrain_imagenet.resume_options(args, Path('latest.pt'), config)
        assert (args.batch_size, args.accumulate, args.lr) == (*expected, 0.7)


def test_a_torn_checkpoint_falls_back_to_the_one_before(imagenet, tmp_path, tiny, complete, capfd):
    for name, size in (('half', 1000), ('empty', 0), ('missing', None)):  # the last: killed between two moves
        latest = shutil.copytree(complete, tmp_path / name) / 'checkpoints' / 'latest.pt'
        latest.unlink() if size is None else os.truncate(latest, size)
        run(imagenet, tmp_path / name, '--resume', 'auto' if name == 'half' else str(latest))
        err = capfd.readouterr().err
        assert ('latest.pt: damaged' in err) == (name != 'missing')
        assert latest.with_name('latest.pt.damaged').exists() == (name != 'missing'), 'not the next previous.pt'
        assert 'previous.pt: resuming in epoch 2' in err
        assert outcome(tmp_path / name) == outcome(complete)


def test_what_cannot_be_resumed_is_refused(imagenet, tmp_path, tiny, complete):
    checkpoints = shutil.copytree(complete / 'checkpoints', tmp_path / 'checkpoints')
    with pytest.raises(RunError, match=r'--resume missing\.pt: no such file'):
        run(imagenet, tmp_path, '--resume', 'missing.pt')
    with pytest.raises(RunError, match=r'holds a run; --resume auto continues'):
        run(imagenet, tmp_path)
    with pytest.raises(RunError, match=r'latest\.pt holds a run of another.* \(lr 0\.0015625 -> 0\.003125\)'):
        run(imagenet, tmp_path, '--resume', 'auto', '--lr', '0.2')
    torch.save({'a': 1}, tmp_path / 'foreign.pt')
    with pytest.raises(RunError, match=r'foreign\.pt is no checkpoint'):
        run(imagenet, tmp_path, '--resume', str(tmp_path / 'foreign.pt'))
    for name in ('latest.pt', 'previous.pt'):
        (checkpoints / name).write_bytes(b'torn')
    for _ in range(2):  # the second start must not begin anew either
        with pytest.raises(RunError, match='every checkpoint is damaged'):
            run(imagenet, tmp_path, '--resume', 'auto')


def test_the_best_epoch_is_kept_and_goes_elsewhere_with_a_copy_of_a_checkpoint(
    imagenet, tmp_path, tiny, complete, monkeypatch
):
    accuracies, seen = itertools.chain([50.0, 70.0, 70.0], itertools.repeat(60.0)), []

    def evaluate(model, *_):
        seen.append([p.detach().clone() for p in model.parameters()])
        return 1.0, next(accuracies)

    monkeypatch.setattr(pretrain_imagenet, 'evaluate', evaluate)
    more = ('--epochs', '4', '--ema', '--ema_decay', '0.5')
    best = read_checkpoint(run(imagenet, tmp_path / 'a', *more))
    assert best['epoch'] == 3, 'the later on ties'
    latest = tmp_path / 'a' / 'checkpoints' / 'latest.pt'
    last = read_checkpoint(latest)
    assert seen[-1][0].equal(last['average']['stem.0.weight']), 'the average is what was evaluated'
    assert not seen[-1][0].equal(last['state_dict']['stem.0.weight'])
    assert models.build_model('tiny', 3, pretrained=str(latest)).stem[0].weight.equal(seen[-1][0])
    copy = tmp_path / 'copy.pt'
    latest.with_name('previous.pt').rename(copy)  # before the last validation
    again = read_checkpoint(run(imagenet, tmp_path / 'b', *more, '--resume', str(copy)))
    assert again['epoch'] == 3
    assert all(again['state_dict'][k].equal(v) for k, v in best['state_dict'].items())
    with pytest.raises(RunError, match=r'copy\.pt holds a run of another configuration \(seed 42 -> 7\)'):
        run(imagenet, tmp_path / 'b', *more, '--seed', '7', '--resume', str(copy))
    shutil.copytree(complete, tmp_path / 'c')
    with pytest.raises(RunError, match=r'latest\.pt holds a run of another configuration \(ema False -> True'):
        run(imagenet, tmp_path / 'c', *more, '--resume', str(copy))


def test_torchrun_s_restart_resumes_the_folder_s_run_or_the_checkpoint_given(
    imagenet, tmp_path, tiny, complete, monkeypatch, capfd
):
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    own = shutil.copytree(complete, tmp_path / 'a')
    run(imagenet, own)  # without --resume
    run(imagenet, tmp_path / 'b', '--resume', str(own / 'checkpoints' / 'latest.pt'))  # none of its own yet
    assert capfd.readouterr().err.count('resuming in epoch 3') == 2
    with pytest.raises(RunError, match='no such file'):
        run(imagenet, tmp_path / 'c', '--resume', 'missing.pt')


# ------------------------------------------------------------------------------------------ what comes out


@pytest.mark.slow
def test_the_weights_are_found_and_loaded_whole(imagenet, tmp_path, monkeypatch):
    target = run(imagenet, tmp_path, '--model', 'twistnet18', *ONE_EPOCH, '--batch_size', '72', '--ema')
    assert target == tmp_path / 'weights' / 'twistnet18_imagenet.pt'
    monkeypatch.chdir(tmp_path)
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


def test_weights_that_are_there_are_not_replaced_unasked(imagenet, tmp_path, tiny, complete, monkeypatch):
    folder, target = tmp_path / 'a', tmp_path / 'a' / 'weights' / 'tiny_imagenet.pt'
    shutil.copytree(complete, folder)
    run(imagenet, folder, '--resume', 'auto')  # complete: its own weights may be written again
    precious = dict(model='tiny')
    torch.save(precious, target)
    weights = ('--weights_dir', str(target.parent))
    with pytest.raises(RunError, match='exists; --overwrite replaces it'):
        run(imagenet, tmp_path / 'b', *weights)
    assert not (tmp_path / 'b' / 'checkpoints' / 'latest.pt').exists(), 'said before four days, not after'
    run(imagenet, folder, '--resume', 'auto', '--overwrite')
    assert 'state_dict' in read_checkpoint(target)
    target.unlink()
    with monkeypatch.context() as patch:  # weights that came during the run
        patch.setattr(pretrain_imagenet, 'evaluate', lambda *_: (torch.save(precious, target) or 1.0, 1.0))
        with pytest.raises(RunError, match='exists; --overwrite replaces it'):
            run(imagenet, tmp_path / 'c', *ONE_EPOCH, *weights)
    assert read_checkpoint(target) == precious


# ------------------------------------------------------------------------------------------ as it is downloaded


def write_lists(folder: Path, class_of: dict[int, str], kind: str) -> None:
    """The classes of validation images 1, 2, .. as Kaggle or the devkit lists them."""
    if kind == 'kaggle':
        rows = [f'ILSVRC2012_val_{i:08d},{wnid} 1 2 3 4 {wnid} 5 6 7 8 ' for i, wnid in class_of.items()]
        (folder / 'LOC_val_solution.csv').write_text('\n'.join(['ImageId,PredictionString', *rows[::-1]]))
        return
    data = folder / 'ILSVRC2012_devkit_t12' / 'data'
    data.mkdir(parents=True)
    ids = {wnid: number for number, wnid in enumerate(sorted(set(class_of.values()), reverse=True), 1)}
    synsets = np.zeros(len(ids), [('ILSVRC2012_ID', 'O'), ('WNID', 'O'), ('num_children', 'O')])
    synsets[:] = [(number, wnid, 0) for wnid, number in ids.items()]
    savemat(data / 'meta.mat', dict(synsets=synsets))
    lines = [str(ids[wnid]) for wnid in class_of.values()]
    (data / 'ILSVRC2012_validation_ground_truth.txt').write_text('\n'.join(lines) + '\n')


@pytest.fixture
def downloaded(imagenet, tmp_path) -> tuple[Path, Path, dict[int, str]]:
    """ILSVRC as it comes, without lists; the same sorted into folders; and the classes of its validation images."""
    flat, tidy = tmp_path / 'flat', tmp_path / 'tidy'
    val = flat / 'ILSVRC' / 'Data' / 'CLS-LOC' / 'val'
    val.mkdir(parents=True)
    shutil.copytree(imagenet / 'train', val.with_name('train'))
    shutil.copytree(imagenet / 'train', tidy / 'train')
    paths = sorted((imagenet / 'val').glob('*/*'))
    random.Random(0).shuffle(paths)
    class_of = {i: path.parent.name for i, path in enumerate(paths, 1)}
    for (i, wnid), path in zip(class_of.items(), paths):
        (tidy / 'val' / wnid).mkdir(parents=True, exist_ok=True)
        for folder in (val, tidy / 'val' / wnid):
            shutil.copy(path, folder / f'ILSVRC2012_val_{i:08d}.JPEG')
    return flat, tidy, class_of


@pytest.mark.parametrize('kind', ['kaggle', 'devkit'])
def test_imagenet_as_it_is_downloaded_is_the_tree_it_would_be_sorted_into(downloaded, tmp_path, tiny, kind):
    flat, tidy, class_of = downloaded
    write_lists(flat, class_of, kind)
    expected = read_index(tidy / 'val')
    for root in (flat, flat / 'ILSVRC', flat / 'ILSVRC' / 'Data' / 'CLS-LOC'):
        found = read_val(root)
        assert found.classes == expected.classes
        items = zip(found, expected, strict=True)
        assert all(Path(a).read_bytes() == Path(b).read_bytes() and x == y for (a, x), (b, y) in items)
    configs = [prepare(parse_args(argv_of(root, tmp_path)), CPU)[3] for root in (flat, tidy)]
    assert configs[0]['fingerprint'] == configs[1]['fingerprint']


def test_a_list_that_does_not_fit_the_validation_images_is_an_error(downloaded, capsys):
    flat, _, class_of = downloaded
    val = flat / 'ILSVRC' / 'Data' / 'CLS-LOC' / 'val'

    def error() -> str:
        with pytest.raises(DataError) as caught:
            read_val(flat)
        return str(caught.value)

    assert "no list of its classes is near; put Kaggle's LOC_val_solution.csv or" in error()
    write_lists(flat, class_of, 'kaggle')
    for name in ('b.JPEG', 'a.txt', '.hidden'):
        (val / name).touch()
    assert len(read_val(flat)) == len(class_of)
    assert 'val: left out 2 files not named ILSVRC2012_val_.., such as a.txt\n' in capsys.readouterr().err
    first = val / 'ILSVRC2012_val_00000001.JPEG'
    first.rename(val / 'ILSVRC2012_val_00000099.JPEG')
    assert '1 image of' in error()
    assert 'not listed, such as ILSVRC2012_val_00000099' in error()
    (val / 'ILSVRC2012_val_00000099.JPEG').rename(flat / 'away.JPEG')
    assert 'missing, such as ILSVRC2012_val_00000001' in error()
    (val / 'n00000001').mkdir()
    assert 'beside class folders such as n00000001: half sorted' in error()


# ------------------------------------------------------------------------------------------ --eval


def test_eval_prints_the_accuracy_of_a_weights_file(imagenet, tiny, complete, capfd):
    best = read_checkpoint(complete / 'weights' / 'tiny_imagenet.pt')
    history = runs.read_log(complete / 'checkpoints' / 'log.jsonl')
    files = {'weights/tiny_imagenet.pt': history[best['epoch'] - 1], 'checkpoints/latest.pt': history[-1]}
    for name, line in files.items():
        pretrain_imagenet.cli(['--data_dir', str(imagenet), '--eval', str(complete / name), '--amp', 'off'])
        out, err = capfd.readouterr()
        scores = f'accuracy {line["val_acc"]:.2f} %, cross-entropy {line["val_loss"]:.4f}'
        assert out == f'{complete / name}: tiny, 32 pixels: {scores} (9 images of 3 classes)\n'
        assert ('names no classes' in err) == (name == 'checkpoints/latest.pt')


def test_eval_of_two_processes_is_one_line_as_is_its_error(imagenet, tmp_path):
    model = models.build_model('test_convnext', 3, img_size=32)
    torch.save(dict(model='test_convnext', state_dict=model.state_dict()), tmp_path / 'weights.pt')
    argv = ('--eval', str(tmp_path / 'weights.pt'), '--img_size', '32', '--num_workers', '0', '--amp', 'off')
    codes, out, err = run_ranks(2, SCRIPT, '--data_dir', str(imagenet), *argv)
    assert not any(codes), err
    argv = ['--data_dir', str(imagenet), *argv]
    assert out == score(parse_args(argv)) + '\n'
    facts = dict(transform=eval_settings(32, resize='squash'), state_dict=model.state_dict())
    torch.save(dict(model='test_convnext', **facts), tmp_path / 'weights.pt')
    assert score(parse_args(argv)) + '\n' != out, 'it sees whole images'
    codes, out, err = run_ranks(2, SCRIPT, *argv, '--data_dir', str(tmp_path))
    assert [*codes, out, err.count('error: ')] == [1, 1, '', 1]


def test_eval_refuses_what_it_would_score_wrongly(imagenet, tmp_path, tiny, complete):
    best = read_checkpoint(complete / 'weights' / 'tiny_imagenet.pt')

    def error(changes: dict, *more: str) -> str:
        torch.save(best | changes, tmp_path / 'weights.pt')
        with pytest.raises(UserError) as caught:
            score(parse_args(['--data_dir', str(imagenet), '--eval', str(tmp_path / 'weights.pt'), *more]))
        return str(caught.value)

    assert 'its 3 classes are not the 3 of' in error(dict(classes=best['classes'][::-1]))
    state = {k: v for k, v in best['state_dict'].items() if k != 'stem.1.running_mean'}
    assert 'is not all of tiny' in error(dict(state_dict=state))
    assert 'stem.1.running_mean' in error(dict(state_dict=state))
    assert 'trains nothing: leave --epochs out' in error({}, '--epochs', '3')
    state = best['state_dict'] | {'fc.weight': torch.zeros(5, best['state_dict']['fc.weight'].shape[1])}
    assert 'is not of tiny with the 3 classes of val/' in error(dict(state_dict=state))


# ------------------------------------------------------------------------------------------ bad data, bad numbers


@pytest.mark.slow
def test_bad_images_are_named_counted_and_replaced(imagenet, tmp_path, tiny, capfd):
    root = shutil.copytree(imagenet, tmp_path / 'tree')
    broken = sorted((root / 'train' / 'n00000001').iterdir())[:3]
    for path in broken:
        os.truncate(path, 200)
    run(root, tmp_path / 'a', '--num_workers', '2')
    err = capfd.readouterr().err
    assert all(f'bad image, another one takes its place: {path}' in err for path in broken)
    assert err.count('bad image') == 3
    assert runs.read_log(tmp_path / 'a' / 'checkpoints' / 'log.jsonl')[-1]['bad_images'] == 3
    with pytest.raises(RunError, match='3 images cannot be read, more than --max_bad_images 2'):
        run(root, tmp_path / 'b', '--max_bad_images', '2')
    broken_val = next((root / 'val' / 'n00000001').iterdir())
    whole = broken_val.read_bytes()
    broken_val.write_bytes(b'')
    with pytest.raises(DataError, match='cannot be read as an image'):
        run(root, tmp_path / 'c')
    broken_val.write_bytes(whole)
    run(root, tmp_path / 'c', '--resume', 'auto')  # the training of the epoch is not lost
    assert 'resuming in epoch 1, after 9 steps' in capfd.readouterr().err
    assert outcome(tmp_path / 'c') == outcome(tmp_path / 'a'), 'whatever the number of workers'


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


def test_numbers_that_are_not_finite_stop_the_run_and_keep_the_last_good_checkpoint(
    imagenet, tmp_path, tiny, complete, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_imagenet, 'evaluate', lambda *_: (float('nan'), 1.0))
        with pytest.raises(Diverged, match=r'checkpoints: the validation loss is nan after epoch 1; .* lower --lr'):
            run(imagenet, tmp_path)
    real, calls = engine.mix, [0]

    def mix(images, *rest):
        calls[0] += 1
        images, targets = real(images, *rest)
        return images * (float('nan') if calls[0] == 4 else 1), targets

    with monkeypatch.context() as patch:
        patch.setattr(engine, 'mix', mix)
        with pytest.raises(Diverged, match='the gradients near step 17 were not finite'):
            run(imagenet, tmp_path, '--resume', 'auto')
    run(imagenet, tmp_path, '--resume', 'auto')
    assert outcome(tmp_path) == outcome(complete)


@pytest.mark.slow
def test_fp16_skips_the_steps_that_find_its_scale(imagenet, tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(registry.MODELS, 'tiny', TINY | dict(twist=dict(base_width=8)))  # gradients grow with the depth
    run(imagenet, tmp_path, '--amp', 'fp16', *ONE_EPOCH)
    line = runs.read_log(tmp_path / 'checkpoints' / 'log.jsonl')[0]
    assert 0 < line['dropped_steps'] < 5, 'a scale of 65536 overflows at first'
    assert np.isfinite([line['train_loss'], line['val_loss']]).all()
    with pytest.raises(Diverged, match='the gradients near step 8 were not finite'):
        run(imagenet, tmp_path / 'b', '--amp', 'fp16', *ONE_EPOCH, '--max_skipped', '1')


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ('more', 'words'),
    [
        ('--data_dir nowhere', 'nowhere/train: no such folder'),
        ('--batch_size 500', '--batch_size 500 must be'),
        ('--batch_size 1', '--batch_size 1 must be'),
        ('--model resnet19', "unknown model 'resnet19'"),
        ('--lr -1', '--lr -1.0 must be'),
        ('--lr 0.001 --min_lr 0.0009', '--min_lr 0.0009 must not exceed --lr 1.5625e-05'),
        ('--epochs 3 --warmup_epochs 3', '--epochs 3 must be greater than --warmup_epochs 3'),
        ('--accumulate 0', '--accumulate 0 must be from 1'),
        ('--max_skipped 0', '--max_skipped 0 must be from 1'),
        ('--ema_decay 2', '--ema_decay 2.0 must be from 0 to 1'),
        ('--drop_path 0.1', '--drop_path 0.1: tiny has no stochastic depth'),
        ('--opt adamm', '--opt adamm: no optimiser of timm'),
    ],
)
def test_bad_options_are_one_line(imagenet, tmp_path, tiny, capfd, more, words):
    with pytest.raises(SystemExit) as caught:
        pretrain_imagenet.cli(argv_of(imagenet, tmp_path, *more.split()))
    assert caught.value.code == 1
    captured = capfd.readouterr()
    assert captured.out == ''
    assert words in captured.err.splitlines()[-1]
    assert captured.err.splitlines()[-1].startswith('pretrain_imagenet.py: error: ')


def test_classes_of_train_and_val_must_agree(tmp_path, tiny):
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
