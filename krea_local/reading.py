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
from dataclasses import dataclass, replace
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
    def end(self) -> int:
        """The byte after their last."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def part(self, view: View) -> Numbers:
        """Those that a view of the tensor has, which must adjoin."""
        seen = view(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        assert seen.is_contiguous()
        start = self.start + seen.storage_offset() * self.dtype.itemsize
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
    staged = [batch for batch in batches if not batch[0].is_direct]
    size = max((_nbytes(batch) for batch in staged), default=0)
    lanes = {device: lane_of(device) for device in {batch[0].target.device for batch in staged}}
    free = deque(_Buffer() for _ in range(BUFFERS))
    waiting = iter(batches)
    running: dict[Future[None], tuple[Sequence[Transfer], _Buffer]] = {}
    with ExitStack() as stack:
        for lane in lanes.values():
            stack.callback(lane.finish)
        pool = ThreadPoolExecutor(READERS, "krea_local-reader")
        stack.callback(pool.shutdown, cancel_futures=True)  # and wait for those that have begun
        while True:
            for batch in islice(waiting, len(free)):
                buffer = free.popleft()
                lane = None if batch[0].is_direct else lanes[batch[0].target.device]
                running[pool.submit(_load, batch, buffer, size, lane)] = batch, buffer
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                batch, buffer = running.pop(future)
                future.result()
                if not batch[0].is_direct:
                    pairs = list(
                        zip((one.target for one in batch), buffer.views(batch), strict=True)
                    )
                    buffer.wait = lanes[batch[0].target.device].copy(pairs)
                free.append(buffer)
                for one in batch:
                    on_bytes(one.component, one.source.end - one.source.start)


def _at_once() -> None:
    """What is done already needs no waiting."""


@dataclass
class _Buffer:
    """Host memory that a reader fills, and that must not be filled again before `wait` is over."""

    memory: Tensor | None = None
    wait: Callable[[], object] = _at_once

    def views(self, batch: Sequence[Transfer]) -> Iterator[Tensor]:
        """The numbers of each transfer, as they lie here."""
        assert self.memory is not None
        first = batch[0].source.start
        for one in batch:
            flat = self.memory[one.source.start - first : one.source.end - first]
            yield flat.view(one.source.dtype)


def _batches(transfers: Iterable[Transfer]) -> Iterator[list[Transfer]]:
    """The transfers, cut and put together into what is read at once, in the files' order."""
    batch: list[Transfer] = []
    pieces = [piece for transfer in transfers for piece in _split(transfer)]
    for piece in sorted(pieces, key=lambda one: (one.source.file, one.source.start)):
        if batch and not _continues(batch, piece):
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _split(transfer: Transfer) -> Iterator[Transfer]:
    source, target = transfer.source, transfer.target.view(-1)
    assert target.numel() == math.prod(source.shape)
    count = PIECE // source.dtype.itemsize
    for first in range(0, target.numel(), count):
        part = target[first : first + count]
        start = source.start + first * source.dtype.itemsize
        yield replace(
            transfer, source=replace(source, start=start, shape=tuple(part.shape)), target=part
        )


def _continues(batch: Sequence[Transfer], piece: Transfer) -> bool:
    """Whether `piece` can be read with those before it."""
    first, last = batch[0], batch[-1]
    return (
        piece.source.file == last.source.file
        and piece.source.start == last.source.end
        and piece.source.end - first.source.start <= PIECE
        # Numbers in a buffer lie at multiples of their size.
        and (piece.source.start - first.source.start) % piece.source.dtype.itemsize == 0
        and piece.target.device == first.target.device
        and piece.is_direct == first.is_direct
    )


def _nbytes(batch: Sequence[Transfer]) -> int:
    return batch[-1].source.end - batch[0].source.start


def _load(batch: Sequence[Transfer], buffer: _Buffer, size: int, lane: Lane | None) -> None:
    """Read a batch into its targets, or by a lane's leave into `buffer`, which then has `size`."""
    places = [one.target for one in batch]
    if lane is not None:
        buffer.wait()
        if buffer.memory is None:
            buffer.memory = lane.memory(size)
        places = [buffer.memory[: _nbytes(batch)]]
    file = batch[0].source.file
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(batch[0].source.start)
            for place in places:
                rest = memoryview(place.view(torch.uint8).numpy())
                while rest:
                    count = stream.readinto(rest)  # which lets other threads run meanwhile
                    if not count:
                        raise WeightsInvalid(f"{str(file)!r} is truncated: {AGAIN}")
                    rest = rest[count:]
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> WeightsNotFound:
    if isinstance(error, FileNotFoundError):
        return WeightsNotFound(f"no file {str(file)!r}: {AGAIN}")
    return WeightsNotFound(f"cannot read {str(file)!r}: {error.strerror}")
