"""Where the gates end: how far training has moved the gates of STCI branches, over the complete runs of folders.

    python -m results.gates results/insertion results/pilot_gates

The move is that of the gate's logit, which is what training changes, from -2, where sigmoid(gate) is 0.119.
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path

from common import runs, tables
from common.errors import RunError, user_errors
from common.registry import GATE_INIT, model_label


def last_gates(folders: list[Path]) -> dict[tuple[str, float, float], list[dict[str, float]]]:
    """sigmoid(gate) by block after the last epoch of each complete run, by (model, lr, gate_lr).

    Raises:
        RunError: a folder without runs, a damaged file, or no complete run with gates.
    """
    ends = defaultdict(list)
    for folder in (folder for top in folders for folder in runs.find_runs(top)):
        if runs.read_json(folder / 'results.json') is None:
            continue
        options = runs.read_json(folder / 'config.json')['options']
        if gates := runs.read_log(folder / 'log.jsonl')[-1].get('gates'):
            ends[options['model'], options['lr'], options.get('gate_lr', 1.0)].append(gates)
    if not ends:
        raise RunError(f'{", ".join(map(str, folders))}: no complete run has gates')
    return ends


def main(args: argparse.Namespace) -> None:
    lines = []
    for (model, lr, gate_lr), found in last_gates(args.folders).items():
        values = [value for gates in found for value in gates.values()]
        moves = [math.log(value / (1 - value)) - GATE_INIT for value in values]
        largest = max(moves, key=abs)
        cells = (f'{lr:g}', f'{gate_lr:g}', len(found), len(values))
        lines.append(
            [model_label(model), *map(str, cells), f'{min(values):.4f} to {max(values):.4f}', f'{largest:+.4f}']
        )
    tables.print_text('lrrrrrr', ['Model', 'lr', 'gate_lr', 'runs', 'gates', 'sigmoid(gate)', 'largest move'], lines)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='How far training has moved the gates of STCI branches.')
    parser.add_argument('folders', nargs='+', type=Path, help='folders of runs')
    return parser


if __name__ == '__main__':
    with user_errors('results/gates.py'):
        main(get_args_parser().parse_args())
