"""``python -m finetune_trainer {check,train,evaluate} --spec FILE --workspace DIR``: one stage, for a pod or a shell.

Progress goes to standard output, one JSON object a line; the exit code says how the stage ended (see ExitCode).
"""

import argparse
import logging
import sys
from pathlib import Path

from finetune_api.job import InvalidJobError, load_job
from finetune_api.report import ExitCode, Progress, Stage
from finetune_api.resolve import resolve
from finetune_trainer.errors import FineTuneError, SpecError

logger = logging.getLogger("finetune_trainer")


class _JsonLines:
    """Writes every report as one line of JSON."""

    def report(self, progress: Progress) -> None:
        sys.stdout.write(progress.model_dump_json(by_alias=True, exclude_none=True) + "\n")
        sys.stdout.flush()


def main(arguments: list[str] | None = None) -> ExitCode:
    """Run one stage and return its exit code."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    try:
        job = resolve(load_job(_read(options.spec), str(options.spec)))
        # Imported here: a bad spec is answered before torch is loaded.
        from finetune_trainer import stages

        stages.run_one(Stage(options.stage), job, options.workspace, _JsonLines())
    except InvalidJobError as error:
        logger.error("%s", error)
        return ExitCode.BAD_SPEC
    except FineTuneError as error:
        logger.error("%s", error)
        return error.exit_code
    except Exception:
        logger.exception("internal error; please report it with this trace")
        return ExitCode.INTERNAL
    return ExitCode.OK


def _read(spec: Path) -> str:
    try:
        return spec.read_text()
    except OSError as error:
        raise SpecError(f"cannot read {spec}: {error.strerror}; give the FineTuneJob's file with --spec.") from error


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="finetune_trainer", description=__doc__)
    parser.add_argument("stage", choices=[Stage.CHECK.value, Stage.TRAIN.value, Stage.EVALUATE.value])
    parser.add_argument("--spec", type=Path, required=True, help="the FineTuneJob, JSON or YAML")
    parser.add_argument("--workspace", type=Path, required=True, help="folder kept between stages and attempts")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
