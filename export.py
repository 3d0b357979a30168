"""A trained model as a file for other programs, with the names of its classes and its preprocessing inside.

    python export.py --checkpoint runs/main/dtd_fold1_twistnet18_seed42/best.pt --format onnx
    python export.py --checkpoint runs/main/dtd_fold1_resnet18_seed42/best.pt --format hub --out resnet18-dtd

onnx          best.onnx, for onnxruntime; `metadata_props` holds model, classes, preprocessing and temperature. It takes
              torch 2.6 and `pip install onnx onnxscript`; onnxruntime, or else onnx's own reference, checks the file
pt2           best.pt2, for torch.export.load without this repository; extra file `metadata.json`
safetensors   best.safetensors, the tensors by name; in its metadata the same
hub           a folder as timm writes it, with a model card made from the run's config.json and results.json, for
              timm.create_model('local-dir:FOLDER', pretrained=True); --repo pushes it to the hub instead

onnx and pt2 hold the fused model (models.fuse). They take any number of images of the model's size,
(N, 3, SIZE, SIZE), normalised, and return logits, of which softmax(logits / temperature) are calibrated probabilities;
not every run has a temperature. Each file is loaded again and its logits are compared with the model's for
several batch sizes before it takes its name.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import timm
import torch
from safetensors import safe_open
from timm.models import push_to_hf_hub, save_for_hf
from timm.models._hub import generate_readme

import models
from common import options, runs
from common.checkpoint import size_arguments
from common.distributed import say, training_process
from common.errors import ModelError, RunError, user_errors
from common.registry import DATASETS, dataset_label, entry_of, model_label
from training import trained
from training.trained import TrainedModel
from transforms import eval_settings

ONNX_TORCH = (2, 6)  # whose exporter takes any number of images
BATCHES = (1, 2, 5)  # images, of the comparison
TOLERANCE = 1e-4  # of a logit, over the largest logit or 1
METADATA = 'metadata.json'  # in a .pt2
Run = Callable[[torch.Tensor], torch.Tensor]  # images -> logits


# ---------------------------------------------------------------------------------------------- formats


def metadata_of(model: TrainedModel) -> dict[str, str]:
    """What a file says of its model; lists and dictionaries as JSON."""
    temperature = {} if model.temperature is None else dict(temperature=str(model.temperature))
    return temperature | dict(
        model=model.name,
        architecture=cfg_of(model).get('architecture', model.name),
        classes=json.dumps(model.classes),
        preprocessing=json.dumps(eval_settings(*model.preprocessing)),
        epoch=str(model.epoch),
        **({} if model.val_acc is None else dict(val_acc=str(model.val_acc))),
        exported_by=f'torch {torch.__version__}',
    )


def cfg_of(model: TrainedModel) -> dict:
    """timm's configuration of the model; {} where timm's builder did not make it."""
    return getattr(model.model, 'pretrained_cfg', None) or {}


def noise(model: TrainedModel, number: int) -> torch.Tensor:
    """Noise in the range of normalised images, (number, 3, SIZE, SIZE)."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(number, 3, model.img_size, model.img_size, generator=generator)


def traced(model: TrainedModel) -> torch.export.ExportedProgram:
    """The graph of the model, fused, for any batch size."""
    fused = trained.fused(model.model, model.name, model.img_size).requires_grad_(False)
    with torch.no_grad():
        shapes = ({0: torch.export.Dim('batch')},)
        return torch.export.export(fused, (noise(model, 2),), dynamic_shapes=shapes)


def make_onnx(model: TrainedModel) -> bytes:
    import onnx

    program = torch.onnx.export(
        traced(model), dynamo=True, input_names=['images'], output_names=['logits'], verbose=False
    )
    proto = program.model_proto
    onnx.helper.set_model_props(proto, metadata_of(model))
    graph = proto.graph
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == batch:
                dim.dim_param = 'batch'
    return proto.SerializeToString()


def load_onnx(path: Path, _model: TrainedModel) -> tuple[Run, dict]:
    import onnx

    props = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    if importlib.util.find_spec('onnxruntime'):
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    else:
        import onnx.reference

        session = onnx.reference.ReferenceEvaluator(str(path))
    return lambda images: torch.from_numpy(session.run(None, dict(images=images.numpy()))[0]), props


def make_pt2(model: TrainedModel) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(traced(model), buffer, extra_files={METADATA: json.dumps(metadata_of(model))})
    return buffer.getvalue()


def load_pt2(path: Path, _model: TrainedModel) -> tuple[Run, dict]:
    extra = {METADATA: ''}
    program = torch.export.load(path, extra_files=extra).module()
    return program, json.loads(extra[METADATA])


def make_safetensors(model: TrainedModel) -> bytes:
    tensors = {name: tensor.contiguous() for name, tensor in model.model.state_dict().items()}
    return safetensors.torch.save(tensors, metadata_of(model))


def load_safetensors(path: Path, model: TrainedModel) -> tuple[Run, dict]:
    again = models.build_model(model.name, len(model.classes), img_size=model.img_size)
    again.load_state_dict(safetensors.torch.load_file(path))
    with safe_open(path, 'pt') as file:
        return again.eval(), file.metadata()


def hub_arguments(model: TrainedModel, license_id: str) -> dict:
    """Arguments of save_for_hf and push_to_hf_hub; sets the preprocessing that timm writes with the model."""
    if not cfg_of(model):
        raise ModelError(
            f"{model.name}: --format hub is for models that timm's build_model_with_cfg makes, because it loads the "
            'weights; safetensors, pt2 and onnx take any model'
        )
    taken = eval_settings(*model.preprocessing)
    size, crop_pct = model.img_size, taken['crop_ratio']
    if int(size / crop_pct) != (short := round(size / crop_pct)):  # timm's floor of it, and ours
        crop_pct = size / (short + 0.25)
    resize = model.preprocessing.resize
    cfg = dict(input_size=(3, size, size), crop_pct=crop_pct if resize == 'crop' else 1.0)
    cfg |= dict(crop_mode=dict(crop='center', squash='squash', pad='border')[resize])
    cfg |= dict(num_classes=len(model.classes), license=license_id)
    cfg |= {key: taken[key] for key in ('interpolation', 'mean', 'std')}
    other = ('pool_size', 'test_input_size', 'test_crop_pct', 'label_names', 'label_offset')
    model.model.pretrained_cfg = {key: value for key, value in cfg_of(model).items() if key not in other} | cfg
    arguments = {**entry_of(model.name).get('args', {}), **size_arguments(model.name, size)}
    named = dict(label_names=model.classes)
    if model.temperature is not None:
        named['temperature'] = model.temperature
    return dict(model_config=named, model_args=arguments, safe_serialization='both')


def load_hub(folder: Path, model: TrainedModel) -> tuple[Run, dict]:
    config = json.loads((folder / 'config.json').read_text())
    models.register(model.name)
    with contextlib.redirect_stderr(io.StringIO()):  # a TwistNet says what it loads
        again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    written = dict(classes=json.dumps(config['label_names']), temperature=str(config.get('temperature')))
    return again, metadata_of(model) | written


MAKE = dict(onnx=make_onnx, pt2=make_pt2, safetensors=make_safetensors)
LOAD = dict(onnx=load_onnx, pt2=load_pt2, safetensors=load_safetensors, hub=load_hub)


# ---------------------------------------------------------------------------------------------- the check


def check(model: TrainedModel, kind: str, path: Path) -> float:
    """The largest difference of a logit between the file and the model, on the scale of TOLERANCE."""
    run, metadata = LOAD[kind](path, model)
    worst = 0.0
    with torch.no_grad():
        for number in BATCHES:
            images = noise(model, number)
            wanted = model.model(images)
            worst = max(worst, ((run(images) - wanted).abs().max() / wanted.abs().max().clamp_min(1)).item())
    if not worst <= TOLERANCE:
        raise ModelError(f'{model.name} as {kind}: its logits differ by {worst:.1e}, more than {TOLERANCE:g}')
    if not metadata_of(model).items() <= metadata.items():
        raise ModelError(f'{model.name} as {kind}: has lost its metadata')
    return worst


# ---------------------------------------------------------------------------------------------- the model card

ENVIRONMENT = ('python', 'torch', 'torchvision', 'timm', 'device', 'commit')  # of config.json
LIMITS = (
    'timm reads colours as a file stores them. In training, transparent parts were laid over white, values of more '
    'than eight bits scaled to eight, and colours of an ICC profile converted to sRGB.',
    'It names one of its classes for every image, also for one that shows none of them.',
)
USAGE = """
```python
import timm
from PIL import Image, ImageOps
{imports}
name = '{source}'
model = timm.create_model(name, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = ImageOps.exif_transpose(Image.open('photograph.jpg')).convert('RGB')
probabilities = (model(transform(image)[None]){scale}).softmax(1)[0]
print(model.pretrained_cfg.get('label_names', range(len(probabilities)))[probabilities.argmax()])
```
"""


def model_card(model: TrainedModel, source: str, args: argparse.Namespace) -> dict:
    """What timm takes as `model_card`: data, accuracy, recipe, limits, and how to load it from `source`."""
    made, environment = (model.config.get(key, {}) for key in ('options', 'environment'))
    results = runs.read_json(model.path.with_name('results.json')) or {}
    dataset = results.get('dataset') or made.get('dataset')
    called = made.get('name') or dataset_label(dataset, {})
    data = f'{called}, fold {results.get("fold", made.get("fold"))}' if dataset else 'not recorded'
    details, accuracy = dict(Model=model_label(model.name), Data=data), 'Its accuracy is not recorded.'
    if 'protocol' in DATASETS.get(dataset, {}):
        details['Protocol'] = DATASETS[dataset]['protocol']
    if results:
        details['Images'] = ', '.join(f'{results[f"n_{subset}"]} {subset}' for subset in ('train', 'val', 'test'))
        details['Test accuracy'] = f'{results["test_acc"]:.2f} % (one fold, one seed: {results["seed"]})'
        val = results.get('best_val_acc')
        chosen = 'none, the last epoch' if val is None else f'{val:.2f} %, which chose epoch {results["best_epoch"]}'
        details['Validation accuracy'] = chosen
        details['Parameters'] = f'{results["params_M"]:.2f} M'
        details['Initial weights'] = results['pretrained'] or 'none, from scratch'
        accuracy = f'Accuracy was measured on the {results["n_test"]} test images of this fold alone.'
    taken = eval_settings(*model.preprocessing)
    size, how = model.img_size, taken['interpolation']
    views = dict(
        crop=f'short side to {round(size / taken["crop_ratio"])} pixels ({how}), centre crop of {size}',
        squash=f'whole, squashed to {size} x {size} pixels ({how})',
        pad=f'whole, longer side to {size} pixels ({how}), padded with the mean',
    )
    details['Input'] = f'{views[model.preprocessing.resize]}, mean {taken["mean"]}, deviation {taken["std"]}' + (
        f', images of {taken["bits"]} bits' if 'bits' in taken else ''
    )
    details['Classes'] = f'{len(model.classes)}: {", ".join(model.classes)}'
    if made:
        recipe = {key: made[key] for key in (*options.DEFAULT, 'amp') if key in made}
        rare = {key: off for key, off in options.NEUTRAL.items() if key not in options.OWN_DATA}
        details['Recipe'] = recipe | {key: made[key] for key, off in rare.items() if made.get(key, off) != off}
    if environment:
        details['Made with'] = ', '.join(f'{key} {environment[key]}' for key in ENVIRONMENT if environment.get(key))
    scale, calibration = '', 'The probability it gives is not calibrated.'
    if model.temperature is not None:
        scale = f' / {model.temperature:.4g}'
        calibration = f'Its probability is calibrated at the temperature {model.temperature:.4g}, on validation images.'
    details['Limits'] = [accuracy, *LIMITS, calibration]
    return dict(
        tags=['image-classification', 'timm'],
        license=args.license,
        description=f'{model_label(model.name)} trained on {data}: {runs.counted(len(model.classes), "class")}.',
        details=details,
        usage=USAGE.format(source=source, scale=scale, imports=imports_for(model.name, args.imports)),
    )


def imports_for(name: str, imports: str | None) -> str:
    """The lines of Python to run before timm has the model: of the file of --import, and of models.py."""
    ours = {'twist', 'stci'} & entry_of(name).keys()
    modules = ([Path(imports).stem] if imports else []) + (['models'] if ours else [])
    lines = ''.join(f'import {module}  # of the repository of this model\n' for module in modules)
    return lines + f"models.register('{name}')\n" * ('stci' in ours)


# ---------------------------------------------------------------------------------------------- one export


def write(model: TrainedModel, args: argparse.Namespace, path: Path) -> None:
    """Write the file or folder."""
    if args.format == 'hub':
        save_for_hf(model.model, path, **hub_arguments(model, args.license))
        card = model_card(model, f'local-dir:{args.out}', args)
        (path / 'README.md').write_text(generate_readme(card, args.checkpoint.resolve().parent.name), encoding='utf-8')
        return
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            data = MAKE[args.format](model)
    except Exception as error:  # tracing meets any kind
        raise ModelError(f'{model.name}: cannot be exported as {args.format} ({first_line(error)})') from error
    path.write_bytes(data)


def put(made: Path, out: Path) -> None:
    """Move a file, or the files of a folder, to its name; other files in that folder stay."""
    if made.is_dir() and out.is_dir():
        for path in sorted(made.iterdir()):
            os.replace(path, out / path.name)
    else:
        os.replace(made, out)


def push(model: TrainedModel, args: argparse.Namespace) -> str:
    """Push to a repository of the hub; returns its address."""
    card = model_card(model, f'hf-hub:{args.repo}', args)
    try:
        return str(push_to_hf_hub(model.model, args.repo, model_card=card, **hub_arguments(model, args.license)))
    except Exception as error:  # network, login and hub each raise their own
        raise RunError(f'--repo {args.repo}: not pushed ({first_line(error)}); `hf auth login` logs in') from error


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# ---------------------------------------------------------------------------------------------- command line


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Export a trained model for other programs.', allow_abbrev=False)
    parser.add_argument('--checkpoint', type=Path, required=True, metavar='BEST.PT', help='best.pt of a run')
    parser.add_argument('--format', choices=tuple(LOAD), required=True)
    parser.add_argument('--out', type=Path, help='file or folder; if not given, beside the checkpoint')
    parser.add_argument('--overwrite', action='store_true', help='replace existing files')
    parser.add_argument(
        '--repo', metavar='USER/NAME', help='with hub: push to this repository; an existing README is kept'
    )
    parser.add_argument('--license', default='unknown', help='licence of the weights, for the model card of hub')
    options.add_import_arg(parser)
    return parser


def check_onnx() -> None:
    """Raise RunError where a package is missing or too old."""
    if missing := [name for name in ('onnx', 'onnxscript') if importlib.util.find_spec(name) is None]:
        raise RunError(f'--format onnx: {" and ".join(missing)} missing; pip install onnx onnxscript onnxruntime')
    if tuple(map(int, torch.__version__.split('.')[:2])) < ONNX_TORCH:
        needed = '.'.join(map(str, ONNX_TORCH))
        raise RunError(f'--format onnx: torch {torch.__version__} is too old, it takes {needed}')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked. Raises RunError."""
    args = get_args_parser().parse_args(argv)
    if args.repo and (args.format != 'hub' or args.out):
        raise RunError('--repo pushes what --format hub makes, and leaves no folder; leave --out out')
    if args.format == 'onnx':
        check_onnx()
    if args.out is None:
        args.out = args.checkpoint.with_name('hub' if args.format == 'hub' else f'{args.checkpoint.stem}.{args.format}')
    if args.out.exists() and not (args.repo or args.overwrite):
        raise RunError(f'{args.out}: is there already; --overwrite replaces it, --out takes another name')
    return args


def main(args: argparse.Namespace) -> None:
    model = trained.load(args.checkpoint, args.imports)
    folder = None if args.repo else args.out.resolve().parent
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.export-') as temporary:
        path = Path(temporary) / (args.out.name or 'hub')
        write(model, args, path)
        worst = check(model, args.format, path)
        if not args.repo:
            put(path, args.out)
    sizes = ', '.join(map(str, BATCHES))
    say(f'{args.format}: logits within {worst:.1e} of the model for {sizes} images')
    print(push(model, args) if args.repo else args.out)


if __name__ == '__main__':
    with (
        user_errors('export.py'),
        training_process('export.py', 'stopped; nothing is left', (signal.SIGTERM, signal.SIGINT)),
    ):
        main(parse_args())
