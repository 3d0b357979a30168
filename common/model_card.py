"""The model card of an exported model, from config.json and results.json of its run, as timm's functions take it."""

from common.options import DEFAULT, NEUTRAL, OWN_DATA
from common.registry import DATASETS, dataset_label, model_label
from common.runs import counted

ENVIRONMENT = ('python', 'torch', 'torchvision', 'timm', 'device', 'commit')  # of config.json
LIMITS = (
    'timm reads colours as a file stores them. In training, transparent parts were laid over white, values of more '
    'than eight bits scaled to eight, and colours of an ICC profile converted to sRGB.',
    'It names one of its classes for every image, also for one that shows none of them.',
    'The probability it gives is not calibrated.',
)
LOAD = """
```python
import timm
from PIL import Image, ImageOps
{imports}
name = '{source}'
model = timm.create_model(name, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = ImageOps.exif_transpose(Image.open('photograph.jpg')).convert('RGB')
probabilities = model(transform(image)[None]).softmax(1)[0]
print(model.pretrained_cfg.get('label_names', range(len(probabilities)))[probabilities.argmax()])
```
"""


def model_card(
    name: str,
    classes: list[str],
    preprocessing: dict,
    config: dict,
    results: dict,
    source: str,
    license_id: str,
    needs: str = '',
) -> dict:
    """What timm.models.push_to_hf_hub takes as `model_card`: data, accuracy, recipe, limits, and how to load it.

    Args:
        name: of the model.
        classes: their names.
        preprocessing: of transforms.eval_settings.
        config, results: of the run; {} where they are not known.
        source: what timm.create_model loads.
        license_id: of the weights, as the hub calls it.
        needs: lines of Python to run before, where timm does not have the model; '' for nothing.
    """
    made = config.get('options', {})
    dataset = results.get('dataset') or made.get('dataset')
    called = made.get('name') or dataset_label(dataset, {})
    data = f'{called}, fold {results.get("fold", made.get("fold"))}' if dataset else 'not recorded'
    limits = ['Its accuracy is not recorded.', *LIMITS]
    details = dict(Model=model_label(name), Data=data)
    if 'protocol' in DATASETS.get(dataset, {}):
        details['Protocol'] = DATASETS[dataset]['protocol']
    if 'n_test' in results:
        counts = ', '.join(f'{results[f"n_{subset}"]} {subset}' for subset in ('train', 'val', 'test'))
        details['Images'] = counts
        details['Test accuracy'] = f'{results["test_acc"]:.2f} % (one fold, one seed: {results["seed"]})'
        details['Validation accuracy'] = f'{results["best_val_acc"]:.2f} %, which chose epoch {results["best_epoch"]}'
        details['Parameters'] = f'{results["params_M"]:.2f} M'
        details['Initial weights'] = results.get('pretrained') or 'none, from scratch'
        limits[0] = f'Accuracy was measured on the {results["n_test"]} test images of this fold alone.'
    short = round(preprocessing['img_size'] / preprocessing['crop_ratio'])
    details['Input'] = (
        f'short side to {short} pixels ({preprocessing["interpolation"]}), centre crop of {preprocessing["img_size"]}, '
        f'mean {preprocessing["mean"]}, deviation {preprocessing["std"]}'
        + (f', images of {preprocessing["bits"]} bits' if 'bits' in preprocessing else '')
    )
    details['Classes'] = f'{len(classes)}: {", ".join(classes)}'
    if recipe := {key: made[key] for key in (*DEFAULT, 'amp') if key in made}:
        own = {key: off for key, off in NEUTRAL.items() if key not in OWN_DATA}
        more = {key: made[key] for key, off in own.items() if made.get(key, off) != off}
        details['Recipe'] = recipe | more
    if environment := config.get('environment'):
        details['Made with'] = ', '.join(f'{key} {environment[key]}' for key in ENVIRONMENT if environment.get(key))
    details['Limits'] = limits
    return dict(
        tags=['image-classification', 'timm'],
        license=license_id,
        description=f'{model_label(name)} trained on {data}: {counted(len(classes), "class")}.',
        details=details,
        usage=LOAD.format(source=source, imports=needs),
    )
