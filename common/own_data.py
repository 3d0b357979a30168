"""The user's own images: a folder of class folders, or a list in a CSV; folds that keep groups on one side. No torch.

A list has the columns `path` and `label`, and may have
    subset   (or split) train, val or test: as fold 1; without val, a tenth of each class of train validates
    fold     1 to K: in fold f the images of f test, those of f + 1 (wrapping) validate and the rest trains
    group    images that never stand on two sides; an image with an empty cell is a group of its own
Without subset and fold, and for a folder, the images are divided into --folds_total blocks, of which f tests, f + 1
(wrapping) validates and the rest trains: by `partition`, or with groups by scikit-learn's StratifiedGroupKFold.
"""

import csv
import io
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError
from common.names import class_notes, column_of, composed, is_hidden, subset_of
from common.options import CONTENT, FEWEST, FOLDS, SplitOptions
from common.runs import counted, digest, write_atomic
from common.splits import (
    SUBSETS,
    Splits,
    check_counts,
    check_fold,
    draw_val,
    hash_blocks,
    hash_order,
    partition,
    sorted_splits,
    splits_of_blocks,
    top_of,
)
from common.trees import BadTreeError, image_names, list_images, read_text, require_files

NEEDED, PLACES = ('path', 'label'), ('subset', 'fold')  # columns of a list
KNOWN = (*NEEDED, *PLACES, 'group')


# ---------------------------------------------------------------------------------------------- folders


def folder_splits(root: Path, fold: int, own: SplitOptions) -> Splits:
    """A folder of class folders, divided; or train/, val/, test/ of such, taken as they are.

    Without val/ of its own, a tenth of each class of train/ validates.
    """
    folders = own_subsets(root)
    if not folders and not any(own):
        return partition(list_images(root), fold, str(root), fewer=True)
    if not folders:
        files = list_images(root)
        if len(files) < 2:
            raise BadTreeError(f'{root}: needs at least two class folders with images; it has {len(files)}')
        return divide(files, fold, own, str(root), find_groups(files, own.groups))
    if any(own):
        raise DataError(
            f'{root}: has train/ and test/ of its own, which --groups and --folds_total would divide anew; leave them '
            f'out, or --data_dir {folders["train"]} divides train/ alone'
        )
    if fold != 1:
        raise DataError(f'fold {fold} of {root} does not exist; it has train/ and test/ of its own, which is fold 1')
    if 'test' not in folders:
        raise DataError(
            f'{root / "test"}: no such folder, beside train/; add it, or --data_dir {folders["train"]} divides train/ '
            'alone'
        )
    files = {subset: list_images(folder) for subset, folder in folders.items()}
    if 'val' not in folders:
        files['train'], files['val'] = draw_vals(files['train'], str(folders['train']))
    classes = sorted(set().union(*files.values()))
    items = {
        subset: [(path, label) for label, name in enumerate(classes) for path in files[subset].get(name, [])]
        for subset in SUBSETS
    }
    return Splits(*(items[subset] for subset in SUBSETS), classes)


def draw_vals(files: dict[str, list[str]], name: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The images of each class that train, and the tenth that validates.

    Raises:
        BadTreeError: a class has one image.
    """
    if few := [cls for cls, paths in files.items() if len(paths) < 2]:
        raise BadTreeError(
            *(f"{name}: class '{cls}' has one image, of which none can be drawn to validate" for cls in few)
        )
    drawn = {cls: draw_val(paths, f'{cls}/') for cls, paths in files.items()}
    train, val = ({cls: sorted(parts[i]) for cls, parts in drawn.items()} for i in (0, 1))
    return train, val


def own_subsets(root: Path) -> dict[str, Path]:
    """The folders of the subsets in a tree that is split by itself, by subset; empty for a folder of class folders.

    They may have any of names.SUBSET_NAMES, in capitals too. A class may be called train: its folder holds no folders.

    Raises:
        DataError: two folders for one subset.
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
    """{path: group} by --groups; {} without it.

    Raises:
        DataError: the pattern matches nothing in a name, or a file cannot be read.
    """
    paths = sorted(path for listed in files.values() for path in listed)
    if groups is None:
        return {}
    if groups == CONTENT:
        return group_by_bytes(paths)
    found, without = {}, []
    for path in paths:
        match = re.search(groups, os.path.basename(path))
        name = match and ((match.group(1) if match.re.groups else None) or match.group())
        if name:
            found[path] = name
        else:
            without.append(path)
    if without:
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
        DataError: there is no such fold. BadTreeError: a class has fewer images or groups than there are folds.
    """
    folds = own.folds_total or FOLDS
    check_fold(fold, folds, name)
    blocks = group_blocks(files, groups, folds, name) if groups else hash_blocks(files, folds, name, fewer=True)
    division = {path: (str(block), groups.get(path, '')) for path, block in blocks.items()}
    return splits_of_blocks(files, blocks, fold, folds)._replace(division=division)


def group_blocks(files: dict[str, list[str]], groups: dict[str, str], folds: int, name: str) -> dict[str, int]:
    """{path: block from 1}, a group in one block and classes in equal shares: StratifiedGroupKFold.

    It takes the groups in the order of a hash of their names and is not shuffled, which versions do in different ways.

    Raises:
        BadTreeError: the groups of a class do not fill the folds.
    """
    counts = {cls: len({groups[path] for path in paths}) for cls, paths in files.items()}
    check_counts(counts, folds, name, 'group', fewer=True)
    from sklearn.model_selection import StratifiedGroupKFold  # slow to import, and groups alone need it

    pairs = [(path, cls) for cls in sorted(files) for path in sorted(files[cls])]
    rank = {group: i for i, group in enumerate(hash_order(sorted(set(groups.values())), '', str))}
    labels, ranks = [cls for _, cls in pairs], [rank[groups[path]] for path, _ in pairs]
    found = StratifiedGroupKFold(folds).split(labels, labels, ranks)
    blocks = {pairs[i][0]: block for block, (_, tested) in enumerate(found, start=1) for i in tested}
    for cls, paths in files.items():
        if len({blocks[path] for path in paths}) < FEWEST:
            raise BadTreeError(
                f"{name}: the groups of class '{cls}' hold other classes too, and fill fewer than {FEWEST} of {folds} "
                'folds; take another --folds_total, make smaller groups, or move the class away'
            )
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

    rows: list[Row]
    place: str  # the column that divides the images: 'subset', 'fold' or ''
    grouped: bool  # it has a column group
    notes: list[str]  # how the file was read where its form leaves room, and what of it is not used


def root_of(data_dir: str | Path | None, lists: str | None) -> Path:
    """The folder that the paths of a list are relative to: data_dir, else the list's own."""
    return Path(os.path.abspath(data_dir if data_dir is not None else Path(lists).parent))


def read_cells(lists: str) -> tuple[list[str], list[tuple[int, list[str]]], list[str]]:
    """The columns of a CSV, (line, cells) of its rows, and notes. Empty rows and empty cells at the end do not count.

    Raises:
        DataError: it cannot be read, lacks a column, or a row has more cells than there are columns.
    """
    text, rows, notes = read_text(Path(lists)), [], []
    mark = max(',;\t', key=text.lstrip().partition('\n')[0].count)  # spreadsheets of some countries write semicolons
    reader = csv.reader(io.StringIO(text, newline=''), delimiter=mark, strict=True)
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            while cells and not cells[-1]:
                cells.pop()
            if cells:
                rows.append((reader.line_num, cells))
    except csv.Error as error:
        raise DataError(f'{lists}: line {reader.line_num} is damaged ({error})') from error
    header = [column_of(cell) for cell in rows[0][1]] if rows else []
    if missing := [column for column in NEEDED if column not in header]:
        raise DataError(
            f"{lists}: has no column {missing[0]}, only '{', '.join(header)}'; its first line must name the columns "
            'path and label, with commas between'
        )
    if twice := [column for column in header if column and header.count(column) > 1]:
        raise DataError(f'{lists}: has two columns {twice[0]}; remove one of them')
    for line, cells in rows[1:]:
        if len(cells) > len(header):
            raise DataError(f'{lists}: line {line} has {counted(len(cells), "cell")}, its first line {len(header)}')
        cells += [''] * (len(header) - len(cells))
    if len(rows) < 2:
        raise DataError(f'{lists}: lists no image')
    if 'subset' in header and (named := rows[0][1][header.index('subset')]).lower() != 'subset':
        notes.append(f'{lists}: its column {named} is taken as subset')
    if unused := [column or 'without a name' for column in header if column not in KNOWN]:
        notes.append(f'{lists}: the columns {", ".join(unused)} are not used')
    return header, rows[1:], notes


def read_list_of(root: Path, lists: str) -> List:
    """The images of a CSV, checked line by line, by path.

    Raises:
        DataError: a cell is wrong, or an image is listed twice.
    """
    header, cells, notes = read_cells(lists)
    place = [column for column in PLACES if column in header]
    if len(place) > 1:
        raise DataError(f'{lists}: has a column subset and a column fold; remove one of them')
    rows, seen, turned = [], {}, 0
    for line, values in cells:
        cell = dict(zip(header, values))
        for column in NEEDED:
            if not cell[column]:
                raise DataError(f'{lists}: line {line} has an empty {column}')
        path = os.path.normpath(os.path.join(root, cell['path']))
        if '\\' in cell['path'] and not os.path.lexists(path):  # as Windows writes it
            path, turned = os.path.normpath(os.path.join(root, cell['path'].replace('\\', '/'))), turned + 1
        if path in seen:
            raise DataError(f'{lists}: {cell["path"]} is listed twice, in lines {seen[path]} and {line}')
        seen[path] = line
        where = read_place(place[0], cell[place[0]], f'{lists}: line {line}') if place else ''
        group = (cell['group'] or cell['path']) if 'group' in header else ''
        rows.append(Row(line, path, composed(cell['label']), where, group))
    if turned:
        notes.append(f'{lists}: {counted(turned, "path")} with backslashes are read as with slashes')
    notes += class_notes(cell[header.index('label')] for _, cell in cells)
    return List(sorted(rows, key=lambda row: row.path), ''.join(place), 'group' in header, notes)


def read_place(column: str, text: str, where: str) -> str:
    """The subset, or the number of the fold, in a cell."""
    if column == 'subset':
        if (subset := subset_of(text)) is None:
            raise DataError(f"{where}: subset '{text}' is none of train, val and test")
        return subset
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise DataError(f"{where}: fold '{text}' is no number from 1")
    return str(int(text))


def folds_of_list(found: List, own: SplitOptions) -> int:
    """How many folds a list has.

    Raises:
        DataError: the numbers of its folds are not 1 to K, with K three at least.
    """
    if found.place == 'subset':
        return 1
    if found.place == '':
        return own.folds_total or FOLDS
    numbers = {int(row.place) for row in found.rows}
    if absent := set(range(1, max(*numbers, FEWEST) + 1)) - numbers:
        raise DataError(
            f'{own.lists}: no image has fold {min(absent)}; folds are numbered from 1, and there are {FEWEST} at least '
            '(one tests, the next validates, the rest trains)'
        )
    return len(numbers)


def list_splits(root: Path, fold: int, own: SplitOptions) -> Splits:
    """One fold of a list; see the top of this file.

    Args:
        root: what its paths are relative to.

    Raises:
        DataError: the list is wrong, or the options do not fit it. BadTreeError: images are missing, or a class has
            too few.
    """
    found = read_list_of(root, own.lists)
    check_list(found, own)
    folds = folds_of_list(found, own)
    check_fold(fold, folds, own.lists)
    found = found_files(found, own)
    files = defaultdict(list)
    for row in found.rows:
        files[row.label].append(row.path)
    if len(files) < 2:
        raise DataError(f"{own.lists}: has only the label '{found.rows[0].label}'; there is nothing to tell apart")
    groups = {row.path: row.group for row in found.rows} if found.grouped else find_groups(files, own.groups)
    if not found.place:
        return divide(files, fold, own, own.lists, groups)
    places = {row.path: row.place for row in found.rows}
    if found.place == 'fold':
        splits = splits_of_blocks(files, {path: int(place) for path, place in places.items()}, fold, folds)
    else:
        splits = splits_of_subsets(files, places, own.lists)
    return splits._replace(division={path: (place, groups.get(path, '')) for path, place in places.items()})


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
            f'{own.lists}: none of its {counted(len(found.rows), "image")} is there ({error.problems[0]}); '
            '--data_dir must name the folder that the paths are relative to'
        ) from error
    return found._replace(rows=[row._replace(path=there[row.path]) for row in found.rows])


def check_list(found: List, own: SplitOptions) -> None:
    """Refuse options that a list answers itself, and groups that stand in two of its subsets or folds."""
    if found.place:
        for key in ('groups', 'folds_total'):
            if getattr(own, key) is not None:
                raise DataError(f'{own.lists}: its column {found.place} divides the images; leave --{key} out')
    if found.grouped and own.groups is not None:
        raise DataError(f'{own.lists}: its column group says the groups; leave --groups out')
    first, split = {}, {}
    for row in found.rows if found.grouped and found.place else ():
        other = first.setdefault(row.group, row)
        if other.place != row.place:
            split.setdefault(row.group, (other, row))
    if split:
        a, b = next(iter(split.values()))
        more = f' (and {len(split) - 1} more groups do)' * (len(split) > 1)
        raise DataError(
            f"{own.lists}: group '{a.group}' stands in {found.place} {a.place} (line {a.line}) and in {found.place} "
            f'{b.place} (line {b.line}){more}; a group must stand in one'
        )
    if found.place == 'subset' and found.grouped and not any(row.place == 'val' for row in found.rows):
        raise DataError(f'{own.lists}: no row has the subset val, and of groups none is drawn; give some groups val')


def splits_of_subsets(files: dict[str, list[str]], places: dict[str, str], name: str) -> Splits:
    """The images in the subsets that a list says; without val, a tenth of each class of train validates."""
    by_subset = {s: {cls: [p for p in paths if places[p] == s] for cls, paths in files.items()} for s in SUBSETS}
    if not any(by_subset['val'].values()):
        trained = {cls: paths for cls, paths in by_subset['train'].items() if paths}
        by_subset['train'], by_subset['val'] = draw_vals(trained, name)
    classes = sorted(files)
    items = {
        subset: [(path, label) for label, cls in enumerate(classes) for path in found.get(cls, ())]
        for subset, found in by_subset.items()
    }
    return sorted_splits(items, classes)


def read_labelled(dataset: str, root: Path, own: SplitOptions) -> dict[str, list[tuple[str, str]]]:
    """(path, class) of all images of `folder` or `lists`, by the subset that they state; '' where they state none.

    Raises:
        DataError: a folder or the list cannot be read, or images are missing.
    """
    items = defaultdict(list)
    if dataset == 'lists':
        found = found_files(read_list_of(root, own.lists), own)
        for row in found.rows:
            items[row.place if found.place == 'subset' else ''].append((row.path, row.label))
    else:
        for subset, folder in (own_subsets(root) or {'': root}).items():
            items[subset] = [(path, cls) for cls, paths in list_images(folder).items() for path in paths]
    return items


def takes_groups(dataset: str, data_dir: str | Path | None, own: SplitOptions) -> bool:
    """Whether --groups can divide images: not where a list or a tree says itself which stand together, or which test.

    Raises:
        DataError: the list cannot be read.
    """
    if dataset == 'lists':
        found = read_list_of(root_of(data_dir, own.lists), own.lists)
        return not (found.place or found.grouped)
    return dataset == 'folder' and not own_subsets(Path(data_dir))


def count_folds(dataset: str, data_dir: str | Path | None, own: SplitOptions) -> int:
    """How many folds `folder` or `lists` has.

    Raises:
        DataError: the list cannot be read.
    """
    if dataset == 'lists':
        return folds_of_list(read_list_of(root_of(data_dir, own.lists), own.lists), own)
    return 1 if own_subsets(Path(data_dir)) else own.folds_total or FOLDS


# ---------------------------------------------------------------------------------------------- what is reported


def division_notes(splits: Splits, own: SplitOptions) -> list[str]:
    """What a division did that its user should know of its groups.

    Args:
        splits: with a division.
        own: how it was made.
    """
    sizes, classes, lines = Counter(), defaultdict(set), []
    for items in splits[:3]:
        for path, label in items:
            group = splits.division[path][1]
            sizes[group] += 1
            classes[group].add(label)
    if '' not in sizes:
        several = {group: n for group, n in sizes.items() if n > 1}
        mixed = [group for group in several if len(classes[group]) > 1]
        total = counted(sum(sizes.values()), 'image')
        if own.groups == CONTENT:
            copies = sum(several.values()) - len(several)
            line = f'--groups {CONTENT}: {copies} of {total} have the same bytes as another'
            line += f', in {counted(len(several), "group")}, such as {min(several)}' if several else ''
        else:
            line = f'groups: {total} in {counted(len(sizes), "group")}, {len(sizes) - len(several)} of one image'
        of_several = f'; {counted(len(mixed), "group")} of images of several classes, such as {min(mixed or [""])}'
        lines.append(line + of_several * bool(mixed))
    return lines


def absent_notes(splits: Splits) -> list[str]:
    """A line for each of val and test in which classes that train have no image."""
    lines, trained = [], {label for _, label in splits.train}
    for subset, what in (('val', 'validated'), ('test', 'tested')):
        if absent := trained - {label for _, label in getattr(splits, subset)}:
            more = f' (and {len(absent) - 1} more)' * (len(absent) > 1)
            lines.append(f"no image of class '{splits.classes[min(absent)]}'{more} is {what} in this fold")
    return lines


def folder_notes(root: Path) -> list[str]:
    """How the folders of a tree that is split by itself were taken, and the validation set, where it is drawn."""
    own, lines = own_subsets(root), []
    if named := [f'{folder.name}/ as {subset}/' for subset, folder in own.items() if folder.name != subset]:
        lines.append(f'{root}: {", ".join(named)} is taken')
    if own and 'val' not in own:
        lines.append(f'{root} has no val/: a tenth of each class of {own["train"]} validates')
    return lines


def list_notes(splits: Splits, root: Path, own: SplitOptions) -> list[str]:
    """What of a list, and of the folders of its images, is not used; and the validation set, where it is drawn."""
    images, left = set(splits.division), []
    for folder in sorted({os.path.dirname(path) for path in images}):
        left += [path for name in image_names(folder, []) if (path := os.path.join(folder, name)) not in images]
    found = read_list_of(root, own.lists)
    lines = found.notes
    if left:
        lines.append(f'passed over {counted(len(left), "image")} that {own.lists} does not list, such as {left[0]}')
    if found.place == 'subset' and not any(row.place == 'val' for row in found.rows):
        lines.append(f'{own.lists} has no subset val: a tenth of each class of train validates')
    return lines


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
