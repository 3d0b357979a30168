"""The promises of datasets.py: splits that depend on data set and fold alone, and errors that name the file."""

import hashlib
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, finish, make_dtd, start, write_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import datasets
from common import cache, images, synthetic
from common.errors import DataError
from common.images import open_image
from common.splits import SUBSETS, partition, split_digest
from datasets import load_splits
from training.loader import ImageList


def names(items):
    return [os.path.join(*path.split(os.sep)[-2:]) for path, _ in items]


def test_dtd_lists_are_taken_as_they_are(tree):
    splits = load_splits('dtd', tree, 2)
    for subset in SUBSETS:
        assert names(getattr(splits, subset)) == (tree / 'labels' / f'{subset}2.txt').read_text().split()
    assert splits.classes == ['class0', 'class1', 'class2']
    assert all(splits.classes[label] in path for path, label in splits.test)


def test_dtd_may_sit_one_folder_down_and_hold_stray_files(tmp_path):
    root = make_dtd(tmp_path / 'data' / 'dtd')
    (root / 'images' / 'class0' / '.directory').touch()
    assert len(load_splits('dtd', tmp_path / 'data', 1).train) == 24


def test_lists_of_other_systems_are_read(tree):
    path = tree / 'labels' / 'train1.txt'
    expected = load_splits('dtd', tree, 1)
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes().replace(b'\n', b'  \r\n\r\n'))
    assert load_splits('dtd', tree, 1) == expected
    write_image(tree / 'images' / 'class0' / 'a..b c.jpg', 1)
    path.write_bytes(path.read_bytes() + b'class0/a..b c.jpg\n')
    assert len(load_splits('dtd', tree, 1).train) == len(expected.train) + 1


def test_one_class_is_nothing_to_learn(tmp_path):
    fails('there is nothing to tell apart', 'dtd', make_dtd(tmp_path, classes=1))


def test_a_tree_called_synthetic_is_read_and_not_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for cls in ('brick', 'cells'):
        for i in range(5):
            write_image(tmp_path / 'synthetic' / cls / f'{i:04d}.png', i)
    path, _ = load_splits('folder', 'synthetic', 1).train[0]
    assert open_image(path).size == (40, 40)


def test_folder_is_partitioned_and_other_files_are_passed_over(tmp_path):
    for cls, count in (('b', 7), ('a', 10)):
        for i in range(count):
            write_image(tmp_path / cls / f'{i}.PNG', i)
    for stray in ('a/Thumbs.db', 'a/notes.txt', '.git/x.png', 'top.png'):
        (tmp_path / stray).parent.mkdir(exist_ok=True)
        (tmp_path / stray).touch()
    splits = load_splits('folder', tmp_path, 1)
    assert splits.classes == ['a', 'b']
    assert len(splits.train) + len(splits.val) + len(splits.test) == 17


def test_folder_with_its_own_subsets_is_taken_as_it_is(tmp_path):
    for subset, count in (('train', 3), ('val', 1), ('test', 2)):
        for cls in 'ab':
            for i in range(count):
                write_image(tmp_path / subset / cls / f'{i}.png', i)
    splits = load_splits('folder', tmp_path, 1)
    assert [len(s) for s in splits[:3]] == [6, 2, 4]
    with pytest.raises(DataError, match='fold 2'):
        load_splits('folder', tmp_path, 2)
    shutil.rmtree(tmp_path / 'test')
    with pytest.raises(DataError, match=r'test: no such folder, beside train/; add it, or --data_dir .*train divides'):
        load_splits('folder', tmp_path, 1)


@given(st.lists(st.integers(5, 40), min_size=2, max_size=5), st.randoms())
def test_partition_properties(counts, random):
    files = {f'c{c}': [f'root/c{c}/{i}.jpg' for i in range(n)] for c, n in enumerate(counts)}
    shuffled = {c: random.sample(paths, len(paths)) for c, paths in random.sample(list(files.items()), len(files))}
    everything = {(path, label) for label, c in enumerate(sorted(files)) for path in files[c]}
    tested = []
    for fold in range(1, 6):
        splits = partition(files, fold, 'x')
        assert splits == partition(shuffled, fold, 'x'), 'the order of listing must not matter'
        parts = [set(s) for s in splits[:3]]
        assert set().union(*parts) == everything
        assert sum(map(len, parts)) == len(everything), 'the subsets must be disjoint'
        for part in parts:
            assert {label for _, label in part} == set(range(len(files))), 'every class in every subset'
        assert splits.val == partition(files, fold % 5 + 1, 'x').test
        tested += splits.test
    assert sorted(tested) == sorted(everything), 'the test sets must cover every image once'


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
    best = max(along, key=along.get)
    assert best == direction, along


def test_images_become_rgb(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for mode, suffix in (('L', 'jpg'), ('CMYK', 'jpg'), ('P', 'png'), ('RGBA', 'png'), ('RGB', 'png')):
        path = tmp_path / f'{mode}.{suffix}'
        rgb.convert(mode).save(path)
        image = open_image(str(path))
        assert (image.mode, image.size) == ('RGB', (8, 8))
    assert np.array_equal(open_image(str(tmp_path / 'RGB.png')), rgb)


def test_image_list_hands_the_key_to_the_transform(tree):
    items = load_splits('dtd', tree, 1).train
    data = ImageList(items, lambda image, key: (image.size, key))
    assert len(data) == 24
    assert data[(7, 3, 10)] == (((40, 40), (7, 3, 10)), items[10][1])
    assert data[10] == (((40, 40), 10), items[10][1])


def fails(match: str, dataset: str, data_dir, fold: int = 1) -> None:
    with pytest.raises(DataError, match=match) as caught:
        load_splits(dataset, data_dir, fold)
    assert '\n' not in str(caught.value)


def test_bad_input_is_named(tmp_path, tree):
    fails("unknown data set 'imagenet21k'; the data sets are: dtd", 'imagenet21k', tree)
    fails('needs --data_dir', 'dtd', None)
    fails('nowhere: no such folder', 'dtd', tmp_path / 'nowhere')
    fails('fold 3 .* has folds 1 to 2', 'dtd', tree, 3)
    fails('fold 0', 'dtd', tree, 0)
    fails('fold 6 of synthetic', 'synthetic', None, 6)
    fails('at least two class folders are needed', 'folder', tree / 'images' / 'class0')
    write_image(tmp_path / 'few' / 'a' / '0.png', 0)
    shutil.copytree(tree / 'images' / 'class0', tmp_path / 'few' / 'b')
    fails("class 'a' has one image;", 'folder', tmp_path / 'few')

    missing = tree / 'images' / 'class1' / 'class1_0002.jpg'
    missing.rename(tmp_path / 'away.jpg')
    fails('class1_0002.jpg: listed in labels/train1.txt but missing', 'dtd', tree)
    (tmp_path / 'away.jpg').rename(missing)

    lists = tree / 'labels'
    train = (lists / 'train1.txt').read_text()
    (lists / 'train1.txt').write_text(''.join(line for line in train.splitlines(True) if 'class2' not in line))
    fails("class 'class2' is in val but has no training image", 'dtd', tree)
    (lists / 'train1.txt').write_text(train + 'class0/class0_0009.jpg\n')
    fails(r'class0_0009.jpg: listed twice, in train and in val', 'dtd', tree)
    (lists / 'train1.txt').write_text('../passwd\n')
    fails('not of the form class/file', 'dtd', tree)
    (lists / 'train1.txt').write_text('')
    fails('the train set is empty', 'dtd', tree)
    (lists / 'train1.txt').write_text(train)
    (lists / 'val1.txt').write_bytes(b'class0/\xe9.jpg\n')
    fails(r'val1\.txt: is not UTF-8 text', 'dtd', tree)
    (lists / 'val1.txt').unlink()
    fails(r'val1\.txt: cannot be read', 'dtd', tree)
    shutil.rmtree(lists)
    fails('labels: missing, this is not a complete dtd tree', 'dtd', tree)


def test_damaged_images_are_named(tmp_path, tree):
    whole = tree / 'images' / 'class0' / 'class0_0000.jpg'
    torn = tmp_path / 'torn.jpg'
    torn.write_bytes(whole.read_bytes()[:400])
    Image.new('F', (4, 4)).save(tmp_path / 'real.tif')
    (tmp_path / 'bad.ppm').write_bytes(b'P6 4 x 255\n')
    (tmp_path / 'folder.jpg').mkdir()
    text = tmp_path / 'text.jpg'
    text.write_text('no image')
    more = [tmp_path / name for name in ('missing.jpg', 'real.tif', 'bad.ppm', 'folder.jpg')]
    for path in (torn, text, *more):
        with pytest.raises(DataError, match=rf'{path.name}: cannot be read as an image') as caught:
            open_image(str(path))
        assert '\n' not in str(caught.value)


@pytest.mark.slow
def test_commands(tmp_path):
    code, out, _ = finish(start('datasets.py', 'list'))
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[::2]] == list(datasets.DATASETS)
    code, out, _ = finish(start('datasets.py', 'split', 'synthetic', '--fold', '2'))
    assert code == 0
    assert len(out.splitlines()) == 600
    code, _, _ = finish(start('datasets.py', 'show', '--out', str(tmp_path / 'a' / 'sheet.png')))
    assert code == 0
    assert Image.open(tmp_path / 'a' / 'sheet.png').size == (8 * 128, 12 * 128)
    code, out, err = finish(start('datasets.py', 'split', 'dtd', '--data_dir', 'nowhere', cwd=ROOT))
    assert (code, out) == (1, '')
    assert err.splitlines() == [
        'datasets.py: error: nowhere: no such folder; --data_dir must name the root of dtd; '
        '`python datasets.py prepare dtd --data_dir data` downloads it'
    ]


def folders(root, counts: dict[str, int], suffix: str = 'png'):
    for cls, count in counts.items():
        for i in range(count):
            write_image(root / cls / f'{i}.{suffix}', i)
    return root


def test_every_suffix_that_pillow_reads_is_an_image(tmp_path):
    folders(tmp_path, dict(a=5, b=5), 'pgm')
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))
    for name, kind in (
        ('x.jfif', 'JPEG'),
        ('x.JPE', 'JPEG'),
        ('x.jp2', 'JPEG2000'),
        ('x.tga', 'TGA'),
        ('x.pbm', 'PPM'),
    ):
        pixels.save(tmp_path / 'a' / name, kind)
    splits = load_splits('folder', tmp_path, 1)
    assert sum(map(len, splits[:3])) == 15
    assert all(open_image(path).mode == 'RGB' for subset in splits[:3] for path, _ in subset)


def test_a_class_that_has_no_image_is_named_and_so_are_links_to_nothing(tmp_path):
    folders(tmp_path, dict(a=5, b=5))
    (tmp_path / 'c').mkdir()
    fails(r'c: this class folder has no image \(it is empty\); move it away if it is no class', 'folder', tmp_path)
    (tmp_path / 'c' / 'x.xcf').touch()
    fails(r'c: this class folder has no image \(of its 1 file, such as .*x\.xcf, none has a suffix', 'folder', tmp_path)
    (tmp_path / 'c').rename(tmp_path / '.c')
    (tmp_path / 'c').symlink_to(tmp_path / 'nowhere')
    fails(r'/c: a link to .*nowhere, which is not there', 'folder', tmp_path)
    (tmp_path / 'c').unlink()
    (tmp_path / 'b' / '7.png').symlink_to('elsewhere.png')
    (tmp_path / 'b' / '8.png').symlink_to('elsewhere.png')
    again = f'; `python datasets.py check folder --data_dir {tmp_path}` lists all'
    fails(rf'\d\.png: a link to elsewhere\.png, which is not there \(and 1 more\){again}$', 'folder', tmp_path)
    for name in ('7.png', '8.png'):
        (tmp_path / 'b' / name).unlink()
    (tmp_path / 'b' / '9.png').symlink_to('0.png')
    assert len(names(load_splits('folder', tmp_path, 1).train)) > 0, 'a link to an image is one'


def test_a_listed_link_to_nothing_is_named(tree):
    path = tree / 'images' / 'class1' / 'class1_0002.jpg'
    path.unlink()
    path.symlink_to('/nonexistent/a.jpg')
    fails(
        r'class1_0002\.jpg: listed in labels/train1\.txt but a link to /nonexistent/a\.jpg, which is not there',
        'dtd',
        tree,
    )


def test_layouts_of_others_are_told_the_way_out(tmp_path):
    folders(tmp_path / 'tiny', {f'n{c}/images': 5 for c in range(3)})
    way_out = (
        'has no image in this class folder itself but 5 further down, such as .*n0/images/0.png; move them up, or let'
    )
    fails(way_out, 'folder', tmp_path / 'tiny')
    folders(tmp_path, dict(val=7))
    fails('val: has 7 images but no class folders, .*; each image must be moved into', 'folder', tmp_path / 'val')
    folders(tmp_path / 'few', dict(a=5, b=3, c=1))
    fails(r"class 'b' has 3 images; 5 folds need at least 5: add images.* \(and 1 more\)", 'folder', tmp_path / 'few')


def test_subsets_may_be_in_capitals_and_have_other_names(tmp_path):
    for subset, count in (('Train', 3), ('VALID', 1), ('test', 2)):
        folders(tmp_path / subset, dict(a=count, b=count))
    assert [len(s) for s in load_splits('folder', tmp_path, 1)[:3]] == [6, 2, 4]
    folders(tmp_path / 'val', dict(a=1, b=1))
    fails('has both VALID/ and val/; remove one of them', 'folder', tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    folders(tmp_path, dict(Train=5, bus=5))
    assert load_splits('folder', tmp_path, 5).classes == ['Train', 'bus']


def passed_over(dataset: str, root) -> list[str]:
    return datasets.passed_over(load_splits(dataset, root, 1))


def test_without_val_a_tenth_of_train_validates(tmp_path):
    folders(tmp_path / 'train', dict(a=20, b=4))
    folders(tmp_path / 'test', dict(a=2, b=2))
    splits = load_splits('folder', tmp_path, 1)
    assert [len(s) for s in splits[:3]] == [18 + 3, 2 + 1, 4]
    assert {label for _, label in splits.val} == {0, 1}
    together = sorted(splits.train + splits.val)
    assert [path for path, _ in together] == sorted(map(str, (tmp_path / 'train').rglob('*.png')))
    (line,) = passed_over('folder', tmp_path)
    assert line == f'{tmp_path} has no val/: a tenth of each class of {tmp_path}/train validates'
    assert datasets.check_tree('folder', tmp_path).tree == []
    fails('fold 2', 'folder', tmp_path, 2)
    folders(tmp_path / 'train', dict(c=1))
    fails("train: class 'c' has one image, of which none can be drawn", 'folder', tmp_path)


def test_a_fold_trains_where_the_lists_of_another_one_are_broken(tree):
    whole = load_splits('dtd', tree, 2)
    with open(tree / 'labels' / 'test1.txt', 'a') as file:
        file.write('class0/missing.png\n')
    assert load_splits('dtd', tree, 2) == whole
    assert datasets.tree_digest(whole)
    assert datasets.passed_over(whole) == []


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path, monkeypatch):
    folders(tmp_path / 'p', dict(a=5, b=5))

    def refuse(path):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(os, 'scandir', refuse)
    assert datasets.check_tree('folder', tmp_path / 'p').tree == [f'{tmp_path}/p: cannot be read (Permission denied)']


def test_what_is_passed_over_is_counted_and_named(tmp_path, tree):
    folders(tmp_path / 'p', dict(a=5, b=5))
    assert passed_over('folder', tmp_path / 'p') == []
    folders(tmp_path / 'p', {'a/day2': 2})
    for name in ('a/Thumbs.db', 'b/notes.txt', 'b/README', '.hidden', 'b/.directory', 'b/also.txt'):
        (tmp_path / 'p' / name).touch()
    (tmp_path / 'p' / 'b' / 'round').symlink_to(tmp_path / 'p')  # a link to what holds it
    assert passed_over('folder', tmp_path / 'p') == [
        f'passed over 2 images outside the class folders, such as {tmp_path}/p/a/day2/0.png',
        f'passed over 4 files without an image suffix (1 .db, 2 .txt, 1 no suffix), such as {tmp_path}/p/a/Thumbs.db',
    ]
    assert passed_over('dtd', tree) == []
    write_image(tree / 'images' / 'class0' / 'more.png', 1)
    assert passed_over('dtd', tree) == [
        f'passed over 1 image that no list names, such as {tree}/images/class0/more.png'
    ]
    assert passed_over('synthetic', None) == []


def test_digests_of_splits_and_trees(tree, tmp_path):
    def digests(dataset, root, fold):
        splits = load_splits(dataset, root, fold)
        return split_digest(splits), datasets.tree_digest(splits)

    (split1, tree1), (split2, tree2) = digests('dtd', tree, 1), digests('dtd', tree, 2)
    assert split1 != split2
    assert tree1 == tree2
    (tmp_path / 'deeper').mkdir()
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
    # Runs of before hold this value.
    lines = [f'{subset} {splits_path(path)} {size}' for subset, path, size in listed(tree)]
    assert split_digest(load_splits('dtd', tree, 1)) == hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16]


def splits_path(path: str) -> str:
    return os.sep.join(path.split(os.sep)[-2:])


def listed(tree):
    splits = load_splits('dtd', tree, 1)
    for subset in SUBSETS:
        for path, _ in getattr(splits, subset):
            yield subset, path, 0 if subset == 'test' else os.path.getsize(path)


def test_names_need_not_be_utf8(tmp_path, capfdbinary):
    folders(tmp_path / 'set', dict(a=5, b=5))
    os.rename(os.fsencode(tmp_path / 'set' / 'b'), os.fsencode(tmp_path / 'set') + b'/caf\xe9')
    os.rename(os.fsencode(tmp_path / 'set' / 'a' / '0.png'), os.fsencode(tmp_path / 'set' / 'a') + b'/\xff.png')
    splits = load_splits('folder', tmp_path / 'set', 1)
    assert [os.fsencode(cls) for cls in splits.classes] == [b'a', b'caf\xe9']
    assert split_digest(splits) != datasets.tree_digest(splits)
    (tmp_path / 'kept').mkdir()
    for path, _ in splits.train:
        assert images.read_pixels(path, cache.Cache(tmp_path / 'kept', 1 << 60)).shape == (40, 40, 3)
    out = subprocess.run(
        [sys.executable, 'datasets.py', 'split', 'folder', '--data_dir', tmp_path / 'set'],
        cwd=ROOT,
        capture_output=True,
    )
    assert (out.returncode, out.stderr) == (0, b'')
    lines = [f'{s}\t{splits.classes[i]}\t{p}\n' for s in SUBSETS for p, i in getattr(splits, s)]
    assert out.stdout == os.fsencode(''.join(lines))


def test_check_lists_every_problem_and_counts_them(tmp_path, capsys):
    folders(tmp_path / 'set', dict(a=8, b=8, c=8))
    for i in range(8):
        for c, cls in enumerate('abc'):
            write_image(tmp_path / 'set' / cls / f'{i}.png', 100 * c + i)
    for path in ('a/0.png', 'b/3.png'):
        (tmp_path / 'set' / path).write_bytes(b'\x89PNG damaged')
    shutil.copy(tmp_path / 'set' / 'a' / '1.png', tmp_path / 'set' / 'c' / '1.png')
    (tmp_path / 'set' / 'c' / 'notes.txt').touch()

    def report() -> tuple[list[str], str]:
        parser = datasets.get_args_parser()
        with pytest.raises(DataError) as caught:
            datasets.main(parser.parse_args(['check', 'folder', '--data_dir', str(tmp_path / 'set')]))
        return capsys.readouterr().out.splitlines(), str(caught.value)

    lines, last = report()
    assert len(lines) == 4
    for line, words in zip(lines, ('passed over 1 file', 'the same image twice, in two classes', 'a/0.png', 'b/3.png')):
        assert words in line
    assert last == (
        f'{tmp_path}/set: 3 problems, 2 of images that cannot be read, 1 of images that stand in two subsets of '
        'a fold: leave one of each, or keep groups together (--groups)'
    )
    # A tree that gives no split is read all the same.
    for name in ('d', 'e'):
        (tmp_path / 'set' / name).mkdir()
    lines, last = report()
    assert [line.split(':')[0][-1] for line in lines[-2:]] == ['d', 'e']
    assert sum('cannot be read as an image' in line for line in lines) == 2
    assert last.startswith(f'{tmp_path}/set: 4 problems, 2 of the tree, 2 of images that cannot be read')


def test_check_of_a_benchmark_lists_what_is_missing_once(tmp_path, tree):
    for i in (0, 9, 13):  # of train, val and test; the folds list each again
        (tree / 'images' / 'class1' / f'class1_{i:04d}.jpg').unlink()
    found = datasets.check_tree('dtd', tree)
    assert sorted(line.split(': ')[0][-8:] for line in found.tree) == ['0000.jpg', '0009.jpg', '0013.jpg']
