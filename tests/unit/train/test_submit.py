"""The jobs of a command line: checked as a chain, and submitted with the nodes that they need."""

import os
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from common.errors import ConfigurationError
from slurm import job as slurm
from slurm.cluster import ClusterConfig, SubmitConfig, SubmitSettings
from slurm.code_snapshot import ROOT, code_files, take
from slurm.job import Job, sbatch_command, site_script
from train.entry import register
from train.submit import main, plan, requests, show, submit, usable_nodes

DEMO = ["experiment=equivalence", "run.steps=2"]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    register()
    return tmp_path


def site(cluster: dict[str, object] | None = None, **settings: int) -> SubmitConfig:
    return SubmitConfig(ClusterConfig(**(cluster or {})), SubmitSettings(**settings))  # type: ignore[arg-type]


def job(site: SubmitConfig, *words: str, kind: str = "pretrain", makes: str = "runs/x") -> Job:
    return Job(kind, words, Path(makes), (4, 2, 1), 8, site, "run: {}\n")


def test_words_without_a_job_are_a_training_run() -> None:
    (one,) = requests(["cluster=cpu", "run.steps=3", "--dry-run", "~tracker"])
    assert (one.kind, one.words) == ("pretrain", ["run.steps=3", "~tracker"])
    assert one.settings == ["cluster=cpu", "submit.dry_run=true"]


def test_settings_hold_for_their_job_or_for_all() -> None:
    words = "cluster=cpu corpus folder=c pretrain run.steps=3 submit.data_parallel=2 evaluate run.folder=r --follow"
    corpus, training, scores = requests(words.split())
    assert corpus.settings == ["cluster=cpu", "submit.follow=true"]
    assert training.settings == ["cluster=cpu", "submit.data_parallel=2", "submit.follow=true"]
    assert (scores.kind, scores.words) == ("evaluate", ["run.folder=r"])


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        ("pretran run.steps=3", "'pretran' is neither key=value nor a job nor a flag; did you mean pretrain?"),
        ("--dryrun", "did you mean --dry-run"),
        ("-m", "'-m' is neither key=value nor a job"),
        ("run.steps=3 corpus", "run.steps=3 comes before the first job, corpus; put it after"),
    ],
)
def test_words_that_make_no_sense(words: str, printed: str) -> None:
    with pytest.raises(ConfigurationError, match=printed):
        requests(words.split())


@pytest.mark.parametrize(
    ("model_ranks", "settings", "expected"),
    [
        (1, site({"gpus_per_node": 8}), ((1,), 1)),
        (4, site({"gpus_per_node": 8}, data_parallel=2), ((1,), 8)),
        (4, site({"gpus_per_node": 8}, data_parallel=8), ((4,), 8)),
        (4, site({"gpus_per_node": 8}, data_parallel=8, min_data_parallel=2), ((4, 2, 1), 8)),  # 3 nodes: 6 replicas
        (4, site({"gpus_per_node": 8}, data_parallel=8, min_data_parallel=1), ((4, 2, 1), 8)),
        (16, site({"gpus_per_node": 8}), ((2,), 8)),
        (1, site({"tasks_per_node": 1}, data_parallel=4, min_data_parallel=2), ((4, 2), 1)),
    ],
)
def test_nodes(model_ranks: int, settings: SubmitConfig, expected: tuple[tuple[int, ...], int]) -> None:
    def streams(world_size: int) -> None:
        if 64 % (world_size // model_ranks):
            raise ConfigurationError("streams")

    assert usable_nodes(model_ranks, settings, streams) == expected


def test_shards_must_be_there_or_come(tokenizer_path: Path) -> None:
    run = [*DEMO, "data.root=c", f"data.tokenizer={tokenizer_path}", "run.folder=runs/one"]
    with pytest.raises(ConfigurationError, match="no train shards at c/"):
        plan(requests(["cluster=cpu", *run]))
    evaluation = ["evaluate", "run.folder=runs/one", "data.root=d"]
    with pytest.raises(ConfigurationError, match="no test shards at d/"):
        plan(requests(["cluster=cpu", "corpus", "folder=c", "pretrain", *run, *evaluation]))


def test_ranks_that_do_not_fill_their_nodes() -> None:
    with pytest.raises(ConfigurationError, match="= 12 ranks do not fill nodes of 8; choose"):
        usable_nodes(4, site({"gpus_per_node": 8}, data_parallel=3), lambda world_size: None)


def test_the_least_number_of_nodes_must_work_too(tokenizer_path: Path) -> None:
    settings = ["cluster=cpu", "submit.data_parallel=8", "submit.min_data_parallel=6"]
    with pytest.raises(ConfigurationError, match="num_streams=8 cannot be dealt evenly to 6"):
        plan(requests([*settings, *DEMO, "data.root=c", f"data.tokenizer={tokenizer_path}"]))


def test_a_chain_is_checked_in_view_of_what_it_will_make() -> None:
    two = ["run.initial=runs/one", "run.folder=runs/two"]
    chain = ["corpus", "folder=c", "scale=0.01", "tokenizer.vocab_size=1024",
             "pretrain", *DEMO, "data.root=c", "run.folder=runs/one",
             "pretrain", *DEMO, "data.root=c", *two, "parallel.tensor=2", "submit.data_parallel=2",
             "evaluate", "run.folder=runs/two", "evaluation.examples=7"]  # fmt: skip
    jobs = plan(requests(["cluster=cpu", *chain]))
    assert [one.title for one in jobs] == [
        "corpus c: 1 node x 4 ranks",
        "pretrain runs/one: 1 node x 1 rank",
        "pretrain runs/two: 2 nodes x 2 ranks",
        "evaluate runs/two: 1 node x 2 ranks",  # the run's own layout
    ]
    assert "examples: 7" in jobs[-1].config and "tensor: 2" in jobs[-1].config
    assert [one.folder for one in jobs] == [Path("c.job"), Path("runs/one"), Path("runs/two"), Path("runs/two")]


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        ([*DEMO, "data.root=c"], "data.tokenizer=c/tokenizer.model does not exist"),
        (["corpus", "folder=c", "pretrain", *DEMO, "data.root=d"], "data.tokenizer=d/tokenizer.model"),
        (["corpus", "folder=c", "pretrain", *DEMO, "data.root=c", "run.initial=no"], "run.initial=no holds no"),
        (["evaluate", "run.folder=no"], "run.folder=no holds no run"),
        (["corpus", "sed=1"], "sed"),
        (["corpus", "submit.ranks=5", "cluster.cpus_per_task=2"], "submit.ranks=5 cannot be dealt to 2 nodes"),
        (["cluster.time=24h"], "cluster.time='24h' is not a time of Slurm"),
        (["cluster.gpus_per_node=2", "cluster.tasks_per_node=4"], "4 ranks would share cluster.gpus_per_node=2"),
        (["submit.data_parallel=2", "submit.min_data_parallel=3"], "swap them"),
    ],
)
def test_mistakes(words: list[str], printed: str) -> None:
    with pytest.raises(ConfigurationError, match=printed):
        plan(requests(["cluster=cpu", *words]))


def test_the_command() -> None:
    settings = site({"gpus_per_node": 8, "partition": "gpu", "cpus_per_task": 6, "sbatch": ["--exclusive"]})
    command = sbatch_command(job(settings, "run.name=a b"), Path("runs/x/submitted/1"), "77")
    assert command == [
        "sbatch", "--parsable", "--job-name=pretrain-x", "--partition=gpu", "--time=24:00:00", "--nodes=1-4",
        "--cpus-per-task=48", "--gpus-per-node=8", "--signal=USR1@300",
        "--output=runs/x/slurm-pretrain-%j.log", "--dependency=afterok:77", "--kill-on-invalid-dep=yes", "--exclusive",
        "runs/x/submitted/1/code/slurm/pretrain.sbatch", f"--site={Path('runs/x/submitted/1/site.sh').absolute()}",
        "run.name=a b",
    ]  # fmt: skip
    odd = sbatch_command(job(settings, makes="runs/100%j"), Path("s"), None)
    assert "--output=runs/100%%j/slurm-pretrain-%j.log" in odd and not any("dependency" in word for word in odd)


def test_what_bash_makes_of_the_site(here: Path) -> None:
    """Words of the user come through the shell as they are."""
    settings = site({"container": ["run it", "$(touch hacked)"], "environment": {"A": "x; touch hacked"},
                     "srun": ["--comment='quoted'"], "setup": ["B=set"]})  # fmt: skip
    (here / "site.sh").write_text(site_script(job(settings)), encoding="utf-8")
    show = 'printf "%s\\n" "${python[@]:0:2}" "${srun[@]}" "$A" "$B" "${usable[*]}" "$PYTHONPATH"'
    shown = subprocess.run(
        ["bash", "-c", f"source ./site.sh; {show}"], capture_output=True, encoding="utf-8", check=True
    )
    assert shown.stdout.splitlines() == [
        "run it", "$(touch hacked)", "srun", "--comment='quoted'", "x; touch hacked", "set", "4 2 1", "./code",
    ]  # fmt: skip
    assert not (here / "hacked").exists()


def test_a_snapshot_holds_the_code_and_is_kept_once(here: Path) -> None:
    taken = take(here / "run", {"config.yaml": "a: 1\n"})
    assert (taken / "config.yaml").read_text(encoding="utf-8") == "a: 1\n" and (taken / "commit.txt").exists()
    for file in (
        "train/pretrain.py",
        "conf/pretrain.yaml",
        "slurm/pretrain.sbatch",
        "common/errors.py",
        "common/launcher.py",
    ):
        assert (taken / "code" / file).read_bytes() == (ROOT / file).read_bytes()
    assert take(here / "run", {"config.yaml": "a: 1\n"}) == taken
    other = take(here / "run", {"config.yaml": "a: 2\n"}, dry=True)
    assert other != taken and not other.exists()
    assert [path.name for path in (here / "run" / "submitted").iterdir()] == [taken.name]


def test_snapshots_hold_all_modules() -> None:
    """Every package of pyproject.toml that an entry point imports is among the copied files."""
    names = {path.relative_to(ROOT).parts[0] for path in code_files()}
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert {package.rstrip("*") for package in tools["packages"]["find"]["include"]} <= names


def test_a_dry_run_shows_everything_and_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["pretrain", *DEMO, "data.root=c", "run.folder=runs/one two"]
    main(["cluster=cpu", "corpus", "folder=c", *run, "--dry-run"])
    printed = capsys.readouterr().out
    assert "# 1. corpus c: 1 node x 4 ranks" in printed and "--dependency=afterok:<id of job 1>" in printed
    assert (
        shlex.quote("run.folder=runs/one two") in printed
        and "exec scontrol requeue" in printed
        and "usable=(1)" in printed
    )
    assert list(here.iterdir()) == []


def test_without_slurm_it_states_so(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(here))
    with pytest.raises(ConfigurationError, match="no sbatch here"):
        slurm.submit(["sbatch", "x"], here)


@pytest.mark.parametrize("name", ["pretrain", "evaluate", "corpus"])
def test_the_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", ROOT / "slurm" / f"{name}.sbatch"], check=True)


def sbatch(monkeypatch: pytest.MonkeyPatch, folder: Path, accepted: int) -> Path:
    """Put an sbatch into PATH that numbers its calls from 101 and refuses all after `accepted`; return its record."""
    calls, program = folder / "calls", folder / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(
        f"""#!/bin/sh
echo "$@" >> {calls}
number=$(wc -l < {calls})
[ "$number" -le {accepted} ] || {{ echo "sbatch: error: Invalid partition" >&2; exit 1; }}
echo $((100 + number))
""",
        encoding="utf-8",
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return calls


def test_each_job_of_a_chain_begins_after_the_one_before(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = site(after=77)
    jobs = [job(settings, kind=kind, makes=f"runs/{kind}") for kind in ("corpus", "pretrain")]
    show(jobs[:1])
    assert "--dependency=afterok:77" in capsys.readouterr().out
    show(jobs)
    printed = capsys.readouterr().out
    assert [word for word in printed.split() if word.startswith("--dependency")] == ["--dependency=afterok:77"]
    assert "--dependency=afterok:<id of job 1>" in printed.replace("'", "")
    calls = sbatch(monkeypatch, here, accepted=2)
    assert submit(jobs) == [(jobs[0], "101"), (jobs[1], "102")]
    given = [line.split() for line in calls.read_text(encoding="utf-8").splitlines()]
    assert ["--dependency=afterok:77" in given[0], "--dependency=afterok:101" in given[1]] == [True, True]
    assert "101: " in capsys.readouterr().out


@pytest.mark.parametrize(("accepted", "submitted"), [(0, None), (1, "101"), (2, "101, 102")])
def test_a_refused_job_names_those_before_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, accepted: int, submitted: str | None
) -> None:
    jobs = [job(site(), kind=kind, makes=f"runs/{kind}") for kind in ("corpus", "pretrain", "evaluate")]
    sbatch(monkeypatch, here, accepted)
    with pytest.raises(ConfigurationError, match="Invalid partition") as error:
        submit(jobs)
    assert ("Submitted already" in str(error.value)) == (submitted is not None)
    if submitted:
        ids = submitted.replace(",", "")
        assert f"already: {submitted} (`scancel {ids}` cancels them; submit.after={ids[-3:]} continues" in str(
            error.value
        )
