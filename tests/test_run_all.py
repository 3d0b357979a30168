"""The promises of run_all.py and ablation.py: nothing is run twice, nothing is lost, and a plan takes half a second."""

import argparse
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT, finish, write_image

import ablation
import common.grid
import run_all
from common import options, runs
from common.errors import RunError
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
ARGV = ['--dataset', 'synthetic', '--models', 'resnet18,twistnet18', '--folds', '1-2', '--epochs', '6']
ARGV += ['--warmup_epochs', '0', '--run_dir']
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def start_grid(run_dir: Path, *more: str, before: str = '') -> subprocess.Popen:
    """run_all.py on synthetic, two models by two folds, with the stand-in for train.py, in a process of its own."""
    program = f'{WITH_STAND_IN}{before}run_all.cli(sys.argv[1:])'
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(
        [sys.executable, '-c', program, *ARGV, str(run_dir), *more], **pipes, cwd=ROOT, start_new_session=True
    )


def run_grid(*argv) -> tuple[int, str, str]:
    """run_all.py in this process, by its arguments; returns exit code, stdout and stderr."""
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    handlers, code = {number: signal.getsignal(number) for number in SIGNALS}, 0
    run_all.load_fold.cache_clear()
    patches = mock.patch.object(run_all, 'TRAIN', STAND_IN), mock.patch.object(common.grid, 'SHOW', 0.1)
    with patches[0], patches[1], redirect_stdout(out), redirect_stderr(err):
        try:
            run_all.cli([str(word) for word in argv])
        except SystemExit as ended:
            code = ended.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


def grid(run_dir: Path, *more) -> tuple[int, str, str]:
    """The same, of the grid of start_grid."""
    return run_grid(*ARGV, run_dir, *more)


def plan(*argv) -> tuple[int, str, str]:
    """The same of a plan for ResNet-18."""
    return run_grid('--models', 'resnet18', '--dry_run', *argv)


def lines_of(run_dir: Path, name: str) -> dict[str, list[str]]:
    return {path.parent.name: path.read_text().splitlines() for path in sorted(run_dir.glob(f'*/{name}'))}


def starts_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for lines in lines_of(run_dir, 'starts').values() for line in lines]


def ends_of(run_dir: Path) -> list[float]:
    return sorted(float(line.split()[1]) for lines in lines_of(run_dir, 'made').values() for line in lines)


def states_in(out: str) -> list[str]:
    return [line.split()[0] for line in out.splitlines()]


def wait_for(condition, limit: float = 60) -> None:
    give_up = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < give_up, 'took too long'
        time.sleep(0.02)


def has_begun(run_dir: Path, count: int = 1) -> bool:
    return sum(len(log) > 3 for log in lines_of(run_dir, 'log.jsonl').values()) >= count


# ---------------------------------------------------------------------------------------------- plan


@pytest.mark.slow
def test_the_plan_of_a_large_grid_takes_half_a_second():
    # Where NumPy takes a quarter of one to import: in turn, because a busy machine takes twice as long for both.
    models = 'resnet18,seresnet18,convnextv2_nano,fastvit_sa12,efficientformerv2_s2,repvit_m1_5,twistnet18'
    argv = ['--data_dir', 'data/dtd', '--dataset', 'dtd', '--models', models, '--folds', '1-10', '--seeds', '42,43,44']
    argv += ['--epochs', '100', '--run_dir', 'runs/main', '--dry_run']
    seconds = {'-c': [], str(ROOT / 'run_all.py'): []}
    for _ in range(3):
        for program, more in zip(seconds, (['import numpy'], argv)):
            begin = time.monotonic()  # of a new Python: a process forked from one with torch takes longer to end
            made = subprocess.run([sys.executable, program, *more], capture_output=True, text=True, check=True)
            seconds[program].append(time.monotonic() - begin)
    imported, planned = map(statistics.median, seconds.values())
    assert planned < 2 * imported, seconds
    lines = made.stdout.splitlines()
    assert len(lines) == len(set(lines)) == 210
    assert all(line.startswith('new ') and '--epochs 100' in line for line in lines)
    assert lines[1].endswith('--model seresnet18 --fold 1 --seed 42'), 'all models of a fold before the next fold'
    assert made.stderr == '210 runs in runs/main: 210 new\n'


def test_a_list_may_have_commas_or_spaces():
    argv = ['--models', 'resnet18', 'twistnet18', '--folds', '1', '2-3', '--dry_run', '--gpus', '0', '0']
    argv += ['--slurm', 'partition=gpu', 'exclusive', '--crop_scale', '0.5', '1', '--seeds']
    for words in (['42,43'], ['42', '43'], ['42,', '43'], ['42,43', '42']):
        args, passed = run_all.get_args_parser().parse_known_args([*argv, *words])
        args.dataset = 'synthetic'
        names = [run.folder.name for run in run_all.make_grid(args, passed)]
        assert len(names) == len(set(names)) == 2 * 2 * 3
        assert names[-1] == 'synthetic_fold3_twistnet18_seed43'
    assert passed == ['--crop_scale', '0.5', '1']
    assert (args.gpus, args.slurm) == (['0', '0'], dict(partition='gpu', exclusive=True))
    for text in ('', '3-1', 'a', '1-', '1..3', '-1', '1-99999999'):
        with pytest.raises(argparse.ArgumentTypeError):
            options.parse_numbers(text)


WRONG = [
    (['--epocs', '3'], 2, 'unrecognized arguments: --epocs 3'),
    (['--fold', '1'], 1, "--fold is train.py's; here it is --folds"),
    (['--models', 'resnt18'], 1, "unknown model 'resnt18'"),
    (['--dataset', 'dtd', '--data_dir', 'nowhere'], 1, 'nowhere: no such folder'),
    (['--jobs', '0'], 1, '--jobs 0 must be'),
    (['--gate_lr', '10'], 1, '--gate_lr 10.0: resnet18 has no gates;'),
    (['--folds', '6'], 1, 'fold 6 of synthetic does not exist; it has folds 1 to 5'),
    (['--tune', 'epochs=3'], 1, "--tune: 'epochs=3' is not NAME=VALUE,.. with a NAME among batch_size"),
    (['--tune', 'lr=,'], 1, "--tune: 'lr=,' is not NAME=VALUE"),
    (['--tune', ' '], 1, '--tune: names no option'),
    (['--tune', 'lr=0.1,fast'], 1, "--tune: lr=fast: argument --lr: invalid float value: 'fast'"),
    (['--tune', 'lr=0.1,5000'], 1, '--lr 5000.0 must be from'),
    (['--tune', 'lr=0.1 lr=0.2'], 1, '--tune: lr is given twice'),
    (['--tune', 'ema=1'], 1, "ignored explicit argument '1'; a switch is on or off"),
    (['--tune', 'lr=0.1', '--lr', '0.2'], 1, '--lr is given, and --tune searches it too'),
    (['--tune', 'lr=0.1', '--tune_fold', '9'], 1, 'fold 9 of synthetic does not exist'),
]


@pytest.mark.parametrize(('more', 'code', 'words'), WRONG)
def test_a_wrong_option_ends_the_grid_before_it_starts(tmp_path, more, code, words):
    ended, out, err = grid(tmp_path / 'runs', *more)
    assert (ended, out) == (code, '')
    assert words in err.splitlines()[-1]
    assert not (tmp_path / 'runs').exists()


def test_a_plan_notes_what_it_chooses_and_leaves_out(tmp_path):
    (tmp_path / 'photos' / 'brick').mkdir(parents=True)
    _, out, err = plan('--data_dir', tmp_path / 'photos', '--run_dir', tmp_path)
    assert f'--dataset folder --data_dir {tmp_path}/photos' in out
    assert f'note: --dataset is folder: the layout of {tmp_path}/photos' in err
    kth = ('--dataset', 'kth_tips2', '--data_dir', 'x', '--run_dir', tmp_path, '--epochs', '3', '--folds')
    _, out, err = plan(*kth, '1-5')
    assert (len(out.splitlines()), 'four physical samples' in err) == (4, True)
    assert err.count('note: --warmup_epochs is 2, not its default 5, to fit --epochs 3') == 1
    assert 'physical' not in plan(*kth, '1')[2]
    assert plan(*kth, '5')[2].endswith('--folds: no fold is left\n')


# ---------------------------------------------------------------------------------------------- what is in the folders


def write_run(folder: Path, argv, *, best_val_acc: float = 50.0, **defines) -> None:
    """The folder of a complete run of train.py with these arguments."""
    values = vars(options.parse_args([str(word) for word in argv]))
    defines = options.defining(values) | dict(processes=1, pretrained=None) | defines
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / 'config.json', dict(options=values, defines=defines))
    runs.write_json(folder / 'results.json', dict(best_val_acc=best_val_acc))


def test_a_complete_run_is_known_by_its_weights_and_not_by_their_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / 'weights' / 'twistnet18_imagenet.pt'
    weights.parent.mkdir()
    weights.write_bytes(b'first')
    first, size = runs.digest(b'first'), ('--dataset', 'dtd', '--data_dir', 'x', '--run_dir', tmp_path)
    made = [*size, '--model', 'twistnet18', '--pretrained', 'elsewhere.pt']
    write_run(tmp_path / 'dtd_fold1_twistnet18_seed42', made, pretrained=first)
    for named in ((), (weights,), ('weights/twistnet18_imagenet.pt',)):
        assert states_in(plan(*size, '--models', 'twistnet18', '--pretrained', *named)[1]) == ['complete'], named
    weights.write_bytes(b'second!')
    other = f'holds another configuration: pretrained {first} -> {runs.digest(b"second!")}'
    assert other in plan(*size, '--models', 'twistnet18', '--pretrained', weights)[2]
    weights.unlink()
    assert 'cannot read the weights' in plan(*size, '--models', 'twistnet18', '--pretrained', weights)[2]
    assert f'{first} -> resnet18.a1_in1k' in plan(*size, '--models', 'twistnet18', '--pretrained')[2]


def test_a_run_of_another_file_of_import_is_another_configuration(tmp_path):
    path = tmp_path / 'net.py'
    path.write_text('first')
    wanted = vars(options.parse_args(['--import', str(path)]))
    config = dict(defines=options.defining(wanted) | dict(pretrained=None, imported=runs.digest(b'first')))
    assert common.grid.difference_to(wanted, config) == ''
    path.write_text('second')
    assert common.grid.difference_to(wanted, config).startswith('imported ')


def test_a_batch_that_was_lowered_to_the_images_is_the_same_configuration(tmp_path):
    size = ('--dataset', 'dtd', '--data_dir', 'x', '--run_dir', tmp_path)
    folder = tmp_path / 'dtd_fold1_resnet18_seed42'
    write_run(folder, [*size, '--model', 'resnet18'], batch_size=24)
    assert states_in(plan(*size)[1]) == ['complete']
    for option, words in ((('--batch_size', 32), 'batch_size 24 -> 32'), (('--lr', 0.5), 'lr 0.01 -> 0.5')):
        code, _, err = plan(*size, *option)
        assert (code, f'another configuration: {words};' in err) == (1, True)
    for more in (('--batch_size', '24'), ('--recipe', 'scratch')):  # it was given, or is another default
        write_run(folder, [*size, '--model', 'resnet18', *more], batch_size=24)
        assert 'another configuration: batch_size 24 -> 32' in plan(*size)[2]


def test_the_images_of_runs_are_compared_with_those_that_are_there(tmp_path, monkeypatch):
    photographs, lists, made = tmp_path / 'photographs', tmp_path / 'my.csv', tmp_path / 'runs'
    names = [f'{cls}_{n}.jpg' for cls in 'ab' for n in range(6)]
    for n, name in enumerate(names):
        write_image(photographs / name, n)
    argv, own = ['--lists', str(lists), '--data_dir', str(photographs)], SplitOptions(str(lists))

    def label(*other: str) -> None:
        rows = [f'{name},{"a" if name in other else name[0]}' for name in names]
        lists.write_text('\n'.join(['path,label', *rows]))

    def again(*more) -> tuple[int, str]:
        code, _, err = run_grid('--models', 'resnet18', '--folds', '1,2', '--run_dir', made, *argv, *more)
        return code, err.splitlines()[-1]

    def write(folder: Path, fold: int, *more) -> None:
        split = split_digest(load_splits('lists', photographs, fold, own))
        write_run(folder, [*argv, *more, '--model', 'resnet18', '--fold', fold], split=split)

    label()
    folders = {fold: made / f'lists_fold{fold}_resnet18_seed42' for fold in (1, 2)}
    for fold, folder in folders.items():
        write(folder, fold)
    for lr in (0.1, 0.2):
        write(made / 'tune' / f'lr={lr}' / 'lists_fold1_resnet18_seed0', 1, '--seed', 0, '--lr', lr)
    assert again() == (0, f'2 runs in {made}: 2 complete')

    label(names[-1])
    other = 'a run of other images, labels or folds (and 1 other); --name NAME'
    for more in ((), ('--folds', '1-3')):  # nothing to make, something to make
        assert f'{folders[1]} holds {other}' in again(*more)[1]
    assert f'lr=0.1/lists_fold1_resnet18_seed0 holds {other}' in again('--tune', 'lr=0.1,0.2', '--seeds', '43')[1]
    for more in ((), ('--dry_run',)):  # options before images, at which --dry_run does not look
        last = again('--lr', '0.5', *more)[1]
        assert f'{folders[1]} holds another configuration: lr 0.01 -> 0.5 (and 1 other)' in last
    results = folders[1] / 'results.json'
    results.rename(results.with_name('last.pt'))
    assert f'{folders[1]} holds {other}' in again()[1], 'one is interrupted'
    results.with_name('last.pt').rename(results)

    label()
    tested = Path(load_splits('lists', photographs, 1, own).test[0][0])
    write_image(tested, 0, size=60)
    assert f'{folders[2]} holds a run of other images, labels or folds; ' in again()[1], 'in fold 1 only names count'
    tested.unlink()
    code, last = again('--force')
    assert (code, tested.name in last) == (1, True)
    assert len(lines_of(made, 'results.json')) == 2, 'nothing is discarded before the images are seen'

    write_image(tested, 0)
    for config in made.glob('lists_*/config.json'):
        runs.write_json(config, runs.read_json(config) | dict(tree='another'))
    assert 'is of other images or other folds, and both are called' in again('--folds', '3')[1]
    begun = []
    monkeypatch.setattr(run_all, 'make_here', lambda args, todo, *_: begun.extend(todo))
    again('--force')  # the way out that is named: what it discards is not compared
    assert len(begun) == 2


@pytest.mark.slow
def test_complete_runs_are_skipped_and_interrupted_ones_go_on(tmp_path):
    assert grid(tmp_path)[0] == 0
    folders = sorted(tmp_path.iterdir())
    for folder in folders[:3]:
        (folder / 'results.json').unlink()
    (folders[0] / 'last.pt').touch()
    assert states_in(grid(tmp_path, '--dry_run')[1]) == ['interrupted', 'new', 'new', 'complete']
    code, _, err = grid(tmp_path)
    assert (code, f'4 runs in {tmp_path}: 1 interrupted, 2 new, 1 complete\n' in err) == (0, True)
    assert [len((folder / 'starts').read_text().splitlines()) for folder in folders] == [2, 2, 2, 1]
    assert grid(tmp_path) == (0, '', f'4 runs in {tmp_path}: 4 complete\n')
    for option in ('lr', '0.3'), ('amp', 'fp16'), ('epochs', '7'):
        code, _, err = grid(tmp_path, f'--{option[0]}', option[1])
        assert (code, f'another configuration: {option[0]} ' in err, '(and 3 others)' in err) == (1, True, True)
    (folders[2] / 'results.json').write_text('{"torn')
    code, _, err = grid(tmp_path)
    assert (code, 'results.json: damaged' in err) == (1, True)
    assert len(starts_of(tmp_path)) == 7, 'nothing is started'


# ---------------------------------------------------------------------------------------------- processes


@pytest.mark.slow
def test_force_discards_once_and_an_interrupted_grid_goes_on(tmp_path):
    assert grid(tmp_path, '--epochs', '3', '--jobs', '2')[0] == 0
    process = start_grid(tmp_path, '--epochs', '50', '--force', '--jobs', '2')
    wait_for(lambda: has_begun(tmp_path, 2))  # beyond the three epochs of before
    assert lines_of(tmp_path, 'results.json') == {}, 'old results are not taken for new ones'
    os.kill(process.pid, signal.SIGTERM)
    assert 'the same command without --force resumes' in finish(process)[2]
    code, _, err = grid(tmp_path, '--epochs', '50', '--jobs', '4')
    assert (code, '2 interrupted, 2 new' in err) == (0, True)
    assert all(len(lines) == 50 for lines in lines_of(tmp_path, 'log.jsonl').values()), 'they go on where they were'


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_others_and_is_listed(tmp_path):
    (tmp_path / 'synthetic_fold3_resnet18_seed42' / runs.LOG).mkdir(parents=True)  # which cannot be written
    code, out, err = grid(tmp_path, '--folds', '3-5', '--jobs', '2')
    assert (code, out) == (1, '')
    assert len(lines_of(tmp_path, 'made')) == 3
    for model in ('resnet18', 'twistnet18'):
        log = tmp_path / f'synthetic_fold4_{model}_seed42' / runs.LOG
        assert f'failed: {log}\n    some words\n    the cause\n' in err
    assert err.splitlines()[-1] == 'run_all.py: error: 3 of 6 runs failed; the same command tries them again'


@pytest.mark.slow
@pytest.mark.parametrize('seen', [True, False])
def test_the_run_of_a_dead_owner_is_taken_over(tmp_path, seen):
    first = start_grid(tmp_path, '--epochs', '80')
    wait_for(lambda: has_begun(tmp_path))
    # Unless the look before the start sees the owner, train.py finds the lock taken.
    before = '' if seen else 'run_all.runs.is_claimed = lambda folder: False; '
    second = start_grid(tmp_path, '--epochs', '80', '--jobs', '4', before=before)
    wait_for(lambda: len(lines_of(tmp_path, 'starts')) == 4)
    folder = tmp_path / 'synthetic_fold1_resnet18_seed42'
    wait_for(lambda: seen or (folder / runs.LOG).read_text().count(runs.HEADER) > 2)
    assert runs.is_claimed(folder)
    first.kill()
    os.kill(json.loads((folder / 'starts').read_text())['pid'], signal.SIGKILL)
    code, _, err = finish(second)
    assert (code, err.count(f'another process makes {folder}, ')) == (0, 1)
    assert [len(lines) for lines in lines_of(tmp_path, 'starts').values()] == [2, 1, 1, 1]
    assert all(len(lines) == 1 for lines in lines_of(tmp_path, 'made').values())


@pytest.mark.slow
@pytest.mark.parametrize('number', SIGNALS)
def test_signals_stop_the_children(tmp_path, number):
    process = start_grid(tmp_path, '--epochs', '200', '--jobs', '2')
    wait_for(lambda: has_begun(tmp_path, 2))
    os.killpg(process.pid, number)  # as a terminal does; the children are in sessions of their own
    code, _, err = finish(process)
    assert code == 128 + number
    assert err.splitlines()[-1] == 'stopped with 0 of 4 runs complete; the same command resumes'
    stopped = (tmp_path / 'synthetic_fold1_resnet18_seed42' / runs.LOG).read_text()
    assert 'KeyboardInterrupt' not in stopped, 'the children get SIGTERM from us, and no SIGINT'
    for begun in starts_of(tmp_path):
        with pytest.raises(ProcessLookupError):
            os.kill(begun['pid'], 0)


@pytest.mark.slow
def test_a_second_signal_kills(tmp_path):
    process = start_grid(tmp_path, '--epochs', '400', '--seeds', '666')  # the stand-in does not hear SIGTERM then
    wait_for(lambda: has_begun(tmp_path))
    begin = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    code, _, err = finish(process)
    assert (code, 'a second signal kills them' in err) == (130, True)
    assert time.monotonic() - begin < 15


@pytest.mark.slow
def test_jobs_share_the_cores_and_the_devices(tmp_path, monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.chdir(tmp_path)
    assert grid('a', '--gpus', '5,7', '--jobs', '4', '--epochs', '20')[0] == 0  # a relative path is the caller's
    starts = starts_of(tmp_path / 'a')
    assert {start['OMP_NUM_THREADS'] for start in starts} == {str(max(1, cores() // 4))}
    assert sorted(start['CUDA_VISIBLE_DEVICES'] for start in starts) == ['5', '5', '7', '7']
    assert max(start['begin'] for start in starts) < min(ends_of(tmp_path / 'a')), 'four at once'
    # One at a time is as train.py alone: neither the threads nor the devices are touched.
    assert grid('b')[0] == 0
    starts = sorted(starts_of(tmp_path / 'b'), key=lambda start: start['begin'])
    assert {(start['OMP_NUM_THREADS'], start['CUDA_VISIBLE_DEVICES']) for start in starts} == {(None, None)}
    assert all(end < start['begin'] for end, start in zip(ends_of(tmp_path / 'b'), starts[1:]))


# ---------------------------------------------------------------------------------------------- ablation.py


def test_studies_name_models_of_their_own_and_share_no_folder():
    full = MODELS['twistnet18']['twist']
    for study, models in ablation.STUDIES.items():
        assert 'twistnet18' in models, study
        assert len({str(full | MODELS[model]['twist']) for model in models}) == len(models), 'configurations differ'
    assert {*ablation.models_of(['all'])} == {name for name, entry in MODELS.items() if 'twist' in entry}
    assert ablation.models_of(['heads', 'stages']) == [
        *('twistnet18_heads1', 'twistnet18_heads2', 'twistnet18', 'twistnet18_stage3', 'twistnet18_stage4')
    ]


def test_ablation_command(capsys):
    argv = ['--dataset', 'dtd', '--data_dir', 'x', '--epochs', '9', '--dry_run', '--folds', '1-3', '--study']
    ablation.main(*ablation.get_args_parser().parse_known_args([*argv, 'heads', 'gate']))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    assert '--epochs 9 --model twistnet18_heads1 --fold 1 --seed 42' in lines[0]
    with pytest.raises(RunError, match="--study: unknown 'head'; there are: components, heads"):
        ablation.main(*ablation.get_args_parser().parse_known_args([*argv, 'head']))
