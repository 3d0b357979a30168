"""Images as a viewer shows them: every kind of file as RGB with eight bits a channel. No torch."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from common import synthetic
from common.cache import Cache
from common.errors import DataError, lfs_pointer
from common.runs import counted

# The formats of photographs and textures that Pillow reads, without those of icons, films, pages and project files.
IMAGE_SUFFIXES = frozenset(
    '.jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .tif .tiff .webp .avif .avifs .jp2 .j2k .jpc .jpf .jpx .j2c .ppm '  # noqa: SIM905
    '.pgm .pbm .pnm .tga .icb .vda .vst .dds .pcx .dcx .qoi .sgi .rgb .rgba .bw .ras .im .msp .pxr .blp .ftc .ftu '
    '.gbr .iim .fit .fits .xbm .xpm'.split()
)
EIGHT_BITS = {'.jpg', '.jpeg', '.jpe', '.jfif', '.bmp', '.dib', '.gif', '.webp'}  # a channel at most
EXIF = frozenset({'exif', 'Raw profile type exif', 'XML:com.adobe.xmp', 'xmp'})  # where Pillow stores it
SAME = 3  # levels of 255: a profile that changes no colour by more is one of sRGB, as most cameras write it
PAGED = ('.tif', '.tiff', '.gif')  # formats of several pages
_noted: list[str] = []  # the first image that was scaled by its own bits
SYNTHETIC = 'synthetic:'  # prefix of the paths that are drawn; no path of a file in a tree begins so

# Pillow refuses images above twice MAX_IMAGE_PIXELS and warns above it, at each read.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # or a PNG with a long text or profile is refused


def is_image(name: str) -> bool:
    """True for the name of a file that is not hidden and has a suffix of images."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and name[0] != '.'


def open_image(path: str, bits: int | None = None) -> Image.Image:
    """The RGB image at a path of a split, as a viewer shows it; synthetic ones are drawn.

    It is turned by its EXIF orientation, transparent parts are laid over white, and colours are those of sRGB. Of
    several pages it is the first.

    Args:
        path: of a split, or of any image.
        bits: of the data set, from image_bits, by which values of more than eight bits are scaled; None: the bits that
            this image uses, with a note.

    Raises:
        DataError: it cannot be read, or has values of more than `bits` bits.
    """
    if path.startswith(SYNTHETIC):
        cls, index = path.removeprefix(SYNTHETIC).split('/')
        return Image.fromarray(synthetic.draw(cls, int(index))).convert('RGB')
    try:
        with Image.open(path) as image:
            deep = _is_deep(image)
            image.load()
            _turn_upright(image)
            profile = image.info.get('icc_profile')
            if deep:
                image = _eight_bits(image, path, bits)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
            mode = image.mode if image.mode in ('L', 'CMYK') else 'RGB'
            if profile and (transform := _to_srgb(profile, mode)):
                image = transform.apply(image.convert(mode))
            return image if image.mode == 'RGB' else image.convert('RGB')  # which copies
    except Exception as error:  # Pillow raises many kinds for damaged files
        unknown = 'unknown format' if isinstance(error, UnidentifiedImageError) else ''
        reason = lfs_pointer(path) or unknown or ' '.join(str(error).split()) or type(error).__name__
        raise DataError(f'{path}: cannot be read as an image ({reason})') from error


@lru_cache(16)  # it takes milliseconds, and the images of a set share a few profiles
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What turns images of an ICC profile into sRGB; None where it is that already, or cannot be used."""
    try:
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile('sRGB')
        transform = ImageCms.buildTransform(source, target, mode, 'RGB')
    except Exception:  # damaged, of other channels, or a Pillow without LittleCMS: viewers show what is stored
        return None
    colours = np.stack(np.meshgrid(*[np.arange(0, 256, 17, dtype=np.uint8)] * 3), -1).reshape(256, 16, 3)
    sample = Image.fromarray(colours).convert(mode)
    change = np.asarray(transform.apply(sample), int) - np.asarray(sample.convert('RGB'))
    return transform if np.abs(change).max() > SAME else None


def _turn_upright(image: Image.Image) -> None:
    if EXIF.isdisjoint(image.info):  # getexif takes a twentieth of the time of decoding a JPEG
        return
    with contextlib.suppress(Exception):  # Pillow raises many kinds for damaged EXIF; viewers then turn nothing
        ImageOps.exif_transpose(image, in_place=True)


def _is_deep(image: Image.Image) -> bool:
    """True for an image of more than eight bits a channel that is not loaded yet."""
    if image.mode == 'F':
        raise ValueError('it has floating-point values, whose range is unknown')
    decoder, layout = (image.tile[0][0], str(image.tile[0][3])) if image.tile else ('', '')
    # Pillow reads the upper eight bits of 16-bit colours. BGR;16 are 16 bits of all channels together.
    wide = ';16' in layout.replace('BGR;16', '') and image.mode != 'CMYK'
    return image.mode.startswith('I') or wide or decoder == 'SGI16'


def _highest(image: Image.Image) -> int:
    """The largest value of a deep image; an upper bound where Pillow has read the upper eight bits alone."""
    if image.mode.startswith('I'):
        pixels = np.asarray(image)
        if pixels.min() < 0:
            raise ValueError('it has negative values, whose range is unknown')
        return int(pixels.max())
    colours = [band.getextrema()[1] for name, band in zip(image.getbands(), image.split()) if name != 'A']
    return 256 * max(colours) + 255


def _bits_of(value: int) -> int:
    return max(8, value.bit_length())


def _eight_bits(image: Image.Image, path: str, bits: int | None) -> Image.Image:
    """The upper eight of the `bits` bits of a deep image that is loaded."""
    highest = _highest(image)
    if bits is None:
        bits = _bits_of(highest)
        if bits != 16 and not _noted:  # once in each process: thousands may follow
            _noted.append(path)
            print(
                f'note: {path}: no value above {highest}; a single image is scaled by the bits it uses, {bits}',
                file=sys.stderr,
            )
    elif highest >= 2**bits:
        raise ValueError(f'its largest value, {highest}, needs more than the {bits} bits of the data set')
    if image.mode.startswith('I'):
        pixels = np.asarray(image)
        grey = (pixels >> (bits - 8)).astype(np.uint8)
        if (clear := image.info.get('transparency')) is not None:
            grey[pixels == clear] = 255
        return Image.fromarray(grey)
    if bits < 13:
        raise ValueError(f'16 bits a channel, none above {highest}: Pillow reads the upper eight alone; save it with 8')
    if bits >= 16:
        return image
    scaled, same = [min(255, value << (16 - bits)) for value in range(256)], list(range(256))
    return image.point([value for band in image.getbands() for value in (same if band == 'A' else scaled)])


def image_bits(paths: Iterable[str]) -> tuple[int | None, list[str]]:
    """The bits by which a data set's images of more than eight bits a channel are scaled: those of the largest value.

    None where there are no such images. With it come notes for the user.
    """
    highest = {}
    for path in paths:
        if path.startswith(SYNTHETIC) or os.path.splitext(path)[1].lower() in EIGHT_BITS:
            continue
        with contextlib.suppress(Exception), Image.open(path) as image:  # a damaged file is reported when it is used
            if _is_deep(image):
                image.load()
                highest[path] = _highest(image)
    if not highest:
        return None, []
    brightest, darkest = (choose(highest, key=highest.get) for choose in (max, min))
    bits, largest = _bits_of(highest[brightest]), f'the largest value, {highest[brightest]} in {brightest}'
    notes = []
    if bits != 16:
        deep = f'{counted(len(highest), "image")} of more than eight bits a channel'
        notes.append(f'{deep}: scaled by {bits} bits, those of {largest}')
    if dark := sum(value < 2 ** (bits - 3) for value in highest.values()):
        notes.append(
            f'{counted(dark, "image")} of {len(highest)} much darker than the others: below an eighth of {largest}; '
            f'such as {darkest} with {highest[darkest]}'
        )
    return bits, notes


def count_pages(paths: Iterable[str]) -> list[str]:
    """A note on the images of several pages, of which the first is taken; [] where there are none."""
    several = []
    for path in paths:
        if path.lower().endswith(PAGED):
            with contextlib.suppress(Exception), Image.open(path) as image:
                several += [path] * (image.n_frames > 1)
    if not several:
        return []
    return [f'{counted(len(several), "image")} of several pages: the first is taken; such as {several[0]}']


def stamp(path: str) -> str:
    """A text that changes whenever the file at a path of a split does, or the code that draws it."""
    found = os.stat(synthetic.__file__ if path.startswith(SYNTHETIC) else path)
    return f'{os.path.abspath(path)} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}'


def read_pixels(
    path: str,
    cache: Cache | None = None,
    what: str = '',
    prepare: Callable[[Image.Image], Image.Image] | None = None,
    bits: int | None = None,
) -> np.ndarray:
    """open_image as a writable (H, W, 3) uint8 array, from the cache if it is there.

    `prepare` is applied before it is stored, and `what`, a part of the key in the cache, describes it in full.
    """

    def make() -> np.ndarray:
        image = open_image(path, bits)
        return np.array(image if prepare is None else prepare(image))

    if cache is None:
        return make()
    try:
        source = stamp(path)
    except OSError:  # make() says why
        return make()
    return cache.load(f'{what} {bits} {source}', make)
