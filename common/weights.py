"""Where initial weights come from, and what stands for them in a fingerprint.

No torch, so that run_all.py can compare the weights of a grid with those of its complete runs.
"""

import functools
from pathlib import Path

from common import runs
from common.errors import ModelError
from common.registry import MODELS, WEIGHTS_DIR, entry_of, is_own


def split_trunk(pretrained: bool | str | Path) -> tuple[bool, bool | str | Path]:
    """Whether `pretrained` is `trunk` or `trunk=PATH`, and what is left of it without that word: True or PATH."""
    word, _, path = str(pretrained).partition('=')
    return (True, path or True) if word == 'trunk' else (False, pretrained)


def weights_source(name: str, pretrained: bool | str | Path) -> Path | str | None:
    """Where `pretrained` takes the weights of a model from: a file, the tag of a timm model, or None for nowhere.

    For a TwistNet and True: weights/<name>_imagenet.pt, then the full model's, each in the working directory and then
    beside models.py; otherwise, and for 'trunk', timm's ResNet-18. For a model outside the registry and True: timm's
    default tag.
    """
    if pretrained is False or pretrained is None:
        return None
    trunk, pretrained = split_trunk(pretrained)
    if pretrained is not True:
        return Path(pretrained)
    entry = entry_of(name)
    if 'twist' not in entry:
        source = entry.get('weights') if is_own(name) else default_tag(entry['timm'])
        if not source:
            whose = 'the registry' if is_own(name) else 'timm'
            raise ModelError(f'{name}: {whose} names no ImageNet weights; give a file (--pretrained PATH) or none')
        return source
    for stem in dict.fromkeys((name, 'twistnet18')) if not trunk else ():
        for root in (Path(), Path(__file__).parent.parent):
            if (path := root / WEIGHTS_DIR / f'{stem}_imagenet.pt').is_file():
                return path
    return MODELS['resnet18']['weights']


def is_imagenet(source: Path | str) -> bool:
    """Whether weights_source gives ImageNet weights: timm's, or a file as pretrain_imagenet.py names it."""
    return not isinstance(source, Path) or source.name.endswith('_imagenet.pt')


def default_tag(name: str) -> str | None:
    """The model of timm with the tag of its default weights, as 'resnet50.a1_in1k'; None where timm has no weights."""
    from timm.models import get_pretrained_cfg  # here, because it imports torch

    cfg = get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        return None
    return f'{cfg.architecture}.{cfg.tag}' if cfg.tag else cfg.architecture


def weights_identity(name: str, pretrained: bool | str | Path) -> str | None:
    """What stands for the initial weights in a fingerprint: a digest of the file, timm's tag, or None for none."""
    source = weights_source(name, pretrained)
    prefix = 'trunk=' * (split_trunk(pretrained)[0] and 'twist' in entry_of(name))  # more of the same file is loaded
    if not isinstance(source, Path):
        return source and prefix + source
    try:
        stat = source.stat()
        return prefix + digest_of(source.resolve(), stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise ModelError(f'{source}: cannot read the weights ({error.strerror})') from error


@functools.cache
def digest_of(path: Path, changed: int, size: int) -> str:
    """The digest of a file; a grid asks for the same one for every run, and reads it again when it has changed."""
    return runs.digest(path.read_bytes())
