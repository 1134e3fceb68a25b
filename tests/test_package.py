"""The package: the mapping of rooms, what the rooms may import, the wheel, and what the README promises of the tree."""

import ast
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("bench", "clients", "serve", "train")
# room -> rooms whose modules it may import; see docs/design.md
MAY_IMPORT = {"clients": set(), "train": {"clients"}, "bench": {"clients"}, "serve": {"clients", "train"}}
# Of `train`, serving reads only what needs no torch.
TRAIN_FOR_SERVE = {"adapters", "base_model", "config", "manifest", "weights"}
HEAVY = {"torch", "transformers", "peft", "vllm", "datasets", "bitsandbytes", "accelerate"}
# Programs that `loraport bench train` starts and no module imports, and what of another room they may import: a peer is
# measured on the same base by the same clock as ours.
PROGRAMS = {
    "bench/contenders/peers.py": {"loraport.train.loop.random_base", "loraport.train.loop.step_clock"},
    "train/loop/measure.py": set(),
    "train/loop/probe.py": set(),
}
# What only a running training imports: the loop, and what lets the model speak.
# serve/tuning/bench.py runs in a process of its own, in the engine's Python.
TORCH_MODULES = ("train/loop/", "train/proof/generate.py", "train/proof/golden.py", "serve/tuning/bench.py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """Names of the modules that a file imports, and whether at its top level."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, id(node) in top))
    return found


@pytest.mark.parametrize("path", sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py")), ids=str)
def test_rooms_import_only_what_they_may(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    room = name.split("/")[0]
    for module, at_top in imports(path):
        if module.startswith("loraport.") and module not in PROGRAMS.get(name, ()):
            _, other, *rest = module.split(".")
            assert other == room or other in MAY_IMPORT[room], f"{name} imports {module}"
            if room == "serve" and other == "train":
                assert rest and rest[0] in TRAIN_FOR_SERVE, f"{name} imports {module}"
            assert f"{'/'.join([other, *rest])}.py" not in PROGRAMS, f"{name} imports {module}"
        heavy = module.split(".")[0] in HEAVY and name not in PROGRAMS
        assert not (heavy and at_top and not name.startswith(TORCH_MODULES)), (
            f"{name} imports {module} when it is imported"
        )
        assert not (heavy and room != "train" and name not in TORCH_MODULES), f"{name} imports {module}"


def test_a_run_imports_torch_only_when_there_is_something_to_train() -> None:
    code = "import sys, loraport.train.run; print({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed.strip() == "set()"


def test_every_package_on_disk_is_declared() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {
        "loraport." + path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for room in ROOMS
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert set(setup["packages"]) == on_disk
    assert setup["package-dir"] == {f"loraport.{room}": room for room in ROOMS}


def test_the_readme_shows_the_tree_as_it_is() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    shown = re.search(r"<!-- tree -->\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert shown, "README.md has no tree"
    folder, named = "", set()
    for line in shown.group(1).splitlines():
        entry = line.split("  ")[0] if not line.startswith("  ") else line.strip().split("  ")[0]
        if line.startswith("  "):
            named.add(folder + entry.rstrip("/"))
        else:
            folder = entry if entry.endswith("/") else ""
            named.add(entry.rstrip("/"))
    code = {path for path in listed if path.endswith(".py") and path.split("/")[0] in ROOMS}
    code -= {path for path in code if path.endswith("__init__.py")}
    assert code - named == set(), "not in the README's tree"
    exists = set(listed) | {"/".join(path.split("/")[:n]) for path in listed for n in range(1, path.count("/") + 1)}
    assert named - exists == set(), "in the README's tree, but not in the repository"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the tracked files alone."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    tar = subprocess.run(["tar", "c", "--null", "-T", "-"], cwd=ROOT, input=listed, capture_output=True, check=True)
    subprocess.run(["tar", "x", "-C", source], input=tar.stdout, check=True)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source]
    subprocess.run(build, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_installs_into_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True, cwd=tmp_path)
    run = subprocess.run(
        [tmp_path / "empty/bin/loraport", "--help"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "train" in run.stdout and "serve" in run.stdout
    listed = subprocess.run(
        [python, "-c", "import importlib.metadata as m; print([str(f) for f in m.files('loraport')])"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    ).stdout
    assert "loraport/train/run.py" in listed
    assert not re.search(r"'(train|serve|bench|clients)/", listed), "a wheel must not install a module called train"
    for command in ("env", "eval", "chat", "adapters", "serve", "train"):  # each room imports without torch or vLLM
        subprocess.run(
            [tmp_path / "empty/bin/loraport", command, "--help"], check=True, capture_output=True, cwd=tmp_path
        )


def test_licence_and_changelog_are_there() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
