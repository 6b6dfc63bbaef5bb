"""AutoRound W4A16: sign-gradient rounding, or (iters = 0) its own rounding to nearest.

Release 0.15.1 left fused experts of a text-only Llama 4 in bf16 and said nothing; hence they are unfused beforehand.
"""

import torch
from auto_round import AutoRound
from protocol import QUANTISED, kept_of, read_job, unfuse
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    job = read_job()
    group, iters = job.settings["group_size"], job.settings["iters"]
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
    unfuse(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept = {name: {"bits": 16} for name in linears if not QUANTISED.search(name) and name != "lm_head"}
    rows_NT = job.rows()
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model),
        scheme={"bits": 4, "group_size": group, "sym": True, "data_type": "int", "act_bits": 16},
        layer_config=kept,
        dataset=[{"input_ids": row_T[None]} for row_T in rows_NT],
        iters=iters,
        nsamples=len(rows_NT),
        seqlen=rows_NT.shape[1],
        batch_size=8,
        device_map="cpu",
        enable_torch_compile=False,
    )
    with job.timed():
        tuned, _ = tuner.quantize()
    weights = {n: m.weight for n, m in tuned.named_modules() if QUANTISED.search(n) and hasattr(m, "weight")}
    job.finish(weights, bits=4 + 16 / group, peer="auto-round", kept=kept_of(tuned, job.tensors()))


if __name__ == "__main__":
    main()
