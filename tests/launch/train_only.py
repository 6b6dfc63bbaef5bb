"""The trainer without what follows it (models, exports, evaluation, report), for tests of the training itself.

deepspeed --num_accelerators 2 tests/launch/train_only.py --config configs/smoke.yaml
... --runs '{"one": [], "two": ["parallel.zero=3"]}'         several one after another, each with settings of its own
"""

import hashlib
import json
import sys

import torch

from herd.run import cli, files, randomness, ranks
from herd.run.config import load
from herd.run.tracking import open_tracker


def main() -> int:
    parser = cli.parser("train_only", description=__doc__, examples=(), resume=True)
    parser.add_argument("--runs", type=json.loads, default={"run": []})
    arguments = parser.parse_args()

    def body() -> None:
        sets = [[*arguments.set, *overrides, f"run.name={name}"] for name, overrides in arguments.runs.items()]
        configs = [load(arguments.config, words) for words in sets]
        ranks.initialise()
        for config in configs:
            train(config, arguments.resume)
        ranks.shut_down()

    return cli.main_guard(body)


def train(config, resume) -> None:
    """As `session.run` does, up to the last step."""
    from distill import session
    from distill.assembly import assemble
    from distill.loop import Loop

    folder = config.run.folder / config.run.name
    resume_from = session.prepare_folder(config, folder, resume=resume, command="train_only")
    tracker = open_tracker(folder, experiment="tests", run_name="tests", enabled=False)
    randomness.seed_everything(config.run.seed, rank=ranks.rank())
    parts = assemble(config, folder)
    Loop(parts, config, folder, tracker).run(resume_from=resume_from, resume_command="RESUME")
    write_digests(parts, folder)
    write_groups(parts, folder)
    parts.herd.close()


def write_digests(parts, folder) -> None:
    """SHA-256 of every model's final weights, one a line."""
    from herd.llama4.expert_parallel import full_state_dict

    lines = []
    for name, member in parts.herd.members.items():
        state = full_state_dict(member.engine)
        if state is not None:
            digest = hashlib.sha256()
            for key in sorted(state):
                digest.update(state[key].contiguous().view(torch.uint8).numpy().tobytes())
            lines.append(f"{name} {digest.hexdigest()}\n")
    if ranks.is_main():
        files.write_atomic(folder / "digests.txt", "".join(lines))


def write_groups(parts, folder) -> None:
    """What AdamW does to every group of every model on rank 0, as JSON."""
    kinds = ("lr_factor", "eps", "weight_decay", "betas")
    found = {
        name: [{kind: group[kind] for kind in kinds} for group in member.engine.optimizer.param_groups]
        for name, member in parts.herd.members.items()
    }
    if ranks.is_main():
        files.write_atomic(folder / "groups.json", json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
