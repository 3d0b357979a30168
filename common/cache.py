"""A cache of decoded images, shared between epochs and between all runs on this machine. No torch.

Each image is a file: height and width as two little-endian 32-bit integers, then height * width RGB pixels. Its name is
a digest of its source, so a changed source is another file. Files are written atomically; any number of runs may read
and write at once. What does not fit is decoded each time.

    ram    in the memory of the machine (/dev/shm); the last run that uses it empties it, unless it is killed
    disk   in the user's cache folder, permanently
    none   no cache
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

from common.errors import CacheError
from common.runs import fcntl

VERSION = f'2 {PILLOW}'  # increase the number when the same source gives other pixels
SHARED_MEMORY = Path('/dev/shm')
RESERVE = 2**30  # bytes of it that are never used: all of it, in a container with 64 MB
OLD_LIMIT = 'memory.limit_in_bytes'  # of cgroups version 1
USERS = '.users'  # every process that uses a cache in ram holds a shared lock on it
HEADER = 8  # bytes


class Cache(NamedTuple):
    """A folder of decoded images."""

    folder: Path
    limit: int  # bytes in use on its file system above which no image is added

    def load(self, source: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The image made from `source`, a text that changes whenever make() would return something else.

        Returns:
            (H, W, 3) uint8; changes to it stay in this process.

        Raises:
            CacheError: the folder cannot be written for a reason other than a full disk.
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
            if shutil.disk_usage(self.folder).used + image.nbytes > self.limit:
                return
            with open(temporary, 'wb') as file:
                file.write(np.array(image.shape[:2], '<u4').tobytes())
                file.write(image.tobytes())
                file.flush()
                os.fsync(file.fileno())  # or a crash of the machine may leave zeros; free in memory
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT):  # full disk; folder removed by the user
                raise CacheError(f'{path}: cannot be written ({error.strerror}); --cache none avoids it') from error


def _read(path: Path) -> np.ndarray | None:
    """The image in a file, memory-mapped; None for a missing or truncated file."""
    try:
        with open(path, 'rb') as file:
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
    except (OSError, ValueError):  # missing or unreadable; empty
        return None
    height, width = data[:HEADER].view('<u4').tolist() if len(data) > HEADER else (0, 0)
    whole = len(data) == HEADER + height * width * 3 > HEADER
    return data[HEADER:].reshape(height, width, 3) if whole else None


def open_cache(kind: str) -> Cache | None:
    """The cache of this user on this machine, None for 'none'; this process is registered as a user until it ends.

    Raises:
        CacheError: its folder cannot be made or belongs to another user.
    """
    if kind == 'none':
        return None
    in_memory = kind == 'ram' and os.access(SHARED_MEMORY, os.W_OK)
    if in_memory:
        folder = SHARED_MEMORY / f'twistnet-{os.getuid()}'
    elif kind == 'ram':  # a system without /dev/shm
        folder = Path(tempfile.gettempdir()) / f'twistnet-{os.getuid()}'
    else:
        folder = Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')) / 'twistnet'
        if not folder.is_absolute():
            raise CacheError('--cache disk: there is no home directory; set XDG_CACHE_HOME to a folder')
    try:
        if folder.is_symlink() and not folder.exists():
            raise CacheError(f'{folder}: a link to {os.readlink(folder)}, which is not there')
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A link of the user is followed; one in /dev/shm may be another user's.
        if not stat.S_ISDIR(folder.stat().st_mode) or {folder.lstat().st_uid, folder.stat().st_uid} != {os.getuid()}:
            raise CacheError(f'{folder}: belongs to another user; --cache none avoids it')
        if kind == 'ram':
            _register(folder)
        total = shutil.disk_usage(folder).total
    except OSError as error:
        raise CacheError(f'{folder}: cannot be made ({error.strerror}); --cache none avoids it') from error
    # Loader processes pass batches through /dev/shm too, and files there count as memory of the processes.
    return Cache(folder, min(max(0, total - RESERVE) // 2, memory() // 4) if in_memory else total - total // 10)


_users: dict[Path, object] = {}  # open lock files, by folder


def _register(folder: Path) -> None:
    """Register this process as a user of a folder; the last user empties it at its end."""
    if folder in _users:
        return
    file = open(folder / USERS, 'a')  # noqa: SIM115
    fcntl.flock(file, fcntl.LOCK_SH)  # waits while the last user empties it
    _users[folder] = file
    atexit.register(_unregister, folder, os.getpid())


def _unregister(folder: Path, owner: int) -> None:
    if os.getpid() != owner:  # a forked child
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
    """Bytes of memory that this process may use: the machine's, or the limit of a container or scheduler."""
    sizes = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
    groups = ['0::/', '1:memory:/']
    with contextlib.suppress(OSError):  # a system without cgroups
        groups += Path('/proc/self/cgroup').read_text().splitlines()
    for group in groups:
        _, controllers, name = group.split(':', 2)
        root, limit = ('/sys/fs/cgroup', 'memory.max') if not controllers else ('/sys/fs/cgroup/memory', OLD_LIMIT)
        path = Path(root + name)
        while path.is_relative_to(root):  # the limits of all enclosing groups apply
            with contextlib.suppress(OSError, ValueError):  # no such file; 'max'
                sizes.append(int((path / limit).read_text()))
            path = path.parent
    return min(sizes)
