"""Images as a viewer shows them: every kind of file to RGB of eight bits a channel. No torch."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterable

import numpy as np
from PIL import Image, UnidentifiedImageError

import synthetic
from archives import DataError
from runs import counted

# What Pillow reads of photographs and textures; its icons, films, pages, point clouds and working files are left out.
IMAGE_SUFFIXES = frozenset(
    '.jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .tif .tiff .webp .avif .avifs .jp2 .j2k .jpc .jpf .jpx .j2c .ppm '  # noqa: SIM905
    '.pgm .pbm .pnm .tga .icb .vda .vst .dds .pcx .dcx .qoi .sgi .rgb .rgba .bw .ras .im .msp .pxr .blp .ftc .ftu '
    '.gbr .iim .fit .fits .xbm .xpm'.split()
)
EIGHT_BITS = {'.jpg', '.jpeg', '.jpe', '.jfif', '.bmp', '.dib', '.gif', '.webp'}  # a channel, and never more
EXIF = frozenset({'exif', 'Raw profile type exif', 'XML:com.adobe.xmp', 'xmp'})  # where Pillow keeps it
ORIENTATION = 0x0112  # the EXIF tag; what brings an image upright, by its value
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SYNTHETIC = 'synthetic:'  # begins the paths that are drawn, and can begin no path of a file that a tree lists


# Pillow warns of images that have half as many pixels as those that it refuses, each time that it reads one.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)


def is_image(name: str) -> bool:
    """True for the name of a file that is not hidden and has a suffix of images."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and name[0] != '.'


def open_image(path: str, bits: int | None = None) -> Image.Image:
    """The RGB image at a path of a split, as a viewer shows it; synthetic ones are drawn.

    It is turned by its EXIF orientation and laid over white where it is transparent.

    Args:
        path: of a split, or of any image.
        bits: what image_bits says of the data set: values of more than eight bits are scaled by them. None: by the bits
            that this image uses, which is said once.

    Raises:
        DataError: the file is missing, damaged or no image, or holds more than `bits`; the message names it.
    """
    if path.startswith(SYNTHETIC):
        cls, index = path.removeprefix(SYNTHETIC).split('/')
        return Image.fromarray(synthetic.draw(cls, int(index))).convert('RGB')
    try:
        with Image.open(path) as image:
            deep = _is_deep(image)
            image.load()
            turn = _turn(image)
            if deep:
                image = _eight_bits(image, path, bits)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
            if image.mode != 'RGB':  # convert would copy it
                image = image.convert('RGB')
            return image if turn is None else image.transpose(turn)
    except UnidentifiedImageError as error:
        raise DataError(f'{path}: cannot be read as an image (no format that is known here)') from error
    except Image.DecompressionBombError as error:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise DataError(
            f'{path}: cannot be read as an image (it has more than {most:,} pixels, which Pillow takes for an attack); '
            'reduce it, or cut it into several'
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise DataError(f'{path}: cannot be read as an image ({reason})') from error


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What brings a loaded image upright; Pillow has turned a TIFF by itself."""
    if EXIF.isdisjoint(image.info):  # asking takes a twentieth of the time that a JPEG takes
        return None
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # whatever damaged EXIF leads Pillow to: viewers show such images as they are stored
        return None


def _is_deep(image: Image.Image) -> bool:
    """True for an image of more than eight bits a channel that is not loaded yet."""
    if image.mode == 'F':
        raise ValueError('it holds real numbers, whose range is not known')
    decoder, layout = (image.tile[0][0], str(image.tile[0][3])) if image.tile else ('', '')
    # Pillow keeps the upper eight of 16-bit colours. BGR;16 are 16 bits of all channels together.
    wide = ';16' in layout.replace('BGR;16', '') and image.mode != 'CMYK'
    return image.mode.startswith('I') or wide or decoder == 'SGI16'


def _highest(image: Image.Image) -> int:
    """The largest value of a deep image; where Pillow has kept the upper eight bits, the largest that it may have."""
    if image.mode.startswith('I'):
        low, high = image.getextrema() if image.mode == 'I' else (0, int(np.asarray(image).max()))
        if low < 0:
            raise ValueError('it holds negative values, whose range is not known')
        return high
    colours = [band.getextrema()[1] for name, band in zip(image.getbands(), image.split()) if name != 'A']
    return 256 * max(colours) + 255


def _bits_of(value: int) -> int:
    return max(8, value.bit_length())


def _eight_bits(image: Image.Image, path: str, bits: int | None) -> Image.Image:
    """A deep image, loaded, with eight of its `bits`."""
    highest = _highest(image)
    if bits is None:
        bits = _bits_of(highest)
        if bits != 16:
            _say_once(
                f'note: {path}: no value above {highest}; by itself an image is scaled by the bits it uses, {bits}'
            )
    elif highest >= 2**bits:
        raise ValueError(f'its largest value, {highest}, has more than the {bits} bits of the data set')
    if image.mode.startswith('I'):
        pixels = np.asarray(image)
        grey = (pixels >> (bits - 8)).astype(np.uint8)
        if (clear := image.info.get('transparency')) is not None:
            grey[pixels == clear] = 255
        return Image.fromarray(grey)
    if bits < 13:
        raise ValueError(
            f'16 bits a channel with no value above {highest}, of which only the upper eight are read; save it with 8'
        )
    if bits >= 16:
        return image
    scaled, same = [min(255, value << (16 - bits)) for value in range(256)], list(range(256))
    return image.point([value for band in image.getbands() for value in (same if band == 'A' else scaled)])


_told: list[str] = []


def _say_once(text: str) -> None:
    """A note of this process's first image of a kind; thousands may follow."""
    if not _told:
        _told.append(text)
        print(text, file=sys.stderr)


def image_bits(paths: Iterable[str]) -> tuple[int | None, list[str]]:
    """How a data set's images of more than eight bits a channel are scaled: by the bits that the largest value needs.

    Only these are decoded, and of files that may hold such the header is read; what cannot be read is passed over here.

    Returns:
        the bits, None where there are no such images, and what a user must be told of it.
    """
    highest = {}
    for path in paths:
        if path.startswith(SYNTHETIC) or os.path.splitext(path)[1].lower() in EIGHT_BITS:
            continue
        # Whatever is wrong with it is said when it is read to be used.
        errors = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
        with contextlib.suppress(*errors), Image.open(path) as image:
            if _is_deep(image):
                image.load()
                highest[path] = _highest(image)
    if not highest:
        return None, []
    brightest = max(highest, key=highest.get)
    bits, notes = _bits_of(highest[brightest]), []
    if bits != 16:
        notes.append(
            f'{counted(len(highest), "image")} of more than eight bits a channel: scaled by {bits} bits, those of the '
            f'largest value, {highest[brightest]} in {brightest}'
        )
    if dark := [path for path, value in highest.items() if value < 2 ** (bits - 3)]:
        darkest = min(dark, key=highest.get)
        notes.append(
            f'{counted(len(dark), "image")} of {len(highest)} dark beside the others: no value above an eighth of the '
            f'largest, {highest[brightest]} in {brightest}; such as {darkest} with {highest[darkest]}'
        )
    return bits, notes
