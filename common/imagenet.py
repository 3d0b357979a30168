"""ImageNet as it is downloaded: where train/ and val/ stand, and classes of a val/ without folders. No torch."""

import csv
import os
import sys
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.names import is_hidden
from common.runs import counted
from common.trees import Index, image_names, read_index, read_mat, read_text

INNER = Path('ILSVRC', 'Data', 'CLS-LOC')  # of the official archive, which is Kaggle's too
FLAT = 'ILSVRC2012_val_'  # begins the names of the validation images
KAGGLE, DEVKIT = 'LOC_val_solution.csv', 'ILSVRC2012_validation_ground_truth.txt'
PLACES = ('', 'data', 'ILSVRC2012_devkit_t12/data')  # of these lists


def find_imagenet(data_dir: Path) -> Path:
    """The folder that holds train/ and val/: data_dir, or the part of ILSVRC below it."""
    places = [data_dir, *(data_dir.joinpath(*INNER.parts[i:]) for i in range(len(INNER.parts)))]
    return next((folder for folder in places if (folder / 'val').is_dir()), data_dir)


def read_val(data_dir: Path) -> Index:
    """The Index of val/; of a flat one, that of the tree it would be sorted into: the same images in the same order."""
    root = find_imagenet(data_dir) / 'val'
    names = [name for name in image_names(root, []) if name.startswith(FLAT)] if root.is_dir() else []
    if not names:
        return read_index(root)
    others = sorted({name for name in os.listdir(root) if not is_hidden(name)} - {*names})
    if folder := next((name for name in others if (root / name).is_dir()), None):
        raise DataError(f'{root}: {counted(len(names), "image")} beside class folders such as {folder}: half sorted')
    if others:
        files = counted(len(others), 'file')
        print(f'note: {root}: left out {files} not named {FLAT}.., such as {others[0]}', file=sys.stderr)
    parents = [root.parent.absolute(), *root.parent.absolute().parents[: len(INNER.parts)]]
    lists = [parent / place / name for parent in parents for place in PLACES for name in (KAGGLE, DEVKIT)]
    if (path := next((path for path in lists if path.exists()), None)) is None:
        raise DataError(
            f"{root}: has no class folders, and no list of its classes is near; put Kaggle's {KAGGLE} or the unpacked "
            f'ILSVRC2012_devkit_t12 into {data_dir}'
        )
    class_of = read_kaggle(path) if path.name == KAGGLE else read_devkit(path)
    have = {Path(name).stem: name for name in names}
    for kind, odd in (('not listed', have.keys() - class_of.keys()), ('missing', class_of.keys() - have.keys())):
        if odd:
            raise DataError(f'{root}: {counted(len(odd), "image")} of {path} {kind}, such as {min(odd)}')
    by_class = {}
    for stem, name in sorted(have.items()):
        by_class.setdefault(class_of[stem], []).append(name)
    folders = sorted(by_class)
    found = np.array([os.fsencode(name) for folder in folders for name in by_class[folder]])
    return Index(root, folders, found, np.array([len(by_class[folder]) for folder in folders]), flat=True)


def read_kaggle(path: Path) -> dict[str, str]:
    """{image: class} of lines 'ILSVRC2012_val_00048981,n03995372 85 1 499 272'; all its boxes are of one class."""
    rows = list(csv.reader(read_text(path).splitlines()))[1:]
    if not all(len(row) == 2 and row[1].strip() for row in rows):
        raise DataError(f'{path}: has a line that is not an image and its classes')
    return {image: boxes.split()[0] for image, boxes in rows}


def read_devkit(path: Path) -> dict[str, str]:
    """{image: class}: line i of the list is the ILSVRC2012_ID of image i, and meta.mat beside it has the WNID of it."""
    meta = path.with_name('meta.mat')
    if not meta.exists():
        raise DataError(f"{meta}: missing; it names the devkit's classes")
    wnids = dict(read_mat(meta, 'synsets', lambda row: (int(row['ILSVRC2012_ID'].item()), row['WNID'].item())))
    lines = read_text(path).split()
    if odd := [line for line in lines if not line.isdigit() or int(line) not in wnids]:
        raise DataError(f'{path}: {odd[0]!r} is no class of {meta}')
    return {f'{FLAT}{number:08d}': wnids[int(line)] for number, line in enumerate(lines, 1)}
