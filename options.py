"""Options of a run: the recipes, the parser of train.py, the data set that is meant, the bounds of values. No torch."""

import argparse
from pathlib import Path

from registry import DATASETS, MODELS, size_problem
from runs import RunError

DEFAULT = dict(
    img_size=224,
    epochs=100,
    batch_size=32,
    lr=0.01,
    min_lr=1e-6,
    warmup_epochs=5,
    momentum=0.9,
    weight_decay=1e-4,
    label_smoothing=0.1,
    clip_grad=1.0,
    mixup=0.8,
    cutmix=1.0,
    randaug_n=2,
    randaug_m=9,
    crop_scale=[0.08, 1.0],
    hflip=0.5,
)
RECIPES = {
    'default': DEFAULT,
    # The paper's later protocol, from scratch (arXiv 2602.07262).
    'scratch': DEFAULT | dict(lr=0.05, min_lr=1e-5, epochs=200, batch_size=64, warmup_epochs=10, crop_scale=[0.2, 1.0]),
    # A minute on a laptop. No flip: it would turn the synthetic classes at 45 degrees into those at 135.
    'demo': DEFAULT
    | dict(
        img_size=64,
        epochs=10,
        lr=0.05,
        warmup_epochs=1,
        mixup=0.0,
        cutmix=0.0,
        randaug_n=0,
        crop_scale=[0.5, 1.0],
        hflip=0.0,
    ),
}
# Pretraining: the batch is each process's, the learning rate that of a global batch of 1024.
IMAGENET = DEFAULT | dict(epochs=600, batch_size=256, lr=0.1, mixup=0.0, cutmix=0.0, randaug_n=0, clip_grad=0.0)
# Options that say where and how a run is computed, not what it computes: not part of the fingerprint.
SYSTEM_OPTIONS = ('data_dir', 'run_dir', 'num_workers', 'device', 'force', 'recipe', 'cache', 'given')

# What tells a tree from a mere folder of class folders: all of this stands in it, or in the folder that its archive
# unpacks to.
LAYOUTS = {
    'dtd': ('dtd', ('images', 'labels')),
    'fmd': ('', ('image/*/*',)),
    'kth_tips2': ('KTH-TIPS2-b', ('*/sample_a',)),
    'cub200': ('CUB_200_2011', ('images', 'images.txt')),
    'flowers102': ('flowers-102', ('jpg', 'setid.mat')),
}

AMP = ('auto', 'bf16', 'fp16', 'off')
CACHES = ('ram', 'disk', 'none')
# Lowest and highest value of the options; both are allowed.
BOUNDS = dict(
    img_size=(32, 4096),
    epochs=(1, 1_000_000),
    lr=(1e-12, 1e3),
    min_lr=(0, 1e3),
    momentum=(0, 0.9999),
    weight_decay=(0, 10),
    clip_grad=(0, 1e9),
    label_smoothing=(0, 1),
    hflip=(0, 1),
    randaug_n=(0, 16),
    randaug_m=(0, 30),
    mixup=(0, 1e3),
    cutmix=(0, 1e3),
    seed=(0, 2**63 - 1),
    num_workers=(0, 1024),
    accumulate=(1, 100_000),
    ema_decay=(0, 1),
    save_minutes=(0, 1e6),
    max_bad_images=(0, 10**9),
    max_skipped=(1, 10**9),
)


def add_data_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('data')
    add_dataset_args(group)
    group.add_argument('--fold', type=int, default=1, help='from 1')
    group.add_argument('--img_size', type=int, help='side of the square input, pixels')


def add_dataset_args(group) -> None:
    """Which data set and where; see choose_dataset."""
    group.add_argument(
        '--dataset',
        help=f'one of {", ".join(DATASETS)}; if not given, what --data_dir is laid out as, or synthetic without it',
    )
    group.add_argument('--data_dir', help='root of the data set; synthetic has none')


def choose_dataset(dataset: str | None, data_dir: str | Path | None) -> str:
    """The data set that is meant: the one that is named, or else the one that data_dir is laid out as.

    Args:
        dataset: a key of DATASETS; None where none is named.
        data_dir: its root; None where none is given, as for 'synthetic'.

    Raises:
        RunError: no such data set, or `synthetic` with a folder, which it would not read.
    """
    if dataset is not None and dataset not in DATASETS:
        raise RunError(f"unknown data set '{dataset}'; the data sets are: {', '.join(DATASETS)}")
    if dataset == 'synthetic' and data_dir is not None:
        raise RunError(
            f'--dataset synthetic is drawn and would not read --data_dir {data_dir}; leave --dataset out for the '
            'images there, or --data_dir for the drawn ones'
        )
    if dataset is not None or data_dir is None:
        return dataset or 'synthetic'
    for name, (inner, parts) in LAYOUTS.items():
        for root in (Path(data_dir), Path(data_dir) / inner):
            if all(next(root.glob(part), None) for part in parts):
                return name
    return 'folder'


def labels(text: str) -> dict[str, str]:
    """The value of --labels: 'dtd=Materials,..'."""
    return dict(pair.split('=', 1) for pair in text.split(','))


def add_inside_args(parser: argparse.ArgumentParser) -> None:
    """What to look into, and at what: of the scripts that draw or measure a trained TwistNet."""
    group = parser.add_argument_group('inside a model')
    group.add_argument('--checkpoint', type=Path, help='the best.pt of a run')
    group.add_argument('--image', type=Path, help='a picture to look at')
    add_data_of_run_args(parser)
    group.add_argument('--subset', choices=('train', 'val', 'test'), help='of the data set; test if not given')


def add_data_of_run_args(parser: argparse.ArgumentParser) -> None:
    """The data set that a checkpoint runs over; what is not given, inside.data_of finds."""
    group = parser.add_argument_group('data')
    group.add_argument('--dataset', help="a data set to run over; if not given, the run's own")
    group.add_argument('--data_dir', help="its root; if not given, the run's own")
    group.add_argument('--fold', type=int, help="from 1; if not given, the run's own")
    group.add_argument(
        '--other_images',
        action='store_true',
        default=None,  # as of the other options that only a checkpoint takes
        help='take images of another split than the one the run recorded, which may have trained the model',
    )


def add_model_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('model')
    group.add_argument('--model', default='twistnet18', help='a name that `python models.py` lists')
    group.add_argument(
        '--pretrained',
        nargs='?',
        const=True,
        default=False,
        metavar='PATH',
        help='start from ImageNet weights: alone, the registered ones (see weights/README.md); with PATH, that file',
    )


def add_optimisation_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('optimisation (SGD with Nesterov momentum, cosine schedule)')
    group.add_argument('--epochs', type=int)
    group.add_argument('--batch_size', type=int, help='of all processes together')
    group.add_argument('--lr', type=float, help='learning rate after the warm-up')
    group.add_argument('--min_lr', type=float, help='learning rate of the last step')
    group.add_argument('--warmup_epochs', type=int, help='epochs of linear warm-up')
    group.add_argument('--momentum', type=float)
    group.add_argument('--weight_decay', type=float)
    group.add_argument('--clip_grad', type=float, help='largest norm of the gradients; 0: no clipping')
    group.add_argument('--label_smoothing', type=float, help='of mixed targets too')


def add_augmentation_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('augmentation')
    group.add_argument('--crop_scale', type=float, nargs=2, metavar=('MIN', 'MAX'), help="range of the crop's area")
    group.add_argument('--hflip', type=float, help='probability of a horizontal flip')
    group.add_argument('--randaug_n', type=int, help='RandAugment operations an image; 0: none')
    group.add_argument('--randaug_m', type=int, help='magnitude of RandAugment, 0 to 30')
    group.add_argument('--mixup', type=float, help='alpha of Mixup; 0: off')
    group.add_argument(
        '--cutmix', type=float, help='alpha of CutMix; 0: off. Where both are on, one of the two a batch'
    )


def add_system_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('system')
    group.add_argument('--seed', type=int, default=42)
    group.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ..')
    group.add_argument('--amp', choices=AMP, default='auto', help='auto: bf16 where it is native')
    group.add_argument('--compile', action=argparse.BooleanOptionalAction, default=False, help='torch.compile')
    group.add_argument('--num_workers', type=int, help='loader processes; the result does not depend on it')


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='train.py',
        description='Train one model on one fold of one data set.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        '--recipe',
        choices=tuple(RECIPES),
        help="default values of the options below; if not given, 'demo' for synthetic and 'default' for the rest",
    )
    for add in (add_data_args, add_model_args, add_optimisation_args, add_augmentation_args, add_system_args):
        add(parser)
    parser.add_argument(
        '--cache',
        choices=CACHES,
        default='ram',
        help='where decoded images are kept, for all runs on this machine (see cache.py)',
    )
    parser.add_argument('--run_dir', default='runs', help='where run folders are made')
    parser.add_argument('--force', action='store_true', help='discard the run in the folder and start again')
    parser.set_defaults(**RECIPES['default'])
    return parser


def read(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The command line, with `given`: the names of the options that stand there."""
    args = parser.parse_args(argv)
    blank = argparse.Namespace(**dict.fromkeys(vars(args)))  # what has a value there gets no default
    args.given = sorted(name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not None)
    return args


def fill(args: argparse.Namespace, recipe: dict) -> argparse.Namespace:
    """What was not given is as the recipe says, or less where that would not go with what was given (see shrunk)."""
    for name, value in recipe.items():
        if name not in args.given:
            setattr(args, name, value)
    if 'warmup_epochs' not in args.given:
        args.warmup_epochs = max(0, min(args.warmup_epochs, args.epochs - 1))
    if 'min_lr' not in args.given:
        args.min_lr = min(args.min_lr, args.lr)
    return args


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of train.py from the command line, those not given from the recipe.

    Raises:
        RunError: the data set is unknown or not read, see choose_dataset.
    """
    args = read(get_args_parser(), argv)
    args.dataset = choose_dataset(args.dataset, args.data_dir)
    args.recipe = args.recipe or ('demo' if args.dataset == 'synthetic' else 'default')
    return fill(args, RECIPES[args.recipe])


def largest_batch(batch_size: int, n_train: int, n_images: int, processes: int) -> int:
    """The default batch size, brought down to what the training images fill and the processes can share.

    Every fold of a stratified partition trains with at least two fifths of its images, but not with the same number;
    the batch is the same in all of them.
    """
    return min(batch_size, n_train, 2 * n_images // 5) // processes * processes


def shrunk(args: argparse.Namespace, recipe: dict) -> list[str]:
    """A line for each default that was brought down, with what it had to fit."""
    bounds = dict(
        warmup_epochs=f'--epochs {args.epochs}',
        min_lr=f'--lr {args.lr:g}',
        batch_size='the training set and the number of processes',
    )
    return [
        f'note: --{name} is {getattr(args, name):g}, not its default {recipe[name]:g}, to fit {bound}'
        for name, bound in bounds.items()
        if name not in args.given and getattr(args, name) != recipe[name]
    ]


def check(args: argparse.Namespace) -> None:
    """Refuse values that no run can have, whatever its data.

    Raises:
        RunError: with the option and its bounds.
    """
    if args.model not in MODELS:
        raise RunError(f"unknown model '{args.model}'; the models are: {', '.join(MODELS)}")
    for name, (low, high) in BOUNDS.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:  # NaN fails too
            raise RunError(f'--{name} {value} must be from {low} to {high}')
    low, high = args.crop_scale
    if not 0 < low <= high <= 1:
        raise RunError(f'--crop_scale {low} {high} must be two areas, 0 < MIN <= MAX <= 1')
    if not 0 <= args.warmup_epochs < args.epochs:
        raise RunError(f'--epochs {args.epochs} must be greater than --warmup_epochs {args.warmup_epochs}')
    if args.min_lr > args.lr:
        raise RunError(f'--min_lr {args.min_lr} must not exceed --lr {args.lr}')
    if problem := size_problem(args.model, args.img_size):
        raise RunError(problem)
