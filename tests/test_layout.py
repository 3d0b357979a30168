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


def test_imports_run_one_way():
    upwards = {m: [name for name in IMPORTS[m] if level_of(name) > level_of(m)] for m in SOURCES}
    assert {module: names for module, names in upwards.items() if names} == {}
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names a circle


def test_who_may_import_what():
    from_interpret = {module for module in SOURCES for name in IMPORTS[module] if name.startswith('interpret.')}
    outside = {module for module in from_interpret if not module.startswith('interpret.')}
    assert outside == {'visualize', 'analysis', 'results.keep'}
    assert not any('benchmark' in names for names in IMPORTS.values())


@pytest.mark.parametrize(
    ('modules', 'packages'),
    [
        ('run_all, ablation, common.registry, common.runs', 'torch timm numpy PIL scipy matplotlib'),
        ('summarize_runs', 'torch timm PIL scipy matplotlib'),
    ],
    ids=['a plan and --help', 'a table'],
)
def test_what_starts_often_starts_without_torch(modules, packages):
    program = f'import sys, {modules}; print(*(name for name in "{packages}".split() if name in sys.modules))'
    assert subprocess.check_output([sys.executable, '-c', program], cwd=ROOT, text=True).split() == []
