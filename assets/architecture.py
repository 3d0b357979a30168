"""Draw the architecture of TwistNet-18: assets/architecture.pdf (vectors) and assets/architecture.png.

    python -m assets.architecture                              # from the root of the repository
    python -m assets.architecture --save_dir figures --dpi 300

Every number in the picture is read from the model: from the tensors of one forward pass and from the modules.
"""

import argparse
from pathlib import Path

import torch

from common.drawing import Axes, FancyBboxPatch, Figure, plt, save
from common.errors import user_errors
from models import DIRECTIONS, build_model

SIDE = 224  # pixels
WHITE, GREY, BLUE, DARK = '#FFFFFF', '#EEEEEE', '#B5DAF2', '#6FB6E4'  # four shades that differ in grey print
CROSS, ARROW = '\N{MULTIPLICATION SIGN}', '\N{RIGHTWARDS ARROW}'
ARROWS = {(0, 1): ARROW, (1, 1): '\N{SOUTH EAST ARROW}', (1, 0): '\N{DOWNWARDS ARROW}', (1, -1): '\N{SOUTH WEST ARROW}'}


@torch.inference_mode()
def measure() -> dict[str, str]:
    """The numbers in the picture, by place: shapes without the batch, and sizes of modules."""
    torch.manual_seed(0)
    model = build_model('twistnet18').eval()
    x = torch.zeros(1, 3, SIDE, SIDE)
    facts = dict(image=shape(x))
    for name in ('stem', 'maxpool', 'layer1', 'layer2', 'layer3', 'layer4', 'global_pool', 'fc'):
        x = model.get_submodule(name)(x)
        facts[name] = shape(x)
    for stage in range(1, 5):
        blocks = model.get_submodule(f'layer{stage}')
        facts[f'blocks{stage}'] = f'{len(blocks)} {CROSS} {type(blocks[0]).__name__}'
    stci = model.layer3[0].stci
    heads, first, last = stci.num_heads, stci.ais.fc[2], stci.ais.fc[4]
    c_red, dim = stci.reduce[0].out_channels // heads, stci.proj[0].in_channels
    return facts | dict(
        c_red=str(c_red),
        products=str(dim // heads - c_red),
        head=str(dim // heads),
        dim=str(dim),
        hidden=f'{first.in_features} {ARROW} {first.out_features} {ARROW} {last.out_features}',
        groups=str(stci.norm.num_groups),
        gate=f'{torch.sigmoid(model.layer3[0].gate).item():.2f}',
    )


def shape(x: torch.Tensor) -> str:
    """The shape of an output without the batch as text: 64 x 56 x 56, or 512 for a vector."""
    return f' {CROSS} '.join(map(str, x.shape[1:]))


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str = WHITE, **style) -> None:
    """Draw a box around (x, y); units are inches."""
    corner, line = (x - width / 2, y - height / 2), dict(boxstyle='round,pad=0,rounding_size=0.04', ec='black', lw=0.7)
    axes.add_patch(FancyBboxPatch(corner, width, height, fc=color, **line))
    axes.text(x, y, text, ha='center', va='center', linespacing=1.25, **style)


def arrow(axes: Axes, *points: tuple[float, float], text: str = '', above: float = 0.08) -> None:
    """Draw a line through the points with a head at its end, and a text over its last part."""
    xs, ys = zip(*points)
    axes.plot(xs[:-1], ys[:-1], color='black', linewidth=0.8, solid_joinstyle='miter')
    way = dict(arrowstyle='-|>', linewidth=0.8, shrinkA=0, shrinkB=0, color='black', mutation_scale=7)
    axes.annotate('', points[-1], points[-2], arrowprops=way)
    if text:
        axes.text((xs[-1] + xs[-2]) / 2, ys[-1] + above, text, ha='center', va='bottom')


def draw_network(axes: Axes, facts: dict[str, str], y: float) -> None:
    """Draw the row of stages, each with the shape of its output."""
    stages = [
        ('image', 'image', WHITE),
        (f'stem\n7 {CROSS} 7, stride 2\nBN, ReLU', 'stem', GREY),
        (f'max pool\n3 {CROSS} 3, stride 2', 'maxpool', GREY),
        (f'stage 1\n{facts["blocks1"]}', 'layer1', GREY),
        (f'stage 2\n{facts["blocks2"]}', 'layer2', GREY),
        (f'stage 3\n{facts["blocks3"]}', 'layer3', BLUE),
        (f'stage 4\n{facts["blocks4"]}', 'layer4', BLUE),
        ('average\npool', 'global_pool', GREY),
        ('fc', 'fc', GREY),
    ]
    widths = [0.8, 0.86, 0.86, 1.0, 1.0, 1.0, 1.0, 0.62, 0.4]
    gap = (9.0 - 0.2 - sum(widths)) / (len(widths) - 1)
    x = 0.1
    for number, ((text, name, color), width) in enumerate(zip(stages, widths)):
        box(axes, x + width / 2, y, width, 0.62, text, color)
        axes.text(x + width / 2, y - 0.36, facts[name], ha='center', va='top')
        if number:
            arrow(axes, (x - gap, y), (x, y))
        x += width + gap


def draw_block(axes: Axes, facts: dict[str, str], y: float) -> None:
    """Draw a TwistBlock: the trunk in the middle, the branch below, the shortcut above."""
    title = 'TwistBlock (the first one of a stage halves height and width)'
    axes.text(0.1, y + 0.95, title, weight='bold', va='center')
    box(axes, 1.3, y, 1.1, 0.45, f'conv 3 {CROSS} 3\nBN, ReLU', GREY)
    box(axes, 4.3, y, 1.1, 0.45, f'conv 3 {CROSS} 3\nBN', GREY)
    axes.text(0.25, y, 'x', ha='center', va='center', style='italic')
    arrow(axes, (0.35, y), (0.75, y))
    arrow(axes, (1.85, y), (3.75, y))
    axes.text(2.1, y + 0.08, 'h', ha='center', va='bottom', style='italic')
    box(axes, 3.3, y - 0.7, 1.1, 0.45, 'STCI', DARK, weight='bold')
    arrow(axes, (2.3, y), (2.3, y - 0.7), (2.75, y - 0.7))
    box(axes, 5.15, y - 0.7, 1.5, 0.45, f'{CROSS} sigmoid(gate)\nstarts at {facts["gate"]}', WHITE)
    arrow(axes, (3.85, y - 0.7), (4.4, y - 0.7))
    box(axes, 6.2, y, 0.3, 0.3, '+')
    arrow(axes, (4.85, y), (6.05, y))
    arrow(axes, (5.9, y - 0.7), (6.2, y - 0.7), (6.2, y - 0.15))
    box(axes, 3.3, y + 0.55, 3.0, 0.3, f'shortcut (conv 1 {CROSS} 1, BN where the shape changes)', WHITE)
    arrow(axes, (0.5, y), (0.5, y + 0.55), (1.8, y + 0.55))
    arrow(axes, (4.8, y + 0.55), (6.2, y + 0.55), (6.2, y + 0.15))
    box(axes, 7.2, y, 0.7, 0.45, 'ReLU', GREY)
    arrow(axes, (6.35, y), (6.85, y))
    arrow(axes, (7.55, y), (8.0, y))
    axes.text(8.1, y, 'out', ha='left', va='center', style='italic')


def draw_stci(axes: Axes, facts: dict[str, str], y: float) -> None:
    """Draw the branch: a row a head, then the layers that join them."""
    size = f'{CROSS} H {CROSS} W'
    axes.text(0.1, y + 1.45, 'STCI', weight='bold', va='center')
    axes.text(0.25, y, f'h\nC {size}', ha='left', va='center', rotation=90, linespacing=1.3)
    joint = y + 0.96
    for number, (way, angle) in enumerate(zip(DIRECTIONS, (0, 45, 90, 135))):
        row = y + 0.96 - 0.68 * number
        arrow(axes, (0.6, y), (0.75, y), (0.75, row), (0.95, row))
        box(axes, 1.6, row, 1.3, 0.42, f'reduce: conv 1 {CROSS} 1,\nBN, ReLU', GREY)
        arrow(axes, (2.25, row), (2.9, row))
        axes.text(2.66, row - 0.05, f'z: {facts["c_red"]}', ha='center', va='top')
        box(axes, 3.55, row, 1.3, 0.42, f'twist {angle}\N{DEGREE SIGN} {ARROWS[way]}\n3 {CROSS} 3 a channel', DARK)
        arrow(axes, (4.2, row), (4.75, row))
        axes.text(4.45, row - 0.05, f't: {facts["c_red"]}', ha='center', va='top')
        arrow(axes, (2.45, row), (2.45, row + 0.31), (5.5, row + 0.31), (5.5, row + 0.21))
        box(axes, 5.5, row, 1.5, 0.42, f'z, t to unit length;\nz and {facts["products"]} products z t', BLUE)
        arrow(axes, (6.25, row), (6.75, row), (6.75, joint), (7.0, joint))
        axes.text(6.45, row + 0.04, facts['head'], ha='center', va='bottom')
    steps = [
        (0.42, WHITE, f'concatenate\n{facts["dim"]} {size}'),
        (0.62, BLUE, f'AIS: mean,\n{facts["hidden"]},\nsigmoid, {CROSS}'),
        (0.3, GREY, f'GroupNorm({facts["groups"]})'),
        (0.42, GREY, f'conv 1 {CROSS} 1, BN\n{facts["dim"]} {ARROW} C'),
    ]
    top = joint + 0.21
    for height, color, text in steps:
        box(axes, 7.8, top - height / 2, 1.6, height, text, color)
        top -= height + 0.2
        arrow(axes, (7.8, top + 0.2), (7.8, top))
    axes.text(7.8, top - 0.03, f'C {size}', ha='center', va='top')


def draw(facts: dict[str, str]) -> Figure:
    figure = plt.figure(figsize=(9.0, 6.65))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 9.0), ylim=(-0.15, 6.5), frame_on=False, xticks=[], yticks=[])
    axes.text(0.1, 6.35, f'TwistNet-18, {SIDE} {CROSS} {SIDE} pixels', weight='bold', va='center')
    draw_network(axes, facts, 5.83)
    draw_block(axes, facts, 4.1)
    draw_stci(axes, facts, 1.42)
    return figure


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='The architecture of TwistNet-18 as PDF and PNG.')
    parser.add_argument('--save_dir', type=Path, default=Path(__file__).parent)
    parser.add_argument('--dpi', type=int, default=150, help='of the PNG')
    return parser


def main(args: argparse.Namespace) -> None:
    plt.rcParams['savefig.dpi'] = args.dpi
    for path in save(draw(measure()), args.save_dir, 'architecture'):
        print(path)


if __name__ == '__main__':
    with user_errors('architecture.py'):
        main(get_args_parser().parse_args())
