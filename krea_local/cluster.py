"""Several GPUs, one image: every process has the weights and a part of the tokens (Ulysses).

`torchrun --nproc-per-node 2 -m krea_local txt2img …`: what works token by token, all but attention,
is divided; for attention the processes exchange tokens for heads, and back. The processes draw the
same picture; the first one writes it. From Python: `load(..., group=cluster.join())`, in a program
that torchrun starts.

Source: DeepSpeed-Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from krea_local.errors import DeviceUnavailable, InvalidRequest


class Ulysses:
    """The processes of `torch.distributed`, as a `transformer.Group`.

    Args:
        device: of this process.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank: int = dist.get_rank()
        self.size: int = dist.get_world_size()

    def check(self, heads: int) -> None:
        """See that attention's heads can be divided.

        Raises:
            InvalidRequest: they cannot.
        """
        if heads % self.size:
            raise InvalidRequest(
                f"{self.size} processes: should divide the model's {heads} attention heads"
            )

    def agree(self, number: int) -> int:
        """The first process's number."""
        numbers = [number]
        dist.broadcast_object_list(numbers, src=0, device=self.device)
        return numbers[0]

    def all_equal(self, value: object) -> bool:
        """Whether every process has the same value."""
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value)
        return all(one == value for one in values)

    def shard(self, tokens: Tensor) -> Tensor:
        """As `transformer.Group`; parts differ by one token at most."""
        return tokens.tensor_split(self.size, dim=1)[self.rank]

    def scatter_heads(
        self, query: Tensor, key: Tensor, value: Tensor, totals: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `transformer.Group`, in one exchange."""
        joined = torch.cat([query, key, value], dim=-1)  # [B, n, H, 3 d]
        batch, mine, heads, width = joined.shape
        lengths = self._lengths(totals)
        assert lengths[self.rank] == mine
        share = heads // self.size
        sent = [part.reshape(-1) for part in joined.split(share, dim=2)]
        sizes = [batch * length * share * width for length in lengths]
        parts = self._exchange(sent, sizes)
        found = torch.cat(
            [
                part.view(batch, length, share, width)
                for part, length in zip(parts, lengths, strict=True)
            ],
            dim=1,
        )
        first, second, third = found.chunk(3, dim=-1)
        return first, second, third

    def gather_heads(self, tokens: Tensor, totals: tuple[int, ...]) -> Tensor:
        """As `transformer.Group`."""
        batch, _, share, width = tokens.shape
        lengths = self._lengths(totals)
        sent = [part.reshape(-1) for part in tokens.split(lengths, dim=1)]
        sizes = [batch * lengths[self.rank] * share * width] * self.size
        parts = self._exchange(sent, sizes)
        shape = (batch, lengths[self.rank], share, width)
        return torch.cat([part.view(shape) for part in parts], dim=2)

    def gather(self, tokens: Tensor, total: int) -> Tensor:
        """As `transformer.Group`."""
        lengths = self._lengths((total,))
        longest = max(lengths)
        padded = tokens.new_zeros(tokens.shape[0], longest, *tokens.shape[2:])
        padded[:, : tokens.shape[1]] = tokens
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        cut = [part[:, :length] for part, length in zip(parts, lengths, strict=True)]
        return torch.cat(cut, dim=1)

    def sum(self, number: Tensor) -> Tensor:
        """As `transformer.Group`."""
        dist.all_reduce(number)
        return number

    def leave(self) -> None:
        """End working together."""
        dist.destroy_process_group()

    def _lengths(self, totals: tuple[int, ...]) -> list[int]:
        """Tokens of each process, where each of `totals` is divided on its own."""
        return [
            sum(total // self.size + (rank < total % self.size) for total in totals)
            for rank in range(self.size)
        ]

    def _exchange(self, sent: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Send part i to process i; what each sent here."""
        received = sent[0].new_empty(sum(sizes))
        dist.all_to_all_single(received, torch.cat(sent), sizes, [part.numel() for part in sent])
        return list(received.split(sizes))


def join(device: str | torch.device = "auto") -> Ulysses:
    """Meet the other processes that torchrun has started.

    Args:
        device: "auto" is the GPU of this process's number on its machine, or else the CPU.

    Raises:
        DeviceUnavailable: more processes than GPUs on a machine, or not started by torchrun.
        InvalidRequest: no such kind of device.
    """
    if "RANK" not in os.environ:
        raise DeviceUnavailable(
            "several GPUs need several processes: torchrun --nproc-per-node 2 -m krea_local …"
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if str(device) == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if local >= count:
            raise DeviceUnavailable(
                f"process {local} on this machine, which has {count} GPUs: start as many processes "
                "as GPUs, or say device='cpu'"
            )
        device = torch.device("cuda", local)
    elif str(device) != "cpu":
        raise InvalidRequest(
            f"device={str(device)!r}: should be 'auto', 'cuda' or 'cpu' with several processes, "
            "each of which takes the GPU of its number"
        )
    place = torch.device(device)
    options: dict[str, Any] = {}
    if place.type == "cuda":
        torch.cuda.set_device(place)
        options["device_id"] = place
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", **options)
    return Ulysses(place)
