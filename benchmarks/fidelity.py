"""How far eager torch and ONNX Runtime are from the original code's own numbers.

    python benchmarks/fidelity.py

Runs every golden case (tests/golden, made by running the original code in float32) and prints the
largest absolute error of each. Velocities, latents and cached keys are up to 5 in size, frames are
in 0..1. The text encoder, the VAE and the schedules are torch whatever the engine is.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnxruntime as ort
import torch
from safetensors.torch import load_file
from sparse_attention import sparse_model
from torch import Tensor

from lcexport.builder import BuildOptions, build
from lcexport.configs.presets import Preset
from lcexport.configs.tasks import Task
from lcexport.demo import make_demo_checkpoint
from lcexport.dit.sparse import Sparsity, block_sparse_attention
from lcexport.engines import Engine, open_engine
from lcexport.engines.bundle import Bundle
from lcexport.lora import LoraChoice, bake, remove
from lcexport.runtime import load
from lcexport.runtime.schedule import enhance_hf_schedule, euler_step, refine_schedule, schedule
from lcexport.runtime.text import Text, TextEncoder
from lcexport.runtime.vae import VideoVAE, normalize

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
BACKENDS = ("eager", "onnxruntime")
Row = tuple[str, str, float]  # the case, who computed it, the largest absolute error
Case = Mapping[str, Tensor]


def case_of(name: str) -> Case:
    return load_file(GOLDEN / name / "data.safetensors")


def meta_of(name: str) -> dict:
    return json.loads((GOLDEN / name / "meta.json").read_text("utf-8"))


def apart(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        raise ValueError(f"{list(found.shape)} is not {list(wanted.shape)}")
    return (found.float() - wanted.float()).abs().max().item()


def make_checkpoint(folder: Path) -> Path:
    """The golden DiT and VAE in the released layout, with the demo's text encoder."""
    make_demo_checkpoint(folder)
    for name in ("dit", "vae"):
        shutil.rmtree(folder / name)
        (folder / name).mkdir()
    dit, vae = GOLDEN / "dit_tiny_t2v", GOLDEN / "vae_tiny"
    weights = "diffusion_pytorch_model.safetensors"
    shutil.copy(dit / "transformer.safetensors", folder / "dit" / weights)
    shutil.copy(vae / "vae.safetensors", folder / "vae" / weights)
    dit_config = json.loads((dit / "config.json").read_text("utf-8"))
    vae_config = json.loads((vae / "config.json").read_text("utf-8"))
    meta = meta_of("vae_tiny")
    vae_config |= {name: meta[name] for name in ("latents_mean", "latents_std")}
    dit_config["text_tokens_zero_pad"] = True
    (folder / "dit/config.json").write_text(json.dumps(dit_config))
    (folder / "vae/config.json").write_text(json.dumps(vae_config))
    return folder


def make_bundle(
    model: Path, tasks: Sequence[Task], frames: int, text: int, batch: int = 1, cond: int = 5
) -> Bundle:
    """Graphs of the golden model at the golden cases' size, exported and not run."""
    preset = Preset(name="tiny", frames=frames, height=64, width=96, text_tokens=text)
    name = f"bundle-{'-'.join(tasks)}-{frames}-{text}-{batch}"
    options = BuildOptions(
        model=model,
        output=model.with_name(name),
        presets=(preset,),
        tasks=tuple(tasks),
        batch=batch,
        cond_frames=cond,
        only="export",
    )
    return build(options)


def run(engine: Engine, inputs: Case) -> dict[str, Tensor]:
    """Every output of one call; a timestep for each sample is one for each frame."""
    given = {}
    for spec in engine.inputs:
        tensor = inputs[spec.name]
        if spec.name == "timestep" and tensor.ndim == 1:
            tensor = tensor[:, None]
        given[spec.name] = tensor.expand(spec.shape).to(spec.dtype).contiguous()
    made = {spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in engine.outputs}
    engine.run(given, made)
    return made


def forward(bundle: Bundle, graph: str, inputs: Case, wanted: Tensor, name: str) -> Iterator[Row]:
    for backend in BACKENDS:
        with open_engine(backend, bundle, graph) as engine:
            yield name, backend, apart(run(engine, inputs)["velocity"], wanted)


def forwards(model: Path) -> Iterator[Row]:
    """One call of the DiT: text to video, an image in front, a video in front."""
    case = case_of("dit_tiny_t2v")
    bundle = make_bundle(model, ["t2v"], 9, 10, batch=2)
    yield from forward(bundle, "tiny", case, case["output_zero_pad"], "dit_tiny_t2v")
    case = case_of("dit_tiny_i2v")
    bundle = make_bundle(model, ["i2v", "vc-uncached"], 13, 10, batch=2)
    yield from forward(bundle, "tiny.i2v", case, case["output_zero_pad"], "dit_tiny_i2v")
    two = {**case, "timestep": case["timestep_cond2"]}
    wanted = case["output_cond2_zero_pad"]
    yield from forward(bundle, "tiny.vc-uncached", two, wanted, "dit_tiny_i2v, 2 clean latents")


def cached(model: Path) -> Iterator[Row]:
    """Continuation: the cache of every layer, then a call that uses the engine's own cache."""
    name, case = "dit_tiny_vc_kvcache", case_of("dit_tiny_vc_kvcache")
    bundle = make_bundle(model, ["vc"], 17, 10, batch=1)
    two = make_bundle(model, ["vc", "vc-uncached"], 17, 10, batch=2)
    clean = case["cond_latents"]
    for backend in BACKENDS:
        with open_engine(backend, bundle, "tiny.vc.cache") as engine:
            made = run(engine, {"hidden_states": clean, "timestep": torch.zeros(1, 1)})
        names = [spec.name for spec in engine.outputs]
        kept = [case[f"kv.{i // 2}.{'kv'[i % 2]}"] for i in range(len(names))]
        errors = (apart(made[n], wanted) for n, wanted in zip(names, kept, strict=True))
        yield f"{name}, keys and values", backend, max(errors)
        noise = {**case, **made, "hidden_states": case["noise_latents"]}
        with open_engine(backend, two, "tiny.vc") as engine:
            yield (
                f"{name}, with the cache",
                backend,
                apart(run(engine, noise)["velocity"], case["output"]),
            )
    whole = {
        **case,
        "hidden_states": torch.cat([clean.expand(2, -1, -1, -1, -1), case["noise_latents"]], 2),
        "timestep": torch.cat([torch.zeros(2, 2), case["timestep"]], 1),
    }
    wanted = case["output_uncached_full"]
    yield from forward(two, "tiny.vc-uncached", whole, wanted, f"{name}, without")


def loras(model: Path) -> Iterator[Row]:
    """LoRAs of the original's format, baked into a bundle."""
    case = case_of("lora_tiny")
    bundle = make_bundle(model, ["t2v"], 9, 10)
    a, b = (GOLDEN / "lora_tiny" / f"lora_{name}.safetensors" for name in "ab")
    baked = {
        "output_a": [LoraChoice(path=a)],
        "output_a_mult0p5": [LoraChoice(path=a, strength=0.5)],
        "output_a_plus_b": [LoraChoice(path=a), LoraChoice(path=b)],
    }
    for output, choices in baked.items():
        changed = bake(bundle.folder, choices, golden=False)
        yield from forward(changed, "tiny", case, case[output], f"lora_tiny, {output}")
    yield from forward(
        remove(bundle.folder, golden=False),
        "tiny", case, case["output_base"], "lora_tiny, removed again",
    )  # fmt: skip


def sparse() -> Iterator[Row]:
    """Block-sparse attention: the operation, and the graph's functions for it."""
    case, cases = case_of("bsa_tiny"), meta_of("bsa_tiny")["cases"]
    for name, said in cases.items():
        q, k, v = (case[f"{name}.{x}"] for x in "qkv")
        q, wanted = q / math.sqrt(q.shape[-1]), case[f"{name}.output"]
        sparsity = Sparsity(said["sparsity"], None, tuple(said["c"]), tuple(said["c"]))
        grids = tuple(said["sq"]), tuple(said["sk"])
        made = block_sparse_attention(q, k, v, *grids, sparsity)
        yield f"bsa_tiny {name}", "eager", apart(made, wanted)
        model = sparse_model(tuple(q.shape), tuple(k.shape), *grids, sparsity)
        session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        (out,) = session.run(None, {n: x.numpy() for n, x in zip("qkv", (q, k, v), strict=True)})
        yield f"bsa_tiny {name}", "onnxruntime", apart(torch.from_numpy(out), wanted)


def samplers(model: Path) -> Iterator[Row]:
    """Whole sampling runs through `Pipeline.generate`, and one finished video."""
    bundle = make_bundle(model, ["t2v"], 9, 12)
    pictures = make_bundle(model, ["i2v"], 13, 12)
    for backend in BACKENDS:
        case, args = case_of("denoise_tiny"), meta_of("denoise_tiny")["args"]
        with load(bundle.folder, "tiny", backend) as pipe:
            final = pipe.generate(
                *texts(case), latents=case["latents_init"], steps=args["num_inference_steps"],
                guidance_scale=args["guidance_scale"], output="latents",
            )  # fmt: skip
        yield "denoise_tiny, 6 guided steps", backend, apart(final, case["final"])
        case, args = case_of("pipe_tiny_i2v"), meta_of("pipe_tiny_i2v")["args"]
        with load(pictures.folder, "tiny", backend) as pipe:
            final = pipe.generate(
                *texts(case), image=case["image_u8"].numpy(), latents=case["latents_init"],
                seed=11, steps=args["num_inference_steps"],
                guidance_scale=args["guidance_scale"], output="latents",
            )  # fmt: skip
        yield "pipe_tiny_i2v, 4 guided steps", backend, apart(final, case["final"])


def texts(case: Case) -> tuple[Text, Text]:
    """The golden (positive, negative) embeddings."""
    embeds, mask = case["prompt_embeds_cat"], case["attention_mask_cat"].bool()
    return Text(embeds[1:], mask[1:]), Text(embeds[:1], mask[:1])


def schedules() -> Iterator[Row]:
    """Noise levels and Euler steps; these are meant to be bit-equal."""
    case, kinds = case_of("scheduler"), {"std": {}, "distill": {"distill": True}}
    found = {
        f"shift12.{kind}{steps}": schedule(steps, 12, **options)
        for kind, options in kinds.items()
        for steps in ((50, 20, 6, 1) if kind == "std" else (16, 8, 50))
    }
    found |= {f"shift12.refine50_t{t}": refine_schedule(50, t, 12) for t in (0.5, 0.3)}
    found |= {"shift12.enhance_hf50": enhance_hf_schedule(50, 12)}
    errors = [apart(made.sigmas, case[f"{name}.sigmas"]) for name, made in found.items()]
    errors += [apart(made.timesteps, case[f"{name}.timesteps"]) for name, made in found.items()]
    yield "scheduler, noise levels", "torch", max(errors)
    sigmas = schedule(16, distill=True).sigmas
    steps = (
        apart(
            euler_step(case[f"euler.x{i}"], case[f"euler.v{i}"], sigmas[i], sigmas[i + 1]),
            case[f"euler.x{i + 1}"],
        )
        for i in range(16)
    )
    yield "scheduler, 16 Euler steps", "torch", max(steps)


def vae(model: Path) -> Iterator[Row]:
    case, meta = case_of("vae_tiny"), meta_of("vae_tiny")
    constants = meta["latents_mean"], meta["latents_std"]
    coder = VideoVAE(model)
    mean = coder.encode(case["video"], torch.zeros_like(case["enc_mean"]))
    yield "vae_tiny, encoded", "torch", apart(mean, normalize(case["enc_mean"], *constants))
    frames = coder.decode(normalize(case["latents"], *constants))
    wanted = (case["decoded"] / 2 + 0.5).permute(0, 2, 3, 4, 1)
    yield "vae_tiny, decoded", "torch", apart(frames, wanted)
    case = case_of("pipe_tiny_i2v")  # the video is stored in half precision
    yield "pipe_tiny_i2v, decoded", "torch", apart(coder.decode(case["final"]), case["video_np"])


def text(model: Path) -> Iterator[Row]:
    case, folder = case_of("text"), model.with_name("text")
    shutil.copytree(model / "tokenizer", folder / "tokenizer")
    (folder / "text_encoder").mkdir()
    config = json.loads((GOLDEN / "text/umt5_config.json").read_text("utf-8"))
    config |= {"architectures": ["UMT5EncoderModel"], "model_type": "umt5"}
    (folder / "text_encoder/config.json").write_text(json.dumps(config))
    weights = folder / "text_encoder/model.safetensors"
    shutil.copy(GOLDEN / "text/text_encoder.safetensors", weights)
    made = TextEncoder(folder, 12).encode_ids(case["input_ids"], case["attention_mask_in"])
    yield "text", "torch", apart(made.embeds[:2], case["prompt_embeds"])


def main() -> None:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint(Path(folder) / "model")
        for part in (forwards, cached, loras, samplers, vae, text):
            rows += part(model)
    rows += [*sparse(), *schedules()]
    for case, engine, error in rows:
        print(f"{case:<40} {engine:<12} {error:.1e}")
    named = [dict(zip(("case", "engine", "max_abs"), row, strict=True)) for row in rows]
    print(json.dumps({"schema_version": 2, "torch": torch.__version__, "rows": named}))


if __name__ == "__main__":
    main()
