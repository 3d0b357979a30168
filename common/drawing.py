"""What all figures share: fonts, colours, the frame with title, legend and notes, labels of points, and saving.

The only file that imports matplotlib, so that figures do not depend on the backend that the environment names (a
notebook exports its own, which fails where it is not installed) or on the user's matplotlibrc.
"""

import contextlib
import functools
import math
import os
import sys
import textwrap
import unicodedata
import warnings
from collections.abc import Iterable
from pathlib import Path

os.environ['MPLBACKEND'] = 'agg'
import matplotlib
import numpy as np

matplotlib.use('agg')
import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch as FancyBboxPatch  # `as`: for import from here
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator as MaxNLocator

from common.errors import RunError
from common.registry import MODELS, entry_of, model_label

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
FULL = 'twistnet18'
CMAP = 'cividis'  # its lightness rises evenly: it reads in grey as well


def line_style(model: str) -> dict:
    """Colour, dashes and marker of a model, the same in every figure; TwistNet-18 has the blue and the circle."""
    if model == FULL:
        return dict(color=COLORS[0], linestyle='-', marker='o', linewidth=2.0)
    others = [name for name in MODELS if name != FULL]
    index = others.index(model) if model in others else len(others) + OUTSIDE.setdefault(model, len(OUTSIDE))
    return dict(color=COLORS[1 + index % 6], linestyle=DASHES[index % 5], marker=MARKERS[index % 7])


def fill_color(model: str) -> str:
    """Dark for TwistNet-18, middle for the others with STCI and for its trunk, light for those without."""
    return '#0072B2' if model == FULL else '#80BFE8' if {'twist', 'stci'} & entry_of(model).keys() else '#D0D0D0'


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


def save(figure: Figure, save_dir: Path, name: str) -> list[Path]:
    """Write a figure as PDF and PNG and return their paths. The same figure gives the same bytes of PDF."""
    paths = [save_dir / f'{name}.{suffix}' for suffix in ('pdf', 'png')]
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        for path in paths:
            figure.savefig(path, metadata={'CreationDate': None} if path.suffix == '.pdf' else None)
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
