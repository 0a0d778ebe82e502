"""What is qualified: one engine of one bundle, on one device."""

from dataclasses import dataclass
from pathlib import Path

import torch

from lcexport.configs.dit import DiTConfig
from lcexport.dit import LongCatDiT
from lcexport.eager import dit_from_files
from lcexport.engines import COMPILED, TENSORRT, Engine, open_engine
from lcexport.engines.bundle import Bundle
from lcexport.engines.host import available_memory_bytes
from lcexport.engines.manifest import DIT_CONFIG, WEIGHTS, EngineRecord, GraphRecord


@dataclass(frozen=True)
class Subject:
    """The engine in question. `folder` is the report's, where a check may leave files."""

    bundle: Bundle
    resolution: str
    backend: str
    device: torch.device
    folder: Path

    @property
    def record(self) -> GraphRecord:
        return self.bundle.graph(self.resolution)

    @property
    def engine_record(self) -> EngineRecord | None:
        """The record of a compiled engine; None for a backend that runs the graph."""
        return self.bundle.manifest.engines.get(self.backend, {}).get(self.resolution)

    @property
    def compiled(self) -> bool:
        return self.backend in COMPILED

    @property
    def tensorrt(self) -> bool:
        """Whether its plans are TensorRT's, which can be inspected and refitted."""
        return self.backend in TENSORRT

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def config(self) -> DiTConfig:
        return DiTConfig.from_json(self.bundle.path(DIT_CONFIG))

    @property
    def weights(self) -> Path:
        return self.bundle.path(WEIGHTS)

    @property
    def bulk(self) -> torch.dtype:
        """The dtype of the large products."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.bundle.manifest.precision]

    def open(self) -> Engine:
        return open_engine(self.backend, self.bundle, self.resolution, str(self.device))

    def eager(self) -> LongCatDiT:
        """The torch DiT that the engine is compared with, on the same device."""
        return dit_from_files(self.bundle.path(DIT_CONFIG), self.weights, str(self.device))

    def free_bytes(self) -> int:
        """Memory that a new allocation can have: the GPU's, or the host's."""
        if self.on_gpu:
            return torch.cuda.mem_get_info(self.device)[0]
        return available_memory_bytes()
