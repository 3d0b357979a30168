"""Folders of images: which images stand in them, what is missing or damaged, and what is not used. No torch."""

import functools
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common.errors import DataError, lfs_pointer
from common.images import is_image, open_image
from common.names import composed, is_hidden, loose
from common.runs import counted


class Problem(NamedTuple):
    """One thing that is wrong with a tree: a row of `datasets.py check --csv`."""

    path: str  # the image, class folder, list or tree
    kind: str  # as the --help of check lists them
    line: str  # the sentence that is printed
    other: str = ''  # the second path that it names
    folds: tuple[int, ...] = ()  # the folds that it concerns


class BadTreeError(DataError):
    """A tree that is not complete, by its problems."""

    def __init__(self, *problems: Problem):
        super().__init__(problems[0].line + f' (and {len(problems) - 1} more)' * (len(problems) > 1))
        self.problems = problems


def broken_link(entry: os.DirEntry | Path) -> str:
    """'a link to .., which is not there' for a link to nothing, otherwise ''."""
    broken = entry.is_symlink() and not os.path.exists(entry)
    return f'a link to {os.readlink(entry)}, which is not there' if broken else ''


def walk(folder: str, seen: frozenset = frozenset()) -> Iterator[str]:
    """The files below a folder, in order; links to folders are followed, hidden entries are skipped."""
    try:
        found = os.stat(folder)
        if (found.st_dev, found.st_ino) in seen:  # a link to a folder around it
            return
        with os.scandir(folder) as entries:
            inside = sorted((entry.name, entry.is_dir()) for entry in entries if not is_hidden(entry.name))
    except PermissionError:  # it counts as one file
        yield folder
        return
    for name, is_dir in inside:
        if is_dir:
            yield from walk(os.path.join(folder, name), seen | {(found.st_dev, found.st_ino)})
        else:
            yield os.path.join(folder, name)


# ---------------------------------------------------------------------------------------------- what is there


def list_images(root: Path, skip: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """{class: sorted paths of the images directly in its folder}, as list_folders; two Unicode forms are one class."""
    found = defaultdict(list)
    for name, paths in list_folders(root, skip).items():
        found[composed(name)] += paths
    return {name: sorted(found[name]) for name in sorted(found)}


def list_folders(root: Path, skip: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """{name of a class folder: sorted paths of the images directly in it}; other files and folders `skip` are ignored.

    Raises:
        BadTreeError: a class folder without images, a broken link in place of a class or an image, or no class folder.
    """
    found, problems, beside = {}, [], []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if is_hidden(entry.name) or entry.name in skip:
            continue
        path = os.path.join(root, entry.name)
        if entry.is_dir():
            before = len(problems)
            if names := image_names(path, problems):
                found[entry.name] = [os.path.join(path, name) for name in names]
            elif len(problems) == before:
                problems.append(_why_empty(path))
        elif broken := broken_link(entry):
            problems.append(Problem(path, 'missing', f'{path}: {broken}'))
        elif is_image(entry.name):
            beside.append(path)
    if problems:
        raise BadTreeError(*problems)
    if not found:
        images = f'has {counted(len(beside), "image")} but' if beside else 'has'
        line = f'{root}: {images} no class folders; each image must be in the folder of its class'
        raise BadTreeError(Problem(str(root), 'tree', line))
    return found


def image_names(folder: str | Path, problems: list[Problem]) -> list[str]:
    """The sorted names of the images directly in a folder; broken links are added to the problems."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_image(entry.name) or entry.is_dir():
                continue
            if broken := broken_link(entry):
                path = os.path.join(folder, entry.name)
                problems.append(Problem(path, 'missing', f'{path}: {broken}'))
            else:
                names.append(entry.name)
    return sorted(names)


def _why_empty(folder: str) -> Problem:
    """What a class folder without images holds instead, and what to do."""
    files = list(walk(folder))
    if deeper := [path for path in files if is_image(os.path.basename(path))]:
        line = (
            f'{folder}: has no image in this class folder itself but {len(deeper)} further down, such as {deeper[0]}; '
            "move them up, or let --data_dir name the folder that holds the classes' folders"
        )
        return Problem(folder, 'empty class', line, deeper[0])
    holds = 'it is empty'
    if files:
        holds = f'of its {counted(len(files), "file")}, such as {files[0]}, none has a suffix of images'
    line = f'{folder}: this class folder has no image ({holds}); move it away if it is no class'
    return Problem(folder, 'empty class', line)


def find_root(root: Path, parts: tuple[str, ...], inner: str, dataset: str) -> Path:
    """`root`, or the folder `inner` in it: the first that has all `parts`.

    Raises:
        BadTreeError: neither has.
    """
    for candidate in (root, root / inner):
        if all((candidate / part).exists() for part in parts):
            return candidate
    near = root / inner if (root / inner).is_dir() else root
    missing = near / next(part for part in parts if not (near / part).exists())
    raise BadTreeError(Problem(str(missing), 'missing', f'{missing}: missing, this is not a complete {dataset} tree'))


def path_finder(alike: Callable[[str], str] = composed) -> Callable[[str], str | None]:
    """A function that gives a path as it is on disk, where names may be written in another way; None without one.

    Args:
        alike: names are the same if it gives the same for both; if not given, names in another Unicode form are.
    """

    @functools.cache
    def names(folder: str) -> dict[str, str]:
        return {alike(name): name for name in sorted(os.listdir(folder))} if os.path.isdir(folder) else {}

    @functools.cache
    def find(path: str) -> str | None:
        if os.path.exists(path):
            return path
        folder, name = os.path.split(path)
        folder = (find(folder) if folder else '.') if name else None
        if folder is None or alike(name) not in names(folder):
            return None
        found = os.path.join(folder, names(folder)[alike(name)])
        return found if os.path.exists(found) else None  # it may be a link to nothing

    return find


def require_files(listed: dict[str, str]) -> dict[str, str]:
    """{path: as it is on disk} of the files of {path: where it is listed}.

    Raises:
        BadTreeError: files are missing.
    """
    find, find_alike = path_finder(), path_finder(loose)
    found, problems = {path: find(path) for path in listed}, []
    for path in (path for path in listed if found[path] is None):
        near = find_alike(path)
        hint = f'; there is {near}' if near else ''
        line = f'{path}: listed in {listed[path]} but {broken_link(Path(path)) or "missing"}{hint}'
        problems.append(Problem(path, 'missing', line, near or ''))
    if problems:
        raise BadTreeError(*problems)
    return found


def read_text(path: Path) -> str:
    if pointer := lfs_pointer(path):
        raise DataError(f'{path}: cannot be read ({pointer})')
    try:
        return path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise DataError(f'{path}: is not UTF-8 text') from error


def read_list(path: Path) -> list[str]:
    names = [line.strip() for line in read_text(path).split('\n') if line.strip()]
    for name in names:
        if name.count('/') != 1:
            raise DataError(f'{path}: {name!r} is not of the form class/file')
    return names


def read_table(path: Path) -> dict[str, str]:
    """A table of CUB: 'number value' lines."""
    rows = {}
    for line in read_text(path).splitlines():
        if line.strip():
            key, _, value = line.strip().partition(' ')
            if not (key.isdigit() and value):
                line = f'{path}: {line!r} is not a line of a number and a value'
                raise BadTreeError(Problem(str(path), 'tree', line))
            rows[key] = value
    return rows


def read_mat(path: Path, name: str, convert: Callable = int) -> list:
    """A vector of a MATLAB file, of integers unless another conversion is given."""
    from scipy.io import loadmat  # slow to import, and one data set needs it

    try:
        return [convert(value) for value in loadmat(path)[name].ravel()]
    except Exception as error:  # scipy raises many kinds for a damaged file
        line = f'{path}: {lfs_pointer(path) or f"damaged, or has no vector {name}"}'
        raise BadTreeError(Problem(str(path), 'tree', line)) from error


# ---------------------------------------------------------------------------------------------- what is unused


def unused_files(images: Collection[str], top: str | None) -> list[str]:
    """A line for each kind of file below `top` that is not among the images, with a count and an example.

    Without `top`, of the other images in their folders alone.
    """
    folders = {os.path.dirname(path) for path in images}
    if top is None:
        paths = [os.path.join(folder, name) for folder in sorted(folders) for name in image_names(folder, [])]
    else:
        paths = list(walk(top))
    nested, unlisted, by_suffix = [], [], defaultdict(list)
    for path in paths:
        if path in images:
            continue
        if not is_image(os.path.basename(path)):
            by_suffix[os.path.splitext(path)[1].lower() or 'no suffix'].append(path)
        elif os.path.dirname(path) in folders:
            unlisted.append(path)
        else:
            nested.append(path)
    suffixes = ', '.join(f'{len(paths)} {suffix}' for suffix, paths in sorted(by_suffix.items()))
    others = [path for _, paths in sorted(by_suffix.items()) for path in paths]
    kinds = (
        (nested, 'image', 'outside the class folders'),
        (unlisted, 'image', 'that no list names'),
        (others, 'file', f'without an image suffix ({suffixes})'),
    )
    return [
        f'passed over {counted(len(paths), noun)} {which}, such as {paths[0]}' for paths, noun, which in kinds if paths
    ]


def group_by_content(paths: Iterable[str], bits: int | None, title: str) -> tuple[list[list[str]], list[Problem]]:
    """Decode images, `bits` as for open_image, and group those with the same pixels.

    Returns:
        the groups, each sorted, and the images that cannot be decoded.
    """
    groups, unreadable = defaultdict(list), []
    for path in tqdm(sorted(paths), desc=title, disable=None):
        try:
            image = open_image(path, bits)
        except DataError as error:
            unreadable.append(Problem(path, 'unreadable', str(error)))
        else:
            groups[hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()].append(path)
    return list(groups.values()), unreadable


# ---------------------------------------------------------------------------------------------- a million images


class Index:
    """The images of a tree as (path, class index) items, in little memory: a million take some tens of megabytes."""

    def __init__(self, root: Path, folders: list[str], names: np.ndarray, counts: np.ndarray, flat: bool = False):
        self.root, self.folders, self.names, self.flat = str(root), folders, names, flat  # flat: all stand in root
        self.classes = sorted({composed(folder) for folder in folders})
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.labels = [label_of[composed(folder)] for folder in folders]
        self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[str, int]:
        folder = int(np.searchsorted(self.ends, i, side='right'))
        inner = '' if self.flat else self.folders[folder]
        return os.path.join(self.root, inner, os.fsdecode(self.names[i])), self.labels[folder]

    def digest(self) -> bytes:
        """What the fingerprint is made of: file names, and where each class folder ends."""
        return self.names.tobytes() + self.ends.tobytes()


def read_index(root: Path) -> Index:
    """List a folder of class folders. Raises DataError: there is none, or fewer than two classes have images."""
    if not root.is_dir():
        raise DataError(f'{root}: no such folder; --data_dir must hold train/ and val/ with a folder for each class')
    found = list_folders(root)
    if len(found) < 2:
        raise DataError(f'{root}: needs at least two class folders with images; it has {len(found)}')
    names = np.array([os.fsencode(os.path.basename(path)) for paths in found.values() for path in paths])
    return Index(root, list(found), names, np.array([len(paths) for paths in found.values()]))
