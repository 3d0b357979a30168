"""Folds of a data set: how images are divided into them, what is verified, and digests. No torch."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError
from common.images import SYNTHETIC, image_bits
from common.names import near_miss
from common.options import AS_IT_IS, FOLDS, SplitOptions
from common.registry import DATASETS
from common.runs import digest
from common.trees import BadTreeError, Problem

SUBSETS = ('train', 'val', 'test')


class Splits(NamedTuple):
    """One fold of a data set: three disjoint lists of (path, class index), the class names by index, and its origin."""

    train: list[tuple[str, int]]
    val: list[tuple[str, int]]
    test: list[tuple[str, int]]
    classes: list[str]
    # Where options or a list divide the user's own images, {path: (the fold that tests it, or its subset, its group)}.
    division: dict[str, tuple[str, str]] | None = None
    notes: tuple[str, ...] = ()  # how images were read where their form leaves room, and what was drawn
    dataset: str = ''  # a key of DATASETS
    fold: int | None = None  # None: images that are not divided, see datasets.load_labelled
    root: Path | None = None  # the folder of the data set; None for drawn images
    own: SplitOptions = AS_IT_IS  # how the user's own images are divided

    @property
    def images(self) -> dict[str, str]:
        """{path: class name} of all."""
        return {path: self.classes[label] for subset in self[:3] for path, label in subset}

    def joined(self) -> 'Splits':
        """The fold with its images of validation among those that train, as --train_on trainval has it."""
        return self._replace(train=self.train + self.val, val=[])


def check_splits(splits: Splits, root: Path) -> None:
    """Check that each subset has images, none is in two of them, and every class tested has training images."""
    if len(splits.classes) < 2:
        line = f'{root}: needs at least two classes with images; it has {splits.classes or "none"}'
        raise BadTreeError(Problem(str(root), 'tree', line))
    seen: dict[str, str] = {}
    twice = []
    for subset in SUBSETS:
        items = getattr(splits, subset)
        if not items:
            raise DataError(f'{root}: the {subset} set is empty')
        for path, _ in items:
            if path in seen:
                line = f'{path}: listed twice, in {seen[path]} and in {subset}'
                twice.append(Problem(path, 'listed twice', line))
            seen[path] = subset
    if twice:
        raise BadTreeError(*twice)
    trained = {label for _, label in splits.train}
    for subset in ('val', 'test'):
        if missing := sorted({label for _, label in getattr(splits, subset)} - trained):
            name, others = splits.classes[missing[0]], [splits.classes[label] for label in sorted(trained)]
            near = near_miss(name, others)
            raise DataError(f"{root}: class '{name}' is in {subset} but has no training image{near}")


def check_sizes(splits: Splits, root: Path, dataset: str) -> None:
    """Check a benchmark against the sizes of its protocol: half a tree would train and give a plausible number."""
    entry = DATASETS[dataset]
    for what, actual, expected in (
        ('classes', len(splits.classes), entry.get('classes')),
        ('images to train, validate and test', tuple(map(len, splits[:3])), entry.get('sizes')),
    ):
        if expected is not None and actual != expected:
            line = f'{root}: has {actual} {what}, by protocol {dataset} has {expected}'
            raise BadTreeError(Problem(str(root), 'tree', line))


def hash_order(items: list, salt: str, name: Callable = os.path.basename) -> list:
    """The items in the order of a hash of salt and name, which depends on nothing else."""
    return sorted(items, key=lambda i: hashlib.sha256(f'{salt}{name(i)}'.encode(errors='surrogateescape')).digest())


def draw_val(items: list, salt: str, name: Callable = os.path.basename) -> tuple[list, list]:
    """The items that train and those that validate, a tenth and at least one."""
    ranked, count = hash_order(items, salt, name), max(1, round(len(items) / 10))
    return ranked[count:], ranked[:count]


def sorted_splits(items: dict[str, list[tuple[str, int]]], classes: list[str]) -> Splits:
    return Splits(*(sorted(items[subset]) for subset in SUBSETS), classes)


def hash_blocks(files: dict[str, list[str]], folds: int) -> dict[str, int]:
    """{path: block from 1}: the images of a class in turn, in the order of a hash of class and file name."""
    ranked = {cls: hash_order(paths, f'{cls}/') for cls, paths in files.items()}
    return {path: rank % folds + 1 for paths in ranked.values() for rank, path in enumerate(paths)}


def splits_of_blocks(files: dict[str, list[str]], blocks: dict[str, int], fold: int, folds: int) -> Splits:
    """Of the `folds` blocks of {class: paths}, f tests, f + 1 (wrapping) validates and the rest trains."""
    items = defaultdict(list)
    for label, cls in enumerate(sorted(files)):
        for path in files[cls]:
            items[{fold: 'test', fold % folds + 1: 'val'}.get(blocks[path], 'train')].append((path, label))
    return sorted_splits(items, sorted(files))


def partition(files: dict[str, list[str]], fold: int) -> Splits:
    """Stratified split of {class: paths}; over the folds the test sets cover every image once."""
    return splits_of_blocks(files, hash_blocks(files, FOLDS), fold, FOLDS)


# ---------------------------------------------------------------------------------------------- images and digests


def bits_of(splits: Splits) -> tuple[int | None, list[str]]:
    """image_bits of the images of a fold."""
    return image_bits(path for subset in splits[:3] for path, _ in subset)


def split_digest(splits: Splits) -> str:
    """A digest of one fold: the images' names, and the sizes of those that train and validate.

    Test images count by name alone: one that turns out to be damaged after the training can be replaced without
    repeating it. A name is that of class and file; where options or a list divide the images, whose names may be the
    same in several folders, it is the path.
    """
    lines, top = [], top_of(splits.division) if splits.division else None
    for subset in SUBSETS:
        for path, label in getattr(splits, subset):
            name = os.path.basename(path) if top is None else path[len(top) :]
            lines.append(f'{subset} {splits.classes[label]}/{name} {0 if subset == "test" else size_of(path)}')
    return digest_lines(lines)


def top_of(paths: Collection[str]) -> str:
    """The innermost folder that holds all the images, with a slash; '' for images that are drawn."""
    first = next(iter(paths))
    return '' if first.startswith(SYNTHETIC) else os.path.join(os.path.commonpath(paths), '')


def size_of(path: str) -> int:
    """Bytes of the file at a path of a split; 0 for a drawn one, -1 for a missing one."""
    try:
        return 0 if path.startswith(SYNTHETIC) else os.path.getsize(path)
    except FileNotFoundError:  # listed in another fold, which reports it when it is used
        return -1


def digest_lines(lines: list[str]) -> str:
    return digest('\n'.join(lines).encode(errors='surrogateescape'))  # names need not be UTF-8
