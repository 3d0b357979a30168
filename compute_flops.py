"""Parameters and multiply-accumulates of the models.

    python compute_flops.py                      # all models, as text
    python compute_flops.py --model twistnet18   # one model
    python compute_flops.py --latex > table.tex  # a table for a paper; also --csv
    python compute_flops.py --speed --model resnet18,twistnet18     # how fast they are on this machine

What is counted are multiply-accumulates (MACs), by fvcore: convolutions, matrix products and attention, and of the
element-wise work norms, pooling and resizing alone (at most 2 %). The field calls them FLOPs, and so do the tables.
"""

import argparse
import csv
import math
import sys
import warnings

import torch
from torch import nn

import options
from models import MODELS, ModelError, build_model, count_params
from registry import size_problem
from runs import user_errors

BASELINE = 'resnet18'
SPEED_DEFAULTS = dict(batch_size=32, rounds=10, device='auto', amp='auto', compile=False)
# Lowest and highest value of the options; both are allowed.
BOUNDS = dict(img_size=options.BOUNDS['img_size'], num_classes=(1, 1_000_000), batch_size=(2, 65_536), rounds=(1, 1000))
# Operators that the count leaves out, as met in timm's models: element-wise, reductions, and moves of values.
ELEMENTWISE = {
    'add', 'add_', 'addcmul', 'amax', 'avg_pool2d', 'ceil', 'clamp_min', 'cos', 'cumsum', 'div', 'div_', 'exp',
    'expand_as', 'gelu', 'hardsigmoid', 'hardswish', 'hardswish_', 'hardtanh', 'index_select',
    'linalg_vector_norm', 'max_pool2d', 'mean', 'mul', 'mul_', 'neg', 'pad', 'pow', 'repeat', 'repeat_interleave',
    'reshape_as', 'rsqrt', 'rsub', 'sigmoid', 'silu', 'silu_', 'sin', 'softmax', 'square', 'sub', 'sum', 'tanh',
    'unflatten',
}  # fmt: skip
NO_FVCORE = 'note: fvcore is not installed, so MACs are not counted; pip install fvcore'


def attention_macs(inputs: list, outputs: list) -> int:
    """MACs of scaled_dot_product_attention: both matrix products, as of attention that is written out."""
    (*batch, queries, width), (*_, keys, _), (*_, out_width) = (value.type().sizes() for value in inputs[:3])
    return math.prod(batch) * queries * keys * (width + out_width)


def count_macs(model: nn.Module, img_size: int = 224) -> int | None:
    """Multiply-accumulates of one (3, img_size, img_size) image in evaluation mode; None where fvcore is missing.

    Raises:
        ModelError: an operator is neither counted nor known as element-wise.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', FutureWarning)  # fvcore scripts a function when it is imported
            from fvcore.nn import FlopCountAnalysis
    except ImportError:
        return None
    device = next(model.parameters()).device
    analysis = FlopCountAnalysis(model.eval(), torch.zeros(1, 3, img_size, img_size, device=device))
    analysis.set_op_handle('aten::scaled_dot_product_attention', attention_macs)
    with torch.no_grad():  # else older torch shows the operators of checkpointing
        macs = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()
    unknown = sorted({name.removeprefix('aten::') for name in analysis.unsupported_ops()} - ELEMENTWISE)
    if unknown:
        raise ModelError(
            f'MACs cannot be counted, for {", ".join(unknown)} may have some; what has none belongs into '
            'compute_flops.ELEMENTWISE'
        )
    return macs


def measure(name: str, num_classes: int, img_size: int) -> dict:
    """A row of the table: name, label, venue, parameters in M and MACs in G (None where fvcore is missing).

    Raises:
        ModelError: as build_model and count_macs.
    """
    model = build_model(name, num_classes, img_size=img_size)
    entry = MODELS[name]
    try:
        macs = count_macs(model, img_size)
    except ModelError as error:
        raise ModelError(f'{name}: {error}') from error
    return dict(
        model=name,
        label=entry['label'],
        venue=entry.get('venue') or '',
        params_M=count_params(model) / 1e6,
        macs_G=None if macs is None else macs / 1e9,
    )


def overhead(row: dict, base: dict, key: str) -> str:
    """Difference to the baseline in percent, '' for the baseline itself and where it is not known."""
    known = row['model'] != base['model'] and None not in (row[key], base[key])
    return f'{100 * (row[key] / base[key] - 1):+.1f} %' if known else ''


def giga(macs: float | None, none: str, unit: str = '') -> str:
    return none if macs is None else f'{macs:.2f}{unit}'


def print_text(rows: list[dict], base: dict) -> None:
    print(f'{"model":26}{"name":22}{"params":>9}{"FLOPs":>9}{"params":>11}{"FLOPs":>10}')
    for row in rows:
        more_params, more_macs = overhead(row, base, 'params_M'), overhead(row, base, 'macs_G')
        size = f'{row["params_M"]:8.2f}M{giga(row["macs_G"], "-", "G"):>9}'
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
        cells = [row['label'], row['venue'] or '--', f'{row["params_M"]:.2f}', giga(row['macs_G'], '--')]
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
    add_speed_args(parser)
    return parser


def add_speed_args(parser: argparse.ArgumentParser) -> None:
    """Suppressed defaults, which SPEED_DEFAULTS has, so that an option that says nothing without --speed is seen."""
    group = parser.add_argument_group('speed', f'Measured instead, of the models in turn and always of {BASELINE} too.')
    group.add_argument('--speed', action='store_true', help='images a second in training and inference, and memory')
    helps = dict(
        batch_size='images in a training step and in an inference pass',
        rounds='measurements of every model, after one that does not count; medians are shown',
        device='auto, cpu, cuda, cuda:1, ..',
        amp='auto: bf16 where it is native',
        compile='torch.compile, which takes minutes',
    )
    kinds = dict(
        batch_size=dict(type=int),
        rounds=dict(type=int),
        amp=dict(choices=options.AMP),
        compile=dict(action='store_true'),
    )
    for name, default in SPEED_DEFAULTS.items():
        text = f'{helps[name]} (default: {default})'
        group.add_argument(f'--{name}', default=argparse.SUPPRESS, help=text, **kinds.get(name, {}))


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured.

    Raises:
        ModelError: with the option and its bounds.
    """
    lost = [name for name in SPEED_DEFAULTS if hasattr(args, name)]
    if lost and not args.speed:
        raise ModelError(f'--{lost[0]} needs --speed')
    for name, (low, high) in BOUNDS.items():
        if not low <= getattr(args, name, low) <= high:
            raise ModelError(f'--{name} {getattr(args, name)} must be from {low} to {high}')


def choose(models: str | None, img_size: int) -> list[str]:
    """The models to measure: those asked for, or all that can have this image size; the others are said on stderr.

    Raises:
        ModelError: one that is asked for cannot have it.
    """
    names = list(MODELS) if models is None else models.split(',')
    problems = [problem for name in names if name in MODELS and (problem := size_problem(name, img_size))]
    if problems and models is not None:
        raise ModelError(problems[0])
    for problem in problems:
        print(f'note: left out: {problem}', file=sys.stderr)
    return [name for name in names if name not in MODELS or not size_problem(name, img_size)]


def main(args: argparse.Namespace) -> None:
    check(args)
    names = choose(args.model, args.img_size)
    if args.speed:
        import speed  # only here: it imports train, which imports this file

        speed.main(names, argparse.Namespace(**SPEED_DEFAULTS | vars(args)))
        return
    rows = [measure(name, args.num_classes, args.img_size) for name in names]
    base = next((row for row in rows if row['model'] == BASELINE), None)
    base = base or measure(BASELINE, args.num_classes, args.img_size)
    if base['macs_G'] is None:
        print(NO_FVCORE, file=sys.stderr)
    if args.csv:
        print_csv(rows)
    elif args.latex:
        print_latex(rows, base)
    else:
        print_text(rows, base)


if __name__ == '__main__':
    try:
        with user_errors('compute_flops.py'):
            main(get_args_parser().parse_args())
    except ModelError as error:
        sys.exit(f'compute_flops.py: error: {error}')
