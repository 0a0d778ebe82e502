"""A fresh process: open the bundle, open the engine, run it once, say what that took.

The process that qualifies has everything loaded; this one has nothing. It is started with one
argument, a JSON object of the bundle's folder, resolution, backend and device, and prints another.
"""

import json
import sys
import time

import torch

from lcexport.engines import open_engine
from lcexport.engines.bundle import open_bundle
from lcexport.engines.host import peak_rss_bytes
from lcexport.golden import golden_inputs, run_branch


def cold_start(folder: str, resolution: str, backend: str, device: str) -> dict[str, float]:
    """What opening an engine and running it once takes, in seconds and in this process' bytes."""
    where = torch.device(device)
    on_gpu = where.type == "cuda"
    at_start = torch.cuda.mem_get_info(where)[0] if on_gpu else 0  # also starts CUDA
    begin = time.perf_counter()
    with open_engine(backend, open_bundle(folder), resolution, device) as engine:
        opened = time.perf_counter()
        got = {"open_seconds": opened - begin}
        if on_gpu:
            got["device_bytes_opened"] = at_start - torch.cuda.mem_get_info(where)[0]
        run_branch(engine, golden_inputs(engine), "cond")
        got["first_run_seconds"] = time.perf_counter() - opened
        if on_gpu:
            got["device_bytes_run"] = at_start - torch.cuda.mem_get_info(where)[0]
            got["torch_peak_bytes"] = torch.cuda.max_memory_allocated(where)
        got["host_peak_bytes"] = peak_rss_bytes()
    return got


def main() -> None:
    """The process."""
    got = cold_start(**json.loads(sys.argv[1]))
    sys.stdout.write(json.dumps(got) + "\n")


if __name__ == "__main__":
    main()
