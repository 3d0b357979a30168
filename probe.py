"""Frozen features: simple classifiers on the pooled output of models that are not trained on the data set.

    python probe.py --models resnet18,tf_efficientnet_lite0=weights/lite0.safetensors --data_dir data/fmd --folds 1-5
    python probe.py --checkpoint runs/main/dtd_fold1_twistnet18_seed42/best.pt --data_dir data/fmd --shots 1,5,10

--models are models with their ImageNet weights, or those of NAME=PATH; a --checkpoint is the model in it. The
features are the input of the classifier, or the output of --layer, averaged over positions. Classifiers and settings
are those of RADAM (Scabini et al., 2023), on features as they are: 1-NN, linear discriminant analysis with the
shrinkage of Ledoit and Wolf, and a linear SVM with C = 1. Each result is a run folder for summarize_runs.py and
plot_results.py. --shots draws that many training images per class, by --seeds. A model is run once over each image:
features are kept by its weights, the preprocessing and the image file. Weights that a run trained are probed on folds
whose test images they did not see.
"""

import argparse
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sklearn
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

from common import distributed, options, predictions, runs
from common.distributed import say
from common.errors import RunError, user_errors
from common.options import check_name, split_options
from common.registry import PROBES, UNSURE
from common.results import CELL
from common.splits import Splits, split_digest
from common.timm_models import import_digest
from compute_flops import measure
from datasets import splits_of, tree_digest
from training import features, trained
from training.features import FrozenBackbone, Items
from transforms import eval_settings, seed_of

CLASSIFIERS = dict(  # each of PROBES
    knn=lambda: KNeighborsClassifier(n_neighbors=1),
    lda=lambda: LinearDiscriminantAnalysis(solver='lsqr', shrinkage='auto'),
    svm=lambda: SVC(kernel='linear', C=1),
)


# ---------------------------------------------------------------------------------------------- what is probed


class Probe(NamedTuple):
    """A result to come."""

    frozen: FrozenBackbone
    fold: int
    seed: int
    shots: int | None  # training images a class; None for all
    classifier: str  # a key of CLASSIFIERS
    caution: str | None  # a key of trained.CAUTIONS

    @property
    def model(self) -> str:
        """What run folder and tables call it."""
        return f'{self.frozen.name}+{self.classifier}' + f'_{self.shots}shot' * bool(self.shots)

    def folder_in(self, args: argparse.Namespace) -> Path:
        return args.run_dir / runs.run_name(args.name or args.dataset, self.fold, self.model, self.seed)


def list_probes(args: argparse.Namespace, backbones: list[FrozenBackbone], splits: dict[int, Splits]) -> list[Probe]:
    """The results that the options ask for; each has a name of its own."""
    probes, named = [], {}
    for frozen in backbones:
        folds, caution = folds_of(frozen, args, splits)
        cells = [(fold, seed) for fold in folds for seed in args.seeds or [frozen.seed]]
        for shots in args.shots or [None]:
            check_cells(args, splits, cells, shots)
            probes += [Probe(frozen, *cell, shots, key, caution) for cell in cells for key in args.classifiers]
    for probe in probes:
        name = probe.folder_in(args).name
        if (other := named.setdefault(name, probe)) is not probe:
            both = f'{other.frozen.origin} and {probe.frozen.origin}'
            raise RunError(f'{both} are both {name} in results; probe them with a --run_dir each')
    if 1 in (args.shots or ()) and 'lda' in args.classifiers:
        say('note: no lda with 1 image a class: it takes two, to see how they differ')
    return [probe for probe in probes if (probe.shots, probe.classifier) != (1, 'lda')]


def folds_of(
    frozen: FrozenBackbone, args: argparse.Namespace, splits: dict[int, Splits]
) -> tuple[list[int], str | None]:
    """The folds whose test images did not train a model, and a key of trained.CAUTIONS where that is not so."""
    if frozen.file is None:
        return args.folds, None
    known = trained.images_of(frozen.file, args.data_dir)
    if known is None:
        say(f'note: {frozen.file}: {trained.CAUTIONS[trained.UNCHECKED]}')
        return args.folds, trained.UNCHECKED
    seen = {fold: trained.count_seen(known, splits[fold].test) for fold in args.folds}
    clean = [fold for fold in args.folds if not seen[fold]]
    if len(clean) == len(args.folds):
        return clean, None
    if args.other_images:
        return args.folds, trained.OTHER
    listed = ', '.join(f'{seen[fold]} of {len(splits[fold].test)} in fold {fold}' for fold in args.folds if seen[fold])
    if not clean:
        raise RunError(
            f'--folds: {frozen.file}: images that are tested may have trained it ({listed}); give a fold that it did '
            'not see, or --other_images, and the results say so'
        )
    kept = ', '.join(map(str, clean))
    say(f'note: {frozen.file}: only --folds {kept}: images that others test may have trained it ({listed})')
    return clean, None


def training_images(args: argparse.Namespace, splits: Splits) -> Items:
    return splits.train + (splits.val if args.train_on == 'trainval' else [])


def draw(items: Items, shots: int | None, seed: int, fold: int) -> Items:
    """`shots` images a class, at random by seed and fold; more shots add images to those of fewer. None: all."""
    if shots is None:
        return items
    order = np.random.default_rng(seed_of('shots', seed, fold)).permutation(len(items))
    drawn = defaultdict(list)
    for index in order:
        drawn[items[index][1]].append(items[index])
    fewest = min(drawn.values(), key=len)
    if len(fewest) < shots:
        count = runs.counted(len(fewest), 'training image')
        raise RunError(f'--shots {shots}: the class of {fewest[0][0]} has {count} in fold {fold}')
    return sorted(item for of_class in drawn.values() for item in of_class[:shots])


def check_cells(args: argparse.Namespace, splits: dict[int, Splits], cells: list[tuple[int, int]], shots: int | None):
    """Raise RunError for two (fold, seed) of one model that fit and test the same images: they are one result."""
    seen = {}
    for fold, seed in cells:
        fitted = draw(training_images(args, splits[fold]), shots, seed, fold)
        key = frozenset(fitted), frozenset(splits[fold].test)
        if (other := seen.setdefault(key, (fold, seed))) != (fold, seed):
            given = f'--train_on {args.train_on}' + f' --shots {shots}' * bool(shots)
            both = f'fold {other[0]} seed {other[1]} and fold {fold} seed {seed} of {args.dataset}'
            raise RunError(f'{given}: {both} fit and test the same images, so they are one result; give one of them')


# ---------------------------------------------------------------------------------------------- a run


def describe(probe: Probe, args: argparse.Namespace, splits: Splits, tree: str, device: torch.device) -> dict:
    """What config.json holds; the recipe says `probe`, so that no table pools it with runs of train.py."""
    frozen = probe.frozen
    defines = dict(
        dataset=args.dataset,
        fold=probe.fold,
        seed=probe.seed,
        model=probe.model,
        img_size=frozen.preprocessing.img_size,
        probe=args.layer or 'last layer',
        train_on=args.train_on,
        shots=probe.shots,
        split=split_digest(splits),
        pretrained=frozen.pretrained,
        weights=frozen.weights,
        preprocessing=eval_settings(*frozen.preprocessing),
    )
    defines |= {key: getattr(args, key) for key in options.OWN_DATA if getattr(args, key) is not None}
    if args.imports:
        defines['imported'] = import_digest(args.imports)
    checkpoint = frozen.file if frozen.file in args.checkpoint else None
    values = vars(args) | dict(checkpoint=checkpoint, fold=probe.fold, seed=probe.seed)
    values = {key: str(value) if isinstance(value, Path) else value for key, value in values.items() if key != 'force'}
    return dict(
        options=values,
        defines=defines,
        environment=distributed.environment_of(device) | dict(sklearn=sklearn.__version__),
        fingerprint=runs.fingerprint(defines),
        tree=tree,
    )


def run_probe(probe: Probe, args: argparse.Namespace, splits: Splits, config: dict, known: dict, size: dict) -> dict:
    """Fit the classifier and test it once; returns what results.json holds.

    `known` has the features of an image by its path, `size` the parameters and MACs of the model.
    """
    start = time.perf_counter()
    pool = training_images(args, splits)
    fitted = draw(pool, probe.shots, probe.seed, probe.fold)

    def arrays(items: list[tuple[str, int]]) -> tuple[np.ndarray, np.ndarray]:
        rows = np.stack([known[path] for path, _ in items]).astype(np.float64)
        return rows, np.array([label for _, label in items])

    classifier = CLASSIFIERS[probe.classifier]().fit(*arrays(fitted))
    accuracy = {}
    for subset in ('val', 'test'):
        rows, labels = arrays(getattr(splits, subset))
        if probe.classifier in UNSURE:
            predicted = classifier.predict(rows)
            chances = np.full((len(rows), len(splits.classes)), np.nan, np.float32)
        else:
            chances = classifier.predict_proba(rows).astype(np.float32)
            predicted = chances.argmax(1)
        accuracy[subset] = 100 * float((predicted == labels).mean())
    cell = {key: value for key, value in config['defines'].items() if key in (*CELL, 'name')}
    results = cell | dict(
        test_acc=accuracy['test'],
        best_val_acc=None if args.train_on == 'trainval' else accuracy['val'],
        features=rows.shape[1],
        **size,
        seconds=round(time.perf_counter() - start, 1),  # without those of the features
        n_train=len(fitted),
        n_pool=len(pool),  # what --shots draws from
        n_val=len(splits.val),
        n_test=len(splits.test),
        pretrained=probe.frozen.model.pretrained or probe.frozen.pretrained,
        loaded=1.0 if probe.frozen.model.loaded is None else probe.frozen.model.loaded,  # a checkpoint: all
        caution=probe.caution,
        fingerprint=config['fingerprint'],
    )
    folder = probe.folder_in(args)
    path = folder / runs.PREDICTIONS
    predictions.write_predictions(path, splits.test, splits.classes, chances, splits.root, predicted)
    runs.write_json(folder / 'results.json', results)
    return results


# ---------------------------------------------------------------------------------------------- command line


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Train simple classifiers on the frozen features of models.', allow_abbrev=False
    )
    group = parser.add_argument_group('features')
    text = 'models with ImageNet weights, or with those of a file, e.g. a,b=PATH'
    group.add_argument(
        '--models', type=options.parse_names, default=[], metavar='NAME[=PATH],..', help=text, **options.LIST
    )
    group.add_argument('--checkpoint', type=Path, nargs='+', default=[], metavar='BEST.PT', help='best.pt of runs')
    options.add_import_arg(group)
    options.add_fuse_arg(group)
    group.add_argument('--layer', help='name of a module, e.g. layer3; if not given, the input of the classifier')
    group.add_argument(
        '--img_size', type=int, help='side of the square input in pixels; if not given, that of the model'
    )
    text = 'how images become square for --models, as for train.py (default: crop); a checkpoint has its own'
    group.add_argument('--resize', choices=options.RESIZE, help=text)
    group.add_argument(
        '--features_dir', type=Path, help='folder in which features are kept (default: RUN_DIR/features)'
    )
    group = parser.add_argument_group('data')
    options.add_dataset_args(group)
    options.add_name_arg(group)
    group.add_argument('--folds', type=options.parse_numbers, default=[1], help='e.g. 1-5 (default: 1)', **options.LIST)
    text = 'accept folds whose test images may have been used to train the checkpoint; the results state this'
    group.add_argument('--other_images', action='store_true', help=text)
    group = parser.add_argument_group('classifiers')
    text = f'any of {",".join(PROBES)} (default: all)'
    group.add_argument('--classifiers', type=options.parse_names, default=list(PROBES), help=text, **options.LIST)
    text = 'images to which the classifier is fitted: train, or train and val (default)'
    group.add_argument('--train_on', choices=('train', 'trainval'), default='trainval', help=text)
    group.add_argument(
        '--shots', type=options.parse_numbers, help='training images per class, e.g. 1,5,10', **options.LIST
    )
    group.add_argument(
        '--seeds',
        type=options.parse_numbers,
        help='seeds with which --shots draws images (default: 42)',
        **options.LIST,
    )
    group = parser.add_argument_group('system')
    group.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ...')
    group.add_argument('--num_workers', type=int, help='loader processes')
    group.add_argument(
        '--run_dir', type=Path, default=Path('runs/probe'), help='folder in which run folders are created'
    )
    group.add_argument('--force', action='store_true', help='repeat complete runs')
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked. Raises RunError."""
    args = get_args_parser().parse_args(argv)
    args.dataset = options.choose_dataset(args.dataset, args.data_dir, split_options(vars(args)))
    check_name(args.name, args.dataset)
    options.check_names('classifiers', args.classifiers, PROBES)
    options.check_bounds(args)
    if not args.models and not args.checkpoint:
        raise RunError('nothing to probe: give --models NAME,.. or --checkpoint BEST.PT')
    if args.shots is not None and 0 in args.shots:
        raise RunError('--shots 0: at least one image a class')
    if args.seeds and not args.shots:
        raise RunError('--seeds draws the images of --shots; without these every seed gives the same result')
    if args.shots == [1] and args.classifiers == ['lda']:
        raise RunError('--shots 1: lda needs two images a class, to see how they differ')
    args.features_dir = args.features_dir or args.run_dir / 'features'
    return args


def main(args: argparse.Namespace) -> None:
    splits = {fold: splits_of(vars(args), fold=fold) for fold in args.folds}
    tree = tree_digest(splits[args.folds[0]])
    device = distributed.setup(args.device, 0)
    backbones = features.frozen_backbones(args)
    images = sorted({item for fold in splits.values() for subset in fold[:3] for item in subset})
    known = {}
    for probe in list_probes(args, backbones, splits):
        folder, fold = probe.folder_in(args), splits[probe.fold]
        config = describe(probe, args, fold, tree, device)
        runs.claim(folder)
        results, _ = runs.open_run(folder, config, args.force)
        if results is None:
            if (key := (probe.frozen.name, probe.frozen.origin)) not in known:
                size = measure(probe.frozen.name, 2, probe.frozen.preprocessing.img_size)  # with a small classifier
                place = args.features_dir, device, args.num_workers
                rows = features.features_of(probe.frozen, args.layer, images, *place)
                known[key] = rows, {name: size[name] for name in ('params_M', 'macs_G')}
            results = run_probe(probe, args, fold, config, *known[key])
        else:
            say(f'{folder} is complete; --force would make it again')
        print(f'{folder}: test accuracy {results["test_acc"]:.2f} %')


if __name__ == '__main__':
    stopped = 'stopped; the same command makes what is missing'
    with user_errors('probe.py'), distributed.training_process('probe.py', stopped, (signal.SIGTERM, signal.SIGINT)):
        main(parse_args())
