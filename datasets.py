"""Data sets, their folds and their images. No torch here: a data set is a list of (path, class index).

    python datasets.py list                                    # the data sets, their protocols and sources
    python datasets.py prepare dtd --data_dir data             # download, verify, unpack and count into data/dtd
    python datasets.py check dtd --data_dir data/dtd           # verify a tree at any later time; --csv problems.csv
    python datasets.py split dtd --data_dir data/dtd --fold 1  # one line an image: subset, class, path
    python datasets.py show --out figures/synthetic.png        # the procedural classes, eight images each

A split is a function of (data set, fold) alone: never of the training seed, of the order in which the file system
lists files, or of the machine. A new data set is an entry of registry.DATASETS and a function in SPLITS. The user's own
images, `folder` and `lists`, have options of their own: see common/own_data.py.
"""

import argparse
import itertools
import os
import shlex
import sys
from collections import defaultdict
from pathlib import Path

from common import synthetic
from common.archives import prepare_tree
from common.errors import DataError, user_errors
from common.images import SYNTHETIC, count_pages, image_bits, is_image
from common.names import class_notes, composed, is_hidden, near_miss
from common.options import AS_IT_IS, SplitOptions, add_split_args, choose_dataset, split_options, split_words
from common.own_data import count_folds, folder_splits, list_splits, read_labelled, root_of
from common.registry import DATASETS
from common.runs import counted
from common.splits import (
    SUBSETS,
    Splits,
    check_sizes,
    check_splits,
    digest_lines,
    draw_val,
    hash_order,
    partition,
    size_of,
    sorted_splits,
    top_of,
)
from common.tables import write_csv
from common.trees import (
    BadTreeError,
    Problem,
    find_root,
    group_by_content,
    list_images,
    path_finder,
    read_list,
    read_mat,
    read_table,
    require_files,
    unused_files,
    walk,
)


def load_splits(dataset: str, data_dir: str | Path | None, fold: int, own: SplitOptions = AS_IT_IS) -> Splits:
    """The images of one fold.

    Args:
        dataset: a key of DATASETS.
        data_dir: root of the data set; unused by 'synthetic', and of 'lists' what its paths are relative to.
        fold: 1-based.
        own: how the images of 'folder' and 'lists' are divided.

    Raises:
        DataError: fold out of range, missing folder or image, a class without training images. RunError: unknown data
            set, or `own` does not fit it.
    """
    root = _root(dataset, data_dir, own)
    entry = DATASETS[dataset]
    try:
        folds = _count_folds(dataset, root, own)
        if not 1 <= fold <= folds:
            raise DataError(f'fold {fold} of {own.lists or dataset} does not exist; it has folds 1 to {folds}')
        splits = SPLITS[dataset](root, fold, *([own] if entry.get('own') else []))
        check_splits(splits, root)
        if not entry.get('lists') or _is_dtd(root):
            check_sizes(splits, root, dataset)
    except BadTreeError as error:
        advice = _advice(dataset, root)
        if len(error.problems) > 1:
            words = [dataset, *(['--data_dir', str(root)] if data_dir else []), *split_words(own)]
            advice += f'; `python datasets.py check {shlex.join(words)}` lists all'
        raise DataError(f'{error}{advice}') from error
    except OSError as error:
        raise DataError(f'{error.filename}: cannot be read ({error.strerror})') from error
    return splits._replace(dataset=dataset, fold=fold, root=None if dataset == 'synthetic' else root, own=own)


def splits_of(values: dict, **changes) -> Splits:
    """load_splits for options by name, such as vars(args), with some of them changed."""
    values = values | changes
    return load_splits(values['dataset'], values['data_dir'], values['fold'], split_options(values))


def load_labelled(
    dataset: str, data_dir: str | Path | None, own: SplitOptions, classes: list[str], subset: str
) -> Splits | None:
    """The user's own images, for a model that is trained: in the subsets that they state, else all of them as test.

    None is divided, so a class may have one image or none; classes are found by name among the model's.

    Args:
        dataset, data_dir, own: as for load_splits.
        classes: of the model.
        subset: what is asked for, or 'all'.

    Returns:
        None where a subset is asked for and the images state none: load_splits divides them.
    """
    root = _root(dataset, data_dir, own)
    found = read_labelled(dataset, root, own)
    if '' in found and subset != 'all':
        return None
    where = own.lists or root
    wanted = {cls for s, items in found.items() if subset in ('all', s) for _, cls in items}
    if not wanted:
        raise DataError(f'{where}: has no image' + f' in the subset {subset}' * (subset != 'all'))
    classes = [composed(name) for name in classes]
    index = {name: label for label, name in enumerate(classes)}
    if unknown := sorted(wanted - index.keys()):
        more = f' (and {len(unknown) - 1} more)' * (len(unknown) > 1)
        raise DataError(f"{where}: '{unknown[0]}'{more} is no class of the model{near_miss(unknown[0], index)}")
    if absent := sorted(index.keys() - wanted):
        more = f' (and {len(absent) - 1} more)' * (len(absent) > 1)
        print(f"note: {where}: has no image of class '{absent[0]}'{more} of the model", file=sys.stderr)
    items = {s: sorted((path, index[cls]) for path, cls in pairs if cls in index) for s, pairs in found.items()}
    subsets = items.get('train', []), items.get('val', []), items.get('test') or items.get('', [])
    return Splits(*subsets, classes, dataset=dataset, root=root, own=own)


def _root(dataset: str, data_dir: str | Path | None, own: SplitOptions) -> Path:
    """The folder of a data set, checked to exist; the options are checked to fit."""
    choose_dataset(dataset, data_dir, own)
    if dataset == 'synthetic':
        return Path('synthetic')
    if dataset == 'lists' and (data_dir is None or Path(data_dir).is_dir()):
        return root_of(data_dir, own.lists)
    if data_dir is None:
        raise DataError(f'{dataset} needs --data_dir, the folder that holds it')
    if not (root := Path(data_dir)).is_dir():
        command = _prepare_command(dataset, Path('data'))
        advice = f'; `{command}` downloads it' if 'archives' in DATASETS[dataset] else ''
        raise DataError(f'{root}: no such folder; --data_dir must name the root of {dataset}{advice}')
    return root


def _count_folds(dataset: str, root: Path, own: SplitOptions) -> int:
    entry = DATASETS[dataset]
    if entry.get('own'):
        return count_folds(dataset, root, own)
    if not entry.get('lists'):
        return entry['folds']
    labels = _dtd_root(root) / 'labels'
    return next(fold for fold in itertools.count() if not (labels / f'train{fold + 1}.txt').is_file())


def _prepare_command(dataset: str, data_dir: Path) -> str:
    return f'python datasets.py prepare {dataset} --data_dir {shlex.quote(str(data_dir))}'


def _advice(dataset: str, root: Path) -> str:
    """How to get a complete tree in place of the one at `root`, as the end of a message."""
    if 'archives' not in DATASETS[dataset]:
        return ''
    command, made = _prepare_command(dataset, root.parent), root.parent / dataset
    return f'; move {root} away, and `{command}` makes a complete one in {made}'


# ---------------------------------------------------------------------------------------------- dtd


def dtd_splits(root: Path, fold: int) -> Splits:
    """Any tree in the layout of DTD: images/<class>/<file>, labels/{train,val,test}{fold}.txt of class/file lines."""
    root = _dtd_root(root)
    names = {subset: read_list(root / 'labels' / f'{subset}{fold}.txt') for subset in SUBSETS}
    classes = sorted({_dtd_class(name) for listed in names.values() for name in listed})
    index = {name: i for i, name in enumerate(classes)}
    path_of = {name: os.path.join(root, 'images', name) for listed in names.values() for name in listed}
    there = require_files({path_of[name]: f'labels/{subset}{fold}.txt' for subset in SUBSETS for name in names[subset]})
    items = {s: [(there[path_of[name]], index[_dtd_class(name)]) for name in names[s]] for s in SUBSETS}
    return Splits(*(items[subset] for subset in SUBSETS), classes)


def _dtd_class(name: str) -> str:
    return composed(name.split('/')[0])


def _dtd_root(root: Path) -> Path:
    return find_root(root, ('images', 'labels', 'labels/train1.txt'), DATASETS['dtd']['top'], 'dtd')


def _is_dtd(root: Path) -> bool:
    """True for DTD itself, False for another tree in its layout, which may have any size."""
    folders = [e for e in os.scandir(_dtd_root(root) / 'images') if e.is_dir() and not is_hidden(e.name)]
    return len(folders) == DATASETS['dtd']['classes']


# ---------------------------------------------------------------------------------------------- fmd


def fmd_splits(root: Path, fold: int) -> Splits:
    """image/<class>/*.jpg as the archive unpacks, or <class>/*.jpg. Masks have the same names and are never read."""
    files = list_images(root / 'image' if (root / 'image').is_dir() else root, DATASETS['fmd']['skip'])
    return partition(files, fold)


# ---------------------------------------------------------------------------------------------- kth_tips2


def kth_splits(root: Path, fold: int) -> Splits:
    """<class>/sample_{a,b,c,d}/*.png: a physical sample is tested, d in fold 1 to a in fold 4.

    A tenth of each class's remaining images validates. They show the samples that train, so validation accuracy is far
    above test accuracy and does not measure how a checkpoint does on new samples.
    """
    top = DATASETS['kth_tips2']['top']
    root = root / top if (root / top).is_dir() else root
    classes, tested = sorted({path.parent.name for path in root.glob('*/sample_[abcd]')}), 'dcba'[fold - 1]
    items = defaultdict(list)
    for label, cls in enumerate(classes):
        samples, rest = list_images(root / cls), []
        for sample in 'abcd':
            paths = samples.get(f'sample_{sample}', [])
            if sample == tested:
                items['test'] += [(path, label) for path in paths]
            else:
                rest += paths
        for subset, paths in zip(SUBSETS, draw_val(rest, f'fold{fold}/', lambda path: os.path.relpath(path, root))):
            items[subset] += [(path, label) for path in paths]
    return sorted_splits(items, classes)


# ---------------------------------------------------------------------------------------------- cub200


def cub_splits(root: Path, fold: int) -> Splits:
    """The official test set; a tenth of each class's official training images validates, another one in each fold."""
    parts = ('images', 'images.txt', 'image_class_labels.txt', 'train_test_split.txt', 'classes.txt')
    root = find_root(root, parts, DATASETS['cub200']['top'], 'cub200')
    names, labels, official, classes = (
        read_table(root / f'{table}.txt') for table in ('images', 'image_class_labels', 'train_test_split', 'classes')
    )
    for table, rows in (('image_class_labels', labels), ('train_test_split', official)):
        if rows.keys() != names.keys():
            path = f'{root / table}.txt'
            raise BadTreeError(Problem(path, 'tree', f'{path}: does not list the same images as images.txt'))
    paths = {key: os.path.join(root, 'images', name) for key, name in names.items()}
    require_files(dict.fromkeys(paths.values(), 'images.txt'))
    by_class, items = defaultdict(list), defaultdict(list)
    for key, path in paths.items():
        label = int(labels[key]) - 1
        if official[key] == '1':
            by_class[label].append(path)
        else:
            items['test'].append((path, label))
    for label, listed in by_class.items():
        for rank, path in enumerate(hash_order(listed, '')):
            items['val' if rank % 10 == fold - 1 else 'train'].append((path, label))
    return sorted_splits(items, [classes[str(i + 1)] for i in range(len(classes))])


# ---------------------------------------------------------------------------------------------- flowers102


def flowers_splits(root: Path, fold: int) -> Splits:
    """Fold 1 is the official split; folds 2 to 5 redraw train and val, ten a class each, from the official two.

    The official test set, 6149 images, is tested in every fold. The classes have no names in the archive: they are
    called by their official numbers, 001 to 102.
    """
    root = find_root(root, ('jpg', 'imagelabels.mat', 'setid.mat'), DATASETS['flowers102']['top'], 'flowers102')
    labels = read_mat(root / 'imagelabels.mat', 'labels')
    train, val, test = (read_mat(root / 'setid.mat', name) for name in ('trnid', 'valid', 'tstid'))
    if fold > 1:
        pool: dict[int, list[int]] = defaultdict(list)
        for number in train + val:
            pool[labels[number - 1]].append(number)
        ranked = [hash_order(numbers, f'fold{fold}/', str) for numbers in pool.values()]
        train = sorted(n for numbers in ranked for n in numbers[: len(numbers) // 2])
        val = sorted(n for numbers in ranked for n in numbers[len(numbers) // 2 :])
    items = [
        [(os.path.join(root, 'jpg', f'image_{number:05d}.jpg'), labels[number - 1] - 1) for number in numbers]
        for numbers in (train, val, test)
    ]
    require_files({path: 'setid.mat' for subset in items for path, _ in subset})
    return Splits(*items, [f'{label:03d}' for label in range(1, max(labels) + 1)])


# ---------------------------------------------------------------------------------------------- synthetic


def synthetic_splits(root: Path, fold: int) -> Splits:
    """Procedural textures: paths 'synthetic:<class>/<index>' that open_image draws instead of reading."""
    files = {c: [f'{SYNTHETIC}{c}/{i:04d}' for i in range(synthetic.PER_CLASS)] for c in synthetic.CLASSES}
    return partition(files, fold)


SPLITS = {
    'dtd': dtd_splits,
    'fmd': fmd_splits,
    'kth_tips2': kth_splits,
    'cub200': cub_splits,
    'flowers102': flowers_splits,
    'folder': folder_splits,
    'lists': list_splits,
    'synthetic': synthetic_splits,
}


# ---------------------------------------------------------------------------------------------- complete trees


def tree_digest(splits: Splits) -> str:
    """A digest of a tree, the same for all its folds: classes, names and sizes of the images, what divides them."""
    images, lists = _all_images(splits)
    top = top_of(images)
    lines = sorted(f'{cls} {path[len(top) :]} {size_of(path)}' for path, cls in images.items())
    divided = sorted(f'{place} {group} {path[len(top) :]}' for path, (place, group) in (splits.division or {}).items())
    return digest_lines(lines + lists + divided)


def notes_of(splits: Splits) -> list[str]:
    """What the user should know of a fold: how it was read, its groups, what it does not test, and what is not used.

    Hidden files and folders do not count.
    """
    if splits.root is None:
        return []
    notes, images = [*splits.notes], splits.images
    if splits.division and any(group for _, group in splits.division.values()):
        classes = defaultdict(list)  # of the images, by group
        for path, cls in images.items():
            classes[splits.division[path][1]].append(cls)
        alone, mixed = 0, []
        for group, found in classes.items():
            alone += len(found) == 1
            mixed += [group] * (len(set(found)) > 1)
        line = f'groups: {counted(len(images), "image")} in {counted(len(classes), "group")}, {alone} of one image'
        if mixed:
            line += f'; {counted(len(mixed), "group")} of images of several classes, such as {min(mixed)}'
        notes.append(line)
    trained = {label for _, label in splits.train}
    for subset, what in (('val', 'validated'), ('test', 'tested')):
        of = {label for _, label in getattr(splits, subset)}
        if of and (absent := trained - of):  # after Splits.joined no image validates
            more = f' (and {len(absent) - 1} more)' * (len(absent) > 1)
            notes.append(f"no image of class '{splits.classes[min(absent)]}'{more} is {what} in this fold")
    if splits.dataset == 'lists':
        return notes + unused_files(images, None)
    images, _ = _all_images(splits)
    notes += class_notes(os.path.basename(os.path.dirname(path)) for path in images)
    return notes + unused_files(images, top_of(images))


def _all_images(splits: Splits) -> tuple[dict[str, str], list[str]]:
    """{path: class} of the images of all folds of a tree, and the lines of its lists of folds, if it has any."""
    images, lists = splits.images, []
    if not DATASETS[splits.dataset].get('lists'):  # the same images are divided in every fold
        return images, lists
    root, find = _dtd_root(splits.root), path_finder()
    for fold in range(1, _count_folds(splits.dataset, splits.root, splits.own) + 1):
        for subset in SUBSETS:
            if (listed := root / 'labels' / f'{subset}{fold}.txt').is_file():
                for name in read_list(listed):
                    path = os.path.join(root, 'images', name)
                    images[find(path) or path] = _dtd_class(name)
                    lists.append(f'{subset}{fold} {name}')
    return images, lists


# ---------------------------------------------------------------------------------------------- prepare and check


def prepare(dataset: str, data_dir: Path) -> Path:
    """Download, verify and unpack a data set into data_dir/<dataset>, as prepare_tree does; returns that folder."""
    entry = DATASETS[dataset]
    if 'archives' not in entry:
        raise DataError(f'{dataset} is not downloaded ({entry["source"]})')
    prepare_tree(entry['archives'], entry.get('top', ''), data_dir / dataset)
    return data_dir / dataset


def check_tree(dataset: str, data_dir: Path | None, own: SplitOptions = AS_IT_IS, table: Path | None = None) -> None:
    """Verify a tree and print what is found: sizes, images that do not decode, and those that are there twice.

    A CSV at `table` gets each problem as a row, and of copies those that do no harm, too: no fold separates them.

    Raises:
        DataError: there are problems; the message counts them.
    """
    root, entry, where = _root(dataset, data_dir, own), DATASETS[dataset], data_dir or own.lists or dataset
    folds, tree = _load_folds(dataset, data_dir, own)
    images, notes = {}, []
    for splits in folds.values():
        images |= splits.images
    if folds:
        first = next(iter(folds.values()))
        notes = notes_of(first)
        other = ' (another tree in its layout can train, but is not verified)' if entry.get('lists') else ''
        sizes = dict(classes=len(first.classes), images=len(images), folds=_count_folds(dataset, root, own))
        for what, count in sizes.items():
            if count != entry.get(what, count):
                line = f'{where}: has {count} {what}, {dataset} has {entry[what]}{other}'
                tree.append(Problem(str(where), 'tree', line))
    elif dataset != 'lists':  # no fold to go by: every image in the tree
        found = [path for path in walk(str(root)) if is_image(os.path.basename(path))]
        skipped = [os.path.join(root, folder, '') for folder in entry.get('skip', ())]
        images = {path: '' for path in found if not path.startswith(tuple(skipped))}
        notes = unused_files(images, str(root))
    bits, of_bits = image_bits(images)
    groups, unreadable = group_by_content(images, bits, f'checking {dataset}')
    twice = _copies(groups, images, folds)
    unreadable = [
        problem._replace(folds=tuple(fold for fold, splits in folds.items() if problem.path in splits.images))
        for problem in unreadable
    ]
    found = [*twice, *unreadable, *tree]
    for line in (*notes, *of_bits, *count_pages(images), *(problem.line for problem in found)):
        print(line)
    if table:
        rows = ((p.path, p.kind, p.other, ' '.join(map(str, p.folds)), p.line) for p in found)
        write_csv(table, ('path', 'kind', 'other', 'folds', 'problem'), rows)

    benchmark = 'archives' in entry  # its copies are part of its protocol
    divided = len(folds) > 1 and own.groups is None
    kinds = {
        'of the tree': len(tree),
        'of images that cannot be read': len(unreadable),
        'of images that stand in two subsets of a fold: leave one of each'
        + ', or keep groups together (--groups)' * divided: 0 if benchmark else sum(bool(copy.folds) for copy in twice),
    }
    if total := sum(kinds.values()):
        sys.stdout.flush()  # the last line is the error
        counts = ', '.join(f'{count} {kind}' for kind, count in kinds.items() if count)
        raise DataError(f'{where}: {counted(total, "problem")}, {counts}{_advice(dataset, root)}')
    copies = f'; {len(twice)} of its images {"is" if len(twice) == 1 else "are"} there twice' if twice else ''
    print(f'{where} is complete{copies}')


def _load_folds(dataset: str, data_dir: Path | None, own: SplitOptions) -> tuple[dict[int, Splits], list[Problem]]:
    """The folds of a tree that can be loaded, and the problems of the others, each once with all folds that have it."""
    folds, problems, where = {}, {}, str(data_dir or own.lists or dataset)
    try:
        count = _count_folds(dataset, _root(dataset, data_dir, own), own)
    except (DataError, OSError):  # loading the first fold says why
        count = None
    for fold in range(1, (count or 1) + 1):
        try:
            folds[fold] = load_splits(dataset, data_dir, fold, own)
        except DataError as error:
            bad_tree = isinstance(error.__cause__, BadTreeError)
            for problem in error.__cause__.problems if bad_tree else [Problem(where, 'tree', str(error))]:
                # Every fold lists a missing image, each in a list of its own.
                key = problem.path if problem.kind == 'missing' else problem.line
                first = problems.setdefault(key, problem)
                problems[key] = first._replace(folds=(*first.folds, fold) if count else ())
    return folds, list(problems.values())


def _copies(groups: list[list[str]], images: dict[str, str], folds: dict[int, Splits]) -> list[Problem]:
    """Each copy of an image, with the folds in which it stands in another subset than the first.

    Args:
        groups: paths of images with the same content.
        images: {path: class}.
        folds: by number.
    """
    places = {
        fold: {path: subset for subset in SUBSETS for path, _ in getattr(splits, subset)}
        for fold, splits in folds.items()
    }
    twice = []
    for first, *copies in groups:
        for copy in copies:
            apart = [fold for fold, place in places.items() if place.get(first) != place.get(copy)]
            where = 'in one subset of every fold' if folds else 'and no fold can be loaded'
            if apart:
                where = f'in two subsets of fold {", ".join(map(str, apart))}'
            classes = '' if images[first] == images[copy] else ' in two classes'
            line = f'the same image twice{"," * bool(classes)}{classes}: {first} and {copy}, {where}'
            twice.append(Problem(copy, f'copy{classes}', line, first, tuple(apart)))
    return twice


# ---------------------------------------------------------------------------------------------- command line


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='List, prepare and check data sets, and show their folds.')
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('list', help='list the data sets')
    prepare = commands.add_parser('prepare', help='download, verify and unpack a data set into DATA_DIR/KEY')
    check = commands.add_parser('check', help='verify the tree at DATA_DIR')
    split = commands.add_parser('split', help='print one fold of the tree at DATA_DIR')
    for command in (prepare, check, split):
        command.add_argument('dataset', metavar='KEY', help=f'one of {", ".join(DATASETS)}')
        command.add_argument('--data_dir', type=Path, help='root of the data set; for prepare, its parent folder')
        if command is not prepare:
            add_split_args(command)
    check.add_argument(
        '--csv',
        type=Path,
        help='also write each problem to a CSV: path, kind (missing, empty class, listed twice, unreadable, copy, '
        'copy in two classes, or tree), other path, folds that it concerns, sentence',
    )
    prepare.set_defaults(data_dir=Path('data'), csv=None)
    split.add_argument('--fold', type=int, default=1, help='fold, counted from 1')
    show = commands.add_parser('show', help='draw examples of the synthetic classes')
    show.add_argument('--out', type=Path, default=Path('figures/synthetic.png'))
    return parser


def main(args: argparse.Namespace) -> None:
    if args.command == 'list':
        for name, entry in DATASETS.items():
            size = f'{entry.get("images", "any"):>6} images {entry.get("classes", "any"):>4} classes'
            print(f'{name:12}{size}  {entry["protocol"]}\n{"":12}  {entry["source"]}')
        return
    if args.command == 'show':
        synthetic.write_sheet(args.out)
        print(args.out)
        return
    if args.command == 'prepare':
        choose_dataset(args.dataset, None)
        args.data_dir = prepare(args.dataset, args.data_dir)
    own = split_options(vars(args))
    if args.command != 'split':
        return check_tree(args.dataset, args.data_dir, own, args.csv)
    splits = load_splits(args.dataset, args.data_dir, args.fold, own)
    for subset in SUBSETS:
        for path, label in getattr(splits, subset):
            print(subset, splits.classes[label], path, sep='\t')


if __name__ == '__main__':
    # Names of files need not be UTF-8: they are printed as they are.
    with user_errors('datasets.py', 'stopped; the same command starts again', 'surrogateescape'):
        main(get_args_parser().parse_args())
