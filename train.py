"""Train one model on one fold of one data set.

    python train.py                                            # the demo: twistnet18 on procedural textures
    python train.py --data_dir data/dtd --dataset dtd --model twistnet18 --fold 1 --seed 42 --pretrained
    torchrun --nproc_per_node=4 train.py --data_dir data/dtd --dataset dtd

The run goes into its folder under --run_dir (see runs.py). An interrupted run goes on with the same command and ends
in the same bits; a complete one is left alone.
"""

import options
import runs

if __name__ == '__main__':
    with runs.user_errors('train.py'):
        options.parse_args()  # --help and mistyped options are answered before torch is there, which takes seconds

import argparse
import contextlib
import ctypes
import io
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import models
from cache import SHARED_MEMORY, Cache, CacheError, open_cache
from compute_flops import NO_FVCORE, measure
from datasets import (
    DataError,
    ImageList,
    Splits,
    bits_of,
    load_splits,
    passed_over,
    read_pixels,
    split_digest,
    tree_digest,
)
from inside import watch_selection
from models import ModelError, TwistNet
from runs import BUSY, RunBusy, RunError
from transforms import eval_settings, eval_view, mix, normalize, seed_of, to_tensor, train_transform

EVAL_BATCH = 64  # images; a constant, so that the figures of an evaluation depend on nothing else
CHECK_EVERY = 20  # steps between two looks at the loss, each of which waits for the device
NOT_FINITE = 'the checkpoints of the epochs before are kept; try a lower --lr or --amp off'
JOB = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')  # what torchrun tells each of its processes
JOIN_MINUTES = 10  # to wait for the other processes where torchrun does not watch over them
PREFETCH, IN_USE = 2, 2  # batches that each loader process prepares ahead, and that the loop holds
AMP_DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, off=torch.float32)


# ---------------------------------------------------------------------------------------------- system


class ProcessError(RunError):
    """An error of one process among several, which therefore speaks for itself."""


def number_in(variable: str) -> int | None:
    """A number from 0 in the environment; None where the variable is missing or holds something else."""
    text = os.environ.get(variable, '')
    return int(text) if text.isdecimal() else None


def process_rank() -> tuple[int, int]:
    """Rank of this process and number of processes, as torchrun announces them; (0, 1) without it, see check_job."""
    rank, world, port = (number_in(name) for name in ('RANK', 'WORLD_SIZE', 'MASTER_PORT'))
    announced = None not in (rank, world, port) and os.environ.get('MASTER_ADDR')
    return (rank, world) if announced and rank < world else (0, 1)


def under_torchrun() -> bool:
    return 'TORCHELASTIC_RUN_ID' in os.environ


def check_job() -> None:
    """Say that a WORLD_SIZE without a job around it does not count.

    Raises:
        RunError: several processes are announced, but not so that they can meet.
    """
    if process_rank()[1] > 1 or os.environ.get('WORLD_SIZE', '1') in ('', '1'):
        return
    known = ', '.join(f'{name}={os.environ[name]}' for name in JOB if name in os.environ)
    missing = [name for name in JOB if not os.environ.get(name)]
    if 'RANK' in os.environ or (number_in('SLURM_STEP_NUM_TASKS') or 1) > 1:
        wrong = f'without {", ".join(missing)}' if missing else 'which cannot be'
        raise RunError(f'the environment says {known}, {wrong}; unset WORLD_SIZE and RANK, or start with torchrun')
    say(f'note: {known} without {", ".join(missing)} is taken for a leftover: one process (torchrun starts several)')


def find_device(name: str) -> torch.device:
    """The device that --device names, with its index: without one torch.cuda.set_device would refuse it.

    Args:
        name: 'auto', 'cpu', 'cuda' (of several processes: each one's own) or 'cuda:N'.

    Raises:
        RunError: there is no such device, or several processes would share it.
    """
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    match = re.fullmatch(r'cpu|cuda(?::([0-9]+))?', name)
    if not match:
        raise RunError(f"--device '{name}' must be auto, cpu, cuda or cuda:N")
    if name == 'cpu':
        return torch.device('cpu')
    several = process_rank()[1] > 1
    if match[1] and (several or under_torchrun()):
        raise RunError(f'--device {name}: torchrun gives each process a device of its own; leave the number out')
    count = torch.cuda.device_count()
    index = int(match[1] or 0) if not several else local_index(count)
    if index >= count:
        found = f'there {"is" if count == 1 else "are"} {count} CUDA device{"" if count == 1 else "s"} here'
        raise RunError(f'--device {name}: {found}' + f', and this is process {index} of its machine' * several)
    return torch.device('cuda', index)


def local_index(count: int) -> int:
    """The index of this process's own device among the `count` of its machine.

    torchrun says it. srun does not, but numbers its tasks, unless each of them is shown its own device alone.

    Raises:
        RunError: nothing says it.
    """
    index = number_in('LOCAL_RANK')
    if index is None and count == 1:
        return 0
    if index is None and number_in('SLURM_STEP_NUM_TASKS') == process_rank()[1]:
        index = number_in('SLURM_LOCALID')
    if index is None:
        raise RunError(f"LOCAL_RANK does not say which of the {count} CUDA devices is this process's; use torchrun")
    return index


def setup(device: str, seed: int) -> torch.device:
    """Ask for deterministic kernels, join the process group where there are several processes, seed.

    Args:
        device: as for find_device.

    Raises:
        RunError: there is no such device, or the processes do not meet.
    """
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.backends.cudnn.benchmark = False
    keep_freed_memory()
    check_job()
    place = find_device(device)
    if place.type == 'cuda':
        torch.cuda.set_device(place)
    if process_rank()[1] > 1:
        join('gloo' if place.type == 'cpu' else 'nccl')
    torch.manual_seed(seed)
    return place


def keep_freed_memory() -> None:
    """Have the C library keep what is freed: a step would get it back from the system page by page."""
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)  # glibc's
    if mallopt is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def join(backend: str) -> None:
    """Join the process group, with keys in the store that no earlier process has used.

    torchrun keeps one store through all restarts, and with it the addresses of processes that are dead, which the new
    ones would try to reach. So the main process offers a new prefix, and the others take it when it has answered them.

    Raises:
        ProcessError: the other processes do not come.
    """
    rank, world = process_rank()
    store = open_store(rank, world)
    mine = prefix = uuid.uuid4().hex

    def answered() -> bool:
        nonlocal prefix
        if store.check(['offer']):
            prefix = store.get('offer').decode()
            store.set(f'{prefix}/{rank}', mine)
        return store.check([mine])

    if rank == 0:
        if store.check(['offer']):
            os.environ['TORCHELASTIC_RESTART_COUNT'] = '1'  # torchrun counts only the restarts of its own machine
        store.set('offer', mine)
        for other in range(1, world):
            wait_for_others(lambda other=other: store.check([f'{mine}/{other}']))
            store.set(store.get(f'{mine}/{other}').decode(), 'welcome')
    else:
        wait_for_others(answered)
    dist.init_process_group(
        backend, store=dist.PrefixStore(prefix, store), rank=rank, world_size=world, timeout=timedelta(hours=1)
    )


def open_store(rank: int, world: int) -> dist.Store:
    """torchrun's store, or without torchrun the one that rank 0 opens at MASTER_ADDR and MASTER_PORT.

    Raises:
        ProcessError: it cannot be opened or reached.
    """
    patience = timedelta(hours=1)  # other processes wait while the main one lists a million files
    if under_torchrun():
        return next(dist.rendezvous('env://', timeout=patience))[0]
    found: list[dist.Store] = []

    def reached() -> bool:
        try:  # for seconds at a time: while it waits, it hears no signal
            address, port, seconds = os.environ['MASTER_ADDR'], number_in('MASTER_PORT'), timedelta(seconds=3)
            found.append(dist.TCPStore(address, port, world, rank == 0, seconds, wait_for_workers=False))
        except (RuntimeError, ValueError, TypeError) as error:  # nobody there yet; a port that is taken, or is none
            if rank == 0:
                reason = str(error).splitlines()[0]
                raise ProcessError(f'{meeting_place()}: cannot be opened ({reason}); {NO_JOB}') from error
        return bool(found)

    wait_for_others(reached)
    found[0].set_timeout(patience)
    return found[0]


NO_JOB = 'unset WORLD_SIZE for a single process, or start them all with torchrun'


def meeting_place() -> str:
    return f'{os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]}'


def wait_for_others(ready: Callable[[], bool]) -> None:
    """Poll, so that a signal is heard; say so when it takes long.

    Raises:
        ProcessError: torchrun does not watch over the processes, and it is not ready after JOIN_MINUTES.
    """
    begun, told = time.monotonic(), under_torchrun()
    while not ready():
        waited, (rank, world) = time.monotonic() - begun, process_rank()
        if not under_torchrun() and waited > 60 * JOIN_MINUTES:
            raise ProcessError(f'{meeting_place()}: not all of the {world} processes came; {NO_JOB}')
        if not told and waited > 5:
            print(f'process {rank} of {world} waits for the others at {meeting_place()}; {NO_JOB}', file=sys.stderr)
            told = True
        time.sleep(0.02)


def was_restarted() -> bool:
    """In the main process: torchrun has started this one in the place of one that died."""
    return (number_in('TORCHELASTIC_RESTART_COUNT') or 0) > 0


def resolve_amp(amp: str, device: torch.device) -> str:
    """'auto' is bf16 where the processor computes it natively, else fp16 on CUDA and off on a CPU."""
    if amp != 'auto':
        return amp
    if device.type == 'cuda':
        return 'bf16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'fp16'
    if hasattr(torch.cpu, 'get_capabilities'):
        features = torch.cpu.get_capabilities()
    else:  # before torch 2.10; the oldest cannot tell
        features = {'avx512_bf16': getattr(torch.cpu, '_is_avx512_bf16_supported', bool)()}
    return 'bf16' if any(present for name, present in features.items() if 'bf16' in name) else 'off'


def autocast(device: torch.device, amp: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=AMP_DTYPES[amp], enabled=amp != 'off')


def is_main() -> bool:
    """True in the process that writes files and talks."""
    return process_rank()[0] == 0


def say(message: str) -> None:
    """Progress: a line on stderr, from the main process, above the progress bar."""
    if is_main():
        tqdm.write(message, file=sys.stderr)


# ---------------------------------------------------------------------------------------------- configuration


def describe_run(args: argparse.Namespace, splits: Splits, device: torch.device, world: int) -> dict:
    """What config.json holds: options as resolved, environment, and the fingerprint of what defines the result.

    The fingerprint covers every option that can change a bit of the result, the number of processes, the names of the
    images of the split and the sizes of those that train and validate, and the bytes of the initial weights; on one
    machine with one thread count it decides the run. `tree` is a digest of the data set with all its folds: runs of
    several folds are of one data set if it is the same.
    """
    values = {k: v for k, v in vars(args).items() if k != 'force'}
    weights = models.weights_source(args.model, args.pretrained)
    if isinstance(weights, Path):
        try:
            weights = runs.digest(weights.read_bytes())
        except OSError as error:
            raise ModelError(f'{weights}: cannot read the weights ({error.strerror})') from error
    defines = {k: v for k, v in values.items() if k not in options.SYSTEM_OPTIONS}
    defines |= dict(processes=world, split=split_digest(splits), pretrained=weights)
    fingerprint = runs.digest(json.dumps(defines, sort_keys=True).encode())
    tree = tree_digest(args.dataset, args.data_dir, splits)
    return dict(options=values, defines=defines, environment=environment_of(device), fingerprint=fingerprint, tree=tree)


def environment_of(device: torch.device) -> dict:
    """What may change the last bits of a result beside its configuration."""
    return dict(
        python=platform.python_version(),
        torch=str(torch.__version__),  # a class of its own, which a checkpoint must not hold
        torchvision=str(torchvision.__version__),
        timm=timm.__version__,
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        threads=torch.get_num_threads(),
        commit=runs.git_commit(),
    )


def opening(
    data: str, images: dict[str, int], classes: int, model: str, weights: str | None, environment: dict, amp: str
) -> str:
    """The line that a run begins with: what is trained on what, and how it is computed.

    Args:
        data: the data set in words.
        images: how many to 'train', 'validate', ..
        classes: how many.
        model: its name.
        weights: the sentence of models.build_model that says what was loaded; None for nothing.
        environment: as environment_of gives it.
        amp: as resolved.
    """
    counts = ', '.join(f'{count} to {what}' for what, count in images.items())
    weights = 'from scratch' if weights is None else weights.partition(';')[0]
    processes = f' ({world_size()} processes)' if world_size() > 1 else ''
    return (
        f'{data}, images: {counts}; classes: {classes}; model: {model}, weights: {weights}; '
        f'device: {environment["device"]}{processes}, precision: {"float32" if amp == "off" else amp}, '
        f'threads: {environment["threads"]}'
    )


def say_opening(args: argparse.Namespace, splits: Splits, weights: str | None, environment: dict) -> None:
    """The line that a run begins with; then which defaults were brought down, and what the tree holds besides."""
    data = args.dataset if args.data_dir is None else f'{args.dataset} in {args.data_dir}'
    if args.data_dir is not None and 'dataset' not in args.given:
        data += ' (by its layout; --dataset can name another)'
    images = dict(train=len(splits.train), validate=len(splits.val), test=len(splits.test))
    classes = len(splits.classes)
    say(opening(f'{data}, fold {args.fold}', images, classes, args.model, weights, environment, args.amp))
    for line in options.shrunk(args, options.RECIPES[args.recipe]):
        say(line)
    for line in share_object(lambda: passed_over(args.dataset, args.data_dir, splits)):
        say(f'note: {line}')


def check_batch(args: argparse.Namespace, splits: Splits, world: int) -> None:
    """Refuse a batch that the data or the processes cannot fill; bring down a default.

    Raises:
        RunError: with the option and its bounds.
    """
    n_train, n_images = len(splits.train), sum(map(len, splits[:3]))
    if 'batch_size' not in args.given:
        args.batch_size = options.largest_batch(args.batch_size, n_train, n_images, world)
    if not 2 * world <= args.batch_size <= n_train:
        raise RunError(
            f'--batch_size {args.batch_size} must be from {2 * world} (two images a process, for BatchNorm) to the '
            f'{n_train} training images'
        )
    if args.batch_size % world:
        raise RunError(f'--batch_size {args.batch_size} must be a multiple of the {world} processes')


# ---------------------------------------------------------------------------------------------- data


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
    what = f'evaluated {eval_settings(img_size)}'
    read = partial(read_pixels, cache=cache, what=what, prepare=eval_view(img_size), bits=bits)
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


# ---------------------------------------------------------------------------------------------- loop


def lr_at(step: int, lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of a step (from 0): linear warm-up to lr, then a cosine that reaches min_lr at the last step."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def train_steps(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    first_step: int,
    schedule: Callable[[int], float],
    batch_loss: Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor],
    clip_grad: float,
    accumulate: int = 1,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """The steps of the optimiser, one after another; with a fused one nothing in here waits for the device.

    Args:
        model: the plain module.
        batches: (uint8 images, labels); a whole number of steps of `accumulate` batches each.
        optimizer: a fused one skips a step whose gradients are not finite; another one takes it.
        first_step: number of the first step.
        schedule: learning rate by step.
        batch_loss: loss of (normalised images, labels, step, part of the step from 0).
        clip_grad: largest norm of all gradients together; 0 turns clipping off.
        accumulate: batches whose gradients are averaged in a step.

    Yields:
        the number of the step that was made, its mean loss in this process, and the norm of the gradients; the last two
        on the device.
    """
    model.train()
    parameters = list(model.parameters())
    for index, (images, labels) in enumerate(batches):
        step, part = first_step + index // accumulate, index % accumulate
        if part == 0:
            for group in optimizer.param_groups:
                group['lr'] = schedule(step)
            optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), device=device)
        images, labels = normalize(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
        loss = batch_loss(images, labels, step, part) / accumulate
        scaler.scale(loss).backward()
        total += loss.detach()
        if part < accumulate - 1:
            continue
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, clip_grad or math.inf)  # without a bound they are multiplied by one
        if optimizer.defaults['fused'] and not scaler.is_enabled():
            optimizer.found_inf = (~norm.isfinite()).float()
        scaler.step(optimizer)
        scaler.update()
        yield step, total, norm


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    first_step: int,
    schedule: Callable[[int], float],
    batch_loss: Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor],
    clip_grad: float,
    bar: tqdm,
) -> float:
    """One pass over the loader: the mean training loss over all processes; arguments as for train_steps.

    Raises:
        RunError: the loss is not finite.
    """
    total, steps = torch.zeros((), dtype=torch.float64, device=device), len(loader)
    made = train_steps(model, loader, optimizer, scaler, device, first_step, schedule, batch_loss, clip_grad)
    for done, (_, loss, _) in enumerate(made, start=1):
        total += loss
        if done % CHECK_EVERY == 0 or done == steps:
            mean = total.item() / done
            if not math.isfinite(mean):
                raise RunError(f'the training loss is {mean} within {done} steps of this epoch; {NOT_FINITE}')
            bar.set_postfix_str(f'loss {mean:.3f}', refresh=False)
        bar.update()
    return reduce_sum(total).item() / steps / world_size()


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, device: torch.device, amp: str, bar: tqdm) -> tuple[float, float]:
    """Cross-entropy and top-1 accuracy, each image counted once however many processes there are.

    Args:
        model: the plain module, with the same weights and buffers in every process.
        loader: over an ImageList by EvalBatches.

    Returns:
        mean loss in nats, and accuracy in percent, the same in every process.
    """
    model.eval()
    batches = loader.batch_sampler
    # A slot a batch, filled by one process each: summed in the same order whatever the number of processes.
    sums = torch.zeros(2, math.ceil(batches.length / batches.batch_size), dtype=torch.float64, device=device)
    for slot, (images, labels) in zip(batches.slots, loader):
        images, labels = normalize(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
        with autocast(device, amp):
            logits = model(images)
        sums[0, slot] = F.cross_entropy(logits.float(), labels, reduction='sum')
        sums[1, slot] = (logits.argmax(1) == labels).sum()
        bar.update()
    loss, correct = reduce_sum(sums).sum(1).tolist()
    return loss / batches.length, 100 * correct / batches.length


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mean_of(total: torch.Tensor) -> float:
    """Of (sum, count)."""
    return (total[0] / total[1]).item()


def share_object(make: Callable):
    """What make() returns in the main process, in every process; an error of ours is raised in all of them."""
    box = [None]
    if is_main():
        try:
            box = [make()]
        except (DataError, ModelError, RunError) as error:
            box = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        box[0].shared = True  # the main process speaks for all
        raise box[0]
    return box[0]


def share_weights(model: nn.Module) -> None:
    """The main process's weights and buffers in every process, so that all evaluate what is saved.

    The statistics of the last step's BatchNorms are each process's own.
    """
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def parallelise(model: nn.Module, device: torch.device, amp: str, batch_size: int, img_size: int) -> nn.Module:
    """The model with its gradients averaged over processes; itself where there is one.

    DistributedDataParallel sorts the gradients into buckets anew after its first backward pass, which changes the order
    of their sums. A pass over zeros gets that over with: the first step of a resumed run is then like any other.
    """
    if world_size() == 1:
        return model
    # Of a 1x1 kernel the two layouts are the same memory; torch warns of the strides.
    warnings.filterwarnings('ignore', 'Grad strides do not match bucket view strides')
    parallel = DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None)
    buffers = [buffer.clone() for buffer in model.buffers()]
    zeros = torch.zeros(batch_size, 3, img_size, img_size, device=device).to(memory_format=torch.channels_last)
    with autocast(device, amp):
        parallel.train()(normalize(zeros.byte())).float().sum().backward()
    parallel.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers):
            buffer.copy_(before)
    return parallel


# ---------------------------------------------------------------------------------------------- a run


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """torch.save, atomically. Raises RunError where the disk is full; what stood there before is untouched."""
    buffer = io.BytesIO()  # a full disk is then an OSError of ours, not one from inside torch.save
    torch.save(checkpoint, buffer)
    runs.write_atomic(path, buffer.getvalue())


def read_last(path: Path, fingerprint: str) -> dict | None:
    """The checkpoint to go on from; None where there is none, or only a damaged one.

    Raises:
        ModelError: the file holds code. RunError: it belongs to something else.
    """
    try:
        last = models.read_checkpoint(path)
    except FileNotFoundError:
        return None
    except models.UnsafeCheckpoint:
        raise
    except ModelError as error:
        say(f'note: {error}; starting again from epoch 1, which ends in the same bits')
        return None
    if not isinstance(last, dict) or last.get('fingerprint') != fingerprint:
        raise RunError(f'{path} is not of this run; move it away, or --force to start again')
    return last


@contextlib.contextmanager
def machine_errors() -> Iterator[None]:
    """The body, in which what torch reports of the machine is an error of one line that says the way out.

    Raises:
        ProcessError: no compiler, too little memory of one kind or another, a loader process that was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if told := explain(error):
            raise ProcessError(told) from error
        raise


def explain(error: RuntimeError) -> str | None:
    """What an error of torch's means to the user; None for one that is not the machine's."""
    text, module = str(error), type(error).__module__
    if isinstance(error, (DataError, ModelError, RunError)):
        return None
    if module.startswith(('torch._dynamo.', 'torch._inductor.')):
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.endswith('raised:')]
        why = lines[0] if lines else type(error).__name__
        return f'--compile: {why}; torch.compile needs a C++ compiler such as g++; without --compile it runs too'
    if re.search('shared memory|Bus error', text):
        return (
            f'the loader processes ran out of {SHARED_MEMORY}; fewer --num_workers need less, 0 none (docker run '
            '--shm-size=8g gives more)'
        )
    if found := re.search(r'DataLoader worker \(pid.*\) (is killed by signal: [\w ]+|exited unexpectedly)', text):
        return f'a loader process {found[1]}, perhaps for want of memory; fewer --num_workers need less'
    if re.search("out of memory|can't allocate memory", text):
        return 'the device has too little memory; a smaller --batch_size or --img_size needs less'
    return None


def weights_file(args: argparse.Namespace, classes: list[str], run: dict, state_dict: dict) -> dict:
    """What best.pt holds: the weights after the last epoch of a run's history, and where they come from."""
    return dict(
        model=args.model,
        num_classes=len(classes),
        classes=classes,
        epoch=run['best_epoch'],
        val_acc=run['best_val_acc'],
        state_dict={k: v.detach().cpu().contiguous() for k, v in state_dict.items()},
        transform=eval_settings(args.img_size),
    )


def holds_best(folder: Path, run: dict) -> bool:
    """Whether the best weights of a run are there, in best.pt or, where its last epoch is the best one, in last.pt.

    last.pt is written first: a run killed between the two still has what is to become best.pt.
    """
    if run['best_epoch'] == len(run['history']):
        return True
    try:
        best = models.read_checkpoint(folder / 'best.pt')
    except (FileNotFoundError, ModelError):
        return False
    wanted = dict(epoch=run['best_epoch'], val_acc=run['best_val_acc'])
    return isinstance(best, dict) and wanted.items() <= best.items()


def begin(folder: Path, config: dict, force: bool) -> tuple[dict | None, dict | None]:
    """Open the run folder: the results if the run is complete, else the checkpoint to go on from, if any."""
    runs.claim(folder)
    results, note = runs.open_run(folder, config, force)
    if note:
        say(f'note: {folder} was {note}; its last bits may differ from an undisturbed run')
    if results is not None:
        (folder / 'last.pt').unlink(missing_ok=True)
        say(f'{folder} is complete; --force would start it again')
        return results, None
    last = read_last(folder / 'last.pt', config['fingerprint'])
    if last and not holds_best(folder, last['run']):
        say(f'note: {folder / "best.pt"} is missing or of another epoch than the best one; starting again from epoch 1')
        last = None
    if last is None:
        runs.write_json(folder / 'config.json', config)  # of the environment that makes every epoch
    return None, last


def train(args: argparse.Namespace) -> tuple[Path, dict]:
    """Train and test as the options say; returns the run folder and what its results.json holds."""
    options.check(args)
    splits = load_splits(args.dataset, args.data_dir, args.fold)
    rank, world = process_rank()
    check_batch(args, splits, world)
    device = setup(args.device, args.seed)
    args.device, args.amp = device.type, resolve_amp(args.amp, device)
    if args.num_workers is None:
        args.num_workers = 4 if device.type == 'cuda' else 1
    folder = Path(args.run_dir) / runs.run_name(args.dataset, args.fold, args.model, args.seed)
    config = describe_run(args, splits, device, world)
    results, last = share_object(lambda: begin(folder, config, args.force))
    if results is not None:
        return folder, results

    # Model and optimiser, new or as they were.
    num_classes = len(splits.classes)
    model = models.build_model(args.model, num_classes, False if last else args.pretrained, args.img_size)
    size = measure(args.model, num_classes, args.img_size)  # now: what cannot be counted must not end a trained run
    if size['macs_G'] is None:
        say(NO_FVCORE)
    new = dict(history=[], best_val_acc=-1.0, best_epoch=0, pretrained=model.pretrained, loaded=model.loaded)
    run = last['run'] if last else new
    say_opening(args, splits, run['pretrained'], config['environment'])
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, nesterov=args.momentum > 0, weight_decay=args.weight_decay
    )
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    if last:
        model.load_state_dict(last['state_dict'])
        optimizer.load_state_dict(last['optimizer'])
        scaler.load_state_dict(last['scaler'])
        say(f'{folder}: going on after epoch {len(run["history"])}')
        if is_main() and run['best_epoch'] == len(run['history']):
            save_checkpoint(folder / 'best.pt', weights_file(args, splits.classes, run, last['state_dict']))
    if args.compile:
        model.compile()  # in place: names in the state dict stay as they are
    parallel = parallelise(model, device, args.amp, args.batch_size // world, args.img_size)

    # Batches.
    cache = open_cache(args.cache)
    bits, notes = bits_of(splits)
    for note in notes:
        say(f'note: {note}')
    train_batches = TrainBatches(len(splits.train), args.batch_size, args.seed, rank, world)
    evaluated = [EvalBatches(len(items), rank, world) for items in (splits.val, splits.test)]
    sizes = [(train_batches.steps, args.batch_size // world), *((len(b), min(EVAL_BATCH, b.length)) for b in evaluated)]
    image = image_bytes(args.img_size)
    args.num_workers = loader_processes(args.num_workers, [(number, images * image) for number, images in sizes])
    augmentation = train_transform(args.img_size, args.crop_scale, args.hflip, args.randaug_n, args.randaug_m)
    train_images = ImageList(splits.train, augmentation, partial(read_pixels, cache=cache, bits=bits))
    train_loader = make_loader(train_images, train_batches, args.num_workers, device)
    val_loader, test_loader = (
        make_loader(eval_images(items, args.img_size, cache, bits), batches, args.num_workers, device)
        for items, batches in zip((splits.val, splits.test), evaluated)
    )

    # What a step does, by its number.
    steps = len(train_loader)

    def schedule(step: int) -> float:
        return lr_at(step, args.lr, args.min_lr, args.warmup_epochs * steps, args.epochs * steps)

    def batch_loss(images: torch.Tensor, labels: torch.Tensor, step: int, _: int) -> torch.Tensor:
        images, targets = mix(images, labels, num_classes, args.mixup, args.cutmix, ('mix', args.seed, step, rank))
        with autocast(device, args.amp):
            return F.cross_entropy(parallel(images), targets, label_smoothing=args.label_smoothing)

    bar = tqdm(
        total=args.epochs * (steps + len(val_loader)) + 2 * len(test_loader),
        initial=len(run['history']) * (steps + len(val_loader)),
        disable=None if is_main() else True,  # None: off where stderr is no terminal
        **runs.terminal(),
        smoothing=0.05,
    )
    for epoch in range(len(run['history']) + 1, args.epochs + 1):
        bar.set_description(f'{folder.name} epoch {epoch}/{args.epochs}', refresh=False)
        torch.manual_seed(seed_of('model', args.seed, epoch, rank))  # dropout and the like
        train_batches.epoch = epoch
        first_step = (epoch - 1) * steps
        start = time.perf_counter()
        train_loss = train_epoch(
            model, train_loader, optimizer, scaler, device, first_step, schedule, batch_loss, args.clip_grad, bar
        )
        train_seconds = time.perf_counter() - start
        share_weights(model)
        with watch_selection(model) as selection:
            val_loss, val_acc = evaluate(model, val_loader, device, args.amp, bar)
        if not math.isfinite(val_loss):
            raise RunError(f'the validation loss is {val_loss} after epoch {epoch}; {NOT_FINITE}')
        line = dict(
            epoch=epoch,
            lr=schedule(epoch * steps - 1),
            train_loss=train_loss,
            val_loss=val_loss,
            val_acc=val_acc,
            seconds=round(time.perf_counter() - start, 3),
            images_per_second=round(steps * args.batch_size / train_seconds, 1),
            gates=model.gates() if isinstance(model, TwistNet) else {},
            selection={name: mean_of(reduce_sum(total)) for name, total in selection.items()},
        )
        run['history'].append(line)
        improved = val_acc >= run['best_val_acc']  # the later on ties
        if improved:
            run |= dict(best_val_acc=val_acc, best_epoch=epoch)
        if is_main():
            last = dict(
                fingerprint=config['fingerprint'],
                state_dict=model.state_dict(),
                optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(),
                run=run,
            )
            save_checkpoint(folder / 'last.pt', last)  # before best.pt, see holds_best
            if improved:
                best = weights_file(args, splits.classes, run, model.state_dict())
                save_checkpoint(folder / 'best.pt', best)
            runs.write_log(folder / 'log.jsonl', run['history'])
        if bar.disable:
            left = (args.epochs - epoch) * sum(line['seconds'] for line in run['history']) / epoch
            say(
                f'{folder.name} epoch {epoch}/{args.epochs}: train loss {train_loss:.3f}, val {val_acc:.2f} %, '
                f'{line["seconds"]:.1f} s, {tqdm.format_interval(left)} left'
            )

    # The test set, once: the last weights for the record, the chosen ones for the result.
    bar.set_description(f'{folder.name} test', refresh=False)
    _, test_acc_last = evaluate(model, test_loader, device, args.amp, bar)
    if is_main():
        model.load_state_dict(models.read_checkpoint(folder / 'best.pt')['state_dict'])
    share_weights(model)
    test_loss, test_acc = evaluate(model, test_loader, device, args.amp, bar)
    bar.close()
    results = dict(
        dataset=args.dataset,
        fold=args.fold,
        seed=args.seed,
        model=args.model,
        test_acc=test_acc,
        test_loss=test_loss,
        best_val_acc=run['best_val_acc'],
        best_epoch=run['best_epoch'],
        test_acc_last=test_acc_last,
        params_M=size['params_M'],
        macs_G=size['macs_G'],  # of one image of this run; None without fvcore
        seconds=round(sum(line['seconds'] for line in run['history']), 1),
        n_train=len(splits.train),
        n_val=len(splits.val),
        n_test=len(splits.test),
        pretrained=run['pretrained'],
        loaded=run.get('loaded'),  # a checkpoint of older code does not say
        fingerprint=config['fingerprint'],
    )
    if is_main():
        runs.write_log(folder / 'log.jsonl', run['history'])  # a run killed between last.pt and the log left it short
        runs.write_json(folder / 'results.json', results)
        (folder / 'last.pt').unlink(missing_ok=True)
    return folder, results


# ---------------------------------------------------------------------------------------------- command line


def main(args: argparse.Namespace) -> None:
    with machine_errors():
        folder, results = train(args)
    if is_main():
        print(
            f'{folder}: test accuracy {results["test_acc"]:.2f} % (epoch {results["best_epoch"]}, chosen by '
            f'validation accuracy {results["best_val_acc"]:.2f} %); last epoch {results["test_acc_last"]:.2f} %'
        )


def cli(argv: list[str] | None = None) -> None:
    """main, with what a user can mend as one line on stderr and an exit code that is not 0."""
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    try:
        args = options.parse_args(argv)
    except RunError as error:
        fail('train.py', error)
    try:
        main(args)
    except (DataError, ModelError, RunError) as error:
        fail('train.py', error)
    except KeyboardInterrupt as stop:
        again = 'the same command without --force' if args.force else 'the same command'
        say(f'stopped; {again} goes on from the last whole epoch')
        sys.exit(128 + stop.args[0])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def fail(script: str, error: Exception) -> NoReturn:
    """End this process over an error of ours: one line on stderr, exit code 1, or BUSY where another makes the run.

    Of several processes that fail alike one speaks; one that fails alone, over an image that it reads, does too.
    """
    alone = isinstance(error, (DataError, CacheError)) and dist.is_initialized() and not hasattr(error, 'shared')
    if is_main() or alone or isinstance(error, ProcessError):
        # An error from a loader process arrives with that process's traceback; the last line is the message.
        message = re.sub(r'^(archives\.DataError|cache\.CacheError): ', '', str(error).strip().splitlines()[-1])
        print(f'{script}: error: {message}', file=sys.stderr)
    sys.exit(BUSY if isinstance(error, RunBusy) else 1)


def interrupt(signum: int, _) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # once is enough
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt(signum)


if __name__ == '__main__':
    cli()
