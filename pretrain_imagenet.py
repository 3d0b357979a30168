"""Pretrain a model on ImageNet-1K, or on any tree of train/ and val/ class folders, for as many days as it takes.

    torchrun --nproc_per_node=4 pretrain_imagenet.py --data_dir /path/to/imagenet --epochs 600 --batch_size 256 --lr 0.1
    python pretrain_imagenet.py --data_dir /path/to/imagenet --epochs 600
    python pretrain_imagenet.py --data_dir /path/to/imagenet --resume checkpoints/latest.pt      # or --resume auto

The loop, evaluation and checkpoints are train.py's. A run that was killed at any moment goes on from its last
checkpoint and ends in the bits of an undisturbed one. See PRETRAIN_GUIDE.md.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import models
import options
import runs
from datasets import DataError, ImageList, list_images
from images import image_bits, open_image
from models import ModelError, TwistNet
from runs import RunError, counted
from train import (
    CHECK_EVERY,
    EVAL_BATCH,
    EvalBatches,
    TrainBatches,
    autocast,
    end_loaders,
    environment_of,
    evaluate,
    fail,
    image_bytes,
    interrupt,
    is_main,
    loader_processes,
    lr_at,
    machine_errors,
    make_loader,
    number_in,
    opening,
    parallelise,
    process_rank,
    reduce_sum,
    resolve_amp,
    save_checkpoint,
    say,
    setup,
    share_object,
    share_weights,
    train_steps,
    was_restarted,
    world_size,
)
from transforms import eval_settings, eval_transform, mix, seed_of, train_transform

BASE_BATCH = 1024  # images; the global batch that --lr is for
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PROJECT_AFTER = 100  # steps until the first estimate of the whole time
SYSTEM_OPTIONS = ('data_dir', 'checkpoint_dir', 'weights_dir', 'resume', 'save_minutes', 'overwrite', 'num_workers')
SYSTEM_OPTIONS += ('device', 'max_bad_images', 'max_skipped', 'batch_size', 'accumulate', 'given')


# ---------------------------------------------------------------------------------------------- data


class Index:
    """The images of a tree as (path, class index) items, in little memory: a million take some tens of megabytes."""

    def __init__(self, root: Path, classes: list[str], names: np.ndarray, counts: np.ndarray):
        self.root, self.classes, self.names = str(root), classes, names
        self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[str, int]:
        label = int(np.searchsorted(self.ends, i, side='right'))
        return os.path.join(self.root, self.classes[label], os.fsdecode(self.names[i])), label


def read_index(root: Path, cache: Path) -> Index:
    """List a folder of class folders, or take the list from the cache while no class folder has changed since.

    Raises:
        DataError: there is no such folder, it cannot be listed, or fewer than two classes have images.
    """
    if not root.is_dir():
        raise DataError(f'{root}: no such folder; --data_dir must hold train/ and val/ with a folder for each class')
    try:
        folders = sorted((e.name, e.stat().st_mtime_ns) for e in os.scandir(root) if e.is_dir() and e.name[0] != '.')
        stamp = runs.digest(json.dumps([str(root.resolve()), *folders]).encode())
        try:
            with np.load(cache) as stored:
                if stored['stamp'] == stamp:
                    return Index(root, stored['classes'].tolist(), stored['names'], stored['counts'])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # no cache, or a torn one: it is made again
        found = list_images(root)
    except OSError as error:
        raise DataError(f'{error.filename}: cannot be listed ({error.strerror})') from error
    if len(found) < 2:
        raise DataError(f'{root}: needs at least two class folders with images; it has {len(found)}')
    names = np.array([os.fsencode(os.path.basename(path)) for paths in found.values() for path in paths])
    counts = np.array([len(paths) for paths in found.values()])
    with contextlib.suppress(OSError):  # the next start lists the folders again
        temporary = cache.with_name(cache.name + '.tmp.npz')
        np.savez(temporary, stamp=np.array(stamp), classes=np.array(list(found)), names=names, counts=counts)
        os.replace(temporary, cache)
    return Index(root, list(found), names, counts)


class ForgivingImages(ImageList):
    """An ImageList in which another image of the epoch, drawn from (seed, epoch, i), takes the place of a bad one.

    Items have a third entry: the position of the bad image, -1 where there was none.
    """

    def __getitem__(self, key: tuple[int, int, int]):
        seed, epoch, i = key
        for attempt in range(100):
            j = i if attempt == 0 else seed_of('replacement', seed, epoch, i, attempt) % len(self)
            try:
                return *super().__getitem__((seed, epoch, j)), (i if attempt else -1)
            except DataError as caught:
                error = caught
        raise error


def watch(loader: Iterable, clock: dict, bad: set[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of a loader; counts the seconds spent waiting for it, and the bad images that it met."""
    batches = iter(loader)
    while True:
        begin = time.perf_counter()
        batch = next(batches, None)
        clock['loader'] += time.perf_counter() - begin
        if batch is None:
            return
        images, labels, replaced = batch
        bad.update(replaced[replaced >= 0].tolist())
        yield images, labels


# ---------------------------------------------------------------------------------------------- model


class AllReduce(torch.autograd.Function):
    """Sum over all processes, of the gradient too."""

    @staticmethod
    def forward(_, tensor: torch.Tensor) -> torch.Tensor:
        return reduce_sum(tensor.clone())

    @staticmethod
    def backward(_, gradient: torch.Tensor) -> torch.Tensor:
        return reduce_sum(gradient.clone())


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, of one size; on any device, where torch's own needs a GPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        count = x.numel() // x.shape[1] * world_size()
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = AllReduce.apply(values.sum((0, 2, 3))) / count
        values = values - mean[:, None, None]
        var = AllReduce.apply(values.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (values * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronise(model: nn.Module) -> None:
    """Turn every BatchNorm2d into a SyncBatchNorm, in place; names in the state dict stay as they are."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if type(module) is not nn.BatchNorm2d:
                raise ModelError(f'--sync_bn: {type(module).__name__} is not known')
            module.__class__ = SyncBatchNorm


def float_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Parameters and floating buffers, what an average of the weights covers."""
    return [t for t in model.state_dict(keep_vars=True).values() if t.is_floating_point()]


@contextlib.contextmanager
def weights_of(model: nn.Module, average: list[torch.Tensor] | None) -> Iterator[None]:
    """The model with its averaged weights, if there are any, and with its own again afterwards."""
    if average is None:
        yield
        return
    own = [t.detach().clone() for t in float_tensors(model)]
    with torch.no_grad():
        torch._foreach_copy_([t.detach() for t in float_tensors(model)], average)
        yield
        torch._foreach_copy_([t.detach() for t in float_tensors(model)], own)


# ---------------------------------------------------------------------------------------------- checkpoints


def read_latest(folder: Path, resume: str | None) -> tuple[Path, dict] | None:
    """The checkpoint to go on from, and its file; None to begin.

    Args:
        folder: the checkpoint folder.
        resume: 'auto' for the newest that is whole, if there is any; a path for that file; None to begin.

    Raises:
        RunError: there is a checkpoint and none is asked for; the file is missing, or of another run; none is whole.
    """
    latest, previous = folder / 'latest.pt', folder / 'previous.pt'
    own = [path for path in (latest, previous) if path.exists()]
    if resume is None and own:
        raise RunError(
            f'{folder} holds a run; --resume auto goes on with it, another --checkpoint_dir begins a new one'
        )
    if resume is None or (resume == 'auto' and not own):
        return None
    if resume == 'auto' or (own and Path(resume).resolve() == latest.resolve()):
        return _read_newest(own)
    if not Path(resume).exists():
        raise RunError(f'--resume {resume}: no such file')
    last = _read_checkpoint(Path(resume))
    for path in own[:1]:  # going on elsewhere must not overwrite the run that is here
        check_run(path, _read_checkpoint(path), last['config'])
    return Path(resume), last


def _read_newest(paths: list[Path]) -> tuple[Path, dict]:
    """The first checkpoint that is whole; torn ones are put aside, or the next one written would displace it."""
    torn = []
    for path in paths:
        try:
            checkpoint = _read_checkpoint(path)
        except models.UnsafeCheckpoint:
            raise
        except ModelError as error:
            torn.append(path)
            say(f'note: {error}' + (f'; trying {paths[-1]}' if path != paths[-1] else ''))
            continue
        for damaged in torn:
            damaged.rename(damaged.with_name(damaged.name + '.damaged'))
        return path, checkpoint
    raise RunError(f'{paths[0].parent}: no checkpoint is whole; another --checkpoint_dir begins a new run')


def _read_checkpoint(path: Path) -> dict:
    checkpoint = models.read_checkpoint(path)
    if not isinstance(checkpoint, dict) or 'progress' not in checkpoint:
        raise RunError(f'{path} is no checkpoint of pretrain_imagenet.py')
    return checkpoint


def check_run(path: Path, checkpoint: dict, config: dict) -> None:
    """Raises RunError where a checkpoint is of another run."""
    if checkpoint['config']['fingerprint'] != config['fingerprint']:
        changes = runs.changes(checkpoint['config']['defines'], config['defines'])
        raise RunError(f'{path} is of another run ({changes}); give its options, or another --checkpoint_dir')


def take_over(args: argparse.Namespace, path: Path, config: dict) -> None:
    """Fill in what was not given from the run that a checkpoint is of, and keep its global batch.

    Args:
        args: changed in place; args.given names the options that the user gave, all others are the run's.
        config: of the checkpoint.

    Raises:
        RunError: these processes cannot make the run's global batch.
    """
    defines, world, was = config['defines'], world_size(), config['environment']
    own = {k: v for k, v in defines.items() if k in vars(args) and k not in args.given}
    other = {k: v for k, v in own.items() if v != getattr(args, k)}
    vars(args).update(own)
    if other:
        say(f'of the run in {path}: ' + ', '.join(f'{key} {value}' for key, value in other.items()))
    if {'batch_size', 'accumulate'} <= set(args.given):
        return
    whole, left = defines['global_batch'], defines['global_batch'] % world
    share = whole // world  # images of a step in each process
    if 'accumulate' in args.given:
        args.batch_size, rest = divmod(share, max(1, args.accumulate))  # 0 is refused later, with its bounds
    else:
        if 'batch_size' not in args.given:  # as in the run, where that is not more than a share
            args.batch_size = min(whole // (was['processes'] * was['accumulate']), share)
        args.accumulate, rest = divmod(share, max(1, args.batch_size))
    if left or rest or not share:
        raise RunError(
            f'{path}: its global batch of {whole} images cannot be kept by {world} processes with --batch_size '
            f'{args.batch_size}; --batch_size times processes must divide it'
        )
    if (was['processes'], was['accumulate']) != (world, args.accumulate):
        say(
            f'the global batch stays {whole} images: --batch_size {args.batch_size} in {world} process'
            f'{"es" * (world > 1)}, --accumulate {args.accumulate}'
        )


def write_latest(folder: Path, checkpoint: dict) -> None:
    """Keep the last checkpoint as previous.pt; at any moment one of the two is whole."""
    latest = folder / 'latest.pt'
    save_checkpoint(folder / 'next.pt', checkpoint)
    if latest.exists():
        os.replace(latest, folder / 'previous.pt')
    os.replace(folder / 'next.pt', latest)


# ---------------------------------------------------------------------------------------------- a run


def begin(args: argparse.Namespace, device: torch.device) -> tuple[argparse.Namespace, Index, Index, dict, dict | None]:
    """In the main process: the options as resolved, the images, what defines the run, and where it goes on from."""
    folder, world = Path(args.checkpoint_dir), world_size()
    runs.claim(folder)
    begun = (folder / 'latest.pt').exists() or (folder / 'previous.pt').exists()
    found = read_latest(folder, 'auto' if was_restarted() and begun else args.resume)
    if found:
        take_over(args, found[0], found[1]['config'])
    global_batch = args.batch_size * args.accumulate * world
    if args.scale_lr and (not found or 'lr' in args.given):  # the learning rate that a checkpoint holds is scaled
        args.lr = args.lr * global_batch / BASE_BATCH
        say(f'learning rate {args.lr:g} for a global batch of {global_batch} (--no-scale_lr keeps --lr)')
        if 'min_lr' not in args.given:
            args.min_lr = min(args.min_lr, args.lr)
    options.check(args)
    train, val = (
        read_index(Path(args.data_dir) / subset, folder / f'index_{subset}.npz') for subset in ('train', 'val')
    )
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise DataError(f'{args.data_dir}: class {odd[0]} is not in both train/ and val/')
    if args.batch_size < 2 or global_batch > len(train):
        raise RunError(
            f'--batch_size {args.batch_size} must be at least 2, and times {args.accumulate * world} (processes and '
            f'accumulated parts) at most the {len(train)} training images'
        )
    defines = {k: v for k, v in vars(args).items() if k not in SYSTEM_OPTIONS}
    images = runs.digest(
        b''.join([repr(train.classes).encode(), *(a.tobytes() for i in (train, val) for a in (i.names, i.ends))])
    )
    defines |= dict(global_batch=global_batch, images=images)
    environment = environment_of(device) | dict(processes=world, accumulate=args.accumulate)
    fingerprint = runs.digest(json.dumps(defines, sort_keys=True).encode())
    config = dict(defines=defines, environment=environment, fingerprint=fingerprint, classes=len(train.classes))
    if found:
        path, last = found
        check_run(path, last, config)
        if changes := runs.changes(last['config']['environment'], environment):
            say(f'note: {path} was made in another environment ({changes}); the last bits may differ')
    return args, train, val, config, found[1] if found else None


class State(NamedTuple):
    """What training changes."""

    model: nn.Module
    parallel: nn.Module  # the model, with its gradients averaged over processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: list[torch.Tensor] | None  # of float_tensors(model), with --ema


def build(args: argparse.Namespace, num_classes: int, device: torch.device, last: dict | None) -> State:
    """Model, optimiser and average, new or as they are in a checkpoint."""
    model = models.build_model(args.model, num_classes, img_size=args.img_size)
    if args.sync_bn:
        synchronise(model)
    model.to(device, memory_format=torch.channels_last)
    # A fused optimiser skips a step on the device when its gradients are not finite.
    optimizer = torch.optim.SGD(
        model.parameters(),
        args.lr,
        args.momentum,
        weight_decay=args.weight_decay,
        nesterov=args.momentum > 0,
        fused=True,
    )
    # Zeros give the same first step, and a skipped first step would leave the buffers as the memory was.
    for parameter in model.parameters() if args.momentum else ():
        optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    if last:
        model.load_state_dict(last['state_dict'])
        optimizer.load_state_dict(last['optimizer'])
        scaler.load_state_dict(last['scaler'])
    average = [t.detach().clone() for t in float_tensors(model)] if args.ema else None
    if last and average:
        torch._foreach_copy_(average, [t.to(device) for t in last['average']])
    if args.compile:
        model.compile()
    parallel = parallelise(model, device, args.amp, args.batch_size, args.img_size)
    return State(model, parallel, optimizer, scaler, average)


def make_loaders(
    args: argparse.Namespace, train: Index, val: Index, device: torch.device, bits: int | None
) -> tuple[DataLoader, DataLoader]:
    rank, world = process_rank()
    augmentation = train_transform(args.img_size, args.crop_scale, args.hflip, args.randaug_n, args.randaug_m)
    global_batch = args.batch_size * args.accumulate * world
    batches = TrainBatches(len(train), global_batch, args.seed, rank, world, args.accumulate)
    val_batches = EvalBatches(len(val), rank, world)
    read = partial(open_image, bits=bits)
    images, val_images = ForgivingImages(train, augmentation, read), ImageList(val, eval_transform(args.img_size), read)
    image, largest = image_bytes(args.img_size), min(EVAL_BATCH, len(val))
    sizes = [(batches.steps * args.accumulate, args.batch_size * image), (len(val_batches), largest * image)]
    processes = loader_processes(args.num_workers, sizes)
    return (
        make_loader(images, batches, processes, device, steadfast=True),
        make_loader(val_images, val_batches, processes, device, steadfast=True),
    )


def save_state(folder: Path, config: dict, progress: dict, state: State) -> None:
    """Everything that the run needs to go on, its best weights so far included, in one file."""
    if is_main():
        checkpoint = dict(config=config, progress=progress, state_dict=state.model.state_dict(), average=state.average)
        checkpoint |= dict(optimizer=state.optimizer.state_dict(), scaler=state.scaler.state_dict())
        write_latest(folder, checkpoint)


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within, a signal to stop is only noted, for the loop to save and stop when all processes look up next."""
    noted: list[int] = []
    before = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in STOP_SIGNALS}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pretrain(args: argparse.Namespace) -> Path:
    """Train as the options say, or go on; returns the file with the best weights.

    Args:
        args: as parse_args gives them; a run that goes on keeps its own values of what args.given does not name.

    Raises:
        RunError, DataError, ModelError: the run cannot begin or go on.
        KeyboardInterrupt: a signal came, and a checkpoint is saved.
    """
    if args.resume is None:  # else once the checkpoint has filled in what was not given
        options.check(args)
    if args.num_workers is None:
        neighbours = number_in('LOCAL_WORLD_SIZE') if process_rank()[1] > 1 else None
        cores = len(os.sched_getaffinity(0)) // (neighbours or 1)
        args.num_workers = min(max(cores, 1), 16)
    device = setup(args.device, args.seed)
    torch.set_float32_matmul_precision('high')  # TF32 where there is such a thing
    args.device, args.amp = device.type, resolve_amp(args.amp, device)
    args, train_index, val_index, config, last = share_object(lambda: begin(args, device))
    folder, target = Path(args.checkpoint_dir), Path(args.weights_dir) / f'{args.model}_imagenet.pt'
    share_object(lambda: refuse_to_overwrite(target, config, args.overwrite))
    state = build(args, len(train_index.classes), device, last)
    # 'step', 'loss' and 'dropped' are of the epoch under way; 'streak' counts skipped steps in a row.
    progress = dict(epoch=0, step=0, loss=0.0, dropped=0, streak=0, bad=[], history=[], best=dict(val_acc=-1.0))
    images = dict(train=len(train_index), validate=len(val_index))
    say(opening(args.data_dir, images, config['classes'], args.model, None, config['environment'], args.amp))
    bits, notes = share_object(lambda: image_bits(path for index in (train_index, val_index) for path, _ in index))
    for line in [*([] if last else options.shrunk(args, options.IMAGENET)), *(f'note: {note}' for note in notes)]:
        say(line)
    if last:
        progress = last['progress']
        say(f'{folder}: going on in epoch {progress["epoch"] + 1}, after {progress["step"]} steps of it')
    loader, val_loader = make_loaders(args, train_index, val_index, device, bits)
    steps = loader.batch_sampler.steps
    bar = tqdm(
        total=args.epochs * steps,
        initial=progress['epoch'] * steps + progress['step'],
        disable=None if is_main() else True,
        smoothing=0.05,
        **runs.terminal(),
    )
    clock = dict(saved=time.monotonic(), steps=0)
    with noted_signals() as signals:
        for epoch in range(progress['epoch'], args.epochs):
            bar.set_description(f'epoch {epoch + 1}/{args.epochs}', refresh=False)
            times = train_epoch(args, state, loader, progress, config, device, signals, clock, bar)
            save_state(folder, config, progress, state)  # before a damaged image can end the validation
            share_weights(state.model)
            with weights_of(state.model, state.average):
                share_weights(state.model)
                with tqdm(disable=True) as quiet:
                    val_loss, val_acc = evaluate(state.model, val_loader, device, args.amp, quiet)
                if not math.isfinite(val_loss):
                    raise RunError(f'the validation loss is {val_loss} after epoch {epoch + 1}; {last_words(folder)}')
                line = dict(
                    epoch=epoch + 1,
                    lr=state.optimizer.param_groups[0]['lr'],
                    train_loss=progress['loss'] / max(1, steps - progress['dropped']),
                    val_loss=val_loss,
                    val_acc=val_acc,
                    dropped_steps=progress['dropped'],
                    bad_images=len(progress['bad']),
                    gates=state.model.gates() if isinstance(state.model, TwistNet) else {},
                    **times,
                )
                if val_acc >= progress['best']['val_acc']:  # the later on ties
                    progress['best'] = weights_file(state.model, args, train_index.classes, line, config)
            progress['history'].append(line)
            progress |= dict(epoch=epoch + 1, step=0, loss=0.0, dropped=0)
            save_state(folder, config, progress, state)
            clock['saved'] = time.monotonic()
            if is_main():
                runs.write_log(folder / 'log.jsonl', progress['history'])
            say(
                f'epoch {epoch + 1}/{args.epochs}: train loss {line["train_loss"]:.3f}, val {val_acc:.2f} %, '
                f'{line["images_per_second"]:.0f} images/s, loader {line["loader_seconds"]:.1f} s, steps '
                f'{line["step_seconds"]:.1f} s'
            )
    bar.close()
    if is_main():
        runs.write_log(folder / 'log.jsonl', progress['history'])  # a run killed before the log left it short
        refuse_to_overwrite(target, config, args.overwrite)  # one that has come in the meantime
        save_checkpoint(target, progress['best'])
    return target


def last_words(folder: Path) -> str:
    """What is left, and what to try, when numbers are not finite."""
    saved = f'the last checkpoint is {folder / "latest.pt"}; ' if (folder / 'latest.pt').exists() else ''
    return f'{saved}try a lower --lr or --amp off'


def train_epoch(
    args: argparse.Namespace,
    state: State,
    loader: DataLoader,
    progress: dict,
    config: dict,
    device: torch.device,
    signals: list[int],
    clock: dict,
    bar: tqdm,
) -> dict:
    """The rest of the epoch that `progress` is in; saves on the way when it is time, or when a signal came.

    Returns:
        seconds of the epoch in this process, of them waiting for the loader, in steps, and, of these, waiting for the
        device when the loss is looked at; and images a second of all processes.

    Raises:
        RunError: too many bad images, or steps in a row that are not finite. KeyboardInterrupt: as for pretrain.
    """
    model, average, batches = state.model, state.average, loader.batch_sampler
    folder, rank, world = Path(args.checkpoint_dir), *process_rank()
    steps, num_classes = batches.steps, config['classes']
    epoch, batches.epoch, batches.first = progress['epoch'], progress['epoch'], progress['step']
    statistics = [t for t in model.buffers() if t.is_floating_point()]  # of BatchNorm
    before = [t.clone() for t in statistics]

    def schedule(step: int) -> float:
        return lr_at(step, args.lr, args.min_lr, args.warmup_epochs * steps, args.epochs * steps)

    def batch_loss(images: torch.Tensor, labels: torch.Tensor, step: int, part: int) -> torch.Tensor:
        if part == 0 and statistics:
            torch._foreach_copy_(before, statistics)
        torch.manual_seed(seed_of('model', args.seed, step, part, rank))  # dropout and the like
        key = ('mix', args.seed, step, part, rank)
        images, targets = mix(images, labels, num_classes, args.mixup, args.cutmix, key)
        more = part < args.accumulate - 1 and world > 1
        with state.parallel.no_sync() if more else contextlib.nullcontext(), autocast(device, args.amp):
            return F.cross_entropy(state.parallel(images), targets, label_smoothing=args.label_smoothing)

    times, begun, bad = dict(loader=0.0, look=0.0), time.monotonic(), set(progress['bad'])
    loss_sum, dropped, streak, worst = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(4))
    streak += progress['streak']
    for step, loss, norm in train_steps(
        model,
        watch(loader, times, bad),
        state.optimizer,
        state.scaler,
        device,
        epoch * steps + progress['step'],
        schedule,
        batch_loss,
        args.clip_grad,
        args.accumulate,
    ):
        finite = norm.isfinite()
        for was, now in zip(before, statistics):
            now.copy_(torch.where(finite, now, was))
        loss_sum += torch.where(finite, loss, 0.0)
        dropped += ~finite
        streak = (streak + 1) * ~finite
        worst = torch.maximum(worst, streak)
        if average:
            with torch.no_grad():
                torch._foreach_lerp_(average, float_tensors(model), 1 - args.ema_decay)
        bar.update()
        clock['steps'] += 1
        done = step - epoch * steps + 1
        if done % CHECK_EVERY and done < steps:
            continue
        # The only look at the device, and the moment at which all processes agree to save or stop.
        due = is_main() and time.monotonic() - clock['saved'] > 60 * args.save_minutes
        look = time.monotonic()
        mine = torch.tensor([len(bad) - len(progress['bad']), bool(signals), due], device=device)
        found = reduce_sum(torch.cat([loss_sum[None], mine.double()]))
        loss_of_all, new_bad, stop, due, skipped, row, most = [
            *found.tolist(), *torch.stack([dropped, streak, worst]).tolist()
        ]  # fmt: skip
        times['look'] += time.monotonic() - look
        progress |= dict(step=done, loss=progress['loss'] + loss_of_all / world, streak=int(row))
        progress['dropped'] += int(skipped)
        if new_bad:
            note_bad(bad, progress, loader.dataset.items, args.max_bad_images)
        if most >= args.max_skipped:
            raise RunError(
                f'the gradients of {int(most)} steps in a row were not finite, near step {step}; {last_words(folder)}'
            )
        for counter in (loss_sum, dropped, worst):
            counter.zero_()
        here = done - batches.first  # steps of this process in the epoch
        now = (
            f'loss {progress["loss"] / max(1, done - progress["dropped"]):.3f}, '
            f'{(time.monotonic() - begun) / here:.3f} s a step, of them loader {times["loader"] / here:.3f} s'
        )
        bar.set_postfix_str(now, refresh=False)
        if 'first_look' not in clock:  # what came before was also starting, and compiling
            clock['first_look'] = time.monotonic(), clock['steps']
        elif clock['steps'] >= PROJECT_AFTER and 'projected' not in clock:
            then, count = clock['first_look']
            left = ((args.epochs - epoch) * steps - done) * (time.monotonic() - then) / (clock['steps'] - count)
            say(f'the rest will take about {timedelta(seconds=round(left))}, validation apart')
            clock['projected'] = True
        if stop or due:
            save_state(folder, config, progress, state)
            clock['saved'] = time.monotonic()
            if bar.disable:
                say(f'epoch {epoch + 1}/{args.epochs} step {done}/{steps}: {now}; saved')
        if stop:
            bar.close()
            say(f'{folder / "latest.pt"} is saved; --resume auto goes on from there')
            raise KeyboardInterrupt(signals[0] if signals else signal.SIGTERM)
    seconds = time.monotonic() - begun
    return dict(
        seconds=round(seconds, 3),
        loader_seconds=round(times['loader'], 3),
        step_seconds=round(seconds - times['loader'], 3),
        look_seconds=round(times['look'], 3),
        images_per_second=round((steps - batches.first) * batches.batch_size / max(seconds, 1e-9), 1),
    )


def weights_file(model: nn.Module, args: argparse.Namespace, classes: list[str], line: dict, config: dict) -> dict:
    """What weights/<model>_imagenet.pt holds: a plain state dict and where it comes from."""
    return dict(
        model=args.model,
        num_classes=len(classes),
        classes=classes,
        epoch=line['epoch'],
        epochs=args.epochs,
        val_acc=line['val_acc'],
        averaged=bool(args.ema),
        transform=eval_settings(args.img_size),
        fingerprint=config['fingerprint'],
        commit=config['environment']['commit'],
        state_dict={
            k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()
        },
    )


def refuse_to_overwrite(target: Path, config: dict, overwrite: bool) -> None:
    """Better before four days than after. Weights of this very run, made before, may be made again.

    Raises:
        RunError: there are weights of another run, or nothing can be written there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f'--weights_dir {target.parent}: cannot be made ({error.strerror})') from error
    if not os.access(target.parent, os.W_OK):
        raise RunError(f'--weights_dir {target.parent}: cannot be written to')
    if target.exists() and not overwrite:
        try:
            own = models.read_checkpoint(target).get('fingerprint') == config['fingerprint']
        except (ModelError, AttributeError):
            own = False
        if not own:
            raise RunError(
                f'{target} exists; --overwrite replaces it at the end, --weights_dir puts the new one elsewhere'
            )


def note_bad(bad: set[int], progress: dict, index: Index, limit: int) -> None:
    """Bring together the bad images that the processes met; name the new ones.

    Raises:
        RunError: there are more than the limit.
    """
    gathered = [bad]
    if dist.is_initialized():
        gathered = [None] * world_size()
        dist.all_gather_object(gathered, bad)
    bad.update(*gathered)
    for i in sorted(bad - set(progress['bad'])):
        say(f'bad image, another one takes its place: {index[i][0]}')
    progress['bad'] = sorted(bad)
    if len(bad) > limit:
        raise RunError(
            f'{counted(len(bad), "image")} cannot be read, more than --max_bad_images {limit}; '
            f'the last: {index[max(bad)][0]}'
        )


# ---------------------------------------------------------------------------------------------- command line


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Pretrain a model on ImageNet-1K, or any tree of train/ and val/ class folders.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group('data and model')
    group.add_argument('--data_dir', required=True, help='holds train/ and val/, each with a folder for each class')
    group.add_argument('--img_size', type=int, help='side of the square input, pixels')
    group.add_argument('--model', default='twistnet18', help='a name that `python models.py` lists')
    options.add_optimisation_args(parser)
    options.add_augmentation_args(parser)
    options.add_system_args(parser)
    group = parser.add_argument_group('pretraining')
    group.add_argument('--accumulate', type=int, default=1, help='batches of each process whose gradients make a step')
    group.add_argument(
        '--scale_lr',
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f'--lr is for a global batch of {BASE_BATCH}',
    )
    group.add_argument(
        '--sync_bn', action=argparse.BooleanOptionalAction, default=False, help='BatchNorm over processes'
    )
    group.add_argument('--ema', action=argparse.BooleanOptionalAction, default=False, help='average the weights')
    group.add_argument('--ema_decay', type=float, default=0.9999, help='of the average, a step')
    group.add_argument('--checkpoint_dir', default='checkpoints', help='latest.pt, previous.pt and log.jsonl')
    group.add_argument('--resume', metavar='PATH', help='a checkpoint, or auto for the newest that is whole')
    group.add_argument('--save_minutes', type=float, default=15, help='between two checkpoints')
    group.add_argument('--weights_dir', default=models.WEIGHTS_DIR, help='where the best weights go at the end')
    group.add_argument('--overwrite', action='store_true', help='replace weights that are there')
    group.add_argument('--max_bad_images', type=int, default=100, help='images that may be unreadable')
    group.add_argument(
        '--max_skipped', type=int, default=5, help='steps in a row that may be skipped, not being finite'
    )
    parser.set_defaults(**options.IMAGENET)
    for action in parser._actions:
        if action.dest == 'batch_size':
            action.help = 'of each process'
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return options.fill(options.read(get_args_parser(), argv), options.IMAGENET)


def main(args: argparse.Namespace) -> None:
    with machine_errors():
        target = pretrain(args)
    if is_main():
        best = models.read_checkpoint(target)
        print(f'{target}: {best["model"]}, epoch {best["epoch"]}, validation accuracy {best["val_acc"]:.2f} %')


def cli(argv: list[str] | None = None) -> None:
    """main, with what a user can mend as one line on stderr and an exit code that is not 0."""
    for number in STOP_SIGNALS:
        signal.signal(number, interrupt)
    args = parse_args(argv)
    try:
        main(args)
    except (DataError, ModelError, RunError) as error:
        fail('pretrain_imagenet.py', error)
    except KeyboardInterrupt as stop:
        say('stopped')
        sys.exit(128 + stop.args[0])
    finally:
        end_loaders()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    cli()
