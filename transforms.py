"""From a PIL image to a batch on the device: crops and augmentations, normalisation, Mixup and CutMix.

Images travel as uint8 and become floats on the device. Everything random takes a key, a tuple such as
(seed, epoch, i), and is a function of it: the same whatever the number of workers and wherever a run was interrupted.
"""

import hashlib
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms import InterpolationMode, v2

CROP_RATIO = 0.875  # side of the evaluated crop over the short side of the resized image


@contextmanager
def seeded(*key: int | str):
    """Run the body with torch's CPU generator at a state that depends on `key` alone; the old state comes back."""
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
):
    """Bicubic RandomResizedCrop, horizontal flip and RandAugment.

    Args:
        img_size: side of the result in pixels.
        crop_scale: range of the crop's area over the image's.
        hflip: probability of a horizontal flip.
        randaug_n, randaug_m: operations an image (0: no RandAugment) and their magnitude, 0 to 30.

    Returns:
        transform(image, key): PIL RGB image -> (3, img_size, img_size) uint8, random by key.
    """
    steps = [v2.RandomResizedCrop(img_size, crop_scale, interpolation=InterpolationMode.BICUBIC)]
    if hflip > 0:
        steps.append(v2.RandomHorizontalFlip(hflip))
    if randaug_n > 0:
        steps.append(v2.RandAugment(randaug_n, randaug_m, interpolation=InterpolationMode.BILINEAR))
    steps.append(v2.PILToTensor())
    return partial(_augment, v2.Compose(steps))


def _augment(pipeline: v2.Compose, image: Image.Image, key: tuple[int, ...]) -> torch.Tensor:
    with seeded(*key):
        return pipeline(image)


def eval_transform(img_size: int):
    """Bicubic resize of the short side to img_size / CROP_RATIO and the centre crop.

    Returns:
        transform(image, key): PIL RGB image -> (3, img_size, img_size) uint8; key is not used.
    """
    pipeline = v2.Compose(
        [
            v2.Resize(round(img_size / CROP_RATIO), interpolation=InterpolationMode.BICUBIC),
            v2.CenterCrop(img_size),
            v2.PILToTensor(),
        ]
    )
    return partial(_prepare, pipeline)


def _prepare(pipeline: v2.Compose, image: Image.Image, key: object = None) -> torch.Tensor:
    return pipeline(image)


def eval_settings(img_size: int) -> dict:
    """What eval_transform and normalize do, as plain values for a checkpoint."""
    return dict(
        img_size=img_size,
        crop_ratio=CROP_RATIO,
        interpolation='bicubic',
        mean=list(IMAGENET_DEFAULT_MEAN),
        std=list(IMAGENET_DEFAULT_STD),
    )


@lru_cache  # a copy to the device waits for it
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD], device=device) * 255
    return values[0].view(3, 1, 1), values[1].view(3, 1, 1)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 -> float32 in channels_last, ImageNet mean 0 and standard deviation 1, on its device."""
    mean, std = _statistics(images.device)
    return images.to(memory_format=torch.channels_last).float().sub_(mean).div_(std)


def mix(
    images: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    mixup: float,
    cutmix: float,
    key: tuple[int | str, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup or CutMix of a batch with its neighbours, by a fair coin where both are on.

    Args:
        images: (B, 3, H, W) float.
        labels: (B,) class indices.
        num_classes: K.
        mixup, cutmix: alpha of the Beta distribution each draws its share from; 0 turns it off.
        key: the randomness, as for `seeded`.

    Returns:
        images, and targets: (B, K) shares that sum to 1, or `labels` unchanged where both are off.
    """
    kinds = [(kind, alpha) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0]
    if not kinds:
        return images, labels
    with seeded(*key):
        kind, alpha = kinds[int(torch.randint(len(kinds), ()))]
        images, targets = kind(alpha=alpha, num_classes=num_classes)(images, labels)
    return images.contiguous(memory_format=torch.channels_last), targets
