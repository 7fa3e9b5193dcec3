"""Run tests on a mutant, in a copy of the checkout and in a process forked from one that has imported slow packages.

Modules of this project are removed after the fork, so the fork imports the mutant.
"""

import gc
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from common.errors import ConfigurationError
from tests.mutants.draw import Mutant

SLOW_IMPORTS = (
    "pytest", "numpy", "torch", "torch.distributed.pipelining", "torch.nn.attention.flex_attention", "deepspeed",
    "megatron.core", "hydra", "safetensors.torch", "scipy.ndimage", "sentencepiece", "PIL.Image", "rich.table",
    "transformers.models.mt5.modeling_mt5", "transformers.optimization",
)  # fmt: skip
CPU_S = 240  # limit of one test in CPU time, which other programs on the machine do not use up
REAL_S = 900  # limit of one test in wall time, for tests that wait forever; a test may set its own
NOTHING_RUNS = 5  # pytest's exit code where every test is left out
DEFAULTS = "tests/unit/train/test_configuration_page.py"  # compares those of every setting, whatever its folder
# Code that needs several processes is tested in worlds of two.
ENGINES, CHECKPOINTS = "tests/distributed/test_engines.py", "tests/distributed/test_checkpoints.py"
FORMULAS = "tests/distributed/test_benchmark_formulas.py"  # what an engine sends, byte for byte
WORLDS = {
    "model/": "tests/distributed/test_model_tensor_parallel.py",
    "parallel/": ENGINES,
    "parallel/engine/": FORMULAS,
    "parallel/checkpoint/": CHECKPOINTS,
}


class Runner:
    """Run mutants one after another; `stage` names the tests that the last one reached."""

    def __init__(self, root: Path, folder: Path, further: bool) -> None:
        self.copy, self.log, self.current = folder / "copy", folder / "log", folder / "current"
        self.further, self.stage = further, ""
        _copy(root, self.copy)
        os.environ["OMP_NUM_THREADS"] = "1"  # torch's threads do not survive a fork
        self.green: set[str] = set()  # tests that pass without a mutant
        self.red: set[str] = set()  # tests that fail without one (timing on a busy machine) -> left out
        for name in SLOW_IMPORTS:
            with suppress(ImportError):
                import_module(name)

    def reach(self, mutant: Mutant) -> str | None:
        """Return the name of a test that fails on the mutant twice, and passes without it; None if it survives."""
        for stage, tests, environment in self._stages(mutant):
            self.stage = stage
            passed: set[str] = set()  # tests that failed once and then passed, as on a busy machine
            while killer := self._killer(tests, environment, mutant, passed):
                if not self._is_green(killer, environment):
                    continue
                if self._killer([killer], environment, mutant):
                    return killer
                if killer in passed:
                    raise ConfigurationError(f"{killer} fails in its file and passes alone; repair that first.")
                print(f"{killer} fails once only, and is left out for this mutant", flush=True)
                passed.add(killer)
        return None

    def _stages(self, mutant: Mutant) -> list[tuple[str, list[str], dict[str, str]]]:
        folder = mutant.file.partition("/")[0]
        distances = {test: self._distance(test, mutant) for test in self._unit_tests(folder)}
        # One call of pytest for each: most mutants are killed before the whole folder is imported.
        nearest = [[test for test, own in distances.items() if own in chosen] for chosen in ({0, 1}, {2}, {3})]
        nearest[0].sort(key=distances.__getitem__)
        stages: list[tuple[str, list[str], dict[str, str]]] = [
            ("by its folder's unit tests", tests, {}) for tests in nearest
        ]
        if self.further:
            unit = [test for test in self._unit_tests() if test == DEFAULTS or self._distance(test, mutant) < 2]
            others = [test for test in unit if test not in distances]
            stages.append(("by other unit tests", others, {}))
            worlds = [test for files, test in WORLDS.items() if mutant.file.startswith(files)]
            stages.append(("by worlds of processes", worlds, {"MOST_RANKS": "2"}))
        return [stage for stage in stages if stage[1]]

    def _unit_tests(self, folder: str = "") -> list[str]:
        paths = (self.copy / "tests" / "unit" / folder).rglob("test_*.py")
        return sorted(path.relative_to(self.copy).as_posix() for path in paths)

    def _distance(self, test: str, mutant: Mutant) -> int:
        """0 for tests named after the mutant's file, 1 for those that import it, 2 for others of its folder, else 3."""
        module = mutant.file.removesuffix(".py").replace("/", ".")
        if module.rpartition(".")[2] in Path(test).stem:
            return 0
        text = (self.copy / test).read_text(encoding="utf-8")
        folder, _, name = module.rpartition(".")
        imported = rf"{re.escape(module)}\b|from {re.escape(folder)} import .*\b{name}\b"
        if re.search(imported, text):
            return 1
        return 2 if Path(test).parent == Path("tests", "unit", mutant.file).parent else 3

    def _is_green(self, killer: str, environment: dict[str, str]) -> bool:
        """Run the test once more without the mutant; return whether it passes, and leave it out from now on otherwise.

        Raises ConfigurationError where a test that is left out fails, which means that its whole file fails.
        """
        if killer in self.green:
            return True
        if killer in self.red:
            raise ConfigurationError(f"{killer} fails without any mutant; repair that first.")
        if self._killer([killer], environment):
            print(f"{killer} fails without any mutant, and is left out", flush=True)
            self.red.add(killer)
            return False
        self.green.add(killer)
        return True

    def _killer(
        self,
        tests: Sequence[str],
        environment: dict[str, str],
        mutant: Mutant | None = None,
        without: AbstractSet[str] = frozenset(),
    ) -> str | None:
        """Run tests in the copy, changed by the mutant; return the name of the first that fails or ends the process."""
        options = [f"--deselect={test}" for test in sorted(self.red | without)]
        path = self.copy / (mutant.file if mutant else "")
        source = path.read_bytes() if mutant else b""
        try:
            if mutant:
                path.write_bytes(mutant.applied(source))
            code = self._exit_code([*options, *tests], environment)
        finally:
            if mutant:
                path.write_bytes(source)
        if code in (0, NOTHING_RUNS):
            return None
        printed = self.log.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", printed, re.M)
        return found[1] if found else self.current.read_text(encoding="utf-8") or tests[0]

    def _exit_code(self, arguments: Sequence[str], environment: dict[str, str]) -> int:
        """Run pytest in a forked process, and end every process that it leaves."""
        self.current.write_text("", encoding="utf-8")
        pid = os.fork()
        if pid == 0:
            _become_pytest(self.copy, self.log, self.current, arguments, environment)
        _, status = os.waitpid(pid, 0)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(status)


class _EachTest:
    """Write down the name of each test as it starts, and limit its CPU time."""

    def __init__(self, current: Path) -> None:
        self.current = current

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.current.write_text(nodeid, encoding="utf-8")
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + CPU_S, hard))


def _become_pytest(copy: Path, log: Path, current: Path, arguments: Sequence[str], environment: dict[str, str]) -> None:
    """Run tests in the copy, in this forked process, and end it."""
    code = 70
    try:
        os.setsid()
        gc.freeze()  # pytest collects garbage five times as it ends: seconds for each where the parent holds much
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, resource.getrlimit(resource.RLIMIT_CPU)[1]))  # for imports
        os.chdir(copy)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # a test of this file runs under pytest's capture
        os.environ.update(environment | {"PYTHONDONTWRITEBYTECODE": "1"})
        # Python would take the cached bytecode of the previous mutant if the time and size of both files are the same.
        sys.dont_write_bytecode = True
        sys.path[0] = str(copy)
        ours = {path.stem for path in copy.iterdir()}
        for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
            del sys.modules[name]
        pytest = import_module("pytest")
        options = ["-x", "-p", "no:cacheprovider", "--no-header", "--tb=no", "-rfE"]
        limit = [f"--timeout={REAL_S}", "--timeout-method=thread"]  # a thread can end a test that waits in C
        code = int(pytest.main([*options, *limit, *arguments], plugins=[_EachTest(current)]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def _copy(root: Path, copy: Path) -> None:
    """Copy the files of the checkout that git does not ignore, uncommitted changes included."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.run(listed, cwd=root, capture_output=True, check=True).stdout.split(b"\0")):
        path = name.decode()
        if (root / path).is_file():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / path, copy / path)
