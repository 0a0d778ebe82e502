"""The package as a whole: what is shipped, what importing it costs, what its files may say."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from lcexport.bench import run
from lcexport.builder import aoti
from lcexport.engines.trt import probe, worker
from lcexport.qualify import costs

ROOT = Path(__file__).parent.parent
LINKS = ("engines", "runtime", "configs")
FOLDERS = ("lcexport", *LINKS, "tests", "benchmarks", "tools", "docs", ".ci")
TEXT = {".py", ".md", ".toml", ".json", ".txt", ".cfg", ".yml", ".yaml", ""}
# Absolute folders of somebody's machine. Put together here, so that this file does not match.
FORBIDDEN = ["/" + folder + "/" for folder in ("work", "root", "tmp/w")]


def project_files() -> list[Path]:
    """Every text file of the project, links not followed."""
    # A worktree's `.git` is a file, and names a folder of the machine.
    found = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    inside_links = tuple(ROOT / "lcexport" / link for link in LINKS)
    return [
        path
        for path in found
        if path.suffix in TEXT
        and "__pycache__" not in path.parts
        and not any(path.is_relative_to(link) for link in inside_links)
    ]


def packages() -> set[str]:
    """Every folder under lcexport/ that holds python files, links followed, as a package name."""
    top = ROOT / "lcexport"
    folders = {path.parent for path in top.rglob("*.py")}
    folders |= {path.parent for link in LINKS for path in (top / link).rglob("*.py")}
    return {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_the_version_is_known_without_torch():
    code = "import sys, lcexport; print(lcexport.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.split() == [version("lcexport"), "False"]


@pytest.mark.parametrize("module", [worker, probe, aoti, costs, run], ids=lambda m: m.__name__)
def test_a_file_in_the_current_folder_is_not_run_by_a_child(module, tmp_path: Path):
    """It is started as a child is, but says what it found instead of working."""
    (tmp_path / "lcexport.py").write_text("print('hostile')")
    python, *flags, how, _ = module.COMMAND
    assert how in ("-c", "-m")

    def said(*flags: str) -> str:
        words = [python, *flags, "-c", "import lcexport; print(lcexport.__file__)"]
        environment = worker.child_environment()
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.stdout

    assert said().startswith("hostile")
    assert Path(said(*flags).strip()).samefile(ROOT / "lcexport" / "__init__.py")


def test_an_unknown_attribute_of_the_package_is_an_attribute_error():
    import lcexport

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lcexport.nothing


def test_every_package_is_listed_for_the_wheel():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    assert set(listed) == packages()
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("name", LINKS)
def test_a_link_is_relative_and_leads_to_its_folder(name: str):
    link = ROOT / "lcexport" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert (ROOT / name).is_dir()


def test_every_module_says_what_it_is_for():
    files = [path for path in project_files() if path.suffix == ".py"]
    without = [
        path.relative_to(ROOT)
        for path in files
        if "tests" not in path.parts and not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert without == []


def test_what_the_documents_name_exists():
    """A path in backquotes or in a link, under a folder of the project, leads to something."""
    missing = []
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        text = document.read_text("utf-8")
        linked = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
        named = re.findall(rf"`(?:python )?((?:{'|'.join(FOLDERS)})/[\w./-]*)", text)
        missing += [
            f"{document.name}: {target}"
            for base, targets in ((document.parent, linked), (ROOT, named))
            for target in targets
            if "://" not in target and not target.startswith("mailto:")
            if not (base / target).exists()
        ]
    assert missing == []


def test_no_file_names_a_folder_of_somebodys_machine():
    named = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in project_files()
        for word in FORBIDDEN
        if re.search(rf"(?<![\w.}}-]){re.escape(word)}", path.read_text("utf-8", errors="replace"))
    ]
    assert named == []


@pytest.mark.parametrize(
    ("command", "heavy"), [("--help", {"pydantic"}), ("inspect", set()), ("inspect --json", set())]
)
def test_a_command_loads_no_library_that_it_has_no_use_for(command, heavy, demo_bundle):
    """Before a word is printed torch takes seconds to load, pydantic a tenth of one."""
    heavy = heavy | {"torch", "numpy", "onnx", "onnx_ir", "transformers", "diffusers", "PIL"}
    words = [*command.split(), *([str(demo_bundle)] if "inspect" in command else [])]
    code = (
        f"import atexit, sys; sys.argv = ['lcexport', *{words!r}];"
        f"atexit.register(lambda: print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr));"
        "from lcexport.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")
