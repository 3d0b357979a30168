"""A table of the complete runs in a folder.

    python summarize_runs.py --run_dir runs/demo

One row a run: nothing is averaged. Runs that are not complete are named on stderr.
"""

import argparse
import sys
from pathlib import Path

import runs
from runs import RunError

COLUMNS = ('data set', 'fold', 'model', 'seed', 'test %', 'val %', 'epoch', 'params M', 'minutes')


def load_results(run_dir: Path) -> tuple[list[dict], list[str]]:
    """The results of the complete runs in run_dir, and the names of the other run folders."""
    results, incomplete = [], []
    for folder in runs.find_runs(run_dir):
        result = runs.read_json(folder / 'results.json')
        if result is None:
            incomplete.append(folder.name)
        else:
            results.append(result)
    return results, incomplete


def table(results: list[dict]) -> list[tuple[str, ...]]:
    """Rows of text, the header first; ordered by data set, fold, model and seed."""
    ordered = sorted(results, key=lambda r: (r['dataset'], r['fold'], r['model'], r['seed']))
    return [COLUMNS] + [
        (
            r['dataset'],
            str(r['fold']),
            r['model'],
            str(r['seed']),
            f'{r["test_acc"]:.2f}',
            f'{r["best_val_acc"]:.2f}',
            str(r['best_epoch']),
            f'{r["params_M"]:.2f}',
            f'{r["seconds"] / 60:.1f}',
        )
        for r in ordered
    ]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='A table of the complete runs in a folder.')
    parser.add_argument('--run_dir', type=Path, default=Path('runs'))
    return parser


def main(args: argparse.Namespace) -> None:
    results, incomplete = load_results(args.run_dir)
    if not results:
        raise RunError(f'{args.run_dir}: none of its {len(incomplete)} runs is complete')
    try:
        rows = table(results)
    except KeyError as error:
        raise RunError(
            f'{args.run_dir}: a results.json has no {error}; train.py --force makes that run again'
        ) from error
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        # Names to the left, numbers to the right.
        cells = [c.ljust(w) if i in (0, 2) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        print('  '.join(cells).rstrip())
    for name in incomplete:
        print(f'not complete: {name}', file=sys.stderr)


if __name__ == '__main__':
    try:
        main(get_args_parser().parse_args())
    except RunError as error:
        sys.exit(f'summarize_runs.py: error: {error}')
