r"""A DPO run of TRL's, and the five lines that add BIRD to it (marked).

    python examples/dpo.py                                                # tiny networks with random weights: seconds
    python examples/dpo.py --student HuggingFaceTB/SmolLM2-135M-Instruct \
        --teacher distilbert/distilbert-base-uncased-finetuned-sst-2-english --pairs trl-lib/ultrafeedback_binarized
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig

from bird.language import BirdDPOTrainer, Guidance  # 1: instead of trl.DPOTrainer


def network(kind: Any, name: str | None, tiny: Any) -> tuple[Any, Any]:
    """A network and its tokenizer, by a hub id or a folder; without either a tiny one that reads bytes."""
    if name is not None:
        return kind.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    names = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tiny(vocab_size=len(names), bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes)
    return kind.from_config(config), PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<end>", pad_token="<end>", model_max_length=512
    )


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", help="a causal language model: a hub id or a folder (default: a tiny one)")
parser.add_argument("--teacher", help="a classifier: the same")
parser.add_argument("--pairs", help="preferences in TRL's format: a hub id or a folder (default: a dozen)")
parser.add_argument("--out", help="where checkpoints go (default: nowhere that stays)")
options = parser.parse_args()

student, tokenizer = network(AutoModelForCausalLM, options.student, LlamaConfig)
teacher, its_tokenizer = network(AutoModelForSequenceClassification, options.teacher, BertConfig)  # 2: who knows
if options.pairs:
    pairs = load_dataset(options.pairs, split="train")
else:
    ends = [(" good.", " bad."), (" very good.", " poor."), (" a joy.", " a bore.")]
    pairs = Dataset.from_list(
        [{"prompt": f"Film {i} is", "chosen": ends[i % 3][0], "rejected": ends[i % 3][1]} for i in range(12)]
    )

arguments = DPOConfig(
    options.out or tempfile.mkdtemp(),
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,  # CKA still compares all 16 responses of a step
    precompute_ref_log_probs=True,
    bf16=torch.cuda.is_available(),  # TRL's default, which a CPU refuses
    use_cpu=not torch.cuda.is_available(),
    max_length=256,
    logging_steps=1,
    report_to="none",
)
guidance = Guidance(  # 3: whom to follow, and how
    teacher, its_tokenizer, alpha=1, beta=1, teacher_pooling="mean", truncation="left"
)
trainer = BirdDPOTrainer(  # 4: the same trainer
    student,
    args=arguments,
    train_dataset=pairs,
    processing_class=tokenizer,
    guidance=guidance,  # 5: and what guides it
)
trainer.train()
for row in trainer.state.log_history:
    if "cka" in row:
        print(f"loss {row['loss']:.4f}  DPO {row['task_loss']:.4f}  CKA to the teacher {row['cka']:.4f}")
