"""From lists of images to batches: the data set as torch's loader reads it, samplers, and loader processes."""

import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.utils.data import DataLoader

from common.cache import SHARED_MEMORY, Cache
from common.distributed import number_in, process_rank, say
from common.images import open_image, read_pixels
from transforms import eval_view, eval_view_text, seed_of, to_tensor

EVAL_BATCH = 64  # images; a constant, so that the figures of an evaluation depend on nothing else
PREFETCH, IN_USE = 2, 2  # batches that each loader process prepares ahead, and that the loop holds


class ImageList:
    """A map-style data set over one subset.

    Args:
        items: (path, class index) pairs.
        transform: called as transform(image, key), where key is the index given to __getitem__; the training
            transform draws its randomness from it.
        read: what makes the image from a path.

    Indexing takes an int, or a tuple whose last entry is the position, e.g. (seed, epoch, i); it returns
    (transformed image, class index).
    """

    def __init__(self, items: list[tuple[str, int]], transform: Callable, read: Callable = open_image):
        self.items, self.transform, self.read = items, transform, read

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | tuple[int, ...]):
        path, label = self.items[key[-1] if isinstance(key, tuple) else key]
        return self.transform(self.read(path), key), label


class TrainBatches:
    """Batch sampler: the keys (seed, epoch, i) of each batch of an epoch, in an order drawn from (seed, epoch).

    Of every global batch each process takes its share, in `accumulate` parts; images that fill no whole batch sit the
    epoch out. Set `epoch` before iterating, and `first` to begin within it. There are none while `idle` is true.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1, accumulate: int = 1):
        self.length, self.batch_size, self.seed, self.rank, self.world = length, batch_size, seed, rank, world
        self.accumulate, self.epoch, self.first, self.idle = accumulate, 0, 0, False

    @property
    def steps(self) -> int:
        """Global batches in an epoch."""
        return self.length // self.batch_size

    def __len__(self) -> int:
        return (self.steps - self.first) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        if self.idle:
            return
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        for step in range(self.first, self.steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.world].tolist()
            for part in range(self.accumulate):
                yield [(self.seed, self.epoch, i) for i in batch[part :: self.accumulate]]


class EvalBatches:
    """Batch sampler: all indices in order, cut into batches that do not depend on the number of processes.

    Process `rank` takes every world-th batch; `slots` are their numbers. There are none while `idle` is true.
    """

    def __init__(self, length: int, rank: int = 0, world: int = 1, batch_size: int = EVAL_BATCH):
        self.length, self.batch_size, self.idle = length, batch_size, False
        self.slots = range(rank, math.ceil(length / batch_size), world)

    def __len__(self) -> int:
        return len(self.slots)

    def __iter__(self) -> Iterator[list[int]]:
        for slot in () if self.idle else self.slots:
            yield list(range(slot * self.batch_size, min((slot + 1) * self.batch_size, self.length)))


def eval_images(items: list[tuple[str, int]], img_size: int, cache: Cache | None, bits: int | None = None) -> ImageList:
    """Images as an evaluation sees them; where there is a cache, each is prepared once."""
    what, view = eval_view_text(img_size), eval_view(img_size)
    read = partial(read_pixels, cache=cache, what=what, prepare=view, bits=bits)
    return ImageList(items, to_tensor, read)


def loader_processes(asked: int, batches: list[tuple[int, int]]) -> int:
    """As many loader processes as there is shared memory for, at most `asked`; says so where they are fewer.

    They hand their batches over in /dev/shm, of which a container of Docker's has 64 MB.

    Args:
        batches: (number, bytes) of the batches of each loader; one loader is read at a time.
    """
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # a system without it
        return asked
    free //= number_in('LOCAL_WORLD_SIZE') or 1 if process_rank()[1] > 1 else 1

    def in_flight(processes: int) -> int:
        ahead = PREFETCH * processes + IN_USE if processes else 0  # this process itself needs no sharing
        return max(size * min(number, ahead) for number, size in batches)

    fits = next(processes for processes in range(asked, -1, -1) if in_flight(processes) <= free)
    if fits < asked:
        say(
            f'note: batches of {asked} loader processes need {in_flight(asked) / 2**20:.0f} MiB of {SHARED_MEMORY}, '
            f'where {free / 2**20:.0f} are free: --num_workers {fits} is taken (docker run --shm-size=8g gives more)'
        )
    return fits


def image_bytes(img_size: int) -> int:
    """Of an image on its way to the device, uint8."""
    return 3 * img_size * img_size


def make_loader(
    data: ImageList, batches, num_workers: int, device: torch.device, steadfast: bool = False
) -> DataLoader:
    """A loader whose processes live as long as it does; steadfast ones outlast a signal to the whole process group."""
    loader = DataLoader(
        data,
        batch_sampler=batches,
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers > 0 else None,
        persistent_workers=num_workers > 0,
        pin_memory=device.type == 'cuda',
        worker_init_fn=_outlast_signals if steadfast else _leave_signals_to_parent,
        # The order of the batches is ours; without a generator the loader would draw from the model's stream.
        generator=torch.Generator(),
    )
    if num_workers > 0:
        # Start them now. Later this process holds gigabytes, and a fork makes it copy each page that it writes next.
        batches.idle = True
        iter(loader)
        batches.idle = False
    return loader


def _leave_signals_to_parent(_: int) -> None:
    """A signal to the whole process group is the main process's to handle; a loader only goes, and not as a failure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    sys.excepthook = _unless_parent_left


def _outlast_signals(_: int) -> None:
    """The main process needs a few more batches before it can stop; it ends its loaders itself (see end_loaders)."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _unless_parent_left


def end_loaders() -> None:
    """Kill what is left of the loader processes, the steadfast ones too, before Python waits for them at its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it a failure
    for child in multiprocessing.active_children():
        child.kill()


def _unless_parent_left(kind: type[BaseException], error: BaseException, traceback) -> None:
    """The thread that hands tensors over would print a traceback when the main process, stopping, hangs up on it."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, traceback)
