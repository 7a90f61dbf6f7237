"""Remake tests/models/golden/sentencepiece.json: a small SentencePiece BPE vocabulary, and ids of texts.

Needs `pip install sentencepiece`. Takes one second:

    python scripts/make_golden_sentencepiece.py

The file holds the vocabulary in the format of GGUF (tokens, scores, token types). It is trained like that of Llama 2:
BPE, split digits, byte fallback for unknown characters, no normalisation.
"""

import io
import json
from pathlib import Path

import sentencepiece

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "models" / "golden" / "sentencepiece.json"
TEXTS = [
    "Hello, world!",
    "The licensor grants you a copyright license to reproduce and distribute the work.",
    "1234 + 5678 = 6912",
    "naïve café 日本語 🙂",
    " leading and trailing ",
    "tabs\tand\n\nnewlines",
    "unless required by applicable law or agreed to in writing, software",
]

if __name__ == "__main__":
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((ROOT / "LICENSE").read_text().splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(sp.vocab_size())
    golden = {
        "tokens": [sp.id_to_piece(i) for i in ids],
        "scores": [sp.get_score(i) for i in ids],
        "token_type": [
            2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in ids
        ],
        "texts": [{"text": text, "ids": sp.encode(text)} for text in TEXTS],
    }
    GOLDEN.write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{GOLDEN}: {sp.vocab_size()} tokens, sentencepiece {sentencepiece.__version__}")
