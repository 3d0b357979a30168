"""pretrain_imagenet.py with a small TwistNet in float64, and the loss of every step in a file.

The model is called 'tiny' and has width 8 and four stages; in float64, so that what grows from rounding errors, as they
do in small batches under BatchNorm, stays small.
DRIVER_NORM=group puts GroupNorm in the place of BatchNorm, whose statistics are of a process's own part of a step.
DRIVER_LOSSES names the file, DRIVER_LOOK the steps between two looks at the loss.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from torch import nn

import models
import pretrain_imagenet
from common import distributed, registry
from training import engine

registry.MODELS['tiny'] = dict(label='Tiny', twist=dict(base_width=8))
build, normalize, blank_batch = models.build_model, engine.normalize, engine.blank_batch


def build_double(*args, **kwargs) -> nn.Module:
    model = build(*args, **kwargs)
    for module in list(model.modules()) if os.environ.get('DRIVER_NORM') == 'group' else ():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, child.num_features))
    return model.double()


losses: list[float] = []


def recorded(*args, **kwargs):
    for step, loss, norm in engine.train_steps(*args, **kwargs):
        losses.append(distributed.reduce_sum(loss.clone()).item() / distributed.world_size())
        if distributed.is_main():
            Path(os.environ['DRIVER_LOSSES']).write_text(json.dumps(losses))
        yield step, loss, norm


models.build_model = build_double
engine.normalize = lambda images, *statistics: normalize(images, *statistics).double()
engine.blank_batch = lambda *args: blank_batch(*args).double()
if 'DRIVER_LOSSES' in os.environ:
    pretrain_imagenet.train_steps = recorded
pretrain_imagenet.CHECK_EVERY = int(os.environ.get('DRIVER_LOOK', engine.CHECK_EVERY))
torch.set_num_threads(1)
pretrain_imagenet.cli()
