"""A model whose transformer OpenVINO computes on the CPU, in float32, bfloat16 or partly in int8.

The head stays torch's and float32. Batches may have any shape; each new one costs OpenVINO a little
time and memory, so the engine keeps shapes few.

Shapes: B rows of a batch, T tokens of the longest row, H hidden size, L positions of the flatten
head.
"""
# ruff: noqa: N803, N806 - names of tensors end in their shape, in capitals

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from batchclf.errors import ConfigError
from batchclf.model import GPT2Classifier

Precision = Literal["float32", "bfloat16"]
_HINTS = {"float32": "f32", "bfloat16": "bf16"}
INSTALL = "pip install 'batchclf[openvino]'"


def check_installed(*names: str) -> None:
    """Raise ConfigError unless the packages of the extra are there."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--backend openvino needs {' and '.join(missing)}; {INSTALL}")


def hand_over(
    model: GPT2Classifier,
    precision: Precision,
    num_streams: int,
    num_threads: int,
    graph: Path | None = None,
) -> GPT2Classifier:
    """Have OpenVINO compute the transformer of a model, for inference alone.

    Args:
        model: float32, on the CPU, in eval mode.
        precision: of all that is not quantized.
        num_streams: batches that are computed side by side, each by the thread that asks for it.
        num_threads: of all of them together.
        graph: from `builds`, quantized; None: made of the model's own weights.

    Returns:
        The same model.

    Raises:
        ConfigError: OpenVINO cannot do it here.
    """
    import openvino as ov

    from batchclf.openvino_graph import build_graph

    with _errors("the model cannot be compiled"):
        core = ov.Core()
        found = core.read_model(graph) if graph else build_graph(model)
        alone_1LH = None
        if model.config.head == "flatten":
            positions_L = torch.arange(model.config.head_length)
            pads_1L = torch.full_like(positions_L, model.config.pad_token_id or 0)[None]
            with torch.inference_mode():
                alone_1LH = model.transformer.forward_alone(pads_1L, positions_L)
        model.add_module("transformer", nn.Module())  # its weights are in the graph now
        compiled = core.compile_model(
            found,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": _HINTS[precision],
                "NUM_STREAMS": num_streams,
                "INFERENCE_NUM_THREADS": num_threads,
                # Several workers on one machine would pin themselves to the same cores.
                "ENABLE_CPU_PINNING": False,
            },
        )
    model.add_module("transformer", _CompiledTransformer(compiled, alone_1LH))
    return model


class _CompiledTransformer(nn.Module):
    """What `model._Transformer` computes, in any number of threads."""

    def __init__(self, compiled: Any, alone_1LH: Tensor | None) -> None:
        super().__init__()
        self._compiled = compiled
        self._alone_1LH = alone_1LH
        self._own = threading.local()

    def forward(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """The final hidden states of all tokens, [B, T, H]."""
        return self._infer(ids_BT, positions_BT)

    def forward_pooled(self, ids_BT: Tensor, positions_T: Tensor, lengths_B: Tensor) -> Tensor:  # noqa: ARG002 - as the others
        """The final hidden state of each row's last token, [B, H]."""
        return self._infer(ids_BT, lengths_B)

    def forward_alone(self, ids_1L: Tensor, positions_L: Tensor) -> Tensor:  # noqa: ARG002 - as the others
        """The pads of the flatten head, all of them, as torch computed them in float32."""
        if self._alone_1LH is None:
            raise ValueError("only the flatten head has pads")
        return self._alone_1LH

    def _infer(self, *inputs: Tensor) -> Tensor:
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        values = [each.to(torch.int32).numpy() for each in inputs]
        with _errors("a batch cannot be computed"):
            found = self._own.request.infer(values, share_inputs=True, share_outputs=True)
        # It lies in the request's memory until this thread's next batch; the head is done by then.
        return torch.from_numpy(found[0])


@contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else type(error).__name__
        raise ConfigError(f"OpenVINO: {what} ({reason}); use --backend torch") from error
