"""What a pool does not do, why, and what to do instead; said where PEFT or transformers would ask for it."""

NO_BATCH = (
    "Continuous batching (generate_batch) is not supported: it flattens the tokens of all requests into one row, so "
    "that no prompt can be told from another. Use generate with a left-padded batch."
)
NO_MERGE = (
    "A pool cannot be merged into the base model: its mixture differs from prompt to prompt. Keep the adapter, call "
    "unload() for the base model without it, or export_mixture(weights, folder) for one fixed mixture, which is a "
    "plain LoRA and merges."
)
NO_WEIGHTED = (
    "add_weighted_adapter is not there: a pool mixes its tasks for each prompt. For one fixed mixture pass "
    "sapt_weights=[...], or export_mixture(weights, folder), which is a plain LoRA, and import_task(name, folder)."
)
NO_ADAPTER_NAMES = (
    "adapter_names (one adapter per row) is not supported: tasks live inside one adapter, so pass sapt_task=[name, "
    "...] with one task per row instead."
)
POOL_IN_POOL = (
    "This model holds a pool already, and get_peft_model would put another one around it. Use model.add_task(name) "
    "for another task, model.add_adapter(name, config) for a second pool, or model.unload() first for a fresh one."
)
