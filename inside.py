"""Inside a trained TwistNet: the tensors of one forward pass, block by block and head by head.

    subject = load('runs/dtd_fold1_twistnet18_seed42/best.pt')
    record = observe(subject.model, subject.batch(images))
    record.blocks['layer3.0'].products                          # (B, heads, c_red, c_red, H, W): z_i t_j

What is shown is what the network computed: h, the tensor between a TwistBlock's two convolutions, is taken by a hook
from the pass itself, and everything else of the branch follows from it by the branch's own modules.
"""

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import nn

import models
import runs
from models import AIS, DIRECTIONS, STCI, ModelError, TwistBlock, TwistNet
from runs import RunError
from transforms import eval_transform, normalize


class Subject(NamedTuple):
    """A trained model and what its checkpoint says of it."""

    path: Path
    name: str  # of registry.MODELS
    model: TwistNet  # in evaluation mode, on the CPU
    classes: list[str]
    epoch: int
    val_acc: float  # percent
    img_size: int  # pixels, side of the square input

    @property
    def directional(self) -> bool:
        """Whether its heads look in directions: not without a twist, nor where its kernels started at random."""
        return all(getattr(block.stci.twist, 'directional', False) for block in blocks_of(self.model).values())

    def view(self, image: Image.Image) -> torch.Tensor:
        """A PIL image as the model sees it: (3, img_size, img_size) uint8."""
        return eval_transform(self.img_size)(image, 0)

    def batch(self, images: Iterable[Image.Image]) -> torch.Tensor:
        """PIL images as the model takes them: (B, 3, img_size, img_size), normalised."""
        return normalize(torch.stack([self.view(image) for image in images]))


class Block(NamedTuple):
    """The branch of one TwistBlock over a batch; D = heads * n channels, n = c_red + c_red (c_red + 1) / 2."""

    h: torch.Tensor  # (B, C, H, W), what the branch reads
    interactions: torch.Tensor  # (B, heads, n, H, W): z_1 .. z_c, then p_11, p_12, .., before selection
    selection: torch.Tensor | None  # (B, heads, n), AIS's weights; None without AIS
    branch: torch.Tensor  # (B, C, H, W), sigmoid(gate) * STCI(h): what the block adds
    out: torch.Tensor  # (B, C, H, W), what the block returns
    gate: float  # sigmoid(gate)
    c_red: int

    @property
    def products(self) -> torch.Tensor | None:
        """z_i t_j at i <= j, NaN below the diagonal: (B, heads, c_red, c_red, H, W); None without products."""
        return matrix(self.interactions[:, :, self.c_red :], self.c_red)

    @property
    def response(self) -> torch.Tensor | None:
        """z . t of every head: the cosine between z and its twist, in [-1, 1]: (B, heads, H, W); None without products.

        It is the trace of the head's products, and is high where the features repeat in the head's direction.
        """
        products = self.products
        return None if products is None else products.diagonal(dim1=2, dim2=3).sum(-1)

    @property
    def mean_response(self) -> torch.Tensor | None:
        """The response's mean over the cells whose neighbour is in the map, see `seen`: (B, heads)."""
        response = self.response
        if response is None:
            return None
        cells = seen(*response.shape[1:]).to(response.device)
        return (response * cells).sum((-1, -2)) / cells.sum((-1, -2))


class Record(NamedTuple):
    """One forward pass."""

    blocks: dict[str, Block]  # 'layer3.0', ..
    features: torch.Tensor  # (B, num_features), what the classifier reads
    logits: torch.Tensor  # (B, classes)


def seen(heads: int, height: int, width: int) -> torch.Tensor:
    """True where the neighbour a head looks at lies in the map: (heads, height, width).

    Elsewhere the twist reads zero padding, so that t is z itself at half its length and the response 1, of any image.
    """
    cells = torch.ones(heads, height, width, dtype=torch.bool)
    for cell, (dy, dx) in zip(cells, DIRECTIONS):
        cell[height - dy :] = False  # dy is 0 or 1
        cell[:, width - dx :] = False
        cell[:, : max(0, -dx)] = False
    return cells


def matrix(values: torch.Tensor, c_red: int) -> torch.Tensor | None:
    """Pairs i <= j in row-major order as upper triangles: (B, heads, pairs, ..) -> (B, heads, c_red, c_red, ..)."""
    if values.shape[2] == 0:
        return None
    rows, columns = torch.triu_indices(c_red, c_red)
    square = values.new_full((*values.shape[:2], c_red, c_red, *values.shape[3:]), torch.nan)
    square[:, :, rows, columns] = values
    return square


def load(path: str | Path) -> Subject:
    """A TwistNet from the best.pt of a run.

    Raises:
        ModelError: no such file, a foreign one, or a model without STCI.
    """
    path = Path(path)
    if path.is_dir():
        raise ModelError(f'{path}: is a folder; give the best.pt in it')
    try:
        checkpoint = models.read_checkpoint(path)
    except FileNotFoundError as error:
        raise ModelError(f'{path}: no such checkpoint; train.py writes one, best.pt, into its run folder') from error
    wanted = {'model', 'classes', 'state_dict', 'transform'}
    if not isinstance(checkpoint, dict) or not wanted <= checkpoint.keys():
        raise ModelError(f'{path}: is no best.pt of train.py')
    name, classes = checkpoint['model'], checkpoint['classes']
    model = models.build_model(name, len(classes))
    if not (isinstance(model, TwistNet) and blocks_of(model)):
        raise ModelError(f'{path}: is of {name}, which has no STCI branch to look into; give one of a TwistNet')
    try:
        model.load_state_dict(checkpoint['state_dict'])
    except RuntimeError as error:
        raise ModelError(f'{path}: its tensors are not those of {name}') from error
    img_size = checkpoint['transform']['img_size']
    return Subject(path, name, model.eval(), classes, checkpoint['epoch'], checkpoint['val_acc'], img_size)


def data_of(args: argparse.Namespace, checkpoint: Path) -> dict:
    """dataset, data_dir and fold from the options or else from the run, and `defines` of the run's config.json.

    Args:
        args: dataset, data_dir and fold, each None where not given.
        checkpoint: best.pt; the config.json beside it says what the run was trained on, if it is there.

    Raises:
        RunError: neither says it, or the fold is not the one whose images the checkpoint has not seen.
    """
    config = runs.read_json(checkpoint.with_name('config.json')) or {}
    made = config.get('options', {})
    given = {key: getattr(args, key) for key in ('dataset', 'data_dir', 'fold')}
    same = given['dataset'] in (None, made.get('dataset'))
    found = {key: made.get(key) if value is None and same else value for key, value in given.items()}
    if missing := [key for key in ('dataset', 'fold') if found[key] is None]:
        of = '' if missing[0] == 'dataset' or not made else f' of {found["dataset"]}'
        raise RunError(f'{checkpoint}: no config.json beside it says the {missing[0]}{of}; give --{missing[0]}')
    if made and same and found['fold'] != made['fold']:
        raise RunError(
            f'--fold {found["fold"]}: {checkpoint} was trained on fold {made["fold"]}, so images of another fold '
            'may have trained it; leave --fold out, or give the checkpoint of that fold'
        )
    return found | dict(defines=config.get('defines', {}))


def blocks_of(model: nn.Module) -> dict[str, TwistBlock]:
    """Name and module of every TwistBlock, from the input on."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TwistBlock)}


@torch.inference_mode()
def observe(model: TwistNet, images: torch.Tensor) -> Record:
    """One forward pass of the model, in evaluation mode, with what its TwistBlocks did.

    Args:
        model: a TwistNet.
        images: (B, 3, H, W), normalised.
    """
    taken: dict[str, dict[str, torch.Tensor]] = {name: {} for name in blocks_of(model)}
    handles = []

    def keep(seen: dict[str, torch.Tensor], module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if isinstance(module, STCI):
            seen |= dict(h=inputs[0], branch=output)
        else:
            seen |= dict(out=output)

    for name, block in blocks_of(model).items():
        for module in (block, block.stci):
            handles.append(
                module.register_forward_hook(lambda module, x, y, seen=taken[name]: keep(seen, module, x, y))
            )
    was_training = model.training
    try:
        model.eval()
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        logits = model.fc(features)
        blocks = {}
        for name, block in blocks_of(model).items():
            stci, seen = block.stci, taken[name]
            values = stci.interactions(seen['h'])  # (B, D, H, W)
            selection = stci.ais.weights(values) if hasattr(stci.ais, 'weights') else None
            blocks[name] = Block(
                h=seen['h'],
                interactions=values.unflatten(1, (stci.num_heads, -1)),
                selection=None if selection is None else selection.unflatten(1, (stci.num_heads, -1)),
                branch=seen['branch'],
                out=seen['out'],
                gate=torch.sigmoid(block.gate).item(),
                c_red=stci.c_red,
            )
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return Record(blocks, features, logits)


@contextmanager
def watch_selection(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """AIS's weights in every TwistBlock, summed over the images that pass through the model in the body.

    Yields:
        {'layer3.0': (sum, number of weights) as a float64 tensor, ..}; empty for a model without AIS.
    """
    sums: dict[str, torch.Tensor] = {}
    handles = []

    def add(total: torch.Tensor, weights: torch.Tensor) -> None:
        total += torch.stack([weights.sum(dtype=torch.float64), total.new_tensor(weights.numel())])

    for name, block in blocks_of(model).items():
        if isinstance(block.stci.ais, AIS):
            total = sums[name] = torch.zeros(2, dtype=torch.float64, device=block.gate.device)
            handles.append(block.stci.ais.fc.register_forward_hook(lambda _m, _x, y, total=total: add(total, y)))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
