"""Figures of what a trained model does, each as PDF and as PNG; prints their paths.

    python visualize.py --checkpoint runs/main/dtd_fold1_twistnet18_seed42/best.pt \\
        --image data/dtd/images/banded/banded_0001.jpg --view response
    python visualize.py --checkpoint runs/demo/synthetic_fold1_twistnet18_seed42/best.pt --view all

interaction, response, features and cam need --image, which may be a folder for cam; kernels needs only the checkpoint;
direction rotates --image, or synthetic streaks without one; selection, classes and tsne run over a subset of the data
set of the run, which --dataset, --data_dir and --fold locate if it has moved. A split other than the run's is refused,
because its images may have trained the model; --other_images accepts it, and the figure says so. features and tsne work
for any model, cam for any CNN, the others for models with STCI. Gates by epoch: plot_results.py --plot gate.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from common import options
from common.drawing import Figure, save
from common.errors import RunError, UserError, user_errors
from common.images import open_image
from common.tables import write_csv
from interpret import cam, class_views, image_views, trace, twist_views
from training import trained


class View(NamedTuple):
    draw: Callable[..., Figure | Iterable[Figure]]  # of the model and `takes`
    takes: str | None = None  # 'image', 'optional image', 'photographs' or 'survey', one pass over a data set
    part: str | None = ''  # of STCI, as trace.need has it: '' for any STCI; None: works for any model
    table: Callable | None = None  # of the same: its numbers by class, written where the figure leaves classes out


# To add a view: a function in interpret/ and its entry here.
VIEWS = {
    'interaction': View(image_views.plot_interaction, 'image', 'products'),
    'response': View(image_views.plot_response, 'image', 'directions'),
    'features': View(image_views.plot_features, 'image', None),
    'cam': View(cam.plot_cam, 'photographs', None),
    'kernels': View(twist_views.plot_kernels, None, 'directions'),
    'direction': View(twist_views.plot_direction, 'optional image', 'directions'),
    'selection': View(class_views.plot_class_selection, 'survey', 'AIS', class_views.tabulate_selection),
    'classes': View(class_views.plot_classes, 'survey', 'products', class_views.tabulate_products),
    'tsne': View(class_views.plot_tsne, 'survey', None, class_views.tabulate_neighbours),
}


def main(args: argparse.Namespace) -> None:
    """Draw the view args.view; of 'all', those that the options and the model allow, and list the others on stderr."""
    if args.checkpoint is None:
        raise RunError('--checkpoint is missing: the best.pt of a run')
    if args.class_name is not None and args.view not in ('cam', 'all'):
        raise RunError(f'--class_name {args.class_name}: only for --view cam')
    subject = trained.load(args.checkpoint, args.imports)
    one = args.image is not None and not args.image.is_dir()
    image = open_image(str(args.image.absolute()), subject.preprocessing.bits) if one else None
    survey = functools.cache(lambda: class_views.survey_subset(subject, args))  # one pass for all views

    def draw(name: str) -> Iterable[Figure]:
        view = VIEWS[name]
        if view.part is not None:
            trace.need(subject, view.part)
        if args.image is None and view.takes in ('image', 'photographs'):
            raise RunError(f'{name} needs --image, the picture to look at')
        if view.takes == 'photographs':
            return view.draw(subject, args.image, args.class_name)
        if args.image and not one and view.takes in ('image', 'optional image'):
            raise RunError(f'--image {args.image}: is a folder, and {name} takes one picture')
        inputs = [] if view.takes is None else [survey() if view.takes == 'survey' else image]
        return [view.draw(subject, *inputs)]

    drawn = 0
    for name in VIEWS if args.view == 'all' else (args.view,):
        try:
            for number, figure in enumerate(draw(name), 1):
                for path in save(figure, args.save_dir, name if number == 1 else f'{name}_{number}'):
                    print(path)
                drawn += 1
            if (table := VIEWS[name].table) and len(subject.classes) > class_views.PAGEFUL:
                columns, values = table(subject, survey())
                rows = ([subject.classes[label], *row] for label, row in enumerate(values))
                write_csv(args.save_dir / f'{name}.csv', ['class', *columns], rows)
        except UserError as error:
            if args.view != 'all':
                raise
            print(f'not drawn: {name}: {error}', file=sys.stderr)
    if not drawn:
        raise RunError('no view could be drawn')


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Draw figures of what a trained model does, as PDF and PNG.')
    text = (
        'all: every view the options allow. Of more than '
        f'{class_views.PAGEFUL} classes, selection, classes and tsne draw the {class_views.FEW} furthest from the mean '
        'and write all as CSV'
    )
    parser.add_argument('--view', choices=(*VIEWS, 'all'), default='all', help=text)
    options.add_inside_args(parser)
    text = 'of cam: a class to show beside the predicted one; --image may be a folder there'
    parser.add_argument('--class_name', metavar='NAME', help=text)
    options.add_labels_arg(parser)
    parser.add_argument('--save_dir', type=Path, default=Path('figures'), help='created if missing')
    return parser


if __name__ == '__main__':
    with user_errors('visualize.py'):
        main(get_args_parser().parse_args())
