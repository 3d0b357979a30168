"""Parameters and multiply-accumulates of the models.

    python compute_flops.py                      # all models, as text
    python compute_flops.py --model twistnet18   # one model; any of timm, and stci_NAME, too
    python compute_flops.py --latex > table.tex  # a table for a paper; also --csv

What is counted are multiply-accumulates (MACs), by fvcore: convolutions, matrix products and attention, and of the
element-wise work norms, pooling and resizing alone (at most 2 %). The field calls them FLOPs, and so do the tables.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable

import torch
from torch import nn

from common import options, tables
from common.errors import ModelError, user_errors
from common.registry import MODELS, entry_of, size_problem
from common.timm_models import SIZE, import_file, own_settings
from models import build_model, count_params

BASELINE = 'resnet18'
# Operators that the count leaves out, as met in timm's models: element-wise, reductions, and moves of values.
ELEMENTWISE = {
    'add', 'add_', 'addcmul', 'amax', 'avg_pool2d', 'ceil', 'clamp_min', 'cos', 'cumsum', 'div', 'div_', 'exp',
    'expand_as', 'gelu', 'hardsigmoid', 'hardswish', 'hardswish_', 'hardtanh', 'hardtanh_', 'index_select',
    'linalg_vector_norm', 'max_pool2d', 'mean', 'mul', 'mul_', 'neg', 'pad', 'pow', 'repeat', 'repeat_interleave',
    'reshape_as', 'rsqrt', 'rsub', 'sigmoid', 'silu', 'silu_', 'sin', 'softmax', 'square', 'sub', 'sum', 'tanh',
    'unflatten',
}  # fmt: skip
NO_FVCORE = 'note: fvcore is not installed, so MACs are not counted; pip install fvcore'


def attention_macs(inputs: list, outputs: list) -> int:
    """MACs of scaled_dot_product_attention: both matrix products, as if attention were written out."""
    (*batch, queries, width), (*_, keys, _), (*_, out_width) = (value.type().sizes() for value in inputs[:3])
    return math.prod(batch) * queries * keys * (width + out_width)


def fvcore_counter() -> type | None:
    """fvcore's FlopCountAnalysis; None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', FutureWarning)  # fvcore scripts a function when it is imported
            from fvcore.nn import FlopCountAnalysis
    except ImportError:
        return None
    return FlopCountAnalysis


def count_macs(model: nn.Module, img_size: int = 224) -> int | None:
    """Multiply-accumulates of one (3, img_size, img_size) image in evaluation mode; None if fvcore is missing.

    Raises:
        ModelError: an operator is neither counted nor known as element-wise.
    """
    if (counter := fvcore_counter()) is None:
        return None
    device = next(model.parameters()).device
    analysis = counter(model.eval(), torch.zeros(1, 3, img_size, img_size, device=device))
    analysis.set_op_handle('aten::scaled_dot_product_attention', attention_macs)
    with torch.no_grad():  # else older torch shows the operators of checkpointing
        macs = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()
    if unknown := {name.removeprefix('aten::') for name in analysis.unsupported_ops()} - ELEMENTWISE:
        raise ModelError(
            f'MACs cannot be counted: {", ".join(sorted(unknown))} may have some; add operators that have none to '
            'compute_flops.ELEMENTWISE'
        )
    return macs


def measure(name: str, num_classes: int, img_size: int) -> dict:
    """A row of the table: name, label, venue, parameters in M and MACs in G.

    The latter are None without fvcore, and for a model outside the registry that it cannot count: it is trained anyway.
    """
    model, entry = build_model(name, num_classes, img_size=img_size), entry_of(name)
    try:
        macs = count_macs(model, img_size)
    except ModelError as error:
        if name in MODELS:
            raise ModelError(f'{name}: {error}') from error
        print(f'note: {name}: {error}', file=sys.stderr)
        macs = None
    sizes = dict(params_M=count_params(model) / 1e6, macs_G=None if macs is None else macs / 1e9)
    return dict(model=name, label=entry['label'], venue=entry.get('venue') or '', **sizes)


def cells_of(row: dict, base: dict) -> list[str]:
    """Parameters, MACs, and by how many percent each exceeds the baseline's; '' for a value that is missing."""
    sizes, more = [], []
    for key in ('params_M', 'macs_G'):
        sizes.append('' if row[key] is None else f'{row[key]:.2f}')
        known = row['model'] != base['model'] and None not in (row[key], base[key])
        more.append(f'{100 * (row[key] / base[key] - 1):+.1f} %' if known else '')
    return sizes + more


def print_text(rows: list[dict], base: dict) -> None:
    cells = []
    for row in rows:
        params, macs, *more = cells_of(row, base)
        cells.append([row['model'], row['label'], f'{params}M', f'{macs}G' if macs else '-', *more])
    tables.print_text('llrrrr', ('model', 'name', 'params', 'FLOPs', 'params', 'FLOPs'), cells)


def latex_cells(row: list[str]) -> list[str]:
    """The cells of a row in LaTeX, with thin spaces before percent signs; '--' for an empty one."""
    return [tables.escape(cell).replace(r' \%', r'\,\%') or '--' for cell in row]


def print_latex(rows: list[dict], base: dict) -> None:
    head = [r'Model & Venue & Params (M) & FLOPs (G) & $\Delta$ Params & $\Delta$ FLOPs \\']
    cells = [latex_cells([row['label'], row['venue'], *cells_of(row, base)]) for row in rows]
    tables.print_latex('llrrrr', head, cells)


def print_table(args: argparse.Namespace, rows: list[dict], as_text: Callable, as_latex: Callable, base: dict) -> None:
    """Print rows as --csv, --latex or neither asks; of benchmark.py too. `base` is what the printers also need."""
    if fvcore_counter() is None:
        print(NO_FVCORE, file=sys.stderr)
    if args.csv:
        tables.print_csv(rows)
    else:
        (as_latex if args.latex else as_text)(rows, base)


def choose(names: list[str] | None, img_size: int | None, imports: str | None = None) -> list[str]:
    """The models to measure: those asked for, or all of the registry that can have this image size (None: any)."""
    import_file(imports)  # it may register some of the names
    for name in names or ():
        options.check_model(name)
    problems = {name: size_problem(name, img_size) for name in names or MODELS}
    for problem in filter(None, problems.values()):
        if names:
            raise ModelError(problem)
        print(f'note: left out: {problem}', file=sys.stderr)
    return [name for name, problem in problems.items() if not problem]


def add_size_args(parser: argparse.ArgumentParser, img_size: int | None) -> None:
    """What a model is measured at (by default, at img_size), and how the table is printed; of benchmark.py too."""
    options.add_import_arg(parser)
    parser.add_argument('--num_classes', type=int, default=47)
    own = "; if not given, each model's own, and 224 for those listed by models.py" if img_size is None else ''
    parser.add_argument('--img_size', type=int, default=img_size, help=f'side of the square input in pixels{own}')
    style = parser.add_mutually_exclusive_group()
    style.add_argument('--latex', action='store_true', help='print only a booktabs table')
    style.add_argument('--csv', action='store_true')


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Print the parameters and multiply-accumulates of the models.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--model', type=options.parse_names, help='one or more, separated by commas; all if not given')
    add_size_args(parser, None)
    return parser


def main(args: argparse.Namespace) -> None:
    options.check_bounds(args)
    names = choose(args.model, args.img_size, args.imports)
    sizes = {name: args.img_size or own_settings(name).get('img_size', SIZE) for name in names}
    rows = [measure(name, args.num_classes, size) for name, size in sizes.items()]
    if other := [f'{name} {size}' for name, size in sizes.items() if size != (args.img_size or SIZE)]:
        print(f'note: at their own size in pixels, not {SIZE}: {", ".join(other)}', file=sys.stderr)
    base = next((row for row in rows if row['model'] == BASELINE), None)
    base = base or measure(BASELINE, args.num_classes, args.img_size or SIZE)
    print_table(args, rows, print_text, print_latex, base)


if __name__ == '__main__':
    with user_errors('compute_flops.py'):
        main(get_args_parser().parse_args())
