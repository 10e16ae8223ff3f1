"""An OpenVINO graph in int8: weights and activations, by post-training quantization with NNCF.

SmoothQuant (Xiao et al. 2023, https://arxiv.org/abs/2211.10438) moves the outliers of GPT-2's
activations into the weights first; it is a part of NNCF's recipe for transformers.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from batchclf.model_config import ModelConfig
from batchclf.openvino_graph import SETTLE, inputs_of


def quantize(graph: Any, texts: Sequence[npt.NDArray[np.int32]], config: ModelConfig) -> Any:
    """The graph with products in int8, calibrated on texts like those it will see.

    Args:
        graph: from `openvino_graph.build_graph`.
        texts: token ids of each, at least one token.
        config: of the model.
    """
    # NNCF would report its use to its makers where they once had consent on this machine.
    os.environ["NNCF_CI"] = "1"
    import nncf

    nncf.set_log_level(40)  # errors; it writes to standard output

    return nncf.quantize(
        graph,
        nncf.Dataset(list(texts), lambda ids: inputs_of(ids, config)),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(texts),
        ignored_scope=nncf.IgnoredScope(patterns=[f"^{SETTLE}.*"]),
    )
