"""From lists of images to batches: the data set as torch's loader reads it, samplers, and loader processes."""

import argparse
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch.utils.data import DataLoader

from common.cache import SHARED_MEMORY, Cache, open_cache
from common.distributed import number_in, process_rank, say
from common.errors import DataError
from common.images import open_image, read_pixels
from common.splits import Splits
from transforms import Preprocessing, eval_view, eval_view_text, seed_of, to_tensor, train_transform

EVAL_BATCH = 64  # images; a constant, so that the figures of an evaluation depend on nothing else
PREFETCH, IN_USE = 2, 2  # batches that each loader process prepares ahead, and that the loop holds


class ImageList:
    """A map-style data set of (transformed image, class index) over (path, class index) pairs.

    The key of an image is its position i, or a tuple that ends with it, such as (seed, epoch, i). `read` makes the
    image from its path; the transform is called with image and key, from which it may draw its randomness.
    """

    def __init__(self, items: Sequence[tuple[str, int]], transform: Callable, read: Callable = open_image):
        self.items, self.transform, self.read = items, transform, read

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | tuple[int, ...]):
        path, label = self.items[key[-1] if isinstance(key, tuple) else key]
        return self.transform(self.read(path), key), label


class ForgivingImages(ImageList):
    """An ImageList that replaces an unreadable image by another one, drawn from (seed, epoch, i).

    Items have a third entry: the position of the unreadable image, or -1.
    """

    def __getitem__(self, key: tuple[int, int, int]):
        seed, epoch, i = key
        j, attempt = i, 0
        while True:
            try:
                return *super().__getitem__((seed, epoch, j)), (i if attempt else -1)
            except DataError:
                attempt += 1
                if attempt == 100:
                    raise
                j = seed_of('replacement', seed, epoch, i, attempt) % len(self)


def eval_images(items: list[tuple[str, int]], preprocessing: Preprocessing, cache: Cache | None) -> ImageList:
    """Images as an evaluation sees them; with a cache, each is prepared only once."""
    view = dict(what=eval_view_text(preprocessing), prepare=eval_view(*preprocessing.view))
    return ImageList(items, to_tensor, partial(read_pixels, cache=cache, bits=preprocessing.bits, **view))


class Batches:
    """A batch sampler: subclasses define `largest`, the images of a full batch, and `batches`, those of one pass."""

    withheld = False  # there are none yet, see make_loader

    def __iter__(self) -> Iterator[list]:
        return iter(()) if self.withheld else self.batches()


class TrainBatches(Batches):
    """The keys (seed, epoch, i) of each batch of an epoch, in an order drawn from (seed, epoch).

    Each process takes its share of every global batch, in `accumulate` parts; images that do not fill a global batch
    are left out of the epoch. Set `epoch` before iterating, and `first` to start at a later step of it.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1, accumulate: int = 1):
        self.length, self.batch_size, self.seed, self.rank, self.world = length, batch_size, seed, rank, world
        self.accumulate, self.epoch, self.first = accumulate, 0, 0
        self.steps = length // batch_size  # global batches in an epoch
        self.largest = batch_size // world // accumulate

    def __len__(self) -> int:
        return (self.steps - self.first) * self.accumulate

    def batches(self) -> Iterator[list[tuple[int, int, int]]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        for step in range(self.first, self.steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.world].tolist()
            for part in range(self.accumulate):
                yield [(self.seed, self.epoch, i) for i in batch[part :: self.accumulate]]


class EvalBatches(Batches):
    """All indices in order, cut into batches that do not depend on the number of processes.

    Process `rank` takes every world-th batch; `slots` are their numbers.
    """

    def __init__(self, length: int, rank: int = 0, world: int = 1, batch_size: int = EVAL_BATCH):
        self.length, self.batch_size, self.largest = length, batch_size, min(batch_size, length)
        self.slots = range(rank, math.ceil(length / batch_size), world)

    def __len__(self) -> int:
        return len(self.slots)

    def batches(self) -> Iterator[list[int]]:
        for slot in self.slots:
            first = slot * self.batch_size
            yield list(range(first, min(first + self.batch_size, self.length)))


def make_loaders(
    args: argparse.Namespace, splits: Splits, device: torch.device, preprocessing: Preprocessing
) -> list[DataLoader]:
    """The loaders of train.py: of the training, validation and test images of a fold."""
    rank, world = process_rank()
    cache = open_cache(args.cache)
    more = dict(vflip=args.vflip, rotate=args.rotate, erase=args.erase)
    more |= dict(resize=preprocessing.resize, statistics=preprocessing.statistics)
    augmentation = train_transform(args.img_size, args.crop_scale, args.hflip, args.randaug_n, args.randaug_m, **more)
    train = ImageList(splits.train, augmentation, partial(read_pixels, cache=cache, bits=preprocessing.bits))
    pairs = [(train, TrainBatches(len(train), args.batch_size, args.seed, rank, world))]
    for items in (splits.val, splits.test):
        pairs.append((eval_images(items, preprocessing, cache), EvalBatches(len(items), rank, world)))
    return start_loaders(pairs, args, device)


def start_loaders(
    pairs: list[tuple[ImageList, Batches]], args: argparse.Namespace, device: torch.device, ignore_signals: bool = False
) -> list[DataLoader]:
    """A loader for each data set and sampler, with --num_workers processes each, or as many as memory has room for."""
    image = 3 * args.img_size**2  # bytes, uint8
    processes = loader_processes(args.num_workers, [(len(batches), batches.largest * image) for _, batches in pairs])
    return [make_loader(images, batches, processes, device, ignore_signals) for images, batches in pairs]


def workers_of(num_workers: int | None, device: torch.device) -> int:
    """--num_workers, or its default."""
    return num_workers if num_workers is not None else 4 if device.type == 'cuda' else 1


def loader_processes(asked: int, batches: list[tuple[int, int]]) -> int:
    """The number of loader processes that shared memory has room for, at most `asked`; a note says if it is less.

    They pass their batches through /dev/shm, which has 64 MB in a Docker container. `batches` are (number, bytes) of
    the batches of each loader; one loader is read at a time.
    """
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # a system without it
        return asked
    free //= number_in('LOCAL_WORLD_SIZE') or 1 if process_rank()[1] > 1 else 1

    def in_flight(processes: int) -> int:
        ahead = PREFETCH * processes + IN_USE if processes else 0  # without processes nothing is shared
        return max(size * min(number, ahead) for number, size in batches)

    fits = next(processes for processes in range(asked, -1, -1) if in_flight(processes) <= free)
    if fits < asked:
        say(
            f'note: batches of {asked} loader processes need {in_flight(asked) / 2**20:.0f} MiB of {SHARED_MEMORY}, '
            f'where {free / 2**20:.0f} are free: --num_workers {fits} is taken (docker run --shm-size=8g gives more)'
        )
    return fits


def make_loader(
    data: ImageList, batches: Batches, num_workers: int, device: torch.device, ignore_signals: bool = False
) -> DataLoader:
    """A loader whose processes start now and live as long as it does.

    Args:
        ignore_signals: the processes survive a signal to the whole process group, so that the main process can take
            a few more batches before it stops; it then calls end_loaders.
    """
    loader = DataLoader(
        data,
        batch_sampler=batches,
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers > 0 else None,
        persistent_workers=num_workers > 0,
        pin_memory=device.type == 'cuda',
        worker_init_fn=partial(_leave_signals_to_parent, ignore_all=ignore_signals),
        # The sampler has its own order; without a generator the loader would draw from the model's random stream.
        generator=torch.Generator(),
    )
    if num_workers > 0:
        # Later this process holds gigabytes, and after a fork it would have to copy each page that it writes. A loader
        # fetches its first batches as soon as it starts its processes, but the epoch is not known yet.
        batches.withheld = True
        iter(loader)
        batches.withheld = False
    return loader


def watch(loader: Iterable, clock: dict, bad: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of a loader of ForgivingImages; adds up the seconds of waiting in `clock`, bad images in `bad`."""
    batches = iter(loader)
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        clock['loader'] += time.perf_counter() - start
        if batch is None:
            return
        images, labels, replaced = batch
        bad += replaced[replaced >= 0].tolist()
        yield images, labels


def _leave_signals_to_parent(_: int, ignore_all: bool) -> None:
    """The main process handles a signal to the whole group; a loader process exits, and not as a failure."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if ignore_all else lambda *_: os._exit(0))
    sys.excepthook = _unless_parent_left


def end_loaders() -> None:
    """Kill the remaining loader processes, also those that ignore signals, so that Python does not wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report a failure
    for child in multiprocessing.active_children():
        child.kill()


def _unless_parent_left(kind: type[BaseException], error: BaseException, traceback) -> None:
    """Print a traceback, but not that of the thread that passes tensors on when the main process has hung up."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, traceback)
