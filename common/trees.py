"""Folders of images: which images stand in them, what is missing or damaged, and digests. No torch."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import DataError, lfs_pointer
from common.images import is_image, open_image
from common.names import composed, is_hidden, loose
from common.runs import counted


class BadTreeError(DataError):
    """A tree that is not complete; `problems` holds a line for each thing that is wrong."""

    def __init__(self, *problems: str):
        super().__init__(problems[0] + f' (and {len(problems) - 1} more)' * (len(problems) > 1))
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


def images_below(folder: str) -> list[str]:
    """The paths of the images at any depth below a folder."""
    return [path for path in walk(folder) if is_image(os.path.basename(path))]


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
        BadTreeError: a class folder without images, a broken link in place of a class or an image, or images but no
            class folders.
    """
    found, problems, loose = {}, [], []
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
            problems.append(f'{path}: {broken}')
        elif is_image(entry.name):
            loose.append(path)
    if problems:
        raise BadTreeError(*problems)
    if loose and not found:
        raise BadTreeError(
            f'{root}: has {counted(len(loose), "image")} but no class folders, and at least two class folders are '
            'needed; each image must be moved into the folder of its class'
        )
    return found


def image_names(folder: str | Path, problems: list[str]) -> list[str]:
    """The sorted names of the images directly in a folder; broken links are added to the problems."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_image(entry.name) or entry.is_dir():
                continue
            if broken := broken_link(entry):
                problems.append(f'{os.path.join(folder, entry.name)}: {broken}')
            else:
                names.append(entry.name)
    return sorted(names)


def _why_empty(folder: str) -> str:
    """What a class folder without images holds instead, and what to do."""
    if deeper := images_below(folder):
        return (
            f'{folder}: has no image in this class folder itself but {len(deeper)} further down, such as {deeper[0]}; '
            "move them up, or let --data_dir name the folder that holds the classes' folders"
        )
    holds = 'it is empty'
    if files := list(walk(folder)):
        holds = f'of its {counted(len(files), "file")}, such as {files[0]}, none has a suffix of images'
    return f'{folder}: this class folder has no image ({holds}); move it away if it is no class'


def find_root(root: Path, parts: tuple[str, ...], inner: str, dataset: str) -> Path:
    """`root`, or the folder `inner` in it: the first that has all `parts`.

    Raises:
        BadTreeError: neither has.
    """
    for candidate in (root, root / inner):
        if all((candidate / part).exists() for part in parts):
            return candidate
    near = root / inner if (root / inner).is_dir() else root
    missing = next(part for part in parts if not (near / part).exists())
    raise BadTreeError(f'{near / missing}: missing, this is not a complete {dataset} tree')


def disk_finder() -> Callable[[str], tuple[str | None, str]]:
    """A function that finds a path whose names may have another Unicode form on disk; it lists each folder once.

    It returns the path as it is on disk and ''; or None and, in words, a path there that differs by case or spaces
    alone, if there is one. A link to nothing is not found.
    """
    folders: dict[str, tuple[str | None, str, dict[str, str]]] = {}

    def look(path: str) -> tuple[str | None, str]:
        folder, name = os.path.split(path)
        if folder not in folders:
            there, near = (folder, '') if os.path.isdir(folder or '.') or folder == path else look(folder)
            names = []
            if there is not None and os.path.isdir(there or '.'):
                with os.scandir(there or '.') as entries:
                    names = [entry.name for entry in entries if not broken_link(entry)]
            folders[folder] = there, near, {composed(name): name for name in names} | {name: name for name in names}
        there, near, names = folders[folder]
        if found := names.get(name) or names.get(composed(name)):
            return os.path.join(there, found), ''
        alike = next((other for other in names if loose(other) == loose(name)), None)
        return None, near if alike is None else f'; there is {os.path.join(there, alike)}'

    return look


def require_files(listed: dict[str, str]) -> dict[str, str]:
    """{path: as it is on disk} of the files of {path: where it is listed}.

    Raises:
        BadTreeError: files are missing.
    """
    look, found, problems = disk_finder(), {}, []
    for path, listed_in in listed.items():
        found[path], near = look(path)
        if found[path] is None:
            problems.append(f'{path}: listed in {listed_in} but {broken_link(Path(path)) or "missing"}{near}')
    if problems:
        raise BadTreeError(*problems)
    return found


def read_text(path: Path) -> str:
    if pointer := lfs_pointer(path):
        raise DataError(f'{path}: cannot be read ({pointer})')
    try:
        return path.read_text(encoding='utf-8-sig')
    except OSError as error:
        raise DataError(f'{path}: cannot be read ({error.strerror})') from error
    except UnicodeDecodeError as error:
        raise DataError(f'{path}: is not UTF-8 text') from error


def read_list(path: Path) -> list[str]:
    names = [line.strip() for line in read_text(path).split('\n') if line.strip()]
    for name in names:
        if name.count('/') != 1 or not {'', '.', '..'}.isdisjoint(name.split('/')):
            raise DataError(f'{path}: {name!r} is not of the form class/file')
    return names


def read_table(path: Path) -> dict[str, str]:
    """A table of CUB: 'number value' lines."""
    rows = {}
    for line in read_text(path).splitlines():
        if line.strip():
            key, _, value = line.strip().partition(' ')
            if not (key.isdigit() and value) or key in rows:
                raise BadTreeError(f'{path}: {line!r} is not a line of a number and a value')
            rows[key] = value
    return rows


def read_mat(path: Path, name: str) -> list[int]:
    """A vector of integers of a MATLAB file."""
    from scipy.io import loadmat  # slow to import, and one data set needs it

    try:
        with open(path, 'rb') as file:
            return [int(value) for value in loadmat(file)[name].ravel()]
    except Exception as error:  # scipy raises many kinds for a damaged file
        if isinstance(error, OSError) and error.errno:
            raise
        raise BadTreeError(f'{path}: {lfs_pointer(path) or f"damaged, or has no vector {name}"}') from error


# ---------------------------------------------------------------------------------------------- what is unused


def unused_files(images: set[str], top: str) -> list[str]:
    """A line for each kind of file below `top` that is not among the images, with a count and an example.

    Raises:
        DataError: a folder cannot be read.
    """
    folders = {os.path.dirname(path) for path in images}
    nested, unlisted, by_suffix = [], [], defaultdict(list)
    try:
        paths = list(walk(top))
    except OSError as error:
        raise DataError(f'{error.filename}: cannot be read ({error.strerror})') from error
    for path in paths:
        if path in images:
            continue
        if not is_image(os.path.basename(path)):
            by_suffix[os.path.splitext(path)[1].lower() or 'no suffix'].append(path)
        else:
            (unlisted if os.path.dirname(path) in folders else nested).append(path)
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


# ---------------------------------------------------------------------------------------------- content


def group_by_content(paths: Iterable[str], bits: int | None, title: str) -> tuple[list[list[str]], list[str]]:
    """Decode images and group those with the same pixels.

    Args:
        paths: of splits.
        bits: as for open_image.
        title: of the progress bar.

    Returns:
        the groups, each sorted, and a line for each image that cannot be decoded.
    """
    groups, unreadable = defaultdict(list), []
    for path in tqdm(sorted(paths), desc=title, disable=None):
        try:
            image = open_image(path, bits)
        except DataError as error:
            unreadable.append(str(error))
        else:
            groups[hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()].append(path)
    return list(groups.values()), unreadable


# ---------------------------------------------------------------------------------------------- a million images


class Index:
    """The images of a tree as (path, class index) items, in little memory: a million take some tens of megabytes."""

    def __init__(self, root: Path, folders: list[str], names: np.ndarray, counts: np.ndarray):
        self.root, self.folders, self.names = str(root), folders, names
        self.classes = sorted({composed(folder) for folder in folders})
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.labels = [label_of[composed(folder)] for folder in folders]
        self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[str, int]:
        folder = int(np.searchsorted(self.ends, i, side='right'))
        return os.path.join(self.root, self.folders[folder], os.fsdecode(self.names[i])), self.labels[folder]

    def digest(self) -> bytes:
        """What the fingerprint is made of: file names, and where each class folder ends."""
        return self.names.tobytes() + self.ends.tobytes()


def read_index(root: Path) -> Index:
    """List a folder of class folders.

    Raises:
        DataError: there is no such folder, it cannot be listed, or fewer than two classes have images.
    """
    if not root.is_dir():
        raise DataError(f'{root}: no such folder; --data_dir must hold train/ and val/ with a folder for each class')
    try:
        found = list_folders(root)
    except OSError as error:
        raise DataError(f'{error.filename}: cannot be listed ({error.strerror})') from error
    if len(found) < 2:
        raise DataError(f'{root}: needs at least two class folders with images; it has {len(found)}')
    names = np.array([os.fsencode(os.path.basename(path)) for paths in found.values() for path in paths])
    return Index(root, list(found), names, np.array([len(paths) for paths in found.values()]))
