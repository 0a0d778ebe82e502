"""Int8 checkpoints: what is written is what numpy quantises, and what is read is its values."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lcexport.checkpoint import (
    check_same,
    check_tensors,
    convert,
    expected_tensors,
    is_island,
    open_checkpoint,
    read_tensor,
    reading,
    scan_tensors,
    validate,
    write_native,
)
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import InputError, UsageError, VerificationError
from lcexport.dit import load_dit

Make = Callable[..., Path]
SHARD = "quantized_model-00001-of-00001.safetensors"
QKV, LAST = "blocks.1.attn.qkv", "final_layer.linear"


def is_linear(name: str, value: torch.Tensor) -> bool:
    """The Linears of the original code are its matrices; the last one is left out."""
    return value.ndim == 2 and not name.startswith(LAST)


def numpy_int8(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales, row by row, as LongCat's `quantization.py` defines them."""
    rows = weight.float().numpy()
    scale = np.maximum(np.abs(rows).max(axis=1), np.float32(1e-8)) / np.float32(127)
    integers = np.clip(np.rint(rows / scale[:, None]), -128, 127)
    return integers.astype(np.int8), scale


def quantised(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an int8 checkpoint made of these."""
    stems = {n.removesuffix(".weight") for n, value in weights.items() if is_linear(n, value)}
    made = {}
    for name, value in weights.items():
        stem, _, kind = name.rpartition(".")
        if stem in stems and kind == "weight":
            integers, scale = numpy_int8(value)
            made[f"{stem}.weight_int8"] = torch.from_numpy(integers)
            made[f"{stem}.weight_scale"] = torch.from_numpy(scale)
        else:
            made[name] = value.bfloat16() if stem in stems else value
    return made


def values_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float weights an int8 checkpoint stands for, float32."""
    values = {}
    for name, value in tensors.items():
        if name.endswith(".weight_int8"):
            scale = tensors[name.replace("_int8", "_scale")].numpy()
            product = value.numpy().astype(np.float32) * scale[:, None]
            values[name.removesuffix("_int8")] = torch.from_numpy(product)
        elif not name.endswith(".weight_scale"):
            values[name] = value.float()
    return values


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.fixture
def int8_weights(fp32_weights: dict) -> dict[str, torch.Tensor]:
    return quantised(fp32_weights)


@pytest.fixture
def int8_folder(make_dit: Make, int8_weights: dict) -> Path:
    return make_dit(int8_weights, shards=3)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows, and where a row is longer, of one."""
    monkeypatch.setattr(reading, "CHUNK_ELEMENTS", 600)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_what_numpy_quantises(
    make_dit: Make, fp32_weights: dict, tmp_path: Path, dtype: torch.dtype
) -> None:
    weights = {name: value.to(dtype) for name, value in fp32_weights.items()}
    report = convert(make_dit(weights, shards=2), tmp_path / "out", to="int8", check=True)
    assert (report.layout, report.naming) == ("dit", "original")
    assert report.weights.path == tmp_path / "out" / SHARD
    written = load_file(report.weights.path)
    assert_same(written, quantised(weights))
    linears = 5 - 1 + 3 * 9 + 1  # embedders without the convolution, blocks, the last adaLN
    assert sum(value.dtype == torch.int8 for value in written.values()) == linears
    assert report.checked == len(load_dit(tmp_path / "out").state_dict()) + linears + 3 * (2 + 1)


def test_what_else_is_in_the_folder(make_dit: Make, fp32_weights: dict, tmp_path: Path) -> None:
    convert(make_dit(fp32_weights), tmp_path / "out", to="int8")
    index = json.loads((tmp_path / "out/quantized_model.safetensors.index.json").read_text())
    written = load_file(tmp_path / "out" / SHARD)
    assert index["weight_map"] == dict.fromkeys(written, SHARD)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in written.values())
    kind = json.loads((tmp_path / "out/quantization_config.json").read_text())
    assert kind["quantization_method"] == "int8_per_channel_symmetric"
    assert kind["skip_patterns"] == [LAST]
    assert (tmp_path / "out/config.json").is_file()


def test_a_weight_moves_by_at_most_half_its_rows_scale(
    make_dit: Make, fp32_weights: dict, tmp_path: Path
) -> None:
    convert(make_dit(fp32_weights), tmp_path / "out", to="int8")
    written = load_file(tmp_path / "out" / SHARD)
    checked = 0
    for name in (name for name in written if name.endswith(".weight_int8")):
        weight = fp32_weights[name.removesuffix("_int8")].double()
        scale = written[name.replace("_int8", "_scale")].double()[:, None]
        error = (weight - written[name].double() * scale).abs()
        assert (error <= scale / 2 * (1 + 1e-5)).all(), name  # quotient and scale are float32
        checked += error.numel()
    assert checked > 1e6


def test_a_row_of_zeros_stays_zero(make_dit: Make, fp32_weights: dict, tmp_path: Path) -> None:
    weight = fp32_weights[f"{QKV}.weight"].clone()
    weight[5] = 0
    folder = make_dit(fp32_weights | {f"{QKV}.weight": weight})
    convert(folder, tmp_path / "out", to="int8", check=True)
    written = load_file(tmp_path / "out" / SHARD)
    assert not written[f"{QKV}.weight_int8"][5].any()
    assert written[f"{QKV}.weight_scale"][5] == np.float32(1e-8) / np.float32(127)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dit_computes_with_integers_times_scales(
    make_dit: Make, int8_folder: Path, int8_weights: dict, dtype: torch.dtype
) -> None:
    wanted = load_dit(make_dit(values_of(int8_weights)), dtype).state_dict()
    assert_same(load_dit(int8_folder, dtype).state_dict(), wanted)
    assert wanted["blocks.0.ffn.w1.weight"].dtype == dtype


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_conversion_to_float_writes_the_same_values(
    make_dit: Make, int8_folder: Path, int8_weights: dict, tmp_path: Path, dtype
) -> None:
    convert(int8_folder, tmp_path / "a", to="original", dtype=dtype, check=True)
    convert(make_dit(values_of(int8_weights)), tmp_path / "b", to="original", dtype=dtype)
    name = "diffusion_pytorch_model.safetensors"
    assert_same(load_file(tmp_path / "a" / name), load_file(tmp_path / "b" / name))


@pytest.mark.usefixtures("small_chunks")
def test_through_native_names_and_back_no_byte_changes(
    int8_folder: Path, int8_weights: dict, tmp_path: Path
) -> None:
    convert(int8_folder, tmp_path / "native", to="native", check=True)
    native = open_checkpoint(tmp_path / "native")
    assert native.naming == "native"
    assert native.tensors["blocks.0.self_attn.to_k.weight_int8"].shape == (256, 256)
    assert native.tensors["blocks.0.self_attn.to_k.weight_scale"].shape == (256,)
    convert(tmp_path / "native", tmp_path / "back", to="int8", check=True)
    assert_same(load_file(tmp_path / "back" / SHARD), int8_weights)


def test_through_float32_and_back_integers_stay_and_scales_move_by_one_rounding(
    int8_folder: Path, int8_weights: dict, tmp_path: Path
) -> None:
    """127 * scale / 127 is scale again, but where both roundings go the same way."""
    convert(int8_folder, tmp_path / "float", to="original", dtype="fp32")
    convert(tmp_path / "float", tmp_path / "back", to="int8")
    back, same, rows = load_file(tmp_path / "back" / SHARD), 0, 0
    assert back.keys() == int8_weights.keys()
    for name, value in int8_weights.items():
        if not name.endswith(".weight_scale"):
            assert torch.equal(back[name], value), name
            continue
        scale = value.numpy()
        again = (scale * np.float32(127)) / np.float32(127)
        assert np.array_equal(back[name].numpy(), again), name
        assert (np.abs(again - scale) <= np.spacing(scale)).all()
        same, rows = same + int((again == scale).sum()), rows + len(scale)
    assert 0.95 * rows < same <= rows


def test_the_report_says_int8_and_is_ok(int8_folder: Path, fp32_weights: dict) -> None:
    report = validate(int8_folder)
    assert report.problems == []
    assert report.ok
    assert report.tensors_present == report.tensors_expected == 77 + 32
    assert report.parameters == sum(value.numel() for value in fp32_weights.values())
    assert set(report.dtypes) == {"BF16", "F32", "I8"}
    assert (
        report.tensors_sha256
        == scan_tensors(open_checkpoint(int8_folder).tensors.values()).tensors_sha256
    )


# --- the weights file of a bundle: int8 in the bulk, float islands


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bulk", ["fp32", "bf16"])
@pytest.mark.parametrize("source", ["float", "int8"])
def test_a_bundles_weights_are_int8_in_the_bulk_alone(
    make_dit: Make, fp32_weights: dict, int8_weights: dict, tmp_path: Path, bulk, source
) -> None:
    folder = make_dit(fp32_weights if source == "float" else int8_weights, shards=2)
    checkpoint = open_checkpoint(folder)
    report = write_native(checkpoint, tmp_path / "w.safetensors", bulk=bulk, weights="int8")
    assert report.tensors_sha256 == scan_tensors(checkpoint.tensors.values()).tensors_sha256
    written = load_file(report.path)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[bulk]
    for name, value in load_dit(folder).state_dict().items():
        quantisable = value.ndim == 2 and not is_island(name)
        if not quantisable:
            assert torch.equal(written[name], value.to(torch.float32 if is_island(name) else dtype))
    whole, parts = int8_weights[f"{QKV}.weight_int8"], ("to_q", "to_k", "to_v")
    found = [written[f"blocks.1.self_attn.{part}.weight_int8"] for part in parts]
    assert torch.equal(torch.cat(found), whole)
    found = [written[f"blocks.1.self_attn.{part}.weight_scale"] for part in parts]
    assert torch.equal(torch.cat(found), int8_weights[f"{QKV}.weight_scale"])
    assert sum(value.dtype == torch.int8 for value in written.values()) == 2 + 3 * 11
    for info in report.tensors.values():
        assert info.bytes % 256 or info.start % 256 == 0, info.name


def test_shapes_of_odd_sizes_are_written_whole(make_dit: Make, tmp_path: Path) -> None:
    sizes = {"hidden_size": 12, "num_heads": 2, "caption_channels": 7, "adaln_tembed_dim": 3}
    sizes["depth"] = 2
    shapes = expected_tensors(DiTConfig.model_validate(sizes), "original")
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    convert(make_dit(weights, config=sizes), tmp_path / "out", to="int8", check=True)
    assert_same(load_file(tmp_path / "out" / SHARD), quantised(weights))


# --- what is refused


def without(name: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.pop(name)


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def quantised_last(tensors: dict) -> None:
    integers, scale = numpy_int8(tensors.pop(f"{LAST}.weight"))
    tensors[f"{LAST}.weight_int8"] = torch.from_numpy(integers)
    tensors[f"{LAST}.weight_scale"] = torch.from_numpy(scale)


BROKEN = {
    "no scale": (without(f"{QKV}.weight_scale"), rf"missing: {QKV}\.weight_scale"),
    "no integers": (without(f"{QKV}.weight_int8"), rf"missing: {QKV}\.weight_int8"),
    "one scale for all": (
        replaced(f"{QKV}.weight_scale", lambda scale: scale[:1].clone()),
        rf"another shape: {QKV}\.weight_scale .*got \[1\], wanted \[768\]",
    ),
    "scales of a column": (
        replaced(f"{QKV}.weight_scale", lambda scale: scale[:, None].clone()),
        rf"another shape: {QKV}\.weight_scale .*got \[768, 1\]",
    ),
    "float16 scales": (
        replaced(f"{QKV}.weight_scale", torch.Tensor.half),
        rf"another dtype: {QKV}\.weight_scale \(F16, .*wanted F32\)",
    ),
    "unsigned integers": (
        replaced(f"{QKV}.weight_int8", lambda q: q.view(torch.uint8)),
        rf"another dtype: {QKV}\.weight_int8 \(U8, .*wanted I8\)",
    ),
    "transposed": (
        replaced("blocks.0.ffn.w2.weight_int8", lambda q: q.T.contiguous()),
        r"another shape: blocks\.0\.ffn\.w2\.weight_int8",
    ),
    "integers as a weight": (
        lambda t: t.update({"x_embedder.proj.bias": t["x_embedder.proj.bias"].to(torch.int8)}),
        r"unsupported dtype: x_embedder\.proj\.bias \(I8",
    ),
    "both kinds": (
        lambda t: t.update({f"{QKV}.weight": t[f"{QKV}.weight_int8"].float()}),
        rf"not LongCat-Video's: {QKV}\.weight \(",
    ),
    "the last Linear": (quantised_last, rf"missing: {LAST}\.weight"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_header_is_refused_by_name_before_any_weight_is_read(
    make_dit: Make, int8_weights: dict, tmp_path: Path, kind: str
) -> None:
    tensors = dict(int8_weights)
    change, message = BROKEN[kind]
    change(tensors)
    folder = make_dit(tensors)
    with pytest.raises(InputError, match=message):
        check_tensors(open_checkpoint(folder))
    with pytest.raises(InputError, match=message):
        load_dit(folder)
    with pytest.raises(InputError, match=message):
        convert(folder, tmp_path / "out", to="native")
    report = validate(folder)
    assert not report.ok
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1e-3, 3e38])
@pytest.mark.parametrize(("to", "dtype"), [("native", "keep"), ("original", "fp32")])
def test_a_scale_that_is_none_is_refused_by_name_and_row(
    make_dit: Make, int8_weights: dict, tmp_path: Path, bad: float, to, dtype
) -> None:
    scale = int8_weights[f"{QKV}.weight_scale"].clone()
    scale[300] = bad
    folder = make_dit(int8_weights | {f"{QKV}.weight_scale": scale})
    message = rf"'{QKV}\.weight_scale' is no scale in row 300"
    with pytest.raises(InputError, match=message):
        convert(folder, tmp_path / "out", to=to, dtype=dtype)
    assert not list(tmp_path.glob("*out*"))
    with pytest.raises(InputError, match=rf"'{QKV}\.weight_scale' is no scale in row 44"):
        load_dit(folder)  # of the keys, which are rows 256 to 511
    assert any("is no scale in row 300" in problem for problem in validate(folder).problems)


def test_nan_is_refused_and_not_quantised(
    make_dit: Make, fp32_weights: dict, tmp_path: Path
) -> None:
    weight = fp32_weights["blocks.2.ffn.w2.weight"].clone()
    weight[-1, -1] = math.nan
    folder = make_dit(fp32_weights | {"blocks.2.ffn.w2.weight": weight})
    with pytest.raises(InputError, match=r"'blocks.2.ffn.w2.weight' holds NaN or infinity"):
        convert(folder, tmp_path / "out", to="int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [f"{QKV}.weight_int8", f"{QKV}.weight_scale", f"{QKV}.bias"])
def test_check_names_the_tensor_that_differs(
    make_dit: Make, fp32_weights: dict, tmp_path: Path, name: str
) -> None:
    source = open_checkpoint(make_dit(fp32_weights))
    convert(source.folder, tmp_path / "out", to="int8")
    assert check_same(source, open_checkpoint(tmp_path / "out"), bulk="int8") > 100
    tensors = load_file(tmp_path / "out" / SHARD)
    tensors[name][600] += 1
    save_file(tensors, tmp_path / "out" / SHARD)
    kind = name.rpartition(".")[2]
    with pytest.raises(VerificationError, match=rf"'blocks\.1\.self_attn\.to_v\.{kind}'"):
        check_same(source, open_checkpoint(tmp_path / "out"), bulk="int8")


def test_a_scale_is_part_of_the_sources_digest(
    make_dit: Make, int8_weights: dict, tmp_path: Path
) -> None:
    scale = int8_weights[f"{QKV}.weight_scale"].clone()
    scale[0] *= 2
    digests = set()
    for index, changed in enumerate((int8_weights[f"{QKV}.weight_scale"], scale)):
        checkpoint = open_checkpoint(make_dit(int8_weights | {f"{QKV}.weight_scale": changed}))
        report = write_native(checkpoint, tmp_path / f"{index}.safetensors", bulk="fp32")
        scanned = scan_tensors(checkpoint.tensors.values())
        assert report.tensors_sha256 == scanned.tensors_sha256
        digests.add(report.tensors_sha256)
    assert len(digests) == 2


@pytest.mark.parametrize(
    "choice", [{"dtype": "bf16"}, {"dtype": "fp32"}, {"islands": "original"}, {"dtype": "int8"}]
)
def test_int8_has_no_choices(dit_folder: Path, tmp_path: Path, choice: dict) -> None:
    with pytest.raises(UsageError):
        convert(dit_folder, tmp_path / "out", to="int8", **choice)


@pytest.mark.parametrize(
    ("bulk", "weights"), [("keep", "int8"), ("int8", "int8"), ("bf16", "int4")]
)
def test_int8_weights_need_a_bulk(dit_folder: Path, tmp_path: Path, bulk, weights) -> None:
    with pytest.raises(UsageError):
        write_native(open_checkpoint(dit_folder), tmp_path / "w", bulk=bulk, weights=weights)


def test_a_piece_is_read_as_its_values(int8_folder: Path, int8_weights: dict) -> None:
    piece = open_checkpoint(int8_folder).native()["blocks.1.self_attn.to_k.weight"]
    rows = values_of(int8_weights)[f"{QKV}.weight"][256:512]
    assert torch.equal(read_tensor(piece), rows)
