"""The questions of analysis.py: what a trained model with STCI computes from images that did not train it, as numbers.

    held_out = HeldOut(images, labels, n_test=len(images))
    measure_spiral(subject, held_out, seed=42)['changes']['images rotated by 90°']['accuracy_change']    # a test

A measure_* returns plain values for report.json, whose tests are dictionaries of common/statistics.py, with p values
Holm-corrected over all tests of the question; findings.py describes and draws them.
"""

import copy
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import RepeatedStratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.random_projection import SparseRandomProjection
from torch import nn

from common import runs
from common.errors import DataError
from common.results import initial_gate
from common.statistics import LEVEL, correct, corrected_t_test, mcnemar, paired
from interpret import information, trace
from interpret.trace import Block
from models import blocks_of, gates_of
from training import loader
from training.trained import TrainedModel
from transforms import normalize

MAX_IMAGES = 256  # for mutual information, whose time grows with the square
MIN_IMAGES = 40
DIMENSION = 64  # of every kind of feature under the probe
SKETCH = 1024  # dimension to which longer features are projected at random before that
FOLDS, REPEATS = 5, 2  # of the probe's cross-validation


class HeldOut(NamedTuple):
    """The images of a fold that did not train, the test set first."""

    images: torch.Tensor  # (N, 3, img_size, img_size) uint8
    labels: np.ndarray  # (N,), class indices
    n_test: int
    n_copies: int = 0  # copies of an image that were left out
    statistics: tuple = ()  # mean and std of the model's input; (): ImageNet's

    @property
    def test(self) -> 'HeldOut':
        return self._replace(images=self.images[: self.n_test], labels=self.labels[: self.n_test])

    def batches(self, model: nn.Module) -> Iterator[torch.Tensor]:
        """The images in normalised batches on the device of the model."""
        device = next(model.parameters()).device
        for batch in self.images.split(loader.EVAL_BATCH):
            yield normalize(batch.to(device), *self.statistics)


def tests_in(result: dict) -> Iterator[dict]:
    """Every test in a result, at any depth."""
    if 'p' in result:
        yield result
    for value in result.values():
        if isinstance(value, dict):
            yield from tests_in(value)


# ---------------------------------------------------------------------------------------------- information


def measure_information(subject: TrainedModel, held_out: HeldOut, seed: int) -> dict:
    """Mutual information of the channels of a head, by block."""
    rng = np.random.default_rng([seed, 1])
    chosen = rng.permutation(len(held_out.images))[:MAX_IMAGES]
    if len(chosen) < MIN_IMAGES:
        raise DataError(f'{len(chosen)} images are too few for mutual information; it takes at least {MIN_IMAGES}')
    bias = information.bias_at_independence(len(chosen), rng)
    batches = held_out._replace(images=held_out.images[chosen]).batches(subject.model)
    # Before the L2 norm, which makes the channels of a head dependent.
    by_block = trace.collect(subject.model, batches, lambda r: {name: block.z for name, block in r.blocks.items()})
    blocks = {}
    for name, z in by_block.items():
        print(f'information: {name}', file=sys.stderr)
        blocks[name] = information.information_of(z, bias, rng, subject.directional)
    correct(list(tests_in(blocks)))
    return dict(
        images=len(chosen), draws=information.DRAWS, neighbours=information.NEIGHBOURS, bias=bias, blocks=blocks
    )


# ---------------------------------------------------------------------------------------------- features

KINDS = ('displaced products', 'products in place', 'Gram matrix', 'bilinear pooling', 'mean of h')


def features_of(block: Block) -> dict[str, torch.Tensor]:
    """One vector per image of each kind: (B, dimension of the kind).

    'displaced products' are the means over positions of z_i(p) t_j(p), 'products in place' of z_i(p) z_j(p), both
    within a head; 'Gram matrix' those of h_i(p) h_j(p) over all channels that the branch reads; 'bilinear pooling'
    their signed square roots, L2-normalised (Lin, RoyChowdhury and Maji, ICCV 2015).
    """

    def mean_products(x: torch.Tensor) -> torch.Tensor:  # (.., C, HW) -> (.., C (C + 1) / 2)
        i, j = torch.triu_indices(x.shape[-2], x.shape[-2], device=x.device)
        return (x @ x.mT / x.shape[-1])[..., i, j]

    displaced = block.interactions[:, :, block.c_red :].mean((3, 4)).flatten(1)
    in_place = mean_products(block.interactions[:, :, : block.c_red].flatten(3)).flatten(1)
    h = block.h.flatten(2)
    gram = mean_products(h)
    bilinear = F.normalize(gram.sign() * gram.abs().sqrt())
    return dict(zip(KINDS, (displaced, in_place, gram, bilinear, h.mean(2))))


@functools.cache
def projection(length: int, seed: int) -> SparseRandomProjection:
    random = SparseRandomProjection(SKETCH, random_state=seed, dense_output=True)
    return random.fit(np.zeros((1, length), np.float32))


def sketch(features: torch.Tensor, seed: int) -> torch.Tensor:
    """Project long features to SKETCH dimensions at random; the projection depends on seed and length alone."""
    length = features.shape[1]
    if length <= SKETCH:
        return features
    return torch.from_numpy(projection(length, seed).transform(features.cpu().numpy()).astype(np.float32))


def probe(features: np.ndarray, labels: np.ndarray, dimension: int, folds: int, seed: int) -> list[float]:
    """Accuracies in % of a linear probe, one per fold and repeat of stratified cross-validation.

    Scaling, PCA to `dimension` and the ridge penalty are fitted to the training part of each fold.
    """
    ridge = RidgeClassifierCV(np.logspace(-2, 5, 15))
    model = make_pipeline(StandardScaler(), PCA(dimension, random_state=seed), ridge)
    splitter = RepeatedStratifiedKFold(n_splits=folds, n_repeats=REPEATS, random_state=seed)
    return (100 * cross_val_score(model, features, labels, cv=splitter)).tolist()


def measure_features(subject: TrainedModel, held_out: HeldOut, seed: int) -> dict:
    """Accuracies of a linear probe on each kind of feature, by block."""
    trace.need(subject, 'products')
    labels, modules = held_out.labels, blocks_of(subject.model)
    twisted = not any(isinstance(block.stci.twist, nn.Identity) for block in modules.values())
    first, *others = KINDS if twisted else KINDS[1:]  # without twists nothing is displaced

    def extract(record: trace.Record) -> dict:
        return {
            (name, kind): sketch(features, seed)
            for name, block in record.blocks.items()
            for kind, features in features_of(block).items()
        }

    counts = np.bincount(labels)
    folds = min(FOLDS, int(counts.min()))
    arrays = trace.collect(subject.model, held_out.batches(subject.model), extract)
    shortest = min(array.shape[1] for array in arrays.values())
    dimension = min(DIMENSION, shortest, len(labels) - math.ceil(len(labels) / folds) - 1)
    blocks = {}
    for name in modules:
        print(f'features: {name}', file=sys.stderr)
        accuracies = {kind: probe(arrays[name, kind], labels, dimension, folds, seed) for kind in (first, *others)}
        against = {}
        for kind in others:
            differences = np.subtract(accuracies[first], accuracies[kind]).tolist()
            against[kind] = corrected_t_test(differences, 1 / (folds - 1))
        blocks[name] = dict(accuracies=accuracies, against=against)
    correct(list(tests_in(blocks)))
    chance = 100 * float(counts.max()) / len(labels)
    return dict(images=len(labels), folds=folds, repeats=REPEATS, dimension=dimension, chance=chance, blocks=blocks)


# ---------------------------------------------------------------------------------------------- spiral and gates

REPLACED, ROTATED = 'twists replaced by identity', 'images rotated by 90°'


@torch.inference_mode()
def outcome(model: nn.Module, held_out: HeldOut, turns: int = 0) -> dict[str, np.ndarray]:
    """By image, whether the model is right, the cross-entropy in nats and the predicted class; turns: quarter turns."""
    logits = [model(batch.rot90(turns, (2, 3))).double().cpu() for batch in held_out.batches(model)]
    log_p = F.log_softmax(torch.cat(logits), 1).numpy()
    guess = log_p.argmax(1)
    return dict(right=guess == held_out.labels, loss=-log_p[np.arange(len(guess)), held_out.labels], guess=guess)


def compare_all(before: dict, after: dict[str, dict], across: dict[str, dict] | None = None) -> dict:
    """The unchanged test set against each change, all as `outcome` returns them; across: further tests."""
    changes = {
        name: dict(
            accuracy=float(100 * one['right'].mean()),
            accuracy_change=mcnemar(before['right'], one['right']),
            loss_change=paired(one['loss'] - before['loss']),
            other_answers=float(100 * (one['guess'] != before['guess']).mean()),
        )
        for name, one in after.items()
    }
    tests = list(tests_in(dict(changes=changes, across=across)))
    correct(tests)
    # The fewest images, all lost or all gained, that the exact test can tell from chance beside the other tests: Holm's
    # factor for the largest p that is shown is the number of tests that are not, and one.
    factor = max(1, sum(test['p'] is not None and test['p_holm'] >= LEVEL for test in tests))
    least = next(n for n in itertools.count(1) if factor * 2 * 0.5**n < LEVEL)
    return dict(
        images=len(before['right']),
        accuracy=float(100 * before['right'].mean()),
        loss=float(before['loss'].mean()),
        changes=changes,
        across=across,
        least=least,
    )


def edited(model: nn.Module, edit: Callable[[nn.Module], None], only: str | None = None) -> nn.Module:
    """A copy of a model with edit(block) done to every block, or to one by name."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, block in blocks_of(model).items():
            if only in (None, name):
                edit(block)
    return model


def remove_twist(block: nn.Module) -> None:
    """t = z, as in the variant no_spiral."""
    block.stci.twist = nn.Identity()


def roll_heads(block: nn.Module, by: int) -> None:
    """Give head k the twist, kernels and scale, of head k - by."""
    twist = block.stci.twist
    twist.dwconv.weight.copy_(twist.dwconv.weight.roll(by * twist.c_red, 0))
    twist.scale.copy_(twist.scale.roll(by * twist.c_red, 1))


def close_gate(block: nn.Module) -> None:
    block.gate.fill_(-math.inf)


def measure_spiral(subject: TrainedModel, held_out: HeldOut, seed: int) -> dict:
    """The test set with twists removed, heads permuted and images rotated, against the model as trained."""
    model, test, stci = subject.model, held_out.test, next(iter(blocks_of(subject.model).values())).stci
    before, rotated = outcome(model, test), outcome(model, test, turns=1)
    if isinstance(stci.twist, nn.Identity):
        return compare_all(before, {ROTATED: rotated})
    plain = edited(model, remove_twist)
    after = {REPLACED: outcome(plain, test)}
    for by in range(1, stci.num_heads if subject.directional else 1):  # heads without directions are alike
        after[f'heads permuted by {by}'] = outcome(edited(model, functools.partial(roll_heads, by=by)), test)
    both = outcome(plain, test, turns=1)
    after |= {ROTATED: rotated, f'rotated, {REPLACED}': both}
    # What rotation changes with the twists, less what it changes without them: it affects the trunk alone too.
    across = {}
    for key, unit in (('right', 100.0), ('loss', 1.0)):
        old, new, old_plain, new_plain = (o[key].astype(float) for o in (before, rotated, after[REPLACED], both))
        across[key] = paired(unit * ((new - old) - (new_plain - old_plain)))
    return compare_all(before, after, across)


def measure_gates(subject: TrainedModel, held_out: HeldOut, seed: int) -> dict:
    """The test set with each gate closed and with all closed, against the model as trained."""
    model, test, gates = subject.model, held_out.test, gates_of(subject.model)
    after = {f'{name} closed': outcome(edited(model, close_gate, name), test) for name in gates}
    if len(gates) > 1:
        after['all closed'] = outcome(edited(model, close_gate), test)

    def extract(record: trace.Record) -> dict:  # mean squares per image of what a block adds and of what it returns
        pairs = {name: (block.branch, block.out) for name, block in record.blocks.items()}
        return {(name, i): pair[i].square().mean((1, 2, 3)) for name, pair in pairs.items() for i in range(2)}

    squares = trace.collect(model, test.batches(model), extract)
    share = {name: math.sqrt(squares[name, 0].mean() / squares[name, 1].mean()) for name in gates}
    blocks = {name: dict(gate=gate, share=share[name]) for name, gate in gates.items()}
    results = runs.read_json(subject.path.with_name('results.json'))
    start = initial_gate(subject.name, subject.config, results)
    return dict(start=start, blocks=blocks) | compare_all(outcome(model, test), after)
