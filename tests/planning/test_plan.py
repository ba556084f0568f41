"""The planner: its formulas against autograd and against each other, the settings it names, and its
predictions against measured runs.
"""

import json
import random
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from rlfr_vlm.cli import main
from rlfr_vlm.config import LoraConfig, ModelConfig, load_config, parse_config
from rlfr_vlm.errors import UserError
from rlfr_vlm.models.pack import pack
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.planning import memory
from rlfr_vlm.planning.calibrate import Bench, layer_operations, step_seconds
from rlfr_vlm.planning.footprint import disk, predict
from rlfr_vlm.planning.memory import GIB, BatchShape, Machine
from rlfr_vlm.planning.plan import as_text, find_machine, find_overrides, find_shortfalls, plan
from rlfr_vlm.planning.shapes import PUBLISHED, read_shape
from rlfr_vlm.planning.workload import typical_prompt
from rlfr_vlm.types import EncodedPrompt, Prompt, Rollout
from tests import tiny_models
from tests.runs import ROOT

RECIPES = sorted((ROOT / "scripts").glob("*/rl*.yaml")) + sorted(
    (ROOT / "scripts").glob("*/flowrl.yaml")
)
GPU = Machine("cuda", 80.0 * GIB, 0.6 * GIB, 0.9 * GIB, True)
CPU = Machine("cpu", 24.0 * GIB, 0.6 * GIB, 0.9 * GIB, True)
SEVEN = ROOT / "scripts/qwen2.5-math-7b/rlfr.yaml"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as done:
        main(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    return done.value.code, captured.out, captured.err


def config(path=SEVEN, *overrides):
    return load_config(path, overrides)


def trainer(cfg, machine=GPU, shape=None):
    return predict(cfg, shape or read_shape(cfg.model.path), machine)[0]


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"),  # as the models' cards say
    [
        ("Qwen/Qwen2.5-Math-1.5B", 1.54),
        ("Qwen/Qwen2.5-Math-7B", 7.61),
        ("Qwen/Qwen2.5-7B", 7.61),
        ("meta-llama/Llama-3.1-8B", 8.03),
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3.75),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8.29),
    ],
)
def test_published_sizes(name, billions):
    assert read_shape(name).parameters / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "llama", "mistral", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
)
def test_sizes_are_those_of_the_weights(family, model_folder):
    weights = {}
    for file in (tiny_models.Path(model_folder(family))).glob("*.safetensors"):
        weights |= load_file(file)
    assert read_shape(model_folder(family)).parameters == pytest.approx(
        sum(w.numel() for w in weights.values()), rel=0.02
    )


def test_adapters_are_counted_as_peft_makes_them(model_folder):
    pytest.importorskip("peft")
    cfg = LoraConfig(rank=4)
    policy = Policy(
        ModelConfig(path=model_folder("qwen2"), dtype="float32", device="cpu", lora=cfg)
    )
    assert read_shape(model_folder("qwen2")).adapters(4, cfg.targets) == sum(
        p.numel() for p in policy.trained().values()
    )


def test_every_recipe_names_a_model_of_the_table():
    assert {config(path).model.path for path in RECIPES} <= set(PUBLISHED)


# -- activations against autograd ------------------------------------------------------------------


def saved_bytes(policy: Policy, batch: BatchShape) -> int:
    """What autograd keeps of a forward, but for the weights."""
    prompts = []
    for i in range(int(batch.prompts)):
        ids = tuple(10 + n % 300 for n in range(batch.prompt))
        prompts.append(
            EncodedPrompt(
                Prompt(str(i), (), (), ""), ids, ids, torch.arange(batch.prompt)[None], (), {}
            )
        )
    group = int(batch.samples / batch.prompts)
    ids = tuple(20 + n % 300 for n in range(batch.response))
    rollouts = [
        Rollout(p, i, ids, (0.0,) * len(ids), "", "length", 0)
        for p in prompts
        for i in range(group)
    ]
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (
                storage.nbytes(),
                tensor,
            )  # held, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.forward(pack(rollouts), 1.0, None, True)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "prompt", "response"), [("llama", 60, 100), ("qwen3", 60, 100), ("qwen2", 300, 400)]
)
def test_activations_are_what_autograd_keeps(family, prompt, response, dtype, lora, model_folder):
    if lora:
        pytest.importorskip("peft")
    model = {"path": model_folder(family, hidden=128), "dtype": dtype, "device": "cpu"} | (
        {"lora": {"rank": 8}} if lora else {}
    )
    cfg = parse_config({"output_dir": "x", "model": model})
    batch = BatchShape(prompt, response, 2, 6, 1)
    found = memory.activations(cfg, read_shape(cfg.model.path), batch, "cpu")
    assert found == pytest.approx(saved_bytes(Policy(cfg.model), batch), rel=0.05)


def test_checkpointing_keeps_little():
    cfg, shape = config(), read_shape("Qwen/Qwen2.5-Math-7B")
    batch = memory.micro_batch(cfg, 16384)
    whole = memory.activations(
        config(SEVEN, 'model.gradient_checkpointing="off"'), shape, batch, "cuda"
    )
    assert memory.activations(cfg, shape, batch, "cuda") < whole / 8


def test_a_micro_batch_is_as_full_as_the_budget():
    cfg = config(
        SEVEN,
        "data.max_prompt_tokens=100",
        "rollout.max_new_tokens=50",
        "rollout.num_prompts=8",
        "algorithm.updates_per_rollout=1",
    )
    assert memory.micro_batch(cfg, 1000) == BatchShape(100, 50, 2, 16, 16)
    assert memory.micro_batch(cfg, 200) == BatchShape(100, 50, 1, 2, 2)
    assert memory.micro_batch(cfg, 1).tokens == 150  # a single sample goes alone
    assert memory.micro_batch(cfg, 10**6).tokens == memory.update_tokens(cfg) == 8 * (100 + 8 * 50)


# -- sharding, adapters, engines -------------------------------------------------------------------


def sharded(ranks, stage, offload="none"):
    return config(
        SEVEN,
        f"deepspeed.ranks={ranks}",
        f"deepspeed.zero_stage={stage}",
        f"deepspeed.offload={offload}",
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_holds_what_one_process_does(stage):
    shape = read_shape("Qwen/Qwen2.5-Math-7B")
    (alone, _), (rank, host) = memory.held(config(), shape), memory.held(sharded(1, stage), shape)
    assert {name: rank[name] for name in alone} == alone
    assert not host


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_share_what_the_stage_says(stage):
    shape = read_shape("Qwen/Qwen2.5-Math-7B")
    (one, _), (four, _) = (
        memory.held(sharded(1, stage), shape),
        memory.held(sharded(4, stage), shape),
    )
    for part, shared in (
        ("optimiser", stage >= 1),
        ("gradients", stage >= 2),
        ("weights", stage >= 3),
    ):
        assert four[part] * (4 if shared else 1) == one[part], part


def test_more_ranks_and_stages_never_take_more():
    peaks = [trainer(sharded(ranks, 3)).peak for ranks in (2, 4, 8, 16)]
    assert all(a > b for a, b in pairwise(peaks))
    peaks = [trainer(sharded(8, stage)).peak for stage in (0, 1, 2, 3)]
    assert all(a > b for a, b in pairwise(peaks))


@pytest.mark.parametrize(("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "all")])
def test_offloading_moves_and_loses_nothing(stage, offload):
    shape = read_shape("Qwen/Qwen2.5-Math-7B")
    here, none = memory.held(sharded(4, stage), shape)
    device, host = memory.held(sharded(4, stage, offload), shape)
    assert not none
    assert sum(device.values()) + sum(host.values()) == pytest.approx(sum(here.values()))
    assert trainer(sharded(4, stage, offload)).peak < trainer(sharded(4, stage)).peak
    by_host = predict(sharded(4, stage, offload), shape, GPU)[-1].phases["loading"]
    assert sum(size for name, size in by_host.items() if name.startswith("offloaded")) == 4 * sum(
        host.values()
    )


def test_adapters_learn_alone():
    lora = trainer(config(SEVEN, "model.lora.rank=16"))
    whole = trainer(config())
    assert lora.phases["update"]["optimiser"] < whole.phases["update"]["optimiser"] / 100
    assert lora.phases["update"]["weights"] == whole.phases["update"]["weights"]


def test_an_engine_beside_the_trainer_sleeps_or_does_not():
    asleep, awake = (
        trainer(config(SEVEN, f"rollout.vllm.sleep={value}")) for value in ("true", "false")
    )
    share = asleep.phases["rollout"]["engine weights"] + asleep.phases["rollout"]["KV cache"]
    assert share == pytest.approx(0.3 * GPU.memory)
    assert sum(awake.phases["update"].values()) - sum(
        asleep.phases["update"].values()
    ) == pytest.approx(share)
    assert asleep.peak == max(sum(parts.values()) for parts in asleep.phases.values())


def test_engines_of_their_own_have_a_table():
    cfg = config(
        SEVEN,
        "launcher=ray",
        "ray.engines=2",
        "rollout.vllm.tensor_parallel=2",
        "rollout.vllm.gpu_memory_utilization=0.9",
    )
    first, engines, host = predict(cfg, read_shape(cfg.model.path), GPU)
    assert (engines.name, engines.count, host.name) == ("engine", 4, "host")
    assert "KV cache" not in first.phases["rollout"] and engines.phases["rollout"][
        "engine weights"
    ] == pytest.approx(7615283200)


def test_the_reference_and_the_field_are_counted():
    parts = trainer(config(SEVEN, "algorithm.kl.coef=0.1")).phases["update"]
    assert parts["reference"] == parts["weights"]
    assert parts["flow field"] + parts["flow gradients"] == 477266944 * 16
    assert (
        trainer(config(SEVEN, "flow.online.enabled=false")).phases["update"]["flow field"]
        == 477266944 * 4
    )


def test_checkpoints_on_disk_by_hand():
    parts = disk(config(SEVEN), read_shape("Qwen/Qwen2.5-Math-7B"))
    each = 7615283200 * (2 + 12) + 477266944 * 12
    assert parts.pop("exported model") == 7615283200 * 2
    assert parts.pop("rollouts") == 330 * 4 * 8 * 1024 * 60
    ((name, size),) = parts.items()
    assert (
        name == f"checkpoints: 4 of {each / GIB:.2f} GiB" and size == 4 * each
    )  # 3 are kept, one more is being written


# -- fitting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_is_planned_without_weights_and_what_is_named_makes_it_fit(
    path, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    given = ("--config", path, "--no-calibrate", "--device-memory", 80, "--format", "json")
    code, out, err = run(capsys, *given, "model.device=cuda")
    found = json.loads(out)
    assert (code, found["fits"]) in ((0, True), (2, False)), err
    if not found["fits"]:
        code, out, _ = run(capsys, *given, "model.device=cuda", *found["overrides"])
        assert code == 0 and json.loads(out)["fits"]


@pytest.mark.parametrize(
    ("memory", "overrides", "expected"),
    [
        (80, ['model.gradient_checkpointing="off"', "train.tokens_per_microbatch=65536", "model.path=Qwen/Qwen2.5-Math-1.5B", "flow=null"],
         "train.tokens_per_microbatch="),
        (14, ['model.gradient_checkpointing="off"', "train.tokens_per_microbatch=4096", "model.path=Qwen/Qwen2.5-Math-1.5B", "flow=null",
              "model.lora.rank=8"], "model.gradient_checkpointing=nonreentrant"),
        (64, ["rollout.vllm.sleep=false", "rollout.vllm.gpu_memory_utilization=0.6", "model.path=Qwen/Qwen2.5-Math-1.5B", "flow=null"],
         "rollout.vllm.sleep=true"),
        (80, [], "launcher=ray deepspeed.ranks=4 deepspeed.zero_stage=2"),
        (80, ["launcher=ray", "deepspeed.ranks=4", "deepspeed.zero_stage=0"], "deepspeed.zero_stage="),
        (80, ["rollout.vllm.gpu_memory_utilization=0.15", "model.lora.rank=8"], "rollout.vllm.gpu_memory_utilization="),
    ],
)  # fmt: skip
def test_the_knob_that_is_named(memory, overrides, expected):
    machine = Machine("cuda", memory * GIB, 0.6 * GIB, 0.9 * GIB, True)

    def vary(more):
        return load_config(SEVEN, (*overrides, *more))

    shape = read_shape(vary(()).model.path)
    assert find_shortfalls(vary(()), shape, machine, predict(vary(()), shape, machine))
    assert " ".join(find_overrides(vary, shape, machine)).startswith(expected)


def test_ranks_do_not_help_on_one_cpu():
    """They share its memory; where nothing helps, that is said."""
    tiny = Machine("cpu", 1.0 * GIB, 0.6 * GIB, 0.9 * GIB, False)
    assert (
        find_overrides(
            lambda more: load_config(SEVEN, tuple(more)), read_shape("Qwen/Qwen2.5-Math-7B"), tiny
        )
        is None
    )


def test_what_does_not_fit_ends_with_2_and_says_why(tmp_path, capsys):
    code, out, _ = run(
        capsys,
        "--config",
        SEVEN,
        "--no-calibrate",
        "--device-memory",
        80,
        "model.device=cuda",
        f"output_dir={tmp_path}",
    )
    assert code == 2
    assert (
        "does not fit: each trainer device needs" in out
        and "with this it fits: launcher=ray deepspeed.ranks=4" in out
    )
    rows = [line.split() for line in out.splitlines() if line.startswith("  ") and "GiB" in line]
    update = [
        float(row[-2].replace(",", ""))
        for row in rows[: next(i for i, row in enumerate(rows) if row[0] == "together")]
        if row[-1] == "GiB"
    ]
    assert update[0] == max(update)  # the largest part first


def test_unknown_models_need_a_config(tmp_path, capsys):
    given, model = (
        ("--config", SEVEN, "--no-calibrate", "--device-memory", 80),
        ("model.device=cuda", "model.path=some/model"),
    )
    code, _, err = run(capsys, *given, *model)
    assert (
        code == 2
        and "model.path: the sizes of `some/model` are not known here" in err
        and "--model-config FILE" in err
    )
    file = tmp_path / "config.json"
    for text, message in (
        (None, "No such file"),
        ("{", "not JSON"),
        ("{}", "does not have the sizes"),
        ('{"num_experts": 8}', "does not"),
    ):
        if text is not None:
            file.write_text(text)
        code, _, err = run(capsys, *given, "--model-config", file, *model)
        assert code == 2 and message in err, err
    file.write_text(json.dumps(PUBLISHED["Qwen/Qwen2.5-Math-1.5B"]))
    code, out, _ = run(capsys, *given, "--model-config", file, "--format", "json", *model)
    assert code == 0 and json.loads(out)["shape"]["hidden"] == 1536


def test_a_gpu_that_is_not_here_needs_its_memory(monkeypatch):
    monkeypatch.setattr("rlfr_vlm.planning.plan.gpu_memory", lambda: None)
    with pytest.raises(UserError, match="--device-memory GIB"):
        find_machine(config(SEVEN, "model.device=cuda"), None, False)
    assert find_machine(config(), None, False).kind == "cpu"
    monkeypatch.setattr("rlfr_vlm.planning.plan.gpu_memory", lambda: 80 * GIB)
    assert find_machine(config(), None, False).memory == 80 * GIB
    assert find_machine(config(SEVEN, "model.device=cpu"), 16, False).memory == 16 * GIB


def test_planning_without_calibration_is_light():
    code = (
        "import sys\nfrom rlfr_vlm.cli import main\n"
        "try: main(['plan', '--config', 'scripts/qwen2.5-math-1.5b/rlfr.yaml', '--no-calibrate', "
        "'--device-memory', '80', 'model.device=cuda'])\n"
        "except SystemExit as done: assert done.code == 0, done.code\n"
        "assert not {'torch', 'transformers', 'numpy', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


# -- time ------------------------------------------------------------------------------------------


def test_every_part_of_a_step_is_timed(model_folder):
    path = ROOT / "scripts/qwen2.5-math-1.5b/rlfr.yaml"
    small = [
        "data.max_prompt_tokens=32",
        "rollout.max_new_tokens=32",
        "rollout.num_prompts=4",
        "algorithm.kl.coef=0.1",
    ]
    cfg = config(
        path,
        *small,
        f"model.path={model_folder('qwen2')}",
        "model.dtype=float32",
        "algorithm.updates_per_rollout=2",
    )
    shape = read_shape(cfg.model.path)
    state = torch.get_rng_state()
    found = step_seconds(cfg, shape, CPU, vllm=False)
    assert found is not None and list(found) == ["rollout", "score", "reference", "update", "flow"]
    assert all(0 < seconds < 600 for seconds in found.values())
    assert torch.equal(torch.get_rng_state(), state)
    if not torch.cuda.is_available():
        assert step_seconds(cfg, shape, GPU, vllm=False) is None


def test_the_clock_of_a_cpu_does_not_run_while_others_do():
    bench = Bench(read_shape("Qwen/Qwen2.5-Math-1.5B"), torch.device("cpu"), torch.float32, 1e9)
    assert bench.seconds(lambda: time.sleep(0.2)) < 0.05
    start = time.process_time()
    calls = []

    def work():
        began = time.process_time()
        while time.process_time() - began < 0.05:
            pass
        calls.append(None)

    assert 0.05 <= bench.seconds(work) <= (time.process_time() - start) / len(calls) + 0.01


def test_threads_share_the_time_and_are_as_before(model_folder):
    cfg = config(SEVEN, f"model.path={model_folder('qwen2')}", "model.dtype=float32")
    shape, threads = read_shape(cfg.model.path), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = step_seconds(cfg, shape, CPU, vllm=False)
        torch.set_num_threads(4)
        four = step_seconds(cfg, shape, CPU, vllm=False)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)
    assert 2 < sum(alone.values()) / sum(four.values()) < 8, "a quarter, but for noise"


@pytest.mark.parametrize(("path", "weighed"), [(SEVEN, False), (None, True)])
def test_libraries_are_weighed_only_where_they_weigh(path, weighed, model_folder, monkeypatch):
    asked = []
    monkeypatch.setattr("rlfr_vlm.planning.plan.imported_bytes", asked.append)
    monkeypatch.setattr("rlfr_vlm.planning.calibrate.step_seconds", lambda *_: {"update": 1.0})
    small = ["model.device=cpu", "rollout.engine=hf"]
    if path is None:
        small += [f"model.path={model_folder('qwen2')}", "output_dir=x", "model.dtype=float32"]
    found = plan(lambda more: config(path, *small, *more))
    assert bool(asked) == weighed
    assert found.threads == torch.get_num_threads()
    assert "CPU time of one thread" in as_text(found)


def test_operations_of_a_layer_by_hand():
    shape = read_shape("Qwen/Qwen2.5-Math-1.5B")
    weights = 2 * 1536 * (1536 + 256) + 3 * 1536 * 8960
    assert shape.layer == weights
    assert layer_operations(shape, BatchShape(10, 5, 1, 2, 2)) == 2 * weights * 20 + 4 * 1536 * (
        10 * 10 + 2 * 5 * 15
    )


def test_typical_prompts_are_read_from_the_data(tmp_path):
    cfg = config(
        SEVEN, f"data.train={tmp_path}/rows.jsonl", "data.system=''", "data.max_prompt_tokens=500"
    )
    shape, seeing = read_shape(cfg.model.path), read_shape("Qwen/Qwen2.5-VL-3B-Instruct")
    assert typical_prompt(cfg, shape) == 500  # nothing is there yet
    Image.new("RGB", (280, 280)).save(tmp_path / "a.png")
    rows = [
        {"prompt": "x" * 35, "answer": "y" * 350},
        {"messages": [{"role": "", "content": "x" * 105}], "images": ["a.png", "gone.png"]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert typical_prompt(cfg, shape) == 16 + 20
    largest = cfg.data.max_pixels / 28**2
    assert typical_prompt(cfg.model_copy(), seeing) == round(16 + 20 + (100 + largest) / 2)
    for text in ("{", "[1]"):
        (tmp_path / "rows.jsonl").write_text(text)
        assert typical_prompt(cfg, shape) == 500


# -- measured runs ---------------------------------------------------------------------------------

WORDS = (
    "apples",
    "picture",
    "length",
    "area",
    "first",
    "second",
    "then",
    "because",
    "triangle",
    "square",
    "reason",
    "step",
    "answer",
)
# family: (hidden, layers, heads, key heads, MLP, vocabulary, tied)
MODELS = {
    "llama": (768, 10, 12, 4, 2048, 32000, True),
    "qwen2": (768, 8, 12, 2, 3072, 50000, False),
    "qwen3": (512, 8, 8, 4, 1536, 16000, True),
    "qwen2_5_vl": (768, 6, 12, 2, 2048, 32000, False),
}
TOWER = {
    "depth": 6,
    "hidden_size": 512,
    "num_heads": 8,
    "intermediate_size": 1408,
    "patch_size": 14,
    "window_size": 112,
}
MEASURED = {  # model, overrides
    "float32 with flow": ("llama", ["train.tokens_per_microbatch=1024"]),
    "bfloat16 with master weights, checkpointed, one large micro-batch": (
        "qwen2",
        ["flow=null", "model.dtype=bfloat16", "model.gradient_checkpointing=nonreentrant", "train.tokens_per_microbatch=8192"],
    ),
    "bfloat16 without master weights": (
        "qwen2",
        ["flow=null", "model.dtype=bfloat16", "model.master_weights=false", "train.tokens_per_microbatch=1024"],
    ),
    "pictures": (
        "qwen2_5_vl",
        ["data.max_prompt_tokens=320", "data.max_pixels=200704", "model.freeze_vision=false", "rollout.max_new_tokens=48",
         "train.tokens_per_microbatch=768"],
    ),
    "reference policy, small micro-batches": ("llama", ["flow=null", "algorithm.kl.coef=0.01", "train.tokens_per_microbatch=384"]),
    "long responses": (
        "qwen3", ["flow=null", "rollout.num_prompts=1", "rollout.group_size=3", "rollout.max_new_tokens=512", "train.tokens_per_microbatch=2048"]
    ),
    "many requests, HF engine": (
        "qwen3",
        ["flow=null", "rollout.num_prompts=16", "rollout.group_size=8", "rollout.max_new_tokens=16", "train.tokens_per_microbatch=512"],
    ),
    "vLLM": ("qwen2", ["flow=null", "model.dtype=bfloat16", "rollout.engine=vllm", "train.tokens_per_microbatch=512"]),
    "adapters": ("qwen2", ["flow=null", "model.dtype=bfloat16", "model.lora.rank=16", "train.tokens_per_microbatch=2048"]),
}  # fmt: skip


def make_model(family: str, folder) -> str:
    """A random model large enough that its parts outweigh the libraries."""
    import transformers

    hidden, layers, heads, key_heads, inner, vocab, tied = MODELS[family]
    tokenizer = tiny_models.tiny_tokenizer()
    sizes = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    sizes |= {
        "num_key_value_heads": key_heads,
        "intermediate_size": inner,
        "max_position_embeddings": 4096,
    }
    ids = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "qwen2_5_vl":
        text = tiny_models._text_config(tokenizer, tied, hidden, layers, [8, 12, 12]) | sizes
        tower = {**TOWER, "out_hidden_size": hidden, "fullatt_block_indexes": [2, 5]}
        cfg = transformers.Qwen2_5_VLConfig(
            text_config=text,
            vision_config=tower,
            tie_word_embeddings=tied,
            **tiny_models._vision_ids(tokenizer),
        )
        reader = transformers.Qwen2_5_VLProcessor(
            transformers.Qwen2VLImageProcessor(),
            tokenizer,
            transformers.Qwen2VLVideoProcessor(),
            chat_template=tiny_models.CHAT_TEMPLATE,
        )
        return str(
            tiny_models._save(
                folder,
                transformers.Qwen2_5_VLForConditionalGeneration,
                cfg,
                tokenizer,
                0,
                "float32",
                reader,
            )
        )
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    more = {"head_dim": hidden // heads} if family == "qwen3" else {}
    cfg = getattr(transformers, f"{name}Config")(**sizes, **ids, tie_word_embeddings=tied, **more)
    dtype = "bfloat16" if family == "qwen2" else "float32"
    return str(
        tiny_models._save(
            folder, getattr(transformers, f"{name}ForCausalLM"), cfg, tokenizer, 0, dtype
        )
    )


def make_rows(folder, pictures: bool) -> None:
    """Prompts a little shorter than the limit of 188 tokens, or 320 with a picture of 256."""
    draw = random.Random(0)
    rows = []
    for i in range(32):
        row = {
            "id": f"r{i}",
            "prompt": "<image>" * pictures
            + " ".join(draw.choice(WORDS) for _ in range(20 if pictures else 75)),
            "answer": str(i),
        }
        if pictures:
            Image.effect_noise((448, 448), 80).convert("RGB").save(folder / f"{i}.png")
            row["images"] = [f"{i}.png"]
        rows.append(row)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def peak_of_a_run(path, overrides) -> float:
    """Bytes of main memory that a real run held at most, in a process of its own."""
    code = (
        "import atexit, re, sys\nfrom rlfr_vlm.cli import main\n"
        "atexit.register(lambda: print('PEAK', re.search(r'VmHWM:\\s+(\\d+)', "
        "open('/proc/self/status').read())[1]))\n"
        "main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--config", str(path), *overrides],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split("PEAK")[-1]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_the_predicted_peak_is_near_the_measured_one(name, tmp_path, monkeypatch):
    """Within 15 %, from the config and the size of the libraries alone."""
    family, overrides = MEASURED[name]
    if "rollout.engine=vllm" in overrides:
        pytest.importorskip("vllm")
    if any("lora" in setting for setting in overrides):
        pytest.importorskip("peft")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_rows(tmp_path, family == "qwen2_5_vl")
    tree = {
        "output_dir": str(tmp_path / "run"),
        "model": {
            "path": make_model(family, tmp_path / "model"),
            "dtype": "float32",
            "device": "cpu",
        },
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_prompt_tokens": 188},
        "rollout": {
            "engine": "hf",
            "num_prompts": 2,
            "group_size": 4,
            "max_new_tokens": 96,
            "ignore_eos": True,
        },
        "reward": {"answer": "text", "max_error_frac": 1.0, "grader": {"workers": 1}},
        "flow": {"online": {"select": []}},
        "train": {"steps": 2, "save_steps": 2},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))

    cfg = load_config(path, tuple(overrides))
    predicted = predict(cfg, read_shape(cfg.model.path), find_machine(cfg, None, True))[0].peak
    measured = peak_of_a_run(path, overrides)
    print(
        f"\n{name}: predicted {predicted / 2**20:,.0f} MiB, measured {measured / 2**20:,.0f} MiB, "
        f"ratio {predicted / measured:.2f}"
    )
    assert predicted == pytest.approx(measured, rel=0.15)
