"""Figures of runs.

    python plot_results.py --run_dir runs/demo --save_dir figures --plot curves

Every figure is written as PDF and as PNG; their paths are printed.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use('agg')
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

import runs
from runs import RunError

# Okabe and Ito's palette, which the colour-blind tell apart; with the dashes, lines differ in grey print too.
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
DASHES = ('-', '--', ':', '-.')


def plot_curves(run_dir: Path) -> Figure:
    """Training loss and validation accuracy by epoch, a line a run; complete or not.

    Raises:
        RunError: no run in run_dir has finished an epoch.
    """
    logs = {
        folder.name: runs.read_log(folder / 'log.jsonl')
        for folder in runs.find_runs(run_dir)
        if (folder / 'log.jsonl').exists()
    }
    if not logs:
        raise RunError(f'{run_dir}: no run has finished an epoch yet')
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), layout='constrained')
    for name, log in logs.items():
        if not all({'epoch', 'train_loss', 'val_acc'} <= line.keys() for line in log):
            raise RunError(f'{run_dir / name / "log.jsonl"}: a line lacks epoch, train_loss or val_acc')
    for index, (name, log) in enumerate(logs.items()):
        style = dict(
            color=COLORS[index % len(COLORS)], linestyle=DASHES[index % len(DASHES)], linewidth=1.5, label=name
        )
        epochs = [line['epoch'] for line in log]
        left.plot(epochs, [line['train_loss'] for line in log], **style)
        right.plot(epochs, [line['val_acc'] for line in log], **style)
    left.set(xlabel='epoch', ylabel='training loss', ylim=(0, None))
    right.set(xlabel='epoch', ylabel='validation accuracy (%)', ylim=(0, 102))
    for axes in (left, right):
        axes.spines[['top', 'right']].set_visible(False)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=2, frameon=False, fontsize=8)
    return figure


PLOTS = {'curves': plot_curves}


def save(figure: Figure, save_dir: Path, name: str) -> list[Path]:
    """Write a figure as PDF and PNG; returns their paths."""
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        paths = [save_dir / f'{name}.{suffix}' for suffix in ('pdf', 'png')]
        for path in paths:
            figure.savefig(path, dpi=200)
    except OSError as error:
        raise RunError(f'{save_dir}: cannot be written ({error.strerror})') from error
    plt.close(figure)
    return paths


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Figures of runs.')
    parser.add_argument('--run_dir', type=Path, default=Path('runs'))
    parser.add_argument('--save_dir', type=Path, default=Path('figures'))
    parser.add_argument('--plot', choices=tuple(PLOTS), default='curves')
    return parser


def main(args: argparse.Namespace) -> None:
    for path in save(PLOTS[args.plot](args.run_dir), args.save_dir, args.plot):
        print(path)


if __name__ == '__main__':
    try:
        main(get_args_parser().parse_args())
    except RunError as error:
        sys.exit(f'plot_results.py: error: {error}')
