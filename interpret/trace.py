"""The tensors of one forward pass of a trained model; of a TwistNet, by block and head.

    subject = trained.load('runs/dtd_fold1_twistnet18_seed42/best.pt')
    record = observe(subject.model, subject.batch(images))
    record.blocks['layer3.0'].products                          # (B, heads, c_red, c_red, H, W): z_i t_j

The values are those of the pass itself: a hook takes h, the input of the branch (between a TwistBlock's two
convolutions, or a stage's output where STCI is put into a CNN), and the branch's own modules compute the rest from it.
A model without STCI has no blocks, but has features and logits.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import DataError, ModelError
from common.runs import counted
from models import AIS, DIRECTIONS, blocks_of
from training.trained import TrainedModel


class Block(NamedTuple):
    """The branch of one block over a batch; n = c_red + c_red (c_red + 1) / 2 channels per head."""

    h: torch.Tensor  # (B, C, H, W), input of the branch
    z: torch.Tensor  # (B, heads, c_red, H, W), channels before the L2 norm
    interactions: torch.Tensor  # (B, heads, n, H, W): z_1 .. z_c, then p_11, p_12, .., before selection
    selection: torch.Tensor | None  # (B, heads, n), weights of AIS; None without AIS
    branch: torch.Tensor  # (B, C, H, W), sigmoid(gate) * STCI(h), added by the block
    out: torch.Tensor  # (B, C, H, W), output of the block

    @property
    def c_red(self) -> int:
        return self.z.shape[2]

    @property
    def products(self) -> torch.Tensor:
        """z_i t_j at i <= j, NaN below the diagonal: (B, heads, c_red, c_red, H, W); only where there are products."""
        values, c = self.interactions[:, :, self.c_red :], self.c_red
        square = values.new_full((*values.shape[:2], c, c, *values.shape[3:]), torch.nan)
        rows, columns = torch.triu_indices(c, c)
        square[:, :, rows, columns] = values
        return square

    @property
    def response(self) -> torch.Tensor:
        """z . t of every head: the cosine between z and its twist, in [-1, 1]: (B, heads, H, W).

        It is the trace of the head's products, high where the features repeat in the head's direction.
        """
        return self.products.diagonal(dim1=2, dim2=3).sum(-1)

    @property
    def mean_response(self) -> torch.Tensor:
        """Mean of the response over the cells whose neighbour is in the map: (B, heads)."""
        response = self.response
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
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    ends = ((y + dy, x + dx) for dy, dx in DIRECTIONS[:heads])  # dy is 0 or 1
    return torch.stack([(row < height) & (column >= 0) & (column < width) for row, column in ends])


def need(subject: TrainedModel, part: str = '') -> None:
    """Raise ModelError for a model without STCI, or whose branch has no 'products', 'directions' or 'AIS'."""
    branches = [block.stci for block in blocks_of(subject.model).values()]
    if not branches:
        raise ModelError(
            f'{subject.path}: is of {subject.name}, which has no STCI branch; give one of a TwistNet or of '
            'stci_NAME, or use visualize.py --view features or tsne, which work for any model'
        )
    has = {
        '': True,
        'products': all(stci.use_products for stci in branches),
        'directions': subject.directional,
        'AIS': all(isinstance(stci.ais, AIS) for stci in branches),
    }
    if not has[part]:
        why = ': it has no twist, or its kernels were initialised at random' if part == 'directions' else ''
        raise ModelError(f'{subject.path}: {subject.name} has no {part}{why}')


def wide_blocks(subject: TrainedModel, blocks: dict[str, Block]) -> dict[str, Block]:
    """The blocks whose maps have a neighbour in every direction."""
    wide = {name: block for name, block in blocks.items() if min(block.h.shape[-2:]) > 1}
    if not wide:
        raise ModelError(f'{subject.path}: at {subject.img_size} pixels its maps are one cell each')
    return wide


def need_two(labels: np.ndarray, classes: list[str], where: str) -> None:
    """Raise DataError where a class has fewer than two images: it cannot be compared with itself."""
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    few = min(counts)
    if few < 2:
        name = f"class '{classes[counts.index(few)]}'"
        raise DataError(f'{where}: {name} has {counted(few, "image")}; it takes two to compare a class with itself')


@torch.inference_mode()
def observe(model: nn.Module, images: torch.Tensor) -> Record:
    """One forward pass of normalised images (B, 3, H, W); puts the model into evaluation mode."""
    if not hasattr(model, 'forward_features') or not hasattr(model, 'forward_head'):
        raise ModelError("features need forward_features and forward_head, as timm's models have; this one has not")
    kept: dict[nn.Module, tuple] = {}

    def keep(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        kept[module] = inputs[0], output

    model.eval()
    with contextlib.ExitStack() as hooks:
        for block in blocks_of(model).values():
            for module in (block, block.stci):
                hooks.enter_context(module.register_forward_hook(keep))
        maps = model.forward_features(images)
    blocks = {}
    for name, block in blocks_of(model).items():
        stci, (h, branch), (_, out) = block.stci, kept[block.stci], kept[block]
        by_head = (1, (stci.num_heads, -1))
        z, interactions = F.relu(stci.reduce(h)), stci.interactions(h)  # (B, heads * c_red, H, W), (B, D, H, W)
        selection = stci.ais.weights(interactions).unflatten(*by_head) if isinstance(stci.ais, AIS) else None
        blocks[name] = Block(h, z.unflatten(*by_head), interactions.unflatten(*by_head), selection, branch, out)
    return Record(blocks, model.forward_head(maps, pre_logits=True), model.forward_head(maps))


def collect(
    model: nn.Module, batches: Iterable[torch.Tensor], extract: Callable[[Record], dict[Hashable, torch.Tensor]]
) -> dict[Hashable, np.ndarray]:
    """The tensors (B, ..) that extract(record) gives for each batch, as arrays over all images: (N, ..)."""
    found: dict[Hashable, list] = {}
    for images in batches:
        for key, values in extract(observe(model, images)).items():
            found.setdefault(key, []).append(values.cpu().numpy())
    return {key: np.concatenate(parts) for key, parts in found.items()}
