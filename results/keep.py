"""Copy the complete runs of a folder into results/, without their weights: what tables need, and how far AIS selects.

    python -m results.keep runs/flowers results/flowers

Of test_predictions.csv one bit an image is kept, right or wrong, in the order of the test images (right.txt). Of a
model with AIS best.pt runs over the test images once more, and selection.json has, for each block, the mean of the
weights, their spread over the images (the standard deviation of a channel over images, mean over channels), over the
channels (that of the channels' means) and over the classes (that of a channel's class means, mean over channels). Of a
ResNet-18 trunk scales.json has, for each block of best.pt, the root mean square of the last BatchNorm's weights,
which scale the residual that the block adds. Runs that are kept already are left alone.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from timm.models import resnet
from torch import nn

from common import runs
from common.distributed import say
from common.errors import user_errors
from common.predictions import read_predictions
from interpret.class_views import class_means, survey_subset
from models import BasicBlock, blocks_of
from training import trained

RIGHT = 'right.txt'
SELECTION = 'selection.json'
SCALES = 'scales.json'
TRUNKS = BasicBlock, resnet.BasicBlock  # of TwistNet-18, and of timm's ResNet-18


def spreads(weights: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean and spreads of AIS's weights of a block, (n, heads, channels a head); labels: (n,) class indices."""
    weights = weights.reshape(len(weights), -1).astype(np.float64)
    found = dict(mean=weights.mean(), low=weights.min(), high=weights.max())
    found |= dict(
        over_images=weights.std(0, ddof=1).mean(),
        over_classes=class_means(weights, labels).std(0, ddof=1).mean(),
        over_channels=weights.mean(0).std(ddof=1),
    )
    return {key: round(float(value), 6) for key, value in found.items()}


def selection_of(model: trained.TrainedModel) -> dict[str, dict[str, float]]:
    """The spreads of every block with AIS, over the test images of the run; {} without AIS."""
    own = argparse.Namespace(dataset=None, data_dir=None, lists=None, fold=None, other_images=False, subset='test')
    survey = survey_subset(model, own)
    return {name: spreads(weights, survey.labels) for name, weights in survey.selection.items()}


def scales_of(model: nn.Module) -> dict[str, float]:
    """Root mean square of the last BatchNorm's weights of every trunk block, e.g. {'layer1.0': 0.91, ..}."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, TRUNKS)}
    return {name: round(block.bn2.weight.square().mean().sqrt().item(), 6) for name, block in blocks.items()}


def keep(run: Path, to: Path) -> None:
    """Copy a complete run; results.json comes last, so that what is kept is whole."""
    to.mkdir(parents=True, exist_ok=True)
    found = read_predictions(run / runs.PREDICTIONS)
    right = found.predicted == found.labels
    runs.write_atomic(to / RIGHT, (''.join(map(str, right.astype(int))) + '\n').encode())
    model = trained.load(run / 'best.pt')
    if blocks_of(model.model) and (selection := selection_of(model)):
        runs.write_json(to / SELECTION, selection)
    if scales := scales_of(model.model):
        runs.write_json(to / SCALES, scales)
    for name in ('config.json', 'log.jsonl', 'results.json'):
        shutil.copyfile(run / name, to / name)


def main(args: argparse.Namespace) -> None:
    for run in runs.find_runs(args.source):
        to = args.target / run.name
        if not (run / 'results.json').exists():
            say(f'not complete: {run}')
        elif not (to / 'results.json').exists():
            keep(run, to)
            print(to)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Copy complete runs without their weights.')
    parser.add_argument('source', type=Path, help='a folder of runs')
    parser.add_argument('target', type=Path, help='where they are kept')
    return parser


if __name__ == '__main__':
    with user_errors('results/keep.py'):
        main(get_args_parser().parse_args())
