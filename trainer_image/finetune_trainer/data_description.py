"""What a job's rows amount to, in rows and tokens, as the report and the status tell it."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from finetune_api.job import FineTuneJob
from finetune_api.report import DataReport, SplitRows
from finetune_trainer.data_profile import describe_task, find_personal_data, find_warnings
from finetune_trainer.dataset import Dataset
from finetune_trainer.example import Encoded
from finetune_trainer.in_context import as_asked
from finetune_trainer.overlap import SEARCHED_ROWS, find_overlaps, find_shared_passages
from finetune_trainer.renderer import Renderer
from finetune_trainer.split import Split
from finetune_trainer.stage_input import rows_by_task


def describe_data(
    job: FineTuneJob,
    dataset: Dataset,
    renderer: Renderer,
    encoded: Mapping[Split, Sequence[Encoded]],
    questions: Mapping[str, Sequence[str]],
) -> DataReport:
    """Describe the rows of all splits; ``questions`` are those of other tests, by test, which rows may give away."""
    totals = _count_tokens(itertools.chain.from_iterable(encoded.values()))
    trained = _count_tokens(encoded[Split.TRAIN])
    first = as_asked(dataset, Split.TRAIN)[0]
    whole = renderer.encode(first, dataset)
    report = DataReport(
        rows=SplitRows(**{split.value: len(items) for split, items in encoded.items()}),
        tokens=trained.tokens,
        completion_tokens=trained.completion_tokens,
        longest_tokens=totals.longest,
        max_length=renderer.max_length,
        truncated_percent=100 * totals.truncated / totals.rows,
        duplicates=dataset.duplicates.rows,
        exact_duplicates=dataset.duplicates.exact,
        leakage=len(dataset.leaks),
        first_leak="" if not dataset.leaks else "row {1} (counted from 0) of {0}".format(*dataset.leaks[0]),
        personal_data=find_personal_data(
            itertools.chain(*(dataset.examples(split) for split in Split), dataset.replay())
        ),
        overlaps=(
            *find_overlaps(itertools.chain(dataset.examples(Split.TRAIN), dataset.replay()), questions),
            *find_shared_passages(
                map(dataset.asked, itertools.chain(dataset.examples(Split.TRAIN), dataset.replay())),
                dict(_asked_of_own_sources(dataset)),
            ),
        ),
        tasks=tuple(
            describe_task(
                task,
                dataset.labels(task),
                {split: dataset.examples(split, task) for split in Split},
                {split: rows_by_task(dataset, split, encoded[split])[task] for split in Split},
                renderer.decode,
                dataset.task(task).templates,
                dataset.unused[task],
            )
            for task in dataset.tasks
        ),
        hash=dataset.hash,
        format=renderer.format,
        sample_prompt=renderer.decode(whole.prompt_ids),
        sample_completion=renderer.decode(whole.completion_ids),
    )
    return report.model_copy(update={"warnings": tuple(find_warnings(report))})


def _asked_of_own_sources(dataset: Dataset) -> Iterator[tuple[str, list[str]]]:
    """Yield by source what some of the rows ask that no draw put into their split."""
    for name in dataset.tasks:
        task = dataset.task(name)
        for setting, uri, split in (
            ("validationSource", task.validation_source, Split.VALIDATION),
            ("testSource", task.test_source, Split.TEST),
        ):
            if uri is not None:
                rows = dataset.examples(split, name)
                step = -(-len(rows) // SEARCHED_ROWS) or 1
                yield f"{name}.{setting}", [dataset.asked(row) for row in rows[::step]]


@dataclass(slots=True)
class _TokenCount:
    rows: int = 0
    tokens: int = 0
    completion_tokens: int = 0
    longest: int = 0
    truncated: int = 0


def _count_tokens(items: Iterable[Encoded]) -> _TokenCount:
    count = _TokenCount()
    for item in items:
        count.rows += 1
        count.tokens += len(item.ids)
        count.completion_tokens += len(item.ids) - item.prompt_length
        count.longest = max(count.longest, len(item.ids))
        count.truncated += item.truncated
    return count
