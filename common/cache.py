"""A cache of decoded images, shared between epochs and between all runs on this machine. No torch.

Each image is a file: height and width as two little-endian 32-bit integers, then height * width RGB pixels, which numpy
maps five times as fast as an .npy file. Its name is a digest of its source, so a changed source is another file. Any
number of runs may read, write and remove files at once, as they are written atomically and an image that is not there
is decoded. What does not fit is decoded each time; a cache that is full is emptied by the next run.

    ram    in the memory of the machine (/dev/shm), until that is restarted or the folder removed
    disk   in the user's cache folder
    none   no cache
"""

import contextlib
import hashlib
import mmap
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import __version__ as PILLOW

from common.errors import CacheError
from common.machine import memory

VERSION = f'3 {PILLOW}'  # increase the number when the same source gives other pixels
SHARED_MEMORY = Path('/dev/shm')
RESERVE = 2**30  # bytes of it that are never used: all of it, in a container with 64 MB
SLACK = 2**26  # bytes below the limit from which a cache is full
SUFFIX = '.rgb'
HEADER = 8  # bytes


class Cache(NamedTuple):
    """A folder of decoded images."""

    folder: Path
    limit: int  # bytes in use on its file system above which no image is added

    def load(self, source: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """make(), (H, W, 3) uint8, kept under `source`, a text that changes whenever it would return something else.

        The array is the caller's own: changes to it stay in this process.
        """
        digest = hashlib.sha256(f'{VERSION} {source}'.encode(errors='surrogateescape')).hexdigest()[:32]
        path = self.folder / f'{digest}{SUFFIX}'
        image = _read(path)
        if image is None:
            image = make()
            self._write(path, image)
        return image

    def _write(self, path: Path, image: np.ndarray) -> None:
        """Write a file atomically, or none where it does not fit or the disk refuses."""
        temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex}')
        try:
            if shutil.disk_usage(self.folder).used + image.nbytes > self.limit:
                return
            with open(temporary, 'wb') as file:
                file.write(np.array(image.shape[:2], '<u4').tobytes())
                file.write(image.tobytes())
                file.flush()
                os.fsync(file.fileno())  # or a crash of the machine may leave zeros; free in memory
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()


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
    """The cache of this user on this machine, emptied if it was full; None for 'none'."""
    if kind == 'none':
        return None
    in_memory = kind == 'ram' and os.access(SHARED_MEMORY, os.W_OK)  # some systems have no /dev/shm
    if kind == 'ram':
        folder = Path(SHARED_MEMORY if in_memory else tempfile.gettempdir(), f'twistnet-{os.getuid()}')
    else:
        folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'twistnet')
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f'--cache {kind}: {error}; --cache none avoids it') from error
    # A link of the user is followed; one in /dev/shm may be another user's.
    if {folder.lstat().st_uid, folder.stat().st_uid} != {os.getuid()}:
        raise CacheError(f'--cache {kind}: {folder} belongs to another user; --cache none avoids it')
    usage = shutil.disk_usage(folder)
    # Loader processes pass batches through /dev/shm too, and files there count as memory of the processes.
    limit = min(max(0, usage.total - RESERVE) // 2, memory() // 4) if in_memory else usage.total - usage.total // 10
    if usage.used > limit - SLACK:
        for path in folder.glob(f'*{SUFFIX}*'):
            path.unlink(missing_ok=True)
    return Cache(folder, limit)
