"""publish=wandb without an account: the serialised report, and a server on this machine that checks what it
is sent."""

import gzip
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from types import SimpleNamespace

import graphql
import numpy as np
import pandas as pd
import pytest
import wandb_workspaces.reports.v2 as wandb_reports
from planted import arms

from scantling.analysis.arms import study_runs
from scantling.report.published import as_wandb, grouping, own_entity, publish, sync
from scantling.report.spec import Axis, Chart, Code, Link, Maps, Paragraph, Report, Samples, Section, Table
from scantling.runs.directory import RunDirectory

SCHEMA = """
scalar JSONString
type Query { viewer: User, project(name: String!, entityName: String!): Project,
    models(entityName: String, first: Int, after: String): ProjectConnection }
type User { id: ID!, entity: String, username: String, name: String, email: String, admin: Boolean,
    deletedAt: String, flags: JSONString, teams: EntityConnection, apiKeys: ApiKeyConnection }
type ApiKeyConnection { edges: [ApiKeyEdge!]! }
type ApiKeyEdge { node: ApiKey }
type ApiKey { id: ID!, name: String, description: String }
type EntityConnection { edges: [EntityEdge!]! }
type EntityEdge { node: Entity }
type Entity { name: String! }
type Project { id: ID!, internalId: ID!, name: String!, entityName: String!, createdAt: String,
    isBenchmark: Boolean, user: User }
type ProjectConnection { edges: [ProjectEdge!]!, pageInfo: PageInfo! }
type ProjectEdge { node: Project, cursor: String! }
type PageInfo { endCursor: String, hasNextPage: Boolean! }
type Mutation { upsertView(input: UpsertViewInput!): UpsertViewPayload }
enum ViewSource { WANDB_SDK }
input UpsertViewInput { id: ID, entityName: String, projectName: String, type: String, name: String,
    displayName: String, description: String, createdUsing: ViewSource, spec: String! }
type UpsertViewPayload { view: View, inserted: Boolean }
type View { id: ID!, type: String!, name: String!, displayName: String, description: String, project: Project,
    spec: String!, updatedAt: String }
"""
"""Of W&B's schema, which is not public, what saving a report asks for: written by hand from what its client
sends."""


class Listening(ThreadingHTTPServer):
    """Remembers the views that it was given, and what of a query is not in the schema."""

    saved: list[dict]
    refused: list[str]


@pytest.fixture
def server(monkeypatch):
    """A server that answers by `SCHEMA`; its `saved` are the variables of every `upsertView`, `refused` what
    broke it."""
    import wandb

    project = {"id": "P", "internalId": "1", "name": "scantling", "entityName": "me"}
    project |= {"createdAt": "2026-01-01T00:00:00", "isBenchmark": False}
    saved, refused = [], []

    def upsert(_, input):
        saved.append(input)
        return {"view": {**input, "id": "V", "project": project}, "inserted": True}

    answers = {
        "viewer": {"id": "U", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
        "project": project,
        "models": {"edges": [{"node": project, "cursor": "c"}], "pageInfo": {"hasNextPage": False}},
        "upsertView": upsert,
    }
    schema = graphql.build_schema(SCHEMA)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            answer = {}
            if self.path == "/graphql":
                asked = json.loads(body)
                result = graphql.graphql_sync(
                    schema, asked["query"], root_value=answers, variable_values=asked.get("variables")
                )
                refused.extend(error.message for error in result.errors or ())
                answer = {"data": result.data, "errors": [e.formatted for e in result.errors or ()] or None}
            text = json.dumps({key: value for key, value in answer.items() if value is not None}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format, *args):
            pass

    listening = Listening(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    listening.saved, listening.refused = saved, refused
    yield listening
    wandb.teardown()
    listening.shutdown()
    listening.server_close()


ONE_MAP = Maps("Attention", ("a",), (1,), (1,), np.ones((1, 1, 1, 1)))

REPORT = Report(
    title="norms",
    kind="4 arms",
    question="Which norm?",
    answer="None is better.",
    cautions=("one device of two",),
    sections=(
        Section(
            "Curves",
            (
                Chart(
                    "Loss",
                    (),
                    (Axis("tokens", "tokens"), Axis("flops", "FLOPs", log=True)),
                    (Axis("val/bpb", "bits per byte"),),
                    recorded=True,
                ),
            ),
        ),
        Section(
            "Words",
            (
                Paragraph("a text"),
                Code("python src/train.py"),
                Table("Runs", pd.DataFrame({"run": [Link("r", "../r")], "loss": [1.5]})),
                Samples((("rmsnorm, seed 0", "def f():"),)),
            ),
        ),
        Section("Only on the page", (Chart("Fit", (), (), ()), ONE_MAP)),
    ),
)


def test_a_report_is_saved_with_its_blocks_and_comes_back(server):
    url = publish(
        REPORT, entity=own_entity(), project="scantling", group="norms", by=["config.arm"], draft=True
    )
    assert server.refused == []
    (saved,) = server.saved
    assert (saved["entityName"], saved["projectName"], saved["type"]) == ("me", "scantling", "runs/draft")
    assert (saved["displayName"], saved["description"]) == ("norms", "None is better.")
    assert "/me/scantling/reports/norms" in url
    spec = json.loads(saved["spec"])
    kinds = [block["type"] for block in spec["blocks"]]
    assert "panel-grid" in kinds
    text = json.dumps(spec)
    for said in (
        "Which norm?",
        "one device of two",
        "a text",
        "python src/train.py",
        "def f():",
        "| 1.5000 |",
    ):
        assert said in text
    assert "Only on the page" not in text
    assert "../r" not in text, "a directory of this machine"
    (grid,) = (block for block in spec["blocks"] if block["type"] == "panel-grid")
    panels = [panel["config"] for panel in grid["metadata"]["panelBankSectionConfig"]["panels"]]
    assert [(panel["xAxis"], panel["metrics"], panel.get("xLogScale", False)) for panel in panels] == [
        ("tokens", ["val/bpb"], False),
        ("flops", ["val/bpb"], True),
    ]
    assert "norms" in json.dumps(grid["metadata"]["runSets"][0]["filters"])
    from wandb_workspaces.reports.v2.internal import Spec

    back = Spec.model_validate(spec).model_dump_json(by_alias=True, exclude_none=True)
    assert json.loads(back.replace(',"inlineComments":[]', "")) == spec


def test_published_is_no_draft(server):
    publish(REPORT, entity="me", project="scantling", group="norms", by=["config.arm"], draft=False)
    assert server.saved[0]["type"] == "runs"


def test_the_command_sends_offline_runs_first(record, report, server, tmp_path, monkeypatch):
    arms(record, seeds=2)
    folder = tmp_path / "runs/parts/wandb"
    record("parts", "late", ["seed=9", "arm=llama"], loss=3.0, seed=9, arm="llama", finished=False)
    llama, gelu, late = (
        RunDirectory(folder.parent / name).wandb_id for name in ("llama-0-1e+07", "gelu-0-1e+07", "late")
    )
    ready, again = f"offline-run-1-{llama}", f"offline-run-4-{llama}"
    for name, is_sent in (
        (ready, False),
        (f"offline-run-2-{gelu}", True),
        (f"offline-run-3-{late}", False),
        (again, False),
        (f"offline-run-5-{llama[:-1]}", False),  # of a course that was rolled back
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{name}.wandb").touch()
        if is_sent:
            (folder / name / f"{name}.wandb.synced").touch()
    sent = []

    def sync_command(command, **_):
        sent.append(command)
        assert server.saved == []
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("scantling.report.published.subprocess", SimpleNamespace(run=sync_command))
    code, out, err = report("study=parts", "baseline=llama", "publish=wandb", "wandb.project=scantling")
    assert (code, err) == (0, "")
    assert [command[1:] for command in sent] == [
        ["-m", "wandb", "sync", *(str(folder.relative_to(tmp_path) / name) for name in (ready, again))]
    ]
    assert "not sent, as they are not finished: late" in out
    assert "2 runs sent, report saved as a draft: http" in out
    (saved,) = server.saved
    assert '"grouping":[{"section":"config","name":"arm.value"}]' in saved["spec"].replace(" ", "")


def test_panels_group_by_what_the_arms_and_scales_of_a_study_are(record, tmp_path):
    for i, (attn, seed, tokens) in enumerate(product(("mha", "gqa"), (0, 1), ("1e6", "2e6"))):
        overrides = [f"attn={attn}", f"seed={seed}", f"budget.tokens={tokens}"]
        record("grid", f"a{i}", overrides, loss=3.0, tokens=float(tokens), seed=seed)
        record("named", f"b{i}", [*overrides[1:], f"arm={attn}", overrides[0]], loss=3.0, arm=attn, seed=seed)
    by = {name: grouping(study_runs(tmp_path / "runs" / name)) for name in ("grid", "named")}
    assert by == {
        "grid": ["config.choices.attn", "config.budget.tokens"],
        "named": ["config.arm", "config.budget.tokens"],
    }


def test_a_failed_sync_is_one_line(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path / "a")
    folder = tmp_path / f"wandb/offline-run-1-{run.wandb_id}"
    for path in (folder, run.path):
        path.mkdir(parents=True)
    (folder / "a.wandb").touch()
    (tmp_path / "a/summary.json").touch()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="wandb sync sent not all of 1 runs"):
        sync(tmp_path)


def test_an_unreachable_server_is_one_line_and_the_page_stands(record, report, tmp_path, monkeypatch):
    arms(record, seeds=2)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    finished = RunDirectory(next((tmp_path / "runs/parts").glob("*/summary.json")).parent)
    offline = tmp_path / f"runs/parts/wandb/offline-run-1-{finished.wandb_id}"
    offline.mkdir(parents=True)
    (offline / "a.wandb").touch()
    monkeypatch.setattr(sys, "executable", "/bin/false")  # nothing is sent before the server has answered
    code, _, err = report("study=parts", "baseline=llama", "publish=wandb", "wandb.project=p")
    assert code == 2
    assert "W&B does not take the report: no answer from http://127.0.0.1:9" in err.splitlines()[-1]
    assert err.splitlines()[-1].endswith("the page is runs/reports/parts/report.html")
    assert (tmp_path / "runs/reports/parts/report.html").exists()
    assert "name a project with wandb.project" in report("study=parts", "baseline=llama", "publish=wandb")[2]
    assert "publish=tweet is unknown" in report("study=parts", "publish=tweet")[2]


def test_panels_are_over_the_runs_of_the_study(server):
    by = ["config.choices.attn", "config.budget.tokens"]
    made = as_wandb(REPORT, entity="me", project="scantling", group="norms", by=by)
    (grid,) = (block for block in made.blocks if isinstance(block, wandb_reports.PanelGrid))
    assert [(runs.entity, runs.project) for runs in grid.runsets] == [("me", "scantling")]
    grouped = [key.name for key in grid.runsets[0]._to_model().grouping]
    assert grouped == ["choices.value.attn", "budget.value.tokens"]  # as W&B keeps a nested configuration
