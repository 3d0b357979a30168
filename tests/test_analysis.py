"""The promises of analysis.py: estimators checked against known answers, tests that find nothing where there is
nothing, and a report that follows the numbers."""

import copy
import functools
import json
import math
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import make_dtd
from scipy import ndimage

import analysis
import models
from common import checkpoint, statistics
from common.errors import ModelError, RunError, UserError
from common.splits import split_digest
from datasets import load_splits
from interpret import findings, information, questions, trace
from interpret.questions import HeldOut
from models import DIRECTIONS, TwistNet, blocks_of
from training.trained import CAUTIONS, OTHER, UNCHECKED, TrainedModel
from transforms import Preprocessing

CLASSES = ['class0', 'class1', 'class2']


@pytest.fixture(scope='module', autouse=True)
def _light():
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in ((information, 'HALVES', 6), (information, 'DRAWS', 1), (questions, 'REPEATS', 1)):
            patch.setattr(module, name, value)
        patch.setitem(plt.rcParams, 'savefig.dpi', 40)
        twist = dict(base_width=8, c_red=3, twist_stages=(3,))
        patch.setitem(models.MODELS, 'small', dict(label='Small', twist=twist))
        yield


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    yield
    plt.close('all')


def make_checkpoint(folder, tree, model='small', img_size=64, config=True):
    """best.pt of a run that has not trained, and its config.json."""
    folder.mkdir()
    torch.manual_seed(0)
    net = models.build_model(model, 3)
    for name, block in blocks_of(net).items():
        torch.nn.init.normal_(block.stci.proj[1].weight, 1, 0.1)
        torch.nn.init.normal_(block.stci.twist.dwconv.weight, 0, 0.5)
        block.gate.data.fill_(2.0 if name == 'layer3.0' else 1.0)
    best = dict(model=model, num_classes=3, classes=CLASSES, epoch=2, val_acc=50.0, transform=dict(img_size=img_size))
    checkpoint.save_checkpoint(folder / 'best.pt', best | dict(state_dict=net.state_dict()))
    options = dict(dataset='dtd', data_dir=str(tree), fold=1)
    if config:
        defines = dict(pretrained=None, split=split_digest(load_splits(**options)))
        (folder / 'config.json').write_text(json.dumps(dict(options=options, defines=defines)))
    return folder / 'best.pt'


def arguments(checkpoint, save_dir, *more):
    argv = ['--checkpoint', checkpoint, '--save_dir', save_dir, '--device', 'cpu', *more]
    return analysis.get_args_parser().parse_args([str(word) for word in argv])


def answered(checkpoint, *more):
    args = arguments(checkpoint, 'nowhere', *more)
    return analysis.answer(args, *analysis.prepare(args))


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    """A checkpoint over a tree with 48 images that did not train."""
    folder = tmp_path_factory.mktemp('analysis')
    return make_checkpoint(folder / 'run', make_dtd(folder / 'tree', per_subset=(2, 8, 8)))


@pytest.fixture
def trained(original, tmp_path, monkeypatch):
    """A copy of it, to be changed, in the working directory."""
    shutil.copytree(original.parents[1], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    config = Path('run/config.json').read_text()
    Path('run/config.json').write_text(config.replace(str(original.parents[1] / 'tree'), 'tree'))
    return Path('run/best.pt')


def net(**kwargs):
    """A TwistNet whose branch matters, in evaluation mode."""
    torch.manual_seed(1)
    model = TwistNet(num_classes=3, base_width=8, c_red=3, gate_init=2.0, **kwargs).eval()
    for block in blocks_of(model).values():
        torch.nn.init.normal_(block.stci.proj[0].weight, std=0.5)
    return model


# ---------------------------------------------------------------------------------------------- information


@pytest.mark.parametrize('rho', [0.0, 0.3, 0.6, 0.9])
def test_mutual_information_of_gaussians_is_the_known_one(rho):
    """-log(1 - rho^2) / 2, whatever monotone functions hide it. One estimate of 300 pairs scatters by about 0.05 nats,
    the mean of 40 by 0.008; 0.025 is three times that."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(40):
        x, noise = rng.standard_normal((2, 300))
        y = rho * x + math.sqrt(1 - rho**2) * noise
        scores = information.normal_scores(np.stack([np.exp(2 * x), y**3], 1), rng)
        found.append(information.mutual_information(*scores.T))
    assert np.mean(found) == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.025)


def test_zeros_of_a_relu_neither_make_nor_hide_information():
    """Independent variables with many zeros share nothing. Two that are zero together and otherwise independent share
    the entropy of being zero, log 2; across the edge of the point mass neighbours mix, which costs some of it."""
    rng = np.random.default_rng(0)
    apart, together = [], []
    for _ in range(25):
        x, y = rng.random((2, 300))
        on, other = rng.random((2, 300)) < 0.5
        for found, pair in ((apart, [on * x, other * y]), (together, [on * x, on * y])):
            found.append(information.mutual_information(*information.normal_scores(np.stack(pair, 1), rng).T))
    assert np.mean(apart) == pytest.approx(0, abs=0.025)
    assert math.log(2) - 0.12 < np.mean(together) < math.log(2) + 0.025


def test_each_direction_displaces_as_its_head_looks():
    for angle, step in zip(information.STEPS, DIRECTIONS):
        pairs = information.places(angle, 3, 5)
        assert {(q // 5 - p // 5, q % 5 - p % 5) for p, q in pairs} == {step}
        assert len(pairs) == (3 - abs(step[0])) * (5 - abs(step[1]))
    assert len(information.places('0°', 4, 1)) == 0
    assert len(information.places('elsewhere', 2, 2)) == 0
    assert all(max(abs(q // 5 - p // 5), abs(q % 5 - p % 5)) > 1 for p, q in information.places('elsewhere', 3, 5))


def informed(z):
    rng = np.random.default_rng(0)
    result = information.information_of(z, information.bias_at_independence(len(z), rng, 200), rng)
    statistics.correct([*questions.tests_in(result)])
    return result


def test_information_is_found_at_its_displacement_and_nowhere_else():
    z = np.random.default_rng(1).standard_normal((120, 4, 3, 4, 4)).astype(np.float32)
    for head, (dy, dx) in enumerate(DIRECTIONS):  # z_1(p + d) = z_0(p)
        z[:, head, 1] = np.roll(z[:, head, 0], (dy, dx), (1, 2))
    result = informed(z)
    different = result['shared']['different channels']
    assert all(findings.shown(different[angle]) and different[angle]['value'] > 0.05 for angle in information.STEPS)
    assert not any(findings.shown(different[c]) for c in ('in place', 'elsewhere', 'other image'))
    assert not any(findings.shown(test) for test in result['shared']['the same channel'].values())
    for key in ('own', 'local'):
        assert findings.shown(result[key]['different channels'])
        assert result[key]['different channels']['value'] > 0
        assert not findings.shown(result[key]['the same channel'])


def test_a_longer_step_is_not_taken_for_a_direction():
    """Smooth maps share more a step of 1 away than one of sqrt(2): a head at 0° must not gain by it, nor one at 45°."""
    z = np.random.default_rng(1).standard_normal((120, 2, 6, 7, 7))
    smooth = ndimage.gaussian_filter(z, (0, 0, 0, 0.8, 0.8), mode='wrap').astype(np.float32)
    for head in range(2):
        alone = informed(np.roll(smooth, -head, 1)[:, :1])
        assert findings.shown(alone['shared'][information.SAME]['0°'])
        assert alone['own'][information.SAME]['p'] > 0.05


def test_what_position_alone_tells_shows_between_two_images():
    rng = np.random.default_rng(1)
    z = 3 * rng.standard_normal((1, 4, 3, 4, 4)) + rng.standard_normal((120, 4, 3, 4, 4))  # as padding makes borders
    other = informed(z.astype(np.float32))['shared']['the same channel']['other image']
    assert findings.shown(other)
    assert other['value'] > 0.1


# ---------------------------------------------------------------------------------------------- features


def test_features_are_the_means_their_names_say():
    block = trace.observe(net(), torch.randn(2, 3, 64, 64)).blocks['layer3.1']
    found = questions.features_of(block)
    h, z, c = block.h.flatten(2), block.interactions[:, :, : block.c_red], block.c_red
    upper = torch.triu_indices(h.shape[1], h.shape[1])
    gram = torch.stack([(image @ image.T / h.shape[2])[tuple(upper)] for image in h])
    pairs = [(i, j) for i in range(c) for j in range(i, c)]
    in_place = torch.stack([(z[:, :, i] * z[:, :, j]).mean((2, 3)) for i, j in pairs], 2).flatten(1)
    displaced = torch.stack([block.products[:, :, i, j].mean((2, 3)) for i, j in pairs], 2).flatten(1)
    assert torch.allclose(found['Gram matrix'], gram, atol=1e-5)
    assert torch.allclose(found['bilinear pooling'], gram.sqrt() / gram.sqrt().norm(dim=1, keepdim=True), atol=1e-5)
    assert torch.allclose(found['products in place'], in_place, atol=1e-6)
    assert torch.allclose(found['displaced products'], displaced, atol=1e-6)
    assert torch.equal(found['mean of h'], h.mean(2))
    assert not torch.allclose(displaced, in_place, atol=1e-3)


def test_long_features_keep_their_inner_products_in_the_sketch():
    features = torch.randn(4, 6000) + torch.arange(4)[:, None]
    short = questions.sketch(features, 0)
    assert short.shape == (4, questions.SKETCH)
    expected, scale = features @ features.T, features.norm(dim=1)
    assert ((short @ short.T - expected) / (scale[:, None] * scale)).abs().max() < 0.15
    assert torch.equal(short, questions.sketch(features, 0))


def test_the_probe_reads_classes_where_there_are_any_and_learns_nothing_from_its_test_folds():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 15)
    noise = rng.standard_normal((60, 200)).astype(np.float32)
    told = questions.probe(noise + 2 * (labels[:, None] == np.arange(200) % 4), labels, 10, 5, 0)
    blind = questions.probe(noise, labels, 10, 5, 0)
    assert len(told) == len(blind) == 5
    assert np.mean(told) > 95
    assert np.mean(blind) == pytest.approx(25, abs=12)


# ---------------------------------------------------------------------------------------------- spiral and gates


def test_identity_in_place_of_the_twist_is_the_variant_without_spiral():
    model, plain, images = net(), net(use_spiral=False), torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(model.state_dict())
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if '.twist.' not in k})
    changed = questions.edited(model, questions.remove_twist)
    assert torch.equal(changed(images), plain(images))
    assert not torch.allclose(changed(images), model(images), atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_permuted_heads_look_where_another_head_looked():
    model = net()
    for block in blocks_of(model).values():
        torch.nn.init.uniform_(block.stci.twist.scale)
    changed = questions.edited(model, functools.partial(questions.roll_heads, by=1))
    for old, new in zip(blocks_of(model).values(), blocks_of(changed).values()):
        kernels, rolled = (b.stci.twist.dwconv.weight.unflatten(0, (4, -1)) for b in (old, new))
        scales, rolled_scales = (b.stci.twist.scale.unflatten(1, (4, -1)) for b in (old, new))
        for head in range(4):
            assert torch.equal(rolled[head], kernels[head - 1])
            assert torch.equal(rolled_scales[:, head], scales[:, head - 1])
        assert torch.equal(new.stci.reduce[0].weight, old.stci.reduce[0].weight)


def test_a_closed_gate_leaves_the_plain_block():
    model, images = net(), torch.randn(2, 3, 64, 64)
    plain = TwistNet(num_classes=3, base_width=8, twist_stages=()).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if '.stci.' not in k and '.gate' not in k})
    assert torch.equal(questions.edited(model, questions.close_gate)(images), plain(images))
    one = questions.edited(model, questions.close_gate, 'layer4.1')
    assert [name for name, gate in one.gates().items() if gate == 0] == ['layer4.1']


def test_images_are_rotated_by_a_quarter_turn():
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    held, turned = (HeldOut(x, np.zeros(4, int), 4) for x in (images, images.rot90(1, (2, 3))))
    model = net()
    assert np.allclose(questions.outcome(model, held, 1)['loss'], questions.outcome(model, turned)['loss'])


def test_accuracy_is_compared_image_by_image_with_the_exact_test():
    before, after = np.ones(20, bool), np.arange(20) >= 8
    found = statistics.mcnemar(before, after)
    assert (found['value'], found['lost'], found['gained']) == (-40, 8, 0)
    assert found['p'] == pytest.approx(2 * 0.5**8)
    assert found['low'] < -40 < found['high'] < 0
    same = statistics.mcnemar(before, before)
    assert same['p'] == 1
    assert same['low'] < 0 < same['high']  # nothing seen among 20 is no proof of nothing


def images_of(model, count=12):
    """Test images of three classes, which the model knows half of the time."""
    images = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8)
    right = questions.outcome(model, HeldOut(images, np.zeros(count, int), count))['guess']
    return HeldOut(images, np.where(np.arange(count) % 2, right, (right + 1) % 3), count)


def subject_of(model):
    return TrainedModel(Path('best.pt'), 'small', model, CLASSES, 1, 50.0, Preprocessing(64))


def test_rotation_with_the_twists_is_compared_with_rotation_without_them():
    model = net()
    held = images_of(model)
    result = questions.measure_spiral(subject_of(model), held, 0)
    both = model, questions.edited(model, questions.remove_twist)
    (old, new), (old_plain, new_plain) = [[questions.outcome(m, held, turns) for turns in (0, 1)] for m in both]
    changed = result['changes']['images rotated by 90°']
    for key, unit, name in (('right', 100, 'accuracy_change'), ('loss', 1, 'loss_change')):
        means = [unit * one[key].mean() for one in (old, new, old_plain, new_plain)]
        assert changed[name]['value'] == pytest.approx(means[1] - means[0])
        expected = (means[1] - means[0]) - (means[3] - means[2])
        assert result['across'][key]['value'] == pytest.approx(expected)
    acts = any(map(findings.shown, result['across'].values()))
    verdict = findings.describe_changes(result).verdict
    assert f'rotation {"" if acts else "not "}shown to act differently with twists' in verdict


@pytest.mark.slow
@pytest.mark.parametrize(
    ('kwargs', 'changes', 'reference'),
    [
        (dict(use_spiral=False), 1, 'products in place'),
        (dict(use_products=False), 1, None),
        (dict(directional=False), 3, 'displaced products'),
    ],
)
def test_a_model_without_directions_has_no_tests_of_them(kwargs, changes, reference):
    subject = subject_of(net(**kwargs))
    held = images_of(subject.model, 48)._replace(labels=np.arange(48) % 3)
    spiral = questions.measure_spiral(subject, held, 0)
    assert len(spiral['changes']) == changes
    assert 'images rotated by 90°' in spiral['changes']
    assert not any('permuted' in name for name in spiral['changes'])
    told = ' '.join(findings.describe_information(questions.measure_information(subject, held, 0)))
    assert '45°, the same channel' in told
    assert 'own direction' not in told
    assert 'across' not in told
    if reference:
        told = ' '.join(findings.describe_features(questions.measure_features(subject, held, 0)))
        assert f'{reference} less Gram matrix' in told
        assert ('isplaced' in told) == (reference == 'displaced products')
    else:
        with pytest.raises(ModelError, match='small has no products'):
            questions.measure_features(subject, held, 0)


def test_the_least_change_that_could_be_shown_is_the_least_that_holm_would_pass():
    count = 60

    def made(right, loss):
        return dict(right=right, loss=loss, guess=np.zeros(count, int))

    noise = np.random.default_rng(0).standard_normal((6, count))
    before = made(np.ones(count, bool), noise[0])
    for moved in (0, 5):  # five losses that are shown leave more room to the rest
        found = []
        for lost in range(20):
            after = {str(i): made(np.ones(count, bool), noise[0] + noise[i] + (i <= moved)) for i in range(1, 6)}
            after['1']['right'][:lost] = False
            result = questions.compare_all(before, after)
            found.append(findings.shown(result['changes']['1']['accuracy_change']))
            if not found[-1]:
                least = result['least']
        assert found.index(True) == least


# ---------------------------------------------------------------------------------------------- report


@pytest.fixture(scope='module')
def reported(original, tmp_path_factory):
    """The folder of a whole report."""
    save_dir = tmp_path_factory.mktemp('report')
    analysis.main(arguments(original, save_dir, '--seed', 1))
    return save_dir


@pytest.fixture
def report(reported):
    return json.loads((reported / 'report.json').read_text())


def test_the_report_is_whole_and_the_same_for_the_same_seed(original, reported, report, tmp_path, capsys):
    figures = {f'{key}.{suffix}' for key in analysis.QUESTIONS for suffix in ('pdf', 'png')}
    assert {path.name for path in reported.iterdir()} == figures | {'report.json', 'report.md'}
    text = analysis.report_text(report)
    assert text == (reported / 'report.md').read_text()
    assert text.startswith('# small on DTD, fold 1\n')
    assert 'p values assume that images are independent' in text
    assert '`--copies' not in text
    assert 'Images of validation chose the epoch' in text
    assert 'layer3.0 0.8808' in text  # sigmoid(2)
    assert 'from 0.1192 before training' in text
    assert not report['not_answered']
    analysis.main(arguments(original, tmp_path, '--seed', 1, '--question', 'features'))
    again = json.loads((tmp_path / 'report.json').read_text())['questions']['features']
    assert again == report['questions']['features']
    assert f'Features: {findings.describe_features(again).verdict}\n' in capsys.readouterr().out
    for name in ('features.pdf', 'features.png'):
        assert (tmp_path / name).read_bytes() == (reported / name).read_bytes()
    assert answered(original, '--seed', 2, '--question', 'features')['questions']['features'] != again


def test_of_copies_the_first_is_read_and_the_report_says_so(original):
    args = ('--question', 'features', '--labels', 'dtd=Materials')
    report = answered(original, *args, '--copies', r'class\d_001(?=[0-3])')  # four pictures of each class are one
    assert [report[key] for key in ('n_test', 'n_val', 'n_copies')] == [15, 24, 9]
    assert report['questions']['features']['images'] == 39
    text = analysis.report_text(report)
    assert text.startswith('# small on Materials, fold 1\n')
    assert '` left 9 images out' in text


def test_copies_are_of_one_class_and_one_match():
    items = [('x/a1_h.jpg', 0), ('x/a1_v.jpg', 0), ('y/a1.jpg', 1), ('x/a2.jpg', 0), ('x/b.jpg', 0), ('x/b_k.jpg', 0)]
    assert analysis.without_copies(items, r'\D*\d+') == [items[0], *items[2:]]
    assert analysis.without_copies(items, None) == items


def test_verdicts_follow_the_numbers(report):
    for key, result in report['questions'].items():
        describe = analysis.QUESTIONS[key].describe
        for test in questions.tests_in(result):
            test |= dict(p_holm=0.2, value=0.7)
        none = describe(result)
        assert '**' not in none.table
        assert {n for n, _ in re.findall(r'(\d+) of (\d+)', none.verdict)} <= {'0'}
        for test in questions.tests_in(result):
            test |= dict(p_holm=0.01)
        every = describe(result)
        better = every.verdict.split(' and worse')[0]
        assert all(n == m for n, m in re.findall(r'(\d+) of (\d+)', better))
        assert re.search(r'[1-9]\d* of \d', better)
        if 'changes' in result:
            assert 'no change' in none.verdict
            assert 'no change' not in every.verdict
        else:
            assert every.table.count('**') == 2 * none.table.count('(0.200)') > 0


def test_a_verdict_names_the_changes_that_were_shown_in_either_direction():
    def made(value, p):
        return dict(value=value, low=value - 1, high=value + 1, p=p, p_holm=p)

    tests = dict(a=made(2.0, 0.01), b=made(-3.0, 0.0001), c=made(5.0, 0.3), d=made(0.0, None))
    assert findings.changed(tests) == 'lower in 1 of 4 (b) and higher in 1 of 4 (a)'
    assert findings.changed(dict(d=tests['d'])) == 'no change shown in 1'
    assert (findings.count(tests.values()), findings.count(tests.values(), -1)) == ('1 of 4', '1 of 4')
    assert [findings.cell(test, 1) for test in tests.values()] == [
        '**+2.0 (0.010)**', '**-3.0 (<0.001)**', '+5.0 (0.300)', '+0.0 (-)'
    ]  # fmt: skip


def test_what_a_model_cannot_answer_is_named_in_the_report(tmp_path):
    tree = make_dtd(tmp_path / 'tree', per_subset=(2, 3, 3))
    report = answered(make_checkpoint(tmp_path / 'run', tree, img_size=32))
    reason = '18 images are too few for mutual information; it takes at least 40'
    assert report['not_answered'] == dict(information=reason)
    assert f'Not answered: {reason}.' in analysis.report_text(report)


def test_the_start_of_the_gates_is_not_known_where_weights_may_have_brought_others(trained):
    config = json.loads(Path('run/config.json').read_text())
    config['defines']['pretrained'] = 'digest'
    Path('run/config.json').write_text(json.dumps(config))
    for weights, start in ((dict(gates=2), None), (dict(gates=0), pytest.approx(0.1192, abs=1e-4))):
        Path('run/results.json').write_text(json.dumps(dict(weights=weights)))
        assert answered(trained, '--question', 'gates')['questions']['gates']['start'] == start


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        ('--checkpoint none.pt', 'no such checkpoint'),
        ('--checkpoint resnet/best.pt', 'resnet18, which has no STCI branch'),
        ('--checkpoint run/best.pt --fold 2', 'was trained on fold 1'),
        ('--checkpoint run/best.pt --data_dir other', '--data_dir other: its images or lists are others'),
        ('--checkpoint run/best.pt --seed -1', '--seed -1 must be from 0 to'),
        ('--checkpoint run/best.pt --copies (', '--copies (: '),
        ('--checkpoint run/best.pt --copies class.', "class 'class0' has 1 image;"),
        ('--checkpoint run/best.pt --question information --copies class._001', '27 images are too few'),
        ('--checkpoint run/best.pt --question gates', 'class0_0011.jpg'),  # damaged
        ('--checkpoint alone/best.pt', 'give --dataset'),
        ('--checkpoint alone/best.pt --dataset dtd', 'give --fold'),
        ('--checkpoint alone/best.pt --dataset synthetic --fold 1', 'has other classes than the 3 that'),
    ],
)
def test_mistakes_are_named_in_one_line(trained, argv, message):
    if 'resnet' in argv:
        make_checkpoint(Path('resnet'), Path('tree'), 'resnet18')
    if 'alone' in argv:
        make_checkpoint(Path('alone'), Path('tree'), config=False)
    if 'other' in argv:
        make_dtd(Path('other'))
    if message.endswith('.jpg'):
        Path('tree/images/class0', message).write_text('no image')
    with pytest.raises(UserError) as error:
        analysis.main(analysis.get_args_parser().parse_args([*argv.split(), '--save_dir', 'out']))
    assert message in str(error.value)
    assert '\n' not in str(error.value)


def test_other_images_than_those_of_the_split_are_refused_or_said_in_report_and_figures(trained):
    assert answered(trained, '--question', 'gates')['caution'] is None
    for subset in ('train', 'test'):  # the lists of fold 2 are those of fold 1 exchanged
        shutil.copy(f'tree/labels/{subset}2.txt', f'tree/labels/{subset}1.txt')
    with pytest.raises(RunError, match=r'its images or lists have changed since .* --other_images takes them'):
        answered(trained, '--question', 'gates')
    report = answered(trained, '--question', 'gates', '--other_images')
    assert 'images that may have trained the model' in analysis.title_of_report(report)  # and of every figure
    assert CAUTIONS[OTHER] in analysis.report_text(report)
    Path('run/config.json').unlink()
    report = answered(trained, '--question', 'gates', '--dataset', 'dtd', '--data_dir', 'tree', '--fold', 1)
    assert CAUTIONS[UNCHECKED] in analysis.report_text(report)
