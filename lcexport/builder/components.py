"""Compiling the text encoder and the VAE's decoder, and holding them against the library's.

A package is a stage of its own and compiled in a process of its own, as the DiT's are. The check of
each component is a stage too, in the process of the build: it reads the component's weights.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import torch

from lcexport.builder.aoti import SUFFIX, compiled_for, make_package, package_output
from lcexport.builder.compile import plans_folder
from lcexport.builder.options import BuildOptions
from lcexport.builder.staging import DoneStage, StageOutput
from lcexport.compare import COMPONENT_TOLERANCE, Difference, difference
from lcexport.configs.components import TEXT_ENCODER, Component, components_of
from lcexport.configs.errors import IncompatibleError, VerificationError
from lcexport.configs.presets import LATENT_CHANNELS, SPATIAL_STRIDE
from lcexport.configs.tasks import Job
from lcexport.engines.aoti import placed
from lcexport.engines.aoti_components import open_component
from lcexport.engines.aoti_target import BACKEND, check_here
from lcexport.engines.bundle import Bundle
from lcexport.engines.manifest import ComponentRecord, Manifest, PlanRecord
from lcexport.graph.trace import BULK
from lcexport.runtime.decoding import Package
from lcexport.runtime.text import TextEncoder
from lcexport.runtime.vae import VideoVAE

Stage = Callable[[str, Callable[[], StageOutput]], DoneStage]
SEED = 20_480
# Latent frames of the check: the first, the one after it, which finds zeros in front, two others.
FRAMES = ("first", "second", "third", "fourth")
PROMPTS = {
    "prompt": "a paper boat drifts down a rainy street",
    "empty prompt": "",
    "long prompt": "a red circle moves left and a blue square moves right. " * 100,
}


def components_to_compile(
    options: BuildOptions, jobs: Iterable[Job], there: Collection[str] = ()
) -> tuple[Component, ...]:
    """What the build compiles: what its graphs need and the bundle has not."""
    needed = components_of(jobs) if options.compile_components else ()
    return tuple(component for component in needed if component.name not in there)


def check_kept(
    options: BuildOptions, jobs: Iterable[Job], there: Mapping[str, ComponentRecord]
) -> None:
    """Refuse an addition that would keep components which were compiled for something else.

    Raises:
        IncompatibleError: names what differs from this machine, both values.
    """
    needed = components_of(jobs) if options.compile_components else ()
    for record in (there[component.name] for component in needed if component.name in there):
        try:
            check_here(record, torch.device(options.device), "")
        except IncompatibleError as error:
            raise IncompatibleError(
                f"the bundle {options.output} has a {record.component.name} that does not fit here "
                f"and that --add would keep: {error.what}",
                got=error.got,
                wanted=error.wanted,
                do="Add to it where it fits, build a new bundle here, or leave "
                "--compile-components out.",
            ) from error


def component_stages(
    stage: Stage, folder: Path, component: Component, options: BuildOptions, manifest: Manifest
) -> tuple[ComponentRecord, list[DoneStage]]:
    """Compile a component, and check it unless the build compiles only; its record and stages."""
    done = []
    for number, part in enumerate(component.parts, start=1):
        name = f"compile:{BACKEND}:{component.name}:{number}/{len(component.parts)}"
        done.append(stage(name, partial(compile_component, folder, component, part, options)))
    plans = tuple(PlanRecord.model_validate(one.output.facts["plan"]) for one in done)
    record = ComponentRecord(plans=plans, component=component, **compiled_for(options))
    if options.only != "all":
        return record, done
    files = {name: file for one in done for name, file in one.output.files.items()}
    bundle = Bundle(folder, manifest.model_copy(update={"files": {**manifest.files, **files}}))
    work = partial(check_stage, bundle, record, options)
    done.append(stage(f"check:{BACKEND}:{component.name}", work))
    errors = done[-1].output.facts["errors"]
    return record.model_copy(update={"errors": errors, "verified": True}), done


def compile_component(
    folder: Path, component: Component, part: str, options: BuildOptions
) -> StageOutput:
    """One package of a component."""
    file = f"{plans_folder(BACKEND, component.name)}/{part}{SUFFIX}"
    request = {
        "component": component.model_dump(mode="json"),
        "part": part,
        "bundle": str(folder.absolute()),
        "file": file,
        "precision": options.precision,
    }
    made = make_package(folder / file, request, options)
    record = PlanRecord.model_validate(made["plan"])
    record = record.model_copy(update={"attentions": made["attentions"]})
    return package_output(folder, record, made)


def check_stage(bundle: Bundle, record: ComponentRecord, options: BuildOptions) -> StageOutput:
    """Hold the packages against the library; VerificationError where they are too far from it."""
    tolerance = COMPONENT_TOLERANCE[options.precision]
    errors: dict[str, object] = {}
    with closing(component_errors(bundle, record, options.device)) as measured:
        for name, found in measured:
            errors[name] = found.as_dict()
            if not tolerance.holds(found):
                raise VerificationError(
                    f"the compiled {record.component.name} disagrees with the library's ({name})",
                    got=found,
                    wanted=tolerance,
                    do="Build without --compile-components, or with another version of torch.",
                )
    return StageOutput(files={}, facts={"errors": errors})


def component_errors(
    bundle: Bundle, record: ComponentRecord, device: str
) -> Generator[tuple[str, Difference], None, None]:
    """How far a compiled component is from the library's: by prompt, or by latent frame.

    Close it where it is not read to its end: packages and weights go with it.

    Raises:
        IncompatibleError, IntegrityError: the packages cannot be opened here.
        InputError: nor can the component.
    """
    component, dtype = record.component, BULK[bundle.manifest.precision]
    with ExitStack() as stack:
        # the library too computes float32 in float32, as packages do
        stack.enter_context(placed(torch.device(device)))
        packages = open_component(bundle, record, torch.device(device))
        for package in packages:
            stack.callback(package.close)
        if component.kind == TEXT_ENCODER:
            encoder = TextEncoder(bundle.folder, component.size[0], dtype, device)
            stack.callback(encoder.close)
            yield from text_errors(encoder, packages[0])
        else:
            vae = VideoVAE(bundle.folder, dtype, device)
            stack.callback(vae.close)
            yield from decoder_errors(vae, component, packages)


def text_errors(encoder: TextEncoder, package: Package) -> Iterator[tuple[str, Difference]]:
    """Embeddings of prompts, one after the other; one set of weights."""
    compiled = encoder.by(package)
    for name, prompt in PROMPTS.items():
        tokens = encoder.tokens(prompt)
        made, wanted = compiled.encode_ids(*tokens), encoder.encode_ids(*tokens)
        yield name, difference(made.embeds, wanted.embeds)


def decoder_errors(
    vae: VideoVAE, component: Component, packages: Sequence[Package]
) -> Iterator[tuple[str, Difference]]:
    """Frames of seeded latents N(0, 1), by the latent frame that they are made of."""
    height, width = (side // SPATIAL_STRIDE for side in component.size)
    generator = torch.Generator().manual_seed(SEED)
    latents = torch.randn(LATENT_CHANNELS, len(FRAMES), height, width, generator=generator)
    compiled = vae.by({component.name: packages})
    for name, made, wanted in zip(
        FRAMES, compiled.frames(latents), vae.frames(latents), strict=True
    ):
        yield f"{name} latent frame", difference(made, wanted)
