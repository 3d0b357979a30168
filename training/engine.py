"""The engine of train.py and pretrain_imagenet.py: the model and its optimiser, the loss, steps, and an evaluation."""

import argparse
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, convert_sync_batchnorm
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import models
from common import distributed, runs
from common.checkpoint import classifiers_of, read_checkpoint
from common.distributed import autocast, logits_of, reduce_sum
from common.errors import ModelError, RunError
from common.insertion import attach
from common.options import NO_GATES
from common.splits import Splits
from transforms import Preprocessing, blank_batch, mix, normalize, preprocessing_of

CHECK_EVERY = 20  # steps between two looks at the loss, each of which waits for the device


class State(NamedTuple):
    """What training changes."""

    model: nn.Module  # the plain module
    parallel: nn.Module  # the model, with its gradients averaged over processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    preprocessing: Preprocessing  # of the model's input
    average: ModelEmaV3 | None = None  # of the weights, with --ema
    frozen: Sequence[nn.Module] = ()  # BatchNorms of --freeze, which stay in evaluation mode

    @property
    def evaluated(self) -> nn.Module:
        """The module whose weights are validated, chosen, saved and tested."""
        return self.average.module if self.average else self.model


def build_state(
    args: argparse.Namespace,
    num_classes: int,
    device: torch.device,
    last: dict | None,
    batch_size: int,
    pretrained: bool | str = False,
    fused: bool = False,
) -> State:
    """Model, optimiser, scaler and average, new or as they are in a checkpoint.

    Args:
        args: the options of train.py or pretrain_imagenet.py; sync_bn and drop_path are the latter's alone.
        last: the checkpoint; None to start.
        batch_size: images of a batch in this process.
        fused: use the fused optimiser, which need not wait where fp16 skips a step. Its momentum buffers start as
            zeros: the first step is the same, and a skipped one would leave them uninitialised.
    """
    model = build_dropping(args, num_classes, False if last else pretrained)
    if getattr(args, 'sync_bn', False):
        model = convert_sync_batchnorm(model)  # timm's: to torch's SyncBatchNorm, timm's own BatchNorm layers too
        if hasattr(model, 'stci'):
            attach(model)  # the BatchNorm at the end of a stage was replaced, and its hook with it
    model.to(device, memory_format=torch.channels_last)
    frozen, norms = frozen_parts(args, model)
    optimizer = build_optimizer(args, model, fused, {*frozen.values()})
    for parameter in frozen.values():  # now: timm makes groups of what has gradients alone
        parameter.requires_grad_(False)
    if frozen and last is None:
        distributed.say(frozen_note(args, model, frozen))
    for parameter in model.parameters() if fused and args.momentum and args.opt == 'sgd' else ():
        optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    if last:
        model.load_state_dict(last['state_dict'])
        optimizer.load_state_dict(last['optimizer'])
        scaler.load_state_dict(last['scaler'])
    average = ModelEmaV3(model, args.ema_decay, use_warmup=True) if args.ema else None
    if last and average:
        average.module.load_state_dict(last['average'])
    if args.compile:
        model.compile()  # in place: names in the state dict stay as they are
    parallel = distributed.parallelise(model, args.amp, blank_batch(batch_size, args.img_size, device), args.model)
    preprocessing = preprocessing_of(args.model, args.img_size, pretrained)
    return State(model, parallel, optimizer, scaler, device, preprocessing, average, norms)


def build_dropping(args: argparse.Namespace, num_classes: int, pretrained: bool | str) -> nn.Module:
    """The model of the options, with --drop_path where it is given. RunError: the model has none."""
    rate = getattr(args, 'drop_path', None)
    build = partial(models.build_model, args.model, num_classes, pretrained, args.img_size)
    try:
        model = build() if rate is None else build(drop_path_rate=rate)
    except ModelError as error:
        if rate is None or not isinstance(error.__cause__, TypeError):  # its constructor knows no such keyword
            raise
        model = build()
    if rate and not any(isinstance(module, DropPath) for module in model.modules()):  # or it ignores the argument
        raise RunError(f'--drop_path {rate}: {args.model} has no stochastic depth; leave it out')
    return model


def is_below(key: str, tops: Iterable[str]) -> bool:
    """Whether a module or parameter is one of `tops` or inside of one."""
    return any(f'{key}.'.startswith(f'{top}.') for top in tops)


def frozen_parts(args: argparse.Namespace, model: nn.Module) -> tuple[dict[str, nn.Parameter], list[nn.Module]]:
    """The parameters of the modules that --freeze names, and their BatchNorms. Raises RunError for other names."""
    if getattr(args, 'freeze', None) is None:
        return {}, []
    names, heads, modules = args.freeze.split(','), classifiers_of(model), dict(model.named_modules())
    all_but_heads = names == ['all'] and heads  # a model of --import need not tell its classifier
    odd = [name for name in names if name not in modules or not [*modules[name].parameters()]]
    if odd and not all_but_heads:
        top = ', '.join(name for name, module in model.named_children() if [*module.parameters()])
        raise RunError(f'--freeze {odd[0]}: no module of {args.model} with parameters; at the top level it has {top}')

    def is_frozen(key: str) -> bool:
        return not is_below(key, heads) if all_but_heads else is_below(key, names)

    frozen = {key: parameter for key, parameter in model.named_parameters() if is_frozen(key)}
    if len(frozen) == len([*model.parameters()]):
        raise RunError(f'--freeze {args.freeze}: leaves nothing of {args.model} to train')
    norm = nn.modules.batchnorm._BatchNorm  # timm's are of it too
    return frozen, [module for key, module in modules.items() if isinstance(module, norm) and is_frozen(key)]


def frozen_note(args: argparse.Namespace, model: nn.Module, frozen: dict[str, nn.Parameter]) -> str:
    """How much of a model that begins learns, and what is frozen that was not loaded."""
    total, still = (sum(p.numel() for p in ps) / 1e6 for ps in (model.parameters(), frozen.values()))
    loaded = model.loaded_weights
    fresh = dict.fromkeys(key.partition('.')[0] for key in frozen if not loaded or is_below(key, loaded.fresh))
    note = f'note: --freeze {args.freeze}: {total - still:.3f}M of {total:.3f}M parameters learn'
    return note + f'; frozen as initialised, not as loaded: {", ".join(fresh)}' * bool(fresh)


def build_optimizer(
    args: argparse.Namespace, model: nn.Module, fused: bool = False, frozen: Collection[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """timm's optimiser of the name --opt, without the frozen parameters; fused is for sgd alone."""
    groups = parameter_groups(args, model)
    groups = [group | dict(params=[p for p in group['params'] if p not in frozen]) for group in groups]
    more = dict(nesterov=args.momentum > 0, fused=fused or None) if args.opt == 'sgd' else {}
    more |= dict(lr=args.lr, weight_decay=args.weight_decay, momentum=args.momentum)
    return create_optimizer_v2([group for group in groups if group['params']], args.opt, **more)


def parameter_groups(args: argparse.Namespace, model: nn.Module) -> list[dict]:
    """The parameters in groups for an optimiser; `lr_scale` of a group is a factor of its learning rate, default 1."""
    kept = getattr(model, 'no_weight_decay', set)()
    decay = dict(weight_decay=args.weight_decay, no_weight_decay_list=kept)
    if args.opt == 'sgd':
        decay = dict(weight_decay=args.weight_decay, weight_decay_exclude_1d=False)  # on all parameters
    if args.layer_decay is not None:
        groups = param_groups_layer_decay(model, layer_decay=args.layer_decay, **decay)
        if args.layer_decay != 1 and len({group['lr_scale'] for group in groups}) == 1:
            raise RunError(f'--layer_decay {args.layer_decay}: timm knows no order of the layers of {args.model}')
        groups = scale_branches(model, groups)
    elif args.opt == 'sgd':
        groups = [dict(params=list(model.parameters()))]
    else:
        groups = param_groups_weight_decay(model, **decay)
    if args.gate_lr == 1:
        return groups
    gates = {parameter for name, parameter in model.named_parameters() if name.rpartition('.')[2] == 'gate'}
    if not gates:
        raise RunError(NO_GATES.format(**vars(args)))
    return rescaled(groups, gates, lambda scale: args.gate_lr * scale)


def rescaled(groups: list[dict], chosen: set[nn.Parameter], scale: Callable[[float], float]) -> list[dict]:
    """The groups with the `chosen` parameters in groups of their own, whose lr_scale is `scale` of what it was."""
    rest = [group | dict(params=[p for p in group['params'] if p not in chosen]) for group in groups]
    own = [group | dict(params=[p for p in group['params'] if p in chosen]) for group in groups]
    own = [group | dict(lr_scale=scale(group.get('lr_scale', 1.0))) for group in own]
    return [group for group in rest + own if group['params']]


def scale_branches(model: nn.Module, groups: list[dict]) -> list[dict]:
    """The groups with the branches of stci_NAME at the lr_scale of the layer that they stand behind.

    timm's patterns know no branch and take it for the last layer. The layer before is that of the last parameter up to
    the end of the stage, which may have none itself.
    """
    scales = {p: group['lr_scale'] for group in groups for p in group['params']}
    for gated in getattr(model, 'stci', {}).values():
        names = [name for name, _ in model.named_modules()]
        end = max(i for i, name in enumerate(names) if f'{name}.'.startswith(f'{gated.stage}.'))
        before = [p for name in names[: end + 1] for p in model.get_submodule(name).parameters(recurse=False)]
        groups = rescaled(groups, {*gated.parameters()}, lambda _, scale=scales[before[-1]]: scale)
    return groups


def state_dicts(state: State) -> dict:
    """What a checkpoint holds of a state, see build_state."""
    dicts = {key: getattr(state, key).state_dict() for key in ('optimizer', 'scaler')}
    average = state.average and state.average.module.state_dict()
    return dict(state_dict=state.model.state_dict(), **dicts, average=average)


def share_state(state: State) -> None:
    """Give every process the main one's weights and buffers, so that all evaluate what is saved."""
    for module in dict.fromkeys((state.model, state.evaluated)):
        distributed.share_weights(module)


def balanced_weights(splits: Splits, device: torch.device) -> torch.Tensor:
    """Weights n / (K n_c) of the K classes, n_c of the n training images being of class c: (K,)."""
    counts = torch.bincount(torch.tensor([label for _, label in splits.train]), minlength=len(splits.classes))
    if not counts.all():
        missing = splits.classes[int(counts.argmin())]
        raise RunError(f"--class_weights balanced: class '{missing}' has no training image")
    return (counts.sum() / (len(counts) * counts)).to(device)


# ---------------------------------------------------------------------------------------------- schedule and loss


def lr_at(step: int, args: argparse.Namespace, steps: int) -> float:
    """Learning rate of a step (from 0), of which an epoch has `steps`: linear warm-up, then a cosine to --min_lr."""
    warmup, total = args.warmup_epochs * steps, args.epochs * steps
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return args.min_lr + (args.lr - args.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def mixed_loss(
    args: argparse.Namespace,
    state: State,
    images: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    key: tuple,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of normalised images after Mixup or CutMix, whose randomness is drawn from `key`.

    `weights` of the classes apply to probabilities, mixed or not: the loss is always a mean over images. Of class
    indices torch would divide by the sum of the batch's weights.
    """
    images, targets = mix(images, labels, classes, args.mixup, args.cutmix, key)
    if weights is not None and targets.ndim == 1:
        targets = F.one_hot(targets, classes).float()
    with autocast(state.device, args.amp):
        logits = logits_of(state.parallel, images, args.model)
        return F.cross_entropy(logits, targets, weight=weights, label_smoothing=args.label_smoothing)


# ---------------------------------------------------------------------------------------------- loops


def train_steps(
    state: State,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    first_step: int,
    schedule: Callable[[int], float],
    batch_loss: Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor],
    clip_grad: float,
    accumulate: int = 1,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Make the optimiser's steps, one after another; with a fused optimiser nothing here waits for the device.

    Args:
        batches: (uint8 images, labels); a whole number of steps of `accumulate` batches each.
        schedule: learning rate by step.
        batch_loss: loss of (normalised images, labels, step, part of the step from 0).
        clip_grad: largest norm of all gradients together; 0 turns clipping off.
        accumulate: batches whose gradients are averaged in a step.

    Yields:
        the number of the step, its mean loss in this process, and the norm of the gradients (both on the device).
    """
    model, optimizer, scaler, device = state.model, state.optimizer, state.scaler, state.device
    model.train()
    for module in state.frozen:
        module.eval()
    parameters = list(model.parameters())
    for index, (images, labels) in enumerate(batches):
        step, part = first_step + index // accumulate, index % accumulate
        if part == 0:
            for group in optimizer.param_groups:
                group['lr'] = schedule(step) * group.get('lr_scale', 1.0)
            optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), device=device)
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        images = normalize(images, *state.preprocessing.statistics)
        loss = batch_loss(images, labels, step, part) / accumulate
        scaler.scale(loss).backward()
        total += loss.detach()
        if part < accumulate - 1:
            continue
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, clip_grad or math.inf)  # without a bound they are multiplied by one
        scaler.step(optimizer)
        scaler.update()
        if state.average:
            state.average.update(model, step + 1)
        yield step, total, norm


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    amp: str,
    bar: tqdm | None = None,
    statistics: tuple = (),
    outputs: torch.Tensor | None = None,
) -> tuple[float, float]:
    """Cross-entropy and top-1 accuracy; each image counts once, whatever the number of processes.

    Args:
        model: the plain module, with the same weights and buffers in every process.
        loader: over an ImageList by EvalBatches.
        statistics: mean and std of the model's input; (): ImageNet's.
        outputs: (images, classes) float32 zeros on the device; the logits of the model are put there.

    Returns:
        mean loss in nats, and accuracy in percent, the same in every process.
    """
    model.eval()
    batches = loader.batch_sampler
    # A slot for each batch, filled by one process: summed in the same order whatever the number of processes.
    sums = torch.zeros(2, math.ceil(batches.length / batches.batch_size), dtype=torch.float64, device=device)
    for slot, (images, labels) in zip(batches.slots, loader):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        images = normalize(images, *statistics)
        with autocast(device, amp):
            logits = model(images)
        sums[0, slot] = F.cross_entropy(logits.float(), labels, reduction='sum')
        sums[1, slot] = (logits.argmax(1) == labels).sum()
        if outputs is not None:
            outputs[slot * batches.batch_size :][: len(images)] = logits
        if bar is not None:
            bar.update()
    loss, correct = reduce_sum(sums).sum(1).tolist()
    if outputs is not None:
        reduce_sum(outputs)
    return loss / batches.length, 100 * correct / batches.length


# ---------------------------------------------------------------------------------------------- resuming a run folder


def find_last(folder: Path, config: dict, force: bool) -> tuple[dict | None, dict | None, list[str]]:
    """Lock a run folder of train.py and find where its run resumes; see runs.open_run.

    Returns:
        the results if the run is complete, the checkpoint to resume from if there is one, and notes.
    """
    runs.claim(folder)
    results, changed = runs.open_run(folder, config, force)
    notes = [f'note: {folder} was {changed}; its last bits may differ from an undisturbed run'] if changed else []
    if results is not None:
        (folder / 'last.pt').unlink(missing_ok=True)
        return results, None, [*notes, f'{folder} is complete; --force would start it again']
    try:
        last = read_checkpoint(folder / 'last.pt')
    except FileNotFoundError:
        return None, None, notes
    except ModelError as error:
        runs.write_json(folder / 'config.json', config)  # of the environment that makes every epoch
        return None, None, [*notes, f'note: {error}; starting again from epoch 1, with the same result']
    best, progress = folder / 'best.pt', last['run']
    held = read_checkpoint(best)['epoch'] if best.exists() else None
    # Where the last epoch is the best one, train.py makes best.pt again of last.pt, which is written first.
    if progress['best_epoch'] not in (held, len(progress['history'])):
        runs.write_json(folder / 'config.json', config)
        lost = f'{best} is missing or of another epoch than the best one; starting again from epoch 1'
        return None, None, [*notes, f'note: {lost}']
    return None, last, notes
