"""TwistNet-18, its ablation variants and the baselines it is compared with.

    from models import build_model, list_models
    list_models()                                              # name, parameters, venue, source of weights
    model = build_model('twistnet18', num_classes=47, pretrained=True)

A TwistNet is a ResNet whose later stages carry a Spiral-Twisted Channel Interaction (STCI) branch. With
h = relu(bn1(conv1(x))) inside a residual block,

    out = relu(bn2(conv2(h)) + sigmoid(gate) * STCI(h) + shortcut(x))                                   (TwistBlock)

    z   = relu(bn(conv1x1(h)))                 c_red channels a head
    t   = scale * depthwise3x3(z)              starts as (z(p) + z(p + d_k)) / 2 in direction d_k of head k
    z, t are L2-normalised over the channels of their head
    p   = (z_i * t_j) for i <= j               c_red (c_red + 1) / 2 products a head
    STCI(h) = bn(conv1x1(GroupNorm(AIS(concat over heads [z, p]))))                                     (STCI)

    AIS(v) = v * sigmoid(W2 relu(W1 mean_HW(v)))                                                        (AIS)

Source: Lian et al., "TwistNet-2D", arXiv 2602.07262. This is an independent implementation.
"""

import contextlib
import copy
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier
from timm.models import checkpoint_seq, generate_default_cfgs, is_model, register_model
from timm.models._features import feature_take_indices
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

# This file alone builds and trains a TwistNet. What knows models by name stands in common/ and is imported where it is
# used; without that folder there are no names.
try:
    from common.registry import MODELS
except ModuleNotFoundError:
    MODELS = {}

GATE_INIT = -2.0  # of a gated branch, before its sigmoid; common/registry.py, which imports no torch, has it too
DIRECTIONS = ((0, 1), (1, 1), (1, 0), (1, -1))  # (dy, dx) of 0, 45, 90 and 135 degrees; dy points down


# ---------------------------------------------------------------------------------------------- modules


class AIS(nn.Module):
    """Adaptive Interaction Selection: one weight per channel and image, from the channels' means: (B, D, H, W) -> same.

    The hidden width is max(D // 4, 16).
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // 4, 16)
        self.fc = nn.Sequential(  # entries 2 and 4 carry the names of the published checkpoints
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels),
            nn.Sigmoid(),
        )

    def weights(self, v: torch.Tensor) -> torch.Tensor:
        """The selection weights in (0, 1), in float32 also under autocast: (B, D, H, W) -> (B, D)."""
        if v.dtype == self.fc[2].weight.dtype:
            return self.fc(v)
        with torch.autocast(v.device.type, enabled=False):  # casts take longer than layers as small as these
            return self.fc(v.float())

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        return v * self.weights(v).to(v.dtype)[:, :, None, None]


class Twist(nn.Module):
    """Spiral twist: every head blends its channels with their neighbour in the head's direction.

    The depthwise kernels of head k start as 0.5 at the centre and 0.5 at the neighbour of DIRECTIONS[k], or without
    `directional` as Kaiming-normal ones.

    Shape:
        (B, num_heads * c_red, H, W) -> the same
    """

    def __init__(self, num_heads: int, c_red: int, directional: bool = True):
        super().__init__()
        self.num_heads, self.c_red, self.directional = num_heads, c_red, directional
        width = num_heads * c_red
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.scale = nn.Parameter(torch.ones(1, width, 1, 1))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)
        if not self.directional:
            # Fan-out of one head: the heads share a tensor only for speed.
            nn.init.normal_(self.dwconv.weight, std=(2 / (9 * self.c_red)) ** 0.5)
            return
        nn.init.zeros_(self.dwconv.weight)
        with torch.no_grad():
            for kernels, (dy, dx) in zip(self.dwconv.weight.split(self.c_red), DIRECTIONS):  # (c_red, 1, 3, 3)
                kernels[:, 0, 1, 1] = 0.5
                kernels[:, 0, 1 + dy, 1 + dx] = 0.5

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        kernels = self.scale.view(-1, 1, 1, 1) * self.dwconv.weight  # cheaper than to scale the map
        return F.conv2d(z, kernels, padding=1, groups=len(kernels))


class STCI(nn.Module):
    """Multi-head Spiral-Twisted Channel Interaction; the formulas are at the top of this file.

    The heads are computed together: one 1x1 convolution, one depthwise convolution and one set of products. What lies
    between these and the projection is cheap to compute and large to store (9 D values a position), so the backward
    pass recomputes it, with the parameters as they are then: do not change them between the two passes. torch.func's
    transforms do not support this. Hooks on twist.dwconv and on the last BatchNorm are not called, because only the
    parameters of these modules are used.

    Args:
        channels: C, width of the feature map h.
        num_heads: number of directions, 1 to 4.
        c_red: channels each head reduces h to.
        use_ais: reweight the interactions per image.
        use_spiral: displace t; without it t = z.
        use_products: use the second-order channels; without them the branch keeps z alone.
        directional: start the twist kernels from their directions (see Twist).

    Shape:
        (B, C, H, W) and, if given, gate: () -> (B, C, H, W); inside, D = num_heads * (c_red + c_red (c_red + 1) / 2)
        channels.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 4,
        c_red: int = 8,
        use_ais: bool = True,
        use_spiral: bool = True,
        use_products: bool = True,
        directional: bool = True,
    ):
        super().__init__()
        if not 1 <= num_heads <= len(DIRECTIONS):
            raise ValueError(f'num_heads must be 1 to {len(DIRECTIONS)}, one direction a head; got {num_heads}')
        self.num_heads, self.c_red, self.use_products = num_heads, c_red, use_products
        width = num_heads * c_red
        dim = num_heads * (c_red + (c_red * (c_red + 1) // 2 if use_products else 0))
        groups = max(g for g in range(1, 33) if dim % g == 0)
        self.reduce = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.twist = Twist(num_heads, c_red, directional) if use_spiral and use_products else nn.Identity()
        self.ais = AIS(dim) if use_ais else nn.Identity()
        self.norm = nn.GroupNorm(groups, dim)
        self.proj = nn.Sequential(nn.Conv2d(dim, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.register_buffer('pairs', torch.triu_indices(c_red, c_red), persistent=False)  # (2, products a head): i, j

    def reset_parameters(self) -> None:
        """Initialise the branch; must run after any global initialisation, which would undo it."""
        nn.init.normal_(self.reduce[0].weight, std=(2 / self.c_red) ** 0.5)  # fan-out of one head, as in Twist
        nn.init.normal_(self.proj[0].weight, std=0.01)
        if isinstance(self.twist, Twist):
            self.twist.reset_parameters()

    def interactions(self, h: torch.Tensor) -> torch.Tensor:
        """First- and second-order channels of every head, before selection: (B, C, H, W) -> (B, D, H, W).

        Head k owns channels k D / num_heads onward: z_1 .. z_c, then p_11, p_12, .., p_cc in row-major order.
        """
        return self._interact(F.relu(self.reduce(h), inplace=True))

    def _interact(self, z: torch.Tensor) -> torch.Tensor:
        """(B, num_heads * c_red, H, W), not normalised -> (B, D, H, W)."""
        shape = z.shape[2:]
        # One row a channel with all its positions: products are of long vectors, and selecting channels copies rows.
        both = torch.stack([z.flatten(2), self.twist(z).flatten(2)]).unflatten(2, (self.num_heads, self.c_red))
        wide = both.float() if both.dtype.itemsize == 2 else both  # fp16 cannot hold squares below 1e-8 or above 65504
        length = wide.square().sum(3, keepdim=True).clamp_min(1e-12)  # squared; at least 1e-6, squared
        z, t = (wide * length.rsqrt()).to(both.dtype)  # (B, heads, c_red, H * W) each
        if self.use_products:
            i, j = self.pairs
            z = torch.cat([z, z.index_select(2, i) * t.index_select(2, j)], dim=2)
        return z.flatten(1, 2).unflatten(2, shape)

    def _select(self, z: torch.Tensor) -> torch.Tensor:
        return self.norm(self.ais(self._interact(z)))

    def forward(self, h: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """The branch, times sigmoid(gate) if given."""
        z = F.relu(self.reduce(h), inplace=True)
        if torch.is_grad_enabled():
            v = checkpoint(self._select, z, use_reentrant=False, preserve_rng_state=False)  # nothing is random
        else:
            v = self._select(z)
        conv, bn = self.proj
        return bn(conv(v)) if gate is None else scaled(bn, conv(v), torch.sigmoid(gate))


def scaled(bn: nn.BatchNorm2d, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """factor * bn(x) for a scalar, merged into the affine map so that it needs no time and no memory."""
    if type(bn) is not nn.BatchNorm2d or not bn.affine or not bn.track_running_stats or bn.momentum is None:
        return factor * bn(x)  # SyncBatchNorm, say
    if bn.training:
        bn.num_batches_tracked.add_(1)
    weight, bias = factor * bn.weight, factor * bn.bias
    return F.batch_norm(x, bn.running_mean, bn.running_var, weight, bias, bn.training, bn.momentum, bn.eps)


class BasicBlock(nn.Module):
    """The residual block of ResNet-18: relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)).

    Shape:
        (B, in_channels, H, W) -> (B, channels, H / stride, W / stride)
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(h))
        out += self.downsample(x)
        return F.relu(out, inplace=True)


class TwistBlock(BasicBlock):
    """A BasicBlock with a gated STCI branch on h, the tensor between its two convolutions.

    `gate_init` starts the scalar gate before its sigmoid: -2 lets 0.119 of the branch through. `stci` goes to STCI.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1, gate_init: float = GATE_INIT, **stci):
        super().__init__(in_channels, channels, stride)
        self.stci = STCI(channels, **stci)
        self.gate = nn.Parameter(torch.tensor(float(gate_init)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(h))
        out += self.stci(h, self.gate)
        out += self.downsample(x)
        return F.relu(out, inplace=True)


class TwistNet(nn.Module):
    """A ResNet of BasicBlocks whose stages in `twist_stages` are made of TwistBlocks.

    It implements timm's model contract (forward_features, forward_head, reset_classifier, forward_intermediates, ..),
    and load_state_dict accepts the published state dicts.

    Args:
        layers: blocks in stages 1 to 4.
        num_classes: outputs of the classifier; 0 leaves it out.
        base_width: width of stage 1; stage s has base_width * 2 ** (s - 1).
        twist_stages: the stages with STCI, any of 1 to 4.
        num_heads, c_red, use_ais, use_spiral, use_products, directional: see STCI.
        gate_init: see TwistBlock.
        zero_init_last: start the last BatchNorm of each block's trunk at zero instead of one, as timm's ResNets do.
        in_chans: input channels.
        global_pool: timm's name of the pooling before the classifier.
        drop_rate: dropout before the classifier.

    Shape:
        (B, in_chans, H, W) -> (B, num_classes); H and W at least 32.
    """

    def __init__(
        self,
        layers: tuple[int, ...] = (2, 2, 2, 2),
        num_classes: int = 47,
        base_width: int = 64,
        twist_stages: tuple[int, ...] = (3, 4),
        num_heads: int = 4,
        c_red: int = 8,
        use_ais: bool = True,
        use_spiral: bool = True,
        gate_init: float = GATE_INIT,
        use_products: bool = True,
        directional: bool = True,
        zero_init_last: bool = False,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
    ):
        super().__init__()
        if not set(twist_stages) <= set(range(1, len(layers) + 1)):
            raise ValueError(f'twist_stages must be among 1 to {len(layers)}; got {tuple(twist_stages)}')
        self.num_classes, self.drop_rate, self.grad_checkpointing = num_classes, drop_rate, False
        self.zero_init_last = zero_init_last
        stci = dict(num_heads=num_heads, c_red=c_red, use_ais=use_ais, use_spiral=use_spiral)
        stci |= dict(use_products=use_products, directional=directional)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, base_width, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(base_width),
            nn.ReLU(inplace=True),
        )
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.feature_info = [dict(num_chs=base_width, reduction=2, module='stem')]
        in_channels = base_width
        for stage, depth in enumerate(layers, start=1):
            channels, blocks = base_width * 2 ** (stage - 1), []
            for index in range(depth):
                stride = 2 if stage > 1 and index == 0 else 1
                if stage in twist_stages:
                    blocks.append(TwistBlock(in_channels, channels, stride, gate_init, **stci))
                else:
                    blocks.append(BasicBlock(in_channels, channels, stride))
                in_channels = channels
            self.add_module(f'layer{stage}', nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=channels, reduction=2 ** (stage + 1), module=f'layer{stage}'))
        self.num_features = self.head_hidden_size = in_channels
        self.global_pool, self.fc = create_classifier(in_channels, num_classes, pool_type=global_pool)
        self.init_weights()
        self._register_load_state_dict_pre_hook(self.accept_published_names, with_module=True)  # public from torch 2.5

    def init_weights(self) -> None:
        """Initialise convolutions as Kaiming-normal (fan-out), then every STCI branch in its own way."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            elif isinstance(module, BasicBlock) and self.zero_init_last:
                nn.init.zeros_(module.bn2.weight)
        for module in self.modules():  # after all others: the loop above would overwrite these
            if isinstance(module, STCI):
                module.reset_parameters()

    @staticmethod
    def accept_published_names(_module: nn.Module | None, state: dict, prefix: str, *_) -> None:
        """load_state_dict hook: strip wrapper prefixes and join the published per-head tensors into ours, in place."""
        for key in [k for k in state if k.startswith(prefix)]:
            state[prefix + re.sub(r'^(module\.|_orig_mod\.)+', '', key[len(prefix) :])] = state.pop(key)
        heads: dict[str, dict[int, torch.Tensor]] = {}
        for key in [k for k in state if k.startswith(prefix) and '.mhstci.' in k]:
            value, key = state.pop(key), key.replace('.mhstci.', '.stci.')
            match = re.fullmatch(r'(.*\.stci\.)heads\.(\d+)\.(.*)', key)
            if not match:
                state[key] = value
            elif match[3] not in ('idx_i', 'idx_j'):  # the order of the products, which is fixed
                heads.setdefault(match[1] + match[3], {})[int(match[2])] = value
        for key, parts in heads.items():
            tensors = [parts[k] for k in range(len(parts))]
            dim = 1 if key.endswith('twist.scale') else 0
            state[key] = tensors[0] if key.endswith('num_batches_tracked') else torch.cat(tensors, dim)

    @property
    def stages(self) -> list[nn.Sequential]:
        return [getattr(self, info['module']) for info in self.feature_info[1:]]

    def gates(self) -> dict[str, float]:
        return gates_of(self)

    def _run_stage(self, stage: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        return checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, num_features, H / 32, W / 32)."""
        x = self.maxpool(self.stem(x))
        for stage in self.stages:
            x = self._run_stage(stage, x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, num_features, h, w) -> (B, num_classes), or (B, num_features) with pre_logits."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ):
        """Feature maps of the stem (index 0) and of stages 1 to 4, with timm's arguments.

        Returns:
            the maps of `indices` (the last n, a list, or None for all), after the final features unless
            intermediates_only. There is no final norm to apply, and no other output_fmt.
        """
        assert output_fmt == 'NCHW', output_fmt
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        x = self.stem(x)
        maps = [x] if 0 in wanted else []
        x = self.maxpool(x)
        for index, stage in enumerate(self.stages, start=1):
            if stop_early and index > last:
                break
            x = self._run_stage(stage, x)
            if index in wanted:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Turn the stages after the last index into identities and, with prune_head, drop the classifier."""
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        for info in self.feature_info[last + 1 :]:
            setattr(self, info['module'], nn.Sequential())
        if prune_head:
            self.reset_classifier(0, '')
        return wanted

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one of num_classes outputs (0: none), and the pooling by global_pool."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool_type)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of storing them."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's grouping of parameters by depth: the stem, then stages (coarse) or blocks."""
        return dict(stem=r'^stem', blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)')


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name and module of every block with a gated STCI branch (`stci`, `gate`), from the input on."""
    return {name: module for name, module in model.named_modules() if isinstance(getattr(module, 'stci', None), STCI)}


def gates_of(model: nn.Module) -> dict[str, float]:
    """sigmoid(gate) of every block by name, e.g. {'layer3.0': 0.119, ..}; synchronises the device. {} without STCI."""
    return {name: torch.sigmoid(block.gate).item() for name, block in blocks_of(model).items()}


# ---------------------------------------------------------------------------------------------- for inference


@torch.no_grad()
def fuse(model: nn.Module, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy for inference with fewer operations, whose logits differ by at most 1e-5 of the largest, or of 1.

    Any model whose logits would differ more for `images` is returned as it is, in evaluation mode.

    Args:
        images: (B, 3, H, W) float32, normalised; noise will do.
        dtype: that of autocast, if the copy is to run under it: weights are then converted once, not in every pass.
    """
    wanted = model.eval()(images)
    for copied in (reparameterize_model, copy.deepcopy):  # the former also merges the branches of RepViT and its like
        fused = copied(model).eval()  # what the former makes is in training mode
        fold_norms(fused, images)
        if (fused(images) - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp_min(1):
            small = {layer for module in fused.modules() if isinstance(module, AIS) for layer in module.modules()}
            for layer in fused.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear) and layer not in small:  # AIS stays in float32
                    layer.to(dtype)
            return fused
    return model


def fold_norms(model: nn.Module, images: torch.Tensor) -> None:
    """Merge BatchNorms into the convolutions whose output they take; in STCI, scale into the twist, the gate into proj.

    The gate becomes None.
    """
    made, found, handles = {}, {}, []

    def note(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            made[output] = module
        elif inputs[0] in made and module.running_mean is not None:
            found[made[inputs[0]]] = module

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            handles.append(module.register_forward_hook(note))
    model(images)
    for handle in handles:
        handle.remove()
    for block in blocks_of(model).values():
        stci, (conv, bn) = block.stci, block.stci.proj
        for parameter in bn.parameters():
            parameter.mul_(torch.sigmoid(block.gate))
        block.gate, found[conv] = None, bn
        if isinstance(stci.twist, Twist):
            stci.twist.dwconv.weight.mul_(stci.twist.scale.view(-1, 1, 1, 1))
            stci.twist = stci.twist.dwconv
    merged = {conv: fuse_conv_bn_eval(conv, bn) for conv, bn in found.items()}
    merged |= {bn: nn.Sequential(*bn.children()) for bn in found.values()}  # timm's BatchNorms hold an activation
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if child in merged:
                setattr(parent, name, merged[child])


@contextlib.contextmanager
def watch_selection(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Sums of AIS's weights over the images that pass through the model in the body.

    Yields:
        {'layer3.0': (sum, number of weights) as a float64 tensor, ..}; empty for a model without AIS.
    """
    sums, handles = {}, []
    for name, block in blocks_of(model).items():
        if isinstance(block.stci.ais, AIS):
            total = sums[name] = torch.zeros(2, dtype=torch.float64, device=block.gate.device)

            def add(_module, _inputs, weights: torch.Tensor, total: torch.Tensor = total) -> None:
                total += torch.stack([weights.sum(dtype=torch.float64), total.new_tensor(weights.numel())])

            handles.append(block.stci.ais.fc.register_forward_hook(add))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def build_model(
    name: str, num_classes: int = 47, pretrained: bool | str | Path = False, img_size: int | None = None, **kwargs
) -> nn.Module:
    """Build a model, in training mode.

    Args:
        name: a key of registry.MODELS; any model of timm; or stci_NAME, such a CNN with STCI (see common/insertion.py).
        num_classes: outputs of the classifier.
        pretrained: a file; or True for ImageNet weights: timm's for a baseline; for a TwistNet
            weights/twistnet18_imagenet.pt (in the working directory, then beside this file), otherwise timm's ResNet-18
            for the stem and stages 1 and 2. 'trunk' loads the whole of that ResNet-18 into TwistNet's trunk,
            'trunk=PATH' that of a file; for other models they are True and PATH. What was loaded is printed on stderr
            and is in `model.pretrained` (words), `.loaded` (share of the parameters) and `.loaded_weights` (a record),
            each None if nothing was asked for.
        img_size: side of the square input in pixels, for models whose parameters depend on it (default 224).
        **kwargs: passed to the constructor: TwistNet's, or timm's.

    Raises:
        ModelError: an unknown name or keyword, an img_size that the model cannot have, or weights that do not load.
    """
    from common.checkpoint import load_pretrained
    from common.errors import ModelError
    from common.insertion import create, insert
    from common.registry import entry_of, size_problem
    from common.timm_models import problem_of

    if problem := problem_of(name) or size_problem(name, img_size):
        raise ModelError(problem)
    entry = entry_of(name)
    try:
        if 'twist' in entry:
            model = TwistNet(num_classes=num_classes, **{**entry['twist'], **kwargs})
            cfg = {**DEFAULT_CFG, 'architecture': name}
            model.pretrained_cfg = model.default_cfg = cfg  # timm saves it with the model
        else:
            model = create(name, num_classes, img_size, **kwargs)
    except (TypeError, ValueError) as error:  # an unknown keyword of a constructor, or a value that it refuses
        raise ModelError(f'{name}: {error}') from error
    if 'stci' in entry:
        insert(model, name, STCI, img_size, **entry['stci'])
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, 'architecture': name}
    load_pretrained(model, name, pretrained, img_size)
    return model


def count_params(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def list_models(num_classes: int = 47) -> None:
    """Print every model of the registry (not those of timm) with its parameters, venue and source of weights."""
    from common import tables

    rows = []
    for name, entry in MODELS.items():
        with torch.device('meta'):  # sizes without memory or initialisation
            params = count_params(build_model(name, num_classes)) / 1e6
        tag = f'timm: {entry["weights"]}' if entry.get('weights') else '-'
        source = 'weights/twistnet18_imagenet.pt' if 'twist' in entry else tag
        rows.append((name, entry['label'], f'{params:.2f}M', entry.get('venue') or '-', source))
    tables.print_text('llrll', ('model', 'name', 'params', 'venue', 'pretrained'), rows)


# ---------------------------------------------------------------------------------------------- timm

DEFAULT_CFG = dict(
    num_classes=1000,
    input_size=(3, 224, 224),
    pool_size=(7, 7),
    crop_pct=DEFAULT_CROP_PCT,
    interpolation='bicubic',
    mean=IMAGENET_DEFAULT_MEAN,
    std=IMAGENET_DEFAULT_STD,
    first_conv='stem.0',
    classifier='fc',
    license='mit',
)
default_cfgs = generate_default_cfgs({name: DEFAULT_CFG for name, entry in MODELS.items() if 'twist' in entry})


def register(name: str) -> None:
    """Let timm.create_model build an stci_NAME, also from a folder of the hub; every TwistNet is registered already."""
    from common.registry import entry_of

    entry = entry_of(name)
    if is_model(name) or not {'twist', 'stci'} & entry.keys():
        return

    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        from common.checkpoint import build_for_timm

        make = partial(TwistNet, **entry['twist']) if 'twist' in entry else partial(build_model, name)
        return build_for_timm(make, name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f'{entry["label"]} for timm.create_model.'
    globals()[name] = register_model(entrypoint)


for _name, _entry in MODELS.items():
    if 'twist' in _entry:
        register(_name)


if __name__ == '__main__':
    from common.errors import user_errors

    with user_errors('models.py'):
        list_models()
