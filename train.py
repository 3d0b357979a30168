"""Train one model on one fold of one data set.

    python train.py                                            # the demo: twistnet18 on procedural textures
    python train.py --data_dir data/dtd --dataset dtd --model twistnet18 --fold 1 --seed 42 --pretrained
    torchrun --nproc_per_node=4 train.py --data_dir data/dtd --dataset dtd

The run goes into its folder under --run_dir (see common/runs.py). The same command resumes an interrupted run, which
is bit-identical to one that was not interrupted; a complete run is left alone. `train` below is the whole run.
"""

from common import options, runs
from common.errors import Diverged, user_errors

if __name__ == '__main__':
    with user_errors('train.py'):
        options.parse_args()  # --help and bad options are answered before torch is imported, which takes seconds

import argparse
import math
import signal
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import models
from common import checkpoint, distributed, own_data, predictions
from common.distributed import is_main, is_quiet, process_rank, reduce_sum, say, share_object, share_weights
from common.splits import Splits, bits_of, split_digest
from common.statistics import fit_temperature
from common.timm_models import model_defines
from common.weights import weights_identity
from compute_flops import NO_FVCORE, fvcore_counter, measure
from datasets import notes_of, splits_of, tree_digest
from training import trained
from training.engine import (
    CHECK_EVERY,
    State,
    balanced_weights,
    build_state,
    evaluate,
    find_last,
    lr_at,
    mixed_loss,
    share_state,
    state_dicts,
    train_steps,
)
from training.loader import make_loaders, workers_of
from transforms import eval_settings, seed_of

# ---------------------------------------------------------------------------------------------- the run folder


class Run(NamedTuple):
    """What does not change during a run."""

    args: argparse.Namespace
    splits: Splits
    device: torch.device
    folder: Path
    config: dict  # what config.json holds
    class_weights: torch.Tensor | None = None  # (classes,), of the training loss; None for equal ones


def describe_run(args: argparse.Namespace, splits: Splits, device: torch.device) -> dict:
    """What config.json holds: options as resolved, environment, and the fingerprint of what defines the result.

    The fingerprint covers every option that can change a bit of the result, the number of processes, the names of the
    images of the split and the sizes of those that train and validate, and the bytes of the initial weights; on one
    machine with one thread count it determines the run. `tree` is a digest of the data set with all its folds: runs of
    several folds are of one data set if it is the same.
    """
    values = {k: v for k, v in vars(args).items() if k != 'force'}
    weights = weights_identity(args.model, args.pretrained)
    defines = options.defining(values)
    defines |= dict(processes=process_rank()[1], split=split_digest(splits), pretrained=weights)
    defines |= model_defines(args)
    return dict(
        options=values,
        defines=defines,
        environment=distributed.environment_of(device),
        fingerprint=runs.fingerprint(defines),
        tree=tree_digest(splits),
    )


def save_best(run: Run, state: State, progress: dict) -> None:
    """Write best.pt: the weights after the last epoch."""
    epoch, val_acc = progress['best_epoch'], progress['best_val_acc']
    more = dict(transform=eval_settings(*state.preprocessing))
    if progress.get('temperature') is not None:
        more['temperature'] = progress['temperature']
    weights = state.evaluated.state_dict()
    best = checkpoint.weights_file(run.args.model, run.splits.classes, epoch, val_acc, weights, **more)
    checkpoint.save_checkpoint(run.folder / 'best.pt', best)


def start_of(run: Run, model: nn.Module) -> dict:
    """The progress of a run that begins: what was loaded, and whether images of its fold trained that."""
    seen = share_object(lambda: trained.seen_before(run.args, run.splits))
    record = model.loaded_weights and model.loaded_weights._asdict()
    loaded = dict(pretrained=model.pretrained, loaded=model.loaded, weights=record)
    return dict(history=[], best_val_acc=-1.0, best_epoch=0, **loaded, **seen)


def say_opening(run: Run, progress: dict) -> None:
    """Report what is trained on what, reduced defaults, what the data set leaves out, and where the run resumes."""
    args, splits = run.args, run.splits
    where = args.lists or args.data_dir
    data = args.dataset if where is None else f'{args.dataset} in {where}'
    data = data if args.name is None else f'{args.name}: {data}'
    if where is args.data_dir is not None and 'dataset' not in args.given:
        data += ' (by its layout; --dataset can name another)'
    images = dict(train=len(splits.train), validate=len(splits.val), test=len(splits.test))
    weights = checkpoint.Loaded(**record).brief if (record := progress.get('weights')) else None
    environment, world = run.config['environment'], process_rank()[1]
    say(runs.opening(args, f'{data}, fold {args.fold}', images, len(splits.classes), weights, environment, world))
    for line in options.lowered_defaults(args, options.RECIPES[args.recipe]):
        say(line)
    for line in share_object(lambda: notes_of(splits)):
        say(f'note: {line}')
    if progress['history']:
        say(f'{run.folder}: resuming after epoch {len(progress["history"])}')


# ---------------------------------------------------------------------------------------------- loop


def train_images(run: Run, state: State, loader: DataLoader, epoch: int, bar: tqdm) -> tuple[float, float | None]:
    """Train on every image once; returns means over all processes: of the loss, and of the norm of all gradients.

    The norm is that before clipping. Steps that fp16's scaler skips, where it is not finite, are left out; None where
    all were. Raises Diverged.
    """
    args, classes, steps, rank = run.args, len(run.splits.classes), len(loader), process_rank()[0]
    torch.manual_seed(seed_of('model', args.seed, epoch, rank))  # dropout and the like
    loader.batch_sampler.epoch = epoch

    def batch_loss(images: torch.Tensor, labels: torch.Tensor, step: int, _: int) -> torch.Tensor:
        return mixed_loss(args, state, images, labels, classes, ('mix', args.seed, step, rank), run.class_weights)

    total = torch.zeros(3, dtype=torch.float64, device=run.device)
    first_step, schedule = (epoch - 1) * steps, partial(lr_at, args=args, steps=steps)
    made = train_steps(state, loader, first_step, schedule, batch_loss, args.clip_grad)
    for done, (_, loss, norm) in enumerate(made, start=1):
        total += torch.stack([loss, norm.nan_to_num(0, 0, 0), norm.isfinite()])
        if done % CHECK_EVERY == 0 or done == steps:
            mean = reduce_sum(total[0].clone()).item() / done / process_rank()[1]
            if not math.isfinite(mean):
                raise Diverged(f'the training loss is {mean} within {done} steps of this epoch')
            bar.set_postfix_str(f'loss {mean:.3f}', refresh=False)
        bar.update()
    loss, norm, finite = reduce_sum(total).tolist()
    return loss / steps / distributed.world_size(), norm / finite if finite else None


# ---------------------------------------------------------------------------------------------- a run


def train_epoch(run: Run, state: State, loaders: list[DataLoader], epoch: int, bar: tqdm) -> tuple[dict, torch.Tensor]:
    """Train for an epoch (from 1) and validate; returns its line of log.jsonl, and the logits. Raises Diverged."""
    args, model, (train_loader, val_loader, _), start = run.args, state.evaluated, loaders, time.perf_counter()
    bar.set_description(f'{run.folder.name} epoch {epoch}/{args.epochs}', refresh=False)
    train_loss, grad_norm = train_images(run, state, train_loader, epoch, bar)
    train_seconds = time.perf_counter() - start
    share_state(state)
    validated, selection, statistics = {}, {}, state.preprocessing.statistics
    logits = torch.zeros(len(run.splits.val), len(run.splits.classes), device=run.device)
    if run.splits.val:
        with models.watch_selection(model) as selection:
            val_loss, val_acc = evaluate(model, val_loader, run.device, args.amp, bar, statistics, logits)
        if not math.isfinite(val_loss):
            raise Diverged(f'the validation loss is {val_loss} after epoch {epoch}')
        validated = dict(val_loss=val_loss, val_acc=val_acc)
    line = dict(
        epoch=epoch,
        lr=lr_at(epoch * len(train_loader) - 1, args, len(train_loader)),  # of its last step
        train_loss=train_loss,
        grad_norm=grad_norm,
        **validated,
        seconds=round(time.perf_counter() - start, 3),
        images_per_second=round(len(train_loader) * args.batch_size / train_seconds, 1),
        gates=models.gates_of(model),
        selection={name: distributed.mean_of(reduce_sum(total)) for name, total in selection.items()},
    )
    return line, logits


def save_epoch(run: Run, state: State, progress: dict, line: dict, logits: torch.Tensor) -> None:
    """Add an epoch to the run's progress and write last.pt, best.pt if it is the best so far, and log.jsonl.

    `logits` are those of the validation images, to which the temperature is fitted.
    """
    epoch, history = line['epoch'], progress['history']
    history.append(line)
    # The later one on ties; without images of validation, the last one.
    improved = not run.splits.val or line['val_acc'] >= progress['best_val_acc']
    if improved:
        progress |= dict(best_val_acc=line.get('val_acc'), best_epoch=epoch)
        if run.splits.val:
            labels = np.array([label for _, label in run.splits.val])
            progress['temperature'] = fit_temperature(logits.cpu().numpy(), labels)
    if is_main():
        last = dict(fingerprint=run.config['fingerprint'], run=progress) | state_dicts(state)
        checkpoint.save_checkpoint(run.folder / 'last.pt', last)  # before best.pt, see engine.find_last
        if improved:
            save_best(run, state, progress)
        runs.write_log(run.folder / 'log.jsonl', history)
    if is_quiet():
        accuracy = f'val {line["val_acc"]:.2f} %, ' if run.splits.val else ''
        left = (run.args.epochs - epoch) * sum(line['seconds'] for line in history) / epoch
        say(
            f'{run.folder.name} epoch {epoch}/{run.args.epochs}: train loss {line["train_loss"]:.3f}, '
            f'{accuracy}{line["seconds"]:.1f} s, {tqdm.format_interval(left)} left'
        )


def open_events(folder: Path, history: list[dict]):
    """A torch.utils.tensorboard.SummaryWriter, whose file replaces earlier ones and begins with the epochs made."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and --tensorboard alone needs it

    for path in folder.glob(runs.EVENTS):
        path.unlink()
    writer = SummaryWriter(folder, purge_step=0)  # a TensorBoard that shows the run drops what it has of it
    for line in history:
        add_events(writer, line)
    return writer


def add_events(writer, line: dict) -> None:
    """Write the numbers of a line of log.jsonl; those by block are called 'gates/layer3.0' and so on."""
    scalars = {key: value for key, value in line.items() if key != 'epoch'}
    for key in ('gates', 'selection'):
        scalars |= {f'{key}/{block}': value for block, value in scalars.pop(key, {}).items()}
    for tag, value in scalars.items():
        if value is not None:
            writer.add_scalar(tag, value, line['epoch'])
    writer.flush()


def is_out_of_patience(run: Run, progress: dict) -> bool:
    """Whether --patience epochs have passed since the best one; says so."""
    args, done, best = run.args, len(progress['history']), progress['best_epoch']
    if args.patience is None or done - best < args.patience:
        return False
    schedule = f'the learning rate followed the schedule of --epochs {args.epochs}'
    say(f'{run.folder.name}: stopped after epoch {done}, --patience {args.patience} after the best, {best}; {schedule}')
    return True


def finish(run: Run, state: State, progress: dict, size: dict, loader: DataLoader, bar: tqdm) -> dict:
    """Test once, after training: the last weights for the record, and the chosen ones, where these are others."""
    args, splits, model, folder = run.args, run.splits, state.evaluated, run.folder

    def test() -> tuple[float, float, torch.Tensor]:
        logits = torch.zeros(len(splits.test), len(splits.classes), device=run.device)
        return *evaluate(model, loader, run.device, args.amp, bar, state.preprocessing.statistics, logits), logits

    bar.set_description(f'{folder.name} test', refresh=False)
    test_loss, test_acc, logits = test()
    test_acc_last = test_acc
    if progress['best_epoch'] < len(progress['history']):
        if is_main():
            model.load_state_dict(checkpoint.read_checkpoint(folder / 'best.pt')['state_dict'])
        share_weights(model)
        bar.total += len(loader)
        test_loss, test_acc, logits = test()
    bar.close()
    if math.isnan(test_loss) and not splits.val:  # which no epoch has seen
        raise Diverged(f'the test loss is {test_loss} after the last epoch')
    if splits.val and progress.get('temperature') is None:
        say('note: no temperature fits the validation images, so probabilities are not calibrated')
    if not math.isfinite(test_loss):
        say(f'note: the test loss is {test_loss}, which results.json holds as null; the accuracy stands')
        test_loss = None  # JSON has no such number
    results = {key: getattr(args, key) for key in ('dataset', 'fold', 'seed', 'model')} | dict(
        test_acc=test_acc,
        test_loss=test_loss,
        **(dict(best_val_acc=progress['best_val_acc']) if splits.val else {}),
        best_epoch=progress['best_epoch'],
        test_acc_last=test_acc_last,
        params_M=size['params_M'],
        macs_G=size['macs_G'],  # of one image of this run; None without fvcore
        seconds=round(sum(line['seconds'] for line in progress['history']), 1),
        **{f'n_{subset}': len(getattr(splits, subset)) for subset in ('train', 'val', 'test')},
        pretrained=progress['pretrained'],
        loaded=progress['loaded'],
        weights=progress.get('weights'),  # older code began runs without it
        fingerprint=run.config['fingerprint'],
        **({} if args.name is None else dict(name=args.name)),
        **({} if args.patience is None else dict(epochs_run=len(progress['history']))),
        **{key: progress[key] for key in ('caution', 'seen') if key in progress},
        temperature=progress.get('temperature'),  # of calibrated probabilities; None: not fitted
    )
    if is_main():
        runs.write_log(folder / 'log.jsonl', progress['history'])  # may be an epoch behind last.pt after a kill
        probabilities = logits.softmax(1).cpu().numpy()
        predictions.write_predictions(
            folder / runs.PREDICTIONS, splits.test, splits.classes, probabilities, splits.root
        )
        runs.write_json(folder / 'results.json', results)
        (folder / 'last.pt').unlink(missing_ok=True)
    return results


def train(args: argparse.Namespace) -> tuple[Path, dict]:
    """Train and test as the options say; returns the run folder and what its results.json holds."""
    options.check(args)
    fold = splits_of(vars(args))
    splits = fold.joined() if args.train_on == 'trainval' else fold
    _, world = process_rank()
    options.check_batch(args, len(splits.train), sum(map(len, splits[:3])), world)
    device = distributed.setup(args.device, args.seed)
    args.device, args.amp = device.type, distributed.resolve_amp(args.amp, device)
    args.num_workers = workers_of(args.num_workers, device)

    folder = Path(args.run_dir) / runs.run_name(args.name or args.dataset, args.fold, args.model, args.seed)
    weights = balanced_weights(splits, device) if args.class_weights == 'balanced' else None
    run = Run(args, splits, device, folder, describe_run(args, fold, device), weights)
    results, last, notes = share_object(lambda: find_last(folder, run.config, args.force))
    for note in notes:
        say(note)
    if results is not None:
        if args.tensorboard and is_main():
            open_events(folder, runs.read_log(folder / 'log.jsonl')).close()
        return folder, results
    if splits.division and is_main():
        own_data.write_split(folder / runs.SPLIT, fold)

    state = build_state(args, len(splits.classes), device, last, args.batch_size // world, args.pretrained)
    size = measure(args.model, len(splits.classes), args.img_size)  # now: it must not fail after the training
    if fvcore_counter() is None:
        say(NO_FVCORE)
    progress = last['run'] if last else start_of(run, state.model)
    say_opening(run, progress)
    bits, notes = bits_of(splits)
    state = state._replace(preprocessing=state.preprocessing._replace(bits=bits, resize=args.resize))
    for note in notes:
        say(f'note: {note}')
    if last and is_main() and progress['best_epoch'] == len(progress['history']):
        save_best(run, state, progress)  # of a run killed between last.pt and best.pt

    loaders = make_loaders(args, splits, device, state.preprocessing)
    done, (train_batches, val_batches, test_batches) = len(progress['history']), (len(loader) for loader in loaders)
    an_epoch = train_batches + val_batches
    total, initial = args.epochs * an_epoch + test_batches, done * an_epoch
    bar = tqdm(total=total, initial=initial, disable=is_quiet(), smoothing=0.05, **runs.terminal())
    events = open_events(folder, progress['history']) if args.tensorboard and is_main() else None
    for epoch in range(done + 1, args.epochs + 1):
        if is_out_of_patience(run, progress):
            break
        line, logits = train_epoch(run, state, loaders, epoch, bar)
        save_epoch(run, state, progress, line, logits)
        if events:
            add_events(events, line)
    if events:
        events.close()
    return folder, finish(run, state, progress, size, loaders[2], bar)


def main(args: argparse.Namespace) -> None:
    folder, results = train(args)
    if is_main():
        how = 'the last; trained on train and val)'
        if args.train_on == 'train':
            how = f'chosen by validation accuracy {results["best_val_acc"]:.2f} %); '
            how += f'last epoch {results["test_acc_last"]:.2f} %'
        print(f'{folder}: test accuracy {results["test_acc"]:.2f} % (epoch {results["best_epoch"]}, {how}')


def cli(argv: list[str] | None = None) -> None:
    with user_errors('train.py'):
        args = options.parse_args(argv)
    again = 'the same command' + ' without --force' * args.force
    stopped = f'stopped; {again} resumes after the last whole epoch'
    with distributed.training_process('train.py', stopped, (signal.SIGTERM, signal.SIGINT)):
        main(args)


if __name__ == '__main__':
    cli()
