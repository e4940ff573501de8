"""Imports go downward only, so that all below the edge runs on a laptop, and on a GPU machine without Ray."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import raybert

LAYERS = (  # from the bottom; a module imports from layers below its own
    (
        "allocator",
        "canvas",
        "config",
        "errors",
        "events",
        "finding",
        "hold",
        "jit",
        "notice",
        "order",
        "processes",
        "progress",
        "retry",
        "scratch",
        "snapshot",
        "splitmix",
        "straggler",
        "view",
    ),
    (
        "chance",
        "checks",
        "config_file",
        "crc",
        "deal",
        "display",
        "flops",
        "inbox",
        "listener",
        "model_garden",
        "storage",
    ),
    ("compression", "entry", "history", "manifest", "wordpiece"),
    ("corpus", "masking"),
    ("cadence", "goodput", "guard", "proof", "tfrecord"),
    ("ledger",),
    ("begin", "example", "options"),
    ("census", "index", "instances", "vocab"),
    ("deck", "inspection"),
    ("dataset",),
    ("feed",),
    ("dropout", "optim", "softmax", "stopwatch", "world"),
    ("projection",),
    ("attention", "loss"),
    ("batch",),
    ("model", "plan", "tensorflow_checkpoint"),
    ("float8",),
    ("pretrained", "step"),
    ("weights",),
    ("capacity", "checkpoint", "cloze", "convert", "evaluate", "loop", "telemetry"),
    ("agent", "interface", "lookout", "preflight", "trackers"),
    ("chronicle", "scores", "trial", "verify"),
    ("charts",),
    ("page",),
    ("report",),
    ("cluster", "failures", "gauges", "ingest", "peers"),
    ("tasks", "worker"),
    ("prepare",),
    ("spares", "starts"),
    ("scaling",),
    ("doctor", "launch", "tuning"),
    ("bench_data", "figure"),
    ("bench_decode", "bench_step"),
    ("bench_checkpoint",),
    ("bench_ray", "bench_scale"),
    ("bench",),
    ("cli",),
    ("__init__", "__main__"),
)
LEVELS = {module: level for level, modules in enumerate(LAYERS) for module in modules}
PURE = {module for module, level in LEVELS.items() if level <= LEVELS["feed"]}
ONLY = {  # what only these may import
    "ray": {
        "agent",
        "begin",
        "bench_ray",
        "bench_scale",
        "cluster",
        "doctor",
        "failures",
        "gauges",
        "ingest",
        "interface",
        "launch",
        "lookout",
        "peers",
        "scaling",
        "spares",
        "starts",
        "tasks",
        "tuning",
        "worker",
    },
    "torch.distributed": {"world"},
    "torch.nn.parallel": {"world"},
    "torch": LEVELS.keys() - PURE,
}
FOLDER = Path(raybert.__file__).parent
MODULES = sorted(path.stem for path in FOLDER.glob("*.py"))


def imports(source):
    """Every module that a source imports, wherever in it, with the names taken from it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(source):
    """The modules of ours among them: of raybert.storage.Directory, storage."""
    return {name.split(".")[1] for name in imports(source) if name.startswith("raybert.")}


def is_of(name, package):
    return name == package or name.startswith(f"{package}.")


def test_every_module_has_its_layer():
    assert sorted(LEVELS) == MODULES and sum(map(len, LAYERS)) == len(LEVELS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward(module):
    source = (FOLDER / f"{module}.py").read_text()
    upward = {name for name in own_imports(source) if LEVELS[name] >= LEVELS[module]}
    assert not upward, f"{module} imports {sorted(upward)}, which is not below it"


@pytest.mark.parametrize("package", ONLY)
def test_only_some_modules_import(package):
    importers = {
        module
        for module in MODULES
        if any(is_of(name, package) for name in imports((FOLDER / f"{module}.py").read_text()))
    }
    assert importers <= ONLY[package]


def test_the_test_sees_imports():
    source = (
        "import ray.data\ndef f():\n from torch import distributed\n from raybert import feed\n import raybert.loop"
    )
    assert list(imports(source)) == ["ray.data", "torch.distributed", "raybert.feed", "raybert.loop"]
    assert own_imports(source) == {"feed", "loop"}


def test_the_process_that_all_workers_wait_for_imports_no_torch():
    """It starts with every group of them; torch takes a second."""
    code = "import sys, raybert.begin, raybert.inbox, raybert.ingest; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
