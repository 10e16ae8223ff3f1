"""The processes of one run: one alone, or those that torchrun started.

Every process reads all examples and plans the same batches; each computes its rows of every batch.
Source of the variables: https://docs.pytorch.org/docs/stable/elastic/run.html
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from batchclf.compute import choose_compute
from batchclf.errors import ConfigError, Interrupted


@dataclass(frozen=True)
class Processes:
    """What one process knows of its run.

    Attributes:
        rank: of this process, from 0; the first one logs and writes.
        size: number of processes.
        device: where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with the first one's weights, its gradients averaged over the processes."""
        if self.size == 1:
            return module
        return DistributedDataParallel(
            module, device_ids=[self.device] if self.device.type == "cuda" else None
        )

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes; every process gets the same."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """As `sum`; on the CPU."""
        if self.size > 1:
            tensor = tensor.to(self.device)
            distributed.all_reduce(tensor)
        return tensor.cpu()

    def gather(self, tensor: Tensor) -> Tensor:
        """What each process has, stacked by rank, on the CPU."""
        if self.size == 1:
            return tensor.cpu()[None]
        own = tensor.to(self.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(found, own)
        return torch.stack(found).cpu()

    def broadcast_text(self, text: str) -> str:
        """What the first process has; the others' is not looked at."""
        if self.size == 1:
            return text
        own = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
        length = torch.tensor(len(text.encode()), device=self.device)
        distributed.broadcast(length, src=0)
        received = torch.zeros(max(1, int(length)), dtype=torch.uint8, device=self.device)
        if self.is_first:
            received.copy_(own)
        distributed.broadcast(received, src=0)
        return bytes(received.cpu().numpy())[: int(length)].decode()

    def broadcast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the first process has, on the CPU; the others' are not looked at."""
        if self.size == 1:
            return dict(tensors)
        shapes = {name: (str(t.dtype), list(t.shape)) for name, t in tensors.items()}
        found = {}
        for name, (dtype, shape) in json.loads(self.broadcast_text(json.dumps(shapes))).items():
            kind = getattr(torch, dtype.removeprefix("torch."))
            tensor = torch.empty(shape, dtype=kind, device=self.device)
            if self.is_first:
                tensor.copy_(tensors[name])
            distributed.broadcast(tensor, src=0)
            found[name] = tensor.cpu()
        return found


def unsynced(module: nn.Module) -> AbstractContextManager[object]:
    """Backward passes inside keep their gradients to this process, for a later one to take along.

    Only DistributedDataParallel shares gradients at all.
    """
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


@contextmanager
def join(device: str) -> Iterator[Processes]:
    """Find the other processes of this run, if torchrun started any.

    Raises:
        ConfigError: no such device here, or variables of torchrun that make no sense.
        Interrupted: another process went away.
    """
    rank, size, local_rank = (_variable(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank is None or size is None or size == 1:
        yield Processes(0, 1, choose_compute(device, "float32").device)
        return
    if device in {"auto", "cuda"} and torch.cuda.is_available():
        device = f"cuda:{local_rank or 0}"
    chosen = choose_compute(device, "float32").device
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    try:
        distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        yield Processes(rank, size, chosen)
        distributed.destroy_process_group()
    except RuntimeError as error:
        # gloo has no class of its own for it
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise Interrupted(
                f"process {rank} of {size} lost another one, whose message says why ({error})"
            ) from error
        raise


def _variable(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None:
        return None
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r} in the environment is not a whole number") from None
