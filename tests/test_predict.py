"""The promises of predict.py: a run's own probabilities, nothing left out in silence, a line for each error."""

import csv
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, make_dtd, run, write_image
from cuda_stand_in import CudaStandIn
from PIL import Image

import models
import predict
from common import predictions, runs
from common.checkpoint import read_checkpoint
from common.drawing import plt, shorten
from common.errors import DataError, ModelError, RunError
from common.statistics import calibrate
from training import trained


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    """A trained run, its tree, and the absolute paths of its test images with what it predicted for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, 'tiny', TINY)
        root = tmp_path_factory.mktemp('predict')
        tree = make_dtd(root / 'tree')
        folder, _ = run(tree, root / 'runs', '--epochs', '1', '--warmup_epochs', '0')
        found = predictions.read_predictions(folder / runs.PREDICTIONS)
        plain, best = found, folder / 'best.pt'
        found = found._replace(probabilities=calibrate(found.probabilities, temperature_of(best)).astype(np.float32))
        paths = [str(tree / path) for path in found.paths]
        yield SimpleNamespace(tree=tree, best=best, paths=paths, found=found, plain=plain)


def temperature_of(best):
    return read_checkpoint(best).get('temperature')


@pytest.fixture(autouse=True)
def _small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(plt.rcParams, 'savefig.dpi', 40)


def main(done, *argv, workers='0', device='cpu'):
    given = [] if '--checkpoint' in argv else ['--checkpoint', done.best]
    predict.main(predict.parse_args([*map(str, [*given, *argv]), '--num_workers', workers, '--device', device]))


def rows(path='predictions.csv'):
    with open(path, newline='', errors='surrogateescape') as file:
        return list(csv.DictReader(file))


def probabilities(done):
    """(N, K) float32 from a table with all labels, in the order of the classes."""
    found = []
    for row in rows():
        said = {row['label']: row['probability']}
        said |= {row[f'label_{k}']: row[f'probability_{k}'] for k in range(2, len(done.found.classes) + 1)}
        found.append([float(said[name]) for name in done.found.classes])
    return np.array(found, dtype=np.float32)


# ------------------------------------------------------------------------------------------ probabilities


@pytest.mark.parametrize('workers', ['0', '1'])
def test_a_test_image_gets_the_probabilities_of_its_run(done, workers, capsys):
    main(done, '--images', *done.paths, workers=workers)
    table = rows()
    assert capsys.readouterr().out == 'predictions.csv\n'
    assert [row['path'] for row in table] == done.paths
    assert np.array_equal(probabilities(done), done.found.probabilities)  # to the bit
    for row in table:
        assert float(row['probability']) >= float(row['probability_2']) >= float(row['probability_3'])


def test_the_precision_is_that_of_the_run(done, monkeypatch):
    monkeypatch.setattr('training.trained.resolve_amp', lambda *_: 'bf16')  # what a new run would take
    main(done, '--images', *done.paths)
    assert np.array_equal(probabilities(done), done.found.probabilities)
    main(done, '--images', *done.paths, '--amp', 'bf16')
    assert not np.array_equal(probabilities(done), done.found.probabilities)


def test_a_fused_model_is_as_certain(done):
    main(done, '--images', *done.paths, '--fuse')
    fused = probabilities(done)
    assert not np.array_equal(fused, done.found.probabilities)
    np.testing.assert_allclose(fused, done.found.probabilities, atol=1e-5)


def test_a_device_gives_what_the_cpu_gives(done, monkeypatch, one_thread):
    main(done, '--images', *done.paths)
    expected = rows()
    with CudaStandIn(monkeypatch, 2) as cuda:
        main(done, '--images', *done.paths, '--amp', 'off', device='cuda:1')
    assert (rows(), cuda.current) == (expected, 1)
    assert cuda.seen['pinned'] > 0


def test_a_run_of_whole_images_is_predicted_as_it_was_tested(tmp_path, tiny):
    tree = make_dtd(tmp_path / 'tree')
    for path in tree.glob('images/*/*.jpg'):
        Image.open(path).resize((70, 40)).save(path)
    short = ('--epochs', '1', '--warmup_epochs', '0')
    crop, pad = (run(tree, tmp_path / way, *short, '--resize', way)[0] for way in ('crop', 'pad'))
    found = [predictions.read_predictions(folder / runs.PREDICTIONS) for folder in (crop, pad)]
    assert not np.array_equal(found[0].probabilities, found[1].probabilities)
    done = SimpleNamespace(best=pad / 'best.pt', found=found[1])
    main(done, '--images', *[str(tree / path) for path in found[1].paths])
    expected = calibrate(found[1].probabilities, temperature_of(done.best)).astype(np.float32)
    assert np.array_equal(probabilities(done), expected)
    plain, padded = (read_checkpoint(folder / 'best.pt')['transform'] for folder in (crop, pad))
    assert padded == plain | dict(resize='pad')
    assert 'resize' not in plain, 'the bytes of plain runs are those of older code'


def test_several_models_average_their_probabilities_at_their_own_sizes(done, tmp_path):
    other = read_checkpoint(done.best)
    other['transform'] = other['transform'] | dict(img_size=48)
    other['state_dict'] = {k: v * 1.5 if v.is_floating_point() else v for k, v in other['state_dict'].items()}
    torch.save(other, tmp_path / 'other.pt')
    found = []
    for models_of in ([done.best], ['other.pt'], [done.best, 'other.pt']):
        main(done, '--checkpoint', *models_of, '--images', *done.paths)
        found.append(probabilities(done))
    assert np.abs(found[0] - found[1]).max() > 1e-3
    assert np.allclose((found[0] + found[1]) / 2, found[2], atol=1e-6)


def test_each_of_several_models_has_its_own_temperature_and_an_older_one_none(done, capsys):
    assert np.abs(done.plain.probabilities - done.found.probabilities).max() > 0.01
    older, sharper = read_checkpoint(done.best), read_checkpoint(done.best)
    del older['temperature']
    sharper['temperature'] = 0.1
    torch.save(older, 'older.pt')
    torch.save(sharper, 'sharper.pt')
    main(done, '--checkpoint', 'older.pt', '--images', *done.paths, '--amp', 'off')
    assert np.array_equal(probabilities(done), done.plain.probabilities)
    assert 'note: older.pt: has no temperature, so its probabilities are not calibrated' in capsys.readouterr().err
    main(done, '--checkpoint', 'older.pt', 'sharper.pt', '--images', *done.paths, '--amp', 'off')
    expected = (done.plain.probabilities + calibrate(done.plain.probabilities, 0.1)) / 2
    assert np.allclose(probabilities(done), expected, atol=1e-6)
    assert 'sharper' not in capsys.readouterr().err


def test_what_is_less_certain_than_reject_gets_no_label(done, tmp_path, monkeypatch, capsys):
    certain = done.found.probabilities.max(1)
    limit = float(np.sort(certain)[4])  # which itself is kept
    (tmp_path / 'bad.jpg').write_bytes(b'no image')
    with pytest.raises(DataError, match='1 of 13 images left out'):
        main(done, '--images', 'bad.jpg', *done.paths, '--reject', repr(limit), '--sheet')
    labels = [done.found.classes[k] for k in done.found.probabilities.argmax(1)]
    table = rows()
    assert [row['label'] for row in table] == [name if p >= limit else '' for name, p in zip(labels, certain)]
    assert np.allclose([float(row['probability']) for row in table], certain, atol=1e-6)
    assert all(row['label_2'] for row in table)
    assert f'--reject {limit:g}: 4 of 12 without a label' in capsys.readouterr().err
    seen, real = [], predict.plot_label_map
    monkeypatch.setattr(predict, 'plot_label_map', lambda *args: seen.append(real(*args)) or seen[0])
    Image.open(done.paths[0]).save(tmp_path / 'scan.png')
    main(done, '--images', 'scan.png', '--tile', '20', '--reject', '1')
    assert [row['label'] for row in rows()] == [''] * 4
    assert [text.get_text() for text in seen[0].legends[0].get_texts()] == ['1 rejected, 100 %']


# ------------------------------------------------------------------------------------------ which images


def test_files_folders_and_globs(tmp_path, capsys):
    for name in ('a/1.png', 'a/deep/2.JPG', 'b/3.png', 'b/.hidden.png'):
        write_image(tmp_path / name, 1)
    (tmp_path / 'a' / 'notes.txt').write_text('x')
    found = predict.find_images(['a', 'b/*', './a/1.png', '**/*.JPG'])
    assert found == ['a/1.png', 'a/deep/2.JPG', 'b/3.png']
    assert 'a: without a suffix of images, left out (1 other file, such as a/notes.txt)' in capsys.readouterr().err
    assert predict.find_images(['a/notes.txt']) == ['a/notes.txt']  # it was named: whether it is one is seen later
    (tmp_path / 'c').mkdir()
    (tmp_path / 'c' / 'x.txt').touch()
    for given, words in (('c', r'no image found \(1 other file, such as c/x.txt\)'), ('d', 'no such file or folder')):
        with pytest.raises(DataError, match=f'--images {given}: {words}'):
            predict.find_images([given])


def test_a_damaged_image_is_named_and_the_rest_goes_on(done, tmp_path, capsys):
    (tmp_path / 'bad.jpg').write_bytes(b'no image')
    with pytest.raises(DataError, match=r'1 of 13 images left out; predictions\.csv has the others'):
        main(done, '--images', *done.paths[:5], 'bad.jpg', *done.paths[5:], 'bad.jpg', workers='1')
    assert 'left out: bad.jpg: cannot be read as an image (unknown format)' in capsys.readouterr().err
    assert [row['path'] for row in rows()] == done.paths
    assert np.allclose(probabilities(done), done.found.probabilities, atol=1e-6)  # of a batch of another size
    with pytest.raises(DataError, match='none of 1 image could be read; nothing is written'):
        main(done, '--images', 'bad.jpg', '--out', 'other.csv')
    assert not os.path.exists('other.csv')


# ------------------------------------------------------------------------------------------ deep images


def test_deep_images_are_scaled_as_a_set_or_as_told(done, tmp_path, capsys):
    ramp = np.linspace(0, 255, 40 * 40).reshape(40, 40)
    for name, top in (('dark', 900), ('light', 4000)):
        Image.fromarray((ramp * top / 255).astype(np.uint16)).save(tmp_path / f'{name}.png')
    main(done, '--images', 'dark.png', 'light.png')
    together = float(rows()[0]['probability'])
    assert 'scaled by 12 bits' in capsys.readouterr().err
    main(done, '--images', 'dark.png')
    assert abs(float(rows()[0]['probability']) - together) > 1e-4
    main(done, '--images', 'dark.png', '--bits', '12')
    assert float(rows()[0]['probability']) == pytest.approx(together, abs=1e-6)  # the batch is another one


def test_dark_test_images_of_twelve_bits_get_the_probabilities_of_their_run(tmp_path, tiny, capsys):
    ramp = np.linspace(20, 235, 32 * 32).reshape(32, 32).astype(np.uint16)
    for k, cls in enumerate('abc'):
        (tmp_path / 'set' / cls).mkdir(parents=True)
        for i in range(6):  # the first uses twelve bits
            Image.fromarray((ramp << 4) // (1 + 3 * i) + k).save(tmp_path / 'set' / cls / f'{i}.png')
    more = ['--epochs', '1', '--warmup_epochs', '0', '--batch_size', '4', '--dataset', 'folder', '--folds_total', '3']
    folder, _ = run(tmp_path / 'set', tmp_path / 'runs', *more)
    assert read_checkpoint(folder / 'best.pt')['transform']['bits'] == 12
    found = predictions.read_predictions(folder / runs.PREDICTIONS)
    calibrated = calibrate(found.probabilities, temperature_of(folder / 'best.pt'))
    dark = [i for i, path in enumerate(found.paths) if not path.endswith('0.png')]
    paths = [str(tmp_path / 'set' / found.paths[i]) for i in dark]
    capsys.readouterr()
    done = SimpleNamespace(best=folder / 'best.pt', found=found)
    main(done, '--images', *paths)
    assert np.abs(probabilities(done) - calibrated[dark]).max() < 1e-6
    assert 'scaled by' not in capsys.readouterr().err
    other = read_checkpoint(done.best)
    other['transform']['bits'] = 14
    torch.save(other, tmp_path / 'other.pt')
    with pytest.raises(RunError, match='trained on images of 12 and of 14 bits; --bits chooses'):
        main(done, '--checkpoint', done.best, 'other.pt', '--images', *paths)


# ------------------------------------------------------------------------------------------ pictures


def test_sheets_have_pages(done, monkeypatch, capsys):
    monkeypatch.setattr(predict, 'SHEET', (2, 3))
    seen, real = [], predict.plot_thumbnails
    monkeypatch.setattr(
        predict, 'plot_thumbnails', lambda title, panels, n: seen.append(panels) or real(title, panels, n)
    )
    main(done, '--images', *done.paths[:8], '--sheet', '--top_k', '1', '--out', 'out/p.csv')
    assert capsys.readouterr().out.split() == ['out/p.csv', 'out/p_sheet_1.png', 'out/p_sheet_2.png']
    assert [len(page) for page in seen] == [6, 2]
    first, row = seen[0][0][1], rows('out/p.csv')[0]
    assert first == [f'{row["label"]}  {100 * float(row["probability"]):.0f} %', os.path.basename(row['path'])]
    assert [*row] == ['path', 'label', 'probability']
    assert shorten('fabric_moderate_016_new.jpg', 11) == 'fabri\N{HORIZONTAL ELLIPSIS}w.jpg'


@pytest.mark.parametrize(
    ('length', 'tile', 'stride'), [(100, 32, 32), (100, 32, 10), (64, 32, 32), (32, 32, 7), (33, 32, 32)]
)
def test_tiles_cover_a_side(length, tile, stride):
    starts = predict.starts_of(length, tile, stride)
    covered = {x for start in starts for x in range(start, start + tile)}
    assert covered == {*range(length)}
    edges = predict.cell_edges(starts, tile, length)
    assert (edges[0], edges[-1], len(edges)) == (0, length, len(starts) + 1)
    assert (np.diff(edges) > 0).all()
    for start, low, high in zip(starts, edges, edges[1:]):
        assert low <= start + tile / 2 <= high


def test_a_tile_is_an_image_by_itself(done, tmp_path, capsys):
    write_image(tmp_path / 'scan.png', 5, size=70)
    write_image(tmp_path / 'small.png', 5, size=30)
    with pytest.raises(DataError, match='1 of 2 images left out'):
        main(done, '--images', 'scan.png', 'small.png', '--tile', '40', '--stride', '30')
    said = capsys.readouterr()
    assert 'left out: small.png: 30 x 30 pixels are less than --tile 40' in said.err
    assert said.out.split() == ['predictions_map_1.png', 'predictions.csv']
    tiles = rows()
    assert [(int(row['x']), int(row['y'])) for row in tiles] == [(0, 0), (30, 0), (0, 30), (30, 30)]
    for row in tiles:
        x, y = int(row['x']), int(row['y'])
        Image.open('scan.png').crop((x, y, x + 40, y + 40)).save(f'tile_{y:02d}_{x:02d}.png')
    main(done, '--images', 'tile_*.png', '--out', 'single.csv')
    assert [(row['label'], row['probability']) for row in rows('single.csv')] == [
        (row['label'], row['probability']) for row in tiles
    ]


def test_the_map_colours_each_cell_by_its_label():
    labels, scan = np.array([[0, 1], [1, 1]]), np.full((20, 40, 3), 255, np.uint8)
    edges = (np.array([0, 10, 20]), np.array([0, 30, 40]))
    figure = predict.plot_label_map(scan, labels, np.ones((2, 2)), edges, ['a', 'b'], 'title')
    cells = figure.axes[1].collections[0]
    assert np.array_equal(cells.get_coordinates()[1, 1], [30, 10])  # x, y
    colors = cells.get_array()
    assert np.array_equal(colors[0, 1], colors[1, 0])
    assert not np.allclose(colors[0, 0], colors[0, 1])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['1 b, 75 %', '2 a, 25 %']
    plt.close(figure)


# ------------------------------------------------------------------------------------------ errors and signals


@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        ('--stride 5', '--stride needs --tile'),
        ('--tile 40 --sheet', 'leave --sheet and --top_k out'),
        ('--tile 40 --stride 41', '--stride 41 must be from 1 to --tile 40'),
        ('--tile 4', '--tile 4 must be from 8'),
        ('--top_k 0', '--top_k 0 must be from 1'),
        ('--top_k 4', '--top_k 4 must be from 1 to the 3 classes'),
        ('--bits 3', '--bits 3 must be from 8 to 16'),
        ('--reject 80', '--reject 80.0 must be from 0 to 1'),
    ],
)
def test_options_that_do_not_fit(done, argv, words):
    with pytest.raises(RunError, match=words):
        main(done, '--images', done.paths[0], *argv.split())


def test_checkpoints_that_cannot_be_used(done):
    best = read_checkpoint(done.best)
    torch.save(best | dict(classes=['class0', 'class1', 'wood']), 'classes.pt')
    torch.save(best | dict(classes=best['classes'][::-1]), 'order.pt')
    torch.save(best['state_dict'], 'foreign.pt')
    nan = {k: v * float('nan') if v.is_floating_point() else v for k, v in best['state_dict'].items()}
    torch.save(best | dict(state_dict=nan), 'nan.pt')
    for name, kind, words in (
        ('foreign.pt', ModelError, 'foreign.pt: is no best.pt of train.py'),
        ('missing.pt', ModelError, 'missing.pt: no such checkpoint'),
        ('classes.pt', RunError, r'different classes \(3 and 3; not in both: class2, wood\)'),
        ('order.pt', RunError, r'different classes \(3 and 3; in another order\)'),
        ('nan.pt', RunError, 'gives probabilities that are not finite'),
    ):
        with pytest.raises(kind, match=words):
            main(done, '--checkpoint', done.best, name, '--images', done.paths[0])


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_when_it_is_stopped_it_writes_what_it_has(done, monkeypatch, capsys, number):
    real = trained.TrainedModel.probabilities

    def stopped(*args):
        os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(trained.TrainedModel, 'probabilities', stopped)
    Image.new('RGB', (128, 64)).save('scan.png')
    for more in (('--images', *done.paths, '--sheet'), ('--images', 'scan.png', '--tile', '32')):
        with pytest.raises(SystemExit) as caught:
            main(done, *more, '--batch_size', '2')
        assert caught.value.code == 128 + number
        assert len(rows()) == 2
        out, err = capsys.readouterr()
        assert out == 'predictions.csv\n'
        assert err.splitlines()[-1] == 'predict.py: stopped; predictions.csv has what was done'
