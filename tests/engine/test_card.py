# SPDX-License-Identifier: Apache-2.0
"""The recipe card: what a run says about itself, held against what is published."""

import pytest

import fastreid_u
from fastreid_u.engine.card import RecipeCard
from fastreid_u.recipes import get_method

MODEL = {"arch": "resnet50", "parameters": 23e6, "num_features": 2048, "pooling": "gem", "weights": "imagenet"}


def card(method, dataset="market1501", **settings):
    recipe = get_method(method)
    config = recipe.Config.for_dataset(dataset, **settings)
    return RecipeCard(recipe, config, dataset, model=MODEL, labels="DBSCAN", device="cpu", selects="best").lines()


@pytest.mark.parametrize("dataset", ["market1501", "msmt17", "veri", "personx"])
@pytest.mark.parametrize("method", sorted(fastreid_u.methods()))
def test_the_published_settings_depart_from_nothing(method, dataset):
    line = card(method, dataset)[-1]
    ours = method in ("csa_hps", "cap_cluster_contrast", "cap_cluster_contrast_proxy", "cluster_contrast_uda")
    assert line == f"  same settings as {'the method' + chr(39) + 's own defaults' if ours else 'the published recipe'}"


def test_what_is_published_for_the_data_set_counts():
    lines = card("cluster_contrast", iters=400, seed=7, workers=0)
    assert lines[-2:] == ["  differs from the published recipe in:", "    iters  400        published 200"]
    undone = card("dccc", "msmt17", eps=0.65)
    assert undone[-1].split() == ["eps", "0.65", "published", str(get_method("dccc").Config.for_dataset("msmt17").eps)]


def test_the_rendered_set_has_no_published_settings():
    lines = card("cluster_contrast", "synthetic")
    assert "  differs from the published recipe in:" in lines
    assert any(line.split() == ["arch", "resnet10", "published", "resnet50"] for line in lines)


def test_compat_is_told_apart_from_departures():
    assert "  compat      on: as published code, docs/quirks.md" in card("ice", compat=True)
    assert "  compat      off: not always as published code, docs/quirks.md" in card("ice")
    assert "  compat      on, which changes nothing in this method" in card("spcl", compat=True)
    assert not any("compat" in line for line in card("spcl"))
    for lines in (card("ice", compat=True), card("spcl", compat=True)):
        assert lines[-1] == "  same settings as the published recipe"


def test_k1_stands_beside_the_number_of_images_and_what_it_fits():
    """The defaults fit people of 30 images; 300 crops of 30 people ended in four clusters."""
    from fastreid_u.images import Images
    from fastreid_u.labels.dbscan import DBSCANLabels
    from fastreid_u.labels.infomap import InfomapLabels

    config = get_method("cluster_contrast_infomap").Config(k1=30)
    for generator in (DBSCANLabels, InfomapLabels):
        assert generator(config, Images(300)).scale() == (
            "k1 30, 300 images: fits people of about 30 images each, so about 10 of them; set k1 near the number of "
            "images that a person has"
        )
    assert "so about 1 of them" in DBSCANLabels(config, Images(20)).scale()


def test_the_scale_is_a_line_of_the_card_where_there_is_one():
    recipe = get_method("cluster_contrast")
    about = dict(model=MODEL, labels="DBSCAN", device="cpu", selects="best")
    with_scale = RecipeCard(recipe, recipe.Config(), "a", **about, scale="k1 30, 300 images").lines()
    assert "  scale       k1 30, 300 images" in with_scale
    without = RecipeCard(recipe, recipe.Config(), "a", **about).lines()
    assert [line for line in with_scale if line not in without] == ["  scale       k1 30, 300 images"]
