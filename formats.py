"""The formats of an exported model: each is made from the model, and loaded again to compare."""

import contextlib
import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import timm
import torch
from safetensors import safe_open

import models
from common.checkpoint import size_arguments
from common.errors import ModelError
from common.registry import entry_of
from training import trained
from transforms import eval_settings

BATCHES = (1, 2, 5)  # images, of the comparison
TOLERANCE = 1e-4  # of a logit, over the largest logit or 1
METADATA = 'metadata.json'  # in a .pt2
Run = Callable[[torch.Tensor], torch.Tensor]  # images -> logits


def metadata_of(model: trained.TrainedModel) -> dict[str, str]:
    """What a file says of its model; lists and dictionaries as JSON."""
    return dict(
        model=model.name,
        architecture=cfg_of(model).get('architecture', model.name),
        classes=json.dumps(model.classes),
        preprocessing=json.dumps(eval_settings(*model.preprocessing)),
        epoch=str(model.epoch),
        val_acc=str(model.val_acc),
        exported_by=f'torch {torch.__version__}',
    )


def cfg_of(model: trained.TrainedModel) -> dict:
    """timm's configuration of the model; {} where timm's builder did not make it."""
    return getattr(model.model, 'pretrained_cfg', None) or {}


def noise(model: trained.TrainedModel, number: int) -> torch.Tensor:
    """Noise in the range of normalised images, (number, 3, SIZE, SIZE)."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(number, 3, model.img_size, model.img_size, generator=generator)


# ---------------------------------------------------------------------------------------------- formats


def traced(model: trained.TrainedModel) -> torch.export.ExportedProgram:
    """The graph of the model, for any batch size."""
    model.model.requires_grad_(False)
    with torch.no_grad():
        shapes = ({0: torch.export.Dim('batch')},)
        return torch.export.export(model.model, (noise(model, 2),), dynamic_shapes=shapes)


def make_onnx(model: trained.TrainedModel) -> bytes:
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


def load_onnx(path: Path, _model: trained.TrainedModel) -> tuple[Run, dict]:
    import onnx

    props = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    if importlib.util.find_spec('onnxruntime'):
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    else:
        import onnx.reference

        session = onnx.reference.ReferenceEvaluator(str(path))
    return lambda images: torch.from_numpy(session.run(None, dict(images=images.numpy()))[0]), props


def make_pt2(model: trained.TrainedModel) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(traced(model), buffer, extra_files={METADATA: json.dumps(metadata_of(model))})
    return buffer.getvalue()


def load_pt2(path: Path, _model: trained.TrainedModel) -> tuple[Run, dict]:
    extra = {METADATA: ''}
    program = torch.export.load(path, extra_files=extra).module()
    return program, json.loads(extra[METADATA])


def make_safetensors(model: trained.TrainedModel) -> bytes:
    tensors = {name: tensor.contiguous() for name, tensor in model.model.state_dict().items()}
    return safetensors.torch.save(tensors, metadata_of(model))


def load_safetensors(path: Path, model: trained.TrainedModel) -> tuple[Run, dict]:
    again = models.build_model(model.name, len(model.classes), img_size=model.img_size)
    again.load_state_dict(safetensors.torch.load_file(path))
    with safe_open(path, 'pt') as file:
        return again.eval(), file.metadata()


def hub_arguments(model: trained.TrainedModel, license_id: str) -> dict:
    """Arguments of save_for_hf and push_to_hf_hub; sets the preprocessing that timm writes with the model.

    Raises:
        ModelError: timm cannot build the model and load weights into it.
    """
    if not cfg_of(model):
        raise ModelError(
            f"{model.name}: --format hub is for models that timm's build_model_with_cfg makes, because it loads the "
            'weights; safetensors, pt2 and onnx take any model'
        )
    taken = eval_settings(*model.preprocessing)
    size, crop_pct = model.img_size, taken['crop_ratio']
    if int(size / crop_pct) != (short := round(size / crop_pct)):  # timm's floor of it, and ours
        crop_pct = size / (short + 0.25)
    cfg = dict(input_size=(3, size, size), crop_pct=crop_pct, crop_mode='center')
    cfg |= dict(num_classes=len(model.classes), license=license_id)
    cfg |= {key: taken[key] for key in ('interpolation', 'mean', 'std')}
    other = ('pool_size', 'test_input_size', 'test_crop_pct', 'label_names', 'label_offset')
    model.model.pretrained_cfg = {key: value for key, value in cfg_of(model).items() if key not in other} | cfg
    arguments = {**entry_of(model.name).get('args', {}), **size_arguments(model.name, size)}
    return dict(model_config=dict(label_names=model.classes), model_args=arguments, safe_serialization='both')


def load_hub(folder: Path, model: trained.TrainedModel) -> tuple[Run, dict]:
    config = json.loads((folder / 'config.json').read_text())
    models.register(model.name)
    with contextlib.redirect_stderr(io.StringIO()):  # a TwistNet says what it loads
        again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    return again, metadata_of(model) | dict(classes=json.dumps(config['label_names']))


MAKE = dict(onnx=make_onnx, pt2=make_pt2, safetensors=make_safetensors)
LOAD = dict(onnx=load_onnx, pt2=load_pt2, safetensors=load_safetensors, hub=load_hub)


# ---------------------------------------------------------------------------------------------- the check


def check(model: trained.TrainedModel, kind: str, path: Path) -> float:
    """The largest difference of a logit, over TOLERANCE's scale, between the file and the model.

    Raises:
        ModelError: it is above TOLERANCE, or what the file says of the model is not the same.
    """
    worst = 0.0
    run, metadata = LOAD[kind](path, model)
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
