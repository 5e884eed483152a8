# SPDX-License-Identifier: Apache-2.0
"""Settings: defaults with sources, per-dataset rows, refusals, and the TOML file they are kept in."""

import dataclasses

import pytest

from fastreid_u.config import Config, dump_toml, load_toml
from fastreid_u.methods.cluster_contrast import ClusterContrastConfig


def test_published_defaults_of_cluster_contrast():
    config = ClusterContrastConfig()
    published = {
        "arch": "resnet50", "pooling_type": "gem", "height": 256, "width": 128, "bn_group": 64,
        "eps": 0.6, "min_samples": 4, "k1": 30, "k2": 6, "temp": 0.05, "momentum": 0.1, "use_hard": False,
        "batch_size": 256, "num_instances": 16, "lr": 3.5e-4, "weight_decay": 5e-4, "epochs": 50, "iters": 400,
        "step_size": 20, "gamma": 0.1, "erase": 0.5, "center_per_camera": False, "seed": 1, "eval_step": 10,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in published} == published
    assert ClusterContrastConfig.for_dataset("market1501").iters == 200
    assert ClusterContrastConfig.for_dataset("msmt17").iters == 400
    assert ClusterContrastConfig.for_dataset("veri").height == ClusterContrastConfig.for_dataset("veri").width == 224


def test_every_field_says_what_it_is_and_where_its_default_comes_from():
    for field in dataclasses.fields(ClusterContrastConfig):
        assert field.metadata["help"], field.name
        assert field.metadata["source"], field.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 0.0}, r"eps must lie in \(0, 1\), got 0.0"),
        ({"eps": 1.5}, r"eps must lie in \(0, 1\), got 1.5"),
        ({"k1": 0}, "k1 must be at least 1, got 0"),
        ({"batch_size": 30}, r"batch_size must be a multiple of num_instances \(16\), got 30"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"pooling_type": "median"}, "pooling_type must be one of avg, gem, max, got 'median'"),
        ({"bn_group": 1}, "bn_group must be at least 2 or None, got 1"),
        ({"temp": -1.0}, "temp must be positive"),
        ({"momentum": 1.5}, r"momentum must lie in \[0, 1\]"),
        ({"iters": -1}, "iters must be 0 or more"),
    ],
)
def test_a_value_out_of_range_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ClusterContrastConfig(**changes)


@pytest.mark.parametrize("changes", [{"k1": 30.5}, {"k1": True}, {"eps": "0.6"}, {"use_hard": 1}, {"arch": None}])
def test_a_value_of_the_wrong_kind_is_named(changes):
    (name, value) = next(iter(changes.items()))
    with pytest.raises(TypeError, match=f"{name} must be .*, got {value!r}"):
        ClusterContrastConfig(**changes)


def test_whole_numbers_serve_as_floats():
    assert ClusterContrastConfig(color_jitter=1).color_jitter == 1.0
    assert isinstance(ClusterContrastConfig(color_jitter=1).color_jitter, float)


def test_an_unknown_option_suggests_the_known():
    with pytest.raises(TypeError, match="unknown option 'num_instance'; did you mean num_instances"):
        ClusterContrastConfig.for_dataset("market1501", num_instance=4)
    with pytest.raises(TypeError, match=r"unknown option 'zzz'; known: .*batch_size"):
        Config.for_dataset("market1501", zzz=4)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ClusterContrastConfig().eps = 0.4


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
