"""The promises of common/cache.py: whole images, made once, never stale, shared and bounded."""

import errno
import os
import shutil
import subprocess
import sys
from multiprocessing import get_context

import numpy as np
import pytest
from conftest import ROOT, write_image

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
    assert half.shape == (20, 20, 3)
    assert images.read_pixels(str(path), kept).shape == (40, 40, 3)


def test_what_does_not_fit_is_made_each_time(tmp_path):
    full, calls = Cache(tmp_path, 0), []
    for _ in range(2):
        full.load('a', lambda: calls.append(1) or IMAGE)
    assert len(calls) == 2
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_no_error_and_a_refusal_is(kept, monkeypatch):
    def replace(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, 'replace', replace)
    code = errno.ENOSPC
    assert kept.load('a', lambda: IMAGE) is IMAGE
    code = errno.EACCES
    with pytest.raises(CacheError, match=r'cannot be written \(Permission denied\); --cache none avoids it'):
        kept.load('a', lambda: IMAGE)
    assert not list(kept.folder.iterdir())


def test_the_limits_leave_room_for_others(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    disk = open_cache('disk')
    total = os.statvfs(tmp_path).f_frsize * os.statvfs(tmp_path).f_blocks
    assert disk.folder == tmp_path / 'twistnet'
    assert 0.85 * total < disk.limit < 0.95 * total
    assert open_cache('none') is None
    code = 'from common import cache; print(cache.open_cache("ram").limit)'
    limit = int(subprocess.check_output([sys.executable, '-c', code], cwd=ROOT, text=True))
    assert 0 < limit <= cache.memory() // 4


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


def test_without_a_home_the_user_is_told(monkeypatch):
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setattr(os.path, 'expanduser', lambda path: path)
    with pytest.raises(CacheError, match='no home directory; set XDG_CACHE_HOME'):
        open_cache('disk')


def test_a_small_shared_memory_is_left_to_the_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, 'SHARED_MEMORY', tmp_path)
    usage = type('Usage', (), dict(total=64 << 20, used=0))
    monkeypatch.setattr(cache.shutil, 'disk_usage', lambda _: usage)
    monkeypatch.setattr(cache, '_register', lambda _: None)
    assert open_cache('ram').limit == 0
    usage.total = 5 << 30
    assert open_cache('ram').limit == min(2 << 30, cache.memory() // 4)


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    (tmp_path / 'elsewhere').mkdir()
    link = tmp_path / 'twistnet'
    link.symlink_to(tmp_path / 'elsewhere')
    assert open_cache('disk').folder == link, "the user's own link"
    with monkeypatch.context() as patch:
        other = os.getuid() + 1
        patch.setattr(os, 'getuid', lambda: other)
        with pytest.raises(CacheError, match='belongs to another user'):
            open_cache('disk')
    if os.getuid() == 0:
        for of_whom in (link, tmp_path / 'elsewhere'):  # a link that another has put there; a folder of another's
            os.chown(of_whom, 1, -1, follow_symlinks=False)
            with pytest.raises(CacheError, match='belongs to another user'):
                open_cache('disk')
            os.chown(of_whom, 0, -1, follow_symlinks=False)
    (tmp_path / 'elsewhere').rmdir()
    with pytest.raises(CacheError, match=r'a link to .*elsewhere, which is not there'):
        open_cache('disk')
    link.unlink()
    (tmp_path / 'twistnet').touch()
    with pytest.raises(CacheError, match='cannot be made'):
        open_cache('disk')


# A user of the cache in a given folder: says how many images it had to make, and stays until its stdin is closed.
USER = """
import sys, pathlib, numpy
from common import cache
cache.SHARED_MEMORY = pathlib.Path(sys.argv[1])
kept, made = cache.open_cache('ram')._replace(limit=1 << 60), []
for i in range(3):
    kept.load(str(i), lambda: made.append(i) or numpy.zeros((4, 4, 3), numpy.uint8))
print(len(made), flush=True)
sys.stdin.read()
"""


def test_the_last_user_empties_the_memory(tmp_path):
    def user():
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process = subprocess.Popen([sys.executable, '-c', USER, str(tmp_path)], cwd=ROOT, **pipes)
        return process, int(process.stdout.readline())

    folder = tmp_path / f'twistnet-{os.getuid()}'
    (first, made), (second, found) = user(), user()
    assert (made, found) == (3, 0)
    first.communicate()
    assert len(list(folder.iterdir())) == 4, 'the second one uses them'
    second.communicate()
    assert [path.name for path in folder.iterdir()] == [cache.USERS]
    third, made = user()
    assert made == 3
    third.kill()  # leaves all behind, for whoever comes next
    third.communicate()
    fourth, found = user()
    fourth.communicate()
    assert found == 0
    assert [path.name for path in folder.iterdir()] == [cache.USERS]
    fifth, _ = user()
    shutil.rmtree(folder)  # as the README tells users to
    assert fifth.communicate() == ('', '')


def hammer(folder, seed: int) -> bool:
    kept, rng = Cache(folder, 1 << 60), np.random.default_rng(seed)
    whole = True
    for i in rng.integers(0, 20, 300):
        image = kept.load(str(i), lambda i=i: np.full((30, 40, 3), i, np.uint8))
        whole &= image.shape == (30, 40, 3) and bool((image == i).all())
        if rng.random() < 0.3:
            for path in list(folder.iterdir())[:1]:
                path.unlink(missing_ok=True)
    return whole


def test_many_at_once_see_whole_images_only(tmp_path):
    with get_context('fork').Pool(3) as pool:
        assert all(pool.starmap(hammer, [(tmp_path, seed) for seed in range(3)]))
