"""A causal language model learns its texts and the geometry of a larger one's hidden states, token by token.

    python examples/hidden_states.py             # tiny networks with random weights, made on the spot: seconds
    python examples/hidden_states.py --packed    # the texts of a batch in one row, without padding
    python examples/hidden_states.py --student HuggingFaceTB/SmolLM2-135M --teacher HuggingFaceTB/SmolLM2-360M \\
        --texts trl-lib/tldr --column completion --student-layer 20 --teacher-layer 22 --batch 16 --steps 1000

Both read the same token ids, so their tokenizers must agree; their embeddings may be padded to different sizes. With
different tokenizers, `bird.language` compares a row for each text. CKA is of the tokens of a batch on one device;
several GPUs need torchrun.
"""

import argparse
import os
import tempfile
from typing import Any

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import bird


class HiddenStatesTrainer(Trainer):
    """transformers' trainer with ``alpha * task + beta * (1 - CKA)`` of all tokens of two layers.

    Args:
        teacher: a causal language model that reads the same ids; it is frozen.
        layers: how many blocks of student and of teacher the compared hidden states have passed.
        weights: alpha and beta.
    """

    def __init__(
        self, *args: Any, teacher: torch.nn.Module, layers: tuple[int, int], weights: tuple[float, float], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.layers, self.weights = layers, weights

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, which is printed, too."""
        # With a cache, transformers takes packed texts for one, and each sees those before it.
        inputs |= {"output_hidden_states": True, "use_cache": False}
        task, ours = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        with torch.no_grad():
            theirs = self.teacher(**{name: value for name, value in inputs.items() if name != "labels"})
        x, y = ours.hidden_states[self.layers[0]], theirs.hidden_states[self.layers[1]]
        distance = bird.token_cka_loss(x, y, mask=inputs.get("attention_mask"))  # without padding there is no mask
        # The trainer adds up the tasks of accumulated batches as shares of a mean over all their tokens.
        share = 1 / self.current_gradient_accumulation_steps if model.training and num_items_in_batch is not None else 1
        loss = self.weights[0] * task + self.weights[1] * share * distance
        print(f"loss {loss:.5f}, of the task {task:.5f}, CKA to the teacher {1 - distance:.5f}")
        return (loss, ours) if return_outputs else loss


def loaded(name: str, width: int, padded: int) -> tuple[Any, Any]:
    """A network and its tokenizer by a hub id or a folder; without a name a tiny network that reads bytes."""
    if name:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    vocabulary = {token: i for i, token in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokens = Tokenizer(models.BPE(vocabulary, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    sizes = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=2)
    network = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", vocab_size=padded, pad_token_id=0, **sizes)
    )
    return network, PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>", pad_token="<end>")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for flag, default, words in (
    ("student", "", "a causal language model: a hub id or a folder; none: a tiny one"),
    ("teacher", "", "the same"),
    ("texts", "", "a data set: a hub id or a folder; none: a dozen lines"),
    ("column", "text", "of the data set"),
    ("student-layer", 2, "after how many of its blocks hidden states are compared"),
    ("teacher-layer", 2, "the same"),
    ("length", 256, "tokens of a text at most"),
    ("batch", 6, "texts"),
    ("steps", 4, "of the optimizer"),
    ("lr", 1e-3, "of AdamW"),
):
    parser.add_argument(f"--{flag}", default=default, type=type(default), help=f"{words} (default: %(default)s)")
parser.add_argument("--packed", action="store_true", help="texts in one row, none of which sees another")
options = parser.parse_args()
if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:  # the trainer would split batches among threads
    parser.error("there are several GPUs: start it by torchrun, or choose one with CUDA_VISIBLE_DEVICES=0")

torch.manual_seed(0)
student, tokenizer = loaded(options.student, width=16, padded=257)
teacher, its_tokenizer = loaded(options.teacher, width=32, padded=320)
if tokenizer.get_vocab() != its_tokenizer.get_vocab():
    parser.error("student and teacher number their tokens differently: see bird.language.Guidance for that case")
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
lines = [{"text": f"Film {i} is {('good', 'poor', 'a joy')[i % 3]}."} for i in range(12)]
data = load_dataset(options.texts, split="train") if options.texts else Dataset.from_list(lines)
data = data.map(
    lambda row: {"input_ids": tokenizer(row[options.column], truncation=True, max_length=options.length)["input_ids"]},
    remove_columns=data.column_names,
)
on_gpu = torch.cuda.is_available()
HiddenStatesTrainer(
    student,
    args=TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=options.batch,
        max_steps=options.steps,
        report_to="none",
        learning_rate=options.lr,
        save_strategy="no",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        disable_tqdm=True,
    ),
    train_dataset=data,
    data_collator=DataCollatorWithFlattening()
    if options.packed
    else DataCollatorForLanguageModeling(tokenizer, mlm=False),
    teacher=teacher,
    layers=(options.student_layer, options.teacher_layer),
    weights=(0.5, 0.5),
).train()
