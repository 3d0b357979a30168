"""Trees of the five benchmarks in exactly the layout of their archives, with the stray files these hold.

Sizes are the full ones unless a test asks for fewer; images are tiny, or empty where a test opens none.
"""

import io
import itertools
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

# What each archive unpacks to, by key: the folder inside the tree, '' where the archive has no top folder.
TOP = {'dtd': 'dtd', 'fmd': '', 'kth_tips2': 'KTH-TIPS2-b', 'cub200': 'CUB_200_2011', 'flowers102': ''}
_numbers = itertools.count()


def image_bytes(kind: str, grey: bool = False) -> bytes:
    """An image that no other call gives: 16 x 16, JPEG or PNG."""
    pixels = np.random.default_rng(next(_numbers)).integers(0, 256, (16, 16) if grey else (16, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=95)
    return buffer.getvalue()


def put(path: Path, data: bytes = b'') -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def picture(path: Path, empty: bool) -> None:
    put(path, b'' if empty else image_bytes('PNG' if path.suffix == '.png' else 'JPEG'))


def dtd(root: Path, classes: int = 47, each: int = 120, empty: bool = False) -> None:
    lists = {f'{subset}{fold}': [] for subset in ('train', 'val', 'test') for fold in range(1, 11)}
    for c in range(classes):
        name = f'texture{c:02d}'
        files = [f'{name}/{name}_{i:04d}.jpg' for i in range(each)]
        for file in files:
            picture(root / 'dtd' / 'images' / file, empty)
        for fold, (s, subset) in itertools.product(range(1, 11), enumerate(('train', 'val', 'test'))):
            lists[f'{subset}{fold}'] += [f for i, f in enumerate(files) if (i + fold) % 3 == s]
    put(root / 'dtd' / 'images' / 'texture00' / '.directory')
    put(root / 'dtd' / 'imdb' / 'imdb.mat')
    for name, lines in lists.items():
        put(root / 'dtd' / 'labels' / f'{name}.txt', '\n'.join(lines).encode() + b'\n')


def fmd(root: Path, classes: int = 10, each: int = 100, empty: bool = False) -> None:
    for c in range(classes):
        for i in range(each):
            for folder in ('image', 'mask'):
                picture(root / folder / f'material{c}' / f'material{c}_moderate_{i + 1:03d}_new.jpg', empty)
        put(root / 'image' / f'material{c}' / 'Thumbs.db', b'x')
    for stray in ('demo.m', 'demo.asv', 'README.txt'):
        put(root / stray, b'x')


def kth_tips2(root: Path, classes: int = 11, each: int = 108, empty: bool = False) -> None:
    for c in range(classes):
        for number, sample in zip((22, 23, 24, 25), 'abcd'):
            folder = root / 'KTH-TIPS2-b' / f'stuff_{c:02d}' / f'sample_{sample}'
            for i in range(each):
                picture(folder / f'{number}{sample}-scale_{i // 12 + 2}_im_{i % 12 + 1}_col.png', empty)
            put(folder / 'notes.txt', b'x')
    put(root / 'KTH-TIPS2-b' / 'kth-tips2.pdf', b'x')


def cub200(root: Path, classes: int = 200, train: int = 5994, test: int = 5794, empty: bool = False) -> None:
    base, rows = root / 'CUB_200_2011', {'images': [], 'image_class_labels': [], 'train_test_split': []}
    names = [f'{c + 1:03d}.Bird_{c + 1}' for c in range(classes)]
    number = 0
    for total, flag in ((train, 1), (test, 0)):
        for i in range(total):
            c, number = i % classes, number + 1
            file = f'{names[c]}/Bird_{c + 1}_{number:04d}_{700000 + number}.jpg'
            picture(base / 'images' / file, empty)
            for table, value in (('images', file), ('image_class_labels', c + 1), ('train_test_split', flag)):
                rows[table].append(f'{number} {value}\n')
    for table, lines in rows.items():
        put(base / f'{table}.txt', ''.join(lines).encode())
    put(base / 'classes.txt', ''.join(f'{i + 1} {name}\n' for i, name in enumerate(names)).encode())
    put(base / 'README', b'x')
    put(base / 'attributes' / 'certainties.txt', b'x')
    put(root / 'attributes.txt', b'x')  # the archive has it beside the folder


def flowers102(root: Path, classes: int = 102, test: int = 6149, empty: bool = False) -> None:
    labels = [c for c in range(1, classes + 1) for _ in range(20)] + [i % classes + 1 for i in range(test)]
    ids = {'trnid': [], 'valid': [], 'tstid': list(range(20 * classes + 1, len(labels) + 1))}
    for number in range(1, 20 * classes + 1):
        ids['trnid' if number % 20 < 10 else 'valid'].append(number)
    for number in range(1, len(labels) + 1):
        picture(root / 'jpg' / f'image_{number:05d}.jpg', empty)
    savemat(root / 'imagelabels.mat', {'labels': np.array([labels], np.uint8)})
    savemat(root / 'setid.mat', {name: np.array([numbers], np.uint16) for name, numbers in ids.items()})


MAKE = {'dtd': dtd, 'fmd': fmd, 'kth_tips2': kth_tips2, 'cub200': cub200, 'flowers102': flowers102}
# The same layouts with few images: enough for every fold.
SMALL = {
    'dtd': dict(classes=3, each=12),
    'fmd': dict(classes=3, each=10),
    'kth_tips2': dict(classes=2, each=12),
    'cub200': dict(classes=3, train=36, test=12),
    'flowers102': dict(classes=3, test=12),
}
# (images, classes) of the small trees.
SMALL_SIZE = {'dtd': (36, 3), 'fmd': (30, 3), 'kth_tips2': (96, 2), 'cub200': (48, 3), 'flowers102': (72, 3)}
