"""The promises of transforms.py: randomness that is a function of its key, and targets that add up."""

import itertools
import math
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from transforms import RandAugment, eval_transform, mix, normalize, seed_of, seeded, train_transform


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))


def test_augmentation_is_a_function_of_the_key_and_leaves_the_generator_alone(image):
    transform = train_transform(32)
    state = torch.get_rng_state()
    a, b, c = transform(image, (1, 2, 3)), transform(image, (1, 2, 3)), transform(image, (1, 2, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert a.shape == (3, 32, 32)
    assert a.dtype == torch.uint8
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize('flips', [[], [v2.RandomHorizontalFlip(0.5)]])
def test_crops_and_augmentations_are_torchvisions_draw_for_draw(flips):
    # Smooth, so that a crop off by a pixel shows and a level of rounding does not.
    y, x = np.mgrid[:150, :200] / 30
    image = Image.fromarray((127 + 120 * np.stack([np.sin(x), np.sin(y), np.sin(x + y)], 2)).astype(np.uint8))
    crop = v2.RandomResizedCrop(96, (0.08, 1.0), interpolation=InterpolationMode.BICUBIC)
    plain = v2.Compose([crop, *flips, v2.RandAugment(2, 9), v2.PILToTensor()])
    quick, differences = train_transform(96, hflip=0.5 if flips else 0), []
    for i in range(60):
        with seeded(i):
            expected = plain(image)
        differences.append((expected.int() - quick(image, (i,)).int()).abs().float().mean().item())
    # What is left is a level of rounding in the crop, which the operations that spread the histogram can make more of.
    assert np.mean(differences) < 0.02
    assert max(differences) < 0.2


@pytest.mark.parametrize('size', [(70, 40), (3, 3), (2, 1)])
def test_randaugment_is_torchvisions_bit_for_bit(size):
    pixels = np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    images = [Image.fromarray(pixels), Image.fromarray(pixels // 4 + 50)]  # the second leaves contrast to be made
    for magnitude in (0, 9, 30):
        plain, quick = v2.RandAugment(2, magnitude), RandAugment(2, magnitude)
        for i in range(80):
            with seeded(i):
                expected = plain(images[i % 2])
            with seeded(i):
                assert np.array_equal(quick(images[i % 2]), expected), (magnitude, i)


def test_options_of_the_augmentation(image):
    square = image.resize((32, 32))

    def seen(hflip: float, randaug_n: int = 0) -> list[torch.Tensor]:
        transform = train_transform(32, (1.0, 1.0), hflip, randaug_n)
        return [transform(square, (i,)) for i in range(8)]

    plain, flipped = seen(hflip=0), seen(hflip=1)
    assert all(torch.equal(a, plain[0]) and torch.equal(b, plain[0].flip(2)) for a, b in zip(plain, flipped))
    assert len({x.numpy().tobytes() for x in seen(hflip=0, randaug_n=2)}) > 4


def slopes(size: tuple[int, int]) -> Image.Image:
    """Red grows with x, green with y, from 0 to 252."""
    y, x = np.mgrid[: size[1], : size[0]]
    return Image.fromarray(np.stack([252 * x // (size[0] - 1), 252 * y // (size[1] - 1), 0 * x], 2).astype(np.uint8))


@pytest.mark.parametrize('resize', ['squash', 'pad'])
@pytest.mark.parametrize('size', [(160, 90), (71, 213)])
def test_training_crops_have_the_proportions_of_the_view_that_is_tested(size, resize):
    image, mean = slopes(size), (0.0, 0.0, 1.0)  # blue where nothing of the image is

    def crops(*scale: float) -> list[torch.Tensor]:
        transform = train_transform(64, scale, 0, 0, resize=resize, statistics=(mean, (1.0,) * 3))
        return [transform(image, (i,)).int() for i in range(40)]

    whole = eval_transform(64, resize=resize, mean=mean)(image).int()
    assert max((crop - whole).abs().float().mean() for crop in crops(1.0, 1.0)) < 2
    areas = []
    for red, green, blue in crops(0.2, 1.0):
        seen = blue < 128
        shares = [(channel[seen].max() - channel[seen].min()) / 252 for channel in (red, green)]  # of width and height
        assert 0.6 < shares[0] / shares[1] < 1.6
        areas.append(float(shares[0] * shares[1]))
        rows, columns = seen.any(1).sum(), seen.any(0).sum()
        assert seen.sum() == rows * columns, 'one rectangle'
        if resize == 'squash':
            assert seen.all()
        else:
            assert max(rows, columns) == 64
            across = size[0] * shares[0] / (size[1] * shares[1])
            assert 0.85 < columns / rows / across < 1.15, 'nothing is stretched'
    assert min(areas) < 0.4 < 0.7 < max(areas)
    line = Image.new('RGB', (6000, 1), 'red')
    thin = train_transform(64, hflip=0, randaug_n=0, resize=resize)
    assert all((thin(line, (i,))[0] == 255).any() for i in range(20))
    assert (eval_transform(64, resize=resize)(line)[0] == 255).any()


def turned(**options) -> list[torch.Tensor]:
    """What the transform of one option makes of a square with a bright spot above its right corner, by 60 keys."""
    pixels = np.full((33, 33, 3), 50, np.uint8)
    pixels[6:9, 23:26] = 250
    transform = train_transform(33, (1.0, 1.0), 0, 0, **options)
    return [transform(pixels, (i,)) for i in range(60)]


def test_flips_and_quarter_turns():
    plain = turned()[0]
    assert all(torch.equal(image, plain.flip(1)) for image in turned(vflip=1.0))
    assert 15 < sum(torch.equal(image, plain) for image in turned(vflip=0.5)) < 45
    quarters = [torch.rot90(plain, k, (1, 2)) for k in range(4)]
    counts = [sum(torch.equal(image, quarter) for image in turned(rotate='quarter')) for quarter in quarters]
    assert sum(counts) == 60
    assert min(counts) > 5


def test_turns_by_any_angle_keep_distances_and_leave_no_empty_corner():
    angles = []
    for image in turned(rotate='any'):
        assert image.min() > 20, 'no corner is empty'
        y, x = (np.argwhere(image[0].numpy() > 150).mean(0)) - 16
        assert math.hypot(x, y) == pytest.approx(math.hypot(8, -9), abs=0.7)
        angles.append(math.degrees(math.atan2(y, x)) % 360)
    assert np.histogram(angles, 6, (0, 360))[0].min() > 0


def test_erasing_is_of_a_rectangle_by_key_and_leaves_other_pixels_and_generators_alone():
    statistics = ((0.5, 0.4, 0.3), (0.15, 0.1, 0.05))
    state = random.getstate()
    plain, erased, again, half = (turned(erase=p, statistics=statistics) for p in (0.0, 1.0, 1.0, 0.5))
    assert random.getstate() == state
    assert all(torch.equal(a, b) for a, b in zip(erased, again))
    places, noise = set(), []
    for before, after in zip(plain, erased):
        rows, columns = torch.where((before != after).any(0))
        box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
        assert 0.01 < (after[0][box].numel() / 33**2) < 0.36
        assert (before != after).any(0)[box].float().mean() > 0.9
        places.add((int(rows.min()), int(columns.min())))
        noise.append(after[:, box[0], box[1]].flatten(1))
    assert len(places) > 40
    noise = torch.cat(noise, 1).float() / 255
    found = torch.stack([noise.mean(1), noise.std(1)])
    torch.testing.assert_close(found, torch.tensor(statistics), atol=0.01, rtol=0)
    assert 15 < sum(torch.equal(a, b) for a, b in zip(plain, half)) < 45


def test_transforms_can_be_sent_to_a_loader_process(image):
    more = dict(vflip=0.5, rotate='any', erase=1.0, resize='pad')
    for transform in (train_transform(32), eval_transform(32), train_transform(32, **more)):
        copy = pickle.loads(pickle.dumps(transform))
        assert torch.equal(copy(image, (5,)), transform(image, (5,)))
    assert torch.equal(train_transform(32)(np.array(image), (3,)), train_transform(32)(image, (3,)))


def test_seeds_differ_between_keys():
    keys = [*itertools.product(range(10), repeat=3), (1,), (1, 0), (1, 0, 0, 0), ('mix', 1)]
    assert len({seed_of(*key) for key in keys}) == len(keys)


def test_seeded_restores_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(1):
        _ = torch.rand(1) / (1 // 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    result = normalize(images)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(result, (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_mix_off_changes_nothing():
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    a, b = mix(images, labels, 5, 0, 0, (1,))
    assert a is images
    assert b is labels


def test_mixup_and_cutmix_share_images_and_targets_alike():
    labels = torch.arange(6)
    images = torch.eye(6).view(6, 6, 1, 1).expand(6, 6, 16, 16).contiguous()
    kinds, drawn = set(), set()
    for step, rank in itertools.product(range(20), range(2)):  # of a key as train.py gives it
        mixed, targets = mix(images, labels, 6, 0.8, 1.0, key := ('mix', 42, step, rank))
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        # Channel c of an image is the share of image c in it, so its mean must be the target's share.
        torch.testing.assert_close(mixed.mean((2, 3)), targets, atol=1e-5, rtol=0)
        kinds.add('cutmix' if ((mixed == 0) | (mixed == 1)).all() else 'mixup')
        drawn.add(mixed.numpy().tobytes())
        again = mix(images, labels, 6, 0.8, 1.0, key)
        assert torch.equal(again[0], mixed)
    assert kinds == {'mixup', 'cutmix'}
    assert len(drawn) == 40, 'each step and process draws anew'
    only = [mix(images, labels, 6, 0, 1.0, (step,))[0] for step in range(10)]
    assert all(((m == 0) | (m == 1)).all() for m in only)


@pytest.mark.parametrize(('kind', 'alphas'), [('MixUp', (0.8, 0)), ('MixUp', (0.3, 0)), ('CutMix', (0, 1.0))])
def test_the_ratio_of_mixing_is_drawn_with_the_alpha_given(monkeypatch, kind, alphas):
    made, real = [], getattr(v2, kind)
    monkeypatch.setattr(v2, kind, lambda **values: made.append(values['alpha']) or real(**values))
    mix(torch.randn(4, 3, 8, 8), torch.arange(4), 4, *alphas, ('mix', 1))
    assert made == [max(alphas)]


def test_a_line_of_pixels_takes_little_memory(monkeypatch):
    made, real = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, 'resize', lambda image, size, *more: made.append(size) or real(image, size, *more))
    for size in ((6000, 1), (1, 6000), (900, 2), (90, 10)):
        line = Image.new('RGB', size, 'red')
        assert (eval_transform(224)(line)[0] == 255).all()
        assert train_transform(224)(line, (1,)).shape == (3, 224, 224)
    assert made == [(224, 224)] * 4


@pytest.mark.parametrize('size', [(60, 50), (224, 224), (400, 50), (37, 289), (33, 250)])
def test_evaluation_of_ordinary_images_is_torchvisions_bit_for_bit(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    plain = v2.Compose([v2.Resize(256, interpolation=InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor()])
    assert torch.equal(eval_transform(224)(image), plain(image))


@pytest.mark.parametrize('size', [(500, 20), (20, 501), (700, 3)])
def test_the_middle_of_a_thin_image_is_that_of_the_whole(size):
    y, x = np.mgrid[: size[1], : size[0]] / 7  # of noise the order of the two passes, which is Pillow's, would show
    image = Image.fromarray((127 + 100 * np.stack([np.sin(x), np.sin(y), np.sin(x + y)], 2)).astype(np.uint8))
    plain = v2.Compose([v2.Resize(73, interpolation=InterpolationMode.BICUBIC), v2.CenterCrop(64), v2.PILToTensor()])
    assert (eval_transform(64)(image).int() - plain(image)).abs().max() <= 1
