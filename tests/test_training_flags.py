"""The flags of training: those of Chinese-CLIP by name, type, choices and default, and the test of each flag.

python tests/test_training_flags.py    prints the table flag | what it does | test
"""

import ast
import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cn_clip import command, option_types
from cn_clip.training import params
from cn_clip.training.main import without_local_rank
from cn_clip.training.params import Options

ROOT = Path(__file__).resolve().parents[1]


class Flag(NamedTuple):
    """One flag of cn_clip 1.6.0: what is written behind it, what is read, what it is when not given."""

    name: str
    written: tuple[str, ...]
    read: tuple[Any, ...]
    default: Any


def text(name: str, default: str | None, *choices: str) -> Flag:
    return Flag(name, choices or ("a name",), choices or ("a name",), default)


def number(name: str, default: float | None, *values: float) -> Flag:
    return Flag(name, tuple(str(value) for value in values), values, default)


def switch(name: str) -> Flag:
    return Flag(name, ("",), (True,), False)


VISION = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "RN50")
TEXT = ("RoBERTa-wwm-ext-base-chinese", "RoBERTa-wwm-ext-large-chinese", "RBT3-chinese")

FLAGS = [
    text("--val-data", None),
    number("--num-workers", 4, 0, 8),
    number("--valid-num-workers", 1, 0, 2),
    text("--logs", "./logs/"),
    text("--name", "train_clip"),
    number("--log-interval", 10, 1),
    switch("--report-training-batch-acc"),
    number("--batch-size", 64, 128),
    number("--valid-batch-size", 64, 128),
    number("--max-steps", None, 735),
    number("--max-epochs", 32, 3),
    number("--valid-step-interval", None, 150, -1),
    number("--valid-epoch-interval", 1, 2, -1),
    number("--context-length", 52, 24),
    number("--lr", None, 5e-5),
    number("--beta1", None, 0.8),
    number("--beta2", None, 0.95),
    number("--eps", None, 1e-7),
    number("--wd", 0.2, 0.001),
    number("--warmup", 500, 0, 100),
    switch("--use-bn-sync"),
    switch("--use-augment"),
    switch("--skip-scheduler"),
    number("--save-epoch-frequency", 1, 2, -1),
    number("--save-step-frequency", -1, 999999),
    text("--resume", None),
    switch("--reset-optimizer"),
    switch("--reset-data-offset"),
    text("--precision", "amp", "amp", "fp16", "fp32"),
    text("--vision-model", "ViT-B-16", *VISION),
    number("--mask-ratio", 0, 0.0, 0.5),
    text("--clip-weight-path", None),
    switch("--freeze-vision"),
    text("--text-model", "RoBERTa-wwm-ext-base-chinese", *TEXT),
    text("--bert-weight-path", None),
    switch("--grad-checkpointing"),
    switch("--use-flash-attention"),
    number("--accum-freq", 1, 4),
    switch("--gather-with-grad"),
    switch("--skip-aggregate"),
    switch("--debug"),
    number("--seed", 123, 7),
    switch("--distillation"),
    text("--teacher-model-name", None),
    number("--kd_loss_weight", 0.5, 0.25),
]
# Defaults that are others here, see docs/differences.md.
OTHER_DEFAULTS = {"--precision": "auto", "--num-workers": None, "--valid-num-workers": None}
# What a flag of the list asks for besides itself.
TOGETHER = {"--distillation": ["--teacher-model-name", "teacher.pt"]}


# Option -> the test that fails where it is not obeyed; several where one shows that it is handed on, one what it does.
TESTED: dict[str, str] = {
    "train_data": "test_training_options.py::test_a_run_with_all_of_its_data_sees_every_pair_once_an_epoch, "
    "test_shards.py::test_training_from_shards_resumes_in_an_epoch_as_if_it_had_not_stopped",
    "val_data": "test_differences.py::test_validation_logs_recall_over_the_whole_split, "
    "test_training_options.py::test_a_run_writes_under_its_name_with_all_of_its_settings",
    "num_workers": "test_training_options.py::test_as_many_processes_load_as_asked",
    "valid_num_workers": "test_training_options.py::test_as_many_processes_load_as_asked",
    "logs": "test_training_options.py::test_a_run_writes_under_its_name_with_all_of_its_settings",
    "name": "test_training_options.py::test_a_run_writes_under_its_name_with_all_of_its_settings",
    "log_interval": "test_training_options.py::test_logs_validations_and_files_come_at_the_intervals_asked_for",
    "report_training_batch_acc": "test_training_options.py::"
    "test_accuracy_inside_the_training_batch_is_logged_when_asked",
    "batch_size": "test_training_command.py::test_log_lines_on_screen_and_in_the_file_are_those_of_the_guides, "
    "test_differences.py::test_a_batch_larger_than_the_data_stops_the_run",
    "valid_batch_size": "test_training_parts.py::test_validation_equals_the_plain_computation, "
    "test_differences.py::test_a_batch_larger_than_the_data_stops_the_run",
    "max_steps": "test_training_command.py::test_weights_alone_are_taken_with_the_reset_flags",
    "max_epochs": "test_training_command.py::test_log_lines_on_screen_and_in_the_file_are_those_of_the_guides",
    "valid_step_interval": "test_training_options.py::test_logs_validations_and_files_come_at_the_intervals_asked_for, "
    "test_differences.py::test_an_interval_of_minus_one_never_validates",
    "valid_epoch_interval": "test_training_options.py::"
    "test_logs_validations_and_files_come_at_the_intervals_asked_for, "
    "test_differences.py::test_an_interval_of_minus_one_never_validates",
    "context_length": "test_training_options.py::test_texts_are_cut_to_the_context_length_in_training_and_validation",
    "lr": "test_training_options.py::test_rate_betas_epsilon_and_decay_reach_the_optimizer",
    "beta1": "test_training_options.py::test_rate_betas_epsilon_and_decay_reach_the_optimizer",
    "beta2": "test_training_options.py::test_rate_betas_epsilon_and_decay_reach_the_optimizer",
    "eps": "test_training_options.py::test_rate_betas_epsilon_and_decay_reach_the_optimizer",
    "wd": "test_training_options.py::test_rate_betas_epsilon_and_decay_reach_the_optimizer, "
    "test_training_parts.py::test_five_updates_give_the_losses_rates_and_weights_of_the_reference",
    "warmup": "test_training_options.py::test_the_rate_rises_over_the_warm_up",
    "use_bn_sync": "test_training_options.py::test_norms_are_synchronised_over_processes, "
    "test_training_options.py::test_norms_are_not_synchronised_where_that_cannot_be",
    "use_augment": "test_training_options.py::test_augmentation_varies_training_pictures_and_no_others",
    "skip_scheduler": "test_differences.py::test_skip_scheduler_keeps_the_rate_that_the_cosine_would_lower",
    "save_epoch_frequency": "test_training_options.py::test_logs_validations_and_files_come_at_the_intervals_asked_for",
    "save_step_frequency": "test_training_command.py::test_checkpoints_have_the_keys_and_names_of_the_reference",
    "resume": "test_training_command.py::test_a_resumed_run_ends_with_the_very_weights_of_an_uninterrupted_one",
    "reset_optimizer": "test_training_command.py::test_weights_alone_are_taken_with_the_reset_flags",
    "reset_data_offset": "test_training_command.py::test_weights_alone_are_taken_with_the_reset_flags, "
    "test_training_command.py::test_another_batch_size_in_the_middle_of_an_epoch_asks_for_reset_data_offset",
    "precision": "test_training_options.py::test_the_precision_is_that_of_the_products, "
    "test_differences.py::test_amp_on_a_cpu_is_bfloat16_where_the_hardware_has_it, "
    "test_differences.py::test_training_is_in_bfloat16_on_gpus_that_have_it_unless_amp_is_asked_for, "
    "test_training_command.py::test_a_run_that_cannot_be_stops_at_once_with_the_reason",
    "vision_model": "test_training_options.py::test_the_towers_are_those_named",
    "mask_ratio": "test_training_options.py::test_patches_are_left_out_in_training_and_not_in_validation, "
    "test_training_options.py::test_a_resnet_says_which_flags_it_cannot_obey",
    "clip_weight_path": "test_training_options.py::test_two_stages_train_the_text_tower_first_and_then_both",
    "freeze_vision": "test_training_command.py::test_a_frozen_picture_tower_keeps_every_weight_and_statistic, "
    "test_training_options.py::test_two_stages_train_the_text_tower_first_and_then_both",
    "text_model": "test_training_options.py::test_the_towers_are_those_named",
    "bert_weight_path": "test_training_options.py::test_two_stages_train_the_text_tower_first_and_then_both",
    "grad_checkpointing": "test_training_options.py::test_both_towers_recompute_activations_when_asked, "
    "test_step.py::test_recomputing_activations_changes_no_gradient",
    "use_flash_attention": "test_training_options.py::test_the_flash_attention_flag_is_taken_with_one_warning",
    "accum_freq": "test_training_options.py::test_batches_are_joined_into_one_update, "
    "test_step.py::test_accumulated_batches_give_loss_and_gradients_of_the_large_batch",
    "gather_with_grad": "test_training_options.py::test_features_are_gathered_as_asked, "
    "test_distributed.py::test_gather_with_grad_gives_losses_gradients_and_weights_of_one_process",
    "skip_aggregate": "test_training_options.py::test_features_are_gathered_as_asked, "
    "test_distributed.py::test_without_gather_the_gradient_is_the_mean_over_the_processes_batches",
    "debug": "test_training_options.py::test_debugging_logs_the_pairs_of_each_step",
    "seed": "test_training_options.py::test_the_seed_decides_weights_and_order",
    "distillation": "test_training_options.py::test_the_teacher_is_learned_from_with_its_weight",
    "teacher_model_name": "test_training_options.py::test_the_teacher_is_learned_from_with_its_weight, "
    "test_distill.py::test_the_models_of_modelscope_are_asked_where_they_encode",
    "kd_loss_weight": "test_training_options.py::test_the_teacher_is_learned_from_with_its_weight",
    "device": "test_training_command.py::test_a_run_that_cannot_be_stops_at_once_with_the_reason, "
    "test_training_options.py::test_a_run_writes_under_its_name_with_all_of_its_settings",
    "num_threads": "test_training_options.py::test_a_run_writes_under_its_name_with_all_of_its_settings",
    "valid_precision": "test_training_options.py::test_validation_has_the_arithmetic_asked_for",
    "strict_fp32": "test_training_options.py::test_strict_float32_reaches_the_setting_of_the_process, "
    "test_precision.py::test_float32_products_are_tf32_on_cuda_unless_strict_and_left_alone_elsewhere",
    "fsdp": "test_training_state.py::test_checkpoints_of_two_processes_split_or_not_go_on_in_one, "
    "test_distributed.py::test_gather_with_grad_gives_losses_gradients_and_weights_of_one_process",
    "compile": "test_training_options.py::test_compiling_takes_each_block_of_both_towers, "
    "test_training_options.py::test_a_compiled_run_has_the_losses_of_a_plain_one",
    "loss": "test_training_options.py::test_the_sigmoid_loss_keeps_its_bias_over_a_resume_and_out_of_the_model, "
    "test_loss.py::test_sigmoid_loss_of_two_pairs_is_the_value_worked_by_hand",
    "multi_positive": "test_training_options.py::test_pairs_of_one_text_are_no_negatives_when_asked, "
    "test_loss.py::test_pairs_that_share_a_picture_or_a_text_are_not_each_others_negatives",
    "matryoshka": "test_training_options.py::test_vectors_may_be_cut_where_a_run_was_told_so, "
    "test_loss.py::test_matryoshka_is_the_mean_of_the_losses_of_beginnings",
    "local_loss": "test_training_options.py::test_the_local_loss_is_of_all_features_and_of_several_processes, "
    "test_distributed.py::test_gather_with_grad_gives_losses_gradients_and_weights_of_one_process",
    "freeze_text": "test_training_options.py::test_a_frozen_text_tower_stays_and_the_rest_moves",
    "freeze_text_layers": "test_training_options.py::test_frozen_text_layers_stay_and_the_later_ones_move",
    "lora_rank": "test_training_options.py::"
    "test_adapters_are_trained_kept_apart_in_the_file_and_merged_when_it_is_loaded",
    "lora_alpha": "test_training_options.py::"
    "test_adapters_are_trained_kept_apart_in_the_file_and_merged_when_it_is_loaded",
    "save_adapters": "test_adapt_files.py::"
    "test_every_file_holds_only_what_is_trained_and_gives_the_weights_of_a_run_that_saves_all",
    "on_error": "test_training_options.py::"
    "test_a_corrupt_picture_stops_the_run_by_its_name_or_is_passed_over_and_counted",
    "decode": "test_training_parts.py::test_grey_of_16_bits_is_scaled_unless_the_reference_is_asked_for",
    "keep_checkpoints": "test_training_state.py::test_only_the_newest_files_are_kept_besides_the_latest_and_the_best, "
    "test_saving.py::test_a_run_keeps_its_two_newest_files_unless_it_is_told_otherwise",
    "freeze_bn": "test_freeze_bn.py::test_a_run_from_given_weights_keeps_the_statistics_and_trains_scale_and_shift, "
    "test_freeze_bn.py::test_freeze_bn_is_obeyed_refused_or_warned_about",
    "no_freeze_bn": "test_freeze_bn.py::test_the_statistics_move_only_where_chinese_clip_moves_them",
    "early_stop": "test_training_state.py::"
    "test_validation_begins_before_the_first_step_and_early_stop_ends_a_run_that_does_not_improve",
    "report_to": "test_training_options.py::test_events_for_tensorboard_are_written_when_asked",
    "init": "test_training_resume.py::test_init_gives_the_first_weights_and_the_same_command_goes_on_after_a_kill, "
    "test_run_scripts.py::test_the_muge_script_killed_and_started_again_goes_on",
    "overwrite": "test_training_resume.py::"
    "test_overwrite_replaces_all_of_the_old_run_but_only_once_the_new_one_can_train",
}
# The same for what the scripts and old launchers take.
AROUND = {
    "WORKER_CNT": (
        "Number of machines (run_scripts)",
        "test_run_scripts.py::test_more_than_one_process_is_started_by_torchrun",
    ),
    "GPUS_PER_NODE": (
        "Processes of each machine (run_scripts)",
        "test_run_scripts.py::test_several_processes_of_one_machine_need_no_address, "
        "test_run_scripts.py::test_torchrun_understands_how_it_is_called",
    ),
    "MASTER_ADDR, RANK": (
        "Address of machine 0, number of this machine (run_scripts)",
        "test_run_scripts.py::test_more_than_one_process_is_started_by_torchrun, "
        "test_run_scripts.py::test_machines_that_do_not_add_up_are_refused_in_one_sentence",
    ),
    "--local_rank": (
        "Given by launchers before torchrun; accepted with one warning",
        "test_training_flags.py::test_the_rank_of_old_launchers_is_taken_with_one_warning",
    ),
}


def parse(*args: str) -> Options:
    return command.parse(Options, ["--train-data", "lmdb/train", *args])


def field(flag: Flag) -> str:
    return flag.name.removeprefix("--").replace("-", "_")


def by_name(flag: Flag) -> str:
    return flag.name


def test_every_flag_of_the_original_is_in_the_list_once() -> None:
    assert len({flag.name for flag in FLAGS}) == len(FLAGS) == 45


def test_the_flags_of_the_original_come_first_in_its_order() -> None:
    names = [one.name for one in fields(Options)]
    assert names[: len(FLAGS) + 1] == ["train_data", *map(field, FLAGS)]


def test_the_training_data_is_required() -> None:
    done = subprocess.run(
        [sys.executable, "cn_clip/training/main.py"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "--train-data" in done.stderr


@pytest.mark.parametrize("flag", FLAGS, ids=by_name)
def test_the_default_is_that_of_the_original(flag: Flag) -> None:
    assert getattr(parse(), field(flag)) == OTHER_DEFAULTS.get(flag.name, flag.default)


@pytest.mark.parametrize("flag", FLAGS, ids=by_name)
def test_the_flag_is_read_in_every_spelling(flag: Flag) -> None:
    for written, expected in zip(flag.written, flag.read, strict=True):
        for name in {flag.name, "--" + field(flag), "--" + field(flag).replace("_", "-")}:
            spellings = [[name]] if expected is True else [[name, written], [f"{name}={written}"]]
            for words in spellings:
                value = getattr(parse(*words, *TOGETHER.get(flag.name, [])), field(flag))
                assert (value, type(value)) == (expected, type(expected)), words


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.default is None], ids=by_name)
def test_none_may_be_written_out(flag: Flag) -> None:
    assert getattr(parse(f"{flag.name}=None"), field(flag)) is None


# The original's defaults by picture tower.
@pytest.mark.parametrize(
    ("vision", "settings"),
    [
        *((name, (5.0e-4, 0.9, 0.98, 1.0e-6)) for name in ("ViT-B-32", "ViT-B-16", "ViT-H-14")),
        *((name, (4.0e-4, 0.9, 0.98, 1.0e-6)) for name in ("ViT-L-14", "ViT-L-14-336")),
        ("RN50", (5.0e-4, 0.9, 0.999, 1.0e-8)),
    ],
)
def test_the_optimizer_is_set_by_the_picture_tower_where_nothing_is_given(
    vision: str, settings: tuple[float, ...]
) -> None:
    options = parse("--vision-model", vision)
    assert tuple(options.optimizer_setting(name) for name in ("lr", "beta1", "beta2", "eps")) == settings
    assert parse("--vision-model", vision, "--eps", "0.5").optimizer_setting("eps") == 0.5


@pytest.mark.parametrize("words", [["--local_rank=3"], ["--local-rank=3"], ["--local_rank", "3"]])
def test_the_rank_of_old_launchers_is_taken_with_one_warning(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = without_local_rank(["--train-data=x", *words, "--lr", "1e-5"])
    assert kept == ["--train-data=x", "--lr", "1e-5"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(words[0])
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("words", [["--no-such-flag"], ["--vision-model", "ViT-B-17"], ["--batch-size", "many"]])
def test_what_the_original_refuses_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err


# --- the table flag -> test


def test_every_option_has_a_test() -> None:
    assert list(TESTED) == [one.name for one in fields(Options)]


def test_the_tests_of_the_options_exist() -> None:
    named = {one for tests in [*TESTED.values(), *(tests for _, tests in AROUND.values())] for one in tests.split(", ")}
    for one in sorted(named):
        file, _, name = one.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), one


def test_the_page_on_training_has_every_flag() -> None:
    text = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
    words = {"--" + name.replace("_", "-") for name in TESTED} - {"--kd-loss-weight"} | {"--kd_loss_weight"}
    assert sorted(word for word in words if f"`{word}`" not in text) == []


def helps() -> dict[str, str]:
    """Option -> its help, the string below its field or that of its type."""
    (options,) = (n for n in ast.parse(inspect.getsource(params)).body if isinstance(n, ast.ClassDef))
    found = {}
    for declared, below in zip(options.body, options.body[1:], strict=False):
        if isinstance(declared, ast.AnnAssign) and isinstance(declared.target, ast.Name):
            name = declared.target.id
            if isinstance(below, ast.Expr):
                found[name] = str(ast.literal_eval(below.value))
            else:
                shared = getattr(option_types, ast.unparse(declared.annotation))
                (found[name],) = [one.help for one in shared.__metadata__ if hasattr(one, "help")]
    return found


def test_the_table_has_a_row_for_every_option() -> None:
    rows = table()
    assert len(rows) == 2 + len(TESTED) + len(AROUND)
    assert "| `--wd` | Weight decay | `test_training_options.py::test_rate_betas_epsilon_and_decay" in "\n".join(rows)


def table() -> list[str]:
    """Lines of Markdown: flag, what it does, test."""
    of_options = [("--" + name.replace("_", "-"), text, TESTED[name]) for name, text in helps().items()]
    rows = [*of_options, *((name, *row) for name, row in AROUND.items())]
    lines = [
        f"| `{flag}` | {text} | {', '.join(f'`{one}`' for one in tests.split(', '))} |" for flag, text, tests in rows
    ]
    return ["| flag | what it does | test |", "| --- | --- | --- |", *lines]


if __name__ == "__main__":
    print("\n".join(table()))
