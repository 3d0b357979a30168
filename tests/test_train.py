"""The promises of train.py: the run folder, the same bits every time, exact counts, and errors of one line."""

import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from conftest import (
    FORKED_TORCHRUN,
    HOLD,
    ROOT,
    argv_of,
    finish,
    make_dtd,
    run,
    run_ranks,
    start,
    wait_for,
    write_image,
)
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor.exc import InvalidCxxCompiler

import summarize_runs
import train
from common import distributed, images, options, predictions, runs
from common.checkpoint import read_checkpoint
from common.errors import BUSY, DIVERGED, RunError
from common.timm_models import import_file
from compute_flops import measure
from datasets import load_splits
from interpret import trace
from models import build_model
from train import lr_at
from training import engine, trained
from training.loader import EvalBatches, ImageList, TrainBatches, eval_images, loader_processes, make_loader
from transforms import Preprocessing, normalize

# Of a complete run.
FILES = ['.lock', 'best.pt', 'config.json', 'log.jsonl', 'results.json', 'test_predictions.csv']
ONE_EPOCH = ('--epochs', '1', '--warmup_epochs', '0')
NET = """
from timm.models import register_model
from models import TwistNet

@register_model
def small_net(pretrained=False, num_classes=1000, **kwargs):
    net = TwistNet(num_classes=num_classes, base_width=16, layers=(1, 2), twist_stages=(2,))
    net.spare = net.fc.__class__(4, 4)  # a layer without use
    return net
"""


@pytest.fixture(scope='session')
def net(tmp_path_factory) -> tuple[str, ...]:
    """Options of a small model that processes of their own can build."""
    path = tmp_path_factory.mktemp('net') / 'small_net.py'
    path.write_text(NET)
    return '--import', str(path), '--model', 'small_net'


def outcome(folder: Path) -> tuple:
    """All that must be equal between two runs of one configuration: everything but the clock."""
    log = runs.read_log(folder / 'log.jsonl')
    for line in log:
        del line['seconds'], line['images_per_second']
    best = read_checkpoint(folder / 'best.pt')
    tensors = {name: tensor.numpy().tobytes() for name, tensor in best.pop('state_dict').items()}
    results = runs.read_json(folder / 'results.json')
    del results['seconds']
    return log, best, tensors, results, (folder / runs.PREDICTIONS).read_bytes()


def evaluate_on(folder: Path, items: list, name: str = 'tiny') -> tuple[float, float]:
    """Loss and accuracy of the best.pt of a run, in this process alone."""
    model, cpu = build_model(name, 3), torch.device('cpu')
    model.load_state_dict(read_checkpoint(folder / 'best.pt')['state_dict'])
    loader = make_loader(eval_images(items, Preprocessing(32), None), EvalBatches(len(items)), 0, cpu)
    return train.evaluate(model.to(memory_format=torch.channels_last), loader, cpu, 'off')


def mean_selection(folder: Path, items: list, name: str = 'tiny') -> dict[str, float]:
    """The mean of AIS's weights in every block of the best.pt of a run, as interpret/trace.py sees them."""
    model, data = build_model(name, 3), eval_images(items, Preprocessing(32), None)
    model.load_state_dict(read_checkpoint(folder / 'best.pt')['state_dict'])
    seen = trace.observe(model, normalize(torch.stack([data[i][0] for i in range(len(data))]))).blocks
    return {name: block.selection.mean().item() for name, block in seen.items()}


def best_line(folder: Path) -> dict:
    """The line of log.jsonl of the best epoch."""
    return runs.read_log(folder / 'log.jsonl')[runs.read_json(folder / 'results.json')['best_epoch'] - 1]


# ------------------------------------------------------------------------------------------ the run folder


def test_the_recipes_are_those_of_the_paper():
    default = dict(img_size=224, epochs=100, batch_size=32, lr=0.01, min_lr=1e-6, warmup_epochs=5, momentum=0.9)
    default |= dict(weight_decay=1e-4, label_smoothing=0.1, clip_grad=1.0, mixup=0.8, cutmix=1.0)
    default |= dict(randaug_n=2, randaug_m=9, crop_scale=[0.08, 1.0], hflip=0.5)
    scratch = dict(lr=0.05, min_lr=1e-5, epochs=200, batch_size=64, warmup_epochs=10, crop_scale=[0.2, 1.0])
    assert options.RECIPES['default'] == default
    assert options.RECIPES['scratch'] == default | scratch


def test_run_folder_is_as_promised(whole, tiny):
    folder, tree = whole, whole.parent / 'tree'
    assert folder.name == 'dtd_fold1_tiny_seed42'
    assert sorted(os.listdir(folder)) == FILES

    config, results = (runs.read_json(folder / name) for name in ('config.json', 'results.json'))
    parsed = vars(options.parse_args(argv_of(tree, folder.parent))) | dict(device='cpu')  # resolved
    assert config['options'] == {k: v for k, v in parsed.items() if k != 'force'}
    assert {'python', 'torch', 'torchvision', 'timm', 'device', 'commit', 'threads'} <= config['environment'].keys()

    log, splits = runs.read_log(folder / 'log.jsonl'), load_splits('dtd', str(tree), 1)
    assert [line['epoch'] for line in log] == [1, 2, 3]
    for line in log:
        assert {'lr', 'train_loss', 'val_loss', 'val_acc', 'seconds', 'images_per_second'} < line.keys()
        assert set(line['gates']) == set(line['selection']) == {'layer2.0', 'layer2.1'}
    assert mean_selection(folder, splits.val) == pytest.approx(best_line(folder)['selection'])
    assert [log[0]['lr'], log[-1]['lr']] == [0.01, pytest.approx(1e-6)], 'the warm-up ends with the first epoch'

    best_val = max(line['val_acc'] for line in log)
    expected = dict(
        dataset='dtd', fold=1, seed=42, model='tiny', n_train=24, n_val=12, n_test=12, pretrained=None,
        best_val_acc=best_val, best_epoch=max(line['epoch'] for line in log if line['val_acc'] == best_val),
        loaded=None, fingerprint=config['fingerprint'],
    )  # fmt: skip
    assert expected.items() <= results.items()
    assert {'test_acc', 'test_loss', 'test_acc_last', 'params_M', 'seconds'} < results.keys()
    size = measure('tiny', 3, 32)
    assert (results['params_M'], results['macs_G']) == (size['params_M'], size['macs_G'])

    found = predictions.read_predictions(folder / runs.PREDICTIONS)
    assert (found.classes, found.labels.tolist()) == (splits.classes, [label for _, label in splits.test])
    assert [str(tree / path) for path in found.paths] == [path for path, _ in splits.test]
    assert 100 * (found.predicted == found.labels).mean() == pytest.approx(results['test_acc'])
    truth = found.probabilities[range(len(found.labels)), found.labels]
    assert -np.log(truth).mean() == pytest.approx(results['test_loss'], rel=1e-5)
    best = read_checkpoint(folder / 'best.pt')
    facts = {'model', 'num_classes', 'classes', 'epoch', 'val_acc', 'state_dict', 'transform'}
    assert best.keys() - {'temperature'} == facts
    assert best.get('temperature') == results['temperature'], 'None, of so few images'
    assert (best['model'], best['num_classes'], best['classes']) == ('tiny', 3, ['class0', 'class1', 'class2'])
    assert (best['epoch'], best['val_acc']) == (results['best_epoch'], results['best_val_acc'])


def test_damaged_predictions_are_refused(tmp_path):
    path, values = tmp_path / runs.PREDICTIONS, np.array([[0.25, 0.75], [0.5, 0.5]], dtype=np.float32)
    with pytest.raises(RunError, match='missing'):
        predictions.read_predictions(path)
    predictions.write_predictions(path, [(f'{tmp_path}/a/1.png', 0), ('x,"y.png', 1)], ['a', 'b'], values, tmp_path)
    found, text = predictions.read_predictions(path), path.read_bytes()
    assert (found.paths, found.predicted.tolist()) == (['a/1.png', 'x,"y.png'], [1, 0])
    assert np.array_equal(found.probabilities, values)
    for damaged, words in (
        (text[: len(text) // 2].rsplit(b',', 1)[0], 'incomplete|damaged'),
        (text.replace(b'label', b'truth', 1), 'is no test_predictions.csv'),
        (text.replace(b'\na/1.png,a', b'\na/1.png,z'), 'damaged'),
    ):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=words):
            predictions.read_predictions(path)


def test_the_checkpoint_tested_is_the_later_of_the_best_and_test_is_read_once(tree, tmp_path, tiny, monkeypatch):
    fake_accuracies(monkeypatch, 75.0, 75.0, 25.0)
    read, real = [], train.evaluate
    monkeypatch.setattr(train, 'evaluate', lambda *args: read.append(args[1].dataset.items) or real(*args))
    folder, results = run(tree, tmp_path)
    assert (results['best_epoch'], results['best_val_acc']) == (2, 75.0)
    assert read_checkpoint(folder / 'best.pt')['epoch'] == 2
    splits = load_splits('dtd', tree, 1)
    assert read == [splits.val] * 3 + [splits.test] * 2, 'the last weights, and the chosen ones, after all training'


def test_the_temperature_is_fitted_to_the_validation_logits_of_the_chosen_epoch(tree, tmp_path, tiny, monkeypatch):
    fake_accuracies(monkeypatch, 75.0, 50.0, 25.0)
    folder, results = run(tree, tmp_path)
    assert results['best_epoch'] == 1
    data, labels = trained.load(folder / 'best.pt'), [label for _, label in load_splits('dtd', tree, 1).val]
    batch = data.batch(images.open_image(path) for path, _ in load_splits('dtd', tree, 1).val)
    with torch.no_grad():
        logits = data.model(batch)

    def loss(factor: float) -> float:
        return torch.nn.functional.cross_entropy(logits / (factor * data.temperature), torch.tensor(labels)).item()

    assert logits.argmax(1).tolist() != labels
    assert loss(1) < min(loss(0.97), loss(1.03))
    assert results['temperature'] == data.temperature


def test_where_the_last_epoch_is_the_best_it_is_tested_once_with_the_result_of_two_tests(tree, tmp_path, tiny):
    folder, results = run(tree, tmp_path, *ONE_EPOCH)
    assert results['test_acc_last'] == results['test_acc']
    found, data = predictions.read_predictions(folder / runs.PREDICTIONS), trained.load(folder / 'best.pt')
    with torch.no_grad():
        logits = data.model(data.batch(images.open_image(str(tree / path)) for path in found.paths))
    np.testing.assert_allclose(found.probabilities, logits.softmax(1), atol=1e-6)


def fake_accuracies(monkeypatch, *values: float) -> None:
    """Validation accuracies, one an epoch; those of the test set are computed."""
    accuracies, real = iter(values), train.evaluate

    def evaluate(model, loader, *rest):
        loss, accuracy = real(model, loader, *rest)
        return loss, next(accuracies, accuracy)

    monkeypatch.setattr(train, 'evaluate', evaluate)


def test_a_complete_run_is_left_alone_and_another_configuration_refused(whole, tmp_path, tiny, capfd):
    shutil.copytree(whole.parent, tmp_path / 'moved')  # how and where are no difference
    tree, runs_here, folder = tmp_path / 'moved' / 'tree', tmp_path / 'moved', tmp_path / 'moved' / whole.name
    (folder / 'last.pt').write_bytes(b'left by a kill between results.json and the end')
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != 'last.pt'}

    def refused(words: str, *more: str) -> None:
        with pytest.raises(RunError, match=rf'another configuration \({words}.*--force'):
            run(tree, runs_here, *more)

    _, again = run(tree, runs_here, '--num_workers', '1')
    assert again == runs.read_json(whole / 'results.json')
    assert 'is complete' in capfd.readouterr().err
    refused(r'lr 0.01 -> 0.02\)', '--lr', '0.02')
    image = next(tree.glob('images/*/*_0000.jpg'))
    pixels = image.read_bytes()
    write_image(image, 0, size=50)
    refused('split')
    image.write_bytes(pixels)
    write_image(tree / 'images' / 'class0' / 'new.jpg', 5)
    lists = tree / 'labels' / 'train1.txt'
    lists.write_text(f'{lists.read_text()}class0/new.jpg\n')
    refused('split')
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / 'config.json').unlink()
    refused('')
    run(tree, runs_here, '--lr', '0.02', '--force', *ONE_EPOCH)
    assert runs.read_json(folder / 'config.json')['options']['lr'] == 0.02


def test_weights_that_images_of_the_fold_trained_are_said_and_recorded(whole, tree, tmp_path, tiny, capsys):
    assert 'caution' not in runs.read_json(whole / 'results.json')
    best = whole / 'best.pt'
    for fold, count in ((1, '12 of 12 of val and 0 of 12 of test'), (2, '12 of 12 of val and 24 of 24 of test')):
        _, results = run(tree, tmp_path / 'tuned', *ONE_EPOCH, '--pretrained', str(best), '--fold', str(fold))
        said = f'note: {best}: images of this fold may have trained it ({count}); the results say so'
        assert said in capsys.readouterr().err
        assert results['seen'] == dict(val=12, test=24 * (fold == 2))
    summarize_runs.main(summarize_runs.get_args_parser().parse_args(['--run_dir', str(tmp_path / 'tuned')]))
    out = capsys.readouterr().out
    assert out.startswith('1 epoch, 32 px, from dtd_fold1_tiny_seed42/best.pt\n')
    assert 'Parameters loaded from dtd_fold1_tiny_seed42/best.pt: 100 %.' in out
    assert 'DTD: Tiny: images that validate or test may have trained the weights it started from.' in out


def test_what_is_missing_at_the_end_does_not_cost_the_run(tree, tmp_path, tiny, no_fvcore, monkeypatch, capsys):
    real = train.evaluate

    test = load_splits('dtd', tree, 1).test

    def evaluate(*args):
        loss, accuracy = real(*args)
        return math.nan if args[1].dataset.items == test else loss, accuracy

    monkeypatch.setattr(train, 'evaluate', evaluate)
    folder, results = run(tree, tmp_path, *ONE_EPOCH)
    assert runs.read_json(folder / 'results.json') == results
    assert (results['macs_G'], results['test_loss']) == (None, None)
    assert results['params_M'] > 0
    err = capsys.readouterr().err
    assert (err.count('fvcore is not installed'), err.count('note: the test loss is nan')) == (1, 1)


def test_patience_ends_a_run_early_on_the_schedule_of_all_its_epochs(tree, tmp_path, tiny, monkeypatch, capfd):
    def stop(*_):
        raise ZeroDivisionError

    more = ('--epochs', '6', '--patience', '2')
    with monkeypatch.context() as patch:
        fake_accuracies(patch, 50.0, 75.0, 25.0, 70.0)
        patch.setattr(train, 'finish', stop)
        with pytest.raises(ZeroDivisionError):
            run(tree, tmp_path, *more)
    folder, results = run(tree, tmp_path, *more)  # it has stopped already
    assert capfd.readouterr().err.count('stopped after epoch 4, --patience 2 after the best, 2; the learning rate') == 2
    assert (results['epochs_run'], results['best_epoch'], results['best_val_acc']) == (4, 2, 75.0)
    log, args = runs.read_log(folder / 'log.jsonl'), options.parse_args(argv_of(tree, tmp_path, *more))
    assert [line['lr'] for line in log] == [lr_at(3 * epoch - 1, args, 3) for epoch in (1, 2, 3, 4)]
    assert read_checkpoint(folder / 'best.pt')['epoch'] == 2


def test_train_and_val_together_train_and_the_last_epoch_is_tested(whole, tree, tmp_path, tiny, monkeypatch, capsys):
    read, real = set(), ImageList.__getitem__

    def get(self, key):
        if isinstance(key, tuple):
            read.add(self.items[key[-1]])
        return real(self, key)

    more, splits = ('--train_on', 'trainval', '--batch_size', '9'), load_splits('dtd', tree, 1)
    with monkeypatch.context() as patch:
        patch.setattr(ImageList, '__getitem__', get)
        folder, results = run(tree, tmp_path, *more)
    assert read == {*splits.train, *splits.val}
    assert 'is validated in this fold' not in capsys.readouterr().err
    log, best = runs.read_log(folder / 'log.jsonl'), read_checkpoint(folder / 'best.pt')
    assert not {'best_val_acc', 'val_acc', 'val_loss'} & {*results, *log[0], *log[-1]}
    assert (results['n_train'], results['n_val'], results['best_epoch'], best['epoch']) == (36, 0, 3, 3)
    assert results['test_acc'] == results['test_acc_last']
    assert results['temperature'] is None
    assert 'temperature' not in best
    capsys.readouterr()
    train.main(options.parse_args(argv_of(tree, tmp_path, *more)))
    assert '% (epoch 3, the last; trained on train and val)\n' in capsys.readouterr().out
    stop_after_one_epoch(monkeypatch, tree, tmp_path / 'cut', *more)
    assert outcome(run(tree, tmp_path / 'cut', *more)[0]) == outcome(folder)
    # Of one data set with runs on train alone, and in a table of its own.
    summarize_runs.main(summarize_runs.get_args_parser().parse_args(['--run_dir', str(tmp_path), str(whole.parent)]))
    tables = capsys.readouterr().out.split('\n\n')
    assert [text.count('Tiny ') for text in tables] == [1, 1]
    assert [', trained on train and val' in text.splitlines()[0] for text in tables].count(True) == 1
    assert sum('Trained on the images of train and val; the last epoch is tested.' in text for text in tables) == 1


def test_weights_that_diverge_in_the_last_step_without_validation_are_no_result(
    tree, tmp_path, tiny, monkeypatch, capfd
):
    real = train.train_images

    def odd_end(run, state, *rest):
        loss = real(run, state, *rest)
        with torch.no_grad():
            state.model.fc.weight.fill_(float('nan'))
        return loss

    monkeypatch.setattr(train, 'train_images', odd_end)
    argv = argv_of(tree, tmp_path, '--train_on', 'trainval', *ONE_EPOCH)
    assert 'the test loss is nan after the last epoch' in fails(argv, capfd, DIVERGED)
    assert not (tmp_path / 'dtd_fold1_tiny_seed42' / 'results.json').exists()


# ------------------------------------------------------------------------------------------ determinism


@pytest.mark.slow
def test_the_number_of_workers_does_not_matter(whole, tree, tmp_path, tiny):
    assert outcome(run(tree, tmp_path, '--num_workers', '2')[0]) == outcome(whole)


@pytest.mark.slow
def test_turned_erased_and_padded_images_depend_on_neither_workers_nor_interruptions(tree, tmp_path, tiny, monkeypatch):
    more = ('--vflip', '0.5', '--rotate', 'any', '--erase', '0.5', '--resize', 'pad')
    undisturbed, _ = run(tree, tmp_path / 'whole', *more)
    stop_after_one_epoch(monkeypatch, tree, tmp_path / 'cut', *more)
    assert outcome(run(tree, tmp_path / 'cut', *more, '--num_workers', '2')[0]) == outcome(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['none', 'ram', 'disk'])
def test_the_cache_does_not_matter_and_every_image_is_decoded_once(whole, tree, tmp_path, tiny, monkeypatch, kind):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))
    opened, real = [], images.open_image
    monkeypatch.setattr(images, 'open_image', lambda path, bits: opened.append(path) or real(path, bits))
    folder, _ = run(tree, tmp_path / 'a', '--cache', kind)
    assert outcome(folder) == outcome(whole)
    if kind == 'none':
        tests = 1 + (runs.read_json(folder / 'results.json')['best_epoch'] < 3)
        assert len(opened) == 3 * (24 + 12) + tests * 12  # three epochs, the last weights and the chosen ones
        return
    assert sorted(opened) == sorted(path for subset in load_splits('dtd', tree, 1)[:3] for path, _ in subset)
    opened.clear()
    other, _ = run(tree, tmp_path / 'b', '--cache', kind, '--seed', '43')
    assert opened == []
    assert outcome(other)[2] != outcome(whole)[2]


def test_loader_processes_start_with_the_loader_and_draw_nothing_yet(tree):
    items, device = load_splits('dtd', tree, 1).train, torch.device('cpu')
    images = ImageList(items, lambda image, key: key)
    batches = TrainBatches(len(items), 8, seed=1)
    before = set(multiprocessing.active_children())
    loader = make_loader(images, batches, 1, device)
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 1
    for epoch in (1, 2):
        batches.epoch = epoch
        seen = [[tuple(key) for key in torch.stack(keys, 1).tolist()] for keys, _ in loader]
        assert seen == list(batches)
    assert set(multiprocessing.active_children()) - before == started


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_ends_in_the_same_bits(tmp_path, net, one_thread):
    tree = make_dtd(tmp_path / 'tree', per_subset=(8, 8, 40))
    arguments = (*argv_of(tree, tmp_path / 'killed', *net), '--num_workers', '1')
    folder = tmp_path / 'killed' / 'dtd_fold1_small_net_seed42'

    def epochs():
        path = folder / 'log.jsonl'
        return len(path.read_text().splitlines()) if path.exists() else 0

    started = []

    def in_an_epoch():  # in the middle of training or of validation
        if epochs() >= 1 and not started:
            started.append(time.monotonic())
        return started and time.monotonic() > started[0] + 0.05

    # The first checkpoint is being written; in an epoch; between the last epoch and the results.
    for moment in (lambda: (folder / 'last.pt.tmp').exists(), in_an_epoch, lambda: epochs() >= 3):
        process = start('train.py', *arguments)
        while not moment():
            assert process.poll() is None, 'the moment to kill never came'
            time.sleep(0.0005)
        process.kill_group()  # its loaders too
        process.communicate()
        assert not (folder / 'results.json').exists()
    code, _, err = finish(start('train.py', *arguments))
    assert code == 0, err
    assert sorted(os.listdir(folder)) == FILES
    undisturbed, _ = run(tree, tmp_path / 'whole', *net)
    assert outcome(folder) == outcome(undisturbed)


@pytest.mark.slow
def test_signals_stop_cleanly_and_say_how_to_go_on(tree, tmp_path, net):
    arguments = (*argv_of(tree, tmp_path, *net), '--num_workers', '2', '--epochs', '400')
    process = start('train.py', *arguments)
    wait_for(tmp_path / 'dtd_fold1_small_net_seed42' / 'log.jsonl', process)
    os.killpg(process.pid, signal.SIGTERM)  # as a terminal and a scheduler do: to the loaders too
    returncode, out, err = finish(process)
    assert returncode == 143, err
    assert 'Traceback' not in err
    assert err.splitlines()[-1] == 'stopped; the same command resumes after the last whole epoch'
    assert out == ''


# ------------------------------------------------------------------------------------------ the machine


def set_all(monkeypatch, environment: str) -> None:
    for name, value in (pair.split('=') for pair in environment.split()):
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize('environment', ['WORLD_SIZE=4', 'WORLD_SIZE=four', 'WORLD_SIZE=4 MASTER_ADDR=here', 'RANK=3'])
def test_what_is_left_of_a_job_in_the_environment_does_not_count(monkeypatch, environment):
    set_all(monkeypatch, environment)
    distributed.setup('cpu', 1)
    assert distributed.process_rank() == (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('environment', 'words'),
    [
        ('RANK=1 WORLD_SIZE=2', 'RANK=1, WORLD_SIZE=2, MASTER_ADDR=None, MASTER_PORT=None: the processes do not meet'),
        ('RANK=0 WORLD_SIZE=2 MASTER_ADDR=here MASTER_PORT=x', 'MASTER_PORT=x: the processes do not meet'),
        ('RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=70000', 'MASTER_PORT=70000: the processes do not meet'),
    ],
)
def test_a_job_that_cannot_be_is_one_line_and_no_wait(tree, tmp_path, tiny, monkeypatch, capfd, environment, words):
    set_all(monkeypatch, environment)
    message = fails(argv_of(tree, tmp_path / 'runs', '--device', 'cpu'), capfd)
    assert words in message
    assert 'unset WORLD_SIZE' in message
    assert not (tmp_path / 'runs').exists()


def test_loader_processes_are_as_many_as_shared_memory_has_room_for(monkeypatch, capfd):
    def free(size):
        monkeypatch.setattr('training.loader.shutil.disk_usage', lambda _: types.SimpleNamespace(free=size))

    docker, image = 64 * 2**20, 3 * 224**2
    dtd = [(58, 32 * image), (30, 64 * image), (30, 64 * image)]  # training, validation and test of a fold
    free(2**33)
    assert loader_processes(4, dtd) == 4
    assert capfd.readouterr().err == ''
    free(docker)
    assert loader_processes(4, dtd) == 2
    assert '--num_workers 2 is taken (docker run --shm-size' in capfd.readouterr().err
    assert loader_processes(4, [(58, 16 * image)]) == 4
    assert loader_processes(4, [(2, 64 * image)]) == 4, 'there are no more than two batches'
    free(10 * 2**20)
    assert loader_processes(4, dtd) == 0
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')  # without a job around it
    free(docker)
    assert loader_processes(4, dtd) == 2


def test_a_missing_compiler_is_one_line(tree, tmp_path, tiny, monkeypatch, capfd):
    def train_epoch(*_):
        raise InvalidCxxCompiler

    monkeypatch.setattr(train, 'train_epoch', train_epoch)
    assert 'torch.compile needs a C++ compiler' in fails(argv_of(tree, tmp_path), capfd)


# ------------------------------------------------------------------------------------------ several processes


@pytest.mark.slow
def test_two_processes_train_resume_and_count_every_image_once(tmp_path, net, one_thread):
    tree = make_dtd(tmp_path / 'tree', per_subset=(8, 20, 47))  # 60 and 141 to evaluate: one batch, and two and a half
    codes, out, err = run_ranks(2, 'train.py', *argv_of(tree, tmp_path / 'a', *net))
    assert not any(codes), err
    assert len(out.splitlines()) == 1, out
    assert 'note: small_net: no gradient reaches spare.weight, spare.bias' in err
    folder, splits = tmp_path / 'a' / 'dtd_fold1_small_net_seed42', load_splits('dtd', tree, 1)
    results, line = runs.read_json(folder / 'results.json'), best_line(folder)
    assert runs.read_json(folder / 'config.json')['defines']['processes'] == 2
    assert (len(splits.val), len(splits.test)) == (60, 141)
    import_file(net[1])
    assert evaluate_on(folder, splits.test, 'small_net') == (results['test_loss'], results['test_acc'])
    assert evaluate_on(folder, splits.val, 'small_net') == (line['val_loss'], line['val_acc'])
    # The second process has no batch to validate, and takes part.
    assert mean_selection(folder, splits.val, 'small_net') == pytest.approx(line['selection'])

    again = argv_of(tree, tmp_path / 'b', *net)
    killed = tmp_path / 'b' / folder.name
    process = start(FORKED_TORCHRUN, '--standalone', '--nproc_per_node=2', ROOT / 'train.py', *again)
    wait_for(killed / 'log.jsonl', process)
    process.kill_group()  # torchrun and both of its processes
    process.communicate()
    assert not (killed / 'results.json').exists()
    codes, _, err = run_ranks(2, 'train.py', *again)
    assert not any(codes), err
    assert 'resuming after epoch' in err
    assert outcome(killed) == outcome(folder)


@pytest.mark.slow
def test_an_error_of_two_processes_is_said_once(tree, tmp_path, net):
    folder = tmp_path / 'runs' / 'dtd_fold1_small_net_seed42'
    folder.mkdir(parents=True)
    (folder / 'results.json').write_text('{')
    codes, out, err = run_ranks(2, 'train.py', *argv_of(tree, tmp_path / 'runs', *net))
    assert (codes, out, err.count('train.py: error: ')) == ([1, 1], '', 1)
    assert 'results.json: damaged' in err
    assert 'Traceback' not in err


@given(st.integers(1, 300), st.integers(1, 5), st.integers(1, 40))
def test_evaluation_batches_cover_every_image_once(length, world, batch_size):
    shares = [EvalBatches(length, rank, world, batch_size) for rank in range(world)]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(length))
    single = list(EvalBatches(length, batch_size=batch_size))
    for share in shares:
        assert len(list(share)) == len(share) == len(share.slots)
        assert [single[slot] for slot in share.slots] == list(share), 'batches must not depend on the world'


@given(st.integers(2, 200), st.integers(1, 4), st.integers(1, 8), st.integers(0, 2**32))
def test_training_batches_are_a_shuffle_shared_among_processes(length, world, per_rank, seed):
    batch_size = world * per_rank
    shares = [TrainBatches(length, batch_size, seed, rank, world) for rank in range(world)]
    for share in shares:
        share.epoch = 3
    batches = [list(share) for share in shares]
    assert all(len(b) == len(shares[0]) == length // batch_size for b in batches)
    keys = [key for share in batches for batch in share for key in batch]
    assert all(key[:2] == (seed, 3) for key in keys)
    assert len({key[2] for key in keys}) == len(keys) == length // batch_size * batch_size
    single = TrainBatches(length, batch_size, seed)
    single.epoch = 3
    for step, batch in enumerate(single):
        assert sorted(batch) == sorted(key for share in batches for key in share[step])


def test_the_order_changes_with_the_epoch_and_the_seed():
    def order(seed, epoch):
        batches = TrainBatches(64, 8, seed)
        batches.epoch = epoch
        return [i for batch in batches for *_, i in batch]

    assert order(1, 1) == order(1, 1)
    assert len({tuple(order(s, e)) for s in (1, 2) for e in (1, 2)}) == 4


# ------------------------------------------------------------------------------------------ recipe


@given(st.integers(0, 20), st.integers(2, 200))
def test_learning_rate(warmup, steps):
    args = types.SimpleNamespace(lr=0.1, min_lr=1e-6, warmup_epochs=warmup, epochs=warmup + steps)
    rates = [lr_at(step, args, 1) for step in range(args.epochs)]
    if warmup:
        assert rates[0] == pytest.approx(0.1 / warmup)
        assert rates[warmup - 1] == pytest.approx(0.1)
    assert rates[warmup] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(1e-6)
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :]))
    args = types.SimpleNamespace(lr=0.1, min_lr=0.0, warmup_epochs=warmup, epochs=warmup + 101)
    middle = lr_at(warmup + 50, args, 1)
    assert middle == pytest.approx(0.05)


@pytest.mark.parametrize(
    ('argv', 'expected', 'words'),
    [
        ('--epochs 3', dict(warmup_epochs=2), ['--warmup_epochs is 2, not its default 5, to fit --epochs 3']),
        ('--epochs 1', dict(warmup_epochs=0), ['--warmup_epochs is 0, not its default 5, to fit --epochs 1']),
        ('--epochs 6', dict(warmup_epochs=5), []),
        ('--epochs 8 --recipe scratch', dict(warmup_epochs=7), ['is 7, not its default 10, to fit --epochs 8']),
        ('--lr 1e-7', dict(min_lr=1e-7), ['--min_lr is 1e-07, not its default 1e-06, to fit --lr 1e-07']),
        ('', dict(warmup_epochs=5, min_lr=1e-6), []),
    ],
)
def test_a_default_makes_room_for_what_was_given_and_says_so(argv, expected, words):
    args = options.parse_args(['--dataset', 'dtd', '--data_dir', 'x', *argv.split()])
    options.check(args)
    assert expected.items() <= vars(args).items()
    notes = options.lowered_defaults(args, options.RECIPES[args.recipe])
    assert [word for word, note in zip(words, notes, strict=True) if word not in note] == []


@pytest.mark.parametrize(
    ('sizes', 'processes', 'expected'),
    [
        ((1000, 500, 500), 1, 32),
        ((24, 24, 24), 1, 24),
        ((1000, 500, 500), 3, 30),
        ((20, 20, 20), 3, 18),
        ((6, 2, 4), 1, 4),  # folds of one tree: they share a batch, and a table
        ((8, 2, 2), 1, 4),
    ],
)
def test_a_default_batch_shrinks_to_the_training_set_and_the_processes(sizes, processes, expected):
    args = options.parse_args(['--dataset', 'dtd'])
    options.check_batch(args, sizes[0], sum(sizes), processes)
    assert args.batch_size == expected
    notes = options.lowered_defaults(args, options.RECIPES[args.recipe])
    note = f'note: --batch_size is {expected}, not its default 32, to fit the training set and the number of processes'
    assert notes == [note] * (expected < 32)
    args = options.parse_args(['--dataset', 'dtd', '--batch_size', '32'])
    if expected < 32:
        with pytest.raises(RunError, match='--batch_size 32 must be'):
            options.check_batch(args, sizes[0], sum(sizes), processes)


@pytest.mark.parametrize('key', [*trees.MAKE, 'folder', 'own splits'])
def test_the_layout_of_a_folder_decides_what_data_set_it_is(tmp_path, key):
    if key in trees.MAKE:
        trees.MAKE[key](tmp_path, **trees.SMALL[key], empty=True)
        inner = tmp_path / trees.TOP[key]
        assert options.choose_dataset(None, inner) == options.choose_dataset(None, str(tmp_path)) == key
    else:
        for name in ('a/1.jpg', 'b/2.jpg') if key == 'folder' else ('train/a/1.jpg', 'val/a/2.jpg', 'test/a/3.jpg'):
            trees.put(tmp_path / name)
        assert options.choose_dataset(None, tmp_path) == 'folder'
    assert options.choose_dataset('dtd', tmp_path) == 'dtd', 'what is named is meant'


def test_photographs_are_never_passed_over_for_drawn_images(tree, tmp_path, tiny, capfd):
    """Without --dataset the folder trains, with the recipe of photographs and under its own name."""
    argv = ['--data_dir', str(tree / 'images'), '--model', 'tiny', '--run_dir', str(tmp_path), '--num_workers', '0']
    folder, results = train.train(options.parse_args([*argv, '--img_size', '32', '--epochs', '1']))
    assert folder.name == 'folder_fold1_tiny_seed42'
    assert results['n_train'] + results['n_val'] + results['n_test'] == 48
    config = runs.read_json(folder / 'config.json')
    assert config['options']['recipe'] == 'default'
    assert (config['defines']['batch_size'], config['defines']['warmup_epochs']) == (48 * 2 // 5, 0)
    err = capfd.readouterr().err
    assert f'folder in {tree}/images (by its layout; --dataset can name another)' in err
    assert (err.count('note: --batch_size'), err.count('note: --warmup_epochs is 0')) == (1, 1)
    train.cli([*argv, '--img_size', '32', '--epochs', '1'])
    assert 'is complete' in capfd.readouterr().err, 'the same command is the same configuration'
    message = fails([*argv, '--dataset', 'synthetic'], capfd)
    assert 'synthetic is drawn and would not read --data_dir' in message


def test_every_start_of_a_run_begins_with_a_line_that_says_what_it_does(tree, tmp_path, tiny, monkeypatch, capfd):
    for seed, name in ((0, 'w.pt'), (1, 'other.pt')):
        torch.manual_seed(seed)
        torch.save(build_model('tiny', 9).state_dict(), tmp_path / name)
    (tree / 'images' / 'class0' / 'notes.txt').touch()
    argv = ('--amp', 'bf16', '--epochs', '2', '--pretrained')
    stop_after_one_epoch(monkeypatch, tree, tmp_path, *argv, str(tmp_path / 'w.pt'))
    first = capfd.readouterr().err.splitlines()
    _, results = run(tree, tmp_path, *argv, str((tmp_path / 'w.pt').rename(tmp_path / 'moved.pt')))  # the same bytes
    again = capfd.readouterr().err.splitlines()
    expected = (
        f'dtd in {tree}, fold 1, images: 24 to train, 12 to validate, 12 to test; classes: 3; model: tiny, weights: '
        f'loaded 90 of 92 tensors (100% of the parameters) from {tmp_path}/w.pt; device: cpu, precision: bf16, '
        f'threads: {torch.get_num_threads()}'
    )
    assert expected in first[:2]  # models.py says in detail what it loads
    assert again[0] == expected
    for said in (first, again):
        assert sum('passed over' in line for line in said) == 1
    assert 0.9 < results['loaded'] < 1, 'a resumed run knows it too'
    assert (results['weights']['share'], results['weights']['gates']) == (results['loaded'], 2)
    with pytest.raises(RunError, match='pretrained'):
        run(tree, tmp_path, *argv, str(tmp_path / 'other.pt'))


def test_a_run_records_its_whole_tree_whatever_the_fold(tree, tmp_path, tiny):
    def described(fold: int) -> dict:
        args = options.parse_args(argv_of(tree, tmp_path, '--fold', str(fold)))
        return train.describe_run(args, load_splits('dtd', tree, fold), torch.device('cpu'))

    before = described(1)
    assert before['tree'] == described(2)['tree']
    assert 'tree' not in before['defines']
    write_image(tree / 'images' / 'class0' / 'new.jpg', 5)
    with open(tree / 'labels' / 'train2.txt', 'a') as file:
        file.write('class0/new.jpg\n')
    after = described(1)
    assert (after['fingerprint'], after['tree'] != before['tree']) == (before['fingerprint'], True)


@pytest.mark.parametrize(('feature', 'expected'), [('avx512_bf16', 'bf16'), ('avx512_f', 'off'), ('amx_bf16', 'bf16')])
def test_auto_is_bf16_where_the_processor_has_it(monkeypatch, feature, expected):
    capabilities = {'avx2': True, 'avx512_bf16': False, feature: True}
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: capabilities, raising=False)
    assert distributed.resolve_amp('auto', torch.device('cpu')) == expected
    assert distributed.resolve_amp('fp16', torch.device('cpu')) == 'fp16'


@pytest.mark.slow
def test_a_compiled_run_gives_a_plain_checkpoint(tree, tmp_path, tiny, monkeypatch):
    compiled = partialmethod(torch.nn.Module.compile, backend='eager')  # traced as ever; inductor takes minutes
    monkeypatch.setattr(torch.nn.Module, 'compile', compiled)
    folder, results = run(tree, tmp_path, '--compile', *ONE_EPOCH)
    assert list(read_checkpoint(folder / 'best.pt')['state_dict']) == list(build_model('tiny', 3).state_dict())
    loss, _ = evaluate_on(folder, load_splits('dtd', tree, 1).test)
    assert loss == pytest.approx(results['test_loss'], rel=1e-3)


# ------------------------------------------------------------------------------------------ bad input


def fails(argv: list[str], capfd, code: int = 1) -> str:
    """The one line that train.py ends with for a user's mistake."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        train.cli(argv)
    assert caught.value.code == code
    captured = capfd.readouterr()
    assert captured.out == ''
    assert 'Traceback' not in captured.err
    message = captured.err.splitlines()[-1]
    assert message.startswith('train.py: error: ')
    assert captured.err.count('error: ') == 1
    return message


@pytest.fixture(autouse=True)
def _keep_signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


BAD_OPTIONS = [
    ('--run_dir {tree}/labels/train1.txt', 'train1.txt/dtd_fold1_tiny_seed42: cannot be made'),
    ('--run_dir {tree}/labels/train1.txt --force', 'train1.txt/dtd_fold1_tiny_seed42: cannot be made'),
    ('--model resnet19', "unknown model 'resnet19'"),
    ('--dataset cifar', "unknown data set 'cifar'"),
    ('--fold 3', 'fold 3 of'),
    ('--data_dir nowhere', 'nowhere: no such folder'),
    ('--warmup_epochs 3', '--epochs 3 must be greater than --warmup_epochs 3'),
    ('--epochs 0', '--epochs 0 must be from 1 to'),
    (
        '--batch_size 25',
        '--batch_size 25 must be from 2 (two images a process, for BatchNorm) to the 24 training images',
    ),
    ('--img_size 16', '--img_size 16 must be from 32'),
    ('--model swin_tiny --img_size 33', '--img_size 33 must be a multiple of 32 for swin_tiny'),
    ('--lr nan', '--lr nan must be from'),
    ('--min_lr 1', '--min_lr 1.0 must not exceed --lr 0.01'),
    ('--crop_scale 1 0.1', '--crop_scale 1.0 0.1 must be two areas'),
    ('--randaug_m 31', '--randaug_m 31 must be from 0 to 30'),
    ('--erase 25', '--erase 25.0 must be from 0 to 1'),
    ('--vflip -1', '--vflip -1.0 must be from 0 to 1'),
    ('--num_workers -1', '--num_workers -1 must be from 0'),
    ('--device foo', "--device 'foo' must be auto, cpu, cuda or cuda:N"),
    ('--device cuda:7', '--device cuda:7: needs device 7'),
    ('--pretrained nowhere.pt', 'cannot read the weights'),
    ('--opt admw', 'that runs can use; there are adamw, '),
    ('--opt xyzzy', 'there are sgd, adamw, lion, lamb, ..'),
    ('--opt kron', '--opt kron: no optimiser of timm'),
    ('--opt fusedadam', '--opt fusedadam: no optimiser of timm'),
    ('--opt adamw --momentum 0.9', '--momentum 0.9: adamw has no such option'),
    ('--opt lion --momentum 0.9', '--momentum 0.9: lion has no such option'),
    ('--layer_decay 0', '--layer_decay 0.0 must be from 0.001 to 1'),
    ('--gate_lr -1', '--gate_lr -1.0 must be from 0 to'),
    ('--ema_decay 0.9', '--ema_decay 0.9 is of --ema, which is not given'),
    ('--ema --ema_decay 2', '--ema_decay 2.0 must be from 0 to 1'),
    ('--patience 0', '--patience 0 must be from 1'),
    ('--patience 2 --train_on trainval', '--patience 2 needs images of validation, and --train_on trainval has none'),
    (
        '--train_on trainval --dataset cub200 --fold 2',
        'all folds of cub200 train and test the same images; give fold 1',
    ),
]


@pytest.mark.parametrize(('extra', 'words'), BAD_OPTIONS, ids=[extra for extra, _ in BAD_OPTIONS])
def test_bad_options_are_one_line_and_leave_nothing(tree, tmp_path, tiny, capfd, extra, words):
    assert words in fails(argv_of(tree, tmp_path / 'runs', *extra.format(tree=tree).split()), capfd)
    assert not (tmp_path / 'runs').exists()


def test_a_run_that_another_process_makes_is_left_to_it(tree, tmp_path, tiny, capfd):
    folder = tmp_path / 'dtd_fold1_tiny_seed42'
    other = subprocess.Popen([sys.executable, '-c', HOLD, str(folder)], stdout=subprocess.PIPE, cwd=ROOT)
    other.stdout.readline()
    with pytest.raises(SystemExit) as caught:
        train.cli(argv_of(tree, tmp_path))
    assert caught.value.code == BUSY
    assert f'being made by another process (process {other.pid} on' in capfd.readouterr().err
    assert os.listdir(folder) == ['.lock']
    other.kill()
    other.communicate()


@pytest.mark.slow
def test_a_truncated_image_is_named_and_nothing_is_lost(whole, tree, tmp_path, tiny, capfd):
    path = tree / 'images' / 'class1' / 'class1_0013.jpg'  # a test image: it is read last
    pixels = path.read_bytes()
    path.write_bytes(pixels[: len(pixels) // 2])
    arguments = argv_of(tree, tmp_path, '--num_workers', '2')
    assert 'class1_0013.jpg: cannot be read as an image' in fails(arguments, capfd)
    path.write_bytes(pixels)
    train.cli(arguments)
    assert 'resuming after epoch 3' in capfd.readouterr().err
    folder = tmp_path / whole.name
    assert outcome(folder) == outcome(whole)
    trees = [runs.read_json(path / 'config.json')['tree'] for path in (folder, whole)]
    assert trees[0] == trees[1], 'the mended image does not part the run from its other folds'


def stop_after_one_epoch(monkeypatch, tree, run_dir, *more) -> Path:
    """A run that was cut in its second epoch."""
    real = train.train_epoch

    def train_epoch(run, state, loaders, epoch, bar):
        if epoch > 1:
            raise KeyboardInterrupt
        return real(run, state, loaders, epoch, bar)

    with monkeypatch.context() as patch:
        patch.setattr(train, 'train_epoch', train_epoch)
        with pytest.raises(KeyboardInterrupt):
            run(tree, run_dir, *more)
    return run_dir / 'dtd_fold1_tiny_seed42'


@pytest.mark.slow
def test_a_torn_last_checkpoint_starts_again_and_says_so(whole, tree, tmp_path, tiny, monkeypatch, capfd):
    folder = stop_after_one_epoch(monkeypatch, tree, tmp_path)
    last = folder / 'last.pt'
    last.write_bytes(last.read_bytes()[:-1000])
    run(tree, tmp_path)
    assert 'last.pt: damaged or not a PyTorch checkpoint; starting again from epoch 1' in capfd.readouterr().err
    assert outcome(folder) == outcome(whole)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_is_not_saved(whole, tree, tmp_path, tiny, monkeypatch, capfd):
    folder = stop_after_one_epoch(monkeypatch, tree, tmp_path)
    before = (folder / 'last.pt').read_bytes()
    mix, train_images = engine.mix, train.train_images

    def odd_mix(images, *rest):  # from the middle of the second epoch
        images, targets = mix(images, *rest)
        return images * float('nan') if rest[-1][2] >= 4 else images, targets

    def odd_end(run, state, *rest):  # the loss of the last step is finite; what the step makes of the weights is not
        loss = train_images(run, state, *rest)
        with torch.no_grad():
            state.model.fc.weight.fill_(float('nan'))
        return loss

    for place, name, odd, words in (
        (engine, 'mix', odd_mix, 'the training loss is nan within 3 steps of this epoch'),
        (train, 'reduce_sum', lambda own: own + math.nan, 'the training loss is nan'),  # in another process alone
        (train, 'train_images', odd_end, 'the validation loss is nan after epoch 2'),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, odd)
            assert words in fails(argv_of(tree, tmp_path), capfd, DIVERGED)
        assert (folder / 'last.pt').read_bytes() == before
    run(tree, tmp_path)
    assert 'resuming after epoch 1' in capfd.readouterr().err
    assert outcome(folder) == outcome(whole)


@pytest.mark.slow
def test_a_run_begun_by_older_code_is_resumed(whole, tree, tmp_path, tiny, monkeypatch):
    folder = stop_after_one_epoch(monkeypatch, tree, tmp_path)
    last = read_checkpoint(folder / 'last.pt')
    del last['run']['weights']  # the record of what was loaded
    torch.save(last, folder / 'last.pt')
    run(tree, tmp_path)
    assert outcome(folder) == outcome(whole)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['best.pt', 'results.json'])
def test_a_full_disk_loses_nothing(whole, tree, tmp_path, tiny, monkeypatch, capfd, name):
    folder = stop_after_one_epoch(monkeypatch, tree, tmp_path)
    (folder / f'{name}.tmp').symlink_to('/dev/full')  # every write to it fails with ENOSPC
    assert f'{name}: cannot be written (No space left on device)' in fails(argv_of(tree, tmp_path), capfd)
    train.cli(argv_of(tree, tmp_path))
    assert 'resuming after epoch' in capfd.readouterr().err
    assert outcome(folder) == outcome(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('killed_at', 'expected'), [('last.pt', (1, 40.0)), ('best.pt', (2, 60.0)), ('log.jsonl', (2, 60.0))]
)
def test_killed_between_its_checkpoints_and_resumed_elsewhere_it_tests_what_it_records(
    tree, tmp_path, tiny, monkeypatch, killed_at, expected
):
    real = runs.write_atomic

    def write_atomic(path, data):
        history = runs.read_log(folder / 'log.jsonl') if (folder / 'log.jsonl').exists() else []
        if path.name == killed_at and len(history) == 1:
            raise ZeroDivisionError  # nothing of ours catches it: as good as a kill
        real(path, data)

    folder = tmp_path / 'dtd_fold1_tiny_seed42'
    with monkeypatch.context() as patch:
        fake_accuracies(patch, 40.0, 60.0)  # the second epoch is the best one so far
        patch.setattr(runs, 'write_atomic', write_atomic)
        with pytest.raises(ZeroDivisionError):
            run(tree, tmp_path)
    # Elsewhere the last bits differ: were the second epoch made again, it would not be the best one.
    fake_accuracies(monkeypatch, 20.0, 20.0)
    _, results = run(tree, tmp_path)
    best = read_checkpoint(folder / 'best.pt')
    assert (best['epoch'], best['val_acc']) == (results['best_epoch'], results['best_val_acc']) == expected
    assert evaluate_on(folder, load_splits('dtd', tree, 1).test) == (results['test_loss'], results['test_acc'])


@pytest.mark.slow
def test_a_best_checkpoint_of_another_epoch_starts_again(whole, tree, tmp_path, tiny, monkeypatch, capfd):
    def train_epoch(run, state, loaders, epoch, bar):
        line, logits = real(run, state, loaders, epoch, bar) if epoch < 3 else 1 / 0
        return line | dict(val_acc=50.0 - epoch), logits

    real = train.train_epoch
    with monkeypatch.context() as patch:
        patch.setattr(train, 'train_epoch', train_epoch)
        with pytest.raises(ZeroDivisionError):
            run(tree, tmp_path)
    best = tmp_path / whole.name / 'best.pt'
    torch.save(read_checkpoint(best) | dict(epoch=2), best)  # as in a folder that was copied while the run was made
    folder, _ = run(tree, tmp_path)
    assert 'best.pt is missing or of another epoch than the best one; starting again' in capfd.readouterr().err
    assert outcome(folder) == outcome(whole)


def events_of(folder: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of every event in a folder, as written: a reader of TensorBoard would drop doubles."""
    loader = pytest.importorskip('tensorboard.backend.event_processing.event_file_loader').EventFileLoader
    found = [event for path in sorted(folder.glob(runs.EVENTS)) for event in loader(str(path)).Load()]
    return [(v.tag, event.step, v.tensor.float_val[0]) for event in found for v in event.summary.value]


@pytest.mark.slow
def test_tensorboard_shows_the_log_and_a_resumed_run_has_no_step_twice(whole, tree, tmp_path, tiny, monkeypatch, capfd):
    folder = stop_after_one_epoch(monkeypatch, tree, tmp_path, '--tensorboard')
    assert {step for _, step, _ in events_of(folder)} == {1}
    run(tree, tmp_path, '--tensorboard')
    assert outcome(folder) == outcome(whole), 'nor does it change a bit, or the fingerprint'
    log = runs.read_log(folder / 'log.jsonl')
    expected = [('val_acc', line['epoch'], line['val_acc']) for line in log]
    expected += [(f'gates/{name}', line['epoch'], gate) for line in log for name, gate in line['gates'].items()]
    written = [event for event in events_of(folder) if event[0] == 'val_acc' or event[0].startswith('gates/')]
    assert sorted(written) == [(tag, step, pytest.approx(value)) for tag, step, value in sorted(expected)]
    before = events_of(folder)
    for path in folder.glob(runs.EVENTS):
        path.unlink()
    run(tree, tmp_path, '--tensorboard')  # of a complete run
    assert events_of(folder) == before
    stop_after_one_epoch(monkeypatch, tree, tmp_path, '--force')
    assert events_of(folder) == []
    monkeypatch.setattr(options, 'find_spec', lambda name: None)
    words = '--tensorboard needs a package that is not installed: `pip install tensorboard`'
    assert words in fails(argv_of(tree, tmp_path / 'new', '--tensorboard'), capfd)
    assert not (tmp_path / 'new').exists()


def test_after_force_the_advice_is_not_to_force_again(tree, tmp_path, tiny, monkeypatch, capfd):
    def stop(*_):
        raise KeyboardInterrupt(signal.SIGINT)

    monkeypatch.setattr(train, 'train_epoch', stop)
    for more, words in ((['--force'], 'the same command without --force resumes'), ([], 'the same command resumes')):
        with pytest.raises(SystemExit) as caught:
            train.cli(argv_of(tree, tmp_path, *more))
        assert caught.value.code == 130
        assert words in capfd.readouterr().err


@pytest.mark.slow
def test_command_line_prints_one_result_and_leaves_progress_to_stderr(tree, tmp_path, net):
    code, out, err = finish(start('train.py', *argv_of(tree, tmp_path, *net)))
    assert code == 0, err
    assert len(out.splitlines()) == 1
    assert 'test accuracy' in out
    assert 'epoch 3/3' in err
    assert 'left' in err
    code, out, err = finish(start('train.py', '--no_such_option'))
    assert (code, out) == (2, '')
    assert err.count('unrecognized arguments: --no_such_option') == 1
