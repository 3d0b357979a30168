"""Every complete run of a folder, by fold and seed: test accuracy in % at the chosen epoch, and after the last.

python -m results.folds results/scratch
"""

import argparse
from pathlib import Path

from common import runs, tables
from common.errors import RunError, user_errors


def cells_of(folder: Path) -> dict[tuple[int, int], dict[str, str]]:
    """'test (validation), test after the last epoch' in % of the complete runs, by (fold, seed), then by model.

    Raises:
        RunError: a folder without complete runs, or a damaged file.
    """
    cells = {}
    for run in runs.find_runs(folder):
        if (results := runs.read_json(run / 'results.json')) is not None:
            text = '{test_acc:.1f} ({best_val_acc:.1f}), {test_acc_last:.1f}'.format(**results)
            cells.setdefault((results['fold'], results['seed']), {})[results['model']] = text
    if not cells:
        raise RunError(f'{folder}: no complete run')
    return dict(sorted(cells.items()))


def main(args: argparse.Namespace) -> None:
    cells = cells_of(args.folder)
    models = sorted({model for row in cells.values() for model in row}, key=len)  # variants have longer names
    lines = [
        [str(fold), str(seed), *(row.get(model, 'not made') for model in models)] for (fold, seed), row in cells.items()
    ]
    tables.print_text('rr' + 'r' * len(models), ['fold', 'seed', *models], lines)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Test accuracies of every run, by fold and seed.')
    parser.add_argument('folder', type=Path, help='a folder of runs')
    return parser


if __name__ == '__main__':
    with user_errors('results/folds.py'):
        main(get_args_parser().parse_args())
