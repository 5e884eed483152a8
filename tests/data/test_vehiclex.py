# SPDX-License-Identifier: Apache-2.0
"""VehicleX: names, or a list in XML."""

import pytest

from fastreid_u.data import (
    load_dataset,
)


class TestVehicleX:
    def test_names(self, check, rows, tmp_path, plant):
        plant("vehiclex/AIC20_ReID_Simulation/image_train", "0001_c006_1.jpg", "0001_c036_2.jpg", "1362_c010_1.jpg")
        data = check(load_dataset("vehiclex", tmp_path))
        assert rows(data.train) == [("0001_c006_1.jpg", 0, 0), ("0001_c036_2.jpg", 0, 2), ("1362_c010_1.jpg", 1, 1)]
        assert (data.query, data.gallery) == ((), ())

    def test_xml(self, check, rows, tmp_path, plant):
        folder = plant("AIC21_Track2_ReID_Simulation/sys_image_train", "000001.jpg", "000002.jpg").parent
        items = '<Item imageName="000001.jpg" vehicleID="0009" cameraID="c007" colorID="5"/>'
        head = '<?xml version="1.0" encoding="gb2312"?>\n<TrainingImages><Items number="2">'
        (folder / "train_label.xml").write_text(f"{head}{items}</Items></TrainingImages>")
        with pytest.raises(ValueError, match=r"train_label.xml must label every image, got none for .*000002.jpg"):
            load_dataset("vehiclex", tmp_path)
        items += '<Item imageName="000002.jpg" vehicleID="0003" cameraID="c031"/>'
        (folder / "train_label.xml").write_text(f"{head}{items}</Items></TrainingImages>")
        assert rows(check(load_dataset("vehiclex", tmp_path)).train) == [("000001.jpg", 1, 0), ("000002.jpg", 0, 1)]
        (folder / "train_label.xml").unlink()
        with pytest.raises(ValueError, match=r"images must be named .* or listed in train_label.xml"):
            load_dataset("vehiclex", tmp_path)
