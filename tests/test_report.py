"""The promises of report.py: its numbers are those of the tables, it is one file, and a browser shows it as meant."""

import csv
import html
import io
import os
import re
import shlex
import statistics
import time

import pytest
from browser import CHROMIUM, Browser
from conftest import ROOT, TINY, make_run, write_image
from test_evaluate import write_run

import evaluate
import models
import report
import summarize_runs
import train
from common import options, runs
from common.drawing import plt
from common.errors import RunError

SCRATCH = ROOT / 'results' / 'scratch'
MINUS = '\N{MINUS SIGN}'


@pytest.fixture(autouse=True)
def _fast(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, 'fsync', lambda _: None)
    yield
    plt.close('all')


def write(run_dir, out, *more) -> str:
    """The page."""
    report.main(report.get_args_parser().parse_args(['--run_dir', str(run_dir), '--out', str(out), *map(str, more)]))
    return out.read_text()


def text_of(page: str) -> str:
    return ' '.join(html.unescape(re.sub('<[^>]*>', ' ', page)).split())


def tables_of(page: str) -> list[list[list[str]]]:
    """The cells of each table, by row."""
    found = []
    for table in re.findall('<table>.*?</table>', page, re.DOTALL):
        rows = re.findall('<tr>.*?</tr>', table, re.DOTALL)
        found.append([[text_of(cell) for cell in re.findall('<t[dh].*?</t[dh]>', row, re.DOTALL)] for row in rows])
    return found


def csv_of(script, capsys, *argv) -> list[dict]:
    capsys.readouterr()
    parse = getattr(script, 'parse_args', None) or script.get_args_parser().parse_args
    script.main(parse([*map(str, argv), '--csv']))
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


@pytest.fixture(scope='module')
def scratch(tmp_path_factory):
    """The page of results/scratch."""
    folder = tmp_path_factory.mktemp('scratch')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write(SCRATCH, folder / 'report.html')
    return folder / 'report.html'


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    """The page of a short run on the synthetic textures."""
    folder = tmp_path_factory.mktemp('demo')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, 'tiny', TINY)
        argv = ('--model', 'tiny', '--epochs', '1', '--img_size', '32', '--num_workers', '0', '--run_dir', folder)
        train.train(options.parse_args([*map(str, argv)]))
        write(folder, folder / 'report.html')
    return folder / 'report.html'


# ---------------------------------------------------------------------------------------------- numbers


def test_the_numbers_are_those_of_the_tables(scratch, capsys):
    page = scratch.read_text()
    means, *classes = tables_of(page)
    rows = {row['model']: row for row in csv_of(summarize_runs, capsys, '--run_dir', SCRATCH, '--intervals')}
    names = dict(resnet18='ResNet-18', resnet18_zero_init='ResNet-18 0-init', twistnet18='TwistNet-18')
    names |= dict(twistnet18_no_spiral='w/o Spiral Twist')
    values, differences = means[1 : 1 + len(names)], means[2 + len(names) :]
    measured, tested = ({row[0]: row[-3:] for row in part} for part in (values, differences))
    assert [measured[name][0][:4] for name in names.values()] == ['36.4', '40.5', '35.1', '37.5']
    for model, name in names.items():
        mean, sd, low, high = (float(rows[model][key]) for key in ('mean', 'sd', 'mean_low95', 'mean_high95'))
        assert measured[name] == [f'{mean:.1f} ± {sd:.1f}', f'{low:.1f}', f'{high:.1f}']
        if name in tested:
            value, low, high, p = (float(rows[model][key]) for key in ('difference', 'low95', 'high95', 'p_holm'))
            shown = [f'{value:+.1f} ({p:.3f})', f'{low:+.1f}', f'{high:+.1f}']
            assert tested[name] == [text.replace('-', MINUS) for text in shown]
    assert tested.keys() == {*names.values()} - {'ResNet-18'}
    scores = csv_of(evaluate, capsys, '--run_dir', SCRATCH, '--no-figures')
    for model, table in zip(names, classes):
        runs_of = [row for row in scores if row['model'] == model]
        overall = [float(row['accuracy']) for row in runs_of if not row['class']]
        assert f'Accuracy {statistics.mean(overall):.1f} ± {statistics.stdev(overall):.1f}' in text_of(page)
        for name, n, precision, recall, _, auc, right, predicted in table[1:]:
            own = [row for row in runs_of if row['class'] == name]
            sums = [str(sum(int(row[key]) for row in own)) for key in ('n', 'right', 'predicted')]
            assert [n, right, predicted] == sums
            for key, shown in dict(precision=precision, recall=recall, auc=auc).items():
                values = [float(row[key]) for row in own if row[key]]
                assert shown == f'{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}'
    *classes, runs_shown = classes
    assert len(classes) == len(names), 'a table of each model, then one of the runs'
    assert {tuple(row[1:3]) for row in runs_shown[1:]} == {('complete', '100/100')}


def test_the_page_is_one_file_with_every_note(scratch, capsys):
    page, text = scratch.read_text(), text_of(scratch.read_text())
    assert '://' not in page
    assert not re.search(r'(src|href|url\()\s*=?\s*"?(?!#|data:|"#)[\w/]', page)
    assert len(page) < 8e6
    capsys.readouterr()
    (table,) = summarize_runs.read_tables(
        summarize_runs.get_args_parser().parse_args(['--run_dir', str(SCRATCH), '--intervals'])
    )
    assert all(note in text for note in summarize_runs.notes_of(table))
    assert '--models resnet18,twistnet18_no_spiral,twistnet18 --folds 1,2,3,4,5 --seeds 42 --data_dir data/fmd' in text
    assert 'd9eef07db7fc20d3fb512767de655d1ef36bf840 (4 runs)' in text
    assert '12 of the pictures cannot be read, such as data/fmd/image/' in text, 'the data are not in this folder'
    assert '<img' not in page


# ---------------------------------------------------------------------------------------------- runs


def own_run(tmp_path):
    """A run on photographs whose model takes two of six for another class."""
    for i in range(6):
        write_image(tmp_path / 'photographs' / f'{i}.png', i)
    folder = write_run(tmp_path / 'runs', [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 0, 2], classes=['<b>', 'b & c', 'd'])
    config = runs.read_json(folder / 'config.json')
    given = dict(data_dir=str(tmp_path / 'photographs'), given=['data_dir'])
    runs.write_json(folder / 'config.json', config | dict(options=config['options'] | given))
    return folder


def test_of_a_single_run_what_is_right_and_wrong_comes_first(tmp_path):
    own_run(tmp_path)
    page = write(tmp_path / 'runs', tmp_path / 'report.html')
    text = text_of(page)
    assert '4 of 6 test images are right.' in text
    assert '<b>' in text, 'the name of a class, not a tag'
    assert text.index('4 of 6 test images') < text.index('100 epochs, 224 px')
    assert len(re.findall('<img', page)) == 2
    assert 'truth: <b> predicted: b & c probability 90 % 1.png' in text
    assert 'cannot be read' not in text
    (tmp_path / 'photographs' / '1.png').unlink()
    page = write(tmp_path / 'runs', tmp_path / 'report.html')
    assert len(re.findall('<img', page)) == 1
    assert f'1 of the pictures cannot be read, such as {tmp_path}/photographs/1.png.' in text_of(page)
    (tmp_path / 'photographs').rename(tmp_path / 'moved')
    write_image(tmp_path / 'moved' / '1.png', 1)
    page = write(tmp_path / 'runs', tmp_path / 'report.html', '--data_dir', tmp_path / 'moved')
    assert len(re.findall('<img', page)) == 2


def test_runs_that_are_not_complete_appear_with_their_curves(tmp_path):
    log = [dict(epoch=epoch, train_loss=2 / epoch, val_acc=10.0 * epoch, seconds=1.5) for epoch in (1, 2, 3)]
    make_run(tmp_path, log=log, test_acc=40.0)
    make_run(tmp_path, model='twistnet18', complete=False, log=log)
    (make_run(tmp_path, model='seresnet18', complete=False, log=log[:2]) / runs.DIVERGED_MARK).touch()
    text = text_of(page := write(tmp_path, tmp_path / 'report.html'))
    rows = {row[0]: row[1:] for row in tables_of(page)[-1]}
    assert rows['dtd_fold1_twistnet18_seed42'] == ['interrupted', '3/100', '4', report.NONE, report.NONE]
    assert rows['dtd_fold1_seresnet18_seed42'] == ['diverged', '2/100', '3', report.NONE, report.NONE]
    assert rows['dtd_fold1_resnet18_seed42'][:3] == ['complete', '3/100', '90']
    assert 'DTD: no complete run of TwistNet-18' in text
    assert 'Learning curves' in text
    assert 'TwistNet-18 (1 of 1)' in text, 'named below the curves as not at its last epoch'
    assert 'test_predictions.csv: missing' in text, 'why there are no scores'


def test_scores_name_the_recipe_that_tells_them_apart(tmp_path):
    write_run(tmp_path, [0, 1, 2], [0, 1, 1])
    folder = write_run(tmp_path, [0, 1, 2], [0, 1, 1], seed=43)
    config = runs.read_json(folder / 'config.json')
    config['defines']['train_on'] = 'trainval'
    runs.write_json(folder / 'config.json', config)
    text = text_of(write(tmp_path, tmp_path / 'out.html'))
    assert text.count('(train_on trainval)') == 3, 'of the scores, the confusions and the mistakes'


def test_the_command_of_a_run_gives_its_options(tmp_path, monkeypatch):
    argv = '--data_dir "my photos" --dataset folder --epochs 7 --crop_scale 0.2 0.9 --ema --no-compile --import net.py'
    for fold, seed in ((1, 5), (2, 5)):
        words = [*shlex.split(argv), '--model', 'resnet18', '--fold', str(fold), '--seed', str(seed), '--force']
        args = options.parse_args(words)
        folder = make_run(tmp_path, model='resnet18', fold=fold, seed=seed)
        config = runs.read_json(folder / 'config.json')
        runs.write_json(folder / 'config.json', config | dict(options=vars(args)))
    page = write(tmp_path, tmp_path / 'report.html')
    _, script, *words = shlex.split(text_of(re.search('<pre>.*?</pre>', page, re.DOTALL)[0]))
    assert [script, *words[:6]] == ['run_all.py', '--models', 'resnet18', '--folds', '1,2', '--seeds', '5']
    again = options.parse_args([*words[6:], '--model', 'resnet18', '--fold', '2', '--seed', '5', '--force'])
    assert vars(again) == vars(args)


def test_every_writes_again_until_runs_end(tmp_path, monkeypatch):
    log = [dict(epoch=1, train_loss=2.0, val_acc=10.0, seconds=1.0)]
    make_run(tmp_path / 'runs', complete=False, log=log)
    out, now, seen = tmp_path / 'new' / 'report.html', [1000.0], []

    def sleep(seconds):
        page = out.read_text()
        seen.append((seconds, re.findall('"refresh" content="(.*?)"', page), 'complete (1 run)' in page))
        now[0] += seconds
        if len(seen) == 1:
            make_run(tmp_path / 'runs', log=log)
        if len(seen) == 3:  # the next run of the grid begins, and ends 60 s later
            (tmp_path / 'runs' / 'dtd_fold2_resnet18_seed42').mkdir()
            (tmp_path / 'runs' / 'dtd_fold2_resnet18_seed42' / runs.LOG).touch()
        if len(seen) == 5:
            make_run(tmp_path / 'runs', fold=2)

    monkeypatch.setattr(runs, 'is_claimed', lambda _: len(seen) == 1)  # complete, but its process has still to end
    monkeypatch.setattr(time, 'sleep', sleep)
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    text = text_of(write(tmp_path / 'runs', out, '--every', '30'))
    assert seen[0] == (30, ['30'], False)
    assert seen[1:5] == [(30, ['30'], True)] * 4, 'another run may begin'
    assert [seconds for seconds, *_ in seen[5:]] == [30, 0], 'for a minute none did'
    assert seen[-1][1] == []
    assert 'complete (2 runs)' in text
    assert 'again every' not in text
    assert not list(out.parent.glob('*.tmp'))


def test_what_cannot_be_shown_is_one_line(tmp_path):
    make_run(tmp_path / 'begun', complete=False)
    make_run(tmp_path / 'made')
    (tmp_path / 'foreign').mkdir()
    for run_dir, out, more, message in (
        (tmp_path / 'begun', 'report.html', [], 'no complete run'),
        (tmp_path / 'foreign', 'report.html', [], 'holds no run'),
        (tmp_path / 'made', 'foreign', [], 'foreign: cannot be written'),
        (tmp_path / 'made', 'report.html', ['--every', '0'], '--every 0 must be from 1'),
        (tmp_path / 'made', 'report.html', ['--models', 'resnet50'], "no run of 'resnet50'"),
    ):
        with pytest.raises(RunError, match=message):
            write(run_dir, tmp_path / out, *more)
    assert not (tmp_path / 'report.html').exists()


# ---------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp('chromium'))
    yield found
    found.close()


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason='no Chromium')
COLUMN = '[...document.querySelectorAll("tbody")].find(body => body.rows.length > 1).rows'


@needs_chromium
@pytest.mark.parametrize('name', ['scratch', 'demo'])
def test_a_browser_shows_the_page(name, browser, request):
    path = request.getfixturevalue(name)
    assert path.stat().st_size < 3e6
    browser.errors.clear()
    browser.requests.clear()
    for width in (1280, 390):
        browser.size(width)
        browser.open(path)
        assert browser.run('innerWidth') == width
        assert browser.run('document.documentElement.scrollWidth') <= width
        cut = 'outer => outer.querySelector("svg") && outer.scrollHeight > outer.clientHeight + 20'  # by a scroll bar
        assert browser.run(f'[...document.querySelectorAll(".wide")].filter({cut}).length') == 0, 'figures are whole'
    assert browser.errors == []
    assert {url for url in browser.requests if not url.startswith('data:')} == {path.as_uri()}
    pictures = browser.run('[...document.images].map(image => image.complete && image.naturalWidth > 0)')
    assert all(pictures)
    assert len(pictures) == dict(scratch=0, demo=12)[name]
    assert browser.run('document.querySelectorAll("svg image").length') > 0, 'the colours of the confusions'


@needs_chromium
def test_a_click_sorts_both_ways(scratch, browser):
    browser.open(scratch)
    rows = '[...document.querySelectorAll("table")].at({}).querySelectorAll("tbody:not(:has(th)) tr")'
    cells = f'[...{rows}].map(row => row.cells[{{}}].textContent)'
    click = '[...document.querySelectorAll("table")].at({}).querySelectorAll("button")[{}].click()'

    def after(table, column):
        browser.run(click.format(table, column))
        return browser.run(cells.format(table, column))

    means, differences = ['40.5', '37.5', '36.4', '35.1'], ['+4.1', '+1.1', f'{MINUS}1.3']
    assert [text[:4] for text in after(0, 3)] == means + differences, 'each section for itself'
    assert [text[:4] for text in after(0, 3)] == means[::-1] + differences[::-1]
    others = ['ResNet-18 0-init', 'TwistNet-18', 'w/o Spiral Twist']
    names = ['ResNet-18', *others, *others]
    assert after(0, 0) == names
    seconds = list(map(int, after(-1, 3)))
    assert seconds == sorted(seconds, reverse=True)
    assert list(map(int, after(-1, 3))) == sorted(seconds)
    assert browser.run('document.querySelectorAll("[aria-sort]").length') == 2, 'one for each table'


@needs_chromium
def test_figures_follow_the_dark_mode_of_the_system(scratch, browser):
    colors = {}
    for scheme in ('light', 'dark'):
        features = [dict(name='prefers-color-scheme', value=scheme)]
        browser.send('Emulation.setEmulatedMedia', features=features)
        browser.open(scratch)
        text = browser.run('getComputedStyle(document.querySelector("svg text")).fill')
        strokes = browser.run('[...document.querySelectorAll("svg path")].map(path => getComputedStyle(path).stroke)')
        colors[scheme] = text, 'rgb(0, 0, 0)' in strokes, 'rgb(255, 255, 255)' in strokes
    browser.send('Emulation.setEmulatedMedia', features=[])
    assert colors == dict(light=('rgb(0, 0, 0)', True, False), dark=('rgb(255, 255, 255)', False, True))


@needs_chromium
def test_a_live_page_is_loaded_again_in_its_place(scratch, browser, tmp_path):
    page = tmp_path / 'live.html'
    page.write_text(scratch.read_text().replace('<title>', '<meta http-equiv="refresh" content="1"><title>'))
    browser.open(page)
    browser.run('scrollTo(0, 2500)')
    browser.events.clear()
    browser.wait('Page.loadEventFired')
    assert browser.run('new Promise(done => setTimeout(() => done(scrollY), 200))') == 2500
