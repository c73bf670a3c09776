r"""Supervised fine-tuning with TRL, and the four lines that add BIRD to it (marked).

    python examples/trl_sft.py                     # tiny networks with random weights, made on the spot: seconds
    python examples/trl_sft.py --student HuggingFaceTB/SmolLM2-135M --teacher sentence-transformers/all-MiniLM-L6-v2 \
        --texts trl-lib/Capybara
"""

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig

from bird.language import BirdSFTTrainer, Guidance  # 1: instead of trl.SFTTrainer


def loaded(kind: Any, name: str | None, tiny: str) -> tuple[Any, Any]:
    """A network and its tokenizer by a hub id or a folder; without a name a tiny network that reads bytes."""
    if name is not None:
        return kind.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    vocabulary = {token: i for i, token in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokens = Tokenizer(models.BPE(vocabulary, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    network = kind.from_config(AutoConfig.for_model(tiny, vocab_size=len(vocabulary), pad_token_id=0, **sizes))
    return network, PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>", pad_token="<end>")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", help="a causal language model: a hub id or a folder (default: a tiny one)")
parser.add_argument("--teacher", help="a network whose features sort texts: the same")
parser.add_argument("--texts", help="a data set in one of TRL's formats: a hub id or a folder (default: a dozen lines)")
options = parser.parse_args()

student, tokenizer = loaded(AutoModelForCausalLM, options.student, "llama")
teacher, its_tokenizer = loaded(AutoModel, options.teacher, "bert")
guidance = Guidance(  # 2: whom to follow, and how
    teacher, its_tokenizer, alpha=1, beta=1, teacher_pooling="mean", truncation="left"
)
lines = [{"text": f"Film {i} is {('good', 'poor', 'a joy')[i % 3]}."} for i in range(12)]
trainer = BirdSFTTrainer(  # 3: the same trainer
    student,
    args=SFTConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=6, max_length=256, logging_steps=1, report_to="none",
        bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=load_dataset(options.texts, split="train") if options.texts else Dataset.from_list(lines),
    processing_class=tokenizer,
    guidance=guidance,  # 4: and what guides it
)  # fmt: skip
trainer.train()
for row in trainer.state.log_history:
    if "cka" in row:
        print(f"loss {row['loss']:.4f}, of the task {row['task_loss']:.4f}, CKA to the teacher {row['cka']:.4f}")
