"""The tensors of one forward pass of a trained model; of a TwistNet, by block and head.

    subject = trained.load('runs/dtd_fold1_twistnet18_seed42/best.pt')
    record = observe(subject.model, subject.batch(images))
    record.blocks['layer3.0'].products                          # (B, heads, c_red, c_red, H, W): z_i t_j

The values are those of the pass itself: a hook takes h, the input of the branch (between a TwistBlock's two
convolutions, or a stage's output where STCI is put into a CNN), and the branch's own modules compute the rest from it.
A model without STCI has no blocks, but has features and logits.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from common.errors import ModelError
from models import DIRECTIONS, STCI, blocks_of
from trained import TrainedModel


class Block(NamedTuple):
    """The branch of one block over a batch; D = heads * n channels, n = c_red + c_red (c_red + 1) / 2."""

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


def need_stci(subject: TrainedModel) -> None:
    """Raise ModelError for a model without STCI, which most views and all questions are about."""
    if not blocks_of(subject.model):
        raise ModelError(
            f'{subject.path}: is of {subject.name}, which has no STCI branch; give one of a TwistNet or of '
            'stci_NAME, or use visualize.py --view features or tsne, which work for any model'
        )


@torch.inference_mode()
def observe(model: nn.Module, images: torch.Tensor) -> Record:
    """One forward pass of the model, in evaluation mode, with the tensors of its blocks with STCI.

    Args:
        model: of models.build_model.
        images: (B, 3, H, W), normalised.

    Raises:
        ModelError: it has no forward_features and forward_head, as timm's models have.
    """
    if not hasattr(model, 'forward_features') or not hasattr(model, 'forward_head'):
        raise ModelError("features need forward_features and forward_head, as timm's models have; this one has not")
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
