"""The promise of results/: RESULTS.md states what `make results` prints of the runs that are kept."""

import csv
import math
import re

import pytest
import torch
from conftest import ROOT, make_run

import summarize_runs
from common import runs
from common.errors import RunError
from results import gates

SCRIPTS = {'summarize_runs.py': summarize_runs, '-m results.gates': gates}
RECIPE = re.search(r'^results: .*\n((?:\t.*\n)+)', (ROOT / 'Makefile').read_text(), re.M)[1].replace('\\\n', ' ')
TABLES = re.findall(r'bin/python (\S+\.py|-m \S+) (.*) > (\S+)', RECIPE)


def rounded(text: str) -> str:
    """A CSV with six digits of each number: the last ones depend on the version of scipy."""
    return re.sub(r'-?\d+\.\d+(e-?\d+)?', lambda number: f'{float(number[0]):.6g}', text)


def test_the_tables_are_found():
    assert {file for _, _, file in TABLES} == {
        str(path.relative_to(ROOT)) for path in (ROOT / 'results').glob('*') if path.suffix in ('.txt', '.csv')
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
        assert printed in (ROOT / 'RESULTS.md').read_text(), 'RESULTS.md shows another one'


@pytest.mark.parametrize('file', ['probes.csv', 'shots.csv'])
def test_the_page_has_the_figures_of_frozen_features(file):
    page = (ROOT / 'RESULTS.md').read_text()
    for row in csv.DictReader((ROOT / 'results' / file).open()):
        figures = ' ± '.join(f'{float(row[key]):.1f}' for key in ('mean', 'sd'))
        assert figures in page, row


def test_the_page_has_the_figures_of_the_pilots():
    page, files = (ROOT / 'RESULTS.md').read_text(), sorted((ROOT / 'results').glob('pilot_*/*/results.json'))
    assert len(files) >= 4
    for file in files:
        assert f'{runs.read_json(file)["best_val_acc"]:.1f}' in page, file


def test_the_page_has_every_run_from_scratch():
    page = (ROOT / 'RESULTS.md').read_text()
    head, *rows = re.findall(r'^\| (fold|\d) \| (.*) \| (.*) \| (.*) \|$', page, re.M)
    shown = {}
    for fold, *cells in rows:
        shown |= {(int(fold), model.strip('`')): cell for model, cell in zip(head[1:], cells) if cell != 'not made'}
    kept = {}
    for file in (ROOT / 'results' / 'scratch').glob('*/results.json'):
        run = runs.read_json(file)
        accuracies = '{test_acc:.1f} ({best_val_acc:.1f}), {test_acc_last:.1f}'.format(**run)
        kept[run['fold'], run['model']] = accuracies
    assert shown == kept
    assert page.count(f' {len(kept)} of 15 runs') == 2


def test_where_the_gates_end(tmp_path, capsys):
    def log(*values):
        return [dict(epoch=epoch, gates={'layer3.0': value, 'layer4.0': 0.12}) for epoch, value in enumerate(values, 1)]

    make_run(tmp_path / 'a', model='twistnet18', log=log(0.13, 0.2))
    make_run(tmp_path / 'b', model='twistnet18', fold=2, log=log(0.9, 0.119))
    make_run(tmp_path / 'b', model='twistnet18', fold=3, log=log(0.9), complete=False)
    make_run(tmp_path / 'b', model='twistnet18', fold=4, complete=False)  # before its first epoch has ended
    make_run(tmp_path / 'b', fold=1, log=[dict(epoch=1, gates={})])
    make_run(tmp_path / 'b', model='twistnet18_gate_0', log=log(0.5))
    make_run(tmp_path / 'b', model='stci_resnet18', pretrained='of a run with gates', log=log(0.5))
    gates.main(gates.get_args_parser().parse_args([str(tmp_path / 'a'), str(tmp_path / 'b')]))
    captured = capsys.readouterr()
    first, variant, second = (line.split() for line in captured.out.splitlines()[1:])
    move = f'{math.log(0.2 / 0.8) + 2:+.4f}'
    mean = f'{(math.log(0.2 / 0.8) + math.log(0.12 / 0.88)) / 2 + 2:+.4f}'
    assert first == ['DTD', 'TwistNet-18', '0.01', '1', '-', '100', '1', '0.1200', 'to', '0.2000', mean, move, '-']
    assert second[-5:] == ['to', '0.1200', '+0.0028', '+0.0076', '-']
    assert variant[:3] == ['DTD', 'Gate', '0']
    assert variant[8:11] == ['0.1200', 'to', '0.5000']
    assert variant[-2] == f'{math.log(0.12 / 0.88):+.4f}'  # the start is 0.5
    why = 'its weights may have brought gates of their own'
    assert captured.err == f'left out: {tmp_path}/b/dtd_fold1_stci_resnet18_seed42: {why}\n'


def test_without_gates_it_says_so(tmp_path):
    make_run(tmp_path, log=[dict(epoch=1, gates={})])
    with pytest.raises(RunError, match='no complete run has gates'):
        gates.last_gates(tmp_path)
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
    config = runs.read_json(folder / 'config.json')
    config['options'] |= dict(gate_lr=10.0, weight_decay=1e-3, momentum=0.0, batch_size=32)
    runs.write_json(folder / 'config.json', config)
    ((end,),) = gates.last_gates(tmp_path).values()
    assert end.by_decay == pytest.approx(2 * (1e-3 * 0.1 * 10), rel=1e-9)  # one step of 60 images in batches of 32
    config['options'] |= dict(opt='adamw')
    runs.write_json(folder / 'config.json', config)
    ((end,),) = gates.last_gates(tmp_path).values()
    assert math.isnan(end.by_decay)
