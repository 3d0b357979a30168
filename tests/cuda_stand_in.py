"""A machine with CUDA devices for tests, where there is none: CPU tensors that say they are on a device.

    with CudaStandIn(monkeypatch, devices=2) as cuda:
        train.cli([..., '--device', 'cuda'])
    cuda.calls                                  # where torch.cuda.set_device and the others were called from

The arithmetic is the CPU's, so a run on a device that is only claimed gives the bits of one on the CPU. What a real
device refuses is refused here: devices that there are not or that have no index where one is needed, operations
between devices, NumPy's view of a tensor on a device, bf16 that is not native, collectives of NCCL over CPU tensors.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.cuda._utils import _get_device_index
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device('cpu')
Tensor = torch.Tensor
# What moves data between devices, or takes indices from the CPU; the result is where the first argument is.
MIXING = {Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_, torch._foreach_copy_}
MIXING |= {Tensor.__deepcopy__, torch._has_compatible_shallow_copy_type}
# torch's own, however often they are replaced.
AUTOCAST, DEEPCOPY, GENERATOR = torch.autocast, torch.nn.Parameter.__deepcopy__, torch.Generator
COLLECTIVES = {name: getattr(dist, name) for name in ('init_process_group', 'all_reduce', 'broadcast')}
HOST_ONLY = {Tensor.numpy, Tensor.__array__}


class Call(NamedTuple):
    name: str  # of torch.cuda's
    file: str  # of the project
    line: int


class CudaStandIn(TorchFunctionMode):
    """Stands in for torch.cuda and its tensors while it is entered.

    Args:
        monkeypatch: puts the functions of torch.cuda in place.
        devices: how many there are.
        bf16: whether they compute it natively.
    """

    # Where tensors are that are not on the CPU; of all stand-ins, as the project keeps some from one to the next.
    places = WeakTensorKeyDictionary()

    def __init__(self, monkeypatch, devices: int = 1, bf16: bool = True):
        super().__init__()
        self.devices, self.bf16, self.current = devices, bf16, 0
        self.calls: list[Call] = []
        self.seen: Counter = Counter()  # 'pinned', and the precision of every autocast operation
        self.backends: list[str] = []
        self.patch(monkeypatch)

    # ------------------------------------------------------------------------------------------ torch.cuda

    # The functions of torch.cuda that the project may call.
    def is_available(self) -> bool:
        return self.devices > 0

    def device_count(self) -> int:
        return self.devices

    def set_device(self, device) -> None:
        self.current = self.existing(_get_device_index(device))  # torch's own: a device without an index is refused

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return self.bf16 or including_emulation

    def get_device_name(self, device=None) -> str:
        return f'Stand-in {self.existing(self.index_of(device))}'

    def synchronize(self, device=None) -> None:
        self.existing(self.index_of(device))

    OF_TORCH_CUDA = (is_available, device_count, set_device, is_bf16_supported, get_device_name, synchronize)

    def index_of(self, device) -> int:
        """As torch does it: the current device where none or no index is given."""
        if device is None or (isinstance(device, (str, torch.device)) and torch.device(device).index is None):
            return self.current
        return _get_device_index(device)

    def existing(self, index: int) -> int:
        if not 0 <= index < self.devices:
            raise RuntimeError('CUDA error: invalid device ordinal')
        return index

    def place(self, device) -> torch.device:
        """torch.device with its index, of a device that is there."""
        device = torch.device('cuda', device) if isinstance(device, int) else torch.device(device)
        return CPU if device.type == 'cpu' else torch.device('cuda', self.existing(self.index_of(device)))

    def patch(self, monkeypatch) -> None:
        for function in self.OF_TORCH_CUDA:
            monkeypatch.setattr(torch.cuda, function.__name__, self.recorded(function))
        # What torch itself asks on the way.
        monkeypatch.setattr(torch.cuda, 'current_device', lambda: self.current)
        monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
        monkeypatch.setattr(torch.cuda, 'manual_seed_all', lambda _: None)
        if hasattr(torch, 'accelerator'):
            monkeypatch.setattr(torch.accelerator, 'is_available', lambda *_, **__: True)
            monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda *_, **__: torch.device('cuda'))
            monkeypatch.setattr(torch.accelerator, 'current_device_index', lambda: self.current)
            monkeypatch.setattr(torch.accelerator, 'set_device_index', lambda _: None)
        monkeypatch.setattr(Tensor, 'pin_memory', lambda tensor, *_: self.pinned(tensor))
        monkeypatch.setattr(torch, 'autocast', on_both(AUTOCAST))
        monkeypatch.setattr(torch, 'Generator', lambda device=CPU: GENERATOR())
        monkeypatch.setattr(  # makes its copy where no mode looks on
            torch.nn.Parameter,
            '__deepcopy__',
            lambda parameter, memo: self.put(DEEPCOPY(parameter, memo), self.place_of(parameter)),
        )
        self.patch_nccl(monkeypatch)

    def recorded(self, function):
        def wrapped(*args, **kwargs):
            frame = sys._getframe(1)
            path = Path(frame.f_code.co_filename)
            if path.parent in (ROOT, ROOT / 'common', ROOT / 'training', ROOT / 'interpret'):
                self.calls.append(Call(function.__name__, str(path.relative_to(ROOT)), frame.f_lineno))
            return function(self, *args, **kwargs)

        return wrapped

    def pinned(self, tensor: Tensor) -> Tensor:
        self.seen['pinned'] += 1
        return tensor

    def patch_nccl(self, monkeypatch) -> None:
        """gloo does the work of NCCL; what is not on the process's own device is refused, as NCCL does."""

        def init_process_group(backend, **kwargs):
            self.backends.append(backend)
            COLLECTIVES['init_process_group']('gloo', **kwargs)

        def collective(name):
            def wrapped(tensor, *args, **kwargs):
                if self.backends == ['nccl'] and self.place_of(tensor) != torch.device('cuda', self.current):
                    raise ValueError(f'Tensors must be CUDA and dense, on this device; {name} of {tensor.shape}')
                return COLLECTIVES[name](tensor, *args, **kwargs)

            return wrapped

        monkeypatch.setattr(dist, 'init_process_group', init_process_group)
        for name in ('all_reduce', 'broadcast'):
            monkeypatch.setattr(dist, name, collective(name))

    # ------------------------------------------------------------------------------------------ tensors

    def place_of(self, tensor: Tensor) -> torch.device:
        return self.places.get(tensor, CPU)

    def put(self, value, place: torch.device):
        """Note where the tensors of a result are."""
        for tensor in tensors_in(value):
            if place == CPU:
                self.places.pop(tensor, None)
            else:
                self.places[tensor] = place
        return value

    def common_place(self, function, args, kwargs) -> torch.device:
        """Where the arguments of an operation are. Numbers of the CPU, tensors of no dimension, go with all devices."""
        if function in MIXING:
            return self.place_of(next(tensors_in(args)))
        tensors = list(tensors_in((args, kwargs)))
        places = {self.place_of(tensor) for tensor in tensors if tensor.dim() or self.place_of(tensor) != CPU}
        if len(places) > 1:
            raise RuntimeError(
                'Expected all tensors to be on the same device, but found at least two devices, '
                f'{" and ".join(sorted(map(str, places)))}! (when calling {function})'
            )
        return next(iter(places), CPU)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == Tensor.device.__get__:
            return self.place_of(args[0])
        if function == Tensor.is_cuda.__get__:
            return self.place_of(args[0]).type == 'cuda'
        if function in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self.move(function, args, kwargs)
        if function == Tensor.data.__set__:
            self.put(args[0], self.place_of(args[1]))
            return function(*args)
        if kwargs.pop('pin_memory', False):
            self.seen['pinned'] += 1
        place = self.common_place(function, args, kwargs)
        if place != CPU and function in HOST_ONLY:
            raise TypeError(f"can't convert {place} device type tensor to numpy. Use Tensor.cpu() to copy it first")
        if kwargs.get('device') is not None:
            place, kwargs['device'] = self.place(kwargs['device']), 'cpu'
        if place != CPU and torch.is_autocast_enabled('cuda'):
            self.seen[torch.get_autocast_dtype('cuda')] += 1
        return self.put(function(*args, **kwargs), place)

    def move(self, function, args, kwargs):
        tensor, *rest = args
        source = target = self.place_of(tensor)
        if function is not Tensor.to:
            target = CPU if function is Tensor.cpu else self.place(rest[0] if rest else kwargs.get('device') or 'cuda')
            rest, kwargs = [], {k: v for k, v in kwargs.items() if k == 'memory_format'}
        elif kwargs.get('device') is not None:
            target = self.place(kwargs.pop('device'))
        elif rest and isinstance(rest[0], Tensor):
            target = self.place_of(rest[0])
        elif rest and isinstance(rest[0], (str, int, torch.device)):
            target = self.place(rest.pop(0))
            if rest and rest[0] is None:
                rest.pop(0)  # Module.to gives (device, no type, non_blocking)
            if rest and isinstance(rest[0], bool):
                kwargs['non_blocking'] = rest.pop(0)
        moved = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
        if moved is tensor and target != source:
            moved = tensor.clone()  # another memory
        return self.put(moved, target)


def on_both(real: type) -> type:
    """torch.autocast, which for CUDA is that of the CPU too: the tensors are its own."""

    class Autocast(real):
        def __enter__(self):
            if self.device == 'cuda':
                self.below = real('cpu', dtype=self.fast_dtype, enabled=self._enabled)
                self.below.__enter__()
            return super().__enter__()

        def __exit__(self, *error):
            super().__exit__(*error)
            if self.device == 'cuda':
                self.below.__exit__(*error)

    return Autocast


def tensors_in(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
