"""The answers of analysis.py as text (describe_*) and as figures (draw_*).

Both read only the dictionary that a question left in report.json. A difference is `shown` or it is not.
"""

import math
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

from common.drawing import COLORS, PAGE, Axes, Figure, Line2D, MaxNLocator, frame, make_panels
from common.statistics import LEVEL, p_text
from interpret.information import DIFFERENT, IN_PLACE, PAIRS, SAME, STEPS

# The rows of the table of `information`, and what the verdict calls them; the steps are counted together.
LOCAL, OWN = 'a step less elsewhere', 'along a head less across'
ROWS = {
    IN_PLACE: 'in place',
    **dict.fromkeys(STEPS, 'a step away'),
    'elsewhere': 'farther apart',
    'other image': 'between two images (the control)',
    LOCAL: 'more a step away than farther apart',
    OWN: "more along a head's own direction than across it",
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


def cell(test: dict | None, digits: int) -> str:
    """A difference and its p, in bold where it is shown."""
    if test is None:
        return '-'
    text = f'{test["value"]:+.{digits}f} ({p_text(test["p_holm"])})'
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
                by_row = block['shared'].get(kind, {})
                compared = {LOCAL: block['local'].get(kind), OWN: block.get('own', {}).get(kind)}
                found.append((by_row | compared).get(row))
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


def describe_changes(result: dict) -> Finding:
    """Of the questions `spiral` and `gates`."""
    changes, across = result['changes'], result['across']
    accuracy, loss = ({n: c[key] for n, c in changes.items()} for key in ('accuracy_change', 'loss_change'))

    def row(name: str, after: str, accuracy: dict, loss: dict, others: str) -> list[str]:
        interval = f'{accuracy["low"]:+.1f} to {accuracy["high"]:+.1f}'
        moved = [str(accuracy.get(key, '')) for key in ('lost', 'gained')]
        change = [f'{accuracy["value"]:+.1f}', interval, *moved, p_text(accuracy['p_holm'])]
        return [name, after, *change, f'{loss["value"]:+.3f}', p_text(loss['p_holm']), others]

    head = ['', 'accuracy', 'change', '95 %', 'lost', 'gained', 'p', 'loss change', 'p', 'other predictions']
    rows = [['as trained', f'{result["accuracy"]:.1f}', *[''] * 8]]
    for name, change in changes.items():
        after, others = f'{change["accuracy"]:.1f}', f'{change["other_answers"]:.0f} %'
        rows.append(row(name, after, accuracy[name], loss[name], others))
    parts = [f'Accuracy on the {result["images"]} test images: {changed(accuracy)}', f'cross-entropy: {changed(loss)}']
    if across:
        rows.append(row('rotation with twists less without', '', across['right'], across['loss'], ''))
        acts = any(map(shown, across.values()))
        parts.append(f'rotation {"" if acts else "not "}shown to act differently with twists')
    limit = f'a loss or gain of fewer than {result["least"]} images could not have been shown'
    verdict = f'{"; ".join(parts)}. With the other tests as they are, {limit}.'
    note = 'Accuracy in %, its change in points, cross-entropy in nats; intervals are each of its test alone.'
    if blocks := result.get('blocks'):
        gates, start = [block['gate'] for block in blocks.values()], result['start']
        began = f', from {start:.4f} before training' if start is not None else ''
        verdict = f'sigmoid(gate) ends at {min(gates):.4f} to {max(gates):.4f}{began}. {verdict}'
        ends = ', '.join(f'{name} {b["gate"]:.4f} ({100 * b["share"]:.1f} %)' for name, b in blocks.items())
        note += f" sigmoid(gate), and the root mean square of the gated branch in % of the block's output: {ends}."
    return Finding(verdict, markdown_table(head, rows), note)


# ---------------------------------------------------------------------------------------------- figures

FILLED = f"Filled: p < {LEVEL:g} after Holm's correction. Bars: 95 % intervals, each of its test alone."
GUIDE = dict(color='0.6', linewidth=0.6, zorder=0)  # the line of no difference


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
        axes.axhline(0, **GUIDE)
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
        'Dotted: the most frequent class.'
    ]
    frame(figure, f'Linear probe on frozen features: {title}', notes)
    return figure


def draw_changes(result: dict, title: str) -> Figure:
    """Changes of accuracy and loss, a row each; of `gates`, to the left of them, a row per block."""
    changes, blocks = result['changes'], result.get('blocks', {})
    size = PAGE[0], 0.6 + 0.2 * len(changes)
    panels = 4 if blocks else 2
    figure, (*left, of_accuracy, of_loss) = make_panels(panels, panels, size)
    labels = dict(accuracy_change='change of accuracy,\npoints', loss_change='change of\ncross-entropy, nats')
    for axes, (key, label) in zip((of_accuracy, of_loss), labels.items()):
        axes.axvline(0, **GUIDE)
        points(axes, list(range(len(changes))), [change[key] for change in changes.values()], across=True)
        axes.set_yticks(range(len(changes)), list(changes) if axes is of_accuracy else [''] * len(changes))
        axes.set(xlabel=label, ylim=(len(changes) - 0.5, -0.5))
        axes.xaxis.set_major_locator(MaxNLocator(2))  # changes as small as 0.0005 have labels that wide
    kinds = ('gate', 1, 'sigmoid(gate)', ' %.4f'), ('share', 100, '% of output (RMS)', ' %.1f')
    for axes, (key, scale, label, form) in zip(left, kinds):
        values = [scale * block[key] for block in blocks.values()]
        bars = axes.barh(range(len(blocks)), values, height=0.6, color='0.75', edgecolor='black', linewidth=0.5)
        axes.bar_label(bars, fmt=form, fontsize=7)
        axes.set(xlabel=label, ylim=(len(changes) - 0.5, -0.5), xlim=(0, 1.35 * max(values)))
        axes.set_yticks(range(len(blocks)), list(blocks) if key == 'gate' else [''] * len(blocks))
    if blocks and result['start'] is not None:
        left[0].axvline(result['start'], color='black', linestyle=(0, (1, 2)), linewidth=0.8)
        left[0].set_title(f'dotted: {result["start"]:.3f} at the start')
    what = 'Gates, and what closing them costs' if blocks else 'The same weights, twists or images changed'
    notes = [f'{result["images"]} test images, {result["accuracy"]:.1f} % right as trained. {FILLED}']
    frame(figure, f'{what}: {title}', notes)
    return figure
