"""The promises of examples/: the notebook runs from top to bottom, and is kept with the output of such a run."""

import re

import pytest
from conftest import ROOT

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')
EXAMPLES = ROOT / 'examples'


def texts_of(notebook) -> str:
    """What its cells print; each picture is a line '[image/jpeg]'."""
    outputs = [output for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == 'error']
    return '\n'.join(output.get('text', '') or f'[{next(iter(output.data))}]' for output in outputs)


def test_the_notebook_is_kept_with_its_output():
    path = EXAMPLES / 'quickstart.ipynb'
    notebook = nbformat.read(path, 4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == 'code']
    assert counts == [*range(1, len(counts) + 1)], 'run from top to bottom'
    text = texts_of(notebook)
    assert float(re.search(r'test accuracy ([\d.]+) %', text)[1]) > 50
    assert text.count('[image/jpeg]') == 5
    assert path.stat().st_size < 1_000_000
    assert not re.search(r'/(tmp|root|home|work)/', text), 'nor do paths of one machine stand in it'


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    notebook = nbformat.read(EXAMPLES / 'quickstart.ipynb', 4)
    kept = texts_of(notebook)
    for cell in notebook.cells:
        cell.source = cell.source.replace('runs/quickstart', str(tmp_path)).replace('--epochs 8', '--epochs 1')
    resources = dict(metadata=dict(path=EXAMPLES))
    nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3', resources=resources).execute()
    text = texts_of(notebook)
    assert 'epoch 1/1' in text
    assert str(tmp_path) in text
    for once in ('[image/jpeg]', 'test accuracy', 'path,label,probability', 'Precision'):
        assert text.count(once) == kept.count(once) > 0
