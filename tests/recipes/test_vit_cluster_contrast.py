# SPDX-License-Identifier: Apache-2.0
"""The transformer's recipe: its settings, its weights from a file, a run."""

import numpy as np
import pytest
import torch

from fastreid_u.data import test_transform
from fastreid_u.models import build_model
from fastreid_u.recipe import Images
from fastreid_u.recipes.vit_cluster_contrast import ViTClusterContrast, ViTClusterContrastConfig

timm = pytest.importorskip("timm", reason="timm is not installed")


def test_settings_are_the_scripts():
    config = ViTClusterContrastConfig.for_dataset("market1501", weights=None)
    assert (config.optimizer, config.lr, config.momentum, config.use_hard) == ("sgd", 3.5e-4, 0.2, True)
    assert (config.batch_size, config.num_instances, config.iters, config.epochs) == (256, 8, 200, 50)
    assert (config.drop_path, config.pixel_norm, config.eps) == (0.3, "half", 0.6)
    (normalize,) = test_transform(8, 4, pixel_norm=config.pixel_norm).steps
    assert (normalize.mean, normalize.std) == ((0.5,) * 3, (0.5,) * 3)
    msmt17 = ViTClusterContrastConfig.for_dataset("msmt17")
    assert (msmt17.eps, msmt17.bn_group, msmt17.eval_step) == (0.7, 128, 50)


def test_weights_must_be_chosen():
    with pytest.raises(ValueError, match="weights must name a file of person-pretrained weights"):
        ViTClusterContrast(ViTClusterContrastConfig(), Images(4))
    with pytest.raises(FileNotFoundError, match=r"path must be a file, got nowhere\.pth"):
        build_model("timm/test_vit", weights="nowhere.pth")


@pytest.mark.parametrize("prefix", ["", "backbone.", "base.", "module.backbone."])
@pytest.mark.parametrize("wrapper", [None, "teacher", "model", "state_dict"])
def test_weights_of_dino_and_of_the_published_network_load(tmp_path, prefix, wrapper):
    """Pre-trained at the size of the crops: positions are taken as they are. Heads find no place and are named."""
    net = timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=(64, 32))
    state = {f"{prefix}{name}": tensor for name, tensor in net.state_dict().items()}
    state |= {"head.mlp.0.weight": torch.zeros(2, 2)}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "person.pth")
    model = build_model("timm/test_vit", weights=tmp_path / "person.pth", image_size=(64, 32))
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(model.backbone.net.state_dict()[name], tensor, msg=name)
    assert "head.mlp.0.weight" in model.card["weights"]


@pytest.mark.parametrize("size", [(128, 64), (96, 96)])
def test_positions_of_another_grid_are_resampled(tmp_path, size):
    """Crops twice as high as wide, or squares: bilinear, the class token's as it was."""
    net = timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=size)
    rows, columns = (side // 16 for side in size)
    slope = torch.arange(rows, dtype=torch.float32).repeat_interleave(columns)  # grows from row to row
    net.pos_embed.data[0, 1:] = slope[:, None]
    torch.save(net.state_dict(), tmp_path / "person.pth")
    found = build_model("timm/test_vit", weights=tmp_path / "person.pth", image_size=(96, 32)).backbone.net.pos_embed
    torch.testing.assert_close(found[0, 0], net.pos_embed[0, 0])
    expected = ((torch.arange(6) + 0.5) * rows / 6 - 0.5).clamp(0, rows - 1)
    torch.testing.assert_close(found[0, 1:, 0], expected.repeat_interleave(2))


def test_as_many_positions_in_another_shape_are_resampled_too(tmp_path):
    net = timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=(160, 160))
    net.pos_embed.data[0, 1:] = torch.arange(10.0).repeat_interleave(10)[:, None]  # grows from row to row
    torch.save(net.state_dict(), tmp_path / "square.pth")
    found = build_model("timm/test_vit", weights=tmp_path / "square.pth", image_size=(320, 80)).backbone.net.pos_embed
    expected = ((torch.arange(20) + 0.5) / 2 - 0.5).clamp(0, 9)
    torch.testing.assert_close(found[0, 1:, 0], expected.repeat_interleave(5))


def test_positions_of_no_known_grid_are_refused(tmp_path):
    net = timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=(96, 32))
    torch.save(net.state_dict(), tmp_path / "person.pth")
    with pytest.raises(ValueError, match=r"pos_embed must have shape"):
        build_model("timm/test_vit", weights=tmp_path / "person.pth", image_size=(64, 32))


def test_stochastic_depth_reaches_the_blocks():
    model = build_model("timm/vit_tiny_patch16_224", weights=None, drop_path=0.3)
    assert model.backbone.net.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    with pytest.raises(ValueError, match="drop_path must be 0 for resnet50"):
        build_model("resnet50", weights=None, drop_path=0.3)


def test_two_epochs(smoke):
    run = smoke("vit_cluster_contrast", arch="timm/test_vit", calibrate_bn=0, channels_last=False)
    assert np.isfinite(run.last["loss"])
    assert run.model.backbone.positions == 1 + (64 // 16) * (32 // 16)
