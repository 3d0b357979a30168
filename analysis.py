"""What a trained TwistNet makes of channels and directions: numbers, tests and figures that can say no.

    python analysis.py --checkpoint runs/dtd_fold1_twistnet18_seed42/best.pt --save_dir analysis
    python analysis.py --checkpoint best.pt --data_dir data/dtd --dataset dtd --fold 1 --question spiral

information  how much the channels of a head share, in one place, a step away and elsewhere in an image
features     a linear probe on the head's displaced products, the Gram matrix and bilinear pooling
directions   do classes differ in the direction along which the channels repeat
spiral       the same weights without twists, with heads permuted, on turned images with twists and without
gates        where the gates end, and what closing them costs

Data set, fold and folder are those of the run (config.json beside the checkpoint) unless given; a split that is not the
one of the run is refused, unless --other_images asks for it, and then the report says so. Only images that did not
train are read: spiral and gates take the test set, the others validation and test together. save_dir gets
report.md, whose sentences are made from report.json, and a figure a question; the same seed gives the same bytes.
p values are two-sided and Holm-corrected over all tests of a question. They take images as independent: where several
are copies of one picture, each counts, and p is too small. --copies names such files, and of each picture the first is
read. Images of validation chose the epoch of the checkpoint.

Here a checkpoint and its images become numbers. information.py estimates, significance.py tests, findings.py makes the
words and the figures.
"""

import argparse
import copy
import math
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import RepeatedStratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.random_projection import SparseRandomProjection
from torch import nn

import loader
from common import distributed, options, runs, statistics
from common.drawing import save
from common.errors import RunError, UserError, user_errors
from common.registry import dataset_label
from common.runs import counted
from common.statistics import LEVEL, class_test, correct, corrected_t_test, kruskal, mcnemar, paired, standardised
from datasets import bits_of, open_image
from interpret import findings, information, trace
from interpret.information import ANGLES
from interpret.trace import Block, Subject
from loader import ImageList
from models import TwistNet, blocks_of
from plot_results import initial_gate
from transforms import eval_transform, normalize

MAX_IMAGES = 256  # for mutual information, whose time grows with the square
MIN_IMAGES = 40
DIMENSION = 64  # of every kind of feature under the probe
SKETCH = 1024  # dimension to which longer features are projected at random before that
FOLDS, REPEATS = 5, 2  # of the probe's cross-validation


class Held(NamedTuple):
    """The images of a fold that did not train, the test set first."""

    images: torch.Tensor  # (N, 3, img_size, img_size) uint8
    labels: np.ndarray  # (N,), class indices
    n_test: int
    n_copies: int = 0  # left out

    @property
    def test(self) -> 'Held':
        return Held(self.images[: self.n_test], self.labels[: self.n_test], self.n_test, self.n_copies)


# ---------------------------------------------------------------------------------------------- reading


def read_images(subject: Subject, settings: dict, with_val: bool) -> Held:
    """The test images of the fold, and those of validation behind them.

    Args:
        subject: the model.
        settings: of trace.data_of; copies.
        with_val: read those of validation too.

    Raises:
        RunError: with_val, and a class has a single image. DataError: an image cannot be read.
    """
    splits = settings['splits']
    items = splits.test + (splits.val if with_val else [])
    kept = without_copies(items, settings['copies'])
    n_test = len(set(kept) & set(splits.test))
    items, n_copies = kept, len(items) - len(kept)
    labels = np.array([label for _, label in items])
    counts = np.bincount(labels, minlength=len(splits.classes))
    if with_val and counts.min() < 2:
        name, has = splits.classes[counts.argmin()], ('no image', 'one image')[counts.min()]
        raise RunError(
            f"class '{name}' has {has} in validation and test together, and comparing classes takes two of each; "
            'add images, or ask --question spiral or gates'
        )
    bits, _ = bits_of(splits)
    data = ImageList(items, eval_transform(subject.img_size), partial(open_image, bits=bits))
    return Held(torch.stack([data[i][0] for i in range(len(data))]), labels, n_test, n_copies)


def without_copies(items: list[tuple[Path, int]], pattern: str | None) -> list[tuple[Path, int]]:
    """Of the images of a class whose file names begin with a match of the pattern, and the same one, the first."""
    first: dict = {}
    for path, label in items:
        match = re.match(pattern, Path(path).name) if pattern else None
        first.setdefault((label, match.group() if match else path), (path, label))
    return list(first.values())


def batches(model: TwistNet, images: torch.Tensor) -> Iterator[torch.Tensor]:
    device = next(model.parameters()).device
    for batch in images.split(loader.EVAL_BATCH):
        yield normalize(batch.to(device))


def collect(subject: Subject, images: torch.Tensor, take: Callable[[str, Block], dict]) -> dict[str, dict]:
    """take(name, block) of every TwistBlock, a dictionary of tensors (B, ..), over all images: arrays by block."""
    parts: dict[str, list[dict]] = {}
    for batch in batches(subject.model, images):
        for name, block in trace.observe(subject.model, batch).blocks.items():
            parts.setdefault(name, []).append({key: value.cpu().numpy() for key, value in take(name, block).items()})
    return {name: {key: np.concatenate([p[key] for p in found]) for key in found[0]} for name, found in parts.items()}


# ---------------------------------------------------------------------------------------------- information


def measure_information(subject: Subject, held: Held, settings: dict) -> dict:
    rng = np.random.default_rng([settings['seed'], 1])
    chosen = rng.permutation(len(held.images))[:MAX_IMAGES]
    if len(chosen) < MIN_IMAGES:
        raise RunError(f'{len(chosen)} images are too few for mutual information; it takes at least {MIN_IMAGES}')
    modules = blocks_of(subject.model)

    def take(name: str, block: Block) -> dict:  # before the L2 norm, which ties the channels of a head
        stci = modules[name].stci
        with torch.inference_mode():
            return dict(z=F.relu(stci.reduce(block.h)).unflatten(1, (stci.num_heads, stci.c_red)))

    blocks, bias = {}, information.bias_at_independence(len(chosen), rng)
    for name, arrays in collect(subject, held.images[chosen], take).items():
        print(f'information: {name}', file=sys.stderr)
        blocks[name] = information.information_of(arrays['z'], bias, rng, subject.directional)
    shared = [test for block in blocks.values() for kind in block['shared'].values() for test in kind.values()]
    correct(
        shared + [test for block in blocks.values() for key in ('local', 'own') for test in block.get(key, {}).values()]
    )
    return dict(
        images=len(chosen), draws=information.DRAWS, neighbours=information.NEIGHBOURS, bias=bias, blocks=blocks
    )


# ---------------------------------------------------------------------------------------------- features

KINDS = ('displaced products', 'products in place', 'Gram matrix', 'bilinear pooling', 'mean of h')


def features_of(block: Block) -> dict[str, torch.Tensor]:
    """One vector an image of each kind: (B, dimension of the kind).

    'displaced products' are the means over positions of z_i(p) t_j(p), 'products in place' of z_i(p) z_j(p), both
    within a head; 'Gram matrix' those of h_i(p) h_j(p) over all channels that the branch reads; 'bilinear pooling'
    their signed square roots, L2-normalised (Lin, RoyChowdhury and Maji, ICCV 2015).
    """
    z = block.interactions[:, :, : block.c_red].flatten(3)  # (B, heads, c_red, HW)
    upper = torch.triu_indices(block.c_red, block.c_red)
    in_place = (z @ z.transpose(2, 3) / z.shape[3])[:, :, upper[0], upper[1]]
    h = block.h.flatten(2)  # (B, C, HW)
    upper = torch.triu_indices(h.shape[1], h.shape[1], device=h.device)
    gram = (h @ h.transpose(1, 2) / h.shape[2])[:, upper[0], upper[1]]
    return {
        KINDS[0]: block.interactions[:, :, block.c_red :].mean((3, 4)).flatten(1),
        'products in place': in_place.flatten(1),
        'Gram matrix': gram,
        'bilinear pooling': F.normalize(gram.sign() * gram.abs().sqrt()),
        'mean of h': h.mean(2),
    }


def sketched(features: torch.Tensor, seed: int, cache: dict) -> torch.Tensor:
    """Long features through a sparse random projection to SKETCH dimensions, which depends on seed and length alone."""
    length = features.shape[1]
    if length <= SKETCH:
        return features
    if length not in cache:
        projection = SparseRandomProjection(SKETCH, random_state=seed, dense_output=True)
        cache[length] = projection.fit(np.zeros((1, length), np.float32))
    return torch.from_numpy(cache[length].transform(features.cpu().numpy()).astype(np.float32))


def probe(features: np.ndarray, labels: np.ndarray, dimension: int, folds: int, seed: int) -> list[float]:
    """Accuracies in % of a linear probe, one a fold and repeat of stratified cross-validation, the same for all kinds.

    Scaling, PCA to `dimension` and the ridge penalty are all fitted to the training part of each fold.
    """
    accuracies = []
    for fit, test in RepeatedStratifiedKFold(n_splits=folds, n_repeats=REPEATS, random_state=seed).split(
        features, labels
    ):
        model = make_pipeline(
            StandardScaler(), PCA(dimension, random_state=seed), RidgeClassifierCV(np.logspace(-2, 5, 15))
        )
        accuracies.append(100 * model.fit(features[fit], labels[fit]).score(features[test], labels[test]))
    return accuracies


def measure_features(subject: Subject, held: Held, settings: dict) -> dict:
    seed, stci = settings['seed'], next(iter(blocks_of(subject.model).values())).stci
    if not stci.use_products:
        raise RunError(f'{subject.name} has no products to compare')
    kinds = KINDS[isinstance(stci.twist, nn.Identity) :]  # without twists nothing is displaced
    cache: dict = {}

    def take(_: str, block: Block) -> dict:
        return {kind: sketched(features, seed, cache) for kind, features in features_of(block).items()}

    folds = min(FOLDS, int(np.bincount(held.labels).min()))
    arrays = collect(subject, held.images, take)
    shortest = min(array.shape[1] for kept in arrays.values() for array in kept.values())
    dimension = min(DIMENSION, shortest, len(held.labels) - math.ceil(len(held.labels) / folds) - 1)
    blocks, tests = {}, []
    for name, kept in arrays.items():
        print(f'features: {name}', file=sys.stderr)
        accuracies = {kind: probe(kept[kind], held.labels, dimension, folds, seed) for kind in kinds}
        against = {}
        for kind in kinds[1:]:
            differences = np.subtract(accuracies[kinds[0]], accuracies[kind]).tolist()
            against[kind] = corrected_t_test(differences, 1 / (folds - 1))
        tests += against.values()
        blocks[name] = dict(accuracies=accuracies, against=against)
    correct(tests)
    chance = 100 * float(np.bincount(held.labels).max()) / len(held.labels)
    return dict(
        images=len(held.labels), folds=folds, repeats=REPEATS, dimension=dimension, chance=chance, blocks=blocks
    )


# ---------------------------------------------------------------------------------------------- directions

# Of ANGLES, as along and across: two steps of one length, so that smoothness cancels.
CONTRASTS = {'0° less 90°': (0, 2), '45° less 135°': (1, 3)}


def displaced_cosines(z: torch.Tensor) -> torch.Tensor:
    """Mean cosine of z(p) and z(p + d) over heads and positions, for each d: (B, heads, c_red, H, W) -> (B, 4)."""
    _, _, _, height, width = z.shape
    flat = z.flatten(3)
    cosines = []
    for condition in ANGLES:
        p, q = information.places(condition, height, width).T
        cosines.append((flat[..., p] * flat[..., q]).sum(2).mean((1, 2)))
    return torch.stack(cosines, 1)


def contrasts(z: torch.Tensor) -> torch.Tensor:
    """How much more z repeats along a direction than across it: (B, heads, c_red, H, W) -> (B, contrasts)."""
    cosines = displaced_cosines(z)
    return torch.stack([cosines[:, along] - cosines[:, across] for along, across in CONTRASTS.values()], 1)


def measure_directions(subject: Subject, held: Held, settings: dict) -> dict:
    rng = np.random.default_rng([settings['seed'], 3])

    def take(_: str, block: Block) -> dict:
        if min(block.h.shape[2:]) < 2:  # no cell has a neighbour in every direction
            return {}
        return dict(contrasts=contrasts(block.interactions[:, :, : block.c_red]))

    arrays = {name: kept['contrasts'] for name, kept in collect(subject, held.images, take).items() if kept}
    if not arrays:
        raise RunError(f'no block of {subject.name} has a map of 2 x 2 or more at {subject.img_size} px')
    values = standardised(np.concatenate(list(arrays.values()), 1))
    names = [f'{name} {contrast}' for name in arrays for contrast in CONTRASTS]
    overall, single = class_test(values, held.labels, rng), {}
    for column, name in zip(values.T, names):
        if np.ptp(column) > 0:
            single[name] = kruskal(column, held.labels)
    correct([overall, *single.values()])
    return dict(
        images=len(held.labels),
        permutations=statistics.PERMUTATIONS,
        classes=subject.classes,
        overall=overall,
        single=single,
        names=names,
        profile=[values[held.labels == label].mean(0).tolist() for label in range(len(subject.classes))],
    )


# ---------------------------------------------------------------------------------------------- spiral and gates

REPLACED, TURNED = 'twists replaced by identity', 'images rotated by 90°'


@torch.inference_mode()
def outcome(model: TwistNet, held: Held, turns: int = 0) -> dict[str, np.ndarray]:
    """What a model says of each image: whether it is right, the cross-entropy in nats, the class.

    Args:
        turns: quarter turns of the images.
    """
    logits = [model(batch.rot90(turns, (2, 3))).double().cpu() for batch in batches(model, held.images)]
    log_p = F.log_softmax(torch.cat(logits), 1).numpy()
    guess = log_p.argmax(1)
    return dict(right=guess == held.labels, loss=-log_p[np.arange(len(guess)), held.labels], guess=guess)


def compare(before: dict, after: dict) -> dict:
    """The same images before and after a change: accuracy, loss and how many answers are other ones."""
    return dict(
        accuracy=float(100 * after['right'].mean()),
        accuracy_change=mcnemar(before['right'], after['right']),
        loss_change=paired(after['loss'] - before['loss']),
        other_answers=float(100 * (after['guess'] != before['guess']).mean()),
    )


def compare_all(before: dict, after: dict[str, dict], across: dict[str, dict] | None = None) -> dict:
    """The test set as it is against each change of it, all as `outcome` gives them.

    Args:
        across: further tests of the same question.
    """
    changes = {name: compare(before, one) for name, one in after.items()}
    tests = [change[key] for change in changes.values() for key in ('accuracy_change', 'loss_change')]
    tests += (across or {}).values()
    correct(tests)
    # The fewest images, all lost or all gained, that the exact test could tell from chance: Holm's factor for the
    # largest p that is shown is the number of tests that are not, and one.
    factor = max(1, sum(test['p'] is not None and test['p_holm'] >= LEVEL for test in tests))
    least = next(n for n in range(1, 200) if factor * 2 * 0.5**n < LEVEL)
    return dict(
        images=len(before['right']),
        accuracy=float(100 * before['right'].mean()),
        loss=float(before['loss'].mean()),
        least=least,
        changes=changes,
        across=across,
    )


def edited(model: TwistNet, edit: Callable[[str, nn.Module], None], only: str | None = None) -> TwistNet:
    """A copy of a model with edit(name, block) done to every TwistBlock, or to one."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, block in blocks_of(model).items():
            if only in (None, name):
                edit(name, block)
    return model


def without_twist(_: str, block: nn.Module) -> None:
    """t = z, as in the variant no_spiral."""
    block.stci.twist = nn.Identity()


def rolled_heads(by: int) -> Callable[[str, nn.Module], None]:
    """Head k gets the twist, kernels and scale, of head k - by."""

    def edit(_: str, block: nn.Module) -> None:
        twist = block.stci.twist
        twist.dwconv.weight.copy_(twist.dwconv.weight.roll(by * twist.c_red, 0))
        twist.scale.copy_(twist.scale.roll(by * twist.c_red, 1))

    return edit


def closed(_: str, block: nn.Module) -> None:
    block.gate.fill_(-math.inf)


def measure_spiral(subject: Subject, held: Held, settings: dict) -> dict:
    model, test, stci = subject.model, held.test, next(iter(blocks_of(subject.model).values())).stci
    before, turned = outcome(model, test), outcome(model, test, turns=1)
    if isinstance(stci.twist, nn.Identity):
        return compare_all(before, {TURNED: turned})
    plain = edited(model, without_twist)
    after = {REPLACED: outcome(plain, test)}
    for by in range(1, stci.num_heads if subject.directional else 1):
        after[f'heads permuted by {by}'] = outcome(edited(model, rolled_heads(by)), test)
    after |= {TURNED: turned, f'rotated, {REPLACED}': outcome(plain, test, turns=1)}
    # What turning changes with the twists, less what it changes without them: the trunk alone minds turning too.
    across = {}
    for key, unit in (('right', 100.0), ('loss', 1.0)):
        old, new, bare, both = (
            o[key].astype(float) for o in (before, turned, *(after[n] for n in (REPLACED, f'rotated, {REPLACED}')))
        )
        across[key] = paired(unit * ((new - old) - (both - bare)))
    return compare_all(before, after, across)


def measure_gates(subject: Subject, held: Held, settings: dict) -> dict:
    names, test = list(blocks_of(subject.model)), held.test
    after = {f'{name} closed': outcome(edited(subject.model, closed, name), test) for name in names}
    if len(names) > 1:
        after['all closed'] = outcome(edited(subject.model, closed), test)

    def take(_: str, block: Block) -> dict:  # mean squares an image of what the gate lets through and of the output
        return dict(added=block.branch.square().mean((1, 2, 3)), out=block.out.square().mean((1, 2, 3)))

    squares = collect(subject, test.images, take)
    defines, gates = settings['defines'], subject.model.gates()
    blocks = {
        name: dict(gate=gates[name], share=math.sqrt(squares[name]['added'].mean() / squares[name]['out'].mean()))
        for name in names
    }
    start = initial_gate(subject.name, defines) if defines else None
    return dict(start=start, blocks=blocks) | compare_all(outcome(subject.model, test), after)


# ---------------------------------------------------------------------------------------------- command line

# What each question is called, what measures it, what tells it and what draws it.
QUESTIONS: dict[str, tuple] = {
    'information': ('Information', measure_information, findings.tell_information, findings.draw_information),
    'features': ('Features', measure_features, findings.tell_features, findings.draw_features),
    'directions': ('Directions', measure_directions, findings.tell_directions, findings.draw_directions),
    'spiral': ('Spiral', measure_spiral, findings.tell_changes, findings.draw_spiral),
    'gates': ('Gates', measure_gates, findings.tell_gates, findings.draw_gates),
}
OF_TEST = ('spiral', 'gates')  # questions that read the test images alone


def title_of(report: dict) -> str:
    caution = f', {report["caution"]}' if report['caution'] else ''
    return f'{report["model"]} on {report["label"]}, fold {report["fold"]}{caution}'


def report_text(report: dict) -> str:
    """The report in Markdown; every sentence is made from the numbers of report.json."""
    notes = ['p values take images as independent: copies of one picture count as several, and make p too small.']
    if report['copies']:
        notes.append(f'`--copies {report["copies"]}` left {counted(report["n_copies"], "image")} out.')
    if report['caution']:
        notes.append(trace.CAUTIONS[report['caution']])
    if report['n_val']:
        notes.append('Images of validation chose the epoch.')
    lines = [
        f'# {title_of(report)}',
        f'`{report["checkpoint"]}`, epoch {report["epoch"]}, validation accuracy {report["val_acc"]:.1f} %, '
        f'{report["img_size"]} px; {report["n_test"]} test images and {report["n_val"]} of validation, '
        f'{report["classes"]} classes; seed {report["seed"]}.',
        ' '.join(notes),
    ]
    for key, result in report['questions'].items():
        name, _, tell, _ = QUESTIONS[key]
        sentences, details = tell(result)
        lines += [f'## {name}', *sentences, *details, f'![{name}]({key}.png)']
    for key, reason in report['not_answered'].items():
        lines += [f'## {QUESTIONS[key][0]}', f'Not answered: {reason}.']
    return '\n\n'.join(lines) + '\n'


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='What a trained TwistNet makes of channels and directions.')
    parser.add_argument('--checkpoint', type=Path, required=True, help='best.pt of a TwistNet')
    options.add_data_of_run_args(parser)
    parser.add_argument('--save_dir', type=Path, default=Path('analysis'), help='made if missing')
    options.add_labels_arg(parser)
    parser.add_argument(
        '--copies', metavar='REGEX', help='images of a class whose names begin with the same match are one picture'
    )
    parser.add_argument('--question', choices=(*QUESTIONS, 'all'), default='all')
    parser.add_argument('--seed', type=int, default=42, help='of all that is drawn at random')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ..')
    return parser


def asked(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(QUESTIONS) if args.question == 'all' else (args.question,)


def prepare(args: argparse.Namespace) -> tuple[Subject, Held, dict]:
    """The model, the images that did not train it, and dataset, fold and seed: whatever can be refused at once.

    Raises:
        RunError: the options do not fit the checkpoint or the data set. ModelError, DataError: the checkpoint, or the
            data set or an image of it, cannot be read.
    """
    if args.seed < 0:
        raise RunError(f'--seed {args.seed} must not be negative')
    try:
        re.compile(args.copies or '')
    except re.error as error:
        raise RunError(f'--copies {args.copies}: {error}') from error
    subject = trace.load(args.checkpoint)
    trace.need_stci(subject)
    settings = trace.data_of(args, subject) | dict(seed=args.seed, copies=args.copies)
    subject.model.to(distributed.setup(args.device, args.seed))
    return subject, read_images(subject, settings, with_val=not set(asked(args)) <= set(OF_TEST)), settings


def answer(args: argparse.Namespace, subject: Subject, held: Held, settings: dict) -> dict:
    """What report.json holds: the questions that the options ask and their answers.

    Raises:
        RunError: one question was asked that the model or its images cannot answer.
    """
    answers, not_answered = {}, {}
    for key in asked(args):
        print(f'{key} ..', file=sys.stderr)
        try:
            answers[key] = QUESTIONS[key][1](subject, held, settings)
        except RunError as error:  # a model without twists, say
            if args.question != 'all':
                raise
            not_answered[key] = str(error)
    return dict(
        checkpoint=str(args.checkpoint),
        model=subject.name,
        dataset=settings['dataset'],
        label=dataset_label(settings['dataset'], args.labels),
        fold=settings['fold'],
        seed=args.seed,
        caution=settings['caution'],
        copies=args.copies,
        n_copies=held.n_copies,
        epoch=subject.epoch,
        val_acc=subject.val_acc,
        img_size=subject.img_size,
        n_test=held.n_test,
        n_val=len(held.labels) - held.n_test,
        classes=len(subject.classes),
        questions=answers,
        not_answered=not_answered,
    )


def main(args: argparse.Namespace) -> None:
    subject, held, settings = prepare(args)
    made = not args.save_dir.exists()
    args.save_dir.mkdir(parents=True, exist_ok=True)  # before the minutes that the answers take
    try:
        report = answer(args, subject, held, settings)
    except UserError:
        if made:
            args.save_dir.rmdir()
        raise
    runs.write_json(args.save_dir / 'report.json', report)
    runs.write_atomic(args.save_dir / 'report.md', report_text(report).encode(errors='replace'))
    for key, result in report['questions'].items():
        name, _, tell, draw = QUESTIONS[key]
        print(f'{name}:', *tell(result)[0], sep='\n  ')
        save(draw(result, title_of(report)), args.save_dir, key)
    for key, reason in report['not_answered'].items():
        print(f'{QUESTIONS[key][0]}: not answered: {reason}')
    print(args.save_dir / 'report.md')


if __name__ == '__main__':
    with user_errors('analysis.py'):
        main(get_args_parser().parse_args())
