"""Modules import only from floors below their own; importing the package loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import krea_local

PACKAGE = Path(krea_local.__file__).parent
FLOORS = [
    {"errors", "_version", "flags", "background"},
    {"paths"},
    {"schema", "recipe", "sampling", "progress", "tiny", "kernels", "attention"},
    {"tensor_names", "checksums", "preview"},
    {"images", "weights", "memory", "result", "layers", "vae", "endpoints"},
    {"plan", "packed"},
    {"streaming", "rates"},
    {"files", "transformer", "transfer"},
    {"reading"},
    {"formats"},
    {"components", "lora"},
    {"any_format"},
    {"loading", "lora_files", "skipping", "cluster"},
    {"safety", "text", "speed", "fetching", "verifying", "converting"},
    {"engine"},
    {"adapting", "placing"},
    {"pipeline"},
    {"api", "info", "repeat"},
    {"server"},
    {"serving"},
    {"cli", "__init__", "fal_client"},
    {"__main__"},
]
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}


def imported(module: str) -> set[str]:
    """The modules that one imports; a package is one module."""
    files = [*PACKAGE.glob(f"{module}.py"), *PACKAGE.glob(f"{module}/*.py")]
    assert files
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "krea_local":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("krea_local."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("krea_local") for alias in node.names)
    return found - ({module} if (PACKAGE / module).is_dir() else set())


def test_every_module_has_a_floor() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(FLOOR) == {path.stem for path in PACKAGE.glob("*.py")} | packages


def test_imports_only_point_down() -> None:
    climbs = [
        f"{module} imports {other}"
        for module in FLOOR
        for other in imported(module)
        if FLOOR[other] >= FLOOR[module]
    ]
    assert climbs == []
    assert "weights" in imported("loading")  # the walk sees imports at all
    assert "pipeline" in imported("api")  # and those inside functions


def test_importing_the_package_and_validating_loads_no_torch() -> None:
    code = """
import sys
import krea_local
from krea_local import api, cli, images, info, recipe, schema, weights
for call in (
    lambda: krea_local.txt2img("x", num_images=9),
    lambda: krea_local.img2img("x", image_url=""),
    lambda: krea_local.load("tiny", acceleration="most"),
    lambda: weights.find("nowhere"),
    lambda: krea_local.download("nowhere"),
    lambda: krea_local.verify("nowhere"),
):
    try:
        call()
    except krea_local.KreaError as error:
        print(type(error).__name__)
heavy = {"torch", "diffusers", "transformers", "numpy", "huggingface_hub", "httpx", "tqdm"}
print(sorted(heavy & set(sys.modules)))
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == ["InvalidRequest"] * 3 + ["WeightsNotFound"] * 3 + ["[]"]


def test_exported_names_are_what_is_documented_and_there() -> None:
    assert krea_local.__all__ == sorted(krea_local.__all__)
    for name in krea_local.__all__:
        value = getattr(krea_local, name)
        assert name == "__version__" or value.__doc__
    public = {name for name in vars(krea_local) if name[0] != "_" and name[0].isupper()}
    assert public - {"TYPE_CHECKING", "Any"} <= set(krea_local.__all__)
    assert "Krea" in krea_local.__all__


def test_every_error_stands_in_the_tree() -> None:
    from krea_local import errors

    tree = errors.__doc__ or ""
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, (Exception, Warning)):
            assert name in tree
            assert name in krea_local.__all__
            assert issubclass(kind, (errors.KreaError, errors.KreaWarning))
