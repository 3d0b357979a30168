"""The promises of plot_results.py: what is drawn is what was logged, for every run, in PDF and PNG."""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from conftest import finish, start
from PIL import Image

import plot_results
import runs


def make(run_dir, name, accuracies):
    folder = run_dir / name
    folder.mkdir(parents=True)
    runs.write_json(folder / 'config.json', {})
    lines = [dict(epoch=i + 1, train_loss=2.0 / (i + 1), val_acc=acc) for i, acc in enumerate(accuracies)]
    runs.write_log(folder / 'log.jsonl', lines)


def test_curves_show_every_run_as_logged(tmp_path):
    make(tmp_path, 'a', [10.0, 20.0, 90.0])
    make(tmp_path, 'b', [30.0])
    figure = plot_results.plot_curves(tmp_path)
    left, right = figure.axes
    drawn = {line.get_label(): line for line in right.lines}
    assert list(drawn) == ['a', 'b']
    assert list(drawn['a'].get_xdata()) == [1, 2, 3]
    assert list(drawn['a'].get_ydata()) == [10.0, 20.0, 90.0]
    assert list(left.lines[0].get_ydata()) == [2.0, 1.0, 2.0 / 3]
    assert right.get_ylim()[0] == left.get_ylim()[0] == 0
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['a', 'b']
    styles = {(line.get_color(), line.get_linestyle()) for line in right.lines}
    assert len({style for _, style in styles}) == 2, 'told apart in grey print too'
    plt.close(figure)


def test_command_writes_pdf_and_png_and_prints_their_paths(tmp_path):
    make(tmp_path / 'runs', 'a', [10.0, 20.0])
    argv = ('--run_dir', str(tmp_path / 'runs'), '--save_dir', str(tmp_path / 'new' / 'figures'), '--plot', 'curves')
    code, out, err = finish(start('plot_results.py', *argv))
    assert (code, err) == (0, '')
    pdf, png = out.split()
    assert Path(pdf).read_bytes()[:5] == b'%PDF-'
    assert Image.open(png).width > 1000


def test_what_cannot_be_drawn_is_named(tmp_path):
    with pytest.raises(runs.RunError, match='holds no run'):
        plot_results.plot_curves(tmp_path)
    make(tmp_path, 'a', [1.0])
    (tmp_path / 'a' / 'log.jsonl').unlink()
    with pytest.raises(runs.RunError, match='no run has finished an epoch'):
        plot_results.plot_curves(tmp_path)
    runs.write_log(tmp_path / 'a' / 'log.jsonl', [{'epoch': 1}])
    with pytest.raises(runs.RunError, match='a line lacks'):
        plot_results.plot_curves(tmp_path)
    (tmp_path / 'file').touch()
    make(tmp_path, 'b', [1.0])
    (tmp_path / 'a' / 'log.jsonl').unlink()
    with pytest.raises(runs.RunError, match='cannot be written'):
        plot_results.save(plot_results.plot_curves(tmp_path), tmp_path / 'file' / 'x', 'curves')
