"""A daemon's metrics: Prometheus' own parser reads them, promtool's rules hold, and the loop waits for no scrape."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from daemons import REPORT
from exposed import lint, page_of, promtool, samples
from specd.daemon.account import COUNTERS
from specd.daemon.exposition import COUNTS, WAITS, metrics
from specd.daemon.ring import COUNTERS as RING_COUNTERS
from specd.protocol.contract import ReplayInfo
from specd.protocol.messages import StatusReport
from specd.train.exposition import Exposition
from step_records import measurement, record

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


def page(report: StatusReport = REPORT) -> str:
    return page_of(metrics(report))


def test_everything_a_daemon_says_is_a_sample() -> None:
    found = samples(page())
    assert found['specd_ring_slots{state="free"}'] == 5
    assert found['specd_ring_slots{state="kept"}'] == 0
    assert found['specd_daemon_state{state="serving"}'] == 1
    kept = ReplayInfo(cells=9, used=3, cell_bytes=4096, failed="3 errors in a row: Input/output error")
    keeping = samples(page(msgspec.structs.replace(REPORT, replay=kept)))
    names = ("cells", "used_cells", "cell_bytes", "disk_failed")
    assert [keeping[f"specd_replay_{name}"] for name in names] == [9, 3, 4096, 1]
    assert found["specd_batches_total"] == 1234
    session = 'session="abababababababababababababababab",trainer="trainer-1",transport="shm"'
    assert found[f"specd_session_served_bytes_total{{{session}}}"] == 5 << 30
    assert found[f"specd_session_tokens_total{{{session}}}"] == 3_791_040
    told = {*COUNTS, *WAITS.values()}
    assert told == {*COUNTERS, *RING_COUNTERS} - {"stale_release", "stale_fill", "resets"}


def test_microseconds_are_seconds() -> None:
    report = msgspec.structs.replace(REPORT, counters={"forward_us": 2_500_000, "no_slot_us": 500_000})
    found = samples(page(report))
    assert found["specd_forward_seconds_total"] == 2.5
    assert found['specd_worker_seconds_total{state="no_slot"}'] == 0.5


def test_a_hostile_trainer_cannot_forge_a_sample() -> None:
    name = 'x",state="free"} 9\nspecd_batches_total 7\n#'
    session = msgspec.structs.replace(REPORT.sessions[0], name=name)
    text = page(msgspec.structs.replace(REPORT, sessions=(session,)))
    assert samples(text)["specd_batches_total"] == 1234
    labels = [sample.labels for family in text_string_to_metric_families(text) for sample in family.samples]
    assert name in [each["trainer"] for each in labels if "trainer" in each]


def test_names_keep_promtools_rules() -> None:
    assert lint(page()) == promtool(page()) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("# HELP a_total x\n# TYPE a_total gauge\na_total 1\n", "a_total: only counters end in _total"),
        ("# HELP a x\n# TYPE a counter\na 1\n", "a: a counter ends in _total"),
        ("# HELP a_ms x\n# TYPE a_ms gauge\na_ms 1\n", "a_ms: ms is no base unit"),
        ("# TYPE a gauge\na 1\n", "a: no help"),
    ],
)
def test_the_rules_can_fail(line: str, said: str) -> None:
    assert said in lint(line)


def test_the_dashboard_asks_for_what_is_served() -> None:
    board = json.loads(DASHBOARD.read_text())
    asked = " ".join(target["expr"] for panel in board["panels"] for target in panel.get("targets", []))
    run = Exposition(40, {})
    run.step(record(1))
    run.validated(measurement(1, acceptance_length=2.0))
    served = {name.partition("{")[0] for name in samples(page() + page_of(run.metrics()))}
    unknown = set(re.findall(r"\bspecd_\w+", asked)) - served
    assert not unknown
    assert all(panel["title"] for panel in board["panels"])
    assert {f"specd_train_validation_{name}" for name in ("loss", "acceptance_length")} <= {*re.findall(r"\w+", asked)}
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in board["panels"]]
    assert len({*places}) == len(places) == len({panel["id"] for panel in board["panels"]})
