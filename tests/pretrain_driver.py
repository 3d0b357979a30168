"""pretrain_imagenet.py with a TwistNet of width 8, called 'tiny', and the loss of every step in a file.

DRIVER_NORM=group puts GroupNorm in the place of BatchNorm, whose statistics are of a process's own part of a step.
DRIVER_LOSSES names the file.
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
import registry
import train

registry.MODELS['tiny'] = dict(label='Tiny', twist=dict(base_width=8))
build = models.build_model


def without_batchnorm(*args, **kwargs) -> nn.Module:
    model = build(*args, **kwargs)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, child.num_features))
    return model


def recorded(*args, **kwargs):
    losses = []
    for step, loss, norm in train.train_steps(*args, **kwargs):
        losses.append(train.reduce_sum(loss.clone()).item() / train.world_size())
        if train.is_main():
            Path(os.environ['DRIVER_LOSSES']).write_text(json.dumps(losses))
        yield step, loss, norm


if os.environ.get('DRIVER_NORM') == 'group':
    models.build_model = without_batchnorm
if 'DRIVER_LOSSES' in os.environ:
    pretrain_imagenet.train_steps = recorded
torch.set_num_threads(1)
pretrain_imagenet.cli()
