# SPDX-License-Identifier: Apache-2.0
"""Features of crops in memory, and of networks without a run."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fastreid_u
from fastreid_u.cli import main
from fastreid_u.models import build_model

SIZE = dict(arch="resnet10", height=32, width=16)
QUIET = dict(device="cpu", workers=0)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A colour and a grey crop, of sizes that are not the network's."""
    folder = tmp_path_factory.mktemp("crops")
    Image.fromarray(pixels(40, 21, 3)).save(folder / "a.png")
    Image.fromarray(pixels(50, 20, seed=1)).save(folder / "b.png")
    return [folder / "a.png", folder / "b.png"]


def forms(files):
    """Each crop in each form that lies in memory."""
    colour, grey = np.asarray(Image.open(files[0])), np.asarray(Image.open(files[1]))
    return {
        "array": [colour, grey],
        "one channel": [colour, grey[:, :, None]],
        "strided": [np.asarray(Image.open(files[0]))[::-1][::-1], np.asfortranarray(grey)],
        "tensor": [torch.from_numpy(colour.copy()).permute(2, 0, 1), torch.from_numpy(grey.copy())],
        "tensor of one channel": [
            torch.from_numpy(colour.copy()).permute(2, 0, 1),
            torch.from_numpy(grey.copy())[None],
        ],
        "pil": [Image.open(files[0]), Image.open(files[1])],
        "mixed with files": [colour, files[1]],
        "mixed with names": [str(files[0]), Image.open(files[1])],
    }


@pytest.mark.parametrize(
    "form",
    [
        "array",
        "one channel",
        "strided",
        "tensor",
        "tensor of one channel",
        "pil",
        "mixed with files",
        "mixed with names",
    ],
)
def test_crops_in_memory_give_the_bits_of_their_files(files, form):
    expected = fastreid_u.extract(None, files, **SIZE, **QUIET)
    found = fastreid_u.extract(None, forms(files)[form], **SIZE, **QUIET)
    assert torch.equal(found.features, expected.features)
    in_memory = [not isinstance(item, str) and not hasattr(item, "__fspath__") for item in forms(files)[form]]
    assert found.paths == [f"images[{i}]" if crop else str(files[i]) for i, crop in enumerate(in_memory)]
    assert found.bad == {}


def test_a_single_crop_and_a_batch_of_crops(files):
    crops = pixels(3, 40, 21, 3)
    batch = fastreid_u.extract(None, crops, **SIZE, **QUIET).features
    channels_first = fastreid_u.extract(None, torch.from_numpy(crops).permute(0, 3, 1, 2), **SIZE, **QUIET).features
    assert torch.equal(batch, channels_first)
    assert batch.shape == (3, 256)
    for item in (crops[0], torch.from_numpy(crops[0]).permute(2, 0, 1), Image.fromarray(crops[0])):
        one = fastreid_u.extract(None, item, **SIZE, **QUIET)
        torch.testing.assert_close(one.features, batch[:1])
    assert fastreid_u.extract(None, np.array([str(file) for file in files]), **SIZE, **QUIET).features.shape[0] == 2


def test_a_pil_image_is_turned_and_laid_on_black_as_its_file_is(tmp_path):
    image = Image.fromarray(pixels(30, 20, 4), "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    expected = fastreid_u.extract(None, [tmp_path / "turned.png"], **SIZE, **QUIET)
    found = fastreid_u.extract(None, Image.open(tmp_path / "turned.png"), **SIZE, **QUIET)
    assert torch.equal(found.features, expected.features)


@pytest.mark.parametrize(
    ("item", "error", "words"),
    [
        (np.zeros((8, 4, 3)), TypeError, r"images\[1\] must be of dtype uint8 \(0 to 255\), got float64"),
        (torch.zeros(3, 8, 4), TypeError, r"images\[1\] must be of dtype uint8 .*, got torch.float32"),
        (pixels(3, 8, 4), ValueError, r"images\[1\] must have shape \(H, W, 3\), .* got \(3, 8, 4\)"),
        (torch.zeros(8, 4, 3, dtype=torch.uint8), ValueError, r"must have shape \(3, H, W\), .* got \(8, 4, 3\)"),
        (pixels(8, 4, 4), ValueError, r"must have shape .* got \(8, 4, 4\)"),
        (pixels(0, 4, 3), ValueError, r"must have shape .* none of them 0, got \(0, 4, 3\)"),
        (pixels(8), ValueError, r"must have shape .* got \(8,\)"),
        (7, TypeError, r"images\[1\] must be a path, an array, a tensor or a PIL image, got 7"),
    ],
)
def test_what_is_no_crop_is_refused_by_its_place(item, error, words):
    with pytest.raises(error, match=f"extract: .*{words}"):
        fastreid_u.extract(None, [pixels(8, 4, 3), item], **SIZE, **QUIET)


# Networks without a run


def test_a_file_of_weights_is_measured_without_a_run(tiny_world, tmp_path, capsys):
    model = build_model("resnet10", weights=None, pooling="avg", seed=4).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    options = dict(height=64, width=32, quiet=True, **QUIET)
    metrics = fastreid_u.evaluate(tmp_path / "w.safetensors", tiny_world, arch="resnet10", **options)
    assert 0 < metrics["mAP"] < 1
    words = ["--arch", "resnet10", "--height", "64", "--width", "32", "--device", "cpu"]
    assert main(["evaluate", str(tmp_path / "w.safetensors"), str(tiny_world), *words]) == 0
    assert f"Mean AP: {metrics['mAP']:4.1%}" in capsys.readouterr().out
    query = tiny_world / "query"
    features = fastreid_u.extract(tmp_path / "w.safetensors", query, arch="resnet10", **options).features
    out = tmp_path / "f.npz"
    assert main(["extract", str(tmp_path / "w.safetensors"), str(query), "--out", str(out), *words]) == 0
    assert np.array_equal(np.load(out)["features"], features.numpy())
    assert main(["extract", "None", str(query), "--out", str(out), *words]) == 0
    assert not np.array_equal(np.load(out)["features"], features.numpy())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (dict(height=64), TypeError, "height must be left out without arch, since a run has its own, got 64"),
        (dict(arch="resnet10", lr=0.1), TypeError, "lr must be one of height, width, .*, got 0.1"),
        (dict(arch="resnet10", amp="fp16"), ValueError, "amp must be one of off, bf16, auto, got 'fp16'"),
        (dict(arch="resnet10", width=0), ValueError, "width must be at least 1, got 0"),
    ],
)
def test_settings_that_no_network_has_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        fastreid_u.extract(None, pixels(8, 4, 3), **call, **QUIET)


def test_a_network_without_a_run_needs_a_data_set():
    with pytest.raises(ValueError, match="evaluate: dataset must be given for a network without a run, got None"):
        fastreid_u.evaluate(None, arch="resnet10", **QUIET)


def test_the_precision_can_be_chosen_for_extraction_alone():
    """In bfloat16 features are near those of float32, and not the same."""
    exact = fastreid_u.extract(None, pixels(4, 40, 21, 3), **SIZE, **QUIET).features
    rough = fastreid_u.extract(None, pixels(4, 40, 21, 3), amp="bf16", **SIZE, **QUIET).features
    assert not torch.equal(exact, rough)
    assert (exact * rough).sum(1).min() > 0.999


@pytest.fixture
def elsewhere():
    """As under a script that sets a GPU as torch's default device."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_a_default_device_that_a_script_has_set_changes_nothing(smoke, tiny_world, request):
    run = smoke("cluster_contrast", epochs=1, iters=1)
    crops = pixels(2, 40, 21, 3)
    expected = fastreid_u.extract(run.folder, crops, **QUIET).features
    metrics = fastreid_u.evaluate(run.folder, tiny_world, quiet=True, **QUIET)
    request.getfixturevalue("elsewhere")
    model, _ = fastreid_u.load_model(run.folder)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert torch.equal(fastreid_u.extract(run.folder, crops, **QUIET).features, expected)
    assert fastreid_u.evaluate(run.folder, tiny_world, quiet=True, **QUIET) == metrics
    assert next(build_model("resnet10", weights=None).parameters()).device.type == "cpu"
