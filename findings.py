"""What the answers of analysis.py say, in words (tell_*), and how they look (draw_*).

Both read the dictionary that a question left in report.json and nothing else: no sentence knows more than the numbers.
A tell_* gives sentences and the tables behind them, a draw_* a figure; a difference is `shown` or it is not.
"""

import math

import numpy as np

from drawing import COLORS, PAGE, Figure, Line2D, frame, plt
from information import ANGLES, DIFFERENT, IN_PLACE, PAIRS, SAME
from summarize_runs import LEVEL, p_text

MAX_ROWS = 50  # classes in a figure
NATS, POINTS = '{:+.3f} nats', '{:+.1f} points'
Told = tuple[list[str], list[str]]  # sentences, and the tables behind them


def shown(test: dict) -> bool:
    return test['p_holm'] is not None and test['p_holm'] < LEVEL


# ---------------------------------------------------------------------------------------------- words


def p_words(p: float | None) -> str:
    if p is None:
        return 'no test, for want of spread'
    text = p_text(p)
    return f'p < {text[1:]}' if text[0] == '<' else f'p = {text}'


def outcomes(tests: dict[str, dict], above: str, below: str, form: str, none: str = 'no difference was shown') -> str:
    """What a set of tests found: 'above in 2 of 4 (a, b: +0.1 to +0.2 nats, p < 0.001); no difference was shown in ..'.

    Args:
        tests: by what distinguishes them.
        above, below: what a positive and a negative difference mean.
        form: of a value, with its unit: '{:+.1f} points'.
        none: what a test says that finds nothing.
    """
    parts = []
    for word, sign in ((above, 1), (below, -1)):
        if found := {name: test for name, test in tests.items() if shown(test) and sign * test['value'] > 0}:
            low, high = (form.format(end(test['value'] for test in found.values())) for end in (min, max))
            values = low if low == high else f'{low.split()[0]} to {high}'
            largest = p_words(max(test['p_holm'] for test in found.values()))
            largest = largest.replace('=', '≤') if len(found) > 1 else largest
            where = f'{", ".join(found)}: ' if len(found) <= 6 else ''
            parts.append(f'{word} in {len(found)} of {len(tests)} ({where}{values}, {largest})')
    if rest := [name for name, test in tests.items() if not shown(test)]:
        known = [tests[name]['p_holm'] for name in rest if tests[name]['p_holm'] is not None]
        least = p_words(min(known, default=None))
        everywhere = len(rest) == len(tests) > 1
        where = f'any of {len(rest)}' if everywhere else ', '.join(rest) if len(rest) <= 6 else f'the other {len(rest)}'
        parts.append(f'{none} in {where} ({"smallest " * (len(rest) > 1 and least[0] == "p")}{least})')
    return '; '.join(parts)


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ['---', *['---:'] * (len(head) - 1)], *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def p_cell(test: dict) -> str:
    return '-' if test['p_holm'] is None else p_text(test['p_holm'])


def cell(test: dict | None, digits: int) -> str:
    return '-' if test is None else f'{test["value"]:.{digits}f}{" *" * shown(test)}'


def tell_information(result: dict) -> Told:
    blocks = result['blocks']

    words = {angle: f'One step along {angle}' for angle in ANGLES}
    words |= {
        IN_PLACE: 'At zero displacement',
        'elsewhere': 'Two steps or more apart',
        'other image': 'At one place of two images',
    }
    lines, rows = [], []
    for condition in (IN_PLACE, *ANGLES, 'elsewhere', 'other image'):
        for kind in PAIRS:
            found = {name: block['shared'].get(kind, {}).get(condition) for name, block in blocks.items()}
            if tests := {name: test for name, test in found.items() if test}:
                said = outcomes(
                    tests,
                    'shared information',
                    'less than independent channels give',
                    NATS,
                    'no shared information was shown',
                )
                lines.append(f'{words[condition]}, {kind}: {said}.')
                rows.append([f'{kind}, {condition}', *(cell(test, 3) for test in found.values())])
    for key, what in (
        ('local', 'One step away against two or more'),
        ('own', "A head's own direction against the other three"),
    ):
        for kind in PAIRS:
            if tests := {name: block[key][kind] for name, block in blocks.items() if kind in block[key]}:
                lines.append(f'{what}, {kind}: {outcomes(tests, "more information", "less information", NATS)}.')
        if not any(block[key] for block in blocks.values()):
            lines.append(f'{what}: the maps of {", ".join(blocks)} are too small to say.')
    maps = ', '.join(
        f'{name} {b["map"][0]} x {b["map"][1]}, {100 * b["zeros"]:.0f} % of z zero' for name, b in blocks.items()
    )
    note = (
        f'Nats a pair, less the {result["bias"]:.4f} that independent variables give; {result["images"]} images, '
        f'{result["draws"]} positions of each, {result["neighbours"]} neighbours; * p < {LEVEL:g}. Maps: {maps}.'
    )
    return lines, [markdown_table(['', *blocks], rows), note]


def tell_features(result: dict) -> Told:
    blocks = result['blocks']
    kinds = list(next(iter(blocks.values()))['accuracies'])
    mean = {kind: np.mean([block['accuracies'][kind] for block in blocks.values()]) for kind in kinds}
    lines = [
        f'In {result["dimension"]} dimensions, over {len(blocks)} blocks: '
        + ', '.join(f'{kind} {mean[kind]:.1f} %' for kind in kinds)
        + f'; the most frequent class {result["chance"]:.1f} %.'
    ]
    for kind in kinds[1:]:
        tests = {name: block['against'][kind] for name, block in blocks.items()}
        lines.append(f'Displaced products against {kind}: {outcomes(tests, "better", "worse", POINTS)}.')
    rows = [[kind, *(f'{np.mean(b["accuracies"][kind]):.1f}' for b in blocks.values())] for kind in kinds]
    note = (
        f'Accuracy in % of a linear probe on {result["images"]} images that did not train the network; '
        f'{result["repeats"]} x {result["folds"]} folds, corrected resampled t-test.'
    )
    return lines, [markdown_table(['', *blocks], rows), note]


def tell_directions(result: dict) -> Told:
    lines = []
    for view, words in (
        ('heads', "the heads' responses, relative to their mean"),
        ('steps', 'the displacements at which the same channels repeat'),
    ):
        found, names = result[view], result[view]['names']
        overall = found['overall']
        yes = 'classes differ' if shown(overall) else 'no difference between classes was shown'
        lines.append(
            f'In {words}: {yes} (epsilon squared {overall["value"]:.3f}, {p_words(overall["p_holm"])}, '
            f'{result["images"]} images, {result["permutations"]} permutations).'
        )
        lines.append(
            f'One by one (Kruskal-Wallis): {outcomes(found["single"], "classes differ", "", "{:.2f} epsilon squared")}.'
        )
        if shown(overall):
            profile, tops = np.array(found['profile']), []
            for angle in ANGLES:
                columns = [i for i, name in enumerate(names) if name.endswith(f' {angle}')]
                if columns:
                    means = profile[:, columns].mean(1)
                    tops.append(f'{angle} {result["classes"][means.argmax()]} ({means.max():+.2f})')
            lines.append(f'Most inclined to each direction, in standard deviations: {", ".join(tops)}.')
    return lines, []


def tell_changes(result: dict) -> Told:
    changes = result['changes']
    lines = []
    for key, what, form in (('accuracy_change', 'Accuracy', POINTS), ('loss_change', 'Cross-entropy', NATS)):
        tests = {name: change[key] for name, change in changes.items()}
        lines.append(f'{what} on the {result["images"]} test images: {outcomes(tests, "higher", "lower", form)}.')
    lines.append(
        f'With {result["images"]} images and {result["tests"]} tests, a change of fewer than {result["least"]} images, '
        'all one way, could not have been shown.'
    )
    head = ['', 'accuracy', 'change', '95 %', 'lost', 'gained', 'p', 'loss change', 'p', 'other answers']
    rows = [['as trained', f'{result["accuracy"]:.1f}', *[''] * 8]]
    for name, change in changes.items():
        accuracy, loss = change['accuracy_change'], change['loss_change']
        rows.append([
            name, f'{change["accuracy"]:.1f}', f'{accuracy["value"]:+.1f}',
            f'{accuracy["low"]:+.1f} to {accuracy["high"]:+.1f}', str(accuracy['lost']), str(accuracy['gained']),
            p_cell(accuracy), f'{loss["value"]:+.3f}', p_cell(loss),
            f'{change["other_answers"]:.0f} %',
        ])  # fmt: skip
    return lines, [markdown_table(head, rows)]


def tell_gates(result: dict) -> Told:
    start, (lines, details) = result['start'], tell_changes(result)
    ends = ', '.join(
        f'{name} {block["gate"]:.4f}' + (f' ({block["gate"] - start:+.4f})' if start is not None else '')
        for name, block in result['blocks'].items()
    )
    shares = ', '.join(f'{name} {100 * block["share"]:.1f} %' for name, block in result['blocks'].items())
    began = f', from {start:.4f} before training' if start is not None else ''
    first = [
        f'sigmoid(gate) ends at {ends}{began}.',
        f"Root mean square of what the gates let through, of the block's output: {shares}.",
    ]
    return first + lines, details


# ---------------------------------------------------------------------------------------------- figures

FILLED = f"Filled: p < {LEVEL:g} after Holm's correction. Bars: 95 % intervals."


def points(axes: plt.Axes, at: list[float], tests: list[dict], across: bool = False, **style) -> None:
    """Values with their intervals, filled where a difference is shown; across: values along x."""
    style = dict(color=COLORS[0], marker='o') | style
    for place, test in zip(at, tests):
        reach = [[test['value'] - test['low']], [test['high'] - test['value']]]
        where = (test['value'], place) if across else (place, test['value'])
        face = style['color'] if shown(test) else 'white'
        bar = {'xerr' if across else 'yerr': reach}
        axes.errorbar(*where, **bar, linestyle='none', elinewidth=0.8, markerfacecolor=face, **style)


def panels(count: int, width: float, height: float, **kwargs) -> tuple[Figure, list[plt.Axes]]:
    columns = min(count, 4)
    rows = math.ceil(count / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(width, height * rows), squeeze=False, layout='constrained', **kwargs
    )
    for axes in grid.flat[count:]:
        axes.remove()
    return figure, list(grid.flat[:count])


def draw_information(result: dict, title: str) -> Figure:
    blocks = result['blocks']
    conditions = list(dict.fromkeys(c for b in blocks.values() for kind in b['shared'].values() for c in kind))
    conditions.sort(key=[IN_PLACE, *ANGLES, 'elsewhere', 'other image'].index)
    styles = {DIFFERENT: dict(color=COLORS[0], marker='o'), SAME: dict(color=COLORS[1], marker='s')}
    figure, grid = panels(len(blocks), PAGE[0], 2.1, sharey=True)
    for place, (axes, (name, block)) in enumerate(zip(grid, blocks.items())):
        axes.axhline(0, color='0.6', linewidth=0.6, zorder=0)
        for shift, (kind, style) in zip((-0.12, 0.12), styles.items()):
            found = block['shared'].get(kind, {})
            points(axes, [conditions.index(c) + shift for c in found], list(found.values()), **style)
        axes.set_xticks(range(len(conditions)), conditions, rotation=90)
        axes.set(title=f'{name}, {block["map"][0]} x {block["map"][1]}', ylabel='' if place % 4 else 'shared, nats')
    handles = [Line2D([], [], label=kind, linestyle='none', **style) for kind, style in styles.items()]
    notes = [f'0: independent channels. Degrees: one step in this direction. {result["images"]} images.', FILLED]
    frame(figure, f'Information that two channels of a head share: {title}', notes, handles)
    return figure


def draw_features(result: dict, title: str) -> Figure:
    blocks = result['blocks']
    kinds = list(next(iter(blocks.values()))['accuracies'])
    figure, grid = panels(len(blocks), PAGE[0], 1.6, sharex=True, sharey=True)
    for axes, (name, block) in zip(grid, blocks.items()):
        for row, kind in enumerate(kinds):
            values = block['accuracies'][kind]
            axes.plot(values, [row] * len(values), '|', color='0.55', markersize=5, zorder=1)
            other = row and shown(block['against'][kind])
            face = COLORS[0] if row == 0 or other else 'white'
            axes.plot(np.mean(values), row, 'o', color=COLORS[0], markerfacecolor=face, markersize=5)
        axes.axvline(result['chance'], color='0.4', linestyle=(0, (1, 2)), linewidth=0.8, zorder=0)
        axes.set(title=name, xlabel='accuracy, %', ylim=(len(kinds) - 0.5, -0.5))
        axes.set_yticks(range(len(kinds)), kinds)
    notes = [
        f'{result["dimension"]} dimensions each. Ticks: {result["repeats"]} x {result["folds"]} folds; circles: means, '
        f"filled where they differ from the displaced products (p < {LEVEL:g} after Holm's correction). "
        'Dotted: the most frequent class.'
    ]
    frame(figure, f'Linear probe on frozen features: {title}', notes)
    return figure


def draw_directions(result: dict, title: str) -> Figure:
    views = ('heads', 'steps')
    strongest = np.max([np.abs(result[view]['profile']).max(1) for view in views], 0)  # (classes,)
    rows = np.sort(np.argsort(-strongest, kind='stable')[:MAX_ROWS])
    height = 0.7 + 0.14 * len(rows)
    figure, grid = plt.subplots(
        1, len(views), figsize=(PAGE[0], height), squeeze=False, layout='constrained', sharey=True
    )
    limit = max(float(strongest.max()), 1e-9)
    for axes, view in zip(grid[0], views):
        names = result[view]['names']
        image = axes.imshow(
            np.array(result[view]['profile'])[rows], cmap='cividis', vmin=-limit, vmax=limit, aspect='auto'
        )
        blocks = [name.split()[0] for name in names]
        for edge in [i for i in range(1, len(names)) if blocks[i] != blocks[i - 1]]:
            axes.axvline(edge - 0.5, color='white', linewidth=2)
        for block in dict.fromkeys(blocks):
            middle = np.mean([i for i, other in enumerate(blocks) if other == block])
            axes.text(middle, -0.8, block, ha='center', va='bottom', fontsize=7)
        axes.set_xticks(range(len(names)), [name.split()[1] for name in names], rotation=90)
        axes.set_yticks(range(len(rows)), [result['classes'][row] for row in rows])
        overall = result[view]['overall']
        what = 'heads' if view == 'heads' else 'displacements, same channels'
        axes.set_title(f'{what}: {p_words(overall["p_holm"])}', pad=14)
    figure.colorbar(image, ax=grid[0], label='standard deviations', fraction=0.03, pad=0.01)
    notes = [
        'Class means of the cosine in each direction, less the mean over directions, in standard deviations of '
        f'{result["images"]} images.'
    ]
    if len(rows) < len(result['classes']):
        notes.append(f'The {len(rows)} classes of {len(result["classes"])} that depart most.')
    frame(figure, f'Directions that classes respond to: {title}', notes)
    return figure


def draw_changes(result: dict, title: str, before: int = 0) -> tuple[Figure, list[plt.Axes]]:
    """Changes of accuracy and loss, a row each, behind panels that the caller fills."""
    changes = result['changes']
    height = 0.6 + 0.2 * len(changes)
    figure, grid = plt.subplots(1, 2 + before, figsize=(PAGE[0], height), layout='constrained', squeeze=False)
    for axes, key, label in zip(
        grid[0][before:],
        ('accuracy_change', 'loss_change'),
        ('change of accuracy,\npoints', 'change of\ncross-entropy, nats'),
    ):
        axes.axvline(0, color='0.6', linewidth=0.6, zorder=0)
        points(axes, list(range(len(changes))), [change[key] for change in changes.values()], across=True)
        axes.set_yticks(range(len(changes)), list(changes) if key == 'accuracy_change' else [''] * len(changes))
        axes.set(xlabel=label, ylim=(len(changes) - 0.5, -0.5))
    frame(figure, title, [f'{result["images"]} test images, {result["accuracy"]:.1f} % right as trained. {FILLED}'])
    return figure, list(grid[0])


def draw_spiral(result: dict, title: str) -> Figure:
    return draw_changes(result, f'The same weights with the spiral changed: {title}')[0]


def draw_gates(result: dict, title: str) -> Figure:
    figure, grid = draw_changes(result, f'Gates, and what closing them costs: {title}', before=2)
    blocks, start = result['blocks'], result['start']
    for axes, values, label in (
        (grid[0], [block['gate'] for block in blocks.values()], 'sigmoid(gate)'),
        (grid[1], [100 * block['share'] for block in blocks.values()], '% of output (RMS)'),
    ):
        axes.barh(range(len(blocks)), values, height=0.6, color='0.75', edgecolor='black', linewidth=0.5)
        for row, value in enumerate(values):
            axes.text(value, row, f' {value:.4f}' if axes is grid[0] else f' {value:.1f}', va='center', fontsize=7)
        axes.set(xlabel=label, ylim=(len(result['changes']) - 0.5, -0.5), xlim=(0, 1.35 * max(values)))
        axes.set_yticks(range(len(blocks)), list(blocks) if axes is grid[0] else [''] * len(blocks))
    if start is not None:
        grid[0].axvline(start, color='black', linestyle=(0, (1, 2)), linewidth=0.8)
        grid[0].set_title(f'dotted: {start:.3f} at the start')
    return figure
