"""URIs and keys: what is a place, and what tries to climb out of it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.durable import is_partial, is_partial_of, partial_name
from finetune_trainer.errors import SpecError
from finetune_trainer.storage import FileStore, local_path, open_store


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


@pytest.mark.parametrize("uri", ["s3://bucket/models", "pvc://claim/x", "ftp://host/x", "models", ""])
def test_unsupported_scheme_says_what_is_supported(uri: str) -> None:
    with pytest.raises(SpecError, match=r"not supported yet\. Use file:///"):
        open_store(uri)


def test_store_gives_its_uri_back() -> None:
    assert open_store("file:///srv/my models/").uri == "file:///srv/my%20models"


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
