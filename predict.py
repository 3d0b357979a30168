"""Labels for photographs by trained models: a table, contact sheets, or a map of labels over a large scan.

    python predict.py --checkpoint runs/folder_fold1_resnet18_seed42/best.pt --images photographs 'more/*.jpg' --sheet
    python predict.py --checkpoint run1/best.pt run2/best.pt --images scan.tif --tile 224 --stride 112

An image goes through the preprocessing of the run's own evaluation. Probabilities are calibrated by the temperature in
the checkpoint: the test images of a run, in their order, get those of its test_predictions.csv at that temperature, bit
for bit (in other batches, and with --fuse, the last digits may differ). Several checkpoints of the same classes average
their probabilities, each at its own size and temperature.

--out has a row per image: path, label, probability, and the next labels up to --top_k. With --tile it has a row per
tile (path, x, y, label, probability; x and y of its upper left corner in pixels): each square of that side is an image
by itself, of which the model sees the middle, or the whole, as of any image (train.py --resize). With --reject 0.8 the
label is empty where its probability is below 0.8. An image that cannot be read is named on stderr, and the exit code
is 1. Prints the files it wrote. Stopped by a signal, it writes the table of what it has.
"""

import argparse
import glob
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from common import distributed, options
from common.drawing import Figure, plot_label_map, plot_thumbnails, save, shorten, thumbnail
from common.errors import DataError, RunError, user_errors
from common.images import is_image, open_image
from common.runs import counted
from common.tables import write_csv
from common.trees import walk
from training import trained

SHEET = (6, 6)  # rows and columns of a page
SCAN_SIDE = 2000  # pixels of the scan in a map, at most
Read = Callable[[str], Image.Image]
Predict = Callable[..., tuple[np.ndarray, dict[int, str]]]  # trained.predict of items, read and what


# ---------------------------------------------------------------------------------------------- what is given


def find_images(given: list[str]) -> list[str]:
    """The images that files, folders (at any depth) and globs name, each once; other files are reported on stderr."""
    found = {}
    for text in given:
        if os.path.isfile(text):
            images, others = [text], []  # whatever its suffix: it was named
        else:
            matches = [text] if os.path.isdir(text) else sorted(glob.glob(text, recursive=True))
            if not matches:
                raise DataError(f'--images {text}: no such file or folder, and no pattern that matches one')
            files = [path for match in matches for path in (walk(match) if os.path.isdir(match) else [match])]
            images = [path for path in files if is_image(os.path.basename(path))]
            others = sorted({*files} - {*images})
        example = f' ({counted(len(others), "other file")}, such as {others[0]})' if others else ''
        if not images:
            raise DataError(f'--images {text}: no image found{example}')
        if others:
            distributed.say(f'note: {text}: without a suffix of images, left out{example}')
        for path in images:
            found.setdefault(os.path.abspath(path), path)
    return list(found.values())


def load_models(paths: list[Path], imports: str | None) -> list[trained.TrainedModel]:
    """The models of the checkpoints, which must have the same classes."""
    first, *others = models = [trained.load(path, imports) for path in paths]
    for other in others:
        if other.classes != first.classes:
            differ = sorted({*first.classes} ^ {*other.classes})
            which = f'not in both: {shorten(", ".join(differ), 60)}' if differ else 'in another order'
            raise RunError(
                f'{first.path} and {other.path} have different classes ({len(first.classes)} and {len(other.classes)}; '
                f'{which}), so their probabilities cannot be averaged; give checkpoints of one data set'
            )
    for model in models:
        if model.temperature is None:
            distributed.say(f'note: {model.path}: has no temperature, so its probabilities are not calibrated')
    return models


# ---------------------------------------------------------------------------------------------- what is written


def save_picture(figure: Figure, out: Path, kind: str, number: int, count: int) -> None:
    """Write a figure beside --out: as 'predictions_sheet.png', or of several 'predictions_sheet_01.png' and so on."""
    name = f'{out.stem}_{kind}' + (f'_{number + 1:0{len(str(count))}d}' if count > 1 else '')
    print(*save(figure, out.parent, name, ['png']))


def reject(args: argparse.Namespace, labels: np.ndarray, probabilities: np.ndarray, count: int) -> np.ndarray:
    """The labels with `count`, the number of classes, in place of those whose probability is below --reject."""
    if args.reject is None:
        return labels
    below = probabilities < args.reject
    distributed.say(f'--reject {args.reject:g}: {below.sum()} of {np.isfinite(probabilities).sum()} without a label')
    return np.where(below, count, labels)


# ---------------------------------------------------------------------------------------------- images


def predict_images(
    args: argparse.Namespace, classes: list[str], paths: list[str], read: Read, predict: Predict, signals: list[int]
) -> int:
    """Write the table of the images and their sheets; returns how many images could not be read."""
    probabilities, errors = predict(paths, read, what='images')
    done = len(probabilities)
    if len(errors) == done:
        raise DataError(f'none of {counted(done, "image")} could be read; nothing is written')
    top_k = args.top_k or min(5, len(classes))
    order = np.argsort(-probabilities, axis=1, kind='stable')[:, :top_k]
    values, labels = np.take_along_axis(probabilities, order, 1), order.copy()
    labels[:, 0] = reject(args, order[:, 0], values[:, 0], len(classes))
    rows = [
        [paths[i], *(value for label, p in zip(labels[i], values[i]) for value in ([*classes, ''][label], p))]
        for i in range(done)
        if i not in errors
    ]
    more = [f'{key}_{n}' for n in range(2, top_k + 1) for key in ('label', 'probability')]
    write_csv(args.out, ['path', 'label', 'probability', *more], rows)
    if args.sheet:
        draw_sheets(args, rows, read, signals)
    return len(errors)


def draw_sheets(args: argparse.Namespace, rows: list[list], read: Read, signals: list[int]) -> None:
    """Pages of thumbnails with the label and probability of each row of the table."""
    size = SHEET[0] * SHEET[1]
    pages = [rows[start : start + size] for start in range(0, len(rows), size)]
    for number, page in enumerate(pages):
        if signals:
            break
        panels = [
            (
                thumbnail(read(path)),
                [f'{shorten(label or "rejected", 13)}  {100 * probability:.0f} %', os.path.basename(path)],
            )
            for path, label, probability, *_ in page
        ]
        of = f', page {number + 1} of {len(pages)}' * (len(pages) > 1)
        title = f'{counted(len(rows), "image")}, label and probability by {names_of(args.checkpoint)}{of}'
        save_picture(plot_thumbnails(title, panels, SHEET[1]), args.out, 'sheet', number, len(pages))


def names_of(checkpoints: list[Path]) -> str:
    return f'{counted(len(checkpoints), "model")} averaged' if len(checkpoints) > 1 else str(checkpoints[0])


# ---------------------------------------------------------------------------------------------- tiles of scans


def starts_of(length: int, tile: int, stride: int) -> list[int]:
    """Where tiles begin along a side; the last one ends with it."""
    last = length - tile
    return sorted({*range(0, last + 1, stride), last})


def cell_edges(starts: list[int], tile: int, length: int) -> np.ndarray:
    """Where one cell of the map ends and the next begins: halfway between the middles of their tiles."""
    middles = np.array(starts) + tile / 2
    return np.array([0, *(middles[1:] + middles[:-1]) / 2, length])


def map_scans(
    args: argparse.Namespace, classes: list[str], paths: list[str], read: Read, predict: Predict, signals: list[int]
) -> int:
    """Write the table of the tiles of all scans and a map of each; returns how many could not be made."""
    rows, failed = [], 0
    for number, path in enumerate(paths):
        try:
            scan = read(path)
            if min(scan.size) < args.tile:
                raise DataError(f'{path}: {scan.width} x {scan.height} pixels are less than --tile {args.tile}')
        except DataError as error:
            distributed.say(f'left out: {error}')
            failed += 1
            continue
        xs, ys = (starts_of(side, args.tile, args.stride) for side in scan.size)
        boxes = [(x, y, x + args.tile, y + args.tile) for y in ys for x in xs]
        probabilities, _ = predict(boxes, scan.crop, what=f'tiles of {os.path.basename(path)}')
        certain = probabilities.max(1)
        labels = reject(args, probabilities.argmax(1), certain, len(classes))
        rows += [[path, x, y, [*classes, ''][k], p] for (x, y, *_), k, p in zip(boxes, labels, certain)]
        if signals:
            break
        edges = cell_edges(ys, args.tile, scan.height), cell_edges(xs, args.tile, scan.width)
        by, named = names_of(args.checkpoint), [*classes, 'rejected']
        title = f'{path}: {len(boxes)} tiles of {args.tile} pixels, stride {args.stride}, by {by}'
        notes = ['The stronger the colour of a cell, the higher the probability of its label. Shares are of the tiles.']
        labels, certain = (values.reshape(len(ys), len(xs)) for values in (labels, certain))
        figure = plot_label_map(thumbnail(scan, SCAN_SIDE), labels, certain, edges, named, title, notes)
        save_picture(figure, args.out, 'map', number, len(paths))
    if failed == len(paths):
        raise DataError(f'none of {counted(failed, "image")} could be read; nothing is written')
    write_csv(args.out, ['path', 'x', 'y', 'label', 'probability'], rows)
    return failed


# ---------------------------------------------------------------------------------------------- command line


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Predict the labels of photographs with trained models.', allow_abbrev=False
    )
    parser.add_argument(
        '--checkpoint',
        type=Path,
        nargs='+',
        required=True,
        metavar='BEST.PT',
        help='one or more; probabilities are averaged',
    )
    parser.add_argument('--images', nargs='+', required=True, metavar='PATH', help='files, folders or quoted globs')
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('predictions.csv'),
        help='CSV of predictions; sheets and maps are saved beside it',
    )
    parser.add_argument('--top_k', type=int, help='labels per image; if not given, 5, or all if there are fewer')
    parser.add_argument('--sheet', action='store_true', help='also draw pages of labelled thumbnails')
    parser.add_argument('--tile', type=int, help='label each square of a large scan; side in pixels')
    parser.add_argument('--stride', type=int, help='pixels from one tile to the next; if not given, --tile')
    text = 'leave the label empty if its calibrated probability is below this, 0 to 1'
    parser.add_argument('--reject', type=float, metavar='P', help=text)
    text = 'bits per channel of images with more than eight; if not given, those of the training images'
    parser.add_argument('--bits', type=int, help=text)
    options.add_inference_args(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked. Raises RunError."""
    args = get_args_parser().parse_args(argv)
    options.check_bounds(args, batch_size=(1, 100_000), top_k=(1, 10**6), tile=(8, 10**6), bits=(8, 16), reject=(0, 1))
    if args.tile is None and args.stride is not None:
        raise RunError('--stride needs --tile')
    if args.tile is not None and (args.sheet or args.top_k is not None):
        raise RunError('--tile draws a map and writes one label a tile; leave --sheet and --top_k out')
    if args.stride is None:
        args.stride = args.tile
    if args.tile is not None and not 1 <= args.stride <= args.tile:
        raise RunError(f'--stride {args.stride} must be from 1 to --tile {args.tile}, or parts would get no label')
    return args


def main(args: argparse.Namespace) -> None:
    paths = find_images(args.images)
    models = load_models(args.checkpoint, args.imports)
    classes = models[0].classes
    if args.top_k and args.top_k > len(classes):
        raise RunError(f'--top_k {args.top_k} must be from 1 to the {len(classes)} classes of {models[0].path}')
    device = distributed.setup(args.device, 0)
    read = partial(open_image, bits=args.bits or trained.bits_for(models, paths))
    make = predict_images if args.tile is None else map_scans
    with distributed.noted_signals((signal.SIGTERM, signal.SIGINT)) as signals:
        predict = partial(trained.predict, models, args=args, device=device, signals=signals)
        failed = make(args, classes, paths, read, predict, signals)
    if signals:
        distributed.say(f'predict.py: stopped; {args.out} has what was done')
        sys.exit(128 + signals[0])
    if failed:
        raise DataError(f'{failed} of {counted(len(paths), "image")} left out; {args.out} has the others')


if __name__ == '__main__':
    with user_errors('predict.py', errors='surrogateescape'):
        main(parse_args())
