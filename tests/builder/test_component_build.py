"""Building and running the text encoder and the VAE's decoder as packages."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

import lcexport.runtime
from lcexport.builder import BuildOptions, aoti, build, components, make_plan, options_from
from lcexport.builder import run as builder_run
from lcexport.builder.components import check_stage
from lcexport.builder.staging import StageOutput
from lcexport.checkpoint import open_checkpoint
from lcexport.cli import given as cli_given
from lcexport.configs.components import components_of, text_encoder, vae_decoder
from lcexport.configs.errors import (
    BuildError,
    IncompatibleError,
    IntegrityError,
    UsageError,
    VerificationError,
)
from lcexport.configs.presets import preset_from
from lcexport.engines import aoti_components, open_engine
from lcexport.engines.aoti_components import ComponentPackage, open_components
from lcexport.engines.bundle import Bundle, open_bundle
from lcexport.engines.manifest import (
    MANIFEST,
    ComponentRecord,
    Manifest,
    manifest_json,
    read_manifest,
)
from lcexport.runtime import load, save_frames
from lcexport.runtime.cancel import CancelToken
from lcexport.runtime.components import Components
from lcexport.runtime.text import TextEncoder
from lcexport.runtime.vae import VideoVAE
from lcexport.verify import compiled_components
from lcexport.verify.levels import component_level

BACKEND = "aotinductor"
SIZE = "32x48x9"
TEXT, DECODER = text_encoder(512).name, vae_decoder(32, 48).name
CPU = torch.device("cpu")


def no_package(path: Path, request: dict, options: BuildOptions) -> dict:
    """A compiler that takes no time: the package is what was asked for, as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(request["part"])
    plan = {"file": request.get("file"), "first_block": None, "last_block": None}
    plan |= {"inputs": (), "outputs": (), "attentions": 0}
    return {"plan": plan, "attentions": 0, "peak_rss_bytes": 1}


@pytest.fixture(scope="module")
def compiled_options(demo_options, tmp_path_factory) -> BuildOptions:
    output = tmp_path_factory.mktemp("compiled") / "bundle"
    update = {"output": output, "backends": (BACKEND,), "compile_components": True}
    return demo_options.model_copy(update=update | {"presets": (preset_from(SIZE),)})


@pytest.fixture(scope="module")
def built(compiled_options, build_packages) -> Bundle:
    """A bundle of the demo checkpoint, its components compiled and checked, its DiT neither (see
    `test_aoti_build`): what runs it here is ONNX Runtime. Read only.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aoti, "make_package", no_package)
        patch.setattr(builder_run, "engine_stage", lambda *_: StageOutput(files={}))
        return open_bundle(build_packages(compiled_options), every_hash=True)


@pytest.fixture
def opened(built):
    """`opened(offload="cpu")` is its pipeline."""
    with open_engine("onnxruntime", built, SIZE) as engine:
        yield partial(load, built.folder, SIZE, BACKEND, engine=engine)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The number of inputs of each call of a package from here on."""
    noted: list[int] = []
    plain = ComponentPackage.__call__

    def note(self, model, *tensors):
        noted.append(len(tensors))
        return plain(self, model, *tensors)

    monkeypatch.setattr(ComponentPackage, "__call__", note)
    return noted


@pytest.fixture
def quick(monkeypatch):
    """`quick("later")`: a compiler of components that takes no time and fails at that part."""

    def make(victim: str = "") -> list[str]:
        noted: list[str] = []

        def package(path: Path, request: dict, options: BuildOptions) -> dict:
            made = no_package(path, request, options)
            if request["part"] == victim:
                raise BuildError("it fails")
            noted.append(path.name)
            return made

        monkeypatch.setattr(components, "make_package", package)
        monkeypatch.setattr(aoti, "make_package", package)
        return noted

    return make


@pytest.fixture
def options(compiled_options, tmp_path) -> BuildOptions:
    return compiled_options.model_copy(update={"output": tmp_path / "bundle", "only": "compile"})


def changed(bundle: Bundle, records: dict[str, ComponentRecord]) -> Bundle:
    """The same bundle, were these components' records other ones."""
    components = {**bundle.manifest.components, **records}
    manifest = bundle.manifest.model_copy(update={"components": components})
    return Bundle(bundle.folder, manifest)


def test_the_manifest_has_what_was_compiled_and_what_it_was_measured_to_be(built):
    records = built.manifest.components
    assert list(records) == [TEXT, DECODER]
    folder = f"engines/{BACKEND}"
    assert [plan.file for record in records.values() for plan in record.plans] == [
        f"{folder}/{TEXT}/encoder.pt2",
        f"{folder}/{DECODER}/first.pt2",
        f"{folder}/{DECODER}/later.pt2",
    ]
    for record in records.values():
        assert record.verified
        assert record.version == torch.__version__
        assert record.errors
        assert all(0 < found["relative_l2"] < 1e-5 for found in record.errors.values())
        assert {plan.file for plan in record.plans} <= set(built.manifest.files)
    assert set(records[TEXT].errors) == {"prompt", "empty prompt", "long prompt"}
    assert len(records[DECODER].errors) == 4
    stages = [stage.name for stage in built.manifest.stages]
    assert f"compile:{BACKEND}:{DECODER}:2/2" in stages
    assert f"check:{BACKEND}:{TEXT}" in stages


def test_the_manifest_comes_back_as_it_was_and_older_ones_are_read(built, tmp_path):
    text = manifest_json(built.manifest)
    assert Manifest.model_validate_json(text) == built.manifest
    old = json.loads(text)
    del old["components"]
    (tmp_path / MANIFEST).write_text(json.dumps(old))
    assert read_manifest(tmp_path).components == {}


def test_no_package_has_a_weight(built):
    packages = [p for found in open_components(built, (TEXT, DECODER), CPU).values() for p in found]
    assert len(packages) == 3
    for package in packages:
        assert package._loader is not None
        assert package._loader.get_constant_fqns() == []


def test_every_frame_is_the_librarys(opened, calls):
    """The first latent frame, the second, whose past is short, and those after it."""
    latents = torch.randn(16, 5, 4, 6, generator=torch.Generator().manual_seed(7))
    with opened() as pipe:
        made = list(pipe.frames(latents))
    assert calls[0] == 1
    assert len(set(calls[1:])) == 1
    assert len(calls) == 5
    with opened(compiled_components=False) as pipe:
        wanted = list(pipe.frames(latents))
    assert len(calls) == 5  # the library's: no further call
    assert [len(group) for group in made] == [1, 4, 4, 4, 4]
    for group, other in zip(made, wanted, strict=True):
        torch.testing.assert_close(group, other, rtol=0, atol=1e-5)


def test_the_text_is_the_librarys(opened, calls):
    prompts = ["a paper boat", "", "a red circle moves left " * 100]
    with opened() as pipe:
        made = pipe.encode(prompts)
    assert calls == [2, 2, 2]
    with opened(compiled_components=False) as pipe:
        wanted = pipe.encode(prompts)
    assert torch.equal(made.mask, wanted.mask)
    assert made.mask.sum(1).tolist()[1:] == [1, 512]
    torch.testing.assert_close(made.embeds, wanted.embeds, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offload", ["keep", "cpu", "release"])
def test_a_video_is_made_and_streamed_wherever_the_components_wait(
    opened, calls, offload, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "lcexport.runtime")
    with opened(offload=offload) as pipe:
        assert f"compiled besides the DiT: {TEXT}" in caplog.text
        assert f"compiled besides the DiT: {DECODER}" in caplog.text
        latents = pipe.generate("a paper boat", seed=1, steps=1, output="latents")
        path = save_frames(pipe.frames(latents), tmp_path / "boat.mp4", fps=15)
    assert path.stat().st_size
    assert len(calls) >= 1 + 3
    assert "decoded by the library" not in caplog.text


def test_what_was_not_compiled_is_decoded_by_the_library_with_one_warning(opened, calls, caplog):
    caplog.set_level(logging.WARNING, "lcexport.runtime")
    with opened(offload="release") as pipe:
        for _ in range(2):
            assert len(list(pipe.frames(torch.randn(16, 2, 2, 2)))) == 2
    said = "frames of 16 x 16, of a size that was not compiled: decoded by the library"
    assert caplog.messages == [said]
    with opened(vae_tiling=True) as pipe:
        list(pipe.frames(torch.randn(16, 2, 4, 6)))
    assert caplog.messages[1:] == ["frames of 32 x 48, in tiles: decoded by the library"]
    with opened(compiled_components=False) as pipe:
        list(pipe.frames(torch.randn(16, 2, 2, 2)))
    assert len(caplog.messages) == 2
    assert calls == []


def test_a_text_encoder_of_another_length_is_the_librarys_with_a_warning(built, caplog):
    record = built.manifest.components[DECODER]
    alone = built.manifest.model_copy(update={"components": {DECODER: record}})
    caplog.set_level(logging.INFO, "lcexport.runtime")
    parts = Components(
        Bundle(built.folder, alone), BACKEND, "cpu", "release", preset_from(SIZE)
    )  # fmt: skip
    parts.close()
    said = "the text encoder was not compiled for 512 tokens: the library's is used"
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [said]
    assert TEXT not in caplog.text.replace(said, "")


def test_only_what_the_pipeline_can_use_is_opened(built, caplog):
    """A decoder of another size, compiled for another machine, is in nobody's way until it is
    asked for, and refused then.
    """
    other = vae_decoder(48, 32)
    strange = built.manifest.components[DECODER].model_copy(
        update={"component": other, "version": "2.12.0"}
    )
    graph = built.manifest.graphs[SIZE]
    preset = preset_from("48x32x9")
    job = graph.job.model_copy(update={"preset": preset, "height": 48, "width": 32})
    graphs = {SIZE: graph, preset.name: graph.model_copy(update={"job": job})}
    engines = {BACKEND: dict.fromkeys(graphs, built.manifest.engines[BACKEND][SIZE])}
    bundle = changed(built, {other.name: strange})
    manifest = bundle.manifest.model_copy(update={"graphs": graphs, "engines": engines})
    parts = Components(
        Bundle(built.folder, manifest), BACKEND, "cpu", "keep", preset_from(SIZE)
    )  # fmt: skip
    try:
        with pytest.raises(IncompatibleError, match=r"another torch.*wanted torch 2\.12\.0"):
            parts.prepare(preset.name)
        with pytest.raises(IncompatibleError, match="another torch"):
            next(parts.frames(torch.randn(16, 1, 6, 4), CancelToken()))
        assert list(parts._decoders) == [DECODER]
    finally:
        parts.close()


def test_other_backends_do_without_them(built, calls):
    with load(built.folder, SIZE, "onnxruntime") as pipe:
        list(pipe.frames(torch.randn(16, 1, 4, 6)))
    assert calls == []


@pytest.mark.parametrize("command", ["generate", "long", "refine"])
@pytest.mark.parametrize(("switch", "used"), [((), True), (("--library-components",), False)])
def test_the_command_line_has_a_switch_for_the_librarys(
    built, run, monkeypatch, tmp_path, command, switch, used
):
    given = []

    def stop(*place, compiled_components, **options):
        given.append(compiled_components)
        raise UsageError("stopped here")

    monkeypatch.setattr(lcexport.runtime, "load", stop)
    monkeypatch.setattr(cli_given, "refinement_for", lambda *_: built.graph(SIZE))
    video = tmp_path / "given.mp4"
    save_frames([torch.zeros(9, 32, 48, 3)], video, fps=15)
    words = [video] if command == "refine" else ["--prompt", "a boat"]
    words += ["--work", tmp_path / "work"] if command == "long" else []
    words += ["--out", tmp_path / "out.mp4", "--backend", BACKEND, *switch]
    code, _, said = run(command, built.folder, *words)
    assert (code, said) == (2, "error: stopped here\n")
    assert given == [used]


def test_a_closed_pipeline_holds_no_package(opened):
    with opened() as pipe:
        package = pipe.components._decoders[DECODER][0]
    with pytest.raises(UsageError, match="closed"):
        package(torch.nn.Module(), torch.zeros(1))


def test_verify_holds_them_against_the_library_again(built):
    records = compiled_components(built, (BACKEND,), (SIZE,))
    assert [record.component.name for record in records] == [TEXT, DECODER]
    for record, rows in zip(records, (3, 4), strict=True):
        assert [check.ok for check in component_level(built, record, "load", "cpu")] == [True]
        found = list(component_level(built, record, "step", "cpu"))
        assert [check.ok for check in found] == [True] * rows
    assert compiled_components(built, ("onnxruntime",), (SIZE,)) == []


def test_a_package_that_is_wrong_fails_the_build(built, compiled_options, monkeypatch):
    """A thousandth off, in the pixels alone: later frames get the right past."""
    plain = ComponentPackage.__call__

    def off(self, model, *tensors):
        pixels, *past = plain(self, model, *tensors)
        return [pixels * (1.001 if tensors[1:] else 1), *past]

    monkeypatch.setattr(ComponentPackage, "__call__", off)
    with pytest.raises(VerificationError, match=rf"{DECODER}.*\(second latent frame\)"):
        check_stage(built, built.manifest.components[DECODER], compiled_options)


def test_a_modified_package_is_refused_before_it_is_loaded(built, tmp_path, monkeypatch):
    copied = tmp_path / "bundle"
    shutil.copytree(built.folder, copied)
    package = copied / "engines" / BACKEND / DECODER / "later.pt2"
    data = bytearray(package.read_bytes())
    data[len(data) // 2] ^= 1
    package.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"later\.pt2.*SHA-256"):
        load(copied, SIZE, BACKEND)
    unchecked = Bundle(copied, read_manifest(copied))
    with pytest.raises(IntegrityError, match=r"later\.pt2 is not the plan.*Do not load it"):
        open_components(unchecked, (TEXT, DECODER), CPU)


def test_packages_for_something_else_are_refused_with_the_command(built, monkeypatch, taken):
    record = built.manifest.components[DECODER].model_copy(update={"version": "2.12.0"})
    loaded = []
    plain = aoti_components.load_package

    def note(file, *rest):
        loaded.append(file.path.name)
        return plain(file, *rest)

    monkeypatch.setattr(aoti_components, "load_package", note)
    with pytest.raises(IncompatibleError, match=r"another torch.*wanted torch 2\.12\.0") as caught:
        open_components(changed(built, {DECODER: record}), (TEXT, DECODER), CPU)
    assert loaded == ["encoder.pt2"]
    assert f"the compiled {DECODER} cannot be opened" in caught.value.what
    assert "load(compiled_components=False)" in str(caught.value.do)
    command = str(caught.value.do).split(": ", 1)[1]
    asked = taken(command)
    assert asked.compile_components
    assert asked.presets == (preset_from(SIZE),)


def test_the_command_names_a_graph_that_has_use_for_the_component(built, taken):
    """Whatever the order of the graphs, and however that graph was built."""
    manifest = built.manifest
    graph = manifest.graphs[SIZE]
    other = graph.preset.model_copy(update={"name": "48x32x9", "height": 48, "width": 32})
    short = other.model_copy(update={"text_tokens": 64})
    job = graph.job.model_copy(update={"preset": short, "height": 48, "width": 32})
    graphs = {short.name: graph.model_copy(update={"job": job}), SIZE: graph}
    engines = {BACKEND: dict.fromkeys(graphs, manifest.engines[BACKEND][SIZE])}
    effective = {**manifest.effective, "compile_components": False}
    update = {"graphs": graphs, "engines": engines, "effective": effective}
    bundle = Bundle(built.folder, manifest.model_copy(update=update))
    for component in (text_encoder(512), vae_decoder(32, 48)):
        asked = taken(aoti_components.rebuilding(bundle, component, CPU))
        assert asked.presets == (preset_from(SIZE),)
        assert asked.compile_components


@pytest.mark.parametrize(
    ("key", "make"),
    [
        (TEXT, lambda folder, packages: TextEncoder(folder, package=packages[TEXT][0])),
        (DECODER, lambda folder, packages: VideoVAE(folder, packages=packages)),
    ],
)
def test_weights_of_another_model_are_refused_before_anything_is_computed(built, calls, key, make):
    """As another release of the library would name or shape them."""
    record = built.manifest.components[key]
    plan = record.plans[0]
    strange = plan.weights[0].model_copy(update={"name": "renamed.weight"})
    for weight, match in (
        (strange, r"does not fit.*renamed\.weight; got no such weight"),
        (plan.weights[0].model_copy(update={"dtype": "float16"}), "wanted torch.float16"),
        (plan.weights[0].model_copy(update={"shape": (1, 2)}), r"wanted torch.float32 \[1, 2\]"),
    ):
        plans = (plan.model_copy(update={"weights": (weight,)}), *record.plans[1:])
        update = {key: record.model_copy(update={"plans": plans})}
        packages = open_components(changed(built, update), [key], CPU)
        with pytest.raises(IntegrityError, match=match):
            make(built.folder, packages)
    assert calls == []


def test_an_input_that_does_not_fit_is_refused(built):
    (package,) = open_components(built, (TEXT, DECODER), CPU)[TEXT]
    with pytest.raises(UsageError, match="ids does not fit"):
        package(torch.nn.Linear(2, 2), torch.zeros(2, 512), torch.ones(2, 512))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("", "got --backend onnxruntime; wanted aotinductor among them. Add --backend aotinductor"),
        ("--backend aotinductor --only export", "got --only export; wanted --only all or compile"),
    ],
)
def test_it_is_aotinductors_and_compiles(demo_checkpoint, run, tmp_path, words, match):
    output = tmp_path / "bundle"
    code, _, said = run(
        "build", "--model", demo_checkpoint, "--res", SIZE, "-o", output,
        "--compile-components", *words.split(),
    )  # fmt: skip
    assert code == 2
    assert match in said
    assert "Traceback" not in said
    assert not output.exists()
    with pytest.raises(UsageError, match="--compile-components"):
        options_from(model=demo_checkpoint, res=SIZE, compile_components=True)


def test_a_plan_names_its_stages_and_counts_its_packages(demo_checkpoint, compiled_options):
    source = open_checkpoint(demo_checkpoint)
    whole = compiled_options.model_copy(
        update={"output": Path("x"), "presets": (preset_from(SIZE), preset_from("32x48x13"))}
    )
    plan = make_plan(source, whole)
    without = make_plan(source, whole.model_copy(update={"compile_components": False}))
    own = [name for name in plan.stages if name not in without.stages]
    assert own == [
        f"{kind}:{BACKEND}:{name}" for name in (TEXT, DECODER) for kind in ("compile", "check")
    ]
    assert plan.disk_needed_bytes > without.disk_needed_bytes


def test_a_refinements_size_has_a_decoder_of_its_own(compiled_options, demo_checkpoint):
    asked = compiled_options.model_copy(
        update={"tasks": ("t2v", "i2v", "refine"), "refine_size": (64, 96)}
    )
    jobs = asked.jobs(open_checkpoint(demo_checkpoint).config)
    assert [component.name for component in components_of(jobs)] == [
        TEXT, DECODER, "vae_decoder.64x96",
    ]  # fmt: skip


def test_a_killed_build_goes_on_at_its_package(options, quick):
    quick("later")
    with pytest.raises(BuildError, match="it fails"):
        build(options)
    noted = quick()
    bundle = build(options.model_copy(update={"resume": True}))
    assert noted == ["later.pt2"]
    records = bundle.manifest.components
    assert [len(record.plans) for record in records.values()] == [1, 2]
    assert not any(record.verified or record.errors for record in records.values())


def test_what_is_there_is_not_compiled_again(options, quick):
    quick()
    before = build(options).manifest.components
    other = {"presets": (preset_from("48x32x9"),), "add": True}
    quick("later")
    with pytest.raises(BuildError, match="it fails"):
        build(options.model_copy(update=other))
    folder = options.output / "engines" / BACKEND
    assert not (folder / "vae_decoder.48x32").exists()
    noted = quick()
    bundle = build(options.model_copy(update=other))
    assert noted[-2:] == ["first.pt2", "later.pt2"]
    assert "encoder.pt2" not in noted
    assert list(bundle.manifest.components) == [*before, "vae_decoder.48x32"]
    open_bundle(options.output, every_hash=True)


def test_the_command_builds_inspects_and_says_how_far_it_was(built, options, quick, run):
    quick()
    code, out, said = run(
        "build", "--model", options.model, "--res", SIZE, "-o", options.output, "--backend",
        BACKEND, "--only", "compile", "--compile-components",
    )  # fmt: skip
    assert code == 0, said
    assert f"compile:{BACKEND}:{DECODER}:2/2" in out
    code, out, _ = run("inspect", options.output)
    assert code == 0
    assert TEXT in out
    assert "not run" in out
    code, out, _ = run("inspect", built.folder)
    assert f"{built.manifest.components[TEXT].component.name}" in out
    largest = max(found["relative_l2"] for found in built.manifest.components[TEXT].errors.values())
    assert f"{largest:.2g}" in out


def test_an_addition_does_not_keep_what_was_compiled_for_something_else(options, quick, tmp_path):
    quick()
    bundle = build(options)
    record = bundle.manifest.components[TEXT].model_copy(update={"version": "2.12.0"})
    manifest = changed(bundle, {TEXT: record}).manifest
    (options.output / MANIFEST).write_bytes(manifest_json(manifest))
    before = sorted(options.output.rglob("*"))
    noted = quick()
    asked = options.model_copy(update={"presets": (preset_from("48x32x9"),), "add": True})
    match = rf"{TEXT}.*--add would keep.*another torch.*wanted torch 2\.12\.0"
    with pytest.raises(IncompatibleError, match=match):
        build(asked)
    assert noted == []
    assert sorted(options.output.rglob("*")) == before
    build(asked.model_copy(update={"compile_components": False}))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda found: found.update({"vae_decoder.9x9": found.pop(DECODER)}), "goes by the name"),
        (lambda found: found[DECODER]["plans"].pop(), "has 1 plans, not one for each of first, l"),
        (lambda found: found[DECODER]["component"].update(size=[32]), "vae_decoder is 2 numbers"),
        (lambda found: found[TEXT]["component"].update(size=[0]), "greater than 0"),
    ],
)
def test_a_manifest_whose_components_are_not_what_they_are_called_is_refused(
    built, tmp_path, change, match
):
    data = json.loads(manifest_json(built.manifest))
    change(data["components"])
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(IntegrityError, match=match):
        read_manifest(tmp_path)


def test_the_check_leaves_no_package_open(built, compiled_options, monkeypatch):
    closed = noted_closings(monkeypatch)
    for key, packages in ((TEXT, 1), (DECODER, 2)):
        closed.clear()
        check_stage(built, built.manifest.components[key], compiled_options)
        assert len(closed) == packages
        closed.clear()
        assert list(component_level(built, built.manifest.components[key], "load", "cpu"))
        assert len(closed) == packages


def test_a_component_whose_second_package_does_not_load_leaves_none_open(built, monkeypatch):
    closed = noted_closings(monkeypatch)
    plain = aoti_components.load_package

    def fail(file, *rest):
        if file.path.name == "later.pt2":
            raise IncompatibleError("it does not load")
        return plain(file, *rest)

    monkeypatch.setattr(aoti_components, "load_package", fail)
    with pytest.raises(IncompatibleError, match="it does not load"):
        open_components(built, (TEXT, DECODER), CPU)
    assert len(closed) == 2  # the encoder's, and the first frame's


def noted_closings(monkeypatch) -> list[ComponentPackage]:
    """The packages that are closed from here on."""
    closed: list[ComponentPackage] = []
    plain = ComponentPackage.close

    def note(self):
        closed.append(self)
        plain(self)

    monkeypatch.setattr(ComponentPackage, "close", note)
    return closed


def test_a_decoder_that_makes_all_frames_at_once_is_refused_before_a_byte_is_written(
    options, quick, tmp_path
):
    noted = quick()
    model = tmp_path / "model"
    shutil.copytree(options.model, model)
    path = model / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "patch_size": 2}))
    with pytest.raises(IncompatibleError, match="patch_size 2"):
        build(options.model_copy(update={"model": model}))
    assert noted == []
    assert list(tmp_path.iterdir()) == [model]
