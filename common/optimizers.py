"""The optimisers that --opt may name: those of timm that resume bit-identically. No torch for the two usual ones."""

from difflib import get_close_matches
from fnmatch import fnmatchcase

from common.errors import RunError

MOMENTUM = dict(sgd=True, adamw=False)  # whether an optimiser has it; timm knows of all others, but imports torch
# Optimisers of timm that no run can use, by pattern, and why.
UNUSABLE = {
    'adahessian': 'needs second derivatives',
    'bnb*': 'needs bitsandbytes',
    'fused*': 'needs apex',
    'kron*': 'does not resume bit-identically',
}


def has_momentum(opt: str) -> bool:
    """Whether an optimiser takes --momentum.

    Raises:
        RunError: timm has no such optimiser, or runs cannot use it.
    """
    if opt in MOMENTUM:
        return MOMENTUM[opt]
    for pattern, why in UNUSABLE.items():
        if fnmatchcase(opt, pattern):
            raise RunError(f"--opt {opt}: it {why}; take another of timm's, such as sgd or adamw")
    import timm.optim  # here, because it imports torch

    names = timm.optim.list_optimizers(exclude_filters=list(UNUSABLE))
    if opt not in names:
        close = get_close_matches(opt, names, n=5, cutoff=0.5) or [*MOMENTUM, 'lion', 'lamb']
        raise RunError(f'--opt {opt}: timm {timm.__version__} has no such optimiser; it has {", ".join(close)}, ..')
    return timm.optim.get_optimizer_info(opt).has_momentum
