"""Where the gates end: how far training has moved the gates of STCI branches, over the complete runs of each folder.

    python -m results.gates results/insertion results/pilot_gates

The move is that of a gate's logit, which is what training changes, from the model's own start: -2, where sigmoid(gate)
is 0.119, or that of a gate_ variant. Beside the mean move of each gate, in the order of the blocks, and the largest one
stands what weight decay alone, which pulls a logit to 0, would have moved. Runs whose weights may have brought other
gates are left out, with a note.
"""

import argparse
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from common import runs, tables
from common.errors import RunError, user_errors
from common.registry import dataset_label, model_label
from common.results import initial_gate

SETTINGS = 'lr', 'gate_lr', 'weight_decay', 'epochs'  # runs that differ in one are not pooled


class End(NamedTuple):
    """The gates of one run after its last epoch."""

    start: float  # sigmoid(gate) before training
    gates: list[float]  # of every block, the same after it
    by_decay: float  # how far weight decay alone would have moved their logits; nan where it is not known


def last_gates(folder: Path) -> dict[tuple, list[End]]:
    """The gates of the complete runs of a folder, by (data set, model, lr, gate_lr, weight_decay, epochs).

    Raises:
        RunError: a folder without runs, a damaged file, or no complete run with gates whose start is known.
    """
    ends = defaultdict(list)
    for run in runs.find_runs(folder):
        if (results := runs.read_json(run / 'results.json')) is None:
            continue
        config, epochs = runs.read_json(run / 'config.json'), runs.read_log(run / 'log.jsonl')
        if not epochs or not epochs[-1].get('gates'):
            continue
        gates = epochs[-1]['gates']
        if (start := initial_gate(config['defines']['model'], config, results)) is None:
            print(f'left out: {run}: its weights may have brought gates of their own', file=sys.stderr)
            continue
        options = {'gate_lr': 1.0} | config['options']
        key = tuple(options.get(name) for name in ('dataset', 'model', *SETTINGS))
        left = left_by_decay(logit(start), options, epochs, results['n_train'], options['gate_lr'])
        ends[key].append(End(start, [*gates.values()], left - logit(start)))
    if not ends:
        raise RunError(f'{folder}: no complete run has gates, or none whose start is known')
    return ends


def left_by_decay(value: float, options: dict, epochs: list[dict], n_train: int, factor: float = 1.0) -> float:
    """What a run's weight decay alone leaves of a parameter whose learning rate is `factor` times that of the run.

    Args:
        options: of config.json; without weight_decay, or with another optimiser than SGD, nan is returned.
    """
    if options.get('opt', 'sgd') != 'sgd' or 'weight_decay' not in options:
        return math.nan
    rates, steps = [epoch['lr'] * factor for epoch in epochs], n_train // options['batch_size']
    return decayed(value, rates, steps, options['weight_decay'], options['momentum'])


def decayed(value: float, rates: list[float], steps: int, weight_decay: float, momentum: float) -> float:
    """A parameter without a gradient after epochs of `steps` steps of SGD with Nesterov momentum at these rates."""
    velocity = 0.0
    for rate in rates:
        for _ in range(steps):
            gradient = weight_decay * value
            velocity = momentum * velocity + gradient
            value -= rate * (gradient + momentum * velocity)
    return value


def logit(probability: float) -> float:
    return (
        math.log(probability / (1 - probability)) if 0 < probability < 1 else math.copysign(math.inf, probability - 0.5)
    )


def main(args: argparse.Namespace) -> None:
    lines = []
    for (dataset, model, *settings), found in (item for top in args.folders for item in last_gates(top).items()):
        values = [value for end in found for value in end.gates]
        moves = [[logit(value) - logit(end.start) for value in end.gates] for end in found]
        by_block = ' '.join(f'{statistics.fmean(block):+.3f}' for block in zip(*moves, strict=True))
        by_decay = statistics.fmean(end.by_decay for end in found)
        names = [dataset_label(dataset, {}), model_label(model)]
        names += ['-' if setting is None else f'{setting:g}' for setting in settings]
        largest = f'{max((move for run in moves for move in run), key=abs):+.3f}'
        decay = '-' if math.isnan(by_decay) else f'{by_decay:+.3f}'
        ends = f'{min(values):.4f} to {max(values):.4f}', by_block, largest, decay
        lines.append([*names, str(len(found)), *ends])
    ends = ['sigmoid(gate)', 'mean moves', 'largest', 'by decay']
    tables.print_text('ll' + 'r' * (len(SETTINGS) + 5), ['Data', 'Model', *SETTINGS, 'runs', *ends], lines)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='How far training has moved the gates of STCI branches.')
    parser.add_argument('folders', nargs='+', type=Path, help='folders of runs')
    return parser


if __name__ == '__main__':
    with user_errors('results/gates.py'):
        main(get_args_parser().parse_args())
