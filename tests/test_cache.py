"""The promises of common/cache.py: whole images, made once, never stale, shared and bounded."""

import os
import shutil
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from conftest import write_image

from common import cache, images, machine
from common.cache import Cache, open_cache
from common.errors import CacheError

IMAGE = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


@pytest.fixture
def kept(tmp_path) -> Cache:
    return Cache(tmp_path, 1 << 60)


def never() -> np.ndarray:
    raise AssertionError('it is there')


def test_an_image_is_made_once_and_is_its_readers_own(kept):
    assert np.array_equal(kept.load('a', lambda: IMAGE), IMAGE)
    found = kept.load('a', never)
    assert np.array_equal(found, IMAGE)
    found[:] = 0
    assert np.array_equal(kept.load('a', never), IMAGE)
    assert np.array_equal(kept.load('b', lambda: IMAGE[:2]), IMAGE[:2])


def test_a_torn_file_is_made_anew(kept):
    kept.load('a', lambda: IMAGE)
    (path,) = kept.folder.iterdir()
    whole = path.read_bytes()
    for torn in (b'', whole[:5], whole[:8], whole[:-1], whole + b'x'):
        path.write_bytes(torn)
        assert np.array_equal(kept.load('a', lambda: IMAGE), IMAGE)
        assert path.read_bytes() == whole


def test_a_changed_file_is_another_image(tmp_path, kept):
    path = tmp_path / 'pictures' / 'a.png'
    write_image(path, 0)
    first, found = images.read_pixels(str(path), kept), os.stat(path)
    assert np.array_equal(first, images.open_image(str(path)))
    write_image(path, 1)
    path.write_bytes(path.read_bytes().ljust(found.st_size, b'\0'))  # the same size, if it was smaller
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))  # and the old date
    second = images.read_pixels(str(path), kept)
    assert np.array_equal(second, images.open_image(str(path)))
    assert not np.array_equal(first, second)
    half = images.read_pixels(str(path), kept, 'half', lambda image: image.resize((20, 20)))
    assert [half.shape, images.read_pixels(str(path), kept).shape] == [(20, 20, 3), (40, 40, 3)]


@pytest.mark.parametrize('trouble', ['limit', 'refusal', 'removed'])
def test_what_cannot_be_kept_is_made_each_time(tmp_path, monkeypatch, trouble):
    kept, calls = Cache(tmp_path / 'kept', 0 if trouble == 'limit' else 1 << 60), []
    if trouble != 'removed':  # as TRAINING.md tells users to
        kept.folder.mkdir()
    if trouble == 'refusal':
        monkeypatch.setattr(os, 'replace', lambda *_: Path('/dev/null/x').touch())
    for _ in range(2):
        assert kept.load('a', lambda: calls.append(1) or IMAGE) is IMAGE
    assert len(calls) == 2
    assert not list(kept.folder.glob('*'))


@pytest.mark.parametrize('files', [{'cpu.max': '150000 100000'}, {'cpu/cpu.cfs_quota_us': '150000'}])
def test_the_limits_of_a_container_count(tmp_path, monkeypatch, files):
    monkeypatch.setattr(machine, 'CGROUPS', tmp_path)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(64))
    files = {'cpu/cpu.cfs_period_us': '100000', 'memory.max': 'max', 'memory/memory.limit_in_bytes': '4096'} | files
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{text}\n')
    assert (machine.cores(), machine.memory()) == (2, 4096)
    for name in files:
        (tmp_path / name).unlink()
    assert machine.cores() == 64


@pytest.mark.parametrize(
    ('total', 'expected'), [(64 << 20, 0), (5 << 30, 2 << 30), (1 << 50, 1 << 40)], ids=['docker', 'small', 'large']
)
def test_memory_is_left_to_others_and_a_full_cache_is_emptied(tmp_path, monkeypatch, total, expected):
    usage = type('Usage', (), dict(total=total, used=0))
    monkeypatch.setattr(cache, 'SHARED_MEMORY', tmp_path)
    monkeypatch.setattr(cache, 'memory', lambda: 4 << 40)
    monkeypatch.setattr(cache.shutil, 'disk_usage', lambda _: usage)
    kept = open_cache('ram')
    assert kept == Cache(tmp_path / f'twistnet-{os.getuid()}', expected)
    if expected:
        kept.load('a', lambda: IMAGE)
        (kept.folder / 'else').touch()
        open_cache('ram').load('a', never)
        usage.used = expected - IMAGE.nbytes
        open_cache('ram')
        assert [path.name for path in kept.folder.iterdir()] == ['else']


def test_the_disk_is_filled_to_nine_tenths(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    disk, total = open_cache('disk'), shutil.disk_usage(tmp_path).total
    assert disk == Cache(tmp_path / 'twistnet', total - total // 10)
    assert open_cache('none') is None


@pytest.mark.skipif(os.getuid() != 0, reason='gives files away')
def test_a_folder_of_another_user_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    target, link = tmp_path / 'elsewhere', tmp_path / 'twistnet'
    target.mkdir()
    link.symlink_to(target)
    assert open_cache('disk').folder == link, "the user's own link"
    for path in (link, target):
        os.chown(path, 1, -1, follow_symlinks=False)
        with pytest.raises(CacheError, match='belongs to another user'):
            open_cache('disk')
        os.chown(path, 0, -1, follow_symlinks=False)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    (tmp_path / 'twistnet').touch()
    with pytest.raises(CacheError, match=r'--cache disk: .*File exists.*; --cache none avoids it'):
        open_cache('disk')


def hammer(folder: Path, seed: int) -> bool:
    kept, rng, whole = Cache(folder, 1 << 60), np.random.default_rng(seed), True
    for i in rng.integers(0, 20, 200):
        image = kept.load(str(i), lambda i=i: np.full((30, 40, 3), i, np.uint8))
        whole &= image.shape == (30, 40, 3) and bool((image == i).all())
        if rng.random() < 0.3:
            for path in list(folder.iterdir())[:1]:
                path.unlink(missing_ok=True)
    return whole


def test_many_at_once_see_whole_images_only(tmp_path):
    with get_context('fork').Pool(3) as pool:
        assert all(pool.starmap(hammer, [(tmp_path, seed) for seed in range(3)]))
