"""The tensors of one forward pass of a trained model; of a TwistNet, by block and head.

    subject = trained.load('runs/dtd_fold1_twistnet18_seed42/best.pt')
    record = observe(subject.model, subject.batch(images))
    record.blocks['layer3.0'].products                          # (B, heads, c_red, c_red, H, W): z_i t_j

The values are those of the pass itself: a hook takes h, the input of the branch (between a TwistBlock's two
convolutions, or a stage's output where STCI is put into a CNN), and the branch's own modules compute the rest from it.
A model without STCI has no blocks, but has features and logits.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from common.errors import DataError, ModelError
from models import AIS, DIRECTIONS, blocks_of
from training.trained import TrainedModel


class Block(NamedTuple):
    """The branch of one block over a batch; n = c_red + c_red (c_red + 1) / 2 channels per head."""

    h: torch.Tensor  # (B, C, H, W), input of the branch
    interactions: torch.Tensor  # (B, heads, n, H, W): z_1 .. z_c, then p_11, p_12, .., before selection
    selection: torch.Tensor | None  # (B, heads, n), weights of AIS; None without AIS
    branch: torch.Tensor  # (B, C, H, W), sigmoid(gate) * STCI(h), added by the block
    out: torch.Tensor  # (B, C, H, W), output of the block
    c_red: int

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
    cells = torch.ones(heads, height, width, dtype=torch.bool)
    for cell, (dy, dx) in zip(cells, DIRECTIONS):
        cell[height - dy :] = False  # dy is 0 or 1
        cell[:, width - dx :] = False
        cell[:, : max(0, -dx)] = False
    return cells


def need_stci(subject: TrainedModel) -> None:
    """Raise ModelError for a model without STCI, which most views and all questions are about."""
    if not blocks_of(subject.model):
        raise ModelError(
            f'{subject.path}: is of {subject.name}, which has no STCI branch; give one of a TwistNet or of '
            'stci_NAME, or use visualize.py --view features or tsne, which work for any model'
        )


def need_products(subject: TrainedModel) -> None:
    """Raise ModelError for the variant whose branch has its first-order channels alone."""
    if not all(block.stci.use_products for block in blocks_of(subject.model).values()):
        raise ModelError(f'{subject.path}: {subject.name} has no products of channels')


def need_twist(subject: TrainedModel) -> None:
    """Raise ModelError for a variant whose heads have no direction."""
    if not subject.directional:
        raise ModelError(
            f'{subject.path}: {subject.name} has no directions to show: it has no twist, or its kernels were '
            'initialised at random'
        )


def need_two(labels: np.ndarray, classes: list[str], where: str) -> None:
    """Raise DataError where a class has fewer than two images: it cannot be compared with itself."""
    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() < 2:
        few = counts.argmin()
        raise DataError(
            f"{where}: class '{classes[few]}' has {('no image', 'one image')[counts[few]]}; it takes two to compare "
            'a class with itself'
        )


@torch.inference_mode()
def observe(model: nn.Module, images: torch.Tensor) -> Record:
    """One forward pass of a model, put into evaluation mode for it, with the tensors of its blocks with STCI.

    Args:
        images: (B, 3, H, W), normalised.
    """
    if not hasattr(model, 'forward_features') or not hasattr(model, 'forward_head'):
        raise ModelError("features need forward_features and forward_head, as timm's models have; this one has not")
    kept: dict[nn.Module, tuple] = {}

    def keep(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        kept[module] = inputs[0], output

    found = blocks_of(model)
    handles = [module.register_forward_hook(keep) for block in found.values() for module in (block, block.stci)]
    training = model.training
    model.eval()
    try:
        maps = model.forward_features(images)
        blocks = {}
        for name, block in found.items():
            stci, (h, branch), (_, out) = block.stci, kept[block.stci], kept[block]
            values = stci.interactions(h)  # (B, D, H, W)
            by_head = (1, (stci.num_heads, -1))
            selection = stci.ais.weights(values).unflatten(*by_head) if isinstance(stci.ais, AIS) else None
            blocks[name] = Block(h, values.unflatten(*by_head), selection, branch, out, stci.c_red)
        return Record(blocks, model.forward_head(maps, pre_logits=True), model.forward_head(maps))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


def collect(
    model: nn.Module, batches: Iterable[torch.Tensor], extract: Callable[[Record], dict[Hashable, torch.Tensor]]
) -> dict[Hashable, np.ndarray]:
    """The tensors (B, ..) that extract(record) gives for each batch, as arrays over all images: (N, ..)."""
    found: dict[Hashable, list] = {}
    for images in batches:
        for key, values in extract(observe(model, images)).items():
            found.setdefault(key, []).append(values.cpu().numpy())
    return {key: np.concatenate(parts) for key, parts in found.items()}
