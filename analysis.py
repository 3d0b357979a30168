"""Statistical tests of what a trained model with STCI does with channels and directions.

    python analysis.py --checkpoint runs/dtd_fold1_twistnet18_seed42/best.pt --save_dir analysis
    python analysis.py --checkpoint best.pt --data_dir data/dtd --dataset dtd --fold 1 --question spiral

information  mutual information of the channels of a head: in one place, a step away and elsewhere in an image
features     a linear probe on the head's displaced products, the Gram matrix and bilinear pooling
spiral       the same weights without twists, with heads permuted, on rotated images with twists and without
gates        the gates after training, and what closing them costs

Data set, fold and folder are those of the run (config.json beside the checkpoint) unless given; a split other than the
run's is refused, unless --other_images accepts it, and then the report says so. Only images that did not train are
read: spiral and gates take the test set, the others validation and test together; images of validation chose the epoch
of the checkpoint. save_dir gets report.json, report.md, whose every number is from it, and a figure per question;
the same seed gives the same bytes.

p values are two-sided and Holm-corrected over all tests of a question. They assume that images are independent: copies
of one picture make them too small. --copies names such files, and of each picture the first is read.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import distributed, options, runs
from common.drawing import Figure, save
from common.errors import RunError, UserError, user_errors
from common.images import open_image
from common.runs import counted
from interpret import findings, questions, trace
from interpret.questions import HeldOut
from training import trained
from training.trained import EvaluationData, TrainedModel


class Question(NamedTuple):
    measure: Callable[[TrainedModel, HeldOut, int], dict]  # the int is the seed
    describe: Callable[[dict], findings.Finding]
    draw: Callable[[dict, str], Figure]
    test_only: bool = False  # reads the test images alone


QUESTIONS = {
    'information': Question(questions.measure_information, findings.describe_information, findings.draw_information),
    'features': Question(questions.measure_features, findings.describe_features, findings.draw_features),
    'spiral': Question(questions.measure_spiral, findings.describe_changes, findings.draw_changes, test_only=True),
    'gates': Question(questions.measure_gates, findings.describe_changes, findings.draw_changes, test_only=True),
}


def without_copies(items: list[tuple[Path, int]], pattern: str | None) -> list[tuple[Path, int]]:
    """Of the images of a class whose file names begin with the same match of the pattern, the first."""
    first: dict = {}
    for path, label in items:
        match = re.match(pattern, Path(path).name) if pattern else None
        first.setdefault((label, match.group() if match else path), (path, label))
    return list(first.values())


def title_of_report(report: dict) -> str:
    caution = f', {report["caution"]}' if report['caution'] else ''
    return f'{report["model"]} on {report["label"]}, fold {report["fold"]}{caution}'


def report_text(report: dict) -> str:
    """The report in Markdown, from the numbers of report.json."""
    notes = [
        'p values assume that images are independent: copies of one picture make them too small. They are '
        'Holm-corrected over all tests of a question; a difference that was not shown may still exist.'
    ]
    if report['copies']:
        notes.append(f'`--copies {report["copies"]}` left {counted(report["n_copies"], "image")} out.')
    if report['caution']:
        notes.append(trained.CAUTIONS[report['caution']])
    if report['n_val']:
        notes.append('Images of validation chose the epoch.')
    lines = [
        f'# {title_of_report(report)}',
        f'`{report["checkpoint"]}`, {trained.epoch_text(report["epoch"], report["val_acc"])}, '
        f'{report["img_size"]} px; {report["n_test"]} test images and {report["n_val"]} of validation, '
        f'{report["classes"]} classes; seed {report["seed"]}.',
        ' '.join(notes),
    ]
    for key, result in report['questions'].items():
        lines += [f'## {key.capitalize()}', *QUESTIONS[key].describe(result), f'![{key.capitalize()}]({key}.png)']
    for key, reason in report['not_answered'].items():
        lines += [f'## {key.capitalize()}', f'Not answered: {reason}.']
    return '\n\n'.join(lines) + '\n'


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Run statistical tests of what a trained model with STCI does.')
    parser.add_argument('--checkpoint', type=Path, required=True, help='best.pt of a model with STCI')
    options.add_import_arg(parser)
    options.add_data_of_run_args(parser)
    parser.add_argument('--save_dir', type=Path, default=Path('analysis'), help='created if missing')
    options.add_labels_arg(parser)
    parser.add_argument(
        '--copies',
        metavar='REGEX',
        help='images of a class whose names begin with the same match count as one photograph',
    )
    parser.add_argument('--question', choices=(*QUESTIONS, 'all'), default='all', help='what to test; see INSIDE.md')
    parser.add_argument('--seed', type=int, default=42, help='seed of all random draws')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ...')
    return parser


def asked(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(QUESTIONS) if args.question == 'all' else (args.question,)


def prepare(args: argparse.Namespace) -> tuple[TrainedModel, HeldOut, EvaluationData]:
    """The model, the images that the questions asked read, and where they are from."""
    options.check_bounds(args, seed=(0, 2**32 - 1))
    try:
        re.compile(args.copies or '')
    except re.error as error:
        raise RunError(f'--copies {args.copies}: {error}') from error
    subject = trained.load(args.checkpoint, args.imports)
    trace.need(subject)
    data = trained.data_of(args, subject)
    subject.model.to(distributed.setup(args.device, args.seed))
    splits, test_only = data.splits, all(QUESTIONS[key].test_only for key in asked(args))
    items = splits.test + ([] if test_only else splits.val)
    kept = without_copies(items, args.copies)
    labels = np.array([label for _, label in kept])
    if not test_only:
        trace.need_two(labels, splits.classes, 'validation and test together')
    images = torch.stack([subject.view(open_image(path, data.bits)) for path, _ in kept])
    n_test, statistics = len(set(kept) & set(splits.test)), subject.preprocessing.statistics
    return subject, HeldOut(images, labels, n_test, len(items) - len(kept), statistics), data


def answer(args: argparse.Namespace, subject: TrainedModel, held_out: HeldOut, data: EvaluationData) -> dict:
    """The contents of report.json: the questions that the options ask and their answers."""
    answers, not_answered = {}, {}
    for key in asked(args):
        print(f'{key} ..', file=sys.stderr)
        try:
            answers[key] = QUESTIONS[key].measure(subject, held_out, args.seed)
        except UserError as error:  # a model without products, say
            if args.question != 'all':
                raise
            not_answered[key] = str(error)
    return dict(
        checkpoint=str(args.checkpoint),
        model=subject.name,
        dataset=data.splits.dataset,
        label=data.label,
        fold=data.splits.fold,
        seed=args.seed,
        caution=data.caution,
        copies=args.copies,
        n_copies=held_out.n_copies,
        epoch=subject.epoch,
        val_acc=subject.val_acc,
        img_size=subject.img_size,
        n_test=held_out.n_test,
        n_val=len(held_out.labels) - held_out.n_test,
        classes=len(subject.classes),
        questions=answers,
        not_answered=not_answered,
    )


def main(args: argparse.Namespace) -> None:
    prepared = prepare(args)
    args.save_dir.mkdir(parents=True, exist_ok=True)  # before the minutes that the answers take
    report = answer(args, *prepared)
    runs.write_json(args.save_dir / 'report.json', report)
    runs.write_atomic(args.save_dir / 'report.md', report_text(report).encode(errors='replace'))
    for key, result in report['questions'].items():
        print(f'{key.capitalize()}: {QUESTIONS[key].describe(result).verdict}')
        save(QUESTIONS[key].draw(result, title_of_report(report)), args.save_dir, key)
    for key, reason in report['not_answered'].items():
        print(f'{key.capitalize()}: not answered: {reason}')
    print(args.save_dir / 'report.md')


if __name__ == '__main__':
    with user_errors('analysis.py'):
        main(get_args_parser().parse_args())
