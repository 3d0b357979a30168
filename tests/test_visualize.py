"""The promises of visualize.py: figures show what the network computes, and find known directions."""

import argparse
import json
import subprocess
import sys
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT, make_dtd, run, write_image
from matplotlib.collections import QuadMesh
from PIL import Image

import assets.architecture as architecture
import models
import plot_results
import visualize
from common import drawing
from common.errors import ModelError, RunError, UserError
from common.splits import split_digest
from datasets import load_splits
from interpret import cam, class_views, image_views, trace, twist_views
from training import trained
from training.trained import TrainedModel
from transforms import Preprocessing, eval_settings, eval_view, view_box

ANGLES = (0, 45, 90, 135)  # of heads 1 to 4: the convention of synthetic.py's classes
TINY = dict(base_width=8)


@pytest.fixture(autouse=True)
def _light(monkeypatch):
    monkeypatch.setitem(plt.rcParams, 'savefig.dpi', 50)
    monkeypatch.setitem(models.MODELS, 'tiny', dict(label='Tiny', twist=TINY))
    yield
    plt.close('all')


def tiny(seed: int = 0, classes: int = 3, **more) -> TrainedModel:
    torch.manual_seed(seed)
    model = models.TwistNet(num_classes=classes, **TINY, **more).eval()
    names = [f'class{i}' for i in range(classes)]
    return TrainedModel(Path('best.pt'), 'tiny', model, names, 3, 50.0, Preprocessing(64))


def write_checkpoint(path: Path, name: str = 'tiny', classes: int = 3) -> Path:
    model = models.build_model(name, classes, img_size=64)
    facts = dict(model=name, num_classes=classes, classes=[f'class{i}' for i in range(classes)], epoch=3, val_acc=50.0)
    torch.save(facts | dict(state_dict=model.state_dict(), transform=eval_settings(64)), path)
    return path


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_checkpoint(tmp_path / 'best.pt')


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 90, 3), np.uint8))


def arguments(*argv) -> argparse.Namespace:
    return visualize.get_args_parser().parse_args([str(word) for word in argv])


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(plt.Text) if text.get_text()]


def heat_map(figure) -> plt.Axes:
    """The axes that a table in colours fills; its cells are those of collections[0]."""
    return next(axes for axes in figure.axes if axes.collections and isinstance(axes.collections[0], QuadMesh))


def survey_of(labels, features: np.ndarray | None = None, products: np.ndarray | None = None):
    """A Survey of one block with two heads of 2 + 3 channels."""
    rng, n = np.random.default_rng(0), len(labels)
    return class_views.Survey(
        of='images',
        labels=np.array(labels),
        features=rng.standard_normal((n, 6)) if features is None else features,
        accuracy=50.0,
        selection={'layer3.0': rng.random((n, 2, 5))},
        c_red=2,
        products=rng.random((n, 2, 3)) if products is None else products,
    )


# ---------------------------------------------------------------------------------------------- known directions


# The twist prefers its direction as soon as it is made, so the networks below are untrained: they show the twist, not
# learning. Random channels make one network noisy, the mean of several is not.
def test_stage_3_prefers_its_directions_in_streaks_as_wide_as_its_cells(monkeypatch):
    monkeypatch.setattr(twist_views, 'TEXTURES', 1)
    subjects = [tiny(seed, layers=(1, 1, 1), twist_stages=(3,)) for seed in range(6)]
    found = [twist_views.direction_responses(subject, [*ANGLES])['layer3.0'] for subject in subjects]
    mean = torch.stack(found).mean((0, 1))  # (angles, heads); by chance 0 everywhere
    assert mean.argmax(0).tolist() == [0, 1, 2, 3]
    assert mean.diagonal().min() > 0.6
    assert twist_views.peaks_at_own_direction([*ANGLES], mean.numpy()) == 4
    assert twist_views.peaks_at_own_direction([*ANGLES], mean.numpy()[::-1]) == 0


def test_a_rotated_image_has_no_corners():
    white = Image.new('RGB', (200, 150), 'white')
    for angle in (0, 17, 45, 90, 133, 180):
        turned = twist_views.rotate(white, angle)
        assert turned.width == turned.height > 100
        assert np.asarray(turned).min() == 255


# ---------------------------------------------------------------------------------------------- what is drawn


def test_interaction_is_of_the_tensor_that_the_network_uses(picture):
    subject = tiny()
    block, seen = subject.model.layer3[0], {}
    block.conv2.register_forward_hook(lambda module, inputs, output: seen.update(h=inputs[0]))  # h is what conv2 reads
    figure = image_views.plot_interaction(subject, picture)
    with torch.inference_mode():
        means = block.stci.interactions(seen['h']).mean((-1, -2)).reshape(4, 44)[:, 8:]
    panels = [axes for axes in figure.axes if axes.images and axes.images[0].get_array().shape == (8, 8)]
    assert len(panels) == 16  # four blocks of four heads
    for head, axes in enumerate(panels[:4]):
        shown = axes.images[0].get_array().filled(np.nan)
        assert shown[np.triu_indices(8)] == pytest.approx(means[head].numpy(), abs=1e-5)
        assert np.isnan(shown[np.tril_indices(8, -1)]).all()
        assert axes.images[0].norm.vmin == 0


def test_response_leaves_out_cells_that_look_beyond_the_map(picture):
    subject = tiny()
    figure = image_views.plot_response(subject, picture)
    block = trace.observe(subject.model, subject.batch([picture])).blocks['layer3.0']
    response = block.response[0].numpy()  # (4, 4, 4) of 64 pixels
    assert response[0, :, -1] == pytest.approx(1, abs=1e-4)  # of any image: there t is z at half its length
    shown = [text for text in texts(figure) if ' to ' in text and text[0].isdigit()]
    for (dy, dx), cells in zip(models.DIRECTIONS, trace.cells_with_neighbour(4, 3, 5)):
        assert all(cells[y, x] == (y + dy in range(3) and x + dx in range(5)) for y in range(3) for x in range(5))
    parts = response[0, :, :-1], response[1, :-1, :-1], response[2, :-1], response[3, :-1, 1:]
    assert shown[:4] == [f'{part.min():.2f} to {part.max():.2f}' for part in parts]


def test_kernels_show_what_training_changed():
    subject = tiny()
    with torch.no_grad():
        subject.model.layer4[1].stci.twist.dwconv.weight[3 * 8 + 2, 0, 0, 1] -= 0.02
    figure = twist_views.plot_kernels(subject)
    found = texts(figure)
    shades = heat_map(figure).collections[0].get_array().filled()
    assert shades.shape == (15, 12)
    for head, (dy, dx) in enumerate(models.DIRECTIONS):  # rows run down, as in the image
        start = np.zeros((3, 3))
        start[1, 1] = start[1 + dy, 1 + dx] = 0.5 / 0.8
        assert shades[:3, 3 * head : 3 * head + 3] == pytest.approx(start)
    row, column = np.argwhere(shades[3:] == shades[3:].max())[0]
    assert (row, column) == (9, 3 * 3 + 1), 'the last block, the last head, the tap that moved'
    assert found.count('\N{MINUS SIGN}20.0') == 1
    assert found.count('0.5') == 8  # the start: the centre and the neighbour of four heads
    assert {'layer3.0', 'layer3.1', 'layer4.0', 'layer4.1'} <= {*found}


def test_arrows_point_where_the_kernels_look(monkeypatch):
    monkeypatch.setattr(twist_views, 'TEXTURES', 1)
    monkeypatch.setattr(twist_views, 'STEP', 45)
    figure = twist_views.plot_direction(tiny(layers=(1, 1, 1), twist_stages=(3,)), None)
    figure.canvas.draw()
    axes = figure.axes[0]
    arrows = [child for child in axes.texts if getattr(child, 'arrow_patch', None)]
    assert len(arrows) == 4
    for arrow, (dy, dx) in zip(arrows, models.DIRECTIONS):
        (x0, y0), (x1, y1) = axes.transData.transform([arrow.xyann, arrow.xy])
        assert np.sign(np.round([x1 - x0, y1 - y0], 6)).tolist() == [dx, -dy]  # on the page y points up
    assert any('lower right' in text.replace('\n', ' ') for text in texts(figure))


def test_features_are_the_stages_own(picture):
    subject = tiny()
    figure = image_views.plot_features(subject, picture)
    with torch.inference_mode():
        last = subject.model.forward_features(subject.batch([picture]))[0].numpy()
    panel = figure.axes[-1]
    assert panel.images[0].get_array().filled() == pytest.approx(last[int(panel.get_title())])


def test_selection_is_by_class_and_names_the_gate():
    found = survey_of([0, 0, 1, 1, 2, 2])
    figure = class_views.plot_class_selection(tiny(), found)
    weights = found.selection['layer3.0']
    first = np.stack([weights[found.labels == label, :, :2].mean((0, 2)) for label in range(3)])
    table = heat_map(figure).collections[0].get_array().filled()
    assert table[:, :2] == pytest.approx(100 * (first - first.mean(0)))
    assert 'layer3.0, gate 0.119' in texts(figure)


def test_alike_classes_stand_together():
    labels = np.arange(4).repeat(5)
    products = np.random.default_rng(1).random((4, 2, 3))[[0, 1, 0, 2]][labels]
    products = products + 0.01 * np.random.default_rng(2).random(products.shape)
    figure = class_views.plot_classes(tiny(classes=4), survey_of(labels, products=products))
    names = [tick.get_text() for tick in heat_map(figure).get_yticklabels()]
    assert sorted(names) == ['class0', 'class1', 'class2', 'class3']
    assert abs(names.index('class0') - names.index('class2')) == 1


def test_neighbours_leave_the_image_itself_out():
    features = np.array([[1.0, 0], [1, 0.01], [0, 1], [0.01, 1], [1, 0.02], [0.02, 1]])
    apart, mixed = np.array([0, 0, 1, 1, 0, 1]), np.array([0, 1, 0, 1, 2, 2])
    assert class_views.neighbours_right(features, apart).mean() == pytest.approx(2 / 5)  # two of five others
    assert class_views.neighbours_right(features, mixed).mean() == pytest.approx(1 / 5)


@pytest.mark.slow
def test_the_legend_tells_47_classes_apart_and_fits_a_page():
    styles = [class_views.class_style(label) for label in range(98)]
    assert len({tuple(style.values()) for style in styles}) == 98
    assert len({(style['marker'], style['mfc'] == 'white') for style in styles[:14]}) == 14  # in grey
    labels = np.arange(47).repeat(2)
    subject = tiny(classes=47)
    figure = class_views.plot_tsne(subject, survey_of(labels, np.random.default_rng(0).random((94, 6))))
    figure.canvas.draw()
    bars = figure.axes[1]
    boxes = [tick.get_window_extent() for tick in bars.get_yticklabels()]
    assert [tick.get_text() for tick in bars.get_yticklabels()] == subject.classes
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(boxes))
    assert figure.get_size_inches()[1] <= 9


def test_of_many_classes_those_furthest_from_the_mean_are_drawn_and_a_csv_has_all(tmp_path, monkeypatch, capsys):
    labels, centres = np.arange(6).repeat(6), 10 * np.eye(6)
    centres[5] = centres[2]  # classes 2 and 5 are mixed, the others apart
    rng = np.random.default_rng(0)
    found = survey_of(labels, centres[labels] + 0.1 * rng.standard_normal((36, 6)))
    found.selection['layer3.0'][labels == 4] += [1.0, 1, 0, 0, 0]
    found.selection['layer3.0'][labels == 1] += [0.0, 0, 2, 2, 2]
    monkeypatch.setattr(class_views, 'survey_subset', lambda *_: found)
    path = write_checkpoint(tmp_path / 'best.pt', classes=6)

    def csv_of(view):
        visualize.main(arguments('--checkpoint', path, '--view', view, '--save_dir', tmp_path / 'f'))
        *_, csv = capsys.readouterr().out.splitlines()
        return [line.split(',') for line in Path(csv).read_text().splitlines()] if csv.endswith('.csv') else None

    assert csv_of('tsne') is None
    monkeypatch.setattr(class_views, 'PAGEFUL', 5)
    monkeypatch.setattr(class_views, 'FEW', 2)
    head, *rows = csv_of('tsne')
    assert (head, [row[0] for row in rows]) == (['class', 'neighbours of the same class (%)'], tiny(classes=6).classes)
    assert float(rows[0][1]) == 100 > max(float(rows[2][1]), float(rows[5][1]))
    figure = class_views.plot_tsne(tiny(classes=6), found)
    scatter, bars = figure.axes
    by_share = sorted(('class2', 'class5'), key=lambda name: -float(dict(rows)[name]))
    assert [tick.get_text() for tick in bars.get_yticklabels()] == by_share
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([float(dict(rows)[name]) for name in by_share])
    assert [len(line.get_xdata()) for line in scatter.lines] == [24, 6, 6], 'the others in grey, then each class'
    assert any('2 classes furthest from the mean of all. 4 are left out' in text for text in texts(figure))

    head, *rows = csv_of('selection')
    assert head[1:] == [
        f'layer3.0 {order} order {angle}\N{DEGREE SIGN}' for order in ('1st', '2nd') for angle in (0, 45)
    ]
    axes = heat_map(class_views.plot_class_selection(tiny(classes=6), found))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ['class1', 'class4']
    values = [[float(cell) for cell in rows[label][1:]] for label in (1, 4)]
    assert axes.collections[0].get_array().filled() == pytest.approx(np.array(values), rel=1e-6)
    axes = heat_map(class_views.plot_classes(tiny(classes=6), found))
    assert (len(csv_of('classes')), len(axes.get_yticklabels())) == (1 + 6, 2)


# ---------------------------------------------------------------------------------------------- cam


def photograph(label: int, seed: int) -> Image.Image:
    """Grey noise with a red (0), a green (1) or no square (2) in the lower left of the part that a model sees."""
    pixels = np.random.default_rng(seed).integers(100, 150, (80, 120, 1), np.uint8).repeat(3, 2)
    if label < 2:
        pixels[57:75, 25:43] = ((220, 30, 30), (30, 220, 30))[label]
    return Image.fromarray(pixels)


class Small(torch.nn.Module):
    """Two convolutions, which make 4 x 4 cells of 64 pixels."""

    def __init__(self):
        super().__init__()
        layers = [torch.nn.Conv2d(3, 16, 4, 4), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 4, 4), torch.nn.ReLU()]
        self.forward_features, self.fc = torch.nn.Sequential(*layers), torch.nn.Linear(16, 3)

    def forward_head(self, maps: torch.Tensor) -> torch.Tensor:
        return self.fc(maps.mean((2, 3)))


def test_cam_of_a_network_trained_on_squares_in_a_corner_is_in_that_corner_of_the_photograph():
    subject = tiny()._replace(model=Small(), classes=['red', 'green', 'none'])
    optimizer, labels = torch.optim.Adam(subject.model.parameters(), 0.02), torch.arange(18) % 3
    images = subject.batch(photograph(int(label), i) for i, label in enumerate(labels))
    for _ in range(100):
        optimizer.zero_grad()
        logits = subject.model.forward_head(subject.model.forward_features(images))
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    for label in (0, 1):
        image = photograph(label, 10_000)
        logits, maps = cam.class_maps(subject, image)
        assert [*maps] == [label] == [int(logits.argmax())]
        heat = cam.spread(maps[label], view_box(image.size, 64), image.size)
        assert heat.shape == (80, 120)
        y, x = np.unravel_index(np.nanargmax(heat), heat.shape)
        assert 57 <= y < 75
        assert 24 <= x < 43
        assert heat[57:75, 25:43].mean() > 5 * np.nanmean(heat)
        lit = ~np.isnan(heat)
        assert lit[5:74, 25:94].all()
        assert not lit[:, :23].any(), 'not seen by the model'


def test_a_photograph_of_a_line_has_a_cam(tmp_path, picture):
    picture.resize((4000, 8)).save(tmp_path / 'line.png')
    strip, *_ = cam.picture_of(tiny(), tmp_path / 'line.png', None, 320)
    assert strip.shape == (1, 2 * 320 + 6, 3)


@pytest.mark.parametrize('resize', ['crop', 'squash', 'pad'])
@pytest.mark.parametrize('size', [(120, 80), (80, 120), (700, 61)])  # the last is a thin one
def test_the_box_of_a_view_is_where_its_pixels_are_from(size, resize):
    ramps = np.meshgrid(*(np.linspace(0, 250, n) for n in size))
    image = Image.fromarray(np.stack([*ramps, ramps[0]], -1).astype(np.uint8))
    shown = np.asarray(eval_view(64, resize=resize)(image), float)
    left, top, right, bottom = view_box(size, 64, resize=resize)
    for axis, (first, last, side) in enumerate(((left, right, size[0]), (top, bottom, size[1]))):
        middles = first + (np.arange(64) + 0.5) * (last - first) / 64
        found = shown[..., axis].take(32, axis)
        inside = (middles > 0.05 * side) & (middles < 0.95 * side)  # not the borders of pad
        assert found[inside] == pytest.approx(((middles - 0.5) * 250 / (side - 1))[inside], abs=2)


@pytest.mark.parametrize('name', ['twistnet18', 'stci_resnet18', 'swin_tiny'])  # of the last, channels come last
def test_cam_of_a_pooled_map_is_that_of_the_class_s_weights(name, picture):
    torch.manual_seed(0)
    subject = tiny()._replace(model=models.build_model(name, 3, img_size=64).eval())
    logits, maps = cam.class_maps(subject, picture, 2)
    assert {*maps} == {int(logits.argmax()), 2}
    with torch.inference_mode():
        assert torch.allclose(logits, subject.model(subject.batch([picture])), atol=1e-5)
        last = subject.model.forward_features(subject.batch([picture]))[0]
        last = last.permute(2, 0, 1) if name == 'swin_tiny' else last
        linear = subject.model.get_classifier()
        expected = (linear.weight[2, :, None, None] * last).sum(0).relu() / last[0].numel()
    assert maps[2] == pytest.approx(expected.numpy(), abs=1e-6)


@pytest.mark.parametrize(('name', 'words'), [('test_vit', 'ends in no map of cells'), ('resnet18', 'is one cell')])
def test_a_model_without_a_map_of_cells_has_no_cam(name, words, picture):
    subject = tiny()._replace(model=models.build_model(name, 3).eval(), preprocessing=Preprocessing(32))
    if name == 'test_vit':
        subject = subject._replace(preprocessing=Preprocessing(160))
    with pytest.raises(ModelError, match=words):
        cam.class_maps(subject, picture)


def test_figures_show_the_probability_that_predict_py_writes(tmp_path, checkpoint, picture):
    subject = tiny()._replace(temperature=0.01)
    logits = subject.model(subject.batch([picture])).detach()
    label = int(logits.argmax())
    expected = f'class{label} ({100 * (logits / 0.01).softmax(1)[0, label]:.0f} %)'
    assert expected != f'class{label} ({100 * logits.softmax(1)[0, label]:.0f} %)'
    picture.save(tmp_path / 'one.png')
    (figure,) = cam.plot_cam(subject, tmp_path / 'one.png', None)
    assert f'{expected}\none.png' in texts(figure)
    assert 'predicted:\n' + expected.replace(' (', '\n(') in texts(image_views.plot_features(subject, picture))


def test_a_folder_gives_sheets_beside_its_photographs(tmp_path, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(cam, 'ROWS', 1)
    drawn, folder = [], tmp_path / 'photographs'
    folder.mkdir()
    monkeypatch.setattr(cam, 'plot_thumbnails', lambda *a: drawn.append(a) or plt.figure(figsize=(1, 1)))
    for i in range(3):
        photograph(0, i).save(folder / f'{i}.png')
    (folder / 'bad.png').write_text('no image')
    argv = ('--checkpoint', checkpoint, '--view', 'cam', '--image', folder, '--save_dir', tmp_path)
    visualize.main(arguments(*argv))
    out, err = capsys.readouterr()
    assert [Path(line).name for line in out.splitlines()] == ['cam.pdf', 'cam.png', 'cam_2.pdf', 'cam_2.png']
    assert [words[-1] for _, panels, *_ in drawn for _, words in panels] == ['0.png', '1.png', '2.png']
    assert 'bad.png: cannot be read as an image' in err
    assert drawn[0][1][0][0].shape == (80, 2 * 120 + 6, 3)
    visualize.main(arguments(*argv, '--class_name', 'class2'))
    assert drawn[-1][1][0][0].shape[1] in (2 * 120 + 6, 3 * 120 + 12)
    assert len(drawn) == 2 + 3


# ---------------------------------------------------------------------------------------------- commands


@pytest.mark.slow
def test_a_run_of_train_is_drawn_by_the_commands_of_the_readme(tree, tmp_path, capsys):
    folder, _ = run(tree, tmp_path / 'runs', '--epochs', '1', '--warmup_epochs', '0')
    checkpoint, save_dir = folder / 'best.pt', tmp_path / 'figures'
    image = tree / 'images' / 'class0' / 'class0_0000.jpg'
    capsys.readouterr()
    for plot, options in (('interaction', ['--image', image]), ('tsne', [])):  # of the run's own data set
        argv = ['--checkpoint', checkpoint, *options, '--save_dir', save_dir, '--plot', plot]
        plot_results.main(plot_results.get_args_parser().parse_args([str(word) for word in argv]))
        printed = capsys.readouterr().out.splitlines()
        assert printed == [f'{save_dir / plot}.{suffix}' for suffix in ('pdf', 'png')]
    visualize.main(arguments('--checkpoint', checkpoint, '--view', 'tsne', '--save_dir', tmp_path / 'again'))
    for path in printed:  # of tsne: the same figure has the same bytes
        assert Path(path).read_bytes() == (tmp_path / 'again' / Path(path).name).read_bytes()


@pytest.mark.slow
def test_all_draws_what_it_can_and_names_the_rest(tmp_path, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(twist_views, 'TEXTURES', 1)
    monkeypatch.setattr(twist_views, 'STEP', 90)
    visualize.main(arguments('--checkpoint', checkpoint, '--save_dir', tmp_path / 'figures'))
    out, err = capsys.readouterr()
    assert [Path(line).stem for line in out.splitlines()[::2]] == ['kernels', 'direction']
    named = [line.split(': ')[1] for line in err.splitlines() if line.startswith('not drawn')]
    assert named == ['interaction', 'response', 'features', 'cam', 'selection', 'classes', 'tsne']


def test_a_view_is_a_function_and_its_entry(tmp_path, checkpoint, capsys, monkeypatch):
    facts = torch.load(checkpoint, weights_only=True)
    torch.save(facts | dict(transform=eval_settings(64, bits=12)), checkpoint)
    Image.fromarray(np.full((64, 64), 1000, np.uint16)).save(tmp_path / 'dark.png')
    seen = []

    def draw(subject, image):
        seen.append(image.getpixel((0, 0)))
        return plt.figure(figsize=(1, 1))

    monkeypatch.setitem(visualize.VIEWS, 'mine', visualize.View(draw, 'image'))
    argv = ('--checkpoint', checkpoint, '--view', 'mine', '--image', tmp_path / 'dark.png', '--save_dir', tmp_path)
    visualize.main(arguments(*argv))
    assert seen == [(1000 >> 4,) * 3], 'scaled by the bits of the checkpoint'
    assert capsys.readouterr().out.splitlines() == [f'{tmp_path}/mine.{suffix}' for suffix in ('pdf', 'png')]


def test_figures_of_runs_need_no_torch():
    code = "import sys, plot_results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------------------------------------- errors


def error_of(*argv) -> str:
    with pytest.raises(UserError) as caught:
        visualize.main(arguments(*argv))
    return str(caught.value)


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        ('--checkpoint none.pt', 'none.pt: no such checkpoint'),
        ('--checkpoint .', '.: is a folder'),
        ('--view kernels', '--checkpoint is missing'),
        ('--checkpoint best.pt --view response --image text.jpg', 'text.jpg: cannot be read as an image'),
        ('--checkpoint best.pt --view response --image none.jpg', 'No such file'),
        ('--checkpoint best.pt --view features', 'features needs --image'),
        ('--checkpoint best.pt --view features --image .', 'is a folder, and features takes one picture'),
        ('--checkpoint best.pt --view cam --image dot.png --class_name Class1', "'class1' differs by case"),
        ('--checkpoint best.pt --view kernels --class_name class1', 'only for --view cam'),
        ('--checkpoint resnet.pt --view kernels', 'resnet18, which has no STCI'),
        ('--checkpoint best.pt --view direction --image dot.png', '9 pixels are too small to be rotated'),
        ('--checkpoint best.pt --view classes', 'give --dataset'),
        ('--checkpoint best.pt --view classes --dataset synthetic', 'give --fold'),
        ('--checkpoint best.pt --view classes --dataset synthetic --fold 1', 'has other classes than the 3'),
        ('--checkpoint best.pt --view tsne --dataset dtd --fold 1 --data_dir tree', "'class1' has 1 image;"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, checkpoint, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    Path('text.jpg').write_text('no image')
    Image.new('RGB', (4, 9)).save('dot.png')
    if 'resnet' in argv:
        write_checkpoint(Path('resnet.pt'), 'resnet18')
    if 'tree' in argv:
        names = make_dtd(Path('tree')) / 'labels' / 'test1.txt'
        lines = [line for line in names.read_text().split() if 'class1' not in line or '0012' in line]
        names.write_text('\n'.join(lines))
    found = error_of(*argv.split())
    assert message in found
    assert '\n' not in found


def test_images_that_may_have_trained_the_model_are_refused_or_marked(tree, checkpoint, capsys):
    options = dict(dataset='dtd', data_dir=str(tree), fold=1)
    config = dict(options=options, defines=dict(split=split_digest(load_splits(**options))))
    checkpoint.with_name('config.json').write_text(json.dumps(config))
    moved = tree.rename(tree.with_name('moved'))
    write_image(Path(load_splits('dtd', moved, 1).test[0][0]), 3, size=60)  # a damaged test image that was mended
    subject = trained.load(checkpoint)
    assert trained.data_of(arguments('--data_dir', moved), subject).caution is None
    other = ('--data_dir', moved, '--fold', 2)
    message = error_of('--checkpoint', checkpoint, '--view', 'tsne', *other)
    assert 'was trained on fold 1' in message
    assert '--other_images' in message
    found = class_views.survey_subset(subject, arguments(*other, '--other_images'))
    title = class_views.title_of_survey(subject, 'any', found)  # of every figure
    assert ', images that may have trained the model (' in title
    assert 'may have trained the model' in capsys.readouterr().err


def test_a_checkpoint_alone_says_that_its_images_are_not_checked(tree, checkpoint, capsys):
    subject = trained.load(checkpoint)
    found = class_views.survey_subset(subject, arguments('--data_dir', tree, '--fold', 1))  # dtd, by its layout
    assert found.of == f'12 test images of DTD, fold 1, {trained.UNCHECKED}'
    assert 'it is not checked that these images did not train' in capsys.readouterr().err


@pytest.mark.parametrize('name', [name for name in models.MODELS if 'twist' not in models.MODELS[name]])
def test_every_baseline_gives_features_and_logits(name):
    torch.manual_seed(0)
    model = models.build_model(name, 3, img_size=64).eval()
    image = torch.randn(1, 3, 64, 64)
    record = trace.observe(model, image)
    with torch.inference_mode():
        assert torch.equal(record.logits, model(image))
        final, maps = model.forward_intermediates(image)  # what `features` draws
        assert torch.allclose(model.forward_head(final), record.logits, atol=1e-5)
    assert record.features.shape == (1, model.num_features)
    assert len(list(model.feature_info)) == len(maps)


@pytest.mark.slow
def test_a_model_without_stci_is_drawn_by_features_and_tsne(tree, tmp_path, picture, capsys, monkeypatch):
    monkeypatch.setattr(visualize, 'save', lambda figure, save_dir, view: [view])
    checkpoint = write_checkpoint(tmp_path / 'best.pt', 'swin_tiny')
    picture.save(tmp_path / 'a.png')
    options = ['--checkpoint', checkpoint, '--image', tmp_path / 'a.png', '--data_dir', tree, '--fold', 1]
    visualize.main(arguments(*options))
    out, err = capsys.readouterr()
    assert out.split() == ['features', 'cam', 'tsne']
    assert err.count('has no STCI branch') == 6


def test_features_below_0_are_drawn_below_0(picture):
    subject = tiny()._replace(model=models.build_model('convnextv2_nano', 3).eval())
    figure = image_views.plot_features(subject, picture)
    lows = [axes.images[0].norm.vmin for axes in figure.axes if axes.images and axes.images[0].get_array().ndim == 2]
    assert min(lows) < 0
    assert any('its lowest value, or from 0' in text.replace('\n', ' ') for text in texts(figure))


@pytest.mark.parametrize(
    ('more', 'missing'),
    [
        (dict(use_spiral=False), {'response', 'kernels', 'direction'}),
        (dict(directional=False), {'response', 'kernels', 'direction'}),
        (dict(use_products=False), {'interaction', 'response', 'kernels', 'direction', 'classes'}),
        (dict(use_ais=False), {'selection'}),
    ],
)
def test_variants_say_what_they_lack(more, missing):
    subject = tiny(**more)
    for name, view in visualize.VIEWS.items():
        expected = pytest.raises(ModelError, match=r'best\.pt: tiny has no ') if name in missing else nullcontext()
        with expected:
            view.part is None or trace.need(subject, view.part)


@pytest.mark.slow
@pytest.mark.parametrize('more', [dict(directional=False), dict(use_spiral=False)])
def test_heads_without_a_direction_are_numbered(picture, more):
    subject, found = tiny(**more), survey_of([0, 0, 1, 1, 2, 2])
    assert any('45\N{DEGREE SIGN}' in text for text in texts(class_views.plot_classes(tiny(), found)))
    figures = image_views.plot_interaction(subject, picture), class_views.plot_classes(subject, found)
    for figure in (*figures, class_views.plot_class_selection(subject, found)):
        drawn = ' '.join(texts(figure))
        assert not set(drawn) & {'\N{DEGREE SIGN}', *image_views.ARROWS}
        assert 'direction' not in drawn


@pytest.mark.slow
def test_class_names_with_dollars_or_invalid_utf_8_are_drawn(tmp_path):
    names = ['a$b_{', r'$\frac$', '$x$\udce9']
    subject, found = tiny()._replace(classes=names), survey_of([0, 0, 1, 1, 2, 2])
    for figure in (class_views.plot_class_selection(subject, found), class_views.plot_tsne(subject, found)):
        drawing.save(figure, tmp_path, 'figure')
        text = [text for text in figure.findobj(plt.Text) if '$' in text.get_text()]
        assert {one.get_text() for one in text} == {*names[:2], '$x$\N{REPLACEMENT CHARACTER}'}
        assert not any(one.get_parse_math() for one in text)


def test_products_below_0_are_drawn_below_0(picture, monkeypatch):
    products = trace.Block.products
    monkeypatch.setattr(trace.Block, 'products', property(lambda block: products.fget(block) - 0.05))
    figure = image_views.plot_interaction(tiny(), picture)
    drawn = [axes.images[0] for axes in figure.axes if axes.images and axes.images[0].get_array().shape == (8, 8)]
    assert drawn[0].norm.vmin == min(image.get_array().min() for image in drawn) < 0
    assert any('The lowest mean is \N{MINUS SIGN}0.05.' in text.replace('\n', ' ') for text in texts(figure))


def test_options_of_a_checkpoint_are_refused_where_runs_are_drawn():
    for option in ('--checkpoint=best.pt', '--image=a.jpg', '--fold=0', '--subset=test', '--other_images'):
        args = plot_results.get_args_parser().parse_args([option, '--plot', 'bar'])
        with pytest.raises(RunError, match=f'{option.split("=")[0]}: only for --plot interaction and tsne'):
            plot_results.main(args)


# ---------------------------------------------------------------------------------------------- architecture


def test_the_architecture_has_the_shapes_of_the_model():
    figure = architecture.draw(architecture.measure())
    found = texts(figure)
    model = models.build_model('twistnet18').eval()
    with torch.inference_mode():
        image = torch.zeros(1, 3, 224, 224)
        last, maps = model.forward_intermediates(image)
        stci = model.layer4[1].stci
        dim = stci.interactions(last).shape[1]
        shapes = [image, *maps, model.maxpool(maps[0]), model.forward_head(last, pre_logits=True), model(image)]
    words = [' \N{MULTIPLICATION SIGN} '.join(map(str, tensor.shape[1:])) for tensor in shapes]
    assert [word for word in words if word not in found] == []
    assert found.count('44') == stci.num_heads == 4
    assert dim == 4 * 44
    for part in (f'concatenate\n{dim} ', '176 → 44 → 176', 'GroupNorm(22)', '36 products'):
        assert any(part in text for text in found), part
    names = [type(block).__name__ for stage in model.stages for block in stage]
    assert names == ['BasicBlock'] * 4 + ['TwistBlock'] * 4


@pytest.mark.slow
def test_the_architecture_in_the_repository_is_the_scripts(tmp_path):
    architecture.main(argparse.Namespace(save_dir=tmp_path, dpi=150))
    shown = np.asarray(Image.open(Path(architecture.__file__).with_name('architecture.png')).convert('L'), int)
    drawn = np.asarray(Image.open(tmp_path / 'architecture.png').convert('L'), int)
    assert shown.shape == drawn.shape
    assert shown.shape[1] >= 800
    assert abs(shown - drawn).mean() < 1  # other versions of matplotlib draw the same picture in other bits
