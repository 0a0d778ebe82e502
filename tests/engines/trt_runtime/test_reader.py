"""No byte of a plan reaches TensorRT that the manifest does not vouch for."""

import hashlib
from dataclasses import replace

import pytest
import torch

from lcexport.configs.errors import IncompatibleError, IntegrityError
from lcexport.engines.trt.reader import (
    BuiltFor,
    Here,
    PlanFile,
    VerifiedPlan,
    check_target,
    read_here,
    stream_reader,
)
from lcexport.engines.trt.runtime import TrtEngine

BUILT = BuiltFor(
    product="tensorrt",
    version="11.4.0.106",
    platform="linux-x86_64",
    compute_capabilities=("sm90",),
    gpu="NVIDIA H100",
    driver="13.0",
)
HERE = Here("tensorrt", "11.4.0.106", "linux-x86_64", "sm90", "NVIDIA H100", "13.0")
REBUILD = "lcexport build --res 480p --add"


@pytest.fixture
def plan(tmp_path):
    data = bytes(range(256)) * 10 + b"end"
    path = tmp_path / "a.plan"
    path.write_bytes(data)
    return PlanFile(path, len(data), hashlib.sha256(data).hexdigest())


@pytest.fixture
def never_deserialized(double, monkeypatch):
    def refuse(*_):
        raise AssertionError("a plan reached TensorRT")

    monkeypatch.setattr(double.Runtime, "deserialize_cuda_engine", refuse)


class TestTarget:
    def test_what_it_was_built_for(self):
        check_target(BUILT, HERE, REBUILD)

    @pytest.mark.parametrize(
        ("field", "value", "match"),
        [
            ("product", "tensorrt-rtx", "another product; got product tensorrt-rtx; wanted"),
            ("version", "11.4.1.2", "another version; got version 11.4.1.2; wanted version 11.4.0"),
            ("platform", "windows-amd64", "another platform; got platform windows-amd64"),
            (
                "compute_capability",
                "sm100",
                "another compute capability; got .* sm100; wanted .*90",
            ),
            ("gpu", "NVIDIA H200", "another GPU; got GPU NVIDIA H200; wanted GPU NVIDIA H100"),
            ("driver", "12.8", "another driver; got driver 12.8; wanted driver 13.0"),
            ("driver", None, "another driver; got driver None"),
        ],
    )
    def test_each_field(self, field, value, match):
        with pytest.raises(IncompatibleError, match=match) as caught:
            check_target(BUILT, replace(HERE, **{field: value}), REBUILD)
        assert str(caught.value).endswith(f"Rebuild it here: {REBUILD}")

    def test_all_that_differs_is_named(self):
        other = replace(HERE, version="10.16.1.11", gpu="NVIDIA A100", compute_capability="sm80")
        with pytest.raises(IncompatibleError, match="another version, compute capability, GPU"):
            check_target(BUILT, other, REBUILD)

    @pytest.mark.parametrize(
        ("built", "here"),
        [
            ({"version_compatible": True}, {"version": "11.10.0.1"}),
            ({"version_compatible": True}, {"version": "12.0.0.1"}),
            ({}, {"driver": "13.10"}),
            ({"hardware_compatibility": "same_compute_capability"}, {"gpu": "NVIDIA H200"}),
            (
                {"hardware_compatibility": "ampere_plus"},
                {"gpu": "NVIDIA B200", "compute_capability": "sm100"},
            ),
            ({"gpu": None, "driver": None}, {"gpu": "any", "driver": None}),
            (
                {"gpu": None, "compute_capabilities": ("sm89", "sm120")},
                {"compute_capability": "sm120"},
            ),
            ({"gpu": None, "compute_capabilities": ()}, {"compute_capability": "sm86"}),
        ],
    )
    def test_what_fits_all_the_same(self, built, here):
        check_target(replace(BUILT, **built), replace(HERE, **here), REBUILD)

    @pytest.mark.parametrize(
        ("built", "here"),
        [
            ({"version_compatible": True}, {"version": "11.3.9.9"}),
            ({"hardware_compatibility": "ampere_plus"}, {"compute_capability": "sm75"}),
            ({"hardware_compatibility": "same_compute_capability"}, {"compute_capability": "sm89"}),
            ({}, {"driver": "9.2"}),
        ],
    )
    def test_what_does_not(self, built, here):
        with pytest.raises(IncompatibleError, match="built elsewhere"):
            check_target(replace(BUILT, **built), replace(HERE, **here), REBUILD)

    def test_no_gpu(self, product, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(IncompatibleError, match="torch sees none"):
            read_here(product, torch.device("cuda"))

    def test_a_gpu_beyond_the_last(self, product, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(IncompatibleError, match="got cuda:2; wanted cuda:0 to cuda:1"):
            read_here(product, torch.device("cuda:2"))


class TestVerifiedPlan:
    def test_reads_are_short_at_a_chunks_end(self, plan):
        data = plan.path.read_bytes()
        with VerifiedPlan(plan, chunk_bytes=1000) as verified:
            assert verified.read(0, 10_000) == data[:1000]
            assert verified.read(990, 100) == data[990:1000]
            assert verified.read(2000, 10_000) == data[2000:]
            assert verified.read(5, 7) == data[5:12]
            assert verified.read(len(data), 1) == b""
            assert verified.read(10 * len(data), 1) == b""

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda data: data[:-1], "another size; got 2562 bytes; wanted 2563"),
            (lambda data: data + b"x", "another size"),
            (lambda data: data[:100] + b"x" + data[101:], "another SHA-256.*executable code"),
            (lambda data: b"", "another size"),
        ],
    )
    def test_another_file(self, plan, change, match):
        plan.path.write_bytes(change(plan.path.read_bytes()))
        with pytest.raises(IntegrityError, match=match):
            VerifiedPlan(plan)

    def test_no_file(self, plan):
        plan.path.unlink()
        with pytest.raises(IntegrityError, match=r"a.plan is missing"):
            VerifiedPlan(plan)

    def test_a_file_changed_after_it_was_hashed(self, plan):
        with VerifiedPlan(plan, chunk_bytes=1000) as verified:
            with plan.path.open("r+b") as file:
                file.seek(1500)
                file.write(b"evil")
            assert len(verified.read(0, 1000)) == 1000
            with pytest.raises(IntegrityError, match="changed while it was read"):
                verified.read(1000, 1)


@pytest.mark.parametrize("change", [lambda data: data[:-9], lambda data: data[:-1] + b"!"])
def test_a_modified_plan_never_reaches_tensorrt(
    product, workspace, make_plans, tmp_path, never_deserialized, change
):
    good = make_plans(1)[0]
    bad = tmp_path / "bad.plan"
    bad.write_bytes(change(good.path.read_bytes()))
    with pytest.raises(IntegrityError, match=r"bad.plan is not the plan that the manifest names"):
        TrtEngine(product, [replace(good, path=bad)], workspace)


def test_a_plan_modified_while_it_is_read(product, workspace, make_plans, tmp_path, monkeypatch):
    """What a callback raises is lost in TensorRT; it comes out all the same."""
    good = make_plans(1)[0]
    data = good.path.read_bytes()
    path = tmp_path / "changing.plan"
    path.write_bytes(data)
    hashed = VerifiedPlan._hash

    def then_modify(self):
        hashed(self)
        path.write_bytes(data[:-1] + b"!")

    monkeypatch.setattr(VerifiedPlan, "_hash", then_modify)
    with pytest.raises(IntegrityError, match="changed while it was read"):
        TrtEngine(product, [replace(good, path=path)], workspace)


@pytest.mark.parametrize("cut", [7, 100])
def test_a_plan_that_is_none(product, workspace, tmp_path, cut):
    """Vouched for by the manifest, and yet nothing that TensorRT reads."""
    data = b"FAKETRT1" + b"\x01" * cut
    path = tmp_path / "odd.plan"
    path.write_bytes(data)
    plan = PlanFile(path, len(data), hashlib.sha256(data).hexdigest())
    with pytest.raises(IncompatibleError, match=r"refused .*odd.plan.*the plan cannot be read"):
        TrtEngine(product, [plan], workspace)


def test_the_reader_seeks(product, double, plan):
    with VerifiedPlan(plan, chunk_bytes=1000) as verified:
        stream, failure = stream_reader(product, verified)
        where = double.SeekPosition
        data = plan.path.read_bytes()
        assert stream.seek(-3, where.END)
        assert stream.read(10, 0) == b"end"
        assert stream.read(10, 0) == b""
        assert stream.seek(20, where.SET)
        assert stream.seek(-10, where.CUR)
        assert stream.read(4, 0) == data[10:14]
        assert not stream.seek(-1, where.SET)
        assert not stream.seek(1, where.END)
        assert stream.read(4, 0) == data[14:18]
        assert failure() is None


def test_small_chunks_give_the_same_engine(product, workspace, make_plans, velocity, monkeypatch):
    with TrtEngine(product, make_plans(1), workspace) as engine:
        wanted = velocity(engine)
    monkeypatch.setattr(VerifiedPlan.__init__, "__defaults__", (100_000,))
    with TrtEngine(product, make_plans(1), workspace) as engine:
        assert torch.equal(velocity(engine), wanted)
