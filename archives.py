"""Archives of data sets: download with resume, verification and unpacking that stays inside its folder."""

import hashlib
import http.client
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

CHUNK = 1 << 20  # bytes
ATTEMPTS = 5  # connections in a row that bring nothing new before a download is given up
WAIT = 2.0  # seconds before the next attempt


class DataError(ValueError):
    """Something about the data set is not as it must be; the message is one line that names it."""


def fetch(url: str, md5: str, folder: Path) -> Path:
    """Download a file into a folder, going on where an earlier attempt stopped, and verify it.

    Args:
        url: http or https; the last part of its path is the file's name.
        md5: hexadecimal digest of the whole file. A file of that name and digest is not downloaded again.
        folder: made if need be. While incomplete the file is called <name>.part.

    Raises:
        DataError: the server cannot be reached or refuses, the disk is full, or the digest differs.
    """
    path = folder / url.rsplit('/', 1)[-1]
    part = path.with_name(path.name + '.part')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _download(url, part)
            part.rename(path)
    except OSError as error:
        raise DataError(
            f'{error.filename or part}: cannot be written ({error.strerror}); free some space and try again'
        ) from error
    actual = md5_of(path)
    if actual != md5:
        path.unlink()
        raise DataError(f'{url}: its md5 is {actual}, not {md5}; the file was deleted, try again or report the change')
    return path


def _download(url: str, part: Path) -> None:
    """Bring `part` to the length that the server announces, over as many connections as bring something new."""
    failures, reason = 0, ''
    with tqdm(desc=part.stem, unit='B', unit_scale=True, disable=None) as bar:
        while failures < ATTEMPTS:
            have = part.stat().st_size if part.exists() else 0
            try:
                request = urllib.request.Request(url, headers={'Range': f'bytes={have}-'} if have else {})
                with urllib.request.urlopen(request, timeout=60) as response:
                    if have and response.status != 206:  # this server begins again
                        have = 0
                    total = have + int(response.headers['Content-Length'])
                    bar.total, bar.n = total, have
                    with open(part, 'ab' if have else 'wb') as file:
                        while block := response.read(CHUNK):
                            file.write(block)
                            bar.update(len(block))
                if part.stat().st_size >= total:
                    return
                reason = 'the connection was cut'
            except urllib.error.HTTPError as error:
                if error.code == 416 and have:  # nothing after what we have: it is whole
                    return
                raise DataError(f'{url}: the server answers {error.code} {error.reason}') from error
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
                reason = str(getattr(error, 'reason', error)) or type(error).__name__
            gained = part.exists() and part.stat().st_size > have
            failures = 0 if gained else failures + 1
            time.sleep(WAIT)
    raise DataError(f'{url}: cannot be fetched ({reason}); the same command goes on from what is there')


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
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f'{archive}: damaged ({error})') from error
    except OSError as error:
        raise DataError(f'{error.filename or folder}: cannot be written ({error.strerror})') from error
