"""How far one tensor is from another, and how far it may be."""

from dataclasses import asdict, dataclass

import torch

from lcexport.engines.manifest import Precision


@dataclass(frozen=True)
class Difference:
    """`max_abs` and `mean_abs` in the tensors' unit; `relative_l2` = |a - b| / |b|; `cosine`."""

    max_abs: float
    mean_abs: float
    relative_l2: float
    cosine: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Tolerance:
    """Bounds on a `Difference`: the relative error from above, the cosine from below."""

    relative_l2: float
    cosine: float

    def holds(self, difference: Difference) -> bool:
        """Whether the difference is inside; never for NaN."""
        return difference.relative_l2 <= self.relative_l2 and difference.cosine >= self.cosine


# One forward pass of the whole DiT. float32 engines differ by the order of their sums: 1e-6 seen.
# In bfloat16 the same is true of 8-bit mantissas: 7e-3 seen between two correct evaluations.
STEP_TOLERANCE: dict[Precision, Tolerance] = {
    "fp32": Tolerance(relative_l2=1e-4, cosine=0.99999),
    "bf16": Tolerance(relative_l2=4e-2, cosine=0.999),
}
# Sampling feeds each step's error to the next.
VIDEO_TOLERANCE: dict[Precision, Tolerance] = {
    "fp32": Tolerance(relative_l2=1e-3, cosine=0.9999),
    "bf16": Tolerance(relative_l2=1e-1, cosine=0.995),
}
# The text encoder, or the pixels of a latent frame, compiled: the library's operations, sums in
# another order. In bfloat16 they round as often in either order, and are a shorter way than the
# DiT's 48 blocks: a quarter of a step's bound. benchmarks/components.py prints what is seen.
COMPONENT_TOLERANCE: dict[Precision, Tolerance] = {
    "fp32": Tolerance(relative_l2=1e-5, cosine=0.99999),
    "bf16": Tolerance(relative_l2=1e-2, cosine=0.9999),
}


def difference(got: torch.Tensor, wanted: torch.Tensor) -> Difference:
    """Compare in float64. Shapes must agree."""
    if got.shape != wanted.shape:
        raise ValueError(f"shapes differ: {list(got.shape)} and {list(wanted.shape)}")
    a, b = got.double().flatten().cpu(), wanted.double().flatten().cpu()
    error = (a - b).abs()
    tiny = torch.finfo(torch.float64).tiny
    lengths = a.norm() * b.norm()
    alike = 1.0 if torch.equal(a, b) else (a @ b / lengths.clamp_min(tiny)).item()
    return Difference(
        max_abs=error.max().item(),
        mean_abs=error.mean().item(),
        relative_l2=((a - b).norm() / b.norm().clamp_min(tiny)).item(),
        cosine=alike,  # equal tensors are alike, also where they are zero
    )
