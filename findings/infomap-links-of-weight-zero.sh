#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# infomap 2.16.0: a node that only has links of weight 0 does not exist afterwards.
#
# Expected: every node of a link gets a module, as a node without links does that was added by itself.
# Seen: nodes 6 and 7, linked with weight 0, are missing from the modules; node 8, added without a link, is in one of
# its own. A graph of similarities cut at 0 loses images that way, and labels made from the answer are too short.
# Here: fastreid_u.infomap_labels labels every row; isolated rows are -1.
set -euo pipefail
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
python3 -m venv "$temp/venv"
"$temp/venv/bin/pip" install --quiet --disable-pip-version-check infomap==2.16.0
"$temp/venv/bin/python" -W ignore - > "$temp/seen" <<'PYTHON'
from infomap import Infomap

network = Infomap("--two-level --silent")
for a, b in [(0, 1), (1, 2), (0, 2), (3, 4), (4, 5), (3, 5)]:
    network.add_link(a, b, 1.0)
network.add_link(6, 7, 0.0)
network.add_node(8)
network.run()
print("modules", dict(sorted(network.modules)))
PYTHON
cat "$temp/seen"
diff "$temp/seen" - <<'SEEN'
modules {0: 1, 1: 1, 2: 1, 3: 2, 4: 2, 5: 2, 8: 3}
SEEN
