"""The models and the data sets: plain values by name, without a single import, so that `--help` takes 0.2 s."""

WEIGHTS_DIR = 'weights'  # where pretrained TwistNets are looked for
GATE_INIT = -2.0  # of a gated branch, before its sigmoid

_RESNET18 = dict(timm='resnet18', weights='resnet18.a1_in1k', venue='CVPR 2016')
# One entry per baseline: `timm` is the model that is built, with `args` of its constructor; `weights` is timm's name
# with the tag that pretrained=True loads from the hub, `venue` where it was published; an entry may lack these three.
# `resolution` marks models whose parameters depend on the image size.
MODELS: dict[str, dict] = {
    # timm starts the last BatchNorm of a ResNet block at zero; TwistNet's trunk, as the paper's, starts it at one. The
    # ResNets start as TwistNet does, so that a difference from scratch is the branch's and not the initialisation's;
    # the names with 0-init are timm's own start, for both.
    'resnet18': dict(label='ResNet-18', args=dict(zero_init_last=False), **_RESNET18),
    'resnet18_zero_init': dict(label='ResNet-18 0-init', args=dict(zero_init_last=True), **_RESNET18),
    # timm has no weights for its seresnet18; those of the older definition fit all but stage 1's SE layers.
    'seresnet18': dict(
        label='SE-ResNet-18',
        timm='seresnet18',
        args=dict(zero_init_last=False),
        weights='legacy_seresnet18.in1k',
        venue='CVPR 2018',
    ),
    'convnextv2_nano': dict(
        label='ConvNeXtV2-Nano', timm='convnextv2_nano', weights='convnextv2_nano.fcmae_ft_in1k', venue='CVPR 2023'
    ),
    'fastvit_sa12': dict(
        label='FastViT-SA12', timm='fastvit_sa12', weights='fastvit_sa12.apple_in1k', venue='ICCV 2023'
    ),
    'efficientformerv2_s2': dict(
        label='EfficientFormerV2-S2',
        timm='efficientformerv2_s2',
        weights='efficientformerv2_s2.snap_dist_in1k',
        venue='ICCV 2023',
        resolution=True,
    ),
    'repvit_m1_5': dict(
        label='RepViT-M1.5', timm='repvit_m1_5', weights='repvit_m1_5.dist_300e_in1k', venue='CVPR 2024'
    ),
    'convnext_tiny': dict(
        label='ConvNeXt-Tiny', timm='convnext_tiny', weights='convnext_tiny.fb_in1k', venue='CVPR 2022'
    ),
    'swin_tiny': dict(
        label='Swin-Tiny',
        timm='swin_tiny_patch4_window7_224',
        weights='swin_tiny_patch4_window7_224.ms_in1k',
        venue='ICCV 2021',
        resolution=True,
    ),
    'twistnet18': dict(label='TwistNet-18', twist={}),
    'twistnet18_no_spiral': dict(label='w/o Spiral Twist', twist=dict(use_spiral=False)),
    'twistnet18_no_ais': dict(label='w/o AIS', twist=dict(use_ais=False)),
    'twistnet18_first_order': dict(label='First-order only', twist=dict(twist_stages=())),
    'twistnet18_no_products': dict(label='w/o Products', twist=dict(use_products=False)),
    # `keep_init` names the parameters that a variant starts in its own way: weights of another model leave them alone.
    'twistnet18_random_twist': dict(label='Random Twist', twist=dict(directional=False), keep_init='.twist.'),
    'twistnet18_heads1': dict(label='1 Head', twist=dict(num_heads=1)),
    'twistnet18_heads2': dict(label='2 Heads', twist=dict(num_heads=2)),
    'twistnet18_stage3': dict(label='Stage 3 only', twist=dict(twist_stages=(3,))),
    'twistnet18_stage4': dict(label='Stage 4 only', twist=dict(twist_stages=(4,))),
    'twistnet18_gate_m3': dict(label='Gate -3', twist=dict(gate_init=-3.0), keep_init='.gate'),
    'twistnet18_gate_m1': dict(label='Gate -1', twist=dict(gate_init=-1.0), keep_init='.gate'),
    'twistnet18_gate_0': dict(label='Gate 0', twist=dict(gate_init=0.0), keep_init='.gate'),
    'twistnet18_gate_1': dict(label='Gate 1', twist=dict(gate_init=1.0), keep_init='.gate'),
    'twistnet18_zero_init': dict(label='TwistNet-18 0-init', twist=dict(zero_init_last=True)),
    'twistnet18_zero_init_no_spiral': dict(
        label='0-init w/o Spiral', twist=dict(zero_init_last=True, use_spiral=False)
    ),
    'twistnet18_zero_init_no_products': dict(
        label='0-init w/o Products', twist=dict(zero_init_last=True, use_products=False)
    ),
}

PROBES = dict(knn='1-NN', lda='LDA', svm='SVM')  # the classifiers of probe.py, with their names in tables
UNSURE = ('knn', 'svm')  # those without probabilities

_VGG = 'https://www.robots.ox.ac.uk/~vgg/data'
# One entry per data set; each needs `label`, `folds`, `protocol` and `source`. `archives` are (url, md5) pairs; the
# tree is in the folder `top` of them or in their root, and `layout` are patterns, all of which match in it and tell it
# from a folder of class folders; `skip` are folders of it without images of the set. `images`, `classes`, `folds` and
# `sizes` (train, val, test) are verified; `lists` marks a tree with lists of its folds, so that another tree in its
# layout may have any size; `own` marks the user's own images, which options divide; `shared_test` marks sets whose
# folds all test the same images.
DATASETS: dict[str, dict] = {
    'dtd': dict(
        label='DTD',
        images=5640,
        classes=47,
        folds=10,
        sizes=(1880, 1880, 1880),
        protocol='10 folds, the official lists: 1880 train, 1880 val, 1880 test',
        source='https://www.robots.ox.ac.uk/~vgg/data/dtd/',
        top='dtd',
        layout=('images', 'labels'),
        lists=True,
        archives=[(f'{_VGG}/dtd/download/dtd-r1.0.1.tar.gz', 'fff73e5086ae6bdbea199a49dfb8a4c1')],
    ),
    'fmd': dict(
        label='FMD',
        images=1000,
        classes=10,
        folds=5,
        sizes=(600, 200, 200),
        protocol='5 folds, a stratified partition: 600 train, 200 val, 200 test; the tests cover every image once',
        source='https://people.csail.mit.edu/celiu/CVPR2010/FMD/',
        layout=('image/*/*',),
        skip=('mask',),
        archives=[('https://people.csail.mit.edu/celiu/CVPR2010/FMD/FMD.zip', '0721ba72cd981aa9599a81bbfaaebd75')],
    ),
    'kth_tips2': dict(
        label='KTH-TIPS2-b',
        images=4752,
        classes=11,
        folds=4,
        no_fold={5: 'four physical samples and so four folds'},
        sizes=(3212, 352, 1188),
        protocol='4 folds, one physical sample tested in each: 3212 train, 352 val, 1188 test',
        source='https://www.csc.kth.se/cvap/databases/kth-tips/',
        top='KTH-TIPS2-b',
        layout=('*/sample_a',),
        archives=[
            (
                'https://www.csc.kth.se/cvap/databases/kth-tips/kth-tips2-b_col_200x200.tar',
                '00470a104a57f5a5be22cc8a0f234c4e',
            )
        ],
    ),
    'cub200': dict(
        label='CUB-200',
        images=11788,
        classes=200,
        folds=5,
        sizes=(5394, 600, 5794),
        shared_test=True,
        protocol='5 folds, the official 5794 test; a rotating tenth of the official train as val',
        source='https://www.vision.caltech.edu/datasets/cub_200_2011/',
        top='CUB_200_2011',
        layout=('images', 'images.txt'),
        archives=[
            ('https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz', '97eceeb196236b17998738112f37df78')
        ],
    ),
    'flowers102': dict(
        label='Flowers-102',
        images=8189,
        classes=102,
        folds=5,
        sizes=(1020, 1020, 6149),
        shared_test=True,
        protocol='5 folds, the official 6149 test; 1020 train and 1020 val, official in fold 1, redrawn after',
        source='https://www.robots.ox.ac.uk/~vgg/data/flowers/102/',
        top='flowers-102',
        layout=('jpg', 'setid.mat'),
        archives=[
            (f'{_VGG}/flowers/102/102flowers.tgz', '52808999861908f626f3c1f4e79d11fa'),
            (f'{_VGG}/flowers/102/imagelabels.mat', 'e0620be6f572b9609742df49c70aed4d'),
            (f'{_VGG}/flowers/102/setid.mat', 'a5357ecc9cb78c4bef273ce3793fc85c'),
        ],
    ),
    'folder': dict(
        label='Folder',
        own=True,
        protocol='any folder of class folders: 5 folds, a stratified partition; or its own train/, val/, test/',
        source='yours',
    ),
    'lists': dict(
        label='Lists',
        own=True,
        protocol='any images in a CSV: its own subset or fold; or 5 folds, a stratified partition',
        source='yours',
    ),
    'synthetic': dict(
        label='Synthetic',
        images=600,
        classes=12,
        folds=5,
        protocol='5 folds, a stratified partition: 360 train, 120 val, 120 test',
        source='drawn by common/synthetic.py',
    ),
}


BRANCH = 'stci.'  # begins the names of the parameters that are put into a CNN
STCI = 'stci_'  # begins the name of a CNN with STCI behind its last two stages


def has_stci(entry: dict) -> bool:
    """Whether a model has STCI branches and so gates: stci_NAME has, and a TwistNet, unless in none of its stages."""
    return 'stci' in entry or ('twist' in entry and bool(entry['twist'].get('twist_stages', True)))


# The variants of TwistNet-18's branch by the words that name one, as in stci_no_spiral_NAME; the trunk has others.
STCI_VARIANTS = {
    name.removeprefix('twistnet18').lstrip('_'): entry
    for name, entry in MODELS.items()
    if has_stci(entry) and 'zero_init_last' not in entry.get('twist', {})
}


def entry_of(name: str) -> dict:
    """The entry of a model: one of MODELS, or for any other name that of the model of timm, or of its stci_NAME.

    The latter is the entry of the plain model, with `base`, its name, and `stci`, keyword arguments of the branch.
    """
    if name in MODELS:
        return MODELS[name]
    if not name.startswith(STCI):
        return dict(label=name, timm=name)
    rest = name.removeprefix(STCI)
    words = max((words for words in STCI_VARIANTS if words and rest.startswith(f'{words}_')), key=len, default='')
    base, variant = rest.removeprefix(f'{words}_') if words else rest, STCI_VARIANTS[words]
    kept = {key: value for key, value in variant.items() if key == 'keep_init'}
    label = f'{entry_of(base)["label"]} + STCI' + f' ({variant["label"]})' * bool(words)
    return entry_of(base) | kept | dict(label=label, base=base, stci=variant['twist'])


def is_own(name: str) -> bool:
    """Whether a model is one of MODELS or such a one with STCI: its input is 224 pixels and ImageNet's statistics."""
    return entry_of(name).get('base', name) in MODELS


def size_problem(model: str, img_size: int | None) -> str | None:
    """Why a model cannot take square images of this side in pixels; None where it can, or this is not known."""
    if entry_of(model).get('resolution') and (img_size or 0) % 32:
        return f'--img_size {img_size} must be a multiple of 32 for {model}'
    return None


def nameable(dataset: str) -> bool:
    """True where --name may name the images: several sets of them have the same key."""
    entry = DATASETS.get(dataset, {})
    return bool(entry.get('own') or entry.get('lists'))


def dataset_label(dataset: str, labels: dict[str, str]) -> str:
    """The name of a data set in tables and figures: that of `labels` (--labels), else the registry's."""
    return labels.get(dataset) or DATASETS.get(dataset, {}).get('label', dataset)


def plain_model(model: str) -> str:
    """The model of a run, without the classifier that probe.py put on its features ('resnet18+lda_5shot')."""
    return model.partition('+')[0]


def model_label(model: str) -> str:
    """The name of a model in tables and figures, 'ResNet-18 + LDA' where probe.py put a classifier on it."""
    plain, _, probe = model.partition('+')
    label = entry_of(plain)['label']
    return f'{label} + {PROBES.get(probe.partition("_")[0], probe)}' if probe else label
