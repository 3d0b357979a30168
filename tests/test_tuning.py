"""The promises of run_all.py --tune: the same search for every model, by validation accuracy alone."""

import json
import os
import signal

import pytest
from conftest import finish, make_run, start
from test_run_all import grid, lines_of, wait_for

import run_all
from common import options, runs, tuning
from common.errors import RunError
from common.grid import difference_to

TUNE = ('--tune', 'lr=0.001,0.01,0.1')
BEST = dict(resnet18=0.1, twistnet18=0.01)  # what the stand-in for train.py rewards


def tuned(run_dir) -> dict:
    return runs.read_json(run_dir / tuning.FILE)


def entry(run_dir, model: str) -> dict:
    return tuned(run_dir)['datasets']['synthetic']['models'][model]


def trials(run_dir) -> dict[str, int]:
    """How often each trial was started, by SETTING/RUN."""
    found = sorted((run_dir / tuning.FOLDER).glob('*/*/starts'))
    return {str(path.parent.relative_to(run_dir / tuning.FOLDER)): len(path.read_text().splitlines()) for path in found}


# ---------------------------------------------------------------------------------------------- the tune string


def test_values_are_read_as_train_py_reads_them():
    assert tuning.parse_tune(['lr=1e-3,.01,0.01 --mixup=0,', 'randaug_n=2']) == dict(
        lr=[0.001, 0.01], mixup=[0.0], randaug_n=[2]
    )
    search = tuning.Search(tuning.parse_tune(['lr=0.1,0.2 weight_decay=0,1e-4']), 1, 0)
    assert [tuning.text_of(setting) for setting in search.settings] == [
        'lr 0.1, weight_decay 0.0',
        'lr 0.1, weight_decay 0.0001',
        'lr 0.2, weight_decay 0.0',
        'lr 0.2, weight_decay 0.0001',
    ]
    assert search.record == dict(tune='lr=0.1,0.2 weight_decay=0.0,0.0001', fold=1, seed=0)
    for setting in search.settings:
        args = vars(options.parse_args(tuning.words_of(setting)))
        assert {name: args[name] for name in setting} == setting


def test_a_switch_is_on_or_off(monkeypatch):
    monkeypatch.setattr(tuning, 'fixed_options', lambda: set())
    values = tuning.parse_tune(['compile=off,on'])
    assert values == dict(compile=[False, True])
    assert [tuning.words_of(setting) for setting in tuning.Search(values, 1, 0).settings] == [[], ['--compile']]
    assert tuning.Search(values, 1, 0).record['tune'] == 'compile=off,on'
    with pytest.raises(RunError, match='--tune: compile=1: a switch is on or off'):
        tuning.parse_tune(['compile=1'])


@pytest.mark.parametrize(
    ('tune', 'words'),
    [
        ('larning_rate=0.1', "--tune: train.py has no option 'larning_rate'; what can be searched: batch_size, "),
        ('lr=0.1,fast', "--tune: lr=fast: argument --lr: invalid float value: 'fast'"),
        ('lr=0.1 lr=0.2', '--tune: lr is given twice'),
        ('lr', "--tune: 'lr' is not NAME=VALUE,.."),
        ('lr=', "--tune: 'lr=' is not NAME=VALUE,.."),
        (' ', '--tune: names no option'),
        ('crop_scale=0.1', '--tune: crop_scale=0.1: argument --crop_scale: expected 2 arguments'),
        *((f'{name}=1', f'--tune: {name} is the same for all models') for name in ('fold', 'seed', 'dataset', 'model')),
        *((f'{name}=1', f'--tune: {name} is the same for all models') for name in ('run_dir', 'epochs', 'img_size')),
        ('lr=0.1,5000', '--lr 5000.0 must be from'),
    ],
)
def test_a_wrong_search_ends_in_one_line_before_anything_starts(tmp_path, tune, words):
    code, out, err = finish(grid(tmp_path / 'runs', '--tune', tune))
    assert (code, out) == (1, '')
    assert err.splitlines()[-1].startswith(f'run_all.py: error: {words}'), err
    assert err.count('\n') == 1
    assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize(
    ('more', 'words'),
    [
        (['--tune', 'lr=0.1', '--lr', '0.2'], '--lr is given, and --tune searches it too'),
        (['--tune', 'lr=0.1', '--tune_fold', '9'], '--tune_fold: synthetic has folds 1 to 5, not 9'),
        (['--tune_fold', '2'], '--tune_fold and --tune_seed are of --tune, which is not given'),
    ],
)
def test_options_that_do_not_go_together(tmp_path, more, words):
    code, out, err = finish(grid(tmp_path / 'runs', *more))
    assert (code, out) == (1, '')
    assert words in err
    assert err.count('\n') == 1
    assert not (tmp_path / 'runs').exists()


# ---------------------------------------------------------------------------------------------- the choice


def test_the_first_of_the_best_is_chosen_and_a_diverged_one_never():
    settings = [dict(lr=value) for value in (0.1, 0.2, 0.3)]
    chosen = tuning.choose('m', list(zip(settings, (40.0, 50.0, 50.0))))
    assert (chosen['chosen'], chosen['val_acc']) == (dict(lr=0.2), 50.0)
    assert chosen['trials'] == [dict(options=s, val_acc=v) for s, v in zip(settings, (40.0, 50.0, 50.0))]
    assert tuning.choose('m', list(zip(settings, (None, 0.0, None))))['chosen'] == dict(lr=0.2)
    with pytest.raises(RunError, match='--tune: m diverges with every setting'):
        tuning.choose('m', [(settings[0], None)])


def test_validation_accuracy_is_all_that_is_read_of_a_trial(tmp_path):
    folder = make_run(tmp_path, test_acc=99.0)
    results = runs.read_json(folder / 'results.json')
    runs.write_json(folder / 'results.json', dict(best_val_acc=12.5))
    assert tuning.accuracy_of(folder) == 12.5
    runs.write_json(folder / 'results.json', results)
    with pytest.raises(RunError, match='best_val_acc is None'):
        tuning.accuracy_of(folder)


def test_a_choice_at_the_edge_of_the_search_is_said():
    values = dict(lr=[0.1, 0.01, 0.001], mixup=[0.0, 0.2], opt=['sgd', 'adamw'], momentum=[0.9])
    middle = dict(lr=0.01, mixup=0.0, opt='sgd', momentum=0.9)
    assert tuning.edge_notes(middle, values) == [], 'nothing is below mixup 0'
    assert tuning.edge_notes(middle | dict(lr=0.1, mixup=0.2), values) == [
        'lr 0.1 is the highest that was tried; a higher one may be better',
        'mixup 0.2 is the highest that was tried; a higher one may be better',
    ]
    (note,) = tuning.edge_notes(middle | dict(lr=0.001), values)
    assert note.startswith('lr 0.001 is the lowest')


# ---------------------------------------------------------------------------------------------- run_all.py --tune


@pytest.mark.slow
def test_every_model_gets_the_same_search_and_runs_with_its_own_choice(tmp_path):
    code, out, err = finish(grid(tmp_path, *TUNE, '--jobs', '2'))
    assert (code, out) == (0, ''), err
    assert sorted(trials(tmp_path)) == sorted(
        f'lr={lr}/synthetic_fold1_{model}_seed0' for lr in (0.001, 0.01, 0.1) for model in BEST
    ), "one fold, one seed, not the grid's"
    assert {k: tuned(tmp_path)[k] for k in ('tune', 'fold', 'seed')} == dict(tune='lr=0.001,0.01,0.1', fold=1, seed=0)
    for model, lr in BEST.items():
        assert entry(tmp_path, model)['chosen'] == dict(lr=lr)
        assert [trial['options']['lr'] for trial in entry(tmp_path, model)['trials']] == [0.001, 0.01, 0.1]
        for fold in (1, 2):
            config = runs.read_json(tmp_path / f'synthetic_fold{fold}_{model}_seed42' / 'config.json')
            assert (config['options']['lr'], config['options']['epochs']) == (lr, 6)
    assert 'resnet18 on synthetic: lr 0.1, validation accuracy 60.00 %, the best of 3 settings' in err
    assert 'note: resnet18 on synthetic: lr 0.1 is the highest that was tried' in err
    assert 'note: twistnet18' not in err
    assert len(lines_of(tmp_path, 'made')) == 4, 'the trials are no runs of the grid'
    # The same command makes nothing again; neither does one whose trials were removed, for other folds.
    code, _, err = finish(grid(tmp_path, *TUNE))
    assert (code, err) == (0, f'4 runs in {tmp_path}: 4 complete\n')
    (tmp_path / tuning.FOLDER).rename(tmp_path / 'elsewhere')
    code, out, err = finish(grid(tmp_path, *TUNE, '--folds', '2-3', '--dry_run'))
    assert [line.split()[0] for line in out.splitlines()] == ['complete', 'complete', 'new', 'new']
    assert out.splitlines()[2].endswith('--lr 0.1 --model resnet18 --fold 3 --seed 42')


def test_a_plan_shows_the_trials_and_what_waits_for_them(tmp_path):
    code, out, err = finish(grid(tmp_path / 'runs', *TUNE, '--tune_seed', '42', '--tune_fold', '2', '--dry_run'))
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 6 + 4
    assert lines[0].startswith('new ')
    assert lines[0].endswith('--lr 0.001 --model resnet18 --fold 2 --seed 42')
    assert f'--run_dir {tmp_path}/runs/tune/lr=0.001 ' in lines[0]
    assert all(line.startswith('not tuned ') for line in lines[6:])
    assert 'note: seed 42 is of the grid and of the trials' in err
    assert err.splitlines()[-2:] == [
        f'6 trials in {tmp_path}/runs/tune: 6 new',
        f'4 runs in {tmp_path}/runs: 4 not tuned',
    ]
    assert not (tmp_path / 'runs').exists()


@pytest.mark.slow
def test_an_interrupted_search_goes_on_and_a_later_model_joins(tmp_path):
    more = ('--models', 'resnet18', '--epochs', '20')
    process = grid(tmp_path, *TUNE, *more)
    wait_for(lambda: len(trials(tmp_path)) == 2)
    os.kill(process.pid, signal.SIGTERM)
    code, _, err = finish(process)
    assert (code, 'of 3 trials complete; the same command resumes' in err) == (143, True)
    assert tuned(tmp_path)['datasets']['synthetic']['models'] == {}, 'the search is recorded, no choice is'
    assert finish(grid(tmp_path, *TUNE, *more))[0] == 0
    assert next(iter(trials(tmp_path).values())) == 1, 'what was complete is not made again'
    before = entry(tmp_path, 'resnet18')
    code, _, err = finish(grid(tmp_path, *TUNE, '--epochs', '20', '--folds', '2-3'))
    assert code == 0
    assert '3 trials in' in err, 'of the other model'
    assert entry(tmp_path, 'resnet18') == before
    assert 'lr=0.1/synthetic_fold1_twistnet18_seed0' in trials(tmp_path), 'on the fold of the other model'


@pytest.mark.slow
def test_a_setting_that_diverges_is_tried_once_and_not_chosen(tmp_path):
    tune = ('--tune', 'lr=0.01,10,100')  # the stand-in's loss is not finite from 10 on
    code, _, err = finish(grid(tmp_path, *tune, '--jobs', '2'))
    assert code == 0, err
    assert [trial['val_acc'] for trial in entry(tmp_path, 'resnet18')['trials']] == [50.0, None, None]
    (tmp_path / tuning.FILE).unlink()
    code, _, err = finish(grid(tmp_path, *tune))
    assert code == 0
    assert f'6 trials in {tmp_path}/tune: 2 complete, 4 diverged' in err
    assert set(trials(tmp_path).values()) == {1}
    # Another configuration may train: what is said of the first is not said of it.
    code, out, _ = finish(grid(tmp_path, *tune, '--clip_grad', '0.5', '--force', '--dry_run'))
    assert [line.split()[0] for line in out.splitlines()[2:6]] == ['new'] * 4
    code, _, err = finish(grid(tmp_path / 'all', '--tune', 'lr=10,100', '--models', 'resnet18'))
    assert code == 1
    assert err.splitlines()[-1].startswith('run_all.py: error: --tune: resnet18 diverges with every setting')


@pytest.mark.slow
def test_another_search_in_the_folder_is_refused_with_the_way_out(tmp_path):
    one = ('--models', 'resnet18', '--folds', '1')
    assert finish(grid(tmp_path, *TUNE, *one))[0] == 0
    for more, words in (
        (['--tune', 'lr=0.1'], 'tune lr=0.001,0.01,0.1 -> lr=0.1'),
        ([*TUNE, '--tune_fold', '2'], 'fold 1 -> 2'),
        ([*TUNE, '--tune_seed', '1'], 'seed 0 -> 1'),
        ([*TUNE, '--epochs', '7'], 'epochs 6 -> 7'),
        ([*TUNE, '--clip_grad', '2'], 'clip_grad 1.0 -> 2.0'),
    ):
        code, out, err = finish(grid(tmp_path, *one, *more))
        assert (code, out) == (1, '')
        assert f'{tmp_path}/tuned.json is of another search ({words}); give its options, take another' in err
        assert err.count('\n') == 1
    # A wider search after the file is deleted keeps the trials; the run that has another choice now is reported.
    (tmp_path / tuning.FILE).unlink()
    code, _, err = finish(grid(tmp_path, *one, '--tune', 'lr=0.001,0.01,0.1,0.05'))
    assert code == 0
    assert '4 trials in' in err
    assert '3 complete, 1 new' in err
    assert sum(trials(tmp_path).values()) == 4
    # --force tunes all models of the file again, with any search.
    code, _, err = finish(grid(tmp_path, *one, '--tune', 'lr=0.05,0.01', '--force'))
    assert code == 0, err
    assert (tuned(tmp_path)['tune'], entry(tmp_path, 'resnet18')['chosen']) == ('lr=0.05,0.01', dict(lr=0.05))


@pytest.mark.slow
def test_runs_that_fit_no_setting_are_found_before_the_trials(tmp_path):
    one = ('--models', 'resnet18', '--folds', '1')
    assert finish(grid(tmp_path, *one))[0] == 0  # lr 0.05 of the recipe
    code, _, err = finish(grid(tmp_path, *one, *TUNE))
    assert code == 1
    assert 'synthetic_fold1_resnet18_seed42 holds another configuration: lr 0.05 -> 0.001, and fits no setting' in err
    assert trials(tmp_path) == {}
    code, _, err = finish(grid(tmp_path, *one, '--tune', 'lr=0.05,0.001'))
    assert (code, '1 run in' in err) == (0, True), 'that run is the one that was chosen'
    assert len(lines_of(tmp_path, 'made')['synthetic_fold1_resnet18_seed42']) == 1


@pytest.mark.parametrize(
    'text', ['{"torn', '{}', '[]', '{"tune": "lr=1", "fold": 1, "seed": 0, "datasets": {"dtd": {"models": [1]}}}']
)
def test_a_damaged_or_foreign_file_is_named(tmp_path, text):
    (tmp_path / tuning.FILE).write_text(text)
    code, _, err = finish(grid(tmp_path, *TUNE))
    assert code == 1
    assert err.startswith(f'run_all.py: error: {tmp_path}/tuned.json: ')
    assert 'delete it' in err
    assert err.count('\n') == 1


@pytest.mark.slow
def test_two_grids_with_other_models_write_one_file(tmp_path):
    several = [grid(tmp_path, '--tune', 'lr=0.1,0.01', '--models', model) for model in BEST]
    assert [finish(process)[0] for process in several] == [0, 0]
    assert {model: entry(tmp_path, model)['chosen']['lr'] for model in BEST} == BEST


@pytest.mark.slow
def test_force_discards_the_grid_too_so_that_an_interrupted_search_resumes(tmp_path):
    one = ('--models', 'resnet18', '--folds', '1')
    assert finish(grid(tmp_path, *TUNE, *one))[0] == 0
    process = grid(tmp_path, '--tune', 'lr=0.01,0.02', *one, '--epochs', '60', '--force')
    wait_for(lambda: 'lr=0.02/synthetic_fold1_resnet18_seed0' in trials(tmp_path))
    os.kill(process.pid, signal.SIGTERM)
    assert 'the same command without --force resumes' in finish(process)[2]
    code, _, err = finish(grid(tmp_path, '--tune', 'lr=0.01,0.02', *one, '--epochs', '60'))
    assert code == 0, err
    assert '1 complete, 1 ' in err


def test_slurm_gets_the_trials_and_then_the_grid(tmp_path, monkeypatch, capsys):
    submitted = []
    monkeypatch.setattr(run_all, 'submit', lambda args, todo, noun: submitted.append((noun, args.run_dir, todo)))
    argv = ['--dataset', 'synthetic', '--models', 'resnet18,twistnet18', '--launcher', 'slurm', '--run_dir']
    argv += [str(tmp_path), '--tune', 'lr=0.1,0.2', '--folds', '1-2']
    run_all.cli(argv)
    ((noun, run_dir, todo),) = submitted
    assert (noun, run_dir, len(todo)) == ('trial', tmp_path / 'tune', 4)
    assert capsys.readouterr().err.endswith(f'4 runs in {tmp_path}: 4 not tuned\n')
    for run in todo:
        if run.options['model'] == 'resnet18':  # whose trials end first
            run.folder.mkdir(parents=True)
            runs.write_json(run.folder / 'config.json', dict(options=run.options, fingerprint='x'))
            runs.write_json(run.folder / 'results.json', dict(fingerprint='x', best_val_acc=100 * run.options['lr']))
    run_all.cli(argv)
    assert [(noun, len(todo)) for noun, _, todo in submitted[1:]] == [('trial', 2), ('run', 2)]
    assert {(run.options['model'], run.options['lr']) for run in submitted[-1][2]} == {('resnet18', 0.2)}
    assert f'4 runs in {tmp_path}: 2 new, 2 not tuned' in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_of_real_runs_ends_in_one_table(tree, tmp_path):
    size = ('--img_size', '32', '--batch_size', '8', '--epochs', '4', '--warmup_epochs', '0', '--num_workers', '0')
    data = ('--dataset', 'dtd', '--data_dir', str(tree), '--run_dir', str(tmp_path / 'runs'), '--models', 'resnet18')
    code, _, err = finish(
        start('run_all.py', *data, *size, '--clip_grad', '0', '--weight_decay', '10', '--tune', 'lr=1000,0.01')
    )
    assert code == 0, err
    made = runs.read_json(tmp_path / 'runs' / tuning.FILE)['datasets']['dtd']['models']['resnet18']
    assert made['chosen'] == dict(lr=0.01)
    assert made['trials'][0]['val_acc'] is None, "train.py's words for a loss that is not finite are known"
    code, out, err = finish(start('summarize_runs.py', '--run_dir', str(tmp_path / 'runs'), '--val'))
    assert code == 0
    assert out.startswith('4 epochs, 32 px, from scratch, lr tuned\n')
    assert '2 settings (lr 1000.0, 0.01): ResNet-18 lr 0.01 (1 of 2 diverged).' in out


# ---------------------------------------------------------------------------------------------- which runs were tuned


def record_of(run_dir, **options) -> dict:
    """A tuned.json that chose lr 0.01 for resnet18 on DTD."""
    model = tuning.choose('resnet18', [(dict(lr=0.001), 40.0), (dict(lr=0.01), 50.0), (dict(lr=9.0), None)])
    datasets = dict(dtd=dict(options=dict(epochs=100, pretrained=False) | options, models=dict(resnet18=model)))
    record = dict(tune='lr=0.001,0.01,9.0', fold=1, seed=0, datasets=datasets)
    runs.write_json(run_dir / tuning.FILE, record)
    return tuning.read_record(run_dir)


def test_a_run_was_tuned_where_all_that_tuned_json_says_is_so(tmp_path):
    record = record_of(tmp_path)

    def setting(**changes):
        return tuning.setting_of(record, runs.read_json(make_run(tmp_path, **changes) / 'config.json'))

    assert setting() == dict(tune='lr=0.001,0.01,9.0', fold=1, seed=0, options=dict(lr=0.01), tried=3, diverged=1)
    assert setting(fold=7, seed=3) is not None
    for other in (dict(lr=0.001), dict(epochs=99), dict(model='twistnet18'), dict(dataset='fmd'), dict(pretrained='x')):
        assert setting(**other) is None, other
    config = runs.read_json(make_run(tmp_path) / 'config.json')
    assert tuning.setting_of(None, config) is None
    # A chosen default that is no part of the fingerprint is in the options alone.
    config['defines'].pop('lr')
    assert tuning.setting_of(record, config) is not None
    config['options'].pop('lr', None)
    assert tuning.setting_of(record, config) is None
    assert json.loads((tmp_path / tuning.FILE).read_text()) == record


def test_an_option_that_is_off_by_default_is_one_of_the_search(tmp_path):
    search = tuning.Search(dict(lr=[0.1, 0.2]), 1, 0)
    plain = options.parse_args([])
    made = dict(chosen=dict(lr=0.1), val_acc=50.0, trials=[dict(options=dict(lr=0.1), val_acc=50.0)])
    tuning.add_models(tmp_path, search, plain, dict(resnet18=made), [])
    assert tuning.tuned_models(tmp_path, search, plain, []) == dict(resnet18=made)
    for more in (
        ['--class_weights', 'balanced'],
        ['--layer_decay', '0.7'],
        ['--folds_total', '3', '--dataset', 'folder'],
    ):
        other = options.parse_args(more)
        other.dataset = plain.dataset
        with pytest.raises(RunError, match=f'is of another search .*{more[0][2:]} None -> '):
            tuning.tuned_models(tmp_path, search, other, [])
    weighted = vars(options.parse_args(['--class_weights', 'balanced', '--lr', '0.1', '--model', 'resnet18']))
    record = tuning.read_record(tmp_path)
    config = dict(defines=dict(dataset='synthetic', model='resnet18'), options=weighted)
    assert tuning.setting_of(record, config | dict(options=weighted | dict(class_weights=None)))
    assert tuning.setting_of(record, config) is None


def test_a_model_that_has_an_input_size_of_its_own_was_tuned(tmp_path):
    search, grid_options = tuning.Search(dict(lr=[0.1, 0.2]), 1, 0), options.parse_args(['--recipe', 'default'])
    model = 'efficientnet_b1'  # 256 pixels
    made = dict(chosen=dict(lr=0.1), val_acc=50.0, trials=[dict(options=dict(lr=0.1), val_acc=50.0)])
    tuning.add_models(tmp_path, search, grid_options, {model: made}, [])
    record = tuning.read_record(tmp_path)

    def setting(*more):
        args = options.parse_args(['--recipe', 'default', '--model', model, '--lr', '0.1', *more])
        options.check(args)
        return tuning.setting_of(record, dict(defines=options.defining(vars(args)), options=vars(args)))

    assert setting()['options'] == dict(lr=0.1)
    assert setting('--img_size', '128') is None


def test_a_run_of_another_file_of_import_is_not_of_the_grid(tmp_path):
    path = tmp_path / 'net.py'
    path.write_text('first')
    wanted = vars(options.parse_args(['--import', str(path)]))
    config = dict(options=wanted, defines=dict(imported=runs.digest(b'first'), processes=1))
    results = dict(n_train=360, n_val=120, n_test=120)
    assert difference_to(wanted, config, results) == ''
    path.write_text('second')
    assert difference_to(wanted, config, results).startswith('imported ')
