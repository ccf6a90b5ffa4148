"""`LSAMTrainerMixin` and `LSAMArguments` with other trainers than `Trainer`: Seq2SeqTrainer, and trl's SFTTrainer."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import pytest
import tokenizers
import torch
from models import Rows, arguments, vector
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    default_data_collator,
)
from trl import SFTConfig, SFTTrainer

from hf_lsam import LSAMArguments, LSAMTrainerMixin

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
        model=gpt2(), args=args, train_dataset=sentences(), processing_class=tokenizer, callbacks=callbacks or []
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
