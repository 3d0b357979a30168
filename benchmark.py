"""Speed of the models and of the loader on this machine.

    python benchmark.py models --models resnet18,twistnet18 --rounds 25         # also --fuse, --compile, --latex, --csv
    python benchmark.py loader --dataset dtd --data_dir data/dtd                # images per second of one core

`models` measures training steps, inference and memory, always of ResNet-18 too; `loader` compares the image pipeline
with a plain torchvision one. All tasks take turns, round by round, so that a machine that slows down slows down all of
them; medians over the rounds are reported.
"""

import argparse
import itertools
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from common import distributed, options, tables
from common.cache import open_cache
from common.errors import user_errors
from common.images import open_image, read_pixels
from common.options import split_options
from common.runs import counted
from common.timm_models import SIZE
from compute_flops import BASELINE, add_size_args, choose, latex_cells, measure, print_table
from datasets import load_splits
from models import build_model
from training import engine, trained
from training.loader import ImageList, eval_images
from transforms import Preprocessing, blank_batch, eval_view, normalize, train_transform

MIN_SECONDS = 0.05  # of one measurement: shorter work is repeated within it
MATRIX_SIDE = dict(cpu=2048, cuda=8192)  # rows and columns: large enough for the highest rate of the device
# Tasks of a model: multiply-accumulates as a multiple of a forward pass's, and title.
TASKS = {'train': (3, 'training'), 'infer': (1, 'inference'), 'single': (1, 'batch 1')}
FUSED = ' fused'  # ends the names of fused models
WAYS = ('plain', 'decoded', 'cached')  # in which the loader makes an image

# ---------------------------------------------------------------------------------------------- clock


def synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def reading(task: Callable[[int], None], times: int, device: torch.device) -> float:
    """Seconds that a task's work takes, averaged over `times`."""
    synchronize(device)
    start = time.perf_counter()
    task(times)
    synchronize(device)
    return (time.perf_counter() - start) / times


def in_turn(
    tasks: dict[Hashable, Callable[[int], None]], rounds: int, device: torch.device
) -> dict[Hashable, list[float]]:
    """Seconds of every task in every round, where task(n) does its work n times; in a round, one follows the other.

    A warm-up comes first: each task once to compile and allocate, and once more to find how often it must be repeated
    to last MIN_SECONDS.
    """
    times = {}
    for key, task in tasks.items():
        task(1)
        times[key] = math.ceil(max(1, MIN_SECONDS / max(reading(task, 1, device), 1e-9)))
    seconds = {key: [] for key in tasks}
    for number in range(1, rounds + 1):
        distributed.say(f'round {number} of {rounds}')
        for key, task in tasks.items():
            seconds[key].append(reading(task, times[key], device))
    return seconds


def ratio(seconds: list[float], base: list[float]) -> float:
    """Median over the rounds of the ratio to the baseline's seconds in the same round."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


# ---------------------------------------------------------------------------------------------- models


def matrix_task(side: int, device: torch.device, dtype: torch.dtype) -> Callable[[int], None]:
    """The product of two square matrices.

    In float32 on CUDA it does not use TF32, but cuDNN's convolutions may: these can be faster.
    """
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))

    def task(times: int) -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    return task


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward pass saves for the backward pass, each storage once, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(kept.values())


def saved_per_image(model: nn.Module, recipe: argparse.Namespace, device: torch.device) -> int:
    """Bytes that one more image in a training batch saves for the backward pass.

    The difference of two batches, because autocast also saves its copies of the weights, once for all images. Of the
    eager model: a compiled one may save less.
    """
    model.train()
    sizes = []
    for images in (recipe.batch_size, recipe.batch_size + 1):
        with distributed.autocast(device, recipe.amp):
            sizes.append(saved_bytes(model, blank_batch(images, recipe.img_size, device)))
    return sizes[1] - sizes[0]


def model_tasks(state: engine.State, num_classes: int, recipe: argparse.Namespace) -> dict[str, Callable[[int], None]]:
    """The tasks of a model by the keys of TASKS.

    The training step is train.py's, without mixing, from a uint8 batch in host memory; inference starts from a
    normalised batch on the device.
    """
    model, device = state.model, state.device
    shape = (recipe.batch_size, 3, recipe.img_size, recipe.img_size)
    images = torch.randint(256, shape, dtype=torch.uint8, pin_memory=device.type == 'cuda')
    labels = torch.randint(num_classes, (recipe.batch_size,))
    batch = normalize(images.to(device))

    def batch_loss(images: torch.Tensor, labels: torch.Tensor, *_) -> torch.Tensor:
        with distributed.autocast(device, recipe.amp):
            return F.cross_entropy(model(images), labels, label_smoothing=recipe.label_smoothing)

    def steps(times: int) -> None:
        batches = itertools.repeat((images, labels), times)
        for _ in engine.train_steps(state, batches, 0, lambda _: recipe.lr, batch_loss, recipe.clip_grad):
            pass
        state.optimizer.zero_grad(set_to_none=True)  # the other models need the memory

    @torch.inference_mode()
    def passes(times: int, x: torch.Tensor) -> None:
        model.eval()
        for _ in range(times):
            with distributed.autocast(device, recipe.amp):
                model(x)

    return dict(train=steps, infer=lambda times: passes(times, batch), single=lambda times: passes(times, batch[:1]))


def compile_apart(model: nn.Module, **kwargs) -> None:
    """Compile as train.py --compile does, with a separate graph for every model and shape.

    Models of one class share the compiler's cache: from the third one on they would run uncompiled, and those before
    with dynamic shapes. kwargs are torch.compile's.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = limits.accumulated_recompile_limit = 10_000
    model.compile(dynamic=False, **kwargs)


def row_of(facts: dict, seconds: dict, rate: float, base: dict, batch_size: int) -> dict:
    """A row of the table, of the facts of a model and of the baseline.

    `seconds` are the readings by (model, task); `rate` is that of the matrix product in floating-point operations per
    second, of which a multiply-accumulate is two. Without macs_G there are no shares of it. A fused model has no
    training: None.
    """
    name, macs, row = facts['model'], facts['macs_G'], dict(facts)
    for task, (passes, _) in TASKS.items():
        if (name, task) not in seconds:
            row |= {f'{task}_{key}': None for key in ('images_per_s', 'ratio', 'share')}
            continue
        speed = (1 if task == 'single' else batch_size) / statistics.median(seconds[name, task])
        row[f'{task}_images_per_s'] = speed
        row[f'{task}_ratio'] = ratio(seconds[name, task], seconds[base['model'], task])
        row[f'{task}_share'] = None if macs is None else passes * 2 * macs * 1e9 * speed / rate
    row['saved_ratio'] = None if facts['saved_MiB'] is None else facts['saved_MiB'] / base['saved_MiB']
    return row


def benchmark_models(args: argparse.Namespace) -> None:
    """Print the table of models, the baseline's row first unless it is asked for elsewhere."""
    options.check_bounds(args, batch_size=(2, 65_536))
    names = choose(args.models, args.img_size, args.imports)
    names = list(dict.fromkeys(names if BASELINE in names else [BASELINE, *names]))
    device = distributed.setup(args.device, seed=0)
    amp = distributed.resolve_amp(args.amp, device)
    recipe = options.parse_args(['--recipe', 'default', '--amp', amp])
    recipe.batch_size, recipe.img_size = args.batch_size, args.img_size
    facts, tasks = {}, {}
    for name in names:
        distributed.say(f'building {name}')
        size, recipe.model = measure(name, args.num_classes, args.img_size), name
        state = engine.build_state(recipe, args.num_classes, device, None, args.batch_size)
        saved = saved_per_image(state.model, recipe, device) / 2**20
        facts[name] = {key: size[key] for key in ('model', 'label', 'macs_G')} | dict(saved_MiB=saved)
        if args.compile:
            compile_apart(state.model)
        tasks |= {(name, task): work for task, work in model_tasks(state, args.num_classes, recipe).items()}
        if args.fuse:
            plain, dtype = build_model(name, args.num_classes, img_size=args.img_size), distributed.AMP_DTYPES[amp]
            fused = trained.fused(plain, name, args.img_size, dtype).to(device, memory_format=torch.channels_last)
            if args.compile:
                compile_apart(fused)
            key, label = f'{name}{FUSED}', f'{size["label"]}{FUSED}'
            facts[key] = facts[name] | dict(model=key, label=label, saved_MiB=None)
            works = model_tasks(state._replace(model=fused), args.num_classes, recipe)
            tasks |= {(key, task): works[task] for task in ('infer', 'single')}
    side, dtype = MATRIX_SIDE[device.type], distributed.AMP_DTYPES[amp]
    distributed.say('warm-up')
    seconds = in_turn(tasks | dict(matrix=matrix_task(side, device, dtype)), args.rounds, device)
    rates = [2 * side**3 / value for value in seconds['matrix']]
    rate = statistics.median(rates)
    bases = {name: facts[BASELINE + FUSED * name.endswith(FUSED)] for name in facts}
    rows = [row_of(facts[name], seconds, rate, bases[name], args.batch_size) for name in facts]
    conditions = {key: getattr(args, key) for key in ('batch_size', 'img_size', 'num_classes')}
    conditions |= dict(dtype=str(dtype).removeprefix('torch.'), compile=args.compile, device=device_name(device))
    conditions |= dict(threads=torch.get_num_threads(), rounds=args.rounds, torch=str(torch.__version__))
    conditions |= dict(matrix_side=side, matrix_gflops=rate / 1e9)
    conditions |= dict(matrix_gflops_min=min(rates) / 1e9, matrix_gflops_max=max(rates) / 1e9)  # apart if it was busy
    if args.csv:
        rows = [row | conditions for row in rows]
    print_table(args, rows, print_text, print_latex, conditions)


def device_name(device: torch.device) -> str:
    """The product name of a GPU or of the CPU."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    path = Path('/proc/cpuinfo')
    found = re.search(r'^model name\s*: (.+)$', path.read_text() if path.is_file() else '', re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


def describe(conditions: dict) -> str:
    """The two lines above a table."""
    text = (
        'batch {batch_size}, {img_size} x {img_size} pixels, {dtype}{compiled}, {device}, CPU threads: {threads}, '
        'rounds: {rounds}, torch {torch}\nmatrix rate: {matrix_gflops:.1f} GFLOP/s ({matrix_side} x {matrix_side}), '
        'in the rounds {matrix_gflops_min:.1f} to {matrix_gflops_max:.1f}'
    )
    return text.format(**conditions, compiled=', compiled' if conditions['compile'] else '')


def cells_of(row: dict) -> list[str]:
    """The numbers of a row as they are shown: of every task images/s, x and share; then saved MiB and x."""
    cells = []
    for task in TASKS:
        speed, share = row[f'{task}_images_per_s'], row[f'{task}_share']
        cells += (
            ['-', '-'] if speed is None else [f'{speed:.{1 if speed < 1000 else 0}f}', f'{row[f"{task}_ratio"]:.2f}']
        )
        cells.append('-' if share is None else f'{100 * share:.1f} %')
    return cells + ['-' if row[key] is None else f'{row[key]:.2f}' for key in ('saved_MiB', 'saved_ratio')]


def print_text(rows: list[dict], conditions: dict) -> None:
    print(describe(conditions), end='\n\n')
    head = [name for _, title in TASKS.values() for name in (f'{title}\nimages/s', '\nx', '\nshare')]
    cells = [[row['model'], *cells_of(row)] for row in rows]
    tables.print_text('l' + 'r' * (len(head) + 2), ['\nmodel', *head, 'saved\nMiB/image', '\nx'], cells)
    fused = f', of fused models as {BASELINE}{FUSED}' * any(row['model'].endswith(FUSED) for row in rows)
    print(f'\nx: times as long, or as much, as {BASELINE}{fused}; share: of the matrix rate')


def print_latex(rows: list[dict], conditions: dict) -> None:
    distributed.say(describe(conditions))  # a table has no place for them
    titles = [rf'\multicolumn{{3}}{{c}}{{{title.capitalize()}}}' for _, title in TASKS.values()]
    head = [
        '& ' + ' & '.join([*titles, r'\multicolumn{2}{c}{Saved}']) + r' \\',
        r'\cmidrule(lr){2-4} \cmidrule(lr){5-7} \cmidrule(lr){8-10} \cmidrule(lr){11-12}',
        'Model' + r' & images/s & $\times$ & share' * len(TASKS) + r' & MiB/image & $\times$ \\',
    ]
    tables.print_latex('l' + 'r' * 11, head, [latex_cells([row['label'], *cells_of(row)]) for row in rows])


# ---------------------------------------------------------------------------------------------- loader


def loader_tasks(items: list[tuple[str, int]], img_size: int) -> dict[tuple[str, str], Callable[[int], None]]:
    """The tasks of the loader, by (kind of image, one of WAYS): each makes all images.

    'plain' is the usual pipeline: PIL images, torchvision's defaults but for bicubic crops, and floats at the end.
    """
    scale, flip, *randaug = (options.DEFAULT[key] for key in ('crop_scale', 'hflip', 'randaug_n', 'randaug_m'))
    crop = v2.RandomResizedCrop(img_size, scale, interpolation=InterpolationMode.BICUBIC)
    floats = v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*Preprocessing(img_size).statistics)
    plain_train = v2.Compose([crop, v2.RandomHorizontalFlip(flip), v2.RandAugment(*randaug), *floats])
    plain_view = v2.Compose([eval_view(img_size), *floats])
    lists = {
        ('train', 'plain'): ImageList(items, lambda image, _key: plain_train(image)),
        ('eval', 'plain'): ImageList(items, lambda image, _key: plain_view(image)),
    }
    augmentation = train_transform(img_size, scale, flip, *randaug)
    for way, cache in (('decoded', None), ('cached', open_cache('ram'))):
        lists['train', way] = ImageList(items, augmentation, partial(read_pixels, cache=cache))
        lists['eval', way] = eval_images(items, Preprocessing(img_size), cache)

    def work(images: ImageList, times: int) -> None:
        for epoch in range(times):
            for i in range(len(images)):
                images[0, epoch, i]

    return {key: partial(work, images) for key, images in lists.items()}


def benchmark_loader(args: argparse.Namespace) -> None:
    """Print images per second that one core makes of some training images, taken at even distances from all of them."""
    options.check_bounds(args, images=(1, 1_000_000))
    own = split_options(vars(args))
    dataset = options.choose_dataset(args.dataset, args.data_dir, own)
    torch.set_num_threads(1)
    items = load_splits(dataset, args.data_dir, args.fold, own).train
    count = min(args.images, len(items))
    items = [items[i * len(items) // count] for i in range(count)]
    width, height = (statistics.median(side) for side in zip(*(open_image(path).size for path, _ in items)))
    seconds = in_turn(loader_tasks(items, args.img_size), args.rounds, torch.device('cpu'))
    print(
        f'{counted(count, "image")} of {dataset}, {width:.0f} x {height:.0f} pixels (median), to {args.img_size} x '
        f'{args.img_size}, one core of {device_name(torch.device("cpu"))}, rounds: {args.rounds}, torch '
        f'{torch.__version__}\n'
    )
    rows = []
    for way in WAYS:
        rows.append([way])
        for kind in ('train', 'eval'):
            speed = count / statistics.median(seconds[kind, way])
            rows[-1] += [f'{speed:.0f}', f'{ratio(seconds[kind, "plain"], seconds[kind, way]):.2f}']
    tables.print_text('lrrrr', ['', 'training\nimages/s', '\nx', 'evaluation\nimages/s', '\nx'], rows)
    print('\nx: times as many as plain (torchvision on PIL images) in the same round, median')
    print('decoded: --cache none; cached: --cache ram; their floats are made on the device and not counted')


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Measure the speed of the models or of the loader on this machine.')
    commands = parser.add_subparsers(dest='command', required=True)
    shown = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    models = commands.add_parser('models', help='images per second in training and inference, and memory use', **shown)
    models.add_argument('--models', type=options.parse_names, help='separated by commas; all if not given')
    add_size_args(models, SIZE)
    models.add_argument('--batch_size', type=int, default=32, help='images per training step and inference pass')
    models.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ...')
    models.add_argument(
        '--amp', choices=options.AMP, default='auto', help='auto: bf16 if native, else fp16 on CUDA and off on CPUs'
    )
    models.add_argument('--compile', action='store_true', help='use torch.compile, which takes minutes')
    models.add_argument('--fuse', action='store_true', help='also inference of the fused models')
    loader = commands.add_parser('loader', help='images per second that one core reads and augments', **shown)
    options.add_dataset_args(loader)
    loader.add_argument('--fold', type=int, default=1, help='fold, counted from 1')
    loader.add_argument('--img_size', type=int, default=224, help='side of the square output in pixels')
    loader.add_argument('--images', type=int, default=64, help='number of images, spread over the training images')
    for command in (models, loader):
        command.add_argument(
            '--rounds', type=int, default=10, help='measurements per model or variant, after one warm-up round'
        )
    return parser


def main(args: argparse.Namespace) -> None:
    (benchmark_models if args.command == 'models' else benchmark_loader)(args)


if __name__ == '__main__':
    with user_errors('benchmark.py'):
        main(get_args_parser().parse_args())
