"""A trained model: its checkpoint's weights, classes and preprocessing, and the images that did not train it."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

import models
from common import options, runs
from common.checkpoint import read_checkpoint, read_weights
from common.distributed import AMP_DTYPES, autocast, is_quiet, resolve_amp, say
from common.errors import DataError, ModelError, RunError
from common.images import SYNTHETIC, image_bits
from common.names import composed
from common.options import SplitOptions, split_options
from common.own_data import root_of
from common.registry import DATASETS, dataset_label
from common.splits import Splits, split_digest
from common.timm_models import import_file, problem_of
from common.weights import is_imagenet, weights_source
from datasets import load_labelled, load_splits
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


class Subject(NamedTuple):
    """A trained model and the facts in its checkpoint."""

    path: Path
    name: str  # as for models.build_model
    model: nn.Module  # in evaluation mode, on the CPU
    classes: list[str]
    epoch: int
    val_acc: float  # percent
    preprocessing: Preprocessing  # what its input is

    @property
    def img_size(self) -> int:
        """Side of the square input, pixels."""
        return self.preprocessing.img_size

    @property
    def directional(self) -> bool:
        """Whether its heads have directions: False without a twist, and where its kernels started at random."""
        return all(getattr(block.stci.twist, 'directional', False) for block in blocks_of(self.model).values())

    def view(self, image: Image.Image) -> torch.Tensor:
        """A PIL image as the model sees it: (3, img_size, img_size) uint8."""
        return eval_transform(self.img_size, self.preprocessing.crop_ratio)(image, 0)

    def batch(self, images: Iterable[Image.Image]) -> torch.Tensor:
        """PIL images as the model takes them: (B, 3, img_size, img_size), normalised."""
        return normalize(torch.stack([self.view(image) for image in images]), *self.preprocessing.statistics)

    def probabilities(self, images: torch.Tensor, device: torch.device, amp: str) -> torch.Tensor:
        """Of each class, as engine.evaluate computes them: (B, 3, img_size, img_size) uint8 -> (B, K) float32."""
        images = normalize(images.to(device, non_blocking=True), *self.preprocessing.statistics)
        with autocast(device, amp):
            logits = self.model(images)
        return logits.float().softmax(1)


def load(path: str | Path, imports: str | Path | None = None) -> Subject:
    """The model in the best.pt of a run.

    Args:
        path: of the checkpoint.
        imports: the file that registers the model with timm, if the run was made with --import.

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
    wanted = {'model', 'classes', 'state_dict', 'transform'}
    if not isinstance(checkpoint, dict) or not wanted <= checkpoint.keys():
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
    return Subject(path, name, model.eval(), classes, checkpoint['epoch'], checkpoint['val_acc'], preprocessing)


def bits_for(subjects: list[Subject], paths: Iterable[str]) -> tuple[int | None, list[str]]:
    """The bits by which images of more than eight bits a channel are scaled: as those that trained the models.

    Returns:
        the bits, for images.open_image; those of these images where no checkpoint records any, with notes for the user.

    Raises:
        RunError: the models were trained with different ones.
    """
    first, *others = sorted({s.preprocessing.bits for s in subjects} - {None}) or [None]
    if others:
        raise RunError(f'the models were trained on images of {first} and of {others[0]} bits; --bits chooses')
    return (first, []) if first else image_bits(paths)


def data_of(args: argparse.Namespace, subject: Subject, subset: str | None = None) -> dict:
    """The images to run a model over, checked against the split that its run recorded.

    Args:
        args: dataset, data_dir, lists and fold, each None for the run's own; other_images, to accept images that may
            have trained the model; labels, if there, are names of data sets in figures.
        subject: the model; config.json beside its checkpoint, where there is one, records the data of the run.
        subset: the one to score, or 'all': with other_images, a folder or a list then needs neither all classes nor
            images enough to be divided (see datasets.load_labelled).

    Returns:
        dataset, data_dir and fold; `splits`; `name`, the run's --name or else dataset; `label`, what figures call it;
        `defines` and `tree` of the run's config.json; `caution`, a key of CAUTIONS or None; and `bits`, of bits_for.

    Raises:
        RunError: data set or fold are not known, the classes differ from the model's, or the split is not the run's.
            DataError: the data set cannot be read.
    """
    config = runs.read_json(subject.path.with_name('config.json')) or {}
    made, defines = config.get('options', {}), config.get('defines', {})
    given = {key: getattr(args, key) for key in ('dataset', 'data_dir', 'fold')}
    lists = getattr(args, 'lists', None)
    if lists is None and given['dataset'] == 'lists':
        lists = made.get('lists')
    if given['dataset'] or lists or (given['data_dir'] is not None and made.get('dataset') in (None, 'synthetic')):
        given['dataset'] = options.choose_dataset(given['dataset'], given['data_dir'], SplitOptions(lists))
    same = given['dataset'] in (None, made.get('dataset'))
    own = split_options(made if same else {})
    asked = getattr(args, 'lists', None) is not None and args.lists != made.get('lists')
    own = SplitOptions(lists) if asked else own if lists is None else own._replace(lists=lists)
    found = {key: made.get(key) if value is None and same else value for key, value in given.items()}
    caution = splits = None
    if subset and args.other_images and DATASETS.get(found['dataset'], {}).get('own'):
        splits = load_labelled(found['dataset'], found['data_dir'], own, subject.classes, subset)
    if splits:
        found['fold'] = made.get('fold')  # says which model it is; of the images there is none
    elif missing := [key for key in ('dataset', 'fold') if found[key] is None]:
        of = '' if missing[0] == 'dataset' or not made else f' of {found["dataset"]}'
        raise RunError(f'{subject.path}: no config.json beside it says the {missing[0]}{of}; give --{missing[0]}')
    if found['dataset'] == 'synthetic':
        found['data_dir'] = None
    if not splits and made and same and not asked and found['fold'] != made['fold']:
        caution = check_other_images(args, subject, made, found)  # before reading a fold that may not exist
    splits = splits or load_splits(**found, own=own)
    if splits.classes != [composed(name) for name in subject.classes]:
        where = own.lists or found['data_dir'] or found['dataset']
        raise RunError(
            f'{where}: has other classes than the {len(subject.classes)} that {subject.path} was trained on, '
            f'{subject.classes[0]} to {subject.classes[-1]}; --dataset and --data_dir must name that data set'
        )
    if 'split' not in defines:
        caution = caution or UNCHECKED
    elif defines['split'] != split_digest(splits):
        caution = check_other_images(args, subject, made, found)
    if caution:
        print(f'note: {CAUTIONS[caution]}', file=sys.stderr)
    name = (made.get('name') if same else None) or found['dataset']
    labels = getattr(args, 'labels', {})
    options.check_names('labels', labels, DATASETS | {name: None})
    bits, notes = bits_for([subject], (path for subset in splits[:3] for path, _ in subset))
    for note in notes:
        print(f'note: {note}', file=sys.stderr)
    known = dict(defines=defines, tree=config.get('tree'), caution=caution, bits=bits)
    return found | dict(splits=splits, name=name, label=dataset_label(name, labels)) | known


def check_other_images(args: argparse.Namespace, subject: Subject, made: dict, found: dict) -> str:
    """OTHER, if --other_images accepts images that may have trained the model; otherwise raises what differs.

    Args:
        args: other_images.
        subject: the model.
        made: options of its run.
        found: dataset, data_dir and fold to be read.

    Raises:
        RunError: args.other_images is not set.
    """
    if args.other_images:
        return OTHER
    path, dataset, data_dir = subject.path, found['dataset'], found['data_dir']
    if dataset != made['dataset']:
        differs = f'--dataset {dataset}: {path} was trained on {made["dataset"]}'
        way_out = 'leave --dataset out'
    elif found['fold'] != made['fold'] and getattr(args, 'lists', None) in (None, made.get('lists')):
        differs = f'--fold {found["fold"]}: {path} was trained on fold {made["fold"]}'
        way_out = 'leave --fold out, or give the checkpoint of that fold'
    elif getattr(args, 'lists', None) is not None:
        differs = f'--lists {args.lists}: its images are not those that {path} was trained on'
        way_out = f'give the list of that run ({made["lists"]})'
    elif args.data_dir is not None:
        differs = f'--data_dir {data_dir}: its images or lists are not those that {path} was trained on'
        way_out = f'give the tree of that run ({made["data_dir"]})'
    else:
        differs = f'{data_dir or dataset}: its images or lists have changed since {path} was trained on it'
        way_out = 'put them back as they were, give a copy of that time as --data_dir, or train anew'
        if (stored := path.with_name(runs.SPLIT)).exists():
            root = root_of(made['data_dir'], made.get('lists'))
            way_out += f'; --fold 1 --lists {stored} --data_dir {root} is the split as the run stored it'
    raise RunError(
        f'{differs}, so the split is another one and images of any part of it may have trained the model; {way_out}; '
        '--other_images takes them anyway, and figure and report say so'
    )


# ---------------------------------------------------------------------------------------------- what trained it


def trained_file(name: str, pretrained: bool | str | Path) -> Path | None:
    """The file of the weights that `pretrained` asks for, where they are of a trained classifier.

    That is one which names its classes, or has config.json of a run or of an export beside it. None for ImageNet's
    weights, bare weights, and timm's.

    Raises:
        ModelError: as weights_source, or the file cannot be read.
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

    An image that the run's own test set holds too is not among them. Where the data set has changed since, all its
    images are: each may have trained them.

    Args:
        path: of the file.
        data_dir: where the data set may stand, too.

    Returns:
        None where no run is recorded, or its images are not there.
    """
    config = runs.read_json(path.with_name('config.json')) or {}
    made, recorded, changed = config.get('options', {}), config.get('defines', {}).get('split'), None
    for root in dict.fromkeys((made.get('data_dir'), data_dir)) if recorded else ():
        try:
            splits = load_splits(made['dataset'], root, made['fold'], split_options(made))
        except (DataError, RunError):
            continue
        if split_digest(splits) == recorded:
            return _digests(splits.train + splits.val) - _digests(splits.test)
        if root == made.get('data_dir'):
            changed = _digests([item for subset in splits[:3] for item in subset])
    return changed


def common_images(known: set[str], items: list[tuple[str, int]]) -> list[str]:
    """The paths among `items` of images whose digest is known."""
    return [path for path, _ in items if _content(path) in known]


def _digests(items: list[tuple[str, int]]) -> set[str]:
    return {_content(path) for path, _ in items}


def _content(path: str) -> str:
    """A digest of the file at a path of a split; the path of a drawn image."""
    return path if path.startswith(SYNTHETIC) else runs.digest(Path(path).read_bytes())


def seen_before(args: argparse.Namespace, splits: Splits) -> dict:
    """What results.json records of a fold whose images may have trained the initial weights; says so. {} without.

    Args:
        args: model, pretrained and data_dir.
        splits: the fold.

    Returns:
        `caution`, and `seen`: how many images that validate and that test are among those that trained the weights.
    """
    if (file := trained_file(args.model, args.pretrained) if args.pretrained else None) is None:
        return {}
    if (known := images_of(file, args.data_dir)) is None:
        say(f'note: {file}: {CAUTIONS[UNCHECKED]}')
        return dict(caution=UNCHECKED)
    seen = {subset: len(common_images(known, getattr(splits, subset))) for subset in ('val', 'test')}
    if not any(seen.values()):
        return {}
    counts = ' and '.join(f'{count} of {len(getattr(splits, subset))} of {subset}' for subset, count in seen.items())
    say(f'note: {file}: images of this fold may have trained it ({counts}); the results say so')
    return dict(caution=SEEN, seen=seen)


# ---------------------------------------------------------------------------------------------- predictions


class Views:
    """What models see of items, for make_loader; one that cannot be read is black, and the error stands beside it.

    Args:
        items: of any kind.
        read: the PIL image of an item; raises DataError.
        transforms: of each model, called as transform(image, key).
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


def precision_of(subject: Subject, amp: str, device: torch.device) -> str:
    """--amp resolved: 'auto' is the precision of the run, where config.json beside the checkpoint has it for a device
    of this kind, so that the logits are the run's own; otherwise as for a new run."""
    made = (runs.read_json(subject.path.with_name('config.json')) or {}).get('options', {})
    if amp == 'auto' and made.get('device') == device.type and made.get('amp') in AMP_DTYPES:
        return made['amp']
    return resolve_amp(amp, device)


@torch.inference_mode()
def predict(
    subjects: list[Subject],
    items: Sequence,
    read: Callable[..., Image.Image],
    args: argparse.Namespace,
    device: torch.device,
    what: str,
    signals: Sequence[int] | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """The probabilities of the classes, averaged over models; an item that cannot be read is named on stderr.

    Args:
        subjects: models of the same classes; each sees an item in its own size.
        items: N of them.
        read: the PIL image of an item; raises DataError.
        args: amp, batch_size and num_workers.
        device: where to compute.
        what: the words before the progress bar.
        signals: of distributed.noted_signals; once there is one, the items that follow are left out.

    Returns:
        (N, K) float32, or fewer rows after a signal; and the errors by the index of the item, whose row is NaN.

    Raises:
        RunError: a model gives something that is not a number.
    """
    views = Views(items, read, [eval_transform(s.img_size, s.preprocessing.crop_ratio) for s in subjects])
    batches = EvalBatches(len(views), batch_size=args.batch_size)
    size = batches.largest * sum(3 * subject.img_size**2 for subject in subjects)  # bytes
    asked = min(workers_of(args.num_workers, device), len(batches))
    processes = loader_processes(asked, [(len(batches), size)])
    loader = make_loader(views, batches, processes, device, ignore_signals=signals is not None)
    precisions = [precision_of(subject, args.amp, device) for subject in subjects]
    for subject in subjects:
        subject.model.to(device, memory_format=torch.channels_last)  # as it was trained
    means, errors = [], {}
    with tqdm(total=len(views), desc=what, disable=is_quiet(), **runs.terminal()) as bar:
        for slot, (inputs, messages) in zip(batches.slots, loader):
            found = [s.probabilities(x, device, amp) for s, x, amp in zip(subjects, inputs, precisions)]
            mean = torch.stack(found).mean(0).cpu().numpy()
            if not np.isfinite(mean).all():
                raise RunError(f'{subjects[0].path}: gives probabilities that are not finite; try --amp off')
            for place, message in enumerate(messages):
                if message:
                    mean[place], errors[slot * args.batch_size + place] = np.nan, message
                    say(f'left out: {message}')
            means.append(mean)
            bar.update(len(mean))
            if signals:
                break
    return np.concatenate(means), errors
