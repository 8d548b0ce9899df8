"""The API's page in a real browser that can reach nothing but this service."""

import shutil
import subprocess
from pathlib import Path

import pytest

from app.demo import laboratory
from tests.service import PATIENCE, running

BROWSER = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)

ALONE = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    "--virtual-time-budget=10000",
)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_page_shows_every_operation_without_the_internet(tmp_path: Path) -> None:
    with running(laboratory.build(tmp_path)) as service:
        page = subprocess.run(
            [
                str(BROWSER),
                *ALONE,
                f"--user-data-dir={tmp_path}/browser",
                "--dump-dom",
                f"{service.url}/schema",
            ],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        ).stdout
        with service.http() as http:
            document = http.get(f"{service.url}/schema/openapi.json").json()
    for path in document["paths"]:
        assert f'data-path="{path}"' in page
