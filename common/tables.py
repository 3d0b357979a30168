"""Tables on stdout, and as CSV in a file: aligned text, Markdown, CSV and LaTeX (booktabs)."""

import csv
import io
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tabulate import tabulate

from common.runs import write_atomic

LATEX_ESCAPES = {c: f'\\{c}' for c in '&%$#_{}'} | {'~': r'\textasciitilde{}', '^': r'\textasciicircum{}'}
LATEX_ESCAPES |= {'\\': r'\textbackslash{}', '*': '$^*$', '[': '{[}'}  # a row that begins with [ is an option of \\
LATEX_ESCAPES |= {c: f'${c}$' for c in '<>|'}  # otherwise other characters in LaTeX's default encoding
LATEX_ESCAPES |= {'±': r'$\pm$', '†': r'$^\dagger$', '‡': r'$^\ddagger$'}


def escape(text: str) -> str:
    """Escape a text for LaTeX."""
    return ''.join(LATEX_ESCAPES.get(c, c) for c in text)


def print_text(columns: str, head: Sequence[str], rows: Iterable[Sequence[str]], form: str = 'plain') -> None:
    """Print a table as text; `columns` aligns each one, 'l' or 'r', as in LaTeX; the form 'pipe' is Markdown."""
    align = [dict(l='left', r='right')[column] for column in columns]
    if form == 'pipe':
        head, *rows = [[cell.replace('|', r'\|') for cell in row] for row in (head, *rows)]
    rows = list(rows)  # without any, older tabulate has no columns to align
    print(tabulate(rows, head, tablefmt=form, colalign=align if rows else None, disable_numparse=True))


def print_csv(rows: Sequence[dict]) -> None:
    """Print rows of equal keys, with every digit and after a header; None is an empty cell."""
    writer = csv.DictWriter(sys.stdout, rows[0].keys(), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a table, whole or not at all, and print its path; NumPy's floats have the digits that a float32 needs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(head)
    writer.writerows([f'{value:.9g}' if isinstance(value, np.floating) else value for value in row] for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, os.fsencode(text.getvalue()))  # names of files need not be UTF-8
    print(path)


def print_latex(columns: str, head: Iterable[str], rows: Iterable[Sequence[str] | str]) -> None:
    """Print a tabular of booktabs: its column specification, header lines, and rows of LaTeX cells or whole lines."""
    print(rf'\begin{{tabular}}{{{columns}}}', r'\toprule', *head, r'\midrule', sep='\n')
    lines = (row if isinstance(row, str) else ' & '.join(row) + r' \\' for row in rows)
    print(*lines, r'\bottomrule', r'\end{tabular}', sep='\n')
