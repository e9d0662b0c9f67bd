"""What the doctor says of a machine; of secrets, that they are there and no more."""

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

import jobs.command_line.doctor
import main as program
from configs.errors import ExitCode
from jobs.command_line.doctor import _answer, _memory, examine
from jobs.command_line.requirements import Finding
from tests.support.source_tree import ROOT

SECRET = "hf_SECRETSECRETSECRET"
MISSING = Finding(name="torch", range="<2.14,>=2.11", found="2.9.1", is_met=False, is_required=True)


@pytest.fixture
def hub():
    """A server that says 403 to everything, and its address."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(403)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def offline(tmp_path, **more: str) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "PATH": str(tmp_path), **more}


def test_the_command_as_users_start_it(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET}
    argv = [sys.executable, str(ROOT / "main.py"), "doctor"]
    finished = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert SECRET not in finished.stdout
    lines = {line.split("  ")[1]: line for line in finished.stdout.splitlines() if line.startswith("  ")}
    assert "HF_HUB_OFFLINE is set" in lines["https://huggingface.co"]
    assert lines["wandb"].endswith("yes")
    assert str(tmp_path) in lines["disk"]
    assert {"torch", "transformers", "pydantic", "pytest", "tensorrt-llm: trtllm-build"} <= set(lines)


def test_what_lacks_ends_with_code_3_and_its_range(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(jobs.command_line.doctor, "check_requirements", lambda: (MISSING,))
    for name, value in offline(tmp_path).items():
        monkeypatch.setenv(name, value)
    assert program.main(["doctor"]) == ExitCode.ENVIRONMENT
    output, error = capsys.readouterr()
    assert "torch 2.9.1: wanted is <2.14,>=2.11" in error
    assert "pip install -r requirements.txt" in error
    assert "2.9.1  <-- wanted is <2.14,>=2.11" in output


def test_a_package_for_tests_alone_does_not_count(monkeypatch, tmp_path):
    only_tests = Finding(name="ruff", range=">=0.17", found=None, is_met=False, is_required=False)
    monkeypatch.setattr(jobs.command_line.doctor, "check_requirements", lambda: (only_tests,))
    found = examine(tmp_path, offline(tmp_path))
    assert found.problems == ()
    assert "not installed; wanted is >=0.17" in dict(found.sections["packages for the tests"])["ruff"]


def test_tokens_are_found_where_they_are_kept(tmp_path):
    def tokens(environment: dict[str, str]) -> list[str]:
        section = examine(tmp_path, environment).sections["tokens (values are never shown)"]
        return [value for _, value in section]

    assert tokens(offline(tmp_path)) == ["no", "no"]
    assert tokens(offline(tmp_path, HF_TOKEN=SECRET, WANDB_API_KEY=SECRET)) == ["yes", "yes"]
    (tmp_path / "token").write_text(SECRET)
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    assert tokens(offline(tmp_path)) == ["yes", "yes"]
    assert SECRET not in "\n".join(examine(tmp_path, offline(tmp_path)).lines())


def test_the_hub_answers_or_not(hub, tmp_path):
    environment = {key: value for key, value in offline(tmp_path).items() if key != "HF_HUB_OFFLINE"}
    assert examine(tmp_path, {**environment, "HF_ENDPOINT": hub}).sections["hub"] == [(hub, "answers (HTTP 403)")]
    assert _answer("http://127.0.0.1:9").startswith("cannot be reached")
    assert _answer("file:///etc/passwd").startswith("cannot be asked")


def test_clients_and_browsers_are_found(tmp_path):
    for name in ("trtllm-build", "chromium"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    clients = dict(examine(tmp_path, offline(tmp_path)).sections["clients"])
    assert clients["tensorrt-llm: trtllm-build"] == str(tmp_path / "trtllm-build")
    assert clients["a browser, for the report's test"] == str(tmp_path / "chromium")
    assert clients["gguf"].startswith("gguf 0.")


def test_memory_is_what_the_system_says(tmp_path):
    limit = tmp_path / "memory.max"
    said = float(_memory().split(" GiB available of ")[1].split()[0])
    assert said == pytest.approx(psutil.virtual_memory().total / 2**30, abs=0.06)
    limit.write_text("1073741824\n")
    assert _memory(limit=limit).endswith("this process may have 1.0 GiB")
    limit.write_text("max\n")
    assert "may have" not in _memory(limit=limit)
    assert _memory(meminfo=Path("/nonexistent")) == "unknown"
