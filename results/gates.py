"""Where the gates end: how far training has moved the gates of STCI branches, over the complete runs of each folder.

    python -m results.gates results/insertion results/pilot_gates

The move is that of the gate's logit, which is what training changes, from the model's own start: -2, where
sigmoid(gate) is 0.119, or that of a gate_ variant. Runs whose weights may have brought other gates are left out, with a
note.
"""

import argparse
import math
import sys
from collections import defaultdict
from pathlib import Path

from common import runs, tables
from common.errors import RunError, user_errors
from common.registry import dataset_label, model_label
from common.results import initial_gate


def last_gates(folder: Path) -> dict[tuple, list[list[float]]]:
    """sigmoid(gate) of every block after the last epoch of each complete run.

    Returns:
        a list a run, by (data set, model, lr, gate_lr, epochs, sigmoid(gate) before training).

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
        pretrained = config['defines'].get('pretrained') is not None
        gates, model = epochs[-1]['gates'], config['defines']['model']
        if (start := initial_gate(model, gates, pretrained, results.get('pretrained'))) is None:
            print(f'left out: {run}: its weights may have brought gates of their own', file=sys.stderr)
            continue
        options = {'gate_lr': 1.0} | config['options']
        key = *(options[name] for name in ('dataset', 'model', 'lr', 'gate_lr', 'epochs')), start
        ends[key].append([*gates.values()])
    if not ends:
        raise RunError(f'{folder}: no complete run has gates, or none whose start is known')
    return ends


def logit(probability: float) -> float:
    return (
        math.log(probability / (1 - probability)) if 0 < probability < 1 else math.copysign(math.inf, probability - 0.5)
    )


def main(args: argparse.Namespace) -> None:
    lines = []
    for key, found in (item for top in args.folders for item in last_gates(top).items()):
        dataset, model, *settings, start = key
        values = [value for gates in found for value in gates]
        largest = max((logit(value) - logit(start) for value in values), key=abs)
        names = [dataset_label(dataset, {}), model_label(model), *(f'{setting:g}' for setting in settings)]
        lines.append([*names, str(len(found)), f'{min(values):.4f} to {max(values):.4f}', f'{largest:+.4f}'])
    head = ['Data', 'Model', 'lr', 'gate_lr', 'epochs', 'runs', 'sigmoid(gate)', 'largest move']
    tables.print_text('llrrrrrr', head, lines)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='How far training has moved the gates of STCI branches.')
    parser.add_argument('folders', nargs='+', type=Path, help='folders of runs')
    return parser


if __name__ == '__main__':
    with user_errors('results/gates.py'):
        main(get_args_parser().parse_args())
