# SPDX-License-Identifier: Apache-2.0
"""``findings/``: every script has the form that its README promises. They need a package index, so none is run here."""

import re
import subprocess
from pathlib import Path

import pytest

FINDINGS = Path(__file__).resolve().parents[2] / "findings"
pytestmark = pytest.mark.skipif(not FINDINGS.is_dir(), reason="needs a source checkout around it")
SCRIPTS = sorted(FINDINGS.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_states_expected_and_seen_and_runs_pinned_packages_in_a_folder_of_its_own(script):
    text = script.read_text()
    head = text.split("set -euo pipefail")[0]
    assert re.search(r"^# Expected: ", head, re.MULTILINE)
    assert re.search(r"^# Seen: ", head, re.MULTILINE)
    assert "trap 'rm -rf \"$temp\"' EXIT" in text
    joined = text.replace("\\\n", " ")  # lines that go on
    installs = re.findall(r"pip\" install --quiet --disable-pip-version-check (.+)", joined)
    assert installs
    assert all("==" in packages for packages in installs)
    assert not re.search(r"\bimport fastreid_u|from fastreid_u|kernels/", text)
    looped = re.findall(r"for version in ([\d. ]+);", text)
    for version in {*re.findall(r"==(\d[\w.]*)", " ".join(installs)), *" ".join(looped).split()}:
        assert version in head, f"{script.name}: the head does not state {version}"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_run_names_a_word_that_fits_no_script():
    done = subprocess.run([FINDINGS / "run", "no-such-word"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "findings/run: no script has a name that contains: no-such-word\n")
