"""Where the time of a forward pass goes on one core of this machine: a table of operators.

    python tests/profile_forward.py --model data/models/bbc-small --tokens 128 1024

Made-up tokens, one batch of the engine's own size, what a stream of `classify` computes. The table
is torch's profiler's, the time of each operator without that of those that it calls.
"""

import argparse

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from batchclf.compute import open_model
from batchclf.config import ModelSettings
from batchclf.engine import Engine, build_model

REPEATS = 5
SHOWN = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128], help="of every text")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    checkpoint, compute = open_model(ModelSettings(options.model, dtype=options.dtype))
    engine = Engine(build_model(checkpoint, compute), compute)
    torch.set_num_threads(1)
    for tokens in options.tokens:
        rows = max(engine.max_batch_tokens // tokens, 1)
        chance = np.random.default_rng(0)
        ids = chance.integers(1, checkpoint.config.vocab_size, rows * tokens, dtype=np.int32)
        starts, lengths = np.arange(rows) * tokens, np.full(rows, tokens)
        engine._forward(ids, starts, lengths)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(REPEATS):
                engine._forward(ids, starts, lengths)
        found = profiled.key_averages()
        total_us = sum(each.self_cpu_time_total for each in found)
        print(
            f"{rows} rows of {tokens} tokens in {compute.dtype_name}: "
            f"{total_us / REPEATS / 1000:.1f} ms"
        )
        found.sort(key=lambda each: -each.self_cpu_time_total)
        for each in found[:SHOWN]:
            share = each.self_cpu_time_total / total_us
            print(f"  {share:6.1%}  {each.count // REPEATS:4d} x {each.key}")


if __name__ == "__main__":
    main()
