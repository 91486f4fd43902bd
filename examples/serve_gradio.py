"""A web page for a pool: ask it, see which tasks answered, mask some, compare with the base model.

python examples/quickstart.py && python examples/serve_gradio.py --pool quickstart-out/pool
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from serving import Served, example_prompts, pool_parser

from peft_sapt.errors import SaptError

ABOUT = """Nobody names a task: the attention over the pool's blocks decides how much of each one answers.
Untick tasks to take their blocks away; their share goes to the others."""


def respond(served: Served, prompt: str, allowed: list[str], compare: bool, length: float) -> tuple[Any, ...]:
    """What the page shows for a prompt: answer, attention, note, and the base model's answer if it is compared."""
    try:
        weights = served.weights(prompt, allowed) if prompt.strip() else None
        found = served.answer(prompt, weights, int(length))
    except SaptError as error:
        raise gr.Error(str(error), print_exception=False) from None
    base = served.answer(prompt, None, int(length)).text if compare else ""
    lead = max(weights or {}, key=lambda name: weights[name], default=None)
    who = f"**{lead}** leads with {weights[lead]:.0%}" if lead else "No task claims it: **the base model** answers"
    return (
        found.text,
        weights or {"the base model": 1.0},
        f"{who}; {found.seconds:.1f} s",
        gr.update(value=base, visible=compare),
    )


def build(served: Served, pool: Path) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="A pool of tasks") as page:
        gr.Markdown(f"# A pool of {len(served.tasks)} tasks\n{ABOUT}")
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(label="Prompt", lines=6, elem_id="prompt", placeholder="As in training, with its "
                                    "definition and ending, such as “Output:”")  # fmt: skip
                allowed = gr.CheckboxGroup(
                    served.tasks, value=served.tasks, label="Tasks that may answer", elem_id="allowed"
                )
                with gr.Row():
                    length = gr.Slider(1, 256, value=16, step=1, label="New tokens", elem_id="length")
                    compare = gr.Checkbox(label="Compare with the base model", elem_id="compare")
                with gr.Row():
                    ask = gr.Button("Answer", variant="primary", elem_id="ask")
                    gr.ClearButton([prompt], value="Clear", elem_id="clear")
            with gr.Column():
                answer = gr.Textbox(label="Answer of the pool", lines=3, elem_id="answer")
                note = gr.Markdown(elem_id="note")
                base = gr.Textbox(label="Answer of the base model", lines=3, visible=False, elem_id="base")
                bars = gr.Label(label="Attention by task", num_top_classes=12, elem_id="bars")
        examples = example_prompts(pool)
        if examples:
            gr.Examples([[text] for text in examples], [prompt], label="Pseudo-samples of the pool's tasks")
        inputs, outputs = [prompt, allowed, compare, length], [answer, bars, note, base]
        for event in (ask.click, prompt.submit):
            event(lambda *values: respond(served, *values), inputs, outputs, api_name="answer")
    return page


def main() -> int:
    parser = pool_parser(__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others in")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    try:
        served = Served(args.pool, args.model)
    except SaptError as error:
        print(error, file=sys.stderr)
        return 1
    build(served, args.pool).launch(server_name=args.host, server_port=args.port, share=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
