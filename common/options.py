"""Options: the recipes, the groups of options that scripts share, and what their values may be. No torch."""

import argparse
import json
import re
import shlex
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from common.errors import RunError
from common.registry import DATASETS, MODELS, WEIGHTS_DIR, entry_of, has_stci, is_own, nameable, size_problem

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
# The paper's later protocol, from scratch (arXiv 2602.07262).
SCRATCH = DEFAULT | dict(lr=0.05, min_lr=1e-5, epochs=200, batch_size=64, warmup_epochs=10, crop_scale=[0.2, 1.0])
# A minute on a laptop. No flip: it would turn the synthetic classes at 45 degrees into those at 135.
DEMO = DEFAULT | dict(img_size=64, epochs=10, lr=0.05, warmup_epochs=1, mixup=0.0, cutmix=0.0, randaug_n=0)
DEMO |= dict(crop_scale=[0.5, 1.0], hflip=0.0)
RECIPES = dict(default=DEFAULT, scratch=SCRATCH, demo=DEMO)
# Pretraining: the batch is each process's, the learning rate that of a global batch of BASE_BATCH images.
BASE_BATCH = 1024
IMAGENET = DEFAULT | dict(epochs=600, batch_size=256, lr=0.1, mixup=0.0, cutmix=0.0, randaug_n=0, clip_grad=0.0)

# Options of train.py at the values that change nothing. At these they are left out of fingerprints, so that an option
# that is added later leaves those of plain runs as they are. Pretraining has those of FIXED fixed.
FIXED = dict(gate_lr=1.0, class_weights=None)
OPTIMIZER = dict(opt='sgd', layer_decay=None)  # of both trainers
OWN_DATA = dict(name=None, groups=None, folds_total=None)
NEUTRAL = FIXED | OPTIMIZER | OWN_DATA | dict(ema=False, ema_decay=0.9999, freeze=None, patience=None, train_on='train')
NEUTRAL |= dict(resize='crop', vflip=0.0, rotate=None, erase=0.0)
# Options that determine where and how a run is computed, but not its result: not part of the fingerprint.
# The file of --import counts by its content, see timm_models.model_defines.
SYSTEM_OPTIONS = {'data_dir', 'lists', 'run_dir', 'num_workers', 'device', 'force', 'recipe', 'cache', 'given'}
SYSTEM_OPTIONS |= {'imports', 'tuned', 'tensorboard'}
# The same of pretraining, whose fingerprint has the global batch in place of batch_size and accumulate.
PRETRAINING_SYSTEM_OPTIONS = SYSTEM_OPTIONS | FIXED.keys() | {'batch_size', 'accumulate', 'checkpoint_dir', 'resume'}
PRETRAINING_SYSTEM_OPTIONS |= {'weights_dir', 'overwrite', 'save_minutes', 'max_bad_images', 'max_skipped', 'eval'}
PRETRAINING_NEUTRAL = OPTIMIZER | dict(drop_path=None)
# What --eval reads.
SCORING_OPTIONS = {'eval', 'data_dir', 'model', 'imports', 'img_size', 'device', 'num_workers', 'amp'}

NO_GATES = '--gate_lr {gate_lr}: {model} has no gates; train models without gates by a command without --gate_lr'
BASELINES = ('resnet18', 'twistnet18')  # of tables without --baseline: the first that has runs
EMA_DECAY = 'decay of the average per step, limited to 1 - t ** (-2 / 3) at step t, for short runs'
AMP = ('auto', 'bf16', 'fp16', 'off')
RESIZE = ('crop', 'squash', 'pad')
CACHES = ('ram', 'disk', 'none')
# Lowest and highest value of the options; both are allowed.
BOUNDS = dict(
    img_size=(32, 4096),
    num_classes=(1, 1_000_000),
    epochs=(1, 1_000_000),
    lr=(1e-12, 1e3),
    min_lr=(0, 1e3),
    momentum=(0, 0.9999),
    weight_decay=(0, 10),
    clip_grad=(0, 1e9),
    label_smoothing=(0, 1),
    hflip=(0, 1),
    vflip=(0, 1),
    erase=(0, 1),
    randaug_n=(0, 16),
    randaug_m=(0, 30),
    mixup=(0, 1e3),
    cutmix=(0, 1e3),
    seed=(0, 2**63 - 1),
    num_workers=(0, 1024),
    rounds=(1, 1000),
    accumulate=(1, 100_000),
    ema_decay=(0, 1),
    layer_decay=(1e-3, 1),
    drop_path=(0, 0.99),
    gate_lr=(0, 1e6),
    patience=(1, 1_000_000),
    save_minutes=(0, 1e6),
    max_bad_images=(0, 10**9),
    max_skipped=(1, 10**9),
)

MOMENTUM = dict(sgd=True, adamw=False)  # whether an optimiser has it; timm knows of all others, but imports torch
# Optimisers of timm that no run can use: they need second derivatives, bitsandbytes or apex, or do not resume in the
# same bits.
UNUSABLE = ['adahessian', 'bnb*', 'fused*', 'kron*']


# ---------------------------------------------------------------------------------------------- options with commas


class Listed(argparse.Action):
    """Joins values separated by commas, spaces or both: '--seeds 42 43' is '--seeds 42,43'."""

    def __call__(self, parser, namespace, values, option_string=None):
        joined, *rest = values  # a list or a dictionary each, as `type` returns it
        for part in rest:
            joined = joined | part if isinstance(part, dict) else joined + part
        setattr(namespace, self.dest, joined)


LIST = dict(nargs='+', action=Listed)  # arguments of add_argument for an option that takes a list
SWITCH = argparse.BooleanOptionalAction  # --name and --no-name


def parse_numbers(text: str) -> list[int]:
    """'1-3,7' is [1, 2, 3, 7], in this order, each once; a comma at an end is ignored."""
    numbers: list[int] = []
    for part in text.strip(' ,').split(','):
        first, dash, last = part.strip().partition('-')
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers such as 1-10 or 42,43,44")
        first, last = int(first), int(last or first)
        if last < first or last - first > 10_000:
            raise argparse.ArgumentTypeError(f"'{part}' is no range of numbers such as 1-10")
        numbers += range(first, last + 1)
    return list(dict.fromkeys(numbers))


def parse_names(text: str) -> list[str]:
    """'a,b' is ['a', 'b'], each once."""
    names = [name.strip() for name in text.split(',') if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError('names nothing')
    return list(dict.fromkeys(names))


def joined_names(text: str) -> str:
    """'a, b' is 'a,b'."""
    return ','.join(parse_names(text))


def parse_gpus(text: str) -> list[str]:
    """'0,0,1' is ['0', '0', '1']: two runs share the first device."""
    return [name.strip() for name in text.split(',') if name.strip()]


def parse_sbatch(text: str) -> dict[str, str | bool]:
    """'partition=gpu,exclusive' is {'partition': 'gpu', 'exclusive': True}."""
    pairs = [pair.strip().removeprefix('--').partition('=') for pair in text.strip(' ,').split(',')]
    if not all(name for name, _, _ in pairs):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of NAME=VALUE or NAME")
    return {name: value if equals else True for name, equals, value in pairs}


def labels(text: str) -> dict[str, str]:
    """The value of --labels: 'dtd=Materials,..'."""
    return dict(pair.split('=', 1) for pair in text.split(','))


# ---------------------------------------------------------------------------------------------- data


CONTENT = 'content'  # of --groups: files of the same bytes
FOLDS = 5  # of a partition without --folds_total
FEWEST = 3  # folds: one tests, the next validates and the rest train
NAME = r'[A-Za-z0-9][A-Za-z0-9_-]{0,63}'  # of --name


class SplitOptions(NamedTuple):
    """How the user's own images are divided; see common/own_data.py."""

    lists: str | None = None  # a CSV of images
    groups: str | None = None  # a regular expression, or CONTENT
    folds_total: int | None = None  # None: FOLDS


AS_IT_IS = SplitOptions()  # no option is given


def split_options(values: dict) -> SplitOptions:
    return SplitOptions(*(values.get(key) for key in SplitOptions._fields))


def split_words(custom: SplitOptions) -> list[str]:
    """The words of a command line that give these options."""
    return [f'--{key}={value}' for key, value in custom._asdict().items() if value is not None]


def add_split_args(group) -> None:
    """How the user's own images are divided: the fields of SplitOptions."""
    text = 'CSV of images, with the columns path and label, optionally subset (or fold) and group'
    group.add_argument('--lists', metavar='CSV', help=text)
    text = (
        'for folder and lists: keep images in one subset if their file names have the same match (or the same first '
        f'group of the pattern); {CONTENT}: if the files are identical'
    )
    group.add_argument('--groups', metavar='REGEX', help=text)

    def folds(text: str) -> int | None:
        return None if int(text) == FOLDS else int(text)

    text = f'for folder and lists: number of folds; {FOLDS} if not given'
    group.add_argument('--folds_total', type=folds, metavar='K', help=text)


def add_dataset_args(group) -> None:
    """The data set, its folder and how it is divided; see choose_dataset."""
    text = (
        f'one of {", ".join(DATASETS)}; if not given, inferred from the layout of --data_dir, or synthetic without it'
    )
    group.add_argument('--dataset', help=text)
    group.add_argument('--data_dir', help='root of the data set; not for synthetic')
    add_split_args(group)


def add_name_arg(group) -> None:
    text = 'name of your own data in run folders, tables and figures; if not given, the --dataset'
    group.add_argument('--name', help=text)


def choose_dataset(dataset: str | None, data_dir: str | Path | None, custom: SplitOptions = AS_IT_IS) -> str:
    """The data set that is named, or else `lists` for a list, or else the one whose layout data_dir has."""
    dataset = dataset or ('lists' if custom.lists is not None else None)
    if dataset is not None and dataset not in DATASETS:
        raise RunError(f"unknown data set '{dataset}'; the data sets are: {', '.join(DATASETS)}")
    if dataset == 'synthetic' and data_dir is not None:
        raise RunError(
            f'--dataset synthetic is drawn and would not read --data_dir {data_dir}; leave --dataset out for the '
            'images there, or --data_dir for the drawn ones'
        )
    dataset = dataset or ('synthetic' if data_dir is None else _layout_of(Path(data_dir)))
    check_split_options(dataset, custom)
    return dataset


def _layout_of(data_dir: Path) -> str:
    for name, entry in DATASETS.items():
        for root in (data_dir, data_dir / entry.get('top', '')):
            if 'layout' in entry and all(next(root.glob(pattern), None) for pattern in entry['layout']):
                return name
    return 'folder'


def check_split_options(dataset: str, custom: SplitOptions) -> None:
    """Raise RunError for options that do not fit the data set."""
    lists, groups, folds_total = custom
    if lists is None and dataset == 'lists':
        raise RunError('--dataset lists needs --lists, a CSV file with the columns path and label')
    if lists is not None and dataset != 'lists':
        raise RunError(f'--lists {lists} is for --dataset lists, not for {dataset}; leave one of them out')
    option = '--groups' if groups is not None else '--folds_total' if folds_total is not None else None
    if option and not DATASETS[dataset].get('own'):
        raise RunError(
            f'{option} is for folder and lists, and {dataset} has folds of its own; leave it out, or name '
            '--dataset folder'
        )
    try:
        re.compile(groups or '')
    except re.error as error:
        raise RunError(f'--groups {groups}: is no regular expression ({error})') from error
    if folds_total is not None and not FEWEST <= folds_total <= 1000:
        raise RunError(
            f'--folds_total {folds_total} must be from {FEWEST} to 1000: one fold tests, one validates, the rest train'
        )


def check_name(name: str | None, dataset: str) -> None:
    """Raise RunError for a --name that is no part of a folder's name, or that is taken."""
    if name is None:
        return
    if not re.fullmatch(NAME, name) or re.search(r'_fold\d', name):
        raise RunError(
            f'--name {shlex.quote(name)} must be letters, digits, - and _, at most 64, the first a letter or digit, '
            "without '_fold1' and the like"
        )
    if name.casefold() in {word.casefold() for key, entry in DATASETS.items() for word in (key, entry['label'])}:
        raise RunError(f'--name {name} is what a data set of the registry is called; take another name')
    if not nameable(dataset):
        raise RunError(f'--name {name}: {dataset} has a name; --name is for folder, lists and trees laid out as dtd')


# ---------------------------------------------------------------------------------------------- groups of options


def add_import_arg(group) -> None:
    text = 'a Python file that registers your own models with timm'
    group.add_argument('--import', dest='imports', metavar='FILE.py', help=text)


def add_labels_arg(parser: argparse.ArgumentParser) -> None:
    text = "display names of data sets, e.g. dtd=Materials for your own images in DTD's layout"
    parser.add_argument('--labels', type=labels, default={}, metavar='KEY=NAME,..', help=text)


def add_run_args(parser: argparse.ArgumentParser) -> None:
    """Which runs: of summarize_runs.py and plot_results.py."""
    parser.add_argument('--run_dir', type=Path, nargs='+', default=[Path('runs')], help='one or more folders of runs')
    parser.add_argument('--models', type=parse_names, help='show only these, in this order, e.g. a,b')
    add_labels_arg(parser)
    text = f'the model with which the others are compared (default: {", else ".join(BASELINES)})'
    parser.add_argument('--baseline', help=text)


def add_inside_args(parser: argparse.ArgumentParser) -> None:
    """What to look into, and at what: of the scripts that draw or measure a trained TwistNet."""
    group = parser.add_argument_group('inside a model')
    group.add_argument('--checkpoint', type=Path, help='best.pt of a run')
    add_import_arg(group)
    group.add_argument('--image', type=Path, help='image to analyse')
    add_data_of_run_args(parser)
    group.add_argument('--subset', choices=('train', 'val', 'test'), help='part of the data set; test if not given')


def add_data_of_run_args(parser: argparse.ArgumentParser) -> None:
    """The data set that a checkpoint runs over; trained.data_of fills in what is not given."""
    group = parser.add_argument_group('data')
    group.add_argument('--dataset', help='data set to use; if not given, that of the run')
    group.add_argument('--data_dir', help='root of the data set; if not given, that of the run')
    group.add_argument('--fold', type=int, help='fold, counted from 1; if not given, that of the run')
    group.add_argument('--lists', metavar='CSV', help='CSV of images; if not given, that of the run')
    text = 'accept a split that differs from the recorded one; its images may have been used to train the model'
    group.add_argument('--other_images', action='store_true', default=None, help=text)  # None: not given


def add_device_args(group) -> None:
    group.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ...')
    group.add_argument('--num_workers', type=int, help='loader processes; does not affect results')


def add_inference_args(parser: argparse.ArgumentParser) -> None:
    """How trained models are run over images."""
    group = parser.add_argument_group('system')
    add_import_arg(group)
    add_device_args(group)
    text = 'auto: precision of the run, if config.json beside the checkpoint records it for this type of device'
    group.add_argument('--amp', choices=AMP, default='auto', help=text)
    group.add_argument('--batch_size', type=int, default=64, help='images per batch; train.py tests with 64')
    add_fuse_arg(group)


def add_fuse_arg(group) -> None:
    text = 'faster for many images: BatchNorm is merged into convolutions; the last digits differ'
    group.add_argument('--fuse', action='store_true', help=text)


def add_data_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('data')
    add_dataset_args(group)
    group.add_argument('--fold', type=int, default=1, help='fold, counted from 1')
    text = 'trainval: also train on the validation images; the last epoch is then tested'
    group.add_argument('--train_on', choices=('train', 'trainval'), help=text)
    group.add_argument('--img_size', type=int, help='side of the square input in pixels')
    add_name_arg(group)


def add_model_arg(group) -> None:
    text = 'a name listed by `python models.py`, any timm model, or stci_NAME: the timm CNN NAME with STCI inserted'
    group.add_argument('--model', default='twistnet18', help=text)
    add_import_arg(group)


def add_model_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('model')
    add_model_arg(group)
    text = (
        'start from pretrained weights; without PATH: the registered ImageNet weights (see weights/README.md) or those '
        'of timm; PATH: a file (.pt, .pth, .safetensors); trunk or trunk=PATH: load a whole ResNet-18 into the trunk '
        'of TwistNet-18, instead of only stem, layer1 and layer2'
    )
    group.add_argument('--pretrained', nargs='?', const=True, default=False, metavar='PATH', help=text)
    text = (
        "modules that do not learn, by timm's names, e.g. conv1,bn1,layer1; all: all but the classifier. Their "
        'BatchNorms stay in evaluation mode'
    )
    group.add_argument('--freeze', type=joined_names, metavar='NAME,..', help=text)


def add_optimisation_args(
    parser: argparse.ArgumentParser, batch_of: str = 'images per step, over all processes'
) -> None:
    group = parser.add_argument_group('optimisation (SGD with Nesterov momentum by default, cosine schedule)')
    group.add_argument('--epochs', type=int)
    group.add_argument('--batch_size', type=int, help=batch_of)
    group.add_argument('--lr', type=float, help='learning rate after the warm-up')
    group.add_argument('--min_lr', type=float, help='learning rate of the last step')
    group.add_argument('--warmup_epochs', type=int, help='epochs of linear warm-up')
    group.add_argument('--momentum', type=float, help='for sgd and similar optimisers; adamw has none')
    group.add_argument('--weight_decay', type=float)
    group.add_argument('--clip_grad', type=float, help='maximum gradient norm; 0: no clipping')
    group.add_argument('--label_smoothing', type=float, help='also applied to mixed targets')


def add_optimizer_args(parser: argparse.ArgumentParser) -> None:
    """What of the optimisation train.py lets a run choose, beyond the recipe; see NEUTRAL."""
    group = parser.add_argument_group('optimiser')
    add_opt_args(group)
    text = 'factor on the learning rate of the gates of STCI branches'
    group.add_argument('--gate_lr', type=float, metavar='FACTOR', help=text)
    text = 'average the weights over the steps; the averaged weights are validated, selected, saved and tested'
    group.add_argument('--ema', action=SWITCH, help=text)
    group.add_argument('--ema_decay', type=float, help=EMA_DECAY)
    text = 'stop N epochs after the one that validates best; the learning rate follows --epochs all the same'
    group.add_argument('--patience', type=int, metavar='N', help=text)
    text = (
        'balanced: in the training loss, class c (of K, with n_c of n training images) has weight n / (K n_c), also in '
        'mixed and smoothed targets; validation and test losses are unweighted'
    )
    group.add_argument('--class_weights', choices=('balanced',), help=text)
    parser.set_defaults(**NEUTRAL)


def add_opt_args(group) -> None:
    """OPTIMIZER, of both trainers."""
    text = (
        'sgd or any timm optimiser: adamw, lion, lamb, ... Weight decay applies to all parameters with sgd; with '
        'the others, as in timm, only to those with two or more dimensions: not to biases, norms and gates'
    )
    group.add_argument('--opt', type=str.lower, metavar='NAME', help=text)
    text = (
        'factor by which the learning rate falls from each block to the one before, e.g. 0.75; the classifier uses --lr'
    )
    group.add_argument('--layer_decay', type=float, metavar='FACTOR', help=text)


def add_augmentation_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('augmentation')
    group.add_argument(
        '--crop_scale',
        type=float,
        nargs=2,
        metavar=('MIN', 'MAX'),
        help="range of the crop's area, as a share of the image",
    )
    group.add_argument('--hflip', type=float, help='probability of a horizontal flip')
    group.add_argument('--randaug_n', type=int, help='RandAugment operations per image; 0: none')
    group.add_argument('--randaug_m', type=int, help='magnitude of RandAugment, 0 to 30')
    group.add_argument('--mixup', type=float, help='alpha of Mixup; 0: off')
    text = 'alpha of CutMix; 0: off. If both are on, each batch uses one of the two'
    group.add_argument('--cutmix', type=float, help=text)


def add_view_args(parser: argparse.ArgumentParser) -> None:
    """What train.py lets a run choose for images that are not square or have no up, beyond the recipe; see NEUTRAL."""
    group = parser.add_argument_group('images that are not square, or have no up')
    text = (
        'how images become square. crop: the middle; squash: the whole image, stretched; pad: the whole image, with '
        "borders in the mean colour of the model's normalisation. Training crops then have the proportions of the "
        'image and are squashed or padded too. Recorded in best.pt, which the other scripts follow'
    )
    group.add_argument('--resize', choices=RESIZE, help=text)
    group.add_argument('--vflip', type=float, metavar='P', help='probability of a vertical flip')
    text = 'turn by 0, 90, 180 or 270 degrees, or by any angle, with corners mirrored at the sides'
    group.add_argument('--rotate', choices=('quarter', 'any'), help=text)
    text = "probability of timm's random erasing: a rectangle of 2 to 33 %% of the area becomes noise"
    group.add_argument('--erase', type=float, metavar='P', help=text)
    parser.set_defaults(**NEUTRAL)


def add_system_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('system')
    group.add_argument('--seed', type=int, default=42)
    add_device_args(group)
    group.add_argument(
        '--amp', choices=AMP, default='auto', help='auto: bf16 if native, else fp16 on CUDA and off on CPUs'
    )
    group.add_argument('--compile', action=SWITCH, default=False, help='use torch.compile')


# ---------------------------------------------------------------------------------------------- training scripts


def get_args_parser() -> argparse.ArgumentParser:
    parser = new_parser('train.py', 'Train one model on one fold of one data set.')
    text = "default values of the options below; if not given, 'demo' for synthetic and 'default' for other data sets"
    parser.add_argument('--recipe', choices=tuple(RECIPES), help=text)
    for add in (add_data_args, add_model_args, add_optimisation_args, add_optimizer_args, add_augmentation_args):
        add(parser)
    add_view_args(parser)
    add_system_args(parser)
    text = 'where decoded images are kept, for all your runs on this machine (see TRAINING.md)'
    parser.add_argument('--cache', choices=CACHES, default='ram', help=text)
    parser.add_argument('--run_dir', default='runs', help='folder in which run folders are created')
    parser.add_argument('--force', action='store_true', help='discard the run in the folder and start again')
    text = 'also write the lines of log.jsonl as event files, for `tensorboard --logdir RUN_DIR`'
    parser.add_argument('--tensorboard', action='store_true', help=text)
    # What run_all.py --tune says of the options that it chose, for config.json and tables.
    parser.add_argument('--tuned', type=json.loads, help=argparse.SUPPRESS)
    parser.set_defaults(**RECIPES['default'])
    return parser


def get_pretraining_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        'pretrain_imagenet.py', 'Pretrain a model on ImageNet-1K, or any tree of train/ and val/ class folders.'
    )
    group = parser.add_argument_group('data and model')
    text = 'contains train/ and val/, each with one folder per class, or ILSVRC as downloaded'
    group.add_argument('--data_dir', required=True, help=text)
    group.add_argument('--img_size', type=int, help='side of the square input in pixels')
    add_model_arg(group)
    text = 'do not train; print the accuracy of these weights on val/: a file of this script or of timm'
    group.add_argument('--eval', type=Path, metavar='PATH', help=text)
    add_optimisation_args(parser, batch_of='images per process')
    add_augmentation_args(parser)
    add_system_args(parser)
    group = parser.add_argument_group('pretraining')
    add_opt_args(group)
    text = "stochastic depth (timm's drop_path_rate) where the model has it; if not given, the model's own"
    group.add_argument('--drop_path', type=float, metavar='RATE', help=text)
    group.add_argument(
        '--accumulate', type=int, default=1, help='batches per process whose gradients are accumulated for one step'
    )
    group.add_argument(
        '--scale_lr',
        action=SWITCH,
        default=True,
        help=f'treat --lr as the rate for a global batch of {BASE_BATCH}, and scale it',
    )
    group.add_argument('--sync_bn', action=SWITCH, default=False, help='share BatchNorm statistics between GPUs')
    group.add_argument('--ema', action=SWITCH, default=False, help='average the weights over the steps')
    group.add_argument('--ema_decay', type=float, default=NEUTRAL['ema_decay'], help=EMA_DECAY)
    group.add_argument('--checkpoint_dir', default='checkpoints', help='folder of latest.pt, previous.pt and log.jsonl')
    group.add_argument('--resume', metavar='PATH', help='checkpoint to resume from, or auto for the newest')
    group.add_argument('--save_minutes', type=float, default=15, help='minutes between checkpoints within an epoch')
    group.add_argument(
        '--weights_dir', default=WEIGHTS_DIR, help='folder in which the best weights are saved at the end'
    )
    group.add_argument('--overwrite', action='store_true', help='replace existing weights')
    group.add_argument('--max_bad_images', type=int, default=100, help='unreadable images tolerated per epoch')
    group.add_argument(
        '--max_skipped', type=int, default=5, help='consecutive non-finite steps in fp16 that end the run'
    )
    parser.set_defaults(**IMAGENET, **FIXED, **OPTIMIZER)
    return parser


def new_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser that shows defaults and takes no abbreviations."""
    shown = argparse.ArgumentDefaultsHelpFormatter
    return argparse.ArgumentParser(prog=prog, description=description, formatter_class=shown, allow_abbrev=False)


def read(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line, with `given`: the names of the options that it contains."""
    args = parser.parse_args(argv)
    blank = argparse.Namespace(**dict.fromkeys(vars(args)))  # argparse sets no default for an existing attribute
    args.given = sorted(name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not None)
    return args


def fill(args: argparse.Namespace, recipe: dict) -> argparse.Namespace:
    """Set options that were not given to the recipe's values, lowered to fit those that were (see lowered_defaults)."""
    for name, value in recipe.items():
        if name not in args.given:
            setattr(args, name, value)
    if 'warmup_epochs' not in args.given:
        args.warmup_epochs = max(0, min(args.warmup_epochs, args.epochs - 1))
    if 'min_lr' not in args.given:
        args.min_lr = min(args.min_lr, args.lr)
    return args


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of train.py from the command line, those not given from the recipe."""
    args = read(get_args_parser(), argv)
    args.dataset = choose_dataset(args.dataset, args.data_dir, split_options(vars(args)))
    check_name(args.name, args.dataset)
    args.recipe = args.recipe or ('demo' if args.dataset == 'synthetic' else 'default')
    return fill(args, RECIPES[args.recipe])


def parse_pretraining_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of pretrain_imagenet.py from the command line."""
    return fill(read(get_pretraining_parser(), argv), IMAGENET)


def defining(values: dict, neutral: dict = NEUTRAL, system: set[str] = SYSTEM_OPTIONS) -> dict:
    """Of train.py's options by name, those that can change a bit of the result: the part of them in a fingerprint."""
    unchanged = {k for k, v in neutral.items() if values.get(k, v) == v}
    return {k: v for k, v in values.items() if k not in system and k not in unchanged}


def pretraining_defining(values: dict) -> dict:
    """The same of pretrain_imagenet.py's."""
    return defining(values, PRETRAINING_NEUTRAL, PRETRAINING_SYSTEM_OPTIONS)


# ---------------------------------------------------------------------------------------------- values


def largest_batch(values: dict, n_train: int, n_images: int, processes: int) -> int:
    """The default batch size, lowered to what the training images of a fold fill and the processes can share equally.

    Every fold of a stratified partition trains with at least two fifths of its n_images, but not with the same number;
    the batch is the same in all of them. It is a fifth where options divide the images: into three folds, say.
    """
    fifths = 1 if any(split_options(values)) else 2
    return min(values['batch_size'], n_train, fifths * n_images // 5) // processes * processes


def check_batch(args: argparse.Namespace, n_train: int, n_images: int, world: int) -> None:
    """Lower a default batch size to what the data and the processes can fill; raise RunError for a given one."""
    if 'batch_size' not in args.given:
        args.batch_size = largest_batch(vars(args), n_train, n_images, world)
    if not 2 * world <= args.batch_size <= n_train:
        raise RunError(
            f'--batch_size {args.batch_size} must be from {2 * world} (two images a process, for BatchNorm) to the '
            f'{n_train} training images'
        )
    if args.batch_size % world:
        raise RunError(f'--batch_size {args.batch_size} must be a multiple of the {world} processes')


def lowered_defaults(args: argparse.Namespace, recipe: dict) -> list[str]:
    """One line for each default that was lowered, with what it had to fit, or that is another optimiser's."""
    bounds = dict(
        warmup_epochs=f'--epochs {args.epochs}',
        min_lr=f'--lr {args.lr:g}',
        batch_size='the training set and the number of processes',
    )
    notes = [
        f'note: --{name} is {getattr(args, name):g}, not its default {recipe[name]:g}, to fit {bound}'
        for name, bound in bounds.items()
        if name not in args.given and getattr(args, name) != recipe[name]
    ]
    if args.opt != 'sgd' and 'lr' not in args.given:
        notes.append(f"note: --lr {args.lr:g} is the recipe's for sgd; --opt {args.opt} may need another one")
    return notes


def check_names(option: str, names: Iterable[str], known: dict) -> None:
    """Raise RunError for a name that the registry does not have."""
    if unknown := [name for name in names if name not in known]:
        raise RunError(f"--{option}: unknown '{unknown[0]}'; there are: {', '.join(known)}")


def check_bounds(args: argparse.Namespace, **bounds: tuple[float, float]) -> None:
    """Raise RunError for a value outside BOUNDS or `bounds`."""
    for name, (low, high) in (BOUNDS | bounds).items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:  # NaN fails too
            raise RunError(f'--{name} {value} must be from {low} to {high}')


def check_model(name: str) -> None:
    """Raise RunError for a name that neither the registry nor timm knows; only for timm's names is it imported."""
    if name in MODELS:
        return
    from common.timm_models import problem_of

    if problem := problem_of(name):
        raise RunError(problem)


def has_momentum(opt: str) -> bool:
    """Whether an optimiser takes --momentum. Raises RunError for one that timm does not have or no run can use."""
    if opt in MOMENTUM:
        return MOMENTUM[opt]
    import timm.optim  # here, because it imports torch

    names = timm.optim.list_optimizers(exclude_filters=UNUSABLE)
    if opt not in names:
        close = get_close_matches(opt, names, n=5, cutoff=0.5) or [*MOMENTUM, 'lion', 'lamb']
        raise RunError(
            f'--opt {opt}: no optimiser of timm {timm.__version__} that runs can use; there are {", ".join(close)}, ..'
        )
    return timm.optim.get_optimizer_info(opt).has_momentum


def fit_to_model(args: argparse.Namespace) -> None:
    """Import the file of --import, refuse an unknown model, and set an --img_size that is not given to its model's own.

    The registry's models keep the recipe's size, and a recipe that is small on purpose (demo) keeps its own.
    """
    if args.imports is None and args.model in MODELS:  # so that no torch is imported
        return
    from common.timm_models import import_file, own_settings

    import_file(args.imports)
    check_model(args.model)
    if not is_own(args.model) and 'img_size' not in args.given and args.img_size == DEFAULT['img_size']:
        args.img_size = own_settings(args.model, getattr(args, 'pretrained', False))['img_size']


def check_trainval(args: argparse.Namespace) -> None:
    """Raise RunError for a run on train and val that needs images of validation, or is the same as another fold's."""
    if args.patience is not None:
        raise RunError(f'--patience {args.patience} needs images of validation, and --train_on trainval has none')
    if args.fold > 1 and DATASETS[args.dataset].get('shared_test'):
        raise RunError(
            f'--fold {args.fold}: with --train_on trainval all folds of {args.dataset} train and test the same images; '
            'give fold 1 alone, with several seeds'
        )


def check(args: argparse.Namespace) -> None:
    """Fit the options to the model, and raise RunError or ModelError for those that no run can have on any data."""
    fit_to_model(args)
    check_bounds(args)
    low, high = args.crop_scale
    if not 0 < low <= high <= 1:
        raise RunError(f'--crop_scale {low} {high} must be two areas, 0 < MIN <= MAX <= 1')
    if not 0 <= args.warmup_epochs < args.epochs:
        raise RunError(f'--epochs {args.epochs} must be greater than --warmup_epochs {args.warmup_epochs}')
    if getattr(args, 'train_on', 'train') == 'trainval':
        check_trainval(args)
    if getattr(args, 'tensorboard', False) and find_spec('tensorboard') is None:
        raise RunError('--tensorboard needs a package that is not installed: `pip install tensorboard`')
    if args.min_lr > args.lr:
        raise RunError(f'--min_lr {args.min_lr} must not exceed --lr {args.lr}')
    if not args.ema and 'ema_decay' in args.given:
        raise RunError(f'--ema_decay {args.ema_decay} is of --ema, which is not given')
    if not has_momentum(args.opt) and 'momentum' in args.given:
        raise RunError(f'--momentum {args.momentum}: {args.opt} has no such option; leave one of the two out')
    # A model of a file to import may have gates of its own: training/engine.py sees when it is built.
    known = args.model in MODELS or args.imports is None
    if args.gate_lr != 1 and known and not has_stci(entry_of(args.model)):
        raise RunError(NO_GATES.format(**vars(args)))
    if problem := size_problem(args.model, args.img_size):
        raise RunError(problem)
