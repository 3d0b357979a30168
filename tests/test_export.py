"""The promises of export.py: a file of any format gives the logits of the model, also without this repository."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from test_images import swapped_profile
from timm.models import _hub

import export
import models
from common import runs
from common.checkpoint import save_checkpoint, weights_file
from common.errors import ModelError, RunError
from common.images import open_image
from training import trained
from transforms import Preprocessing, eval_settings, eval_transform, eval_view, normalize

CLASSES = ['bark', 'moss', 'rock, wet']
SMALL = 'test_resnet'  # timm's own, of a few thousand parameters
try:
    export.check_onnx()
    WITHOUT_ONNX = ''
except RunError as missing:
    WITHOUT_ONNX = str(missing)
needs_onnx = pytest.mark.skipif(bool(WITHOUT_ONNX), reason=WITHOUT_ONNX)


def make_best(folder: Path, name: str = SMALL, size: int = 32, temperature: float | None = 0.4321, **facts) -> Path:
    """A best.pt as train.py writes it, with BatchNorms that are not the identity, and the files of its run."""
    torch.manual_seed(3)
    model = models.build_model(name, len(CLASSES), img_size=size)
    model.train()(2 * torch.randn(8, 3, size, size) + 1)
    transform = eval_settings(*Preprocessing(size, 0.95, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    folder.mkdir(parents=True, exist_ok=True)
    fitted = {} if temperature is None else dict(temperature=temperature)
    best = weights_file(name, CLASSES, 7, 62.5, model.state_dict(), transform=transform, **fitted)
    save_checkpoint(folder / 'best.pt', best)
    made = dict(dataset='fmd', fold=2, seed=42, lr=0.01, epochs=9, batch_size=16, amp='off')
    runs.write_json(folder / 'config.json', dict(options=made, environment=dict(torch='2.14.1', commit=None)))
    results = dict(dataset='fmd', fold=2, seed=42, test_acc=61.25, best_val_acc=62.5, best_epoch=7, params_M=0.5)
    runs.write_json(folder / 'results.json', results | dict(n_train=60, n_val=20, n_test=20, pretrained=None) | facts)
    return folder / 'best.pt'


@pytest.fixture
def best(tmp_path) -> Path:
    return make_best(tmp_path / 'run')


def do(best: Path, kind: str, *more: str) -> None:
    export.main(export.parse_args(['--checkpoint', str(best), '--format', kind, *more]))


def out_of(best: Path, kind: str) -> Path:
    return best.with_name('hub' if kind == 'hub' else f'best.{kind}')


def images_of(number: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(9))


def logits_of(best: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return trained.load(best).model(images)


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {'best.pt', 'config.json', 'results.json'}


# ---------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(
    ('name', 'size', 'kind'),
    [
        (SMALL, 32, 'safetensors'),
        (SMALL, 32, 'hub'),
        pytest.param('twistnet18', 64, 'pt2', marks=pytest.mark.slow),
        pytest.param('twistnet18', 64, 'onnx', marks=[needs_onnx, pytest.mark.slow]),
    ],
)
def test_the_file_stands_beside_the_checkpoint_and_gives_its_logits(tmp_path, monkeypatch, name, size, kind, capsys):
    monkeypatch.setitem(models.MODELS['twistnet18'], 'twist', dict(base_width=8))
    best = make_best(tmp_path / 'run', name, size)
    do(best, kind)
    out, err = capsys.readouterr()
    assert out == f'{out_of(best, kind)}\n'
    assert f'{kind}: logits within ' in err
    assert left_in(best.parent) == {out_of(best, kind).name}
    run, metadata = export.LOAD[kind](out_of(best, kind), trained.load(best))
    for number in (1, 4):
        images = images_of(number, size)
        with torch.no_grad():
            torch.testing.assert_close(run(images), logits_of(best, images), rtol=0, atol=1e-5)
    assert json.loads(metadata['classes']) == CLASSES
    assert metadata['temperature'] == '0.4321'


def test_a_safetensors_file_says_what_it_is_of(best):
    do(best, 'safetensors')
    with safe_open(best.with_suffix('.safetensors'), 'pt') as file:
        facts = file.metadata()
    assert json.loads(facts['preprocessing']) == dict(
        img_size=32, crop_ratio=0.95, interpolation='bicubic', mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3]
    )
    assert (facts['model'], facts['architecture'], facts['epoch'], facts['val_acc']) == (SMALL, SMALL, '7', '62.5')


def test_a_model_without_a_temperature_says_that_it_is_not_calibrated(tmp_path):
    model = trained.load(make_best(tmp_path / 'run', temperature=None))
    assert 'temperature' not in export.metadata_of(model)
    card = export.model_card(model, 'source', SimpleNamespace(license='unknown', imports=None))
    assert card['details']['Limits'][-1] == 'The probability it gives is not calibrated.'
    assert 'probabilities = (model(transform(image)[None])).softmax(1)[0]' in card['usage']
    do(model.path, 'hub')
    assert 'temperature' not in runs.read_json(model.path.parent / 'hub' / 'config.json')


def test_a_hub_folder_has_classes_preprocessing_and_a_card(best):
    do(best, 'hub', '--license', 'cc-by-4.0')
    config = runs.read_json(best.parent / 'hub' / 'config.json')
    assert (config['architecture'], config['label_names'], config['temperature']) == (SMALL, CLASSES, 0.4321)
    model = timm.create_model(f'local-dir:{best.parent / "hub"}', pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert (list(data['input_size']), data['crop_mode'], data['interpolation']) == ([3, 32, 32], 'center', 'bicubic')
    assert (list(data['mean']), list(data['std'])) == ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    card = (best.parent / 'hub' / 'README.md').read_text()
    for words in (
        'license: cc-by-4.0',
        '# Model card for run',
        f'{SMALL} trained on FMD, fold 2: 3 classes.',
        '60 train, 20 val, 20 test',
        '61.25 % (one fold, one seed: 42)',
        'which chose epoch 7',
        '  - lr: 0.01',
        'Accuracy was measured on the 20 test images of this fold alone.',
        f"name = 'local-dir:{best.parent / 'hub'}'",
        'short side to 34 pixels (bicubic), centre crop of 32',
        'none, from scratch',
        'Its probability is calibrated at the temperature 0.4321, on validation images.',
        'probabilities = (model(transform(image)[None]) / 0.4321).softmax(1)[0]',
    ):
        assert words in card
    assert 'import models' not in card


def test_the_card_says_what_is_recorded_and_what_of_the_recipe_is_not_the_default(best):
    def card() -> dict:
        return export.model_card(trained.load(best), 'source', SimpleNamespace(license='unknown', imports=None))

    made = dict(dataset='folder', name='bricks', fold=1, lr=0.001, opt='adamw', ema=True, ema_decay=0.9999)
    runs.write_json(best.with_name('config.json'), dict(options=made))
    results = runs.read_json(best.with_name('results.json'))
    assert card()['details']['Validation accuracy'] == '62.50 %, which chose epoch 7'
    del results['best_val_acc']  # of --train_on trainval
    runs.write_json(best.with_name('results.json'), results)
    assert card()['details']['Validation accuracy'] == 'none, the last epoch'
    best.with_name('results.json').unlink()
    assert card()['description'] == f'{SMALL} trained on bricks, fold 1: 3 classes.'
    assert card()['details']['Recipe'] == dict(lr=0.001, opt='adamw', ema=True)
    best.with_name('config.json').unlink()
    assert card()['details']['Data'] == 'not recorded'
    assert card()['details']['Limits'][0] == 'Its accuracy is not recorded.'
    assert 'Test accuracy' not in card()['details']


# Each loads a file in a process that does not have this repository.
ALONE = dict(
    pt2="""
program = torch.export.load('best.pt2').module()
logits = program(images)""",
    safetensors="""
import json, safetensors.torch, timm
from safetensors import safe_open
with safe_open('best.safetensors', 'pt') as file:
    facts = file.metadata()
model = timm.create_model(facts['architecture'], num_classes=len(json.loads(facts['classes'])))
model.load_state_dict(safetensors.torch.load_file('best.safetensors'))
logits = model.eval()(images)""",
    hub="""
import timm
model = timm.create_model('local-dir:hub', pretrained=True).eval()
assert list(model.pretrained_cfg['label_names']) == ['bark', 'moss', 'rock, wet']
logits = model(images)""",
    onnx="""
import json, onnxruntime
session = onnxruntime.InferenceSession('best.onnx')
facts = session.get_modelmeta().custom_metadata_map
assert json.loads(facts['classes']) == ['bark', 'moss', 'rock, wet']
assert [session.get_inputs()[0].name, session.get_outputs()[0].name] == ['images', 'logits']
assert session.get_inputs()[0].shape == ['batch', 3, 32, 32]
logits = torch.from_numpy(session.run(None, dict(images=images.numpy()))[0])""",
)


@pytest.mark.slow
def test_each_file_loads_without_this_repository(best, monkeypatch):
    with_onnx = not WITHOUT_ONNX and importlib.util.find_spec('onnxruntime')
    kinds = [kind for kind in ALONE if kind != 'onnx' or with_onnx]
    for kind in kinds:
        do(best, kind)
    torch.save(images_of(), best.with_name('images.pt'))
    parts = ''.join(f'{textwrap.indent(ALONE[kind], "    ")}\n    found.append(logits)' for kind in kinds)
    program = f"""
import sys, torch
assert not any(path.startswith({str(ROOT)!r}) and 'site-packages' not in path for path in sys.path), sys.path
images, found = torch.load('images.pt'), []
with torch.no_grad():{parts}
torch.save(found, 'logits.pt')
"""
    made = subprocess.run([sys.executable, '-c', program], cwd=best.parent, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    found = torch.load(best.with_name('logits.pt'))
    assert len(found) == len(kinds)
    for logits in found:
        torch.testing.assert_close(logits, logits_of(best, images_of()), rtol=0, atol=1e-5)
    if with_onnx:  # it is checked by onnx's own reference where there is no runtime
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'onnxruntime' else real(name))
        monkeypatch.setitem(sys.modules, 'onnxruntime', None)
        assert export.check(trained.load(best), 'onnx', best.with_suffix('.onnx')) <= export.TOLERANCE


@pytest.mark.parametrize(
    ('name', 'lines'),
    [pytest.param('twistnet18', '', marks=pytest.mark.slow), (f'stci_{SMALL}', f"models.register('stci_{SMALL}')\n")],
)
def test_a_model_of_this_repository_is_one_of_timms_after_the_lines_of_its_card(tmp_path, name, lines):
    best = make_best(tmp_path / 'run', name, 64)
    do(best, 'hub')
    card = (best.parent / 'hub' / 'README.md').read_text()
    assert f'\nimport models  # of the repository of this model\n{lines}' in card
    model = timm.create_model(f'local-dir:{best.parent / "hub"}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model(images_of(3, 64)), logits_of(best, images_of(3, 64)))


# ---------------------------------------------------------------------------------------------- what it sees


SEEN = [(96, 0.875), (224, 0.875), (32, 0.95), (64, 1.0), (288, 0.95), (96, 0.875, 'squash'), (63, 0.9, 'pad')]


@pytest.mark.parametrize('view', SEEN)
def test_timms_transform_sees_what_the_model_was_tested_on(tmp_path, view):
    best, (size, ratio, *resize) = make_best(tmp_path / 'run'), view
    preprocessing = Preprocessing(size, ratio, (0.4, 0.5, 0.6), resize=(resize or ['crop'])[0])
    model = trained.load(best)._replace(preprocessing=preprocessing)
    export.hub_arguments(model, 'unknown')
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 420, 3), dtype=np.uint8))
    data = timm.data.resolve_model_data_config(model.model)
    seen = timm.data.create_transform(**data, is_training=False, normalize=False)(photograph)
    assert torch.equal(seen, eval_transform(*preprocessing.view)(photograph))
    if not resize:
        assert round(size / data['crop_pct']) == round(size / ratio), 'as --pretrained of its file takes it'


@pytest.mark.parametrize('resize', ['crop', 'squash', 'pad'])
def test_the_client_sees_what_predict_sees(tmp_path, monkeypatch, capsys, resize):
    code = (ROOT / 'examples' / 'onnx_inference.py').read_text()
    prep = eval_settings(61, bits=12, resize=resize)
    about = dict(classes='["a", "b"]', preprocessing=json.dumps(prep))
    session = SimpleNamespace(
        get_modelmeta=lambda: SimpleNamespace(custom_metadata_map=about),
        get_inputs=lambda: [SimpleNamespace(name='images')],
        run=lambda _, feeds: seen.extend(feeds.values()) or [np.array([[1.0, 2.0]])],
    )
    monkeypatch.setitem(sys.modules, 'onnxruntime', SimpleNamespace(InferenceSession=lambda path: session))
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (97, 150, 4), dtype=np.uint8)
    colours, exif, seen = Image.fromarray(pixels[..., :3]), Image.Exif(), []
    exif[0x0112] = 6
    colours.save('photograph.jpg', exif=exif)
    colours.save('mirrored.png', exif=exif, icc_profile=swapped_profile())
    colours.convert('L').save('grey.png', icc_profile=swapped_profile())  # not of its channels
    colours.convert('CMYK').save('print.jpg')
    Image.fromarray(pixels).save('clear.png')
    Image.fromarray(pixels).save('wide.png', icc_profile=swapped_profile())
    colours.quantize(9).save('palette.gif', transparency=3)
    Image.fromarray(pixels[..., 0].astype(np.uint16) << 4).save('deep.png')
    colours.resize((61, 400)).save('tall.png')
    exec(code, client := {})
    about['temperature'] = '0.5'
    exec(code, {})
    for line, odds in zip(capsys.readouterr().out.splitlines(), (np.exp(1), np.exp(2)), strict=True):
        assert (line[:2], float(line[2:])) == ('b ', pytest.approx(odds / (1 + odds)))
    for path in tmp_path.iterdir():
        expected = eval_view(61, resize=resize)(open_image(str(path), 12))
        assert np.array_equal(client['view'](path), expected), path.name
    image = normalize(eval_transform(61, resize=resize)(open_image('photograph.jpg'))[None])
    assert np.allclose(seen[0], image.numpy(), atol=1e-5)

    colours.resize((128, 128)).save('photograph.jpg')  # where README's shorter code has no rounding
    about['preprocessing'] = json.dumps(eval_settings(56))
    exec(re.search(r'```python\n(import json[^`]*)```', (ROOT / 'README.md').read_text())[1], {})
    image = normalize(eval_transform(56)(open_image('photograph.jpg'))[None])
    assert np.allclose(seen[-1], image.numpy(), atol=1e-5)


# ---------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    """A stand-in for the hub of Hugging Face: its repositories are folders below this one."""

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            if '/' not in repo_id:
                raise ValueError(f"{repo_id} is nobody's\nsecond line")
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, repo_id, filename, **_):
            return (tmp_path / 'hub' / repo_id / filename).exists()

        def upload_folder(self, repo_id, folder_path, **_):
            shutil.copytree(folder_path, tmp_path / 'hub' / repo_id, dirs_exist_ok=True)
            return f'https://hub/{repo_id}'

    monkeypatch.setattr(_hub, 'HfApi', Api)
    return tmp_path / 'hub'


def test_a_model_is_pushed_and_nothing_is_left_here(best, hub, capsys):
    do(best, 'hub', '--repo', 'user/textures')
    assert capsys.readouterr().out == 'https://hub/user/textures\n'
    assert left_in(best.parent) == set()
    pushed = hub / 'user' / 'textures'
    assert "name = 'hf-hub:user/textures'" in (pushed / 'README.md').read_text()
    model = timm.create_model(f'local-dir:{pushed}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model(images_of()), logits_of(best, images_of()))
    (pushed / 'README.md').write_text('mine')
    do(best, 'hub', '--repo', 'user/textures')
    assert (pushed / 'README.md').read_text() == 'mine'
    with pytest.raises(RunError, match=r"^--repo textures: not pushed \(textures is nobody's\); `hf auth login` logs"):
        do(best, 'hub', '--repo', 'textures')


# ---------------------------------------------------------------------------------------------- what is refused


def test_what_is_there_is_replaced_only_on_demand(best):
    do(best, 'hub')
    out = out_of(best, 'hub')
    (out / 'notes.txt').write_text('mine')
    (out / 'config.json').write_text('{}')
    with pytest.raises(RunError, match='hub: is there already; --overwrite replaces it'):
        do(best, 'hub')
    do(best, 'hub', '--overwrite')
    assert (out / 'notes.txt').read_text() == 'mine'
    assert runs.read_json(out / 'config.json')['architecture'] == SMALL


def test_options_that_do_not_fit(best, monkeypatch):
    with pytest.raises(RunError, match='--repo pushes what --format hub makes'):
        do(best, 'pt2', '--repo', 'user/textures')
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name.startswith('onnx') else real(name))
    with pytest.raises(RunError, match='--format onnx: onnx and onnxscript missing; pip install onnx onnxscript'):
        do(best, 'onnx')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: True)
    monkeypatch.setattr(torch, '__version__', '2.4.0+cpu')
    with pytest.raises(RunError, match=r'^--format onnx: torch 2\.4\.0\+cpu is too old, it takes 2\.6$'):
        do(best, 'onnx')


def test_a_file_that_is_not_the_model_or_not_whole_is_not_left(best, monkeypatch):
    real = export.load_safetensors

    def other(path, model):
        run, metadata = real(path, model)
        return lambda images: run(images) + 2e-3, metadata

    monkeypatch.setitem(export.LOAD, 'safetensors', other)
    with pytest.raises(ModelError, match=rf'^{SMALL} as safetensors: its logits differ by .*, more than 0\.0001$'):
        do(best, 'safetensors')
    monkeypatch.setitem(export.LOAD, 'safetensors', lambda path, model: (real(path, model)[0], {}))
    with pytest.raises(ModelError, match='has lost its metadata'):
        do(best, 'safetensors')

    def fails(*_, **__):
        raise OSError(28, 'No space left on device\nframe #0')

    monkeypatch.setattr(torch.export, 'export', fails)
    with pytest.raises(ModelError, match=rf'^{SMALL}: cannot be exported as pt2 \(.*No space left on device\)$'):
        do(best, 'pt2')
    monkeypatch.setattr(Path, 'write_bytes', fails)
    with pytest.raises(OSError, match='No space left on device'):
        do(best, 'safetensors')
    assert left_in(best.parent) == set()
