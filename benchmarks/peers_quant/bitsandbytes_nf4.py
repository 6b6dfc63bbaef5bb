"""bitsandbytes' 4-bit quantiser, matrix by matrix: through transformers it silently leaves fused experts in bf16."""

from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from protocol import read_job


def main() -> None:
    job = read_job()
    block, double = job.settings["block"], job.settings["double"]
    weights = job.matrices()
    with job.timed():
        packed = {
            name: quantize_4bit(weight_NK, blocksize=block, compress_statistics=double, quant_type="nf4")
            for name, weight_NK in weights.items()
        }
    made = {name: dequantize_4bit(codes, state) for name, (codes, state) in packed.items()}
    # Double quantisation: 8 bits a block and one fp32 for 256 blocks.
    job.finish(made, bits=4 + ((8 + 32 / 256) if double else 32) / block, peer="bitsandbytes")


if __name__ == "__main__":
    main()
