"""Where the gates end: how far training has moved the gates of STCI branches, over the complete runs of each folder.

    python -m results.gates results/insertion results/pilot_gates

The move is that of the gate's logit, which is what training changes, from -2, where sigmoid(gate) is 0.119. Runs whose
gates start elsewhere are left out, with a note.
"""

import argparse
import math
import sys
from collections import defaultdict
from pathlib import Path

from common import runs, tables
from common.errors import RunError, user_errors
from common.registry import GATE_INIT, dataset_label, model_label
from common.results import initial_gate


def last_gates(folder: Path) -> dict[tuple, list[dict[str, float]]]:
    """sigmoid(gate) by block after the last epoch of each complete run, by (data set, model, lr, gate_lr, epochs).

    Raises:
        RunError: a folder without runs, a damaged file, or no complete run with gates.
    """
    ends = defaultdict(list)
    for run in runs.find_runs(folder):
        if (results := runs.read_json(run / 'results.json')) is None:
            continue
        config, epochs = runs.read_json(run / 'config.json'), runs.read_log(run / 'log.jsonl')
        if not epochs or not epochs[-1].get('gates'):
            continue
        pretrained = config['defines'].get('pretrained') is not None
        if initial_gate(config['defines']['model'], pretrained, results.get('pretrained')) != GATE_INIT:
            print(f'left out: {run}: its gates do not start at {GATE_INIT:g}', file=sys.stderr)
            continue
        options = {'gate_lr': 1.0} | config['options']
        key = tuple(options[name] for name in ('dataset', 'model', 'lr', 'gate_lr', 'epochs'))
        ends[key].append(epochs[-1]['gates'])
    if not ends:
        raise RunError(f'{folder}: no complete run has gates that started at {GATE_INIT:g}')
    return ends


def logit(probability: float) -> float:
    return (
        math.log(probability / (1 - probability)) if 0 < probability < 1 else math.copysign(math.inf, probability - 0.5)
    )


def main(args: argparse.Namespace) -> None:
    lines = []
    for (dataset, model, *settings), found in (item for top in args.folders for item in last_gates(top).items()):
        values = [value for gates in found for value in gates.values()]
        largest = max((logit(value) - GATE_INIT for value in values), key=abs)
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
