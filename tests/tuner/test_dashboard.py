"""optuna-dashboard, as it is really served, shows what ds-tune keeps."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Tune = Callable[..., subprocess.CompletedProcess[str]]
DEADLINE_SECONDS = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def dashboard(tune: Tune, tmp_path: Path) -> Iterator[int]:
    """The port of a dashboard that serves a study with throughputs and with an out-of-memory trial."""
    assert tune("--trials", "4", answer="stage 0 does not fit").returncode == 0
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", "ds_tune.tuner", "dashboard", "--port", str(port)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line == f"optuna-dashboard on http://127.0.0.1:{port}/dashboard/ (Ctrl-C ends it)\n"
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(0.1)
        yield port
        server.send_signal(signal.SIGINT)
        assert server.wait(DEADLINE_SECONDS) == 0
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


def get(port: int, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{path}", timeout=DEADLINE_SECONDS) as answer:
        return json.load(answer)


def listening_addresses(port: int) -> set[str]:
    """Where something listens on a port, as /proc/net writes addresses in hexadecimal."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not Path(table).exists():
            continue
        for row in Path(table).read_text().splitlines()[1:]:
            fields = row.split()
            address, _, hexadecimal = fields[1].partition(":")
            if fields[3] == "0A" and int(hexadecimal, 16) == port:
                found.add(address)
    return found


def test_the_study_is_shown_with_its_trials_their_states_constraints_and_notes(dashboard: int) -> None:
    [study] = get(dashboard, "studies")["study_summaries"]
    assert study["study_name"] == "ds-tune"
    detail = get(dashboard, f"studies/{study['study_id']}?after=0")
    assert [direction.lower() for direction in detail["directions"]] == ["maximize"]
    assert detail["objective_names"] == ["samples_per_second"]
    assert "## Detailed result summary" in detail["note"]["body"]

    pruned, baseline, third, _ = detail["trials"]
    assert [trial["state"] for trial in detail["trials"]][:2] == ["Pruned", "Complete"]
    assert pruned["constraints"][0] > 0
    assert "OutOfMemoryError" in pruned["note"]["body"]
    assert baseline["constraints"][0] <= 0
    assert baseline["values"][0] > 0
    assert [value["step"] for value in baseline["intermediate_values"]] == [1, 2, 3, 4, 5]
    assert {param["name"] for param in third["params"]} == {
        "zero_stage",
        "micro_batch_size",
        "gradient_accumulation_steps",
    }
    attributes = {attribute["key"]: attribute["value"] for attribute in baseline["user_attrs"]}
    assert "z1_gas1_tmbspg1" in attributes["name"]
    assert {"peak_memory_gib", "step_seconds", "wall_seconds", "samples_per_second_ci95_low"} <= set(attributes)

    # A page as wide as a screen, and columns worth sorting.
    for shown in (detail, study, *detail["trials"]):
        assert shown["user_attrs"]
        assert all(len(attribute["value"]) <= 100 for attribute in shown["user_attrs"])
    sortable = {attribute["key"] for attribute in detail["union_user_attrs"] if attribute["sortable"]}
    assert {"samples_per_second_ci95_low", "peak_memory_gib", "wall_seconds"} <= sortable

    bodies = [trial["note"]["body"] for trial in detail["trials"]]
    names = [next(each["value"] for each in trial["user_attrs"] if each["key"] == "name") for trial in detail["trials"]]
    assert all(body.startswith(f"**{name}**") for body, name in zip(bodies, names, strict=True))
    [winner] = [number for number, body in enumerate(bodies) if "★ winner" in body.splitlines()[0]]
    assert " samples/s verified; " in bodies[winner] and " ± " in bodies[winner]
    assert detail["note"]["body"].startswith(f"Trial {winner}, **{names[winner]}**, is the winner.")
    best = {attribute["key"]: attribute["value"] for attribute in study["user_attrs"]}["best"]
    assert best == f"{names[winner]} (trial {winner})"

    # It has no authentication and can delete studies.
    assert listening_addresses(dashboard) == {"0100007F"}


def test_a_port_that_is_taken_is_said(tune: Tune, command: Tune) -> None:
    assert tune("--trials", "1").returncode == 0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = command("dashboard", "--port", str(port))
    assert refused.returncode == 2
    assert refused.stderr == f"ds-tune: --port {port} cannot be used (Address already in use); name another one\n"
    refused = command("dashboard", "--port", "65536")
    assert refused.returncode == 2
    assert refused.stderr.startswith("ds-tune: argument --port: 65536 is not a port, which go up to 65535")
    assert refused.stderr.count("\n") == 1
    refused = command("dashboard", "--study", "other")
    assert refused.returncode == 2
    assert "no study other in sqlite:///" in refused.stderr
