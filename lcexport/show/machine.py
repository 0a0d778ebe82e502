"""What a machine can do, and what stands in the way of the rest."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from lcexport.doctor import Diagnosis, Gpu, Product, Verdict
from lcexport.show.console import amount, out, show_fact, show_text, table


def show_diagnosis(diagnosis: Diagnosis) -> None:
    """A machine, what each backend can do on it, and what stands in the way of the rest."""
    facts = diagnosis.facts
    cuda = f"built for CUDA {facts.torch_cuda}" if facts.torch_cuda else "built without CUDA"
    available, total = amount(facts.memory_available_bytes), amount(facts.memory_total_bytes)
    providers = ", ".join(facts.onnxruntime_providers)
    show_fact("lcexport", f"{facts.lcexport}, Python {facts.python}, {facts.platform}")
    show_fact("torch", f"{facts.torch}, {cuda}")
    show_fact("driver", f"up to CUDA {facts.driver_cuda}" if facts.driver_cuda else "none")
    for gpu in facts.gpus:
        show_fact("GPU", gpu_words(gpu))
    if not facts.gpus:
        show_fact("GPU", "none that torch sees")
    show_fact("memory", f"{available} available of {total}")
    show_fact("disk", f"{amount(facts.disk_free_bytes)} free in {facts.disk_folder}")
    show_fact("onnxruntime", f"{facts.onnxruntime or 'does not load'}  {providers}")
    for product in diagnosis.products:
        show_fact(product.name, product_words(product))
    out.print(verdict_table(diagnosis.verdicts))
    show_refusals(diagnosis.verdicts)


def gpu_words(gpu: Gpu) -> str:
    """A GPU's name, kind and memory."""
    free = "unknown" if gpu.free_bytes is None else amount(gpu.free_bytes)
    return f"{gpu.name}, {gpu.compute_capability}, {free} free of {amount(gpu.total_bytes)}"


def product_words(product: Product) -> str:
    """How far one of the TensorRT products gets here."""
    state = product.state
    if not product.installed:
        return "not installed"
    if not product.loads:
        return "crashes" if state.crashed else "installed, does not load"
    if not state.builder:
        return f"{state.version}, loads, cannot make a builder"
    return f"{state.version}, compiles for {', '.join(state.targets) or 'the GPU that is here'}"


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """Where each backend builds and runs: the devices, or no."""
    rows = table("Backends", "backend", "precision", "build", "run")
    for backend, precision in dict.fromkeys((v.backend, v.precision) for v in verdicts):
        found: dict[str, list[str]] = {"build": [], "run": []}
        for verdict in verdicts:
            if (verdict.backend, verdict.precision) == (backend, precision) and not verdict.error:
                found[verdict.action].append(verdict.device)
        no = Text("no", "yellow")
        cells = (", ".join(found[action]) or no for action in ("build", "run"))
        rows.add_row(backend, precision, *cells)
    return rows


def show_refusals(verdicts: Sequence[Verdict]) -> None:
    """Each reason once, after all that it stands in the way of."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for verdict in verdicts:
        if verdict.error is not None:
            key = (f"{verdict.backend} {verdict.precision}", str(verdict.error))
            reasons.setdefault(key, []).append(f"{verdict.action} on {verdict.device}")
    for (engine, reason), barred in reasons.items():
        show_text(f"no {engine} ({', '.join(barred)}):")
        show_text(f"    {reason}")
