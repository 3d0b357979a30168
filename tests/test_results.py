"""The promise of results/: RESULTS.md and results/README.md state what `make results` prints of the runs kept there."""

import csv
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, make_run, run

import summarize_runs
from common import runs
from common.errors import RunError
from models import build_model
from results import folds, gates, keep, start

SCRIPTS = {
    'summarize_runs.py': summarize_runs,
    '-m results.gates': gates,
    '-m results.folds': folds,
    '-m results.start': start,
}
RECIPE = re.search(r'^results: .*\n((?:\t.*\n)+)', (ROOT / 'Makefile').read_text(), re.M)[1].replace('\\\n', ' ')
TABLES = re.findall(r'bin/python (\S+\.py|-m \S+) (.*) > (\S+)', RECIPE)


def rounded(text: str) -> str:
    """A CSV with six digits of each number: the last ones depend on the version of scipy."""
    return re.sub(r'-?\d+\.\d+(e-?\d+)?', lambda number: f'{float(number[0]):.6g}', text)


PAGE, DETAILS = ((ROOT / name).read_text() for name in ('RESULTS.md', 'results/README.md'))


def test_the_tables_are_found():
    assert {file for _, _, file in TABLES} == {
        str(path.relative_to(ROOT))
        for path in (ROOT / 'results').glob('*.*')
        if path.suffix in ('.txt', '.csv', '.md') and path.name != 'README.md'
    }


@pytest.mark.parametrize(('script', 'arguments', 'file'), TABLES)
def test_a_table_is_that_of_the_runs(script, arguments, file, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    SCRIPTS[script].main(SCRIPTS[script].get_args_parser().parse_args(arguments.split()))
    printed, kept = capsys.readouterr().out, (ROOT / file).read_text()
    if file.endswith('.csv'):
        assert rounded(printed) == rounded(kept)
    else:
        assert printed == kept
        assert printed in (PAGE if file == 'results/scratch.md' else DETAILS), 'the page shows another one'


@pytest.mark.parametrize(('file', 'page'), [('probes.csv', PAGE), ('shots.csv', DETAILS)], ids=['probes', 'shots'])
def test_the_page_has_the_figures_of_frozen_features(file, page):
    for row in csv.DictReader((ROOT / 'results' / file).open()):
        assert f'{float(row["mean"]):.1f} ± {float(row["sd"]):.1f}' in page, row


def test_the_page_has_the_figures_of_the_pilots():
    files = sorted((ROOT / 'results').glob('pilot_*/*/results.json'))
    assert len(files) >= 4
    for file in files:
        assert f'{runs.read_json(file)["best_val_acc"]:.1f}' in DETAILS, file


def change(folder, name: str = 'results.json', **values) -> None:
    """Change the results of a run, or another of its records."""
    runs.write_json(folder / name, runs.read_json(folder / name) | values)


def test_every_run_is_shown_by_fold_and_seed(tmp_path, capsys):
    made = [('fmd', 2, 42, 'resnet18', 50), ('dtd', 2, 42, 'resnet18', 51)]
    made += [('dtd', 1, 43, 'twistnet18', 52), ('dtd', 1, 43, 'resnet18', 53)]
    for dataset, fold, seed, model, test in made:
        cell = dict(dataset=dataset, fold=fold, seed=seed, model=model)
        change(make_run(tmp_path, **cell, test_acc=float(test), best_val_acc=60.0), test_acc_last=54.5)
    make_run(tmp_path, fold=3, complete=False)
    probe = make_run(tmp_path, model='resnet18+knn')
    folds.main(folds.get_args_parser().parse_args([str(tmp_path)]))
    captured = capsys.readouterr()
    assert [line.split() for line in captured.out.splitlines()] == [
        ['Data', 'fold', 'seed', 'resnet18', 'twistnet18'],
        ['DTD', '1', '43', '53.0', '(60.0),', '54.5', '52.0', '(60.0),', '54.5'],
        ['DTD', '2', '42', '51.0', '(60.0),', '54.5', 'not', 'made'],
        ['FMD', '2', '42', '50.0', '(60.0),', '54.5', 'not', 'made'],
    ]
    assert captured.err == f'left out: {probe}: has no epochs\n'
    make_run(tmp_path / 'begun', complete=False)
    with pytest.raises(RunError, match='no complete run'):
        folds.cells_of(tmp_path / 'begun')


def test_where_the_gates_end(tmp_path, capsys):
    def log(*values):
        return [dict(epoch=epoch, gates={'layer3.0': value, 'layer4.0': 0.12}) for epoch, value in enumerate(values, 1)]

    make_run(tmp_path / 'a', model='twistnet18', log=log(0.13, 0.2))
    make_run(tmp_path / 'a', model='twistnet18', fold=2, log=log(0.1))
    make_run(tmp_path / 'b', model='twistnet18', fold=2, log=log(0.9, 0.119))
    make_run(tmp_path / 'b', model='twistnet18', fold=3, log=log(0.9), complete=False)
    make_run(tmp_path / 'b', model='twistnet18', fold=4, complete=False)  # before its first epoch has ended
    make_run(tmp_path / 'b', fold=1, log=[dict(epoch=1, gates={})])
    make_run(tmp_path / 'b', model='twistnet18_gate_0', log=log(0.5))
    make_run(tmp_path / 'b', model='twistnet18_stage3', pretrained='of a run with gates', log=log(0.5))
    gates.main(gates.get_args_parser().parse_args([str(tmp_path / 'a'), str(tmp_path / 'b')]))
    captured = capsys.readouterr()
    first, variant, second = (line.split() for line in captured.out.splitlines()[1:])
    largest, other = math.log(0.2 / 0.8) + 2, math.log(0.1 / 0.9) + 2
    moves = [f'{(largest + other) / 2:+.3f}', '+0.008', f'{largest:+.3f}', '-']  # without a recipe none by decay
    assert first == ['DTD', 'TwistNet-18', '0.01', '1', '-', '100', '2', '0.1000', 'to', '0.2000', *moves]
    assert second == [*first[:6], '1', '0.1190', 'to', '0.1200', '-0.002', '+0.008', '+0.008', '-']
    assert variant[:3] == ['DTD', 'Gate', '0']
    assert variant[8:11] == ['0.1200', 'to', '0.5000']
    assert variant[-2] == f'{math.log(0.12 / 0.88):+.3f}'  # the start is 0.5
    why = 'its weights may have brought gates of their own'
    assert captured.err == f'left out: {tmp_path}/b/dtd_fold1_twistnet18_stage3_seed42: {why}\n'


def test_without_gates_an_error_says_so(tmp_path):
    make_run(tmp_path, log=[dict(epoch=1, gates={})])
    make_run(tmp_path, fold=2, log=[])
    with pytest.raises(RunError, match='no complete run has gates'):
        gates.last_gates(tmp_path)


def test_weight_decay_alone_is_that_of_torch():
    gate = torch.nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
    optimizer = torch.optim.SGD([gate], momentum=0.9, nesterov=True, weight_decay=1e-2)
    rates = [0.5, 0.1, 0.3]
    for rate in rates:
        optimizer.param_groups[0]['lr'] = rate
        for _ in range(7):
            gate.grad = torch.zeros_like(gate)
            optimizer.step()
    assert gates.decayed(-2.0, rates, 7, 1e-2, 0.9) == pytest.approx(gate.item(), rel=1e-12)
    assert gate.item() > -1.8


def test_the_decay_of_a_run_is_that_of_its_recipe(tmp_path):
    epochs = [dict(epoch=1, lr=0.1, gates={'layer3.0': 0.13})]
    folder = make_run(tmp_path, model='twistnet18', log=epochs)
    recipe = runs.read_json(folder / 'config.json')['options']
    recipe |= dict(gate_lr=10.0, weight_decay=1e-3, momentum=0.0, batch_size=32)
    change(folder, 'config.json', options=recipe)
    ((end,),) = gates.last_gates(tmp_path).values()
    assert end.by_decay == pytest.approx(2 * (1e-3 * 0.1 * 10), rel=1e-9)  # one step of 60 images in batches of 32
    change(folder, 'config.json', options=recipe | dict(opt='adamw'))
    ((end,),) = gates.last_gates(tmp_path).values()
    assert math.isnan(end.by_decay)


def kept_run(folder, model, seed, right, last):
    """A run as results/keep.py leaves it."""
    gate = {'layer3.0': 0.2} if 'twist' in model else {}
    log = [dict(epoch=1, grad_norm=2.0, train_loss=3.0, val_acc=4.0, gates=gate)]
    run = make_run(folder, model=model, seed=seed, test_acc=100 * np.mean(right), best_val_acc=50.0, log=log)
    change(run, test_acc_last=last, n_test=len(right))
    (run / keep.RIGHT).write_text(''.join(map(str, right)) + '\n')
    runs.write_json(run / keep.SCALES, {'layer1.0': 0.01 * seed})
    return run


def test_the_effects_of_start_and_branch_are_contrasts_by_images_and_by_seeds(tmp_path, capsys):
    right = {start.ONE: [12, 14], start.ZERO: [6, 6], start.TWIST: [12, 12], start.TWIST_ZERO: [10, 8]}  # of 20 images
    for model, counts in right.items():
        for seed, count in zip((42, 43), counts):
            kept_run(tmp_path, model, seed, [1] * count + [0] * (20 - count), last=float(count))
    kept_run(tmp_path, start.NO_SPIRAL, 42, [1] * 20, last=0.0)  # of one seed: in no effect
    found = start.effects(start.read_models(tmp_path))
    values = {name.partition(',')[0].partition(':')[0]: test['value'] for name, test in found.items()}
    assert values == pytest.approx(
        {  # points: an image is five
            'start (one - zero)': 25.0,
            'branch (with - without)': 5.0,
            'interaction': 20.0,
            'start without the branch': 35.0,
            'start with the branch': 15.0,
            'branch at one': -5.0,
            'branch at zero': 15.0,
            'published pair': 30.0,
        }
    )
    branch = found['branch at zero']  # +20 and +10 points
    reach = 12.7062 * 5  # t of one degree of freedom, and the standard error
    assert (branch['low'], branch['high']) == pytest.approx((15 - reach, 15 + reach), rel=1e-4)
    assert branch['last'] == 3.0
    low, high = branch['images']  # images 7 to 8 are won by both seeds, 9 and 10 by one: SD of the mean 0.0757
    assert (low, high) == pytest.approx((15 - 1.96 * 7.5, 15 + 1.96 * 7.5), abs=2.5)
    assert [name for name, test in found.items() if 'p_holm' in test] == start.PRIMARY
    start.main(start.get_args_parser().parse_args([str(tmp_path)]))
    printed = capsys.readouterr().out
    assert re.search(r'resnet18_zero_init +42, 43 +30.0, 30.0 +30.00', printed)
    assert 'branch at zero' in printed
    assert re.search(r'last BatchNorm +layer1.0 +one by decay\nresnet18 +0.425 +nan\n', printed)


def test_the_pilots_are_compared_at_each_rate_and_each_model_at_its_own_best(tmp_path, capsys):
    def pilot(folder, model, lr, val, clip=1.0):
        made = kept_run(tmp_path / folder, model, 7, [1, 0], last=0.0)
        change(made, best_val_acc=val)
        change(made, 'config.json', options=dict(lr=lr, clip_grad=clip))

    for model, low, high in (
        (start.ONE, 40, 30),
        (start.ZERO, 20, 30),
        (start.TWIST, 41, 31),
        (start.TWIST_ZERO, 31, 36),
    ):
        pilot('low', model, 0.1, low)
        pilot('high', model, 0.2, high)
    pilot('no_clip', start.ZERO, 0.1, 90, clip=0.0)  # in the table, but the best rate is that of clipped runs
    folders = [tmp_path / name for name in ('low', 'high', 'no_clip')]
    start.print_pilots([start.read_models(folder) for folder in folders])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[:2] for line in lines] == [['0.1', '1'], ['0.2', '1'], ['0.1', '0'], ['own', 'best']]
    assert lines[0][2:] == ['40.0', '(50.0)', '20.0', '(50.0)', '41.0', '(50.0)', '31.0', '(50.0)', *lines[0][10:]]
    assert [line[-5] for line in lines] == ['33.0', '31.8', '-', '36.8']
    assert [line[-4:] for line in lines] == [
        ['+15.0', '+6.0', '+10.0', '+21.0'],
        ['-2.5', '+3.5', '+5.0', '+1.0'],
        ['-'] * 4,
        ['+7.5', '+3.5', '+5.0', '+11.0'],
    ]


def test_the_page_has_the_effects_of_start_and_branch():
    models = start.read_models(ROOT / 'results' / 'flowers')
    shown = PAGE[PAGE.index('| last BatchNorm') : PAGE.index('- **The effect of the start')]
    table = ' '.join(shown.replace('\N{MINUS SIGN}', '-').split())
    for name in (start.ONE, start.ZERO, start.TWIST, start.TWIST_ZERO):
        assert f'| {np.mean([run["test_acc"] for run in models[name].results]):.1f} |' in table, name
    for name, test in list(start.effects(models).items())[:7]:
        low, high = test['images']
        assert f'{test["value"]:+.1f} ({low:+.1f} to {high:+.1f})' in table, name


def test_runs_of_other_images_or_with_other_bits_are_refused(tmp_path):
    first = kept_run(tmp_path, start.ONE, 42, [1, 0], last=1.0)
    (first / keep.RIGHT).write_text('11\n')
    with pytest.raises(RunError, match='not of the test accuracy'):
        start.read_models(tmp_path)
    (first / keep.RIGHT).write_text('10\n')
    other = kept_run(tmp_path, start.ZERO, 42, [1, 0], last=1.0)
    change(other, 'config.json', defines=runs.read_json(other / 'config.json')['defines'] | dict(split='other'))
    with pytest.raises(RunError, match='other images'):
        start.read_models(tmp_path)


@pytest.mark.slow
def test_a_run_is_kept_without_weights_and_with_the_spread_of_selection(tree, tiny, tmp_path, capsys):
    folder, results = run(tree, tmp_path / 'runs')
    for _ in range(2):  # what is kept is left alone
        keep.main(keep.get_args_parser().parse_args([str(tmp_path / 'runs'), str(tmp_path / 'kept')]))
    kept = tmp_path / 'kept' / folder.name
    assert capsys.readouterr().out.split() == [str(kept)]
    assert {path.name for path in kept.iterdir()} == {
        *('config.json', 'log.jsonl', 'results.json', keep.RIGHT, keep.SELECTION, keep.SCALES)
    }
    bits = (kept / keep.RIGHT).read_text().strip()
    assert 100 * bits.count('1') / len(bits) == pytest.approx(results['test_acc'])
    spreads = runs.read_json(kept / keep.SELECTION)
    assert list(spreads) == ['layer2.0', 'layer2.1']
    for of in spreads.values():
        assert 0 < of['low'] < of['mean'] < of['high'] < 1
        assert 0 < of['over_classes'] < of['over_images'] < of['over_channels']
    assert list(runs.read_json(kept / keep.SCALES)) == ['layer1.0', *spreads]


@pytest.mark.parametrize('name', ['resnet18', 'twistnet18_zero_init'])
def test_a_scale_is_that_of_the_last_norm_of_a_trunk_block(name):
    model = build_model(name, 5)
    model.layer3[1].bn2.weight.data = torch.tensor([3.0, 4.0]).repeat(128)
    start = float(name == 'resnet18')
    blocks = [f'layer{stage}.{block}' for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert keep.scales_of(model) == pytest.approx(dict.fromkeys(blocks, start) | {'layer3.1': 12.5**0.5})


def test_the_spreads_are_of_images_of_classes_and_of_channels():
    weights = np.array([[0.1, 0.5], [0.3, 0.5], [0.3, 0.5], [0.5, 0.5]])[:, None]  # (4 images, 1 head, 2 channels)
    found = keep.spreads(weights, np.array([0, 0, 1, 1]))
    assert found['over_images'] == pytest.approx(np.std([0.1, 0.3, 0.3, 0.5], ddof=1) / 2, abs=1e-6)
    assert found['over_classes'] == pytest.approx(np.std([0.2, 0.4], ddof=1) / 2, abs=1e-6)
    assert found['over_channels'] == pytest.approx(np.std([0.3, 0.5], ddof=1), abs=1e-6)
    assert (found['mean'], found['low'], found['high']) == pytest.approx((0.4, 0.1, 0.5))
