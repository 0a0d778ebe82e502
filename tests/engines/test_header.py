"""The header parser accepts sound files and answers everything else with an InputError."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lcexport.checkpoint import Header, read_header
from lcexport.configs.errors import InputError
from lcexport.engines.header import MAX_HEADER_BYTES


def file_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list, begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read(tmp_path: Path, content: bytes) -> Header:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    return read_header(path)


def test_a_sound_file_gives_absolute_offsets_in_file_order(tmp_path: Path) -> None:
    content = file_bytes(
        {"__metadata__": {"a": "b"}, "y": entry([2], 8, 16), "x": entry([2, 1], 0, 8)}, bytes(16)
    )
    header = read(tmp_path, content)
    assert list(header.tensors) == ["x", "y"]
    assert header.metadata == {"a": "b"}
    assert header.tensors["x"].start == header.data_start == len(content) - 16
    assert header.tensors["y"].end == header.file_bytes
    assert header.tensors["x"].shape == (2, 1)
    assert (header.tensors["x"].count, header.tensors["x"].bytes) == (2, 8)


def test_the_golden_file_reads_as_the_library_reads_it(dit_folder: Path) -> None:
    path = dit_folder / "diffusion_pytorch_model.safetensors"
    assert {name: info.shape for name, info in read_header(path).tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"1234567", "truncated"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "length is out of range"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), "length is out of range"),
        ((1000).to_bytes(8, "little") + b"{}", "truncated within its header"),
        (file_bytes(b"not json"), "not usable JSON"),
        (file_bytes(b"[" * 100_000), "nested too deeply"),
        (file_bytes(b"\xff\xfe{}"), "not usable JSON"),
        (file_bytes(b"[1]"), "not a JSON object"),
        (file_bytes(b'{"x":{},"x":{}}'), "'x' is there twice"),
        (file_bytes(b'{"x":' + b"[" + b"{}," * 200_000 + b"{}]}"), "objects"),
        (file_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
        (file_bytes({"x": [1]}), "'x'.*exactly dtype"),
        (file_bytes({"x": entry([1], 0, 4) | {"more": 1}}, bytes(4)), "exactly dtype"),
        (file_bytes({"x": entry([1], 0, 4, "F33")}, bytes(4)), "'x'.*unknown dtype.*F33"),
        (file_bytes({"x": entry([-1], 0, 4)}, bytes(4)), "not a list of sizes"),
        (file_bytes({"x": entry([True], 0, 4)}, bytes(4)), "not a list of sizes"),
        (file_bytes({"x": entry([1.0], 0, 4)}, bytes(4)), "not a list of sizes"),
        (file_bytes({"x": entry([2**70], 0, 4)}, bytes(4)), "not a list of sizes"),
        (file_bytes({"x": entry([1], 4, 0)}, bytes(4)), "data_offsets"),
        (file_bytes({"x": entry([3], 0, 8)}, bytes(8)), "not as long as dtype and shape say"),
        (file_bytes({"x": entry([1], 0, 4), "y": entry([1], 2, 6)}, bytes(6)), "'y' overlaps"),
        (file_bytes({"x": entry([1], 0, 4), "y": entry([1], 8, 12)}, bytes(12)), "'y' follows"),
        (file_bytes({"x": entry([2], 0, 8)}, bytes(7)), "truncated.*'x'"),
        (file_bytes({"x": entry([2], 0, 8)}, bytes(9)), "goes on after its last tensor"),
        (file_bytes({"x": entry([2**40, 2**20], 0, 2**62)}, bytes(8)), "truncated"),
    ],
)
def test_a_bad_header_is_refused_with_its_fault(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, content)
    assert "w.safetensors" in str(caught.value)


def test_a_missing_file_and_a_folder_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is missing"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        read_header(tmp_path)


def check_only_header_or_input_error(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        header = read_header(path)
    except InputError:
        return
    position = header.data_start
    for tensor in header.tensors.values():
        assert tensor.start == position
        position = tensor.end
    assert position == len(content)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["F32", "BF16", "F16"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "X"]) | values,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | values,
        "data_offsets": st.lists(st.integers(-1, 30), min_size=2, max_size=2) | values,
    }
)
quick = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(st.dictionaries(st.text(max_size=3), entries | values, max_size=4), st.binary(max_size=40))
def test_a_made_up_header_gives_a_header_or_an_input_error(
    tmp_path: Path, header: dict, data: bytes
) -> None:
    check_only_header_or_input_error(tmp_path / "f.safetensors", file_bytes(header, data))


@quick
@given(st.integers(0, 2**32))
def test_a_damaged_file_gives_a_header_or_an_input_error(tmp_path: Path, seed: int) -> None:
    damage = random.Random(seed)
    content = bytearray(
        file_bytes({"x": entry([2], 0, 8), "y": entry([2, 2], 8, 16, "BF16")}, bytes(16))
    )
    for _ in range(damage.randint(1, 4)):
        content[damage.randrange(len(content))] = damage.randrange(256)
    kept = len(content) if damage.random() < 0.7 else damage.randrange(len(content))
    check_only_header_or_input_error(tmp_path / "f.safetensors", bytes(content[:kept]))
