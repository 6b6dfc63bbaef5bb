"""Llama 4's special tokens, scaled down: the same names in the same order, after the BPE ranks.

Llama 4 has 200 000 ranks and 2048 special tokens. The first 19 keep their distance to the first special token
(`<|begin_of_text|>` is 200 000 there), the image and reasoning tokens follow without the gaps, 32 in all.
"""

BEGIN = "<|begin_of_text|>"
END = "<|end_of_text|>"
PAD = "<|finetune_right_pad|>"
STOPS = (END, "<|eom|>", "<|eot|>")
"""What ends generation: of a text, of a message that waits for a tool, of a turn."""

SPECIAL_TOKENS = (
    BEGIN,
    END,
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    "<|step|>",
    *(f"<|text_post_train_reserved_special_token_{number}|>" for number in range(6)),
    "<|python_start|>",
    "<|python_end|>",
    PAD,
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|image|>",
    "<|patch|>",
    "<|reasoning_thinking_start|>",
    "<|reasoning_thinking_end|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(5)),
)
