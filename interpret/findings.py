"""The answers of analysis.py as text (describe_*) and as figures (draw_*).

Both read only the dictionary that a question left in report.json. A difference is `shown` or it is not.
"""

import math
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

from common.drawing import COLORS, PAGE, Axes, Figure, Line2D, MaxNLocator, frame, make_panels, plt
from common.statistics import LEVEL, p_text
from interpret.information import DIFFERENT, IN_PLACE, PAIRS, SAME, STEPS

# The rows of the table of `information`, and what the verdict calls them; the steps are counted together.
ROWS = {
    IN_PLACE: 'in place',
    **dict.fromkeys(STEPS, 'a step away'),
    'elsewhere': 'farther apart',
    'other image': 'between two images (the control)',
    'a step less elsewhere': 'more a step away than farther apart',
    'along a head less across': "more along a head's own direction than across it",
}


class Finding(NamedTuple):
    """The answer to a question; the paragraphs of the report, in this order."""

    verdict: str  # one sentence
    table: str  # Markdown
    note: str  # what the table holds


def shown(test: dict) -> bool:
    return test['p_holm'] is not None and test['p_holm'] < LEVEL


# ---------------------------------------------------------------------------------------------- text


def count(tests: list[dict], sign: int = 1) -> str:
    """How many of the tests show a difference of this sign: '2 of 4'."""
    return f'{sum(shown(test) and sign * test["value"] > 0 for test in tests)} of {len(tests)}'


def p_cell(test: dict) -> str:
    return p_text(test['p_holm'])


def cell(test: dict | None, digits: int) -> str:
    """A difference and its p, in bold where it is shown."""
    if test is None:
        return '-'
    text = f'{test["value"]:+.{digits}f} ({p_cell(test)})'
    return f'**{text}**' if shown(test) else text


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    align = ('left', *['right'] * (len(head) - 1))
    return tabulate(rows, head, 'pipe', disable_numparse=True, colalign=align)


def describe_information(result: dict) -> Finding:
    blocks, table, tests = result['blocks'], [], {}
    for row, words in ROWS.items():
        for kind in PAIRS:
            found = []
            for block in blocks.values():
                compared = {'a step less elsewhere': block['local'], 'along a head less across': block.get('own', {})}
                found.append(compared[row].get(kind) if row in compared else block['shared'].get(kind, {}).get(row))
            if any(found):
                table.append([f'{row}, {kind}', *(cell(test, 3) for test in found)])
                tests.setdefault(words, []).extend(filter(None, found))
    maps = ', '.join(
        f'{name} {b["map"][0]} x {b["map"][1]}, {100 * b["zeros"]:.0f} % of z zero' for name, b in blocks.items()
    )
    note = (
        f'Nats per pair of channels, less the {result["bias"]:.4f} that independent variables give (p), bold where '
        f'p < {LEVEL:g}; {result["images"]} images, {result["draws"]} positions of each, {result["neighbours"]} '
        f'neighbours. Maps: {maps}.'
    )
    counts = ', '.join(f'{words} in {count(found)}' for words, found in tests.items())
    verdict = f'Tests that show channels of a head to share information: {counts}.'
    return Finding(verdict, markdown_table(['', *blocks], table), note)


def describe_features(result: dict) -> Finding:
    blocks = result['blocks']
    first, *others = next(iter(blocks.values()))['accuracies']
    mean = {kind: [np.mean(block['accuracies'][kind]) for block in blocks.values()] for kind in (first, *others)}
    against = {kind: [block['against'][kind] for block in blocks.values()] for kind in others}
    tests = [test for found in against.values() for test in found]
    verdict = (
        f'In {result["dimension"]} dimensions a linear probe on {first} is right for {np.mean(mean[first]):.1f} % of '
        f'the images, mean over blocks (most frequent class: {result["chance"]:.1f} %): shown to be better than on '
        f'other features in {count(tests)} comparisons and worse in {count(tests, -1)}.'
    )
    rows = [[kind, *(f'{value:.1f}' for value in values)] for kind, values in mean.items()]
    rows += [[f'{first} less {kind}', *(cell(test, 1) for test in found)] for kind, found in against.items()]
    note = (
        f'Accuracy in % on {result["images"]} images that did not train the network, and its differences in points '
        f'(p), bold where p < {LEVEL:g}; {result["repeats"]} x {result["folds"]} folds, corrected resampled t-test.'
    )
    return Finding(verdict, markdown_table(['', *blocks], rows), note)


def changed(tests: dict[str, dict]) -> str:
    """What was shown of the tests: 'lower in 2 of 6 (rotated; all closed)'."""
    parts = []
    for word, sign in (('lower', -1), ('higher', 1)):
        if names := [name for name, test in tests.items() if shown(test) and sign * test['value'] > 0]:
            parts.append(f'{word} in {len(names)} of {len(tests)} ({"; ".join(names)})')
    return ' and '.join(parts) or f'no change shown in {len(tests)}'


def verdict_on_changes(result: dict) -> str:
    accuracy, loss = ({n: c[key] for n, c in result['changes'].items()} for key in ('accuracy_change', 'loss_change'))
    parts = [f'Accuracy on the {result["images"]} test images: {changed(accuracy)}', f'cross-entropy: {changed(loss)}']
    if across := result['across']:
        parts.append(
            f'rotation {"" if any(map(shown, across.values())) else "not "}shown to act differently with twists'
        )
    limit = f'a loss or gain of fewer than {result["least"]} images could not have been shown'
    return f'{"; ".join(parts)}. With the other tests as they are, {limit}.'


def describe_changes(result: dict) -> Finding:
    def row(name: str, after: str, accuracy: dict, loss: dict, others: str) -> list[str]:
        interval = f'{accuracy["low"]:+.1f} to {accuracy["high"]:+.1f}'
        moved = [str(accuracy.get(key, '')) for key in ('lost', 'gained')]
        change = [f'{accuracy["value"]:+.1f}', interval, *moved, p_cell(accuracy)]
        return [name, after, *change, f'{loss["value"]:+.3f}', p_cell(loss), others]

    head = ['', 'accuracy', 'change', '95 %', 'lost', 'gained', 'p', 'loss change', 'p', 'other predictions']
    rows = [['as trained', f'{result["accuracy"]:.1f}', *[''] * 8]]
    for name, change in result['changes'].items():
        after, others = f'{change["accuracy"]:.1f}', f'{change["other_answers"]:.0f} %'
        rows.append(row(name, after, change['accuracy_change'], change['loss_change'], others))
    if across := result['across']:
        rows.append(row('rotation with twists less without', '', across['right'], across['loss'], ''))
    note = 'Accuracy in %, its change in points, cross-entropy in nats; intervals are each of its test alone.'
    return Finding(verdict_on_changes(result), markdown_table(head, rows), note)


def describe_gates(result: dict) -> Finding:
    blocks, start = result['blocks'], result['start']
    gates = [block['gate'] for block in blocks.values()]
    began = f', from {start:.4f} before training' if start is not None else ''
    verdict = f'sigmoid(gate) ends at {min(gates):.4f} to {max(gates):.4f}{began}. {verdict_on_changes(result)}'
    ends = ', '.join(f'{name} {block["gate"]:.4f} ({100 * block["share"]:.1f} %)' for name, block in blocks.items())
    _, table, note = describe_changes(result)
    note += f" sigmoid(gate), and the root mean square of the gated branch in % of the block's output: {ends}."
    return Finding(verdict, table, note)


# ---------------------------------------------------------------------------------------------- figures

FILLED = f"Filled: p < {LEVEL:g} after Holm's correction. Bars: 95 % intervals, each of its test alone."


def points(axes: Axes, at: list[float], tests: list[dict], across: bool = False, **style) -> None:
    """Draw values with their intervals, filled where a difference is shown; across: values along x."""
    style = dict(color=COLORS[0], marker='o') | style
    for place, test in zip(at, tests):
        reach = [[test['value'] - test['low']], [test['high'] - test['value']]]
        where = (test['value'], place) if across else (place, test['value'])
        face = style['color'] if shown(test) else 'white'
        bar = {'xerr' if across else 'yerr': reach}
        axes.errorbar(*where, **bar, linestyle='none', elinewidth=0.8, markerfacecolor=face, **style)


def block_panels(blocks: dict[str, dict], height: float, **kwargs) -> tuple[Figure, list[Axes]]:
    """A figure with a panel per block, up to four in a row of this height."""
    columns = min(len(blocks), 4)
    return make_panels(len(blocks), columns, (PAGE[0], height * math.ceil(len(blocks) / columns)), **kwargs)


def draw_information(result: dict, title: str) -> Figure:
    blocks = result['blocks']
    found = {condition for block in blocks.values() for tests in block['shared'].values() for condition in tests}
    conditions = [row for row in ROWS if row in found]
    styles = {DIFFERENT: dict(color=COLORS[0], marker='o'), SAME: dict(color=COLORS[1], marker='s')}
    figure, grid = block_panels(blocks, 2.1, sharey=True)
    for place, (axes, (name, block)) in enumerate(zip(grid, blocks.items())):
        axes.axhline(0, color='0.6', linewidth=0.6, zorder=0)
        for shift, (kind, style) in zip((-0.12, 0.12), styles.items()):
            tests = block['shared'].get(kind, {})
            points(axes, [conditions.index(c) + shift for c in tests], list(tests.values()), **style)
        axes.set_xticks(range(len(conditions)), conditions, rotation=90)
        axes.set(title=f'{name}, {block["map"][0]} x {block["map"][1]}', ylabel='' if place % 4 else 'shared, nats')
    handles = [Line2D([], [], label=kind, linestyle='none', **style) for kind, style in styles.items()]
    notes = [f'0: independent channels. Degrees: one step in this direction. {result["images"]} images.', FILLED]
    frame(figure, f'Information that two channels of a head share: {title}', notes, handles)
    return figure


def draw_features(result: dict, title: str) -> Figure:
    blocks = result['blocks']
    kinds = list(next(iter(blocks.values()))['accuracies'])
    figure, grid = block_panels(blocks, 1.6, sharex=True, sharey=True)
    for axes, (name, block) in zip(grid, blocks.items()):
        for row, kind in enumerate(kinds):
            values = block['accuracies'][kind]
            axes.plot(values, [row] * len(values), '|', color='0.55', markersize=5, zorder=1)
            face = COLORS[0] if row and shown(block['against'][kind]) else 'white'
            marker, color = ('o', COLORS[0]) if row else ('x', 'black')  # the first is the reference
            axes.plot(np.mean(values), row, marker, color=color, markerfacecolor=face, markersize=5)
        axes.axvline(result['chance'], color='0.4', linestyle=(0, (1, 2)), linewidth=0.8, zorder=0)
        axes.set(title=name, xlabel='accuracy, %', ylim=(len(kinds) - 0.5, -0.5))
        axes.set_yticks(range(len(kinds)), kinds)
    notes = [
        f'{result["dimension"]} dimensions each. Ticks: {result["repeats"]} x {result["folds"]} folds; cross and '
        f"circles: means, filled where they differ from the {kinds[0]} (p < {LEVEL:g} after Holm's correction). "
        'Dotted: the most frequent class. Images of validation chose the epoch.'
    ]
    frame(figure, f'Linear probe on frozen features: {title}', notes)
    return figure


def draw_changes(result: dict, title: str, before: int = 0) -> tuple[Figure, list[Axes]]:
    """Draw changes of accuracy and loss, a row each, to the right of `before` panels that the caller fills."""
    changes = result['changes']
    height = 0.6 + 0.2 * len(changes)
    figure, grid = plt.subplots(1, 2 + before, figsize=(PAGE[0], height), layout='constrained', squeeze=False)
    labels = dict(accuracy_change='change of accuracy,\npoints', loss_change='change of\ncross-entropy, nats')
    for axes, (key, label) in zip(grid[0][before:], labels.items()):
        axes.axvline(0, color='0.6', linewidth=0.6, zorder=0)
        points(axes, list(range(len(changes))), [change[key] for change in changes.values()], across=True)
        axes.set_yticks(range(len(changes)), list(changes) if key == 'accuracy_change' else [''] * len(changes))
        axes.set(xlabel=label, ylim=(len(changes) - 0.5, -0.5))
        axes.xaxis.set_major_locator(MaxNLocator(2))  # changes as small as 0.0005 have labels that wide
    frame(figure, title, [f'{result["images"]} test images, {result["accuracy"]:.1f} % right as trained. {FILLED}'])
    return figure, list(grid[0])


def draw_spiral(result: dict, title: str) -> Figure:
    return draw_changes(result, f'The same weights, twists or images changed: {title}')[0]


def draw_gates(result: dict, title: str) -> Figure:
    figure, grid = draw_changes(result, f'Gates, and what closing them costs: {title}', before=2)
    blocks, start = result['blocks'], result['start']
    gates, shares = ([scale * block[key] for block in blocks.values()] for key, scale in (('gate', 1), ('share', 100)))
    kinds = (gates, 'sigmoid(gate)', ' %.4f'), (shares, '% of output (RMS)', ' %.1f')
    for axes, (values, label, form) in zip(grid, kinds):
        bars = axes.barh(range(len(blocks)), values, height=0.6, color='0.75', edgecolor='black', linewidth=0.5)
        axes.bar_label(bars, fmt=form, fontsize=7)
        axes.set(xlabel=label, ylim=(len(result['changes']) - 0.5, -0.5), xlim=(0, 1.35 * max(values)))
        axes.set_yticks(range(len(blocks)), list(blocks) if axes is grid[0] else [''] * len(blocks))
    if start is not None:
        grid[0].axvline(start, color='black', linestyle=(0, (1, 2)), linewidth=0.8)
        grid[0].set_title(f'dotted: {start:.3f} at the start')
    return figure
