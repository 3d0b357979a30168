"""`python datasets.py prepare` and `check`, against a server on this machine that serves miniature archives."""

import errno
import hashlib
import http.client
import http.server
import io
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from unittest.mock import Mock

import pytest
import trees
from PIL import Image

import datasets
from common import archives
from common.archives import fetch, unpack
from common.errors import DataError
from common.splits import SUBSETS
from datasets import DATASETS, check_tree, prepare


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
        if server.errors:
            self.send_error(server.errors.pop(0))
            return
        if server.ranges and (wanted := self.headers.get('Range')):
            begin = int(wanted.removeprefix('bytes=').removesuffix('-'))
            if begin >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {begin}-{len(data) - 1}/{len(data)}')
        else:
            self.send_response(200)
        if server.length:
            self.send_header('Content-Length', str(len(data) - begin))
        self.end_headers()
        body = data[begin:]
        cut = server.cuts.pop(0) if server.cuts else None
        self.wfile.write(body[:cut])
        if cut is not None and server.reset:  # RST instead of FIN, once the client has read
            self.wfile.flush()
            time.sleep(0.1)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            self.connection.close()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, 'WAIT', 0.0)
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    httpd.folder, httpd.cuts, httpd.errors, httpd.requests = tmp_path / 'served', [], [], []
    httpd.ranges, httpd.length, httpd.reset = True, True, False
    httpd.handle_error = lambda *_: None  # a connection that was reset on purpose
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


def is_complete(found: datasets.Findings) -> bool:
    return not (found.tree or found.unreadable or found.twice or found.leaks)


# A folder of the tree that `prepare` makes, and what `check` says is passed over in it.
DRAWN = dict(
    dtd='images/texture00', fmd='image/material0', kth_tips2='stuff_00/sample_a', cub200='images', flowers102='jpg'
)
STRAYS = dict(
    dtd=[],
    fmd=['passed over 3 files without an image suffix (3 .db), such as '],
    kth_tips2=['passed over 9 files without an image suffix (1 .pdf, 8 .txt), such as '],
    cub200=[],
    flowers102=[],
)


@pytest.mark.parametrize('key', list(trees.MAKE))
def test_prepare_and_check(server, tmp_path, monkeypatch, key, capsys):
    serve_archives(server, key, tmp_path, monkeypatch)
    server.cuts = [700]  # the first connection breaks in the middle
    datasets.main(datasets.get_args_parser().parse_args(['prepare', key, '--data_dir', str(tmp_path / 'data')]))
    root = tmp_path / 'data' / key
    *notes, last = capsys.readouterr().out.splitlines()
    assert last == f'{root} is complete'
    assert len(notes) == len(STRAYS[key])
    for note, words in zip(notes, STRAYS[key]):
        assert words in note
    assert server.requests[1][1] == 'bytes=700-', 'the second connection goes on where the first broke'
    assert is_complete(check_tree(key, root))
    assert sorted(os.listdir(tmp_path / 'data')) == sorted(['downloads', key])
    assert (root / DRAWN[key]).is_dir(), "the archive's own folder is not left around the tree"
    assert not trees.TOP[key] or not (root / trees.TOP[key]).exists()
    # Again: nothing is fetched, the tree is verified.
    count = len(server.requests)
    datasets.main(datasets.get_args_parser().parse_args(['prepare', key, '--data_dir', str(tmp_path / 'data')]))
    assert capsys.readouterr().out.splitlines()[-1] == f'{root} is complete'
    assert len(server.requests) == count


def test_prepare_on_what_is_there_already(server, tmp_path, monkeypatch, capsys):
    serve_archives(server, 'fmd', tmp_path, monkeypatch)
    data = tmp_path / 'data'
    (data / 'fmd').mkdir(parents=True)  # empty: taken over
    prepare('fmd', data)
    (data / 'fmd' / 'image' / 'material0' / 'material0_moderate_001_new.jpg').unlink()
    with pytest.raises(
        DataError, match=rf'fmd: 1 problem, 1 of the tree; move {data}/fmd away, and `python datasets.py'
    ):
        datasets.main(datasets.get_args_parser().parse_args(['prepare', 'fmd', '--data_dir', str(data)]))
    assert f'{data}/fmd: has 29 images, fmd has 30' in capsys.readouterr().out.splitlines()
    shutil.rmtree(data / 'fmd')
    (data / 'fmd').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(DataError, match=r'a link to .*nowhere, which is not there'):
        prepare('fmd', data)
    (data / 'fmd').unlink()
    # What a broken attempt left is not mixed with what is unpacked now.
    trees.put(data / 'fmd.partial' / 'image' / 'material0' / 'stale.jpg', trees.image_bytes('JPEG'))
    prepare('fmd', data)
    assert not list(data.rglob('stale.jpg'))
    shutil.rmtree(data / 'fmd')
    (tmp_path / 'precious').mkdir()
    (data / 'fmd.partial').symlink_to(tmp_path / 'precious')
    with pytest.raises(DataError, match='cannot be made'):
        prepare('fmd', data)
    assert os.listdir(tmp_path / 'precious') == []


def test_two_preparations_at_once(server, tmp_path, monkeypatch):
    serve_archives(server, 'fmd', tmp_path, monkeypatch)
    lock = tmp_path / 'data' / 'downloads' / 'fmd.lock'
    lock.parent.mkdir(parents=True)
    hold = 'import fcntl, sys, time; f = open(sys.argv[1], "w"); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); '
    hold += 'time.sleep(60)'
    other = subprocess.Popen([sys.executable, '-c', hold, str(lock)], stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(DataError, match='is being prepared by another process'):
        prepare('fmd', tmp_path / 'data')
    other.kill()
    other.communicate()
    prepare('fmd', tmp_path / 'data')


def test_real_checksums_and_addresses_are_those_of_the_sources():
    archives = {url.rsplit('/', 1)[-1]: md5 for entry in DATASETS.values() for url, md5 in entry.get('archives', [])}
    assert archives == {
        'dtd-r1.0.1.tar.gz': 'fff73e5086ae6bdbea199a49dfb8a4c1',
        'FMD.zip': '0721ba72cd981aa9599a81bbfaaebd75',
        'kth-tips2-b_col_200x200.tar': '00470a104a57f5a5be22cc8a0f234c4e',
        'CUB_200_2011.tgz': '97eceeb196236b17998738112f37df78',
        '102flowers.tgz': '52808999861908f626f3c1f4e79d11fa',
        'imagelabels.mat': 'e0620be6f572b9609742df49c70aed4d',
        'setid.mat': 'a5357ecc9cb78c4bef273ce3793fc85c',
    }
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
    # More cuts than ATTEMPTS, each after something new.
    server.cuts = [300] * 12
    assert fetch(f'{server.url}/a.bin', md5, tmp_path / 'c').read_bytes() == data
    # Connections that are reset: what has come is kept.
    server.reset, server.cuts, count = True, [1000, 1000], len(server.requests)
    assert fetch(f'{server.url}/a.bin', md5, tmp_path / 'g').read_bytes() == data
    assert [wanted for _, wanted in server.requests[count:]] == [None, 'bytes=1000-', 'bytes=2000-']
    server.reset = False
    # A server in trouble, and one that does not say how long the file is.
    server.errors = [503, 429]
    assert fetch(f'{server.url}/a.bin', md5, tmp_path / 'h').read_bytes() == data
    server.length = False
    assert fetch(f'{server.url}/a.bin', md5, tmp_path / 'i').read_bytes() == data
    server.length = True
    # A file of another content under the name is kept aside.
    (tmp_path / 'i' / 'a.bin').write_bytes(b'mine')
    assert fetch(f'{server.url}/a.bin', md5, tmp_path / 'i').read_bytes() == data
    assert (tmp_path / 'i' / 'a.bin.damaged').read_bytes() == b'mine'
    # A server without ranges begins again; a part that is whole already is only verified.
    (tmp_path / 'e').mkdir()
    (tmp_path / 'e' / 'a.bin.part').write_bytes(b'stale')
    server.ranges = False
    assert fetch(f'{server.url}/a.bin', md5, tmp_path / 'e').read_bytes() == data
    server.ranges = True
    (tmp_path / 'f').mkdir()
    (tmp_path / 'f' / 'a.bin.part').write_bytes(data)
    assert fetch(f'{server.url}/a.bin', md5, tmp_path / 'f').read_bytes() == data


def test_downloads_that_fail_are_one_line(server, tmp_path, monkeypatch):
    (server.folder / 'a.bin').write_bytes(b'abc' * 100)
    with pytest.raises(DataError, match=r'its md5 is .*, not 0+; the file was deleted'):
        fetch(f'{server.url}/a.bin', '0' * 32, tmp_path / 'd')
    assert os.listdir(tmp_path / 'd') == []
    with pytest.raises(DataError, match='the server answers 404'):
        fetch(f'{server.url}/missing.bin', '0' * 32, tmp_path / 'd')
    server.cuts = [0] * 10
    with pytest.raises(DataError, match=r'cannot be downloaded \(the connection was cut\); the same command resumes'):
        fetch(f'{server.url}/a.bin', '0' * 32, tmp_path / 'd')
    server.cuts, server.ranges = [100] * 100, False  # a server that always begins again and never ends
    with pytest.raises(DataError, match=r'cannot be downloaded \(the connection was cut\)'):
        fetch(f'{server.url}/a.bin', '0' * 32, tmp_path / 'g')
    server.cuts = []
    (tmp_path / 'h').mkdir()
    (tmp_path / 'h' / 'a.bin.part').write_bytes(b'x' * 301)  # more than this server sends, as a login page would
    with pytest.raises(DataError, match=r'the server sends 300 bytes in all, but .*a\.bin\.part has 301 already'):
        fetch(f'{server.url}/a.bin', '0' * 32, tmp_path / 'h')
    assert (tmp_path / 'h' / 'a.bin.part').stat().st_size == 301
    server.ranges = True
    for error in (OSError(113, 'No route to host'), ssl.SSLError(1, 'decryption failed')):
        with monkeypatch.context() as patch:
            patch.setattr(http.client.HTTPResponse, 'read1', Mock(side_effect=error))
            with pytest.raises(DataError, match=r'cannot be downloaded \(.*(No route|decryption)'):
                fetch(f'{server.url}/a.bin', '0' * 32, tmp_path / 'i')
    (tmp_path / 'file').touch()
    with pytest.raises(DataError, match=r'file/d: cannot be written \(Not a directory\)$'):
        fetch(f'{server.url}/a.bin', '0' * 32, tmp_path / 'file' / 'd')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'a.bin.part').symlink_to('/dev/full')
    with pytest.raises(
        DataError, match=r'a\.bin\.part: cannot be written \(No space left on device\); free some space'
    ):
        fetch(f'{server.url}/a.bin', '0' * 32, tmp_path / 'full')
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match=r'cannot be downloaded .*refused'):
        fetch(f'{server.url}/b.bin', '0' * 32, tmp_path / 'd')


def test_archives_that_point_outside_or_are_damaged_are_refused(tmp_path):
    evil = tmp_path / 'evil.tar'
    with tarfile.open(evil, 'w') as file:
        member = tarfile.TarInfo('../outside.txt')
        member.size = 3
        file.addfile(member, io.BytesIO(b'abc'))
    with pytest.raises(DataError, match=r'evil\.tar: refused, its member \.\./outside\.txt points outside'):
        unpack(evil, tmp_path / 'in')
    for kind, target in ((tarfile.SYMTYPE, '/etc/passwd'), (tarfile.LNKTYPE, '../secret'), (tarfile.CHRTYPE, '')):
        with tarfile.open(evil, 'w') as file:
            member = tarfile.TarInfo('inside.txt')
            member.type, member.linkname = kind, target
            file.addfile(member)
        with pytest.raises(
            DataError, match=r'evil\.tar: refused, its member inside\.txt points outside or is no plain'
        ):
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
    for name, method in (('torn.zip', zipfile.ZIP_DEFLATED), ('stored.zip', zipfile.ZIP_STORED)):
        with zipfile.ZipFile(tmp_path / name, 'w', method) as file:
            file.write(__file__, 'a.py')
        whole = bytearray((tmp_path / name).read_bytes())
        whole[200] ^= 0xFF
        (tmp_path / name).write_bytes(whole)
    for name, words in (
        ('torn.tgz', 'damaged'),
        ('torn.zip', 'damaged'),
        ('stored.zip', 'damaged'),
        ('text.bin', 'neither a tar nor a zip'),
    ):
        with pytest.raises(DataError, match=words):
            unpack(tmp_path / name, tmp_path / 'in')


def test_a_disk_that_fills_while_unpacking(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as file:
        file.writestr('a.txt', 'abc')
    full = Mock(side_effect=OSError(errno.ENOSPC, 'No space left on device'))
    monkeypatch.setattr(zipfile.ZipFile, 'extractall', full)
    with pytest.raises(DataError, match=r'in: cannot be written \(No space left on device\); free some space'):
        unpack(tmp_path / 'a.zip', tmp_path / 'in')


def test_an_interrupted_preparation_leaves_no_half_tree(server, tmp_path, monkeypatch):
    serve_archives(server, 'fmd', tmp_path, monkeypatch)

    def cut(archive, folder):
        unpack(archive, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(archives, 'unpack', cut)
        with pytest.raises(KeyboardInterrupt):
            prepare('fmd', tmp_path / 'data')
    assert not (tmp_path / 'data' / 'fmd').exists()
    count = len(server.requests)
    prepare('fmd', tmp_path / 'data')
    assert len(server.requests) == count, 'the archive was there'
    assert is_complete(check_tree('fmd', tmp_path / 'data' / 'fmd'))


def test_check_finds_what_is_wrong(tmp_path, monkeypatch, capsys):
    trees.fmd(tmp_path / 'fmd', **trees.SMALL['fmd'])
    root = tmp_path / 'fmd' / 'image'
    assert 'has 3 classes, by protocol fmd has 10' in check_tree('fmd', tmp_path / 'fmd').tree[0]
    facts = {**DATASETS['fmd'], 'images': 31, 'classes': 3}
    monkeypatch.setitem(DATASETS, 'fmd', facts)
    (problem,) = check_tree('fmd', tmp_path / 'fmd').tree
    assert problem.endswith('has (18, 6, 6) images to train, validate and test, by protocol fmd has (600, 200, 200)')
    facts['sizes'] = (18, 6, 6)
    assert check_tree('fmd', tmp_path / 'fmd').tree == [f'{tmp_path / "fmd"}: has 30 images, fmd has 31']
    facts['images'] = 30
    assert is_complete(check_tree('fmd', tmp_path / 'fmd'))

    # The same pixels twice: in one class as another file, and in two classes.
    names = ['material0_moderate_001_new.jpg', 'material0_moderate_002_new.jpg']
    Image.open(root / 'material0' / names[0]).save(root / 'material0' / names[0].replace('.jpg', '.png'))
    os.remove(root / 'material0' / names[1])
    shutil.copy(
        root / 'material1' / 'material1_moderate_001_new.jpg', root / 'material2' / 'material2_moderate_001_new.jpg'
    )
    found = check_tree('fmd', tmp_path / 'fmd')
    notes, leaks = found.twice, found.leaks
    assert len(notes) == 2
    assert names[0] in notes[0]
    place = [{p: s for s in SUBSETS for p, _ in getattr(datasets.load_splits('fmd', root, f), s)} for f in range(1, 6)]
    pairs = [note.split(': ')[1].split(', in ')[0].split(' and ') for note in notes]
    for note, pair in zip(notes, pairs):
        apart = [fold for fold in range(1, 6) if place[fold - 1][pair[0]] != place[fold - 1][pair[1]]]
        assert note.endswith(
            f'in two subsets of fold {", ".join(map(str, apart))}' if apart else 'one subset of every fold'
        )
    assert leaks == sum('two subsets' in note for note in notes)
    assert any('in two classes' in note and 'material2_moderate_001_new.jpg' in note for note in notes)

    broken = root / 'material1' / 'material1_moderate_003_new.jpg'
    broken.write_bytes(broken.read_bytes()[:300])
    (problem,) = check_tree('fmd', tmp_path / 'fmd').unreadable
    assert problem.startswith(f'{broken}: cannot be read as an image')


def test_check_knows_folders_without_a_size_of_their_own(tmp_path, monkeypatch):
    trees.fmd(tmp_path, **trees.SMALL['fmd'])
    assert is_complete(check_tree('folder', tmp_path / 'image'))
    for subset in SUBSETS:
        shutil.copytree(tmp_path / 'image', tmp_path / 'split' / subset)
    found = check_tree('folder', tmp_path / 'split')
    assert len(found.twice) == found.leaks == 60
    assert all('in two subsets of fold 1' in note for note in found.twice)
    with pytest.raises(DataError, match='60 problems, 60 of images that stand in two subsets of a fold'):
        datasets.main(datasets.get_args_parser().parse_args(['check', 'folder', '--data_dir', str(tmp_path / 'split')]))
    # Images of one colour and other sizes have the same bytes, but are not the same.
    for i, size in enumerate([(8, 4), (4, 8), (2, 16), (16, 2), (32, 1)]):
        for c in ('a', 'b'):
            (tmp_path / 'plain' / c).mkdir(parents=True, exist_ok=True)
            Image.new('RGB', size, (200, 0, 0) if c == 'a' else (0, 0, 200)).save(tmp_path / 'plain' / c / f'{i}.png')
    assert is_complete(check_tree('folder', tmp_path / 'plain'))
    tree = tmp_path / 'dtd'
    trees.dtd(tree, **trees.SMALL['dtd'])
    (tree / 'dtd' / 'labels' / 'train10.txt').unlink()
    assert 'has 3 classes, dtd has 47 (another tree in its layout can train' in check_tree('dtd', tree).tree[0]
    monkeypatch.setitem(DATASETS, 'dtd', {**DATASETS['dtd'], 'classes': 3, 'sizes': (12, 12, 12)})
    assert check_tree('dtd', tree).tree[0].startswith('fold 10 of')
    with pytest.raises(DataError, match='is not downloaded'):
        prepare('folder', tmp_path)
    with pytest.raises(DataError, match="unknown data set 'cifar'"):
        prepare('cifar', tmp_path)
