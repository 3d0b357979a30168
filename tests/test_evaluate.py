"""The promises of evaluate.py: scores as scikit-learn has them, nothing pooled that differs, a line for each error."""

import csv
import dataclasses
import io
import math
import os
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special as special
import sklearn.metrics as metrics
from conftest import TINY, make_dtd, make_run, run, write_image
from cuda_stand_in import CudaStandIn
from PIL import Image

import evaluate
import models
from common import predictions, runs, scores, statistics
from common.drawing import plot_confusion, plt
from common.errors import DataError, ModelError, RunError

CLASSES = ['a', 'b', 'c']


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    """A trained run and its tree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, 'tiny', TINY)
        root = tmp_path_factory.mktemp('evaluate')
        tree = make_dtd(root / 'tree')
        folder, results = run(tree, root / 'runs', '--epochs', '1', '--warmup_epochs', '0')
        yield SimpleNamespace(tree=tree, folder=folder, best=folder / 'best.pt', results=results)


@pytest.fixture(autouse=True)
def _small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(plt.rcParams, 'savefig.dpi', 40)
    monkeypatch.setattr(os, 'fsync', lambda _: None)


def write_run(run_dir, labels, predicted, confidence=0.9, classes=CLASSES, paths=None, values=None, **cell):
    """A run folder whose model predicted `predicted` for images of `labels`, both class indices."""
    if values is None:
        values = np.full((len(labels), len(classes)), (1 - confidence) / (len(classes) - 1), np.float32)
        values[range(len(labels)), predicted] = confidence  # NaN: none gives any
    accuracy = 100 * float(np.mean(np.array(labels) == predicted))
    folder = make_run(run_dir, test_acc=accuracy, n_test=len(labels), **cell)
    paths = paths or [f'{i}.png' for i in range(len(labels))]
    predictions.write_predictions(folder / runs.PREDICTIONS, list(zip(paths, labels)), classes, values, None, predicted)
    return folder


def show(capsys, *argv):
    """stdout and stderr."""
    evaluate.main(evaluate.parse_args([*map(str, argv), '--no-figures']))
    return capsys.readouterr()


def words(text):
    """With one space between words."""
    return ' '.join(text.split())


def table(capsys, *argv):
    return list(csv.DictReader(io.StringIO(show(capsys, *argv, '--csv').out)))


# ------------------------------------------------------------------------------------------ scores


def test_calibration_error_by_hand():
    confidence, right = np.array([0.9, 0.95, 0.6, 1.0]), np.array([True, False, True, True])
    # of 2 bins all are in the upper one, of 10 in four
    assert statistics.calibration_error(confidence, right, bins=2) == pytest.approx(abs(0.8625 - 0.75))
    assert statistics.calibration_error(np.array([0.5, 0.51]), np.array([True, False]), bins=2) == pytest.approx(0.505)
    expected = (abs(0.9 - 1) + abs(1.95 - 1) + abs(0.6 - 1)) / 4  # an upper edge belongs to its bin: 0.9 and 0.6
    assert statistics.calibration_error(confidence, right, bins=10) == pytest.approx(expected)
    assert statistics.calibration_error(np.float32([1 / 3]), np.array([True])) == pytest.approx(2 / 3, abs=1e-6)
    confidence = np.array([0.41, 0.46, 0.62, 0.68])  # of 15 bins the first two share one, of 10 the last two
    expected = (abs(0.87 - 1) + 0.62 + abs(0.68 - 1)) / 4
    right = np.array([True, False, False, True])
    assert statistics.calibration_error(confidence, right) == pytest.approx(expected), 'there are 15 if not given'


def test_the_temperature_is_that_which_made_the_logits_too_small():
    """Labels drawn from softmax(logits), then logits halved: they mean what they say at half the temperature."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(20_000, 6))
    labels = (special.softmax(logits, 1).cumsum(1) > rng.random((20_000, 1))).argmax(1)
    for scale in (0.5, 3.0):
        found = statistics.fit_temperature((scale * logits).astype(np.float32), labels)
        assert found == pytest.approx(scale, rel=0.03)
        right, values = logits.argmax(1) == labels, special.softmax(scale * logits, 1).astype(np.float32)
        before, after = (
            statistics.calibration_error(p.max(1), right) for p in (values, statistics.calibrate(values, found))
        )
        assert before > 0.15
        assert after < 0.01
        assert np.allclose(statistics.calibrate(values, found), special.softmax(scale * logits / found, 1), atol=1e-6)
    assert statistics.calibrate(values, None) is values


def test_validation_without_a_mistake_makes_no_certainty():
    logits = np.array([[3.0, 0, 0]] * 8, np.float32)
    temperature = statistics.fit_temperature(logits, np.zeros(8, int))
    assert special.softmax(logits / temperature, 1)[0, 0] == pytest.approx(9 / 10, abs=1e-4)


def test_validation_that_tells_nothing_gives_no_temperature():
    assert statistics.fit_temperature(np.array([[3.0, 0], [2.0, 0]], np.float32), np.array([0, 1])) is not None
    assert statistics.fit_temperature(np.array([[3.0, 0], [4.0, 0]], np.float32), np.array([0, 1])) is None


def calibrated_run(run_dir, temperature=0.5, count=40, classes=12, **cell):
    """A run with a temperature, and its labels and probabilities."""
    rng = np.random.default_rng(1)
    labels, values = rng.integers(0, classes, count), rng.dirichlet(np.ones(classes), count).astype(np.float32)
    values[range(0, count, 2), labels[::2]] += 1
    values /= values.sum(1, keepdims=True)
    names = [f'c{i}' for i in range(classes)]
    folder = write_run(run_dir, labels, values.argmax(1), classes=names, values=values, **cell)
    runs.write_json(folder / 'results.json', runs.read_json(folder / 'results.json') | dict(temperature=temperature))
    return folder, labels, values


def test_calibration_top_5_and_areas_are_those_of_scikit_learn(tmp_path, capsys):
    folder, labels, values = calibrated_run(tmp_path, count=90)
    labels[labels == 11] = 0  # a class without images
    paths = [f'{i}.png' for i in range(len(labels))]
    classes = [f'c{i}' for i in range(12)]
    predictions.write_predictions(folder / runs.PREDICTIONS, list(zip(paths, labels)), classes, values)
    right = values.argmax(1) == labels
    results = runs.read_json(folder / 'results.json') | dict(test_acc=100 * right.mean())
    runs.write_json(folder / 'results.json', results)
    first, *of_class = rows = table(capsys, '--run_dir', folder)
    before = 'run model dataset subset fold seed class n accuracy balanced_accuracy macro_f1 ece precision recall f1'
    assert [*first][:19] == [*before.split(), 'difference', 'low95', 'high95', 'p']
    at_t = special.softmax(np.log(values.astype(float)) / 0.5, 1)
    expected = 100 * statistics.calibration_error(at_t.max(1), right)
    assert float(first['ece_calibrated']) == pytest.approx(expected)
    assert abs(expected - float(first['ece'])) > 1
    top5 = metrics.top_k_accuracy_score(labels, values, k=5, labels=range(12))
    assert float(first['top5']) == pytest.approx(100 * top5)
    areas = [100 * metrics.roc_auc_score(labels == k, values[:, k]) for k in range(11)]
    assert [float(row['auc'] or 'nan') for row in of_class] == pytest.approx([*areas, np.nan], nan_ok=True)
    assert float(first['macro_auc']) == pytest.approx(np.mean(areas))
    counts = [(np.sum(labels == k), np.sum(right & (labels == k)), np.sum(values.argmax(1) == k)) for k in range(12)]
    assert [tuple(int(row[key]) for key in ('n', 'right', 'predicted')) for row in of_class] == counts
    assert (first['temperature'], rows[1]['temperature']) == ('0.5', '')
    out = words(show(capsys, '--run_dir', folder).out)
    assert f'ECE at T Top-5 Macro AUC ResNet-18 DTD 1 42 90 {expected:.1f} {100 * top5:.1f} {np.mean(areas):.1f}' in out


def test_of_ten_classes_there_is_no_top_5_and_an_older_run_has_no_temperature(tmp_path, capsys):
    folder, *_ = calibrated_run(tmp_path, None, classes=10)
    out = show(capsys, '--run_dir', folder).out
    assert 'Top-5' not in out
    assert ' at T' not in out
    assert 'temperature' not in out
    assert 'kept by probability, in %' in out


def test_the_share_that_is_kept_is_the_most_certain_at_the_temperature(tmp_path, capsys):
    folder, labels, values = calibrated_run(tmp_path, 0.3)
    at_t = special.softmax(np.log(values.astype(float)) / 0.3, 1)
    order = np.argsort(-at_t.max(1))
    assert not np.array_equal(order, np.argsort(-values.max(1))), 'one knows nothing of the temperature'
    right = (values.argmax(1) == labels)[order]
    first, *_ = table(capsys, '--run_dir', folder)
    for share, count in ((95, 38), (80, 32), (50, 20)):
        assert float(first[f'accuracy_kept_{share}']) == pytest.approx(100 * right[:count].mean())
        assert float(first[f'probability_kept_{share}']) == pytest.approx(100 * np.sort(at_t.max(1))[-count])
    out = words(show(capsys, '--run_dir', folder).out)
    assert 'kept by calibrated probability (temperature 0.30), in %' in out
    lowest = [float(first[f'probability_kept_{share}']) for share in (95, 80, 50)]
    down = [f'{math.floor(10 * value) / 10:.1f}' for value in lowest]  # so that --reject keeps them all
    assert down != [f'{value:.1f}' for value in lowest]
    for share, text in zip((95, 80, 50), down):
        assert f' {share} {float(first[f"accuracy_kept_{share}"]):.1f} {text}' in out
    axes = evaluate.draw_kept(group := [scores.read_evaluated(folder)]).axes[0]
    x, y = axes.lines[0].get_data()
    assert y[x == 80] == pytest.approx(100 * right[:32].mean())
    other, *_ = calibrated_run(tmp_path, 0.4, fold=2)
    shown = evaluate.draw_kept([*group, scores.read_evaluated(other)])
    assert len(shown.axes[0].lines) == 3
    assert 'temperature 0.30 to 0.40' in ' '.join(text.get_text() for text in shown.findobj(plt.Text))
    tied, *_ = table(capsys, '--run_dir', write_run(tmp_path, [0, 1, 2, 0], [0, 1, 1, 1], fold=3))
    assert float(tied['accuracy_kept_50']) == 50, 'of images as certain as one another none is left out'


def test_scores_are_those_of_scikit_learn(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    first, *classes = table(capsys, '--run_dir', write_run(tmp_path, labels, predicted))
    accuracy = metrics.accuracy_score(labels, predicted)
    f1 = metrics.f1_score(labels, predicted, average='macro')
    expected = accuracy, metrics.balanced_accuracy_score(labels, predicted), f1, abs(0.9 - accuracy)
    found = [float(first[key]) for key in ('accuracy', 'balanced_accuracy', 'macro_f1', 'ece')]
    assert found == pytest.approx([100 * value for value in expected], abs=1e-3)
    expected = np.array(metrics.precision_recall_fscore_support(labels, predicted)) * [[100], [100], [100], [1]]
    assert [row['class'] for row in classes] == CLASSES
    found = [[float(row[key]) for row in classes] for key in ('precision', 'recall', 'f1', 'n')]
    assert np.array(found) == pytest.approx(expected)


def test_a_model_without_probabilities_has_no_calibration_error(tmp_path, capsys):
    folder = write_run(tmp_path, [0, 1, 2], [0, 1, 1], confidence=np.nan, model='resnet18+knn')
    rows = list(csv.reader((folder / runs.PREDICTIONS).read_text().splitlines()))
    assert rows[3] == ['2.png', 'c', 'b', '', '', '']
    first, *_ = table(capsys, '--run_dir', folder)
    assert (first['ece'], round(float(first['accuracy']), 1)) == ('', 66.7)
    assert '3 66.7 66.7 55.6 -' in words(show(capsys, '--run_dir', folder).out)
    write_image(tmp_path / '2.png', 1)
    group = [scores.read_evaluated(folder, str(tmp_path))]
    assert 'kept' not in show(capsys, '--run_dir', folder).out
    with pytest.raises(DataError, match='there are no probabilities'):
        evaluate.draw_kept(group)
    shown = ' '.join(text.get_text() for text in evaluate.draw_mistakes(group).findobj(plt.Text))
    assert 'probability -' in shown
    assert 'nan' not in shown
    assert 'confident' not in shown


def test_what_cannot_be_divided_is_no_zero(tmp_path, capsys):
    """Class b is never predicted; c has no images, but a prediction, which is wrong."""
    first, a, b, c = table(capsys, '--run_dir', write_run(tmp_path, [0, 0, 1, 1], [0, 0, 0, 2]))
    assert (b['precision'], float(b['recall']), float(b['f1'])) == ('', 0, 0)
    assert (c['recall'], float(c['precision'])) == ('', 0)
    assert float(first['balanced_accuracy']) == pytest.approx(50)
    assert float(first['macro_f1']) == pytest.approx((float(a['f1']) + 0) / 2)
    text = words(show(capsys, '--run_dir', tmp_path).out)
    assert 'b 2 - 0.0 0.0 50.0 0 0 c 0 0.0 - 0.0 - 0 1' in text


def test_seeds_are_averaged_inside_a_fold_and_folds_have_a_deviation(tmp_path, capsys):
    truth = [0, 1, 2, 0]
    for fold, seed, predicted in ((1, 42, [0, 1, 2, 0]), (1, 43, [0, 1, 2, 1]), (2, 42, [0, 0, 0, 1])):
        write_run(tmp_path, truth, predicted, fold=fold, seed=seed)
    out = words(show(capsys, '--run_dir', tmp_path).out)
    folds = [87.5, 25.0]
    assert f'2 folds mean {np.mean(folds):.1f} ± {np.std(folds, ddof=1):.1f}' in out
    assert 'ResNet-18 on DTD, 2 folds, 3 runs' in out
    write_run(tmp_path, truth, truth, fold=3, lr=0.02)  # another recipe
    write_run(tmp_path, truth, truth, fold=3, model='twistnet18')
    out = words(show(capsys, '--run_dir', tmp_path).out)
    assert out.count('2 folds mean') == 2, 'in each of the two tables of runs'
    assert 'TwistNet-18 on DTD (lr 0.01), fold 3, seed 42' in out
    for fold, tree in enumerate('xy', start=1):  # other images
        write_run(tmp_path / 'trees', truth, truth, fold=fold, tree=tree)
    assert 'mean' not in show(capsys, '--run_dir', tmp_path / 'trees').out


def test_two_runs_on_the_same_images_are_compared(tmp_path, capsys):
    labels = [0, 1, 2] * 10
    before = np.array(labels)
    before[:10] = (before[:10] + 1) % 3
    after = np.array(labels)
    after[8:11] = (after[8:11] + 1) % 3
    one = write_run(tmp_path, labels, before)
    two = write_run(tmp_path, labels, after, model='twistnet18')
    test = statistics.mcnemar(before == labels, after == labels)
    out = show(capsys, '--run_dir', one, two).out
    assert 'McNemar: TwistNet-18 on DTD, fold 1, seed 42 against ResNet-18 on DTD, fold 1, seed 42: +23.3 points' in out
    assert f'p {test["p"]:.3f}; images gained: 8, lost: 1' in out
    found = [row for row in table(capsys, '--run_dir', one, two) if not row['class']]
    assert [float(found[1][key]) for key in ('difference', 'low95', 'high95', 'p')] == pytest.approx(
        [test[key] for key in ('value', 'low', 'high', 'p')]
    )
    other = write_run(tmp_path, labels, after, model='twistnet18', fold=2, paths=[f'x{i}.png' for i in range(30)])
    shown = show(capsys, '--run_dir', one, other)
    assert 'McNemar' not in shown.out
    assert 'not compared, because the two runs were not evaluated on the same images' in shown.err


def test_runs_that_differ_in_the_recipe_are_told_apart(tmp_path, capsys):
    labels, folders = [0, 1, 2] * 4, []
    for i, (epochs, more) in enumerate(((100, {}), (100, dict(train_on='trainval')), (50, {}))):
        folders.append(write_run(tmp_path / str(i), labels, labels, epochs=epochs))
        config = runs.read_json(folders[-1] / 'config.json')
        runs.write_json(folders[-1] / 'config.json', config | dict(defines=config['defines'] | more))
    plain, trainval, _ = folders
    out = words(show(capsys, '--run_dir', plain, trainval).out)
    assert 'ResNet-18 DTD 1 42 12' in out
    assert 'ResNet-18 DTD (train_on trainval) 1 42 12' in out
    assert 'ResNet-18 on DTD (train_on trainval), fold 1, seed 42 against ResNet-18 on DTD, fold 1' in out
    assert 'mean' not in out
    assert '(train_on trainval)' in show(capsys, '--run_dir', trainval).out, 'by itself too'
    assert [row['recipe'] for row in table(capsys, '--run_dir', *folders) if not row['class']] == [
        'epochs 100', 'epochs 100, train_on trainval', 'epochs 50'
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------ a checkpoint


def test_a_checkpoint_has_the_scores_of_its_run(done, capsys):
    of_run = table(capsys, '--run_dir', done.folder)
    assert float(of_run[0]['accuracy']) == done.results['test_acc']
    of_model = table(capsys, '--checkpoint', done.best, '--num_workers', '0')
    assert [{**row, 'run': ''} for row in of_model] == [{**row, 'run': ''} for row in of_run]


def test_a_checkpoint_on_a_device(done, capsys, monkeypatch, one_thread):
    argv = ('--checkpoint', done.best, '--num_workers', '0', '--amp', 'off')
    expected = table(capsys, *argv, '--device', 'cpu')
    with CudaStandIn(monkeypatch, 2) as cuda:
        assert table(capsys, *argv, '--device', 'cuda:1') == expected
    assert cuda.current == 1


def test_subsets_that_trained_are_refused_or_marked(done, capsys):
    argv = ('--checkpoint', done.best, '--num_workers', '0')
    shown = show(capsys, *argv, '--subset', 'val')
    assert 'Tiny on DTD val, fold 1' in shown.out
    assert 'images of validation chose its epoch' in shown.err
    for subset, count in (('train', 24), ('all', 48)):
        with pytest.raises(RunError, match=f'--subset {subset}: holds images that train'):
            show(capsys, *argv, '--subset', subset)
        shown = show(capsys, *argv, '--subset', subset, '--other_images')
        assert f'Tiny DTD {subset} 1 42 {count} ' in words(shown.out)
        assert 'images that may have trained the model' in shown.out
    with pytest.raises(RunError, match=r'--fold 2: .* was trained on fold 1'):
        show(capsys, *argv, '--fold', '2')


def test_images_of_validation_that_trained_are_no_subset_of_their_own(done, tmp_path, capsys, tiny):
    folder, results = run(done.tree, tmp_path, '--epochs', '1', '--warmup_epochs', '0', '--train_on', 'trainval')
    best = ('--checkpoint', folder / 'best.pt')
    with pytest.raises(RunError, match='--subset val: these images trained '):
        show(capsys, *best, '--subset', 'val')
    assert table(capsys, *best, '--subset', 'train', '--other_images')[0]['n'] == '36'
    for argv in (best, ('--run_dir', folder)):
        assert float(table(capsys, *argv)[0]['accuracy']) == pytest.approx(results['test_acc'])


@pytest.mark.parametrize('as_list', [False, True])
def test_a_few_photographs_of_a_new_place_are_scored(done, tmp_path, capsys, as_list):
    """Two images of one class, one of another and none of the third; a list may call all of them test."""
    names = ['class0/0.png', 'class0/1.png', 'class2/0.png']
    for seed, name in enumerate(names):
        write_image(tmp_path / 'new' / name, seed)
    (tmp_path / 'my.csv').write_text('path,label,subset\n' + ''.join(f'{n},{n[:6]},test\n' for n in names))
    argv = ['--checkpoint', done.best, '--data_dir', 'new', '--other_images', '--num_workers', '0']
    argv += ['--dataset', 'lists', '--lists', 'my.csv'] if as_list else ['--dataset', 'folder', '--subset', 'all']
    shown = show(capsys, *argv)
    assert ' 1 42 3 ' in words(shown.out)
    assert "has no image of class 'class1' of the model" in shown.err
    assert [row['n'] for row in table(capsys, *argv)] == ['3', '2', '0', '1']
    (tmp_path / 'new' / 'class0' / '0.png').write_bytes(b'x')
    with pytest.raises(DataError, match='1 image of 3 cannot be read, so no score is of the set'):
        show(capsys, *argv)
    if not as_list:
        shutil.move(tmp_path / 'new' / 'class0', tmp_path / 'new' / 'wood')
        with pytest.raises(DataError, match="new: 'wood' is no class of the model"):
            show(capsys, *argv)


# ------------------------------------------------------------------------------------------ figures and formats


def test_figures_of_a_run(tmp_path, capsys):
    def draw(folder, *argv):
        evaluate.main(evaluate.parse_args(['--run_dir', str(folder), *argv]))
        return capsys.readouterr()

    folder = write_run(tmp_path, [0, 1, 2], [1, 1, 2])
    assert 'not drawn: mistakes: 0.png: cannot be read as an image' in draw(folder).err
    write_image(tmp_path / 'photos' / '0.png', 1)
    shown = draw(folder, '--data_dir', 'photos', '--save_dir', 'out')
    names = ['confusion.pdf', 'confusion.png', 'kept.pdf', 'kept.png', 'mistakes.pdf', 'mistakes.png']
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == names
    assert all(f'out/{name}' in shown.err for name in names)
    assert 'out/' not in shown.out
    right = write_run(tmp_path, [0, 1, 2], [0, 1, 2], fold=2)
    assert 'not drawn: mistakes: there is no mistake' in draw(right).err


def test_the_most_confident_mistakes_come_first_and_once(tmp_path):
    folders = [
        write_run(tmp_path, [0, 1, 2, 2], [1, 1, 0, 2], confidence=0.7, seed=42),
        write_run(tmp_path, [0, 1, 2, 2], [2, 1, 2, 1], confidence=0.8, seed=43),
    ]
    group = [scores.read_evaluated(folder, 'root') for folder in folders]
    found = scores.mistakes(group)
    assert [(path, truth, predicted) for path, truth, predicted, _ in found] == [
        ('root/0.png', 'a', 'c'), ('root/3.png', 'c', 'b'), ('root/2.png', 'c', 'a')
    ]  # fmt: skip
    assert [p for *_, p in found] == pytest.approx([0.8, 0.8, 0.7])
    group = [
        dataclasses.replace(group[0], temperature=0.5),
        group[1],
    ]  # at which 0.7 of three classes is 0.49 / (0.49 + 2 * 0.15 ** 2)
    assert [p for *_, p in scores.mistakes(group)] == pytest.approx([0.49 / 0.535, 0.49 / 0.535, 0.8])
    assert sum(one.confusion for one in group).tolist() == [[0, 1, 1], [0, 2, 0], [1, 1, 2]]


def test_mistakes_of_more_than_eight_bits_are_as_bright_as_one_another(tmp_path, monkeypatch):
    for i, value in enumerate((4000, 500)):
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / f'{i}.png')
    seen = []
    monkeypatch.setattr(evaluate, 'thumbnail', lambda image: seen.append(image.getpixel((0, 0))[0]))
    monkeypatch.setattr(evaluate, 'plot_thumbnails', lambda *_, **__: None)
    evaluate.draw_mistakes([scores.read_evaluated(write_run(tmp_path, [0, 1], [1, 0]), str(tmp_path))])
    assert seen == [4000 >> 4, 500 >> 4]


@pytest.mark.parametrize('classes', [2, 10, pytest.param(102, marks=pytest.mark.slow)])
def test_a_confusion_matrix_is_readable(classes):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 2, (classes, classes)) + 50 * np.eye(classes, dtype=int)
    names = [f'class number {i}' for i in range(classes)]
    figure = plot_confusion(counts, names, 'title')
    figure.canvas.draw()
    axes = figure.axes[0]
    for axis, wanted in ((axes.xaxis, names), (axes.yaxis, [f'{n} ({c})' for n, c in zip(names, counts.sum(1))])):
        labels = axis.get_majorticklabels()[:classes]  # those above, of a large one, follow
        assert [label.get_text() for label in labels] == wanted
        assert all(label.get_fontsize() >= 6.5 for label in labels)
        boxes = [label.get_window_extent() for label in labels]
        side = 0 if axis is axes.xaxis else 1
        middles = sorted((box.min[side] + box.max[side]) / 2 for box in boxes)
        widths = [box.max[side] - box.min[side] for box in boxes]
        assert min(np.diff(middles)) >= 0.95 * max(widths)  # no name touches the next
    numbers = [text.get_text() for text in axes.texts if text.get_text()]
    assert len(numbers) == ((counts > 0).sum() if classes <= 10 else 0)
    width, height = figure.get_size_inches()
    assert (width > 12 and height > 12) if classes == 102 else (width < 8 and height < 8)
    plt.close(figure)


def test_latex_is_split_and_escaped(tmp_path, capsys):
    names = [f'under_score {i}' for i in range(60)]
    out = show(capsys, '--run_dir', write_run(tmp_path, range(60), [0] * 60, classes=names), '--latex').out
    assert out.count(r'\begin{table}') == 5
    assert r'under\_score 59 & 1 & - &' in out
    assert '_' not in out.replace(r'\_', '')


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('pdflatex'), reason='needs pdflatex')
def test_latex_compiles(tmp_path, capsys):
    labels = list(range(60)) * 2
    names = [f'[cl&ss_{i}] >100 % | <' for i in range(60)]
    folders = [write_run(tmp_path, labels, [0] * 120, classes=names, model=m) for m in ('resnet18', 'twistnet18')]
    config = runs.read_json(folders[1] / 'config.json')
    runs.write_json(folders[1] / 'config.json', config | dict(defines=config['defines'] | dict(train_on='trainval')))
    text = show(capsys, '--run_dir', *folders, '--latex').out
    page = r'\documentclass{article}\usepackage{booktabs}\begin{document}' + text + r'\end{document}'
    (tmp_path / 'page.tex').write_text(page)
    command = ['pdflatex', '-interaction=nonstopmode', '-halt-on-error', 'page.tex']
    log = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors='replace')
    assert log.returncode == 0, log.stdout[-2000:]
    assert 'too large' not in log.stdout
    assert 'Overfull' not in log.stdout


# ------------------------------------------------------------------------------------------ errors


def test_options_that_do_not_fit(capsys):
    for argv, message in (
        (['--run_dir', 'x', '--fold', '1'], '--fold needs --checkpoint'),
        (['--run_dir', 'x', '--subset', 'val'], '--subset needs --checkpoint'),
        (['--checkpoint', 'x', '--batch_size', '0'], '--batch_size 0 must be from 1'),
    ):
        with pytest.raises(RunError, match=message):
            evaluate.parse_args(argv)
    with pytest.raises(SystemExit):
        evaluate.parse_args([])
    assert 'one of the arguments --run_dir --checkpoint is required' in capsys.readouterr().err


def test_runs_that_cannot_be_used(tmp_path, capsys):
    top = tmp_path / 'runs'
    good = write_run(top, [0, 1, 2], [0, 1, 1])
    part, old = make_run(top, fold=2, complete=False), make_run(top, fold=3)
    other, more, torn, broken = (write_run(top, [0, 1, 2], [0, 1, 2], fold=fold) for fold in range(4, 8))
    shutil.copy(write_run(tmp_path / 'wrong', [0, 1, 2], [1, 2, 0]) / runs.PREDICTIONS, other)
    results = runs.read_json(more / 'results.json')
    runs.write_json(more / 'results.json', results | dict(n_test=4))
    (torn / runs.PREDICTIONS).write_text('path,label\n')
    (broken / 'config.json').write_text('{')
    refused = (
        (part, 'not complete; the command that began it finishes it'),
        (old, r'test_predictions.csv: missing'),
        (other, r'is not of this run, whose results.json says 100.00 %'),
        (more, 'is not of this run'),
        (torn, r'test_predictions.csv: is no test_predictions.csv with images'),
        (broken, 'config.json: damaged'),
        (tmp_path / 'none', 'none: is no run folder of train.py'),
    )
    for folder, message in refused:
        with pytest.raises(RunError, match=message):
            show(capsys, '--run_dir', folder)
    shutil.copytree(good, tmp_path / 'copy' / good.name)
    shown = show(capsys, '--run_dir', top, tmp_path / 'copy')  # a folder: the others are named
    assert shown.err.count('left out: ') == len(refused) - 1
    assert 'counted once, made twice' in shown.err
    assert 'ResNet-18 on DTD, fold 1, seed 42' in shown.out
    shutil.rmtree(good)
    with pytest.raises(RunError, match='no run in it can be evaluated'):
        show(capsys, '--run_dir', top)


def test_a_foreign_checkpoint_is_a_line(tmp_path, capsys):
    (tmp_path / 'x.pt').write_bytes(b'no checkpoint')
    with pytest.raises(ModelError, match=r'x\.pt: damaged or not a PyTorch checkpoint'):
        show(capsys, '--checkpoint', 'x.pt')


# ------------------------------------------------------------------------------------------ data of one's own


def test_checkpoints_of_two_sets_of_the_same_classes_are_not_pooled(tmp_path, tiny, capsys):
    short = ('--epochs', '1', '--warmup_epochs', '0')
    best = []
    for fold, name in enumerate(('wood', 'stone'), start=1):
        tree = make_dtd(tmp_path / name)
        best.append(run(tree, tmp_path / 'runs', *short, '--name', name, '--fold', str(fold))[0] / 'best.pt')
    rows = words(show(capsys, '--checkpoint', *best).out)
    assert 'mean' not in rows
    assert '| wood |' in rows or ' wood ' in rows
    assert ' stone ' in rows


def test_mistakes_of_a_list_are_found_beside_it(tmp_path):
    folder = write_run(tmp_path / 'runs', [0, 1, 2], [0, 1, 1], paths=['a.png', 'b.png', 'c.png'])
    config = runs.read_json(folder / 'config.json')
    config['options'] |= dict(lists=str(tmp_path / 'photographs' / 'my.csv'), data_dir=None)
    runs.write_json(folder / 'config.json', config)
    (one,) = scores.read_all([folder])
    assert scores.mistakes([one])[0][0] == str(tmp_path / 'photographs' / 'c.png')


def test_another_preprocessing_or_file_of_import_is_another_group():
    defines = dict(dataset='folder', model='my_net', fold=1, seed=1, split='x', pretrained=None)
    keys = [
        scores.group_key(dict(defines=defines | more), CLASSES)
        for more in ({}, dict(imported='aa'), dict(imported='bb'), dict(preprocessing=dict(crop_ratio=1.0)))
    ]
    assert len(set(keys)) == 4
