"""One part compiled by AOTInductor, in the process that `lcexport.builder.aoti` started for it.

Inductor keeps what it generates and compiles in caches, which lie in the request's folder and go
with it. It makes such a folder when it is imported, and so it is imported once that is settled.
"""

import os
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from lcexport.configs.components import Component
from lcexport.configs.dit import DiTConfig
from lcexport.configs.errors import BuildError
from lcexport.configs.tasks import Job
from lcexport.engines.host import peak_rss_bytes
from lcexport.engines.trt.worker import Answer, serve
from lcexport.graph.components import export_component
from lcexport.graph.programs import export_program
from lcexport.graph.trace import BULK, GraphSpec

SETTINGS: dict[str, Any] = {
    # Values pass through bfloat16 where the model says so, in a fused kernel as well: what is
    # rounded there is rounded in eager torch, such as the timestep.
    "emulate_precision_casts": True,
    # Without, a package uses as many threads as the machine that compiled it.
    "cpp.dynamic_threads": True,
    # Headers compiled beforehand take longer than the one package that would use them.
    "aot_inductor.precompile_headers": False,
    # The processor says what it has; the compiler need not be tried out beforehand.
    "cpp.vec_isa_ok": True,
}
PRODUCT = torch.ops.aten.linear.default
ONEDNN_PRODUCT = torch.ops.mkldnn._linear_pointwise.default
SHOWN_ERRORS = 2


def compile_package(request: dict[str, Any], _: bytes, __: Answer) -> object:
    """What the request asks for: its package, its attentions, and the memory it took; of a
    component also its plan, which nothing but its program tells.
    """
    folder = Path(request["folder"])
    use_folder(folder)
    from lcexport.builder.aoti_attention import ATTENTIONS

    program, plan = exported(request)
    package = folder / "package.pt2"
    try:
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(package), inductor_configs=dict(SETTINGS)
        )
    except Exception as error:  # Inductor's have no common base
        raise BuildError(
            f"AOTInductor cannot compile {request['part']}", got=said(error),
            do="Try another version of torch or of the C++ compiler.",
        ) from error  # fmt: skip
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "package": str(package),
        "attentions": sum(node.target in ATTENTIONS for node in program.graph.nodes),
        "peak_rss_bytes": max(peak_rss_bytes(), children),
        "plan": plan,
    }


def exported(request: dict[str, Any]) -> tuple[ExportedProgram, object]:
    """The program of a part of the DiT, or that of a component and what it takes and gives."""
    part, device = request["part"], request["device"]
    if "component" in request:
        component = Component.model_validate(request["component"])
        dtype, bundle = BULK[request["precision"]], Path(request["bundle"])
        made = export_component(component, part, bundle, dtype, device, request["file"])
        return made.program, made.plan.model_dump(mode="json")
    config = DiTConfig.model_validate(request["config"])
    job = Job.model_validate(request["job"])
    spec = GraphSpec.from_job(config, job, request["batch"], request["precision"])
    program = export_program(config, spec, part, request["weights"], device)
    if device == "cpu":
        use_kernels(program)
    return program, None


def use_kernels(program: ExportedProgram) -> None:
    """Have the faster kernels that a processor has for float32 in place of torch's."""
    from lcexport.builder.aoti_attention import use_attention

    use_onednn(program)
    use_attention(program)


def use_onednn(program: ExportedProgram) -> None:
    """Have oneDNN compute the float32 products, over the weights as they are.

    torch computes them by MKL, which was as fast on a processor with AVX2 and slower on one with
    AVX-512 (docs/performance.md). Products in bfloat16 are oneDNN's already.
    """
    if not torch.backends.mkldnn.is_available():
        return
    from torch._inductor.ir import TensorBox
    from torch._inductor.lowering import register_lowering
    from torch._inductor.mkldnn_ir import LinearBinary, LinearUnary

    # Inductor's own lowerings want weights that it has packed.
    for product, made in (
        (ONEDNN_PRODUCT, LinearUnary),
        (torch.ops.mkldnn._linear_pointwise.binary, LinearBinary),  # an addition goes with it
    ):

        def lowered(*given: Any, made: Any = made) -> Any:
            return TensorBox.create(made.create(*given))

        register_lowering(product, type_promotion_kind=None)(lowered)

    for node in program.graph.nodes:
        if node.target is PRODUCT and node.meta["val"].dtype is torch.float32:
            x, weight, *bias = node.args
            node.target = ONEDNN_PRODUCT
            node.args = (x, weight, *(bias or [None]), "none", [], "")
    program.graph_module.recompile()


def use_folder(folder: Path) -> None:
    """Everything that torch, Triton and the C++ compiler leave goes there."""
    for variable, name in (
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
        ("TRITON_CACHE_DIR", "triton"),
        ("TMPDIR", "temporary"),
    ):
        (folder / name).mkdir()
        os.environ[variable] = str(folder / name)
    tempfile.tempdir = None  # asked anew: it was read when something was imported


def said(error: Exception) -> str:
    """The compiler's own errors, or the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()]
    return " | ".join((errors or lines[:1] or [type(error).__name__])[:SHOWN_ERRORS])


def main() -> None:
    """The child."""
    serve(compile_package)


if __name__ == "__main__":
    main()
