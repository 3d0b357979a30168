"""`python datasets.py prepare` and `check`, against a server on this machine that serves miniature archives."""

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

import archives
import datasets
from archives import DataError, fetch, unpack
from datasets import DATASETS, check, prepare


class Server(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, with ranges; cuts connections and forgets ranges when told to."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get('Range')))
        path = server.folder / self.path.rsplit('/', 1)[-1]
        if not path.exists():
            self.send_error(404)
            return
        data = path.read_bytes()
        begin = 0
        if server.ranges and (wanted := self.headers.get('Range')):
            begin = int(wanted.removeprefix('bytes=').removesuffix('-'))
            if begin >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header('Content-Length', str(len(data) - begin))
        self.end_headers()
        body = data[begin:]
        if server.cuts:
            body = body[: server.cuts.pop(0)]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, 'WAIT', 0.0)
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    httpd.folder, httpd.cuts, httpd.requests, httpd.ranges = tmp_path / 'served', [], [], True
    httpd.folder.mkdir()
    httpd.url = f'http://127.0.0.1:{httpd.server_port}'
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


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
    served = [
        (f'{server.url}/{url.rsplit("/", 1)[-1]}', archives.md5_of(server.folder / url.rsplit('/', 1)[-1]))
        for url, _ in entry['archives']
    ]
    images, classes = trees.SMALL_SIZE[key]
    small = {k: v for k, v in entry.items() if k != 'sizes'} | dict(archives=served, images=images, classes=classes)
    monkeypatch.setitem(DATASETS, key, small)


@pytest.mark.parametrize('key', list(trees.MAKE))
def test_prepare_and_check(server, tmp_path, monkeypatch, key, capsys):
    serve_archives(server, key, tmp_path, monkeypatch)
    server.cuts = [700]  # the first connection breaks in the middle
    datasets.main(datasets.get_args_parser().parse_args(['prepare', key, '--data_dir', str(tmp_path / 'data')]))
    assert capsys.readouterr().out.splitlines() == [f'{tmp_path / "data" / key} is whole']
    assert server.requests[1][1] == 'bytes=700-', 'the second connection goes on where the first broke'
    assert check(key, tmp_path / 'data' / key) == []
    assert sorted(os.listdir(tmp_path / 'data')) == sorted(['downloads', key])
    with pytest.raises(DataError, match=r'exists; `python datasets\.py check'):
        prepare(key, tmp_path / 'data')


def test_real_checksums_and_addresses_are_those_of_the_sources():
    digests = [md5 for entry in DATASETS.values() for _, md5 in entry.get('archives', [])]
    assert len(digests) == 7
    assert all(len(digest) == 32 and int(digest, 16) for digest in digests)
    assert all(url.startswith('https://') for entry in DATASETS.values() for url, _ in entry.get('archives', []))


def test_fetch_resumes_retries_and_does_not_download_twice(server, tmp_path):
    data = os.urandom(5000)
    (server.folder / 'a.bin').write_bytes(data)
    md5 = hashlib.md5(data).hexdigest()
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd' / 'a.bin.part').write_bytes(data[:1234])  # an earlier session
    server.cuts = [10, 0, 0, 500]
    assert fetch(f'{server.url}/a.bin', md5, tmp_path / 'd').read_bytes() == data
    assert server.requests[0][1] == 'bytes=1234-'
    count = len(server.requests)
    fetch(f'{server.url}/a.bin', md5, tmp_path / 'd')
    assert len(server.requests) == count
    # A server without ranges begins again; a part that is whole already is only verified.
    (tmp_path / 'e').mkdir()
    (tmp_path / 'e' / 'a.bin.part').write_bytes(b'stale')
    server.ranges = False
    assert fetch(f'{server.url}/a.bin', md5, tmp_path / 'e').read_bytes() == data
    server.ranges = True
    (tmp_path / 'f').mkdir()
    (tmp_path / 'f' / 'a.bin.part').write_bytes(data)
    assert fetch(f'{server.url}/a.bin', md5, tmp_path / 'f').read_bytes() == data


def test_downloads_that_fail_are_one_line(server, tmp_path):
    (server.folder / 'a.bin').write_bytes(b'abc' * 100)
    with pytest.raises(DataError, match=r'its md5 is .*, not 0+; the file was deleted'):
        fetch(f'{server.url}/a.bin', '0' * 32, tmp_path / 'd')
    assert os.listdir(tmp_path / 'd') == []
    with pytest.raises(DataError, match='the server answers 404'):
        fetch(f'{server.url}/missing.bin', '0' * 32, tmp_path / 'd')
    server.cuts = [0] * 10
    with pytest.raises(DataError, match=r'cannot be fetched \(the connection was cut\); the same command goes on'):
        fetch(f'{server.url}/a.bin', '0' * 32, tmp_path / 'd')
    server.cuts = []
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'a.bin.part').symlink_to('/dev/full')
    with pytest.raises(DataError, match=r'a\.bin\.part: cannot be written \(No space left on device\)'):
        fetch(f'{server.url}/a.bin', '0' * 32, tmp_path / 'full')
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match=r'cannot be fetched .*refused'):
        fetch(f'{server.url}/b.bin', '0' * 32, tmp_path / 'd')


def test_archives_that_point_outside_or_are_damaged_are_refused(tmp_path):
    evil = tmp_path / 'evil.tar'
    with tarfile.open(evil, 'w') as file:
        member = tarfile.TarInfo('../outside.txt')
        member.size = 3
        file.addfile(member, io.BytesIO(b'abc'))
    with pytest.raises(DataError, match=r'evil\.tar: refused, its member \.\./outside\.txt points outside'):
        unpack(evil, tmp_path / 'in')
    with zipfile.ZipFile(tmp_path / 'evil.zip', 'w') as file:
        file.writestr('a/../../outside.txt', 'abc')
    with pytest.raises(DataError, match=r'evil\.zip: refused'):
        unpack(tmp_path / 'evil.zip', tmp_path / 'in')
    assert not (tmp_path / 'outside.txt').exists()

    with tarfile.open(tmp_path / 'whole.tgz', 'w:gz') as file:
        file.add(__file__, 'a.py')
    (tmp_path / 'torn.tgz').write_bytes((tmp_path / 'whole.tgz').read_bytes()[:-500])
    (tmp_path / 'text.bin').write_text('hello')
    for name, words in (('torn.tgz', 'damaged'), ('text.bin', 'neither a tar nor a zip')):
        with pytest.raises(DataError, match=words):
            unpack(tmp_path / name, tmp_path / 'in')


def test_an_interrupted_preparation_leaves_no_half_tree(server, tmp_path, monkeypatch):
    serve_archives(server, 'fmd', tmp_path, monkeypatch)

    def cut(archive, folder):
        unpack(archive, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(datasets, 'unpack', cut)
        with pytest.raises(KeyboardInterrupt):
            prepare('fmd', tmp_path / 'data')
    assert not (tmp_path / 'data' / 'fmd').exists()
    count = len(server.requests)
    prepare('fmd', tmp_path / 'data')
    assert len(server.requests) == count, 'the archive was there'
    assert len(check('fmd', tmp_path / 'data' / 'fmd')) == 0


def test_check_finds_what_is_wrong(tmp_path, monkeypatch, capsys):
    trees.fmd(tmp_path / 'fmd', **trees.SMALL['fmd'])
    root = tmp_path / 'fmd' / 'image'
    with pytest.raises(DataError, match='has 30 images, fmd has 1000'):
        check('fmd', tmp_path / 'fmd')
    monkeypatch.setitem(DATASETS, 'fmd', {**DATASETS['fmd'], 'images': 30, 'classes': 3})
    with pytest.raises(DataError, match=r'fold 1 has \(18, 6, 6\) images .* by protocol fmd has \(600, 200, 200\)'):
        check('fmd', tmp_path / 'fmd')
    monkeypatch.setitem(DATASETS['fmd'], 'sizes', (18, 6, 6))
    assert check('fmd', tmp_path / 'fmd') == []
    assert 'fmd: 30 images of 3 classes decode; 5 folds; 0 duplicates' in capsys.readouterr().err

    # The same pixels twice: in one class as another file, and in two classes.
    names = ['material0_moderate_001_new.jpg', 'material0_moderate_002_new.jpg']
    Image.open(root / 'material0' / names[0]).save(root / 'material0' / names[0].replace('.jpg', '.png'))
    os.remove(root / 'material0' / names[1])
    shutil.copy(
        root / 'material1' / 'material1_moderate_001_new.jpg', root / 'material2' / 'material2_moderate_001_new.jpg'
    )
    notes = check('fmd', tmp_path / 'fmd')
    assert len(notes) == 2
    assert names[0] in notes[0]
    assert 'different subsets of fold' in notes[0] or 'one subset of every fold' in notes[0]
    assert any('in two classes' in note and 'material2_moderate_001_new.jpg' in note for note in notes)

    broken = root / 'material1' / 'material1_moderate_003_new.jpg'
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(DataError, match=r'material1_moderate_003_new\.jpg: cannot be read as an image'):
        check('fmd', tmp_path / 'fmd')


def test_check_knows_folders_without_a_size_of_their_own(tmp_path):
    trees.fmd(tmp_path, **trees.SMALL['fmd'])
    assert check('folder', tmp_path / 'image') == []
    for subset in datasets.SUBSETS:
        shutil.copytree(tmp_path / 'image', tmp_path / 'split' / subset)
    notes = check('folder', tmp_path / 'split')
    assert len(notes) == 60
    assert all('different subsets of fold 1' in note for note in notes)
    tree = tmp_path / 'dtd'
    trees.dtd(tree, **trees.SMALL['dtd'])
    (tree / 'dtd' / 'labels' / 'train10.txt').unlink()
    with pytest.raises(DataError, match='fold 10 of'):
        check('dtd', tree)
    with pytest.raises(DataError, match='is not downloaded'):
        prepare('folder', tmp_path)
    with pytest.raises(DataError, match="unknown data set 'cifar'"):
        prepare('cifar', tmp_path)
