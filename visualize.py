"""Pictures of what a trained model does, each as PDF and as PNG; their paths are printed.

    python visualize.py --checkpoint runs/main/dtd_fold1_twistnet18_seed42/best.pt \\
        --image data/dtd/images/banded/banded_0001.jpg --view response
    python visualize.py --checkpoint runs/demo/synthetic_fold1_twistnet18_seed42/best.pt --view all

interaction, response and features need --image; kernels needs the checkpoint alone; direction rotates --image, or
streaks of `synthetic` without one; selection, classes and tsne run over a subset of the data set that the run was
trained on, wherever --dataset, --data_dir and --fold say it is now: another split than the run's is refused, as its
images may have trained the model (--other_images takes them, and the figure says so). features and tsne are of any
model, the others of those with STCI. Gates by epoch: plot_results.py --plot gate.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from common import options, synthetic
from common.drawing import COLORS, DASHES, PAGE, Axes, Figure, Line2D, frame, heat_map, plt, save
from common.errors import RunError, UserError, user_errors
from datasets import open_image
from interpret import class_views, image_views, trace
from interpret.image_views import ANGLES, DEGREE, TIMES, describe, head_label, need_twist, spread_blocks
from interpret.trace import Subject
from models import Twist, blocks_of
from transforms import normalize

STEP = 15  # degrees between two rotations
STREAKS = 'streak000_period12'  # of synthetic.py: along the x axis
TEXTURES = 10  # streaks that are turned
CELLS, PERIOD = 12, 3  # side of the map they are shown on and distance between two streaks, in cells of a block
RANGE = 1.5  # of the polar plots, in standard deviations


# ---------------------------------------------------------------------------------------------- the checkpoint


def plot_kernels(subject: Subject) -> Figure:
    """The kernels that the heads start from, and how far those of every block and head have moved.

    Raises:
        ModelError: the model has no twist, or started from random kernels.
    """
    need_twist(subject)
    twists = {name: block.stci.twist for name, block in blocks_of(subject.model).items()}
    first = next(iter(twists.values()))
    start = Twist(first.num_heads, first.c_red)
    start.reset_parameters()
    initial, trained = effective(start), {name: effective(twist) for name, twist in twists.items()}
    changes = {name: 1000 * (kernels - initial) for name, kernels in trained.items()}  # (heads, c_red, 3, 3)
    top = max(abs(change).max() for change in changes.values())
    shown = {'start': initial[:, 0]}  # (heads, 3, 3)
    for name, change in changes.items():  # of the channel that moved most, tap by tap
        shown[name] = np.take_along_axis(change, abs(change).argmax(1)[:, None], 1)[:, 0]
    values = np.block([list(kernels) for kernels in shown.values()])
    words = [f'{value:.1f}' for value in values[:3].flat]
    words += [f'{value:{"+.1f" if top < 100 else "+.0f"}}' for value in values[3:].flat]
    words = ['0' if not float(text) else text.replace('-', '\N{MINUS SIGN}') for text in words]
    shade = abs(values) / np.array([0.8] * 3 + [1.6 * top or 1] * (len(values) - 3))[:, None]  # 1 is black
    size = min(PAGE[0], 0.8 + 1.5 * first.num_heads), 0.2 + 0.35 * len(values)
    figure, axes = plt.subplots(figsize=size, layout='constrained')
    annotation = dict(annot=np.reshape(words, values.shape), fmt='', annot_kws=dict(fontsize=7))
    heat_map(axes, shade, cmap='Greys', vmin=0, vmax=1, cbar=False, **annotation)
    axes.hlines(range(0, len(values) + 1, 3), 0, values.shape[1], color='black', linewidth=0.8, clip_on=False)
    axes.vlines(range(0, values.shape[1] + 1, 3), 0, len(values), color='black', linewidth=0.8, clip_on=False)
    axes.set_xticks(3 * np.arange(first.num_heads) + 1.5, map(head_label, range(first.num_heads)))
    axes.set_yticks(3 * np.arange(len(shown)) + 1.5, shown, rotation=90, va='center')
    axes.tick_params(length=0, top=True, labeltop=True, labelbottom=False)
    notes = [
        'Top: what every channel of a head starts from; the centre is the pixel itself, the row below it lies below it '
        'in the image. Other rows: trained minus start in thousandths, scale included, of the channel that changed '
        f'most at each tap. Largest change of all: {top / 1000:.4f}. Grey: size of the number.'
    ]
    frame(figure, describe(subject, 'Twist kernels at the start and their change'), notes)
    return figure


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

    Raises:
        RunError: that square would be a single pixel or less.
    """
    side = int(min(image.size) / math.sqrt(2)) - 1
    if side < 2:
        raise RunError(f'--image: {image.width} {TIMES} {image.height} pixels are too small to be turned')
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.rotate(-angle, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))


def turn_streaks(index: int, angle: float, side: int) -> Image.Image:
    """A texture of streaks along `angle`, CELLS / PERIOD periods wide, drawn large so that turning does not blur it."""
    texture = Image.fromarray(synthetic.draw(STREAKS, index)).convert('RGB')
    fine = rotate(texture.resize((4 * synthetic.SIZE, 4 * synthetic.SIZE), Image.Resampling.BICUBIC), angle)
    kept = 4 * CELLS * 12 // PERIOD  # STREAKS are 12 pixels apart
    edge = (fine.width - kept) // 2
    return fine.crop((edge, edge, edge + kept, edge + kept)).resize((side, side), Image.Resampling.BICUBIC)


def standardise(values: torch.Tensor) -> torch.Tensor:
    """Each head over all images, whose base levels differ: (images, heads) -> the same, mean 0 and deviation 1."""
    return (values - values.mean(0)) / values.std(0).clamp(min=1e-12)


def measure_directions(
    subject: Subject, angles: list[int], image: Image.Image | None = None, textures: int = TEXTURES
) -> dict[str, torch.Tensor]:
    """The standardised response of every head at every angle, by block: (textures, angles, heads).

    What an early block sees as a direction is too fine for a late one, whose neighbours lie 16 or 32 pixels apart. So
    the streaks are scaled to the cells of each block. An image is turned as it is: (1, angles, heads).
    """
    found: dict[str, list[torch.Tensor]] = {}
    if image is not None:
        record = trace.observe(subject.model, subject.batch(rotate(image, angle) for angle in angles))
        found = {name: [block.mean_response] for name, block in spread_blocks(subject, record.blocks).items()}
    else:
        blank = torch.zeros(1, 3, 128, 128)
        blocks = trace.observe(subject.model, blank).blocks
        strides = {name: 128 // block.h.shape[-1] for name, block in blocks.items()}  # pixels between two cells
        steps = [(stride, index) for stride in sorted(set(strides.values())) for index in range(textures)]
        for stride, index in tqdm(steps, desc='turned textures', disable=None):
            turned = [turn_streaks(index, angle, CELLS * stride) for angle in angles]
            batch = normalize(torch.stack([pil_to_tensor(view) for view in turned]))
            record = trace.observe(subject.model, batch)
            for name in (name for name, own in strides.items() if own == stride):
                found.setdefault(name, []).append(record.blocks[name].mean_response)
    return {name: standardise(torch.cat(rows)).unflatten(0, (len(rows), -1)) for name, rows in found.items()}


def plot_direction(subject: Subject, image: Image.Image | None) -> Figure:
    """The response of the heads to textures turned from 0 to 180 degrees.

    Args:
        subject: the model.
        image: the texture that is turned; None for streaks of `synthetic`.

    Raises:
        ModelError: the heads of the model look in no direction. RunError: the image is too small.
    """
    need_twist(subject)
    angles = list(range(0, 180, STEP))
    what = f'{TEXTURES} textures of streaks, {PERIOD} cells of the block apart, along an angle'
    if image is not None:
        what = 'the image, turned clockwise by an angle'
    responses = measure_directions(subject, angles, image)
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
        f'images, from \N{MINUS SIGN}{RANGE} at the centre to {RANGE}; dashed: 0. Each curve is drawn twice, since an '
        'orientation has two ends. Angles grow clockwise because dy points down in the image: the head of '
        f'45{DEGREE} looks to the lower right. Arrows: where the kernels look.',
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
    low, high = -RANGE, RANGE
    theta = np.deg2rad([*angles, *(angle + 180 for angle in angles), 360])
    axes.set_theta_direction(-1)
    axes.set(ylim=(low, high), yticks=[-1, 0, 1], yticklabels=[])
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

VIEWS = (*image_views.VIEWS, 'kernels', 'direction', *class_views.VIEWS)
OF_ANY_MODEL = ('features', 'tsne')


def main(args: argparse.Namespace) -> None:
    """Draw the view args.view; of 'all', those that can be drawn, and name the others on stderr.

    Raises:
        RunError: the view cannot be drawn: an option is missing, the model has not what it shows, or an image or a data
            set cannot be read.
    """
    if args.checkpoint is None:
        raise RunError('--checkpoint is missing: the best.pt of a run')
    drawn = 0
    subject = trace.load(args.checkpoint)
    image = None if args.image is None else open_image(str(args.image.absolute()))
    survey = functools.cache(lambda: class_views.survey(subject, args))  # one pass for all views
    for view in VIEWS if args.view == 'all' else (args.view,):
        try:
            figure = draw(view, subject, image, survey)
        except UserError as error:
            if args.view != 'all':
                raise
            print(f'not drawn: {view}: {error}', file=sys.stderr)
            continue
        for path in save(figure, args.save_dir, view):
            print(path)
        drawn += 1
    if not drawn:
        raise RunError('no view could be drawn')


def draw(view: str, subject: Subject, image: Image.Image | None, survey: Callable[[], class_views.Survey]) -> Figure:
    """One of VIEWS. Raises RunError where it needs an image and there is none; and what the views raise."""
    if view not in OF_ANY_MODEL:
        trace.need_stci(subject)
    if view in image_views.VIEWS:
        if image is None:
            raise RunError(f'{view} needs --image, the picture to look at')
        return image_views.VIEWS[view](subject, image)
    if view == 'kernels':
        return plot_kernels(subject)
    if view == 'direction':
        return plot_direction(subject, image)
    return class_views.VIEWS[view](subject, survey())


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Pictures of what a trained model does, as PDF and PNG.')
    parser.add_argument('--view', choices=(*VIEWS, 'all'), default='all', help='all: every view the options allow')
    options.add_inside_args(parser)
    options.add_labels_arg(parser)
    parser.add_argument('--save_dir', type=Path, default=Path('figures'), help='made if missing')
    return parser


if __name__ == '__main__':
    with user_errors('visualize.py'):
        main(get_args_parser().parse_args())
