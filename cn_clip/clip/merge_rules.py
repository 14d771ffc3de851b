"""Token merging as settings, without tensors: what is refused, and what each layer merges.

`merging` has the computation.
"""

from cn_clip import zoo
from cn_clip.errors import ConfigError
from cn_clip.zoo import VisionConfig

# Merging may leave no fewer than this part of the patches: of 196 in 12 layers at most 15 a layer, of 256 in 24 at
# most 9. Beyond it the few tokens left say little of the picture.
LEAST_PART = 8


def check(merge_tokens: int, vision: VisionConfig | None = None, model: object = "this model") -> None:
    """Raises ConfigError for a number that cannot be, or that this picture tower does not take.

    vision: None where the tower is not known yet.
    """
    if type(merge_tokens) is not int or merge_tokens < 0:
        raise ConfigError(f"merge_tokens: expected a whole number of at least 0, got {merge_tokens!r}")
    if not merge_tokens or vision is None:
        return
    if not isinstance(vision.vision_layers, int) or not vision.vision_patch_size:
        raise ConfigError(
            f"merge_tokens: merges the tokens of a Vision Transformer, and the picture tower of {model} is a ResNet; "
            "leave it out"
        )
    patches = (vision.image_resolution // vision.vision_patch_size) ** 2
    most = largest(patches, vision.vision_layers)
    if merge_tokens > most:
        layers = vision.vision_layers
        left = patches - sum(plan(patches, layers, merge_tokens))
        raise ConfigError(
            f"merge_tokens: {merge_tokens} in each of {layers - 1} layers would leave {left} of the {patches} patches "
            f"of {model}, and at least {-(-patches // LEAST_PART)} must be left; expected at most {most}"
        )


def check_named(merge_tokens: int, model: object, vision: str | None = None) -> None:
    """`check` with what is known of the tower before anything is downloaded or read: its name, or the model's."""
    entry = zoo.named(str(model))
    name = vision or (entry.vision if entry else None)
    check(merge_tokens, zoo.vision_config(name) if name else None, model)


def largest(patches: int, layers: int) -> int:
    """The most tokens a layer that leave enough of the patches; 0 for a tower of one layer."""
    return max(
        (
            count
            for count in range(1, patches // 2 + 1)
            if layers > 1 and LEAST_PART * (patches - sum(plan(patches, layers, count))) >= patches
        ),
        default=0,
    )


def plan(patches: int, layers: int, merge_tokens: int) -> tuple[int, ...]:
    """How many tokens each layer merges: half of those it has at most, and none in the last.

    After the attention of the last layer only the class token counts, and it is never merged.
    7 patches, 4 layers, 2 a layer: (2, 2, 1, 0), for 7, 5 and 3 patches are there to be halved.
    """
    counts, left = [], patches
    for _ in range(layers - 1):
        counts.append(min(merge_tokens, left // 2))
        left -= counts[-1]
    return (*counts, 0) if layers else ()
