"""Answer questions by vLLM, in its environment: `python vllm_answers.py JOBS.json ANSWERS.json`.

JOBS: `{"classes": [names of model classes], "jobs": [{"model": folder, "adapters": {name: folder}, "max_tokens": n,
"questions": [[text, image], ...]}, ...]}`. ANSWERS: `{"facts": what vLLM adapts, "answers": [{name of the adapter or
"base": [token ids of each answer]}, ...]}`, an entry per job.
"""

import base64
import importlib
import json
import sys
from pathlib import Path
from typing import get_args

from vllm import LLM, SamplingParams
from vllm.config.lora import MaxLoRARanks
from vllm.lora.request import LoRARequest
from vllm.model_executor.models.registry import _VLLM_MODELS


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    results = {"facts": list_facts(task["classes"]), "answers": [answer(**job) for job in task["jobs"]]}
    Path(sys.argv[2]).write_text(json.dumps(results))


def list_facts(names: list[str]) -> dict:
    """List the LoRA ranks, and of these classes those with adapters in the LM head and in the vision encoder."""
    classes = {}
    for name in names:
        module, class_name = _VLLM_MODELS[name]
        classes[name] = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), class_name)
    return {
        "ranks": get_args(MaxLoRARanks),
        "heads": [name for name, cls in classes.items() if "lm_head" in getattr(cls, "embedding_modules", {})],
        "towers": [name for name, cls in classes.items() if getattr(cls, "supports_tower_connector_lora", False)],
    }


def answer(model: str, adapters: dict[str, str], max_tokens: int, questions: list) -> dict[str, list[list[int]]]:
    """Answer all questions by the base model and with each adapter."""
    # Only the chat layout's class adapts the vision encoder; the other one would warn.
    lora = {"enable_lora": True, "max_lora_rank": 16, "max_loras": 1} if adapters else {}
    is_chat = json.loads(Path(model, "config.json").read_text())["model_type"] == "internvl_chat"
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=4,
        trust_remote_code=is_chat,
        enable_tower_connector_lora=bool(adapters) and is_chat,
        **lora,
    )
    dialogues = [[{"role": "user", "content": build_content(*question)}] for question in questions]
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    requests = {"base": None}
    requests |= {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(adapters.items(), start=1)}
    results = {}
    for name, request in requests.items():
        outputs = llm.chat(dialogues, sampling, lora_request=request, use_tqdm=False)
        results[name] = [list(output.outputs[0].token_ids) for output in outputs]
    return results


def build_content(text: str, image: str) -> list[dict]:
    url = f"data:image/png;base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]


if __name__ == "__main__":
    main()
