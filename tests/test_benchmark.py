"""The promises of benchmark.py: what it times is train.py's step, in turn, and ratios are of one round."""

import copy
import csv
import io
import itertools
import re

import pytest
import torch

import benchmark
import compute_flops
import models
from common import distributed, options
from common.errors import UserError
from models import MODELS, TwistNet
from training import engine
from transforms import Preprocessing

CPU = torch.device('cpu')
SMALL = ('--img_size', '32', '--batch_size', '2', '--rounds', '1', '--device', 'cpu', '--amp', 'off')


class Clock:
    """Stands still but for the work of its tasks, which lasts as long as it is told, a value per call."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(benchmark.time, 'perf_counter', lambda: self.now)

    def task(self, key: str, *seconds: float):
        lasting = iter(seconds)

        def work(times: int) -> None:
            self.calls.append((key, times))
            self.now += next(lasting) * times

        return work


def main(*arguments: str) -> None:
    benchmark.main(benchmark.get_args_parser().parse_args(arguments))


def rows_of(**labels: str) -> list[dict]:
    """Rows of invented readings: the baseline takes 2 s for everything, the others 3 s."""
    facts = {
        name: dict(model=name, label=label, macs_G=2.0, saved_MiB=8.0 if name == 'resnet18' else 10.0)
        for name, label in dict(resnet18='ResNet-18', **labels).items()
    }
    seconds = {(name, task): [2.0 if name == 'resnet18' else 3.0] for name in facts for task in benchmark.TASKS}
    return [benchmark.row_of(facts[name], seconds, 1e11, facts['resnet18'], batch_size=6) for name in facts]


CONDITIONS = dict(batch_size=6, img_size=224, num_classes=47, dtype='float32', compile=False, device='A_B 100%')
CONDITIONS |= dict(threads=2, rounds=1, torch='2.9', matrix_side=2048, matrix_gflops=100.0)
CONDITIONS |= dict(matrix_gflops_min=90.0, matrix_gflops_max=101.0)


# ------------------------------------------------------------------------------------------ clock


def test_tasks_are_measured_in_turn_and_the_first_round_does_not_count(monkeypatch):
    clock = Clock(monkeypatch)
    tasks = dict(a=clock.task('a', 50, 9, 1, 2), b=clock.task('b', 60, 0.02, 0.03, 0.04))
    seconds = benchmark.in_turn(tasks, 2, CPU)
    assert (seconds['a'], seconds['b']) == ([1, 2], pytest.approx([0.03, 0.04]))
    first = [('a', 1), ('a', 1), ('b', 1), ('b', 1)]
    assert clock.calls == [*first, *[('a', 1), ('b', 3)] * 2], 'short work is repeated within a reading'


def test_a_ratio_is_the_median_over_the_rounds_of_what_was_measured_in_one_round():
    assert benchmark.ratio([2, 30, 4], [1, 20, 4]) == 1.5  # of 2, 1.5 and 1; in the second round the machine was busy


def test_a_row_has_the_rates_and_the_shares_of_the_matrix_rate():
    row = rows_of(other='Other')[1]
    assert (row['train_images_per_s'], row['infer_images_per_s'], row['single_images_per_s']) == (2, 2, 1 / 3)
    assert {row[f'{task}_ratio'] for task in benchmark.TASKS} == {1.5}
    # 2 GMACs an image are 4 GFLOP in a pass and 12 in a step, of 100 GFLOP/s.
    assert [row[f'{task}_share'] for task in benchmark.TASKS] == pytest.approx([0.24, 0.08, 0.04 / 3])
    assert row['saved_ratio'] == 1.25


def test_without_macs_a_row_has_no_shares():
    facts = dict(model='resnet18', label='ResNet-18', macs_G=None, saved_MiB=8.0)
    row = benchmark.row_of(facts, {('resnet18', task): [2.0] for task in benchmark.TASKS}, 1e11, facts, batch_size=6)
    assert benchmark.cells_of(row)[:3] == ['3.0', '1.00', '-']


# ------------------------------------------------------------------------------------------ models


def tasks_of_a_tiny_model() -> tuple[TwistNet, dict]:
    torch.manual_seed(0)
    model = TwistNet(num_classes=5, base_width=8)
    recipe = options.parse_args(['--recipe', 'default', '--batch_size', '2', '--img_size', '32', '--amp', 'off'])
    optimizer, scaler = engine.build_optimizer(recipe, model), torch.amp.GradScaler('cpu', enabled=False)
    state = engine.State(model, model, optimizer, scaler, CPU, Preprocessing(32))
    return model, benchmark.model_tasks(state, 5, recipe)


def test_a_training_step_is_the_one_of_train_py_and_inference_changes_nothing(monkeypatch):
    steps, train_steps = [], engine.train_steps

    def counted(state, batches, first, schedule, batch_loss, clip):
        for step in train_steps(state, batches, first, schedule, batch_loss, clip):
            steps.append((schedule(0), clip))
            yield step

    monkeypatch.setattr(engine, 'train_steps', counted)
    model, tasks = tasks_of_a_tiny_model()
    seen = []
    model.register_forward_hook(lambda module, x, y: seen.append((x[0].shape[0], module.training, y.is_inference())))
    before = copy.deepcopy(model.state_dict())
    tasks['train'](2)
    assert steps == [(options.DEFAULT['lr'], options.DEFAULT['clip_grad'])] * 2
    trained = copy.deepcopy(model.state_dict())
    assert all(not torch.equal(before[name], trained[name]) for name, _ in model.named_parameters())
    tasks['infer'](3)
    tasks['single'](1)
    assert seen == [(2, True, False)] * 2 + [(2, False, True)] * 3 + [(1, False, True)]
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())


def test_saved_memory_of_an_image_leaves_out_the_copies_of_the_weights():
    model, recipe = TwistNet(num_classes=5, base_width=16), options.parse_args(['--img_size', '32', '--amp', 'bf16'])
    sizes = []
    for recipe.batch_size in (2, 3):
        sizes.append(benchmark.saved_per_image(model, recipe, CPU))
    assert sizes[0] == sizes[1]
    with distributed.autocast(CPU, 'bf16'):
        assert benchmark.saved_bytes(model, torch.zeros(2, 3, 32, 32)) / 2 > 1.2 * sizes[0]


@pytest.mark.slow
def test_compiled_models_of_one_class_have_graphs_of_their_own():
    graphs, limits = [], torch._dynamo.config

    def backend(graph, inputs):
        graphs.append(all(isinstance(x, torch.Tensor) for x in inputs))  # a size that varies would be one of them
        return graph

    torch._dynamo.reset()  # of what tests before this one have compiled
    own = dict(recompile_limit=limits.recompile_limit, accumulated_recompile_limit=limits.accumulated_recompile_limit)
    small = dict(num_classes=5, layers=(1,), twist_stages=())
    built = [TwistNet(base_width=8 + 4 * i, **small).eval() for i in range(6)]
    with limits.patch(**own), torch.inference_mode():  # puts back what compile_apart sets
        for model in built:
            benchmark.compile_apart(model, backend=backend)
        for model in built * 2:
            for images in (2, 1):
                model(torch.zeros(images, 3, 32, 32))
    assert graphs == [True] * 2 * len(built)


# ------------------------------------------------------------------------------------------ tables


def test_fused_models_have_rows_of_inference_compared_with_the_fused_baseline(monkeypatch, capsys):
    seen = []

    def in_turn(tasks, rounds, device):
        for key, task in tasks.items():
            seen.append(key)
            if key != 'matrix':
                task(1)
        return {key: [2.0 if 'fused' in key[0] else 8.0] for key in tasks} | {('same fused', 'infer'): [3.0]}

    monkeypatch.setattr(benchmark, 'in_turn', in_turn)
    for name in ('resnet18', 'same'):
        monkeypatch.setitem(MODELS, name, dict(label=name, twist=dict(base_width=8, twist_stages=(4,))))
    folded, real = [], models.fold_norms
    monkeypatch.setattr(models, 'fold_norms', lambda *args: folded.append(1) or real(*args))
    main('models', *SMALL, '--models', 'same', '--fuse')
    assert len(folded) == 2
    assert [key[1] for key in seen if 'fused' in key[0]] == ['infer', 'single'] * 2
    lines = capsys.readouterr().out.splitlines()
    rows = [' '.join(line.split()) for line in lines[5:9]]
    begins = ['resnet18 0.2 1.00', 'resnet18 fused - - - 1.0 1.00', 'same 0.2 1.00', 'same fused - - - 0.7 1.50']
    assert all(row.startswith(begin) for row, begin in zip(rows, begins, strict=True)), rows
    assert rows[-1].endswith(' - -')
    assert 'as resnet18, of fused models as resnet18 fused;' in lines[-1]


def test_csv_has_plain_numbers_of_the_models_and_of_the_baseline(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, 'MIN_SECONDS', 0.001)
    monkeypatch.setitem(benchmark.MATRIX_SIDE, 'cpu', 128)
    monkeypatch.setitem(MODELS, 'resnet18', dict(label='Trunk', twist=dict(base_width=8, twist_stages=())))
    monkeypatch.setitem(MODELS, 'same', dict(label='Same', twist=dict(base_width=8, twist_stages=())))
    main('models', *SMALL, '--models', 'same,same', '--csv')
    base, row = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (base['model'], row['model']) == ('resnet18', 'same')
    words = {'model', 'label', 'dtype', 'compile', 'device', 'torch'}
    numbers = [{key: float(value) for key, value in line.items() if key not in words} for line in (base, row)]
    assert all(value > 0 for line in numbers for value in line.values())
    assert all(numbers[0][f'{key}_ratio'] == 1 for key in (*benchmark.TASKS, 'saved'))
    assert numbers[1]['saved_ratio'] == 1  # one and the same trunk
    for (task, (passes, _)), line in itertools.product(benchmark.TASKS.items(), numbers):
        work = passes * 2 * line['macs_G'] * line[f'{task}_images_per_s']  # GFLOP/s
        assert line[f'{task}_share'] == pytest.approx(work / line['matrix_gflops'])
    assert row['macs_G'] == str(compute_flops.measure('same', 47, 32)['macs_G'])
    assert (row['batch_size'], row['img_size'], row['rounds'], row['dtype']) == ('2', '32', '1', 'float32')


def test_text_states_the_conditions_and_has_a_row_a_model(capsys):
    benchmark.print_text(rows_of(other='Other'), CONDITIONS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        'batch 6, 224 x 224 pixels, float32, A_B 100%, CPU threads: 2, rounds: 1, torch 2.9',
        'matrix rate: 100.0 GFLOP/s (2048 x 2048), in the rounds 90.0 to 101.0',
    ]
    assert 'other 2.0 1.50 24.0 % 2.0 1.50 8.0 % 0.3 1.50 1.3 % 10.00 1.25' in [' '.join(x.split()) for x in lines]
    assert max(map(len, lines)) <= 120


def test_latex_is_a_table_and_nothing_else(capsys):
    benchmark.print_latex(rows_of(other='A_b & c'), CONDITIONS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(r'\begin{tabular}')
    assert lines[-1] == r'\end{tabular}'
    row = r'A\_b \& c & 2.0 & 1.50 & 24.0\,\% & 2.0 & 1.50 & 8.0\,\% & 0.3 & 1.50 & 1.3\,\% & 10.00 & 1.25 \\'
    assert row in lines
    columns = len(lines[0].partition('}{')[2].rstrip('}'))
    assert {line.replace(r'\&', '').count('&') for line in lines[4:] if '&' in line} == {columns - 1}


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('models', '--batch_size', '1'), '--batch_size 1 must be from 2 to'),
        (('models', '--rounds', '0'), '--rounds 0 must be from 1 to'),
        (('models', '--img_size', '31'), '--img_size 31 must be from 32 to'),
        (('models', '--img_size', '40', '--models', 'swin_tiny'), '--img_size 40 must be a multiple of 32 for swin_'),
        (('models', '--device', 'tpu'), "--device 'tpu' must be auto, cpu, cuda or cuda:N"),
        (('models', '--device', 'cuda:99'), '--device cuda:99: needs device 99'),
        (('models', '--models', 'resnet18,resnet19'), "unknown model 'resnet19'"),
        (('loader', '--dataset', 'synthetic', '--images', '0'), '--images 0 must be from 1 to'),
        (('loader', '--dataset', 'synthetic', '--fold', '9'), 'fold 9 of synthetic does not exist'),
        (('loader', '--dataset', 'synthetic', '--data_dir', 'x'), '--dataset synthetic is drawn and would not read'),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(UserError, match='^' + re.escape(message)):
        main(*arguments)
    assert capsys.readouterr().out == ''


# ---------------------------------------------------------------------------------------------- loader


def test_the_loader_is_shown_in_paired_medians(tree, capsys, monkeypatch, one_thread):
    # Seconds of a round by (kind, way): the same machine, half as fast in the second round.
    base = {('train', 'plain'): 8, ('train', 'decoded'): 4, ('train', 'cached'): 2}
    base |= {('eval', 'plain'): 6, ('eval', 'decoded'): 6, ('eval', 'cached'): 1}
    seen = []

    def in_turn(tasks, rounds, device):
        for task in tasks.values():
            task(1)  # every way makes every image
        seen.append((set(tasks), rounds))
        return {key: [base[key], 2 * base[key], base[key]] for key in tasks}

    monkeypatch.setattr(benchmark, 'in_turn', in_turn)
    small = ('--img_size', '32', '--images', '16', '--rounds', '3')
    main('loader', '--dataset', 'dtd', '--data_dir', str(tree), *small)
    assert seen == [(set(base), 3)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('16 images of dtd, 40 x 40 pixels')
    rows = {line.split()[0]: line.split()[1:] for line in lines[4:7]}
    assert rows == {  # 16 images (of 24) in the median of 8, 16 and 8 seconds, ..
        'plain': ['2', '1.00', '3', '1.00'],
        'decoded': ['4', '2.00', '3', '1.00'],
        'cached': ['8', '4.00', '16', '6.00'],
    }
