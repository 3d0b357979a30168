"""The promises of common/timm_models.py: models outside the registry, what they take, and files that register more."""

import copy
import importlib.util
import json
import re
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, RUN_OPTIONS, argv_of, finish, run, start
from PIL import Image

import compute_flops
import evaluate
import export
import predict
import run_all
import summarize_runs
import visualize
from common import options, runs, weights
from common.errors import ModelError, RunError
from common.images import open_image
from common.registry import MODELS, STCI_VARIANTS, entry_of
from common.timm_models import import_file, model_defines, own_settings
from datasets import load_splits
from models import build_model
from training import trained
from training.loader import eval_images
from transforms import CROP_RATIO, Preprocessing, normalize, preprocessing_of, read_settings

NET = """
import torch
from torch import nn
from timm.models import register_model

@register_model
def my_net(pretrained=False, num_classes=1000, **kwargs):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
    )
"""
FIXED = """
cfg = dict(input_size=(3, 48, 48), fixed_input_size=True, crop_pct=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
default_cfgs = {'my_net': cfg}
register_model(my_net)
"""


@pytest.fixture
def my_net(tmp_path, monkeypatch):
    """A user's file; what it registers is gone after the test."""
    registry = timm.models._registry
    held = {key: value for key, value in vars(registry).items() if key.startswith('_mod') and isinstance(value, dict)}
    before = {key: {k: copy.copy(v) for k, v in value.items()} for key, value in held.items()}
    monkeypatch.setattr(sys, 'path', list(sys.path))
    path = tmp_path / 'my_net.py'
    path.write_text(NET)
    yield path
    for key, value in held.items():
        value.clear()
        value.update(before[key])
    for name in [name for name in sys.modules if name.startswith('imported_')]:
        del sys.modules[name]


def test_every_variant_of_twistnet_with_a_stage_has_its_words():
    twistnets = [name for name, entry in MODELS.items() if name.startswith('twistnet18') and 'twist' in entry]
    of_trunk = [name for name in twistnets if 'zero_init' in name or name == 'twistnet18_first_order']
    assert len(STCI_VARIANTS) == len(twistnets) - len(of_trunk)
    entry = entry_of('stci_no_ais_resnet50')
    assert entry == dict(label='resnet50 + STCI (w/o AIS)', timm='resnet50', base='resnet50', stci=dict(use_ais=False))
    assert entry_of('stci_gate_m1_x')['keep_init'] == '.gate'
    assert entry_of('resnet50') == dict(label='resnet50', timm='resnet50')
    assert entry_of('stci_seresnet18')['weights'] == MODELS['seresnet18']['weights']


def test_the_input_is_the_models_own():
    assert own_settings('resnet18') == own_settings('stci_resnet18') == {}
    assert preprocessing_of('resnet18', 96) == Preprocessing(96)
    lite = dict(img_size=224, crop_ratio=0.875, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert own_settings('tf_efficientnet_lite0') == own_settings('stci_tf_efficientnet_lite0') == lite
    assert own_settings('tf_efficientnet_b1')['img_size'] == 240
    assert preprocessing_of('stci_no_ais_tf_efficientnet_lite0', 96) == Preprocessing(**lite | dict(img_size=96))


def test_a_file_says_what_its_weights_take(tmp_path):
    transform = dict(img_size=96, crop_ratio=0.9, interpolation='bicubic', mean=[0.1, 0.2, 0.3], std=[1.0, 1.0, 1.0])
    torch.save(dict(state_dict={}, transform=transform), tmp_path / 'best.pt')
    own = own_settings('tf_efficientnet_lite0', str(tmp_path / 'best.pt'))
    assert own == dict(img_size=96, crop_ratio=0.9, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    torch.save({}, tmp_path / 'bare.pt')
    assert own_settings('tf_efficientnet_lite0', tmp_path / 'bare.pt')['mean'] == (0.5, 0.5, 0.5)
    cfg = dict(input_size=[3, 160, 160], crop_pct=1.0, mean=[0.3, 0.3, 0.3], std=[0.2, 0.2, 0.2])
    runs.write_json(tmp_path / 'config.json', dict(architecture='x', pretrained_cfg=cfg))
    own = own_settings('tf_efficientnet_lite0', tmp_path / 'model.safetensors')
    assert own == dict(img_size=160, crop_ratio=1.0, mean=(0.3, 0.3, 0.3), std=(0.2, 0.2, 0.2))
    torch.save(dict(state_dict={}, transform=transform), tmp_path / 'resnet.pt')
    assert own_settings('resnet18', tmp_path / 'resnet.pt') == {}, 'the registry keeps its input'


def test_options_fit_the_model():
    def size(*words: str) -> int:
        args = options.parse_args(['--data_dir', 'x', '--dataset', 'fmd', *words])
        options.fit_to_model(args)
        return args.img_size

    assert size('--model', 'tf_efficientnet_b1') == 240
    assert size('--model', 'stci_tf_efficientnet_b1') == 240
    assert size('--model', 'tf_efficientnet_b1', '--img_size', '224') == 224
    assert size('--model', 'fastvit_sa12') == size('--model', 'stci_fastvit_sa12') == 224
    demo = options.parse_args(['--model', 'tf_efficientnet_b1'])
    options.fit_to_model(demo)
    assert demo.img_size == 64, 'the demo is small on purpose'
    with pytest.raises(RunError, match="unknown model 'resnet19'; near to it: "):
        size('--model', 'resnet19')


def test_normalisation_and_crop(tmp_path):
    images = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert torch.equal(normalize(images, (0.5,) * 3, (0.5,) * 3), torch.ones(1, 3, 2, 2))
    assert torch.equal(normalize(images), normalize(images, *Preprocessing(2).statistics))
    Image.fromarray(np.arange(100 * 100 * 3, dtype=np.uint32).astype(np.uint8).reshape(100, 100, 3)).save(
        tmp_path / 'a.png'
    )
    items = [(str(tmp_path / 'a.png'), 0)]
    wide, narrow = (eval_images(items, Preprocessing(32, ratio), None)[0][0] for ratio in (1.0, CROP_RATIO))
    assert not torch.equal(wide, narrow)
    assert read_settings(dict(img_size=64)) == Preprocessing(64), 'of a checkpoint of older code'


def test_the_tag_is_timms_default():
    assert weights.weights_source('resnet50', True) == 'resnet50.a1_in1k'
    assert weights.weights_source('resnet50.tv_in1k', True) == 'resnet50.tv_in1k'
    assert weights.weights_source('stci_no_ais_tf_efficientnet_lite0', True) == 'tf_efficientnet_lite0.in1k'
    assert weights.weights_source('stci_resnet18', True) == MODELS['resnet18']['weights']
    with pytest.raises(ModelError, match='timm names no ImageNet weights'):
        weights.weights_source('resnet10t_nowhere', True)


# ------------------------------------------------------------------------------------------ runs


def test_a_run_of_a_model_of_timm(tree, tmp_path):
    name = 'stci_tf_mobilenetv3_small_minimal_100'
    folder, results = run(tree, tmp_path / 'runs', '--epochs', '1', '--warmup_epochs', '0', model=name)
    assert results['model'] == name
    assert runs.read_json(folder / 'config.json')['defines']['preprocessing']['mean'] == [0.5, 0.5, 0.5]
    (line,) = runs.read_log(folder / 'log.jsonl')
    assert list(line['gates']) == list(line['selection']) == ['stci.stage3', 'stci.stage4']
    model = trained.load(folder / 'best.pt')
    assert (model.name, model.preprocessing) == (name, preprocessing_of(name, 32))
    splits = load_splits('dtd', str(tree), 1)
    with torch.no_grad():  # normalised as in training
        logits = model.model(model.batch(open_image(path) for path, _ in splits.test))
    labels = torch.tensor([label for _, label in splits.test])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(results['test_loss'], rel=1e-4)


def test_what_defines_a_run_is_as_its_file_gives_it_back():
    assert model_defines(options.parse_args(['--model', 'resnet18'])) == {}
    defines = model_defines(options.parse_args(['--model', 'tf_efficientnet_lite0']))
    assert json.loads(json.dumps(defines)) == defines, 'else a difference is reported where there is none'


# ------------------------------------------------------------------------------------------ files of users


def test_a_net_of_ten_lines(my_net, tree, tmp_path, monkeypatch):
    more = ('--epochs', '1', '--warmup_epochs', '0', '--import', str(my_net))
    folder, results = run(tree, tmp_path / 'runs', *more, model='my_net')
    assert results['model'] == 'my_net'
    defines = runs.read_json(folder / 'config.json')['defines']
    assert defines['imported'] == runs.digest(NET.encode())
    assert 'imports' not in defines, 'not where the file lies'
    moved = shutil.copy(my_net, tmp_path / 'moved.py')
    assert trained.load(folder / 'best.pt', my_net).name == 'my_net'
    with pytest.raises(ModelError, match="'my_net' is the name of another model"):
        import_file(moved)


@pytest.mark.slow
def test_a_checkpoint_of_an_imported_net_asks_for_its_file(my_net, tree, tmp_path, capsys):
    argv = argv_of(tree, tmp_path / 'runs', '--epochs', '1', '--warmup_epochs', '0', '--import', str(my_net))
    argv[argv.index('tiny')] = 'my_net'
    code, _, err = finish(start('train.py', *argv))  # so that this process does not know the net
    assert code == 0, err
    view = ['--checkpoint', str(tmp_path / 'runs' / 'dtd_fold1_my_net_seed42' / 'best.pt'), '--view', 'tsne']
    with pytest.raises(ModelError, match=r"unknown model 'my_net'.*--import FILE"):
        visualize.main(visualize.get_args_parser().parse_args(view))
    with pytest.raises(ModelError, match="features need forward_features and forward_head, as timm's models have"):
        visualize.main(visualize.get_args_parser().parse_args([*view, '--import', str(my_net)]))
    run_all.cli(['--models', 'my_net', '--dry_run', *(word for word in argv if word not in ('--model', 'my_net'))])
    assert capsys.readouterr().out.split()[0] == 'complete'


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('1 / 0', r'my_net.py, line 1: ZeroDivisionError: division by zero'),
        ('import nowhere_to_be_found', r"line 1: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ('def f(:', r'line 1: SyntaxError: '),
        ('raise SystemExit(3)', r'line 1: SystemExit: 3'),
        ('x = 1', r'registers no model; put @timm.models.register_model before its function'),
        (NET.replace('my_net', 'resnet18'), r"'resnet18' is the name of another model"),
        (NET.replace('my_net', 'stci_net'), r"'stci_net' is the name of another model"),
    ],
)
@pytest.mark.filterwarnings('ignore:Overwriting')
def test_a_file_that_cannot_be_imported(my_net, text, words):
    my_net.write_text(text)
    with pytest.raises(ModelError, match=words) as caught:
        import_file(my_net)
    assert '\n' not in str(caught.value)


def test_a_path_that_is_no_file_to_import(my_net):
    with pytest.raises(ModelError, match=r'--import .*/nowhere.py: no such file'):
        import_file(my_net.with_name('nowhere.py'))


def test_a_file_beside_that_has_the_name_of_a_script_here(my_net):
    my_net.write_text(f'from models import STCI\n{NET}')
    (my_net.parent / 'models.py').touch()
    with pytest.raises(ModelError, match=r'imports models, which would be .*; rename .*models.py'):
        import_file(my_net)
    (my_net.parent / 'models.py').unlink()
    import_file(my_net)


@pytest.mark.parametrize('name', ['local-dir:hub', 'hf-hub:user/name', 'stci_hf-hub:user/name'])
def test_a_place_of_weights_is_no_model(name):
    with pytest.raises(RunError, match=r'--model NAME --pretrained FOLDER/model\.safetensors'):
        options.check_model(name)


def test_a_net_whose_output_is_no_logits_is_refused(my_net):
    my_net.write_text(NET.replace('my_net', 'your_net').replace(', nn.Linear(8, num_classes)', ''))
    import_file(my_net)
    with pytest.raises(ModelError, match=r'your_net: returns \(1, 8\) for an image, not \(1, 5\): one logit a class'):
        build_model('your_net', 5)


def test_a_net_of_one_size_says_so(my_net):
    text = NET.replace('**kwargs', 'pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None')
    my_net.write_text(text + '\n' + FIXED)
    import_file(my_net)
    assert own_settings('my_net') == dict(img_size=48, crop_ratio=1.0, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert build_model('my_net', 5, img_size=48)
    with pytest.raises(ModelError, match='my_net: takes images of 48 x 48 pixels only; leave --img_size out'):
        build_model('my_net', 5, img_size=64)


@pytest.mark.slow
def test_every_command_of_the_readme_takes_its_own_net(my_net, tree, tmp_path, capsys, monkeypatch):
    my_net.write_text(re.search(r'```python\n([^`]*def my_net.*?)```', (ROOT / 'README.md').read_text(), re.S)[1])
    monkeypatch.chdir(tmp_path)
    more = ('--epochs', '1', '--warmup_epochs', '0', '--import', str(my_net))
    folder, _ = run(tree, tmp_path / 'runs', *more, model='my_net')
    given = ['--import', str(my_net)]
    best = [*given, '--checkpoint', str(folder / 'best.pt')]
    cpu = ['--device', 'cpu', '--num_workers', '0']
    image = str(next((tree / 'images').rglob('*.jpg')))
    kinds = ['safetensors', 'pt2'] + ['onnx'] * bool(importlib.util.find_spec('onnxscript'))
    for script, argv in (
        (predict, [*best, *cpu, '--images', image, '--sheet']),
        (predict, [*best, *cpu, '--images', image, '--tile', '20']),
        (evaluate, ['--run_dir', str(tmp_path / 'runs')]),
        (evaluate, [*best, *cpu]),
        *((export, [*best, '--format', kind]) for kind in kinds),
    ):
        script.main(script.parse_args(argv))
    compute_flops.main(compute_flops.get_args_parser().parse_args([*given, '--model', 'my_net']))
    data = ['--dataset', 'dtd', '--data_dir', str(tree), '--models', 'my_net', '--run_dir', 'tuned', *RUN_OPTIONS]
    search = [*data, *more, '--num_workers', '0', '--tune', 'lr=0.01,0.03']
    run_all.main(*run_all.get_args_parser().parse_known_args(search))
    assert (tmp_path / 'tuned' / 'dtd_fold1_my_net_seed42' / 'results.json').exists()
    summarize_runs.main(summarize_runs.get_args_parser().parse_args(['--run_dir', 'runs', '--val', '--latex']))
    out = capsys.readouterr().out
    assert 'my_net' in out
    with pytest.raises(ModelError, match=r"my_net: --format hub is for models that timm's build_model_with_cfg makes"):
        export.main(export.parse_args([*best, '--format', 'hub']))
