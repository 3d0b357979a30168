"""The promises of models.py: sizes, initialisation, the published numbers, gradients, weights and timm's contract."""

import argparse
import copy
import itertools
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.models import _hub, save_for_hf

import models
from benchmark import saved_bytes
from common import checkpoint, registry, weights
from common.errors import ModelError
from compute_flops import count_macs
from models import DIRECTIONS, MODELS, STCI, TwistBlock, TwistNet, build_model, count_params, fuse

TWISTNETS = [name for name, entry in MODELS.items() if 'twist' in entry]
FIXTURE = Path(__file__).parent / 'tests' / 'fixtures' / 'twistnet_w8_reference.npz'

# Parameters in M and MACs in G at 224 x 224 with 47 classes.
SIZES = {
    'resnet18': (11.2006, 1.8186),
    'seresnet18': (11.2907, 1.8187),
    'convnextv2_nano': (15.0129, 2.4550),
    'fastvit_sa12': (10.6041, 1.5018),
    'efficientformerv2_s2': (12.1593, 1.2711),
    'repvit_m1_5': (13.6667, 2.3074),
    'convnext_tiny': (27.8563, 4.4697),
    'swin_tiny': (27.5555, 4.5085),
    'twistnet18': (11.5890, 1.8509),
    'twistnet18_no_spiral': (11.5877, 1.8508),
    'twistnet18_no_ais': (11.5261, 1.8508),
    'twistnet18_first_order': (11.2006, 1.8186),
}


def small(**kwargs) -> TwistNet:
    """A TwistNet of width 8 in an arbitrary but fixed state."""
    torch.manual_seed(0)
    return TwistNet(**{'base_width': 8, 'num_classes': 5, **kwargs})


def twist_blocks(model: TwistNet) -> list[TwistBlock]:
    return [m for m in model.modules() if isinstance(m, TwistBlock)]


# ------------------------------------------------------------------------------------------ sizes and registry


@pytest.mark.parametrize('name', SIZES)
def test_parameters_and_macs_equal_the_table(name):
    model = build_model(name)
    params, macs = SIZES[name]
    assert round(count_params(model) / 1e6, 4) == params
    assert round(count_macs(model) / 1e9, 4) == macs


def test_list_models_prints_every_model_with_its_size_venue_and_weights(capsys):
    models.list_models()
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines)[1:] == list(MODELS)
    for name, (params, _) in SIZES.items():
        assert f' {params:.2f}M ' in lines[name]
    assert 'CVPR 2016' in lines['resnet18']
    assert 'timm: resnet18.a1_in1k' in lines['resnet18']
    assert 'weights/twistnet18_imagenet.pt' in lines['twistnet18_no_ais']


def test_an_entry_without_weights_and_venue_is_listed_and_refused_weights(monkeypatch, capsys):
    monkeypatch.setattr(models, 'MODELS', {})
    for table in (models.MODELS, registry.MODELS):
        monkeypatch.setitem(table, 'bare', dict(label='Bare', timm='resnet10t'))
    models.list_models()
    assert capsys.readouterr().out.splitlines()[-1].split() == ['bare', 'Bare', '4.95M', '-', '-']
    with pytest.raises(ModelError, match=r'^bare: the registry names no ImageNet weights; .*--pretrained PATH'):
        build_model('bare', pretrained=True)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'words'),
    [
        ('resnet19', {}, r"^unknown model 'resnet19'; near to it: .*resnet18.*--import FILE"),
        ('twistnet18', dict(heads=2), 'heads'),
        ('twistnet18', dict(num_heads=5), 'num_heads must be 1 to 4'),
        ('twistnet18', dict(twist_stages=(5,)), 'twist_stages must be among 1 to 4'),
        ('efficientformerv2_s2', dict(img_size=100), '--img_size 100 must be a multiple of 32 for efficientformerv2'),
    ],
)
def test_unknown_names_and_keywords_are_refused(name, kwargs, words):
    with pytest.raises(ModelError, match=words):
        build_model(name, **kwargs)


@pytest.mark.parametrize('name', ['resnet18', 'twistnet18', *(name for name in MODELS if 'zero_init' in name)])
def test_the_last_batchnorm_of_each_block_starts_as_the_name_says(name):
    torch.manual_seed(0)
    model = build_model(name, 5)
    torch.manual_seed(0)
    other = build_model(name.partition('_')[0] if 'zero_init' in name else 'twistnet18', 5).state_dict()
    last = {k: v for k, v in model.named_parameters() if k.endswith('bn2.weight')}
    assert len(last) == 8
    assert all((v == (0 if 'zero_init' in name else 1)).all() for v in last.values())
    if name in ('resnet18_zero_init', 'twistnet18_zero_init'):  # the rest of the start is that of the plain model
        assert all(torch.equal(v, other[k]) for k, v in model.state_dict().items() if k not in last)


@pytest.mark.slow
def test_variants_are_what_their_names_say():
    def blocks(name):
        return twist_blocks(build_model(name))

    assert len(blocks('twistnet18')) == 4
    assert len(blocks('twistnet18_first_order')) == 0
    assert [b.stci.proj[0].out_channels for b in blocks('twistnet18_stage3')] == [256, 256]
    assert [b.stci.proj[0].out_channels for b in blocks('twistnet18_stage4')] == [512, 512]
    for heads, dim in ((1, 44), (2, 88)):
        assert blocks(f'twistnet18_heads{heads}')[0].stci.norm.num_channels == dim
    for suffix, gamma in (('m3', -3), ('m1', -1), ('0', 0), ('1', 1)):
        assert all(b.gate.item() == gamma for b in blocks(f'twistnet18_gate_{suffix}'))
    assert isinstance(blocks('twistnet18_no_ais')[0].stci.ais, torch.nn.Identity)
    assert isinstance(blocks('twistnet18_no_spiral')[0].stci.twist, torch.nn.Identity)
    assert blocks('twistnet18_no_products')[0].stci.norm.num_channels == 32
    assert blocks('twistnet18_zero_init_no_products')[0].stci.norm.num_channels == 32
    assert isinstance(blocks('twistnet18_zero_init_no_spiral')[0].stci.twist, torch.nn.Identity)
    kernels = blocks('twistnet18_random_twist')[0].stci.twist.dwconv.weight
    assert kernels.std().item() == pytest.approx((2 / 72) ** 0.5, rel=0.15)


# ------------------------------------------------------------------------------------------ initialisation


def test_kernels_projection_and_gates_right_after_construction():
    model = build_model('twistnet18')
    for block in twist_blocks(model):
        kernels = block.stci.twist.dwconv.weight.view(4, 8, 3, 3)
        for k, (dy, dx) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
            expected = torch.zeros(3, 3)
            expected[1, 1] = expected[1 + dy, 1 + dx] = 0.5
            assert all(torch.equal(kernel, expected) for kernel in kernels[k])
        assert block.stci.proj[0].weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert block.stci.twist.scale.eq(1).all()
        # Each head's convolution has a fan-out of its own 8 channels, though the heads share a tensor.
        assert block.stci.reduce[0].weight.std().item() == pytest.approx(0.5, rel=0.05)
        assert block.conv2.weight.std().item() == pytest.approx((2 / (9 * block.conv2.out_channels)) ** 0.5, rel=0.05)
    assert set(model.gates()) == {'layer3.0', 'layer3.1', 'layer4.0', 'layer4.1'}
    assert list(model.gates().values()) == pytest.approx([1 / (1 + np.exp(2))] * 4)


# ------------------------------------------------------------------------------------------ published numbers


def published_names(name: str, tensor: torch.Tensor, num_heads: int = 4):
    """(name, tensor) pairs of the authors' layout for one of our tensors: the inverse of the loading hook."""
    head, inside, rest = name.partition('.stci.')
    if not inside:
        yield name, tensor
    elif not rest.startswith(('reduce.', 'twist.')):
        yield f'{head}.mhstci.{rest}', tensor
    else:
        dim = 1 if rest == 'twist.scale' else 0
        parts = [tensor] * num_heads if tensor.ndim == 0 else tensor.chunk(num_heads, dim)
        for k, part in enumerate(parts):
            yield f'{head}.mhstci.heads.{k}.{rest}', part


def reference() -> tuple[dict, TwistNet]:
    data = dict(np.load(FIXTURE))
    state = {k.removeprefix('state/'): torch.from_numpy(v) for k, v in data.items() if k.startswith('state/')}
    model = small()
    model.load_state_dict(state)
    return data, model


def test_reference_logits_loss_and_gradients():
    data, model = reference()
    x, y = torch.from_numpy(data['x']), torch.from_numpy(data['y'])
    with torch.no_grad():
        np.testing.assert_allclose(model.eval()(x), data['logits_eval'], rtol=1e-4, atol=1e-6)
    logits = model.train()(x)
    np.testing.assert_allclose(logits.detach(), data['logits_train'], rtol=1e-4, atol=1e-6)
    loss = F.cross_entropy(logits, y)
    assert loss.item() == pytest.approx(float(data['loss_train']), rel=1e-5)
    loss.backward()
    ours = dict(pair for name, p in model.named_parameters() for pair in published_names(name, p.grad))
    theirs = {k.removeprefix('gradnorm/'): float(v) for k, v in data.items() if k.startswith('gradnorm/')}
    assert ours.keys() == theirs.keys()
    for name, norm in theirs.items():
        # The bias of the GroupNorm reaches the output through a 1x1 convolution and a BatchNorm, which subtracts it:
        # its gradient is zero, and what float32 leaves of it (1e-8) is rounding on both sides.
        if name.endswith('mhstci.norm.bias'):
            assert max(norm, ours[name].norm().item()) < 1e-6, name
        else:
            assert ours[name].norm().item() == pytest.approx(norm, rel=1e-3), name


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        dict(base_width=16, num_classes=9),
        dict(num_heads=2, twist_stages=(4,)),
        dict(c_red=4),
        dict(use_ais=False),
        dict(use_spiral=False),
        dict(layers=(1, 1, 2, 1), twist_stages=(2, 3, 4)),
    ],
)
def test_published_layout_loads_for_other_shapes(kwargs):
    source, target = small(**kwargs), small(**kwargs)
    with torch.no_grad():
        for tensor in source.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    published = {
        'module.' + key: part
        for name, tensor in source.state_dict().items()
        for key, part in published_names(name, tensor, kwargs.get('num_heads', 4))
    }
    before = dict(published)
    target.load_state_dict(published)
    assert published.keys() == before.keys(), "the caller's dict must stay as it was"
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(source.eval()(x), target.eval()(x))


# ------------------------------------------------------------------------------------------ the method


def test_the_floor_of_the_norm_is_1e_6():
    stci = small().layer3[0].stci
    z = torch.rand(1, 32, 2, 2) + 0.1
    for length, kept in ((1e-4, 1.0), (1e-6, 1.0), (1e-8, 0.01)):  # vectors of a head shorter than the floor stay short
        short = z / z.unflatten(1, (4, 8)).square().sum(2, keepdim=True).sqrt().expand(1, 4, 8, 2, 2).flatten(1, 2)
        first = stci._interact(short * length).unflatten(1, (4, 44))[:, :, :8]
        torch.testing.assert_close(first.norm(dim=2), torch.full((1, 4, 2, 2), kept), rtol=1e-3, atol=0)


def plain_stci(stci: STCI, h: torch.Tensor) -> torch.Tensor:
    """The method head by head and product by product, as its description reads; inference mode of every BatchNorm."""
    outputs = []
    for k in range(stci.num_heads):
        part = slice(k * stci.c_red, (k + 1) * stci.c_red)
        bn = stci.reduce[1]
        z = F.conv2d(h, stci.reduce[0].weight[part])
        z = F.relu(F.batch_norm(z, bn.running_mean[part], bn.running_var[part], bn.weight[part], bn.bias[part]))
        kernels = stci.twist.dwconv.weight[part]
        t = torch.zeros_like(z)
        padded = F.pad(z, (1, 1, 1, 1))
        for dy, dx in itertools.product(range(3), range(3)):
            shifted = padded[:, :, dy : dy + z.shape[2], dx : dx + z.shape[3]]
            t = t + kernels[:, 0, dy, dx].view(1, -1, 1, 1) * shifted
        t = stci.twist.scale[:, part] * t
        z = z / z.norm(dim=1, keepdim=True).clamp_min(1e-6)
        t = t / t.norm(dim=1, keepdim=True).clamp_min(1e-6)
        pairs = [z[:, i] * t[:, j] for i in range(stci.c_red) for j in range(i, stci.c_red)]
        outputs += [z, torch.stack(pairs, 1)]
    v = torch.cat(outputs, 1)
    squeeze = v.mean((2, 3))
    w1, w2 = stci.ais.fc[2], stci.ais.fc[4]
    v = v * torch.sigmoid(w2(F.relu(w1(squeeze))))[:, :, None, None]
    v = F.group_norm(v, stci.norm.num_groups, stci.norm.weight, stci.norm.bias)
    return stci.proj[1](F.conv2d(v, stci.proj[0].weight))


def test_stci_is_its_description():
    stci = STCI(16).double().eval()
    stci.reset_parameters()
    with torch.no_grad():
        for p in stci.parameters():
            p.add_(0.1 * torch.randn_like(p))
    h = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(stci(h), plain_stci(stci, h))


@pytest.mark.parametrize('training', [True, False])
def test_the_gate_in_the_affine_map_is_a_factor(training):
    torch.manual_seed(0)
    stci, x = STCI(16).double().train(training), torch.randn(3, 16, 4, 4, dtype=torch.float64)
    stci.reset_parameters()
    for p in stci.proj[1].parameters():
        torch.nn.init.normal_(p)
    other, gate = copy.deepcopy(stci), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(stci(x, gate).square().sum(), [gate, *stci.parameters()])
    expected = torch.autograd.grad((gate.sigmoid() * other(x)).square().sum(), [gate, *other.parameters()])
    torch.testing.assert_close(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(stci.buffers(), other.buffers()))
    # What stands in the place of a usual BatchNorm2d keeps its own forward pass.
    for other in (torch.nn.Identity(), torch.nn.BatchNorm2d(16, affine=False), torch.nn.BatchNorm2d(16, momentum=None)):
        stci.proj[1] = other.double().eval()
        torch.testing.assert_close(stci(x, gate), gate.sigmoid() * stci(x))


def test_twistnet18_stores_little_more_than_resnet18_for_the_backward_pass():
    x = torch.randn(8, 3, 224, 224).to(memory_format=torch.channels_last)
    names = 'resnet18', 'twistnet18'
    sizes = [saved_bytes(build_model(name).to(memory_format=torch.channels_last), x) for name in names]
    assert sizes[1] / sizes[0] <= 1.05


@pytest.mark.slow
def test_gradcheck_of_stci():
    torch.manual_seed(1)
    stci = STCI(3, num_heads=4, c_red=2).double().train()
    stci.reset_parameters()
    with torch.no_grad():  # far from relu's corner, where finite differences mean nothing
        stci.reduce[1].bias.fill_(3.0)
    names, params = zip(*stci.named_parameters())
    h = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)

    def function(h, *params):
        return torch.func.functional_call(stci, dict(zip(names, params)), (h,))

    assert torch.autograd.gradcheck(function, (h, *(p.detach().requires_grad_() for p in params)), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet18', *TWISTNETS])
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, img_size=64).double().train()
    x, y = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.arange(4)

    for _ in range(2 if 'zero_init' in name else 1):  # norms at zero hide the layers before; one step brings them out
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.1 * p.grad)
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    # What float64 rounds to 1e-17 is zero by construction: a bias that a BatchNorm subtracts again.
    idle = [n for n, g in grads.items() if g.norm() < 1e-12]
    assert idle == [n for n in grads if n.endswith('stci.norm.bias')]


@pytest.mark.parametrize('direction', range(4))
def test_the_head_of_the_direction_in_which_a_pattern_co_occurs_responds_most(direction):
    # Channel 0 fires on random pixels, channel 1 on their neighbours in one direction: z_0 here meets z_1 there.
    torch.manual_seed(direction)
    dy, dx = DIRECTIONS[direction]
    seeds = (torch.rand(8, 1, 32, 32) < 0.05).float()
    h = torch.cat([seeds, seeds.roll((dy, dx), (2, 3))], 1)
    stci = STCI(2, c_red=2).eval()
    stci.reset_parameters()
    with torch.no_grad():
        stci.reduce[0].weight.copy_(torch.eye(2).repeat(4, 1)[:, :, None, None])
        v = stci.interactions(h).unflatten(1, (4, 5))  # per head: z_1, z_2, p_11, p_12, p_22
    response = v[:, :, 3].mean((0, 2, 3))
    assert response.argmax() == direction
    assert response[direction] > 3 * response.sort().values[-2], response


# ------------------------------------------------------------------------------------------ dtypes, compile, export


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_reduced_precision_stays_near_float32(dtype):
    _, model = reference()
    x = torch.randn(2, 3, 64, 64)
    expected = model.eval()(x)
    with torch.autocast('cpu', dtype):
        actual = model(x)
        loss = F.cross_entropy(model.train()(x).float(), torch.tensor([0, 1]))
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    _, model = reference()  # and without autocast
    torch.testing.assert_close(model.eval().to(dtype)(x.to(dtype)).float(), expected, rtol=0.1, atol=0.1)


def test_the_selection_is_computed_in_float32_under_autocast():
    ais, v = models.AIS(32), torch.randn(4, 32, 5, 5).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        assert not torch.equal(ais.weights(v), ais.fc(v.float())), 'which autocast rounds'
        out = ais(v)
    assert torch.equal(out, v * ais.weights(v.float()).bfloat16()[:, :, None, None])


def test_positions_of_zeros_have_zero_interactions():
    stci = STCI(16).eval()
    with torch.autocast('cpu', torch.float16):  # whose smallest square is above that of the bound on the length
        v = stci.interactions(torch.zeros(1, 16, 4, 4))
    assert torch.equal(v, torch.zeros_like(v))


@pytest.mark.slow
def test_compiled_without_a_graph_break_and_equal():
    model = small()
    # fullgraph: a graph break is an error. The compiler behind the graph is tried in tests/test_train.py.
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)
    assert model.load_state_dict(compiled.state_dict())  # '_orig_mod.' names


@pytest.mark.slow
def test_export():
    model = small().eval()
    x = torch.randn(2, 3, 64, 64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=1)},))
    torch.testing.assert_close(exported.module()(x[:1]), model(x[:1]))


# ------------------------------------------------------------------------------------------ for inference


def used(name: str, size: int = 64, **kwargs) -> torch.nn.Module:
    """A model in evaluation mode, none of whose BatchNorms, scales and gates is as it starts."""
    torch.manual_seed(0)
    model = build_model(name, 5, img_size=size, **kwargs).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.2 * torch.rand_like(tensor)).add_(0.2 * key.endswith('running_mean'))
    return model


BRANCHED = ['stci_resnet18', 'stci_no_ais_convnextv2_nano', 'stci_fastvit_sa12']
LEFT = dict(fastvit_sa12=26, stci_fastvit_sa12=26, efficientformerv2_s2=1)  # BatchNorms behind other layers


@pytest.mark.parametrize('name', [*MODELS, *BRANCHED])
def test_a_fused_model_gives_equal_logits_without_batchnorms_behind_convolutions(name):
    model = used(name, base_width=8) if name in TWISTNETS else used(name)
    before, x = copy.deepcopy(model.state_dict()), torch.randn(3, 3, 64, 64)
    fused = fuse(model, torch.randn(1, 3, 64, 64))
    assert fused is not model
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(fused(x), expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules()) == LEFT.get(name, 0)
    assert not any(isinstance(m, models.Twist) for m in fused.modules())
    assert all(block.gate is None for block in models.blocks_of(fused).values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_that_fuse_does_not_understand_stays_as_it_is():
    class Both(torch.nn.Module):
        """Needs the output of its convolution before its BatchNorm, too."""

        def __init__(self):
            super().__init__()
            self.conv, self.bn = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
            torch.nn.init.constant_(self.bn.bias, 1.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return (y + self.bn(y)).mean((2, 3))

    model, x = Both(), torch.randn(1, 3, 8, 8)
    assert fuse(model, x) is model
    model.bn = torch.nn.BatchNorm2d(4, track_running_stats=False)  # of each batch: nothing to merge
    assert isinstance(fuse(model, x).bn, torch.nn.BatchNorm2d)


def test_a_fused_model_of_bfloat16_runs_under_autocast_without_casting_weights():
    model, x = used('twistnet18', base_width=8), torch.randn(2, 3, 64, 64)
    fused = fuse(model, x, torch.bfloat16)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(fused(x).float(), model(x).float(), rtol=0.05, atol=0.05)
    for key, value in fused.state_dict().items():
        assert (value.dtype == torch.float32) == ('.ais.' in key or '.norm.' in key), key


# ------------------------------------------------------------------------------------------ timm


@pytest.mark.parametrize('name', TWISTNETS)
def test_timm_contract(name):
    x = torch.randn(2, 3, 64, 64)
    model = timm.create_model(name, num_classes=10).eval()
    assert isinstance(model, TwistNet)
    assert model.default_cfg['input_size'] == (3, 224, 224)
    assert model(x).shape == (2, 10)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 2)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, 512)
    final, maps = model.forward_intermediates(x)
    assert [m.shape[1:] for m in maps] == [(64, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    assert torch.equal(final, features)
    assert torch.equal(maps[-1], features)
    only = model.forward_intermediates(x, indices=[3], stop_early=True, intermediates_only=True)
    assert torch.equal(only[0], maps[3])
    assert model.get_classifier() is model.fc
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, 512)


def test_star_import_gives_the_entry_points():
    names: dict = {}
    exec('from models import *', names)
    assert callable(names['twistnet18'])


def test_timm_features_only_pruning_checkpointing_and_groups():
    x = torch.randn(2, 3, 64, 64)
    net = timm.create_model('twistnet18', features_only=True, out_indices=(2, 4))
    assert [f.shape[1] for f in net(x)] == net.feature_info.channels() == [128, 512]
    assert net.feature_info.reduction() == [8, 32]

    model = timm.create_model('twistnet18', num_classes=4)
    plain = torch.autograd.grad(model(x).sum(), model.layer3[0].gate)[0]
    model.set_grad_checkpointing()
    torch.testing.assert_close(torch.autograd.grad(model(x).sum(), model.layer3[0].gate)[0], plain)

    groups = timm.models.group_parameters(model, model.group_matcher(coarse=False))
    assert sum(len(names) for names in groups.values()) == len(list(model.parameters()))

    model.prune_intermediate_layers([2])
    assert model.forward_intermediates(x, indices=[2], intermediates_only=True)[0].shape[1] == 128
    assert count_params(model) < 1e6


# ------------------------------------------------------------------------------------------ timm's sources of weights


@pytest.fixture
def decoy(tmp_path, monkeypatch) -> Path:
    """A working directory whose weights/ holds other weights than those that are asked for."""
    (tmp_path / 'weights').mkdir()
    save(tmp_path / 'weights' / 'twistnet18_imagenet.pt', {'stem.0.weight': torch.zeros(64, 3, 7, 7)})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pushed(folder: Path, name: str, safe: bool, **kwargs) -> TwistNet:
    """A trained model of width 8 with 5 classes, and the folder that timm saves or pushes of it."""
    model = timm.create_model(name, num_classes=5, base_width=8, **kwargs).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    save_for_hf(model, folder, safe_serialization=safe, model_args=dict(base_width=8, **kwargs))
    return model


@pytest.mark.parametrize(
    ('name', 'safe', 'kwargs'),
    [
        pytest.param('twistnet18', True, {}, marks=pytest.mark.slow),  # timm before 1.0.31 reads no safetensors here
        ('twistnet18_gate_1', False, {}),
        ('twistnet18_heads2', False, dict(c_red=4)),
    ],
)
def test_what_timm_saved_is_what_timm_loads(decoy, name, safe, kwargs):
    source, x = pushed(decoy / 'model', name, safe, **kwargs), torch.randn(2, 3, 32, 32)
    model = timm.create_model(f'local-dir:{decoy / "model"}', pretrained=True).eval()
    assert torch.equal(model(x), source(x))
    assert model.loaded == 1
    assert f'from local-dir {decoy / "model"}' in model.pretrained
    other = timm.create_model(f'local-dir:{decoy / "model"}', pretrained=True, num_classes=7).eval()
    assert other(x).shape == (2, 7)
    assert torch.equal(other(x), other.fc(source.forward_head(source.forward_features(x), pre_logits=True)))
    assert 'left as initialised: fc' in other.pretrained
    net = timm.create_model(f'local-dir:{decoy / "model"}', pretrained=True, features_only=True).eval()
    assert all(torch.equal(a, b) for a, b in zip(net(x), source.forward_intermediates(x, intermediates_only=True)))
    if safe:  # and older timm changes no channels of weights from a folder
        grey = timm.create_model(f'local-dir:{decoy / "model"}', pretrained=True, in_chans=1)
        torch.testing.assert_close(grey.stem[0].weight, source.stem[0].weight.sum(1, keepdim=True))
        assert 'input channels 3 -> 1' in grey.pretrained
    fresh = timm.create_model(f'local-dir:{decoy / "model"}')
    assert fresh.loaded is None
    assert not torch.equal(fresh.stem[0].weight, source.stem[0].weight)


def test_a_pushed_model_comes_from_the_hub(decoy, monkeypatch):
    source, x = pushed(decoy / 'repository', 'twistnet18_random_twist', False), torch.randn(2, 3, 32, 32)

    def download(repo_id, filename, **_):
        assert repo_id == 'user/net'
        if not (decoy / 'repository' / filename).exists():
            raise _hub.EntryNotFoundError('no such file')
        return str(decoy / 'repository' / filename)

    monkeypatch.setattr(_hub, 'hf_hub_download', download)
    monkeypatch.setattr(_hub, 'EntryNotFoundError', FileNotFoundError)
    model = timm.create_model('hf-hub:user/net', pretrained=True).eval()
    assert torch.equal(model(x), source(x))
    assert 'from hf-hub user/net' in model.pretrained


def test_a_model_of_build_model_can_be_saved_for_timm(decoy):
    source, x = build_model('twistnet18_no_ais', 5, base_width=8).eval(), torch.randn(2, 3, 32, 32)
    save_for_hf(source, decoy / 'model', safe_serialization=False, model_args=dict(base_width=8))
    assert torch.equal(timm.create_model(f'local-dir:{decoy / "model"}', pretrained=True).eval()(x), source(x))


def test_sources_in_timms_configuration_are_used_and_read_as_any_file(decoy):
    full = build_model('twistnet18', 5, base_width=8)
    with torch.no_grad():
        for block in twist_blocks(full):
            block.gate.fill_(0.7)
    bare = save(decoy / 'bare.pt', full.state_dict())
    best = save(decoy / 'best.pt', dict(model='twistnet18_gate_1', state_dict=full.state_dict()))

    def load(name, **overlay):
        kwargs = dict(num_classes=5, base_width=8, cache_dir=decoy / 'cache')
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
        assert torch.equal(model.layer4[1].conv2.weight, full.layer4[1].conv2.weight)
        return [round(gate, 3) for gate in model.gates().values()], model.pretrained

    trained, at_start = [0.668] * 4, [0.731] * 4
    for overlay in (dict(file=str(bare)), dict(url=bare.as_uri()), dict(state_dict=full.state_dict())):
        assert load('twistnet18', **overlay)[0] == trained
        gates, said = load('twistnet18_gate_1', **overlay)
        assert gates == at_start
        assert '(weights of an unknown model), without its gate' in said
    assert load('twistnet18_gate_1', file=str(best))[0] == trained
    model = timm.create_model('twistnet18', num_classes=5, base_width=8, checkpoint_path=str(best))
    assert torch.equal(model.fc.weight, full.fc.weight)


# ------------------------------------------------------------------------------------------ weights


@pytest.fixture
def no_hub(monkeypatch):
    """timm's weights, made here: create_model(tag, pretrained=True) gives a random model and notes what it is asked."""
    asked, real = {}, timm.create_model

    def create_model(name, pretrained=False, **kwargs):
        if pretrained:
            asked[name] = kwargs
        return real(name.split('.')[0], **kwargs)

    monkeypatch.setattr(timm, 'create_model', create_model)
    return asked


def share(model: torch.nn.Module, *prefixes: str) -> float:
    """Of the parameters, those whose names begin so."""
    sizes = {k: p.numel() for k, p in model.named_parameters()}
    return sum(n for k, n in sizes.items() if k.startswith(prefixes)) / sum(sizes.values())


def save(path: Path, checkpoint) -> Path:
    torch.save(checkpoint, path)
    return path


def test_warm_up_from_resnet18_takes_stem_and_two_stages_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, '__file__', str(tmp_path / 'common' / 'weights.py'))
    trunk = timm.create_model('resnet18')
    monkeypatch.setattr(checkpoint, 'fetch_from_timm', lambda tag, **_: trunk.state_dict())
    model = build_model('twistnet18', pretrained=True)
    total = len(model.state_dict())
    assert f'loaded 60 of {total} tensors (6% of the parameters) from timm resnet18.a1_in1k' in model.pretrained
    assert model.loaded == pytest.approx(share(model, 'stem.', 'layer1.', 'layer2.'))
    assert model.pretrained in capsys.readouterr().err
    assert 'layer3.0.stci' in model.pretrained.split('left as initialised: ')[1]
    assert (model.loaded_weights.tensors, model.loaded_weights.gates) == (60, 0)
    x = torch.randn(1, 3, 64, 64)
    expected = trunk.eval().forward_intermediates(x, indices=[2], intermediates_only=True)
    torch.testing.assert_close(model.eval().forward_intermediates(x, indices=[2], intermediates_only=True), expected)


def test_trunk_loads_the_whole_of_resnet18_and_closed_gates_give_its_logits_to_the_bit(monkeypatch, tmp_path):
    trunk = timm.create_model('resnet18')
    for module in trunk.modules():  # running statistics that are not those of the start
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    monkeypatch.setattr(checkpoint, 'fetch_from_timm', lambda tag, **_: trunk.state_dict())
    path = save(tmp_path / 'resnet18.pth', trunk.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for asked, gate_init in (('trunk', -float('inf')), (f'trunk={path}', -float('inf')), ('trunk', -2.0)):
        model = build_model('twistnet18', 1000, asked, gate_init=gate_init)
        equal = torch.equal(model.eval()(x), trunk.eval()(x))
        assert equal == (gate_init != -2), 'and open gates do not'
        assert '(the trunk)' in model.pretrained
        left = 'left as initialised: layer3.0.gate, layer3.0.stci, layer3.1.gate, layer3.1.stci, layer4.0.gate'
        assert left in model.pretrained
        assert model.loaded == pytest.approx(count_params(trunk) / count_params(model))


def test_trunk_is_of_resnet18_and_another_start_than_the_default(tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'weights').mkdir()
    path = save(tmp_path / 'weights' / 'twistnet18_imagenet.pt', build_model('twistnet18').state_dict())
    assert weights.weights_source('twistnet18', 'trunk') == 'resnet18.a1_in1k', 'not the file'
    assert weights.weights_identity('twistnet18', 'trunk') == 'trunk=resnet18.a1_in1k'
    assert weights.weights_identity('twistnet18', f'trunk={path}').startswith('trunk=')
    assert weights.weights_identity('resnet18', 'trunk') == weights.weights_identity('resnet18', True)
    assert weights.weights_identity('resnet18', f'trunk={path}') == weights.weights_identity('resnet18', path)
    with pytest.raises(ModelError, match=r'twistnet18_imagenet.pt: is no ResNet-18, whose weights --pretrained trunk'):
        build_model('twistnet18', pretrained=f'trunk={path}')
    build_model('resnet18', pretrained='trunk')  # a grid gives all its models the same options
    build_model('stci_resnet18', pretrained='trunk')
    assert list(no_hub) == ['resnet18.a1_in1k']


def test_first_order_is_the_trunk_of_resnet18():
    model, trunk = build_model('twistnet18_first_order'), timm.create_model('resnet18', num_classes=47)
    model.load_state_dict({checkpoint.trunk_name(k): v for k, v in trunk.state_dict().items()})
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.eval()(x), trunk.eval()(x))


def test_imagenet_weights_are_found_and_loaded_but_for_the_classifier(tmp_path, monkeypatch):
    source = build_model('twistnet18', num_classes=1000, base_width=8)
    (tmp_path / 'weights').mkdir()
    save(tmp_path / 'weights' / 'twistnet18_imagenet.pt', source.state_dict())
    monkeypatch.chdir(tmp_path)
    model = build_model('twistnet18', num_classes=5, base_width=8, pretrained=True)
    for name, tensor in model.state_dict().items():
        if not name.startswith('fc.'):  # not 'fc' anywhere: AIS has tensors of that name too
            assert torch.equal(tensor, source.state_dict()[name]), name
    assert f'loaded {len(source.state_dict()) - 2} of' in model.pretrained

    variant = build_model('twistnet18_no_ais', num_classes=5, base_width=8, pretrained=True)
    assert 'not used: layer3.0.stci' in variant.pretrained
    heads = build_model('twistnet18_heads2', num_classes=5, base_width=8, pretrained=True)
    assert 'left as initialised: fc, layer3.0.stci' in heads.pretrained
    assert torch.equal(heads.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    timm_model = timm.create_model('twistnet18', pretrained=True, num_classes=5, base_width=8)
    assert torch.equal(timm_model.layer4[0].stci.ais.fc[2].weight, source.layer4[0].stci.ais.fc[2].weight)


@pytest.mark.parametrize('form', ['imagenet', 'best', 'safetensors', 'published', 'latest', 'last'])
def test_a_variant_stays_one_whatever_file_of_the_full_model_it_is_given(tmp_path, monkeypatch, form):
    source = build_model('twistnet18', num_classes=5, base_width=8)
    with torch.no_grad():
        for block in twist_blocks(source):
            block.gate.fill_(0.7)
            block.stci.twist.dwconv.weight.fill_(0.3)
            block.stci.twist.scale.fill_(0.9)
    state, path = source.state_dict(), tmp_path / f'{form}.pt'
    published = {key: part for name, tensor in state.items() for key, part in published_names(name, tensor)}
    if form == 'imagenet':
        (tmp_path / 'weights').mkdir()
        save(tmp_path / 'weights' / 'twistnet18_imagenet.pt', state)
        monkeypatch.chdir(tmp_path)
        path = True
    elif form == 'safetensors':
        path = path.with_suffix('.safetensors')
        safetensors.torch.save_file({f'module.{k}': v for k, v in state.items()}, path)
    else:
        of_training = dict(config=dict(defines=dict(model='twistnet18')), progress=dict(epoch=3), state_dict=state)
        last = dict(fingerprint='0', state_dict=state, optimizer={}, run=dict(history=[]))
        best = dict(model='twistnet18', state_dict=state)
        save(path, dict(published=published, latest=of_training, last=last, best=best)[form])
    gate = build_model('twistnet18_gate_m3', num_classes=5, base_width=8, pretrained=path)
    assert [b.gate.item() for b in twist_blocks(gate)] == [-3.0] * 4
    assert (twist_blocks(gate)[3].stci.twist.dwconv.weight == 0.3).all()
    twist = build_model('twistnet18_random_twist', num_classes=5, base_width=8, pretrained=path)
    assert (twist_blocks(twist)[3].stci.twist.dwconv.weight != 0.3).all()
    assert (twist_blocks(twist)[3].stci.twist.scale == 1).all()
    assert twist_blocks(twist)[0].gate.item() == pytest.approx(0.7)
    assert torch.equal(twist.fc.weight, source.fc.weight)
    whose = 'twistnet18' if form in ('imagenet', 'best', 'latest') else 'an unknown model'
    assert f'(weights of {whose}), without its gate; left as initialised: layer3.0.gate' in gate.pretrained
    assert f'(weights of {whose}), without its twist; left' in twist.pretrained
    full = build_model('twistnet18', num_classes=5, base_width=8, pretrained=path)
    assert twist_blocks(full)[0].gate.item() == pytest.approx(0.7)


def test_weights_of_one_variant_do_not_make_it_of_another_model(tmp_path, monkeypatch):
    source = build_model('twistnet18_gate_1', num_classes=5, base_width=8)
    with torch.no_grad():
        for block in twist_blocks(source):
            block.gate.fill_(0.5)
    path = save(tmp_path / 'best.pt', dict(model='twistnet18_gate_1', state_dict=source.state_dict()))
    for name, gate in (('twistnet18_gate_1', 0.5), ('twistnet18_gate_m3', -3), ('twistnet18', -2)):
        model = build_model(name, num_classes=5, base_width=8, pretrained=path)
        assert [b.gate.item() for b in twist_blocks(model)] == [gate] * 4
        assert torch.equal(model.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
        assert '(twistnet18_gate_1)' in model.pretrained
    twist = build_model('twistnet18_random_twist', num_classes=5, base_width=8, pretrained=path)
    assert '(weights of twistnet18_gate_1), without its gate, without its twist;' in twist.pretrained
    (tmp_path / 'weights').mkdir()
    own = save(tmp_path / 'weights' / 'twistnet18_gate_1_imagenet.pt', source.state_dict())
    monkeypatch.chdir(tmp_path)
    for pretrained in (True, own):  # the name of the file says whose they are
        found = build_model('twistnet18_gate_1', num_classes=5, base_width=8, pretrained=pretrained)
        assert twist_blocks(found)[0].gate.item() == 0.5


def test_files_of_timm_weights_load_as_the_hub_would(tmp_path):
    trunk, legacy = timm.create_model('resnet18'), timm.create_model('legacy_seresnet18')
    model = build_model('twistnet18', pretrained=save(tmp_path / 'resnet18.pth', trunk.state_dict()))
    assert 'loaded 60 of 206 tensors' in model.pretrained
    model = build_model('seresnet18', 5, save(tmp_path / 'se.pth', legacy.state_dict()))
    total = len(model.state_dict())
    assert f'loaded {total - 10} of {total} tensors' in model.pretrained  # all but the classifier and stage 1's SE
    assert 'left as initialised: fc, layer1.0.se, layer1.1.se' in model.pretrained
    assert model.loaded == pytest.approx(1 - share(model, 'fc.', 'layer1.0.se.', 'layer1.1.se.'))
    assert torch.equal(model.layer2[0].se.fc1.weight, legacy.layer2[0].se_module.fc1.weight)
    safetensors.torch.save_file(trunk.state_dict(), tmp_path / 'model.safetensors')
    model = build_model('resnet18', num_classes=1000, pretrained=tmp_path / 'model.safetensors')
    assert torch.equal(model.fc.weight, trunk.fc.weight)
    assert model.loaded == 1


def test_the_image_size_reaches_timm_where_the_weights_depend_on_it(no_hub):
    model = build_model('swin_tiny', num_classes=5, pretrained=True, img_size=128)
    assert no_hub == {'swin_tiny_patch4_window7_224.ms_in1k': {'img_size': 128}}
    assert 'left as initialised: head' in model.pretrained


def test_weights_beside_models_py_come_second(tmp_path, monkeypatch):
    beside, here = tmp_path / 'code' / 'weights', tmp_path / 'here' / 'weights'
    for folder in (beside, here):
        folder.mkdir(parents=True)
        (folder / 'twistnet18_imagenet.pt').touch()
    monkeypatch.chdir(here.parent)
    monkeypatch.setattr(weights, '__file__', str(beside.parent / 'common' / 'weights.py'))
    assert weights.weights_source('twistnet18', True) == Path('weights/twistnet18_imagenet.pt')
    (here / 'twistnet18_imagenet.pt').unlink()
    assert weights.weights_source('twistnet18', True) == beside / 'twistnet18_imagenet.pt'
    (beside / 'twistnet18_imagenet.pt').unlink()
    assert weights.weights_source('twistnet18', True) == 'resnet18.a1_in1k'
    assert weights.weights_source('resnet18', True) == 'resnet18.a1_in1k'
    assert weights.weights_source('resnet18', False) is None


@pytest.mark.parametrize(
    ('prefix', 'more'),
    [
        ('', dict(arch='resnet18', args=argparse.Namespace(lr=0.1), metric=71.2)),  # of timm's train.py
        ('model.', dict(hyper_parameters={})),  # of Lightning
        ('module.backbone.', {}),
        ('module._orig_mod.', {}),
    ],
)
@pytest.mark.parametrize('name', ['resnet18', 'twistnet18'])
def test_checkpoints_of_other_training_scripts_load(tmp_path, prefix, more, name):
    state = {prefix + k: v for k, v in build_model('resnet18', num_classes=5).state_dict().items()}
    state |= {'criterion.weight': torch.ones(5)} if prefix else {}
    model = build_model(name, num_classes=7, pretrained=save(tmp_path / 'a.pt', more | dict(state_dict=state)))
    assert torch.equal(model.layer1[0].conv1.weight, state[f'{prefix}layer1.0.conv1.weight'])
    assert model.loaded > (0.9 if name == 'resnet18' else 0.05)
    assert ('(resnet18)' in model.pretrained) == ('arch' in more)


class Payload:
    def __reduce__(self):
        return os.system, ('touch pwned',)


def wide() -> dict:  # as in a ResNet-50
    return {'conv1.weight': torch.zeros(64, 3, 7, 7), 'layer1.0.conv1.weight': torch.zeros(64, 64, 1, 1)}


def narrow() -> dict:  # its selection has an `fc` too, which is no classifier
    state = build_model('twistnet18', num_classes=9).state_dict()
    return {k: v[:, 1:] if k.endswith('ais.fc.2.weight') else v for k, v in state.items()}


BAD_WEIGHTS = [
    (narrow, r'layer3.0.stci.ais.fc.2.weight is \(44, 175\), twistnet18 has \(44, 176\)'),
    (wide, r'layer1.0.conv1.weight is \(64, 64, 1, 1\), twistnet18 has \(64, 64, 3, 3\)'),
    (lambda: small().state_dict(), r'stem.0.weight is \(8, 3, 7, 7\)'),
    (lambda: {'foo': torch.zeros(2)}, 'none of its 1 tensors fits'),
    (lambda: {'fc.weight': torch.zeros(5, 512), 'fc.bias': torch.zeros(5)}, 'none of its 2 tensors fits'),
    (lambda: {'epoch': 3}, 'holds no state dict'),
    (lambda: [1, 2], 'holds no state dict'),
    (lambda: {'stem.0.weight': Payload()}, 'refused, the file holds pickled code'),
    (lambda: pickle.dumps({'stem.0.weight': Payload()}, protocol=2), 'refused, the file holds pickled code'),
    (lambda: b'hello', 'damaged or not a PyTorch checkpoint'),
]


@pytest.mark.parametrize(('make', 'words'), BAD_WEIGHTS, ids=[words for _, words in BAD_WEIGHTS])
def test_bad_weights_are_refused_in_one_line(tmp_path, monkeypatch, make, words):
    monkeypatch.chdir(tmp_path)
    path, content = tmp_path / 'w.pt', make()
    path.write_bytes(content) if isinstance(content, bytes) else save(path, content)
    with pytest.raises(ModelError, match=words) as caught:
        build_model('twistnet18', num_classes=5, pretrained=path)
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'pwned').exists()


def test_weights_files_that_are_torn_missing_or_narrow(tmp_path):
    torn = save(tmp_path / 'torn.pt', small().state_dict())
    torn.write_bytes(torn.read_bytes()[:-1000])
    narrow = save(tmp_path / 'narrow.pt', small().state_dict())
    for name, path, words in (
        ('twistnet18', torn, 'damaged or not a PyTorch checkpoint'),
        ('twistnet18', tmp_path / 'missing.pt', 'no such weights file'),
        ('twistnet18', tmp_path / 'missing.safetensors', 'no such weights file'),
        ('twistnet18', tmp_path, 'Is a directory'),
        ('twistnet18_no_ais', narrow, 'tensors fits twistnet18_no_ais, or hardly any'),
    ):
        with pytest.raises(ModelError, match=words):
            build_model(name, pretrained=path)


def test_hub_out_of_reach_is_one_line(monkeypatch):
    def unreachable(name, pretrained=False, **kwargs):
        raise OSError('cannot connect\nlong advice')

    monkeypatch.setattr(timm, 'create_model', unreachable)
    with pytest.raises(ModelError, match=r'cannot fetch resnet18.a1_in1k from the hub \(cannot connect\)') as caught:
        checkpoint.fetch_from_timm('resnet18.a1_in1k')
    assert '\n' not in str(caught.value)


def test_models_py_alone_builds_and_trains_a_twistnet(tmp_path):
    shutil.copy(models.__file__, tmp_path)
    program = (
        'import torch; from models import TwistNet; torch.manual_seed(0)\n'
        'model = TwistNet(num_classes=3, base_width=8)\n'
        'x, y = torch.randn(6, 3, 32, 32), torch.arange(6) % 3; optimizer = torch.optim.SGD(model.parameters(), 0.1)\n'
        'losses = []\n'
        'for _ in range(20):\n'
        '    loss = torch.nn.functional.cross_entropy(model(x), y)\n'
        '    optimizer.zero_grad(); loss.backward(); optimizer.step(); losses.append(loss.item())\n'
        'assert losses[-1] < losses[0] / 2, losses'
    )
    subprocess.run([sys.executable, '-c', program], cwd=tmp_path, check=True, env=os.environ | dict(PYTHONPATH=''))


def test_the_gate_starts_as_the_registry_says():
    assert models.GATE_INIT == registry.GATE_INIT
