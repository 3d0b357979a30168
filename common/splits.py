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
from common.options import AS_IT_IS, FEWEST, FOLDS, SplitOptions
from common.registry import DATASETS
from common.runs import digest
from common.trees import BadTreeError

SUBSETS = ('train', 'val', 'test')


class Splits(NamedTuple):
    """One fold of a data set: three disjoint lists of (path, class index), the class names by index, and its origin.

    `division` says of every image, where options or a list divide the user's own, (the fold that tests it or the subset
    that the list names, its group or ''); it is None elsewhere.
    """

    train: list[tuple[str, int]]
    val: list[tuple[str, int]]
    test: list[tuple[str, int]]
    classes: list[str]
    division: dict[str, tuple[str, str]] | None = None
    dataset: str = ''  # a key of DATASETS
    fold: int | None = None  # None: images that are not divided, see datasets.load_labelled
    root: Path | None = None  # the folder of the data set; None for drawn images
    own: SplitOptions = AS_IT_IS  # how the user's own images are divided


def check_fold(fold: int, folds: int, name: str | Path) -> None:
    if not 1 <= fold <= folds:
        raise DataError(f'fold {fold} of {name} does not exist; it has folds 1 to {folds}')


def check_splits(splits: Splits, root: Path) -> None:
    """Check that each subset has images, none is in two of them, and every class tested has training images."""
    if len(splits.classes) < 2:
        raise DataError(f'{root}: has only the class {splits.classes}; there is nothing to tell apart')
    seen: dict[str, str] = {}
    for subset in SUBSETS:
        items = getattr(splits, subset)
        if not items:
            raise DataError(f'{root}: the {subset} set is empty')
        for path, _ in items:
            if path in seen:
                raise DataError(f'{path}: listed twice, in {seen[path]} and in {subset}')
            seen[path] = subset
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
            raise BadTreeError(f'{root}: has {actual} {what}, by protocol {dataset} has {expected}')


def hash_order(items: list, salt: str, name: Callable = os.path.basename) -> list:
    """The items in the order of a hash of salt and name, which depends on nothing else."""
    return sorted(items, key=lambda i: hashlib.sha256(f'{salt}{name(i)}'.encode(errors='surrogateescape')).digest())


def draw_val(items: list, salt: str, name: Callable = os.path.basename) -> tuple[list, list]:
    """The items that train and those that validate, a tenth and at least one."""
    ranked, count = hash_order(items, salt, name), max(1, round(len(items) / 10))
    return ranked[count:], ranked[:count]


def sorted_splits(items: dict[str, list[tuple[str, int]]], classes: list[str]) -> Splits:
    return Splits(*(sorted(items[subset]) for subset in SUBSETS), classes)


def check_counts(counts: dict[str, int], folds: int, name: str, noun: str = 'image', fewer: bool = False) -> None:
    """Check that every class has an image, or another thing, for each fold.

    Args:
        counts: by class.
        folds: how many there are.
        name: of the data set.
        noun: what is counted.
        fewer: --folds_total can ask for fewer.

    Raises:
        BadTreeError: a line for each class that has not.
    """
    if few := {cls: count for cls, count in sorted(counts.items()) if count < folds}:
        least = min(few.values())
        way_out = f'give --folds_total {least}, ' * (fewer and least >= FEWEST)
        way_out += 'make smaller groups, ' * (noun == 'group') + 'add images, or move the class away'
        raise BadTreeError(
            *(
                f"{name}: class '{cls}' has {f'one {noun}' if count == 1 else f'{count} {noun}s'}; "
                f'{folds} folds need at least {folds}: {way_out}'
                for cls, count in few.items()
            )
        )


def hash_blocks(files: dict[str, list[str]], folds: int, name: str, fewer: bool = False) -> dict[str, int]:
    """{path: block from 1}: the images of a class in turn, in the order of a hash of class and file name."""
    check_counts({cls: len(paths) for cls, paths in files.items()}, folds, name, fewer=fewer)
    return {
        path: rank % folds + 1 for cls, paths in files.items() for rank, path in enumerate(hash_order(paths, f'{cls}/'))
    }


def splits_of_blocks(files: dict[str, list[str]], blocks: dict[str, int], fold: int, folds: int) -> Splits:
    """Of the `folds` blocks of {class: paths}, f tests, f + 1 (wrapping) validates and the rest trains."""
    items = defaultdict(list)
    for label, cls in enumerate(sorted(files)):
        for path in files[cls]:
            items[{fold: 'test', fold % folds + 1: 'val'}.get(blocks[path], 'train')].append((path, label))
    return sorted_splits(items, sorted(files))


def partition(files: dict[str, list[str]], fold: int, name: str, folds: int = FOLDS, fewer: bool = False) -> Splits:
    """Stratified split: of the `folds` blocks of a class, f tests, f + 1 (wrapping) validates and the rest trains.

    The order within a class is that of a hash of class and file name. Over the folds the test sets cover every image
    once.
    """
    check_fold(fold, folds, name)
    if len(files) < 2:
        raise BadTreeError(f'{name}: needs at least two class folders with images; it has {len(files)}')
    return splits_of_blocks(files, hash_blocks(files, folds, name, fewer), fold, folds)


def compare_copies(groups: list[list[str]], images: dict[str, str], folds: dict[int, Splits]) -> tuple[list[str], int]:
    """A line for each copy of an image, and how many stand in another subset than the first in some fold.

    Args:
        groups: paths of images with the same content.
        images: {path: class}.
        folds: by number.
    """
    subset_of = {
        fold: {path: subset for subset in SUBSETS for path, _ in getattr(splits, subset)}
        for fold, splits in folds.items()
    }
    twice, leaks = [], 0
    for first, *copies in groups:
        for copy in copies:
            apart = [fold for fold in folds if subset_of[fold].get(first) != subset_of[fold].get(copy)]
            leaks += bool(apart)
            where = f'in two subsets of fold {", ".join(map(str, apart))}' if apart else 'in one subset of every fold'
            classes = '' if images[first] == images[copy] else ', in two classes'
            twice.append(f'the same image twice{classes}: {first} and {copy}, {where}')
    return twice, leaks


# ---------------------------------------------------------------------------------------------- images and digests


def bits_of(splits: Splits) -> tuple[int | None, list[str]]:
    """image_bits of the images of a fold."""
    return image_bits(path for subset in splits[:3] for path, _ in subset)


def split_digest(splits: Splits) -> str:
    """A digest of one fold: the images' names, and the sizes of those that train and validate.

    Test images count by name alone: one that turns out to be damaged after the training can be replaced without
    repeating it. A name is that of class and file; where options or a list divide the images, whose names may be the
    same in several folders, it is the path.

    Raises:
        DataError: an image is missing.
    """
    top = top_of(splits.division) if splits.division else None
    return digest_lines(
        [
            f'{subset} {splits.classes[label]}/{os.path.basename(path) if top is None else path[len(top) :]} '
            f'{0 if subset == "test" else size_of(path)}'
            for subset in SUBSETS
            for path, label in getattr(splits, subset)
        ]
    )


def top_of(paths: Collection[str]) -> str:
    """The innermost folder that holds all the images, with a slash; '' for images that are drawn."""
    first = next(iter(paths))
    return '' if first.startswith(SYNTHETIC) else os.path.join(os.path.commonpath(paths), '')


def size_of(path: str) -> int:
    """Bytes of the file at a path of a split; 0 for a drawn one, -1 for a missing one.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return 0 if path.startswith(SYNTHETIC) else os.path.getsize(path)
    except FileNotFoundError:  # listed in another fold, which reports it when it is used
        return -1
    except OSError as error:
        raise DataError(f'{path}: cannot be read ({error.strerror})') from error


def digest_lines(lines: list[str]) -> str:
    return digest('\n'.join(lines).encode(errors='surrogateescape'))  # names need not be UTF-8
