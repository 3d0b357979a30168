"""Archives of data sets: resumable download, verification, and unpacking that stays inside its folder."""

import errno
import gzip
import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from common.errors import DataError
from common.runs import fcntl

CHUNK = 1 << 20  # bytes
ATTEMPTS = 5  # connections in a row without new data, after which a download fails
WAIT = 2.0  # seconds before the next attempt


def prepare_tree(archives: list[tuple[str, str]], top: str, target: Path) -> None:
    """Download, verify and unpack archives; an interrupted download is resumed.

    Args:
        archives: (url, md5) pairs.
        top: the folder in the archives that holds the tree; the target has its content, without the folder. May be
            missing.
        target: appears only when the tree is complete; one that exists already is left as it is.

    Raises:
        DataError: another process prepares the same tree, or a step fails.
    """
    staging, downloads = target.with_name(f'{target.name}.partial'), target.parent / 'downloads'
    try:
        if target.is_symlink() and not target.exists():
            raise DataError(f'{target}: a link to {os.readlink(target)}, which is not there')
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            return
        downloads.mkdir(parents=True, exist_ok=True)
        with open(downloads / f'{target.name}.lock', 'w') as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            paths = [fetch(url, md5, downloads) for url, md5 in archives]
            if staging.exists():  # of an interrupted attempt
                shutil.rmtree(staging)
            for path in paths:
                print(f'unpacking {path}', file=sys.stderr)
                unpack(path, staging)
            inner = staging / top
            if inner != staging and inner.is_dir():  # data/dtd/images, not data/dtd/dtd/images
                for path in list(inner.iterdir()):
                    path.rename(staging / path.name)
                inner.rmdir()
            staging.rename(target)
        (downloads / f'{target.name}.lock').unlink()
    except BlockingIOError as error:
        raise DataError(f'{target}: is being prepared by another process') from error
    except OSError as error:
        raise DataError(f'{error.filename or target.parent}: cannot be made ({error.strerror or error})') from error


def fetch(url: str, md5: str, folder: Path) -> Path:
    """Download a file into a folder, resuming an earlier attempt, and verify it.

    Args:
        url: http or https; the last part of its path is the file's name.
        md5: hexadecimal digest of the file; a file with this digest in the folder is not downloaded again.
        folder: created if missing. An incomplete file is called <name>.part.

    Raises:
        DataError: the server cannot be reached or refuses, the disk is full, or the digest differs.
    """
    path = folder / url.rsplit('/', 1)[-1]
    part = path.with_name(path.name + '.part')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and md5_of(path) != md5:
            damaged = path.with_name(path.name + '.damaged')
            print(f'{path}: its md5 is not {md5}; kept as {damaged} and downloaded again', file=sys.stderr)
            path.rename(damaged)
        if not path.exists():
            _download(url, part)
            if (actual := md5_of(part)) != md5:
                part.unlink()
                raise DataError(f'{url}: its md5 is {actual}, not {md5}; the file was deleted, try again or report it')
            part.rename(path)
    except OSError as error:
        raise DataError(_disk_problem(error, part)) from error
    return path


def _disk_problem(error: OSError, path: Path) -> str:
    advice = '; free some space and try again' if error.errno in (errno.ENOSPC, errno.EDQUOT) else ''
    return f'{error.filename or path}: cannot be written ({error.strerror or error}){advice}'


class _NetworkError(Exception):
    """The connection failed; another attempt may succeed."""


def _download(url: str, part: Path) -> None:
    """Download until `part` has the length that the server announces, over as many connections as it takes."""
    failures, reason = 0, ''
    most = part.stat().st_size if part.exists() else 0
    with tqdm(desc=part.stem, unit='B', unit_scale=True, disable=None) as bar:
        while failures < ATTEMPTS:
            try:
                if _receive(url, part, bar):
                    return
                reason = 'the connection was cut'
            except _NetworkError as error:
                reason = str(error)
            held = part.stat().st_size if part.exists() else 0
            failures = 0 if held > most else failures + 1
            most = max(most, held)
            time.sleep(WAIT)
    raise DataError(f'{url}: cannot be downloaded ({reason}); the same command resumes it')


def _receive(url: str, part: Path, bar: tqdm) -> bool:
    """Download from where `part` ends, over one connection; True if `part` is complete then.

    Raises:
        _NetworkError: the connection failed. DataError: the server refuses this file. OSError: of the disk.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={'Range': f'bytes={have}-'} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # `part` is complete
            return True
        problem = f'the server answers {error.code} {" ".join(str(error.reason).split())}'
        if error.code in (408, 429) or error.code >= 500:
            raise _NetworkError(problem) from error
        raise DataError(f'{url}: {problem}') from error
    except (OSError, http.client.HTTPException) as error:
        raise _NetworkError(_network_problem(error)) from error
    with response:
        length = response.headers['Content-Length']
        if have and not (response.headers['Content-Range'] or '').startswith(f'bytes {have}-'):
            # This server starts from the beginning. A reply shorter than `part` is another file, such as a login page.
            if length and int(length) < have:
                raise DataError(
                    f'{url}: the server sends {length} bytes in all, but {part} has {have} already; delete it if it '
                    'is of another file'
                )
            have = 0
        bar.total, bar.n = have + int(length) if length else None, have
        with open(part, 'ab' if have else 'wb') as file:
            while block := _read(response):
                file.write(block)
                bar.update(len(block))
    return bar.total is None or part.stat().st_size >= bar.total


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(CHUNK)  # what has arrived, so that nothing is lost when the connection breaks
    except (OSError, http.client.HTTPException) as error:
        raise _NetworkError(_network_problem(error)) from error


def _network_problem(error: Exception) -> str:
    return ' '.join(str(getattr(error, 'reason', error)).split()) or type(error).__name__


def md5_of(path: Path) -> str:
    digest = hashlib.md5()
    with open(path, 'rb') as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar, compressed or not, or a zip; any other file is copied.

    Raises:
        DataError: the archive is damaged, has a member that points outside the folder, or does not fit on the disk.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive, 'r:*') as tar:
                tar.extractall(folder, filter='data')
        elif zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                root = folder.resolve()
                for name in file.namelist():
                    if not (root / name).resolve().is_relative_to(root):
                        raise DataError(f'{archive}: refused, its member {name} points outside')
                file.extractall(folder)
        elif archive.suffix == '.mat':
            shutil.copy(archive, folder)
        else:
            raise DataError(f'{archive}: neither a tar nor a zip archive')
    except tarfile.FilterError as error:
        raise DataError(
            f'{archive}: refused, its member {error.tarinfo.name} points outside or is no plain file'
        ) from error
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f'{archive}: damaged ({error})') from error
    except OSError as error:
        raise DataError(_disk_problem(error, folder)) from error
