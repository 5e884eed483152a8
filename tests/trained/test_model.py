# SPDX-License-Identifier: Apache-2.0
"""A model's file: what its header says is held to the rules under which it was written."""

import dataclasses
import re

import pytest
import torch

import fastreid_u
from fastreid_u.config import Config
from fastreid_u.engine import checkpoint
from fastreid_u.models import build_model
from fastreid_u.pixel_norm import RULE

CONFIG = Config(arch="resnet10", weights=None, height=64, width=32, pooling_type="avg")


@pytest.fixture(scope="module")
def tensors():
    return build_model("resnet10", pooling="avg", weights=None, seed=1).state_dict()


@pytest.fixture
def model(tensors, tmp_path):
    """``model(**changes)`` writes a file with a right checksum and these changes in the header's config."""

    def write(header=(), **changes):
        about = {"schema": 4, "method": "cluster_contrast", "config": CONFIG.to_dict() | changes, **dict(header)}
        checkpoint.write_described(tmp_path / "model_last.safetensors", tensors, about)
        return tmp_path / "model_last.safetensors"

    return write


def test_a_model_as_train_writes_it_is_loaded(model):
    network, about = fastreid_u.load_model(model())
    assert about["config"] == dataclasses.asdict(CONFIG)
    assert network(torch.zeros(1, 3, 64, 32)).shape == (1, 256)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch": None}, "arch must be str, got None"),
        ({"arch": 5}, "arch must be str, got 5"),
        ({"pixel_norm": "x"}, f"pixel_norm must {re.escape(RULE)}, got 'x'"),
        ({"pixel_norm": "imagenes"}, f"pixel_norm must {re.escape(RULE)}, got 'imagenes'"),
        ({"amp": "zz"}, "amp must be one of off, bf16, auto, got 'zz'"),
        ({"ap": "Rank"}, "ap must be one of rank, sklearn, trapezoid, got 'Rank'"),
        ({"height": "64"}, "height must be int, got '64'"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"channels_last": 1}, r"channels_last must be bool \| None, got 1"),
        ({"stem_relu": None}, "stem_relu must be bool, got None"),
        ({"pooling_type": ["avg"]}, r"pooling_type must be str, got \['avg'\]"),
        ({"eval_batch_size": -1}, "eval_batch_size must be at least 1, got -1"),
    ],
)
def test_a_setting_that_no_run_can_have_is_refused(model, changes, words):
    path = model(**changes)
    place = rf"^load_model: {re.escape(str(path))} must describe its network as train does, got config: {words}$"
    with pytest.raises(ValueError, match=place):
        fastreid_u.load_model(path)


@pytest.mark.parametrize("method", [None, 5, ["spcl"], "file.py:Class"])
def test_a_method_that_is_no_name_is_refused(model, method):
    with pytest.raises(ValueError, match=r"load_model: .* must hold the name of a method, as train wrote it, got"):
        fastreid_u.load_model(model({"method": method}))


@pytest.mark.parametrize("schema", [0, -3, True, 4.5, "4"])
def test_a_layout_that_never_was_is_refused(model, schema):
    with pytest.raises(ValueError, match=rf"load_model: .* got layout {schema!r}"):
        fastreid_u.load_model(model({"schema": schema}))


def test_weights_that_are_not_finite_are_named_with_their_file(model, tensors):
    """Else a network that was never trained here is said to have diverged."""
    path = model()
    checkpoint.write_described(
        path,
        tensors | {"bnneck.bias": torch.full_like(tensors["bnneck.bias"], torch.nan)},
        checkpoint.read_described(path)[1],
    )
    with pytest.raises(ValueError, match=r"model_last.safetensors must hold finite weights, got NaN .* in bnneck.bias"):
        fastreid_u.load_model(path)


def test_a_model_that_may_not_be_read_is_not_called_absent(model, monkeypatch):
    from fastreid_u.engine import own_file

    def refused(path, *rest):
        raise PermissionError(13, "Permission denied")

    path = model()
    monkeypatch.setattr(own_file.os, "open", refused)
    with pytest.raises(PermissionError, match=r"load_model: .*model_last.safetensors must be a file that may be read"):
        fastreid_u.load_model(path)


def test_an_absent_model_is_named(tmp_path):
    for run in (tmp_path, tmp_path / "run", tmp_path / "x.safetensors"):
        with pytest.raises(FileNotFoundError, match="load_model: run must be a run folder or a model file, got "):
            fastreid_u.load_model(run)
