"""Make a decoder smaller, then halve its cache: python smaller.py MODEL TEXT OUTPUT [SHARE]

MODEL is a folder or a hub id (LLaMA or a relative), TEXT a file of some thousand words. OUTPUT gets
the small model of SHARE (0.75) of the parameters, which plain transformers loads. Then keys and
values are merged two by two. Neither is trained here: see docs/projected.md.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import variator_kernels as vk

name, text, output, *share = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
words = Path(text).read_text(encoding="utf-8")
ids = tokenizer(words, return_tensors="pt", verbose=False)["input_ids"]
batches = [{"input_ids": part} for part in ids[:, : 64 * 256].split(256, 1)]

small = vk.project(model, batches, float(share[0]) if share else 0.75)
print(small.variator_projection)
small = vk.merge(small)
small.save_pretrained(output)
tokenizer.save_pretrained(output)

vk.patch(small, {"attention_kv": 2}, ratios=(2,))
out = small.generate(input_ids=ids[:, :200], max_new_tokens=40, do_sample=False)
print(tokenizer.decode(out[0, 200:], skip_special_tokens=True))
