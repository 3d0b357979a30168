"""The promises of common/images.py: pixels as a viewer shows them, never silently black or white."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

import datasets
from common import images
from common.checkpoint import read_checkpoint, read_weights
from common.errors import DataError, UserError
from common.images import IMAGE_SUFFIXES, image_bits, open_image, read_pixels
from common.splits import bits_of
from common.trees import read_mat, read_text
from datasets import load_splits

RAMP = np.linspace(20, 235, 32 * 32).reshape(32, 32).astype(np.uint16)


@pytest.fixture(autouse=True)
def no_notes(monkeypatch):
    monkeypatch.setattr(images, '_noted', [])


def test_the_suffixes_are_pillows():
    registered = Image.registered_extensions()
    optional = {'.avif', '.avifs'}  # of Pillow 11.3 on
    assert {suffix for suffix in IMAGE_SUFFIXES - optional if registered.get(suffix) not in Image.OPEN} == set()
    assert {'.jfif', '.pgm', '.pbm', '.jpe', '.jp2', '.tga', '.webp', '.tif'} <= IMAGE_SUFFIXES
    assert not {'.pdf', '.eps', '.mpg', '.ico', '.psd', '.h5', '.mat', '.txt', '.db'} & IMAGE_SUFFIXES


@pytest.mark.parametrize('suffix', ['png', 'tif'])
@pytest.mark.parametrize('bits', [8, 10, 12, 14])
def test_few_bits_in_sixteen_are_not_black(tmp_path, capsys, bits, suffix):
    path = str(tmp_path / f'a.{suffix}')
    Image.fromarray(RAMP << (bits - 8)).save(path)
    assert np.array_equal(np.asarray(open_image(path))[..., 1], RAMP)
    assert capsys.readouterr().err == (
        f'note: {path}: no value above {235 << (bits - 8)}; a single image is scaled by the bits it uses, {bits}\n'
    )
    open_image(path)
    assert capsys.readouterr().err == '', 'thousands may follow'


def test_the_images_of_a_set_are_scaled_alike(tmp_path, capsys):
    for c, cls in enumerate('ab'):
        (tmp_path / cls).mkdir()
        for i in range(5):  # twelve bits, and images that differ in brightness
            Image.fromarray((RAMP << 4) // (1 + i + c)).save(tmp_path / cls / f'{i}.png')
    splits = load_splits('folder', tmp_path, 1)
    bits, notes = bits_of(splits)
    assert bits == 12
    assert len(notes) == 1
    assert notes[0].startswith('10 images of more than eight bits a channel: scaled by 12 bits')
    assert notes[0].endswith(f', {235 << 4} in {tmp_path}/a/0.png')
    for c, cls in enumerate('ab'):
        for i in range(5):
            pixels = read_pixels(str(tmp_path / cls / f'{i}.png'), bits=bits)
            assert np.array_equal(pixels[..., 0], (RAMP << 4) // (1 + i + c) >> 4)
    with pytest.raises(DataError, match='stand in two subsets of a fold'):
        datasets.check_tree('folder', tmp_path)
    assert capsys.readouterr().out.splitlines()[0] == notes[0]
    # One that is far brighter decides, and a note says that the others are dark.
    Image.fromarray(RAMP << 8).save(tmp_path / 'a' / '0.png')
    bits, (note,) = bits_of(splits)
    assert bits == 16
    assert note.startswith('9 images of 10 much darker than the others')
    assert f'{235 << 8} in {tmp_path}/a/0.png' in note
    with pytest.raises(DataError, match=r'0\.png: .*its largest value, 60160, needs more than the 12 bits'):
        open_image(str(tmp_path / 'a' / '0.png'), 12)


def test_thirty_two_bits_are_not_white(tmp_path):
    for bits in (8, 16, 20, 24):
        Image.fromarray(RAMP.astype(np.int32) << (bits - 8)).save(tmp_path / 'a.tif')
        assert np.array_equal(np.asarray(open_image(str(tmp_path / 'a.tif')))[..., 2], RAMP)
    Image.fromarray(RAMP.astype(np.int32) - 100).save(tmp_path / 'a.tif')
    with pytest.raises(DataError, match=r'a\.tif: .*negative values'):
        open_image(str(tmp_path / 'a.tif'))


def save_deep_colours(path, pixels: np.ndarray) -> None:
    """A PNG of 16 bits a channel, which Pillow does not write: its chunks by hand."""
    height, width, _ = pixels.shape
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in pixels)
    body = b'\x89PNG\r\n\x1a\n'
    head = struct.pack('>IIBBBBB', width, height, 16, 2, 0, 0, 0)
    for kind, data in ((b'IHDR', head), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')):
        body += struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    path.write_bytes(body)


def test_deep_colours_are_read_or_refused(tmp_path):
    # Pillow keeps the upper eight bits alone: what lies below them cannot be brought back.
    colours, path = np.stack([RAMP, RAMP[::-1], RAMP.T], 2), tmp_path / 'a.png'
    save_deep_colours(path, colours << 8)
    assert np.array_equal(np.asarray(open_image(str(path))), colours)
    save_deep_colours(path, colours << 6)
    assert np.array_equal(np.asarray(open_image(str(path))) >> 2, colours >> 2)
    for bits in (8, 12):
        save_deep_colours(path, colours << (bits - 8))
        with pytest.raises(DataError, match=r'a\.png: .*16 bits a channel, none above \d+'):
            open_image(str(path))
    save_deep_colours(path, colours)
    assert not np.asarray(open_image(str(path), 16)).any(), 'dark in a set of which another uses all bits'


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'tif', 'deep.png'])
def test_images_are_upright(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    stored = Image.fromarray(pixels[..., 0].astype(np.uint16) << 8 if 'deep' in suffix else pixels)
    for orientation in range(1, 9):
        exif, path = Image.Exif(), str(tmp_path / f'a.{suffix}')
        exif[0x0112] = orientation
        stored.save(path, exif=exif)
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image))
        assert expected.shape[:2] == ((40, 24) if orientation > 4 else (24, 40))
        seen = np.asarray(open_image(path))
        assert np.array_equal(seen[..., 0] if 'deep' in suffix else seen, expected >> (8 if 'deep' in suffix else 0))


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_damaged_exif_is_not_followed(tmp_path):
    stored = Image.new('RGB', (12, 8), 'red')
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = exif.tobytes()
    for data in (b'Exif\0\0', b'Exif\0\0II*\0', whole[:20], whole[:8] + b'\xff' * 20, b'x' * 40):
        stored.save(tmp_path / 'a.jpg', exif=data)
        assert open_image(str(tmp_path / 'a.jpg')).size == (12, 8)


def test_what_is_transparent_is_white(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    opaque = Image.fromarray(pixels)
    opaque.save(tmp_path / 'opaque.png')
    assert np.array_equal(open_image(str(tmp_path / 'opaque.png')), pixels[..., :3])

    half = Image.new('RGBA', (4, 4), (100, 0, 200, 51))  # a fifth of it, over four fifths of white
    grey = Image.merge('LA', (Image.new('L', (4, 4), 100), Image.new('L', (4, 4), 51)))
    palette = Image.new('P', (4, 4), 1)
    palette.putpalette([0, 0, 0, 100, 0, 200])
    cases = {
        'rgba.png': (half, {}, (224, 204, 244)),
        'la.png': (grey, {}, (224, 224, 224)),
        'clear.png': (Image.new('RGBA', (4, 4), (9, 99, 9, 0)), {}, (255, 255, 255)),
        'palette.png': (palette, dict(transparency=1), (255, 255, 255)),
        'shares.png': (palette, dict(transparency=bytes([255, 51])), (224, 204, 244)),
        'colour.png': (Image.new('RGB', (4, 4), (9, 8, 7)), dict(transparency=(9, 8, 7)), (255, 255, 255)),
        'level.png': (Image.new('L', (4, 4), 9), dict(transparency=9), (255, 255, 255)),
        'film.gif': (palette, dict(transparency=1), (255, 255, 255)),
    }
    for name, (image, more, expected) in cases.items():
        image.save(tmp_path / name, **more)
        seen = np.asarray(open_image(str(tmp_path / name)), int)
        assert np.abs(seen - expected).max() <= 1, name
    Image.fromarray(RAMP << 8).save(tmp_path / 'deep.png', transparency=int(RAMP[3, 3]) << 8)
    assert (np.asarray(open_image(str(tmp_path / 'deep.png')))[RAMP[3, 3] == RAMP] == 255).all()


def test_a_scan_above_pillows_limit(tmp_path, monkeypatch):
    path = str(tmp_path / 'scan.png')
    Image.new('RGB', (30, 40)).save(path)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 500)
    with pytest.raises(DataError, match=r'scan\.png: .*1200 pixels.* limit of 1000 pixels'):
        open_image(path)


def test_only_files_that_may_hold_more_than_eight_bits_are_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'open', None)
    assert image_bits(['a.jpg', 'b.JPEG', 'synthetic:brick/0001']) == (None, [])


def bitmap_of_five_six_five(red: int, green: int, blue: int) -> bytes:
    """A BMP of 8 x 8 pixels with 16 bits for all channels together, at these values of 5, 6 and 5 bits."""
    masks = struct.pack('<3I', 0xF800, 0x07E0, 0x001F)
    pixels = struct.pack('<H', red << 11 | green << 5 | blue) * 64
    head = struct.pack('<IiiHHIIiiII', 40, 8, 8, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    return struct.pack('<2sIHHI', b'BM', 66 + len(pixels), 0, 0, 66) + head + masks + pixels


@pytest.mark.parametrize('bits', [None, 12])
def test_sixteen_bits_of_all_channels_together_are_eight_a_channel(tmp_path, capsys, bits):
    (tmp_path / 'a.bmp').write_bytes(bitmap_of_five_six_five(12, 15, 4))
    pixel = np.asarray(open_image(str(tmp_path / 'a.bmp'), bits))[0, 0]
    assert np.abs(pixel.astype(int) - (99, 61, 33)).max() <= 1
    assert capsys.readouterr().err == ''


def test_an_sgi_file_of_two_bytes_a_value_is_no_dark_image_of_one(tmp_path):
    ramp = np.linspace(0, 1008, 64).astype('>u2').tobytes()
    path = tmp_path / 'a.sgi'
    path.write_bytes(struct.pack('>hBBHHHHii', 474, 0, 2, 2, 8, 8, 1, 0, 1008).ljust(512, b'\0') + ramp)
    with pytest.raises(DataError, match=r'a\.sgi.*16 bits a channel'):
        open_image(str(path))
    assert image_bits([str(path)])[0] is not None


# ---------------------------------------------------------------------------------------------- colours


def swapped_profile() -> bytes:
    """An ICC profile as sRGB, but with the primaries red and green exchanged."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    return data.replace(b'rXYZ', b'none').replace(b'gXYZ', b'rXYZ').replace(b'none', b'gXYZ')


def test_colours_are_those_of_srgb(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    stored, path, swapped = Image.fromarray(pixels), str(tmp_path / 'a.png'), swapped_profile()
    stored.save(path, icc_profile=swapped)
    assert np.abs(np.asarray(open_image(path), int) - pixels[..., [1, 0, 2]]).max() <= 2
    whole = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    cases = {'sRGB': (stored, whole), 'damaged': (stored, swapped[:200])}
    cases['of other channels'] = stored.convert('L'), swapped
    for name, (image, profile) in cases.items():
        image.save(path, icc_profile=profile)
        assert np.array_equal(open_image(path), image.convert('RGB')), name
    clear = stored.convert('RGBA')
    clear.putalpha(Image.new('L', clear.size, 0))
    clear.save(path, icc_profile=swapped)
    assert np.abs(np.asarray(open_image(path), int) - 255).max() <= 1


def test_of_several_pages_the_first_is_taken(tmp_path):
    red, blue = (Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue'))
    for name in ('a.tif', 'b.gif'):
        red.save(tmp_path / name, save_all=True, append_images=[blue])
    red.save(tmp_path / 'c.gif')
    paths = [str(tmp_path / name) for name in ('a.tif', 'b.gif', 'c.gif', 'missing.gif')]
    assert {open_image(path).getpixel((0, 0)) for path in paths[:3]} == {(255, 0, 0)}
    assert images.count_pages(paths) == [f'2 images of several pages: the first is taken; such as {paths[0]}']
    assert images.count_pages(paths[2:]) == []


# ---------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize('kind', [RuntimeError, struct.error, AttributeError])
def test_whatever_pillow_raises_is_a_damaged_file(tmp_path, monkeypatch, kind):
    def fails(*_):
        raise kind

    path = str(tmp_path / 'a.png')
    Image.new('RGB', (8, 8)).save(path)
    monkeypatch.setattr('PIL.ImageFile.ImageFile.load', fails)
    monkeypatch.setattr(images, '_is_deep', lambda image: image.load())
    with pytest.raises(DataError, match=rf'a\.png: cannot be read as an image \({kind.__name__}\)$'):
        open_image(path)
    assert image_bits([path]) == (None, [])


def test_a_png_with_a_long_text_is_not_damaged(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text('parameters', 'many ' * 400_000, zip=True)
    profile = swapped_profile() + b'\0' * 2**21
    Image.new('RGB', (8, 8), 'red').save(tmp_path / 'a.png', pnginfo=text, icc_profile=profile)
    assert open_image(str(tmp_path / 'a.png')).size == (8, 8)


def test_a_pointer_of_git_lfs_is_called_by_its_name(tmp_path):
    path = tmp_path / 'a.jpg'
    path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 46830571\n')
    for read in (lambda path: open_image(str(path)), read_checkpoint, read_text, lambda path: read_mat(path, 'x')):
        with pytest.raises(UserError, match=r'a\.jpg: .*pointer of git-lfs.*`git lfs pull`'):
            read(path)
    weights = path.rename(tmp_path / 'a.safetensors')
    with pytest.raises(UserError, match=r'a\.safetensors: .*pointer of git-lfs'):
        read_weights(weights)
