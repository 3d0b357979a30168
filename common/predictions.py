"""test_predictions.csv: for each image its path, label and prediction, and the probability of each class."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import RunError
from common.runs import PREDICTIONS, write_atomic

FIRST = ('path', 'label', 'prediction')  # the columns before those of the classes


class Predictions(NamedTuple):
    """N images and K classes."""

    classes: list[str]
    paths: list[str]  # relative to the root of the data set where they are in it
    labels: np.ndarray  # (N,) class indices
    predicted: np.ndarray  # (N,) class indices
    probabilities: np.ndarray  # (N, K) float32; NaN where the model gives none


def write_predictions(
    path: Path,
    items: Sequence[tuple[str, int]],
    classes: list[str],
    probabilities: np.ndarray,
    root: str | Path | None = None,
    predicted: np.ndarray | None = None,
) -> None:
    """Write the file.

    Args:
        path: of the file.
        items: (path of the image, class index), one a row.
        classes: their names, one a column.
        probabilities: (N, K) float32, written with the nine digits that give the same number when read; NaN: empty.
        root: of the data set; paths inside are written relative to it.
        predicted: (N,) class indices; None for those of the highest probability, the first on ties.

    Raises:
        RunError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow([*FIRST, *classes])
    predicted = probabilities.argmax(1) if predicted is None else predicted
    for (image, label), best, row in zip(items, predicted, probabilities, strict=True):
        if root is not None and Path(image).is_relative_to(root):
            image = Path(image).relative_to(root).as_posix()
        chances = ('' if np.isnan(value) else f'{value:.9g}' for value in row)
        writer.writerow([image, classes[label], classes[best], *chances])
    write_atomic(path, os.fsencode(text.getvalue()))  # names of files need not be UTF-8


def read_predictions(path: Path) -> Predictions:
    """Read the file.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        rows = list(csv.reader(io.StringIO(os.fsdecode(path.read_bytes()), newline=''), strict=True))
    except FileNotFoundError as error:
        raise RunError(f'{path}: missing; train.py writes it at the end of a run') from error
    except OSError as error:
        raise RunError(f'{path}: cannot be read ({error.strerror})') from error
    except csv.Error as error:
        raise RunError(f'{path}: damaged ({error})') from error
    if len(rows) < 2 or tuple(rows[0][:3]) != FIRST or len(rows[0]) < 5:
        raise RunError(f'{path}: is no {PREDICTIONS} with images')
    classes = rows[0][3:]
    index = {name: number for number, name in enumerate(classes)}
    try:
        labels, predicted = (np.array([index[row[column]] for row in rows[1:]]) for column in (1, 2))
        probabilities = np.array([[float(value or 'nan') for value in row[3:]] for row in rows[1:]], dtype=np.float32)
    except (KeyError, ValueError, IndexError) as error:
        raise RunError(f'{path}: damaged ({error} in a row)') from error
    if probabilities.shape != (len(labels), len(classes)):
        raise RunError(f'{path}: damaged, a row is incomplete')
    return Predictions(classes, [row[0] for row in rows[1:]], labels, predicted, probabilities)
