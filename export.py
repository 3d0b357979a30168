"""A trained model as a file for other programs, with the names of its classes and its preprocessing inside.

    python export.py --checkpoint runs/main/dtd_fold1_twistnet18_seed42/best.pt --format onnx
    python export.py --checkpoint runs/main/dtd_fold1_resnet18_seed42/best.pt --format hub --out resnet18-dtd

onnx          best.onnx, for onnxruntime; `metadata_props` holds model, classes and preprocessing. It takes
              torch 2.6 and `pip install onnx onnxscript`; onnxruntime, or else onnx's own reference, checks the file
pt2           best.pt2, for torch.export.load without this repository; extra file `metadata.json`
safetensors   best.safetensors, the tensors by name; in its metadata the same
hub           a folder as timm writes it, with a model card made from the run's config.json and results.json, for
              timm.create_model('local-dir:FOLDER', pretrained=True); --repo pushes it to the hub instead

onnx and pt2 take any number of images of the model's size, (N, 3, SIZE, SIZE), normalised, and return logits. Each file
is loaded again and its logits are compared with the model's for several batch sizes before it takes its name.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import os
import signal
import tempfile
import warnings
from pathlib import Path

from safetensors import SafetensorError
from timm.models import push_to_hf_hub, save_for_hf
from timm.models._hub import generate_readme

from common import options
from common.distributed import say, training_process
from common.errors import ModelError, RunError, user_errors
from common.model_card import model_card
from common.registry import entry_of
from common.timm_models import import_file
from formats import BATCHES, MAKE, Export, check, first_line, hub_arguments, read

ONNX_TORCH = (2, 6)  # whose exporter takes any number of images
SUFFIXES = dict(onnx='.onnx', pt2='.pt2', safetensors='.safetensors', hub='')
# ---------------------------------------------------------------------------------------------- one export


def card_of(export: Export, source: str, args: argparse.Namespace) -> dict:
    subject = export.subject
    ours = {'twist', 'stci'} & entry_of(subject.name).keys()
    modules = [Path(path).stem for path in [args.imports] if path] + ['models'] * bool(ours)
    needs = ''.join(f'import {module}  # of the repository of this model\n' for module in modules)
    needs += f"models.register('{subject.name}')\n" * ('stci' in ours)
    facts = export.preprocessing, export.config, export.results
    return model_card(subject.name, subject.classes, *facts, source, args.license, needs)


def write(export: Export, args: argparse.Namespace, path: Path) -> None:
    """Write the file or folder.

    Raises:
        ModelError: the model has no graph that can be exported. RunError: it cannot be written.
    """
    name = export.subject.name
    data = None
    if args.format != 'hub':
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter('ignore')
                data = MAKE[args.format](export)
        except Exception as error:  # tracing meets any kind
            raise ModelError(f'{name}: cannot be exported as {args.format} ({first_line(error)})') from error
    try:
        if data is not None:
            path.write_bytes(data)
            return
        save_for_hf(export.subject.model, path, **hub_arguments(export, args.license))
        card = card_of(export, f'local-dir:{args.out}', args)
        (path / 'README.md').write_text(generate_readme(card, args.checkpoint.resolve().parent.name), encoding='utf-8')
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors say so of a full disk
        reason = getattr(error, 'strerror', None) or first_line(error)
        raise RunError(f'{args.out}: cannot be written ({reason}); nothing is left of it') from error


def put(made: Path, out: Path) -> None:
    """Move a file, or the files of a folder, to its name; other files in that folder stay."""
    if made.is_dir() and out.is_dir():
        for path in sorted(made.iterdir()):
            os.replace(path, out / path.name)
    else:
        os.replace(made, out)


def push(export: Export, args: argparse.Namespace) -> str:
    """Push to a repository of the hub; returns its address. Raises RunError."""
    card = card_of(export, f'hf-hub:{args.repo}', args)
    try:
        return str(
            push_to_hf_hub(export.subject.model, args.repo, model_card=card, **hub_arguments(export, args.license))
        )
    except Exception as error:  # network, login and hub each raise their own
        raise RunError(f'--repo {args.repo}: not pushed ({first_line(error)}); `hf auth login` logs in') from error


# ---------------------------------------------------------------------------------------------- command line


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='A trained model as a file for other programs.', allow_abbrev=False)
    parser.add_argument('--checkpoint', type=Path, required=True, metavar='BEST.PT', help='of a run of train.py')
    parser.add_argument('--format', choices=tuple(SUFFIXES), required=True)
    parser.add_argument('--out', type=Path, help='file or folder; if not given, beside the checkpoint')
    parser.add_argument('--overwrite', action='store_true', help='replace what is there')
    parser.add_argument('--repo', metavar='USER/NAME', help='of hub: push to this repository; a README there stays')
    parser.add_argument('--license', default='unknown', help='of the weights, as the model card of hub states it')
    options.add_import_arg(parser)
    return parser


def check_onnx() -> None:
    """Raise RunError where a package is missing or too old. Without torch, which knows its version too."""
    if missing := [name for name in ('onnx', 'onnxscript') if importlib.util.find_spec(name) is None]:
        raise RunError(f'--format onnx: {" and ".join(missing)} missing; pip install onnx onnxscript onnxruntime')
    version = importlib.metadata.version('torch')
    if tuple(map(int, version.split('.')[:2])) < ONNX_TORCH:
        raise RunError(f'--format onnx: torch {version} is too old, it takes {".".join(map(str, ONNX_TORCH))}')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked. Raises RunError."""
    args = get_args_parser().parse_args(argv)
    if args.repo and (args.format != 'hub' or args.out):
        raise RunError('--repo pushes what --format hub makes, and leaves no folder; leave --out out')
    if args.format == 'onnx':
        check_onnx()
    if args.out is None:
        args.out = args.checkpoint.with_suffix(SUFFIXES[args.format])
        args.out = args.out.with_name('hub') if args.format == 'hub' else args.out
    if args.out.exists() and not args.repo:
        if args.out.is_dir() != (args.format == 'hub'):
            raise RunError(f'{args.out}: is a {"folder" if args.out.is_dir() else "file"}; take another --out')
        if not args.overwrite:
            raise RunError(f'{args.out}: is there already; --overwrite replaces it, --out takes another name')
    return args


def main(args: argparse.Namespace) -> None:
    import_file(args.imports)
    export = read(args.checkpoint)
    folder = None if args.repo else args.out.resolve().parent
    try:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix='.export-') as temporary:
            path = Path(temporary) / (args.out.name or 'hub')
            write(export, args, path)
            worst = check(export, args.format, path)
            if not args.repo:
                put(path, args.out)
    except OSError as error:
        raise RunError(f'{args.out}: cannot be written ({error.strerror})') from error
    sizes = ', '.join(map(str, BATCHES))
    say(f'{args.format}: logits within {worst:.1e} of the model for {sizes} images')
    print(push(export, args) if args.repo else args.out)


if __name__ == '__main__':
    with (
        user_errors('export.py'),
        training_process('export.py', 'stopped; nothing is left', (signal.SIGTERM, signal.SIGINT)),
    ):
        main(parse_args())
