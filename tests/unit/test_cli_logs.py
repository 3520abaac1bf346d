"""`finetune logs`: which pod is read, over stages, attempts, broken connections, and what is said when none is left."""

from collections.abc import Iterator

import pytest

from finetune_api.report import ExitCode, Stage
from finetune_cli.cluster_job import JobName
from finetune_cli.logs import show_logs
from finetune_cli.refusal import ClusterError
from finetune_trainer.errors import SpecError

from .cluster_api import NAME, NAMESPACE, FakeJobApi, make_object, make_pod, pod_name

JOB = JobName(NAMESPACE, NAME)


def line(second: int, text: str, fraction: str = "") -> str:
    return f"2026-01-02T03:04:{second:02}{fraction}Z {text}"


def make_api(*pods: dict, phase: str = "Training", kind: type[FakeJobApi] = FakeJobApi, **spec: object) -> FakeJobApi:
    api = kind(make_object({"phase": phase}, **spec))
    api.pod_objects = list(pods)
    return api


def follow(api: FakeJobApi, stage: Stage | None = None) -> ExitCode:
    return show_logs(api, JOB, stage, follow=True, pause=lambda seconds: None)


def test_the_newest_attempt_of_the_newest_stage_that_has_begun_is_read(capsys):
    api = make_api(
        make_pod(Stage.TRAIN, 2, "running"),
        make_pod(Stage.CHECK, 1, "terminated"),
        make_pod(Stage.TRAIN, 1, "terminated"),
        make_pod(Stage.EVALUATE, 1, "waiting"),
    )
    api.logs = {pod_name(Stage.TRAIN, 2): [line(1, "step 1"), line(2, "step 2")]}
    assert show_logs(api, JOB, None, follow=False) == ExitCode.OK
    assert capsys.readouterr().out == "step 1\nstep 2\n"


def test_another_stage_can_be_asked_for(capsys):
    api = make_api(make_pod(Stage.CHECK, 1, "terminated"), make_pod(Stage.TRAIN))
    api.logs = {pod_name(Stage.CHECK): [line(1, "checked")]}
    show_logs(api, JOB, Stage.CHECK, follow=False)
    assert capsys.readouterr().out == "checked\n"


def test_a_log_cannot_move_the_cursor(capsys):
    api = make_api(make_pod(Stage.TRAIN))
    api.logs = {pod_name(Stage.TRAIN): [line(1, "a\x1b[2Jb\rc")]}
    show_logs(api, JOB, None, follow=False)
    assert capsys.readouterr().out == "a [2Jb c\n"


def test_following_goes_from_stage_to_stage_until_the_job_has_ended(capsys):
    train, evaluate = pod_name(Stage.TRAIN), pod_name(Stage.EVALUATE)
    api = make_api(make_pod(Stage.CHECK, 1, "terminated"), make_pod(Stage.TRAIN, 1, "terminated"))
    api.logs = {train: [line(1, "trained")], evaluate: [line(3, "evaluated")]}

    def record_attempt() -> Iterator[tuple[str, dict]]:
        yield "MODIFIED", make_object({"phase": "Evaluating"})

    def begin_evaluation() -> Iterator[tuple[str, dict]]:
        api.pod_objects.append(make_pod(Stage.EVALUATE, 1, "waiting", "ContainerCreating"))
        yield "MODIFIED", make_object({"phase": "Evaluating"})

    def end_evaluation() -> None:
        api.pod_objects[-1] = make_pod(Stage.EVALUATE, 1, "terminated")

    def end_job() -> Iterator[tuple[str, dict]]:
        api.job = make_object({"phase": "Succeeded"})
        yield "MODIFIED", api.job

    api.on_watch = [record_attempt, begin_evaluation, end_job]
    api.on_pods_watched = [end_evaluation]
    assert follow(api) == ExitCode.OK
    out, error = capsys.readouterr()
    assert out == "trained\nevaluated\n"
    assert error.splitlines() == [
        f"--- train, attempt 1: pod {train}",
        "--- waiting for a pod",
        f"--- waiting for pod {evaluate} (ContainerCreating)",
        f"--- evaluate, attempt 1: pod {evaluate}",
        "--- waiting for a pod",
    ]


def test_following_one_stage_ends_with_it(capsys):
    api = make_api(make_pod(Stage.CHECK, 1, "terminated"))
    api.logs = {pod_name(Stage.CHECK): [line(1, "checked")]}
    api.job = make_object({"phase": "Training", "stages": [{"stage": "check", "attempt": 1}]})
    assert follow(api, Stage.CHECK) == ExitCode.OK
    assert capsys.readouterr().out == "checked\n"


def test_a_log_whose_connection_broke_goes_on_behind_the_last_line(capsys):
    begun = [line(1, "one", ".1"), line(1, "two", ".12")]

    class Breaking(FakeJobApi):
        def log(self, *arguments, **named):
            self.logs = {
                pod_name(Stage.TRAIN): [*begun, line(1, "three", ".2"), line(2, "four")] if self.since else begun
            }
            yield from super().log(*arguments, **named)
            if len(self.since) == 2:
                self.pod_objects = [make_pod(Stage.TRAIN, 1, "terminated")]

    api = make_api(make_pod(Stage.TRAIN), phase="Succeeded", kind=Breaking)
    assert follow(api) == ExitCode.OK
    assert capsys.readouterr().out == "one\ntwo\nthree\nfour\n"
    assert api.since == [None, "2026-01-02T03:04:01.12Z", "2026-01-02T03:04:02Z"]


def test_following_outlives_a_cluster_that_is_away_for_a_moment(capsys):
    class Away(FakeJobApi):
        def log(self, *arguments, **named):
            yield from super().log(*arguments, **named)
            self.failures = [ClusterError("the cluster does not answer")] * 3

    api = make_api(make_pod(Stage.TRAIN, 1, "terminated"), phase="Succeeded", kind=Away)
    api.logs = {pod_name(Stage.TRAIN): [line(1, "trained")]}
    assert follow(api) == ExitCode.OK
    out, error = capsys.readouterr()
    assert out == "trained\n"
    assert error.count("The connection to the cluster is lost; trying again.") == 3


NO_LOG = {
    "no pod yet": ([], "Checking", None, "no pod of FineTuneJob reviews in namespace team is there yet"),
    "no pod of that stage yet": ([], "Checking", Stage.TRAIN, "no pod of the train stage of FineTuneJob reviews"),
    "a pod that waits": (
        [make_pod(Stage.TRAIN, 1, "waiting", "ImagePullBackOff")],
        "Training",
        None,
        "has not begun: pod reviews-train-a1-x waits (ImagePullBackOff)",
    ),
    "pods that are gone": ([], "Succeeded", None, "they are removed 60 s after the end (spec.runPolicy.childTtl"),
}


@pytest.mark.parametrize("pods, phase, stage, why", NO_LOG.values(), ids=NO_LOG.keys())
def test_without_a_log_the_reason_is_told(pods, phase, stage, why):
    api = make_api(*pods, phase=phase, runPolicy={"childTtlSeconds": 60})
    with pytest.raises(SpecError) as raised:
        show_logs(api, JOB, stage, follow=False)
    assert why in str(raised.value)


def test_pods_of_others_are_not_read():
    stranger = make_pod(Stage.TRAIN)
    stranger["metadata"]["labels"]["finetune.dev/job-uid"] = "another"
    with pytest.raises(SpecError, match="no pod of FineTuneJob reviews"):
        show_logs(make_api(stranger), JOB, None, follow=False)
