"""Written files: the right bytes at the right places, in bounded memory."""

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lcexport.checkpoint import (
    WriteReport,
    expected_tensors,
    is_island,
    open_checkpoint,
    read_header,
    read_tensor,
    reading,
    scan_tensors,
    write_native,
    write_original,
)
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import InputError, ResourceError, UsageError
from lcexport.engines.files import sha256_of

Make = Callable[..., Path]


@pytest.fixture
def fp32_folder(make_dit: Make, fp32_weights: dict) -> Path:
    return make_dit(fp32_weights, shards=2)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks so small that every tensor is cut, most of them unevenly."""
    monkeypatch.setattr(reading, "CHUNK_ELEMENTS", 1000)


def native_values(folder: Path) -> dict[str, torch.Tensor]:
    pieces = open_checkpoint(folder).native()
    return {name: read_tensor(piece) for name, piece in pieces.items()}


def check_alignment(report: WriteReport) -> None:
    infos = list(report.tensors.values())
    assert infos[0].start % 4096 == 0
    for info in infos:
        assert info.bytes % 256 or info.start % 256 == 0, info.name
        assert info.start % (2 if info.dtype == "BF16" else 4) == 0, info.name
    assert all(left.end == right.start for left, right in pairwise(infos))


def test_keep_copies_every_byte_and_reports_the_file(dit_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    report = write_native(open_checkpoint(dit_folder), path, bulk="keep")
    assert report.sha256 == sha256_of(path)
    assert report.bytes == path.stat().st_size
    assert report.count == 95
    assert report.tensors == read_header(path).tensors
    written = load_file(path)
    for name, value in native_values(dit_folder).items():
        assert torch.equal(written[name], value), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "precision": "keep", "islands": "checkpoint"}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("islands", ["checkpoint", "original"])
def test_bf16_rounds_the_bulk_and_keeps_islands_in_f32(
    fp32_folder: Path, tmp_path: Path, islands
) -> None:
    path = tmp_path / "w.safetensors"
    report = write_native(open_checkpoint(fp32_folder), path, bulk="bf16", islands=islands)
    check_alignment(report)
    written = load_file(path)
    for name, value in native_values(fp32_folder).items():
        rounded = value.to(torch.bfloat16)
        if is_island(name):
            wanted = value if islands == "checkpoint" else rounded.float()
        else:
            wanted = rounded
        assert written[name].dtype == wanted.dtype
        assert torch.equal(written[name], wanted), name


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp32_widens_everything_exactly(
    make_dit: Make, fp32_weights: dict, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = make_dit({name: value.to(dtype) for name, value in fp32_weights.items()})
    report = write_native(open_checkpoint(folder), tmp_path / "w.safetensors", bulk="fp32")
    check_alignment(report)
    written = load_file(report.path)
    assert {value.dtype for value in written.values()} == {torch.float32}
    for name, value in native_values(folder).items():
        assert torch.equal(written[name], value.float()), name


def test_tensors_stay_aligned_when_some_are_not_a_multiple_of_256_bytes(
    make_dit: Make, tmp_path: Path
) -> None:
    # no bias fills 256 bytes, and BF16 of odd lengths before F32 would misalign a naive order
    sizes = {"hidden_size": 12, "num_heads": 2, "caption_channels": 6, "adaln_tembed_dim": 3}
    sizes["depth"] = 2
    shapes = expected_tensors(DiTConfig.model_validate(sizes), "original")
    folder = make_dit({name: torch.randn(shape) for name, shape in shapes.items()}, config=sizes)
    native = write_native(open_checkpoint(folder), tmp_path / "n.safetensors", bulk="bf16")
    check_alignment(native)
    assert load_file(native.path).keys() == native_values(folder).keys()


@pytest.mark.usefixtures("small_chunks")
def test_there_and_back_is_bit_exact(make_dit: Make, weights: dict, tmp_path: Path) -> None:
    folder = make_dit(weights, shards=4)
    native = tmp_path / "native"
    native.mkdir()
    (native / "config.json").write_bytes((folder / "config.json").read_bytes())
    write_native(open_checkpoint(folder), native / "model.safetensors", bulk="keep")
    back = write_original(open_checkpoint(native), tmp_path / "o.safetensors", bulk="keep")
    written = load_file(back.path)
    assert written.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(written[name].view(torch.int16), value.view(torch.int16)), name


def test_source_digests_do_not_depend_on_sharding_or_direction(
    make_dit: Make, weights: dict, tmp_path: Path
) -> None:
    one, three = open_checkpoint(make_dit(weights)), open_checkpoint(make_dit(weights, shards=3))
    first = write_native(one, tmp_path / "a.safetensors", bulk="keep")
    second = write_original(three, tmp_path / "b.safetensors", bulk="fp32")
    scanned = scan_tensors(three.tensors.values())
    assert first.tensors_sha256 == second.tensors_sha256 == scanned.tensors_sha256
    name = "blocks.0.attn.qkv.weight"
    raw = weights[name].view(torch.uint8).numpy().tobytes()
    assert first.source_digests[name] == hashlib.sha256(raw).hexdigest()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_by_name_and_leave_no_file(
    make_dit: Make, weights: dict, tmp_path: Path, bad: float
) -> None:
    broken = weights["blocks.2.ffn.w2.weight"].clone()
    broken[-1, -1] = bad
    checkpoint = open_checkpoint(make_dit(weights | {"blocks.2.ffn.w2.weight": broken}))
    path = tmp_path / "out" / "w.safetensors"
    path.parent.mkdir()
    with pytest.raises(InputError, match=r"'blocks.2.ffn.w2.weight' holds NaN or infinity"):
        write_native(checkpoint, path, bulk="bf16")
    assert list(path.parent.iterdir()) == []
    write_native(checkpoint, path, bulk="bf16", scan=False)


def test_a_value_beyond_bf16_is_refused(make_dit: Make, fp32_weights: dict, tmp_path: Path) -> None:
    bias = torch.full((256,), torch.finfo(torch.float32).max)
    checkpoint = open_checkpoint(make_dit(fp32_weights | {"x_embedder.proj.bias": bias}))
    with pytest.raises(InputError, match=r"'x_embedder.proj.bias' does not fit bfloat16"):
        write_native(checkpoint, tmp_path / "a.safetensors", bulk="bf16")
    write_native(checkpoint, tmp_path / "b.safetensors", bulk="fp32")


@pytest.mark.parametrize(
    ("bulk", "islands"),
    [("fp32", "original"), ("keep", "original"), ("int4", "checkpoint"), ("bf16", "none")],
)
def test_contradictory_choices_are_usage_errors(
    dit_folder: Path, tmp_path: Path, bulk, islands
) -> None:
    with pytest.raises(UsageError):
        write_native(open_checkpoint(dit_folder), tmp_path / "w", bulk=bulk, islands=islands)


def test_an_existing_file_is_not_overwritten(dit_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_text("mine")
    with pytest.raises(ResourceError, match="will not overwrite"):
        write_native(open_checkpoint(dit_folder), path, bulk="keep")
    assert path.read_text() == "mine"


def test_a_file_that_shrinks_while_read_is_an_input_error(
    make_dit: Make, weights: dict, tmp_path: Path
) -> None:
    folder = make_dit(weights)
    checkpoint = open_checkpoint(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(InputError, match="became shorter while tensor"):
        write_native(checkpoint, tmp_path / "w.safetensors", bulk="keep")
    assert not (tmp_path / "w.safetensors").exists()


def test_progress_reaches_the_total_and_can_stop_the_writing(
    dit_folder: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(dit_folder)
    write_native(
        checkpoint,
        tmp_path / "a.safetensors",
        bulk="bf16",
        on_progress=lambda done, total: seen.append((done, total)),
    )
    total = sum(info.bytes for info in checkpoint.tensors.values())
    assert seen[-1] == (total, total)
    assert sorted(seen) == seen

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_native(checkpoint, tmp_path / "b.safetensors", bulk="bf16", on_progress=stop)
    assert [path.name for path in tmp_path.glob("*b.safe*")] == []


PEAK = """
import resource, sys
from lcexport.checkpoint import open_checkpoint, write_native
checkpoint = open_checkpoint(sys.argv[1])
write_native(checkpoint, sys.argv[2], bulk="bf16")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak_mib(folder: Path, path: Path) -> int:
    command = [sys.executable, "-c", PEAK, str(folder), str(path)]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    path.unlink()
    return peak


def test_memory_does_not_grow_with_the_checkpoint(
    make_dit: Make, weights: dict, tmp_path: Path
) -> None:
    """A 600 MB checkpoint of zeros (a sparse file) against the golden one of 8 MB."""
    sizes = {"hidden_size": 1536, "depth": 2, "num_heads": 12, "caption_channels": 40_000}
    shapes = expected_tensors(DiTConfig.model_validate(sizes), "original")
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(sizes))
    entries, position = {}, 0
    for name, shape in shapes.items():
        end = position + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    assert position > 550e6
    text = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    small = peak_mib(make_dit(weights), tmp_path / "small.safetensors")
    assert peak_mib(folder, tmp_path / "w.safetensors") - small < 150
