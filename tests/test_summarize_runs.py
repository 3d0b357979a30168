"""The promises of summarize_runs.py: the numbers, what is compared and what is not, and tables that compile."""

import csv
import io
import math
import os
import re
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, make_run, write_tuned
from scipy import stats

import summarize_runs
from common import runs
from common.errors import RunError
from common.registry import DATASETS, MODELS
from common.statistics import correct, corrected_t_test, detectable, t_test
from common.tables import escape
from summarize_runs import PUBLISHED


@pytest.fixture(autouse=True, scope='module')
def _fast_disk():
    """Thousands of small files need not survive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'fsync', lambda _: None)
        yield


def arguments(run_dir, *argv):
    return summarize_runs.get_args_parser().parse_args(['--run_dir', str(run_dir), *map(str, argv)])


def tables(run_dir, *argv):
    return summarize_runs.read_tables(arguments(run_dir, *argv))


def table(run_dir, *argv):
    (only,) = tables(run_dir, *argv)
    return only


def accuracies(found):
    """Of ResNet-18 on DTD by (fold, seed)."""
    return {cell: results['test_acc'] for cell, results in found.rows['dtd', 'resnet18'].results.items()}


def show(run_dir, capsys, *argv) -> str:
    summarize_runs.main(arguments(run_dir, *argv))
    return capsys.readouterr().out


def lines_of(run_dir, capsys, *argv) -> list[dict]:
    return list(csv.DictReader(io.StringIO(show(run_dir, capsys, *argv, '--csv'))))


def fails(run_dir, *argv) -> str:
    with pytest.raises(RunError) as caught:
        summarize_runs.main(arguments(run_dir, *argv))
    return str(caught.value)


def fill(run_dir, model, values, dataset='dtd', **changes):
    for fold, value in enumerate(values, start=1):
        make_run(run_dir, model=model, fold=fold, test_acc=value, dataset=dataset, **changes)


def change(path, **changes):
    """Set values of a JSON file; ... removes one."""
    runs.write_json(path, {k: v for k, v in (runs.read_json(path) | changes).items() if v is not ...})


# ---------------------------------------------------------------------------------------------- statistics


def test_without_overlap_the_corrected_test_is_student_s():
    differences = np.random.default_rng(0).normal(1, 2, 10).tolist()
    mean, low, high, p = corrected_t_test(differences, 0.0).values()
    student = stats.ttest_1samp(differences, 0.0)
    assert mean == pytest.approx(np.mean(differences))
    assert p == pytest.approx(student.pvalue)
    assert (low, high) == pytest.approx(tuple(student.confidence_interval(0.95)))


def test_corrected_test_against_a_hand_computed_example():
    # d = 1..5: mean 3, s^2 = 2.5; (1/5 + 1/4) s^2 = 1.125, so t = 3 / sqrt(1.125) = 2.8284 with 4 degrees of freedom,
    # for which Student's distribution has the closed form below.
    mean, low, high, p = corrected_t_test([1, 2, 3, 4, 5], 0.25).values()
    t = 3 / math.sqrt(1.125)
    x = t / math.sqrt(4 + t * t)
    assert p == pytest.approx(1 - (1.5 * x - 0.5 * x**3), abs=1e-12)
    assert p == pytest.approx(0.0474, abs=5e-5)
    assert mean == 3
    assert (high - mean, mean - low) == pytest.approx((2.776445 * math.sqrt(1.125),) * 2, rel=1e-6)
    assert corrected_t_test([-1, -2, -3, -4, -5], 0.25)['p'] == pytest.approx(p)


def test_no_test_without_spread_or_with_one_fold():
    for differences, mean in (([2.0], 2.0), ([0.5, 0.5, 0.5], 0.5), ([0.0, 0.0], 0.0)):
        result = corrected_t_test(differences, 1.0)
        assert (result['value'], result['p']) == (mean, None)


def test_a_detectable_difference_is_found_in_four_of_five_studies():
    rng, error, df = np.random.default_rng(0), 1.5, 4
    size = detectable(t_test(0.2, error, df), df)
    assert size == pytest.approx(detectable(t_test(-3.0, error, df), df)), 'a matter of the spread alone'
    assert detectable(t_test(0.2, error, df), df, 2) == pytest.approx(4.58 * error, abs=0.01), 'two tests: 0.05 / 2'
    found = (size / error + rng.normal(size=200_000)) / np.sqrt(rng.chisquare(df, 200_000) / df)
    assert np.mean(abs(found) > 2.776445) == pytest.approx(0.8, abs=0.005)


def test_holm():
    for values, expected in (
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # never below that of a smaller p
        ([0.6, 0.7], [1.0, 1.0]),
        ([0.02, None, 0.03], [0.04, None, 0.04]),
        ([], []),
    ):
        tests = [dict(p=p) for p in values]
        correct(tests)
        assert [test['p_holm'] for test in tests] == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------- what is averaged


def test_seeds_are_averaged_inside_a_fold_and_the_spread_is_over_folds(tmp_path):
    accuracies = {1: [10.0, 20.0, 60.0], 2: [40.0, 50.0, 60.0], 3: [70.0, 71.0, 72.0]}
    for fold, values in accuracies.items():
        for seed, value in zip((42, 43, 44), values):
            make_run(tmp_path, fold=fold, seed=seed, test_acc=value)
    for fold, seed, value in ((1, 42, 50.0), (1, 43, 52.0), (2, 42, 60.0)):
        make_run(tmp_path, model='twistnet18', fold=fold, seed=seed, test_acc=value)
    rows = table(tmp_path).rows
    assert rows['dtd', 'twistnet18'].mean == 55.5, 'a fold with more seeds has no more weight'
    row = rows['dtd', 'resnet18']
    assert (row.folds, row.size) == ({1: 30.0, 2: 50.0, 3: 71.0}, '3 folds x 3 seeds')
    assert (row.mean, row.sd) == pytest.approx((151 / 3, statistics.stdev([30.0, 50.0, 71.0])))


def test_one_fold_has_no_spread(tmp_path, capsys):
    make_run(tmp_path, test_acc=50.04, epochs=1)
    make_run(tmp_path, model='twistnet18', epochs=1)
    out = show(tmp_path, capsys)
    assert out.startswith('1 epoch, 224 px')
    assert re.search(r'ResNet-18 +11.20M +1.82G +50.0$', out, re.M)
    assert '1 fold x 1 seed on DTD' in out
    assert 'Differences to ResNet-18 in points, paired by fold.' in out
    assert 'standard deviation' not in out
    assert 't-test' not in out, 'there is none for one fold'


def test_differences_are_paired_by_fold_and_corrected_over_the_models(tmp_path):
    base, twist, plain = [50.0, 60.0, 40.0, 55.0], [52.0, 61.0, 43.5, 56.0], [63.0, 38.0, 49.0, 55.5]
    for model, values in (('resnet18', base), ('twistnet18', twist), ('twistnet18_no_spiral', plain)):
        for fold, value in enumerate(values, start=1):  # n_test / n_train is 2/3 on average, though it is no run's
            sizes = dict(n_train=60, n_test=(20, 30, 50, 60)[fold - 1])
            make_run(tmp_path, model=model, fold=fold, test_acc=value, **sizes)
    rows = table(tmp_path).rows
    assert not rows['dtd', 'resnet18'].difference
    got = {model: rows['dtd', model] for model in ('twistnet18', 'twistnet18_no_spiral')}
    want = [corrected_t_test([a - b for a, b in zip(values, base)], 40 / 60) for values in (twist, plain)]
    correct(want)
    for test, model in zip(want, got):
        assert got[model].difference == pytest.approx(test)
        assert got[model].detectable == pytest.approx(detectable(test, 3, 2))
    assert want[0]['p_holm'] == pytest.approx(2 * want[0]['p']), 'two models are compared'
    assert want[0]['p'] > stats.ttest_rel(twist, base).pvalue


def test_the_baseline(tmp_path):
    fill(tmp_path, 'resnet18', [50.0, 60.0])
    fill(tmp_path, 'twistnet18', [53.0, 62.0])
    fill(tmp_path / 'ablation', 'twistnet18', [53.0, 62.0])
    fill(tmp_path / 'ablation', 'twistnet18_no_ais', [52.0, 60.0])
    assert table(tmp_path).baseline == 'resnet18'
    rows = table(tmp_path, '--baseline', 'twistnet18').rows
    assert rows['dtd', 'resnet18'].difference['value'] == pytest.approx(-2.5)
    assert not rows['dtd', 'twistnet18'].difference
    without = table(tmp_path, '--baseline', 'swin_tiny')
    assert not any(row.difference for row in without.rows.values())
    assert without.notes == ['DTD: no run of the baseline Swin-Tiny, so none is compared; --baseline names another']
    ablation = tmp_path / 'ablation'  # is compared with the full model
    assert table(ablation).rows['dtd', 'twistnet18_no_ais'].difference['value'] == pytest.approx(-1.5)
    for models in ((), ('--models', 'twistnet18')):  # what was asked for and is not there is named, even of one model
        notes = table(ablation, '--baseline', 'resnet18', *models).notes
        assert notes == ['DTD: no run of the baseline ResNet-18, so none is compared; --baseline names another']
    assert table(ablation, '--models', 'twistnet18').notes == []


def test_ranks_and_ties(tmp_path):
    for model, value in (('resnet18', 50.0), ('seresnet18', 61.0), ('twistnet18', 61.0), ('swin_tiny', 40.0)):
        fill(tmp_path, model, [value])
    ranks = {model: row.best for (_, model), row in table(tmp_path).rows.items()}
    assert ranks == dict(seresnet18=1, twistnet18=1, resnet18=2, swin_tiny=0)
    assert [row.best for row in table(tmp_path, '--models', 'swin_tiny').rows.values()] == [0], 'alone it is not best'


def test_missing_cells_are_named_and_nothing_is_compared(tmp_path, capsys):
    fill(tmp_path, 'resnet18', [50.0, 60.0, 70.0])
    fill(tmp_path, 'twistnet18', [90.0, 95.0])
    make_run(tmp_path, model='twistnet18', fold=3, complete=False)
    only = table(tmp_path)
    rows = only.rows
    assert rows['dtd', 'twistnet18'].missing == [(3, 42)]
    assert [(row.best, row.difference) for row in rows.values()] == [(0, {})] * 2
    assert only.notes == [
        'DTD: TwistNet-18 lacks fold 3 seed 42',
        'DTD: the models have different folds or seeds, so none is ranked or compared',
    ]
    out = show(tmp_path, capsys)
    assert '92.5 ± 3.5 †' in out
    assert 'DTD: TwistNet-18 lacks fold 3 seed 42.' in out
    assert 'Difference' not in out
    assert r'\textbf' not in show(tmp_path, capsys, '--latex')
    assert lines_of(tmp_path, capsys)[-1]['missing'] == 'fold3_seed42'
    summarize_runs.main(arguments(tmp_path, '--csv'))
    assert 'DTD: the models have different folds or seeds' in capsys.readouterr().err
    for model in ('resnet18', 'twistnet18'):  # of a seed that all models lack the same is said, but they are compared
        fill(tmp_path / 'seeds', model, [50.0, 60.0])
        make_run(tmp_path / 'seeds', model=model, fold=1, seed=43, test_acc=52.0)
    row = table(tmp_path / 'seeds').rows['dtd', 'twistnet18']
    assert (row.missing, row.size, bool(row.difference)) == ([(2, 43)], '2 folds x 1-2 seeds', True)


def test_a_model_without_a_complete_run_is_named_not_zero(tmp_path, capsys):
    fill(tmp_path, 'resnet18', [50.0], macs_G=None)
    fill(tmp_path, 'resnet18', [70.0], dataset='fmd', macs_G=None)
    fill(tmp_path, 'twistnet18', [60.0])
    make_run(tmp_path, model='seresnet18', complete=False)
    only = table(tmp_path)
    assert only.models == ['resnet18', 'seresnet18', 'twistnet18']
    assert {'DTD: no complete run of SE-ResNet-18', 'FMD: no complete run of TwistNet-18'} <= set(only.notes)
    out = show(tmp_path, capsys)
    assert re.search(r'^ResNet-18 +11.20M +- +50.0 +70.0$', out, re.M)
    assert re.search(r'^SE-ResNet-18 +- +- +- +-$', out, re.M)
    assert re.search(r'^TwistNet-18 +11.20M +1.82G +60.0 +-$', out, re.M)
    assert not re.search(r'(?<!\d)0\.0', out)


def test_runs_of_different_recipes_are_never_pooled(tmp_path, capsys):
    fill(tmp_path / 'a', 'resnet18', [50.0, 52.0, 54.0])
    fill(tmp_path / 'b', 'resnet18', [90.0, 92.0], epochs=200, lr=0.05)
    fill(tmp_path / 'c', 'resnet18', [70.0], pretrained='resnet18.a1_in1k')
    found = tables(tmp_path / 'a', tmp_path / 'b', tmp_path / 'c')
    assert [table.rows['dtd', 'resnet18'].mean for table in found] == [52.0, 91.0, 70.0]
    out = show(tmp_path / 'a', capsys, tmp_path / 'b', tmp_path / 'c')
    titles = [line for line in out.splitlines() if 'epochs' in line]
    assert titles == [
        '100 epochs, 224 px, from scratch, lr 0.01',
        '200 epochs, 224 px, from scratch, lr 0.05',
        '100 epochs, 224 px, from ImageNet weights, lr 0.01',
    ]


@pytest.mark.parametrize(
    ('given', 'words'),
    [
        ('trunk', 'ImageNet weights'),
        ('weights/twistnet18_imagenet.pt', 'ImageNet weights'),
        ('/data/weights/mine.pt', 'weights/mine.pt'),
        ('trunk=resnet18.safetensors', 'resnet18.safetensors'),
        ('runs/main/dtd_fold1_resnet18_seed42/best.pt', 'dtd_fold1_resnet18_seed42/best.pt'),
    ],
)
def test_a_title_says_where_the_weights_come_from(tmp_path, capsys, given, words):
    path = make_run(tmp_path, pretrained='abc', loaded=0.5) / 'config.json'
    change(path, options=runs.read_json(path)['options'] | dict(pretrained=given))
    make_run(tmp_path, model='swin_tiny', pretrained='def', loaded=0.5, caution='images seen')
    out = show(tmp_path, capsys, '--models', 'resnet18')
    assert out.startswith(f'100 epochs, 224 px, from {words}\n')
    assert f'Parameters loaded from {words}: 50 %.' in out
    if words != 'ImageNet weights':
        out = show(tmp_path, capsys)
        assert out.startswith(f'100 epochs, 224 px, from {words} and ImageNet weights\n')
        assert f'loaded from {words}: ResNet-18 50 %. Parameters loaded from ImageNet weights: Swin-Tiny 50 %' in out
        assert 'DTD: Swin-Tiny: images seen.' in out


@pytest.mark.parametrize(
    ('key', 'values', 'words'),
    [
        ('pretrained', ('aa', 'bb'), 'start from different weights (aa and bb)'),
        ('imported', ('aa', 'bb'), 'are of different files of --import (aa and bb)'),
        ('preprocessing', (dict(crop_ratio=0.9), dict(crop_ratio=1.0)), 'take different input'),
    ],
)
def test_a_model_that_is_another_one_in_another_fold_is_refused(tmp_path, capsys, key, values, words):
    for fold, value in zip((1, 2, 3), (*values, None if key != 'pretrained' else values[0])):
        path = make_run(tmp_path, model='my_net', fold=fold) / 'config.json'
        change(path, defines=runs.read_json(path)['defines'] | ({key: value} if value else {}))
    assert f'runs of my_net {words}' in fails(tmp_path)
    shutil.rmtree(tmp_path / 'dtd_fold2_my_net_seed42')
    assert 'my_net' in show(tmp_path, capsys), 'timm may have the model, where a run did not name the file'


def test_several_folders_make_one_grid_and_a_run_counts_once(tmp_path, capsys):
    make_run(tmp_path / 'a', fold=1, test_acc=50.0)
    make_run(tmp_path / 'b', fold=2, test_acc=60.0)
    make_run(tmp_path / 'b', fold=1, test_acc=50.0)
    assert accuracies(table(tmp_path / 'a', tmp_path / 'b')) == {(1, 42): 50.0, (2, 42): 60.0}
    assert 'counted once, made twice' in capsys.readouterr().err
    make_run(tmp_path / 'c', fold=1, split='other images')
    assert 'are of different images' in fails(tmp_path / 'a', tmp_path / 'c')


def test_runs_on_different_trees_are_not_pooled_even_where_each_has_another_fold(tmp_path):
    make_run(tmp_path / 'a', fold=1, tree='aaaa')
    make_run(tmp_path / 'a', fold=2)  # by older code, which recorded no tree
    make_run(tmp_path / 'a', fold=3, tree='aaaa')
    make_run(tmp_path / 'a', fold=1, dataset='fmd', tree='ffff')
    assert len(table(tmp_path / 'a').rows['dtd', 'resnet18'].folds) == 3
    make_run(tmp_path / 'b', fold=4, tree='bbbb')
    folders = [str(tmp_path / name) for name in ('a/dtd_fold1_resnet18_seed42', 'b/dtd_fold4_resnet18_seed42')]
    assert fails(tmp_path / 'a', tmp_path / 'b').startswith(
        f'{" and ".join(folders)} are of different trees of images, which no table pools; move the runs'
    )
    make_run(tmp_path / 'c', fold=4, model='swin_tiny', tree='cccc')
    assert table(tmp_path / 'a', tmp_path / 'c', '--models', 'resnet18').rows


def test_a_table_says_where_models_were_loaded_to_different_shares(tmp_path, capsys):
    shares = dict(resnet18=0.998, seresnet18=None, twistnet18=0.0604)
    for model, loaded in shares.items():
        fill(tmp_path / 'a', model, [50.0, 60.0], pretrained=model, loaded=loaded)
    fill(tmp_path / 'b', 'twistnet18', [90.0, 90.0], epochs=1)  # of another recipe, from scratch
    first, second = show(tmp_path / 'a', capsys, tmp_path / 'b').split('\n\n')
    assert 'from ImageNet weights, 6-100 % of the parameters loaded' in first.splitlines()[0]
    listed = 'ResNet-18 100 %, SE-ResNet-18 share not recorded, TwistNet-18 6 %'
    assert f'\nParameters loaded from ImageNet weights: {listed}.' in first
    assert 'loaded' not in second
    assert r'6-100 \% of the parameters loaded' in show(tmp_path / 'a', capsys, '--latex')
    assert [line['loaded'] for line in lines_of(tmp_path / 'a', capsys)] == ['0.998', '', '0.0604']
    for models, note in (('resnet18', '100 %'), ('seresnet18', 'share not recorded')):  # one share needs no list
        out = show(tmp_path / 'a', capsys, '--models', models)
        assert out.startswith('100 epochs, 224 px, from ImageNet weights\n')
        assert f'Parameters loaded from ImageNet weights: {note}.' in out


@pytest.mark.parametrize(
    ('file', 'changes', 'words'),
    [
        ('results.json', None, 'results.json: damaged'),
        ('results.json', dict(fingerprint='other'), 'is of another configuration'),
        ('config.json', dict(fingerprint=...), 'has no defines or no fingerprint'),
        ('config.json', dict(defines=[1]), 'has no defines or no fingerprint'),
    ],
)
def test_damaged_and_foreign_runs_are_left_out_and_named(tmp_path, capsys, file, changes, words):
    make_run(tmp_path, fold=1, test_acc=40.0)
    path = make_run(tmp_path, fold=2) / file
    if changes is None:
        path.write_text('{"torn')
    else:
        change(path, **changes)
    assert accuracies(table(tmp_path)) == {(1, 42): 40.0}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'left out: {path}: ')
    assert words in line


@pytest.mark.slow
def test_a_reader_that_leaves_and_a_terminal_without_signs(tmp_path):
    make_run(tmp_path, fold=1)
    make_run(tmp_path, fold=2, test_acc=60.0)
    command = f'{sys.executable} {ROOT}/summarize_runs.py --run_dir {tmp_path}'
    result = subprocess.run(f'{command} | true', shell=True, capture_output=True, text=True)
    assert result.stderr == ''
    result = subprocess.run(f'{command} > /dev/full', shell=True, capture_output=True, text=True)
    assert (result.returncode, result.stderr.count('\n')) == (1, 1)
    assert 'No space left on device' in result.stderr
    environment = {**os.environ, 'PYTHONIOENCODING': 'ascii'}
    result = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    assert '55.0 ? 7.1' in result.stdout


def test_a_run_without_its_config_is_named(tmp_path, capsys):
    make_run(tmp_path)
    (make_run(tmp_path, fold=3) / 'config.json').unlink()
    table(tmp_path)
    assert 'dtd_fold3_resnet18_seed42: has no config.json' in capsys.readouterr().err


def test_what_cannot_be_summarised_is_named(tmp_path):
    make_run(tmp_path / 'begun', complete=False)
    make_run(tmp_path / 'done')
    make_run(tmp_path / 'done', model='swin_tiny', fold=2, complete=False)
    for folder, argv, words in (
        ('', (), 'holds no run'),
        ('begun', (), 'no complete run that can be read'),
        ('done', ('--models', 'swin_tiny'), 'no complete run of swin_tiny'),
        ('done', ('--models', 'twist'), "--models: no run of 'twist'; there are runs of: "),
        ('done', ('--baseline', 'resnt18'), "--baseline: no run of 'resnt18'; there are runs of: "),
        ('done', ('--labels', 'dt=x'), "--labels: unknown 'dt'; there are: dtd"),
    ):
        assert words in fails(tmp_path / folder, *argv)


def test_a_tree_in_dtd_s_layout_has_a_name_of_its_own(tmp_path, capsys):
    make_run(tmp_path)
    out = show(tmp_path, capsys, '--labels', 'dtd=My_Materials')
    assert 'My_Materials' in out
    assert 'DTD' not in out
    assert r'My\_Materials' in show(tmp_path, capsys, '--labels', 'dtd=My_Materials', '--latex')


# ---------------------------------------------------------------------------------------------- tuned options

CHOSEN = {('dtd', 'resnet18'): dict(lr=0.1), ('dtd', 'twistnet18'): dict(lr=0.001)}
NOTE = (
    'Tuned for each model and data set by validation accuracy on fold 1 with seed 0, 3 settings (lr 0.001, 0.1): '
    'ResNet-18 lr 0.1 (1 of 3 diverged); TwistNet-18 lr 0.001 (1 of 3 diverged).'
)


def fill_tuned(run_dir, dataset='dtd', chosen=CHOSEN, **changes) -> None:
    for (name, model), setting in chosen.items():
        if name == dataset:
            fill(run_dir, model, [50.0, 60.0], dataset=dataset, **setting, **changes)
    write_tuned(run_dir, chosen)


def test_tuned_models_make_one_table_that_says_what_was_tried(tmp_path, capsys):
    fill_tuned(tmp_path)
    fill(tmp_path / 'tune' / 'lr=0.1', 'resnet18', [1.0], lr=0.1, seed=0)  # a trial
    only = table(tmp_path)
    assert only.recipe['tuned'] == 'lr=0.001,0.1 on fold 1, seed 0'
    assert 'lr' not in only.recipe
    assert only.rows['dtd', 'twistnet18'].difference, 'they are compared'
    assert only.rows['dtd', 'resnet18'].mean == 55.0, 'the trial is not counted'
    out = show(tmp_path, capsys)
    assert out.startswith('100 epochs, 224 px, from scratch, lr tuned\n')
    assert f'\n{NOTE}\n' in out
    assert f'\n{NOTE}  \n' in show(tmp_path, capsys, '--markdown')
    assert f'\n{NOTE}}}\n' in show(tmp_path, capsys, '--latex')
    lines = {line['model']: line for line in lines_of(tmp_path, capsys)}
    keys = ('tuned', 'tuned_settings', 'tuned_among', 'tuned_on', 'recipe')
    said = '3', 'lr=0.001,0.1', 'validation fold1_seed0', '100 epochs, 224 px, from scratch, lr tuned'
    assert [lines['resnet18'][key] for key in keys] == ['lr 0.1', *said]
    assert [lines['twistnet18'][key] for key in keys] == ['lr 0.001', *said]


def test_where_runs_do_not_say_so_each_recipe_has_its_table(tmp_path, capsys):
    fill_tuned(tmp_path)
    write_tuned(tmp_path, {})
    assert len(tables(tmp_path)) == 2
    assert 'Tuned' not in show(tmp_path, capsys)
    write_tuned(tmp_path, {('dtd', 'resnet18'): dict(lr=0.1)})
    titles = [line for line in show(tmp_path, capsys).splitlines() if line.startswith('100 epochs')]
    assert titles == [
        '100 epochs, 224 px, from scratch, tuned lr=0.001,0.1 on fold 1, seed 0',
        '100 epochs, 224 px, from scratch, lr 0.001',
    ]


def test_folders_of_one_search_are_pooled_and_of_two_are_not(tmp_path, capsys):
    fill_tuned(tmp_path / 'a')
    fill_tuned(tmp_path / 'b', 'fmd', {('fmd', 'resnet18'): dict(lr=0.001), ('fmd', 'twistnet18'): dict(lr=0.001)})
    assert table(tmp_path / 'a', tmp_path / 'b').datasets == ['dtd', 'fmd']
    words = 'ResNet-18 lr 0.1 (1 of 3 diverged) on DTD and lr 0.001 (1 of 3 diverged) on FMD; TwistNet-18 lr 0.001 ('
    assert words in show(tmp_path / 'a', capsys, tmp_path / 'b')
    write_tuned(tmp_path / 'b', {('fmd', 'resnet18'): dict(lr=0.001)}, tune='lr=0.001,0.2')
    assert len({table.recipe.get('tuned') for table in tables(tmp_path / 'a', tmp_path / 'b')}) == 3
    make_run(tmp_path / 'c', fold=3, lr=0.001)
    write_tuned(tmp_path / 'c', {('dtd', 'resnet18'): dict(lr=0.001)})
    assert fails(tmp_path / 'a', tmp_path / 'c') == (
        'runs of resnet18 on dtd are by two tuned.json, of other trials (lr 0.1 and lr 0.001); give one --run_dir'
    )


def test_validation_accuracy_is_a_column_on_request(tmp_path, capsys):
    for fold, seed, value in ((1, 0, 30.0), (1, 1, 40.0), (2, 0, 61.0)):
        make_run(tmp_path, fold=fold, seed=seed, best_val_acc=value)
    make_run(tmp_path, model='twistnet18', fold=1)  # by code that did not record it
    assert 'val' not in show(tmp_path, capsys)
    assert 'val_acc' not in show(tmp_path, capsys, '--csv')
    text = show(tmp_path, capsys, '--val')
    assert re.search(r'Model +Params +FLOPs +DTD +val\.$', text, re.M)
    assert re.search(r'^ResNet-18 +11.20M +1.82G +50.0 ± 0.0 † +48.0$', text, re.M), 'seeds inside a fold first'
    assert re.search(r'^TwistNet-18 .* -$', text, re.M)
    assert 'val.: validation accuracy in %' in text
    assert r'$^\dagger$ & 48.0 \\' in show(tmp_path, capsys, '--val', '--latex')
    assert [line['val_acc'] for line in lines_of(tmp_path, capsys, '--val')] == ['48.0', '']


def test_intervals_are_columns_on_request(tmp_path, capsys):
    for fold, (one, other) in enumerate([(50.0, 52.0), (53.0, 54.0), (56.0, 59.0)], start=1):
        make_run(tmp_path, fold=fold, test_acc=one)
        make_run(tmp_path, fold=fold, test_acc=other, model='twistnet18')
    row = table(tmp_path).rows['dtd', 'twistnet18']
    reach = 4.302653 * math.sqrt((1 / 3 + 40 / 60) * 13)  # of 52, 54 and 59, variance 13; 40 images test, 60 train
    assert row.interval == pytest.approx((55 - reach, 55 + reach), rel=1e-6)
    assert 'from, to' not in show(tmp_path, capsys)
    text = show(tmp_path, capsys, '--intervals')
    assert re.search(r'Model +Params +FLOPs +DTD +from +to$', text, re.M)
    assert re.search(r'^TwistNet-18 .* 55.0 ± 3.6 +39.5 +70.5$', text, re.M)
    assert re.search(r'^TwistNet-18 +\+2.0 \(0.184\) +-2.3 +\+6.3$', text, re.M), 'of the differences 2, 1 and 3'
    size = row.detectable
    assert f'if the spread is as measured: {size:.1f} (TwistNet-18) points.' in text
    assert r'& $-$2.3 & +6.3 \\' in show(tmp_path, capsys, '--intervals', '--latex')
    first, second = lines_of(tmp_path, capsys, '--intervals')
    assert (float(second['mean_low95']), float(second['detectable'])) == pytest.approx((55 - reach, size))
    assert (first['detectable'], float(first['seconds'])) == ('', 90.0)


def test_draws_of_few_images_are_corrected_by_what_they_are_drawn_from(tmp_path):
    for fold in (1, 2):
        path = make_run(tmp_path, fold=fold, test_acc=50.0 + fold) / 'results.json'
        runs.write_json(path, runs.read_json(path) | dict(n_train=4, n_pool=80, test_acc_last=40.0 + fold))
    row = table(tmp_path).rows['dtd', 'resnet18']
    assert (row.test_to_train, row.mean_of('test_acc_last'), row.mean_of('best_val_acc')) == (40 / 80, 41.5, None)


def test_a_data_set_without_intervals_says_so(tmp_path, capsys):
    for model, value in (('resnet18', 50.0), ('twistnet18', 52.0)):
        make_run(tmp_path, model=model, test_acc=value)
        for fold in (1, 2):
            make_run(tmp_path, model=model, dataset='fmd', fold=fold, test_acc=value + fold * (value - 51))
    text = show(tmp_path, capsys, '--intervals')
    assert re.search(r'^TwistNet-18 +11.20M +1.82G +52.0 +- +- +53.5 ± 0.7 +', text, re.M)
    assert 'there is none of a single fold' in text
    assert text.count('True differences') == 1
    assert 'True differences that 80 % of such studies would find on FMD' in text


# ---------------------------------------------------------------------------------------------- formats


@pytest.fixture(scope='module')
def everything(tmp_path_factory):
    """Every data set by every model, with a run missing."""
    run_dir = tmp_path_factory.mktemp('everything')
    for dataset in DATASETS:
        for place, model in enumerate(MODELS):
            values = [40.0 + fold * (place % 9 + 1) for fold in (1, 2)]
            fill(run_dir, model, values, dataset=dataset, best_val_acc=40.0)
    make_run(run_dir, model='swin_tiny', dataset='fmd', fold=3)
    return run_dir


def test_latex_holds_nothing_but_latex(everything, capsys):
    out = show(everything, capsys, '--latex', '--published')
    lines = out.splitlines()
    body = lines[lines.index(r'\toprule') + 1 : lines.index(r'\bottomrule')]
    rows = [line for line in body if line.endswith(r'\\') and 'multicolumn' not in line]
    assert len(rows) >= 1 + 2 * len(MODELS) - 1 + 6
    assert {line.count(' & ') for line in rows} == {2 + len(DATASETS)}
    assert all(entry['label'] in out for entry in (*MODELS.values(), *DATASETS.values()))
    assert r'TwistNet-18$^\ddagger$ &  &  & 45.8\,{\tiny$\pm$1.4} & 43.5\,{\tiny$\pm$3.8} & -- & 61.8' in out
    assert min(out.count(mark) for mark in (r'\textbf{', r'\underline{')) >= len(DATASETS) - 1
    assert '%' not in re.sub(r'\\%', '', '\n'.join(lines[1:])), 'a comment would swallow what follows'


def test_names_are_escaped():
    assert escape(r'a_b 5% & {x} #~^$\ <') == (
        r'a\_b 5\% \& \{x\} \#\textasciitilde{}\textasciicircum{}\$\textbackslash{} $<$'
    )
    assert escape('[a] > |b|') == '{[}a] $>$ $|$b$|$', 'after a line break, [ begins the space to leave'


FIVE = ('dtd', 'fmd', 'kth_tips2', 'cub200', 'flowers102')


@pytest.mark.skipif(not shutil.which('pdflatex'), reason='needs pdflatex: .ci/run installs it')
@pytest.mark.parametrize(
    ('datasets', 'width', 'option'),  # the text widths of ECCV's and CVPR's pages
    [
        (tuple(DATASETS), '175mm', '--published'),
        (FIVE, '122mm', '--published'),
        (('dtd',), '122mm', '--published'),
        (('dtd', 'fmd', 'cub200', 'flowers102'), '122mm', '--val'),
        pytest.param([key for key in DATASETS if key != 'lists'], '175mm', '--val', marks=pytest.mark.slow),
        pytest.param(('dtd', 'fmd'), '122mm', '--intervals', marks=pytest.mark.slow),
        (FIVE, '175mm', '--intervals'),
    ],
)
def test_latex_compiles_and_fits(tmp_path, capsys, everything, datasets, width, option):
    part = tmp_path / 'runs'
    models, folds = (list(MODELS), '*') if option == '--published' else (list(MODELS)[:9], '[12]')
    for cell in ((dataset, model) for dataset in datasets for model in models):
        for path in everything.glob('{0}_fold{2}_{1}_seed42'.format(*cell, folds)):
            shutil.copytree(path, part / path.name)
    if option == '--val':  # with the longest notes
        cells, setting = [(d, m) for d in datasets for m in models], dict(lr=0.01, weight_decay=0.0005)
        tune = 'lr=0.001,0.003,0.01,0.03,0.1 weight_decay=0.0001,0.0005,0.001,0.005,0.01'
        write_tuned(part, dict.fromkeys(cells, setting), tune=tune)
    (tmp_path / 'table.tex').write_text(text := show(part, capsys, '--latex', option))
    assert (r'weight\_decay' in text) == (option == '--val')
    (tmp_path / 'page.tex').write_text(
        rf'\documentclass{{article}}\usepackage{{booktabs}}\textwidth={width}\textheight=230mm'
        r'\begin{document}\input{table.tex}\end{document}'
    )
    command = ['pdflatex', '-interaction=nonstopmode', '-halt-on-error', 'page.tex']
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
    assert 'Overfull' not in result.stdout, result.stdout


def test_csv_has_every_digit(tmp_path, capsys):
    fill(tmp_path, 'resnet18', [50.0, 60.0, 1 / 3])
    fill(tmp_path, 'twistnet18', [53.0, 62.5, 2 / 3])
    lines = lines_of(tmp_path, capsys, '--published')
    twist = next(line for line in lines if (line['source'], line['model']) == ('measured', 'twistnet18'))
    row = table(tmp_path).rows['dtd', 'twistnet18']
    keys = ('mean', 'sd', 'difference', 'low95', 'high95', 'p', 'p_holm', 'detectable')
    assert [float(twist[k]) for k in keys] == [row.mean, row.sd, *row.difference.values(), row.detectable]
    assert (twist['folds'], twist['runs'], twist['baseline']) == ('3', '3', 'resnet18')
    assert twist['last_acc'] == '', 'not recorded'
    published = {line['model']: line for line in lines if line['source'] == 'published'}
    assert published.keys() == {model for model, figures in PUBLISHED.items() if 'dtd' in figures}
    assert (published['twistnet18']['mean'], published['twistnet18']['sd']) == ('45.8', '1.4')
    values = [value for figures in PUBLISHED.values() for pair in figures.values() for value in pair]
    assert (len(values), min(values) > 0) == (2 * (8 * 4 + 3), True)


def test_markdown(tmp_path, capsys):
    fill(tmp_path, 'resnet18', [50.0, 60.0])
    fill(tmp_path, 'twistnet18', [53.0, 64.0])
    out = re.sub(' +', ' ', show(tmp_path, capsys, '--markdown'))
    assert '|:---' in out
    assert '| TwistNet-18 | 11.20M | 1.82G | **58.5** ± 7.8 |' in out
    assert '| ResNet-18 | 11.20M | 1.82G | <u>55.0</u> ± 7.1 |' in out
    assert '| TwistNet-18 | | | +3.5 (' in out
    assert len({line.count('|') for line in out.splitlines() if line.startswith('|')}) == 1


def test_published_figures_are_marked_and_only_on_request(tmp_path, capsys):
    fill(tmp_path, 'resnet18', [50.0])
    assert 'published' not in show(tmp_path, capsys).lower()
    out = show(tmp_path, capsys, '--published')
    assert 'RepViT-M1.5 (published)' in out
    assert 'not measured here' in out
    assert 'w/o AIS (published)' not in out, 'a variant that nobody ran'
    fill(tmp_path, 'twistnet18_no_ais', [50.0])
    out = show(tmp_path, capsys, '--published')
    assert re.search(r'^w/o AIS \(published\) +44.1 ± 1.8$', out, re.M)
    fill(tmp_path / 'other', 'resnet18', [50.0], dataset='synthetic')
    for style in ('--latex', '--markdown', '--csv'):
        summarize_runs.main(arguments(tmp_path / 'other', '--published', style))
        out, err = capsys.readouterr()
        assert 'published' not in out.lower()
        assert err == 'note: --published: the paper has no figures for these data sets\n'


def test_a_clone_holds_the_folder_that_the_shell_writes_tables_into():
    listed = subprocess.run(['git', 'ls-files', 'tables'], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert listed == ['tables/.gitkeep']


def test_models_outside_the_registry_have_rows(tmp_path, capsys):
    for model, accuracy in (('resnet18', 50.0), ('stci_resnet18', 51.0), ('tf_a', 52.0), ('stci_tf_a', 53.0)):
        for fold in (1, 2):
            make_run(tmp_path, model=model, fold=fold, test_acc=accuracy + fold)
    lines = show(tmp_path, capsys).splitlines()
    names = [line[:13].strip() for line in lines[2:6]]
    assert names == ['ResNet-18', 'ResNet-18 + S', 'tf_a', 'tf_a + STCI'], 'each behind its plain model'
    chosen = show(tmp_path, capsys, '--models', 'tf_a,resnet18', '--latex')
    assert r'tf\_a' in chosen
    assert 'STCI' not in chosen
