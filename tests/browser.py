"""A headless Chromium, driven over a pipe by the DevTools protocol."""

import base64
import json
import os
import select
import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


class Browser:
    """One page; `errors` has what its console or its code complained of, and `requests` what it asked the outside."""

    def __init__(self, folder: Path):
        theirs, self.write = os.pipe()
        self.read, answers = os.pipe()
        flags = ['--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', f'--user-data-dir={folder}']
        # Chromium reads commands from descriptor 3 and answers on 4.
        shell = f'exec "$0" "$@" 3<&{theirs} 4>&{answers}'
        command = ['bash', '-c', shell, CHROMIUM, *flags, '--remote-debugging-pipe']
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, pass_fds=(theirs, answers))
        os.close(theirs)
        os.close(answers)
        self.session, self.number, self.rest, self.events = None, 0, b'', []
        self.errors, self.requests = [], []
        page = self.send('Target.createTarget', url='about:blank')['targetId']  # that of the start may not be there yet
        self.session = self.send('Target.attachToTarget', targetId=page, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.send(f'{domain}.enable')

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)

    def next(self) -> dict:
        while b'\0' not in self.rest:
            ready, *_ = select.select([self.read], [], [], 120)
            if not ready or not (data := os.read(self.read, 1 << 20)):
                raise EOFError('Chromium has ended, or does not answer')
            self.rest += data
        message, self.rest = self.rest.split(b'\0', 1)
        found = json.loads(message)
        method, params = found.get('method', ''), found.get('params', {})
        if method == 'Runtime.exceptionThrown' or (
            method == 'Runtime.consoleAPICalled' and params['type'] in ('error', 'warning')
        ):
            self.errors.append(params)
        elif method == 'Log.entryAdded':
            self.errors.append(params['entry'])
        elif method == 'Network.requestWillBeSent':
            self.requests.append(params['request']['url'])
        return found

    def send(self, command: str, **params) -> dict:
        self.number += 1
        message = dict(id=self.number, method=command, params=params)
        if self.session:
            message['sessionId'] = self.session
        os.write(self.write, json.dumps(message).encode() + b'\0')
        while (found := self.next()).get('id') != self.number:
            self.events.append(found.get('method'))
        if 'error' in found:
            raise RuntimeError(found['error'])
        return found['result']

    def wait(self, event: str) -> None:
        while event not in self.events:
            self.events.append(self.next().get('method'))
        self.events.clear()

    def open(self, path: Path) -> None:
        self.events.clear()
        self.send('Page.navigate', url=path.absolute().as_uri())
        self.wait('Page.loadEventFired')

    def size(self, width: int, height: int = 800, mobile: bool = False) -> None:
        shape = dict(width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.send('Emulation.setDeviceMetricsOverride', **shape)

    def run(self, code: str):
        """The value of an expression of JavaScript."""
        found = self.send('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in found, found
        return found['result'].get('value')

    def shot(self, path: Path, whole: bool = False) -> None:
        data = self.send('Page.captureScreenshot', captureBeyondViewport=whole)['data']
        path.write_bytes(base64.b64decode(data))
