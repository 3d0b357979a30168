"""The five benchmarks: their splits on full-size trees, every accepted layout, and training on each."""

import functools
import hashlib
import os
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import trees
from conftest import ROOT
from PIL import Image

import datasets
from common.cache import SHARED_MEMORY
from common.errors import DataError
from common.images import open_image
from common.splits import SUBSETS, split_digest
from datasets import DATASETS, load_splits

KEYS = list(trees.MAKE)
SIZES = {
    'dtd': [(1880, 1880, 1880)] * 10,
    'fmd': [(600, 200, 200)] * 5,
    'kth_tips2': [(3212, 352, 1188)] * 4,
    'cub200': [(5394, 600, 5794)] * 5,
    'flowers102': [(1020, 1020, 6149)] * 5,
}


# sha256 of all folds' lists, train, val and test, on these trees.
GOLDEN = {
    'dtd': '092641cc936e807b',
    'fmd': 'dee0c9ead6c9680a',
    'kth_tips2': '83d7b40dd4c4fd3b',
    'cub200': 'a3642899926e735b',
    'flowers102': '5d0b07c1b8fad924',
}


@pytest.fixture(scope='module')
def full():
    """Full-size trees of empty files: a fold is built without opening an image. Memory is faster for so many."""
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as root:
        for key, make in trees.MAKE.items():
            make(Path(root, key), empty=True)
        yield Path(root)


@pytest.mark.slow
@pytest.mark.parametrize('key', KEYS)
def test_sizes_classes_and_splits_are_the_same_on_every_machine(full, key):
    lines = []
    for fold, sizes in enumerate(SIZES[key], start=1):
        splits = load_splits(key, full / key, fold)
        assert tuple(len(subset) for subset in splits[:3]) == sizes == DATASETS[key]['sizes']
        assert len(splits.images) == sum(sizes) == DATASETS[key]['images'], 'the subsets are disjoint'
        assert len(splits.classes) == DATASETS[key]['classes']
        for name in SUBSETS:
            items = getattr(splits, name)
            assert {label for _, label in items} == set(range(len(splits.classes))), 'every class in every split'
            lines += [f'{fold} {name} {os.path.relpath(path, full / key)} {label}' for path, label in items]
    assert hashlib.sha256('\n'.join(lines).replace(os.sep, '/').encode()).hexdigest()[:16] == GOLDEN[key]
    assert len(SIZES[key]) == DATASETS[key]['folds']
    with pytest.raises(
        DataError, match=f'fold {len(SIZES[key]) + 1} of {key} does not exist; it has folds 1 to {fold}'
    ):
        load_splits(key, full / key, len(SIZES[key]) + 1)


class Entries(list):
    """What os.scandir gives can be a context."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def shuffled(real, path):
    entries = list(real(path))
    return Entries(random.Random(7).sample(entries, len(entries)))


@pytest.mark.slow
@pytest.mark.parametrize('key', KEYS)
def test_the_order_of_the_file_system_does_not_matter(full, key, monkeypatch):
    before = load_splits(key, full / key, 2)
    for name in ('listdir', 'scandir'):
        monkeypatch.setattr(os, name, functools.partial(shuffled, getattr(os, name)))
    assert load_splits(key, full / key, 2) == before


@pytest.mark.slow
def test_the_five_test_sets_of_fmd_cover_every_image_once_and_no_mask(full):
    folds = [load_splits('fmd', full / 'fmd', fold) for fold in range(1, 6)]
    tested = [path for splits in folds for path, _ in splits.test]
    assert len(tested) == len(set(tested)) == 1000
    assert not any('mask' in path for path in tested)
    assert [splits.val for splits in folds] == [folds[f % 5].test for f in range(1, 6)]


@pytest.mark.slow
def test_no_physical_sample_of_kth_is_on_both_sides(full):
    def samples(subset):
        return {path.split('sample_')[1][0] for path, _ in subset}

    for fold, sample in enumerate('dcba', start=1):
        splits = load_splits('kth_tips2', full / 'kth_tips2', fold)
        assert samples(splits.test) == {sample}
        assert samples(splits.train) == samples(splits.val) == set('abcd') - {sample}


@pytest.mark.slow
def test_the_test_sets_of_cub_and_flowers_are_official_in_every_fold(full):
    for key in ('cub200', 'flowers102'):
        folds = [load_splits(key, full / key, fold) for fold in range(1, 6)]
        assert all(splits.test == folds[0].test for splits in folds)
        assert len({tuple(splits.val) for splits in folds}) == 5
    official = (full / 'cub200' / 'CUB_200_2011' / 'train_test_split.txt').read_text().split('\n')
    held_out = {line.split()[0] for line in official if line.endswith(' 0')}
    tested = {str(int(path.rsplit('_', 2)[1])) for path, _ in load_splits('cub200', full / 'cub200', 3).test}
    assert tested == held_out
    validated = [path for fold in range(1, 6) for path, _ in load_splits('cub200', full / 'cub200', fold).val]
    assert len(set(validated)) == len(validated), "cub200's val rotates"

    first = load_splits('flowers102', full / 'flowers102', 1)
    numbers = [int(path[-9:-4]) for path, _ in first.train]
    assert all(number % 20 < 10 for number in numbers), 'fold 1 is the official split'
    assert [label for _, label in first.train] == [(number - 1) // 20 for number in numbers], 'labels become 0-based'
    pool = {path for subset in first[:2] for path, _ in subset}
    for fold in range(2, 6):
        splits = load_splits('flowers102', full / 'flowers102', fold)
        assert {path for subset in splits[:2] for path, _ in subset} == pool
        for subset in splits[:2]:
            assert np.bincount([label for _, label in subset]).tolist() == [10] * 102


@pytest.mark.slow
def test_a_large_tree_is_indexed_in_two_seconds_without_opening_an_image(full, monkeypatch):
    monkeypatch.setattr(Image, 'open', None)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert len(load_splits('folder', full / 'cub200' / 'CUB_200_2011' / 'images', 1).images) == 11788
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.2


@pytest.mark.parametrize('key', KEYS)
def test_every_layout_is_accepted_and_means_the_same(tmp_path, small_benchmarks, key):
    trees.MAKE[key](tmp_path / 'data' / key, **trees.SMALL[key], empty=True)
    root = tmp_path / 'data' / key
    inner = {'dtd': 'dtd', 'fmd': 'image', 'kth_tips2': 'KTH-TIPS2-b', 'cub200': 'CUB_200_2011', 'flowers102': '.'}[key]

    def relative(base):
        splits = load_splits(key, base, 1)
        return [[(os.path.relpath(p, root / inner), label) for p, label in s] for s in splits[:3]], splits.classes

    assert relative(root) == relative(root / inner)


@pytest.mark.parametrize(
    ('key', 'remove', 'words'),
    [
        (
            'dtd',
            'dtd/images/texture01/texture01_0003.jpg',
            r'texture01_0003\.jpg: listed in labels/\w+1\.txt but missing',
        ),
        ('fmd', 'image', 'away: has no image in this class folder itself but 30 further down'),
        ('cub200', 'CUB_200_2011/train_test_split.txt', r'train_test_split\.txt: missing'),
        ('cub200', 'CUB_200_2011/images/001.Bird_1', r'Bird_1_0001_700001\.jpg: listed in images\.txt but missing'),
        ('flowers102', 'setid.mat', r'setid\.mat: missing'),
        ('flowers102', 'jpg/image_00030.jpg', r'image_00030\.jpg: listed in setid\.mat but missing'),
    ],
)
def test_half_a_tree_is_one_line_with_the_way_out(tmp_path, small_benchmarks, key, remove, words):
    trees.MAKE[key](tmp_path, **trees.SMALL[key], empty=True)
    os.rename(tmp_path / remove, tmp_path / 'away')
    with pytest.raises(DataError, match=words) as caught:
        load_splits(key, tmp_path, 1)
    assert '\n' not in str(caught.value)
    way_out = f'; move {tmp_path} away, and `python datasets.py prepare {key} --data_dir {tmp_path.parent}` makes'
    assert way_out in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('key', 'remove', 'words'),
    [
        (
            'fmd',
            'image/material0/material0_moderate_001_new.jpg',
            r'has \(599, 200, 200\) images|has \(600, \d+, \d+\)',
        ),
        ('fmd', 'image/material9', 'has 9 classes, by protocol fmd has 10'),
        ('kth_tips2', 'KTH-TIPS2-b/stuff_01/sample_d/25d-scale_2_im_1_col.png', r'has \(3212, 352, 1187\) images'),
        ('kth_tips2', 'KTH-TIPS2-b/stuff_01/sample_c', r'has \(3114, 342, 1188\) images'),
        ('kth_tips2', 'KTH-TIPS2-b/stuff_05', 'has 10 classes, by protocol kth_tips2 has 11'),
    ],
)
def test_a_tree_without_lists_that_is_not_whole_does_not_train(full, key, remove, words):
    # Such trees have no list of their files: what is missing would only make another, smaller split.
    os.rename(full / key / remove, full / 'away')
    with pytest.raises(DataError, match=words):
        load_splits(key, full / key, 1)
    os.rename(full / 'away', full / key / remove)
    load_splits(key, full / key, 1)


@pytest.mark.slow
def test_lists_of_dtd_that_were_cut_are_not_taken_for_another_tree(full):
    labels = full / 'dtd' / 'dtd' / 'labels'
    whole = (labels / 'test3.txt').read_text()
    (labels / 'test3.txt').write_text(''.join(whole.splitlines(True)[:100]))
    with pytest.raises(DataError, match=r'has \(1880, 1880, 100\) images'):
        load_splits('dtd', full / 'dtd', 3)
    (labels / 'test3.txt').write_text(whole)


def test_hidden_and_foreign_entries_are_passed_over(tmp_path, small_benchmarks):
    kth, fmd = tmp_path / 'kth_tips2', tmp_path / 'fmd'
    for root in (kth, fmd):
        trees.MAKE[root.name](root, **trees.SMALL[root.name], empty=True)
    before = load_splits('kth_tips2', kth, 1), load_splits('fmd', fmd / 'image', 1)
    trees.put(kth / 'KTH-TIPS2-b' / 'stuff_00' / 'sample_a' / '._22a-scale_2_im_1_col.png')
    trees.put(kth / 'KTH-TIPS2-b' / '__MACOSX' / 'a.txt')
    trees.put(fmd / 'image' / 'material0' / '._a.jpg')
    os.rename(fmd / 'mask', fmd / 'image' / 'mask')  # data/fmd/<class> beside data/fmd/mask
    assert before == (load_splits('kth_tips2', kth, 1), load_splits('fmd', fmd / 'image', 1))


def test_a_damaged_mat_file_is_named(tmp_path, small_benchmarks):
    trees.flowers102(tmp_path, **trees.SMALL['flowers102'], empty=True)
    for name in ('setid.mat', 'imagelabels.mat'):
        whole = (tmp_path / name).read_bytes()
        for damaged in (whole[:100], whole[:-9], b'no matlab file, but long enough to be taken for one' * 10):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(DataError, match=rf'{name[:-4]}\.mat: damaged'):
                load_splits('flowers102', tmp_path, 1)
        (tmp_path / name).write_bytes(whole)


@pytest.mark.parametrize(
    ('table', 'old', 'new', 'words'),
    [
        ('images', '\n7 ', '\n7', "images.txt: '7"),
        ('images', '\n7 ', '\n6 ', 'image_class_labels.txt: does not list the same images'),
        ('train_test_split', '\n7 1\n', '\n', 'train_test_split.txt: does not list the same images'),
    ],
)
def test_a_damaged_table_of_cub_is_named(tmp_path, small_benchmarks, table, old, new, words):
    trees.cub200(tmp_path, **trees.SMALL['cub200'], empty=True)
    path = tmp_path / 'CUB_200_2011' / f'{table}.txt'
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError) as caught:
        load_splits('cub200', tmp_path, 1)
    assert words in str(caught.value)


def test_images_of_all_modes_keep_their_colours(tmp_path):
    red = Image.new('RGB', (8, 8), (200, 30, 40))
    for mode, suffix in (('CMYK', 'tif'), ('CMYK', 'jpg'), ('P', 'png'), ('RGBA', 'png'), ('RGB', 'png')):
        path = tmp_path / f'{mode}.{suffix}'
        (red.quantize() if mode == 'P' else red.convert(mode)).save(path)
        image = open_image(str(path))
        assert (image.mode, image.size) == ('RGB', (8, 8))
        assert np.abs(np.asarray(image)[4, 4].astype(int) - (200, 30, 40)).max() <= 3, mode
    Image.new('L', (8, 8), 77).save(tmp_path / 'grey.jpg')
    assert np.abs(np.asarray(open_image(str(tmp_path / 'grey.jpg'))).astype(int) - 77).max() <= 1
    Image.fromarray(np.full((8, 8), 200, np.int32)).save(tmp_path / 'eight.tif')
    assert (np.asarray(open_image(str(tmp_path / 'eight.tif'))) == 200).all(), '32 bits a pixel that hold eight'


@pytest.mark.parametrize('key', ['fmd', 'flowers102'])
def test_the_real_trees_hold_nothing_but_their_images(key):
    root = ROOT.parent / 'shared' / 'data' / key
    if not root.is_dir():
        pytest.skip(f'{root} is not here')
    folds = [load_splits(key, root, fold) for fold in range(1, 6)]
    assert len({datasets.tree_digest(splits) for splits in folds}) == 1
    assert len({split_digest(splits) for splits in folds}) == 5
    assert datasets.notes_of(folds[1]) == []
    for path, _ in folds[0].train[::100]:
        with Image.open(path) as image:
            assert np.array_equal(open_image(path), image.convert('RGB')), 'photographs as they were'
