"""The user's own images: a folder of class folders, or a list in a CSV; folds that keep groups on one side. No torch.

A list has the columns `path` and `label`, and may have
    subset   (or split) train, val or test: as fold 1; without val, a tenth of each class of train validates
    fold     1 to K: in fold f the images of f test, those of f + 1 (wrapping) validate and the rest trains
    group    images that never stand on two sides; an image with an empty cell is a group of its own
Without subset and fold, and for a folder, the images are divided into --folds_total blocks, of which f tests, f + 1
(wrapping) validates and the rest trains: by the hash of their paths, or with groups by scikit-learn's
StratifiedGroupKFold.
"""

import csv
import io
import itertools
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError
from common.names import class_notes, column_of, composed, is_hidden, subset_of
from common.options import CONTENT, FEWEST, FOLDS, SplitOptions
from common.runs import counted, digest, write_atomic
from common.splits import SUBSETS, Splits, draw_val, hash_blocks, hash_order, sorted_splits, splits_of_blocks, top_of
from common.trees import BadTreeError, Problem, list_images, read_text, require_files

NEEDED, PLACES = ('path', 'label'), ('subset', 'fold')  # columns of a list
KNOWN = (*NEEDED, *PLACES, 'group')


# ---------------------------------------------------------------------------------------------- folders


def folder_splits(root: Path, fold: int, own: SplitOptions) -> Splits:
    """A folder of class folders, divided; or train/, val/, test/ of such, taken as they are."""
    folders = own_subsets(root)
    if not folders:
        files = list_images(root)
        splits = divide(files, fold, own, str(root), find_groups(files, own.groups))
        return splits if any(own) else splits._replace(division=None)
    alone = f'--data_dir {folders["train"]} divides train/ alone'
    if any(own):
        raise DataError(
            f'{root}: has train/ and test/ of its own, which --groups and --folds_total would divide anew; leave them '
            f'out, or {alone}'
        )
    if 'test' not in folders:
        raise DataError(f'{root / "test"}: no such folder, beside train/; add it, or {alone}')
    items, classes, notes = take_subsets({s: list_images(folder) for s, folder in folders.items()}, folders['train'])
    if named := [f'{folder.name}/ as {subset}/' for subset, folder in folders.items() if folder.name != subset]:
        notes = (f'{root}: {", ".join(named)} is taken', *notes)
    return Splits(*(items[subset] for subset in SUBSETS), classes, notes=notes)


def take_subsets(files: dict[str, dict[str, list[str]]], name: str | Path) -> tuple[dict[str, list], list[str], tuple]:
    """The items of each subset of {subset: {class: paths}}, the classes, and a note where val is drawn from train."""
    classes, notes = sorted(set().union(*files.values())), ()
    if not files.get('val'):
        if few := [cls for cls, paths in files['train'].items() if len(paths) < 2]:
            lines = (f"{name}: class '{cls}' has one image, of which none can be drawn to validate" for cls in few)
            raise BadTreeError(*(Problem(str(name), 'tree', line) for line in lines))
        drawn = {cls: draw_val(paths, f'{cls}/') for cls, paths in files['train'].items()}
        train, val = ({cls: sorted(parts[i]) for cls, parts in drawn.items()} for i in (0, 1))
        files = files | dict(train=train, val=val)
        notes = (f'{name}: gives no validation images, so a tenth of each class of train validates',)
    items = {
        subset: [(path, label) for label, cls in enumerate(classes) for path in found.get(cls, ())]
        for subset, found in files.items()
    }
    return items, classes, notes


def own_subsets(root: Path) -> dict[str, Path]:
    """The folders of the subsets in a tree that is split by itself, by subset; empty for a folder of class folders.

    They may have any of names.SUBSET_NAMES, in capitals too. A class may be called train: its folder holds no folders.
    """
    own: dict[str, Path] = {}
    for name in sorted(entry.name for entry in os.scandir(root) if entry.is_dir()):
        if subset := subset_of(name):
            if subset in own:
                raise DataError(f'{root}: has both {own[subset].name}/ and {name}/; remove one of them')
            own[subset] = root / name
    split = 'train' in own and any(entry.is_dir() and not is_hidden(entry.name) for entry in os.scandir(own['train']))
    return own if split else {}


# ---------------------------------------------------------------------------------------------- groups and blocks


def find_groups(files: dict[str, list[str]], groups: str | None) -> dict[str, str]:
    """{path: group} by --groups; {} without it."""
    paths = sorted(path for listed in files.values() for path in listed)
    if groups is None:
        return {}
    if groups == CONTENT:
        return group_by_bytes(paths)
    found = {}
    for path in paths:
        match = re.search(groups, os.path.basename(path))
        if match and (name := (match.groups() or [None])[0] or match.group()):
            found[path] = name
    if without := [path for path in paths if path not in found]:
        raise DataError(
            f'--groups {groups}: gives no group to {len(without)} of {counted(len(paths), "image")}, the first '
            f'{without[0]}; give a pattern that all names match'
        )
    return found


def group_by_bytes(paths: list[str]) -> dict[str, str]:
    """{path: the first of the paths whose file has the same bytes}; only files of one size are read."""
    by_size, found, top = defaultdict(list), {}, top_of(paths)
    for path in sorted(paths):
        by_size[os.path.getsize(path)].append(path)
    for same in by_size.values():
        first = {}
        for path in same:
            key = digest(Path(path).read_bytes()) if len(same) > 1 else ''
            found[path] = first.setdefault(key, path)[len(top) :]
    return found


def divide(files: dict[str, list[str]], fold: int, own: SplitOptions, name: str, groups: dict[str, str]) -> Splits:
    """One fold of {class: paths}, with its division.

    Raises:
        BadTreeError: a class has fewer images or groups than there are folds.
    """
    folds, noun = own.folds_total or FOLDS, 'group' if groups else 'image'
    counts = {cls: len({groups.get(path, path) for path in paths}) for cls, paths in sorted(files.items())}
    if few := [f"class '{cls}' has {counted(count, noun)}" for cls, count in counts.items() if count < folds]:
        least = min(counts.values())
        way_out = f'give --folds_total {least}, ' * (least >= FEWEST) + 'make smaller groups, ' * bool(groups)
        way_out += 'add images, or move the class away'
        lines = (f'{name}: {text}; {folds} folds need at least {folds}: {way_out}' for text in few)
        raise BadTreeError(*(Problem(name, 'tree', line) for line in lines))
    blocks = group_blocks(files, groups, folds, name) if groups else hash_blocks(files, folds)
    division = {path: (str(block), groups.get(path, '')) for path, block in blocks.items()}
    return splits_of_blocks(files, blocks, fold, folds)._replace(division=division)


def group_blocks(files: dict[str, list[str]], groups: dict[str, str], folds: int, name: str) -> dict[str, int]:
    """{path: block from 1}, a group in one block and classes in equal shares: StratifiedGroupKFold.

    It takes the groups in the order of a hash of their names and is not shuffled, which versions do in different ways.

    Raises:
        BadTreeError: the groups of a class do not fill the folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # slow to import, and groups alone need it

    pairs = [(path, cls) for cls in sorted(files) for path in sorted(files[cls])]
    rank = {group: i for i, group in enumerate(hash_order(sorted(set(groups.values())), '', str))}
    labels, ranks = [cls for _, cls in pairs], [rank[groups[path]] for path, _ in pairs]
    found = StratifiedGroupKFold(folds).split(labels, labels, ranks)
    blocks = {pairs[i][0]: block for block, (_, tested) in enumerate(found, start=1) for i in tested}
    for cls, paths in files.items():
        if len({blocks[path] for path in paths}) < FEWEST:
            line = (
                f"{name}: the groups of class '{cls}' hold other classes too, and fill fewer than {FEWEST} of {folds} "
                'folds; take another --folds_total, make smaller groups, or move the class away'
            )
            raise BadTreeError(Problem(name, 'tree', line))
    return blocks


# ---------------------------------------------------------------------------------------------- lists


class Row(NamedTuple):
    """An image of a list."""

    line: int
    path: str
    label: str
    place: str  # the subset or the number of the fold; '' without such a column
    group: str  # '' without such a column


class List(NamedTuple):
    """A list as it stands in the file."""

    rows: list[Row]  # by path
    place: str  # the column that divides the images: 'subset', 'fold' or ''
    grouped: bool  # it has a column group
    notes: tuple[str, ...]  # how the file was read where its form leaves room, and what of it is not used


def root_of(data_dir: str | Path | None, lists: str) -> Path:
    """The folder that the paths of a list are relative to: data_dir, else the list's own."""
    return Path(os.path.abspath(data_dir if data_dir is not None else Path(lists).parent))


def read_cells(lists: str) -> tuple[list[str], list[tuple[int, dict[str, str]]], list[str]]:
    """The columns of a CSV, (line, {column: cell}) of its rows that are not empty, and notes."""
    text, rows, notes = read_text(Path(lists)), [], []
    mark = max(',;\t', key=text.lstrip().partition('\n')[0].count)  # spreadsheets of some countries write semicolons
    reader = csv.reader(io.StringIO(text, newline=''), delimiter=mark, strict=True)
    try:
        written = [name.strip() for name in next(reader, [])]
        header = [column_of(name) for name in written]
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if any(cells[len(header) :]):
                raise DataError(f'{lists}: line {reader.line_num} has more cells than its first line')
            if any(cells):
                rows.append((reader.line_num, dict(itertools.zip_longest(header, cells[: len(header)], fillvalue=''))))
    except csv.Error as error:
        raise DataError(f'{lists}: line {reader.line_num} is damaged ({error})') from error
    if missing := [column for column in NEEDED if column not in header]:
        raise DataError(
            f"{lists}: has no column {missing[0]}, only '{', '.join(header)}'; its first line must name the columns "
            'path and label, with commas between'
        )
    if twice := [column for column in header if column and header.count(column) > 1]:
        raise DataError(f'{lists}: has two columns {twice[0]}; remove one of them')
    if not rows:
        raise DataError(f'{lists}: lists no image')
    if 'subset' in header and (name := written[header.index('subset')]).lower() != 'subset':
        notes.append(f'{lists}: its column {name} is taken as subset')
    if unused := [column for column in header if column and column not in KNOWN]:
        notes.append(f'{lists}: the columns {", ".join(unused)} are not used')
    return header, rows, notes


def read_list_of(root: Path, lists: str) -> List:
    """The images of a CSV, checked line by line.

    Raises:
        DataError: a cell is wrong, or an image is listed twice.
    """
    header, cells, notes = read_cells(lists)
    place = [column for column in PLACES if column in header]
    if len(place) > 1:
        raise DataError(f'{lists}: has a column subset and a column fold; remove one of them')
    place = place[0] if place else ''
    rows, seen, turned = [], {}, 0
    for line, cell in cells:
        for column in NEEDED:
            if not cell[column]:
                raise DataError(f'{lists}: line {line} has an empty {column}')
        path = os.path.normpath(os.path.join(root, cell['path']))
        if '\\' in cell['path'] and not os.path.lexists(path):  # as Windows writes it
            path, turned = os.path.normpath(os.path.join(root, cell['path'].replace('\\', '/'))), turned + 1
        if path in seen:
            raise DataError(f'{lists}: {cell["path"]} is listed twice, in lines {seen[path]} and {line}')
        seen[path] = line
        where = read_place(place, cell[place], f'{lists}: line {line}') if place else ''
        group = (cell['group'] or cell['path']) if 'group' in header else ''
        rows.append(Row(line, path, composed(cell['label']), where, group))
    if turned:
        notes.append(f'{lists}: {counted(turned, "path")} with backslashes are read as with slashes')
    notes += class_notes(cell['label'] for _, cell in cells)
    return List(sorted(rows, key=lambda row: row.path), place, 'group' in header, tuple(notes))


def read_place(column: str, text: str, where: str) -> str:
    """The subset, or the number of the fold, in a cell."""
    if column == 'subset':
        if (subset := subset_of(text)) is None:
            raise DataError(f"{where}: subset '{text}' is none of train, val and test")
        return subset
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise DataError(f"{where}: fold '{text}' is no number from 1")
    return str(int(text))


def count_folds(dataset: str, root: Path, own: SplitOptions) -> int:
    """How many folds `folder` or `lists` has."""
    if dataset == 'folder':
        return 1 if own_subsets(root) else own.folds_total or FOLDS
    found = read_list_of(root, own.lists)
    if found.place != 'fold':
        return 1 if found.place else own.folds_total or FOLDS
    numbers = {int(row.place) for row in found.rows}
    if absent := set(range(1, max(*numbers, FEWEST) + 1)) - numbers:
        raise DataError(
            f'{own.lists}: no image has fold {min(absent)}; folds are numbered from 1, and there are {FEWEST} at least '
            '(one tests, the next validates, the rest trains)'
        )
    return len(numbers)


def list_splits(root: Path, fold: int, own: SplitOptions) -> Splits:
    """One fold of a list, whose paths are relative to root; see the top of this file."""
    found = read_list_of(root, own.lists)
    check_list(found, own)
    found = found_files(found, own)
    files, places = defaultdict(list), {row.path: row.place for row in found.rows}
    for row in found.rows:
        files[row.label].append(row.path)
    groups = {row.path: row.group for row in found.rows} if found.grouped else find_groups(files, own.groups)
    if not found.place:
        return divide(files, fold, own, own.lists, groups)._replace(notes=found.notes)
    division, notes = {path: (place, groups.get(path, '')) for path, place in places.items()}, ()
    if found.place == 'fold':
        blocks = {path: int(place) for path, place in places.items()}
        splits = splits_of_blocks(files, blocks, fold, max(blocks.values()))
    else:
        by_subset = {subset: defaultdict(list) for subset in SUBSETS}
        for row in found.rows:
            by_subset[row.place][row.label].append(row.path)
        items, classes, notes = take_subsets(by_subset, own.lists)
        splits = sorted_splits(items, classes)
    return splits._replace(division=division, notes=found.notes + notes)


def found_files(found: List, own: SplitOptions) -> List:
    """The list with its paths as they are on disk.

    Raises:
        BadTreeError: images are missing. DataError: all are.
    """
    try:
        there = require_files({row.path: f'line {row.line} of {own.lists}' for row in found.rows})
    except BadTreeError as error:
        if len(error.problems) < len(found.rows):
            raise
        raise DataError(
            f'{own.lists}: none of its {counted(len(found.rows), "image")} is there ({error.problems[0].line}); '
            '--data_dir must name the folder that the paths are relative to'
        ) from error
    return found._replace(rows=[row._replace(path=there[row.path]) for row in found.rows])


def check_list(found: List, own: SplitOptions) -> None:
    """Refuse options that a list answers itself, and groups that stand in two of its subsets or folds."""
    if found.place:
        for key in ('groups', 'folds_total'):
            if getattr(own, key) is not None:
                raise DataError(f'{own.lists}: its column {found.place} divides the images; leave --{key} out')
    if not found.grouped:
        return
    if own.groups is not None:
        raise DataError(f'{own.lists}: its column group says the groups; leave --groups out')
    first = {}
    for row in found.rows:
        other = first.setdefault(row.group, row)
        if other.place != row.place:
            raise DataError(
                f"{own.lists}: group '{row.group}' stands in {found.place} {other.place} (line {other.line}) and in "
                f'{found.place} {row.place} (line {row.line}); a group must stand in one'
            )
    if found.place == 'subset' and not any(row.place == 'val' for row in found.rows):
        raise DataError(f'{own.lists}: no row has the subset val, and of groups none is drawn; give some groups val')


def read_labelled(dataset: str, root: Path, own: SplitOptions) -> dict[str, list[tuple[str, str]]]:
    """(path, class) of all images of `folder` or `lists`, by the subset that they state; '' where they state none."""
    items = defaultdict(list)
    if dataset == 'lists':
        found = found_files(read_list_of(root, own.lists), own)
        for row in found.rows:
            items[row.place if found.place == 'subset' else ''].append((row.path, row.label))
    else:
        for subset, folder in (own_subsets(root) or {'': root}).items():
            items[subset] = [(path, cls) for cls, paths in list_images(folder).items() for path in paths]
    return items


def write_split(path: Path, splits: Splits) -> None:
    """Write the images of a fold with a division as a list, which --lists reads again with --data_dir its root."""
    text, root = io.StringIO(), os.path.abspath(splits.root)
    writer = csv.writer(text, lineterminator='\n')
    grouped = any(group for _, group in splits.division.values())
    writer.writerow([*NEEDED, 'subset'] + ['group'] * grouped)
    for subset in SUBSETS:
        for image, label in getattr(splits, subset):
            name = Path(os.path.abspath(image))
            name = name.relative_to(root).as_posix() if name.is_relative_to(root) else str(name)
            row = [name, splits.classes[label], subset]
            writer.writerow(row + [splits.division[image][1]] * grouped)
    write_atomic(path, os.fsencode(text.getvalue()))  # names of files need not be UTF-8
