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
from common.checkpoint import read_checkpoint
from common.distributed import AMP_DTYPES, autocast, is_quiet, resolve_amp, say
from common.errors import DataError, ModelError, RunError
from common.options import SplitOptions, split_options
from common.own_data import root_of
from common.registry import DATASETS, dataset_label
from common.splits import split_digest
from common.timm_models import import_file, problem_of
from datasets import load_splits
from loader import EvalBatches, loader_processes, make_loader, workers_of
from models import blocks_of
from transforms import Preprocessing, eval_transform, normalize, read_settings

# Where images are not known to be held out, figures and reports say so: in the title, and in a sentence.
OTHER = 'images that may have trained the model'
UNCHECKED = 'images not checked against those that trained the model'
CAUTIONS = {
    OTHER: 'The split is not the one that the run recorded: its test or validation images may have trained the model.',
    UNCHECKED: 'No config.json beside the checkpoint records the split of the run, so it is not checked that these '
    'images did not train the model.',
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
        """Of each class, as train.evaluate computes them: (B, 3, img_size, img_size) uint8 -> (B, K) float32."""
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


def data_of(args: argparse.Namespace, subject: Subject) -> dict:
    """The images to run a model over, checked against the split that its run recorded.

    Args:
        args: dataset, data_dir, lists and fold, each None for the run's own; other_images, to accept images that may
            have trained the model; labels, if there, are names of data sets in figures.
        subject: the model; config.json beside its checkpoint, where there is one, records the data of the run.

    Returns:
        dataset, data_dir and fold; `splits`; `name`, the run's --name or else dataset; `label`, what figures call it;
        `defines` and `tree` of the run's config.json; and `caution`, a key of CAUTIONS or None.

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
    if missing := [key for key in ('dataset', 'fold') if found[key] is None]:
        of = '' if missing[0] == 'dataset' or not made else f' of {found["dataset"]}'
        raise RunError(f'{subject.path}: no config.json beside it says the {missing[0]}{of}; give --{missing[0]}')
    if found['dataset'] == 'synthetic':
        found['data_dir'] = None
    caution = None
    if made and same and not asked and found['fold'] != made['fold']:
        caution = check_other_images(args, subject, made, found)  # before reading a fold that may not exist
    splits = load_splits(**found, own=own)
    if splits.classes != subject.classes:
        where, has = (
            own.lists or found['data_dir'] or found['dataset'],
            f'the {len(subject.classes)} that {subject.path}',
        )
        raise RunError(
            f'{where}: has other classes than {has} was trained on, {subject.classes[0]} to {subject.classes[-1]}; '
            '--dataset and --data_dir must name that data set'
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
    known = dict(defines=defines, tree=config.get('tree'), caution=caution)
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
) -> tuple[np.ndarray, dict[int, str]]:
    """The probabilities of the classes, averaged over models; an item that cannot be read is named on stderr.

    Args:
        subjects: models of the same classes; each sees an item in its own size.
        items: N of them.
        read: the PIL image of an item; raises DataError.
        args: amp, batch_size and num_workers.
        device: where to compute.
        what: the words before the progress bar.

    Returns:
        (N, K) float32, and the errors by the index of the item, whose row is NaN.

    Raises:
        RunError: a model gives something that is not a number.
    """
    views = Views(items, read, [eval_transform(s.img_size, s.preprocessing.crop_ratio) for s in subjects])
    batches = EvalBatches(len(views), batch_size=args.batch_size)
    size = batches.largest * sum(3 * subject.img_size**2 for subject in subjects)  # bytes
    asked = min(workers_of(args.num_workers, device), len(batches))
    loader = make_loader(views, batches, loader_processes(asked, [(len(batches), size)]), device)
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
    return np.concatenate(means), errors
