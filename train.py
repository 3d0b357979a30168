"""Train one model on one fold of one data set.

    python train.py                                            # the demo: twistnet18 on procedural textures
    python train.py --data_dir data/dtd --dataset dtd --model twistnet18 --fold 1 --seed 42 --pretrained
    torchrun --nproc_per_node=4 train.py --data_dir data/dtd --dataset dtd

The run goes into its folder under --run_dir (see runs.py). An interrupted run goes on with the same command and ends
in the same bits; a complete one is left alone.
"""

from common import options, runs
from common.errors import CacheError, DataError, ModelError, ProcessError, RunError, UnsafeCheckpoint, user_errors

if __name__ == '__main__':
    with user_errors('train.py'):
        options.parse_args()  # --help and mistyped options are answered before torch is there, which takes seconds

import argparse
import contextlib
import json
import math
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import models
from common.cache import SHARED_MEMORY, open_cache
from common.checkpoint import read_checkpoint, save_checkpoint, weights_source
from common.distributed import (
    autocast,
    is_main,
    mean_of,
    parallelise,
    process_rank,
    reduce_sum,
    resolve_amp,
    say,
    setup,
    share_object,
    share_weights,
    world_size,
)
from common.errors import UserError
from common.images import read_pixels
from common.splits import Splits, bits_of, split_digest
from compute_flops import NO_FVCORE, measure
from datasets import load_splits, passed_over, tree_digest
from loader import (
    EVAL_BATCH,
    EvalBatches,
    ImageList,
    TrainBatches,
    eval_images,
    image_bytes,
    loader_processes,
    make_loader,
)
from models import TwistNet, watch_selection
from transforms import blank_batch, eval_settings, mix, normalize, seed_of, train_transform

CHECK_EVERY = 20  # steps between two looks at the loss, each of which waits for the device
NOT_FINITE = 'the checkpoints of the epochs before are kept; try a lower --lr or --amp off'


# ---------------------------------------------------------------------------------------------- system


# ---------------------------------------------------------------------------------------------- configuration


def describe_run(args: argparse.Namespace, splits: Splits, device: torch.device, world: int) -> dict:
    """What config.json holds: options as resolved, environment, and the fingerprint of what defines the result.

    The fingerprint covers every option that can change a bit of the result, the number of processes, the names of the
    images of the split and the sizes of those that train and validate, and the bytes of the initial weights; on one
    machine with one thread count it decides the run. `tree` is a digest of the data set with all its folds: runs of
    several folds are of one data set if it is the same.
    """
    values = {k: v for k, v in vars(args).items() if k != 'force'}
    weights = weights_source(args.model, args.pretrained)
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
    for line in share_object(lambda: passed_over(args.dataset, args.data_dir)):
        say(f'note: {line}')


def check_batch(args: argparse.Namespace, n_train: int, world: int) -> None:
    """Refuse a batch that the data or the processes cannot fill; bring down a default.

    Raises:
        RunError: with the option and its bounds.
    """
    if 'batch_size' not in args.given:
        args.batch_size = options.largest_batch(args.batch_size, n_train, world)
    if not 2 * world <= args.batch_size <= n_train:
        raise RunError(
            f'--batch_size {args.batch_size} must be from {2 * world} (two images a process, for BatchNorm) to the '
            f'{n_train} training images'
        )
    if args.batch_size % world:
        raise RunError(f'--batch_size {args.batch_size} must be a multiple of the {world} processes')


# ---------------------------------------------------------------------------------------------- data


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


# ---------------------------------------------------------------------------------------------- a run


def read_last(path: Path, fingerprint: str) -> dict | None:
    """The checkpoint to go on from; None where there is none, or only a damaged one.

    Raises:
        ModelError: the file holds code. RunError: it belongs to something else.
    """
    try:
        last = read_checkpoint(path)
    except FileNotFoundError:
        return None
    except UnsafeCheckpoint:
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
        best = read_checkpoint(folder / 'best.pt')
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
    return None, last


def train(args: argparse.Namespace) -> tuple[Path, dict]:
    """Train and test as the options say; returns the run folder and what its results.json holds."""
    options.check(args)
    splits = load_splits(args.dataset, args.data_dir, args.fold)
    rank, world = process_rank()
    check_batch(args, len(splits.train), world)
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
    parallel = parallelise(model, args.amp, blank_batch(args.batch_size // world, args.img_size, device))

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
        model.load_state_dict(read_checkpoint(folder / 'best.pt')['state_dict'])
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
    except UserError as error:
        fail('train.py', error)
    except KeyboardInterrupt as stop:
        again = 'the same command without --force' if args.force else 'the same command'
        say(f'stopped; {again} goes on from the last whole epoch')
        sys.exit(128 + stop.args[0])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def fail(script: str, error: UserError) -> NoReturn:
    """End this process over an error of ours: one line on stderr, exit code 1, or BUSY where another makes the run.

    Of several processes that fail alike one speaks; one that fails alone, over an image that it reads, does too.
    """
    alone = isinstance(error, (DataError, CacheError)) and dist.is_initialized()
    if is_main() or alone or isinstance(error, ProcessError):
        # An error from a loader process arrives with that process's traceback; the last line is the message.
        message = re.sub(r'^common\.errors\.\w+: ', '', str(error).strip().splitlines()[-1])
        print(f'{script}: error: {message}', file=sys.stderr)
    sys.exit(error.exit_code)


def interrupt(signum: int, _) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # once is enough
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt(signum)


if __name__ == '__main__':
    cli()
