"""What all figures share: fonts, colours, the frame with title, legend and notes, labels of points, and saving.

The only file that imports matplotlib, so that figures do not depend on the backend that the environment names (a
notebook exports its own, which fails where it is not installed) or on the user's matplotlibrc.
"""

import contextlib
import functools
import io
import math
import os
import sys
import textwrap
import unicodedata
import warnings
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
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator as MaxNLocator

from common.errors import RunError
from common.registry import MODELS, entry_of, model_label, plain_model
from common.runs import write_atomic

PAGE = (7.0, 9.0)  # inches: both columns of a page, and what its height leaves for a figure
OUTSIDE: dict[str, int] = {}  # models outside the registry, numbered as figures meet them
UNKNOWN: set[str] = set()  # letters that no font has and that were reported
FONT = 'DejaVu Sans'  # comes with matplotlib: the figures are the same everywhere
STYLE = {
    'font.family': FONT,
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
SHARES = 'Blues'  # of a table that is mostly empty: nothing is white


def line_style(model: str) -> dict:
    """Colour, dashes and marker of a model, the same in every figure; TwistNet-18 has the blue and the circle."""
    if model == FULL:
        return dict(color=COLORS[0], linestyle='-', marker='o', linewidth=2.0)
    others = [name for name in MODELS if name != FULL]
    index = others.index(model) if model in others else len(others) + OUTSIDE.setdefault(model, len(OUTSIDE))
    return dict(color=COLORS[1 + index % 6], linestyle=DASHES[index % 5], marker=MARKERS[index % 7])


def fill_color(model: str) -> str:
    """Dark for TwistNet-18, middle for the others with STCI and for its trunk, light for those without."""
    return (
        '#0072B2'
        if model == FULL
        else '#80BFE8'
        if {'twist', 'stci'} & entry_of(plain_model(model)).keys()
        else '#D0D0D0'
    )


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
    find_fonts(figure)


def readable(name: str) -> str:
    """The name of a class with bytes that are not UTF-8 and control characters replaced: no font draws them."""
    return ''.join('\N{REPLACEMENT CHARACTER}' if unicodedata.category(c) in ('Cc', 'Cs') else c for c in name)


def find_fonts(figure: Figure) -> None:
    """Set an installed font for the texts that FONT cannot write; letters that no font has are reported on stderr."""
    own = letters_of(font_manager.findfont(FONT))
    foreign = {text: letters for text in figure.findobj(Text) if (letters := {*text.get_text()} - own - {'\n'})}
    if not (lacking := frozenset().union(*foreign.values())):
        return
    families, unknown = fonts_for(lacking)
    for text in foreign:
        text.set_fontfamily([FONT, *families])
    if unknown:
        warnings.filterwarnings('ignore', 'Glyph .* missing from')  # matplotlib's own, one a letter and a size
    if told := unknown - UNKNOWN:
        shown = ' '.join(sorted(told)[:10]) + ' ..' * (len(told) > 10)
        print(f'no installed font has {shown}: drawn as boxes; fonts-noto-cjk, say, has Chinese ones', file=sys.stderr)
        UNKNOWN.update(told)


@functools.cache
def letters_of(path: str) -> frozenset[str]:
    """The letters of a font file; none where it cannot be read."""
    try:
        return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()


@functools.cache
def fonts_for(letters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """Names of installed fonts that together have the letters, and the letters that none of them has."""
    manager = font_manager.fontManager
    for path in {*font_manager.findSystemFonts()} - {font.fname for font in manager.ttflist}:
        with contextlib.suppress(OSError, RuntimeError):
            manager.addfont(path)  # installed after matplotlib made its list

    def preference(font: font_manager.FontEntry) -> tuple:  # regular ones first, and those without serifs
        return font.style != 'normal', abs(font.weight - 400), 'Sans' not in font.name, font.name

    names = []
    for font in sorted(manager.ttflist, key=preference):
        # The font of last resort has a box for every letter.
        if not font.name.startswith('Last Resort') and letters & letters_of(font.fname):
            names.append(font.name)
            letters -= letters_of(font.fname)
        if not letters:
            break
    return names, letters


def heat_map(axes: Axes, values: np.ndarray, **style) -> None:
    """Draw a table in colours, row 0 on top, cell (i, j) from i, j to i + 1, j + 1; the caller sets the ticks.

    For one or two maps a figure: for each, seaborn renders the whole figure to see whether labels overlap.
    """
    import seaborn  # takes 0.3 s, which the figures of plot_results.py do without

    seaborn.heatmap(values, ax=axes, xticklabels=False, yticklabels=False, rasterized=True, **dict(cmap=CMAP) | style)


def save(figure: Figure, save_dir: Path, name: str, suffixes: Sequence[str] = ('pdf', 'png')) -> list[Path]:
    """Write a figure as PDF and PNG, or as `suffixes` say, each file whole or not at all; returns their paths.

    The same figure gives the same bytes of PDF.

    Raises:
        RunError: the folder or a file cannot be written.
    """
    paths = [save_dir / f'{name}.{suffix}' for suffix in suffixes]
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        for path in paths:
            buffer = io.BytesIO()
            metadata = {'CreationDate': None} if path.suffix == '.pdf' else None
            figure.savefig(buffer, format=path.suffix[1:], metadata=metadata)
            write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise RunError(f'{save_dir}: cannot be written ({error.strerror})') from error
    finally:
        plt.close(figure)
    return paths


def label_points(axes: Axes, points: list[tuple[str, float, float, float]]) -> None:
    """Write names near their points, over no other name, point or whisker; an ambiguous one gets a line to its point.

    Each name takes the cheapest of 576 places around its point: overlaps of it or of its line cost most, then distance
    and ambiguity. Left and right come first.

    Args:
        points: name, x, y and spread of each.
    """
    unit = axes.figure.dpi / 72  # a point in pixels
    inside = axes.get_window_extent().extents
    turns = np.arange(32) * math.pi / 16
    turns = turns[np.argsort(abs(np.sin(turns)).round(6), kind='stable')]
    reach = np.repeat(np.geomspace(5, 160, 18) * unit, len(turns))
    ways = np.tile(np.stack([np.cos(turns), np.sin(turns)], 1), (18, 1))
    centers = axes.transData.transform([(x, y) for _, x, y, _ in points]) if points else np.zeros((0, 2))
    marks = np.concatenate([centers - 3.5 * unit, centers + 3.5 * unit], 1)  # left, bottom, right, top
    ends = [axes.transData.transform([(x, y - sd), (x, y + sd)]) for _, x, y, sd in points]
    names = [(low[0] - unit, low[1], high[0] + unit, high[1]) for low, high in ends]  # whiskers, then names and lines
    for index in sorted(range(len(points)), key=lambda i: (points[i][0] != model_label(FULL), points[i][2])):
        name, center = points[index][0], centers[index]
        bold = 'bold' if name == model_label(FULL) else 'normal'
        text = axes.text(0, 0, name, ha='center', va='center', fontsize=7, fontweight=bold, zorder=6)
        half = np.array(text.get_window_extent().size) / 2
        middles, tips = center + ways * (reach[:, None] + half), center + ways * reach[:, None]
        boxes = np.concatenate([middles - half, middles + half], 1)
        lines = center + np.linspace(0.2, 1, 10)[:, None, None] * (tips - center)  # (10, candidates, 2)
        barred = np.array([*np.delete(marks, index, 0), *names[len(points) :]]).reshape(-1, 4)
        crossed = sum(_overlaps(np.tile(line, 2), barred) > 0 for line in lines)
        outside = ((boxes[:, :2] < inside[:2]) | (boxes[:, 2:] > inside[2:])).any(1)
        gaps = np.linalg.norm(np.clip(centers, middles[:, None] - half, middles[:, None] + half) - centers, axis=2)
        others = np.delete(gaps, index, axis=1).min(1, initial=math.inf)
        doubtful = others < gaps[:, index] + 4 * unit
        covers = _overlaps(boxes, marks) + _overlaps(boxes, np.array(names)) + 10 * outside
        best = int(np.argmin(1000 * covers + 60 * crossed + reach / unit + 12 * doubtful))
        text.set_position(axes.transData.inverted().transform(middles[best]))
        names.append(tuple(boxes[best]))
        if doubtful[best] or reach[best] > 9 * unit:
            line = axes.transData.inverted().transform([center, tips[best]])
            axes.plot(*line.T, color='0.5', linewidth=0.5, zorder=1, scalex=False, scaley=False, label='leader')
            names += [(x, y, x, y) for x, y in lines[:, best]]


def _overlaps(boxes: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """How many of the boxes taken (left, bottom, right, top) each box meets."""
    if not len(taken):
        return np.zeros(len(boxes), int)
    low, high = np.maximum(boxes[:, None, :2], taken[:, :2]), np.minimum(boxes[:, None, 2:], taken[:, 2:])
    return (low <= high).all(-1).sum(1)


# ---------------------------------------------------------------------------------------------- of classifications


def shorten(text: str, most: int) -> str:
    """A text of at most `most` letters: the middle of a longer one is left out."""
    text = readable(text)
    half = (most - 1) // 2
    return text if len(text) <= most else f'{text[: most - 1 - half]}\N{HORIZONTAL ELLIPSIS}{text[-half:]}'


def plot_thumbnails(
    title: str, panels: Sequence[tuple[np.ndarray, list[str]]], columns: int = 6, notes: Iterable[str] = ()
) -> Figure:
    """Pictures in rows, each with lines of text below in black and, in grey, the name of its file.

    Args:
        title: of the figure.
        panels: (H, W, 3) uint8, and the lines, of which the last is the name and takes two lines if it is long.
        columns: pictures in a row.
        notes: below.
    """
    width = PAGE[0] / columns
    letters = int(15.5 * width)
    names = [shorten(words[-1], 2 * letters) for _, words in panels]
    lines = len(panels[0][1]) + any(len(name) > letters for name in names)
    side, row = 0.93 * width, 0.95 * width + 0.125 * lines + 0.07  # inches, as the axes count
    rows = math.ceil(len(panels) / columns)
    figure = plt.figure(figsize=(PAGE[0], rows * row), layout='constrained')
    axes = figure.add_subplot(xlim=(0, PAGE[0]), ylim=(rows * row, 0), aspect='equal')
    axes.axis('off')
    for index, (picture, words) in enumerate(panels):
        left, top = index % columns * width + 0.035 * width, index // columns * row
        high, wide = (side * n / max(picture.shape[:2]) for n in picture.shape[:2])
        x, y = left + (side - wide) / 2, top + (side - high) / 2
        axes.imshow(picture, extent=(x, x + wide, y + high, y), interpolation='antialiased')
        black = [shorten(text, letters) for text in words[:-1]]
        grey = [names[index][:letters], names[index][letters:]]
        for line, text in enumerate([*black, *grey]):
            color = 'black' if line < len(black) else '0.4'
            axes.text(left, top + side + 0.03 + 0.125 * line, text, va='top', fontsize=7, color=color)
    axes.set(xlim=(0, PAGE[0]), ylim=(rows * row, 0))
    frame(figure, title, notes)
    return figure


def thumbnail(image: Image.Image, side: int = 320) -> np.ndarray:
    """A PIL image as (H, W, 3) uint8 of at most `side` pixels."""
    image = image.copy()
    image.thumbnail((side, side))
    return np.asarray(image)


def plot_confusion(counts: np.ndarray, classes: list[str], title: str, notes: Iterable[str] = ()) -> Figure:
    """A confusion matrix whose page grows with its classes; colours are shares of a row, numbers are images.

    Args:
        counts: (K, K) images by true class and prediction.
        classes: their names.
        title: of the figure.
        notes: below.
    """
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(0.42, max(0.12, 4.6 / len(classes)), 30 / len(classes))  # inches of a cell
    font = min(7, 60 * size)
    names = [shorten(name, 28) for name in classes]
    margin = 0.065 * font / 7 * (max(map(len, names)) + 6)
    many = len(classes) > 30  # the way to a name is long: names above too, and a line every ten classes
    body = size * len(classes)
    page = max(3.5, body + margin + 1.0), max(1.2, body) + margin * (1 + many)
    figure = plt.figure(figsize=page, layout='constrained')
    axes = figure.add_subplot(aspect='equal')
    scale = PowerNorm(0.5, 0, 100)  # a single confusion of many images can be seen
    lines = dict(edgecolors='0.88', linewidth=min(0.4, 2 * size), rasterized=len(classes) > 150)
    drawn = axes.pcolormesh(shares, cmap=SHARES, norm=scale, **lines)
    middles = np.arange(len(classes)) + 0.5
    axes.set_xticks(middles, names, rotation=90, fontsize=font)
    axes.set_yticks(middles, [f'{name} ({n})' for name, n in zip(names, counts.sum(1))], fontsize=font)
    axes.tick_params(length=0, pad=2, labeltop=many)
    for place in range(10, len(classes) * many, 10):
        axes.axhline(place, color='0.6', linewidth=0.4)
        axes.axvline(place, color='0.6', linewidth=0.4)
    axes.spines[:].set_visible(False)
    axes.invert_yaxis()
    axes.set(xlabel='predicted class', ylabel='true class (images)')
    if 0.055 * len(str(counts.max())) + 0.04 <= size:
        for i, j in np.argwhere(counts):
            color = 'white' if scale(shares[i, j]) > 0.55 else 'black'
            axes.text(j + 0.5, i + 0.5, counts[i, j], ha='center', va='center', fontsize=6.5, color=color)
    ticks = [0, 1, 5, 10, 25, 50, 100]
    bar = figure.colorbar(
        drawn, label='% of the true class', fraction=0.05, aspect=25, shrink=min(0.9, 4 / body), pad=0.01, ticks=ticks
    )
    bar.outline.set_visible(False)
    frame(figure, title, notes)
    return figure


def share_text(share: float) -> str:
    return f'{100 * share:.0f} %' if share >= 0.01 else '<1 %'


def plot_label_map(
    scan: np.ndarray,
    labels: np.ndarray,
    certain: np.ndarray,
    edges: tuple,
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
        classes: their names.
        title: of the figure.
        notes: below.
    """
    counts, named = Counter(labels.ravel().tolist()).most_common(), len(MAP_COLORS) - 1
    color_of = {label: MAP_COLORS[min(rank, named)] for rank, (label, _) in enumerate(counts)}
    rows, columns = (
        np.searchsorted(cuts[1:-1], (np.arange(n) + 0.5) * cuts[-1] / n, side='right')
        for cuts, n in zip(edges, scan.shape)
    )
    colors = np.array([[color_of[label] for label in line] for line in labels.tolist()])[rows[:, None], columns]
    strength = 0.25 + 0.5 * certain[rows[:, None], columns][..., None]
    grey = 0.35 + 0.65 * scan.mean(2, keepdims=True) / 255  # dark parts would hide their colour
    height, width = scan.shape[:2]
    beside = height > 0.8 * width
    wide = PAGE[0] / (1 + beside)
    tall = min(wide * height / width, PAGE[1] / (2 - beside) - 0.5)
    figure, both = plt.subplots(
        *((1, 2) if beside else (2, 1)), figsize=(PAGE[0], tall * (2 - beside)), layout='constrained'
    )
    extent = (0, edges[1][-1], edges[0][-1], 0)
    both[0].imshow(scan, extent=extent)
    both[1].imshow((1 - strength) * grey + strength * colors, extent=extent)
    for axes in both:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    numbers = {label: str(rank + 1) for rank, (label, _) in enumerate(counts[:named])}
    cell = min(np.diff(edges[0]).min() * tall / edges[0][-1], np.diff(edges[1]).min() * wide / edges[1][-1])
    if cell > 0.13:  # inches
        for (i, j), label in np.ndenumerate(labels):
            x, y = (edges[1][j] + edges[1][j + 1]) / 2, (edges[0][i] + edges[0][i + 1]) / 2
            both[1].text(x, y, numbers.get(label, ''), ha='center', va='center', fontsize=6)
    legend = [(f'{numbers[label]} {shorten(classes[label], 28)}', color_of[label], n) for label, n in counts[:named]]
    if others := counts[named:]:
        legend.append((f'others ({len(others)})', MAP_COLORS[-1], sum(n for _, n in others)))
    square = dict(linestyle='', marker='s', markersize=7)
    handles = [Line2D([], [], **square, color=c, label=f'{t}, {share_text(n / labels.size)}') for t, c, n in legend]
    frame(figure, title, notes, handles)
    return figure
