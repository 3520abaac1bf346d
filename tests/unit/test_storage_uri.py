"""URIs and keys: what is a place, and what tries to climb out of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.durable import is_partial, is_partial_of, partial_name
from finetune_trainer.errors import SpecError, StorageError
from finetune_trainer.file_store import FileStore
from finetune_trainer.location import Mounts, bucket_and_key, config_map_path, local_path, volume_path

FIELD = "spec.data.tasks[0].source"


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///srv/models", "/srv/models"),
        ("file:///srv/my%20models/", "/srv/my models"),
        ("file:///srv/my models", "/srv/my models"),
        ("file:///srv/a?b#c", "/srv/a?b#c"),
    ],
)
def test_local_path_of_file_uri(uri: str, path: str) -> None:
    assert local_path(uri) == Path(path)


@pytest.mark.parametrize(
    "uri", ["file://models", "file://host/srv", "/srv", "file:///srv/../etc", "file:///srv/%2e%2e/etc", "file:///a%00b"]
)
def test_uri_that_is_no_absolute_local_path_is_refused(uri: str) -> None:
    with pytest.raises(SpecError, match="Write"):
        local_path(uri)


def test_store_gives_its_uri_back() -> None:
    assert FileStore(Path("/srv/my models/")).uri == "file:///srv/my%20models"


@pytest.fixture
def mounts(tmp_path: Path) -> Mounts:
    """What a pod finds, with a link in a volume that leads to its Secrets."""
    for folder in ("secrets/keys", "volumes/claim/rows", "config/data"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "secrets" / "keys" / "AWS_ACCESS_KEY_ID").touch()
    (tmp_path / "volumes" / "claim" / "out").symlink_to(tmp_path / "secrets")
    # As the kubelet lays out a ConfigMap.
    (tmp_path / "config" / "data" / "..data").symlink_to("..2026")
    (tmp_path / "config" / "data" / "..2026").mkdir()
    (tmp_path / "config" / "data" / "..2026" / "rows.csv").touch()
    (tmp_path / "config" / "data" / "rows.csv").symlink_to("..data/rows.csv")
    return Mounts(tmp_path / "secrets", tmp_path / "volumes", tmp_path / "config")


def test_volume_and_config_map_lead_below_their_mounts(mounts: Mounts) -> None:
    assert volume_path("pvc://claim/rows/a%20b", mounts, FIELD) == mounts.volumes / "claim" / "rows" / "a b"
    assert volume_path("pvc://claim", mounts, FIELD) == mounts.volumes / "claim"
    assert config_map_path("configMap://data/rows.csv", mounts, FIELD).is_file()


@pytest.mark.parametrize(
    "uri",
    [
        "pvc://claim/../other",
        "pvc://claim/%2e%2e/other",
        "pvc://claim/out/keys",
        "pvc://claim/a%00",
        "pvc://../secrets",
    ],
)
def test_path_that_leaves_its_volume_is_refused(mounts: Mounts, uri: str) -> None:
    with pytest.raises(SpecError, match="leads out of"):
        volume_path(uri, mounts, FIELD)


@pytest.mark.parametrize("uri", [f"pvc://{'x' * 300}/rows", "pvc://claim/circle/rows"])
def test_path_that_no_file_system_follows_is_refused_in_words(mounts: Mounts, uri: str) -> None:
    (mounts.volumes / "claim" / "circle").symlink_to("circle")
    with pytest.raises((SpecError, StorageError), match=r"source: .*(too long|leads back to itself)"):
        volume_path(uri, mounts, FIELD)


def test_volume_that_is_not_mounted_is_named(mounts: Mounts) -> None:
    with pytest.raises(StorageError, match=r"source: 'claym' of 'pvc://claym/x' is not mounted at .*claym"):
        volume_path("pvc://claym/x", mounts, FIELD)


@pytest.mark.parametrize("find", [volume_path, config_map_path])
def test_laptop_says_what_to_use_instead_of_what_a_cluster_mounts(
    find: Callable[[str, Mounts, str], Path], tmp_path: Path
) -> None:
    nothing = Mounts(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    with pytest.raises(SpecError, match=r"source: 'pvc://claim/x' is a .* of a cluster.*Use file:///"):
        find("pvc://claim/x", nothing, FIELD)


def test_places_of_mounts_can_be_named_in_the_environment() -> None:
    mounts = Mounts.from_environment({"FINETUNE_PVC": "/pvc", "FINETUNE_CACHE": "/cache", "FINETUNE_SECRETS": ""})
    assert mounts == Mounts(volumes=Path("/pvc"), cache=Path("/cache"))


@pytest.mark.parametrize(
    ("uri", "bucket", "key"),
    [
        ("s3://bucket/a/b.csv", "bucket", "a/b.csv"),
        ("s3://bucket", "bucket", ""),
        ("s3://bucket/a%20b/", "bucket", "a%20b"),
    ],
)
def test_bucket_and_key_of_an_s3_uri(uri: str, bucket: str, key: str) -> None:
    assert bucket_and_key(uri, FIELD) == (bucket, key)


@pytest.mark.parametrize("uri", ["s3://bucket/../x", "s3://bucket/a//b", "s3:///x", "s3://"])
def test_s3_uri_without_a_clear_place_is_refused(uri: str) -> None:
    with pytest.raises(SpecError, match="names no folder of a bucket"):
        bucket_and_key(uri, FIELD)


@given(st.lists(st.sampled_from(["..", ".", "", "a", "/", "\\", "\0", "a/b", "…", " "]), min_size=1).map("/".join))
def test_no_key_leaves_the_root(key: str) -> None:
    store = FileStore(Path("/nonexistent/root"))
    parts = key.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        with pytest.raises(SpecError, match="is no key of a store"):
            store.exists(key)
    else:
        assert not store.exists(key)


@given(st.text(min_size=1, max_size=300).filter(lambda name: "/" not in name and "\0" not in name))
def test_partial_names_are_hidden_recognised_and_short_enough(name: str) -> None:
    partial = partial_name(name)
    assert is_partial(partial)
    assert is_partial_of(partial, name)
    assert len(partial.encode("utf-8", "surrogatepass")) <= 255


def test_partial_of_one_name_is_not_taken_for_that_of_a_longer_one() -> None:
    assert not is_partial_of(partial_name("model.v2"), "model")
