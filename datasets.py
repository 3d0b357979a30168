"""Data sets, their folds and their images. No torch here: a data set is a list of (path, class index).

    python datasets.py list                                    # the data sets, their classes and folds
    python datasets.py split dtd --data_dir data/dtd --fold 1  # one line an image: subset, class, path
    python datasets.py show --out figures/synthetic.png        # the procedural classes, eight images each

A split is a function of (data set, fold) alone: never of the training seed, of the order in which the file system
lists files, or of the machine.
"""

import argparse
import hashlib
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.spatial import KDTree

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.tif', '.tiff', '.webp')
SUBSETS = ('train', 'val', 'test')
SYNTHETIC_SIZE = 128  # pixels, side of a synthetic image
SYNTHETIC_PER_CLASS = 50


class DataError(ValueError):
    """Something about the data set is not as it must be; the message is one line that names it."""


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
    if dataset not in DATASETS:
        raise DataError(f"unknown data set '{dataset}'; the data sets are: {', '.join(DATASETS)}")
    if dataset == 'synthetic':
        root = Path('synthetic')
    elif data_dir is None:
        raise DataError(f'{dataset} needs --data_dir, the folder that holds it')
    elif not (root := Path(data_dir)).is_dir():
        raise DataError(f'{root}: no such folder; --data_dir must name the root of {dataset}')
    splits = DATASETS[dataset]['splits'](root, fold)
    _check_splits(splits, root)
    return splits


def _check_splits(splits: Splits, root: Path) -> None:
    """Every subset has images, no image is in two of them, and training sees every class that is tested."""
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


def _check_fold(fold: int, folds: int, dataset: str) -> None:
    if not 1 <= fold <= folds:
        raise DataError(f'fold {fold} of {dataset} does not exist; it has folds 1 to {folds}')


# ---------------------------------------------------------------------------------------------- dtd


def dtd_splits(root: Path, fold: int) -> Splits:
    """Any tree in the layout of DTD: images/<class>/<file>, labels/{train,val,test}{fold}.txt of class/file lines."""
    if not (root / 'labels').is_dir() and (root / 'dtd' / 'labels').is_dir():
        root = root / 'dtd'
    for part in ('images', 'labels'):
        if not (root / part).is_dir():
            raise DataError(f'{root / part}: no such folder; a tree in the layout of DTD has images/ and labels/')
    folds = 0
    while (root / 'labels' / f'train{folds + 1}.txt').is_file():
        folds += 1
    if not folds:
        raise DataError(f'{root / "labels"}: holds no train1.txt; it should hold the lists of every fold')
    _check_fold(fold, folds, str(root))

    names = {subset: _read_list(root / 'labels' / f'{subset}{fold}.txt') for subset in SUBSETS}
    classes = sorted({name.split('/')[0] for subset in names.values() for name in subset})
    index = {name: i for i, name in enumerate(classes)}
    present = {c: set(os.listdir(p)) if (p := root / 'images' / c).is_dir() else set() for c in classes}
    for subset, listed in names.items():
        for name in listed:
            folder, file = name.split('/')
            if file not in present[folder]:
                raise DataError(f'{root / "images" / name}: listed in labels/{subset}{fold}.txt but missing')

    def items(subset: str) -> list[tuple[str, int]]:
        return [(str(root / 'images' / name), index[name.split('/')[0]]) for name in names[subset]]

    return Splits(items('train'), items('val'), items('test'), classes)


def _read_list(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise DataError(f'{path}: no such list') from error
    for name in names:
        if name.count('/') != 1 or '..' in name:
            raise DataError(f'{path}: {name!r} is not of the form class/file')
    return names


# ---------------------------------------------------------------------------------------------- folder


def folder_splits(root: Path, fold: int) -> Splits:
    """A folder of class folders, split by `partition`; or train/, val/, test/ of such, taken as they are."""
    if (root / 'train').is_dir():
        _check_fold(fold, 1, f'{root}, which has train/, val/ and test/ of its own,')
        for subset in SUBSETS:
            if not (root / subset).is_dir():
                raise DataError(f'{root / subset}: no such folder; a split tree needs train/, val/ and test/')
        files = {subset: _list_classes(root / subset) for subset in SUBSETS}
        classes = sorted(set().union(*files.values()))
        return Splits(
            *(
                [(p, label) for label, name in enumerate(classes) for p in files[subset].get(name, [])]
                for subset in SUBSETS
            ),
            classes,
        )
    files = _list_classes(root)
    return partition(files, fold, str(root))


def _list_classes(root: Path) -> dict[str, list[str]]:
    """{class: sorted paths of its images}; hidden folders, folders without images and other files are passed over."""
    found = {}
    for folder in sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != '.'):
        names = [n for n in os.listdir(root / folder) if n.lower().endswith(IMAGE_SUFFIXES) and n[0] != '.']
        if names:
            found[folder] = [str(root / folder / name) for name in sorted(names)]
    if len(found) < 2:
        raise DataError(f'{root}: needs at least two class folders with images; it has {len(found)}')
    return found


def partition(files: dict[str, list[str]], fold: int, name: str, folds: int = 5) -> Splits:
    """Stratified split: of the `folds` blocks of a class, f tests, f + 1 (wrapping) validates and the rest trains.

    The order within a class is that of a hash of class and file name, so it depends on nothing else. Over the folds
    the test sets cover every image once.
    """
    _check_fold(fold, folds, name)
    subsets: dict[str, list[tuple[str, int]]] = {subset: [] for subset in SUBSETS}
    for label, (cls, paths) in enumerate(sorted(files.items())):
        if len(paths) < folds:
            raise DataError(f"{name}: class '{cls}' has {len(paths)} images; {folds} folds need at least {folds}")
        ranked = sorted(paths, key=lambda p: hashlib.sha256(f'{cls}/{os.path.basename(p)}'.encode()).digest())
        for rank, path in enumerate(ranked):
            block = rank % folds + 1
            subset = {fold: 'test', fold % folds + 1: 'val'}.get(block, 'train')
            subsets[subset].append((path, label))
    return Splits(*(sorted(subsets[subset]) for subset in SUBSETS), sorted(files))


# ---------------------------------------------------------------------------------------------- synthetic

# (orientation of the streaks in degrees, period across them in pixels): the displacement along which grey levels
# co-occur, in the convention of models.DIRECTIONS (dy down), so that 45 means streaks along (dy, dx) = (1, 1).
_STREAKS = {
    f'streak{angle:03d}_period{period:02d}': (angle, period) for period in (7, 12) for angle in (0, 45, 90, 135)
}
SYNTHETIC_CLASSES = sorted([*_STREAKS, 'brick', 'cells', 'dots', 'weave'])


def synthetic_splits(root: Path, fold: int) -> Splits:
    """Procedural textures: paths 'synthetic/<class>/<index>' that open_image draws instead of reading."""
    files = {c: [str(root / c / f'{i:04d}') for i in range(SYNTHETIC_PER_CLASS)] for c in SYNTHETIC_CLASSES}
    return partition(files, fold, 'synthetic')


@lru_cache(maxsize=1024)  # 16 MiB
def synthetic_image(cls: str, index: int) -> np.ndarray:
    """Texture `index` of a class, a function of the two alone.

    Every image of every class holds the same grey levels, each equally often: what tells the classes apart is only
    which displacements co-occur. Returns (SYNTHETIC_SIZE, SYNTHETIC_SIZE) uint8.
    """
    if cls not in SYNTHETIC_CLASSES:
        raise DataError(f"unknown synthetic class '{cls}'")
    key = hashlib.sha256(f'{cls}/{index}'.encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(key[:8], 'little')))
    field = _streaks(rng, *_STREAKS[cls]) if cls in _STREAKS else _STRUCTURES[cls](rng)
    field = field / field.std() + 2 * rng.standard_normal(field.shape)
    levels = np.empty(field.size, np.uint8)
    levels[np.argsort(field, axis=None, kind='stable')] = np.arange(field.size) * 256 // field.size
    levels = levels.reshape(field.shape)
    levels.flags.writeable = False  # the cache hands the same array to every caller
    return levels


def _grid(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates (y, x) with a random origin, each (size, size)."""
    y, x = np.mgrid[:SYNTHETIC_SIZE, :SYNTHETIC_SIZE].astype(float)
    return y + rng.uniform(0, 1000), x + rng.uniform(0, 1000)


def _streaks(rng: np.random.Generator, angle: float, period: float) -> np.ndarray:
    """Noise with its energy around one spatial frequency: streaks along `angle`, `period` pixels apart."""
    fy, fx = np.meshgrid(np.fft.fftfreq(SYNTHETIC_SIZE), np.fft.fftfreq(SYNTHETIC_SIZE), indexing='ij')
    angle = np.deg2rad(angle + rng.uniform(-8, 8))
    along = fx * np.cos(angle) + fy * np.sin(angle)
    across = -fx * np.sin(angle) + fy * np.cos(angle)
    centre = 1 / (period * rng.uniform(0.9, 1.1))
    energy = np.exp(-((along / 0.02) ** 2) - ((np.abs(across) - centre) / (0.2 * centre)) ** 2)
    return np.fft.ifft2(np.fft.fft2(rng.standard_normal(fy.shape)) * energy).real


def _weave(rng: np.random.Generator) -> np.ndarray:
    y, x = _grid(rng)
    period = rng.uniform(12, 16)
    over = (np.floor(x / period) + np.floor(y / period)) % 2 == 0
    return np.where(over, np.abs(np.sin(np.pi * x / period)), np.abs(np.sin(np.pi * y / period)))


def _brick(rng: np.random.Generator) -> np.ndarray:
    y, x = _grid(rng)
    height = rng.uniform(10, 14)
    row = np.floor(y / height)
    shade = rng.uniform(0, 1, (400, 400))
    column = np.floor((x + row % 2 * height) / (2 * height))
    joint = (y % height < 2) | ((x + row % 2 * height) % (2 * height) < 2)
    return np.where(joint, -1.0, 0.5 * shade[row.astype(int) % 400, column.astype(int) % 400])


def _nearest(rng: np.random.Generator, period: float, jitter: float) -> tuple[np.ndarray, np.ndarray]:
    """Distances of every pixel to the nearest and second nearest point of a jittered lattice."""
    count = int(SYNTHETIC_SIZE / period) + 4
    points = np.stack(np.mgrid[:count, :count], -1).reshape(-1, 2) + rng.uniform(-jitter, jitter, (count**2, 2))
    pixels = np.stack(np.mgrid[:SYNTHETIC_SIZE, :SYNTHETIC_SIZE], -1)
    distances, _ = KDTree((points - 1.5 + rng.uniform(0, 1, 2)) * period).query(pixels, k=2)
    return distances[..., 0], distances[..., 1]


def _cells(rng: np.random.Generator) -> np.ndarray:
    first, second = _nearest(rng, rng.uniform(13, 17), 0.45)
    return np.minimum(second - first, 5)


def _dots(rng: np.random.Generator) -> np.ndarray:
    period = rng.uniform(11, 15)
    first, _ = _nearest(rng, period, 0.2)
    return -np.minimum(first, 0.4 * period)


_STRUCTURES = {'weave': _weave, 'brick': _brick, 'cells': _cells, 'dots': _dots}


# ---------------------------------------------------------------------------------------------- registry and images

DATASETS: dict[str, dict] = {
    'dtd': dict(splits=dtd_splits, about="any tree in DTD's layout; official lists, 10 folds in DTD itself"),
    'folder': dict(splits=folder_splits, about='any folder of class folders; 5 folds, stratified'),
    'synthetic': dict(
        splits=synthetic_splits, about='procedural, nothing to download; 12 classes, 600 images, 5 folds'
    ),
}


def open_image(path: str) -> Image.Image:
    """The RGB image at a path of a split; synthetic ones are drawn.

    Raises:
        DataError: the file is missing, damaged or no image; its message names it.
    """
    if path.startswith('synthetic' + os.sep) and path.count(os.sep) == 2:
        _, cls, index = path.split(os.sep)
        if cls in SYNTHETIC_CLASSES:
            return Image.fromarray(synthetic_image(cls, int(index))).convert('RGB')
    try:
        with Image.open(path) as image:
            return image.convert('RGB')
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow's own message may repeat the path; what is left says what is wrong.
        reason = 'no such file' if isinstance(error, FileNotFoundError) else str(error).replace(repr(path), 'it')
        raise DataError(f'{path}: cannot be read as an image ({reason})') from error


class ImageList:
    """A map-style data set over one subset.

    Args:
        items: (path, class index) pairs.
        transform: called as transform(image, key), where key is the index given to __getitem__; the training
            transform draws its randomness from it.

    Indexing takes an int, or a tuple whose last entry is the position, e.g. (seed, epoch, i); it returns
    (transformed image, class index).
    """

    def __init__(self, items: list[tuple[str, int]], transform):
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | tuple[int, ...]):
        path, label = self.items[key[-1] if isinstance(key, tuple) else key]
        return self.transform(open_image(path), key), label


# ---------------------------------------------------------------------------------------------- command line


def show_synthetic(out: Path, per_class: int = 8) -> None:
    """Write a contact sheet of the synthetic classes, a row a class, in the order of SYNTHETIC_CLASSES."""
    rows = [np.hstack([synthetic_image(c, i) for i in range(per_class)]) for c in SYNTHETIC_CLASSES]
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.vstack(rows)).save(out)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Data sets and their folds.')
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('list', help='the data sets')
    split = commands.add_parser('split', help='print one fold')
    split.add_argument('dataset')
    split.add_argument('--data_dir')
    split.add_argument('--fold', type=int, default=1)
    show = commands.add_parser('show', help='draw a contact sheet of the synthetic classes')
    show.add_argument('--out', type=Path, default=Path('figures/synthetic.png'))
    return parser


def main(args: argparse.Namespace) -> None:
    if args.command == 'list':
        for name, entry in DATASETS.items():
            print(f'{name:12}{entry["about"]}')
    elif args.command == 'split':
        splits = load_splits(args.dataset, args.data_dir, args.fold)
        for subset in SUBSETS:
            for path, label in getattr(splits, subset):
                print(subset, splits.classes[label], path, sep='\t')
    else:
        show_synthetic(args.out)
        print(args.out)


if __name__ == '__main__':
    try:
        main(get_args_parser().parse_args())
    except DataError as error:
        sys.exit(f'error: {error}')
