"""Devices, precision and processes: one process by itself, or one among those that torchrun or SLURM started."""

import contextlib
import ctypes
import os
import platform
import re
import signal
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NoReturn

import timm
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.errors import CacheError, DataError, ModelError, ProcessError, RunError, UserError
from common.machine import cores
from common.runs import counted, git_commit

JOB = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')  # what torchrun tells each of its processes
AMP_DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, off=torch.float32)


def number_in(variable: str) -> int | None:
    """A non-negative integer in the environment; None if the variable is missing or holds something else."""
    text = os.environ.get(variable, '')
    return int(text) if text.isdecimal() else None


def process_rank() -> tuple[int, int]:
    """Rank of this process and number of processes, as torchrun sets them; (0, 1) without it."""
    rank, world = number_in('RANK'), number_in('WORLD_SIZE')
    return (0, 1) if rank is None or world is None else (rank, world)


def find_device(name: str) -> torch.device:
    """The device that --device names, with its index: without one torch.cuda.set_device would refuse it.

    Args:
        name: 'auto', 'cpu', 'cuda' (of several processes: each one's own) or 'cuda:N'.
    """
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    match = re.fullmatch(r'cpu|cuda(?::([0-9]+))?', name)
    if not match:
        raise RunError(f"--device '{name}' must be auto, cpu, cuda or cuda:N")
    if name == 'cpu':
        return torch.device('cpu')
    count, several = torch.cuda.device_count(), process_rank()[1] > 1
    if several and match[1]:
        raise RunError(f'--device {name}: each of several processes has a device of its own; leave the number out')
    index = local_index(count) if several else int(match[1] or 0)
    if index >= count:
        raise RunError(f'--device {name}: needs device {index}, and torch finds {counted(count, "CUDA device")}')
    return torch.device('cuda', index)


def local_index(count: int) -> int:
    """The index of this process's own device among the `count` of its machine.

    torchrun says it. srun does not, but numbers its tasks, unless each of them is shown its own device alone.
    """
    index = number_in('LOCAL_RANK')
    if index is None:
        index = 0 if count == 1 else number_in('SLURM_LOCALID')
    if index is None:
        raise RunError(f"LOCAL_RANK does not say which of the {count} CUDA devices is this process's; use torchrun")
    return index


def setup(device: str, seed: int) -> torch.device:
    """Ask for deterministic kernels, find the device, join the other processes if there are any, seed."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # for debugging only, and slow
    torch.backends.cudnn.benchmark = False
    keep_freed_memory()
    place = find_device(device)
    if place.type == 'cuda':
        torch.cuda.set_device(place)
    if process_rank()[1] > 1:
        join('gloo' if place.type == 'cpu' else 'nccl')
    torch.manual_seed(seed)
    if (threads := torch.get_num_threads()) > cores():  # torch does not see the quota of a container
        say(f'note: {threads} threads share {cores()} cores here; OMP_NUM_THREADS={cores()} may be faster')
    return place


def keep_freed_memory() -> None:
    """Have the C library keep freed memory; otherwise each step gets it back from the system page by page."""
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)  # glibc's
    if mallopt is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def join(backend: str) -> None:
    """Join the process group of torchrun, or of a job announced in the environment."""
    rank, world = process_rank()
    try:
        store = next(dist.rendezvous('env://', timeout=timedelta(minutes=10)))[0]
    except (RuntimeError, ValueError) as error:
        job, reason = ', '.join(f'{name}={os.environ.get(name)}' for name in JOB), str(error).splitlines()[0]
        way_out = 'unset WORLD_SIZE for a single process, or start them all with torchrun'
        raise ProcessError(f'{job}: the processes do not meet ({reason}); {way_out}') from error
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        store = dist.PrefixStore(new_prefix(store, rank, world), store)
    patience = timedelta(hours=1)  # the others wait while the main process lists a million files
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)


def new_prefix(store: dist.Store, rank: int, world: int) -> str:
    """A prefix of the keys in torchrun's store that no earlier process has used.

    torchrun keeps one store through all restarts, and in it the addresses of dead processes: without a prefix, two
    processes of which one had been killed did not meet again in two of three tries. So the main process offers a new
    one, and the others take it once it has answered them.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        if store.check(['offer']):
            os.environ['TORCHELASTIC_RESTART_COUNT'] = '1'  # torchrun counts only the restarts of its own machine
        store.set('offer', mine)
        for other in range(1, world):
            wait_for_key(store, f'{mine}/{other}')
            store.set(store.get(f'{mine}/{other}').decode(), 'welcome')
        return mine
    wait_for_key(store, 'offer')
    while not store.check([mine]):  # a dead process's offer is answered by nobody, and replaced
        offer = store.get('offer').decode()
        store.set(f'{offer}/{rank}', mine)
        time.sleep(0.02)
    return offer


def wait_for_key(store: dist.Store, key: str) -> None:
    while not store.check([key]):  # in Python, so that signals are handled; torchrun ends processes that wait in vain
        time.sleep(0.02)


def was_restarted() -> bool:
    """True in the main process if torchrun started it to replace one that died."""
    return (number_in('TORCHELASTIC_RESTART_COUNT') or 0) > 0


def environment_of(device: torch.device) -> dict:
    """What may change the last bits of a result besides its configuration."""
    return dict(
        python=platform.python_version(),
        torch=str(torch.__version__),  # a class of its own, which a checkpoint must not hold
        torchvision=str(torchvision.__version__),
        timm=timm.__version__,
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        threads=torch.get_num_threads(),
        commit=git_commit(say),
    )


def resolve_amp(amp: str, device: torch.device) -> str:
    """'auto' is bf16 if the processor has it natively, else fp16 on CUDA and off on a CPU."""
    if amp != 'auto':
        return amp
    if device.type == 'cuda':
        return 'bf16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'fp16'
    if hasattr(torch.cpu, 'get_capabilities'):
        features = torch.cpu.get_capabilities()
    else:  # before torch 2.10; the oldest cannot tell
        features = {'avx512_bf16': getattr(torch.cpu, '_is_avx512_bf16_supported', bool)()}
    return 'bf16' if any(present for name, present in features.items() if 'bf16' in name) else 'off'


def autocast(device: torch.device, amp: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=AMP_DTYPES[amp], enabled=amp != 'off')


def is_main() -> bool:
    """True in the process that writes files and reports."""
    return process_rank()[0] == 0


def is_quiet() -> bool:
    """True where no progress bar is drawn: in the other processes, and where stderr is not a terminal."""
    return not is_main() or not sys.stderr.isatty()


def say(message: str) -> None:
    """Progress: a line on stderr, from the main process, above the progress bar."""
    if is_main():
        tqdm.write(message, file=sys.stderr)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mean_of(total: torch.Tensor) -> float:
    """The mean, from (sum, count)."""
    return (total[0] / total[1]).item()


def share_object(make: Callable):
    """What make() returns in the main process, in every process. A user error there ends the other processes too."""
    box = [None]
    if is_main():
        try:
            box = [make()]
        except UserError as error:
            box = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    if isinstance(box[0], UserError):
        if is_main():
            raise box[0]
        sys.exit(box[0].exit_code)  # the main process reports it
    return box[0]


def share_weights(model: nn.Module) -> None:
    """Copy the main process's weights and buffers to every process, so that all evaluate what is saved.

    Otherwise each process has the BatchNorm statistics of its own batches.
    """
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def logits_of(model: nn.Module, images: torch.Tensor, name: str) -> torch.Tensor:
    """The output of a model in training. Raises ModelError where it is no tensor."""
    out = model(images)
    if not isinstance(out, torch.Tensor):
        raise ModelError(
            f'{name}: returns a {type(out).__name__} while it trains, not one tensor of logits; leave out what goes '
            'beside them, such as auxiliary logits'
        )
    return out


def parallelise(model: nn.Module, amp: str, batch: torch.Tensor, name: str) -> nn.Module:
    """The model with its gradients averaged over processes; the model itself if there is one process.

    DistributedDataParallel regroups the gradients after its first backward pass, which changes the order of their sums.
    A pass over `batch`, of any images, comes before: the first step of a resumed run is then like any other. An earlier
    one, of the model alone, shows which parameters have no gradient: they have to be looked for at every step.
    """
    if world_size() == 1:
        return model
    # Of a 1x1 kernel the two layouts are the same memory; torch warns of the strides.
    warnings.filterwarnings('ignore', 'Grad strides do not match bucket view strides')
    device, buffers = batch.device, [buffer.clone() for buffer in model.buffers()]

    def backward(model: nn.Module) -> None:
        with autocast(device, amp):
            logits_of(model.train(), batch, name).float().sum().backward()

    backward(model)
    unused = [key for key, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    if unused:
        say(f'note: {name}: no gradient reaches {", ".join(unused)}')
    model.zero_grad(set_to_none=True)
    ids = [device] if device.type == 'cuda' else None
    parallel = DistributedDataParallel(model, device_ids=ids, find_unused_parameters=bool(unused))
    backward(parallel)
    parallel.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers):
            buffer.copy_(before)
    return parallel


# ---------------------------------------------------------------------------------------------- how a script ends


@contextlib.contextmanager
def training_process(script: str, stopped: str, signals: tuple[int, ...]) -> Iterator[None]:
    """Run the body of a training script: an error of the user, a missing compiler, or a signal ends it with one line.

    Args:
        script: its name, which begins the line.
        stopped: the line after a signal.
        signals: those that raise KeyboardInterrupt(number); the exit code is 128 + number.
    """
    for number in signals:
        signal.signal(number, interrupt)
    try:
        yield
    except UserError as error:
        fail(script, error)
    except RuntimeError as error:
        if not type(error).__module__.startswith(('torch._dynamo.', 'torch._inductor.')):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith('raised:')]
        way_out = 'torch.compile needs a C++ compiler such as g++; without --compile it runs too'
        fail(script, ProcessError(f'--compile: {lines[0]}; {way_out}'))
    except KeyboardInterrupt as stop:
        say(stopped)
        sys.exit(128 + stop.args[0])
    finally:
        if dist.is_initialized():
            # A thread of gloo may still have to free a tensor, for which it needs the lock of Python, which is held
            # while the group ends and waits for that thread: torch 2.4 hung in half of all tries.
            time.sleep(0.1)
            dist.destroy_process_group()


def interrupt(signum: int, _) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # once is enough
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt(signum)


@contextlib.contextmanager
def noted_signals(signals: tuple[int, ...]) -> Iterator[list[int]]:
    """Inside, a signal to stop is only noted; the loop saves and stops when all processes next look up."""
    noted: list[int] = []
    before = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in signals}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fail(script: str, error: UserError) -> NoReturn:
    """End this process with one line on stderr and the exit code of the error.

    Of several processes that fail alike the main one reports; one that fails alone, over an image it reads, does too.
    """
    alone = isinstance(error, (DataError, CacheError)) and dist.is_initialized()
    if is_main() or alone or isinstance(error, ProcessError):
        # An error from a loader process arrives with that process's traceback; the last line is the message.
        message = re.sub(r'^common\.errors\.\w+: ', '', str(error).strip().splitlines()[-1])
        print(f'{script}: error: {message}', file=sys.stderr)
    sys.exit(error.exit_code)
