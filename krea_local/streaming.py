"""Weights that stay in host memory and visit the GPU block by block, ahead of their use.

Blocks are used in turn, round after round: while one works, the next ones are copied on a stream of
their own into the few places that there are on the GPU. Nothing waits on the host. Weights are
constant, so nothing is ever written back. Knows nothing of what the blocks compute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from krea_local.plan import visitors

ALIGNMENT = 256  # bytes, as CUDA's own allocator gives them, so that the same kernels are chosen
AHEAD = 2  # blocks that are copied before they are needed

Mark = Any
"""A point in the work of the GPU, which it passes some time later."""


class Lane(Protocol):
    """Where copies run beside the computation."""

    def copy(self, target: Tensor, source: Tensor, after: Mark | None) -> Mark:
        """Begin to copy once `after` is passed; the mark returned is passed when it is done."""

    def wait(self, mark: Mark) -> None:
        """Have the computation go on only once `mark` is passed."""

    def mark(self) -> Mark:
        """A mark that is passed when all computation that was asked for until now is done."""

    def drain(self) -> None:
        """Have the computation go on only once all copies are done."""


class CudaLane:
    """A stream of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor, after: Mark | None) -> Mark:
        """As in `Lane`; without waiting on the host, if `source` is locked in its memory."""
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, mark: Mark) -> None:
        """As in `Lane`."""
        torch.cuda.current_stream(self._device).wait_event(mark)

    def mark(self) -> Mark:
        """As in `Lane`."""
        return torch.cuda.current_stream(self._device).record_event()

    def drain(self) -> None:
        """As in `Lane`."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class SameLane:
    """Of a device that does one thing after the other, as a CPU does."""

    def copy(self, target: Tensor, source: Tensor, after: Mark | None) -> Mark:
        """As in `Lane`, done at once."""
        target.copy_(source)

    def wait(self, mark: Mark) -> None:
        """As in `Lane`."""

    def mark(self) -> Mark:
        """As in `Lane`."""

    def drain(self) -> None:
        """As in `Lane`."""


def lane_of(device: torch.device) -> Lane:
    """The lane that fits `device`."""
    return CudaLane(device) if device.type == "cuda" else SameLane()


@dataclass(frozen=True)
class _Weight:
    """One weight of a block: where its module keeps it, where it lies among the block's bytes."""

    store: dict[str, Any]
    name: str
    start: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, flat: Tensor) -> nn.Parameter:
        count = self.shape.numel() * self.dtype.itemsize
        numbers = flat[self.start : self.start + count].view(self.dtype).view(self.shape)
        return nn.Parameter(numbers, requires_grad=False)


class _Block:
    """A block's weights in one piece of host memory, to be copied at once."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        stores = [
            (store, name, tensor)
            for store in _stores(modules)
            for name, tensor in store.items()
            if tensor is not None
        ]
        tensors = [tensor for _, _, tensor in stores]
        ends = accumulate(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)
        *starts, size = 0, *ends
        shared = _home_of(tensors, size)
        if shared is not None:
            starts = [tensor.storage_offset() * tensor.itemsize for tensor in tensors]
        self.home = torch.empty(size, dtype=torch.uint8) if shared is None else shared
        self.weights = [
            _Weight(store, name, start, tensor.shape, tensor.dtype)
            for (store, name, tensor), start in zip(stores, starts, strict=True)
        ]
        if shared is None:
            for weight, tensor in zip(self.weights, tensors, strict=True):
                weight.view(self.home).copy_(tensor)
        self._at_home = self.views(self.home)
        self.put(self._at_home)

    def views(self, flat: Tensor) -> list[nn.Parameter]:
        """The block's weights among the bytes of a copy."""
        return [weight.view(flat) for weight in self.weights]

    def put(self, views: Sequence[nn.Parameter]) -> None:
        """Have the modules use these weights."""
        for weight, view in zip(self.weights, views, strict=True):
            weight.store[weight.name] = view

    def put_home(self) -> None:
        """Have the modules use those in host memory."""
        self.put(self._at_home)


@dataclass
class _Slot:
    """A place on the device, for one block at a time."""

    flat: Tensor
    held: int | None = None
    ready: Mark | None = None
    used: Mark | None = None
    views: dict[int, list[nn.Parameter]] = field(default_factory=dict)


class BlockStream:
    """Blocks that are used in turn, and are on the device while they are.

    Args:
        blocks: each one's modules, in the order of their use; the weights in them move to memory
            of the stream's own.
        device: where they work.
        resident: so many of them stay on the device, the first one and some among the others.
        again: whether another round follows, so that its first blocks are copied in this one.
        lane: where copies run.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[nn.Module]],
        device: torch.device,
        *,
        resident: int = 0,
        again: bool = True,
        lane: Lane | None = None,
    ) -> None:
        self.device = device
        self._lane = lane or lane_of(device)
        self._again = again
        self._blocks = [_Block(block) for block in blocks]
        self.streamed: list[int] = []
        self._resident: dict[int, list[nn.Parameter]] = {}
        self._slots: list[_Slot] = []
        self._opened = 0
        self.keep(resident)

    @property
    def homes(self) -> list[Tensor]:
        """What is copied from, in host memory: uint8, one tensor a block."""
        return [block.home for block in self._blocks]

    @property
    def slot_bytes(self) -> int:
        """What the places on the device take, all together."""
        return self._largest * min(AHEAD + 1, len(self.streamed))

    @property
    def _largest(self) -> int:
        return max((self._blocks[i].home.numel() for i in self.streamed), default=0)

    def keep(self, resident: int) -> None:
        """Have so many blocks stay on the device from the next `open` on; now only fewer."""
        self.streamed = visitors(len(self._blocks), resident)
        if self._opened == 0:
            for i in self._resident.keys() & set(self.streamed):
                del self._resident[i]

    def leave(self) -> None:
        """Give the memory of resident blocks back until the next `open`, unless it is open now."""
        if self._opened == 0:
            self._resident = {}

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Have places on the device inside the block, and the first weights on their way there."""
        self._opened += 1
        try:
            if self._opened == 1:
                self._begin()
            yield
        finally:
            self._opened -= 1
            if self._opened == 0:
                self._end()

    @contextlib.contextmanager
    def block(self, i: int) -> Iterator[None]:
        """Have block `i` on the device inside the block; within `open`."""
        self.acquire(i)
        try:
            yield
        finally:
            self.release(i)

    def acquire(self, i: int) -> None:
        """Have block `i` on the device; within `open`, and until `release`."""
        if i in self._resident:
            return
        slot = self._fetch(i, self._next(i))
        self._lane.wait(slot.ready)
        block = self._blocks[i]
        if i not in slot.views:
            slot.views[i] = block.views(slot.flat)
        block.put(slot.views[i])

    def release(self, i: int) -> None:
        """Let block `i` go, and begin to copy what is needed next."""
        if i in self._resident:
            return
        self._blocks[i].put_home()
        self._holding(i).used = self._lane.mark()
        self._prefetch(i + 1)

    def _begin(self) -> None:
        for i in set(range(len(self._blocks))) - set(self.streamed):
            if i not in self._resident:
                block = self._blocks[i]
                self._resident[i] = block.views(block.home.to(self.device))
            self._blocks[i].put(self._resident[i])
        places = min(AHEAD + 1, len(self.streamed))
        self._slots = [
            _Slot(torch.empty(self._largest, dtype=torch.uint8, device=self.device))
            for _ in range(places)
        ]
        for slot in self._slots:  # whoever had this memory before may still be at it
            slot.used = self._lane.mark()
        self._prefetch(0)

    def _end(self) -> None:
        for block in self._blocks:
            block.put_home()
        self._lane.drain()  # the places are given back to a computation that knows no lanes
        self._slots = []

    def _next(self, i: int) -> list[int]:
        """The streamed blocks that are used next, from `i` on, as many as there are places."""
        later = [one for one in self.streamed if one >= i]
        earlier = [one for one in self.streamed if one < i and self._again]
        return (later + earlier)[: len(self._slots)]

    def _holding(self, i: int) -> _Slot:
        return next(slot for slot in self._slots if slot.held == i)

    def _prefetch(self, i: int) -> None:
        wanted = self._next(i)
        for one in wanted:
            self._fetch(one, wanted)

    def _fetch(self, i: int, wanted: list[int]) -> _Slot:
        """The place that has block `i`, or will have it; copying it there if need be.

        `wanted`: what is not to be overwritten, `i` among them, no more than there are places.
        """
        for slot in self._slots:
            if slot.held == i:
                return slot
        slot = next(slot for slot in self._slots if slot.held not in wanted)
        home = self._blocks[i].home
        slot.held = i
        slot.ready = self._lane.copy(slot.flat[: home.numel()], home, slot.used)
        return slot


def _home_of(tensors: Sequence[Tensor], size: int) -> Tensor | None:
    """The home of another stream's block, where these are its weights, seen otherwise."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    storage = tensors[0].untyped_storage() if tensors else None
    if len(storages) != 1 or storage is None or storage.nbytes() != size:
        return None
    if storage.device.type != "cpu" or not all(tensor.is_contiguous() for tensor in tensors):
        return None
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _stores(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """Where `modules` and those in them keep their weights."""
    inner = {id(one): one for module in modules for one in module.modules()}
    return [store for one in inner.values() for store in (one._parameters, one._buffers)]
