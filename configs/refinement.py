"""How many frames and latents a refinement has: the original's padding, as arithmetic.

The DiT's sparse attention takes latents in groups of 4 along time, so the clean and the noisy
frames are each padded to that, whether or not attention is sparse.
"""

import math
from dataclasses import dataclass

from lcexport.configs.errors import UsageError
from lcexport.configs.presets import TEMPORAL_STRIDE

GROUP = 4  # latents along time, in one cube of the sparse attention
REFINE_SCALE = 64  # what refined heights and widths divide by: 16 pixels a token, 4 tokens a cube


@dataclass(frozen=True)
class RefineShape:
    """How many frames and latents a refinement has, and how many are padding.

    Attributes:
        stage_one_frames: of the video to refine.
        cond_frames: how many of the new frames are given, already refined: the first ones.
        spatial_only: larger frames, but not more of them.

    Raises:
        UsageError: there is no frame, or the condition leaves none to refine.
    """

    stage_one_frames: int
    cond_frames: int = 0
    spatial_only: bool = False

    def __post_init__(self) -> None:
        if self.stage_one_frames < 1:
            raise UsageError("there are no frames to refine", got=self.stage_one_frames)
        if not 0 <= self.cond_frames < self.new_frames:
            raise UsageError(
                "the condition leaves no frame to refine", got=f"{self.cond_frames} given frames",
                wanted=f"fewer than the {self.new_frames} refined ones",
            )  # fmt: skip

    @property
    def new_frames(self) -> int:
        """Refined frames, those of the condition included."""
        return self.stage_one_frames * (1 if self.spatial_only else 2)

    @property
    def cond_latents(self) -> int:
        """Latents of the condition, padding included; 0 without one."""
        if not self.cond_frames:
            return 0
        return whole_groups(1 + math.ceil((self.cond_frames - 1) / TEMPORAL_STRIDE))

    @property
    def noise_latents(self) -> int:
        """Latents to refine, padding included."""
        return whole_groups(math.ceil((self.new_frames - self.cond_frames) / TEMPORAL_STRIDE))

    @property
    def latents(self) -> int:
        return self.cond_latents + self.noise_latents

    @property
    def added_in_front(self) -> int:
        """Repetitions of the first frame, before the condition."""
        if not self.cond_frames:
            return 0
        return 1 + (self.cond_latents - 1) * TEMPORAL_STRIDE - self.cond_frames

    @property
    def added_at_end(self) -> int:
        """Repetitions of the last frame."""
        return self.noise_latents * TEMPORAL_STRIDE - (self.new_frames - self.cond_frames)

    @property
    def padded_frames(self) -> int:
        """What the VAE's encoder is given."""
        return self.added_in_front + self.new_frames + self.added_at_end

    @property
    def encoded_frames(self) -> int:
        """What the encoder looks at, and as many as the decoder gives back.

        Three fewer than `padded_frames` where there is no condition: the first latent holds one
        frame, not four, and the padding does not allow for it.
        """
        return 1 + (self.latents - 1) * TEMPORAL_STRIDE

    @property
    def kept(self) -> slice:
        """Which decoded frames are the result.

        Without a condition up to 3 fewer than `new_frames` can be left, where the padding is
        less than the 3 frames that the encoder leaves out: 96 frames become 189, not 192.
        """
        last = self.added_in_front + self.new_frames
        return slice(self.added_in_front, min(last, self.encoded_frames))


def whole_groups(latents: int) -> int:
    return math.ceil(latents / GROUP) * GROUP
