"""The class of photograph.jpg by fabric.onnx of `export.py --format onnx`, read as predict.py reads it."""

import contextlib
import io
import json

import numpy as np
import onnxruntime  # pip install onnxruntime numpy pillow
from PIL import Image, ImageCms, ImageOps

session = onnxruntime.InferenceSession('fabric.onnx')  # of export.py --format onnx
about = session.get_modelmeta().custom_metadata_map
classes, prep = json.loads(about['classes']), json.loads(about['preprocessing'])


def view(path):
    """The part of an image that the model sees, (size, size, 3): read as predict.py reads it."""
    image = ImageOps.exif_transpose(Image.open(path))
    profile = image.info.get('icc_profile')
    if image.mode.startswith('I'):  # grey of more than eight bits
        image = Image.fromarray((np.asarray(image) >> (prep.get('bits', 16) - 8)).clip(max=255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
    if profile:
        image = image if image.mode in ('L', 'CMYK') else image.convert('RGB')
        srgb = ImageCms.createProfile('sRGB')
        with contextlib.suppress(ImageCms.PyCMSError):  # damaged, or not of these channels
            image = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode='RGB')
    size, resize = prep['img_size'], prep.get('resize', 'crop')
    short = round(size / prep['crop_ratio'])
    sides = [short * side // min(image.size) for side in image.size]
    if resize != 'crop':  # the whole image
        sides = [size if resize == 'squash' else max(1, round(side / (max(image.size) / size))) for side in image.size]
    seen = Image.new('RGB', (size, size), tuple(round(255 * value) for value in prep['mean']))
    corner = tuple(-round((side - size) / 2) if side > size else (size - side) // 2 for side in sides)
    seen.paste(image.convert('RGB').resize(sides, Image.Resampling.BICUBIC), corner)
    return np.asarray(seen)


pixels = (view('photograph.jpg') / 255 - prep['mean']) / prep['std']
batch = pixels.astype(np.float32).transpose(2, 0, 1)[None]  # (B, 3, size, size)
logits = session.run(None, {session.get_inputs()[0].name: batch})[0][0]
odds = np.exp((logits - logits.max()) / float(about.get('temperature', 1)))  # calibrated
print(classes[odds.argmax()], odds.max() / odds.sum())
