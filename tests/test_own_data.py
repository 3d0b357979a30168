"""The promises of common/own_data.py and options.py: lists, groups, folds and names of the user's own images."""

import csv
import itertools
import json
import os
import shutil
import unicodedata
from types import SimpleNamespace

import pytest
from conftest import RUN_OPTIONS, finish, make_run, start, write_image
from hypothesis import given, settings
from hypothesis import strategies as st

import datasets
import plot_results
import run_all
import summarize_runs
import train
import visualize
from common import options, own_data, runs
from common.errors import DataError, RunError, UserError
from common.grid import State
from common.options import CONTENT, SplitOptions, check_name
from common.splits import SUBSETS, Splits, split_digest
from common.trees import read_index
from datasets import load_splits, passed_over, tree_digest
from training import trained
from transforms import Preprocessing

LETTERS = 'abcdefghij'


def place_of(splits: Splits) -> dict[str, str]:
    return {path: subset for subset in SUBSETS for path, _ in getattr(splits, subset)}


def sets_of(splits: Splits) -> tuple:
    """The subsets with relative names, to compare trees in different places."""
    top = os.path.commonpath(list(place_of(splits)))
    return *([(os.path.relpath(path, top), label) for path, label in s] for s in splits[:3]), splits.classes


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """Three classes of six objects with two photographs each: a/a0_x.png, a/a0_y.png, .."""
    root = tmp_path_factory.mktemp('photographs')
    for label, cls in enumerate('abc'):
        for i, (number, view) in enumerate(itertools.product(range(6), 'xy')):
            write_image(root / cls / f'{cls}{number}_{view}.png', 20 * label + i)
    return root


def write_list(path, rows, header='path,label', encoding='utf-8', end='\n'):
    path.write_bytes(''.join(line + end for line in [header, *rows]).encode(encoding))
    return str(path)


def rows_of(root, *more):
    """path,label and what the functions of (class, object, view) say, of each photograph."""
    rows = []
    for path in sorted(root.glob('*/*.png')):
        facts = path.parent.name, int(path.stem[1]), path.stem[-1]
        rows.append(','.join([path.relative_to(root).as_posix(), facts[0], *(str(f(*facts)) for f in more)]))
    return rows


def fails(words: str, dataset: str, data_dir, fold: int = 1, **own) -> None:
    with pytest.raises(UserError) as caught:
        load_splits(dataset, data_dir, fold, SplitOptions(**own))
    assert words in str(caught.value)
    assert '\n' not in str(caught.value)


# ---------------------------------------------------------------------------------------------- lists


def test_a_list_of_a_folder_is_divided_as_the_folder(photographs, tmp_path):
    rows = rows_of(photographs)
    lists = write_list(tmp_path / 'my.csv', rows[::-1])
    for fold in (1, 3, 5):
        found = load_splits('lists', photographs, fold, SplitOptions(lists))
        assert sets_of(found) == sets_of(load_splits('folder', photographs, fold))
    inside = write_list(photographs / 'inside.csv', rows)
    assert sets_of(load_splits('lists', None, 1, SplitOptions(inside))) == sets_of(
        load_splits('folder', photographs, 1)
    )
    (photographs / 'inside.csv').unlink()


def test_a_list_of_another_system_is_read(photographs, tmp_path):
    """BOM, CRLF, quoted commas, blank and empty lines, capitals and spaces in the header, and columns not known."""
    root = shutil.copytree(photographs, tmp_path / 'set')
    (root / 'a' / 'a0_x.png').rename(root / 'a' / 'a0, x.png')
    rows = [row.replace('a/a0_x.png', '"a/a0, x.png"') + ',me' for row in rows_of(root) if ', x' not in row]
    rows += ['"a/a0, x.png","a",me', '', ',,']
    lists = write_list(tmp_path / 'my.csv', rows, ' Path ,LABEL,"by"', 'utf-8-sig', '\r\n')
    found = load_splits('lists', root, 1, SplitOptions(lists))
    assert sum(map(len, found[:3])) == 36
    assert str(root / 'a' / 'a0, x.png') in place_of(found)
    assert any('columns by are not used' in line for line in passed_over(found))


@pytest.mark.parametrize('mark', [';', '\t', ','])
def test_a_list_of_a_spreadsheet_is_read(photographs, tmp_path, mark):
    """An index, empty cells and rows at the end, backslashes, semicolons, and `split` for `subset`."""
    subset = ('Training', 'train', 'train', 'train', 'valid', 'Testing')
    cells = [line.replace('/', '\\').split(',') for line in rows_of(photographs, lambda c, n, v: subset[n])]
    rows = [mark.join([str(i), *row, '', '']) for i, row in enumerate(cells)] + [mark * 5]
    own = SplitOptions(write_list(tmp_path / 'my.csv', rows, mark.join(['', 'path', 'label', 'Split', '', ''])))
    found = load_splits('lists', photographs, 1, own)
    assert [len(s) for s in found[:3]] == [24, 6, 6]
    assert {os.path.basename(path)[1] for path, _ in found.test} == {'5'}
    assert passed_over(found) == [
        f'{own.lists}: its column Split is taken as subset',
        f'{own.lists}: the columns without a name are not used',
        f'{own.lists}: 36 paths with backslashes are read as with slashes',
    ]


def test_names_in_two_unicode_forms_are_one(photographs, tmp_path):
    """A Mac writes é as two characters. Paths stay as they are on disk."""
    one, two = (unicodedata.normalize(form, 'béton') for form in ('NFC', 'NFD'))
    root = tmp_path / 'set'
    for name, source in ((one, 'a'), (two, 'b'), ('Wood', 'c'), ('wood', 'c')):
        shutil.copytree(photographs / source, root / name)
    found = load_splits('folder', root, 1)
    assert found.classes == ['Wood', one, 'wood']
    assert sum(label == 1 for s in found[:3] for _, label in s) == 24
    assert all(os.path.exists(path) for path in place_of(found))
    notes = [
        f"class '{one}' is written in 2 Unicode forms (NFC and NFD), which are taken as one class",
        "classes 'Wood' and 'wood' differ by case or spaces alone, and are taken as different",
    ]
    assert passed_over(found) == notes
    index = read_index(root)
    assert (index.classes, len(index)) == (found.classes, 48)
    assert {index[i] for i in range(48)} == {(path, label) for s in found[:3] for path, label in s}

    shutil.rmtree(root / one)
    rows = [f'{one}/b{n}_{v}.png,{one if n else two}' for n in range(6) for v in 'xy']
    rows += [f'wood/c{n}_{v}.png,wood' for n in range(6) for v in 'xy']
    own = SplitOptions(write_list(tmp_path / 'my.csv', rows))
    found = load_splits('lists', root, 1, own)
    assert (found.classes, sum(map(len, found[:3]))) == ([one, 'wood'], 24)
    assert all(os.path.exists(path) for path in place_of(found))
    assert notes[0] in passed_over(found)


def test_subset_folders_have_other_names_and_what_systems_leave_is_no_class(photographs, tmp_path):
    for subset, source in (('Training', 'ab'), ('TESTING', 'a')):
        for cls in source:
            shutil.copytree(photographs / cls, tmp_path / subset / cls)
    for name in ('__MACOSX', '@eaDir', 'lost+found', '.ipynb_checkpoints', '$RECYCLE.BIN', 'System Volume Information'):
        for folder in (tmp_path, tmp_path / 'Training', tmp_path / 'Training' / 'a'):
            write_image(folder / name / 'a0_x.png', 1)
    found = load_splits('folder', tmp_path, 1)
    assert (found.classes, [len(s) for s in found[:3]]) == (['a', 'b'], [22, 2, 12])
    assert passed_over(found) == [
        "no image of class 'b' is tested in this fold",
        f'{tmp_path}: TESTING/ as test/, Training/ as train/ is taken',
        f'{tmp_path} has no val/: a tenth of each class of {tmp_path}/Training validates',
    ]


def test_groups_are_advised_where_they_are_taken(photographs, tmp_path, capsys):
    grouped = write_list(tmp_path / 'a.csv', rows_of(photographs, lambda c, n, v: n), 'path,label,group')
    plain = write_list(tmp_path / 'b.csv', rows_of(photographs))
    for subset in ('train', 'test'):
        shutil.copytree(photographs, tmp_path / 'own' / subset)
    for dataset, root, lists, expected in (
        ('lists', photographs, grouped, False),
        ('lists', photographs, plain, True),
        ('folder', tmp_path / 'own', None, False),
        ('folder', photographs, None, True),
    ):
        assert own_data.takes_groups(dataset, root, SplitOptions(lists)) == expected
    with pytest.raises(DataError) as caught:
        datasets.main(datasets.get_args_parser().parse_args(['check', 'folder', '--data_dir', str(tmp_path / 'own')]))
    assert str(caught.value).endswith('stand in two subsets of a fold: leave one of each')


def test_subsets_of_a_list_are_taken_as_they_are(photographs, tmp_path):
    subset = ('Train', 'train', 'train', 'train', 'valid', 'TEST')
    lists = write_list(tmp_path / 'my.csv', rows_of(photographs, lambda c, n, v: subset[n]), 'path,label,subset')
    own = SplitOptions(lists)
    found = load_splits('lists', photographs, 1, own)
    assert [len(s) for s in found[:3]] == [24, 6, 6]
    assert {os.path.basename(path)[1] for path, _ in found.test} == {'5'}
    fails('fold 2 of', 'lists', photographs, 2, lists=lists)
    assert not any('tenth' in line for line in passed_over(found))
    lists = write_list(
        tmp_path / 'no_val.csv',
        rows_of(photographs, lambda c, n, v: 'test' if n == 5 else 'train'),
        'path,label,subset',
    )
    found = load_splits('lists', photographs, 1, SplitOptions(lists))
    assert [len(s) for s in found[:3]] == [27, 3, 6]
    assert any('no subset val: a tenth' in line for line in passed_over(found))


def test_folds_of_a_list_rotate(photographs, tmp_path):
    """Fold f tests the images of f, validates with those of f + 1 and trains with the rest."""
    lists = write_list(tmp_path / 'my.csv', rows_of(photographs, lambda c, n, v: n % 4 + 1), 'path,label,fold')
    for fold in range(1, 5):
        found = load_splits('lists', photographs, fold, SplitOptions(lists))
        for subset, numbers in (('test', {fold}), ('val', {fold % 4 + 1})):
            assert {int(os.path.basename(path)[1]) % 4 + 1 for path, _ in getattr(found, subset)} == numbers
        assert len(place_of(found)) == 36
    fails('it has folds 1 to 4', 'lists', photographs, 5, lists=lists)


def test_images_that_a_list_leaves_out_are_counted(photographs, tmp_path):
    lists = write_list(tmp_path / 'my.csv', [row for row in rows_of(photographs) if 'a3_y' not in row])
    own = SplitOptions(lists)
    (line,) = passed_over(load_splits('lists', photographs, 1, own))
    assert line == f'passed over 1 image that {lists} does not list, such as {photographs}/a/a3_y.png'


BAD_LISTS = {
    'no label': (['a/a0_x.png'], 'path', "has no column label, only 'path'"),
    'spaces': (['a/a0_x.png a'], 'path label', "has no column path, only 'path label'; its first line must name"),
    'twice': (['x,a,b'], 'path,label,label', 'has two columns label; remove one'),
    'cells': (['a/a0_x.png,a,1'], 'path,label', 'line 2 has 3 cells, its first line 2'),
    'nothing': ([], 'path,label', 'lists no image'),
    'label': (['a/a0_x.png,a', 'a/a1_x.png, '], 'path,label', 'line 3 has an empty label'),
    'path': ([',a'], 'path,label', 'line 2 has an empty path'),
    'again': (['a/a0_x.png,a', './a/a0_x.png,b'], 'path,label', './a/a0_x.png is listed twice, in lines 2 and 3'),
    'quote': (['"a/a0_x.png,a'], 'path,label', 'line 2 is damaged (unexpected end of data)'),
    'subset': (['a/a0_x.png,a,dev'], 'path,label,subset', "line 2: subset 'dev' is none of train, val and test"),
    'fold': (['a/a0_x.png,a,two'], 'path,label,fold', "line 2: fold 'two' is no number from 1"),
    'zero': (['a/a0_x.png,a,0'], 'path,label,fold', "line 2: fold '0' is no number from 1"),
    'both': (['a/a0_x.png,a,1,val'], 'path,label,fold,subset', 'has a column subset and a column fold'),
    'two folds': (['a/a0_x.png,a,1', 'a/a1_x.png,b,2'], 'path,label,fold', 'no image has fold 3; folds are numbered'),
    'one label': (['a/a0_x.png,a', 'a/a1_x.png,a'], 'path,label', "has only the label 'a'"),
    'missing': (['a/gone.png,a', 'b/b0_x.png,b', 'b/gone.png,b'], 'path,label', '(and 1 more); `python datasets.py'),
    'elsewhere': (['a/gone.png,a', 'b/gone.png,b'], 'path,label', 'a/gone.png: listed in line 2 of'),
    'suffix': (['a/a0_x.PNG,a', 'b/b0_x.PNG,b'], 'path,label', 'a/a0_x.png); --data_dir must name'),
    'case': (
        ['a/a0_x.png,a,train', 'a/a0_y.png,a,val', 'b/b0_x.png,A,test'],
        'path,label,subset',
        "class 'A' is in test but has no training image; 'a' differs by case or spaces alone",
    ),
    'untrained': (
        ['a/a0_x.png,a,train', 'a/a0_y.png,a,val', 'b/b0_x.png,b,test'],
        'path,label,subset',
        "class 'b' is in test but has no training image",
    ),
}  # fmt: skip


@pytest.mark.parametrize('kind', BAD_LISTS)
def test_a_bad_list_is_one_line(photographs, tmp_path, kind):
    rows, header, words = BAD_LISTS[kind]
    fails(words, 'lists', photographs, lists=write_list(tmp_path / 'my.csv', rows, header))


def test_a_list_that_cannot_be_read_is_one_line(photographs, tmp_path):
    fails('nowhere.csv: cannot be read', 'lists', photographs, lists=str(tmp_path / 'nowhere.csv'))
    latin = write_list(tmp_path / 'latin.csv', ['é.png,a'], encoding='latin-1')
    fails('is not UTF-8 text', 'lists', photographs, lists=latin)
    fails('nowhere: no such folder', 'lists', tmp_path / 'nowhere', lists=latin)
    fails('needs --lists', 'lists', photographs)
    fails('is for --dataset lists, not for folder', 'folder', photographs, lists=latin)
    (tmp_path / 'empty.csv').touch()
    fails('has no column path', 'lists', photographs, lists=str(tmp_path / 'empty.csv'))
    missing = write_list(tmp_path / 'my.csv', ['a/gone.png,a', 'b/b0_x.png,b'])
    fails('a/gone.png: listed in line 2 of', 'lists', photographs, lists=missing)


# ---------------------------------------------------------------------------------------------- groups


def groups_apart(splits: Splits, group) -> list:
    """The groups that stand in several subsets."""
    places = {}
    for path, subset in place_of(splits).items():
        places.setdefault(group(path), set()).add(subset)
    return [name for name, found in places.items() if len(found) > 1]


def test_groups_by_name_stand_on_one_side(photographs):
    tested = []
    apart = [
        groups_apart(load_splits('folder', photographs, f), lambda p: os.path.basename(p)[:2]) for f in range(1, 6)
    ]
    assert any(apart), 'without groups the test would show nothing'
    for fold in range(1, 6):
        found = load_splits('folder', photographs, fold, SplitOptions(groups=r'(\w\d)_.'))
        assert groups_apart(found, lambda path: os.path.basename(path)[:2]) == []
        whole = load_splits('folder', photographs, fold, SplitOptions(groups=r'^\w\d'))
        assert found[:5] == whole[:5]
        for subset in SUBSETS:
            assert {label for _, label in getattr(found, subset)} == {0, 1, 2}
        tested += found.test
    assert len(tested) == len(set(tested)) == 36, 'each image is tested once'


def test_groups_are_the_same_in_every_place_and_order(photographs, tmp_path):
    moved = shutil.copytree(photographs, tmp_path / 'moved')
    lists = write_list(tmp_path / 'my.csv', rows_of(photographs, lambda c, n, v: f'{c}{n}')[::-1], 'path,label,group')
    ways = [('folder', photographs, r'^\w\d', None), ('folder', moved, r'^\w\d', None), ('lists', moved, None, lists)]
    found = [load_splits(dataset, root, 2, SplitOptions(csv, regex)) for dataset, root, regex, csv in ways]
    assert sets_of(found[0]) == sets_of(found[1]) == sets_of(found[2])
    assert len({split_digest(splits) for splits in found}) == 1


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(1, 5), min_size=4, max_size=9), min_size=2, max_size=4))
def test_any_sizes_of_groups(sizes):
    files = {
        f'c{c}': [f'r/c{c}/{g}_{i}' for g, n in enumerate(counts) for i in range(n)] for c, counts in enumerate(sizes)
    }
    groups = {path: path.rpartition('_')[0] for paths in files.values() for path in paths}
    blocks = own_data.group_blocks(files, groups, 4, 'x')
    assert blocks.keys() == groups.keys()
    for paths in files.values():
        assert {blocks[path] for path in paths} == {1, 2, 3, 4}, 'every class in every block'
    for group in set(groups.values()):
        assert len({blocks[path] for path in groups if groups[path] == group}) == 1


def test_files_of_the_same_bytes_stand_on_one_side(photographs, tmp_path):
    root = shutil.copytree(photographs, tmp_path / 'set')
    copies = {'b': 'b4_y.png', 'a': 'a9_z.png'}
    for cls, name in copies.items():
        shutil.copy(root / 'b' / 'b0_x.png', root / cls / name)
    own = SplitOptions(groups=CONTENT)
    for fold in range(1, 6):
        found = load_splits('folder', root, fold, own)
        place = place_of(found)
        assert len({place[str(root / cls / name)] for cls, name in [('b', 'b0_x.png'), *copies.items()]}) == 1
    (line,) = passed_over(found)
    assert line == (
        '--groups content: 2 of 37 images have the same bytes as another, in 1 group, such as a/a9_z.png; 1 group of '
        'images of several classes, such as a/a9_z.png'
    )


def test_an_empty_group_is_an_image_alone_and_groups_are_reported(photographs, tmp_path):
    lists = write_list(
        tmp_path / 'my.csv', rows_of(photographs, lambda c, n, v: f'{c}{n}' if n < 5 else ''), 'path,label,group'
    )
    own = SplitOptions(lists)
    found = load_splits('lists', photographs, 1, own)
    assert passed_over(found) == ['groups: 36 images in 21 groups, 6 of one image']


def test_groups_that_cannot_be_split_are_one_line(photographs, tmp_path):
    fails('--groups z$: gives no group to 36 of 36 images, the first', 'folder', photographs, groups='z$')
    fails('is no regular expression', 'folder', photographs, groups='(')
    fails('--groups is for folder and lists, and synthetic has folds', 'synthetic', None, groups='x')
    whole = "class 'a' has one group; 5 folds need at least 5: make smaller groups, add images, or move the class away"
    fails(whole, 'folder', photographs, groups=r'^\w')
    fails("class 'a' has 2 groups; 5", 'folder', photographs, groups=r'.\.')
    fails(
        "class 'a' has 3 groups; 5 folds need at least 5: give --folds_total 3, ",
        'folder',
        photographs,
        groups='.[036]|.',
    )
    place = rows_of(photographs, lambda c, n, v: f'{c}{n}', lambda c, n, v: 1 + (n + (v == 'y' and n < 2)) % 3)
    words = (
        "group 'a0' stands in fold 1 (line 2) and in fold 2 (line 3) (and 5 more groups do); a group must stand in one"
    )
    fails(words, 'lists', photographs, lists=write_list(tmp_path / 'a.csv', place, 'path,label,group,fold'))
    grouped = write_list(tmp_path / 'b.csv', rows_of(photographs, lambda c, n, v: n), 'path,label,group')
    fails('its column group says the groups; leave --groups out', 'lists', photographs, lists=grouped, groups='x')
    folds = write_list(tmp_path / 'c.csv', rows_of(photographs, lambda c, n, v: n % 3 + 1), 'path,label,fold')
    for key, value in (('groups', 'x'), ('folds_total', 4)):
        words = f'its column fold divides the images; leave --{key} out'
        fails(words, 'lists', photographs, lists=folds, **{key: value})
    rows = rows_of(photographs, lambda c, n, v: n, lambda c, n, v: 'test' if n == 5 else 'train')
    no_val = write_list(tmp_path / 'd.csv', rows, 'path,label,group,subset')
    fails('no row has the subset val, and of groups none is drawn', 'lists', photographs, lists=no_val)


def mixed_groups() -> tuple[dict, dict]:
    """Five groups of four classes, which cannot be balanced: how many images of a class each group holds."""
    counts = dict(r=(1, 1, 1, 0, 0), s=(6, 6, 0, 2, 0), t=(0, 2, 6, 1, 0), u=(1, 6, 0, 6, 2))
    files = {cls: [f'{cls}/{g}_{i}' for g, n in enumerate(held) for i in range(n)] for cls, held in counts.items()}
    return files, {path: path[2] for paths in files.values() for path in paths}


def test_a_class_that_balance_leaves_without_training_images_is_one_line():
    with pytest.raises(DataError, match="the groups of class 's' hold other classes too, and fill fewer than 3 of 3"):
        own_data.group_blocks(*mixed_groups(), 3, 'x')


def test_a_class_that_a_fold_does_not_test_is_reported():
    items = [[('r/a', 0), ('r/b', 1), ('r/c', 2)], [('r/d', 0)], [('r/e', 0), ('r/f', 1)]]
    splits = Splits(*items, ['x', 'y', 'z'], {path: ('1', '') for s in items for path, _ in s})
    assert own_data.absent_notes(splits) == [
        "no image of class 'y' (and 1 more) is validated in this fold",
        "no image of class 'z' is tested in this fold",
    ]


def test_a_tree_with_train_and_test_is_not_divided_anew(photographs, tmp_path):
    for subset in ('train', 'val', 'test'):
        shutil.copytree(photographs, tmp_path / subset)
    for own in (dict(groups='x'), dict(folds_total=3)):
        fails('has train/ and test/ of its own, which --groups and --folds_total', 'folder', tmp_path, **own)


# ---------------------------------------------------------------------------------------------- folds


def test_folds_total_divides_small_classes(tmp_path):
    for cls, count in (('a', 3), ('b', 4)):
        for i in range(count):
            write_image(tmp_path / cls / f'{i}.png', i)
    fails("class 'a' has 3 images; 5 folds need at least 5: give --folds_total 3, add images", 'folder', tmp_path)
    tested = []
    for fold in (1, 2, 3):
        found = load_splits('folder', tmp_path, fold, SplitOptions(folds_total=3))
        assert all({label for _, label in s} == {0, 1} for s in found[:3])
        tested += found.test
    assert len(set(tested)) == 7
    fails('it has folds 1 to 3', 'folder', tmp_path, 4, folds_total=3)
    fails('--folds_total 2 must be from 3', 'folder', tmp_path, folds_total=2)
    fails('--folds_total is for folder and lists', 'synthetic', None, folds_total=3)


def test_the_default_number_of_folds_is_the_default(photographs):
    argv = ['--data_dir', str(photographs), '--folds_total', '5']
    assert options.parse_args(argv).folds_total is None
    assert load_splits('folder', photographs, 2).division is None


@pytest.mark.parametrize('own', [SplitOptions(folds_total=3), SplitOptions(groups=r'^\w\d')])
def test_the_batch_is_the_same_in_every_fold(tmp_path, own):
    for cls, count in (('a', 5), ('b', 8), ('c', 11)):
        for i in range(count):
            write_image(tmp_path / cls / f'{cls}{i}.png', i)
    sizes = set()
    for fold in range(1, (own.folds_total or 5) + 1):
        found = load_splits('folder', tmp_path, fold, own)
        args = options.parse_args(['--data_dir', str(tmp_path), *(f'--{k}={v}' for k, v in own._asdict().items() if v)])
        options.check_batch(args, len(found.train), 24, 1)
        sizes.add(args.batch_size)
    assert len(sizes) == 1


def test_trees_differ_by_how_they_are_divided(photographs, tmp_path):
    """The digest is the same for all folds of a division, and another one for another division."""
    digests = {}
    rows = rows_of(photographs, lambda c, n, v: n % 3 + 1)
    first = write_list(tmp_path / 'a.csv', rows, 'path,label,fold')
    other = write_list(tmp_path / 'b.csv', [rows[0][:-1] + '2', *rows[1:]], 'path,label,fold')
    ways = [SplitOptions(), SplitOptions(folds_total=3), SplitOptions(folds_total=4), SplitOptions(groups=r'^\w\d')]
    for own in (*ways, SplitOptions(first), SplitOptions(other)):
        dataset = 'lists' if own.lists else 'folder'
        found = {tree_digest(load_splits(dataset, photographs, f, own)) for f in (1, 2, 3)}
        assert len(found) == 1
        digests[found.pop()] = own
    assert len(digests) == 6


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    'name', ['a b', '', '-x', 'x/y', 'x_fold3_y', 'é', 'x' * 65, 'DTD', 'Folder', 'kth-tips2-b', '.x']
)
def test_names_that_folders_or_tables_cannot_have_are_refused(name):
    with pytest.raises(RunError, match='--name') as caught:
        check_name(name, 'folder')
    assert '\n' not in str(caught.value)


def test_names_are_for_images_of_one_s_own():
    for dataset in ('folder', 'lists', 'dtd'):
        check_name('fabric_2-x', dataset)
    with pytest.raises(RunError, match='fmd has a name'):
        check_name('fabric', 'fmd')


def argv_of(root, run_dir, *more):
    data = ['--data_dir', root, '--dataset', 'folder', '--model', 'tiny', '--run_dir', run_dir, '--num_workers', 0]
    return [str(word) for word in (*data, *RUN_OPTIONS, '--epochs', 1, '--warmup_epochs', 0, *more)]


def run(root, run_dir, *more):
    return train.train(options.parse_args(argv_of(root, run_dir, *more)))


def refused(root, run_dir, *more) -> str:
    with pytest.raises(UserError) as caught:
        run(root, run_dir, *more)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_options_not_given_leave_the_fingerprint_as_it_was(photographs, tmp_path, tiny):
    folder, _ = run(photographs, tmp_path)
    config = runs.read_json(folder / 'config.json')
    assert folder.name == 'folder_fold1_tiny_seed42'
    assert {'name', 'groups', 'folds_total', 'lists'}.isdisjoint(config['defines'])
    assert not (folder / 'split.csv').exists()


@pytest.mark.slow
def test_two_sets_of_images_in_one_folder_have_names_or_are_refused(photographs, tmp_path, tiny, capsys):
    """The same name for other images or other folds is refused before anything is trained, and a table shows both."""
    other, run_dir = shutil.copytree(photographs, tmp_path / 'other'), tmp_path / 'runs'
    write_image(other / 'a' / 'a7_x.png', 99)
    run(photographs, run_dir)
    for more in ((), ('--fold', 2), ('--fold', 2, '--force')):
        message = refused(other, run_dir, *more)
        assert '--name NAME' in message
        assert 'folder_fold1_tiny_seed42' in message
    assert '--name NAME' in refused(photographs, run_dir, '--fold', 2, '--groups', r'^\w\d')
    folder, results = run(other, run_dir, '--name', 'fabric', '--groups', r'^\w\d')
    assert folder.name == 'fabric_fold1_tiny_seed42'
    assert (results['name'], results['dataset']) == ('fabric', 'folder')
    run(other, run_dir, '--name', 'fabric', '--groups', r'^\w\d', '--fold', 2)
    assert "both are called 'fabric'" in refused(other, run_dir, '--name', 'fabric', '--fold', 3)

    argv = ['--run_dir', str(run_dir), '--labels', 'fabric=Fine Fabric']
    (table,) = summarize_runs.read_tables(summarize_runs.get_args_parser().parse_args(argv))
    assert table.datasets == ['folder', 'fabric']
    assert len(table.rows['fabric', 'tiny'].results) == 2
    for form in ('', '--latex', '--csv', '--markdown'):
        summarize_runs.main(summarize_runs.get_args_parser().parse_args([*argv, *form.split()]))
        out = capsys.readouterr().out
        assert ('fabric' if form == '--csv' else 'Fine Fabric') in out
    with pytest.raises(RunError, match="--labels: unknown 'linen'"):
        summarize_runs.main(summarize_runs.get_args_parser().parse_args([*argv[:2], '--labels', 'linen=x']))
    plots = ['--plot', 'curves', '--save_dir', str(tmp_path / 'figures')]
    plot_results.main(plot_results.get_args_parser().parse_args([*argv[:2], *plots]))
    plot_results.main(
        plot_results.get_args_parser().parse_args(
            ['--log_file', str(folder / 'log.jsonl'), '--save_dir', str(tmp_path / 'figures'), '--plot', 'gate']
        )
    )
    (table, _) = plot_results.read_one(argparse_of(folder))[0]
    assert table.datasets == ['fabric']


def argparse_of(folder):
    return plot_results.get_args_parser().parse_args(['--log_file', str(folder / 'log.jsonl')])


def test_runs_of_older_code_beside_new_ones_are_complete(photographs, tmp_path, tiny):
    """A complete run stays complete whatever stands beside it."""
    folder, results = run(photographs, tmp_path)
    make_run(tmp_path, dataset='folder', fold=2, tree='another')
    assert run(photographs, tmp_path) == (folder, results)
    assert 'folder_fold2_resnet18_seed42 is of other images or other folds' in refused(
        photographs, tmp_path, '--fold', 3
    )


def test_a_benchmark_has_no_neighbours_to_fear(tmp_path, tiny):
    make_run(tmp_path, dataset='synthetic', fold=2, tree='another')
    runs.check_neighbours([tmp_path / 'synthetic_fold1_tiny_seed42'], dict(dataset='synthetic'), 'mine')


# ---------------------------------------------------------------------------------------------- a run and its split


def test_the_split_of_a_run_is_stored_as_a_list(photographs, tmp_path, tiny):
    folder, _ = run(photographs, tmp_path / 'runs', '--groups', r'^\w\d', '--fold', 3)
    own = SplitOptions(str(folder / 'split.csv'))
    stored = load_splits('lists', photographs, 1, own)
    assert split_digest(stored) == runs.read_json(folder / 'config.json')['defines']['split']
    with open(folder / 'split.csv') as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() == {'path', 'label', 'subset', 'group'}
    assert all(row['path'].startswith(row['label'] + '/' + row['group']) for row in rows)


def data_of(folder, *argv):
    args = visualize.get_args_parser().parse_args([str(word) for word in argv])
    return trained.data_of(args, trained.load(folder / 'best.pt'))


def test_a_trained_model_finds_its_split_again(photographs, tmp_path, tiny, monkeypatch):
    """By the options in config.json; by the stored list where scikit-learn would divide in another way."""
    folder, _ = run(photographs, tmp_path / 'runs', '--groups', r'^\w\d', '--folds_total', 3, '--name', 'fabric')
    found = data_of(folder)
    assert (found.caution, found.label, len(found.splits.division)) == (None, 'fabric', 36)
    assert data_of(folder, '--labels', 'fabric=Fabric').label == 'Fabric'
    with pytest.raises(RunError, match="--labels: unknown 'linen'"):
        data_of(folder, '--labels', 'linen=Linen')
    blocks = own_data.group_blocks
    monkeypatch.setattr(
        own_data, 'group_blocks', lambda *a: {path: block % 3 + 1 for path, block in blocks(*a).items()}
    )
    with pytest.raises(RunError, match='have changed since') as caught:
        data_of(folder)
    words = str(caught.value).partition('; --fold 1 --lists ')[2].split()
    assert words[:3] == [str(folder / 'split.csv'), '--data_dir', str(photographs)]
    assert data_of(folder, '--fold', 1, '--lists', *words[:3]).caution is None


@pytest.mark.slow
def test_a_model_of_a_list_finds_it_and_refuses_another(photographs, tmp_path, tiny):
    def args_of(lists):
        return options.parse_args(
            [
                *argv_of(photographs, tmp_path / 'runs')[:2],
                '--lists',
                lists,
                *argv_of(photographs, tmp_path / 'runs')[4:],
            ]
        )

    subset = ('train', 'train', 'train', 'train', 'val', 'test')
    lists = write_list(tmp_path / 'my.csv', rows_of(photographs, lambda c, n, v: subset[n]), 'path,label,subset')
    folder, _ = train.train(args_of(lists))
    assert folder.name == 'lists_fold1_tiny_seed42'
    for argv in ((), ('--dataset', 'lists'), ('--data_dir', photographs), ('--lists', lists)):
        assert data_of(folder, *argv).caution is None
    other = write_list(tmp_path / 'b.csv', rows_of(photographs, lambda c, n, v: subset[n - 1]), 'path,label,subset')
    with pytest.raises(RunError, match=r'--lists .*b\.csv: its images or lists are others') as caught:
        data_of(folder, '--lists', other)
    assert f'was trained on fold 1 of lists ({lists}), ' in str(caught.value)


# ---------------------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize(
    ('more', 'words'),
    [
        (['--dataset', 'lists'], '--dataset lists needs --lists'),
        (['--dataset', 'fmd', '--groups', 'x'], '--groups is for folder and lists, and fmd has folds of its own'),
        (['--folds_total', '2'], '--folds_total 2 must be from 3'),
        (['--groups', '('], 'is no regular expression'),
        (['--name', 'DTD'], 'is what a data set of the registry is called'),
        (['--name', 'my data'], "--name 'my data' must be letters"),
    ],
)
def test_bad_options_are_refused_at_once(photographs, capsys, more, words):
    argv = ['--data_dir', str(photographs), *more]
    with pytest.raises(RunError) as caught:
        options.parse_args(argv)
    assert words in str(caught.value)
    with pytest.raises(SystemExit):
        run_all.cli([*argv, '--models', 'resnet18', '--dry_run'])
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_the_commands_of_datasets_take_lists_and_groups(photographs, tmp_path):
    lists = write_list(tmp_path / 'my.csv', rows_of(photographs, lambda c, n, v: f'{c}{n}'), 'path,label,group')
    more = ['--lists', lists, '--data_dir', str(photographs)]
    code, out, _ = finish(start('datasets.py', 'check', 'lists', *more))
    assert (code, out.splitlines()) == (
        0,
        ['groups: 36 images in 18 groups, 0 of one image', f'{photographs} is complete'],
    )
    code, out, _ = finish(start('datasets.py', 'split', 'lists', *more, '--fold', '2'))
    assert (code, len(out.splitlines())) == (0, 36)
    (tmp_path / 'gone.csv').write_text((tmp_path / 'my.csv').read_text() + 'a/gone.png,a,x\na/away.png,a,x\n')
    code, out, err = finish(start('datasets.py', 'check', 'lists', '--lists', str(tmp_path / 'gone.csv'), *more[2:]))
    assert (code, out.count('but missing')) == (1, 2)
    assert len(err.splitlines()) == 1


def test_check_counts_the_folds_that_options_ask_for(photographs):
    for own, folds in ((SplitOptions(folds_total=3), 3), (SplitOptions(), 5)):
        found, problems = datasets._load_folds('folder', photographs, own)
        assert (list(found), problems) == (list(range(1, folds + 1)), [])


def test_a_grid_hands_the_options_on(photographs, tmp_path, capsys):
    argv = ['--data_dir', str(photographs), '--groups', r'^-?\w\d', '--folds_total', '3', '--name', 'fabric']
    run_all.cli([*argv, '--models', 'resnet18', '--folds', '1-2', '--run_dir', str(tmp_path), '--dry_run'])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for word in ("'--groups=^-?\\w\\d'", '--folds_total=3', '--name fabric', '--dataset folder'):
        assert word in lines[0]


def test_a_grid_of_other_images_is_refused_before_it_starts(photographs, tmp_path, capsys):
    make_run(tmp_path, dataset='folder', fold=5, tree='another')
    with pytest.raises(SystemExit):
        run_all.cli(['--data_dir', str(photographs), '--models', 'resnet18', '--run_dir', str(tmp_path)])
    err = capsys.readouterr().err.splitlines()
    assert 'folder_fold5_resnet18_seed42 is of other images or other folds' in err[-1]
    assert not (tmp_path / 'folder_fold1_resnet18_seed42').exists()


def test_a_named_grid_knows_its_complete_runs(photographs, tmp_path, tiny):
    folder, _ = run(photographs, tmp_path, '--name', 'fabric', '--groups', r'^\w\d')
    args = options.parse_args(argv_of(photographs, tmp_path, '--name', 'fabric', '--groups', r'^\w\d'))
    made = run_all.Run(folder, [], vars(args))
    assert run_all.state_of(made) == (State.COMPLETE, '')
    other = run_all.Run(folder, [], vars(args) | dict(groups=None))
    assert run_all.state_of(other) == (State.OTHER_OPTIONS, r'groups ^\w\d -> None')
    assert json.loads((folder / 'config.json').read_text())['defines']['groups'] == r'^\w\d'


def test_the_split_that_a_run_stored_is_its_split(photographs, tmp_path, monkeypatch):
    lists = write_list(tmp_path / 'my.csv', rows_of(photographs))
    own = SplitOptions(lists, r'^(..)_', 3)
    splits = load_splits('lists', photographs, 2, own)
    made = dict(dataset='lists', data_dir=str(photographs), fold=2, **own._asdict())
    runs.write_json(tmp_path / 'config.json', dict(options=made, defines=dict(split=split_digest(splits))))
    own_data.write_split(tmp_path / runs.SPLIT, splits)
    subject = trained.TrainedModel(tmp_path / 'best.pt', 'tiny', None, splits.classes, 1, 50.0, Preprocessing(64))
    stored = str(tmp_path / runs.SPLIT)
    args = SimpleNamespace(dataset=None, data_dir=None, lists=stored, fold=1, other_images=None)
    data = trained.data_of(args, subject)
    assert data.caution is None
    assert sets_of(data.splits) == sets_of(splits)
    args.lists = write_list(tmp_path / 'other.csv', rows_of(photographs)[::-1])
    with pytest.raises(RunError, match='images or lists are others'):
        trained.data_of(args, subject)
