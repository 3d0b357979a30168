"""The views of visualize.py of one image: products of the heads, their response, feature maps."""

import math

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from common.drawing import CMAP, PAGE, Axes, Figure, frame, plt, readable, shorten
from common.errors import ModelError
from common.registry import model_label
from interpret import trace
from interpret.trace import Block
from models import DIRECTIONS
from training.trained import TrainedModel, epoch_text

ANGLES = tuple(round(math.degrees(math.atan2(dy, dx))) for dy, dx in DIRECTIONS)  # of the heads; clockwise: dy is down
ARROWS = '\N{RIGHTWARDS ARROW}\N{SOUTH EAST ARROW}\N{DOWNWARDS ARROW}\N{SOUTH WEST ARROW}'
DEGREE, TIMES = '\N{DEGREE SIGN}', '\N{MULTIPLICATION SIGN}'


def title_of_model(subject: TrainedModel, what: str) -> str:
    return (
        f'{what}: {model_label(subject.name)}, {epoch_text(subject.epoch, subject.val_acc)} '
        f'({len(subject.classes)} classes)'
    )


def head_label(head: int, directional: bool = True) -> str:
    return f'head {head + 1}' + f': {ANGLES[head]}{DEGREE} {ARROWS[head]}' * directional


def block_label(name: str, block: Block) -> str:
    height, width = block.h.shape[-2:]
    return f'{name}\n{height} {TIMES} {width} cells'


def beside_image(
    subject: TrainedModel, image: Image.Image, logits: torch.Tensor, rows: list[str], columns: list[str], cell: float
) -> tuple[Figure, np.ndarray]:
    """A figure with the image as the model sees it and the prediction on the left, and a grid of axes without ticks.

    Rows and columns are given by their labels, `cell` is the height of a row in inches; the axes are an array.
    """
    size = min(PAGE[0], 1.8 + 1.02 * cell * len(columns)), cell * len(rows)
    figure = plt.figure(figsize=size, layout='constrained')
    grid = figure.add_gridspec(len(rows), len(columns) + 1, width_ratios=[1.3 / cell, *[1] * len(columns)])
    left = figure.add_subplot(grid[:, 0])
    left.imshow(to_pil_image(subject.view(image)))
    left.set_title(f'what the model sees\n{subject.img_size} {TIMES} {subject.img_size} pixels')
    (shares,) = 100 * subject.probabilities(logits)
    predicted = shorten(readable(subject.classes[shares.argmax()]), 18)  # no wider than the title
    left.set_xlabel(f'predicted:\n{predicted}\n({shares.max():.0f} %)')
    panels = [figure.add_subplot(grid[i, 1 + j]) for i in range(len(rows)) for j in range(len(columns))]
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
    for axes, label in zip(panels, columns):
        axes.set_title(label)
    for axes, label in zip(panels[:: len(columns)], rows):
        axes.set_ylabel(label)
    return figure, np.reshape(panels, (len(rows), len(columns)))


def plot_interaction(subject: TrainedModel, image: Image.Image) -> Figure:
    """Mean over the image of z_i t_j, by block and head."""
    record = trace.observe(subject.model, subject.batch([image]))
    means = np.stack([block.products[0].mean((-1, -2)) for block in record.blocks.values()])  # (blocks, heads, c, c)
    heads, c_red = means.shape[1:3]
    rows = [f'{block_label(name, block)}\ni of z' for name, block in record.blocks.items()]
    columns = [head_label(head, subject.directional) for head in range(heads)]
    figure, panels = beside_image(subject, image, record.logits, rows, columns, 1.28)
    low, top = min(0.0, float(np.nanmin(means))), np.nanmax(means)
    for place, axes in np.ndenumerate(panels):
        drawn = axes.imshow(means[place], cmap=CMAP, vmin=low, vmax=top)
        axes.set_xticks((0, c_red - 1), (1, c_red))
        axes.set_yticks((0, c_red - 1), (1, c_red))
        axes.tick_params(length=0, pad=1)
        axes.spines[:].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel('j of t')
    figure.colorbar(drawn, ax=panels, label='mean of z t', aspect=45, pad=0.01)
    notes = [
        'Mean over the image of the products z_i t_j (i \N{LESS-THAN OR EQUAL TO} j) that the network computes, before '
        'selection, on one scale. On the diagonal a channel meets itself'
        + (', displaced in the direction of the head.' if subject.directional else '.')
        + f' The lowest mean is \N{MINUS SIGN}{-low:.1g}.' * (low < 0)
    ]
    frame(figure, title_of_model(subject, 'What the heads multiply'), notes)
    return figure


def overlay(axes: Axes, image: np.ndarray, response: np.ndarray, cells: np.ndarray) -> None:
    """Draw a map of cells over the image: the colour is the response, the shading the image.

    The image (H, W) is in [0, 1]. Of the response (h, w), `cells` are coloured and the highest quarter is outlined.
    """
    shown = response[cells]
    low, high = shown.min(), shown.max()
    share = (response - low) / (high - low or 1)
    color = plt.get_cmap(CMAP)(0.3 + 0.7 * np.clip(share, 0, 1))[..., :3]  # darker colours would hide the image
    color[~cells] = 1
    rows, columns = (np.arange(n) * m // n for n, m in zip(image.shape, cells.shape))  # the cell of every pixel
    axes.imshow(color[rows[:, None], columns] * (0.3 + 0.7 * image[..., None]))
    best = cells & (response >= np.quantile(shown, 0.75))
    for color, width in (('black', 1.8), ('white', 0.9)):
        axes.contour(best[rows[:, None], columns].astype(float), levels=[0.5], colors=color, linewidths=width)
    axes.set_xlabel(f'{low:.2f} to {high:.2f}', labelpad=1)


def plot_response(subject: TrainedModel, image: Image.Image) -> Figure:
    """The response of every block and head over the image."""
    record = trace.observe(subject.model, subject.batch([image]))
    blocks = trace.wide_blocks(subject, record.blocks)
    grey = np.asarray(to_pil_image(subject.view(image)).convert('L')) / 255
    heads = next(iter(blocks.values())).z.shape[1]
    labels = [block_label(name, block) for name, block in blocks.items()]
    figure, panels = beside_image(subject, image, record.logits, labels, [*map(head_label, range(heads))], 1.45)
    for row, block in zip(panels, blocks.values()):
        cells = trace.cells_with_neighbour(heads, *block.h.shape[-2:])
        for axes, response, inside in zip(row, block.response[0], cells):
            overlay(axes, grey, response.numpy(), inside.numpy())
    notes = [
        'Colour: z . t, the cosine between the channels of a head and their twist, from dark (low) to light (high), in '
        'the range below each panel. Shading: the image. Outlined: the highest quarter of the cells. Without colour: '
        'the head looks at a neighbour beyond the map. Arrows: where a head looks in the image, where dy points down.'
    ]
    frame(figure, title_of_model(subject, 'Where the heads respond'), notes)
    return figure


def plot_features(subject: TrainedModel, image: Image.Image) -> Figure:
    """The channels of the stem and of every stage that vary most over the image."""
    if not hasattr(subject.model, 'forward_intermediates'):
        raise ModelError(f"{subject.path}: {subject.name} has no forward_intermediates, as timm's models have")
    with torch.inference_mode():
        final, maps = subject.model.forward_intermediates(subject.batch([image]))
        logits = subject.model.forward_head(final)
    labels = [
        f'{info["module"]}\n{stage.shape[1]} {TIMES} {stage.shape[2]}\N{SUPERSCRIPT TWO}'
        for info, stage in zip(subject.model.feature_info, maps)
    ]
    columns = min(6, *(stage.shape[1] for stage in maps))
    figure, panels = beside_image(subject, image, logits, labels, [''] * columns, 0.92)
    figure.get_layout_engine().set(wspace=0.01, hspace=0.01)
    for row, stage in zip(panels, maps):
        values = stage[0].numpy()  # (C, H, W)
        middle = values[:, 1:-1, 1:-1] if min(values.shape[1:]) > 4 else values  # padding shows at the border
        for axes, channel in zip(row, np.argsort(-middle.std((1, 2)), kind='stable')):
            axes.imshow(values[channel], cmap=CMAP, vmin=min(0, values[channel].min()))
            axes.set_title(f'{channel}', pad=1.5, fontsize=7)
    lowest = 'its lowest value, or from 0 if that is lower,' if any(stage.min() < 0 for stage in maps) else '0'
    note = (
        f'The {columns} channels of each stage that vary most over the image, by number, each from {lowest} (dark) to '
        'its highest value (light). Beside the name of a stage: its channels and cells.'
    )
    frame(figure, title_of_model(subject, 'Feature maps'), [note])
    return figure
