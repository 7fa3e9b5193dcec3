"""Run a command under Hydra; end with one sentence and an exit code where the user can correct an error.

Exit codes: 0 done, 2 a mistake in the configuration, 3 a run that stopped itself (`RunStopped`, or a source over its
error budget), 4 a run that hung or lost a rank (`train/health/watchdog.py`), 75 a run that was interrupted by a signal
and saved, or whose storage kept failing (start it again to continue).
"""

import gc
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from errno import EACCES, EDQUOT, EEXIST, EFBIG, EISDIR, ENAMETOOLONG, ENOSPC, ENOTDIR, EPERM, EROFS
from functools import cache
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.command_line import CONF, sentence
from common.errors import (
    EXIT_CONFIGURATION,
    EXIT_HUNG,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    STORAGE_ERRNOS,
    ConfigurationError,
    Interrupted,
    Notice,
    PeerLost,
    PeersMissing,
    RunStopped,
    StorageFailed,
)
from common.field_docs import help_text
from common.launcher import is_main_rank
from common.overrides import as_typed, check_choices, check_for_saved_run, check_read, open_names
from common.terminal import use_utf8
from common.values import expand_home
from data.error_budget import ErrorBudgetExceeded
from parallel.distributed import stop as leave
from slurm.cluster import ClusterConfig, SubmitConfig
from train import GARBAGE_THRESHOLD
from train.config import RunConfig, WeightsConfig
from train.health import exit_note as note
from train.health.memory import is_lack_of_memory
from train.settings.compose import COMPOSED
from train.settings.from_task import score_name
from train.settings.option_name import option_name
from train.sweep import FailedRuns, Sweep, check_lists, folder_name, join_sweep

TEXT = {"": RunConfig, "cluster.": ClusterConfig, "hydra.launcher.cluster.": ClusterConfig}
# Errors of a user's files and folders -> exit code: wrong kind, name or permission (2), no room left (3).
USER_ERRORS = dict.fromkeys((EACCES, EPERM, EROFS, EEXIST, ENOTDIR, EISDIR, ENAMETOOLONG), EXIT_CONFIGURATION)
USER_ERRORS |= dict.fromkeys((ENOSPC, EDQUOT, EFBIG), EXIT_STOPPED)


def entry(config_name: str, main: Callable[[DictConfig], None], reads: Sequence[str] = ()) -> None:
    """Compose `conf/<config_name>.yaml` with the command line and run `main` on it (once per run of a multirun).

    `reads`: the keys that `main` reads (`common.overrides.check_read`); others are refused. Empty: all keys.
    """
    use_utf8()
    register()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(main.__globals__["__doc__"], RunConfig, reads, CONF))
        sys.exit(0)
    in_one_sentence(lambda: _prepare_words(reads, config_name == "evaluate"))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing -> `in_one_sentence` prints
    warnings.formatwarning = _format_warning
    sweep = Sweep()

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    def job(composed: DictConfig) -> int:
        gc.set_threshold(*GARBAGE_THRESHOLD)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            overrides = HydraConfig.get().job.override_dirname
            join_sweep(composed, overrides)
            return sweep.run(
                overrides or composed.run.folder, lambda: in_one_sentence(lambda: main(sweep.claim(composed)))
            )
        in_one_sentence(lambda: main(composed))
        return 0

    try:
        in_one_sentence(job)
        in_one_sentence(sweep.check)
    finally:
        leave()  # after all runs of a sweep, because processes can rendezvous only once


def _prepare_words(reads: Sequence[str], of_saved_run: bool) -> None:
    """Check the words of the command line, and rewrite those that Hydra would misread.

    `of_saved_run`: mappings have the entries of a saved run, which Hydra does not read.
    """
    words = without_injected(sys.argv[1:])
    if reads:
        check_read(words, reads, f"train.{Path(sys.argv[0]).stem}", RunConfig)
    check_choices(words, CONF)
    check_lists(words)
    if of_saved_run:
        check_for_saved_run(words, CONF)
    sys.argv[1:] = open_names(as_typed(words, TEXT), TEXT, of_saved_run)


def in_one_sentence(work: Callable[[], None]) -> None:
    """Run `work`; end with one sentence for an error that the user can correct, with a traceback for any other."""
    try:
        work()
    except (ConfigurationError, HydraException, OmegaConfBaseException) as error:
        stop(f"Configuration: {sentence(error)}", EXIT_CONFIGURATION)
    except RunStopped as error:
        stop(str(error), EXIT_STOPPED, error.alone)
    except ErrorBudgetExceeded as error:  # on every rank alike (train/step/reduction.py)
        stop(str(error), EXIT_STOPPED)
    except StorageFailed as error:
        stop(str(error), EXIT_INTERRUPTED, error.alone)
    except Interrupted as error:
        stop(str(error), EXIT_INTERRUPTED)
    except (PeerLost, PeersMissing) as error:
        stop(str(error), EXIT_HUNG, True)
    except FailedRuns as error:
        stop(str(error), error.code)
    except OSError as error:
        if error.errno in STORAGE_ERRNOS and error.filename is not None:
            failed = f"{error.filename}: {error.strerror}; start again when the storage responds."
            stop(failed, EXIT_INTERRUPTED, getattr(error, "alone", True))
        code = USER_ERRORS.get(error.errno or 0)
        if code is None or (error.filename is None and code != EXIT_STOPPED):
            raise
        stop(
            f"{error.filename or 'A file'}: {error.strerror}; correct that, or choose another path.",
            code,
            getattr(error, "alone", True),
        )
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
        why = " ".join(str(error).partition("\n")[0].split()) or type(error).__name__
        stop(
            f"Out of memory ({why}); take a smaller parallel.micro_batch_size or evaluation.batch, a higher "
            "parallel.zero_stage, or more ranks.",
            EXIT_STOPPED,
            True,
        )


@cache
def register() -> None:
    """Register the typed schemas and the resolvers with Hydra, once in a process."""
    run, submission = OmegaConf.structured(RunConfig), OmegaConf.structured(SubmitConfig)
    for group, schema in COMPOSED.items():
        run[group] = OmegaConf.structured(schema)
    for names_of_the_user in (run.data.sources, submission.cluster.environment):
        OmegaConf.set_struct(names_of_the_user, False)  # Hydra refuses new keys everywhere else
    run.weights = WeightsConfig(MISSING, MISSING)  # "???" replaces nothing in a merge, so conf/weights sets null
    ConfigStore.instance().store(name="run_schema", node=run)
    ConfigStore.instance().store(name="submit_schema", node=submission)
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
    OmegaConf.register_new_resolver("expand_home", expand_home, replace=True)
    OmegaConf.register_new_resolver("option_name", option_name, replace=True)
    OmegaConf.register_new_resolver("either", lambda value, other: value or other, replace=True)
    OmegaConf.register_new_resolver("score_name", lambda task: score_name(task.name, task.metrics), replace=True)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Print our own warnings as sentences, and others with their place in the code."""
    if issubclass(category, Notice):
        return f"Warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def without_injected(arguments: list[str]) -> list[str]:
    """Return the arguments without the `--local_rank N` that some launchers add."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept


def stop(message: str, code: int, every_rank: bool = False) -> None:
    """Print the sentence, on the main rank unless set otherwise, and end the process."""
    note.leave(code, message)
    if every_rank or is_main_rank():
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)
