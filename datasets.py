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
import contextlib
import hashlib
import os
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

import synthetic
from archives import DataError, fetch, unpack
from cache import Cache
from images import SYNTHETIC, image_bits, is_image, open_image
from locks import fcntl
from options import choose_dataset
from registry import DATASETS
from runs import RunError, counted, digest

SUBSETS = ('train', 'val', 'test')
SUBSET_NAMES = {'train': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'test': 'test'}


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
        way_out = _way_out(dataset, root)
        if len(error.problems) > 1:
            way_out += f'; `python datasets.py check {dataset} --data_dir {shlex.quote(str(root))}` lists all'
        raise DataError(f'{error}{way_out}') from error
    except OSError as error:
        raise DataError(f'{error.filename}: cannot be read ({error.strerror})') from error
    return splits


class BadTreeError(DataError):
    """A tree that is not whole, by one or more problems; load_splits and check add the way out."""

    def __init__(self, *problems: str):
        super().__init__(problems[0] + f' (and {len(problems) - 1} more)' * (len(problems) > 1))
        self.problems = problems


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
    return sum(entry.is_dir() for entry in os.scandir(_dtd_root(root) / 'images')) == classes


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


def _require(listed: dict[str, str]) -> None:
    """Every file of {path: where it is listed} is there; folders are listed once, files are not opened."""
    present: dict[str, set[str]] = {}
    problems = []
    for path, listed_in in listed.items():
        folder, name = os.path.split(path)
        if folder not in present:
            present[folder] = set()
            if os.path.isdir(folder):
                with os.scandir(folder) as entries:
                    present[folder] = {entry.name for entry in entries if not _dangles(entry)}
        if name not in present[folder]:
            problems.append(
                f'{path}: listed in {listed_in} but {_dangling(path) if os.path.islink(path) else "missing"}'
            )
    if problems:
        raise BadTreeError(*problems)


def _dangles(entry: os.DirEntry) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _dangling(path: str) -> str:
    return f'a link to {os.readlink(path)}, which is not there'


def _rank(names: list[str], salt: str = '') -> list[str]:
    """An order that depends on the names alone: that of a hash."""
    return sorted(names, key=lambda name: hashlib.sha256(f'{salt}{name}'.encode(errors='surrogateescape')).digest())


def _draw_val(names: list[str], salt: str = '') -> tuple[list[str], list[str]]:
    """A tenth of the names that are to train, at least one, validates; returns both."""
    ranked, count = _rank(names, salt), max(1, round(len(names) / 10))
    return ranked[count:], ranked[:count]


# ---------------------------------------------------------------------------------------------- dtd


def dtd_splits(root: Path, fold: int) -> Splits:
    """Any tree in the layout of DTD: images/<class>/<file>, labels/{train,val,test}{fold}.txt of class/file lines."""
    root = _dtd_root(root)
    folds = _dtd_folds(root)
    if not folds:
        raise DataError(f'{root / "labels"}: holds no train1.txt; it should hold the lists of every fold')
    if not 1 <= fold <= folds:
        raise DataError(f'fold {fold} of {root} does not exist; it has folds 1 to {folds}')
    names = {subset: _read_list(root / 'labels' / f'{subset}{fold}.txt') for subset in SUBSETS}
    classes = sorted({name.split('/')[0] for listed in names.values() for name in listed})
    index = {name: i for i, name in enumerate(classes)}
    items = {
        subset: [(os.path.join(root, 'images', name), index[name.split('/')[0]]) for name in listed]
        for subset, listed in names.items()
    }
    _require({path: f'labels/{subset}{fold}.txt' for subset in SUBSETS for path, _ in items[subset]})
    return Splits(*(items[subset] for subset in SUBSETS), classes)


def _dtd_root(root: Path) -> Path:
    return _find_root(root, ('images', 'labels'), DATASETS['dtd']['top'], 'dtd')


def _dtd_folds(root: Path) -> int:
    folds = 0
    while (root / 'labels' / f'train{folds + 1}.txt').is_file():
        folds += 1
    return folds


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
    """A folder of class folders, split by `partition`; or train/, val/, test/ of such, taken as they are.

    Without val/ of its own, a tenth of each class of train/ validates.
    """
    own = own_subsets(root)
    if not own:
        return partition(list_images(root), fold, str(root))
    if fold != 1:
        raise DataError(f'fold {fold} of {root} does not exist; it has train/ and test/ of its own, which is fold 1')
    if 'test' not in own:
        raise DataError(
            f'{root / "test"}: no such folder, beside train/; add it, or --data_dir {own["train"]} divides train/ alone'
        )
    files = {subset: list_images(folder) for subset, folder in own.items()}
    if 'val' not in own:
        if few := [cls for cls, paths in files['train'].items() if len(paths) < 2]:
            raise BadTreeError(
                *(f"{own['train']}: class '{cls}' has one image, of which none can be drawn to validate" for cls in few)
            )
        drawn = {cls: _draw_by_name(cls, paths) for cls, paths in files['train'].items()}
        files |= {subset: {cls: parts[i] for cls, parts in drawn.items()} for i, subset in enumerate(('train', 'val'))}
    classes = sorted(set().union(*files.values()))
    items = {
        subset: [(path, label) for label, name in enumerate(classes) for path in files[subset].get(name, [])]
        for subset in SUBSETS
    }
    return Splits(*(items[subset] for subset in SUBSETS), classes)


def own_subsets(root: Path) -> dict[str, Path]:
    """The folders of the subsets in a tree that is split by itself, by subset; empty for a folder of class folders.

    Names may be in capitals, and val/ be called valid/ or validation/. A class may be called train, too: its folder
    holds no folders.

    Raises:
        DataError: two folders for one subset.
    """
    own: dict[str, Path] = {}
    for name in sorted(entry.name for entry in os.scandir(root) if entry.is_dir()):
        if subset := SUBSET_NAMES.get(name.lower()):
            if subset in own:
                raise DataError(f'{root}: has both {own[subset].name}/ and {name}/; one must go')
            own[subset] = root / name
    split = 'train' in own and any(entry.is_dir() and entry.name[0] != '.' for entry in os.scandir(own['train']))
    return own if split else {}


def _draw_by_name(cls: str, paths: list[str]) -> tuple[list[str], list[str]]:
    by_name = {f'{cls}/{os.path.basename(path)}': path for path in paths}
    train, val = _draw_val(list(by_name))
    return sorted(by_name[name] for name in train), sorted(by_name[name] for name in val)


def fmd_splits(root: Path, fold: int) -> Splits:
    """image/<class>/*.jpg as the archive unpacks, or <class>/*.jpg. Masks carry the same names and are never read."""
    files = list_images(root / 'image' if (root / 'image').is_dir() else root, leave=('mask',))
    return partition(files, fold, str(root))


def list_images(root: Path, leave: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """{class: sorted paths of its images}, those that stand in the class's folder itself.

    Hidden entries and files of other suffixes are passed over, and so are the folders to `leave`.

    Raises:
        BadTreeError: a class folder without images, a link to nothing in place of a class or an image, images but no
            class folders.
    """
    found, problems, loose = {}, [], []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.name[0] == '.' or entry.name in leave:
            continue
        path = os.path.join(root, entry.name)
        if entry.is_dir():
            before = len(problems)
            if names := _image_names(path, problems):
                found[entry.name] = [os.path.join(path, name) for name in names]
            elif len(problems) == before:
                problems.append(_why_empty(path))
        elif _dangles(entry):
            problems.append(f'{path}: {_dangling(path)}')
        elif is_image(entry.name):
            loose.append(path)
    if problems:
        raise BadTreeError(*problems)
    if loose and not found:
        raise BadTreeError(
            f'{root}: has {counted(len(loose), "image")} but no class folders, where at least two are needed; '
            'each image must be moved into the folder of its class'
        )
    return found


def _image_names(folder: str | Path, problems: list[str]) -> list[str]:
    """The sorted names of the images in a folder itself; links to nothing are added to the problems."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_image(entry.name) or entry.is_dir():
                continue
            if _dangles(entry):
                problems.append(f'{os.path.join(folder, entry.name)}: {_dangling(entry.path)}')
            else:
                names.append(entry.name)
    return sorted(names)


def _why_empty(folder: str) -> str:
    """What a class folder without images holds instead, and the way out."""
    files = list(_walk(folder))
    if deeper := [path for path in files if is_image(os.path.basename(path))]:
        return (
            f'{folder}: has no image in this class folder itself but {len(deeper)} further down, such as {deeper[0]}; '
            "move them up, or let --data_dir name the folder that holds the classes' folders"
        )
    holds = (
        f'of its {counted(len(files), "file")}, such as {files[0]}, none has a suffix of images'
        if files
        else 'it is empty'
    )
    return f'{folder}: this class folder has no image ({holds}); move it away if it is no class'


def partition(files: dict[str, list[str]], fold: int, name: str, folds: int = 5) -> Splits:
    """Stratified split: of the `folds` blocks of a class, f tests, f + 1 (wrapping) validates and the rest trains.

    The order within a class is that of a hash of class and file name, so it depends on nothing else. Over the folds
    the test sets cover every image once.
    """
    if not 1 <= fold <= folds:
        raise DataError(f'fold {fold} of {name} does not exist; it has folds 1 to {folds}')
    if len(files) < 2:
        raise BadTreeError(f'{name}: needs at least two class folders with images; it has {len(files)}')
    if few := {cls: paths for cls, paths in files.items() if len(paths) < folds}:
        raise BadTreeError(
            *(
                f"{name}: class '{cls}' has {'one image' if len(paths) == 1 else f'{len(paths)} images'}; "
                f'{folds} folds need at least {folds}: add images, or move the class away'
                for cls, paths in sorted(few.items())
            )
        )
    subsets: dict[str, list[tuple[str, int]]] = {subset: [] for subset in SUBSETS}
    for label, (cls, paths) in enumerate(sorted(files.items())):
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
    top = DATASETS['kth_tips2']['top']
    if (root / top).is_dir():
        root = root / top
    classes = sorted(
        entry.name for entry in os.scandir(root) if entry.is_dir() and any(Path(entry).glob('sample_[abcd]'))
    )
    if len(classes) < 2:
        raise BadTreeError(f'{root}: needs at least two class folders; it has {len(classes)}')
    tested = 'dcba'[fold - 1]
    subsets: dict[str, list[tuple[str, int]]] = {subset: [] for subset in SUBSETS}
    problems: list[str] = []
    for label, cls in enumerate(classes):
        rest = []
        for sample in 'abcd':
            folder = root / cls / f'sample_{sample}'
            if not folder.is_dir():
                problems.append(f'{folder}: missing, this is no whole kth_tips2 tree')
                continue
            names = [f'{cls}/sample_{sample}/{name}' for name in _image_names(folder, problems)]
            if sample == tested:
                subsets['test'] += [(os.path.join(root, name), label) for name in names]
            else:
                rest += names
        for subset, names in zip(SUBSETS, _draw_val(rest, f'fold{fold}/')):
            subsets[subset] += [(os.path.join(root, name), label) for name in names]
    if problems:
        raise BadTreeError(*problems)
    return Splits(*(sorted(subsets[subset]) for subset in SUBSETS), classes)


# ---------------------------------------------------------------------------------------------- cub200


def cub_splits(root: Path, fold: int) -> Splits:
    """The official test set; a tenth of each class's official training images validates, another one in each fold."""
    parts = ('images', 'images.txt', 'image_class_labels.txt', 'train_test_split.txt', 'classes.txt')
    root = _find_root(root, parts, DATASETS['cub200']['top'], 'cub200')
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
    _require(dict.fromkeys(paths.values(), 'images.txt'))
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
    _require({path: 'setid.mat' for subset in items for path, _ in subset})
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


def bits_of(splits: Splits) -> tuple[int | None, list[str]]:
    """As image_bits, of the images of a fold."""
    return image_bits(path for subset in splits[:3] for path, _ in subset)


def file_size(path: str) -> int:
    """Bytes of the file of an image; 0 for one that is drawn."""
    return 0 if path.startswith(SYNTHETIC) else os.path.getsize(path)


def stamp(path: str) -> str:
    """A text that changes whenever the file at a path of a split does, or what is drawn in its place."""
    found = os.stat(synthetic.__file__ if path.startswith(SYNTHETIC) else path)
    return f'{os.path.abspath(path)} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}'


def read_pixels(
    path: str,
    cache: Cache | None = None,
    what: str = '',
    prepare: Callable[[Image.Image], Image.Image] | None = None,
    bits: int | None = None,
) -> np.ndarray:
    """The image at a path of a split as (H, W, 3) uint8, which may be written to; from the cache if it is there.

    Args:
        path: of a split.
        cache: where it is kept.
        what: names what `prepare` does, so that the cache holds the image once for each.
        prepare: done before it is kept.
        bits: as for open_image.

    Raises:
        DataError: as open_image.
    """

    def make() -> np.ndarray:
        image = open_image(path, bits)
        return np.array(image if prepare is None else prepare(image))

    if cache is None:
        return make()
    try:
        source = stamp(path)
    except OSError as error:
        raise DataError(f'{path}: cannot be read as an image ({error.strerror})') from error
    return cache.load(f'{what} {bits} {source}', make)


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


# ---------------------------------------------------------------------------------------------- whole trees


def split_digest(splits: Splits) -> str:
    """A digest of one fold: the images' names, and the sizes of those that train and validate.

    Test images count by name alone: one that turns out to be damaged at the end can be mended without losing the
    training.

    Raises:
        DataError: an image is missing.
    """
    lines = [
        f'{subset} {splits.classes[label]}/{os.path.basename(path)} {0 if subset == "test" else _size(path)}'
        for subset in SUBSETS
        for path, label in getattr(splits, subset)
    ]
    return _digest(lines)


def tree_digest(dataset: str, data_dir: str | Path | None, splits: Splits) -> str:
    """A digest of a whole tree, the same for all its folds: classes, names and sizes of the images, lists of the folds.

    Args:
        dataset, data_dir: as for load_splits.
        splits: any fold of the tree.

    Raises:
        DataError: an image cannot be read.
    """
    images, lists = _all_images(dataset, data_dir, splits)
    top = _top(images)
    lines = sorted(f'{cls} {path[len(top) :]} {_size(path)}' for path, cls in images.items())
    return _digest(lines + lists)


def passed_over(dataset: str, data_dir: str | Path | None, splits: Splits) -> list[str]:
    """What stands among the images of a tree and is in none of its folds: a line a kind, with counts and an example.

    Hidden files and folders do not count. A validation set that is drawn is said as well.

    Args:
        dataset, data_dir: as for load_splits.
        splits: any fold of the tree.

    Raises:
        DataError: a folder cannot be read.
    """
    if dataset == 'synthetic':
        return []
    images, _ = _all_images(dataset, data_dir, splits)
    try:
        lines = _beside(set(images), _top(images))
    except OSError as error:
        raise DataError(f'{error.filename}: cannot be read ({error.strerror})') from error
    if dataset == 'folder' and (own := own_subsets(Path(data_dir))) and 'val' not in own:
        lines.append(f'{data_dir} has no val/: a tenth of each class of {own["train"]} validates')
    return lines


def _beside(images: set[str], top: str) -> list[str]:
    """What stands below a folder beside the images."""
    homes = {os.path.dirname(path) for path in images}
    unlisted, nested, others = [], [], defaultdict(list)
    for path in _walk(top):
        if path in images:
            continue
        if not is_image(os.path.basename(path)):
            others[os.path.splitext(path)[1].lower() or 'no suffix'].append(path)
        elif os.path.dirname(path) in homes:
            unlisted.append(path)
        else:
            nested.append(path)
    lines = []
    if nested:
        lines.append(f'passed over {counted(len(nested), "image")} outside the class folders, such as {nested[0]}')
    if unlisted:
        lines.append(f'passed over {counted(len(unlisted), "image")} that no list names, such as {unlisted[0]}')
    if others:
        found = ', '.join(f'{len(paths)} {suffix}' for suffix, paths in sorted(others.items()))
        every = [path for _, paths in sorted(others.items()) for path in paths]
        lines.append(f'passed over {counted(len(every), "file")} without an image suffix ({found}), such as {every[0]}')
    return lines


def _all_images(dataset: str, data_dir: str | Path | None, splits: Splits) -> tuple[dict[str, str], list[str]]:
    """{path: class} of the images of all folds of a tree, and the lines of its lists of folds, if it has such."""
    images = {path: splits.classes[label] for subset in splits[:3] for path, label in subset}
    lists = []
    if dataset == 'dtd':  # the other data sets divide the same images in every fold
        root = _dtd_root(Path(data_dir))
        for fold in range(1, _dtd_folds(root) + 1):
            for subset in SUBSETS:
                if (path := root / 'labels' / f'{subset}{fold}.txt').is_file():
                    for name in _read_list(path):
                        images[os.path.join(root, 'images', name)] = name.split('/')[0]
                        lists.append(f'{subset}{fold} {name}')
    return images, lists


def _top(images: dict[str, str]) -> str:
    """The innermost folder that holds all the images, with a slash; '' for images that are drawn."""
    first = next(iter(images))
    return '' if first.startswith(SYNTHETIC) else os.path.join(os.path.commonpath(images), '')


def _walk(folder: str, seen: frozenset = frozenset()) -> Iterator[str]:
    """The files below a folder, in order; links to folders are followed, hidden entries are passed over."""
    try:
        found = os.stat(folder)
        if (found.st_dev, found.st_ino) in seen:  # a link to a folder around it
            return
        with os.scandir(folder) as entries:
            inside = sorted((entry.name, entry.is_dir()) for entry in entries if entry.name[0] != '.')
    except PermissionError:  # it counts as one file
        yield folder
        return
    for name, is_dir in inside:
        if is_dir:
            yield from _walk(os.path.join(folder, name), seen | {(found.st_dev, found.st_ino)})
        else:
            yield os.path.join(folder, name)


def _size(path: str) -> int:
    try:
        return file_size(path)
    except FileNotFoundError:  # listed in another fold, which says so when it is used
        return -1
    except OSError as error:
        raise DataError(f'{path}: cannot be read ({error.strerror})') from error


def _digest(lines: list[str]) -> str:
    return digest('\n'.join(lines).encode(errors='surrogateescape'))  # names need not be UTF-8


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
            top = staging / entry.get('top', '')
            if top != staging and top.is_dir():  # data/dtd/images, not data/dtd/dtd/images
                for path in list(top.iterdir()):
                    path.rename(staging / path.name)
                top.rmdir()
            staging.rename(target)
        (downloads / f'{dataset}.lock').unlink()
    except BlockingIOError as error:
        raise DataError(f'{target}: is being prepared by another process') from error
    except OSError as error:
        raise DataError(f'{error.filename or data_dir}: cannot be made ({error.strerror or error})') from error
    return target


class Findings(NamedTuple):
    """What `check` finds in a tree; each is a line."""

    tree: list[str]  # what is missing or does not fit
    unreadable: list[str]  # images
    twice: list[str]  # pairs of images with the same content
    leaks: int  # how many of these pairs stand in different subsets of a fold
    notes: list[str]  # what is passed over, and how deep images are scaled


def check(dataset: str, data_dir: Path | None) -> Findings:
    """Verify a tree in one pass: counts, that every image decodes, and that the subsets of a fold share no image.

    Raises:
        DataError: there is no such data set or folder.
    """
    entry = _entry(dataset)
    tree, folds = {}, {}  # problems by what they are about: an image that is missing is so in the lists of every fold
    if dataset != 'synthetic' and (data_dir is None or not Path(data_dir).is_dir()):
        load_splits(dataset, data_dir, 1)  # raises
    for fold in range(1, _folds_to_check(dataset, data_dir) + 1):
        try:
            folds[fold] = load_splits(dataset, data_dir, fold)
        except DataError as error:
            problems = error.__cause__.problems if isinstance(error.__cause__, BadTreeError) else [str(error)]
            for problem in problems:
                tree.setdefault(problem.split(': listed in ')[0], problem)
    tree = list(tree.values())
    images = {path: splits.classes[label] for splits in folds.values() for s in splits[:3] for path, label in s}
    if 1 in folds:
        other = ' (another tree in its layout can train, but is not verified)' if dataset == 'dtd' else ''
        for what, count in (('classes', len(folds[1].classes)), ('images', len(images))):
            if count != entry.get(what, count):
                tree.append(f'{data_dir}: has {count} {what}, {dataset} has {entry[what]}{other}')
        notes = passed_over(dataset, data_dir, folds[1])
    else:
        images = {path: '' for path in _walk(str(data_dir)) if is_image(os.path.basename(path))}
        if dataset == 'fmd':
            images = {path: '' for path in images if 'mask' not in Path(path).relative_to(data_dir).parts}
        notes = _beside(set(images), str(data_dir))
    bits, of_bits = image_bits(images)
    by_content, unreadable = defaultdict(list), []
    for path in tqdm(sorted(images), desc=f'checking {dataset}', disable=None):
        try:
            image = open_image(path, bits)
        except DataError as error:
            unreadable.append(str(error))
            continue
        by_content[hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()].append(path)
    place = {
        fold: {path: subset for subset in SUBSETS for path, _ in getattr(splits, subset)}
        for fold, splits in folds.items()
    }
    twice, leaks = [], 0
    for paths in by_content.values():
        for other in paths[1:]:
            apart = [fold for fold in folds if place[fold].get(paths[0]) != place[fold].get(other)]
            leaks += bool(apart)
            where = f'in two subsets of fold {", ".join(map(str, apart))}' if apart else 'in one subset of every fold'
            classes = '' if images[paths[0]] == images[other] else ', in two classes'
            twice.append(f'the same image twice{classes}: {paths[0]} and {other}, {where}')
    return Findings(tree, unreadable, twice, leaks, notes + of_bits)


def _folds_to_check(dataset: str, data_dir: Path | None) -> int:
    """The folds of a tree; of its data set, where the tree cannot tell."""
    with contextlib.suppress(BadTreeError, OSError):
        if dataset == 'folder' and own_subsets(Path(data_dir)):
            return 1
        if dataset == 'dtd' and not _is_dtd(Path(data_dir), DATASETS['dtd']['classes']):
            return _dtd_folds(_dtd_root(Path(data_dir)))
    return DATASETS[dataset].get('folds', 5)


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
        return
    if args.command not in ('prepare', 'show'):
        choose_dataset(args.dataset, args.data_dir)  # not for its answer: `synthetic` would read no folder
    if args.command == 'speed':
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
        report(args.dataset, root, check(args.dataset, root))


def report(dataset: str, root: Path | None, found: Findings) -> None:
    """Print what `check` found, by kind.

    Raises:
        DataError: there are problems; the message counts them.
    """
    for lines in (found.notes, found.twice, found.unreadable, found.tree):
        for line in lines:
            print(line)
    benchmark = 'archives' in DATASETS[dataset]
    kinds = {
        'of the tree': len(found.tree),
        'of images that cannot be read': len(found.unreadable),
        # A benchmark's own are not ours to mend.
        'of images that stand in two subsets of a fold: leave one of each': 0 if benchmark else found.leaks,
    }
    if total := sum(kinds.values()):
        sys.stdout.flush()  # the last line is the error
        counts = ', '.join(f'{count} {kind}' for kind, count in kinds.items() if count)
        raise DataError(
            f'{root}: {total} problem{"s" * (total > 1)}, {counts}{_way_out(dataset, root) if benchmark else ""}'
        )
    twice = len(found.twice)
    are = 'is' if twice == 1 else 'are'
    print(f'{root or dataset} is whole' + f'; {twice} of its images {are} there twice' * bool(twice))


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='surrogateescape')  # names of files need not be UTF-8: they go out as they are
    try:
        main(get_args_parser().parse_args())
    except (DataError, RunError) as error:
        sys.exit(f'datasets.py: error: {error}')
    except KeyboardInterrupt:
        print('\ndatasets.py: stopped; the same command takes it up again', file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
