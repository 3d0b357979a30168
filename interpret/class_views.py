"""The views of visualize.py over a data set: selection by block and class, class patterns, t-SNE of the features."""

import argparse
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy.cluster.hierarchy import dendrogram, linkage
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import NearestNeighbors
from tqdm import tqdm

from common.drawing import COLORS, MARKERS, PAGE, Axes, Figure, frame, heat_map, plt, readable
from common.errors import ModelError
from common.images import open_image
from common.registry import model_label
from interpret import trace
from interpret.image_views import ANGLES, DEGREE
from models import blocks_of, gates_of
from training import trained
from training.trained import TrainedModel

NEIGHBOURS = 5
BATCH = 16
NBSP = '\N{NO-BREAK SPACE}'


class Survey(NamedTuple):
    """What a model computes for the n images of a subset."""

    of: str  # the subset in words, with a caution where it may have trained the model
    labels: np.ndarray  # (n,) class indices
    features: np.ndarray  # (n, num_features)
    accuracy: float  # percent
    signatures: dict[str, np.ndarray]  # by block: means over the map before selection, (n, heads, channels per head)
    selection: dict[str, np.ndarray]  # by block: AIS's weights, the same shape; empty without AIS
    c_red: int  # 0 without blocks


def survey_subset(subject: TrainedModel, args: argparse.Namespace) -> Survey:
    """Run the model over a subset of a data set.

    Args:
        args: of trained.data_of; subset.

    Raises:
        RunError: as trained.data_of. DataError: the data set cannot be read, or a class has one image in the subset.
    """
    data = trained.data_of(args, subject)
    splits, subset = data.splits, args.subset or 'test'
    items = getattr(splits, subset)
    labels = np.array([label for _, label in items])
    trace.need_two(labels, splits.classes, f'the {subset} set of fold {splits.fold} of {splits.root or splits.dataset}')

    def extract(record: trace.Record) -> dict:
        found = dict(features=record.features, logits=record.logits)
        for name, block in record.blocks.items():
            found['signatures', name] = block.interactions.mean((-1, -2))
            if block.selection is not None:
                found['selection', name] = block.selection
        return found

    starts = tqdm(range(0, len(items), BATCH), desc=f'{subset} images of {splits.dataset}', disable=None)
    batches = (
        subject.batch(open_image(path, data.bits) for path, _ in items[start : start + BATCH]) for start in starts
    )
    arrays = trace.collect(subject.model, batches, extract)
    caution = f', {data.caution}' if data.caution else ''
    return Survey(
        of=f'{len(items)} {subset} images of {data.label}, fold {splits.fold}{caution}',
        labels=labels,
        features=arrays['features'],
        accuracy=100 * (arrays['logits'].argmax(1) == labels).mean(),
        signatures={key[1]: values for key, values in arrays.items() if key[0] == 'signatures'},
        selection={key[1]: values for key, values in arrays.items() if key[0] == 'selection'},
        c_red=next((block.stci.c_red for block in blocks_of(subject.model).values()), 0),
    )


def title_of_survey(subject: TrainedModel, what: str, survey: Survey) -> str:
    return (
        f'{what}: {model_label(subject.name)}, epoch {subject.epoch}, {survey.of} '
        f'({survey.accuracy:.1f} % right, chance {100 / len(subject.classes):.1f}{NBSP}%)'
    )


def class_means(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n, ..) -> (classes, ..)."""
    return np.stack([values[labels == label].mean(0) for label in range(labels.max() + 1)])


def list_classes(axes: Axes, names: list[str], shift: float = 0.0) -> None:
    """Label a row for each class, at `shift`, 1 + `shift` and so on."""
    axes.set_yticks(np.arange(len(names)) + shift, map(readable, names))
    axes.tick_params(axis='y', length=0)


def label_groups(axes: Axes, names: Iterable[str], widths: list[int]) -> None:
    """Label groups of adjacent columns of a heat map, with white lines between them."""
    edges = np.cumsum([0, *widths])
    axes.set_xticks((edges[1:] + edges[:-1]) / 2, names)
    axes.tick_params(axis='x', length=0)
    for edge in edges[1:-1]:
        axes.axvline(edge, color='white', linewidth=1.5)


def head_names(subject: TrainedModel, heads: int) -> list[str]:
    """The direction of each head; its number where it has none."""
    return [f'{angle}{DEGREE}' for angle in ANGLES[:heads]] if subject.directional else [*map(str, range(1, heads + 1))]


def line_height(classes: int) -> float:
    """Inches of a row, so that 47 classes fit a page."""
    return min(0.17, max(0.105, 6.0 / classes))


# ---------------------------------------------------------------------------------------------- selection


def plot_class_selection(subject: TrainedModel, survey: Survey) -> Figure:
    """AIS's weights and the gate of every block, and the weights by class. Raises ModelError without AIS."""
    if not survey.selection:
        raise ModelError(f'{subject.path}: {subject.name} has no AIS')
    classes, gates = len(subject.classes), gates_of(subject.model)
    height = max(1.6, line_height(classes) * classes + 0.6)
    figure = plt.figure(figsize=(PAGE[0], 1.75 + height), layout='constrained')
    grid = figure.add_gridspec(2, len(survey.selection), height_ratios=[1.75, height])
    names = head_names(subject, next(iter(survey.selection.values())).shape[1])
    first, table = None, {}  # the weights of the heads by class, by the label of a group of columns
    for column, (name, weights) in enumerate(survey.selection.items()):
        axes = first = figure.add_subplot(grid[0, column], sharey=first)
        draw_weights(axes, weights, survey.c_red, names)
        axes.set_title(f'{name}, gate {gates[name]:.3f}')
        axes.set_ylabel('AIS weight' if column == 0 else '')
        axes.tick_params(labelleft=column == 0)
        for order, part in (('1st', weights[:, :, : survey.c_red]), ('2nd', weights[:, :, survey.c_red :])):
            if part.shape[2]:
                table[f'{name}\n{order} order'] = class_means(part.mean(2), survey.labels)  # (classes, heads)
    axes = figure.add_subplot(grid[1, :])
    values = np.concatenate([*table.values()], 1)
    values = 100 * (values - values.mean(0))
    bound = abs(values).max()
    label = 'weight of the class above\nthe mean of classes (points of 100)'
    heat_map(axes, values, vmin=-bound, vmax=bound, cbar_kws=dict(label=label, pad=0.01, aspect=25))
    list_classes(axes, subject.classes, 0.5)
    label_groups(axes, table, [len(names)] * len(table))
    notes = [
        "Top: AIS's weight of every channel, mean over images; filled: first order (z), open: products, head by head; "
        'grey: standard deviation over images. The gate is what the block lets through of its branch. Bottom: a column '
        f'per head ({", ".join(names)}), mean over its channels.'
    ]
    frame(figure, title_of_survey(subject, 'Selection', survey), notes)
    return figure


def draw_weights(axes: Axes, weights: np.ndarray, c_red: int, names: list[str]) -> None:
    """Draw the weights of a block by channel, (n, heads, channels), labelled by head."""
    heads, channels = weights.shape[1:]
    mean, sd = weights.mean(0), weights.std(0)
    x = np.arange(heads * channels).reshape(heads, channels)
    axes.vlines(x.ravel(), (mean - sd).ravel(), (mean + sd).ravel(), color='0.75', linewidth=0.6, zorder=1)
    circle = dict(linestyle='none', marker='o', mec=COLORS[0], mew=0.5)
    axes.plot(x[:, c_red:].ravel(), mean[:, c_red:].ravel(), ms=1.9, mfc='white', **circle)
    axes.plot(x[:, :c_red].ravel(), mean[:, :c_red].ravel(), ms=2.4, mfc=COLORS[0], **circle)
    for edge in x[1:, 0] - 0.5:
        axes.axvline(edge, color='0.6', linewidth=0.5)
    axes.set_xticks(x.mean(1), names)
    axes.tick_params(axis='x', length=0)
    axes.margins(x=0.02)


# ---------------------------------------------------------------------------------------------- class patterns


def plot_classes(subject: TrainedModel, survey: Survey) -> Figure:
    """Mean products of each class in the last block, clustered."""
    trace.need_products(subject)
    name, signatures = list(survey.signatures.items())[-1]
    products = signatures[:, :, survey.c_red :]
    heads, pairs = products.shape[1:]
    flat = products.reshape(len(products), -1)
    means = class_means(flat, survey.labels)
    spread = means.std(0)
    values = (means - means.mean(0)) / np.where(spread > 0, spread, 1)
    tree = linkage(values, 'average', optimal_ordering=True)
    classes = len(subject.classes)
    figure = plt.figure(figsize=(PAGE[0], max(1.8, line_height(classes) * classes + 0.5)), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=[1, 6])
    with plt.rc_context({'lines.linewidth': 0.8}):
        drawn = dendrogram(tree, ax=left, orientation='left', color_threshold=0, above_threshold_color='black')
    left.set_axis_off()
    left.set_ylim(10 * classes, 0)
    bar = dict(label='class mean, standardised over classes', pad=0.01, aspect=25)
    heat_map(right, values[drawn['leaves']], vmin=-2.5, vmax=2.5, cbar_kws=bar)
    list_classes(right, [subject.classes[label] for label in drawn['leaves']], 0.5)
    names = [f'{text} head' if subject.directional else f'head {text}' for text in head_names(subject, heads)]
    label_groups(right, names, [pairs] * heads)
    notes = [
        f'Mean of the {pairs} products z_i t_j of every head over the map and the images of a class, each column '
        'standardised over the classes. Tree: average linkage of Euclidean distances. Share of the variance among '
        f'images that lies between classes: {100 * between(flat, survey.labels):.0f} % (median over products; '
        f'{100 * (classes - 1) / (len(flat) - 1):.0f} % by chance).'
    ]
    frame(figure, title_of_survey(subject, f'Class patterns in {name}', survey), notes)
    return figure


def between(values: np.ndarray, labels: np.ndarray) -> float:
    """Between-class share of the variance over images, the median over columns that vary: (n, columns) -> [0, 1]."""
    total = ((values - values.mean(0)) ** 2).sum(0)
    means = class_means(values, labels)[labels]
    within = ((values - means) ** 2).sum(0)
    varies = total > 1e-12
    return float(np.median(1 - within[varies] / total[varies])) if varies.any() else 0.0


# ---------------------------------------------------------------------------------------------- t-SNE


def neighbours_right(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Share of the nearest neighbours of each image, itself excluded, that have its class: (n,)."""
    count = min(NEIGHBOURS, len(features) - 1)
    index = NearestNeighbors(n_neighbors=count, algorithm='brute').fit(features).kneighbors(return_distance=False)
    return (labels[index] == labels[:, None]).mean(1)


def class_style(label: int) -> dict:
    """Marker and colour of a class: 98 classes differ, and 14 of them in grey print too."""
    group = label // 7
    color = COLORS[(label + group // 2 + 3 * (group % 2)) % 7]
    return dict(marker=MARKERS[label % 7], mec=color, mfc='white' if group % 2 else color)


def plot_tsne(subject: TrainedModel, survey: Survey) -> Figure:
    """t-SNE of what the classifier reads; beside it, in all dimensions, how often a neighbour has the class."""
    scaled = survey.features / np.linalg.norm(survey.features, axis=1, keepdims=True).clip(1e-12)
    perplexity = min(30.0, max(2.0, len(scaled) / 5))
    plane = TSNE(perplexity=perplexity, init='pca', random_state=0, n_jobs=1).fit_transform(scaled)
    right, near = silhouette_samples(scaled, survey.labels), neighbours_right(scaled, survey.labels)
    classes = len(subject.classes)
    height = max(3.4, line_height(classes) * classes + 0.4)
    figure = plt.figure(figsize=(PAGE[0], height), layout='constrained')
    scatter, bars = figure.subplots(1, 2, width_ratios=[1.7, 1])
    for label in range(classes):
        scatter.plot(*plane[survey.labels == label].T, linestyle='none', ms=3.2, mew=0.6, **class_style(label))
    scatter.set(xticks=[], yticks=[], aspect='equal', adjustable='box', anchor='N')
    scatter.spines[:].set_visible(True)
    scatter.set_title(f't-SNE, perplexity {perplexity:.0f}')
    share = 100 * class_means(near, survey.labels)
    bars.barh(range(classes), share, 0.7, color='#80BFE8', edgecolor='black', linewidth=0.4)
    for label in range(classes):
        spot = dict(transform=bars.get_yaxis_transform(), clip_on=False, ms=3.6, mew=0.6)
        bars.plot(-0.045, label, linestyle='none', **spot, **class_style(label))
    list_classes(bars, subject.classes)
    bars.tick_params(axis='y', pad=12)
    chance = 100 * float((np.bincount(survey.labels)[survey.labels] - 1).mean()) / (len(survey.labels) - 1)
    bars.axvline(chance, color='black', linewidth=0.8, linestyle=(0, (3, 2)))
    bars.set(xlim=(0, 100), ylim=(classes - 0.4, -0.6), xlabel='neighbours of the same class (%)')
    bars.set_title(
        f'all images: {100 * near.mean():.1f} %; silhouette {right.mean():+.2f}'.replace('-', '\N{MINUS SIGN}')
    )
    notes = [
        f'Left: the {survey.features.shape[1]} features that the classifier reads, at unit length; distances between '
        f'groups mean nothing. Right, in all {survey.features.shape[1]} dimensions: share of the {NEIGHBOURS} nearest '
        'neighbours that are of the class (dashed: by chance), and the legend.'
    ]
    frame(figure, title_of_survey(subject, 'Features by class', survey), notes)
    return figure
