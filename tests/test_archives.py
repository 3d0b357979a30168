"""`python datasets.py prepare` and `check`, against a server on this machine that serves miniature archives."""

import functools
import hashlib
import http.server
import io
import os
import shutil
import tarfile
import threading
import zipfile

import pytest
import trees
from PIL import Image

import datasets
from common import archives
from common.archives import fetch, unpack
from common.errors import DataError, UserError
from common.splits import SUBSETS
from datasets import DATASETS, check_tree, prepare


class Server(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; counts the requests."""

    def do_GET(self):
        self.server.requests.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / 'served'
    folder.mkdir()
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Server, directory=folder)) as httpd:
        httpd.folder, httpd.requests, httpd.url = folder, [], f'http://127.0.0.1:{httpd.server_port}'
        threading.Thread(target=httpd.serve_forever, args=[0.02], daemon=True).start()
        yield httpd
        httpd.shutdown()


def md5_of(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def serve_archives(server, key, tmp_path, monkeypatch) -> None:
    """The archives of a data set, of the real layout and name but small, in place of the real ones."""
    tree = tmp_path / 'made' / key
    trees.MAKE[key](tree, **trees.SMALL[key])
    entry = DATASETS[key]
    for url, _ in entry['archives']:
        name = url.rsplit('/', 1)[-1]
        target = server.folder / name
        if name.endswith('.mat'):
            shutil.copy(tree / name, target)
        elif name.endswith('.zip'):
            with zipfile.ZipFile(target, 'w') as file:
                for path in sorted(tree.rglob('*')):
                    file.write(path, path.relative_to(tree))
        else:
            # dtd's is called .tar.gz and may be a plain tar.
            with tarfile.open(target, 'w' if key in ('dtd', 'kth_tips2') else 'w:gz') as file:
                for path in sorted(tree.iterdir()):
                    if path.suffix != '.mat':
                        file.add(path, path.name)
    names = [url.rsplit('/', 1)[-1] for url, _ in entry['archives']]
    served = [(f'{server.url}/{name}', md5_of((server.folder / name).read_bytes())) for name in names]
    images, classes = trees.SMALL_SIZE[key]
    small = {k: v for k, v in entry.items() if k != 'sizes'} | dict(archives=served, images=images, classes=classes)
    monkeypatch.setitem(DATASETS, key, small)


def run(command: str, key: str, folder) -> None:
    datasets.main(datasets.get_args_parser().parse_args([command, key, '--data_dir', str(folder)]))


# A folder of the tree that `prepare` makes, and what `check` says is passed over in it.
FOUND = dict(
    dtd=('images/texture00', []),
    fmd=('image/material0', ['passed over 3 files without an image suffix (3 .db), such as ']),
    kth_tips2=('stuff_00/sample_a', ['passed over 9 files without an image suffix (1 .pdf, 8 .txt), such as ']),
    cub200=('images', []),
    flowers102=('jpg', []),
)


@pytest.mark.parametrize('key', list(trees.MAKE))
def test_prepare_and_check(server, tmp_path, monkeypatch, key, capsys):
    serve_archives(server, key, tmp_path, monkeypatch)
    root, (folder, strays) = tmp_path / 'data' / key, FOUND[key]
    run('prepare', key, tmp_path / 'data')
    *notes, last = capsys.readouterr().out.splitlines()
    assert last == f'{root} is complete'
    for note, words in zip(notes, strays, strict=True):
        assert words in note
    assert sorted(os.listdir(tmp_path / 'data')) == sorted(['downloads', key])
    assert (root / folder).is_dir(), "the archive's own folder is not left around the tree"
    assert not trees.TOP[key] or not (root / trees.TOP[key]).exists()
    # Again: nothing is fetched, the tree is verified.
    count = len(server.requests)
    run('prepare', key, tmp_path / 'data')
    assert capsys.readouterr().out.splitlines()[-1] == f'{root} is complete'
    assert len(server.requests) == count


def test_prepare_on_what_is_there_already(server, tmp_path, monkeypatch, capsys):
    serve_archives(server, 'fmd', tmp_path, monkeypatch)
    data = tmp_path / 'data'
    (data / 'fmd').mkdir(parents=True)  # empty: taken over
    prepare('fmd', data)
    (data / 'fmd' / 'image' / 'material0' / 'material0_moderate_001_new.jpg').unlink()
    with pytest.raises(DataError, match=rf'fmd: 1 problem, 1 of the tree; move {data}/fmd away, and `python datasets'):
        run('prepare', 'fmd', data)
    assert f'{data}/fmd: has 29 images, fmd has 30' in capsys.readouterr().out.splitlines()
    for key, words in dict(folder='is not downloaded', cifar="unknown data set 'cifar'").items():
        with pytest.raises(UserError, match=words):
            run('prepare', key, data)


@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError(28, 'No space left on device')])
def test_an_interrupted_preparation_leaves_no_half_tree(server, tmp_path, monkeypatch, error):
    serve_archives(server, 'fmd', tmp_path, monkeypatch)

    def cut(archive, folder):
        unpack(archive, folder)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(archives, 'unpack', cut)
        with pytest.raises(type(error)):
            prepare('fmd', tmp_path / 'data')
    assert os.listdir(tmp_path / 'data') == ['downloads']
    count = len(server.requests)
    prepare('fmd', tmp_path / 'data')
    assert len(server.requests) == count, 'the archive was there'
    check_tree('fmd', tmp_path / 'data' / 'fmd')


def test_a_file_is_fetched_once_and_a_torn_one_again(server, tmp_path):
    data = os.urandom(5000)
    (server.folder / 'a.bin').write_bytes(data)
    assert fetch(f'{server.url}/a.bin', md5_of(data), tmp_path / 'new').read_bytes() == data
    count = len(server.requests)
    fetch(f'{server.url}/a.bin', md5_of(data), tmp_path / 'new')
    assert len(server.requests) == count
    (tmp_path / 'new' / 'a.bin').write_bytes(data[:1234])
    assert fetch(f'{server.url}/a.bin', md5_of(data), tmp_path / 'new').read_bytes() == data


@pytest.mark.parametrize(
    ('name', 'words'), [('a.bin', 'corrupted.*a.bin; md5 0+$'), ('missing.bin', 'HTTP Error 404'), ('', 'refused')]
)
def test_a_download_that_fails_is_one_line(server, tmp_path, name, words):
    (server.folder / 'a.bin').write_bytes(b'abc')
    url = f'{server.url}/{name}' if name else 'http://127.0.0.1:9/b.bin'
    with pytest.raises(DataError, match=rf'cannot be downloaded \(.*{words}') as caught:
        fetch(url, '0' * 32, tmp_path / 'd')
    assert '\n' not in str(caught.value)


def test_members_of_archives_stay_inside(tmp_path):
    member = tarfile.TarInfo('../outside.txt')
    member.size = 3
    with tarfile.open(tmp_path / 'evil.tar', 'w') as file:
        file.addfile(member, io.BytesIO(b'abc'))
    with pytest.raises(tarfile.FilterError):
        unpack(tmp_path / 'evil.tar', tmp_path / 'in')
    with zipfile.ZipFile(tmp_path / 'evil.zip', 'w') as file:
        file.writestr('a/../../outside.txt', 'abc')
    unpack(tmp_path / 'evil.zip', tmp_path / 'in')
    assert not (tmp_path / 'outside.txt').exists()


def test_check_finds_what_is_wrong(tmp_path, monkeypatch, capsys):
    def problems() -> list[str]:
        with pytest.raises(DataError):
            check_tree('fmd', tmp_path / 'fmd')
        return [line for line in capsys.readouterr().out.splitlines() if not line.startswith('passed over')]

    trees.fmd(tmp_path / 'fmd', **trees.SMALL['fmd'])
    root = tmp_path / 'fmd' / 'image'
    assert 'has 3 classes, by protocol fmd has 10' in problems()[0]
    facts = {**DATASETS['fmd'], 'images': 31, 'classes': 3}
    monkeypatch.setitem(DATASETS, 'fmd', facts)
    (problem,) = problems()
    assert problem.endswith('has (18, 6, 6) images to train, validate and test, by protocol fmd has (600, 200, 200)')
    facts['sizes'] = (18, 6, 6)
    assert problems() == [f'{tmp_path / "fmd"}: has 30 images, fmd has 31']
    facts['images'] = 30
    check_tree('fmd', tmp_path / 'fmd')
    capsys.readouterr()

    # The same pixels twice: in one class as another file, and in two classes.
    first = root / 'material0' / 'material0_moderate_001_new.jpg'
    Image.open(first).save(first.with_suffix('.png'))
    os.remove(root / 'material0' / 'material0_moderate_002_new.jpg')
    other = root / 'material2' / 'material2_moderate_001_new.jpg'
    shutil.copy(root / 'material1' / 'material1_moderate_001_new.jpg', other)
    broken = root / 'material1' / 'material1_moderate_003_new.jpg'
    broken.write_bytes(broken.read_bytes()[:300])
    *notes, problem = problems()
    assert problem.startswith(f'{broken}: cannot be read as an image')
    assert [str(path) in note for path, note in zip((first, other), notes, strict=True)] == [True, True]
    assert ['in two classes' in note for note in notes] == [False, True]
    place = [{p: s for s in SUBSETS for p, _ in getattr(datasets.load_splits('fmd', root, f), s)} for f in range(1, 6)]
    for note in notes:
        first, copy = note.split(': ')[1].split(', in ')[0].split(' and ')
        apart = [str(fold) for fold in range(1, 6) if place[fold - 1][first] != place[fold - 1][copy]]
        assert note.endswith(f'in two subsets of fold {", ".join(apart)}' if apart else 'one subset of every fold')


def test_check_knows_folders_without_a_size_of_their_own(tmp_path, monkeypatch, capsys):
    trees.fmd(tmp_path, **trees.SMALL['fmd'])
    check_tree('folder', tmp_path / 'image')
    for subset in SUBSETS:
        shutil.copytree(tmp_path / 'image', tmp_path / 'split' / subset)
    capsys.readouterr()
    with pytest.raises(DataError, match='60 problems, 60 of images that stand in two subsets of a fold'):
        check_tree('folder', tmp_path / 'split')
    assert capsys.readouterr().out.count('in two subsets of fold 1') == 60
    # Images of one colour and other sizes have the same bytes, but are not the same.
    for i, size in enumerate([(8, 4), (4, 8), (2, 16), (16, 2), (32, 1)]):
        for c in ('a', 'b'):
            (tmp_path / 'plain' / c).mkdir(parents=True, exist_ok=True)
            Image.new('RGB', size, (200, 0, 0) if c == 'a' else (0, 0, 200)).save(tmp_path / 'plain' / c / f'{i}.png')
    check_tree('folder', tmp_path / 'plain')


def test_check_of_a_tree_in_the_layout_of_dtd(tmp_path, monkeypatch, capsys):
    tree = tmp_path / 'dtd'
    trees.dtd(tree, **trees.SMALL['dtd'])
    (tree / 'dtd' / 'labels' / 'train10.txt').unlink()
    with pytest.raises(DataError, match='of the tree'):
        check_tree('dtd', tree)
    assert 'has 3 classes, dtd has 47 (another tree in its layout can train' in capsys.readouterr().out
    monkeypatch.setitem(DATASETS, 'dtd', {**DATASETS['dtd'], 'classes': 3, 'images': 36, 'sizes': (12, 12, 12)})
    with pytest.raises(DataError, match='1 problem, 1 of the tree'):
        check_tree('dtd', tree)
    assert f'{tree}: has 9 folds, dtd has 10' in capsys.readouterr().out


def test_a_fold_that_cannot_be_loaded_is_there_all_the_same(tmp_path, monkeypatch, capsys):
    tree = tmp_path / 'dtd'
    trees.dtd(tree, **trees.SMALL['dtd'])
    (tree / 'dtd' / 'labels' / 'test10.txt').unlink()
    monkeypatch.setitem(DATASETS, 'dtd', {**DATASETS['dtd'], 'classes': 3, 'images': 36, 'sizes': (12, 12, 12)})
    with pytest.raises(DataError, match='1 problem, 1 of the tree'):
        check_tree('dtd', tree)
    assert 'test10.txt' in (out := capsys.readouterr().out)
    assert 'has 9 folds' not in out
