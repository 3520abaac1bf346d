"""Rows and models of every scheme, with the Secret that is meant."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.spec import ModelSpec, OutputSpec, SecretRef
from finetune_trainer.errors import DataError, SpecError, StorageError
from finetune_trainer.location import Mounts
from finetune_trainer.model import fetch_model
from finetune_trainer.source import read_rows
from finetune_trainer.storage import Storage
from finetune_trainer.task_file import read_task_file

from .hub_server import FakeHub, serve_hub
from .s3_server import S3Server

FIELD = "spec.data.tasks[0].source"


@pytest.fixture
def mounts(tmp_path: Path) -> Mounts:
    for folder in ("secrets", "volumes/claim", "config/data"):
        (tmp_path / folder).mkdir(parents=True)
    return Mounts(tmp_path / "secrets", tmp_path / "volumes", tmp_path / "config")


@pytest.fixture
def uri(server: S3Server) -> str:
    bucket = server.make_bucket()
    server.client().put_object(Bucket=bucket, Key="rows/reviews.jsonl", Body=b"{}")
    return f"s3://{bucket}/rows/reviews.jsonl"


def storage_of(server: S3Server, mounts: Mounts, bucket: str = "s3://results/x") -> Storage:
    server.write_secret(mounts.secrets / "output")
    return Storage(OutputSpec(uri=bucket, endpoint=server.url, secret_ref=SecretRef(name="output")), mounts)


def test_source_without_a_secret_is_read_with_the_outputs(
    server: S3Server, mounts: Mounts, uri: str, tmp_path: Path
) -> None:
    file = storage_of(server, mounts).fetch_rows(uri, FIELD, None, tmp_path / "rows")
    assert file == tmp_path / "rows" / "reviews.jsonl"
    assert file.read_bytes() == b"{}"


def test_source_with_its_own_secret_uses_that_and_its_endpoint(
    server: S3Server, mounts: Mounts, uri: str, tmp_path: Path
) -> None:
    elsewhere = Storage(OutputSpec(uri="pvc://claim/x"), mounts)
    server.write_secret(mounts.secrets / "rows", AWS_ENDPOINT_URL=server.url)
    assert elsewhere.fetch_rows(uri, FIELD, SecretRef(name="rows"), tmp_path / "rows").is_file()
    server.write_secret(mounts.secrets / "rows", AWS_ENDPOINT_URL=server.url, AWS_SECRET_ACCESS_KEY="wrong")
    with pytest.raises(
        StorageError, match=r"tasks\[0\]\.source: .*Secret 'rows' \(spec\.data\.tasks\[0\]\.secretRef\)"
    ):
        elsewhere.fetch_rows(uri, FIELD, SecretRef(name="rows"), tmp_path / "rows")


def test_secret_is_not_used_where_none_is_mounted(server: S3Server, uri: str, tmp_path: Path, monkeypatch) -> None:
    for name, value in server.keys.items():
        monkeypatch.setenv(name, value)
    laptop = Storage(
        OutputSpec(uri="s3://results", endpoint=server.url, secret_ref=SecretRef(name="output")),
        Mounts(tmp_path / "none"),
    )
    assert laptop.fetch_rows(uri, FIELD, SecretRef(name="rows"), tmp_path / "rows").is_file()


def test_rows_that_are_not_in_the_bucket_are_a_data_error(
    server: S3Server, mounts: Mounts, uri: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"there is no s3://.*rows/gone\.jsonl"):
        storage_of(server, mounts).fetch_rows(uri.replace("reviews", "gone"), FIELD, None, tmp_path / "rows")


def test_rows_of_volumes_and_config_maps_are_read_in_place(mounts: Mounts, tmp_path: Path) -> None:
    storage = Storage(OutputSpec(uri="pvc://claim/x"), mounts)
    (mounts.volumes / "claim" / "rows.csv").touch()
    (mounts.config / "data" / "rows.csv").touch()
    volume = storage.fetch_rows("pvc://claim/rows.csv", FIELD, None, tmp_path / "rows")
    config_map = storage.fetch_rows("configMap://data/rows.csv", FIELD, None, tmp_path / "rows")
    assert (volume, config_map) == (mounts.volumes / "claim" / "rows.csv", mounts.config / "data" / "rows.csv")


def test_scheme_that_is_not_read_names_those_that_are(mounts: Mounts, tmp_path: Path) -> None:
    storage = Storage(OutputSpec(uri="pvc://claim/x"), mounts)
    with pytest.raises(SpecError, match=r"tasks\[0\]\.source: 'ftp://a/b' has .*Use file:// or hf:// or s3://"):
        storage.fetch_rows("ftp://a/b", FIELD, None, tmp_path / "rows")


def names_of(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_folder_and_pattern_of_a_bucket_are_copied(server: S3Server, mounts: Mounts, tmp_path: Path) -> None:
    bucket = server.make_bucket()
    for key in ("rows/train-1.jsonl", "rows/train-2.jsonl.gz", "rows/notes.md", "rows/deep/train-3.csv", "x/test.csv"):
        server.client().put_object(Bucket=bucket, Key=key, Body=b"{}")
    storage = storage_of(server, mounts)
    folder = storage.fetch_rows(f"s3://{bucket}/rows", FIELD, None, tmp_path / "rows")
    assert names_of(folder) == ["deep/train-3.csv", "train-1.jsonl", "train-2.jsonl.gz"]
    pattern = storage.fetch_rows(f"s3://{bucket}/rows/train-*.jsonl*", FIELD, None, tmp_path / "rows")
    assert names_of(pattern) == ["train-1.jsonl", "train-2.jsonl.gz"]
    with pytest.raises(DataError, match=r"there is no s3://.*/rows/valid\*\. Correct the path"):
        storage.fetch_rows(f"s3://{bucket}/rows/valid*", FIELD, None, tmp_path / "rows")
    with pytest.raises(DataError, match=r"files of different splits \(test, train\)"):
        storage.fetch_rows(f"s3://{bucket}/*", FIELD, None, tmp_path / "rows")


# --- data sets of the hub


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    folder = tmp_path / "data-set"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("A data set.")
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (folder / "data" / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    return folder


@pytest.fixture
def hub(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_hub("acme/reviews", data_set, "dataset") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture
def laptop(tmp_path: Path) -> Storage:
    return Storage(OutputSpec(uri="file:///models"), Mounts(tmp_path / "none"))


def texts(path: Path) -> list[object]:
    return [row["text"] for row in read_rows(path, FIELD)]


def test_rows_of_a_hub_data_set_are_read_by_pattern(hub: FakeHub, laptop: Storage, tmp_path: Path) -> None:
    train, test = (
        laptop.fetch_rows(f"hf://datasets/acme/reviews/data/{split}*", FIELD, None, tmp_path / "rows")
        for split in ("train", "test")
    )
    assert texts(train) == ["train-00000-of-00002", "train-00001-of-00002"]
    assert texts(test) == ["test-00000-of-00001"]
    before = len(hub.downloads())
    again = laptop.fetch_rows("hf://datasets/acme/reviews/data/train*", FIELD, None, tmp_path / "rows")
    assert texts(again) == texts(train)
    assert len(hub.downloads()) == before


def test_a_hub_data_set_is_read_at_the_revision_that_is_named(hub: FakeHub, laptop: Storage, tmp_path: Path) -> None:
    uri = "hf://datasets/acme/reviews/data/train*"
    hub.branches = ("v1",)
    assert len(texts(laptop.fetch_rows(uri, FIELD, None, tmp_path / "tag", "v1"))) == 2
    assert len(texts(laptop.fetch_rows(uri, FIELD, None, tmp_path / "commit", hub.commit))) == 2
    with pytest.raises(
        SpecError, match=r"at revision 'main': .*no such branch.*Correct spec\.data\.tasks\[0\]\.revision"
    ):
        laptop.fetch_rows(uri, FIELD, None, tmp_path / "rows")
    general = "spec.evaluation.forgetting.sources[0]"
    with pytest.raises(SpecError, match=r"forgetting\.sources\[0\]: .*has no such branch\.$"):
        laptop.fetch_rows(uri, general, None, tmp_path / "rows")


def test_a_hub_data_set_of_several_splits_is_not_guessed_at(hub: FakeHub, laptop: Storage, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"different splits \(test, train\): data/test-.*Name those that are meant"):
        laptop.fetch_rows("hf://datasets/acme/reviews", FIELD, None, tmp_path / "rows")
    assert "test-00000-of-00001.jsonl" not in hub.downloads()


def test_a_hub_data_set_with_a_single_split_needs_no_path(
    hub: FakeHub, laptop: Storage, data_set: Path, tmp_path: Path
) -> None:
    (data_set / "README.md").unlink()
    (data_set / "data" / "test-00000-of-00001.jsonl").unlink()
    (data_set / "load.py").write_text("raise SystemExit('code of a data set was run')")
    path = laptop.fetch_rows("hf://datasets/acme/reviews", FIELD, None, tmp_path / "rows")
    assert len(texts(path)) == 2
    assert "load.py" not in hub.downloads()


def test_the_token_of_a_private_data_set_comes_from_the_tasks_secret(
    hub: FakeHub, mounts: Mounts, tmp_path: Path
) -> None:
    hub.needed_token = "hf_secret"
    storage = Storage(OutputSpec(uri="file:///models"), mounts)
    uri = "hf://datasets/acme/reviews/data/train*"
    with pytest.raises(SpecError, match=r"no such data set, or it is private\. Check spec\.data\.tasks\[0\]\.source;"):
        storage.fetch_rows(uri, FIELD, None, tmp_path / "rows")
    (mounts.secrets / "hub").mkdir()
    (mounts.secrets / "hub" / "token").write_text("hf_secret")
    assert len(texts(storage.fetch_rows(uri, FIELD, SecretRef(name="hub"), tmp_path / "rows"))) == 2


@pytest.mark.parametrize(
    "uri, message",
    [
        ("hf://acme/reviews", r"is no data set of the hub\. Write hf://datasets/organisation/name"),
        ("hf://datasets/acme", r"is no data set of the hub"),
        ("hf://datasets/acme/gone", r"knows no such data set"),
        ("hf://datasets/acme/reviews/data/valid*", r"holds no file of rows .* but nothing"),
        ("hf://datasets/acme/-x-", r"is no name of a hub data set\. Write hf://datasets/"),
    ],
)
def test_what_is_no_data_set_is_told_with_what_to_write(
    hub: FakeHub, laptop: Storage, tmp_path: Path, uri: str, message: str
) -> None:
    with pytest.raises((SpecError, DataError), match=message):
        laptop.fetch_rows(uri, FIELD, None, tmp_path / "rows")


def test_model_in_a_bucket_is_that_of_a_folder(
    server: S3Server, mounts: Mounts, tiny_model_dir: Path, tmp_path: Path
) -> None:
    bucket = server.make_bucket()
    for path in tiny_model_dir.iterdir():
        server.client().upload_file(str(path), bucket, f"models/tiny/{path.name}")
    model = ModelSpec(source=f"s3://{bucket}/models/tiny")
    files = fetch_model(model, tmp_path / "cache", storage=storage_of(server, mounts))
    assert files.path.is_relative_to(tmp_path / "cache")
    assert files.revision == fetch_model(ModelSpec(source=tiny_model_dir.as_uri()), tmp_path / "cache").revision


def test_pickled_model_in_a_bucket_is_refused_before_it_is_copied(
    server: S3Server, mounts: Mounts, tmp_path: Path
) -> None:
    bucket = server.make_bucket()
    for name in ("config.json", "pytorch_model.bin"):
        server.client().put_object(Bucket=bucket, Key=f"m/{name}", Body=b"{}")
    with pytest.raises(SpecError, match=r"pytorch_model\.bin"):
        fetch_model(ModelSpec(source=f"s3://{bucket}/m"), tmp_path / "cache", storage=storage_of(server, mounts))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("key", ["HF_TOKEN", "token"])
def test_hub_token_comes_from_the_models_secret(mounts: Mounts, key: str) -> None:
    storage = Storage(OutputSpec(uri="pvc://claim/x"), mounts)
    (mounts.secrets / "hub").mkdir()
    (mounts.secrets / "hub" / key).write_text("hf_secret\n")
    assert storage.hub_token(SecretRef(name="hub"), {"HF_TOKEN": "of the environment"}) == "hf_secret"
    assert storage.hub_token(None, {"HF_TOKEN": "of the environment"}) == "of the environment"


SUITE = "spec.evaluation.benchmarks[0].suite"


def test_a_benchmarks_task_file_is_read_from_a_bucket_with_its_rows(
    server: S3Server, mounts: Mounts, tmp_path: Path
) -> None:
    bucket = server.make_bucket()
    task = b"{task: pick, dataset_path: json, dataset_kwargs: {data_files: rows.jsonl}, test_split: train}"
    for key, content in (("tasks/pick.yaml", task), ("tasks/rows.jsonl", b'{"text": "x"}')):
        server.client().put_object(Bucket=bucket, Key=key, Body=content)
    storage = storage_of(server, mounts)
    uri = f"s3://{bucket}/tasks/pick.yaml"
    content = storage.read_file(uri, SUITE, tmp_path / "rows")
    found = read_task_file(
        uri, content, SUITE, lambda rows, field: storage.fetch_rows(rows, field, None, tmp_path / "rows")
    )
    assert (found.name, found.rows) == ("pick", {"train": [{"text": "x"}]})
    with pytest.raises(DataError, match="there is no s3://"):
        storage.read_file(f"s3://{bucket}/tasks/other.yaml", SUITE, tmp_path / "rows")


def test_a_benchmarks_task_file_is_read_where_it_is_mounted(mounts: Mounts, tmp_path: Path) -> None:
    storage = Storage(OutputSpec(uri="pvc://claim/x"), mounts)
    for folder in (mounts.volumes / "claim", mounts.config / "data", tmp_path):
        (folder / "pick.yaml").write_text(folder.name)
    uris = {"pvc://claim/pick.yaml": "claim", "configMap://data/pick.yaml": "data"}
    uris[(tmp_path / "pick.yaml").as_uri()] = tmp_path.name
    assert {uri: storage.read_file(uri, SUITE, tmp_path).decode() for uri in uris} == uris
    with pytest.raises(DataError, match=rf"{re.escape(SUITE)}: cannot read .*gone.yaml"):
        storage.read_file("pvc://claim/gone.yaml", SUITE, tmp_path)
    with pytest.raises(SpecError, match="hf"):
        storage.read_file("hf://datasets/acme/rows/pick.yaml", SUITE, tmp_path)
