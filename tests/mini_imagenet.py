"""A miniature ImageNet: train/ and val/ of up to 24 procedural classes, 72 pixels a side.

    python tests/mini_imagenet.py FOLDER 60 10

makes 24 classes of 60 training and 10 validation images: the 12 classes of synthetic.py, each whole and as a detail, in
random tints.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
from PIL import Image

from common import synthetic

SIDE = 72  # pixels


def make(root: Path, n_train: int, n_val: int, classes: int = 24) -> Path:
    rng = np.random.default_rng(0)
    for label in range(classes):
        name, detail = synthetic.CLASSES[label // 2], label % 2
        for i in range(n_train + n_val):
            image = Image.fromarray(synthetic.draw(name, i + 1000 * detail)).convert('RGB')
            image = image.crop((0, 0, SIDE, SIDE)) if detail else image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            dark, light = rng.uniform(0, 0.5, 3), rng.uniform(0.5, 1, 3)
            tinted = 255 * (dark + (light - dark) * np.asarray(image) / 255)
            folder = root / ('train' if i < n_train else 'val') / f'n{label:08d}'
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(tinted.astype(np.uint8)).save(folder / f'n{label:08d}_{i}.JPEG', quality=92)
    return root


if __name__ == '__main__':
    print(make(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
