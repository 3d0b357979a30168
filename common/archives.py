"""Archives of data sets: download with resume, verification and unpacking that stays inside its folder."""

import errno
import gzip
import hashlib
import http.client
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

CHUNK = 1 << 20  # bytes
ATTEMPTS = 5  # connections in a row that bring nothing new before a download is given up
WAIT = 2.0  # seconds before the next attempt


def fetch(url: str, md5: str, folder: Path) -> Path:
    """Download a file into a folder, going on where an earlier attempt stopped, and verify it.

    Args:
        url: http or https; the last part of its path is the file's name.
        md5: hexadecimal digest of the whole file; one that is there already, whoever put it there, is not downloaded.
        folder: made if need be. While incomplete the file is called <name>.part.

    Raises:
        DataError: the server cannot be reached or refuses, the disk is full, or the digest differs.
    """
    path = folder / url.rsplit('/', 1)[-1]
    part = path.with_name(path.name + '.part')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and md5_of(path) != md5:
            damaged = path.with_name(path.name + '.damaged')
            print(f'{path}: its md5 is not {md5}; kept as {damaged} and fetched again', file=sys.stderr)
            path.rename(damaged)
        if not path.exists():
            _download(url, part)
            if (actual := md5_of(part)) != md5:
                part.unlink()
                raise DataError(f'{url}: its md5 is {actual}, not {md5}; what came was deleted, try again or report it')
            part.rename(path)
    except OSError as error:
        raise DataError(_disk_words(error, part)) from error
    return path


def _disk_words(error: OSError, path: Path) -> str:
    advice = '; free some space and try again' if error.errno in (errno.ENOSPC, errno.EDQUOT) else ''
    return f'{error.filename or path}: cannot be written ({error.strerror or error}){advice}'


class _CutError(Exception):
    """The network failed; another attempt may not."""


def _download(url: str, part: Path) -> None:
    """Bring `part` to the length that the server announces, over as many connections as bring something new."""
    failures, reason = 0, ''
    most = part.stat().st_size if part.exists() else 0
    with tqdm(desc=part.stem, unit='B', unit_scale=True, disable=None) as bar:
        while failures < ATTEMPTS:
            try:
                if _receive(url, part, bar):
                    return
                reason = 'the connection was cut'
            except _CutError as error:
                reason = str(error)
            held = part.stat().st_size if part.exists() else 0
            failures = 0 if held > most else failures + 1
            most = max(most, held)
            time.sleep(WAIT)
    raise DataError(f'{url}: cannot be fetched ({reason}); the same command goes on from what is there')


def _receive(url: str, part: Path, bar: tqdm) -> bool:
    """One connection, from where `part` ends; True if `part` is whole then. An OSError is the disk's.

    Raises:
        _CutError: of the network. DataError: the server will not give this file.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={'Range': f'bytes={have}-'} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing after what we have
            return True
        words = f'the server answers {error.code} {" ".join(str(error.reason).split())}'
        if error.code in (408, 429) or error.code >= 500:
            raise _CutError(words) from error
        raise DataError(f'{url}: {words}') from error
    except (OSError, http.client.HTTPException) as error:
        raise _CutError(_network_words(error)) from error
    with response:
        length = response.headers['Content-Length']
        if have and not (response.headers['Content-Range'] or '').startswith(f'bytes {have}-'):
            # This server begins again. A reply shorter than what we have is not this file; a login page, say.
            if length and int(length) < have:
                raise DataError(
                    f'{url}: the server sends {length} bytes in all, where {have} are here already; if {part} is of '
                    'another file, delete it'
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
        return response.read1(CHUNK)  # what has arrived: nothing of it is lost when the connection breaks
    except (OSError, http.client.HTTPException) as error:
        raise _CutError(_network_words(error)) from error


def _network_words(error: Exception) -> str:
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
        raise DataError(_disk_words(error, folder)) from error
