"""From a PIL image to a batch on the device: crops and augmentations, normalisation, Mixup and CutMix.

Images are uint8 until they are on the device. Everything random is a function of a key, a tuple such as
(seed, epoch, i), so that it depends neither on the number of workers nor on interruptions of a run.
"""

import hashlib
import math
import random
from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import InterpolationMode, v2

from common.timm_models import own_settings

CROP_RATIO = 0.875  # side of the evaluated crop over the short side of the resized image
THIN = 8  # ratio of the sides above which only the middle of an image is resized


class Preprocessing(NamedTuple):
    """What a model takes: square images of img_size pixels, and the statistics that normalise them (of values 0-1).

    `bits` is that of images.open_image for images of more than eight bits a channel; None where none trained the model.
    """

    img_size: int
    crop_ratio: float = CROP_RATIO
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    bits: int | None = None
    resize: str = 'crop'  # of --resize: crop, squash or pad

    @property
    def view(self) -> tuple:
        """What eval_view takes."""
        return self.img_size, self.crop_ratio, self.resize, self.mean

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """mean and std, as normalize takes them."""
        return self.mean, self.std


@contextmanager
def seeded(*key: int | str):
    """Run the body with torch's CPU generator seeded by `key`, then restore its state."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed_of(*key))
    try:
        yield
    finally:
        generator.set_state(state)


def seed_of(*key: int | str) -> int:
    """A 64-bit seed; different keys give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], 'little')


def train_transform(
    img_size: int,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    hflip: float = 0.5,
    randaug_n: int = 2,
    randaug_m: int = 9,
    vflip: float = 0.0,
    rotate: str | None = None,
    erase: float = 0.0,
    resize: str = 'crop',
    statistics: tuple = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
):
    """Bicubic RandomResizedCrop, flips and RandAugment as torchvision draws them, rotation, and timm's RandomErasing.

    Args:
        crop_scale: range of the crop's area over the image's.
        hflip, vflip: probabilities of a horizontal and a vertical flip.
        randaug_n, randaug_m: operations per image (0: no RandAugment) and their magnitude, 0 to 30.
        rotate: quarter, any, or None; see _rotate.
        erase: probability that a rectangle of 2 to 33 % of the area becomes noise.
        resize: of --resize; crops of squash and pad are views of a part as eval_view's are of the whole.
        statistics: mean and std of the model's input, for the colours of erase and pad.

    Returns:
        transform(image, key): PIL RGB image or (H, W, 3) uint8 array -> (3, img_size, img_size) uint8, random by key.
    """
    # Tensors are faster to resize than PIL images; RandAugment is faster on PIL images.
    crop = v2.RandomResizedCrop(img_size, crop_scale)
    steps = [to_tensor, partial(_crop, crop) if resize == 'crop' else partial(_crop_part, crop, resize, statistics[0])]
    if hflip > 0:  # otherwise it would draw a number that RandAugment then lacks
        steps.append(v2.RandomHorizontalFlip(hflip))
    if vflip > 0:
        steps.append(v2.RandomVerticalFlip(vflip))
    if rotate:
        steps.append(partial(_rotate, rotate))
    if randaug_n > 0:
        steps += [_to_image, RandAugment(randaug_n, randaug_m), to_tensor]
    if erase > 0:
        steps.append(partial(_erase, erase, RandomErasing(1.0, mode='pixel', device='cpu'), statistics))
    return partial(_augment, steps)


def _augment(steps: list, image: Image.Image | np.ndarray, key: tuple[int, ...]) -> torch.Tensor:
    with seeded(*key):
        for step in steps:
            image = step(image)
    return image


def _crop(random: v2.RandomResizedCrop, image: torch.Tensor) -> torch.Tensor:
    """RandomResizedCrop with bicubic interpolation, in channels_last, which torch resizes faster."""
    top, left, height, width = random.get_params(image, random.scale, random.ratio)
    patch = image[None, :, top : top + height, left : left + width]
    patch = patch.contiguous(memory_format=torch.channels_last)
    return F.interpolate(patch, random.size, mode='bicubic', antialias=True)[0]


def _crop_part(random: v2.RandomResizedCrop, resize: str, mean: tuple[float, ...], image: torch.Tensor) -> torch.Tensor:
    """The view of a random part, with the proportions of the image up to those that RandomResizedCrop draws."""
    sides, (size, _) = image.shape[1:], random.size
    square = image[:1, :1, :1].expand(1, max(sides), max(sides))
    top, left, height, width = random.get_params(square, random.scale, random.ratio)

    def part(start: int, length: int, side: int) -> slice:
        first, end = (round(place * side / max(sides)) for place in (start, start + length))
        return slice(min(first, side - 1), max(end, first + 1))

    rows, columns = part(top, height, sides[0]), part(left, width, sides[1])
    patch = image[None, :, rows, columns].contiguous(memory_format=torch.channels_last)
    patch = F.interpolate(patch, whole_sides(patch.shape[2:], size, resize), mode='bicubic', antialias=True)[0]
    view = torch.tensor(colour_of(mean), dtype=torch.uint8).view(3, 1, 1).repeat(1, size, size)
    top, left = ((size - side) // 2 for side in patch.shape[1:])
    view[:, top : top + patch.shape[1], left : left + patch.shape[2]] = patch
    return view


def _rotate(angles: str, image: torch.Tensor) -> torch.Tensor:
    """Turn a square by a multiple of 90 degrees (quarter), or by any angle, with the corners mirrored at its sides."""
    if angles == 'quarter':
        return torch.rot90(image, int(torch.randint(4, ())), (1, 2))
    angle = 2 * math.pi * float(torch.rand(()))
    sine, cosine = math.sin(angle), math.cos(angle)
    grid = F.affine_grid(torch.tensor([[[cosine, -sine, 0], [sine, cosine, 0]]]), [1, *image.shape], False)
    turned = F.grid_sample(image[None].float(), grid, 'bicubic', 'reflection', align_corners=False)[0]
    return turned.round_().clamp_(0, 255).byte()


def _erase(probability: float, erasing: RandomErasing, statistics: tuple, image: torch.Tensor) -> torch.Tensor:
    """timm's random erasing, whose noise is normal for normalised images."""
    if torch.rand(()) >= probability:
        return image
    state = random.getstate()
    random.seed(int(torch.randint(2**62, ())))  # timm places the rectangle by Python's generator
    erased = erasing(normalize(image[None], *statistics))[0]
    random.setstate(state)
    mean, std = _statistics(image.device, *statistics)
    return (erased * std + mean).round_().clamp_(0, 255).byte()


def to_tensor(image: Image.Image | np.ndarray, _key: object = None) -> torch.Tensor:
    """PIL RGB image, or writable array (H, W, 3), whose memory is shared -> (3, H, W)."""
    return torch.from_numpy(image if isinstance(image, np.ndarray) else np.array(image)).permute(2, 0, 1)


def _to_image(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


class RandAugment(v2.RandAugment):
    """torchvision's RandAugment of PIL RGB images, bit-identical, with a faster Sharpness."""

    def _apply_image_or_video_transform(self, image, transform_id, magnitude, interpolation, fill):
        if transform_id == 'Sharpness':
            return Image.blend(_smooth(image), image, 1 + magnitude)
        return super()._apply_image_or_video_transform(image, transform_id, magnitude, interpolation, fill)


def _smooth(image: Image.Image) -> Image.Image:
    """PIL's filter SMOOTH of an RGB image: weighted means of 3 x 3 pixels, the centre with weight 5; borders stay."""
    pixels = np.array(image)
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, 3 * width)
    wide = rows.astype(np.uint16)
    columns = wide[:-2] + wide[1:-1] + wide[2:]
    total = columns[:, :-6] + columns[:, 3:-3] + columns[:, 6:] + 4 * wide[1:-1, 3:-3]
    rows[1:-1, 3:-3] = (total + 6) // 13
    return Image.fromarray(pixels)


def eval_transform(*view, **named):
    """eval_view from a PIL RGB image, and a key that is ignored, to (3, img_size, img_size) uint8."""
    return partial(_view_tensor, eval_view(*view, **named))


def _view_tensor(view: Callable, image: Image.Image, _key: object = None) -> torch.Tensor:
    return to_tensor(view(image))


def eval_view(
    img_size: int, crop_ratio: float = CROP_RATIO, resize: str = 'crop', mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
) -> Callable[[Image.Image], Image.Image]:
    """What an evaluation sees of a PIL image: img_size x img_size pixels, by a bicubic resize.

    crop: the short side becomes img_size / crop_ratio, then the centre is cropped. squash: the whole image. pad: the
    whole image, its longer side at img_size, with borders in the colour `mean`, which is zero for the model.
    """
    if resize != 'crop':
        return partial(_view_whole, img_size, resize, colour_of(mean))
    short = round(img_size / crop_ratio)
    plain = v2.Compose([v2.Resize(short, interpolation=InterpolationMode.BICUBIC), v2.CenterCrop(img_size)])
    return partial(_view, plain, short, img_size)


def _view(plain: v2.Compose, short: int, img_size: int, image: Image.Image) -> Image.Image:
    if max(image.size) <= THIN * min(image.size):
        return plain(image)
    # Resized as a whole, a line of 6000 pixels would become an image of hundreds of megabytes.
    box = _box(image.size, short, img_size)
    return image.resize((img_size, img_size), Image.Resampling.BICUBIC, box)


def view_box(
    size: tuple[int, int], img_size: int, crop_ratio: float = CROP_RATIO, resize: str = 'crop'
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what eval_view shows of an image of `size` (width, height), in its pixels.

    With pad the box is larger than the image by the borders.
    """
    if resize == 'crop':
        return _box(size, round(img_size / crop_ratio), img_size)
    return _box_of(size, whole_sides(size, img_size, resize), img_size)


def _box(size: tuple[int, int], short: int, img_size: int) -> tuple[float, float, float, float]:
    return _box_of(size, tuple(int(short * side / min(size)) for side in size), img_size)


def _box_of(size: tuple[int, ...], sides: tuple[int, ...], img_size: int) -> tuple[float, float, float, float]:
    """What a window of img_size in the middle shows of an image of `size` that is resized to `sides`."""
    spans = []
    for side, resized in zip(size, sides):
        start = round((resized - img_size) / 2) if resized > img_size else -((img_size - resized) // 2)
        spans.append((start * side / resized, (start + img_size) * side / resized))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def _view_whole(img_size: int, resize: str, colour: tuple[int, ...], image: Image.Image) -> Image.Image:
    sides = whole_sides(image.size, img_size, resize)
    view = Image.new('RGB', (img_size, img_size), colour)
    view.paste(image.resize(sides, Image.Resampling.BICUBIC), tuple((img_size - side) // 2 for side in sides))
    return view


def whole_sides(sides: tuple[int, ...], img_size: int, resize: str) -> tuple[int, ...]:
    """The sides of a whole image within its view; those of pad as in timm's crop_mode 'border'."""
    padded = tuple(max(1, round(side / (max(sides) / img_size))) for side in sides)
    return dict(squash=(img_size, img_size), pad=padded)[resize]


def colour_of(mean: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(round(255 * value) for value in mean)


def eval_view_text(taken: Preprocessing) -> str:
    """What eval_view does, as part of a key in the cache: changes whenever its pixels would."""
    size, border = taken.img_size, f', border {colour_of(taken.mean)}' * (taken.resize == 'pad')
    if taken.resize != 'crop':
        return f'bicubic, {taken.resize} to {size}{border}'
    return f'bicubic to {round(size / taken.crop_ratio)}, centre crop {size}, middle of thin {THIN}'


def preprocessing_of(model: str, img_size: int, pretrained: bool | str = False) -> Preprocessing:
    """What a model of this name takes at img_size: its own crop and statistics (see timm_models.own_settings)."""
    return Preprocessing(**{**own_settings(model, pretrained), 'img_size': img_size})


def eval_settings(*values, **named) -> dict:
    """Preprocessing(*values, **named) as plain values for a checkpoint; `bits` and `resize` only where they matter."""
    taken = Preprocessing(*values, **named)
    settings = dict(img_size=taken.img_size, crop_ratio=taken.crop_ratio, interpolation='bicubic')
    settings |= dict(mean=list(taken.mean), std=list(taken.std))
    settings |= {} if taken.resize == 'crop' else dict(resize=taken.resize)
    return settings | (dict(bits=taken.bits) if taken.bits else {})


def read_settings(settings: dict) -> Preprocessing:
    """The Preprocessing that a checkpoint's `transform` records."""
    found = {key: settings[key] for key in Preprocessing._fields if key in settings}
    found |= {key: tuple(found[key]) for key in ('mean', 'std') if key in found}
    return Preprocessing(**found)


@lru_cache  # a copy to the device synchronises
def _statistics(device: torch.device, mean: tuple, std: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.tensor([mean, std], device=device) * 255
    return values[0].view(-1, 1, 1), values[1].view(-1, 1, 1)


def normalize(
    images: torch.Tensor, mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN, std: tuple[float, ...] = IMAGENET_DEFAULT_STD
) -> torch.Tensor:
    """(B, 3, H, W) uint8 -> float32 in channels_last, standardised by a mean and a deviation of values 0 to 1."""
    mean, std = _statistics(images.device, mean, std)
    return images.to(memory_format=torch.channels_last).float().sub_(mean).div_(std)


def blank_batch(batch_size: int, img_size: int, device: torch.device) -> torch.Tensor:
    """A batch of black images, normalised: (batch_size, 3, img_size, img_size)."""
    return normalize(torch.zeros(batch_size, 3, img_size, img_size, dtype=torch.uint8, device=device))


def mix(
    images: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    mixup: float,
    cutmix: float,
    key: tuple[int | str, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup or CutMix of a batch with its neighbours, one of the two at random where both are on.

    Args:
        images, labels: (B, 3, H, W) float, and (B,) class indices.
        mixup, cutmix: alpha of the Beta distribution that each draws its ratio from; 0 turns it off.
        key: the randomness, as for `seeded`.

    Returns:
        images, and targets: (B, num_classes) probabilities, or `labels` unchanged where both are off.
    """
    kinds = [(kind, alpha) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0]
    if not kinds:
        return images, labels
    with seeded(*key):
        kind, alpha = kinds[int(torch.randint(len(kinds), ()))]
        images, targets = kind(alpha=alpha, num_classes=num_classes)(images, labels)
    return images.contiguous(memory_format=torch.channels_last), targets
