"""Checkpoint files: written atomically, read without running code, and the names that published ones use."""

import io
import pickle
import re
from pathlib import Path

import torch
from torch import nn

from common import runs
from common.errors import ModelError, UnsafeCheckpoint


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU without running any code that it may carry.

    Raises:
        FileNotFoundError: there is no such file.
        ModelError: the file cannot be read, is damaged, or holds pickled code and is refused.
    """
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in the unpickling
        if isinstance(error, pickle.UnpicklingError) and 'unsupported global' in str(error).lower():
            raise UnsafeCheckpoint(
                f'{path}: refused, the file holds pickled code, not only tensors; get the weights as a state dict'
            ) from error
        if isinstance(error, OSError) and error.strerror:
            raise ModelError(f'{path}: cannot be read ({error.strerror})') from error
        raise ModelError(f'{path}: damaged or not a PyTorch checkpoint') from error


def accept_published_names(_module: nn.Module | None, state: dict, prefix: str, *_) -> None:
    """load_state_dict hook: wrapper prefixes off, and the authors' per-head tensors joined into ours, in place."""
    for key in [k for k in state if k.startswith(prefix)]:
        state[prefix + strip_wrappers(key[len(prefix) :])] = state.pop(key)
    heads: dict[str, dict[int, torch.Tensor]] = {}
    for key in [k for k in state if k.startswith(prefix) and '.mhstci.' in k]:
        value, key = state.pop(key), key.replace('.mhstci.', '.stci.')
        match = re.fullmatch(r'(.*\.stci\.)heads\.(\d+)\.(.*)', key)
        if not match:
            state[key] = value
        elif match[3] not in ('idx_i', 'idx_j'):  # the order of the products, which is fixed
            heads.setdefault(match[1] + match[3], {})[int(match[2])] = value
    for key, parts in heads.items():
        if sorted(parts) != list(range(len(parts))) or len({part.shape for part in parts.values()}) > 1:
            raise ModelError(f'{key}: the heads {sorted(parts)} of the state dict are no whole set of equal shapes')
        tensors = [parts[k] for k in range(len(parts))]
        dim = 1 if key.endswith('twist.scale') else 0
        state[key] = tensors[0] if key.endswith('num_batches_tracked') else torch.cat(tensors, dim)


def strip_wrappers(key: str) -> str:
    """A parameter name without the prefixes that DistributedDataParallel and torch.compile put in front."""
    return re.sub(r'^(module\.|_orig_mod\.)+', '', key)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """torch.save, atomically. Raises RunError where the disk is full; what stood there before is untouched."""
    buffer = io.BytesIO()  # a full disk is then an OSError of ours, not one from inside torch.save
    torch.save(checkpoint, buffer)
    runs.write_atomic(path, buffer.getvalue())
