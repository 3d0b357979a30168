"""Checkpoint and weights files: read without running code, adapted to a model, written atomically."""

import argparse
import io
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from timm.models import adapt_input_conv, build_model_with_cfg, get_pretrained_cfg, resolve_pretrained_cfg
from torch import nn

from common import runs
from common.errors import ModelError, UnsafeCheckpoint, lfs_pointer
from common.registry import BRANCH, MODELS, entry_of, is_own
from common.weights import split_trunk, weights_source

# What other training code puts before the names of all tensors: the attribute of a wrapper that holds the model.
WRAPPERS = ('module', '_orig_mod', 'model', 'backbone', 'net', 'network', 'encoder', 'timm_model')

# ---------------------------------------------------------------------------------------------- files


def read_checkpoint(path: str | Path) -> Any:
    """Read a checkpoint, or a .safetensors file of the hub, onto the CPU without running any code that it may carry.

    Raises:
        FileNotFoundError: there is no such file.
        ModelError: the file cannot be read, is damaged, or holds pickled code and is refused.
    """
    # Data, which runs no code: the training scripts of timm and torchvision store their options beside the weights.
    torch.serialization.add_safe_globals([argparse.Namespace])  # here, because timm takes it away after its own reading
    try:
        if Path(path).suffix == '.safetensors':
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in the unpickling
        if 'unsupported global' in str(error).lower():
            raise UnsafeCheckpoint(
                f'{path}: refused, the file holds pickled code, not only tensors; give a file of the state dict alone, '
                'as torch.save writes it from the code that made this one'
            ) from error
        why = getattr(error, 'strerror', None) or lfs_pointer(path) or 'damaged or not a PyTorch checkpoint'
        raise ModelError(f'{path}: {why}') from error


def read_weights(path: Path) -> Any:
    """read_checkpoint of a file that must be there."""
    try:
        return read_checkpoint(path)
    except FileNotFoundError as error:
        raise ModelError(f'{path}: no such weights file') from error


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """torch.save, atomically. Raises RunError if the disk is full; the previous file is then untouched."""
    buffer = io.BytesIO()  # so that a full disk raises in write_atomic and not inside torch.save
    torch.save(checkpoint, buffer)
    runs.write_atomic(path, buffer.getvalue())


def weights_file(model: str, classes: list[str], epoch: int, val_acc: float, state_dict: dict, **more) -> dict:
    """What best.pt and weights/<model>_imagenet.pt hold: plain tensors on the CPU and where they come from.

    Args:
        model: its name in the registry.
        classes: their names, in the order of the logits.
        epoch, val_acc: after which the weights were taken, and their validation accuracy in percent.
        state_dict: of the plain module.
        more: `transform`, what an evaluation does with an image; and what else is recorded.
    """
    layout = torch.contiguous_format
    tensors = {name: tensor.detach().cpu().clone(memory_format=layout) for name, tensor in state_dict.items()}
    return dict(
        model=model, num_classes=len(classes), classes=classes, epoch=epoch, val_acc=val_acc, state_dict=tensors, **more
    )


# ---------------------------------------------------------------------------------------------- names


def unwrap(state: dict[str, torch.Tensor], own: Iterable[str]) -> dict[str, torch.Tensor]:
    """A state dict without the WRAPPERS that most of its names begin with, unless it has a name of `own` as it is."""
    while state and not state.keys() & set(own):
        ((wrapper, _),) = Counter(key.partition('.')[0] for key in state).most_common(1)
        if wrapper not in WRAPPERS:
            break
        state = {key.removeprefix(f'{wrapper}.'): value for key, value in state.items()}
    return state


def trunk_name(key: str) -> str:
    """A parameter name of timm's resnet18 -> TwistNet's."""
    return re.sub(r'^bn1\.', 'stem.1.', re.sub(r'^conv1\.', 'stem.0.', key))


# ---------------------------------------------------------------------------------------------- pretrained weights


class Loaded(NamedTuple):
    """What a model took from weights; results.json has it under `weights`."""

    tensors: int  # loaded
    of: int  # tensors of the model
    share: float  # of its parameters that were loaded, 0 to 1
    gates: int  # loaded ones, which then do not start at the model's own value
    fresh: list[str]  # layers left as initialised
    origin: str  # the weights, in words
    sentence: str  # all of this for people

    @property
    def brief(self) -> str:
        """How the sentence begins."""
        return f'loaded {self.tensors} of {self.of} tensors ({self.share:.0%} of the parameters) from {self.origin}'


def load_pretrained(model: nn.Module, name: str, pretrained: bool | str | Path, img_size: int | None = None) -> None:
    """Load the weights that `pretrained` asks for; sets model.loaded_weights, .pretrained and .loaded."""
    model.loaded_weights = model.pretrained = model.loaded = None
    source, (trunk, _) = weights_source(name, pretrained), split_trunk(pretrained)
    if isinstance(source, Path):
        origin = source.name.removesuffix('_imagenet.pt')  # as pretraining names its files
        load_weights(model, name, read_weights(source), str(source), origin if origin in MODELS else None, trunk)
    elif source is not None:
        # timm resizes parameters that depend on the image size as it loads them.
        state = fetch_from_timm(source, **size_arguments(name, img_size))
        load_weights(model, name, state, f'timm {source}', trunk=trunk)


def size_arguments(name: str, img_size: int | None) -> dict:
    """Arguments of the constructor of timm for square images of this side, where parameters depend on it."""
    entry = entry_of(name)
    if is_own(name):
        return dict(img_size=img_size or 224) if entry.get('resolution') else {}
    cfg = get_pretrained_cfg(entry['timm'])
    fixed = cfg is not None and cfg.fixed_input_size and img_size not in (None, cfg.input_size[-1])
    return dict(img_size=img_size) if fixed else {}


def build_for_timm(make: Callable[..., nn.Module], name: str, pretrained: bool, **kwargs) -> nn.Module:
    """Build a model as timm.create_model asks for it, from any source of weights that timm's configuration names.

    `kwargs` are of `make` and of timm.models.build_model_with_cfg.
    """
    cfg = resolve_pretrained_cfg(name, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay')).to_dict()
    # A folder or repository written by timm names its architecture; any other source may hold any model.
    saved = cfg.get('source') in ('local-dir', 'hf-hub')
    kind = next((key for key in ('state_dict', 'file', 'hf_hub_id', 'url') if pretrained and cfg.get(key)), None)
    if kind == 'file' and not saved:  # load_pretrained sees which model a checkpoint states
        pretrained, kind = cfg['file'], None

    def build(**arguments) -> nn.Module:  # loads weights before timm wraps the model for features_only
        model = make(**arguments)
        load_pretrained(model, name, False if kind else pretrained)
        return model

    def load(state: dict, model: nn.Module) -> dict:
        what = 'a state dict' if kind == 'state_dict' else f'{cfg.get("source") or kind} {cfg[kind]}'
        load_weights(model, name, state, what, name if saved else None)
        return {}  # nothing is left for timm to load

    fetch = dict(pretrained=kind is not None, pretrained_strict=False, pretrained_filter_fn=load)
    return build_model_with_cfg(build, name, **fetch, **kwargs)


def fetch_from_timm(tag: str, **kwargs) -> dict[str, torch.Tensor]:
    """The state dict of a pretrained timm model, downloaded unless cached. Raises ModelError if that fails."""
    print(f'fetching {tag}, unless it is in the cache', file=sys.stderr)
    for library in ('huggingface_hub', 'timm'):  # they log each attempt; the error says what matters
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        return timm.create_model(tag, pretrained=True, **kwargs).state_dict()
    except Exception as error:  # hub, network, disk and cache each raise their own types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f'cannot fetch {tag} from the hub ({reason}); connect to the internet once, '
            'or fetch the file elsewhere and pass --pretrained PATH'
        ) from error


def load_weights(
    model: nn.Module, name: str, checkpoint: Any, what: str, origin: str | None = None, trunk: bool = False
) -> None:
    """Load a state dict, bare or inside a checkpoint; sets model.loaded_weights, .pretrained and .loaded.

    Args:
        model: of the registry's entry `name`.
        what: what the checkpoint is called in messages.
        origin: the model the weights are of, if the checkpoint does not say so itself; None: unknown.
        trunk: load the whole of a ResNet-18 into a TwistNet, not only stem, layer1 and layer2.
    """
    state, stated = extract_state(checkpoint, what)
    state = unwrap(state, model.state_dict())
    if stated:
        what, origin = f'{what} ({stated})', stated
    if trunk and 'twist' in entry_of(name) and 'conv1.weight' not in state:
        raise ModelError(f'{what}: is no ResNet-18, whose weights --pretrained trunk loads')
    state, free, note = adapt(model, name, state, origin, trunk)
    model.loaded_weights = load_tensors(model, state, what + note, name, free)
    model.pretrained, model.loaded = model.loaded_weights.sentence, model.loaded_weights.share
    print(f'{name}: {model.pretrained}', file=sys.stderr)


def extract_state(checkpoint: Any, what: str) -> tuple[dict[str, torch.Tensor], str | None]:
    """The state dict in a checkpoint (or the checkpoint itself) and the model name that the checkpoint states."""
    state, names = checkpoint, []
    if isinstance(checkpoint, dict):
        config = checkpoint.get('config')  # of pretraining's latest.pt
        defines = config.get('defines', {}) if isinstance(config, dict) else {}
        names = [checkpoint.get('model'), checkpoint.get('arch'), defines.get('model')]
    # Averaged weights, of --ema, timm and torchvision, before those of the last step: they were the validated ones.
    for key in ('average', 'state_dict_ema', 'model_ema', 'state_dict', 'model'):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ModelError(f'{what}: holds no state dict')
    return tensors, next((name for name in names if isinstance(name, str)), None)


def adapt(
    model: nn.Module, name: str, state: dict[str, torch.Tensor], origin: str | None, trunk: bool = False
) -> tuple[dict[str, torch.Tensor], tuple[str, ...], str]:
    """Rename the weights of timm or of the published code, and drop what would turn one variant into another.

    Variants that differ only in how parameters start (registry: keep_init) leave those parameters out of weights of
    another or an unknown model. Of a variant's weights another variant takes what fits.

    Returns:
        the weights, what begins the names of tensors that may differ in shape, and a note for the report.
    """
    entry, note = entry_of(name), ''
    if entry.get('base', name) == 'seresnet18' and 'layer0.conv1.weight' in state:  # timm's legacy_seresnet18
        names = {
            k: k.removeprefix('layer0.').replace('.se_module.', '.se.').replace('last_linear.', 'fc.') for k in state
        }
        # Stage 1 of the older definition squeezes to 4 channels instead of 8: its SE layers are left out.
        return {n: state[k] for k, n in names.items() if not re.match(r'layer1\.\d\.se\.', n)}, (), ''
    if 'twist' in entry:
        if 'conv1.weight' in state:  # a ResNet-18's
            state = {trunk_name(k): v for k, v in state.items()}
            if not trunk:
                state = {k: v for k, v in state.items() if k.startswith(('stem.', 'layer1.', 'layer2.'))}
            note, origin = ' (the trunk)' if trunk else ' (stem, layer1, layer2)', name  # equal in every TwistNet
        state = dict(state)
        model.accept_published_names(None, state, '')
        stem, channels = state.get('stem.0.weight'), model.stem[0].in_channels
        if stem is not None and stem.shape[1] == 3 != channels:
            state['stem.0.weight'] = adapt_input_conv(channels, stem)
            note += f' (input channels 3 -> {channels})'
    branch = BRANCH if 'stci' in entry else ''  # of a CNN with STCI the branch alone differs between variants
    if origin == name or not ('twist' in entry or any(k.startswith(BRANCH) for k in state)):
        return state, (), note
    kept = {entry_of(n).get('keep_init') for n in (name, origin) if n} - {None}
    dropped = {k: part for part in kept for k in state if k.startswith(branch) and part in f'.{k}'}
    if origin or dropped:
        note += f' (weights of {origin or "an unknown model"})'
    note += ''.join(f', without its {part.strip(".")}' for part in sorted({*dropped.values()}))
    state = {k: v for k, v in state.items() if k not in dropped}
    return state, () if name == 'twistnet18' else (branch,), note


def load_tensors(
    model: nn.Module, state: dict[str, torch.Tensor], what: str, name: str, free: tuple[str, ...]
) -> Loaded:
    """Copy the tensors of `state` that fit; only the classifier, and what begins with one of `free`, may not."""
    own = model.state_dict()
    heads = classifiers_of(model)
    classifier = tuple(f'{n}.' for n in heads)
    fits = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    odd = [k for k in state if k in own and k not in fits and not k.startswith(classifier + free)]
    if odd:
        raise ModelError(f'{what}: {odd[0]} is {tuple(state[odd[0]].shape)}, {name} has {tuple(own[odd[0]].shape)}')
    sizes = {k: p.numel() for k, p in model.named_parameters()}
    share = sum(n for k, n in sizes.items() if k in fits) / sum(sizes.values())
    backbone = sum(n for k, n in sizes.items() if k in fits and not k.startswith(classifier)) / sum(sizes.values())
    if backbone < 0.005:  # a few small tensors fit models of any width
        raise ModelError(f'{what}: none of its {len(state)} tensors fits {name}, or hardly any')
    model.load_state_dict(fits, strict=False)
    # timm draws some classifiers so large (tf_efficientnet_lite0 with ten classes: uniform in +-0.32) that the first
    # loss is several times log(classes), and a few epochs with clipped gradients do not recover (FMD, 4 epochs: 12 %,
    # from zeros 71 %). The registry's models, and models from scratch, keep timm's start.
    zeroed = [] if is_own(name) else [n for n in heads if not any(k.startswith(f'{n}.') for k in fits)]
    for parameter in (p for n in zeroed for p in heads[n].parameters()):
        nn.init.zeros_(parameter)
    # Old files have no counts of batches, without which nothing is missing.
    known = fits.keys() | {k for k in own if k.endswith('num_batches_tracked')}
    fresh = layers_of(k for k in own.keys() - known if not k.startswith(tuple(f'{n}.' for n in zeroed)))
    unused = layers_of(k for k in state if k not in own)
    gates = sum(k.endswith('.gate') for k in fits)
    loaded = Loaded(len(fits), len(own), share, gates, fresh, what, '')
    report = loaded.brief
    for words, layers in (('left as initialised', fresh), ('not used', unused), ('at zero', zeroed)):
        report += f'; {words}: {", ".join(layers)}' if layers else ''
    return loaded._replace(sentence=report)


def classifiers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The classifier of a model of timm by name, two where it has two; {} for a model that does not tell."""
    head = model.get_classifier() if hasattr(model, 'get_classifier') else ()
    heads = head if isinstance(head, tuple) else (head,)
    return {n: m for n, m in model.named_modules() if any(m is head for head in heads)}


def layers_of(keys: Iterable[str]) -> list[str]:
    """Tensor names shortened to the layers they belong to: ['fc', 'layer3.0.stci']."""
    return sorted({re.match(r'(layer\d+\.\d+\.\w+|[^.]+)', k)[0] for k in keys})
