"""`LSAMTrainerMixin` and `LSAMArguments` with other trainers than `Trainer`: Seq2SeqTrainer, and trl's SFTTrainer."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import pytest
import tokenizers
import torch
from models import Rows, arguments, blobs, net, vector
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    default_data_collator,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from hf_lsam import LSAMArguments, LSAMConfig, LSAMTrainer, LSAMTrainerMixin
from hf_lsam.card import facts_of_record
from hf_lsam.record import read_record

LSAM = {"sam_rho": 0.05, "sync_steps": 2, "coupling_strength": 0.2}
WORDS = ["<pad>", "</s>", "<unk>", *(f"word{i}" for i in range(17))]

# trl's configs switch gradient checkpointing on, by the name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


@dataclass
class LSAMSeq2SeqConfig(LSAMArguments, Seq2SeqTrainingArguments):
    pass


@dataclass
class LSAMSFTConfig(LSAMArguments, SFTConfig):
    pass


class LSAMSeq2SeqTrainer(LSAMTrainerMixin, Seq2SeqTrainer):
    pass


class LSAMSFTTrainer(LSAMTrainerMixin, SFTTrainer):
    pass


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )


class Anchors(TrainerCallback):
    """The anchor and the worker's own parameters after each step."""

    def __init__(self):
        self.trainer, self.y, self.x = None, [], []

    def on_step_end(self, args, state, control, model=None, **keywords):
        self.y.append(self.trainer.worker.anchor.clone())
        self.x.append(vector(model))


def entries(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(WORDS),
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def test_seq2seq_generates_with_the_anchor(tmp_path):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(WORDS), (24, 5), generator=generator)
    rows = Rows([{"input_ids": i, "attention_mask": torch.ones(5, dtype=torch.long), "labels": i[:3]} for i in ids])
    held_out = Rows(rows.rows[:8])
    seen = []

    def score(prediction):
        seen.append(torch.from_numpy(prediction.predictions))
        return {"score": 0.0}

    anchors = Anchors()
    trainer = LSAMSeq2SeqTrainer(
        model=t5(),
        args=arguments(
            LSAMSeq2SeqConfig,
            tmp_path,
            max_steps=5,
            learning_rate=2.0,
            predict_with_generate=True,
            generation_max_length=6,
            eval_strategy="steps",
            eval_steps=3,
            **LSAM,
        ),
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=default_data_collator,
        compute_metrics=score,
        callbacks=[anchors],
    )
    anchors.trainer = trainer
    trainer.train()

    def generated(parameters):
        model = t5().eval()
        torch.nn.utils.vector_to_parameters(parameters, model.parameters())
        return model.generate(input_ids=ids[:8], attention_mask=torch.ones(8, 5, dtype=torch.long), max_length=6)

    at_anchor, at_worker = generated(anchors.y[2]), generated(anchors.x[2])
    assert torch.equal(seen[0][:, : at_anchor.shape[1]], at_anchor)
    assert at_anchor.shape != at_worker.shape or not torch.equal(at_anchor, at_worker)
    metrics = trainer.evaluate()
    model = t5().eval()
    torch.nn.utils.vector_to_parameters(vector(trainer.model), model.parameters())
    with torch.no_grad():
        loss = model(input_ids=ids[:8], labels=ids[:8, :3].contiguous()).loss.item()
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert trainer.state.global_step == trainer.worker.local_steps == 5
    assert entries(trainer, "lsam/anchor_version") == [0, 1, 1, 2, 2]


def sentences() -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 10, (24,), generator=generator).tolist()
    texts = [" ".join(WORDS[i] for i in torch.randint(3, len(WORDS), (n,), generator=generator)) for n in lengths]
    return datasets.Dataset.from_dict({"text": texts})


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(WORDS),
            n_positions=32,
            n_embd=16,
            n_layer=1,
            n_head=2,
            resid_pdrop=0.1,
            embd_pdrop=0.1,
            attn_pdrop=0.1,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def sft(kind, config, output_dir, tokenizer, callbacks=None, **fields):
    args = arguments(
        config, output_dir, max_steps=5, gradient_accumulation_steps=2, max_length=16, bf16=False, **fields
    )
    trainer = kind(
        model=gpt2(),
        args=args,
        train_dataset=sentences(),
        eval_dataset=sentences(),
        processing_class=tokenizer,
        callbacks=callbacks or [],
    )
    for callback in callbacks or []:
        callback.trainer = trainer
    trainer.train()
    return trainer


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_sft_counts_each_token_once(tmp_path, tokenizer, fraction):
    plain = sft(SFTTrainer, SFTConfig, tmp_path, tokenizer)
    anchors = Anchors()
    lsam = sft(LSAMSFTTrainer, LSAMSFTConfig, tmp_path, tokenizer, [anchors], sam_ascent_fraction=fraction, **LSAM)
    assert entries(lsam, "num_tokens") == entries(plain, "num_tokens")
    assert entries(plain, "num_tokens")[-1] > 300
    # The first step starts from the same weights: its metrics are plain SFT's, whatever pass 2 computed.
    for name in ("entropy", "mean_token_accuracy"):
        assert len(entries(lsam, name)) == len(entries(plain, name)) == 5, name
    if fraction == 1.0:
        for name in ("loss", "entropy", "mean_token_accuracy"):
            assert entries(lsam, name)[0] == pytest.approx(entries(plain, name)[0], rel=1e-6), name
        assert all(sharpness > 0 for sharpness in entries(lsam, "lsam/sharpness"))
    assert (anchors.x[-1] - vector(plain.model)).abs().max() > 1e-4


def test_what_trl_measures_is_in_the_record_and_on_the_card(tmp_path, tokenizer):
    trainer = sft(LSAMSFTTrainer, LSAMSFTConfig, tmp_path, tokenizer, **LSAM)
    measured = trainer.evaluate()
    record = read_record(tmp_path)
    for name in ("mean_token_accuracy", "num_tokens", "lsam/drift"):
        assert [point[name] for point in record.points(0)] == entries(trainer, name) != [], name
    metrics = dict(facts_of_record(tmp_path, record).metrics)
    assert metrics["loss"] == measured["eval_loss"]
    assert [metrics["mean_token_accuracy"]] == entries(trainer, "eval_mean_token_accuracy")


def test_sft_without_sam_and_coupling_is_plain_sft(tmp_path, tokenizer):
    plain = sft(SFTTrainer, SFTConfig, tmp_path, tokenizer)
    anchors = Anchors()
    lsam = sft(
        LSAMSFTTrainer, LSAMSFTConfig, tmp_path, tokenizer, [anchors], sam_rho=0.0, coupling_strength=0.0, sync_steps=2
    )
    assert torch.equal(anchors.x[-1], vector(plain.model))
    assert entries(lsam, "loss") == entries(plain, "loss")


def test_sft_saves_the_anchor(tmp_path, tokenizer):
    anchors = Anchors()
    trainer = sft(
        LSAMSFTTrainer, LSAMSFTConfig, tmp_path, tokenizer, [anchors], save_strategy="steps", save_steps=3, **LSAM
    )
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    y = torch.cat([saved[name].flatten() for name, _ in trainer.model.named_parameters()])
    assert torch.equal(y, anchors.y[2])
    assert not torch.equal(y, anchors.x[2])


def test_sft_of_a_checkpoint_in_half_precision_named_by_its_folder(tmp_path, tokenizer):
    gpt2().bfloat16().save_pretrained(tmp_path / "hub")
    args = arguments(LSAMSFTConfig, tmp_path / "run", max_steps=5, max_length=16, **LSAM)
    args.model_init_kwargs = {"dtype": "auto"}  # else trl loads it in float32, and float32 it stays
    trainer = LSAMSFTTrainer(
        model=str(tmp_path / "hub"), args=args, train_dataset=sentences(), processing_class=tokenizer
    )
    assert args.bf16  # trl's default: autocast
    begin = vector(trainer.model)
    assert begin.dtype == torch.float32
    assert torch.equal(begin, vector(gpt2().bfloat16()).float())
    trainer.train()
    anchor = vector(trainer.model)
    assert (anchor - begin).abs().max() > 1e-4
    trainer.save_model(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.dtype == torch.bfloat16
    assert torch.equal(vector(saved), anchor.bfloat16())


def pairs() -> datasets.Dataset:
    rows = sentences()["text"]
    good, bad = [f" {row} word0" for row in rows], [f" {row} word1" for row in rows]
    return datasets.Dataset.from_dict({"prompt": rows, "chosen": good, "rejected": bad})


def judged() -> datasets.Dataset:
    rows = sentences()["text"]
    completions = [f" {row} word{i % 2}" for i, row in enumerate(rows)]
    labels = [i % 2 == 0 for i in range(len(rows))]
    return datasets.Dataset.from_dict({"prompt": rows, "completion": completions, "label": labels})


def reward_model() -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(GPT2Config(**{**gpt2().config.to_dict(), "num_labels": 1}))


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("base", "config", "model", "rows"),
    [
        (DPOTrainer, DPOConfig, gpt2, pairs),
        (KTOTrainer, KTOConfig, gpt2, judged),
        (RewardTrainer, RewardConfig, reward_model, pairs),
    ],
)
def test_preferences_train_and_without_sam_and_coupling_as_plain(tmp_path, tokenizer, base, config, model, rows):
    kind = type(f"LSAM{base.__name__}", (LSAMTrainerMixin, base), {})
    mixed = dataclass(type(f"LSAM{config.__name__}", (LSAMArguments, config), {}))

    model().save_pretrained(tmp_path / "hub")  # from where trl loads the reference

    def run(kind, config, name, **fields):
        # Adam: a difference that does not matter to SGD would be seen.
        args = arguments(
            config,
            tmp_path / name,
            max_steps=4,
            bf16=False,
            optim="adamw_torch",
            learning_rate=1e-3,
            max_length=32,
            **fields,
        )
        anchors = Anchors()
        callbacks = [anchors] if issubclass(kind, LSAMTrainerMixin) else []
        trainer = kind(
            model=type(model()).from_pretrained(tmp_path / "hub"),
            args=args,
            train_dataset=rows(),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        anchors.trainer = trainer
        trainer.train()
        return trainer, anchors

    plain, _ = run(base, config, "plain")
    alone, steps = run(kind, mixed, "alone", sam_rho=0.0, coupling_strength=0.0, sync_steps=2)
    assert torch.equal(steps.x[-1], vector(plain.model))
    assert entries(alone, "loss") == entries(plain, "loss")
    lsam, steps = run(kind, mixed, "lsam", **LSAM)
    assert all(sharpness > 0 for sharpness in entries(lsam, "lsam/sharpness"))
    assert len(steps.x) == 4
    assert entries(lsam, "loss")[0] == pytest.approx(entries(plain, "loss")[0], rel=1e-6)
    assert not torch.equal(steps.x[-1], vector(plain.model))


class Reached(Exception):
    """The model was about to be loaded."""


@pytest.mark.filterwarnings("ignore:Can't initialize NVML:UserWarning")
@pytest.mark.parametrize("base", [(SFTTrainer, SFTConfig), (DPOTrainer, DPOConfig), (KTOTrainer, KTOConfig)])
def test_a_model_that_trl_loads_by_name_comes_to_the_workers_own_gpu(tmp_path, tokenizer, monkeypatch, base):
    """Worker 1 of 2 on a machine whose two GPUs are pretended: nothing is put there."""
    gpt2().save_pretrained(tmp_path / "hub")
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    pretended = {"is_available": True, "device_count": 2, "set_device": None, "current_device": 1}
    pretended |= {"is_bf16_supported": True, "get_device_capability": (9, 0), "manual_seed_all": None}
    for name, value in pretended.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    device_maps = []

    def from_pretrained(*_, device_map=None, **__):
        device_maps.append(device_map)
        raise Reached

    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", from_pretrained)
    trainer, config = base
    mixed = dataclass(type("Mixed", (LSAMArguments, config), {}))
    kind = type("MixedTrainer", (LSAMTrainerMixin, trainer), {})

    def load(**fields):
        args = arguments(mixed, tmp_path / "run", use_cpu=False, bf16=False, **fields)
        assert args.device == torch.device("cuda:1")
        with pytest.raises(Reached):
            kind(model=str(tmp_path / "hub"), args=args, train_dataset=sentences(), processing_class=tokenizer)
        args.to_json_string()  # as trackers do
        with pytest.raises(Reached):  # what trl would do by itself
            trainer(
                model=str(tmp_path / "hub"),
                args=arguments(mixed, tmp_path / "run", use_cpu=False, bf16=False),
                train_dataset=sentences(),
                processing_class=tokenizer,
            )

    load()
    load(model_init_kwargs={"device_map": "balanced", "dtype": "float32"})
    assert device_maps == [{"": "cuda:1"}, "auto", "balanced", "auto"]


class OwnLoader(LSAMTrainer):
    """As in transformers' own documentation."""

    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=4, shuffle=True))


class LoaderOfASubclass(OwnLoader):
    def get_train_dataloader(self):
        return super().get_train_dataloader()


class Loads:
    """For any Trainer; it need not call what it overrides."""

    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=4, shuffle=True))


class LoaderOfAMixin(Loads, LSAMTrainer):
    pass


class UnpreparedLoader(LSAMTrainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=4, shuffle=True)


@pytest.fixture
def as_worker(monkeypatch):
    def become(rank: int) -> None:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))

    return become


@pytest.mark.parametrize("kind", [LSAMTrainer, OwnLoader, LoaderOfASubclass, LoaderOfAMixin])
def test_a_loader_of_ones_own_is_shared_by_the_workers_as_trainers_is(tmp_path, as_worker, kind):
    rows, seen = blobs(), []
    for rank in range(2):
        as_worker(rank)
        args = arguments(LSAMConfig, tmp_path, per_device_train_batch_size=4, **LSAM)
        loader = kind(model=net(), args=args, train_dataset=rows).get_train_dataloader()
        assert len(loader) == len(rows) / 4 / 2
        seen.append([tuple(row.tolist()) for batch in loader for row in batch["x"]])
    assert not set(seen[0]) & set(seen[1])
    assert set(seen[0]) | set(seen[1]) == {tuple(row["x"].tolist()) for row in rows}


def test_a_loader_that_accelerate_has_not_prepared_is_warned_of(tmp_path, as_worker, caplog):
    as_worker(1)
    trainer = UnpreparedLoader(model=net(), args=arguments(LSAMConfig, tmp_path, **LSAM), train_dataset=blobs())
    trainer.get_train_dataloader()
    assert "UnpreparedLoader.get_train_dataloader returns a DataLoader that Accelerate has not prepared" in caplog.text


def test_batchnorm_is_reestimated_from_batches_of_ones_own_loader(tmp_path):
    class Counting(OwnLoader):
        made = 0

        def get_train_dataloader(self):
            self.made += 1
            return super().get_train_dataloader()

    args = arguments(LSAMConfig, tmp_path, max_steps=2, batchnorm_batches=2, **LSAM)
    trainer = Counting(model=net(batchnorm=True), args=args, train_dataset=blobs())
    trainer.train()
    assert trainer.made == 2  # to train, and to settle the statistics at the anchor
