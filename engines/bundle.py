"""The bundle: a folder that holds everything a deployment needs, and the manifest that says what.

    manifest.json              `lcexport.engines.manifest`
    dit.safetensors            the DiT's weights, native names, one file for every resolution
    dit.<graph>.onnx           one graph per task and resolution; initialisers are ranges of it
    dit.<graph>.ort.onnx       the same with ONNX Runtime's fused operations, for processors
    transformer/config.json    the DiT's configuration
    text_encoder/ tokenizer/ vae/ scheduler/   as in the checkpoint
    engines/<backend>/<graph or component>/    compiled plans and packages
    golden/<graph>.safetensors                 inputs and reference outputs for `verify`
    lora/base/                 where LoRAs were baked in: what they replaced, to go back to
    lora/next/                 a change decided and not finished: no reader opens such a bundle

A graph's name is its resolution's, followed by the task where that is not text-to-video: `480p`,
`480p.i2v`, `480p.vc.cache`.

Nothing here writes: bundles are written by `lcexport.builder`. Nothing here needs a GPU.
"""

import shlex
from pathlib import Path, PurePosixPath

from lcexport.configs.errors import IntegrityError, UsageError
from lcexport.configs.tasks import build_words, job_name, task_in
from lcexport.engines.files import identity, sha256_of
from lcexport.engines.manifest import (
    STAGE_OPTIONS,
    WEIGHTS,
    FileRecord,
    GraphRecord,
    Manifest,
    read_manifest,
)

ALWAYS_HASHED_BYTES = 64 << 20  # files up to this size are hashed on every opening


class Bundle:
    """An opened bundle: its manifest, and paths that were checked to lie inside it.

    Attributes:
        weights: which weights file the manifest was read with.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.weights = identity(folder / WEIGHTS)

    def path(self, name: str) -> Path:
        """Path of one file of the manifest."""
        if name not in self.manifest.files:
            raise IntegrityError(f"the bundle {self.folder} has no file {name}")
        return self.folder / name

    def graph(self, name: str) -> GraphRecord:
        """The graph of that name; UsageError names the ones there are."""
        graphs = self.manifest.graphs
        if name in graphs:
            return graphs[name]
        resolution, task, _ = task_in(name)
        raise UsageError(
            f"the bundle {self.folder} was not built for this",
            got=repr(name),
            wanted=f"one of {', '.join(graphs)}",
            do=f"Add it: {self.adding(resolution, task)}",
        )

    def adding(self, resolution: str, task: str) -> str:
        """The command that adds a task's graphs, made as those that the bundle has."""
        options = self.manifest.options_for(resolution, task)
        words = ["lcexport", "build", *build_words(resolution, task, options)]
        for option, (name, default) in STAGE_OPTIONS.items():
            value = options.get(name, default)
            if value is True:
                words += [option]
            elif value != default:
                words += [option, ",".join(value) if isinstance(value, list) else str(value)]
        return shlex.join([*words, "--add", "-o", str(self.folder)])

    @property
    def most_cond_frames(self) -> int | None:
        """As many frames as any graph goes on from; None where none does."""
        return max(graph.job.cond_frames for graph in self.manifest.graphs.values()) or None

    def job_graph(self, resolution: str, task: str, part: str = "denoise") -> GraphRecord:
        """The graph that does a part of a task at a resolution; UsageError as `graph`."""
        return self.graph(job_name(resolution, task, part))

    def check_files(self, *, every_hash: bool = False) -> None:
        """Compare each file with the manifest: size always, SHA-256 where small or asked for.

        Raises:
            IntegrityError: a file is missing, is a link, or differs; names the file.
        """
        for name, record in self.manifest.files.items():
            for inner in PurePosixPath(name).parents[:-1]:
                if (self.folder / inner).is_symlink():
                    raise IntegrityError(f"{self.folder / inner} is a link, not a folder")
            check_file(self.folder / name, record, hashed=every_hash)


def open_bundle(folder: str | Path, *, every_hash: bool = False) -> Bundle:
    """Read a bundle's manifest and check its files.

    Raises:
        IntegrityError: no bundle, a file that is not the one the manifest names, or weights that
            were exchanged meanwhile.
        IncompatibleError: the bundle has another schema version.
    """
    folder = Path(folder)
    before = identity(folder / WEIGHTS)
    bundle = Bundle(folder, read_manifest(folder))
    bundle.check_files(every_hash=every_hash)
    if not before == bundle.weights == identity(folder / WEIGHTS):
        raise IntegrityError(
            f"the weights of {folder} were exchanged while it was opened", do="Open it again."
        )
    return bundle


def check_file(
    path: Path,
    record: FileRecord,
    *,
    hashed: bool,
    do: str = "Copy the bundle again, or rebuild it.",
) -> None:
    """Compare one file with its record; a link never passes, whatever it points to."""
    if path.is_symlink() or not path.is_file():
        raise IntegrityError(f"{path} is missing or not a regular file", do=do)
    size = path.stat().st_size
    if size != record.bytes:
        raise IntegrityError(f"{path} has another size", got=size, wanted=record.bytes, do=do)
    if hashed or size <= ALWAYS_HASHED_BYTES:
        digest = sha256_of(path)
        if digest != record.sha256:
            raise IntegrityError(
                f"{path} is damaged: its SHA-256 differs", got=digest, wanted=record.sha256, do=do
            )
