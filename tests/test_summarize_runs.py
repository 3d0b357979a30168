"""The promises of summarize_runs.py: a row a complete run, the others named, nothing averaged."""

import pytest
from conftest import finish, start

import runs
import summarize_runs

RESULT = dict(dataset='dtd', fold=1, seed=42, model='resnet18', test_acc=50.0, best_val_acc=51.5, best_epoch=3)
RESULT |= dict(params_M=11.2006, seconds=90.0)


def make(run_dir, **changes):
    result = RESULT | changes
    folder = run_dir / runs.run_name(result['dataset'], result['fold'], result['model'], result['seed'])
    folder.mkdir(parents=True)
    runs.write_json(folder / 'config.json', {})
    runs.write_json(folder / 'results.json', result)
    return folder


def test_rows_are_ordered_and_incomplete_runs_named(tmp_path):
    make(tmp_path, fold=2, test_acc=100.0)
    make(tmp_path, model='twistnet18', test_acc=61.111)
    make(tmp_path)
    (make(tmp_path, seed=43) / 'results.json').unlink()
    (tmp_path / 'no_run').mkdir()
    code, out, err = finish(start('summarize_runs.py', '--run_dir', str(tmp_path)))
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert [row[:5] for row in rows[1:]] == [
        ['dtd', '1', 'resnet18', '42', '50.00'],
        ['dtd', '1', 'twistnet18', '42', '61.11'],
        ['dtd', '2', 'resnet18', '42', '100.00'],
    ]
    assert rows[1][5:] == ['51.50', '3', '11.20', '1.5']
    assert err == 'not complete: dtd_fold1_resnet18_seed43\n'


def fails(run_dir) -> str:
    with pytest.raises(runs.RunError) as caught:
        summarize_runs.main(summarize_runs.get_args_parser().parse_args(['--run_dir', str(run_dir)]))
    return str(caught.value)


def test_what_cannot_be_read_is_named(tmp_path):
    assert 'holds no run' in fails(tmp_path)
    folder = make(tmp_path)
    runs.write_json(folder / 'results.json', {'dataset': 'dtd'})
    assert "has no 'fold'" in fails(tmp_path)
    (folder / 'results.json').write_text('{"torn')
    assert 'results.json: damaged' in fails(tmp_path)
    (folder / 'results.json').unlink()
    assert 'none of its 1 runs is complete' in fails(tmp_path)
