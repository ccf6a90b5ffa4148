"""The recipes as a user starts them: every YAML file, and the first steps of every script on data made here."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from launch import ROOT, accelerate_launch, run_launcher, run_script
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_lsam.card import facts_of_run
from recipes.causal_lm import train as causal_lm
from recipes.common import recipe as recipes
from recipes.common.configuration import parse_configuration
from recipes.common.image_batches import normalize
from recipes.common.image_data import scale
from recipes.common.methods import METHODS, training_arguments
from recipes.common.models import byte_tokenizer, load_model
from recipes.common.records import RecordArguments, load_records, read_records
from recipes.image_classification import train as image_classification
from recipes.seq2seq import train as seq2seq
from recipes.seq2seq.example_data import in_words
from recipes.sft import train as sft
from recipes.token_classification import train as token_classification
from scripts.common.launches import in_folders_of_their_own
from scripts.common.simulated import SimulatedRuns
from scripts.experiments.measure_recipe import best_rate
from scripts.experiments.simulate_scale import Run
from scripts.tools import write_tables
from scripts.tools.summarize_results import method_label

RECIPES = ROOT / "recipes"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
THROUGH_TRAINER = [name for name in recipes.names() if hasattr(recipes.load(name), "TRAINERS")]


def command_line(recipe: str, method: str, folder: Path, /, **values) -> list[str]:
    """The recipe's own YAML file, and on top of it what makes its run short."""
    short = recipes.FEW_STEPS | ({"sync_steps": 2} if method == "lsam" else {}) | {"output_dir": folder, **values}
    words = ["--config", str(RECIPES / recipe / f"{method}.yaml")]
    for key, value in short.items():
        words += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def parse(recipe: str, words: list[str]) -> dict:
    return parse_configuration(recipes.load(recipe).KEYS, words)


def start(recipe: str, method: str, folder: Path, /, **values) -> dict:
    """The results of a run in this process."""
    return recipes.load(recipe).run(parse(recipe, command_line(recipe, method, folder, **values)))


def launch(recipe: str, method: str, folder: Path, **values) -> dict:
    """The results of a run of two workers."""
    script = Path(recipes.load(recipe).__file__)
    done = accelerate_launch(script, *command_line(recipe, method, folder, num_workers=2, **values), fork=True)
    assert str(folder) in done.stdout
    return json.loads((folder / "results.json").read_text())


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def check_lsam(results: dict, workers: int, key: str) -> None:
    """What every run of LSAM reports."""
    assert results["num_workers"] == workers
    assert results["steps_per_worker"] == [4] * workers
    assert results["anchor_version"] >= 1
    assert len(results[f"{key}_workers"]) == workers
    assert [step for step, _ in results["curves"][key]] == [0, 2, 4, 4]
    assert results["curves"][key][-1][1] == results[key]
    assert results["configuration"]["sync_steps"] == 2
    assert {"commit", "date", "versions", "hardware"} <= set(results)


# --- the YAML files ---


FILES = sorted(path for recipe in THROUGH_TRAINER for path in RECIPES.glob(f"{recipe}/*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_yaml_file_has_known_keys_and_is_what_its_name_says(path):
    values = parse(path.parent.name, ["--config", str(path)])
    assert values["method"] == (path.stem if path.stem in METHODS else "lsam")
    assert values["output_dir"].startswith("runs/")
    if values["num_workers"] is None and not values.get("bf16"):  # bfloat16 asks for a GPU
        training_arguments(values, recipes.load(path.parent.name).TRAINERS)


@pytest.mark.parametrize("recipe", THROUGH_TRAINER)
def test_the_methods_of_a_recipe_differ_in_the_method_alone(recipe):
    own = ("method", "output_dir", "sam_rho", "sync_steps", "coupling_strength")
    runs = [parse(recipe, ["--config", str(RECIPES / recipe / f"{name}.yaml")]) for name in ("lsam", "ddp_sam", "ddp")]
    common = [{key: value for key, value in run.items() if key not in own} for run in runs]
    assert common[0] == common[1] == common[2]
    assert runs[0]["sam_rho"] == runs[1]["sam_rho"]


FOR_THE_HUB = [path.parent.name for path in sorted(RECIPES.glob("*/hub.yaml"))]


@pytest.mark.parametrize("recipe", FOR_THE_HUB)
def test_a_recipe_for_the_hub_says_what_to_do_without_one(tmp_path, recipe):
    words = ["--config", str(RECIPES / recipe / "hub.yaml"), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    values = parse(recipe, [*words, "--bf16", "false"])
    message = r"^`(dataset_name|model_name_or_path)` is \S+, which is no folder.*HF_HUB_OFFLINE.*README\.md says"
    with pytest.raises(ValueError, match=message) as error:
        recipes.load(recipe).run(values)
    assert str(error.value).split()[2].rstrip(",") in (values["dataset_name"], values["model_name_or_path"])


def on_the_hub(folder: Path, splits: dict[str, dict], features: Features | None = None, configuration: str = "default"):
    """A folder laid out as a data set on the Hub is: a file a split, and a card that says which configuration it is."""
    for split, columns in splits.items():
        path = folder / "data" / f"{split}.parquet"
        path.parent.mkdir(exist_ok=True, parents=True)
        Dataset.from_dict(columns, features=features).to_parquet(path)
    files = [{"split": split, "path": f"data/{split}.parquet"} for split in splits]
    card = yaml.safe_dump({"configs": [{"config_name": configuration, "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}---\n")


def model_on_the_hub(folder: Path, kind: type, configuration: type, **sizes) -> None:
    torch.manual_seed(0)
    kind(configuration(**sizes)).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


TOKENS = len(byte_tokenizer())
BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES = {key: value for key, value in LLAMA.items() if key != "model_type"} | {"vocab_size": TOKENS}


def hub_causal_lm(model: Path, data: Path) -> dict:
    model_on_the_hub(model, LlamaForCausalLM, LlamaConfig, **SIZES)
    lines = ["", " = A title = \n", "the cat sat on the mat and looked at the moon .\n"]
    splits = {"train": {"text": lines * 300}, "validation": {"text": lines * 50}, "test": {"text": lines}}
    on_the_hub(data, splits, configuration="wikitext-2-raw-v1")
    return {}


def hub_sft(model: Path, data: Path) -> dict:
    model_on_the_hub(model, LlamaForCausalLM, LlamaConfig, **SIZES)
    turns = [[("user", f"{a} + 1?"), ("assistant", str(a + 1))] for a in range(40)]
    chats = [[{"role": role, "content": text} for role, text in each] for each in turns]
    rows = {"source": ["sums"] * 40, "messages": chats, "num_turns": [1] * 40}
    on_the_hub(data, {"train": rows, "test": {name: column[:4] for name, column in rows.items()}})
    return {}


def hub_seq2seq(model: Path, data: Path) -> dict:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model_on_the_hub(model, T5ForConditionalGeneration, T5Config, vocab_size=TOKENS, **sizes)
    books = [{"en": f"the {n}th cat", "fr": f"le chat numéro {n}"} for n in range(40)]
    features = Features({"id": Value("string"), "translation": {"en": Value("string"), "fr": Value("string")}})
    rows = {"id": [str(n) for n in range(40)], "translation": books}
    on_the_hub(data, {"train": rows}, features, "en-fr")
    return {"eval_size": 4, "generation_max_length": 16}


def hub_token_classification(model: Path, data: Path) -> dict:
    model_on_the_hub(model, BertModel, BertConfig, vocab_size=TOKENS, **BERT)  # without a head
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    features = {"id": Value("string"), "tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))}
    rows = {"id": ["0"] * 40, "tokens": [["Anna", "Berg", "left", "Bonn"]] * 40, "ner_tags": [[1, 2, 0, 3]] * 40}
    on_the_hub(data, {"train": rows, "validation": rows, "test": rows}, Features(features))
    return {}


def hub_image_classification(model: Path, data: Path) -> dict:
    torch.manual_seed(0)
    sizes = {"image_size": 224, "patch_size": 32, "num_labels": 5, **BERT}  # a head for other classes than the data's
    ViTForImageClassification(ViTConfig(**sizes)).save_pretrained(model)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 20, 30, 3)).astype(np.uint8)
    rows = {"image": [Image.fromarray(each) for each in pixels] * 5, "label": [0, 1] * 20}
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["pizza", "soup"])})
    on_the_hub(data, {"train": rows, "validation": rows}, features)
    return {}


STAND_INS = {
    "causal_lm": hub_causal_lm,
    "sft": hub_sft,
    "seq2seq": hub_seq2seq,
    "token_classification": hub_token_classification,
    "image_classification": hub_image_classification,
}


@pytest.mark.parametrize("recipe", FOR_THE_HUB)
def test_a_recipe_for_the_hub_trains_on_what_lies_there(tmp_path, recipe):
    """Its YAML file as it is, with a small model and a few rows laid out as those it names."""
    model, data = tmp_path / "model", tmp_path / "data"
    own = STAND_INS[recipe](model, data)
    values = {"model_name_or_path": model, "dataset_name": data, "output_dir": tmp_path / "out", "use_cpu": True}
    values |= {"bf16": False, "max_steps": 2, "warmup_steps": 0, "sync_steps": 2, **own}
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    parsed = parse(recipe, ["--config", str(RECIPES / recipe / "hub.yaml"), *words])
    results = recipes.load(recipe).run(parsed)
    assert results["steps_per_worker"] == [2]
    assert results["anchor_version"] == 1
    assert np.isfinite(results["eval_loss"])
    assert results["eval_loss"] != results["eval_loss_before"]
    adapter = tmp_path / "out" / "adapter_model.safetensors"
    assert adapter.exists() == (parsed.get("use_lora") is True)
    weights = load_file(adapter if adapter.exists() else tmp_path / "out" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("recipe", recipes.names())
def test_every_recipe_trains_with_two_workers(tmp_path, monkeypatch, recipe):
    """By the command that it shows, on little data."""
    values = {**recipes.load(recipe, "smoke").smoke(tmp_path), "num_workers": 2, "output_dir": tmp_path / "out"}
    words = [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}" for key, value in values.items()]
    command = recipes.described(recipe)[1].replace("--num_processes 4", "--num_processes 2").split()
    assert command[:2] == ["accelerate", "launch"]
    monkeypatch.chdir(ROOT)
    # One of them as the shell would start it, for what is said when modules are imported.
    done = run_launcher([*command[2:], *words], fork=recipe != "text_classification")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["method"], results["num_workers"]) == ("lsam", 2)
    assert str(tmp_path / "out") in done.stdout
    for said in ("Warning", "values were not passed", "it/s", "0batch"):  # nothing that is not the user's business
        assert said not in done.stderr
    assert facts_of_run(tmp_path / "out").metrics
    assert facts_of_run(tmp_path / "out").method_name == "LSAM"


def test_the_lists_of_recipes_are_what_each_says_of_itself():
    pages = [RECIPES / "README.md", ROOT / "docs/getting_started.md"]
    before = [page.read_text() for page in pages]
    write_tables.write_lists()
    assert [page.read_text() for page in pages] == before
    for recipe in recipes.names():
        assert (RECIPES / recipe / "README.md").exists()
        command = recipes.described(recipe)[1].split()
        assert (ROOT / command[command.index("--config") + 1]).exists()


# --- causal language models, and chats ---


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and looked at the moon.\n" * 60)
    return path


@pytest.fixture
def chats(tmp_path) -> Path:
    def chat(a: int, b: int) -> dict:
        question, answer = f"{a} + {b}?", str(a + b)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    return write_lines(tmp_path / "chats.jsonl", [chat(a, b) for a in range(8) for b in range(5)])


def test_causal_lm_with_two_workers(tmp_path, text):
    results = launch("causal_lm", "lsam", tmp_path / "out", train_file=text, block_size=32, model_config=LLAMA)
    check_lsam(results, 2, "eval_loss")
    assert results["train_examples"] + results["eval_examples"] == (len(text.read_text()) + 1) // 32
    assert results["eval_perplexity"] == pytest.approx(np.exp(results["eval_loss"]))
    assert results["eval_loss"] < results["eval_loss_before"]

    # What lies in the folder is what was measured, and the tokenizer gives back what it was given.
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text.read_text()
    ids = torch.tensor([*ids, tokenizer.eos_token_id])
    blocks = ids[: len(ids) // 32 * 32].view(-1, 32)[-results["eval_examples"] :]
    with torch.no_grad():
        assert model(input_ids=blocks, labels=blocks).loss.item() == pytest.approx(results["eval_loss"], rel=1e-4)


@pytest.fixture
def pretrained(tmp_path) -> Path:
    """A model and its tokenizer as most of them lie on the Hub, in bfloat16."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **LLAMA))
    for part in (model.to(torch.bfloat16), tokenizer):
        part.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("recipe", ["causal_lm", "sft"])
def test_an_adapter_on_a_pretrained_model(tmp_path, pretrained, text, chats, recipe):
    own = (
        {"train_file": text, "block_size": 32}
        if recipe == "causal_lm"
        else {"train_file": chats, "bf16": False, "activation_checkpointing": False}
    )
    common = {"model_name_or_path": pretrained, "use_lora": True, "use_cpu": True, "max_steps": 2, "sync_steps": 2}
    common |= {"learning_rate": 1e-2, "report_to": "none", "save_strategy": "no", "output_dir": tmp_path / "out"}
    words = [word for key, value in (common | own).items() for word in (f"--{key}", str(value))]
    results = recipes.load(recipe).run(parse(recipe, words))
    # Rank-8 factors of q, k, v, o (16x16) and of the three layers of the MLP (16x32); the head is left alone.
    assert results["trainable_parameters"] == 8 * (4 * (16 + 16) + 3 * (16 + 32))
    assert results["eval_loss"] < results["eval_loss_before"]
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == results["trainable_parameters"]
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("method", ["ddp_sam", "ddp"])
def test_causal_lm_by_the_other_methods(tmp_path, text, method):
    results = start("causal_lm", method, tmp_path / "out", train_file=text, block_size=32, model_config=LLAMA)
    assert (results["method"], results["eval_loss_workers"]) == (method, None)
    assert results["eval_loss"] < results["eval_loss_before"]


@pytest.mark.parametrize("method", ["lsam", "ddp"])
def test_a_resumed_run_says_from_where_it_took_its_time(tmp_path, text, method):
    values = {"train_file": text, "block_size": 32, "model_config": LLAMA, "save_strategy": "steps", "save_steps": 2}
    whole = start("causal_lm", method, tmp_path / "out", **values, resume_from_checkpoint=False)
    assert whole["resumed_at_step"] == 0
    resumed = start(
        "causal_lm", method, tmp_path / "out", **values, resume_from_checkpoint=tmp_path / "out/checkpoint-2"
    )
    assert resumed["resumed_at_step"] == 2
    assert resumed["train_runtime_s"] > 0
    assert (
        f"{resumed['train_runtime_s']:.0f} s, since it was resumed at step 2"
        in (tmp_path / "out/README.md").read_text()
    )


@pytest.mark.parametrize(("recipe", "method"), [("seq2seq", "lsam"), ("sft", "ddp")])
def test_any_trainer_takes_the_optimizer_of_nesterovs_rule(tmp_path, recipe, method):
    values = recipes.load(recipe, "smoke").smoke(tmp_path)
    results = start(recipe, method, tmp_path / "out", **values, nesterov=True)
    assert results["eval_loss"] < results["eval_loss_before"]


def test_blocks_are_the_texts_in_order_with_an_end_after_each():
    tokenizer = byte_tokenizer()
    texts = Dataset.from_dict({"body": ["abcd", "", "ef", "ghijk"]})
    blocks = causal_lm.to_blocks(texts, "body", tokenizer, 4)
    joined = "".join(tokenizer.decode(ids) for ids in blocks["input_ids"])
    assert joined == "abcd</s>ef</s>ghij"[: len(joined)]
    assert [len(ids) for ids in blocks["input_ids"]] == [4, 4, 4]
    assert list(blocks["labels"]) == list(blocks["input_ids"])
    many = Dataset.from_dict({"body": ["abcdefgh", *[""] * 2000]})  # a whole batch of `Dataset.map` has no text
    assert len(causal_lm.to_blocks(many, "body", tokenizer, 4)) == 2
    with pytest.raises(ValueError, match=r"4 texts of column `body` do not fill one block of block_size=99"):
        causal_lm.to_blocks(texts, "body", tokenizer, 99)


def test_sft_leaves_its_chat_template(tmp_path, chats):
    results = start("sft", "lsam", tmp_path / "out", train_file=chats, max_length=64, model_config=LLAMA)
    check_lsam(results, 1, "eval_loss")
    assert (results["train_examples"], results["eval_examples"]) == (36, 4)
    assert results["eval_loss"] < results["eval_loss_before"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    question = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nhi</s>\n<|im_start|>assistant\n"


def test_sft_by_data_parallel_sam_counts_tokens_once(tmp_path, chats, monkeypatch):
    finished = []

    def kept(kind):
        class Kept(kind):
            def train(self, *positional, **keywords):
                finished.append(self)
                return super().train(*positional, **keywords)

        return Kept

    trainers = {method: (kept(kind), config) for method, (kind, config) in sft.TRAINERS.items()}
    monkeypatch.setattr(sft, "TRAINERS", trainers)
    for method in ("ddp_sam", "ddp"):
        short = {"train_file": chats, "max_length": 64, "model_config": LLAMA, "eval_strategy": "no"}
        results = start("sft", method, tmp_path / method, **short)
        assert results["method"] == method
        assert results["eval_loss"] < results["eval_loss_before"]
    sam, sgd = (
        [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry] for trainer in finished
    )
    assert sam == sgd
    assert sgd[-1] > 100


# --- sequence to sequence ---


@pytest.fixture
def pairs(tmp_path) -> Path:
    words = ["one", "two", "three", "four", "five", "six"]
    texts = [f"{a} {b}" for a in words for b in words]
    return write_lines(tmp_path / "pairs.jsonl", [{"source": text, "target": text.upper()} for text in texts])


def test_seq2seq_generates_and_scores(tmp_path, pairs):
    t5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    results = start(
        "seq2seq", "lsam", tmp_path / "out", train_file=pairs, model_config=t5, generation_max_length=16, eval_size=4
    )
    check_lsam(results, 1, "eval_chrf")
    assert (results["train_examples"], results["eval_examples"]) == (32, 4)
    assert results["eval_loss"] < results["eval_loss_before"]
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForSeq2SeqLM, AutoTokenizer))
    held_out = load_records(RecordArguments(train_file=str(pairs), eval_size=4), {"a": "source", "b": "target"})[1]
    said = model.generate(**tokenizer(held_out["source"][:], return_tensors="pt", padding=True), max_length=16)
    score = seq2seq.METRICS["chrf"](tokenizer.batch_decode(said, skip_special_tokens=True), held_out["target"][:])
    assert score == pytest.approx(results["eval_chrf"])


def test_what_is_tuned_on_was_not_held_out_and_is_not_trained_on(pairs):
    columns = {"a": "source"}
    train, held_out = load_records(RecordArguments(train_file=str(pairs), eval_size=4), columns)
    rest, judged = load_records(RecordArguments(train_file=str(pairs), eval_size=4, tuning=True), columns)
    assert (len(rest), len(judged), len(held_out)) == (28, 4, 4)
    assert not {*judged["source"]} & ({*held_out["source"]} | {*rest["source"]})
    assert {*judged["source"]} | {*rest["source"]} == {*train["source"]}


def test_metrics_of_generated_texts():
    assert seq2seq.exact_match(["a b ", "c"], ["a b", "d"]) == 0.5
    for name in ("bleu", "chrf"):
        assert seq2seq.METRICS[name](["the cat sat on the mat"], ["the cat sat on the mat"]) == pytest.approx(100)
        assert seq2seq.METRICS[name](["xyz"], ["the cat sat on the mat"]) == pytest.approx(0)


def test_an_unknown_metric_is_an_error(tmp_path, pairs):
    with pytest.raises(ValueError, match=r"`metric` must be one of exact_match, bleu, chrf, got 'rouge'"):
        start("seq2seq", "lsam", tmp_path / "out", train_file=pairs, metric="rouge")


# --- tags of words ---


def tagged() -> list[dict]:
    first, last = ["Anna", "Otto", "Lena", "Karl"], ["Berg", "Kahn", "Lang"]
    names = [(a, b) for a in first for b in last]
    tags = ["O", "O", "B-PER", "I-PER", "O", "B-LOC"]
    return [{"tokens": ["Yesterday", "saw", *name, "visit", "Cologne"], "tags": tags} for name in names]


def test_token_classification_of_minilm(tmp_path):
    path = write_lines(tmp_path / "entities.jsonl", tagged())
    held_out = write_lines(tmp_path / "held_out.jsonl", tagged()[:5])
    short = {"train_file": path, "validation_file": held_out, "use_lora": True, "max_steps": 4, "learning_rate": 5e-4}
    results = start("token_classification", "lsam", tmp_path / "out", **short)
    check_lsam(results, 1, "eval_f1")
    assert results["labels"] == ["B-LOC", "B-PER", "I-PER", "O"]
    assert results["eval_loss"] < results["eval_loss_before"]
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == results["trainable_parameters"]
    assert any("classifier" in name for name in saved)


def test_entities_are_spans():
    entities = token_classification.entities
    assert entities(["O", "B-PER", "I-PER", "B-PER", "O"]) == {("PER", 1, 3), ("PER", 3, 4)}
    assert entities(["I-LOC", "I-LOC", "I-PER"]) == {("LOC", 0, 2), ("PER", 2, 3)}
    assert entities(["NOUN", "NOUN", "O"]) == {("NOUN", 0, 1), ("NOUN", 1, 2)}
    assert entities([]) == set()
    scores = token_classification.entity_scores(
        [["B-PER", "I-PER", "O", "B-LOC"], ["O", "O"]], [["B-PER", "I-PER", "O", "B-PER"], ["B-LOC", "O"]]
    )
    assert scores == pytest.approx({"f1": 2 / 5, "precision": 1 / 2, "recall": 1 / 3, "accuracy": 4 / 6})


def test_a_word_is_labelled_at_its_first_token():
    sentences = Dataset.from_dict({"words": [["ab", "ab", "c"]], "tags": [["B-X", "O", "I-X"]]})
    row = token_classification.tokenize(sentences, byte_tokenizer(), ["O", "B-X", "I-X"], 32)[0]
    assert row["labels"] == [1, -100, 0, -100, 2, -100]


def test_bad_tags_are_errors(tmp_path):
    def load(train, held_out):
        files = [write_lines(tmp_path / f"{n}.jsonl", part) for n, part in enumerate((train, held_out))]
        arguments = token_classification.DataArguments(train_file=str(files[0]), validation_file=str(files[1]))
        return token_classification.load_sentences(arguments)

    good = {"tokens": ["a", "b"], "tags": ["O", "B-X"]}
    with pytest.raises(ValueError, match=r"Sentence 2 has 2 words in column `tokens` and 1 tags in .*'a b'"):
        load([good, {"tokens": ["a", "b"], "tags": ["O"]}], [good])
    with pytest.raises(
        ValueError, match=r"Sentence 1 has 'a b' in column `tokens`, which is no list.*a CSV holds none"
    ):
        load([{"tokens": "a b", "tags": "O O"}], [{"tokens": "a b", "tags": "O O"}])
    with pytest.raises(ValueError, match=r"Sentence 1 has \['O', None\] in column `tags`"):
        load([{"tokens": ["a", "b"], "tags": ["O", None]}], [good])
    numbers = {"tokens": ["a", "b"], "tags": [0, 3]}
    with pytest.raises(ValueError, match=r"Column `tags` holds numbers, and nothing says what they mean"):
        load([numbers], [numbers])
    with pytest.raises(ValueError, match=r"held-out tags that no training sentence has: 'B-Y' \(there: 'B-X', 'O'\)"):
        load([good], [{"tokens": ["a"], "tags": ["B-Y"]}])


def test_tags_that_the_data_set_names_keep_their_numbers(tmp_path):
    tags = ["O", "I-PER", "B-PER"]  # as CoNLL-2003 has them on the Hub: numbers, with names beside them
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=tags))})
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation"):
        rows = {"tokens": [["Anna", "Berg", "left"]], "ner_tags": [[2, 1, 0]]}
        Dataset.from_dict(rows, features=features).to_parquet(data / f"{split}.parquet")
    for source in ({"dataset_name": str(data)}, {"train_file": str(data / "train.parquet")}):
        if "train_file" in source:
            source["validation_file"] = str(data / "validation.parquet")
        arguments = token_classification.DataArguments(tags_column="ner_tags", **source)
        train, held_out, names = token_classification.load_sentences(arguments)
        assert names == tags
        assert train[0] == held_out[0] == {"words": ["Anna", "Berg", "left"], "tags": ["B-PER", "I-PER", "O"]}


# --- images ---


@pytest.fixture
def images(tmp_path) -> Path:
    """Dark and light noise in train/CLASS and test/CLASS, not all of one size."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, level in (("dark", 60), ("light", 180)):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                side = 8 + 2 * (number % 2)
                pixels = level + draw.integers(-50, 50, (side, side, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "images"


VIT = {"model_type": "vit", "image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32}
VIT |= {"num_hidden_layers": 1, "num_attention_heads": 2}


def test_a_vit_from_scratch(tmp_path, images):
    short = {"data_dir": images, "image_size": 8, "crop_padding": 1, "model_config": VIT, "learning_rate": 2e-3}
    results = start("image_classification", "lsam", tmp_path / "out", **short)
    check_lsam(results, 1, "eval_accuracy")
    assert (results["train_examples"], results["eval_examples"], results["labels"]) == (24, 12, ["dark", "light"])
    assert results["eval_loss"] < results["eval_loss_before"]

    from transformers import pipeline

    classify = pipeline("image-classification", model=str(tmp_path / "out"), device="cpu")
    files = sorted((images / "test").glob("*/*.png"))
    found = [classify(Image.open(file))[0]["label"] == file.parent.name for file in files]
    assert np.mean(found) == pytest.approx(results["eval_accuracy"], abs=0.1)  # its resizing is not the same


@pytest.mark.parametrize("shape", [(100, 149), (149, 100), (47, 90), (20, 31)])
def test_what_is_saved_prepares_images_as_evaluation_does(shape):
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3)).astype(np.uint8)
    photo = Image.fromarray(noise).resize(shape[::-1], Image.Resampling.BICUBIC)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    saved = image_classification.image_processor((24, 24), mean, std)(photo, return_tensors="pt")["pixel_values"]
    evaluated = normalize(scale(torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None], 24), mean, std)
    torch.testing.assert_close(saved, evaluated, atol=1.01 / 255 / 0.2, rtol=0)  # one level of the pixels


def test_a_network_of_timm_begins_as_timm_makes_it(tmp_path, images):
    config = {"model_type": "timm_wrapper", "architecture": "resnet10t"}
    values = {"model_name_or_path": None, "model_config": config}
    torch.manual_seed(0)
    kind = image_classification.AutoModelForImageClassification
    model = load_model(values, kind, id2label={0: "dark", 1: "light"}, label2id={"dark": 0, "light": 1})
    # Kaiming's deviation; the wrapper alone would have given its linear layer 0.02 and left the others.
    stem = model.timm_model.conv1[0].weight
    assert stem.std().item() == pytest.approx((2 / (stem.shape[0] * 9)) ** 0.5, rel=0.1)
    assert model.config.num_labels == 2
    short = {"data_dir": images, "image_size": 32, "model_config": config, "max_steps": 2}
    results = start("image_classification", "ddp", tmp_path / "out", **short)
    assert results["steps_per_worker"] == [2]


def test_statistics_must_be_given_together(tmp_path):
    arguments = image_classification.DataArguments(image_mean=[0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match=r"three numbers each, got \[0.5, 0.5, 0.5\] and None"):
        image_classification.statistics_of(arguments, torch.zeros(1, 3, 2, 2, dtype=torch.uint8))


# --- what is common ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_config": None}, "Give one of `model_name_or_path`.*got neither"),
        ({"model_config": LLAMA, "model_name_or_path": "x"}, "Give one of `model_name_or_path`.*got both"),
        ({"model_config": {"hidden_size": 4}}, "does not say which model it is for"),
        ({"model_config": {**LLAMA, "hiden_size": 4}}, "unknown field `hiden_size`: a llama would not use it"),
        ({"model_config": LLAMA, "use_lora": True}, "use_lora saves the adapter alone"),
    ],
)
def test_bad_models_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        load_model({"model_name_or_path": None, **values}, AutoModelForCausalLM)


def test_records_of_every_kind_of_file(tmp_path):
    rows = [{"text": {"en": f"e{n}", "fr": f"f{n}"}} for n in range(6)]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    write_lines(tmp_path / "a.jsonl", rows)
    for name in ("a.parquet", "a.jsonl"):
        train, held_out = load_records(RecordArguments(train_file=str(tmp_path / name), eval_size=2), {"k": "text.fr"})
        assert (len(train), len(held_out), train.column_names) == (4, 2, ["text.fr"])
        assert sorted([*train["text.fr"], *held_out["text.fr"]]) == [f"f{n}" for n in range(6)]


def test_any_row_may_have_more_and_0_is_something_and_texts_may_be_long(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"a": 0}, {"a": 1, "b": "x"}, {"a": 0, "b": "y"}])
    assert list(read_records(RecordArguments(train_file=str(path)), {"key": "a"})[0]["a"]) == [0, 1, 0]
    with pytest.raises(ValueError, match=r"1 of 3 rows have nothing in column `b`, the first is row 1"):
        read_records(RecordArguments(train_file=str(path)), {"key": "b"})
    text = "x" * 200_000
    (tmp_path / "long.csv").write_text(f"a\n{text}\n")
    assert read_records(RecordArguments(train_file=str(tmp_path / "long.csv")), {"key": "a"})[0]["a"][:] == [text]


def test_bad_records_are_errors(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"a": "x"}, {"a": ""}])
    for column, message in (
        ("b", r"rows\.jsonl has no column `b`; its columns are 'a'. Set key to one of them"),
        ("a", r"1 of 2 rows have nothing in column `a`, the first is row 2"),
    ):
        with pytest.raises(ValueError, match=message):
            read_records(RecordArguments(train_file=str(path)), {"key": column})
    path = tmp_path / "unlabelled.parquet"  # as a test split of the Hub may be
    Dataset.from_dict({"a": [0, -1]}, features=Features({"a": ClassLabel(names=["x", "y"])})).to_parquet(path)
    with pytest.raises(ValueError, match=r"1 of 2 rows have nothing in column `a`, the first is row 2"):
        read_records(RecordArguments(train_file=str(path)), {"key": "a"})
    path = write_lines(tmp_path / "kinds.jsonl", [{"a": "x"}, {"a": 1}])
    with pytest.raises(ValueError, match=r"kinds\.jsonl has a column with values of several kinds"):
        read_records(RecordArguments(train_file=str(path)), {"key": "a"})
    path = write_lines(tmp_path / "one.jsonl", [{"a": "x"}])
    with pytest.raises(ValueError, match="would hold out 0 of 1 records, which leaves one side empty"):
        load_records(RecordArguments(train_file=str(path)), {"key": "a"})
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty. It needs the columns 'a'"):
        read_records(RecordArguments(train_file=str(tmp_path / "empty.jsonl")), {"key": "a"})


# --- data to try them with, and their measured tables ---


def test_there_is_data_to_try_the_recipes_with(tmp_path):
    columns = {"sft": ["messages"], "seq2seq": ["source", "target"], "token_classification": ["tokens", "tags"]}
    for recipe, names in columns.items():
        file = tmp_path / f"{recipe}.jsonl"
        command = [sys.executable, str(RECIPES / recipe / "example_data.py"), str(file), "--count", "40"]
        subprocess.run(command, check=True)
        train, held_out = load_records(RecordArguments(train_file=str(file)), {name: name for name in names})
        assert (len(train), len(held_out)) == (36, 4)
    tags = token_classification.load_sentences(
        token_classification.DataArguments(
            train_file=str(tmp_path / "token_classification.jsonl"), tokens_column="tokens", tags_column="tags"
        )
    )[2]
    assert set(tags) == {"O", "B-HANDLE", "B-HASHTAG"}


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (19, "nineteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (300, "three hundred"),
        (1_007, "one thousand and seven"),
        (90_113, "ninety thousand one hundred and thirteen"),
        (100_000, "one hundred thousand"),
    ],
)
def test_numbers_in_words(number, words):
    assert in_words(number) == words


def test_a_finished_run_is_found_by_all_its_settings_and_what_is_in_its_data(tmp_path):
    file, folder = tmp_path / "train.csv", tmp_path / "images"
    folder.mkdir()
    image = folder / "0.png"
    file.write_text("text,label\na,x\n")
    image.write_bytes(b"dark")
    run = {"train_file": str(file), "data_dir": str(folder), "seed": 0, "output_dir": str(tmp_path / "any")}

    def folder_of(**changes) -> str:
        (made,) = in_folders_of_their_own([{**run, **changes}], tmp_path)
        assert made == {**run, **changes, "output_dir": made["output_dir"]}
        return made["output_dir"]

    first = folder_of()
    assert folder_of(output_dir=str(tmp_path / "other")) == first
    others = [first, folder_of(seed=1), folder_of(learning_rate=0.1)]  # were it the default of today, or not
    file.write_text("text,label\nb,x\n")
    others.append(folder_of())
    image.write_bytes(b"light")
    others.append(folder_of())
    image.rename(folder / "1.png")
    others.append(folder_of())
    assert len({*others}) == len(others)
    (tmp_path / "elsewhere.csv").write_bytes(file.read_bytes())
    assert folder_of(train_file=str(tmp_path / "elsewhere.csv")) == others[-1]


def test_a_simulated_run_on_other_data_is_made_again(tmp_path):
    file = tmp_path / "train.csv"

    def simulate(run, data):
        return {"run": asdict(run), "read": Path(json.loads(data)["train_file"]).read_text()}

    for content in ("one", "two"):
        file.write_text(content)
        runs = SimulatedRuns(simulate, str, {}, {"train_file": str(file)}, tmp_path / "runs", processes=1, quiet=True)
        assert [result["read"] for result in runs.results([Run("LSAM", 1, 1)])] == [content]
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.parametrize(("metric", "best"), [("loss", 0.1), ("f1", 0.2)])
def test_a_rate_whose_trials_diverge_is_not_chosen(metric, best):
    trials = [(1.0, float("nan")), (0.2, 0.9), (0.1, 0.5), (0.1, 0.7)]
    tried = [{"metric": metric, "configuration": {"learning_rate": r}, f"eval_{metric}": v} for r, v in trials]
    assert best_rate(tried) == best


def test_a_recipe_is_measured_over_seeds_into_its_readme(tmp_path, text):
    """By the YAML files of the recipe itself, made short; each with the learning rate whose trials were better."""
    (tmp_path / "causal_lm").mkdir()
    readme = tmp_path / "causal_lm/README.md"
    readme.write_text("".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in ("trials", "methods")))
    labels = ["lsam", "lsam without SAM, NesterovAdamW", "ddp, adam_beta2=0.99"]
    words = ["causal_lm", "--seeds", "2", "--learning_rates", "0.001", "0.1", "--trial_seeds", "2"]
    words += ["--methods", *labels, "--runs_dir", str(tmp_path / "runs"), "--output_dir", str(readme.parent)]
    words += ["--max_steps", "4", "--train_file", str(text), "--model_config", json.dumps(LLAMA)]
    words += ["--block_size", "32", "--warmup_steps", "1", "--sync_steps", "2"]
    done = run_script(ROOT / "scripts/experiments/measure_recipe.py", *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    summaries = json.loads((tmp_path / "causal_lm/results/methods.json").read_text())
    trials = json.loads((tmp_path / "causal_lm/results/trials.json").read_text())
    assert [method_label(summary) for summary in summaries] == labels
    assert [method_label(trial) for trial in trials[::2]] == labels
    for summary, tried in zip(summaries, zip(trials[::2], trials[1::2], strict=True), strict=True):
        best = min(tried, key=lambda trial: trial["eval_loss"]["mean"])
        assert all(trial["configuration"]["tuning"] for trial in tried)
        assert all([run["seed"] for run in trial["runs"]] == [100, 101] for trial in tried)
        assert all(trial["eval_examples"] < summary["eval_examples"] for trial in tried)  # a tenth of the rest
        assert summary["configuration"]["learning_rate"] == best["configuration"]["learning_rate"]
        assert [run["seed"] for run in summary["runs"]] == [0, 1]
        assert summary["eval_loss"]["mean"] == pytest.approx(np.mean([run["eval_loss"] for run in summary["runs"]]))
        assert f"{summary['eval_loss']['mean']:.4f} ± " in readme.read_text()
    assert not list(tmp_path.rglob("*.safetensors"))
    assert str(tmp_path) not in json.dumps(summaries)
