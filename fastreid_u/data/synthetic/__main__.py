# SPDX-License-Identifier: Apache-2.0
"""``python -m fastreid_u.data.synthetic``: render a set, or a contact sheet of one."""

import argparse
import io
import sys
from dataclasses import fields
from pathlib import Path

from PIL import Image

from fastreid_u.data.synthetic.config import SyntheticConfig
from fastreid_u.data.synthetic.render import Shot, World
from fastreid_u.data.synthetic.write import generate, work


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastreid_u.data.synthetic", description=__doc__)
    parser.add_argument("--sheet", metavar="FILE", type=Path, help="write a contact sheet there and nothing else")
    parser.add_argument("--people", type=int, default=8, help="rows of the sheet")
    parser.add_argument("--root", type=Path, help="parent folder of the rendered set")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--worker", metavar="JOB", help=argparse.SUPPRESS)
    for field in fields(SyntheticConfig):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)
    options = parser.parse_args(arguments)
    if options.worker:
        return work(options.worker)
    config = SyntheticConfig(**{field.name: getattr(options, field.name) for field in fields(SyntheticConfig)})
    if options.sheet:
        contact_sheet(config, options.people).save(options.sheet, quality=82)
        print(options.sheet)
    else:
        print(generate(config, options.root, workers=options.workers))
    return 0


def contact_sheet(config: SyntheticConfig, people: int, per_camera: int = 2) -> Image.Image:
    """One row per person, ``per_camera`` crops from each camera."""
    world, (w, h) = World(config), (config.width, config.height)
    sheet = Image.new("RGB", (config.cameras * (per_camera * (w + 2) + 4) - 4, people * (h + 2)), "white")
    for row in range(people):
        for camera in range(config.cameras):
            for take in range(per_camera):
                crop = Image.open(io.BytesIO(world.shoot(Shot(row, camera, take))))
                sheet.paste(crop, (camera * (per_camera * (w + 2) + 4) + take * (w + 2), row * (h + 2)))
    return sheet


if __name__ == "__main__":
    sys.exit(main())
