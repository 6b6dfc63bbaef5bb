"""One of two gloo ranks: trains the same model under each (ZeRO, EP) pair and writes what it saw.

Started by conftest.py: RANK and WORLD_SIZE set, one argument, the folder for results.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from herd.llama4.balance import ExpertLoad, RouterTap, balance_loss
from herd.llama4.expert_parallel import full_state_dict, install_preset
from herd.llama4.experts import use_sparse_experts
from herd.llama4.model import build
from herd.run.deepspeed_config import autoep_section

STEPS, ROWS, LENGTH, LR, CLIP = 4, 4, 48, 1e-2, 1.0
OVERRIDES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "intermediate_size_mlp": 128,
    "num_local_experts": 8,
}
# (ZeRO stage, ranks the experts are spread over; 0 means no AutoEP but the sparse experts)
CASES = [(1, 0), (2, 0), (3, 0), (1, 1), (3, 1), (1, 2), (2, 2), (3, 2)]
# (ZeRO stage, EP, accumulation, bf16) whose bytes are measured
HELD_CASES = [(1, 0, 1, False), (1, 0, 2, True), (2, 2, 1, True), (3, 0, 1, False), (3, 2, 2, True), (1, 2, 1, True)]
PERSISTENCE_THRESHOLD = 5000  # some parameters stay whole under ZeRO-3, most do not


def make_model():
    """Return the model all cases start from; maverick-nano has dense and MoE layers."""
    return build("maverick-nano", overrides=OVERRIDES, seed=0)


def make_batches():
    """Return tokens [STEPS, ROWS, LENGTH]: two batches in turn, so that there is something to learn."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(512, (2, ROWS, LENGTH), generator=generator).repeat(STEPS // 2, 1, 1)


def ds_config(zero, expert_parallel, *, accumulation=1, bf16=False):
    """Return DeepSpeed's configuration of one case."""
    config = {
        "train_micro_batch_size_per_gpu": ROWS // 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIP,  # also DeepSpeed's default: leaving it out does not mean no clipping
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.0, "torch_adam": True}},
        "zero_optimization": {
            "stage": zero,
            "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
            "reduce_bucket_size": 1_000_000,
        },
        "zero_allow_untested_optimizer": True,
    }
    if expert_parallel:
        config["expert_parallel"] = autoep_section(expert_parallel)
    return config


def make_engine(zero, expert_parallel, **settings):
    """Return a DeepSpeed engine of the model."""
    model = make_model()
    if not expert_parallel:
        use_sparse_experts(model)
    config = ds_config(zero, expert_parallel, **settings)
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def storage_bytes(tensors):
    """Return the bytes of the tensors' storages, shared ones counted once."""
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


def held_bytes(engine, zero):
    """Return what an engine holds between backward and step, in the kinds of plan.StateBytes."""
    parameters, optimizer = list(engine.module.parameters()), engine.optimizer
    if zero == 3:
        weights = [*parameters, *(parameter.ds_tensor for parameter in parameters)]
        partitions = {tensor.untyped_storage().data_ptr() for tensor in weights}
        masters = [
            t for t in optimizer.fp32_partitioned_groups_flat if t.untyped_storage().data_ptr() not in partitions
        ]
        gradients = [optimizer.grad_partitions_flat_buffer]
    else:
        weights, masters = parameters, optimizer.single_partition_of_fp32_groups
        gradients = [tensor for group in optimizer.averaged_gradients.values() for tensor in group or []]
        gradients += [parameter.grad for parameter in parameters if parameter.grad is not None]
    moments = [t for state in optimizer.optimizer.state.values() for t in state.values() if t.numel() > 1]
    return {
        "weights": storage_bytes(weights),
        "gradients": sum(tensor.numel() * tensor.element_size() for tensor in gradients),
        "master": storage_bytes(masters),
        "moments": storage_bytes(moments),
    }


def measure(zero, expert_parallel, **settings):
    """Return held_bytes in the second optimiser step, after the first micro step and before the last one's update."""
    engine = make_engine(zero, expert_parallel, **settings)
    rows = make_batches()[0].chunk(2)[dist.get_rank()]
    for _ in range(2):
        held = []
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(input_ids=rows, labels=rows).loss)
            held.append(held_bytes(engine, zero))
            engine.step()
    return held


def train(zero, expert_parallel, folder):
    """Return losses (mean over ranks) and how the router logits look; save the gathered weights."""
    engine = make_engine(zero, expert_parallel)
    losses = []
    tap = RouterTap(engine.module)
    for batch in make_batches():
        rows = batch.chunk(2)[dist.get_rank()]
        outputs = engine(input_ids=rows, labels=rows, output_router_logits=True)
        shapes = [list(logits.shape) for logits in tap.take()]
        recorded = [list(logits.shape) for logits in outputs.router_logits]
        engine.backward(outputs.loss)
        engine.step()
        mean = outputs.loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / 2)
    tap.close()
    state = full_state_dict(engine)
    with torch.no_grad():
        rows = make_batches()[0].chunk(2)[0]  # the same rows on both ranks, so that both make the same calls
        logits = engine.module(rows).logits
    if dist.get_rank() == 0:
        save_file({"expected_logits": logits, **state}, folder / f"zero{zero}_ep{expert_parallel}.safetensors")
    return {"losses": losses, "tapped": shapes, "recorded": recorded, "others_got_none": state is None}


def make_logits():
    """Return router logits of two layers with 8 and 4 experts, for 64 tokens; some experts are favoured."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(64, experts, generator=generator) + torch.arange(experts) / 4 for experts in (8, 4)]


def balance():
    """Return this rank's balance loss on its half of the tokens, its gradient, and the load over both ranks."""
    halves = [logits.chunk(2)[dist.get_rank()].clone().requires_grad_() for logits in make_logits()]
    loss = balance_loss(halves, 2)
    loss.backward()
    load = ExpertLoad(2)
    load.add(halves)
    return {"loss": loss.item(), "grads": [half.grad.tolist() for half in halves], "load": load.take().load}


def main():
    folder = Path(sys.argv[1])
    deepspeed.init_distributed("gloo")
    install_preset()
    install_preset()
    results = {f"zero{zero}_ep{ep}": train(zero, ep, folder) for zero, ep in CASES}
    results["held"] = [
        {"zero": zero, "expert_parallel": ep, "accumulation": steps, "bf16": bf16, "held": held}
        for zero, ep, steps, bf16 in HELD_CASES
        for held in [measure(zero, ep, accumulation=steps, bf16=bf16)]
    ]
    results["balance"] = balance()
    results["heavy"] = [name for name in ("mlflow", "torch._inductor.compile_fx") if name in sys.modules]
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
