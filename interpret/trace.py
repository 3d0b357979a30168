"""The tensors of one forward pass of a trained model; of a TwistNet, by block and head.

    subject = load('runs/dtd_fold1_twistnet18_seed42/best.pt')
    record = observe(subject.model, subject.batch(images))
    record.blocks['layer3.0'].products                          # (B, heads, c_red, c_red, H, W): z_i t_j

The values are those of the pass itself: a hook takes h, the tensor between a TwistBlock's two convolutions, and the
branch's own modules compute the rest from it. A model without STCI has no blocks, but has features and logits.
"""

import argparse
import sys
from collections.abc import Iterable
from functools import partial
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
from datasets import load_splits
from models import DIRECTIONS, STCI, blocks_of
from transforms import eval_transform, normalize

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
    name: str  # of registry.MODELS
    model: nn.Module  # in evaluation mode, on the CPU
    classes: list[str]
    epoch: int
    val_acc: float  # percent
    img_size: int  # pixels, side of the square input

    @property
    def directional(self) -> bool:
        """Whether its heads have directions: False without a twist, and where its kernels started at random."""
        return all(getattr(block.stci.twist, 'directional', False) for block in blocks_of(self.model).values())

    def view(self, image: Image.Image) -> torch.Tensor:
        """A PIL image as the model sees it: (3, img_size, img_size) uint8."""
        return eval_transform(self.img_size)(image, 0)

    def batch(self, images: Iterable[Image.Image]) -> torch.Tensor:
        """PIL images as the model takes them: (B, 3, img_size, img_size), normalised."""
        return normalize(torch.stack([self.view(image) for image in images]))


class Block(NamedTuple):
    """The branch of one TwistBlock over a batch; D = heads * n channels, n = c_red + c_red (c_red + 1) / 2."""

    h: torch.Tensor  # (B, C, H, W), input of the branch
    interactions: torch.Tensor  # (B, heads, n, H, W): z_1 .. z_c, then p_11, p_12, .., before selection
    selection: torch.Tensor | None  # (B, heads, n), weights of AIS; None without AIS
    branch: torch.Tensor  # (B, C, H, W), sigmoid(gate) * STCI(h), added by the block
    out: torch.Tensor  # (B, C, H, W), output of the block
    gate: float  # sigmoid(gate)
    c_red: int

    @property
    def products(self) -> torch.Tensor | None:
        """z_i t_j at i <= j, NaN below the diagonal: (B, heads, c_red, c_red, H, W); None without products."""
        return matrix(self.interactions[:, :, self.c_red :], self.c_red)

    @property
    def response(self) -> torch.Tensor | None:
        """z . t of every head: the cosine between z and its twist, in [-1, 1]: (B, heads, H, W); None without products.

        It is the trace of the head's products, high where the features repeat in the head's direction.
        """
        products = self.products
        return None if products is None else products.diagonal(dim1=2, dim2=3).sum(-1)

    @property
    def mean_response(self) -> torch.Tensor | None:
        """Mean of the response over the cells whose neighbour is in the map: (B, heads)."""
        response = self.response
        if response is None:
            return None
        cells = cells_with_neighbour(*response.shape[1:]).to(response.device)
        return (response * cells).sum((-1, -2)) / cells.sum((-1, -2))


class Record(NamedTuple):
    """One forward pass."""

    blocks: dict[str, Block]  # 'layer3.0', ..; empty for a model without STCI
    features: torch.Tensor  # (B, num_features), input of the classifier
    logits: torch.Tensor  # (B, classes)


def cells_with_neighbour(heads: int, height: int, width: int) -> torch.Tensor:
    """True where the neighbour a head looks at lies in the map: (heads, height, width).

    Elsewhere the twist reads zero padding, so that t is z at half its length and the response is 1 for any image.
    """
    cells = torch.ones(heads, height, width, dtype=torch.bool)
    for cell, (dy, dx) in zip(cells, DIRECTIONS):
        cell[height - dy :] = False  # dy is 0 or 1
        cell[:, width - dx :] = False
        cell[:, : max(0, -dx)] = False
    return cells


def matrix(values: torch.Tensor, c_red: int) -> torch.Tensor | None:
    """Pairs i <= j, in row-major order, as upper triangles: (B, heads, pairs, ..) -> (B, heads, c_red, c_red, ..)."""
    if values.shape[2] == 0:
        return None
    rows, columns = torch.triu_indices(c_red, c_red)
    square = values.new_full((*values.shape[:2], c_red, c_red, *values.shape[3:]), torch.nan)
    square[:, :, rows, columns] = values
    return square


def load(path: str | Path) -> Subject:
    """The model in the best.pt of a run.

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
    img_size = checkpoint['transform']['img_size']
    model = models.build_model(name, len(classes), img_size=img_size)
    try:
        model.load_state_dict(checkpoint['state_dict'])
    except RuntimeError as error:
        raise ModelError(f'{path}: its tensors are not those of {name}') from error
    return Subject(path, name, model.eval(), classes, checkpoint['epoch'], checkpoint['val_acc'], img_size)


def need_stci(subject: Subject) -> None:
    """Raise ModelError for a model without STCI, which most views and all questions are about."""
    if not blocks_of(subject.model):
        raise ModelError(
            f'{subject.path}: is of {subject.name}, which has no STCI branch; give one of a TwistNet, or use '
            'visualize.py --view features or tsne, which work for any model'
        )


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


@torch.inference_mode()
def observe(model: nn.Module, images: torch.Tensor) -> Record:
    """One forward pass of the model, in evaluation mode, with the tensors of its TwistBlocks.

    Args:
        model: of models.build_model.
        images: (B, 3, H, W), normalised.
    """
    tensors: dict[str, dict[str, torch.Tensor]] = {name: {} for name in blocks_of(model)}
    handles = []

    def keep(kept: dict[str, torch.Tensor], module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        kept |= dict(h=inputs[0], branch=output) if isinstance(module, STCI) else dict(out=output)

    for name, block in blocks_of(model).items():
        for module in (block, block.stci):
            handles.append(module.register_forward_hook(partial(keep, tensors[name])))
    was_training = model.training
    try:
        model.eval()
        maps = model.forward_features(images)
        features, logits = model.forward_head(maps, pre_logits=True), model.forward_head(maps)
        blocks = {}
        for name, block in blocks_of(model).items():
            stci, kept = block.stci, tensors[name]
            values = stci.interactions(kept['h'])  # (B, D, H, W)
            selection = stci.ais.weights(values) if hasattr(stci.ais, 'weights') else None
            blocks[name] = Block(
                h=kept['h'],
                interactions=values.unflatten(1, (stci.num_heads, -1)),
                selection=None if selection is None else selection.unflatten(1, (stci.num_heads, -1)),
                branch=kept['branch'],
                out=kept['out'],
                gate=torch.sigmoid(block.gate).item(),
                c_red=stci.c_red,
            )
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return Record(blocks, features, logits)
