"""Weights are the file itself, whatever its size."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcexport.configs.errors import IntegrityError
from lcexport.engines.host import available_memory_bytes
from lcexport.engines.weights import map_weights, will_need


def test_tensors_are_those_that_were_saved(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    saved = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randint(-128, 128, (2, 2), dtype=torch.int8),
        "d": torch.randn(()).half(),
    }
    save_file(saved, path, metadata={"format": "pt"})
    found = map_weights(path)
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_a_file_larger_than_memory_is_mapped(tmp_path: Path):
    path, count = tmp_path / "weights.safetensors", available_memory_bytes()
    entry = {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}
    header = json.dumps({"w": entry}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * count)  # a hole: it takes no disk
    weight = map_weights(path)["w"]
    assert weight.numel() == count
    weight[-1] = 1  # a copy of that page
    assert map_weights(path)["w"][-1] == 0


@pytest.mark.parametrize("content", [b"", b"short", b"\2\0\0\0\0\0\0\0[]", b"\2\0\0\0\0\0\0\0{]"])
def test_what_is_no_file_of_weights_is_said(tmp_path: Path, content: bytes):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="not a file of weights"):
        map_weights(path)


def test_a_cut_file_is_said(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.randn(100)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(IntegrityError, match="not a file of weights"):
        map_weights(path)


def test_reading_ahead_is_advice_that_changes_nothing(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    saved = {"a": torch.randn(3, 5), "b": torch.randn(700, 999)}
    save_file(saved, path)
    found = map_weights(path)
    will_need([*found.values(), torch.randn(2000), torch.empty(0)])
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
