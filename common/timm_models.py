"""Models outside the registry: which names timm knows, what input they take, and files of users that register more."""

import argparse
import difflib
import importlib.util
import re
import sys
import traceback
from pathlib import Path

import timm
from timm.models import get_arch_name, get_pretrained_cfg, list_models, model_entrypoint

from common import runs
from common.checkpoint import read_weights
from common.errors import ModelError
from common.registry import MODELS, STCI, entry_of, is_own
from common.weights import split_trunk

ROOT = Path(__file__).parent.parent  # of this code
SIZE = 224  # pixels, where neither timm nor a file says what a model takes


def problem_of(name: str) -> str | None:
    """Why there is no model of this name; None where there is one in the registry or in timm, or an stci_ of one."""
    entry = entry_of(name)
    plain = entry.get('base', name)
    if plain != name and ('twist' in entry or plain.startswith(STCI)):
        return f"no model '{name}': {plain} has STCI already"
    if plain in MODELS:
        return None
    if ':' in plain:  # as timm.create_model takes it
        return (
            f"'{plain}' is a place of weights; give the architecture that its config.json names, and its file: "
            '--model NAME --pretrained FOLDER/model.safetensors'
        )
    if not timm.is_model(plain):
        near = difflib.get_close_matches(plain, {*MODELS, *list_models()}, 4)
        said = f'near to it: {", ".join(near)}; ' if near else ''
        return (
            f"unknown model '{plain}'; {said}`python models.py` lists those of the paper, timm.list_models() the "
            'others, and --import FILE registers your own'
        )
    try:
        get_pretrained_cfg(plain)
    except RuntimeError:
        tags = [tagged.partition('.')[2] for tagged in list_models(f'{get_arch_name(plain)}.*', pretrained=True)]
        return f"timm {timm.__version__} has no weights '{plain}'; its tags are: {', '.join(tags)}"
    return None


def own_settings(name: str, pretrained: bool | str | Path = False) -> dict:
    """What a model outside the registry takes: img_size, crop_ratio, mean and std; {} for one of the registry.

    They are those of the weights file, where it is a checkpoint of train.py or timm has written its config.json beside
    it, and of timm's pretrained_cfg otherwise.
    """
    if is_own(name):
        return {}
    cfg = get_pretrained_cfg(entry_of(name)['timm'])
    settings = _from_cfg(cfg.to_dict()) if cfg else {}
    _, pretrained = split_trunk(pretrained)
    if isinstance(pretrained, str | Path):
        settings |= _of_file(Path(pretrained))
    return dict(img_size=SIZE) | settings


def _from_cfg(cfg: dict) -> dict:
    settings = dict(crop_ratio=cfg.get('crop_pct'), mean=cfg.get('mean'), std=cfg.get('std'))
    settings |= dict(img_size=(cfg.get('input_size') or (None,))[-1])
    return {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items() if v is not None}


def _of_file(path: Path) -> dict:
    if path.suffix != '.safetensors':
        saved = read_weights(path)
        if isinstance(saved, dict) and isinstance(saved.get('transform'), dict):
            kept = ('img_size', 'crop_ratio', 'mean', 'std')
            return {k: tuple(v) if isinstance(v, list) else v for k, v in saved['transform'].items() if k in kept}
    config = runs.read_json(path.with_name('config.json')) or {}
    return _from_cfg(config['pretrained_cfg']) if isinstance(config.get('pretrained_cfg'), dict) else {}


def import_file(path: str | Path | None) -> None:
    """Run a Python file that registers models with timm (--import); once in a process. None: nothing.

    Its folder comes last on sys.path, so that it can import files beside it, but none with the name of a script here.
    """
    if path is None:
        return
    path = Path(path).absolute()
    name = f'imported_{path.stem}'
    if getattr(sys.modules.get(name), '__file__', None) == str(path):
        return
    if not path.is_file():
        raise ModelError(f'--import {path}: no such file')
    before = {*MODELS, *list_models()}
    for module in re.findall(r'^\s*(?:import|from)\s+(\w+)', path.read_text(errors='replace'), re.MULTILINE):
        ours, beside = ROOT / f'{module}.py', path.with_name(f'{module}.py')
        if ours.is_file() and beside.is_file() and not ours.samefile(beside):
            raise ModelError(f'--import {path}: imports {module}, which would be {ours}; rename {beside}')
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file may raise
        del sys.modules[name]
        places = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = places[-1] if places else getattr(error, 'lineno', None)
        reason = str(error).partition('\n')[0]
        raise ModelError(f'--import {path}, line {line}: {type(error).__name__}: {reason}') from error
    made = [known for known in list_models() if model_entrypoint(known).__module__ == name]
    if not made:
        raise ModelError(f'--import {path}: registers no model; put @timm.models.register_model before its function')
    if taken := [known for known in made if known in before or known.startswith(STCI)]:
        raise ModelError(f"--import {path}: '{taken[0]}' is the name of another model; give it one of its own")


def import_digest(path: str | Path) -> str:
    """What stands for the file of --import in a fingerprint; what it imports itself is not in."""
    return runs.digest(Path(path).read_bytes())


def model_defines(args: argparse.Namespace) -> dict:
    """What the fingerprint holds of a model that is not of the registry: its input, and a digest of --import's file.

    Empty without either, so that the fingerprints of other runs stay as they were.
    """
    settings = own_settings(args.model, getattr(args, 'pretrained', False))
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items() if k != 'img_size'}  # an option
    defines = dict(preprocessing=settings) if settings else {}
    return defines | (dict(imported=import_digest(args.imports)) if args.imports else {})
