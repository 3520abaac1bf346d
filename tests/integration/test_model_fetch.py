"""Base models come from folders and from a hub; what must not be run or cannot be tuned is refused with a remedy."""

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    MT5Config,
    PretrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
)

from finetune_api.spec import ModelSpec
from finetune_trainer import hub_client
from finetune_trainer.encoder_decoder import text_logits
from finetune_trainer.errors import DataError, FineTuneError, SpecError, StorageError
from finetune_trainer.hub import Hub, Wanted
from finetune_trainer.model import (
    ModelFiles,
    fetch_model,
    find_licence,
    load_model,
    load_tokenizer,
    outline_model,
)

from .hub_server import COMMIT, FakeHub, serve_hub

REPOSITORY = "acme/tiny"
NOBODY = "http://127.0.0.1:9"
"""An address where nothing listens."""


@pytest.fixture
def folder(tiny_chat_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return shutil.copytree(tiny_chat_model_dir, tmp_path / "tiny")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def fetch_folder(folder: Path, revision: str | None = None) -> ModelFiles:
    return fetch_model(ModelSpec(source=folder.as_uri(), revision=revision), folder.parent / "cache", environment={})


# --- folders


def test_folder_is_used_in_place_and_loads(folder: Path) -> None:
    files = fetch_folder(folder)
    assert files.path == folder
    tokenizer, model = load_tokenizer(files), load_model(files, torch.float32, "sdpa")
    assert tokenizer.eos_token == "<|im_end|>"
    ids = torch.tensor([tokenizer("Great phone").input_ids])
    assert model(ids).logits.shape == (1, ids.shape[1], model.config.vocab_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_loaded_as_the_wanted_type(folder: Path, dtype: torch.dtype) -> None:
    model = load_model(fetch_folder(folder), dtype, "eager")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.config._attn_implementation == "eager"


def test_revision_of_a_folder_changes_with_its_weights_and_not_with_its_notes(folder: Path) -> None:
    first = fetch_folder(folder).revision
    (folder / "README.md").write_text("notes")
    assert fetch_folder(folder).revision == first
    edit_json(folder / "generation_config.json", temperature=0.5)
    assert fetch_folder(folder).revision != first


def test_pinned_revision_of_a_folder_is_held_against_its_files(folder: Path) -> None:
    revision = fetch_folder(folder).revision
    assert fetch_folder(folder, revision).revision == revision
    with pytest.raises(DataError, match=r"spec\.model\.revision is '0000'"):
        fetch_folder(folder, "0000")


def test_tokenizer_without_padding_pads_with_its_end_token(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    assert load_tokenizer(fetch_folder(folder)).pad_token == "<|im_end|>"


def remove(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def instead_of_weights(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name) and None


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return spoil


def adapter_only(folder: Path) -> None:
    remove("model.safetensors", "config.json")(folder)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")


def index_names_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def index_climbs_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"a": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BAD_FOLDERS = [
    (
        "pickled weights only",
        instead_of_weights("pytorch_model.bin"),
        SpecError,
        r"only as pytorch_model\.bin;.*can run code",
    ),
    ("gguf only", instead_of_weights("model.Q4_1.gguf"), SpecError, r"only as GGUF.*gguf_file="),
    ("adapter instead of a model", adapter_only, SpecError, "is a PEFT adapter, not a whole model"),
    (
        "no weights",
        remove("model.safetensors"),
        DataError,
        r"has neither model\.safetensors nor .*It holds .*config\.json",
    ),
    ("no config", remove("config.json"), DataError, r"has no config\.json.*It holds .*model\.safetensors"),
    (
        "no tokenizer",
        remove("tokenizer.json"),
        DataError,
        r"has no tokenizer\. It holds .*config\.json.*save_pretrained",
    ),
    ("config cut off", truncate("config.json", 0.5), DataError, r"config\.json is truncated or no JSON"),
    ("config is a list", lambda f: (f / "config.json").write_text("[]") and None, DataError, "holds no JSON object"),
    (
        "config nested beyond reason",
        lambda f: (f / "config.json").write_text("[" * 100_000) and None,
        DataError,
        "no JSON",
    ),
    ("custom code in the config", config(auto_map={"AutoModel": "x.Y"}), SpecError, "never done here"),
    (
        "custom code in the tokenizer",
        lambda f: edit_json(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}),
        SpecError,
        r"tokenizer_config\.json has an auto_map",
    ),
    (
        "quantised weights",
        config(quantization_config={"quant_method": "gptq"}),
        SpecError,
        "quantised .'gptq'.*unquantised",
    ),
]

BAD_WEIGHT_FILES = [
    ("weights cut in the data", truncate("model.safetensors", 0.7), DataError, r"model\.safetensors is truncated"),
    ("weights cut in the header", truncate("model.safetensors", 0.001), DataError, r"model\.safetensors is truncated"),
    ("weights empty", truncate("model.safetensors", 0), DataError, r"model\.safetensors is truncated .*\(0 bytes\)"),
    ("missing shard", index_names_missing_shard, DataError, "model-00002-of-00002.safetensors.*not there"),
    ("shard outside of the folder", index_climbs_out, DataError, "model.safetensors.*not there"),
]


@pytest.mark.parametrize(
    ("spoil", "error", "said"), [pytest.param(*case[1:], id=case[0]) for case in [*BAD_FOLDERS, *BAD_WEIGHT_FILES]]
)
def test_bad_folder_is_refused_by_name_and_with_a_remedy(
    folder: Path, spoil: Callable[[Path], None], error: type[FineTuneError], said: str
) -> None:
    spoil(folder)
    with pytest.raises(error, match=said):
        fetch_folder(folder)


def test_folder_that_does_not_exist_is_a_fault_of_the_spec(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"spec\.model\.source: .*/nothing does not exist"):
        fetch_folder(tmp_path / "nothing")


def test_trust_in_remote_code_is_refused_whatever_the_model(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"spec\.model\.trustRemoteCode must stay false"):
        # The contract refuses it first; who passes by the contract is refused here.
        asked = ModelSpec(source=folder.as_uri()).model_copy(update={"trust_remote_code": True})
        fetch_model(asked, folder.parent, environment={})


def test_file_instead_of_a_folder_is_a_fault_of_the_spec(folder: Path) -> None:
    with pytest.raises(SpecError, match="is a file"):
        fetch_folder(folder / "config.json")


BAD_TOKENIZERS = [
    ("cut off", truncate("tokenizer.json", 0.5), "cannot be read"),
    (
        "of another form",
        lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "?"}}') and None,
        "cannot be read",
    ),
    ("without end token", lambda f: edit_json(f / "tokenizer_config.json", eos_token=None), "has no end token"),
    ("larger than the model", config(vocab_size=100), "knows 509 tokens, the model only 100"),
]


@pytest.mark.parametrize(("spoil", "said"), [pytest.param(*case[1:], id=case[0]) for case in BAD_TOKENIZERS])
def test_bad_tokenizer_is_a_fault_of_the_data(folder: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=said):
        load_tokenizer(fetch_folder(folder))


BAD_WEIGHTS = [
    ("lacking a layer", config(num_hidden_layers=3), DataError, r"lack model\.layers\.2\."),
    (
        "with a layer too many",
        config(num_hidden_layers=1),
        DataError,
        r"hold, unknown to the architecture, model\.layers\.1\.",
    ),
    ("of another shape", config(intermediate_size=96), DataError, r"have in another shape .*down_proj"),
    (
        "of an unknown type",
        config(model_type="no-such-model"),
        SpecError,
        "no model that this version of transformers knows",
    ),
]


@pytest.mark.parametrize(("spoil", "error", "said"), [pytest.param(*case[1:], id=case[0]) for case in BAD_WEIGHTS])
def test_weights_that_do_not_fit_the_config_are_not_filled_up_in_silence(
    folder: Path, spoil: Callable[[Path], None], error: type[FineTuneError], said: str
) -> None:
    spoil(folder)
    files = fetch_folder(folder)
    with pytest.raises(error, match=said):
        load_model(files, torch.float32, "sdpa")


def test_encoder_decoder_model_of_another_family_than_t5_is_refused(folder: Path) -> None:
    small = BartConfig(vocab_size=509, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16)
    BartForConditionalGeneration(small).save_pretrained(folder)
    said = r"encoder-decoder model \(BartForConditionalGeneration\).*t5, mt5, umt5.*ForCausalLM"
    with pytest.raises(SpecError, match=said):
        load_model(fetch_folder(folder), torch.float32, "sdpa")


def test_decoder_deeper_than_its_encoder_is_refused(folder: Path) -> None:
    small = T5Config(vocab_size=509, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_decoder_layers=2, num_heads=2)
    T5ForConditionalGeneration(small).save_pretrained(folder)
    with pytest.raises(SpecError, match=r"num_decoder_layers 2 and num_layers 1.*Choose another model"):
        load_model(fetch_folder(folder), torch.float32, "sdpa")


@pytest.mark.parametrize("kind", [T5Config, MT5Config, UMT5Config])
def test_models_of_the_t5_family_are_loaded(folder: Path, kind: type[PretrainedConfig]) -> None:
    small = kind(vocab_size=509, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    AutoModelForSeq2SeqLM.from_config(small).save_pretrained(folder)
    files = fetch_folder(folder)
    logits = text_logits(load_model(files, torch.float32, None).eval(), [5, 6, 7])
    alone = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[0, 5, 6, 7]])}
    torch.testing.assert_close(logits, alone(**inputs).logits)
    assert sum(p.numel() for p in outline_model(files).parameters()) == sum(p.numel() for p in alone.parameters())


def test_masked_language_model_is_refused_though_transformers_would_load_it(folder: Path) -> None:
    small = BertConfig(vocab_size=509, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(small).save_pretrained(folder)
    with pytest.raises(SpecError, match="no causal language model: its architecture is BertForMaskedLM"):
        load_model(fetch_folder(folder), torch.float32, "sdpa")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# x", "apache-2.0"),
        ("---\nlicense: [a]\n---\n", None),
        ("---\n: : :\n---\n", None),
        ("# no front matter", None),
        (None, None),
    ],
)
def test_licence_is_read_from_the_models_card(folder: Path, card: str | None, licence: str | None) -> None:
    if card is not None:
        (folder / "README.md").write_text(card)
    assert find_licence(fetch_folder(folder)) == licence


# --- the hub


@pytest.fixture
def hub(folder: Path) -> Iterator[FakeHub]:
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"another format")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights again")
    with serve_hub(REPOSITORY, folder) as hub:
        yield hub


WANTED = Wanted("model", "spec.model.source", f"hf://{REPOSITORY}", REPOSITORY, "main", "spec.model.secretRef")


class Sleeper:
    """Counts the waits between attempts instead of waiting."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.waits.append(seconds)


def fetch_from(
    hub: FakeHub,
    tmp_path: Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    source: str = f"hf://{REPOSITORY}",
    sleep: Callable[[float], None] | None = None,
) -> ModelFiles:
    environment = {"HF_ENDPOINT": hub.url} | ({"HF_TOKEN": token} if token else {})
    model = ModelSpec(source=source, revision=revision)
    return fetch_model(model, tmp_path / "cache", environment=environment, sleep=sleep or Sleeper())


def test_hub_model_is_fetched_loads_and_is_pinned_to_its_commit(hub: FakeHub, tmp_path: Path) -> None:
    files = fetch_from(hub, tmp_path)
    assert files.revision == COMMIT
    load_tokenizer(files)
    load_model(files, torch.float32, "sdpa")


def test_only_what_is_needed_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    fetch_from(hub, tmp_path)
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(hub.downloads()) == wanted | {"chat_template.jinja"}


def test_second_fetch_downloads_nothing(hub: FakeHub, tmp_path: Path) -> None:
    fetch_from(hub, tmp_path)
    hub.requests.clear()
    fetch_from(hub, tmp_path)
    assert hub.downloads() == []


def test_fetched_model_is_used_when_the_hub_is_away(hub: FakeHub, tmp_path: Path) -> None:
    first = fetch_from(hub, tmp_path)
    hub.url = NOBODY
    sleeper = Sleeper()
    assert fetch_from(hub, tmp_path, sleep=sleeper) == first
    assert sleeper.waits == []


def test_moved_branch_gives_the_new_commit(hub: FakeHub, tmp_path: Path) -> None:
    fetch_from(hub, tmp_path)
    hub.commit = "f" * 40
    edit_json(hub.folder / "generation_config.json", temperature=0.5)
    files = fetch_from(hub, tmp_path)
    assert files.revision == "f" * 40
    assert json.loads((files.path / "generation_config.json").read_text())["temperature"] == 0.5


def test_without_token_none_is_sent_and_with_one_it_is(hub: FakeHub, tmp_path: Path) -> None:
    fetch_from(hub, tmp_path)
    assert hub.tokens == {None}
    hub.tokens.clear()
    hub.needed_token = "hf_right"
    fetch_from(hub, tmp_path / "b", token="hf_right")
    assert hub.tokens == {"hf_right"}


def make_gated(hub: FakeHub) -> None:
    hub.gated, hub.needed_token = True, "hf_right"


def make_private(hub: FakeHub) -> None:
    hub.needed_token = "hf_right"


@pytest.mark.parametrize(
    ("prepare", "options", "said"),
    [
        pytest.param(
            make_gated, {}, "is gated. Accept its terms.*HF_TOKEN.*spec.model.secretRef", id="gated, without token"
        ),
        pytest.param(make_private, {}, "knows no such model, or it is private.*HF_TOKEN", id="private, without token"),
        pytest.param(make_private, {"token": "hf_wrong"}, r"refuses access \(HTTP 401\).*valid", id="wrong token"),
        pytest.param(
            None, {"revision": "v9"}, r"at revision 'v9': .*no such branch.*spec\.model\.revision", id="revision"
        ),
        pytest.param(None, {"source": "hf://acme/nothing"}, "hf://acme/nothing .*no such model", id="repository"),
        pytest.param(None, {"source": "hf://acme/a/b/c"}, "no name of a hub model", id="name with too many parts"),
        pytest.param(None, {"source": "hf://acme/../etc"}, "no name of a hub model", id="name that climbs"),
    ],
)
def test_what_the_hub_refuses_is_not_tried_again(
    hub: FakeHub, tmp_path: Path, prepare: Callable[[FakeHub], None] | None, options: dict[str, str], said: str
) -> None:
    if prepare:
        prepare(hub)
    sleeper = Sleeper()
    with pytest.raises(SpecError, match=said) as caught:
        fetch_from(hub, tmp_path, sleep=sleeper, **options)
    assert sleeper.waits == []
    assert "hf_" not in str(caught.value), "no token in a message"


def test_hub_that_fails_for_a_while_is_asked_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.failures = [500, 503]
    sleeper = Sleeper()
    assert fetch_from(hub, tmp_path, sleep=sleeper).revision == COMMIT
    assert len(sleeper.waits) >= 1


def test_hub_that_stays_away_is_a_retryable_error(hub: FakeHub, tmp_path: Path) -> None:
    hub.url = NOBODY
    sleeper = Sleeper()
    with pytest.raises(
        StorageError, match=rf"cannot read hf://acme/tiny .* from {re.escape(NOBODY)}.*HF_ENDPOINT"
    ) as e:
        fetch_from(hub, tmp_path, sleep=sleeper)
    assert sleeper.waits == [1.0, 3.0, 9.0]
    assert e.value.exit_code.is_retryable


def test_hub_that_answers_nonsense_is_named(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit = "main"
    sleeper = Sleeper()
    with pytest.raises(StorageError, match=r"cannot read hf://acme/tiny .*is not what a hub says .*Check HF_ENDPOINT"):
        fetch_from(hub, tmp_path, sleep=sleeper)


def test_download_that_breaks_off_goes_on(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_downloads = 1
    files = fetch_from(hub, tmp_path)
    assert (files.path / "model.safetensors").read_bytes() == (hub.folder / "model.safetensors").read_bytes()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("xet", [False, True], ids=["", "in Xet storage"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_file_that_never_ends_is_written_no_further_than_the_hub_has_listed_it(
    hub: FakeHub, tmp_path: Path, name: str, xet: bool
) -> None:
    hub.endless, hub.xet = name, xet
    listed = (hub.folder / name).stat().st_size
    said = rf"127\.0\.0\.1:\d+ announces {listed:,} bytes for '{name}' and sends more; ended after [\d,]+\. Check HF_"
    assert_ended(hub, tmp_path, said, name)


@pytest.mark.timeout(60)
def test_what_is_packed_though_nobody_asked_for_it_is_not_unpacked(hub: FakeHub, tmp_path: Path) -> None:
    hub.endless, hub.encoding = "config.json", "gzip"
    assert_ended(
        hub, tmp_path, r"/config\.json is sent packed \(gzip\), which was not asked for\. Check", "config.json"
    )


@pytest.mark.timeout(180)
def test_file_that_trickles_is_ended(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "PACE_SECONDS", 1.5)
    hub.trickle = "model.safetensors"
    assert_ended(hub, tmp_path, r"/model\.safetensors trickles: \d+ bytes in \d+ s\. Check the network", hub.trickle)


def assert_ended(hub: FakeHub, tmp_path: Path, said: str, name: str) -> None:
    with pytest.raises(StorageError, match=said):
        fetch_from(hub, tmp_path)
    kept = sorted(path.name for path in (tmp_path / "cache").rglob("snapshots/*/*"))
    assert name not in kept and not list((tmp_path / "cache").rglob("*.incomplete"))


def test_file_in_xet_storage_comes_as_every_other_file(hub: FakeHub, tmp_path: Path) -> None:
    hub.xet = True
    files = fetch_from(hub, tmp_path)
    assert (files.path / "model.safetensors").read_bytes() == (hub.folder / "model.safetensors").read_bytes()


def test_file_that_only_xet_gives_is_refused_with_a_way_round_it(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 10_000)
    with pytest.raises(SpecError, match=r"spec\.model\.source: hf://acme/tiny .*more than 10,000 in one file.*volume"):
        fetch_from(hub, tmp_path)


LISTINGS_WITHOUT_END = [
    pytest.param({"pages_without_end": True}, id="empty pages"),
    pytest.param({"page_without_end": True}, id="one page"),
    pytest.param({"page_without_end": True, "status_without_end": 404}, id="an error"),
    pytest.param({"page_without_end": True, "status_without_end": 302}, id="an answer that leads elsewhere"),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("answers", LISTINGS_WITHOUT_END)
def test_listing_without_end_is_ended_before_it_fills_memory(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any]
) -> None:
    monkeypatch.setattr(hub_client, "LARGEST_LISTING_BYTES", 1 << 20)
    for name, value in answers.items():
        setattr(hub, name, value)
    said = rf"cannot read hf://acme/tiny .*/tree/{COMMIT} has more than 1 MiB to say, and 100,000 files take less; join"
    with pytest.raises(StorageError, match=said):
        Hub(hub.url, None, tmp_path).fetch(WANTED, ["*"])


def test_hub_that_says_nothing_is_not_waited_for_without_end(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_client, "SILENCE_SECONDS", 0.1)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", Sleeper())
    hub.silent = threading.Event()
    try:
        with pytest.raises(StorageError, match=r"cannot read hf://acme/tiny .*timed out"):
            Hub(hub.url, None, tmp_path).fetch(WANTED, ["*"])
    finally:
        hub.silent.set()


def test_file_that_is_longer_than_listed_is_not_taken(hub: FakeHub, tmp_path: Path) -> None:
    hub.listed_sizes["model.safetensors"] = 1000
    with pytest.raises(StorageError, match=r"announces 1,000 bytes for 'model\.safetensors' and sends more"):
        fetch_from(hub, tmp_path)


def test_nothing_is_written_of_a_file_that_the_disk_has_no_room_for(hub: FakeHub, tmp_path: Path) -> None:
    hub.listed_sizes["model.safetensors"] = 1 << 60
    with pytest.raises(StorageError, match=r"1,152,921,504,606,846,976 bytes for 'model\.safet.*Free space"):
        fetch_from(hub, tmp_path)
    assert all(path.stat().st_size < 100_000 for path in (tmp_path / "cache").rglob("blobs/*"))


def test_what_the_cache_holds_of_another_commit_needs_no_room(hub: FakeHub, tmp_path: Path) -> None:
    fetch_from(hub, tmp_path)
    hub.commit = "f" * 40
    hub.listed_sizes["model.safetensors"] = 1 << 60
    assert fetch_from(hub, tmp_path).revision == "f" * 40


@pytest.mark.parametrize(("spoil", "error", "said"), [pytest.param(*case[1:], id=case[0]) for case in BAD_FOLDERS])
def test_bad_hub_model_is_refused_before_its_weights_are_fetched(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], error: type[FineTuneError], said: str
) -> None:
    spoil(folder)
    with serve_hub(REPOSITORY, folder) as hub, pytest.raises(error, match=said):
        fetch_from(hub, tmp_path)
    assert not [name for name in hub.downloads() if name.endswith((".safetensors", ".bin", ".gguf"))]


@pytest.mark.parametrize(("spoil", "error", "said"), [pytest.param(*case[1:], id=case[0]) for case in BAD_WEIGHT_FILES])
def test_broken_weights_of_a_hub_are_found_after_the_download(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], error: type[FineTuneError], said: str
) -> None:
    spoil(folder)
    with serve_hub(REPOSITORY, folder) as hub, pytest.raises(error, match=said):
        fetch_from(hub, tmp_path)
