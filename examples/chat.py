r"""Chat with a pool in the terminal; each answer says which tasks gave it.

    python examples/chat.py --pool quickstart-out/pool --wrap '{}\nOutput:'

`--wrap` says how a line is written, as in training; without it lines go through the chat template. Each turn has the
mixture of its own prompt, and what no task claims is answered by the base model; with `--turns first` the first turn
decides for the whole conversation. `/task NAME` asks one task by name, `/auto` goes back to the attention, `/new`
begins a new conversation, `/quit` ends.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from serving import Served, pool_parser
from transformers import DynamicCache

from peft_sapt.compat import cache_argument
from peft_sapt.errors import SaptError


class Conversation:
    """Turns on one KV cache, each answered by the mixture of its own prompt or all by that of the first."""

    def __init__(self, served: Served, max_new_tokens: int, wrap: str | None = None, turns: str = "each") -> None:
        self.served, self.max_new_tokens, self.wrap, self.mixture_of = served, max_new_tokens, wrap, turns
        self.task: str | None = None
        self.begin()

    def begin(self) -> None:
        """Forget the conversation."""
        self.turns: list[dict[str, str]] = []
        self.weights: dict[str, float] | None = None  # of the last turn; empty where the base model answered it
        self.cache = DynamicCache(config=self.served.model.config)
        self.ids = torch.zeros(1, 0, dtype=torch.long, device=self.served.model.device)  # what the cache holds,
        self.read = ""  # and as text

    def text(self, turns: list[dict[str, str]]) -> str:
        """Some turns of the conversation as the model reads them."""
        tokenizer = self.served.tokenizer
        if self.wrap is not None:
            asked = [self.wrap.format(t["content"]) if t["role"] == "user" else t["content"] for t in turns]
            return "\n".join(asked)
        if tokenizer.chat_template is not None:
            return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return "\n".join(turn["content"] for turn in turns) + "\n"

    @torch.no_grad()
    def say(self, text: str) -> str:
        """The answer to one more turn."""
        self.turns.append({"role": "user", "content": text})
        whole = self.text(self.turns)
        if not whole.startswith(self.read):  # a template that rewrites earlier turns: read it all again
            self.cache, self.ids, self.read = DynamicCache(config=self.served.model.config), self.ids[:, :0], ""
        new = self.served.encode(whole[len(self.read) :])["input_ids"]
        ids = torch.cat([self.ids, new], dim=1)  # [1, S]
        if self.weights is None or self.mixture_of == "each":
            named = {name: float(name == self.task) for name in self.served.tasks}
            asked = self.text(self.turns[-1:])
            self.weights = self.served.weights(asked) if self.task is None else named
        row = torch.tensor([[self.weights.get(name, 0.0) for name in self.served.tasks]])
        tokens = self.served.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), sapt_weights=row, do_sample=False,
            max_new_tokens=self.max_new_tokens, **{cache_argument(self.served.model.get_base_model()): self.cache},
        )  # fmt: skip
        self.ids = tokens[:, :-1]  # the last token, which is the end or the limit, was never read
        decode = self.served.tokenizer.decode
        self.read = whole + decode(self.ids[0, ids.shape[1] :])
        answer = decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        self.turns.append({"role": "assistant", "content": answer})
        return answer.strip()

    def command(self, line: str) -> str:
        """What a line that begins with a slash does, as text."""
        word, _, rest = line.partition(" ")
        if word == "/task" and rest in self.served.tasks:
            self.task = rest
        elif word == "/auto":
            self.task = None
        elif word != "/new":
            return f"There are /task NAME with one of {self.served.tasks}, /auto, /new and /quit."
        self.begin()
        return f"New conversation, answered by {self.task or 'the attention'}."


def lines_from(given: list[str]) -> Iterable[str]:
    """Given lines, or those of the keyboard until /quit or the end."""
    if given:
        yield from given
        return
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        yield line


def main() -> int:
    parser = pool_parser(__doc__.splitlines()[0])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--wrap", help=r"how a line is written in place of the chat template, such as '{}\nOutput:'")
    parser.add_argument("--turns", choices=("each", "first"), default="each", help="whose prompt decides the mixture")
    parser.add_argument("--say", action="append", default=[], help="a line, in place of the keyboard; repeat it")
    args = parser.parse_args()
    try:
        served = Served(args.pool, args.model)
    except SaptError as error:
        print(error, file=sys.stderr)
        return 1
    wrap = None if args.wrap is None else args.wrap.replace("\\n", "\n")
    talk = Conversation(served, args.max_new_tokens, wrap, args.turns)
    decides = "each turn by its own prompt" if args.turns == "each" else "all turns by the first prompt"
    print(f"Tasks: {', '.join(served.tasks)}; {decides}. /task NAME, /auto, /new, /quit.")
    for line in lines_from(args.say):
        if line.startswith("/"):
            print(talk.command(line))
        elif line:
            print(talk.say(line))
            shares = sorted((talk.weights or {}).items(), key=lambda pair: -pair[1])
            told = ", ".join(f"{name} {weight:.2f}" for name, weight in shares[:4])
            print(f"  [{told or 'the base model: no task claims this'}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
