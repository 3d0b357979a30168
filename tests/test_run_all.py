"""The promises of run_all.py and ablation.py: nothing is run twice, nothing is lost, and a plan takes half a second."""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HOLD, ROOT, finish, start, write_image

import ablation
import run_all
from common import options, runs, tuning
from common.errors import DataError, RunError
from common.machine import cores
from common.options import SplitOptions
from common.registry import MODELS
from common.splits import split_digest
from datasets import load_splits

STAND_IN = Path(__file__).parent / 'stand_in.py'
WITH_STAND_IN = (
    'import sys, pathlib, run_all, common.grid; common.grid.BUSY_POLL = 0.2; '
    f'run_all.TRAIN = pathlib.Path({str(STAND_IN)!r}); '
)


def grid(run_dir, *more, cwd=None, before: str = '') -> subprocess.Popen:
    """run_all.py on synthetic, two models by two folds, with the stand-in for train.py."""
    argv = ['--dataset', 'synthetic', '--models', 'resnet18,twistnet18', '--folds', '1-2', '--epochs', '6']
    environment = {k: v for k, v in os.environ.items() if k != 'OMP_NUM_THREADS'} | dict(PYTHONPATH=str(ROOT))
    program = f'{WITH_STAND_IN}{before}run_all.cli(sys.argv[1:])'
    return subprocess.Popen(
        [sys.executable, '-c', program, *argv, '--warmup_epochs', '0', '--run_dir', str(run_dir), *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd, start_new_session=True,
    )  # fmt: skip


def lines_of(run_dir: Path, name: str) -> dict[str, list[str]]:
    return {path.parent.name: path.read_text().splitlines() for path in sorted(run_dir.glob(f'*/{name}'))}


def wait_for(condition, limit: float = 60) -> None:
    give_up = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < give_up, 'took too long'
        time.sleep(0.02)


@pytest.mark.slow
def test_the_plan_of_a_large_grid_takes_half_a_second():
    # Where NumPy takes a quarter of one to import: in turn, because a busy machine takes twice as long for both.
    models = 'resnet18,seresnet18,convnextv2_nano,fastvit_sa12,efficientformerv2_s2,repvit_m1_5,twistnet18'
    argv = ['--data_dir', 'data/dtd', '--dataset', 'dtd', '--models', models, '--folds', '1-10', '--seeds', '42,43,44']
    argv += ['--epochs', '100', '--run_dir', 'runs/main', '--dry_run']
    seconds = {'-c': [], str(ROOT / 'run_all.py'): []}
    for _ in range(5):
        for program, more in zip(seconds, (['import numpy'], argv)):
            begin = time.monotonic()  # of a new Python: a process forked from one with torch takes longer to end
            made = subprocess.run([sys.executable, program, *more], capture_output=True, text=True)
            seconds[program].append(time.monotonic() - begin)
            assert made.returncode == 0
    imported, planned = map(statistics.median, seconds.values())
    assert planned < 2 * imported, seconds
    plan = made.stdout.splitlines()
    assert len(plan) == len(set(plan)) == 210
    assert all(line.startswith('new ') and '--epochs 100' in line for line in plan)
    assert plan[1].endswith('--model seresnet18 --fold 1 --seed 42'), 'all models of a fold before the next fold'
    assert made.stderr == '210 runs in runs/main: 210 new\n'


def test_numbers():
    assert options.parse_numbers('1-3,7,2') == [1, 2, 3, 7]
    assert options.parse_numbers('42, 43') == [42, 43]
    for wrong in ('', '3-1', 'a', '1-', '1..3', '-1', '1-99999999'):
        with pytest.raises(argparse.ArgumentTypeError):
            options.parse_numbers(wrong)


@pytest.mark.parametrize('words', ['42,43', '42 43', '42, 43', '42,43 42'])
def test_a_list_may_have_commas_or_spaces(tmp_path, words):
    argv = ['--seeds', *words.split(), '--models', 'resnet18', 'twistnet18', '--folds', '1', '2-3', '--epochs', '3']
    argv += ['--run_dir', str(tmp_path), '--gpus', '0', '0', '--slurm', 'partition=gpu', 'exclusive']
    args, passed = run_all.get_args_parser().parse_known_args([*argv, '--crop_scale', '0.5', '1'])
    assert passed == ['--epochs', '3', '--crop_scale', '0.5', '1']
    assert (args.gpus, args.slurm) == (['0', '0'], dict(partition='gpu', exclusive=True))
    args.dataset = 'synthetic'
    names = [run.folder.name for run in run_all.make_grid(args, passed)]
    assert len(names) == len(set(names)) == 2 * 2 * 3
    assert names[-1] == 'synthetic_fold3_twistnet18_seed43'
    studies, _ = ablation.get_args_parser().parse_known_args(['--study', 'heads', 'gate'])
    assert studies.study == ['heads', 'gate']


def plan(*argv: str) -> None:
    run_all.main(*run_all.get_args_parser().parse_known_args(['--models', 'resnet18', '--dry_run', *argv]))


def test_the_data_set_of_a_grid_is_the_one_that_its_folder_is_laid_out_as(tmp_path, capsys):
    (tmp_path / 'photos' / 'brick').mkdir(parents=True)
    photos = ('--data_dir', str(tmp_path / 'photos'))
    plan(*photos, '--run_dir', str(tmp_path))
    out, err = capsys.readouterr()
    assert f'--dataset folder --data_dir {tmp_path}/photos' in out
    assert f'note: --dataset is folder: the layout of {tmp_path}/photos' in err
    with pytest.raises(RunError, match='--dataset synthetic is drawn and would not read --data_dir'):
        plan(*photos, '--dataset', 'synthetic')


def test_a_complete_run_is_known_by_its_weights_and_not_by_their_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights, folder = tmp_path / 'weights' / 'twistnet18_imagenet.pt', tmp_path / 'dtd_fold1_twistnet18_seed42'
    weights.parent.mkdir()
    weights.write_bytes(b'first')
    size = ('--dataset', 'dtd', '--data_dir', 'x', '--run_dir', str(tmp_path))
    made = vars(options.parse_args([*size, '--model', 'twistnet18', '--pretrained', 'elsewhere.pt']))
    defines = dict(processes=1, pretrained=runs.digest(b'first'))
    folder.mkdir()
    runs.write_json(folder / 'config.json', dict(options=made, defines=defines, fingerprint='x'))
    runs.write_json(folder / 'results.json', dict(n_train=1880, fingerprint='x'))
    argv = ('--models', 'twistnet18', '--folds', '1', *size, '--pretrained')

    for named in ((), (str(weights),), ('weights/twistnet18_imagenet.pt',)):
        plan(*argv, *named)
        assert capsys.readouterr().out.split()[0] == 'complete', named
    weights.write_bytes(b'second!')
    for named in ((), (str(weights),)):
        with pytest.raises(RunError, match=f'another configuration: pretrained {runs.digest(b"first")} -> '):
            plan(*argv, *named)
    capsys.readouterr()
    plan(*argv, 'weigths.pt')
    out, err = capsys.readouterr()
    assert out.split()[0] == 'complete'
    assert 'note: weigths.pt: cannot read the weights (No such file or directory); what was made of them is not' in err
    weights.unlink()
    with pytest.raises(RunError, match=r'another configuration: pretrained .* -> resnet18.a1_in1k'):
        plan(*argv)


def test_the_images_of_runs_are_compared_with_those_that_are_there(tmp_path, capsys, monkeypatch):
    photographs, lists, made = tmp_path / 'photographs', tmp_path / 'my.csv', tmp_path / 'runs'
    names = [f'{cls}_{n}.jpg' for cls in 'ab' for n in range(6)]
    for n, name in enumerate(names):
        write_image(photographs / name, n)

    def write(label_of) -> None:
        lists.write_text('\n'.join(['path,label', *(f'{name},{label_of(name)}' for name in names)]))

    argv = ['--lists', str(lists), '--data_dir', str(photographs)]

    def again(*more: str) -> None:
        base = ['--models', 'resnet18', '--folds', '1,2', '--run_dir', str(made), *argv]
        run_all.main(*run_all.get_args_parser().parse_known_args([*base, *more]))

    def finished(folder: Path, fold: int, *more: str) -> None:
        folder.mkdir(parents=True)
        words = [*argv, *more, '--model', 'resnet18', '--fold', str(fold)]
        split = split_digest(load_splits('lists', photographs, fold, SplitOptions(str(lists))))
        defines = dict(split=split, processes=1)
        config = dict(options=vars(options.parse_args(words)), defines=defines, fingerprint='x')
        runs.write_json(folder / 'config.json', config)
        runs.write_json(folder / 'results.json', dict(n_train=32, fingerprint='x', best_val_acc=50.0))

    write(lambda name: name[0])
    for fold in (1, 2):
        finished(made / f'lists_fold{fold}_resnet18_seed42', fold)
    again()
    assert capsys.readouterr().err.splitlines()[-1] == f'2 runs in {made}: 2 complete'

    write(lambda name: 'a' if name == names[-1] else name[0])
    for more in ((), ('--folds', '1-3')):  # nothing to make, something to make
        with pytest.raises(RunError, match=r'fold1_.* other images, labels or folds \(and 1 other\); --name NAME'):
            again(*more)
    for more in ((), ('--dry_run',)):
        with pytest.raises(RunError, match=r'fold1_.* holds another configuration: lr .* \(and 1 other\)'):
            again('--lr', '0.5', *more)  # options before images, at which --dry_run does not look
    results = made / 'lists_fold1_resnet18_seed42' / 'results.json'
    results.rename(results.with_name('last.pt'))
    with pytest.raises(RunError, match=r'fold1_.* other images, labels or folds \(and 1 other\); --name NAME'):
        again()  # one is interrupted
    results.with_name('last.pt').rename(results)
    write(lambda name: name[0])
    tested = Path(load_splits('lists', photographs, 1, SplitOptions(str(lists))).test[0][0])
    write_image(tested, 0, size=60)
    with pytest.raises(RunError, match=r'fold2_.* other images, labels or folds; --name NAME'):
        again()  # of the other fold it is a test image, which counts by its name

    tested.unlink()
    again()
    err = capsys.readouterr().err
    assert err.count(tested.name) == err.count('which are complete, are not compared with it') == 2
    for more in (('--folds', '1-3'), ('--force',)):
        with pytest.raises(DataError, match=tested.name):
            again(*more)
    assert len(lines_of(made, 'results.json')) == 2, 'nothing is discarded before the images are seen'

    write_image(tested, 0)
    for lr in (0.1, 0.2):
        finished(tuning.folder_of(made, dict(lr=lr)) / 'lists_fold1_resnet18_seed0', 1, '--seed', '0', '--lr', str(lr))
    write(lambda name: 'a' if name == names[-1] else name[0])
    tune = ('--tune', 'lr=0.1,0.2', '--seeds', '43')
    with pytest.raises(
        RunError, match=r'lr=0\.1/lists_fold1_resnet18_seed0 holds a run of other images.* \(and 1 other\)'
    ):
        again(*tune)
    for results in made.glob('tune/*/*/results.json'):
        results.unlink()
        results.with_name(runs.LOG).write_text(f'train.py: error: the training loss is nan; {runs.NOT_FINITE}\n')
    with pytest.raises(
        RunError, match=r'lr=0\.1/lists_fold1_resnet18_seed0 holds a run of other images.* \(and 1 other\)'
    ):
        again(*tune)  # that a trial has diverged was of those images, too

    for config in made.glob('lists_*/config.json'):
        runs.write_json(config, runs.read_json(config) | dict(tree='another'))
    begun = []
    monkeypatch.setattr(run_all, 'make_runs', lambda args, todo, *_: begun.extend(todo))
    again('--force')  # the way out that is named: what it discards is no neighbour
    assert len(begun) == 2


def test_a_default_that_is_brought_down_is_said_once_and_is_the_same_configuration(tmp_path, capsys):
    size = ('--dataset', 'dtd', '--data_dir', 'x', '--run_dir', str(tmp_path), '--epochs', '3')
    plan(*size)
    out, err = capsys.readouterr()
    assert out.split()[0] == 'new'
    assert err.count('note: --warmup_epochs is 2, not its default 5, to fit --epochs 3') == 1
    # A complete run of train.py, which brought the batch down to the 24 images that it found.
    made = vars(options.parse_args([*size, '--model', 'resnet18'])) | dict(batch_size=24)
    folder = tmp_path / 'dtd_fold1_resnet18_seed42'
    folder.mkdir()
    runs.write_json(folder / 'config.json', dict(options=made, defines=dict(processes=1), fingerprint='x'))
    runs.write_json(folder / 'results.json', dict(n_train=24, fingerprint='x'))
    plan(*size)
    assert capsys.readouterr().out.split()[0] == 'complete'
    for more, words in (
        (['--batch_size', '32'], 'batch_size 24 -> 32'),
        (['--warmup_epochs', '1'], 'warmup_epochs 2 -> 1'),
    ):
        with pytest.raises(RunError, match=words):
            plan(*size, *more)
    runs.write_json(folder / 'results.json', dict(n_train=30, fingerprint='x'))
    with pytest.raises(RunError, match='batch_size 24 -> 30'):
        plan(*size)


def test_a_rate_for_gates_that_a_model_has_not_is_refused_with_the_plan():
    rate = ('--dataset', 'synthetic', '--gate_lr', '10')
    plan(*rate, '--models', 'twistnet18,stci_resnet18')
    for model in ('resnet18', 'twistnet18_first_order', 'resnet10t'):
        with pytest.raises(RunError, match=rf'--gate_lr 10\.0: {model} has no gates; .* a command without --gate_lr'):
            plan(*rate, '--models', f'twistnet18,{model}')


def test_kth_tips2_has_no_fifth_fold(capsys):
    assert run_all.available_folds('kth_tips2', [1, 2, 3, 4, 5]) == [1, 2, 3, 4]
    assert 'four physical samples' in capsys.readouterr().err
    assert run_all.available_folds('kth_tips2', [1]) == [1]
    assert capsys.readouterr().err == ''
    for dataset, folds, words in (
        ('kth_tips2', [6], '1 to 4, not 6'),
        ('kth_tips2', [5], 'no fold'),
        ('fmd', [0], '1 to 5'),
    ):
        with pytest.raises(RunError, match=words):
            run_all.available_folds(dataset, folds)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('more', 'words'),
    [
        (['--epocs', '3'], 'unrecognized arguments: --epocs 3'),
        (['--fold', '1'], '--fold is train.py'),
        (['--models', 'resnt18'], "unknown model 'resnt18'"),
        (['--dataset', 'dtt'], "unknown data set 'dtt'"),
        (['--dataset', 'dtd', '--data_dir', 'nowhere'], 'nowhere: no such folder'),
        (['--lr', '-1'], '--lr -1.0 must be'),
        (['--jobs', '0'], '--jobs 0 must be'),
    ],
)
def test_a_wrong_option_ends_the_grid_before_it_starts(tmp_path, more, words):
    code, out, err = finish(grid(tmp_path / 'runs', *more))
    assert code != 0
    assert out == ''
    assert words in err.splitlines()[-1]
    assert 'Traceback' not in err
    assert not (tmp_path / 'runs').exists()


@pytest.mark.slow
def test_complete_runs_are_skipped_and_interrupted_ones_go_on(tmp_path):
    assert finish(grid(tmp_path))[0] == 0
    assert {len(starts) for starts in lines_of(tmp_path, 'starts').values()} == {1}
    folder = tmp_path / 'synthetic_fold1_resnet18_seed42'
    (folder / 'results.json').unlink()
    (folder / 'last.pt').touch()
    (tmp_path / 'synthetic_fold2_resnet18_seed42' / 'results.json').unlink()
    code, out, _ = finish(grid(tmp_path, '--dry_run'))
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ['interrupted', 'complete', 'new', 'complete']
    code, _, err = finish(grid(tmp_path))
    assert code == 0
    assert '4 runs in' in err
    assert '1 interrupted' in err
    assert [len(starts) for starts in lines_of(tmp_path, 'starts').values()] == [2, 1, 2, 1]
    code, _, err = finish(grid(tmp_path))
    assert (code, err.splitlines()[-1]) == (0, f'4 runs in {tmp_path}: 4 complete')
    code, _, err = finish(grid(tmp_path, '--force'))
    assert code == 0
    assert [len(starts) for starts in lines_of(tmp_path, 'starts').values()] == [3, 2, 3, 2]


@pytest.mark.slow
def test_force_discards_once_and_an_interrupted_grid_goes_on(tmp_path):
    assert finish(grid(tmp_path, '--epochs', '3'))[0] == 0
    process = grid(tmp_path, '--epochs', '50', '--force')
    log = tmp_path / 'synthetic_fold1_resnet18_seed42' / 'log.jsonl'
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 3)
    assert len(lines_of(tmp_path, 'results.json')) == 0, 'old results are not taken for new ones'
    os.kill(process.pid, signal.SIGTERM)
    assert 'the same command without --force resumes' in finish(process)[2]
    code, _, err = finish(grid(tmp_path, '--epochs', '50', '--jobs', '4'))
    assert code == 0
    assert '1 interrupted' in err
    assert all(len(lines) == 50 for lines in lines_of(tmp_path, 'log.jsonl').values())


@pytest.mark.slow
def test_damaged_results_are_not_complete(tmp_path):
    assert finish(grid(tmp_path, '--folds', '1'))[0] == 0
    results = tmp_path / 'synthetic_fold1_resnet18_seed42' / 'results.json'
    results.write_text('{"torn')
    code, out, _ = finish(grid(tmp_path, '--folds', '1', '--dry_run'))
    assert [line.split()[0] for line in out.splitlines()] == ['new', 'complete']
    real = [sys.executable, str(ROOT / 'run_all.py'), '--dataset', 'synthetic', '--models', 'resnet18', '--epochs', '6']
    result = subprocess.run(
        [*real, '--warmup_epochs', '0', '--run_dir', str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert 'results.json: damaged' in result.stderr, "train.py's word, which does not make it again unasked"
    results.write_text('{"fingerprint": "other"}')
    code, _, err = finish(grid(tmp_path, '--folds', '1'))
    assert (code, 'results.json is of another one' in err) == (1, True)


@pytest.mark.slow
def test_a_run_that_turns_out_to_be_made_elsewhere_is_waited_for(tmp_path):
    # The look before the start saw nobody; train.py then finds the lock taken.
    folder = tmp_path / 'synthetic_fold1_resnet18_seed42'
    owner = subprocess.Popen([sys.executable, '-c', HOLD, str(folder)], stdout=subprocess.PIPE, cwd=ROOT)
    owner.stdout.readline()
    process = grid(tmp_path, '--folds', '1', before='run_all.runs.is_claimed = lambda folder: False; ')
    wait_for(lambda: (tmp_path / 'synthetic_fold1_twistnet18_seed42' / 'results.json').exists())
    time.sleep(1)
    assert process.poll() is None
    assert not (folder / 'results.json').exists()
    owner.kill()
    owner.communicate()
    code, _, err = finish(process)
    assert code == 0, err
    assert len(lines_of(tmp_path, 'made')) == 2


def test_a_folder_that_cannot_be_made_fails_that_run_alone(tmp_path):
    (tmp_path / 'synthetic_fold1_resnet18_seed42').touch()
    code, _, err = finish(grid(tmp_path, '--folds', '1'))
    assert code == 1
    assert 'Traceback' not in err
    assert len(lines_of(tmp_path, 'made')) == 1


@pytest.mark.slow
@pytest.mark.parametrize('option', [('--pretrained', 'no_such.pt'), ('--amp', 'fp16'), ('--lr', '0.3')])
def test_any_known_difference_counts(tmp_path, option):
    assert finish(grid(tmp_path, '--folds', '1', '--amp', 'off'))[0] == 0
    code, _, err = finish(grid(tmp_path, '--folds', '1', '--amp', 'off', *option))
    assert (code, f'another configuration: {option[0][2:]} ' in err) == (1, True)


@pytest.mark.slow
def test_another_configuration_is_shown_and_nothing_is_started(tmp_path):
    assert finish(grid(tmp_path))[0] == 0
    code, _, err = finish(grid(tmp_path, '--epochs', '7', '--lr', '0.1'))
    assert code == 1
    assert 'another configuration: epochs 6 -> 7, lr 0.05 -> 0.1 (and 3 others)' in err.splitlines()[-1]
    assert {len(starts) for starts in lines_of(tmp_path, 'starts').values()} == {1}


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_others_and_is_listed(tmp_path):
    code, out, err = finish(grid(tmp_path, '--folds', '3-5', '--jobs', '2'))
    assert (code, out) == (1, '')
    assert len(lines_of(tmp_path, 'made')) == 4
    for model in ('resnet18', 'twistnet18'):
        log = tmp_path / f'synthetic_fold4_{model}_seed42' / runs.LOG
        assert f'failed: {log}\n    some words\n    the cause\n' in err
    assert err.splitlines()[-1] == 'run_all.py: error: 2 of 6 runs failed; the same command tries them again'
    assert 'Traceback' not in err


@pytest.mark.slow
def test_two_grids_on_one_folder_make_each_run_once(tmp_path):
    several = [grid(tmp_path, '--folds', '1-3', '--jobs', '2') for _ in range(3)]
    assert [finish(process)[0] for process in several] == [0, 0, 0]
    made = lines_of(tmp_path, 'made')
    assert len(made) == 6
    assert {len(lines) for lines in made.values()} == {1}


@pytest.mark.slow
def test_the_run_of_a_dead_owner_is_taken_over(tmp_path):
    first = grid(tmp_path, '--epochs', '100')
    wait_for(lambda: any(len(log) > 2 for log in lines_of(tmp_path, 'log.jsonl').values()))
    second = grid(tmp_path, '--epochs', '100', '--jobs', '4')
    wait_for(lambda: len(lines_of(tmp_path, 'starts')) == 4)
    owner = json.loads((tmp_path / 'synthetic_fold1_resnet18_seed42' / 'starts').read_text().splitlines()[0])
    assert runs.is_claimed(tmp_path / 'synthetic_fold1_resnet18_seed42')
    first.kill()
    os.kill(owner['pid'], signal.SIGKILL)
    assert finish(second)[0] == 0
    starts = lines_of(tmp_path, 'starts')
    assert [len(lines) for lines in starts.values()] == [2, 1, 1, 1]
    assert all(len(lines) == 1 for lines in lines_of(tmp_path, 'made').values())
    assert all(len(lines) == 100 for lines in lines_of(tmp_path, 'log.jsonl').values()), 'it went on where it was'


@pytest.mark.slow
@pytest.mark.parametrize(('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_stop_the_children_and_the_same_command_goes_on(tmp_path, number, code):
    process = grid(tmp_path, '--epochs', '60', '--jobs', '2')
    wait_for(lambda: sum(len(log) > 2 for log in lines_of(tmp_path, 'log.jsonl').values()) == 2)
    os.killpg(process.pid, number)  # as a terminal does; the children are in sessions of their own
    returned, _, err = finish(process)
    assert returned == code
    assert err.splitlines()[-1] == 'stopped with 0 of 4 runs complete; the same command resumes'
    stopped = (tmp_path / 'synthetic_fold1_resnet18_seed42' / runs.LOG).read_text()
    assert 'KeyboardInterrupt' not in stopped, 'the children get SIGTERM from us, and no SIGINT'
    for lines in lines_of(tmp_path, 'starts').values():
        with pytest.raises(ProcessLookupError):
            os.kill(json.loads(lines[0])['pid'], 0)
    returned, _, err = finish(grid(tmp_path, '--epochs', '60', '--jobs', '4'))
    assert returned == 0
    assert '2 interrupted, 2 new' in err
    assert all(len(lines) == 60 for lines in lines_of(tmp_path, 'log.jsonl').values())


@pytest.mark.slow
def test_a_second_signal_kills(tmp_path):
    process = grid(tmp_path, '--epochs', '400', '--seeds', '666')  # the stand-in does not hear SIGTERM then
    wait_for(lambda: any(len(log) > 2 for log in lines_of(tmp_path, 'log.jsonl').values()))
    begin = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert 'a second signal kills them' in err
    assert time.monotonic() - begin < 15


def test_progress_counts_only_what_is_made_now(tmp_path):
    args = run_all.get_args_parser().parse_args(['--dataset', 'synthetic', '--models', 'a'])
    args.jobs = 1
    todo = []
    for i, done in enumerate((150, 0)):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / 'log.jsonl').write_text('{}\n' * done)
        todo.append(run_all.Run(folder, [], dict(epochs=200)))
    work = run_all.Grid(todo, 2, args)
    assert work.initial == work.progress() == 2.75
    (tmp_path / '1' / 'log.jsonl').write_text('{}\n' * 50)
    assert work.progress() == 3.0
    work.failed.append(work.waiting.popleft())
    assert work.progress() == 3.25


@pytest.mark.slow
def test_jobs_share_the_cores_and_the_devices(tmp_path):
    assert finish(grid(tmp_path / 'a', '--gpus', '5,7', '--jobs', '4', '--epochs', '20'))[0] == 0
    starts = [json.loads(line) for lines in lines_of(tmp_path / 'a', 'starts').values() for line in lines]
    assert {start['OMP_NUM_THREADS'] for start in starts} == {str(max(1, cores() // 4))}
    assert sorted(start['CUDA_VISIBLE_DEVICES'] for start in starts) == ['5', '5', '7', '7']
    ends = [float(line.split()[1]) for lines in lines_of(tmp_path / 'a', 'made').values() for line in lines]
    assert max(start['begin'] for start in starts) < min(ends), 'four at once'
    # One at a time is as train.py alone: neither the threads nor the devices are touched.
    assert finish(grid(tmp_path / 'b'))[0] == 0
    starts = [json.loads(line) for lines in lines_of(tmp_path / 'b', 'starts').values() for line in lines]
    assert {(start['OMP_NUM_THREADS'], start['CUDA_VISIBLE_DEVICES']) for start in starts} == {(None, None)}
    ends = sorted(float(line.split()[1]) for lines in lines_of(tmp_path / 'b', 'made').values() for line in lines)
    assert all(end < begin for end, begin in zip(ends, sorted(start['begin'] for start in starts)[1:]))


def test_devices_and_options_of_sbatch():
    assert options.parse_gpus('0,0, 1') == ['0', '0', '1'], 'two runs on the first device'
    assert options.parse_sbatch('partition=gpu,--exclusive,gres=gpu:1') == dict(
        partition='gpu', exclusive=True, gres='gpu:1'
    )
    with pytest.raises(argparse.ArgumentTypeError):
        options.parse_sbatch('=3')


@pytest.mark.slow
def test_relative_paths_mean_the_folder_of_the_caller(tmp_path):
    assert finish(grid('here/runs', cwd=tmp_path))[0] == 0
    assert len(lines_of(tmp_path / 'here' / 'runs', 'made')) == 4


@pytest.mark.slow
def test_a_grid_of_real_runs(tree, tmp_path):
    size = ('--img_size', '32', '--batch_size', '8', '--epochs', '1', '--warmup_epochs', '0', '--num_workers', '0')
    data = ('--dataset', 'dtd', '--data_dir', str(tree), '--run_dir', str(tmp_path), '--models', 'resnet18')
    image = tree / 'images' / 'class0' / 'class0_0015.jpg'  # tested in fold 1
    whole = image.read_bytes()
    image.write_bytes(b'torn')
    code, out, err = finish(start('run_all.py', *data, *size))
    assert (code, out) == (1, '')
    assert 'class0_0015.jpg: cannot be read as an image' in err, "train.py's own words"
    assert 'Traceback' not in err
    assert err.splitlines()[-1] == 'run_all.py: error: 1 of 1 runs failed; the same command tries them again'
    image.write_bytes(whole)
    code, out, err = finish(start('run_all.py', *data, *size))
    assert code == 0, err
    assert '1 interrupted' in err
    assert 'summarize_runs.py --run_dir' in err.splitlines()[-1]
    assert runs.read_json(tmp_path / 'dtd_fold1_resnet18_seed42' / 'results.json')['test_acc'] >= 0
    code, out, err = finish(start('run_all.py', *data, *size, '--dry_run'))
    assert out.split()[0] == 'complete'
    image.write_bytes(whole + b' ')
    code, out, err = finish(start('run_all.py', *data, *size))
    assert (code, out) == (0, ''), err
    assert err.splitlines()[-1] == f'1 run in {tmp_path}: 1 complete'
    trained = image.with_name('class0_0000.jpg')
    trained.write_bytes(trained.read_bytes() + b' ')
    code, out, err = finish(start('run_all.py', *data, *size))
    assert (code, out) == (1, '')
    assert 'dtd_fold1_resnet18_seed42 holds a run of other images' in err.splitlines()[-1]


# ---------------------------------------------------------------------------------------------- ablation.py


def test_studies_name_models_of_their_own_and_share_no_folder():
    full = MODELS['twistnet18']['twist']
    for study, models in ablation.STUDIES.items():
        assert 'twistnet18' in models, study
        assert len({str(full | MODELS[model]['twist']) for model in models}) == len(models), 'configurations differ'
    every = ablation.models_of(['all'])
    assert set(every) == {name for name, entry in MODELS.items() if 'twist' in entry}
    names = {runs.run_name('dtd', 1, model, 42) for model in every}
    assert len(names) == len(every)
    assert ablation.models_of(['heads', 'stages']) == [
        *('twistnet18_heads1', 'twistnet18_heads2', 'twistnet18', 'twistnet18_stage3', 'twistnet18_stage4')
    ]


def test_ablation_command():
    argv = ('--dataset', 'dtd', '--data_dir', 'x', '--epochs', '9', '--dry_run')
    code, out, err = finish(start('ablation.py', '--study', 'heads', '--folds', '1-3', *argv))
    assert (code, len(out.splitlines())) == (0, 9)
    assert '--epochs 9 --model twistnet18_heads1 --fold 1 --seed 42' in out.splitlines()[0]
    code, out, err = finish(start('ablation.py', '--study', 'head', *argv))
    assert (code, out) == (1, '')
    assert err.startswith("ablation.py: error: unknown study 'head'; the studies are: components, heads")
