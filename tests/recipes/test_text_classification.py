"""recipes/text_classification/train.py as a user starts it, on a tiny BERT and a tiny CSV; and every bad input."""

from __future__ import annotations

import csv
import itertools
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from launch import ROOT, accelerate_launch, run_script
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

from recipes.common.configuration import parse_configuration, resolve
from recipes.common.labels import natural_order
from recipes.text_classification.sentences import DataArguments, load_examples
from recipes.text_classification.train import KEYS, ModelArguments, load_model, run
from scripts.experiments import simulate_text
from scripts.tools import summarize_results

SCRIPT = ROOT / "recipes/text_classification/train.py"
WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "song", "very", "quite", "the", "was"]
RHO, LEARNING_RATE = 0.5, 0.1


def parse(*arguments):
    return parse_configuration(KEYS, [str(argument) for argument in arguments])


def write_csv(path: Path, rows, header=("text", "label")) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """Sentences of three words; their label is whether the last is good, and one in eight is mislabelled."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        good = bool(draw.integers(2))
        words = [*draw.choice(WORDS[4:], 2), "good" if good else "bad"]
        rows.append((" ".join(words), "up" if good != (number % 8 == 0) else "down"))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny BERT without a head (`base`), one with a head (`headed`), their tokenizer, data and a configuration."""
    root = tmp_path_factory.mktemp("recipe")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 16,
        "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes)).save_pretrained(root / "base")
    names = {"id2label": {0: "up", 1: "down"}, "label2id": {"up": 0, "down": 1}}
    BertForSequenceClassification(BertConfig(**sizes, **names)).save_pretrained(root / "headed")
    for name in ("base", "headed"):
        tokenizer.save_pretrained(root / name)
    write_csv(root / "train.csv", sentences(96, 0))
    write_csv(root / "held_out.csv", sentences(40, 1))
    (root / "run.yaml").write_text(
        f"""
        method: lsam
        use_cpu: true
        model_name_or_path: {root / "base"}
        train_file: {root / "train.csv"}
        validation_file: {root / "held_out.csv"}
        max_steps: 12
        per_device_train_batch_size: 4
        learning_rate: 1e-2
        sync_steps: 4
        logging_steps: 4
        eval_strategy: steps
        eval_steps: 6
        save_strategy: "no"
        report_to: none
        """
    )
    return root


def accuracy_of(model, tokenizer, rows) -> float:
    """Of the model on (sentence, label) rows, computed without Trainer."""
    with torch.no_grad():
        scores = model.eval()(**tokenizer([text for text, _ in rows], return_tensors="pt")).logits
    told = [model.config.id2label[number] for number in scores.argmax(-1).tolist()]
    return sum(a == b for a, (_, b) in zip(told, rows, strict=True)) / len(rows)


# --- the three methods ---


# peft asks for it when the adapter is loaded; neither has another name for it yet.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lsam_with_two_workers_leaves_an_adapter_and_the_numbers_of_the_run(folder, tmp_path, monkeypatch, capsys):
    lora = ["--use_lora", "true", "--lora_r", "2", "--sam_rho", "0.02", "--num_workers", "2"]
    done = accelerate_launch(
        SCRIPT, "--config", str(folder / "run.yaml"), "--output_dir", str(tmp_path), *lora, fork=True
    )
    results = json.loads((tmp_path / "results.json").read_text())

    size = results["trainable_parameters"]
    # Rank-2 factors of q, k, v, o and the two feed-forward layers of both blocks, and of the pooler; the head's 34.
    assert size == 2 * (4 * 2 * (16 + 16) + 2 * 2 * (16 + 32)) + 2 * (16 + 16) + 34
    assert (results["method"], results["num_workers"], results["seed"]) == ("lsam", 2, 42)
    assert results["steps_per_worker"] == [12, 12]
    assert len(results["median_step_s"]) == 2
    assert min(results["median_step_s"]) > 0
    pushes = results["pushes_per_worker"]
    assert all(1 <= count <= 3 for count in pushes)
    assert 1 <= results["anchor_version"] <= sum(pushes)
    assert results["bytes_pushed"] == [count * 4 * size for count in pushes]
    assert all(count % (4 * size) == 0 and count >= 4 * size for count in results["bytes_pulled"])
    assert results["bytes_data_parallel"] == 2 * (12 + 12) * 4 * size  # 2 (n - 1) / n = 1, both directions
    assert 0 <= results["staleness"]["mean"] <= results["staleness"]["max"] <= sum(pushes)
    assert len(results["eval_accuracy_workers"]) == 2
    assert results["train_examples"] == 96
    assert results["eval_examples"] == 40
    assert results["train_runtime_s"] > 0
    assert results["configuration"]["sync_steps"] == 4
    assert set(results["versions"]) == {"python", "torch", "transformers", "accelerate", "peft", "hf_lsam"}
    assert set(results["hardware"]) == {"cpu", "cores", "memory_gib", "gpus"}
    assert {"commit", "date", "eval_loss"} <= set(results)

    curves = results["curves"]
    assert [[step for step, _ in worker] for worker in curves["loss"]] == [[4, 8, 12]] * 2
    assert [[step for step, _ in worker] for worker in curves["drift"]] == [[4, 8, 12]] * 2
    assert curves["eval_accuracy"][0] == [0, results["eval_accuracy_before"]]
    assert [step for step, _ in curves["eval_accuracy"]] == [0, 6, 12, 12]
    assert curves["eval_accuracy"][-1][1] == results["eval_accuracy"]

    from huggingface_hub import ModelCard
    from peft import AutoPeftModelForSequenceClassification

    labels = dict(enumerate(results["labels"]))
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, id2label=labels)
    found = accuracy_of(model, AutoTokenizer.from_pretrained(tmp_path), sentences(40, 1))
    assert found == pytest.approx(results["eval_accuracy"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results[0].metric_value == results["eval_accuracy"]
    assert card.data.library_name == "peft"
    assert f"{results['eval_accuracy']:.4f}" in card.text
    code = card.text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})  # what the card tells its reader to do
    assert capsys.readouterr().out.strip() in ("up", "down")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    for line in ("Server updates", "Accuracy before", "Accuracy at the workers", "data-parallel SAM", str(tmp_path)):
        assert line in done.stdout


def reference_step(model, examples, rho: float, learning_rate: float) -> None:
    """One step of SAM with a worker an example: each perturbs by itself, the gradients found there are averaged."""
    found = []
    for inputs, label in examples:
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        gradients = torch.autograd.grad(model(**inputs, labels=label).loss, list(model.parameters()))
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter += rho * gradient / norm
        found.append(torch.autograd.grad(model(**inputs, labels=label).loss, list(model.parameters())))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])
    with torch.no_grad():
        for parameter, gradients in zip(model.parameters(), zip(*found, strict=True), strict=True):
            parameter -= learning_rate * sum(gradients) / len(found)


PLAIN_SGD = ["--optim", "sgd", "--learning_rate", LEARNING_RATE, "--lr_scheduler_type", "constant"]
PLAIN_SGD += ["--max_grad_norm", "0", "--max_steps", "2", "--eval_strategy", "no", "--logging_steps", "1"]


def two_examples(folder: Path, tmp_path: Path):
    """A CSV with a sentence of each label, and the same as inputs of the model."""
    rows = [("the film good", "up"), ("very bad song was", "down")]
    tokenizer = AutoTokenizer.from_pretrained(folder / "headed")
    inputs = [tokenizer([text], return_tensors="pt") for text, _ in rows]
    return write_csv(tmp_path / "two.csv", rows), list(zip(inputs, (torch.tensor([0]), torch.tensor([1])), strict=True))


def test_data_parallel_sam_perturbs_per_worker_and_averages_the_second_gradient(folder, tmp_path):
    path, examples = two_examples(folder, tmp_path)
    arguments = ["--config", folder / "run.yaml", "--method", "ddp_sam", "--sam_rho", RHO, "--num_workers", 2]
    arguments += ["--model_name_or_path", folder / "headed", "--train_file", path, "--output_dir", tmp_path / "out"]
    arguments += ["--per_device_train_batch_size", "1", *PLAIN_SGD]
    done = accelerate_launch(SCRIPT, *map(str, arguments), fork=True)

    model = AutoModelForSequenceClassification.from_pretrained(folder / "headed").eval()
    for _ in range(2):
        reference_step(model, examples, RHO, LEARNING_RATE)
    saved = load_file(tmp_path / "out/model.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(saved[name], parameter.detach(), rtol=1e-4, atol=1e-6)

    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["steps_per_worker"] == [2, 2]
    assert len(results["median_step_s"]) == 2
    assert results["bytes_data_parallel"] == 2 * (2 + 2) * 4 * results["trainable_parameters"]
    only_lsam = ("anchor_version", "pushes_per_worker", "bytes_pushed", "bytes_pulled", "staleness")
    assert [results[key] for key in only_lsam] == [None] * 5
    assert "Accuracy after" in done.stdout


@pytest.mark.parametrize(("method", "rho"), [("ddp_sam", RHO), ("ddp", 0.0)])
def test_one_process_makes_the_step_of_its_method(folder, tmp_path, method, rho):
    path, examples = two_examples(folder, tmp_path)
    arguments = ["--config", folder / "run.yaml", "--method", method, "--sam_rho", RHO, "--train_file", path]
    arguments += ["--model_name_or_path", folder / "headed", "--output_dir", tmp_path / "out"]
    # Two examples in two micro-batches: each perturbs by itself, their gradients accumulate.
    arguments += ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2, *PLAIN_SGD]
    results = run(parse(*arguments))

    model = AutoModelForSequenceClassification.from_pretrained(folder / "headed").eval()
    for _ in range(2):
        reference_step(model, examples, rho, LEARNING_RATE)
    saved = load_file(tmp_path / "out/model.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(saved[name], parameter.detach(), rtol=1e-4, atol=1e-6)
    assert results["method"] == method
    assert results["num_workers"] == 1
    assert results["bytes_data_parallel"] == 0
    assert results["eval_accuracy_workers"] is None
    assert [step for step, _ in results["curves"]["eval_accuracy"]] == [0, 2]
    assert results["curves"]["eval_accuracy"][0][1] == results["eval_accuracy_before"]


def test_a_model_with_a_head_keeps_its_numbering_of_the_labels(folder, tmp_path):
    # By name `down` comes first; this head was made with `up` first.
    arguments = ["--config", folder / "run.yaml", "--method", "ddp", "--output_dir", tmp_path]
    results = run(parse(*arguments, "--model_name_or_path", folder / "headed", "--max_steps", 20))
    assert results["labels"] == ["up", "down"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.id2label == {0: "up", 1: "down"}
    found = accuracy_of(model, AutoTokenizer.from_pretrained(tmp_path), sentences(40, 1))
    assert found == pytest.approx(results["eval_accuracy"])
    assert found == pytest.approx(35 / 40)  # all but the mislabelled


def test_a_model_that_is_saved_in_half_precision_is_trained_in_float32(folder, tmp_path):
    half = AutoModelForSequenceClassification.from_pretrained(folder / "headed", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    model, _ = load_model(ModelArguments(model_name_or_path=str(tmp_path)), ["up", "down"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# --- the summary of several runs ---


def test_summary_is_the_mean_over_seeds_and_goes_between_the_markers(folder, tmp_path):
    folders = [tmp_path / f"seed{seed}" for seed in (0, 1)]
    arguments = ["--config", folder / "run.yaml", "--method", "ddp", "--max_steps", 2]
    found = [run(parse(*arguments, "--seed", seed, "--output_dir", folders[seed])) for seed in (0, 1)]
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- runs:begin -->\nold\n<!-- runs:end -->\nafter\n")
    where = ["--output", str(tmp_path / "runs.json"), "--readme", str(readme), "--marker", "runs"]
    summarize_results.main([*map(str, folders), *where])

    (summary,) = json.loads((tmp_path / "runs.json").read_text())
    accuracies = [results["eval_accuracy"] for results in found]
    assert summary["eval_accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    assert summary["eval_accuracy"]["std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert [each["seed"] for each in summary["runs"]] == [0, 1]
    text = readme.read_text()
    assert text.startswith("before\n<!-- runs:begin -->\n| method |")
    assert text.endswith("<!-- runs:end -->\nafter\n")
    assert "old" not in text
    assert f"{np.mean(accuracies):.4f}" in text
    with pytest.raises(ValueError, match="Seed 1 stands twice"):
        summarize_results.main([*map(str, folders), str(folders[1]), *where])


# --- the configuration ---


def test_command_line_wins_over_the_file_and_types_are_checked_in_both(folder, tmp_path):
    values = parse("--config", folder / "run.yaml", "--max_steps", 3)
    assert values["max_steps"] == 3
    assert values["learning_rate"] == 0.01  # YAML reads 1e-2 as text
    assert values["use_cpu"] is True
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("max_steps: many")
    with pytest.raises(ValueError, match=r"--max_steps.*invalid int value: 'many'"):
        parse("--config", wrong)
    with pytest.raises(ValueError, match=r"--max_steps.*invalid int value: '1.5'"):
        parse("--max_steps", "1.5")


def test_unknown_keys_are_errors_that_name_the_key(folder, tmp_path):
    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text("learning_rte: 0.1")
    with pytest.raises(ValueError, match=r"misspelt\.yaml has the unknown key `learning_rte`"):
        parse("--config", misspelt)
    with pytest.raises(ValueError, match=r"no key takes: --learning_rte=0\.1"):
        parse("--config", folder / "run.yaml", "--learning_rte=0.1")
    with pytest.raises(ValueError, match=r"no key takes: --learning 0\.1"):  # no abbreviations either
        parse("--learning", "0.1")


def test_a_missing_or_malformed_configuration_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no configuration file .*none\.yaml"):
        parse("--config", tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match=r"list\.yaml must hold `key: value` lines, got list"):
        parse("--config", tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"broken\.yaml is not valid YAML"):
        parse("--config", tmp_path / "broken.yaml")


def test_every_recipe_is_a_configuration_of_this_script():
    recipes = sorted((ROOT / "recipes/text_classification").glob("*.yaml"))
    assert "quickstart.yaml" in [path.name for path in recipes]
    for path in recipes:
        assert parse("--config", path)["model_name_or_path"]


def test_files_of_packages_are_found_without_importing_them():
    assert Path(resolve("package://evaluate/config.py")).is_file()
    with pytest.raises(ValueError, match=r"'no_such_package' is not installed.*pip install -e '.\[recipes\]'"):
        resolve("package://no_such_package/model")
    with pytest.raises(ValueError, match="'evaluate' has no 'no_such_file'"):
        resolve("package://evaluate/no_such_file")


# --- the data ---


def test_held_out_share_is_stratified_and_shares_no_sentence_with_the_training_part(tmp_path):
    rows = [(f"Sentence {number}", number % 4 == 0) for number in range(80)]
    rows += [(f"sentence  {number}", number % 4 == 0) for number in range(80)]  # each again, written differently
    path = write_csv(tmp_path / "all.csv", rows)
    train, held_out, names = load_examples(DataArguments(train_file=str(path), eval_size=40))
    assert names == ["False", "True"]
    assert len(held_out) == 40
    assert sum(held_out["labels"]) == 10
    seen = {" ".join(text.lower().split()) for text in held_out["text"]}
    assert not seen & {" ".join(text.lower().split()) for text in train["text"]}
    assert len(train) == 160 - 2 * len(seen)
    again = load_examples(DataArguments(train_file=str(path), eval_size=40))[1]
    assert again["text"] == held_out["text"]
    rest, judged, _ = load_examples(DataArguments(train_file=str(path), eval_size=40, tuning=True))
    assert len(judged) == 40
    assert not {*rest["text"]} & {*judged["text"]}
    assert {*rest["text"], *judged["text"]} <= {*train["text"]}


def test_json_csv_and_folders_of_a_hub_data_set_give_the_same_examples(tmp_path):
    rows = [("one, two", 10), ("three\nfour", 2), ("five", 10), ("six", 2)]
    data = tmp_path / "data"
    data.mkdir()
    write_csv(data / "train.csv", rows)
    write_csv(data / "validation.csv", rows[:2])
    records = [{"text": text, "label": label} for text, label in rows]
    (tmp_path / "list.json").write_text(json.dumps(records))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, records)))
    sources = [{"dataset_name": str(data)}]
    Dataset.from_list(records).to_parquet(tmp_path / "table.parquet")
    sources += [
        {"train_file": str(path), "validation_file": str(data / "validation.csv")}
        for path in (data / "train.csv", *(tmp_path / name for name in ("list.json", "lines.jsonl", "table.parquet")))
    ]
    for source in sources:
        train, held_out, names = load_examples(DataArguments(**source))
        assert names == ["2", "10"]
        assert list(train["text"]) == [text for text, _ in rows]
        assert list(train["labels"]) == [1, 0, 1, 0]
        assert list(held_out["labels"]) == [1, 0]


def test_labels_are_numbered_alike_in_whatever_order_a_process_finds_them():
    labels = ["10", "b", "01", "1", "2", "a"]
    for found in itertools.permutations(labels):
        assert sorted(found, key=natural_order) == ["01", "1", "2", "10", "a", "b"]


def test_only_the_labels_to_keep_are_kept_in_their_order(tmp_path):
    rows = [(f"{number}", ("bad", "so so", "good")[number % 3]) for number in range(60)]
    path = write_csv(tmp_path / "three.csv", rows)
    train, held_out, names = load_examples(DataArguments(train_file=str(path), keep_labels=["good", "bad"]))
    assert names == ["good", "bad"]
    assert len(train) + len(held_out) == 40
    assert {label for text, label in zip(train["text"], train["labels"], strict=True) if int(text) % 3 == 2} == {0}


GOOD = "text,label\na,x\nb,y\nc,x\nd,y\n"
BAD_DATA = {
    "missing file": (None, {}, r"no data file .*data\.csv"),
    "empty file": ("", {}, r"data\.csv is empty.*'text', 'label'"),
    "header alone": ("text,label\n", {}, r"data\.csv is empty.*'text', 'label'"),
    "wrong text column": (GOOD, {"text_column": "sentence"}, r"data\.csv has no column `sentence`; its columns are "
                          r"'text', 'label'\. Set text_column"),
    "wrong label column": (GOOD, {"label_column": "y"}, r"data\.csv has no column `y`.*Set label_column"),
    "no label in a row": ("text,label\na,x\nb,\n", {}, r"1 of 2 rows have nothing in column `label`.*row 2"),
    "no text in a row": ("text,label\n ,x\nb,y\n", {}, r"1 of 2 rows have nothing in column `text`.*row 1"),
    "short row": ("text,label\na,x\nb\n", {}, r"1 of 2 rows have nothing in column `label`.*row 2"),
    "long row": ("text,label\na,x\nb,c,y\n", {}, r"row 2 has more fields than the header"),
    "one label": ("text,label\na,x\nb,x\n", {}, r"one label only in column `label`, 'x'"),
    "label kept but absent": (GOOD, {"keep_labels": ["x", "z"]}, r"no example labelled 'z'.*'x', 'y'"),
    "too much held out": (GOOD, {"eval_size": 4.0}, r"eval_size=4 would hold out 4 of 4 examples.*from 2 to 2"),
    "nothing held out": (GOOD, {"eval_size": 0.1}, r"eval_size=0\.1 would hold out 0 of 4"),
    "a label only once": (GOOD + "e,z\nf,x\n", {"eval_size": 3}, r"one example only of label 'z'"),
    "wrong encoding": ("text,label\nä,x\n", {"file_encoding": "ascii"}, r"cannot be read as ascii.*latin-1"),
    "no such encoding": (GOOD, {"file_encoding": "utf-9"}, r"cannot be read as utf-9"),
    "file and data set": (GOOD, {"dataset_name": "glue"}, r"Both train_file and dataset_name"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_an_error_that_says_what_to_do(tmp_path, case):
    content, arguments, message = BAD_DATA[case]
    path = tmp_path / "data.csv"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_examples(DataArguments(train_file=str(path), **arguments))


def test_other_bad_sources_of_data(tmp_path):
    train = write_csv(tmp_path / "train.csv", [("a", "x"), ("b", "y")])
    held_out = write_csv(tmp_path / "held_out.csv", [("a", "x"), ("b", "z")])
    with pytest.raises(ValueError, match=r"held_out\.csv has labels .*train\.csv never has: 'z' \(there: 'x', 'y'\)"):
        load_examples(DataArguments(train_file=str(train), validation_file=str(held_out)))
    with pytest.raises(ValueError, match=r"no training data.*train_file.*dataset_name"):
        load_examples(DataArguments())
    (tmp_path / "data.doc").write_text("a\tx")
    with pytest.raises(ValueError, match=r"data\.doc: unknown kind of file '\.doc'"):
        load_examples(DataArguments(train_file=str(tmp_path / "data.doc")))
    (tmp_path / "data.json").write_text("[{]")
    with pytest.raises(ValueError, match=r"data\.json is not a valid \.json file"):
        load_examples(DataArguments(train_file=str(tmp_path / "data.json")))
    data = tmp_path / "data"
    data.mkdir()
    write_csv(data / "train.csv", [("a", "x"), ("b", "y")])
    for split in ("train_split", "validation_split"):
        with pytest.raises(ValueError, match=f"has no split `dev`, only train. Set {split}"):
            load_examples(DataArguments(dataset_name=str(data), **{split: "dev"}))


def test_labels_that_do_not_match_the_head_of_the_model(folder, tmp_path):
    three = write_csv(tmp_path / "three.csv", [(word, label) for word in WORDS for label in ("up", "down", "level")])
    other = write_csv(tmp_path / "other.csv", [(word, label) for word in WORDS for label in ("up", "left")])
    arguments = ["--config", folder / "run.yaml", "--method", "ddp", "--output_dir", tmp_path / "out"]
    arguments += ["--model_name_or_path", folder / "headed"]
    for path, message in (
        (three, r"headed classifies into 2 labels, the data has 3: 'down', 'level', 'up'.*keep_labels"),
        (other, r"headed classifies into 'up', 'down', the data has 'left', 'up'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(parse(*arguments, "--train_file", path, "--validation_file", path))
    assert not (tmp_path / "out/results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "adam"], r"`method` must be one of .*got 'adam'"),
        (["--method", "ddp", "--num_workers", "2"], r"num_workers=2, but 1 were started"),
        (["--method", "lsam", "--num_workers", "2"], r"num_workers=2, but 1 were started"),
        (["--method", "ddp_sam", "--sam_rho", "-1"], r"`sam_rho` must be finite and >= 0"),
        (["--method", "ddp_sam", "--sam_interval", "2"], r"method ddp_sam perturbs at every step.*sam_interval=2"),
        (["--method", "ddp_sam", "--sam_ascent_fraction", "0.5"], r"whole batch, got sam_ascent_fraction=0\.5"),
        (
            ["--method", "ddp_sam", "--sam_direction", "anchor"],
            r"along the gradient.*sam_direction=anchor. Set it to grad",
        ),
    ],
)
def test_bad_arguments_of_a_method(folder, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(parse("--config", folder / "run.yaml", "--output_dir", tmp_path, *arguments))


def test_a_run_needs_a_folder_and_a_model(folder, tmp_path):
    with pytest.raises(ValueError, match="`output_dir` is not set"):
        run(parse("--config", folder / "run.yaml", "--method", "ddp"))
    bare = ["--method", "ddp", "--use_cpu", "true", "--train_file", folder / "train.csv", "--output_dir", tmp_path]
    with pytest.raises(ValueError, match="`model_name_or_path` is not set"):
        run(parse(*bare))


# --- the comparison of methods ---


def test_fine_tuning_is_simulated_with_labels_that_are_wrong(folder, tmp_path):
    """All of it on a tiny model: trials on training sentences alone, and every method with what they chose."""
    words = [f"--model_name_or_path={folder / 'base'}", f"--train_file={folder / 'train.csv'}"]
    words += [f"--validation_file={folder / 'held_out.csv'}", "--steps=4", "--seeds=1", "--processes=1", "--quiet"]
    words += [f"--runs_dir={tmp_path / 'runs'}", f"--output_dir={tmp_path}", "--wrong_labels=0.4", "--name=noise"]
    words += ["--trial_seeds=2"]
    methods = ["LSAM", "LSAM, one pass", "LSAM without SAM, NesterovAdamW", "data-parallel AdamW"]
    words += [f"--other_file={folder / 'held_out.csv'}", "--methods", *methods]
    done = run_script(ROOT / "scripts/experiments/simulate_text.py", *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    assert done.stdout.endswith((tmp_path / "noise.md").read_text())
    report = json.loads((tmp_path / "noise.json").read_text())
    tried, final = report["runs"][: 8 * len(methods)], report["runs"][8 * len(methods) :]
    assert [run["run"]["method"] for run in tried] == [method for method in methods for _ in range(8)]
    assert [run["run"]["seed"] for run in tried] == [100, 101] * 4 * len(methods)
    assert all(run["run"]["validation"] and run["run"]["wrong_labels"] == 0.4 for run in tried)
    assert all(run["train_examples"] <= 86 for run in tried)  # a tenth, and its like, is held out for them
    assert [(run["run"]["method"], run["run"]["wrong_labels"]) for run in final] == [(each, 0.4) for each in methods]
    assert {run["train_examples"] for run in final} == {96}
    assert all(run["accuracy_elsewhere"] == run["accuracy"] for run in final)  # the other file is the same one
    assert not any("accuracy_elsewhere" in run for run in tried)
    for result in final:
        own, method = result["run"], result["run"]["method"]
        trials = defaultdict(list)
        for each in tried:
            if each["run"]["method"] == method:
                trials[each["run"]["learning_rate"], each["run"]["sam_rho"]].append(each["accuracy"])
        assert (own["learning_rate"], own["sam_rho"]) == max(trials, key=lambda trial: sum(trials[trial]))
        in_parallel = 4 * 2 * 2 * 4 * result["parameters"]  # a ring of two sends and receives the gradient once a step
        assert (result["bytes"] == in_parallel) == method.startswith("data-parallel")


def test_wrong_labels_are_other_labels_and_as_many_as_asked_for(folder):
    words = [f"--model_name_or_path={folder / 'base'}", f"--train_file={folder / 'train.csv'}"]
    words += [f"--validation_file={folder / 'held_out.csv'}"]
    data = json.dumps(parse_configuration((ModelArguments, DataArguments), words))
    (right, held_out, *_), (wrong, same, *_) = (simulate_text.sentences_of(data, False, part) for part in (0.0, 0.4))
    assert held_out == same
    assert sum(a["label"] != b["label"] for a, b in zip(right, wrong, strict=True)) == round(0.4 * 96)
    assert {example["label"] for example in wrong} == {0, 1}
