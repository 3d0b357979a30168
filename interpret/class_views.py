"""The views of visualize.py over a data set: selection by block and class, class patterns, t-SNE of the features."""

import argparse
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from scipy.cluster.hierarchy import dendrogram, linkage
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from common.drawing import COLORS, MARKERS, PAGE, Axes, Figure, frame, heat_map, plt, readable
from common.images import open_image
from common.registry import model_label
from interpret import trace
from interpret.image_views import ANGLES, DEGREE
from models import blocks_of, gates_of
from training import trained
from training.trained import TrainedModel

NEIGHBOURS = 5
BATCH = 16
PAGEFUL, FEW = 47, 20  # classes that a page has room for, and those drawn where there are more
NBSP = '\N{NO-BREAK SPACE}'


class Survey(NamedTuple):
    """What a model computes for the n images of a subset."""

    of: str  # the subset in words, with a caution where it may have trained the model
    labels: np.ndarray  # (n,) class indices
    features: np.ndarray  # (n, num_features)
    accuracy: float  # percent
    selection: dict[str, np.ndarray]  # by block: AIS's weights, (n, heads, channels per head); empty without AIS
    c_red: int = 0  # of the channels per head, those of first order, which come first
    products: np.ndarray | None = None  # of the last block: means over the map, (n, heads, products per head)


def survey_subset(subject: TrainedModel, args: argparse.Namespace) -> Survey:
    """Run the model over a subset of a data set; args: of trained.data_of; subset."""
    data = trained.data_of(args, subject)
    splits, subset = data.splits, args.subset or 'test'
    items = getattr(splits, subset)
    labels = np.array([label for _, label in items])
    trace.need_two(labels, splits.classes, f'the {subset} set of fold {splits.fold} of {splits.root or splits.dataset}')

    def extract(record: trace.Record) -> dict:
        found = dict(features=record.features, logits=record.logits)
        for name, block in record.blocks.items():
            found['products'] = block.interactions[:, :, block.c_red :].mean((-1, -2))  # the last block's stay
            if block.selection is not None:
                found['selection', name] = block.selection
        return found

    starts = tqdm(range(0, len(items), BATCH), desc=f'{subset} images of {splits.dataset}', disable=None)
    batches = (
        subject.batch(open_image(path, data.bits) for path, _ in items[start : start + BATCH]) for start in starts
    )
    found = trace.collect(subject.model, batches, extract)
    blocks, caution = blocks_of(subject.model), f', {data.caution}' if data.caution else ''
    return Survey(
        of=f'{len(items)} {subset} images of {data.label}, fold {splits.fold}{caution}',
        labels=labels,
        features=found['features'],
        accuracy=100 * (found['logits'].argmax(1) == labels).mean(),
        selection={name: found[key] for name in blocks if (key := ('selection', name)) in found},
        c_red=next((block.stci.c_red for block in blocks.values()), 0),
        products=found.get('products'),
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


def class_table(
    axes: Axes, values: np.ndarray, classes: list[str], groups: Collection[str], bound: float, label: str
) -> None:
    """Draw a row per class in colours from -bound to bound; groups: names of as many equal parts of the columns."""
    heat_map(axes, values, vmin=-bound, vmax=bound, cbar_kws=dict(label=label, pad=0.01, aspect=25))
    list_classes(axes, classes, 0.5)
    edges = np.linspace(0, values.shape[1], len(groups) + 1)
    axes.set_xticks((edges[1:] + edges[:-1]) / 2, groups)
    axes.tick_params(axis='x', length=0)
    for edge in edges[1:-1]:
        axes.axvline(edge, color='white', linewidth=1.5)


def head_names(subject: TrainedModel, heads: int) -> list[str]:
    """The direction of each head; its number where it has none."""
    return [f'{angle}{DEGREE}' if subject.directional else str(head + 1) for head, angle in enumerate(ANGLES[:heads])]


def height_of(rows: Collection) -> float:
    """Inches of as many rows; PAGEFUL of them fit a page."""
    return len(rows) * min(0.17, max(0.105, 6.0 / len(rows)))


def most_telling(values: np.ndarray) -> np.ndarray:
    """The classes to draw of (classes, columns): all in order, of more than a page those furthest from the mean."""
    if len(values) <= PAGEFUL:
        return np.arange(len(values))
    return np.argsort(-np.linalg.norm(values - values.mean(0), axis=1), kind='stable')[:FEW]


def left_out(classes: list[str], drawn: np.ndarray) -> str:
    """A note where a figure draws a part of the classes."""
    if len(drawn) == len(classes):
        return ''
    return (
        f'Drawn: the {len(drawn)} classes furthest from the mean of all. {len(classes) - len(drawn)} are left out; the '
        'CSV beside this figure has all.'
    )


# ---------------------------------------------------------------------------------------------- selection

ClassTable = tuple[list[str], np.ndarray]  # the names of columns, and (classes, columns)


def tabulate_selection(subject: TrainedModel, survey: Survey) -> ClassTable:
    """AIS's weight by class, block, order and head, above its mean over the classes, in points of 100."""
    columns, values, c_red = [], [], survey.c_red
    for name, weights in survey.selection.items():
        for order, part in (('1st', weights[:, :, :c_red]), ('2nd', weights[:, :, c_red:])):
            if part.shape[2]:
                columns += [f'{name} {order} order {head}' for head in head_names(subject, part.shape[1])]
                values.append(class_means(part.mean(2), survey.labels))
    values = np.concatenate(values, 1)
    return columns, 100 * (values - values.mean(0))


def plot_class_selection(subject: TrainedModel, survey: Survey) -> Figure:
    """AIS's weights and the gate of every block, and the weights by class."""
    gates, c_red = gates_of(subject.model), survey.c_red
    columns, values = tabulate_selection(subject, survey)
    drawn = most_telling(values)
    height = max(1.6, height_of(drawn) + 0.6)
    figure = plt.figure(figsize=(PAGE[0], 1.75 + height), layout='constrained')
    grid = figure.add_gridspec(2, len(survey.selection), height_ratios=[1.75, height])
    names = head_names(subject, next(iter(survey.selection.values())).shape[1])
    first = None
    for column, (name, weights) in enumerate(survey.selection.items()):
        axes = first = figure.add_subplot(grid[0, column], sharey=first)
        draw_weights(axes, weights, c_red, names)
        axes.set_title(f'{name}, gate {gates[name]:.3f}')
        axes.set_ylabel('AIS weight' if column == 0 else '')
        axes.tick_params(labelleft=column == 0)
    label = 'weight of the class above\nthe mean of classes (points of 100)'
    groups = [column.rsplit(' ', 1)[0].replace(' ', '\n', 1) for column in columns[:: len(names)]]
    classes = [subject.classes[row] for row in drawn]
    class_table(figure.add_subplot(grid[1, :]), values[drawn], classes, groups, abs(values).max(), label)
    notes = [
        "Top: AIS's weight of every channel, mean over images; filled: first order (z), open: products, head by head; "
        'grey: standard deviation over images. The gate is what the block lets through of its branch. Bottom: a column '
        f'per head ({", ".join(names)}), mean over its channels.',
        left_out(subject.classes, drawn),
    ]
    frame(figure, title_of_survey(subject, 'Selection', survey), notes)
    return figure


def draw_weights(axes: Axes, weights: np.ndarray, c_red: int, names: list[str]) -> None:
    """Draw the weights of a block by channel, (n, heads, channels), labelled by head."""
    heads, channels = weights.shape[1:]
    mean, sd = weights.mean(0), weights.std(0)  # (heads, channels)
    x = np.arange(heads * channels).reshape(heads, channels)
    axes.vlines(x, mean - sd, mean + sd, color='0.75', linewidth=0.6, zorder=1)
    for part, size, face in ((slice(c_red, None), 1.9, 'white'), (slice(c_red), 2.4, COLORS[0])):
        circle = dict(marker='o', ms=size, mfc=face, mec=COLORS[0], mew=0.5)
        axes.plot(x[:, part].ravel(), mean[:, part].ravel(), linestyle='none', **circle)
    for edge in x[1:, 0] - 0.5:
        axes.axvline(edge, color='0.6', linewidth=0.5)
    axes.set_xticks(x.mean(1), names)
    axes.tick_params(axis='x', length=0)
    axes.margins(x=0.02)


# ---------------------------------------------------------------------------------------------- class patterns


def tabulate_products(subject: TrainedModel, survey: Survey) -> ClassTable:
    """Mean products of each class in the last block, standardised over the classes."""
    heads, pairs = survey.products.shape[1:]
    flat = survey.products.reshape(len(survey.labels), -1)
    columns = [f'{head} product {pair + 1}' for head in head_names(subject, heads) for pair in range(pairs)]
    return columns, StandardScaler().fit_transform(class_means(flat, survey.labels))


def plot_classes(subject: TrainedModel, survey: Survey) -> Figure:
    """Mean products of each class in the last block, clustered."""
    name = list(blocks_of(subject.model))[-1]
    heads, pairs = survey.products.shape[1:]
    flat = survey.products.reshape(len(survey.labels), -1)
    _, values = tabulate_products(subject, survey)
    rows = most_telling(values)
    values, classes = values[rows], [subject.classes[row] for row in rows]
    tree = linkage(values, 'average', optimal_ordering=True)
    figure = plt.figure(figsize=(PAGE[0], max(1.8, height_of(classes) + 0.5)), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=[1, 6])
    with plt.rc_context({'lines.linewidth': 0.8}):
        drawn = dendrogram(tree, ax=left, orientation='left', color_threshold=0, above_threshold_color='black')
    left.set_axis_off()
    left.set_ylim(10 * len(classes), 0)
    order = drawn['leaves']
    names = [f'{text} head' if subject.directional else f'head {text}' for text in head_names(subject, heads)]
    label = 'class mean, standardised over classes'
    class_table(right, values[order], [classes[row] for row in order], names, 2.5, label)
    notes = [
        f'Mean of the {pairs} products z_i t_j of every head over the map and the images of a class, each column '
        'standardised over the classes. Tree: average linkage of Euclidean distances. Share of the variance among '
        f'images that lies between classes: {100 * between(flat, survey.labels):.0f} % (median over products; '
        f'{100 * (len(subject.classes) - 1) / (len(flat) - 1):.0f} % by chance).',
        left_out(subject.classes, rows),
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


def unit_length(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)


def tabulate_neighbours(subject: TrainedModel, survey: Survey) -> ClassTable:
    """Share of neighbours of the same class, in %."""
    near = neighbours_right(unit_length(survey.features), survey.labels)
    return ['neighbours of the same class (%)'], 100 * class_means(near, survey.labels)[:, None]


def plot_tsne(subject: TrainedModel, survey: Survey) -> Figure:
    """t-SNE of what the classifier reads; beside it, in all dimensions, how often a neighbour has the class."""
    scaled = unit_length(survey.features)
    perplexity = min(30.0, max(2.0, len(scaled) / 5))
    plane = TSNE(perplexity=perplexity, init='pca', random_state=0, n_jobs=1).fit_transform(scaled)
    (label_of_bars,), share = tabulate_neighbours(subject, survey)
    drawn = most_telling(share)
    if len(drawn) < len(share):
        drawn = drawn[np.argsort(-share[drawn, 0], kind='stable')]
    figure = plt.figure(figsize=(PAGE[0], max(3.4, height_of(drawn) + 0.4)), layout='constrained')
    scatter, bars = figure.subplots(1, 2, width_ratios=[1.7, 1])
    bars.barh(range(len(drawn)), share[drawn, 0], 0.7, color='#80BFE8', edgecolor='black', linewidth=0.4)
    scatter.plot(*plane[~np.isin(survey.labels, drawn)].T, '.', color='0.8', ms=2, mew=0)
    for place, label in enumerate(drawn):
        style = dict(linestyle='none', mew=0.6, **class_style(place))
        scatter.plot(*plane[survey.labels == label].T, ms=3.2, **style)
        bars.plot(-0.045, place, ms=3.6, transform=bars.get_yaxis_transform(), clip_on=False, **style)
    scatter.set(xticks=[], yticks=[], aspect='equal', adjustable='box', anchor='N')
    scatter.spines[:].set_visible(True)
    scatter.set_title(f't-SNE, perplexity {perplexity:.0f}')
    list_classes(bars, [subject.classes[label] for label in drawn])
    bars.tick_params(axis='y', pad=12)
    chance = 100 * float((np.bincount(survey.labels)[survey.labels] - 1).mean()) / (len(survey.labels) - 1)
    bars.axvline(chance, color='black', linewidth=0.8, linestyle=(0, (3, 2)))
    bars.set(xlim=(0, 100), ylim=(len(drawn) - 0.4, -0.6), xlabel=label_of_bars)
    silhouette = f'{silhouette_score(scaled, survey.labels):+.2f}'.replace('-', '\N{MINUS SIGN}')
    mean = float(share[survey.labels].mean())
    bars.set_title(f'all images: {mean:.1f} %; silhouette {silhouette}')
    notes = [
        f'Left: the {survey.features.shape[1]} features that the classifier reads, at unit length; distances between '
        f'groups mean nothing. Right, in all {survey.features.shape[1]} dimensions: share of the {NEIGHBOURS} nearest '
        'neighbours that are of the class (dashed: by chance), and the legend.',
        left_out(subject.classes, drawn) + ' Grey: the others.' * (len(drawn) < len(share)),
    ]
    frame(figure, title_of_survey(subject, 'Features by class', survey), notes)
    return figure
