# SPDX-License-Identifier: Apache-2.0
"""Mean and deviation of pixels, as ``Config.pixel_norm`` has them: a name, or six numbers."""

Three = tuple[float, float, float]

NAMED: dict[str, tuple[Three, Three]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
RULE = f"be one of {', '.join(NAMED)} or six numbers MEAN,MEAN,MEAN,STD,STD,STD in [0, 1]"


def mean_and_std(pixel_norm: str) -> tuple[Three, Three]:
    """The means and deviations of red, green and blue, of pixels in [0, 1].

    >>> mean_and_std("half") == mean_and_std("0.5,0.5,0.5,0.5,0.5,0.5")
    True

    Raises:
        ValueError: neither a name nor three numbers in [0, 1] and three in (0, 1].
    """
    if pixel_norm in NAMED:
        return NAMED[pixel_norm]
    try:
        numbers = [float(word) for word in pixel_norm.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 6 or not all(0 <= number <= 1 for number in numbers) or 0 in numbers[3:]:
        raise ValueError(f"pixel_norm must {RULE}, got {pixel_norm!r}")
    return tuple(numbers[:3]), tuple(numbers[3:])


def is_pixel_norm(pixel_norm: str) -> bool:
    """Whether ``mean_and_std`` takes it."""
    try:
        mean_and_std(pixel_norm)
    except ValueError:
        return False
    return True


def named(mean: Three, std: Three) -> str:
    """The ``pixel_norm`` of these means and deviations: its name if it has one."""
    found = (tuple(mean), tuple(std))
    return next((name for name, norm in NAMED.items() if norm == found), ",".join(map(repr, [*mean, *std])))
