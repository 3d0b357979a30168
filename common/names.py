"""Names that people and systems write in several ways: of classes, of subsets, of the columns of a list. No torch."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable

SUBSET_NAMES = {
    **dict.fromkeys(('train', 'training'), 'train'),
    **dict.fromkeys(('val', 'valid', 'validation'), 'val'),
    **dict.fromkeys(('test', 'testing'), 'test'),
}
# Folders that systems leave among images. They are passed over as hidden ones are.
OF_SYSTEMS = frozenset({'__macosx', '@eadir', 'lost+found', '$recycle.bin', 'system volume information'})


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC); a Mac may write the decomposed one, which looks the same."""
    return unicodedata.normalize('NFC', name)


def loose(name: str) -> str:
    """What names have in common that differ by case, spaces or Unicode form alone."""
    return ' '.join(composed(name).casefold().split())


def subset_of(name: str) -> str | None:
    """'train', 'val' or 'test', for a folder or a cell of this name; None for any other."""
    return SUBSET_NAMES.get(loose(name))


def column_of(name: str) -> str:
    """The column of a list that a cell of its first line names; `split` is `subset`."""
    column = loose(name.replace('\ufeff', ''))
    return 'subset' if column == 'split' else column


def is_hidden(name: str) -> bool:
    """True for files and folders that no user sees, or that a system made for itself."""
    return name[0] == '.' or name.lower() in OF_SYSTEMS


def near_miss(name: str, names: Iterable[str]) -> str:
    """ "; 'wood' differs by case or spaces alone", of the first such name among others; '' without one."""
    near = next((other for other in names if other != name and loose(other) == loose(name)), None)
    return '' if near is None else f"; '{near}' differs by case or spaces alone"


def class_notes(written: Iterable[str]) -> list[str]:
    """A line for each class that is written in two Unicode forms, which are one, and for near misses, which are not.

    Args:
        written: the names of classes as folders or a list have them.
    """
    forms, alike = defaultdict(set), defaultdict(set)
    for name in written:
        forms[composed(name)].add(name)
        alike[loose(name)].add(composed(name))
    lines = [
        f"class '{name}' is written in {len(found)} Unicode forms (NFC and NFD), which are taken as one class"
        for name, found in sorted(forms.items())
        if len(found) > 1
    ]
    return lines + [
        f'classes {" and ".join(map(repr, sorted(found)))} differ by case or spaces alone, and are taken as different'
        for found in alike.values()
        if len(found) > 1
    ]
