"""Deliberate breakages of the code, each with the test that must turn red: whether the tests would notice.

    python tests/faults/mutants.py            # all; a few minutes
    python tests/faults/mutants.py no-lock    # those that are named

Each is applied to a copy of the tree. The tests are run there without any of them first: one that is red anyway kills none.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".git", ".whl", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "runs", ".venv")
LIMIT = 1800  # seconds for one test, on a slow machine that is busy too


class Mutant(NamedTuple):
    """A breakage.

    Attributes:
        name: for the command line and the table.
        file: that is broken.
        test: that must fail then, as pytest names it.
        edits: old and new text; each old one stands exactly once in the file.
    """

    name: str
    file: str
    test: str
    edits: tuple[tuple[str, str], ...]


def mutant(name: str, file: str, test: str, *texts: str) -> Mutant:
    """With old and new texts in turns."""
    return Mutant(name, file, f"tests/{test}", tuple(zip(texts[::2], texts[1::2], strict=True)))


DAMAGE, SIGNALS = "faults/test_damage.py", "faults/test_signals.py"
DATA_BATCH = "qlora/data/batch.py"
DATA_FORMATS = "qlora/data/formats.py"
DATA_MESSAGES = "qlora/data/messages.py"
DATA_READ = "qlora/data/read.py"
DATA_SOURCES = "qlora/data/sources.py"
DATA_TABLES = "qlora/data/tables.py"
DATA_TEMPLATE = "qlora/data/template.py"
EVAL_GENERATE = "qlora/eval/generate.py"
CLI = "qlora/cli.py"
KERNEL_OF_THE_LOSS, KERNEL_OF_NF4 = "qlora/model/cross_entropy.py", "qlora/speed/dequantize.py"
LOOP = "train_loop.py"
MODEL_ATTENTION = "qlora/model/attention.py"
MODEL_COVERAGE = "qlora/model/coverage.py"
MODEL_LOAD = "qlora/model/load.py"
MODEL_LORA = "qlora/model/lora.py"
MODEL_LOSS = "qlora/model/loss.py"
RUN_CHECKPOINT = "qlora/run/checkpoint.py"
RUN_FILES = "qlora/run/files.py"
RUN_FOLDER = "qlora/run/folder.py"
RUN_GUARDS = "qlora/run/guards.py"
RUN_LOG = "qlora/run/log.py"
RUN_SIGNALS = "qlora/run/signals.py"
SPEED_ACCELERATE = "qlora/speed/accelerate.py"
SPEED_GRAPHS = "qlora/speed/graphs.py"
SPEED_LAYERS = "qlora/speed/layers.py"
SPEED_LORA_LINEAR = "qlora/speed/lora_linear.py"
SPEED_NF4 = "qlora/speed/nf4.py"
MUTANTS = [
    # -- what is written
    mutant(
        "snapshot-not-copied",
        RUN_CHECKPOINT,
        "run/test_checkpoint.py::test_tensors_are_serialized_as_safetensors_does",
        "        block[begin:end].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach(), non_blocking=on_gpu)\n",
        "        block[begin:end] = 0\n",
    ),
    mutant(
        "save-that-failed-goes-unnoticed",
        RUN_FOLDER,
        "run/test_checkpoint.py::test_a_save_that_fails_is_raised_once_in_the_loop[step]",
        "        if self._saving is not None and self._saving.done():\n",
        "        if False:\n",
    ),
    mutant(
        "last-save-that-failed-goes-unnoticed",
        RUN_FOLDER,
        "run/test_checkpoint.py::test_an_error_of_the_run_is_not_hidden_by_one_of_its_checkpoint",
        "                self.wait_until_saved()\n",
        "                pass\n",
    ),
    mutant(
        "damaged-cache-believed",
        "qlora/data/dataset.py",
        "data/test_parallel.py::test_a_damaged_entry_is_made_again[numbers.bin]",
        'if samples.sha256 == index["sha256"] and ',
        "if ",
    ),
    mutant(
        "chunks-in-any-order",
        "qlora/data/parallel.py",
        "data/test_parallel.py::test_results_come_in_order[3]",
        "            pool.send(sent, chunk)\n",
        "            pool.send(sent ^ 1, chunk)\n",
    ),
    mutant(
        "save-in-place",
        RUN_FILES,
        f"{SIGNALS}::test_two_signals_end_it_at_once[between files]",
        '    aside, old = folder.with_name(f".{folder.name}.tmp"), ',
        "    aside, old = folder, ",
        "            folder.rename(old)  # it",
        "            pass  # it",
    ),
    mutant(
        "prune-first",
        RUN_FOLDER,
        f"{SIGNALS}::test_two_signals_end_it_at_once[between files]",
        "        self.checkpoint = checkpoint.write(",
        "        checkpoint.prune(self.checkpoints, keep - 1, {step: result.loss for step, result in evaluations.items()})\n"
        "        self.checkpoint = checkpoint.write(",
    ),
    mutant(
        "nothing-read-back",
        RUN_FILES,
        f"{DAMAGE}::test_a_disk_that_gives_back_something_else",
        '    problem = f"{wrong[0]} is not what was written" if wrong else None\n',
        "    problem = None\n",
    ),
    mutant(
        "files-not-flushed",
        RUN_FILES,
        f"{DAMAGE}::test_a_folder_is_flushed_inside_out_before_it_takes_its_name",
        "        os.fsync(file.fileno())\n",
        "",
    ),
    mutant(
        "folder-not-flushed",
        RUN_FILES,
        f"{DAMAGE}::test_a_folder_is_flushed_inside_out_before_it_takes_its_name",
        "            sync_folder(path)\n",
        "            pass\n",
    ),
    mutant(
        "rename-not-flushed",
        RUN_FILES,
        f"{DAMAGE}::test_a_folder_is_flushed_inside_out_before_it_takes_its_name",
        "        sync_folder(folder.parent)\n",
        "",
    ),
    mutant(
        "renamed-before-flushed",
        RUN_FILES,
        f"{DAMAGE}::test_a_file_is_flushed_before_it_takes_its_name",
        "        _write(aside, data)\n        aside.rename(path)\n",
        "        aside.write_bytes(data)\n        aside.rename(path)\n        sync_folder(path)\n",
    ),
    mutant(
        "rows-not-flushed",
        RUN_LOG,
        f"{DAMAGE}::test_rows_are_flushed_before_the_checkpoint_that_follows_them",
        "            os.fsync(self.metrics_file.fileno())\n",
        "",
    ),
    # -- what is found
    mutant(
        "sizes-only",
        RUN_FILES,
        f"{DAMAGE}::test_single_bits[state.json]",
        '            if found["sha256"] != entry["sha256"]:',
        "            if False:",
    ),
    mutant(
        "paths-outside",
        RUN_FILES,
        f"{DAMAGE}::test_manifests_that_name_what_is_outside",
        '            if Path(name).is_absolute() or ".." in Path(name).parts:',
        "            if False:",
    ),
    mutant(
        "damaged-is-written-over",
        RUN_FOLDER,
        f"{DAMAGE}::test_the_newest_is_damaged",
        "        for folder in self._damaged:",
        "        for folder in ():",
    ),
    mutant(
        "leftovers-stay",
        RUN_FILES,
        f"{DAMAGE}::test_leftovers_go_and_foreign_files_stay",
        "        if not LEFTOVER_FILES.fullmatch(path.name):\n",
        "        if True:\n",
    ),
    mutant(
        "foreign-files-go",
        RUN_FILES,
        f"{DAMAGE}::test_leftovers_go_and_foreign_files_stay",
        "        if not LEFTOVER_FILES.fullmatch(path.name):\n",
        "        if False:\n",
    ),
    mutant(
        "replaced-is-lost",
        RUN_FILES,
        f"{DAMAGE}::test_what_was_being_replaced_comes_back",
        'if path.name.endswith(".old.tmp") and not replaced.exists():',
        "if False:",
    ),
    mutant(
        "changed-data-accepted",
        RUN_FOLDER,
        f"{DAMAGE}::test_changed_data_is_no_data_to_go_on_with",
        '("data", "targets", "device")',
        '("targets", "device")',
    ),
    mutant(
        "no-lock",
        RUN_FOLDER,
        f"{DAMAGE}::test_two_processes_in_one_folder",
        "        lock.acquire()\n",
        "        pass\n",
    ),
    mutant(
        "lock-file-without-flock",
        RUN_FOLDER,
        "run/test_folder.py::test_a_file_system_without_locks_is_refused",
        ", preserve_lock_file=True)",
        ")",
    ),
    mutant(
        "run-disturbed-by-a-look",
        RUN_FOLDER,
        "run/test_folder.py::test_a_look_at_the_lock_does_not_stop_a_run_that_starts",
        "timeout=LOCK_WAIT_S",
        "timeout=0",
    ),
    mutant(
        "finished-run-trained-again",
        RUN_FOLDER,
        f"{DAMAGE}::test_a_finished_run_is_left_as_it_is",
        "        if self._finished and not overrides:",
        "        if False:",
    ),
    # -- what is restored
    mutant(
        "dropout-ignores-the-micro-batch",
        DATA_BATCH,
        "data/test_data.py::test_dropout_seeds_are_a_pure_function_that_differs_for_each_micro_batch",
        "* 1_000_003 + index) % 2**63",
        "* 1_000_003) % 2**63",
    ),
    mutant(
        "dropout-ignores-the-epoch",
        DATA_BATCH,
        "data/test_data.py::test_dropout_seeds_are_a_pure_function_that_differs_for_each_micro_batch",
        "((seed * 1_000_003 + epoch) * 1_000_003",
        "((seed * 1_000_003) * 1_000_003",
    ),
    mutant(
        "dropout-of-epoch-1-in-each-epoch",
        LOOP,
        "test_equivalence.py::test_dropout_masks_are_the_trainers_in_all_epochs",
        "            at = (epoch, seen",
        "            at = (1, seen",
    ),
    mutant(
        "dropout-of-a-resumed-run-from-micro-batch-0",
        LOOP,
        f"{DAMAGE}::test_dropout_is_the_same_over_a_stop_whatever_else_is_drawn",
        "            at = (epoch, seen // config.per_device_train_batch_size)\n",
        "            at = (epoch, 0)\n",
    ),
    mutant(
        "dropout-not-seeded",
        LOOP,
        f"{DAMAGE}::test_dropout_is_the_same_over_a_stop_whatever_else_is_drawn",
        "        torch.manual_seed(micro_batch.seed)\n",
        "",
    ),
    mutant(
        "dropout-seeded-once-in-a-step",
        LOOP,
        "test_train_loop.py::test_dropout_is_the_same_however_micro_batches_are_shared_among_processes",
        "        torch.manual_seed(micro_batch.seed)\n",
        "        if micro_batch is micro_batches[0]:\n            torch.manual_seed(micro_batch.seed)\n",
    ),
    mutant(
        "earlier-format-resumed",
        RUN_FOLDER,
        "run/test_folder.py::test_a_run_of_an_earlier_format_is_refused_and_its_adapter_starts_a_new_one",
        "        if other.format == FORMAT:\n",
        "        if True:\n",
    ),
    mutant(
        "moments-not-restored",
        RUN_CHECKPOINT,
        f"{SIGNALS}::test_one_signal[step]",
        "{**tensors, **state.optimizer}",
        "dict(state.optimizer)",
    ),
    mutant(
        "epoch-starts-again",
        LOOP,
        f"{SIGNALS}::test_one_signal[step]",
        "epoch_rows(prep.train_set, config, epoch)[seen:]",
        "epoch_rows(prep.train_set, config, epoch)",
    ),
    mutant(
        "later-rows-kept",
        RUN_LOG,
        f"{DAMAGE}::test_the_newest_is_damaged",
        'if row["step"] <= step and step > 0]',
        "if step > 0]",
    ),
    mutant(
        "torn-row-read",
        RUN_FILES,
        f"{DAMAGE}::test_metrics_torn_or_gone",
        "        except (ValueError, RecursionError):\n            break\n",
        "        except (ValueError, RecursionError):\n            raise\n",
        '.split(b"\\n")[:-1]',
        '.split(b"\\n")',
    ),
    mutant(
        "evaluated-twice",
        LOOP,
        f"{SIGNALS}::test_one_signal[adapter]",
        "if prep.eval_set is None or step in evaluations:",
        "if prep.eval_set is None:",
    ),
    # -- signals
    mutant(
        "second-signal-ignored",
        RUN_SIGNALS,
        f"{SIGNALS}::test_two_signals_end_it_at_once[step]",
        "            os._exit(128 + number)\n",
        "            return\n",
    ),
    mutant(
        "signal-raised-in-a-step",
        RUN_SIGNALS,
        f"{SIGNALS}::test_one_signal[step]",
        "        if not self._deferred:\n",
        "        if True:\n",
    ),
    mutant(
        "signal-waits-for-the-evaluation",
        RUN_SIGNALS,
        f"{SIGNALS}::test_one_signal[evaluation]",
        "        self._deferred = not alone\n        try:\n            if alone:\n                self.raise_if_received()\n",
        "        try:\n",
    ),
    mutant(
        "stopped-is-a-success",
        CLI,
        f"{SIGNALS}::test_one_signal[loading]",
        "    return _left(128 + stop.received)\n",
        "    return _left(0)\n",
    ),
    # -- numbers that are none
    mutant(
        "nan-steps",
        LOOP,
        f"{DAMAGE}::test_steps_that_are_not_finite_are_skipped_and_counted_over_a_resume",
        "optimizer.found_inf = 1.0 - finite.float()",
        "optimizer.found_inf = torch.zeros(())",
    ),
    mutant(
        "nan-not-counted",
        RUN_GUARDS,
        f"{DAMAGE}::test_steps_that_are_not_finite_are_skipped_and_counted_over_a_resume",
        "        skipped += 1\n",
        "",
    ),
    mutant(
        "nan-count-not-restored",
        LOOP,
        f"{DAMAGE}::test_steps_that_are_not_finite_are_skipped_and_counted_over_a_resume",
        "    step, first_epoch, seen, skipped = state\n",
        "    step, first_epoch, seen, skipped = state._replace(skipped=0)\n",
    ),
    # -- the step
    mutant(
        "mean-of-means",
        LOOP,
        "test_train_loop.py::test_a_step_counts_as_one_batch_however_it_is_cut",
        "micro_loss = loss_sum(hidden, batch) / num_tokens",
        "micro_loss = loss_sum(hidden, batch) / (batch.num_tokens * len(micro_batches))",
    ),
    mutant(
        "gradients-pile-up",
        LOOP,
        "test_train_loop.py::test_gradients_of_the_last_step_do_not_leak_into_the_next",
        "    optimizer.zero_grad(set_to_none=True)",
        "    pass",
    ),
    mutant(
        "labels-not-shifted",
        MODEL_LOSS,
        "model/test_loss.py::test_equals_transformers_own_loss_and_its_adapter_gradients",
        "[batch.positions + 1]",
        "[batch.positions]",
    ),
    mutant(
        "partial-targets-accepted",
        "qlora/model/targets.py",
        "model/test_load.py::test_the_seven_llama_names_are_refused_not_silently_cut_to_two",
        "        if not matched:\n",
        "        if not matched:\n            continue\n",
    ),
    # -- the data
    mutant(
        "short-step-dropped",
        DATA_BATCH,
        "data/test_data.py::test_steps_are_full_but_for_the_last",
        "    while group := list(itertools.islice(items, size)):\n",
        "    while len(group := list(itertools.islice(items, size))) == size:\n",
    ),
    mutant(
        "stop-masked-as-padding",
        DATA_TEMPLATE,
        "data/test_data.py::test_plain_form_to_the_letter_and_the_loss_on_response_and_stop_token",
        "            labels += answer_ids if is_trained else [IGNORED] * len(answer_ids)\n",
        "            labels += [IGNORED if id == template.stop_id else id for id in answer_ids]\n",
    ),
    mutant(
        "padding-told-by-its-id",
        DATA_BATCH,
        "data/test_data.py::test_a_token_with_the_id_of_the_padding_is_trained",
        "torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)",
        "torch.nonzero((labels[:, 1:] != IGNORED) & (input_ids[:, 1:] != 0), as_tuple=True)",
    ),
    mutant(
        "same-order-in-each-epoch",
        DATA_BATCH,
        "data/test_data.py::test_order_is_a_pure_function_of_seed_and_epoch",
        "manual_seed((seed * 1_000_003 + epoch)",
        "manual_seed((seed * 1_000_003)",
    ),
    mutant(
        "nulls-of-arrow",
        DATA_TABLES,
        "data/test_files.py::test_keys_that_arrow_fills_with_null_do_not_reach_the_template",
        "for key, item in value.items() if item is not None}",
        "for key, item in value.items()}",
    ),
    mutant(
        "lines-of-csv",
        DATA_TABLES,
        "data/test_files.py::test_what_is_wrong_is_told_with_file_and_line",
        "begin, line = line, reader.line_num + 1",
        "begin, line = line, line + 1",
    ),
    mutant(
        "rows-of-an-array-share-a-number",
        DATA_READ,
        "data/test_files.py::test_a_file_of_any_kind_is_read_as_jsonl_is",
        "number = max(line, number + 1)",
        "number = line",
    ),
    mutant(
        "lines-of-several-files",
        DATA_SOURCES,
        "data/test_files.py::test_several_files_are_read_in_the_order_given_and_rows_keep_their_lines",
        "self._begins.append(begin + line)",
        "self._begins.append(line)",
    ),
    mutant(
        "a-file-given-twice",
        DATA_SOURCES,
        "data/test_files.py::test_a_file_that_is_given_twice_is_refused",
        "            if identity in seen:",
        "            if False:",
    ),
    mutant(
        "key-twice-accepted",
        DATA_READ,
        "data/test_data.py::test_a_wrong_file_is_refused_with_its_line",
        "    if len(row) < len(pairs):\n",
        "    if False:\n",
    ),
    mutant(
        "special-tokens-not-marked",
        DATA_TEMPLATE,
        "data/test_data.py::test_special_tokens_in_messages_stay_text_in_the_chat_form",
        r'marked = self.special.sub(rf"{OPEN}\g<0>{CLOSE}", value)',
        "marked = value",
    ),
    mutant(
        "special-tokens-not-marked-in-calls",
        DATA_TEMPLATE,
        "data/test_templates.py::test_special_tokens_in_arguments_thoughts_and_tools_stay_text",
        "keys=template.mark(message.keys)",
        "keys=message.keys",
    ),
    mutant(
        "input-of-alpaca-dropped",
        DATA_FORMATS,
        "data/test_forms.py::test_a_form_is_what_its_messages_say",
        'for name in ("input", "context"))',
        'for name in ("context",))',
    ),
    mutant(
        "system-column-dropped",
        DATA_FORMATS,
        "data/test_forms.py::test_a_form_is_what_its_messages_say",
        'messages = [Message("system", values.system), *messages]',
        "messages = list(messages)",
    ),
    mutant(
        "part-of-a-prompt-ignored",
        DATA_FORMATS,
        "data/test_forms.py::test_a_column_of_a_prompt_that_is_not_used_is_refused_by_name",
        "        if _is_filled(row[name]):\n",
        "        if False:\n",
    ),
    mutant(
        "weight-ignored",
        DATA_MESSAGES,
        "data/test_templates.py::test_a_masked_answer_stays_in_context_and_carries_no_loss",
        "return Message(role, content, bool(weight and train), turn)",
        "return Message(role, content, True, turn)",
    ),
    mutant(
        "all-answers-trained-under-last",
        DATA_TEMPLATE,
        "data/test_templates.py::test_the_last_answer_has_the_same_ids_whether_or_not_others_are_trained",
        'turn.trained and (loss_on != "last" or turn is turns[-1])',
        "turn.trained",
    ),
    mutant(
        "unused-key-accepted",
        DATA_TEMPLATE,
        "data/test_templates.py::test_what_a_template_leaves_out_is_refused_with_its_line",
        "        conversation.check_used(marked)\n",
        "",
    ),
    mutant(
        "lost-system-message-accepted",
        DATA_TEMPLATE,
        "data/test_templates.py::test_what_a_template_leaves_out_is_refused_with_its_line",
        'if message.role == "system" and not self.template.renders_system:',
        "if False:",
    ),
    mutant(
        "thoughts-lost",
        DATA_TEMPLATE,
        "data/test_templates.py::test_thoughts_of_a_single_turn_are_trained_as_written",
        "        is_lost = answer is None or not _is_in(content, prompt, answer)\n",
        "        is_lost = answer is None\n",
    ),
    mutant(
        "rewritten-turns-trained",
        DATA_TEMPLATE,
        "data/test_templates.py::test_a_template_that_rewrites_earlier_turns_trains_the_last",
        "            if not prompt.startswith(done):\n",
        "            if False:\n",
    ),
    mutant(
        "two-stops-behind-a-text",
        DATA_TEMPLATE,
        "data/test_forms.py::test_a_text_is_trained_as_a_whole_with_one_bos_and_one_stop",
        "if stripped.endswith(stops) else",
        "if False else",
    ),
    # -- packing
    mutant(
        "label-across-samples",
        DATA_BATCH,
        "data/test_data.py::test_packed_rows_hold_what_their_samples_hold",
        "for label in (IGNORED, *sample.labels[1:])]",
        "for label in sample.labels]",
    ),
    mutant(
        "positions-run-on",
        DATA_BATCH,
        "data/test_data.py::test_collate_packed_to_the_letter",
        "torch.cat([torch.arange(length) for length in lengths])",
        "torch.arange(sum(lengths))",
    ),
    mutant(
        "padding-belongs-to-the-last-sample",
        DATA_BATCH,
        "data/test_data.py::test_the_longest_may_be_the_padding",
        "lengths += own if sum(own) == width else [*own, width - sum(own)]",
        "lengths += [*own[:-1], width - sum(own[:-1])]",
    ),
    mutant(
        "exact-fit-missed",
        DATA_BATCH,
        "data/test_data.py::test_packing_is_best_fit_decreasing_in_any_order",
        "bisect.bisect_left(rooms, lengths[index])",
        "bisect.bisect_right(rooms, lengths[index])",
    ),
    mutant(
        "fullest-rows-first",
        DATA_BATCH,
        "data/test_data.py::test_rows_of_an_epoch_are_a_pure_function_of_seed_and_epoch",
        "    return [rows[index] for index in epoch_order(len(rows), config.seed, epoch)]\n",
        "    return rows\n",
    ),
    mutant(
        "seen-in-samples",
        LOOP,
        "run/test_folder.py::test_other_settings_go_on_bit_for_bit_too[--packing --max-length 100]",
        "seen += sum(len(micro_batch.input_ids) for",
        "seen += sum(len(micro_batch.lines) for",
    ),
    mutant(
        "row-length-may-change",
        RUN_FOLDER,
        "run/test_folder.py::test_with_packing_the_length_of_a_row_is_the_runs_own",
        '        unused -= {"max_length"}  # ',
        "        pass  # ",
    ),
    mutant(
        "runs-before-packing-refused",
        RUN_FOLDER,
        "run/test_folder.py::test_a_run_from_before_there_was_an_option_goes_on",
        "old: dict[str, Any] = {**EARLIER, **before.config}",
        'old: dict[str, Any] = {"packing": None} | {**before.config}',
    ),
    # -- attention
    mutant(
        "mask-without-samples",
        MODEL_ATTENTION,
        "model/test_attention.py::test_packed_rows_give_the_loss_and_gradients_of_one_sample_a_row",
        "sample[:, :, None] == sample[:, None, :]",
        "sample[:, :, None] >= sample[:, None, :]",
    ),
    mutant(
        "mask-one-wider-than-the-sliding-window",
        MODEL_ATTENTION,
        "model/test_attention.py::test_ours_is_transformers_own_bit_for_bit",
        "seen.triu(1 - window)",
        "seen.triu(-window)",
    ),
    mutant(
        "no-mask-for-the-sliding-window",
        MODEL_ATTENTION,
        "model/test_attention.py::test_ours_is_transformers_own_bit_for_bit",
        "(beyond or batch.cu_seqlens is not None)",
        "batch.cu_seqlens is not None",
    ),
    mutant(
        "flash-sliding-window-one-wider",
        MODEL_ATTENTION,
        "model/test_attention.py::test_kernels_are_told_what_the_masks_say",
        "(-1, -1) if sliding_window is None else (sliding_window - 1, 0)",
        "(-1, -1) if sliding_window is None else (sliding_window, 0)",
    ),
    mutant(
        "varlen-not-causal",
        MODEL_ATTENTION,
        "model/test_attention.py::test_kernels_are_told_what_the_masks_say",
        "(-1, 0) if sliding_window is None",
        "(-1, -1) if sliding_window is None",
    ),
    mutant(
        "varlen-sees-one-sample-a-row",
        MODEL_ATTENTION,
        "model/test_attention.py::test_kernels_are_told_what_the_masks_say",
        "    if cu_seq_lens_q is None:  # one sample a row\n",
        "    if True:\n",
    ),
    mutant(
        "transformers-makes-the-masks",
        MODEL_ATTENTION,
        "model/test_attention.py::test_transformers_never_looks_for_packed_rows_which_waits_for_a_gpu",
        "settings._attn_implementation = PREFIX + ",
        "settings._attn_implementation = ",
    ),
    mutant(
        "sliding-window-not-put-back",
        MODEL_ATTENTION,
        "model/test_attention.py::test_what_for_training_changes_is_put_back",
        "        if before[1] is not None:\n",
        "        if False:\n",
    ),
    # -- layers
    mutant(
        "auto-resolved-anew",
        RUN_FOLDER,
        "run/test_folder.py::test_what_auto_was_resolved_to_stays_the_runs_own",
        "return dataclasses.replace(config, **resolved)",
        "return config",
    ),
    mutant(
        "memory-not-asked",
        SPEED_LAYERS,
        "speed/test_layers.py::test_on_a_gpu_auto_is_the_fastest_that_is_predicted_to_fit",
        "if predicted_gb < MARGIN * free_gb:",
        "if True:",
    ),
    mutant(
        "dropout-drawn-anew",
        SPEED_LAYERS,
        "speed/test_layers.py::test_dropout_is_drawn_again_as_it_was",
        '"preserve_rng_state": preserve_rng_state',
        '"preserve_rng_state": False',
    ),
    mutant(
        "products-computed-again",
        SPEED_LAYERS,
        "speed/test_layers.py::test_what_is_multiplied_again_is_what_the_policy_says",
        "in ATTENTION | PRODUCTS",
        "in ATTENTION",
    ),
    mutant(
        "selective-keeps-less",
        SPEED_LAYERS,
        "speed/test_layers.py::test_what_is_multiplied_again_is_what_the_policy_says",
        "args[-1] in ATTENTION_INPUTS",
        "args[-1] in ()",
    ),
    mutant(
        "each-length-compiled",
        SPEED_LAYERS,
        "speed/test_layers.py::test_all_lengths_and_layers_share_one_compilation",
        "            torch._dynamo.maybe_mark_dynamic(tensor, 1)",
        "            pass",
    ),
    mutant(
        "last-batch-not-filled-up",
        DATA_BATCH,
        "speed/test_layers.py::test_all_lengths_and_layers_share_one_compilation",
        'return 1 if config.compile == "none" else config.per_device_train_batch_size',
        "return 1",
    ),
    mutant(
        "training-layers-left-in-place",
        SPEED_ACCELERATE,
        "speed/test_layers.py::test_evaluation_runs_the_layer_as_it_is_written",
        "parent._modules[name] = original",
        "pass",
    ),
    mutant(
        "scale-of-the-update-forgotten",
        SPEED_LORA_LINEAR,
        "speed/test_lora_linear.py::test_the_operator_is_dense_arithmetic_forward_and_backward",
        '            b = b * self.scaling["default"]  # [N, r]\n',
        "",
    ),
    mutant(
        "gradient-of-x-through-a-forgotten",
        SPEED_LORA_LINEAR,
        "speed/test_lora_linear.py::test_the_operator_is_dense_arithmetic_forward_and_backward",
        "        d_x.addmm_(d_reduced, a)",
        "        pass",
    ),
    mutant(
        "scale-of-the-gradient-forgotten",
        SPEED_LORA_LINEAR,
        "speed/test_layers.py::test_gradients_are_added_to_what_is_there_and_made_where_there_is_none",
        "        torch._foreach_mul_(added, [scale for _, scale, _ in found])\n",
        "",
    ),
    mutant(
        "gradients-replaced",
        SPEED_LORA_LINEAR,
        "speed/test_layers.py::test_gradients_are_added_to_what_is_there_and_made_where_there_is_none",
        "            if weight.grad is None:\n                weight.grad = new",
        "            weight.grad = new",
    ),
    mutant(
        "seeds-of-neighbors-shift-a-mask",
        SPEED_LORA_LINEAR,
        "speed/test_lora_linear.py::test_seeded_dropout_is_dropout",
        "(_mixed(rows) ^ seed)",
        "_mixed(rows + seed)",
    ),
    mutant(
        "dropout-of-compiled-layers-anew",
        SPEED_LORA_LINEAR,
        "speed/test_layers.py::test_dropout_is_another_in_each_pass_and_in_each_layer",
        "if self.seed is None else seeded_dropout(",
        "if True else seeded_dropout(",
    ),
    mutant(
        "graphs-add-where-no-gradient-is",
        SPEED_GRAPHS,
        "speed/test_graphs.py::test_gradients_that_zero_grad_removed_after_the_forward_pass_are_there_again",
        "        ctx.graphs.put_gradients_back()  # zero",
        "        # zero",
    ),
    mutant(
        "recorded-where-no-gradient-is",
        SPEED_GRAPHS,
        "speed/test_graphs.py::test_gradients_that_zero_grad_removed_after_the_forward_pass_are_there_again",
        "            self.put_gradients_back()  # a",
        "            # a",
    ),
    mutant(
        "recorded-when-it-comes-first",
        SPEED_GRAPHS,
        "speed/test_graphs.py::test_a_shape_is_captured_when_it_comes_again_and_runs_in_the_pool_before",
        "key in self.seen and ",
        "",
    ),
    mutant(
        "compiled-with-dropout-of-its-own",
        SPEED_LAYERS,
        "speed/test_layers.py::test_layers_with_dropout_of_their_own_are_not_compiled",
        "    if max(rates) > 0:",
        "    if False:",
    ),
    mutant(
        "fingerprint-of-computed-dtypes",
        MODEL_LOAD,
        "model/test_load.py::test_the_fingerprint_is_that_of_the_dtypes_that_are_stored",
        'getattr(state, "stored_dtype", state.dtype)',
        "state.dtype",
    ),
    mutant(
        "head-in-nf4-accepted",
        MODEL_LORA,
        "model/test_families.py::test_a_head_in_nf4_is_refused_before_the_weights_are_loaded",
        "    if any(layer is meta_model.get_output_embeddings() for",
        "    if any(False for",
    ),
    mutant(
        "branch-without-its-best",
        RUN_FOLDER,
        "run/test_folder.py::test_a_branch_takes_the_best_checkpoint_along",
        "[*(found[step] for step in checkpoint.lowest(losses, found)), source]",
        "[source]",
    ),
    mutant(
        "ddp-accepted",
        SPEED_LORA_LINEAR,
        "speed/test_graphs.py::test_distributed_data_parallel_is_refused_since_it_would_never_reduce",
        "if DistributedDataParallel._get_active_ddp_module() is not None:",
        "if False:",
    ),
    mutant(
        "gradients-of-the-last-step-stay",
        SPEED_GRAPHS,
        "speed/test_graphs.py::test_what_surrounds_a_graph_changes_no_bit",
        "            torch._foreach_zero_([gradient for _, gradient in moved])\n",
        "",
    ),
    mutant(
        "inputs-of-the-first-batch-stay",
        SPEED_GRAPHS,
        "speed/test_graphs.py::test_what_surrounds_a_graph_changes_no_bit",
        "            target.copy_(tensor)",
        "            pass",
    ),
    mutant(
        "loss-never-scaled",
        LOOP,
        "model/test_precision.py::test_gradients_that_overflow_leave_the_weights_and_halve_the_scale",
        "        (scale * micro_loss).backward()\n",
        "        micro_loss.backward()\n",
        "    unscale_gradients(parameters, scale)\n",
        "",
    ),
    mutant(
        "gradients-stay-scaled",
        LOOP,
        "model/test_precision.py::test_losses_and_gradients_are_those_of_bf16",
        "    unscale_gradients(parameters, scale)\n",
        "",
    ),
    mutant(
        "loss-scale-not-restored",
        "qlora/run/checkpoint.py",
        "model/test_precision.py::test_a_run_in_fp16_skips_overflows_resumes_bit_for_bit_and_is_used",
        "    optimizer.param_groups[0] |= state.loss_scaling\n",
        "",
    ),
    mutant(
        "every-4-bits-are-nf4",
        SPEED_NF4,
        "model/test_quantization.py::test_a_checkpoint_in_4_bits_is_read_as_it_is",
        'kind = "nf4" if levels[0] == -1.0 else "fp4"',
        'kind = "nf4"',
    ),
    mutant(
        "nothing-offloaded",
        SPEED_LAYERS,
        "speed/test_layers.py::test_offloaded_checkpoints_are_the_inputs_of_layers_and_come_back",
        "    place = hidden.data_ptr(), hidden.shape",
        "    place = hidden.data_ptr(), None",
    ),
    mutant(
        "ends-of-samples-not-filled-up",
        DATA_BATCH,
        "data/test_data.py::test_rows_are_padded_to_a_multiple_and_packed_samples_counted_to_one",
        "    ends += [ends[-1]] * (rounded(len(ends), multiple) - len(ends))\n",
        "",
    ),
    mutant(
        "any-quantization-will-do",
        "qlora/model/supported.py",
        "model/test_load.py::test_a_checkpoint_that_is_quantized_otherwise_is_refused",
        "    if kind != quantization:",
        "    if False:",
    ),
    mutant(
        "gradient-of-b-without-its-input",
        SPEED_LORA_LINEAR,
        "speed/test_lora_linear.py::test_the_operator_is_dense_arithmetic_forward_and_backward",
        "d_output.T @ reduced",
        "d_output.T @ reduced.abs()",
    ),
    mutant(
        "offset-of-scales-forgotten",
        SPEED_NF4,
        "speed/test_lora_linear.py::test_the_weight_is_that_of_bitsandbytes_bit_for_bit",
        "        scales += scale_offset\n",
        "",
    ),
    # -- CUDA graphs, by the stand-in for a recording
    mutant(
        "gradient-from-outside-lost",
        SPEED_GRAPHS,
        "speed/test_graphs.py::test_a_gradient_from_outside_the_graphs_is_carried_into_them",
        "                    gradient.copy_(parameter.grad)\n",
        "                    pass\n",
    ),
    mutant(
        "aliases-copied-apart",
        SPEED_GRAPHS,
        "speed/test_graphs.py::test_one_tensor_under_two_names_has_one_copy",
        "    return {name: copied(value) for name, value in inputs.items()}",
        "    return {name: value.clone() if id(value) in copies else copied(value) for name, value in inputs.items()}",
    ),
    mutant(
        "ends-of-samples-compile-again",
        SPEED_LAYERS,
        "speed/test_layers.py::test_packed_rows_of_any_number_of_samples_share_one_compilation",
        '        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):  # usually one tensor\n',
        "        for name in ():\n",
    ),
    mutant(
        "key-without-aliases",
        SPEED_GRAPHS,
        "speed/test_graphs.py::test_one_tensor_under_two_names_has_one_copy",
        "(name, first[id(value)], tuple(value.shape))",
        "(name, name, tuple(value.shape))",
    ),
    mutant(
        "key-without-shapes",
        SPEED_GRAPHS,
        "speed/test_graphs.py::test_what_surrounds_a_graph_changes_no_bit",
        "(name, first[id(value)], tuple(value.shape))",
        "(name, first[id(value)], value.dim())",
    ),
    mutant(
        "key-without-autocast",
        SPEED_GRAPHS,
        "speed/test_graphs.py::test_a_replay_reads_all_that_its_batch_brings_and_autocast_has_a_recording_of_its_own",
        "return (torch.is_autocast_enabled(self.anchor.device.type), *shapes)",
        "return (True, *shapes)",
    ),
    mutant(
        "replays-not-counted",
        SPEED_GRAPHS,
        "speed/test_graphs.py::test_a_second_forward_before_the_backward_is_an_error",
        "        graphs.passes += 1\n",
        "",
    ),
    mutant(
        "second-backward-allowed",
        SPEED_GRAPHS,
        "speed/test_graphs.py::test_a_second_backward_is_an_error",
        "        ctx.number = None\n",
        "",
    ),
    mutant(
        "gradient-of-the-first-batch-stays",
        SPEED_GRAPHS,
        "speed/test_graphs.py::test_a_shape_is_captured_when_it_comes_again_and_runs_in_the_pool_before",
        "        self.d_hidden.copy_(d_hidden)\n",
        "",
    ),
    mutant(
        "copies-of-the-last-pass-stay",
        SPEED_LORA_LINEAR,
        "speed/test_layers.py::test_the_plain_decoder_sees_the_adapters_as_they_are",
        "        drop_copies([layer for layer in alive if layer.copied_in is ctx.this_pass])\n",
        "",
    ),
    mutant(
        "layers-inside-layers-swapped",
        "qlora/model/families.py",
        "speed/test_layers.py::test_a_layer_inside_another_is_recomputed_with_it",
        "            yield module, name, child\n        elif child is not None:",
        "            yield module, name, child\n        if child is not None:",
    ),
    mutant(
        "recorded-without-gradients",
        SPEED_ACCELERATE,
        "speed/test_graphs.py::test_only_training_is_recorded_and_only_so_many_shapes",
        "self._run if self.graphs is None or not torch.is_grad_enabled() else self.graphs",
        "self._run if self.graphs is None else self.graphs",
    ),
    mutant(
        "compiled-layers-are-trusted",
        SPEED_ACCELERATE,
        "speed/test_layers.py::test_layers_that_compile_to_something_else_run_as_written",
        "        if difference <= TOLERANCE or self._unchecked:\n",
        "        if True:\n",
    ),
    mutant(
        "one-mask-for-all-kinds-of-layers",
        "qlora/model/attention.py",
        "model/test_attention.py::test_ours_is_transformers_own_bit_for_bit[Olmo3-sdpa]",
        '        windows = {"full_attention": None, "sliding_attention": window}\n',
        '        windows = {"full_attention": window, "sliding_attention": window}\n',
    ),
    mutant(
        "a-window-that-no-layer-reads",
        "qlora/model/families.py",
        "model/test_families.py::test_a_model_is_judged_by_what_its_layers_ask_of_attention",
        "        if call.mask is not masks[kind]:\n",
        "        if False:\n",
        "    return AttentionUse(None, window, softcap,",
        "    return AttentionUse(None, True, softcap,",
    ),
    mutant(
        "scores-are-not-capped",
        "qlora/model/attention.py",
        "model/test_attention.py::test_ours_is_transformers_own_bit_for_bit[Gemma2-eager]",
        "        scores = torch.tanh(scores / softcap) * softcap  # [B, H, T, T]\n",
        "        pass\n",
    ),
    mutant(
        "any-number-of-recordings",
        SPEED_GRAPHS,
        "speed/test_graphs.py::test_only_training_is_recorded_and_only_so_many_shapes",
        " and len(self.recordings) < MAX_GRAPHS",
        "",
    ),
    mutant(
        "gradients-stay-with-their-rank",
        "qlora/distributed.py",
        "test_distributed.py::test_one_two_and_four_ranks_train_the_same",
        "        dist.all_reduce(message)",
        "        pass",
    ),
    mutant(
        "each-rank-evaluates-everything",
        "qlora/data/batch.py",
        "model/test_shards.py::test_the_eval_data_is_shared_out",
        "groups[ranks.rank :: ranks.size]",
        "groups",
    ),
    mutant(
        "no-filler-for-a-rank-without-work",
        "qlora/data/batch.py",
        "model/test_shards.py::test_every_rank_runs_as_many_training_passes",
        "        if config.shard_base and owners.count(ranks.rank) < math.ceil(len(step) / ranks.size):",
        "        if False:",
    ),
    mutant(
        "filler-counts-as-rows",
        LOOP,
        "test_distributed.py::test_a_sharded_base_trains_the_same",
        "for micro_batch in micro_batches if micro_batch.lines)",
        "for micro_batch in micro_batches)",
    ),
    mutant(
        "backward-gathers-nothing",
        "qlora/model/shards.py",
        "test_distributed.py::test_a_sharded_base_trains_the_same",
        "        ctx.shard.base.gather(ctx.shard.number, ctx.shard.number - 1)\n",
        "",
    ),
    mutant(
        "layer-gathered-once",
        "qlora/model/shards.py",
        "test_distributed.py::test_a_sharded_base_trains_the_same",
        "and self._held[index % 2] != index:",
        "and self._held[index % 2] is None:",
    ),
    mutant(
        "part-of-the-wrong-rank",
        "qlora/model/shards.py",
        "model/test_shards.py::test_the_parts_make_the_whole_base",
        "        first, last = size * self._ranks.rank, size * (self._ranks.rank + 1)",
        "        first, last = 0, size",
    ),
    mutant(
        "lora-plus-for-a",
        "qlora/model/optimizer.py",
        "model/test_optimizer.py::test_lora_plus_gives_b_a_higher_rate",
        '"lora_B" in name',
        '"lora_A" in name',
    ),
    mutant(
        "rslora-not-asked-of-peft",
        MODEL_LORA,
        "test_train_loop.py::test_rslora_scales_by_the_root_of_the_rank_and_is_saved_so",
        "            use_rslora=config.use_rslora,\n",
        "",
    ),
    mutant(
        "odd-shapes-are-repacked",
        MODEL_LOAD,
        "model/test_load.py::test_layers_of_any_shape_infer_on_a_cpu",
        "module.out_features % 32 == 0 and module.in_features % 64 == 0",
        "True",
    ),
    mutant(
        "a-signal-stops-one-rank",
        "qlora/distributed.py",
        "test_distributed.py::test_a_signal_to_any_rank_stops_all_at_the_same_step",
        '    return int(_over_ranks([number], "max")[0])',
        "    return int(number)",
    ),
    mutant(
        "ranks-may-differ",
        "qlora/distributed.py",
        "test_distributed.py::test_ranks_that_differ_end_the_run",
        "different = largest(sum(one != other for one, other in zip_longest(ours, theirs)))",
        "different = 0",
    ),
    mutant(
        "kernels-that-others-may-write",
        "qlora/speed/compile_cache.py",
        "speed/test_compile_cache.py::test_a_folder_that_others_may_write_is_not_used",
        " or found.st_mode & 0o022",
        "",
    ),
    mutant(
        "edited-code-is-not-compiled-again",
        "qlora/speed/compile_cache.py",
        "speed/test_compile_cache.py::test_code_that_was_edited_is_compiled_again",
        "    torch.compiler.config.cache_key_tag += _code_digest()\n",
        "",
    ),
    mutant(
        "answers-scale-the-adapter-twice",
        SPEED_LORA_LINEAR,
        "speed/test_decode.py::test_layers_that_answer_compute_what_peft_s_do",
        '(b.detach() * layer.scaling["default"]).to(dtype)',
        '(b.detach() * layer.scaling["default"] ** 2).to(dtype)',
    ),
    mutant(
        "recordings-not-released",
        SPEED_ACCELERATE,
        "speed/test_graphs.py::test_released_graphs_are_gone_and_the_decoder_still_runs",
        "        self.graphs = None\n        lora",
        "        lora",
    ),
    mutant(
        "hooks-accepted",
        SPEED_LORA_LINEAR,
        "speed/test_graphs.py::test_gradient_hooks_are_refused_since_they_would_never_fire",
        "    if watched:\n",
        "    if False:\n",
    ),
    mutant(
        "second-backward-of-the-loss-without-words",
        MODEL_LOSS,
        "speed/test_graphs.py::test_a_second_backward_is_an_error",
        "        if ctx.gradient is None:\n",
        "        if False:\n",
    ),
    # -- Triton kernels, by its interpreter
    *(
        mutant(name, file, "speed/test_kernels.py::test_the_kernels_are_interpreted_in_a_process_apart", *texts)
        for name, file, *texts in (
            ("largest-logit-not-taken-off", KERNEL_OF_THE_LOSS, "        largest = larger\n", ""),
            ("sum-not-rescaled", KERNEL_OF_THE_LOSS, "total * tl.exp(largest - larger)", "total"),
            ("loss-of-another-token", KERNEL_OF_THE_LOSS, "tl.load(logits + target)", "tl.load(logits)"),
            ("target-not-taken-off", KERNEL_OF_THE_LOSS, " - tl.where(at == target, 1.0, 0.0)", ""),
            ("rows-overlap", KERNEL_OF_THE_LOSS, "    logits += row * vocabulary\n", "    logits += row * (vocabulary - 1)\n"),
            (
                "last-block-not-stored",
                KERNEL_OF_THE_LOSS,
                "slopes.to(logits.dtype.element_ty), mask=at < vocabulary",
                "slopes.to(logits.dtype.element_ty), mask=at < vocabulary // BLOCK * BLOCK",
            ),
            (
                "halves-of-a-byte-swapped",
                KERNEL_OF_NF4,
                "byte >> 4",
                "byte & 15",
                "levels + (byte & 15)) * scale  # [BLOCK]\n",
                "levels + (byte >> 4)) * scale  # [BLOCK]\n",
            ),
            ("offset-of-scales-left-out", KERNEL_OF_NF4, "    scale += tl.load(scale_offset)  # [BLOCK]\n", ""),
            ("scale-of-another-block", KERNEL_OF_NF4, "block = at // 32", "block = at // 64"),
            ("scale-of-another-scale", KERNEL_OF_NF4, "block // 256", "block // 128"),
            (
                "values-not-interleaved",
                KERNEL_OF_NF4,
                "tl.interleave(first, second)",
                "tl.cat(first, second, can_reorder=True)",
            ),
        )
    ),
    # -- what draws, what is in NF4, how a run ends
    mutant(
        "attention-that-draws-is-kept",
        SPEED_LAYERS,
        "speed/test_layers.py::test_attention_that_draws_is_computed_again",
        "    return bool(rate)\n",
        "    return False\n",
    ),
    mutant(
        "dropout-hashed-in-int32-on-a-cpu",
        SPEED_LORA_LINEAR,
        "speed/test_lora_linear.py::test_on_a_cpu_the_hash_of_dropout_multiplies_in_int64",
        'dtype = torch.int64 if x.device.type == "cpu" else torch.int32',
        "dtype = torch.int32",
    ),
    mutant(
        "hash-not-cut-to-32-bits",
        SPEED_LORA_LINEAR,
        "speed/test_lora_linear.py::test_dropout_hashes_as_murmurhash3_does_in_32_bits",
        "return bits & 0xFFFFFFFF if bits.dtype == torch.int64 else bits",
        "return bits",
    ),
    mutant(
        "own-compute-dtype-kept",
        MODEL_LOAD,
        "model/test_load.py::test_a_checkpoint_that_is_quantized_already_computes_in_bf16",
        "    module.compute_dtype, module.compute_type_is_set = dtype, True\n",
        "",
    ),
    mutant(
        "own-dtype-of-weights-kept",
        MODEL_LOAD,
        "model/test_load.py::test_a_checkpoint_that_is_quantized_already_computes_in_bf16",
        "packed.quant_state.dtype, dtype\n",
        "packed.quant_state.dtype, packed.quant_state.dtype\n",
    ),
    mutant(
        "any-storage-will-do",
        "qlora/model/supported.py",
        "model/test_load.py::test_a_checkpoint_that_is_quantized_otherwise_is_refused",
        '    if storage != "uint8":',
        "    if False:",
    ),
    mutant(
        "experts-accepted",
        MODEL_LORA,
        "model/test_families.py::test_experts_that_stay_in_bf16_are_refused_by_default[Mixtral]",
        '    if rest.share > UNCOVERED_LIMIT and in_layers and config.quantization != "none":\n',
        "    if False:\n",
    ),
    mutant(
        "virtual-tokens-left-out",
        "qlora/model/prompts.py",
        "model/test_prompts.py::test_virtual_tokens_change_the_output_and_disabling_them_gives_the_base[PREFIX_TUNING]",
        "    return PromptedDecoder(model) if has_prompt(model) else model.get_decoder()\n",
        "    return model.get_decoder()\n",
    ),
    mutant(
        "padding-behind-virtual-tokens",
        EVAL_GENERATE,
        "model/test_prompts.py::test_answers_are_those_of_whole_rows_computed_anew[PROMPT_TUNING-Phi3]",
        "_rows_by_length(prompts) if prompted else [[*range(len(prompts))]]",
        "[[*range(len(prompts))]]",
    ),
    mutant(
        "virtual-tokens-saved-with-dropout",
        RUN_CHECKPOINT,
        "model/test_prompts.py::test_what_a_network_with_dropout_makes_is_saved_without_dropout",
        "    model.eval()  # virtual tokens may come from a network with dropout\n",
        "",
    ),
    mutant(
        "edits-not-saved",
        RUN_CHECKPOINT,
        "test_edits.py::test_each_applies_learns_resumes_bit_for_bit_and_saves",
        "    return {name: parameter for name, parameter in _trained(model).items() if parameter.data_ptr() not in held}\n",
        "    return {}\n",
    ),
    mutant(
        "stale-rows-of-the-head",
        MODEL_LOSS,
        "model/test_peft_config.py::test_a_run_with_embeddings_or_heads_resumes_and_is_used[rows]",
        "    if head.layer is not None:\n",
        "    if False:\n",
    ),
    mutant(
        "fp32-for-kernels-of-16-bits",
        MODEL_ATTENTION,
        "model/test_attention.py::test_kernels_attend_in_autocast_s_dtype",
        "    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype\n",
        "    return value.dtype\n",
    ),
    mutant(
        "routers-adapted",
        MODEL_COVERAGE,
        "model/test_families.py::test_a_router_is_never_a_target",
        "id(m) in inside and not ROUTER.search(n) and",
        "id(m) in inside and",
    ),
    mutant(
        "subclasses-taken-for-nf4",
        MODEL_COVERAGE,
        "model/test_families.py::test_linear_layers_of_another_class_are_refused_before_the_weights_are_loaded",
        "if type(module) in kinds)\n    return {name: module for name, module in plain",
        "if isinstance(module, kinds))\n    return {name: module for name, module in plain",
    ),
    mutant(
        "layers-not-in-nf4-adapted",
        MODEL_LORA,
        "model/test_families.py::test_an_audited_layer_that_is_not_in_nf4_after_loading_is_refused",
        "if quantized and (plain := ",
        "if False and (plain := ",
    ),
    mutant(
        "refusal-of-peft-comes-late",
        MODEL_LORA,
        "model/test_families.py::test_what_peft_refuses_is_refused_before_the_weights_are_loaded",
        "    if refusal is not None:\n",
        "    if False:\n",
    ),
    mutant(
        "date-of-today",
        DATA_TEMPLATE,
        "run/test_folder.py::test_a_template_with_the_date_does_not_stop_a_run_from_going_on",
        '.globals["strftime_now"] = clock.strftime\n',
        '.globals["unused"] = clock.strftime\n',
    ),
    mutant(
        "answers-end-the-run",
        EVAL_GENERATE,
        "run/test_folder.py::test_sample_answers_that_fail_are_a_warning_of_a_complete_run",
        "FAILURES = (RuntimeError, MemoryError, ",
        "FAILURES = (MemoryError, ",
    ),
    mutant(
        "finished-after-the-answers",
        LOOP,
        "run/test_folder.py::test_sample_answers_that_fail_are_a_warning_of_a_complete_run",
        "    run.finish(adapter_step)\n",
        "",
        "record, tracker.say)\n",
        "record, tracker.say)\n    run.finish(adapter_step)\n",
    ),
    mutant(
        "training-memory-held",
        SPEED_ACCELERATE,
        "run/test_folder.py::test_sample_answers_that_fail_are_a_warning_of_a_complete_run",
        "        optimizer.zero_grad(set_to_none=True)\n        optimizer.state.clear()\n",
        "",
    ),
    mutant(
        "last-adapter-handed-over",
        RUN_FOLDER,
        "run/test_folder.py::test_early_stopping_hands_over_the_best_adapter_and_names_its_step",
        "                checkpoint.load_adapter(folders[step], model)\n",
        "                pass\n",
    ),
    mutant(
        "damaged-best-taken",
        RUN_FOLDER,
        "run/test_folder.py::test_a_damaged_best_checkpoint_is_told_and_the_last_one_taken",
        "if not (problem := checkpoint.problem_of(folders[step])):",
        "if True:",
    ),
    mutant(
        "old-answers-stay",
        RUN_FOLDER,
        "run/test_folder.py::test_answers_of_an_earlier_end_do_not_outlive_it",
        "        for made_at_the_end in (FINISHED, SAMPLES):\n",
        "        for made_at_the_end in (FINISHED,):\n",
    ),
]


def applied(mutant: Mutant, root: Path) -> str:
    """The broken file.

    Raises:
        ValueError: if an old text does not stand there exactly once.
    """
    text = (root / mutant.file).read_text()
    for old, new in mutant.edits:
        if text.count(old) != 1:
            raise ValueError(f"{mutant.name}: {old!r} stands {text.count(old)} times in {mutant.file}")
        text = text.replace(old, new)
    return text


def run(tests: Iterable[str], scratch: Path, mutant: Mutant | None) -> tuple[int, str]:
    """pytest's exit code (1: a test failed) and last words on tests in a copy of the tree, with or without a breakage."""
    copied = shutil.copytree(ROOT, scratch / "tree", ignore=LEFT_OUT)
    if mutant is not None:
        (copied / mutant.file).write_text(applied(mutant, copied))
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not slow", "--basetemp", str(scratch / "temporary")]
    command = [sys.executable, "-m", "pytest", "-n", "0", *options, *tests]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(copied)}
    environment.pop("SURVIVAL_JSON", None)
    with (scratch / "output").open("w+") as output:  # no pipe, which a child that is left behind would hold open
        process = subprocess.Popen(
            command, cwd=copied, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(LIMIT)
        finally:
            with contextlib.suppress(ProcessLookupError):  # a broken program may leave children that wait for ever
                os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        return code, " ".join(output.read().strip().splitlines()[-1:])


def outcome(mutant: Mutant) -> tuple[Mutant, str, float]:
    """What became of it."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            code, words = run([mutant.test], Path(scratch), mutant)
        except (ValueError, subprocess.TimeoutExpired) as error:
            return mutant, f"NO ANSWER: {error}", time.perf_counter() - start
    state = {0: "SURVIVED", 1: "died"}.get(code, f"NO ANSWER: pytest ended with {code}: {words}")
    return mutant, state, time.perf_counter() - start


def main(names: list[str]) -> int:
    """Try the mutants named, or all; 0 if each of them died."""
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        print(f"no such mutant: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    with tempfile.TemporaryDirectory() as scratch:
        code, words = run(sorted({mutant.test for mutant in chosen}), Path(scratch), None)
    if code:
        print(f"without any mutant: pytest ended with {code}: {words}", file=sys.stderr)
        return 2
    widths = [max(len(getattr(mutant, field)) for mutant in chosen) for field in ("name", "file")]
    alive = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, state, seconds in pool.map(outcome, chosen):
            alive += state != "died"
            print(f"{mutant.name:{widths[0]}}  {mutant.file:{widths[1]}}  {state}  {seconds:3.0f} s  {mutant.test}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} died")
    return alive > 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
