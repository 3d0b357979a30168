"""A trained model: its checkpoint's weights, classes and preprocessing, and the images that did not train it."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import nn

import models
from common import options, runs
from common.checkpoint import read_checkpoint
from common.errors import ModelError, RunError
from common.splits import split_digest
from common.timm_models import import_file, problem_of
from datasets import load_splits
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
        args: dataset, data_dir and fold, each None for the run's own; other_images, to accept images that may have
            trained the model.
        subject: the model; config.json beside its checkpoint, where there is one, records the data of the run.

    Returns:
        dataset, data_dir and fold; `splits`; `defines` of the run's config.json; and `caution`, a key of CAUTIONS or
        None.

    Raises:
        RunError: data set or fold are not known, the classes differ from the model's, or the split is not the run's.
            DataError: the data set cannot be read.
    """
    config = runs.read_json(subject.path.with_name('config.json')) or {}
    made, defines = config.get('options', {}), config.get('defines', {})
    given = {key: getattr(args, key) for key in ('dataset', 'data_dir', 'fold')}
    if given['dataset'] is not None or (given['data_dir'] is not None and made.get('dataset') in (None, 'synthetic')):
        given['dataset'] = options.choose_dataset(given['dataset'], given['data_dir'])
    same = given['dataset'] in (None, made.get('dataset'))
    found = {key: made.get(key) if value is None and same else value for key, value in given.items()}
    if missing := [key for key in ('dataset', 'fold') if found[key] is None]:
        of = '' if missing[0] == 'dataset' or not made else f' of {found["dataset"]}'
        raise RunError(f'{subject.path}: no config.json beside it says the {missing[0]}{of}; give --{missing[0]}')
    if found['dataset'] == 'synthetic':
        found['data_dir'] = None
    caution = None
    if made and same and found['fold'] != made['fold']:
        caution = check_other_images(args, subject, made, found)  # before reading a fold that may not exist
    splits = load_splits(**found)
    if splits.classes != subject.classes:
        raise RunError(
            f'{found["data_dir"] or found["dataset"]}: has other classes than the {len(subject.classes)} that '
            f'{subject.path} was trained on, {subject.classes[0]} to {subject.classes[-1]}; --dataset and --data_dir '
            'must name that data set'
        )
    if 'split' not in defines:
        caution = caution or UNCHECKED
    elif defines['split'] != split_digest(splits):
        caution = check_other_images(args, subject, made, found)
    if caution:
        print(f'note: {CAUTIONS[caution]}', file=sys.stderr)
    return found | dict(splits=splits, defines=defines, caution=caution)


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
    elif found['fold'] != made['fold']:
        differs = f'--fold {found["fold"]}: {path} was trained on fold {made["fold"]}'
        way_out = 'leave --fold out, or give the checkpoint of that fold'
    elif args.data_dir is not None:
        differs = f'--data_dir {data_dir}: its images or lists are not those that {path} was trained on'
        way_out = f'give the tree of that run ({made["data_dir"]})'
    else:
        differs = f'{data_dir or dataset}: its images or lists have changed since {path} was trained on it'
        way_out = 'put them back as they were, give a copy of that time as --data_dir, or train anew'
    raise RunError(
        f'{differs}, so the split is another one and images of any part of it may have trained the model; {way_out}; '
        '--other_images takes them anyway, and figure and report say so'
    )
