"""The promises of the layout: imports run one way, and grids start without torch."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

SOURCES = {
    '.'.join(path.relative_to(ROOT).with_suffix('').parts): path
    for folder in ('', 'common', 'training', 'interpret', 'results')
    for path in (ROOT / folder).glob('*.py')
    if not path.name.startswith('test_')
}
# From the bottom: a module imports modules of lower levels, or of its own.
LEVELS = ('common', 'library', 'training', 'interpret', 'script')
LIBRARY = ('models', 'datasets', 'transforms', 'compute_flops')


def level_of(module: str) -> int:
    folder = module.partition('.')[0]
    name = folder if folder in LEVELS else 'library' if module in LIBRARY else 'script'
    return LEVELS.index(name)


def imports_of(module: str) -> set[str]:
    """The modules of this repository that a module imports, inside of functions too."""
    names = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    return names & SOURCES.keys()


IMPORTS = {module: imports_of(module) for module in SOURCES}


def test_the_sources_are_found():
    assert {'train', 'models', 'run_all', 'common.runs', 'interpret.trace'} < SOURCES.keys()
    assert {'models', 'common.runs', 'common.options'} < IMPORTS['train']


@pytest.mark.parametrize('module', SOURCES)
def test_imports_run_one_way(module):
    assert [name for name in IMPORTS[module] if level_of(name) > level_of(module)] == []


def test_no_circle():
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names it


def test_who_may_import_what():
    importers = {target: {module for module in SOURCES if target in IMPORTS[module]} for target in SOURCES}
    of_interpret = {m for target, found in importers.items() if target.startswith('interpret.') for m in found}
    assert {m for m in of_interpret if not m.startswith('interpret.')} == {'visualize', 'analysis', 'results.keep'}
    assert importers['benchmark'] == set()


def imported(module: str, *packages: str) -> list[str]:
    """Those of the packages that a module imports."""
    program = f'import sys, {module}; print(*(name for name in {packages} if name in sys.modules))'
    return subprocess.check_output([sys.executable, '-c', program], cwd=ROOT, text=True).split()


@pytest.mark.parametrize('module', ['run_all', 'ablation', 'common.options', 'common.registry', 'common.runs'])
def test_a_plan_and_help_need_no_torch(module):
    assert imported(module, 'torch', 'timm', 'numpy', 'PIL', 'scipy', 'matplotlib') == []


def test_help_on_tables_takes_numpy_alone():
    assert imported('summarize_runs', 'torch', 'timm', 'PIL', 'scipy', 'matplotlib') == []
