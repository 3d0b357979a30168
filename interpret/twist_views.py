"""The views of visualize.py of the twists: their kernels, and how the heads respond to rotated textures."""

import math

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from common import synthetic
from common.drawing import COLORS, DASHES, PAGE, Axes, Figure, Line2D, frame, heat_map, make_panels, plt
from common.errors import RunError
from interpret import trace
from interpret.image_views import ANGLES, DEGREE, TIMES, head_label, title_of_model
from models import Twist, blocks_of
from training.trained import TrainedModel
from transforms import normalize

STEP = 15  # degrees between two rotations
STREAKS, STREAKS_PERIOD = 'streak000_period12', 12  # a class of common/synthetic.py, along the x axis; pixels
TEXTURES = 10  # rotated textures of streaks
CELLS, PERIOD = 12, 3  # side of the map that a texture fills and period of its streaks, in cells of a block
RANGE = 1.5  # of the polar plots, in standard deviations
STYLES = [dict(color=COLORS[i], linestyle=line) for i, line in zip((0, 1, 2, 5), ('-', *DASHES))]  # of the heads


# ---------------------------------------------------------------------------------------------- kernels


def plot_kernels(subject: TrainedModel) -> Figure:
    """The initial kernels of the heads, and the change of the kernels of every block and head."""
    twists = {name: block.stci.twist for name, block in blocks_of(subject.model).items()}
    first = next(iter(twists.values()))
    start = Twist(first.num_heads, first.c_red)
    start.reset_parameters()
    initial = effective_kernels(start)
    changes = {name: 1000 * (effective_kernels(twist) - initial) for name, twist in twists.items()}
    largest = max(abs(change).max() for change in changes.values())
    shown = {'start': initial[:, 0]}  # (heads, 3, 3)
    for name, change in changes.items():  # (heads, c_red, 3, 3): of the channel that changed most, tap by tap
        shown[name] = np.take_along_axis(change, abs(change).argmax(1)[:, None], 1)[:, 0]
    values = np.block([list(kernels) for kernels in shown.values()])  # the first three rows are the start
    size = min(PAGE[0], 0.8 + 1.5 * first.num_heads), 0.2 + 0.35 * len(values)
    figure, axes = plt.subplots(figsize=size, layout='constrained')
    shade = abs(values) / np.array([0.8] * 3 + [1.6 * largest or 1] * (len(values) - 3))[:, None]  # 1 is black
    forms = ['.1f'] * 3 + ['+.1f' if largest < 100 else '+.0f'] * (len(values) - 3)
    texts = [[format(value, form) for value in row] for row, form in zip(values, forms)]
    texts = [['0' if not float(text) else text.replace('-', '\N{MINUS SIGN}') for text in row] for row in texts]
    heat_map(axes, shade, cmap='Greys', vmin=0, vmax=1, cbar=False, annot=texts, fmt='', annot_kws=dict(fontsize=7))
    axes.hlines(range(0, len(values) + 1, 3), 0, values.shape[1], color='black', linewidth=0.8, clip_on=False)
    axes.vlines(range(0, values.shape[1] + 1, 3), 0, len(values), color='black', linewidth=0.8, clip_on=False)
    axes.set_xticks(3 * np.arange(first.num_heads) + 1.5, map(head_label, range(first.num_heads)))
    axes.set_yticks(3 * np.arange(len(shown)) + 1.5, shown, rotation=90, va='center')
    axes.tick_params(length=0, top=True, labeltop=True, labelbottom=False)
    notes = [
        'Top: the initial kernel of every channel of a head; the centre is the pixel itself, the row below it lies '
        'below it in the image. Other rows: trained minus initial in thousandths, scale included, of the channel that '
        f'changed most at each tap. Largest change of all: {largest / 1000:.4f}. Grey: size of the number.'
    ]
    frame(figure, title_of_model(subject, 'Twist kernels at the start and their change'), notes)
    return figure


def effective_kernels(twist: Twist) -> np.ndarray:
    """The kernels of a twist with its scale included: (heads, c_red, 3, 3)."""
    weight = twist.scale[0, :, None] * twist.dwconv.weight  # (heads * c_red, 1, 3, 3)
    return weight.detach().reshape(twist.num_heads, twist.c_red, 3, 3).numpy()


# ---------------------------------------------------------------------------------------------- rotated textures


def middle(image: Image.Image, side: int) -> Image.Image:
    """The square in the middle of an image."""
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def rotate(image: Image.Image, angle: float) -> Image.Image:
    """Rotate an image clockwise, by degrees, and crop the square that contains no corner at any angle."""
    side = int(min(image.size) / math.sqrt(2)) - 1
    if side < 2:
        raise RunError(f'--image: {image.width} {TIMES} {image.height} pixels are too small to be rotated')
    return middle(image.rotate(-angle, Image.Resampling.BICUBIC), side)


def rotated_streaks(index: int, angle: float, side: int) -> Image.Image:
    """A texture of streaks along `angle`, CELLS / PERIOD periods wide, rotated at four times its size to stay sharp."""
    texture = Image.fromarray(synthetic.draw(STREAKS, index)).convert('RGB')
    fine = rotate(texture.resize((4 * synthetic.SIZE, 4 * synthetic.SIZE), Image.Resampling.BICUBIC), angle)
    return middle(fine, 4 * CELLS * STREAKS_PERIOD // PERIOD).resize((side, side), Image.Resampling.BICUBIC)


def standardise(values: torch.Tensor) -> torch.Tensor:
    """Scale every head to mean 0 and deviation 1 over the images, as their levels differ: (images, heads)."""
    return (values - values.mean(0)) / values.std(0).clamp(min=1e-12)


def direction_responses(
    subject: TrainedModel, angles: list[int], image: Image.Image | None = None
) -> dict[str, torch.Tensor]:
    """The standardised response of every head at every angle, by block: (textures, angles, heads).

    Streaks that an early block resolves are too fine for a late one, whose cells are 16 or 32 pixels apart, so they
    are scaled to the cells of each block. An image is rotated at its own scale: (1, angles, heads).
    """
    by_block: dict[str, list[torch.Tensor]] = {}
    if image is not None:
        record = trace.observe(subject.model, subject.batch(rotate(image, angle) for angle in angles))
        by_block = {name: [block.mean_response] for name, block in trace.wide_blocks(subject, record.blocks).items()}
    else:
        blank = trace.observe(subject.model, torch.zeros(1, 3, 128, 128))
        strides = {name: 128 // block.h.shape[-1] for name, block in blank.blocks.items()}  # pixels a cell
        steps = [(stride, index) for stride in sorted(set(strides.values())) for index in range(TEXTURES)]
        for stride, index in tqdm(steps, desc='rotated textures', disable=None):
            rotated = [rotated_streaks(index, angle, CELLS * stride) for angle in angles]
            batch = torch.stack([pil_to_tensor(view) for view in rotated])
            record = trace.observe(subject.model, normalize(batch, *subject.preprocessing.statistics))
            for name in (name for name in strides if strides[name] == stride):
                by_block.setdefault(name, []).append(record.blocks[name].mean_response)
    return {name: standardise(torch.cat(rows)).unflatten(0, (len(rows), -1)) for name, rows in by_block.items()}


def plot_direction(subject: TrainedModel, image: Image.Image | None) -> Figure:
    """The response of the heads to an image, or to streaks of common/synthetic.py, rotated from 0 to 180 degrees."""
    angles = list(range(0, 180, STEP))
    responses = direction_responses(subject, angles, image)
    columns, polar = min(2, len(responses)), dict(projection='polar')
    size = 3.5 * columns, 2.75 * math.ceil(len(responses) / columns)
    figure, panels = make_panels(len(responses), columns, size, subplot_kw=polar)
    heads = next(iter(responses.values())).shape[2]
    for axes, (name, values) in zip(panels, responses.items()):  # (textures, angles, heads)
        draw_polar(axes, angles, values)
        count = peaks_at_own_direction(angles, values.mean(0).numpy())
        title = f'{name}: {count} of {heads} heads peak within {STEP}{DEGREE} of their own'
        axes.set_title(title if image is None else name)
    if image is None:
        what = f'{TEXTURES} textures of streaks, {PERIOD} cells of the block apart, along an angle'
        chance = heads * 3 * STEP / 180
        caution = f'Bands: standard error over textures. By chance {chance:.0f} of {heads} would peak there.'
    else:
        what = 'the image, rotated clockwise by an angle'
        caution = "The image's own orientation is not known: compare the heads with one another."
    notes = [
        f'Response of each head to {what} from 0 to 180{DEGREE}: mean of z . t over the map, standardised over all '
        f'images, from \N{MINUS SIGN}{RANGE} at the centre to {RANGE}; dashed: 0. Each curve is drawn twice, since an '
        'orientation has two ends. Angles grow clockwise because dy points down in the image: the head of '
        f'45{DEGREE} looks to the lower right. Arrows: where the kernels look.',
        caution,
    ]
    handles = [Line2D([], [], label=head_label(head), **STYLES[head]) for head in range(heads)]
    frame(figure, title_of_model(subject, 'Direction selectivity'), notes, handles)
    return figure


def peaks_at_own_direction(angles: list[int], mean: np.ndarray) -> int:
    """The number of heads whose highest response is within a step of their own direction; mean is (angles, heads)."""
    best = np.array(angles)[mean.argmax(0)]
    return sum(min(abs(at - angle), 180 - abs(at - angle)) <= STEP for at, angle in zip(best, ANGLES))


def draw_polar(axes: Axes, angles: list[int], values: torch.Tensor) -> None:
    """Draw the mean of (textures, angles, heads): a closed curve and an arrow a head, clockwise as in the image."""
    low, high = -RANGE, RANGE
    theta = np.deg2rad([*angles, *(angle + 180 for angle in angles), 360])
    around = [*range(len(angles)), *range(len(angles)), 0]  # the angles of theta
    axes.set_theta_direction(-1)
    axes.set(ylim=(low, high), yticks=[-1, 0, 1], yticklabels=[])
    axes.set_thetagrids(range(0, 360, 45), [f'{angle}{DEGREE}' for angle in range(0, 180, 45)] + [''] * 4)
    axes.tick_params(axis='x', pad=0)
    axes.grid(color='0.85', linewidth=0.5)
    axes.plot(np.linspace(0, 2 * math.pi, 90), np.zeros(90), color='0.4', linewidth=0.7, linestyle=(0, (3, 2)))
    for head, style in enumerate(STYLES[: values.shape[2]]):
        curve = values[:, around, head].mean(0).numpy()
        axes.plot(theta, curve.clip(low, high), **style)
        if len(values) > 1:
            error = values[:, around, head].std(0).numpy() / math.sqrt(len(values))
            ends = (curve - error).clip(low, high), (curve + error).clip(low, high)
            axes.fill_between(theta, *ends, color=style['color'], alpha=0.15, linewidth=0)
        way = dict(arrowstyle='-|>', linewidth=1.0, shrinkA=0, shrinkB=0, color=style['color'])
        axes.annotate('', (math.radians(ANGLES[head]), high), (0, low), arrowprops=way, annotation_clip=False)
