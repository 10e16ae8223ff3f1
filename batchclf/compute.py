"""Where, by what and in which precision a model is computed, resolved from the options."""

import logging
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from batchclf.checkpoint import Build, Checkpoint, find_build, load
from batchclf.config import Backend, ModelSettings
from batchclf.errors import ConfigError
from batchclf.openvino_model import check_installed

log = logging.getLogger(__name__)

_DEVICES = ("cpu", "cuda")
INT8 = "int8"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Processor features with which bfloat16 products are faster than float32 ones.
_CPU_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True)
class Compute:
    """Where, by what and in which precision the model runs, resolved.

    Attributes:
        dtype: with a build, of all that is not quantized in it.
        build: a quantized graph of the model, for OpenVINO.
    """

    device: torch.device
    dtype: torch.dtype
    backend: Backend = "torch"
    build: Build | None = None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.") if self.build is None else INT8

    @property
    def identity(self) -> dict[str, str]:
        """What results depend on, in plain values."""
        found = {"backend": self.backend, "dtype": self.dtype_name}
        if self.build is not None:
            rest = str(self.dtype).removeprefix("torch.")
            found |= {"build": self.build.content_hash, "dtype_of_the_rest": rest}
        return found


def find_devices(device: str) -> tuple[str, ...]:
    """What `--device` names: all GPUs that torch sees for `all`, else the one device.

    Raises:
        ConfigError: there is no GPU for `all`.
    """
    if device != "all":
        return (device,)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ConfigError("--device all: torch sees no CUDA device on this machine; use auto")
    return tuple(f"cuda:{index}" for index in range(count))


def choose_compute(
    device: str = "auto", dtype: str = "auto", backend: Backend = "torch"
) -> Compute:
    """Resolve `auto`: CUDA where there is one; bfloat16 where the device is fast at it.

    Raises:
        ConfigError: no such device here, or one that does not know the dtype or the backend.
    """
    if backend == "openvino":
        return _choose_openvino(device, dtype)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"--device {device}: use auto, cpu, cuda or cuda:N") from None
    if chosen.type not in _DEVICES:
        raise ConfigError(f"--device {device}: use auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise ConfigError(f"--device {device}: torch sees {count} CUDA devices on this machine")
    if dtype == INT8:
        raise ConfigError("--dtype int8 needs --backend openvino")
    if dtype not in ("auto", *_DTYPES):
        raise ConfigError(f"--dtype {dtype}: use auto or one of {', '.join(_DTYPES)}")
    return Compute(chosen, _choose_dtype(chosen, dtype))


def _choose_openvino(device: str, dtype: str) -> Compute:
    """OpenVINO computes on the CPU; `_choose_build` adds the build where asked."""
    check_installed("openvino")
    if device not in ("auto", "cpu"):
        raise ConfigError(f"--device {device}: --backend openvino computes on the CPU; use cpu")
    if dtype not in ("auto", INT8, "float32", "bfloat16"):
        raise ConfigError(
            f"--dtype {dtype}: --backend openvino knows auto, {INT8}, bfloat16 and float32"
        )
    cpu = torch.device("cpu")
    return Compute(cpu, _choose_dtype(cpu, "auto" if dtype == INT8 else dtype), "openvino")


def _choose_dtype(device: torch.device, dtype: str) -> torch.dtype:
    if dtype == "auto":
        dtype = "bfloat16" if _is_fast_at_bfloat16(device) else "float32"
    return _DTYPES[dtype]


def open_model(
    settings: ModelSettings, endpoint_url: str | None = None
) -> tuple[Checkpoint, Compute]:
    """A model, and what is to compute it.

    Raises:
        ConfigError: no such device, dtype or backend here, or not for this model.
        CheckpointError: the model, or its build, cannot be had or trusted.
        StoreError: S3 kept failing.
    """
    compute = choose_compute(settings.device, settings.dtype, settings.backend)
    checkpoint = load(
        settings.model, settings.max_length, endpoint_url, build=compute.backend == "openvino"
    )
    return checkpoint, _choose_build(compute, checkpoint, settings.dtype)


def _choose_build(compute: Compute, checkpoint: Checkpoint, dtype: str) -> Compute:
    """With the model's int8 build, where the backend has any use for it and the dtype allows it.

    Args:
        compute: from `choose_compute`.
        checkpoint: the model.
        dtype: as it was asked for: `auto` takes the build if there is one.

    Raises:
        ConfigError: int8 was asked for, and there is no build.
        CheckpointError: the build is damaged or of another model.
    """
    if compute.backend != "openvino" or dtype not in ("auto", INT8):
        return compute
    build = find_build(checkpoint)
    if build is not None:
        return replace(compute, build=build)
    command = f"batchclf build --model {checkpoint.path} --calibrate INPUT"
    if dtype == INT8:
        raise ConfigError(f"--dtype {INT8}: {checkpoint.path} has no build; make one: {command}")
    log.info(
        "%s has no int8 build, so this is %s; %s", checkpoint.path, compute.dtype_name, command
    )
    return compute


def _is_fast_at_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if platform.system() != "Linux":
        return False
    words = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    return bool(_CPU_BFLOAT16_FLAGS & set(words))
