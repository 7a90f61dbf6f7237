"""The HTML of a report without a browser: escaping, policy, sizes, options, and the server that shows it."""

import http.client
import re
import threading

import pytest
from synthetic_run import write_run

from lpo_jax.commands.main import main
from lpo_jax.errors import UserError
from lpo_jax.inspection.load import read_run
from lpo_jax.inspection.page import MOST_RUNS, _asset, render, save_report
from lpo_jax.inspection.server import Watcher, make_server


def markup(html: str) -> str:
    """The document without the contents of its scripts and styles."""
    return re.sub(r"(<(script|style)\b[^>]*>).*?</\2>", r"\1", html, flags=re.DOTALL)


def test_nothing_that_a_run_wrote_becomes_markup(tmp_path):
    run = write_run(tmp_path / "hostile", steps=2, responses=8, hostile=True, tokens=True)
    html = render([read_run(run)])
    html.encode("utf-8")  # no lone surrogate is left
    rest = markup(html)
    tags = {tag.lower() for tag in re.findall(r"<([a-zA-Z]+)", rest)}
    assert not tags & {"img", "svg", "iframe", "object", "embed"}
    assert not re.search(r"<[^>]+\son\w+=", rest)
    assert not re.search(r'href="(?!#)', rest)
    assert len(re.findall(r"<script\b", html)) == len(re.findall(r"</script>", html)) == 1 + 2 + 2


def test_the_policy_allows_the_embedded_scripts_only(synthetic_run):
    html = render([read_run(synthetic_run)])
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert "default-src &#39;none&#39;" in policy and "connect-src &#39;none&#39;" in policy
    assert policy.count("sha256-") == 2 and "unsafe-eval" not in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    assert "connect-src &#39;self&#39;" in render([read_run(synthetic_run)], live=True)


@pytest.mark.parametrize("name", ["dom.js", "charts.js", "groups.js", "views.js", "main.js"])
def test_the_script_makes_no_markup_from_text(name):
    found = re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", _asset(name)
    )
    assert not found


def test_settings_that_differ_from_the_defaults(synthetic_run):
    rest = markup(render([read_run(synthetic_run)]))
    settings = rest.split('id="settings"')[1]
    assert "<code>optimizer.learning_rate</code></td><td>1e-05" in settings
    assert "<code>sampling.temperature</code>" not in settings


def test_the_command_writes_a_file(synthetic_run, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert main(["report", str(synthetic_run), "--out", str(out)]) == 0
    assert f"wrote {out} (" in capsys.readouterr().out
    assert out.read_text().startswith("<!doctype html>")
    assert main(["report", str(synthetic_run), "--out", str(tmp_path)]) == 2
    assert "is a directory; name a file" in capsys.readouterr().err


def test_too_many_runs(synthetic_run, tmp_path):
    with pytest.raises(UserError, match="at most"):
        save_report([synthetic_run] * (MOST_RUNS + 1), tmp_path / "x.html")


@pytest.fixture
def server(synthetic_run):
    with make_server(Watcher([synthetic_run]), 0) as opened:
        threading.Thread(target=opened.serve_forever, daemon=True).start()
        yield opened
        opened.shutdown()


def get(server, path, method="GET", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_the_server_is_local_and_read_only(server, synthetic_run):
    assert server.server_address[0] == "127.0.0.1"
    before = {path: path.stat().st_mtime_ns for path in synthetic_run.rglob("*")}
    code, body = get(server, "/")
    assert code == 200 and body.startswith(b"<!doctype html>")
    assert get(server, "/state")[0] == 200
    for path in ("/../../etc/passwd", "/metrics.jsonl", "//etc/passwd", "/%2e%2e/config.yaml"):
        assert get(server, path)[0] == 404
    for method in ("POST", "PUT", "DELETE"):
        assert get(server, "/", method)[0] == 501
    assert get(server, "/", host="attacker.example")[0] == 403
    assert {path: path.stat().st_mtime_ns for path in synthetic_run.rglob("*")} == before


def test_a_port_that_is_taken(server, synthetic_run, capsys):
    assert main(["watch", str(synthetic_run), "--port", str(server.server_port)]) == 2
    assert "cannot listen there" in capsys.readouterr().err
