"""The page of metrics: where it listens, whom it answers, and what it says where it cannot."""

from __future__ import annotations

import logging
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from exposed import lint, samples
from specd.errors import ConfigError
from specd.scrape import Collect, answer, listen, parse, serving


def collect() -> Iterator[Metric]:
    yield GaugeMetricFamily("specd_things", "Things.", value=3)


@contextmanager
def served(source: Collect) -> Iterator[str]:
    """A page and where it is."""
    with listen("0") as listener, answer(listener, source) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/metrics"
        server.shutdown()
        thread.join()


def get(url: str) -> tuple[int, str, str]:
    """Status, type and text of a page."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


def test_prometheus_reads_the_page() -> None:
    with served(collect) as url:
        status, kind, text = get(url)
    assert (status, kind.partition(";")[0]) == (200, "text/plain")
    assert samples(text)["specd_things"] == 3
    assert samples(text)["process_resident_memory_bytes"] > 1 << 20
    assert lint(text) == []


def test_other_pages_and_a_silent_source_are_errors_of_http() -> None:
    def silent() -> Iterator[Metric]:
        raise TimeoutError("control did not answer within 5 s")
        yield

    with served(silent) as url:
        assert get(url)[::2] == (503, "control did not answer within 5 s\n")
        assert get(url.replace("/metrics", "/secrets"))[0] == 404


def test_a_peer_that_says_nothing_holds_nobody_for_long() -> None:
    with served(collect) as url:
        host, port = url.removeprefix("http://").partition("/")[0].split(":")
        with socket.create_connection((host, int(port))):
            assert get(url)[0] == 200


@pytest.mark.parametrize(
    ("address", "found"),
    [("9464", ("127.0.0.1", 9464)), ("192.0.2.7:0", ("192.0.2.7", 0)), ("[::1]:80", ("::1", 80)), ("a:80", ("a", 80))],
)
def test_addresses(address: str, found: tuple[str, int]) -> None:
    assert parse(address) == found


@pytest.mark.parametrize("address", ["", "x", "99999", "::1:80", "http://a:80", ":80", "a b:80"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"expected PORT, .* or ADDRESS:PORT"):
        parse(address)


def test_a_port_that_is_taken_is_named() -> None:
    with served(collect) as url:
        port = url.rpartition(":")[2].partition("/")[0]
        with (
            pytest.raises(ConfigError, match=rf"metrics='{port}': cannot listen there: .*in use"),
            serving(port, collect),
        ):
            pytest.fail("it was served twice")


def test_a_host_that_cannot_be_one_is_named() -> None:
    with pytest.raises(ConfigError, match=r"metrics='é..:0': cannot listen there: .*idna"), serving("é..:0", collect):
        pytest.fail("it was served")


def test_a_page_beyond_this_machine_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), serving("0.0.0.0:0", collect):
        assert "read by everybody" in caplog.text
