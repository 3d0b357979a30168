"""POSIX file locks, under the name fcntl; on Windows, where there are none, one line instead of a traceback."""

import sys
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:
    sys.exit(f'{Path(sys.argv[0]).name}: error: needs Linux or macOS (file locks); on Windows, run it in WSL')

__all__ = ['fcntl']
