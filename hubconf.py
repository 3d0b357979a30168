"""Models for torch.hub.

    model = torch.hub.load('user/repository', 'twistnet18', num_classes=47, pretrained=True)
    model = torch.hub.load('/path/to/TwistNet-2D', 'stci_resnet50', source='local', num_classes=10)

The names are twistnet18, its variants, and stci_NAME for the CNN NAME of timm; arguments are those of build_model.
"""

import functools

import timm

import models
from common.registry import MODELS, STCI

dependencies = ['torch', 'timm']

_own = [name for name, entry in MODELS.items() if 'twist' in entry]
for _name in [*_own, *(STCI + name for name in {*timm.list_models(), *MODELS} - {*_own})]:
    globals()[_name] = functools.partial(models.build_model, _name)
    globals()[_name].__doc__ = models.build_model.__doc__  # of torch.hub.help
