"""Archives of data sets: download with a check of the MD5, and unpacking that stays inside its folder."""

import contextlib
import shutil
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from common.errors import DataError


def prepare_tree(archives: list[tuple[str, str]], top: str, target: Path) -> None:
    """Download, verify and unpack archives.

    Args:
        archives: (url, md5) pairs.
        top: the folder in the archives that holds the tree; where there is none, all of the archives is the tree.
        target: appears only when the tree is complete; one that exists already, and is not empty, is left as it is.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        return
    downloads = target.parent / 'downloads'
    downloads.mkdir(parents=True, exist_ok=True)
    paths = [fetch(url, md5, downloads) for url, md5 in archives]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f'.{target.name}-') as staging:
        tree = Path(staging, 'tree')
        for path in paths:
            print(f'unpacking {path}', file=sys.stderr)
            unpack(path, tree)
        (tree / top if (tree / top).is_dir() else tree).rename(target)


def fetch(url: str, md5: str, folder: Path) -> Path:
    """Download a file into a folder; one that is there already, with this MD5, is taken as it is."""
    from torchvision.datasets.utils import download_url  # here, because it imports torch

    path = folder / url.rsplit('/', 1)[-1]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # some versions print what they download
            download_url(url, folder, md5=md5)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f'{url}: cannot be downloaded ({error}); try again, or put the file there yourself as {path}; md5 {md5}'
        ) from error
    return path


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar, compressed or not, or a zip; any other file is copied."""
    folder.mkdir(parents=True, exist_ok=True)
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive, 'r:*') as tar:
            tar.extractall(folder, filter='data')  # raises FilterError for a member that points outside
    elif zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)  # keeps all members inside
    else:
        shutil.copy(archive, folder)
