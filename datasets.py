"""Data sets, their folds and their images. No torch here: a data set is a list of (path, class index).

    python datasets.py list                                    # the data sets, their protocols and sources
    python datasets.py prepare dtd --data_dir data             # download, verify, unpack and count into data/dtd
    python datasets.py check dtd --data_dir data/dtd           # verify a tree at any later time
    python datasets.py split dtd --data_dir data/dtd --fold 1  # one line an image: subset, class, path
    python datasets.py show --out figures/synthetic.png        # the procedural classes, eight images each
    python datasets.py speed dtd --data_dir data/dtd           # images a second that a core makes for training

A split is a function of (data set, fold) alone: never of the training seed, of the order in which the file system
lists files, or of the machine.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

import synthetic
from archives import DataError, fetch, unpack
from cache import Cache
from locks import fcntl
from registry import DATASETS
from runs import RunError

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.tif', '.tiff', '.webp', '.gif')
SUBSETS = ('train', 'val', 'test')


class Splits(NamedTuple):
    """One fold of a data set: three disjoint lists of (path, class index), and the class names by index."""

    train: list[tuple[str, int]]
    val: list[tuple[str, int]]
    test: list[tuple[str, int]]
    classes: list[str]


def load_splits(dataset: str, data_dir: str | Path | None, fold: int) -> Splits:
    """The images of one fold.

    Args:
        dataset: a key of DATASETS.
        data_dir: root of the data set; unused by 'synthetic'.
        fold: 1-based.

    Raises:
        DataError: unknown data set, fold out of range, missing folder or image, a class without training images.
    """
    entry = _entry(dataset)
    folds = entry.get('folds')
    if folds and dataset != 'dtd' and not 1 <= fold <= folds:  # another tree in DTD's layout may have other lists
        raise DataError(f'fold {fold} of {dataset} does not exist; it has folds 1 to {folds}')
    if dataset == 'synthetic':
        root = Path('synthetic')
    elif data_dir is None:
        raise DataError(f'{dataset} needs --data_dir, the folder that holds it')
    elif not (root := Path(data_dir)).is_dir():
        way_out = f'; `{_prepare(dataset, Path("data"))}` fetches it' if 'archives' in entry else ''
        raise DataError(f'{root}: no such folder; --data_dir must name the root of {dataset}{way_out}')
    try:
        splits = SPLITS[dataset](root, fold)
        _check_splits(splits, root)
        _check_sizes(dataset, splits, root)
    except BadTreeError as error:
        raise DataError(f'{error}{_way_out(dataset, root)}') from error
    except OSError as error:
        raise DataError(f'{error.filename}: cannot be read ({error.strerror})') from error
    return splits


class BadTreeError(DataError):
    """A tree that is not whole; load_splits and check add the way out."""


def _entry(dataset: str) -> dict:
    if dataset not in DATASETS:
        raise DataError(f"unknown data set '{dataset}'; the data sets are: {', '.join(DATASETS)}")
    return DATASETS[dataset]


def _prepare(dataset: str, data_dir: Path) -> str:
    return f'python datasets.py prepare {dataset} --data_dir {shlex.quote(str(data_dir))}'


def _way_out(dataset: str, root: Path) -> str:
    """How to get a whole tree in place of the one at `root`, as the end of a message."""
    if 'archives' not in DATASETS[dataset]:
        return ''
    return f'; move {root} away, and `{_prepare(dataset, root.parent)}` makes a whole one in {root.parent / dataset}'


def _check_sizes(dataset: str, splits: Splits, root: Path) -> None:
    """A benchmark has the sizes of its protocol: half a tree would train, and give a number that looks like one."""
    entry = DATASETS[dataset]
    if dataset == 'dtd' and not _is_dtd(root, entry['classes']):
        return
    for what, have, due in (
        ('classes', len(splits.classes), entry.get('classes')),
        ('images to train, validate and test', tuple(map(len, splits[:3])), entry.get('sizes')),
    ):
        if due is not None and have != due:
            raise BadTreeError(f'{root}: has {have} {what}, by protocol {dataset} has {due}')


def _is_dtd(root: Path, classes: int) -> bool:
    """True for DTD itself, False for another tree in its layout, which may have any size."""
    images = root / 'images' if (root / 'images').is_dir() else root / 'dtd' / 'images'
    return sum(entry.is_dir() for entry in os.scandir(images)) == classes


def _check_splits(splits: Splits, root: Path) -> None:
    """Every subset has images, no image is in two of them, and training sees every class that is tested."""
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
            raise DataError(f"{root}: class '{splits.classes[missing[0]]}' is in {subset} but has no training image")


def _find_root(root: Path, parts: tuple[str, ...], inner: str, dataset: str) -> Path:
    """`root`, or the folder `inner` inside it: the one that has all `parts`."""
    for candidate in (root, root / inner):
        if all((candidate / part).exists() for part in parts):
            return candidate
    near = root / inner if (root / inner).is_dir() else root
    missing = next(part for part in parts if not (near / part).exists())
    raise BadTreeError(f'{near / missing}: missing, this is no whole {dataset} tree')


def _require(paths: list[str], listed_in: str) -> None:
    """Every listed file is there; folders are listed once, files are not opened."""
    present: dict[str, set[str]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in present:
            present[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in present[folder]:
            raise BadTreeError(f'{path}: listed in {listed_in} but missing')


def _rank(names: list[str], salt: str = '') -> list[str]:
    """An order that depends on the names alone: that of a hash."""
    return sorted(names, key=lambda name: hashlib.sha256(f'{salt}{name}'.encode()).digest())


# ---------------------------------------------------------------------------------------------- dtd


def dtd_splits(root: Path, fold: int) -> Splits:
    """Any tree in the layout of DTD: images/<class>/<file>, labels/{train,val,test}{fold}.txt of class/file lines."""
    root = _find_root(root, ('images', 'labels'), 'dtd', 'dtd')
    folds = 0
    while (root / 'labels' / f'train{folds + 1}.txt').is_file():
        folds += 1
    if not folds:
        raise DataError(f'{root / "labels"}: holds no train1.txt; it should hold the lists of every fold')
    if not 1 <= fold <= folds:
        raise DataError(f'fold {fold} of {root} does not exist; it has folds 1 to {folds}')
    names = {subset: _read_list(root / 'labels' / f'{subset}{fold}.txt') for subset in SUBSETS}
    classes = sorted({name.split('/')[0] for listed in names.values() for name in listed})
    index = {name: i for i, name in enumerate(classes)}
    items = {}
    for subset, listed in names.items():
        items[subset] = [(os.path.join(root, 'images', name), index[name.split('/')[0]]) for name in listed]
        _require([path for path, _ in items[subset]], f'labels/{subset}{fold}.txt')
    return Splits(*(items[subset] for subset in SUBSETS), classes)


def _read_list(path: Path) -> list[str]:
    names = [line.strip() for line in _read_text(path).split('\n') if line.strip()]
    for name in names:
        if name.count('/') != 1 or not {'', '.', '..'}.isdisjoint(name.split('/')):
            raise DataError(f'{path}: {name!r} is not of the form class/file')
    return names


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8-sig')
    except OSError as error:
        raise DataError(f'{path}: cannot be read ({error.strerror})') from error
    except UnicodeDecodeError as error:
        raise DataError(f'{path}: is not UTF-8 text') from error


# ---------------------------------------------------------------------------------------------- folder and fmd


def folder_splits(root: Path, fold: int) -> Splits:
    """A folder of class folders, split by `partition`; or train/, val/, test/ of such, taken as they are."""
    if not (root / 'train').is_dir():
        return partition(list_images(root), fold, str(root))
    if fold != 1:
        raise DataError(
            f'fold {fold} of {root} does not exist; it has train/, val/ and test/ of its own, which is fold 1'
        )
    for subset in SUBSETS:
        if not (root / subset).is_dir():
            raise DataError(f'{root / subset}: no such folder; a split tree needs train/, val/ and test/')
    files = {subset: list_images(root / subset) for subset in SUBSETS}
    classes = sorted(set().union(*files.values()))
    items = {
        subset: [(path, label) for label, name in enumerate(classes) for path in files[subset].get(name, [])]
        for subset in SUBSETS
    }
    return Splits(*(items[subset] for subset in SUBSETS), classes)


def fmd_splits(root: Path, fold: int) -> Splits:
    """image/<class>/*.jpg as the archive unpacks, or <class>/*.jpg. Masks carry the same names and are never read."""
    files = list_images(root / 'image' if (root / 'image').is_dir() else root)
    return partition(files, fold, str(root))


def list_images(root: Path) -> dict[str, list[str]]:
    """{class: sorted paths of its images}; hidden folders, folders without images and other files are passed over."""
    found = {}
    for folder in sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != '.'):
        names = [name for name in os.listdir(root / folder) if _is_image(name)]
        if names:
            found[folder] = [os.path.join(root, folder, name) for name in sorted(names)]
    return found


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and name[0] != '.'


def partition(files: dict[str, list[str]], fold: int, name: str, folds: int = 5) -> Splits:
    """Stratified split: of the `folds` blocks of a class, f tests, f + 1 (wrapping) validates and the rest trains.

    The order within a class is that of a hash of class and file name, so it depends on nothing else. Over the folds
    the test sets cover every image once.
    """
    if not 1 <= fold <= folds:
        raise DataError(f'fold {fold} of {name} does not exist; it has folds 1 to {folds}')
    if len(files) < 2:
        raise BadTreeError(f'{name}: needs at least two class folders with images; it has {len(files)}')
    subsets: dict[str, list[tuple[str, int]]] = {subset: [] for subset in SUBSETS}
    for label, (cls, paths) in enumerate(sorted(files.items())):
        if len(paths) < folds:
            has = 'one image' if len(paths) == 1 else f'{len(paths)} images'
            raise DataError(f"{name}: class '{cls}' has {has}; {folds} folds need at least {folds}")
        by_name = {f'{cls}/{os.path.basename(path)}': path for path in paths}
        for rank, key in enumerate(_rank(list(by_name))):
            subset = {fold: 'test', fold % folds + 1: 'val'}.get(rank % folds + 1, 'train')
            subsets[subset].append((by_name[key], label))
    return Splits(*(sorted(subsets[subset]) for subset in SUBSETS), sorted(files))


# ---------------------------------------------------------------------------------------------- kth_tips2


def kth_splits(root: Path, fold: int) -> Splits:
    """<class>/sample_{a,b,c,d}/*.png: a physical sample is tested, d in fold 1 to a in fold 4.

    A tenth of each class's remaining images validates: they show the samples that train, so validation accuracy is
    far above test accuracy, and the comparison of checkpoints is blind to new samples. The data set has no better.
    """
    if (root / 'KTH-TIPS2-b').is_dir():
        root = root / 'KTH-TIPS2-b'
    classes = sorted(
        entry.name for entry in os.scandir(root) if entry.is_dir() and any(Path(entry).glob('sample_[abcd]'))
    )
    if len(classes) < 2:
        raise BadTreeError(f'{root}: needs at least two class folders; it has {len(classes)}')
    tested = 'dcba'[fold - 1]
    subsets: dict[str, list[tuple[str, int]]] = {subset: [] for subset in SUBSETS}
    for label, cls in enumerate(classes):
        rest = []
        for sample in 'abcd':
            folder = root / cls / f'sample_{sample}'
            if not folder.is_dir():
                raise BadTreeError(f'{folder}: missing, this is no whole kth_tips2 tree')
            names = [f'{cls}/sample_{sample}/{name}' for name in os.listdir(folder) if _is_image(name)]
            if sample == tested:
                subsets['test'] += [(os.path.join(root, name), label) for name in names]
            else:
                rest += names
        ranked = _rank(rest, f'fold{fold}/')
        count = max(1, round(len(rest) / 10))
        subsets['val'] += [(os.path.join(root, name), label) for name in ranked[:count]]
        subsets['train'] += [(os.path.join(root, name), label) for name in ranked[count:]]
    return Splits(*(sorted(subsets[subset]) for subset in SUBSETS), classes)


# ---------------------------------------------------------------------------------------------- cub200


def cub_splits(root: Path, fold: int) -> Splits:
    """The official test set; a tenth of each class's official training images validates, another one in each fold."""
    parts = ('images', 'images.txt', 'image_class_labels.txt', 'train_test_split.txt', 'classes.txt')
    root = _find_root(root, parts, 'CUB_200_2011', 'cub200')
    names, labels, official, classes = (
        _read_table(root / f'{table}.txt') for table in ('images', 'image_class_labels', 'train_test_split', 'classes')
    )
    numbers = {str(i + 1) for i in range(len(classes))}
    for table, rows, due in (('image_class_labels', labels, numbers), ('train_test_split', official, {'0', '1'})):
        if rows.keys() != names.keys():
            raise BadTreeError(f'{root / table}.txt: does not list the same images as images.txt')
        if wrong := [f'{key} {value}' for key, value in rows.items() if value not in due]:
            raise BadTreeError(f"{root / table}.txt: line '{wrong[0]}' cannot be")
    if classes.keys() != numbers:
        raise BadTreeError(f'{root / "classes.txt"}: does not number its classes from 1')
    paths = {key: os.path.join(root, 'images', name) for key, name in names.items()}
    _require(list(paths.values()), 'images.txt')
    by_class: dict[int, list[str]] = defaultdict(list)
    subsets: dict[str, list[tuple[str, int]]] = {subset: [] for subset in SUBSETS}
    for key, path in paths.items():
        label = int(labels[key]) - 1
        if official[key] == '1':
            by_class[label].append(path)
        else:
            subsets['test'].append((path, label))
    for label, listed in by_class.items():
        by_name = {os.path.basename(path): path for path in listed}
        for rank, name in enumerate(_rank(list(by_name))):
            subsets['val' if rank % 10 == fold - 1 else 'train'].append((by_name[name], label))
    ordered = [classes[str(i + 1)] for i in range(len(classes))]
    return Splits(*(sorted(subsets[subset]) for subset in SUBSETS), ordered)


def _read_table(path: Path) -> dict[str, str]:
    """A table of CUB: 'number value' lines."""
    rows = {}
    for line in _read_text(path).splitlines():
        if line.strip():
            key, _, value = line.strip().partition(' ')
            if not (key.isdigit() and value) or key in rows:
                raise BadTreeError(f'{path}: {line!r} is no line of a number and a value')
            rows[key] = value
    return rows


# ---------------------------------------------------------------------------------------------- flowers102


def flowers_splits(root: Path, fold: int) -> Splits:
    """Fold 1 is the official split; folds 2 to 5 redraw train and val, ten a class each, from the official two.

    The official test set, 6149 images, is tested in every fold. The classes have no names in the archive: they are
    called by their official numbers, 001 to 102.
    """
    root = _find_root(root, ('jpg', 'imagelabels.mat', 'setid.mat'), 'flowers-102', 'flowers102')
    labels = _read_mat(root / 'imagelabels.mat', 'labels')
    train, val, test = (_read_mat(root / 'setid.mat', name) for name in ('trnid', 'valid', 'tstid'))
    for name, numbers, highest in (('imagelabels', labels, 102), ('setid', train + val + test, len(labels))):
        if wrong := [number for number in numbers if not 1 <= number <= highest]:
            raise BadTreeError(f'{root / name}.mat: damaged, {wrong[0]} is not from 1 to {highest}')
    if fold > 1:
        pool: dict[int, list[int]] = defaultdict(list)
        for number in train + val:
            pool[labels[number - 1]].append(number)
        ranked = [[int(n) for n in _rank([str(n) for n in numbers], f'fold{fold}/')] for numbers in pool.values()]
        train = sorted(n for numbers in ranked for n in numbers[: len(numbers) // 2])
        val = sorted(n for numbers in ranked for n in numbers[len(numbers) // 2 :])
    items = [
        [(os.path.join(root, 'jpg', f'image_{number:05d}.jpg'), labels[number - 1] - 1) for number in numbers]
        for numbers in (train, val, test)
    ]
    _require([path for subset in items for path, _ in subset], 'setid.mat')
    return Splits(*items, [f'{label:03d}' for label in range(1, max(labels) + 1)])


def _read_mat(path: Path, name: str) -> list[int]:
    """A vector of a MATLAB file, 1-based as it stands there."""
    from scipy.io import loadmat  # takes longer to import than everything else here; one data set needs it

    try:
        with open(path, 'rb') as file:
            return [int(value) for value in loadmat(file)[name].ravel()]
    except Exception as error:  # whatever a damaged file leads scipy to
        if isinstance(error, OSError) and error.errno:
            raise
        raise BadTreeError(f'{path}: damaged, or has no vector {name}') from error


# ---------------------------------------------------------------------------------------------- synthetic


SYNTHETIC = 'synthetic:'  # begins the paths that are drawn, and can begin no path of a file that a tree lists


def synthetic_splits(root: Path, fold: int) -> Splits:
    """Procedural textures: paths 'synthetic:<class>/<index>' that open_image draws instead of reading."""
    files = {c: [f'{SYNTHETIC}{c}/{i:04d}' for i in range(synthetic.PER_CLASS)] for c in synthetic.CLASSES}
    return partition(files, fold, 'synthetic')


# ---------------------------------------------------------------------------------------------- registry

# The facts of each are in registry.DATASETS.
SPLITS = {
    'dtd': dtd_splits,
    'fmd': fmd_splits,
    'kth_tips2': kth_splits,
    'cub200': cub_splits,
    'flowers102': flowers_splits,
    'folder': folder_splits,
    'synthetic': synthetic_splits,
}


# ---------------------------------------------------------------------------------------------- images


def open_image(path: str) -> Image.Image:
    """The RGB image at a path of a split; synthetic ones are drawn.

    Raises:
        DataError: the file is missing, damaged or no image; its message names it.
    """
    if path.startswith(SYNTHETIC):
        cls, index = path.removeprefix(SYNTHETIC).split('/')
        return Image.fromarray(synthetic.draw(cls, int(index))).convert('RGB')
    try:
        with Image.open(path) as image:
            if image.mode == 'F':
                raise ValueError('it holds real numbers, whose range is not known')
            if image.mode.startswith('I'):  # 16 or 32 bits a pixel, which convert would clip at 255
                pixels = np.asarray(image).astype(np.int64)
                eight = image.mode == 'I' and pixels.max() < 256  # 32 bits that hold eight
                image = Image.fromarray((pixels >> (0 if eight else 8)).clip(0, 255).astype(np.uint8))
            if image.mode == 'P':  # a palette may have transparent colours
                image = image.convert('RGBA')
            if image.mode != 'RGB':
                return image.convert('RGB')
            image.load()  # convert would copy it
            return image
    except UnidentifiedImageError as error:
        raise DataError(f'{path}: cannot be read as an image (no format that is known here)') from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise DataError(f'{path}: cannot be read as an image ({reason})') from error


def file_size(path: str) -> int:
    """Bytes of the file of an image; 0 for one that is drawn."""
    return 0 if path.startswith(SYNTHETIC) else os.path.getsize(path)


def stamp(path: str) -> str:
    """A text that changes whenever the file at a path of a split does, or what is drawn in its place."""
    found = os.stat(synthetic.__file__ if path.startswith(SYNTHETIC) else path)
    return f'{os.path.abspath(path)} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}'


def read_pixels(
    path: str, cache: Cache | None = None, what: str = '', prepare: Callable[[Image.Image], Image.Image] | None = None
) -> np.ndarray:
    """The image at a path of a split as (H, W, 3) uint8, which may be written to; from the cache if it is there.

    Args:
        path: of a split.
        cache: where it is kept.
        what: names what `prepare` does, so that the cache holds the image once for each.
        prepare: done before it is kept.

    Raises:
        DataError: as open_image.
    """

    def make() -> np.ndarray:
        image = open_image(path)
        return np.array(image if prepare is None else prepare(image))

    if cache is None:
        return make()
    try:
        source = stamp(path)
    except OSError as error:
        raise DataError(f'{path}: cannot be read as an image ({error.strerror})') from error
    return cache.load(f'{what} {source}', make)


class ImageList:
    """A map-style data set over one subset.

    Args:
        items: (path, class index) pairs.
        transform: called as transform(image, key), where key is the index given to __getitem__; the training
            transform draws its randomness from it.
        read: what makes the image from a path.

    Indexing takes an int, or a tuple whose last entry is the position, e.g. (seed, epoch, i); it returns
    (transformed image, class index).
    """

    def __init__(self, items: list[tuple[str, int]], transform: Callable, read: Callable = open_image):
        self.items, self.transform, self.read = items, transform, read

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | tuple[int, ...]):
        path, label = self.items[key[-1] if isinstance(key, tuple) else key]
        return self.transform(self.read(path), key), label


# ---------------------------------------------------------------------------------------------- prepare and check


def prepare(dataset: str, data_dir: Path) -> Path:
    """Download, verify and unpack a data set into data_dir/<dataset>; returns that folder.

    An interrupted download goes on where it stopped. The tree appears under its name only when it is unpacked whole;
    one that is there already is left as it is.

    Raises:
        DataError: there is nothing to fetch, another process is at it, or a step fails.
    """
    entry = _entry(dataset)
    if 'archives' not in entry:
        raise DataError(f'{dataset} is not downloaded ({entry["source"]})')
    target, staging, downloads = data_dir / dataset, data_dir / f'{dataset}.partial', data_dir / 'downloads'
    try:
        if target.is_symlink() and not target.exists():
            raise DataError(f'{target}: a link to {os.readlink(target)}, which is not there')
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            return target
        downloads.mkdir(parents=True, exist_ok=True)
        with open(downloads / f'{dataset}.lock', 'w') as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            paths = [fetch(url, md5, downloads) for url, md5 in entry['archives']]
            if staging.exists():  # of an attempt that was interrupted
                shutil.rmtree(staging)
            for path in paths:
                print(f'unpacking {path}', file=sys.stderr)
                unpack(path, staging)
            staging.rename(target)
        (downloads / f'{dataset}.lock').unlink()
    except BlockingIOError as error:
        raise DataError(f'{target}: is being prepared by another process') from error
    except OSError as error:
        raise DataError(f'{error.filename or data_dir}: cannot be made ({error.strerror or error})') from error
    return target


def check(dataset: str, data_dir: Path | None) -> tuple[list[str], int]:
    """Verify a tree: counts, that every image decodes, and that train, val and test of every fold share no image.

    Returns:
        a line for every pair of images with the same content, and how many of these pairs stand in different subsets of
        a fold.

    Raises:
        DataError: the first thing that is not as it should be.
    """
    entry = _entry(dataset)

    def expect(what: str, count: int) -> None:
        if count != entry.get(what, count):
            other = ' (another tree in its layout can train, but is not verified)' if dataset == 'dtd' else ''
            raise DataError(
                f'{data_dir}: has {count} {what}, {dataset} has {entry[what]}{other}{_way_out(dataset, data_dir)}'
            )

    folds = {1: load_splits(dataset, data_dir, 1)}
    expect('classes', len(folds[1].classes))
    for fold in range(2, entry.get('folds', 5) + 1):
        if dataset == 'folder' and (Path(data_dir) / 'train').is_dir():
            break  # its own three subsets are its only fold
        folds[fold] = load_splits(dataset, data_dir, fold)
    images = {path: label for splits in folds.values() for subset in splits[:3] for path, label in subset}
    expect('images', len(images))
    by_content: dict[bytes, list[str]] = defaultdict(list)
    for path in tqdm(sorted(images), desc=f'checking {dataset}', disable=None):
        image = open_image(path)
        by_content[hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()].append(path)
    place = {
        fold: {path: subset for subset in SUBSETS for path, _ in getattr(splits, subset)}
        for fold, splits in folds.items()
    }
    notes, leaks = [], 0
    for paths in by_content.values():
        for other in paths[1:]:
            apart = [fold for fold in folds if place[fold].get(paths[0]) != place[fold].get(other)]
            leaks += bool(apart)
            where = f'in two subsets of fold {", ".join(map(str, apart))}' if apart else 'in one subset of every fold'
            classes = '' if images[paths[0]] == images[other] else ', in two classes'
            notes.append(f'the same image twice{classes}: {paths[0]} and {other}, {where}')
    return notes, leaks


def show_synthetic(out: Path, per_class: int = 8) -> None:
    """Write a contact sheet of the synthetic classes, a row a class, in the order of synthetic.CLASSES."""
    rows = [np.hstack([synthetic.draw(c, i) for i in range(per_class)]) for c in synthetic.CLASSES]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.vstack(rows)).save(out)
    except (OSError, ValueError) as error:
        raise DataError(f'{out}: cannot be written ({getattr(error, "strerror", None) or error})') from error


# ---------------------------------------------------------------------------------------------- command line


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Data sets and their folds.')
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('list', help='the data sets')
    prepare = commands.add_parser('prepare', help='download, verify and unpack a data set into DATA_DIR/KEY')
    check = commands.add_parser('check', help='verify the tree at DATA_DIR')
    split = commands.add_parser('split', help='print one fold of the tree at DATA_DIR')
    speed = commands.add_parser('speed', help='images a second that one core makes of those at DATA_DIR')
    for command in (prepare, check, split, speed):
        command.add_argument('dataset', metavar='KEY', help=f'one of {", ".join(DATASETS)}')
        command.add_argument('--data_dir', type=Path)
    prepare.set_defaults(data_dir=Path('data'))
    for command in (split, speed):
        command.add_argument('--fold', type=int, default=1)
    speed.add_argument('--img_size', type=int, default=224, help='side of the square result, pixels (default: 224)')
    speed.add_argument('--images', type=int, default=64, help='how many of them, spread over all (default: 64)')
    speed.add_argument('--rounds', type=int, default=10, help='medians over so many are shown (default: 10)')
    show = commands.add_parser('show', help='draw a contact sheet of the synthetic classes')
    show.add_argument('--out', type=Path, default=Path('figures/synthetic.png'))
    return parser


def main(args: argparse.Namespace) -> None:
    if args.command == 'list':
        for name, entry in DATASETS.items():
            size = f'{entry.get("images", "any"):>6} images {entry.get("classes", "any"):>4} classes'
            print(f'{name:12}{size}  {entry["protocol"]}\n{"":12}  {entry["source"]}')
    elif args.command == 'speed':
        import speed  # only here: it imports torch, and train, which imports this file

        speed.loader(args.dataset, args.data_dir, args.fold, args.img_size, args.images, args.rounds)
    elif args.command == 'show':
        show_synthetic(args.out)
        print(args.out)
    elif args.command == 'split':
        splits = load_splits(args.dataset, args.data_dir, args.fold)
        for subset in SUBSETS:
            for path, label in getattr(splits, subset):
                print(subset, splits.classes[label], path, sep='\t')
    else:
        root = prepare(args.dataset, args.data_dir) if args.command == 'prepare' else args.data_dir
        notes, leaks = check(args.dataset, root)
        for note in notes:
            print(note)
        if leaks and 'archives' not in DATASETS[args.dataset]:  # a benchmark's own are not ours to mend
            raise DataError(f'{root}: {leaks} images stand in two subsets of a fold; leave one of each')
        print(f'{root or args.dataset} is whole' + f'; {len(notes)} of its images are there twice' * bool(notes))


if __name__ == '__main__':
    try:
        main(get_args_parser().parse_args())
    except (DataError, RunError) as error:
        sys.exit(f'datasets.py: error: {error}')
    except KeyboardInterrupt:
        print('\ndatasets.py: stopped; the same command takes it up again', file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
