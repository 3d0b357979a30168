"""The promises of training/engine.py: optimisers, groups of parameters, averages, weights of classes; fingerprints."""

import argparse
import io
import re

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from conftest import run
from test_train import ONE_EPOCH, outcome, stop_after_one_epoch
from torch import nn

import models
import train
import transforms
from common import options, results, runs
from common.checkpoint import read_checkpoint
from common.errors import ModelError, RunError
from common.options import MOMENTUM, UNUSABLE, has_momentum
from common.splits import Splits
from training import engine

CPU = torch.device('cpu')


def args_of(argv: str = '', model: str = 'tiny') -> argparse.Namespace:
    plain = '--warmup_epochs 0 --img_size 32 --amp off --mixup 0 --cutmix 0'
    args = options.parse_args(['--model', model, *plain.split(), *argv.split()])
    options.check(args)
    return args


def one_step(argv: str = '') -> tuple[dict[str, torch.Tensor], engine.State]:
    """By how much each parameter of the tiny TwistNet moves in a step, and the state after it."""
    args = args_of(f'--clip_grad 0 {argv}')
    torch.manual_seed(0)
    made = engine.build_state(args, 3, CPU, None, 8)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    torch.manual_seed(1)
    batch = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 3

    def loss(images, labels, *_):
        return F.cross_entropy(made.model(images), labels)

    list(engine.train_steps(made, [batch], 0, lambda _: args.lr, loss, args.clip_grad))
    return {name: p.detach() - before[name] for name, p in made.model.named_parameters()}, made


class Small(nn.Module):
    """A convolution, a norm, a classifier."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.body(x))


# ------------------------------------------------------------------------------------------ fingerprints and tables

CHANGES = {  # options, and what the title of their table says
    '--opt adamw --lr 3e-4': 'lr 0.0003, opt adamw',
    '--gate_lr 100': 'gate_lr 100.0',
    '--ema': 'ema True',
    '--layer_decay 0.75': 'layer_decay 0.75',
    '--class_weights balanced': 'class_weights balanced',
    '--freeze stem,layer1': 'freeze stem,layer1',
    '--patience 5': 'up to 10 epochs',
    '--train_on trainval': 'trained on train and val',
    '--resize pad': 'resize pad',
    '--vflip 0.5 --rotate any': 'rotate any, vflip 0.5',
    '--erase 0.25': 'erase 0.25',
}


@pytest.mark.parametrize(
    ('argv', 'expected'),
    [
        ('--dataset dtd --data_dir x', '6df20589f733c0f6'),
        ('', '73ba22bfc45c0300'),
        ('--dataset fmd --data_dir x --recipe scratch --pretrained', 'c40cfc090b9e4efb'),
    ],
)
def test_options_at_their_defaults_leave_fingerprints_as_they_are(argv, expected):
    def fingerprint(more: str = '') -> str:
        return runs.fingerprint(options.defining(vars(options.parse_args([*argv.split(), *more.split()]))))

    assert fingerprint() == expected
    assert expected not in [fingerprint(more) for more in CHANGES]
    assert (fingerprint('--mixup 0 --crop_scale 0.5 1 --hflip 0') == expected) == (argv == ''), 'spelled out, the demo'


def test_pretraining_has_a_fingerprint_of_its_own_that_later_options_leave_as_it_is():
    def fingerprint(*more: str) -> str:
        args = options.parse_pretraining_args(['--data_dir', 'x', '--ema', *more])
        return runs.fingerprint(options.pretraining_defining(vars(args)))

    assert fingerprint() == fingerprint('--opt', 'sgd') == 'b71a6b17aea991dd'
    changed = [fingerprint(*more) for more in (('--opt', 'adamw'), ('--layer_decay', '0.9'), ('--drop_path', '0.1'))]
    assert len({fingerprint(), *changed}) == 4


def test_runs_with_these_options_are_another_recipe_and_titles_say_so():
    def recipe(argv: str) -> dict:
        defines = options.defining(vars(args_of(argv, model='twistnet18'))) | dict(split='images', processes=1)
        return results.recipe_of(dict(defines=defines))

    recipes = [recipe(argv) for argv in ('', *CHANGES)]
    titles = [results.title_of(results.Table(recipe, [], [], {}), recipes) for recipe in recipes]
    assert len(set(titles)) == len(recipes)
    assert [words for title, words in zip(titles, ('scratch', *CHANGES.values())) if words not in title] == []
    assert recipes[0] == recipe('--opt sgd')


# ------------------------------------------------------------------------------------------ optimisers


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('momentum', ['0', '0.9'])
def test_sgd_is_torch_s_with_nesterov_momentum_over_one_group(tiny, momentum, fused):
    args, model = args_of(f'--momentum {momentum}'), models.build_model('tiny', 3)
    made = engine.build_optimizer(args, model, fused)
    recipe = dict(momentum=float(momentum), nesterov=float(momentum) > 0, weight_decay=1e-4, fused=fused or None)
    assert type(made) is torch.optim.SGD
    assert made.state_dict() == torch.optim.SGD(model.parameters(), args.lr, **recipe).state_dict()
    assert [*map(id, made.param_groups[0]['params'])] == [*map(id, model.parameters())]


def test_momentum_of_the_usual_optimisers_is_as_timm_knows_it():
    assert {name: timm.optim.get_optimizer_info(name).has_momentum for name in MOMENTUM} == MOMENTUM
    assert [has_momentum('lars'), has_momentum('lamb')] == [True, False]
    assert options.parse_args(['--opt', 'AdamW']).opt == 'adamw'


@pytest.mark.parametrize('name', timm.optim.list_optimizers(exclude_filters=UNUSABLE))
def test_every_optimiser_moves_and_resumes_in_the_same_bits(name):
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Small()
        return model, engine.build_optimizer(args_of(f'--opt {name} --lr 0.01', model='resnet18'), model)

    def steps(model, optimizer, numbers) -> None:
        for number in numbers:
            torch.manual_seed(number)
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.randint(3, (4,))).backward()
            optimizer.step()

    (model, optimizer), (again, other), file = build(), build(), io.BytesIO()
    start = model.fc.weight.detach().clone()
    steps(model, optimizer, range(2))
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    steps(model, optimizer, range(2, 4))
    file.seek(0)
    for module, values in zip((again, other), torch.load(file, weights_only=True)):
        module.load_state_dict(values)
    steps(again, other, range(2, 4))
    assert not torch.equal(model.fc.weight, start)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_weight_decay_is_of_all_parameters_for_sgd_and_of_kernels_for_the_others(tiny):
    model = models.build_model('tiny', 3)
    names = {id(p): name for name, p in model.named_parameters()}

    def decays(argv: str) -> dict[str, float]:
        optimizer = engine.build_optimizer(args_of(f'--weight_decay 0.05 {argv}'), model)
        return {names[id(p)]: group['weight_decay'] for group in optimizer.param_groups for p in group['params']}

    kernels = {name for name, p in model.named_parameters() if p.ndim > 1}
    for more in ('', '--layer_decay 0.5', '--gate_lr 10'):
        assert decays(more) == dict.fromkeys(names.values(), 0.05)
        assert decays(f'--opt adamw {more}') == {n: 0.05 * (n in kernels) for n in names.values()}
    assert 'layer2.0.gate' not in kernels


@pytest.mark.parametrize(
    ('model', 'argv', 'words'),
    [
        ('tiny', '--gate_lr 100', r'--gate_lr 100\.0: tiny has no gates'),
        ('resnet10t', '--gate_lr 100', r'--gate_lr 100\.0: resnet10t has no gates'),
        ('resnet18', '--layer_decay 0.5', r'--layer_decay 0\.5: timm knows no order of the layers of resnet18'),
    ],
)
def test_what_a_network_or_an_optimiser_cannot_have_is_refused(tiny, model, argv, words):
    with pytest.raises(RunError, match=words):
        engine.build_optimizer(args_of(argv, model), Small())


@pytest.mark.parametrize(('argv', 'notes'), [('', ["note: --lr 0.05 is the recipe's for sgd"]), ('--lr 1e-3', [])])
def test_the_learning_rate_of_sgd_under_another_optimiser_is_noted(argv, notes):
    args = options.parse_args(['--opt', 'adamw', *argv.split()])
    found = options.lowered_defaults(args, options.RECIPES['demo'])
    assert [note.partition(';')[0] for note in found] == notes


@pytest.mark.slow
def test_reduced_precision_takes_all_of_them(tree, tmp_path, tiny):
    more = ['--opt', 'adamw', '--lr', '0.001', '--layer_decay', '0.75', '--gate_lr', '10', '--ema']
    more += ['--class_weights', 'balanced']
    losses = {}
    for amp in ('bf16', 'fp16', 'off'):
        folder, _ = run(tree, tmp_path / amp, *more, '--amp', amp)
        losses[amp] = [line['train_loss'] for line in runs.read_log(folder / 'log.jsonl')]
        assert read_checkpoint(folder / 'best.pt')['state_dict']['fc.weight'].dtype == torch.float32
    assert losses['bf16'] == pytest.approx(losses['off'], rel=0.05)
    assert losses['fp16'] == pytest.approx(losses['off'], rel=0.05)
    assert losses['bf16'] != losses['fp16'] != losses['off']


# ------------------------------------------------------------------------------------------ groups of parameters


def test_layer_decay_makes_the_stem_s_step_smaller_by_its_factor(tiny):
    plain = '--momentum 0 --weight_decay 0'
    whole, _ = one_step(plain)
    decayed, made = one_step(f'{plain} --layer_decay 0.75')
    depth = {'stem.0.weight': 4, 'layer1.0.conv1.weight': 3, 'layer2.1.stci.reduce.0.weight': 1, 'fc.weight': 0}
    for name, layers in depth.items():
        assert whole[name].norm() > 0
        torch.testing.assert_close(decayed[name], whole[name] * 0.75**layers, rtol=1e-3, atol=1e-7)
    assert {group['lr_scale'] for group in made.optimizer.param_groups} == {0.75**layers for layers in range(5)}


def test_the_gates_have_a_learning_rate_of_their_own(tiny):
    whole, _ = one_step()
    faster, _ = one_step('--gate_lr 100')
    gates = [name for name in whole if name.endswith('.gate')]
    assert len(gates) == 2
    for name in whole:
        if name in gates:
            torch.testing.assert_close(faster[name], 100 * whole[name], rtol=1e-2, atol=1e-6)
        else:
            assert torch.equal(faster[name], whole[name])
    _, both = one_step('--gate_lr 100 --layer_decay 0.5')
    names = {id(p): name for name, p in both.model.named_parameters()}
    scales = {names[id(p)]: group['lr_scale'] for group in both.optimizer.param_groups for p in group['params']}
    assert scales.keys() == whole.keys()
    assert (scales['layer2.1.gate'], scales['layer2.0.gate'], scales['layer2.0.conv1.weight']) == (50, 25, 0.25)
    frozen, _ = one_step('--gate_lr 0')
    assert not any(frozen[name].any() for name in gates)


@pytest.mark.parametrize('name', ['stci_resnet10t', 'stci_vgg11'])  # a stage of VGG is a pooling layer
def test_a_branch_learns_at_the_rate_of_its_stage(name):
    with torch.device('meta'):
        model = models.build_model(name, 3)
    groups = engine.parameter_groups(args_of('--layer_decay 0.5 --gate_lr 10', model=name), model)
    names = {p: key for key, p in model.named_parameters()}
    scales = {names[p]: group['lr_scale'] for group in groups for p in group['params']}
    assert scales.keys() == {*names.values()}
    of_vgg = ('features.18.weight',) * 2
    ends = dict(stci_resnet10t=('layer3.0.bn2.weight', 'layer4.0.bn2.weight'), stci_vgg11=of_vgg)
    for stage, end in zip(('stage3', 'stage4'), ends[name]):
        assert scales[f'stci.{stage}.stci.reduce.0.weight'] == scales[end] < 1
        assert scales[f'stci.{stage}.gate'] == 10 * scales[end]
    assert ('resnet' in name) == (scales[ends[name][0]] < scales[ends[name][1]])


def test_a_net_that_returns_more_than_logits_while_it_trains_is_named(tiny):
    args = args_of()
    built = engine.build_state(args, 3, CPU, None, 2)
    built.model.register_forward_hook(lambda _module, _inputs, out: (out, out))
    with pytest.raises(ModelError, match='tiny: returns a tuple while it trains, not one tensor of logits'):
        engine.mixed_loss(args, built, torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long), 3, (0,))


# ------------------------------------------------------------------------------------------ frozen modules


@pytest.mark.parametrize('more', ['', '--opt adamw --layer_decay 0.75', '--ema --gate_lr 10'])
@pytest.mark.parametrize(('names', 'tops'), [('stem,layer1', ('stem.', 'layer1.')), ('all', ('stem.', 'layer'))])
def test_frozen_modules_stay_as_they_are_to_the_last_statistic(tiny, names, tops, more):
    moved, made = one_step(f'--freeze {names} --weight_decay 0.1 {more}')
    optimised = {p for group in made.optimizer.param_groups for p in group['params']}
    for name, parameter in made.model.named_parameters():
        frozen = name.startswith(tops)
        assert (parameter.grad is None, parameter not in optimised, not moved[name].any()) == (frozen,) * 3, name
    for name, buffer in made.model.named_buffers():
        if name.endswith('num_batches_tracked'):
            assert buffer.item() == (0 if name.startswith(tops) else 1), name


def test_a_branch_behind_a_frozen_stage_learns_at_the_rate_of_the_stage():
    args = args_of('--layer_decay 0.5 --freeze layer3,layer4', model='stci_resnet10t')
    made = engine.build_state(args, 3, CPU, None, 2)
    model = made.model
    scales = {id(p): group['lr_scale'] for group in made.optimizer.param_groups for p in group['params']}
    assert scales[id(model.stci['stage3'].gate)] < scales[id(model.stci['stage4'].gate)] < 1
    assert not scales.keys() & {*map(id, [*model.layer3.parameters(), *model.layer4.parameters()])}
    assert len(made.frozen) == sum(
        isinstance(m, nn.BatchNorm2d) for m in [*model.layer3.modules(), *model.layer4.modules()]
    )


@pytest.mark.parametrize(
    ('names', 'words'),
    [
        (
            'stem,layer9',
            '--freeze layer9: no module of tiny with parameters; at the top level it has stem, layer1, lay',
        ),
        ('stem.2', r'--freeze stem\.2: no module of tiny with parameters'),
        ('stem,layer1,layer2,fc', '--freeze stem,layer1,layer2,fc: leaves nothing of tiny to train'),
    ],
)
def test_what_cannot_be_frozen_is_named(tiny, names, words):
    with pytest.raises(RunError, match=words):
        engine.build_state(args_of(f'--freeze {names}'), 3, CPU, None, 2)


def test_a_model_without_stochastic_depth_takes_a_drop_path_of_zero(tiny):
    model = engine.build_dropping(argparse.Namespace(model='tiny', img_size=32, drop_path=0.0), 3, False)
    assert [*model.parameters()]


def test_a_classifier_on_loaded_weights_resumes_in_the_same_bits(whole, tree, tmp_path, tiny, monkeypatch, capsys):
    more = ('--freeze', 'all', '--pretrained', str(whole / 'best.pt'))
    undisturbed, _ = run(tree, tmp_path / 'whole', *more)
    assert re.search('note: --freeze all: 0.00.M of 0.0..M parameters learn\n', capsys.readouterr().err)
    start, end = (read_checkpoint(folder / 'best.pt')['state_dict'] for folder in (whole, undisturbed))
    assert {name for name in end if not torch.equal(start[name], end[name])} == {'fc.weight', 'fc.bias'}
    stop_after_one_epoch(monkeypatch, tree, tmp_path / 'cut', *more)
    assert outcome(run(tree, tmp_path / 'cut', *more)[0]) == outcome(undisturbed)
    torch.save({name: value for name, value in start.items() if not name.startswith('layer1')}, tmp_path / 'part.pt')
    for loaded, fresh in (((), 'stem, layer1'), (('--pretrained', str(tmp_path / 'part.pt')), 'layer1')):
        engine.build_state(args_of('--freeze stem,layer1'), 3, CPU, None, 2, *loaded[1:])
        assert f'parameters learn; frozen as initialised, not as loaded: {fresh}\n' in capsys.readouterr().err
    old = {name: value for name, value in start.items() if not name.endswith('num_batches_tracked')}
    torch.save(old, tmp_path / 'old.pt')  # as files of the first torchvision are
    engine.build_state(args_of('--freeze all'), 3, CPU, None, 2, str(tmp_path / 'old.pt'))
    assert 'as initialised' not in capsys.readouterr().err


def test_each_step_has_the_learning_rate_of_the_schedule_and_mixes_anew(whole, tree, tmp_path, tiny, monkeypatch):
    keys, real = [], engine.mix
    monkeypatch.setattr(engine, 'mix', lambda *args: keys.append(args[-1]) or real(*args))
    folder, _ = run(tree, tmp_path, '--layer_decay', '0.5', '--gate_lr', '2')
    rates, plain = ([line['lr'] for line in runs.read_log(path / 'log.jsonl')] for path in (folder, whole))
    assert rates == plain
    assert len(set(keys)) == len(keys) == 9, 'three steps in each of three epochs'


# ------------------------------------------------------------------------------------------ the average


def test_the_averaged_weights_are_validated_chosen_saved_and_tested(tree, tmp_path, tiny, monkeypatch):
    states, judged = [], []
    real_build, real_evaluate = train.build_state, train.evaluate

    def build(*args):
        states.append(real_build(*args))
        judged.append(states[0].evaluated.fc.weight.detach().clone())  # the start
        return states[0]

    def evaluate(model, *args):
        assert model is states[0].average.module
        judged.append(model.fc.weight.detach().clone())
        return real_evaluate(model, *args)

    monkeypatch.setattr(train, 'build_state', build)
    monkeypatch.setattr(train, 'evaluate', evaluate)
    folder, _ = run(tree, tmp_path, '--ema', '--ema_decay', '0.5', *ONE_EPOCH)
    start, validated, tested = judged
    saved = read_checkpoint(folder / 'best.pt')['state_dict']['fc.weight']
    assert all(torch.equal(saved, weight) for weight in (validated, tested))
    assert not torch.equal(saved, start)
    assert not torch.equal(saved, states[0].model.fc.weight)


def test_an_average_of_nothing_but_the_last_step_is_the_plain_run(whole, tree, tmp_path, tiny):
    last, _ = run(tree, tmp_path / 'b', '--ema', '--ema_decay', '0')
    averaged, _ = run(tree, tmp_path / 'c', '--ema')
    logs, _, tensors, *_ = zip(*map(outcome, (whole, last, averaged)))
    assert (logs[0], tensors[0]) == (logs[1], tensors[1])
    assert tensors[0] != tensors[2]
    trained = [[line['train_loss'] for line in log] for log in logs]
    assert trained[0] == trained[2], 'averaging does not change the training'


def test_the_average_forgets_its_start_within_a_short_run(tiny):
    average = engine.build_state(args_of('--ema'), 3, CPU, None, 2).average
    assert [round(average.get_decay(step), 2) for step in (1, 2, 100, 1000)] == [0, 0.37, 0.95, 0.99]


def test_an_averaged_run_resumes_in_the_same_bits(tree, tmp_path, tiny, monkeypatch):
    more = ('--ema', '--opt', 'adamw', '--lr', '0.001', '--gate_lr', '10', '--layer_decay', '0.9')
    undisturbed, _ = run(tree, tmp_path / 'whole', *more)
    with monkeypatch.context() as patch:  # between last.pt and best.pt
        patch.setattr(train, 'save_best', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tree, tmp_path / 'cut', *more)
    stop_after_one_epoch(monkeypatch, tree, tmp_path / 'cut', *more)
    assert outcome(run(tree, tmp_path / 'cut', *more)[0]) == outcome(undisturbed)


# ------------------------------------------------------------------------------------------ weights of classes


def weights_of(*labels: int) -> torch.Tensor:
    items = [(f'{i}.jpg', label) for i, label in enumerate(labels)]
    return engine.balanced_weights(Splits(items, [], [], ['class0', 'class1', 'class2']), CPU)


def test_balanced_weights():
    torch.testing.assert_close(weights_of(0, 0, 0, 1, 1, 2), torch.tensor([6 / 9, 6 / 6, 6 / 3]))
    with pytest.raises(RunError, match="class 'class2' has no training image"):
        weights_of(0, 1, 1)


@pytest.mark.parametrize('smoothing', ['0', '0.1'])
@pytest.mark.parametrize('mixup', ['0', '0.8'])
def test_weights_act_on_the_training_loss_of_mixed_and_smoothed_targets(tiny, mixup, smoothing):
    args = args_of(f'--mixup {mixup} --label_smoothing {smoothing}')
    made = engine.build_state(args, 3, CPU, None, 8)
    images, labels = torch.randn(8, 3, 32, 32), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    weights, key = weights_of(0, 1, 1, 1, 1, 2), ('mix', 0, 0)  # of a set with other shares than this batch
    made.model.eval()
    loss = engine.mixed_loss(args, made, images, labels, 3, key, weights)
    mixed, targets = transforms.mix(images, labels, 3, args.mixup, 0, key)
    targets = targets if args.mixup else F.one_hot(labels, 3).float()
    targets = (1 - args.label_smoothing) * targets + args.label_smoothing / 3
    expected = -(weights * targets * made.model(mixed).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)


def test_the_validation_loss_is_not_weighted(tree, tmp_path, tiny, monkeypatch):
    weights = torch.tensor([5.0, 0.1, 0.1])
    monkeypatch.setattr(train, 'balanced_weights', lambda *_: weights)
    seen, real = [], engine.F.cross_entropy
    monkeypatch.setattr(engine.F, 'cross_entropy', lambda *a, **kw: seen.append(kw) or real(*a, **kw))
    run(tree, tmp_path, '--class_weights', 'balanced', *ONE_EPOCH)
    judged = [kw for kw in seen if kw.get('reduction') == 'sum']
    assert len(judged) == 1 + 1, 'a batch each: validation, test'
    assert all('weight' not in kw for kw in judged)
    assert all(kw['weight'] is weights for kw in seen if kw not in judged)
