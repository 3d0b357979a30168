"""The promises of plot_results.py: what is drawn is what was measured, what is missing is named, nothing is pooled."""

import json
import math
import os
import re
import statistics
import zlib
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import ROOT, finish, make_run, start, write_tuned
from matplotlib import font_manager
from matplotlib.colors import same_color
from matplotlib.container import ErrorbarContainer
from PIL import Image

import models
import plot_results
from common import drawing, runs
from common.errors import RunError
from common.registry import DATASETS, MODELS
from common.results import initial_gate

FOLDS = {1: 40.0, 2: 44.0, 3: 51.0}  # mean 45
GATES = {'layer3.0': 0.12, 'layer3.1': 0.13, 'layer4.0': 0.11, 'layer4.1': 0.10}


@pytest.fixture(autouse=True)
def _light(monkeypatch):
    monkeypatch.setitem(plt.rcParams, 'savefig.dpi', 50)
    monkeypatch.setattr(os, 'fsync', lambda _: None)
    yield
    plt.close('all')


MANY = [name for name in MODELS if 'zero_init' not in name]  # 22, as many as a page has been drawn with


def make(root, dataset='dtd', model='resnet18', fold=1, seed=42, acc=40.0, epochs=2, upto=None, done=True, **more):
    """A run folder as train.py leaves it, with a log."""
    cell, done = dict(dataset=dataset, model=model, fold=fold, seed=seed), done and upto is None
    folder = make_run(root, complete=done, test_acc=acc, epochs=epochs, img_size=64, **cell, **more)
    gates = GATES if model.startswith('twistnet18') else {}
    write_log(folder, [(2.0 / (i + 1), acc * i / epochs, gates) for i in range(upto or epochs)])
    return folder


def write_log(folder, epochs):
    keys = ('train_loss', 'val_acc', 'gates')
    lines = [json.dumps(dict(epoch=i, **dict(zip(keys, line)))) + '\n' for i, line in enumerate(epochs, 1)]
    (folder / 'log.jsonl').write_text(''.join(lines))


def make_folds(root, dataset='dtd', model='resnet18', shift=0.0, **more):
    for fold, acc in FOLDS.items():
        make(root, dataset, model, fold, acc=acc + shift, **more)


def arguments(*argv):
    return plot_results.get_args_parser().parse_args([str(word) for word in argv])


def draw(root, plot, *argv):
    """The figures of a folder with one recipe."""
    ((table, logs),) = plot_results.read_all(arguments('--run_dir', root, *argv))
    return plot_results.PLOTS[plot](table, logs, 'title')


def figures_of(monkeypatch, *argv) -> dict:
    """What the command draws, by name, instead of files."""
    figures = {}
    monkeypatch.setattr(plot_results, 'save', lambda figure, _, name: figures.update({name: figure}) or [])
    plot_results.main(arguments(*argv))
    return figures


def texts(figure):
    return [text.get_text() for text in figure.findobj(plt.Text) if text.get_text()]


def said(figure):
    """All text of a figure, in one line."""
    return ' '.join(' '.join(texts(figure)).split())


def labelled(axes, label):
    return [line for line in axes.lines if line.get_label() == label]


def whiskers(axes):
    """(low, high) of each horizontal whisker, in the order drawn."""
    bars = [bar for bar in axes.containers if isinstance(bar, ErrorbarContainer)]
    return [tuple(bar.lines[2][0].get_segments()[0][:, 0]) for bar in bars]


def check_page(figure):
    """All text lies on the page, is at least 7 points high, and the page fits."""
    figure.get_layout_engine().execute(figure)
    width, height = figure.get_size_inches()
    assert width <= 7
    assert height <= 9.6
    drawn = figure.get_tightbbox()
    assert min(drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1) >= -0.02, drawn
    assert all(text.get_fontsize() >= 7 for text in figure.findobj(plt.Text) if text.get_text())


def apart(boxes):
    return not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


# ---------------------------------------------------------------------------------------------- bar


def test_bars_are_means_whiskers_sd_and_points_folds(tmp_path):
    make_folds(tmp_path)
    make_folds(tmp_path, model='twistnet18', shift=3.0)
    for fold, acc in FOLDS.items():  # a second seed: averaged inside the fold
        make(tmp_path, fold=fold, seed=43, acc=acc + 2)
        make(tmp_path, model='twistnet18', fold=fold, seed=43, acc=acc + 5)
    (figure,) = draw(tmp_path, 'bar')
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([46, 49])
    assert [bar.get_x() for bar in axes.patches] == [0, 0]
    assert axes.get_xlim()[0] == 0
    assert axes.get_xlim()[1] >= 55
    sd = statistics.stdev(FOLDS.values())
    assert whiskers(axes) == [pytest.approx((46 - sd, 46 + sd)), pytest.approx((49 - sd, 49 + sd))]
    assert [list(line.get_xdata()) for line in labelled(axes, 'folds')] == [[41, 45, 52], [44, 48, 55]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ['ResNet-18', 'TwistNet-18']
    assert [label.get_fontweight() for label in axes.get_yticklabels()] == ['normal', 'bold']
    assert axes.get_title() == 'DTD\n3 folds × 2 seeds'  # noqa: RUF001
    assert {'46.0', '49.0', 'title'} <= set(texts(figure))
    check_page(figure)


def test_bar_names_what_is_missing_and_draws_no_zero(tmp_path):
    make_folds(tmp_path)
    make_folds(tmp_path, 'fmd', 'twistnet18')
    make(tmp_path, 'fmd', 'resnet18', done=False)
    make(tmp_path, 'fmd', 'seresnet18', acc=41.0)
    make(tmp_path, 'cub200', 'swin_tiny', done=False)
    (figure,) = draw(tmp_path, 'bar')
    dtd, fmd, cub = figure.axes
    assert [len(axes.patches) for axes in figure.axes] == [1, 2, 0]
    assert all(bar.get_width() > 0 for axes in figure.axes for bar in axes.patches)
    assert [text.get_text() for text in dtd.texts] == ['45.0', 'no run', 'no run', 'no run']
    assert [text.get_text() for text in fmd.texts] == ['no complete run', '41.0 (1)', 'no run', '45.0']
    assert [text.get_text() for text in cub.texts][2] == 'no complete run'
    assert [text.get_position()[1] for text in dtd.texts] == [0, 1, 2, 3]
    assert [bool(bar.get_hatch()) for bar in fmd.patches] == [True, False]
    assert cub.get_title() == 'CUB-200\nno complete run'
    assert any('number of runs in brackets' in text for text in texts(figure))


@pytest.mark.parametrize('plot', ['bar', 'ablation'])
def test_one_fold_has_no_whisker(tmp_path, plot):
    for model in ('resnet18', 'twistnet18', 'twistnet18_no_ais'):
        make(tmp_path, model=model)
    (figure,) = draw(tmp_path, plot)
    assert not whiskers(figure.axes[0])
    assert not any('Whiskers' in text for text in texts(figure))
    assert labelled(figure.axes[0], 'folds')


def test_every_figure_says_what_was_tuned_and_loaded(tmp_path, monkeypatch):
    rates, loaded = dict(resnet18=0.1, twistnet18=0.01, twistnet18_no_ais=0.1), dict(resnet18=0.998)
    for model, lr in rates.items():
        for dataset in ('dtd', 'fmd', 'cub200'):
            make(tmp_path, dataset, model, lr=lr, pretrained=model, loaded=loaded.get(model, 0.06))
    assert len(plot_results.read_all(arguments('--run_dir', tmp_path))) == 2
    write_tuned(tmp_path, {(d, m): dict(lr=lr) for d in ('dtd', 'fmd', 'cub200') for m, lr in rates.items()})
    figures = figures_of(monkeypatch, '--run_dir', tmp_path)
    assert list(figures) == ['bar', 'forest', 'radar', 'scatter', 'ablation', 'curves', 'gate']
    for name, figure in figures.items():
        text = said(figure)
        assert '2 epochs, 64 px, from ImageNet weights, 6-100 % of the parameters loaded, lr tuned' in text
        assert 'Parameters loaded from ImageNet weights: ResNet-18 100 %, TwistNet-18 6 %, w/o AIS 6 %.' in text
        assert 'on fold 1 with seed 0, 3 settings (lr 0.001, 0.1): ' in text
        assert 'TwistNet-18 lr 0.01 (1 of 3 diverged)' in text
        assert ('ResNet-18 lr 0.1' in text) == (name != 'ablation'), 'of the models drawn'
        check_page(figure)


# ---------------------------------------------------------------------------------------------- radar


def test_radar_values_and_gaps(tmp_path):
    for dataset, acc in (('dtd', 40.0), ('fmd', 50.0), ('cub200', 62.0)):
        make(tmp_path, dataset, 'twistnet18', acc=acc)
        if dataset != 'fmd':
            make(tmp_path, dataset, 'resnet18', acc=acc - 10)
    (figure,) = draw(tmp_path, 'radar')
    (axes,) = figure.axes
    (full,), (other,) = labelled(axes, 'TwistNet-18'), labelled(axes, 'ResNet-18')
    assert list(full.get_ydata()) == [40, 50, 62, 40]
    assert list(full.get_xdata()) == pytest.approx([i * 2 * math.pi / 3 for i in range(4)])
    assert [*other.get_ydata()[[0, 2, 3]]] == [30, 52, 30]
    assert math.isnan(other.get_ydata()[1])
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] >= 62
    assert {'DTD', 'FMD', 'CUB-200', f'{axes.get_ylim()[1]:g}'} <= set(texts(figure))
    assert 'No complete run: FMD: ResNet-18.' in said(figure)
    assert full.get_linestyle() != other.get_linestyle()
    assert full.get_marker() != other.get_marker()


# ---------------------------------------------------------------------------------------------- scatter


def test_scatter_coordinates_and_results_without_macs(tmp_path):
    make_folds(tmp_path, params_M=11.5, macs_G=None)
    make_folds(tmp_path, model='twistnet18', shift=2.0, params_M=11.7, macs_G=1.9)
    (figure,) = draw(tmp_path, 'scatter')
    drawn = [[tuple(float(v[0]) for v in bar.lines[0].get_data()) for bar in axes.containers] for axes in figure.axes]
    assert drawn == [[(11.5, 45.0), (11.7, 47.0)], [(1.9, 47.0)]]
    sd = statistics.stdev(FOLDS.values())
    ends = figure.axes[0].containers[0].lines[2][0].get_segments()[0][:, 1]
    assert list(ends) == pytest.approx([45 - sd, 45 + sd])
    assert figure.axes[0].get_ylim()[0] > 20
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['ResNet-18', 'TwistNet-18']
    assert 'No MACs in the results: DTD: ResNet-18.' in said(figure)


def test_forest_shows_the_differences_and_intervals_of_the_tables(tmp_path):
    make_folds(tmp_path)
    make_folds(tmp_path, model='seresnet18', shift=-1.0)
    for fold, acc in FOLDS.items():
        make(tmp_path, model='twistnet18', fold=fold, acc=acc + fold)
    ((table, logs),) = plot_results.read_all(arguments('--run_dir', tmp_path))
    (figure,) = plot_results.plot_forest(table, logs, 'title')
    (axes,) = figure.axes
    found = table.rows['dtd', 'twistnet18'].difference
    assert [label.get_text() for label in axes.get_yticklabels()] == ['SE-ResNet-18', 'TwistNet-18']
    lines = {(*line.get_xdata(),): {*line.get_ydata()} for line in axes.lines[1:]}
    assert lines == {(-1.0,): {0}, (found['low'], found['high']): {1}, (2.0,): {1}}, 'none without spread'
    assert 'Without a line: one fold, or no spread.' in said(figure)
    with pytest.raises(RunError, match='no model is compared'):
        draw(tmp_path, 'forest', '--baseline', 'swin_tiny')


# ---------------------------------------------------------------------------------------------- ablation


def test_ablation_means_reference_and_differences(tmp_path):
    make_folds(tmp_path, model='twistnet18_gate_1', shift=-3.0)
    make_folds(tmp_path, model='twistnet18')
    make(tmp_path, model='twistnet18_no_ais', fold=3, acc=50.0)
    make(tmp_path, model='twistnet18_heads1', done=False)
    make_folds(tmp_path)
    (figure,) = draw(tmp_path, 'ablation', '--models', ','.join(reversed(MODELS)))
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ['TwistNet-18', 'w/o AIS', '1 Head', 'Gate 1']
    assert [line.get_xdata()[0] for line in labelled(axes, 'mean')] == [45, 50, 42]
    assert [line.get_ydata()[0] for line in labelled(axes, 'mean')] == [0, 1, 3]
    assert [list(line.get_xdata()) for line in labelled(axes, 'folds')] == [[40, 44, 51], [50], [37, 41, 48]]
    sd = statistics.stdev(FOLDS.values())
    assert whiskers(axes) == [pytest.approx((45 - sd, 45 + sd)), pytest.approx((42 - sd, 42 + sd))]
    assert list(labelled(axes, 'full')[0].get_xdata()) == [45, 45]
    # w/o AIS has fold 3 alone, where the full model has 51: the difference is of that fold.
    minus = '\N{MINUS SIGN}'
    beside = [text.get_text() for text in axes.texts]
    assert beside == ['45.0 %', f'{minus}1.0 (1)', 'no complete run', f'{minus}3.0']
    assert axes.get_xlim()[0] > 30, 'dots are zoomed'
    assert same_color(labelled(axes, 'mean')[1].get_markerfacecolor(), 'white')


def test_ablation_needs_a_variant_but_not_the_full_model(tmp_path):
    make_folds(tmp_path, model='twistnet18')
    make(tmp_path, model='twistnet18_no_ais', done=False)
    with pytest.raises(RunError, match='no complete run of a variant'):
        draw(tmp_path, 'ablation')
    make_folds(tmp_path / 'other', model='twistnet18_no_ais')
    (figure,) = draw(tmp_path / 'other', 'ablation')
    assert not labelled(figure.axes[0], 'full')
    assert [text.get_text() for text in figure.axes[0].texts] == ['']


# ---------------------------------------------------------------------------------------------- curves and gate


def test_curves_show_every_run_and_the_mean_where_all_are(tmp_path):
    write_log(make(tmp_path, fold=1, epochs=3), [(3.0, 10.0, {}), (2.0, 20.0, {}), (1.0, 30.0, {})])
    write_log(make(tmp_path, fold=2, epochs=3, upto=2), [(5.0, 20.0, {}), (4.0, 40.0, {})])
    make(tmp_path, 'fmd', 'seresnet18', epochs=3)
    (figure,) = draw(tmp_path, 'curves')
    assert [axes.get_title() for axes in figure.axes] == ['DTD', 'DTD', 'FMD', 'FMD']
    loss, accuracy = figure.axes[:2]
    (mean,) = labelled(accuracy, 'ResNet-18')
    assert [list(v) for v in mean.get_data()] == [[1, 2], [15, 30]]
    assert list(labelled(loss, 'ResNet-18')[0].get_ydata()) == [4, 3]
    thin = [line for line in accuracy.lines if line is not mean]
    assert [list(line.get_ydata()) for line in thin] == [[10, 20, 30], [20, 40]]
    assert all(same_color(line.get_color(), mean.get_color()) for line in thin)
    assert all(line.get_linewidth() < mean.get_linewidth() for line in thin)
    assert accuracy.get_ylim()[0] == 0
    assert 'not come to their last epoch: DTD: ResNet-18 (1 of 2).' in said(figure)
    assert 'do not compare' not in said(figure)  # a model per data set
    assert 'No run: DTD: SE-ResNet-18; FMD: ResNet-18.' in said(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['ResNet-18', 'SE-ResNet-18']


def test_curves_without_validation_and_of_runs_that_patience_ended(tmp_path):
    lines = [dict(epoch=1, train_loss=2.0, gates={}), dict(epoch=2, train_loss=1.0, gates={})]
    folder = make_run(tmp_path, epochs=9, log=lines)
    (figure,) = draw(tmp_path, 'curves')
    loss, accuracy = figure.axes
    assert list(labelled(loss, 'ResNet-18')[0].get_ydata()) == [2, 1]
    assert [text.get_text() for text in accuracy.texts] == ['no images of validation']
    assert 'not come to their last epoch' not in said(figure), 'it is complete'
    results = runs.read_json(folder / 'results.json')
    runs.write_json(folder / 'results.json', results | dict(epochs_run=2))
    ((table, logs),) = plot_results.read_one(arguments('--log_file', folder / 'log.jsonl'))
    assert 'not come to their last epoch' not in said(plot_results.plot_curves(table, logs, '')[0])


@pytest.mark.parametrize('plot', ['curves', 'gate'])
def test_means_of_other_folds_or_seeds_are_named(tmp_path, plot):
    for model, folds in (('twistnet18', (1, 2, 3)), ('twistnet18_no_ais', (1, 2)), ('twistnet18_no_spiral', (3,))):
        for fold in folds:
            write_log(make(tmp_path, model=model, fold=fold), [(1.0, 1.0, GATES)])
    make(tmp_path, 'fmd', 'twistnet18_no_ais')  # another data set: nothing to compare there
    write_log(make(tmp_path, fold=1), [(1.0, 1.0, {})])  # without gates: the gates of others are of no fewer runs
    write_log(make(tmp_path, fold=4), [(1.0, 1.0, {})])
    (figure,) = draw(tmp_path, plot)
    fewer = 'w/o Spiral Twist (1 of 3), w/o AIS (2 of 3)'
    if plot == 'curves':
        fewer = 'ResNet-18 (2 of 4), TwistNet-18 (3 of 4), w/o Spiral Twist (1 of 4), w/o AIS (2 of 4)'
    assert f'Not of all folds and seeds that others have, so their means do not compare: DTD: {fewer}.' in said(figure)


def test_a_single_run_is_drawn_as_logged_and_one_without_epochs_named(tmp_path):
    make(tmp_path, epochs=3, acc=30.0)
    folder = make(tmp_path, model='twistnet18', epochs=3, done=False)
    (folder / 'log.jsonl').unlink()
    (figure,) = draw(tmp_path, 'curves')
    (line,) = figure.axes[1].lines
    assert list(line.get_ydata()) == [0, 10, 20]
    assert 'No epoch yet: DTD: TwistNet-18.' in said(figure)


def test_lines_differ_without_colour():
    styles = [plot_results.line_style(model) for model in MODELS]
    assert len({(str(style['linestyle']), style['marker']) for style in styles}) == len(MODELS)
    assert len({(str(style['linestyle']), style['color']) for style in styles}) == len(MODELS)


def test_gate_curves_are_the_logs(tmp_path):
    for seed, shift in ((42, 0.0), (43, 0.02)):
        gates = [{block: value + shift * epoch for block, value in GATES.items()} for epoch in (1, 2)]
        write_log(make(tmp_path, model='twistnet18', seed=seed), [(1.0, 1.0, gates[0]), (1.0, 1.0, gates[1])])
    make(tmp_path, model='twistnet18_gate_0')
    make(tmp_path)
    (figure,) = draw(tmp_path, 'gate')
    assert [axes.get_title() for axes in figure.axes] == ['DTD, TwistNet-18', 'DTD, Gate 0']
    for block, value in GATES.items():
        (line,) = labelled(figure.axes[0], block)
        assert [list(v) for v in line.get_data()] == [[1, 2], pytest.approx([value + 0.01, value + 0.02])]
    starts = [labelled(axes, 'start')[0].get_ydata()[0] for axes in figure.axes]
    assert starts == pytest.approx([1 / (1 + math.exp(2)), 0.5])
    assert figure.axes[0].get_ylabel() == 'sigmoid(gate)'
    assert len({line.get_marker() for line in figure.axes[0].lines if line.get_label() in GATES}) == 4


def test_selection_curves_are_the_logs(tmp_path):
    folder = make(tmp_path, model='twistnet18')
    lines = [dict(epoch=e, train_loss=1.0, val_acc=1.0, selection={'layer3.0': 0.4 + e / 10}) for e in (1, 2)]
    (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (figure,) = draw(tmp_path, 'selection')
    (line,) = labelled(figure.axes[0], 'layer3.0')
    assert [list(v) for v in line.get_data()] == [[1, 2], pytest.approx([0.5, 0.6])]
    assert figure.axes[0].get_ylabel() == 'mean AIS weight'
    assert not labelled(figure.axes[0], 'start')


def test_long_names_of_models_do_not_run_into_each_other(tmp_path):
    for variant in ('no_spiral_', 'no_products_', ''):
        folder = make(tmp_path, model=f'stci_{variant}tf_efficientnet_lite0')
        write_log(folder, [(1.0, 1.0, {'stci.stage3': 0.12})])
    (figure,) = draw(tmp_path, 'gate')
    figure.canvas.draw()
    boxes = [axes.title.get_window_extent() for axes in figure.axes]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_initial_gate_is_the_models_own_and_unknown_where_weights_bring_gates(tmp_path):
    def build(model, **options):
        small = dict(base_width=8) if model.startswith('twistnet18') else {}
        return models.build_model(model, num_classes=5, **small, **options)

    scratch, loaded = (dict(defines=dict(pretrained=weights)) for weights in (None, 'digest'))
    for model in ('twistnet18', 'twistnet18_gate_m3'):
        for value in models.gates_of(build(model)).values():
            assert initial_gate(model, scratch, None) == pytest.approx(value)
        assert initial_gate(model, loaded, None) is initial_gate(model, {}, None) is None
    for without in ('resnet18', 'twistnet18_first_order', 'resnet10t'):
        assert initial_gate(without, scratch, None) is None

    closed = pytest.approx(0.1192, abs=1e-4)
    for given, value in ((True, closed), ('weights/resnet18.safetensors', closed), ('x.pt', None)):  # without a record
        assert initial_gate('stci_resnet18', loaded | dict(options=dict(pretrained=given)), None) == value
    for model, weights_of, value in (
        ('twistnet18', 'twistnet18_stage3', None),  # has half of the gates
        ('twistnet18_gate_0', 'twistnet18', 0.5),
        ('twistnet18_gate_0', 'twistnet18_gate_0', None),
        ('stci_test_resnet', 'test_resnet', closed),
        ('stci_test_resnet', 'stci_random_twist_test_resnet', None),
        ('stci_gate_0_test_resnet', 'stci_test_resnet', 0.5),
    ):
        origin = dict(config=dict(defines=dict(model=weights_of)), progress=dict(epoch=3))  # as pretraining saves it
        torch.save(origin | dict(state_dict=build(weights_of).state_dict()), tmp_path / 'weights.pt')
        record = build(model, pretrained=tmp_path / 'weights.pt').loaded_weights._asdict()
        assert initial_gate(model, loaded, dict(weights=record)) == value, (model, weights_of)


def test_rounding_errors_of_a_flat_gate_do_not_fill_the_panel(tmp_path):
    start = 1 / (1 + math.exp(2))
    write_log(make(tmp_path, model='twistnet18'), [(1.0, 1.0, {'layer3.0': start + 1e-9 * i}) for i in range(3)])
    (figure,) = draw(tmp_path, 'gate')
    low, high = figure.axes[0].get_ylim()
    assert high - low == pytest.approx(0.0005, rel=0.01)


def test_of_two_copies_of_a_run_the_longer_log_is_drawn(tmp_path):
    make(tmp_path / 'a', epochs=3)
    make(tmp_path / 'b', epochs=3, upto=1)
    (figure,) = draw(tmp_path / 'a', 'curves', '--run_dir', tmp_path / 'a', tmp_path / 'b')
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [3]


# ---------------------------------------------------------------------------------------------- the command


def test_one_log(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(plt.rcParams, 'savefig.dpi', drawing.STYLE['savefig.dpi'])
    folder, out = make(tmp_path / 'runs', model='twistnet18'), tmp_path / 'new' / 'figures'
    argv = ('--log_file', folder / 'log.jsonl', '--save_dir', out)
    plot_results.main(arguments(*argv))
    printed, err = capsys.readouterr()
    names = ('curves.pdf', 'curves.png', 'gate.pdf', 'gate.png')
    assert [*map(Path, printed.split())] == [out / name for name in names]
    assert [line.split(':')[1] for line in err.splitlines()] == [' selection']
    assert Image.open(out / 'gate.png').width == 1020  # 3.4 inches
    (folder / 'config.json').unlink()  # the log alone is enough
    (folder / 'results.json').unlink()
    (axes,) = figures_of(monkeypatch, *argv)['gate'].axes
    assert axes.get_title() == folder.name
    assert not labelled(axes, 'start'), 'unknown'


@pytest.mark.slow
def test_figures_do_not_depend_on_the_backend_of_a_notebook_or_on_matplotlibrc(tmp_path, monkeypatch):
    monkeypatch.setitem(plt.rcParams, 'savefig.dpi', drawing.STYLE['savefig.dpi'])
    log = make(tmp_path / 'runs', model='twistnet18') / 'log.jsonl'
    settings = ('text.usetex: True', 'font.size: 30', 'savefig.bbox: tight', 'axes.grid: True', 'font.family: fantasy')
    (tmp_path / 'matplotlibrc').write_text('\n'.join(settings))
    monkeypatch.setenv('MPLBACKEND', 'module://matplotlib_inline.backend_inline')
    monkeypatch.setenv('MATPLOTLIBRC', str(tmp_path))
    code, _, err = finish(
        start('plot_results.py', '--log_file', str(log), '--save_dir', str(tmp_path), '--plot', 'gate')
    )
    assert (code, err) == (0, '')
    plot_results.main(arguments('--log_file', log, '--save_dir', tmp_path / 'plain', '--plot', 'gate'))
    for path in (tmp_path / 'plain').iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_only_one_file_imports_matplotlib_and_seaborn():
    # Another that did, before it, would take the backend and the settings of the environment.
    found = [
        path.name
        for folder in ('.', 'assets', 'common', 'training', 'interpret')
        for path in ROOT.glob(f'{folder}/*.py')
        if re.search(r'^\s*(import|from) (matplotlib|seaborn)', path.read_text(), re.M)
    ]
    assert found == ['drawing.py']


# ---------------------------------------------------------------------------------------------- letters


def test_letters_that_one_font_lacks_are_taken_from_another(tmp_path, recwarn):
    letters = {}
    for name in ('STIXGeneral', drawing.FONT):
        letters[name] = set(font_manager.get_font(font_manager.findfont(name)).get_charmap())
    figure = plt.figure(layout='constrained')
    figure.text(0.5, 0.5, f'glass {chr(min(letters["STIXGeneral"] - letters[drawing.FONT]))}')
    drawing.save(figure, tmp_path, 'figure')
    assert not [w for w in recwarn if w.category is UserWarning]  # matplotlib warns of a letter that is missing


def test_pdf_is_vector_with_truetype_fonts(tmp_path):
    make_folds(tmp_path)
    paths = plot_results.save(draw(tmp_path, 'bar')[0], tmp_path / 'figures', 'bar')
    data = paths[0].read_bytes()
    streams = [
        zlib.decompress(s) for s in re.findall(rb'FlateDecode.*?>>\s*stream\r?\n(.*?)\r?\nendstream', data, re.S)
    ]
    whole = data + b''.join(streams)
    assert b'/FontFile2' in whole, 'TrueType'
    assert b'/Type3' not in whole
    assert b'/Subtype /Image' not in whole
    assert b'CreationDate' not in whole
    again = plot_results.save(draw(tmp_path, 'bar')[0], tmp_path / 'again', 'bar')
    assert again[0].read_bytes() == data
    assert again[1].read_bytes() == paths[1].read_bytes()


@pytest.mark.slow
def test_all_draws_what_it_can_and_names_the_rest(tmp_path, capsys):
    make_folds(tmp_path / 'runs')
    make_folds(tmp_path / 'runs', model='seresnet18')
    plot_results.main(arguments('--run_dir', tmp_path / 'runs', '--save_dir', tmp_path / 'f', '--plot', 'all'))
    out, err = capsys.readouterr()
    names = [Path(line).name for line in out.splitlines()]
    assert names == [f'{plot}.{suffix}' for plot in ('bar', 'forest', 'scatter', 'curves') for suffix in ('pdf', 'png')]
    assert all(Path(line).stat().st_size for line in out.splitlines())
    assert [line.split(':')[:2] for line in err.splitlines()] == [
        ['not drawn', ' radar'], ['not drawn', ' ablation'], ['not drawn', ' gate'], ['not drawn', ' selection']
    ]  # fmt: skip


def test_recipes_have_figures_of_their_own(tmp_path, capsys, monkeypatch):
    make_folds(tmp_path / 'a')
    make(tmp_path / 'b', acc=90.0, lr=0.5)
    make(tmp_path / 'c', model='twistnet18', done=False, lr=0.7)
    options = ('--run_dir', tmp_path / 'a', tmp_path / 'b', tmp_path / 'c')
    figures = figures_of(monkeypatch, *options, '--plot', 'bar')
    assert list(figures) == ['bar_1', 'bar_2']
    assert [[bar.get_width() for bar in f.axes[0].patches] for f in figures.values()] == [[45], [90]]
    assert '2 epochs, 64 px, from scratch, lr 0.01' in texts(figures['bar_1'])
    assert '2 epochs, 64 px, from scratch, lr 0.5' in texts(figures['bar_2'])
    assert capsys.readouterr().err.splitlines()[-1] == 'not drawn: bar_3: no run is complete'
    figures = figures_of(monkeypatch, *options, '--plot', 'curves')
    assert list(figures) == ['curves_1', 'curves_2', 'curves_3']
    assert [len(figure.axes[1].lines) for figure in figures.values()] == [4, 1, 1]


def test_torn_files_are_named_and_left_out(tmp_path, capsys):
    make_folds(tmp_path)
    log = tmp_path / 'dtd_fold1_resnet18_seed42' / 'log.jsonl'
    whole = log.read_bytes()
    nan = b'{"epoch": 3, "train_loss": NaN, "val_acc": 1}'
    for torn in (b'{"epoch": 3, "trai', b'[]', b'\xff', nan, b'{"epoch": 3}'):
        log.write_bytes(whole + torn)
        (figure,) = draw(tmp_path, 'curves')
        assert f'left out: {log} line 3' in capsys.readouterr().err
        assert all(len(line.get_xdata()) == 2 for line in figure.axes[0].lines)
    (tmp_path / 'dtd_fold2_resnet18_seed42' / 'results.json').write_text('{')
    (figure,) = draw(tmp_path, 'bar')
    assert figure.axes[0].patches[0].get_width() == 45.5
    assert 'results.json: damaged' in capsys.readouterr().err


@pytest.mark.slow
def test_every_model_on_every_data_set_fits(tmp_path):
    for dataset in DATASETS:
        for model in MANY:
            make(tmp_path, dataset, model, acc=10.0 + len(model))
    (figure,) = draw(tmp_path, 'bar')
    check_page(figure)
    labels = {entry['label'] for entry in [*DATASETS.values(), *(MODELS[name] for name in MANY)]}
    assert labels <= {text.split('\n')[0] for text in texts(figure)}
    for axes in figure.axes:
        assert apart([t.get_window_extent() for t in axes.get_yticklabels() if t.get_text()])
        assert apart([t.get_window_extent() for t in axes.get_xticklabels() if t.get_text()])
    (figure,) = draw(tmp_path, 'forest')
    check_page(figure)
    (figure,) = draw(tmp_path, 'radar')
    check_page(figure)
    assert len(figure.axes) == 6
    assert [len(axes.get_legend().get_texts()) for axes in figure.axes] == [5, 5, 5, 5, 5, 2]


@pytest.mark.slow
def test_what_does_not_fit_a_page_goes_on_in_another(tmp_path, monkeypatch):
    for dataset in DATASETS:
        for model in ('resnet18', 'twistnet18'):
            make(tmp_path, dataset, model)
    first, second = draw(tmp_path, 'curves')
    assert [axes.get_title() for axes in first.axes[::2] + second.axes[::2]] == [d['label'] for d in DATASETS.values()]
    assert 'title (page 1 of 2)' in texts(first)
    assert 'title (page 2 of 2)' in texts(second)
    check_page(first)
    assert [*figures_of(monkeypatch, '--run_dir', tmp_path, '--plot', 'curves')] == ['curves', 'curves_page2']


@pytest.mark.slow
@pytest.mark.parametrize('plot', ['forest', 'scatter', 'curves', 'gate', 'ablation'])
def test_22_models_fit(tmp_path, plot):
    for model in MANY:
        make(tmp_path, 'dtd', model)
    (figure,) = draw(tmp_path, plot)
    check_page(figure)
    shown = {label for text in texts(figure) for label in text.split(', ')}
    wanted = [name for name in MANY if plot in ('forest', 'scatter', 'curves') or name.startswith('twistnet18')]
    wanted = wanted[plot == 'forest' :]  # without the baseline
    assert {MODELS[name]['label'] for name in wanted} <= shown


def test_what_cannot_be_drawn_is_one_line(tmp_path):
    log = make(tmp_path / 'runs', done=False) / 'log.jsonl'
    torn = make(tmp_path / 'torn') / 'log.jsonl'
    torn.write_text('{')
    (make(tmp_path / 'begun', done=False) / 'log.jsonl').unlink()
    for dataset in ('dtd', 'fmd', 'cub200'):
        make(tmp_path / 'two', dataset, done=dataset != 'cub200')
    runs_of = ('--run_dir', tmp_path / 'runs')
    for argv, words in (
        (('--run_dir', tmp_path), 'holds no run'),
        ((*runs_of, '--plot', 'bar'), 'bar: no run is complete'),
        ((*runs_of, '--plot', 'gate'), 'gate: no gates'),
        ((*runs_of, '--models', 'twist'), "no run of 'twist'"),
        ((*runs_of, '--models', 'twistnet18'), 'no run of twistnet18'),
        (('--log_file', tmp_path / 'log.jsonl'), 'no such log'),
        (('--log_file', log, '--plot', 'bar'), 'needs --run_dir'),
        (('--log_file', torn), 'holds no complete epoch'),
        (('--run_dir', tmp_path / 'begun'), 'no run has finished an epoch'),
        ((*runs_of, '--plot', 'gate', '--dataset', 'dtd'), '--dataset: only for --plot interaction'),
        (('--run_dir', tmp_path / 'two', '--plot', 'radar'), 'at least 3 data sets; there are 2'),
    ):
        with pytest.raises(RunError, match=words) as caught:
            plot_results.main(arguments('--save_dir', tmp_path / 'f', *argv))
        assert '\n' not in str(caught.value)
        assert not (tmp_path / 'f').exists()
