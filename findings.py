"""What the answers of analysis.py say, in words (tell_*), and how they look (draw_*).

Both read the dictionary that a question left in report.json and nothing else: no sentence knows more than the numbers.
A tell_* gives sentences and the tables behind them, a draw_* a figure; a difference is `shown` or it is not.
"""

import math

import numpy as np

from drawing import COLORS, PAGE, Figure, Line2D, frame, heat_map, plt, readable
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
    words = {'local': 'One step away against two or more', 'own': "A head's own direction against the one across it"}
    for key, what in words.items():
        if not any(key in block for block in blocks.values()):  # no directions
            continue
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
        lines.append(f'{kinds[0].capitalize()} against {kind}: {outcomes(tests, "better", "worse", POINTS)}.')
    rows = [[kind, *(f'{np.mean(b["accuracies"][kind]):.1f}' for b in blocks.values())] for kind in kinds]
    note = (
        f'Accuracy in % of a linear probe on {result["images"]} images that did not train the network; '
        f'{result["repeats"]} x {result["folds"]} folds, corrected resampled t-test. Those of validation chose the '
        'epoch.'
    )
    return lines, [markdown_table(['', *blocks], rows), note]


def tell_directions(result: dict) -> Told:
    overall, names = result['overall'], result['names']
    yes = 'classes differ' if shown(overall) else 'no difference between classes was shown'
    single = outcomes(result['single'], 'classes differ', '', '{:.2f} epsilon squared')
    lines = [
        f'In how much more the channels repeat along a direction than across it: {yes} (epsilon squared '
        f'{overall["value"]:.3f}, {p_words(overall["p_holm"])}, {result["images"]} images, '
        f'{result["permutations"]} permutations).',
        f'One by one (Kruskal-Wallis): {single}.',
    ]
    if shown(overall):
        profile, ends = np.array(result['profile']), []
        for contrast in dict.fromkeys(name.split(maxsplit=1)[1] for name in names):
            means = profile[:, [i for i, name in enumerate(names) if name.endswith(f' {contrast}')]].mean(1)
            high, low = means.argmax(), means.argmin()
            classes = result['classes']
            ends.append(f'{contrast} {classes[high]} ({means[high]:+.2f}) and {classes[low]} ({means[low]:+.2f})')
        lines.append(
            'Highest and lowest class, mean over blocks, in standard deviations from the mean of all images: '
            f'{", ".join(ends)}.'
        )
    return lines, []


def tell_changes(result: dict) -> Told:
    changes = result['changes']
    lines = []
    for key, what, form in (('accuracy_change', 'Accuracy', POINTS), ('loss_change', 'Cross-entropy', NATS)):
        tests = {name: change[key] for name, change in changes.items()}
        lines.append(f'{what} on the {result["images"]} test images: {outcomes(tests, "higher", "lower", form)}.')
    if across := result['across']:
        said = []
        for key, what, form in (('right', 'accuracy', POINTS), ('loss', 'cross-entropy', NATS)):
            answer = 'a difference' if shown(across[key]) else 'no difference was shown'
            said.append(f'{what} {form.format(across[key]["value"])} ({answer}, {p_words(across[key]["p_holm"])})')
        lines.append(f'What rotation changes with the twists, less what it changes without them: {", ".join(said)}.')
    lines.append(
        f'With {result["images"]} images and the other tests as they are, a change of accuracy by fewer than '
        f'{result["least"]} images, all one way, could not have been shown.'
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

FILLED = f"Filled: p < {LEVEL:g} after Holm's correction. Bars: 95 % intervals, each of its test alone."


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
            face = COLORS[0] if row and shown(block['against'][kind]) else 'white'
            marker, color = ('o', COLORS[0]) if row else ('x', 'black')  # the first is what the others are held against
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


def draw_directions(result: dict, title: str) -> Figure:
    profile, names = np.array(result['profile']), result['names']
    strongest = np.abs(profile).max(1)  # (classes,)
    rows = np.sort(np.argsort(-strongest, kind='stable')[:MAX_ROWS])
    figure, axes = plt.subplots(figsize=(PAGE[0], 0.7 + 0.14 * len(rows)), layout='constrained')
    limit = max(float(strongest.max()), 1e-9)
    bar = dict(label='standard deviations', fraction=0.03, pad=0.01)
    heat_map(axes, profile[rows], vmin=-limit, vmax=limit, cbar_kws=bar)
    blocks = [name.split()[0] for name in names]
    for edge in [i for i in range(1, len(names)) if blocks[i] != blocks[i - 1]]:
        axes.axvline(edge, color='white', linewidth=2)
    for block in dict.fromkeys(blocks):
        middle = np.mean([i + 0.5 for i, other in enumerate(blocks) if other == block])
        axes.text(middle, -0.3, block, ha='center', va='bottom', fontsize=7)
    axes.set_xticks(np.arange(len(names)) + 0.5, [name.split(maxsplit=1)[1] for name in names])
    axes.set_yticks(np.arange(len(rows)) + 0.5, [readable(result['classes'][row]) for row in rows])
    axes.set_title(p_words(result['overall']['p_holm']), pad=14)
    notes = [
        'Class means of the cosine one step along a direction less that one step across it, of the same channels, less '
        f'the mean of all {result["images"]} images, in their standard deviations.'
    ]
    if len(rows) < len(result['classes']):
        notes.append(f'The {len(rows)} classes of {len(result["classes"])} that depart most.')
    frame(figure, f'Directions along which the channels repeat, by class: {title}', notes)
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
    return draw_changes(result, f'The same weights, twists or images changed: {title}')[0]


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
