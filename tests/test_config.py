# SPDX-License-Identifier: Apache-2.0
"""Settings: defaults with sources, per-dataset rows, rules, and changed defaults."""

import dataclasses

import pytest

from fastreid_u.config import Config, Rule, at_least, changed, option
from fastreid_u.recipes import get_method, methods
from fastreid_u.recipes.cluster_contrast import ClusterContrastConfig


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base(Config):
    size: int | None = option(8, "a size", source="a paper", flags=("-s",), rule=at_least(2))
    kind: str = option("a", "a kind", choices=("a", "b"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changed(Base):
    size = changed(16, source="a log")
    kind = changed("b", "another kind", rule=Rule("not be a", lambda v: v != "a"))
    extra: float = option(1.0, "one more")


def test_a_changed_default_keeps_all_else_of_its_field():
    fields = {field.name: field for field in dataclasses.fields(Changed)}
    assert [*fields] == [*(field.name for field in dataclasses.fields(Base)), "extra"], "in the same order"
    size, kind = fields["size"], fields["kind"]
    assert (size.default, size.type, size.kw_only) == (16, int | None, True)
    metadata = dict(size.metadata)
    assert metadata.pop("rule").words == "be at least 2"
    assert metadata == {"help": "a size", "source": "a log", "flags": ("-s",), "choices": (), "switch": False}
    assert (kind.metadata["help"], kind.metadata["source"], kind.metadata["choices"]) == (
        "another kind", "ours", ("a", "b"),
    )  # fmt: skip
    assert (Base().size, Changed().size, Changed.size, Changed(size=None).size) == (8, 16, 16, None)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"size": 1}, ValueError, "config: size must be at least 2, got 1"),
        ({"size": 2.5}, TypeError, r"config: size must be int \| None, got 2.5"),
        ({"kind": "a"}, ValueError, "config: kind must not be a, got 'a'"),
        ({"kind": "c"}, ValueError, "config: kind must be one of a, b, got 'c'"),
    ],
)
def test_a_changed_field_is_checked_as_before(changes, error, message):
    with pytest.raises(error, match=message):
        Changed(**changes)


def test_what_no_base_class_has_cannot_be_changed():
    with pytest.raises(TypeError, match="changed must name a field of a base class of Wrong, got 'epoch'"):

        class Wrong(Config):
            epoch = changed(75)


@pytest.mark.parametrize("name", methods())
def test_every_method_keeps_the_flags_choices_and_rules_that_all_methods_share(name):
    shared = {field.name: field for field in dataclasses.fields(Config)}
    for field in dataclasses.fields(get_method(name).Config):
        if field.name in shared:
            ours = shared[field.name].metadata
            assert (field.metadata["flags"], field.metadata["choices"]) == (ours["flags"], ours["choices"]), field.name
            assert bool(field.metadata["rule"]) >= bool(ours["rule"]), field.name


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bmw", {"push_weight": -1.0}, "push_weight must be 0 or more, got -1.0"),
        ("bmw", {"use_hard": True}, "use_hard must be False, as BMW has its own update, got True"),
        ("cacl", {"ratio": 0.0}, "ratio must be positive, got 0.0"),
        ("cacl", {"focal_gamma": 0.5}, "focal_gamma must be 0 or at least 1, got 0.5"),
        ("cacl", {"eps_gap": 0.6}, "eps_gap must keep eps - eps_gap positive, got 0.6"),
        ("cap", {"hard_negatives": 0}, "hard_negatives must be at least 1, got 0"),
        ("cap", {"inter_start": -1}, "inter_start must be 0 or more, got -1"),
        ("cap_cluster_contrast", {"cluster_weight": 0.0}, "cluster_weight must be positive where intra_weight is 0"),
        ("cap_cluster_contrast_proxy", {"temp": 0.1}, "temp must be left alone without a memory of clusters"),
        ("cluster_contrast_infomap", {"min_similarity": 0.0}, r"min_similarity must lie in \(0, 1\], got 0.0"),
        ("cluster_contrast_uda", {"keep": 2.0}, r"keep must lie in \[0, 1\], got 2.0"),
        ("cluster_contrast_uda", {"reliability": True, "eps_gap": 0.5}, r"eps_gap must keep eps -\+ eps_gap within"),
        ("csa_hps", {"use_hard": True}, "use_hard must be False, as update_rule says which images count, got True"),
        ("csa_hps", {"saa_lr": 0.0}, "saa_lr must be positive, got 0.0"),
        ("dccc", {"use_hard": True}, "use_hard must be False, as update_rule says which images count, got True"),
        ("dccc", {"tau_w": float("nan")}, "tau_w must be positive, got nan"),
        ("ice", {"soft_temp": 0.0}, "soft_temp must be positive, got 0.0"),
        ("ice", {"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ("pplr", {"parts": 0}, "parts must be at least 1, got 0"),
        ("pplr_camera", {"beta": -0.1}, r"beta must lie in \[0, 1\], got -0.1"),
        ("spcl", {"eps_gap": 0.5}, r"eps_gap must keep eps -\+ eps_gap within \(0, 1\), got 0.5"),
        ("vit_cluster_contrast", {"drop_path": 1.0}, r"drop_path must lie in \[0, 1\), got 1.0"),
    ],
)
def test_each_methods_own_rules(name, changes, message):
    with pytest.raises(ValueError, match=f"config: {message}"):
        get_method(name).Config(**changes)


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
