"""Ablation studies: lists of models, handed to run_all.py.

    python ablation.py --study components --data_dir data/dtd --dataset dtd --folds 1-3 --seeds 42,43,44 --epochs 100 \\
        --run_dir runs/ablation                                # other options: those of run_all.py and train.py
    python ablation.py --study heads,gate --data_dir .. --dry_run
    python summarize_runs.py --run_dir runs/ablation --baseline twistnet18 --latex > tables/ablation.tex

Every variant is a model with its own name, so no two configurations share a run folder, and the full model, which is
part of every study, is trained once for all of them.
"""

import argparse

import run_all
from common import options
from common.errors import user_errors

STUDIES: dict[str, tuple[str, ...]] = {
    # What each part contributes: no displacement, no selection, no products, no branch (the trunk of ResNet-18).
    'components': (
        'twistnet18',
        'twistnet18_no_spiral',
        'twistnet18_no_ais',
        'twistnet18_no_products',
        'twistnet18_first_order',
    ),
    # The number of directions: 0 degrees, 0 and 45, all four.
    'heads': ('twistnet18_heads1', 'twistnet18_heads2', 'twistnet18'),
    # The stages with the branch.
    'stages': ('twistnet18_stage3', 'twistnet18_stage4', 'twistnet18'),
    # The initial gate: sigmoid of -3, -2, -1, 0 and 1.
    'gate': ('twistnet18_gate_m3', 'twistnet18', 'twistnet18_gate_m1', 'twistnet18_gate_0', 'twistnet18_gate_1'),
    # The initial twist kernels: directional, random, none.
    'kernels': ('twistnet18', 'twistnet18_random_twist', 'twistnet18_no_spiral'),
    # The last BatchNorm of each trunk block starts at one and at zero, the latter without displacement and products.
    'start': (
        'twistnet18',
        'twistnet18_zero_init',
        'twistnet18_zero_init_no_spiral',
        'twistnet18_zero_init_no_products',
    ),
}


def models_of(studies: list[str]) -> list[str]:
    """The models of some studies, each once; 'all' means every study."""
    options.check_names('study', studies, STUDIES | dict(all=()))
    chosen = STUDIES if 'all' in studies else studies
    return list(dict.fromkeys(model for study in chosen for model in STUDIES[study]))


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        'ablation.py', 'Run ablation studies of TwistNet-18. Options not listed here are passed to train.py.'
    )
    text = f'separated by commas or spaces: {", ".join(STUDIES)}; or all'
    parser.add_argument('--study', **options.LIST, type=options.parse_names, default='components', help=text)
    run_all.add_grid_args(parser)
    return parser


def main(args: argparse.Namespace, passed: list[str]) -> None:
    args.models = models_of(args.study)
    run_all.main(args, passed)


if __name__ == '__main__':
    with user_errors('ablation.py'):
        main(*get_args_parser().parse_known_args())
