"""The promises of run_all.py --tune: the same search for every model, by validation accuracy alone."""

import argparse
import json
import os
import signal

import pytest
from conftest import finish, run
from test_run_all import grid, lines_of, start_grid, states_in, wait_for, write_run

import run_all
import summarize_runs
from common import grid as tuning
from common import options, runs
from common.errors import RunError

TUNE = ('--tune', 'lr=0.001,0.01,0.1', '--jobs', '4')
BEST = dict(resnet18=0.1, twistnet18=0.01)  # what the stand-in for train.py rewards
ONE = ('--models', 'resnet18', '--folds', '1')


def tuned(run_dir) -> dict:
    return runs.read_json(run_dir / tuning.FILE)


def entry(run_dir, model: str) -> dict:
    return tuned(run_dir)['datasets']['synthetic']['models'][model]


def recorded(folder) -> dict:
    return runs.read_json(folder / 'config.json')['options']['tuned']


def trials(run_dir) -> dict[str, int]:
    """How often each trial was started, by SETTING/RUN."""
    found = sorted((run_dir / tuning.FOLDER).glob('*/*/starts'))
    return {str(path.parent.relative_to(run_dir / tuning.FOLDER)): len(path.read_text().splitlines()) for path in found}


# ---------------------------------------------------------------------------------------------- search and choice


def search_of(run_dir, *argv) -> tuning.Search:
    """As run_all.py plans it, of lr 0.1 and 0.2 on fold 1 with seed 0 unless `argv`, options of train.py, say more."""
    args = argparse.Namespace(run_dir=run_dir, folds=[1], tune=['lr=0.1,0.2'], tune_fold=None, tune_seed=None)
    return tuning.plan_search(args, options.parse_args([*argv]))


def test_values_are_read_as_train_py_reads_them(tmp_path):
    values = tuning.parse_tune(['lr=1e-3,.01,0.01 --mixup=0,', 'randaug_n=2 rotate=any'])
    assert values == dict(lr=[0.001, 0.01], mixup=[0.0], randaug_n=[2], rotate=['any'])
    search = search_of(tmp_path)._replace(values=tuning.parse_tune(['lr=0.1,0.2 ema=off,on']))
    texts = ['lr 0.1, ema off', 'lr 0.1, ema on', 'lr 0.2, ema off', 'lr 0.2, ema on']
    assert [tuning.text_of(setting) for setting in search.settings] == texts
    assert search.record == dict(tune='lr=0.1,0.2 ema=off,on', fold=1, seed=0)
    for setting in search.settings:
        args = vars(options.parse_args(tuning.words_of(setting)))
        assert {name: args[name] for name in setting} == setting


def test_the_first_of_the_best_is_chosen_by_validation(tmp_path):
    made = []
    for lr, accuracy in enumerate((None, 40.0, 50.0, 50.0)):  # the first has diverged
        (tmp_path / str(lr)).mkdir()
        if accuracy is not None:
            results = dict(best_val_acc=accuracy, test_acc=99.0 - accuracy)
            runs.write_json(tmp_path / str(lr) / 'results.json', results)
        made.append(tuning.Run(tmp_path / str(lr), [], {}, tries=dict(lr=lr)))
    chosen = tuning.choose('m', made)
    assert (chosen['chosen'], chosen['val_acc']) == (dict(lr=2), 50.0)
    assert [(trial['options']['lr'], trial['val_acc']) for trial in chosen['trials']] == [
        *((0, None), (1, 40.0), (2, 50.0), (3, 50.0))
    ]
    with pytest.raises(RunError, match='--tune: m diverges with every setting'):
        tuning.choose('m', made[:1])


def test_a_choice_at_the_edge_of_the_search_is_said():
    values = dict(lr=[0.1, 0.01, 0.001], mixup=[0.0, 0.2], opt=['sgd', 'adamw'], momentum=[0.9])
    middle = dict(lr=0.01, mixup=0.0, opt='sgd', momentum=0.9)
    assert tuning.edge_notes(middle, values) == [], 'nothing is below mixup 0'
    assert tuning.edge_notes(middle | dict(lr=0.1, mixup=0.2), values) == [
        'lr 0.1 is the highest that was tried; a higher one may be better',
        'mixup 0.2 is the highest that was tried; a higher one may be better',
    ]
    assert 'lr 0.001 is the lowest' in tuning.edge_notes(middle | dict(lr=0.001), values)[0]


def test_the_choices_of_another_search_are_refused(tmp_path):
    search = search_of(tmp_path)
    made = dict(chosen=dict(lr=0.1), val_acc=50.0, trials=[dict(options=dict(lr=0.1), val_acc=50.0)])
    tuning.add_choices(search._replace(values=dict(lr=[0.3]), fold=2), {})
    tuning.add_choices(search, dict(resnet18=made))  # nothing was chosen by the first
    assert tuning.read_choices(search)[1] == dict(resnet18=made)
    for other, words in (
        (search_of(tmp_path, '--class_weights', 'balanced'), 'class_weights None -> balanced'),
        (search_of(tmp_path, '--epochs', '7'), 'epochs 10 -> 7'),
        (search._replace(values=dict(lr=[0.1])), 'tune lr=0.1,0.2 -> lr=0.1'),
        (search._replace(fold=2), 'fold 1 -> 2'),
        (search._replace(seed=1), 'seed 0 -> 1'),
    ):
        with pytest.raises(RunError, match=rf'tuned\.json is of another search \({words}\); give its options'):
            tuning.read_choices(other)
        assert tuning.read_choices(other, again=['resnet18'])[1] == {}
    tuning.add_choices(search._replace(dataset='x'), {})
    assert tuned(tmp_path)['datasets'].keys() == {'synthetic', 'x'}
    record = tuned(tmp_path)
    del record['datasets']['synthetic']['options']['resize']  # of code before that option
    runs.write_json(tmp_path / tuning.FILE, record)
    assert tuning.read_choices(search)[1] == dict(resnet18=made)
    with pytest.raises(RunError, match='resize crop -> pad'):
        tuning.read_choices(search_of(tmp_path, '--resize', 'pad'))
    (tmp_path / tuning.FILE).write_text('{"torn')
    with pytest.raises(RunError, match=r'tuned\.json: damaged; delete it, and the same run_all\.py --tune makes it'):
        search_of(tmp_path)


# ---------------------------------------------------------------------------------------------- run_all.py --tune


@pytest.mark.slow
def test_every_model_gets_the_same_search_and_runs_with_its_own_choice(tmp_path):
    code, out, err = grid(tmp_path, *TUNE)
    assert (code, out) == (0, ''), err
    assert sorted(trials(tmp_path)) == sorted(
        f'lr={lr}/synthetic_fold1_{model}_seed0' for lr in (0.001, 0.01, 0.1) for model in BEST
    ), "one fold, one seed, not the grid's"
    search = dict(tune='lr=0.001,0.01,0.1', fold=1, seed=0)
    assert {k: tuned(tmp_path)[k] for k in search} == search
    for model, lr in BEST.items():
        assert entry(tmp_path, model)['chosen'] == dict(lr=lr)
        assert [trial['options']['lr'] for trial in entry(tmp_path, model)['trials']] == [0.001, 0.01, 0.1]
        for fold in (1, 2):
            folder = tmp_path / f'synthetic_fold{fold}_{model}_seed42'
            assert runs.read_json(folder / 'config.json')['options']['lr'] == lr
            assert recorded(folder) == search | dict(options=dict(lr=lr), tried=3, diverged=0)
    assert 'resnet18 on synthetic: lr 0.1, validation accuracy 60.00 %, the best of 3 settings' in err
    assert 'note: resnet18 on synthetic: lr 0.1 is the highest that was tried' in err
    assert 'note: twistnet18' not in err
    # The same command makes nothing again; neither does one whose trials were removed, for other folds.
    assert grid(tmp_path, *TUNE) == (0, '', f'4 runs in {tmp_path}: 4 complete\n')
    (tmp_path / tuning.FOLDER).rename(tmp_path / 'elsewhere')
    _, out, _ = grid(tmp_path, *TUNE, '--folds', '2-3', '--dry_run')
    assert states_in(out) == ['complete', 'complete', 'new', 'new']
    assert out.splitlines()[2].endswith('--lr 0.1 --model resnet18 --fold 3 --seed 42')


def test_without_images_of_validation_nothing_is_tuned(tmp_path):
    code, out, err = grid(tmp_path, *TUNE, '--train_on', 'trainval', '--dry_run')
    assert (code, out) == (1, '')
    assert '--tune chooses by validation accuracy, and --train_on trainval leaves no image to validate' in err


def test_a_plan_shows_the_trials_and_what_waits_for_them(tmp_path):
    run_dir = tmp_path / 'runs'
    code, out, err = grid(run_dir, *TUNE, '--tune_seed', '42', '--tune_fold', '2', '--dry_run')
    lines = out.splitlines()
    assert (code, len(lines)) == (0, 6 + 4)
    assert lines[0].startswith('new ')
    assert lines[0].endswith('--lr 0.001 --model resnet18 --fold 2 --seed 42')
    assert f'--run_dir {run_dir}/tune/lr=0.001 ' in lines[0]
    assert all(line.startswith('not tuned ') for line in lines[6:])
    assert 'note: seed 42 is of the grid and of the trials' in err
    assert err.splitlines()[-2:] == [f'6 trials in {run_dir}/tune: 6 new', f'4 runs in {run_dir}: 4 not tuned']
    assert not run_dir.exists()


@pytest.mark.slow
def test_an_interrupted_search_goes_on_and_a_later_model_joins(tmp_path):
    more = (*TUNE, '--epochs', '20')
    process = start_grid(tmp_path, *more, *ONE, '--jobs', '1')
    wait_for(lambda: len(trials(tmp_path)) == 2)
    os.kill(process.pid, signal.SIGTERM)
    code, _, err = finish(process)
    assert (code, 'of 3 trials complete; the same command resumes' in err) == (143, True)
    assert grid(tmp_path, *more, *ONE)[0] == 0
    assert next(iter(trials(tmp_path).values())) == 1, 'what was complete is not made again'
    before = entry(tmp_path, 'resnet18')
    code, _, err = grid(tmp_path, *more, '--folds', '2')
    assert (code, '3 trials in' in err) == (0, True), 'of the other model'
    assert entry(tmp_path, 'resnet18') == before
    assert 'lr=0.1/synthetic_fold1_twistnet18_seed0' in trials(tmp_path), 'on the fold of the other model'


@pytest.mark.slow
def test_a_setting_that_diverges_is_tried_once_and_not_chosen(tmp_path):
    tune = ('--tune', 'lr=0.01,10,100', '--jobs', '4')  # the stand-in's loss is not finite from 10 on
    code, _, err = grid(tmp_path, *tune)
    assert code == 0, err
    assert [trial['val_acc'] for trial in entry(tmp_path, 'resnet18')['trials']] == [50.0, None, None]
    assert recorded(tmp_path / 'synthetic_fold2_resnet18_seed42')['diverged'] == 2
    (tmp_path / tuning.FILE).unlink()
    code, _, err = grid(tmp_path, *tune)
    assert (code, f'6 trials in {tmp_path}/tune: 2 complete, 4 diverged' in err) == (0, True)
    assert set(trials(tmp_path).values()) == {1}
    # Another configuration may train: what is said of the first is not said of it.
    _, out, _ = grid(tmp_path, *tune, '--clip_grad', '0.5', '--force', '--dry_run')
    assert states_in(out)[2:6] == ['new'] * 4


@pytest.mark.slow
def test_a_search_may_be_widened_or_forced(tmp_path):
    folder = tmp_path / 'synthetic_fold1_resnet18_seed42'
    assert grid(tmp_path, *TUNE, *ONE)[0] == 0
    # A wider search after the file is deleted keeps the trials, and the run if the choice is the same.
    (tmp_path / tuning.FILE).unlink()
    code, _, err = grid(tmp_path, '--tune', 'lr=0.001,0.01,0.1,0.05', *ONE)
    assert (code, '4 trials in' in err, '3 complete, 1 new' in err) == (0, True, True)
    assert sum(trials(tmp_path).values()) == 4
    assert recorded(folder)['tried'] == 4
    assert len(lines_of(tmp_path, 'made')[folder.name]) == 1
    # --force tunes all models of the file again, with any search; an interrupted one then resumes without --force.
    other = ('--tune', 'lr=0.05,0.02', *ONE, '--epochs', '30')
    process = start_grid(tmp_path, *other, '--force')
    wait_for(lambda: 'lr=0.02/synthetic_fold1_resnet18_seed0' in trials(tmp_path))
    os.kill(process.pid, signal.SIGTERM)
    assert 'the same command without --force resumes' in finish(process)[2]
    code, _, err = grid(tmp_path, *other)
    assert (code, '1 complete, 1 ' in err) == (0, True)
    assert (tuned(tmp_path)['tune'], entry(tmp_path, 'resnet18')['chosen']) == ('lr=0.05,0.02', dict(lr=0.05))


@pytest.mark.slow
def test_runs_that_fit_no_setting_are_found_before_the_trials(tmp_path):
    folder = tmp_path / 'synthetic_fold1_resnet18_seed42'
    assert grid(tmp_path, *ONE)[0] == 0  # lr 0.05 of the recipe
    code, _, err = grid(tmp_path, *ONE, *TUNE)
    assert code == 1
    assert f'{folder} holds another configuration: lr 0.05 -> 0.001, and fits no setting of --tune; take' in err
    assert trials(tmp_path) == {}
    code, _, err = grid(tmp_path, *ONE, '--tune', 'lr=0.05,0.001')
    assert (code, '1 run in' in err) == (0, True), 'that run is the one that was chosen'
    assert len(lines_of(tmp_path, 'made')[folder.name]) == 1
    assert recorded(folder)['options'] == dict(lr=0.05)


@pytest.mark.slow
def test_several_grids_on_one_folder_make_each_run_once_and_write_one_file(tmp_path):
    models = (*BEST, ','.join(BEST))
    several = [start_grid(tmp_path, '--tune', 'lr=0.1,0.01', '--models', each, '--jobs', '2') for each in models]
    assert [finish(process)[0] for process in several] == [0, 0, 0]
    assert {model: entry(tmp_path, model)['chosen']['lr'] for model in BEST} == BEST
    assert [*trials(tmp_path).values()] == [1] * 4
    assert [len(lines) for lines in lines_of(tmp_path, 'made').values()] == [1] * 4


def test_slurm_gets_the_trials_and_then_the_grid(tmp_path, monkeypatch):
    submitted = []
    monkeypatch.setattr(run_all, 'submit', lambda args, todo, noun: submitted.append((noun, todo)))
    argv = (tmp_path, '--launcher', 'slurm', '--tune', 'lr=0.1,0.2')
    assert grid(*argv)[2].endswith(f'4 runs in {tmp_path}: 4 not tuned\n')
    ((noun, todo),) = submitted
    assert (noun, len(todo)) == ('trial', 4)
    for made in todo:
        if made.options['model'] == 'resnet18':  # whose trials end first
            write_run(made.folder, made.command[2:], best_val_acc=100 * made.options['lr'])
    assert f'4 runs in {tmp_path}: 2 new, 2 not tuned' in grid(*argv)[2]
    assert [(noun, len(todo)) for noun, todo in submitted[1:]] == [('trial', 2), ('run', 2)]
    assert {(run.options['model'], run.options['lr']) for run in submitted[-1][1]} == {('resnet18', 0.2)}


def test_train_py_records_how_it_was_tuned_and_tables_say_so(tree, tmp_path, tiny, capsys):
    search = dict(tune='lr=1000.0,0.01', fold=1, seed=0, options=dict(lr=0.01), tried=2, diverged=1)
    folder, _ = run(tree, tmp_path / 'runs', '--lr', '0.01', '--tuned', json.dumps(search))
    assert recorded(folder) == search
    summarize_runs.main(summarize_runs.get_args_parser().parse_args(['--run_dir', str(tmp_path / 'runs'), '--val']))
    out = capsys.readouterr().out
    assert out.startswith('3 epochs, 32 px, from scratch, lr tuned\n')
    assert '2 settings (lr 1000.0, 0.01): Tiny lr 0.01 (1 of 2 diverged).' in out
