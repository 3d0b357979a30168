"""The promises of probe.py and training/features.py: what a feature is, one pass per image, folds, run folders."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, make_run, run, write_image
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

import models
import plot_results
import probe
import summarize_runs
from common import checkpoint, predictions, runs
from common.errors import DataError, ModelError, RunError
from common.images import open_image
from datasets import load_splits
from training import features
from transforms import eval_settings, eval_transform, normalize, preprocessing_of

WEIGHTS = ROOT.parent / 'shared' / 'weights' / 'tf_efficientnet_lite0.safetensors'
FMD = ROOT.parent / 'shared' / 'data' / 'fmd'


@pytest.fixture
def tiny(monkeypatch) -> str:
    """With more features than images to train on, as a pretrained network has them."""
    monkeypatch.setitem(models.MODELS, 'tiny', TINY | dict(twist=TINY['twist'] | dict(base_width=32)))
    return 'tiny'


@pytest.fixture
def weights(tmp_path, tiny) -> Path:
    """Weights of the tiny model."""
    torch.manual_seed(1)
    path = tmp_path / 'tiny.pt'
    torch.save(models.build_model('tiny', 3).state_dict(), path)
    return path


def argv_of(tree: Path, weights: Path, *more: str) -> list[str]:
    data = ('--dataset', 'dtd', '--data_dir', str(tree), '--run_dir', str(weights.parent / 'probes'))
    return ['--models', f'tiny={weights}', *data, '--img_size', '32', '--num_workers', '0', *more]


def data_of(tree: Path, run_dir: Path, classifiers: str = 'knn') -> list[str]:
    data = ('--dataset', 'dtd', '--data_dir', str(tree), '--run_dir', str(run_dir))
    return [*data, '--num_workers', '0', '--classifiers', classifiers]


def do(*argv: str) -> None:
    probe.main(probe.parse_args(list(argv)))


def summarise(*argv: str) -> None:
    summarize_runs.main(summarize_runs.get_args_parser().parse_args(list(argv)))


def results_in(run_dir: Path) -> dict[str, dict]:
    return {path.parent.name: runs.read_json(path) for path in sorted(run_dir.glob('*/results.json'))}


def model_of(weights: Path) -> torch.nn.Module:
    model = models.build_model('tiny', 3)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


def features_by_hand(model: torch.nn.Module, items: list) -> np.ndarray:
    """The input of the classifier, image by image, and its average pooling written out."""
    view = eval_transform(32)
    with torch.no_grad():
        maps = [model.forward_features(normalize(view(open_image(path), 0)[None])) for path, _ in items]
    return torch.cat(maps).mean((2, 3)).numpy()


# ---------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize('train_on', ['train', 'trainval'])
def test_the_results_are_those_of_scikit_learn_on_the_input_of_the_classifier(tree, weights, train_on):
    do(*argv_of(tree, weights, '--train_on', train_on))
    splits, model = load_splits('dtd', tree, 1), model_of(weights)
    fitted = splits.train + (splits.val if train_on == 'trainval' else [])
    x, y = features_by_hand(model, fitted), [label for _, label in fitted]
    test, labels = features_by_hand(model, splits.test), np.array([label for _, label in splits.test])
    made = results_in(weights.parent / 'probes')
    for key, classifier in dict(
        knn=KNeighborsClassifier(1),
        lda=LinearDiscriminantAnalysis(solver='lsqr', shrinkage='auto'),
        svm=SVC(kernel='linear', C=1),
    ).items():
        name = f'dtd_fold1_tiny+{key}_seed42'
        predicted = classifier.fit(x, y).predict(test)
        written = predictions.read_predictions(weights.parent / 'probes' / name / runs.PREDICTIONS)
        assert (written.predicted == predicted).all()
        assert (written.labels == labels).all()
        assert made[name]['test_acc'] == pytest.approx(100 * (predicted == labels).mean())
        assert (made[name]['best_val_acc'] is None) == (train_on == 'trainval')
        if key == 'lda':
            np.testing.assert_allclose(written.probabilities, classifier.predict_proba(test), atol=1e-3)
        else:
            assert np.isnan(written.probabilities).all()
    assert made[name]['n_train'] == len(fitted)
    assert made[name]['features'] == 64


def test_the_run_folders_are_those_of_a_run_without_checkpoints(tree, weights, capsys):
    do(*argv_of(tree, weights, '--classifiers', 'lda', '--folds', '1-2'))
    folder = weights.parent / 'probes' / 'dtd_fold2_tiny+lda_seed42'
    assert {path.name for path in folder.iterdir()} == {'.lock', 'config.json', runs.PREDICTIONS, 'results.json'}
    accuracy = [f'{made["test_acc"]:.2f}' for made in results_in(folder.parent).values()]
    assert capsys.readouterr().out.splitlines() == [
        f'{folder.with_name(f"dtd_fold{fold}_tiny+lda_seed42")}: test accuracy {accuracy[fold - 1]} %'
        for fold in (1, 2)
    ]
    do(*argv_of(tree, weights, '--classifiers', 'lda'))
    assert f'{folder.with_name("dtd_fold1_tiny+lda_seed42")} is complete' in capsys.readouterr().err
    with pytest.raises(RunError, match=r'run of another configuration \(train_on trainval -> train'):
        do(*argv_of(tree, weights, '--classifiers', 'lda', '--train_on', 'train'))


@pytest.mark.slow
def test_tables_and_figures_take_them_and_pool_them_with_nothing_trained(tree, weights, capsys, tmp_path):
    do(*argv_of(tree, weights, '--folds', '1-2', '--classifiers', 'knn,lda'))
    run_dir = weights.parent / 'probes'
    capsys.readouterr()
    summarise('--run_dir', str(run_dir))
    table = capsys.readouterr().out
    assert table.startswith('frozen features of the last layer, classifiers on train and val, 32 px\n')
    assert 'Tiny + 1-NN ' in table
    assert 'Difference to Tiny + 1-NN' in table
    assert re.search(r'Parameters loaded from \S+/tiny\.pt: 100 %\.', table)
    tree_of = runs.read_json(run_dir / 'dtd_fold1_tiny+lda_seed42' / 'config.json')
    path = make_run(tmp_path / 'trained', tree=tree_of['tree']) / 'config.json'
    config = runs.read_json(path)
    config['defines']['split'] = tree_of['defines']['split']
    runs.write_json(path, config)
    both = ['--run_dir', str(run_dir), str(tmp_path / 'trained')]
    summarise(*both, '--latex')
    out, err = capsys.readouterr()
    assert '2 recipes, a table each' in err
    assert '100 epochs, 224 px, from scratch)' in out
    plot_results.main(plot_results.get_args_parser().parse_args([*both, '--save_dir', str(tmp_path / 'figures')]))
    assert (tmp_path / 'figures' / 'bar_1.png').exists()


def test_the_table_of_checkpoints_says_whose_weights_they_are(tree, tiny, tmp_path, capsys):
    for fold in ('1', '2'):
        run(tree, tmp_path / 'runs', '--epochs', '1', '--warmup_epochs', '0', '--fold', fold)
    checkpoints = [str(path) for path in sorted((tmp_path / 'runs').glob('*/best.pt'))]
    data = data_of(tree, tmp_path / 'probes', 'lda')
    do('--checkpoint', *checkpoints, *data, '--folds', '1-2')
    assert f'{checkpoints[1]}: only --folds 2: images that others test may have trained' in capsys.readouterr().err
    assert set(results_in(tmp_path / 'probes')) == {'dtd_fold1_tiny+lda_seed42', 'dtd_fold2_tiny+lda_seed42'}
    summarise('--run_dir', str(tmp_path / 'probes'))
    text = r'Parameters loaded from a run on dtd by recipe [0-9a-f]{8}: 100 %\.'
    assert re.search(text, capsys.readouterr().out)
    path = Path(checkpoints[1]).with_name('config.json')
    config = runs.read_json(path)
    config['defines']['epochs'] += 1  # a run by another recipe
    runs.write_json(path, config)
    do('--checkpoint', checkpoints[1], *data, '--folds', '2', '--force')
    with pytest.raises(RunError, match=r'start from different weights .*by recipe .* and a run on dtd by recipe'):
        summarise('--run_dir', str(tmp_path / 'probes'))


# ---------------------------------------------------------------------------------------------- kept features


@pytest.fixture
def passes(monkeypatch) -> list[list[str]]:
    """The names of the images of each forward pass over a data set."""
    made, real = [], features.compute

    def compute(frozen, layer, items, *rest):
        made.append([os.path.basename(path) for path, _ in items])
        return real(frozen, layer, items, *rest)

    monkeypatch.setattr(features, 'compute', compute)
    return made


@pytest.mark.slow
def test_features_are_computed_once_and_again_where_something_changed(tree, weights, passes):
    command = argv_of(tree, weights, '--classifiers', 'lda', '--folds', '1-2')
    do(*command)
    assert [len(names) for names in passes] == [48]  # every image of both folds, in one pass
    before = results_in(weights.parent / 'probes')
    do(*command, '--force')
    do(*command, '--force', '--train_on', 'train')
    assert len(passes) == 1
    do(*command, '--force')
    after = results_in(weights.parent / 'probes')
    for name in before:
        assert {k: v for k, v in after[name].items() if k != 'seconds'} == {
            k: v for k, v in before[name].items() if k != 'seconds'
        }
    write_image(tree / 'images' / 'class1' / 'class1_0003.jpg', 999, size=41)
    kept_in = ('--features_dir', str(weights.parent / 'probes' / 'features'))
    command += [*kept_in, '--run_dir', str(weights.parent / 'changed')]
    do(*command)
    assert passes[1:] == [['class1_0003.jpg']]
    do(*command, '--force', '--layer', 'layer2')
    state = torch.load(weights, weights_only=True)
    state['stem.0.weight'] *= 2
    torch.save(state, weights)
    do(*command, '--force')
    assert [len(names) for names in passes[2:]] == [48, 48]  # another layer, other weights


def test_features_are_kept_by_all_that_they_depend_on(tree, weights, tmp_path):
    cpu, items = torch.device('cpu'), load_splits('dtd', str(tree), 1).test[:2]
    argvs = [argv_of(tree, weights, *more) for more in ([], ['--resize', 'pad'])]
    frozen, padded = (features.frozen_backbones(probe.parse_args(argv))[0] for argv in argvs)
    assert padded.preprocessing == frozen.preprocessing._replace(resize='pad')
    larger = frozen.preprocessing._replace(img_size=64)
    changes = ({}, dict(imported='aa'), dict(imported='bb'), dict(preprocessing=larger), dict(weights='other'), {})
    changes += (dict(preprocessing=padded.preprocessing),)
    kept = [
        features.features_of(frozen._replace(**change), None, items, tmp_path / 'kept', cpu, 0) for change in changes
    ]
    assert not any(np.array_equal(kept[0][path], kept[-1][path]) for path, _ in items), 'another view'
    assert len(list((tmp_path / 'kept').glob('*.npz'))) == len(changes) - 1
    (path, *_) = (tmp_path / 'kept').glob('*.npz')
    with np.load(path, allow_pickle=False) as file:
        assert file.files == ['paths', 'stamps', 'features']


def test_fused_models_have_results_of_their_own(tree, weights):
    plain, fused = (
        features.frozen_backbones(probe.parse_args(argv_of(tree, weights, *more)))[0] for more in ([], ['--fuse'])
    )
    items, place = load_splits('dtd', str(tree), 1).test[:2], (weights.parent / 'kept', torch.device('cpu'), 0)
    found = [features.features_of(frozen, None, items, *place) for frozen in (plain, fused)]
    assert plain.weights != fused.weights, 'which key the features, and are in the fingerprint'
    for path, _ in items:
        assert not np.array_equal(found[0][path], found[1][path])
        np.testing.assert_allclose(found[0][path], found[1][path], atol=1e-5)


def test_what_has_no_features_is_named(tree, weights):
    state = torch.load(weights, weights_only=True)
    state['stem.0.weight'][0] = float('nan')
    torch.save(state, weights)
    with pytest.raises(RunError, match=r'tiny: the features of .*class0_0000\.jpg are not finite'):
        do(*argv_of(tree, weights))
    (tree / 'images' / 'class1' / 'class1_0003.jpg').write_bytes(b'torn')
    with pytest.raises(DataError, match=r'class1_0003\.jpg: cannot be read as an image'):
        do(*argv_of(tree, weights))


# ---------------------------------------------------------------------------------------------- layers


def test_a_layer_is_averaged_over_positions_before_a_later_one_writes_over_it(weights):
    model, images = model_of(weights), torch.randn(2, 3, 32, 32)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(inplace=True))
    with torch.no_grad():
        torch.testing.assert_close(features.tap(model, 'tiny', 'fc')(images), model(images))
        want = net[1](net[0](images)).mean((2, 3))
        torch.testing.assert_close(features.tap(net, 'net', '1')(images), want)
        flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 4), torch.nn.ReLU(inplace=True))
        torch.testing.assert_close(features.tap(flat, 'net', '1')(images), flat[1](images.flatten(1)))


def test_maps_tokens_and_vectors_are_pooled_and_others_refused():
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(features.pooled(x, 'a', False), x.sum((2, 3)) / 12)
    torch.testing.assert_close(features.pooled(x, 'a', True), x.sum((1, 2)) / 15)
    torch.testing.assert_close(features.pooled(x[0], 'a', False), x[0].sum(1) / 3)
    for other, said in ((x[None], r'\(1, 2, 5, 3, 4\)'), ((x,), 'tuple')):
        with pytest.raises(RunError, match=f'--layer a: its output, {said}, is no map to average'):
            features.pooled(other, 'a', False)


def test_layers_that_have_no_features_are_refused(weights):
    windows = models.build_model('swin_tiny', 2, img_size=64).eval()
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten())
    for model, name, layer, words in (
        (windows, 'swin_tiny', 'layers.0.blocks.0.attn', r'swin_tiny makes \d+ rows there for 2 images'),
        (model_of(weights), 'tiny', 'layer2.0.stci.twist.dwconv', 'makes 0 rows there for 2 images; take the module'),
        (model_of(weights), 'tiny', 'layer22', "--layer: tiny has no 'layer22'; it has: stem, maxpool, layer1, layer2"),
        (net, 'my_net', None, 'my_net: has no forward_features and .*; give --layer: 0, 1'),
    ):
        with torch.no_grad(), pytest.raises(RunError, match=words):
            features.tap(model, name, layer)(torch.zeros(2, 3, 64, 64))


# ---------------------------------------------------------------------------------------------- shots


def test_shots_are_drawn_by_class_and_seed_and_grow():
    items = [(f'{label}/{i}', label) for label in range(4) for i in range(9)]
    few, more = probe.draw(items, 2, 42, 1), probe.draw(items, 5, 42, 1)
    assert [sum(label == c for _, label in more) for c in range(4)] == [5] * 4
    assert set(few) < set(more)
    assert probe.draw(items, 2, 42, 1) == few
    assert probe.draw(items, 2, 43, 1) != few != probe.draw(items, 2, 42, 2)
    assert probe.draw(items, None, 42, 1) == items


def test_each_number_of_shots_is_a_table(tree, weights, capsys):
    do(*argv_of(tree, weights, '--shots', '1,3', '--seeds', '42,43', '--classifiers', 'knn,lda'))
    assert 'note: no lda with 1 image a class' in capsys.readouterr().err
    made = results_in(weights.parent / 'probes')
    assert {results['n_pool'] for results in made.values()} == {36}, 'all of them; 12 a class'
    assert {name.removeprefix('dtd_fold1_tiny+'): results['n_train'] for name, results in made.items()} == {
        f'{key}_{shots}shot_seed{seed}': 3 * shots
        for key, shots in (('knn', 1), ('knn', 3), ('lda', 3))
        for seed in (42, 43)
    }
    summarise('--run_dir', str(weights.parent / 'probes'))
    out = capsys.readouterr().out
    assert 'classifiers on 1 image a class of train and val, 32 px' in out
    assert 'classifiers on 3 images a class of train and val, 32 px' in out
    with pytest.raises(RunError, match=r'--shots 13: the class of .*class0_\d+\.jpg has 12 training images in fold 1'):
        do(*argv_of(tree, weights, '--shots', '1,13'))


# ---------------------------------------------------------------------------------------------- what may be probed


def test_folds_that_differ_in_validation_alone_are_one_result(tree, weights, tmp_path):
    for subset in ('train', 'val', 'test'):
        shutil.copy(tree / 'labels' / f'{subset}1.txt', tree / 'labels' / f'{subset}2.txt')
    lists = [tree / 'labels' / f'{subset}2.txt' for subset in ('train', 'val')]
    first, second = (path.read_text().splitlines() for path in lists)
    for path, names in zip(lists, (second[:1] + first[1:], first[:1] + second[1:])):
        path.write_text('\n'.join(names))
    both = argv_of(tree, weights, '--folds', '1-2', '--classifiers', 'knn')
    bare = tmp_path / 'best.pt'  # of a run that is not known
    model = models.build_model('tiny', 3)
    transform = eval_settings(*preprocessing_of('tiny', 32))
    torch.save(checkpoint.weights_file('tiny', ['a', 'b', 'c'], 1, 50.0, model.state_dict(), transform=transform), bare)
    for argv in (both, ['--checkpoint', str(bare), *both[2:]]):
        with pytest.raises(RunError, match='trainval: fold 1 seed 42 and fold 2 seed 42 of dtd fit and test'):
            do(*argv)
    with pytest.raises(RunError, match=r'trainval --shots 12: .* so they are one result'):  # all images of a class
        do(*both, '--shots', '2,12')
    with pytest.raises(RunError, match='trainval --shots 12: fold 1 seed 1 and fold 1 seed 2'):
        do(*argv_of(tree, weights, '--shots', '12', '--seeds', '1,2'))
    do(*both, '--train_on', 'train')
    do(*both, '--shots', '2')  # other draws


@pytest.fixture
def best(tree, tiny, tmp_path) -> Path:
    """best.pt of a run on fold 1."""
    return run(tree, tmp_path / 'runs', '--epochs', '1', '--warmup_epochs', '0')[0] / 'best.pt'


def test_a_checkpoint_is_probed_where_its_images_did_not_train_it(best, tree, tmp_path, capsys):
    data = data_of(tree, tmp_path / 'probes')
    with pytest.raises(RunError, match=r'--folds: .*best\.pt: images that are tested may .* \(24 of 24 in fold 2\)'):
        do('--checkpoint', str(best), *data, '--folds', '2')
    do('--checkpoint', str(best), *data, '--folds', '2', '--other_images')
    assert results_in(tmp_path / 'probes')['dtd_fold2_tiny+knn_seed42']['caution'].startswith('images that may have')
    for path in (tmp_path / 'other' / name / f'{i}.png' for name in 'ab' for i in range(5)):
        write_image(path, seed=int(path.stem) + 1000 * ord(path.parent.name))
    do('--checkpoint', str(best), *data, '--dataset', 'folder', '--data_dir', str(tmp_path / 'other'))
    assert results_in(tmp_path / 'probes')['folder_fold1_tiny+knn_seed42']['caution'] is None
    lists = tree / 'labels' / 'train1.txt', tree / 'labels' / 'test1.txt'
    texts = [path.read_text() for path in lists]
    for path, text in zip(lists, reversed(texts)):
        path.write_text(text)
    with pytest.raises(RunError, match='images that are tested may have trained it'):
        do('--checkpoint', str(best), *data)
    best.with_name('config.json').unlink()
    capsys.readouterr()
    do('--checkpoint', str(best), *data, '--run_dir', str(tmp_path / 'unchecked'))
    assert f'note: {best}: No config.json beside the checkpoint' in capsys.readouterr().err


@pytest.mark.parametrize('other', ['moved', 'fewer', 'option', 'renamed'])
def test_images_that_trained_weights_are_recognised(best, tree, tmp_path, other):
    root, what = tree, ['--checkpoint', str(best)]
    if other == 'moved':
        tree.rename(root := tmp_path / 'copy')
    if other == 'fewer':
        for subset in ('train', 'test'):  # an image of each fold
            lists = tree / 'labels' / f'{subset}1.txt'
            lists.write_text('\n'.join(lists.read_text().splitlines()[1:]))
    if other == 'option':
        what = ['--models', f'tiny={best}', '--img_size', '32']
    more = ['--name', 'same', '--folds', '2']
    if other == 'renamed':
        for path in (tree / 'images').rglob('*.jpg'):
            (tmp_path / 'copy' / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / 'copy' / path.parent.name / f'new_{path.name}')
        more = ['--dataset', 'folder', '--data_dir', str(tmp_path / 'copy'), '--folds', '1-5']
    data = data_of(root, tmp_path / 'probes')
    with pytest.raises(RunError, match=r'best\.pt: images that are tested may have trained it \(\d+ of \d+ in fold \d'):
        do(*what, *data, *more)
    if other not in ('fewer', 'renamed'):
        do(*what, *data, *more, '--folds', '1')  # its own
        assert results_in(tmp_path / 'probes')['same_fold1_tiny+knn_seed42']['caution'] is None


def test_a_file_with_classes_and_no_run_is_not_taken_for_untrained(best, tree, tmp_path, capsys):
    (tmp_path / 'there').mkdir()
    for name, said in (('copied.pt', True), ('tiny_imagenet.pt', False)):
        path = shutil.copy(best, tmp_path / 'there' / name)
        do('--models', f'tiny={path}', *data_of(tree, tmp_path / name), '--img_size', '32', '--folds', '2')
        assert (f'note: {path}: No config.json beside the checkpoint' in capsys.readouterr().err) == said
        (made,) = results_in(tmp_path / name).values()
        assert (made['caution'] is None) != said


def test_random_parts_of_a_model_do_not_depend_on_the_other_models(tree, weights, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(models.MODELS, 'other', models.MODELS['tiny'] | dict(label='Other'))
    state = {k: v for k, v in torch.load(weights, weights_only=True).items() if k.startswith(('stem', 'layer1'))}
    torch.save(state, weights)
    alone = features.with_weights('tiny', str(weights), 32)
    assert '% of the parameters are loaded, so its features are mostly random ones' in capsys.readouterr().err
    other = features.with_weights('other', str(weights), 32)
    after = features.with_weights('tiny', str(weights), 32)
    assert alone.weights == after.weights != other.weights
    assert alone.pretrained == other.pretrained, 'the same file'
    with torch.no_grad():
        next(after.model.layer2.parameters()).mul_(2)
    assert features.state_digest(after.model) != alone.weights


@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        ([], 'nothing to probe: give --models NAME,.. or --checkpoint BEST.PT'),
        (['--classifiers', 'lda,tree'], "--classifiers: unknown 'tree'; there are: knn, lda, svm"),
        (['--models', 'resnet18', '--shots', '0'], '--shots 0: at least one image a class'),
        (['--models', 'resnet18', '--seeds', '1'], '--seeds draws the images of --shots'),
        (['--models', 'resnet18', '--shots', '1', '--classifiers', 'lda'], '--shots 1: lda needs two images a class'),
        (['--dataset', 'dtt'], "unknown data set 'dtt'"),
        (['--img_size', '8'], '--img_size 8 must be from 32 to 4096'),
    ],
)
def test_bad_options_are_one_line(argv, words):
    with pytest.raises(RunError) as caught:
        probe.parse_args(argv)
    assert str(caught.value).startswith(words)


def test_bad_models_are_one_line(best, tree, weights, tmp_path):
    data = [*data_of(tree, tmp_path / 'probes'), '--img_size', '32']
    for argv, kind, words in (
        ('--models resnet19', RunError, "unknown model 'resnet19'"),
        (f'--models tiny={tmp_path}/no.pt', ModelError, r'no\.pt: no such weights file'),
        (f'--checkpoint {tmp_path}/no.pt', ModelError, r'no\.pt: no such checkpoint'),
        (
            f'--checkpoint {best} --resize pad',
            RunError,
            r'--resize pad: .*best\.pt was trained with crop; leave it out',
        ),
        (f'--checkpoint {best} --img_size 64', RunError, r'--img_size 64: .*best\.pt is of 32 pixels; leave it out'),
        (f'--models tiny={weights} --checkpoint {best}', RunError, r'best\.pt and tiny are both dtd_fold1_tiny\+knn'),
        ('--models tiny --folds 1-3', DataError, 'fold 3 of'),
    ):
        with pytest.raises(kind, match=words):
            do(*data, *argv.split())


@pytest.mark.slow
@pytest.mark.skipif(not (WEIGHTS.exists() and FMD.exists()), reason='no ../shared/weights or ../shared/data/fmd')
def test_real_features_give_the_accuracy_measured_elsewhere(tmp_path):
    data = ('--data_dir', str(FMD), '--classifiers', 'lda', '--run_dir', str(tmp_path))
    do('--models', f'tf_efficientnet_lite0={WEIGHTS}', *data)
    (made,) = results_in(tmp_path).values()
    assert made['test_acc'] == pytest.approx(80.5, abs=1.0)
    assert (made['n_train'], made['n_test'], made['features']) == (800, 200, 1280)
