"""The promises of hubconf.py: torch.hub.load gives the models of build_model, in any folder and from a local one."""

import os
import subprocess
import sys

from conftest import ROOT

import hubconf

PROGRAM = f"""
import torch
load = lambda name, **kwargs: torch.hub.load({str(ROOT)!r}, name, source='local', **kwargs)
torch.manual_seed(1)
first = load('twistnet18_no_spiral', num_classes=5)
assert first(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
assert first.default_cfg['architecture'] == 'twistnet18_no_spiral'
torch.save(first.state_dict(), 'a.pt')
again = load('twistnet18_no_spiral', num_classes=5, pretrained='a.pt')
assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
model = load('stci_resnet18', num_classes=4)
assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 4)
assert model.default_cfg['architecture'] == 'stci_resnet18'
"""


def test_the_names_are_those_of_models_with_the_branch():
    names = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith('_')}
    assert {'twistnet18', 'twistnet18_no_spiral', 'stci_resnet50', 'stci_resnet18_zero_init'} < names
    assert all(name.startswith(('twistnet18', 'stci_')) for name in names)
    assert not any(name.startswith('stci_twistnet18') for name in names)
    assert 'num_classes: outputs' in hubconf.stci_resnet18.__doc__  # of torch.hub.help


def test_models_come_from_a_local_folder(tmp_path):
    environment = os.environ | dict(PYTHONPATH='', TORCH_HOME=str(tmp_path))
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
