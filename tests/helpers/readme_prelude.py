"""What the README's Python blocks take as given, at tiny size."""

import torch
from transformers import TrainingArguments

import peft_sapt.arm.callback as callback
from helpers.tiny import tiny_llama
from helpers.words import collate, prompts_of, rows_of
from helpers.words import tokenizer as make_tokenizer
from peft_sapt import GeneratorSettings

torch.set_num_threads(1)
torch.manual_seed(0)
base, fresh_base, tokenizer = tiny_llama(), tiny_llama(), make_tokenizer()
fresh_base.load_state_dict(base.state_dict())
stream = [("agnews", rows_of("a")), ("dbpedia", rows_of("b"))]
collator = collate
prompts = prompts_of("a", seed=1)
args = TrainingArguments(output_dir="trainer", max_steps=4, report_to="none", save_strategy="no", use_cpu=True)
# a random base needs more than q and v, and a large rate, to learn to end its samples
callback.GeneratorSettings = lambda: GeneratorSettings(epochs=30, learning_rate=2e-2, lora_dropout=0.0)
