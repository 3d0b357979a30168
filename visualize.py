"""Pictures of what a trained TwistNet does, each as PDF and as PNG; their paths are printed.

    python visualize.py --checkpoint runs/main/dtd_fold1_twistnet18_seed42/best.pt \\
        --image data/dtd/images/banded/banded_0001.jpg --view response
    python visualize.py --checkpoint runs/demo/synthetic_fold1_twistnet18_seed42/best.pt --view all

interaction, response and features need --image; kernels needs the checkpoint alone; direction rotates --image, or
streaks of `synthetic` without one; selection, classes and tsne run over a subset of the data set that the run was
trained on, or the one that --dataset, --data_dir and --fold name. Gates by epoch: plot_results.py --plot gate.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from tqdm import tqdm

import class_views
import inside
import options
import runs
import synthetic
from archives import DataError
from datasets import open_image
from drawing import COLORS, DASHES, PAGE, frame, save
from inside import Block, Subject
from models import DIRECTIONS, ModelError, Twist
from runs import RunError
from summarize_runs import model_label, take_labels

ANGLES = tuple(round(math.degrees(math.atan2(dy, dx))) for dy, dx in DIRECTIONS)  # of the heads; clockwise: dy is down
ARROWS = '\N{RIGHTWARDS ARROW}\N{SOUTH EAST ARROW}\N{DOWNWARDS ARROW}\N{SOUTH WEST ARROW}'
DEGREE, TIMES = '\N{DEGREE SIGN}', '\N{MULTIPLICATION SIGN}'
STEP = 15  # degrees between two rotations
TEXTURES = 24  # streaks that are rotated
CMAP = 'cividis'  # its lightness rises evenly: it reads in grey as well


# ---------------------------------------------------------------------------------------------- words


def describe(subject: Subject, what: str) -> str:
    """The title of a figure: what it shows, of which model, and how good that model is."""
    return (
        f'{what}: {model_label(subject.name)}, epoch {subject.epoch}, validation accuracy {subject.val_acc:.1f} % '
        f'({len(subject.classes)} classes)'
    )


def head_label(head: int) -> str:
    return f'head {head + 1}: {ANGLES[head]}{DEGREE} {ARROWS[head]}'


def block_label(name: str, block: Block) -> str:
    height, width = block.h.shape[-2:]
    return f'{name}\n{height} {TIMES} {width} cells'


def verdict(subject: Subject, logits: torch.Tensor) -> str:
    """What the model takes an image for, with its probability."""
    probability, label = logits.softmax(-1).max(-1)
    return f'predicted:\n{subject.classes[int(label)]} ({100 * probability.item():.0f} %)'


def need_twist(subject: Subject) -> None:
    """Raises ModelError for a variant that displaces nothing: z . t is 1 everywhere, or there is no t."""
    if not isinstance(next(iter(inside.blocks_of(subject.model).values())).stci.twist, Twist):
        raise ModelError(f'{subject.path}: {subject.name} has no twist: there is nothing directional to show')


# ---------------------------------------------------------------------------------------------- one image


def beside_image(subject: Subject, image: Image.Image, rows: int, columns: int, cell: float) -> tuple:
    """A figure with the image as the model sees it on the left, and a grid of axes without ticks."""
    size = min(PAGE[0], 1.8 + 1.02 * cell * columns), cell * rows
    figure = plt.figure(figsize=size, layout='constrained')
    grid = figure.add_gridspec(rows, columns + 1, width_ratios=[1.3 / cell, *[1] * columns])
    axes = figure.add_subplot(grid[:, 0])
    axes.imshow(pixels(subject, image))
    axes.set(xticks=[], yticks=[])
    axes.set_title(f'what the model sees\n{subject.img_size} {TIMES} {subject.img_size} pixels')
    panels = [[figure.add_subplot(grid[row, 1 + column]) for column in range(columns)] for row in range(rows)]
    for axes_ in (axes_ for row in panels for axes_ in row):
        axes_.set(xticks=[], yticks=[])
    return figure, axes, panels


def pixels(subject: Subject, image: Image.Image) -> np.ndarray:
    """The image as the model sees it: (H, W, 3) uint8."""
    return subject.view(image).permute(1, 2, 0).numpy()


def plot_interaction(subject: Subject, image: Image.Image) -> Figure:
    """z_i t_j of every block and head, averaged over the image.

    Raises:
        ModelError: the model has no products.
    """
    record = inside.observe(subject.model, subject.batch([image]))
    matrices = {name: block.products for name, block in record.blocks.items()}
    if None in matrices.values():
        raise ModelError(f'{subject.path}: {subject.name} has no products of channels to show')
    means = {name: products[0].mean((-1, -2)).numpy() for name, products in matrices.items()}  # (heads, c, c)
    heads, c_red = next(iter(means.values())).shape[:2]
    figure, left, panels = beside_image(subject, image, len(means), heads, 1.28)
    left.set_xlabel(verdict(subject, record.logits[0]))
    top = max(np.nanmax(values) for values in means.values())
    for row, (name, values) in zip(panels, means.items()):
        for head, axes in enumerate(row):
            drawn = axes.imshow(values[head], cmap=CMAP, vmin=0, vmax=top)
            ticks = dict(ticks=(0, c_red - 1), labels=(1, c_red))
            axes.set_xticks(**ticks), axes.set_yticks(**ticks)
            axes.tick_params(length=0, pad=1)
            axes.spines[:].set_visible(False)
            if row is panels[0]:
                axes.set_title(head_label(head))
            if row is panels[-1]:
                axes.set_xlabel('j of t')
        row[0].set_ylabel(f'{block_label(name, record.blocks[name])}\ni of z')
    figure.colorbar(drawn, ax=[axes for row in panels for axes in row], label='mean of z t', aspect=45, pad=0.01)
    notes = [
        'Mean over the image of the products z_i t_j (i \N{LESS-THAN OR EQUAL TO} j) that the network computes, before '
        'selection, on one scale. On the diagonal a channel meets itself, displaced in the direction of the head.'
    ]
    frame(figure, describe(subject, 'What the heads multiply'), notes)
    return figure


def overlay(axes: Axes, image: np.ndarray, response: np.ndarray, cells: np.ndarray) -> None:
    """A map of cells laid over the image: its colour is the response, its shading the image.

    Args:
        axes: to draw in.
        image: (H, W) in [0, 1].
        response: (h, w), whose range over `cells` is the range of colours.
        cells: (h, w) bool; others are left without colour. The highest quarter of them is outlined.
    """
    shown = response[cells]
    low, high = shown.min(), shown.max()
    share = (response - low) / (high - low or 1)
    color = plt.get_cmap(CMAP)(0.3 + 0.7 * np.clip(share, 0, 1))[..., :3]  # the darkest would hide the image
    color[~cells] = 1

    def stretch(values: np.ndarray) -> np.ndarray:  # nearest cell of every pixel: the map is no finer than it is
        rows, columns = (np.arange(n) * m // n for n, m in zip(image.shape, values.shape))
        return values[rows[:, None], columns]

    axes.imshow(stretch(color) * (0.3 + 0.7 * image[..., None]))
    best = stretch((cells & (response >= np.quantile(shown, 0.75))).astype(float))
    for color, width in (('black', 1.8), ('white', 0.9)):
        axes.contour(best, levels=[0.5], colors=color, linewidths=width)
    axes.set_xlabel(f'{low:.2f} to {high:.2f}', labelpad=1)


def plot_response(subject: Subject, image: Image.Image) -> Figure:
    """Where in an image each head responds.

    Raises:
        ModelError: the model has no twist.
    """
    need_twist(subject)
    record = inside.observe(subject.model, subject.batch([image]))
    blocks = spread_blocks(subject, record.blocks)
    grey = np.asarray(Image.fromarray(pixels(subject, image)).convert('L')) / 255
    heads = next(iter(blocks.values())).response.shape[1]
    figure, left, panels = beside_image(subject, image, len(blocks), heads, 1.45)
    left.set_xlabel(verdict(subject, record.logits[0]))
    for row, (name, block) in zip(panels, blocks.items()):
        cells = inside.seen(heads, *block.h.shape[-2:]).numpy()
        for head, axes in enumerate(row):
            overlay(axes, grey, block.response[0, head].numpy(), cells[head])
            if row is panels[0]:
                axes.set_title(head_label(head))
        row[0].set_ylabel(block_label(name, block))
    notes = [
        'Colour: z . t, the cosine between the channels of a head and their twist, from dark (low) to light (high), in '
        'the range below each panel. Shading: the image. Outlined: the highest quarter of the cells. Without colour: '
        'the head looks at a neighbour beyond the map. Arrows: where a head looks in the image, where dy points down.'
    ]
    frame(figure, describe(subject, 'Where the heads respond'), notes)
    return figure


def spread_blocks(subject: Subject, blocks: dict[str, Block]) -> dict[str, Block]:
    """The blocks whose maps have neighbours in every direction. Raises ModelError where none has."""
    wide = {name: block for name, block in blocks.items() if min(block.h.shape[-2:]) > 1}
    if not wide:
        raise ModelError(f'{subject.path}: at {subject.img_size} pixels its maps are one cell each')
    return wide


def plot_features(subject: Subject, image: Image.Image, columns: int = 6) -> Figure:
    """The channels of the stem and of every stage that vary most over the image."""
    with torch.inference_mode():
        final, maps = subject.model.forward_intermediates(subject.batch([image]))
        logits = subject.model.forward_head(final)[0]
    columns = min(columns, *(stage.shape[1] for stage in maps))
    figure, left, panels = beside_image(subject, image, len(maps), columns, 0.92)
    figure.get_layout_engine().set(wspace=0.01, hspace=0.01)
    left.set_xlabel(verdict(subject, logits))
    for row, info, stage in zip(panels, subject.model.feature_info, maps):
        values = stage[0].numpy()  # (C, H, W)
        for axes, channel in zip(row, np.argsort(-values.std((1, 2)), kind='stable')):
            axes.imshow(values[channel], cmap=CMAP, vmin=0)
            axes.set_title(f'{channel}', pad=1.5, fontsize=7)
        row[0].set_ylabel(f'{info["module"]}\n{len(values)} {TIMES} {values.shape[1]}$^2$')
    note = (
        f'The {columns} channels of each stage that vary most over the image, by number, each from 0 (dark) to its '
        'highest value (light). Beside the name of a stage: its channels and cells.'
    )
    frame(figure, describe(subject, 'Feature maps'), [note])
    return figure


# ---------------------------------------------------------------------------------------------- the checkpoint


def plot_kernels(subject: Subject) -> Figure:
    """The kernels that the heads start from, and how far those of every block and head have moved.

    Raises:
        ModelError: the model has no twist, or started from random kernels, which no checkpoint keeps.
    """
    need_twist(subject)
    twists = {name: block.stci.twist for name, block in inside.blocks_of(subject.model).items()}
    first = next(iter(twists.values()))
    if not first.directional:
        raise ModelError(
            f'{subject.path}: {subject.name} starts from random kernels, which its checkpoint has not kept'
        )
    start = Twist(first.num_heads, first.c_red)
    start.reset_parameters()
    initial, trained = effective(start), {name: effective(twist) for name, twist in twists.items()}
    size = min(PAGE[0], 0.8 + 1.5 * first.num_heads), 1.05 * (1 + len(trained))
    figure, grid = plt.subplots(1 + len(trained), first.num_heads, figsize=size, squeeze=False, layout='constrained')
    for head, axes in enumerate(grid[0]):
        draw_kernel(axes, initial[head, 0], 0.8, '.1f')
        axes.set_title(head_label(head))
    grid[0, 0].set_ylabel('start')
    changes = {name: 1000 * (kernels - initial) for name, kernels in trained.items()}  # (heads, c_red, 3, 3)
    top = max(abs(change).max() for change in changes.values())
    for row, (name, change) in zip(grid[1:], changes.items()):
        for head, axes in enumerate(row):
            widest = abs(change[head]).argmax(0)  # the channel that moved most, tap by tap
            moved = np.take_along_axis(change[head], widest[None], 0)[0]
            draw_kernel(axes, moved, 1.6 * top, '+.1f' if top < 100 else '+.0f')
        row[0].set_ylabel(name)
    notes = [
        'Top: what every channel of a head starts from; the centre is the pixel itself, the row below it lies below it '
        'in the image. Other rows: trained minus start in thousandths, scale included, of the channel that changed '
        f'most at each tap. Largest change of all: {top / 1000:.4f}. Grey: size of the number.'
    ]
    frame(figure, describe(subject, 'Twist kernels at the start and their change'), notes)
    return figure


def draw_kernel(axes: Axes, values: np.ndarray, top: float, form: str) -> None:
    """A 3 x 3 kernel in numbers, shaded by their size; `top` is black."""
    axes.imshow(abs(values), cmap='Greys', vmin=0, vmax=top, aspect='auto')
    for (y, x), value in np.ndenumerate(values):
        text = f'{value:{form}}'.replace('-', '\N{MINUS SIGN}')
        text = '0' if not float(f'{value:{form}}') else text
        color = 'white' if abs(value) > 0.5 * top else 'black'
        axes.text(x, y, text, ha='center', va='center', color=color, fontsize=7)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(True)


def effective(twist: Twist) -> np.ndarray:
    """What a twist multiplies its input with: (heads, c_red, 3, 3)."""
    weight = twist.scale[0, :, None] * twist.dwconv.weight  # (heads * c_red, 1, 3, 3)
    return weight.detach().reshape(twist.num_heads, twist.c_red, 3, 3).numpy()


# ---------------------------------------------------------------------------------------------- directions


def rotate(image: Image.Image, angle: float) -> Image.Image:
    """Turn an image clockwise and keep the square that no corner enters, whatever the angle.

    Args:
        image: its shorter side gives the square: 1 / sqrt(2) of it.
        angle: degrees from the x axis towards the y axis, which points down.
    """
    side = int(min(image.size) / math.sqrt(2)) - 1
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.rotate(-angle, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))


def streaks(index: int) -> Image.Image:
    """A texture along 0 degrees, twice as large each way: the noise of synthetic.draw goes on at its edges."""
    return Image.fromarray(np.tile(synthetic.draw('streak000_period12', index), (2, 2))).convert('RGB')


def turn_streaks(index: int, angle: float) -> Image.Image:
    """A texture whose streaks run along `angle`, of the size and scale of the data set `synthetic`."""
    large = rotate(streaks(index), angle)
    edge = (large.width - synthetic.SIZE) // 2
    return large.crop((edge, edge, edge + synthetic.SIZE, edge + synthetic.SIZE))


def standardise(values: torch.Tensor) -> torch.Tensor:
    """Each head over all images, whose base levels differ: (images, heads) -> the same, mean 0 and deviation 1."""
    return (values - values.mean(0)) / values.std(0).clamp(min=1e-12)


def measure_directions(
    subject: Subject, views: Callable[[int, float], Image.Image], count: int, angles: list[int]
) -> dict[str, torch.Tensor]:
    """The standardised response of every head to `count` textures at every angle, by block: (count, angles, heads)."""
    found: dict[str, list[torch.Tensor]] = {}
    for index in tqdm(range(count), desc='turned textures', disable=None):
        record = inside.observe(subject.model, subject.batch(views(index, angle) for angle in angles))
        for name, block in spread_blocks(subject, record.blocks).items():
            found.setdefault(name, []).append(block.mean_response)
    return {name: standardise(torch.cat(rows)).unflatten(0, (count, -1)) for name, rows in found.items()}


def plot_direction(subject: Subject, image: Image.Image | None) -> Figure:
    """The response of the heads to textures turned from 0 to 180 degrees.

    Args:
        subject: the model.
        image: the texture that is turned; None for streaks of `synthetic`.

    Raises:
        ModelError: the model has no twist.
    """
    need_twist(subject)
    angles = list(range(0, 180, STEP))
    views, count, what = turn_streaks, TEXTURES, f'{TEXTURES} textures of streaks along an angle'
    if image is not None:
        views, count, what = lambda _, angle: rotate(image, angle), 1, 'the image, turned clockwise by an angle'
    responses = measure_directions(subject, views, count, angles)
    rows, columns = math.ceil(len(responses) / 2), min(2, len(responses))
    polar = dict(projection='polar')
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.5 * columns, 2.75 * rows), squeeze=False, layout='constrained', subplot_kw=polar
    )
    for axes in grid.flat[len(responses) :]:
        axes.remove()
    for axes, (name, values) in zip(grid.flat, responses.items()):  # (count, angles, heads)
        draw_directions(axes, angles, values)
        heads = values.shape[2]
        title = (
            f'{name}: {peaks(angles, values.mean(0).numpy())} of {heads} heads peak within {STEP}{DEGREE} of their own'
        )
        axes.set_title(name if image is not None else title)
    handles = [Line2D([], [], label=head_label(head), **head_style(head)) for head in range(heads)]
    notes = [
        f'Response of each head to {what} from 0 to 180{DEGREE}: mean of z . t over the map, standardised over all '
        f'images, from \N{MINUS SIGN}2 at the centre to 2; dashed: 0. Each curve is drawn twice, since an orientation '
        f'has two ends. Angles grow clockwise because dy points down in the image: the head of 45{DEGREE} looks to the '
        'lower right. Arrows: where the kernels look.',
        f'Bands: standard error over textures. By chance {heads * 3 * STEP / 180:.0f} of {heads} would peak there.'
        if image is None
        else "The image's own orientation is not known: compare the heads with one another.",
    ]
    frame(figure, describe(subject, 'Direction selectivity'), notes, handles)
    return figure


def peaks(angles: list[int], mean: np.ndarray) -> int:
    """How many heads respond most within a step of their own direction; mean is (angles, heads)."""
    best = np.array(angles)[mean.argmax(0)]
    return sum(min(abs(at - own), 180 - abs(at - own)) <= STEP for at, own in zip(best, ANGLES))


def head_style(head: int) -> dict:
    return dict(color=COLORS[(0, 1, 2, 5)[head]], linestyle=['-', *DASHES][head])


def draw_directions(axes: Axes, angles: list[int], values: torch.Tensor) -> None:
    """The mean of (count, angles, heads): a closed curve and an arrow a head; angles run clockwise as in the image."""
    low, high = -2.0, 2.0
    theta = np.deg2rad([*angles, *(angle + 180 for angle in angles), 360])
    axes.set_theta_direction(-1)
    axes.set(ylim=(low, high), yticks=[-1, 0, 1, 2], yticklabels=[])
    axes.set_thetagrids(range(0, 360, 45), [f'{angle}{DEGREE}' for angle in range(0, 180, 45)] + [''] * 4)
    axes.tick_params(axis='x', pad=0)
    axes.grid(color='0.85', linewidth=0.5)
    axes.plot(np.linspace(0, 2 * math.pi, 90), np.zeros(90), color='0.4', linewidth=0.7, linestyle=(0, (3, 2)))
    for head in range(values.shape[2]):
        style = head_style(head)
        curve = values[:, :, head].mean(0).numpy()
        around = np.concatenate([curve, curve, curve[:1]])
        axes.plot(theta, around.clip(low, high), **style)
        if len(values) > 1:
            error = values[:, :, head].std(0).numpy() / math.sqrt(len(values))
            error = np.concatenate([error, error, error[:1]])
            ends = (around - error).clip(low, high), (around + error).clip(low, high)
            axes.fill_between(theta, *ends, color=style['color'], alpha=0.15, linewidth=0)
        way = dict(arrowstyle='-|>', linewidth=1.0, shrinkA=0, shrinkB=0, color=style['color'])
        axes.annotate('', (math.radians(ANGLES[head]), high), (0, low), arrowprops=way, annotation_clip=False)


# ---------------------------------------------------------------------------------------------- command line

OF_IMAGE = {'interaction': plot_interaction, 'response': plot_response, 'features': plot_features}
VIEWS = (*OF_IMAGE, 'kernels', 'direction', *class_views.VIEWS)


def main(args: argparse.Namespace) -> None:
    """Draw the view args.view; of 'all', those that can be drawn, and name the others on stderr.

    Raises:
        RunError: the view cannot be drawn: an option is missing, the model has not what it shows, or an image or a data
            set cannot be read.
    """
    take_labels(args.labels)
    if args.checkpoint is None:
        raise RunError('--checkpoint is missing: the best.pt of a run')
    drawn = 0
    try:
        subject = inside.load(args.checkpoint)
        image = None if args.image is None else open_image(str(args.image.absolute()))
        survey = functools.cache(lambda: class_views.survey(subject, args))  # one pass for all views
        for view in VIEWS if args.view == 'all' else (args.view,):
            try:
                figure = draw(view, subject, image, survey)
            except (DataError, ModelError, RunError) as error:
                if args.view != 'all':
                    raise
                print(f'not drawn: {view}: {error}', file=sys.stderr)
                continue
            for path in save(figure, args.save_dir, view):
                print(path)
            drawn += 1
    except (DataError, ModelError) as error:
        raise RunError(str(error)) from error
    if not drawn:
        raise RunError('no view could be drawn')


def draw(view: str, subject: Subject, image: Image.Image | None, survey: Callable[[], class_views.Survey]) -> Figure:
    """One of VIEWS. Raises RunError where it needs an image and there is none; and what the views raise."""
    if view in OF_IMAGE:
        if image is None:
            raise RunError(f'{view} needs --image, the picture to look at')
        return OF_IMAGE[view](subject, image)
    if view == 'kernels':
        return plot_kernels(subject)
    if view == 'direction':
        return plot_direction(subject, image)
    return class_views.VIEWS[view](subject, survey())


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Pictures of what a trained TwistNet does, as PDF and PNG.')
    parser.add_argument('--view', choices=(*VIEWS, 'all'), default='all', help='all: every view the options allow')
    options.add_inside_args(parser)
    parser.add_argument('--labels', type=options.labels, default={}, metavar='KEY=NAME,..', help='names for data sets')
    parser.add_argument('--save_dir', type=Path, default=Path('figures'), help='made if missing')
    return parser


if __name__ == '__main__':
    with runs.user_errors('visualize.py'):
        main(get_args_parser().parse_args())
