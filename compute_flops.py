"""Parameters and multiply-accumulates of the models.

    python compute_flops.py                      # all models, as text
    python compute_flops.py --model twistnet18   # one model
    python compute_flops.py --latex > table.tex  # a table for a paper; also --csv

What fvcore counts are multiply-accumulates (MACs), without element-wise work; the field calls them FLOPs, and so do the
tables.
"""

import argparse
import csv
import sys
import warnings

import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter('ignore', FutureWarning)  # fvcore scripts a function when it is imported
    from fvcore.nn import FlopCountAnalysis

from models import MODELS, ModelError, build_model, count_params

BASELINE = 'resnet18'


def count_macs(model: nn.Module, img_size: int = 224) -> int:
    """Multiply-accumulates of one (3, img_size, img_size) image, counted by fvcore in evaluation mode."""
    device = next(model.parameters()).device
    analysis = FlopCountAnalysis(model.eval(), torch.zeros(1, 3, img_size, img_size, device=device))
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


def measure(name: str, num_classes: int, img_size: int) -> dict:
    """A row of the table: name, label, venue, parameters in M and MACs in G."""
    model = build_model(name, num_classes, img_size=img_size)
    entry = MODELS[name]
    return dict(
        model=name,
        label=entry['label'],
        venue=entry.get('venue', ''),
        params_M=count_params(model) / 1e6,
        macs_G=count_macs(model, img_size) / 1e9,
    )


def overhead(row: dict, base: dict, key: str) -> str:
    """Difference to the baseline in percent, '' for the baseline itself."""
    return '' if row['model'] == base['model'] else f'{100 * (row[key] / base[key] - 1):+.1f} %'


def print_text(rows: list[dict], base: dict) -> None:
    print(f'{"model":26}{"name":22}{"params":>9}{"FLOPs":>9}{"params":>11}{"FLOPs":>10}')
    for row in rows:
        more_params, more_macs = overhead(row, base, 'params_M'), overhead(row, base, 'macs_G')
        size = f'{row["params_M"]:8.2f}M{row["macs_G"]:8.2f}G'
        print(f'{row["model"]:26}{row["label"]:22}{size}{more_params:>11}{more_macs:>10}')


def print_csv(rows: list[dict]) -> None:
    writer = csv.DictWriter(sys.stdout, rows[0].keys(), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)


def print_latex(rows: list[dict], base: dict) -> None:
    print(r'\begin{tabular}{llrrrr}')
    print(r'\toprule')
    print(r'Model & Venue & Params (M) & FLOPs (G) & $\Delta$ Params & $\Delta$ FLOPs \\')
    print(r'\midrule')
    for row in rows:
        cells = [row['label'], row['venue'] or '--', f'{row["params_M"]:.2f}', f'{row["macs_G"]:.2f}']
        cells += [overhead(row, base, key).replace(' %', r'\,\%') or '--' for key in ('params_M', 'macs_G')]
        print(' & '.join(cells) + r' \\')
    print(r'\bottomrule')
    print(r'\end{tabular}')


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Parameters and multiply-accumulates of the models.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--model', help='one model, or several with commas between; all if not given')
    parser.add_argument('--num_classes', type=int, default=47)
    parser.add_argument('--img_size', type=int, default=224, help='side of the square input, pixels')
    style = parser.add_mutually_exclusive_group()
    style.add_argument('--latex', action='store_true', help='a booktabs table, nothing else on stdout')
    style.add_argument('--csv', action='store_true')
    return parser


def main(args: argparse.Namespace) -> None:
    if args.img_size < 32 or args.num_classes < 1:
        raise ModelError('--img_size must be at least 32 and --num_classes at least 1')
    names = args.model.split(',') if args.model is not None else list(MODELS)
    rows = [measure(name, args.num_classes, args.img_size) for name in names]
    base = next((row for row in rows if row['model'] == BASELINE), None)
    base = base or measure(BASELINE, args.num_classes, args.img_size)
    if args.csv:
        print_csv(rows)
    elif args.latex:
        print_latex(rows, base)
    else:
        print_text(rows, base)


if __name__ == '__main__':
    try:
        main(get_args_parser().parse_args())
    except ModelError as error:
        sys.exit(f'compute_flops.py: error: {error}')
