"""Values of options as argparse's `type` reads them: lists of numbers, names and devices."""

import argparse


class Listed(argparse.Action):
    """Joins values separated by commas, spaces or both: '--seeds 42 43' is '--seeds 42,43'."""

    def __call__(self, parser, namespace, values, option_string=None):
        parts = iter(values)  # a list or a dictionary each, as `type` returns it
        joined = next(parts)
        for part in parts:
            joined = joined | part if isinstance(part, dict) else joined + part
        setattr(namespace, self.dest, joined)


LIST = dict(nargs='+', action=Listed)  # arguments of add_argument for an option that takes a list


def parse_numbers(text: str) -> list[int]:
    """'1-3,7' is [1, 2, 3, 7], in this order, each once; a comma at an end is ignored.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    numbers: list[int] = []
    for part in text.strip(' ,').split(','):
        first, dash, last = part.strip().partition('-')
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers such as 1-10 or 42,43,44")
        first, last = int(first), int(last or first)
        if last < first or last - first > 10_000:
            raise argparse.ArgumentTypeError(f"'{part}' is no range of numbers such as 1-10")
        numbers += range(first, last + 1)
    return list(dict.fromkeys(numbers))


def parse_names(text: str) -> list[str]:
    """'a,b' is ['a', 'b'], each once."""
    names = [name.strip() for name in text.split(',') if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError('names nothing')
    return list(dict.fromkeys(names))


def parse_gpus(text: str) -> list[str]:
    """'0,0,1' is ['0', '0', '1']: two runs share the first device."""
    return [name.strip() for name in text.split(',') if name.strip()]


def parse_sbatch(text: str) -> dict[str, str | bool]:
    """'partition=gpu,exclusive' is {'partition': 'gpu', 'exclusive': True}."""
    pairs = [pair.strip().removeprefix('--').partition('=') for pair in text.strip(' ,').split(',')]
    if not all(name for name, _, _ in pairs):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of NAME=VALUE or NAME")
    return {name: value if equals else True for name, equals, value in pairs}
