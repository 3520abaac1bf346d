"""The only module that talks to lm-evaluation-harness: its tasks, asked through our own scoring and generation.

Imported only by the stages that need it: the harness takes seconds to import.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, cast

import datasets
import httpx2
from jinja2 import TemplateError
from lm_eval import evaluator, utils
from lm_eval import tasks as lm_eval_tasks
from lm_eval.api import task as task_module
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.api.registry import AGGREGATION_REGISTRY
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune_api.spec import BenchmarkSpec
from finetune_trainer.benchmark import BINARY, COMBINED, Advance, Answers, Benchmark, BenchmarkRun, Scores
from finetune_trainer.encoder_decoder import decoder_start
from finetune_trainer.errors import DataError, SpecError, StorageError
from finetune_trainer.example import Encoded
from finetune_trainer.generation import generate
from finetune_trainer.sandbox import MeteredSandbox, counted, metered
from finetune_trainer.squad_metrics import stand_in
from finetune_trainer.task_file import TaskFile

SUITES = {
    "glue": ("glue", "glue"),
    "superglue": ("super-glue-lm-eval-v1", "super_glue"),
    "mmlu": ("mmlu", "mmlu"),
    "bigbench-hard": ("bbh", "bbh"),
}
"""What the harness calls the suites that the spec knows by name, and the folder in which it has their tasks."""

# As HFLM's default, which published numbers come from.
_USUAL_ANSWER_TOKENS = 256
_GENERATION_BATCH_SIZE = 16

# What a wrong setting or a wrong row makes the harness raise while it renders them, or judges an answer.
_RENDERING_ERRORS = (
    *(TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, SyntaxError),
    *(TypeError, ValueError, re.error),
)

Tasks = Mapping[str, Task]
"""By name."""


class ContinuationScorer(Protocol):
    """What `finetune_trainer.scoring.Scorer` does."""

    def continuations(
        self, items: Sequence[Encoded], on_progress: Callable[[float], None] = ...
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of every completion, and whether each of its tokens was the likeliest one."""


# The harness's own environment would let a template reach Python through its values, and run without end. How long an
# expression of regex_replace looks, nothing bounds.
_SANDBOX = MeteredSandbox(finalize=counted)
_SANDBOX.filters["regex_replace"] = metered(utils.regex_replace)
# The harness asks for the same few templates again for every row.
_SANDBOX.from_string = lru_cache(maxsize=1024)(_SANDBOX.from_string)  # type: ignore[assignment, method-assign]
utils.env = _SANDBOX

# SuperGLUE imports it.
stand_in()

# Its bars would be drawn over the stage's own progress, and its warnings are about its own command line.
task_module.tqdm = partial(task_module.tqdm, disable=True)
logging.getLogger("lm_eval").setLevel(logging.ERROR)


def load_task(file: TaskFile, limit: int | None) -> Tasks:
    """Return the task of a file, every row of it rendered once, and an answer to it judged.

    Raises:
        DataError: a template or what judges the answers does not go with the rows.
        SpecError: a figure does not go with the answers.
    """
    rows = {split: datasets.Dataset.from_list([dict(row) for row in found]) for split, found in file.rows.items()}
    config = {**file.config, "custom_dataset": lambda **settings: datasets.DatasetDict(rows)}
    with _rendering(file.field):
        tasks = _prepared({file.name: ConfigurableTask(config=config)}, limit)
    _refuse_f1_of_many(tasks, file.field)
    _refuse_answers_not_offered(tasks, file.field)
    with _rendering(file.field, "metric_list, filter_list and doc_to_target"):
        ask(tasks, _Blank(), limit)
    return tasks


def load_suite(suite: str, field: str, limit: int | None) -> Tasks:
    """Return the tasks of one of `SUITES`; their rows come from the hub.

    Raises:
        StorageError: the hub does not answer.
    """
    try:
        tasks = suite_manager(suite).load([SUITES[suite][0]])["tasks"]
    except (OSError, httpx2.HTTPError, datasets.exceptions.DatasetsError, RuntimeError) as error:
        # RuntimeError: a script lies where rows should be; it is not run.
        raise StorageError(
            f"{field}: the rows of {suite} cannot be had from the hub: {error}. Set HF_ENDPOINT to a mirror that has "
            f"them, or name a task file with its rows beside it."
        ) from error
    with _rendering(field):
        return _prepared(tasks, limit)


def suite_manager(suite: str) -> TaskManager:
    """Return what the harness knows of a suite alone: all that it has are 14,000 files, four seconds to read."""
    folder = Path(lm_eval_tasks.__file__).parent / SUITES[suite][1]
    return TaskManager(include_path=str(folder), include_defaults=False)


def ask(tasks: Tasks, model: LM, limit: int | None) -> dict[str, list[Scores]]:
    """Return how ``model`` did, row by row, for every task and figure."""
    for task in tasks.values():
        # Else every model is shown other examples: the harness goes on drawing where it stopped.
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    results = evaluator.evaluate(
        model, {"tasks": dict(tasks), "groups": {}}, limit=limit, bootstrap_iters=0, log_samples=True
    )
    return {name: list(_scores(task, results["samples"][name])) for name, task in tasks.items()}


def longest_answer(tasks: Tasks) -> int:
    """Return how many tokens an answer may have; 0 where none is generated."""
    settings = [
        task.get_config("generation_kwargs") or {}
        for task in tasks.values()
        if task.get_config("output_type") == "generate_until"
    ]
    return max((normalize_gen_kwargs(one, _USUAL_ANSWER_TOKENS)["max_gen_toks"] for one in settings), default=0)


def open_benchmarks(
    specs: Sequence[BenchmarkSpec],
    read: Callable[[str, str], TaskFile],
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    scorer_factory: Callable[[nn.Module], ContinuationScorer],
) -> BenchmarkRun:
    """Return a job's benchmarks, every question rendered once.

    Args:
        specs: ``spec.evaluation.benchmarks``.
        read: returns the task file at a URI, given the setting that names it.
        tokenizer: of both models.
        room: tokens that the models have places for.
        scorer_factory: scores with the model that is asked.

    Raises:
        SpecError: two benchmarks have a task of one name, or answers may be longer than the model has places for.
        DataError: templates do not go with the rows.
        StorageError: the hub does not answer.
    """
    opened: list[Benchmark] = []
    taken: dict[str, str] = {}
    for index, spec in enumerate(specs):
        field = f"spec.evaluation.benchmarks[{index}].suite"
        file = read(spec.suite, field) if "://" in spec.suite else None
        tasks = load_suite(spec.suite, field, spec.limit) if file is None else load_task(file, spec.limit)
        name = spec.suite if file is None else file.name
        for one in {name, *tasks}:
            if one in taken:
                raise SpecError(f"{field}: {one!r} is also a task of {taken[one]}. Give the task another name.")
            taken[one] = field
        if (longest := longest_answer(tasks)) >= room:
            raise SpecError(
                f"{field}: answers may have {longest} tokens (generation_kwargs.max_gen_toks), and the model has "
                f"places for {room:,}. Lower it."
            )

        requests = sum(len(task.instances) for task in tasks.values())

        def ask_all(
            model: nn.Module,
            advance: Advance,
            tasks: Tasks = tasks,
            limit: int | None = spec.limit,
            requests: int = requests,
        ) -> Answers:
            asked = HarnessModel(model, tokenizer, scorer_factory(model), room, lambda done: advance(done / requests))
            return ask(tasks, asked, limit)

        opened.append(
            Benchmark(
                suite=spec.suite,
                name=name,
                sha256=None if file is None else file.sha256,
                figures=figure_names(name, tasks),
                questions=partial(_questions, tasks),
                requests=requests,
                ask=ask_all,
            )
        )
    return BenchmarkRun(opened)


class _Blank(LM):  # type: ignore[misc]
    """Answers every question alike: with it, what judges the answers is tried before there is a model."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(-1.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [-1.0 for _ in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return ["" for _ in requests]


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """One of our models as the harness sees it; tokens are cut and joined as its own ``hf`` model does."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        scorer: ContinuationScorer,
        max_length: int,
        on_progress: Callable[[float], None] = lambda done: None,
    ) -> None:
        """Wrap ``model``; ``on_progress`` is told the requests done.

        Args:
            model: is asked.
            tokenizer: of the model.
            scorer: scores with the model.
            max_length: tokens that it has places for; of an encoder-decoder model, in the question and behind it each.
            on_progress: is told how many requests are done.
        """
        super().__init__()
        self.tokenizer = tokenizer
        self._model, self._scorer, self._max_length = model, scorer, max_length
        self._decoder_start = decoder_start(cast(PreTrainedModel, model).config)
        # The harness then cuts a question and what follows it each for itself.
        self.backend = "causal" if self._decoder_start is None else "seq2seq"
        self._on_progress = on_progress
        self._done = 0

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without a beginning begins with."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of ``string``, none of the special ones twice."""
        begins = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        if add_special_tokens is None and begins:
            add_special_tokens = False
        settings = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return [int(token) for token in self.tokenizer.encode(string, verbose=False, **settings)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return the log-probability of every continuation, and whether it is what the model would have written."""
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-probability of every text, cut into windows of what the model has places for."""
        windows = [self._windows(request.args[0]) for request in requests]
        scores = iter(
            self._scorer.continuations([window for found in windows for window in found], self._part(len(requests)))
        )
        return [sum(next(scores)[0] for _ in found) for found in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return greedy answers, each cut before the first of its stop strings."""
        answers: list[str] = [""] * len(requests)
        by_length: dict[int, list[int]] = defaultdict(list)
        settings = [normalize_gen_kwargs(request.args[1], _USUAL_ANSWER_TOKENS) for request in requests]
        for number, one in enumerate(settings):
            by_length[one["max_gen_toks"]].append(number)
        for length, numbers in by_length.items():
            room = self._max_length - (length if self._decoder_start is None else 0)
            advance = self._part(len(numbers))
            prompts = [tuple(self.tok_encode(requests[number].args[0])[-room:]) for number in numbers]
            texts = generate(
                self._model,
                self.tokenizer,
                prompts,
                length,
                [self.eot_token_id],
                _GENERATION_BATCH_SIZE,
                lambda done, total, advance=advance: advance(done / total),  # type: ignore[misc]
            )
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = postprocess_generated_text(text, settings[number].get("until"), None)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        items = [self._item(before, after) for _, before, after in requests]
        return self._scorer.continuations(items, self._part(len(items)))

    def _part(self, count: int) -> Advance:
        """Return what is told the finished share of the next ``count`` requests."""
        before = self._done
        self._done += count
        return lambda share: self._on_progress(before + share * count)

    def _item(self, before: Sequence[int], after: Sequence[int]) -> Encoded:
        if self._decoder_start is not None:
            question, continuation = before[-self._max_length :], after[-self._max_length :]
            return Encoded((*question, *continuation), len(question), decoder_start=self._decoder_start)
        # What does not fit goes from the beginning; the last token is predicted and takes no place.
        ids = (*before, *after)[-(self._max_length + 1) :]
        return Encoded(ids, max(len(ids) - len(after), 0))

    def _windows(self, text: str) -> list[Encoded]:
        windows = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._max_length,
            context_len=1,
        )
        return [self._item(*utils.make_disjoint_window(window)) for window in windows]


def _questions(tasks: Tasks) -> list[str]:
    return [str(task.doc_to_text(doc)) for task in tasks.values() for doc in task.eval_docs]


def figure_names(name: str, tasks: Tasks) -> tuple[str, ...]:
    """Return ``<suite or task>.<figure>`` for what gates can be about: what has an interval."""
    found = {owner: [metric for metric, _ in _with_interval(task)] for owner, task in tasks.items()}
    if len(tasks) > 1:
        means = (
            metric for task in tasks.values() for metric, aggregation in _with_interval(task) if aggregation == "mean"
        )
        found = {name: list(dict.fromkeys(means))} | found
    return tuple(f"{owner}.{metric}" for owner, metrics in found.items() for metric in metrics)


def _with_interval(task: Task) -> Iterator[tuple[str, str]]:
    """Yield the figures of ``task`` whose rows can be drawn again, and how these are combined."""
    for metric, combine in task.aggregation().items():
        aggregation = _aggregation_name(combine)
        if aggregation in COMBINED and not (aggregation in BINARY and _labels(task) > 2):
            yield metric, aggregation


def _aggregation_name(combine: Callable[..., Any]) -> str:
    """Return what the harness calls ``combine``; empty where it is a task's own."""
    return next((name for name, known in AGGREGATION_REGISTRY.items() if known is combine), "")


def _labels(task: Task) -> int:
    """Return among how many answers the first question of ``task`` lets choose; 0 where none is chosen."""
    chooses = task.get_config("output_type") == "multiple_choice"
    return len(task.doc_to_choice(next(iter(task.eval_docs)))) if chooses else 0


def _prepared(tasks: Mapping[str, Task], limit: int | None) -> Tasks:
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=limit)
        # Metrics read the expected answers, too.
        for doc in task.eval_docs:
            task.doc_to_target(doc)
    return dict(tasks)


def _refuse_f1_of_many(tasks: Tasks, field: str) -> None:
    for name, task in tasks.items():
        if (labels := _labels(task)) > 2 and "f1" in map(_aggregation_name, task.aggregation().values()):
            raise SpecError(
                f"{field}: {name} lets choose among {labels} answers, and the harness's f1 is of two. Write acc in "
                f"metric_list."
            )


def _refuse_answers_not_offered(tasks: Tasks, field: str) -> None:
    """The harness counts such rows as wrong, whatever is answered."""
    for name, task in tasks.items():
        if task.get_config("output_type") != "multiple_choice":
            continue
        for number, doc in enumerate(task.eval_docs, start=1):
            choices = task.doc_to_choice(doc)
            expected = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            for one in expected if isinstance(expected, list) else [expected]:
                if one not in choices and one not in range(len(choices)):
                    raise DataError(
                        f"{field}: row {number} of {name} expects {one!r}, and its choices are {choices}. Correct "
                        f"doc_to_target and doc_to_choice, or the row."
                    )


@contextmanager
def _rendering(field: str, keys: str = "doc_to_text, doc_to_target and doc_to_choice") -> Iterator[None]:
    try:
        yield
    except _RENDERING_ERRORS as error:
        raise DataError(
            f"{field}: {keys} of the task do not go with its rows ({type(error).__name__}: {error}). Correct them, or "
            f"the rows."
        ) from error


def _scores(task: Task, samples: Sequence[Mapping[str, Any]]) -> Iterator[Scores]:
    """Yield every figure of a task; of several filters the first gives the plain names."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    for place, one in enumerate(filters):
        chosen = [sample for sample in samples if sample["filter"] == one]
        for metric in chosen[0]["metrics"]:
            combine = task.aggregation().get(metric)
            if combine is None:
                raise SpecError(f"{task.config.task}: the harness does not say how {metric} is combined.")
            values = [sample[metric] for sample in chosen]
            yield Scores(
                figure=metric if place == 0 else f"{metric}_{one.replace('-', '_')}",
                values=values,
                value=float(combine(values)),
                aggregation=_aggregation_name(combine),
                higher_is_better=bool(task.higher_is_better().get(metric, True)),
            )
