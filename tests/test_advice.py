"""The commands that errors give are ones that lcexport takes, and they build what was lacking."""

from pathlib import Path

import pytest

from lcexport.builder import BuildOptions
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import UsageError
from lcexport.configs.presets import preset_from
from lcexport.configs.tasks import TASKS, build_words
from lcexport.engines.bundle import Bundle
from lcexport.engines.manifest import DIT_CONFIG, GraphRecord, read_manifest
from lcexport.qualify import run

RES, OTHER = "64x96x33", "96x64x33"
BSA = {"sparsity": 0.5, "cdf_threshold": None, "chunk_3d_shape_q": [4, 4, 4]}
BSA |= {"chunk_3d_shape_k": [4, 4, 4]}
ASKED = [
    {},
    {"precision": "bf16", "islands": "original", "weights_dtype": "int8", "batch": 2},
    {"cond_frames": 5},
    {"refine_size": (64, 128), "refine_cond_frames": 5},
    {"refine_size": (48, 80), "dense": True, "only": "compile"},
    {"backends": ("eager", "onnxruntime"), "only": "compile", "device": "cuda"},
    {"backends": ("tensorrt-rtx",), "precision": "bf16", "weights": "shared"},
]


def config_of(bundle: Path, sparse: bool) -> DiTConfig:
    config = DiTConfig.from_json(bundle / DIT_CONFIG)
    if not sparse:
        return config
    return DiTConfig.model_validate({**config.model_dump(), "bsa_params": BSA})


@pytest.fixture
def bundle_of(demo_bundle):
    """`bundle_of(options, jobs)`: what a build of these graphs would have left, but for files."""

    def make(options: BuildOptions, jobs) -> Bundle:
        manifest = read_manifest(demo_bundle)
        some = next(iter(manifest.graphs.values()))
        update = {"batch": options.batch}
        graphs: dict[str, GraphRecord] = {
            job.name: some.model_copy(update={**update, "job": job}) for job in jobs
        }
        update = {name: getattr(options, name) for name in ("precision", "islands")}
        update |= {"weights_dtype": options.weights_dtype, "effective": options.effective()}
        return Bundle(demo_bundle, manifest.model_copy(update={**update, "graphs": graphs}))

    return make


def options_of(asked: dict, **more: object) -> BuildOptions:
    given = {"model": Path("ck"), "output": Path("b"), "presets": (preset_from(RES),)}
    return BuildOptions.model_validate({**given, **asked, **more})


def command_in(error: UsageError) -> str:
    advice = str(error.do)
    return advice[advice.index("lcexport build") :]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense model", "sparse model"])
@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_a_graph_that_is_lacking_is_added_as_the_others_were_built(
    bundle_of, demo_bundle, taken, asked, sparse
):
    config = config_of(demo_bundle, sparse)
    for task in TASKS:
        options = options_of(asked, tasks=("t2v", task) if task != "t2v" else ("t2v", "vc"))
        jobs = options.jobs(config)
        lacking = [job for job in jobs if job.task == task]
        bundle = bundle_of(options, [job for job in jobs if job.task != task])
        for job in lacking:
            with pytest.raises(UsageError) as caught:
                bundle.graph(job.name)
            found = taken(command_in(caught.value))
            assert found.add
            assert found.output == demo_bundle
            assert found.jobs(config) == tuple(lacking)
            for field in ("precision", "islands", "weights_dtype", "batch", "only", "weights"):
                assert getattr(found, field) == getattr(options, field), field
            assert (found.backends, found.device) == (options.backends, options.device)


@pytest.mark.parametrize("asked", ASKED[:5], ids=str)
def test_a_graph_that_is_there_is_built_again(bundle_of, demo_bundle, taken, asked):
    config = config_of(demo_bundle, sparse=True)
    asked = {"refine_size": (64, 128), **asked}
    options = options_of(asked, tasks=TASKS)
    jobs = options.jobs(config)
    manifest = bundle_of(options, jobs).manifest
    for job in jobs:
        words = build_words(RES, job.task, manifest.options_for(RES, job.task))
        found = taken(" ".join(["lcexport", "build", "--model", "ck", *words]))
        assert job in found.jobs(config)
        assert {job.task for job in found.jobs(config)} == {job.task}
        assert found.precision == options.precision


def test_a_size_that_is_lacking_has_the_options_of_the_one_there_is(bundle_of, demo_bundle, taken):
    """And not its refined size: that was made of its own shape."""
    config = config_of(demo_bundle, sparse=False)
    options = options_of({"cond_frames": 9, "batch": 2}, tasks=("vc", "refine"))
    bundle = bundle_of(options, options.jobs(config))
    wanted = options.model_copy(update={"presets": (preset_from(OTHER),)}).jobs(config)
    for task, count in (("vc", 2), ("refine", 1)):
        with pytest.raises(UsageError) as caught:
            bundle.job_graph(OTHER, task)
        found = taken(command_in(caught.value))
        jobs = found.jobs(config)
        assert jobs == tuple(job for job in wanted if job.task == task)
        assert len(jobs) == count
        assert found.batch == 2


@pytest.mark.parametrize("has_graph", [True, False], ids=["a graph", "no graph"])
def test_qualify_says_how_to_build_the_engine(
    bundle_of, demo_bundle, taken, monkeypatch, has_graph
):
    config = config_of(demo_bundle, sparse=False)
    asked = {"weights_dtype": "int8", "batch": 2, "cond_frames": 5, "dense": True}
    options = options_of(asked, tasks=("t2v", "vc"))
    jobs = options.jobs(config)
    bundle = bundle_of(options, jobs if has_graph else jobs[:1])
    for check in ("require_backend", "require_gpu"):
        monkeypatch.setattr(run, check, lambda *words: None)
    with pytest.raises(UsageError) as caught:
        run.require(bundle, "tensorrt-rtx", f"{RES}.vc", "cpu", buildable=False)
    found = taken(command_in(caught.value))
    assert found.jobs(config) == jobs[1:]
    assert found.backends == ("tensorrt-rtx",)
    assert (found.weights_dtype, found.batch, found.dense) == ("int8", 2, True)
