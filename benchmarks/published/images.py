# SPDX-License-Identifier: Apache-2.0
"""Images as the scripts read them: opened and transformed one at a time, by torchvision, in a DataLoader's workers."""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Sample(NamedTuple):
    path: str
    pid: int
    camid: int


class Crops(Dataset):
    """Images with what is known of them and their number."""

    def __init__(self, samples: Sequence[Sample], transform: T.Compose) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[Tensor, str, int, int, int]:
        path, pid, camid = self.samples[number]
        image = Image.open(path).convert("RGB")
        return self.transform(image), path, pid, camid, number


class Erasing:
    """A rectangle of 2 to 40 % of the image, of any proportion between 0.3 and 1 / 0.3, filled with the mean colour."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Tensor) -> Tensor:
        if random.uniform(0, 1) >= self.probability:
            return image
        _, height, width = image.shape
        for _ in range(100):
            area = random.uniform(0.02, 0.4) * height * width
            proportion = random.uniform(0.3, 1 / 0.3)
            h, w = round(math.sqrt(area * proportion)), round(math.sqrt(area / proportion))
            if h < height and w < width:
                top, left = random.randint(0, height - h), random.randint(0, width - w)
                for channel, value in enumerate(MEAN):
                    image[channel, top : top + h, left : left + w] = value
                return image
        return image


def plain_view(height: int, width: int) -> T.Compose:
    """Of images to extract features from."""
    resize = T.Resize((height, width), interpolation=T.InterpolationMode.BICUBIC)
    return T.Compose([resize, T.ToTensor(), T.Normalize(MEAN, STD)])


def train_view(height: int, width: int, erase: float = 0.5) -> T.Compose:
    """Of images to train on."""
    return T.Compose(
        [
            T.Resize((height, width), interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(0.5),
            T.Pad(10),
            T.RandomCrop((height, width)),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
            Erasing(erase),
        ]
    )


def batches(samples: Sequence[Sample], view: T.Compose, workers: int, numbers: Sequence[Sequence[int]]) -> DataLoader:
    """Batches of the images with these ``numbers``."""
    return DataLoader(Crops(samples, view), batch_sampler=numbers, num_workers=workers)
