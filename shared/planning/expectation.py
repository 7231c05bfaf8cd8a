"""What to expect of a plan: what sets that were tried gave after as much training. Pure, as rules.py is."""

import math

from shared.planning.budget import Budget, reached
from shared.planning.facts import Images, family
from shared.planning.rules import Choices

LEAST_TRIED = 1500  # images; the sets that were tried are larger
LIKE = 1.4  # up to this factor in the images seen, a training is like one that was tried
# family, side, images seen by stages 1 and 2, and what that gave
TRIED = [
    ("picture", 32, 6_500, 26_000, "garments of Fashion-MNIST that one recognises, many of them torn"),
    ("picture", 32, 61_000, 219_000, "garments of Fashion-MNIST with an FID of 19 to 26"),
    ("picture", 64, 19_000, 53_000, "emoji: faces, flags and signs that one names; the rest are blots"),
    (
        "picture",
        64,
        40_000,
        115_000,
        "clothes and emoji that one recognises, but soft (gallery/photos_64.png)",
    ),
    ("picture", 64, 192_000, 346_000, "clothes with folds and patterns (gallery/photos_64_92_minutes.png)"),
    ("field", 64, 45_000, 115_000, "speckle that obeys the laws of speckle within 3 %"),
    ("field", 32, 29_000, 58_000, "patches of recorded speckle with a contrast of 0.71 instead of 0.77"),
    ("sparse", 64, 70_000, 115_000, "jets with a fifth more hit cells than real ones (gallery/jets.png)"),
]


def expected(choices: Choices, images: Images, budget: Budget) -> str:
    """What a tried set of this kind gave after as much training, in words."""
    if choices.one_stage:
        return "reconstructions, and what the decoder makes of noise: no stage 2 draws its latents"
    alike = [entry for entry in TRIED if entry[0] == family(images)]
    area = math.prod(choices.sides)
    size = min({entry[1] for entry in alike}, key=lambda known: abs(math.log(known**2 / area)))
    fitting = [
        entry
        for entry in alike
        if entry[1] == size and reached(choices, budget, entry[2] / LIKE, entry[3] / LIKE)
    ]
    if not fitting:
        return "less training than anything tried: shapes, but no likeness"
    _, _, seen1, seen2, found = fitting[-1]
    told = f"at {size} px, {seen1:,} images in stage 1 and {seen2:,} latents in stage 2 gave {found}"
    return told + ("; expect less of so few images" if budget.images < LEAST_TRIED else "")
