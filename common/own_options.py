"""Options of the user's own images: how they are divided, and what they are called. No torch."""

import re
import shlex
from typing import NamedTuple

from common.errors import RunError
from common.registry import DATASETS, nameable

CONTENT = 'content'  # of --groups: files of the same bytes
FOLDS = 5  # of a partition without --folds_total
FEWEST = 3  # folds: one tests, the next validates and the rest train
NAME = r'[A-Za-z0-9][A-Za-z0-9_-]{0,63}'  # of --name


class SplitOptions(NamedTuple):
    """How the user's own images are divided; see common/own_data.py."""

    lists: str | None = None  # a CSV of images
    groups: str | None = None  # a regular expression, or CONTENT
    folds_total: int | None = None  # None: FOLDS


AS_IT_IS = SplitOptions()  # no option is given


def folds(text: str) -> int | None:
    """The value of --folds_total; FOLDS is the default, None."""
    return None if int(text) == FOLDS else int(text)


def add_split_args(group) -> None:
    """How the user's own images are divided: the fields of SplitOptions."""
    group.add_argument(
        '--lists', metavar='CSV', help='images of --dataset lists: path, label and, if there, subset or fold, and group'
    )
    group.add_argument(
        '--groups',
        metavar='REGEX',
        help='of folder and lists: images whose names have the same match (its first group, if it has one) stand on '
        f'one side; {CONTENT}: files of the same bytes do',
    )
    group.add_argument(
        '--folds_total', type=folds, metavar='K', help=f'of folder and lists: how many folds, {FOLDS} if not given'
    )


def split_options(values: dict) -> SplitOptions:
    """Those among options by name."""
    return SplitOptions(*(values.get(key) for key in SplitOptions._fields))


def split_words(own: SplitOptions) -> list[str]:
    """The words of a command line that give these options."""
    return [f'--{key}={value}' for key, value in own._asdict().items() if value is not None]


def check_split_options(dataset: str, own: SplitOptions) -> None:
    """Refuse options that do not fit the data set.

    Raises:
        RunError: with the option and the way out.
    """
    if own.lists is None and dataset == 'lists':
        raise RunError('--dataset lists needs --lists, a CSV file with the columns path and label')
    if own.lists is not None and dataset != 'lists':
        raise RunError(f'--lists {own.lists} is for --dataset lists, not for {dataset}; leave one of them out')
    if not DATASETS[dataset].get('own'):
        for key in ('groups', 'folds_total'):
            if getattr(own, key) is not None:
                raise RunError(
                    f'--{key} is for folder and lists, and {dataset} has folds of its own; leave it out, or name '
                    '--dataset folder'
                )
    try:
        re.compile(own.groups or '')
    except re.error as error:
        raise RunError(f'--groups {own.groups}: is no regular expression ({error})') from error
    if own.folds_total is not None and not FEWEST <= own.folds_total <= 1000:
        raise RunError(
            f'--folds_total {own.folds_total} must be from {FEWEST} to 1000: one fold tests, one validates, the rest '
            'train'
        )


def check_name(name: str | None, dataset: str) -> None:
    """Refuse a --name that is no part of a folder's name, or that is taken.

    Raises:
        RunError: with what a name may be.
    """
    if name is None:
        return
    if not re.fullmatch(NAME, name) or re.search(r'_fold\d', name):
        raise RunError(
            f'--name {shlex.quote(name)} must be letters, digits, - and _, at most 64, the first a letter or digit, '
            "without '_fold1' and the like"
        )
    if name.casefold() in {word.casefold() for key, entry in DATASETS.items() for word in (key, entry['label'])}:
        raise RunError(f'--name {name} is what a data set of the registry is called; take another name')
    if not nameable(dataset):
        raise RunError(f'--name {name}: {dataset} has a name; --name is for folder, lists and trees laid out as dtd')
