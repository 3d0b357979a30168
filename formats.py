"""The formats of an exported model: each is made from the model, and loaded again to compare."""

import contextlib
import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import timm
import torch
from safetensors import safe_open

import models
from common import runs
from common.checkpoint import size_arguments
from common.errors import ModelError
from common.registry import entry_of
from training import trained
from transforms import eval_settings

BATCHES = (1, 2, 5)  # images, of the comparison
TOLERANCE = 1e-4  # of a logit, over the largest logit or 1
METADATA = 'metadata.json'  # in a .pt2
Run = Callable[[torch.Tensor], torch.Tensor]  # images -> logits


class Export(NamedTuple):
    """What is exported."""

    subject: trained.Subject
    preprocessing: dict
    config: dict  # config.json of the run; {} without one
    results: dict  # results.json

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says of the model; lists and dictionaries as JSON."""
        name, _, classes, epoch, val_acc = self.subject[1:6]
        facts = dict(model=name, architecture=cfg_of(self.subject).get('architecture', name))
        facts |= dict(classes=json.dumps(classes), preprocessing=json.dumps(self.preprocessing))
        return facts | dict(epoch=str(epoch), val_acc=str(val_acc), exported_by=f'torch {torch.__version__}')

    def images(self, number: int) -> torch.Tensor:
        """Noise in the range of normalised images, (number, 3, SIZE, SIZE)."""
        size, generator = self.preprocessing['img_size'], torch.Generator().manual_seed(number)
        return torch.randn(number, 3, size, size, generator=generator)


def cfg_of(subject: trained.Subject) -> dict:
    """timm's configuration of the model; {} where timm's builder did not make it."""
    return getattr(subject.model, 'pretrained_cfg', None) or {}


def read(path: Path) -> Export:
    """The model of a checkpoint and the files of its run.

    Raises:
        ModelError: the checkpoint cannot be used. RunError: config.json or results.json is damaged.
    """
    subject = trained.load(path)
    subject.model.requires_grad_(False)
    preprocessing = eval_settings(*subject.preprocessing)
    return Export(
        subject,
        preprocessing,
        *(runs.read_json(path.with_name(f'{name}.json')) or {} for name in ('config', 'results')),
    )


# ---------------------------------------------------------------------------------------------- formats


def traced(export: Export) -> torch.export.ExportedProgram:
    """The graph of the model, for any batch size."""
    with torch.no_grad():
        shapes = ({0: torch.export.Dim('batch')},)
        return torch.export.export(export.subject.model, (export.images(2),), dynamic_shapes=shapes)


def make_onnx(export: Export) -> bytes:
    import onnx

    program = torch.onnx.export(
        traced(export), dynamo=True, input_names=['images'], output_names=['logits'], verbose=False
    )
    proto = program.model_proto
    onnx.helper.set_model_props(proto, export.metadata)
    graph = proto.graph
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == batch:
                dim.dim_param = 'batch'
    return proto.SerializeToString()


def load_onnx(path: Path, _export: Export) -> tuple[Run, dict]:
    import onnx

    props = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    if importlib.util.find_spec('onnxruntime'):
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    else:
        import onnx.reference

        session = onnx.reference.ReferenceEvaluator(str(path))
    return lambda images: torch.from_numpy(session.run(None, dict(images=images.numpy()))[0]), props


def make_pt2(export: Export) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(traced(export), buffer, extra_files={METADATA: json.dumps(export.metadata)})
    return buffer.getvalue()


def load_pt2(path: Path, _export: Export) -> tuple[Run, dict]:
    extra = {METADATA: ''}
    program = torch.export.load(path, extra_files=extra).module()
    return program, json.loads(extra[METADATA])


def make_safetensors(export: Export) -> bytes:
    tensors = {name: tensor.contiguous() for name, tensor in export.subject.model.state_dict().items()}
    return safetensors.torch.save(tensors, export.metadata)


def load_safetensors(path: Path, export: Export) -> tuple[Run, dict]:
    model = models.build_model(export.subject.name, len(export.subject.classes), img_size=export.subject.img_size)
    model.load_state_dict(safetensors.torch.load_file(path))
    with safe_open(path, 'pt') as file:
        return model.eval(), file.metadata()


def hub_arguments(export: Export, license_id: str) -> dict:
    """Arguments of save_for_hf and push_to_hf_hub; sets the preprocessing that timm writes with the model.

    Raises:
        ModelError: timm cannot build the model and load weights into it.
    """
    subject, taken = export.subject, export.preprocessing
    if not cfg_of(subject):
        raise ModelError(
            f"{subject.name}: --format hub is for models that timm's build_model_with_cfg makes, because it loads the "
            'weights; safetensors, pt2 and onnx take any model'
        )
    size, crop_pct = taken['img_size'], taken['crop_ratio']
    if int(size / crop_pct) != (short := round(size / crop_pct)):  # timm's floor of it, and ours
        crop_pct = size / (short + 0.25)
    cfg = dict(input_size=(3, size, size), crop_pct=crop_pct, crop_mode='center')
    cfg |= dict(num_classes=len(subject.classes), license=license_id)
    cfg |= {key: taken[key] for key in ('interpolation', 'mean', 'std')}
    other = ('pool_size', 'test_input_size', 'test_crop_pct', 'label_names', 'label_offset')
    old = {key: value for key, value in cfg_of(subject).items() if key not in other}
    subject.model.pretrained_cfg = old | cfg
    arguments = {**entry_of(subject.name).get('args', {}), **size_arguments(subject.name, subject.img_size)}
    return dict(model_config=dict(label_names=subject.classes), model_args=arguments, safe_serialization='both')


def load_hub(folder: Path, export: Export) -> tuple[Run, dict]:
    config = json.loads((folder / 'config.json').read_text())
    models.register(export.subject.name)
    with contextlib.redirect_stderr(io.StringIO()):  # a TwistNet says what it loads
        model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    return model, export.metadata | dict(classes=json.dumps(config['label_names']))


MAKE = dict(onnx=make_onnx, pt2=make_pt2, safetensors=make_safetensors)
LOAD = dict(onnx=load_onnx, pt2=load_pt2, safetensors=load_safetensors, hub=load_hub)


# ---------------------------------------------------------------------------------------------- the check


def check(export: Export, kind: str, path: Path) -> float:
    """The largest difference of a logit, over TOLERANCE's scale, between the file and the model.

    Raises:
        ModelError: it is above TOLERANCE, the file does not load, or what it says of the model is not the same.
    """
    worst = 0.0
    try:
        run, metadata = LOAD[kind](path, export)
        with torch.no_grad():
            for number in BATCHES:
                images = export.images(number)
                wanted = export.subject.model(images)
                worst = max(worst, ((run(images) - wanted).abs().max() / wanted.abs().max().clamp_min(1)).item())
    except Exception as error:
        raise ModelError(f'{export.subject.name} as {kind}: does not load again ({first_line(error)})') from error
    if not worst <= TOLERANCE:
        raise ModelError(f'{export.subject.name} as {kind}: its logits differ by {worst:.1e}, more than {TOLERANCE:g}')
    if not export.metadata.items() <= metadata.items():
        raise ModelError(f'{export.subject.name} as {kind}: has lost its metadata')
    return worst


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
