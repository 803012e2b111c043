"""Who may import whom, as a dict: the design's table, held by an `ast` walk over the package."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "miinb"

CORE = (
    *("errors", "bench_fields", "config", "image_params", "messages", "image_messages", "tasks", "models", "pipelines"),
    *("seconds", "wording", "writing", "image_metadata", "png_files", "image_difference", "image_sources", "samplers"),
)
KERNEL_SIDE = (
    "client",
    "results",
    "image_results",
    "image_asking",
    "image_answers",
    "image_calls",
    "predictions",
    "predicting",
    "streams",
    "asking",
    "awaiting",
    "queries",
    "checking",
    "session",
    "deployment",
    "registry",
    "planner",
    "encoder_planner",
    "image_planner",
    "families",
    "fitting",
    "quantized_planner",
    "calibration",
    "offloading",
    "preparation",
    "splitting",
    "hardware",
    "compat",
)

#: The engine's description of models: data without torch, so that what a model needs is known before a start.
POLICY_DATA = (
    "engine.policies",
    "engine.spec",
    "engine.encoder_spec",
    "engine.diffusion_spec",
    "engine.image_parameters",
    "engine.labels",
    "engine.parameters",
)

#: Parts that a part may import when it loads (its own always). A module's own row holds over its package's.
ALLOWED: dict[str, tuple[str, ...]] = {
    "": (),
    "errors": (),
    "frozen": ("errors",),
    "seconds": ("errors", "frozen"),
    "bench_fields": ("errors", "frozen"),
    "config": ("errors", "frozen", "bench_fields", "offloading"),
    "image_params": ("errors", "frozen", "config", "samplers"),
    "samplers": (),
    "messages": ("config", "errors"),
    "image_messages": ("image_params",),
    "image_metadata": ("errors", "image_params", "png_files", "samplers"),
    "png_files": (),
    "image_difference": ("errors", "wording"),
    "image_sources": ("errors", "image_params", "image_messages"),
    "tasks": ("errors", "messages", "config"),
    "checkpoint": ("errors",),
    "location": ("errors",),
    "pipelines": ("errors", "checkpoint", "tasks", *POLICY_DATA),
    "models": ("errors", "config", "messages", "tasks", "checkpoint", "location", "pipelines", *POLICY_DATA),
    "families": ("models", *POLICY_DATA),
    "rpc": ("messages", "image_messages", "image_params", "errors", "config", "frozen"),
    "kernels": (),
    "engine": (
        "hardware",
        "kernels",
        "config",
        "tasks",
        "checkpoint",
        "models",
        "pipelines",
        "image_params",
        "messages",
        "image_messages",
        "errors",
        "wording",
        "splitting",
        "fitting",
        "quantized_planner",
        "calibration",
        "offloading",
    ),
    "server": (
        "rpc",
        "config",
        "frozen",
        "image_params",
        "messages",
        "image_messages",
        "image_metadata",
        "image_sources",
        "errors",
        "tasks",
        "registry",
        "seconds",
        "spinning",
        "hardware",
    ),
    "server.worker": ("engine", "config", "messages", "image_messages", "errors", "tasks", "spinning"),
    "hardware": (),
    "spinning": (),
    "wording": (),
    "writing": ("errors",),
    "diagnosis": ("registry", "hardware", "wording"),
    "splitting": CORE,
    "encoder_planner": (*CORE, "hardware"),
    "image_planner": (*CORE, "fitting", "quantized_planner", "calibration"),
    "fitting": (*CORE, "hardware", "quantized_planner"),
    "calibration": ("errors", "wording"),
    "offloading": ("errors",),
    "quantized_planner": (*CORE, "hardware", "calibration"),
    "planner": (*CORE, "hardware", "splitting", "encoder_planner", "image_planner", "fitting", "quantized_planner"),
    "preparation": (*CORE, "planner", "hardware", "location", "calibration", "offloading"),
    "registry": CORE,
    "launching": ("errors",),
    "log_files": ("errors",),
    "deployment": (*CORE, "registry", "hardware", "launching", "log_files"),
    "results": CORE,
    "image_results": (*CORE, "results"),
    "image_asking": CORE,
    "image_answers": (*CORE, "results", "image_results"),
    "image_calls": (*CORE, "awaiting", "rpc", "results", "image_answers", "image_results", "streams"),
    "predictions": CORE,
    "predicting": (*CORE, "rpc"),
    "request_log": ("results",),
    "streams": (*CORE, "rpc", "results"),
    "asking": CORE,
    "awaiting": (),
    "client": (
        *("image_asking", "image_answers", "image_calls", "image_results"),
        *(*CORE, "frozen", "rpc", "results", "predictions", "predicting", "streams", "asking", "awaiting"),
        *("spinning", "request_log"),
    ),
    "cell": (*CORE,),
    "queries": (*CORE, "results", "image_results", "predictions", "client"),
    "session": (
        *("cell", *CORE, "rpc", "results", "asking", "client", "queries"),
        *("registry", "deployment", "preparation", "request_log"),
    ),
    "checking": (*CORE, "launching", "planner", "hardware"),
    "constants": (),
    "compat": (*CORE, "constants", "rpc", "results", "queries", "client", "session", "registry", "offloading"),
    "bench": (*CORE, "cell", "client", "session", "results", "hardware", "launching", "rpc.address"),
    "bench.scheduler_overhead": ("engine", "config", "messages"),
    "bench.collective_ranks": ("engine", "kernels"),
    "bench.images": ("bench", "engine"),
    "bench.image_folder": ("bench", "engine.clip_tokenizer"),
    "bench.image_arms": ("bench", "engine"),
    "bench.several_gpus": ("bench", "demo", "errors", "models", "session", "writing"),
    "bench.layer_time": ("bench", "engine", "models"),
    "bench.headline": (
        *("bench", "config", "messages", "errors", "models", "session", "hardware", "launching", "spinning", "wording"),
    ),
    "bench.headline.arms": ("bench", "engine", "config", "messages", "errors", "models", "planner", "hardware"),
    "bench.quality": ("bench", "config", "errors", "models", "preparation", "quantized_planner", "wording"),
    "bench.quality.engine_side": ("bench", "engine", "config", "errors"),
    "bench.encoders": (
        *("bench", "config", "messages", "errors", "tasks", "client", "predictions", "session", "hardware", "wording"),
    ),
    "bench.encoders.engine_side": ("bench", "engine", "config", "messages", "errors", "models", "planner", "hardware"),
    "bench.headline.profile": ("bench", "engine", "config", "messages", "errors"),
    "notebook": (*CORE, *KERNEL_SIDE, "cell", "bench", "commands", "demo", "rpc"),
    "commands": (*CORE, "frozen", *KERNEL_SIDE, "bench", "demo"),
    "cli": (*CORE, *KERNEL_SIDE, "bench", "commands", "demo", "notebook"),
    "__main__": ("cli",),
    "demo": (*CORE, *KERNEL_SIDE, "cell", "bench"),
    "demo.image_parts": ("demo", "engine.clip_tokenizer"),
    "demo.train_images": ("demo", "engine.previews"),
    "targets": ("config", "errors"),
}

#: Third parties that a part must not touch even inside functions: the kernel process stays without torch.
HEAVY = ("torch", "deepspeed", "transformers", "diffusers", "triton")
#: Third parties that the engine's side may load.
MAY_BE_HEAVY = (
    "engine",
    "kernels",
    "server.worker",
    "bench.collective_ranks",
    "bench.device_map",
    "bench.encoders.arms",
    "bench.encoders.checkpoints",
    "bench.encoders.engine_side",
    "bench.encoders.pipelines",
    "bench.encoders.plain_side",
    "bench.images",
    "bench.image_arms",
    "bench.layer_time",
    "bench.image_folder",
    "bench.headline.arms",
    "bench.headline.floors",
    "bench.quality.engine_side",
    "bench.headline.profile",
    "bench.headline.continuous",
    "bench.scheduler_overhead",
    "bench.startup",
    "demo.image_parts",
    "demo.train",
    "demo.train_encoders",
    "demo.train_images",
)
#: Third parties that must not load with a part (inside functions they may).
LAZY_EVERYWHERE = ("matplotlib", "pandas", "IPython", "ipywidgets")
LAZY_EXEMPT = ("bench", "notebook")

DRAWERS = {"utils", "util", "common", "helpers", "base", "misc"}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if "_pb2" in path.name:
            continue
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        found[name] = ast.parse(path.read_text(), str(path))
    return found


MODULES = modules()


def imports(tree: ast.AST, module: str, *, inside_functions: bool) -> set[str]:
    """Absolute names that a module imports (those of function bodies if asked). TYPE_CHECKING is skipped."""
    found: set[str] = set()
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"miinb.{module}: relative import; write the full name"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            stack.extend(node.orelse)
            continue
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not inside_functions:
            continue
        stack.extend(ast.iter_child_nodes(node))
    return found


def part_of(module: str) -> str:
    """The row of `ALLOWED` that holds for a module: its own, else that of the nearest package around it."""
    while module not in ALLOWED and "." in module:
        module = module.rpartition(".")[0]
    return module


def internal(names: set[str]) -> set[str]:
    """Modules of the package among imported names ("miinb.x.y" may be a module or something in miinb.x)."""
    found = set()
    for name in names:
        if name == "miinb" or not name.startswith("miinb."):
            continue
        inner = name.removeprefix("miinb.")
        if inner in MODULES:
            found.add(inner)
        elif inner.rpartition(".")[0] in MODULES:
            found.add(inner.rpartition(".")[0])
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_follow_the_table(module: str) -> None:
    part = part_of(module)
    assert part in ALLOWED, f"miinb.{module}: give its part a row in ALLOWED"
    allowed = {part, module.split(".")[0], *ALLOWED[part]}
    if part in ("notebook", "bench", "bench.headline"):
        allowed.discard("")
    for target in internal(imports(MODULES[module], module, inside_functions=False)):
        if target == "":
            continue
        top = target.split(".")[0]
        assert top in allowed or target in allowed, f"miinb.{module} may not import miinb.{target}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_engine_is_imported_by_the_rank_alone(module: str) -> None:
    if module.split(".")[0] in ("engine", "kernels") or module in MAY_BE_HEAVY:
        return
    targets = internal(imports(MODULES[module], module, inside_functions=True))
    wrong = {t for t in targets if t.split(".")[0] in ("engine", "kernels")}
    wrong -= set(POLICY_DATA) if module in ("models", "families", "pipelines") else set()
    assert not wrong, f"miinb.{module} imports {sorted(wrong)}"
    if module.split(".")[0] != "server":
        assert not [t for t in targets if t.startswith("server")], (
            f"miinb.{module} imports the server; start it by module name"
        )


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith(POLICY_DATA)))
def test_policies_are_data(module: str) -> None:
    names = imports(MODULES[module], module, inside_functions=True)
    assert not {name.split(".")[0] for name in names} & set(HEAVY)
    assert all(target == "errors" or target.startswith(POLICY_DATA) for target in internal(names))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_torch_stays_in_the_ranks(module: str) -> None:
    if part_of(module) in MAY_BE_HEAVY or module in MAY_BE_HEAVY or module.split(".")[0] in ("engine", "kernels"):
        return
    tops = {name.split(".")[0] for name in imports(MODULES[module], module, inside_functions=True)}
    assert not tops & set(HEAVY), f"miinb.{module} imports {sorted(tops & set(HEAVY))}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_parts_load_late(module: str) -> None:
    if module.split(".")[0] in LAZY_EXEMPT:
        return
    tops = {name.split(".")[0] for name in imports(MODULES[module], module, inside_functions=False)}
    assert not tops & set(LAZY_EVERYWHERE), f"miinb.{module} loads {sorted(tops & set(LAZY_EVERYWHERE))} at import"


def test_no_import_cycle() -> None:
    graph = {m: internal(imports(t, m, inside_functions=False)) - {m} for m, t in MODULES.items()}
    graph = {m: {t for t in targets if t != "" and not m.startswith(t + ".")} for m, targets in graph.items()}
    done: set[str] = set()

    def walk(node: str, path: tuple[str, ...]) -> None:
        assert node not in path, f"import cycle: {' -> '.join([*path[path.index(node) :], node])}"
        if node in done:
            return
        for target in graph[node]:
            walk(target, (*path, node))
        done.add(node)

    for node in graph:
        walk(node, ())


def test_shape() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        if "_pb2" in path.name:
            continue
        source = path.read_text()
        assert path.stem not in DRAWERS, f"{path.name}: name the module after what it does"
        assert source.count("\n") <= 400, f"{path.relative_to(PACKAGE)} has more than 400 lines"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name} has {length} lines"


def test_importing_the_package_is_light() -> None:
    import subprocess

    probe = f"import sys, miinb; print([m for m in {(*HEAVY, *LAZY_EVERYWHERE)!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


def test_nothing_unpickles_or_evaluates() -> None:
    forbidden = {"pickle", "marshal", "shelve", "cloudpickle"}
    for module, tree in MODULES.items():
        tops = {name.split(".")[0] for name in imports(tree, module, inside_functions=True)}
        assert not tops & forbidden, f"miinb.{module} imports {sorted(tops & forbidden)}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"miinb.{module}:{node.lineno} calls {node.func.id}"
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not (isinstance(node.value, ast.Constant) and node.value.value is True), (
                    f"miinb.{module}: trusts code"
                )
