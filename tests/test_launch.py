"""The launch scripts, as far as a machine without a cloud can tell: shellcheck, dry runs, stand-ins for srun."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from lcx import train

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.read_text().startswith("#!/usr/bin/env bash"))


def tpu(*arguments, **more):
    command = ["bash", str(LAUNCH / "tpu_pod.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, **more)


def commands(*arguments):
    """The gcloud commands of a dry run, as lists of words."""
    done = tpu(*arguments[:1], "--name=pod", "--zone=us-east5-a", "--dry-run", *arguments[1:])
    assert done.returncode == 0, done.stderr
    assert "gcloud" in done.stdout
    script = 'gcloud() { printf "%s\\0" "$@"; printf "\\1"; }\n' + done.stdout
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    return [line.split("\0")[:-1] for line in words.split("\1")[:-1]]


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck(name):
    beside = pathlib.Path(sys.executable).with_name("shellcheck")  # where pip puts it
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("needs shellcheck: pip install 'lcx[dev]'")
    done = subprocess.run([program, str(LAUNCH / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_create_and_delete():
    (create,) = commands("create", "--type=v5p-64", "--spot")
    assert create[:5] == ["compute", "tpus", "tpu-vm", "create", "pod"]
    assert {"--zone=us-east5-a", "--accelerator-type=v5p-64", "--spot"} <= set(create)
    assert "--spot" not in commands("create", "--type=v5p-64")[0]
    software = {"v5p-64": "tpuv5", "v5litepod-16": "tpuv5-lite", "v6e-16": "tpuv6e"}
    for kind, version in software.items():
        assert f"--version=v2-alpha-{version}" in commands("create", f"--type={kind}")[0]
    assert "--version=mine" in commands("create", "--type=v7-8", "--version=mine")[0]
    assert commands("delete")[0][3:5] == ["delete", "pod"]


def test_ship_copies_what_is_committed_to_every_host():
    copy, install, mount = commands("ship", "--bucket=gs://my-bucket/")
    assert copy[3] == "scp" and "--worker=all" in copy and copy[5] == "pod:lcx.tar.gz"
    assert "pip install" in install[-1] and "tpu" in install[-1]
    assert "gcsfuse --implicit-dirs my-bucket bucket" in mount[-1]
    assert len(commands("ship")) == 2


ON_A_HOST = pytest.mark.skipif(shutil.which("flock") is None, reason="this system has no flock command")


def on_a_host(home, job, *arguments, pause=":"):
    """Runs here, in a home of its own, what the hosts get from `run`. The lines that the job has left in ~/seen.

    Args:
      job: the text of the command that is run.
      pause: a shell command, run in the home in place of the pause before the next attempt.

    In both, $RUN and $STOP are what the hosts get from another `run` and from `stop`.
    """
    (run,), (stop,) = commands("run", "--", "./job", *arguments), commands("stop")
    assert "--worker=all" in run and "--worker=all" in stop
    run, stop = (words[-1].removeprefix("--command=") for words in (run, stop))
    (home / "lcx" / ".venv" / "bin").mkdir(parents=True)
    (home / "lcx" / ".venv" / "bin" / "activate").write_text(f"sleep() {{ (cd; {pause}); }}\n")
    (home / "lcx" / "job").write_text(f"#!/usr/bin/env bash\ncd\n{job}\n")
    (home / "lcx" / "job").chmod(0o755)
    env = os.environ | {"HOME": str(home), "RUN": run, "STOP": stop}
    subprocess.run(["bash", "-c", f"{run}\nwait"], cwd=home, env=env, check=True, timeout=60)
    return (home / "seen").read_text().splitlines()


@ON_A_HOST
@pytest.mark.parametrize("status, starts", [(0, 1), (2, 1), (1, 10)])
def test_run_starts_the_command_again_until_it_is_done(tmp_path, status, starts):
    argument = "--gin.MODEL='a b $HOME'"
    assert on_a_host(tmp_path, f'echo "$1" >> seen\nexit {status}', argument) == [argument] * starts


@ON_A_HOST
@pytest.mark.parametrize("job, pause", [
    ("exit 75", 'bash -c "$STOP"'),
    ('trap "echo told >> seen; exit 75" TERM; bash -c "$STOP"; for i in {1..100}; do sleep 0.05; done', ":"),
], ids=["between two attempts", "while it runs"])  # fmt: skip
def test_a_run_that_is_stopped_is_not_started_again(tmp_path, job, pause):
    told = ["told"] if "told" in job else []
    assert on_a_host(tmp_path, f"echo begun >> seen\n{job}", pause=pause) == ["begun", *told]


@ON_A_HOST
def test_a_second_run_on_the_same_hosts_is_refused(tmp_path):
    assert on_a_host(tmp_path, 'bash -c "$RUN"; echo $? >> seen') == ["1"]
    assert "error: an earlier run goes on on" in (tmp_path / "lcx.log").read_text()


def test_logs_and_stop():
    assert "--worker=3" in commands("logs", "--worker=3")[0]
    assert "kill -TERM" in commands("stop")[0][-1]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["create", "--name=a", "--zone=z"], "--type is not set"),
        (["create", "--name=a", "--zone=z", "--type=v7-8"], "--version is not set"),
        (["create", "--zone=z", "--type=v5p-64"], "--name is not set"),
        (["logs", "--name=a"], "--zone is not set"),
        (["run", "--name=a", "--zone=z"], "there is no command"),
        (["stop", "--name=a", "--zone=z", "--nodes=3"], "unknown argument --nodes=3"),
        (["stop", "--name", "a"], "unknown argument --name, expected --NAME=VALUE"),
        (["ship", "--name=a", "--zone=z", "--bucket=gs://a/b"], "--bucket is a/b, expected the name of"),
    ],
)
def test_mistakes_are_one_line(arguments, says):
    done = tpu(*arguments)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_no_command_prints_them_all():
    done = tpu()
    assert done.returncode == 2
    assert all(
        f"tpu_pod.sh {name}" in done.stderr for name in ("create", "ship", "run", "logs", "stop", "delete")
    )


def stand_ins(folder, srun):
    # As in SLURM: scancel reaches the processes, and srun kills them if it gets SIGTERM itself.
    scancel = '[ "$*" = "--signal=TERM 17" ] && kill -USR1 $(cat pid)'
    for name, text in {"srun": srun, "scontrol": 'echo "$@" > requeued', "scancel": scancel}.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}


SBATCH = ["bash", str(LAUNCH / "slurm.sbatch")]


def test_slurm_passes_the_command_and_its_status_on(tmp_path):
    env = stand_ins(tmp_path, 'printf "%s\\n" "$@" > seen; exit 3')
    assert subprocess.run([*SBATCH, "python", "a b"], cwd=tmp_path, env=env).returncode == 3
    assert (tmp_path / "seen").read_text().splitlines() == ["--kill-on-bad-exit=1", "python", "a b"]
    assert not (tmp_path / "requeued").exists()
    dry = subprocess.run([*SBATCH, "x y"], env=env | {"LCX_DRY_RUN": "1"}, capture_output=True, text=True)
    assert shlex.split(dry.stdout) == ["srun", "--kill-on-bad-exit=1", "x y"]
    assert subprocess.run(SBATCH, env=env, capture_output=True).returncode == 2


def test_slurm_saves_before_the_time_is_up_and_goes_back_into_the_queue(tmp_path):
    ends = "echo $$ > pid\ntrap 'echo told >> told; sleep 0.5; touch saved; exit 0' USR1\ntrap 'exit 9' TERM"
    env = stand_ins(tmp_path, f"{ends}\ntouch begun\nwhile :; do sleep 0.05; done")
    job = subprocess.Popen([*SBATCH, "python"], cwd=tmp_path, env=env)
    try:
        while not (tmp_path / "begun").exists():
            assert job.poll() is None
        job.send_signal(signal.SIGTERM)
        while not (tmp_path / "told").exists():
            assert job.poll() is None
        # One that comes while it saves neither ends the save nor the wait for it.
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=60) == 0
    finally:
        job.kill()
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "told").read_text().split() == ["told"]
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "17"]


def test_slurm_passes_a_signal_on_that_comes_as_the_processes_start(tmp_path):
    """When srun exists, but the line after it has not run yet: there is a pause before each line."""
    ends = "echo $$ > pid\ntrap 'touch saved; exit 0' USR1\ntrap 'exit 9' TERM\nkill -TERM $PPID"
    env = stand_ins(tmp_path, f"{ends}\nwhile :; do sleep 0.01; done")
    slowly = ["bash", "-c", 'set -T; trap "sleep 0.1" DEBUG; . "$0" "$@"', SBATCH[1], "python"]
    assert subprocess.run(slowly, cwd=tmp_path, env=env, timeout=60).returncode == 0
    assert (tmp_path / "saved").exists() and (tmp_path / "requeued").exists()


def test_the_jobset_fits_its_schema_and_the_command():
    """What JobSet (v1alpha2) and Kubernetes ask for, and the flags that the command has."""
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (hosts,) = jobset["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
    assert pod["restartPolicy"] in ("Never", "OnFailure")
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    python, dash, module, *flags = container["args"]
    assert (python, dash, module) == ("python", "-m", "lcx.train")
    known = subprocess.run(
        [sys.executable, "-m", train.__name__, "--help"], capture_output=True, text=True
    ).stdout
    given = dict(flag.split("=", 1) for flag in flags)
    assert all(flag in known for flag in given)
    assert given["--num_processes"] == str(job["completions"])
    name = jobset["metadata"]["name"]
    host, port = given["--coordinator_address"].split(":")
    assert host == f"{name}-{hosts['name']}-0-0.{name}"
    assert int(port) in [one["containerPort"] for one in container["ports"]]
    assert re.fullmatch(r"\$\((\w+)\)", given["--process_id"])[1] in [one["name"] for one in container["env"]]
    (fails,), (ends,) = job["podFailurePolicy"]["rules"], jobset["spec"]["failurePolicy"]["rules"]
    assert (fails["action"], fails["onExitCodes"]) == ("FailJob", {"operator": "In", "values": [2]})
    assert ends == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}


@pytest.mark.parametrize("program, stop, status", [
    ("exit 0", False, 0),
    ("exit 3", False, 3),
    ("trap 'exit 0' TERM; echo up; while true; do sleep 0.05; done", True, 75),
    ("trap 'exit 1' TERM; echo up; while true; do sleep 0.05; done", True, 1),
])  # fmt: skip
def test_a_pod_that_is_preempted_does_not_count_as_done(program, stop, status):
    """Kubernetes takes status 0 for the end of the work, and the run would never be started again."""
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    command = job["template"]["spec"]["containers"][0]["command"]
    process = subprocess.Popen([*command, "bash", "-c", program], stdout=subprocess.PIPE, text=True)
    if stop:
        assert process.stdout.readline() == "up\n"
        process.terminate()
    assert process.wait(60) == status


def test_the_image_copies_what_there_is():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied and all((ROOT / word).exists() for word in copied)
    sent = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in sent and {line[1:] for line in sent if line.startswith("!")} == {word.strip("./") for word in copied}
    extras = re.search(r"\[\$\{EXTRAS\},([\w,]+)\]", "\n".join(lines))[1].split(",")
    declared = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for extra in extras)


@pytest.mark.skipif(shutil.which("flock") is None, reason="this system has no flock command")
def test_of_two_scripts_that_start_at_once_one_installs(tmp_path):
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/_env.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho begin >> log\nsleep 0.5\necho end >> log\n")
    python.chmod(0o755)
    command = ["bash", "-c", ". scripts/_env.sh; use_venv dev && echo done"]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in both] == ["done\n"] * 2
    assert (tmp_path / "log").read_text().split() == ["begin", "end"], "the second finds what the first installed"


@pytest.mark.skipif(shutil.which("flock") is None, reason="this system has no flock command")
def test_a_folder_that_another_script_writes_to_is_refused(tmp_path):
    """As by two quickstarts at once: each would evaluate what the other still trains."""
    command = ["bash", "-c", f"set -e; . {ROOT}/scripts/_env.sh; claim out; echo begun; read -r line"]
    first = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "begun\n"
    second = subprocess.run(command, cwd=tmp_path, input="end\n", capture_output=True, text=True)
    assert (second.returncode, second.stdout) == (1, "") and second.stderr == (
        "lcx: another script is writing to out: wait for it to end, or choose another folder\n"
    )
    first.communicate("end\n", timeout=60)
    assert subprocess.run(command, cwd=tmp_path, input="end\n", capture_output=True, text=True).returncode == 0
