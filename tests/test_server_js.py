"""The official JavaScript client, where node and npm's packages can be had."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from serving import Server

CLIENT_VARIABLE = "KREA_LOCAL_TEST_NODE_MODULES"
"""A folder `node_modules` that holds @fal-ai/client."""


def test_the_javascript_client_does_all_of_it_in_both_ways(server: Server, tmp_path: Path) -> None:
    modules = os.environ.get(CLIENT_VARIABLE)
    if shutil.which("node") is None or modules is None:
        pytest.skip(f"needs node, and {CLIENT_VARIABLE}; or tests/js/run.sh, which fetches it")
    (tmp_path / "node_modules").symlink_to(modules)
    script = shutil.copy(Path(__file__).parent / "js" / "client.mjs", tmp_path)
    answer = subprocess.run(
        ["node", script, server.url], capture_output=True, text=True, timeout=600
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.split() == ["ok", "proxyUrl", "ok", "requestMiddleware"]
