"""The promises of common/own_data.py and options.py: lists, groups, folds and names of the user's own images."""

import csv
import itertools
import json
import os
import shutil
import unicodedata

import pytest
from conftest import RUN_OPTIONS, TINY, make_run, write_image
from hypothesis import given, settings
from hypothesis import strategies as st

import datasets
import models
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
from datasets import load_splits, notes_of, tree_digest
from training import trained

BY_OBJECT = r'^\w\d'  # --groups


def place_of(splits: Splits) -> dict[str, str]:
    return {path: subset for subset in SUBSETS for path, _ in getattr(splits, subset)}


def sets_of(splits: Splits) -> tuple:
    """The subsets with relative names, to compare trees in different places."""
    top = os.path.commonpath(list(splits.images))
    return *([(os.path.relpath(path, top), label) for path, label in s] for s in splits[:3]), splits.classes


def sizes_of(splits: Splits) -> list[int]:
    return [len(subset) for subset in splits[:3]]


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
    lists = write_list(tmp_path / 'my.csv', rows_of(photographs)[::-1])
    inside = shutil.copytree(photographs, tmp_path / 'set') / 'inside.csv'
    shutil.copy(lists, inside)
    for fold in (1, 3, 5):
        expected = sets_of(load_splits('folder', photographs, fold))
        assert sets_of(load_splits('lists', photographs, fold, SplitOptions(lists))) == expected
        assert sets_of(load_splits('lists', None, fold, SplitOptions(str(inside)))) == expected


def test_a_list_of_another_system_is_read(photographs, tmp_path):
    """BOM, CRLF, quoted commas, blank and empty lines, capitals and spaces in the header, and columns not known."""
    root = shutil.copytree(photographs, tmp_path / 'set')
    (root / 'a' / 'a0_x.png').rename(root / 'a' / 'a0, x.png')
    rows = [row + ',me' for row in rows_of(root) if ', x' not in row]
    rows += ['"a/a0, x.png","a",me', '', ',,']
    lists = write_list(tmp_path / 'my.csv', rows, ' Path ,LABEL,"by"', 'utf-8-sig', '\r\n')
    found = load_splits('lists', root, 1, SplitOptions(lists))
    assert len(found.images) == 36
    assert str(root / 'a' / 'a0, x.png') in found.images
    assert notes_of(found) == [f'{lists}: the columns by are not used']


@pytest.mark.parametrize('mark', [';', '\t', ','])
def test_a_list_of_a_spreadsheet_is_read(photographs, tmp_path, mark):
    """An index, empty cells and rows at the end, backslashes, semicolons, and `split` for `subset`."""
    subset = ('Training', 'train', 'train', 'train', 'valid', 'Testing')
    cells = [line.replace('/', '\\').split(',') for line in rows_of(photographs, lambda c, n, v: subset[n])]
    rows = [mark.join([str(i), *row, '', '']) for i, row in enumerate(cells)] + [mark * 5]
    own = SplitOptions(write_list(tmp_path / 'my.csv', rows, mark.join(['', 'path', 'label', 'Split', '', ''])))
    found = load_splits('lists', photographs, 1, own)
    assert sizes_of(found) == [24, 6, 6]
    assert {os.path.basename(path)[1] for path, _ in found.test} == {'5'}
    assert notes_of(found) == [
        f'{own.lists}: its column Split is taken as subset',
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
    assert list(found.images.values()).count(one) == 24
    assert all(map(os.path.exists, found.images))
    notes = [
        f"class '{one}' is written in 2 Unicode forms (NFC and NFD), which are taken as one class",
        "classes 'Wood' and 'wood' differ by case or spaces alone, and are taken as different",
    ]
    assert notes_of(found) == notes
    index = read_index(root)
    assert (index.classes, len(index)) == (found.classes, 48)
    assert {index[i] for i in range(48)} == {(path, label) for s in found[:3] for path, label in s}

    shutil.rmtree(root / one)
    rows = [f'{one}/b{n}_{v}.png,{one if n else two}' for n in range(6) for v in 'xy']
    rows += [f'wood/c{n}_{v}.png,wood' for n in range(6) for v in 'xy']
    found = load_splits('lists', root, 1, SplitOptions(write_list(tmp_path / 'my.csv', rows)))
    assert (found.classes, len(found.images)) == ([one, 'wood'], 24)
    assert all(map(os.path.exists, found.images))
    assert notes_of(found) == notes[:1]


def test_subset_folders_have_other_names_and_what_systems_leave_is_no_class(photographs, tmp_path):
    for subset, source in (('Training', 'ab'), ('TESTING', 'a')):
        for cls in source:
            shutil.copytree(photographs / cls, tmp_path / subset / cls)
    for name in ('__MACOSX', '@eaDir', 'lost+found', '.ipynb_checkpoints', '$RECYCLE.BIN', 'System Volume Information'):
        for folder in (tmp_path, tmp_path / 'Training', tmp_path / 'Training' / 'a'):
            write_image(folder / name / 'a0_x.png', 1)
    found = load_splits('folder', tmp_path, 1)
    assert (found.classes, sizes_of(found)) == (['a', 'b'], [22, 2, 12])
    assert notes_of(found) == [
        f'{tmp_path}: TESTING/ as test/, Training/ as train/ is taken',
        f'{tmp_path}/Training: gives no validation images, so a tenth of each class of train validates',
        "no image of class 'b' is tested in this fold",
    ]


def test_subsets_of_a_list_are_taken_as_they_are(photographs, tmp_path):
    places = {'my': ('Train', 'train', 'train', 'train', 'valid', 'TEST'), 'no_val': ['train'] * 5 + ['test']}
    for name, expected in dict(my=[24, 6, 6], no_val=[27, 3, 6]).items():
        rows = rows_of(photographs, lambda c, n, v: places[name][n])  # noqa: B023
        lists = write_list(tmp_path / f'{name}.csv', rows, 'path,label,subset')
        found = load_splits('lists', photographs, 1, SplitOptions(lists))
        assert sizes_of(found) == expected
        assert {os.path.basename(path)[1] for path, _ in found.test} == {'5'}
        drawn = [f'{lists}: gives no validation images, so a tenth of each class of train validates']
        assert notes_of(found) == drawn * (name == 'no_val')
    fails('it has folds 1 to 1', 'lists', photographs, 2, lists=lists)


def test_folds_of_a_list_rotate(photographs, tmp_path):
    """Fold f tests the images of f, validates with those of f + 1 and trains with the rest."""
    lists = write_list(tmp_path / 'my.csv', rows_of(photographs, lambda c, n, v: n % 4 + 1), 'path,label,fold')
    for fold in range(1, 5):
        found = load_splits('lists', photographs, fold, SplitOptions(lists))
        for subset, numbers in (('test', {fold}), ('val', {fold % 4 + 1})):
            assert {int(os.path.basename(path)[1]) % 4 + 1 for path, _ in getattr(found, subset)} == numbers
        assert len(found.images) == 36
    fails('it has folds 1 to 4', 'lists', photographs, 5, lists=lists)


def test_images_that_a_list_leaves_out_are_counted(photographs, tmp_path):
    lists = write_list(tmp_path / 'my.csv', [row for row in rows_of(photographs) if 'a3_y' not in row])
    (line,) = notes_of(load_splits('lists', photographs, 1, SplitOptions(lists)))
    assert line == f'passed over 1 image that no list names, such as {photographs}/a/a3_y.png'


BAD_LISTS = {
    'no label': (['a/a0_x.png'], 'path', "has no column label, only 'path'; its first line must name"),
    'twice': (['x,a,b'], 'path,label,label', 'has two columns label; remove one'),
    'cells': (['a/a0_x.png,a,1'], 'path,label', 'line 2 has more cells than its first line'),
    'nothing': ([], 'path,label', 'lists no image'),
    'label': (['a/a0_x.png,a', 'a/a1_x.png, '], 'path,label', 'line 3 has an empty label'),
    'again': (['a/a0_x.png,a', './a/a0_x.png,b'], 'path,label', './a/a0_x.png is listed twice, in lines 2 and 3'),
    'quote': (['"a/a0_x.png,a'], 'path,label', 'line 2 is damaged (unexpected end of data)'),
    'subset': (['a/a0_x.png,a,dev'], 'path,label,subset', "line 2: subset 'dev' is none of train, val and test"),
    'fold': (['a/a0_x.png,a,0'], 'path,label,fold', "line 2: fold '0' is no number from 1"),
    'both': (['a/a0_x.png,a,1,val'], 'path,label,fold,subset', 'has a column subset and a column fold'),
    'two folds': (['a/a0_x.png,a,1', 'a/a1_x.png,b,2'], 'path,label,fold', 'no image has fold 3; folds are numbered'),
    'one label': ([f'a/a{n}_x.png,a' for n in range(6)], 'path,label', "two classes with images; it has ['a']"),
    'missing': (['a/gone.png,a', 'b/b0_x.png,b', 'b/gone.png,b'], 'path,label', '(and 1 more); `python datasets.py'),
    'elsewhere': (['a/gone.png,a', 'b/gone.png,b'], 'path,label', 'missing); --data_dir must name the folder that the'),
    'suffix': (['a/a0_x.PNG,a', 'b/b0_x.png,b'], 'path,label', 'my.csv but missing; there is '),
    'case': (
        ['a/a0_x.png,a,train', 'a/a0_y.png,a,val', 'b/b0_x.png,A,test'],
        'path,label,subset',
        "class 'A' is in test but has no training image; 'a' differs by case or spaces alone",
    ),
    'group': (
        ['a/a0_x.png,a,g,1', 'a/a0_y.png,a,g,2', 'b/b0_x.png,b,h,3'],
        'path,label,group,fold',
        "group 'g' stands in fold 1 (line 2) and in fold 2 (line 3); a group must stand in one",
    ),
    'no val': (
        ['a/a0_x.png,a,g,train', 'a/a1_x.png,a,h,test'],
        'path,label,group,subset',
        'no row has the subset val, and of groups none is drawn',
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
    (tmp_path / 'empty.csv').touch()
    fails('has no column path', 'lists', photographs, lists=str(tmp_path / 'empty.csv'))


# ---------------------------------------------------------------------------------------------- groups


def groups_apart(splits: Splits) -> list:
    """The objects whose photographs stand in several subsets."""
    places = {}
    for path, subset in place_of(splits).items():
        places.setdefault(os.path.basename(path)[:2], set()).add(subset)
    return [name for name, found in places.items() if len(found) > 1]


def test_groups_by_name_stand_on_one_side(photographs):
    tested = []
    assert groups_apart(load_splits('folder', photographs, 1)), 'without groups the test would show nothing'
    for fold in range(1, 6):
        found = load_splits('folder', photographs, fold, SplitOptions(groups=r'(\w\d)_.'))
        whole = load_splits('folder', photographs, fold, SplitOptions(groups=BY_OBJECT))
        assert found[:5] == whole[:5], 'the first group of the pattern, else the whole match'
        assert groups_apart(found) == []
        for subset in SUBSETS:
            assert {label for _, label in getattr(found, subset)} == {0, 1, 2}
        tested += found.test
    assert len(tested) == len(set(tested)) == 36, 'each image is tested once'


def test_groups_are_the_same_in_every_place_and_order(photographs, tmp_path):
    moved = shutil.copytree(photographs, tmp_path / 'moved')
    lists = write_list(tmp_path / 'my.csv', rows_of(photographs, lambda c, n, v: f'{c}{n}')[::-1], 'path,label,group')
    ways = [('folder', photographs, BY_OBJECT, None), ('folder', moved, BY_OBJECT, None), ('lists', moved, None, lists)]
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
    for fold in range(1, 6):
        found = load_splits('folder', root, fold, SplitOptions(groups=CONTENT))
        place = place_of(found)
        assert len({place[str(root / cls / name)] for cls, name in [('b', 'b0_x.png'), *copies.items()]}) == 1
    assert notes_of(found) == [
        'groups: 37 images in 35 groups, 34 of one image; 1 group of images of several classes, such as a/a9_z.png'
    ]


def test_an_empty_group_is_an_image_alone_and_groups_are_reported(photographs, tmp_path):
    rows = rows_of(photographs, lambda c, n, v: f'{c}{n}' if n < 5 else '')
    lists = write_list(tmp_path / 'my.csv', rows, 'path,label,group')
    found = load_splits('lists', photographs, 1, SplitOptions(lists))
    assert notes_of(found) == ['groups: 36 images in 21 groups, 6 of one image']


def test_groups_that_cannot_be_split_are_one_line(photographs, tmp_path):
    fails('--groups z$: gives no group to 36 of 36 images, the first', 'folder', photographs, groups='z$')
    whole = "class 'a' has 1 group; 5 folds need at least 5: make smaller groups, add images, or move the class away"
    fails(whole, 'folder', photographs, groups=r'^\w')
    fails("class 'a' has 3 groups; 5 folds need at least 5: give --folds_total 3, ", 'folder', photographs, groups='.[036]|.')  # fmt: skip # noqa: E501
    grouped = write_list(tmp_path / 'b.csv', rows_of(photographs, lambda c, n, v: n), 'path,label,group')
    fails('its column group says the groups; leave --groups out', 'lists', photographs, lists=grouped, groups='x')
    folds = write_list(tmp_path / 'c.csv', rows_of(photographs, lambda c, n, v: n % 3 + 1), 'path,label,fold')
    for key, value in (('groups', 'x'), ('folds_total', 4)):
        fails(f'its column fold divides the images; leave --{key} out', 'lists', photographs, lists=folds, **{key: value})  # fmt: skip # noqa: E501
    for subset in ('train', 'val', 'test'):
        shutil.copytree(photographs, tmp_path / 'own' / subset)
    for own in (dict(groups='x'), dict(folds_total=3)):
        fails('has train/ and test/ of its own, which --groups and --folds_total', 'folder', tmp_path / 'own', **own)


def test_a_class_that_balance_leaves_without_training_images_is_one_line():
    """Five groups of four classes, which cannot be balanced: how many images of a class each group holds."""
    counts = dict(r=(1, 1, 1, 0, 0), s=(6, 6, 0, 2, 0), t=(0, 2, 6, 1, 0), u=(1, 6, 0, 6, 2))
    files = {cls: [f'{cls}/{g}_{i}' for g, n in enumerate(held) for i in range(n)] for cls, held in counts.items()}
    groups = {path: path[2] for paths in files.values() for path in paths}
    with pytest.raises(DataError, match="the groups of class 's' hold other classes too, and fill fewer than 3 of 3"):
        own_data.group_blocks(files, groups, 3, 'x')


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


@pytest.mark.parametrize('own', [SplitOptions(folds_total=3), SplitOptions(groups=BY_OBJECT)])
def test_the_batch_is_the_same_in_every_fold(tmp_path, own):
    for cls, count in (('a', 5), ('b', 8), ('c', 11)):
        for i in range(count):
            write_image(tmp_path / cls / f'{cls}{i}.png', i)
    sizes = set()
    for fold in range(1, (own.folds_total or 5) + 1):
        found = load_splits('folder', tmp_path, fold, own)
        args = options.parse_args(['--data_dir', str(tmp_path), *options.split_words(own)])
        options.check_batch(args, len(found.train), 24, 1)
        sizes.add(args.batch_size)
    assert len(sizes) == 1


def test_trees_differ_by_how_they_are_divided(photographs, tmp_path):
    """The digest is the same for all folds of a division, and another one for another division."""
    assert load_splits('folder', photographs, 2).division is None
    assert options.parse_args(['--data_dir', str(photographs), '--folds_total', '5']).folds_total is None
    digests = set()
    rows = rows_of(photographs, lambda c, n, v: n % 3 + 1)
    first = write_list(tmp_path / 'a.csv', rows, 'path,label,fold')
    other = write_list(tmp_path / 'b.csv', [rows[0][:-1] + '2', *rows[1:]], 'path,label,fold')
    ways = [SplitOptions(), SplitOptions(folds_total=3), SplitOptions(folds_total=4), SplitOptions(groups=BY_OBJECT)]
    for own in (*ways, SplitOptions(first), SplitOptions(other)):
        dataset = 'lists' if own.lists else 'folder'
        found = {tree_digest(load_splits(dataset, photographs, f, own)) for f in (1, 2, 3)}
        assert len(found) == 1
        digests |= found
    assert len(digests) == 6


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize('name', ['a b', '', '-x', 'x/y', 'x_fold3_y', 'é', 'x' * 65, 'DTD', 'kth-tips2-b', '.x'])
def test_names_that_folders_or_tables_cannot_have_are_refused(name):
    check_name('fabric_2-x', 'folder')
    with pytest.raises(RunError, match='--name') as caught:
        check_name(name, 'folder')
    assert '\n' not in str(caught.value)
    with pytest.raises(RunError, match='fmd has a name'):
        check_name('fabric', 'fmd')


@pytest.mark.parametrize(
    ('more', 'words'),
    [
        ('--dataset lists', '--dataset lists needs --lists'),
        ('--dataset folder --lists a.csv', 'is for --dataset lists, not for folder'),
        ('--dataset fmd --groups x', '--groups is for folder and lists, and fmd has folds of its own'),
        ('--dataset fmd --folds_total 3', '--folds_total is for folder and lists'),
        ('--folds_total 2', '--folds_total 2 must be from 3'),
        ('--groups (', 'is no regular expression'),
    ],
)
def test_bad_options_are_refused_at_once(photographs, more, words):
    with pytest.raises(RunError) as caught:
        options.parse_args(['--data_dir', str(photographs), *more.split()])
    assert words in str(caught.value)


def check(dataset, root, *more) -> None:
    datasets.main(datasets.get_args_parser().parse_args(['check', dataset, '--data_dir', str(root), *more]))


def test_check_takes_lists_and_groups(photographs, tmp_path, capsys):
    lists = write_list(tmp_path / 'my.csv', rows_of(photographs, lambda c, n, v: f'{c}{n}'), 'path,label,group')
    check('lists', photographs, '--lists', lists)
    lines = ['groups: 36 images in 18 groups, 0 of one image', f'{photographs} is complete']
    assert capsys.readouterr().out.splitlines() == lines
    with open(lists, 'a') as file:
        file.write('a/gone.png,a,x\na/away.png,a,x\n')
    with pytest.raises(DataError, match='2 problems, 2 of the tree'):
        check('lists', photographs, '--lists', lists)
    assert capsys.readouterr().out.count('but missing') == 2

    root = shutil.copytree(photographs, tmp_path / 'set')
    for name in ('a6_x', 'a7_y', 'a8_x'):
        shutil.copy(root / 'a' / 'a0_x.png', root / 'a' / f'{name}.png')
    with pytest.raises(DataError, match=r'leave one of each, or keep groups together \(--groups\)$'):
        check('folder', root)
    check('folder', root, '--groups', CONTENT)
    for subset in ('train', 'test'):
        shutil.copytree(photographs, tmp_path / 'own' / subset)
    with pytest.raises(DataError, match=r'stand in two subsets of a fold: leave one of each$'):
        check('folder', tmp_path / 'own')


# ---------------------------------------------------------------------------------------------- runs


def argv_of(root, run_dir, *more):
    data = ['--data_dir', root, '--model', 'tiny', '--run_dir', run_dir, '--num_workers', 0]
    return [str(word) for word in (*data, *RUN_OPTIONS, '--epochs', 1, '--warmup_epochs', 0, *more)]


def run(root, run_dir, *more):
    return train.train(options.parse_args(argv_of(root, run_dir, *more)))


def refused(root, run_dir, *more) -> str:
    with pytest.raises(UserError) as caught:
        run(root, run_dir, *more)
    assert '\n' not in str(caught.value)
    return str(caught.value)


FABRIC = ('--name', 'fabric', '--groups', BY_OBJECT, '--folds_total', 3)


@pytest.fixture(scope='module')
def made(photographs, tmp_path_factory):
    """A folder of two runs: of the photographs as they are, and of fold 3 of them by groups, called fabric."""
    run_dir = tmp_path_factory.mktemp('runs')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, 'tiny', TINY)
        run(photographs, run_dir)
        run(photographs, run_dir, *FABRIC, '--fold', 3)
    return run_dir


@pytest.fixture
def fabric(made, tmp_path, tiny):
    """A copy of the folder with the run called fabric."""
    return shutil.copytree(made, tmp_path / 'runs') / 'fabric_fold3_tiny_seed42'


def test_two_sets_of_images_in_one_folder_have_names_or_are_refused(photographs, tmp_path, fabric):
    """The same name for other images or other folds is refused before anything is trained, and a table shows both."""
    other, run_dir = shutil.copytree(photographs, tmp_path / 'other'), fabric.parent
    write_image(other / 'a' / 'a7_x.png', 99)
    for root, more in ((other, ()), (other, ('--fold', 2, '--force')), (photographs, ('--fold', 2, *FABRIC[2:]))):
        message = refused(root, run_dir, *more)
        assert '--name NAME' in message
        assert 'folder_fold1_tiny_seed42' in message
    assert "both are called 'fabric'" in refused(other, run_dir, *FABRIC)
    results = runs.read_json(fabric / 'results.json')
    assert (results['name'], results['dataset']) == ('fabric', 'folder')

    argv = ['--run_dir', str(run_dir), '--labels', 'fabric=Fine Fabric']
    (table,) = summarize_runs.read_tables(summarize_runs.get_args_parser().parse_args(argv))
    assert table.datasets == ['folder', 'fabric']
    plots = plot_results.get_args_parser().parse_args(['--log_file', str(fabric / 'log.jsonl')])
    (table, _) = plot_results.read_one(plots)[0]
    assert table.datasets == ['fabric']


def test_a_complete_run_stays_complete_whatever_stands_beside_it(photographs, fabric):
    run_dir = fabric.parent
    make_run(run_dir, dataset='folder', fold=2, tree='another')
    assert run(photographs, run_dir)[0] == run_dir / 'folder_fold1_tiny_seed42'
    message = refused(photographs, run_dir, '--fold', 3)
    assert 'folder_fold2_resnet18_seed42 is of other images or other folds' in message
    make_run(run_dir, dataset='synthetic', fold=2, tree='another')  # a benchmark has no neighbours to fear
    runs.check_neighbours([run_dir / 'synthetic_fold1_tiny_seed42'], dict(dataset='synthetic'), 'mine')


def test_the_split_of_a_run_is_stored_as_a_list(photographs, fabric):
    stored = load_splits('lists', photographs, 1, SplitOptions(str(fabric / 'split.csv')))
    assert split_digest(stored) == runs.read_json(fabric / 'config.json')['defines']['split']
    with open(fabric / 'split.csv') as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() == {'path', 'label', 'subset', 'group'}
    assert all(row['path'].startswith(row['label'] + '/' + row['group']) for row in rows)
    plain = fabric.with_name('folder_fold1_tiny_seed42')  # options that are not given leave no trace
    assert {'name', 'groups', 'folds_total', 'lists'}.isdisjoint(runs.read_json(plain / 'config.json')['defines'])
    assert not (plain / 'split.csv').exists()


def data_of(folder, *argv):
    args = visualize.get_args_parser().parse_args([str(word) for word in argv])
    return trained.data_of(args, trained.load(folder / 'best.pt'))


def test_a_trained_model_finds_its_split_again(photographs, tmp_path, fabric, monkeypatch):
    """By the options in config.json; by the stored list where scikit-learn would divide in another way."""
    found = data_of(fabric)
    assert (found.caution, found.label, len(found.splits.division)) == (None, 'fabric', 36)
    assert data_of(fabric, '--labels', 'fabric=Fabric').label == 'Fabric'
    with pytest.raises(RunError, match="--labels: unknown 'linen'"):
        data_of(fabric, '--labels', 'linen=Linen')
    other = write_list(tmp_path / 'other.csv', rows_of(photographs)[::-1])
    with pytest.raises(RunError, match=r'--lists .*other\.csv.*: its images or lists are others'):
        data_of(fabric, '--lists', other, '--data_dir', photographs, '--fold', 1)
    blocks = own_data.group_blocks
    monkeypatch.setattr(
        own_data, 'group_blocks', lambda *a: {path: block % 3 + 1 for path, block in blocks(*a).items()}
    )
    with pytest.raises(RunError, match='have changed since') as caught:
        data_of(fabric)
    words = str(caught.value).partition('; --fold 1 --lists ')[2].split()
    assert words[:3] == [str(fabric / 'split.csv'), '--data_dir', str(photographs)]
    assert data_of(fabric, '--fold', 1, '--lists', *words[:3]).caution is None


def test_a_model_of_a_list_finds_it_and_refuses_another(photographs, tmp_path, tiny):
    subset = ('train', 'train', 'train', 'train', 'val', 'test')
    lists = write_list(tmp_path / 'my.csv', rows_of(photographs, lambda c, n, v: subset[n]), 'path,label,subset')
    folder, _ = run(photographs, tmp_path / 'runs', '--lists', lists)
    assert folder.name == 'lists_fold1_tiny_seed42'
    for argv in ((), ('--dataset', 'lists'), ('--data_dir', photographs), ('--lists', lists)):
        assert data_of(folder, *argv).caution is None
    other = write_list(tmp_path / 'b.csv', rows_of(photographs, lambda c, n, v: subset[n - 1]), 'path,label,subset')
    with pytest.raises(RunError, match=r'--lists .*b\.csv: its images or lists are others') as caught:
        data_of(folder, '--lists', other)
    assert f'was trained on fold 1 of lists ({lists}), ' in str(caught.value)


# ---------------------------------------------------------------------------------------------- grids


def test_a_grid_hands_the_options_on(photographs, tmp_path, capsys):
    argv = ['--data_dir', str(photographs), '--groups', r'^-?\w\d', '--folds_total', '3', '--name', 'fabric']
    run_all.cli([*argv, '--models', 'resnet18', '--folds', '1-2', '--run_dir', str(tmp_path), '--dry_run'])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for word in ("'--groups=^-?\\w\\d'", '--folds_total=3', '--name fabric', '--dataset folder'):
        assert word in lines[0]


def test_a_named_grid_knows_its_complete_runs(photographs, fabric):
    args = options.parse_args(argv_of(photographs, fabric.parent, *FABRIC, '--fold', 3))
    assert run_all.state_of(run_all.Run(fabric, [], vars(args))) == (State.COMPLETE, '')
    other = run_all.Run(fabric, [], vars(args) | dict(groups=None))
    assert run_all.state_of(other) == (State.OTHER_OPTIONS, r'groups ^\w\d -> None')
    assert json.loads((fabric / 'config.json').read_text())['defines']['groups'] == BY_OBJECT
