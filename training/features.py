"""Features of frozen models, computed once for each model and image and kept in a file."""

import argparse
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from torch import nn
from tqdm import tqdm

import models
from common import cache, options, runs
from common.distributed import is_quiet, say
from common.errors import RunError
from common.images import image_bits, stamp
from common.results import recipe_of
from common.timm_models import import_digest, import_file, own_settings
from common.weights import weights_identity
from training import trained
from training.loader import EvalBatches, eval_images
from transforms import Preprocessing, eval_settings, eval_view_text, normalize, preprocessing_of, seed_of

Items = list[tuple[str, int]]  # paths of images and their classes


class FrozenBackbone(NamedTuple):
    """A model that is not trained any further."""

    name: str  # as for models.build_model
    model: nn.Module  # in evaluation mode
    preprocessing: Preprocessing
    pretrained: str  # the weights: a digest of their file, timm's tag, or the run of a checkpoint in words
    weights: str  # a digest of the state dict
    file: Path | None = None  # of the weights, where images of a data set trained them
    seed: int = 42  # of the run that trained them
    imported: str | None = None  # a digest of the file of --import

    @property
    def origin(self) -> str:
        """What messages call it."""
        return str(self.file or self.name)


def frozen_backbones(args: argparse.Namespace) -> list[FrozenBackbone]:
    """The models of args.checkpoint and args.models."""
    import_file(args.imports)
    found = [of_checkpoint(path) for path in args.checkpoint]
    for frozen in found:
        if args.img_size not in (None, size := frozen.preprocessing.img_size):
            raise RunError(f'--img_size {args.img_size}: {frozen.file} is of {size} pixels; leave it out')
        if args.resize not in (None, made := frozen.preprocessing.resize):
            raise RunError(f'--resize {args.resize}: {frozen.file} was trained with {made}; leave it out')
    for text in args.models:
        name, _, path = text.partition('=')
        options.check_model(name)
        found.append(with_weights(name, path or True, args.img_size, args.resize or 'crop'))
    imported = import_digest(args.imports) if args.imports else None
    found = [frozen._replace(imported=imported) for frozen in found]
    return [with_fused(frozen) for frozen in found] if args.fuse else found


def with_fused(frozen: FrozenBackbone) -> FrozenBackbone:
    """The model fused; with other weights it has other features and results."""
    model = trained.fused(frozen.model, frozen.origin, frozen.preprocessing.img_size)
    return frozen._replace(model=model, weights=state_digest(model))


def with_weights(name: str, source: str | bool, img_size: int | None, resize: str = 'crop') -> FrozenBackbone:
    """A model with the weights of a file, or of ImageNet (True); what these lack is random by its name alone.

    Without img_size its input is the model's own.
    """
    img_size = img_size or own_settings(name, source).get('img_size', options.DEFAULT['img_size'])
    torch.manual_seed(seed_of('probe', name))
    model = models.build_model(name, 2, source, img_size)  # features do not pass its classifier, so a small one
    if model.loaded < 0.5:
        say(f'note: {name}: {model.loaded:.0%} of the parameters are loaded, so its features are mostly random ones')
    preprocessing = preprocessing_of(name, img_size, source)._replace(resize=resize)
    file = trained.trained_file(name, source)
    return FrozenBackbone(name, model.eval(), preprocessing, weights_identity(name, source), state_digest(model), file)


def of_checkpoint(path: Path) -> FrozenBackbone:
    """The model in the best.pt of a run, as it was evaluated."""
    model = trained.load(path)
    config, words = model.config, 'a run on images that are not recorded'
    if defines := config.get('defines'):  # the same for the checkpoints of all folds of a data set, which a table pools
        recipe = runs.fingerprint(recipe_of(config))[:8]
        words = f'a run on {defines.get("name") or defines["dataset"]} by recipe {recipe}'
    seed = config.get('options', {}).get('seed', 42)
    return FrozenBackbone(model.name, model.model, model.preprocessing, words, state_digest(model.model), path, seed)


def state_digest(model: nn.Module) -> str:
    """A digest of the weights and buffers that a model computes with."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- one pass


def pooled(output: torch.Tensor, layer: str, channels_last: bool) -> torch.Tensor:
    """The mean over positions of (B, C, H, W), (B, H, W, C) if channels_last, or (B, N, C); a copy of (B, C)."""
    positions = {2: (), 3: (1,), 4: (1, 2) if channels_last else (2, 3)}.get(getattr(output, 'ndim', None))
    if positions is None:
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise RunError(f'--layer {layer}: its output, {shape}, is no map to average')
    return output.mean(positions) if positions else output.clone()


def tap(model: nn.Module, name: str, layer: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of images (B, 3, H, W) that returns features (B, D): those before the classifier, or of a layer."""
    children = ', '.join(child for child, _ in model.named_children())
    if layer is None:
        if not (hasattr(model, 'forward_features') and hasattr(model, 'forward_head')):
            raise RunError(f'{name}: has no forward_features and forward_head, as timm has; give --layer: {children}')
        return lambda images: model.forward_head(model.forward_features(images), pre_logits=True)
    modules, seen = dict(model.named_modules()), {}
    if not layer or layer not in modules:
        raise RunError(f"--layer: {name} has no '{layer}'; it has: {children}, and what these hold, as in layer4.1")
    channels_last = getattr(model, 'output_fmt', 'NCHW') == 'NHWC'

    def keep(_module, _inputs, output: torch.Tensor) -> None:
        seen.update(features=pooled(output, layer, channels_last))  # now: a later operation may write over it

    modules[layer].register_forward_hook(keep)

    def run(images: torch.Tensor) -> torch.Tensor:
        seen.clear()
        model(images)
        rows = seen.get('features', ())
        if len(rows) != len(images):  # a part that forward() does not call by itself, or one that sees windows
            raise RunError(
                f'--layer {layer}: {name} makes {len(rows)} rows there for {runs.counted(len(images), "image")}; take '
                'the module around it'
            )
        return rows

    return run


@torch.inference_mode()
def compute(
    frozen: FrozenBackbone, layer: str | None, items: Items, bits: int | None, device: torch.device, workers: int | None
) -> np.ndarray:
    """The features of N images in float32, (N, D). `bits` is that of open_image, `workers` that of --num_workers."""
    preprocessing = frozen.preprocessing._replace(bits=bits)
    frozen.model.to(device, memory_format=torch.channels_last)
    run = tap(frozen.model, frozen.name, layer)
    images, image = eval_images(items, preprocessing, None), 3 * preprocessing.img_size**2
    loader = trained.inference_loader(images, EvalBatches(len(items)), image, workers, device)
    rows = []
    with tqdm(total=len(items), desc=f'{frozen.name} features', disable=is_quiet(), **runs.terminal()) as bar:
        for batch, _ in loader:
            batch = normalize(batch.to(device, non_blocking=True), *preprocessing.statistics)
            rows.append(run(batch).float().cpu().numpy())
            bar.update(len(batch))
    features = np.concatenate(rows)
    if not (whole := np.isfinite(features).all(1)).all():
        raise RunError(f'{frozen.name}: the features of {items[whole.argmin()][0]} are not finite')
    return features


# ---------------------------------------------------------------------------------------------- kept


def read_kept(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """What a file of features holds: {path of the image: (stamp, features)}; {} where there is none."""
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as file:
        paths, stamps, rows = (file[key] for key in ('paths', 'stamps', 'features'))
    return {str(image): (str(text), row) for image, text, row in zip(paths, stamps, rows, strict=True)}


def write_kept(path: Path, kept: dict[str, tuple[str, np.ndarray]]) -> None:
    stamps, rows = zip(*kept.values(), strict=True)
    buffer = io.BytesIO()
    np.savez(buffer, paths=np.array(list(kept)), stamps=np.array(stamps), features=np.stack(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_atomic(path, buffer.getvalue())


def features_of(
    frozen: FrozenBackbone,
    layer: str | None,
    items: Items,
    folder: Path,
    device: torch.device,
    workers: int | None = None,
) -> dict[str, np.ndarray]:
    """The features of images by path, (D,) float32 each; those that a file in `folder` does not have are computed.

    They are kept by the model, its weights, the layer, the preprocessing and the versions of the libraries, and by the
    path, size and times of the image file.
    """
    bits, notes = image_bits(path for path, _ in items)
    for note in notes:
        say(f'note: {note}')
    view = eval_view_text(frozen.preprocessing)
    made_by = dict(torch=torch.__version__, timm=timm.__version__, pixels=cache.VERSION)
    key = dict(weights=frozen.weights, layer=layer, view=view, **eval_settings(*frozen.preprocessing), **made_by)
    key |= dict(imported=frozen.imported) if frozen.imported else {}
    path = folder / f'{frozen.name}_{runs.digest(json.dumps(key, sort_keys=True).encode())}.npz'
    stamps = {image: f'{bits} {stamp(image)}' for image, _ in items}
    kept = read_kept(path)
    if missing := [item for item in items if kept.get(item[0], ('',))[0] != stamps[item[0]]]:
        computed = compute(frozen, layer, missing, bits, device, workers)
        kept |= {image: (stamps[image], row) for (image, _), row in zip(missing, computed, strict=True)}
        write_kept(path, kept)
    return {image: kept[image][1] for image, _ in items}
