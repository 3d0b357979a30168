"""Decoded images, kept between epochs and shared by all runs on this machine. No torch.

An image is a file of its own: height and width as two little-endian 32-bit integers, then height * width RGB pixels.
Its name is a digest of what it was made from, so a changed source is another file. Files appear whole or not at all;
any number of runs may read and write at once. What no longer fits is made anew each time.

    ram    in the memory of the machine (/dev/shm); the last run that uses it empties it, unless it is killed
    disk   in the user's cache folder, for good
    none   nowhere
"""

import atexit
import contextlib
import errno
import hashlib
import mmap
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import __version__ as PILLOW

from locks import fcntl
from runs import RunError

VERSION = f'2 {PILLOW}'  # raise the number whenever the same source is to give other pixels
SHARED_MEMORY = Path('/dev/shm')
RESERVE = 2**30  # bytes of it that are always left to others: all, in a container of 64 MB
OLD_LIMIT = 'memory.limit_in_bytes'  # of cgroups of version 1
USERS = '.users'  # locked, shared, by every process that uses a cache in ram
HEADER = 8  # bytes


class CacheError(RunError):
    """The cache cannot be used on this machine; the message is one line that says why."""


class Cache(NamedTuple):
    """A folder of decoded images."""

    folder: Path
    most: int  # bytes that its file system may hold, of anything, after another image is added

    def load(self, source: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The image made from `source`, a text that changes whenever make() would return something else.

        Returns:
            (H, W, 3) uint8; what is written to it stays in this process.

        Raises:
            CacheError: the folder cannot be written, for a reason other than want of room.
        """
        path = self.folder / hashlib.sha256(f'{VERSION} {source}'.encode(errors='surrogateescape')).hexdigest()[:32]
        image = _read(path)
        if image is None:
            image = make()
            self._write(path, image)
        return image

    def _write(self, path: Path, image: np.ndarray) -> None:
        temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex}.tmp')
        try:
            if shutil.disk_usage(self.folder).used + image.nbytes > self.most:
                return
            with open(temporary, 'wb') as file:
                file.write(np.array(image.shape[:2], '<u4').tobytes())
                file.write(image.tobytes())
                file.flush()
                os.fsync(file.fileno())  # a crash of the machine must not leave a file of zeros; free in memory
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT):  # full; emptied by the user
                raise CacheError(f'{path}: cannot be written ({error.strerror}); --cache none does without') from error


def _read(path: Path) -> np.ndarray | None:
    """The image in a file, not yet read from the disk; None where there is none, or a torn one."""
    try:
        with open(path, 'rb') as file:
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
    except (OSError, ValueError):  # none, or not to be read; empty
        return None
    height, width = data[:HEADER].view('<u4').tolist() if len(data) > HEADER else (0, 0)
    whole = len(data) == HEADER + height * width * 3 > HEADER
    return data[HEADER:].reshape(height, width, 3) if whole else None


def open_cache(kind: str) -> Cache | None:
    """The cache of this user on this machine; this process counts as a user of it until it ends. None for 'none'.

    Raises:
        CacheError: its folder cannot be made or belongs to somebody else.
    """
    if kind == 'none':
        return None
    in_memory = kind == 'ram' and os.access(SHARED_MEMORY, os.W_OK)
    if in_memory:
        folder = SHARED_MEMORY / f'twistnet-{os.getuid()}'
    elif kind == 'ram':  # a system without it keeps small files of the temporary folder in memory, if it can
        folder = Path(tempfile.gettempdir()) / f'twistnet-{os.getuid()}'
    else:
        folder = Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')) / 'twistnet'
        if not folder.is_absolute():
            raise CacheError('--cache disk: there is no home directory; set XDG_CACHE_HOME to a folder')
    try:
        if folder.is_symlink() and not folder.exists():
            raise CacheError(f'{folder}: a link to {os.readlink(folder)}, which is not there')
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The user may keep it elsewhere, by a link of their own; /dev/shm is everybody's to put links into.
        if not stat.S_ISDIR(folder.stat().st_mode) or {folder.lstat().st_uid, folder.stat().st_uid} != {os.getuid()}:
            raise CacheError(f'{folder}: belongs to somebody else; --cache none does without')
        if kind == 'ram':
            _join(folder)
        total = shutil.disk_usage(folder).total
    except OSError as error:
        raise CacheError(f'{folder}: cannot be made ({error.strerror}); --cache none does without') from error
    # Loader processes hand over batches in /dev/shm too, and what lies there counts as memory of its makers.
    return Cache(folder, min(max(0, total - RESERVE) // 2, memory() // 4) if in_memory else total - total // 10)


_users: dict[Path, object] = {}  # open lock files, by folder


def _join(folder: Path) -> None:
    """Count this process among the users of a folder; the last one to leave empties it."""
    if folder in _users:
        return
    file = open(folder / USERS, 'a')  # noqa: SIM115
    fcntl.flock(file, fcntl.LOCK_SH)  # waits while another process, the last one, empties it
    _users[folder] = file
    atexit.register(_leave, folder, os.getpid())


def _leave(folder: Path, owner: int) -> None:
    if os.getpid() != owner:  # a child of the user
        return
    file = _users.pop(folder)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # others use it
        return
    with contextlib.suppress(FileNotFoundError):  # the user has removed the folder
        for path in list(folder.iterdir()):
            if path.name != USERS:
                path.unlink(missing_ok=True)


def memory() -> int:
    """Bytes of memory that this process may use: the machine's, or less where a container or a scheduler says so."""
    sizes = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
    groups = ['0::/', '1:memory:/']
    with contextlib.suppress(OSError):  # a system without cgroups
        groups += Path('/proc/self/cgroup').read_text().splitlines()
    for group in groups:
        _, controllers, name = group.split(':', 2)
        root, limit = ('/sys/fs/cgroup', 'memory.max') if not controllers else ('/sys/fs/cgroup/memory', OLD_LIMIT)
        path = Path(root + name)
        while path.is_relative_to(root):  # the limits of all groups around it hold
            with contextlib.suppress(OSError, ValueError):  # no such file; 'max'
                sizes.append(int((path / limit).read_text()))
            path = path.parent
    return min(sizes)
