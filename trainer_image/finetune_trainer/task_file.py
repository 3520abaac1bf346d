"""Read a benchmark's task file: lm-evaluation-harness's format without the parts that are code.

The harness runs what a file names with ``!function``, scripts of a data set and metrics that it fetches. Here a file
may hold only what `_KEYS` lists; its templates are rendered in a sandbox (see `finetune_trainer.harness`).
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from finetune_api.spec.field import TASK_NAME
from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.source import Row, read_rows

_KEYS = frozenset(
    {
        *("task", "dataset_path", "dataset_kwargs", "output_type", "metric_list", "filter_list", "generation_kwargs"),
        *("training_split", "validation_split", "test_split", "fewshot_split", "fewshot_config", "num_fewshot"),
        *("doc_to_text", "doc_to_target", "doc_to_choice", "description", "gen_prefix"),
        *("target_delimiter", "fewshot_delimiter", "metadata"),
    }
)
_FORMATS = ("json", "csv", "parquet")
_METRICS = frozenset(
    {
        *("acc", "acc_norm", "acc_bytes", "exact_match", "f1", "mcc"),
        *("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"),
    }
)
_METRIC_KEYS = frozenset(
    {
        *("metric", "aggregation", "higher_is_better"),
        *("ignore_case", "ignore_punctuation", "ignore_numbers", "regexes_to_ignore"),
    }
)
_AGGREGATIONS = frozenset({"mean", "f1", "matthews_corrcoef", "perplexity", "weighted_perplexity", "bits_per_byte"})
_FILTERS = frozenset(
    {
        *("regex", "regex_pos", "multi_choice_regex", "remove_whitespace", "lowercase", "uppercase", "map"),
        *("take_first", "take_first_k", "majority_vote"),
    }
)
_SAMPLERS = frozenset({"default", "first_n"})
_GREEDY: Mapping[str, object] = {"do_sample": False, "temperature": 0}
"""Settings of generation that may be written but not changed: answers must be the same every time."""


@dataclass(frozen=True, slots=True)
class TaskFile:
    """One task, ready for the harness."""

    name: str
    config: dict[str, Any]
    """As written, without where the rows come from."""
    rows: dict[str, list[Row]]
    """By split."""
    sha256: str
    """Of the file and its rows."""
    field: str
    """The setting that names it, for messages."""


def read_task_file(uri: str, content: bytes, field: str, fetch: Callable[[str, str], Path]) -> TaskFile:
    """Return the task that ``content``, the file at ``uri``, declares.

    Args:
        uri: where it lies; its rows lie beside it.
        content: YAML.
        field: the setting that names it.
        fetch: returns the local file of a URI, given the setting that names it.

    Raises:
        DataError: it is no task, or its rows cannot be read.
        SpecError: it names code, or what is not known here.
    """
    config = _parse(content, field)
    _refuse_unknown(config, _KEYS, field, "")
    name = config.get("task")
    if not isinstance(name, str) or not re.fullmatch(TASK_NAME, name):
        raise DataError(f"{field}: task is {name!r}; give the task a name of letters, digits, '-' and '_'.")
    _check_metrics(config, field)
    _check_filters(config, field)
    _check_generation(config, field)
    shots = _mapping(config.get("fewshot_config"), "fewshot_config", field)
    _refuse_unknown(shots, {"sampler", "split"}, field, "fewshot_config.")
    _refuse_other("fewshot_config.sampler", shots.get("sampler", "default"), _SAMPLERS, field)
    rows = {
        split: [row for one in names for row in read_rows(fetch(_beside(uri, one, field), field), field)]
        for split, names in _row_files(config, field).items()
    }
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if (split := config.get(key)) is not None and split not in rows:
            raise DataError(f"{field}: {key} is {split!r}, and dataset_kwargs.data_files has {', '.join(rows)}.")
    if not {"validation_split", "test_split"} & {key for key, value in config.items() if value is not None}:
        raise DataError(f"{field}: neither test_split nor validation_split says which rows are asked.")
    digest = hashlib.sha256(content + json.dumps(rows, sort_keys=True, default=str).encode())
    asked = {key: value for key, value in config.items() if key not in ("dataset_path", "dataset_kwargs", "metadata")}
    return TaskFile(name, asked, rows, digest.hexdigest(), field)


def _parse(content: bytes, field: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(content)
    except yaml.constructor.ConstructorError as error:
        raise SpecError(
            f"{field}: {error.problem}, line {error.problem_mark.line + 1 if error.problem_mark else '?'}. A task file "
            f"names no code here: write templates instead of !function, and prepare the rows beforehand."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{field}: the task file is no YAML: {error}. Correct it.") from error
    if not isinstance(config, dict):
        raise DataError(
            f"{field}: the task file holds no settings. Write task:, dataset_path:, doc_to_text: and so on."
        )
    return config


def _row_files(config: Mapping[str, Any], field: str) -> dict[str, list[str]]:
    """Return the names of the files of each split."""
    path = config.get("dataset_path")
    if path not in _FORMATS:
        raise SpecError(
            f"{field}: dataset_path is {path!r}: a task file's rows lie beside it. Write {' or '.join(_FORMATS)} and "
            f"the files' names in dataset_kwargs.data_files."
        )
    settings = _mapping(config.get("dataset_kwargs"), "dataset_kwargs", field)
    _refuse_unknown(settings, {"data_files"}, field, "dataset_kwargs.")
    files = settings.get("data_files")
    # As in datasets: without names of splits everything is training rows.
    by_split = files if isinstance(files, dict) else {"train": files}
    return {str(split): _file_names(names, str(split), field) for split, names in by_split.items()}


def _file_names(names: object, split: str, field: str) -> list[str]:
    found = [names] if isinstance(names, str) else names
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise DataError(f"{field}: dataset_kwargs.data_files names no file for {split}: {names!r}.")
    return found


def _beside(uri: str, name: str, field: str) -> str:
    path = PurePosixPath(name)
    if "://" in name or path.is_absolute() or ".." in path.parts:
        raise SpecError(
            f"{field}: dataset_kwargs.data_files: {name!r} does not lie beside the task file. Put it there, and write "
            f"its name alone."
        )
    return f"{uri.rpartition('/')[0]}/{name}"


def _check_metrics(config: Mapping[str, Any], field: str) -> None:
    for one in _mappings(config.get("metric_list"), "metric_list", field):
        _refuse_unknown(one, _METRIC_KEYS, field, "metric_list[].")
        _refuse_other("metric_list[].metric", one.get("metric"), _METRICS, field)
        _refuse_other("metric_list[].aggregation", one.get("aggregation", "mean"), _AGGREGATIONS, field)


def _check_filters(config: Mapping[str, Any], field: str) -> None:
    for one in _mappings(config.get("filter_list"), "filter_list", field):
        for step in _mappings(one.get("filter"), "filter_list[].filter", field):
            _refuse_other("filter_list[].filter[].function", step.get("function"), _FILTERS, field)


def _check_generation(config: Mapping[str, Any], field: str) -> None:
    settings = _mapping(config.get("generation_kwargs"), "generation_kwargs", field)
    _refuse_unknown(settings, {"until", "max_gen_toks", *_GREEDY}, field, "generation_kwargs.")
    for key, value in _GREEDY.items():
        if settings.get(key, value) != value:
            raise SpecError(
                f"{field}: generation_kwargs.{key} is {settings[key]!r}; answers are generated greedily here, so that "
                f"runs can be compared. Leave it out."
            )


def _refuse_unknown(settings: Collection[Any], known: Collection[str], field: str, where: str) -> None:
    for key in settings:
        if key not in known:
            raise SpecError(
                f"{field}: {where}{key} is not read here, as it may name code or data elsewhere. Leave it out; "
                f"{'known are' if where else 'a task file may have'} {', '.join(sorted(known))}."
            )


def _refuse_other(name: str, value: object, known: Collection[str], field: str) -> None:
    if value not in known:
        raise SpecError(f"{field}: {name} is {value!r}. Use {' or '.join(sorted(known))}.")


def _mapping(value: object, name: str, field: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DataError(f"{field}: {name} is {value!r}, not settings with names.")
    return value


def _mappings(value: object, name: str, field: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{field}: {name} is {value!r}, not a list.")
    return [_mapping(one, f"{name}[]", field) for one in value]
