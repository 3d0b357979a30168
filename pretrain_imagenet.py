"""Pretrain a model on ImageNet-1K, or on any tree of train/ and val/ class folders, for as many days as it takes.

    torchrun --nproc_per_node=4 pretrain_imagenet.py --data_dir /path/to/imagenet --epochs 600 --batch_size 256 --lr 0.1
    python pretrain_imagenet.py --data_dir /path/to/imagenet --epochs 600
    python pretrain_imagenet.py --data_dir /path/to/imagenet --resume checkpoints/latest.pt      # or --resume auto
    python pretrain_imagenet.py --data_dir /path/to/imagenet --eval weights/twistnet18_imagenet.pt

The steps, the evaluation and the state are those of train.py. A run that was killed at any moment resumes from its last
checkpoint, bit-identical to one that was not. See PRETRAIN_GUIDE.md.
"""

import argparse
import contextlib
import copy
import math
import os
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import distributed, options, runs
from common.checkpoint import extract_state, read_checkpoint, read_weights, save_checkpoint, unwrap, weights_file
from common.distributed import is_main, is_quiet, process_rank, reduce_sum, say, share_object, world_size
from common.errors import DataError, Diverged, ModelError, RunError
from common.imagenet import find_imagenet, read_val
from common.images import image_bits, open_image
from common.machine import cores
from common.names import near_miss
from common.options import IMAGENET
from common.runs import counted
from common.timm_models import model_defines
from common.trees import Index, read_index
from models import build_model, gates_of
from training.engine import (
    CHECK_EVERY,
    State,
    build_state,
    evaluate,
    lr_at,
    mixed_loss,
    share_state,
    state_dicts,
    train_steps,
)
from training.loader import EvalBatches, ForgivingImages, ImageList, TrainBatches, end_loaders, start_loaders, watch
from training.trained import inference_loader
from transforms import eval_settings, eval_transform, preprocessing_of, read_settings, seed_of, train_transform

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PROJECT_AFTER = 100  # steps until the first estimate of the whole time


# ---------------------------------------------------------------------------------------------- checkpoints


def read_latest(folder: Path, resume: str | None) -> tuple[Path, dict] | None:
    """The file and the checkpoint to resume from; None to start.

    Args:
        folder: the checkpoint folder.
        resume: 'auto' for the newest readable one, if there is any; a path for that file; None to start.
    """
    latest, previous = folder / 'latest.pt', folder / 'previous.pt'
    own = [path for path in (latest, previous) if path.exists()]
    if own and distributed.was_restarted():  # with the options of the first start
        resume = 'auto'
    if resume is None and own:
        raise RunError(f'{folder} holds a run; --resume auto continues it, another --checkpoint_dir starts a new one')
    if resume is None or (resume == 'auto' and not own):
        return None
    if resume == 'auto' or (own and Path(resume).resolve() == latest.resolve()):
        return read_newest(own)
    if not Path(resume).exists():
        raise RunError(f'--resume {resume}: no such file')
    last = read_state(Path(resume))
    for path in own[:1]:  # must not overwrite the run in this folder
        check_run(path, read_state(path)['config'], last['config'])
    return Path(resume), last


def read_newest(paths: list[Path]) -> tuple[Path, dict]:
    """The first readable checkpoint; a damaged one before it is renamed, or would push it out at the next save."""
    for i, path in enumerate(paths):
        try:
            checkpoint = read_state(path)
        except ModelError as error:
            say(f'note: {error}')
            continue
        for damaged in paths[:i]:
            damaged.rename(f'{damaged}.damaged')
        return path, checkpoint
    raise RunError(f'{paths[0].parent}: every checkpoint is damaged; another --checkpoint_dir starts a new run')


def read_state(path: Path) -> dict:
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, dict) or 'progress' not in checkpoint:
        raise RunError(f'{path} is no checkpoint of pretrain_imagenet.py')
    return checkpoint


def check_run(path: Path, old: dict, new: dict) -> None:
    """Raises RunError if the configuration of the checkpoint at `path` is not the new one."""
    if old['fingerprint'] != new['fingerprint']:
        difference = runs.changes(old['defines'], new['defines'])
        raise runs.other_configuration(path, difference, 'give its options, or another --checkpoint_dir')


def resume_options(args: argparse.Namespace, path: Path, config: dict) -> None:
    """Take the options that were not given (args.given) from the run of a checkpoint, and keep its global batch."""
    defines, world, was = config['defines'], world_size(), config['environment']
    own = {k: v for k, v in defines.items() if k in vars(args) and k not in args.given}
    if other := {k: v for k, v in own.items() if v != getattr(args, k)}:
        say(f'of the run in {path}: ' + ', '.join(f'{key} {value}' for key, value in other.items()))
    vars(args).update(own)
    whole = defines['global_batch']
    share = whole // world  # images of a step in each process
    if 'batch_size' not in args.given:  # as in the run, but at most a share
        args.batch_size = min(whole // (was['processes'] * was['accumulate']), share)
    if 'accumulate' not in args.given:
        args.accumulate = share // max(1, args.batch_size)
    parts = f'--batch_size {args.batch_size} times --accumulate {args.accumulate} times processes ({world})'
    if args.batch_size * args.accumulate * world != whole:
        raise RunError(f'{path}: its global batch of {whole} images cannot be kept: {parts} must be {whole}')
    if (was['processes'], was['accumulate']) != (world, args.accumulate):
        say(f'the global batch stays {whole} images: {parts}')


# ---------------------------------------------------------------------------------------------- a run


class Pretraining(NamedTuple):
    """What the phases of a run share."""

    args: argparse.Namespace
    config: dict  # `defines`, `environment` and `fingerprint` as in train.py, and the number of classes
    images: Index
    state: State
    progress: dict  # see START
    bad: set[int]  # training images that this process could not read
    signals: list[int]  # that asked the run to stop
    clock: dict  # when the run was saved, steps of this process, and what the first estimate needs

    @property
    def folder(self) -> Path:
        return Path(self.args.checkpoint_dir)


# 'step', 'loss', 'dropped' and 'replaced' (images) are of the current epoch; 'streak' counts skipped steps in a row.
START = dict(epoch=0, step=0, loss=0.0, dropped=0, replaced=0, streak=0, history=[], best=dict(val_acc=-1.0))


def prepare(args: argparse.Namespace, device: torch.device) -> tuple:
    """Resolve the options and open the data, in the main process, which reports what is trained on what.

    Returns:
        the options, the Indexes of train/ and val/, the configuration, the checkpoint to resume from (or None), and the
        bits of the images.
    """
    folder, world = Path(args.checkpoint_dir), world_size()
    runs.claim(folder)
    path, last = read_latest(folder, args.resume) or (None, None)
    if last:
        resume_options(args, path, last['config'])
    options.check(args)
    global_batch = args.batch_size * args.accumulate * world
    if args.scale_lr and (not last or 'lr' in args.given):  # the learning rate in a checkpoint is scaled already
        args.lr = args.lr * global_batch / options.BASE_BATCH
        say(f'learning rate {args.lr:g} for a global batch of {global_batch} (--no-scale_lr keeps --lr)')
        if 'min_lr' not in args.given:
            args.min_lr = min(args.min_lr, args.lr)
        options.check(args)
    root = Path(args.data_dir)
    train, val = read_index(find_imagenet(root) / 'train'), read_val(root)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise DataError(f'{args.data_dir}: class {odd[0]} is not in both train/ and val/{near_miss(odd[0], odd)}')
    if args.batch_size < 2 or global_batch > len(train):
        raise RunError(
            f'--batch_size {args.batch_size} must be at least 2, and times {args.accumulate * world} (processes and '
            f'accumulated parts) at most the {len(train)} training images'
        )
    config = describe_run(args, train, val, device, global_batch)
    if last:
        check_run(path, last['config'], config)
        if changes := runs.changes(last['config']['environment'], config['environment']):
            say(f'note: {path} was made in another environment ({changes}); the last bits may differ')
    weights_path(args, config)
    counts = dict(train=len(train), validate=len(val))
    say(runs.opening(args, args.data_dir, counts, config['classes'], None, config['environment'], world))
    bits, notes = image_bits(path for index in (train, val) for path, _ in index)
    for line in [*(f'note: {note}' for note in notes), *([] if last else options.lowered_defaults(args, IMAGENET))]:
        say(line)
    if last:
        epoch, step = last['progress']['epoch'] + 1, last['progress']['step']
        say(f'{path}: resuming in epoch {epoch}, after {step} steps of it')
    return args, train, val, config, last, bits


def describe_run(args: argparse.Namespace, train: Index, val: Index, device: torch.device, global_batch: int) -> dict:
    """The configuration that a checkpoint holds; the fingerprint covers what can change a bit of the result."""
    defines = options.pretraining_defining(vars(args))
    images = runs.digest(repr(train.classes).encode() + train.digest() + val.digest())
    defines |= dict(global_batch=global_batch, images=images) | model_defines(args)
    environment = distributed.environment_of(device) | dict(processes=world_size(), accumulate=args.accumulate)
    fingerprint, classes = runs.fingerprint(defines), len(train.classes)
    return dict(defines=defines, environment=environment, fingerprint=fingerprint, classes=classes)


def make_loaders(args: argparse.Namespace, train: Index, val: Index, state: State) -> list:
    """The loaders of the training and the validation images."""
    rank, world = process_rank()
    augmentation = train_transform(args.img_size, args.crop_scale, args.hflip, args.randaug_n, args.randaug_m)
    global_batch = args.batch_size * args.accumulate * world
    batches = TrainBatches(len(train), global_batch, args.seed, rank, world, args.accumulate)
    read = partial(open_image, bits=state.preprocessing.bits)
    view = eval_transform(args.img_size, state.preprocessing.crop_ratio)
    pairs = [(ForgivingImages(train, augmentation, read), batches)]
    pairs += [(ImageList(val, view, read), EvalBatches(len(val), rank, world))]
    return start_loaders(pairs, args, state.device, ignore_signals=True)


def save_state(run: Pretraining) -> None:
    """Write all that the run needs to resume, its best weights so far included, into latest.pt.

    The one before stays as previous.pt: at any moment one of the two is whole.
    """
    if is_main():
        latest, following = run.folder / 'latest.pt', run.folder / 'next.pt'
        save_checkpoint(following, dict(config=run.config, progress=run.progress) | state_dicts(run.state))
        if latest.exists():
            os.replace(latest, run.folder / 'previous.pt')
        os.replace(following, latest)
    run.clock['saved'] = time.monotonic()


def pretrain(args: argparse.Namespace) -> Path:
    """Train as the options say, or resume; returns the file with the best weights.

    Raises:
        KeyboardInterrupt: a signal came, and a checkpoint is saved.
    """
    if args.num_workers is None:
        args.num_workers = min(max(cores() // (distributed.number_in('LOCAL_WORLD_SIZE') or 1), 1), 16)
    device = distributed.setup(args.device, args.seed)
    torch.set_float32_matmul_precision('high')  # TF32 where the device has it
    args.device, args.amp = device.type, distributed.resolve_amp(args.amp, device)
    args, images, val_images, config, last, bits = share_object(lambda: prepare(args, device))
    state = build_state(args, len(images.classes), device, last, args.batch_size, fused=True)
    state = state._replace(preprocessing=state.preprocessing._replace(bits=bits))
    progress = copy.deepcopy(START) | (last['progress'] if last else {})
    loader, val_loader = make_loaders(args, images, val_images, state)
    steps = loader.batch_sampler.steps
    total, done = args.epochs * steps, progress['epoch'] * steps + progress['step']
    bar = tqdm(total=total, initial=done, disable=is_quiet(), smoothing=0.05, **runs.terminal())
    with distributed.noted_signals(STOP_SIGNALS) as signals:
        run = Pretraining(args, config, images, state, progress, set(), signals, dict(saved=time.monotonic(), steps=0))
        for epoch in range(progress['epoch'], args.epochs):
            bar.set_description(f'epoch {epoch + 1}/{args.epochs}', refresh=False)
            times = train_epoch(run, loader, bar)
            save_state(run)  # before an unreadable image can end the validation
            line = validate(run, val_loader, times)
            save_epoch(run, line)
    bar.close()
    target = share_object(lambda: weights_path(args, config))  # again: others may have appeared in the meantime
    if is_main():
        runs.write_log(run.folder / 'log.jsonl', progress['history'])  # may be an epoch behind after a kill
        save_checkpoint(target, progress['best'])
    return target


def weights_path(args: argparse.Namespace, config: dict) -> Path:
    """Where the best weights go; asked before the run, not after days, because they replace none but the run's own."""
    target = Path(args.weights_dir) / f'{args.model}_imagenet.pt'
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not args.overwrite and read_checkpoint(target).get('fingerprint') != config['fingerprint']:
        raise RunError(f'{target} exists; --overwrite replaces it at the end, --weights_dir puts the new one elsewhere')
    return target


def validate(run: Pretraining, loader: DataLoader, times: dict) -> dict:
    """The line of log.jsonl of the epoch just trained; keeps its weights if they are the best so far."""
    args, state, progress = run.args, run.state, run.progress
    share_state(state)
    model = state.evaluated
    val_loss, val_acc = evaluate(model, loader, state.device, args.amp, None, state.preprocessing.statistics)
    epoch = progress['epoch'] + 1
    if not math.isfinite(val_loss):
        raise Diverged(f'{run.folder}: the validation loss is {val_loss} after epoch {epoch}')
    if val_acc >= progress['best']['val_acc']:  # the later one on ties
        more = dict(epochs=args.epochs, averaged=bool(args.ema), transform=eval_settings(*state.preprocessing))
        more |= dict(fingerprint=run.config['fingerprint'], commit=run.config['environment']['commit'])
        progress['best'] = weights_file(args.model, run.images.classes, epoch, val_acc, model.state_dict(), **more)
    return dict(
        epoch=epoch,
        lr=max(group['lr'] for group in state.optimizer.param_groups),  # the classifier's, with --layer_decay
        train_loss=progress['loss'] / max(1, progress['step'] - progress['dropped']),
        val_loss=val_loss,
        val_acc=val_acc,
        dropped_steps=progress['dropped'],
        bad_images=progress['replaced'],
        gates=gates_of(model),
        **times,
    )


def save_epoch(run: Pretraining, line: dict) -> None:
    """Add a line to the history, and save."""
    progress = run.progress
    progress['history'].append(line)
    progress |= dict(epoch=line['epoch'], step=0, loss=0.0, dropped=0, replaced=0)
    save_state(run)
    if is_main():
        runs.write_log(run.folder / 'log.jsonl', progress['history'])
    say(
        f'epoch {line["epoch"]}/{run.args.epochs}: train loss {line["train_loss"]:.3f}, val {line["val_acc"]:.2f} %, '
        f'{line["images_per_second"]:.0f} images/s, loader {line["loader_seconds"]:.1f} s, steps '
        f'{line["step_seconds"]:.1f} s'
    )


# ---------------------------------------------------------------------------------------------- an epoch


def train_epoch(run: Pretraining, loader: DataLoader, bar: tqdm) -> dict:
    """Train the rest of the epoch that `progress` is in; saves when it is time, or when a signal came.

    Returns:
        seconds in this process (all; in the loader; in steps, and of these in sync_counters), and images per second of
        all processes.
    """
    args, state, progress, batches = run.args, run.state, run.progress, loader.batch_sampler
    (rank, world), steps = process_rank(), batches.steps
    batches.epoch, batches.first = progress['epoch'], progress['step']
    first_step = batches.epoch * steps

    def batch_loss(images: torch.Tensor, labels: torch.Tensor, step: int, part: int) -> torch.Tensor:
        torch.manual_seed(seed_of('model', args.seed, step, part, rank))  # dropout and the like
        more = part < args.accumulate - 1 and world > 1
        with state.parallel.no_sync() if more else contextlib.nullcontext():
            return mixed_loss(args, state, images, labels, run.config['classes'], ('mix', args.seed, step, part, rank))

    times, start, bad, made = dict(loader=0.0, look=0.0), time.monotonic(), [], []
    batched, schedule = watch(loader, times, bad), partial(lr_at, args=args, steps=steps)
    first = first_step + batches.first
    for step, loss, norm in train_steps(state, batched, first, schedule, batch_loss, args.clip_grad, args.accumulate):
        made.append(torch.stack([loss, norm]))
        bar.update()
        done = step - first_step + 1
        if done % CHECK_EVERY and done < steps:
            continue
        run.clock['steps'] += len(made)
        stop, due = sync_counters(run, made, bad, step, done, times)
        made.clear()
        bad.clear()
        here, seconds = done - batches.first, time.monotonic() - start  # of this process in the epoch
        mean = progress['loss'] / max(1, done - progress['dropped'])
        now = f'loss {mean:.3f}, {seconds / here:.3f} s a step, of them loader {times["loader"] / here:.3f} s'
        bar.set_postfix_str(now, refresh=False)
        estimate(run.clock, args.epochs * steps - step - 1)
        if stop or due:
            save_state(run)
            if is_quiet():
                say(f'epoch {batches.epoch + 1}/{args.epochs} step {done}/{steps}: {now}; saved')
        if stop:
            bar.close()
            say(f'{run.folder / "latest.pt"} is saved; --resume auto continues from there')
            raise KeyboardInterrupt(run.signals[0] if run.signals else signal.SIGTERM)  # another process got it
    seconds = time.monotonic() - start
    return dict(
        seconds=round(seconds, 3),
        loader_seconds=round(times['loader'], 3),
        step_seconds=round(seconds - times['loader'], 3),
        look_seconds=round(times['look'], 3),
        images_per_second=round((steps - batches.first) * batches.batch_size / max(seconds, 1e-9), 1),
    )


def sync_counters(
    run: Pretraining, made: list[torch.Tensor], bad: list[int], step: int, done: int, times: dict
) -> tuple[bool, bool]:
    """Bring what all processes counted since the last time into `progress`: the only wait for the device.

    Args:
        made: loss and norm of the gradients of each step.
        bad: images that this process could not read.

    Returns:
        whether a process was asked to stop, and whether it is time to save; the same in all processes.
    """
    progress, args = run.progress, run.args
    for i in sorted({*bad} - run.bad):
        print(f'bad image, another one takes its place: {run.images[i][0]}', file=sys.stderr)
    run.bad.update(bad)
    due = is_main() and time.monotonic() - run.clock['saved'] > 60 * args.save_minutes
    start, total = time.monotonic(), 0.0
    allowed = args.max_skipped - 1 if run.state.scaler.is_enabled() else 0  # fp16 looks for its scale
    for loss, norm in torch.stack(made).tolist():  # the norm is the same in all processes
        finite = math.isfinite(norm)
        total += loss if finite else 0
        progress['dropped'] += not finite
        progress['streak'] = 0 if finite else progress['streak'] + 1
        if progress['streak'] > allowed:
            raise Diverged(f'{run.folder}: the gradients near step {step} were not finite')
    mine = torch.tensor([total, len(bad), bool(run.signals), due], dtype=torch.float64, device=run.state.device)
    loss, replaced, stop, due = reduce_sum(mine).tolist()
    times['look'] += time.monotonic() - start
    progress['replaced'] += int(replaced)
    progress |= dict(step=done, loss=progress['loss'] + loss / process_rank()[1])
    if progress['replaced'] > args.max_bad_images:
        images = counted(progress['replaced'], 'image')
        raise RunError(f'{images} cannot be read, more than --max_bad_images {args.max_bad_images}')
    return bool(stop), bool(due)


def estimate(clock: dict, left: int) -> None:
    """Report once how long the `left` steps will take; steps before the first look also started and compiled things."""
    then, count = clock.setdefault('first_look', (time.monotonic(), clock['steps']))
    if clock['steps'] >= PROJECT_AFTER and left and 'estimated' not in clock:
        seconds = left * (time.monotonic() - then) / (clock['steps'] - count)
        say(f'the rest will take about {timedelta(seconds=math.ceil(seconds))}, validation apart')
        clock['estimated'] = True


# ---------------------------------------------------------------------------------------------- scores


def score(args: argparse.Namespace) -> str:
    """The accuracy of the weights args.eval on val/, in words.

    The model and its input are those that the file states, unless --model or --img_size is given.
    """
    if others := [name for name in args.given if name not in options.SCORING_OPTIONS]:
        raise RunError(f'--eval {args.eval} trains nothing: leave --{others[0]} out')
    device = distributed.setup(args.device, args.seed)
    amp, saved = distributed.resolve_amp(args.amp, device), read_weights(args.eval)
    state, stated = extract_state(saved, str(args.eval))
    args.model = args.model if 'model' in args.given else stated or args.model
    options.check(args)
    taken = preprocessing_of(args.model, args.img_size, args.eval)
    if 'transform' in saved:
        taken = read_settings(saved['transform'])
    elif 'progress' in saved:  # latest.pt
        taken = taken._replace(img_size=saved['config']['defines']['img_size'])
    if 'img_size' in args.given:
        taken = taken._replace(img_size=args.img_size)
    val = share_object(lambda: read_val(Path(args.data_dir)))
    if (classes := saved.get('classes')) is None:
        say(f'note: {args.eval} names no classes: its outputs are taken for those of val/ in sorted order')
    elif classes != val.classes:
        raise RunError(f'{args.eval}: its {len(classes)} classes are not the {len(val.classes)} of {args.data_dir}')
    model = build_model(args.model, len(val.classes), img_size=taken.img_size)
    try:
        missing, unknown = model.load_state_dict(unwrap(state, model.state_dict()), strict=False)
    except RuntimeError as error:
        raise ModelError(f'{args.eval}: is not of {args.model} with the {len(val.classes)} classes of val/') from error
    if odd := unknown + [name for name in missing if not name.endswith('num_batches_tracked')]:
        raise ModelError(
            f'{args.eval}: is not all of {args.model}, which differs in {counted(len(odd), "tensor")}: {odd[0]}'
        )
    bits, notes = (taken.bits, []) if taken.bits else image_bits(path for path, _ in val)
    for note in notes:
        say(f'note: {note}')
    images = ImageList(val, eval_transform(*taken.view), partial(open_image, bits=bits))
    loader = inference_loader(
        images, EvalBatches(len(val), *process_rank()), 3 * taken.img_size**2, args.num_workers, device
    )
    with tqdm(total=len(loader), desc='val', disable=is_quiet(), **runs.terminal()) as bar:
        model.to(device, memory_format=torch.channels_last)
        loss, accuracy = evaluate(model, loader, device, amp, bar, taken.statistics)
    return (
        f'{args.eval}: {args.model}, {taken.img_size} pixels: accuracy {accuracy:.2f} %, cross-entropy {loss:.4f} '
        f'({counted(len(val), "image")} of {len(val.classes)} classes)'
    )


# ---------------------------------------------------------------------------------------------- command line


def main(args: argparse.Namespace) -> None:
    if args.eval:
        if (line := score(args)) and is_main():
            print(line)
        return
    target = pretrain(args)
    if is_main():
        best = read_checkpoint(target)
        print(f'{target}: {best["model"]}, epoch {best["epoch"]}, validation accuracy {best["val_acc"]:.2f} %')


def cli(argv: list[str] | None = None) -> None:
    args = options.parse_pretraining_args(argv)
    with distributed.training_process('pretrain_imagenet.py', 'stopped', STOP_SIGNALS):
        try:
            main(args)
        finally:
            end_loaders()


if __name__ == '__main__':
    cli()
