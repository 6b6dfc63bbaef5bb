"""llm-compressor: rounding to nearest, GPTQ, AWQ and FP8, each by its own modifiers and `oneshot`.

A text-only Llama 4 on a CPU needs three mends: a configuration with `text_config` (the expert module reads that), AWQ's
mapping with the router in it (the default leaves it out, which changes who is routed where), and no pinned memory.
"""

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from protocol import KEPT, QUANTISED, Job, kept_of, read_job
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Llama4TextConfig

LAYERS = ["re:.*gate_proj$", "re:.*up_proj$", "re:.*down_proj$"]


def recipe(job: Job, moe: bool) -> list:
    """The modifiers of one row."""
    if job.settings["scheme"] == "fp8":
        return [QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=list(KEPT))]
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", **job.settings["weights"])
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    chosen = {"config_groups": groups, "ignore": list(KEPT)}
    if job.settings["method"] == "gptq":
        return [GPTQModifier(**chosen)]
    if job.settings["method"] == "awq":
        router = ["re:.*feed_forward.router$"] if moe else []
        mappings = [
            AWQMapping("re:.*post_attention_layernorm$", [*router, "re:.*gate_proj$", "re:.*up_proj$"]),
            AWQMapping("re:.*up_proj$", ["re:.*down_proj$"]),
        ]
        return [AWQModifier(mappings=mappings), QuantizationModifier(**chosen)]
    return [QuantizationModifier(**chosen)]


def main() -> None:
    Llama4TextConfig.text_config = property(lambda config: config)
    torch.Tensor.pin_memory = lambda tensor: tensor  # AWQ pins its cache, which raises without an accelerator
    job = read_job()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
    moe = model.config.model_type == "llama4_text"
    given = {}
    if job.settings["method"] != "rtn":
        rows_NT = job.rows()
        rows = {"input_ids": rows_NT.tolist(), "attention_mask": torch.ones_like(rows_NT).tolist()}
        given = {"dataset": Dataset.from_dict(rows), "num_calibration_samples": len(rows_NT)}
        given["max_seq_length"] = rows_NT.shape[1]
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    with job.timed():
        oneshot(model=model, recipe=recipe(job, moe), processor=tokenizer, **given)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and QUANTISED.search(n)}
    scales = {n: (m.weight_scale, getattr(m, "weight_zero_point", None), m.quantization_scheme.weights) for n, m in
              layers.items()}  # fmt: skip
    weights = {n: fake_quantize(m.weight, *scales[n]) for n, m in layers.items()}
    if job.settings["scheme"] == "fp8":
        codes = {n: quantize(m.weight, *scales[n], dtype=torch.float8_e4m3fn) for n, m in layers.items()}
        job.save_codes({n: code.view(torch.uint8) for n, code in codes.items()}, {n: s[0] for n, s in scales.items()})
    parameters = sum(weight.numel() for weight in weights.values())
    width = 8 if job.settings["scheme"] == "fp8" else 4
    bits = width + 16 * sum(scale.numel() for scale, _, _ in scales.values()) / parameters
    job.finish(weights, bits=bits, peer="llmcompressor", kept=kept_of(model, job.tensors()))


if __name__ == "__main__":
    main()
