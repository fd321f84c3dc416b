"""The site builds without a warning: every page is in it, links and images are there, docstrings can be read."""

import os
import subprocess
import sys

import blocks


def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=blocks.ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    for page in (blocks.ROOT / "docs").rglob("*.md"):
        built = tmp_path / page.relative_to(blocks.ROOT / "docs").with_suffix("") / "index.html"
        assert built.exists() or page.name == "index.md"
        assert f"{page.relative_to(blocks.ROOT / 'docs')}" in (blocks.ROOT / "mkdocs.yml").read_text()
    reference = (tmp_path / "reference" / "use" / "index.html").read_text(encoding="utf-8")
    assert "TextModel" in reference
    assert "Raises" in reference
