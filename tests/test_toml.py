# SPDX-License-Identifier: Apache-2.0
"""The files that settings are kept in."""

import pytest

from fastreid_u._toml import dump_toml, load_toml
from fastreid_u.recipes.cluster_contrast import ClusterContrastConfig


def test_toml_round_trip():
    config = ClusterContrastConfig(weights=None, bn_group=None, lr=1e-9)
    text = dump_toml({"config": config.to_dict(), "run": {"path": 'a "quoted" C:\\folder\n\ttab', "flag": True}})
    back = load_toml(text)
    assert back["run"] == {"path": 'a "quoted" C:\\folder\n\ttab', "flag": True}
    values = {name: back["config"].get(name) for name in config.to_dict()}
    assert ClusterContrastConfig(**values) == config


def test_toml_refuses_what_it_cannot_say():
    with pytest.raises(TypeError, match="got \\[1\\]"):
        dump_toml({"data": {"list": [1]}})


def test_names_of_any_letters_come_back():
    """A method of one's own may name its settings in any language that Python reads."""
    tables = {"config": {"größe": 3, "a b": 0.5, 'x"=y': "z", "plain_name-1": True}}
    assert load_toml(dump_toml(tables)) == tables
    assert "plain_name-1 = true" in dump_toml(tables)
    assert load_toml(dump_toml({"config": {"größe": None}})) == {"config": {}}
