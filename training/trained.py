"""A trained model: its checkpoint's weights, classes and preprocessing, and the images that did not train it."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import models
from common import options, runs
from common.checkpoint import read_checkpoint, read_weights
from common.distributed import AMP_DTYPES, autocast, is_quiet, resolve_amp, say
from common.errors import DataError, ModelError, RunError
from common.images import SYNTHETIC, image_bits
from common.names import composed
from common.options import SplitOptions, split_options
from common.registry import DATASETS, dataset_label
from common.splits import Splits, split_digest
from common.statistics import calibrate
from common.timm_models import import_file, problem_of
from common.weights import is_imagenet, weights_source
from datasets import load_labelled, load_splits, splits_of
from models import blocks_of
from training.loader import EvalBatches, loader_processes, make_loader, workers_of
from transforms import Preprocessing, eval_transform, normalize, read_settings

# Where images are not known to be held out, figures and reports say so: in the title, and in a sentence.
OTHER = 'images that may have trained the model'
UNCHECKED = 'images not checked against those that trained the model'
SEEN = 'images that validate or test may have trained the weights it started from'
CAUTIONS = {
    OTHER: 'The split is not the one that the run recorded: its test or validation images may have trained the model.',
    UNCHECKED: 'No config.json beside the checkpoint records the split of the run, or its images are gone: it is not '
    'checked that these images did not train the model.',
}


class TrainedModel(NamedTuple):
    """A trained model and the facts in its checkpoint."""

    path: Path
    name: str  # as for models.build_model
    model: nn.Module  # in evaluation mode, on the CPU
    classes: list[str]
    epoch: int
    val_acc: float | None  # percent; None where no image validated: --train_on trainval
    preprocessing: Preprocessing  # what its input is
    temperature: float | None = None  # of calibrated probabilities, softmax(logits / temperature); None: not fitted

    @property
    def img_size(self) -> int:
        """Side of the square input, pixels."""
        return self.preprocessing.img_size

    @property
    def config(self) -> dict:
        """config.json of its run, which stands beside the checkpoint; {} without one."""
        return runs.read_json(self.path.with_name('config.json')) or {}

    @property
    def directional(self) -> bool:
        """Whether its heads have directions: False without a twist, and where its kernels started at random."""
        return all(getattr(block.stci.twist, 'directional', False) for block in blocks_of(self.model).values())

    def view(self, image: Image.Image) -> torch.Tensor:
        """A PIL image as the model sees it: (3, img_size, img_size) uint8."""
        return eval_transform(*self.preprocessing.view)(image)

    def batch(self, images: Iterable[Image.Image]) -> torch.Tensor:
        """PIL images as the model takes them: (B, 3, img_size, img_size), normalised."""
        return normalize(torch.stack([self.view(image) for image in images]), *self.preprocessing.statistics)

    def logits(self, images: torch.Tensor, device: torch.device, amp: str) -> torch.Tensor:
        """As engine.evaluate computes them: (B, 3, img_size, img_size) uint8 -> (B, K)."""
        images = normalize(images.to(device, non_blocking=True), *self.preprocessing.statistics)
        with autocast(device, amp):
            return self.model(images)

    def probabilities(self, logits: torch.Tensor) -> np.ndarray:
        """Of each class, calibrated if there is a temperature: logits (B, K) -> (B, K)."""
        return calibrate(logits.float().softmax(1).cpu().numpy(), self.temperature)


def epoch_text(epoch: int, val_acc: float | None) -> str:
    """'epoch 7, validation accuracy 62.5 %'; of a run on train and val 'epoch 10, the last'."""
    return f'epoch {epoch}, ' + ('the last' if val_acc is None else f'validation accuracy {val_acc:.1f} %')


def load(path: str | Path, imports: str | Path | None = None) -> TrainedModel:
    """The model in the best.pt of a run; `imports` is the file of --import, if the run was made with one.

    Raises:
        ModelError: there is no such file, or it is no best.pt of train.py.
    """
    path = Path(path)
    if path.is_dir():
        raise ModelError(f'{path}: is a folder; give the best.pt in it')
    try:
        checkpoint = read_checkpoint(path)
    except FileNotFoundError as error:
        raise ModelError(f'{path}: no such checkpoint; train.py writes one, best.pt, into its run folder') from error
    if not isinstance(checkpoint, dict) or not {'model', 'classes', 'state_dict', 'transform'} <= checkpoint.keys():
        raise ModelError(f'{path}: is no best.pt of train.py')
    name, classes = checkpoint['model'], checkpoint['classes']
    preprocessing = read_settings(checkpoint['transform'])
    import_file(imports)
    if problem := problem_of(name):
        raise ModelError(f'{path}: {problem}')
    model = models.build_model(name, len(classes), img_size=preprocessing.img_size)
    try:
        model.load_state_dict(checkpoint['state_dict'])
    except RuntimeError as error:
        raise ModelError(f'{path}: its tensors are not those of {name}') from error
    facts = checkpoint['epoch'], checkpoint['val_acc'], preprocessing, checkpoint.get('temperature')
    return TrainedModel(path, name, model.eval(), classes, *facts)


# ---------------------------------------------------------------------------------------------- images for it


class EvaluationData(NamedTuple):
    """Images to run a model over."""

    splits: Splits
    name: str  # --name of the run, or else dataset
    label: str  # the same in figures
    caution: str | None  # a key of CAUTIONS, where the images may have trained the model
    bits: int | None  # of bits_for


def data_of(args: argparse.Namespace, model: TrainedModel, subset: str | None = None) -> EvaluationData:
    """The images to run a model over, checked against the split that its run recorded.

    Args:
        args: dataset, data_dir, lists and fold, each None for the run's own; other_images, to accept images that may
            have trained the model; labels, if there, are names of data sets in figures.
        subset: the one to score, or 'all': with other_images, a folder or a list then needs neither all classes nor
            images enough to be divided (see datasets.load_labelled).
    """
    config = model.config
    made = config.get('options', {})
    lists = made.get('lists') if args.lists is None and args.dataset == 'lists' else args.lists
    if args.dataset or lists or (args.data_dir is not None and made.get('dataset') in (None, 'synthetic')):
        dataset = options.choose_dataset(args.dataset, args.data_dir, SplitOptions(lists))
    else:
        dataset = made.get('dataset')
    if dataset is None:
        raise RunError(f'{model.path}: no config.json beside it says the dataset; give --dataset')
    own = made if dataset == made.get('dataset') else {}  # options of the run that hold for these images too
    data_dir = own.get('data_dir') if args.data_dir is None else args.data_dir
    fold = own.get('fold') if args.fold is None else args.fold
    division = SplitOptions(args.lists) if args.lists not in (None, made.get('lists')) else split_options(own)

    splits = None
    if subset and args.other_images and DATASETS.get(dataset, {}).get('own'):
        splits = load_labelled(dataset, data_dir, division, model.classes, subset)
    if splits:
        splits = splits._replace(fold=made.get('fold'))  # says which model it is; the images have none
    elif fold is None:
        raise RunError(f'{model.path}: no config.json beside it says the fold of {dataset}; give --fold')
    else:
        splits = load_splits(dataset, data_dir, fold, division)
    if splits.classes != [composed(name) for name in model.classes]:
        raise RunError(
            f'{division.lists or data_dir or dataset}: has other classes than the {len(model.classes)} that '
            f'{model.path} was trained on, {model.classes[0]} to {model.classes[-1]}; --dataset and --data_dir must '
            'name that data set'
        )

    caution, recorded = None, config.get('defines', {}).get('split')
    if recorded is None:
        caution = UNCHECKED
    elif split_digest(splits) != recorded:
        if not args.other_images:
            raise other_split(args, model.path, made, splits.root)
        caution = OTHER
    elif model.val_acc is None:  # of a run on train and val
        splits = splits.joined()
        if 'val' in (subset, getattr(args, 'subset', None)):
            raise RunError(f'--subset val: these images trained {model.path} (--train_on trainval): they are of train')
    if caution:
        say(f'note: {CAUTIONS[caution]}')

    name, labels = own.get('name') or dataset, getattr(args, 'labels', {})
    options.check_names('labels', labels, DATASETS | {name: None})
    bits = bits_for([model], (path for items in splits[:3] for path, _ in items))
    return EvaluationData(splits, name, dataset_label(name, labels), caution, bits)


def other_split(args: argparse.Namespace, path: Path, made: dict, root: Path) -> RunError:
    """The error of images below root, divided in another way than those of the run, whose options are `made`."""
    keys = ('dataset', 'lists', 'data_dir', 'fold')
    given = [f'--{key} {getattr(args, key)}' for key in keys if getattr(args, key) not in (None, made.get(key))]
    place = made.get('lists') or made.get('data_dir') or made['dataset']
    if given:
        of_run = f'fold {made["fold"]} of {made["dataset"]} ({place})'
        differs = f'{" ".join(given)}: its images or lists are others: {path} was trained on {of_run}'
        way_out = 'leave these options out'
    else:
        differs = f'{place}: its images or lists have changed since {path} was trained on it'
        way_out = 'put them back as they were'
        if (stored := path.with_name(runs.SPLIT)).exists():
            way_out += f'; --fold 1 --lists {stored} --data_dir {root} is the split as the run stored it'
    return RunError(
        f'{differs}, so any image of this split may have trained the model; {way_out}; --other_images takes them '
        'anyway, and figure and report say so'
    )


def bits_for(models: list[TrainedModel], paths: Iterable[str]) -> int | None:
    """The bits by which images of more than eight bits a channel are scaled: as those that trained the models.

    Where no checkpoint records any, those of these images (see images.image_bits), with a note.
    """
    first, *others = sorted({model.preprocessing.bits for model in models} - {None}) or [None]
    if others:
        raise RunError(f'the models were trained on images of {first} and of {others[0]} bits; --bits chooses')
    if first is None:
        first, notes = image_bits(paths)
        for note in notes:
            say(f'note: {note}; the checkpoint records none')
    return first


# ---------------------------------------------------------------------------------------------- what trained it


def trained_file(name: str, pretrained: bool | str | Path) -> Path | None:
    """The file of the weights that `pretrained` asks for, where they are of a trained classifier.

    That is one which names its classes, or has config.json of a run or of an export beside it. None for ImageNet's
    weights, bare weights, and timm's.
    """
    path = weights_source(name, pretrained)
    if not isinstance(path, Path) or is_imagenet(path):
        return None
    config = runs.read_json(path.with_name('config.json')) or {}
    if 'defines' in config or 'label_names' in config:
        return path
    saved = read_weights(path)
    return path if isinstance(saved, dict) and isinstance(saved.get('classes'), list) else None


def images_of(path: Path, data_dir: str | None) -> set[str] | None:
    """Digests of the images that trained or validated the weights in a file, by config.json of a run beside it.

    The data set is looked for where it was, and in `data_dir`. An image that the run's own test set holds too is not
    among them. Where the data set has changed since, all its images are: each may have trained them. None where no run
    is recorded, or its images are not there.
    """
    config = runs.read_json(path.with_name('config.json')) or {}
    made, recorded = config.get('options', {}), config.get('defines', {}).get('split')
    if recorded is None:
        return None
    changed = None
    for root in dict.fromkeys((made.get('data_dir'), data_dir)):
        try:
            splits = splits_of(made, data_dir=root)
        except (DataError, RunError):  # not there
            continue
        train, val, test = ({content_of(path) for path, _ in items} for items in splits[:3])
        if split_digest(splits) == recorded:
            return (train | val) - test
        if root == made.get('data_dir'):
            changed = train | val | test
    return changed


def count_seen(known: set[str], items: list[tuple[str, int]]) -> int:
    """How many of the images of `items` are among those whose digests are known."""
    return sum(content_of(path) in known for path, _ in items)


def content_of(path: str) -> str:
    """A digest of the file at a path of a split; the path of a drawn image."""
    return path if path.startswith(SYNTHETIC) else runs.digest(Path(path).read_bytes())


def seen_before(args: argparse.Namespace, splits: Splits) -> dict:
    """What results.json records of a fold whose images may have trained the initial weights; says so. {} without.

    That is `caution`, and `seen`: how many images that validate and that test are among those that trained the
    weights. `args` has model, pretrained and data_dir.
    """
    if (file := trained_file(args.model, args.pretrained) if args.pretrained else None) is None:
        return {}
    if (known := images_of(file, args.data_dir)) is None:
        say(f'note: {file}: {CAUTIONS[UNCHECKED]}')
        return dict(caution=UNCHECKED)
    seen = dict(val=count_seen(known, splits.val), test=count_seen(known, splits.test))
    if not any(seen.values()):
        return {}
    counts = f'{seen["val"]} of {len(splits.val)} of val and {seen["test"]} of {len(splits.test)} of test'
    say(f'note: {file}: images of this fold may have trained it ({counts}); the results say so')
    return dict(caution=SEEN, seen=seen)


# ---------------------------------------------------------------------------------------------- predictions


class Views:
    """What models see of items, for make_loader; one that cannot be read is black, and the error stands beside it.

    `read` makes the PIL image of an item, or raises DataError; `transforms` has one for each model.
    """

    def __init__(self, items: Sequence, read: Callable[..., Image.Image], transforms: list[Callable]):
        self.items, self.read, self.transforms = items, read, transforms

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[list[torch.Tensor], str]:
        try:
            image, error = self.read(self.items[i]), ''
        except DataError as caught:
            image, error = Image.new('RGB', (8, 8)), str(caught)
        return [transform(image, i) for transform in self.transforms], error


def inference_loader(
    data: Dataset, batches: EvalBatches, size: int, workers: int | None, device: torch.device, ignore_signals=False
) -> DataLoader:
    """A loader for one pass over images of `size` bytes; of --num_workers no more start than there are batches."""
    asked = min(workers_of(workers, device), len(batches))
    processes = loader_processes(asked, [(len(batches), batches.largest * size)])
    return make_loader(data, batches, processes, device, ignore_signals)


def precision_of(model: TrainedModel, amp: str, device: torch.device) -> str:
    """--amp resolved; 'auto' on a device of the run's kind is the run's precision, so that logits are the run's own."""
    made = model.config.get('options', {})
    if amp == 'auto' and made.get('device') == device.type and made.get('amp') in AMP_DTYPES:
        return made['amp']
    return resolve_amp(amp, device)


def fused(model: nn.Module, name: str, img_size: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """models.fuse on the CPU, for square images of this side; says where it changes nothing."""
    noise = torch.randn(1, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))
    found = models.fuse(model, noise, dtype)
    if found is model:
        say(f'note: {name}: runs as it is, because its fused logits would differ by more than 1e-5')
    return found


@torch.inference_mode()
def predict(
    models: list[TrainedModel],
    items: Sequence,
    read: Callable[..., Image.Image],
    args: argparse.Namespace,
    device: torch.device,
    what: str,
    signals: Sequence[int] | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """The probabilities of the classes, each model's at its temperature, averaged over models.

    An item that cannot be read is named on stderr.

    Args:
        models: of the same classes; each sees an item in its own size.
        items, read: read(item) is its PIL image, or raises DataError.
        args: amp, batch_size, num_workers and fuse.
        what: the words before the progress bar.
        signals: of distributed.noted_signals; once there is one, the items that follow are left out.

    Returns:
        (N, K) float32, or fewer rows after a signal; and the errors by the index of the item, whose row is NaN.
    """
    views = Views(items, read, [eval_transform(*model.preprocessing.view) for model in models])
    batches = EvalBatches(len(views), batch_size=args.batch_size)
    size = sum(3 * model.img_size**2 for model in models)
    loader = inference_loader(views, batches, size, args.num_workers, device, ignore_signals=signals is not None)
    precisions = [precision_of(model, args.amp, device) for model in models]
    if args.fuse:
        dtypes = [AMP_DTYPES[amp] for amp in precisions]
        models = [m._replace(model=fused(m.model, m.name, m.img_size, dtype)) for m, dtype in zip(models, dtypes)]
    for model in models:
        model.model.to(device, memory_format=torch.channels_last)  # as it was trained
    means, errors = [], {}
    with tqdm(total=len(views), desc=what, disable=is_quiet(), **runs.terminal()) as bar:
        for slot, (inputs, messages) in zip(batches.slots, loader):
            found = [m.probabilities(m.logits(x, device, amp)) for m, x, amp in zip(models, inputs, precisions)]
            mean = np.mean(found, axis=0).astype(np.float32)
            if not np.isfinite(mean).all():
                raise RunError(f'{models[0].path}: gives probabilities that are not finite; try --amp off')
            for place, message in enumerate(messages):
                if message:
                    mean[place], errors[slot * args.batch_size + place] = np.nan, message
                    say(f'left out: {message}')
            means.append(mean)
            bar.update(len(mean))
            if signals:
                break
    return np.concatenate(means), errors
