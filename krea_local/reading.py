"""Copy numbers from safetensors files to where they are wanted, on a GPU or in host memory.

Several threads read pieces of the files: for host memory right to their places; for a GPU into a
few locked buffers, from which they are copied there on a stream of its own. What is wanted in
another dtype changes it on the device. Knows nothing of models or of what tensors are called.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from krea_local.errors import WeightsInvalid, WeightsNotFound
from krea_local.files import AGAIN, check_safetensors
from krea_local.memory import pin_tensors
from krea_local.progress import OnBytes

READERS = 8  # threads
PIECE = 2**24  # bytes that one reads at once, at most
BUFFERS = 2 * READERS  # of PIECE: 256 MiB; half of them are read into, half are copied from

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
}
"""Those that are read, by their names in safetensors."""

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Numbers:
    """Numbers as they lie in a file, one after the other.

    Attributes:
        file: which has them.
        start: their first byte in it.
        shape: of their tensor.
        dtype: that they are kept in.
    """

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """What they take in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """The byte after their last."""
        return self.start + self.nbytes

    def part(self, view: View) -> Numbers:
        """Those that a view of the tensor has, which must adjoin."""
        seen = view(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        assert seen.is_contiguous()
        start = self.start + int(seen.storage_offset()) * self.dtype.itemsize
        return replace(self, start=start, shape=tuple(seen.shape))


@dataclass(frozen=True)
class Transfer:
    """Numbers and where they go.

    Attributes:
        source: numbers of a file.
        target: as many, contiguous, of any dtype and on any device.
        component: whose they are, for `OnBytes`.
    """

    source: Numbers
    target: Tensor
    component: str

    @property
    def is_direct(self) -> bool:
        """Whether the file's bytes are the target's, in host memory."""
        return self.target.device.type == "cpu" and self.target.dtype == self.source.dtype


class Lane(Protocol):
    """How numbers get from host memory to a device."""

    def memory(self, nbytes: int) -> Tensor:
        """Host memory, uint8, to copy from."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], object]:
        """Begin to copy (target, source) each; what is returned waits until all are copied."""

    def finish(self) -> None:
        """Wait for all copies."""


class CudaLane:
    """A stream of one GPU, and host memory that is locked for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        # Whoever had the targets' memory before may still be at it.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def memory(self, nbytes: int) -> Tensor:
        """As in `Lane`."""
        memory = torch.empty(nbytes, dtype=torch.uint8)
        pin_tensors([memory], self._device)
        return memory

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], object]:
        """As in `Lane`."""
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                if source.dtype != target.dtype:  # which torch would change on the CPU
                    source = source.to(self._device, non_blocking=True)
                target.copy_(source, non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # else its waiting threads keep CPUs busy
            event.record()
        return event.synchronize

    def finish(self) -> None:
        """As in `Lane`."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._stream.synchronize()


class CpuLane:
    """Host memory to host memory, at once."""

    def memory(self, nbytes: int) -> Tensor:
        """As in `Lane`."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], object]:
        """As in `Lane`."""
        for target, source in pairs:
            target.copy_(source)
        return _at_once

    def finish(self) -> None:
        """As in `Lane`."""


def lane_of(device: torch.device) -> Lane:
    """The lane to `device`."""
    return CudaLane(device) if device.type == "cuda" else CpuLane()


def numbers_of(file: Path) -> dict[str, Numbers]:
    """Where a safetensors file keeps its tensors, by name; only those in `DTYPES`.

    Raises:
        WeightsNotFound, WeightsInvalid: as `check_safetensors`, or a tensor's bytes are not those
            of its shape.
    """
    return locate(file, check_safetensors(file))


def locate(file: Path, header: Mapping[str, Mapping[str, Any]]) -> dict[str, Numbers]:
    """As `numbers_of`, of a file whose header is known."""
    try:
        with file.open("rb") as stream:
            origin = 8 + int.from_bytes(stream.read(8), "little")
    except OSError as error:
        raise _unreadable(file, error) from error
    found = {}
    for name, tensor in header.items():
        if tensor["dtype"] in DTYPES:
            start, end = (origin + int(offset) for offset in tensor["data_offsets"])
            shape = tuple(map(int, tensor["shape"]))
            numbers = Numbers(file, start, shape, DTYPES[tensor["dtype"]])
            if min(start - origin, *shape, 0) < 0 or numbers.end != end:
                raise WeightsInvalid(
                    f"{str(file)!r}: tensor {name} has {end - start:,} bytes, which are not "
                    f"{shape} numbers in {tensor['dtype']}; {AGAIN}"
                )
            found[name] = numbers
    return found


def read(
    transfers: Iterable[Transfer],
    on_bytes: OnBytes,
    *,
    lane_of: Callable[[torch.device], Lane] = lane_of,
) -> None:
    """Have every transfer done; on a GPU, before anything that is asked of it later.

    Args:
        transfers: in any order; no two to the same place.
        on_bytes: hears of progress, in this thread.
        lane_of: how to get to a device.

    Raises:
        WeightsNotFound: a file is gone or cannot be read.
        WeightsInvalid: a file ends too early.
    """
    batches = list(_batches(transfers))
    size = max((batch.nbytes for batch in batches if not batch.is_direct), default=0)
    lanes = {device: lane_of(device) for device in {batch.device for batch in batches}}
    waiting = iter(batches)
    free = deque(_Buffer() for _ in range(BUFFERS))
    running: dict[Future[None], tuple[_Batch, _Buffer]] = {}
    with ExitStack() as stack:
        for lane in lanes.values():
            stack.callback(lane.finish)
        pool = ThreadPoolExecutor(READERS, "krea_local-reader")
        stack.callback(pool.shutdown, cancel_futures=True)  # and wait for those that have begun
        while True:
            for batch in islice(waiting, len(free)):
                buffer = free.popleft()
                running[pool.submit(_load, batch, buffer, size, lanes[batch.device])] = (
                    batch,
                    buffer,
                )
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                batch, buffer = running.pop(future)
                future.result()
                if not batch.is_direct:
                    pairs = zip(batch.targets, batch.views(buffer.memory), strict=True)
                    buffer.wait = lanes[batch.device].copy(list(pairs))
                free.append(buffer)
                for one in batch.transfers:
                    on_bytes(one.component, one.source.nbytes)


def _at_once() -> None:
    """What is done already needs no waiting."""


@dataclass
class _Buffer:
    """Host memory that a reader fills, and that must not be filled again before `wait` is over."""

    memory: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    wait: Callable[[], object] = _at_once


@dataclass(frozen=True)
class _Batch:
    """Transfers of adjoining numbers, which are read at once."""

    transfers: list[Transfer]

    @property
    def file(self) -> Path:
        return self.transfers[0].source.file

    @property
    def start(self) -> int:
        return self.transfers[0].source.start

    @property
    def nbytes(self) -> int:
        return self.transfers[-1].source.end - self.start

    @property
    def device(self) -> torch.device:
        return self.transfers[0].target.device

    @property
    def is_direct(self) -> bool:
        return self.transfers[0].is_direct

    @property
    def targets(self) -> list[Tensor]:
        return [one.target for one in self.transfers]

    def views(self, memory: Tensor) -> Iterator[Tensor]:
        """The numbers of each transfer where `memory` holds the batch."""
        for one in self.transfers:
            flat = memory[one.source.start - self.start : one.source.end - self.start]
            yield flat.view(one.source.dtype)

    def is_continued_by(self, piece: Transfer) -> bool:
        """Whether `piece` can be read with those before it."""
        return (
            piece.source.file == self.file
            and piece.source.start == self.start + self.nbytes
            and piece.source.end - self.start <= PIECE
            # Numbers in a buffer lie at multiples of their size.
            and (piece.source.start - self.start) % piece.source.dtype.itemsize == 0
            and piece.target.device == self.device
            and piece.is_direct == self.is_direct
        )


def _batches(transfers: Iterable[Transfer]) -> Iterator[_Batch]:
    """The transfers, cut to pieces and put together again, in the files' order."""
    pieces = [piece for transfer in transfers for piece in _pieces(transfer)]
    batch = _Batch([])
    for piece in sorted(pieces, key=lambda one: (one.source.file, one.source.start)):
        if batch.transfers and not batch.is_continued_by(piece):
            yield batch
            batch = _Batch([])
        batch.transfers.append(piece)
    if batch.transfers:
        yield batch


def _pieces(transfer: Transfer) -> Iterator[Transfer]:
    source, target = transfer.source, transfer.target.view(-1)
    assert target.numel() == math.prod(source.shape)
    most = PIECE // source.dtype.itemsize
    for first in range(0, target.numel(), most):
        part = target[first : first + most]
        start = source.start + first * source.dtype.itemsize
        piece = replace(source, start=start, shape=tuple(part.shape))
        yield replace(transfer, source=piece, target=part)


def _load(batch: _Batch, buffer: _Buffer, size: int, lane: Lane) -> None:
    """Read a batch to its targets, or into `buffer`, which has `size` bytes from then on."""
    places = batch.targets
    if not batch.is_direct:
        buffer.wait()
        if not buffer.memory.nbytes:
            buffer.memory = lane.memory(size)
        places = [buffer.memory[: batch.nbytes]]
    try:
        with batch.file.open("rb", buffering=0) as stream:
            stream.seek(batch.start)
            for place in places:
                rest = place.view(torch.uint8).numpy().data
                while rest:
                    count = stream.readinto(rest)  # meanwhile other threads run
                    if not count:
                        raise WeightsInvalid(f"{str(batch.file)!r} is truncated: {AGAIN}")
                    rest = rest[count:]
    except OSError as error:
        raise _unreadable(batch.file, error) from error


def _unreadable(file: Path, error: OSError) -> WeightsNotFound:
    if isinstance(error, FileNotFoundError):
        return WeightsNotFound(f"no file {str(file)!r}: {AGAIN}")
    return WeightsNotFound(f"cannot read {str(file)!r}: {error.strerror}")
