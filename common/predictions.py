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
    """Write the file. Raises RunError if it cannot be written.

    Args:
        path: of the file.
        items: (path of the image, class index), one a row.
        classes: their names, one a column.
        probabilities: (N, K) float32, written with the nine digits that give the same number when read; NaN: empty.
        root: of the data set; paths inside are written relative to it.
        predicted: (N,) class indices; None for those of the highest probability, the first on ties.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow([*FIRST, *classes])
    predicted = probabilities.argmax(1) if predicted is None else predicted
    for (image, label), best, row in zip(items, predicted, probabilities, strict=True):
        if root is not None and Path(image).is_relative_to(root):
            image = Path(image).relative_to(root).as_posix()
        numbers = ('' if np.isnan(value) else f'{value:.9g}' for value in row)
        writer.writerow([image, classes[label], classes[best], *numbers])
    write_atomic(path, os.fsencode(text.getvalue()))  # names of files need not be UTF-8


def read_predictions(path: Path) -> Predictions:
    """Read the file. Raises RunError if it is missing or damaged."""
    try:
        head, *rows = csv.reader(io.StringIO(os.fsdecode(path.read_bytes()), newline=''), strict=True)
        if tuple(head[:3]) != FIRST or len(head) < 5 or not rows:
            raise RunError(f'{path}: is no {PREDICTIONS} with images')
        classes = head[3:]
        index = {name: number for number, name in enumerate(classes)}
        paths, labels, predicted, *columns = zip(*rows, strict=True)
        labels, predicted = (np.array([index[name] for name in names]) for names in (labels, predicted))
        probabilities = np.array([[float(value or 'nan') for value in column] for column in columns], np.float32).T
        if probabilities.shape != (len(labels), len(classes)):
            raise ValueError('a row is incomplete')
    except OSError as error:
        raise RunError(
            f'{path}: missing or not readable ({error.strerror}); train.py writes it at the end of a run'
        ) from error
    except (csv.Error, KeyError, ValueError) as error:
        raise RunError(f'{path}: damaged ({error})') from error
    return Predictions(classes, list(paths), labels, predicted, probabilities)
