"""Procedural textures of which it is known at which displacements grey levels co-occur.

Every image of every class has the same histogram of grey levels, a flat one, so that no first-order statistic tells the
classes apart. Streaks have an orientation and a period; brick, cells, dots and weave are structures.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 128  # pixels, side of an image
PER_CLASS = 50

# (orientation of the streaks in degrees, period across them in pixels): the displacement along which grey levels
# co-occur, in the convention of models.DIRECTIONS (dy down), so that 45 means streaks along (dy, dx) = (1, 1).
_STREAKS = {
    f'streak{angle:03d}_period{period:02d}': (angle, period) for period in (7, 12) for angle in (0, 45, 90, 135)
}
CLASSES = sorted([*_STREAKS, 'brick', 'cells', 'dots', 'weave'])


@lru_cache(maxsize=1024)  # 16 MiB
def draw(cls: str, index: int) -> np.ndarray:
    """Texture `index` of a class, a function of the two alone.

    Returns:
        (SIZE, SIZE) uint8.
    """
    key = hashlib.sha256(f'{cls}/{index}'.encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(key[:8], 'little')))
    field = _streaks(rng, *_STREAKS[cls]) if cls in _STREAKS else _STRUCTURES[cls](rng)
    field = field / field.std() + 2 * rng.standard_normal(field.shape)
    levels = np.empty(field.size, np.uint8)
    levels[np.argsort(field, axis=None, kind='stable')] = np.arange(field.size) * 256 // field.size
    levels = levels.reshape(field.shape)
    levels.flags.writeable = False  # the cache hands the same array to every caller
    return levels


def _grid(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates (y, x) with a random origin, each (SIZE, SIZE)."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(float)
    return y + rng.uniform(0, 1000), x + rng.uniform(0, 1000)


def _streaks(rng: np.random.Generator, angle: float, period: float) -> np.ndarray:
    """Noise with its energy around one spatial frequency: streaks along `angle` degrees, `period` pixels apart."""
    fy, fx = np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE), indexing='ij')
    angle = np.deg2rad(angle + rng.uniform(-8, 8))
    along = fx * np.cos(angle) + fy * np.sin(angle)
    across = -fx * np.sin(angle) + fy * np.cos(angle)
    centre = 1 / (period * rng.uniform(0.9, 1.1))
    energy = np.exp(-((along / 0.02) ** 2) - ((np.abs(across) - centre) / (0.2 * centre)) ** 2)
    return np.fft.ifft2(np.fft.fft2(rng.standard_normal(fy.shape)) * energy).real


def _weave(rng: np.random.Generator) -> np.ndarray:
    y, x = _grid(rng)
    period = rng.uniform(12, 16)
    over = (np.floor(x / period) + np.floor(y / period)) % 2 == 0
    return np.where(over, np.abs(np.sin(np.pi * x / period)), np.abs(np.sin(np.pi * y / period)))


def _brick(rng: np.random.Generator) -> np.ndarray:
    y, x = _grid(rng)
    height = rng.uniform(10, 14)
    row = np.floor(y / height)
    shade = rng.uniform(0, 1, (400, 400))
    column = np.floor((x + row % 2 * height) / (2 * height))
    joint = (y % height < 2) | ((x + row % 2 * height) % (2 * height) < 2)
    return np.where(joint, -1.0, 0.5 * shade[row.astype(int) % 400, column.astype(int) % 400])


def _nearest(rng: np.random.Generator, period: float, jitter: float) -> tuple[np.ndarray, np.ndarray]:
    """Distances of every pixel to the nearest and second nearest point of a jittered lattice."""
    from scipy.spatial import KDTree  # slow to import

    count = int(SIZE / period) + 4
    points = np.stack(np.mgrid[:count, :count], -1).reshape(-1, 2) + rng.uniform(-jitter, jitter, (count**2, 2))
    pixels = np.stack(np.mgrid[:SIZE, :SIZE], -1)
    distances, _ = KDTree((points - 1.5 + rng.uniform(0, 1, 2)) * period).query(pixels, k=2)
    return distances[..., 0], distances[..., 1]


def _cells(rng: np.random.Generator) -> np.ndarray:
    first, second = _nearest(rng, rng.uniform(13, 17), 0.45)
    return np.minimum(second - first, 5)


def _dots(rng: np.random.Generator) -> np.ndarray:
    period = rng.uniform(11, 15)
    first, _ = _nearest(rng, period, 0.2)
    return -np.minimum(first, 0.4 * period)


_STRUCTURES = {'weave': _weave, 'brick': _brick, 'cells': _cells, 'dots': _dots}


def write_sheet(path: Path, per_class: int = 8) -> None:
    """Write a contact sheet: a row for each class, in the order of CLASSES."""
    rows = [np.hstack([draw(cls, index) for index in range(per_class)]) for cls in CLASSES]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.vstack(rows)).save(path)
