"""Every TensorRT name that `engines/trt` uses exists in every release, with that signature."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bindings_shim import make_shim, unpack_bindings
from surface import RELEASES, surface
from uses import Use, any_names, functions_of, problem, uses_of

SOURCES = sorted((Path(__file__).parents[2] / "engines" / "trt").glob("*.py"))
NEWEST = surface("11.4.0.106")
RTX = surface("rtx-1.7.1.116")
# Behind `product.is_rtx` in the code, which no reader of names can see.
RTX_ONLY = {
    ("", "ComputeCapability"),
    ("BuilderFlag", "REQUIRE_USER_ALLOCATION"),
    ("ComputeCapability", "__members__"),
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
    ("IExecutionContext", "is_stream_capturable"),
}
FUNCTIONS = {k: v for path in SOURCES for k, v in functions_of(path.read_text()).items()}
KINDS = {"PRODUCTS", "NORMS", "MOVES"}  # sets of them in `network`
OTHER = {"digest", "request", "value"}  # what is `Any` and not TensorRT's
BINDINGS = ("11.4.0.106", "10.16.1.11", "10.14.1.48.post1")

# Run where the real module is: reads [module, [[owner, name], ...]], prints what is missing.
PROBE = """
import importlib, json, sys
name, wanted = json.load(sys.stdin)
trt = importlib.import_module(name)
missing = []
for owner, member in wanted:
    thing = trt
    for part in [*owner.split("."), member] if owner else [member]:
        thing = getattr(thing, part, None)
    if thing is None:
        missing.append(f"{owner}.{member}")
print(json.dumps([trt.__version__, missing]))
"""


def all_uses() -> list[tuple[Path, Use]]:
    return [(path, use) for path in SOURCES for use in uses_of(path.read_text(), RTX, FUNCTIONS)]


@pytest.mark.parametrize("release", RELEASES)
def test_every_use_is_real(release):
    wrong = [
        f"{path.name} {use}: {reason}"
        for path, use in all_uses()
        if (reason := problem(use, surface(release)))
        and not ((use.owner, use.name) in RTX_ONLY and release != RTX.release)
    ]
    assert wrong == []


def layer_kinds() -> set[str]:
    """What `network` compares a layer's kind with: words, and so no names to be looked up."""
    tree = ast.parse((SOURCES[0].parent / "network.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith(".kind"):
            found |= words_in(node.comparators[0])
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in KINDS:
            found |= words_in(node.value)
    return found


def words_in(node: ast.expr) -> set[str]:
    constants = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    return {value for value in constants if isinstance(value, str)}


@pytest.mark.parametrize("release", RELEASES)
def test_every_kind_of_layer_is_real(release):
    kinds = layer_kinds()
    assert kinds >= {"ATTENTION_INPUT", "CAST", "EINSUM", "NORMALIZATION", "UNSQUEEZE", "UNARY"}
    assert kinds - set(surface(release).enums["LayerType"]) == set()


def test_enough_is_seen():
    """A collector that sees nothing finds no fault."""
    seen = {(use.owner, use.name) for _, use in all_uses()}
    assert seen > {
        ("", "Runtime"),
        ("Builder", "build_serialized_network_to_stream"),
        ("BuilderFlag", "TF32"),
        ("ExecutionContextAllocationStrategy", "USER_MANAGED"),
        ("IBuilderConfig", "clear_flag"),
        ("ICudaEngine", "create_execution_context"),
        ("ICudaEngine", "weight_streaming_budget_v2"),
        ("IExecutionContext", "execute_async_v3"),
        ("IExecutionContext", "set_device_memory"),
        ("IStreamReaderV2", "__init__"),
        ("IStreamReaderV2", "seek"),
        ("OnnxParser", "get_error"),
        ("ParserError", "node_name"),
        ("Refitter", "set_named_weights"),
        ("Runtime", "deserialize_cuda_engine"),
        ("Weights", "__init__"),
    }
    assert len(seen) > 60


def test_rtx_only_names_are_rtx_only():
    for owner, name in RTX_ONLY:
        use = Use(owner, name, 0)
        assert problem(use, RTX) is None
        assert problem(use, NEWEST) is not None


def test_nothing_of_tensorrts_is_any():
    """What is annotated Any escapes the type checker and this test alike."""
    names = {name.lstrip("_") for path in SOURCES for name in any_names(path.read_text())}
    assert names - OTHER == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("trt.BuilderFlags", "BuilderFlags"),
        ("product.trt.BuilderFlag.BF16", "BuilderFlag.BF16"),
        ("self._trt.DataType.FLOAT64", "DataType.FLOAT64"),
        ("runtime = trt.Runtime(log)\nruntime.load_engine(b'')", "Runtime.load_engine"),
        ("trt.Runtime()", "Runtime.__init__"),
        ("hasattr(thing, 'FP7'); trt.DataType.FP7", "DataType.FP7"),
        ("for engine, size in pairs: engine.budget = 1", "ICudaEngine.budget"),
        ("sizes = [engine.size for engine in engines]", "ICudaEngine.size"),
        ("trt.Runtime(log, 3)", "Runtime.__init__"),
        (
            "def f(engine: TensorRT.ICudaEngine): engine.device_memory_size",
            "ICudaEngine.device_memory_size",
        ),
        ("def f(e: 'TensorRT.ICudaEngine | None'): e.num_layers = 3", "ICudaEngine.num_layers"),
        (
            "def f(c: TensorRT.IExecutionContext): c.execute_async_v3(handle=1)",
            "execute_async_v3",
        ),
        (
            "def f(e: TensorRT.ICudaEngine): e.create_execution_context().execute()",
            "Context.execute",
        ),
        (
            "class S:\n  engine: TensorRT.ICudaEngine\ndef f(s): s.engine.get_binding_name(0)",
            "get_binding_name",
        ),
        (
            "class S:\n  @property\n  def e(s) -> TensorRT.ICudaEngine: ...\ndef f(s): s.e.foo()",
            "ICudaEngine.foo",
        ),
        (
            "def made(l) -> TensorRT.Builder: ...\ndef f(l): made(l).build_it()",
            "Builder.build_it",
        ),
        (
            "def f(c: TensorRT.IBuilderConfig):\n  if (x := c.set_flags(1)): ...",
            "IBuilderConfig.set_flags",
        ),
        ("def f(raw: TensorRT.ILayer):\n  raw.precision", "ILayer.precision"),
        ("def f(raw):\n  seen_as(trt.IAttentionInputLayer, raw).attn", "Layer.attn"),
        ("class R(trt.IStreamReaderV2):\n  def fetch(self): ...", "IStreamReaderV2.fetch"),
        ("[e.descr() for e in [trt.OnnxParser(n, l).get_error(0)]]; trt.Foo", "Foo"),
        ("with trt.OnnxParser(n, l).parse_it(b''): ...", "OnnxParser.parse_it"),
        ("b = trt.Builder(l)\nif hasattr(b, 'build_it'):\n  b.build_it()", "Builder.build_it"),
    ],
)
def test_a_made_up_name_is_caught(source, found):
    wrong = [str(use) for use in uses_of(source, NEWEST) if problem(use, NEWEST)]
    assert any(line.endswith(found) for line in wrong), wrong


@pytest.mark.parametrize(
    "source",
    [
        "trt.Runtime(log).deserialize_cuda_engine(reader)",
        "trt.BuilderFlag.TF32.name",
        "def f(engine): engine.anything",
        "def f(engine: Engine): engine.run()",
        "trt.Weights(trt.DataType.FLOAT, 0, 1)\ntrt.Weights(type=trt.float32)",
        "trt.ILogger.__init__(self)",
    ],
)
def test_what_is_real_passes(source):
    assert [str(use) for use in uses_of(source, NEWEST) if problem(use, NEWEST)] == []


def test_a_surface_that_lacks_a_name_is_noticed():
    """Names that TensorRT 11 dropped are wrong there and right in 10."""
    (use,) = {use for use in uses_of("trt.BuilderFlag.FP16", NEWEST) if use.owner}
    assert problem(use, surface("10.16.1.11")) is None
    assert problem(use, NEWEST) is not None


def probe(module: str, rtx: bool, **environment: str) -> tuple[str, list[str]]:
    uses = {(use.owner, use.name) for _, use in all_uses()}
    wanted = sorted(uses if rtx else uses - RTX_ONLY)
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps([module, wanted]),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_real_rtx_module():
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed")
    version, missing = probe("tensorrt_rtx", rtx=True)
    assert version
    assert missing == []


@pytest.mark.slow
@pytest.mark.parametrize("version", BINDINGS)
def test_the_real_bindings(version, tmp_path):
    """The real extension, imported over stand-ins for its native libraries."""
    unpack_bindings(tmp_path, version)
    make_shim(tmp_path, version.partition(".")[0])
    folder = str(tmp_path)
    found, missing = probe(
        "tensorrt_bindings", rtx=False, LD_LIBRARY_PATH=folder, PYTHONPATH=folder
    )
    assert (found, missing) == (version, [])
