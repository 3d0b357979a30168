"""The view `cam` of visualize.py: what speaks for a class in photographs, by Grad-CAM (Selvaraju et al., 2017)."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import map_coordinates
from tqdm import tqdm

from common.distributed import say
from common.drawing import CMAP, PAGE, Figure, frame, plot_thumbnails, plt, readable, shorten
from common.errors import DataError, ModelError, RunError
from common.images import is_image, open_image
from common.names import near_miss
from common.runs import counted
from common.trees import walk
from interpret.image_views import title_of_model
from training.trained import TrainedModel
from transforms import view_box

SIDES = (800, 320)  # pixels of a photograph in a figure of its own, and on a sheet, at most
ROWS = 6  # of a sheet
NOTE = (
    'Colour, dark to light: Grad-CAM at the last map ({size} cells), what raises the logit of the class there, from 0 '
    'to its highest value, where the model sees the photograph{outlined}. Without colour: not seen.'
)


def class_maps(
    subject: TrainedModel, image: Image.Image, named: int | None = None
) -> tuple[torch.Tensor, dict[int, np.ndarray]]:
    """The logits (K,) of an image, and by class its map (h, w), for the predicted class and `named`.

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
    logits = model.forward_head(last.clone())[0]  # a clone: an activation in place would write over the map
    found = {}
    for label in dict.fromkeys((int(logits.argmax()), *([] if named is None else [named]))):
        (slopes,) = torch.autograd.grad(logits[label], last, retain_graph=True)
        cells, slopes = (x.detach().movedim(-1, 1)[0] if channels_last else x.detach()[0] for x in (last, slopes))
        found[label] = (slopes.mean((1, 2), keepdim=True) * cells).sum(0).relu().numpy()
    return logits.detach(), found


def spread(cells: np.ndarray, box: tuple[float, ...], size: tuple[int, int]) -> np.ndarray:
    """A map (h, w) over an image of `size` (width, height), where `box` of it was seen; NaN elsewhere: (H, W)."""
    left, top, right, bottom = box
    y, x = (np.arange(n) + 0.5 for n in size[::-1])  # the middles of the pixels
    rows, columns = (y - top) / (bottom - top) * cells.shape[0], (x - left) / (right - left) * cells.shape[1]
    values = map_coordinates(cells, np.meshgrid(rows - 0.5, columns - 0.5, indexing='ij'), order=1, mode='nearest')
    seen = [(places >= 0) & (places <= n) for places, n in zip((rows, columns), cells.shape)]
    return np.where(seen[0][:, None] & seen[1], values, np.nan)


def coloured(image: Image.Image, heat: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8: the colour is the heat over its highest value, the shading the image."""
    share = heat / (np.nanmax(heat) or 1)
    color = plt.get_cmap(CMAP)(0.2 + 0.8 * np.nan_to_num(share))[..., :3]
    color[np.isnan(share)] = 1
    grey = np.asarray(image.convert('L'))[..., None] / 255
    return (255 * color * (0.25 + 0.75 * grey)).astype(np.uint8)


def pictures_of(
    subject: TrainedModel, path: Path, named: int | None, side: int
) -> tuple[list[np.ndarray], list[str], tuple[float, ...], str]:
    """A photograph of at most `side` pixels and its maps in colour; a line for each map; the box and the map's size."""
    image = open_image(str(path), subject.preprocessing.bits)
    logits, maps = class_maps(subject, image, named)
    taken, (width, height) = subject.preprocessing, image.size
    box = view_box(image.size, taken.img_size, taken.crop_ratio, taken.resize)
    image.thumbnail((side, side))
    scale = image.width / width, image.height / height
    box = tuple(value * scale[i % 2] for i, value in enumerate(box))
    pictures = [np.asarray(image), *(coloured(image, spread(cells, box, image.size)) for cells in maps.values())]
    shares = 100 * logits.softmax(-1)
    lines = [
        f'{readable(subject.classes[k])} ({shares[k]:.0f} %)' + ', nothing speaks for it' * (not cells.any())
        for k, cells in maps.items()
    ]
    return pictures, lines, box, ' x '.join(map(str, next(iter(maps.values())).shape))


def plot_cam(subject: TrainedModel, path: Path, class_name: str | None) -> Iterator[Figure]:
    """The figure of one photograph, or of a folder the sheets, one after another."""
    if class_name is not None and class_name not in subject.classes:
        near = near_miss(class_name, subject.classes) or f', which are {shorten(", ".join(subject.classes), 200)}'
        raise RunError(f'--class_name {class_name}: is none of the classes of {subject.path}{near}')
    named = None if class_name is None else subject.classes.index(class_name)
    what = 'Where it looks' + f", for its prediction and for '{class_name}'" * (named is not None)
    if path.is_dir():
        yield from plot_sheets(subject, path, named, what)
        return
    pictures, lines, (left, top, right, bottom), cells = pictures_of(subject, path, named, SIDES[0])
    height, width, _ = pictures[0].shape
    tall = min(PAGE[0] / len(pictures) * height / width, 6)
    size = max(3.5, len(pictures) * tall * width / height), tall + 0.2
    figure, panels = plt.subplots(1, len(pictures), figsize=size, layout='constrained')
    for axes, picture, title in zip(panels, pictures, (path.name, f'predicted: {lines[0]}', *lines[1:])):
        axes.imshow(picture)
        axes.set(xticks=[], yticks=[])
        axes.set_title(shorten(title, 40))
        axes.plot((left, right, right, left, left), (top, top, bottom, bottom, top), color='white', linewidth=1.4)
        axes.plot((left, right, right, left, left), (top, top, bottom, bottom, top), 'k--', linewidth=0.7)
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    frame(figure, title_of_model(subject, what), [NOTE.format(size=cells, outlined=' (outlined)')])
    yield figure


def plot_sheets(subject: TrainedModel, folder: Path, named: int | None, what: str) -> Iterator[Figure]:
    """The photographs of a folder, at any depth, each beside its maps; one that cannot be read is said."""
    files = list(walk(str(folder)))
    paths = [path for path in files if is_image(os.path.basename(path))]
    if not paths:
        raise DataError(f'--image {folder}: no image in it')
    if others := len(files) - len(paths):
        say(f'note: {folder}: {counted(others, "file")} without a suffix of images, left out')
    columns, panels = 2 if named is None else 1, []
    size, cells = ROWS * columns, None
    pages = 0
    for number, path in enumerate(tqdm(paths, desc='cam', disable=None), 1):
        try:
            pictures, lines, _, cells = pictures_of(subject, Path(path), named, SIDES[1])
        except DataError as error:
            say(f'left out: {error}')
        else:
            gap = np.full((len(pictures[0]), 6, 3), 255, np.uint8)
            strip = [part for picture in pictures for part in (gap, picture)][1:]
            panels.append((np.concatenate(strip, 1), [', '.join(lines), os.path.relpath(path, folder)]))
        if panels and (len(panels) == size or number == len(paths)):
            pages += 1
            page = f', page {pages}' * (len(paths) > size)
            notes = [NOTE.format(size=cells, outlined='')]
            tall = max(strip.shape[0] / strip.shape[1] for strip, _ in panels)
            yield plot_thumbnails(title_of_model(subject, what + page), panels, columns, notes, tall)
            panels = []
    if not pages:
        raise DataError(f'--image {folder}: none of {counted(len(paths), "image")} could be read')
