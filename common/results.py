"""Results of runs as tables: which runs of a folder belong together, their means, and what may be compared.

Seeds are averaged inside a fold first; see summarize_runs.py, which prints the tables, and plot_results.py.
"""

import argparse
import math
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from common import grid, options, runs
from common.errors import RunError
from common.registry import (
    DATASETS,
    GATE_INIT,
    MODELS,
    dataset_label,
    entry_of,
    has_stci,
    is_own,
    model_label,
    nameable,
    plain_model,
)
from common.runs import counted
from common.statistics import correct, corrected_t_test, detectable
from common.weights import is_imagenet, split_trunk

CELL = ('dataset', 'model', 'fold', 'seed')  # what tells the runs of one table apart


# ---------------------------------------------------------------------------------------------- reading


@dataclass
class Row:
    """One model on one data set under one recipe."""

    dataset: str
    model: str
    results: dict[tuple[int, int], dict] = field(default_factory=dict)  # results.json by (fold, seed)
    missing: list[tuple[int, int]] = field(default_factory=list)  # (fold, seed) that other models or seeds have
    best: int = 0  # 1 for the highest mean of its data set, 2 for the second; 0 elsewhere and where cells differ
    baseline: str | None = None  # the model it is compared with
    difference: dict = field(default_factory=dict)  # to it: value and, with a test, low, high, p, p_holm
    compared: int = 0  # models of its data set that are compared with it
    tuned: dict | None = None  # by run_all.py --tune: see grid.tuning_of

    def by_fold(self, key: str) -> dict[int, float]:
        """The mean over seeds by fold of a number of results.json; {} where a run did not record it."""
        if len(self.recorded(key)) < len(self.results):
            return {}
        seeds = defaultdict(list)
        for (fold, _), results in sorted(self.results.items()):
            seeds[fold].append(results[key])
        return {fold: statistics.fmean(values) for fold, values in seeds.items()}

    def mean_of(self, key: str) -> float | None:
        """Mean over folds; None where a run did not record it."""
        folds = self.by_fold(key)
        return statistics.fmean(folds.values()) if folds else None

    @property
    def folds(self) -> dict[int, float]:
        """Test accuracy in % by fold."""
        return self.by_fold('test_acc')

    @property
    def mean(self) -> float:
        return statistics.fmean(self.folds.values())

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over folds; None for one fold."""
        return statistics.stdev(self.folds.values()) if len(self.folds) > 1 else None

    @property
    def test_to_train(self) -> float:
        """Test images for each training image, or for each that --shots draws from; corrects for shared ones."""
        counts = ((results['n_test'], results.get('n_pool', results['n_train'])) for results in self.results.values())
        return statistics.fmean(n_test / n_train for n_test, n_train in counts)

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """95 % interval of the mean, corrected as the test of a difference; None where folds have no spread."""
        test = corrected_t_test(list(self.folds.values()), self.test_to_train)
        return (None, None) if test['p'] is None else (test['low'], test['high'])

    @property
    def detectable(self) -> float | None:
        """The true difference that 80 % of such studies would find; None without a test."""
        tested = 'p' in self.difference
        return detectable(self.difference, len(self.folds) - 1, self.compared) if tested else None

    @property
    def size(self) -> str:
        """'5 folds x 3 seeds'."""
        counts = Counter(fold for fold, _ in self.results).values()
        low, high = min(counts), max(counts)
        return f'{counted(len(counts), "fold")} x ' + f'{low}-' * (low < high) + counted(high, 'seed')

    def recorded(self, key: str) -> list:
        """Values of a key of results.json, without the runs that did not record it."""
        return [results[key] for results in self.results.values() if results.get(key) is not None]

    def last(self, key: str):
        """The last recorded value of a key of results.json; None without any."""
        return (self.recorded(key) or [None])[-1]


@dataclass
class Table:
    """All rows of one recipe; `rows` has a key (data set, model) where at least one run is complete."""

    recipe: dict
    datasets: list[str]
    models: list[str]
    rows: dict[tuple[str, str], Row]
    baseline: str | None = None  # the model that the others are compared with
    notes: list[str] = field(default_factory=list)  # what is missing or cannot be compared, by data set
    labels: dict[str, str] = field(default_factory=dict)  # of data sets, where they differ from the registry's
    tuned: dict[tuple[str, str], dict] = field(default_factory=dict)  # of rows, and of runs that are not complete yet
    sources: dict[str, str | None] = field(default_factory=dict)  # of the weights that each model began with
    gates: dict[str, float | None] = field(default_factory=dict)  # sigmoid(gate) that each model begins with, if known
    asked: tuple[str, ...] = ()  # options of summarize_runs.py that add columns or rows

    def label(self, dataset: str) -> str:
        return dataset_label(dataset, self.labels)

    def note(self, dataset: str, text: str) -> None:
        self.notes.append(f'{self.label(dataset)}: {text}')


@dataclass
class FoundRun:
    """A run and its copies."""

    config: dict  # config.json
    results: dict | None = None  # results.json; None where no copy is complete
    folders: list[Path] = field(default_factory=list)

    @property
    def tuned(self) -> dict | None:
        """What run_all.py --tune chose for it: see grid.tuning_of."""
        return self.config.get('options', {}).get('tuned')

    @property
    def recipe(self) -> dict:
        return recipe_of(self.config, self.tuned)


def cell_of(config: dict) -> tuple[str, str, int, int]:
    """Data set, by its --name where it has one, model, fold and seed of a run."""
    dataset, *cell = (config['defines'][key] for key in CELL)
    return config['defines'].get('name') or dataset, *cell


def read_run(folder: Path) -> tuple[dict, dict | None]:
    """config.json and results.json of a run. Raises RunError: one is damaged, or not of train.py."""
    config, results = (runs.read_json(folder / name) for name in ('config.json', 'results.json'))
    defines = config.get('defines')
    if not isinstance(defines, dict) or not {*CELL, 'split'} <= defines.keys() or 'fingerprint' not in config:
        raise RunError(f'{folder / "config.json"}: has no defines or no fingerprint')
    if results is not None and results.get('fingerprint') != config['fingerprint']:
        raise RunError(f'{folder / "results.json"}: is of another configuration')
    return config, results


def read_runs(args: argparse.Namespace, what: str) -> list[FoundRun]:
    """The runs that the options of add_run_args ask for, each once; what was left out is named on stderr.

    Args:
        args: the options.
        what: 'run' for any, 'complete run' where one at least must be.

    Raises:
        RunError: there is no such run, a name is not known, or runs are of different images.
    """
    found: dict[tuple, FoundRun] = {}
    seen: dict[tuple, tuple[str, Path]] = {}
    models = set()  # of all runs, asked for or not
    for path in (path for top in args.run_dir for path in top.glob('*/results.json')):
        if not path.with_name('config.json').exists():
            print(f'left out: {path.parent}: has no config.json', file=sys.stderr)
    for folder in (folder for top in args.run_dir for folder in runs.find_runs(top)):
        try:
            config, results = read_run(folder)
        except RunError as error:
            print(f'left out: {error}', file=sys.stderr)
            continue
        dataset, model, *cell = cell_of(config)
        models.add(model)
        if args.models and model not in args.models:
            continue
        if results is None:
            print(f'not complete: {folder}', file=sys.stderr)
        _check_images(seen, folder, config)
        run = found.setdefault((config['fingerprint'], dataset, model, *cell), FoundRun(config))
        run.folders.append(folder)
        if run.results is None:
            run.config, run.results = config, results
        elif results is not None:
            print(f'counted once, made twice: {folder}', file=sys.stderr)
    options.check_names('labels', args.labels, DATASETS | {dataset: {} for _, dataset, *_ in found})
    for option, names in (('models', args.models or ()), ('baseline', filter(None, [args.baseline]))):
        if unknown := [name for name in names if name not in MODELS and name not in models]:
            raise RunError(f"--{option}: no run of '{unknown[0]}'; there are runs of: {', '.join(sorted(models))}")
    if not any(run.results or what == 'run' for run in found.values()):
        of = f' of {", ".join(args.models)}' if args.models else ' that can be read'
        raise RunError(f'{", ".join(map(str, args.run_dir))}: no {what}{of}')
    return list(found.values())


def _check_images(seen: dict[tuple, tuple[str, Path]], folder: Path, config: dict) -> None:
    """Raise RunError for a run on other images than the runs seen so far, which it joins."""
    dataset, _, fold, _ = cell_of(config)
    # Digests: of the tree, by data set (runs of older code did not record it), and of the split, by data set and fold.
    digests = {(dataset,): config.get('tree'), (dataset, fold): config['defines']['split']}
    for key, digest in digests.items():
        if digest is None:
            continue
        known, other = seen.setdefault(key, (digest, folder))
        if known != digest:
            named = nameable(config.get('options', {}).get('dataset', ''))
            raise RunError(
                f'{other} and {folder} are of different {"images" if key[1:] else "trees of images"}, which no '
                'table pools; move the runs of each into a folder of their own and give one of these to --run_dir'
                + ', or train one of them with another --name'
                * named
            )


def recipe_of(config: dict, tuned: dict | None = None) -> dict:
    """What all runs of a table share: the options that define a run, without those that its runs differ in.

    In place of options that were tuned for each model, as `tuned` says, it has the search.
    """
    defines = config['defines']
    own = {*CELL, 'split', 'pretrained', 'weights', 'preprocessing', 'imported', *options.OWN_DATA}
    recipe = {k: v for k, v in defines.items() if k not in own} | dict(pretrained=bool(defines.get('pretrained')))
    if tuned:
        recipe = {k: v for k, v in recipe.items() if k not in tuned['options']}
        recipe['tuned'] = f'{tuned["tune"]} on fold {tuned["fold"]}, seed {tuned["seed"]}'
    return recipe


# What is said of runs of one model that differ in one of these keys of `defines`.
ALIKE = dict(
    pretrained='start from different weights',
    imported='are of different files of --import',
    preprocessing='take different input',
)


def start_of(config: dict) -> dict:
    """What all runs of one model in a table share beside the recipe: the keys of ALIKE; None is like any other."""
    defines = config['defines']
    start = {key: defines.get(key) for key in ALIKE}
    # A model of the registry needs no file; timm may have the model of a run that named none.
    return start | (dict(imported=None) if is_own(plain_model(defines['model'])) else {})


def source_of(config: dict) -> str | None:
    """Where the weights that a run began with come from, in words: ImageNet, a file or a run; None without any."""
    made, defines = config.get('options', {}), config['defines']
    if not (pretrained := defines.get('pretrained')):
        return None
    given = made.get('pretrained')
    if 'probe' in defines:
        if made.get('checkpoint'):
            return pretrained
        given = dict(text.partition('=')[::2] for text in made['models']).get(defines['model'].partition('+')[0])
    _, given = split_trunk(given or True)
    path = Path(given) if isinstance(given, str) else given
    return 'ImageNet weights' if is_imagenet(path) else '/'.join(path.parts[-2:])  # the run folder of a best.pt


def make_tables(found: list[FoundRun], args: argparse.Namespace) -> list[Table]:
    """A table for each recipe, the one with most runs first.

    Models stand in the order of --models or the registry, and are compared with --baseline or the first of
    options.BASELINES that a table has. Raises RunError for runs of one model that differ in more than fold and seed.
    """
    by_recipe = defaultdict(list)
    for run in found:
        by_recipe[runs.fingerprint(run.recipe)].append(run)
    made = [_make_table(group, args) for group in by_recipe.values()]
    return sorted(made, key=lambda table: -sum(len(row.results) for row in table.rows.values()))


def _make_table(group: list[FoundRun], args: argparse.Namespace) -> Table:
    rows: dict[tuple[str, str], Row] = {}
    cells = defaultdict(set)  # (fold, seed) of every run of a data set, complete or not
    tuned, alike, sources, gates = {}, {}, {}, {}  # of every run, complete or not
    for run in group:
        dataset, model, *cell = cell_of(run.config)
        cells[dataset].add(tuple(cell))
        for key, value in start_of(run.config).items():
            if value is not None and (other := alike.setdefault((model, key), value)) != value:
                which = f'{ALIKE[key]} ({other} and {value})'
                raise RunError(f'runs of {model} {which}; put them into folders of their own')
        sources.setdefault(model, source_of(run.config))
        if gates.get(model) is None:  # not known of a run that is not complete
            gates[model] = initial_gate(model, run.config, run.results)
        setting = run.tuned
        if setting and (other := tuned.setdefault((dataset, model), setting)) != setting:
            texts = ' and '.join(grid.text_of(each['options']) for each in (other, setting))
            raise RunError(
                f'runs of {model} on {dataset} are by two tuned.json, of other trials ({texts}); give one --run_dir'
            )
        if run.results is not None:
            row = rows.setdefault((dataset, model), Row(dataset, model, tuned=setting))
            row.results[tuple(cell)] = run.results
    order, recipe = list(args.models or MODELS), group[0].recipe
    models = sorted(sources, key=lambda model: _place(model, order))
    baselines = [*options.BASELINES, *(models if 'probe' in recipe else ())]
    baseline = args.baseline or next((name for name in baselines if name in models), baselines[0])
    datasets = [name for name in [*DATASETS, *sorted(cells.keys() - DATASETS.keys())] if name in cells]
    sources = {model: sources[model] for model in models}
    table = Table(recipe, datasets, models, rows, baseline, [], args.labels, tuned, sources, gates)
    for dataset in datasets:
        _note_rows(table, dataset, cells[dataset])
        _compare(table, dataset, asked=args.baseline is not None)
    return table


def _place(model: str, order: list[str]) -> tuple:
    """Where a model stands in a table: as in `order`, then by name, an stci_ one behind its plain one."""
    plain = plain_model(model)
    base = entry_of(plain).get('base', plain)
    by_name = base, plain != base, model
    return next((order.index(name) for name in (model, plain, base) if name in order), len(order)), *by_name


def _note_rows(table: Table, dataset: str, cells: set[tuple[int, int]]) -> None:
    """Fill in which (fold, seed) each row lacks; note them, and weights that its images may have trained."""
    expected = {(fold, seed) for fold, _ in cells for _, seed in cells}
    lacking, cautioned = defaultdict(list), defaultdict(list)
    for model in table.models:
        label, row = model_label(model), table.rows.get((dataset, model))
        if row is None:
            table.note(dataset, f'no complete run of {label}')
            continue
        row.missing = sorted(expected - row.results.keys())
        if row.missing:
            lacking[', '.join(f'fold {fold} seed {seed}' for fold, seed in row.missing)].append(label)
        for caution in dict.fromkeys(row.recorded('caution')):
            cautioned[caution].append(label)
    for missing, names in lacking.items():
        table.note(dataset, f'{", ".join(names)} {"lack" if names[1:] else "lacks"} {missing}')
    for caution, names in cautioned.items():
        table.note(dataset, f'{", ".join(names)}: {caution}')


def _compare(table: Table, dataset: str, asked: bool) -> None:
    """Fill in the ranks and the differences to the baseline, where all models have the same (fold, seed).

    asked: the user named the baseline, so that its absence is noted even where there is nothing to compare.
    """
    rows = [table.rows[dataset, model] for model in table.models if (dataset, model) in table.rows]
    base = table.rows.get((dataset, table.baseline))
    if base is None and (asked or len(rows) > 1):
        table.note(
            dataset,
            f'no run of the baseline {model_label(table.baseline)}, so none is compared; --baseline names another',
        )
    if len({frozenset(row.results) for row in rows}) > 1:
        table.note(dataset, 'the models have different folds or seeds, so none is ranked or compared')
        return
    means = sorted({round(row.mean, 9) for row in rows}, reverse=True)
    for row in rows:
        row.best = means.index(round(row.mean, 9)) + 1 if len(rows) > 1 and row.mean >= means[:2][-1] - 1e-9 else 0
    others = [row for row in rows if base and row is not base]
    tests = []
    for row in others:
        differences = [row.folds[fold] - base.folds[fold] for fold in base.folds]
        tests.append(corrected_t_test(differences, row.test_to_train))
    correct(tests)
    for row, test in zip(others, tests):
        row.baseline, row.compared = table.baseline, len(tests)
        row.difference = dict(value=test['value']) if test['p'] is None else test


# ---------------------------------------------------------------------------------------------- words


def differing_keys(recipe: dict, among: list[dict]) -> set[str]:
    """What of a recipe is not the same in all recipes `among`; between training and probing everything differs."""
    among = [other for other in among if other.get('probe') == recipe.get('probe')]
    return {k for other in among for k in recipe if other.get(k) != recipe.get(k)}


def title_of(table: Table, among: list[dict]) -> str:
    """The title of a table: how long, how large, from which start, and what else tells it from all recipes `among`."""
    recipe, differing = table.recipe, differing_keys(table.recipe, among)
    if 'probe' in recipe:
        images = 'train and val' if recipe['train_on'] == 'trainval' else recipe['train_on']
        if recipe['shots']:
            images = f'{counted(recipe["shots"], "image")} a class of {images}'
        words = [f'frozen features of the {recipe["probe"]}', f'classifiers on {images}', f'{recipe["img_size"]} px']
        differing -= {'train_on', 'shots', 'probe'}
    else:
        sources, shares = filter(None, dict.fromkeys(table.sources.values())), loaded_percent(table, 'dataset').values()
        length = 'up to ' * ('patience' in recipe) + counted(recipe.get('epochs'), 'epoch')
        words = [length, f'{recipe.get("img_size")} px']
        words += [f'from {" and ".join(sources) or "scratch"}']
        if any(len(known) > 1 for known in shares):
            words += [f'{percent_range(set().union(*shares))} of the parameters loaded']
        if table.tuned and 'tuned' not in differing:
            words += [f'{" and ".join(next(iter(table.tuned.values()))["options"])} tuned']
        words += ['trained on train and val'] * (recipe.get('train_on') == 'trainval')
        differing -= {'epochs', 'train_on'}
    return ', '.join(words + [f'{k} {recipe[k]}' for k in sorted(differing - {'img_size', 'pretrained'})])


def initial_gate(model: str, config: dict, results: dict | None) -> float | None:
    """sigmoid(gate) from which all gates of a run start; None without gates, and where weights may have brought others.

    Args:
        model: its name.
        config: config.json of the run; {} where there is none.
        results: its results.json; None where there is none.
    """
    entry = entry_of(model)
    if not has_stci(entry):
        return None
    given = config.get('options', {}).get('pretrained')
    # Older code wrote no record of what it loaded; weights of timm for the plain CNN, in a file of its name, have no
    # gates.
    plain = 'stci' in entry and (given is True or Path(str(given)).stem == entry['timm'])
    record = (results or {}).get('weights') or dict(gates=0 if plain else None)
    if config.get('defines', {}).get('pretrained', True) is not None and record['gates'] != 0:
        return None
    branch = entry.get('stci', entry.get('twist'))
    return 1 / (1 + math.exp(-branch.get('gate_init', GATE_INIT)))


def loaded_percent(table: Table, by: str) -> dict[str, set[int]]:
    """Shares of the parameters loaded, in whole percent, by 'dataset' or 'model'."""
    shares = defaultdict(set)
    for row in table.rows.values() if table.recipe.get('pretrained') else ():
        shares[getattr(row, by)] |= {round(100 * share) for share in row.recorded('loaded')}
    return shares


def loaded_note(table: Table) -> str:
    """What the models of a table began with, and how much of it was loaded; '' for one of runs from scratch."""
    shares, by_source = loaded_percent(table, 'model'), defaultdict(dict)
    for model in (model for model in table.models if model in shares):
        by_source[table.sources[model]][model_label(model)] = percent_range(shares[model])
    notes = []
    for source, words in by_source.items():
        one = len(by_source) == 1 and len(set(words.values())) == 1
        listed = [*words.values()][:1] if one else [f'{label} {share}' for label, share in words.items()]
        notes.append(f'Parameters loaded from {source}: {", ".join(listed)}.')
    return ' '.join(notes)


def tuned_note(table: Table) -> str:
    """What was tuned for each model, over how many settings, by what, and what was chosen; '' where nothing was."""
    if not table.tuned:
        return ''
    search, listed = next(iter(table.tuned.values())), []
    for model in table.models:
        settings = {dataset: each for (dataset, name), each in table.tuned.items() if name == model}
        by_text = defaultdict(list)
        for dataset, setting in settings.items():
            lost = f' ({setting["diverged"]} of {setting["tried"]} diverged)' if setting['diverged'] else ''
            by_text[grid.text_of(setting['options']) + lost].append(table.label(dataset))
        several = len(by_text) > 1
        texts = [text + f' on {", ".join(names)}' * several for text, names in by_text.items()]
        listed += [f'{model_label(model)} {" and ".join(texts)}'] if settings else []
    values = '; '.join(search['tune'].split()).replace('=', ' ').replace(',', ', ')
    return (
        f'Tuned for each model and data set by validation accuracy on fold {search["fold"]} with seed '
        f'{search["seed"]}, {counted(search["tried"], "setting")} ({values}): {"; ".join(listed)}.'
    )


def percent_range(values: set[int]) -> str:
    """'6-100 %', or '6 %'."""
    if not values:
        return 'share not recorded'
    low, high = min(values), max(values)
    return f'{low}-' * (low < high) + f'{high} %'
