"""Every complete run of a folder, by data set, fold and seed.

    python -m results.folds results/scratch

A cell is the test accuracy in % at the chosen epoch, in brackets the validation accuracy that chose it, then the test
accuracy after the last epoch. Runs without epochs, which are probes, are left out, with a note.
"""

import argparse
import sys
from pathlib import Path

from common import runs, tables
from common.errors import RunError, user_errors
from common.registry import dataset_label


def cells_of(folder: Path) -> dict[tuple[str, int, int], dict[str, str]]:
    """The cells of the complete runs by (data set, fold, seed), then by model.

    Raises:
        RunError: a folder without complete runs, or a damaged file.
    """
    cells = {}
    for run in runs.find_runs(folder):
        if (results := runs.read_json(run / 'results.json')) is None:
            continue
        if 'test_acc_last' not in results:
            print(f'left out: {run}: has no epochs', file=sys.stderr)
            continue
        row = cells.setdefault((results['dataset'], results['fold'], results['seed']), {})
        row[results['model']] = '{test_acc:.1f} ({best_val_acc:.1f}), {test_acc_last:.1f}'.format(**results)
    if not cells:
        raise RunError(f'{folder}: no complete run of epochs')
    return dict(sorted(cells.items()))


def main(args: argparse.Namespace) -> None:
    cells = cells_of(args.folder)
    models = sorted({model for row in cells.values() for model in row}, key=len)  # variants have longer names
    lines = [
        [dataset_label(dataset, {}), str(fold), str(seed), *(row.get(model, 'not made') for model in models)]
        for (dataset, fold, seed), row in cells.items()
    ]
    tables.print_text('l' + 'r' * (2 + len(models)), ['Data', 'fold', 'seed', *models], lines)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Test accuracies of every run, by fold and seed.')
    parser.add_argument('folder', type=Path, help='a folder of runs')
    return parser


if __name__ == '__main__':
    with user_errors('results/folds.py'):
        main(get_args_parser().parse_args())
