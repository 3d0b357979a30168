"""The view `cam` of visualize.py: what speaks for a class in photographs, by Grad-CAM (Selvaraju et al., 2017)."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.distributed import say
from common.drawing import CMAP, PAGE, Figure, plot_thumbnails, plt, readable, shorten
from common.errors import DataError, ModelError, RunError
from common.images import is_image, open_image
from common.names import near_miss
from common.runs import counted
from common.trees import walk
from interpret.image_views import title_of_model
from training.trained import TrainedModel
from transforms import view_box

ROWS = 5  # of a sheet
NOTE = (
    'Colour, dark to light: Grad-CAM at the last map ({} x {} cells), what raises the logit of the class there, from 0 '
    'to its highest value, where the model sees the photograph. Without colour: not seen.'
)


def class_maps(
    subject: TrainedModel, image: Image.Image, named: int | None = None
) -> tuple[torch.Tensor, dict[int, np.ndarray]]:
    """The logits (1, K) of an image, and by class its map (h, w), for the predicted class and `named`.

    Of the last map A: relu(sum_c a_c A_c), where a_c is the mean over the cells of the logit's derivative by A_c.
    """
    model, where = subject.model, f'{subject.path}: {subject.name}'
    if not (hasattr(model, 'forward_features') and hasattr(model, 'forward_head')):
        raise ModelError(f"{where} has no forward_features and forward_head, as timm's models have, so no last map")
    with torch.no_grad():
        last = model.forward_features(subject.batch([image]))
    channels_last = getattr(model, 'output_fmt', 'NCHW') == 'NHWC'
    shape = tuple(getattr(last, 'shape', ()))
    sides = shape[1:3] if channels_last else shape[2:]
    if len(shape) != 4 or sides[0] != sides[1]:  # tokens, several outputs, or an unknown order of axes
        raise ModelError(f'{where} ends in no map of cells (a ViT ends in tokens); cam is for a CNN')
    if sides[0] < 2:
        raise ModelError(f'{where}: at {subject.img_size} pixels its last map is one cell')
    last.requires_grad_()
    logits = model.forward_head(last.clone())  # a clone: an activation in place would write over the map
    found = {}
    for label in dict.fromkeys((int(logits.argmax()), *([] if named is None else [named]))):
        (slopes,) = torch.autograd.grad(logits[0, label], last, retain_graph=True)
        cells, slopes = (x.detach().movedim(-1, 1)[0] if channels_last else x.detach()[0] for x in (last, slopes))
        found[label] = (slopes.mean((1, 2), keepdim=True) * cells).sum(0).relu().numpy()
    return logits.detach(), found


def spread(cells: np.ndarray, box: tuple[float, ...], size: tuple[int, int]) -> np.ndarray:
    """A map (h, w) over an image of `size` (width, height), where `box` of it was seen; NaN elsewhere: (H, W)."""
    left, top, right, bottom = map(round, box)
    heat, sides = Image.new('F', size, math.nan), (max(1, right - left), max(1, bottom - top))
    heat.paste(Image.fromarray(cells).resize(sides, Image.Resampling.BILINEAR), (left, top))
    return np.asarray(heat)


def coloured(image: Image.Image, heat: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8: the colour is the heat over its highest value, the shading the image."""
    share = heat / (np.nanmax(heat) or 1)
    color = plt.get_cmap(CMAP)(0.2 + 0.8 * np.nan_to_num(share))[..., :3]
    color[np.isnan(share)] = 1
    grey = np.asarray(image.convert('L'))[..., None] / 255
    return (255 * color * (0.25 + 0.75 * grey)).astype(np.uint8)


def picture_of(
    subject: TrainedModel, path: Path, named: int | None, side: int
) -> tuple[np.ndarray, list[str], tuple[int, ...]]:
    """A photograph of at most `side` pixels with its maps in colour beside it, a line for each map, and their shape."""
    image = open_image(str(path), subject.preprocessing.bits)
    logits, maps = class_maps(subject, image, named)
    taken, (shares,) = subject.preprocessing, 100 * subject.probabilities(logits)
    image.thumbnail((side, side))
    box = view_box(image.size, taken.img_size, taken.crop_ratio, taken.resize)
    pictures, lines, gap = [np.asarray(image)], [], np.full((image.height, side // 50, 3), 255, np.uint8)
    for label, cells in maps.items():
        pictures += [gap, coloured(image, spread(cells, box, image.size))]
        silent = ', nothing speaks for it' * (not cells.any())
        lines.append(f'{readable(subject.classes[label])} ({shares[label]:.0f} %){silent}')
    return np.concatenate(pictures, 1), lines, cells.shape


def plot_cam(subject: TrainedModel, path: Path, class_name: str | None) -> Iterator[Figure]:
    """A photograph, or sheets of those of a folder at any depth; what is left out of a folder is said."""
    if class_name is not None and class_name not in subject.classes:
        near = near_miss(class_name, subject.classes) or f', which are {shorten(", ".join(subject.classes), 200)}'
        raise RunError(f'--class_name {class_name}: is none of the classes of {subject.path}{near}')
    named = None if class_name is None else subject.classes.index(class_name)
    what = 'Where it looks' + f", for its prediction and for '{class_name}'" * (named is not None)
    folder = path if path.is_dir() else path.parent
    files = list(walk(str(path))) if folder == path else [str(path)]
    paths = [file for file in files if is_image(os.path.basename(file)) or folder != path]
    if not paths:
        raise DataError(f'--image {path}: no image in it')
    if others := len(files) - len(paths):
        say(f'note: {path}: {counted(others, "file")} without a suffix of images, left out')
    side, columns = (800, 1) if len(paths) == 1 else (320, 1 if class_name else 2)
    size, drawn = ROWS * columns, 0
    bar = tqdm(total=len(paths), desc='cam', disable=None)
    for start in range(0, len(paths), size):
        panels = []
        for file in paths[start : start + size]:
            try:
                strip, lines, shape = picture_of(subject, Path(file), named, side)
            except DataError as error:
                say(f'left out: {error}')
            else:
                panels.append((strip, [', '.join(lines), os.path.relpath(file, folder)]))
            bar.update()
        if panels:
            page = f', page {start // size + 1} of {math.ceil(len(paths) / size)}' * (len(paths) > size)
            highest = (PAGE[1] / math.ceil(len(panels) / columns) - 0.4) * columns / PAGE[0]  # of a page
            tall = min(max(strip.shape[0] / strip.shape[1] for strip, _ in panels), highest)
            yield plot_thumbnails(title_of_model(subject, what + page), panels, columns, [NOTE.format(*shape)], tall)
            drawn += len(panels)
    if not drawn:
        raise DataError(f'--image {path}: none of {counted(len(paths), "image")} could be read')
