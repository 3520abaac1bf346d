"""``python -m finetune_trainer {check,train,evaluate} --spec FILE --workspace DIR``: one stage, for a pod or a shell.

Progress goes to standard output, one JSON object a line; the exit code says how the stage ended (see ExitCode). With
``--attempt`` the stage shares the run's state with the other stages' pods through the output store.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from pydantic import ValidationError

from finetune_api.job import FineTuneJob, InvalidJobError, load_job, spec_hash
from finetune_api.progress_message import MOST_BYTES
from finetune_api.report import CONTRACT_VARIABLE, CONTRACT_VERSION, IMAGE_VARIABLE, ExitCode, Progress, Stage
from finetune_api.resolve import resolve
from finetune_api.stage_result import StageResult, bounded
from finetune_trainer.adjustment import Adjustment
from finetune_trainer.errors import FineTuneError, SpecError
from finetune_trainer.garbage import exit_at_once, kept_for_good
from finetune_trainer.interrupt import stopped_at_once
from finetune_trainer.progress import Sink
from finetune_trainer.progress_client import open_client
from finetune_trainer.stage_summary import failure
from finetune_trainer.trust import add_private_authorities

logger = logging.getLogger("finetune_trainer")

_PATIENCE_SECONDS = 120.0
"""For the operator to take the result; the termination message says the same to one that has been away for longer."""
_LAST_CHANCE_SECONDS = 600.0
"""Where nothing else says all of it, as behind KubeRay, or of more than a termination message holds."""
_STOPPED_SECONDS = 10.0
"""Who is being stopped has little time before it is killed, which would cost its exit code."""


class _JsonLines:
    """Writes every report as one line of JSON."""

    def report(self, progress: Progress) -> None:
        sys.stdout.write(progress.model_dump_json(by_alias=True, exclude_none=True) + "\n")
        sys.stdout.flush()


class _Both:
    """Tells two sinks."""

    def __init__(self, first: Sink, second: Sink) -> None:
        self._first = first
        self._second = second

    def report(self, progress: Progress) -> None:
        self._first.report(progress)
        self._second.report(progress)


def main(arguments: list[str] | None = None) -> ExitCode:
    """Run one stage, tell how it ended and return its exit code."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    client = open_client()
    result = _run(options, _JsonLines() if client is None else _Both(_JsonLines(), client))
    if result.message:
        logger.error("%s", result.message)
    # First, for it needs nobody to listen.
    is_all_said = _leave_last_words(result, options.termination_log)
    if client is not None:
        client.deliver(result, _patience(result.exit_code, is_all_said))
        client.close()
    return result.exit_code


def _run(options: argparse.Namespace, sink: Sink) -> StageResult:
    stage = Stage(options.stage)
    if _asked_version() != str(CONTRACT_VERSION):
        return failure(
            stage,
            ExitCode.BAD_SPEC,
            f"the operator speaks contract version {_asked_version()} and this trainer {CONTRACT_VERSION}. "
            "Use images of one release: leave spec.compute.image out, or upgrade the operator.",
        )
    try:
        with stopped_at_once(f"stopped before the {stage.value} stage began, which starts again on the next run."):
            job = resolve(load_job(_read(options.spec), str(options.spec)))
            _refuse_other_spec(job, options.spec_hash)
            add_private_authorities()
            # Imported here: a bad spec is answered before torch is loaded.
            with kept_for_good():
                from finetune_trainer import stages

            pod = None
            if options.attempt is not None:
                pod = stages.PodOptions(_adjustment(options), os.environ.get(IMAGE_VARIABLE))
            return stages.run_one(stage, job, options.workspace, sink, pod)
    except InvalidJobError as error:
        return failure(stage, ExitCode.BAD_SPEC, str(error))
    except FineTuneError as error:
        return failure(stage, error.exit_code, str(error))
    except Exception as error:
        logger.exception("internal error; please report it with this trace")
        return failure(stage, ExitCode.INTERNAL, f"internal error: {type(error).__name__}: {error}")


def _asked_version() -> str:
    """Return the contract version of the operator; our own where there is none."""
    return os.environ.get(CONTRACT_VARIABLE, str(CONTRACT_VERSION))


def _refuse_other_spec(job: FineTuneJob, expected: str | None) -> None:
    actual = spec_hash(job.spec)
    if expected is not None and actual != expected:
        raise SpecError(
            f"the spec has the hash {actual[:12]}, not {expected[:12]} as --spec-hash says: operator and trainer are "
            "of different versions. Install the same version of both."
        )


def _adjustment(options: argparse.Namespace) -> Adjustment:
    fields = {name: getattr(options, name) for name in Adjustment.model_fields}
    try:
        return Adjustment.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise SpecError(f"{option} {first['input']}: {first['msg']}. Correct it, or leave it out.") from error


def _leave_last_words(result: StageResult, path: Path | None) -> bool:
    """Write the termination message; return whether it says all that is posted."""
    if path is None:
        return False
    last_words = bounded(result)
    try:
        path.write_bytes(last_words)
    except OSError as error:
        # The exit code tells the most important part; it must not be replaced by this.
        logger.warning("termination message not written path=%s reason=%s", path, error.strerror)
        return False
    return last_words == bounded(result, MOST_BYTES)


def _patience(code: ExitCode, is_all_said: bool) -> float:
    if code is ExitCode.PREEMPTED:
        return _STOPPED_SECONDS
    return _PATIENCE_SECONDS if is_all_said else _LAST_CHANCE_SECONDS


def _read(spec: Path) -> str:
    try:
        return spec.read_text()
    except OSError as error:
        raise SpecError(f"cannot read {spec}: {error.strerror}; give the FineTuneJob's file with --spec.") from error


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="finetune_trainer", description=__doc__)
    parser.add_argument("stage", choices=[Stage.CHECK.value, Stage.TRAIN.value, Stage.EVALUATE.value])
    parser.add_argument("--spec", type=Path, required=True, help="the FineTuneJob, JSON or YAML")
    parser.add_argument("--spec-hash", help="refuse a spec that has another hash when resolved")
    parser.add_argument("--workspace", type=Path, required=True, help="folder kept between stages and attempts")
    parser.add_argument(
        "--attempt", type=int, help="which try this is; given, stages share their state through the output store"
    )
    parser.add_argument("--micro-batch-size", type=int, help="instead of spec.training.microBatchSize")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="compute activations twice")
    parser.add_argument("--zero-stage", type=int, help="instead of spec.compute.deepspeed.stage, 0 to 3")
    parser.add_argument(
        "--learning-rate-scale",
        type=float,
        default=1.0,
        help="factor of spec.training.learningRate, above 0, at most 1; a smaller one than before also goes back by "
        "one checkpoint",
    )
    parser.add_argument("--termination-log", type=Path, help="file for the result, at most 4096 bytes of JSON")
    options, unknown = parser.parse_known_args(arguments)
    if unknown and _asked_version() == str(CONTRACT_VERSION):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


if __name__ == "__main__":
    exit_at_once(main())
