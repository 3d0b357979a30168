"""The promises of compute_flops.py: the three commands, and nothing but the table on stdout."""

import csv
import functools
import io

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import compute_flops
from common.errors import ModelError, UserError


def output(*arguments: str, capsys) -> str:
    compute_flops.main(compute_flops.get_args_parser().parse_args(arguments))
    return capsys.readouterr().out


def test_the_three_tables(monkeypatch, capsys):
    monkeypatch.setattr(compute_flops, 'measure', functools.cache(compute_flops.measure))
    lines = output('--model', 'twistnet18', capsys=capsys).splitlines()
    assert lines[1].split() == ['twistnet18', 'TwistNet-18', '11.59M', '1.85G', '+3.5', '%', '+1.8', '%']
    rows = list(csv.DictReader(io.StringIO(output('--model', 'resnet18,twistnet18', '--csv', capsys=capsys))))
    assert [row['model'] for row in rows] == ['resnet18', 'twistnet18']
    assert float(rows[1]['params_M']) == pytest.approx(11.588963)
    assert float(rows[0]['macs_G']) == pytest.approx(1.8186, abs=5e-5)
    text = output('--model', 'resnet18,twistnet18', '--latex', capsys=capsys)
    lines = text.splitlines()
    assert (lines[0][:15], lines[-1]) == (r'\begin{tabular}', r'\end{tabular}')
    assert len({line.count('&') for line in lines if '&' in line}) == 1
    assert r'TwistNet-18 & -- & 11.59 & 1.85 & +3.5\,\% & +1.8\,\% \\' in lines
    assert '%' not in text.replace(r'\%', '')


# ------------------------------------------------------------------------------------------ what is counted


class Attention(nn.Module):
    """Two heads of width 4 that read 3 values at each of 5 positions; fused or written out."""

    def __init__(self, fused: bool):
        super().__init__()
        self.fused, self.embed = fused, nn.Linear(32, 2 * 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.embed(x[:, 0, :6]).view(1, 6, 2, 4).transpose(1, 2)
        k, v = q[:, :, :5], q[:, :, :5, :3]
        if self.fused:
            return nn.functional.scaled_dot_product_attention(q, k, v)
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def test_fused_attention_counts_as_if_it_were_written_out():
    linear, products = 6 * 32 * 8, 2 * 6 * 5 * (4 + 3)
    assert [compute_flops.count_macs(Attention(fused), 32) for fused in (False, True)] == [linear + products] * 2


def test_the_count_does_not_depend_on_timms_environment():
    swin = dict(img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(1,), num_heads=(2,))
    vit = dict(img_size=32, embed_dim=8, depth=1, num_heads=2)
    for make in (lambda: SwinTransformer(**swin), lambda: VisionTransformer(**vit)):
        counts = set()
        try:
            for level in (0, 1, 2):  # of TIMM_FUSED_ATTN
                timm.layers.set_fused_attn(level > 0, experimental=level > 1)
                counts.add(compute_flops.count_macs(make(), 32))
        finally:
            timm.layers.set_fused_attn(True)
        assert len(counts) == 1


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2


@pytest.mark.parametrize(('function', 'name'), [(torch.fft.fft2, 'fft_fft2'), (Own.apply, r'prim::PythonOp\.Own')])
def test_an_operator_that_nobody_knows_is_an_error_and_not_nothing(function, name, monkeypatch):
    class Model(nn.Conv2d):
        def forward(self, x):
            return function(super().forward(x))

    monkeypatch.setattr(compute_flops, 'build_model', lambda *_, **__: Model(3, 4, 1))
    with pytest.raises(ModelError, match=rf'^twistnet18: MACs cannot be counted: {name} may have some; '):
        compute_flops.measure('twistnet18', 47, 32)


# ------------------------------------------------------------------------------------------ what may be missing


def test_without_fvcore_the_tables_have_no_macs_and_a_note_says_so(no_fvcore, monkeypatch, capsys):
    monkeypatch.setattr(compute_flops, 'measure', functools.cache(compute_flops.measure))
    compute_flops.main(compute_flops.get_args_parser().parse_args(['--model', 'twistnet18']))
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split() == ['twistnet18', 'TwistNet-18', '11.59M', '-', '+3.5', '%']
    assert err == f'{compute_flops.NO_FVCORE}\n'
    assert output('--model', 'resnet18', '--csv', capsys=capsys).endswith(',\n')
    assert r'ResNet-18 & CVPR 2016 & 11.20 & -- & -- & -- \\' in output('--model', 'resnet18', '--latex', capsys=capsys)


def test_models_that_cannot_have_the_image_size_are_left_out_or_refused(monkeypatch, capsys):
    monkeypatch.setattr(compute_flops, 'MODELS', dict.fromkeys(('resnet18', 'efficientformerv2_s2', 'swin_tiny')))
    assert compute_flops.choose(None, 96) == compute_flops.choose(None, None) == list(compute_flops.MODELS)
    assert compute_flops.choose(None, 100) == ['resnet18']
    assert [line.split(': ', 2)[:2] for line in capsys.readouterr().err.splitlines()] == [['note', 'left out']] * 2


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('--model resnet19', "unknown model 'resnet19'"),
        ('--model resnet18,swin_tiny --img_size 100', '--img_size 100 must be a multiple of 32 for swin_tiny'),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(UserError, match=f'^{message}'):
        output(*arguments.split(), capsys=capsys)
    assert capsys.readouterr().out == ''
