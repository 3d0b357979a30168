"""The promises of runs.py: files that are whole at any moment, and run folders of one configuration each."""

import contextlib
import errno
import io
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HOLD, ROOT

from common import runs
from common.errors import DIVERGED, RunBusy, RunError, user_errors


def test_files_are_whole_at_any_moment(tmp_path):
    path = tmp_path / 'a.json'
    for value in (1, 2):
        runs.write_json(path, {'a': value})
    (tmp_path / 'a.json.tmp').symlink_to('/dev/full')  # every write fails with ENOSPC
    with pytest.raises(RunError, match=r'a\.json: cannot be written \(No space left on device\); what was saved'):
        runs.write_json(path, {'a': 3})
    assert runs.read_json(path) == {'a': 2}
    assert os.listdir(tmp_path) == ['a.json']


def test_damaged_and_missing_files(tmp_path, capsys):
    path = tmp_path / 'results.json'
    assert runs.read_json(path) is None
    path.write_text('{"a": ')
    with pytest.raises(RunError, match=r'results\.json: damaged'):
        runs.read_json(path)
    with pytest.raises(RunError, match='no such log'):
        runs.read_log(tmp_path / 'log.jsonl')
    (tmp_path / 'log.jsonl').write_text('{"epoch": 1}\n{"ep')
    assert runs.read_log(tmp_path / 'log.jsonl') == [{'epoch': 1}]
    assert capsys.readouterr().err == f'left out: {tmp_path / "log.jsonl"} line 2: no complete epoch\n'
    with pytest.raises(RunError, match='holds no run'):
        runs.find_runs(tmp_path)


def test_the_commit_is_that_of_this_code_and_of_no_repository_around_it(tmp_path, monkeypatch):
    def git(*command: str) -> str:
        who = ('-c', 'user.email=a@b', '-c', 'user.name=x')
        return subprocess.check_output(['git', '-C', str(tmp_path), *who, *command], text=True).strip()

    git('init', '-q')
    git('commit', '-q', '--allow-empty', '-m', 'x')
    for root in (tmp_path / 'code', tmp_path):  # unpacked into it, and over it
        (root / 'common').mkdir(parents=True)
        (root / 'common' / 'runs.py').touch()
        monkeypatch.setattr(runs, '__file__', str(root / 'common' / 'runs.py'))
        assert runs.git_commit() is None
    git('add', '.')
    git('commit', '-q', '-m', 'y')
    assert runs.git_commit() == git('rev-parse', 'HEAD')  # of common/runs.py below the top
    monkeypatch.setattr(runs, '__file__', str(tmp_path / 'code' / 'common' / 'runs.py'))
    assert runs.git_commit() is None
    monkeypatch.undo()
    own = runs.git_commit()
    monkeypatch.setenv('GIT_DIR', str(tmp_path / '.git'))  # as in a hook of the other repository
    assert runs.git_commit() == own


def test_the_checkout_of_another_user_has_its_commit_or_a_note(tmp_path, monkeypatch, capsys):
    own, real, git = runs.git_commit(), shutil.which('git'), tmp_path / 'git'
    refuse = 'echo "fatal: detected dubious ownership" >&2; exit 128'
    git.write_text(f'#!/bin/sh\ncase "$*" in *safe.directory={ROOT}*) exec {real} "$@";; esac; {refuse}\n')
    git.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    assert runs.git_commit() == own
    assert capsys.readouterr().err == ''
    (tmp_path / 'common').mkdir()
    (tmp_path / '.git').mkdir()
    monkeypatch.setattr(runs, '__file__', str(tmp_path / 'common' / 'runs.py'))
    assert runs.git_commit() is None
    assert capsys.readouterr().err == 'note: config.json records no commit: fatal: detected dubious ownership\n'


def test_a_script_writes_to_a_notebook():
    with contextlib.redirect_stdout(io.StringIO()) as out, user_errors('train.py'):
        print('x')
    assert out.getvalue() == 'x\n'


def config(fingerprint, defines, environment=None):
    return dict(fingerprint=fingerprint, defines=defines, environment=environment or {'torch': '1'})


def test_open_run(tmp_path):
    folder = tmp_path / 'runs' / runs.run_name('dtd', 1, 'twistnet18', 42)
    assert folder.name == 'dtd_fold1_twistnet18_seed42'
    folder.mkdir(parents=True)
    mine, other = config('f1', {'lr': 0.1, 'epochs': 3}), config('f2', {'lr': 0.2, 'epochs': 3})
    for each in (mine, mine, other, mine):  # without a checkpoint or results what began may be replaced
        assert runs.open_run(folder, each, force=False) == (None, '')
        assert runs.read_json(folder / 'config.json') == each
    (folder / 'last.pt').touch()
    _, note = runs.open_run(folder, config('f1', mine['defines'], {'torch': '2'}), force=False)
    assert 'torch 1 -> 2' in note
    results = {'test_acc': 1}
    runs.write_json(folder / 'results.json', results)
    assert runs.open_run(folder, mine, force=False) == (results, '')
    with pytest.raises(RunError, match=r'another configuration \(lr 0.1 -> 0.2\)'):
        runs.open_run(folder, other, force=False)
    assert runs.open_run(folder, other, force=True) == (None, '')
    assert runs.read_json(folder / 'config.json') == other
    assert not (folder / 'results.json').exists()
    assert runs.find_runs(tmp_path / 'runs') == [folder]


def test_a_start_that_diverges_leaves_a_mark_until_the_next(tmp_path):
    for code, marked in ((DIVERGED, True), (1, False), (DIVERGED, True)):
        child = runs.start(tmp_path, [sys.executable, '-c', f'print(1); raise SystemExit({code})'], {})
        assert runs.finish(tmp_path, child) == code
        assert (tmp_path / runs.DIVERGED_MARK).exists() == marked
    assert runs.log_tail(tmp_path) == ['1'], 'of the last start'
    runs.discard(tmp_path)
    assert os.listdir(tmp_path) == [runs.LOG]


def test_a_run_is_one_process_s_at_a_time_and_free_when_that_is_killed(tmp_path):
    folder = tmp_path / 'run'
    assert not runs.is_claimed(folder)
    owner = subprocess.Popen([sys.executable, '-c', HOLD, str(folder)], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        owner.stdout.readline()
        assert runs.is_claimed(folder)
        with pytest.raises(RunBusy, match=f'process {owner.pid} on'):
            runs.claim(folder)
    finally:
        owner.kill()
        owner.communicate()
    assert not runs.is_claimed(folder)
    runs.claim(folder)
    runs.claim(folder)  # ours already
    taken = subprocess.run([sys.executable, '-c', HOLD, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert 'being made by another process' in taken.stderr


def test_a_folder_that_cannot_be_locked_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(runs.fcntl, 'lockf', refuse)
    with pytest.raises(RunError, match='this file system has no locks'):
        runs.claim(tmp_path / 'run')


def test_one_is_not_several():
    counted = {(1, 'epoch'): '1 epoch', (0, 'run'): '0 runs', (1, 'class'): '1 class', (3, 'class'): '3 classes'}
    assert {pair: runs.counted(*pair) for pair in counted} == counted


def start_on_windows(script: Path) -> None:
    """Run a script in this process, where there are no POSIX locks."""
    ours = {path.stem for path in ROOT.glob('*.py')} | {'common', 'training', 'interpret'}
    for name in [name for name in sys.modules if name.partition('.')[0] in ours]:
        del sys.modules[name]
    sys.modules['fcntl'], sys.argv = None, [script.name, '--help']
    runpy.run_path(str(script), run_name='__main__')


@pytest.mark.slow
def test_on_windows_scripts_say_in_one_line_what_they_need(capfd):
    for script in (ROOT / name for name in ('train.py', 'run_all.py', 'datasets.py', 'visualize.py')):
        process = multiprocessing.get_context('fork').Process(target=start_on_windows, args=(script,))
        process.start()
        process.join()
        err = capfd.readouterr().err
        assert err == f'{script.name}: error: needs Linux or macOS (file locks); on Windows, run it in WSL\n'
