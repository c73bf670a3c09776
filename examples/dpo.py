"""A DPO run of TRL's, and the five lines that add BIRD to it (marked).

    python examples/dpo.py                                                # tiny networks with random weights: seconds
    python examples/dpo.py --student HuggingFaceTB/SmolLM2-135M-Instruct \
        --teacher distilbert/distilbert-base-uncased-finetuned-sst-2-english --pairs trl-lib/ultrafeedback_binarized
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from datasets import Dataset
from trl import DPOConfig

from bird.lab.language.data import columns
from bird.lab.language.data.preferences import preferences
from bird.lab.language.models import load
from bird.language import BirdDPOTrainer, Guidance  # 1: instead of trl.DPOTrainer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "--student", default="tiny-llama", help="a causal language model: a hub id, a folder, or tiny-llama"
)
parser.add_argument("--teacher", default="tiny-bert", help="a classifier: the same, or tiny-bert")
parser.add_argument("--pairs", help="preferences in TRL's format: a hub id, a folder or a file (default: a dozen)")
parser.add_argument("--out", help="where checkpoints go (default: nowhere that stays)")
options = parser.parse_args()

student, tokenizer = load(options.student, "causal")
teacher, its_tokenizer = load(options.teacher, "classifier", classes=2)  # 2: who knows what is good
if options.pairs:
    pairs = Dataset.from_dict(columns(preferences(options.pairs, "train", drop=True)))
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
guidance = Guidance(teacher, its_tokenizer, teacher_pooling="mean")  # 3: whom to follow, and how its tokens are pooled
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
