"""Memory planned without weights, against the peak that torch's profiler measures of real ones.

Inputs: random models of two architectures, made-up rows. Measured: equal but for the order in which blocks are freed;
of one of two workers all that its training does, from loading on.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    T5Config,
)

from finetune_api.job import FineTuneJob, load_job
from finetune_api.report import ExitCode, Stage
from finetune_api.resolve import resolve
from finetune_api.spec import FineTuneJobSpec
from finetune_api.stage_result import StageResult
from finetune_api.status import PlanStatus
from finetune_cli.__main__ import run_command
from finetune_trainer import attention, stages
from finetune_trainer.layout import Layout, build_batch, forward
from finetune_trainer.methods import prepare_model
from finetune_trainer.plan import (
    Workload,
    expected_gpus,
    expected_precision,
    plan_from_config,
    plan_run,
    whole_rows,
)
from finetune_trainer.precision import PrecisionChoice
from finetune_trainer.regularization import regularize
from finetune_trainer.train import loss_per_token

from ..unit.operator.objects import make_resolved
from .conftest import save_tiny_model
from .hub_server import serve_hub
from .jobs import Silence, tiny_document, tiny_job
from .memory_of_two import JOB, ROWS, allocations, measured_peaks
from .s3_server import S3Server

TOLERANCE = 0.15
LLAMA = LlamaConfig(
    vocab_size=2000,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    architectures=["LlamaForCausalLM"],
)
GPT2 = GPT2Config(vocab_size=2000, n_embd=128, n_layer=4, n_head=4, n_positions=512, architectures=["GPT2LMHeadModel"])
BILLIONS = LlamaConfig(architectures=["LlamaForCausalLM"], num_hidden_layers=6)
"""A part of 7B, whose numbers are the defaults: 1.5 billion parameters, of which not all are gathered at a time."""
FULL_PRECISION = PrecisionChoice(torch.float32, autocast=False, reason="")


def make_spec(method: str, **given: Any) -> FineTuneJobSpec:
    training = {"spec.training.globalBatchSize": 8, "spec.training.microBatchSize": 4}
    return make_resolved({"spec.method": {"type": method}} | training | given).spec


def measured_peak(config: PretrainedConfig, spec: FineTuneJobSpec, folder: Path, precision: PrecisionChoice) -> int:
    """Return the bytes that are alive when most are, in one step of real training."""
    packs = spec.data.packing
    base = AutoModelForCausalLM.from_config(config, dtype=precision.weights)
    if packs:
        base.set_attn_implementation(attention.register())
    model = prepare_model(base, spec.method, str(folder)).train()
    if spec.compute.deepspeed is not None:
        model.to(precision.weights)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as making:
        loss = regularize(loss_per_token, model, spec.method.regularization, ROWS, seed=1, autocast=False)
    optimiser = torch.optim.AdamW(trained, fused=True)
    size = spec.training.micro_batch_size
    layout = Layout.PACKED if packs else Layout.PADDED
    batches = [build_batch(ROWS[start : start + size], layout) for start in range(0, len(ROWS), size)]

    def step() -> None:
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast):
                outputs = SimpleNamespace(logits=forward(model, batch))
            loss(outputs, batch["labels"], None).backward()
            del outputs
        optimiser.step()
        optimiser.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    live = peak = sum(allocations(making))
    for size in allocations(profiler):
        live += size
        peak = max(peak, live)
    states = [
        value for state in optimiser.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    return peak + sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *states))


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("method", ["full", "lora", "promptTuning", "adapter"])
def test_planned_memory_is_what_training_takes(config: PretrainedConfig, packing: bool, method: str, tmp_path: Path):
    spec = make_spec(method, **{"spec.data.packing": packing})
    precision = FULL_PRECISION if method == "full" else PrecisionChoice(torch.bfloat16, autocast=False, reason="")
    plan = plan_run(spec, config, Workload(100, ROWS), precision, tokenizer_path=str(tmp_path), gpus=0)
    assert plan.memory_bytes_per_gpu == pytest.approx(measured_peak(config, spec, tmp_path, precision), rel=TOLERANCE)
    assert plan.micro_batch_size == 4


def test_products_in_another_format_are_planned_too(tmp_path: Path):
    spec, precision = make_spec("full"), PrecisionChoice(torch.float32, autocast=True, reason="")
    plan = plan_run(spec, LLAMA, Workload(100, ROWS), precision, tokenizer_path=str(tmp_path), gpus=0)
    assert plan.memory_bytes_per_gpu == pytest.approx(measured_peak(LLAMA, spec, tmp_path, precision), rel=TOLERANCE)


FULL: dict[str, Any] = {"method": {"type": "full"}}
TOGETHER: dict[str, dict[str, Any]] = {
    "full": FULL | {"training__microBatchSize": 4},
    "full, rows one by one": FULL | {"training__microBatchSize": 1},
    "lora": {"method": {"type": "lora"}, "training__microBatchSize": 4},
    # Last: a process that DeepSpeed has once been in does not get rid of it.
    "full, ZeRO 2": FULL | {"training__microBatchSize": 4, "compute__deepspeed": {"stage": 2}},
    "full, ZeRO 3": FULL | {"training__microBatchSize": 4, "compute__deepspeed": {"stage": 3}},
}
"""What two workers train."""


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[FineTuneJob, int]]:
    """The jobs `TOGETHER`, of a model whose gradients fill two buckets, with the peak of one worker's memory."""
    folder = tmp_path_factory.mktemp("together")
    model = save_tiny_model(folder / "model", hidden_size=384, intermediate_size=1056, num_hidden_layers=6)
    jobs = {}
    for name, changes in TOGETHER.items():
        place = folder / name
        place.mkdir()
        steps = {"training__maxSteps": 2, "training__evalEverySteps": 2, "training__globalBatchSize": len(ROWS)}
        document = tiny_document(model, folder, compute__workers=2, compute__gpusPerWorker=0, **steps, **changes)
        (place / JOB).write_text(json.dumps(document))
        jobs[name] = resolve(load_job((place / JOB).read_text(), JOB))
    peaks = measured_peaks([folder / name for name in jobs])
    return {name: (job, peak) for (name, job), peak in zip(jobs.items(), peaks, strict=True)}


@pytest.mark.parametrize("name", TOGETHER)
def test_planned_memory_is_what_one_of_two_workers_takes(together: dict[str, tuple[FineTuneJob, int]], name: str):
    job, peak = together[name]
    config = AutoConfig.from_pretrained(job.spec.model.source.removeprefix("file://"))
    plan = plan_run(job.spec, config, Workload(len(ROWS), ROWS), FULL_PRECISION, tokenizer_path="", gpus=0)
    assert plan.memory_bytes_per_gpu == pytest.approx(peak, rel=TOLERANCE)


@pytest.mark.parametrize("pull", ["l2sp", "ewc", "kl"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_what_a_pull_takes_is_planned_too(packing: bool, pull: str, tmp_path: Path):
    spec = make_spec("full", **{"spec.data.packing": packing, "spec.method.regularization": {"type": pull}})
    plan = plan_run(spec, LLAMA, Workload(100, ROWS), FULL_PRECISION, tokenizer_path=str(tmp_path), gpus=0)
    assert plan.memory is not None and plan.memory.copies > 0
    assert plan.memory_bytes_per_gpu == pytest.approx(
        measured_peak(LLAMA, spec, tmp_path, FULL_PRECISION), rel=TOLERANCE
    )


def test_the_best_weights_are_planned_where_they_are_kept():
    spec = make_spec("lora", **{"spec.training.earlyStopping": {"patience": 2}})
    on_cpu, on_gpu = (
        plan_run(spec, LLAMA, whole_rows(64, 100), FULL_PRECISION, tokenizer_path="", gpus=gpus) for gpus in (0, 1)
    )
    assert on_cpu.memory is not None and on_gpu.memory is not None
    assert (on_cpu.memory.copies, on_gpu.memory.copies) == (4 * on_cpu.trainable_parameters, 0)


def plan_of(method: str = "full", tokens: int = 64, **given: Any) -> Any:
    spec = make_spec(method, **given)
    return plan_run(spec, LLAMA, whole_rows(tokens, 100), FULL_PRECISION, tokenizer_path="", gpus=0)


def test_a_model_is_counted_and_what_is_trained_of_it():
    plan = plan_of("lora")
    real = prepare_model(AutoModelForCausalLM.from_config(LLAMA), make_spec("lora").method, "")
    assert isinstance(real, PeftModel)
    assert (plan.trainable_parameters, plan.parameters) == real.get_nb_trainable_parameters()


def test_seven_billion_parameters_are_planned_without_their_memory(tmp_path: Path):
    config = LlamaConfig(architectures=["LlamaForCausalLM"])  # its defaults are those of 7B
    spec = make_spec("lora", **{"spec.training.microBatchSize": 1})
    bfloat16 = PrecisionChoice(torch.bfloat16, autocast=False, reason="")
    plan = plan_run(spec, config, whole_rows(512, 100), bfloat16, tokenizer_path=str(tmp_path), gpus=1)
    assert plan.memory is not None and plan.parameters is not None and plan.trainable_parameters is not None
    assert plan.parameters - plan.trainable_parameters == 6_738_415_616
    assert plan.memory.weights == 2 * 6_738_415_616 + 4 * plan.trainable_parameters


def test_no_more_weights_are_gathered_than_may_be():
    compute = {"workers": 8, "gpusPerWorker": 1, "deepspeed": {"stage": 3}}
    spec = make_spec("full", **{"spec.training.microBatchSize": 1, "spec.compute": compute})
    autocast = PrecisionChoice(torch.float32, autocast=True, reason="")
    plan = plan_run(spec, BILLIONS, whole_rows(64, 100), autocast, tokenizer_path="", gpus=8)
    assert plan.memory is not None and plan.parameters is not None and plan.trainable_parameters is not None
    embedding, piece = 32_000 * 4096, 50_000_000
    in_use = 1_000_000_000 + embedding
    assert in_use < plan.parameters
    # A bucket and its copy; the embedding fits neither there nor into what is on its way.
    exchanged = (2 * piece + embedding) + in_use + (piece + embedding)
    assert plan.memory.exchanged == pytest.approx(2 * exchanged, abs=8)
    assert plan.memory.weights == 2 * plan.parameters // 8
    assert plan.memory.optimiser == 12 * plan.trainable_parameters // 8


def test_a_step_that_copies_more_than_rows_take_is_planned():
    compute = {"workers": 2, "gpusPerWorker": 1, "deepspeed": {"stage": 2}}
    spec = make_spec("full", **{"spec.training.microBatchSize": 1, "spec.compute": compute})
    autocast = PrecisionChoice(torch.float32, autocast=True, reason="")
    short, long = (
        plan_run(spec, BILLIONS, whole_rows(tokens, 100), autocast, tokenizer_path="", gpus=2) for tokens in (8, 4096)
    )
    assert short.memory is not None and long.memory is not None and short.trainable_parameters is not None
    share = short.trainable_parameters // 2
    assert long.memory.gradients == 2 * share
    # Laid out anew, and in float32, where rows take next to nothing.
    copied = (2 + 4) * share
    assert short.memory.gradients + short.memory.activations + short.memory.logits == 2 * share + copied


def test_bfloat16_under_deepspeed_is_planned_without_copies_of_the_weights(tmp_path: Path):
    spec = make_spec("full", **{"spec.compute": {"engine": "ray", "deepspeed": {"stage": 1}}})
    autocast = PrecisionChoice(torch.float32, autocast=True, reason="")
    memory = plan_run(spec, LLAMA, Workload(100, ROWS), autocast, tokenizer_path="", gpus=1).memory
    assert memory is not None
    # Measured of a model that is bfloat16 altogether, and so are AdamW's moments there.
    peak = measured_peak(LLAMA, spec, tmp_path, PrecisionChoice(torch.bfloat16, autocast=False, reason=""))
    moments = 2 * memory.weights
    planned = memory.weights + memory.gradients + memory.activations + memory.logits
    assert planned == pytest.approx(peak - moments, rel=TOLERANCE)


def test_a_base_of_four_bits_is_planned_without_the_package_that_makes_one():
    # Two layers of those of 7B, as its defaults have them.
    config = LlamaConfig(architectures=["LlamaForCausalLM"], num_hidden_layers=2)
    spec = make_spec("qlora", **{"spec.training.microBatchSize": 1})
    precision = expected_precision(spec, on_gpu=True)
    plan = plan_run(spec, config, whole_rows(512, 100), precision, tokenizer_path="", gpus=1)
    assert plan.memory is not None and plan.parameters is not None and plan.trainable_parameters is not None
    beside = 2 * 32_000 * 4096 + 5 * 4096  # embedding, output layer, norms
    layers = 2 * (4 * 4096**2 + 3 * 4096 * 11_008)
    assert plan.parameters - plan.trainable_parameters == layers + beside
    # 4.127 bits a weight, as arXiv:2305.14314 has it, and float32.
    expected = layers * 4.127 / 8 + 4 * (beside + plan.trainable_parameters)
    assert plan.memory.weights == pytest.approx(expected, rel=1e-4)
    assert expected_gpus(spec, is_local=True) == 1


def test_what_an_architecture_keeps_out_of_four_bits_is_planned_whole():
    config = T5Config(architectures=["T5ForConditionalGeneration"], decoder_start_token_id=0)  # the first T5, small
    spec = make_spec("qlora", **{"spec.model.task": "seq2seq-lm", "spec.training.microBatchSize": 1})
    workload = whole_rows(128, 100, start=0)
    plan = plan_run(spec, config, workload, expected_precision(spec, on_gpu=True), tokenizer_path="", gpus=1)
    assert plan.memory is not None and plan.parameters is not None and plan.trainable_parameters is not None
    assert plan.parameters - plan.trainable_parameters == 60_506_624
    attention, half_a_block = 4 * 512 * 512, 512 * 2048
    layers = 18 * attention + 12 * half_a_block  # the other half of each feed-forward block stays whole
    expected = layers * 4.127 / 8 + 4 * (plan.parameters - layers)
    assert plan.memory.weights == pytest.approx(expected, rel=1e-4)


def test_a_model_that_looks_at_values_is_counted_and_the_rest_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch):
    def forward(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch).logits if batch["input_ids"].max().item() else batch["input_ids"]

    monkeypatch.setattr("finetune_trainer.plan.forward", forward)
    plan = plan_of("lora")
    assert plan.parameters and plan.memory is None
    assert "cannot be followed without its weights" in plan.warnings[0]


def test_a_model_that_refuses_packed_rows_is_planned_with_padded_ones():
    config = Gemma2Config(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        architectures=["Gemma2ForCausalLM"],
    )
    plan = plan_run(make_spec("lora"), config, whole_rows(16, 8), FULL_PRECISION, tokenizer_path="", gpus=0)
    assert plan.memory is not None and not plan.warnings


def test_computing_activations_twice_keeps_less_of_them():
    kept, twice = plan_of().memory, plan_of(**{"spec.training.gradientCheckpointing": "always"}).memory
    assert twice.activations < kept.activations / 2
    assert twice.weights == kept.weights


@pytest.mark.parametrize(("stage", "shared"), [(0, ""), (1, "o"), (2, "og"), (3, "ogw")])
def test_workers_share_what_their_stage_spreads(stage: int, shared: str):
    alone, both = (
        plan_of(**{"spec.compute": {"engine": "ray", "workers": workers, "deepspeed": {"stage": stage}}}).memory
        for workers in (1, 2)
    )
    divisor = {name: 2 if name[0] in shared else 1 for name in ("weights", "gradients", "optimiser")}
    for name, by in divisor.items():
        assert getattr(both, name) == getattr(alone, name) // by, name
    # A bucket holds all gradients of so small a model. Under stage 3 all weights are gathered, and arrive beside that.
    bucket = alone.exchanged
    assert bucket == (alone.weights if stage else 0)
    assert both.exchanged == bucket + (2 * alone.weights if "w" in shared else 0)


GPU = 1024**2


def held_against(gpu_mebibytes: int, **given: Any) -> Any:
    spec = make_spec("full", **{"spec.compute.gpuMemory": f"{gpu_mebibytes}Mi"}, **given)
    return plan_run(spec, LLAMA, whole_rows(64, 100), FULL_PRECISION, tokenizer_path="", gpus=1)


def test_settings_that_would_fit_are_planned_and_told():
    whole = held_against(1000)
    assert whole.memory is not None and not whole.warnings
    held = sum(whole.memory.model_dump(include={"weights", "gradients", "optimiser"}).values()) // GPU
    [warning] = held_against(whole.memory_bytes_per_gpu // GPU).warnings
    assert "set spec.training.gradientCheckpointing: always" in warning
    twice = held_against(1000, **{"spec.training.gradientCheckpointing": "always"})
    assert f"with which it needs {twice.memory_bytes_per_gpu / 1024**3:.1f} GiB" in warning
    [hopeless] = held_against(held - 1).warnings
    assert f"training holds at least {held / 1024:.1f} GiB" in hopeless


ONE_LAYER = LlamaConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    architectures=["LlamaForCausalLM"],
)


@pytest.mark.parametrize(
    ("stage", "micro_batch", "asked", "needed", "fewer"),
    [(1, 2, 1, 4, 2), (3, 2, 4, 2, 1), (3, None, 1, 4, 2), (0, None, 4, 2, 1)],
    ids=["the optimiser is spread", "all is", "all is, with fewer rows on each", "nothing is, with fewer rows on each"],
)
def test_the_job_fits_on_the_gpus_that_are_needed_and_on_no_fewer(
    stage: int, micro_batch: int | None, asked: int, needed: int, fewer: int
):
    training = {"globalBatchSize": 8} | ({} if micro_batch is None else {"microBatchSize": micro_batch})

    def on(count: int, gpu_kibibytes: int) -> PlanStatus:
        compute: dict[str, Any] = {"engine": "ray", "workers": count, "gpuMemory": f"{gpu_kibibytes}Ki"}
        if stage:
            compute["deepspeed"] = {"stage": stage}
        spec = make_resolved({"spec.method": {"type": "full"}, "spec.compute": compute, "spec.training": training}).spec
        return plan_run(spec, ONE_LAYER, whole_rows(8, 16), FULL_PRECISION, tokenizer_path="", gpus=count)

    # Tensors may fill 92 %.
    enough = math.ceil((on(needed, 1024**2).memory_bytes_per_gpu or 0) / 0.92 / 1024)
    assert on(asked, enough).gpus_needed == needed
    assert not on(needed, enough).warnings
    assert on(fewer, enough).warnings


def test_what_spreading_would_need_is_planned_as_if_it_had_been_asked_for():
    def on(count: int, gpu_kibibytes: int, **compute: Any) -> PlanStatus:
        compute |= {"engine": "ray", "workers": count, "gpusPerWorker": 1, "gpuMemory": f"{gpu_kibibytes}Ki"}
        training = {"globalBatchSize": 8, "microBatchSize": 1, "precision": "fp32"}
        spec = make_resolved({"spec.method": {"type": "full"}, "spec.compute": compute, "spec.training": training}).spec
        return plan_run(spec, BILLIONS, whole_rows(8, 16), FULL_PRECISION, tokenizer_path="", gpus=count)

    spread = on(4, 1024**3, deepspeed={"stage": 3})
    # Without the weights of ZeRO's optimiser, a tenth and more of what each holds, four would do.
    too_little = int(0.95 * (spread.memory_bytes_per_gpu or 0) / 0.92 / 1024)
    [warning] = on(1, too_little).warnings
    assert "8 such GPUs with spec.compute.deepspeed.stage: 3" in warning


def test_a_pod_that_is_too_small_is_told():
    [warning] = plan_of(**{"spec.compute": {"gpusPerWorker": 0, "resources": {"memory": "1Gi"}}}).warnings
    assert "spec.compute.resources.memory is 1Gi" in warning


def told(result: StageResult) -> PlanStatus:
    assert result.exit_code is ExitCode.OK, result.message
    assert result.plan is not None
    return result.plan


def test_check_stage_holds_the_plan_against_the_gpus(tiny_model_dir: Path, tmp_path: Path):
    def checked(folder: str, gpu_memory: str | None, preflight: str = "enforce") -> StageResult:
        compute = {"gpusPerWorker": 1} if gpu_memory is None else {"gpusPerWorker": 1, "gpuMemory": gpu_memory}
        job = tiny_job(tiny_model_dir, tmp_path, compute=compute, runPolicy={"preflight": preflight})
        return stages.run_one(Stage.CHECK, job, tmp_path / folder, Silence())

    plain = told(checked("enforced", None))
    assert plain.memory is not None and plain.memory_bytes_per_gpu is not None

    refused = checked("refused", "1Ki")
    assert refused.exit_code is ExitCode.BAD_SPEC
    assert refused.data is not None and refused.plan is not None and refused.plan.memory == plain.memory
    sentence, _, remedy = refused.message.partition(" Or set ")
    assert sentence.startswith("training holds at least") and "spec.compute.gpuMemory is 1Ki" in sentence
    assert remedy == "spec.runPolicy.preflight: warn to go on all the same."

    warned = told(checked("warned", "1Ki", preflight="warn"))
    assert (warned.warnings, warned.gpu_memory_bytes) == ((sentence, *plain.warnings), 1024)
    assert warned.memory == plain.memory

    tight = told(checked("enforced", f"{plain.memory_bytes_per_gpu // 1024}Ki"))
    assert len(tight.warnings) == len(plain.warnings) + 1, "the same workspace is checked again"
    assert "training needs about" in tight.warnings[0]


def test_command_takes_the_memory_of_a_gpu_from_the_job_unless_it_is_told(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    job = tmp_path / "job.json"
    job.write_text(json.dumps(tiny_document(tiny_model_dir, tmp_path, compute__gpuMemory="1Ki")))

    def warnings(*options: str) -> list[str]:
        assert run_command(["plan", str(job), "--output", "json", *options]) == 0
        return json.loads(capsys.readouterr().out).get("warnings", [])

    [warning] = warnings()
    assert "spec.compute.gpuMemory is 1Ki" in warning
    assert warnings("--gpu-memory", "80Gi") == []


def test_command_tells_how_many_gpus_are_needed(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    job = tmp_path / "job.json"
    job.write_text(json.dumps(tiny_document(tiny_model_dir, tmp_path, compute={"gpusPerWorker": 4})))
    assert run_command(["plan", str(job), "--output", "json", "--gpu-memory", "80Gi"]) == 0
    assert json.loads(capsys.readouterr().out)["gpusNeeded"] == 1
    assert run_command(["plan", str(job), "--gpu-memory", "80Gi"]) == 0
    assert "1 GPU of 80Gi needed for the job as it is set up, 4 asked for\n" in capsys.readouterr().out
    assert run_command(["plan", str(job)]) == 0
    assert "needed" not in capsys.readouterr().out


def test_command_prints_terms_that_add_up(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    job = tmp_path / "job.json"
    job.write_text(json.dumps(tiny_document(tiny_model_dir, tmp_path)))
    assert run_command(["plan", str(job), "--output", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert sum(plan["memory"].values()) == plan["memoryBytesPerGpu"]
    assert run_command(["plan", str(job)]) == 0
    said = capsys.readouterr().out
    assert "optimiser" in said and f"{plan['parameters']:,} parameters" in said


def test_no_weights_are_brought_from_the_hub_for_a_plan(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here = plan_from_config(tiny_job(tiny_model_dir, tmp_path, compute__gpusPerWorker=0), tmp_path / "here")
    with serve_hub("acme/tiny", tiny_model_dir) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        job = tiny_job(tiny_model_dir, tmp_path, compute__gpusPerWorker=0, model__source="hf://acme/tiny")
        assert plan_from_config(job, tmp_path / "cache") == here
    assert {"config.json", "tokenizer.json"} <= set(hub.downloads())
    assert "model.safetensors" not in hub.downloads()


def test_no_weights_are_brought_from_a_bucket_for_a_plan(
    tiny_model_dir: Path, tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
):
    here = plan_from_config(tiny_job(tiny_model_dir, tmp_path, compute__gpusPerWorker=0), tmp_path / "here")
    for name, value in server.keys.items():
        monkeypatch.setenv(name, value)
    bucket = server.make_bucket()
    for file in tiny_model_dir.iterdir():
        server.client().upload_file(str(file), bucket, f"tiny/{file.name}")
    output = {"uri": f"s3://{bucket}/results", "endpoint": server.url}
    changes = {"compute__gpusPerWorker": 0, "model__source": f"s3://{bucket}/tiny", "output": output}
    job = tiny_job(tiny_model_dir, tmp_path, **changes)
    assert plan_from_config(job, tmp_path / "cache") == here
    brought = {file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert {"config.json", "tokenizer.json"} <= brought
    assert "model.safetensors" not in brought


def test_command_says_of_a_job_that_trains_nothing_that_it_does(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    job = tmp_path / "job.json"
    start = {"model__startFrom": {"source": (tmp_path / "model").as_uri()}}
    document = tiny_document(tiny_model_dir, tmp_path, training__epochs=0, **start)
    del document["spec"]["training"]["maxSteps"]
    job.write_text(json.dumps(document))
    assert run_command(["plan", str(job), "--output", "json", "--gpu-memory", "1Ki"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["trainableParameters"] == 0 and "memory" not in plan and not plan.get("warnings")
    assert run_command(["plan", str(job)]) == 0
    said = capsys.readouterr().out
    assert "nothing is trained (spec.training.epochs: 0)" in said and "optimiser" not in said


def test_command_names_the_script_that_may_make_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    job = tmp_path / "job.json"
    job.write_text(json.dumps(tiny_document(tmp_path / "prepared" / "model", tmp_path)))
    for command in ("plan", "check"):
        assert run_command([command, str(job)]) == ExitCode.BAD_SPEC
        assert "prepare.py" not in capsys.readouterr().err
    (tmp_path / "prepare.py").touch()
    for command in ("plan", "check", "run"):
        assert run_command([command, str(job)]) == ExitCode.BAD_SPEC
        said = capsys.readouterr().err
        assert "prepared/model" in said
        assert f"prepare.py beside the job may make it: python {tmp_path / 'prepare.py'}" in said
    (tmp_path / "prepared" / "model").mkdir(parents=True)
    assert run_command(["plan", str(job)]) == ExitCode.BAD_DATA
    said = capsys.readouterr().err
    assert "prepared/model has no config.json" in said
    assert "prepare.py" not in said, "what is there is at fault"
