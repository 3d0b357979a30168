"""Features of frozen models, computed once for each model and image and kept in a file, and classifiers on them."""

import argparse
import difflib
import hashlib
import io
import json
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from torch import nn
from tqdm import tqdm

import models
from common import cache, options, runs
from common.distributed import is_quiet, say
from common.errors import DataError, RunError
from common.images import image_bits, stamp
from common.registry import UNSURE
from common.results import recipe_of
from common.splits import Splits
from common.timm_models import import_digest, import_file, own_settings
from common.weights import weights_identity
from training import trained
from training.loader import EvalBatches, eval_images, loader_processes, make_loader, workers_of
from transforms import Preprocessing, eval_settings, eval_view_text, normalize, preprocessing_of, seed_of


class Frozen(NamedTuple):
    """A model that is not trained any further."""

    name: str  # as for models.build_model
    model: nn.Module  # in evaluation mode
    preprocessing: Preprocessing
    pretrained: str  # the weights: a digest of their file, timm's tag, or the run of a checkpoint in words
    weights: str  # a digest of the state dict
    file: Path | None = None  # of the weights, where images of a data set trained them
    config: dict = {}  # config.json beside a checkpoint  # noqa: RUF012
    imported: str | None = None  # a digest of the file of --import

    @property
    def origin(self) -> str:
        """What messages call it."""
        return str(self.file or self.name)


def frozen_models(args: argparse.Namespace) -> list[Frozen]:
    """The models of --checkpoint and --models.

    Args:
        args: imports, checkpoint, models, img_size.

    Raises:
        ModelError: a model or its weights cannot be used. RunError: there is no such model, two have the same name, or
            img_size is not that of a checkpoint.
    """
    import_file(args.imports)
    found = [of_checkpoint(path) for path in args.checkpoint]
    for frozen in found:
        if args.img_size not in (None, own := frozen.preprocessing.img_size):
            raise RunError(f'--img_size {args.img_size}: {frozen.file} is of {own} pixels; leave it out')
    taken = {frozen.name: frozen.file for frozen in found}
    for text in args.models:
        name, _, path = text.partition('=')
        options.check_model(name)
        if name in taken:
            raise RunError(f'{taken[name]} and {text} are both {name} in results; probe them with a --run_dir each')
        taken[name] = text
        found.append(with_weights(name, path or None, args.img_size))
    imported = import_digest(args.imports) if args.imports else None
    return [frozen._replace(imported=imported) for frozen in found]


def with_weights(name: str, path: str | None, img_size: int | None) -> Frozen:
    """A model with its ImageNet weights, or with those of a file; what these lack is random by its name alone.

    Args:
        name: as for models.build_model.
        path: of the file; None for the registered weights.
        img_size: side of the input in pixels; None for the model's own.

    Raises:
        ModelError: there is no such model, or its weights cannot be used.
    """
    source = path or True
    img_size = img_size or own_settings(name, source).get('img_size', options.DEFAULT['img_size'])
    torch.manual_seed(seed_of('probe', name))
    model = models.build_model(name, 2, source, img_size)  # features do not pass its classifier, so a small one
    if model.loaded < 0.5:
        say(f'note: {name}: {model.loaded:.0%} of the parameters are loaded, so its features are mostly random ones')
    preprocessing, file = preprocessing_of(name, img_size, source), trained.trained_file(name, source)
    return Frozen(name, model.eval(), preprocessing, weights_identity(name, source), state_digest(model), file)


def of_checkpoint(path: Path) -> Frozen:
    """The model in the best.pt of a run, as it was evaluated.

    Raises:
        ModelError: it cannot be used. RunError: config.json beside it is damaged.
    """
    subject = trained.load(path)
    config = runs.read_json(path.with_name('config.json')) or {}
    words = 'a run on images that are not recorded'
    if 'defines' in config:  # the same for the checkpoints of all folds of a data set, which one table pools
        defines = config['defines']
        recipe = runs.fingerprint(recipe_of(config))[:8]
        words = f'a run on {defines.get("name") or defines["dataset"]} by recipe {recipe}'
    weights = state_digest(subject.model)
    return Frozen(subject.name, subject.model, subject.preprocessing, words, weights, path, config)


def state_digest(model: nn.Module) -> str:
    """A digest of the weights and buffers that a model computes with."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def folds_of(frozen: Frozen, args: argparse.Namespace, splits: dict[int, Splits]) -> tuple[list[int], str | None]:
    """The folds whose test images did not train a model, and a key of trained.CAUTIONS where that is not so.

    Args:
        frozen: the model.
        args: data_dir, folds and other_images.
        splits: of the folds.

    Raises:
        RunError: there is none, and args.other_images is not set.
    """
    if frozen.file is None:
        return args.folds, None
    known = trained.images_of(frozen.file, args.data_dir)
    if known is None:
        say(f'note: {frozen.file}: {trained.CAUTIONS[trained.UNCHECKED]}')
        return args.folds, trained.UNCHECKED
    seen = {fold: len(trained.common_images(known, splits[fold].test)) for fold in args.folds}
    clean = [fold for fold in args.folds if not seen[fold]]
    if len(clean) == len(args.folds):
        return clean, None
    if args.other_images:
        return args.folds, trained.OTHER
    listed = ', '.join(f'{seen[fold]} of {len(splits[fold].test)} in fold {fold}' for fold in args.folds if seen[fold])
    if not clean:
        raise RunError(
            f'--folds: {frozen.file}: images that are tested may have trained it ({listed}); give a fold that it did '
            'not see, or --other_images, and the results say so'
        )
    say(f'note: {frozen.file}: only {words_of(clean)}: images that others test may have trained it ({listed})')
    return clean, None


def words_of(folds: list[int]) -> str:
    return 'fold' + 's' * (len(folds) > 1) + f' {", ".join(map(str, folds))}'


# ---------------------------------------------------------------------------------------------- one pass


def pooled(output: object, layer: str, channels_last: bool) -> torch.Tensor:
    """The mean over positions of (B, C, H, W), (B, H, W, C) if channels_last, or (B, N, C); a copy of (B, C).

    Raises:
        RunError: `output` is something else.
    """
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if not isinstance(output, torch.Tensor) or not 2 <= output.ndim <= 4:
        raise RunError(f'--layer {layer}: its output, {shape}, is no map to average')
    positions = {2: (), 3: (1,), 4: (1, 2) if channels_last else (2, 3)}[output.ndim]
    return output.mean(positions) if positions else output.clone()


def tap(model: nn.Module, name: str, layer: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of images (B, 3, H, W) that returns features (B, D): those before the classifier, or of a layer.

    Raises:
        RunError: the model has no such layer.
    """
    if layer is None:
        if not (hasattr(model, 'forward_features') and hasattr(model, 'forward_head')):
            some = ', '.join(child for child, _ in model.named_children())
            raise RunError(f'{name}: has no forward_features and forward_head, as timm has; give --layer: {some}')
        return lambda images: model.forward_head(model.forward_features(images), pre_logits=True)
    modules = dict(model.named_modules())
    if not layer or layer not in modules:
        near = difflib.get_close_matches(layer, modules, 4) or [child for child, _ in model.named_children()]
        raise RunError(f"--layer: {name} has no '{layer}'; it has: {', '.join(near)}")
    seen = {}
    channels_last = getattr(model, 'output_fmt', 'NCHW') == 'NHWC'

    def keep(_module, _inputs, output: object) -> None:
        seen.update(features=pooled(output, layer, channels_last))  # now: a later operation may write over it

    modules[layer].register_forward_hook(keep)

    def run(images: torch.Tensor) -> torch.Tensor:
        seen.clear()
        model(images)
        if not seen:
            raise RunError(f'--layer {layer}: the forward pass of {name} does not call it; take the module around it')
        if (rows := len(seen['features'])) != len(images):
            raise RunError(
                f'--layer {layer}: gives {rows} rows for {runs.counted(len(images), "image")} (windows of them, say); '
                'take a module around it'
            )
        return seen['features']

    return run


@torch.inference_mode()
def compute(
    frozen: Frozen,
    layer: str | None,
    items: list[tuple[str, int]],
    bits: int | None,
    device: torch.device,
    workers: int | None,
) -> np.ndarray:
    """The features of images in float32, (N, D).

    Args:
        frozen: the model.
        layer: as for tap.
        items: N pairs of a path and anything.
        bits: of the data set, as for open_image.
        device: where to compute.
        workers: loader processes, at most; None for the default.

    Raises:
        DataError: an image cannot be read. RunError: no such layer, or features that are not finite.
    """
    size, ratio, *statistics = frozen.preprocessing[:4]
    frozen.model.to(device, memory_format=torch.channels_last)
    run = tap(frozen.model, frozen.name, layer)
    batches, rows = EvalBatches(len(items)), []
    asked = min(workers_of(workers, device), len(batches))
    processes = loader_processes(asked, [(len(batches), batches.largest * 3 * size**2)])
    loader = make_loader(eval_images(items, size, None, bits, ratio), batches, processes, device)
    with tqdm(total=len(items), desc=f'{frozen.name} features', disable=is_quiet(), **runs.terminal()) as bar:
        for images, _ in loader:
            rows.append(run(normalize(images.to(device, non_blocking=True), *statistics)).float().cpu().numpy())
            bar.update(len(images))
    features = np.concatenate(rows)
    if not (whole := np.isfinite(features).all(1)).all():
        raise RunError(f'{frozen.name}: the features of {items[whole.argmin()][0]} are not finite')
    return features


# ---------------------------------------------------------------------------------------------- kept


def read_kept(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """What a file of features holds: {path of the image: (stamp, features)}; {} where it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            paths, stamps, rows = (file[key] for key in ('paths', 'stamps', 'features'))
        return {str(image): (str(text), row) for image, text, row in zip(paths, stamps, rows, strict=True)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        print(f'note: {path}: damaged; its features are computed again', file=sys.stderr)
        return {}


def features_of(
    frozen: Frozen,
    layer: str | None,
    items: list[tuple[str, int]],
    folder: Path,
    device: torch.device,
    workers: int | None = None,
) -> dict[str, np.ndarray]:
    """The features of images by path, (D,) float32 each; those that a file in `folder` does not have are computed.

    They are kept by the model, its weights, the layer, the preprocessing and the versions of the libraries, and by the
    path, size and times of the image file.

    Args:
        frozen: the model.
        layer: as for tap.
        items: pairs of a path and anything.
        folder: made if missing.
        device, workers: as for compute.

    Raises:
        As compute; RunError: the file cannot be written.
    """
    bits, notes = image_bits(path for path, _ in items)
    for note in notes:
        say(f'note: {note}')
    view = eval_view_text(*frozen.preprocessing[:2])
    made_by = dict(torch=torch.__version__, timm=timm.__version__, pixels=cache.VERSION)
    key = dict(weights=frozen.weights, layer=layer, view=view, **eval_settings(*frozen.preprocessing), **made_by)
    key |= dict(imported=frozen.imported) if frozen.imported else {}
    path = folder / f'{frozen.name}_{runs.digest(json.dumps(key, sort_keys=True).encode())}.npz'
    try:
        stamps = {image: f'{bits} {stamp(image)}' for image, _ in items}
    except OSError as error:
        raise DataError(f'{error.filename}: cannot be read as an image ({error.strerror})') from error
    kept = read_kept(path)
    if missing := [item for item in items if kept.get(item[0], ('',))[0] != stamps[item[0]]]:
        computed = compute(frozen, layer, missing, bits, device, workers)
        kept |= {image: (stamps[image], row) for (image, _), row in zip(missing, computed, strict=True)}
        buffer = io.BytesIO()
        texts = dict(paths=np.array(list(kept)), stamps=np.array([text for text, _ in kept.values()]))
        np.savez(buffer, **texts, features=np.stack([row for _, row in kept.values()]))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f'{folder}: cannot be made ({error.strerror})') from error
        runs.write_atomic(path, buffer.getvalue())
    return {image: kept[image][1] for image, _ in items}


# ---------------------------------------------------------------------------------------------- classifiers

CLASSIFIERS = {
    'knn': lambda: KNeighborsClassifier(n_neighbors=1),
    'lda': lambda: LinearDiscriminantAnalysis(solver='lsqr', shrinkage='auto'),
    'svm': lambda: SVC(kernel='linear', C=1),
}


def training_images(args: argparse.Namespace, splits: Splits) -> list[tuple[str, int]]:
    return splits.train + (splits.val if args.train_on == 'trainval' else [])


def check_shots(args: argparse.Namespace, splits: Splits, fold: int) -> None:
    """Raise RunError for a class with fewer training images than --shots."""
    counts = np.bincount([label for _, label in training_images(args, splits)], minlength=len(splits.classes))
    if counts.min() < max(args.shots or [1]):
        raise RunError(
            f"--shots {max(args.shots or [1])}: class '{splits.classes[counts.argmin()]}' has "
            f'{runs.counted(int(counts.min()), "training image")} in fold {fold}'
        )


def check_cells(args: argparse.Namespace, splits: dict[int, Splits], cells: list[tuple[int, int]], shots: int | None):
    """Raise RunError for two (fold, seed) of one model that fit and test the same images: they are one result."""
    seen = {}
    for fold, seed in cells:
        fitted = draw(training_images(args, splits[fold]), shots, seed, fold)
        key = frozenset(fitted), frozenset(splits[fold].test)
        if (other := seen.setdefault(key, (fold, seed))) != (fold, seed):
            same = f'fold {other[0]} seed {other[1]} and fold {fold} seed {seed} of {args.dataset}'
            raise RunError(
                f'--train_on {args.train_on}' + f' --shots {shots}' * bool(shots) + f': {same} fit and test the same '
                'images, so they are one result; give one of them' + ', or --train_on train' * (other[0] != fold)
            )


def draw(items: list[tuple[str, int]], shots: int | None, seed: int, fold: int) -> list[tuple[str, int]]:
    """`shots` images a class, at random by seed and fold; more shots add images to those of fewer."""
    if shots is None:
        return items
    order = np.random.default_rng(seed_of('shots', seed, fold)).permutation(len(items))
    drawn = defaultdict(list)
    for index in order:
        drawn[items[index][1]].append(items[index])
    return sorted(item for of_class in drawn.values() for item in of_class[:shots])


def predict(key: str, classifier, features: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """What a fitted classifier predicts, (N,), and the probability of each class, (N, num_classes) float32.

    The latter are NaN for an SVM, which has none, and for 1-NN, whose are 0 and 1.
    """
    if key in UNSURE:
        return classifier.predict(features), np.full((len(features), num_classes), np.nan, np.float32)
    every = np.zeros((len(features), num_classes), np.float32)
    every[:, classifier.classes_] = classifier.predict_proba(features)
    return every.argmax(1), every
