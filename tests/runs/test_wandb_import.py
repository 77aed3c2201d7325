"""runs.py action=import: what comes back from W&B against the record of the run that was logged there."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
import wandb
import yaml

from scantling.runs import table
from scantling.runs.directory import RunDirectory

UNSENT = ["path", "stamp"]
"""Columns of tables that differ by right."""


@pytest.fixture
def account(monkeypatch):
    """No account of the person who runs the tests is asked or used."""
    monkeypatch.setenv("NETRC", "/nonexistent")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def logged(command, account, tmp_path):
    """The directory of a study with one run, logged offline."""
    code, _, error = command("logger=wandb", "study=norms", "seed=3")
    assert code == 0, error
    return tmp_path / "runs" / "norms"


def same_tables(one: Path, other: Path):
    for load in (table.load_runs, table.load_curves):
        here, there = (load(study).drop(columns=UNSENT, errors="ignore") for study in (one, other))
        assert len(here)
        pd.testing.assert_frame_equal(here, there, check_like=True, check_dtype=False)


def test_offline_files_come_back_as_the_run_that_wrote_them(logged, entry, tmp_path):
    code, output, error = entry("runs", "action=import", f"source={logged}", f"paths.runs={tmp_path}/back")
    assert (code, error) == (0, "")
    (run,) = (path for path in logged.iterdir() if path.name.startswith("nano"))
    assert output.split(": ")[1].strip() == f"{len(RunDirectory(run).metrics())} rows"
    back = RunDirectory(tmp_path / "back" / "norms" / run.name)
    assert yaml.safe_load(back.config.read_text()) == yaml.safe_load((run / "config.yaml").read_text())
    same_tables(logged, tmp_path / "back" / "norms")


def test_a_run_that_was_trained_here_stays(logged, entry, tmp_path):
    (run,) = (path for path in logged.iterdir() if path.name.startswith("nano"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, output, _ = entry("runs", "action=import", f"source={logged}", f"paths.runs={tmp_path}/runs")
    assert code == 0
    assert "was trained here, and stays" in output
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_file_cut_short_is_a_run_that_is_not_finished(logged, entry, tmp_path):
    """And is renewed when the whole file has come."""
    (segment,) = logged.glob("wandb/offline-run-*")
    (whole,) = segment.glob("*.wandb")
    partial = tmp_path / "cut" / segment.name / whole.name
    partial.parent.mkdir(parents=True)
    partial.write_bytes(whole.read_bytes()[:-200])
    back = f"paths.runs={tmp_path}/back"
    code, output, _ = entry("runs", "action=import", f"source={tmp_path}/cut", back)
    assert code == 0
    assert "not finished" in output
    cut = table.load_runs(tmp_path / "back" / "norms")
    assert list(cut["status"]) == ["unfinished"]
    for name in ("params", "params.attention", "params_without_embeddings"):
        assert list(cut[name]) == list(table.load_runs(logged)[name])
    shutil.copy(whole, partial)
    assert entry("runs", "action=import", f"source={tmp_path}/cut", back)[0] == 0
    same_tables(logged, tmp_path / "back" / "norms")


class Server(BaseHTTPRequestHandler):
    """The few queries of W&B's that reading a project asks."""

    runs: dict[str, RunDirectory]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = {"data": self.answer(json.loads(body))} if self.path == "/graphql" else {}
        self.send(json.dumps(answer).encode(), "application/json")

    def do_GET(self):
        """A run's history, which the server offers as a Parquet file."""
        rows = pd.DataFrame(self.runs[self.path.removeprefix("/")].metrics())
        rows = rows.assign(**{"_step": rows["step"], "trainer/global_step": rows["step"]})
        self.send(rows.to_parquet(index=False), "application/octet-stream")

    def send(self, content: bytes, kind: str):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def answer(self, request: dict) -> dict:
        (operation,) = re.findall(r"(?:query|mutation) (\w+)", request["query"])
        asked = request.get("variables") or {}
        if operation in ("Viewer", "GetDefaultEntity"):
            me = {"id": "1", "entity": "me", "username": "me", "email": "", "flags": "{}"}
            return {"viewer": me | {"teams": {"edges": []}}}
        if asked["project"] == "nowhere":
            return {"project": None}
        if operation == "RunHistoryKeys":
            last = self.runs[asked["name"]].metrics()[-1]["step"]
            return {"project": {"run": {"historyKeys": {"lastStep": last, "keys": {}}}}}
        if operation == "RunParquetHistory":
            url = f"http://{self.headers['Host']}/{asked['runName']}"
            return {"project": {"run": {"parquetHistory": {"parquetUrls": [url], "liveData": []}}}}
        edges = [{"node": self.node(run), "cursor": run.name} for run in self.runs.values()]
        pages = {"endCursor": edges[-1]["cursor"], "hasNextPage": False}
        return {
            "project": {
                "internalId": "1",
                "readOnly": False,
                "runCount": len(edges),
                "runs": {"edges": edges, "pageInfo": pages},
            }
        }

    def node(self, run: RunDirectory) -> dict:
        config = {
            **yaml.safe_load(run.config.read_text()),
            "environment": run.environment,
            "parameters": run.summary["parameters"],
        }
        return {
            **dict.fromkeys(("jobType", "sweepName", "description", "notes", "commit"), None),
            "id": run.name,
            "name": run.name,
            "displayName": run.name,
            "state": "finished",
            "group": run.path.parent.name,
            "tags": [],
            "readOnly": False,
            "projectId": "1",
            "config": json.dumps({key: {"value": value} for key, value in config.items()}),
            "summaryMetrics": "{}",
            "systemMetrics": "{}",
            "user": {"name": "me", "username": "me"},
            "createdAt": "2026-01-01T00:00:00",
            "heartbeatAt": "2026-01-01T00:00:00",
            "historyLineCount": len(run.metrics()),
            "historyKeys": None,
        }

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server(account, monkeypatch):
    """W&B's address and key are a server's on this machine."""
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    yield listening
    listening.shutdown()
    listening.server_close()


def test_a_project_on_the_server_comes_back_as_the_runs_that_were_logged(command, entry, server, tmp_path):
    command("study=norms")
    command("study=norms", "norm=layernorm")
    study = tmp_path / "runs" / "norms"
    Server.runs = {path.name: RunDirectory(path) for path in study.iterdir()}
    code, output, error = entry("runs", "action=import", "source=me/scantling", f"paths.runs={tmp_path}/back")
    assert (code, error) == (0, "")
    assert len(output.splitlines()) == 2
    same_tables(study, tmp_path / "back" / "norms")
    code, _, error = entry("runs", "action=import", "source=me/nowhere", f"paths.runs={tmp_path}/back")
    assert code == 2
    assert error.startswith("error: source=me/nowhere: W&B says:")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "action=import wants source="),
        ("nowhere", "source=nowhere is no file or directory, and no ENTITY/PROJECT"),
        ("empty", "has no .wandb files"),
        ("foreign", "holds no run of this project"),
        ("me/scantling", "No API key configured"),
    ],
)
def test_what_cannot_be_imported_is_one_line(source, said, entry, account, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign" / "offline-run-1-x").mkdir(parents=True)
    (tmp_path / "foreign" / "offline-run-1-x" / "run-x.wandb").write_bytes(b"no file of W&B's")
    code, _, error = entry("runs", "action=import", *([] if source is None else [f"source={source}"]))
    assert code == 2
    assert said in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", ["../outside", "", ".hidden", "a/b"])
def test_a_name_that_is_no_directory_is_refused(name, tmp_path):
    from scantling.runs.wandb_import import Mirrored, import_run

    config = {"choices": {}, "environment": {}, "seed": 0, "model": {}}
    run = Mirrored(name, "study", config, [{"step": 1}], True, "source")
    with pytest.raises(ValueError, match="is no name of a directory"):
        import_run(run, tmp_path / "runs")
    assert not list(tmp_path.iterdir())
