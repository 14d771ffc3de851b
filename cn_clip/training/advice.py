"""Settings that suit a tower and an amount of data: what a run says when those it is given do not, and what to try."""

from dataclasses import dataclass

from cn_clip import zoo
from cn_clip.language import both
from cn_clip.training.params import Options
from cn_clip.training.stopping import Outcome

# The published fine-tuning settings: this rate at this global batch, up to four times as much. Adapters bear more.
FINE_TUNING_RATE, FINE_TUNING_BATCH, RATE_MARGIN, ADAPTERS = 5e-5, 1024, 4, 10
# Of the small towers, in proportion to the root of the batch. Measured: Emoji-Tiny, 300 pictures, 3 epochs, statistics
# kept, mean recall of 300 others 79.1 at the start; batch 32: 79.0 (1e-5), 82.2 (1e-4), 82.8 (3e-4), 74.7 (1e-3);
# batch 8: 79.1 (3e-4), 54.1 (1e-3).
SMALL_RATES, SMALL_BATCH = (1e-4, 3e-4), 32
SMALL_RESOLUTION = 128
# A warm-up of more than this share of a run leaves little of it to learn in.
LONGEST_WARMUP = 0.5
# Below this share of a fitting rate, weights hardly move.
LOWEST_SHARE = 0.1


@dataclass(frozen=True)
class Situation:
    """What advice depends on besides the settings. moves_statistics: those of batch normalisation, learned before.

    is_pretrained: whether the weights are trained at the start, and not those of a run in progress.
    """

    num_pairs: int
    global_batch: int
    max_steps: int
    is_pretrained: bool
    moves_statistics: bool


def is_small(options: Options) -> bool:
    """Whether the picture tower is one of the small ones, for which the published settings are not meant."""
    return zoo.vision_config(options.vision_model).image_resolution < SMALL_RESOLUTION


def fitting_rates(options: Options, global_batch: int) -> tuple[float, float]:
    """The lowest and the highest learning rate that suit fine-tuning this tower with this batch."""
    if is_small(options):
        factor = (global_batch / SMALL_BATCH) ** 0.5
        return SMALL_RATES[0] * factor, SMALL_RATES[1] * factor
    lowest = FINE_TUNING_RATE * global_batch / FINE_TUNING_BATCH * (ADAPTERS if options.lora_rank else 1)
    return lowest, RATE_MARGIN * lowest


def better_settings(options: Options, situation: Situation) -> str | None:
    """One line with the settings that suit tower and data, where some given ones do not; else None.

    A rate that is too high for a large tower has a warning of its own, see `log_lines.rate_warning`.
    """
    words = [], []  # type: tuple[list[str], list[str]]
    lowest, highest = fitting_rates(options, situation.global_batch)
    rate = options.optimizer_setting("lr")
    if situation.is_pretrained:
        is_too_low = rate < (lowest if is_small(options) else LOWEST_SHARE * lowest)
        if is_too_low or (rate > highest and (is_small(options) or options.lora_rank)):
            middle = (lowest * highest) ** 0.5
            _add(words, f"--lr {_short(middle)}")
        if options.use_augment and is_small(options):
            words[0].append("不用 --use-augment")
            words[1].append("no --use-augment")
    if options.warmup > LONGEST_WARMUP * situation.max_steps:
        _add(words, f"--warmup {situation.max_steps // 10}")
    if not words[0]:
        return None
    sizes = situation.num_pairs, situation.global_batch, situation.max_steps
    return both(
        f"{options.vision_model}、{sizes[0]} 对图文、每批 {sizes[1]} 对、共 {sizes[2]} 步，更合适的是："
        f"{'，'.join(words[0])}；仍按给出的训练",
        f"{options.vision_model} with {sizes[0]:,} pairs, a global batch of {sizes[1]} and {sizes[2]} steps is better "
        f"trained with {', '.join(words[1])}; the run keeps what was given",
    )


def _short(rate: float) -> str:
    """3e-4 for 0.000316."""
    return f"{rate:.0e}".replace("e-0", "e-")


def _add(words: tuple[list[str], list[str]], setting: str) -> None:
    for of_language in words:
        of_language.append(setting)


def verdict(outcome: Outcome, tries: list[str]) -> str:
    """The last line of a run that validates: its best mean recall, at which step, beside step 0; shares in [0, 1].

    tries: what may help a run that never got better, see `what_to_try`.
    """
    best, last = 100 * outcome.best, 100 * outcome.last
    if outcome.start is None:
        return both(
            f"结论：平均召回率最高 {best:.2f}（第 {outcome.best_step} 步）；没有第 0 步的验证可比",
            f"Verdict: best mean recall {best:.2f} at step {outcome.best_step}; there is no validation at step 0 to "
            "compare with",
        )
    start = 100 * outcome.start
    if outcome.is_better:
        fell = outcome.last < outcome.best
        return both(
            f"结论：平均召回率最高 {best:.2f}（第 {outcome.best_step} 步，epoch_best.pt），第 0 步是 {start:.2f}，"
            f"提高了 {best - start:.2f}" + (f"；结束时 {last:.2f}" if fell else ""),
            f"Verdict: best mean recall {best:.2f} at step {outcome.best_step} (epoch_best.pt), {start:.2f} at step 0: "
            f"{best - start:.2f} better" + (f"; {last:.2f} at the end" if fell else ""),
        )
    if outcome.start >= 1:
        return both(
            "结论：第 0 步的平均召回率已是 100.00，这份验证数据上没有可提高的了；换更多、更难的图片来验证",
            "Verdict: mean recall was 100.00 at step 0 already, so this validation data has nothing left to gain; "
            "validate on more, or harder, pictures",
        )
    return both(
        f"结论：训练始终没有让模型变好：平均召回率最高的是第 0 步的 {start:.2f}，结束时 {last:.2f}。"
        f"请继续用原来的权重。可以依次试：{'；'.join(tries)}",
        f"Verdict: never better than the start: mean recall was best at step 0 ({start:.2f}), {last:.2f} at the end. "
        f"Keep the weights you began with. Things to try, in this order: {'; '.join(tries)}",
    )


def what_to_try(options: Options, situation: Situation) -> list[str]:
    """What may help a fine-tuning that never got better than its start, the likeliest first."""
    tries = ["--freeze-bn"] if situation.moves_statistics else []
    if options.use_augment and is_small(options):
        tries.append(both("不用 --use-augment", "no --use-augment"))
    rate = options.optimizer_setting("lr")
    lowest, highest = fitting_rates(options, situation.global_batch)
    if not situation.is_pretrained:
        tries.append(f"--lr {_short(rate / 3)}")
    elif rate > highest:
        tries.append(f"--lr {_short(lowest)}")
    elif rate < lowest:
        tries.append(f"--lr {_short(highest)}")
    else:
        less, more = _short(rate / 3), _short(rate * 3)
        tries.append(both(f"--lr {less}，或 {more}", f"--lr {less}, or {more}"))
    if options.warmup > LONGEST_WARMUP * situation.max_steps:
        tries.append(f"--warmup {situation.max_steps // 10}")
    if situation.is_pretrained and not options.lora_rank:
        tries.append(both("--lora-rank 16（训练的参数少）", "--lora-rank 16, which trains fewer values"))
    tries.append(
        both(
            f"更多的图片（现在 {situation.num_pairs} 对），或更贴近搜索的说明文字",
            f"more pictures ({situation.num_pairs:,} pairs now), or captions closer to what people search for",
        )
    )
    return tries
