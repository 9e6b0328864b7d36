"""Job files: valid in their languages, and the Slurm script executed with fake cluster programs."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sparring.cli import app
from sparring.commands.jobs import job_file
from sparring.errors import UserError

SKY_PYTHON = os.environ.get("SPARRING_SKY_PYTHON")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

ODD_PATH = Path("/shared/our runs/it's $HOME; `x`")
RECIPE = Path("/shared/recipe one.yaml")


def slurm(nodes: int, gpus: int, run_dir: Path = ODD_PATH) -> str:
    return job_file("slurm", RECIPE, run_dir, nodes=nodes, gpus=gpus, image=None, claim=None)


def kubernetes(nodes: int, gpus: int) -> str:
    return job_file("kubernetes", RECIPE, ODD_PATH, nodes=nodes, gpus=gpus, image="x/y:1", claim="team")


@pytest.fixture
def fake_cluster(tmp_path: Path) -> dict[str, str]:
    """An environment in which the cluster's programs only record how they were called.

    Each in one write: srun runs in the background, and two calls must not share a line. `ray status` fails until a
    `ray start` was called, which may be in the background too.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "ray", "scontrol", "sparring"):
        program = folder / name
        ending = 'exit "${STATUS:-0}"' if name == "sparring" else "exit 0"
        program.write_text(
            '#!/bin/bash\n[ "$1" = status ] && [ -z "${HEAD_IS_ELSEWHERE:-}" ] && ! grep -qs start "$CALLS" && exit 1\n'
            f'line=$(printf "%s" {name}; printf " [%s]" "$@")\necho "$line" >> "$CALLS"\n'
            f'[ {name} = sparring ] && [ -n "${{STUCK:-}}" ] && {{ trap "exit 143" TERM; kill -TERM $PPID; '
            f"sleep 30 > /dev/null 2>&1 & wait; }}\n{ending}\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "SLURM_JOB_ID": "17"}


def calls_of(script: str, fake_cluster: dict[str, str]) -> tuple[int, list[str]]:
    done = subprocess.run(["bash", "-c", script], env=fake_cluster, capture_output=True, text=True, timeout=60)
    assert not done.stderr, done.stderr
    return done.returncode, Path(fake_cluster["CALLS"]).read_text().splitlines()


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 0), (1, 1), (1, 8), (4, 8)])
def test_slurm_scripts_are_bash(nodes: int, gpus: int) -> None:
    script = slurm(nodes, gpus)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    head = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert f"--nodes={nodes}" in head and "--requeue" in head
    assert (f"--gpus-per-node={gpus}" in head) == bool(gpus)
    assert ("launch=torchrun" in script) == (nodes == 1 and gpus > 1)


def test_slurm_starts_ray_on_every_node_and_one_run(fake_cluster: dict[str, str]) -> None:
    host = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    status, calls = calls_of(slurm(4, 8), fake_cluster)
    assert status == 0
    assert f"sparring [run] [{RECIPE}] [{ODD_PATH}] [launch=ray] [ray_address={host}:6379]" in calls, "paths are quoted"
    starts = [call for call in calls if call.startswith("srun")]
    assert any("[--nodes=1]" in call and "[--head]" in call for call in starts)
    assert any("[--nodes=3]" in call and f"[--exclude={host}]" in call for call in starts)


def test_slurm_requeues_an_interrupted_run_only(fake_cluster: dict[str, str]) -> None:
    status, calls = calls_of(slurm(1, 1), {**fake_cluster, "STATUS": "2"})
    assert status == 2 and not any(call.startswith("scontrol") for call in calls)
    Path(fake_cluster["CALLS"]).unlink()
    status, calls = calls_of(slurm(1, 1), {**fake_cluster, "STUCK": "1"})
    assert status == 143 and "scontrol [requeue] [17]" in calls, "the run got the signal, and the script waited"


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 0), (1, 8), (4, 8)])
def test_kubernetes_manifests_match_the_schema(nodes: int, gpus: int) -> None:
    documents = list(yaml.safe_load_all(kubernetes(nodes, gpus)))
    assert [d["kind"] for d in documents] == (["Job", "Service", "NetworkPolicy"] if nodes > 1 else ["Job"])
    for document in documents:
        kubernetes_validate.validate(document, "1.33", strict=True)
    job = documents[0]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    subprocess.run(["bash", "-n"], input=container["args"][0], text=True, check=True)
    assert job["completions"] == job["parallelism"] == nodes
    assert container.get("resources", {}).get("limits", {}).get("nvidia.com/gpu") == (gpus or None)
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert "/shared" in mounts
    if nodes > 1:
        assert documents[1]["metadata"]["name"] == job["template"]["spec"]["subdomain"]


def test_control_the_schema_check_can_fail() -> None:
    job = yaml.safe_load(kubernetes(1, 1))
    job["spec"]["completion"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.33", strict=True)


def test_the_pod_script_starts_ray_and_the_run(fake_cluster: dict[str, str]) -> None:
    job = next(yaml.safe_load_all(kubernetes(4, 8)))
    script = job["spec"]["template"]["spec"]["containers"][0]["args"][0]
    status, calls = calls_of(script, {**fake_cluster, "JOB_COMPLETION_INDEX": "0"})
    assert status == 0 and calls[0].startswith("ray [start] [--head]")
    assert calls[1] == f"sparring [run] [{RECIPE}] [{ODD_PATH}] [launch=ray] [ray_address=127.0.0.1:6379]"


def sky(nodes: int, gpus: int, claim: str | None = "team") -> str:
    return job_file("sky", RECIPE, ODD_PATH, nodes=nodes, gpus=gpus, gpu="H100", image="x/y:1", claim=claim)


@pytest.mark.parametrize(("nodes", "gpus", "claim"), [(1, 0, None), (1, 8, "team"), (4, 8, "team")])
def test_sky_tasks_are_yaml_around_bash(nodes: int, gpus: int, claim: str | None) -> None:
    task = yaml.safe_load(sky(nodes, gpus, claim))
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    assert task["num_nodes"] == nodes and task["resources"]["image_id"] == "docker:x/y:1"
    assert task["resources"].get("accelerators") == ("H100:8" if gpus else None)
    assert task.get("volumes") == (None if claim is None else {"/shared": "team"})
    assert task.get("secrets") == ({"RAY_AUTH_TOKEN": None} if nodes > 1 else None), "asked for at launch"
    assert ("launch=torchrun" in task["run"]) == (nodes == 1 and gpus > 1)
    assert ("mirror" in sky(nodes, gpus, claim)) == (claim is None), "a machine's own disk ends with it"


def test_a_sky_task_starts_ray_and_one_run(fake_cluster: dict[str, str]) -> None:
    script = yaml.safe_load(sky(4, 8))["run"]
    nodes = {**fake_cluster, "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    status, calls = calls_of(script, {**nodes, "SKYPILOT_NODE_RANK": "0", "STATUS": "2"})
    assert status == 2 and "ray [start] [--head] [--port=6379] [--block]" in calls
    assert f"sparring [run] [{RECIPE}] [{ODD_PATH}] [launch=ray] [ray_address=10.0.0.1:6379]" in calls
    Path(fake_cluster["CALLS"]).unlink()
    status, calls = calls_of(script, {**nodes, "SKYPILOT_NODE_RANK": "1", "HEAD_IS_ELSEWHERE": "yes"})
    assert status == 0 and calls[-1] == "ray [start] [--address=10.0.0.1:6379] [--block]"


@pytest.mark.skipif(SKY_PYTHON is None, reason="SPARRING_SKY_PYTHON is not set: an interpreter that has skypilot")
def test_skypilot_reads_the_tasks(tmp_path: Path) -> None:
    """Its own schema and parser; a control that they can fail."""
    assert SKY_PYTHON is not None
    code = (
        "import sky, sys, yaml\nfor text in sys.stdin.read().split('=====')[:-1]:\n"
        "    task = yaml.safe_load(text)\n    task['secrets'] = {name: 'x' for name in task.get('secrets', {})}\n"
        "    print(sky.Task.from_yaml_config(task).num_nodes)\n"
    )
    tasks = "".join(f"{sky(*sizes)}=====" for sizes in ((1, 0, None), (1, 8, "a"), (4, 8, "a")))
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    for text, expected in ((tasks, "1\n1\n4\n"), (tasks.replace("num_nodes", "nodes"), None)):
        command = [SKY_PYTHON, "-c", code]
        done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, check=False)
        assert (done.stdout == expected) if expected else ("'nodes'" in done.stderr), done.stderr


def test_invalid_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="not an absolute path"):
        slurm(1, 1, Path("runs/mine"))
    with pytest.raises(UserError, match="needs --image"):
        job_file("kubernetes", RECIPE, ODD_PATH, nodes=1, gpus=1, image=None, claim=None)
    with pytest.raises(UserError, match="needs --gpu"):
        job_file("sky", RECIPE, ODD_PATH, nodes=1, gpus=1)
    with pytest.raises(UserError, match="needs --claim for several machines"):
        sky(2, 8, None)
    result = CliRunner().invoke(app, ["launch", "--print", "slurm", "/r.yaml", "/runs/a", "--nodes", "2"])
    assert result.exit_code == 0 and result.output.startswith("#!/bin/bash")
    assert isinstance(CliRunner().invoke(app, ["launch", "--print", "pbs", "/r.yaml", "/runs/a"]).exception, UserError)
