"""The same search of options for every model: what run_all.py --tune tries, and what tuned.json records. No torch.

RUN_DIR/
    tuned.json         the search, and for each data set and model every setting's validation accuracy and the choice
    tune/SETTING/      the runs that were compared: ordinary run folders, which no table of RUN_DIR counts

Tables trust tuned.json only as far as a run agrees with it: see setting_of.
"""

import argparse
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from common import options, runs
from common.errors import RunError
from common.registry import is_own

FILE, FOLDER = 'tuned.json', 'tune'
SEED = 0  # of the trials, if not given: not the grid's, so that no counted run is one of those that were compared
CELL = ('dataset', 'fold', 'model', 'seed')


class Search(NamedTuple):
    """What is tried for each model: every combination of some options' values, on one fold with one seed."""

    values: dict[str, list]  # by option, in the order given
    fold: int
    seed: int

    @property
    def settings(self) -> list[dict]:
        """The options of every combination, in the order given."""
        return [dict(zip(self.values, each)) for each in itertools.product(*self.values.values())]

    @property
    def record(self) -> dict:
        """What tuned.json says of the search."""
        tune = ' '.join(f'{name}={",".join(map(_text, values))}' for name, values in self.values.items())
        return dict(tune=tune, fold=self.fold, seed=self.seed)


# ---------------------------------------------------------------------------------------------- --tune


def parse_tune(words: list[str]) -> dict[str, list]:
    """The values of each option, as train.py's parser reads them: ['lr=0.1,.2'] is {'lr': [0.1, 0.2]}.

    Raises:
        RunError: with the word that names no option, one that cannot be searched, or a value that is refused.
    """
    values: dict[str, list] = {}
    fixed, known = fixed_options(), vars(options.get_args_parser().parse_args([]))
    for word in ' '.join(words).split():
        name, equals, texts = word.partition('=')
        name, texts = name.removeprefix('--'), [text for text in texts.split(',') if text]
        if not equals or not texts:
            raise RunError(f"--tune: '{word}' is not NAME=VALUE,..")
        if name not in known:
            tunable = ', '.join(sorted(key for key in known.keys() - fixed if not isinstance(known[key], list)))
            raise RunError(f"--tune: train.py has no option '{name}'; what can be searched: {tunable}")
        if name in fixed:
            raise RunError(f'--tune: {name} is the same for all models of a comparison, so it is not searched')
        if name in values:
            raise RunError(f'--tune: {name} is given twice; give all its values at once')
        values[name] = list(dict.fromkeys(parse_value(name, text, known[name]) for text in texts))
    if not values:
        raise RunError('--tune: names no option')
    return values


def fixed_options() -> set[str]:
    """The options of train.py that are no part of a search: data, model, length and machine are those of the grid."""
    parser = argparse.ArgumentParser()
    for add in (options.add_data_args, options.add_model_args, options.add_system_args):
        add(parser)
    return {*vars(parser.parse_args([])), *options.SYSTEM_OPTIONS, 'epochs'}


def parse_value(name: str, text: str, default) -> bool | float | str:
    """A value as train.py's parser reads it; 'on' or 'off' of a switch.

    Raises:
        RunError: the parser refuses it.
    """

    def refuse(message: str) -> None:
        raise RunError(f'--tune: {name}={text}: {message}')

    if isinstance(default, bool):
        return text == 'on' if text in ('on', 'off') else refuse('a switch is on or off')
    parser = options.get_args_parser()
    parser.error = refuse
    value = getattr(parser.parse_args([f'--{name}={text}']), name)
    return refuse('an option of several values cannot be searched') if isinstance(value, list) else value


def words_of(setting: dict) -> list[str]:
    """Arguments of train.py: {'lr': 0.1} is ['--lr', '0.1']."""
    defaults, words = vars(options.get_args_parser().parse_args([])), []
    for name, value in setting.items():
        if not isinstance(value, bool):
            words += [f'--{name}', str(value)]
        elif value != defaults[name]:
            words += [f'--{name}' if value else f'--no-{name}']
    return words


def text_of(setting: dict) -> str:
    """{'lr': 0.1, 'ema': False} is 'lr 0.1, ema off'."""
    return ', '.join(f'{name} {_text(value)}' for name, value in setting.items())


def folder_of(run_dir: Path, setting: dict) -> Path:
    """Where the trials of a setting are made: RUN_DIR/tune/lr=0.1,ema=off."""
    name = ','.join(f'{name}={_text(value)}' for name, value in setting.items())
    return run_dir / FOLDER / name.replace('/', '_')


def _text(value) -> str:
    return ('on' if value else 'off') if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------------------------------------- the choice


def accuracy_of(folder: Path) -> float | None:
    """Validation accuracy of a trial in %, the only number of it that is looked at; None where it has diverged.

    Raises:
        RunError: the trial's results are damaged.
    """
    results = runs.read_json(folder / 'results.json')
    if results is None:
        return None
    value = results.get('best_val_acc')
    if not isinstance(value, int | float):
        raise RunError(f'{folder / "results.json"}: best_val_acc is {value!r}; --force makes this run again')
    return value


def choose(model: str, trials: list[tuple[dict, float | None]]) -> dict:
    """What tuned.json says of a model: the setting with the best validation accuracy, the first on ties, and all.

    Args:
        model: its name.
        trials: (setting, validation accuracy in % or None where the trial has diverged).

    Raises:
        RunError: all have diverged.
    """
    finite = [trial for trial in trials if trial[1] is not None]
    if not finite:
        raise RunError(f'--tune: {model} diverges with every setting; try other values, or leave it out of --models')
    chosen, accuracy = max(finite, key=lambda trial: trial[1])
    return dict(chosen=chosen, val_acc=accuracy, trials=[dict(options=s, val_acc=value) for s, value in trials])


def edge_notes(chosen: dict, values: dict[str, list]) -> list[str]:
    """A note for each number that was chosen at the edge of those tried, beyond which others are allowed."""
    notes = []
    for name, tried in values.items():
        numbers = [value for value in tried if isinstance(value, int | float) and not isinstance(value, bool)]
        low, high = options.BOUNDS.get(name, (-math.inf, math.inf))
        for edge, bound, word, more in ((min, low, 'lowest', 'lower'), (max, high, 'highest', 'higher')):
            if len(numbers) > 1 and chosen[name] == edge(numbers) != bound:
                notes.append(f'{name} {chosen[name]} is the {word} that was tried; a {more} one may be better')
    return notes


# ---------------------------------------------------------------------------------------------- tuned.json


def read_record(run_dir: Path) -> dict | None:
    """The contents of tuned.json; None where there is none.

    Raises:
        RunError: the file is damaged or another's.
    """
    path = run_dir / FILE
    way_out = 'delete it, and the same run_all.py --tune makes it again from the trials'
    try:
        record = runs.read_json(path)
    except RunError as error:
        raise RunError(f'{path}: damaged; {way_out}') from error
    if record is None:
        return None
    try:
        well_formed = {'tune', 'fold', 'seed'} <= record.keys()
        for entry in record['datasets'].values():
            well_formed &= isinstance(entry['options'], dict)
            for model in entry['models'].values():
                well_formed &= isinstance(model['chosen'], dict)
                well_formed &= all('val_acc' in trial for trial in model['trials'])
    except (KeyError, TypeError, AttributeError):
        well_formed = False
    if not well_formed:
        raise RunError(f'{path}: is not one of run_all.py --tune; {way_out}')
    return record


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold tuned.json for a moment, so that several run_all.py add to it one after another."""
    runs.claim(run_dir / FOLDER, patience=60)
    try:
        yield
    finally:
        runs.release(run_dir / FOLDER)


def plan_search(run_dir: Path, tune: list[str], fold: int | None, seed: int | None, first_fold: int) -> Search:
    """The search that the options ask for; a fold or seed that they do not name is tuned.json's, else the default."""
    old = read_record(run_dir) or {}
    fold = old.get('fold', first_fold) if fold is None else fold
    seed = old.get('seed', SEED) if seed is None else seed
    return Search(parse_tune(tune), fold, seed)


def tuned_models(run_dir: Path, search: Search, parsed: argparse.Namespace, again: list[str]) -> dict[str, dict]:
    """What tuned.json says of the models of a data set.

    Args:
        run_dir: holds tuned.json, or will.
        search: must be that of tuned.json.
        parsed: train.py's options of the grid, which must be those of the trials.
        again: models to leave out; if tuned.json has no others, it may be of another search.

    Raises:
        RunError: tuned.json is of another search, or of trials with other options.
    """
    record = read_record(run_dir)
    if record is None:
        return {}
    entry = record['datasets'].get((parsed.name or parsed.dataset), dict(models={}, options={}))
    models = {name: model for name, model in entry['models'].items() if name not in again}
    others = [
        name for name, each in record['datasets'].items() if name != (parsed.name or parsed.dataset) and each['models']
    ]
    if again and not models and not others:
        return {}
    difference = runs.changes({key: record[key] for key in search.record}, search.record)
    if models and not difference:
        difference = differences(entry['options'], common_options(parsed, search.values))
    if difference:
        raise RunError(
            f'{run_dir / FILE} is of another search ({difference}); give its options, take another --run_dir, or '
            'delete it (trials that fit are kept)'
        )
    return models


def add_models(
    run_dir: Path, search: Search, parsed: argparse.Namespace, models: dict[str, dict], again: list[str]
) -> None:
    """Write what `choose` returned for some models into tuned.json; without any, the search alone.

    Raises:
        RunError: as tuned_models, or the file cannot be written.
    """
    with locked(run_dir):
        models = tuned_models(run_dir, search, parsed, again) | models
        datasets = (read_record(run_dir) or dict(datasets={}))['datasets']
        datasets[(parsed.name or parsed.dataset)] = dict(options=common_options(parsed, search.values), models=models)
        runs.write_json(run_dir / FILE, search.record | dict(datasets=datasets))


def common_options(parsed: argparse.Namespace, searched: dict) -> dict:
    """The options that the trials of all settings have in common with each other and with the grid."""
    left_out = {*CELL, *options.SYSTEM_OPTIONS, *searched}
    left_out |= {'amp', 'batch_size', 'min_lr'} - {*parsed.given}  # train.py resolves or lowers these
    kept = {key: value for key, value in vars(parsed).items() if key not in left_out}
    return kept | dict(pretrained=bool(parsed.pretrained))


def differences(old: dict, new: dict) -> str:
    """How the options of two runs differ, but for those that one of them does not know."""
    both = old.keys() & new.keys()
    return runs.changes({key: old[key] for key in both}, {key: new[key] for key in both})


def setting_of(record: dict | None, config: dict) -> dict | None:
    """How a run of RUN_DIR was tuned, by its tuned.json and its config.json; None where it was not.

    It was if tuned.json has a choice for its data set and model, the run has the values chosen, and all its other
    options are those of the trials. Another run in the folder, or one that was moved elsewhere, is an ordinary one.

    Returns:
        the record of the search with `options` (chosen), `tried` and `diverged` (numbers of settings).
    """
    defines = config['defines']
    values = defines | config.get('options', {})  # the latter has the defaults too
    entry = ((record or {}).get('datasets') or {}).get(defines.get('name') or defines['dataset'], dict(models={}))
    model = entry['models'].get(defines['model'])
    if model is None:
        return None
    chosen, trials = model['chosen'], model['trials']
    if any(values.get(name) != value for name, value in chosen.items()):
        return None
    recipes = entry['options'].get('img_size') == options.DEFAULT['img_size']
    if recipes and not is_own(defines['model']) and 'img_size' not in values.get('given', ()):
        values.pop('img_size', None)  # of the model itself, see options.fit_to_model
    if differences(entry['options'], values | dict(pretrained=bool(values.get('pretrained')))):
        return None
    search = {key: record[key] for key in ('tune', 'fold', 'seed')}
    diverged = sum(trial['val_acc'] is None for trial in trials)
    return search | dict(options=chosen, tried=len(trials), diverged=diverged)
