"""How fast this machine runs the models and the loader: of compute_flops.py --speed and datasets.py speed."""

import torch
from torch import nn


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once; parameters and buffers apart."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(kept.values())
