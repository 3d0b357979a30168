"""The promises of common/insertion.py: any model of timm by its name, and STCI in any CNN of it."""

import copy
import math
import pickle

import pytest
import timm
import torch
from torch import nn

from common import registry
from common.errors import ModelError
from common.insertion import Gated, attach
from compute_flops import count_macs
from models import AIS, STCI, blocks_of, build_model, gates_of
from training.engine import convert_sync_batchnorm

FAMILIES = (
    'resnet10t',
    'tf_efficientnet_lite0',
    'mobilenetv3_small_050',
    'mobilenetv4_conv_small_035',
    'convnext_atto',
    'regnetx_002',
    'repvit_m0_9',
    'fastvit_t8',
    'ghostnet_050',
    'edgenext_xx_small',
    'densenet121',
    'efficientvit_b0',
    'dla46_c',
)
SMALL = 'mobilenetv3_small_050'


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    torch.manual_seed(0)


def close_gates(model: nn.Module) -> None:
    for block in blocks_of(model).values():
        nn.init.constant_(block.gate, -math.inf)


@pytest.mark.parametrize('name', FAMILIES)
def test_with_the_gate_closed_the_logits_are_the_plain_models(name):
    plain = timm.create_model(name, num_classes=5)
    model = build_model(f'stci_{name}', 5, img_size=64)
    loaded = model.load_state_dict(plain.state_dict(), strict=False)
    assert loaded.unexpected_keys == []
    assert all(key.startswith('stci.') for key in loaded.missing_keys), 'its weights load as they are'
    assert list(blocks_of(model)) == ['stci.stage3', 'stci.stage4']
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted, opened = plain.eval()(x), model.eval()(x)
        assert not torch.allclose(opened, wanted, atol=1e-6), 'the branch is at work'
        close_gates(model)
        assert torch.equal(model(x), wanted)


def test_the_branch_is_that_of_twistnet():
    model = build_model('stci_resnet18', 5, img_size=64)
    assert gates_of(model) == pytest.approx({'stci.stage3': 0.119203, 'stci.stage4': 0.119203}, abs=1e-6)
    ours, twist = model.stci['stage3'].stci, build_model('twistnet18').layer3[0].stci
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in twist.state_dict().items()}
    assert torch.equal(ours.twist.dwconv.weight, twist.twist.dwconv.weight), 'the directions survive'
    assert ours.proj[0].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert all(block.stage == f'layer{name[-1]}' for name, block in model.stci.items())


def test_variants_have_the_keywords_of_twistnets():
    def branch(words: str) -> STCI:
        return build_model(f'stci_{words}_{SMALL}', 5, img_size=64).stci['stage3'].stci

    assert isinstance(branch('no_spiral').twist, nn.Identity)
    assert not isinstance(branch('no_ais').ais, AIS)
    assert not branch('no_products').use_products
    assert branch('heads2').num_heads == 2
    assert list(build_model(f'stci_stage4_{SMALL}', 5, img_size=64).stci) == ['stage4']
    assert gates_of(build_model(f'stci_gate_0_{SMALL}', 5, img_size=64))['stci.stage4'] == 0.5


def test_gradients_reach_every_parameter():
    model = build_model(f'stci_{SMALL}', 5, img_size=64).train()
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(
        p.grad.abs().sum() > 0 for block in blocks_of(model).values() for p in (block.gate, block.stci.proj[0].weight)
    )


def test_a_copy_has_its_own_branch():
    model = build_model(f'stci_{SMALL}', 5, img_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)
        for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(one(x), wanted)
            close_gates(one)
            assert not torch.equal(one(x), wanted), 'the gates of the copy count for the copy'
            assert torch.equal(model(x), wanted), 'and for it alone'


def test_features_pass_the_branch():
    model = build_model(f'stci_{SMALL}', 5, img_size=64).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model.forward_intermediates(x, intermediates_only=True)
        close_gates(model)
        after = model.forward_intermediates(x, intermediates_only=True)
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [True, True, True, False, False]


@pytest.mark.slow
def test_compiled_it_computes_the_same():
    model = build_model(f'stci_{SMALL}', 5, img_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)
        assert torch.allclose(torch.compile(model, backend='eager')(x), wanted, atol=1e-5)


def test_a_stage_that_was_replaced_gets_its_hook_back():
    model = build_model('stci_densenet121', 5, img_size=64)  # whose last stage ends in the BatchNorm that is replaced
    hooks = len(model.features.norm5._forward_hooks)
    model = convert_sync_batchnorm(model)
    attach(model)
    assert len(model.features.norm5._forward_hooks) == hooks == 1
    attach(model)
    assert len(model.features.norm5._forward_hooks) == 1


def test_a_variant_whose_name_extends_another_is_itself(monkeypatch):
    variants, neither = registry.STCI_VARIANTS, dict(use_ais=False, use_spiral=False)
    monkeypatch.setitem(variants, 'no_ais_no_spiral', dict(label='w/o AIS and Spiral', twist=neither))
    found = registry.entry_of('stci_no_ais_no_spiral_resnet50')
    assert (found['base'], found['stci']) == ('resnet50', neither)
    assert registry.entry_of('stci_no_ais_resnet50')['stci'] == variants['no_ais']['twist']


def test_the_macs_of_the_branch_are_counted():
    plain, model = (count_macs(build_model(name, 5, img_size=64), 64) for name in ('resnet18', 'stci_resnet18'))
    by_hand = 0
    for channels, cells in ((256, 16), (512, 4)):  # reduce, twist, projection, and AIS
        by_hand += cells * (32 * channels + 9 * 32 + 176 * channels) + 2 * 176 * 44
    assert model - plain == pytest.approx(by_hand, rel=0.04), 'and the norms'


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('crossvit_9_240', 'cannot take an image of 97 x 97 pixels'),
        ('stci_vit_tiny_patch16_224', 'STCI needs features that are maps'),
        ('stci_swin_tiny', 'STCI needs features that are maps'),
        ('stci_hrnet_w18_small', 'STCI needs features that are maps'),
        ('stci_twistnet18', 'twistnet18 has STCI already'),
        ('stci_stci_resnet18', 'stci_resnet18 has STCI already'),
        ('stci_first_order_resnet18', "unknown model 'first_order_resnet18'"),
        ('stci_', "unknown model ''"),
        ('resnet5O', "unknown model 'resnet5O'; near to it: .*resnet50"),
        ('resnet50.a9', "has no weights 'resnet50.a9'; its tags are: a1_in1k, "),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(name, words):
    with pytest.raises(ModelError, match=words) as caught:
        build_model(name, 5, img_size=97 if 'crossvit' in name else None)
    assert '\n' not in str(caught.value)


def test_a_transformer_is_built_for_its_size():
    model = build_model('vit_tiny_patch16_224', 5, img_size=64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    assert gates_of(model) == {}


@pytest.mark.slow
def test_a_new_classifier_on_loaded_weights_starts_at_zero(tmp_path):
    plain = timm.create_model(SMALL, num_classes=7)
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    for name in (SMALL, f'stci_{SMALL}'):
        model = build_model(name, 5, tmp_path / 'plain.pth', img_size=64)
        assert all(not p.any() for p in model.classifier.parameters())
        assert torch.equal(model.conv_stem.weight, plain.conv_stem.weight)
        assert model.pretrained.endswith('; at zero: classifier')
        same = build_model(name, 7, tmp_path / 'plain.pth', img_size=64)
        assert torch.equal(same.classifier.weight, plain.classifier.weight), 'a classifier that fits is loaded'
        assert build_model(name, 5, img_size=64).classifier.weight.any(), 'from scratch it starts as in timm'
    resnet = build_model('resnet18', 7)
    torch.save(resnet.state_dict(), tmp_path / 'resnet.pt')
    for name in ('resnet18', 'stci_resnet18'):
        assert build_model(name, 5, tmp_path / 'resnet.pt').fc.weight.any(), 'of the registry: as ever'


def test_weights_of_variants(tmp_path, capsys):
    full = build_model(f'stci_{SMALL}', 5, img_size=64)
    nn.init.constant_(full.stci['stage3'].gate, 3.0)
    torch.save(dict(model=f'stci_{SMALL}', state_dict=full.state_dict()), tmp_path / 'full.pt')
    again = build_model(f'stci_{SMALL}', 5, tmp_path / 'full.pt', img_size=64)
    assert again.loaded == 1
    assert gates_of(again)['stci.stage3'] == pytest.approx(0.952574)
    gate = build_model(f'stci_gate_0_{SMALL}', 5, tmp_path / 'full.pt', img_size=64)
    assert gates_of(gate) == {'stci.stage3': 0.5, 'stci.stage4': 0.5}, 'a variant keeps what makes it one'
    assert torch.equal(gate.stci['stage3'].stci.proj[0].weight, full.stci['stage3'].stci.proj[0].weight)
    assert f'(weights of stci_{SMALL}), without its gate' in gate.pretrained
    heads = build_model(f'stci_heads2_{SMALL}', 5, tmp_path / 'full.pt', img_size=64)
    assert 0.8 < heads.loaded < 1, 'what fits'
    assert 'not used: stci' in build_model(SMALL, 5, tmp_path / 'full.pt', img_size=64).pretrained


def test_a_gated_branch_adds_its_share():
    block = Gated(STCI(16), 0.0, 'stage').eval()
    x = torch.randn(2, 16, 4, 4)
    with torch.no_grad():
        assert torch.allclose(block(x), x + 0.5 * block.stci(x), atol=1e-6)
