"""Submit jobs to Slurm, checked before they wait in the queue.

    python -m train.submit cluster=site experiment=paper_3b data.root=/data/shards submit.data_parallel=16
    python -m train.submit cluster=site evaluate run.folder=runs/paper_3b --follow
    python -m train.submit cluster=site submit.data_parallel=16 corpus folder=runs/corpus \\
        pretrain experiment=paper_17b_stage1 pretrain experiment=paper_17b_stage2 \\
        evaluate run.folder=runs/paper_17b_stage2 --dry-run

A job is its name (corpus, pretrain_vit, pretrain, finetune or evaluate) and its arguments; it waits until the job
before it has succeeded; an evaluation with `evaluation.follow=true` begins with it.
`cluster=…` (conf/cluster), `cluster.…` and `submit.…` apply to the job that they follow; before the first job, to all.
`--dry-run` prints all jobs and submits none; `--follow` prints the log until the last job has ended.
"""

import difflib
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from common.errors import ConfigurationError, Interrupted
from common.field_docs import help_text
from common.overrides import as_typed, check_choices, check_for_saved_run, check_read, open_names
from common.terminal import use_utf8
from common.values import expand_home, typed
from data.miniature.config import parse as parse_corpus
from data.tasks.read import read_task
from evaluation.tasks import check_metrics
from slurm import job as slurm
from slurm.cluster import SubmitConfig
from slurm.code_snapshot import ROOT, take
from slurm.job import Job
from train import evaluate, finetune, pretrain, pretrain_vit
from train.checks import check, check_sources, check_training_data
from train.config import RunConfig, to_yaml
from train.entry import CONF, TEXT, in_one_sentence, register
from train.phases import for_phase, spans
from train.settings.compose import to_run_config
from train.settings.planning import choose_layout
from train.settings.saved_run import overridden, saved_config
from train.step.validation import chosen
from train.weights.saved_checkpoint import run_folder

KINDS = ("corpus", "pretrain_vit", "pretrain", "finetune", "evaluate")
TRAINING = {"pretrain_vit": pretrain_vit.READS, "pretrain": pretrain.READS, "finetune": finetune.READS}
FLAGS = {"--dry-run": "submit.dry_run=true", "--follow": "submit.follow=true"}


@dataclass
class Request:
    """Hold one job of the command line: its own words, and those about the site and the submission."""

    kind: str
    words: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)


def requests(arguments: Sequence[str]) -> list[Request]:
    """Split a command line into jobs; one training run if it names none."""
    first = Request("pretrain")
    asked: list[Request] = []
    for_all: list[str] = []
    for argument in arguments:
        word, now = FLAGS.get(argument, argument), asked[-1] if asked else first
        if word in KINDS:
            asked.append(Request(word))
        elif word.startswith(("submit.dry_run=", "submit.follow=")):
            for_all.append(word)
        elif word.startswith(("cluster=", "cluster.", "submit.")):
            now.settings.append(word)
        elif "=" in word or word.startswith("~"):
            now.words.append(word)
        else:
            near = difflib.get_close_matches(word, [*KINDS, *FLAGS], 1)
            hint = f"did you mean {near[0]}?" if near else f"jobs are {', '.join(KINDS)}, flags {', '.join(FLAGS)}."
            raise ConfigurationError(f"{word!r} is neither key=value nor a job nor a flag; {hint}")
    if asked and first.words:
        raise ConfigurationError(f"{first.words[0]} comes before the first job, {asked[0].kind}; put it after its job.")
    for request in asked or [first]:
        request.settings[:0] = first.settings if asked else []
        request.settings += for_all
    return asked or [first]


def plan(asked: Sequence[Request]) -> list[Job]:
    """Check all requests and return their jobs; the output of a job counts as there for those after it.

    Raises ConfigurationError.
    """
    expected: list[Path] = []
    runs: dict[Path, RunConfig] = {}
    jobs = []
    for request in asked:
        site = typed(SubmitConfig, OmegaConf.to_container(composed("submit", request.settings)))
        if request.kind == "corpus":
            jobs.append(_corpus(request, site))
        else:
            config = _config(request, runs, not site.submit.dry_run)
            runs[Path(config.run.folder)] = config
            jobs.append(_run(request, site, config, expected))
        expected.append(jobs[-1].makes)
    return jobs


def composed(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose `conf/<config_name>.yaml` with overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        check_choices(overrides, CONF)
        if config_name == "evaluate":
            check_for_saved_run(overrides, CONF)
        return compose(config_name, open_names(as_typed(overrides, TEXT), TEXT, config_name == "evaluate"))


def _config(request: Request, runs: dict[Path, RunConfig], weights: bool) -> RunConfig:
    reads = (TRAINING | {"evaluate": evaluate.READS})[request.kind]
    words = _with_run(request.words) if request.kind == "evaluate" else request.words
    check_read(words, reads, f"train.{request.kind}", RunConfig)
    own = composed(request.kind, words)
    if request.kind in TRAINING:
        return to_run_config(own, weights, runs)
    earlier = runs.get(Path(expand_home(own.run.folder, "run.folder")))
    if earlier is None:
        return saved_config(own, words)
    return overridden(OmegaConf.structured(earlier), own, words)


def _with_run(words: Sequence[str]) -> list[str]:
    """Return the words with the run of `checkpoint=RUN[@STEP]` as run.folder: its checkpoint may be one to come."""
    key = "checkpoint="
    return [f"run.folder={run_folder(word.removeprefix(key))}" if word.startswith(key) else word for word in words]


def _run(request: Request, site: SubmitConfig, config: RunConfig, expected: Sequence[Path]) -> Job:
    model_ranks = config.parallel.replica_size
    weights = request.kind in TRAINING and not site.submit.dry_run
    usable, tasks = usable_nodes(
        model_ranks, site, lambda ranks: check(choose_layout(config, ranks), ranks, expected, weights=weights)
    )
    if request.kind == "evaluate":
        usable = usable[:1]
        _check_evaluation(config, expected)
    else:
        check_training_data(config, expected)
    folder = Path(config.run.folder)
    follows = request.kind == "evaluate" and config.evaluation.follow
    return Job(request.kind, tuple(request.words), folder, usable, tasks, site, to_yaml(config), follows)


def _check_evaluation(config: RunConfig, expected: Sequence[Path]) -> None:
    if config.task.name:
        check_metrics(config.task)
        if not any(Path(config.task.root).absolute().is_relative_to(folder.absolute()) for folder in expected):
            read_task(config.task)
        return
    mixture = chosen(for_phase(config, spans(config)[-1]).mixture, config.evaluation)
    check_sources(config, mixture, config.evaluation.split, expected)


def usable_nodes(model_ranks: int, site: SubmitConfig, check: Callable[[int], object]) -> tuple[tuple[int, ...], int]:
    """Return (numbers of nodes, most first, ranks on each); `check` raises ConfigurationError for a number of ranks.

    Numbers between the most and the least nodes are left out where `check` raises.
    """
    per_node, most = site.cluster.ranks_per_node, model_ranks * site.submit.data_parallel
    least = model_ranks * (site.submit.min_data_parallel or site.submit.data_parallel)
    if most <= per_node:
        check(most)
        return (1,), most
    if most % per_node:
        raise ConfigurationError(
            f"parallel.tensor x parallel.pipeline x submit.data_parallel = {most} ranks do not fill nodes of "
            f"{per_node}; choose submit.data_parallel so that they do, or other cluster.tasks_per_node."
        )
    nodes = range(most // per_node, -(-least // per_node) - 1, -1)
    check(most)
    check(nodes[-1] * per_node)
    return tuple(number for number in nodes if _works(check, number * per_node)), per_node


def _works(check: Callable[[int], object], world_size: int) -> bool:
    try:
        check(world_size)
    except ConfigurationError:
        return False
    return True


def _corpus(request: Request, site: SubmitConfig) -> Job:
    own = [word for word in request.words if not word.startswith("tokenizer.")]
    config = parse_corpus(own)
    per_node = site.cluster.ranks_per_node * site.cluster.cpus_per_task
    ranks = site.submit.ranks or per_node
    nodes = -(-ranks // per_node)
    if ranks % nodes:
        raise ConfigurationError(
            f"submit.ranks={ranks} cannot be dealt to {nodes} nodes; make it a multiple of {nodes}."
        )
    folder = Path(config.folder)
    yaml = OmegaConf.to_yaml(OmegaConf.structured(config))
    return Job("corpus", tuple(request.words), folder, (nodes,), ranks // nodes, site, yaml)


def submit(jobs: Sequence[Job]) -> list[tuple[Job, str]]:
    """Submit the jobs to Slurm, each after the one before; return their ids. In a dry run, print them instead."""
    settings = jobs[0].site.submit
    if settings.dry_run:
        show(jobs)
        return []
    after = str(settings.after) if settings.after else None
    submitted: list[tuple[Job, str]] = []
    for job in jobs:
        try:
            snapshot = take(job.folder, beside(job))
            after = slurm.submit(slurm.sbatch_command(job, snapshot, after), snapshot)
        except (ConfigurationError, Interrupted) as error:
            if not submitted:
                raise
            before = ", ".join(number for _, number in submitted)
            raise type(error)(
                f"{error} Submitted already: {before} (`scancel {before.replace(',', '')}` cancels them; "
                f"submit.after={after} continues after them)."
            ) from error
        submitted.append((job, after))
        print(f"{after}: {job.title}; log {job.log(after)}", flush=True)
    return submitted


def beside(job: Job) -> dict[str, str]:
    """Return the files beside a job's code, by name."""
    return {"config.yaml": job.config, "site.sh": slurm.site_script(job)}


def show(jobs: Sequence[Job]) -> None:
    """Print the jobs, without values that look like a key or a password."""
    after = str(jobs[0].site.submit.after) if jobs[0].site.submit.after else None
    for position, job in enumerate(jobs, 1):
        snapshot = take(job.folder, beside(job), dry=True)
        command = shlex.join(slurm.sbatch_command(job, snapshot, after))
        print(f"# {position}. {job.title}\nPALI_SITE={shlex.quote(f'{snapshot}/site.sh')} {command}")
        print(f"\n# site.sh:\n{slurm.masked(slurm.site_script(job))}\n# {job.script}:\n{_script(job.script)}")
        after = f"<id of job {position}>"
    print(f"# slurm/job.sh, which these scripts source:\n{(ROOT / 'slurm' / 'job.sh').read_text(encoding='utf-8')}")


def _script(name: str) -> str:
    return (ROOT / "slurm" / name).read_text(encoding="utf-8")


def follow(submitted: Sequence[tuple[Job, str]]) -> None:
    """Show the logs of the jobs in turn; exit with 1 as soon as one has failed."""
    try:
        for job, number in submitted:
            ended = slurm.follow(number, job.log(number))
            if ended == slurm.FORGOTTEN:
                print(f"Slurm no longer has the state of job {number}; see {job.log(number)}.", file=sys.stderr)
                sys.exit(1)
            if ended != "COMPLETED":
                print(f"Job {number} ended: {ended}.", file=sys.stderr)
                sys.exit(1)
    except KeyboardInterrupt:
        print("\nThe log is no longer followed; the jobs continue (scancel ends them).", file=sys.stderr)


def main(arguments: Sequence[str]) -> None:
    """Check all jobs, submit them, and follow their logs. If one has a mistake, none is submitted."""
    if {"-h", "--help"} & set(arguments):
        print(help_text(__doc__, SubmitConfig))
        return
    register()
    jobs = plan(requests(arguments))
    submitted = submit(jobs)
    if jobs[0].site.submit.follow:
        follow(submitted)


if __name__ == "__main__":
    use_utf8()
    in_one_sentence(lambda: main(sys.argv[1:]))
