"""The promises of compute_flops.py: the three commands, and nothing but the table on stdout."""

import csv
import io

import pytest
from conftest import finish, start

import compute_flops


def output(*arguments: str, capsys) -> str:
    compute_flops.main(compute_flops.get_args_parser().parse_args(arguments))
    return capsys.readouterr().out


def test_text(capsys):
    lines = output('--model', 'twistnet18', capsys=capsys).splitlines()
    assert len(lines) == 2
    assert lines[1].split() == ['twistnet18', 'TwistNet-18', '11.59M', '1.85G', '+3.5', '%', '+1.8', '%']


def test_csv(capsys):
    rows = list(csv.DictReader(io.StringIO(output('--model', 'resnet18,twistnet18', '--csv', capsys=capsys))))
    assert [row['model'] for row in rows] == ['resnet18', 'twistnet18']
    assert float(rows[1]['params_M']) == pytest.approx(11.588963)
    assert float(rows[0]['macs_G']) == pytest.approx(1.8186, abs=5e-5)


def test_latex_is_a_table_and_nothing_else(capsys):
    text = output('--model', 'resnet18,twistnet18', '--latex', capsys=capsys)
    lines = text.splitlines()
    assert lines[0].startswith(r'\begin{tabular}')
    assert lines[-1] == r'\end{tabular}'
    body = [line for line in lines if '&' in line]
    assert len({line.count('&') for line in body}) == 1
    assert r'TwistNet-18 & -- & 11.59 & 1.85 & +3.5\,\% & +1.8\,\% \\' in lines
    assert '%' not in text.replace(r'\%', '')


@pytest.mark.slow
def test_unknown_model_is_one_line_and_stdout_stays_empty():
    code, out, err = finish(start('compute_flops.py', '--model', 'resnet19'))
    assert (code, out) == (1, '')
    assert err.splitlines()[-1].startswith("compute_flops.py: error: unknown model 'resnet19'")
    assert 'Traceback' not in err
