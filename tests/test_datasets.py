"""The promises of datasets.py: splits that depend on data set and fold alone, and errors that name the file."""

import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, make_dtd, write_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import datasets
from common import cache, images, synthetic
from common.errors import DataError, UserError
from common.images import open_image
from common.splits import SUBSETS, partition, split_digest
from datasets import load_splits, notes_of, tree_digest


def names(items):
    return [os.path.join(*path.split(os.sep)[-2:]) for path, _ in items]


def fails(match: str, dataset: str, data_dir, fold: int = 1) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_splits(dataset, data_dir, fold)
    assert '\n' not in str(caught.value)


def folders(root, counts: dict[str, int], suffix: str = 'png'):
    for cls, count in counts.items():
        for i in range(count):
            write_image(root / cls / f'{i}.{suffix}', i)
    return root


def check(dataset, root, *more):
    datasets.main(datasets.get_args_parser().parse_args(['check', dataset, '--data_dir', str(root), *map(str, more)]))


def rows_of(path) -> list[tuple[str, ...]]:
    """The rows of `check --csv` without their sentences; paths are those in a tree called set or tree."""
    with open(path, newline='') as file:
        head, *rows = csv.reader(file)
    assert head == ['path', 'kind', 'other', 'folds', 'problem']
    assert all(row[4].startswith(row[0]) or f'{row[2]} and {row[0]}, ' in row[4] for row in rows)
    return [tuple(re.sub(r'.*/(set|tree)/', '', cell) for cell in row[:4]) for row in rows]


# ---------------------------------------------------------------------------------------------- trees with lists


def test_dtd_lists_are_taken_as_they_are(tree):
    splits = load_splits('dtd', tree, 2)
    for subset in SUBSETS:
        assert names(getattr(splits, subset)) == (tree / 'labels' / f'{subset}2.txt').read_text().split()
    assert splits.classes == ['class0', 'class1', 'class2']
    assert all(splits.classes[label] in path for path, label in splits.test)
    (tree / 'images' / 'class0' / '.directory').touch()
    below = load_splits('dtd', tree.rename(tree.parent / 'dtd').parent, 2)  # one folder down
    assert [names(s) for s in below[:3]] == [names(s) for s in splits[:3]]


def test_lists_of_other_systems_are_read(tree):
    path = tree / 'labels' / 'train1.txt'
    expected = load_splits('dtd', tree, 1)
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes().replace(b'\n', b'  \r\n\r\n'))
    assert load_splits('dtd', tree, 1) == expected
    write_image(tree / 'images' / 'class0' / 'a..b c.jpg', 1)
    path.write_bytes(path.read_bytes() + b'class0/a..b c.jpg\n')
    assert len(load_splits('dtd', tree, 1).train) == len(expected.train) + 1


def change_list(name: str, change):
    """A change to one of the lists of a tree in the layout of DTD."""

    def do(tree):
        path = tree / 'labels' / name
        path.write_bytes(change(path.read_bytes()))

    return do


def link_to_nothing(tree):
    path = tree / 'images' / 'class1' / 'class1_0002.jpg'
    path.unlink()
    path.symlink_to('/nonexistent/a.jpg')


BAD_TREES = {
    'image': (lambda tree: next(tree.glob('images/*/*_0002.jpg')).unlink(), 'listed in labels/train1.txt but missing'),
    'link': (link_to_nothing, 'jpg: listed in labels/train1.txt but a link to /nonexistent/a.jpg, which is'),
    'class': (
        change_list('train1.txt', lambda b: b'\n'.join(line for line in b.split(b'\n') if b'class2' not in line)),
        "class 'class2' is in val but has no training image",
    ),
    'twice': (
        change_list('train1.txt', lambda b: b + b'class0/class0_0009.jpg\n'),
        'class0_0009.jpg: listed twice, in train and in val',
    ),
    'form': (change_list('train1.txt', lambda b: b'passwd\n'), 'not of the form class/file'),
    'empty': (change_list('train1.txt', lambda b: b''), 'the train set is empty'),
    'text': (change_list('val1.txt', lambda b: b'class0/\xe9.jpg\n'), r'val1\.txt: is not UTF-8 text'),
    'list': (lambda tree: (tree / 'labels/val1.txt').unlink(), r'val1\.txt: cannot be read'),
    'lists': (lambda tree: shutil.rmtree(tree / 'labels'), 'labels: missing, this is not a complete dtd tree'),
}  # fmt: skip


@pytest.mark.parametrize('kind', BAD_TREES)
def test_a_damaged_tree_is_one_line(tree, kind):
    damage, words = BAD_TREES[kind]
    damage(tree)
    fails(words, 'dtd', tree)


def test_bad_input_is_named(tmp_path, tree):
    fails("unknown data set 'imagenet21k'; the data sets are: dtd", 'imagenet21k', tree)
    fails('needs --data_dir', 'dtd', None)
    fails(r'nowhere: no such folder; .*`python datasets.py prepare dtd .*` downloads it', 'dtd', tmp_path / 'nowhere')
    fails('fold 3 of dtd does not exist; it has folds 1 to 2', 'dtd', tree, 3)
    fails('fold 0', 'dtd', tree, 0)
    fails('fold 6 of synthetic', 'synthetic', None, 6)
    fails(r"needs at least two classes with images; it has \['class0'\]", 'dtd', make_dtd(tmp_path / 'one', classes=1))


def test_a_fold_trains_where_the_lists_of_another_one_are_broken(tree):
    whole = load_splits('dtd', tree, 2)
    with open(tree / 'labels' / 'test1.txt', 'a') as file:
        file.write('class0/missing.png\n')
    assert load_splits('dtd', tree, 2) == whole
    assert tree_digest(whole)
    assert notes_of(whole) == []


# ---------------------------------------------------------------------------------------------- folders


def test_folder_is_partitioned_and_other_files_are_passed_over(tmp_path):
    folders(tmp_path, dict(b=7, a=10), 'PNG')
    for stray in ('a/Thumbs.db', 'a/notes.txt', '.git/x.png', 'top.png'):
        (tmp_path / stray).parent.mkdir(exist_ok=True)
        (tmp_path / stray).touch()
    splits = load_splits('folder', tmp_path, 1)
    assert (splits.classes, len(splits.images)) == (['a', 'b'], 17)


def test_folder_with_its_own_subsets_is_taken_as_it_is(tmp_path):
    for subset, count in (('Train', 3), ('VALID', 1), ('test', 2)):
        folders(tmp_path / subset, dict(a=count, b=count))
    assert [len(s) for s in load_splits('folder', tmp_path, 1)[:3]] == [6, 2, 4]
    fails('fold 2', 'folder', tmp_path, 2)
    folders(tmp_path / 'val', dict(a=1, b=1))
    fails('has both VALID/ and val/; remove one of them', 'folder', tmp_path)
    for name in ('val', 'test'):
        shutil.rmtree(tmp_path / name)
    fails('test: no such folder, beside train/; add it, or --data_dir .*Train divides', 'folder', tmp_path)


def test_without_val_a_tenth_of_train_validates(tmp_path):
    folders(tmp_path / 'train', dict(a=20, b=4))
    folders(tmp_path / 'test', dict(a=2, b=2))
    splits = load_splits('folder', tmp_path, 1)
    assert [len(s) for s in splits[:3]] == [18 + 3, 2 + 1, 4]
    assert {label for _, label in splits.val} == {0, 1}
    together = sorted(splits.train + splits.val)
    assert [path for path, _ in together] == sorted(map(str, (tmp_path / 'train').rglob('*.png')))
    assert notes_of(splits) == [
        f'{tmp_path}/train: gives no validation images, so a tenth of each class of train validates'
    ]
    folders(tmp_path / 'train', dict(c=1))
    fails("train: class 'c' has one image, of which none can be drawn", 'folder', tmp_path)


def test_a_class_may_be_called_train_and_a_tree_synthetic(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders(tmp_path / 'synthetic', dict(Train=5, bus=5))
    splits = load_splits('folder', 'synthetic', 5)
    assert splits.classes == ['Train', 'bus']
    assert open_image(splits.train[0][0]).size == (40, 40), 'it is read and not drawn'


def test_a_class_that_has_no_image_is_named_and_so_are_links_to_nothing(tmp_path):
    folders(tmp_path, dict(a=5, b=5))
    (tmp_path / 'c').mkdir()
    fails(r'c: this class folder has no image \(it is empty\); move it away if it is no class', 'folder', tmp_path)
    (tmp_path / 'c' / 'x.xcf').touch()
    fails(r'c: this class folder has no image \(of its 1 file, such as .*x\.xcf, none has a suffix', 'folder', tmp_path)
    folders(tmp_path, {'c/images': 5})
    way_out = r'c: has no image in this class folder itself but 5 further down, such as .*c/images/0\.png; move them up'
    fails(way_out, 'folder', tmp_path)
    (tmp_path / 'c').rename(tmp_path / '.c')
    (tmp_path / 'c').symlink_to(tmp_path / 'nowhere')
    (tmp_path / 'b' / '8.png').symlink_to('elsewhere.png')
    again = f'; `python datasets.py check folder --data_dir {tmp_path}` lists all'
    fails(rf'8\.png: a link to elsewhere\.png, which is not there \(and 1 more\){again}$', 'folder', tmp_path)
    (tmp_path / 'b' / '8.png').unlink()
    fails(r'/c: a link to .*nowhere, which is not there', 'folder', tmp_path)
    (tmp_path / 'c').unlink()
    (tmp_path / 'b' / '9.png').symlink_to('0.png')
    assert len(load_splits('folder', tmp_path, 1).images) == 11, 'a link to an image is one'


def test_layouts_that_give_no_split_are_told_the_way_out(tmp_path):
    folders(tmp_path, {'val': 7, 'few/a': 5, 'few/b': 3, 'few/c': 1})
    fails('val: has 7 images but no class folders; each image must be in', 'folder', tmp_path / 'val')
    fails(r"class 'b' has 3 images; 5 folds need at least 5: add images.* \(and 1 more\)", 'folder', tmp_path / 'few')


@given(st.lists(st.integers(5, 40), min_size=2, max_size=5), st.randoms())
def test_partition_properties(counts, random):
    files = {f'c{c}': [f'root/c{c}/{i}.jpg' for i in range(n)] for c, n in enumerate(counts)}
    shuffled = {c: random.sample(paths, len(paths)) for c, paths in random.sample(list(files.items()), len(files))}
    everything = {(path, label) for label, c in enumerate(sorted(files)) for path in files[c]}
    folds = [partition(files, fold) for fold in range(1, 6)]
    assert folds == [partition(shuffled, fold) for fold in range(1, 6)], 'the order of listing must not matter'
    for fold, splits in enumerate(folds):
        parts = [set(s) for s in splits[:3]]
        assert set().union(*parts) == everything
        assert sum(map(len, parts)) == len(everything), 'the subsets must be disjoint'
        for part in parts:
            assert {label for _, label in part} == set(range(len(files))), 'every class in every subset'
        assert splits.val == folds[(fold + 1) % 5].test
    tested = [item for splits in folds for item in splits.test]
    assert sorted(tested) == sorted(everything), 'the test sets must cover every image once'


# ---------------------------------------------------------------------------------------------- drawn textures


@pytest.mark.parametrize(('fold', 'expected'), [(1, 'd0b5db324b12cee4'), (5, '5831d9762dca6525')])
def test_splits_are_the_same_on_every_machine(fold, expected):
    splits = load_splits('synthetic', None, fold)
    assert [len(s) for s in splits[:3]] == [360, 120, 120]
    lines = [f'{name} {path} {label}' for name in SUBSETS for path, label in getattr(splits, name)]
    assert hashlib.sha256('\n'.join(lines).replace(os.sep, '/').encode()).hexdigest()[:16] == expected


def test_every_synthetic_image_has_the_same_histogram_and_is_a_function_of_class_and_index():
    assert len(synthetic.CLASSES) >= 12
    for cls in synthetic.CLASSES:
        a, b = synthetic.draw(cls, 0), synthetic.draw(cls, 1)
        for image in (a, b):
            assert (np.bincount(image.ravel(), minlength=256) == image.size // 256).all()
        assert not np.array_equal(a, b)
        synthetic.draw.cache_clear()
        assert np.array_equal(a, synthetic.draw(cls, 0))


def autocorrelation(cls: str, dy: int, dx: int) -> float:
    """Mean correlation of a class's images with themselves at a displacement."""
    values = []
    for index in range(4):
        image = synthetic.draw(cls, index).astype(float)
        a = image[8:-8, 8:-8]
        b = np.roll(image, (-dy, -dx), (0, 1))[8:-8, 8:-8]
        values.append(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    return float(np.mean(values))


@pytest.mark.parametrize('period', ['07', '12'])
@pytest.mark.parametrize(('angle', 'direction'), [('000', (0, 1)), ('045', (1, 1)), ('090', (1, 0)), ('135', (1, -1))])
def test_the_streaks_co_occur_along_the_direction_of_their_name(angle, direction, period):
    # Three steps along the streak meet the same grey level; three along any other direction do so less.
    cls = f'streak{angle}_period{period}'
    along = {d: autocorrelation(cls, 3 * d[0], 3 * d[1]) for d in ((0, 1), (1, 1), (1, 0), (1, -1))}
    assert max(along, key=along.get) == direction, along


# ---------------------------------------------------------------------------------------------- images


def test_damaged_images_are_named(tmp_path, tree):
    whole = tree / 'images' / 'class0' / 'class0_0000.jpg'
    (tmp_path / 'torn.jpg').write_bytes(whole.read_bytes()[:400])
    (tmp_path / 'text.jpg').write_text('no image')
    Image.new('F', (4, 4)).save(tmp_path / 'real.tif')
    (tmp_path / 'bad.ppm').write_bytes(b'P6 4 x 255\n')
    for name in ('torn.jpg', 'text.jpg', 'missing.jpg', 'real.tif', 'bad.ppm'):
        with pytest.raises(DataError, match=rf'{name}: cannot be read as an image') as caught:
            open_image(str(tmp_path / name))
        assert '\n' not in str(caught.value)


# ---------------------------------------------------------------------------------------------- notes and digests


def test_what_is_passed_over_is_counted_and_named(tmp_path, tree):
    def notes(dataset, root):
        return notes_of(load_splits(dataset, root, 1))

    folders(tmp_path / 'p', dict(a=5, b=5))
    assert notes('folder', tmp_path / 'p') == []
    folders(tmp_path / 'p', {'a/day2': 2})
    for name in ('a/Thumbs.db', 'b/notes.txt', 'b/README', '.hidden', 'b/.directory', 'b/also.txt'):
        (tmp_path / 'p' / name).touch()
    (tmp_path / 'p' / 'b' / 'round').symlink_to(tmp_path / 'p')  # a link to what holds it
    assert notes('folder', tmp_path / 'p') == [
        f'passed over 2 images outside the class folders, such as {tmp_path}/p/a/day2/0.png',
        f'passed over 4 files without an image suffix (1 .db, 2 .txt, 1 no suffix), such as {tmp_path}/p/a/Thumbs.db',
    ]
    assert notes('dtd', tree) == []
    write_image(tree / 'images' / 'class0' / 'more.png', 1)
    assert notes('dtd', tree) == [f'passed over 1 image that no list names, such as {tree}/images/class0/more.png']
    assert notes('synthetic', None) == []


def test_digests_of_splits_and_trees(tree, tmp_path):
    def digests(dataset, root, fold):
        splits = load_splits(dataset, root, fold)
        return split_digest(splits), tree_digest(splits)

    (split1, tree1), (split2, tree2) = digests('dtd', tree, 1), digests('dtd', tree, 2)
    assert split1 != split2
    assert tree1 == tree2
    lines = []  # runs of before hold this value
    for subset in SUBSETS:
        for path, _ in getattr(load_splits('dtd', tree, 1), subset):
            size = 0 if subset == 'test' else os.path.getsize(path)
            lines.append(f'{subset} {os.sep.join(path.split(os.sep)[-2:])} {size}')
    assert split1 == hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16]

    shutil.copytree(tree, tmp_path / 'deeper' / 'dtd')
    assert digests('dtd', tmp_path / 'deeper', 1) == (split1, tree1)
    lists = tree / 'labels' / 'train2.txt'
    lists.write_text(lists.read_text() + 'class0/new.jpg\n')
    write_image(tree / 'images' / 'class0' / 'new.jpg', 7)
    split, changed = digests('dtd', tree, 1)
    assert split == split1
    assert changed != tree1, 'the lists of another fold, and an image of it'
    folders(tmp_path / 'f', dict(a=6, b=6))
    trees = {digests('folder', tmp_path / 'f', fold)[1] for fold in range(1, 6)}
    assert len(trees) == 1
    write_image(tmp_path / 'f' / 'a' / '0.png', 99, size=41)
    assert digests('folder', tmp_path / 'f', 1)[1] not in trees
    assert digests('synthetic', None, 1)[1] == digests('synthetic', None, 2)[1]


# ---------------------------------------------------------------------------------------------- command line


def test_commands(tmp_path, capsys):
    def lines_of(*argv):
        datasets.main(datasets.get_args_parser().parse_args(argv))
        return capsys.readouterr().out.splitlines()

    assert [line.split()[0] for line in lines_of('list')[::2]] == list(datasets.DATASETS)
    assert len(lines_of('split', 'synthetic', '--fold', '2')) == 600
    lines_of('show', '--out', str(tmp_path / 'a' / 'sheet.png'))
    assert Image.open(tmp_path / 'a' / 'sheet.png').size == (8 * 128, 12 * 128)
    with pytest.raises(UserError, match='drawn and would not read --data_dir'):
        lines_of('split', 'synthetic', '--data_dir', 'x')


def test_names_need_not_be_utf8(tmp_path):
    folders(tmp_path / 'set', dict(a=5, b=5))
    os.rename(os.fsencode(tmp_path / 'set' / 'b'), os.fsencode(tmp_path / 'set') + b'/caf\xe9')
    os.rename(os.fsencode(tmp_path / 'set' / 'a' / '0.png'), os.fsencode(tmp_path / 'set' / 'a') + b'/\xff.png')
    splits = load_splits('folder', tmp_path / 'set', 1)
    assert [os.fsencode(cls) for cls in splits.classes] == [b'a', b'caf\xe9']
    assert split_digest(splits) != tree_digest(splits)
    (tmp_path / 'kept').mkdir()
    for path, _ in splits.train:
        assert images.read_pixels(path, cache.Cache(tmp_path / 'kept', 1 << 60)).shape == (40, 40, 3)
    command = [sys.executable, 'datasets.py', 'split', 'folder', '--data_dir', tmp_path / 'set']
    out = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert (out.returncode, out.stderr) == (0, b'')
    lines = [f'{s}\t{splits.classes[i]}\t{p}\n' for s in SUBSETS for p, i in getattr(splits, s)]
    assert out.stdout == os.fsencode(''.join(lines))


def test_check_lists_every_problem_and_counts_them(tmp_path, capsys):
    root = tmp_path / 'set'
    for c, cls in enumerate('abc'):
        for i in range(8):
            write_image(root / cls / f'{i}.png', 100 * c + i)
    for path in ('a/0.png', 'b/3.png'):
        (root / path).write_bytes(b'\x89PNG damaged')
    shutil.copy(root / 'a' / '1.png', root / 'c' / '1.png')
    (root / 'c' / 'notes.txt').touch()

    def report() -> tuple[list[str], str]:
        with pytest.raises(DataError) as caught:
            check('folder', root, '--csv', tmp_path / 'new' / 'a.csv')
        *lines, path = capsys.readouterr().out.splitlines()
        assert path == str(tmp_path / 'new' / 'a.csv')
        return lines, str(caught.value)

    lines, last = report()
    for line, words in zip(
        lines, ('passed over 1 file', 'the same image twice, in two classes', 'a/0.png', 'b/3.png'), strict=True
    ):
        assert words in line
    assert last == (
        f'{root}: 3 problems, 2 of images that cannot be read, 1 of images that stand in two subsets of a fold: leave '
        'one of each, or keep groups together (--groups)'
    )
    place = [{p[-7:]: s for s in SUBSETS for p, _ in getattr(load_splits('folder', root, f), s)} for f in range(1, 6)]
    apart = ' '.join(str(fold) for fold in range(1, 6) if len({place[fold - 1][f'{c}/1.png'] for c in 'ac'}) > 1)
    copy = ('c/1.png', 'copy in two classes', 'a/1.png', apart)
    damaged = [(path, 'unreadable', '', '1 2 3 4 5') for path in ('a/0.png', 'b/3.png')]
    assert rows_of(tmp_path / 'new' / 'a.csv') == [copy, *damaged]
    # A tree that gives no split is read all the same.
    for name in ('d', 'e'):
        (root / name).mkdir()
    lines, last = report()
    assert [line.split(':')[0][-1] for line in lines[-2:]] == ['d', 'e']
    assert sum('cannot be read as an image' in line for line in lines) == 2
    assert last.startswith(f'{root}: 4 problems, 2 of the tree, 2 of images that cannot be read')
    empty = [(cls, 'empty class', '', '1 2 3 4 5') for cls in 'de']
    rows = rows_of(tmp_path / 'new' / 'a.csv')
    assert rows == [('c/1.png', 'copy', 'a/1.png', ''), *((*row[:3], '') for row in damaged), *empty]


def test_check_of_a_benchmark_lists_what_is_missing_once(tree, capsys):
    for i in (0, 9, 13):  # of train, val and test; the folds list each again
        (tree / 'images' / 'class1' / f'class1_{i:04d}.jpg').unlink()
    with pytest.raises(DataError, match=f'3 problems, 3 of the tree; move {tree} away, and'):
        check('dtd', tree)
    out = capsys.readouterr().out.splitlines()  # first what is not used
    assert [line.split(': ')[0][-8:] for line in out[1:]] == ['0000.jpg', '0009.jpg', '0013.jpg']


def test_problems_of_several_folds_are_one_row(tree, tmp_path):
    lists = tree / 'labels' / 'test2.txt'
    listed, gone = lists.read_text(), ('class1/class1_0000.jpg', 'class1/class1_0001.JPG')
    (tree / 'images' / gone[0]).unlink()
    lists.write_text(listed + f'{gone[1]}\nclass2/class2_0008.jpg\nclass0/class0_0008.jpg\n')

    def rows():
        with pytest.raises(DataError):
            check('dtd', tree, '--csv', tmp_path / 'a.csv')
        return rows_of(tmp_path / 'a.csv')

    near = 'images/class1/class1_0001.jpg'
    assert rows() == [(f'images/{gone[0]}', 'missing', '', '1 2'), (f'images/{gone[1]}', 'missing', near, '2')]
    for i, path in enumerate(gone):
        write_image(tree / 'images' / path, 900 + i)
    twice = [(f'images/class{c}/class{c}_0008.jpg', 'listed twice', '', '2') for c in '20']
    assert [row for row in rows() if row[1] != 'tree'] == twice
    (tree / 'images' / gone[1]).write_text('torn')
    lists.write_text(listed + gone[1])
    assert [row for row in rows() if row[1] != 'tree'] == [(f'images/{gone[1]}', 'unreadable', '', '2')]
