"""Rows and models of every scheme, with the Secret that is meant."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.spec import ModelSpec, OutputSpec, SecretRef
from finetune_trainer.errors import DataError, SpecError, StorageError
from finetune_trainer.location import Mounts
from finetune_trainer.model import fetch_model
from finetune_trainer.storage import Storage

from .s3_server import S3Server, serve_s3

FIELD = "spec.data.tasks[0].source"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


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
    with pytest.raises(SpecError, match=r"tasks\[0\]\.source: 'hf://a/b' has .*Use file:// or s3:// or pvc://"):
        storage.fetch_rows("hf://a/b", FIELD, None, tmp_path / "rows")


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
