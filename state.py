"""What training changes: the model, its optimiser, the scaler of its gradients and the average of its weights."""

import argparse
from typing import NamedTuple

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import nn

import models
from common import distributed
from insertion import attach
from transforms import Preprocessing, blank_batch, preprocessing_of


class State(NamedTuple):
    """What training changes."""

    model: nn.Module  # the plain module
    parallel: nn.Module  # the model, with its gradients averaged over processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    preprocessing: Preprocessing  # of the model's input
    average: ModelEmaV3 | None = None  # of the weights, with --ema of pretraining


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
        args: the options of train.py or pretrain_imagenet.py; sync_bn, ema and ema_decay of the latter alone.
        last: the checkpoint; None to start.
        batch_size: images of a batch in this process.
        pretrained: as for models.build_model.
        fused: use the fused optimiser, which can skip a step on the device (see train_steps). Its momentum buffers
            start as zeros: the first step is the same, and a skipped one would leave them uninitialised.
    """
    model = models.build_model(args.model, num_classes, False if last else pretrained, args.img_size)
    if getattr(args, 'sync_bn', False):
        model = convert_sync_batchnorm(model)  # timm's: to torch's SyncBatchNorm, timm's own BatchNorm layers too
        if hasattr(model, 'stci'):
            attach(model)  # the BatchNorm at the end of a stage was replaced, and its hook with it
    model.to(device, memory_format=torch.channels_last)
    recipe = dict(momentum=args.momentum, nesterov=args.momentum > 0, weight_decay=args.weight_decay)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, **recipe, fused=fused or None)
    for parameter in model.parameters() if fused and args.momentum else ():
        optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    if last:
        model.load_state_dict(last['state_dict'])
        optimizer.load_state_dict(last['optimizer'])
        scaler.load_state_dict(last['scaler'])
    average = ModelEmaV3(model, args.ema_decay) if getattr(args, 'ema', False) else None
    if last and average:
        average.module.load_state_dict(last['average'])
    if args.compile:
        model.compile()  # in place: names in the state dict stay as they are
    parallel = distributed.parallelise(model, args.amp, blank_batch(batch_size, args.img_size, device))
    preprocessing = preprocessing_of(args.model, args.img_size, pretrained)
    return State(model, parallel, optimizer, scaler, device, preprocessing, average)
