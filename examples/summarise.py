"""Summarise a text, keys and values merged two by two: python summarise.py MODEL TEXT [PLUGINS]

MODEL is a folder or a hub id (LLaMA or a relative, with a chat template), PLUGINS a folder of
plugins trained for it (for SmolLM2-135M-Instruct: examples/smollm2). Without them this is a coarse
model, which warns.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import variator_kernels as vk

name, text, *plugins = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
if plugins:
    vk.load_plugins(model, plugins[0])  # patches it as they need
else:
    vk.patch(model, ratios=(2,), placements=("attention_kv",))
vk.set_ratio(model, {"attention_kv": 2})
task = f"{Path(text).read_text(encoding='utf-8')}\n\nSummarise this text in one sentence."
form = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
prompt = tokenizer.apply_chat_template([{"role": "user", "content": task}], **form)
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
model.generate(**prompt, max_new_tokens=60, do_sample=False, streamer=streamer)
