"""Models of timm, and gated branches behind their stages: x + sigmoid(gate) * branch(x) in place of the output x.

    model = timm.create_model('resnet50')
    insert(model, 'resnet50', STCI)                       # behind the last two stages: layer3 and layer4

The branches are children of `model.stci`, and forward hooks of the stages call them. So the plain model keeps its
class, its forward pass and the names of its tensors, and its weights load as they are; timm's feature extraction,
gradient checkpointing, torch.compile, DistributedDataParallel and copy.deepcopy see ordinary modules. A wrapper around
each stage would rename the tensors, and a new forward_features would have to be written for every family.
"""

from collections.abc import Callable
from functools import partial

import timm
import torch
from torch import nn

from common.checkpoint import size_arguments
from common.errors import ModelError
from common.registry import GATE_INIT, entry_of, is_own
from common.timm_models import SIZE, own_settings


def create(name: str, num_classes: int, img_size: int | None, **kwargs) -> nn.Module:
    """A model of timm by the name that it or the registry gives it. TypeError: an unknown keyword."""
    entry, size = entry_of(name), size_arguments(name, img_size)
    try:
        model = timm.create_model(entry['timm'], num_classes=num_classes, **{**entry.get('args', {}), **size, **kwargs})
    except TypeError as error:
        if is_own(name) or "'img_size'" not in str(error):
            raise
        own = own_settings(name)['img_size']
        raise ModelError(f'{name}: takes images of {own} x {own} pixels only; leave --img_size out') from error
    if not is_own(name):
        out = run_once(model, name, img_size)
        if getattr(out, 'shape', None) != (1, num_classes):
            got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ModelError(f'{name}: returns {got} for an image, not (1, {num_classes}): one logit a class')
    return model


class Gated(nn.Module):
    """x + sigmoid(gate) * stci(x), of (B, C, H, W), where x is the output of the module `stage`."""

    def __init__(self, stci: nn.Module, gate_init: float, stage: str):
        super().__init__()
        self.stci, self.stage = stci, stage
        self.gate = nn.Parameter(torch.tensor(float(gate_init)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.stci(x, self.gate)


def insert(
    model: nn.Module,
    name: str,
    make: Callable[..., nn.Module],
    img_size: int | None = None,
    gate_init: float = GATE_INIT,
    twist_stages: tuple[int, ...] = (3, 4),
    **branch,
) -> None:
    """Put a gated branch behind stages of a model, in place; `model.stci` holds them as 'stage3', 'stage4'.

    Stage s is the last module in timm's feature_info whose maps are 2 ** (s + 1) times smaller than the image, as in a
    ResNet.

    Args:
        model: of timm, before any weights are loaded.
        name: what errors call it.
        make: makes a branch from the number of channels and `branch`; it has reset_parameters.
        img_size: side of the square input in pixels; None for the size that timm states.
        gate_init: of the scalar gate, before its sigmoid.
    """
    modules, shapes = dict(model.named_modules()), {}
    info = {entry['reduction']: entry for entry in getattr(model, 'feature_info', None) or ()}  # the last of each
    found = {f'stage{s}': info.get(2 ** (s + 1), dict(module=None, num_chs=0)) for s in twist_stages}

    def note_shape(stage: nn.Module, _inputs: tuple, output) -> None:
        shapes[stage] = tuple(getattr(output, 'shape', ()))

    stages = {key: modules.get(entry['module']) for key, entry in found.items()}
    handles = [stage.register_forward_hook(note_shape) for stage in stages.values() if stage is not None]
    run_once(model, name, img_size)
    for handle in handles:
        handle.remove()
    for key, entry in found.items():
        shape = shapes.get(stages[key], ())
        if len(shape) != 4 or shape[1] != entry['num_chs'] or shape[2] != shape[3]:
            smaller = ' and '.join(str(2 ** (s + 1)) for s in twist_stages)
            raise ModelError(
                f'{name}: STCI needs features that are maps (B, C, H, W), {smaller} times smaller than the image; this '
                'model has none: give a CNN'
            )
    model.stci = nn.ModuleDict()
    for key, entry in found.items():
        model.stci[key] = Gated(make(entry['num_chs'], **branch), gate_init, entry['module'])
        model.stci[key].stci.reset_parameters()
    attach(model)


@torch.no_grad()
def run_once(model: nn.Module, name: str, img_size: int | None) -> torch.Tensor:
    """The output for one black image in evaluation mode; its side is img_size, or what timm states."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    side = img_size or (cfg.get('input_size') or (SIZE,))[-1]
    training = model.training
    try:
        return model.eval()(torch.zeros(1, 3, side, side, device=next(model.parameters()).device))
    except Exception as error:  # what a constructor's sizes allow is known to its forward pass alone
        reason = str(error).strip().partition('\n')[0] or type(error).__name__
        raise ModelError(f'{name}: cannot take an image of {side} x {side} pixels ({reason})') from error
    finally:
        model.train(training)


def attach(model: nn.Module) -> None:
    """Register the hooks of the stages that have none: after `insert`, and where a stage was replaced since."""
    for gated in model.stci.values():
        stage = model.get_submodule(gated.stage)
        if not any(getattr(hook, 'func', None) is _add for hook in stage._forward_hooks.values()):
            # A partial of a plain function, which deepcopy copies together with the branch; a closure it would not.
            stage.register_forward_hook(partial(_add, gated))


def _add(gated: Gated, _stage: nn.Module, _inputs: tuple, x: torch.Tensor) -> torch.Tensor:
    return gated(x)
