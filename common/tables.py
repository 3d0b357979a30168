"""Tables on stdout: aligned text, CSV and LaTeX (booktabs)."""

import csv
import sys
from collections.abc import Iterable, Sequence

from tabulate import tabulate


def print_text(columns: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table as text; `columns` aligns each one, 'l' or 'r', as in LaTeX."""
    align = [dict(l='left', r='right')[column] for column in columns]
    print(tabulate(rows, head, tablefmt='plain', colalign=align, disable_numparse=True))


def print_csv(rows: Sequence[dict]) -> None:
    """Print rows of equal keys, with every digit and after a header; None is an empty cell."""
    writer = csv.DictWriter(sys.stdout, rows[0].keys(), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)


def print_latex(columns: str, head: Iterable[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a tabular of booktabs: its column specification, whole header lines, and rows of LaTeX cells."""
    print(rf'\begin{{tabular}}{{{columns}}}', r'\toprule', *head, r'\midrule', sep='\n')
    print(*(' & '.join(row) + r' \\' for row in rows), r'\bottomrule', r'\end{tabular}', sep='\n')
