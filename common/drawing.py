"""What all figures share: fonts, colours, the frame with title, legend and notes, and saving.

The only file that imports matplotlib, so that figures do not depend on the backend that the environment names (a
notebook exports its own, which fails where it is not installed) or on the user's matplotlibrc.
"""

import io
import math
import os
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

os.environ['MPLBACKEND'] = 'agg'
import matplotlib
import numpy as np
from PIL import Image

matplotlib.use('agg')
import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch as FancyBboxPatch  # `as`: for import from here
from matplotlib.ticker import MaxNLocator as MaxNLocator

from common.registry import MODELS
from common.runs import write_atomic

PAGE = (7.0, 9.0)  # inches: both columns of a page, and what its height leaves for a figure
OUTSIDE: dict[str, int] = {}  # models outside the registry, numbered as figures meet them
FONT = 'DejaVu Sans'  # comes with matplotlib: the figures are the same everywhere
OTHER_FONTS = {  # for letters that it lacks, where they are installed; matplotlib brings the first
    'STIXGeneral', 'Noto Sans CJK SC', 'Noto Sans CJK JP', 'WenQuanYi Micro Hei', 'WenQuanYi Zen Hei', 'PingFang SC',
    'Hiragino Sans', 'Malgun Gothic', 'Microsoft YaHei', 'Arial Unicode MS', 'Noto Sans Devanagari', 'Noto Sans Thai',
}  # fmt: skip
STYLE = {
    'font.family': [FONT, *sorted(OTHER_FONTS & {font.name for font in font_manager.fontManager.ttflist})],
    'font.size': 7.5,
    'text.parse_math': False,  # a $ in the name of a class is a $
    'axes.titlesize': 7.5,
    'axes.labelsize': 7.5,
    'xtick.labelsize': 7,
    'ytick.labelsize': 7,
    'legend.fontsize': 7,
    'legend.frameon': False,
    'legend.handlelength': 3.0,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.linewidth': 0.6,
    'xtick.major.width': 0.6,
    'ytick.major.width': 0.6,
    'lines.linewidth': 1.3,
    'lines.markersize': 3.5,
    'hatch.linewidth': 0.5,
    'pdf.fonttype': 42,  # TrueType: text stays text
    'savefig.dpi': 300,
}
matplotlib.rcdefaults()
plt.rcParams.update(STYLE)

# Okabe and Ito's palette, safe for colour-blind readers. Dashes and markers tell lines apart in grey print: 5 and 7
# have no common factor, so 35 models differ in one or the other.
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#000000', '#56B4E9')
DASHES = ((0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), '-', (0, (9, 2)))
MARKERS = ('s', '^', 'D', 'v', 'X', 'P', '<')
# Of the labels of a map: the palette without black, tints that none of it resembles, and grey for all others.
MAP_COLORS = [np.array(to_rgb(color)) for color in COLORS if color != '#000000']
MAP_COLORS += [0.5 + 0.5 * color for color in MAP_COLORS[1:5]]
MAP_COLORS.append(np.full(3, 0.6))
FULL = 'twistnet18'
CMAP = 'cividis'  # its lightness rises evenly: it reads in grey as well


def line_style(model: str) -> dict:
    """Colour, dashes and marker of a model, the same in every figure; TwistNet-18 has the blue and the circle."""
    if model == FULL:
        return dict(color=COLORS[0], linestyle='-', marker='o', linewidth=2.0)
    others = [name for name in MODELS if name != FULL]
    index = others.index(model) if model in others else len(others) + OUTSIDE.setdefault(model, len(OUTSIDE))
    return dict(color=COLORS[1 + index % 6], linestyle=DASHES[index % 5], marker=MARKERS[index % 7])


def make_panels(count: int, columns: int, size: tuple[float, float], **kwargs) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, row by row."""
    shape = math.ceil(count / columns), columns
    figure, grid = plt.subplots(*shape, figsize=size, squeeze=False, layout='constrained', **kwargs)
    for axes in grid.flat[count:]:
        axes.remove()
    return figure, list(grid.flat[:count])


def frame(figure: Figure, title: str, notes: Iterable[str] = (), handles: Iterable[Line2D] = ()) -> None:
    """Extend a figure upwards by its title and downwards by a legend and notes; the panels keep their size."""
    width, body = figure.get_size_inches()
    head = textwrap.wrap(title, int(17 * width))
    foot = [line for note in notes for line in textwrap.wrap(note, int(19.5 * width))]
    handles = list(handles)
    columns = max(1, int(width / (0.65 + 0.062 * max((len(handle.get_label()) for handle in handles), default=0))))
    top, bottom = 0.15 * len(head), 0.125 * len(foot) + 0.05
    legend = 0.15 * math.ceil(len(handles) / columns) + 0.1 * bool(handles)
    height = top + body + legend + bottom
    figure.set_size_inches(width, height)
    figure.get_layout_engine().set(rect=(0, (bottom + legend) / height, 1, body / height))
    figure.text(0.5, 1 - 0.03 / height, '\n'.join(head), ha='center', va='top', fontsize=8)
    figure.text(0.05 / width, 0.04 / height, '\n'.join(foot), ha='left', va='bottom', fontsize=7, linespacing=1.2)
    if handles:
        figure.legend(
            handles=handles, loc='lower center', bbox_to_anchor=(0.5, bottom / height), ncols=columns, borderaxespad=0.2
        )


def readable(name: str) -> str:
    """The name of a class with bytes that are not UTF-8 and control characters replaced: no font draws them."""
    return ''.join('\N{REPLACEMENT CHARACTER}' if unicodedata.category(c) in ('Cc', 'Cs') else c for c in name)


def heat_map(axes: Axes, values: np.ndarray, **style) -> None:
    """Draw a table in colours, row 0 on top, cell (i, j) from i, j to i + 1, j + 1; the caller sets the ticks.

    For one or two maps a figure: for each, seaborn renders the whole figure to see whether labels overlap.
    """
    import seaborn  # takes 0.3 s, which the figures of plot_results.py do without

    seaborn.heatmap(values, ax=axes, xticklabels=False, yticklabels=False, rasterized=True, **dict(cmap=CMAP) | style)


def save(figure: Figure, save_dir: Path, name: str, suffixes: Sequence[str] = ('pdf', 'png')) -> list[Path]:
    """Write a figure as PDF and PNG, or as `suffixes` say, each file whole or not at all; returns their paths.

    The same figure gives the same bytes of PDF.
    """
    save_dir.mkdir(parents=True, exist_ok=True)
    paths = [save_dir / f'{name}.{suffix}' for suffix in suffixes]
    for path in paths:
        buffer = io.BytesIO()
        metadata = {'CreationDate': None} if path.suffix == '.pdf' else None
        figure.savefig(buffer, format=path.suffix[1:], metadata=metadata)
        write_atomic(path, buffer.getvalue())
    plt.close(figure)
    return paths


# ---------------------------------------------------------------------------------------------- of classifications


def shorten(text: str, most: int) -> str:
    """A text of at most `most` letters: the middle of a longer one is left out."""
    text = readable(text)
    half = (most - 1) // 2
    return text if len(text) <= most else f'{text[: most - 1 - half]}\N{HORIZONTAL ELLIPSIS}{text[-half:]}'


def plot_thumbnails(
    title: str,
    panels: Sequence[tuple[np.ndarray, list[str]]],
    columns: int = 6,
    notes: Iterable[str] = (),
    tall: float = 0.95,
) -> Figure:
    """Pictures in rows, each with lines of text below; the last is a file name, which may take two lines.

    Args:
        panels: (H, W, 3) uint8, and the lines.
        columns: pictures per row.
        tall: height of a row of pictures over the width of one.
    """
    width, rows = PAGE[0] / columns, math.ceil(len(panels) / columns)
    letters = int(15 * width)  # of a line, no wider than a picture
    lines = len(panels[0][1]) + any(len(words[-1]) > letters for _, words in panels)
    size = PAGE[0], rows * (tall * width + 0.125 * lines + 0.1)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout='constrained')
    for axes in grid.flat:
        axes.axis('off')
    for axes, (picture, words) in zip(grid.flat, panels):
        axes.imshow(picture, interpolation='antialiased')
        name = shorten(words[-1], 2 * letters)
        text = [*(shorten(word, letters) for word in words[:-1]), name[:letters], name[letters:]]
        axes.text(0, -0.03, '\n'.join(filter(None, text)), transform=axes.transAxes, va='top', fontsize=7)
    frame(figure, title, notes)
    return figure


def thumbnail(image: Image.Image, side: int = 320) -> np.ndarray:
    """A PIL image as (H, W, 3) uint8 of at most `side` pixels."""
    image = image.copy()
    image.thumbnail((side, side))
    return np.asarray(image)


def plot_confusion(counts: np.ndarray, classes: list[str], title: str, notes: Iterable[str] = ()) -> Figure:
    """A confusion matrix, whose page grows with its classes: colours are shares of a row, numbers are images.

    Args:
        counts: (K, K) images by true class and prediction.
    """
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    count, names = len(classes), [shorten(name, 28) for name in classes]
    cell = min(0.42, max(0.12, 4.6 / count), 30 / count)  # inches
    font = min(7, 60 * cell)
    many = count > 30  # the way to a name is long: names above too, and a line every ten classes
    body, margin = cell * count, 0.065 * font / 7 * (max(map(len, names)) + 6)
    page = max(3.5, body + margin + 1.0), max(1.2, body) + margin * (1 + many)
    figure, axes = plt.subplots(figsize=page, layout='constrained')
    fits = 0.055 * len(str(counts.max())) + 0.04 <= cell
    numbers = np.where(counts, counts.astype(str), '') if fits else None
    bar = dict(label='% of the true class', ticks=[0, 1, 5, 10, 25, 50, 100], fraction=0.05, aspect=25, pad=0.01)
    style = dict(cmap='Blues', norm=PowerNorm(0.5, 0, 100))  # a single confusion of many images can be seen
    style |= dict(linewidths=min(0.4, 2 * cell), linecolor='0.88', square=True)
    style |= dict(annot=numbers, fmt='', annot_kws=dict(fontsize=6.5))
    heat_map(axes, shares, cbar_kws=bar | dict(shrink=min(0.9, 4 / body)), **style)
    axes.set_xticks(np.arange(count) + 0.5, names, rotation=90, fontsize=font)
    axes.set_yticks(np.arange(count) + 0.5, [f'{n} ({k})' for n, k in zip(names, counts.sum(1))], fontsize=font)
    axes.tick_params(length=0, pad=2, labeltop=many)
    for draw_lines in (axes.hlines, axes.vlines):
        draw_lines(range(10, count * many, 10), 0, count, color='0.6', linewidth=0.4)
    axes.set(xlabel='predicted class', ylabel='true class (images)')
    frame(figure, title, notes)
    return figure


def plot_label_map(
    scan: np.ndarray,
    labels: np.ndarray,
    certain: np.ndarray,
    edges: tuple[np.ndarray, np.ndarray],
    classes: list[str],
    title: str,
    notes: Iterable[str] = (),
) -> Figure:
    """A scan, and beside it or below the same with every cell in the colour of its label, with a legend.

    Args:
        scan: (h, w, 3) uint8, reduced.
        labels: (rows, columns) class indices.
        certain: (rows, columns) probability of the label: the colour is the stronger, the higher it is.
        edges: of the cells, top to bottom and left to right, in pixels of the scan that was reduced.
    """
    counts = Counter(labels.ravel().tolist()).most_common()
    ranks = {label: min(rank, len(MAP_COLORS) - 1) for rank, (label, _) in enumerate(counts)}  # the last is for others
    height, width = scan.shape[:2]
    beside = height > 0.8 * width
    wide = PAGE[0] / (1 + beside)
    tall = min(wide * height / width, PAGE[1] / (2 - beside) - 0.5)
    shape = (1, 2) if beside else (2, 1)
    figure, (left, right) = plt.subplots(*shape, figsize=(PAGE[0], tall * shape[0]), layout='constrained')
    extent = (0, edges[1][-1], edges[0][-1], 0)
    grey = 90 + 0.65 * scan.mean(2)  # dark parts would hide their colour
    left.imshow(scan, extent=extent)
    right.imshow(grey, cmap='gray', vmin=0, vmax=255, extent=extent)
    cells = np.vectorize(ranks.get)(labels)
    colors = np.dstack([np.array(MAP_COLORS)[cells], 0.25 + 0.5 * certain])
    right.pcolormesh(*edges[::-1], colors, rasterized=True)
    for axes in (left, right):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    sides = np.diff(edges[0]).min() * tall / edges[0][-1], np.diff(edges[1]).min() * wide / edges[1][-1]
    if min(sides) > 0.13:  # inches: a number fits
        y, x = ((cuts[1:] + cuts[:-1]) / 2 for cuts in edges)
        for (i, j), rank in np.ndenumerate(cells):
            number = rank + 1 if rank < len(MAP_COLORS) - 1 else ''
            right.text(x[j], y[i], number, ha='center', va='center', fontsize=6)
    handles = []
    for rank, color in enumerate(MAP_COLORS[: cells.max() + 1]):
        last = rank == len(MAP_COLORS) - 1
        name = f'others ({len(counts) - rank})' if last else f'{rank + 1} {shorten(classes[counts[rank][0]], 28)}'
        share = (cells == rank).mean()
        label = f'{name}, {100 * share:.0f} %' if share >= 0.01 else f'{name}, <1 %'
        handles.append(Line2D([], [], linestyle='', marker='s', markersize=7, color=color, label=label))
    frame(figure, title, notes, handles)
    return figure
